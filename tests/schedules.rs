//! Builds by the clock. The poll is an hour throughout: nothing but a schedule's own timer and wake can explain a build.

use nix::sys::signal::Signal;

use crate::support::{Daemon, Db};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// Comes once a year, and not during a test: on another day.
const YEARLY: &str = "to_char(now() - interval '2 days', '0 0 FMDD FMMM *')";

/// A schedule of a builder of the same name. `columns` and `values` are more of them.
async fn schedule(db: &Db, name: &str, cron: &str, columns: &str, values: &str) {
    db.execute(&format!(
        "INSERT INTO build_schedules (name, builder, cron{columns}) VALUES ('{name}', '{name}', {cron}{values})"
    ))
    .await;
}

async fn builds(db: &Db) -> i64 {
    db.one("SELECT count(*) FROM builds").await
}

#[tokio::test]
async fn a_tick_is_one_build_however_many_daemons_run() {
    let db = Db::new().await;
    db.builder("nightly", "echo $PROP_BRANCH").await;
    let mut daemons = Vec::new();
    for name in ["w1", "w2", "w3"] {
        daemons.push(Daemon::start(&db, name, &[HOUR]).await);
    }
    // All three have it planned, and a timer for the same moment.
    schedule(
        &db,
        "nightly",
        YEARLY,
        ", next_at, properties",
        ", clock_timestamp() + interval '1 second', '{\"branch\": \"main\"}'",
    )
    .await;
    db.wait("SELECT last_build_id IS NOT NULL FROM build_schedules").await;
    assert_eq!(db.finished(1).await, "passed");
    // And one that is due at once, twenty times over: each is one build.
    for tick in 2..=21_i64 {
        db.execute("UPDATE build_schedules SET next_at = clock_timestamp()").await;
        db.wait(&format!("SELECT last_build_id = {tick} FROM build_schedules")).await;
        assert_eq!(db.finished(tick).await, "passed");
    }
    for daemon in &mut daemons {
        assert_eq!(daemon.stop().await, Some(0));
    }
    assert_eq!(builds(&db).await, 21);
    let said: usize = daemons.iter().map(|daemon| daemon.times_said("schedule nightly has queued build")).sum();
    assert_eq!(said, 21);
    assert_eq!(
        db.all::<String>("SELECT DISTINCT concat_ws('|', builder, reason, properties) FROM builds").await,
        ["nightly|schedule nightly|{\"branch\": \"main\"}"]
    );
    assert_eq!(db.one::<String>("SELECT build_log_text(1)").await.trim_end(), "main");
    assert!(
        db.one::<bool>(
            "SELECT next_at > now() + interval '300 days' AND last_at <= clock_timestamp() FROM build_schedules"
        )
        .await
    );
}

#[tokio::test]
async fn the_build_of_one_daemon_goes_to_another_that_is_idle() {
    let db = Db::new().await;
    db.builder("nightly", "true").await;
    let only = |builders| [HOUR, ("BUILDREACTOR_WORKER_BUILDERS", builders)];
    let other = Daemon::start(&db, "other", &only("nightly")).await;
    let _scheduler = Daemon::start(&db, "scheduler", &only("none")).await;
    // Stopped, it cannot be the one that queues it; its sessions live on.
    other.signal(Signal::SIGSTOP);
    schedule(&db, "nightly", YEARLY, ", next_at", ", clock_timestamp()").await;
    db.wait("SELECT last_build_id = 1 FROM build_schedules").await;
    other.signal(Signal::SIGCONT);
    assert_eq!(db.finished(1).await, "passed");
    assert!(!other.has_said("has queued build"));
}

#[tokio::test]
async fn ticks_missed_during_an_outage_are_one_build() {
    let db = Db::new().await;
    db.builder("hourly", "true").await;
    schedule(&db, "hourly", "'0 0 1 * *'", ", next_at", ", clock_timestamp() - interval '100 days'").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT next_at > clock_timestamp() FROM build_schedules").await;
    assert_eq!(db.finished(1).await, "passed");
    // What is changed while a daemon runs is seen by it: had there been a backlog, it would have come before.
    db.execute("UPDATE build_schedules SET next_at = clock_timestamp() - interval '100 days'").await;
    db.wait("SELECT last_build_id = 2 AND next_at > clock_timestamp() FROM build_schedules").await;
    assert_eq!(db.finished(2).await, "passed");
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(builds(&db).await, 2);
}

#[tokio::test]
async fn a_disabled_schedule_queues_nothing_until_it_is_enabled() {
    let db = Db::new().await;
    db.builder("off", "true").await;
    db.builder("on", "true").await;
    schedule(&db, "off", YEARLY, ", enabled, next_at", ", false, clock_timestamp() - interval '1 hour'").await;
    assert!(db.one::<bool>("SELECT next_at IS NULL FROM build_schedules").await);
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    schedule(&db, "on", YEARLY, ", next_at", ", clock_timestamp()").await;
    db.wait("SELECT last_build_id IS NOT NULL FROM build_schedules WHERE name = 'on'").await;
    assert_eq!(db.all::<String>("SELECT builder FROM builds").await, ["on"], "the same look has passed over the other");
    db.execute("UPDATE build_schedules SET enabled = true WHERE name = 'off'").await;
    db.wait("SELECT next_at > clock_timestamp() FROM build_schedules WHERE name = 'off'").await;
    db.execute("UPDATE build_schedules SET enabled = false").await;
    assert_eq!(db.one::<i64>("SELECT count(next_at) FROM build_schedules").await, 0);
    assert_eq!(builds(&db).await, 1);
}

