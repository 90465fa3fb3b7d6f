//! What a role or a database may be set to changes nothing of what our functions and sessions do.

use crate::support::{Daemon, Db, buildreactor, temp_dir, text, unique};

/// Who sets this in a session of his own sees no views; ours see them all the same.
const NO_VIEWS: &str = "restrict_nonsystem_relation_kind";

/// Values that an ordinary role can set, one group a line: those of a group are set together.
const HOSTILE: &[&[(&str, &str)]] = &[
    &[("standard_conforming_strings", "off"), ("backslash_quote", "off"), ("escape_string_warning", "on")],
    &[
        ("array_nulls", "off"),
        ("transform_null_equals", "on"),
        ("gin_fuzzy_search_limit", "1"),
        ("xmloption", "document"),
    ],
    &[
        ("DateStyle", "'SQL, DMY'"),
        ("IntervalStyle", "sql_standard"),
        ("TimeZone", "'America/St_Johns'"),
        ("timezone_abbreviations", "'India'"),
    ],
    &[
        ("DateStyle", "'German'"),
        ("IntervalStyle", "iso_8601"),
        ("TimeZone", "'Pacific/Kiritimati'"),
        ("bytea_output", "escape"),
        ("extra_float_digits", "-15"),
    ],
    &[
        ("plpgsql.variable_conflict", "use_column"),
        ("plpgsql.extra_errors", "'all'"),
        ("plpgsql.extra_warnings", "'all'"),
        ("plpgsql.print_strict_params", "on"),
        ("plpgsql.check_asserts", "off"),
    ],
    &[
        ("row_security", "off"),
        ("check_function_bodies", "off"),
        ("quote_all_identifiers", "on"),
        ("client_min_messages", "error"),
        ("exit_on_error", "on"),
    ],
    &[
        ("default_transaction_isolation", "'serializable'"),
        ("default_transaction_deferrable", "on"),
        ("lc_time", "'C'"),
        ("lc_numeric", "'C'"),
        ("lc_monetary", "'C'"),
    ],
    &[
        ("default_transaction_isolation", "'repeatable read'"),
        ("statement_timeout", "'20s'"),
        ("lock_timeout", "'7s'"),
        ("idle_in_transaction_session_timeout", "'9s'"),
    ],
    &[
        ("enable_indexscan", "off"),
        ("enable_bitmapscan", "off"),
        ("enable_hashjoin", "off"),
        ("enable_nestloop", "off"),
        ("enable_material", "off"),
        ("enable_sort", "off"),
    ],
    &[
        ("enable_seqscan", "off"),
        ("enable_mergejoin", "off"),
        ("enable_hashagg", "off"),
        ("jit_above_cost", "0"),
        ("jit_inline_above_cost", "0"),
        ("plan_cache_mode", "force_generic_plan"),
    ],
    &[
        ("force_parallel_mode", "on"),
        ("parallel_setup_cost", "0"),
        ("parallel_tuple_cost", "0"),
        ("min_parallel_table_scan_size", "0"),
        ("parallel_leader_participation", "off"),
        ("work_mem", "64"),
    ],
    &[
        ("default_tablespace", "''"),
        ("default_table_access_method", "heap"),
        ("constraint_exclusion", "on"),
        ("from_collapse_limit", "1"),
        ("join_collapse_limit", "1"),
        ("geqo_threshold", "2"),
        ("cursor_tuple_fraction", "0"),
    ],
    &[
        ("synchronous_commit", "off"),
        ("commit_siblings", "0"),
        ("default_toast_compression", "pglz"),
        ("default_statistics_target", "1"),
        ("temp_buffers", "100"),
        ("stats_fetch_consistency", "snapshot"),
    ],
    &[(NO_VIEWS, "'view, foreign-table'")],
    &[
        ("search_path", "''"),
        ("client_encoding", "'LATIN1'"),
        ("application_name", "'psql'"),
        ("tcp_user_timeout", "1000"),
        ("idle_session_timeout", "0"),
    ],
];

