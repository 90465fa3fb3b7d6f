//! What becomes of a build on a master: verdict, times, steps, log, properties, limits, and where people see it.

use std::path::Path;

use super::{Gate, HOUR, builder, command, queue, request_of, shared, worker};
use crate::support::buildbot::Buildbot;
use crate::support::{Daemon, Db, temp_dir, wait_for};

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

    // As it was written.
    let id = queue(&db, "talk", r#"{"message": 3.10}"#).await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert!(log.contains("\nto 3.10 0 \n"), "{log}");

    // While it runs.
    builder(&db, "wait").await;
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
    db.wait(&format!(
        "SELECT string_agg(state, ' ' ORDER BY position) = 'passed running' FROM build_steps WHERE build_id = {id}"
    ))
    .await;
    db.wait(&format!("SELECT external_url LIKE '%/#/builders/%' FROM build_attempts WHERE build_id = {id}")).await;
    gate.open();
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
async fn what_the_master_merges_into_another_request_is_no_success() {
    let Some(buildbot) = Buildbot::start(&[("BB_COLLAPSE", "1")]).await else { return };
    let db = Db::new().await;
    builder(&db, "wait-on-w1").await;
    db.execute("UPDATE builders SET max_running = 3, max_attempts = 1").await;
    let slots = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3"), ("BUILDREACTOR_CONFIG", &buildbot.config())];
    let _daemon = Daemon::start(&db, "w", &slots).await;
    let gate = Gate::shut();
    let first = gate.started(&db, "wait-on-w1").await;
    let second = queue(&db, "wait-on-w1", &gate.properties()).await;
    db.wait(&format!("SELECT external_url IS NOT NULL FROM build_attempts WHERE build_id = {second}")).await;
    let third = queue(&db, "wait-on-w1", &gate.properties()).await;
    assert_eq!(db.finished(second).await, "error");
    let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {second}")).await;
    assert!(detail.contains("set c['collapseRequests'] = False in master.cfg"), "{detail}");
    gate.open();
    for id in [first, third] {
        assert_eq!(db.finished(id).await, "passed");
    }
}

/// Seconds since 1970 at which the command of a build of `stamp` ran, once it is there.
async fn stamp(file: &Path, number: usize) -> f64 {
    let read = || std::fs::read_to_string(file).unwrap_or_default();
    wait_for("the build's stamp", || async { read().lines().count() > number }).await;
    read().lines().nth(number).unwrap().parse().unwrap()
}

/// Waits until the master has nothing left to do of the last build: what follows is not to pay for it.
async fn settled(buildbot: &Buildbot) {
    wait_for("all buildsets to be complete", || async { buildbot.rows("buildsets?complete=false").await.is_empty() })
        .await;
    for _ in 0..10 {
        buildbot.rows("masters").await;
    }
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
        settled(&buildbot).await;
        let began = now();
        let id = db.enqueue("stamp").await;
        ours.push(stamp(&file, 2 * n + 1).await - began);
        assert_eq!(db.finished(id).await, "passed");
        settled(&buildbot).await;
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
    // On a busy machine each process more that takes part waits its turn.
    assert!(ours < bare * 2.5, "{ours} {bare}");
}

#[tokio::test]
async fn watch_and_running_builds_show_where_it_is_built_and_its_steps() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    builder(&db, "fail").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let gate = Gate::shut();
    let id = gate.started(&db, "wait").await;
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
    gate.open();
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
