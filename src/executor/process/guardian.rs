//! The guardian: a fork of the keeper that owns one attempt. It is a child subreaper, so whatever the build forks, however
//! it detaches itself, stays below it; it drains the output, keeps the limits, and ends only when no process of the tree is
//! left (invariant 5). Where it can, it puts the build into a PID [namespace](super::namespace) as well. Single-threaded, blocking
//! system calls only.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getpid, getppid, setsid};
use rustix::process::{WaitOptions, wait};

use super::fork::with_clean_state;
use super::namespace::{Namespace, Told};
use super::notes::Notes;
use super::protocol::{End, Spec, Status};
use super::tree::{left_for_good, signal_descendants};
use crate::clock::boottime;
use crate::logs::file::OutputWriter;
use crate::logs::private;

/// What a guardian gets when its keeper dies (`PR_SET_PDEATHSIG`): it kills its tree at once.
pub const KILL_NOW: Signal = Signal::SIGUSR1;
/// Tells a guardian that its lease is over: it terminates its tree, then kills what is left.
pub const LEASE_OVER: Signal = Signal::SIGUSR2;
/// Tells a guardian to terminate its tree, then kill what is left.
pub const STOP: Signal = Signal::SIGTERM;
/// Where a guardian leaves its [`Status`] before it exits.
pub const STATUS: &str = "status.json";

/// A larger pipe lets the build write on while the guardian is not scheduled; the default limit for ordinary users.
const PIPE_BYTES: i32 = 1 << 20;
/// How long to go on killing a tree of which only processes of another user are left before saying so.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Between terminate and kill at the end of a lease: with it the killing has most of the 10 s that `grace` leaves.
const AFTER_LEASE: Duration = Duration::from_secs(2);
/// Between terminate and kill of a build that somebody has cancelled: its end is to be recorded within two seconds, whatever it does.
const AFTER_STOP: Duration = Duration::from_millis(1500);
/// How long after the end of its lease a guardian acts by itself: its keeper, who comes first, is stopped or has no time.
const WITHOUT_KEEPER: Duration = Duration::from_secs(1);
/// How long the init of a namespace outlives the first order to kill its tree, unless the build's first process has ended: then it ends by itself.
const INIT_LAST: Duration = Duration::from_secs(1);
/// Between two rounds of killing.
const ROUND: Duration = Duration::from_millis(5);

/// Runs an attempt to its end. Called in a fresh fork of the keeper; the process exits afterwards. `notes`: the keeper says there until
/// when the lease lasts, in milliseconds of [`boottime`]. `namespaces`: whether they can be made here.
pub fn guard(spec: &Spec, keeper: Pid, notes: &Notes, namespaces: bool) -> Status {
    // Once more: the keeper looked before the fork.
    if boottime() >= Duration::from_millis(spec.until_ms) {
        return Status::without_process(End::LeaseOver);
    }
    match Guardian::start(spec, keeper, notes, namespaces && spec.namespace) {
        Ok(guardian) => guardian.run(),
        Err(why) => Status::without_process(End::NotStarted(why)),
    }
}

struct Guardian<'a> {
    spec: &'a Spec,
    keeper: Pid,
    notes: &'a Notes,
    /// End of its lease, when it last looked.
    until: Duration,
    signals: SignalFd,
    /// Its first process, or the init of its namespace.
    leader: Pid,
    namespace: Option<Namespace>,
    output: Option<std::io::PipeReader>,
    log: OutputWriter,
    phase: Phase,
    exit: Option<ExitStatus>,
    started: Duration,
    heard: Duration,
}

/// Where the attempt stands. Times are of [`boottime`].
enum Phase {
    /// Its first process runs within its limits.
    Running,
    /// Told to end; killed at `kill_at`.
    Terminating { end: End, kill_at: Duration },
    /// Being killed, since then.
    Killing { end: End, since: Duration },
}

