//! One constant and one function per file in `sql/queries`. All but the claim's run on a work connection, each in a
//! transaction of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use backon::{BackoffBuilder, ConstantBuilder};
use tokio_postgres::types::ToSql;

use super::{Database, Result, answered, keys};
use crate::model::{AttemptId, BuildId, Job, Seen, UNKNOWN_LEASE};

macro_rules! statements {
    ($($name:ident = $file:literal;)*) => {
        $(
            #[doc = concat!("`sql/queries/", $file, "`")]
            pub const $name: &str = include_str!(concat!("../../sql/queries/", $file));
        )*
        /// Every statement with its file name: a test prepares each against a migrated database.
        pub const ALL: &[(&str, &str)] = &[$(($file, $name)),*];
    };
}

statements! {
    ATTEMPT_SEEN = "attempt_seen.sql";
    ATTEMPT_STATE = "attempt_state.sql";
    ATTEMPT_REFUSED = "attempt_refused.sql";
    BEGIN_ATTEMPT = "begin_attempt.sql";
    BEGIN_REFUSAL = "begin_refusal.sql";
    CANCELS_TAKE = "cancels_take.sql";
    CHARACTERS_FIT = "characters_fit.sql";
    CLAIM_AGAIN = "claim_again.sql";
    CLAIM_COUNT = "claim_count.sql";
    CLAIM_ROW = "claim_row.sql";
    CLAIM_SLOT = "claim_slot.sql";
    CLAIM_UNCHANGED = "claim_unchanged.sql";
    LOCK_HOLDER = "lock_holder.sql";
    LOG_DELETE = "log_delete.sql";
    LOG_INSERT = "log_insert.sql";
    LOG_PIECES = "log_pieces.sql";
    LOOK_ALL = "look_all.sql";
    LOOK_ASKERS = "look_askers.sql";
    LOOK_BUILDERS = "look_builders.sql";
    LOOK_CANCELS = "look_cancels.sql";
    LOOK_MINE = "look_mine.sql";
    LOOK_NEW = "look_new.sql";
    LOOK_UNLOCKED = "look_unlocked.sql";
    MAIL_AGAIN = "mail_again.sql";
    MAIL_BACK = "mail_back.sql";
    MAIL_COUNT = "mail_count.sql";
    MAIL_DUE = "mail_due.sql";
    MAIL_END = "mail_end.sql";
    MAIL_FACTS = "mail_facts.sql";
    MAIL_GIVE_UP = "mail_give_up.sql";
    MAIL_HOLD = "mail_hold.sql";
    MAIL_HOLD_BACK = "mail_hold_back.sql";
    MAIL_ROOM = "mail_room.sql";
    MAIL_SENT = "mail_sent.sql";
    MAIL_TAKE = "mail_take.sql";
    MAIL_WAIT = "mail_wait.sql";
    NEXT_DUE = "next_due.sql";
    NOTIFY = "notify.sql";
    PROMOTE_DUE = "promote_due.sql";
    PRUNE_BUILDS = "prune_builds.sql";
    PRUNE_LOGS = "prune_logs.sql";
    PRUNE_NEXT = "prune_next.sql";
    READ_BUILD = "read_build.sql";
    READ_LOG = "read_log.sql";
    READ_QUEUE = "read_queue.sql";
    READ_RECENT = "read_recent.sql";
    READ_RUNNING = "read_running.sql";
    READ_STEPS = "read_steps.sql";
    READ_WORKERS = "read_workers.sql";
    RECORD_RESULT = "record_result.sql";
    RESULT_REFUSED = "result_refused.sql";
    SCHEDULE_DONE = "schedule_done.sql";
    SCHEDULE_DUE = "schedule_due.sql";
    SCHEDULE_ENQUEUE = "schedule_enqueue.sql";
    SCHEDULE_LOCK = "schedule_lock.sql";
    SCHEDULE_PLAN = "schedule_plan.sql";
    SCHEDULE_REFUSE = "schedule_refuse.sql";
    SCHEDULE_WAIT = "schedule_wait.sql";
    SETTLE = "settle.sql";
    SETTLE_FOLLOW = "settle_follow.sql";
    SETTLE_NEEDS = "settle_needs.sql";
    WORKER_HELLO = "worker_hello.sql";
    WORKER_HOLDER = "worker_holder.sql";
    WORKER_KEPT = "worker_kept.sql";
}

