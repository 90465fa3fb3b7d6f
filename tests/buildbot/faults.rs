//! Daemons, masters, workers and networks that fail while a build runs on a master.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::{Gate, HOUR, builder, proxy, queue, request_of, shared, through, waiting, waits_because, worker};
use crate::support::buildbot::Buildbot;
use crate::support::proxy::{Break, Mood, Proxy, When};
use crate::support::{Daemon, Db, server_with_port, wait_for};

#[tokio::test]
async fn a_build_outlives_its_worker_and_a_crash_of_the_master_in_one_attempt() {
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    let on: String = db.one(&format!("SELECT external_worker FROM build_attempts WHERE build_id = {id}")).await;
    buildbot.kill_worker(if on == "w1" { 1 } else { 2 });
    // Repeated on the other.
    db.wait(&format!("SELECT external_worker <> '{on}' FROM build_attempts WHERE build_id = {id}")).await;
    db.wait(&format!("SELECT string_agg(state, ' ' ORDER BY position) = 'passed lost passed running' FROM build_steps WHERE build_id = {id}")).await;

    buildbot.kill_master();
    daemon.says("waits for its master: master `main` cannot be reached").await;
    buildbot.start_master().await;
    db.wait(&format!("SELECT count(*) = 6 FROM build_steps WHERE build_id = {id}")).await;
    gate.open();
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
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    buildbot.stop_master();
    gate.open();
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
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    daemon.kill();
    daemon.spawn_again();
    daemon.says("is taken over from this worker's last daemon").await;
    assert_eq!(daemon.stop().await, Some(0));
    daemon.spawn_again();
    daemon.says("is taken over from this worker's last daemon").await;
    gate.open();
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert_eq!(log.matches("waiting\n").count(), 1, "{log}");
    assert!(log.ends_with("gone on\n"), "{log}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 1);
    assert_eq!(request_of(&db, buildbot, id).await.len(), 1);
}

/// Small numbers, within the rule that grace is the lease and 10 s for the killing.
fn short_lease(config: &str) -> [(&'static str, &str); 5] {
    [
        HOUR,
        ("BUILDREACTOR_CONFIG", config),
        ("BUILDREACTOR_LEASE_PING", "1s"),
        ("BUILDREACTOR_LEASE_LEASE", "3s"),
        ("BUILDREACTOR_LEASE_GRACE", "13s"),
    ]
}

#[tokio::test]
async fn another_worker_goes_on_with_the_request_of_one_that_is_gone() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let config = buildbot.config();
    let lease = short_lease(&config);
    let mut first = Daemon::start(&db, "first", &lease).await;
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    // Stopped, not dead: it comes back, and must leave alone what is no longer its own.
    first.signal(Signal::SIGSTOP);
    let _second = Daemon::start(&db, "second", &lease).await;
    db.wait(&format!("SELECT worker = 'second' AND state = 'running' FROM builds WHERE id = {id}")).await;
    first.signal(Signal::SIGCONT);
    first.says("is already recorded, or no longer ours").await;
    waiting(&db, id).await;
    gate.open();
    assert_eq!(db.finished(id).await, "passed");
    let attempts: Vec<String> =
        db.all("SELECT concat_ws(' ', attempt, state, worker) FROM build_attempts ORDER BY 1").await;
    assert_eq!(attempts, ["1 lost first", "2 passed second"]);
    let asked = request_of(&db, buildbot, id).await;
    assert_eq!((asked.len(), &asked[0]["results"]), (1, &0.into()));
    drop(first);
}

/// Until then it may still ask the master for a build, which the next would not find.
#[tokio::test]
async fn a_request_is_adopted_after_the_lease_of_the_worker_that_is_gone() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let config = buildbot.config();
    let mut long = short_lease(&config);
    (long[3].1, long[4].1) = ("20s", "30s");
    let mut first = Daemon::start(&db, "first", &long).await;
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    let _second = Daemon::start(&db, "second", &short_lease(&config)).await;
    let killed = std::time::Instant::now();
    first.kill();
    db.wait(&format!("SELECT worker = 'second' AND state = 'running' FROM builds WHERE id = {id}")).await;
    assert!(killed.elapsed() >= Duration::from_secs(30), "{:?}", killed.elapsed());
    gate.open();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(request_of(&db, buildbot, id).await.len(), 1);
}

