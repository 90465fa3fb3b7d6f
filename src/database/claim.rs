//! The claim: one connection, one transaction, open for the whole build. It locks the queue row and writes nothing until
//! the result (invariant 2).

use std::time::Duration;

use deadpool_postgres::Object;
use tokio_postgres::types::ToSql;

use super::queries::{AdvisoryKeys, Hello};
use super::{ANSWER_TIME, Database, DatabaseError, Result, answered, keys, queries};
use crate::clock::boottime;
use crate::model::{AttemptId, BuildId, Builder, Ended, Exit, Outcome, Recorded};

/// How often recording is tried again on the same claim after a deadlock; the row lock survives
/// `ROLLBACK TO SAVEPOINT`.
const RECORD_TRIES: u32 = 20;

/// SQLSTATE deadlock_detected and serialization_failure.
const TRY_AT_ONCE: [&str; 2] = ["40P01", "40001"];

/// A session that may hold a claim. Dropping it ends the session, and with it the transaction: a claim never goes back to
/// the pool by accident.
pub struct Claim {
    session: Option<Object>,
    database: Database,
}

/// What came of an attempt to claim.
#[derive(Debug, PartialEq, Eq)]
pub enum Tried {
    /// The row and one of the builder's slots are ours until the transaction ends.
    Claimed {
        /// The build.
        build: BuildId,
        /// The builder's slot, from 1.
        slot: i32,
        /// Units of its locks (`NAME#UNIT`).
        lock_units: Vec<String>,
    },
    /// Every slot of the builder is held, here or elsewhere.
    BuilderBusy,
    /// A slot was free, but not a unit of each of the builder's locks.
    LocksBusy,
    /// None of the candidates is there, ready and unlocked any more.
    RowsGone,
}

impl Database {
    /// A session for a claim.
    ///
    /// # Errors
    /// No connection.
    pub async fn claim(&self) -> Result<Claim> {
        Ok(Claim { session: Some(self.claim_session().await?), database: self.clone() })
    }
}

impl Claim {
    fn session(&self) -> Result<&Object> {
        self.session
            .as_ref()
            .ok_or_else(|| DatabaseError::Unexpected { step: "use a claim", what: "it has ended".to_owned() })
    }

    /// Opens the transaction, takes a slot of `builder` that is not `occupied` (by a build whose claim is lost) and locks the first of `candidates` that is free: one round trip.
    /// On all but [`Tried::Claimed`] the transaction is rolled back.
    ///
    /// # Errors
    /// The connection is gone or the server refused; then nothing is held.
    ///
    /// # Cancel safety
    /// Dropping the future leaves a claim that must be dropped too.
    pub async fn take(&mut self, builder: &Builder, occupied: &[i32], candidates: &[BuildId]) -> Result<Tried> {
        const STEP: &str = "claim a build";
        let session = self.session()?;
        let slot_sql = answered(STEP, session.prepare_cached(&self.database.schema.sql(queries::CLAIM_SLOT))).await?;
        let row_sql = answered(STEP, session.prepare_cached(&self.database.schema.sql(queries::CLAIM_ROW))).await?;
        let ids: Vec<i64> = candidates.iter().map(|id| id.0).collect();
        // Pipelined: sent together, answered in order. The last, by the simple protocol, closes the portal of the one
        // before, whose snapshot would otherwise stay open with the transaction and make every
        // CREATE INDEX CONCURRENTLY in the database wait for this build.
        let locks = &builder.locks;
        let class = keys::SLOT.0 + builder.number;
        let classes: Vec<i32> = locks.numbers.iter().map(|number| keys::UNIT.0 + number).collect();
        let slot_of: [&(dyn ToSql + Sync); 8] = [
            &class,
            &builder.max_running,
            &occupied,
            &classes,
            &locks.capacities,
            &locks.names,
            &keys::SLOT.1,
            &keys::UNIT.1,
        ];
        let row_of: [&(dyn ToSql + Sync); 1] = [&ids];
        let (begun, slot, saved, row, closed) = answered(STEP, async {
            Ok(tokio::join!(
                session.batch_execute("BEGIN"),
                session.query_opt(&slot_sql, &slot_of),
                session.batch_execute("SAVEPOINT row"),
                session.query_opt(&row_sql, &row_of),
                session.batch_execute("SELECT 1"),
            ))
        })
        .await?;
        let failed = |source| DatabaseError::Statement { step: STEP, source };
        begun.map_err(failed)?;
        saved.map_err(failed)?;
        let slot = slot.map_err(failed)?;
        let row = row.map_err(failed)?;
        closed.map_err(failed)?;
        match (slot, row) {
            (Some(slot), Some(row)) => Ok(Tried::Claimed {
                build: BuildId(row.get(0)),
                slot: slot.get("slot"),
                lock_units: slot.get("lock_units"),
            }),
            (None, _) => {
                self.release().await?;
                Ok(Tried::BuilderBusy)
            }
            (Some(slot), None) => {
                self.release().await?;
                Ok(if slot.get("locked") { Tried::RowsGone } else { Tried::LocksBusy })
            }
        }
    }

