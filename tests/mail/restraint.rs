//! Not too many mails, to nobody who should get none, and nothing in them that could do harm.

use std::path::PathBuf;
use std::time::Instant;

use mail_parser::{Message, MessageParser};

use super::{PASS, all_gone, build, header, obedient, parse, settings, start, subscribe};
use crate::support::smtp::{Mailbox, Manner};
use crate::support::{Daemon, Db, TempDir, buildreactor, temp_dir, text};

#[tokio::test]
async fn a_thousand_failures_are_some_mails_and_a_digest_and_none_is_lost() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    db.builder("linux", "true").await;
    subscribe(&db, "ann@example.org", "failed").await;
    db.execute(
        "SELECT pause_builder('linux'); INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 1000)",
    )
    .await;
    let began = Instant::now();
    let session = db.session().await;
    session.batch_execute("SET buildreactor.session = 'daemon'").await.unwrap();
    for id in 1..=1000 {
        session
            .batch_execute(&format!(
                "BEGIN; UPDATE builds SET state = 'failed', attempt = 1, worker = 'w', started_at = clock_timestamp(), finished_at = clock_timestamp() WHERE id = {id};
                 DELETE FROM build_queue WHERE build_id = {id}; COMMIT"
            ))
            .await
            .unwrap();
    }
    println!("a thousand results in {:?}", began.elapsed());
    let mut env = settings(&mailbox);
    env.push(("BUILDREACTOR_MAIL_PER_HOUR", "5".to_owned()));
    let _daemon = start(&db, &env).await;
    all_gone(&db).await;
    let got = mailbox.taken();
    assert_eq!(got.len(), 5);
    let messages: Vec<Message<'_>> = got.iter().map(parse).collect();
    assert_eq!(messages[4].subject(), Some("[prøject] 996 builds, 996 of them failed"));
    let mut told: Vec<i64> = messages[..4].iter().map(|m| header(m, "X-Buildreactor-Build").parse().unwrap()).collect();
    let digest = messages[4].body_text(0).unwrap().into_owned();
    let lines = digest.lines().filter(|line| line.contains("FAILED"));
    told.extend(lines.map(|line| line.split('#').nth(1).unwrap().split(' ').next().unwrap().parse::<i64>().unwrap()));
    told.sort_unstable();
    assert_eq!(told, (1..=1000).collect::<Vec<_>>());
    assert!(messages[4].body_html(0).unwrap().contains("linux #1000"));

    // What comes within the hour waits, and goes out when it is over.
    db.execute("SELECT resume_builder('linux'); UPDATE builders SET script = 'exit 1'").await;
    for _ in 0..7 {
        db.enqueue("linux").await;
    }
    db.wait("SELECT count(*) = 7 AND bool_and(next_at > clock_timestamp() + interval '30 minutes') FROM build_mail WHERE state = 'waiting'").await;
    assert_eq!(mailbox.taken().len(), 5);
    db.execute("UPDATE build_mail SET sent_at = sent_at - interval '1 hour' WHERE state = 'sent'; UPDATE build_mail SET next_at = clock_timestamp() WHERE state = 'waiting'").await;
    all_gone(&db).await;
    let subjects: Vec<String> =
        mailbox.taken()[5..].iter().map(|got| parse(got).subject().unwrap().to_owned()).collect();
    assert_eq!(subjects.len(), 5, "{subjects:?}");
    assert_eq!(subjects[4], "[prøject] 3 builds, 3 of them failed");
}

/// A daemon that writes .eml files; into a folder of `BUILDREACTOR_TEST_MAILS` where that is set, for `scripts/pages.sh`.
struct Dry {
    mails: PathBuf,
    _folder: TempDir,
    _daemon: Daemon,
}

impl Dry {
    async fn start(db: &Db, more: &[(&'static str, String)]) -> Dry {
        let folder = temp_dir();
        let mails = match std::env::var_os("BUILDREACTOR_TEST_MAILS") {
            Some(kept) => PathBuf::from(kept).join(db.name()),
            None => folder.path().join("mails"),
        };
        let mut env = vec![
            ("BUILDREACTOR_MAIL_DRY_RUN", mails.display().to_string()),
            ("BUILDREACTOR_MAIL_FROM", "builds@example.org".to_owned()),
        ];
        env.extend(more.iter().cloned());
        Dry { _daemon: start(db, &env).await, mails, _folder: folder }
    }

    fn files(&self) -> Vec<Vec<u8>> {
        let Ok(entries) = std::fs::read_dir(&self.mails) else { return Vec::new() };
        let files =
            entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "eml"));
        files.map(|path| std::fs::read(path).unwrap()).collect()
    }
}

