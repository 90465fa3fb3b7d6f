//! What can go wrong between us and PostgreSQL.

use deadpool_postgres::PoolError;

use super::conninfo::ConnInfoError;

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
        /// " by process 123 on HOST", where it is known.
        by: String,
        /// By an earlier daemon of this folder, which is dead; the server has not noticed yet.
        stale: bool,
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

impl DatabaseError {
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
            | DatabaseError::NoAnswer { .. }
            | DatabaseError::NameInUse { .. }
            | DatabaseError::Unexpected { .. } => None,
        }
    }

    /// Whether the same may work later without anybody changing anything: no connection, server starting or stopping,
    /// deadlock, lock timeout, too many connections. Classes of PostgreSQL's appendix A.
    pub fn is_transient(&self) -> bool {
        match self {
            DatabaseError::ConnInfo(_) | DatabaseError::Unexpected { .. } => false,
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

    /// Whether the server refused a value (class 22 or 23): trying the same again is useless.
    pub fn is_bad_data(&self) -> bool {
        self.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
    }
}
