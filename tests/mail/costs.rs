//! What mail costs those who build.

use std::time::{Duration, Instant};

use super::{PASS, build, obedient, settings, start, subscribe};
use crate::support::smtp::{Fault, Mailbox, Manner};
use crate::support::{Db, wait_for};

#[tokio::test]
async fn builds_flow_while_the_mail_server_hangs() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    let mut env = settings(&mailbox);
    // Whoever waits for it waits beyond the end of this test.
    env.push(("BUILDREACTOR_MAIL_TIMEOUT", "10 minutes".to_owned()));
    let _daemon = start(&db, &env).await;
    let flow = async || {
        let began = Instant::now();
        db.execute("INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 100)").await;
        db.wait("SELECT count(*) = 0 FROM build_queue").await;
        began.elapsed()
    };
    let (warm, without) = (flow().await, flow().await);
    subscribe(&db, "ann@example.org", "finished").await;
    mailbox.faults([Fault::Hang("MAIL")]);
    build(&db, "linux", PASS).await;
    wait_for("the server to hang", async || mailbox.faults_left() == 0).await;
    let hanging = flow().await;
    println!("100 builds: {warm:?}, {without:?}; while the mail server hangs: {hanging:?}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_mail WHERE state IN ('waiting', 'sending')").await, 101);
    assert!(mailbox.taken().is_empty());
    assert_eq!(db.one::<i64>("SELECT count(*) FROM builds WHERE state <> 'passed'").await, 0);
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
    let most = floor.max(Duration::from_millis(500)) * 4;
    assert!(nobody < most && one < most * 2 && branch < most * 8, "{floor:?} {nobody:?} {one:?} {branch:?}");
}
