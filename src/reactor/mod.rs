//! The product's behaviour: wake, look, claim, run, record, look again. Every wake, timer, reconnect and finished build comes
//! to the same loop, which claims all that is claimable (invariant 4).

pub mod attempt;
pub mod begin;
pub mod candidates;
pub mod eligible;
pub mod herald;
pub mod in_hand;
mod look;
mod lost;
mod orders;
mod outage;
mod schedule;
mod scheduler;
mod scribe;
mod settling;
mod tidying;
mod unready;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::attempt::{Stop, adopt};
use self::begin::{Done, Progress, attempt};
use self::candidates::Candidates;
use self::herald::Herald;
use self::in_hand::InHand;
use self::lost::Lost;
pub use self::orders::Order;
pub use self::outage::{Outage, backoff};
use self::scheduler::{Scheduler, Tended};
use self::settling::Settling;
use self::unready::Unready;
use crate::clock::Fold;
use crate::database::queries::Hello;
use crate::database::watch::Snapshot;
use crate::database::{Database, DatabaseError, News, Watch};
use crate::executor::{Folders, Registry};
use crate::model::{AttemptId, BuildId, Builder, Recorded};
use crate::report::Chain;

/// How many candidates one claim offers to the database: the first that is free is taken, so a few that others hold or
/// have finished cost no further round trip.
const OFFER: usize = 8;
/// At most so many new rows are taken from one look; more make it a look at everything.
const NEW: i32 = 1000;
/// At most so many scheduled rows are made ready at once.
const PROMOTE: i64 = 1000;
/// While builds wait for builders that are busy elsewhere: a worker that dies sends no wake.
const BUSY_ELSEWHERE: Duration = Duration::from_secs(2);
/// An executor that took this long to say that it cannot start a build is asked again after [`SILENT`].
const SLOW: Duration = Duration::from_secs(1);
const SILENT: Duration = Duration::from_secs(30);
/// After candidates were gone, everything is looked at within this time.
const AFTER_ROWS_GONE: Duration = Duration::from_secs(5);
/// After the database refused a claim.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// At least this often, and at each ping: which running builds nobody holds.
const LOST: Duration = Duration::from_secs(2);
/// Claims of builders that were busy elsewhere which wakes have tried again, a builder at a time: so many at once, then one each [`RETRY`].
const RETRY_AT_ONCE: u32 = 20;
const RETRY: Duration = Duration::from_millis(50);
/// While something runs: whether a person's statement waits for its row. The statement gives up after 2.5 s.
const ASKERS: Duration = Duration::from_millis(700);

/// What the reactor does by the clock.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Builds at once.
    pub slots: u32,
    /// Patterns of builder names that this worker takes.
    pub builders: Vec<String>,
    /// At least this often everything is looked at.
    pub poll: Duration,
    /// Between two pings of a claim.
    pub ping: Duration,
    /// How long a build lives without its claim.
    pub lease: Duration,
    /// How long an unlocked running build is left to its owner.
    pub grace: Duration,
    /// Bytes of each log kept in the database.
    pub database_limit: u64,
    /// With less than these bytes free in the worker's folder nothing is claimed.
    pub min_free_disk: u64,
}

/// What all attempts share.
pub struct Shared {
    /// The database.
    pub database: Database,
    /// This worker.
    pub hello: Hello,
    /// Numbers.
    pub settings: Settings,
    /// What runs attempts.
    pub executors: Registry,
    /// Where they run.
    pub folders: Folders,
    /// Speaks to listeners.
    pub herald: Herald,
    /// Cancelled when this daemon lets go of what runs, for the next one.
    pub leaving: CancellationToken,
    /// Cancelled when running builds are to be stopped and given back.
    pub giving_back: CancellationToken,
    /// Cancelled when not even results are waited for any longer.
    pub giving_up: CancellationToken,
    /// Removal of old folders, out of the way of builds.
    pub tidying: TaskTracker,
    /// Attempts that are run, or tidied up after.
    pub in_hand: InHand,
}

