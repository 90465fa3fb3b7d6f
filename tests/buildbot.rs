//! Executor `buildbot`, against a real Buildbot 4.3 master with two workers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::buildbot::Buildbot;
use crate::support::proxy::{Break, Mood, Proxy, When};
use crate::support::{Daemon, Db, TempDir, smtp, temp_dir, wait_for};

/// What only polls must not decide.
const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// The master of tests that break nothing; it ends with the run.
async fn shared() -> Option<&'static Buildbot> {
    static SHARED: tokio::sync::OnceCell<Option<Buildbot>> = tokio::sync::OnceCell::const_new();
    SHARED.get_or_init(|| Buildbot::start(&[])).await.as_ref()
}

async fn builder(db: &Db, name: &str) {
    db.execute(&format!("INSERT INTO builders (name, executor) VALUES ('{name}', 'buildbot')")).await;
}

/// A worker that knows the master as `main`.
async fn worker(db: &Db, name: &str, config: &str) -> Daemon {
    Daemon::start(db, name, &[HOUR, ("BUILDREACTOR_CONFIG", config)]).await
}

async fn queue(db: &Db, builder: &str, properties: &str) -> i64 {
    let sql = format!(
        "INSERT INTO build_queue (builder, properties) VALUES ('{builder}', '{properties}') RETURNING build_id"
    );
    db.one(&sql).await
}

fn gate(file: &Path) -> String {
    format!("{{\"gate\": \"{}\"}}", file.display())
}

async fn waits_because(db: &Db, text: &str) {
    db.wait(&format!(
        "SELECT count(*) > 0 FROM queue_status WHERE waiting_because LIKE '%{}%'",
        text.replace('\'', "''")
    ))
    .await;
}

/// Waits until Buildbot builds it: its log says so.
async fn waiting(db: &Db, build: i64) {
    db.wait(&format!("SELECT build_log_text({build}) LIKE '%waiting%'")).await;
}

#[tokio::test]
async fn each_result_of_buildbots_is_recorded_with_its_times_steps_and_log() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    for name in ["ok", "fail", "warn", "boom"] {
        builder(&db, name).await;
    }
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    db.execute("INSERT INTO build_queue (builder, reason) VALUES ('ok', 'one'), ('fail', 'two'), ('warn', 'three'), ('boom', 'four')").await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    let table: Vec<String> =
        db.all("SELECT concat_ws(' ', builder, state, attempt, detail) FROM builds ORDER BY id").await;
    let expected = [
        "ok passed 1 build successful",
        "fail failed 1 failed 'sh -c ...' (failure)",
        "warn passed 1 with warnings: warnings 'sh -c ...' (warnings)",
        "boom error 1 attempt 1 of 1 broke: exception: exception ",
    ];
    for (row, expected) in table.iter().zip(expected) {
        assert!(row.starts_with(expected), "{table:#?}");
    }
    let steps: Vec<String> = db.all("SELECT concat_ws(' ', builder, position, name, s.state) FROM build_steps s JOIN builds b ON b.id = build_id ORDER BY build_id, position").await;
    let expected = [
        "ok 1 worker_preparation passed",
        "ok 2 work passed",
        "fail 1 worker_preparation passed",
        "fail 2 work failed",
        "warn 1 worker_preparation passed",
        "warn 2 work warnings",
        "boom 1 worker_preparation passed",
        "boom 2 work error",
    ];
    assert_eq!(steps, expected);
    let log: String = db.one("SELECT build_log_text(2)").await;
    assert!(log.contains("[step 1: work]\nboom\n") && !log.contains("program finished"), "{log}");
    // Buildbot's own times, which are whole seconds: never before the attempt, never after its record.
    for (id, name) in [(1, "ok"), (2, "fail")] {
        let request = buildbot.asked().await;
        let url: String = db.one(&format!("SELECT external_url FROM build_attempts WHERE build_id = {id}")).await;
        let number = url.rsplit('/').next().unwrap();
        let build = &buildbot.rows(&format!("builders/{name}/builds/{number}")).await[0];
        assert!(request.iter().any(|row| row["buildrequestid"] == build["buildrequestid"]));
        let (started, finished) = (build["started_at"].as_i64().unwrap(), build["complete_at"].as_i64().unwrap());
        let times = format!(
            "SELECT b.started_at = greatest(to_timestamp({started}), a.started_at)
                AND b.finished_at = least(greatest(to_timestamp({finished}), b.started_at), a.finished_at)
             FROM builds b JOIN build_attempts a ON a.build_id = b.id WHERE b.id = {id}"
        );
        assert!(db.one::<bool>(&times).await, "build {id}: {build}");
        let worker: String = db.one(&format!("SELECT external_worker FROM build_attempts WHERE build_id = {id}")).await;
        assert!(["w1", "w2"].contains(&worker.as_str()), "{worker}");
    }
}

