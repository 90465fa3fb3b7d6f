//! Mail: what is written with a result, and what a mail server gets of it. Messages are read by a parser that has not written them.

mod costs;
mod endless;
mod events;
mod limits;
mod restraint;
mod transport;

use mail_parser::{Message, MessageParser};

use crate::support::smtp::{Got, Mailbox};
use crate::support::{Daemon, Db, wait_for};

const FAIL: &str = r#"{"code": "1"}"#;
const PASS: &str = "{}";

/// Settings of a daemon that sends to `mailbox`; a step may take two seconds.
fn settings(mailbox: &Mailbox) -> Vec<(&'static str, String)> {
    vec![
        ("BUILDREACTOR_MAIL_URL", format!("smtp://localhost:{}", mailbox.port)),
        ("BUILDREACTOR_MAIL_FROM", "Bäuerin <builds@example.org>".to_owned()),
        ("BUILDREACTOR_MAIL_TIMEOUT", "2s".to_owned()),
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

/// Lets the mail be tried again now, until it is gone.
async fn insist(db: &Db) {
    wait_for("the mail to be sent or parked", || async {
        db.execute("SELECT retry_mail(id) FROM build_mail WHERE state = 'waiting'").await;
        db.one::<bool>("SELECT NOT EXISTS (SELECT FROM build_mail WHERE state IN ('waiting', 'sending'))").await
    })
    .await;
}