    /// Opens the transaction and locks the row of an attempt that was started before: after a lost connection, or to
    /// record that its worker is lost. The row alone decides. False: somebody else holds it, or the build is no longer queued; nothing is
    /// held then.
    ///
    /// # Errors
    /// The connection is gone or the server refused.
    pub async fn take_again(&mut self, id: AttemptId) -> Result<bool> {
        const STEP: &str = "lock the row of a build again";
        let session = self.session()?;
        answered(STEP, session.batch_execute("BEGIN; SAVEPOINT row")).await?;
        let row =
            answered(STEP, session.query_opt(&*self.database.schema.sql(queries::CLAIM_AGAIN), &[&id.build.0])).await?;
        // Also closes the portal, as in `take`.
        answered(STEP, session.batch_execute("SELECT 1")).await?;
        if row.is_none() {
            self.release().await?;
        }
        Ok(row.is_some())
    }

    /// Holds what belongs to a claim beside its row again, where it can be had: no other build starts with the slot or a lock unit of a
    /// running one, whoever has the advisory lock. False: not all of it, because another claim, which will be refused, has it for a moment.
    ///
    /// # Errors
    /// The connection is gone, and the claim with it.
    pub async fn hold(&self, locks: &AdvisoryKeys) -> Result<bool> {
        const STEP: &str = "hold the slot of a build again";
        // Touches no table: a claim holds locks on the queue alone.
        const SQL: &str =
            "SELECT pg_try_advisory_xact_lock(class, key) FROM unnest($1::integer[], $2::integer[]) AS l(class, key)";
        let session = self.session()?;
        let rows = answered(STEP, session.query(SQL, &[&locks.classes, &locks.keys])).await?;
        answered(STEP, session.batch_execute("SELECT 1")).await?;
        Ok(rows.iter().all(|row| row.get(0)))
    }

    /// Whether the attempt of a row that is locked here was claimed as often as was `seen` when its row was first found unlocked. If so
    /// nobody claims it again before this transaction ends.
    ///
    /// # Errors
    /// The connection is gone or the server refused.
    pub async fn is_unchanged(&self, id: AttemptId, seen: i32) -> Result<bool> {
        const STEP: &str = "look whether a build was claimed again";
        let row = answered(
            STEP,
            self.session()?
                .query_opt(&*self.database.schema.sql(queries::CLAIM_UNCHANGED), &[&id.build.0, &id.attempt]),
        )
        .await?;
        Ok(row.is_some_and(|row| row.get::<_, i32>(0) == seen))
    }

