//! Handing mails over: SMTP with all that can go wrong, TLS, AUTH, sendmail, `check --mail`.

use mail_parser::MessageParser;

use super::{PASS, all_gone, build, insist, obedient, parse, settings, start, story, subscribe};
use crate::support::proxy::{Mood, Proxy};
use crate::support::smtp::{Fault, Got, Mailbox, Manner, certificate};
use crate::support::{Daemon, Db, buildreactor, server_with_port, temp_dir, text, wait_for};

#[tokio::test]
async fn replies_of_4xx_are_tried_again_and_of_5xx_parked_with_the_words_of_the_server() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let _daemon = start(&db, &settings(&mailbox)).await;
    for step in ["MAIL", "RCPT", "DATA", "end"] {
        let before = mailbox.taken().len();
        mailbox.faults([Fault::Say(step, "450 4.2.0 greylisted, come back later")]);
        build(&db, "linux", PASS).await;
        db.wait("SELECT last_error LIKE '%450%greylisted, come back later%' AND state = 'waiting' AND tries = 1 AND next_at > clock_timestamp() + interval '30 s' AND next_at < clock_timestamp() + interval '70 s' FROM build_mail ORDER BY id DESC LIMIT 1").await;
        insist(&db).await;
        assert_eq!(mailbox.taken().len(), before + 1, "{step}");

        mailbox.faults([Fault::Say(step, "550 5.1.1 no such person <here>")]);
        build(&db, "linux", PASS).await;
        all_gone(&db).await;
        let (state, words): (String, String) = (
            db.one("SELECT state FROM mail_status ORDER BY mail_id DESC LIMIT 1").await,
            db.one("SELECT last_error FROM mail_status ORDER BY mail_id DESC LIMIT 1").await,
        );
        assert!(
            state == "parked" && words.contains("550") && words.contains("no such person <here>"),
            "{state} {words}"
        );
        // The next one goes over the same connection.
        build(&db, "linux", PASS).await;
        all_gone(&db).await;
        assert_eq!(mailbox.taken().len(), before + 2, "{step}");
    }
    db.execute("SELECT retry_mail(id) FROM build_mail WHERE state = 'parked'").await;
    all_gone(&db).await;
    assert_eq!(mailbox.taken().len(), 12);
    let ids: std::collections::HashSet<String> =
        mailbox.taken().iter().map(|got| parse(got).message_id().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 12);
    // Two days are over.
    mailbox.faults([Fault::Say("end", "451 4.3.0 try later")]);
    db.execute("INSERT INTO build_queue (builder) VALUES ('linux')").await;
    // Whatever comes first.
    db.execute("UPDATE build_mail SET give_up_at = created_at").await;
    wait_for("the end of its time", || async {
        db.execute(
            "UPDATE build_mail SET give_up_at = created_at, next_at = clock_timestamp() WHERE state = 'waiting'",
        )
        .await;
        db.one::<bool>("SELECT EXISTS (SELECT FROM mail_status WHERE state = 'parked' AND last_error LIKE '%451%')")
            .await
            || mailbox.faults_left() == 0 && {
                mailbox.faults([Fault::Say("end", "451 4.3.0 try later")]);
                false
            }
    })
    .await;
}

