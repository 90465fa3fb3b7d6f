//! The lease chain: builds outlive their daemon and their claim, for as long as the lease lasts, and nobody else runs them meanwhile.

use std::time::{Duration, Instant};

use buildreactor::database::conninfo::ConnInfo;
use buildreactor::embedded::{Options, Server, StopMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::proxy::{Mood, Proxy, When};
use crate::support::{Daemon, Db, Launch, SOON, connect, copy_program, processes_of, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// Small numbers, within the rule that grace is the lease and 10 s for the killing.
const SMALL: [(&str, &str); 4] = [
    HOUR,
    ("BUILDREACTOR_LEASE_PING", "500ms"),
    ("BUILDREACTOR_LEASE_LEASE", "3s"),
    ("BUILDREACTOR_LEASE_GRACE", "13s"),
];

/// Says a number each 20 ms until the file is there.
fn counting(gate: &std::path::Path) -> String {
    format!("n=0; while [ ! -e '{}' ]; do n=$((n+1)); echo $n; sleep 0.02; done; exit 3", gate.display())
}

/// Its log says 1, 2, 3, ... without a gap or a repeat.
async fn log_is_whole(db: &Db, id: i64) {
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    let numbers: Vec<usize> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.len() > 10, "{log}");
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
}

async fn attempts(db: &Db) -> Vec<String> {
    db.all("SELECT concat_ws(' ', build_id, attempt, state, exit_code, claims) FROM build_attempts ORDER BY build_id, attempt")
        .await
}

#[tokio::test]
async fn sigterm_leaves_within_two_seconds_and_the_next_start_takes_the_builds_over() {
    let db = Db::new().await;
    let folder = temp_dir();
    let (gate, early) = (folder.path().join("gate"), folder.path().join("early"));
    db.builder("long", &counting(&gate)).await;
    db.builder("short", &counting(&early)).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let (long, short) = (db.enqueue("long").await, db.enqueue("short").await);
    for id in [long, short] {
        db.wait(&format!("SELECT build_log_text({id}) LIKE '%10%'")).await;
    }
    let keeper = daemon.keeper().expect("a keeper");
    let began = Instant::now();
    assert_eq!(daemon.stop().await, Some(0));
    println!("it has left after {:?}", began.elapsed());
    // Most of two seconds pass by design; the rest is the machine's.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // Its goodbye is left out where it would take long.
    let status = db.one::<String>("SELECT status FROM worker_status").await;
    assert!(["stopped", "gone"].contains(&status.as_str()), "{status}");
    db.wait("SELECT count(*) = 2 FROM running_builds WHERE NOT claim_held").await;
    let alive = processes_of(&daemon.state);
    assert!(alive.len() >= 2, "the builds go on");
    // One ends while there is no daemon.
    std::fs::write(&early, "").unwrap();
    let status = daemon.state.path().join(format!("w/attempts/{short}.1/status.json"));
    wait_for("the short one's end", || async { status.exists() }).await;

    daemon.spawn_again();
    assert_eq!(db.finished(short).await, "failed");
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {long}")).await;
    assert_eq!(daemon.keeper(), Some(keeper), "the same keeper");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(long).await, "failed");
    assert_eq!(attempts(&db).await, [format!("{long} 1 failed 3 2"), format!("{short} 1 failed 3 2")]);
    log_is_whole(&db, long).await;
    log_is_whole(&db, short).await;
    // A stop without builds leaves nothing behind.
    assert_eq!(daemon.stop().await, Some(0));
    wait_for("the keeper's end", || async { daemon.keeper().is_none() }).await;
}

#[tokio::test]
async fn a_second_sigterm_stops_the_builds_and_gives_them_back() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    daemon.signal(Signal::SIGTERM);
    // Signals of a kind that are not read yet are one: until it has heard a second.
    wait_for("it to stop its builds", || async {
        daemon.signal(Signal::SIGTERM);
        daemon.has_said("stopping; what runs is given back")
    })
    .await;
    assert_eq!(daemon.exited().await, Some(0));
    assert_eq!(
        db.one::<String>(
            "SELECT concat_ws('|', b.state, b.detail, a.state) FROM builds b JOIN build_attempts a ON a.build_id = b.id"
        )
        .await,
        "queued|given back: worker `w` stopped|cancelled"
    );
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
}

