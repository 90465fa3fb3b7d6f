//! Promises 1, 2, 3 and 5: who holds what, what people see, and that a held claim costs nobody.

use std::collections::HashMap;

use nix::sys::signal::Signal;

use crate::support::{Daemon, Db, buildreactor, temp_dir, text};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A builder whose builds run until the file GATE appears.
async fn gated(db: &Db, name: &str, gate: &std::path::Path) {
    db.builder(name, &format!("echo waiting; while [ ! -e {} ]; do sleep 0.05; done; echo done", gate.display())).await;
}

#[tokio::test]
async fn two_thousand_builds_over_ten_builders_and_three_daemons_run_once_each_in_order_and_within_limits() {
    let db = Db::new().await;
    let folder = temp_dir();
    let trace = folder.path().join("trace");
    // One line of below PIPE_BUF bytes, appended at once, for each side effect; times of one clock for all processes.
    let script = format!(
        "#!/bin/sh\nread up rest < /proc/uptime; echo \"S $up $BUILD_ID $BUILD_ATTEMPT $BUILD_BUILDER $BUILD_WORKER\" >> {0}\nread up rest < /proc/uptime; echo \"F $up $BUILD_ID $BUILD_ATTEMPT $BUILD_BUILDER $BUILD_WORKER\" >> {0}\n",
        trace.display()
    );
    for n in 0..10 {
        db.builder(&format!("b{n}"), &script).await;
    }
    // b0 may run three at once, over all workers.
    db.execute("UPDATE builders SET max_running = 3 WHERE name = 'b0'").await;
    db.execute("INSERT INTO build_queue (builder, priority) SELECT 'b' || n % 10, (n / 10) % 4 FROM generate_series(0, 1999) n").await;
    let mut daemons = Vec::new();
    for name in ["w1", "w2", "w3"] {
        daemons.push(Daemon::start(&db, name, &[("BUILDREACTOR_WORKER_SLOTS", "4"), HOUR]).await);
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(900);
    while db.one::<i64>("SELECT count(*) FROM build_queue").await > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "{} left",
            db.one::<i64>("SELECT count(*) FROM build_queue").await
        );
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM builds WHERE state = 'passed' AND attempt = 1 AND exit_code = 0").await,
        2000
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts WHERE state = 'passed'").await, 2000);

    let trace = std::fs::read_to_string(trace).unwrap();
    let mut started: HashMap<&str, usize> = HashMap::new();
    let mut order: HashMap<&str, Vec<i64>> = HashMap::new();
    let (mut by_builder, mut by_worker): (HashMap<&str, i32>, HashMap<&str, i32>) = Default::default();
    // Lines stand in the order in which they were appended, so this replays what really ran side by side.
    for line in trace.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [what, _, build, attempt, builder, worker] = fields[..] else { panic!("{line}") };
        assert_eq!(attempt, "1");
        let (b, w) = (by_builder.entry(builder).or_default(), by_worker.entry(worker).or_default());
        if what == "S" {
            *started.entry(build).or_default() += 1;
            order.entry(builder).or_default().push(build.parse().unwrap());
            *b += 1;
            *w += 1;
            assert!(*b <= if builder == "b0" { 3 } else { 1 }, "{builder} runs {b} at once");
            assert!(*w <= 4, "{worker} runs {w} at once");
        } else {
            *b -= 1;
            *w -= 1;
        }
    }
    assert_eq!(started.len(), 2000);
    assert!(started.values().all(|n| *n == 1), "no build ran twice");
    assert!(by_builder.values().chain(by_worker.values()).all(|n| *n == 0));
    for (builder, ran) in &order {
        if *builder == "b0" {
            continue; // Three at once: their first lines may overtake each other.
        }
        let due: Vec<i64> = db
            .all(&format!("SELECT id FROM builds WHERE builder = '{builder}' ORDER BY (((id - 1) / 10) % 4) DESC, id"))
            .await;
        assert_eq!(*ran, due, "order of {builder}");
    }
    let used: Vec<String> = db.all("SELECT DISTINCT worker FROM builds ORDER BY 1").await;
    assert_eq!(used, ["w1", "w2", "w3"], "all took part");
}

