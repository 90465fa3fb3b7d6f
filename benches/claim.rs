//! What a claim costs: on an empty queue, with 1,000,000 rows waiting, and with 100,000 finished builds behind one claim
//! held open. One run, one server; ratios against the empty queue, because absolute times are the machine's.
//!
//! `cargo bench --bench claim` (or `make bench`), with `-- --quick` for a tenth of the waiting rows. Exit code 1 when a median is
//! more than twice the empty queue's.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use buildreactor::database::queries::{Begun, Hello};
use buildreactor::database::{Claim, ConnInfo, Database, News, SessionLimits, Tried, Watch, migrate};
use buildreactor::embedded::{Options, Server};
use buildreactor::model::{AttemptId, BuildId, Builder, Ended, Locks, Outcome};
use buildreactor::reactor::candidates::{Candidates, EACH};

const SAMPLES: usize = 400;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (waiting, finished) = if quick { (100_000, 100_000) } else { (1_000_000, 100_000) };
    let server = tokio::task::spawn_blocking(|| Server::start(Options::default()).unwrap()).await.unwrap();
    println!("PostgreSQL {}.{}; medians of {SAMPLES} claims", server.version().0, server.version().1);

    let mut bench = Bench::new(&server, "empty").await;
    let floor = bench.one_at_a_time("empty queue, one row comes").await;
    let obvious_floor = bench.obvious().await;
    println!("{:<58} {:>8.3} ms", "  (the obvious query there)", obvious_floor.as_secs_f64() * 1e3);

    let mut bench = Bench::new(&server, "deep").await;
    bench.fill(waiting).await;
    let deep = bench.drain(&format!("{waiting} rows wait for 40 builders")).await;

    let mut bench = Bench::new(&server, "dead").await;
    let _held = bench.hold_one().await;
    bench.finish_behind(finished).await;
    let dead = bench.one_at_a_time(&format!("{finished} finished builds behind a held claim, one row comes")).await;
    let obvious = bench.obvious().await;
    println!("{:<58} {:>8.3} ms", "  (the obvious query there)", obvious.as_secs_f64() * 1e3);

    let ratios = [deep, dead].map(|time| time.as_secs_f64() / floor.as_secs_f64());
    println!(
        "ratio to the empty queue: {:.2} deep, {:.2} behind a held claim (at most 2 wanted)",
        ratios[0], ratios[1]
    );
    if ratios.iter().any(|ratio| *ratio > 2.0) {
        std::process::exit(1);
    }
}

struct Bench {
    database: Database,
    watch: Watch,
    client: tokio_postgres::Client,
    builders: Vec<Builder>,
}

impl Bench {
    async fn new(server: &Server, name: &str) -> Bench {
        let admin = connect(&server.url("postgres")).await;
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let info = ConnInfo::from_env(Some(&server.url(name))).unwrap();
        migrate::migrate(&info).await.unwrap();
        let client = connect(&server.url(name)).await;
        client
            .batch_execute("INSERT INTO builders (name, script) SELECT 'b' || n, 'true' FROM generate_series(1, 40) n UNION ALL SELECT 'held', 'true'")
            .await
            .unwrap();
        let limits = SessionLimits { slots: 2, claim_idle: Duration::from_secs(3600) };
        let database = Database::new(info, limits, "bench").unwrap();
        let watch = database.watch(&bench(), Arc::<News>::default()).await.unwrap();
        let mut builders = watch.builders(&[]).await.unwrap();
        builders.retain(|builder| builder.name != "held");
        Bench { database, watch, client, builders }
    }

    fn names(&self) -> Vec<String> {
        self.builders.iter().map(|builder| builder.name.clone()).collect()
    }

    /// As on a quiet farm: a row is inserted, the worker looks for what is new and claims it.
    async fn one_at_a_time(&mut self, what: &str) -> Duration {
        let names = self.names();
        let (mut since, _) = self.watch.look_all(&names, EACH as i32).await.unwrap();
        let (mut times, mut rest) = (Vec::new(), Vec::new());
        for n in 0..SAMPLES + 20 {
            let builder = self.builders[n % self.builders.len()].clone();
            let insert = "INSERT INTO build_queue (builder) VALUES ($1) RETURNING build_id";
            let id = BuildId(self.client.query_one(insert, &[&builder.name]).await.unwrap().get(0));
            let mut claim = self.database.claim().await.unwrap();
            let began = Instant::now();
            let new = self.watch.look_new(&since, &names, 1000).await.unwrap();
            let tried = claim.take(&builder, &[], &[new.candidates[0].build]).await.unwrap();
            times.push(began.elapsed());
            assert_eq!(tried, Tried::Claimed { build: id, slot: 1, lock_units: vec![] });
            since = new.snapshot;
            let began = Instant::now();
            self.record(claim, id).await;
            rest.push(began.elapsed());
        }
        let claimed = report(what, times.split_off(20));
        report("  (its attempt and its result)", rest.split_off(20));
        claimed
    }