#[tokio::test]
async fn a_killed_daemons_builds_go_on_and_end_in_the_same_attempt() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &counting(&gate)).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    for times in 1..=3 {
        db.wait(&format!("SELECT build_log_text({id}) LIKE '%{times}0%' AND claim_held FROM running_builds")).await;
        daemon.kill();
        daemon.spawn_again();
        daemon.says("is taken over from this worker's last daemon").await;
        daemon.says("is held again").await;
    }
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db).await, [format!("{id} 1 failed 3 4")]);
    log_is_whole(&db, id).await;
}

#[tokio::test]
async fn what_was_cancelled_while_there_was_no_daemon_is_ended_by_the_next() {
    let db = Db::new().await;
    db.builder("b", "echo begun; sleep 600").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT last_log_line = 'begun' FROM running_builds").await;
    daemon.kill();
    db.execute(&format!("SELECT cancel_build({id}, 'not wanted')")).await;
    daemon.spawn_again();
    assert_eq!(db.finished(id).await, "cancelled");
    assert_eq!(db.one::<String>("SELECT detail FROM builds").await, "cancelled: not wanted");
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
}

#[tokio::test]
async fn a_keeper_killed_while_there_was_no_daemon_makes_its_builds_be_tried_again() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &counting(&gate)).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait(&format!("SELECT build_log_text({id}) LIKE '%10%'")).await;
    daemon.kill();
    daemon.kill_keeper();
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
    std::fs::write(&gate, "").unwrap();
    daemon.spawn_again();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db).await, [format!("{id} 1 error 2"), format!("{id} 2 failed 3 1")]);
}

#[tokio::test]
async fn a_stopped_daemons_tree_dies_and_what_others_ran_meanwhile_is_not_touched() {
    let db = Db::new().await;
    let folder = temp_dir();
    let trace = folder.path().join("trace");
    // Each run says when it begins, and each 50 ms that it lives.
    db.builder(
        "b",
        &format!(
            "echo begin $BUILD_WORKER >> '{0}'; for n in $(seq 40); do echo alive $BUILD_WORKER >> '{0}'; sleep 0.05; done; [ $BUILD_WORKER = second ] || sleep 600",
            trace.display()
        ),
    )
    .await;
    let first = Daemon::start(&db, "first", &SMALL).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    let second = Daemon::start(&db, "second", &SMALL).await;
    first.signal(Signal::SIGSTOP);
    // Its claim is still held, by a server that has not missed its pings yet.
    wait_for("the end of its tree", || async { processes_of(&first.state).is_empty() }).await;
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM builds WHERE worker = 'second'").await,
        0,
        "dead before another starts it"
    );
    assert_eq!(db.finished(id).await, "passed");
    first.signal(Signal::SIGCONT);
    wait_for("the first one's word on it", || async { first.has_said("no longer ours") }).await;
    assert_eq!(
        db.all::<String>(&format!(
            "SELECT concat_ws(' ', attempt, worker, state, detail) FROM build_attempts WHERE build_id = {id} ORDER BY attempt"
        ))
        .await,
        ["1 first lost worker `first` disappeared", "2 second passed"]
    );
    let text = std::fs::read_to_string(&trace).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let begun = lines.iter().position(|line| *line == "begin second").unwrap();
    assert!(lines[begun..].iter().take(40).all(|line| !line.contains("first")), "no overlap");
    drop(second);
}