#[tokio::test]
async fn a_running_build_is_seen_by_others_and_its_row_is_held_by_one_idle_transaction() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    gated(&db, "b", &gate).await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT last_log_line = 'waiting' FROM running_builds").await;
    let row: String = db
        .one("SELECT concat_ws('|', build_id, builder, worker, attempt, claim_held, started_at IS NOT NULL, elapsed > '0') FROM running_builds")
        .await;
    assert_eq!(row, format!("{id}|b|w|1|t|t|t"));
    let holder: String =
        db.one("SELECT state FROM pg_stat_activity WHERE pid = (SELECT claim_pid FROM running_builds)").await;
    assert_eq!(holder, "idle in transaction");
    assert_eq!(db.all::<i64>("SELECT build_id FROM build_queue FOR UPDATE SKIP LOCKED").await, Vec::<i64>::new());
    assert_eq!(db.one::<String>("SELECT status || slots_used FROM builder_status").await, "busy1");
    // An ordinary role sees the same: the lock table is open to all.
    db.execute("DROP ROLE IF EXISTS viewer_of_claims; CREATE ROLE viewer_of_claims; GRANT SELECT ON running_builds TO viewer_of_claims").await;
    assert!(
        db.one::<bool>(
            "WITH r AS (SELECT set_config('role', 'viewer_of_claims', false)) SELECT claim_held FROM r, running_builds"
        )
        .await
    );
    db.execute("RESET ROLE; DROP OWNED BY viewer_of_claims; DROP ROLE viewer_of_claims").await;
    assert_eq!(db.one::<String>("SELECT state::text FROM build_attempts").await, "running");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM running_builds").await, 0);
}

#[tokio::test]
async fn verdict_attempt_and_dequeue_become_visible_together() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, 100)").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let mut looks = 0;
    while db.one::<i64>("SELECT count(*) FROM build_queue").await > 0 {
        looks += 1;
        let odd: i64 = db
            .one(
                "SELECT count(*) FROM builds b LEFT JOIN build_attempts a ON a.build_id = b.id AND a.attempt = b.attempt
                 LEFT JOIN build_queue q ON q.build_id = b.id
                 WHERE (b.finished_at IS NOT NULL) <> (a.finished_at IS NOT NULL) OR (b.finished_at IS NULL) <> (q.build_id IS NOT NULL)
                    OR (b.state = 'running') <> (a.state IS NOT DISTINCT FROM 'running')",
            )
            .await;
        assert_eq!(odd, 0);
    }
    assert!(looks > 10);
}