    /// Shows that the claim still stands, and keeps the server from ending its session.
    ///
    /// # Errors
    /// It does not stand, or there was no answer within `deadline`.
    ///
    /// # Cancel safety
    /// Safe: the answer of a dropped ping is thrown away.
    pub async fn ping(&self, deadline: Duration) -> Result<()> {
        const STEP: &str = "ping the claim of a build";
        let session = self.session()?;
        match tokio::time::timeout(deadline, session.batch_execute("SELECT 1")).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(DatabaseError::Statement { step: STEP, source }),
            Err(_) => Err(DatabaseError::NoAnswer { step: STEP, after: deadline }),
        }
    }

    /// Lets go of the row for a moment, keeping transaction and slot, so that a person's UPDATE or DELETE that waits for it gets
    /// its answer, and locks it again. False: somebody else holds it now; then only the slot is held.
    ///
    /// Nobody else takes the build meanwhile: it says `running`, and others leave such a row alone for `grace`.
    ///
    /// # Errors
    /// The connection is gone, and the claim with it.
    pub async fn step_aside(&self, build: BuildId) -> Result<bool> {
        const STEP: &str = "step aside from a queue row";
        const TRIES: u32 = 100;
        let session = self.session()?;
        for _ in 0..TRIES {
            answered(STEP, session.batch_execute("ROLLBACK TO SAVEPOINT row")).await?;
            // The other needs a moment to see that the row is free, and to fail.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let row = answered(STEP, session.query_opt(&*self.database.schema.sql(queries::CLAIM_AGAIN), &[&build.0]))
                .await?;
            answered(STEP, session.batch_execute("SELECT 1")).await?;
            if row.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives up what is held and keeps the session for the next claim.
    ///
    /// # Errors
    /// The connection is gone; then the server has released it.
    pub async fn release(&mut self) -> Result<()> {
        answered("roll a claim back", self.session()?.batch_execute("ROLLBACK")).await
    }

    /// Records the end of an attempt and commits: verdict, attempt, dequeue (or the next try) become visible together, once.
    /// `Ok(None)`: the attempt is not its build's running one any more; nothing was written.
    ///
    /// A value that the server refuses is left out rather than the result: a NUL byte in a detail must not make a finished
    /// build run again for ever.
    ///
    /// # Errors
    /// Before COMMIT: nothing was recorded, and the claim stands if the server has answered. At COMMIT: unknown; ask
    /// [`Database::attempt_state`] over another connection. The claim [is over](Claim::is_over) then.
    pub async fn record(&mut self, id: AttemptId, ended: &Ended) -> Result<Option<Recorded>> {
        let mut plain = None;
        for tried in 1.. {
            let ended = plain.as_ref().unwrap_or(ended);
            match self.write_result(id, ended).await {
                Ok(None) => {
                    self.release().await?;
                    return Ok(None);
                }
                Ok(Some(recorded)) => {
                    self.commit("commit the result of a build").await?;
                    return Ok(Some(recorded));
                }
                Err(error) => {
                    let Some(state) = error.sqlstate() else { return Err(error) };
                    let again = (error.is_bad_data() && plain.is_none()) || TRY_AT_ONCE.contains(&state);
                    if !again || tried == RECORD_TRIES {
                        self.lock_anew(id.build).await?;
                        return Err(error);
                    }
                    answered("keep a claim", self.session()?.batch_execute("ROLLBACK TO SAVEPOINT result")).await?;
                    if error.is_bad_data() {
                        plain = Some(Ended {
                            exit: None,
                            detail: Some(format!("recorded without details: {}", crate::report::Chain(&error))),
                            usage: None,
                            log_bytes: None,
                            times: None,
                            outcome: ended.outcome,
                        });
                    }
                }
            }
        }
        Ok(None)
    }

    /// After a result that was refused: what the refused statement has done to the queue row is undone, but its traces would keep people and
    /// other workers from seeing who holds the row. So the row is let go and locked again. When somebody else was faster, the claim is over.
    async fn lock_anew(&mut self, build: BuildId) -> Result<()> {
        const STEP: &str = "keep a claim";
        let sql = self.database.schema.sql(queries::CLAIM_AGAIN);
        let session = self.session()?;
        answered(STEP, session.batch_execute("ROLLBACK TO SAVEPOINT row")).await?;
        let row = answered(STEP, session.query_opt(&*sql, &[&build.0])).await?;
        // Also closes the portal, as in `take`.
        answered(STEP, session.batch_execute("SELECT 1")).await?;
        if row.is_none() {
            self.end();
        }
        Ok(())
    }

    async fn commit(&mut self, step: &'static str) -> Result<()> {
        let outcome = answered(step, self.session()?.batch_execute("COMMIT")).await;
        if outcome.is_err() {
            self.end();
        }
        outcome
    }

    /// Records a start that the database refused, as an attempt that broke, and commits. `Ok(None)`: the build does not wait any more;
    /// nothing was written.
    ///
    /// # Errors
    /// As of [`Claim::record`].
    pub async fn refuse(&mut self, build: BuildId, hello: &Hello, why: &str) -> Result<Option<(AttemptId, Recorded)>> {
        const STEP: &str = "record that a build cannot be started";
        let why = crate::model::clean_line(why, 2000);
        let why = self.database.fit_or_ascii(&why).await;
        let values: [&(dyn ToSql + Sync); 4] = [&build.0, &hello.name, &why, &hello.folder];
        let sql = self.database.schema.sql(queries::ATTEMPT_REFUSED);
        let Some(row) = answered(STEP, self.session()?.query_opt(&*sql, &values)).await? else {
            self.release().await?;
            return Ok(None);
        };
        self.commit(STEP).await?;
        Ok(Some((AttemptId { build, attempt: row.get("attempt") }, recorded(&row))))
    }

    /// Whether there is no transaction any more that could hold anything.
    pub fn is_over(&self) -> bool {
        self.session.is_none()
    }

    async fn write_result(&self, id: AttemptId, ended: &Ended) -> Result<Option<Recorded>> {
        const STEP: &str = "record the result of a build";
        let session = self.session()?;
        let (code, signal) = match ended.exit {
            Some(Exit::Code(code)) => (Some(code), None),
            Some(Exit::Signal(signal)) => (None, Some(signal)),
            None => (None, None),
        };
        let detail = ended.detail.as_ref().map(|text| crate::model::clean_line(text, 2000));
        let detail = match &detail {
            // Over another connection: what fails here would end the claim's transaction.
            Some(text) => Some(self.database.fit_or_ascii(text).await),
            None => None,
        };
        let charged = ended.outcome != Outcome::GivenBack;
        let hopeless = ended.outcome == Outcome::Impossible;
        let state = ended.outcome.attempt_state();
        let usage = ended.usage;
        let (user, system, rss) =
            (usage.map(|u| u.user_seconds), usage.map(|u| u.system_seconds), usage.map(|u| u.max_rss_bytes));
        let (started, finished) = ended.times.unzip();
        let values: [&(dyn ToSql + Sync); 14] = [
            &id.build.0,
            &id.attempt,
            &state,
            &code,
            &signal,
            &detail,
            &user,
            &system,
            &rss,
            &ended.log_bytes,
            &charged,
            &started,
            &finished,
            &hopeless,
        ];
        // Preparing it, where that was not done before, waits for locks too: behind the savepoint, like the statement.
        let statement = async {
            let sql = session.prepare_cached(&self.database.schema.sql(queries::RECORD_RESULT)).await?;
            session.query_opt(&sql, &values).await
        };
        let (saved, row) =
            answered(STEP, async { Ok(tokio::join!(session.batch_execute("SAVEPOINT result"), statement)) }).await?;
        saved.map_err(|source| DatabaseError::Statement { step: STEP, source })?;
        let row = row.map_err(|source| DatabaseError::Statement { step: STEP, source })?;
        Ok(row.as_ref().map(recorded))
    }

    /// Puts the session back to the pool after its transaction has ended.
    pub fn finish(mut self) {
        drop(self.session.take());
    }
}

fn recorded(row: &tokio_postgres::Row) -> Recorded {
    let state: String = row.get("state");
    let delay: f64 = row.get("delay_seconds");
    let retry_in = (state == "queued").then(|| Duration::from_secs_f64(delay));
    Recorded { state, retry_in, needed: row.get("needed") }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end();
    }
}

impl Claim {
    fn end(&mut self) {
        if let Some(session) = self.session.take() {
            // Out of the pool: closing the connection is what ends the transaction, whatever state it is in.
            drop(Object::take(session));
        }
    }
}

/// The last time the claim was seen to stand.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    /// A moment at which it certainly stood, or later: just before what confirmed it was sent. On the clock of leases.
    pub confirmed: Duration,
}

impl Pulse {
    /// Of a claim that is about to be confirmed, or was just taken.
    pub fn now() -> Pulse {
        Pulse { confirmed: boottime() }
    }

    /// Time since then.
    pub fn age(&self) -> Duration {
        boottime().saturating_sub(self.confirmed)
    }

    /// How long a ping may take: up to [`ANSWER_TIME`], less when the lease ends before.
    pub fn patience(&self, lease: Duration) -> Duration {
        lease.saturating_sub(self.age()).min(ANSWER_TIME)
    }
}
