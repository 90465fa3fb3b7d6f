//! Writes down what another system tells of an attempt while it runs there.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::database::Database;
use crate::model::{AttemptId, Seen};
use crate::report::{Chain, Trouble};

/// After the database failed.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the last of it may hold up the result.
const PATIENCE: Duration = Duration::from_secs(10);

/// Writes each change, until the sender is gone and its last value is written, or for 10 s after that.
///
/// # Cancel safety
/// Safe: each write is a statement of its own, and holds everything that is known.
pub async fn write(database: Database, id: AttemptId, mut news: watch::Receiver<Seen>) {
    let mut trouble = Trouble::default();
    while news.changed().await.is_ok() {
        let mut deadline = None;
        loop {
            let seen = news.borrow_and_update().clone();
            if news.has_changed().is_err() {
                deadline = deadline.or_else(|| Some(Instant::now() + PATIENCE));
            }
            let writing = database.attempt_seen(id, &seen);
            let written = match deadline {
                Some(at) => timeout_at(at, writing).await.unwrap_or(Ok(())),
                None => writing.await,
            };
            match written {
                Ok(()) => break,
                Err(error) => {
                    if trouble.is_new() {
                        tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                            "cannot write the steps of build {id} yet: {}", Chain(&error));
                    }
                    if deadline.is_some_and(|at| Instant::now() >= at) {
                        return;
                    }
                    sleep(AGAIN).await;
                }
            }
        }
    }
}
