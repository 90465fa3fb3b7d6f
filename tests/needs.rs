//! Builds that need others, in every shape: what hangs on a build never holds its result, and is settled without recursion.

use std::time::{Duration, Instant};

use crate::support::{Daemon, Db};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// Generous: the shapes below take a few seconds on a quiet machine.
const SOON: Duration = Duration::from_secs(60);

/// A failing build 1, and `more` builds of builder `b` whose needs are `needs`, an expression over n, 2 .. more + 1.
async fn shape(db: &Db, more: i64, needs: &str) {
    db.builder("b", "true").await;
    db.builder("bad", "exit 1").await;
    db.execute(&format!(
        "INSERT INTO build_queue (builder) VALUES ('bad');
         UPDATE builders SET paused = true WHERE name = 'bad';
         INSERT INTO build_queue (builder, needs) SELECT 'b', {needs} FROM generate_series(2, {more} + 1) AS n ORDER BY n"
    ))
    .await;
}

#[tokio::test]
async fn ten_thousand_builds_in_any_shape_are_skipped_in_seconds() {
    for (name, needs) in [
        ("a chain", "ARRAY[n - 1]"),
        ("a fan", "ARRAY[1]"),
        ("a tree", "ARRAY[n / 2]"),
        ("a ladder two wide", "CASE WHEN n < 4 THEN ARRAY[1] ELSE ARRAY[(n / 2) * 2 - 2, (n / 2) * 2 - 1] END"),
    ] {
        let db = Db::new().await;
        shape(&db, 10_000, needs).await;
        let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
        db.execute("SELECT resume_builder('bad')").await;
        assert_eq!(db.finished(1).await, "failed", "{name}");
        let began = Instant::now();
        db.wait_within(SOON, "SELECT count(*) = 0 FROM build_queue").await;
        println!("{name}: {:?}", began.elapsed());
        assert_eq!(db.one::<i64>("SELECT count(*) FROM builds WHERE state = 'skipped'").await, 10_000, "{name}");
        let last: String = db.one("SELECT detail FROM builds ORDER BY id DESC LIMIT 1").await;
        assert!(last.starts_with("needs build "), "{name}: {last}");
    }
}

#[tokio::test]
async fn a_long_chain_that_passes_runs_in_order() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute(
        "INSERT INTO build_queue (builder) VALUES ('b');
         INSERT INTO build_queue (builder, needs) SELECT 'b', ARRAY[n - 1] FROM generate_series(2, 100) AS n ORDER BY n",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    let order: Vec<i64> = db.all("SELECT id FROM builds WHERE state = 'passed' ORDER BY started_at").await;
    assert_eq!(order, (1..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn one_build_that_needs_ten_thousand_is_skipped_when_the_first_fails() {
    let db = Db::new().await;
    shape(&db, 9_999, "'{}'").await;
    db.execute(
        "UPDATE builders SET paused = true; INSERT INTO build_queue (builder, needs) SELECT 'b', array_agg(n) FROM generate_series(1, 10000) AS n",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SELECT resume_builder('bad')").await;
    assert_eq!(db.finished(10_001).await, "skipped");
}

#[tokio::test]
async fn a_result_is_recorded_whatever_becomes_of_what_hangs_on_it() {
    let db = Db::new().await;
    shape(&db, 3, "ARRAY[n - 1]").await;
    // A trigger of somebody's own refuses to skip a build; a person's open transaction holds another.
    db.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not this one''; END';
         CREATE TRIGGER no BEFORE UPDATE ON builds FOR EACH ROW WHEN (NEW.id = 3 AND NEW.state = 'skipped') EXECUTE FUNCTION no()",
    )
    .await;
    let person = db.session().await;
    person.batch_execute("BEGIN; SELECT FROM builds WHERE id = 2 FOR UPDATE").await.unwrap();
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    db.execute("SELECT resume_builder('bad')").await;
    assert_eq!(db.finished(1).await, "failed");
    person.batch_execute("COMMIT").await.unwrap();
    assert_eq!(db.finished(2).await, "skipped");
    // Another build is not kept from running meanwhile.
    let other = db.enqueue("b").await;
    assert_eq!(db.finished(other).await, "passed");
    assert_eq!(
        db.one::<String>("SELECT waiting_because FROM queue_status WHERE build_id = 3").await,
        "needs #2 (skipped); the database refuses to end or release it: not this one"
    );
    db.execute("DROP TRIGGER no ON builds").await;
    assert_eq!(db.finished(4).await, "skipped");
}

#[tokio::test]
async fn a_person_who_ends_a_build_has_what_needs_it_skipped_at_once() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("SELECT pause_builder('b')").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    for end in ["SELECT cancel_build(ID)", "DELETE FROM build_queue WHERE build_id = ID"] {
        let id = db.enqueue("b").await;
        db.execute(&format!("INSERT INTO build_queue (builder, needs) VALUES ('b', '{{{id}}}')")).await;
        db.execute(&end.replace("ID", &id.to_string())).await;
        assert_eq!(db.finished(id + 1).await, "skipped", "{end}");
    }
}

#[tokio::test]
async fn needs_of_many_ways_are_checked_once_each_and_a_circle_is_named() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    // 60 layers, eight wide: 8^60 ways. Described, so that they can be queued again.
    db.execute(
        "INSERT INTO builds (builder, needs) SELECT 'b', CASE WHEN n <= 8 THEN '{}' ELSE
             ARRAY(SELECT ((n - 1) / 8 - 1) * 8 + k FROM generate_series(1, 8) AS k)::bigint[] END FROM generate_series(1, 480) AS n ORDER BY n",
    )
    .await;
    let began = Instant::now();
    db.execute("INSERT INTO build_queue (build_id) VALUES (480)").await;
    db.execute("SELECT cancel_build(480), retry_build(480)").await;
    db.execute("UPDATE build_queue SET needs = '{479,470}' WHERE build_id = 480").await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    db.execute("UPDATE builds SET needs = '{480}' WHERE id = 3").await;
    let refused = db.refusal("INSERT INTO build_queue (build_id) VALUES (9)").await;
    assert!(refused.contains("needs go round in a circle: 9 needs 3 needs 480 needs "), "{refused}");
    db.execute("UPDATE builds SET needs = '{5}' WHERE id = 5").await;
    let refused = db.refusal("INSERT INTO build_queue (build_id) VALUES (5)").await;
    assert!(refused.contains("needs go round in a circle: 5 needs 5"), "{refused}");
}
