//! The torture test: three daemons, hundreds of builds, and every fault that a build farm meets, at random. Each run of a build leaves
//! lines in one file outside the database; afterwards these and the database must tell the same story (`verdict.rs`).
//!
//! `BUILDREACTOR_TEST_TORTURE="seed=7 seconds=600" cargo test --locked --test main torture:: -- --nocapture`, or
//! `make torture SEED=7 SECONDS=600`. The seed decides what is done and for how long, not what the machine makes of it. A failure
//! leaves the trace, the faults and the daemons' logs in a folder that it names.

mod faults;
mod holds;
mod verdict;
mod worker;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use buildreactor::clock::boottime;
use buildreactor::database::conninfo::ConnInfo;
use buildreactor::embedded::{Options, Server};
use tokio_postgres::{Client, NoTls};

use self::faults::Torturer;
use self::worker::Worker;
use crate::support::dice::Random;
use crate::support::{processes_of, temp_dir};

/// `[lease] lease` of the workers, seconds: at first, and what they are restarted with. The last is longer than what others with the first
/// have as their grace.
const LEASES: [u64; 3] = [3, 4, 6];
const OTHER_LEASES: [u64; 4] = [3, 5, 24, 24];
const LONGEST: Duration = Duration::from_secs(24);
/// Their grace is longer by this.
const BEYOND: Duration = Duration::from_secs(11);
/// A lease, and grace after it, as most of them are.
const LEASE: Duration = Duration::from_secs(4);
const GRACE: Duration = Duration::from_secs(15);
const SLOTS: u32 = 4;
const MAX_ATTEMPTS: i32 = 20;
/// name, `max_running`, timeout, fewest and most beats of a tenth of a second, weight.
const BUILDERS: [(&str, i64, &str, u64, u64, u64); 6] = [
    ("quick", 5, "10 min", 0, 3, 60),
    ("solo", 1, "10 min", 0, 15, 20),
    ("pair", 2, "10 min", 0, 20, 25),
    ("many", 8, "10 min", 0, 20, 40),
    ("slow", 2, "1.5 s", 300, 301, 6),
    ("long", 3, "10 min", 220, 280, 9),
];
/// What a statement of the test may take; a server that is being restarted is simply tried again.
const ANSWER: Duration = Duration::from_secs(4);
/// After the faults: until everything is final.
const DRAIN: Duration = Duration::from_secs(240);

/// Of the wall clock, as the database and the daemons' logs have it, microseconds since 1970.
fn wall_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

fn clock(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us).map_or_else(|_| us.to_string(), |at| at.strftime("%H:%M:%S.%3f").to_string())
}

/// What was done, and when.
#[derive(Default)]
struct Timeline(Vec<(i64, String)>);

impl Timeline {
    fn note(&mut self, what: impl Into<String>) {
        self.0.push((wall_us(), what.into()));
    }
}

/// Seed, seconds of faults, and whether to keep the logs of a run that went well.
fn settings() -> (u64, u64, bool) {
    let text = std::env::var("BUILDREACTOR_TEST_TORTURE").unwrap_or_default();
    let value = |name: &str, default: u64| {
        let given = text.split_whitespace().find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        given.map_or(default, |number| number.parse().unwrap_or_else(|_| panic!("BUILDREACTOR_TEST_TORTURE={text}")))
    };
    (value("seed", 4), value("seconds", 30), value("keep", 0) > 0)
}

/// A builder's script. Lines of the trace are appended by one write each, so their order in the file is their order in time; the clock is
/// the one of leases (/proc/uptime).
fn script(trace: &Path) -> String {
    let trace = trace.display();
    format!(
        "#!/bin/sh\n\
         say() {{ read -r now rest < /proc/uptime; echo \"$1 $BUILD_ID $BUILD_ATTEMPT $now\" >> {trace}; }}\n\
         say start\n\
         case $PROP_KIND in\n\
         deaf) trap '' TERM ;;\n\
         child) (setsid sh -c 'trap \"\" TERM HUP; while :; do read -r now rest < /proc/uptime; echo \"child $BUILD_ID $BUILD_ATTEMPT $now\" >> {trace}; sleep 0.1; done' &) ;;\n\
         esac\n\
         n=0\n\
         beats=$PROP_BEATS; [ $BUILD_ATTEMPT = 1 ] || beats=$PROP_AGAIN\n\
         while [ $n -lt $beats ]; do n=$((n + 1)); echo \"line $n\"; sleep 0.1; say beat; done\n\
         echo last\n\
         say finish\n\
         exit $PROP_CODE\n"
    )
}

/// The test's own way to the database, not through a proxy. Gone now and then.
struct Sql {
    url: String,
    client: Option<Client>,
}

