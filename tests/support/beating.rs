//! Builds that show signs of life, processes that are stopped, and two workers with short leases: what the tests of leases stand on.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Daemon, Db, TempDir, processes_of, temp_dir, wait_for, wait_for_within};
use crate::support::below;

/// Small numbers, within the rule that grace is the lease and 10 s for the killing.
pub const SMALL: [(&str, &str); 4] = [
    ("BUILDREACTOR_REACTOR_POLL", "1h"),
    ("BUILDREACTOR_LEASE_PING", "500ms"),
    ("BUILDREACTOR_LEASE_LEASE", "3s"),
    ("BUILDREACTOR_LEASE_GRACE", "13s"),
];
/// Lease and grace, and what others may take to see it on a busy machine.
pub const BEYOND_GRACE: Duration = Duration::from_secs(120);

/// A build that shows signs of life, deaf to SIGTERM, until the gate is open; on a worker `second` it shows one.
pub struct Beating {
    folder: TempDir,
}

impl Beating {
    pub fn new() -> Beating {
        Beating { folder: temp_dir() }
    }

    pub fn script(&self) -> String {
        format!(
            "trap '' TERM; while :; do read -r up rest < /proc/uptime; echo \"$BUILD_ATTEMPT $up\" >> '{}'; \
             if [ -e '{}' ] || [ $BUILD_WORKER = second ]; then exit 3; fi; sleep 0.05; done",
            self.trace().display(),
            self.gate().display()
        )
    }

    /// Not deaf.
    pub fn obedient_script(&self) -> String {
        self.script().replace("trap '' TERM; ", "")
    }

    pub fn gate(&self) -> PathBuf {
        self.folder.path().join("gate")
    }

    pub fn trace(&self) -> PathBuf {
        self.folder.path().join("trace")
    }

    pub fn open(&self) {
        std::fs::write(self.gate(), "").unwrap();
    }

    /// Attempt and time (of /proc/uptime) of each sign of life.
    pub fn beats(&self) -> Vec<(i32, f64)> {
        let text = std::fs::read_to_string(self.trace()).unwrap_or_default();
        let parse = |line: &str| {
            let (attempt, time) = line.split_once(' ')?;
            Some((attempt.parse().ok()?, time.parse().ok()?))
        };
        text.split_inclusive('\n').filter_map(|line| parse(line.strip_suffix('\n')?)).collect()
    }

    /// Until the attempt lives.
    pub async fn beats_in(&self, attempt: i32) {
        wait_for_within(BEYOND_GRACE, &format!("signs of life of attempt {attempt}"), || async {
            self.beats().iter().any(|(n, _)| *n == attempt)
        })
        .await;
    }

    /// Until it shows a sign of life of a time.
    pub async fn beats_at(&self, uptime: f64) {
        wait_for("its signs of life to go on", || async { self.beats().last().is_some_and(|(_, at)| *at > uptime) })
            .await;
    }

    pub fn last_of(&self, attempt: i32) -> f64 {
        self.beats().iter().rfind(|(n, _)| *n == attempt).expect("a sign of life").1
    }

    /// That no attempt showed a sign of life after the next one had begun.
    pub fn one_at_a_time(&self) {
        let attempts: Vec<i32> = self.beats().into_iter().map(|(attempt, _)| attempt).collect();
        assert!(attempts.is_sorted(), "attempts that overlap: {attempts:?}");
    }
}

pub fn uptime() -> f64 {
    std::fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse().unwrap()
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Processes that are stopped (SIGSTOP) until this is dropped: those who clean up after a failed test wait for them.
pub struct Stopped(Vec<i32>);

impl Stopped {
    pub fn these(pids: Vec<i32>) -> Stopped {
        assert!(!pids.is_empty());
        for pid in &pids {
            signal(*pid, Signal::SIGSTOP);
        }
        Stopped(pids)
    }

    /// All of a worker.
    pub fn worker(daemon: &Daemon) -> Stopped {
        let keeper = daemon.keeper().expect("a keeper");
        let mut stopped = Stopped(Vec::new());
        loop {
            let all = [daemon.pid(), keeper].into_iter().chain(below(keeper));
            let news: Vec<i32> = all.filter(|pid| !stopped.0.contains(pid)).collect();
            if news.is_empty() {
                return stopped;
            }
            for pid in news {
                // It may have ended; what is stopped starts no more.
                let _gone = kill(Pid::from_raw(pid), Signal::SIGSTOP);
                stopped.0.push(pid);
            }
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _gone = kill(Pid::from_raw(*pid), Signal::SIGCONT);
        }
    }
}

pub async fn attempts(db: &Db, build: i64) -> Vec<String> {
    db.all(&format!(
        "SELECT concat_ws('|', attempt, worker, state, exit_code, detail) FROM build_attempts WHERE build_id = {build} ORDER BY attempt"
    ))
    .await
}

/// Two workers, the first of which runs a build.
pub struct Pair {
    pub first: Daemon,
    _second: Daemon,
    pub build: Beating,
    pub id: i64,
}

impl Pair {
    pub async fn start(db: &Db, namespace: &str) -> Pair {
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        db.execute("INSERT INTO builders (name, script, labels) VALUES ('own', 'true', '{first}')").await;
        let settings = [
            SMALL.as_slice(),
            &[("BUILDREACTOR_WORKER_LABELS", "first"), ("BUILDREACTOR_WORKER_PID_NAMESPACE", namespace)],
        ];
        let first = Daemon::start(db, "first", &settings.concat()).await;
        let id = db.enqueue("b").await;
        build.beats_in(1).await;
        let second = Daemon::start(db, "second", &SMALL).await;
        // Longer than its first lease: it is renewed.
        build.beats_at(uptime() + 6.0).await;
        assert_eq!(attempts(db, id).await, ["1|first|running"]);
        Pair { first, _second: second, build, id }
    }

    /// Until its tree is gone: within the lease and the time to kill, and before anybody else has it.
    pub async fn dies(&self, db: &Db, since: f64) {
        wait_for("the end of its tree", || async { processes_of(&self.first.state).is_empty() }).await;
        assert_eq!(attempts(db, self.id).await, ["1|first|running"], "dead before another starts it");
        let lived = self.build.last_of(1) - since;
        println!("lived for {lived:.1} s more, with a lease of 3 s");
        assert!(lived < 3.0 + 10.0, "{lived:.1} s");
    }

    /// Runs again somewhere, to its end.
    pub async fn runs_again(&self, db: &Db) {
        self.build.beats_in(2).await;
        self.build.open();
        assert_eq!(db.finished(self.id).await, "failed");
        self.build.one_at_a_time();
    }
}
