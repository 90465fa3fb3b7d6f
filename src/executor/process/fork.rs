//! The one place with `unsafe`: fork, what happens between fork and exec, and what a program may do while it has one thread.

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

/// Closes every file but the standard ones: whatever the daemon was started with would be open in each build. At the start of a program
/// alone, before it has opened any of its own.
#[expect(unsafe_code, reason = "takes files that nobody here owns; see there")]
pub fn close_inherited() {
    use std::os::fd::{FromRawFd, OwnedFd};
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    // Read to its end first: the directory itself is one of them, and is closed by then.
    let open: Vec<i32> = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        if rustix::io::fcntl_getfd(
            // SAFETY: only asked whether it is open.
            unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
        )
        .is_ok()
        {
            // SAFETY: nothing in this program has opened it, so nothing uses it, or closes it a second time.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

/// Sets variables of the environment. At the start of a program alone, which has one thread then; does nothing later.
#[expect(unsafe_code, reason = "the environment of a single-threaded process; checked here")]
pub fn set_environment(variables: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>) {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(0);
    // Such a name cannot be set, and nobody can ask for it.
    let can_be = |name: &std::ffi::OsString| !name.is_empty() && !name.as_encoded_bytes().contains(&b'=');
    for (name, value) in variables.filter(|(name, _)| threads == 1 && can_be(name)) {
        // SAFETY: this process has one thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
}

/// Lets `command` start with no signal blocked. std passes the mask of its caller on, and a guardian blocks what it reads from
/// its signalfd: a build that cannot be terminated, only killed, would be the result.
#[expect(unsafe_code, reason = "pre_exec; the closure is async-signal-safe")]
pub fn with_no_signal_blocked(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe functions are allowed; sigprocmask is one (signal-safety(7)), and
    // nothing is allocated.
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) }
}
