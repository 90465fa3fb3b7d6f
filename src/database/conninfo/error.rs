//! What can be wrong with a description of a connection, said for the person who wrote it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a setting was written. Errors begin with it, because a wrong port in `PGPORT` and one in
/// a service file are mended in different places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The URL, key=value string or database name that was passed in.
    Text,
    /// A section of a connection service file.
    Service {
        /// Name of the service.
        name: Box<str>,
        /// The file it was found in.
        file: Box<Path>,
        /// Line of the setting, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(&'static str),
    /// Nobody wrote it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("connection string"),
            Self::Service { name, file, line } => {
                write!(f, "service `{name}` in `{}` line {line}", file.display())
            }
            Self::Variable(name) => write!(f, "variable `{name}`"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Why a connection cannot be made the way it was described.
///
/// No message holds a password, a whole URL or a piece of text that could be part of a password.
#[derive(Debug, thiserror::Error)]
pub enum ConnInfoError {
    /// The text is neither a URL nor key=value pairs nor a name.
    #[error("{origin}: {problem}")]
    Syntax {
        /// Which text.
        origin: Origin,
        /// What is wrong and how to write it.
        problem: String,
    },
    /// A key that libpq does not know either.
    #[error("{origin}: there is no connection setting `{key}`{}", did_you_mean(.near))]
    UnknownKey {
        /// Where the key stands.
        origin: Origin,
        /// The key as written.
        key: String,
        /// Existing keys that look like it, best first.
        near: Vec<&'static str>,
    },
    /// A known key with a value that has no meaning.
    #[error("{origin}: `{key}` {problem}")]
    BadValue {
        /// Where the value stands.
        origin: Origin,
        /// Its key.
        key: &'static str,
        /// What is wrong and what to write.
        problem: String,
    },
    /// A setting that libpq honours and this program cannot; ignoring it would give less than was
    /// asked for.
    #[error("{origin}: `{key}` cannot be honoured: {reason}")]
    Unsupported {
        /// Where it stands.
        origin: Origin,
        /// Its key.
        key: &'static str,
        /// Why, and what to do instead.
        reason: &'static str,
    },
    /// No service file defines the service.
    #[error(
        "{origin}: service `{name}` is not defined in {searched}: add a section `[{name}]`, or set \
         `PGSERVICEFILE`"
    )]
    ServiceNotFound {
        /// Where the service was named.
        origin: Origin,
        /// The service.
        name: String,
        /// The files looked at.
        searched: String,
    },
    /// A file that is needed cannot be used.
    #[error("{origin}: cannot use {what} `{}`: {advice}", .path.display())]
    File {
        /// Where the path was written.
        origin: Origin,
        /// What the file is.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// What the system or the parser said.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// `verify-ca` or `verify-full` without a certificate to verify against.
    #[error(
        "{origin}: `sslmode={mode}` needs the certificate of the authority that signed the \
         server's, and {looked}: put it there, name its file with `sslrootcert`, trust the \
         system's authorities with `sslrootcert=system`, or accept any server with \
         `sslmode=require`"
    )]
    NoRootCertificate {
        /// Where the mode was written.
        origin: Origin,
        /// The mode.
        mode: &'static str,
        /// Where a certificate was looked for.
        looked: String,
    },
    /// No database user is named, and the operating system has no name for the process.
    #[error(
        "no database user: user id {uid} has no name on this machine; write `user=NAME` or set \
         `PGUSER`"
    )]
    NoUser {
        /// Effective user id of this process.
        uid: u32,
    },
    /// rustls refused the settings as a whole.
    #[error("cannot set up TLS for the database connection")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn did_you_mean(near: &[&str]) -> String {
    if near.is_empty() {
        return "; PostgreSQL's manual lists them under libpq, \"Parameter Key Words\"".to_owned();
    }
    format!("; did you mean {}?", quoted_list(near, " or "))
}

/// `` `a`, `b` or `c` ``.
pub(super) fn quoted_list(words: &[&str], last: &str) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        Some((end, [])) => end.clone(),
        Some((end, rest)) => format!("{}{last}{end}", rest.join(", ")),
        None => String::new(),
    }
}