/// The loop and what it knows.
pub struct Reactor {
    shared: Arc<Shared>,
    news: Arc<News>,
    orders: mpsc::UnboundedReceiver<Order>,
    watch: Option<Watch>,
    snapshot: Option<Snapshot>,
    builders: Vec<Builder>,
    candidates: Candidates,
    /// Slots of running builds whose row is not locked at the moment, by builder.
    occupied: HashMap<String, Vec<i32>>,
    /// Builders that were busy elsewhere, or failed, at the last try.
    blocked: HashSet<String>,
    /// Those of them that wait for their locks, which are kept for them: see `fill`.
    short_of_locks: HashSet<String>,
    running: HashMap<AttemptId, Active>,
    /// Claims under way, by builder.
    claiming: HashMap<String, usize>,
    lost: Lost,
    tasks: JoinSet<Finished>,
    progress: (mpsc::UnboundedSender<Progress>, mpsc::UnboundedReceiver<Progress>),
    timers: Timers,
    leaving: Option<Order>,
    others: i64,
    /// What the last daemon left has been taken over.
    adopted: bool,
    said_hello: bool,
    outage: Outage,
    failed: bool,
    /// Why nothing is claimed, for `workers.detail`.
    not_accepting: Option<String>,
    /// Whether `workers` says that nothing is claimed.
    said_not_accepting: bool,
    unready: Unready,
    /// A claim failed while its attempt began: from then on a look shows whether it did.
    in_doubt: Option<Instant>,
    /// Until when these are not asked about again.
    held: HashMap<String, Instant>,
    settling: Settling,
    /// All that waits was settled, or tried to be, since the start: what is superseded is not to be begun.
    has_settled: bool,
    scheduler: Scheduler,
    /// Claims that wakes have tried again.
    retrying: Fold,
}

/// Why a reactor left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It was told to.
    Ordered,
    /// A task of it panicked: a bug. What ran was given back.
    Failed,
}

struct Active {
    builder: String,
    stop: Stop,
}

/// A task that has ended.
enum Finished {
    Attempt(String, Done),
    Recovery(AttemptId, Result<Option<Recorded>, DatabaseError>),
    Settled(Result<bool, DatabaseError>, Option<i64>),
    Schedules(Result<Tended, DatabaseError>),
}

/// When what is due. `None`: not.
struct Timers {
    everything: Instant,
    due: Option<Instant>,
    blocked: Option<Instant>,
    lost: Instant,
    settle: Instant,
    askers: Instant,
}

impl Reactor {
    /// A reactor for `shared`, taking `orders` and woken by `news`.
    pub fn new(shared: Arc<Shared>, orders: mpsc::UnboundedReceiver<Order>, news: Arc<News>) -> Reactor {
        let now = Instant::now();
        let lost = Lost::new(shared.settings.lease, shared.settings.grace);
        Reactor {
            shared,
            news,
            orders,
            watch: None,
            snapshot: None,
            builders: Vec::new(),
            candidates: Candidates::default(),
            occupied: HashMap::new(),
            blocked: HashSet::new(),
            short_of_locks: HashSet::new(),
            running: HashMap::new(),
            claiming: HashMap::new(),
            lost,
            tasks: JoinSet::new(),
            progress: mpsc::unbounded_channel(),
            timers: Timers { everything: now, due: None, blocked: None, lost: now, settle: now, askers: now },
            leaving: None,
            others: 0,
            adopted: false,
            said_hello: false,
            outage: Outage::default(),
            failed: false,
            not_accepting: None,
            said_not_accepting: false,
            unready: Unready::default(),
            in_doubt: None,
            held: HashMap::new(),
            settling: Settling::default(),
            has_settled: false,
            scheduler: Scheduler::new(now),
            retrying: Fold::new(RETRY, RETRY_AT_ONCE),
        }
    }

