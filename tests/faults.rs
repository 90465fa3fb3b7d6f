//! Staged faults: connections cut, servers restarted, daemons stopped. What the lease chain adds has its own tests later.

use buildreactor::database::conninfo::ConnInfo;
use buildreactor::embedded::{Options, Server, StopMode};

use crate::support::{Daemon, Db, TempDir, buildreactor, connect, temp_dir, text, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A build that passes once `gate` is there, and its worker, which pings often.
struct Running {
    db: Db,
    folder: TempDir,
    gate: std::path::PathBuf,
    daemon: Daemon,
    id: i64,
}

impl Running {
    async fn start() -> Running {
        let db = Db::new().await;
        let folder = temp_dir();
        let gate = folder.path().join("gate");
        db.builder("b", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
        let daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_LEASE_PING", "300ms")]).await;
        let id = db.enqueue("b").await;
        db.wait("SELECT claim_held FROM running_builds").await;
        Running { db, folder, gate, daemon, id }
    }
}

#[tokio::test]
async fn a_terminated_claim_is_taken_again_and_the_build_ends_in_the_same_attempt() {
    let Running { db, gate, mut daemon, id, folder: _folder } = Running::start().await;
    db.execute("SELECT pg_terminate_backend((SELECT claim_pid FROM running_builds))").await;
    daemon.says("is held again").await;
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds").await);
    assert_eq!(db.one::<i32>("SELECT slots_used FROM builder_status").await, 1, "with its slot");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 1);
}

/// For an instant others have the lock of a slot that is free because its claim is lost, and are refused then.
#[tokio::test]
async fn a_claim_that_is_taken_again_gets_its_slot_as_soon_as_it_can_be_had() {
    let Running { db, gate, mut daemon, id, folder: _folder } = Running::start().await;
    let other = db.session().await;
    let number: i32 = db.one("SELECT number FROM builders").await;
    let first_in_line = tokio::spawn(async move {
        other
            .batch_execute(&format!("BEGIN; SELECT pg_advisory_xact_lock(733512904 + {number}, 417066218 + 1)"))
            .await
            .unwrap();
        other
    });
    db.wait("SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").await;
    db.execute("SELECT pg_terminate_backend((SELECT claim_pid FROM running_builds))").await;
    daemon.says("is held again").await;
    let its_lock = "SELECT count(*) = 1 FROM pg_locks JOIN running_builds ON pid = claim_pid WHERE locktype = 'advisory' AND granted";
    assert!(!db.one::<bool>(its_lock).await);
    first_in_line.await.unwrap().batch_execute("ROLLBACK").await.unwrap();
    db.wait(its_lock).await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_result_survives_a_claim_that_was_cut_just_before_it() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &format!("while [ ! -e {} ]; do sleep 0.05; done; exit 3", gate.display())).await;
    // No ping before the end: only recording finds out.
    let env = [
        HOUR,
        ("BUILDREACTOR_LEASE_PING", "100s"),
        ("BUILDREACTOR_LEASE_LEASE", "400s"),
        ("BUILDREACTOR_LEASE_GRACE", "500s"),
    ];
    let _daemon = Daemon::start(&db, "w", &env).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    db.execute("SELECT pg_terminate_backend((SELECT claim_pid FROM running_builds))").await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(
        db.one::<String>("SELECT string_agg(concat_ws(' ', attempt, state, exit_code), ',') FROM build_attempts").await,
        "1 failed 3"
    );
}

