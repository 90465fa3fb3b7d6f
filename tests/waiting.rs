//! Why a build waits: each cause that `queue_status.waiting_because` knows, brought about for real, with its exact words.

use nix::sys::signal::Signal;

use crate::support::{Daemon, Db, SOON};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// What a person sees of a build that waits.
async fn because(db: &Db, build: i64) -> String {
    db.one(&format!("SELECT waiting_because FROM queue_status WHERE build_id = {build}")).await
}

/// Whether nobody would start it: there is no time to expect.
async fn never(db: &Db, build: i64) -> bool {
    db.one(&format!("SELECT expected_start IS NULL FROM queue_status WHERE build_id = {build}")).await
}

#[tokio::test]
async fn a_paused_builder_is_named_with_the_reason_if_there_is_one() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SELECT pause_builder('b')").await;
    let id = db.enqueue("b").await;
    assert_eq!(because(&db, id).await, "builder b is paused");
    assert!(never(&db, id).await);
    db.execute("SELECT pause_builder('b', 'new disk')").await;
    assert_eq!(because(&db, id).await, "builder b is paused: new disk");
    // The pause is what to mend first, whatever else there is.
    db.execute("UPDATE build_queue SET run_after = now() + interval '1 day'").await;
    assert_eq!(because(&db, id).await, "builder b is paused: new disk");
    assert!(never(&db, id).await);
}

#[tokio::test]
async fn a_scheduled_build_says_when_in_the_time_zone_of_the_session() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("SET TimeZone = 'UTC'; INSERT INTO build_queue (builder, run_after) VALUES ('b', '2037-01-04 04:00')")
        .await;
    assert_eq!(because(&db, 1).await, "scheduled for 2037-01-04 04:00:00 UTC");
    assert!(db.one::<bool>("SELECT expected_start = run_after FROM queue_status").await);
    db.execute("SET TimeZone = 'Europe/Prague'").await;
    assert_eq!(because(&db, 1).await, "scheduled for 2037-01-04 05:00:00 CET");
    db.execute("UPDATE build_queue SET run_after = NULL").await;
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn without_a_worker_it_says_how_to_start_one() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await;
    assert_eq!(because(&db, id).await, "no worker is running: start one with buildreactor run");
    assert!(never(&db, id).await);
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    assert_eq!(db.finished(id).await, "passed");
    // A worker that vanished without a goodbye is none.
    daemon.kill();
    db.wait("SELECT status = 'gone' FROM worker_status").await;
    let id = db.enqueue("b").await;
    assert_eq!(because(&db, id).await, "no worker is running: start one with buildreactor run");
    assert!(never(&db, id).await);
}

#[tokio::test]
async fn labels_or_a_name_that_no_worker_takes() {
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, script, labels) VALUES ('linux-gpu', 'true', '{gpu,arm}'), ('bsd', 'true', '{}'), ('linux.x', 'true', '{arm}')",
    )
    .await;
    let env = [HOUR, ("BUILDREACTOR_WORKER_LABELS", "arm,big"), ("BUILDREACTOR_WORKER_BUILDERS", "linux*")];
    let _daemon = Daemon::start(&db, "w", &env).await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('linux-gpu'), ('bsd'), ('linux.x')").await;
    assert_eq!(db.finished(3).await, "passed");
    assert_eq!(
        because(&db, 1).await,
        "no running worker takes builder linux-gpu with labels gpu, arm ([worker] builders, labels)"
    );
    assert_eq!(because(&db, 2).await, "no running worker takes builder bsd ([worker] builders, labels)");
    assert!(never(&db, 1).await && never(&db, 2).await);
    // The labels changed, it starts at once.
    db.execute("UPDATE builders SET labels = '{arm}' WHERE name = 'linux-gpu'").await;
    assert_eq!(db.finished(1).await, "passed");
}

#[tokio::test]
async fn a_busy_builder_says_how_many_run_and_when_the_next_may() {
    let db = Db::new().await;
    db.builder("b", "sleep 600").await;
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         SELECT 'b', 'passed', 1, 'w', now(), now() - interval '1 hour' - m * interval '1 min', now() - interval '1 hour', 0 FROM unnest('{9,10,80}'::int[]) m",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "4")]).await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, 3)").await;
    db.wait("SELECT slots_used = 1 FROM builder_status").await;
    db.wait("SELECT count(*) = 2 FROM queue_status").await;
    assert_eq!(because(&db, 5).await, "builder b is busy (1 of 1)");
    // Median 10 minutes: the second in the queue within twice that, after the first.
    assert!(
        db.one::<bool>(
            "SELECT bool_and(expected_start > now() AND expected_start <= clock_timestamp() + position * interval '10 min')
                    AND max(expected_start) FILTER (WHERE position = 2) > max(expected_start) FILTER (WHERE position = 1)
             FROM queue_status"
        )
        .await
    );
    assert_eq!(
        db.one::<String>("SELECT string_agg(position || ':' || build_id, ' ' ORDER BY position) FROM queue_status")
            .await,
        "1:5 2:6"
    );
    db.execute("UPDATE builders SET max_running = 2").await;
    db.wait("SELECT slots_used = 2 FROM builder_status").await;
    db.wait("SELECT count(*) = 1 FROM queue_status").await;
    assert_eq!(because(&db, 6).await, "builder b is busy (2 of 2)");
}

#[tokio::test]
async fn all_fitting_workers_may_be_busy_with_other_builders() {
    let db = Db::new().await;
    db.builder("a", "sleep 600").await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "1")]).await;
    let a = db.enqueue("a").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    let b = db.enqueue("b").await;
    assert_eq!(because(&db, b).await, "all fitting workers are busy");
    db.execute(&format!("SELECT cancel_build({a})")).await;
    assert_eq!(db.finished(b).await, "passed");
}

