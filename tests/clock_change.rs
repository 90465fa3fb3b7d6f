//! Schedules over the change of the clocks: three daemons, and a clock that this test turns.
//!
//! Everything is real but the time. In the catalog of the test's database another function has the name `pg_catalog.clock_timestamp`. It
//! adds an offset to what PostgreSQL's own one says: so the server's clock, by which all daemons go, stands where the table says.

use crate::support::{Daemon, Db};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A tick of a schedule in UTC, what the clocks in Berlin show then, the schedule, and when the tick fires where that is later.
type Tick = (&'static str, &'static str, &'static str, Option<&'static str>);

/// From there on, and what fires.
const SPRING: (&str, &[Tick]) = (
    "2027-03-27 22:30",
    &[
        ("2027-03-27 23:00", "00:00 CET", "hourly", None),
        ("2027-03-28 00:00", "01:00 CET", "hourly", None),
        // At 02:00 it is 03:00. There is no 02:30 this night: right after the gap. And no hour of the hourly one is missing.
        ("2027-03-28 01:00", "03:00 CEST", "hourly", None),
        ("2027-03-28 01:00", "03:00 CEST", "nightly", None),
        ("2027-03-28 02:00", "04:00 CEST", "hourly", None),
        ("2027-03-28 03:00", "05:00 CEST", "hourly", None),
        // The day is slept through: all its ticks are one build.
        ("2027-03-28 04:00", "06:00 CEST", "hourly", Some("2027-03-28 23:30")),
        ("2027-03-29 00:00", "02:00 CEST", "hourly", None),
        ("2027-03-29 00:30", "02:30 CEST", "nightly", None),
        ("2027-03-29 01:00", "03:00 CEST", "hourly", None),
    ],
);

const AUTUMN: (&str, &[Tick]) = (
    "2027-10-30 22:30",
    &[
        ("2027-10-30 23:00", "01:00 CEST", "hourly", None),
        ("2027-10-31 00:00", "02:00 CEST", "hourly", None),
        // 02:30 comes twice: the first one. 02:00 as well: the hourly one has both.
        ("2027-10-31 00:30", "02:30 CEST", "nightly", None),
        ("2027-10-31 01:00", "02:00 CET", "hourly", None),
        ("2027-10-31 02:00", "03:00 CET", "hourly", None),
        ("2027-10-31 03:00", "04:00 CET", "hourly", None),
        ("2027-10-31 04:00", "05:00 CET", "hourly", Some("2027-11-01 00:30")),
        ("2027-11-01 01:00", "02:00 CET", "hourly", None),
        ("2027-11-01 01:30", "02:30 CET", "nightly", None),
        ("2027-11-01 02:00", "03:00 CET", "hourly", None),
    ],
);

/// Turns the clock to `time`, in UTC, and has all daemons look at the schedules.
async fn turn(db: &Db, time: &str) {
    db.execute(&format!(
        "UPDATE turned SET by = timestamptz '{time}+00' - pg_catalog.true_clock_timestamp(); NOTIFY build_control, 'schedules'"
    ))
    .await;
}

#[tokio::test]
async fn two_schedules_over_a_change_of_the_clocks_and_three_daemons_fire_as_the_table_says() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET max_running = 9").await;
    db.execute(
        "CREATE TABLE turned (by interval NOT NULL);
         INSERT INTO turned VALUES ('0');
         SET allow_system_table_mods = on;
         UPDATE pg_proc SET proname = 'true_clock_timestamp' WHERE oid = 'pg_catalog.clock_timestamp'::regproc;
         CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
             'SELECT pg_catalog.true_clock_timestamp() + by FROM public.turned';
         RESET allow_system_table_mods;
         CREATE TABLE fired (n int GENERATED ALWAYS AS IDENTITY, tick timestamptz, schedule text, at timestamptz, build_id bigint);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.fired (tick, schedule, at, build_id) VALUES (OLD.next_at, NEW.name, NEW.last_at, NEW.last_build_id); RETURN NULL; END';
         CREATE TRIGGER note AFTER UPDATE ON build_schedules FOR EACH ROW
             WHEN (NEW.last_build_id IS DISTINCT FROM OLD.last_build_id) EXECUTE FUNCTION note()",
    )
    .await;
    let mut daemons = Vec::new();
    for worker in ["w1", "w2", "w3"] {
        daemons.push(Daemon::start(&db, worker, &[HOUR]).await);
    }
    db.execute(
        "INSERT INTO build_schedules (name, builder, cron, time_zone, enabled) VALUES
             ('nightly', 'b', '30 2 * * *', 'Europe/Berlin', false), ('hourly', 'b', '0 * * * *', 'Europe/Berlin', false)",
    )
    .await;
    let mut due = 0;
    for (from, ticks) in [SPRING, AUTUMN] {
        turn(&db, from).await;
        db.execute("UPDATE build_schedules SET enabled = true").await;
        db.wait("SELECT count(next_at) = 2 FROM build_schedules").await;
        let mut turned = "";
        for (tick, _, _, late) in ticks {
            due += 1;
            match late {
                // All three have a timer for it. Two at the same time: the clock is there already.
                None if *tick == turned => {}
                None => {
                    turned = tick;
                    let before: String =
                        db.one(&format!("SELECT (timestamp '{tick}' - interval '0.15 s')::text")).await;
                    turn(&db, &before).await;
                }
                Some(at) => turn(&db, at).await,
            }
            db.wait(&format!("SELECT count(*) >= {due} FROM fired")).await;
        }
        db.wait("SELECT count(*) = 0 FROM build_queue").await;
        db.execute("UPDATE build_schedules SET enabled = false").await;
    }
    for daemon in &mut daemons {
        assert_eq!(daemon.stop().await, Some(0));
    }
    let fired: Vec<String> = db
        .all(
            "SELECT concat_ws(' | ', to_char(tick AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'),
                              to_char(tick AT TIME ZONE 'Europe/Berlin', 'HH24:MI') || ' ' || CASE tick AT TIME ZONE 'Europe/Berlin' - tick AT TIME ZONE 'UTC' WHEN '1 hour' THEN 'CET' ELSE 'CEST' END,
                              schedule, to_char(date_trunc('minute', at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'))
             FROM fired ORDER BY tick, schedule",
        )
        .await;
    let table: Vec<String> = [SPRING, AUTUMN]
        .iter()
        .flat_map(|(_, ticks)| ticks.iter())
        .map(|(tick, berlin, schedule, late)| format!("{tick} | {berlin} | {schedule} | {}", late.unwrap_or(tick)))
        .collect();
    assert_eq!(fired, table);
    // Each of them one build, which ran once.
    assert_eq!(
        db.one::<String>(
            "SELECT concat_ws(' ', count(*), count(DISTINCT f.build_id), count(b.id), min(b.state::text), max(b.attempt), bool_and(b.reason = 'schedule ' || f.schedule))
             FROM fired f FULL JOIN builds b ON b.id = f.build_id"
        )
        .await,
        format!("{0} {0} {0} passed 1 t", table.len())
    );
    let said: usize = daemons.iter().map(|daemon| daemon.times_said("has queued build")).sum();
    assert_eq!(said, table.len());
}
