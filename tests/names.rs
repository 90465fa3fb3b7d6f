//! Schemas of any name, and a migration that fails half way.

use std::process::Command;

use crate::support::{Daemon, Db, buildreactor, psql_program, server, temp_dir, text, unique};

/// A libpq string for the database, with the schema alone in the search_path.
fn url_with(db: &Db, schema: &str) -> String {
    let path = format!("\"{}\"", schema.replace('"', "\"\""));
    // Twice: for the options, where a backslash keeps a blank, and for the string, in quotes.
    let option: String =
        path.chars().map(|c| if matches!(c, ' ' | '\\') { format!("\\{c}") } else { c.to_string() }).collect();
    let value = format!("-csearch_path={option}").replace('\\', "\\\\").replace('\'', "\\'");
    let server = server();
    format!(
        "host='{}' port={} dbname={} user=postgres options='{value}'",
        server.socket_dir().display(),
        server.port(),
        db.name()
    )
}

#[tokio::test]
async fn everything_works_in_a_schema_of_any_name() {
    let roles = unique();
    for schema in [
        "Farm",
        "my farm",
        "a.b",
        "it's",
        "a$$b",
        "\"q\"",
        "order",
        "user",
        "größe",
        "建設",
        "back\\slash",
        "a;b--c",
        "$user x",
        "x%sy",
        "farm.farm",
        "FARM",
        &"n".repeat(63),
        &"ü".repeat(31),
    ] {
        let db = Db::empty().await;
        let quoted = format!("\"{}\"", schema.replace('"', "\"\""));
        db.execute(&format!("CREATE SCHEMA {quoted}")).await;
        let url = url_with(&db, schema);
        let output = buildreactor(&["migrate", "--database", &url], &[]);
        assert!(output.status.success(), "{schema}: {output:?}");
        let again = buildreactor(&["migrate", "--database", &url], &[]);
        assert!(text(&again.stdout).contains("is up to date"), "{schema}: {again:?}");
        let names = ["worker", "submitter", "viewer", "operator"].map(|role| format!("{role}=names_{role}_{roles}"));
        let mut psql = Command::new(psql_program());
        psql.args(["--no-psqlrc", "-q", "-d", &db.url(), "-v", &format!("schema={schema}")]);
        for name in &names {
            psql.args(["-v", name]);
        }
        let output = psql.args(["-f", concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/roles.sql")]).output().unwrap();
        assert!(output.status.success() && !text(&output.stderr).contains("WARNING"), "{schema}: {output:?}");
        db.execute(&format!("GRANT CONNECT ON DATABASE {} TO PUBLIC", db.name())).await;
        db.execute(&format!(
            "INSERT INTO {quoted}.builders (name, script) VALUES ('linux', 'echo built');
             INSERT INTO {quoted}.build_subscriptions (address, events) VALUES ('ann@example.org', '{{passed}}');
             INSERT INTO {quoted}.build_queue (builder) VALUES ('linux');
             INSERT INTO {quoted}.build_queue (builder, needs, coalesce_key) VALUES ('linux', '{{1}}', 'k'), ('linux', '{{1}}', 'k')"
        ))
        .await;
        let daemon = Daemon::start_at(&url, "w", &[("BUILDREACTOR_RETENTION_BUILDS", "1 day")]).await;
        db.wait(&format!("SELECT state = 'passed' FROM {quoted}.builds WHERE id = 3")).await;
        assert_eq!(db.one::<String>(&format!("SELECT {quoted}.build_log_text(3)")).await, "built\n", "{schema}");
        for view in [
            "queue_status",
            "running_builds",
            "recent_builds",
            "builder_status",
            "worker_status",
            "build_stats",
            "mail_status",
        ] {
            db.execute(&format!("SELECT * FROM {quoted}.{view}")).await;
        }
        db.execute(&format!(
            "SELECT {quoted}.retry_build(2); SELECT {quoted}.cancel_build(2); SELECT {quoted}.prune_builds('1 day');
             INSERT INTO {quoted}.builds (id, builder) VALUES (100, 'linux'); INSERT INTO {quoted}.builds (id, builder) VALUES (NULL, 'linux')"
        ))
        .await;
        assert_eq!(db.one::<i64>(&format!("SELECT max(id) FROM {quoted}.builds")).await, 101, "{schema}");
        for command in [vec!["watch", "3"], vec!["log", "3"]] {
            let output = buildreactor(&[command.as_slice(), &["--database", &url]].concat(), &[]);
            assert!(
                output.status.success()
                    && text(&output.stdout).contains(if command[0] == "log" { "built" } else { "passed" }),
                "{schema}: {output:?}"
            );
        }
        let state = temp_dir();
        let output = buildreactor(
            &["check", "--database", &url],
            &[("BUILDREACTOR_WORKER_STATE_DIR", state.path().to_str().unwrap())],
        );
        assert!(output.status.success(), "{schema}: {}", text(&output.stdout));
        drop(daemon);
        assert_eq!(
            db.one::<i64>("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace").await,
            0,
            "{schema}"
        );
    }
}

/// Each migration is applied whole or not at all, and so is all that is re-created after them; the next run goes on where one failed.
#[tokio::test]
async fn a_migration_that_fails_leaves_no_half_and_the_next_run_completes_it() {
    for (what, obstacle, removal, left) in [
        ("the third migration", "CREATE TABLE build_schedules ()", "DROP TABLE build_schedules", "1 2"),
        ("the sixth", "CREATE TYPE build_mail AS ENUM ()", "DROP TYPE build_mail", "1 2 3 4 5"),
        ("views", "CREATE TABLE builder_status ()", "DROP TABLE builder_status", "all"),
        (
            "functions",
            "CREATE FUNCTION prune_builds(interval) RETURNS text LANGUAGE sql AS 'SELECT ''''::text'",
            "DROP FUNCTION prune_builds(interval)",
            "all",
        ),
    ] {
        let db = Db::empty().await;
        db.execute(obstacle).await;
        let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
        assert!(!output.status.success(), "{what}: {output:?}");
        if left == "all" {
            assert_eq!(db.one::<i64>("SELECT count(*) FROM pg_trigger WHERE tgname = 'a_insert'").await, 0, "{what}");
            assert_eq!(db.one::<i64>("SELECT count(*) FROM pg_views WHERE schemaname = 'public'").await, 0, "{what}");
        } else {
            let versions: String =
                db.one("SELECT string_agg(version::text, ' ' ORDER BY version) FROM build_schema_history").await;
            assert_eq!(versions, left, "{what}");
        }
        db.execute(removal).await;
        let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
        assert!(output.status.success(), "{what}: {output:?}");
        db.builder("linux", "true").await;
        db.enqueue("linux").await;
    }
}
