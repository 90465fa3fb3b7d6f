//! What mail costs those who build.

use std::time::{Duration, Instant};

use buildreactor::database::mail::{Limits, Reach};
use buildreactor::database::{ConnInfo, Database, SessionLimits};

use super::{PASS, all_gone, build, obedient, settings, start, subscribe};
use crate::support::smtp::{Fault, Mailbox, Manner};
use crate::support::{Db, SOON, wait_for};

const LIMITS: Limits = Limits { address: 1000, submitter: 1000, notified: 1000 };

#[tokio::test]
async fn a_mail_server_that_hangs_delays_no_build() {
    const BUILDS: i64 = 50;
    const ROUNDS: i64 = 5;
    // Three farms on one server, side by side: nobody has asked for mail; each build is a mail, which nobody sends; each build is a mail,
    // and the postman waits for an answer that does not come before the end of this test.
    let (quiet, unsent, hanging) = (Db::new().await, Db::new().await, Db::new().await);
    let mailbox = Mailbox::open(Manner::default()).await;
    mailbox.faults([Fault::Hang("MAIL")]);
    let mut env = settings(&mailbox);
    env.push(("BUILDREACTOR_MAIL_TIMEOUT", "10 minutes".to_owned()));
    let mut daemons = Vec::new();
    for (db, mail, env) in [(&quiet, false, env.as_slice()), (&unsent, true, &[]), (&hanging, true, &env)] {
        obedient(db, "linux").await;
        if mail {
            subscribe(db, "ann@example.org", "finished").await;
        }
        daemons.push(start(db, env).await);
        build(db, "linux", PASS).await;
    }
    wait_for("the server to hang", async || mailbox.faults_left() == 0).await;
    let at_hand = "SELECT concat_ws(' ', id, state, tries, next_at) FROM build_mail ORDER BY id LIMIT 1";
    let first: String = hanging.one(at_hand).await;
    assert!(first.starts_with("1 sending 1 "), "{first}");

    let mut farms = [&quiet, &unsent, &hanging];
    for _ in 0..ROUNDS {
        for db in farms {
            let insert = format!("INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, {BUILDS})");
            db.execute(&insert).await;
            db.wait_within(SOON * 3, "SELECT NOT EXISTS (SELECT FROM build_queue)").await;
        }
        farms.rotate_left(1);
        // Nothing of the daemon is in a transaction or holds a lock, and the postman hangs where it hung all the time.
        hanging
            .wait(
                "SELECT NOT EXISTS (SELECT FROM pg_stat_activity
                                    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL)
                    AND NOT EXISTS (SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                                    WHERE l.pid <> pg_backend_pid() AND c.relname LIKE 'build%'
                                      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
            )
            .await;
        assert_eq!(hanging.one::<String>(at_hand).await, first);
        assert!(mailbox.connections() == 1 && mailbox.got().is_empty());
    }

    // From one result to the next, so claim, attempt, script and result of a build. Medians of one run and their ratio, because the
    // machine is shared; a result that waited for the mail server would wait in each of them.
    let cycle = format!(
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - before))::float8
         FROM (SELECT finished_at, lag(finished_at) OVER (PARTITION BY (id - 2) / {BUILDS} ORDER BY finished_at) AS before
               FROM builds WHERE id > 1) b"
    );
    let times: [f64; 3] = [quiet.one(&cycle).await, unsent.one(&cycle).await, hanging.one(&cycle).await];
    println!(
        "seconds a build, without mail, with mail that nobody sends, and while the server hangs: {times:.4?}; ratios {:.2} and {:.2}",
        times[2] / times[0],
        times[2] / times[1]
    );
    assert!(times[2] < times[0] * 2.0 && times[2] < times[1] * 2.0, "{times:?}");
    let all = BUILDS * ROUNDS + 1;
    assert_eq!(hanging.one::<i64>("SELECT count(*) FROM builds WHERE state = 'passed'").await, all);
    let waiting = "SELECT count(*) FROM build_mail WHERE state IN ('waiting', 'sending')";
    assert_eq!([quiet.one(waiting).await, unsent.one(waiting).await, hanging.one::<i64>(waiting).await], [0, all, all]);
}

#[tokio::test]
async fn results_cost_next_to_nothing_more_where_nobody_has_asked() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    // A ledger of some length.
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         SELECT 'linux', CASE WHEN n % 2 = 0 THEN 'passed' ELSE 'failed' END::build_state, 1, 'w', t, t, t, n % 2
         FROM (SELECT n, now() - interval '1 year' + n * interval '1 minute' AS t FROM generate_series(1, 50000) n) s; ANALYZE builds",
    )
    .await;
    let results = async |what: &str| {
        db.execute("INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 1000)").await;
        let session = db.session().await;
        session.batch_execute("SET buildreactor.session = 'daemon'; SET enable_seqscan = off").await.unwrap();
        let ids: Vec<i64> = db.all("SELECT build_id FROM build_queue").await;
        let began = Instant::now();
        for id in ids {
            session
                .batch_execute(&format!("UPDATE builds SET state = 'failed', attempt = 1, worker = 'w', started_at = clock_timestamp(), finished_at = clock_timestamp() WHERE id = {id}; DELETE FROM build_queue WHERE build_id = {id}"))
                .await
                .unwrap();
        }
        let took = began.elapsed();
        println!("1000 results, {what}: {took:?}");
        took
    };
    db.execute("ALTER TABLE builds DISABLE TRIGGER mails").await;
    let floor = results("no trigger").await;
    db.execute("ALTER TABLE builds ENABLE TRIGGER mails").await;
    let nobody = results("nobody asked").await;
    subscribe(&db, "ann@example.org", "failed").await;
    let one = results("one address").await;
    db.execute("UPDATE builders SET branch_property = 'branch'").await;
    let branch = results("one address, by branch").await;
    let most = floor.max(Duration::from_millis(500)) * 6;
    assert!(nobody < most && one < most * 2 && branch < most * 8, "{floor:?} {nobody:?} {one:?} {branch:?}");
}

