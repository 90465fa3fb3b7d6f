//! A PID namespace for each attempt, where the kernel allows it: when its first process, our [`init`], ends, the kernel kills all others,
//! whatever they are and whoever else was killed. Made without a user namespace, in which sudo and rootless containers do not
//! work: so for root (CAP_SYS_ADMIN) alone.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use rustix::process::{WaitOptions, wait};

use super::fork::fork_single_threaded;

/// The guardian's end of a namespace.
pub struct Namespace {
    /// Its first process; when it ends, nothing is left in there.
    pub init: Pid,
    told: std::io::PipeReader,
    /// Closed when this guardian dies.
    _alive: std::io::PipeWriter,
}

/// Why namespaces cannot be made here; tried out in a fork. None: they can.
pub fn why_not() -> Option<String> {
    let tried = std::io::pipe().and_then(|(reader, writer)| Ok((reader, writer, fork_single_threaded()?)));
    match tried {
        Ok((_, mut writer, ForkResult::Child)) => {
            if let Err(why) = try_out() {
                let _told = writer.write_all(why.as_bytes());
            }
            std::process::exit(0);
        }
        Ok((mut reader, writer, ForkResult::Parent { child })) => {
            drop(writer);
            let mut why = String::new();
            let read = reader.read_to_string(&mut why);
            let _reaped = waitpid(child, None);
            match read {
                Ok(0) => None,
                Ok(_) => Some(why),
                Err(error) => Some(error.to_string()),
            }
        }
        Err(error) => Some(error.to_string()),
    }
}

fn try_out() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("unshare: {error}"))?;
    match fork_single_threaded() {
        Ok(ForkResult::Child) => std::process::exit(i32::from(own_proc().is_err())),
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            _ => Err("mount /proc: not permitted".to_owned()),
        },
        Err(error) => Err(format!("fork: {error}")),
    }
}

/// A `/proc` that shows the namespace, seen by it alone; what is mounted outside later is still seen inside. The ones that show the
/// processes outside are taken away, wherever they are: what is merely covered would be there again after `umount`.
fn own_proc() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The newest first: each is on top of those before it.
    for place in mounted.lines().rev().filter_map(place_of_proc) {
        // Refused (EINVAL) inside a container of an ordinary user, for what was there before it: nobody in there gets it away either.
        let _covered_then = umount2(place.as_os_str(), MntFlags::MNT_DETACH);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, NONE)
}

/// Where a line of mountinfo (proc_pid_mountinfo(5)) says that a `/proc` is mounted, or a part of one. None: something else is.
fn place_of_proc(line: &str) -> Option<OsString> {
    let (before, after) = line.split_once(" - ")?;
    if after.split(' ').next() != Some("proc") {
        return None;
    }
    // Blank, tab, newline and backslash are written in octal digits.
    let mut rest = before.split(' ').nth(4)?.as_bytes();
    let mut place = Vec::new();
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(written) if *byte == b'\\' => {
                place.push(written);
                rest = &after[3..];
            }
            Some(_) | None => {
                place.push(*byte);
                rest = after;
            }
        }
    }
    Some(OsString::from_vec(place))
}

/// What a namespace's init has told.
pub enum Told {
    /// How the command ended.
    Status(ExitStatus),
    /// Why it was not started.
    NotStarted(String),
    /// Nothing: init was killed, and everything with it.
    Nothing,
}

impl Namespace {
    /// Runs `command` in a new namespace.
    ///
    /// # Errors
    /// No namespace, no process.
    pub fn start(command: Command) -> Result<Namespace, String> {
        let pipes = || Ok::<_, std::io::Error>((std::io::pipe()?, std::io::pipe()?));
        let ((told, tell), (watched, alive)) = pipes().map_err(|error| format!("open a pipe: {error}"))?;
        unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("make a PID namespace: {error}"))?;
        match fork_single_threaded().map_err(|error| format!("fork: {error}"))? {
            ForkResult::Child => {
                drop((told, alive));
                init(command, tell, &watched)
            }
            ForkResult::Parent { child } => Ok(Namespace { init: child, told, _alive: alive }),
        }
    }

    /// Once init has been reaped.
    pub fn told(&mut self) -> Told {
        let mut text = Vec::new();
        if self.told.read_to_end(&mut text).is_err() {
            return Told::Nothing;
        }
        match text.split_first() {
            Some((b'E', why)) => Told::NotStarted(String::from_utf8_lossy(why).into_owned()),
            Some((b'S', raw)) => {
                raw.try_into().map_or(Told::Nothing, |raw| Told::Status(ExitStatus::from_raw(i32::from_ne_bytes(raw))))
            }
            Some(_) | None => Told::Nothing,
        }
    }
}

/// The first process of a namespace: starts the command, reaps, and ends with it. Signals of a build do not reach it: without a
/// handler PID 1 gets but SIGKILL, and that from outside.
fn init(mut command: Command, mut tell: std::io::PipeWriter, guardian: &std::io::PipeReader) -> ! {
    let _named = prctl::set_name(c"br-init");
    let mut started = || {
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("set the parent death signal: {error}"))?;
        // It may have died before that; its process id is not to be seen from here.
        let mut fds = [PollFd::new(guardian.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
            return Err("the guardian has died".to_owned());
        }
        own_proc().map_err(|error| format!("mount /proc: {error}"))?;
        super::guardian::spawn(&mut command)
    };
    let leader = match started() {
        Ok(leader) => leader,
        Err(why) => {
            let _told = tell.write_all(&[b"E", why.as_bytes()].concat());
            std::process::exit(1);
        }
    };
    // It holds the ends of the output that the build writes to.
    drop(command);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == leader.as_raw() => {
                let _told = tell.write_all(&[b"S", &status.as_raw().to_ne_bytes()[..]].concat());
                // The kernel kills what is left in here before anybody sees this end.
                std::process::exit(0);
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => std::process::exit(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_proc_is_found_and_nothing_else() {
        for (line, place) in [
            ("22 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw", Some("/proc")),
            ("90 28 0:21 /sys /srv/a\\040b\\134/proc/sys ro - proc proc rw", Some("/srv/a b\\/proc/sys")),
            ("23 28 0:22 / /sys rw shared:6 - sysfs proc rw", None),
            ("24 22 0:23 / /proc/sys/fs/binfmt_misc rw shared:6 master:1 - autofs proc rw", None),
            ("", None),
        ] {
            assert_eq!(place_of_proc(line), place.map(OsString::from), "{line}");
        }
    }
}
