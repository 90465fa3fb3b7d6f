//! `build_schedules`: what is due, and what becomes of it. On work connections.

use std::time::Duration;

use jiff::Timestamp;

use super::{Database, Result, answered, queries};
use crate::model::BuildId;

/// A schedule that has something to do.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// `build_schedules.name`.
    pub name: String,
    /// Five fields.
    pub cron: String,
    /// Name of the zone whose clock they mean.
    pub time_zone: String,
    /// The occurrence that is due; `None`: it is to be planned.
    pub due: Option<Timestamp>,
    /// The server's clock when it was read.
    pub now: Timestamp,
}

impl Database {
    /// Schedules to be planned or due but those named `aside`, at most `limit`.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn schedules_due(&self, aside: &[String], limit: i64) -> Result<Vec<Schedule>> {
        const STEP: &str = "look at the schedules";
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::SCHEDULE_DUE))).await?;
        let rows = answered(STEP, session.query(&sql, &[&aside, &limit])).await?;
        Ok(rows
            .iter()
            .map(|row| Schedule {
                name: row.get("name"),
                cron: row.get("cron"),
                time_zone: row.get("time_zone"),
                due: row.get("next_at"),
                now: row.get("now"),
            })
            .collect())
    }

    /// How long until the next schedule but those named `aside` is due, by the server's clock; an overdue one is now. `None`:
    /// none is planned.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn schedule_wait(&self, aside: &[String]) -> Result<Option<Duration>> {
        const STEP: &str = "look when the next schedule is due";
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::SCHEDULE_WAIT))).await?;
        let row = answered(STEP, session.query_one(&sql, &[&aside])).await?;
        let seconds: Option<f64> = row.get("seconds");
        Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)))
    }

    /// Stores when `schedule` comes next. `false`: it was not there to be planned any more.
    ///
    /// # Errors
    /// Perhaps not stored.
    pub async fn plan_schedule(&self, schedule: &Schedule, next: Timestamp) -> Result<bool> {
        const STEP: &str = "plan a schedule";
        let session = self.work().await?;
        let Schedule { name, cron, time_zone, .. } = schedule;
        let changed =
            answered(STEP, session.execute(&*self.schema.sql(queries::SCHEDULE_PLAN), &[name, cron, time_zone, &next]))
                .await?;
        Ok(changed == 1)
    }

    /// Queues the build of a `schedule` that is due at `due`, and moves it on to `next`, in one transaction. `None`: another
    /// daemon does, or the schedule has changed.
    ///
    /// # Errors
    /// Nothing was queued, unless the answer to the COMMIT is what was lost; then the schedule has moved on with it.
    pub async fn fire_schedule(&self, schedule: &Schedule, due: Timestamp, next: Timestamp) -> Result<Option<BuildId>> {
        const STEP: &str = "queue the build of a schedule";
        let mut session = self.work().await?;
        let Schedule { name, cron, time_zone, .. } = schedule;
        let transaction = answered(STEP, session.transaction()).await?;
        let locked = answered(
            STEP,
            transaction.query_opt(&*self.schema.sql(queries::SCHEDULE_LOCK), &[name, cron, time_zone, &due, &next]),
        )
        .await?;
        if locked.is_none() {
            return Ok(None);
        }
        let row = answered(STEP, transaction.query_one(&*self.schema.sql(queries::SCHEDULE_ENQUEUE), &[name])).await?;
        let build: i64 = row.get("build_id");
        answered(STEP, transaction.execute(&*self.schema.sql(queries::SCHEDULE_DONE), &[name, &next, &build])).await?;
        answered(STEP, transaction.commit()).await?;
        Ok(Some(BuildId(build)))
    }

    /// Disables `schedule`, saying `why`. `false`: it has changed meanwhile.
    ///
    /// # Errors
    /// Perhaps not stored.
    pub async fn refuse_schedule(&self, schedule: &Schedule, why: &str) -> Result<bool> {
        const STEP: &str = "disable a schedule";
        let session = self.work().await?;
        let Schedule { name, cron, time_zone, .. } = schedule;
        let changed = answered(
            STEP,
            session.execute(&*self.schema.sql(queries::SCHEDULE_REFUSE), &[name, cron, time_zone, &why]),
        )
        .await?;
        Ok(changed == 1)
    }
}
