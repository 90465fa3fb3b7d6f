//! Every way to notice work, each made the only possible one.

use crate::support::{Daemon, Db, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

#[tokio::test]
async fn an_insert_starts_its_build_through_its_notify_alone() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    for _ in 0..3 {
        let id = db.enqueue("b").await;
        assert_eq!(db.finished(id).await, "passed");
    }
}

#[tokio::test]
async fn without_the_trigger_the_poll_finds_the_row() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "500ms")]).await;
    db.execute("ALTER TABLE build_queue DISABLE TRIGGER build_queue_wake").await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn a_row_written_with_all_triggers_disabled_is_built_too() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "500ms")]).await;
    // As a replica's apply process writes.
    db.execute(
        "INSERT INTO builds (builder) VALUES ('b');
         SET session_replication_role = replica; INSERT INTO build_queue (build_id, builder) VALUES (1, 'b')",
    )
    .await;
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn what_was_queued_before_the_daemon_came_is_built() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn rows_inserted_while_the_listener_was_away_start_at_once_when_it_is_back() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    // An outage: nobody may connect, and the sessions there are end.
    let admin = crate::support::connect(&crate::support::server().url("postgres")).await;
    admin.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", db.name())).await.unwrap();
    let ended: i64 = db
        .one("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'buildreactor%'")
        .await;
    assert!(ended >= 1);
    daemon.says("trying again until it works").await;
    let id = db.enqueue("b").await;
    let began = std::time::Instant::now();
    wait_for("5 s of outage", || async { began.elapsed() >= std::time::Duration::from_secs(5) }).await;
    assert_eq!(db.one::<String>("SELECT state::text FROM builds").await, "queued");
    assert_eq!(daemon.times_said("trying again until it works"), 1, "one line, not one a try");
    admin.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", db.name())).await.unwrap();
    assert_eq!(db.finished(id).await, "passed");
    daemon.says("connected again after").await;
}

#[tokio::test]
async fn a_row_for_later_starts_when_it_is_due_and_not_before() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('b', clock_timestamp() + interval '2 seconds')")
        .await;
    assert_eq!(db.finished(1).await, "passed");
    assert!(db.one::<bool>("SELECT started_at - queued_at BETWEEN '2 s' AND '30 s' FROM builds").await);
}

#[tokio::test]
async fn changes_of_a_builder_take_effect_at_once() {
    let db = Db::new().await;
    db.builder("b", "echo one").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("UPDATE builders SET paused = true, paused_reason = 'disk is being replaced'").await;
    let id = db.enqueue("b").await;
    db.builder("other", "true").await;
    let other = db.enqueue("other").await;
    assert_eq!(db.finished(other).await, "passed", "a builder that is new while the daemon runs");
    assert_eq!(
        db.one::<String>("SELECT waiting_because FROM queue_status").await,
        "builder b is paused: disk is being replaced"
    );
    db.execute("UPDATE builders SET paused = false, paused_reason = NULL, script = 'echo two' WHERE name = 'b'").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, "two\n");
}

#[tokio::test]
async fn ids_that_commit_out_of_order_are_not_overlooked() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let slow = db.session().await;
    slow.batch_execute("BEGIN; INSERT INTO build_queue (builder) VALUES ('b')").await.unwrap();
    let later = db.enqueue("b").await;
    assert_eq!(later, 2);
    assert_eq!(db.finished(later).await, "passed");
    slow.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn events_tell_of_start_and_finish_after_the_commit() {
    let db = Db::new().await;
    db.builder("b", "exit 3").await;
    db.execute(
        "ALTER TABLE builds ADD COLUMN \"Ticket\" text DEFAULT 'T-1', ADD COLUMN event text DEFAULT 'their own'",
    )
    .await;
    let (client, mut connection) = tokio_postgres::connect(&db.url(), tokio_postgres::NoTls).await.unwrap();
    let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
    let driver = tokio::task::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(note) = message {
                send.send(serde_json::from_str::<serde_json::Value>(note.payload()).unwrap()).unwrap();
            }
        }
    });
    client.batch_execute("LISTEN build_events").await.unwrap();
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.enqueue("b").await;
    for (event, state) in [("started", "running"), ("finished", "failed")] {
        let told = receive.recv().await.unwrap();
        assert_eq!(
            (&told["event"], &told["state"], &told["build_id"], &told["builder"], &told["attempt"], &told["worker"]),
            (&event.into(), &state.into(), &1.into(), &"b".into(), &1.into(), &"w".into())
        );
        assert!(told["at"].is_string());
        assert_eq!((&told["Ticket"], told.as_object().unwrap().len()), (&"T-1".into(), 8));
    }
    assert_eq!(db.one::<String>("SELECT state::text FROM builds").await, "failed");
    // Too long for a payload: without them.
    db.execute("ALTER TABLE builds ADD COLUMN story text DEFAULT repeat('x', 8000)").await;
    db.enqueue("b").await;
    for _ in 0..2 {
        assert_eq!(receive.recv().await.unwrap().as_object().unwrap().len(), 7);
    }
    driver.abort();
}

#[tokio::test]
async fn more_rows_at_once_than_a_look_takes_are_all_found() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.builder("c", "true").await;
    db.execute("UPDATE builders SET paused = true WHERE name = 'b'").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    // Some for later among them, and the last ones of another builder.
    db.execute(
        "INSERT INTO build_queue (builder, run_after) SELECT 'c', CASE WHEN n % 5 = 0 THEN now() + interval '1 day' END FROM generate_series(1, 1300) n;",
    )
    .await;
    let id = db.enqueue("c").await;
    db.execute(&format!("SELECT prioritize_build({id}, 9)")).await;
    assert_eq!(db.finished(id).await, "passed");
    db.execute("DELETE FROM build_queue WHERE build_id IN (SELECT q.build_id FROM build_queue q JOIN builds b ON b.id = q.build_id WHERE b.state = 'queued' AND q.build_id BETWEEN 1 AND 1200 FOR UPDATE OF q SKIP LOCKED)").await;
    db.wait("SELECT count(*) FILTER (WHERE ready) = 0 FROM build_queue").await;
}

#[tokio::test]
async fn a_due_row_that_somebody_holds_does_not_make_the_daemon_spin() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let person = db.session().await;
    db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('b', clock_timestamp() + interval '5 seconds')")
        .await;
    person.batch_execute("BEGIN; UPDATE build_queue SET priority = 1").await.unwrap();
    db.wait("SELECT run_after < clock_timestamp() FROM build_queue").await;
    let ticks = crate::support::cpu_ticks(daemon.pid());
    let began = std::time::Instant::now();
    wait_for("three seconds", || async { began.elapsed().as_secs() >= 3 }).await;
    assert!(crate::support::cpu_ticks(daemon.pid()) - ticks < 60, "no spin");
    person.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(1).await, "passed");
}
