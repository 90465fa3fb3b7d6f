//! The watch connection: the lock on the worker's name, and the looks at the queue. A snapshot of it has meaning for
//! the life of the connection only: after a crash of the server transaction ids may be used again. LISTEN is on a connection beside it,
//! and both end together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client, Statement};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::queries::Hello;
use super::schema::Schema;
use super::{ConnInfo, Database, DatabaseError, Result, answered, keys, queries, session};
use crate::clock::Fold;
use crate::model::{AttemptId, BuildId, Builder, Candidate, Job, Locks, Unlocked};

/// Looks at the queue that wakes lead to: so many at once after a time of quiet, then one each [`PACE`]. Anybody who may connect may NOTIFY,
/// ten thousand times a second.
const AT_ONCE: u32 = 10;
const PACE: Duration = Duration::from_millis(40);
/// What comes over `build_control` costs more: the builders, cancels, schedules and this worker's own row are looked at.
const CONTROL_AT_ONCE: u32 = 5;
const CONTROL_PACE: Duration = Duration::from_millis(200);

/// Folds notifications: any number that arrive before the next look are one look, and there are only so many looks a second. The first one
/// after a time of quiet is passed on at once, and the last one of a flood leads to a look as well.
pub struct News {
    queue: Bell,
    control: Bell,
    /// Something came over `build_control`.
    controlled: AtomicBool,
    kicked: AtomicBool,
}

/// Rings for whoever waits, as often as its fold allows; what rang meanwhile is kept, once.
struct Bell {
    rung: Notify,
    fold: Mutex<Fold>,
}

impl Bell {
    fn new(pace: Duration, at_once: u32) -> Bell {
        Bell { rung: Notify::new(), fold: Mutex::new(Fold::new(pace, at_once)) }
    }

    /// # Cancel safety
    /// Safe: the ring is taken by the last step.
    async fn wait(&self) {
        let next = self.fold.lock().unwrap_or_else(PoisonError::into_inner).next();
        tokio::time::sleep_until(next).await;
        self.rung.notified().await;
        self.fold.lock().unwrap_or_else(PoisonError::into_inner).pass(1);
    }
}

impl Default for News {
    fn default() -> News {
        News {
            queue: Bell::new(PACE, AT_ONCE),
            control: Bell::new(CONTROL_PACE, CONTROL_AT_ONCE),
            controlled: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
        }
    }
}

impl News {
    /// Waits for the next wake. A wake that came before the call is not lost.
    ///
    /// # Cancel safety
    /// Safe: a wake is kept for the next call.
    pub async fn wait(&self) {
        tokio::select! {
            () = self.control.wait() => self.controlled.store(true, Ordering::Release),
            () = self.queue.wait() => {}
        }
    }

    /// Rings.
    pub fn ring(&self) {
        self.queue.rung.notify_one();
    }

    /// Rings, and asks for a look at everything: what has come may bear no mark by which it could be seen to be new.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether there was a kick since the last call.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::AcqRel)
    }

    /// Whether a wait since the last call ended because of something that came over `build_control`: builders changed, a cancel, a drain.
    pub fn take_control(&self) -> bool {
        self.controlled.swap(false, Ordering::AcqRel)
    }

    /// A notification came. What it says is a hint at most, and is not kept.
    fn heard(&self, channel: &str) {
        match channel {
            "build_control" => self.control.rung.notify_one(),
            _ => self.ring(),
        }
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
    cancels_take: Statement,
    cancels: Statement,
    askers: Statement,
    promote: Statement,
    next_due: Statement,
}

/// The watch connection, and the one that listens for it.
pub struct Watch {
    client: Client,
    prepared: Prepared,
    gone: CancellationToken,
    /// Its connection ends with it.
    listener: Client,
    _drivers: [AbortOnDropHandle<()>; 2],
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

/// Connects. Notifications ring `news` as they come; the end of the connection rings it too, and is told by `gone`.
async fn drive(
    info: &ConnInfo,
    name: &str,
    news: &Arc<News>,
    gone: &CancellationToken,
) -> Result<(Client, AbortOnDropHandle<()>)> {
    let (client, mut connection) = super::connect(info, name).await?;
    let (news, gone) = (Arc::clone(news), gone.clone());
    let driver = crate::tasks::spawn(async move {
        loop {
            match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                Some(Ok(AsyncMessage::Notification(note))) => news.heard(note.channel()),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::debug!(error = %crate::report::Chain(&error), "a watch connection ended");
                    break;
                }
                None => break,
            }
        }
        gone.cancel();
        news.ring();
    });
    Ok((client, driver))
}

