//! One attempt, from its start to the COMMIT of its result. The claim's transaction stays open all the while (invariant 2).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use super::begin::Done;
use super::in_hand::Hand;
use super::{Shared, scribe};
use crate::database::claim::Pulse;
use crate::database::queries::AdvisoryKeys;
use crate::database::{Claim, DatabaseError};
use crate::executor::{Begin, Tether};
use crate::logs::{self, Shipped};
use crate::model::{Ended, Job, Outcome, Recorded, Seen, Unlocked};
use crate::report::Chain;

/// Between two tries to get a lost claim back, or to record a result while the database is away.
const RETAKE: Duration = Duration::from_millis(500);

/// How long the last ping of a daemon that leaves may take.
const LAST_PING: Duration = Duration::from_millis(300);

/// How long a renewal takes from here to the keeper's socket, generously.
const PASSING_ON: Duration = Duration::from_millis(20);

/// SQLSTATE lock_not_available.
const LOCK_TIMEOUT: &str = "55P03";

/// Between two complaints about a result that cannot be recorded.
const COMPLAIN: Duration = Duration::from_secs(600);

/// Stops an attempt, and says why.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    token: CancellationToken,
    cancelled: Arc<OnceLock<String>>,
    asked: Arc<Notify>,
}

impl Stop {
    /// Because somebody cancelled the build.
    pub fn cancel_build(&self, reason: String) {
        // The first reason stands.
        let _earlier = self.cancelled.set(reason);
        self.token.cancel();
    }

    /// Not to stop: a person's statement waits for the row.
    pub fn step_aside(&self) {
        self.asked.notify_one();
    }

    /// Because the worker stops.
    pub fn give_back(&self) {
        self.token.cancel();
    }
}

/// Goes on with an attempt that this worker was running when its last daemon left, or that began here without an answer.
///
/// # Cancel safety
/// Not safe, as [`super::begin::attempt`].
pub async fn adopt(shared: &Shared, job: Job, hand: Hand, stop: Stop) -> Done {
    Attempt::new(shared, job, hand, Pulse::now(), stop, None).run(Begin::Adopt).await
}

pub(super) struct Attempt<'a> {
    shared: &'a Shared,
    job: Job,
    hand: Hand,
    claim: Option<Claim>,
    /// Of a claim that was taken again: what it does not hold yet.
    unheld: Option<AdvisoryKeys>,
    pulse: Pulse,
    /// Tells the executor of each confirmation.
    lease: watch::Sender<Duration>,
    stop: Stop,
    /// The database failed before the result was recorded: the end of the log may have gone with it.
    log_in_doubt: bool,
}

/// A wait that doubles, up to 15 s or `most`.
struct Pause {
    next: Duration,
    most: Duration,
}

impl Pause {
    async fn wait(&mut self) {
        tokio::time::sleep(self.next.min(self.most)).await;
        self.next = (self.next * 2).min(Duration::from_secs(15));
    }
}

