//! Advisory locks belong to the whole database, and whoever may connect may take any: what others take by accident means nothing here, and
//! what somebody takes on purpose holds up nobody for longer than a second without being named.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::{Daemon, Db, PROGRAM, buildreactor, connect, server, temp_dir, text, unique, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// For what must not wait; of a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A role without rights, and a session of it.
struct Mallory<'a> {
    db: &'a Db,
    role: String,
    client: Client,
    pid: i32,
}

impl Mallory<'_> {
    async fn connects(db: &Db) -> Mallory<'_> {
        let role = format!("mallory_{}", unique());
        db.execute(&format!("CREATE ROLE {role} LOGIN")).await;
        let (host, port) = (server().socket_dir().display(), server().port());
        let url = format!("host={host} port={port} dbname={} user={role} application_name=psql", db.name());
        let client = connect(&url).await;
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        Mallory { db, role, client, pid }
    }

    fn described(&self) -> String {
        format!("role {} (process {}, application psql)", self.role, self.pid)
    }

    /// Takes every lock of two keys that there is or was, as far as it can be had.
    async fn takes(&self, keys: &[(i32, i32)]) {
        for (class, key) in keys {
            let taken = self.client.query_one("SELECT pg_try_advisory_lock($1, $2)", &[class, key]).await.unwrap();
            assert!(taken.get::<_, bool>(0), "({class}, {key})");
        }
    }

    async fn lets_go(&self) {
        self.client.batch_execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    }

    async fn leaves(self) {
        drop(self.client);
        self.db.wait(&format!("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {})", self.pid)).await;
        self.db.execute(&format!("DROP ROLE {}", self.role)).await;
    }
}

/// What the lock table shows of us to everybody.
async fn keys_of(db: &Db, condition: &str) -> Vec<(i32, i32)> {
    let sql = format!(
        "SELECT format('%s %s', classid::bigint, objid::bigint - CASE WHEN objid::bigint > 2147483647 THEN 4294967296 ELSE 0 END)
         FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND {condition}
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1"
    );
    let rows = db.all::<String>(&sql).await;
    rows.iter()
        .map(|row| {
            let (class, key) = row.split_once(' ').unwrap();
            (class.parse().unwrap(), key.parse().unwrap())
        })
        .collect()
}

async fn because(db: &Db, id: i64) -> String {
    db.one(&format!("SELECT waiting_because FROM queue_status WHERE build_id = {id}")).await
}