#[tokio::test]
async fn mail_goes_only_to_domains_that_are_allowed_and_as_files_in_a_dry_run() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    for address in ["ann@example.org", "bob@Lists.Example.org", "eve@evilexample.org", "eve@example.org.evil.test"] {
        subscribe(&db, address, "finished").await;
    }
    let dry = Dry::start(&db, &[("BUILDREACTOR_MAIL_DOMAINS", "example.org".to_owned())]).await;
    build(&db, "linux", PASS).await;
    all_gone(&db).await;
    let states =
        "SELECT address || ' ' || state || coalesce(': ' || last_error, '') FROM build_mail ORDER BY lower(address)";
    assert_eq!(
        db.all::<String>(states).await,
        [
            "ann@example.org sent",
            "bob@Lists.Example.org sent",
            "eve@evilexample.org discarded: `eve@evilexample.org` is in none of [mail] domains",
            "eve@example.org.evil.test discarded: `eve@example.org.evil.test` is in none of [mail] domains",
        ]
    );
    let files = dry.files();
    assert_eq!(files.len(), 2);
    for file in &files {
        assert_eq!(MessageParser::default().parse(file).unwrap().subject(), Some("[builds] linux #1 PASSED"));
    }
}

#[tokio::test]
async fn hostile_input_breaks_no_header_and_no_page() {
    let db = Db::new().await;
    db.builder("linux", r#"printf 'first\r\n.\r\n..dots\n\033[31m<script>alert(1)</script>\033[0m \303\050 \360\237\222\245 \327\251\n'; exit 3"#).await;
    db.execute(
        "ALTER TABLE builds ADD COLUMN \"<b>own\r\nX-Evil: 1</b>\" text, ADD COLUMN event text, ADD COLUMN good text",
    )
    .await;
    let reason = "line\r\nBcc: eve@example.org\r\n\r\n<img src=x onerror=alert(1)> \u{202e}evil\u{2066} 🎉 שלום "
        .to_owned()
        + &"x".repeat(10_000);
    let session = db.session().await;
    session
        .execute(
            "INSERT INTO builds (builder, reason, properties, notify, \"<b>own\r\nX-Evil: 1</b>\", event) VALUES ('linux', $1, $2, '{ann@example.org,-f@example.org,ünï@exämple.org}', '<i>own</i>', 'x')",
            &[&reason, &serde_json::json!({"branch": "a\r\nSubject: <b>gotcha</b>\u{202e}", "<script>": {"deep": ["</pre>"]}, "long": "y".repeat(15_000)})],
        )
        .await
        .unwrap();
    db.execute("INSERT INTO build_queue (build_id) VALUES (1)").await;
    let dry = Dry::start(&db, &[("BUILDREACTOR_MAIL_PROJECT", "a\"b <c> é, d".to_owned())]).await;
    assert_eq!(db.finished(1).await, "failed");
    all_gone(&db).await;
    let files = dry.files();
    assert_eq!(
        files.len(),
        3,
        "{:?}",
        db.all::<String>("SELECT address || state || coalesce(last_error, '') FROM build_mail").await
    );
    for file in &files {
        let message = MessageParser::default().parse(file).unwrap();
        let names: Vec<String> = message.headers().iter().map(|header| header.name().to_lowercase()).collect();
        for name in ["bcc", "x-evil"] {
            assert!(!names.iter().any(|there| there == name), "{names:?}");
        }
        assert_eq!(names.iter().filter(|name| *name == "subject").count(), 1);
        assert_eq!(
            message.subject(),
            Some("[a\"b <c> é, d] linux #1 FAILED (its first build) a Subject: <b>gotcha</b>")
        );
        // No line of it is longer than may be (RFC 5322), and headers are ASCII but for addresses.
        assert!(file.split(|byte| *byte == b'\n').all(|line| line.len() <= 999));
        let plain = message.body_text(0).unwrap().replace("\r\n", "\n");
        for part in [
            "..dots\n",
            "<script>alert(1)</script> ",
            "💥 ש",
            "reason: line Bcc: eve@example.org <img",
            "exit code 3",
            "own X-Evil: 1",
        ] {
            assert!(plain.contains(part), "no `{part}` in {plain}");
        }
        assert!(!plain.contains(['\u{1b}', '\u{202e}', '\u{2066}']) && plain.len() < 20_000, "{}", plain.len());
        let html = message.body_html(0).unwrap();
        for tag in ["<script", "<img", "<i>", "<b>own", "</pre></", "\u{202e}"] {
            assert!(!html.contains(tag), "{tag} in {html}");
        }
        assert_eq!(html.matches("<pre").count(), 2);
    }
}

#[tokio::test]
async fn hostile_input_breaks_no_digest() {
    let db = Db::new().await;
    db.builder("linux-x86_64-with-a-name-that-is-as-long-as-a-name-may-be-63-ch", "exit 1").await;
    db.builder("docs", "exit 1").await;
    db.execute("UPDATE builders SET branch_property = 'branch'; INSERT INTO build_subscriptions (address, events) VALUES ('ann@example.org', '{finished,error}')").await;
    let branches = [
        "main",
        "a\r\nBcc: eve@example.org\u{202e}",
        "<script>alert(1)</script></td></table>",
        "fix/שלום-🎉",
        &"x".repeat(300),
    ];
    let session = db.session().await;
    for (n, branch) in branches.iter().cycle().take(20).enumerate() {
        let builder =
            if n % 3 == 0 { "docs" } else { "linux-x86_64-with-a-name-that-is-as-long-as-a-name-may-be-63-ch" };
        let insert = "INSERT INTO builds (builder, properties) VALUES ($1, jsonb_build_object('branch', $2::text))";
        session.execute(insert, &[&builder, branch]).await.unwrap();
    }
    // As if they had been built: every kind of end.
    db.execute(
        "INSERT INTO build_queue (build_id) SELECT id FROM builds; SET buildreactor.session = 'daemon';
         UPDATE builds SET state = ('{passed,failed,timed_out,error}'::build_state[])[1 + id % 4], attempt = 1, worker = 'w',
                           started_at = clock_timestamp(), finished_at = clock_timestamp();
         DELETE FROM build_queue; RESET buildreactor.session",
    )
    .await;
    let more = [
        ("BUILDREACTOR_MAIL_PER_HOUR", "2".to_owned()),
        ("BUILDREACTOR_MAIL_BUILD_URL", "https://builds.example.org/{id}".to_owned()),
        ("BUILDREACTOR_MAIL_UNSUBSCRIBE", "mailto:admin@example.org".to_owned()),
    ];
    let dry = Dry::start(&db, &more).await;
    all_gone(&db).await;
    let files = dry.files();
    let digests: Vec<Message<'_>> = files
        .iter()
        .map(|file| MessageParser::default().parse(file).unwrap())
        .filter(|message| message.subject().unwrap().contains("19 builds"))
        .collect();
    assert_eq!((files.len(), digests.len()), (2, 1));
    assert!(digests[0].header("Bcc").is_none());
    let html = digests[0].body_html(0).unwrap();
    for tag in ["<script", "</td></table>", "\u{202e}"] {
        assert!(!html.contains(tag), "{tag} in {html}");
    }
    assert_eq!(html.matches("<tr").count(), 19);
    assert!(!digests[0].body_text(0).unwrap().contains("\nBcc"));
}

#[tokio::test]
async fn templates_are_replaced_one_by_one_and_a_wrong_one_is_found_before_it_is_needed() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let set = ("BUILDREACTOR_MAIL_TEMPLATES", folder.path().display().to_string());
    put("subject.txt", "{{ builder }}: {{ verdict|upper }}, revision {{ properties.revision|default('unknown') }}\n");
    put("README.md", "not a template");
    // What both pages share, around those that are built in.
    put("base.html", "<title>{% block title %}{% endblock %}</title><main>{% block content %}{% endblock %}</main>");
    let dry = Dry::start(&db, std::slice::from_ref(&set)).await;
    build(&db, "linux", r#"{"revision": "1a2b"}"#).await;
    all_gone(&db).await;
    let files = dry.files();
    let message = MessageParser::default().parse(&files[0]).unwrap();
    assert_eq!(message.subject(), Some("linux: PASSED, revision 1a2b"));
    let html = message.body_html(0).unwrap();
    assert!(html.starts_with("<title>linux #1 PASSED</title><main>") && html.contains("<table"), "{html}");

    let env = [
        (set.0, set.1.as_str()),
        ("BUILDREACTOR_MAIL_URL", "smtp://localhost"),
        ("BUILDREACTOR_MAIL_FROM", "a@example.org"),
    ];
    for (name, content, expected) in [
        ("body.txt", "{{ bulider }}", "`body.txt` does not work: undefined value"),
        ("base.html", "{% block content %}{% endblock %}{{ bulider }}", "`base.html` does not work: undefined value"),
        ("digest.html", "{% extends 'bass.html' %}", "`digest.html` does not work: template not found"),
        ("body.txt", "{% if %}", "`body.txt` does not work: syntax error"),
        ("boddy.html", "x", "boddy.html` is no template; known are `subject.txt`"),
    ] {
        put(name, content);
        let output = buildreactor(&["check", "--database", &db.url()], &env);
        let said = text(&output.stdout);
        let said = said.lines().find(|line| line.contains(" mail: ")).unwrap_or_default();
        assert!(said.starts_with("PROBLEM") && said.contains(expected), "{said}");
        // Not before that: where it starts all the same, it does not end.
        let output = buildreactor(&["run", "--database", &db.url()], &env);
        assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
}
