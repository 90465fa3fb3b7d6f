//! From a candidate to an attempt that runs: the claim, the start that everybody sees, and what keeps a build from starting.

use std::time::Duration;

use tokio::time::Instant;

use super::Shared;
use super::attempt::{Attempt, Stop};
use crate::database::claim::Pulse;
use crate::database::queries::Begun;
use crate::database::{Claim, DatabaseError, Tried};
use crate::executor::Begin;
use crate::model::{AttemptId, BuildId, Builder, Ended, Outcome, Recorded};
use crate::report::Chain;

/// How long a build is left alone whose row somebody holds, and one that the database refuses to start.
const HELD: Duration = Duration::from_secs(1);
const REFUSED: Duration = Duration::from_secs(30);

/// What an attempt tells the reactor on its way.
#[derive(Debug)]
pub enum Progress {
    /// The row and a slot of the builder are held, and the attempt is visible.
    Started {
        /// The builder.
        builder: String,
        /// The attempt.
        id: AttemptId,
        /// To stop the build.
        stop: Stop,
    },
}

/// How an attempt, or the try to start one, ended.
#[derive(Debug)]
pub enum Done {
    /// Its executor cannot start a build of this builder now; nothing was claimed.
    NotReady {
        /// For people.
        why: String,
        /// How long it took to find out.
        took: Duration,
    },
    /// No slot of the builder was free anywhere.
    BuilderBusy,
    /// Not all of the builder's locks had a free unit.
    LocksBusy,
    /// These candidates are gone or locked by others.
    RowsGone(Vec<BuildId>),
    /// The builder no longer allows it (paused, fewer slots, other labels), or the row was not waiting.
    Refused(BuildId),
    /// This build cannot be started now, others of its builder may be; nothing is held.
    Held {
        /// The build.
        build: BuildId,
        /// For people.
        why: String,
        /// How long to leave it alone.
        pause: Duration,
    },
    /// The database refused to start this build, which was recorded as an attempt that broke.
    Broken {
        /// The build.
        build: BuildId,
        /// What became of it; `None`: it does not wait any more.
        recorded: Option<Recorded>,
    },
    /// The database failed before the attempt began; nothing is held.
    Failed {
        /// How.
        error: DatabaseError,
        /// While it began: it may have come through, or still do.
        in_doubt: bool,
    },
    /// The attempt is over.
    Ended {
        /// Which.
        id: AttemptId,
        /// `None`: its result was no longer ours to record.
        recorded: Option<Recorded>,
    },
    /// The daemon leaves, and the attempt goes on: for the next one.
    Left(AttemptId),
}

