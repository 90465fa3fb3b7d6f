//! What anybody who may connect can send without end, and what it may cost a daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use buildreactor::embedded::Server;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Daemon, Db, connect, peak_memory, server_with_port, temp_dir, unique, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// Sends statements without end, over sessions of a role that has no right at all.
struct Flood {
    stop: Arc<AtomicBool>,
    /// Statements that were answered.
    sent: Arc<AtomicU64>,
    senders: Vec<tokio::task::JoinHandle<()>>,
}

impl Flood {
    /// `statement` with `%` for a number that each has for itself, so that PostgreSQL does not fold them.
    async fn start(db: &Db, statement: &'static str) -> Flood {
        let role = format!("nobody_{}", unique());
        db.execute(&format!("CREATE ROLE {role} LOGIN")).await;
        let url = db.url();
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut senders = Vec::new();
        for sender in 0..3_u64 {
            let client = connect(&url).await;
            client.batch_execute(&format!("SET SESSION AUTHORIZATION {role}")).await.unwrap();
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            senders.push(tokio::task::spawn(async move {
                let mut number = sender << 40;
                while !stop.load(Ordering::Relaxed) {
                    let statements: Vec<String> =
                        (number..number + 100).map(|n| statement.replace('%', &n.to_string())).collect();
                    number += 100;
                    for answer in join_all(statements.iter().map(|sql| client.batch_execute(sql))).await {
                        answer.unwrap();
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                    // Some 10,000 a second: the machine is to have time left for what they cause.
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            }));
        }
        Flood { stop, sent, senders }
    }

    /// Statements a second that pass a counter while it lasts.
    async fn caused(&self, counter: &Counter) -> f64 {
        let sent = self.sent.load(Ordering::Relaxed);
        wait_for("the flood", || async { self.sent.load(Ordering::Relaxed) > sent + 1000 }).await;
        let (began, before) = (Instant::now(), counter.statements());
        wait_for("some seconds of flood", || async { began.elapsed() >= Duration::from_secs(6) }).await;
        let caused = u32::try_from(counter.statements() - before).unwrap();
        f64::from(caused) / began.elapsed().as_secs_f64()
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for sender in self.senders {
            sender.await.unwrap();
        }
        self.sent.load(Ordering::Relaxed)
    }
}

/// Passes a daemon's connections on to its server, and counts the statements that it sends.
struct Counter {
    port: u16,
    statements: Arc<AtomicU64>,
    acceptor: tokio::task::JoinHandle<()>,
}

impl Counter {
    async fn to(server: &Server) -> Counter {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, there) = (listener.local_addr().unwrap().port(), server.port());
        let statements = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&statements);
        let acceptor = tokio::task::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", there)).await.unwrap();
                drop(tokio::task::spawn(pass(client, server, Arc::clone(&counted))));
            }
        });
        Counter { port, statements, acceptor }
    }

    fn url(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    fn statements(&self) -> u64 {
        self.statements.load(Ordering::Relaxed)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// Query and Execute are statements. The first message has no type.
async fn pass(client: TcpStream, server: TcpStream, statements: Arc<AtomicU64>) -> std::io::Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (mut client_reads, mut client_writes) = client.into_split();
    let (mut server_reads, mut server_writes) = server.into_split();
    let down = tokio::task::spawn(async move { tokio::io::copy(&mut server_reads, &mut client_writes).await });
    let mut typed = false;
    loop {
        let mut message = Vec::new();
        if typed {
            message.push(client_reads.read_u8().await?);
        }
        let length = client_reads.read_u32().await?;
        message.extend_from_slice(&length.to_be_bytes());
        let start = message.len();
        message.resize(start + length as usize - 4, 0);
        client_reads.read_exact(&mut message[start..]).await?;
        if typed && matches!(message[0], b'Q' | b'E') {
            statements.fetch_add(1, Ordering::Relaxed);
        }
        typed = true;
        server_writes.write_all(&message).await?;
        if message[0] == b'X' {
            down.abort();
            return Ok(());
        }
    }
}

/// The shortest of five times from a row to its attempt.
async fn best_start(db: &Db) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..5 {
        let id = db.enqueue("b").await;
        assert_eq!(db.finished(id).await, "passed");
        let sql = format!("SELECT extract(epoch FROM started_at - queued_at)::float8 FROM builds WHERE id = {id}");
        best = best.min(db.one::<f64>(&sql).await);
    }
    best
}