#[tokio::test]
async fn a_change_takes_effect_at_once() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    schedule(&db, "b", "'30 2 1 1 *'", ", time_zone", ", 'europe/berlin'").await;
    let planned = |month: u32, zone: &str| {
        format!(
            "SELECT to_char(next_at AT TIME ZONE '{zone}', 'MM-DD HH24:MI') = '{month:02}-01 02:30' FROM build_schedules"
        )
    };
    db.wait(&planned(1, "Europe/Berlin")).await;
    assert_eq!(db.one::<String>("SELECT time_zone FROM build_schedules").await, "Europe/Berlin");
    db.execute("UPDATE build_schedules SET cron = '30 2 1 7 *'").await;
    db.wait(&planned(7, "Europe/Berlin")).await;
    db.execute("UPDATE build_schedules SET time_zone = 'America/New_York'").await;
    db.wait(&planned(7, "America/New_York")).await;
    // Other columns do not move it.
    let before: String = db.one("SELECT next_at::text FROM build_schedules").await;
    db.execute("UPDATE build_schedules SET properties = '{\"a\": 1}'").await;
    assert_eq!(db.one::<String>("SELECT next_at::text FROM build_schedules").await, before);
    assert_eq!(builds(&db).await, 0);
}

#[tokio::test]
async fn what_no_daemon_understands_is_disabled_and_says_why() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute(
        "INSERT INTO build_schedules (name, builder, cron, next_at) VALUES
            ('never', 'b', '0 0 30 2 *', NULL), ('minute', 'b', '61 * * * *', NULL), ('due', 'b', '0 0 * * FOO', clock_timestamp()),
            ('good', 'b', '0 0 1 1 *', NULL)",
    )
    .await;
    db.wait("SELECT count(*) = 3 FROM build_schedules WHERE NOT enabled").await;
    let details: Vec<String> = db
        .all("SELECT name || ': ' || detail FROM build_schedules WHERE NOT enabled AND next_at IS NULL ORDER BY name")
        .await;
    assert_eq!(details.len(), 3, "{details:?}");
    assert!(details[0].starts_with("due: cron `0 0 * * FOO`: "), "{details:?}");
    assert!(details[1].starts_with("minute: cron `61 * * * *`: "), "{details:?}");
    assert_eq!(details[2], "never: cron `0 0 30 2 *` never comes");
    db.wait("SELECT next_at IS NOT NULL FROM build_schedules WHERE name = 'good'").await;
    crate::support::wait_for("its words on each", || async { daemon.times_said("is disabled: ") == 3 }).await;
    // Mended.
    db.execute("UPDATE build_schedules SET cron = '0 0 28 2 *', enabled = true WHERE name = 'never'").await;
    db.wait("SELECT next_at IS NOT NULL AND detail IS NULL FROM build_schedules WHERE name = 'never'").await;
    assert_eq!(builds(&db).await, 0);
}

#[tokio::test]
async fn one_that_the_database_refuses_does_not_hold_up_the_others() {
    let db = Db::new().await;
    db.builder("bad", "true").await;
    db.builder("good", "true").await;
    // A rule of somebody's own.
    db.execute("ALTER TABLE builds ADD CONSTRAINT no_bad_builds CHECK (builder <> 'bad')").await;
    schedule(&db, "bad", YEARLY, ", next_at", ", clock_timestamp() - interval '1 hour'").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    daemon.says("schedule bad: ").await;
    schedule(&db, "good", YEARLY, ", next_at", ", clock_timestamp() + interval '1 second'").await;
    db.wait("SELECT last_build_id IS NOT NULL FROM build_schedules WHERE name = 'good'").await;
    db.execute("ALTER TABLE builds DROP CONSTRAINT no_bad_builds").await;
    db.wait("SELECT last_build_id IS NOT NULL FROM build_schedules WHERE name = 'bad'").await;
}

#[tokio::test]
async fn bad_schedules_are_refused_with_the_cure() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    for (values, expected) in [
        ("'s', 'b', '0 0 * *', 'UTC'", "cron must have 5 fields, not \"0 0 * *\" |  | Minute, hour, "),
        ("'s', 'b', '0 0 0 * * *', 'UTC'", "cron must have 5 fields"),
        ("'s', 'b', '@daily', 'UTC'", "cron must have 5 fields"),
        ("'s', 'b', '0 0 * * $(id)', 'UTC'", "cron must have 5 fields"),
        (
            "'s', 'b', '0 0 * * *', 'Mars/Olympus'",
            "there is no time zone \"Mars/Olympus\" |  | SELECT name FROM pg_timezone_names; ",
        ),
        ("'s', 'nope', '0 0 * * *', 'UTC'", "there is no builder \"nope\" |  | SELECT name FROM builders; "),
        ("'a b', 'b', '0 0 * * *', 'UTC'", "schedule_name_is_1_to_63_of_letters_digits_dot_underscore_minus"),
    ] {
        let sql = format!("INSERT INTO build_schedules (name, builder, cron, time_zone) VALUES ({values})");
        let refusal = db.refusal(&sql).await;
        assert!(refusal.contains(expected), "{sql}: {refusal}");
    }
    schedule(&db, "b", "'0 0 * * *'", "", "").await;
    let refusal = db.refusal("UPDATE build_schedules SET cron = 'daily'").await;
    assert!(refusal.starts_with("cron must have 5 fields, not \"daily\""), "{refusal}");
    let refusal = db.refusal("UPDATE build_schedules SET properties = '[]'").await;
    assert!(refusal.contains("properties_are_a_json_object"), "{refusal}");
    let refusal = db.refusal("DELETE FROM builders").await;
    assert!(refusal.contains("builder_of_a_schedule_exists"), "{refusal}");
}