    /// Runs until an order to leave has been carried out.
    ///
    /// # Errors
    /// The worker's name is in use at the start. A database that is away is waited for.
    pub async fn run(mut self) -> Result<Left, DatabaseError> {
        let mut backoff = backoff();
        loop {
            if self.watch.as_ref().is_some_and(Watch::is_gone) {
                tracing::warn!(
                    "the connection to {} is lost; connecting again",
                    self.shared.database.info().describe()
                );
                self.forget_watch();
            }
            if self.watch.is_none() && !self.is_done() {
                match self.shared.database.watch(&self.shared.hello, Arc::clone(&self.news)).await {
                    Ok(watch) => {
                        self.watch = Some(watch);
                        self.outage.over();
                        self.timers.everything = Instant::now();
                    }
                    Err(error @ DatabaseError::NameInUse { stale: false, .. }) if !self.said_hello => {
                        return Err(error);
                    }
                    Err(error) => {
                        self.outage.failed(&error);
                        let delay = backoff.next().unwrap_or(Duration::from_secs(15));
                        self.wait(Some(Instant::now() + delay)).await;
                        continue;
                    }
                }
            }
            if let Err(error) = self.look().await {
                if !self.said_hello && error.is_bad_data() {
                    return Err(error);
                }
                tracing::warn!("{}; connecting again", Chain(&error));
                self.forget_watch();
                // Not at once, and not without hearing orders: what failed may fail again.
                let delay = backoff.next().unwrap_or(Duration::from_secs(15));
                self.wait(Some(Instant::now() + delay)).await;
                continue;
            }
            if self.watch.is_some() {
                backoff = outage::backoff();
            }
            self.fill();
            if self.is_done() {
                break;
            }
            if self.watch.is_some() && self.candidates.is_dry() && self.free_slots() > 0 {
                self.timers.everything = Instant::now();
                continue;
            }
            self.wait(None).await;
        }
        let none = std::collections::BTreeMap::new();
        let goodbye = self.shared.database.hello(&self.shared.hello, "stopped", None, false, &none);
        if self.said_hello
            && let Err(error) = goodbye.await
        {
            tracing::debug!(error = %Chain(&error), "could not say goodbye");
        }
        Ok(if self.failed { Left::Failed } else { Left::Ordered })
    }

    fn forget_watch(&mut self) {
        self.watch = None;
        // Another session, perhaps another server: its transaction ids may mean something else.
        self.snapshot = None;
        self.lost.forget();
    }

    fn free_slots(&self) -> usize {
        let used = self.running.len() + self.claiming.values().sum::<usize>();
        (self.shared.settings.slots as usize).saturating_sub(used)
    }

    /// Starts a claim for each free slot, best candidate first.
    fn fill(&mut self) {
        if self.leaving.is_some() || self.watch.is_none() || self.not_accepting.is_some() || !self.has_settled {
            return;
        }
        while self.free_slots() > 0 {
            let mut own: HashMap<&str, usize> = self.claiming.iter().map(|(name, n)| (name.as_str(), *n)).collect();
            for active in self.running.values() {
                *own.entry(&active.builder).or_default() += 1;
            }
            // One claim of a builder at a time: two would offer the same candidates.
            let now = Instant::now();
            let may = |b: &Builder| {
                !self.blocked.contains(&b.name)
                    && self.held.get(&b.name).is_none_or(|until| now >= *until)
                    && !self.claiming.contains_key(&b.name)
                    && own.get(b.name.as_str()).copied().unwrap_or(0) < usize::try_from(b.max_running).unwrap_or(0)
            };
            let mut ranked: Vec<_> =
                self.builders.iter().filter_map(|b| Some((self.candidates.rank(&b.name)?, b))).collect();
            ranked.sort_by_key(|(rank, _)| *rank);
            // Locks that a build further ahead waits for are kept for it, or one that needs two would wait for ever
            // while those that need one of them take turns.
            let mut kept = HashSet::new();
            let best = ranked.into_iter().find(|(_, b)| {
                let free = b.locks.numbers.iter().all(|lock| !kept.contains(lock));
                // Also while its claim is under way, which these must not race.
                if self.short_of_locks.contains(&b.name) || self.claiming.contains_key(&b.name) {
                    kept.extend(b.locks.numbers.iter().copied());
                }
                free && may(b)
            });
            let Some((_, builder)) = best else { return };
            let builder = builder.clone();
            let offer = self.candidates.first(&builder.name, OFFER);
            *self.claiming.entry(builder.name.clone()).or_default() += 1;
            let occupied = self.occupied.get(&builder.name).cloned().unwrap_or_default();
            let (shared, progress) = (Arc::clone(&self.shared), self.progress.0.clone());
            self.tasks.spawn(async move {
                let done = attempt(&shared, &builder, &occupied, &offer, &progress).await;
                Finished::Attempt(builder.name, done)
            });
        }
    }