/// One mail comes, is found, sent, and nothing more is found: medians of 40 times, looking from where the outbox was last found to
/// begin, and from its very beginning.
async fn rounds_of_the_postman(db: &Db, database: &Database) -> [Duration; 2] {
    let mut reach = Reach::default();
    let mut times = [Vec::new(), Vec::new()];
    for n in 0..80 {
        let id: i64 = db
            .one(&format!(
                "INSERT INTO build_mail (build_id, attempt, builder, event, verdict, address, message_id, thread)
                 SELECT 1, coalesce(max(attempt), 0) + 1, 'linux', 'passed', 'passed', 'ann{}@example.org', 'x', 'x' FROM build_mail WHERE build_id = 1
                 RETURNING id",
                n / 2 % 10
            ))
            .await;
        let mut from_the_beginning = Reach::default();
        let reach = if n % 2 == 0 { &mut reach } else { &mut from_the_beginning };
        let began = Instant::now();
        let claimed = database.claim_mail(reach, "w", LIMITS, SOON).await.unwrap().unwrap();
        assert_eq!(claimed.ids(), [id]);
        database.mail_sent(&[id]).await.unwrap();
        assert!(database.claim_mail(reach, "w", LIMITS, SOON).await.unwrap().is_none());
        assert_eq!(database.mail_wait(reach, SOON).await.unwrap(), None);
        times[n % 2].push(began.elapsed());
    }
    times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    })
}

#[tokio::test]
async fn a_transaction_that_stays_open_makes_the_outbox_no_slower() {
    let db = Db::new().await;
    let limits = SessionLimits { slots: 2, claim_idle: SOON };
    let database = Database::new(ConnInfo::from_env(Some(&db.url())).unwrap(), limits, "w").unwrap();
    obedient(&db, "linux").await;
    db.execute(
        "INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at, exit_code)
         SELECT 'linux', 'passed', 1, 'w', now(), now(), now(), 0 FROM generate_series(1, 100001)",
    )
    .await;
    let empty = rounds_of_the_postman(&db, &database).await;
    // As the claim of a build that takes long: until it ends, no VACUUM removes what it could still see.
    let claim = db.session().await;
    claim.batch_execute("BEGIN; SELECT txid_current()").await.unwrap();
    db.execute(
        "INSERT INTO build_mail (build_id, attempt, builder, event, verdict, address, message_id, thread, next_at)
         SELECT id, 1, 'linux', 'passed', 'passed', 'ann' || id % 10 || '@example.org', 'x', 'x', now() - interval '2 hours' FROM builds WHERE id > 1;
         UPDATE build_mail SET state = 'sending', sender = 'w', tries = 1, next_at = now() - interval '110 minutes' WHERE state = 'waiting';
         UPDATE build_mail SET state = 'sent', sender = NULL, next_at = NULL, sent_at = now() - interval '2 hours' WHERE state = 'sending'",
    )
    .await;
    db.execute("VACUUM ANALYZE build_mail").await;
    let behind = rounds_of_the_postman(&db, &database).await;
    let ratios = [0, 1].map(|n| behind[n].as_secs_f64() / empty[n].as_secs_f64());
    println!(
        "a mail, empty outbox: {:?}; behind 100,000 sent ones: {:?}, {:.1} times as long; looked for from the beginning: {:?}, {:.1} times",
        empty[0], behind[0], ratios[0], behind[1], ratios[1]
    );
    // Else this would show nothing; on a busy machine the waits for a turn are most of both.
    assert!(behind[1] > behind[0], "{behind:?}");
    assert!(ratios[0] < 4.0, "{ratios:?}");
}

#[tokio::test]
async fn a_mail_that_is_seen_long_after_it_was_due_is_sent() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    let _daemon = start(&db, &settings(&mailbox)).await;
    subscribe(&db, "ann@example.org", "finished").await;
    build(&db, "linux", PASS).await;
    all_gone(&db).await;
    // As of a transaction that ended a build and stayed open for an hour.
    db.execute(
        "INSERT INTO build_mail (build_id, attempt, builder, event, verdict, address, message_id, thread, next_at)
         VALUES (1, 2, 'linux', 'passed', 'passed', 'ann@example.org', 'late', 'late', clock_timestamp() - interval '1 hour')",
    )
    .await;
    db.wait_within(SOON * 3, "SELECT state = 'sent' FROM build_mail WHERE message_id = 'late'").await;
    assert_eq!(mailbox.taken().len(), 2);
}
