//! `buildreactor check`: what it must find, on real servers, roles and poolers.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::support::{self, Daemon, Db, TempDir, buildreactor, temp_dir, text, unique, wait_for};

/// Exit code and lines of a check of the database at `url`.
async fn check_at(url: &str, env: &[(&str, &str)]) -> (Option<i32>, Vec<String>) {
    let folder = temp_dir();
    let state = folder.path().display().to_string();
    let (url, env) = (url.to_owned(), env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>());
    let output = tokio::task::spawn_blocking(move || {
        let mut all = vec![("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()), ("BUILDREACTOR_WORKER_NAME", "w")];
        all.extend([("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0")]);
        all.extend(env.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        buildreactor(&["check", "--database", &url], &all)
    })
    .await
    .unwrap();
    (output.status.code(), text(&output.stdout).lines().map(str::to_owned).collect())
}

async fn check(db: &Db) -> (Option<i32>, Vec<String>) {
    check_at(&db.url(), &[]).await
}

fn find<'a>(lines: &'a [String], level: &str, words: &[&str]) -> Option<&'a String> {
    lines.iter().find(|line| line.starts_with(level) && words.iter().all(|word| line.contains(word)))
}

#[track_caller]
fn has(lines: &[String], level: &str, words: &[&str]) {
    assert!(find(lines, level, words).is_some(), "no {level} with {words:?} in {lines:#?}");
}

/// The same server as another role.
fn url_of(db: &Db, role: &str) -> String {
    let server = support::server();
    format!("host={} port={} dbname={} user={role}", server.socket_dir().display(), server.port(), db.name())
}

/// A role of its own, dropped with what it owns.
struct Role<'a>(&'a Db, String);

impl Role<'_> {
    async fn new(db: &Db) -> Role<'_> {
        let name = format!("check_{}", unique());
        db.execute(&format!("CREATE ROLE {name} LOGIN")).await;
        Role(db, name)
    }

    async fn drop(self) {
        self.0.execute(&format!("DROP OWNED BY {0}; DROP ROLE {0}", self.1)).await;
    }
}

#[tokio::test]
async fn a_good_database_has_no_problem_and_every_line_has_a_level() {
    let db = Db::new().await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(lines.iter().all(|line| line.starts_with("ok ") || line.starts_with("note ")), "{lines:#?}");
    for subject in ["configuration", "folder", "disk", "connection", "database", "sessions", "schema", "privileges"] {
        has(&lines, "ok", &[&format!(" {subject}: ")]);
    }
    for subject in ["triggers", "worker", "timeouts"] {
        has(&lines, "ok", &[&format!(" {subject}: ")]);
    }
    // The tests' server is a throw-away.
    has(&lines, "note", &["durability", "fsync is off"]);
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_refuses_or_has_no_tables_is_told_apart_by_the_exit_code() {
    let (code, lines) = check_at("host=/nonexistent dbname=x", &[]).await;
    assert_eq!(code, Some(69), "{lines:#?}");
    has(&lines, "PROBLEM", &["connection", "/nonexistent"]);

    let (code, lines) = check_at(&support::server().url("no_such_database"), &[]).await;
    assert_eq!(code, Some(78), "{lines:#?}");
    has(&lines, "PROBLEM", &["connection", "no_such_database"]);

    let (code, lines) = check_at("prt=1", &[]).await;
    assert_eq!(code, Some(78), "{lines:#?}");

    let db = Db::empty().await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["schema", "buildreactor migrate"]);
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_and_a_full_disk_are_problems() {
    let db = Db::new().await;
    let url = db.url();
    let (code, lines) = check_at(&url, &[("BUILDREACTOR_WORKER_STATE_DIR", "/dev/null/x")]).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["folder", "state_dir"]);
    let (code, lines) = check_at(&url, &[("BUILDREACTOR_WORKER_MIN_FREE_DISK", "1000000 TiB")]).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["disk", "min_free_disk"]);
}

