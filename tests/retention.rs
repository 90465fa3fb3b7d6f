//! `[retention]`: what goes, what stays, and that nobody is held up by it.

use std::time::{Duration, Instant};

use crate::support::{Daemon, Db, SOON, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const BUILDS: &str = "BUILDREACTOR_RETENTION_BUILDS";
const PER_BUILDER: &str = "BUILDREACTOR_RETENTION_BUILDS_PER_BUILDER";
const LOGS: &str = "BUILDREACTOR_RETENTION_LOGS";

/// Finished builds of a builder with an attempt and two pieces of log each; the n-th of them ended n days ago.
async fn history(db: &Db, builder: &str, count: i32) {
    finished(db, builder, count, "n * interval '1 day'").await;
}

/// The same, each ended `age` ago: an interval, in which n counts the builds from 1.
async fn finished(db: &Db, builder: &str, count: i32, age: &str) {
    // Without triggers: a hundred thousand rows would take their time.
    db.execute(&format!(
        "SET session_replication_role = replica;
         WITH built AS (
             INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
             SELECT '{builder}', 'passed', 1, 'old', t, t, t, 0 FROM (SELECT now() - ({age}) AS t FROM generate_series(1, {count}) n ORDER BY n DESC) s
             RETURNING id, started_at
         )
         INSERT INTO build_attempts (build_id, attempt, worker, state, started_at, finished_at, exit_code)
         SELECT id, 1, 'old', 'passed', started_at, started_at, 0 FROM built;
         INSERT INTO build_log (build_id, attempt, seq, content)
         SELECT a.build_id, 1, seq, 'line ' || seq FROM build_attempts a CROSS JOIN generate_series(1, 2) seq WHERE a.worker = 'old'
         ON CONFLICT DO NOTHING;
         RESET session_replication_role"
    ))
    .await;
}

/// How many finished builds a builder has, and how old the oldest is, in days.
async fn left(db: &Db, builder: &str) -> String {
    db.one(&format!(
        "SELECT count(*) || ' ' || coalesce(extract(day FROM now() - min(finished_at)), 0) FROM builds WHERE builder = '{builder}' AND finished_at IS NOT NULL"
    ))
    .await
}

#[tokio::test]
async fn nothing_is_deleted_unless_it_is_asked_for() {
    let db = Db::new().await;
    db.builder("a", "true").await;
    history(&db, "a", 10).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("a").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds").await, 11);
    assert!(!daemon.has_said("[retention]"));
}

#[tokio::test]
async fn builds_go_by_age_with_their_attempts_and_logs_but_not_what_waits_runs_or_is_needed() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("a", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    db.builder("b", "true").await;
    history(&db, "a", 10).await;
    history(&db, "b", 10).await;
    // The oldest of a: the first is needed, the second runs again, the third waits again.
    db.execute(
        "UPDATE builders SET paused = true WHERE name = 'b';
         INSERT INTO build_queue (build_id) VALUES (2), (3);
         INSERT INTO build_queue (builder, needs) VALUES ('b', '{2}')",
    )
    .await;
    // As an INSERT leaves it whose need ended before it committed. Somebody holds the row, so nobody settles it meanwhile.
    db.execute(
        "SET buildreactor.session = 'daemon'; UPDATE build_queue SET needs = '{1,2}' WHERE needs <> '{}'; RESET buildreactor.session",
    )
    .await;
    db.execute("BEGIN; SELECT FROM build_queue WHERE needs <> '{}' FOR UPDATE").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT claim_held FROM running_builds WHERE build_id = 2").await;
    let keep = [HOUR, (BUILDS, "5d 1h"), ("BUILDREACTOR_WORKER_BUILDERS", "none")];
    let mut pruner = Daemon::start(&db, "pruner", &keep).await;
    pruner.says("deleted what [retention] no longer keeps: 7 builds").await;
    assert_eq!(
        db.all::<i64>("SELECT id FROM builds ORDER BY id").await,
        [1, 2, 3, 6, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21]
    );
    for table in ["build_attempts", "build_log"] {
        let orphans = format!("SELECT count(*) FROM {table} t WHERE t.build_id NOT IN (SELECT id FROM builds)");
        assert_eq!(db.one::<i64>(&orphans).await, 0, "{table}");
    }
    db.execute("COMMIT").await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(2).await, "passed");
    assert_eq!(db.finished(3).await, "passed");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn only_so_many_builds_of_each_builder_are_kept_the_newest() {
    let db = Db::new().await;
    for name in ["many", "few", "same"] {
        db.builder(name, "true").await;
    }
    history(&db, "many", 230).await;
    history(&db, "few", 3).await;
    // All at the same instant: what was asked for last counts as the newest.
    finished(&db, "same", 20, "interval '1 day'").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, (PER_BUILDER, "7")]).await;
    daemon.says("deleted what [retention] no longer keeps: 236 builds").await;
    assert_eq!((left(&db, "many").await.as_str(), left(&db, "few").await.as_str()), ("7 7", "3 3"));
    let same: Vec<i64> = db.all("SELECT id FROM builds WHERE builder = 'same' ORDER BY id").await;
    assert_eq!(same, (247..=253).collect::<Vec<i64>>());
    // With an age as well, whichever keeps less. Next time, for this daemon: its rounds are an hour apart.
    daemon.stop().await;
    let both = [HOUR, (PER_BUILDER, "2"), (BUILDS, "60h")];
    let mut daemon = Daemon::start(&db, "w", &both).await;
    daemon.says("deleted what [retention] no longer keeps: 11 builds").await;
    assert_eq!((left(&db, "many").await.as_str(), left(&db, "few").await.as_str()), ("2 2", "2 2"));
    assert_eq!(left(&db, "same").await, "2 1");
}

