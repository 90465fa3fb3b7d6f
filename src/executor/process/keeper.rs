//! The keeper: one small, warm, single-threaded process a worker, which forks a guardian for each attempt. It is started by
//! the daemon as `buildreactor keeper DIR` with their first connection as standard input, and outlives it: the next daemon finds it
//! at the socket `DIR/keeper.sock`. It holds the lock `DIR/keeper.lock`, as do its guardians: whoever gets that lock knows that no
//! process of an earlier attempt is left (invariant 5).
//!
//! It ends every attempt whose lease is not renewed, whether its daemon is dead, stopped or cut off, and leaves when there is
//! neither a daemon nor an attempt.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{ForkResult, Pid, dup2_stdin, getpid};
use rustix::process::{WaitOptions, wait};

use super::fork::{close_inherited, fork_single_threaded};
use super::guardian::{KILL_NOW, LEASE_OVER, STATUS, STOP, guard, leave_status};
use super::namespace;
use super::notes::Notes;
use super::protocol::{End, FromKeeper, Spec, Status, ToKeeper, VERSION};
use super::tree::descendants_beside;
use crate::clock::boottime;

/// Name of the lock file in the worker's folder; it holds the keeper's process id.
pub const LOCK: &str = "keeper.lock";
/// Name of the socket in the worker's folder.
pub const SOCKET: &str = "keeper.sock";

/// After this long a guardian that was told of the end of its lease is killed itself. Its own terminate and kill take 2 s, and all of it
/// must fit into the 10 s that `grace` leaves.
const IMPATIENCE: Duration = Duration::from_secs(4);
/// A guardian that does not die (it may wait for a disk) is killed again after this time.
const AGAIN: Duration = Duration::from_millis(500);
/// How long the orphans of guardians that vanished are hunted, in rounds of 5 ms, before the keeper turns to other leases.
const ROUNDS: u32 = 400;
/// Longest message, bytes: an environment is at most a few MiB (execve(2)).
const LONGEST: usize = 16 << 20;