/// A worker as it presents itself.
#[derive(Clone, Debug)]
pub struct Hello {
    /// `workers.name`.
    pub name: String,
    /// Id of its folder.
    pub folder: String,
    /// Id of its machine's boot.
    pub boot: String,
    /// Id of this run of the daemon.
    pub run: String,
    /// Machine.
    pub host: String,
    /// Process id.
    pub pid: i32,
    /// Builds at once.
    pub slots: i32,
    /// Labels offered.
    pub labels: Vec<String>,
    /// Patterns of builder names.
    pub builders: Vec<String>,
    /// How long its builds live without a claim.
    pub lease: Duration,
    /// How long it leaves other workers' builds that nobody holds alone.
    pub grace: Duration,
}

/// What a worker hears when it reports in.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// Other workers that are not stopped.
    pub others: i64,
    /// `drain_worker` was called.
    pub drain: bool,
}

/// What came of a start.
#[derive(Debug)]
pub enum Begun {
    /// The attempt is visible.
    Started(Job),
    /// Likewise, but the row of the build is too large to be given to a script.
    TooLarge(Job),
    /// Nothing has begun: somebody holds the build's row, in words.
    Held(String),
    /// Nothing has begun: the builder is paused, or its limits have changed, or the build does not wait.
    Refused,
}

/// When a piece of a log survives a crash of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// When it is written: more follows, which must not stand behind a gap.
    AtOnce,
    /// With the COMMIT of the result that follows; one flush for both.
    WithResult,
}

/// A piece of a log to write, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogChange {
    /// Adds, or replaces, the piece `seq`.
    Put {
        /// Order of the piece.
        seq: i64,
        /// Its text, without NUL.
        content: String,
        /// Bytes of output up to its end.
        position: u64,
        /// Bytes of output that it stands for, as a marker.
        left_out: Option<u64>,
    },
    /// Removes the pieces `first..=last`.
    Delete {
        /// First seq to go.
        first: i64,
        /// Last seq to go.
        last: i64,
    },
}

/// A piece of a log as the database has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPiece {
    /// Order of the piece.
    pub seq: i64,
    /// Bytes of output up to its end.
    pub position: u64,
    /// Bytes of output that it stands for, as a marker.
    pub left_out: Option<u64>,
    /// Bytes of its text.
    pub size: u64,
}

/// Advisory locks, two numbers each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdvisoryKeys {
    /// First numbers.
    pub classes: Vec<i32>,
    /// Second numbers.
    pub keys: Vec<i32>,
}

/// An interval of months and days may be positive as PostgreSQL compares it, and not so in seconds.
pub(super) fn limit(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1))
}

