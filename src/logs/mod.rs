//! From an attempt's log file to `build_log`: live, bounded, and never in the way of the build. The build writes to a file
//! (through its guardian); this room reads the file, at its own pace.

pub mod file;
mod pieces;

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::pieces::Pieces;
use crate::database::Database;
use crate::database::queries::Durable;
use crate::model::AttemptId;
use crate::report::Trouble;

/// How often new output is looked for: with the write itself well within the second that people are promised.
const PERIOD: Duration = Duration::from_millis(300);

/// How long the end of a log may hold up its result; the rest may follow it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which log, and how much of it.
#[derive(Clone, Debug)]
pub struct Source {
    /// The attempt.
    pub id: AttemptId,
    /// Its folder.
    pub dir: PathBuf,
    /// Bytes of it to keep in the database: half for the beginning, half for the end.
    pub limit: u64,
    /// The worker's name, for the marker.
    pub worker: String,
    /// Some of it may have been written before: by an earlier daemon, or before a crash of the server.
    pub resume: bool,
}

/// What has become of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shipped {
    /// All that the limit allows is written.
    Whole,
    /// Something is missing at its end.
    InPart,
}

/// Copies the log until `ended`, then its rest, for 10 s at most. Problems are logged, and tried again with the next piece.
///
/// # Cancel safety
/// Safe: each write is a transaction, and the next daemon goes on where it ended; what is missing then stays in the file alone.
pub async fn ship(database: Database, source: Source, ended: CancellationToken) -> Shipped {
    let rest = format!("{}/log on worker {}", source.dir.display(), source.worker);
    // Known with the first look that succeeds.
    let mut pieces = (!source.resume).then(|| Pieces::new(source.limit, rest.clone()));
    let mut trouble = Trouble::default();
    let mut deadline = None;
    loop {
        if deadline.is_none() {
            tokio::select! {
                () = ended.cancelled() => deadline = Some(Instant::now() + PATIENCE),
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
        let last = deadline.is_some();
        let round = round(&database, &source, &rest, &mut pieces, last);
        let result = match deadline {
            Some(at) => timeout_at(at, round).await.unwrap_or_else(|_| Err("no answer in time".into())),
            None => round.await,
        };
        match result {
            Ok(()) if last => return Shipped::Whole,
            Ok(()) => trouble.is_over(),
            Err(error) => {
                if trouble.is_new() {
                    tracing::warn!(build.id = %source.id.build, build.attempt = source.id.attempt,
                        "cannot write the log of build {} to the database; its file on this worker has it all: {error}", source.id);
                }
                if deadline.is_some_and(|at| Instant::now() >= at) {
                    return Shipped::InPart;
                }
                // The rest of a log is tried again soon, within its deadline.
                tokio::time::sleep(PERIOD).await;
            }
        }
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One look at the file, and one transaction if it has grown. `pieces` moves on only when that was committed.
async fn round(
    database: &Database,
    source: &Source,
    rest: &str,
    pieces: &mut Option<Pieces>,
    last: bool,
) -> Result<(), Failure> {
    let told = |error| crate::report::Chain(&error).to_string();
    let known = match pieces.take() {
        Some(known) => known,
        None => Pieces::resume(source.limit, rest.to_owned(), &database.log_pieces(source.id).await.map_err(told)?),
    };
    let (dir, mut next) = (source.dir.clone(), known.clone());
    *pieces = Some(known);
    let (next, changes) = tokio::task::spawn_blocking(move || {
        let changes = next.advance(&dir, last);
        (next, changes)
    })
    .await?;
    let changes = changes?;
    if !changes.is_empty() {
        let durable = if last { Durable::WithResult } else { Durable::AtOnce };
        database.write_log(source.id, &changes, durable).await.map_err(told)?;
    }
    *pieces = Some(next);
    Ok(())
}