/// The keeper's whole life. `dir`: the worker's folder.
pub fn keep(dir: &Path) -> ExitCode {
    match run(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// To standard error, if anybody still holds its other end.
fn complain(text: &str) {
    let _unheard = writeln!(std::io::stderr(), "buildreactor keeper: {text}");
}

struct Keeper {
    /// Gone in a guardian, as is everything below: it is a fork of this process.
    listener: Option<UnixListener>,
    daemon: Option<Link>,
    guardians: HashMap<Pid, Guardian>,
    no_namespace: Option<String>,
    leaving: bool,
    /// Ends that nobody has heard, of attempts whose folder could not take them (a full disk).
    untold: Vec<(String, Status)>,
}

struct Guardian {
    id: String,
    dir: PathBuf,
    notes: Notes,
    /// End of its lease, on the clock of leases.
    until: Duration,
    /// Told that the lease is over, and when to be harder.
    over: Option<Duration>,
}

/// The connection to a daemon. Never waited for: a stopped daemon must not keep the keeper from its leases.
struct Link {
    stream: UnixStream,
    heard: Vec<u8>,
    to_say: Vec<u8>,
}

fn run(dir: &Path) -> std::io::Result<()> {
    close_inherited();
    let first = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // Guardians inherit standard input, and the daemon must see the end of its connection when the keeper ends.
    dup2_stdin(File::open("/dev/null")?)?;
    let lock = File::options().create(true).truncate(false).write(true).mode(0o600).open(dir.join(LOCK))?;
    // The daemon waited for it before; a guardian that is still dying holds it a moment longer.
    lock.lock()?;
    super::write_over(&lock, &getpid().to_string())?;
    // The path of a socket is short (unix(7): 108 bytes), a folder's may be long.
    std::env::set_current_dir(dir)?;
    let listener = listen()?;
    prctl::set_child_subreaper(true)?;
    let _named = prctl::set_name(c"br-keeper");
    let mut mask = SigSet::empty();
    // Ctrl-C and a supervisor's TERM are for the daemon.
    for signal in
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, KILL_NOW, LEASE_OVER]
    {
        mask.add(signal);
    }
    mask.thread_set_mask()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // A timer of this clock goes off at the end of a suspension; the timeout of poll would sleep on.
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    let mut keeper = Keeper {
        listener: Some(listener),
        daemon: None,
        guardians: HashMap::new(),
        no_namespace: namespace::why_not(),
        leaving: false,
        untold: Vec::new(),
    };
    keeper.connected(first)?;
    loop {
        keeper.set(&timer)?;
        keeper.wait(&signals, &timer);
        while let Ok(Some(_)) = signals.read_signal() {}
        keeper.reap();
        keeper.accept();
        keeper.hear();
        keeper.end_leases();
        keeper.speak();
        if keeper.guardians.is_empty() && keeper.untold.is_empty() && (keeper.daemon.is_none() || keeper.leaving) {
            return Ok(());
        }
    }
}

/// For this user alone, whatever the umask.
fn listen() -> std::io::Result<UnixListener> {
    match std::fs::remove_file(SOCKET) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let before = umask(Mode::from_bits_truncate(0o077));
    let listener = UnixListener::bind(SOCKET);
    umask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Keeper {
    /// Sets the timer to the next end of a lease.
    fn set(&self, timer: &TimerFd) -> std::io::Result<()> {
        match self.guardians.values().map(|guardian| guardian.over.unwrap_or(guardian.until)).min() {
            // A time of zero would switch it off.
            Some(next) => timer.set(
                Expiration::OneShot(TimeSpec::from_duration(next.max(Duration::from_nanos(1)))),
                TimerSetTimeFlags::TFD_TIMER_ABSTIME,
            )?,
            None => timer.unset()?,
        }
        Ok(())
    }

    fn wait(&self, signals: &SignalFd, timer: &TimerFd) {
        let mut fds =
            vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        if let Some(link) = &self.daemon {
            let out = if link.to_say.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            fds.push(PollFd::new(link.stream.as_fd(), PollFlags::POLLIN | out));
        }
        // An interrupted or failed poll means: look at everything now.
        let _woken = poll(&mut fds, PollTimeout::NONE);
    }

    fn accept(&mut self) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            // The new one is the daemon now: it holds the worker's lock, so the old one is dead.
            if let Err(error) = self.connected(stream) {
                complain(&format!("a daemon cannot be talked to: {error}"));
            }
        }
    }

    fn connected(&mut self, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(true)?;
        self.daemon = Some(Link { stream, heard: Vec::new(), to_say: Vec::new() });
        let untold = std::mem::take(&mut self.untold);
        let running = self.guardians.values().map(|guardian| &guardian.id).chain(untold.iter().map(|(id, _)| id));
        let running = running.cloned().collect();
        let hello = FromKeeper::Hello {
            version: VERSION,
            pid: getpid().as_raw(),
            running,
            no_namespace: self.no_namespace.clone(),
        };
        self.say(&hello);
        for (id, status) in untold {
            self.ended(id, status);
        }
        Ok(())
    }

    /// Takes the daemon's orders.
    fn hear(&mut self) {
        let Some(link) = &mut self.daemon else { return };
        let mut buffer = [0; 1 << 14];
        let mut ended = false;
        loop {
            match link.stream.read(&mut buffer) {
                Ok(0) => ended = true,
                Ok(n) => {
                    link.heard.extend_from_slice(&buffer[..n]);
                    if link.heard.len() <= LONGEST {
                        continue;
                    }
                    complain("a message is too long");
                    ended = true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => ended = true,
            }
            break;
        }
        let whole = link.heard.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = link.heard.drain(..whole).collect();
        if ended {
            self.daemon = None;
        }
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            self.obey(line);
        }
    }

    fn obey(&mut self, line: &[u8]) {
        match serde_json::from_slice(line) {
            Ok(ToKeeper::Start(spec)) => self.start(&spec),
            Ok(ToKeeper::Stop { id }) => {
                if let Some((pid, _)) = self.guardians.iter().find(|(_, guardian)| guardian.id == id) {
                    let _gone = kill(*pid, STOP);
                }
            }
            Ok(ToKeeper::Renew { id, until_ms }) => {
                if let Some(guardian) = self.guardians.values_mut().find(|guardian| guardian.id == id) {
                    guardian.until = guardian.until.max(Duration::from_millis(until_ms));
                    // It ends its tree itself when we are stopped.
                    let _noted = guardian.notes.renew(guardian.until);
                }
            }
            Ok(ToKeeper::Leave) => self.leaving = true,
            Err(error) => complain(&format!("a message that I do not understand: {error}")),
        }
    }

    fn start(&mut self, spec: &Spec) {
        self.leaving = false;
        let keeper = getpid();
        if self.guardians.values().any(|guardian| guardian.id == spec.id) {
            return self.ended(spec.id.clone(), Status::without_process(End::NotStarted("it runs already".to_owned())));
        }
        // The order was long under way: its daemon was stopped in between, and others may run the build by now.
        if boottime() >= Duration::from_millis(spec.until_ms) {
            return self.ended(spec.id.clone(), Status::without_process(End::LeaseOver));
        }
        let until = Duration::from_millis(spec.until_ms);
        let forked = Notes::new(until).and_then(|notes| Ok((notes, fork_single_threaded()?)));
        match forked {
            Ok((notes, ForkResult::Parent { child })) => {
                let (id, dir) = (spec.id.clone(), spec.dir.clone());
                self.guardians.insert(child, Guardian { id, dir, notes, until, over: None });
            }
            Ok((notes, ForkResult::Child)) => {
                let _named = prctl::set_name(c"br-guardian");
                // A socket that nobody answers would keep the next daemon waiting.
                self.listener = None;
                self.daemon = None;
                self.guardians.clear();
                let status = guard(spec, keeper, &notes, self.no_namespace.is_none());
                // For the next daemon, and for the keeper.
                let _kept = leave_status(&spec.dir, &status);
                std::process::exit(i32::from(notes.leave(&status).is_err()));
            }
            Err(error) => {
                self.ended(spec.id.clone(), Status::without_process(End::NotStarted(format!("fork: {error}"))));
            }
        }
    }

    /// Ends the attempts whose lease is over.
    fn end_leases(&mut self) {
        let now = boottime();
        for (pid, guardian) in &mut self.guardians {
            match guardian.over {
                None if now >= guardian.until => {
                    let _gone = kill(*pid, LEASE_OVER);
                    guardian.over = Some(now + IMPATIENCE);
                }
                // It is stopped, or stuck. Its tree falls to us, and `reap` deals with it.
                Some(at) if now >= at => {
                    let _gone = kill(*pid, Signal::SIGKILL);
                    guardian.over = Some(now + AGAIN);
                }
                None | Some(_) => {}
            }
        }
    }

    /// Collects guardians that have ended, and kills orphans of those that vanished.
    fn reap(&mut self) {
        let mut vanished = Vec::new();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, _))) => {
                    let pid = Pid::from_raw(pid.as_raw_nonzero().get());
                    let Some(guardian) = self.guardians.remove(&pid) else { continue };
                    match guardian.notes.left() {
                        Some(status) => self.ended_in(&guardian.dir, guardian.id, status),
                        None => vanished.push(guardian),
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => break,
            }
        }
        if vanished.is_empty() {
            return;
        }
        let survivors = self.kill_orphans();
        for guardian in vanished {
            let end = if guardian.over.is_some() { End::LeaseOver } else { End::GuardianGone };
            let status = Status { survivors, ..Status::without_process(end) };
            let _noted = leave_status(&guardian.dir, &status);
            self.ended_in(&guardian.dir, guardian.id, status);
        }
    }

    /// Tells the daemon; without one, keeps what could not be noted in the folder for the next.
    fn ended_in(&mut self, dir: &Path, id: String, status: Status) {
        if self.daemon.is_none() && !dir.join(STATUS).exists() {
            self.untold.push((id, status));
        } else {
            self.ended(id, status);
        }
    }

    /// A guardian that was killed has left its tree to the next subreaper above it: to us. Comes back with how many cannot be killed.
    fn kill_orphans(&self) -> u32 {
        let mut left = 0;
        let mine: Vec<Pid> = self.guardians.keys().copied().collect();
        for _ in 0..ROUNDS {
            let orphans = descendants_beside(getpid(), &mine);
            if orphans.is_empty() {
                return 0;
            }
            left = orphans.len();
            for pid in &orphans {
                let _gone = kill(*pid, Signal::SIGKILL);
            }
            // Reaped here: a zombie of ours still counts as a descendant. Guardians among them are ours to tell of.
            for pid in orphans {
                if let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) {
                    let _reaped = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    fn ended(&mut self, id: String, status: Status) {
        self.say(&FromKeeper::Ended { id, status });
    }

    /// Without a daemon nobody hears it; the next one reads `status.json`.
    fn say(&mut self, message: &FromKeeper) {
        let (Some(link), Ok(text)) = (&mut self.daemon, serde_json::to_vec(message)) else { return };
        link.to_say.extend_from_slice(&text);
        link.to_say.push(b'\n');
        self.speak();
    }

    fn speak(&mut self) {
        let Some(link) = &mut self.daemon else { return };
        while !link.to_say.is_empty() {
            match link.stream.write(&link.to_say) {
                Ok(n) => drop(link.to_say.drain(..n)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // A daemon that is gone is noticed by the next read.
                Err(_) => return link.to_say.clear(),
            }
        }
    }
}