#[tokio::test]
async fn what_became_of_a_request_while_no_daemon_ran_is_recorded_however_late() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "left").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    let gate = Gate::shut();
    let passes = queue(&db, "left", &gate.properties()).await;
    let stopped = queue(&db, "left", r#"{"gate": "/nonexistent/never"}"#).await;
    for id in [passes, stopped] {
        waiting(&db, id).await;
    }
    daemon.kill();
    gate.open();
    let request = request_of(&db, buildbot, stopped).await[0]["buildrequestid"].clone();
    buildbot.call(&format!("buildrequests/{request}"), "cancel", serde_json::json!({"reason": "by hand"})).await;
    for id in [passes, stopped] {
        wait_for("the request to end", || async { request_of(&db, buildbot, id).await[0]["complete"] == true }).await;
    }
    // By now both ran for longer than they may.
    db.execute("UPDATE builders SET timeout = '1 s'").await;
    db.wait("SELECT bool_and(clock_timestamp() - started_at > '2 s') FROM build_attempts").await;
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
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
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
    gate.open();
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
                ["cancelled: given back: its master had not been asked for it", "passed: build successful"]
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
    builder(&db, "take-on-w1").await;
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
    let gate = Gate::shut();
    let id = queue(&db, "take-on-w1", &gate.properties()).await;
    proxy.has_stalled().await;
    first.kill();
    let config = buildbot.config();
    let _second = Daemon::start(&db, "second", &[&lease[..], &[("BUILDREACTOR_CONFIG", &config)]].concat()).await;
    waiting(&db, id).await;
    // The network had kept it.
    proxy.set(Mood::default());
    wait_for("the late call to arrive", || async { request_of(&db, buildbot, id).await.len() == 2 }).await;
    gate.open();
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
async fn a_daemon_that_is_held_up_between_claim_and_question_does_not_ask() {
    let Some(buildbot) = shared().await else { return };
    let server = server_with_port(&[("fsync", "off")]).await;
    let db = Db::on(&server).await;
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let network = Proxy::to_server(&server).await;
    let config = buildbot.config();
    let lease = short_lease(&config);
    let mut daemon = Daemon::start_at(&network.url(), "w", &lease).await;
    network.set(Mood { stall_begin: true, ..Mood::default() });
    let id = db.enqueue("ok").await;
    network.has_stalled().await;
    db.wait("SELECT clock_timestamp() > started_at + interval '4 s' FROM build_attempts").await;
    network.set(Mood::default());
    daemon.says("its claim was not confirmed within the lease").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<i32>("SELECT attempt FROM builds").await, 2);
    // The first attempt's, had it asked, would have been gone on with.
    let sets = buildbot.rows("buildsets?reason__contains=(br-&order=-bsid&limit=50").await;
    let first: i64 = db.one("SELECT (extract(epoch FROM min(started_at)) * 1000000)::bigint FROM build_attempts").await;
    let ours = |row: &&serde_json::Value| row["reason"].as_str().unwrap().contains(&format!("(br-{first:x}-"));
    let reasons: Vec<String> = sets.iter().filter(ours).map(|row| row["reason"].to_string()).collect();
    assert!(reasons.len() == 1 && reasons[0].contains(&format!("-{id}-2)")), "{reasons:?}");
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_any_more_is_taken_all_the_same() {
    let Some(buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    buildbot.signal_master(Signal::SIGSTOP);
    let id = db.enqueue("ok").await;
    waits_because(&db, "master `main` does not answer within 3 s").await;
    buildbot.signal_master(Signal::SIGCONT);
    assert_eq!(db.finished(id).await, "passed");
    let log = std::fs::read_to_string(buildbot.folder.path().join("master/twistd.log")).unwrap();
    assert!(!log.contains("client disconnected"), "{log}");
}