#[tokio::test]
async fn a_held_claim_makes_nobody_wait() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    gated(&db, "b", &gate).await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT last_log_line = 'waiting' FROM running_builds").await;
    let other = Db::empty().await;
    let session = db.session().await;
    // Anything that waits for the claim fails here, long before the claim ends.
    session.batch_execute("SET statement_timeout = '30s'").await.unwrap();
    for sql in [
        "CREATE INDEX CONCURRENTLY builds_reason ON builds (reason)",
        "CREATE INDEX CONCURRENTLY queue_reason ON build_queue (priority)",
        "ALTER TABLE builds ADD COLUMN branch text",
        "ALTER TABLE builders ADD COLUMN team text",
        "UPDATE builders SET description = 'new', max_running = 2",
        "UPDATE builds SET reason = 'noted while it runs'",
        "INSERT INTO build_queue (builder, run_after) VALUES ('b', now() + interval '1 day')",
        "UPDATE build_queue SET priority = 9 WHERE run_after IS NOT NULL",
        "DELETE FROM build_queue WHERE run_after IS NOT NULL",
        "INSERT INTO build_log (build_id, attempt, seq, content) VALUES (1, 1, 999, 'from elsewhere')",
        "VACUUM builds",
    ] {
        session.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    other.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) n; DELETE FROM t").await;
    let vacuumed = other.session().await;
    vacuumed.batch_execute("SET statement_timeout = '30s'").await.unwrap();
    vacuumed.batch_execute("VACUUM t").await.unwrap();
    assert_eq!(other.one::<i64>("SELECT pg_relation_size('t')").await, 0, "its dead rows were removable");
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(text(&output.stdout).contains("is up to date"), "{}", text(&output.stderr));
    // And one that has work to do.
    db.execute("DROP FUNCTION build_schema_api").await;
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let refusal = db.refusal(&format!("DELETE FROM builds WHERE id = {id}")).await;
    assert!(refusal.contains("is running"), "{refusal}");
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds").await);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_claim_pins_no_snapshot_while_its_build_runs() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    gated(&db, "b", &gate).await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_LEASE_PING", "3s")]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT last_log_line = 'waiting' FROM running_builds").await;
    // From before the first ping, which would close what the claim left open, to the second. One under way has a snapshot for an
    // instant, so: not twice between the same two of them.
    const BETWEEN: &str = "SELECT concat_ws(' ', state_change, CASE WHEN state = 'idle in transaction' AND backend_xmin IS NOT NULL THEN 'pinned' END)
        FROM pg_stat_activity WHERE pid = (SELECT claim_pid FROM running_builds)";
    let mut seen = std::collections::HashSet::new();
    let mut last = String::new();
    while seen.len() < 3 {
        let now: String = db.one(BETWEEN).await;
        assert!(now != last || !now.ends_with("pinned"), "{now}");
        seen.insert(now.clone());
        last = now;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // Nor does it hold locks on tables that people alter.
    let held: Vec<String> = db
        .all(
            "SELECT DISTINCT l.relation::regclass || ' ' || l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation AND c.relnamespace = 'public'::regnamespace
             WHERE l.pid = (SELECT claim_pid FROM running_builds) AND c.relkind = 'r' ORDER BY 1",
        )
        .await;
    assert_eq!(held, ["build_queue RowShareLock"]);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_daemon_killed_between_the_end_of_the_script_and_the_commit_leaves_nothing_half_recorded() {
    let db = Db::new().await;
    let folder = temp_dir();
    let (gate, flag) = (folder.path().join("gate"), folder.path().join("ended"));
    let script = "while [ ! -e {gate} ]; do sleep 0.05; done; echo out; touch {flag}";
    let script = script.replace("{gate}", gate.to_str().unwrap()).replace("{flag}", flag.to_str().unwrap());
    db.builder("b", &script).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_LEASE_GRACE", "50s")]).await;
    // The COMMIT cannot come: another session holds the row that the result goes to.
    let blocker = db.session().await;
    let id = db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    blocker.batch_execute("BEGIN; SELECT FROM builds FOR UPDATE").await.unwrap();
    std::fs::write(&gate, "").unwrap();
    crate::support::wait_for("the script's end", || async { flag.exists() }).await;
    db.wait(
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE '%claim'
           AND wait_event_type = 'Lock' AND query LIKE '-- Records the end%'",
    )
    .await;
    daemon.kill();
    // The server sees the dead client when it is to answer it, and at the latest when the lock is free.
    blocker.batch_execute("COMMIT").await.unwrap();
    db.wait("SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE '%claim'").await;
    let locked: Vec<i64> = db.all("SELECT build_id FROM build_queue FOR UPDATE SKIP LOCKED").await;
    assert_eq!(locked, [id], "the row is unlocked");
    assert_eq!(
        db.one::<String>("SELECT concat_ws('|', b.state, b.attempt, b.exit_code, a.state, a.exit_code, a.finished_at) FROM builds b JOIN build_attempts a ON a.build_id = b.id").await,
        "running|1|running"
    );
    assert!(!db.one::<bool>("SELECT claim_held FROM running_builds").await);
    // The same worker comes back, and finds the result that its keeper has kept.
    daemon.spawn_again();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(
        db.one::<String>(
            "SELECT string_agg(concat_ws(' ', attempt, state, exit_code, claims), ',') FROM build_attempts"
        )
        .await,
        "1 passed 0 2"
    );
    assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, "out\n");
}

#[tokio::test]
async fn a_dead_daemons_row_is_free_at_once_and_others_wait_for_grace() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    let small = [
        HOUR,
        ("BUILDREACTOR_LEASE_PING", "500ms"),
        ("BUILDREACTOR_LEASE_LEASE", "3s"),
        ("BUILDREACTOR_LEASE_GRACE", "13s"),
    ];
    let mut first = Daemon::start(&db, "first", &small).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds WHERE claim_held").await;
    let _second = Daemon::start(&db, "second", &small).await;
    db.execute("UPDATE builders SET script = 'true'").await;
    first.kill();
    let killed = std::time::Instant::now();
    db.wait("SELECT NOT claim_held FROM running_builds").await;
    let trees = crate::support::processes_of;
    db.wait("SELECT attempt = 2 OR state = 'queued' FROM builds").await;
    assert_eq!(trees(&first.state), Vec::<i32>::new(), "the dead daemon's tree is gone before another is started");
    assert_eq!(db.finished(id).await, "passed");
    let took = killed.elapsed();
    println!("ran elsewhere after {took:?}, with a grace of 13 s");
    let grace = std::time::Duration::from_secs(13);
    assert!(took >= grace && took < grace + std::time::Duration::from_secs(60), "{took:?}");
    assert_eq!(
        db.all::<String>("SELECT concat_ws(' ', attempt, worker, state, detail) FROM build_attempts ORDER BY attempt")
            .await,
        ["1 first lost worker `first` disappeared", "2 second passed"]
    );
}

