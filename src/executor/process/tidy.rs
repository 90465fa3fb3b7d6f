//! What becomes of an attempt's folder once its end is recorded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Access, AtFlags, Mode, OFlags, accessat};
use rustix::io::Errno;

use super::guardian::STATUS;
use super::remove::{let_owner_in, remove};
use crate::logs::private;

/// Which attempt a folder was made for: its start, as the database has it.
pub(super) const MARK: &str = "started";

/// The status of an attempt whose end is recorded.
pub const RECORDED: &str = "recorded.json";

/// The working directory of an attempt that does not keep it.
pub(super) const WORK: &str = "work";

/// When the attempt began that a folder was made for, microseconds since 1970; `None`: nobody knows.
pub fn started(dir: &Path) -> Option<i64> {
    std::fs::read_to_string(dir.join(MARK)).ok()?.split(' ').next()?.parse().ok()
}

/// Whether [`tidy`] of an attempt whose end is recorded has not come to its end.
pub fn is_untidy(dir: &Path) -> bool {
    dir.join(WORK).is_symlink() || dir.join(WORK).exists() || !dir.join(RECORDED).exists()
}

/// How many folders there are from that of an attempt up to `state_dir`.
pub(super) const ALL_LEVELS: usize = 4;

/// Lets us into a folder of the worker, and into the `levels` - 1 above it, where a build has shut us out: each build can do that to all
/// others of its user, and to the next daemon.
pub fn reopen(dir: &Path, levels: usize) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folders: Vec<&Path> = dir.ancestors().take(levels).collect();
    for folder in folders.into_iter().rev() {
        // Those above may be an operator's links. That of an attempt is ours.
        let links = if folder == dir && levels == ALL_LEVELS { OFlags::NOFOLLOW } else { OFlags::empty() };
        if let Ok(folder) = rustix::fs::open(folder, flags | links, Mode::empty())
            && is_closed(&folder)
        {
            // Refused where it is not ours. Whoever reads or writes there says what is wrong.
            let _let_in = let_owner_in(folder.as_fd());
        }
    }
}

/// Whether its permissions keep us from reading, writing or searching a folder.
pub(super) fn is_closed(folder: &OwnedFd) -> bool {
    let all = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    accessat(folder, c".", all, AtFlags::empty()) == Err(Errno::ACCESS)
}

/// Removes the working directory of an attempt whose end is recorded and that does not keep it, joins its log into one file, and marks
/// the folder as done with. In this order: on a full disk the last two have to wait for what the first one frees.
///
/// # Errors
/// The first of what failed; the rest was done all the same, and all of it can be done again.
pub fn tidy(dir: &Path) -> io::Result<()> {
    reopen(dir, ALL_LEVELS);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(dir, flags, Mode::empty()) {
        // Given back before anything was started.
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    let removed = remove(folder.as_fd(), WORK.as_ref());
    let joined = crate::logs::file::finish(dir);
    removed.and(joined).and(mark(dir))
}

fn mark(dir: &Path) -> io::Result<()> {
    if dir.join(STATUS).exists() {
        return std::fs::rename(dir.join(STATUS), dir.join(RECORDED));
    }
    if dir.join(RECORDED).exists() { Ok(()) } else { private::write(&dir.join(RECORDED), b"{}") }
}
