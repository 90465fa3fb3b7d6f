//! The SQL contract as a psql user meets it. These run without a daemon.

use crate::support::{Db, buildreactor, server, text};
use buildreactor::database::queries;

/// A statement of ours for the schema of the tests.
fn here(statement: &str) -> String {
    statement.replace("farm.", "public.")
}

#[tokio::test]
async fn every_statement_file_is_listed_and_can_be_prepared() {
    let db = Db::new().await;
    let session = db.session().await;
    for (file, sql) in queries::ALL {
        session.prepare(&here(sql)).await.unwrap_or_else(|error| panic!("{file}: {error:?}"));
        assert!(sql.starts_with("-- "), "{file} has a header");
    }
    let listed: Vec<&str> = queries::ALL.iter().map(|(file, _)| *file).collect();
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql/queries")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(listed.contains(&name.as_str()), "{name} is in no list");
    }
}

#[tokio::test]
async fn every_object_has_a_comment() {
    let db = Db::new().await;
    let bare: Vec<String> = db
        .all(
            "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
               AND obj_description(c.oid, 'pg_class') IS NULL
             UNION ALL
             SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
             WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v') AND col_description(c.oid, a.attnum) IS NULL
             UNION ALL
             SELECT p.proname::text FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND obj_description(p.oid, 'pg_proc') IS NULL
             UNION ALL
             SELECT 'trigger ' || t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
             WHERE NOT t.tgisinternal AND c.relnamespace = 'public'::regnamespace AND obj_description(t.oid, 'pg_trigger') IS NULL
             UNION ALL
             SELECT 'sequence ' || c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'S' AND obj_description(c.oid, 'pg_class') IS NULL
             UNION ALL
             SELECT t.typname::text FROM pg_type t WHERE t.typnamespace = 'public'::regnamespace AND t.typtype = 'e' AND obj_description(t.oid, 'pg_type') IS NULL",
        )
        .await;
    assert_eq!(bare, Vec::<String>::new());
}

#[tokio::test]
async fn every_form_of_insert_works_and_answers_with_the_build_id() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    for (sql, expected) in [
        ("INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id", "1\n"),
        (
            "INSERT INTO build_queue (builder, properties, reason, priority) VALUES ('linux', '{\"revision\": \"abc\"}', 'nightly', 7) RETURNING build_id",
            "2\n",
        ),
        (
            "INSERT INTO build_queue (builder, run_after) VALUES ('linux', now() + interval '1 hour') RETURNING build_id",
            "3\n",
        ),
        (
            "INSERT INTO build_queue (builder, properties) SELECT 'linux', jsonb_build_object('n', n) FROM generate_series(1, 3) n RETURNING build_id",
            "4\n5\n6\n",
        ),
        ("INSERT INTO builds (builder, properties) VALUES ('linux', '{\"a\": 1}') RETURNING id", "7\n"),
        ("INSERT INTO build_queue (build_id) VALUES (7) RETURNING build_id, builder, priority", "7|linux|0\n"),
    ] {
        let output = db.psql(&["-qAt", "-c", sql]);
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (expected, ""), "{sql}");
    }
    let rows: Vec<String> = db
        .all("SELECT concat_ws('|', id, builder, properties, reason, state, queued_at IS NOT NULL, submitted_by) FROM builds ORDER BY id")
        .await;
    assert_eq!(rows[1], "2|linux|{\"revision\": \"abc\"}|nightly|queued|t|postgres");
    assert_eq!(rows[6], "7|linux|{\"a\": 1}|queued|t|postgres");
    let ready: Vec<i64> = db.all("SELECT build_id FROM build_queue WHERE NOT ready").await;
    assert_eq!(ready, [3], "a row for later is not among those that can be claimed");

    let output = db.psql(&[
        "-qAt",
        "-c",
        "BEGIN",
        "-c",
        "INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id",
        "-c",
        "ROLLBACK",
    ]);
    assert_eq!(text(&output.stdout), "8\n");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds").await, 7, "a rollback enqueues nothing");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 7);
}

