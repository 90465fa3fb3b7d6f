//! Tables and triggers of people's own that do not let builds go.

use crate::support::{Daemon, Db, text};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// So many builds that passed, the n-th `n` days ago, each with an attempt and a line of log.
async fn history(db: &Db, count: i32) {
    db.builder("a", "true").await;
    db.execute(&format!(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         SELECT 'a', 'passed', 1, 'old', t, t, t, 0 FROM (SELECT now() - n * interval '1 day' AS t FROM generate_series(1, {count}) n) s;
         INSERT INTO build_attempts (build_id, attempt, worker, state, started_at, finished_at, exit_code)
         SELECT id, 1, 'old', 'passed', started_at, started_at, 0 FROM builds;
         INSERT INTO build_log (build_id, attempt, seq, content) SELECT id, 1, 1, 'line' FROM builds"
    ))
    .await;
}

/// What people have made, by kind: all of it keeps builds 2, 3 and 5 of ten.
const HOLDERS: &[(&str, &str, &str)] = &[
    (
        "a reference",
        "CREATE TABLE deployments (build bigint REFERENCES builds); INSERT INTO deployments VALUES (2), (3), (5), (3), (NULL)",
        "table deployments refers to them",
    ),
    (
        "restrict",
        "CREATE TABLE deployments (build bigint REFERENCES builds ON DELETE RESTRICT); INSERT INTO deployments VALUES (2), (3), (5)",
        "table deployments refers to them",
    ),
    (
        "deferred",
        "CREATE TABLE deployments (build bigint REFERENCES builds DEFERRABLE INITIALLY DEFERRED); INSERT INTO deployments VALUES (2), (3), (5)",
        "table deployments refers to them",
    ),
    (
        "narrower",
        "CREATE TABLE \"My deployments\" (\"The build\" integer REFERENCES builds); INSERT INTO \"My deployments\" VALUES (2), (3), (5)",
        "table \"My deployments\" refers to them",
    ),
    (
        "elsewhere",
        "CREATE SCHEMA app; CREATE TABLE app.releases (build bigint REFERENCES builds); INSERT INTO app.releases VALUES (2), (3), (5)",
        "table app.releases refers to them",
    ),
    (
        "an attempt",
        "CREATE TABLE runs (build bigint, try integer, FOREIGN KEY (build, try) REFERENCES build_attempts); INSERT INTO runs VALUES (2, 1), (3, 1), (5, 1)",
        "table runs refers to them",
    ),
    (
        "a log",
        "CREATE TABLE marks (try integer, line bigint, build bigint, FOREIGN KEY (build, try, line) REFERENCES build_log (build_id, attempt, seq)); INSERT INTO marks VALUES (1, 1, 2), (1, 1, 3), (1, 1, 5)",
        "table marks refers to them",
    ),
    (
        "partitions",
        "CREATE TABLE parts (build bigint REFERENCES builds) PARTITION BY RANGE (build); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1) TO (4); CREATE TABLE parts_2 PARTITION OF parts DEFAULT; INSERT INTO parts VALUES (2), (3), (5)",
        "table parts refers to them",
    ),
    (
        "hidden rows",
        "CREATE TABLE secret (build bigint REFERENCES builds); ALTER TABLE secret ENABLE ROW LEVEL SECURITY; INSERT INTO secret VALUES (2), (3), (5)",
        "table secret refers to them",
    ),
    (
        "a column not null",
        "CREATE TABLE kept_by (build bigint NOT NULL REFERENCES builds ON DELETE SET NULL); INSERT INTO kept_by VALUES (2), (3), (5)",
        "null value in column \"build\" of relation \"kept_by\" violates not-null constraint",
    ),
    (
        "a cascade that ends",
        "CREATE TABLE top (build bigint PRIMARY KEY REFERENCES builds ON DELETE CASCADE); CREATE TABLE below (build bigint REFERENCES top); INSERT INTO top SELECT generate_series(1, 10); INSERT INTO below VALUES (2), (3), (5)",
        "table below refers to them",
    ),
    (
        "a trigger that refuses",
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF OLD.id IN (2, 3, 5) THEN RAISE ''released builds are kept''; END IF; RETURN OLD; END'; CREATE TRIGGER keep BEFORE DELETE ON builds FOR EACH ROW EXECUTE FUNCTION keep()",
        "released builds are kept",
    ),
    (
        "a trigger that says nothing",
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE WHEN OLD.id IN (2, 3, 5) THEN NULL ELSE OLD END; END'; CREATE TRIGGER keep BEFORE DELETE ON builds FOR EACH ROW EXECUTE FUNCTION keep()",
        "a trigger keeps them",
    ),
];