#[tokio::test]
async fn a_restart_of_the_database_costs_no_build_its_attempt() {
    let mut own = Own::start().await;
    let folder = temp_dir();
    let slots = ("BUILDREACTOR_WORKER_SLOTS", "20");
    let mut daemon = Daemon::start_at(&own.url, "w", &[HOUR, slots, ("BUILDREACTOR_LEASE_PING", "500ms")]).await;
    for mode in [StopMode::Fast, StopMode::Immediate] {
        let gate = folder.path().join(format!("{mode:?}"));
        own.ask(&format!(
            "INSERT INTO builders (name, max_running, script) VALUES ('{mode:?}', 20, $x$ while [ ! -e '{}' ]; do sleep 0.1; done $x$)",
            gate.display()
        ))
        .await;
        own.ask(&format!("INSERT INTO build_queue (builder) SELECT '{mode:?}' FROM generate_series(1, 20)")).await;
        own.wait(
            &format!("SELECT (count(*) = 20)::text FROM running_builds WHERE claim_held AND builder = '{mode:?}'"),
            "true",
        )
        .await;
        own.restart(mode).await;
        own.wait(
            &format!("SELECT (count(*) = 20)::text FROM running_builds WHERE claim_held AND builder = '{mode:?}'"),
            "true",
        )
        .await;
        std::fs::write(&gate, "").unwrap();
        own.wait(&format!("SELECT (count(*) = 20)::text FROM builds WHERE builder = '{mode:?}' AND state = 'passed' AND attempt = 1"), "true").await;
    }
    assert_eq!(own.ask("SELECT max(claims)::text FROM build_attempts").await, "2");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_commit_in_doubt_is_found_out_about_and_recorded_once() {
    let own = Own::start().await;
    let server = own.server.as_ref().unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let url = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", proxy.port());
    let folder = temp_dir();
    let mut daemon = Daemon::start_at(&url, "w", &[HOUR]).await;
    for when in [When::BeforeTheServer, When::BeforeTheAnswer] {
        let trace = folder.path().join(format!("{when:?}"));
        own.ask(&format!(
            "INSERT INTO builders (name, script) VALUES ('{when:?}', $x$echo run >> '{}'; exit 3$x$)",
            trace.display()
        ))
        .await;
        proxy.set(Mood { trap: Some(when), ..Mood::default() });
        own.ask(&format!("INSERT INTO build_queue (builder) VALUES ('{when:?}')")).await;
        match when {
            // Each try is cut off, until the proxy lets it pass.
            When::BeforeTheServer => {
                daemon.says("cannot record the result of build").await;
                assert_eq!(
                    own.ask(&format!("SELECT state::text FROM builds WHERE builder = '{when:?}'")).await,
                    "running"
                );
            }
            When::BeforeTheAnswer => daemon.says("is already recorded, or no longer ours").await,
        }
        proxy.set(Mood::default());
        own.wait(
            &format!("SELECT concat_ws(' ', state, attempt, exit_code) FROM builds WHERE builder = '{when:?}'"),
            "failed 1 3",
        )
        .await;
        assert_eq!(own.ask("SELECT count(*)::text FROM build_queue").await, "0");
        assert_eq!(std::fs::read_to_string(&trace).unwrap(), "run\n", "it ran once");
    }
    assert_eq!(
        own.ask("SELECT string_agg(attempt || ' ' || state, ',') FROM build_attempts").await,
        "1 failed,1 failed"
    );
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_result_that_cannot_be_recorded_is_kept_for_the_next_daemon() {
    let mut own = Own::start().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    let script = format!("while [ ! -e '{}' ]; do sleep 0.05; done; exit 7", gate.display());
    own.ask(&format!("INSERT INTO builders (name, script) VALUES ('b', $x${script}$x$)")).await;
    let mut daemon = Daemon::start_at(&own.url, "w", &[HOUR]).await;
    own.ask("INSERT INTO build_queue (builder) VALUES ('b')").await;
    own.wait("SELECT claim_held::text FROM running_builds", "true").await;
    own.stop().await;
    std::fs::write(&gate, "").unwrap();
    let status = daemon.state.path().join("w/attempts/1.1/status.json");
    wait_for("the script's end", || async { status.exists() }).await;
    // Killed while it waits for the database, and started while that is still away.
    daemon.kill();
    daemon.spawn_again();
    daemon.says("cannot connect").await;
    own.start_again().await;
    own.wait("SELECT concat_ws(' ', state, attempt, exit_code) FROM builds", "failed 1 7").await;
}

#[tokio::test]
async fn a_daemon_of_a_newer_program_goes_on_with_the_keeper_and_replaces_it_when_it_has_nothing_left() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &counting(&gate)).await;
    db.builder("quick", "true").await;
    // The same program, as another file.
    let older = folder.path().join("buildreactor");
    copy_program(&older);
    let mut daemon = Daemon::launch(Launch { program: older.clone(), ..Launch::default() }, &db.url(), "w", &[HOUR]);
    daemon.ready().await;
    let id = db.enqueue("b").await;
    db.wait(&format!("SELECT build_log_text({id}) LIKE '%10%'")).await;
    let keeper = daemon.keeper().expect("a keeper");
    daemon.kill();
    // As an upgrade does it: the file's name is the same, the file is not.
    std::fs::remove_file(&older).unwrap();
    copy_program(&older);
    daemon.spawn_again();
    db.wait("SELECT claim_held FROM running_builds").await;
    let quick = db.enqueue("quick").await;
    assert_eq!(db.finished(quick).await, "passed");
    assert_eq!(daemon.keeper(), Some(keeper), "it has a build left");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    log_is_whole(&db, id).await;
    let quick = db.enqueue("quick").await;
    assert_eq!(db.finished(quick).await, "passed");
    assert!(daemon.has_said("replacing it"));
    assert!(daemon.keeper().is_some_and(|now| now != keeper));
    assert_eq!(attempts(&db).await.len(), 3, "nothing was tried twice");
}