#[tokio::test]
async fn a_server_that_hangs_or_breaks_off_at_any_step_delays_its_mail_and_no_build() {
    let (acceptor, pem) = certificate("localhost");
    let folder = temp_dir();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, pem).unwrap();
    for fault in [Fault::Hang as fn(&'static str) -> Fault, Fault::Cut] {
        let db = Db::new().await;
        let manner = Manner { tls: Some(acceptor.clone()), implicit: false, auth: Some("PLAIN LOGIN") };
        let mailbox = Mailbox::open(manner).await;
        obedient(&db, "linux").await;
        subscribe(&db, "ann@example.org", "finished").await;
        let mut env = settings(&mailbox);
        env.push(("BUILDREACTOR_MAIL_USER", "builds".to_owned()));
        env.push(("BUILDREACTOR_MAIL_PASSWORD", "geheim".to_owned()));
        env.push(("BUILDREACTOR_MAIL_CA_FILE", ca.display().to_string()));
        let _daemon = start(&db, &env).await;
        let mut sent = 0;
        for step in ["connect", "EHLO", "STARTTLS", "handshake", "AUTH", "MAIL", "RCPT", "DATA", "end"] {
            // No connection is left from the last one.
            mailbox.faults([fault(step)]);
            let id = build(&db, "linux", PASS).await;
            db.wait("SELECT last_error IS NOT NULL AND state = 'waiting' FROM build_mail ORDER BY id DESC LIMIT 1")
                .await;
            assert_eq!(mailbox.faults_left(), 0, "{step}");
            insist(&db).await;
            sent += 1;
            assert_eq!(mailbox.taken().len(), sent, "{:?}", fault(step));
            // Whole letters come once, or twice at the last step, which can then be known for the same.
            let this: String = db.one(&format!("SELECT message_id FROM build_mail WHERE build_id = {id}")).await;
            let came: Vec<Got> = mailbox.got().into_iter().skip(sent - 1).collect();
            assert_eq!(came.len(), if step == "end" { 2 } else { 1 }, "{:?}", fault(step));
            for got in &came {
                assert_eq!(parse(got).message_id(), Some(format!("{this}@example.org").as_str()));
                assert_eq!(parse(got).date(), parse(&came[0]).date());
            }
        }
        // Nothing was said in the clear because encryption did not come about, least of all the password.
        assert!(mailbox.got().iter().all(|got| got.encrypted));
        assert!(
            mailbox.said().iter().all(|(said, encrypted)| *encrypted || ["EHLO", "STARTTLS"].contains(&said.as_str())),
            "{:?}",
            mailbox.said()
        );

        // When its two days are over, the try that fails is the last.
        db.execute("ALTER TABLE build_mail ALTER COLUMN give_up_at SET DEFAULT clock_timestamp()").await;
        for step in ["STARTTLS", "AUTH"] {
            mailbox.faults([fault(step)]);
            let id = build(&db, "linux", PASS).await;
            db.wait(&format!("SELECT state = 'parked' FROM mail_status WHERE build_id = {id}")).await;
            let why: String = db.one(&format!("SELECT last_error FROM mail_status WHERE build_id = {id}")).await;
            assert!(why.starts_with(&format!("localhost:{}: ", mailbox.port)), "{why}");
            assert_eq!((mailbox.taken().len(), mailbox.faults_left()), (sent, 0), "{step}");
            db.execute("SELECT retry_mail(id) FROM build_mail WHERE state = 'parked'").await;
            insist(&db).await;
            sent += 1;
            assert_eq!(mailbox.taken().len(), sent, "{step}");
        }
    }
}

#[tokio::test]
async fn killed_after_the_server_has_taken_it_it_comes_once_more_as_the_same_mail() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let mut env = settings(&mailbox);
    env.push(("BUILDREACTOR_MAIL_TIMEOUT", "1 minute".to_owned()));
    let mut daemon = start(&db, &env).await;
    // The server has the letter and is thinking; what is to be stored of its answer waits for us.
    let gate = mailbox.gate.write().await;
    build(&db, "linux", PASS).await;
    wait_for("the letter", async || mailbox.got().len() == 1).await;
    let lock = db.session().await;
    lock.batch_execute("BEGIN; SELECT FROM build_mail FOR UPDATE").await.unwrap();
    drop(gate);
    wait_for("the answer", async || mailbox.taken().len() == 1).await;
    db.wait("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%sent_at%' AND datname = current_database() AND pid <> pg_backend_pid())").await;
    daemon.kill();
    db.wait("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'buildreactor%' AND datname = current_database() AND wait_event_type = 'Lock')").await;
    lock.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(db.one::<String>("SELECT state FROM build_mail").await, "sending");
    // As if the time of its sender were over.
    db.execute("UPDATE build_mail SET next_at = clock_timestamp()").await;
    daemon.spawn_again();
    db.wait("SELECT state = 'sent' FROM build_mail").await;
    let got = mailbox.got();
    assert_eq!(got.len(), 2);
    assert_eq!(parse(&got[0]).message_id(), parse(&got[1]).message_id());
    assert_eq!(parse(&got[0]).date(), parse(&got[1]).date());
    // A later mail proves that the first does not come a third time.
    build(&db, "linux", PASS).await;
    wait_for("the next letter", async || mailbox.got().len() == 3).await;
    assert_eq!(story(&mailbox, "ann@example.org"), ["1 passed", "1 passed", "2 passed"]);
}

