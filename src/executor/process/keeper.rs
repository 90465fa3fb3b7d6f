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
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{ForkResult, Pid, dup2_stdin, getpid};
use rustix::process::{WaitOptions, wait};

use super::fork::{close_inherited, fork_single_threaded};
use super::guardian::{KILL_NOW, LEASE_OVER, STATUS, STOP, guard, leave_status};
use super::namespace;
use super::notes::Notes;
use super::peer::{Door, own_file};
use super::protocol::{End, FromKeeper, Spec, Status, ToKeeper, VERSION};
use super::tree::{descendants_beside, signal_listed};
use crate::clock::boottime;

/// Name of the lock file in the worker's folder; it holds the keeper's process id.
pub const LOCK: &str = "keeper.lock";

/// After this long a guardian that was told of the end of its lease is killed itself. Its own terminate and kill take 2 s, and all of it
/// must fit into the 10 s that `grace` leaves.
const IMPATIENCE: Duration = Duration::from_secs(4);
/// A guardian that does not die (it may wait for a disk) is killed again after this time.
const AGAIN: Duration = Duration::from_millis(500);
/// Between two looks whether the folder, and the socket in it, are still there.
const LOOK: Duration = Duration::from_secs(1);
/// So many looks in a row have to miss the folder before it is taken for gone.
const LOOKS: u32 = 2;
/// Connections that are looked at before it is the turn of leases and orders again: a build may call without end.
const CALLS: u32 = 32;
/// Between two complaints about callers.
const COMPLAINTS: Duration = Duration::from_secs(60);
/// How long the orphans of guardians that vanished are hunted, in rounds of 5 ms, before the keeper turns to other leases.
const ROUNDS: u32 = 400;
/// Longest message, bytes: an environment is at most a few MiB (execve(2)).
const LONGEST: usize = 16 << 20;