#[tokio::test]
async fn one_daemon_a_folder_whatever_its_database() {
    let (one, other) = (Db::new().await, Db::new().await);
    let first = Daemon::start(&one, "w", &[HOUR]).await;
    let dir = first.state.path().display().to_string();
    let mut second = Daemon::spawn(&other.url(), "w", &[HOUR, ("BUILDREACTOR_WORKER_STATE_DIR", &dir)]);
    second.says(&format!("another daemon uses it, process {}", first.pid())).await;
    assert_eq!(second.exited().await, Some(75), "a supervisor tries again");
}

#[tokio::test]
async fn a_folder_of_another_database_is_not_taken_for_ones_own() {
    let (one, other) = (Db::new().await, Db::new().await);
    for db in [&one, &other] {
        db.builder("b", "exit 5").await;
    }
    let mut first = Daemon::start(&one, "w", &[HOUR]).await;
    let id = one.enqueue("b").await;
    assert_eq!(one.finished(id).await, "failed");
    assert_eq!(first.stop().await, Some(0));
    // The other database says that this worker runs the attempt of the same number of its own, in the same folder.
    let folder = std::fs::read_to_string(first.state.path().join("w/folder.id")).unwrap();
    other.enqueue("b").await;
    other.execute("UPDATE builds SET state = 'running', attempt = 1, worker = 'w', started_at = now()").await;
    other.execute(&format!("INSERT INTO build_attempts (build_id, attempt, worker, slot, builder, folder, started_at) VALUES (1, 1, 'w', 1, 'b', '{folder}', now())")).await;
    let dir = first.state.path().display().to_string();
    let _second = Daemon::start(&other, "w", &[HOUR, ("BUILDREACTOR_WORKER_STATE_DIR", &dir)]).await;
    assert_eq!(other.finished(1).await, "failed");
    assert_eq!(attempts(&other).await, ["1 1 cancelled 2", "1 2 failed 5 1"]);
}

#[tokio::test]
async fn an_attempt_costs_less_than_two_mebibytes() {
    const BUILDS: usize = 20;
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    db.execute("UPDATE builders SET max_running = 100").await;
    let daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "20")]).await;
    db.execute(&format!("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, {BUILDS})")).await;
    // A shell and a sleep of each.
    wait_for("all to run", || async { processes_of(&daemon.state).len() == 2 * BUILDS }).await;
    let mut total = 0;
    let ours: Vec<i32> = crate::support::below(daemon.keeper().unwrap())
        .into_iter()
        .filter(|pid| crate::support::name_of(*pid).starts_with("br-"))
        .collect();
    for pid in &ours {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
        total += line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap();
    }
    println!("{} processes of keeper and guardians: {} kB an attempt", ours.len(), total / BUILDS);
    assert!(ours.len() > BUILDS && total / BUILDS < 2048, "{total} kB for {BUILDS}");
}

#[tokio::test]
async fn an_attempt_whose_worker_died_before_it_started_anything_is_tried_again_at_once() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    daemon.kill();
    let folder = std::fs::read_to_string(daemon.state.path().join("w/folder.id")).unwrap();
    let id = db.enqueue("b").await;
    // What it leaves when it is killed between the start of the attempt and the start of the script.
    db.execute("UPDATE builds SET state = 'running', attempt = 1, worker = 'w', started_at = now()").await;
    db.execute(&format!("INSERT INTO build_attempts (build_id, attempt, worker, slot, builder, folder, started_at) VALUES ({id}, 1, 'w', 1, 'b', '{folder}', now())")).await;
    daemon.spawn_again();
    let started = Instant::now();
    assert_eq!(db.finished(id).await, "passed");
    assert!(started.elapsed() < Duration::from_secs(30), "not only after the 60 s of grace");
    assert_eq!(
        attempts(&db).await,
        [format!("{id} 1 cancelled 2"), format!("{id} 2 passed 0 1")],
        "and nothing is charged"
    );
}

