//! Who is at the other end of the socket between a daemon and its keeper. Builds can reach the worker's folder, so a name in it proves
//! nothing: who answers at `keeper.sock` may be a build, and so may who calls there. Each side holds a record lock (fcntl(2)) on a file
//! of its own, `daemon.pid` or `keeper.pid`, and the other asks the kernel whose it is. Such a lock cannot be inherited, or taken from a
//! process that lives.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid, getpid};

use super::tree::is_below;

/// Name of the socket in the worker's folder.
pub const SOCKET: &str = "keeper.sock";
/// Name of the file in the worker's folder that the daemon holds, while it is the one that may give orders.
pub const DAEMON: &str = "daemon.pid";
/// Name of the file in the worker's folder that the keeper holds.
pub const KEEPER: &str = "keeper.pid";

/// Somebody may put a file of its own into the place again and again.
const TRIES: u32 = 20;
/// What is moved out of the way is named after what it stood for, and this.
const ASIDE: &str = ".aside-";

/// Opens a file of the worker's folder for reading and writing; makes it, for this user alone, where there is none. What is there and is
/// no plain file (a folder, a link to elsewhere, a FIFO that never opens) is none of ours, and is moved out of the way.
///
/// # Errors
/// It cannot be opened, or what is in its place cannot be moved. They name the file.
pub fn own_file(path: &Path) -> io::Result<File> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("`{}`: {error}", path.display()));
    if std::fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
        put_aside(path).map_err(named)?;
    }
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let mut options = File::options();
    options.create(true).truncate(false).read(true).write(true).mode(0o600).custom_flags(flags.bits());
    options.open(path).map_err(named)
}

/// Frees a name. A folder may hold any number of files, and removing them may take long: it gets another name.
fn put_aside(path: &Path) -> io::Result<()> {
    let removed = match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => std::fs::remove_dir(path),
        _ => return Ok(()),
    };
    if removed.is_ok() {
        return Ok(());
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{ASIDE}{}", crate::clock::boottime().as_nanos()));
    std::fs::rename(path, PathBuf::from(name))
}

/// Removes what was moved out of the way in the worker's folder. What cannot be removed stays, and is in nobody's way.
pub fn remove_aside(dir: &Path) {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in names.filter(|entry| entry.file_name().to_string_lossy().contains(ASIDE)) {
        if let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::debug!("cannot remove `{}`: {error}", entry.path().display());
        }
    }
}

/// A record lock on a file of the worker's folder: the kernel tells everybody that it is this process's.
pub struct Mark {
    path: PathBuf,
    /// Closing any descriptor of the file would free the lock, so nothing else in this process opens it.
    file: File,
}

impl Mark {
    /// Puts this process's mark on `path`.
    ///
    /// # Errors
    /// The file cannot be made, or the file system has no locks.
    pub fn put(path: &Path) -> io::Result<Mark> {
        let mut error = Errno::EAGAIN;
        for _ in 0..TRIES {
            let file = own_file(path)?;
            match fcntl(&file, FcntlArg::F_SETLK(&whole_file())) {
                Ok(_) => return Ok(Mark { path: path.to_owned(), file }),
                // The caller holds `daemon.lock` or `keeper.lock`, so whoever has this is none of ours.
                Err(Errno::EAGAIN | Errno::EACCES) => put_aside(path)?,
                Err(other) => {
                    error = other;
                    break;
                }
            }
        }
        let error = io::Error::from(error);
        Err(io::Error::new(error.kind(), format!("lock `{}`: {error}", path.display())))
    }

    /// Puts it there again if somebody has replaced or removed the file.
    ///
    /// # Errors
    /// As of [`Mark::put`].
    pub fn put_right(&mut self) -> io::Result<()> {
        if !is_at(&self.path, &self.file)? {
            *self = Mark::put(&self.path)?;
            // If it was the same file all the same, closing the old descriptor has freed the lock.
            fcntl(&self.file, FcntlArg::F_SETLK(&whole_file()))?;
        }
        Ok(())
    }
}

/// Whether a path leads to an open file.
///
/// # Errors
/// The open file cannot be looked at.
pub fn is_at(path: &Path, file: &File) -> io::Result<bool> {
    let open = file.metadata()?;
    Ok(std::fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (open.dev(), open.ino())))
}

fn whole_file() -> libc::flock {
    let (kind, whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 }
}

/// Whose mark is on `path`. Not for a file that this process has put its mark on.
fn holder(path: &Path) -> Option<Pid> {
    let file = own_file(path).ok()?;
    let mut lock = whole_file();
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).ok()?;
    // 0: a process of a PID namespace that is not to be seen from here.
    (lock.l_type != libc::F_UNLCK as libc::c_short && lock.l_pid > 0).then(|| Pid::from_raw(lock.l_pid))
}

