//! Deletes finished builds and logs that `[retention]` no longer keeps: in small batches, with pauses, one daemon at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Retention;
use crate::database::retention::Pruning;
use crate::database::{Database, DatabaseError};
use crate::report::{Chain, Trouble};

/// Between two rounds; less where something is kept for less.
const PERIOD: Duration = Duration::from_secs(3600);
/// But at least so long.
const SHORTEST_PERIOD: Duration = Duration::from_secs(10);
/// After the database refused something.
const AFTER_TROUBLE: Duration = Duration::from_secs(15);
/// What a batch should take, all in all: nothing that waits for a row of it waits longer.
const BATCH_TIME: Duration = Duration::from_millis(50);
/// A batch is followed by a pause so many times as long, which leaves four fifths of a core to the builds.
const PAUSES: u32 = 4;
/// At most so many builds in a batch.
const MOST: i64 = 1000;

/// Goes round for ever, unless everything is kept. `worker`: who shows people what cannot be deleted.
pub async fn run(database: Database, worker: String, keep: Retention) {
    if keep == Retention::default() {
        return;
    }
    let period = keep.builds.into_iter().chain(keep.logs).fold(PERIOD, Duration::min).max(SHORTEST_PERIOD);
    let mut trouble = Trouble::default();
    let mut shown = None;
    loop {
        let wait = match round(&database, &worker, &keep, &mut shown).await {
            Ok(()) => {
                trouble.is_over();
                period
            }
            Err(error) => {
                let what = format!("cannot delete all that [retention] no longer keeps: {}", Chain(&error));
                if trouble.is_new() {
                    tracing::warn!("{what}; trying again until it works");
                }
                AFTER_TROUBLE
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Deletes all that is no longer kept, unless another daemon is at it. What is locked, needed or referred to is left for another round.
/// `shown`: what people were told last.
async fn round(
    database: &Database,
    worker: &str,
    keep: &Retention,
    shown: &mut Option<Option<String>>,
) -> Result<(), DatabaseError> {
    let Some(pruning) = database.pruning().await? else { return Ok(()) };
    let mut pace = Pace { size: 50 };
    let (mut builds, mut logs) = (0, 0);
    let mut kept = BTreeMap::new();
    // What the server refuses of one builder holds up no other.
    let mut refused = None;
    if keep.builds.is_some() || keep.builds_per_builder.is_some() {
        let mut builder = String::new();
        while let Some(next) = pace.paced(pruning.next(&builder, keep.builds, keep.builds_per_builder)).await? {
            builder = next.builder;
            let Some(since) = next.since else { continue };
            match prune_builds(&pruning, &mut pace, &builder, since, &mut builds, &mut kept).await {
                Err(error) if error.sqlstate().is_some() => refused = Some(error),
                outcome => outcome?,
            }
        }
    }
    if let Some(age) = keep.logs {
        let mut reached = Some(0);
        while let Some(after) = reached {
            let most = pace.size;
            let batch = pace.batch(pruning.logs(age, after, most)).await?;
            logs += batch.deleted;
            reached = batch.reached;
        }
    }
    if builds + logs > 0 {
        tracing::info!(
            builds,
            logs,
            "deleted what [retention] no longer keeps: {builds} builds, {logs} pieces of logs"
        );
    }
    let kept: Vec<String> = kept.iter().map(|(why, count)| format!("{count} builds stay: {why}")).collect();
    let kept = (!kept.is_empty()).then(|| kept.join("; "));
    if shown.as_ref() != Some(&kept) {
        if let Some(kept) = &kept {
            tracing::warn!("[retention] cannot delete all that is old: {kept}");
        }
        database.show_kept(worker, kept.as_deref()).await?;
        *shown = Some(kept);
    }
    refused.map_or(Ok(()), Err)
}

/// Deletes builds of one builder; counts them, and those that stay.
async fn prune_builds(
    pruning: &Pruning,
    pace: &mut Pace,
    builder: &str,
    since: (jiff::Timestamp, i64),
    deleted: &mut i64,
    kept: &mut BTreeMap<String, i64>,
) -> Result<(), DatabaseError> {
    let mut reached = None;
    loop {
        let most = pace.size;
        let batch = pace.batch(pruning.builds(builder, since, reached, most)).await?;
        *deleted += batch.deleted;
        for (why, count) in batch.kept {
            *kept.entry(why).or_default() += count;
        }
        if batch.looked < most {
            return Ok(());
        }
        reached = batch.reached;
    }
}

/// How many rows a batch takes, and the pauses between batches.
struct Pace {
    size: i64,
}

impl Pace {
    /// A statement that deletes, and the pause after it; the next one takes as many rows as fit into [`BATCH_TIME`].
    async fn batch<T>(&mut self, work: impl Future<Output = Result<T, DatabaseError>>) -> Result<T, DatabaseError> {
        let began = Instant::now();
        let outcome = self.paced(work).await;
        self.learn(began.elapsed() / (PAUSES + 1));
        outcome
    }

    /// A statement and the pause after it, whether it worked or not.
    async fn paced<T>(&mut self, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let outcome = work.await;
        tokio::time::sleep(began.elapsed() * PAUSES).await;
        outcome
    }

    /// `took`: a batch of this size.
    fn learn(&mut self, took: Duration) {
        let fitting = self.size as f64 * BATCH_TIME.as_secs_f64() / took.as_secs_f64().max(1e-6);
        // Not by more than twice: one batch says little about the next.
        self.size = (fitting as i64).clamp(self.size / 2, self.size * 2).clamp(1, MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_followed_by_a_pause_that_leaves_the_server_to_others() {
        let mut pace = Pace { size: 100 };
        let began = Instant::now();
        let work = async {
            tokio::time::sleep(Duration::from_millis(25)).await;
            Ok(())
        };
        pace.batch(work).await.unwrap();
        assert_eq!(began.elapsed(), Duration::from_millis(125));
        assert_eq!(pace.size, 200, "twice as many fit");
    }

    #[test]
    fn batches_shrink_and_grow_by_half_and_twice_at_most() {
        let mut pace = Pace { size: 100 };
        for (took, size) in [(5000, 50), (5000, 25), (50, 25), (1, 50), (0, 100), (100, 50), (40, 62)] {
            pace.learn(Duration::from_millis(took));
            assert_eq!(pace.size, size);
        }
        for _ in 0..10 {
            pace.learn(Duration::from_secs(60));
        }
        assert_eq!(pace.size, 1);
        for _ in 0..20 {
            pace.learn(Duration::ZERO);
        }
        assert_eq!(pace.size, MOST);
    }
}
