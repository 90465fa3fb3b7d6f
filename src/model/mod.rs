//! Ids, states and outcomes: pure data, no IO, no clock.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Number of a build (`builds.id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(pub i64);

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One try at a build. Displayed as `BUILD.ATTEMPT`, which is also the fencing token that a build may use for what it
/// writes elsewhere, and the name of the attempt's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttemptId {
    /// The build.
    pub build: BuildId,
    /// Counts from 1 over the life of the build.
    pub attempt: i32,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.build, self.attempt)
    }
}

/// A builder as the reactor needs it to look for work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Builder {
    /// `builders.name`.
    pub name: String,
    /// Key of its slot locks.
    pub number: i32,
    /// How many of its builds run at once, over all workers.
    pub max_running: i32,
    /// Locks of which each of its builds holds one unit.
    pub locks: Locks,
    /// `builders.executor`.
    pub executor: String,
    /// `builders.settings`, JSON.
    pub settings: String,
}

/// The locks of a builder, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locks {
    /// `build_locks.name`.
    pub names: Vec<String>,
    /// Keys of their units' advisory locks.
    pub numbers: Vec<i32>,
    /// Units of each.
    pub capacities: Vec<i32>,
}

/// A row of `build_queue` that may be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The build.
    pub build: BuildId,
    /// Its builder.
    pub builder: String,
    /// Higher first.
    pub priority: i32,
}

/// What the processes of an attempt are taken to live by when its row does not say: the default of the programs that did not write it.
pub const UNKNOWN_LEASE: Duration = Duration::from_secs(40);

/// A build that says `running` while nobody holds its row, or while a worker of an old program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unlocked {
    /// The attempt that lost its owner.
    pub id: AttemptId,
    /// The worker that ran it.
    pub worker: String,
    /// Its builder.
    pub builder: String,
    /// The builder's slot that it uses; 0: none.
    pub slot: i32,
    /// `build_attempts.claims`: another number means that it was held meanwhile.
    pub claims: i32,
    /// `build_attempts.lease`: the longest that its processes were ever given. `None`: a program older than that column began it.
    pub lease: Option<Duration>,
    /// It is held after all, by a program older than that column: its slot is taken, although the lock on it is not.
    pub held: bool,
}

/// Everything an executor needs to run one attempt. Of one that is adopted, only what is marked so is there.
#[derive(Clone, Debug)]
pub struct Job {
    /// The attempt. Adopted too.
    pub id: AttemptId,
    /// `build_attempts.started_at`, microseconds since 1970: with `id` it tells the attempt from one in another database. Adopted too.
    pub started_us: i64,
    /// Its builder. Adopted too.
    pub builder: String,
    /// Which of the builder's slots it holds, from 1; no other running build holds the same. Adopted too.
    pub slot: i32,
    /// The worker's name. Adopted too.
    pub worker: String,
    /// `builders.executor`. Adopted too.
    pub executor: String,
    /// `builders.settings`, JSON. Adopted too.
    pub settings: String,
    /// Start of the build's first attempt, microseconds since 1970: with the build's number it tells the build from one in another
    /// database. Adopted too.
    pub first_us: i64,
    /// The attempts from this one to the one before were lost, so that what they had begun elsewhere is this one's; the attempt's own
    /// number where there is none. Adopted too.
    pub adopt_from: i32,
    /// How long it had run when this was read. Adopted too.
    pub age: Duration,
    /// Id of the boot of the machine that it began on; `None`: not known. Adopted too.
    pub boot: Option<String>,
    /// `builders.script`.
    pub script: Option<String>,
    /// `builders.env`.
    pub env: Vec<(String, String)>,
    /// `builds.properties`.
    /// As text: strings as they are, everything else as JSON.
    pub properties: Vec<(String, String)>,
    /// The whole row of `builds` as JSON, columns of the user's own included.
    pub row: String,
    /// Limit for the whole attempt. Adopted too.
    pub timeout: Duration,
    /// Limit for a time without output. Adopted too.
    pub silence_timeout: Option<Duration>,
    /// Reuse the builder's working directory.
    pub keep_workspace: bool,
    /// Folder of this attempt: `log` and the executor's own files. Adopted too.
    pub dir: PathBuf,
}