/// A flood of `statement` for some seconds: how many statements a second it causes, how soon a build starts in it, and afterwards.
async fn withstands(statement: &'static str, most: f64) {
    let server = server_with_port(&[]).await;
    let db = Db::on(&server).await;
    let counter = Counter::to(&server).await;
    db.builder("b", "true").await;
    // Always busy here, with more that waits: a wake may mean that it is idle again.
    db.builder("busy", "sleep 600").await;
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3")];
    let daemon = Daemon::start_at(&counter.url(), "w", &slots).await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('busy'), ('busy'), ('busy')").await;
    let before = best_start(&db).await;
    let memory = peak_memory(daemon.pid());

    let flood = Flood::start(&db, statement).await;
    let caused = flood.caused(&counter).await;
    println!("{statement}: {caused:.0} statements a second");
    assert!(caused < most, "{caused} statements a second");
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    let within: f64 =
        db.one(&format!("SELECT extract(epoch FROM started_at - queued_at)::float8 FROM builds WHERE id = {id}")).await;
    println!("started within {within} s");
    assert!(within < 20.0, "{within} s");
    assert!(flood.end().await > 2000, "a flood");
    let grown = peak_memory(daemon.pid()).saturating_sub(memory);
    assert!(grown < 64 << 10, "{grown} kB more");

    let after = best_start(&db).await;
    assert!(after < before + 0.1, "{after} s after the flood, {before} s before it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flood_of_wakes_from_anybody_costs_some_tens_of_looks_a_second() {
    withstands("NOTIFY build_queue, '%'", 60.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flood_over_build_control_costs_a_few_looks_a_second() {
    withstands("NOTIFY build_control, '%'", 90.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flood_of_large_payloads_is_drained_and_not_kept() {
    let both = "SELECT pg_notify('build_queue', repeat('%', 400)), pg_notify('build_control', repeat('%', 400))";
    withstands(both, 120.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_cancel_in_a_flood_reaches_its_build() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT state = 'running' FROM builds").await;
    let flood = Flood::start(&db, "NOTIFY build_control, '%'").await;
    wait_for("the flood", || async { flood.sent.load(Ordering::Relaxed) > 2000 }).await;
    db.execute(&format!("SELECT cancel_build({id}, 'enough')")).await;
    assert_eq!(db.finished(id).await, "cancelled");
    flood.end().await;
}

/// What a wake makes a daemon try again: the builders that other workers are busy with.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flood_does_not_make_busy_builders_be_claimed_at_its_pace() {
    let server = server_with_port(&[]).await;
    let db = Db::on(&server).await;
    let counter = Counter::to(&server).await;
    db.execute("INSERT INTO builders (name, script) SELECT 'busy' || n, 'sleep 600' FROM generate_series(1, 8) n")
        .await;
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "8")];
    let _other = Daemon::start(&db, "other", &slots).await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'busy' || n FROM generate_series(1, 8) n").await;
    db.wait("SELECT count(*) = 8 FROM builds WHERE state = 'running'").await;
    let _daemon = Daemon::start_at(&counter.url(), "w", &slots).await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'busy' || n FROM generate_series(1, 8) n").await;
    let flood = Flood::start(&db, "NOTIFY build_queue, '%'").await;
    let caused = flood.caused(&counter).await;
    println!("{caused:.0} statements a second");
    assert!(caused < 260.0, "{caused} statements a second");
    // One of them is idle in the end, and somebody finds it so.
    db.execute("SELECT cancel_build(3, 'enough')").await;
    db.wait("SELECT state = 'running' FROM builds WHERE id = 11").await;
    flood.end().await;
}

/// What answers as a Buildbot master, without an end: `start` and then `more`, again and again.
async fn endless_master(start: &'static str, more: &'static str) -> (u16, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let counted = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&counted);
    drop(tokio::task::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counter = Arc::clone(&counter);
            drop(tokio::task::spawn(async move { answer_for_ever(stream, start, more, &counter).await }));
        }
    }));
    (port, counted)
}

async fn answer_for_ever(mut stream: TcpStream, start: &str, more: &str, sent: &AtomicU64) -> Option<()> {
    let mut question = [0; 4096];
    let _asked = stream.read(&mut question).await.ok()?;
    stream.write_all(start.as_bytes()).await.ok()?;
    let much = more.repeat((1 << 20) / more.len());
    loop {
        stream.write_all(much.as_bytes()).await.ok()?;
        sent.fetch_add(much.len() as u64, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_master_whose_answers_have_no_end_does_not_fill_the_memory() {
    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n";
    for (start, more) in [
        (OK, "x"),
        (OK, "[[[[[["),
        ("HTTP/1.1 500 No\r\n\r\n", "{\"error\": "),
        ("HTTP/1.1 200 OK\r\nX: ", "x"),
        ("HTTP/1.1 200 OK\r\n", "X: x\r\n"),
        ("", "x"),
    ] {
        let (port, sent) = endless_master(start, more).await;
        let folder = temp_dir();
        let config = folder.path().join("buildreactor.toml");
        std::fs::write(&config, format!("[buildbot.main]\nurl = \"http://127.0.0.1:{port}\"\n")).unwrap();
        let db = Db::new().await;
        db.builder("b", "true").await;
        db.execute("INSERT INTO builders (name, executor) SELECT 'far' || n, 'buildbot' FROM generate_series(1, 8) n")
            .await;
        let env = [("BUILDREACTOR_CONFIG", config.to_str().unwrap()), ("BUILDREACTOR_WORKER_SLOTS", "9")];
        let daemon = Daemon::start(&db, "w", &env).await;
        let memory = peak_memory(daemon.pid());
        db.execute("INSERT INTO build_queue (builder) SELECT 'far' || n FROM generate_series(1, 8) n").await;
        db.wait("SELECT count(*) = 8 FROM queue_status WHERE waiting_because LIKE '%master `main`%'").await;
        if start == OK {
            wait_for("200 MB", || async { sent.load(Ordering::Relaxed) > 200 << 20 }).await;
        }
        let id = db.enqueue("b").await;
        assert_eq!(db.finished(id).await, "passed");
        let grown = peak_memory(daemon.pid()).saturating_sub(memory);
        println!("{:?} {more:?}: {grown} kB more", start.lines().next());
        assert!(grown < 150 << 10, "{start:?} {more:?}: {grown} kB more");
    }
}