/// Claims one of `candidates` and runs it to its end.
///
/// # Cancel safety
/// Not safe: dropped in the middle it leaves the build to be taken as lost.
pub async fn attempt(
    shared: &Shared,
    builder: &Builder,
    occupied: &[i32],
    candidates: &[BuildId],
    progress: &tokio::sync::mpsc::UnboundedSender<Progress>,
) -> Done {
    if let Some(executor) = shared.executors.get(&builder.executor) {
        let asked = Instant::now();
        if let Err(why) = executor.ready(builder, candidates).await {
            return Done::NotReady { why, took: asked.elapsed() };
        }
        if shared.giving_back.is_cancelled() || shared.leaving.is_cancelled() {
            return Done::RowsGone(Vec::new());
        }
    }
    let mut claim = match shared.database.claim().await {
        Ok(claim) => claim,
        Err(error) => return Done::Failed { error, in_doubt: false },
    };
    let (build, slot, lock_units) = match claim.take(builder, occupied, candidates).await {
        Ok(Tried::Claimed { build, slot, lock_units }) => (build, slot, lock_units),
        Ok(Tried::BuilderBusy) => {
            claim.finish();
            return Done::BuilderBusy;
        }
        Ok(Tried::LocksBusy) => {
            claim.finish();
            return Done::LocksBusy;
        }
        Ok(Tried::RowsGone) => {
            claim.finish();
            return Done::RowsGone(candidates.to_vec());
        }
        Err(error) => return Done::Failed { error, in_doubt: false },
    };
    let pulse = Pulse::now();
    let begun = shared.database.begin_attempt(build, &shared.hello, slot, &lock_units).await;
    let mut job = match begun {
        Ok(Begun::Started(job)) => job,
        Ok(Begun::TooLarge(job)) => {
            let why = "its row in builds, as JSON, has more than 8 MiB: columns of your own are part of it".to_owned();
            let ended = Ended::without_process(Outcome::Error, why);
            return match claim.record(job.id, &ended).await {
                Ok(recorded) => {
                    claim.finish();
                    Done::Broken { build, recorded }
                }
                Err(error) => Done::Failed { error, in_doubt: true },
            };
        }
        Ok(Begun::Refused) => {
            return match claim.release().await {
                Ok(()) => {
                    claim.finish();
                    Done::Refused(build)
                }
                Err(error) => Done::Failed { error, in_doubt: false },
            };
        }
        Ok(Begun::Held(by)) => {
            let why = format!("its row in builds is held by {by}");
            return put_back(claim, Done::Held { build, why, pause: HELD }).await;
        }
        Err(error) if error.is_an_answer() => return refused(shared, claim, builder, build, &error).await,
        // Then the reactor finds it, and takes it over.
        Err(error) => return Done::Failed { error, in_doubt: true },
    };
    let Some(hand) = shared.in_hand.take(job.id) else {
        // Of a number that a server gave before it was replaced by one that had missed it. Its folder is not touched: it is the first's.
        let why = "given back: another attempt of this number, which the database has lost, is still being ended here";
        return match claim.record(job.id, &Ended::without_process(Outcome::GivenBack, why.to_owned())).await {
            Ok(_) => {
                claim.finish();
                Done::Refused(build)
            }
            Err(error) => Done::Failed { error, in_doubt: true },
        };
    };
    job.dir = shared.folders.attempt(job.id);
    let stop = Stop::default();
    // The reactor outlives its attempts.
    let _told = progress.send(Progress::Started { builder: builder.name.clone(), id: job.id, stop: stop.clone() });
    shared.herald.event(job.id, &job.builder, &job.worker, "running", "started");
    tracing::info!(build.id = %job.id.build, build.attempt = job.id.attempt, builder = job.builder,
        "build {} of {} started", job.id, job.builder);
    Attempt::new(shared, job, hand, pulse, stop, Some(claim)).run(Begin::Start).await
}

/// Lets go of a row that was claimed, and of nothing else; `done` comes back.
async fn put_back(mut claim: Claim, done: Done) -> Done {
    match claim.release().await {
        Ok(()) => {
            claim.finish();
            done
        }
        Err(error) => Done::Failed { error, in_doubt: false },
    }
}

/// The database refused to start `build`. For what stands in its own row it is charged with an attempt; else it waits, and says why.
async fn refused(shared: &Shared, mut claim: Claim, builder: &Builder, build: BuildId, error: &DatabaseError) -> Done {
    let why = format!("the database refuses to start it: {}", Chain(error));
    if error.is_about_the_row() {
        match claim.refuse(build, &shared.hello, &why).await {
            Ok(recorded) => {
                claim.finish();
                if let Some((id, recorded)) = &recorded {
                    tracing::warn!(build.id = %build, build.attempt = id.attempt, builder = builder.name,
                        "build {build} is now {}: {why}", recorded.state);
                    let event = if recorded.retry_in.is_some() { "retried" } else { "finished" };
                    shared.herald.event(*id, &builder.name, &shared.hello.name, &recorded.state, event);
                }
                return Done::Broken { build, recorded: recorded.map(|(_, recorded)| recorded) };
            }
            // Its row cannot even be written to say so.
            Err(also) if also.is_refusal() => return Done::Held { build, why, pause: REFUSED },
            Err(error) => return Done::Failed { error, in_doubt: false },
        }
    }
    let pause = if error.is_transient() { HELD } else { REFUSED };
    put_back(claim, Done::Held { build, why, pause }).await
}
