//! What the database refuses is said in psql, ends, and holds nothing else up.

use crate::support::{Daemon, Db, temp_dir};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A trigger function of somebody's own that refuses.
const NO: &str = "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not on a %'', to_char(now(), ''FMDay''); END'";

/// Two trigger functions: the first drops a write, the second undoes it.
const DROPS: &str = "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE FUNCTION old() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'";

#[tokio::test]
async fn every_text_that_a_person_writes_has_a_limit_that_is_named() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.enqueue("linux").await;
    for (sql, limit) in [
        (
            "INSERT INTO build_queue (builder, priority, reason) VALUES ('linux', 2147483647, repeat('r', 65537))",
            "at_most_64_kib",
        ),
        ("INSERT INTO build_queue (builder, reason) VALUES ('linux', repeat('r', 27000000))", "at_most_64_kib"),
        ("INSERT INTO builds (builder, reason) VALUES ('linux', repeat('ü', 33000))", "at_most_64_kib"),
        ("UPDATE build_queue SET reason = repeat('r', 100000) WHERE build_id = 1", "at_most_64_kib"),
        ("SELECT cancel_build(1, repeat('r', 100000))", "the reason has 100000 bytes; at most 10000"),
        (
            "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', repeat('k', 1001))",
            "coalesce_key has 1001 bytes; at most 1000",
        ),
        ("UPDATE build_queue SET coalesce_key = repeat('k', 9999) WHERE build_id = 1", "coalesce_key has 9999 bytes"),
        (
            "INSERT INTO build_queue (builder, needs) SELECT 'linux', array_agg(1) FROM generate_series(1, 100001)",
            "linux",
        ),
        (
            "INSERT INTO build_queue (builder, properties) VALUES ('linux', jsonb_build_object('a', repeat('p', 2000000)))",
            "properties_are_at_most_1_mib",
        ),
        ("SELECT pause_builder('linux', repeat('r', 100000))", "at_most_64_kib"),
        ("UPDATE builders SET description = repeat('d', 100000)", "at_most_64_kib"),
        ("UPDATE builders SET labels = array_fill('label'::text, '{101}')", "labels_and_locks_are_at_most_100_names"),
        ("INSERT INTO build_subscriptions (address) VALUES (repeat('a', 300) || '@example.org')", "address_looks_like"),
    ] {
        if limit == "linux" {
            // The same need many times is one need.
            db.execute(sql).await;
            continue;
        }
        let refused = db.refusal(sql).await;
        assert!(refused.contains(limit), "{sql}: {refused}");
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds WHERE state = 'queued'").await, 2, "nothing half done");
}

/// The value that a start trips over is in the row itself: a column of one's own, and a trigger that converts it.
#[tokio::test]
async fn a_start_that_fails_on_its_rows_own_data_is_charged_and_ends_in_error() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("ALTER TABLE builds ADD COLUMN port text, ADD COLUMN blob text").await;
    db.execute(
        "CREATE FUNCTION port() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM NEW.port::integer; RETURN NEW; END';
         CREATE TRIGGER port BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'running') EXECUTE FUNCTION port();
         SELECT pause_builder('linux');
         INSERT INTO build_queue (builder, priority) VALUES ('linux', 2147483647), ('linux', 5), ('linux', 0);
         UPDATE builds SET port = 'http' WHERE id = 1;
         UPDATE builds SET blob = repeat('b', 9000000) WHERE id = 2",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SELECT resume_builder('linux')").await;
    assert_eq!(db.finished(3).await, "passed", "others pass it");
    assert_eq!(db.finished(1).await, "error");
    let detail: String = db.one("SELECT detail FROM builds WHERE id = 1").await;
    assert!(
        detail.starts_with("attempt 3 of 3 broke: the database refuses to start it: ") && detail.contains("\"http\""),
        "{detail}"
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts WHERE build_id = 1 AND state = 'error'").await, 3);
    assert_eq!(db.finished(2).await, "error");
    let detail: String = db.one("SELECT detail FROM builds WHERE id = 2").await;
    assert!(detail.contains("its row in builds, as JSON, has more than 8 MiB"), "{detail}");
}