/// The keeper's whole life. `dir`: the worker's folder.
pub fn keep(dir: &Path) -> ExitCode {
    // The usual hook waits for a reader that has stopped reading.
    std::panic::set_hook(Box::new(|panic| complain(&panic.to_string())));
    match run(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Device and inode of this process's program. A file that was replaced is another one.
pub fn program() -> Option<(u64, u64)> {
    std::fs::metadata("/proc/self/exe").map(|found| (found.dev(), found.ino())).ok()
}

/// A line on standard error. It is lost, and counted, where it would have to wait: a reader that has stopped reading must not keep the
/// keeper from its leases. The next line says how many were lost.
fn complain(text: &str) {
    static LOST: AtomicU32 = AtomicU32::new(0);
    let lost = LOST.load(Ordering::Relaxed);
    let before = if lost == 0 { String::new() } else { format!(" (earlier lines that were lost: {lost})") };
    let mut line = format!("buildreactor keeper: {text}{before}").into_bytes();
    // A pipe that poll calls ready takes so much without waiting (pipe(7): PIPE_BUF).
    line.truncate(4095);
    line.push(b'\n');
    let stderr = std::io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let ready = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0);
    if ready && nix::unistd::write(stderr.as_fd(), &line).is_ok_and(|written| written == line.len()) {
        LOST.store(0, Ordering::Relaxed);
    } else {
        LOST.store(lost.saturating_add(1), Ordering::Relaxed);
    }
}

struct Keeper {
    /// Gone in a guardian, as is everything below: it is a fork of this process.
    door: Option<Door>,
    daemon: Option<Link>,
    guardians: HashMap<Pid, Guardian>,
    no_namespace: Option<String>,
    leaving: bool,
    /// Ends that nobody has heard, of attempts whose folder could not take them (a full disk).
    untold: Vec<(String, Status)>,
    folder: Folder,
    calls: Calls,
}

/// The worker's folder.
struct Folder {
    path: PathBuf,
    /// Device and inode.
    place: (u64, u64),
    look_at: Duration,
    missed: u32,
    /// Why nothing can run here any more.
    gone: Option<String>,
}

/// Those who called and are not the daemon.
#[derive(Default)]
struct Calls {
    refused: u64,
    quiet_until: Duration,
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

/// Signals a guardian by its number, which nobody else can have: it is our child, and we are the only ones to wait for it. `reap` takes
/// it from the list when it does.
fn signal_guardian(pid: Pid, signal: Signal) {
    // Fails for one that has ended and is a zombie until `reap` comes to it.
    let _ended = kill(pid, signal);
}

/// The connection to a daemon. Never waited for: a stopped daemon must not keep the keeper from its leases.
struct Link {
    stream: UnixStream,
    heard: Vec<u8>,
    to_say: Vec<u8>,
}

fn run(dir: &Path) -> std::io::Result<()> {
    // It has the scripts' environments of all builds. A build is as usual from its exec on.
    prctl::set_dumpable(false)?;
    close_inherited();
    let first = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // Guardians inherit standard input, and the daemon must see the end of its connection when the keeper ends.
    dup2_stdin(File::open("/dev/null")?)?;
    if std::fs::read_link("/proc/self")?.to_str() != Some(getpid().to_string().as_str()) {
        // The numbers in there would be of other processes.
        return Err(std::io::Error::other("`/proc` is of another PID namespace; mount it anew in this one"));
    }
    let lock = own_file(&dir.join(LOCK))?;
    // The daemon waited for it before; a guardian that is still dying holds it a moment longer.
    lock.lock()?;
    super::write_over(&lock, &getpid().to_string())?;
    let path = std::path::absolute(dir)?;
    std::env::set_current_dir(dir)?;
    let found = std::fs::metadata(".")?;
    let folder = Folder { path, place: (found.dev(), found.ino()), look_at: boottime() + LOOK, missed: 0, gone: None };
    let door = Door::open()?;
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
        door: Some(door),
        daemon: None,
        guardians: HashMap::new(),
        no_namespace: namespace::why_not(),
        leaving: false,
        untold: Vec::new(),
        folder,
        calls: Calls::default(),
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
        keeper.look();
        keeper.speak();
        let nobody = keeper.daemon.is_none() && keeper.untold.is_empty();
        let leaving = keeper.leaving && keeper.untold.is_empty();
        if keeper.guardians.is_empty() && (nobody || leaving || keeper.folder.gone.is_some()) {
            return Ok(());
        }
    }
}

impl Keeper {
    /// Sets the timer to the next end of a lease, or look at the folder.
    fn set(&self, timer: &TimerFd) -> std::io::Result<()> {
        let ends = self.guardians.values().map(|guardian| guardian.over.unwrap_or(guardian.until));
        let next = ends.fold(self.folder.look_at, Duration::min);
        timer.set(
            // A time of zero would switch it off.
            Expiration::OneShot(TimeSpec::from_duration(next.max(Duration::from_nanos(1)))),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME,
        )?;
        Ok(())
    }

    fn wait(&self, signals: &SignalFd, timer: &TimerFd) {
        let mut fds =
            vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        if let Some(door) = &self.door {
            fds.push(PollFd::new(door.as_fd(), PollFlags::POLLIN));
        }
        if let Some(link) = &self.daemon {
            let out = if link.to_say.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            fds.push(PollFd::new(link.stream.as_fd(), PollFlags::POLLIN | out));
        }
        // An interrupted or failed poll means: look at everything now.
        let _woken = poll(&mut fds, PollTimeout::NONE);
    }

    /// Looks who calls. A stranger is sent away at once, and changes nothing.
    fn accept(&mut self) {
        for _ in 0..CALLS {
            match self.door.as_ref().and_then(Door::next) {
                None => return,
                // The new one is the daemon now: it holds the worker's lock, so the old one is dead.
                Some(Ok(stream)) => {
                    if let Err(error) = self.connected(stream) {
                        complain(&format!("a daemon cannot be talked to: {error}"));
                    }
                }
                Some(Err(why)) => self.refused(&why),
            }
        }
    }

    fn refused(&mut self, why: &str) {
        self.calls.refused += 1;
        if boottime() >= self.calls.quiet_until {
            let times = self.calls.refused;
            complain(&format!("a connection that is not this worker's daemon is refused ({times} so far): {why}"));
            self.calls.quiet_until = boottime() + COMPLAINTS;
        }
    }

    /// Ends everything when the worker's folder is gone: nothing in it could be found again, by anybody. What is missing in the folder
    /// is made again.
    fn look(&mut self) {
        if boottime() < self.folder.look_at {
            return;
        }
        self.folder.look_at = boottime() + LOOK;
        let missed = match std::fs::metadata(&self.folder.path) {
            Ok(found) => (found.dev(), found.ino()) != self.folder.place,
            Err(error) => matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        };
        self.folder.missed = if missed { self.folder.missed + 1 } else { 0 };
        if !missed {
            if let Some(Err(error)) = self.door.as_mut().map(Door::put_right) {
                self.refused(&format!("the socket cannot be made again: {error}"));
            }
        } else if self.folder.missed >= LOOKS && self.folder.gone.is_none() {
            let why = format!("the worker's folder `{}` has vanished", self.folder.path.display());
            complain(&why);
            self.folder.gone = Some(why);
            for (pid, guardian) in self.guardians.iter_mut().filter(|(_, guardian)| guardian.over.is_none()) {
                signal_guardian(*pid, LEASE_OVER);
                guardian.over = Some(boottime() + IMPATIENCE);
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
            program: program(),
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
                    signal_guardian(*pid, STOP);
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
        if let Some(gone) = &self.folder.gone {
            return self.ended(spec.id.clone(), Status::without_process(End::NotStarted(gone.clone())));
        }
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
                self.door = None;
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
                    signal_guardian(*pid, LEASE_OVER);
                    guardian.over = Some(now + IMPATIENCE);
                }
                // It is stopped, or stuck. Its tree falls to us, and `reap` deals with it.
                Some(at) if now >= at => {
                    signal_guardian(*pid, Signal::SIGKILL);
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
    fn ended_in(&mut self, dir: &Path, id: String, mut status: Status) {
        if let (Some(gone), End::LeaseOver) = (&self.folder.gone, &status.end) {
            status.end = End::NotStarted(gone.clone());
        }
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
            // Who cannot be signalled is counted as left.
            let _sent = signal_listed(getpid(), &mine, &orphans, Signal::SIGKILL, |_| true);
            // Reaped here: a zombie of ours still counts as a descendant. Guardians are in `mine`, and not among them.
            for orphan in orphans {
                if let Some(pid) = rustix::process::Pid::from_raw(orphan.pid.as_raw()) {
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