impl Database {
    /// Makes an attempt visible, and brings everything needed to run it.
    ///
    /// # Errors
    /// Nothing was started.
    pub async fn begin_attempt(
        &self,
        build: BuildId,
        hello: &Hello,
        slot: i32,
        lock_units: &[String],
    ) -> Result<Begun> {
        const STEP: &str = "start an attempt";
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(BEGIN_ATTEMPT))).await?;
        let Some(row) = answered(
            STEP,
            session.query_opt(
                &sql,
                &[
                    &build.0,
                    &hello.name,
                    &slot,
                    &hello.labels,
                    &lock_units,
                    &hello.folder,
                    &hello.boot,
                    &hello.lease.as_secs_f64(),
                ],
            ),
        )
        .await?
        else {
            let row = answered(STEP, session.query_opt(&*self.schema.sql(BEGIN_REFUSAL), &[&build.0])).await?;
            return Ok(row.and_then(|row| row.get("held")).map_or(Begun::Refused, Begun::Held));
        };
        let whole_row: Option<String> = row.get("row_json");
        let fits = whole_row.is_some();
        let pairs = |names: &str, values: &str| -> Vec<(String, String)> {
            row.get::<_, Vec<String>>(names).into_iter().zip(row.get::<_, Vec<String>>(values)).collect()
        };
        let job = Job {
            id: AttemptId { build, attempt: row.get("attempt") },
            started_us: row.get("started_us"),
            builder: row.get("builder"),
            slot,
            worker: hello.name.clone(),
            executor: row.get("executor"),
            script: row.get("script"),
            env: pairs("env_names", "env_values"),
            properties: pairs("property_names", "property_values"),
            row: whole_row.unwrap_or_default(),
            timeout: limit(row.get("timeout_seconds")),
            silence_timeout: row.get::<_, Option<f64>>("silence_seconds").map(limit),
            keep_workspace: row.get("keep_workspace"),
            dir: std::path::PathBuf::new(),
            settings: row.get("settings"),
            first_us: row.get("first_us"),
            adopt_from: row.get("adopt_from"),
            age: Duration::ZERO,
            boot: Some(hello.boot.clone()),
        };
        Ok(if fits { Begun::Started(job) } else { Begun::TooLarge(job) })
    }

    /// Says in `builds` why the result of an attempt cannot be recorded. It does not wait for a row that somebody holds.
    ///
    /// # Errors
    /// Not said.
    pub async fn result_refused(&self, id: AttemptId, why: &str) -> Result<()> {
        const STEP: &str = "say why a result cannot be recorded";
        let why = crate::model::clean_line(why, 2000);
        let why = self.fit_or_ascii(&why).await;
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(RESULT_REFUSED), &[&id.build.0, &id.attempt, &why])).await?;
        Ok(())
    }

    /// Whose open transaction holds the row of a build in `builds`, in words; "an open transaction" where nobody can tell.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn holder(&self, build: BuildId) -> Result<String> {
        const STEP: &str = "look who holds a build";
        const SQL: &str = "SELECT farm.build_holder($1)";
        let session = self.work().await?;
        Ok(answered(STEP, session.query_one(&*self.schema.sql(SQL), &[&build.0])).await?.get(0))
    }

    /// Counts a claim that was taken again, while its row is locked, by a worker that gives its processes `lease` from now on; comes back with the keys of its advisory locks, to be
    /// [held](super::Claim::hold) again. `None`: the attempt is not its build's running one any more.
    ///
    /// # Errors
    /// Unknown then; the claim is not to be relied on.
    pub async fn count_claim(&self, id: AttemptId, started_us: i64, lease: Duration) -> Result<Option<AdvisoryKeys>> {
        const STEP: &str = "count a claim";
        let session = self.work().await?;
        let (lease, unknown) = (lease.as_secs_f64(), UNKNOWN_LEASE.as_secs_f64());
        let values: [&(dyn ToSql + Sync); 5] = [&id.build.0, &id.attempt, &started_us, &lease, &unknown];
        let row = answered(STEP, session.query_opt(&*self.schema.sql(CLAIM_COUNT), &values)).await?;
        Ok(row.map(|row| {
            let numbers: Vec<i32> = row.get("lock_numbers");
            let units: Vec<i32> = row.get("lock_units");
            AdvisoryKeys {
                classes: std::iter::once(keys::SLOT.0 + row.get::<_, i32>("number"))
                    .chain(numbers.iter().map(|number| keys::UNIT.0 + number))
                    .collect(),
                keys: std::iter::once(keys::SLOT.1 + row.get::<_, i32>("slot"))
                    .chain(units.iter().map(|unit| keys::UNIT.1 + unit))
                    .collect(),
            }
        }))
    }

    /// The pieces of a log that are there, in order.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn log_pieces(&self, id: AttemptId) -> Result<Vec<LogPiece>> {
        const STEP: &str = "look up what is written of a log";
        let session = self.work().await?;
        let rows = answered(STEP, session.query(&*self.schema.sql(LOG_PIECES), &[&id.build.0, &id.attempt])).await?;
        let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
        Ok(rows
            .iter()
            .map(|row| LogPiece {
                seq: row.get("seq"),
                position: bytes(row.get("position")),
                left_out: row.get::<_, Option<i64>>("left_out").map(bytes),
                size: bytes(row.get("size")),
            })
            .collect())
    }

    /// What `build_attempts` says of an attempt, and whether it is still its build's running one. `None`: no such attempt. `started_us` as
    /// in [`Job`]: after a failover to a server that had missed its start, another attempt may have its number.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn attempt_state(&self, id: AttemptId, started_us: i64) -> Result<Option<(String, bool)>> {
        const STEP: &str = "look up an attempt";
        let session = self.work().await?;
        let row = answered(
            STEP,
            session.query_opt(&*self.schema.sql(ATTEMPT_STATE), &[&id.build.0, &id.attempt, &started_us]),
        )
        .await?;
        Ok(row.map(|row| (row.get("state"), row.get("current"))))
    }

    /// Writes to a log.
    ///
    /// # Errors
    /// None of the changes was written.
    pub async fn write_log(&self, id: AttemptId, changes: &[LogChange], durable: Durable) -> Result<()> {
        const STEP: &str = "write the log of a build";
        let mut fitting = Vec::with_capacity(changes.len());
        for change in changes {
            fitting.push(match change {
                LogChange::Put { content, .. } => Some(self.fit(content).await?),
                LogChange::Delete { .. } => None,
            });
        }
        let mut session = self.work().await?;
        let put = answered(STEP, session.prepare_cached(&self.schema.sql(LOG_INSERT))).await?;
        let delete = answered(STEP, session.prepare_cached(&self.schema.sql(LOG_DELETE))).await?;
        let transaction = answered(STEP, session.transaction()).await?;
        match durable {
            Durable::AtOnce => {}
            Durable::WithResult => {
                answered(STEP, transaction.batch_execute("SET LOCAL synchronous_commit = off")).await?;
            }
        }
        for (change, content) in changes.iter().zip(&fitting) {
            match change {
                LogChange::Put { seq, position, left_out, .. } => {
                    let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                    let (position, left_out) = (bytes(*position), left_out.map(bytes));
                    let values: [&(dyn ToSql + Sync); 6] =
                        [&id.build.0, &id.attempt, seq, content, &position, &left_out];
                    answered(STEP, transaction.execute(&put, &values)).await?;
                }
                LogChange::Delete { first, last } => {
                    answered(STEP, transaction.execute(&delete, &[&id.build.0, &id.attempt, first, last])).await?;
                }
            }
        }
        answered(STEP, transaction.commit()).await
    }

    /// Writes what another system tells of an attempt; nothing when it has ended.
    ///
    /// # Errors
    /// Nothing was written.
    pub async fn attempt_seen(&self, id: AttemptId, seen: &Seen) -> Result<()> {
        const STEP: &str = "write the steps of a build";
        let steps = tokio_postgres::types::Json(self.fit_json(&seen.steps).await?);
        let (url, worker) =
            (self.fit_optional(seen.url.as_deref()).await?, self.fit_optional(seen.worker.as_deref()).await?);
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(ATTEMPT_SEEN))).await?;
        let values: [&(dyn ToSql + Sync); 5] = [&id.build.0, &id.attempt, &url, &worker, &steps];
        answered(STEP, session.execute(&sql, &values)).await?;
        Ok(())
    }

    /// Reports in. `detail`: one line for people. `accepting`: whether it claims builds. `unready`: builders whose builds it cannot start,
    /// each with the reason.
    ///
    /// # Errors
    /// Not reported; the next look tries again.
    pub async fn hello(
        &self,
        hello: &Hello,
        state: &str,
        detail: Option<&str>,
        accepting: bool,
        unready: &BTreeMap<String, String>,
    ) -> Result<Heard> {
        const STEP: &str = "report this worker";
        let detail = self.fit_optional(detail).await?;
        let unready = tokio_postgres::types::Json(self.fit_json(unready).await?);
        let mut session = self.work().await?;
        let transaction = answered(STEP, session.transaction()).await?;
        // The reactor's look waits for this statement, and an operator may leave a transaction with drain_worker() open.
        answered(STEP, transaction.batch_execute("SET LOCAL lock_timeout = '1s'")).await?;
        let row = answered(
            STEP,
            transaction.query_one(
                &*self.schema.sql(WORKER_HELLO),
                &[
                    &hello.name,
                    &hello.host,
                    &hello.pid,
                    &env!("CARGO_PKG_VERSION"),
                    &hello.slots,
                    &hello.labels,
                    &hello.builders,
                    &state,
                    &detail,
                    &hello.run,
                    &accepting,
                    &hello.folder,
                    &unready,
                    &hello.lease.as_secs_f64(),
                    &hello.grace.as_secs_f64(),
                ],
            ),
        )
        .await?;
        answered(STEP, transaction.commit()).await?;
        Ok(Heard { others: row.get("others"), drain: row.get::<_, Option<bool>>("drain").unwrap_or(false) })
    }

    /// Settles what hangs on builds that have `ended`; with `everything` also all waiting builds that their needs, a cancel or a newer
    /// build have passed by: of a deep queue some 20,000 rows, `from` one on, and from there on the next time. Comes back with whether there was
    /// anything to settle.
    ///
    /// # Errors
    /// Some were not settled; a later call with `everything` finds them.
    pub async fn settle(&self, ended: &[BuildId], everything: bool, from: &mut Option<i64>) -> Result<bool> {
        const STEP: &str = "settle waiting builds";
        const MOST: i32 = 1000;
        const ROUNDS: usize = 20;
        /// How long one statement may hold what it has settled: nobody's cancel waits longer for it.
        const SECONDS: f64 = 0.2;
        // Another worker may hold a row for as long, having looked at it before ours ended.
        let mut pauses = ConstantBuilder::default().with_delay(Duration::from_millis(100)).with_max_times(5).build();
        let mut ended: Vec<i64> = ended.iter().map(|build| build.0).collect();
        let mut settled = false;
        if everything {
            let session = self.work().await?;
            for _ in 0..ROUNDS {
                let row = answered(STEP, session.query_one(&*self.schema.sql(SETTLE), &[&*from, &MOST])).await?;
                settled |= row.get::<_, i64>("settled") > 0;
                *from = row.get("next");
                if from.is_none() {
                    break;
                }
            }
            let row = answered(STEP, session.query_one(&*self.schema.sql(SETTLE_NEEDS), &[&MOST])).await?;
            ended.extend(row.get::<_, Vec<i64>>("ended"));
        }
        while !ended.is_empty() {
            let session = self.work().await?;
            let follow = answered(STEP, session.prepare_cached(&self.schema.sql(SETTLE_FOLLOW))).await?;
            let row = answered(STEP, session.query_one(&follow, &[&ended, &SECONDS])).await?;
            drop(session);
            ended = row.get("left_over");
            if row.get::<_, i64>("settled") > 0 {
                settled = true;
            } else if !ended.is_empty() {
                let Some(pause) = pauses.next() else { break };
                tokio::time::sleep(pause).await;
            }
        }
        Ok(settled)
    }

    /// Sends events, and with `wake` a wake to all workers. `synchronous_commit` is off: a notifying COMMIT holds a lock on
    /// the whole cluster until it is flushed, and these promise nothing.
    ///
    /// # Errors
    /// Not sent; they are hints.
    pub async fn notify(&self, events: &[String], wake: bool) -> Result<()> {
        const STEP: &str = "send events";
        let mut session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(NOTIFY))).await?;
        let transaction = answered(STEP, session.transaction()).await?;
        answered(STEP, transaction.batch_execute("SET LOCAL synchronous_commit = off")).await?;
        answered(STEP, transaction.query(&sql, &[&events, &wake])).await?;
        answered(STEP, transaction.commit()).await
    }
}
