//! The one place with `unsafe`: fork.

use nix::unistd::{ForkResult, fork};

/// Forks. Only for the keeper, which has a single thread: in a process with several, the child may use nothing that takes a
/// lock (fork(2), signal-safety(7)), and that includes the allocator.
///
/// # Errors
/// The kernel refused: too many processes, no memory. Also in a process with more than one thread.
#[expect(unsafe_code, reason = "fork of a single-threaded process; checked here")]
pub fn fork_single_threaded() -> nix::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(0);
    if threads != 1 {
        return Err(nix::errno::Errno::EPERM);
    }
    // SAFETY: this process has one thread, so no lock can be held by another thread at this moment, and the child may go on
    // as an ordinary process.
    unsafe { fork() }
}
