//! What runs an attempt. Adding an executor: one file, one line in [`Registry::new`], one line in the conformance test.

pub mod buildbot;
pub mod process;

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::model::{BuildId, Builder, Ended, Job, Seen};

/// Detail of an attempt that was stopped as it was asked to be.
pub const STOPPED: &str = "stopped";

/// A boxed future, because executors are looked up by name.
pub type Running<'a> = Pin<Box<dyn Future<Output = Ended> + Send + 'a>>;

/// Likewise of [`Executor::ready`].
pub type Ready<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// How an attempt is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It has not run yet.
    Start,
    /// An earlier daemon of this worker started it: go on with what is there.
    Adopt,
}

/// What holds an attempt while it runs.
#[derive(Clone, Debug)]
pub struct Tether {
    /// When cancelled, the attempt is ended soon: terminate, then kill.
    pub stop: CancellationToken,
    /// Cancelled before `stop` when the claim is lost for good: what would go on without this daemon, and does not run twice when others
    /// take it over, need not be ended.
    pub claim_lost: CancellationToken,
    /// Cancelled when the daemon stops what runs and then ends: what cannot be ended within some seconds is left as it is.
    pub giving_back: CancellationToken,
    /// Until when its processes may live ([`crate::clock::boottime`]); moved on with each confirmation of the claim.
    pub lease: watch::Receiver<Duration>,
    /// Set once it would go on without this daemon, and be found again by the next.
    pub begun: Arc<AtomicBool>,
    /// What another system tells of the attempt; the last value is written to the database.
    pub seen: watch::Sender<Seen>,
}

/// Runs attempts of one kind.
pub trait Executor: Send + Sync {
    /// Runs `job` until it has ended and nothing of it is left, and says how it ended. Its output goes to the file `log` in
    /// `job.dir`, live. Never fails: what goes wrong is an [`Ended`] of the machinery. Of an adopted attempt only what an
    /// [`crate::model::Job`] says to be there is used.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the attempt running until the end of its lease, or until it is adopted.
    fn run<'a>(&'a self, job: &'a Job, begin: Begin, tether: Tether) -> Running<'a>;

    /// Whether an attempt of `builder`, one of `candidates`, could be started now; asked before anything is claimed.
    ///
    /// # Errors
    /// Why not, for `waiting_because`. Asked again 2 s later, and at each wake.
    ///
    /// # Cancel safety
    /// Safe.
    fn ready<'a>(&'a self, builder: &'a Builder, candidates: &'a [BuildId]) -> Ready<'a>;

    /// Whether an attempt that ran under this worker's name may have processes where this daemon could not see them, so that it is left
    /// alone as another worker's would be.
    fn is_elsewhere(&self, job: &Job) -> bool;

    /// One line about how it works here, for `workers.detail`; `None`: nothing worth one.
    fn detail(&self) -> Option<String>;
}

/// Executors by their name in `builders.executor`.
#[derive(Clone)]
pub struct Registry {
    by_name: Arc<HashMap<&'static str, Arc<dyn Executor>>>,
}

impl Registry {
    /// All executors of this version.
    ///
    /// # Errors
    /// The folder of `process` cannot be used, or another daemon uses it.
    pub async fn new(process: process::Settings, buildbot: buildbot::BuildbotExecutor) -> std::io::Result<Registry> {
        let process: Arc<dyn Executor> = Arc::new(process::ProcessExecutor::new(process).await?);
        let buildbot: Arc<dyn Executor> = Arc::new(buildbot);
        Ok(Registry { by_name: Arc::new(HashMap::from([("process", process), ("buildbot", buildbot)])) })
    }

    /// One line about how builds run here, for `workers.detail`.
    pub fn detail(&self) -> String {
        let mut details: Vec<String> = self.by_name.values().filter_map(|executor| executor.detail()).collect();
        // The trees of `process` first.
        details.sort_by(|a, b| b.cmp(a));
        details.join("; ")
    }

    /// The executor `name`.
    pub fn get(&self, name: &str) -> Option<Arc<dyn Executor>> {
        self.by_name.get(name).cloned()
    }
}

/// An id that nothing else has.
///
/// # Errors
/// The kernel does not make one.
pub fn new_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

/// What tells this boot of this machine from all others; empty where the kernel does not say.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// "1h 30m", as in the configuration file.
pub(crate) fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds > 0 && duration.subsec_millis() > 0 {
        let whole = Duration::from_secs(seconds / 60 * 60);
        let rest = format!("{}s", (duration - whole).as_millis() as f64 / 1000.0);
        return if whole.is_zero() { rest } else { format!("{} {rest}", human(whole)) };
    }
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let parts: Vec<String> = [(hours, "h"), (minutes, "m"), (rest, "s")]
        .into_iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, unit)| format!("{n}{unit}"))
        .collect();
    if parts.is_empty() { format!("{} ms", duration.as_millis()) } else { parts.join(" ") }
}

/// Folders of one worker, below `[worker] state_dir`.
#[derive(Clone, Debug)]
pub struct Folders {
    root: PathBuf,
}

impl Folders {
    /// Of the worker `name`.
    pub fn new(state_dir: &std::path::Path, name: &str) -> Folders {
        Folders { root: state_dir.join(name) }
    }

    /// The worker's own folder.
    pub fn root(&self) -> &std::path::Path {
        &self.root
    }

    /// What tells this folder from all others, here and on other machines; made at the first call. Makes the folder.
    ///
    /// # Errors
    /// The folder cannot be made, read or written.
    pub fn id(&self) -> std::io::Result<String> {
        // A build may have shut them while there was no daemon.
        process::reopen(&self.attempts(), 3);
        std::fs::create_dir_all(&self.root)?;
        let file = self.root.join("folder.id");
        let known = std::fs::read_to_string(&file).unwrap_or_default();
        if !known.is_empty() {
            return Ok(known);
        }
        let new = new_id()?;
        let beside = self.root.join("folder.id.new");
        std::fs::write(&beside, &new)?;
        std::fs::rename(beside, file)?;
        Ok(new)
    }

    /// Folders of attempts.
    pub fn attempts(&self) -> PathBuf {
        self.root.join("attempts")
    }

    /// The folder of one attempt.
    pub fn attempt(&self, id: crate::model::AttemptId) -> PathBuf {
        self.attempts().join(id.to_string())
    }

    /// What builds of a builder keep between them (`BUILD_CACHE`).
    pub fn cache(&self, builder: &str) -> PathBuf {
        self.root.join("cache").join(builder)
    }

    /// The working directory that builds of a builder reuse in one slot.
    pub fn kept_workspace(&self, builder: &str, slot: i32) -> PathBuf {
        self.root.join("work").join(builder).join(slot.to_string())
    }
}
