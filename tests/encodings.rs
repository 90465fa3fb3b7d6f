//! Databases that are not UTF8: a character that the encoding lacks costs itself alone.

use std::time::Duration;

use crate::support::smtp::{Fault, Mailbox, Manner};
use crate::support::{Daemon, Db, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// Encodings, a text, and what each of them keeps of it.
const KEPT: &[(&str, &str)] = &[
    ("LATIN1", "Grüße, ? ? ?? ?, ?, ?"),
    ("LATIN9", "Grüße, € ? ?? ?, ?, ?"),
    ("WIN1252", "Grüße, € ? ?? ?, …, ?"),
    ("WIN1251", "Gr??e, € ? ?? ?, …, ж"),
    ("EUC_JP", "Gr??e, ? ☃ 日本 ?, …, ж"),
    ("SQL_ASCII", "Grüße, € ☃ 日本 💥, …, ж"),
    ("UTF8", "Grüße, € ☃ 日本 💥, …, ж"),
];
const TEXT: &str = "Grüße, € ☃ 日本 💥, …, ж";

/// EUC_JP has no snowman in some versions of the tables: whatever its own conversion says is right.
async fn kept(db: &Db, encoding: &str) -> String {
    let chars: Vec<char> = TEXT.chars().collect();
    let mut text = String::new();
    for c in chars {
        let sql = format!("SELECT '{c}'::text");
        let fits = db.session().await.query(&sql, &[]).await.is_ok();
        text.push(if fits { c } else { '?' });
    }
    if encoding != "EUC_JP" {
        assert_eq!(KEPT.iter().find(|(known, _)| *known == encoding).unwrap().1, text, "{encoding}");
    }
    text
}

#[tokio::test]
async fn a_log_keeps_all_that_its_database_can_hold_and_is_not_delayed() {
    for (encoding, _) in KEPT {
        let db = Db::encoded(encoding).await;
        let folder = temp_dir();
        let file = folder.path().join("text");
        // More than one piece, and many characters that are new in each.
        let mut text = format!("{TEXT}\n").repeat(3000);
        text.extend((0x4e00..0x6000_u32).filter_map(char::from_u32));
        text.push_str("\nthe end\n");
        std::fs::write(&file, &text).unwrap();
        db.builder("b", &format!("cat '{}'; exit 3", file.display())).await;
        let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
        let id = db.enqueue("b").await;
        assert_eq!(db.finished(id).await, "failed", "{encoding}");
        let took: f64 = db.one("SELECT extract(epoch FROM finished_at - started_at)::float8 FROM builds").await;
        assert!(took < 8.0, "{encoding}: {took} s");
        let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
        let kept = kept(&db, encoding).await;
        assert_eq!(log.lines().count(), 3002, "{encoding}");
        assert!(log.lines().take(3000).all(|line| line == kept), "{encoding}: {:?}", log.lines().next());
        assert_eq!(log.lines().nth(3000).unwrap().chars().count(), 0x6000 - 0x4e00, "{encoding}");
        assert!(log.ends_with("\nthe end\n"), "{encoding}");
        assert!(!daemon.has_said("WARN"), "{encoding}");
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn details_and_mails_and_properties_are_kept_likewise() {
    for encoding in ["LATIN1", "WIN1252", "EUC_JP", "SQL_ASCII"] {
        let db = Db::encoded(encoding).await;
        let kept = kept(&db, encoding).await;
        let mailbox = Mailbox::open(Manner::default()).await;
        let url = format!("smtp://localhost:{}", mailbox.port);
        let env = [HOUR, ("BUILDREACTOR_MAIL_URL", &url), ("BUILDREACTOR_MAIL_FROM", "builds@example.org")];
        let _daemon = Daemon::start(&db, "w", &env).await;
        // The detail of an attempt whose program does not exist names it.
        db.builder("b", &format!("#!/nonexistent/{kept}\n")).await;
        db.execute("UPDATE builders SET max_attempts = 1").await;
        db.execute("INSERT INTO build_subscriptions (address, events) VALUES ('ann@example.org', '{finished,error}')")
            .await;
        // The server's words hold whatever it likes.
        mailbox.faults([Fault::Say("RCPT", "550 5.1.1 Grüße, € ☃ 日本 💥, …, ж")]);
        let sql = format!(
            "INSERT INTO build_queue (builder, properties, reason) VALUES ('b', '{{\"branch\": \"{kept}\"}}', '{kept}') RETURNING build_id"
        );
        let id: i64 = db.one(&sql).await;
        let state = db.finished(id).await;
        db.wait("SELECT state = 'parked' FROM mail_status").await;
        let why: String = db.one("SELECT last_error FROM mail_status").await;
        assert!(why.contains("550") && why.contains(&kept), "{encoding}: {why}");
        let detail: Option<String> = db.one("SELECT detail FROM builds").await;
        println!("{encoding}: {state}: {detail:?}; {why}");
        db.execute("SELECT retry_mail(id) FROM build_mail").await;
        wait_for("the mail", || async { mailbox.taken().len() == 1 }).await;
    }
}

/// What an executor says of an attempt, and steps of another system, go the same way: here by the functions that write them.
#[tokio::test]
async fn steps_and_reasons_of_executors_and_workers_lose_single_characters_alone() {
    use buildreactor::database::queries::{Begun, Hello};
    use buildreactor::database::{ConnInfo, Database, SessionLimits};
    use buildreactor::model::{AttemptId, BuildId, Ended, Outcome, Seen, Step};

    for encoding in ["LATIN1", "WIN1251", "SQL_ASCII"] {
        let db = Db::encoded(encoding).await;
        let kept = kept(&db, encoding).await;
        db.builder("b", "true").await;
        let limits = SessionLimits { slots: 1, claim_idle: Duration::from_secs(60) };
        let database =
            Database::new(ConnInfo::from_env(Some(&db.url())).unwrap(), limits, "buildreactor test").unwrap();
        let hello = Hello {
            name: "w".into(),
            folder: "f".into(),
            boot: "b".into(),
            run: "r".into(),
            host: "h".into(),
            pid: 1,
            slots: 1,
            labels: Vec::new(),
            builders: vec!["*".into()],
            lease: Duration::from_secs(40),
            grace: Duration::from_secs(60),
        };
        let unready = [("b".to_owned(), format!("master says {TEXT}"))].into_iter().collect();
        database.hello(&hello, "active", Some(TEXT), true, &unready).await.unwrap();
        assert_eq!(db.one::<String>("SELECT detail FROM workers").await, kept, "{encoding}");
        assert_eq!(db.one::<String>("SELECT unready ->> 'b' FROM workers").await, format!("master says {kept}"));

        let build = BuildId(db.enqueue("b").await);
        let mut claim = database.claim().await.unwrap();
        assert!(claim.take_again(AttemptId { build, attempt: 1 }).await.unwrap());
        let Begun::Started(job) = database.begin_attempt(build, &hello, 1, &[]).await.unwrap() else { panic!() };
        let step = Step {
            position: 1,
            name: TEXT.into(),
            state: "passed",
            started_us: None,
            finished_us: None,
            detail: Some(TEXT.into()),
        };
        let seen = Seen { url: Some(format!("http://x/{TEXT}")), worker: Some(TEXT.into()), steps: vec![step] };
        database.attempt_seen(job.id, &seen).await.unwrap();
        let steps: String = db.one("SELECT name || '|' || detail FROM build_steps").await;
        assert_eq!(steps, format!("{kept}|{kept}"), "{encoding}");
        let at: String = db.one("SELECT external_url || external_worker FROM build_attempts").await;
        assert_eq!(at, format!("http://x/{kept}{kept}"));
        claim.record(job.id, &Ended::without_process(Outcome::Failed, TEXT.to_owned())).await.unwrap().unwrap();
        let detail: String = db.one("SELECT detail FROM build_attempts").await;
        assert!(detail.contains(&kept), "{encoding}: {detail}");
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_are_refused_where_the_database_would_take_them() {
    let db = Db::encoded("SQL_ASCII").await;
    db.builder("b", "true").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let session = db.session().await;
    session.batch_execute("SET client_encoding = 'SQL_ASCII'").await.unwrap();
    // As a client writes that sends what it has.
    let bad = r"convert_from('\xfffe41'::bytea, 'SQL_ASCII')";
    for sql in [
        format!("INSERT INTO build_queue (builder, reason) VALUES ('b', {bad})"),
        format!("INSERT INTO build_queue (builder, coalesce_key) VALUES ('b', {bad})"),
        format!("INSERT INTO build_queue (builder, properties) VALUES ('b', jsonb_build_object('a', {bad}))"),
        format!("INSERT INTO build_queue (builder, properties) VALUES ('b', jsonb_build_object({bad}, 1))"),
        format!("INSERT INTO builds (builder, reason) VALUES ('b', {bad})"),
        format!("INSERT INTO builders (name, script) VALUES ('c', {bad})"),
        format!("UPDATE builders SET env = jsonb_build_object('A', {bad})"),
        format!("INSERT INTO build_schedules (name, builder, cron) VALUES ({bad}, 'b', '30 2 * * *')"),
        format!("INSERT INTO build_subscriptions (address) VALUES ({bad} || '@example.org')"),
    ] {
        let error = session.batch_execute(&sql).await.expect_err(&sql);
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "22021", "{sql}: {error:?}");
        assert_eq!(error.message(), "a text of this row is not valid UTF-8", "{sql}");
    }
    let waiting: i64 = db.one("WITH p AS (SELECT pause_builder('b', 'x')) INSERT INTO build_queue (builder) SELECT 'b' FROM p RETURNING build_id").await;
    let cancel = format!("SELECT cancel_build({waiting}, {bad})");
    assert!(session.batch_execute(&cancel).await.is_err());
    // And all others go on.
    db.execute("SELECT resume_builder('b')").await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(db.finished(waiting).await, "passed");
}

#[tokio::test]
async fn a_mail_is_cut_between_characters_where_the_database_counts_bytes() {
    let db = Db::encoded("SQL_ASCII").await;
    let mailbox = Mailbox::open(Manner::default()).await;
    let url = format!("smtp://localhost:{}", mailbox.port);
    let env = [HOUR, ("BUILDREACTOR_MAIL_URL", &url), ("BUILDREACTOR_MAIL_FROM", "builds@example.org")];
    db.builder("b", "awk 'BEGIN { while (n++ < 60000) printf \"é☃\" }'").await;
    db.execute("UPDATE builders SET branch_property = 'branch'").await;
    let _daemon = Daemon::start(&db, "w", &env).await;
    for shift in ["", "x", "xx"] {
        db.execute(&format!(
            "INSERT INTO build_queue (builder, properties, reason, notify)
             VALUES ('b', jsonb_build_object('branch', '{shift}' || repeat('☃', 300)), '{shift}' || repeat('☃', 8000), '{{ann@example.org}}')"
        ))
        .await;
    }
    wait_for("three mails", || async { mailbox.taken().len() == 3 }).await;
    db.wait("SELECT count(*) = 3 FROM mail_status WHERE state = 'sent'").await;
}
