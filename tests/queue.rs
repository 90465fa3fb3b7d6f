//! Order and steering: needs, coalescing, cancel, priority, pause, drain, and what waits why.

mod locks;

use std::time::{Duration, Instant};

use buildreactor::database::Database;
use buildreactor::model::BuildId;

use crate::support::{Daemon, Db, processes_of, temp_dir, text};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A builder whose builds run until the file comes back is made.
async fn gated(db: &Db, name: &str, folder: &crate::support::TempDir) -> std::path::PathBuf {
    let gate = folder.path().join(name);
    db.builder(name, &format!("echo waiting; while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    gate
}

async fn states(db: &Db) -> String {
    db.one("SELECT string_agg(id || ' ' || state, ', ' ORDER BY id) FROM builds").await
}

#[tokio::test]
async fn a_pair_inserted_in_one_statement_runs_in_order() {
    let db = Db::new().await;
    db.builder("compile", "echo compiled").await;
    db.builder("test", "echo tested").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let output = db.psql(&[
        "-qAt",
        "-c",
        "WITH c AS (INSERT INTO build_queue (builder) VALUES ('compile') RETURNING build_id)
         INSERT INTO build_queue (builder, needs) SELECT 'test', ARRAY[build_id] FROM c RETURNING build_id, needs, ready",
    ]);
    assert_eq!(text(&output.stdout), "2|{1}|f\n", "{}", text(&output.stderr));
    assert_eq!(db.finished(2).await, "passed");
    assert!(
        db.one::<bool>("SELECT t.started_at >= c.finished_at FROM builds c, builds t WHERE c.id = 1 AND t.id = 2")
            .await
    );
    assert_eq!(db.one::<Vec<i64>>("SELECT needs FROM builds WHERE id = 2").await, [1]);
}

#[tokio::test]
async fn a_need_that_does_not_pass_skips_what_needs_it_through_any_depth() {
    let db = Db::new().await;
    db.builder("good", "true").await;
    db.builder("bad", "exit 1").await;
    db.execute(
        "INSERT INTO build_queue (builder) VALUES ('good'), ('bad');
         INSERT INTO build_queue (builder, needs) VALUES ('good', '{1}'), ('good', '{1,2}'), ('good', '{4}'), ('good', '{5,3}')",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(states(&db).await, "1 passed, 2 failed, 3 passed, 4 skipped, 5 skipped, 6 skipped");
    assert_eq!(
        db.all::<String>("SELECT detail FROM builds WHERE state = 'skipped' ORDER BY id").await,
        [
            "needs build 2, which ended failed",
            "needs build 4, which ended skipped",
            "needs build 5, which ended skipped"
        ]
    );
    // Tried again after the cause is mended, in the order of the needs.
    db.execute("UPDATE builders SET script = 'true'; SELECT retry_build(2), retry_build(4)").await;
    assert_eq!(db.finished(4).await, "passed");
}

#[tokio::test]
async fn needs_that_do_not_exist_or_go_round_are_refused() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let refusal = db.refusal("INSERT INTO build_queue (builder, needs) VALUES ('b', '{99}')").await;
    assert!(refusal.starts_with("needs: there is no build 99"), "{refusal}");
    db.execute("INSERT INTO builds (builder) VALUES ('b'), ('b'), ('b')").await;
    db.execute("INSERT INTO build_queue (build_id, needs) VALUES (1, '{2}'), (2, '{3}')").await;
    let refusal = db.refusal("INSERT INTO build_queue (build_id, needs) VALUES (3, '{1}')").await;
    assert!(refusal.starts_with("needs go round in a circle: 3 needs 1 needs 2 needs 3"), "{refusal}");
    let refusal = db.refusal("INSERT INTO build_queue (build_id, needs) VALUES (3, '{3}')").await;
    assert!(refusal.starts_with("needs go round in a circle: 3 needs 3"), "{refusal}");
    let refusal = db.refusal("INSERT INTO build_queue (builder, needs) VALUES ('b', '{1,NULL}')").await;
    assert!(refusal.starts_with("needs: there is no build null"), "{refusal}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds").await, 3);
    // Described with them, and queued later.
    db.execute("INSERT INTO builds (builder, needs) VALUES ('b', '{987}'), ('b', '{5}'), ('b', '{7}'), ('b', '{6}')")
        .await;
    for (id, why) in [
        (4, "needs: there is no build 987"),
        (5, "needs go round in a circle: 5 needs 5"),
        (6, "needs go round in a circle: 6 needs 7 needs 6"),
    ] {
        let refusal = db.refusal(&format!("INSERT INTO build_queue (build_id) VALUES ({id})")).await;
        assert!(refusal.starts_with(why), "{refusal}");
    }
    // What is queued again has run, or waited, with them: pruned ones are no matter.
    db.execute("INSERT INTO builds (builder, state, queued_at, finished_at, needs) VALUES ('b', 'cancelled', now(), now(), '{987}'); INSERT INTO build_queue (build_id) VALUES (8)").await;
    assert!(db.one::<bool>("SELECT ready FROM build_queue WHERE build_id = 8").await);
}

/// A build that does not listen is killed soon, not only after what it would have at its timeout.
#[tokio::test]
async fn a_build_that_ignores_sigterm_is_cancelled_within_two_seconds_and_a_moment() {
    let db = Db::new().await;
    db.builder("deaf", "trap '' TERM INT HUP; echo deaf; while :; do sleep 0.2; done").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("deaf").await;
    db.wait("SELECT last_log_line = 'deaf' FROM running_builds").await;
    db.execute(&format!("SELECT cancel_build({id}, 'enough')")).await;
    assert_eq!(db.finished(id).await, "cancelled");
    let took: f64 = db.one("SELECT extract(epoch FROM finished_at - cancel_requested_at)::float8 FROM builds").await;
    println!("recorded after {took:.2} s");
    // Of a busy machine.
    assert!(took < 4.5, "{took}");
}

/// What two workers do after their results, with a row that both release: 300 times at the same instant.
#[tokio::test]
async fn two_needs_that_end_at_the_same_instant_release_their_build_once() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let (one, two) = (db.database(), db.database());
    db.execute(
        "CREATE TABLE released (build_id bigint);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS 'BEGIN INSERT INTO released VALUES (NEW.build_id); RETURN NULL; END';
         CREATE TRIGGER note AFTER UPDATE ON build_queue FOR EACH ROW WHEN (NEW.ready AND NOT OLD.ready) EXECUTE FUNCTION note()",
    )
    .await;
    for n in 0..300 {
        let first: i64 = db.one("INSERT INTO build_queue (builder) VALUES ('b') RETURNING build_id").await;
        let second: i64 = db.one("INSERT INTO build_queue (builder) VALUES ('b') RETURNING build_id").await;
        let needy: i64 = db
            .one(&format!(
                "INSERT INTO build_queue (builder, needs) VALUES ('b', '{{{first},{second}}}') RETURNING build_id"
            ))
            .await;
        let end = async |worker: &Database, id: i64| {
            db.execute(&format!(
                "SET buildreactor.session = 'daemon'; BEGIN;
                 UPDATE builds SET state = 'passed', attempt = 1, worker = 'w', started_at = now(), finished_at = now() WHERE id = {id};
                 DELETE FROM build_queue WHERE build_id = {id}; COMMIT; RESET buildreactor.session"
            ))
            .await;
            worker.settle(&[BuildId(id)], false, &mut None).await.unwrap();
        };
        tokio::join!(end(&one, first), end(&two, second));
        assert_eq!(
            db.one::<i64>(&format!("SELECT count(*) FROM released WHERE build_id = {needy}")).await,
            1,
            "round {n}: {:?}",
            db.all::<String>(&format!("SELECT concat_ws(' ', q::text, b.detail) FROM build_queue q JOIN builds b ON b.id = q.build_id WHERE q.build_id = {needy}")).await
        );
        db.execute("SET buildreactor.session = 'daemon'; DELETE FROM build_queue; RESET buildreactor.session").await;
    }
}