/// Whether the row of an attempt is ours again.
enum Retaken {
    Yes,
    NotNow,
    /// Somebody recorded an end for this attempt, or a later one runs.
    NoLongerOurs,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        job: Job,
        hand: Hand,
        pulse: Pulse,
        stop: Stop,
        claim: Option<Claim>,
    ) -> Attempt<'a> {
        let lease = watch::Sender::new(pulse.confirmed + shared.settings.lease);
        Attempt { shared, job, hand, claim, unheld: None, pulse, lease, stop, log_in_doubt: false }
    }

    pub(super) async fn run(mut self, begin: Begin) -> Done {
        let started = Instant::now();
        let id = self.job.id;
        let log_ended = CancellationToken::new();
        let source = logs::Source {
            id,
            dir: self.job.dir.clone(),
            limit: self.shared.settings.database_limit,
            worker: self.job.worker.clone(),
            resume: begin == Begin::Adopt,
        };
        let shipper = crate::tasks::spawn(logs::ship(self.shared.database.clone(), source.clone(), log_ended.clone()));
        let (seen, news) = watch::channel(Seen::default());
        let scribe = crate::tasks::spawn(scribe::write(self.shared.database.clone(), id, news));
        let Some(mut ended) = self.execute(begin, seen).await else {
            // Dropping the claim lets go of the row, and the shipper leaves off where its last transaction did.
            tracing::info!(build.id = %id.build, build.attempt = id.attempt,
                "build {id} goes on; it lives for {} s more, or until worker `{}` comes back", self.shared.settings.lease.as_secs(), self.job.worker);
            return Done::Left(id);
        };
        log_ended.cancel();
        match shipper.await {
            Ok(Shipped::Whole) => {}
            Ok(Shipped::InPart) => self.log_in_doubt = true,
            Err(error) => {
                tracing::error!(build.id = %id.build, "the log of build {id} was not written to its end: {error}")
            }
        }
        if let Err(error) = scribe.await {
            tracing::error!(build.id = %id.build, "the steps of build {id} were not written to the end: {error}");
        }
        if let (Outcome::Lost, Some(reason)) = (ended.outcome, self.stop.cancelled.get()) {
            let mut detail = if reason.is_empty() { "cancelled".to_owned() } else { format!("cancelled: {reason}") };
            if let Some(note) = ended.detail.filter(|note| note != crate::executor::STOPPED) {
                detail = format!("{detail}; {note}");
            }
            ended = Ended { outcome: Outcome::Cancelled, detail: Some(detail), ..ended };
        } else if ended.outcome == Outcome::Lost
            && (self.shared.giving_back.is_cancelled() || self.shared.leaving.is_cancelled())
            && self.pulse.age() < self.shared.settings.lease
        {
            let detail = format!("given back: worker `{}` stopped", self.job.worker);
            ended = Ended { outcome: Outcome::GivenBack, exit: None, detail: Some(detail), ..ended };
        }
        let recorded = self.record(&ended).await;
        self.tell(&ended, recorded.as_ref(), started.elapsed());
        let database = self.shared.database.clone();
        let (log_in_doubt, hand) = (self.log_in_doubt, self.hand);
        let (leaving, giving_back) = (self.shared.leaving.clone(), self.shared.giving_back.clone());
        self.shared.tidying.spawn(async move {
            let dir = source.dir.clone();
            if log_in_doubt {
                // Now that the database is back. What is missing after this too was complained of.
                let source = logs::Source { resume: true, ..source };
                let _rest = logs::ship(database, source, log_ended).await;
            }
            super::tidying::tidy(&dir, &leaving, &giving_back).await;
            drop(hand);
        });
        Done::Ended { id, recorded }
    }

    /// Runs the executor, and meanwhile keeps the claim: a ping each `[lease] ping`, and when it is lost, tries to take it
    /// again until the lease is over. Then the build is stopped, before anybody else may start it; the keeper sees to that too. `None`: the
    /// daemon leaves, and the attempt goes on without it.
    async fn execute(&mut self, begin: Begin, seen: watch::Sender<Seen>) -> Option<Ended> {
        let begun = Arc::new(AtomicBool::new(begin == Begin::Adopt));
        let claim_lost = CancellationToken::new();
        let tether = Tether {
            stop: self.stop.token.clone(),
            claim_lost: claim_lost.clone(),
            giving_back: self.shared.giving_back.clone(),
            lease: self.lease.subscribe(),
            begun: Arc::clone(&begun),
            seen,
        };
        // Borrowed apart, so that the run can go on while the claim is tended.
        let job = self.job.clone();
        let Some(executor) = self.shared.executors.get(&job.executor) else {
            return Some(Ended::without_process(
                Outcome::Error,
                format!("worker `{}` has no executor `{}`", job.worker, job.executor),
            ));
        };
        // A task of its own: it shares the keeper with others, who must not wait while this one's claim is tended.
        let mut run = crate::tasks::spawn(async move { executor.run(&job, begin, tether).await });
        let ping = self.shared.settings.ping;
        let mut tick = interval_at(Instant::now() + ping, ping);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let asked = Arc::clone(&self.stop.asked);
        let leaving = self.shared.leaving.clone();
        let (mut given_up, mut stays) = (None, false);
        loop {
            let retake = self.claim.is_none() && given_up.is_none();
            tokio::select! {
                ended = &mut run => {
                    let ended = ended.unwrap_or_else(|error| Ended::without_process(Outcome::Error, format!("the executor failed: {error}")));
                    break Some(match given_up {
                        Some(why) if ended.outcome == Outcome::Lost => Ended { detail: Some(why), exit: None, ..ended },
                        Some(_) | None => ended,
                    });
                },
                () = leaving.cancelled(), if !stays => {
                    if begun.load(Ordering::Acquire) && !self.stop.token.is_cancelled() {
                        // The next daemon then has the whole lease to come.
                        if self.ping(LAST_PING).await {
                            // For the task that passes it on to the keeper.
                            tokio::time::sleep(PASSING_ON).await;
                        }
                        break None;
                    }
                    // Nobody would find it again: it is given back.
                    self.stop.token.cancel();
                    stays = true;
                }
                _ = tick.tick() => {}
                () = asked.notified() => self.step_aside().await,
                () = tokio::time::sleep(RETAKE), if retake => {}
            }
            if given_up.is_none() {
                given_up = self.tend_claim().await;
                if given_up.is_some() {
                    claim_lost.cancel();
                    self.stop.token.cancel();
                }
            }
        }
    }

    async fn step_aside(&mut self) {
        let Some(claim) = &self.claim else { return };
        match claim.step_aside(self.job.id.build).await {
            Ok(true) => {}
            // As when the connection is lost: the row is taken again within the lease.
            Ok(false) | Err(_) => self.claim = None,
        }
    }

    /// `Some(why)`: the claim is lost for good.
    async fn tend_claim(&mut self) -> Option<String> {
        let lease = self.shared.settings.lease;
        let id = self.job.id;
        if self.claim.is_some() && self.ping(self.pulse.patience(lease)).await {
            self.hold_the_rest().await;
            return None;
        }
        let patience = self.pulse.patience(lease);
        match tokio::time::timeout(patience, self.retake()).await {
            Ok(Retaken::Yes) => {
                tracing::info!(build.id = %id.build, build.attempt = id.attempt, "the claim of build {id} is held again");
                None
            }
            Ok(Retaken::NoLongerOurs) => Some("its claim was lost, and others have ended this attempt".to_owned()),
            Ok(Retaken::NotNow) | Err(_) if self.pulse.age() >= lease => {
                let why = format!("its claim was lost for longer than the lease of {} s", lease.as_secs());
                tracing::warn!(build.id = %id.build, build.attempt = id.attempt, "build {id} is stopped: {why}");
                Some(why)
            }
            Ok(Retaken::NotNow) | Err(_) => None,
        }
    }

    /// So that people see the slot in use, and others do not try in vain.
    async fn hold_the_rest(&mut self) {
        let (Some(claim), Some(locks)) = (&self.claim, &self.unheld) else { return };
        match claim.hold(locks).await {
            Ok(true) => self.unheld = None,
            Ok(false) => {}
            Err(_) => self.claim = None,
        }
    }

    /// Whether the claim stands; if not, it is lost for now.
    async fn ping(&mut self, patience: Duration) -> bool {
        let Some(claim) = &self.claim else { return false };
        let id = self.job.id;
        let pulse = Pulse::now();
        match claim.ping(patience).await {
            Ok(()) => {
                self.confirmed(pulse);
                true
            }
            Err(error) => {
                tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                    "the claim of build {id} is lost; the build goes on while I try to take it again: {}", Chain(&error));
                self.claim = None;
                false
            }
        }
    }

    fn confirmed(&mut self, pulse: Pulse) {
        self.pulse = pulse;
        self.lease.send_replace(pulse.confirmed + self.shared.settings.lease);
    }

    async fn retake(&mut self) -> Retaken {
        let id = self.job.id;
        let retaken = async {
            // Over a new connection; those that died with the claim are found out by the pool.
            let mut claim = self.shared.database.claim().await?;
            if claim.take_again(id).await? {
                return Ok(Some(claim));
            }
            claim.finish();
            Ok::<_, DatabaseError>(None)
        };
        match retaken.await {
            Ok(Some(claim)) => {
                // Counted before the lease is renewed, with the lease that others have to wait for from now on: see `Lost`.
                let locks =
                    match self.shared.database.count_claim(id, self.job.started_us, self.shared.settings.lease).await {
                        Ok(Some(locks)) => locks,
                        Ok(None) => return Retaken::NoLongerOurs,
                        Err(_) => return Retaken::NotNow,
                    };
                let pulse = Pulse::now();
                match claim.hold(&locks).await {
                    Ok(whole) => self.unheld = (!whole).then_some(locks),
                    Err(_) => return Retaken::NotNow,
                }
                self.claim = Some(claim);
                self.confirmed(pulse);
                Retaken::Yes
            }
            // Somebody holds the row, or there is none any more.
            Ok(None) => match self.shared.database.attempt_state(id, self.job.started_us).await {
                Ok(Some((state, true))) if state == "running" => Retaken::NotNow,
                Ok(_) => Retaken::NoLongerOurs,
                Err(_) => Retaken::NotNow,
            },
            Err(_) => Retaken::NotNow,
        }
    }

    /// Records until it is recorded, or is no longer ours to record. After a failure nobody knows whether the COMMIT came
    /// through; the attempt's own row does.
    async fn record(&mut self, ended: &Ended) -> Option<Recorded> {
        let id = self.job.id;
        // Details may differ from try to try; what kind of refusal it is tells whether it is news.
        let mut warned: Option<(Instant, Option<String>)> = None;
        // Each try is a ping of the claim, where it stands.
        let mut pause = Pause { next: RETAKE, most: self.shared.settings.ping };
        loop {
            if self.shared.giving_up.is_cancelled() {
                tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                    "leaving without having recorded the result of build {id}; it is kept on this worker's disk for its next start");
                return None;
            }
            if self.claim.is_none() {
                self.log_in_doubt = true;
                match self.retake().await {
                    Retaken::Yes => {}
                    Retaken::NoLongerOurs => {
                        tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                            "the result of build {id} is already recorded, or no longer ours");
                        return None;
                    }
                    Retaken::NotNow => {
                        pause.wait().await;
                        continue;
                    }
                }
            }
            let Some(mut claim) = self.claim.take() else { continue };
            match claim.record(id, ended).await {
                Ok(recorded) => {
                    claim.finish();
                    if recorded.is_none() {
                        tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                            "attempt {id} is no longer its build's running one; nothing was recorded");
                    }
                    return recorded;
                }
                Err(error) => {
                    let kind = error.sqlstate().map(str::to_owned);
                    if warned.as_ref().is_none_or(|(at, said)| at.elapsed() > COMPLAIN || *said != kind) {
                        let why = self.unrecorded(ended, &error).await;
                        tracing::warn!(build.id = %id.build, build.attempt = id.attempt, "{why}");
                        warned = Some((Instant::now(), kind));
                    }
                    if error.sqlstate().is_some() && !claim.is_over() {
                        // Nobody else is to take the build for lost meanwhile.
                        self.claim = Some(claim);
                    } else {
                        drop(claim);
                        self.log_in_doubt = true;
                    }
                    pause.wait().await;
                }
            }
        }
    }

    /// Why the result could not be recorded, for the log. What the database refuses is said in `builds` as well.
    async fn unrecorded(&self, ended: &Ended, error: &DatabaseError) -> String {
        let (id, database) = (self.job.id, &self.shared.database);
        let result = ended.outcome.attempt_state();
        if error.sqlstate() == Some(LOCK_TIMEOUT) {
            let holder = database.holder(id.build).await.unwrap_or_else(|_| "an open transaction".to_owned());
            return format!("the result of build {id}, {result}, waits for {holder}");
        }
        let why = format!("its result, {result}, cannot be recorded yet: {}", Chain(error));
        if error.is_refusal()
            && let Err(error) = database.result_refused(id, &why).await
        {
            tracing::debug!(error = %Chain(&error), "psql was not told");
        }
        format!("cannot record the result of build {id} yet: {}", Chain(error))
    }

    fn tell(&self, ended: &Ended, recorded: Option<&Recorded>, took: Duration) {
        let (id, builder) = (self.job.id, &self.job.builder);
        let Some(recorded) = recorded else { return };
        let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let why = ended.detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
        match recorded.retry_in {
            Some(delay) => {
                tracing::info!(build.id = %id.build, build.attempt = id.attempt, builder, duration_ms,
                    "build {id} of {builder} goes back to the queue, to be tried again in {} s{why}", delay.as_secs());
                self.shared.herald.event(id, builder, &self.job.worker, &recorded.state, "retried");
            }
            None => {
                // Nobody's code is to blame, and its author hears nothing of it.
                if recorded.state == "error" {
                    tracing::warn!(build.id = %id.build, build.attempt = id.attempt, builder, duration_ms,
                        "build {id} of {builder} ended in error{why}");
                } else {
                    tracing::info!(build.id = %id.build, build.attempt = id.attempt, builder, duration_ms,
                        "build {id} of {builder} {}{why}", recorded.state);
                }
                self.shared.herald.event(id, builder, &self.job.worker, &recorded.state, "finished");
            }
        }
    }
}

/// Records an attempt whose worker has disappeared. `None`: it was not lost after all, or somebody else was faster.
///
/// # Errors
/// Nothing was recorded.
pub async fn recover(shared: &Shared, lost: &Unlocked) -> Result<Option<Recorded>, DatabaseError> {
    let (id, worker) = (lost.id, &lost.worker);
    let mut claim = shared.database.claim().await?;
    if !claim.take_again(id).await? {
        claim.finish();
        return Ok(None);
    }
    if !claim.is_unchanged(id, lost.claims).await? {
        claim.release().await?;
        claim.finish();
        return Ok(None);
    }
    let ended = Ended::without_process(Outcome::Lost, format!("worker `{worker}` disappeared"));
    let recorded = match claim.record(id, &ended).await {
        Ok(recorded) => recorded,
        Err(error) => {
            if error.is_refusal() {
                let why = format!("its worker `{worker}` disappeared, and that cannot be recorded: {}", Chain(&error));
                shared.database.result_refused(id, &why).await?;
            }
            return Err(error);
        }
    };
    claim.finish();
    if let Some(recorded) = &recorded {
        tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
            "worker `{worker}` disappeared while it ran build {id}, which is now {}", recorded.state);
    }
    Ok(recorded)
}