#[tokio::test]
async fn properties_are_passed_through_and_logs_of_all_steps_come_while_they_run() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "talk").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let id = queue(&db, "talk", r#"{"message": "Zoë <x>", "num": 7, "branch": "main"}"#).await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    let (head, rest) = log.split_once("[step 1: first]\n").unwrap();
    assert!(head.starts_with("[build ") && head.contains(&buildbot.url()), "{head}");
    let lines: Vec<String> = (0..3000).map(|n| format!("line {n}\n")).collect();
    let (first, second) = rest.split_once("[step 2: second]\n").unwrap();
    let mut said: Vec<&str> = first.lines().collect();
    said.sort_unstable();
    assert_eq!(said, ["also", "to Zoë <x> 7 main"]);
    assert_eq!(second, lines.concat());
    let bytes: i64 = db.one(&format!("SELECT log_bytes FROM build_attempts WHERE build_id = {id}")).await;
    assert_eq!(bytes, i64::try_from(log.len()).unwrap());
    let set = &buildbot.rows(&format!("buildsets?reason__contains=-{id}-1)&order=-bsid&limit=1")).await[0];
    let request = &buildbot.rows(&format!("buildrequests?buildsetid={}&property=*", set["bsid"])).await[0];
    assert_eq!(request["properties"]["buildreactor_build"][0], id.to_string());
    assert_eq!(request["properties"]["buildreactor_attempt"][0], "1");

    // While it runs.
    builder(&db, "wait").await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    db.wait(&format!(
        "SELECT string_agg(state, ' ' ORDER BY position) = 'passed running' FROM build_steps WHERE build_id = {id}"
    ))
    .await;
    db.wait(&format!("SELECT external_url LIKE '%/#/builders/%' FROM build_attempts WHERE build_id = {id}")).await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn what_the_scheduler_would_drop_is_refused_with_the_cure() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let refused = [
        (
            r#"{"colour": "red"}"#,
            "does not take `colour`: declare it in master.cfg, for example util.StringParameter(name=\"colour\")",
        ),
        (r#"{"builderNames": "fail"}"#, "a property for a Buildbot builder cannot be called `builderNames`"),
        (r#"{"num": "many"}"#, "num"),
    ];
    for (properties, why) in refused {
        let id = queue(&db, "ok", properties).await;
        assert_eq!(db.finished(id).await, "error");
        let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {id}")).await;
        assert!(detail.contains(why), "{detail}");
        let sets = buildbot.rows(&format!("buildsets?reason__contains=-{id}-1)")).await;
        let ours: i64 = db
            .one(&format!(
                "SELECT (extract(epoch FROM started_at) * 1000000)::bigint FROM build_attempts WHERE build_id = {id}"
            ))
            .await;
        let token = format!("(br-{ours:x}-");
        assert!(!sets.iter().any(|set| set["reason"].as_str().unwrap().contains(&token)), "{sets:?}");
    }
}

#[tokio::test]
async fn a_running_build_is_cancelled_on_the_master() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let id = queue(&db, "wait", r#"{"gate": "/nonexistent/never"}"#).await;
    waiting(&db, id).await;
    let said: String = db.one(&format!("SELECT cancel_build({id}, 'not wanted')")).await;
    assert_eq!(said, "its worker is told to stop it");
    assert_eq!(db.finished(id).await, "cancelled");
    assert_eq!(db.one::<String>(&format!("SELECT detail FROM builds WHERE id = {id}")).await, "cancelled: not wanted");
    let asked = request_of(&db, buildbot, id).await;
    assert_eq!((asked.len(), &asked[0]["complete"], &asked[0]["results"]), (1, &true.into(), &6.into()));
    assert_eq!(
        db.one::<String>(&format!("SELECT state FROM build_steps WHERE build_id = {id} AND position = 2")).await,
        "cancelled"
    );
}

/// Requests for a build of this database.
async fn request_of(db: &Db, buildbot: &Buildbot, id: i64) -> Vec<serde_json::Value> {
    let first: i64 = db
        .one(&format!(
            "SELECT (extract(epoch FROM min(started_at)) * 1000000)::bigint FROM build_attempts WHERE build_id = {id}"
        ))
        .await;
    let mut requests = Vec::new();
    for set in buildbot.rows(&format!("buildsets?reason__contains=(br-{first:x}-{id}-&order=bsid")).await {
        requests.extend(buildbot.rows(&format!("buildrequests?buildsetid={}", set["bsid"])).await);
    }
    requests
}

#[tokio::test]
async fn limits_of_time_end_the_request() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    for (name, limits) in
        [("quiet", "timeout = '1 hour', silence_timeout = '3 s'"), ("wait", "timeout = '4 s', max_running = 10")]
    {
        builder(&db, name).await;
        db.execute(&format!("UPDATE builders SET {limits} WHERE name = '{name}'")).await;
    }
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let silent = queue(&db, "quiet", "{}").await;
    let long = queue(&db, "wait", r#"{"gate": "/nonexistent/never"}"#).await;
    for (id, detail) in [(silent, "no output for 3s"), (long, "ran longer than its timeout of 4s")] {
        assert_eq!(db.finished(id).await, "timed_out");
        assert_eq!(db.one::<String>(&format!("SELECT detail FROM builds WHERE id = {id}")).await, detail);
        assert_eq!(request_of(&db, buildbot, id).await[0]["results"], 6);
    }
}

#[tokio::test]
async fn builds_of_both_executors_need_each_other() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    builder(&db, "fail").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    db.builder("script", "true").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    db.execute(
        "INSERT INTO build_queue (builder) VALUES ('ok');
         INSERT INTO build_queue (builder, needs) VALUES ('script', '{1}');
         INSERT INTO build_queue (builder, needs) VALUES ('ok', '{2}');
         INSERT INTO build_queue (builder) VALUES ('fail');
         INSERT INTO build_queue (builder, needs) VALUES ('script', '{4}')",
    )
    .await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    let states: Vec<String> = db.all("SELECT state::text FROM builds ORDER BY id").await;
    assert_eq!(states, ["passed", "passed", "passed", "failed", "skipped"]);
}

#[tokio::test]
async fn nothing_is_claimed_that_the_master_could_not_build_and_it_says_why() {
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, executor, settings) VALUES
         ('ok', 'buildbot', '{}'), ('nobody', 'buildbot', '{}'), ('elsewhere', 'buildbot', '{\"master\": \"other\"}'),
         ('scheduled', 'buildbot', '{\"builder\": \"ok\", \"scheduler\": \"nightly\"}'),
         ('narrow', 'buildbot', '{\"builder\": \"fail\", \"scheduler\": \"narrow\"}'),
         ('mute', 'buildbot', '{\"builder\": \"ok\", \"scheduler\": \"mute\"}')",
    )
    .await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    for (name, why) in [
        ("nobody", "master `main` has no builder `nobody`"),
        ("elsewhere", "no worker that may take it has a section [buildbot.other]"),
        ("scheduled", "master `main` has no force scheduler `nightly`"),
        (
            "narrow",
            "force scheduler `narrow` of master `main` does not start builder `fail`: add it to its builderNames",
        ),
        ("mute", "drops the reason of a build: its reasonString must contain %(reason)s"),
    ] {
        let id = queue(&db, name, "{}").await;
        waits_because(&db, why).await;
        let attempts = if name == "mute" { 1 } else { 0 };
        assert_eq!(
            db.one::<i64>(&format!("SELECT count(*) FROM build_attempts WHERE build_id = {id}")).await,
            attempts,
            "{name}"
        );
        db.execute(&format!("SELECT cancel_build({id})")).await;
        db.wait("SELECT count(*) = 0 FROM build_queue").await;
    }

    let worker_ids: Vec<u64> =
        buildbot.rows("workers").await.iter().map(|row| row["workerid"].as_u64().unwrap()).collect();
    for id in &worker_ids {
        buildbot.call(&format!("workers/{id}"), "pause", serde_json::json!({"reason": "maintenance"})).await;
    }
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "each connected worker of builder `ok` on master `main` is paused or about to stop (w").await;
    for id in &worker_ids {
        buildbot.call(&format!("workers/{id}"), "unpause", serde_json::json!({})).await;
    }
    assert_eq!(db.finished(id).await, "passed");

    // Somebody else's.
    let folder = temp_dir();
    let file = folder.path().join("gate");
    builder(&db, "wait").await;
    buildbot.force("wait", &[("gate", file.to_str().unwrap())]).await;
    let id = queue(&db, "wait", &gate(&file)).await;
    waits_because(&db, "builder `wait` on master `main` is busy (1 waiting or running there, 1 allowed)").await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");

    for number in [1, 2] {
        buildbot.kill_worker(number);
    }
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "no worker of builder `ok` is connected to master `main`").await;
    buildbot.kill_master();
    waits_because(&db, "master `main` cannot be reached: Connection refused").await;
    assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 0);
    buildbot.start_master().await;
    buildbot.start_worker(1);
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_request_that_waits_on_the_master_is_cancelled_there() {
    let Some(buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    builder(&db, "wait-on-w1").await;
    db.execute("UPDATE builders SET max_running = 3").await;
    // One builder builds one thing at a time on a worker: the second waits.
    let first = queue(&db, "wait-on-w1", &gate(&file)).await;
    waiting(&db, first).await;
    let second = queue(&db, "wait-on-w1", &gate(&file)).await;
    db.wait(&format!("SELECT external_url LIKE '%/#/buildrequests/%' FROM build_attempts WHERE build_id = {second}"))
        .await;
    db.execute(&format!("SELECT cancel_build({second}, 'changed my mind')")).await;
    assert_eq!(db.finished(second).await, "cancelled");
    let asked = request_of(&db, &buildbot, second).await;
    assert_eq!((&asked[0]["complete"], &asked[0]["results"]), (&true.into(), &6.into()));
    let builds = buildbot.rows(&format!("builds?buildrequestid={}", asked[0]["buildrequestid"])).await;
    assert!(builds.is_empty(), "{builds:?}");
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(first).await, "passed");
}