#[tokio::test]
async fn logs_go_before_their_builds_and_rounds_follow_each_other() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("a", "true").await;
    db.builder("long", &format!("echo here; while [ ! -e {} ]; do sleep 0.05; done; exit 75", gate.display())).await;
    history(&db, "a", 130).await;
    db.enqueue("long").await;
    let keep = [HOUR, (LOGS, "11s"), ("BUILDREACTOR_WORKER_SLOTS", "1")];
    let mut daemon = Daemon::start(&db, "w", &keep).await;
    daemon.says("deleted what [retention] no longer keeps: 0 builds, 260 pieces of logs").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds WHERE builder = 'a'").await, 130);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts WHERE worker = 'old'").await, 130);
    // The log of what runs stays however long it does; here it was written a year ago.
    db.wait("SELECT last_log_line = 'here' FROM running_builds").await;
    db.execute("UPDATE build_log SET written_at = written_at - interval '1 year'").await;
    history(&db, "a", 1).await;
    wait_for("another round", || async { daemon.times_said("deleted what [retention] no longer keeps: ") >= 2 }).await;
    assert_eq!(db.one::<i64>("SELECT count(DISTINCT build_id) FROM build_log").await, 1);
    assert_eq!(db.one::<String>("SELECT last_log_line FROM running_builds").await, "here");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn one_daemon_prunes_at_a_time_and_leaves_promptly_when_told_to() {
    let db = Db::new().await;
    db.builder("a", "true").await;
    finished(&db, "a", 3000, "interval '1 hour' + n * interval '1 s'").await;
    // Each row takes a while, so that there is time to look, and tells who deletes it.
    db.execute(
        "CREATE TABLE pruners (pid int PRIMARY KEY);
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS
             'BEGIN PERFORM pg_sleep(0.001); INSERT INTO pruners VALUES (pg_backend_pid()) ON CONFLICT DO NOTHING; RETURN OLD; END';
         CREATE TRIGGER slow BEFORE DELETE ON builds FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    .await;
    const HOLDERS: &str = "SELECT l.pid FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 2041775267 AND l.objid = 318804952 AND l.granted
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let keep = [HOUR, (BUILDS, "1m")];
    let mut first = Daemon::start(&db, "first", &keep).await;
    db.wait(&format!("SELECT count(*) = 1 FROM ({HOLDERS}) p")).await;
    let holder: i32 = db.one(HOLDERS).await;
    db.wait("SELECT count(*) < 2900 FROM builds").await;
    let mut second = Daemon::start(&db, "second", &keep).await;
    let id = db.enqueue("a").await;
    assert_eq!(db.finished(id).await, "passed");
    // The second would have begun as it started.
    let left: i64 = db.one("SELECT count(*) FROM builds").await;
    db.wait(&format!("SELECT count(*) < {left} - 200 FROM builds")).await;
    assert_eq!(db.all::<i32>("SELECT pid FROM pruners").await, [holder]);
    // Stopped in the middle: neither the round nor a batch is waited for, and what is gone is gone.
    let told = Instant::now();
    assert_eq!(first.stop().await, Some(0));
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
    assert!(db.one::<i64>("SELECT count(*) FROM builds").await > 100);
    db.wait(&format!("SELECT count(*) = 0 FROM ({HOLDERS}) p")).await;
    assert!(!second.has_said("[retention]"), "its turn comes with its next round");
    assert_eq!(second.stop().await, Some(0));
    db.execute("DROP TRIGGER slow ON builds").await;
    second.spawn_again();
    second.says("deleted what [retention] no longer keeps").await;
    // Enqueued meanwhile, and younger than a minute.
    assert_eq!(db.all::<i64>("SELECT id FROM builds").await, [id]);
}

#[tokio::test]
async fn what_the_server_refuses_is_said_once_and_holds_up_no_other_builder() {
    let db = Db::new().await;
    for name in ["a", "b"] {
        db.builder(name, "true").await;
        history(&db, name, 10).await;
    }
    // Code of somebody's own that works for no build of a; and a count of tries, which no rollback takes back.
    db.execute(
        "CREATE SEQUENCE tries;
         CREATE FUNCTION tried() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS
             'BEGIN PERFORM nextval(''tries''); IF OLD.builder = ''a'' THEN DELETE FROM release; END IF; RETURN OLD; END';
         CREATE TRIGGER tried BEFORE DELETE ON builds FOR EACH ROW EXECUTE FUNCTION tried()",
    )
    .await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, (BUILDS, "10s"), (LOGS, "10s")]).await;
    daemon.says("cannot delete all that [retention] no longer keeps: cannot delete old builds").await;
    daemon.says("release").await;
    assert_eq!((left(&db, "a").await.as_str(), left(&db, "b").await.as_str()), ("10 10", "0 0"));
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_log").await, 0, "nor the logs");
    // The next round, one try for each builder.
    db.wait("SELECT last_value >= 12 FROM tries").await;
    assert_eq!(daemon.times_said("cannot delete"), 1);
    db.execute("CREATE TABLE release (build_id bigint)").await;
    db.wait("SELECT count(*) = 0 FROM builds").await;
    assert_eq!(daemon.times_said("cannot delete"), 1);
}