/// Of the settings of context `user`, those that are not in [`HOSTILE`] and why: they are costs and sizes of the planner and of memory, what is
/// written into the server's log, or what is sent where.
const HARMLESS: &str = "^(md5_password_warnings|scram_iterations|.*_cost|enable_.*|log_.*|debug_.*|trace_.*|jit.*|geqo.*|tcp_.*|vacuum_.*|ssl_.*|.*_io_concurrency|.*_flush_after|.*_work_mem|.*_mem|.*_parallel_.*|max_parallel_.*|wal_.*|track_.*|.*_memory|hash_mem_multiplier|effective_cache_size|recursive_worktable_factor|gin_pending_list_limit|temp_tablespaces|lo_compat_privileges|synchronize_seqscans|password_encryption|local_preload_libraries|default_text_search_config|xmlbinary|client_connection_check_interval|event_source|seed|role|session_authorization|createrole_self_grant|icu_validation_level|logical_decoding_work_mem|file_copy_method|io_combine_limit|default_transaction_read_only|transaction_.*|min_parallel_.*|array_nulls|allow_in_place_tablespaces|lc_messages|effective_io_concurrency|maintenance_io_concurrency)$";

fn settings(group: &[(&str, &str)], known: &[String]) -> Vec<String> {
    let sets =
        group.iter().filter(|(name, _)| name.contains('.') || known.iter().any(|k| k.eq_ignore_ascii_case(name)));
    sets.map(|(name, value)| format!("{name} = {value}")).collect()
}

async fn known(db: &Db) -> Vec<String> {
    db.all("SELECT name FROM pg_settings WHERE context = 'user'").await
}

#[tokio::test]
async fn every_setting_that_a_role_can_change_is_tried_or_harmless() {
    let db = Db::new().await;
    let tried: Vec<&str> = HOSTILE.iter().copied().flatten().map(|(name, _)| *name).collect();
    let left: Vec<String> = db
        .one::<Vec<String>>(&format!(
            "SELECT array_agg(name ORDER BY name) FROM pg_settings WHERE context = 'user' AND name !~ '{HARMLESS}'"
        ))
        .await
        .into_iter()
        .filter(|name| !tried.iter().any(|t| t.eq_ignore_ascii_case(name)))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "say what it does, or set it to something hostile here");
}

/// What a person does, in a session with these settings.
async fn person(db: &Db, sets: &[String]) {
    let session = db.session().await;
    for set in sets {
        session.batch_execute(&format!("SET {set}")).await.unwrap_or_else(|error| panic!("{set}: {error:?}"));
    }
    let run = async |sql: &str| {
        session.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sets:?}: {sql}: {error:?}"));
    };
    let insert = "INSERT INTO public.build_queue (builder, priority, run_after, properties, notify) \
         VALUES ('paused', 3, now() + interval '1 hour', '{\"a\": 1}', '{ann@example.org}') RETURNING build_id";
    let first: i64 = session.query_one(insert, &[]).await.unwrap_or_else(|error| panic!("{sets:?}: {error:?}")).get(0);
    // Ten that need it: a search by index that leaves rows out would leave some behind.
    run(&format!("INSERT INTO public.build_queue (builder, needs) SELECT 'paused', ARRAY[{first}]::bigint[] FROM generate_series(1, 10)")).await;
    run("INSERT INTO public.build_queue (builder, coalesce_key) VALUES ('paused', 'key'); INSERT INTO public.build_queue (builder, coalesce_key) VALUES ('paused', 'key')").await;
    run(&format!("SELECT public.prioritize_build({first}, 7); SELECT public.cancel_build({first}, 'why')")).await;
    let states = format!("SELECT string_agg(state::text, ' ' ORDER BY id) FROM public.builds WHERE id >= {first}");
    let expected = format!("cancelled{} superseded queued", " skipped".repeat(10));
    // Those that need it may be settled after the statement.
    db.wait(&format!("SELECT ({states}) IN ('{expected}', 'cancelled{} superseded queued')", " queued".repeat(10)))
        .await;
    run(&format!("SELECT public.retry_build({first}); UPDATE public.build_queue SET priority = NULL, run_after = 'tomorrow' WHERE build_id = {first}; DELETE FROM public.build_queue WHERE build_id = {first}")).await;
    let schedule = format!("s{}", unique());
    run(&format!("INSERT INTO public.build_schedules (name, builder, cron, time_zone) VALUES ('{schedule}', 'paused', '30 2 * * MON-FRI', 'europe/berlin')")).await;
    let refused = session
        .batch_execute(&format!(
            "INSERT INTO public.build_schedules (name, builder, cron) VALUES ('{schedule}x', 'paused', 's s s s s.')"
        ))
        .await;
    let refused = refused.unwrap_err();
    assert!(
        refused.as_db_error().unwrap().hint().is_some_and(|hint| hint.contains("30 2 * * *")),
        "{sets:?}: {refused:?}"
    );
    // exit_on_error may have ended it.
    let session = db.session().await;
    for set in sets {
        session.batch_execute(&format!("SET {set}")).await.unwrap();
    }
    for view in [
        "queue_status",
        "running_builds",
        "recent_builds",
        "builder_status",
        "worker_status",
        "build_stats",
        "mail_status",
    ] {
        let looked = session.batch_execute(&format!("SELECT * FROM public.{view}")).await;
        assert!(looked.is_ok() || sets.iter().any(|set| set.starts_with(NO_VIEWS)), "{sets:?}: {view}: {looked:?}");
    }
    session
        .batch_execute(
            "SELECT public.build_log_text(1); SELECT public.prune_builds('1 day'); DELETE FROM public.build_queue",
        )
        .await
        .unwrap_or_else(|error| panic!("{sets:?}: {error:?}"));
}