#[tokio::test]
async fn the_daemons_memory_is_bounded_whatever_a_row_holds() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("ALTER TABLE builds ADD COLUMN blob text; SELECT pause_builder('linux')").await;
    for (id, size) in [(1, 7_000_000), (2, 100_000_000), (3, 200_000_000), (4, 270_000_000)] {
        db.enqueue("linux").await;
        db.execute(&format!("UPDATE builds SET blob = repeat('b', {size}) WHERE id = {id}")).await;
    }
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("UPDATE builders SET max_attempts = 1; SELECT resume_builder('linux')").await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(
        db.all::<String>("SELECT state::text FROM builds ORDER BY id").await,
        ["passed", "error", "error", "error"]
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak of the daemon: {peak} kB");
    assert!(peak < 150_000, "{peak} kB");
}

/// A refusal that is not about the row: the build waits, says why, and holds nobody up.
#[tokio::test]
async fn a_start_that_a_trigger_or_a_right_refuses_says_so_and_goes_on_when_it_is_mended() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute(NO).await;
    db.execute("CREATE TRIGGER no BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'running' AND NEW.id = 1) EXECUTE FUNCTION no()").await;
    let mut daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    db.enqueue("linux").await;
    db.wait("SELECT waiting_because LIKE 'the database refuses to start it: %not on a %day%' FROM queue_status WHERE build_id = 1").await;
    let other = db.enqueue("linux").await;
    assert_eq!(db.finished(other).await, "passed");
    for _ in 0..5 {
        let n = db.enqueue("linux").await;
        db.finished(n).await;
    }
    assert_eq!(daemon.times_said("does not start: the database refuses"), 1, "once, not each second");
    db.execute("DROP TRIGGER no ON builds").await;
    assert_eq!(db.finished(1).await, "passed");
    daemon.stop().await;
}

#[tokio::test]
async fn a_right_that_the_worker_lacks_is_said_in_psql_and_costs_no_build() {
    let db = Db::new().await;
    let end = db.with_roles();
    db.builder("linux", "true").await;
    db.execute(&format!(
        "REVOKE UPDATE ON builds FROM worker_{end}; GRANT UPDATE (state, detail) ON builds TO worker_{end}"
    ))
    .await;
    let _daemon =
        Daemon::start_at(&db.url_as(&format!("daemon_{end}")), "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    let build = db.enqueue("linux").await;
    db.wait("SELECT waiting_because LIKE 'the database refuses to start it: % permission denied for table builds%' FROM queue_status").await;
    db.execute(&format!("GRANT UPDATE ON builds TO worker_{end}")).await;
    assert_eq!(db.finished(build).await, "passed");
    assert_eq!(db.one::<i32>("SELECT attempt FROM builds").await, 1, "it was not charged");
}

#[tokio::test]
async fn a_result_that_is_refused_is_said_and_recorded_once_it_is_allowed() {
    for refuse in [
        "CREATE TRIGGER no BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION no()",
        "ALTER TABLE builds ADD CONSTRAINT nothing_passes_on_a_day CHECK (state <> 'passed')",
    ] {
        let db = Db::new().await;
        let folder = temp_dir();
        db.builder("linux", &format!("echo ran >> {}", folder.path().join("ran").display())).await;
        db.builder("bad", "exit 1").await;
        db.execute(NO).await;
        db.execute(refuse).await;
        let short = [
            ("BUILDREACTOR_LEASE_PING", "100ms"),
            ("BUILDREACTOR_LEASE_LEASE", "1s"),
            ("BUILDREACTOR_LEASE_GRACE", "12s"),
        ];
        let mut daemon = Daemon::start(&db, "w", &short).await;
        let _other =
            Daemon::start(&db, "other", &[short.as_slice(), &[("BUILDREACTOR_WORKER_BUILDERS", "bad")]].concat()).await;
        let build = db.enqueue("linux").await;
        db.wait(
            "SELECT detail LIKE 'its result, passed, cannot be recorded yet: %' AND detail ~ 'day' FROM running_builds",
        )
        .await;
        let bad = db.enqueue("bad").await;
        assert_eq!(db.finished(bad).await, "failed", "others are recorded");
        // For longer than another worker would wait for a claim that is lost.
        db.wait("SELECT clock_timestamp() - started_at > interval '15 s' FROM builds WHERE id = 1").await;
        assert!(db.one::<bool>(&format!("SELECT claim_held FROM running_builds WHERE build_id = {build}")).await);
        assert!(daemon.times_said("cannot record the result of build") <= 2, "not each second");
        db.execute(
            "DROP TRIGGER IF EXISTS no ON builds; ALTER TABLE builds DROP CONSTRAINT IF EXISTS nothing_passes_on_a_day",
        )
        .await;
        assert_eq!(db.finished(build).await, "passed");
        assert_eq!(db.one::<Option<String>>("SELECT detail FROM builds WHERE id = 1").await, None);
        assert_eq!(std::fs::read_to_string(folder.path().join("ran")).unwrap(), "ran\n", "it ran once");
        daemon.stop().await;
    }
}

/// The trigger's function returns NULL, or OLD where it has to return NEW.
#[tokio::test]
async fn a_start_that_a_trigger_drops_or_undoes_is_said_and_goes_on_once_it_is_mended() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute(DROPS).await;
    let running = "FOR EACH ROW WHEN (NEW.state = 'running' AND NEW.id";
    db.execute(&format!(
        "CREATE TRIGGER one BEFORE UPDATE ON builds {running} = 1) EXECUTE FUNCTION nothing();
         CREATE TRIGGER two BEFORE UPDATE ON builds {running} = 2) EXECUTE FUNCTION old();
         CREATE TRIGGER three BEFORE INSERT ON build_attempts FOR EACH ROW WHEN (NEW.build_id = 3) EXECUTE FUNCTION nothing();
         INSERT INTO build_queue (builder) VALUES ('linux'), ('linux'), ('linux'), ('linux')"
    ))
    .await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    assert_eq!(db.finished(4).await, "passed");
    for (build, table) in [(1, "builds"), (2, "builds"), (3, "build_attempts")] {
        db.wait(&format!(
            "SELECT waiting_because LIKE '%a trigger on {table} drops what buildreactor writes there%' FROM queue_status WHERE build_id = {build}"
        ))
        .await;
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts WHERE build_id < 4").await, 0);
    db.execute("DROP TRIGGER one ON builds; DROP TRIGGER two ON builds; DROP TRIGGER three ON build_attempts").await;
    for build in 1..4 {
        assert_eq!(db.finished(build).await, "passed");
    }
    assert_eq!(db.one::<i32>("SELECT max(attempt) FROM builds").await, 1, "it was not charged");
}