    /// As on a busy farm: from one claim to the next, out of what is known, looking again when it has run dry.
    async fn drain(&mut self, what: &str) -> Duration {
        let names = self.names();
        let mut candidates = Candidates::default();
        let (mut times, mut rest) = (Vec::new(), Vec::new());
        for n in 0..SAMPLES + 20 {
            // All of one builder's first, so that its part of the store does run dry.
            let builder = self.builders[n * 2 / SAMPLES].clone();
            let mut claim = self.database.claim().await.unwrap();
            let began = Instant::now();
            if candidates.rank(&builder.name).is_none() {
                let (_, found) = self.watch.look_all(&names, EACH as i32).await.unwrap();
                candidates.replace(found);
            }
            let offer = candidates.first(&builder.name, 8);
            let tried = claim.take(&builder, &[], &offer).await.unwrap();
            times.push(began.elapsed());
            let Tried::Claimed { build, .. } = tried else { panic!("{tried:?}") };
            assert_eq!(build, offer[0]);
            candidates.remove(build);
            let began = Instant::now();
            self.record(claim, build).await;
            rest.push(began.elapsed());
        }
        let claimed = report(what, times.split_off(20));
        report("  (its attempt and its result)", rest.split_off(20));
        claimed
    }

    async fn record(&self, mut claim: Claim, build: BuildId) {
        let job = begun(self.database.begin_attempt(build, &bench(), 1, &[]).await.unwrap());
        let ended =
            Ended { outcome: Outcome::Passed, exit: None, detail: None, usage: None, log_bytes: None, times: None };
        assert!(claim.record(AttemptId { build, attempt: job.id.attempt }, &ended).await.unwrap().is_some());
        claim.finish();
    }

    async fn fill(&self, rows: i32) {
        // In transactions of 100,000, as people load them.
        for _ in 0..rows / 100_000 {
            self.client
                .execute(
                    "INSERT INTO build_queue (builder, priority) SELECT 'b' || 1 + n % 40, n % 5 FROM generate_series(1, 100000) n",
                    &[],
                )
                .await
                .unwrap();
        }
        self.client.batch_execute("ANALYZE build_queue, builds").await.unwrap();
    }

    async fn hold_one(&self) -> Claim {
        let insert = "INSERT INTO build_queue (builder) VALUES ('held') RETURNING build_id";
        let id = BuildId(self.client.query_one(insert, &[]).await.unwrap().get(0));
        let mut claim = self.database.claim().await.unwrap();
        // A slot that nobody else asks for.
        let aside = Builder {
            name: "held".into(),
            number: 999_999,
            max_running: 1,
            locks: Locks::default(),
            executor: "process".into(),
            settings: "{}".into(),
        };
        assert!(matches!(claim.take(&aside, &[], &[id]).await.unwrap(), Tried::Claimed { .. }));
        begun(self.database.begin_attempt(id, &bench(), 1, &[]).await.unwrap());
        claim
    }

    async fn finish_behind(&self, rows: i32) {
        self.client
            .batch_execute(&format!(
                "INSERT INTO build_queue (builder) SELECT 'b' || 1 + n % 40 FROM generate_series(1, {rows}) n;
                 -- As the daemon's sessions have it.
                 SET buildreactor.session = 'daemon'; SET enable_seqscan = off; SET jit = off;
                 -- By way of running, as every build goes.
                 UPDATE builds SET state = 'running', attempt = 1, worker = 'bench', started_at = now() WHERE state = 'queued';
                 UPDATE builds SET state = 'passed', finished_at = now() WHERE state = 'running' AND builder <> 'held';
                 DELETE FROM build_queue WHERE builder <> 'held';
                 RESET buildreactor.session; RESET enable_seqscan; RESET jit",
            ))
            .await
            .unwrap();
        self.client.batch_execute("VACUUM ANALYZE build_queue").await.unwrap();
    }

    /// What one would write first, for comparison: it walks every dead row.
    async fn obvious(&self) -> Duration {
        self.client.batch_execute("INSERT INTO build_queue (builder) VALUES ('b1')").await.unwrap();
        let query = "SELECT build_id FROM build_queue ORDER BY priority DESC, build_id LIMIT 1 FOR UPDATE SKIP LOCKED";
        let statement = self.client.prepare(query).await.unwrap();
        let mut times = Vec::new();
        for _ in 0..20 {
            let began = Instant::now();
            assert_eq!(self.client.query(&statement, &[]).await.unwrap().len(), 1);
            times.push(began.elapsed());
        }
        times.sort();
        times[times.len() / 2]
    }
}

fn begun(outcome: Begun) -> buildreactor::model::Job {
    match outcome {
        Begun::Started(job) => job,
        refused => panic!("{refused:?}"),
    }
}

fn bench() -> Hello {
    let none = Vec::new;
    Hello {
        boot: String::new(),
        run: String::new(),
        name: "bench".into(),
        folder: "bench".into(),
        host: "here".into(),
        pid: 1,
        slots: 2,
        labels: none(),
        builders: none(),
        lease: Duration::from_secs(40),
        grace: Duration::from_secs(60),
    }
}

fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let median = times[times.len() / 2];
    let p99 = times[times.len() * 99 / 100];
    println!("{what:<58} {:>8.3} ms   p99 {:>8.3} ms", median.as_secs_f64() * 1e3, p99.as_secs_f64() * 1e3);
    median
}

async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    drop(tokio::task::spawn(connection));
    client
}
