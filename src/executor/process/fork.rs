//! The one place with `unsafe`: fork, and what happens between fork and exec.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::SigSet;
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

/// Lets `command` start with no signal blocked. std passes the mask of its caller on, and a guardian blocks what it reads from
/// its signalfd: a build that cannot be terminated, only killed, would be the result.
#[expect(unsafe_code, reason = "pre_exec; the closure is async-signal-safe")]
pub fn with_no_signal_blocked(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe functions are allowed; sigprocmask is one (signal-safety(7)), and
    // nothing is allocated.
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) }
}