#[tokio::test]
async fn copy_of_10_000_rows_works() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let folder = crate::support::temp_dir();
    let file = folder.path().join("rows.csv");
    let rows: String = (0..10_000).map(|n| format!("linux,{},\"{{\"\"n\"\": {n}}}\"\n", n % 5)).collect();
    std::fs::write(&file, rows).unwrap();
    let output =
        db.psql(&["-c", &format!("\\copy build_queue (builder, priority, properties) from '{}' csv", file.display())]);
    assert_eq!(text(&output.stdout), "COPY 10000\n", "{}", text(&output.stderr));
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM builds b JOIN build_queue q ON q.build_id = b.id WHERE b.state = 'queued'")
            .await,
        10_000
    );
    assert_eq!(db.one::<i64>("SELECT count(DISTINCT properties ->> 'n') FROM builds").await, 10_000);
}

#[tokio::test]
async fn bad_input_is_refused_with_the_cure_and_nothing_half_done() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    for (sql, expected) in [
        (
            "INSERT INTO build_queue (builder) VALUES ('windows')",
            "there is no builder \"windows\" |  | There is: linux. A new one: INSERT INTO builders (name, script) VALUES ('NAME', 'SCRIPT');",
        ),
        (
            "INSERT INTO build_queue (priority) VALUES (1)",
            "a row in build_queue needs a builder or a build_id |  | INSERT INTO build_queue (builder) VALUES ('NAME');",
        ),
        (
            "INSERT INTO build_queue (builder) SELECT b FROM unnest(ARRAY['linux', 'nope']) b",
            "there is no builder \"nope\"",
        ),
        (
            "INSERT INTO build_queue (builder, properties) VALUES ('linux', '[1]')",
            "properties must be a JSON object, not array",
        ),
        (
            "INSERT INTO build_queue (builder, properties) VALUES ('linux', '{bad')",
            "invalid input syntax for type json",
        ),
        (
            "INSERT INTO build_queue (builder, priority) VALUES ('linux', 'high')",
            "invalid input syntax for type integer",
        ),
        (
            "INSERT INTO build_queue (builder, run_after) VALUES ('linux', 'tomorrow evening')",
            "invalid input syntax for type timestamp",
        ),
        ("INSERT INTO build_queue (builder, run_after) VALUES ('linux', 'infinity')", "run_after_is_a_finite_time"),
        ("INSERT INTO build_queue (build_id) VALUES (4711)", "there is no build 4711"),
        (
            "INSERT INTO build_queue (builder, notify) VALUES ('linux', '{Ann <a@example.org>}')",
            "notify_lists_at_most_100_addresses_such_as_ann_at_example_org",
        ),
        ("INSERT INTO builds (builder) VALUES ('windows')", "there is no builder \"windows\""),
        ("INSERT INTO builds (builder, state) VALUES ('linux', 'running')", "a new row of builds cannot be running"),
        ("INSERT INTO builds (builder, state) VALUES ('linux', 'passed')", "a_described_build_is_not_queued"),
        (
            "INSERT INTO builders (name, script) VALUES ('a b', 'true')",
            "builder_name_is_1_to_63_of_letters_digits_dot_underscore_minus",
        ),
        ("INSERT INTO builders (name, script) VALUES ('..', 'true')", "builder_name_is_1_to_63"),
        ("INSERT INTO builders (name, script) VALUES (repeat('x', 64), 'true')", "builder_name_is_1_to_63"),
        ("INSERT INTO builders (name) VALUES ('x')", "process_builder_has_a_script"),
        ("INSERT INTO builders (name, script, executor) VALUES ('x', 'true', 'docker')", "executor_is_process"),
        (
            "INSERT INTO builders (name, executor, settings) VALUES ('x', 'buildbot', '{\"bulder\": \"x\"}')",
            "buildbot_settings_are_texts_named_master_scheduler_builder",
        ),
        (
            "INSERT INTO builders (name, executor, settings) VALUES ('x', 'buildbot', '{\"master\": 1}')",
            "buildbot_settings_are_texts_named_master_scheduler_builder",
        ),
        (
            "INSERT INTO builders (name, executor, script) VALUES ('x', 'buildbot', 'true')",
            "buildbot_builder_has_no_script_env_or_keep_workspace",
        ),
        (
            "INSERT INTO builders (name, script, env) VALUES ('x', 'true', '{\"BUILD_ID\": \"7\"}')",
            "env_is_a_json_object_of_strings_without_build_and_prop_names",
        ),
        (
            "INSERT INTO builders (name, script, env) VALUES ('x', 'true', '{\"A\": 7}')",
            "env_is_a_json_object_of_strings",
        ),
        ("INSERT INTO builders (name, script, max_running) VALUES ('x', 'true', 0)", "max_running_is_1_to_1000"),
        ("INSERT INTO builders (name, script, timeout) VALUES ('x', 'true', '0 s')", "timeout_is_1_second_to_30_days"),
        (
            "INSERT INTO builders (name, script, locks) VALUES ('x', 'true', '{db}')",
            "names the lock \"db\", which does not exist",
        ),
        (
            "DELETE FROM builders WHERE name = 'linux'; INSERT INTO build_queue (builder) VALUES ('linux')",
            "there is no builder \"linux\"",
        ),
        ("TRUNCATE build_queue", "TRUNCATE would leave builds queued"),
    ] {
        let refusal = db.refusal(sql).await;
        assert!(refusal.contains(expected), "{sql}\n  gave: {refusal}\n  not:  {expected}");
    }
    for table in ["builds", "build_queue"] {
        assert_eq!(db.one::<i64>(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
    }
    assert_eq!(db.all::<String>("SELECT name FROM builders").await, ["linux"]);
}

#[tokio::test]
async fn a_queued_build_is_queued_once_and_a_finished_one_again() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let id = db.enqueue("linux").await;
    assert!(db.refusal(&format!("INSERT INTO build_queue (build_id) VALUES ({id})")).await.contains("already exists"));
    db.execute(&format!("INSERT INTO build_queue (build_id) VALUES ({id}) ON CONFLICT DO NOTHING")).await;
    let refusal = db.refusal(&format!("INSERT INTO build_queue (build_id, builder) VALUES ({id}, 'other')")).await;
    assert!(refusal.contains("is of builder \"linux\", not \"other\""), "{refusal}");
    assert!(db.refusal("DELETE FROM builds").await.contains(&format!("build {id} is queued")));

    db.execute(&format!("UPDATE build_queue SET priority = 3, properties = '{{\"x\": 2}}' WHERE build_id = {id}"))
        .await;
    assert_eq!(db.one::<String>("SELECT properties::text FROM builds").await, "{\"x\": 2}", "moved on to the ledger");
    assert!(db.refusal("UPDATE build_queue SET builder = 'x'").await.contains("cannot be changed"));

    db.execute("DELETE FROM build_queue").await;
    assert_eq!(
        db.one::<String>("SELECT state || ', ' || detail FROM builds").await,
        "cancelled, deleted from build_queue by postgres"
    );
    db.execute(&format!("INSERT INTO build_queue (build_id) VALUES ({id})")).await;
    assert_eq!(db.one::<String>("SELECT concat_ws(',', state, finished_at, detail) FROM builds").await, "queued");
}