/// That who is at the other end of `stream` has its mark on `path`.
///
/// # Errors
/// Why not.
pub fn check(stream: &impl AsFd, path: &Path) -> Result<Pid, String> {
    let peer = getsockopt(stream, sockopt::PeerCredentials).map_err(|error| format!("nobody knows who: {error}"))?;
    if peer.uid() != geteuid().as_raw() {
        return Err(format!("process {} of user {}", peer.pid(), peer.uid()));
    }
    let held = holder(path);
    if peer.pid() <= 0 || held != Some(Pid::from_raw(peer.pid())) {
        let held = held.map_or_else(|| "nobody".to_owned(), |pid| format!("process {pid}"));
        return Err(format!("process {}, and `{}` is held by {held}", peer.pid(), path.display()));
    }
    match getsockopt(stream, sockopt::PeerPidfd) {
        // It may have called, ended, and left its number to the one that holds the file.
        Ok(peer) if has_ended(&peer) => Err("a process that has ended".to_owned()),
        Err(Errno::ESRCH | Errno::EINVAL) => Err("a process that has ended".to_owned()),
        // A kernel before 6.5 does not tell.
        Ok(_) | Err(_) => Ok(Pid::from_raw(peer.pid())),
    }
}

/// Whether those who hold the lock (flock(2)) on `file` are builds: processes below the one with its mark on `keeper`. A build can wait for
/// the lock, and has it when the daemon is gone. False where the kernel does not show whose it is.
pub fn is_held_by_a_build(file: &File, keeper: &Path) -> bool {
    let (Some(keeper), Ok(found)) = (holder(keeper), file.metadata()) else { return false };
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let holders: Vec<i32> = locks.lines().filter_map(|line| holder_in(line, found.ino())).collect();
    !holders.is_empty() && holders.into_iter().all(|pid| is_below(keeper, Pid::from_raw(pid)))
}

/// Who holds the lock of a line of `/proc/locks` (proc_locks(5)), if it is on the inode: `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`.
/// Who only waits for one has `->` behind the number. Device numbers in there are not always those of stat(2), so they do not count.
fn holder_in(line: &str, inode: u64) -> Option<i32> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { return None };
    (place.rsplit(':').next()?.parse() == Ok(inode)).then(|| pid.parse().ok()).flatten()
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// Where the keeper listens: a socket in the worker's folder, which is its working directory. The path of a socket is short (unix(7): 108
/// bytes), a folder's may be long.
pub struct Door {
    listener: UnixListener,
    /// Device and inode of the socket.
    socket: (u64, u64),
    mark: Mark,
}

impl Door {
    /// Makes the socket, whatever is in its place.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open() -> io::Result<Door> {
        // The mark first: a daemon that finds the socket asks for it.
        let mark = Mark::put(Path::new(KEEPER))?;
        let (listener, socket) = listen()?;
        Ok(Door { listener, socket, mark })
    }

    /// Makes again what somebody has removed or replaced. Connections stay.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn put_right(&mut self) -> io::Result<()> {
        self.mark.put_right()?;
        if place_of(Path::new(SOCKET)) != Some(self.socket) {
            (self.listener, self.socket) = listen()?;
        }
        Ok(())
    }

    /// The next one who calls: the daemon, or why it is not. None: nobody calls.
    pub fn next(&self) -> Option<Result<UnixStream, String>> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => return Some(Err(error.to_string())),
        };
        Some(match check(&stream, Path::new(DAEMON)) {
            // It may have taken the file while there was no daemon.
            Ok(pid) if is_below(getpid(), pid) => Err(format!("process {pid}, of a build")),
            Ok(_) => Ok(stream),
            Err(why) => Err(why),
        })
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// For this user alone, whatever the umask.
fn listen() -> io::Result<(UnixListener, (u64, u64))> {
    put_aside(Path::new(SOCKET))?;
    let before = umask(Mode::from_bits_truncate(0o077));
    let listener = UnixListener::bind(SOCKET);
    umask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    let socket = place_of(Path::new(SOCKET)).ok_or(ErrorKind::NotFound)?;
    Ok((listener, socket))
}

fn place_of(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_of_a_lock_are_told_from_those_who_wait_and_from_other_locks() {
        for (line, holder) in [
            ("1: FLOCK  ADVISORY  WRITE 4711 fe:00:5346369 0 EOF", Some(4711)),
            ("1: -> FLOCK  ADVISORY  WRITE 4712 fe:00:5346369 0 EOF", None),
            ("2: POSIX  ADVISORY  WRITE 4713 fe:00:5346369 0 EOF", None),
            ("3: FLOCK  ADVISORY  WRITE 4714 fe:00:5346370 0 EOF", None),
            ("", None),
        ] {
            assert_eq!(holder_in(line, 5_346_369), holder, "{line}");
        }
    }
}
