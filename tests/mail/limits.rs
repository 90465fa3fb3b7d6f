//! What a build's own `notify` may cause: everybody who may ask for a build may name addresses there.

use super::{settings, start, story, subscribe};
use crate::support::smtp::{Mailbox, Manner};
use crate::support::{Daemon, Db, unique, wait_for};

/// Queues builds as somebody who may do no more than that, and ends them as if they had been built.
async fn flood(db: &Db, who: &str, builds: u32, address: &str) {
    let role = format!("{who}_{}", unique());
    db.execute(&format!(
        "CREATE ROLE {role} LOGIN; GRANT INSERT ON build_queue TO {role}; GRANT INSERT (builder, notify) ON builds TO {role};
         GRANT SELECT ON builders, builds, build_queue TO {role}"
    ))
    .await;
    let session = db.session().await;
    // One INSERT.
    session
        .batch_execute(&format!(
            "SET SESSION AUTHORIZATION {role};
             INSERT INTO build_queue (builder, notify)
             SELECT 'linux', (SELECT array_agg({address}) FROM generate_series(1, 100) a) FROM generate_series(1, {builds}) b;
             RESET SESSION AUTHORIZATION"
        ))
        .await
        .unwrap_or_else(|error| panic!("{error:?}"));
    ended(db).await;
}

/// All that waits has passed.
async fn ended(db: &Db) {
    db.execute(
        "SET buildreactor.session = 'daemon';
         UPDATE builds SET state = 'passed', attempt = 1, worker = 'w', started_at = clock_timestamp(), finished_at = clock_timestamp()
         WHERE state = 'queued';
         DELETE FROM build_queue; RESET buildreactor.session",
    )
    .await;
}

async fn farm() -> Db {
    let db = Db::new().await;
    db.builder("linux", "true").await;
    db.execute("SELECT pause_builder('linux')").await;
    db
}