/// A server of one's own, to restart.
struct Own {
    server: Option<Server>,
    dir: std::path::PathBuf,
    port: u16,
    url: String,
    _folder: crate::support::TempDir,
}

impl Own {
    async fn start() -> Own {
        let folder = temp_dir();
        let dir = folder.path().join("pg");
        std::fs::create_dir_all(&dir).unwrap();
        let mut own = Own { server: None, port: 0, url: String::new(), dir, _folder: folder };
        own.start_again().await;
        own.url = own.server.as_ref().unwrap().url("postgres");
        buildreactor::database::migrate::migrate(&ConnInfo::from_env(Some(&own.url)).unwrap()).await.unwrap();
        own
    }

    async fn start_again(&mut self) {
        let options = Options { dir: Some(self.dir.clone()), tcp_port: Some(self.port), ..Options::default() };
        let server = tokio::task::spawn_blocking(|| Server::start(options).unwrap()).await.unwrap();
        // The next one is to be found where this one was.
        self.port = server.port();
        self.server = Some(server);
    }

    async fn stop(&mut self) {
        let mut server = self.server.take().unwrap();
        tokio::task::spawn_blocking(move || server.stop(StopMode::Fast).unwrap()).await.unwrap();
    }

    async fn restart(&mut self, mode: StopMode) {
        let mut server = self.server.take().unwrap();
        let restarted = tokio::task::spawn_blocking(move || {
            server.restart(mode).unwrap();
            server
        });
        self.server = Some(restarted.await.unwrap());
    }

    /// The only value of the last row, as text; empty without one.
    async fn ask(&self, sql: &str) -> String {
        let client = connect(&self.url).await;
        let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let row = messages.iter().rev().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        row.unwrap_or_default()
    }

    async fn wait(&self, sql: &str, answer: &str) {
        let deadline = Instant::now() + SOON;
        let mut last = String::new();
        while last != answer {
            assert!(Instant::now() < deadline, "waited for {answer}, not {last}: {sql}");
            last = self.ask(sql).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test]
async fn a_keeper_that_is_killed_with_its_guardians_leaves_nothing_where_there_are_namespaces() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &SMALL).await;
    if db.one::<String>("SELECT detail FROM workers").await != "process trees: PID namespace" {
        // Without them this is the documented limit of the subreaper.
        return;
    }
    db.builder("b", "setsid nohup sleep 600 & sleep 600").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let id = db.enqueue("b").await;
    wait_for("its processes", || async { processes_of(&daemon.state).len() >= 3 }).await;
    let keeper = daemon.keeper().unwrap();
    let ours: Vec<i32> =
        crate::support::below(keeper).into_iter().filter(|pid| crate::support::name_of(*pid) != "br-init").collect();
    // Stopped first, so that none can do anything about the end of another.
    let ours: Vec<i32> = ours.into_iter().filter(|pid| crate::support::name_of(*pid).starts_with("br-")).collect();
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in &ours {
            kill(Pid::from_raw(*pid), signal).unwrap();
        }
    }
    assert_eq!(db.finished(id).await, "error");
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new(), "gone when the result is visible");
}

/// After a failover to a server that had missed a start, another attempt may have its number.
#[tokio::test]
async fn a_claim_is_taken_again_for_the_attempt_that_was_started_and_no_other_of_its_number() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await;
    db.execute("UPDATE builds SET state = 'running', attempt = 1, worker = 'w', started_at = now()").await;
    db.execute(&format!("INSERT INTO build_attempts (build_id, attempt, worker, slot, builder, started_at) VALUES ({id}, 1, 'w', 1, 'b', 'epoch')")).await;
    let session = db.session().await;
    for (started_us, ours) in [(1_i64, false), (0, true)] {
        let count = include_str!("../sql/queries/claim_count.sql").replace("farm.", "");
        assert_eq!(session.query_opt(&count, &[&id, &1_i32, &started_us, &40.0, &40.0]).await.unwrap().is_some(), ours);
        let state = include_str!("../sql/queries/attempt_state.sql").replace("farm.", "");
        assert_eq!(session.query_opt(&state, &[&id, &1_i32, &started_us]).await.unwrap().is_some(), ours);
    }
    assert_eq!(db.one::<i32>("SELECT claims FROM build_attempts").await, 2, "counted once");
}