#[tokio::test]
async fn a_result_that_a_trigger_drops_or_undoes_is_said_and_recorded_once_it_is_mended() {
    for (trigger, table) in [
        ("BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION nothing()", "builds"),
        ("BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION old()", "builds"),
        (
            "BEFORE UPDATE ON build_attempts FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION nothing()",
            "build_attempts",
        ),
        ("BEFORE DELETE ON build_queue FOR EACH ROW EXECUTE FUNCTION nothing()", "build_queue"),
    ] {
        let db = Db::new().await;
        db.builder("linux", "true").await;
        db.execute(DROPS).await;
        db.execute(&format!("CREATE TRIGGER drops {trigger}")).await;
        let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
        let build = db.enqueue("linux").await;
        db.wait(&format!(
            "SELECT detail LIKE 'its result, passed, cannot be recorded yet: %a trigger on {table} drops%RETURN NEW%' FROM running_builds"
        ))
        .await;
        db.execute(&format!("DROP TRIGGER drops ON {table}")).await;
        assert_eq!(db.finished(build).await, "passed", "{trigger}");
        assert_eq!(db.one::<i32>("SELECT attempt FROM builds").await, 1, "{trigger}");
        assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
    }
}

/// A person's statement changes a waiting build as a whole, or is refused.
#[tokio::test]
async fn what_a_trigger_drops_is_not_said_to_be_done() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute(DROPS).await;
    db.execute(
        "SELECT pause_builder('linux');
         INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'k');
         INSERT INTO builds (builder, state, attempt, worker, finished_at, queued_at, started_at) VALUES ('linux', 'failed', 1, 'w', now(), now(), now());
         INSERT INTO builds (builder) VALUES ('linux')",
    )
    .await;
    let before: Vec<String> = db.all("SELECT b.state || ' ' || (q.build_id IS NOT NULL) FROM builds b LEFT JOIN build_queue q ON q.build_id = b.id ORDER BY b.id").await;
    assert_eq!(before, ["queued true", "failed false", "described false"]);
    for (trigger, table, statement) in [
        ("BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION nothing()", "builds", "SELECT cancel_build(1)"),
        ("BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION old()", "builds", "SELECT cancel_build(1)"),
        (
            "BEFORE DELETE ON build_queue FOR EACH ROW EXECUTE FUNCTION nothing()",
            "build_queue",
            "SELECT cancel_build(1)",
        ),
        ("BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION nothing()", "builds", "SELECT retry_build(2)"),
        (
            "BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION old()",
            "builds",
            "INSERT INTO build_queue (build_id) VALUES (2)",
        ),
        (
            "BEFORE INSERT ON builds FOR EACH ROW EXECUTE FUNCTION nothing()",
            "builds",
            "INSERT INTO build_queue (builder) VALUES ('linux')",
        ),
        (
            "BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION nothing()",
            "builds",
            "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'k')",
        ),
        ("BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION nothing()", "builds", "SELECT cancel_build(3)"),
        ("BEFORE UPDATE ON builds FOR EACH ROW EXECUTE FUNCTION old()", "builds", "SELECT cancel_build(3)"),
    ] {
        db.execute(&format!("CREATE TRIGGER drops {trigger}")).await;
        let refused = db.refusal(statement).await;
        assert!(refused.contains(&format!("a trigger on {table} drops")), "{statement}, {trigger}: {refused}");
        db.execute(&format!("DROP TRIGGER drops ON {table}")).await;
        let after: Vec<String> = db.all("SELECT b.state || ' ' || (q.build_id IS NOT NULL) FROM builds b LEFT JOIN build_queue q ON q.build_id = b.id ORDER BY b.id").await;
        assert_eq!(after, before, "{statement}, {trigger}");
    }
}

