//! A dump of another cluster: nothing that it carries is compared with this one's transactions.

use std::time::Duration;

use crate::support::{Daemon, Db, cpu_ticks, server_with_port, text};

#[tokio::test]
async fn rows_of_transactions_that_lie_ahead_are_not_new_at_every_look() {
    for (what, xid) in [
        ("far ahead", "5000000000"),
        ("near", "200 + pg_current_xact_id()::text::bigint"),
        ("the last", "18446744073709551615"),
        ("the first", "3"),
    ] {
        let db = Db::new().await;
        db.execute("INSERT INTO builders (name, script) VALUES ('later', 'true'), ('now', 'true')").await;
        db.execute(&format!(
            "INSERT INTO build_queue (builder, run_after) SELECT 'later', now() + interval '1 day' FROM generate_series(1, 1500);
             SET session_replication_role = replica; UPDATE build_queue SET queued_xid = ({xid})::text::xid8; RESET session_replication_role"
        ))
        .await;
        let daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1h")]).await;
        // What comes is still seen at once, and so are the restored ones when they are due.
        for _ in 0..5 {
            let id = db.enqueue("now").await;
            assert_eq!(db.finished(id).await, "passed", "{what}");
        }
        db.execute("UPDATE build_queue SET run_after = now() WHERE build_id = 3").await;
        assert_eq!(db.finished(3).await, "passed", "{what}");
        let pid: i32 = db.one("SELECT pid FROM pg_stat_activity WHERE application_name = 'buildreactor w watch' AND datname = current_database()").await;
        let daemon_pid = daemon.pid();
        let before = (cpu_ticks(pid), cpu_ticks(daemon_pid));
        // A length of time is what is measured here.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let ticks = (cpu_ticks(pid) - before.0, cpu_ticks(daemon_pid) - before.1);
        assert!(ticks.0 < 30 && ticks.1 < 30, "{what}: {ticks:?} ticks of 10 ms in 4 s");
        drop(daemon);
    }
}

#[tokio::test]
async fn a_dump_is_restored_beside_a_running_worker_which_builds_what_waits_in_it() {
    let from = Db::new().await;
    from.execute("INSERT INTO builders (name, script) VALUES ('linux', 'true')").await;
    let first = from.enqueue("linux").await;
    from.execute(&format!("INSERT INTO build_queue (builder, needs) VALUES ('linux', '{{{first}}}')")).await;
    from.execute("UPDATE build_queue SET priority = 2 WHERE needs = '{}'; SET session_replication_role = replica; UPDATE build_queue SET queued_xid = '5000000000'").await;
    let bin = crate::support::server().bin_dir();
    let dump = std::process::Command::new(bin.join("pg_dump"))
        .args(["--data-only", "--disable-triggers", "-T", "build_schema_history", "-d", &from.url()])
        .output()
        .unwrap();
    assert!(dump.status.success(), "{dump:?}");
    let to = Db::new().await;
    // Triggers would take the rows for new ones: nothing is restored then.
    let folder = crate::support::temp_dir();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let with_triggers = text(&dump.stdout);
    let with_triggers: String =
        with_triggers.lines().filter(|line| !line.contains(" TRIGGER ALL")).flat_map(|line| [line, "\n"]).collect();
    std::fs::write(at("with_triggers.sql"), with_triggers).unwrap();
    let output = to.psql(&["-q", "--single-transaction", "-f", &at("with_triggers.sql")]);
    assert!(text(&output.stderr).contains("a new row of builds cannot be queued"), "{output:?}");
    let daemon = Daemon::start(&to, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    std::fs::write(at("dump.sql"), dump.stdout).unwrap();
    let output = to.psql(&["-q", "-f", &at("dump.sql")]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(to.finished(first + 1).await, "passed");
    assert_eq!(to.enqueue("linux").await, first + 2, "numbers go on");
    drop(daemon);
}

/// A NOTIFY cannot wait for a COMMIT PREPARED; PostgreSQL refuses, and nothing is queued.
#[tokio::test]
async fn a_transaction_that_queues_a_build_cannot_be_prepared() {
    let server = server_with_port(&[("max_prepared_transactions", "5")]).await;
    let db = Db::on(&server).await;
    db.builder("linux", "true").await;
    db.execute("BEGIN; INSERT INTO build_queue (builder) VALUES ('linux')").await;
    let refusal = db.refusal("PREPARE TRANSACTION 'both'").await;
    assert!(
        refusal.contains("cannot PREPARE a transaction that has executed LISTEN, UNLISTEN, or NOTIFY"),
        "{refusal}"
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds").await, 0);
    // What the documents say to do: describe it in that transaction, queue it after.
    db.execute("BEGIN; INSERT INTO builds (builder) VALUES ('linux'); PREPARE TRANSACTION 'both'").await;
    db.execute("COMMIT PREPARED 'both'").await;
    db.execute("INSERT INTO build_queue (build_id) SELECT id FROM builds WHERE state = 'described'").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 1);
}
