//! Objects that somebody puts before PostgreSQL's own and ours, and functions of people's own that are called in our sessions.

use crate::support::{Daemon, Db, buildreactor, text, unique};

/// A role that may do no more than anybody, and its database as it sees it.
async fn mallory(db: &Db) -> (String, String) {
    let name = format!("mallory_{}", unique());
    db.execute(&format!("CREATE ROLE {name} LOGIN")).await;
    let url = db.url().replace("user=postgres", &format!("user={name}"));
    (name, url)
}

/// What each planted function does: it notes who runs it, where everybody can write, and then answers as the real one would.
async fn notebook(db: &Db) {
    db.execute(
        "CREATE SCHEMA notes; GRANT ALL ON SCHEMA notes TO PUBLIC; CREATE TABLE notes.runs (who text, what text);
         GRANT ALL ON notes.runs TO PUBLIC",
    )
    .await;
}

/// Functions, operators and casts of exact types that our statements use, all of which PostgreSQL has as polymorphic ones, or for other types.
fn planted(schema: &str) -> String {
    let note = |what: &str| format!("INSERT INTO notes.runs VALUES (current_user, '{what}')");
    let mut sql = String::new();
    for (sign, left, right, result, body) in [
        ("=", "bigint[]", "bigint[]", "boolean", "a::text OPERATOR(pg_catalog.=) b::text"),
        ("<>", "bigint[]", "bigint[]", "boolean", "a::text OPERATOR(pg_catalog.<>) b::text"),
        ("@>", "bigint[]", "bigint[]", "boolean", "a::text OPERATOR(pg_catalog.=) b::text"),
        ("<@", "text[]", "text[]", "boolean", "true"),
        ("=", "text[]", "text[]", "boolean", "a::text OPERATOR(pg_catalog.=) b::text"),
        ("<>", "text[]", "text[]", "boolean", "a::text OPERATOR(pg_catalog.<>) b::text"),
        ("||", "bigint[]", "bigint[]", "bigint[]", "a"),
        ("||", "bigint[]", "bigint", "bigint[]", "a"),
        ("||", "text", "integer", "text", "a"),
        ("=", "name", "varchar", "boolean", "a::text OPERATOR(pg_catalog.=) b::text"),
        ("=", "text", "varchar", "boolean", "a OPERATOR(pg_catalog.=) b::text"),
        ("=", "xid", "bigint", "boolean", "false"),
    ] {
        let name = format!("f{}", unique());
        sql += &format!(
            "CREATE FUNCTION {schema}.{name}(a {left}, b {right}) RETURNS {result} LANGUAGE plpgsql AS $f$ BEGIN {}; RETURN {body}; END $f$;
             CREATE OPERATOR {schema}.{sign} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = {schema}.{name});",
            note(&format!("{left} {sign} {right}"))
        );
    }
    for (name, arguments, result, value) in [
        ("cardinality", "bigint[]", "integer", "0"),
        ("cardinality", "text[]", "integer", "0"),
        ("unnest", "bigint[]", "SETOF bigint", ""),
        ("array_position", "text[], text", "integer", "NULL"),
        ("coalesce_key", "text", "text", "NULL"),
        ("format", "text, bigint", "text", "'x'"),
        ("hashtext", "varchar", "integer", "1"),
        ("greatest_of", "bigint", "bigint", "1"),
    ] {
        let answer = if value.is_empty() { "RETURN".to_owned() } else { format!("RETURN {value}") };
        sql += &format!(
            "CREATE FUNCTION {schema}.{name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS $f$ BEGIN {}; {answer}; END $f$;",
            note(name)
        );
    }
    sql
}

