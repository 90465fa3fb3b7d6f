//! What the commands `watch` and `log` read: one connection of their own that changes nothing, and plain rows. Times are
//! seconds by the server's clock, states the words of `builds.state`.

use std::future::Future;
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row, Statement};
use tokio_util::task::AbortOnDropHandle;

use super::schema::Schema;
use super::{ConnInfo, DatabaseError, Result, answered, queries, session};
use crate::model::BuildId;

/// How long one look may take. More than [`super::ANSWER_TIME`]: the views go through the whole queue, which takes seconds
/// when it is a million rows deep. A dead peer is noticed sooner, by `tcp_user_timeout`.
const LOOK_TIME: Duration = Duration::from_secs(30);

/// One connection for reading. After an error it should be given up.
pub struct Reader {
    client: Client,
    prepared: Prepared,
    _driver: AbortOnDropHandle<()>,
}

/// Statements, parsed once a connection.
struct Prepared {
    build: Statement,
    log: Statement,
    queue: Statement,
    recent: Statement,
    running: Statement,
    steps: Statement,
    workers: Statement,
}

/// A build as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct BuildNow {
    /// Its builder.
    pub builder: String,
    /// `builds.state`.
    pub state: String,
    /// Whether it has ended.
    pub is_final: bool,
    /// The current or last attempt; 0 before the first.
    pub attempt: i32,
    /// Whether that attempt is over.
    pub last_ended: bool,
    /// Worker of that attempt.
    pub worker: Option<String>,
    /// Why it is in this state.
    pub detail: Option<String>,
    /// Seconds that the last attempt took.
    pub ran_seconds: Option<f64>,
}

/// A piece of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Order of the pieces.
    pub seq: i64,
    /// Its text; not always whole lines.
    pub content: String,
}

/// Some rows, and how many there are in all.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows<T> {
    /// The first of them.
    pub rows: Vec<T>,
    /// All of them.
    pub total: i64,
}

/// A build that waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    /// The build.
    pub build: BuildId,
    /// Its builder.
    pub builder: String,
    /// Place in the queue of its builder, from 1.
    pub position: i64,
    /// Seconds since it was queued.
    pub waiting_seconds: Option<f64>,
    /// Seconds until it starts, if builds take their usual time. `None`: nobody would start it.
    pub expected_seconds: Option<f64>,
    /// Why it waits.
    pub because: String,
}

/// A build that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    /// The build.
    pub build: BuildId,
    /// Its builder.
    pub builder: String,
    /// The worker that runs it.
    pub worker: String,
    /// Which try this is.
    pub attempt: i32,
    /// Seconds since the attempt started.
    pub elapsed_seconds: f64,
    /// Median of the builder's last passed builds, seconds. `None`: none has passed yet.
    pub usual_seconds: Option<f64>,
    /// Last line of its log, without terminal escapes; other control characters may be in it.
    pub last_log_line: Option<String>,
}

/// What another system tells of the last attempt of a build.
#[derive(Clone, Debug, PartialEq)]
pub struct Elsewhere {
    /// The attempt.
    pub attempt: i32,
    /// Where it is shown.
    pub url: String,
    /// Who builds it there.
    pub worker: Option<String>,
    /// Its steps, in order.
    pub steps: Vec<Step>,
}

/// A step of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// From 1.
    pub position: i32,
    /// Its name.
    pub name: String,
    /// `build_steps.state`.
    pub state: String,
    /// Why it is in this state.
    pub detail: Option<String>,
    /// Seconds that it took, or has taken so far. `None`: it never began.
    pub seconds: Option<f64>,
}

/// A build that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Recent {
    /// The build.
    pub build: BuildId,
    /// Its builder.
    pub builder: String,
    /// How it ended, as in `builds.state`.
    pub state: String,
    /// How many attempts it took.
    pub attempt: i32,
    /// Worker of the last attempt.
    pub worker: Option<String>,
    /// Why it is in this state.
    pub detail: Option<String>,
    /// Seconds that the last attempt took. `None`: it never ran.
    pub ran_seconds: Option<f64>,
    /// Seconds since it ended.
    pub ago_seconds: f64,
}

/// A worker that has not been stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// active, draining or gone.
    pub status: String,
    /// How many builds it runs.
    pub running: i64,
    /// How many it runs at once.
    pub slots: i32,
}

