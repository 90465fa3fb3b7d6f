//! `build_mail`: what is to be sent, and what became of it. On work connections.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use deadpool_postgres::Transaction;

use super::{Database, DatabaseError, Result, answered, keys, queries};
use crate::model::BuildId;

/// The most builds of one digest; more are in another.
const DIGEST: i64 = 1000;

/// How often, and how long after each other, the lock under which an address's mails are counted is tried. Without it two daemons that
/// count at the same time may send one mail more than `per_hour`.
const TRIES: u32 = 40;
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// A look begins where the last one ended. From the very beginning only so often: a mail may come late, of a transaction that was open
/// for longer than `mail_wait.sql` allows for, or of a daemon that was about to claim it and has died.
const WHOLE: Duration = Duration::from_secs(30);

/// Where the outbox begins, as far as is known. While some transaction stays open, such as the claim of a long build, mails that were
/// sent meanwhile leave entries in the indexes that no VACUUM may remove; looks that began before them would read them all each time.
#[derive(Debug, Default)]
pub struct Reach {
    /// Nothing is due that was due before this.
    since: Option<Timestamp>,
    /// The first open mail of an address.
    open: HashMap<String, i64>,
    /// Addresses whose lock somebody keeps: it is not waited for once more.
    contested: HashSet<String>,
    /// When it was last looked from the beginning.
    whole: Option<Instant>,
}

/// How many mails may be sent within an hour.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To an address. What `notify` causes counts for the whole mailbox, whatever the +tag.
    pub address: u32,
    /// That `notify` of one submitter's builds causes.
    pub submitter: u32,
    /// That `notify` causes in all.
    pub notified: u32,
}

/// A mail that this daemon is to send, to one address.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// In the order of their numbers; one, unless it is a digest.
    pub rows: Vec<Outgoing>,
    /// Several builds in one mail.
    pub digest: bool,
}

impl Claimed {
    /// Numbers of the rows.
    pub fn ids(&self) -> Vec<i64> {
        self.rows.iter().map(|row| row.id).collect()
    }
}

/// A row of the outbox.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// `build_mail.id`.
    pub id: i64,
    /// The build.
    pub build: BuildId,
    /// The attempt that it ended with.
    pub attempt: i32,
    /// Its builder.
    pub builder: String,
    /// Its branch; empty: none.
    pub branch: String,
    /// passed, problem, still_failing, fixed or error.
    pub event: String,
    /// passed, failed, timed_out or error.
    pub verdict: String,
    /// The build whose verdict came before.
    pub previous_build: Option<BuildId>,
    /// That verdict.
    pub previous_state: Option<String>,
    /// The last build before that passed.
    pub good_build: Option<BuildId>,
    /// To whom.
    pub address: String,
    /// Message-ID up to the @.
    pub message_id: String,
    /// Of the mail that began its thread; its own, where it does.
    pub thread: String,
    /// When the build ended.
    pub created_at: Timestamp,
    /// How often it was tried, this time included.
    pub tries: i32,
}

/// What a mail says about its build, besides its row.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Who ran it.
    pub worker: Option<String>,
    /// When the attempt started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// Where it exited.
    pub exit_code: Option<i32>,
    /// Where a signal ended it.
    pub term_signal: Option<i32>,
    /// Where another system shows it.
    pub external_url: Option<String>,
    /// One line for people.
    pub detail: Option<String>,
    /// How long the attempt took.
    pub ran: Option<Duration>,
    /// How long it waited for it.
    pub waited: Option<Duration>,
    /// Median of the last 30 builds of the builder that passed.
    pub usual: Option<Duration>,
    /// Why it was asked for; at most 10,000 characters.
    pub reason: Option<String>,
    /// Who asked for it.
    pub submitted_by: String,
    /// Its properties by name; none when they are more than 20 kB.
    pub properties: BTreeMap<String, serde_json::Value>,
    /// Columns of `builds` that are not ours.
    pub own: BTreeMap<String, serde_json::Value>,
    /// When the last build that passed ended.
    pub good_at: Option<Timestamp>,
    /// The database, for psql.
    pub dbname: String,
    /// The end of the log, at most 64 KiB, as it was written.
    pub log: String,
}