#[tokio::test]
async fn a_need_that_ended_while_the_insert_was_open_is_not_forgotten() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = gated(&db, "need", &folder).await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let need = db.enqueue("need").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let person = db.session().await;
    person
        .batch_execute(&format!("BEGIN; INSERT INTO build_queue (builder, needs) VALUES ('b', '{{{need}}}')"))
        .await
        .unwrap();
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(need).await, "passed", "the open transaction holds nothing up");
    person.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(need + 1).await, "passed");
}

#[tokio::test]
async fn fifty_concurrent_inserts_of_one_key_leave_one_waiting() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let mut sessions = Vec::new();
    for _ in 0..50 {
        sessions.push(db.session().await);
    }
    let inserts = sessions.into_iter().map(|session| {
        tokio::task::spawn(async move {
            session
                .batch_execute("INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', 'main')")
                .await
                .unwrap();
        })
    });
    for insert in inserts.collect::<Vec<_>>() {
        insert.await.unwrap();
    }
    // Those that did not see each other are settled by a worker.
    db.execute("SELECT pause_builder('b')").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 1 FROM build_queue").await;
    let counts = "SELECT string_agg(state || ' ' || n, ', ' ORDER BY state) FROM (SELECT state, count(*) n FROM builds GROUP BY 1) c";
    assert_eq!(db.one::<String>(counts).await, "queued 1, superseded 49");
    // Every chain leads to the one that waits.
    let ends: Vec<i64> = db
        .all(
            "WITH RECURSIVE chain AS (
                 SELECT id, superseded_by AS at FROM builds WHERE state = 'superseded'
                 UNION ALL SELECT c.id, b.superseded_by FROM chain c JOIN builds b ON b.id = c.at AND b.superseded_by IS NOT NULL)
             SELECT DISTINCT at FROM chain c WHERE EXISTS (SELECT FROM builds b WHERE b.id = c.at AND b.state = 'queued')",
        )
        .await;
    assert_eq!(ends, db.all::<i64>("SELECT build_id FROM build_queue").await);
    assert_eq!(ends.len(), 1);
}