#[tokio::test]
async fn what_it_needs_is_named_with_its_state() {
    let db = Db::new().await;
    db.builder("a", "sleep 600").await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("INSERT INTO builds (builder) VALUES ('b'); INSERT INTO build_queue (builder) VALUES ('a'), ('a')")
        .await;
    db.wait("SELECT count(*) = 1 FROM running_builds").await;
    db.execute(
        "INSERT INTO build_queue (builder, needs) VALUES ('b', '{1}'), ('b', '{2}'), ('b', '{3,2,1}'), ('b', '{4}')",
    )
    .await;
    assert_eq!(
        db.all::<String>("SELECT waiting_because FROM queue_status WHERE builder = 'b' ORDER BY build_id").await,
        [
            "needs #1 (described, not queued)",
            "needs #2 (running)",
            "needs #1 (described, not queued), #2 (running), #3 (queued)",
            "needs #4 (queued)",
        ]
    );
    assert!(db.one::<bool>("SELECT bool_and(expected_start IS NULL) FROM queue_status WHERE builder = 'b'").await);
    db.execute("INSERT INTO build_queue (build_id) VALUES (1)").await;
    assert_eq!(db.finished(7).await, "passed", "needs 4, which needs 1");
}

#[tokio::test]
async fn between_two_tries_it_says_what_broke_and_when_the_next_is() {
    let db = Db::new().await;
    db.builder("b", "exit 75").await;
    // The pause of a second, made an hour: time to look.
    db.execute(
        "SET TimeZone = 'UTC';
         CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS
         'BEGIN IF NEW.run_after > OLD.run_after OR OLD.run_after IS NULL THEN NEW.run_after := NEW.run_after + interval ''1 hour''; END IF; RETURN NEW; END';
         CREATE TRIGGER a_later BEFORE UPDATE ON build_queue FOR EACH ROW EXECUTE FUNCTION later()",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    db.wait("SELECT waiting_because LIKE 'attempt 1 %' FROM queue_status").await;
    let at: String = db.one("SELECT to_char(run_after, 'HH24:MI:SS') FROM build_queue").await;
    let detail: String = db.one("SELECT detail FROM builds").await;
    assert_eq!(because(&db, id).await, format!("{detail}; next try at {at} UTC"));
    assert!(detail.starts_with("attempt 1 of 3 broke: ") && detail.contains("75"), "{detail}");
    assert!(db.one::<bool>("SELECT expected_start = run_after FROM queue_status").await);
    assert_eq!(db.one::<String>(&format!("SELECT retry_build({id})")).await, "queued, to start at once");
    db.wait("SELECT waiting_because LIKE 'attempt 2 of 3 broke: %; next try at __:__:__ UTC' FROM queue_status").await;
}

#[tokio::test]
async fn a_row_somebody_holds_while_it_is_cancelled_says_so() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await;
    let person = db.session().await;
    person.batch_execute("BEGIN; SELECT FROM build_queue FOR UPDATE").await.unwrap();
    assert_eq!(
        db.one::<String>(&format!("SELECT cancel_build({id}, 'oops')")).await,
        "it will be cancelled as soon as its row is free"
    );
    assert_eq!(because(&db, id).await, "it is being cancelled: a worker removes it when it next looks");
    person.batch_execute("COMMIT").await.unwrap();
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    assert_eq!(db.finished(id).await, "cancelled");
}

#[tokio::test]
async fn a_worker_out_of_disk_is_named_with_the_setting_to_change() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let full = Daemon::start(&db, "full", &[HOUR, ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "1000000 TiB")]).await;
    let id = db.enqueue("b").await;
    let said = because(&db, id).await;
    let free = said.strip_prefix("worker full is out of disk: ").and_then(|rest| rest.split_once(" MiB free in "));
    let (free, rest) = free.unwrap_or_else(|| panic!("{said}"));
    assert!(free.parse::<u64>().is_ok(), "{said}");
    let state = full.state.path().display().to_string();
    assert!(rest.starts_with(&state), "{said}");
    assert!(rest.ends_with(", 1048576000000 MiB wanted ([worker] min_free_disk)"), "{said}");
    assert!(never(&db, id).await);
}

#[tokio::test]
async fn what_nothing_keeps_from_starting_is_about_to_or_takes_its_turn() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    // A worker that is alive and does not get round to it.
    daemon.signal(Signal::SIGSTOP);
    let (first, second) = (db.enqueue("b").await, db.enqueue("b").await);
    assert_eq!(because(&db, first).await, "about to start");
    assert_eq!(because(&db, second).await, "about to start, after 1 other");
    db.execute(&format!("UPDATE build_queue SET priority = 1 WHERE build_id = {second}")).await;
    assert_eq!(because(&db, second).await, "about to start");
    assert_eq!(db.all::<i64>("SELECT build_id FROM queue_status ORDER BY position").await, [second, first]);
    // No history yet: the first now, as far as anybody knows; the other after who knows how long.
    assert!(
        db.one::<bool>(&format!(
            "SELECT bool_and(CASE position WHEN 1 THEN abs(extract(epoch FROM expected_start - clock_timestamp())) < {} ELSE expected_start IS NULL END) FROM queue_status",
            SOON.as_secs()
        ))
        .await
    );
    daemon.signal(Signal::SIGCONT);
    assert_eq!((db.finished(first).await.as_str(), db.finished(second).await.as_str()), ("passed", "passed"));
}
