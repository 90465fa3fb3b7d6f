//! What can go wrong between us and PostgreSQL.

use deadpool_postgres::PoolError;

use super::conninfo::{ConnInfo, ConnInfoError};

/// A failed step, named for the person who reads the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    /// The connection string, or a file or variable that it refers to, is wrong.
    #[error(transparent)]
    ConnInfo(#[from] ConnInfoError),
    /// No connection.
    #[error("cannot connect to {place}")]
    Connect {
        /// Where to, without the password.
        place: String,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// No connection from a pool.
    #[error("cannot get a connection to {place}")]
    Pool {
        /// Where to, without the password.
        place: String,
        /// Why.
        #[source]
        source: Box<PoolError>,
    },
    /// The server wants a password, and there is none.
    #[error(
        "cannot connect to {place}: it wants a password: put one into ~/.pgpass, PGPASSWORD or the connection string"
    )]
    NoPassword {
        /// Where to.
        place: String,
    },
    /// A statement failed.
    #[error("cannot {step}")]
    Statement {
        /// What was being done, as "cannot ...".
        step: &'static str,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// No answer within the time allowed: the network or the server hangs.
    #[error("cannot {step}: no answer from the database within {} s", .after.as_secs())]
    NoAnswer {
        /// What was being done.
        step: &'static str,
        /// How long we waited.
        after: std::time::Duration,
    },
    /// The name is taken.
    #[error("worker name `{name}` is in use{by}: give this one another name in [worker] name, or stop the other")]
    NameInUse {
        /// The worker name.
        name: String,
        /// " by process 123 on HOST", or by which role, where it is known.
        by: String,
        /// By an earlier daemon of this folder, which is dead and the server has not noticed yet, or by nobody who has a right to it: the
        /// name will be free again.
        stale: bool,
    },
    /// A table, view or column is not there.
    #[error("the tables of buildreactor in {place} are missing or too old: run `buildreactor migrate` first")]
    NoSchema {
        /// Where.
        place: String,
    },
    /// A row does not look as expected.
    #[error("cannot {step}: {what}")]
    Unexpected {
        /// What was being done.
        step: &'static str,
        /// What is odd.
        what: String,
    },
}

/// SQLSTATE insufficient_privilege.
pub(super) const FORBIDDEN: &str = "42501";

impl DatabaseError {
    /// No connection.
    pub(super) fn connect(info: &ConnInfo, source: tokio_postgres::Error) -> DatabaseError {
        let place = info.describe();
        if wants_password(info, &source) {
            DatabaseError::NoPassword { place }
        } else {
            DatabaseError::Connect { place, source }
        }
    }

    /// No connection from a pool.
    pub(super) fn pool(info: &ConnInfo, source: PoolError) -> DatabaseError {
        let place = info.describe();
        match source {
            PoolError::Backend(error) if wants_password(info, &error) => DatabaseError::NoPassword { place },
            source => DatabaseError::Pool { place, source: Box::new(source) },
        }
    }

    /// The SQLSTATE, where the server gave one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            DatabaseError::Connect { source, .. } | DatabaseError::Statement { source, .. } => {
                source.code().map(|code| code.code())
            }
            DatabaseError::Pool { source, .. } => match source.as_ref() {
                PoolError::Backend(error) => error.code().map(|code| code.code()),
                _ => None,
            },
            DatabaseError::ConnInfo(_)
            | DatabaseError::NoPassword { .. }
            | DatabaseError::NoAnswer { .. }
            | DatabaseError::NameInUse { .. }
            | DatabaseError::NoSchema { .. }
            | DatabaseError::Unexpected { .. } => None,
        }
    }

    /// Whether the server says that our role may not (insufficient_privilege).
    pub fn is_forbidden(&self) -> bool {
        self.sqlstate() == Some(FORBIDDEN)
    }

    /// Whether the same may work later without anybody changing anything: no connection, server starting or stopping,
    /// deadlock, lock timeout, too many connections. Classes of PostgreSQL's appendix A.
    pub fn is_transient(&self) -> bool {
        match self {
            DatabaseError::ConnInfo(_)
            | DatabaseError::NoPassword { .. }
            | DatabaseError::NoSchema { .. }
            | DatabaseError::Unexpected { .. } => false,
            DatabaseError::NameInUse { .. } | DatabaseError::NoAnswer { .. } => true,
            DatabaseError::Connect { .. } | DatabaseError::Pool { .. } | DatabaseError::Statement { .. } => {
                match self.sqlstate() {
                    None => true,
                    Some(code) => {
                        matches!(&code[..2], "08" | "40" | "53" | "55" | "57" | "58" | "25")
                    }
                }
            }
        }
    }

    /// Whether the server has answered a statement with a refusal that will not pass by itself: it did nothing, and what it was asked is
    /// refused again until somebody changes a row, a trigger or a right.
    pub fn is_refusal(&self) -> bool {
        matches!(self, DatabaseError::Statement { .. }) && self.sqlstate().is_some() && !self.is_transient()
    }

    /// Whether the server has answered a statement with an error that is not about the server itself: starting, stopping, out of room, read-only.
    /// Somebody's trigger may raise any SQLSTATE, and another row may fare better.
    pub fn is_an_answer(&self) -> bool {
        matches!(self, DatabaseError::Statement { .. })
            && self
                .sqlstate()
                .is_some_and(|code| !["08", "25", "53", "57", "58"].contains(&&code[..2]) || code == "57014")
    }

    /// Whether such a refusal is about the data of the row: a value (class 22), a constraint (23), a limit of the program (54), or more
    /// memory than PostgreSQL gives a value (XX000).
    pub fn is_about_the_row(&self) -> bool {
        self.is_bad_data() || self.sqlstate().is_some_and(|code| code.starts_with("54") || code == "XX000")
    }

    /// Whether the server refused a value (class 22 or 23): trying the same again is useless.
    pub fn is_bad_data(&self) -> bool {
        self.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
    }
}

/// The driver has no other way to ask. Of several hosts it tells the error of the last alone: the others may only be away.
fn wants_password(info: &ConnInfo, error: &tokio_postgres::Error) -> bool {
    let missing = std::error::Error::source(error).is_some_and(|cause| cause.to_string() == "password missing");
    missing && info.config().get_ports().len().max(info.config().get_hosts().len()) <= 1
}
