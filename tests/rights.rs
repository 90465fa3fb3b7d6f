//! Where the owner has taken from PUBLIC what PostgreSQL gives to everybody, roles.sql gives each role all that it needs.

use std::process::{Command, Stdio};

use crate::support::{Daemon, Db, buildreactor, psql_program, temp_dir, text, unique};

/// Roles of the test's own, by what they are for.
struct Roles(u32);

impl Roles {
    fn of(&self, what: &str) -> String {
        format!("rights_{what}_{}", self.0)
    }

    async fn give(&self, db: &Db) {
        let names = ["worker", "submitter", "viewer", "operator"].map(|what| format!("{what}={}", self.of(what)));
        let mut arguments = vec!["-q"];
        for name in &names {
            arguments.extend(["-v", name.as_str()]);
        }
        arguments.extend(["-f", concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/roles.sql")]);
        let output = db.psql(&arguments);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        for what in ["worker", "submitter", "viewer", "operator"] {
            db.execute(&format!("ALTER ROLE {} LOGIN", self.of(what))).await;
        }
    }

    fn url(&self, db: &Db, what: &str) -> String {
        db.url().replace("user=postgres", &format!("user={}", self.of(what)))
    }

    /// What psql answers a role; its complaint where there is one.
    fn ask(&self, db: &Db, what: &str, sql: &str) -> String {
        let output = Command::new(psql_program())
            .args(["--no-psqlrc", "-qAt", "-d", &self.url(db, what), "-c", sql])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        text(if output.status.success() { &output.stdout } else { &output.stderr }).trim().to_owned()
    }
}

/// A database whose owner gives nobody anything by default.
async fn strict() -> Db {
    let db = Db::empty().await;
    db.execute(
        "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC; ALTER DEFAULT PRIVILEGES REVOKE USAGE ON TYPES FROM PUBLIC;
         REVOKE ALL ON SCHEMA public FROM PUBLIC",
    )
    .await;
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(output.status.success(), "{output:?}");
    db
}

#[tokio::test]
async fn each_role_can_do_all_that_is_documented_though_public_has_nothing() {
    let db = strict().await;
    let roles = Roles(unique());
    roles.give(&db).await;
    db.builder("linux", "echo built").await;
    db.builder("long", "echo line; sleep 600").await;
    db.execute("INSERT INTO build_locks (name) VALUES ('board'); UPDATE builders SET locks = '{board}', max_attempts = 2 WHERE name = 'linux'; INSERT INTO build_subscriptions (address, events) VALUES ('ann@example.org', '{finished}')").await;

    // A plain look at the catalog: whatever is called by what each may read or write is executable.
    for what in ["worker", "submitter", "viewer", "operator"] {
        let lacking: Vec<String> = db
            .all(&format!(
                "SELECT DISTINCT p.oid::regprocedure::text FROM pg_depend d
                 JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid AND p.pronamespace = 'public'::regnamespace
                 LEFT JOIN pg_trigger t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
                 WHERE d.classid IN ('pg_rewrite'::regclass, 'pg_constraint'::regclass, 'pg_class'::regclass, 'pg_attrdef'::regclass, 'pg_trigger'::regclass)
                   AND t.tgfoid IS DISTINCT FROM p.oid AND NOT has_function_privilege('{}', p.oid, 'EXECUTE')",
                roles.of(what)
            ))
            .await;
        assert_eq!(lacking, Vec::<String>::new(), "{what}");
    }

    let mut daemon = Daemon::start_at(&roles.url(&db, "worker"), "restricted", &[]).await;
    let statements = |what: &str| -> Vec<String> {
        let mut all: Vec<&str> = vec![
            "SELECT * FROM queue_status",
            "SELECT * FROM running_builds",
            "SELECT * FROM recent_builds",
            "SELECT * FROM builder_status",
            "SELECT * FROM worker_status",
            "SELECT * FROM build_stats",
            "SELECT * FROM mail_status",
            "SELECT build_log_text(1)",
            "SELECT build_log_text(1, 1)",
            "SELECT * FROM builds WHERE state = 'passed'::build_state",
            "SELECT * FROM build_attempts WHERE state <> 'lost'",
            "SELECT * FROM build_log",
            "SELECT id FROM builds WHERE build_state_is_final(state)",
            "CREATE TEMPORARY TABLE t AS SELECT id, state FROM builds",
        ];
        if what != "viewer" {
            all.extend([
                "INSERT INTO build_queue (builder) VALUES ('linux')",
                "INSERT INTO build_queue (builder, properties, priority, notify, run_after, reason) VALUES ('linux', '{\"a\": 1}', 2, '{bob@example.org}', now(), 'x')",
                "INSERT INTO build_queue (builder, needs) SELECT 'linux', ARRAY[max(id)] FROM builds",
                "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'k')", "INSERT INTO build_queue (builder, coalesce_key) VALUES ('linux', 'k')",
                "INSERT INTO builds (builder, properties, reason, notify) VALUES ('linux', '{}', NULL, '{ann@example.org}')",
                "INSERT INTO build_queue (build_id) SELECT id FROM builds WHERE state = 'described'",
                "COPY build_queue (builder) FROM PROGRAM 'false'",
            ]);
        }
        if what == "operator" {
            all.extend([
                "INSERT INTO build_queue (builder) VALUES ('long')", "SELECT prioritize_build(max(id), 3) FROM builds", "SELECT cancel_build(max(id), 'why') FROM builds",
                "SELECT retry_build(min(id)) FROM builds", "SELECT pause_builder('long', 'x')", "SELECT resume_builder('long')",
                "INSERT INTO build_schedules (name, builder, cron, time_zone) VALUES ('n', 'linux', '0 3 * * *', 'Europe/Berlin')", "UPDATE build_schedules SET enabled = false", "DELETE FROM build_schedules",
                "INSERT INTO build_subscriptions (address) VALUES ('eve@example.org')", "UPDATE build_subscriptions SET events = '{failed}' WHERE address LIKE 'eve%'", "DELETE FROM build_subscriptions WHERE address LIKE 'eve%'",
                "SELECT retry_mail(min(id)) FROM build_mail", "SELECT discard_mail(min(id)) FROM build_mail",
            ]);
        }
        all.into_iter().map(str::to_owned).collect()
    };
    let first = db.enqueue("linux").await;
    assert_eq!(db.finished(first).await, "passed");
    for what in ["viewer", "submitter", "operator"] {
        for sql in statements(what) {
            let answer = roles.ask(&db, what, &sql);
            // Only a superuser's COPY runs programs; the rights on the table were looked at before.
            let expected = sql.contains("PROGRAM");
            assert_eq!(answer.contains("ERROR"), expected, "{what}: {sql}: {answer}");
        }
        for command in [vec!["watch", "1"], vec!["log", "1"]] {
            let output = buildreactor(&[command.as_slice(), &["--database", &roles.url(&db, what)]].concat(), &[]);
            assert!(output.status.success(), "{what}: {output:?}");
        }
    }
    db.wait("SELECT count(*) = 0 FROM build_queue").await;
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM builds WHERE state NOT IN ('passed', 'cancelled', 'superseded')").await,
        0
    );
    assert!(!daemon.has_said("permission denied"), "{:?}", daemon.log);
    let running = db.enqueue("long").await;
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {running}")).await;
    roles.ask(&db, "operator", &format!("SELECT cancel_build({running})"));
    assert_eq!(db.finished(running).await, "cancelled");
    assert_eq!(daemon.stop().await, Some(0));
    let state = temp_dir();
    let check = || {
        buildreactor(
            &["check", "--database", &roles.url(&db, "worker")],
            &[("BUILDREACTOR_WORKER_STATE_DIR", state.path().to_str().unwrap())],
        )
    };
    let output = check();
    assert!(output.status.success(), "{}", text(&output.stdout));
    // Nobody else may come in, or put anything there.
    db.execute(&format!("CREATE ROLE {0} LOGIN", roles.of("nobody"))).await;
    assert!(roles.ask(&db, "nobody", "SELECT 1").contains("permission denied for database"));
    // What is taken away is named with its remedy, and the remedy helps.
    db.execute(&format!(
        "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM {0}; REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM {1}",
        roles.of("worker"),
        roles.of("viewer")
    ))
    .await;
    let output = check();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for line in text(&output.stdout).lines().filter(|line| line.contains(" privileges: ")) {
        db.execute(&line[line.find("GRANT").unwrap()..]).await;
    }
    let output = check();
    assert!(output.status.success(), "{}", text(&output.stdout));
    let daemon = Daemon::start_at(&roles.url(&db, "worker"), "again", &[]).await;
    let id = db.enqueue("linux").await;
    assert_eq!(db.finished(id).await, "passed");
    drop(daemon);
}