impl<'a> Guardian<'a> {
    fn start(spec: &'a Spec, keeper: Pid, notes: &'a Notes, namespace: bool) -> Result<Guardian<'a>, String> {
        let failed = |what: &'static str| move |error: Errno| format!("{what}: {error}");
        // A session of its own: no terminal, and a signal to the daemon's group does not reach the build.
        setsid().map_err(failed("setsid"))?;
        prctl::set_child_subreaper(true).map_err(failed("become a subreaper"))?;
        // The keeper is single-threaded, so the "parent thread" that this signal follows is the keeper itself.
        prctl::set_pdeathsig(KILL_NOW).map_err(failed("set the parent death signal"))?;
        if getppid() != keeper {
            return Err("the keeper has died".to_owned());
        }
        let mut mask = SigSet::empty();
        for signal in [KILL_NOW, LEASE_OVER, STOP, Signal::SIGCHLD] {
            mask.add(signal);
        }
        // Beside those that the keeper had blocked: a signal to the whole service is for the daemon.
        mask.thread_block().map_err(failed("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(failed("open a signalfd"))?;
        let mut log = OutputWriter::create(&spec.dir, spec.file_limit);
        log.write(spec.notes.as_bytes());

        let (output, stdout) = std::io::pipe().map_err(|error| format!("open a pipe: {error}"))?;
        let stderr = stdout.try_clone().map_err(|error| format!("open a pipe: {error}"))?;
        // Refused past the user's limit on pipe memory; the default size works too.
        let _unchanged = fcntl(output.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed("set up the output pipe"))?;

        let (program, arguments) = spec.command.split_first().ok_or("no command")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(&spec.workdir)
            .env_clear()
            .envs(spec.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0);
        let (leader, namespace) = if namespace {
            let made = Namespace::start(command)?;
            (made.init, Some(made))
        } else {
            let leader = spawn(&mut command)?;
            // It keeps the pipe's other ends, which would never let us see the end of the output.
            drop(command);
            (leader, None)
        };
        let now = boottime();
        Ok(Guardian {
            spec,
            keeper,
            notes,
            until: Duration::from_millis(spec.until_ms),
            signals,
            leader,
            namespace,
            output: Some(output),
            log,
            phase: Phase::Running,
            exit: None,
            started: now,
            heard: now,
        })
    }

    fn run(mut self) -> Status {
        let survivors = loop {
            self.wait();
            self.drain();
            self.obey();
            if self.reap() {
                // Without a look through /proc: a subreaper without children has no descendants.
                break 0;
            }
            self.check_limits();
            self.push();
            if let Phase::Killing { since, .. } = self.phase
                && boottime().saturating_sub(since) > GIVE_UP
            {
                // What can be killed will be gone, however slow the machine; nobody is told before.
                let left = left_for_good(getpid());
                if !left.is_empty() {
                    break u32::try_from(left.len()).unwrap_or(u32::MAX);
                }
            }
        };
        self.drain();
        self.status(survivors)
    }

    /// Sleeps until output, a signal, or the next limit.
    fn wait(&self) {
        let now = boottime();
        let next = match &self.phase {
            Phase::Running => {
                let limit = self.started + Duration::from_millis(self.spec.timeout_ms);
                let limit = limit.min(self.until + WITHOUT_KEEPER);
                match self.spec.silence_ms {
                    Some(silence) => limit.min(self.heard + Duration::from_millis(silence)),
                    None => limit,
                }
            }
            Phase::Terminating { kill_at, .. } => *kill_at,
            Phase::Killing { .. } => now + ROUND,
        };
        // One millisecond more, so that the limit has really passed; at most an hour, which poll can hold.
        let left = next.saturating_sub(now).min(Duration::from_secs(3600)) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(output) = &self.output {
            fds.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
        }
        // An interrupted or failed poll means: look at everything now.
        let _woken = poll(&mut fds, timeout);
    }

    /// Writes what the build has said to the log, one pipe's fill at a time so that signals and limits get their turn.
    fn drain(&mut self) {
        let Some(output) = &mut self.output else { return };
        let mut buffer = [0; 1 << 16];
        for _ in 0..(PIPE_BYTES as usize / buffer.len()) {
            match output.read(&mut buffer) {
                Ok(0) => {
                    self.output = None;
                    return;
                }
                Ok(n) => {
                    self.heard = boottime();
                    self.log.write(&buffer[..n]);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.output = None;
                    return;
                }
            }
        }
    }

    /// Takes orders.
    fn obey(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
            if number == KILL_NOW as i32 {
                self.kill_now(End::KeeperGone);
            } else if number == LEASE_OVER as i32 {
                self.terminate(End::LeaseOver);
            } else if number == STOP as i32 {
                self.terminate(End::Stopped);
            }
        }
        if getppid() != self.keeper {
            self.kill_now(End::KeeperGone);
        }
    }

    /// Looks until when its lease lasts now.
    fn renew(&mut self) {
        if let Ok(until) = self.notes.until() {
            self.until = until;
        }
    }