async fn daemon(db: &Db, mailbox: &Mailbox, more: &[(&'static str, &str)]) -> Daemon {
    let mut env = settings(mailbox);
    env.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
    start(db, &env).await
}

/// Nothing is due now.
async fn quiet(db: &Db) {
    db.wait("SELECT NOT EXISTS (SELECT FROM build_mail WHERE state = 'sending' OR state = 'waiting' AND next_at <= clock_timestamp())").await;
}

#[tokio::test]
async fn one_insert_of_thousands_of_addresses_is_some_mails_and_the_others_are_held_back() {
    for (address, most, why) in [
        (
            "format('a%s.%s@example.org', a, b)",
            100,
            "held back: notify of eve_%''s builds has caused 100 mails within an hour ([mail] per_submitter)",
        ),
        (
            "format('user%s@domain%s.example', a, b)",
            100,
            "held back: notify of eve_%''s builds has caused 100 mails within an hour ([mail] per_submitter)",
        ),
        (
            "format('Victim+%s.%s@Example.ORG', a, b)",
            20,
            "held back: notify has caused 20 mails to victim@example.org, with and without +tags, within an hour ([mail] per_hour)",
        ),
        (
            "CASE a % 3 WHEN 0 THEN 'ViCtIm+x+' WHEN 1 THEN 'victim+' ELSE 'VICTIM+a=' END || a || '.' || b || CASE a % 2 WHEN 0 THEN '@example.org' ELSE '@EXAMPLE.org' END",
            20,
            "held back: notify has caused 20 mails to victim@example.org, with and without +tags, within an hour ([mail] per_hour)",
        ),
    ] {
        let db = farm().await;
        let mailbox = Mailbox::open(Manner::default()).await;
        subscribe(&db, "ann@example.org", "finished").await;
        flood(&db, "eve", 50, address).await;
        db.execute("INSERT INTO builds (builder, notify) VALUES ('linux', '{bob@example.org}'); INSERT INTO build_queue (build_id) VALUES (51)").await;
        ended(&db).await;
        let _daemon = daemon(&db, &mailbox, &[]).await;
        quiet(&db).await;
        let got = mailbox.taken();
        let (mut flooded, mut ann, mut bob) = (0, 0, 0);
        for got in &got {
            match got.to.as_str() {
                "ann@example.org" => ann += 1,
                "bob@example.org" => bob += 1,
                _ => flooded += 1,
            }
        }
        // The subscriber: 19 and a digest. Somebody else's mail is not behind five thousand.
        assert_eq!((flooded, ann, bob), (most, 20, 1), "{address}");
        let held: i64 = db.one(&format!("SELECT count(*) FROM mail_status WHERE state = 'waiting' AND last_error LIKE '{why}' AND next_try_in > '50 minutes'")).await;
        assert_eq!(
            held,
            5000 - most,
            "{address}: {:?}",
            db.all::<String>("SELECT DISTINCT coalesce(last_error, state) FROM mail_status").await
        );
    }
}

#[tokio::test]
async fn many_submitters_together_have_a_limit_too_and_subscribers_have_not() {
    let db = farm().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    for who in ["eve", "mallory", "trudy", "oscar"] {
        flood(&db, who, 2, &format!("format('{who}%s.%s@example.org', a, b)")).await;
    }
    let more = [("BUILDREACTOR_MAIL_PER_SUBMITTER", "70"), ("BUILDREACTOR_MAIL_NOTIFY_PER_HOUR", "150")];
    let _daemon = daemon(&db, &mailbox, &more).await;
    quiet(&db).await;
    assert_eq!(mailbox.taken().len(), 150);
    let of = |who: &str| mailbox.taken().iter().filter(|got| got.to.starts_with(who)).count();
    assert_eq!([of("eve"), of("mallory"), of("trudy"), of("oscar")], [70, 70, 10, 0]);
    db.wait("SELECT count(*) = 650 FROM mail_status WHERE state = 'waiting' AND last_error LIKE 'held back: %'").await;
    db.wait("SELECT bool_or(last_error LIKE '%notify has caused 150 mails within an hour ([mail] notify_per_hour)') FROM mail_status").await;

    // Whoever has subscribed hears of it, also by an address that notify names as well.
    subscribe(&db, "ann@example.org", "finished").await;
    flood(&db, "eve", 1, "CASE a WHEN 1 THEN 'Ann@Example.org' ELSE format('x%s@example.org', a) END").await;
    wait_for("the subscriber's mail", || async { !story(&mailbox, "ann@example.org").is_empty() }).await;
    quiet(&db).await;
    assert_eq!(mailbox.taken().len(), 151);
}

#[tokio::test]
async fn what_was_held_back_goes_out_later_or_is_parked_when_its_time_is_over() {
    let db = farm().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    flood(&db, "eve", 1, "format('a%s.%s@example.org', a, b)").await;
    let _daemon = daemon(&db, &mailbox, &[("BUILDREACTOR_MAIL_PER_SUBMITTER", "30")]).await;
    quiet(&db).await;
    assert_eq!(mailbox.taken().len(), 30);
    // An hour has gone by.
    let hour = "UPDATE build_mail SET sent_at = sent_at - interval '1 hour' WHERE state = 'sent';
                UPDATE build_mail SET next_at = clock_timestamp() WHERE state = 'waiting'";
    db.execute(hour).await;
    wait_for("the next thirty", || async { mailbox.taken().len() >= 60 }).await;
    quiet(&db).await;
    assert_eq!(mailbox.taken().len(), 60);
    db.execute(
        "UPDATE build_mail SET give_up_at = clock_timestamp(), next_at = clock_timestamp() WHERE state = 'waiting'",
    )
    .await;
    db.wait("SELECT count(*) = 40 FROM mail_status WHERE state = 'parked' AND last_error LIKE 'held back: %'").await;
    assert_eq!(mailbox.taken().len(), 60);
    // And somebody may have them sent all the same.
    db.execute("UPDATE build_mail SET sent_at = sent_at - interval '1 hour' WHERE state = 'sent'; SELECT retry_mail(id) FROM build_mail WHERE state = 'parked'").await;
    wait_for("thirty of the parked", || async { mailbox.taken().len() >= 90 }).await;
    quiet(&db).await;
    assert_eq!(mailbox.taken().len(), 90);
    assert_eq!(db.one::<i64>("SELECT count(DISTINCT address) FROM build_mail WHERE state = 'sent'").await, 90);
}

#[tokio::test]
async fn a_mailbox_is_an_address_without_its_tag() {
    let db = Db::new().await;
    for (address, mailbox) in [
        ("ann@example.org", "ann@example.org"),
        ("Ann+builds@Example.ORG", "ann@example.org"),
        ("ann+a+b@example.org", "ann@example.org"),
        ("ann+@example.org", "ann@example.org"),
        ("a.n-n_@sub.example.org", "a.n-n_@sub.example.org"),
        ("ann@plus+domain.example", "ann@plus+domain.example"),
    ] {
        assert_eq!(db.one::<String>(&format!("SELECT mail_mailbox('{address}')")).await, mailbox, "{address}");
    }
}
