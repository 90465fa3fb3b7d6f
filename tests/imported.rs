//! Rows that bring their own numbers, and columns that are said to be NULL.

use crate::support::{Daemon, Db, text};

#[tokio::test]
async fn builds_that_bring_their_own_numbers_do_not_stand_in_the_way_of_the_next() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let past = |ids: &str| {
        format!(
            "INSERT INTO builds (id, builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
             SELECT i, 'linux', 'passed', 1, 'old', '2008-05-01', '2008-05-01', '2008-05-01', 0 FROM {ids} AS i"
        )
    };
    for (ids, next) in [
        ("generate_series(1, 20)", 21),
        ("generate_series(30, 25, -1)", 31),
        ("generate_series(1000000, 1000500)", 1_000_501),
        ("generate_series(-5, 0)", 1_000_502),
        ("unnest(ARRAY[500::bigint])", 1_000_503),
    ] {
        db.execute(&past(ids)).await;
        assert_eq!(db.enqueue("linux").await, next, "{ids}");
    }
    // A row that goes away again has moved the numbers on, and that is all.
    db.execute(&format!("BEGIN; {}; ROLLBACK", past("generate_series(2000000, 2000001)"))).await;
    assert_eq!(db.enqueue("linux").await, 2_000_002);
    let folder = crate::support::temp_dir();
    let file = folder.path().join("rows.csv");
    std::fs::write(&file, "3000001,linux\n3000000,linux\n").unwrap();
    let output = db.psql(&["-c", &format!("\\copy builds (id, builder) from '{}' csv", file.display())]);
    assert_eq!(text(&output.stdout), "COPY 2\n", "{output:?}");
    assert_eq!(db.enqueue("linux").await, 3_000_002);
    db.execute("UPDATE builds SET id = 4000000 WHERE id = 3000001").await;
    assert_eq!(db.enqueue("linux").await, 4_000_001);
}

#[tokio::test]
async fn numbers_that_leave_no_room_are_refused_and_leave_the_next_ones_alone() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    for id in ["9223372036854775807", "9223372036854775806", "9007199254740992"] {
        let refusal = db.refusal(&format!("INSERT INTO builds (id, builder) VALUES ({id}, 'linux')")).await;
        assert!(refusal.contains(&format!("id of builds is {id}, and can be 9007199254740991 at most")), "{refusal}");
    }
    assert!(
        db.refusal(
            "INSERT INTO builders (name, script, number) OVERRIDING SYSTEM VALUE VALUES ('x', 'true', 2147483647)"
        )
        .await
        .contains("number of builders is 2147483647")
    );
    assert_eq!(db.enqueue("linux").await, 1);
    db.builder("next", "true").await;
    db.execute("INSERT INTO builds (id, builder) VALUES (9007199254740990, 'linux')").await;
    assert_eq!(db.enqueue("linux").await, 9_007_199_254_740_991, "the last one");
}

#[tokio::test]
async fn imports_side_by_side_never_take_the_numbers_back() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    for round in 1..=3_i64 {
        let mut sessions = Vec::new();
        for from in 0..6_i64 {
            let session = db.session().await;
            // Interleaved, up and down, and each in one open transaction.
            let direction = if from % 2 == 0 { "n" } else { "500 - n" };
            let sql = format!(
                "BEGIN; INSERT INTO builds (id, builder) SELECT {round} * 10000 + ({direction}) * 6 + {from}, 'linux' FROM generate_series(0, 500) n; COMMIT"
            );
            sessions.push(tokio::task::spawn(async move { session.batch_execute(&sql).await }));
        }
        for session in sessions {
            session.await.unwrap().unwrap();
        }
        assert_eq!(db.enqueue("linux").await, round * 10_000 + 500 * 6 + 6);
    }
    // While others are queued: what lies below moves nothing.
    let importing = db.session().await;
    let import = tokio::task::spawn(async move {
        importing
            .batch_execute("INSERT INTO builds (id, builder) SELECT n, 'linux' FROM generate_series(1, 2000) n")
            .await
    });
    let mut last = db.enqueue("linux").await;
    for _ in 0..50 {
        let next = db.enqueue("linux").await;
        assert_eq!(next, last + 1);
        last = next;
    }
    import.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_other_tables_with_numbers_go_on_behind_what_was_copied_into_them() {
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, script, number) OVERRIDING SYSTEM VALUE VALUES ('a', 'true', 1), ('b', 'true', 7);
         INSERT INTO build_locks (name, number) OVERRIDING SYSTEM VALUE VALUES ('x', 1), ('y', 5);
         INSERT INTO build_subscriptions (id, address) OVERRIDING SYSTEM VALUE VALUES (1, 'ann@example.org'), (9, 'bob@example.org');
         INSERT INTO builders (name, script) VALUES ('c', 'true'); INSERT INTO build_locks (name) VALUES ('z');
         INSERT INTO build_subscriptions (address, events) VALUES ('eve@example.org', '{finished}');
         INSERT INTO builds (id, builder) VALUES (3, 'a');
         INSERT INTO build_mail (id, build_id, attempt, builder, event, verdict, address, message_id, thread) OVERRIDING SYSTEM VALUE
         VALUES (2, 3, 1, 'a', 'passed', 'passed', 'old@example.org', 'm', 'm'), (4, 3, 1, 'a', 'passed', 'passed', 'older@example.org', 'n', 'n')",
    )
    .await;
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', (SELECT max(number) FROM builders), (SELECT max(number) FROM build_locks), (SELECT max(id) FROM build_subscriptions))").await, "8 6 10");
    let daemon = Daemon::start(&db, "w", &[]).await;
    let id = db.enqueue("a").await;
    assert_eq!(db.finished(id).await, "passed");
    db.wait(&format!("SELECT min(id) > 4 FROM build_mail WHERE build_id = {id}")).await;
    drop(daemon);
}