#[tokio::test]
async fn the_grants_that_it_names_are_all_that_a_worker_needs() {
    let db = Db::new().await;
    let role = Role::new(&db).await;
    let url = url_of(&db, &role.1);
    let (code, lines) = check_at(&url, &[]).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["privileges", "SELECT, INSERT, UPDATE, DELETE", "build_queue"]);
    for line in lines.iter().filter(|line| line.contains(" privileges: ")) {
        db.execute(&line[line.find("GRANT").unwrap()..]).await;
    }
    let (code, lines) = check_at(&url, &[("BUILDREACTOR_RETENTION_LOGS", "30 days")]).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    // Only who is to delete builds need be able to.
    let retention = [("BUILDREACTOR_RETENTION_BUILDS", "90 days"), ("BUILDREACTOR_RETENTION_LOGS", "30 days")];
    let (code, lines) = check_at(&url, &retention).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["privileges", "GRANT DELETE ON public.builds TO"]);

    db.execute("INSERT INTO builders (name, script, retry_failed) VALUES ('good', 'echo hi', 0), ('bad', 'exit 3', 1), ('broken', 'exit 75', 0)").await;
    let mut daemon = Daemon::start_at(&url, "w", &[]).await;
    for (builder, state) in [("good", "passed"), ("bad", "failed"), ("broken", "error")] {
        let build = db.enqueue(builder).await;
        assert_eq!(db.finished(build).await, state);
    }
    db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('good', clock_timestamp() + '300 ms')").await;
    db.wait("SELECT count(*) = 2 FROM builds WHERE builder = 'good' AND state = 'passed'").await;
    assert!(!daemon.has_said("permission denied"), "{:#?}", daemon.log.lock().unwrap());
    assert_eq!(daemon.stop().await, Some(0));
    for line in lines.iter().filter(|line| line.contains(" privileges: ")) {
        db.execute(&line[line.find("GRANT").unwrap()..]).await;
    }
    assert_eq!(check_at(&url, &retention).await.0, Some(0));
    db.execute("UPDATE builds SET finished_at = finished_at - interval '1 year'").await;
    let mut daemon = Daemon::start_at(&url, "w", &retention).await;
    daemon.says("deleted what [retention] no longer keeps: 4 builds").await;
    assert!(!daemon.has_said("permission denied"), "{:#?}", daemon.log.lock().unwrap());
    assert_eq!(daemon.stop().await, Some(0));
    role.drop().await;
}

#[tokio::test]
async fn a_living_daemon_of_the_same_name_is_a_note() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[]).await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    has(&lines, "note", &["worker", &format!("process {}", daemon.pid())]);
}

#[tokio::test]
async fn triggers_that_are_missing_or_disabled_are_named_with_a_remedy_that_works() {
    let db = Db::new().await;
    db.execute("ALTER TABLE build_queue DISABLE TRIGGER build_queue_wake").await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    has(&lines, "note", &["triggers", "build_queue_wake", "poll"]);

    db.execute("ALTER TABLE builds DISABLE TRIGGER a_delete; DROP TRIGGER a_truncate ON build_queue").await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    let disabled = find(&lines, "PROBLEM", &["triggers", "a_delete", "disabled"]).unwrap();
    db.execute(&disabled[disabled.find("ALTER TABLE").unwrap()..]).await;
    has(&lines, "PROBLEM", &["triggers", "a_truncate", "missing", "DROP FUNCTION build_schema_api();", "migrate"]);
    db.execute("DROP FUNCTION build_schema_api()").await;
    assert!(buildreactor(&["migrate", "--database", &db.url()], &[]).status.success());
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
}

#[tokio::test]
async fn timeouts_of_the_server_do_not_reach_a_workers_sessions() {
    let db = Db::new().await;
    let set = ["idle_session_timeout = '7s'", "idle_in_transaction_session_timeout = '8s'", "statement_timeout = '9s'"];
    for setting in set {
        db.execute(&format!("ALTER DATABASE {} SET {setting}", db.name())).await;
    }
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    has(&lines, "note", &["timeouts", "idle_session_timeout is 7 s (database)"]);
    has(&lines, "note", &["timeouts", "idle_in_transaction_session_timeout is 8 s (database)"]);
    has(&lines, "note", &["timeouts", "statement_timeout is 9 s (database)"]);
    has(&lines, "ok", &["timeouts", "50 s after its last ping"]);
}

