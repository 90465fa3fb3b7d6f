//! What a submitter may do, and what nothing that he does may hold up: others' builds, results, cancels.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::{Daemon, Db, connect, temp_dir};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// What the contract gives a person's statement that meets another's open transaction, and room for a busy machine.
const A_SECOND: Duration = Duration::from_secs(10);

/// Statements that a submitter may leave open, of build 1.
const OPEN: [&str; 6] = [
    "INSERT INTO build_queue (build_id) VALUES (1) ON CONFLICT DO NOTHING",
    "INSERT INTO build_queue (build_id, builder, run_after) VALUES (1, 'linux', '2100-01-01') ON CONFLICT DO NOTHING",
    "INSERT INTO build_queue (builder, needs) VALUES ('linux', '{1}')",
    "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'main')",
    "INSERT INTO builds (builder) VALUES ('linux')",
    "SELECT FROM queue_status; SELECT FROM running_builds; SELECT build_log_text(1)",
];

async fn as_role(db: &Db, role: &str) -> Client {
    connect(&db.url_as(role)).await
}

/// Inserts a statement's harmless sibling into an open transaction of bob's.
async fn leave_open(db: &Db, bob: &str, statement: &str) -> Client {
    let session = as_role(db, bob).await;
    session.batch_execute(&format!("BEGIN; {statement}")).await.unwrap();
    session
}

#[tokio::test]
async fn an_open_transaction_of_a_submitter_holds_up_no_start_no_result_and_no_cancel() {
    let db = Db::new().await;
    let end = db.with_roles();
    let (alice, bob) = (format!("alice_{end}"), format!("bob_{end}"));
    let folder = temp_dir();
    for statement in OPEN {
        let gate = folder.path().join("gate");
        let _removed = std::fs::remove_file(&gate);
        db.execute(
            "SET buildreactor.session = 'daemon'; DELETE FROM build_queue; RESET buildreactor.session; DELETE FROM builds; DELETE FROM builders;
             ALTER TABLE builds ALTER COLUMN id RESTART",
        )
        .await;
        db.builder("linux", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
        let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
        assert_eq!(db.ask_as(&alice, "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'main')"), "");
        db.wait("SELECT count(*) = 1 FROM running_builds").await;
        // While it runs: its result, and those who wait behind it.
        let open = leave_open(&db, &bob, statement).await;
        assert_eq!(
            db.ask_as(
                &alice,
                "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'main') RETURNING build_id > 1"
            ),
            "t"
        );
        std::fs::write(&gate, "").unwrap();
        assert_eq!(db.finished(1).await, "passed", "{statement}");
        db.wait("SELECT count(*) >= 1 FROM builds WHERE id > 1 AND state = 'passed'").await;
        open.batch_execute("ROLLBACK").await.unwrap();
        // While it waits at the head: its cancel, and the start of those behind it.
        db.execute("SELECT pause_builder('linux'); SELECT retry_build(1)").await;
        assert_eq!(db.ask_as(&alice, "INSERT INTO build_queue (builder) VALUES ('linux')"), "");
        let open = leave_open(&db, &bob, statement).await;
        let began = Instant::now();
        assert_eq!(db.ask_as(&alice, "SELECT prioritize_build(1, 7)"), "priority 7", "{statement}");
        db.execute("SELECT resume_builder('linux')").await;
        db.wait("SELECT count(*) = 0 FROM build_queue").await;
        assert_eq!(db.finished(1).await, "passed", "{statement}");
        assert_eq!(db.ask_as(&alice, "SELECT retry_build(1)"), "queued", "{statement}");
        let said = db.ask_as(&alice, "SELECT cancel_build(1)");
        assert!(!said.contains("ERROR"), "{statement}: {said}");
        assert!(began.elapsed() < 3 * A_SECOND, "{statement}: {:?}", began.elapsed());
        open.batch_execute("ROLLBACK").await.unwrap();
        daemon.stop().await;
    }
}

#[tokio::test]
async fn what_an_owners_open_transaction_holds_is_passed_over_and_named() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("ALTER TABLE builds ADD COLUMN note text; UPDATE builders SET max_running = 5").await;
    db.execute("SELECT pause_builder('linux')").await;
    let held = db.enqueue("linux").await;
    let open = db.session().await;
    open.batch_execute(&format!(
        "SET application_name = 'notebook'; BEGIN; UPDATE builds SET note = 'mine' WHERE id = {held}"
    ))
    .await
    .unwrap();
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute(
        "SELECT resume_builder('linux'); INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 20)",
    )
    .await;
    db.wait("SELECT count(*) = 20 FROM builds WHERE state = 'passed'").await;
    db.wait(&format!(
        "SELECT waiting_because LIKE 'its row in builds is held by an open transaction of postgres (notebook, process %)' FROM queue_status WHERE build_id = {held}"
    ))
    .await;
    for steer in ["cancel_build", "retry_build"] {
        let began = Instant::now();
        // Nothing that retry_build needs is held.
        let answer = match steer {
            "retry_build" => db.one::<String>(&format!("SELECT retry_build({held})")).await,
            _ => db.refusal(&format!("SELECT cancel_build({held})")).await,
        };
        assert!(began.elapsed() < A_SECOND, "{steer}: {:?}", began.elapsed());
        assert!(
            answer.contains("held by an open transaction of postgres (notebook, process")
                || answer == "it is queued already",
            "{answer}"
        );
    }
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(held).await, "passed");
}