/// Runs all that queues, needs, coalesces, mails and cancels, with a daemon that is a superuser.
async fn works(db: &Db) {
    db.execute(
        "INSERT INTO builders (name, script) VALUES ('quick', 'true'), ('long', 'sleep 600');
         INSERT INTO build_subscriptions (address, events) VALUES ('ann@example.org', '{finished}')",
    )
    .await;
    let daemon = Daemon::start(db, "w", &[]).await;
    let first = db.enqueue("quick").await;
    db.execute(&format!("INSERT INTO build_queue (builder, needs) VALUES ('quick', '{{{first}}}')")).await;
    assert_eq!(db.finished(first).await, "passed");
    assert_eq!(db.finished(first + 1).await, "passed");
    let running = db.enqueue("long").await;
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {running}")).await;
    for _ in 0..2 {
        db.execute(
            "INSERT INTO build_queue (builder, coalesce_key, notify) VALUES ('long', 'main', '{bob@example.org}')",
        )
        .await;
    }
    assert_eq!(db.finished(running + 1).await, "superseded");
    db.execute(&format!(
        "SELECT prioritize_build({0}, 4); SELECT cancel_build({0}); SELECT cancel_build({running}, 'enough')",
        running + 2
    ))
    .await;
    assert_eq!(db.finished(running).await, "cancelled");
    for view in [
        "queue_status",
        "running_builds",
        "recent_builds",
        "builder_status",
        "worker_status",
        "build_stats",
        "mail_status",
    ] {
        db.execute(&format!("SELECT count(*) FROM {view}")).await;
    }
    db.execute(&format!("SELECT retry_build({first}); SELECT build_log_text({first})")).await;
    db.wait(&format!("SELECT state = 'passed' AND attempt = 2 FROM builds WHERE id = {first}")).await;
    drop(daemon);
}

/// Nothing that was planted ran as anybody but him who planted it. What a superuser's own psql calls by its own search_path is his own affair,
/// so this database's default path has the schema not: people name it.
async fn nobody_ran_it(db: &Db) {
    let runs: Vec<String> =
        db.all("SELECT DISTINCT who || ': ' || what FROM notes.runs WHERE who NOT LIKE 'mallory%'").await;
    assert_eq!(runs, Vec::<String>::new());
}

#[tokio::test]
async fn migrate_shuts_a_schema_that_everybody_may_create_in_and_names_what_is_planted() {
    let db = Db::empty().await;
    let (name, url) = mallory(&db).await;
    notebook(&db).await;
    db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    let his = crate::support::connect(&url).await;
    his.batch_execute(&planted("public")).await.unwrap();
    his.batch_execute(
        "CREATE TYPE public.odd AS ENUM ('a'); CREATE FUNCTION public.odd_of(jsonb) RETURNS public.odd LANGUAGE sql RETURN 'a'::public.odd;
         CREATE CAST (jsonb AS public.odd) WITH FUNCTION public.odd_of(jsonb) AS IMPLICIT;
         CREATE VIEW public.queue_status AS SELECT 1 AS build_id; CREATE TABLE public.his_own (n integer)",
    )
    .await
    .unwrap();
    let migrate = || buildreactor(&["migrate", "--database", &db.url()], &[]);
    let output = migrate();
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let told = text(&output.stderr);
    for object in [
        "operator public.=(bigint[],bigint[]) of role ",
        "operator public.@>(bigint[],bigint[]) of role ",
        "function public.cardinality(text[]) of role ",
        "cast (jsonb AS public.odd) of role ",
        "view public.queue_status of role ",
        &name,
    ] {
        assert!(told.contains(object), "`{object}` is not in: {told}");
    }
    assert!(!told.contains("his_own") && !told.contains("odd_of"), "no danger: {told}");
    assert!(
        db.one::<bool>("SELECT NOT has_schema_privilege('pg_monitor', 'public', 'CREATE')").await,
        "PUBLIC may no more"
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM pg_class WHERE relname LIKE 'build%'").await, 0);
    nobody_ran_it(&db).await;
    assert!(his.batch_execute("CREATE TABLE public.another ()").await.is_err());
    db.execute(&format!("DROP OWNED BY {name} CASCADE")).await;
    let output = migrate();
    assert!(output.status.success(), "{output:?}");
    drop(his);
    db.execute(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).await;
}

#[tokio::test]
async fn what_is_planted_after_migrate_runs_for_nobody_and_check_names_it() {
    let db = Db::empty().await;
    let (name, url) = mallory(&db).await;
    notebook(&db).await;
    // Given by the owner to PUBLIC: taken back. To a role by name, later: an error to check.
    db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).contains("took CREATE on schema \"public\" from PUBLIC"), "{output:?}");
    db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    let his = crate::support::connect(&url).await;
    his.batch_execute(&planted("public")).await.unwrap();
    // Types and tables of a session of his own, which comes first where a path does not name pg_temp.
    works(&db).await;
    nobody_ran_it(&db).await;

    let folder = crate::support::temp_dir();
    let state = folder.path().display().to_string();
    let output = buildreactor(&["check", "--database", &db.url()], &[("BUILDREACTOR_WORKER_STATE_DIR", &state)]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines = text(&output.stdout);
    for part in [
        "REVOKE CREATE ON SCHEMA \"public\" FROM PUBLIC",
        "operator public.=(bigint[],bigint[]) of role",
        "function public.cardinality(bigint[]) of role",
    ] {
        assert!(
            lines.lines().any(|line| line.starts_with("PROBLEM") && line.contains(part)),
            "`{part}` is not in: {lines}"
        );
    }
    nobody_ran_it(&db).await;
    for command in [vec!["watch", "1"], vec!["log", "1"]] {
        let output = buildreactor(&[command.as_slice(), &["--database", &db.url()]].concat(), &[]);
        assert!(output.status.success(), "{output:?}");
    }
    nobody_ran_it(&db).await;
    // The next program refuses to go on.
    db.execute("DROP FUNCTION build_schema_api()").await;
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    nobody_ran_it(&db).await;
    drop(his);
    db.execute(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).await;
}