#[tokio::test]
async fn a_build_outlives_its_worker_and_a_crash_of_the_master_in_one_attempt() {
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    let on: String = db.one(&format!("SELECT external_worker FROM build_attempts WHERE build_id = {id}")).await;
    buildbot.kill_worker(if on == "w1" { 1 } else { 2 });
    // Repeated on the other.
    db.wait(&format!("SELECT external_worker <> '{on}' FROM build_attempts WHERE build_id = {id}")).await;
    db.wait(&format!("SELECT string_agg(state, ' ' ORDER BY position) = 'passed lost passed running' FROM build_steps WHERE build_id = {id}")).await;

    buildbot.kill_master();
    daemon.says("waits for its master: master `main` cannot be reached").await;
    buildbot.start_master().await;
    db.wait(&format!("SELECT count(*) = 6 FROM build_steps WHERE build_id = {id}")).await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 1);
    assert_eq!(request_of(&db, &buildbot, id).await.len(), 1);
}

#[tokio::test]
async fn what_a_master_interrupts_as_it_is_shut_down_is_tried_again() {
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    buildbot.stop_master();
    std::fs::write(&file, "").unwrap();
    buildbot.start_master().await;
    assert_eq!(db.finished(id).await, "passed");
    let attempts: Vec<String> =
        db.all("SELECT concat_ws(': ', state, detail) FROM build_attempts ORDER BY attempt").await;
    assert_eq!(attempts, ["error: master `main` was shut down while it ran", "passed: build successful"]);
    assert_eq!(request_of(&db, &buildbot, id).await.len(), 2);
}