#[tokio::test]
async fn a_result_waits_for_a_table_that_is_locked_and_keeps_its_claim() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &format!("until test -e '{}'; do sleep 0.05; done", gate.display())).await;
    let daemon = Daemon::start(&db, "w", &[]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT state = 'running' FROM builds").await;
    // As a migration does; the first result of a daemon already waits for it where its statement is prepared.
    let migration = db.session().await;
    migration.batch_execute("BEGIN; LOCK TABLE builds").await.unwrap();
    std::fs::write(&gate, "").unwrap();
    let waiting = "SELECT query_start::text FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE '% claim' AND wait_event_type = 'Lock'";
    wait_for("the result to wait", || async { !db.all::<String>(waiting).await.is_empty() }).await;
    let first = db.all::<String>(waiting).await;
    wait_for("it to be tried again", || async { db.all::<String>(waiting).await.iter().any(|at| !first.contains(at)) })
        .await;
    migration.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert!(!daemon.has_said("cannot record the result"));
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', attempt, claims) FROM build_attempts").await, "1 1");
}

#[tokio::test]
async fn a_database_that_is_down_at_the_start_and_restarted_later_is_waited_for() {
    let folder = temp_dir();
    let dir = folder.path().join("pg");
    std::fs::create_dir_all(&dir).unwrap();
    let start = |dir: std::path::PathBuf| {
        tokio::task::spawn_blocking(move || Server::start(Options { dir: Some(dir), ..Options::default() }).unwrap())
    };
    let mut server = start(dir.clone()).await.unwrap();
    let url = server.url("postgres");
    let info = ConnInfo::from_env(Some(&url)).unwrap();
    buildreactor::database::migrate::migrate(&info).await.unwrap();
    let client = connect(&url).await;
    client
        .batch_execute(
            "INSERT INTO builders (name, script) VALUES ('b', 'true'); INSERT INTO build_queue (builder) VALUES ('b')",
        )
        .await
        .unwrap();
    drop(client);
    server = tokio::task::spawn_blocking(move || {
        server.stop(StopMode::Fast).unwrap();
        server
    })
    .await
    .unwrap();
    drop(server);

    let mut daemon = Daemon::spawn(&url, "w", &[HOUR]);
    daemon.says("cannot connect to database `postgres`").await;
    let ticks = crate::support::cpu_ticks(daemon.pid());
    let began = std::time::Instant::now();
    wait_for("three seconds without a server", || async { began.elapsed().as_secs() >= 3 }).await;
    assert!(crate::support::cpu_ticks(daemon.pid()) - ticks < 30, "no spin");
    assert_eq!(daemon.times_said("cannot connect"), 1, "one clear line");
    let mut server = start(dir).await.unwrap();
    daemon.ready().await;
    let client = connect(&url).await;
    wait_for("the first build", || async { finished(&client).await == 1 }).await;

    for mode in [StopMode::Fast, StopMode::Immediate] {
        server = tokio::task::spawn_blocking(move || {
            server.restart(mode).unwrap();
            server
        })
        .await
        .unwrap();
        let client = connect(&url).await;
        let before = finished(&client).await;
        client.batch_execute("INSERT INTO build_queue (builder) VALUES ('b')").await.unwrap();
        wait_for("a build after the restart", || async { finished(&client).await == before + 1 }).await;
    }
    assert_eq!(daemon.stop().await, Some(0));
}