#[tokio::test]
async fn any_number_of_daemons_send_each_mail_once() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    db.execute("UPDATE builders SET max_running = 6").await;
    for n in 0..10 {
        subscribe(&db, &format!("ann{n}@example.org"), "finished").await;
    }
    let env = settings(&mailbox);
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let mut daemons = Vec::new();
    for name in ["w1", "w2", "w3"] {
        daemons.push(Daemon::start(&db, name, &env).await);
    }
    db.execute("INSERT INTO build_queue (builder) SELECT 'linux' FROM generate_series(1, 20)").await;
    db.wait("SELECT count(*) = 200 FROM build_mail").await;
    wait_for("all mails", || async {
        db.execute("SELECT retry_mail(id) FROM build_mail WHERE state = 'waiting'").await;
        mailbox.taken().len() >= 100 && db.one::<bool>("SELECT NOT EXISTS (SELECT FROM build_mail WHERE state IN ('waiting', 'sending') AND next_at <= clock_timestamp())").await
    })
    .await;
    for n in 0..10 {
        let address = format!("ann{n}@example.org");
        let story = story(&mailbox, &address);
        assert!(story.len() <= 20, "{story:?}");
    }
    let ids: Vec<String> = mailbox.got().iter().map(|got| parse(got).message_id().unwrap().to_owned()).collect();
    let different: std::collections::HashSet<&String> = ids.iter().collect();
    assert_eq!(ids.len(), different.len());
    assert!(mailbox.connections() < 60, "{} connections for {} letters", mailbox.connections(), ids.len());
}

#[tokio::test]
async fn tls_is_required_where_it_is_and_taken_where_it_is_offered() {
    let (acceptor, pem) = certificate("localhost");
    let folder = temp_dir();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, pem).unwrap();
    let ca = ca.display().to_string();
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let manner = |implicit| Manner { tls: Some(acceptor.clone()), implicit, auth: Some("PLAIN LOGIN") };
    let mailbox = Mailbox::open(manner(false)).await;

    // A certificate that nobody vouches for: no letter, no password.
    let mut env = settings(&mailbox);
    env.push(("BUILDREACTOR_MAIL_USER", "builds".to_owned()));
    env.push(("BUILDREACTOR_MAIL_PASSWORD", "geheim".to_owned()));
    let mut daemon = start(&db, &env).await;
    build(&db, "linux", PASS).await;
    db.wait("SELECT state = 'waiting' AND last_error ILIKE '%certificate%' FROM build_mail").await;
    assert!(
        mailbox.got().is_empty()
            && mailbox.said().iter().all(|(said, _)| ["EHLO", "STARTTLS"].contains(&said.as_str())),
        "{:?}",
        mailbox.said()
    );
    assert!(!daemon.has_said("geheim"));
    daemon.stop().await;

    // Vouched for.
    env.push(("BUILDREACTOR_MAIL_CA_FILE", ca.clone()));
    let mut daemon = start(&db, &env).await;
    insist(&db).await;
    assert!(mailbox.taken()[0].encrypted);
    assert!(mailbox.said().iter().any(|(said, _)| said.starts_with("AUTH PLAIN ")), "{:?}", mailbox.said());
    daemon.stop().await;

    // Nothing to protect: encrypted, whatever the certificate.
    let mut daemon = start(&db, &settings(&mailbox)).await;
    build(&db, "linux", PASS).await;
    all_gone(&db).await;
    assert!(mailbox.taken()[1].encrypted);
    daemon.stop().await;

    // Required, and not offered.
    let plain = Mailbox::open(Manner::default()).await;
    let mut env = settings(&plain);
    env.push(("BUILDREACTOR_MAIL_STARTTLS", "required".to_owned()));
    let mut daemon = start(&db, &env).await;
    build(&db, "linux", PASS).await;
    db.wait("SELECT state = 'waiting' AND last_error LIKE '%: it offers no STARTTLS, which [mail] starttls requires' FROM build_mail ORDER BY id DESC LIMIT 1")
        .await;
    assert!(plain.got().is_empty());
    daemon.stop().await;

    // From the first byte.
    let implicit = Mailbox::open(manner(true)).await;
    let mut env = settings(&implicit);
    env.push(("BUILDREACTOR_MAIL_URL", format!("smtps://localhost:{}", implicit.port)));
    env.push(("BUILDREACTOR_MAIL_CA_FILE", ca));
    let _daemon = start(&db, &env).await;
    insist(&db).await;
    assert!(implicit.taken()[0].encrypted);
}