impl Sql {
    /// Rows, or why not. Never longer than [`ANSWER`].
    async fn query(&mut self, sql: &str) -> Result<Vec<tokio_postgres::Row>, String> {
        let work = async {
            let client = match self.client.take() {
                Some(client) if !client.is_closed() => client,
                Some(_) | None => {
                    let (client, connection) =
                        tokio_postgres::connect(&self.url, NoTls).await.map_err(|error| format!("{error:?}"))?;
                    drop(tokio::task::spawn(connection));
                    client.batch_execute("SET statement_timeout = '3s'").await.map_err(|error| format!("{error:?}"))?;
                    client
                }
            };
            match client.query(sql, &[]).await {
                Ok(rows) => {
                    self.client = Some(client);
                    Ok(rows)
                }
                Err(error) => Err(error.as_db_error().map_or(format!("{error:?}"), |refusal| {
                    format!("{}: {}", refusal.code().code(), refusal.message())
                })),
            }
        };
        tokio::time::timeout(ANSWER, work).await.unwrap_or_else(|_| Err("no answer".to_owned()))
    }
}

/// Keeps the queue filled.
struct Feeder {
    random: Random,
    sql: Sql,
    recent: Vec<i64>,
    /// Somebody asked to cancel these.
    cancelled: Vec<i64>,
    /// No more of those that take long.
    nearly_over: bool,
    next: Instant,
}

impl Feeder {
    async fn insert(&mut self, builder: &str, kind: &str, code: i32, beats: u64, needs: &[String]) {
        // What was lost need not take as long again.
        let again = if builder == "long" { 10 } else { beats };
        let (priority, needs) = (self.random.below(3), needs.join(","));
        let sql = format!(
            "INSERT INTO build_queue (builder, priority, needs, properties) VALUES ('{builder}', {priority}, '{{{needs}}}', \
             '{{\"kind\": \"{kind}\", \"code\": {code}, \"beats\": {beats}, \"again\": {again}}}') RETURNING build_id"
        );
        if let Ok(rows) = self.sql.query(&sql).await {
            self.recent.push(rows[0].get(0));
        }
    }

    async fn feed(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + Duration::from_millis(150);
        let Ok(rows) = self.sql.query("SELECT builder, count(*) FROM build_queue GROUP BY builder").await else {
            return;
        };
        let queued =
            |name: &str| rows.iter().find(|row| row.get::<_, &str>(0) == name).map_or(0, |row| row.get::<_, i64>(1));
        for _ in 0..4 {
            let total: u64 = BUILDERS.iter().map(|builder| builder.5).sum();
            let mut drawn = self.random.below(total);
            let (name, max_running, _, fewest, most, _) = *BUILDERS
                .iter()
                .find(|builder| {
                    let here = drawn < builder.5;
                    drawn = drawn.saturating_sub(builder.5);
                    here
                })
                .unwrap();
            let (kind, code) = (self.random.below(20), self.random.below(8));
            let kind = ["deaf", "child", "child", "child"].get(usize::try_from(kind).unwrap()).unwrap_or(&"plain");
            let kind = if name == "long" && *kind == "plain" { "child" } else { kind };
            let code = *[1, 7].get(usize::try_from(code).unwrap()).unwrap_or(&0);
            let beats = fewest + self.random.below(most - fewest);
            let needy = self.random.below(6) == 0;
            let mut needs = Vec::new();
            if needy && !self.recent.is_empty() {
                for _ in 0..=self.random.below(2) {
                    needs.push(self.random.of(&self.recent).to_string());
                }
            }
            needs.sort();
            needs.dedup();
            if queued(name) >= max_running + 4 || (name == "long" && (self.nearly_over || queued(name) > 3)) {
                continue;
            }
            self.insert(name, kind, code, beats, &needs).await;
            let from = self.recent.len().saturating_sub(12);
            self.recent.drain(..from);
        }
        if self.random.below(25) == 0 && !self.recent.is_empty() {
            let id = *self.random.of(&self.recent);
            self.cancelled.push(id);
            let _tried = self.sql.query(&format!("SELECT cancel_build({id}, 'torture')")).await;
        }
    }
}

