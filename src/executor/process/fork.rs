//! The one place with `unsafe`: fork, what happens between fork and exec, and what a program may do while it has one thread.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigSet, Signal};
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

/// Numbers of all signals, real-time ones included (signal(7)).
const SIGNALS: std::ops::RangeInclusive<usize> = 1..=64;

/// A `struct sigaction` as the kernel has it: the handler comes first; there is room for the rest on every architecture.
type Action = [usize; 16];

/// What is done at `signal` (rt_sigaction(2)). With `new` it is done from now on. `None`: the kernel refuses. By the system call itself,
/// because the C library keeps two real-time signals to itself, and whoever started us may have ignored those too. Async-signal-safe.
#[expect(unsafe_code, reason = "a system call that libraries offer for some of the signals alone")]
fn signal_action(signal: usize, new: Option<&Action>) -> Option<Action> {
    use nix::libc;
    let mut old: Action = [0; 16];
    let new = new.map_or(std::ptr::null(), |new| new.as_ptr());
    // SAFETY: both pointers are null or point to more memory than the kernel reads and writes. The only action that is ever set is the
    // default one, so no handler is needed that could be called.
    let done = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old.as_mut_ptr(), 8usize) };
    (done == 0).then_some(old)
}

/// Whether `signal` is ignored.
pub fn is_ignored(signal: Signal) -> bool {
    signal_action(signal as usize, None).is_some_and(|action| action[0] == nix::libc::SIG_IGN)
}

/// Unblocks all signals, and puts those that are ignored back to their defaults: whoever started this program may have left them so, and
/// an ignored SIGCHLD hides the end of every child. At the start of a program alone. SIGHUP, SIGINT and SIGQUIT stay ignored, because that
/// is how nohup and a shell's `&` keep a terminal's signals from a program; SIGPIPE too, which Rust's runtime ignores.
pub fn reset_signals() {
    let kept = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGPIPE];
    for signal in SIGNALS.filter(|signal| !kept.iter().any(|kept| *kept as usize == *signal)) {
        if signal_action(signal, None).is_some_and(|action| action[0] == nix::libc::SIG_IGN) {
            let _reset = signal_action(signal, Some(&[0; 16]));
        }
    }
    // Fails for no mask that exists.
    let _unblocked = SigSet::empty().thread_set_mask();
}

/// Lets `command` start as if nobody had started us in an odd way: no signal ignored or blocked, no capability that exec would hand
/// down, no protection from the kernel's choice of what to kill when memory is short. std passes the mask of its caller on, and a
/// guardian blocks what it reads from its signalfd: a build that cannot be terminated, only killed, would be the result.
#[expect(unsafe_code, reason = "pre_exec; the closure is async-signal-safe")]
pub fn with_clean_state(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe functions are allowed (signal-safety(7)). These are bare system calls, and
    // nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            for signal in SIGNALS {
                // Refused for SIGKILL and SIGSTOP.
                let _reset = signal_action(signal, Some(&[0; 16]));
            }
            SigSet::empty().thread_set_mask()?;
            // Kernels without ambient capabilities hand none down.
            let _cleared = rustix::thread::clear_ambient_capability_set();
            give_up_oom_protection(c"/proc/self/oom_score_adj");
            Ok(())
        })
    }
}

/// A supervisor may keep the kernel from killing the daemon when memory is short. A build that eats the memory should not have that
/// protection. Async-signal-safe.
fn give_up_oom_protection(score: &std::ffi::CStr) {
    use rustix::fs::{Mode, OFlags, open};
    let Ok(file) = open(score, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else { return };
    let mut first = [0; 1];
    if rustix::io::read(&file, &mut first).is_ok_and(|n| n == 1) && first[0] == b'-' {
        let _given_up = rustix::io::pwrite(&file, b"0\n", 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With files: many machines for tests do not let anybody protect himself.
    #[test]
    fn protection_from_the_oom_killer_is_given_up_and_the_opposite_is_kept() {
        let path = std::env::temp_dir().join(format!("buildreactor-oom-{}", std::process::id()));
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        for (before, after) in [("-1000\n", "0\n"), ("-1\n", "0\n"), ("0\n", "0\n"), ("300\n", "300\n")] {
            std::fs::write(&path, before).unwrap();
            give_up_oom_protection(&name);
            assert!(std::fs::read_to_string(&path).unwrap().starts_with(after), "{before}");
        }
        std::fs::remove_file(path).unwrap();
    }
}