#[tokio::test]
async fn a_foreign_key_to_what_is_pruned_has_an_index_to_look_it_up_with() {
    let db = Db::new().await;
    // Without, each build deleted reads the whole table.
    let without: Vec<String> = db
        .all(
            "SELECT c.conrelid::regclass || '.' || c.conname FROM pg_constraint c
             WHERE c.contype = 'f' AND c.confrelid IN ('builds'::regclass, 'build_attempts'::regclass)
               AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indpred IS NULL
                               AND (i.indkey::int2[])[0:cardinality(c.conkey) - 1] @> c.conkey)",
        )
        .await;
    assert_eq!(without, Vec::<String>::new());
    assert!(
        db.one::<i64>("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND confrelid = 'builds'::regclass")
            .await
            >= 2
    );
}

/// Times from the COMMIT of an INSERT to the first thing that its script does, in milliseconds, one build after the other.
struct Starts<'a> {
    db: &'a Db,
    folder: &'a std::path::Path,
    took: Vec<f64>,
}

impl Starts<'_> {
    /// Takes one more.
    async fn sample(&mut self) {
        let id = self.db.enqueue("quick").await;
        let began = Instant::now();
        let mark = self.folder.join(id.to_string());
        while !mark.exists() {
            assert!(began.elapsed() < SOON, "build {id} does not start");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.took.push(began.elapsed().as_secs_f64() * 1000.0);
        assert_eq!(self.db.finished(id).await, "passed");
    }

    fn median(&self) -> f64 {
        let mut sorted = self.took.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

#[tokio::test]
async fn pruning_a_hundred_thousand_builds_does_not_double_the_time_a_build_takes_to_start() {
    const MANY: i32 = 100_000;
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("history", "true").await;
    db.builder("quick", &format!("touch {}/$BUILD_ID", folder.path().display())).await;
    db.builder("long", &format!("while [ ! -e {} ]; do sleep 0.2; done", gate.display())).await;
    let stage = || async {
        finished(&db, "history", MANY, "interval '100 days' + n * interval '1 s'").await;
        db.execute("VACUUM ANALYZE builds").await;
    };
    let starts = || Starts { db: &db, folder: folder.path(), took: Vec::new() };
    // The newest of them goes last, and is found without walking those that have gone.
    let rest = "SELECT EXISTS (SELECT FROM (SELECT finished_at FROM builds WHERE builder = 'history' ORDER BY finished_at DESC LIMIT 1) b)";
    stage().await;
    let _builds = Daemon::start(&db, "builds", &[HOUR]).await;
    // Runs all the while: what is deleted behind its claim stays as dead rows.
    db.enqueue("long").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    let mut warm = starts();
    for _ in 0..10 {
        warm.sample().await;
    }

    // By the daemon. A sample counts when builds were deleted after it as well as before; those that fell together with a batch,
    // not with a pause, are looked at once more by themselves.
    let mut quiet = starts();
    for _ in 0..100 {
        quiet.sample().await;
    }
    let began = Instant::now();
    let keep = [HOUR, (BUILDS, "90 days"), ("BUILDREACTOR_WORKER_BUILDERS", "none")];
    let mut pruner = Daemon::start(&db, "pruner", &keep).await;
    let (mut during, mut together) = (starts(), starts());
    const AT_IT: &str = "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '-- Deletes some finished%'";
    db.wait(AT_IT).await;
    loop {
        let asked: String = db.one("SELECT clock_timestamp()::text").await;
        during.sample().await;
        if !db.one::<bool>(rest).await {
            during.took.pop();
            break;
        }
        let at_once = format!("{AT_IT} AND (state = 'active' OR state_change >= '{asked}')");
        if db.one::<bool>(&at_once).await {
            together.took.extend(during.took.last());
        }
    }
    // The machine may have had less to do before than it has now.
    let mut afterwards = starts();
    for _ in 0..100 {
        afterwards.sample().await;
    }
    let calm = quiet.median().max(afterwards.median());
    pruner.says(&format!("deleted what [retention] no longer keeps: {MANY} builds")).await;
    println!(
        "the daemon deleted {MANY} builds in {:.1} s; median start before and after {calm:.1} ms ({} samples), during {:.1} ms ({}), during a batch {:.1} ms ({})",
        began.elapsed().as_secs_f64(),
        quiet.took.len(),
        during.median(),
        during.took.len(),
        together.median(),
        together.took.len()
    );
    assert!(during.median() < 2.0 * calm && together.median() < 2.0 * calm);
    assert!(during.took.len() >= 100 && together.took.len() >= 50, "enough for a median");
    assert_eq!(pruner.stop().await, Some(0));

    // By somebody who calls prune_builds again and again, without a pause.
    stage().await;
    let mut quiet = starts();
    for _ in 0..100 {
        quiet.sample().await;
    }
    let person = db.session().await;
    let mut during = starts();
    let pruned = async {
        let mut calls = Vec::new();
        loop {
            let began = Instant::now();
            let gone: i64 = person.query_one("SELECT prune_builds('90 days')", &[]).await.unwrap().get(0);
            if gone == 0 {
                return calls;
            }
            calls.push(began.elapsed().as_secs_f64() * 1000.0);
        }
    };
    let began = Instant::now();
    let mut pruned = std::pin::pin!(pruned);
    let calls = loop {
        tokio::select! {
            calls = &mut pruned => break calls,
            () = during.sample() => {}
        }
    };
    let took = began.elapsed();
    let mut afterwards = starts();
    for _ in 0..100 {
        afterwards.sample().await;
    }
    let calm = quiet.median().max(afterwards.median());
    println!(
        "{} calls of prune_builds took {:.1} s, the first {:.1} ms, the last {:.1} ms; median start before and after {calm:.1} ms ({} samples), during {:.1} ms ({})",
        calls.len(),
        took.as_secs_f64(),
        calls[0],
        calls[calls.len() - 1],
        quiet.took.len(),
        during.median(),
        during.took.len()
    );
    assert_eq!(calls.len(), MANY as usize / 1000);
    assert!(during.median() < 2.0 * calm);
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds WHERE builder = 'long'").await);
    std::fs::write(&gate, "").unwrap();
}