impl Database {
    /// Takes the mail that is due first for `sender`, from `reach` on; others may take it over after `lease`. What is due to an address
    /// that has had its mails of this hour is put off; when one is left, it is a digest of all. Likewise what `notify` causes above the other
    /// limits. `None`: nothing is due.
    ///
    /// # Errors
    /// Nothing was taken, unless the answer to the COMMIT is what was lost; then it is due again after `lease`, or [`Database::mail_back`].
    pub async fn claim_mail(
        &self,
        reach: &mut Reach,
        sender: &str,
        limits: Limits,
        lease: Duration,
    ) -> Result<Option<Claimed>> {
        const STEP: &str = "claim a mail";
        let mut session = self.work().await?;
        if reach.whole.is_none_or(|when| when.elapsed() > WHOLE) {
            *reach = Reach { whole: Some(Instant::now()), ..Reach::default() };
        }
        let per_hour = i64::from(limits.address);
        loop {
            let transaction = answered(STEP, session.transaction()).await?;
            let Some(row) =
                answered(STEP, transaction.query_opt(&*self.schema.sql(queries::MAIL_DUE), &[&reach.since])).await?
            else {
                return Ok(None);
            };
            let (id, address): (i64, String) = (row.get("id"), row.get("address"));
            reach.since = Some(row.get("next_at"));
            // Two daemons that count at once would both find room.
            const LOCK: &str = "SELECT pg_try_advisory_xact_lock($1, hashtext(lower($2)))";
            for tried in 1.. {
                if answered(STEP, transaction.query_one(LOCK, &[&keys::ADDRESS, &address])).await?.get(0) {
                    break;
                }
                if tried == TRIES || reach.contested.contains(&address) {
                    reach.contested.insert(address.clone());
                    break;
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
            // Its own row is open, whatever is known.
            let first = reach.open.get(&address).map_or(0, |first| id.min(*first));
            let count = answered(
                STEP,
                transaction.query_one(&*self.schema.sql(queries::MAIL_COUNT), &[&address, &per_hour, &first]),
            )
            .await?;
            let first: i64 = count.get("first");
            reach.open.insert(address.clone(), first);
            let room = per_hour - count.get::<_, i64>("used");
            if room <= 0 {
                let free_at: Timestamp = count.get("free_at");
                answered(
                    STEP,
                    transaction.execute(&*self.schema.sql(queries::MAIL_HOLD), &[&address, &free_at, &first]),
                )
                .await?;
                answered(STEP, transaction.commit()).await?;
                continue;
            }
            let since = row.get::<_, Timestamp>("next_at");
            if self.hold_back(&transaction, id, limits, since).await? {
                answered(STEP, transaction.commit()).await?;
                continue;
            }
            let gather = row.get::<_, Option<i64>>("digest").is_none() && room == 1 && count.get::<_, i64>("due") > 1;
            let lease = lease.as_secs_f64();
            let values: [&(dyn ToSql + Sync); 6] = [&id, &gather, &DIGEST, &sender, &lease, &first];
            let taken = answered(STEP, transaction.query(&*self.schema.sql(queries::MAIL_TAKE), &values)).await?;
            answered(STEP, transaction.commit()).await?;
            let digest = taken.iter().any(|row| row.get("digest"));
            let mut rows: Vec<Outgoing> = taken.iter().map(outgoing).collect();
            rows.sort_by_key(|row| row.id);
            return Ok(Some(Claimed { rows, digest }));
        }
    }

    /// Puts off what `notify` has caused above its limits, when `mail` is of that; `false`: it may be sent.
    async fn hold_back(
        &self,
        transaction: &Transaction<'_>,
        mail: i64,
        limits: Limits,
        since: Timestamp,
    ) -> Result<bool> {
        const STEP: &str = "look at the limits of mails";
        let [address, submitter, all] = [limits.address, limits.submitter, limits.notified].map(i64::from);
        let values: [&(dyn ToSql + Sync); 4] = [&mail, &address, &submitter, &all];
        let Some(row) = answered(STEP, transaction.query_opt(&*self.schema.sql(queries::MAIL_ROOM), &values)).await?
        else {
            return Ok(false);
        };
        let (scope, who, mailbox): (&str, &str, &str) = (row.get("scope"), row.get("submitter"), row.get("mailbox"));
        let free_at: Timestamp = row.get("free_at");
        let why = match scope {
            "all" => format!("held back: notify has caused {all} mails within an hour ([mail] notify_per_hour)"),
            "submitter" => {
                format!(
                    "held back: notify of {who}'s builds has caused {submitter} mails within an hour ([mail] per_submitter)"
                )
            }
            _ => format!(
                "held back: notify has caused {address} mails to {mailbox}, with and without +tags, within an hour ([mail] per_hour)"
            ),
        };
        let values: [&(dyn ToSql + Sync); 6] = [&scope, &who, &mailbox, &free_at, &why, &since];
        let held = answered(STEP, transaction.execute(&*self.schema.sql(queries::MAIL_HOLD_BACK), &values)).await?;
        tracing::info!(mails = held, "{held} mails are {why}");
        Ok(true)
    }

    /// What `mail` says about its build. `None`: the build is gone, and its mails with it.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn mail_facts(&self, mail: i64) -> Result<Option<Facts>> {
        const STEP: &str = "look up what a mail is to say";
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::MAIL_FACTS))).await?;
        let Some(row) = answered(STEP, session.query_opt(&sql, &[&mail])).await? else { return Ok(None) };
        // A clock that was set back makes it negative.
        let seconds = |name: &str| -> Option<Duration> {
            row.get::<_, Option<f64>>(name).map(|s| Duration::try_from_secs_f64(s).unwrap_or_default())
        };
        let object = |name: &'static str| {
            serde_json::from_str(row.get(name))
                .map_err(|error| DatabaseError::Unexpected { step: STEP, what: format!("{name}: {error}") })
        };
        Ok(Some(Facts {
            worker: row.get("worker"),
            started_at: row.get("started_at"),
            finished_at: row.get("finished_at"),
            exit_code: row.get("exit_code"),
            term_signal: row.get("term_signal"),
            external_url: row.get("external_url"),
            detail: row.get("detail"),
            ran: seconds("ran_seconds"),
            waited: seconds("waited_seconds"),
            usual: seconds("usual_seconds"),
            reason: row.get::<_, Option<Vec<u8>>>("reason").map(|text| String::from_utf8_lossy(&text).into_owned()),
            submitted_by: row.get("submitted_by"),
            properties: object("properties")?,
            own: object("own")?,
            good_at: row.get("good_at"),
            dbname: row.get("dbname"),
            log: String::from_utf8_lossy(row.get::<_, Option<&[u8]>>("log").unwrap_or_default()).into_owned(),
        }))
    }

    /// Stores that the mail server has taken these.
    ///
    /// # Errors
    /// Perhaps not stored: to be said again, or they are sent again.
    pub async fn mail_sent(&self, mails: &[i64]) -> Result<()> {
        const STEP: &str = "record that a mail was sent";
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(queries::MAIL_SENT), &[&mails])).await?;
        Ok(())
    }

    /// Has these tried again after `wait`, saying why. `true`: their time was over, and they are parked instead.
    ///
    /// # Errors
    /// Perhaps not stored; then they are due again when `sender`'s lease ends.
    pub async fn mail_again(&self, mails: &[i64], sender: &str, why: &str, wait: Duration) -> Result<bool> {
        const STEP: &str = "put off a mail";
        let why = self.fit(why).await?;
        let session = self.work().await?;
        let seconds = wait.as_secs_f64();
        let values: [&(dyn ToSql + Sync); 4] = [&mails, &sender, &why, &seconds];
        Ok(answered(STEP, session.query(&*self.schema.sql(queries::MAIL_AGAIN), &values))
            .await?
            .iter()
            .any(|row| row.get::<_, &str>("state") == "parked"))
    }

    /// Stores that these are not sent: `parked` or `discarded`.
    ///
    /// # Errors
    /// As [`Database::mail_again`].
    pub async fn mail_end(&self, mails: &[i64], sender: &str, state: &str, why: &str) -> Result<()> {
        const STEP: &str = "park a mail";
        let why = self.fit(why).await?;
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(queries::MAIL_END), &[&mails, &sender, &state, &why])).await?;
        Ok(())
    }

    /// Has what `sender` has at hand tried again at once, when it sends nothing.
    ///
    /// # Errors
    /// Perhaps not stored.
    pub async fn mail_back(&self, sender: &str) -> Result<u64> {
        const STEP: &str = "put mails back";
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(queries::MAIL_BACK), &[&sender])).await
    }

    /// Parks what has waited for too long while nothing could be sent; comes back with how many.
    ///
    /// # Errors
    /// Perhaps none was.
    pub async fn mail_give_up(&self, why: &str) -> Result<u64> {
        const STEP: &str = "park old mails";
        let why = self.fit(why).await?;
        let session = self.work().await?;
        answered(STEP, session.execute(&*self.schema.sql(queries::MAIL_GIVE_UP), &[&why])).await
    }

    /// How long until the next mail is due, when none is due now. `None`: longer than `ahead`.
    ///
    /// # Errors
    /// Unknown then.
    pub async fn mail_wait(&self, reach: &mut Reach, ahead: Duration) -> Result<Option<Duration>> {
        const STEP: &str = "look when the next mail is due";
        let session = self.work().await?;
        let sql = answered(STEP, session.prepare_cached(&self.schema.sql(queries::MAIL_WAIT))).await?;
        let row = answered(STEP, session.query_one(&sql, &[&reach.since, &ahead.as_secs_f64()])).await?;
        reach.since = Some(row.get("since"));
        let seconds: Option<f64> = row.get("seconds");
        Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()))
    }
}

fn outgoing(row: &Row) -> Outgoing {
    Outgoing {
        id: row.get("id"),
        build: BuildId(row.get("build_id")),
        attempt: row.get("attempt"),
        builder: row.get("builder"),
        branch: row.get("branch"),
        event: row.get("event"),
        verdict: row.get("verdict"),
        previous_build: row.get::<_, Option<i64>>("previous_build_id").map(BuildId),
        previous_state: row.get("previous_state"),
        good_build: row.get::<_, Option<i64>>("good_build_id").map(BuildId),
        address: row.get("address"),
        message_id: row.get("message_id"),
        thread: row.get("thread"),
        created_at: row.get("created_at"),
        tries: row.get("tries"),
    }
}
