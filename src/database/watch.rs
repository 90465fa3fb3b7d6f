//! The watch connection: LISTEN, the lock on the worker's name, and the looks at the queue. A snapshot of it has meaning for
//! the life of the connection only: after a crash of the server transaction ids may be used again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client, Statement};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::queries::Hello;
use super::schema::Schema;
use super::{ConnInfo, Database, DatabaseError, Result, answered, keys, queries, session};
use crate::model::{AttemptId, BuildId, Builder, Candidate, Job, Locks, Unlocked};

/// Folds notifications: any number that arrive before the next look are one look.
#[derive(Default)]
pub struct News {
    bell: Notify,
    control: std::sync::atomic::AtomicBool,
    kicked: std::sync::atomic::AtomicBool,
}

impl News {
    /// Waits for the next wake. A wake that came before the call is not lost.
    ///
    /// # Cancel safety
    /// Safe: a wake is kept for the next call.
    pub async fn wait(&self) {
        self.bell.notified().await;
    }

    /// Rings.
    pub fn ring(&self) {
        self.bell.notify_one();
    }

    /// Rings, and asks for a look at everything: what has come may bear no mark by which it could be seen to be new.
    pub fn kick(&self) {
        self.kicked.store(true, std::sync::atomic::Ordering::Release);
        self.ring();
    }

    /// Whether there was a kick since the last call.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, std::sync::atomic::Ordering::AcqRel)
    }

    /// Whether something came over `build_control` since the last call: builders changed, a cancel, a drain.
    pub fn take_control(&self) -> bool {
        self.control.swap(false, std::sync::atomic::Ordering::AcqRel)
    }
}

/// What a transaction could see: the first transaction id that had not begun, and those under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    xmax: String,
    under_way: Vec<String>,
}

impl Snapshot {
    /// Parses `xmin:xmax:xip,xip,...` (`pg_snapshot`).
    fn parse(text: &str) -> Option<Snapshot> {
        let mut parts = text.split(':').skip(1);
        let xmax = parts.next()?.to_owned();
        let under_way = parts.next()?.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
        Some(Snapshot { xmax, under_way })
    }
}

/// What a look for new rows found.
pub struct NewRows {
    /// For the next look.
    pub snapshot: Snapshot,
    /// How many rows came; as many as asked for means that there may be more.
    pub count: usize,
    /// Those that can be claimed.
    pub candidates: Vec<Candidate>,
    /// When the first of those that wait for `run_after` is due.
    pub due: Option<Duration>,
    /// Some wait for other builds.
    pub needy: bool,
}

/// Statements of the looks, parsed once a connection.
struct Prepared {
    builders: Statement,
    all: Statement,
    new: Statement,
    unlocked: Statement,
    mine: Statement,
    cancels: Statement,
    askers: Statement,
    promote: Statement,
    next_due: Statement,
}

/// The watch connection.
pub struct Watch {
    client: Client,
    prepared: Prepared,
    gone: CancellationToken,
    _driver: AbortOnDropHandle<()>,
}

impl Database {
    /// Connects, takes the worker's name, listens. Notifications ring `news` from then on; so look at everything after this.
    ///
    /// # Errors
    /// No connection, or [`DatabaseError::NameInUse`].
    pub async fn watch(&self, hello: &Hello, news: Arc<News>) -> Result<Watch> {
        Watch::connect(self.info(), &self.schema, hello, news).await
    }
}