impl Reader {
    /// Connects.
    ///
    /// # Errors
    /// No connection, or the schema is missing or too old; the message says what to do then.
    pub async fn connect(info: &ConnInfo) -> Result<Reader> {
        const STEP: &str = "prepare to read builds";
        let (client, connection) = super::connect(info, "buildreactor watch").await?;
        let driver = crate::tasks::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %crate::report::Chain(&error), "the reading connection ended");
            }
        });
        let schema = Schema::default();
        answered(STEP, session::prepare(&client, &schema, &session::reading())).await?;
        let prepare = async |statement| client.prepare(&schema.sql(statement)).await;
        // Pipelined: one round trip for all.
        let prepared = answered(STEP, async {
            tokio::try_join!(
                prepare(queries::READ_BUILD),
                prepare(queries::READ_LOG),
                prepare(queries::READ_QUEUE),
                prepare(queries::READ_RECENT),
                prepare(queries::READ_RUNNING),
                prepare(queries::READ_STEPS),
                prepare(queries::READ_WORKERS),
            )
        });
        let (build, log, queue, recent, running, steps, workers) =
            prepared.await.map_err(|error| schema_does_not_fit(error, info))?;
        let prepared = Prepared { build, log, queue, recent, running, steps, workers };
        Ok(Reader { client, prepared, _driver: driver })
    }

    /// One build. `None`: there is none of this number.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn build(&self, build: BuildId) -> Result<Option<BuildNow>> {
        let row = looked("look at a build", self.client.query_opt(&self.prepared.build, &[&build.0])).await?;
        Ok(row.map(|row| BuildNow {
            builder: row.get("builder"),
            state: row.get("state"),
            is_final: row.get("final"),
            attempt: row.get("attempt"),
            last_ended: row.get("last_ended"),
            worker: row.get("worker"),
            detail: row.get("detail"),
            ran_seconds: row.get("ran_seconds"),
        }))
    }

    /// The next `limit` pieces of a log after the piece `after`, as one statement saw them.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn log(&self, build: BuildId, attempt: i32, after: i64, limit: i64) -> Result<Vec<Piece>> {
        let rows =
            looked("read a log", self.client.query(&self.prepared.log, &[&build.0, &attempt, &after, &limit])).await?;
        Ok(rows.iter().map(|row| Piece { seq: row.get("seq"), content: row.get("content") }).collect())
    }

    /// What waits, at most `limit`; with `build` that one alone.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn queue(&self, build: Option<BuildId>, limit: i64) -> Result<Rows<Waiting>> {
        let build = build.map(|build| build.0);
        let rows = looked("look at the queue", self.client.query(&self.prepared.queue, &[&build, &limit])).await?;
        Ok(counted(&rows, |row| Waiting {
            build: BuildId(row.get("build_id")),
            builder: row.get("builder"),
            position: row.get("position"),
            waiting_seconds: row.get("waiting_seconds"),
            expected_seconds: row.get("expected_seconds"),
            because: row.get("waiting_because"),
        }))
    }

    /// What runs, at most `limit`; with `build` that one alone.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn running(&self, build: Option<BuildId>, limit: i64) -> Result<Rows<Running>> {
        let build = build.map(|build| build.0);
        let rows =
            looked("look at running builds", self.client.query(&self.prepared.running, &[&build, &limit])).await?;
        Ok(counted(&rows, |row| Running {
            build: BuildId(row.get("build_id")),
            builder: row.get("builder"),
            worker: row.get("worker"),
            attempt: row.get("attempt"),
            elapsed_seconds: row.get("elapsed_seconds"),
            usual_seconds: row.get("usual_seconds"),
            last_log_line: row.get("last_log_line"),
        }))
    }

    /// What another system tells of the last attempt of a build. `None`: no other is concerned, or knows of it yet.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn elsewhere(&self, build: BuildId) -> Result<Option<Elsewhere>> {
        let rows = looked("look at the steps of a build", self.client.query(&self.prepared.steps, &[&build.0])).await?;
        let step = |row: &Row| {
            Some(Step {
                position: row.get::<_, Option<i32>>("position")?,
                name: row.get("name"),
                state: row.get("state"),
                detail: row.get("detail"),
                seconds: row.get("seconds"),
            })
        };
        Ok(rows.first().map(|row| Elsewhere {
            attempt: row.get("attempt"),
            url: row.get("external_url"),
            worker: row.get("external_worker"),
            steps: rows.iter().filter_map(step).collect(),
        }))
    }

    /// What finished last, newest first, at most `limit` and at most 100.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn recent(&self, limit: i64) -> Result<Vec<Recent>> {
        let rows = looked("look at finished builds", self.client.query(&self.prepared.recent, &[&limit])).await?;
        let recent = |row: &Row| Recent {
            build: BuildId(row.get("build_id")),
            builder: row.get("builder"),
            state: row.get("state"),
            attempt: row.get("attempt"),
            worker: row.get("worker"),
            detail: row.get("detail"),
            ran_seconds: row.get("ran_seconds"),
            ago_seconds: row.get("ago_seconds"),
        };
        Ok(rows.iter().map(recent).collect())
    }

    /// The workers that have not been stopped, by name.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn workers(&self) -> Result<Vec<Worker>> {
        let rows = looked("look at the workers", self.client.query(&self.prepared.workers, &[])).await?;
        let worker = |row: &Row| Worker {
            name: row.get("worker"),
            status: row.get("status"),
            running: row.get("running"),
            slots: row.get("slots"),
        };
        Ok(rows.iter().map(worker).collect())
    }
}

fn counted<T>(rows: &[Row], read: impl Fn(&Row) -> T) -> Rows<T> {
    Rows { total: rows.first().map_or(0, |row| row.get("total")), rows: rows.iter().map(read).collect() }
}

/// Runs a look with [`LOOK_TIME`].
async fn looked<T>(
    step: &'static str,
    work: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    match tokio::time::timeout(LOOK_TIME, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(DatabaseError::Statement { step, source }),
        Err(_) => Err(DatabaseError::NoAnswer { step, after: LOOK_TIME }),
    }
}

/// A table, view or column that is not there means that nobody has migrated.
fn schema_does_not_fit(error: DatabaseError, info: &ConnInfo) -> DatabaseError {
    let missing = [SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_FUNCTION];
    match error.sqlstate() {
        Some(code) if missing.iter().any(|state| state.code() == code) => {
            DatabaseError::NoSchema { place: info.describe() }
        }
        _ => error,
    }
}