    /// Collects dead children; true when none is left. By rustix: nix gives an error for a child that a real-time signal ended,
    /// having reaped it.
    fn reap(&mut self) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(None) => return false,
                Ok(Some((pid, status))) => {
                    if pid.as_raw_nonzero().get() == self.leader.as_raw() {
                        let mut end = End::Exited;
                        match self.namespace.as_mut().map(Namespace::told) {
                            None => self.exit = Some(ExitStatus::from_raw(status.as_raw())),
                            Some(Told::Status(status)) => self.exit = Some(status),
                            Some(Told::NotStarted(why)) => end = End::NotStarted(why),
                            Some(Told::Nothing) => {}
                        }
                        // Its first process decides; what it left behind goes at once.
                        self.kill_now(end);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }

    fn check_limits(&mut self) {
        let now = boottime();
        // After the look at the clock: if it was stopped meanwhile, nobody knows for how long.
        self.renew();
        let Phase::Running = self.phase else { return };
        if now >= self.until + WITHOUT_KEEPER {
            self.terminate(End::LeaseOver);
        } else if now >= self.started + Duration::from_millis(self.spec.timeout_ms) {
            self.terminate(End::Timeout(self.spec.timeout_ms));
        } else if let Some(ms) = self.spec.silence_ms
            && now >= self.heard + Duration::from_millis(ms)
        {
            self.terminate(End::Silence(ms));
        }
    }

    fn terminate(&mut self, end: End) {
        if let Phase::Running = self.phase {
            signal_descendants(getpid(), Signal::SIGTERM, |_| true);
            // Stopped processes act on SIGTERM only once they go on.
            signal_descendants(getpid(), Signal::SIGCONT, |_| true);
            let patience = Duration::from_millis(self.spec.kill_after_ms);
            let patience = match end {
                // Others may start the build soon, and this machine may be slow.
                End::LeaseOver => patience.min(AFTER_LEASE),
                End::Stopped => patience.min(AFTER_STOP),
                _ => patience,
            };
            self.phase = Phase::Terminating { end, kill_at: boottime() + patience };
        }
    }

    fn kill_now(&mut self, end: End) {
        let (end, since) = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => (end, boottime()),
            Phase::Terminating { end, .. } => (end, boottime()),
            // Asked again: it does not begin again.
            Phase::Killing { end, since } => (end, since),
        };
        self.phase = Phase::Killing { end, since };
    }

    /// Goes on with the killing: again and again, because a dying tree may still fork.
    fn push(&mut self) {
        if let Phase::Terminating { end, kill_at } = &self.phase
            && boottime() >= *kill_at
        {
            let end = end.clone();
            self.phase = Phase::Killing { end, since: boottime() };
        }
        if let Phase::Killing { since, .. } = self.phase {
            // The init of a namespace comes last: it tells how the build's first process ended. With it everything dies at once.
            let spared = self.leader.as_raw();
            let init = self.namespace.is_some() && boottime().saturating_sub(since) < INIT_LAST;
            signal_descendants(getpid(), Signal::SIGKILL, |pid| !(init && pid.as_raw() == spared));
        }
    }

    fn status(self, survivors: u32) -> Status {
        let (log_bytes, log_error) = self.log.end();
        let exit_code = self.exit.and_then(|status| status.code());
        let term_signal = self.exit.and_then(|status| status.signal());
        let end = match self.phase {
            Phase::Running => End::Exited,
            Phase::Terminating { end, .. } | Phase::Killing { end, .. } => end,
        };
        // Everything that was ever waited for below this process: it is the whole tree, because orphans come here.
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).ok();
        let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Status {
            end,
            exit_code,
            term_signal,
            user_seconds: usage.map_or(0.0, |usage| seconds(usage.user_time())),
            system_seconds: usage.map_or(0.0, |usage| seconds(usage.system_time())),
            // getrusage(2): kilobytes.
            max_rss_bytes: usage.map_or(0, |usage| usage.max_rss().saturating_mul(1024)),
            log_bytes,
            log_error,
            survivors,
        }
    }
}

/// Starts the build's first process.
///
/// # Errors
/// As a line for people.
pub fn spawn(command: &mut Command) -> Result<Pid, String> {
    let child = with_clean_state(command).spawn().map_err(|error| {
        let program = command.get_program();
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let first_line = if missing { blame_first_line(Path::new(program)) } else { None };
        format!("cannot start {}", first_line.unwrap_or_else(|| format!("`{}`: {error}", program.display())))
    })?;
    Ok(Pid::from_raw(i32::try_from(child.id()).map_err(|error| error.to_string())?))
}

/// Of a script that is there the kernel says that there is no such file: it means the program that the first line names.
fn blame_first_line(script: &Path) -> Option<String> {
    let mut begin = Vec::new();
    std::fs::File::open(script).ok()?.take(256).read_to_end(&mut begin).ok()?;
    let begin = String::from_utf8_lossy(&begin);
    let line = begin.strip_prefix("#!")?.split('\n').next()?;
    if line.ends_with('\r') {
        return Some("the script: it has line ends of Windows; take the CR at their ends away".to_owned());
    }
    let name = line.split_ascii_whitespace().next()?;
    (!Path::new(name).exists())
        .then(|| format!("the script: its first line names `{name}`, which is not on this machine"))
}

/// Writes `status` where the keeper, and a later one, finds it: whole or not at all.
///
/// # Errors
/// The folder cannot be written.
pub fn leave_status(dir: &Path, status: &Status) -> std::io::Result<()> {
    let text = serde_json::to_vec(status)?;
    let new = dir.join("status.json.new");
    private::write(&new, &text)?;
    std::fs::rename(new, dir.join(STATUS))
}
