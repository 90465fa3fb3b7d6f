//! The keeper: one small, warm, single-threaded process a worker, which forks a guardian for each attempt. It is started by
//! the daemon as `buildreactor keeper DIR` with their connection as standard input, and holds the lock `DIR/keeper.lock`,
//! as do its guardians: whoever gets that lock knows that no process of an earlier attempt is left (invariant 5).
//!
//! When the daemon goes away, however it goes, every tree is killed and the keeper leaves.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{ForkResult, Pid, getpid};
use rustix::process::{WaitOptions, wait};

use super::fork::fork_single_threaded;
use super::guardian::{KILL_NOW, STOP, guard, leave_status};
use super::protocol::{End, FromKeeper, Spec, Status, ToKeeper, VERSION};
use super::tree::descendants;

/// Name of the lock file in the worker's folder.
pub const LOCK: &str = "keeper.lock";

/// The keeper's whole life. `dir`: the worker's folder.
pub fn keep(dir: &Path) -> ExitCode {
    match run(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("buildreactor keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Keeper {
    daemon: UnixStream,
    guardians: HashMap<Pid, Guardian>,
}

struct Guardian {
    id: String,
    /// Where it leaves its status: a pipe, because a disk may be full.
    status: std::io::PipeReader,
}

fn run(dir: &Path) -> std::io::Result<()> {
    let daemon = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK))?;
    // The daemon waited for it before; a guardian that is still dying holds it a moment longer.
    lock.lock()?;
    prctl::set_child_subreaper(true)?;
    let _named = prctl::set_name(c"br-keeper");
    let mut mask = SigSet::empty();
    // Ctrl-C and a supervisor's TERM are for the daemon; the keeper leaves when the daemon does.
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, KILL_NOW] {
        mask.add(signal);
    }
    mask.thread_set_mask()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut orders = BufReader::new(daemon.try_clone()?);
    let mut keeper = Keeper { daemon, guardians: HashMap::new() };
    keeper.say(&FromKeeper::Hello { version: VERSION });
    let mut connected = true;
    loop {
        let buffered = !orders.buffer().is_empty();
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if connected {
            fds.push(PollFd::new(orders.get_ref().as_fd(), PollFlags::POLLIN));
        }
        // Without a daemon, look every 10 ms whether the trees are gone.
        let timeout = if connected { PollTimeout::NONE } else { PollTimeout::from(10u8) };
        if !buffered && poll(&mut fds, timeout).is_err() {
            continue;
        }
        let orders_wait = buffered || fds.get(1).and_then(PollFd::any).unwrap_or(false);
        drop(fds);
        while let Ok(Some(_)) = signals.read_signal() {}
        keeper.reap();
        if connected && orders_wait {
            let mut line = String::new();
            match orders.read_line(&mut line) {
                Ok(n) if n > 0 => keeper.obey(&line),
                Ok(_) | Err(_) => {
                    connected = false;
                    for pid in keeper.guardians.keys() {
                        let _gone = kill(*pid, KILL_NOW);
                    }
                }
            }
        }
        if !connected && keeper.guardians.is_empty() {
            return Ok(());
        }
    }
}

impl Keeper {
    fn obey(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(ToKeeper::Start(spec)) => self.start(&spec),
            Ok(ToKeeper::Stop { id }) => {
                for (pid, guardian) in &self.guardians {
                    if guardian.id == id {
                        let _gone = kill(*pid, STOP);
                    }
                }
            }
            Err(error) => eprintln!("buildreactor keeper: a message that I do not understand: {error}"),
        }
    }

    fn start(&mut self, spec: &Spec) {
        let keeper = getpid();
        let forked = std::io::pipe().and_then(|(reader, writer)| Ok((reader, writer, fork_single_threaded()?)));
        match forked {
            Ok((status, _, ForkResult::Parent { child })) => {
                self.guardians.insert(child, Guardian { id: spec.id.clone(), status });
            }
            Ok((_, mut writer, ForkResult::Child)) => {
                let _named = prctl::set_name(c"br-guardian");
                // It keeps a copy of the daemon's connection on purpose: when the keeper dies, the daemon sees the end of
                // it only when the last guardian is gone too, and with it its tree.
                let status = guard(spec, keeper);
                // For whoever looks at the folder later; the keeper reads the pipe.
                let _noted = leave_status(&spec.dir, &status);
                let told =
                    serde_json::to_vec(&status).map_err(std::io::Error::from).and_then(|text| writer.write_all(&text));
                std::process::exit(i32::from(told.is_err()));
            }
            Err(error) => {
                let status = Status::without_process(End::NotStarted(format!("fork: {error}")));
                self.say(&FromKeeper::Ended { id: spec.id.clone(), status });
            }
        }
    }

    /// Collects guardians that have ended, and kills orphans of those that vanished.
    fn reap(&mut self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, _))) => {
                    let pid = Pid::from_raw(pid.as_raw_nonzero().get());
                    let Some(mut guardian) = self.guardians.remove(&pid) else { continue };
                    let mut text = Vec::new();
                    let read = guardian.status.read_to_end(&mut text);
                    let known = read.ok().and_then(|_| serde_json::from_slice(&text).ok());
                    let status = known.unwrap_or_else(|| {
                        self.kill_orphans();
                        Status::without_process(End::GuardianGone)
                    });
                    self.say(&FromKeeper::Ended { id: guardian.id, status });
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }

    /// A guardian that was killed has left its tree to the next subreaper above it: to us.
    fn kill_orphans(&self) {
        let mine: Vec<Pid> = self.guardians.keys().copied().collect();
        for _ in 0..2000 {
            let mut spared = Vec::new();
            for guardian in &mine {
                spared.push(*guardian);
                spared.extend(descendants(*guardian));
            }
            let orphans: Vec<Pid> = descendants(getpid()).into_iter().filter(|pid| !spared.contains(pid)).collect();
            if orphans.is_empty() {
                return;
            }
            for pid in &orphans {
                let _gone = kill(*pid, Signal::SIGKILL);
            }
            // Reaped here: a zombie of ours still counts as a descendant. Guardians among them are ours to tell of.
            for pid in orphans {
                if let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) {
                    let _reaped = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn say(&mut self, message: &FromKeeper) {
        let Ok(mut text) = serde_json::to_vec(message) else { return };
        text.push(b'\n');
        // A daemon that is gone is noticed by the next read.
        let _sent = self.daemon.write_all(&text);
    }
}