#[tokio::test]
async fn temporary_tables_types_and_functions_take_nobodys_place() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let session = db.session().await;
    session
        .batch_execute(
            "CREATE TEMPORARY TABLE builds (id bigint, builder text, state text); CREATE TEMPORARY TABLE builders (name text);
             CREATE TEMPORARY TABLE build_queue (build_id bigint); CREATE TYPE pg_temp.build_state AS ENUM ('mine');
             CREATE TYPE pg_temp.jsonb AS ENUM ('mine'); CREATE DOMAIN pg_temp.interval AS text;
             CREATE FUNCTION pg_temp.same(bigint[], bigint[]) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE ''mine''; END';
             CREATE OPERATOR pg_temp.= (LEFTARG = bigint[], RIGHTARG = bigint[], FUNCTION = pg_temp.same);
             INSERT INTO public.build_queue (builder) VALUES ('linux');
             INSERT INTO public.build_queue (builder, needs, coalesce_key) VALUES ('linux', '{1}', 'a'), ('linux', '{1}', 'a');
             INSERT INTO public.build_schedules (name, builder, cron) VALUES ('n', 'linux', '0 0 * * *');
             UPDATE public.build_queue SET priority = 2; SELECT public.cancel_build(1); SELECT public.retry_build(1); SELECT public.prune_builds('1 day');
             DELETE FROM public.build_queue",
        )
        .await
        .unwrap();
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.builds").await, 3);
}

