//! What does not fit into the environment of a program, or is no script, is refused when its row is written, by a message that names the
//! limit. Rows that are older than the limits end in `error` at once, and say why.

use crate::support::{Daemon, Db};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

#[tokio::test]
async fn what_no_program_can_be_started_with_is_refused_when_it_is_written() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    for (value, message) in [
        ("script = repeat('#', 4194305)", "the script of builder b has 4194305 bytes, the limit is 4 MiB"),
        (
            "env = jsonb_build_object('BIG', repeat('x', 200000))",
            "variable BIG in env of builder b has 200005 bytes with its name, the limit is 128 KiB",
        ),
        ("env = jsonb_build_object('X', repeat('x', 131070))", "variable X in env of builder b has 131073 bytes"),
        ("env = jsonb_build_object('X', repeat('é', 65535))", "variable X in env of builder b has 131073 bytes"),
        ("env = jsonb_build_object(repeat('N', 131100), '')", "with its name, the limit is 128 KiB"),
        (
            "env = (SELECT jsonb_object_agg('V' || n, repeat('x', 100000)) FROM generate_series(1, 11) n)",
            "bytes, the limit is 1 MiB",
        ),
        (
            "env = (SELECT jsonb_object_agg('V' || n, '') FROM generate_series(1, 150000) n)",
            "bytes, the limit is 1 MiB",
        ),
    ] {
        let refusal = db.refusal(&format!("UPDATE builders SET {value}")).await;
        assert!(refusal.contains(message) && refusal.len() < 400, "{value}: {refusal}");
        let (column, value) = value.split_once(" = ").unwrap();
        let script = if column == "script" { "" } else { "script, " };
        let some = if column == "script" { "" } else { "'true', " };
        let refusal =
            db.refusal(&format!("INSERT INTO builders (name, {script}{column}) VALUES ('c', {some}{value})")).await;
        assert!(refusal.contains(message.split(" b ").last().unwrap()), "{value}: {refusal}");
    }
    for (properties, message) in [
        (
            "jsonb_build_object(repeat('k', 200000), 1)",
            "the name of a property has 200000 bytes, the limit is 200 | It begins with kkk",
        ),
        ("jsonb_build_object(repeat('k', 201), 1)", "has 201 bytes, the limit is 200"),
        ("jsonb_build_object('fine', 1, repeat('é', 101), 2)", "has 202 bytes, the limit is 200"),
        (
            "(SELECT jsonb_object_agg(n, '') FROM generate_series(1, 10001) n)",
            "there are 10001 properties, the limit is 10000",
        ),
    ] {
        db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('b', '2100-01-01')").await;
        for statement in [
            format!("INSERT INTO build_queue (builder, properties) VALUES ('b', {properties})"),
            format!("INSERT INTO builds (builder, properties) VALUES ('b', {properties})"),
            format!("UPDATE build_queue SET properties = {properties}"),
            format!("UPDATE builds SET properties = {properties}"),
            format!(
                "INSERT INTO build_schedules (name, builder, cron, properties) VALUES ('s', 'b', '0 0 * * *', {properties})"
            ),
            format!(
                "WITH s AS (SELECT {properties} AS p) INSERT INTO build_queue (builder, properties) SELECT 'b', p FROM s"
            ),
        ] {
            let refusal = db.refusal(&statement).await;
            assert!(refusal.contains(message) && refusal.len() < 400, "{statement}: {refusal}");
        }
    }
    // What an insert lets the author fill explicitly with nothing is not this trigger's business.
    db.execute("INSERT INTO build_schedules (name, builder, cron) VALUES ('s', 'b', '0 0 * * *')").await;
}

#[tokio::test]
async fn what_is_just_within_the_limits_runs() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.execute("UPDATE builders SET script = 'exit 0' || E'\\n' || repeat('#', 4194297)").await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    db.execute("UPDATE builders SET script = 'echo ${#A} ${#B} $(env | wc -c)'").await;
    db.execute("UPDATE builders SET env = jsonb_build_object('A', repeat('a', 131069), 'B', repeat('b', 131069)) || (SELECT jsonb_object_agg('C' || n, repeat('c', 100000)) FROM generate_series(1, 7) n)").await;
    db.execute("INSERT INTO build_queue (builder, properties) SELECT 'b', jsonb_object_agg(rpad(n::text, 200, 'k'), repeat('v', 60)) FROM generate_series(1, 3500) n").await;
    let id: i64 = db.one("SELECT max(id) FROM builds").await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert!(log.contains("131069 131069 ") && log.contains("too large for the environment"), "{log}");
}

#[tokio::test]
async fn rows_older_than_the_limits_end_in_error_once_and_say_why() {
    let db = Db::new().await;
    let old = "SET session_replication_role = replica";
    let new = "SET session_replication_role = origin";
    for name in ["one", "all", "property"] {
        db.builder(name, "echo ${PROP_FINE}").await;
    }
    db.execute(&format!(
        "{old}; UPDATE builders SET env = jsonb_build_object('BIG', repeat('x', 200000)) WHERE name = 'one';
         UPDATE builders SET env = (SELECT jsonb_object_agg('V' || n, repeat('x', 100000)) FROM generate_series(1, 30) n) WHERE name = 'all'; {new}"
    ))
    .await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    for (name, told) in [
        ("one", "`BIG` in builders.env has 200000 bytes; the kernel takes at most 131072 for a variable with its name"),
        ("all", "builders.env and what the worker adds come to "),
    ] {
        // They can be paused and changed otherwise, like all others.
        db.execute(&format!("SELECT pause_builder('{name}', 'too large'), resume_builder('{name}')")).await;
        let id = db.enqueue(name).await;
        assert_eq!(db.finished(id).await, "error");
        let (attempt, detail): (i32, String) = (
            db.one(&format!("SELECT attempt FROM builds WHERE id = {id}")).await,
            db.one(&format!("SELECT detail FROM builds WHERE id = {id}")).await,
        );
        assert!(attempt == 1 && detail.starts_with(told), "{attempt} {detail}");
    }
    // A name that is too long for a variable is in BUILD_FILE alone.
    db.execute("INSERT INTO build_queue (builder, run_after) VALUES ('property', '2100-01-01')").await;
    let id: i64 = db.one("SELECT max(id) FROM builds").await;
    db.execute(&format!("{old}; UPDATE builds SET properties = jsonb_build_object('fine', 'here', repeat('k', 200000), 1) WHERE id = {id}; {new}"))
        .await;
    // The reason of an old row can be changed without its properties.
    db.execute(&format!("UPDATE build_queue SET run_after = NULL, reason = 'now' WHERE build_id = {id}")).await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert!(
        log.contains("in BUILD_FILE alone: `kkk") && log.ends_with("(1 bytes)]\nhere\n") && log.len() < 300,
        "{log}"
    );
    assert_eq!(daemon.times_said("ended in error"), 2);
}