impl Watch {
    async fn connect(info: &ConnInfo, schema: &Schema, hello: &Hello, news: Arc<News>) -> Result<Watch> {
        let worker = hello.name.as_str();
        const STEP: &str = "listen for wakes";
        let (client, mut connection) = super::connect(info, &format!("buildreactor {worker} watch")).await?;
        let gone = CancellationToken::new();
        let at_end = gone.clone();
        let driver = crate::tasks::spawn(async move {
            loop {
                match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(note))) => {
                        if note.channel() == "build_control" {
                            news.control.store(true, std::sync::atomic::Ordering::Release);
                        }
                        news.ring();
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        tracing::debug!(error = %crate::report::Chain(&error), "the watch connection ended");
                        break;
                    }
                    None => break,
                }
            }
            at_end.cancel();
            news.ring();
        });
        answered(STEP, session::prepare(&client, schema, &session::work())).await?;
        let prepared = answered(STEP, async {
            Ok(Prepared {
                builders: client.prepare(&schema.sql(queries::LOOK_BUILDERS)).await?,
                all: client.prepare(&schema.sql(queries::LOOK_ALL)).await?,
                new: client.prepare(&schema.sql(queries::LOOK_NEW)).await?,
                unlocked: client.prepare(&schema.sql(queries::LOOK_UNLOCKED)).await?,
                mine: client.prepare(&schema.sql(queries::LOOK_MINE)).await?,
                cancels: client.prepare(&schema.sql(queries::LOOK_CANCELS)).await?,
                askers: client.prepare(&schema.sql(queries::LOOK_ASKERS)).await?,
                promote: client.prepare(&schema.sql(queries::PROMOTE_DUE)).await?,
                next_due: client.prepare(&schema.sql(queries::NEXT_DUE)).await?,
            })
        })
        .await?;
        let watch = Watch { client, prepared, gone, _driver: driver };
        const NAME: &str = "SELECT pg_try_advisory_lock($1, hashtext($2))";
        let name = answered(STEP, watch.client.query_one(NAME, &[&keys::NAME, &worker])).await?;
        if !name.get::<_, bool>(0) {
            let taken =
                answered(STEP, watch.client.query_opt(&*schema.sql(queries::LOCK_HOLDER), &[&"name", &Some(worker)]))
                    .await?;
            if let Some(other) = taken.filter(|row| !row.get::<_, bool>("ours")) {
                let by = format!(" by {}, which is no worker", other.get::<_, String>("holder"));
                return Err(DatabaseError::NameInUse { name: worker.to_owned(), by, stale: true });
            }
            let holder =
                answered(STEP, watch.client.query_opt(&*schema.sql(queries::WORKER_HOLDER), &[&worker])).await?;
            let stale = holder.as_ref().is_some_and(|row| row.get::<_, Option<&str>>("folder") == Some(&hello.folder));
            let by = holder.map_or(String::new(), |row| {
                format!(" by process {} on {}", row.get::<_, i32>("pid"), row.get::<_, String>("host"))
            });
            return Err(DatabaseError::NameInUse { name: worker.to_owned(), by, stale });
        }
        answered(STEP, watch.client.batch_execute("LISTEN build_queue; LISTEN build_control")).await?;
        Ok(watch)
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// The builders that a worker with these labels may run.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn builders(&self, labels: &[String]) -> Result<Vec<Builder>> {
        let rows = answered("look at the builders", self.client.query(&self.prepared.builders, &[&labels])).await?;
        Ok(rows
            .iter()
            .map(|row| Builder {
                name: row.get("name"),
                number: row.get("number"),
                max_running: row.get("max_running"),
                executor: row.get("executor"),
                settings: row.get("settings"),
                locks: Locks {
                    names: row.get("locks"),
                    numbers: row.get("lock_numbers"),
                    capacities: row.get("lock_capacities"),
                },
            })
            .collect())
    }

    /// The first `each` candidates of every builder of `builders`, on top of those that may run already.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn look_all(&self, builders: &[String], each: i32) -> Result<(Snapshot, Vec<Candidate>)> {
        const STEP: &str = "look at the queue";
        let rows = answered(STEP, self.client.query(&self.prepared.all, &[&builders, &each])).await?;
        candidates(STEP, &rows)
    }

    /// What became visible since `since`, at most `limit` rows.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn look_new(&self, since: &Snapshot, builders: &[String], limit: i32) -> Result<NewRows> {
        const STEP: &str = "look for new builds";
        let rows =
            answered(STEP, self.client.query(&self.prepared.new, &[&since.xmax, &since.under_way, &builders, &limit]))
                .await?;
        let (snapshot, _) = candidates(STEP, &rows)?;
        let says = |row: &&tokio_postgres::Row, column: &str| row.get::<_, Option<bool>>(column).unwrap_or(false);
        Ok(NewRows {
            snapshot,
            count: rows.len(),
            candidates: rows.iter().filter(|row| says(row, "ready")).filter_map(candidate).collect(),
            due: rows
                .iter()
                .filter_map(|row| row.get::<_, Option<f64>>("due_seconds"))
                .min_by(f64::total_cmp)
                .map(seconds),
            needy: rows.iter().any(|row| says(&row, "needy")),
        })
    }

    /// Attempts of `worker` whose queue row a person's UPDATE or DELETE waits for.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn askers(&self, worker: &str) -> Result<Vec<AttemptId>> {
        let rows = answered(
            "look who waits for a row",
            self.client.query(&self.prepared.askers, &[&worker, &i64::from(keys::ASK)]),
        )
        .await?;
        Ok(rows
            .iter()
            .map(|row| AttemptId { build: BuildId(row.get("build_id")), attempt: row.get("attempt") })
            .collect())
    }

    /// Attempts of `worker` that somebody wants to end, and why.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn cancels(&self, worker: &str) -> Result<Vec<(AttemptId, String)>> {
        let rows = answered("look for cancelled builds", self.client.query(&self.prepared.cancels, &[&worker])).await?;
        Ok(rows
            .iter()
            .map(|row| {
                (AttemptId { build: BuildId(row.get("build_id")), attempt: row.get("attempt") }, row.get("reason"))
            })
            .collect())
    }

    /// Running builds whose row nobody holds.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn unlocked(&self) -> Result<Vec<Unlocked>> {
        let rows = answered("look for lost builds", self.client.query(&self.prepared.unlocked, &[])).await?;
        Ok(rows
            .iter()
            .map(|row| Unlocked {
                id: AttemptId { build: BuildId(row.get("build_id")), attempt: row.get("attempt") },
                worker: row.get("worker"),
                builder: row.get("builder"),
                slot: row.get("slot"),
                claims: row.get("claims"),
                lease: row.get::<_, Option<f64>>("lease_seconds").map(seconds),
                held: row.get("held"),
            })
            .collect())
    }

    /// What runs on this worker, in its folder. The jobs hold what an adopted one needs, without the folder.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn mine(&self, hello: &Hello) -> Result<Vec<Job>> {
        const STEP: &str = "look for this worker's own builds";
        let rows = answered(STEP, self.client.query(&self.prepared.mine, &[&hello.name, &hello.folder])).await?;
        let job = |row: &tokio_postgres::Row| Job {
            id: AttemptId { build: BuildId(row.get("build_id")), attempt: row.get("attempt") },
            started_us: row.get("started_us"),
            builder: row.get("builder"),
            slot: row.get("slot"),
            worker: hello.name.clone(),
            executor: row.get("executor"),
            script: None,
            env: Vec::new(),
            properties: Vec::new(),
            row: String::new(),
            timeout: queries::limit(row.get("timeout_seconds")),
            silence_timeout: row.get::<_, Option<f64>>("silence_seconds").map(queries::limit),
            keep_workspace: row.get("keep_workspace"),
            dir: std::path::PathBuf::new(),
            settings: row.get("settings"),
            first_us: row.get("first_us"),
            adopt_from: row.get("adopt_from"),
            age: Duration::try_from_secs_f64(row.get("age_seconds")).unwrap_or_default(),
            boot: row.get("boot"),
        };
        Ok(rows.iter().map(job).collect())
    }

    /// Makes due rows ready, at most `limit`; comes back with how many, and when the next is due.
    ///
    /// # Errors
    /// The connection should be given up.
    pub async fn promote(&self, limit: i64) -> Result<(u64, Option<Duration>)> {
        const STEP: &str = "make scheduled builds ready";
        let promoted = answered(STEP, self.client.execute(&self.prepared.promote, &[&limit])).await?;
        let row = answered(STEP, self.client.query_one(&self.prepared.next_due, &[])).await?;
        Ok((promoted, row.get::<_, Option<f64>>("seconds").map(seconds)))
    }
}

fn candidates(step: &'static str, rows: &[tokio_postgres::Row]) -> Result<(Snapshot, Vec<Candidate>)> {
    let snapshot = rows
        .first()
        .and_then(|row| Snapshot::parse(row.get("snapshot")))
        .ok_or_else(|| DatabaseError::Unexpected { step, what: "no snapshot came back".to_owned() })?;
    Ok((snapshot, rows.iter().filter_map(candidate).collect()))
}

fn candidate(row: &tokio_postgres::Row) -> Option<Candidate> {
    Some(Candidate {
        build: BuildId(row.get::<_, Option<i64>>("build_id")?),
        builder: row.get("builder"),
        priority: row.get("priority"),
    })
}

/// Seconds of the server's clock; past ones are now.
fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_keeps_what_was_under_way() {
        let snapshot = Snapshot::parse("10:20:10,14,15").unwrap();
        assert_eq!(snapshot, Snapshot { xmax: "20".into(), under_way: vec!["10".into(), "14".into(), "15".into()] });
        assert_eq!(Snapshot::parse("20:20:").unwrap().under_way, Vec::<String>::new());
        assert_eq!(Snapshot::parse("nonsense"), None);
    }
}
