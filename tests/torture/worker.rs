//! One worker under a supervisor that starts it again, behind a proxy of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{BEYOND, LEASES, SLOTS, Timeline};
use crate::support::proxy::Proxy;
use crate::support::{PROGRAM, TempDir, temp_dir};

/// After it has left by itself, as a supervisor would.
const STARTSECS: Duration = Duration::from_millis(300);

/// What its supervisor does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Up,
    /// SIGSTOPped.
    Frozen(Instant),
    /// Told to leave; then away for so long.
    Leaving(Duration),
    Down(Instant),
    /// Not to be started again.
    Over,
}

pub struct Worker {
    pub name: String,
    pub state: Arc<TempDir>,
    pub proxy: Proxy,
    /// When the proxy is well again.
    pub heals: Option<Instant>,
    pub condition: Condition,
    /// To be left to itself until it is up again: this takes longer than others would leave it alone.
    pub alone: bool,
    pub log: PathBuf,
    child: Option<Child>,
    /// Of the next start too.
    pub lease: Duration,
    /// The longest that it ever had: builds that it runs may live by that.
    pub longest: Duration,
    /// Every second one has no PID namespaces: its guardians walk their descendants.
    namespaces: bool,
}

impl Worker {
    pub async fn new(n: u16, server_port: u16, folder: &Path) -> Worker {
        let name = format!("w{n}");
        let proxy = Proxy::to(([127, 0, 0, 1], server_port).into()).await;
        let log = folder.join(format!("{name}.log"));
        let mut worker = Worker {
            name,
            state: Arc::new(temp_dir()),
            proxy,
            heals: None,
            condition: Condition::Up,
            alone: false,
            log,
            child: None,
            lease: Duration::from_secs(LEASES[usize::from(n) % LEASES.len()]),
            longest: Duration::ZERO,
            namespaces: n.is_multiple_of(2),
        };
        worker.spawn();
        worker
    }

    fn spawn(&mut self) {
        let url = format!("postgresql://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.proxy.port());
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(PROGRAM)
            .args(["run", "--database", &url])
            .env_remove("DATABASE_URL")
            .env("BUILDREACTOR_WORKER_NAME", &self.name)
            .env("BUILDREACTOR_WORKER_STATE_DIR", self.state.path())
            .env("BUILDREACTOR_WORKER_SLOTS", SLOTS.to_string())
            .env("BUILDREACTOR_WORKER_PID_NAMESPACE", self.namespaces.to_string())
            .env("BUILDREACTOR_REACTOR_POLL", "2s")
            .env("BUILDREACTOR_LEASE_PING", "500ms")
            .env("BUILDREACTOR_LEASE_LEASE", format!("{}s", self.lease.as_secs()))
            .env("BUILDREACTOR_LEASE_GRACE", format!("{}s", (self.lease + BEYOND).as_secs()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.longest = self.longest.max(self.lease);
        self.condition = Condition::Up;
        self.alone = false;
    }

    /// What a supervisor does: notices its end, starts it again; and wakes it up when its time has come.
    pub fn supervise(&mut self, timeline: &mut Timeline) {
        let now = Instant::now();
        let ended = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
        if let Some(status) = ended {
            self.child = None;
            let away = match self.condition {
                Condition::Leaving(away) => away,
                Condition::Up | Condition::Frozen(_) | Condition::Down(_) | Condition::Over => STARTSECS,
            };
            timeline.note(format!("{} has ended: {status}; back in {away:.1?}", self.name));
            if self.condition != Condition::Over {
                self.condition = Condition::Down(now + away);
            }
        }
        match self.condition {
            Condition::Down(until) if now >= until => {
                self.spawn();
                timeline.note(format!("{} is started again, its lease is {} s", self.name, self.lease.as_secs()));
            }
            Condition::Frozen(until) if now >= until => {
                self.thaw();
                timeline.note(format!("{} goes on", self.name));
            }
            Condition::Up | Condition::Frozen(_) | Condition::Leaving(_) | Condition::Down(_) | Condition::Over => {}
        }
    }

    fn thaw(&mut self) {
        self.signal(Signal::SIGCONT);
        self.condition = Condition::Up;
        self.alone = false;
    }

    /// Everything as it should be; restarted by the next [`Worker::supervise`].
    pub fn heal(&mut self) {
        self.heals = None;
        self.proxy.set(crate::support::proxy::Mood::default());
        match self.condition {
            Condition::Frozen(_) => self.thaw(),
            Condition::Down(_) => self.condition = Condition::Down(Instant::now()),
            Condition::Leaving(_) => self.condition = Condition::Leaving(Duration::ZERO),
            Condition::Up | Condition::Over => {}
        }
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            let _gone = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal);
        }
    }

    pub fn kill(&mut self, away: Duration) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.condition = Condition::Down(Instant::now() + away);
    }

    /// SIGTERM, for good; its exit code, or why there is none.
    pub async fn leave(&mut self) -> Result<(), String> {
        self.condition = Condition::Over;
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        let Some(child) = &mut self.child else { return Err("it was not running".to_owned()) };
        loop {
            match child.try_wait().unwrap() {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("it ended with {status}")),
                None if Instant::now() > deadline => return Err("it does not leave".to_owned()),
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The keeper, if it lives.
    pub fn keeper(&self) -> Option<i32> {
        let pid = std::fs::read_to_string(self.state.path().join(&self.name).join("keeper.lock")).ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "br-keeper").then(|| pid.parse().ok())?
    }

    /// Guardians of its keeper.
    pub fn guardians(&self) -> Vec<i32> {
        let Some(keeper) = self.keeper() else { return Vec::new() };
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for _ in 0..2 {
            if let Some(keeper) = self.keeper() {
                let _gone = kill(Pid::from_raw(keeper), Signal::SIGKILL);
            }
            if let Some(mut child) = self.child.take() {
                let _ended = child.kill();
                let _reaped = child.wait();
            }
        }
    }
}