#[tokio::test]
async fn one_daemon_a_worker_name() {
    let db = Db::new().await;
    let first = Daemon::start(&db, "w", &[HOUR]).await;
    let mut second = Daemon::spawn(&db.url(), "w", &[HOUR]);
    second.says("worker name `w` is in use by process").await;
    let pid = first.pid();
    assert!(second.has_said(&format!("process {pid} on ")));
    assert_eq!(second.exited().await, Some(75));
}

#[tokio::test]
async fn sigint_gives_builds_back_without_charging_an_attempt_and_sigusr1_finishes_them() {
    let db = Db::new().await;
    db.builder("b", "trap '' TERM; sleep 600 & wait; sleep 600").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.exited().await, Some(0));
    assert_eq!(crate::support::processes_of(&daemon.state), Vec::<i32>::new());
    assert_eq!(
        db.one::<String>(
            "SELECT concat_ws('|', b.state, b.detail, a.state) FROM builds b JOIN build_attempts a ON a.build_id = b.id"
        )
        .await,
        "queued|given back: worker `w` stopped|cancelled"
    );
    assert_eq!(db.one::<String>("SELECT status FROM worker_status").await, "stopped");
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.execute(&format!("UPDATE builders SET script = 'while [ ! -e {} ]; do sleep 0.05; done'", gate.display())).await;
    daemon.spawn_again();
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let waiting = db.enqueue("b").await;
    daemon.signal(Signal::SIGUSR1);
    db.wait("SELECT status = 'draining' FROM worker_status").await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(daemon.exited().await, Some(0));
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {id}")).await, "passed");
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {waiting}")).await, "queued");
}

#[tokio::test]
async fn labels_and_builder_patterns_decide_who_may_build() {
    let db = Db::new().await;
    db.builder("linux-x64", "true").await;
    db.builder("gpu-train", "true").await;
    db.builder("docs", "true").await;
    db.execute("UPDATE builders SET labels = '{gpu,big}' WHERE name = 'gpu-train'").await;
    let _plain = Daemon::start(&db, "plain", &[HOUR, ("BUILDREACTOR_WORKER_BUILDERS", "linux-*,gpu-*")]).await;
    let (gpu, docs, linux) = (db.enqueue("gpu-train").await, db.enqueue("docs").await, db.enqueue("linux-x64").await);
    assert_eq!(db.finished(linux).await, "passed");
    assert_eq!(
        db.all::<String>("SELECT builder || ': ' || waiting_because FROM queue_status ORDER BY 1").await,
        [
            "docs: no running worker takes builder docs ([worker] builders, labels)",
            "gpu-train: no running worker takes builder gpu-train with labels gpu, big ([worker] builders, labels)"
        ]
    );
    let labels = ("BUILDREACTOR_WORKER_LABELS", "big,gpu,fast");
    let _gpu = Daemon::start(&db, "gpu", &[HOUR, labels]).await;
    assert_eq!(db.finished(gpu).await, "passed");
    assert_eq!(db.finished(docs).await, "passed");
    assert_eq!(db.one::<String>(&format!("SELECT worker FROM builds WHERE id = {gpu}")).await, "gpu");
}

#[tokio::test]
async fn a_slot_freed_on_one_worker_wakes_the_other() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    gated(&db, "b2", &gate).await;
    db.execute("UPDATE builders SET script = (SELECT script FROM builders WHERE name = 'b2') WHERE name = 'b'").await;
    let mut first = Daemon::start(&db, "first", &[HOUR]).await;
    let one = db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let _second = Daemon::start(&db, "second", &[HOUR]).await;
    let two = db.enqueue("b").await;
    db.wait("SELECT waiting_because LIKE 'builder b is busy (1 of 1)' FROM queue_status").await;
    // The first may claim nothing more; so its end must reach the second, whose poll is an hour away.
    first.signal(Signal::SIGUSR1);
    db.wait("SELECT status = 'draining' FROM worker_status WHERE worker = 'first'").await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(one).await, "passed");
    assert_eq!(db.finished(two).await, "passed");
    assert_eq!(first.exited().await, Some(0));
    assert_eq!(db.one::<String>(&format!("SELECT worker FROM builds WHERE id = {two}")).await, "second");
}

