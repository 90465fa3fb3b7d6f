//! Settings: built-in defaults, overridden by one TOML file, overridden by the environment.
//!
//! Every key stands once, in [`keys::all`], with the parser that the file and the environment
//! share. Reading goes on after an error, so that one run shows all that is wrong; nothing is
//! ever ignored, because a misspelt key that is ignored is a setting the operator believes in.

mod buildbot;
mod keys;
mod mail;
mod reader;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::buildbot::Buildbot;
pub use self::mail::{Auth, Mail, Server, StartTls};

/// Where the file is looked for without `--config`. It need not exist.
pub const DEFAULT_FILE: &str = "/etc/buildreactor/buildreactor.toml";

/// How long a keeper may take to kill its tree once its lease has run out (10 s). `lease.grace`
/// must leave room for it, or two runs of one build could overlap.
pub const KILL_TIME: Duration = Duration::from_secs(10);

/// All settings. [`Config::default`] is what an empty file and an empty environment give, except
/// that [`Config::load`] also refuses a host name that cannot be a worker's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    pub database: Database,
    pub worker: Worker,
    pub reactor: Reactor,
    pub lease: Lease,
    pub log: Log,
    pub retention: Retention,
    pub mail: Mail,
    pub kick: Kick,
    /// By NAME.
    pub buildbot: BTreeMap<String, Buildbot>,
    file: Option<PathBuf>,
    overrides: Vec<String>,
}

/// `[database]`: where the builds are.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Database {
    /// A libpq connection string or URL; may hold a password, so `Debug` hides it.
    /// Default: `None`, the `PG*` variables and libpq's defaults. `DATABASE_URL` overrides the
    /// file, `BUILDREACTOR_DATABASE_URL` overrides both.
    pub url: Option<String>,
}

/// `[worker]`: what this daemon offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Unique among the workers of one database: 1 to 63 of `A-Z a-z 0-9 . _ -`, not only dots.
    /// Default: the host name.
    pub name: String,
    /// How many builds run here at once: 1 to 1000. Default: 2.
    pub slots: u32,
    /// What builders may ask for; neither empty nor with a comma. Default: none.
    pub labels: Vec<String>,
    /// Which builders this worker serves: patterns where `*` stands for any characters and `?`
    /// for one; at least one. Default: `*`, all.
    pub builders: Vec<String>,
    /// Workspaces, caches and whole logs; absolute. Default: `/var/lib/buildreactor`.
    pub state_dir: PathBuf,
    /// Put each build into a PID namespace of its own where the kernel allows it, as it does for root. Default: true.
    pub pid_namespace: bool,
    /// Bytes free under `state_dir` below which no build is claimed; 0: never look.
    /// Default: 1 GiB.
    pub min_free_disk: u64,
}

/// `[reactor]`: when the queue is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reactor {
    /// The longest time between two looks when no wake arrives: 100 ms to 1 day. Default: 30 s.
    pub poll: Duration,
}

/// `[lease]`: how the loss of a worker is noticed. Each is 1 ms to 1 day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// How often a claim's connection is pinged. Default: 5 s.
    pub ping: Duration,
    /// How long a process tree lives without a confirmed claim; at least three times `ping`.
    /// Default: 40 s.
    pub lease: Duration,
    /// How long others leave an unlocked running build to its owner; at least `lease` plus
    /// [`KILL_TIME`]. Default: 60 s.
    pub grace: Duration,
}

/// `[log]`: how much of a build's output is kept. Past a limit the middle is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// Bytes of one attempt's log kept in the database: at least 16 KiB. Default: 1 MiB.
    pub database_limit: u64,
    /// Bytes of one attempt's log kept in its file: at least 64 KiB and `database_limit`.
    /// Default: 256 MiB.
    pub file_limit: u64,
    /// How long log files are kept: 1 ms to 36500 days. Default: 30 days of 24 hours.
    pub keep: Duration,
}

/// `[retention]`: what the daemon deletes by itself of what has finished. Default: nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retention {
    /// How long after its end a build is kept, with its attempts and logs: 1 s to 36500 days. Default: for ever.
    pub builds: Option<Duration>,
    /// How many finished builds of each builder are kept, the newest: 1 to 1000000. Default: all.
    pub builds_per_builder: Option<u32>,
    /// How long after the end of its build a log is kept in the database: 1 s to 36500 days.
    /// Default: as long as the build.
    pub logs: Option<Duration>,
}

/// `[kick]`: a TCP port on which every connection is a wake.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kick {
    /// Where to listen. Default: `None`, nowhere.
    pub listen: Option<SocketAddr>,
}

impl Config {
    /// Reads the file, then the environment (as [`environment`] gives it), then checks how the
    /// settings fit together.
    ///
    /// `path` is the file of `--config` and must exist; `None` means [`DEFAULT_FILE`], or all
    /// defaults where there is none.
    ///
    /// # Errors
    ///
    /// All errors there are, one line each, with file and line or the name of the variable. The
    /// value of `database.url` is in none of them.
    pub fn load(path: Option<&Path>, env: &dyn Fn() -> Vec<(String, String)>) -> Result<Config, ConfigErrors> {
        reader::load(path, Path::new(DEFAULT_FILE), env(), Config::default())
    }

    /// Where the settings come from, for the start-up log: the file, and the names (never the
    /// values) of the variables that count.
    pub fn source(&self) -> String {
        let names: Vec<String> = self.overrides.iter().map(|n| format!("`{n}`")).collect();
        let names = names.join(", ");
        match (&self.file, names.is_empty()) {
            (Some(file), true) => format!("file `{}`", file.display()),
            (Some(file), false) => format!("file `{}`, overridden by {names}", file.display()),
            (None, true) => "no file, all defaults".to_owned(),
            (None, false) => format!("no file, all defaults except {names}"),
        }
    }
}

/// The process's environment. Bytes that are not UTF-8 become U+FFFD, which [`Config::load`]
/// refuses in a variable of its own; `std::env::vars` would panic on anybody's.
pub fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .collect()
}

/// Takes from a command what says where the database is, and what may hold a password: of another program a build may read the
/// environment (`/proc/PID/environ`).
pub fn without_secrets(command: &mut std::process::Command) -> &mut std::process::Command {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("BUILDREACTOR_") || text.starts_with("PG") || text == "DATABASE_URL" {
            command.env_remove(name);
        }
    }
    command
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.as_ref().map(|_| "<hidden>");
        f.debug_struct("Database").field("url", &url).finish()
    }
}

impl Default for Worker {
    fn default() -> Self {
        let name = nix::unistd::gethostname().unwrap_or_default();
        Self {
            name: name.to_string_lossy().into_owned(),
            slots: 2,
            labels: Vec::new(),
            builders: vec!["*".to_owned()],
            state_dir: PathBuf::from("/var/lib/buildreactor"),
            min_free_disk: 1 << 30,
            pid_namespace: true,
        }
    }
}

impl Default for Reactor {
    fn default() -> Self {
        Self { poll: Duration::from_secs(30) }
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self { ping: Duration::from_secs(5), lease: Duration::from_secs(40), grace: Duration::from_secs(60) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { database_limit: 1 << 20, file_limit: 256 << 20, keep: 30 * value::DAY }
    }
}

/// Everything that is wrong with the settings; at least one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// One line per error: the file's by line, then the environment's by name, then the settings
    /// that do not fit together.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}
