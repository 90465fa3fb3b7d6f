//! Removes what a build has left, whatever it is: folders without permissions, trees deeper than any path may be long, files that must
//! not change, mounts. It never leaves the folder: no symbolic link is followed and no mounted file system is emptied. It needs no space.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use rustix::fs::{
    AtFlags, Dir, FileType, IFlags, Mode, OFlags, ResolveFlags, fstat, ioctl_getflags, ioctl_setflags, openat, openat2,
    statat, unlinkat,
};
use rustix::io::Errno;

use crate::model::clean_line;

/// Read, write and search: without them the owner of a folder cannot empty it.
const OWNER: u32 = 0o700;
/// How often a folder is emptied again, all in all, when something was put into it meanwhile.
const AGAIN: u32 = 100;
/// How many file systems mounted over one place are taken off.
const MOUNTS: u32 = 16;

/// Removes `name`, a file or a whole tree, from `folder`. What is not there is removed. Goes on past what cannot be removed.
///
/// # Errors
/// The first one, with the path below `folder`.
pub fn remove(folder: BorrowedFd, name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    let failed = |error: Errno| named(&[], &name, error);
    match statat(folder, &*name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Directory => {
            unlink(folder, &name, AtFlags::empty()).map_err(failed)
        }
        Ok(_) => Walk { path: Vec::new(), again: AGAIN, first_error: None }.run(folder, name),
    }
}

/// [`remove`] of a path. The folder that it is in may be reached through symbolic links.
///
/// # Errors
/// As of [`remove`], and when the folder cannot be opened.
pub fn remove_path(path: &Path) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    match rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(folder) => remove(folder.as_fd(), name),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens the folder `name` in `folder`, never through a symbolic link, and lets its owner read, write and search it. True: its owner could
/// not before, and can now.
///
/// # Errors
/// It is not there, is no folder, or is another file system's root.
pub fn open_folder(folder: BorrowedFd, name: &CStr) -> rustix::io::Result<(OwnedFd, bool)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let handle = match openat2(folder, name, flags, Mode::empty(), ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS) {
        // Kernels before 5.6, and filters that do not know the call.
        Err(Errno::NOSYS | Errno::PERM) => {
            let handle = openat(folder, name, flags, Mode::empty())?;
            if fstat(&handle)?.st_dev != fstat(folder)?.st_dev {
                return Err(Errno::XDEV);
            }
            handle
        }
        opened => opened?,
    };
    let changed = let_owner_in(handle.as_fd())?;
    Ok((handle, changed))
}

/// True: `folder` did not let its owner in, and does now. One that is not ours stays as it is.
pub fn let_owner_in(folder: BorrowedFd) -> rustix::io::Result<bool> {
    let mode = fstat(folder)?.st_mode & 0o7777;
    if mode & OWNER == OWNER {
        return Ok(false);
    }
    // A handle on a path takes no fchmod(2), and the name may be another file by now.
    let itself = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let change = || rustix::fs::chmod(&*itself, Mode::from_raw_mode(mode | OWNER));
    let changed = match change() {
        Err(Errno::PERM) if allow_changes(folder, c".") => change(),
        changed => changed,
    };
    Ok(changed.is_ok())
}

/// A folder on the way down.
struct Level {
    name: CString,
    /// Device and inode, to know it again on the way up.
    id: (u64, u64),
    /// Folders in it that are not removed yet.
    folders: Vec<CString>,
    /// Something in it cannot be removed.
    failed: bool,
}

struct Walk {
    path: Vec<Level>,
    again: u32,
    first_error: Option<io::Error>,
}

impl Walk {
    /// Down and up with one open folder at a time, however deep the tree is.
    fn run(mut self, top: BorrowedFd, name: CString) -> io::Result<()> {
        let mut here = match self.enter(top, name.clone()) {
            Ok(here) => here,
            Err(error) => return Err(named(&[], &name, error)),
        };
        while let Some(level) = self.path.last_mut() {
            if let Some(name) = level.folders.pop() {
                match self.enter(here.as_fd(), name.clone()) {
                    Ok(below) => here = below,
                    Err(Errno::NOENT) => {}
                    Err(error) => self.failed(&name, error),
                }
                continue;
            }
            let Some(done) = self.path.pop() else { break };
            let above = match self.path.last() {
                None => top.try_clone_to_owned()?,
                Some(level) => {
                    let above = open_for_reading(here.as_fd(), c"..")?;
                    // Somebody who moves folders about meanwhile does not lead us out of the tree.
                    if id_of(above.as_fd())? != level.id {
                        let text = "a folder was moved away while it was being removed";
                        return Err(io::Error::other(text));
                    }
                    above
                }
            };
            here = above;
            match unlink(here.as_fd(), &done.name, AtFlags::REMOVEDIR) {
                Ok(()) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) if !done.failed && self.again > 0 => {
                    self.again -= 1;
                    match self.path.last_mut() {
                        Some(level) => level.folders.push(done.name),
                        None => here = self.enter(top, done.name).map_err(|error| named(&[], &name, error))?,
                    }
                }
                // What is in it was complained of.
                Err(Errno::NOTEMPTY | Errno::EXIST) if done.failed => {}
                Err(error) => self.failed(&done.name, error),
            }
            if done.failed
                && let Some(level) = self.path.last_mut()
            {
                level.failed = true;
            }
        }
        self.first_error.map_or(Ok(()), Err)
    }

    /// Goes into a folder and removes all that is no folder.
    fn enter(&mut self, folder: BorrowedFd, name: CString) -> rustix::io::Result<OwnedFd> {
        let mut mounts = MOUNTS;
        let handle = loop {
            match open_folder(folder, &name) {
                // Left by a build of root's outside a namespace. Only the mount goes.
                Err(Errno::XDEV) if mounts > 0 && unmount(folder, &name) => mounts -= 1,
                opened => break opened?.0,
            }
        };
        let here = open_for_reading(handle.as_fd(), c".")?;
        self.path.push(Level { name, id: id_of(here.as_fd())?, folders: Vec::new(), failed: false });
        let mut folders = Vec::new();
        for entry in Dir::read_from(&here)? {
            let name = match entry {
                Ok(entry) => entry.file_name().to_owned(),
                Err(error) => {
                    self.failed(c".", error);
                    break;
                }
            };
            if &*name == c"." || &*name == c".." {
                continue;
            }
            match unlink(here.as_fd(), &name, AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR) => folders.push(name),
                Err(error) => self.failed(&name, error),
            }
        }
        if let Some(level) = self.path.last_mut() {
            level.folders = folders;
        }
        Ok(here)
    }

    fn failed(&mut self, name: &CStr, error: Errno) {
        if self.first_error.is_none() {
            self.first_error = Some(named(&self.path, name, error));
        }
        if let Some(level) = self.path.last_mut() {
            level.failed = true;
        }
    }
}

