//! What a daemon and its keeper say to each other: one JSON object a line over a stream socket. Versioned, because a keeper
//! may be older than the daemon that talks to it.

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
}

/// From the keeper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromKeeper {
    /// First message: the keeper is ready.
    Hello {
        /// Its [`VERSION`].
        version: u32,
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
    /// It ran for too long.
    Timeout,
    /// It was silent for too long.
    Silence,
    /// It was told to stop.
    Stopped,
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