#[tokio::test]
async fn functions_and_views_do_the_same_whatever_a_persons_session_is_set_to() {
    let db = Db::new().await;
    db.execute("INSERT INTO builders (name, script, paused) VALUES ('paused', 'true', true)").await;
    let known = known(&db).await;
    for group in HOSTILE {
        person(&db, &settings(group, &known)).await;
    }
}

/// Everything that can be told of a schema, as text.
const SHAPE: &str = "SELECT coalesce(string_agg(what, E'\\n' ORDER BY what), '') FROM (
    SELECT 'view ' || c.relname || ' ' || pg_get_viewdef(c.oid) AS what FROM pg_class c WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'function ' || pg_get_functiondef(p.oid) FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'constraint ' || x.conname || ' ' || pg_get_constraintdef(x.oid) FROM pg_constraint x WHERE x.connamespace = 'public'::regnamespace
    UNION ALL SELECT 'index ' || pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'trigger ' || pg_get_triggerdef(t.oid) FROM pg_trigger t WHERE NOT t.tgisinternal
    UNION ALL SELECT 'default ' || d.adrelid::regclass || d.adnum || pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d
    UNION ALL SELECT 'table ' || c.relname || a.amname || c.reltablespace FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE c.relnamespace = 'public'::regnamespace
    ) w";

#[tokio::test]
async fn migrate_makes_the_same_schema_whatever_its_role_is_set_to() {
    let plain = Db::new().await;
    let shape: String = plain.one(SHAPE).await;
    let known = known(&plain).await;
    for group in HOSTILE.iter().filter(|group| group[0].0 != "search_path") {
        let db = Db::empty().await;
        for set in settings(group, &known) {
            db.execute(&format!("ALTER DATABASE {} SET {set}", db.name())).await;
        }
        db.execute(&format!("ALTER DATABASE {} SET default_transaction_read_only = on", db.name())).await;
        let output = buildreactor(&["migrate", "--database", &db.url()], &[]);
        assert!(output.status.success(), "{group:?}: {output:?}");
        assert!(db.one::<String>(SHAPE).await == shape, "{group:?}");
    }
}