#[tokio::test]
async fn a_slot_whose_claim_is_lost_for_a_while_is_given_to_nobody() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    gated(&db, "b", &gate).await;
    let env = [HOUR, ("BUILDREACTOR_LEASE_PING", "3s"), ("BUILDREACTOR_WORKER_SLOTS", "4")];
    let mut first = Daemon::start(&db, "first", &env).await;
    let _second = Daemon::start(&db, "second", &env).await;
    let one = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    let worker: String = db.one("SELECT worker FROM running_builds").await;
    // The loss is noticed with the next ping, 3 s away; until then the lock on the slot is free.
    db.execute("SELECT pg_terminate_backend((SELECT claim_pid FROM running_builds))").await;
    let two = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM running_builds").await, 1);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 1, "the second has not run");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(one).await, "passed");
    assert_eq!(db.finished(two).await, "passed");
    assert_eq!(db.one::<String>(&format!("SELECT worker FROM builds WHERE id = {one}")).await, worker);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 2, "each ran once");
    assert_eq!(first.stop().await, Some(0));
}

/// Three builds of b run; then `lower` takes the limit down to two.
async fn lowered_from_three_to_two(db: &Db, lower: &str) {
    let folder = temp_dir();
    // Each build of b waits for a gate of its own. A probe starts only where none of b does: those go before it.
    db.execute(&format!(
        "UPDATE builders SET script = 'while [ ! -e {}/$BUILD_ID ]; do sleep 0.05; done' WHERE name = 'b'",
        folder.path().display()
    ))
    .await;
    db.builder("probe", "true").await;
    let mut one = Daemon::start(db, "one", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3")]).await;
    db.execute("INSERT INTO build_queue (builder, priority) SELECT 'b', 1 FROM generate_series(1, 9)").await;
    db.wait("SELECT count(*) = 3 FROM running_builds WHERE claim_held").await;
    // From now on everything is started by the second worker, which has one slot and no memory of what the first one runs.
    one.signal(Signal::SIGUSR1);
    db.wait("SELECT status = 'draining' FROM worker_status").await;
    db.execute(lower).await;
    let _two = Daemon::start(db, "two", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "1")]).await;
    let by_slot: Vec<i64> = db.all("SELECT build_id FROM build_attempts ORDER BY slot, lock_units").await;
    let started = "SELECT count(*) FROM build_attempts a JOIN builds b ON b.id = a.build_id WHERE b.builder = 'b'";
    let end = async |id: i64| {
        std::fs::write(folder.path().join(id.to_string()), "").unwrap();
        assert_eq!(db.finished(id).await, "passed");
    };
    let probe = db.enqueue("probe").await;
    assert_eq!(db.finished(probe).await, "passed");
    assert_eq!(db.one::<i64>(started).await, 3, "three run: too many already");
    // The first slot, which the new limit still has, is free; but two run.
    end(by_slot[0]).await;
    let probe = db.enqueue("probe").await;
    db.wait(&format!("SELECT ({started}) > 3 OR state = 'passed' FROM builds WHERE id = {probe}")).await;
    assert_eq!(db.one::<i64>(started).await, 3, "two run: as many as may");
    end(by_slot[1]).await;
    db.wait(&format!("SELECT ({started}) = 4")).await;
    db.wait("SELECT count(*) = 2 FROM running_builds WHERE claim_held").await;
    end(by_slot[2]).await;
    assert_eq!(one.exited().await, Some(0));
    for id in 1..=9 {
        std::fs::write(folder.path().join(id.to_string()), "").unwrap();
    }
    db.wait("SELECT count(*) = 9 FROM builds WHERE builder = 'b' AND state = 'passed'").await;
}

#[tokio::test]
async fn a_limit_that_is_lowered_holds_from_then_on() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET max_running = 3").await;
    lowered_from_three_to_two(&db, "UPDATE builders SET max_running = 2 WHERE name = 'b'").await;
}

#[tokio::test]
async fn a_lock_whose_capacity_is_lowered_is_held_by_no_more_from_then_on() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute(
        "INSERT INTO build_locks (name, capacity) VALUES ('board', 3), ('other', 9);
         UPDATE builders SET max_running = 9, locks = '{board,other}'",
    )
    .await;
    lowered_from_three_to_two(&db, "UPDATE build_locks SET capacity = 2 WHERE name = 'board'").await;
}
