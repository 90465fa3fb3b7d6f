//! Open transactions of people: each holds a row of a build that waits or runs for some seconds, in one of the ways in which a submitter or an
//! application with columns of its own does. Nothing may be lost by it, or run twice; a result may be late by the hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio_postgres::NoTls;

/// What comes before the wait. `ID` stands for the build; each looks first whether it still waits or runs, because a finished one that is
/// put into the queue runs again.
const WAYS: [&str; 8] = [
    "INSERT INTO build_queue (build_id) VALUES (ID) ON CONFLICT DO NOTHING",
    "INSERT INTO build_queue (build_id, priority) VALUES (ID, 1) ON CONFLICT DO NOTHING",
    "SELECT FROM builds WHERE id = ID FOR UPDATE",
    "SELECT FROM builds WHERE id = ID FOR SHARE",
    "SELECT FROM builds WHERE id = ID FOR KEY SHARE",
    "UPDATE builds SET note = 'seen' WHERE id = ID",
    "SELECT FROM build_queue WHERE build_id = ID FOR UPDATE SKIP LOCKED",
    "UPDATE builders SET description = 'busy' WHERE name = (SELECT builder FROM builds WHERE id = ID)",
];

/// Those that are open.
pub struct Holds {
    url: String,
    open: tokio::task::JoinSet<()>,
    held: Arc<AtomicUsize>,
}

impl Holds {
    pub fn new(url: String) -> Holds {
        Holds { url, open: tokio::task::JoinSet::new(), held: Arc::default() }
    }

    /// Opens one for `time`; comes back with what it does. `drawn`: what decides about it.
    pub fn begin(&mut self, drawn: u64, time: Duration) -> String {
        let way = WAYS[usize::try_from(drawn % WAYS.len() as u64).unwrap()];
        let last = ["COMMIT", "ROLLBACK", ""][usize::try_from(drawn / 8 % 3).unwrap()];
        // One of those at the head, running ones among them.
        let place = drawn / 64 % 12;
        let (url, held) = (self.url.clone(), Arc::clone(&self.held));
        while self.open.try_join_next().is_some() {}
        // A server that is being restarted ends it, as it would a person's.
        self.open.spawn(async move { drop(hold(&url, &held, way, place, time, last).await) });
        let end = if last.is_empty() { "no word" } else { last };
        format!("a person holds a row for {time:.1?}, then {end}: {way}")
    }

    /// How many did get a row.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub fn end(&mut self) {
        self.open.abort_all();
    }
}

async fn hold(
    url: &str,
    held: &AtomicUsize,
    way: &str,
    place: u64,
    time: Duration,
    last: &str,
) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    drop(tokio::task::spawn(connection));
    client.batch_execute("SET statement_timeout = '3s'; BEGIN").await?;
    let pick = format!(
        "SELECT b.id FROM builds b WHERE b.id = (SELECT q.build_id FROM build_queue q ORDER BY q.priority DESC, q.build_id OFFSET {place} LIMIT 1)
         AND b.state IN ('queued', 'running') FOR KEY SHARE SKIP LOCKED"
    );
    let Some(row) = client.query_opt(&pick, &[]).await? else { return Ok(()) };
    let id: i64 = row.get(0);
    if way.starts_with("INSERT") {
        // It stays so until the end.
        let check = format!("SELECT FROM builds WHERE id = {id} AND state IN ('queued', 'running') FOR NO KEY UPDATE");
        if client.query_opt(&check, &[]).await?.is_none() {
            return Ok(());
        }
    }
    client.batch_execute(&way.replace("ID", &id.to_string())).await?;
    held.fetch_add(1, Ordering::Relaxed);
    tokio::time::sleep(time).await;
    if !last.is_empty() {
        client.batch_execute(last).await?;
    }
    Ok(())
}
