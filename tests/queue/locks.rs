//! `build_locks`: what no two builds may use at once, over all workers.

use super::{HOUR, gated};
use crate::support::{Daemon, Db, temp_dir};

#[tokio::test]
async fn a_lock_is_held_by_as_many_builds_as_it_has_units_over_all_workers() {
    let db = Db::new().await;
    let folder = temp_dir();
    let trace = folder.path().join("trace");
    db.execute("INSERT INTO build_locks (name, capacity) VALUES ('board', 1), ('licence', 2)").await;
    for name in ["a", "b", "c"] {
        db.builder(
            name,
            &format!("echo \"+ $BUILD_BUILDER\" >> {0}; sleep 0.02; echo \"- $BUILD_BUILDER\" >> {0}", trace.display()),
        )
        .await;
    }
    db.execute(
        "UPDATE builders SET max_running = 3, locks = CASE name WHEN 'a' THEN '{licence,board,board}' WHEN 'b' THEN '{board}' ELSE '{licence}' END::text[];
         INSERT INTO build_queue (builder) SELECT (ARRAY['a', 'b', 'c'])[1 + n % 3] FROM generate_series(1, 90) n",
    )
    .await;
    let env = [HOUR, ("BUILDREACTOR_WORKER_SLOTS", "4")];
    let (_one, _two) = (Daemon::start(&db, "one", &env).await, Daemon::start(&db, "two", &env).await);
    db.wait("SELECT count(*) = 90 FROM builds WHERE state = 'passed'").await;
    let (mut board, mut licence, mut most) = (0, 0, 0);
    for line in std::fs::read_to_string(trace).unwrap().lines() {
        let step = if line.starts_with('+') { 1 } else { -1 };
        board += if line.ends_with('a') || line.ends_with('b') { step } else { 0 };
        licence += if line.ends_with('a') || line.ends_with('c') { step } else { 0 };
        most = most.max(licence);
        assert!(board <= 1 && licence <= 2, "{line}: board {board}, licence {licence}");
    }
    assert_eq!(most, 2, "both units were used");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_attempts").await, 90);
}

#[tokio::test]
async fn a_build_that_needs_two_locks_is_not_starved_by_those_that_need_one() {
    let db = Db::new().await;
    db.execute("INSERT INTO build_locks (name) VALUES ('a'), ('b')").await;
    for (name, locks) in [("y", "{a}"), ("z", "{b}"), ("x", "{a,b}")] {
        db.builder(name, "sleep 0.1").await;
        db.execute(&format!("UPDATE builders SET max_running = 9, locks = '{locks}' WHERE name = '{name}'")).await;
    }
    // y and z always overlap, so without help there is no instant at which both locks are free.
    db.execute(
        "INSERT INTO build_queue (builder) VALUES ('y'), ('z'), ('x');
         INSERT INTO build_queue (builder) SELECT (ARRAY['y', 'z'])[1 + n % 2] FROM generate_series(1, 40) n",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "4")]).await;
    db.wait("SELECT count(*) = 43 FROM builds WHERE state = 'passed'").await;
    let before: i64 = db
        .one("SELECT count(*) FROM builds WHERE id > 3 AND started_at < (SELECT started_at FROM builds WHERE id = 3)")
        .await;
    assert!(before <= 2, "{before} later ones went first");
}

#[tokio::test]
async fn locks_that_do_not_exist_are_refused_and_one_in_use_is_named() {
    let db = Db::new().await;
    let folder = temp_dir();
    let refusal = db.refusal("INSERT INTO builders (name, script, locks) VALUES ('b', 'true', '{db}')").await;
    assert_eq!(
        refusal,
        "builder \"b\" names the lock \"db\", which does not exist |  | INSERT INTO build_locks (name, capacity) VALUES ('db', 1);"
    );
    db.execute("INSERT INTO build_locks (name) VALUES ('db')").await;
    let gate = gated(&db, "one", &folder).await;
    db.builder("two", "true").await;
    db.execute("UPDATE builders SET locks = '{db}'").await;
    assert!(db.refusal("DELETE FROM build_locks").await.contains("lock \"db\" is named by builder"));
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.enqueue("one").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let two = db.enqueue("two").await;
    // Not while it is being tried, which takes its slot for a moment.
    db.wait("SELECT waiting_because = 'waits for lock db (1 of 1 in use)' FROM queue_status").await;
    // A lock taken away from a builder, or made larger, takes effect at once.
    db.execute("UPDATE build_locks SET capacity = 2").await;
    assert_eq!(db.finished(two).await, "passed");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(1).await, "passed");
}