#[tokio::test]
async fn too_few_connections_are_a_problem_wherever_the_limit_is() {
    let db = Db::new().await;
    db.execute(&format!("ALTER DATABASE {} CONNECTION LIMIT 25", db.name())).await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    // Each worker of 2 slots needs up to 10.
    db.execute(
        "INSERT INTO workers (name, host, pid, version, slots, state) \
         VALUES ('a', 'h', 1, '0', 2, 'active'), ('b', 'h', 1, '0', 2, 'active'), ('c', 'h', 1, '0', 900, 'stopped')",
    )
    .await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["connections", "all 3 workers 30", "allows 25", "ALTER DATABASE"]);
    db.execute(&format!("ALTER DATABASE {} CONNECTION LIMIT -1", db.name())).await;
    let (code, lines) = check_at(&db.url(), &[("BUILDREACTOR_WORKER_SLOTS", "300")]).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["connections", "max_connections"]);
}

#[tokio::test]
async fn a_read_only_database_and_a_shared_one_are_told() {
    let db = Db::new().await;
    db.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (); CREATE TABLE public.customers ()").await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    has(&lines, "note", &["database", "2 other tables"]);
    db.execute(&format!("ALTER DATABASE {} SET default_transaction_read_only = on", db.name())).await;
    let (code, lines) = check(&db).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    has(&lines, "PROBLEM", &["connection", "default_transaction_read_only"]);
}

/// A pgbouncer on a Unix socket in front of the tests' server; stopped when dropped.
struct Pooler {
    child: Child,
    dir: TempDir,
}

impl Pooler {
    /// `None`: this machine has no pgbouncer.
    async fn start(mode: &str) -> Option<Pooler> {
        let paths = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];
        let program = paths.into_iter().find(|path| std::path::Path::new(path).exists())?;
        let (dir, server) = (temp_dir(), support::server());
        let (from, to) = (dir.path().display(), server.socket_dir().display());
        let port = server.port();
        let config = format!(
            "[databases]\n* = host={to} port={port} user=postgres\n[pgbouncer]\nlisten_addr =\nunix_socket_dir = {from}\n\
             listen_port = {port}\nauth_type = any\npool_mode = {mode}\n"
        );
        let file = dir.path().join("pgbouncer.ini");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(program);
        command.arg("--quiet").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // It refuses to run as root, as the server does; both then run as the owner of the server's data.
        if nix::unistd::Uid::effective().is_root() {
            let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(server.data_dir()).unwrap());
            std::os::unix::fs::chown(dir.path(), Some(owner), None).unwrap();
            command.uid(owner);
        }
        let pooler = Pooler { child: command.spawn().unwrap(), dir };
        let socket = pooler.dir.path().join(format!(".s.PGSQL.{port}"));
        wait_for("pgbouncer", || async { std::os::unix::net::UnixStream::connect(&socket).is_ok() }).await;
        Some(pooler)
    }

    fn url(&self, db: &Db) -> String {
        let port = support::server().port();
        format!("host={} port={port} dbname={} user=postgres", self.dir.path().display(), db.name())
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[tokio::test]
async fn transaction_pooling_in_the_path_is_a_problem_and_session_pooling_is_none() {
    let db = Db::new().await;
    let Some(pooler) = Pooler::start("transaction").await else {
        eprintln!("skipped: no pgbouncer on this machine");
        return;
    };
    // More than once: the first leaves its mark on the server processes that the pooler keeps.
    for _ in 0..3 {
        let (code, lines) = check_at(&pooler.url(&db), &[]).await;
        assert_eq!(code, Some(1), "{lines:#?}");
        has(&lines, "PROBLEM", &["sessions", "transaction pooling", "session pooling"]);
    }
    drop(pooler);
    let pooler = Pooler::start("session").await.unwrap();
    let (code, lines) = check_at(&pooler.url(&db), &[]).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    has(&lines, "ok", &["sessions"]);
}

#[tokio::test]
async fn who_has_read_enough_of_it_breaks_nothing() {
    let db = Db::new().await;
    let folder = temp_dir();
    let code = folder.path().join("code");
    // The reader is gone before there is anything to read.
    let command = format!(
        "(while [ ! -e '{0}.gone' ]; do :; done; '{1}' check --database '{2}'; echo $? > '{0}') | (exec <&-; touch '{0}.gone')",
        code.display(),
        support::PROGRAM,
        db.url()
    );
    let state = folder.path().display().to_string();
    let output = Command::new("sh")
        .args(["-c", &command])
        .env("BUILDREACTOR_WORKER_STATE_DIR", &state)
        .env("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0")
        .output()
        .unwrap();
    wait_for("its exit code", || async { std::fs::read_to_string(&code).is_ok_and(|code| code == "0\n") }).await;
    assert_eq!(text(&output.stderr), "");
}