#[tokio::test]
async fn locks_that_an_application_takes_for_itself_mean_nothing_here() {
    let db = Db::new().await;
    db.execute(
        "INSERT INTO build_locks (name) VALUES ('board');
         INSERT INTO builders (name, script, locks, max_running) VALUES ('b', 'true', '{board}', 3)",
    )
    .await;
    // Small numbers, as applications have them; those of earlier versions; hashes; one key and two; the owner's and anybody's.
    let owner = db.session().await;
    let mallory = Mallory::connects(&db).await;
    for (n, client) in [&owner, &mallory.client].into_iter().enumerate() {
        let taking = format!(
            "SELECT pg_try_advisory_lock(a, b) FROM generate_series(-8, 8) a, generate_series(-2, 8) b WHERE abs(a) % 2 = {n};
             SELECT pg_try_advisory_lock(-1000 - a, b) FROM generate_series({n}, 8, 2) a, generate_series(0, 8) b;
             SELECT pg_try_advisory_lock(a, hashtext(t)) FROM generate_series(-8, -1) a,
                 unnest(ARRAY['w', 'b', 'b k', 'b main', 'ann@example.org', 'migrate', 'build_queue']) t WHERE abs(a) % 2 = {n};
             SELECT pg_try_advisory_lock(a) FROM generate_series({n}, 100, 2) a;
             SELECT pg_try_advisory_lock(hashtext(t)), pg_try_advisory_lock(hashtextextended(t, 0))
             FROM unnest(ARRAY['w', 'b', 'build_queue', 'buildreactor']) t;
             SELECT pg_try_advisory_lock_shared(4711, a) FROM generate_series(1, 1000) a"
        );
        client.batch_execute(&taking).await.unwrap();
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_advisory_locks").await, 0);
    let began = Instant::now();
    let url = db.url();
    let output = tokio::task::spawn_blocking(move || buildreactor(&["migrate", "--database", &url], &[]));
    assert!(output.await.unwrap().status.success());
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_RETENTION_BUILDS", "1 day")]).await;
    for sql in [
        "INSERT INTO build_queue (builder, coalesce_key, run_after) VALUES ('b', 'main', now() + interval '1 hour')",
        "INSERT INTO build_queue (builder, coalesce_key, run_after) VALUES ('b', 'k', now() + interval '1 hour')",
        "INSERT INTO build_queue (builder, coalesce_key, run_after) VALUES ('b', 'k', now() + interval '1 hour')",
        "UPDATE build_queue SET priority = 3",
        "DELETE FROM build_queue",
    ] {
        db.execute(sql).await;
    }
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    assert!(began.elapsed() < AT_ONCE * 4, "{:?}", began.elapsed());
    assert_eq!(db.one::<String>("SELECT concat(status, slots_used) FROM builder_status").await, "idle0");
    assert_eq!(
        db.one::<String>("SELECT string_agg(state::text, ' ' ORDER BY id) FROM builds").await,
        "cancelled superseded cancelled passed"
    );
    assert_eq!(daemon.stop().await, Some(0));
    db.wait("SELECT count(*) = 0 FROM build_advisory_locks").await;
    mallory.leaves().await;
}

#[tokio::test]
async fn slots_and_units_that_a_stranger_takes_are_named_and_not_counted() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    let script = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    db.execute(&format!(
        "INSERT INTO build_locks (name, capacity) VALUES ('board', 2);
         INSERT INTO builders (name, script, max_running) VALUES ('plain', '{script}', 2);
         INSERT INTO builders (name, script, max_running, locks) VALUES ('locked', '{script}', 3, '{{board}}')"
    ))
    .await;
    let daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "4")]).await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('plain'), ('plain'), ('locked'), ('locked')").await;
    db.wait("SELECT sum(slots_used) = 4 FROM builder_status").await;
    assert_eq!(
        db.all::<String>(
            "SELECT concat_ws(' ', l.kind, coalesce(r.name, b.name), l.part, l.ours) FROM build_advisory_locks l
             LEFT JOIN builders r ON l.kind = 'slot' AND r.number = l.number LEFT JOIN build_locks b ON l.kind = 'unit' AND b.number = l.number
             WHERE l.kind <> 'name' ORDER BY 1"
        )
        .await,
        [
            "slot locked 1 t", "slot locked 2 t", "slot plain 1 t", "slot plain 2 t", "unit board 1 t", "unit board 2 t"
        ]
    );
    let keys = keys_of(&db, "pid IN (SELECT claim_pid FROM running_builds)").await;
    assert_eq!(keys.len(), 6);
    let (units, slots): (Vec<_>, Vec<_>) = keys.iter().partition(|(class, _)| *class > 1_233_512_904);
    std::fs::write(&gate, "").unwrap();
    db.wait("SELECT count(*) = 0 FROM build_queue").await;

    let mallory = Mallory::connects(&db).await;
    let by = format!("{}, which is no worker", mallory.described());
    mallory.takes(&slots).await;
    // None of them is counted.
    assert_eq!(
        db.all::<String>("SELECT concat_ws(' ', builder, status, slots_used) FROM builder_status").await,
        ["locked idle 0", "plain idle 0"]
    );
    let id = db.enqueue("plain").await;
    assert_eq!(because(&db, id).await, format!("builder plain is busy (0 of 2); 2 of its slots taken by {by}"));
    // A third slot is free.
    let free = db.enqueue("locked").await;
    assert_eq!(db.finished(free).await, "passed");
    mallory.lets_go().await;
    assert_eq!(db.finished(id).await, "passed");

    mallory.takes(&units[..1]).await;
    let free = db.enqueue("locked").await;
    assert_eq!(db.finished(free).await, "passed");
    mallory.takes(&units[1..]).await;
    let id = db.enqueue("locked").await;
    assert_eq!(because(&db, id).await, format!("waits for lock board (0 of 2 in use; 2 taken by {by})"));
    mallory.lets_go().await;
    assert_eq!(db.finished(id).await, "passed");
    mallory.leaves().await;
    drop(daemon);
}