#[tokio::test]
async fn a_result_that_waits_for_an_open_transaction_is_named_and_recorded_after_it() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("linux", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let build = db.enqueue("linux").await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let open = db.session().await;
    open.batch_execute(&format!(
        "SET application_name = 'notebook'; BEGIN; UPDATE builds SET reason = 'mine' WHERE id = {build}"
    ))
    .await
    .unwrap();
    std::fs::write(&gate, "").unwrap();
    db.wait("SELECT detail LIKE 'its result waits for an open transaction of postgres (notebook, process %)' FROM running_builds").await;
    daemon.says("the result of build 1.1, passed, waits for an open transaction of postgres (notebook, process ").await;
    let began = Instant::now();
    assert_eq!(db.one::<String>(&format!("SELECT cancel_build({build})")).await, "its worker is told to stop it");
    assert!(began.elapsed() < A_SECOND, "{:?}", began.elapsed());
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds").await, "others leave it alone");
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(build).await, "passed");
}

#[tokio::test]
async fn only_who_submitted_a_build_and_operators_queue_it_again_or_steer_it() {
    let db = Db::new().await;
    let end = db.with_roles();
    let [alice, bob, ann] = ["alice", "bob", "ann"].map(|name| format!("{name}_{end}"));
    db.builder("linux", "true").await;
    db.builder("bad", "exit 1").await;
    assert_eq!(db.ask_as(&alice, "INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id"), "1");
    assert_eq!(db.ask_as(&bob, "INSERT INTO build_queue (builder) VALUES ('bad') RETURNING build_id"), "2");
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    daemon.stop().await;
    assert_eq!(db.ask_as(&alice, "INSERT INTO builds (builder) VALUES ('linux') RETURNING id"), "3");
    let before: String = db.one("SELECT string_agg(b::text, ';' ORDER BY id) FROM builds b").await;
    for not_his in [
        "INSERT INTO build_queue (build_id, run_after) VALUES (1, '2100-01-01')",
        "INSERT INTO build_queue (build_id, needs) VALUES (1, '{2}')",
        "INSERT INTO build_queue (build_id) VALUES (1)",
        "INSERT INTO build_queue (build_id) SELECT 1",
        "INSERT INTO build_queue (build_id, priority) VALUES (3, -5)",
        "SELECT retry_build(1)",
        "SELECT cancel_build(1)",
        "SELECT cancel_build(3)",
        "SELECT prioritize_build(1, -5)",
    ] {
        let answer = db.ask_as(&bob, not_his);
        assert!(answer.contains(&format!("was submitted by {alice}: {bob} may not")), "{not_his}: {answer}");
        assert!(answer.contains("HINT:"), "{answer}");
    }
    assert_eq!(db.one::<String>("SELECT string_agg(b::text, ';' ORDER BY id) FROM builds b").await, before);
    // SET ROLE to what he is not gives him nothing.
    assert_eq!(db.ask_as(&alice, "SELECT retry_build(1)"), "queued");
    assert_eq!(db.one::<String>("SELECT queued_by FROM builds WHERE id = 1").await, alice);
    assert_eq!(db.ask_as(&bob, "SELECT prioritize_build(2, 5)"), "it is failed");
    assert_eq!(db.ask_as(&ann, "SELECT prioritize_build(1, 5)"), "priority 5");
    assert_eq!(db.ask_as(&ann, "SELECT cancel_build(1)"), "cancelled");
    assert_eq!(db.ask_as(&ann, "INSERT INTO build_queue (build_id) VALUES (1) RETURNING build_id"), "1");
    assert_eq!(db.one::<String>("SELECT queued_by FROM builds WHERE id = 1").await, ann);
    assert_eq!(
        db.ask_as(&bob, "INSERT INTO build_queue (build_id) VALUES (1) ON CONFLICT DO NOTHING"),
        "",
        "nothing happens"
    );
}