#[tokio::test]
async fn a_running_build_is_never_superseded_and_the_newest_change_is_built() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = gated(&db, "b", &folder).await;
    db.builder("after", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let insert = "INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', 'main')";
    db.execute(insert).await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    db.execute(insert).await;
    // What needs a build that is superseded needs the one in its place.
    db.execute("INSERT INTO build_queue (builder, needs) VALUES ('after', '{2}')").await;
    db.execute(insert).await;
    db.execute("INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', 'other')").await;
    // The INSERT supersedes build 2, or the worker does where it had locked that row to look at it.
    db.wait("SELECT string_agg(id || ' ' || state, ', ' ORDER BY id) = '1 running, 2 superseded, 3 queued, 4 queued, 5 queued' FROM builds").await;
    db.wait("SELECT waiting_because = 'needs #4 (queued)' FROM queue_status WHERE build_id = 3").await;
    std::fs::write(&gate, "").unwrap();
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(states(&db).await, "1 passed, 2 superseded, 3 passed, 4 passed, 5 passed");
}

#[tokio::test]
async fn cancel_takes_a_waiting_build_at_once_and_stops_a_running_one_within_seconds() {
    let db = Db::new().await;
    db.builder("b", "echo up; sleep 600").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('b'), ('b')").await;
    db.wait("SELECT last_log_line = 'up' FROM running_builds").await;
    assert_eq!(db.one::<String>("SELECT cancel_build(2, 'not needed')").await, "cancelled");
    let asked = Instant::now();
    assert_eq!(db.one::<String>("SELECT cancel_build(1, 'wrong branch')").await, "its worker is told to stop it");
    assert_eq!(db.finished(1).await, "cancelled");
    println!("a running build was cancelled after {:?}", asked.elapsed());
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
    assert_eq!(
        db.all::<String>("SELECT concat_ws('|', state, detail, cancel_reason, cancel_requested_at IS NOT NULL) FROM builds ORDER BY id").await,
        ["cancelled|cancelled: wrong branch|wrong branch|t", "cancelled|cancelled by postgres: not needed|not needed|t"]
    );
    assert_eq!(db.one::<String>("SELECT state::text FROM build_attempts").await, "cancelled");
    assert_eq!(db.one::<String>("SELECT cancel_build(1)").await, "it had already ended: cancelled");
    assert!(db.refusal("SELECT cancel_build(77)").await.contains("there is no build 77"));
    db.execute("INSERT INTO builds (builder) VALUES ('b'); SELECT cancel_build(3)").await;
    assert_eq!(
        db.one::<String>("SELECT state::text FROM builds WHERE id = 3").await,
        "cancelled",
        "a described one too"
    );
    // Queued again, the cancel is forgotten.
    db.execute("UPDATE builders SET script = 'true'; SELECT retry_build(1)").await;
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn without_its_notify_a_cancel_is_seen_within_a_ping() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_LEASE_PING", "500ms")]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    db.execute("UPDATE builds SET cancel_requested_at = now(), cancel_reason = 'quietly'").await;
    assert_eq!(db.finished(id).await, "cancelled");
}