#[tokio::test]
async fn a_daemon_that_comes_back_goes_on_with_the_request() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    daemon.kill();
    daemon.spawn_again();
    daemon.says("is taken over from this worker's last daemon").await;
    assert_eq!(daemon.stop().await, Some(0));
    daemon.spawn_again();
    daemon.says("is taken over from this worker's last daemon").await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert_eq!(log.matches("waiting\n").count(), 1, "{log}");
    assert!(log.ends_with("gone on\n"), "{log}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 1);
    assert_eq!(request_of(&db, buildbot, id).await.len(), 1);
}

#[tokio::test]
async fn another_worker_goes_on_with_the_request_of_one_that_is_gone() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let config = buildbot.config();
    let lease = [
        HOUR,
        ("BUILDREACTOR_CONFIG", config.as_str()),
        ("BUILDREACTOR_LEASE_PING", "1s"),
        ("BUILDREACTOR_LEASE_LEASE", "3s"),
        ("BUILDREACTOR_LEASE_GRACE", "13s"),
    ];
    let mut first = Daemon::start(&db, "first", &lease).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    // Stopped, not dead: it comes back, and must leave alone what is no longer its own.
    first.signal(Signal::SIGSTOP);
    let _second = Daemon::start(&db, "second", &lease).await;
    db.wait(&format!("SELECT worker = 'second' AND state = 'running' FROM builds WHERE id = {id}")).await;
    first.signal(Signal::SIGCONT);
    first.says("is already recorded, or no longer ours").await;
    waiting(&db, id).await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    let attempts: Vec<String> =
        db.all("SELECT concat_ws(' ', attempt, state, worker) FROM build_attempts ORDER BY 1").await;
    assert_eq!(attempts, ["1 lost first", "2 passed second"]);
    let asked = request_of(&db, buildbot, id).await;
    assert_eq!((asked.len(), &asked[0]["results"]), (1, &0.into()));
    drop(first);
}

#[tokio::test]
async fn a_login_is_made_where_a_user_is_configured() {
    let Some(buildbot) = Buildbot::start(&[("BB_AUTH", "read"), ("BB_COOKIE_SECONDS", "2")]).await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    let password = buildbot.folder.path().join("password");
    std::fs::write(&password, "wrong\n").unwrap();
    let login = format!("user = \"bot\"\npassword_file = \"{}\"", password.display());
    let daemon = worker(&db, "w", &buildbot.config_at(&buildbot.url(), &login)).await;
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "master `main` refuses user `bot`: wrong user or password").await;
    std::fs::write(&password, "s3cret\n").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    // The cookie has expired by now, or will during these.
    for _ in 0..3 {
        let id = queue(&db, "ok", "{}").await;
        assert_eq!(db.finished(id).await, "passed");
    }
    let log = daemon.log.lock().unwrap().join("\n");
    let everything: String = db.one("SELECT string_agg(concat(to_jsonb(b), to_jsonb(a), to_jsonb(w)), '') FROM builds b, build_attempts a, workers w").await;
    for secret in ["s3cret", "TWISTED_SESSION"] {
        assert!(!log.contains(secret) && !everything.contains(secret), "{secret}");
    }
    drop(daemon);

    // Who may look, and not force.
    std::fs::write(&password, "pw").unwrap();
    let login = login.replace("bot", "alice");
    let _daemon = worker(&db, "v", &buildbot.config_at(&buildbot.url(), &login)).await;
    queue(&db, "ok", "{}").await;
    waits_because(&db, "master `main` does not allow it to user `alice`").await;
}