/// How the build's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The build did what it should.
    Passed,
    /// The build's own fault.
    Failed,
    /// It ran, or was silent, for too long.
    TimedOut,
    /// The machinery failed: it could not start, or it exited with 75 (EX_TEMPFAIL).
    Error,
    /// It can be started nowhere, because of what its rows ask for. The build ends in `error` at once.
    Impossible,
    /// Its worker disappeared.
    Lost,
    /// Somebody cancelled it.
    Cancelled,
    /// It was stopped because its worker stops; not charged against `max_attempts`.
    GivenBack,
}

impl Outcome {
    /// The word for it in `build_attempts.state`.
    pub fn attempt_state(self) -> &'static str {
        match self {
            Outcome::Passed => "passed",
            Outcome::Failed => "failed",
            Outcome::TimedOut => "timed_out",
            Outcome::Error | Outcome::Impossible => "error",
            Outcome::Lost => "lost",
            Outcome::Cancelled | Outcome::GivenBack => "cancelled",
        }
    }

    /// Whether the build is ours to try again: what the machinery broke is never the author's failure.
    pub fn is_infrastructure(self) -> bool {
        match self {
            Outcome::Error | Outcome::Lost => true,
            Outcome::Passed
            | Outcome::Failed
            | Outcome::TimedOut
            | Outcome::Impossible
            | Outcome::Cancelled
            | Outcome::GivenBack => false,
        }
    }
}

/// What an attempt used, over all its processes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU seconds in user mode.
    pub user_seconds: f64,
    /// CPU seconds in the kernel.
    pub system_seconds: f64,
    /// Largest resident set of any one process, bytes.
    pub max_rss_bytes: i64,
}

/// The end of an attempt, ready to be recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// What became of it.
    pub outcome: Outcome,
    /// How its process ended, where it had one.
    pub exit: Option<Exit>,
    /// One line for a person; `None` for a plain pass.
    pub detail: Option<String>,
    /// What it used, where that is known.
    pub usage: Option<Usage>,
    /// Bytes of output, also those that no log holds.
    pub log_bytes: Option<i64>,
    /// When another system started and finished it, microseconds since 1970 by that system's clock; `None`: it ran here.
    pub times: Option<(i64, i64)>,
}

impl Ended {
    /// An end without a process: `outcome` and why.
    pub fn without_process(outcome: Outcome, detail: impl Into<String>) -> Ended {
        Ended { outcome, exit: None, detail: Some(detail.into()), usage: None, log_bytes: None, times: None }
    }
}

/// What another system tells of an attempt that runs there.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Seen {
    /// Where it is shown.
    pub url: Option<String>,
    /// Who builds it there.
    pub worker: Option<String>,
    /// Its steps, in order.
    pub steps: Vec<Step>,
}

/// A step of an attempt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// From 1.
    pub position: i32,
    /// Its name.
    pub name: String,
    /// `build_steps.state`.
    pub state: &'static str,
    /// Microseconds since 1970.
    pub started_us: Option<i64>,
    /// Microseconds since 1970.
    pub finished_us: Option<i64>,
    /// One line for a person.
    pub detail: Option<String>,
}

/// What the record of a result led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// `builds.state` now: final, or `queued` when it is tried again.
    pub state: String,
    /// When it is tried again: after this long.
    pub retry_in: Option<Duration>,
    /// It has ended, and other builds hang on it.
    pub needed: bool,
}

/// Text for a `text` column: PostgreSQL refuses NUL, and one NUL in a result would make it unrecordable for ever.
pub fn clean_line(text: &str, max_chars: usize) -> String {
    let mut out: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max_chars).collect();
    if text.chars().nth(max_chars).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_line_has_no_control_characters_and_a_limit() {
        assert_eq!(clean_line("a\0b\nc", 10), "a b c");
        assert_eq!(clean_line("abcdef", 3), "abc…");
    }

    #[test]
    fn an_attempt_is_displayed_as_its_fencing_token() {
        assert_eq!(AttemptId { build: BuildId(42), attempt: 3 }.to_string(), "42.3");
    }
}