#[tokio::test]
async fn a_plain_delete_or_update_of_a_running_builds_row_is_refused_soon_with_the_function_to_use() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = gated(&db, "b", &folder).await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    let claim: i32 = db.one("SELECT claim_pid FROM running_builds").await;
    for sql in [
        format!("DELETE FROM build_queue WHERE build_id = {id}"),
        format!("UPDATE build_queue SET priority = 5 WHERE build_id = {id}"),
        "BEGIN; DELETE FROM build_queue".to_owned(),
    ] {
        // On a machine that is busy for long the statement gives up before the daemon has heard of it.
        let deadline = Instant::now() + crate::support::SOON;
        let told = loop {
            let asked = Instant::now();
            let told = text(&db.psql(&["-c", &sql]).stderr);
            println!("{sql}: after {:?}", asked.elapsed());
            if !told.contains("lock timeout") || Instant::now() > deadline {
                break told;
            }
        };
        assert!(
            told.contains(&format!("build {id} is running")) && told.contains("SELECT cancel_build("),
            "{sql}: {told}"
        );
        db.wait(&format!("SELECT claim_held AND claim_pid = {claim} FROM running_builds")).await;
    }
    assert_eq!(daemon.times_said("lost"), 0);
    // A waiting row beside it just works, and lock_timeout is as it was.
    let person = db.session().await;
    person
        .batch_execute("SET lock_timeout = '77s'; BEGIN; INSERT INTO build_queue (builder) VALUES ('b')")
        .await
        .unwrap();
    person
        .batch_execute(
            "UPDATE build_queue SET priority = 5 WHERE build_id = 2; DELETE FROM build_queue WHERE build_id = 2",
        )
        .await
        .unwrap();
    let timeout: String = person.query_one("SHOW lock_timeout", &[]).await.unwrap().get(0);
    assert_eq!(timeout, "77s");
    person.batch_execute("COMMIT").await.unwrap();
    // Whoever only locks waits, as ever, and the claim stays.
    person.batch_execute("SET lock_timeout = '3s'").await.unwrap();
    person.batch_execute("SELECT FROM build_queue FOR UPDATE").await.unwrap_err();
    assert!(db.one::<bool>(&format!("SELECT claim_held AND claim_pid = {claim} FROM running_builds")).await);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 1);
}

#[tokio::test]
async fn with_a_stopped_worker_the_statement_gives_up_by_itself() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    daemon.signal(nix::sys::signal::Signal::SIGSTOP);
    let asked = Instant::now();
    let refusal = db.refusal("DELETE FROM build_queue").await;
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert!(refusal.contains("lock timeout"), "{refusal}");
    assert_eq!(
        db.one::<String>("SELECT cancel_build(1, 'x')").await,
        "its worker is told to stop it",
        "which waits for nobody"
    );
    daemon.signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(db.finished(1).await, "cancelled");
}

#[tokio::test]
async fn priorities_change_while_builds_wait() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = gated(&db, "b", &folder).await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, 5)").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    assert_eq!(db.one::<String>("SELECT prioritize_build(5, 10)").await, "priority 10");
    assert_eq!(db.one::<String>("SELECT prioritize_build(1, 10)").await, "it is running");
    db.execute("UPDATE build_queue SET priority = 5 WHERE build_id = 4").await;
    assert_eq!(
        db.one::<String>("SELECT string_agg(build_id::text, ' ' ORDER BY position) FROM queue_status").await,
        "5 4 2 3"
    );
    std::fs::write(&gate, "").unwrap();
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(db.one::<String>("SELECT string_agg(id::text, ' ' ORDER BY started_at) FROM builds").await, "1 5 4 2 3");
}

#[tokio::test]
async fn a_build_whose_row_is_free_while_it_runs_is_said_to_run() {
    let db = Db::new().await;
    let folder = temp_dir();
    let _gate = gated(&db, "b", &folder).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('b', '2008-04-01')").await;
    db.wait("SELECT count(*) = 1 FROM running_builds WHERE claim_held").await;
    daemon.kill();
    db.wait("SELECT count(*) = 1 FROM running_builds WHERE NOT claim_held").await;
    assert_eq!(db.one::<String>("SELECT prioritize_build(1, 10)").await, "it is running");
    assert_eq!(db.one::<String>("SELECT retry_build(1)").await, "it is running already");
    assert_eq!(db.one::<String>("SELECT cancel_build(1)").await, "its worker is told to stop it");
}