    /// Sleeps until something happens, and takes note of it. `until`: only until then, whatever the timers say.
    async fn wait(&mut self, until: Option<Instant>) {
        let wake_at = until.unwrap_or_else(|| {
            let timers = &self.timers;
            let mut at = timers.everything.min(timers.lost).min(timers.settle).min(self.scheduler.at);
            if !self.running.is_empty() {
                at = at.min(timers.askers);
            }
            at = timers.due.map_or(at, |due| at.min(due));
            timers.blocked.map_or(at, |blocked| at.min(blocked))
        });
        let tending = self.watch.is_some() || until.is_some();
        tokio::select! {
            biased;
            Some(progress) = self.progress.1.recv() => self.note(progress),
            Some(finished) = self.tasks.join_next(), if !self.tasks.is_empty() => self.finished(finished),
            Some(order) = self.orders.recv() => self.obey(order),
            // Any wake may mean that a builder is idle again.
            () = self.news.wait() => self.woken(),
            () = tokio::time::sleep_until(wake_at), if tending => {}
            () = self.shared.giving_up.cancelled(), if self.leaving.is_some() && self.tasks.is_empty() => {}
        }
        // Whatever else has happened meanwhile, before looking once for all of it.
        while let Ok(progress) = self.progress.1.try_recv() {
            self.note(progress);
        }
        while let Some(finished) = self.tasks.try_join_next() {
            self.finished(finished);
        }
    }

    fn note(&mut self, progress: Progress) {
        let Progress::Started { builder, id, stop } = progress;
        self.claimed(&builder);
        self.short_of_locks.remove(&builder);
        self.candidates.remove(id.build);
        self.unready.remove(&builder);
        self.unready.remove_build(id.build);
        if self.leaving == Some(Order::Stop) {
            stop.give_back();
        }
        self.running.insert(id, Active { builder, stop });
    }

    /// A claim of this builder is no longer under way.
    fn claimed(&mut self, builder: &str) {
        if let Some(n) = self.claiming.get_mut(builder) {
            *n -= 1;
            if *n == 0 {
                self.claiming.remove(builder);
            }
        }
    }

    fn finished(&mut self, finished: Result<Finished, tokio::task::JoinError>) {
        // What it said before it ended comes first, or a build that has ended would be noted as running, for ever.
        while let Ok(progress) = self.progress.1.try_recv() {
            self.note(progress);
        }
        match finished {
            Ok(Finished::Attempt(builder, done)) => self.attempt_done(&builder, done),
            Ok(Finished::Recovery(id, result)) => {
                self.lost.done(id);
                match result {
                    Ok(Some(recorded)) => self.follow(id.build, &recorded),
                    Ok(None) => {}
                    Err(error) => {
                        // Not at each try.
                        if self
                            .unready
                            .insert_build(id.build, format!("it cannot be taken over yet: {}", Chain(&error)))
                        {
                            tracing::warn!(build.id = %id.build, "cannot take over build {id} yet: {}", Chain(&error));
                        }
                    }
                }
            }
            Ok(Finished::Settled(result, from)) => self.settled(result, from),
            Ok(Finished::Schedules(result)) => self.schedules_tended(result),
            Err(error) => {
                // What it held is unknown: start from what the database says, as after a crash.
                tracing::error!("a task of the reactor failed, please report this: {error}");
                self.failed = true;
                self.leaving = Some(Order::Stop);
                self.stop_all();
            }
        }
    }

