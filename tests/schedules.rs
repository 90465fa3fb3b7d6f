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

/// Restored, or older than what refuses it at the INSERT.
#[tokio::test]
async fn what_no_daemon_understands_is_disabled_and_says_why() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute(
        "SET session_replication_role = replica;
         INSERT INTO build_schedules (name, builder, cron, next_at) VALUES
            ('never', 'b', '0 0 30 2 *', NULL), ('minute', 'b', '61 * * * *', NULL), ('due', 'b', '0 0 * * FOO', clock_timestamp());
         RESET session_replication_role;
         INSERT INTO build_schedules (name, builder, cron) VALUES ('good', 'b', '0 0 1 1 *')",
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
        ("'s', 'b', '', 'UTC'", "cron must have 5 fields"),
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
    let refusal = db.refusal("UPDATE build_schedules SET cron = '0 25 * * *'").await;
    assert!(refusal.starts_with("cron \"0 25 * * *\": hour 25 is not in 0-23 |  | Minute, hour, "), "{refusal}");
    let refusal = db.refusal("UPDATE build_schedules SET properties = '[]'").await;
    assert!(refusal.contains("properties_are_a_json_object"), "{refusal}");
    let refusal = db.refusal("DELETE FROM builders").await;
    assert!(refusal.contains("builder_of_a_schedule_exists"), "{refusal}");
}

/// Each is also tried in small letters, and with other blanks.
#[tokio::test]
async fn cron_texts_of_crontab_5_are_taken_and_planned() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let all = [
        "* * * * *",
        "0 0 * * *",
        "59 23 31 12 7",
        "0 0 1 1 0",
        "*/5 */2 */3 */4 */2",
        "0-59/7 0-23/5 1-31/10 1-12/3 0-7/2",
        "1,2,3-5,10-20/2 * * * *",
        "0 0 * JAN *",
        "0 0 * jan-MAR,Dec *",
        "0 0 * * MON",
        "0 0 * * mon-Fri,SUN",
        "0 0 * * SUN-SAT",
        "0 0 * MAR-11/2 TUE-6",
        "00 007 01 09 *",
        "0 0 5,* * 1",
        "0 0 *,5 * *,1",
        "*,5 * * * *",
        "*/90 * * * *",
        "0 0 29 2 *",
        "0 0 29 2 */7",
        "0 0 30 2 1",
        "0 0 30,28 2 *",
        "0 0 31 2,3 *",
        "0 0 31 2-12/2 *",
        "@yearly",
        "@annually",
        "@monthly",
        "@weekly",
        "@daily",
        "@midnight",
        "@hourly",
    ];
    let others = all.map(|text| format!(" \t{}  ", text.to_lowercase().replace(' ', "\t ")));
    for (at, cron) in all.map(str::to_owned).iter().chain(&others).enumerate() {
        db.execute(&format!("INSERT INTO build_schedules (name, builder, cron) VALUES ('s{at}', 'b', '{cron}')")).await;
    }
    // What the database takes the daemons understand.
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.wait("SELECT count(*) = 0 FROM build_schedules WHERE enabled AND next_at IS NULL").await;
    let refused = "SELECT cron || ': ' || coalesce(detail, '') FROM build_schedules WHERE NOT enabled";
    assert_eq!(db.all::<String>(refused).await, Vec::<String>::new());
}