#[tokio::test]
async fn a_worker_builds_watches_and_prunes_whatever_its_role_or_database_is_set_to() {
    let db = Db::new().await;
    let known = known(&db).await;
    db.builder("linux", "echo \"$PROP_A\"; cat \"$BUILD_FILE\"").await;
    db.execute("ALTER TABLE builds ADD COLUMN span interval DEFAULT '1 day 02:00', ADD COLUMN day date DEFAULT '2026-02-01', ADD COLUMN raw bytea DEFAULT '\\xff'").await;
    for (place, group) in HOSTILE.iter().enumerate() {
        let role = format!("settings_{}", unique());
        db.execute(&format!("CREATE ROLE {role} LOGIN SUPERUSER")).await;
        for set in settings(group, &known).iter().filter(|set| !set.starts_with("search_path")) {
            let whose = if place % 2 == 0 { format!("ROLE {role}") } else { format!("DATABASE {}", db.name()) };
            db.execute(&format!("ALTER {whose} SET {set}")).await;
        }
        db.execute(&format!("ALTER ROLE {role} SET default_transaction_read_only = on")).await;
        let url = db.url().replace("user=postgres", &format!("user={role}"));
        let session = crate::support::connect(&db.url()).await;
        session
            .batch_execute(&format!(
                "SET standard_conforming_strings = on; SET default_transaction_isolation = 'read committed'; {}",
                "SET DateStyle = ISO"
            ))
            .await
            .unwrap();
        let insert =
            "INSERT INTO build_queue (builder, properties) VALUES ('linux', '{\"a\": \"x\\\\y\"}') RETURNING build_id";
        let id: i64 = session.query_one(insert, &[]).await.unwrap().get(0);
        let daemon = Daemon::start_at(&url, &format!("w{place}"), &[("BUILDREACTOR_RETENTION_BUILDS", "1 day")]).await;
        db.wait(&format!("SELECT state = 'passed' FROM builds WHERE id = {id}")).await;
        let id = id.to_string();
        for command in [["watch", &id], ["log", &id]] {
            let output = buildreactor(&[command.as_slice(), &["--database", &url]].concat(), &[]);
            assert!(output.status.success(), "{group:?}: {output:?}");
            if command[0] == "log" {
                let log = text(&output.stdout);
                for part in ["x\\y\n", "\"span\":\"1 day 02:00:00\"", "\"day\":\"2026-02-01\"", "\"raw\":\"\\\\xff\""] {
                    assert!(log.replace("\": ", "\":").contains(part), "{group:?}: `{part}` is not in {log}");
                }
            }
        }
        let state = temp_dir();
        let output = buildreactor(
            &["check", "--database", &url],
            &[("BUILDREACTOR_WORKER_STATE_DIR", state.path().to_str().unwrap())],
        );
        assert!(output.status.success(), "{group:?}: {}", text(&output.stdout));
        drop(daemon);
        db.execute(&format!("ALTER DATABASE {} RESET ALL; DROP ROLE {role}", db.name())).await;
    }
}

/// standard_conforming_strings decides what a backslash in a plain literal means.
#[test]
fn no_plain_literal_of_ours_has_a_backslash() {
    let mut looked = 0;
    for folder in ["sql/api", "sql/queries"] {
        for entry in std::fs::read_dir(format!("{}/{folder}", env!("CARGO_MANIFEST_DIR"))).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let bytes = text.as_bytes();
            let mut at = 0;
            while at < bytes.len() {
                if bytes[at..].starts_with(b"--") {
                    at += bytes[at..].iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len() - at);
                } else if bytes[at] == b'\'' {
                    let escaped = at > 0
                        && matches!(bytes[at - 1], b'E' | b'e')
                        && !bytes[at.saturating_sub(2)].is_ascii_alphanumeric();
                    let from = at;
                    at += 1;
                    while bytes[at] != b'\'' || bytes[at + 1] == b'\'' {
                        at += if bytes[at] == b'\'' || (escaped && bytes[at] == b'\\') { 2 } else { 1 };
                    }
                    looked += 1;
                    assert!(escaped || !text[from..at].contains('\\'), "{}: {}", path.display(), &text[from..at]);
                }
                at += 1;
            }
        }
    }
    assert!(looked > 500, "{looked}");
}

/// GIN may be told to leave rows out of what it finds.
#[test]
fn every_function_that_looks_by_needs_finds_all_of_them() {
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql/api")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for function in text.split("CREATE OR REPLACE FUNCTION ").skip(1) {
            let function = function.split("COMMENT ON").next().unwrap();
            let name = function.split('(').next().unwrap();
            assert!(!function.contains(".needs @>") || function.contains("SET gin_fuzzy_search_limit = 0"), "{name}");
        }
    }
}