#[tokio::test]
async fn what_became_of_a_request_while_no_daemon_ran_is_recorded_however_late() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10, timeout = '15 s'").await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let passes = queue(&db, "wait", &gate(&file)).await;
    let stopped = queue(&db, "wait", r#"{"gate": "/nonexistent/never"}"#).await;
    for id in [passes, stopped] {
        waiting(&db, id).await;
    }
    daemon.kill();
    std::fs::write(&file, "").unwrap();
    let request = request_of(&db, buildbot, stopped).await[0]["buildrequestid"].clone();
    buildbot.call(&format!("buildrequests/{request}"), "cancel", serde_json::json!({"reason": "by hand"})).await;
    for id in [passes, stopped] {
        wait_for("the request to end", || async { request_of(&db, buildbot, id).await[0]["complete"] == true }).await;
    }
    db.wait("SELECT bool_and(clock_timestamp() - started_at > '16 s') FROM build_attempts").await;
    daemon.spawn_again();
    assert_eq!(db.finished(passes).await, "passed");
    assert_eq!(db.finished(stopped).await, "cancelled");
    let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {stopped}")).await;
    assert!(detail.starts_with("cancelled in Buildbot: cancelled (by hand)"), "{detail}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 2);
}

#[tokio::test]
async fn a_master_that_hangs_keeps_neither_scripts_waiting_nor_a_daemon_from_leaving() {
    let Some(buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    for name in ["wait", "ok", "fail", "warn", "talk"] {
        builder(&db, name).await;
    }
    db.builder("script", "true").await;
    let config = buildbot.config();
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3"), ("BUILDREACTOR_CONFIG", config.as_str())];
    let mut daemon = Daemon::start(&db, "w", &slots).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    buildbot.signal_master(Signal::SIGSTOP);
    db.execute("INSERT INTO build_queue (builder, priority) VALUES ('ok', 9), ('fail', 9), ('warn', 9), ('talk', 9)")
        .await;
    waits_because(&db, "master `main` does not answer within 3 s").await;
    for _ in 0..5 {
        let script = db.enqueue("script").await;
        assert_eq!(db.finished(script).await, "passed");
    }
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.exited().await, Some(0));
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {id}")).await, "queued");
    buildbot.signal_master(Signal::SIGCONT);
    std::fs::write(&file, "").unwrap();
    daemon.spawn_again();
    assert_eq!(db.finished(id).await, "passed");
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    // What had been left on the master was ended, or had ended, before it was asked again.
    let asked = request_of(&db, &buildbot, id).await;
    assert!(asked.len() <= 2 && asked.iter().all(|row| row["complete"] == true), "{asked:?}");
}

#[tokio::test]
async fn a_limit_ends_an_attempt_although_its_request_may_not_be_stopped() {
    let Some(buildbot) = Buildbot::start(&[("BB_AUTH", "force")]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET timeout = '4 s'").await;
    let password = buildbot.folder.path().join("password");
    std::fs::write(&password, "pw").unwrap();
    let login = format!("user = \"alice\"\npassword_file = \"{}\"", password.display());
    let _daemon = worker(&db, "w", &buildbot.config_at(&buildbot.url(), &login)).await;
    let id = queue(&db, "wait", r#"{"gate": "/nonexistent/never"}"#).await;
    assert_eq!(db.finished(id).await, "timed_out");
    let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {id}")).await;
    assert!(
        detail.starts_with(
            "ran longer than its timeout of 4s; request 1 goes on: master `main` does not allow it to user `alice`"
        ),
        "{detail}"
    );
}

/// A worker that reaches the master through a proxy.
async fn through(proxy: &Proxy, buildbot: &Buildbot, db: &Db, name: &str) -> Daemon {
    worker(db, name, &buildbot.config_at(&format!("http://127.0.0.1:{}", proxy.port()), "")).await
}

async fn proxy(buildbot: &Buildbot) -> Proxy {
    Proxy::to(([127, 0, 0, 1], buildbot.port).into()).await
}

#[tokio::test]
async fn a_daemon_killed_after_the_force_call_and_before_its_answer_finds_its_request_again() {
    let Some(buildbot) = shared().await else { return };
    let (db, proxy) = (Db::new().await, proxy(buildbot).await);
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let mut daemon = through(&proxy, buildbot, &db, "w").await;
    for answered in [When::BeforeTheAnswer, When::BeforeTheServer] {
        proxy.set(Mood { stall_force: Some(answered), ..Mood::default() });
        let id = db.enqueue("ok").await;
        proxy.has_stalled().await;
        if answered == When::BeforeTheAnswer {
            wait_for("the master to have it", || async { request_of(&db, buildbot, id).await.len() == 1 }).await;
        }
        daemon.kill();
        proxy.cut(Break::Reset);
        proxy.set(Mood::default());
        daemon.spawn_again();
        assert_eq!(db.finished(id).await, "passed");
        let attempts: Vec<String> = db
            .all(&format!(
                "SELECT concat_ws(': ', state, detail) FROM build_attempts WHERE build_id = {id} ORDER BY attempt"
            ))
            .await;
        match answered {
            When::BeforeTheAnswer => assert_eq!(attempts, ["passed: build successful"]),
            When::BeforeTheServer => assert_eq!(
                attempts,
                ["cancelled: given back: the worker ended before it had asked the master", "passed: build successful"]
            ),
        }
        assert_eq!(request_of(&db, buildbot, id).await.len(), 1);
    }
}

#[tokio::test]
async fn a_force_call_whose_answer_is_lost_leads_to_one_request() {
    let Some(buildbot) = shared().await else { return };
    let (db, proxy) = (Db::new().await, proxy(buildbot).await);
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let _daemon = through(&proxy, buildbot, &db, "w").await;
    for answered in [When::BeforeTheAnswer, When::BeforeTheServer] {
        proxy.set(Mood { stall_force: Some(answered), ..Mood::default() });
        let id = db.enqueue("ok").await;
        proxy.has_stalled().await;
        if answered == When::BeforeTheAnswer {
            wait_for("the master to have it", || async { request_of(&db, buildbot, id).await.len() == 1 }).await;
        }
        proxy.cut(Break::Reset);
        proxy.set(Mood::default());
        assert_eq!(db.finished(id).await, "passed");
        assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 1);
        assert_eq!(request_of(&db, buildbot, id).await.len(), 1);
    }
}

#[tokio::test]
async fn a_force_call_that_comes_much_too_late_is_found_and_cancelled() {
    let Some(buildbot) = shared().await else { return };
    let (db, proxy) = (Db::new().await, proxy(buildbot).await);
    builder(&db, "take").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let lease = [
        HOUR,
        ("BUILDREACTOR_LEASE_PING", "1s"),
        ("BUILDREACTOR_LEASE_LEASE", "3s"),
        ("BUILDREACTOR_LEASE_GRACE", "13s"),
    ];
    let config = buildbot.config_at(&format!("http://127.0.0.1:{}", proxy.port()), "");
    let mut first = Daemon::start(&db, "first", &[&lease[..], &[("BUILDREACTOR_CONFIG", &config)]].concat()).await;
    proxy.set(Mood { stall_force: Some(When::BeforeTheServer), ..Mood::default() });
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "take", &gate(&file)).await;
    proxy.has_stalled().await;
    first.kill();
    let config = buildbot.config();
    let _second = Daemon::start(&db, "second", &[&lease[..], &[("BUILDREACTOR_CONFIG", &config)]].concat()).await;
    waiting(&db, id).await;
    // The network had kept it.
    proxy.set(Mood::default());
    wait_for("the late call to arrive", || async { request_of(&db, buildbot, id).await.len() == 2 }).await;
    std::fs::write(&file, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    let complete = || async { request_of(&db, buildbot, id).await.iter().all(|row| row["complete"] == true) };
    wait_for("the late one to end", complete).await;
    let results: Vec<_> = request_of(&db, buildbot, id).await.iter().map(|row| row["results"].clone()).collect();
    assert_eq!(results, [0, 6]);
    assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 2);
}

#[tokio::test]
async fn fifty_builds_are_one_request_each_whatever_becomes_of_the_master_in_between() {
    const LONG: Duration = Duration::from_secs(300);
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    builder(&db, "stamp").await;
    db.execute("UPDATE builders SET max_running = 4").await;
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "8"), ("BUILDREACTOR_CONFIG", &buildbot.config())];
    let _daemon = Daemon::start(&db, "w", &slots).await;
    db.execute(
        "INSERT INTO build_queue (builder) SELECT (ARRAY['ok', 'stamp'])[1 + n % 2] FROM generate_series(1, 50) n",
    )
    .await;
    db.wait_within(LONG, "SELECT count(*) >= 15 FROM builds WHERE state = 'passed'").await;
    buildbot.kill_master();
    buildbot.start_master().await;
    db.wait_within(LONG, "SELECT count(*) = 0 FROM build_queue").await;
    let states: Vec<String> = db.all("SELECT DISTINCT state::text FROM builds").await;
    assert_eq!(states, ["passed"]);
    let mut builds: Vec<String> = Vec::new();
    for set in buildbot.rows("buildsets?reason__contains=(br-&order=bsid").await {
        let reason = set["reason"].as_str().unwrap();
        builds.push(reason.rsplit('-').nth(1).unwrap().to_owned());
    }
    builds.sort_by_key(|build| build.parse::<i64>().unwrap());
    let once: Vec<String> = (1..=50).map(|n| n.to_string()).collect();
    assert_eq!(builds, once);
}

