//! From an attempt's log file to `build_log`: live, bounded, and never in the way of the build. The build writes to a file
//! (through its guardian); this room reads the file, at its own pace.

pub mod file;
mod pieces;
pub mod private;

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::pieces::Pieces;
use crate::database::queries::{Durable, LogChange};
use crate::database::{Database, DatabaseError};
use crate::model::AttemptId;
use crate::report::{Chain, Trouble};

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
    let mut written = (!source.resume).then(|| Written::of(Pieces::new(source.limit, rest.clone())));
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
        let round = round(&database, &source, &rest, &mut written, last);
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

/// What is known of a log in the database.
struct Written {
    pieces: Pieces,
    /// A transaction without an answer: it may have come through, or still do. What it makes of `pieces`, and its changes; nothing else is
    /// written before the same changes are, or what it wrote would be written over, or stay behind.
    unconfirmed: Option<(Pieces, Vec<LogChange>)>,
}

impl Written {
    fn of(pieces: Pieces) -> Written {
        Written { pieces, unconfirmed: None }
    }

    async fn confirm(&mut self, database: &Database, source: &Source, durable: Durable) -> Result<(), Failure> {
        if let Some((_, changes)) = &self.unconfirmed {
            database.write_log(source.id, changes, durable).await.map_err(told)?;
        }
        if let Some((pieces, _)) = self.unconfirmed.take() {
            self.pieces = pieces;
        }
        Ok(())
    }
}

fn told(error: DatabaseError) -> Failure {
    Chain(&error).to_string().into()
}

/// One look at the file, and one transaction if it has grown.
async fn round(
    database: &Database,
    source: &Source,
    rest: &str,
    written: &mut Option<Written>,
    last: bool,
) -> Result<(), Failure> {
    let durable = if last { Durable::WithResult } else { Durable::AtOnce };
    let written = match written {
        Some(written) => written,
        None => {
            let there = database.log_pieces(source.id).await.map_err(told)?;
            written.insert(Written::of(Pieces::resume(source.limit, rest.to_owned(), &there)))
        }
    };
    written.confirm(database, source, durable).await?;
    let (dir, mut next) = (source.dir.clone(), written.pieces.clone());
    let (next, changes) = tokio::task::spawn_blocking(move || {
        let changes = next.advance(&dir, last);
        (next, changes)
    })
    .await?;
    let changes = changes?;
    if changes.is_empty() {
        written.pieces = next;
        return Ok(());
    }
    written.unconfirmed = Some((next, changes));
    written.confirm(database, source, durable).await
}
