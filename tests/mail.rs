//! Mail: what is written with a result, and what a mail server gets of it. Messages are read by a parser that has not written them.

use std::time::{Duration, Instant};

use mail_parser::{Message, MessageParser};

use crate::support::smtp::{Fault, Got, Mailbox, Manner, certificate};
use crate::support::{Daemon, Db, buildreactor, temp_dir, text, wait_for};

/// Settings of a daemon that sends to `mailbox`; a step may take a second.
fn settings(mailbox: &Mailbox) -> Vec<(&'static str, String)> {
    vec![
        ("BUILDREACTOR_MAIL_URL", format!("smtp://localhost:{}", mailbox.port)),
        ("BUILDREACTOR_MAIL_FROM", "Bäuerin <builds@example.org>".to_owned()),
        ("BUILDREACTOR_MAIL_TIMEOUT", "1s".to_owned()),
        ("BUILDREACTOR_MAIL_PROJECT", "prøject".to_owned()),
    ]
}

async fn start(db: &Db, env: &[(&'static str, String)]) -> Daemon {
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Daemon::start(db, "w", &env).await
}

/// A builder whose builds exit as their property `code` says.
async fn obedient(db: &Db, name: &str) {
    db.builder(name, "echo building $PROP_BRANCH; exit ${PROP_CODE:-0}").await;
}

async fn build(db: &Db, builder: &str, properties: &str) -> i64 {
    let id: i64 = db
        .one(&format!(
            "INSERT INTO build_queue (builder, properties) VALUES ('{builder}', '{properties}') RETURNING build_id"
        ))
        .await;
    db.finished(id).await;
    id
}

const FAIL: &str = r#"{"code": "1"}"#;
const PASS: &str = "{}";

async fn subscribe(db: &Db, address: &str, events: &str) {
    db.execute(&format!("INSERT INTO build_subscriptions (address, events) VALUES ('{address}', '{{{events}}}')"))
        .await;
}

/// Nothing waits or is being sent.
async fn all_gone(db: &Db) {
    db.wait("SELECT NOT EXISTS (SELECT FROM build_mail WHERE state IN ('waiting', 'sending'))").await;
}

fn parse(got: &Got) -> Message<'_> {
    MessageParser::default().parse(&got.data).expect("a message")
}

fn header(message: &Message<'_>, name: &str) -> String {
    message.header_raw(name).unwrap_or_default().trim().to_owned()
}

/// Build and event of the mails that an address got, in the order in which they came.
fn story(mailbox: &Mailbox, address: &str) -> Vec<String> {
    let to = mailbox.taken().into_iter().filter(|got| got.to == address);
    to.map(|got| {
        let message = parse(&got);
        let id = message.message_id().unwrap();
        id.split('.')
            .enumerate()
            .filter(|(n, _)| [0, 2].contains(n))
            .map(|(_, part)| part)
            .collect::<Vec<_>>()
            .join(" ")
    })
    .collect()
}

#[tokio::test]
async fn pass_fail_fail_cancel_pass_is_problem_still_failing_nothing_and_fixed_in_one_thread() {
    let db = Db::new().await;
    let mailbox = Mailbox::open(Manner::default()).await;
    obedient(&db, "linux").await;
    db.builder("other", "exit 1").await;
    db.execute("INSERT INTO build_subscriptions (builder, address) VALUES ('linux', 'ann@example.org')").await;
    subscribe(&db, "bob@example.org", "still_failing,fixed").await;
    subscribe(&db, "carl@example.org", "finished").await;
    // Also named by the build: one mail all the same.
    subscribe(&db, "Dora@example.org", "problem").await;
    let _daemon = start(&db, &settings(&mailbox)).await;
    let run = async |properties: &str| {
        let sql = "INSERT INTO build_queue (builder, properties, notify) VALUES ('linux', $$PROPS$$, '{dora@example.org}') RETURNING build_id";
        let id: i64 = db.one(&sql.replace("PROPS", properties)).await;
        db.finished(id).await;
        all_gone(&db).await;
    };
    run(PASS).await;
    run(FAIL).await;
    run(FAIL).await;
    db.execute("SELECT pause_builder('linux'); INSERT INTO build_queue (builder, notify) VALUES ('linux', '{dora@example.org}'); SELECT cancel_build(4); SELECT resume_builder('linux')").await;
    run(PASS).await;
    assert_eq!(
        db.all::<String>("SELECT state::text FROM builds ORDER BY id").await,
        ["passed", "failed", "failed", "cancelled", "passed"]
    );
    assert_eq!(story(&mailbox, "ann@example.org"), ["2 problem", "5 fixed"]);
    assert_eq!(story(&mailbox, "bob@example.org"), ["3 still_failing", "5 fixed"]);
    let all = ["1 passed", "2 problem", "3 still_failing", "5 fixed"];
    assert_eq!(story(&mailbox, "carl@example.org"), all);
    let dora: Vec<Got> =
        mailbox.taken().into_iter().filter(|got| got.to.eq_ignore_ascii_case("dora@example.org")).collect();
    assert_eq!(dora.len(), 4, "{dora:?}");

    for address in ["ann@example.org", "bob@example.org", "carl@example.org"] {
        let got = mailbox.taken().into_iter().filter(|got| got.to == address).collect::<Vec<_>>();
        let streak: Vec<Message<'_>> =
            got.iter().map(parse).filter(|m| header(m, "X-Buildreactor-Build") != "1").collect();
        let root = streak[0].message_id().unwrap();
        assert!(streak[0].in_reply_to().as_text().is_none() && streak[0].references().as_text().is_none());
        for message in &streak[1..] {
            assert_eq!(message.in_reply_to().as_text(), Some(root), "{address}");
            assert_eq!(message.references().as_text(), Some(root));
            assert_ne!(message.message_id(), Some(root));
        }
    }

    let got = mailbox.taken();
    let problem = got.iter().find(|got| got.to == "ann@example.org").unwrap();
    assert_eq!(problem.from, "builds@example.org");
    let message = parse(problem);
    assert_eq!(message.subject(), Some("[prøject] linux #2 FAILED (was passing)"));
    assert_eq!(message.from().unwrap().first().unwrap().name(), Some("Bäuerin"));
    for (name, value) in [
        ("Auto-Submitted", "auto-generated"),
        ("X-Buildreactor-Builder", "linux"),
        ("X-Buildreactor-Build", "2"),
        ("X-Buildreactor-State", "failed"),
        ("X-Buildreactor-Previous", "passed"),
    ] {
        assert_eq!(header(&message, name), value, "{name}");
    }
    assert!(header(&message, "List-Id").contains("linux.pr-ject.example.org"), "{}", header(&message, "List-Id"));
    assert!(message.date().is_some());
    let plain = message.body_text(0).unwrap();
    for part in [
        "linux #2 FAILED (was passing)",
        "exit code 1",
        "ran: ",
        "usually ",
        "waited: ",
        "attempt: 1 on w",
        "asked for by: postgres",
        "build before: #1 passed",
        "last good build: #1, ",
        "code: 1",
        "building",
        "SELECT build_log_text(2, 1)",
    ] {
        assert!(plain.contains(part), "no `{part}` in {plain}");
    }
    let html = message.body_html(0).unwrap();
    assert!(html.contains("exit code 1") && html.contains("color-scheme"), "{html}");

    // And again: a thread of its own.
    run(FAIL).await;
    let got = mailbox.taken();
    let last = got.iter().rfind(|got| got.to == "ann@example.org").unwrap();
    assert_eq!(header(&parse(last), "X-Buildreactor-Build"), "6");
    assert!(parse(last).references().as_text().is_none());
}

#[tokio::test]
async fn what_counts_as_the_build_before() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    obedient(&db, "branches").await;
    db.execute("UPDATE builders SET branch_property = 'branch' WHERE name = 'branches'").await;
    subscribe(&db, "ann@example.org", "problem,fixed,still_failing,passed").await;
    subscribe(&db, "ops@example.org", "error").await;
    let _daemon = start(&db, &[]).await;
    let events = async || {
        db.all::<String>("SELECT concat_ws(' ', build_id, attempt, event, previous_build_id, previous_state, good_build_id) FROM build_mail ORDER BY id").await
    };
    // The first build of a builder that fails is a problem; run again, it is its own predecessor.
    build(&db, "linux", FAIL).await;
    db.execute("SELECT retry_build(1)").await;
    db.wait("SELECT attempt = 2 AND state = 'failed' FROM builds").await;
    db.execute("UPDATE builds SET properties = '{}'; SELECT retry_build(1)").await;
    db.wait("SELECT attempt = 3 AND state = 'passed' FROM builds").await;
    assert_eq!(events().await, ["1 1 problem", "1 2 still_failing 1 failed", "1 3 fixed 1 failed"]);
    db.execute("DELETE FROM build_mail").await;

    // Tries of retry_failed are no verdicts.
    db.execute("UPDATE builders SET retry_failed = 1, script = 'test $BUILD_ATTEMPT -gt 1' WHERE name = 'linux'").await;
    build(&db, "linux", PASS).await;
    assert_eq!(events().await, ["2 2 passed 1 passed 1"]);
    db.execute("DELETE FROM build_mail").await;

    // By branch.
    for (branch, code) in [("main", 0), ("topic", 1), ("main", 1), ("topic", 1), ("main", 0), ("topic", 0)] {
        build(&db, "branches", &format!(r#"{{"branch": "{branch}", "code": "{code}"}}"#)).await;
    }
    assert_eq!(
        events().await,
        [
            "3 1 passed",
            "4 1 problem",
            "5 1 problem 3 passed 3",
            "6 1 still_failing 4 failed",
            "7 1 fixed 5 failed 3",
            "8 1 fixed 6 failed"
        ]
    );
    db.execute("DELETE FROM build_mail").await;

    // What we broke is for those who want to hear of it, and no verdict.
    db.execute("INSERT INTO builders (name, script, max_attempts) VALUES ('broken', 'exit 75', 1)").await;
    db.execute("INSERT INTO build_queue (builder, notify) VALUES ('broken', '{author@example.org}')").await;
    assert_eq!(db.finished(9).await, "error");
    assert_eq!(
        db.all::<String>("SELECT concat_ws(' ', event, address) FROM build_mail").await,
        ["error ops@example.org"]
    );
}

#[tokio::test]
async fn mails_are_written_with_the_result_or_not_at_all_and_only_for_those_who_asked() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    let result = "UPDATE builds SET state = 'failed', attempt = attempt + 1, worker = 'w', started_at = clock_timestamp(), finished_at = clock_timestamp()";
    let mails = async || db.one::<i64>("SELECT count(*) FROM build_mail").await;
    db.enqueue("linux").await;
    db.execute(&format!("BEGIN; {result}; ROLLBACK; BEGIN; {result}; COMMIT")).await;
    assert_eq!(mails().await, 0, "nobody has asked");
    db.execute("SELECT retry_build(1); UPDATE builds SET notify = '{ann@example.org}'").await;
    assert_eq!(mails().await, 0);
    db.execute(&format!("BEGIN; {result}; ROLLBACK")).await;
    assert_eq!(mails().await, 0);
    db.execute(&format!("{result}; UPDATE builds SET detail = 'x'; UPDATE builds SET state = state")).await;
    assert_eq!(mails().await, 1);

    for (sql, expected) in [
        (
            "INSERT INTO build_subscriptions (address) VALUES ('Ann <ann@example.org>')",
            "address_looks_like_ann_at_example_org",
        ),
        ("INSERT INTO build_subscriptions (address) VALUES (E'ann@example.org\\nBcc: x@y.z')", "address_looks_like"),
        (
            "INSERT INTO build_subscriptions (address, events) VALUES ('a@b.c', '{broken}')",
            "events_are_finished_passed_failed",
        ),
        ("INSERT INTO build_subscriptions (address, events) VALUES ('a@b.c', '{}')", "events_are_finished"),
        (
            "INSERT INTO build_subscriptions (address, builder) VALUES ('a@b.c', 'nope')",
            "builder_of_a_subscription_exists",
        ),
        (
            "INSERT INTO build_subscriptions (address) VALUES ('a@b.c'), ('A@b.c')",
            "one_subscription_for_each_builder_and_address",
        ),
        ("INSERT INTO build_queue (builder, notify) VALUES ('linux', '{ann}')", "notify_lists_at_most_100_addresses"),
        ("UPDATE builders SET branch_property = ''", "branch_property_is_1_to_100_characters"),
        ("SELECT retry_mail(99)", "there is no mail 99"),
        ("SELECT discard_mail(99)", "there is no mail 99"),
    ] {
        let refusal = db.refusal(sql).await;
        assert!(refusal.contains(expected), "{sql}: {refusal}");
    }

    let id: i64 =
        db.one("SELECT mail_id FROM mail_status WHERE state = 'waiting' AND address = 'ann@example.org'").await;
    let say = async |what: &str| db.one::<String>(&format!("SELECT {what}_mail({id})")).await;
    assert_eq!(say("discard").await, "discarded");
    assert_eq!(say("discard").await, "it was discarded already");
    assert_eq!(db.one::<String>("SELECT last_error FROM mail_status").await, "discarded by postgres");
    assert_eq!(say("retry").await, "it will be sent within seconds, if a daemon with [mail] runs");
    assert_eq!(db.one::<String>("SELECT state FROM mail_status").await, "waiting");
    db.execute("DELETE FROM build_queue; DELETE FROM builds").await;
    assert_eq!(mails().await, 0, "they go with their build");
}

/// Lets the mail be tried again now, until it is gone.
async fn insist(db: &Db) {
    wait_for("the mail to be sent or parked", || async {
        db.execute("SELECT retry_mail(id) FROM build_mail WHERE state = 'waiting'").await;
        db.one::<bool>("SELECT NOT EXISTS (SELECT FROM build_mail WHERE state IN ('waiting', 'sending'))").await
    })
    .await;
}

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
    for fault in [Fault::Hang as fn(&'static str) -> Fault, Fault::Cut] {
        let db = Db::new().await;
        let mailbox = Mailbox::open(Manner::default()).await;
        obedient(&db, "linux").await;
        subscribe(&db, "ann@example.org", "finished").await;
        let _daemon = start(&db, &settings(&mailbox)).await;
        let mut sent = 0;
        for step in ["connect", "EHLO", "MAIL", "RCPT", "DATA", "end"] {
            // No connection is left from the last one.
            mailbox.faults([fault(step)]);
            build(&db, "linux", PASS).await;
            db.wait("SELECT last_error IS NOT NULL AND state = 'waiting' FROM build_mail ORDER BY id DESC LIMIT 1")
                .await;
            assert_eq!(mailbox.faults_left(), 0, "{step}");
            insist(&db).await;
            sent += 1;
            assert_eq!(mailbox.taken().len(), sent, "{:?}", fault(step));
        }
        // A whole letter that was not answered for comes twice, and can be known for the same.
        let end: Vec<Got> = mailbox.got().into_iter().rev().take(2).collect();
        assert!(!end[1].taken && end[0].taken);
        assert_eq!(parse(&end[0]).message_id(), parse(&end[1]).message_id());
    }
}

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
        mailbox.got().is_empty() && mailbox.said().iter().all(|said| ["EHLO", "STARTTLS"].contains(&said.as_str())),
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
    assert!(mailbox.said().iter().any(|said| said.starts_with("AUTH PLAIN ")), "{:?}", mailbox.said());
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
    db.wait("SELECT state = 'waiting' AND last_error ILIKE '%STARTTLS%' FROM build_mail ORDER BY id DESC LIMIT 1")
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
        assert!(mailbox.said().iter().any(|said| said == sent), "{:?}", mailbox.said());
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

/// A daemon that writes .eml files: what is in them, by address.
struct Dry {
    folder: crate::support::TempDir,
    _daemon: Daemon,
}

impl Dry {
    async fn start(db: &Db, more: &[(&'static str, String)]) -> Dry {
        let folder = temp_dir();
        let mut env = vec![
            ("BUILDREACTOR_MAIL_DRY_RUN", folder.path().join("mails").display().to_string()),
            ("BUILDREACTOR_MAIL_FROM", "builds@example.org".to_owned()),
        ];
        env.extend(more.iter().cloned());
        Dry { _daemon: start(db, &env).await, folder }
    }

    fn files(&self) -> Vec<Vec<u8>> {
        let Ok(entries) = std::fs::read_dir(self.folder.path().join("mails")) else { return Vec::new() };
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
async fn templates_are_replaced_one_by_one_and_a_wrong_one_is_found_before_it_is_needed() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let set = ("BUILDREACTOR_MAIL_TEMPLATES", folder.path().display().to_string());
    put("subject.txt", "{{ builder }}: {{ verdict|upper }}, revision {{ properties.revision|default('unknown') }}\n");
    put("README.md", "not a template");
    let dry = Dry::start(&db, std::slice::from_ref(&set)).await;
    build(&db, "linux", r#"{"revision": "1a2b"}"#).await;
    all_gone(&db).await;
    let files = dry.files();
    assert_eq!(MessageParser::default().parse(&files[0]).unwrap().subject(), Some("linux: PASSED, revision 1a2b"));

    let env = [
        (set.0, set.1.as_str()),
        ("BUILDREACTOR_MAIL_URL", "smtp://localhost"),
        ("BUILDREACTOR_MAIL_FROM", "a@example.org"),
    ];
    for (name, content, expected) in [
        ("body.txt", "{{ bulider }}", "`body.txt` does not work: undefined value"),
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
}

#[tokio::test]
async fn a_sendmail_program_does_as_well() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let at = |name: &str| folder.path().join(name);
    let script = format!(
        "#!/bin/sh\ncat > '{0}/letter'\necho \"$@\" > '{0}/arguments'\nif read code < '{0}/code'; then rm '{0}/code'; echo 'sorry, really' >&2; exit $code; fi\nmv '{0}/letter' '{0}/sent'\n",
        folder.path().display()
    );
    std::fs::write(at("sendmail"), script).unwrap();
    std::fs::set_permissions(at("sendmail"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let env = [
        ("BUILDREACTOR_MAIL_URL", format!("sendmail:{}", at("sendmail").display())),
        ("BUILDREACTOR_MAIL_FROM", "builds@example.org".to_owned()),
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
    let letter = std::fs::read(at("sent")).unwrap();
    assert!(!letter.contains(&b'\r'));
    assert_eq!(MessageParser::default().parse(&letter).unwrap().subject(), Some("[builds] linux #3 PASSED"));
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