#[tokio::test]
async fn what_the_master_merges_into_another_request_is_no_success() {
    let Some(buildbot) = Buildbot::start(&[("BB_COLLAPSE", "1")]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait-on-w1").await;
    db.execute("UPDATE builders SET max_running = 3, max_attempts = 1").await;
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3"), ("BUILDREACTOR_CONFIG", &buildbot.config())];
    let _daemon = Daemon::start(&db, "w", &slots).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let first = queue(&db, "wait-on-w1", &gate(&file)).await;
    waiting(&db, first).await;
    let second = queue(&db, "wait-on-w1", &gate(&file)).await;
    db.wait(&format!("SELECT external_url IS NOT NULL FROM build_attempts WHERE build_id = {second}")).await;
    let third = queue(&db, "wait-on-w1", &gate(&file)).await;
    assert_eq!(db.finished(second).await, "error");
    let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {second}")).await;
    assert!(detail.contains("set c['collapseRequests'] = False in master.cfg"), "{detail}");
    std::fs::write(&file, "").unwrap();
    for id in [first, third] {
        assert_eq!(db.finished(id).await, "passed");
    }
}

/// In front of the master, with a certificate for `localhost`; its port, and the certificate.
async fn tls(buildbot: &Buildbot) -> (u16, TempDir, String) {
    let (acceptor, pem) = smtp::certificate("localhost");
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (port, master) = (listener.local_addr().unwrap().port(), buildbot.port);
    tokio::spawn(async move {
        let acceptor = Arc::new(acceptor);
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = Arc::clone(&acceptor);
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let mut server = tokio::net::TcpStream::connect(("127.0.0.1", master)).await.unwrap();
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let folder = temp_dir();
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, pem).unwrap();
    let file = file.display().to_string();
    (port, folder, file)
}

#[tokio::test]
async fn a_master_behind_tls_is_trusted_by_its_authority_alone() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let (port, _folder, ca) = tls(buildbot).await;
    let url = format!("https://localhost:{port}/");
    let mut daemon = worker(&db, "w", &buildbot.config_at(&url, "")).await;
    let id = db.enqueue("ok").await;
    waits_because(&db, "master `main` cannot be reached: invalid peer certificate").await;
    assert_eq!(daemon.stop().await, Some(0));
    let _daemon = worker(&db, "v", &buildbot.config_at(&url, &format!("ca_file = \"{ca}\""))).await;
    assert_eq!(db.finished(id).await, "passed");
}

/// Seconds since 1970 at which the command of a build of `stamp` ran, once it is there.
async fn stamp(file: &Path, number: usize) -> f64 {
    let read = || std::fs::read_to_string(file).unwrap_or_default();
    wait_for("the build's stamp", || async { read().lines().count() > number }).await;
    read().lines().nth(number).unwrap().parse().unwrap()
}

/// The median of what a build costs from here, against a bare force call: printed, and bounded as a share of that.
#[tokio::test]
async fn from_an_insert_to_the_build_takes_little_longer_than_a_bare_force_call() {
    const TIMES: usize = 25;
    let folder = temp_dir();
    let file = folder.path().join("stamps");
    let Some(buildbot) = Buildbot::start(&[("BB_STAMP", file.to_str().unwrap())]).await else { return };
    let db = Db::new().await;
    builder(&db, "stamp").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for n in 0..TIMES {
        let began = now();
        let request = buildbot.force("stamp", &[]).await;
        bare.push(stamp(&file, 2 * n).await - began);
        let done = || async { buildbot.rows(&format!("buildrequests/{request}")).await[0]["complete"] == true };
        wait_for("the bare one to end", done).await;
        let began = now();
        let id = db.enqueue("stamp").await;
        ours.push(stamp(&file, 2 * n + 1).await - began);
        assert_eq!(db.finished(id).await, "passed");
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] * 1000.0
    };
    let (bare, ours) = (median(&mut bare), median(&mut ours));
    println!(
        "to the build's command, medians of {TIMES}: force call {bare:.0} ms, INSERT {ours:.0} ms, {:.0} ms more",
        ours - bare
    );
    assert!(ours < bare * 1.5, "{ours} {bare}");
}