#[tokio::test]
async fn who_we_are_is_proved_with_a_password_or_a_token_and_a_refusal_parks_nothing() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let secret = folder.path().join("mail_password");
    std::fs::write(&secret, "geheim\n").unwrap();
    let file = secret.display().to_string();
    for (offered, mechanism, sent) in [
        ("PLAIN", "password", "AUTH PLAIN AGJ1aWxkcwBnZWhlaW0="),
        ("LOGIN", "password", "Z2VoZWlt"),
        ("XOAUTH2", "xoauth2", "AUTH XOAUTH2 dXNlcj1idWlsZHMBYXV0aD1CZWFyZXIgZ2VoZWltAQE="),
    ] {
        let mailbox = Mailbox::open(Manner { auth: Some(offered), ..Manner::default() }).await;
        mailbox.faults([Fault::Say("AUTH", "535 5.7.8 who are you")]);
        let mut env = settings(&mailbox);
        env.push(("BUILDREACTOR_MAIL_USER", "builds".to_owned()));
        env.push(("BUILDREACTOR_MAIL_AUTH", mechanism.to_owned()));
        env.push(("BUILDREACTOR_MAIL_STARTTLS", "never".to_owned()));
        match offered {
            "PLAIN" => env.push(("BUILDREACTOR_MAIL_PASSWORD_FILE", file.clone())),
            "LOGIN" => env.push(("CREDENTIALS_DIRECTORY", folder.path().display().to_string())),
            _ => env.push(("BUILDREACTOR_MAIL_PASSWORD", "geheim".to_owned())),
        }
        let mut daemon = start(&db, &env).await;
        build(&db, "linux", PASS).await;
        db.wait(
            "SELECT state = 'waiting' AND last_error LIKE '%535%who are you%' FROM build_mail ORDER BY id DESC LIMIT 1",
        )
        .await;
        daemon.says("mail cannot be sent: ").await;
        insist(&db).await;
        assert_eq!(mailbox.taken().len(), 1);
        assert!(mailbox.said().iter().any(|(said, _)| said == sent), "{:?}", mailbox.said());
        assert!(!daemon.has_said("geheim"));
        daemon.stop().await;
    }
    // Not in the clear over the network.
    let env = [
        ("BUILDREACTOR_MAIL_URL", "smtp://192.0.2.1"),
        ("BUILDREACTOR_MAIL_USER", "x"),
        ("BUILDREACTOR_MAIL_STARTTLS", "opportunistic"),
    ];
    let output = buildreactor(&["check", "--database", &db.url()], &env);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("others on the network could read the password"), "{output:?}");
}