/// What our functions find does not depend on who calls them: each has the path of our sessions, or a body that was resolved at its creation.
#[tokio::test]
async fn every_function_check_index_view_and_trigger_of_ours_finds_nothing_of_others() {
    let db = Db::new().await;
    let loose: Vec<String> = db
        .all(
            "SELECT p.oid::regprocedure::text FROM pg_proc p
             WHERE p.pronamespace = 'public'::regnamespace AND p.prosqlbody IS NULL
               AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false)",
        )
        .await;
    assert_eq!(loose, Vec::<String>::new());
    let outside: Vec<String> = db
        .all(
            "SELECT pg_describe_object(d.classid, d.objid, d.objsubid) || ' on ' || pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid)
             FROM pg_depend d
             WHERE d.deptype = 'n' AND d.refobjid >= 16384
               AND d.classid IN ('pg_constraint'::regclass, 'pg_attrdef'::regclass, 'pg_rewrite'::regclass, 'pg_trigger'::regclass, 'pg_proc'::regclass, 'pg_class'::regclass)
               AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass, 'pg_class'::regclass)
               AND coalesce((SELECT p.pronamespace FROM pg_proc p WHERE d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid),
                            (SELECT o.oprnamespace FROM pg_operator o WHERE d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid),
                            (SELECT t.typnamespace FROM pg_type t WHERE d.refclassid = 'pg_type'::regclass AND t.oid = d.refobjid),
                            (SELECT c.relnamespace FROM pg_class c WHERE d.refclassid = 'pg_class'::regclass AND c.oid = d.refobjid))
                   NOT IN ('public'::regnamespace, 'pg_catalog'::regnamespace, 'pg_toast'::regnamespace)
               AND pg_describe_object(d.classid, d.objid, d.objsubid) !~ 'information_schema'",
        )
        .await;
    assert_eq!(outside, Vec::<String>::new());
}

#[tokio::test]
async fn triggers_and_checks_of_ones_own_go_on_finding_their_tables() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute(
        "CREATE SCHEMA audit; CREATE TABLE audit.seen (id bigint); CREATE TABLE releases (build bigint, state text);
         CREATE FUNCTION note_release() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO releases VALUES (NEW.id, NEW.state); RETURN NULL; END';
         CREATE TRIGGER release AFTER UPDATE OF state ON builds FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION note_release();
         CREATE FUNCTION audit.note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO seen VALUES (NEW.build_id); RETURN NULL; END';
         CREATE TRIGGER note AFTER INSERT ON build_attempts FOR EACH ROW EXECUTE FUNCTION audit.note();
         CREATE FUNCTION is_known(text) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT EXISTS (SELECT FROM builders WHERE name = $1)';
         ALTER TABLE builds ADD COLUMN team text DEFAULT 'ours' CHECK (is_known(builder))",
    )
    .await;
    let folder = crate::support::temp_dir();
    let state = folder.path().display().to_string();
    let check = || buildreactor(&["check", "--database", &db.url()], &[("BUILDREACTOR_WORKER_STATE_DIR", &state)]);
    let output = check();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for remedy in [
        "ALTER FUNCTION public.note_release() SET search_path = \"public\", pg_temp;",
        "ALTER FUNCTION audit.note() SET search_path = \"public\", \"audit\", pg_temp;",
        "ALTER FUNCTION public.is_known(text) SET search_path = \"public\", pg_temp;",
    ] {
        assert!(text(&output.stdout).contains(remedy), "`{remedy}` is not in: {}", text(&output.stdout));
    }
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(output.status.success() && text(&output.stdout).contains("ALTER FUNCTION audit.note()"), "{output:?}");
    let output = check();
    assert!(output.status.success(), "{output:?}");
    let daemon = Daemon::start(&db, "w", &[]).await;
    let id = db.enqueue("linux").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.all::<String>("SELECT build || ' ' || state FROM releases").await, [format!("{id} passed")]);
    assert_eq!(db.all::<i64>("SELECT id FROM audit.seen").await, [id]);
    drop(daemon);
    // Again: nothing is left to do. One that comes later is seen when a daemon starts whose role may change it.
    let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
    assert!(!text(&output.stdout).contains("ALTER"), "{output:?}");
    db.execute(
        "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO releases VALUES (-NEW.id, ''later''); RETURN NEW; END';
         CREATE TRIGGER later BEFORE UPDATE OF state ON builds FOR EACH ROW WHEN (NEW.state = 'passed') EXECUTE FUNCTION later()",
    )
    .await;
    let daemon = Daemon::start(&db, "w", &[]).await;
    let id = db.enqueue("linux").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.all::<i64>("SELECT build FROM releases WHERE state = 'later'").await, [-id]);
    drop(daemon);
}
