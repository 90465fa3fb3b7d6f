//! Deleting what has finished long ago, a little at a time. On a session of its own, which ends with the round.

use std::collections::BTreeMap;
use std::time::Duration;

use deadpool_postgres::Object;
use jiff::Timestamp;
use tokio_postgres::types::{Json, ToSql};

use super::schema::Schema;
use super::{Database, DatabaseError, Result, answered, keys, queries};

/// For the length of a round: nobody waits for it long, and what it deletes need not be flushed, because the next round would
/// delete it again.
const SESSION: &str = "SET lock_timeout = '1s'; SET statement_timeout = '8s'; SET synchronous_commit = off";

/// The right to prune, until it is dropped: its session ends then, and the lock with it.
pub struct Pruning {
    session: Option<Object>,
    schema: Schema,
}

/// A builder and how far its finished builds are kept.
#[derive(Clone, Debug)]
pub struct Kept {
    /// `builders.name`.
    pub builder: String,
    /// What finished before this, or at this time with a lower id, may go. `None`: everything is kept.
    pub since: Option<(Timestamp, i64)>,
}

/// What came of a batch of logs.
#[derive(Clone, Copy, Debug)]
pub struct LogBatch {
    /// How many pieces went.
    pub deleted: i64,
    /// After which build the next batch begins. `None`: there was nothing more.
    pub reached: Option<i64>,
}

/// What came of a batch of builds.
#[derive(Clone, Debug)]
pub struct BuildBatch {
    /// How many builds went.
    pub deleted: i64,
    /// How many were old enough; fewer than asked for means that there are no more.
    pub looked: i64,
    /// How many stay for each reason: a table of somebody's own refers to them, for example.
    pub kept: BTreeMap<String, i64>,
    /// After which build the next batch begins.
    pub reached: Option<(Timestamp, i64)>,
}

impl Database {
    /// The right to prune. `None`: another daemon has it. Somebody who is none is not asked: two that prune beside each other are in nobody's
    /// way, as they wait for no row.
    ///
    /// # Errors
    /// No connection.
    pub async fn pruning(&self) -> Result<Option<Pruning>> {
        const STEP: &str = "prepare to prune";
        let pruning = Pruning { session: Some(self.work().await?), schema: self.schema.clone() };
        let session = pruning.session()?;
        answered(STEP, session.batch_execute(SESSION)).await?;
        const SQL: &str = "SELECT pg_try_advisory_lock($1, $2)";
        let row = answered(STEP, session.query_one(SQL, &[&keys::RETENTION.0, &keys::RETENTION.1])).await?;
        if row.get(0) {
            return Ok(Some(pruning));
        }
        let holder = self.schema.sql(queries::LOCK_HOLDER);
        let holder = answered(STEP, session.query_opt(&*holder, &[&"retention", &None::<&str>])).await?;
        Ok(holder.is_some_and(|row| !row.get::<_, bool>("ours")).then_some(pruning))
    }

    /// Shows people what `worker` cannot delete; `None`: nothing.
    ///
    /// # Errors
    /// Not shown.
    pub async fn show_kept(&self, worker: &str, kept: Option<&str>) -> Result<()> {
        const STEP: &str = "say what [retention] cannot delete";
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(queries::WORKER_KEPT), &[&worker, &kept])).await?;
        Ok(())
    }
}

impl Pruning {
    fn session(&self) -> Result<&Object> {
        self.session
            .as_ref()
            .ok_or_else(|| DatabaseError::Unexpected { step: "prune", what: "its session has ended".to_owned() })
    }

    /// The builder after `builder`, by name, of whose builds those older than `age` and all but the newest `count` may go.
    /// `None`: there is no other.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn next(&self, builder: &str, age: Option<Duration>, count: Option<u32>) -> Result<Option<Kept>> {
        const STEP: &str = "look which builds are old";
        let session = self.session()?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::PRUNE_NEXT))).await?;
        let age = age.map(|age| age.as_secs_f64());
        let row = answered(STEP, session.query_opt(&sql, &[&builder, &age, &count.map(i64::from)])).await?;
        Ok(row.map(|row| Kept {
            builder: row.get("name"),
            since: row.get::<_, Option<Timestamp>>("finished_at").zip(row.get("id")),
        }))
    }

    /// Deletes at most `most` builds of `builder` that finished before `since`, the oldest first, after `reached`.
    ///
    /// # Errors
    /// None of them was deleted, unless the answer is what was lost.
    pub async fn builds(
        &self,
        builder: &str,
        since: (Timestamp, i64),
        reached: Option<(Timestamp, i64)>,
        most: i64,
    ) -> Result<BuildBatch> {
        const STEP: &str = "delete old builds";
        let session = self.session()?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::PRUNE_BUILDS))).await?;
        let (at, id) = reached.unzip();
        let parameters: [&(dyn ToSql + Sync); 6] = [&builder, &since.0, &since.1, &at, &id, &most];
        let row = answered(STEP, session.query_one(&sql, &parameters)).await?;
        let Json(kept) = row.get("kept");
        Ok(BuildBatch {
            deleted: row.get("deleted"),
            looked: row.get("looked"),
            kept,
            reached: row.get::<_, Option<Timestamp>>("finished_at").zip(row.get("id")),
        })
    }

    /// Deletes the logs of builds that finished longer than `age` ago, looking at `most` builds after `reached`.
    ///
    /// # Errors
    /// None of them was deleted, unless the answer is what was lost.
    pub async fn logs(&self, age: Duration, reached: i64, most: i64) -> Result<LogBatch> {
        const STEP: &str = "delete old logs";
        let session = self.session()?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::PRUNE_LOGS))).await?;
        let row = answered(STEP, session.query_one(&sql, &[&reached, &age.as_secs_f64(), &most])).await?;
        Ok(LogBatch { deleted: row.get("deleted"), reached: row.get("reached") })
    }
}

impl Drop for Pruning {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // Out of the pool: its settings and its lock are of no use to others.
            drop(Object::take(session));
        }
    }
}