impl Watch {
    async fn connect(info: &ConnInfo, schema: &Schema, hello: &Hello, news: Arc<News>) -> Result<Watch> {
        let worker = hello.name.as_str();
        const STEP: &str = "listen for wakes";
        let gone = CancellationToken::new();
        let (client, driver) = drive(info, &format!("buildreactor {worker} watch"), &news, &gone).await?;
        // A connection of its own: an answer to a look would have to wait behind every notification that anybody sends.
        let (listener, listening) = drive(info, &format!("buildreactor {worker} listen"), &news, &gone).await?;
        answered(STEP, session::prepare(&listener, schema, &session::work())).await?;
        answered(STEP, session::prepare(&client, schema, &session::work())).await?;
        let prepared = answered(STEP, async {
            Ok(Prepared {
                builders: client.prepare(&schema.sql(queries::LOOK_BUILDERS)).await?,
                all: client.prepare(&schema.sql(queries::LOOK_ALL)).await?,
                new: client.prepare(&schema.sql(queries::LOOK_NEW)).await?,
                unlocked: client.prepare(&schema.sql(queries::LOOK_UNLOCKED)).await?,
                mine: client.prepare(&schema.sql(queries::LOOK_MINE)).await?,
                cancels_take: client.prepare(&schema.sql(queries::CANCELS_TAKE)).await?,
                cancels: client.prepare(&schema.sql(queries::LOOK_CANCELS)).await?,
                askers: client.prepare(&schema.sql(queries::LOOK_ASKERS)).await?,
                promote: client.prepare(&schema.sql(queries::PROMOTE_DUE)).await?,
                next_due: client.prepare(&schema.sql(queries::NEXT_DUE)).await?,
            })
        })
        .await?;
        let watch = Watch { client, prepared, gone, listener, _drivers: [driver, listening] };
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
        answered(STEP, watch.listener.batch_execute("LISTEN build_queue; LISTEN build_control")).await?;
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
        match answered("take requests to cancel", self.client.execute(&self.prepared.cancels_take, &[])).await {
            // The connection is sound when a right is missing or a trigger refuses. The requests stay for the next look.
            Err(error) if error.is_an_answer() => tracing::debug!("{}", crate::report::Chain(&error)),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
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

    /// Rings `each` so often for `time`, waits as the reactor does, and comes back with how many waits ended.
    async fn flood(news: &News, channel: &str, each: Duration, time: Duration) -> u32 {
        let mut looks = 0;
        let flooding = async {
            let begun = tokio::time::Instant::now();
            while begun.elapsed() < time {
                news.heard(channel);
                tokio::time::sleep(each).await;
            }
        };
        let looking = async {
            loop {
                news.wait().await;
                looks += 1;
            }
        };
        tokio::select! {
            () = flooding => {}
            () = looking => {}
        }
        looks
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_wakes_is_some_tens_of_looks_a_second_and_its_last_is_not_lost() {
        for (channel, most) in [("build_queue", 270), ("build_control", 60), ("anything", 270)] {
            let news = News::default();
            let looks = flood(&news, channel, Duration::from_millis(1), Duration::from_secs(10)).await;
            assert!(looks > most / 2 && looks < most, "{channel}: {looks}");
            news.take_control();
            news.heard(channel);
            tokio::time::timeout(Duration::from_millis(250), news.wait()).await.expect("the last one leads to a look");
            assert_eq!(news.take_control(), channel == "build_control");
            let more = tokio::time::timeout(Duration::from_secs(60), news.wait()).await;
            assert!(more.is_err(), "and to one alone");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_after_quiet_is_passed_on_at_once() {
        let news = News::default();
        flood(&news, "build_queue", Duration::from_millis(1), Duration::from_secs(3)).await;
        flood(&news, "build_control", Duration::from_millis(1), Duration::from_secs(3)).await;
        while tokio::time::timeout(Duration::from_secs(2), news.wait()).await.is_ok() {}
        for _ in 0..5 {
            for channel in ["build_queue", "build_control"] {
                let begun = tokio::time::Instant::now();
                news.heard(channel);
                news.wait().await;
                assert!(begun.elapsed() <= Duration::from_millis(1), "{channel}: {:?}", begun.elapsed());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_dropped_loses_no_wake() {
        let news = News::default();
        flood(&news, "build_control", Duration::from_millis(1), Duration::from_secs(1)).await;
        news.heard("build_control");
        news.heard("build_queue");
        let mut ended = 0;
        for _ in 0..1000 {
            ended += u32::from(tokio::time::timeout(Duration::from_millis(1), news.wait()).await.is_ok());
        }
        assert!((2..=3).contains(&ended) && news.take_control(), "{ended}");
    }
}