    fn attempt_done(&mut self, builder: &str, done: Done) {
        match done {
            Done::NotReady { why, took } => {
                self.claimed(builder);
                self.short_of_locks.remove(builder);
                // Whatever wakes us: a slot that waits for a silent master is one that builds nothing.
                let hold = if took > SLOW { SILENT } else { BUSY_ELSEWHERE };
                self.held.insert(builder.to_owned(), Instant::now() + hold);
                self.block(builder, hold);
                self.unready.insert(builder, why);
            }
            Done::BuilderBusy => {
                self.claimed(builder);
                self.unready.remove(builder);
                self.short_of_locks.remove(builder);
                self.block(builder, BUSY_ELSEWHERE);
            }
            Done::LocksBusy => {
                self.claimed(builder);
                self.unready.remove(builder);
                self.block(builder, BUSY_ELSEWHERE);
                self.short_of_locks.insert(builder.to_owned());
            }
            Done::RowsGone(builds) => {
                self.claimed(builder);
                // Those that somebody holds would come back with the next look, and be offered again and again before those behind them.
                let until = Instant::now() + AFTER_ROWS_GONE;
                for build in builds {
                    self.candidates.set_aside(build, until);
                }
                // Some may only have been locked for a moment; nothing else would bring them back before the poll.
                self.look_again_within(AFTER_ROWS_GONE);
            }
            Done::Refused(build) => {
                self.claimed(builder);
                self.forget(&[build]);
                // The builder has changed under us, or a build whose claim is lost has the slot. Not at once: it may last.
                self.block(builder, BUSY_ELSEWHERE);
                self.look_again_within(BUSY_ELSEWHERE);
            }
            Done::Held { build, why, pause } => {
                self.claimed(builder);
                // Those behind it are next, at once.
                self.candidates.set_aside(build, Instant::now() + pause);
                if self.unready.insert_build(build, why.clone()) {
                    tracing::warn!(build.id = %build, builder, "build {build} of {builder} does not start: {why}");
                }
                self.look_again_within(pause);
            }
            Done::Broken { build, recorded } => {
                self.claimed(builder);
                self.forget(&[build]);
                if let Some(recorded) = &recorded {
                    self.follow(build, recorded);
                }
            }
            Done::Failed { error, in_doubt } => {
                self.claimed(builder);
                let why = format!("its builds cannot be claimed: {}", Chain(&error));
                if self.unready.insert(builder, why) {
                    tracing::warn!(builder, "cannot claim a build of {builder}: {}", Chain(&error));
                }
                // Whatever wakes us: what the database refuses is not asked for at the pace of anybody's NOTIFY.
                self.held.insert(builder.to_owned(), Instant::now() + AFTER_FAILURE);
                self.block(builder, AFTER_FAILURE);
                if in_doubt {
                    let at = Instant::now() + AFTER_FAILURE;
                    self.in_doubt = Some(at);
                    self.timers.lost = self.timers.lost.min(at);
                }
            }
            Done::Left(id) => drop(self.running.remove(&id)),
            Done::Ended { id, recorded } => {
                self.running.remove(&id);
                match &recorded {
                    Some(recorded) => self.follow(id.build, recorded),
                    // Recorded in a COMMIT that was in doubt, or by others: perhaps it is to be tried again.
                    None => self.look_again_within(AFTER_FAILURE),
                }
                self.blocked.remove(builder);
                // It may have held what these wait for.
                for waiting in &self.short_of_locks {
                    self.blocked.remove(waiting);
                }
                self.fill();
                // Others are not told by a NOTIFY of the result's own: a slot of this builder may be free for them.
                // Likewise of builds that it released, which may be for others.
                self.wake_others();
            }
        }
    }

    fn unblock(&mut self) {
        self.blocked.clear();
        self.short_of_locks.clear();
        self.timers.blocked = None;
    }

    fn block(&mut self, builder: &str, time: Duration) {
        self.blocked.insert(builder.to_owned());
        let until = Instant::now() + time;
        self.timers.blocked = Some(self.timers.blocked.map_or(until, |at| at.min(until)));
    }

    fn look_again_within(&mut self, time: Duration) {
        self.timers.everything = self.timers.everything.min(Instant::now() + time);
    }

    fn wake_others(&self) {
        if self.others > 0 {
            self.shared.herald.wake();
        }
    }

    fn forget(&mut self, builds: &[BuildId]) {
        for build in builds {
            self.candidates.remove(*build);
        }
    }

    fn plan_retry(&mut self, recorded: &Recorded) {
        if let Some(delay) = recorded.retry_in {
            let at = Instant::now() + delay;
            self.timers.due = Some(self.timers.due.map_or(at, |due| due.min(at)));
            // A newer build of its coalesce_key may have come while it ran.
            self.timers.settle = Instant::now();
        }
    }
}
