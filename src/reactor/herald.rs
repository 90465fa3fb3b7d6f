//! Tells listeners what happened: `build_events`, and a wake for other workers. After the COMMIT it tells about, in
//! transactions of its own, many at once: a notifying COMMIT takes a lock on the whole cluster.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};

use crate::database::Database;
use crate::model::AttemptId;

/// At most so many events in one transaction.
const MOST: usize = 200;

/// Hands events to the task [`proclaim`].
#[derive(Clone)]
pub struct Herald {
    send: mpsc::UnboundedSender<News>,
    bell: Arc<Notify>,
}

enum News {
    Event(String),
    Wake,
}

/// What happened to a build.
#[derive(serde::Serialize)]
struct Event<'a> {
    build_id: i64,
    builder: &'a str,
    state: &'a str,
    attempt: i32,
    worker: &'a str,
    at: String,
    event: &'a str,
}

impl Herald {
    /// A herald and the future that speaks for it; the future ends when every herald is dropped and all is said.
    /// `bell` is rung for those of this daemon when a build has ended: its mails are in the outbox.
    pub fn new(database: Database, bell: Arc<Notify>) -> (Herald, impl Future<Output = ()> + Send) {
        let (send, receive) = mpsc::unbounded_channel();
        (Herald { send, bell }, proclaim(database, receive))
    }

    /// `event`: started, finished or retried.
    pub fn event(&self, id: AttemptId, builder: &str, worker: &str, state: &str, event: &str) {
        if event == "finished" {
            self.bell.notify_one();
        }
        let event = Event {
            build_id: id.build.0,
            builder,
            state,
            attempt: id.attempt,
            worker,
            at: jiff::Timestamp::now().to_string(),
            event,
        };
        if let Ok(text) = serde_json::to_string(&event) {
            // The task ends only after the last herald.
            let _said = self.send.send(News::Event(text));
        }
    }

    /// Wakes the other workers.
    pub fn wake(&self) {
        let _said = self.send.send(News::Wake);
    }
}

async fn proclaim(database: Database, mut receive: mpsc::UnboundedReceiver<News>) {
    let mut batch = Vec::new();
    while receive.recv_many(&mut batch, MOST).await > 0 {
        let mut wake = false;
        let mut events = Vec::new();
        for news in batch.drain(..) {
            match news {
                News::Event(text) => events.push(text),
                News::Wake => wake = true,
            }
        }
        if let Err(error) = database.notify(&events, wake).await {
            tracing::debug!(error = %crate::report::Chain(&error), "events were not sent");
        }
    }
}