#[tokio::test]
async fn check_sends_a_test_mail_and_says_why_not() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    let check = async |more: &[(&'static str, String)], arguments: &[&str]| {
        let mut env: Vec<(String, String)> =
            more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        env.push(("BUILDREACTOR_WORKER_STATE_DIR".to_owned(), temp_dir().path().display().to_string()));
        env.push(("BUILDREACTOR_WORKER_MIN_FREE_DISK".to_owned(), "0".to_owned()));
        let url = db.url();
        let arguments: Vec<String> =
            ["check", "--database", &url].iter().chain(arguments).map(|a| (*a).to_owned()).collect();
        let output = tokio::task::spawn_blocking(move || {
            let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            buildreactor(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &env)
        })
        .await
        .unwrap();
        let said = text(&output.stdout);
        (output.status.code(), said.lines().find(|line| line.contains(" mail: ")).unwrap_or_default().to_owned())
    };
    let (code, said) = check(&[], &[]).await;
    assert!(code == Some(0) && said.contains("this daemon sends none"), "{said}");
    let env = settings(&mailbox);
    let (code, said) = check(&env, &[]).await;
    assert!(code == Some(0) && said.contains("settings and templates are good") && mailbox.got().is_empty(), "{said}");
    let (code, said) = check(&env, &["--mail", "ann@example.org"]).await;
    assert!(
        code == Some(0) && said.starts_with("ok") && said.contains("has taken a mail to ann@example.org"),
        "{said}"
    );
    assert_eq!(parse(&mailbox.taken()[0]).subject(), Some("[prøject] a test"));
    mailbox.faults([Fault::Say("RCPT", "550 5.1.1 unknown here")]);
    let (code, said) = check(&env, &["--mail", "ann@example.org"]).await;
    assert!(code == Some(1) && said.starts_with("PROBLEM") && said.contains("unknown here"), "{said}");
    let (code, said) = check(&env, &["--mail", "ann"]).await;
    assert!(code == Some(1) && said.contains("`ann` is no mail address"), "{said}");
    let (code, said) = check(&[("BUILDREACTOR_MAIL_URL", "smtp://localhost".to_owned())], &[]).await;
    assert!(code == Some(1) && said.contains("[mail] from is missing"), "{said}");
    // What the first mail would stumble over.
    let with = |more: &[(&'static str, &str)]| {
        let mut env = settings(&mailbox);
        env.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
        env
    };
    let unknown = ("BUILDREACTOR_MAIL_USER", "bot");
    for (more, why) in [
        (
            &[unknown][..],
            "[mail] user is set, but neither password_file nor BUILDREACTOR_MAIL_PASSWORD nor a credential",
        ),
        (
            &[unknown, ("BUILDREACTOR_MAIL_PASSWORD_FILE", "/nonexistent")],
            "cannot read the password for mail in `/nonexistent`",
        ),
        (
            &[("BUILDREACTOR_MAIL_URL", "sendmail:/nonexistent")],
            "cannot call `/nonexistent` ([mail] url): No such file",
        ),
        (&[("BUILDREACTOR_MAIL_URL", "sendmail:/etc/passwd")], "`/etc/passwd` ([mail] url) is no program"),
    ] {
        let (code, said) = check(&with(more), &[]).await;
        assert!(code == Some(1) && said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn a_sendmail_program_does_as_well() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let at = |name: &str| folder.path().join(name);
    let script = format!(
        "#!/bin/sh\nenv > '{0}/environment'\ncat > '{0}/letter'\necho \"$@\" > '{0}/arguments'\nif read code < '{0}/code'; then rm '{0}/code'; echo 'sorry, really' >&2; exit $code; fi\nmv '{0}/letter' '{0}/sent'\n",
        folder.path().display()
    );
    std::fs::write(at("sendmail"), script).unwrap();
    std::fs::set_permissions(at("sendmail"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let env = [
        ("BUILDREACTOR_MAIL_URL", format!("sendmail:{}", at("sendmail").display())),
        ("BUILDREACTOR_MAIL_FROM", "builds@example.org".to_owned()),
        ("PGPASSWORD", "sesame".to_owned()),
        ("BUILDREACTOR_MAIL_PASSWORD", "sesame".to_owned()),
    ];
    let _daemon = start(&db, &env).await;
    for (code, state) in [("75", "waiting"), ("67", "parked")] {
        std::fs::write(at("code"), format!("{code}\n")).unwrap();
        build(&db, "linux", PASS).await;
        db.wait(&format!(
            "SELECT state = '{state}' AND last_error LIKE '%sorry, really%' FROM build_mail ORDER BY id DESC LIMIT 1"
        ))
        .await;
    }
    build(&db, "linux", PASS).await;
    db.wait("SELECT state = 'sent' FROM build_mail ORDER BY id DESC LIMIT 1").await;
    assert_eq!(std::fs::read_to_string(at("arguments")).unwrap().trim(), "-i -f builds@example.org -- ann@example.org");
    let environment = std::fs::read_to_string(at("environment")).unwrap();
    assert!(environment.contains("PATH=") && !environment.contains("sesame"), "{environment}");
    let letter = std::fs::read(at("sent")).unwrap();
    assert!(!letter.contains(&b'\r'));
    assert_eq!(MessageParser::default().parse(&letter).unwrap().subject(), Some("[builds] linux #3 PASSED"));
}

/// The server knows it as at hand, and the daemon does not: nobody waits for as long as a delivery may take.
#[tokio::test]
async fn a_mail_whose_claim_got_no_answer_is_sent_soon() {
    let server = server_with_port(&[]).await;
    let db = Db::on(&server).await;
    let proxy = Proxy::to_server(&server).await;
    let mailbox = Mailbox::open(Manner::default()).await;
    let mut env = settings(&mailbox);
    env.push(("BUILDREACTOR_MAIL_TIMEOUT", "10 minutes".to_owned()));
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let mut daemon = Daemon::start_at(&proxy.url(), "w", &env).await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    proxy.set(Mood { trap_after: Some("-- Takes one mail"), ..Mood::default() });
    build(&db, "linux", PASS).await;
    db.wait("SELECT state = 'sending' AND next_at > clock_timestamp() + interval '1 hour' FROM build_mail").await;
    daemon.says("cannot look after the mail").await;
    proxy.set(Mood::default());
    db.wait("SELECT state = 'sent' FROM build_mail").await;
    assert_eq!(mailbox.taken().len(), 1);
}