#[tokio::test]
async fn pause_and_resume_and_drain_by_function() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    assert_eq!(db.one::<String>("SELECT pause_builder('b', 'release day')").await, "paused; what runs goes on");
    let id = db.enqueue("b").await;
    assert_eq!(db.one::<String>("SELECT waiting_because FROM queue_status").await, "builder b is paused: release day");
    assert_eq!(db.one::<String>("SELECT resume_builder('b')").await, "resumed");
    assert_eq!(db.finished(id).await, "passed");
    assert!(
        db.refusal("SELECT pause_builder('nope')")
            .await
            .contains("there is no builder \"nope\" |  | SELECT name FROM builders;")
    );
    assert!(
        db.refusal("SELECT drain_worker('nope')")
            .await
            .contains("there is no worker \"nope\" |  | SELECT worker FROM worker_status;")
    );
    db.execute("SELECT drain_worker('w')").await;
    assert_eq!(daemon.exited().await, Some(0));
    assert_eq!(db.one::<String>("SELECT status FROM worker_status").await, "stopped");
    // Started again it works again.
    daemon.spawn_again();
    daemon.ready().await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_worker_short_of_disk_claims_nothing_and_says_so() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let env = [HOUR, ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "1000000 TiB")];
    let mut full = Daemon::start(&db, "full", &env).await;
    db.enqueue("b").await;
    let because: String = db.one("SELECT waiting_because FROM queue_status").await;
    assert!(
        because.starts_with("worker full is out of disk: ") && because.contains("[worker] min_free_disk"),
        "{because}"
    );
    assert_eq!(full.stop().await, Some(0));
    let _other = Daemon::start(&db, "other", &[HOUR]).await;
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn columns_of_ones_own_with_any_name_are_in_nobodys_way() {
    let db = Db::new().await;
    for (n, name) in ["wanted", "older", "build", "said", "row", "open_needs", "broken", "now_state", "known"]
        .into_iter()
        .enumerate()
    {
        db.execute(&format!("ALTER TABLE builds ADD COLUMN {name} integer DEFAULT {n}")).await;
    }
    db.builder("b", "true").await;
    db.execute(
        "INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', 'k'), ('b', 'k');
         INSERT INTO build_queue (builder, needs) VALUES ('b', '{2}');
         SELECT prioritize_build(2, 1), cancel_build(3), retry_build(3), pause_builder('b'), resume_builder('b')",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    assert_eq!(db.finished(3).await, "passed");
    db.execute("SELECT prune_builds('0 s')").await;
}

#[tokio::test]
async fn pruning_goes_in_batches_and_leaves_what_is_needed() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         SELECT 'b', 'passed', 1, 'old', t, t, t, 0 FROM (SELECT now() - interval '100 days' + n * interval '1 s' AS t FROM generate_series(1, 2500) n) s;
         INSERT INTO build_attempts (build_id, attempt, worker, state, started_at, finished_at) SELECT id, 1, 'old', 'passed', started_at, finished_at FROM builds;
         INSERT INTO build_log (build_id, attempt, seq, content) SELECT id, 1, 1, 'x' FROM builds;
         INSERT INTO build_queue (builder, run_after) VALUES ('b', now() + interval '1 day')",
    )
    .await;
    let mut removed = Vec::new();
    loop {
        let n: i64 = db.one("SELECT prune_builds('90 days')").await;
        removed.push(n);
        if n == 0 {
            break;
        }
    }
    assert_eq!(removed, [1000, 1000, 500, 0]);
    assert_eq!(db.one::<String>("SELECT string_agg(state::text, ',') FROM builds").await, "queued");
    assert_eq!(
        db.one::<i64>("SELECT (SELECT count(*) FROM build_log) + (SELECT count(*) FROM build_attempts)").await,
        0
    );
    assert!(db.refusal("SELECT prune_builds(NULL)").await.contains("needs an age"));
}

#[tokio::test]
async fn a_build_does_not_supersede_what_it_needs_and_a_refused_row_supersedes_nothing() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET paused = true; INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', 'k')")
        .await;
    db.execute("INSERT INTO build_queue (builder, coalesce_key, needs) VALUES ('b', 'k', '{1}')").await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('b')").await;
    db.execute("INSERT INTO build_queue (build_id, coalesce_key) VALUES (3, 'k') ON CONFLICT DO NOTHING").await;
    assert_eq!(states(&db).await, "1 queued, 2 queued, 3 queued");
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SELECT resume_builder('b')").await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(states(&db).await, "1 passed, 2 passed, 3 passed");
}

#[tokio::test]
async fn deleting_a_build_that_others_need_skips_them() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('b'); INSERT INTO build_queue (builder, needs) VALUES ('b', '{1}'), ('b', '{2}')").await;
    db.execute("DELETE FROM build_queue WHERE build_id = 1").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(states(&db).await, "1 cancelled, 2 skipped, 3 skipped");
    assert_eq!(db.one::<String>("SELECT current_setting('lock_timeout')").await, "0");
}