#[tokio::test]
async fn who_has_a_workers_name_without_being_one_is_told_to_it_and_to_people() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let keys = keys_of(&db, "true").await;
    assert_eq!(keys.len(), 1);
    assert_eq!(daemon.stop().await, Some(0));
    db.wait("SELECT count(*) = 0 FROM build_advisory_locks").await;
    let mallory = Mallory::connects(&db).await;
    mallory.takes(&keys).await;
    let by = format!("{}, which is no worker", mallory.described());
    daemon.spawn_again();
    daemon.says(&format!("worker name `w` is in use by {by}")).await;
    assert_eq!(
        db.one::<String>("SELECT concat_ws(' ', status, detail) FROM worker_status").await,
        format!("stopped its name is taken by {by}")
    );
    let id = db.enqueue("b").await;
    assert_eq!(because(&db, id).await, format!("no worker is running: the name of worker w is taken by {by}"));
    let folder = temp_dir();
    let state = folder.path().display().to_string();
    let url = db.url();
    let output = tokio::task::spawn_blocking(move || {
        let env = [("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()), ("BUILDREACTOR_WORKER_NAME", "w")];
        buildreactor(&["check", "--database", &url], &env)
    });
    let said = text(&output.await.unwrap().stdout);
    assert!(said.contains(&format!("name `w` is in use by {by}")), "{said}");
    mallory.lets_go().await;
    daemon.ready().await;
    assert_eq!(db.finished(id).await, "passed");
    mallory.leaves().await;
}

#[tokio::test]
async fn a_statement_of_a_person_waits_for_no_lock_of_a_stranger() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    // What they are is to be seen while somebody uses them.
    let ann = db.session().await;
    ann.batch_execute("BEGIN").await.unwrap();
    const INSERT: &str = "INSERT INTO build_queue (builder, coalesce_key, run_after)";
    ann.batch_execute(&format!("{INSERT} VALUES ('b', 'main', '2100-01-01')")).await.unwrap();
    let coalesce = keys_of(&db, "true").await;
    ann.batch_execute("COMMIT; BEGIN; UPDATE build_queue SET priority = 1").await.unwrap();
    let ask = keys_of(&db, "true").await;
    assert_eq!(db.all::<String>("SELECT concat_ws(' ', kind, ours) FROM build_advisory_locks").await, ["ask t"]);
    ann.batch_execute("COMMIT").await.unwrap();
    let ann_pid: i32 = ann.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    assert_eq!((coalesce.len(), ask.len(), ask[0].1), (1, 1, ann_pid));

    let mallory = Mallory::connects(&db).await;
    mallory.takes(&[coalesce[0], ask[0]]).await;
    let began = Instant::now();
    ann.batch_execute(
        "UPDATE build_queue SET priority = 2; SET lock_timeout = '77s'; UPDATE build_queue SET priority = 3",
    )
    .await
    .unwrap();
    let timeout: String = ann.query_one("SHOW lock_timeout", &[]).await.unwrap().get(0);
    assert_eq!(timeout, "77s");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // One wait for all rows of a transaction, and a word about it; what was not seen is superseded by a daemon.
    for sql in [
        format!("{INSERT} VALUES ('b', 'main', '2100-01-01')"),
        format!("{INSERT} SELECT 'b', 'main', '2100-01-01' FROM generate_series(1, 100)"),
        format!(
            "BEGIN; {INSERT} VALUES ('b', 'main', '2100-01-01'); {INSERT} VALUES ('b', 'main', '2100-01-01'); COMMIT"
        ),
    ] {
        let began = Instant::now();
        let output = db.psql(&["-c", &sql]);
        assert!(output.status.success(), "{output:?}");
        assert!(began.elapsed() > Duration::from_millis(700) && began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
        let told = text(&output.stderr);
        let expected = format!("the coalesce_key \"main\" of builder \"b\" is in use by {}", mallory.described());
        assert!(told.contains(&expected) && told.matches("NOTICE").count() == 1, "{told}");
    }
    let other = format!("{INSERT} VALUES ('b', 'other', '2100-01-01')");
    let began = Instant::now();
    db.execute(&other).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let _daemon = Daemon::start(&db, "w", &[("BUILDREACTOR_REACTOR_POLL", "1s")]).await;
    db.wait(
        "SELECT count(*) = 1 FROM queue_status q JOIN build_queue b USING (build_id) WHERE b.coalesce_key = 'main'",
    )
    .await;
    mallory.leaves().await;
}

#[tokio::test]
async fn migrate_says_whom_it_waits_for_and_not_for_ever_for_one_that_could_not() {
    let db = Db::new().await;
    let mallory = Mallory::connects(&db).await;
    mallory.takes(&[(2_041_775_267, 318_804_951)]).await;
    assert_eq!(
        db.all::<String>("SELECT concat_ws(' ', kind, role, ours) FROM build_advisory_locks").await,
        [format!("migrate {} f", mallory.role)]
    );
    let migrate =
        |url: String| tokio::task::spawn_blocking(move || buildreactor(&["migrate", "--database", &url], &[]));
    let output = migrate(db.url()).await.unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{told}");
    let who = format!("process {} of role {}, application psql", mallory.pid, mallory.role);
    assert!(told.contains(&format!("waiting for another migrate: {who}")), "{told}");
    assert!(told.contains(&format!("holds a lock that the migration needs ({who}")), "{told}");
    mallory.lets_go().await;
    // One that could is waited for.
    let owner = db.session().await;
    owner.batch_execute("SELECT pg_advisory_lock(2041775267, 318804951)").await.unwrap();
    let folder = temp_dir();
    let said = folder.path().join("said");
    let mut waiting = std::process::Command::new(PROGRAM)
        .args(["migrate", "--database", &db.url()])
        .stderr(std::fs::File::create(&said).unwrap())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("its word", || async {
        std::fs::read_to_string(&said).unwrap().contains("waiting for another migrate: process")
    })
    .await;
    assert!(waiting.try_wait().unwrap().is_none());
    owner.batch_execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    assert!(tokio::task::spawn_blocking(move || waiting.wait()).await.unwrap().unwrap().success());
    mallory.leaves().await;
}

#[tokio::test]
async fn retention_and_mail_go_on_beside_a_stranger_that_has_their_locks() {
    let db = Db::new().await;
    db.builder("b", "exit 1").await;
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at)
         SELECT 'b', 'failed', 1, 'old', t, t, t FROM generate_series(now() - interval '30 days', now() - interval '20 days', '1 day') t;
         INSERT INTO build_subscriptions (address, events) VALUES ('ann@example.org', '{problem,still_failing}')",
    )
    .await;
    let mallory = Mallory::connects(&db).await;
    let hash: i32 = db.one("SELECT hashtext('ann@example.org')").await;
    mallory.takes(&[(2_041_775_267, 318_804_952), (2_041_775_266, hash)]).await;
    assert_eq!(
        db.all::<String>("SELECT concat_ws(' ', kind, ours) FROM build_advisory_locks ORDER BY 1").await,
        ["mail f", "retention f"]
    );
    let folder = temp_dir();
    let outbox = folder.path().display().to_string();
    let env = [
        HOUR,
        ("BUILDREACTOR_RETENTION_BUILDS", "10 days"),
        ("BUILDREACTOR_MAIL_DRY_RUN", outbox.as_str()),
        ("BUILDREACTOR_MAIL_FROM", "builds@example.org"),
    ];
    let _daemon = Daemon::start(&db, "w", &env).await;
    db.wait("SELECT count(*) = 0 FROM builds").await;
    for _ in 0..3 {
        let id = db.enqueue("b").await;
        assert_eq!(db.finished(id).await, "failed");
    }
    let began = Instant::now();
    db.wait("SELECT count(*) = 3 FROM build_mail WHERE state = 'sent'").await;
    assert!(began.elapsed() < AT_ONCE * 4, "{:?}", began.elapsed());
    mallory.leaves().await;
}