#[tokio::test]
async fn null_means_the_default_in_every_column_that_a_person_fills() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    // In silence_timeout NULL means none. All columns at once, as an object mapper or a foreign table writes them: NULL but in those given.
    for (table, names, values, others) in [
        ("builders", "name, script", "'full', 'true'", "'bare', 'true'"),
        ("builds", "builder", "'linux'", "'linux'"),
        ("build_queue", "builder", "'linux'", "'linux'"),
        ("build_schedules", "name, builder, cron", "'full', 'linux', '0 3 * * *'", "'bare', 'linux', '0 3 * * *'"),
        ("build_subscriptions", "address", "'ann@example.org'", "'bob@example.org'"),
        ("build_locks", "name", "'full'", "'bare'"),
    ] {
        let nulls: Vec<String> = db
            .all(&format!(
                "SELECT attname::text FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped
                   AND attidentity <> 'a' AND attname <> ALL (string_to_array('{names}', ', '))"
            ))
            .await;
        let columns = nulls.join(", ");
        db.execute(&format!(
            "INSERT INTO {table} ({names}, {columns}) VALUES ({values}{})",
            ", NULL".repeat(nulls.len())
        ))
        .await;
        db.execute(&format!("INSERT INTO {table} ({names}) VALUES ({others})")).await;
        // The same as when they are left out, but for what tells rows apart.
        let rows: Vec<String> = db
            .all(&format!(
                "SELECT (to_jsonb(t) - '{{id,name,number,build_id,queued_at,queued_xid,address,silence_timeout}}'::text[])::text
                 FROM {table} t ORDER BY ctid DESC LIMIT 2"
            ))
            .await;
        assert_eq!(rows[0], rows[1], "{table}");
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue WHERE ready AND priority = 0").await, 2);
}

#[tokio::test]
async fn an_update_to_null_gives_the_default_but_takes_back_no_number_state_or_author() {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    let id = db.enqueue("linux").await;
    db.execute(&format!(
        "UPDATE builders SET max_running = 4, timeout = '2 hours', labels = '{{a}}', env = '{{\"A\": \"1\"}}', keep_workspace = true;
         UPDATE builders SET max_running = NULL, timeout = NULL, labels = NULL, locks = NULL, env = NULL, keep_workspace = NULL, silence_timeout = NULL;
         UPDATE build_queue SET priority = 7 WHERE build_id = {id}; UPDATE build_queue SET priority = NULL, needs = NULL;
         UPDATE builds SET properties = NULL, notify = NULL, needs = NULL"
    ))
    .await;
    let row: String = db.one("SELECT concat_ws(' ', max_running, timeout, labels, env, keep_workspace, silence_timeout IS NULL) FROM builders").await;
    assert_eq!(row, "1 01:00:00 {} {} f t");
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', priority, needs, ready) FROM build_queue").await, "0 {} t");
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', properties, notify, needs) FROM builds").await, "{} {} {}");
    for column in ["id", "state", "attempt", "submitted_by"] {
        let refusal = db.refusal(&format!("UPDATE builds SET {column} = NULL")).await;
        assert!(refusal.contains(&format!("null value in column \"{column}\"")), "{refusal}");
    }
    // A NULL key and a NULL name stay what they are.
    assert!(
        db.refusal("INSERT INTO builders (name, script) VALUES (NULL, 'true')")
            .await
            .contains("null value in column \"name\"")
    );
    assert!(
        db.refusal("INSERT INTO build_queue (builder) VALUES (NULL)").await.contains("needs a builder or a build_id")
    );
}

/// The conditions of the triggers name what the catalog says.
#[tokio::test]
async fn every_column_with_a_default_that_cannot_be_null_is_watched_for_null() {
    let db = Db::new().await;
    let missing: Vec<String> = db
        .all(
            "SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
             WHERE c.relnamespace = 'public'::regnamespace AND c.relname IN ('builders', 'builds', 'build_queue', 'build_schedules', 'build_subscriptions', 'build_locks', 'build_attempts', 'build_log')
               AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull AND (a.atthasdef OR a.attidentity <> '')
               AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'a_absent' AND pg_get_triggerdef(t.oid) ~ ('new.' || a.attname || ' IS NULL'))",
        )
        .await;
    assert_eq!(missing, Vec::<String>::new());
}