#[tokio::test]
async fn every_connection_to_the_kick_port_is_a_wake() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_KICK_LISTEN", &listen)]).await;
    // As a replicated row comes: no trigger runs, and the transaction that it names is another server's.
    let row = |id: i64| {
        format!(
            "SET session_replication_role = replica; INSERT INTO builds (id, builder, state, queued_at, submitted_by) VALUES ({id}, 'b', 'queued', now(), 'x'); INSERT INTO build_queue (build_id, builder, queued_xid) VALUES ({id}, 'b', '3')"
        )
    };
    db.execute(&row(1)).await;
    assert_eq!(db.one::<String>("SELECT state::text FROM builds WHERE id = 1").await, "queued");
    drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    assert_eq!(db.finished(1).await, "passed");
    // A flood, and then another row.
    for _ in 0..2000 {
        drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    }
    db.execute(&row(2)).await;
    drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    assert_eq!(db.finished(2).await, "passed");
    wait_for("the port to be closed at once", || async {
        use tokio::io::AsyncReadExt;
        let mut stream = tokio::net::TcpStream::connect(&listen).await.unwrap();
        stream.read(&mut [0; 1]).await.is_ok_and(|n| n == 0)
    })
    .await;
}

/// Exit code and lines of a command.
async fn command(arguments: &[&str], env: &[(&str, &str)]) -> (Option<i32>, Vec<String>) {
    let own = |text: &&str| (*text).to_owned();
    let arguments: Vec<String> = arguments.iter().map(own).collect();
    let env: Vec<(String, String)> = env.iter().map(|(key, value)| (own(key), own(value))).collect();
    let output = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        crate::support::buildreactor(&arguments, &env)
    })
    .await
    .unwrap();
    (output.status.code(), crate::support::text(&output.stdout).lines().map(str::to_owned).collect())
}

