//! Who hears of what: events, threads, the rows of the outbox.

use mail_parser::Message;

use super::{FAIL, PASS, all_gone, build, header, obedient, parse, settings, start, story, subscribe};
use crate::support::Db;
use crate::support::smtp::{Got, Mailbox, Manner};

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