/// Removes a file, or an empty folder with `REMOVEDIR`, even one that must not change, where we may allow that again.
fn unlink(folder: BorrowedFd, name: &CStr, flags: AtFlags) -> rustix::io::Result<()> {
    let removed = match unlinkat(folder, name, flags) {
        Err(Errno::PERM) => {
            // Folders, and what is in them, may be immutable or for appending alone (chattr(1)). Both have to allow it.
            let above = allow_changes(folder, c".");
            let itself = allow_changes(folder, name);
            if above || itself { unlinkat(folder, name, flags) } else { Err(Errno::PERM) }
        }
        Err(Errno::BUSY) if unmount(folder, name) => unlinkat(folder, name, flags),
        removed => removed,
    };
    match removed {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

/// Takes away what keeps a file or folder from being changed. True: there was something.
fn allow_changes(folder: BorrowedFd, name: &CStr) -> bool {
    let Ok(found) = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else { return false };
    // Opening anything else may do something.
    if !matches!(FileType::from_raw_mode(found.st_mode), FileType::RegularFile | FileType::Directory) {
        return false;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = openat(folder, name, flags, Mode::empty()) else { return false };
    let fixed = IFlags::IMMUTABLE | IFlags::APPEND;
    match ioctl_getflags(&file) {
        Ok(flags) if flags.intersects(fixed) => ioctl_setflags(&file, flags - fixed).is_ok(),
        Ok(_) | Err(_) => false,
    }
}

fn unmount(folder: BorrowedFd, name: &CStr) -> bool {
    let path = Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(OsStr::from_bytes(name.to_bytes()));
    umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok()
}

fn open_for_reading(folder: BorrowedFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn id_of(folder: BorrowedFd) -> rustix::io::Result<(u64, u64)> {
    fstat(folder).map(|found| (found.st_dev, found.st_ino))
}

/// An error with the path that it is about, which may be longer than anybody wants to read.
fn named(path: &[Level], name: &CStr, error: Errno) -> io::Error {
    const SHOWN: usize = 20;
    let mut shown: PathBuf = path.iter().take(SHOWN).map(|level| OsStr::from_bytes(level.name.to_bytes())).collect();
    if path.len() > SHOWN {
        shown.push("...");
    }
    shown.push(OsStr::from_bytes(name.to_bytes()));
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("remove `{}`: {error}", clean_line(&shown.to_string_lossy(), 300)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn folder() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("buildreactor-remove-{}", crate::executor::new_id().unwrap()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn odd_names_links_and_sockets_go_and_what_links_point_to_stays() {
        let dir = folder();
        let (tree, precious) = (dir.join("tree"), dir.join("precious"));
        std::fs::create_dir_all(tree.join("a\nb/\u{202e}c")).unwrap();
        std::fs::create_dir_all(precious.join("below")).unwrap();
        std::fs::write(precious.join("file"), "kept").unwrap();
        std::fs::set_permissions(&precious, PermissionsExt::from_mode(0o555)).unwrap();
        for name in ["a\nb/link", "-rf", "a\nb/\u{202e}c/x"] {
            symlink(&precious, tree.join(name)).unwrap();
        }
        symlink("no/such/place", tree.join("dangling")).unwrap();
        std::fs::write(tree.join(OsStr::from_bytes(b"\xff\xfe")), "").unwrap();
        std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
        remove_path(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(std::fs::read_to_string(precious.join("file")).unwrap(), "kept");
        assert_eq!(std::fs::metadata(&precious).unwrap().permissions().mode() & 0o777, 0o555);
        // A link in the place of the tree is removed itself.
        symlink(&precious, &tree).unwrap();
        remove_path(&tree).unwrap();
        assert!(!tree.is_symlink() && precious.join("below").exists());
        // Nothing is there: nothing to do.
        remove_path(&tree).unwrap();
        remove_path(&dir.join("no/such/folder")).unwrap();
        remove_path(&dir).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn a_tree_deeper_than_paths_and_open_files_go_is_removed() {
        let dir = folder();
        let mut here = rustix::fs::open(&dir, OFlags::PATH, Mode::empty()).unwrap();
        for depth in 0..5_000 {
            rustix::fs::mkdirat(&here, "d", Mode::from_raw_mode(0o700)).unwrap();
            if depth % 100 == 0 {
                rustix::fs::mkdirat(&here, "beside", Mode::from_raw_mode(0o700)).unwrap();
            }
            here = openat(&here, "d", OFlags::PATH, Mode::empty()).unwrap();
        }
        remove_path(&dir).unwrap();
        assert!(!dir.exists());
    }
}