#[tokio::test]
async fn a_newer_build_takes_the_place_of_those_alone_that_would_not_start_before_it() {
    let db = Db::new().await;
    let end = db.with_roles();
    let [alice, bob] = ["alice", "bob"].map(|name| format!("{name}_{end}"));
    db.builder("linux", "true").await;
    db.execute("SELECT pause_builder('linux')").await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('linux')").await;
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    let insert = |role: &str, more: &str, values: &str| {
        let sql = format!(
            "INSERT INTO build_queue (builder, coalesce_key{more}) VALUES ('linux', 'main'{values}) RETURNING build_id"
        );
        db.ask_as(role, &sql).parse::<i64>().unwrap_or_else(|_| panic!("{sql}"))
    };
    let of_alice = insert(&alice, ", priority", ", 9");
    // None of bob's tricks ends it.
    insert(&bob, ", run_after", ", '2100-01-01'");
    insert(&bob, ", run_after", ", now() + interval '1 hour'");
    insert(&bob, ", needs", ", '{1}'");
    // Until the worker has gone through all of them: it settles these two after those.
    for role in [&alice, &bob] {
        assert_eq!(db.ask_as(role, "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'other')"), "");
    }
    db.wait("SELECT count(*) = 1 FROM build_queue WHERE coalesce_key = 'other'").await;
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {of_alice}")).await, "queued");
    // One that would start as soon does, with the priority that was given; who did it is on record.
    let of_bob = insert(&bob, ", priority", ", -100");
    assert_eq!(db.finished(of_alice).await, "superseded");
    let detail: String = db.one(&format!("SELECT detail FROM builds WHERE id = {of_alice}")).await;
    assert_eq!(detail, format!("superseded by build {of_bob} of {bob}"), "it was not alice who did it");
    assert_eq!(db.one::<i32>(&format!("SELECT priority FROM build_queue WHERE build_id = {of_bob}")).await, 9);
    db.wait("SELECT count(*) = 1 FROM build_queue WHERE coalesce_key = 'main'").await;
}

#[tokio::test]
async fn a_cancel_that_is_left_open_keeps_no_result_from_being_recorded() {
    let db = Db::new().await;
    let end = db.with_roles();
    let (alice, bob) = (format!("alice_{end}"), format!("bob_{end}"));
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("linux", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    assert_eq!(db.ask_as(&alice, "INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id"), "1");
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    let open = as_role(&db, &alice).await;
    open.batch_execute("BEGIN; SELECT cancel_build(1, 'perhaps')").await.unwrap();
    assert_eq!(db.ask_as(&bob, "INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id"), "2");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(1).await, "passed");
    assert_eq!(db.finished(2).await, "passed");
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.one::<String>("SELECT state::text FROM builds WHERE id = 1").await, "passed");
    db.wait("SELECT count(*) = 0 FROM build_cancels").await;
}

#[tokio::test]
async fn hundreds_of_held_rows_at_the_head_are_passed_over_and_named() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("SELECT pause_builder('linux'); INSERT INTO build_queue (builder, priority) SELECT 'linux', 9 FROM generate_series(1, 450)").await;
    let open = db.session().await;
    open.batch_execute("SET application_name = 'notebook'; BEGIN; SELECT FROM build_queue FOR UPDATE").await.unwrap();
    let behind = db.enqueue("linux").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SELECT resume_builder('linux')").await;
    assert_eq!(db.finished(behind).await, "passed");
    let because: String = db.one("SELECT waiting_because FROM queue_status WHERE build_id = 1").await;
    assert!(
        because.starts_with("its row in build_queue is held by an open transaction of postgres (notebook, "),
        "{because}"
    );
    // It does not try the same ones again and again.
    let commits = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    let (before, ticks): (i64, u64) = (db.one(commits).await, crate::support::cpu_ticks(daemon.pid()));
    let since: String = db.one("SELECT clock_timestamp()::text").await;
    db.wait(&format!("SELECT clock_timestamp() > timestamptz '{since}' + interval '8 s'")).await;
    let spent = (db.one::<i64>(commits).await - before, crate::support::cpu_ticks(daemon.pid()) - ticks);
    println!("in 8 s: {} transactions, {} ticks", spent.0, spent.1);
    assert!(spent.0 < 2000 && spent.1 < 200, "{spent:?}");
    open.batch_execute("COMMIT").await.unwrap();
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
}

#[tokio::test]
async fn a_cancels_reason_is_short_and_no_row_keeps_others_from_being_settled() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("SELECT pause_builder('linux'); INSERT INTO build_queue (builder) VALUES ('linux'), ('linux')").await;
    let refused = db.refusal("SELECT cancel_build(1, repeat('x', 10001))").await;
    assert!(refused.contains("the reason has 10001 bytes; at most 10000"), "{refused}");
    // A request that a trigger of somebody's refuses stands before another's.
    db.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not this one''; END';
         CREATE CONSTRAINT TRIGGER no AFTER UPDATE ON builds DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
             WHEN (NEW.id = 1 AND NEW.state = 'cancelled') EXECUTE FUNCTION no()",
    )
    .await;
    let holder = db.session().await;
    holder.batch_execute("BEGIN; SELECT FROM build_queue FOR UPDATE").await.unwrap();
    let said: Vec<String> = db.all("SELECT cancel_build(id, repeat('x', 10000)) FROM builds ORDER BY id").await;
    assert_eq!(said, ["it will be cancelled as soon as its row is free"; 2]);
    holder.batch_execute("COMMIT").await.unwrap();
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    assert_eq!(db.finished(2).await, "cancelled");
    db.wait("SELECT detail LIKE 'the database refuses to end or release it: not this one%' FROM builds WHERE id = 1")
        .await;
    db.execute("DROP TRIGGER no ON builds").await;
    assert_eq!(db.finished(1).await, "cancelled");
}