#[tokio::test]
async fn a_described_build_waits_in_builds_alone_and_history_can_be_imported() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("INSERT INTO builds (builder) VALUES ('linux')").await;
    assert_eq!(db.one::<String>("SELECT state::text FROM builds").await, "described");
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         VALUES ('linux', 'passed', 1, 'old', '2008-05-01', '2008-05-01', '2008-05-01', 0)",
    )
    .await;
    assert_eq!(db.one::<i64>("SELECT build_id FROM recent_builds").await, 2);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
}

#[tokio::test]
async fn one_notify_a_statement_and_none_when_rolled_back() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let (client, mut connection) = tokio_postgres::connect(&db.url(), tokio_postgres::NoTls).await.unwrap();
    let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
    let driver = tokio::task::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(note) = message {
                send.send(format!("{}:{}", note.channel(), note.payload())).unwrap();
            }
        }
    });
    client.batch_execute("LISTEN build_queue; LISTEN other").await.unwrap();
    db.execute("BEGIN; INSERT INTO build_queue (builder) VALUES ('linux'); ROLLBACK").await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 1000)").await;
    // A session of the daemon's writes are no wake.
    db.execute(
        "BEGIN; SET LOCAL buildreactor.session = 'daemon'; UPDATE build_queue SET priority = 1; COMMIT; NOTIFY other",
    )
    .await;
    assert_eq!(receive.recv().await.unwrap(), "build_queue:");
    assert_eq!(receive.recv().await.unwrap(), "other:");
    driver.abort();
}