/// The server and its schema; blocking.
fn start_server(dir: PathBuf) -> Server {
    let settings = [("fsync", "off"), ("shared_buffers", "64MB"), ("max_connections", "200")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    Server::start(Options { dir: Some(dir), tcp_port: Some(0), settings, ..Options::default() }).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_and_nothing_runs_twice_whatever_breaks() {
    let (seed, seconds, keep) = settings();
    println!("BUILDREACTOR_TEST_TORTURE=\"seed={seed} seconds={seconds}\"");
    let began = Instant::now();
    let folder = temp_dir();
    let pg = folder.path().join("pg");
    std::fs::create_dir_all(&pg).unwrap();
    let server = tokio::task::spawn_blocking(|| start_server(pg)).await.unwrap();
    let info = ConnInfo::from_env(Some(&server.url("postgres"))).unwrap();
    buildreactor::database::migrate::migrate(&info).await.unwrap();
    let mut sql = Sql { url: server.url("postgres"), client: None };
    // Somebody's own, for those that hold rows.
    sql.query("ALTER TABLE builds ADD COLUMN note text").await.unwrap();
    let trace = folder.path().join("trace");
    std::fs::write(&trace, "").unwrap();
    for (name, max_running, timeout, ..) in BUILDERS {
        let text = script(&trace).replace('\'', "''");
        let insert = format!(
            "INSERT INTO builders (name, max_running, timeout, max_attempts, script) \
             VALUES ('{name}', {max_running}, '{timeout}', {MAX_ATTEMPTS}, '{text}')"
        );
        sql.query(&insert).await.unwrap();
    }
    let mut workers = Vec::new();
    for n in 0..3 {
        workers.push(Worker::new(n, server.port(), folder.path()).await);
    }
    let mut feeder = Feeder {
        random: Random(!seed),
        sql: Sql { url: server.url("postgres"), client: None },
        recent: Vec::new(),
        cancelled: Vec::new(),
        nearly_over: false,
        next: Instant::now(),
    };
    // For the first fault: see `Fault::KillForLong`.
    for _ in 0..3 {
        feeder.insert("long", "child", 0, 250, &[]).await;
    }
    let mut torturer = Torturer::new(Random(seed), server, workers);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        feeder.nearly_over = end.saturating_duration_since(Instant::now()) < Duration::from_secs(10);
        let step = Instant::now() + Duration::from_millis(20);
        torturer.step().await;
        // A database that is down holds up the feeder alone.
        let _fed = tokio::time::timeout(Duration::from_millis(500), feeder.feed()).await;
        tokio::time::sleep_until(step.into()).await;
    }
    torturer.heal().await;

    let deadline = Instant::now() + DRAIN;
    let mut stuck = None;
    loop {
        torturer.supervise();
        match sql.query("SELECT count(*) FROM build_queue").await {
            Ok(rows) if rows[0].get::<_, i64>(0) == 0 => break,
            Ok(_) | Err(_) => {}
        }
        if Instant::now() > deadline {
            let left = sql
                .query("SELECT concat_ws(' ', to_jsonb(q), to_jsonb(b), to_jsonb(a)) FROM build_queue q JOIN builds b ON b.id = q.build_id LEFT JOIN build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt ORDER BY 1")
                .await
                .unwrap();
            let left: Vec<String> = left.iter().map(|row| row.get(0)).collect();
            stuck = Some(format!("still in the queue after {} s: {left:#?}", DRAIN.as_secs()));
            break;
        }
        // Retries of what was lost often wait for minutes; here they need not.
        let _hurried = sql
            .query("UPDATE build_queue q SET run_after = NULL FROM builds b WHERE b.id = q.build_id AND b.state = 'queued' AND q.run_after > now()")
            .await;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let drained = began.elapsed();
    let mut problems: Vec<String> = stuck.into_iter().collect();
    problems.extend(torturer.leave().await);
    let left = began.elapsed();
    // The last lines of what has just been killed are in the file by now.
    let offset = wall_us() - i64::try_from(boottime().as_micros()).unwrap();
    let summary = verdict::check(&mut sql, &trace, offset, &feeder.cancelled, &torturer, &mut problems).await;
    println!(
        "{} faults, {} rows held by people, {drained:.1?} until the last build, {left:.1?} until all had left, {:.1?} in all; {summary}",
        torturer.faults(),
        torturer.held(),
        began.elapsed()
    );
    if keep {
        println!("kept in `{}`", torturer.keep(&trace, seed, &problems).display());
    }
    if !problems.is_empty() {
        let kept = torturer.keep(&trace, seed, &problems);
        let shown: Vec<&str> = problems.iter().take(5).map(String::as_str).collect();
        panic!(
            "seed {seed}, {seconds} s: {} problems, the first of them here, all of them and the logs in `{}`:\n\n{}",
            problems.len(),
            kept.display(),
            shown.join("\n\n")
        );
    }
}

/// Processes of builds of any worker.
fn builds_alive(workers: &[Worker]) -> Vec<String> {
    let command = |pid: i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " "))
    };
    workers.iter().flat_map(|worker| processes_of(&worker.state)).map(command).collect()
}