#[tokio::test]
async fn prune_builds_leaves_what_is_held_deletes_all_else_and_ends() {
    for (kind, holder, why) in HOLDERS {
        let db = Db::new().await;
        history(&db, 10).await;
        db.execute(holder).await;
        let output = db.psql(&["-qAt", "-c", "SELECT prune_builds('0')"]);
        assert_eq!(text(&output.stdout), "7\n", "{kind}: {output:?}");
        assert!(text(&output.stderr).contains(&format!("NOTICE:  3 old builds stay: {why}")), "{kind}: {output:?}");
        assert_eq!(db.all::<i64>("SELECT id FROM builds ORDER BY id").await, [2, 3, 5], "{kind}");
        assert_eq!(db.all::<i64>("SELECT build_id FROM build_log ORDER BY 1").await, [2, 3, 5], "{kind}");
        assert_eq!(db.one::<i64>("SELECT prune_builds('0')").await, 0, "{kind}");
        // In a transaction of a person's own, too, and as a statement of it that is not the last.
        db.execute("BEGIN; SELECT prune_builds('0'); SELECT prune_builds('0'); COMMIT").await;
    }
}

#[tokio::test]
async fn retention_leaves_what_is_held_deletes_all_else_and_says_so() {
    for (kind, holder, why) in HOLDERS {
        let db = Db::new().await;
        history(&db, 10).await;
        db.execute(holder).await;
        let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_RETENTION_BUILDS", "12h")]).await;
        daemon.says("deleted what [retention] no longer keeps: 7 builds").await;
        daemon.says(&format!("[retention] cannot delete all that is old: 3 builds stay: {why}")).await;
        assert_eq!(db.all::<i64>("SELECT id FROM builds ORDER BY id").await, [2, 3, 5], "{kind}");
        db.wait(&format!("SELECT kept = '3 builds stay: {why}' FROM worker_status")).await;
    }
}

#[tokio::test]
async fn several_tables_are_each_named_and_many_held_builds_do_not_end_a_round_early() {
    let db = Db::new().await;
    history(&db, 3000).await;
    // The oldest 2,500, which come first, and all at one instant, and some of them twice.
    db.execute(
        "CREATE TABLE a (build bigint REFERENCES builds); INSERT INTO a SELECT id FROM builds ORDER BY finished_at LIMIT 2500;
         CREATE TABLE b (build bigint REFERENCES builds); INSERT INTO b SELECT id FROM builds ORDER BY finished_at LIMIT 10;
         UPDATE builds SET finished_at = '2001-01-01' WHERE id IN (SELECT build FROM a)",
    )
    .await;
    let output = db.psql(&["-qAt", "-c", "SELECT prune_builds('400 days')"]);
    // 400 days and more ago: 2,601 of them, of which 101 are free.
    assert_eq!(text(&output.stdout), "101\n", "{output:?}");
    let notices = text(&output.stderr);
    assert!(
        notices.contains("2500 old builds stay: table a refers to them")
            && notices.contains("10 old builds stay: table b refers to them"),
        "{notices}"
    );
    assert_eq!(db.one::<i64>("SELECT prune_builds('400 days')").await, 0);
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_RETENTION_BUILDS_PER_BUILDER", "100")]).await;
    daemon.says("deleted what [retention] no longer keeps: 299 builds").await;
    daemon.says("10 builds stay: table b refers to them").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds").await, 2600);
}

#[tokio::test]
async fn a_role_that_may_not_read_the_table_or_delete_builds_is_told_the_same() {
    let db = Db::new().await;
    history(&db, 10).await;
    db.execute(
        "CREATE TABLE deployments (build bigint REFERENCES builds); INSERT INTO deployments VALUES (2), (3);
         CREATE ROLE references_pruner LOGIN; GRANT SELECT, UPDATE, DELETE ON builds TO references_pruner; GRANT SELECT ON build_queue TO references_pruner;
         GRANT EXECUTE ON FUNCTION prune_builds(interval), build_prune(bigint[]) TO references_pruner;
         SET ROLE references_pruner",
    )
    .await;
    assert_eq!(db.one::<i64>("SELECT prune_builds('0')").await, 8);
    db.execute("RESET ROLE; REVOKE DELETE ON builds FROM references_pruner; DROP TABLE deployments; SET ROLE references_pruner").await;
    assert!(db.refusal("SELECT prune_builds('0')").await.contains("permission denied"));
    db.execute("RESET ROLE; DROP OWNED BY references_pruner; DROP ROLE references_pruner").await;
}