#[tokio::test]
async fn what_crontab_5_does_not_have_is_refused_by_field_and_value() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    for (cron, why) in [
        ("60 * * * *", "minute 60 is not in 0-59"),
        ("0 24 * * *", "hour 24 is not in 0-23"),
        ("0 25 * * *", "hour 25 is not in 0-23"),
        ("0 0 0 * *", "day of month 0 is not in 1-31"),
        ("0 0 32 * *", "day of month 32 is not in 1-31"),
        ("0 0 * 0 *", "month 0 is not in 1-12 or JAN-DEC"),
        ("0 0 * 13 *", "month 13 is not in 1-12 or JAN-DEC"),
        ("0 0 * * 8", "day of week 8 is not in 0-7 or SUN-SAT"),
        ("0 0 * * 1-8", "day of week 8 is not in 0-7 or SUN-SAT"),
        ("0 0 * * 99999999999999999999", "day of week 99999999999999999999 is not in 0-7 or SUN-SAT"),
        ("1,2,61 * * * *", "minute 61 is not in 0-59"),
        ("0 0 * * FOO", "day of week FOO is not in 0-7 or SUN-SAT"),
        ("0 0 * * MONDAY", "day of week MONDAY is not in 0-7 or SUN-SAT"),
        ("0 0 * MON *", "month MON is not in 1-12 or JAN-DEC"),
        ("0 0 * * JAN", "day of week JAN is not in 0-7 or SUN-SAT"),
        ("0 0 FRI * *", "day of month FRI is not in 1-31"),
        ("x * * * *", "minute X is not in 0-59"),
        ("0 5-1 * * *", "hour 5-1 ends before it begins"),
        ("0 0 * * FRI-MON", "day of week FRI-MON ends before it begins"),
        ("0 0 * DEC-JAN *", "month DEC-JAN ends before it begins"),
        ("*/0 * * * *", "the step of minute */0 is not a number from 1 to 9999"),
        ("0 0-5/00 * * *", "the step of hour 0-5/00 is not a number from 1 to 9999"),
        ("0 0 */MON * *", "the step of day of month */MON is not a number from 1 to 9999"),
        ("5/15 * * * *", "minute 5/15 has a step without a range: 5-59/15"),
        ("0 0 L * *", "day of month L is not in 1-31"),
        ("0 0 15W * *", "day of month 15W is not in 1-31"),
        ("0 0 * * 5L", "day of week 5L is not in 0-7 or SUN-SAT"),
        ("0 0 * * FRI#2", "day of week \"FRI#2\" is not *, a value, a range a-b, or a step */n or a-b/n of crontab(5)"),
        ("0 0 ? * MON", "day of month \"?\" is not *"),
        ("H * * * *", "minute H is not in 0-59"),
        ("0~30 * * * *", "minute \"0~30\" is not *"),
        ("0 0 * * +MON", "day of week \"+MON\" is not *"),
        ("-5 * * * *", "minute \"-5\" is not *"),
        ("5- * * * *", "minute \"5-\" is not *"),
        ("1-2-3 * * * *", "minute \"1-2-3\" is not *"),
        ("*-5 * * * *", "minute \"*-5\" is not *"),
        ("*5 * * * *", "minute \"*5\" is not *"),
        ("** * * * *", "minute \"**\" is not *"),
        ("*/2/2 * * * *", "minute \"*/2/2\" is not *"),
        ("/2 * * * *", "minute \"/2\" is not *"),
        ("1,,2 * * * *", "minute \"\" is not *"),
        (", * * * *", "minute \"\" is not *"),
        ("1.5 * * * *", "minute \"1.5\" is not *"),
        ("\u{661} * * * *", "minute \"\u{661}\" is not *"),
        ("0 0 * * $(id)", "day of week \"$(ID)\" is not *"),
        ("@reboot", "@reboot has no meaning here"),
        ("@dayly", "there are @hourly, @daily, "),
        ("@every 5m", "there are @hourly, @daily, "),
        ("0 0 30 2 *", "it never comes: no month of 2 has a day 30"),
        ("0 0 31 APR,6,9,NOV *", "it never comes: no month of APR,6,9,NOV has a day 31"),
        ("0 0 30-31 2 */2", "it never comes: no month of 2 has a day 30"),
        ("0 0 31 2-6/2 *", "it never comes: no month of 2-6/2 has a day 31"),
    ] {
        let insert = format!("INSERT INTO build_schedules (name, builder, cron) VALUES ('s', 'b', '{cron}')");
        let refusal = db.refusal(&insert).await;
        assert!(refusal.starts_with(&format!("cron \"{cron}\": {why}")), "{refusal}");
        assert!(refusal.contains(" |  | Minute, hour, "), "{refusal}");
    }
    let refusal = db.refusal("INSERT INTO build_schedules (name, builder, cron) VALUES ('s', 'b', NULL)").await;
    assert!(refusal.contains("null value in column \"cron\""), "{refusal}");
    for long in [["1"; 120].join(","), "1 ".repeat(300)] {
        let insert = format!("INSERT INTO build_schedules (name, builder, cron) VALUES ('s', 'b', '{long} * * * *')");
        assert!(db.refusal(&insert).await.contains("cron"));
    }
}

/// `upper` of a Turkish database makes another letter of i.
#[tokio::test]
async fn names_of_days_and_months_do_not_depend_on_the_locale() {
    let db = Db::new().await;
    let turkish =
        "SELECT quote_ident(collname) FROM pg_collation WHERE collname IN ('tr-x-icu', 'tr_TR', 'tr_TR.utf8')";
    for collation in [vec!["\"C\"".to_owned()], db.all::<String>(turkish).await].concat() {
        for cron in ["0 0 * * fri", "0 0 * * FRI", "@midnight", "@MIDNIGHT"] {
            let refusals = format!("SELECT count(build_cron_refusal('{cron}' COLLATE {collation}))");
            assert_eq!(db.one::<i64>(&refusals).await, 0, "{cron} {collation}");
        }
    }
}