#[tokio::test]
async fn the_state_of_a_build_cannot_be_half_true() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let id = db.enqueue("linux").await;
    for (change, constraint) in [
        ("state = 'running'", "a_running_build_has_an_attempt"),
        ("state = 'passed', finished_at = now()", "a_verdict_needs_an_attempt"),
        ("state = 'cancelled'", "a_final_build_has_a_finish"),
        ("finished_at = now()", "a_final_build_has_a_finish"),
        ("attempt = 1", "a_build_with_an_attempt_has_worker_and_start"),
        ("exit_code = 1, term_signal = 9", "exit_code_or_signal_not_both"),
        (
            "state = 'passed', finished_at = now(), attempt = 1, worker = 'w', started_at = now(), exit_code = 3",
            "a_passed_build_exits_0",
        ),
        ("state = 'superseded', finished_at = now()", "a_superseded_build_names_the_newer_one"),
    ] {
        let refusal = db.refusal(&format!("UPDATE builds SET {change} WHERE id = {id}")).await;
        assert!(refusal.contains(constraint), "{change}: {refusal}");
    }
}

#[tokio::test]
async fn migrating_twice_changes_nothing_and_twenty_at_once_is_one() {
    let db = Db::empty().await;
    let url = db.url();
    let all = (0..20).map(|_| {
        let url = url.clone();
        tokio::task::spawn_blocking(move || buildreactor(&["migrate", "--database", &url], &[]))
    });
    let mut applied = 0;
    for output in all.collect::<Vec<_>>() {
        let output = output.await.unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        applied += usize::from(text(&output.stdout).contains("applied V1__core"));
    }
    assert_eq!(applied, 1);
    let dump = || {
        text(
            &std::process::Command::new(server().bin_dir().join("pg_dump"))
                .args(["-s", "-d", &url])
                .output()
                .map(|o| o.stdout)
                .unwrap_or_default(),
        )
    };
    let before = dump();
    let output = buildreactor(&["migrate", "--database", &url], &[]);
    let version = buildreactor::database::migrate::known_version();
    let told = text(&output.stdout);
    assert!(told.contains(&format!("is up to date (version {version})")), "{told}");
    // pg_dump writes a random token into its \restrict line.
    let plain =
        |dump: &str| dump.lines().filter(|line| !line.contains("restrict")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(plain(&before), plain(&dump()));
}

#[tokio::test]
async fn a_schema_of_a_newer_program_is_refused_with_a_sentence() {
    let db = Db::new().await;
    db.execute(
        "INSERT INTO build_schema_history (version, name, applied_on, checksum) VALUES (99, 'later', 'now', '1');
         CREATE OR REPLACE FUNCTION build_schema_requires() RETURNS integer LANGUAGE sql IMMUTABLE RETURN 98",
    )
    .await;
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert_eq!(output.status.code(), Some(78));
    let version = buildreactor::database::migrate::known_version();
    let told = text(&output.stderr);
    assert!(
        told.contains(&format!("the schema is at version 99, and this program knows versions up to {version}")),
        "{told}"
    );
    let folder = crate::support::temp_dir();
    let state = folder.path().display().to_string();
    let output = buildreactor(&["run", "--database", &db.url()], &[("BUILDREACTOR_WORKER_STATE_DIR", &state)]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
}

#[tokio::test]
async fn everything_may_live_in_a_schema_of_its_own() {
    let db = Db::empty().await;
    db.execute("CREATE SCHEMA farm").await;
    let url = format!("{}&options=-csearch_path%3Dfarm", db.url());
    let output = buildreactor(&["migrate", "--database", &url], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(db.one::<i64>("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace").await, 0);
    // A person without that search_path: the triggers find their tables all the same.
    db.execute("INSERT INTO farm.builders (name, script) VALUES ('x', 'true'); INSERT INTO farm.build_queue (builder) VALUES ('x')").await;
    assert_eq!(db.one::<String>("SELECT state::text FROM farm.builds").await, "queued");
}

/// Takes the last migrations back, as if an older program had been here.
const BEFORE_V6: &str =
    "DROP VIEW queue_status; DROP VIEW worker_status; DROP VIEW running_builds; DROP TABLE build_steps; ALTER TABLE workers DROP COLUMN unready, DROP COLUMN run, DROP COLUMN kept, DROP COLUMN lease, DROP COLUMN grace;
    DROP TRIGGER a_begin ON build_attempts; DROP TRIGGER a_lost ON build_attempts;
    ALTER TABLE build_attempts DROP COLUMN external_worker, DROP COLUMN boot, DROP COLUMN lease;
    ALTER TABLE builders DROP CONSTRAINT buildbot_settings_are_texts_named_master_scheduler_builder,
        DROP CONSTRAINT buildbot_builder_has_no_script_env_or_keep_workspace, DROP CONSTRAINT executor_is_process_or_buildbot,
        ADD CONSTRAINT executor_is_process CHECK (executor IN ('process', 'buildbot')),
        ADD CONSTRAINT executor_buildbot_is_not_supported_by_this_version CHECK (executor <> 'buildbot');
    DROP FUNCTION buildbot_settings_are_valid;
    DROP VIEW mail_status; DROP TRIGGER mails ON builds; DROP TABLE build_mail, build_subscriptions;
    DROP INDEX builds_passed, builds_failed; ALTER TABLE builders DROP COLUMN branch_property;
    ALTER TABLE builds DROP CONSTRAINT notify_lists_at_most_100_addresses_such_as_ann_at_example_org,
        ADD CONSTRAINT notify_is_not_supported_by_this_version CHECK (notify = '{}');
    ALTER TABLE builds DROP CONSTRAINT needs_are_at_most_100000, DROP CONSTRAINT reason_cancel_reason_and_detail_are_at_most_64_kib_each;
    ALTER TABLE builders DROP CONSTRAINT description_paused_reason_and_settings_are_at_most_64_kib_each,
        DROP CONSTRAINT labels_and_locks_are_at_most_100_names_and_20000_bytes_each;
    DROP TABLE build_cancels; DROP FUNCTION mail_addresses_are_valid; DROP FUNCTION IF EXISTS mail_mailbox; DROP FUNCTION IF EXISTS build_characters_fit; DROP FUNCTION build_schema_api;
    DELETE FROM build_schema_history WHERE version >= 6";

/// Inserts until `done`; comes back with how many, and the longest that one took.
async fn inserts(db: &Db, done: impl Fn() -> bool) -> (usize, std::time::Duration) {
    let session = db.session().await;
    let (mut times, mut longest) = (0, std::time::Duration::ZERO);
    while !done() {
        let began = std::time::Instant::now();
        session.batch_execute("INSERT INTO build_queue (builder) VALUES ('b')").await.unwrap();
        (times, longest) = (times + 1, longest.max(began.elapsed()));
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    (times, longest)
}

#[tokio::test]
async fn a_migration_waits_for_no_build_and_keeps_nobody_from_inserting() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.enqueue("b").await;
    // What a claim holds while its build runs.
    let claim = db.session().await;
    claim.batch_execute("BEGIN; SELECT FROM build_queue WHERE build_id = 1 FOR UPDATE").await.unwrap();
    db.execute(BEFORE_V6).await;
    let migrate =
        |url: String| tokio::task::spawn_blocking(move || buildreactor(&["migrate", "--database", &url], &[]));
    let migrating = migrate(db.url());
    let (times, longest) = inserts(&db, || migrating.is_finished()).await;
    let output = migrating.await.unwrap();
    assert!(output.status.success() && text(&output.stdout).contains("applied V9__rights"), "{output:?}");
    println!("{times} inserts meanwhile, the longest {longest:?}");
    assert!(longest < std::time::Duration::from_secs(15), "{longest:?}");

    // Somebody's long transaction is in the way.
    db.execute(BEFORE_V6).await;
    claim.batch_execute("SELECT FROM builds").await.unwrap();
    let migrating = migrate(db.url());
    let (times, longest) = inserts(&db, || migrating.is_finished()).await;
    let output = migrating.await.unwrap();
    assert_eq!(output.status.code(), Some(75), "{output:?}");
    let told = text(&output.stderr);
    assert!(
        told.contains("another transaction holds a lock that the migration needs")
            && told.contains("drain the workers"),
        "{told}"
    );
    println!("{times} inserts meanwhile, the longest {longest:?}: {told}");
    // Fewer than before: each waits for at most one try, of 2 s, of the migration's.
    assert!(times > 5 && longest < std::time::Duration::from_secs(20), "{times} {longest:?}");
    claim.batch_execute("COMMIT").await.unwrap();
    // A large ledger, by what the server thinks: it is said that this takes a while.
    assert!(!told.contains("going through about"), "{told}");
    db.execute("UPDATE pg_class SET reltuples = 1500000 WHERE oid = 'builds'::regclass").await;
    let output = migrate(db.url()).await.unwrap();
    assert!(output.status.success());
    assert!(
        text(&output.stderr).contains("going through about 1500000 builds: some 10 s for each million"),
        "{output:?}"
    );
}

/// What a worker says at its start and later, and what the next one may not be told of it.
#[tokio::test]
async fn a_drain_stays_with_the_daemon_that_it_was_asked_of_and_so_does_a_goodbye() {
    let db = Db::new().await;
    let session = db.session().await;
    let hello = session.prepare(&here(queries::WORKER_HELLO)).await.unwrap();
    let says = async |run: &str, state: &str| -> Option<bool> {
        let (none, nothing) = (Vec::<String>::new(), None::<String>);
        let unready = serde_json::json!({});
        let row = session
            .query_one(
                &hello,
                &[
                    &"w", &"here", &1, &"1", &1, &none, &none, &state, &nothing, &run, &true, &"folder", &unready,
                    &40.0, &60.0,
                ],
            )
            .await;
        row.unwrap().get("drain")
    };
    assert_eq!(says("first", "active").await, Some(false));
    let since: String = db.one("SELECT started_at::text FROM workers").await;
    db.execute("SELECT drain_worker('w')").await;
    // The answer to its first may have been lost.
    assert_eq!(says("first", "active").await, Some(true));
    assert_eq!(db.one::<String>("SELECT started_at::text FROM workers").await, since);
    assert_eq!(says("second", "active").await, Some(false));
    assert_eq!(says("first", "stopped").await, None);
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', run, state) FROM workers").await, "second active");
    assert!(db.one::<bool>(&format!("SELECT started_at > '{since}' FROM workers")).await);
    assert_eq!(says("second", "stopped").await, Some(false));
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', run, state) FROM workers").await, "second stopped");
}

/// As when the network delivers it late.
#[tokio::test]
async fn an_attempt_of_a_row_that_waits_for_something_does_not_begin() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let need = db.enqueue("b").await;
    let id = db.enqueue("b").await;
    let session = db.session().await;
    let begin = session.prepare(&here(queries::BEGIN_ATTEMPT)).await.unwrap();
    let begins = async |id: i64| {
        let none = Vec::<String>::new();
        session.query_opt(&begin, &[&id, &"w", &1, &none, &none, &"folder", &"boot", &40.0]).await.unwrap().is_some()
    };
    db.execute(&format!("UPDATE build_queue SET needs = '{{{need}}}' WHERE build_id = {id}")).await;
    assert!(!begins(id).await);
    db.execute(&format!("UPDATE build_queue SET needs = '{{}}' WHERE build_id = {id}")).await;
    assert!(begins(id).await);
    // Nor is the row of one that runs taken away for a need that fails: its result finds its build by it.
    db.execute(&format!(
        "SET buildreactor.session = 'daemon'; UPDATE build_queue SET needs = '{{{need}}}' WHERE build_id = {id};
         UPDATE builds SET state = 'failed', attempt = 1, worker = 'w', started_at = now(), finished_at = now() WHERE id = {need};
         RESET buildreactor.session"
    ))
    .await;
    assert!(db.one::<bool>(&format!("SELECT count(*) = 1 FROM build_queue WHERE build_id = {id}")).await);
}
