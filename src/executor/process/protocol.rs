//! What a daemon and its keeper say to each other: one JSON object a line over a stream socket. Versioned, because a keeper
//! outlives its daemon, and may be older than the one that talks to it next. Fields may be added with a default, and
//! messages that the other may ignore; anything else is a new [`VERSION`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Version of the messages. A keeper says it first.
pub const VERSION: u32 = 1;

/// From the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToKeeper {
    /// Fork a guardian for this attempt.
    Start(Box<Spec>),
    /// Terminate the tree of an attempt, then kill what is left.
    Stop {
        /// `BUILD.ATTEMPT`.
        id: String,
    },
    /// The claim of an attempt was confirmed.
    Renew {
        /// `BUILD.ATTEMPT`.
        id: String,
        /// Milliseconds on the clock of leases (CLOCK_BOOTTIME): its tree may live until then. A time of the clock, not a length,
        /// so that a message that was long under way does not give more than it may.
        until_ms: u64,
    },
    /// Leave, if nothing runs: another keeper is to come.
    Leave,
}

/// From the keeper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromKeeper {
    /// First message on each connection: the keeper is ready.
    Hello {
        /// Its [`VERSION`].
        version: u32,
        /// Its process id.
        pid: i32,
        /// Attempts that it has not told the end of, `BUILD.ATTEMPT`.
        running: Vec<String>,
        /// Why attempts get no PID namespace of their own; none: they do.
        no_namespace: Option<String>,
        /// Device and inode of the program that it runs: nobody else may look.
        #[serde(default)]
        program: Option<(u64, u64)>,
    },
    /// An attempt has ended and no process of it is left.
    Ended {
        /// `BUILD.ATTEMPT`.
        id: String,
        /// How.
        status: Status,
    },
}

/// One attempt to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// `BUILD.ATTEMPT`.
    pub id: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Working directory; exists.
    pub workdir: PathBuf,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// What the log says before the output of the build; whole lines.
    #[serde(default)]
    pub notes: String,
    /// Folder of the attempt; exists. The guardian writes `log`, `log.N` and `status.json` there.
    pub dir: PathBuf,
    /// Limit for the attempt, milliseconds.
    pub timeout_ms: u64,
    /// Limit for a time without output, milliseconds.
    pub silence_ms: Option<u64>,
    /// Between terminate and kill, milliseconds.
    pub kill_after_ms: u64,
    /// Bytes of output kept on disk.
    pub file_limit: u64,
    /// The first lease, as in [`ToKeeper::Renew`].
    pub until_ms: u64,
    /// In a PID namespace of its own, where the keeper can make one.
    pub namespace: bool,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Why it ended.
    pub end: End,
    /// Exit code of the first process.
    pub exit_code: Option<i32>,
    /// Signal that ended the first process.
    pub term_signal: Option<i32>,
    /// CPU seconds in user mode, all processes.
    pub user_seconds: f64,
    /// CPU seconds in the kernel, all processes.
    pub system_seconds: f64,
    /// Largest resident set of one process, bytes.
    pub max_rss_bytes: i64,
    /// Bytes of output.
    pub log_bytes: u64,
    /// Why the log on disk is not complete, where it is not (disk full, ...); the build went on.
    pub log_error: Option<String>,
    /// Processes that could not be killed (another user's, through sudo).
    pub survivors: u32,
}

/// Why an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Its first process ended by itself.
    Exited,
    /// It could not be started.
    NotStarted(String),
    /// It ran for longer than these milliseconds.
    Timeout(u64),
    /// It was silent for longer than these milliseconds.
    Silence(u64),
    /// It was told to stop.
    Stopped,
    /// Its lease was not renewed in time.
    LeaseOver,
    /// Its keeper vanished, and the guardian cleaned up.
    KeeperGone,
    /// Its guardian vanished, and the keeper cleaned up.
    GuardianGone,
}

impl Status {
    /// An end without a process.
    pub fn without_process(end: End) -> Status {
        Status {
            end,
            exit_code: None,
            term_signal: None,
            user_seconds: 0.0,
            system_seconds: 0.0,
            max_rss_bytes: 0,
            log_bytes: 0,
            log_error: None,
            survivors: 0,
        }
    }
}