#[tokio::test]
async fn check_says_of_each_master_who_it_is_or_what_is_wrong_with_it() {
    let Some(buildbot) = Buildbot::start(&[("BB_AUTH", "read")]).await else { return };
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, executor, settings) VALUES
         ('here', 'buildbot', '{\"master\": \"main\"}'), ('there', 'buildbot', '{\"master\": \"other\"}'), ('unsaid', 'buildbot', '{}')",
    )
    .await;
    let folder = temp_dir();
    let state = folder.path().display().to_string();
    let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
    std::fs::write(&good, "s3cret\n").unwrap();
    std::fs::write(&bad, "wrong\n").unwrap();
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let login = |file: &Path| format!("user = \"bot\"\npassword_file = \"{}\"", file.display());
    let url = buildbot.url();
    let check = async |config: &str| {
        let env = [
            ("BUILDREACTOR_CONFIG", config),
            ("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()),
            ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0"),
            ("BUILDREACTOR_KICK_LISTEN", "127.0.0.1:7999"),
        ];
        let (code, lines) = command(&["check", "--database", &db.url()], &env).await;
        let about = |line: &String| line.contains(" buildbot: ") || line.contains(" kick: ");
        (code, lines.into_iter().filter(about).collect::<Vec<_>>())
    };

    let (code, lines) = check(&buildbot.config_at(&url, &login(&good))).await;
    let expected = [
        "note     buildbot: there is no section [buildbot.other] here: other workers have to build `there`".to_owned(),
        format!("ok       buildbot: master `main` at {url} is Buildbot 4.3.0; logged in as `bot`"),
        "ok       kick: every connection to 127.0.0.1:7999 is a wake".to_owned(),
    ];
    assert_eq!((code, lines), (Some(0), expected.to_vec()));

    let others = format!(
        "{}\n[buildbot.open]\nurl = \"{url}\"\n[buildbot.off]\nurl = \"http://{closed}\"\n\
         [buildbot.untrusted]\nurl = \"https://localhost\"\nca_file = \"/nonexistent/ca.pem\"\n\
         [buildbot.far]\nurl = \"http://192.0.2.1:8010\"\n{}",
        login(&bad),
        login(&good),
    );
    let (code, lines) = check(&buildbot.config_at(&url, &others)).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    for expected in [
        "note     buildbot: there is no section [buildbot.other] here: other workers have to build `there`",
        "note     buildbot: there is more than one master here, and the settings of `unsaid` name none",
        "PROBLEM  buildbot: master `main` refuses user `bot`: wrong user or password",
        &format!("ok       buildbot: master `open` at {url} is Buildbot 4.3.0; nobody is logged in"),
        &format!(
            "PROBLEM  buildbot: master `off` cannot be reached: Connection refused (os error 111): is [buildbot.off] url = \"http://{closed}\" its web interface, and does it run?"
        ),
        "PROBLEM  buildbot: [buildbot.untrusted] ca_file: cannot use `/nonexistent/ca.pem`: ",
        "PROBLEM  buildbot: master `far` ",
        "note     buildbot: others on the network can read the password for master `far`: ",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(expected)), "no {expected} in {lines:#?}");
    }
}

#[tokio::test]
async fn watch_and_running_builds_show_where_it_is_built_and_its_steps() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    builder(&db, "fail").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let folder = temp_dir();
    let file = folder.path().join("gate");
    let id = queue(&db, "wait", &gate(&file)).await;
    waiting(&db, id).await;
    db.wait("SELECT step = 'work' AND external_worker ~ '^w[12]$' FROM running_builds").await;
    let (url, on): (String, String) = {
        let row: String = db.one("SELECT external_url || ' ' || external_worker FROM running_builds").await;
        let (url, on) = row.split_once(' ').unwrap();
        (url.to_owned(), on.to_owned())
    };
    let database = db.url();
    let watch = async |arguments: &[&str]| command(&[arguments, &["--database", &database]].concat(), &[]).await;
    let (code, lines) = watch(&["watch", &id.to_string(), "--once"]).await;
    assert_eq!((code, lines.len()), (Some(1), 4), "{lines:#?}");
    assert_eq!(lines[1], format!("  {url} on {on}"));
    assert!(lines[2].starts_with("  1 worker_preparation passed in ") && lines[3] == "  2 work runs", "{lines:#?}");
    let followed = {
        let (id, database) = (id.to_string(), db.url());
        tokio::spawn(async move { command(&["watch", &id, "--database", &database], &[]).await })
    };
    std::fs::write(&file, "").unwrap();
    let (code, lines) = followed.await.unwrap();
    assert_eq!(code, Some(0));
    let [.., step, end] = &lines[..] else { panic!("{lines:#?}") };
    assert!(step.starts_with("  2 work passed in "), "{lines:#?}");
    assert!(end.starts_with("build 1 of wait passed in "), "{lines:#?}");

    let id = queue(&db, "fail", "{}").await;
    assert_eq!(db.finished(id).await, "failed");
    let (code, lines) = watch(&["watch", &id.to_string()]).await;
    assert_eq!((code, lines.len()), (Some(1), 4), "{lines:#?}");
    assert!(lines[0].contains("/#/builders/") && lines[2].starts_with("  2 work failed in "), "{lines:#?}");
    assert!(lines[2].ends_with(": 'sh -c ...' (failure)"), "{lines:#?}");
}

#[tokio::test]
async fn mail_has_the_masters_page_its_worker_and_its_times() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "fail").await;
    db.execute(
        "UPDATE builders SET max_running = 10; INSERT INTO build_subscriptions (address) VALUES ('ann@example.org')",
    )
    .await;
    let mails = temp_dir();
    let mail = format!("[mail]\nfrom = \"builds@example.org\"\ndry_run = \"{}\"", mails.path().display());
    let _daemon = worker(&db, "w", &buildbot.config_at(&buildbot.url(), &mail)).await;
    let id = queue(&db, "fail", "{}").await;
    assert_eq!(db.finished(id).await, "failed");
    db.wait("SELECT state = 'sent' FROM build_mail").await;
    let file = std::fs::read_dir(mails.path()).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(file).unwrap();
    let (url, on): (String, String) = (
        db.one("SELECT external_url FROM build_attempts").await,
        db.one("SELECT external_worker FROM build_attempts").await,
    );
    let at: String =
        db.one("SELECT to_char(finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM builds").await;
    for line in
        [format!("see: {url}"), format!("attempt: 1 on w ({on})"), format!("finished: {at} UTC"), "boom".to_owned()]
    {
        assert!(text.lines().any(|found| found == line), "no {line} in {text}");
    }
}