async fn finished(client: &tokio_postgres::Client) -> i64 {
    client.query_one("SELECT count(*) FROM builds WHERE state = 'passed'", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_server_that_ends_idle_transactions_does_not_end_claims() {
    let db = Db::new().await;
    db.execute(&format!("ALTER DATABASE {} SET idle_in_transaction_session_timeout = '300ms'", db.name())).await;
    db.execute(&format!("ALTER DATABASE {} SET statement_timeout = '300ms'", db.name())).await;
    for name in ["transaction_timeout", "idle_session_timeout"] {
        // Not in every version. This session keeps its own.
        if db.one::<bool>(&format!("SELECT EXISTS (SELECT FROM pg_settings WHERE name = '{name}')")).await {
            db.execute(&format!("ALTER DATABASE {} SET {name} = '300ms'", db.name())).await;
        }
    }
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "sleep 2").await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(daemon.times_said("lost"), 0);
}

#[tokio::test]
async fn wrong_configuration_and_unreachable_databases_have_their_exit_codes() {
    let folder = temp_dir();
    let file = folder.path().join("b.toml");
    std::fs::write(
        &file,
        "[worker]\nslots = \"many\"\nslot = 3\n\n[reactor]\npoll = \"30 parsecs\"\n[http]\nurl = \"smtp://x\"\n",
    )
    .unwrap();
    let output = buildreactor(&["run", "--config", file.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(78));
    let told = text(&output.stderr);
    for part in ["b.toml:2: worker.slots", "b.toml:3: worker.slot", "b.toml:6: reactor.poll", "b.toml:7: "] {
        assert!(told.contains(part), "{part} in {told}");
    }
    let output = buildreactor(&["migrate", "--database", "host=/nonexistent dbname=x"], &[]);
    assert_eq!(output.status.code(), Some(69), "{}", text(&output.stderr));
    let output = buildreactor(&["migrate", "--database", "host=/tmp nonsense=1"], &[]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
    let db = Db::empty().await;
    let output = buildreactor(&["migrate", "--database", &crate::support::server().url("no_such_database")], &[]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
    let state = folder.path().display().to_string();
    let folder_here = ("BUILDREACTOR_WORKER_STATE_DIR", state.as_str());
    let output = buildreactor(&["run", "--database", &db.url()], &[folder_here]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("run `buildreactor migrate` first"), "{}", text(&output.stderr));
    let output = buildreactor(&["run", "--embedded", &state, "--database", &db.url()], &[folder_here]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
    let output = buildreactor(&["run", "--database", &db.url()], &[folder_here, ("BUILDREACTOR_LOG", "inof")]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("BUILDREACTOR_LOG: `inof` has no level"), "{}", text(&output.stderr));

    // Somebody without rights, who would be started again for ever.
    let db = Db::new().await;
    let role = format!("stranger_{}", crate::support::unique());
    db.execute(&format!("CREATE ROLE {role} LOGIN")).await;
    let url = db.url().replace("user=postgres", &format!("user={role}"));
    let nothing = Db::empty().await;
    // As PostgreSQL 15 and later have it.
    nothing.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    let empty = nothing.url().replace("user=postgres", &format!("user={role}"));
    for (command, url, cure) in [
        ("run", &url, "deploy/roles.sql gives them"),
        ("migrate", &url, "as the owner of the database"),
        ("migrate", &empty, "as the owner of the database"),
    ] {
        let output = buildreactor(&[command, "--database", url], &[folder_here]);
        assert_eq!(output.status.code(), Some(78), "{command}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(cure), "{}", text(&output.stderr));
    }
    db.execute(&format!("DROP ROLE {role}")).await;
}

/// Who has no PostgreSQL may have no rights in /var/lib either.
#[tokio::test]
async fn a_private_server_and_its_workers_files_are_in_one_folder() {
    let folder = temp_dir();
    let dir = folder.path().join("farm");
    let log = folder.path().join("log");
    let mut child = std::process::Command::new(crate::support::PROGRAM)
        .args(["run", "--embedded"])
        .arg(&dir)
        .env("BUILDREACTOR_WORKER_NAME", "w")
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    wait_for("it to be ready", || async { std::fs::read_to_string(&log).unwrap().contains("worker w is ready at") })
        .await;
    assert!(dir.join("workers/w/folder.id").exists());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(0), "{}", std::fs::read_to_string(&log).unwrap());
}

#[tokio::test]
async fn a_look_that_fails_again_and_again_neither_spins_nor_keeps_the_daemon_from_leaving() {
    let db = Db::new().await;
    let mut daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "500ms")]).await;
    db.execute("ALTER TABLE builders RENAME TO builders_gone").await;
    daemon.says("cannot listen for wakes").await;
    let ticks = crate::support::cpu_ticks(daemon.pid());
    let began = std::time::Instant::now();
    wait_for("three seconds", || async { began.elapsed().as_secs() >= 3 }).await;
    assert!(crate::support::cpu_ticks(daemon.pid()) - ticks < 60, "no spin");
    assert_eq!(daemon.stop().await, Some(0));
}