/// A build whose need has failed stays where it is, and says why, until the trigger is mended.
#[tokio::test]
async fn a_skip_that_a_trigger_drops_is_said_and_done_once_it_is_mended() {
    let db = Db::new().await;
    db.builder("linux", "exit 1").await;
    db.execute(DROPS).await;
    db.execute("CREATE TRIGGER drops BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'skipped') EXECUTE FUNCTION nothing()").await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('linux')").await;
    db.execute("INSERT INTO build_queue (builder, needs) VALUES ('linux', '{1}')").await;
    db.wait("SELECT detail LIKE 'the database refuses to end or release it: a trigger on builds drops%' FROM builds WHERE id = 2")
        .await;
    assert!(db.one::<bool>("SELECT EXISTS (SELECT FROM build_queue WHERE build_id = 2)").await);
    db.execute("DROP TRIGGER drops ON builds").await;
    assert_eq!(db.finished(2).await, "skipped");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
}

#[tokio::test]
async fn a_release_or_a_cancel_that_a_trigger_drops_is_done_once_it_is_mended() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.builder("long", "sleep 600").await;
    db.execute(DROPS).await;
    db.execute(
        "CREATE TRIGGER needs BEFORE UPDATE OF needs ON build_queue FOR EACH ROW EXECUTE FUNCTION nothing();
         CREATE TRIGGER cancels BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.cancel_requested_at IS NOT NULL) EXECUTE FUNCTION old()",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    let long = db.enqueue("long").await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('linux')").await;
    db.execute("INSERT INTO build_queue (builder, needs) VALUES ('linux', '{2}')").await;
    db.wait("SELECT waiting_because LIKE '%the database refuses to end or release it: a trigger on build_queue drops%' FROM queue_status WHERE build_id = 3").await;
    db.wait(&format!("SELECT count(*) = 1 FROM running_builds WHERE build_id = {long}")).await;
    db.execute(&format!("SELECT cancel_build({long}, 'too long')")).await;
    // The worker reports in with each look at the whole queue, once a second here. So it has tried to move the request.
    let seen: String = db.one("SELECT seen_at::text FROM workers").await;
    db.wait(&format!("SELECT seen_at > timestamptz '{seen}' + interval '2 s' FROM workers")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_cancels").await, 1, "it is not forgotten");
    // DROP TRIGGER on build_queue would wait for the running build.
    db.execute(
        "CREATE OR REPLACE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE OR REPLACE FUNCTION old() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    )
    .await;
    assert_eq!(db.finished(3).await, "passed");
    assert_eq!(db.finished(long).await, "cancelled");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_cancels").await, 0);
}

/// A trigger may turn a failure into a pass, as before.
#[tokio::test]
async fn a_trigger_may_write_another_final_state() {
    let db = Db::new().await;
    db.builder("linux", "exit 1").await;
    db.execute(
        "CREATE FUNCTION forgive() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.state := ''passed''; RETURN NEW; END';
         CREATE TRIGGER forgive BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'failed') EXECUTE FUNCTION forgive()",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let build = db.enqueue("linux").await;
    assert_eq!(db.finished(build).await, "passed");
}

/// In a trigger of somebody's own a statement means what it means in psql.
#[tokio::test]
async fn a_statement_in_a_trigger_of_ones_own_is_checked_as_in_psql() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("linux", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let running = db.enqueue("linux").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    db.execute("SELECT pause_builder('linux'); INSERT INTO build_queue (builder) VALUES ('linux'), ('linux')").await;
    db.execute(
        "CREATE TABLE wishes (wish text);
         CREATE FUNCTION grant_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN EXECUTE NEW.wish; RETURN NEW; END';
         CREATE TRIGGER grant_it AFTER INSERT ON wishes FOR EACH ROW EXECUTE FUNCTION grant_it();
         CREATE TABLE dreams (wish text);
         CREATE TRIGGER grant_it AFTER INSERT ON dreams FOR EACH ROW EXECUTE FUNCTION grant_it()",
    )
    .await;
    for (wish, refusal) in [
        (format!("DELETE FROM build_queue WHERE build_id = {running}"), "is running"),
        (format!("UPDATE build_queue SET priority = 5 WHERE build_id = {running}"), "is running"),
        ("UPDATE build_queue SET needs = '{99}' WHERE build_id = 2".to_owned(), "there is no build 99"),
        ("UPDATE build_queue SET needs = '{2}' WHERE build_id = 2".to_owned(), "needs go round in a circle"),
        ("INSERT INTO builds (builder, state, queued_at) VALUES ('linux', 'queued', now())".to_owned(), "a new row of builds cannot be queued"),
        // A mark that anybody can set is none, and one more level changes nothing.
        (
            "SELECT set_config('buildreactor.queueing', 'no', true); INSERT INTO builds (builder, state, queued_at) VALUES ('linux', 'queued', now())".to_owned(),
            "a new row of builds cannot be queued",
        ),
        (format!("INSERT INTO dreams VALUES ('DELETE FROM build_queue WHERE build_id = {running}')"), "is running"),
    ] {
        let began = std::time::Instant::now();
        let refused = db.refusal(&format!("INSERT INTO wishes VALUES ($${wish}$$)")).await;
        assert!(refused.contains(refusal), "{wish}: {refused}");
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{wish}");
    }
    // Inside a worker's own session as well: what a trigger of builds does when a build ends.
    db.execute(
        "CREATE FUNCTION next() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS
             'BEGIN DELETE FROM build_queue WHERE build_id = 2; INSERT INTO build_queue (builder) VALUES (''linux''); RETURN NEW; END';
         CREATE TRIGGER next AFTER UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'passed' AND NEW.id = 1) EXECUTE FUNCTION next()",
    )
    .await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(running).await, "passed");
    assert_eq!(db.one::<String>("SELECT state::text FROM builds WHERE id = 2").await, "cancelled");
    assert_eq!(db.one::<String>("SELECT current_setting('lock_timeout')").await, "0");
    db.execute("SELECT resume_builder('linux')").await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_trigger_may_raise_any_error_and_stops_its_own_build_alone() {
    for state in ["P0001", "40001", "55000", "55P03", "57014", "0A000"] {
        let db = Db::new().await;
        db.builder("linux", "true").await;
        db.execute(&format!(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''the release is frozen'' USING ERRCODE = ''{state}''; END';
             CREATE TRIGGER no BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.state = 'running' AND NEW.id = 1) EXECUTE FUNCTION no();
             INSERT INTO build_queue (builder) VALUES ('linux'), ('linux')"
        ))
        .await;
        let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
        assert_eq!(db.finished(2).await, "passed", "{state}");
        db.wait("SELECT waiting_because LIKE '%the release is frozen%' FROM queue_status WHERE build_id = 1").await;
    }
}
