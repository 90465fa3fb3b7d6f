//! Mail servers whose replies have no end.

use super::{PASS, build, insist, obedient, settings, start, subscribe};
use crate::support::smtp::{Fault, Mailbox, Manner, certificate};
use crate::support::{Db, peak_memory, temp_dir, wait_for};

/// A daemon in all may grow by this, kB: a few mails, and what a debug build takes for itself.
const ROOM: u64 = 48 << 10;

async fn outlives(manner: Manner, more: &[(&'static str, String)], steps: &[&'static str]) {
    let db = Db::new().await;
    let implicit = manner.implicit;
    let mailbox = Mailbox::open(manner).await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let mut env = settings(&mailbox);
    // Long enough for a server to send hundreds of megabytes.
    env.push(("BUILDREACTOR_MAIL_TIMEOUT", "20s".to_owned()));
    if implicit {
        env.push(("BUILDREACTOR_MAIL_URL", format!("smtps://localhost:{}", mailbox.port)));
    }
    env.extend(more.iter().cloned());
    let daemon = start(&db, &env).await;
    build(&db, "linux", PASS).await;
    insist(&db).await;
    let mut sent = 1;
    assert_eq!(mailbox.taken().len(), sent);
    let memory = peak_memory(daemon.pid());
    let replies = ["x", "250-again\r\n", "250 ", "250-", "\r\n", "450-4.2.0 busy\r\n", "\0"];
    for (n, step) in steps.iter().enumerate() {
        // Without a line's end at every step, and one of the others.
        for reply in ["x", replies[1 + n % (replies.len() - 1)]] {
            // A new connection each time.
            let fault = Fault::Gush(step, reply);
            mailbox.faults([fault.clone()]);
            build(&db, "linux", PASS).await;
            db.wait("SELECT last_error IS NOT NULL AND state = 'waiting' FROM build_mail ORDER BY id DESC LIMIT 1")
                .await;
            let why: String = db.one("SELECT last_error FROM build_mail ORDER BY id DESC LIMIT 1").await;
            assert!(
                ["long", "large", "incomplete", "invalid", "pars", "response"].iter().any(|word| why.contains(word)),
                "{fault:?}: {why}"
            );
            insist(&db).await;
            sent += 1;
            assert_eq!(mailbox.taken().len(), sent, "{fault:?}");
            let grown = peak_memory(daemon.pid()).saturating_sub(memory);
            assert!(grown < ROOM, "{fault:?}: {grown} kB more");
        }
    }
    println!("{} kB more, of {} kB that were sent", peak_memory(daemon.pid()) - memory, mailbox.gushed() >> 10);
}

#[tokio::test]
async fn a_reply_without_an_end_is_given_up_and_its_mail_tried_later() {
    outlives(Manner::default(), &[], &["connect", "EHLO", "MAIL", "RCPT", "DATA", "end"]).await;
}

#[tokio::test]
async fn a_reply_without_an_end_is_given_up_where_it_is_encrypted_too() {
    let (acceptor, pem) = certificate("localhost");
    let folder = temp_dir();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, pem).unwrap();
    let more = [
        ("BUILDREACTOR_MAIL_USER", "builds".to_owned()),
        ("BUILDREACTOR_MAIL_PASSWORD", "geheim".to_owned()),
        ("BUILDREACTOR_MAIL_CA_FILE", ca.display().to_string()),
    ];
    let manner = |implicit| Manner { tls: Some(acceptor.clone()), implicit, auth: Some("PLAIN LOGIN") };
    outlives(manner(false), &more, &["STARTTLS", "AUTH", "end"]).await;
    outlives(manner(true), &more, &["connect", "AUTH"]).await;
}

#[tokio::test]
async fn a_sendmail_that_never_stops_talking_does_not_fill_the_memory() {
    let db = Db::new().await;
    obedient(&db, "linux").await;
    subscribe(&db, "ann@example.org", "finished").await;
    let folder = temp_dir();
    let program = folder.path().join("sendmail");
    let spoken = folder.path().join("spoken");
    // 300 MB, and then its verdict.
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\necho 'sorry, really' >&2\nhead -c 300000000 /dev/zero >&2\ntouch '{}'\nexit 75\n",
        spoken.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let env = [
        ("BUILDREACTOR_MAIL_URL", format!("sendmail:{}", program.display())),
        ("BUILDREACTOR_MAIL_FROM", "builds@example.org".to_owned()),
    ];
    let daemon = start(&db, &env).await;
    let memory = peak_memory(daemon.pid());
    build(&db, "linux", PASS).await;
    db.wait("SELECT state = 'waiting' AND last_error LIKE '%sorry, really%' FROM build_mail").await;
    wait_for("all that it says", || async { spoken.exists() }).await;
    let grown = peak_memory(daemon.pid()).saturating_sub(memory);
    assert!(grown < ROOM, "{grown} kB more");
}
