//! The faults, dealt from a shuffled deck so that a short run sees all of them. They come in turns of two kinds: in one, anything
//! happens to anybody; in the other one worker is spared, because only who watches undisturbed for `grace` may take over.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use buildreactor::embedded::{Server, StopMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::holds::Holds;
use super::worker::{Condition, Worker};
use super::{BEYOND, GRACE, LEASE, LONGEST, OTHER_LEASES, Sql, Timeline, builds_alive, clock};
use crate::support::dice::Random;
use crate::support::proxy::{Break, Mood};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    /// kill -9 and away for longer than grace, while it runs something that would take longer still.
    KillForLong,
    Terminate,
    TerminateTwice,
    Interrupt,
    Freeze,
    /// Longer than the server waits for a ping, and grace after that.
    FreezeForLong,
    KillKeeper,
    KillGuardian,
    /// SIGSTOP: stuck.
    FreezeGuardian,
    EndClaims,
    EndWatches,
    EndEverything,
    RestartFast,
    RestartImmediate,
    Cut,
    Reset,
    Stall,
    StallUp,
    StallDown,
    Refuse,
    /// The database is away for all of them.
    Blackout,
    /// Others lose their claims for a moment; a worker that saw it is frozen, and wakes after grace when they are lost again, but were held
    /// in between.
    Ambush,
    /// kill -9, and a restart at once with another lease.
    OtherLease,
    /// A person's open transaction holds a build's row.
    Hold,
}

const DECK: [Fault; 36] = [
    Fault::Kill,
    Fault::Kill,
    Fault::Kill,
    Fault::KillForLong,
    Fault::Terminate,
    Fault::Terminate,
    Fault::Terminate,
    Fault::TerminateTwice,
    Fault::Interrupt,
    Fault::Freeze,
    Fault::Freeze,
    Fault::FreezeForLong,
    Fault::KillKeeper,
    Fault::KillGuardian,
    Fault::KillGuardian,
    Fault::FreezeGuardian,
    Fault::EndClaims,
    Fault::EndClaims,
    Fault::EndWatches,
    Fault::EndEverything,
    Fault::RestartFast,
    Fault::RestartImmediate,
    Fault::Cut,
    Fault::Reset,
    Fault::Stall,
    Fault::StallUp,
    Fault::StallDown,
    Fault::Refuse,
    Fault::Blackout,
    Fault::Ambush,
    Fault::OtherLease,
    Fault::OtherLease,
    Fault::Hold,
    Fault::Hold,
    Fault::Hold,
    Fault::Hold,
];

/// These reach every worker's watch.
const FOR_ALL: [Fault; 5] =
    [Fault::EndWatches, Fault::EndEverything, Fault::RestartFast, Fault::RestartImmediate, Fault::Blackout];

/// These need one that is up.
const OF_DAEMONS: [Fault; 7] = [
    Fault::Kill,
    Fault::Terminate,
    Fault::TerminateTwice,
    Fault::Interrupt,
    Fault::Freeze,
    Fault::Ambush,
    Fault::OtherLease,
];

/// Something to do later.
enum Later {
    /// The second half of an [`Fault::Ambush`] by this worker.
    Spring(usize),
    Thaw(i32),
    /// After an [`Fault::OtherLease`] with a long one: [`Fault::KillForLong`].
    Lose(usize),
}

pub struct Torturer {
    random: Random,
    pub workers: Vec<Worker>,
    pub timeline: Timeline,
    sql: Sql,
    server: Option<Server>,
    restarting: Option<tokio::task::JoinHandle<Server>>,
    deck: Vec<Fault>,
    next: Instant,
    /// Nothing happens to this one...
    spared: Option<usize>,
    /// ...or to anybody, until then.
    turn_ends: Instant,
    later: Vec<(Instant, Later)>,
    holds: Holds,
    done: usize,
}

impl Torturer {
    pub fn new(random: Random, server: Server, workers: Vec<Worker>) -> Torturer {
        Torturer {
            random,
            workers,
            timeline: Timeline::default(),
            sql: Sql { url: server.url("postgres"), client: None },
            holds: Holds::new(server.url("postgres")),
            server: Some(server),
            restarting: None,
            deck: Vec::new(),
            spared: None,
            turn_ends: Instant::now(),
            // Something runs by then.
            next: Instant::now() + Duration::from_millis(2500),
            later: Vec::new(),
            done: 0,
        }
    }

    pub fn faults(&self) -> usize {
        self.done
    }

    pub fn held(&self) -> usize {
        self.holds.held()
    }

    pub fn supervise(&mut self) {
        for worker in &mut self.workers {
            worker.supervise(&mut self.timeline);
        }
    }

    pub async fn step(&mut self) {
        self.supervise();
        let now = Instant::now();
        for worker in &mut self.workers {
            if worker.heals.is_some_and(|at| now >= at) {
                worker.heals = None;
                worker.proxy.set(Mood::default());
                self.timeline.note(format!("the network of {} is well again", worker.name));
            }
        }
        if self.restarting.as_ref().is_some_and(tokio::task::JoinHandle::is_finished) {
            self.server_is_back().await;
        }
        let due: Vec<Later> = self.later.extract_if(.., |(at, _)| now >= *at).map(|(_, what)| what).collect();
        for what in due {
            self.do_later(what).await;
        }
        if now >= self.turn_ends {
            let seconds = if self.spared.is_none() { *self.random.of(&[20, 34]) } else { 8 + self.random.below(16) };
            let any = self.any(None);
            self.spared = if self.spared.is_none() { any } else { None };
            // The first one: a short run is to see somebody take over.
            let seconds = if self.done == 0 { 22 } else { seconds };
            self.turn_ends = now + Duration::from_secs(seconds);
            let who = self.spared.map_or("nobody", |n| self.workers[n].name.as_str());
            self.timeline.note(format!("for {seconds} s {who} is spared"));
        }
        if now >= self.next {
            self.next = now + Duration::from_millis(200 + self.random.below(1100));
            let fault = self.draw();
            self.done += 1;
            self.inflict(fault).await;
        }
    }

    /// The next fault. What would disturb one that is spared comes later.
    fn draw(&mut self) -> Fault {
        loop {
            let ambush = self.later.iter().any(|(_, what)| matches!(what, Later::Spring(_)));
            let fits = |fault: &Fault| (self.spared.is_none() && !ambush) || !FOR_ALL.contains(fault);
            if let Some(at) = self.deck.iter().rposition(fits) {
                return self.deck.remove(at);
            }
            let mut deck = DECK.to_vec();
            for n in (1..deck.len()).rev() {
                let other = usize::try_from(self.random.below(n as u64 + 1)).unwrap();
                deck.swap(n, other);
            }
            if self.done == 0 {
                // Its consequences take long: early in a short run.
                let at = deck.iter().position(|fault| *fault == Fault::KillForLong).unwrap();
                let last = deck.len() - 1;
                deck.swap(at, last);
            }
            self.deck.extend(deck);
        }
    }

    async fn server_is_back(&mut self) {
        if let Some(restarting) = self.restarting.take() {
            self.server = Some(restarting.await.unwrap());
            self.timeline.note("PostgreSQL is back");
        }
    }

    async fn do_later(&mut self, what: Later) {
        match what {
            Later::Spring(n) => {
                self.timeline.note(format!("Ambush: and again, {} wakes up", self.workers[n].name));
                if let Condition::Frozen(_) = self.workers[n].condition {
                    self.workers[n].condition = Condition::Frozen(Instant::now());
                    let others = self.hold_others(n).await;
                    self.let_go(&others);
                }
            }
            Later::Lose(n) => {
                let away = self.patience(None) + Duration::from_millis(2500);
                let up = |m: &usize| self.workers[*m].condition == Condition::Up && !self.workers[*m].alone;
                // Who has least patience is to see it, undisturbed.
                let watcher =
                    (0..self.workers.len()).filter(|m| *m != n && up(m)).min_by_key(|m| self.workers[*m].lease);
                if let (true, true, Some(watcher)) = (up(&n), self.spared != Some(n), watcher) {
                    self.workers[n].kill(away);
                    self.workers[n].alone = true;
                    self.spared = Some(watcher);
                    self.turn_ends = Instant::now() + LONGEST + Duration::from_secs(2);
                    let (name, sees) = (&self.workers[n].name, &self.workers[watcher].name);
                    self.timeline.note(format!(
                        "and {name} is gone, back in {away:.1?}; {sees} is spared until its lease is over"
                    ));
                }
            }
            Later::Thaw(pid) => {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGCONT);
                self.timeline.note(format!("guardian {pid} goes on"));
            }
        }
    }

    /// Within the lease, beyond it, or beyond grace.
    fn spell(&mut self) -> Duration {
        let ms = match self.random.below(10) {
            0..5 => 50 + self.random.below(2000),
            5..8 => LEASE.as_millis() as u64 + self.random.below(5000),
            _ => GRACE.as_millis() as u64 + self.random.below(4000),
        };
        Duration::from_millis(ms)
    }

    /// The longest that a worker, or anybody, leaves builds of others alone.
    fn patience(&self, of: Option<usize>) -> Duration {
        let longest = |(n, worker): (usize, &Worker)| if of == Some(n) { worker.lease } else { worker.longest };
        BEYOND + self.workers.iter().enumerate().map(longest).max().unwrap()
    }

    /// Mostly soon.
    fn away(&mut self) -> Duration {
        if self.random.below(2) == 0 { Duration::from_millis(self.random.below(300)) } else { self.spell() }
    }

    /// A worker that is not spared, nor has trouble that must take its course. `fault`: one that can have it, if there is one.
    fn any(&mut self, fault: Option<Fault>) -> Option<usize> {
        let needs_up = fault.is_some_and(|fault| OF_DAEMONS.contains(&fault));
        let all = || (0..self.workers.len()).filter(|n| self.spared != Some(*n));
        let free = |n: &usize| !self.workers[*n].alone;
        let up = |n: &usize| self.workers[*n].condition == Condition::Up;
        let among =
            [all().filter(|n| free(n) && (up(n) || !needs_up)).collect::<Vec<_>>(), all().filter(free).collect()];
        let drawn = self.random.next();
        let among = among.iter().find(|some| !some.is_empty())?;
        Some(among[usize::try_from(drawn % among.len() as u64).unwrap()])
    }

    /// The worker that runs most of the long builds, if it runs.
    async fn busiest(&mut self) -> Option<usize> {
        let spared = self.spared.map_or("", |n| self.workers[n].name.as_str());
        let sql = format!(
            "SELECT worker FROM running_builds WHERE builder = 'long' AND worker <> '{spared}' \
             GROUP BY worker ORDER BY count(*) DESC, worker LIMIT 1"
        );
        let rows = self.sql.query(&sql).await.ok()?;
        let name: String = rows.first()?.get(0);
        self.workers.iter().position(|worker| worker.name == name && worker.condition == Condition::Up)
    }

    async fn end(&mut self, which: &str) {
        let sql = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND application_name LIKE 'buildreactor%{which}'"
        );
        let ended = self.sql.query(&sql).await.map(|rows| rows[0].get::<_, i64>(0));
        self.timeline.note(format!("pg_terminate_backend of `{which}`: {ended:?}"));
    }

    /// Freezes the others, ends all claims, and lets `n` look at that for a while, well within the lease.
    async fn hold_others(&mut self, n: usize) -> Vec<usize> {
        let others: Vec<usize> =
            (0..self.workers.len()).filter(|m| *m != n && self.workers[*m].condition == Condition::Up).collect();
        for m in &others {
            self.workers[*m].signal(Signal::SIGSTOP);
        }
        self.end("claim").await;
        self.supervise();
        tokio::time::sleep(Duration::from_millis(900)).await;
        others
    }

    fn let_go(&mut self, others: &[usize]) {
        for m in others {
            self.workers[*m].signal(Signal::SIGCONT);
        }
    }

    fn restart(&mut self, mode: StopMode) {
        let Some(mut server) = self.server.take() else { return };
        self.timeline.note(format!("PostgreSQL restarts, {mode:?}"));
        self.restarting = Some(tokio::task::spawn_blocking(move || {
            server.restart(mode).unwrap();
            server
        }));
    }

    async fn inflict(&mut self, fault: Fault) {
        if fault == Fault::Hold {
            let (what, time) = (self.random.next(), 1000 + self.random.below(4001));
            let note = self.holds.begin(what, Duration::from_millis(time));
            return self.timeline.note(note);
        }
        // The same draws, whatever state things are in.
        let (any, spell, away) = (self.any(Some(fault)), self.spell(), self.away());
        let chance = self.random.next();
        let Some(mut n) = any else { return };
        if matches!(fault, Fault::KillForLong | Fault::FreezeForLong | Fault::OtherLease) {
            match self.busiest().await {
                Some(busiest) => n = busiest,
                // Its time will come.
                None => return self.deck.insert(self.deck.len().saturating_sub(6), fault),
            }
        }
        let up = self.workers[n].condition == Condition::Up;
        let (anybodys, its) = (self.patience(None), self.patience(Some(n)));
        let worker = &mut self.workers[n];
        let name = worker.name.clone();
        match fault {
            Fault::Kill | Fault::KillForLong if up => {
                let away = if fault == Fault::Kill { away } else { anybodys + Duration::from_millis(2500) };
                worker.kill(away);
                worker.alone = fault == Fault::KillForLong;
                self.timeline.note(format!("kill -9 of {name}, back in {away:.1?}"));
            }
            Fault::Terminate | Fault::TerminateTwice | Fault::Interrupt if up => {
                worker.signal(if fault == Fault::Interrupt { Signal::SIGINT } else { Signal::SIGTERM });
                worker.condition = Condition::Leaving(away);
                self.timeline.note(format!("{fault:?}: {name}, then away for {away:.1?}"));
                if fault == Fault::TerminateTwice {
                    tokio::time::sleep(Duration::from_millis(chance % 400)).await;
                    self.workers[n].signal(Signal::SIGTERM);
                }
            }
            Fault::Freeze | Fault::FreezeForLong if up => {
                let spell = if fault == Fault::Freeze {
                    spell
                } else {
                    worker.lease + Duration::from_secs(10) + anybodys + Duration::from_millis(chance % 4000)
                };
                worker.signal(Signal::SIGSTOP);
                worker.condition = Condition::Frozen(Instant::now() + spell);
                worker.alone = fault == Fault::FreezeForLong;
                self.timeline.note(format!("SIGSTOP of {name} for {spell:.1?}"));
            }
            Fault::KillKeeper => {
                if let Some(keeper) = worker.keeper() {
                    let _gone = kill(Pid::from_raw(keeper), Signal::SIGKILL);
                    self.timeline.note(format!("kill -9 of the keeper of {name}, {keeper}"));
                }
            }
            Fault::KillGuardian | Fault::FreezeGuardian => {
                let guardians = worker.guardians();
                if let Some(guardian) = guardians.get(usize::try_from(chance % 64).unwrap() % guardians.len().max(1)) {
                    let signal = if fault == Fault::KillGuardian { Signal::SIGKILL } else { Signal::SIGSTOP };
                    let _gone = kill(Pid::from_raw(*guardian), signal);
                    if fault == Fault::FreezeGuardian {
                        self.later.push((Instant::now() + spell, Later::Thaw(*guardian)));
                    }
                    self.timeline.note(format!("{signal} of guardian {guardian} of {name}"));
                }
            }
            Fault::EndClaims => self.end("claim").await,
            Fault::EndWatches => self.end("watch").await,
            Fault::EndEverything => self.end("").await,
            Fault::RestartFast => self.restart(StopMode::Fast),
            Fault::RestartImmediate => self.restart(StopMode::Immediate),
            Fault::Cut | Fault::Reset => {
                worker.proxy.cut(if fault == Fault::Cut { Break::Close } else { Break::Reset });
                self.timeline.note(format!("{fault:?} of all connections of {name}"));
            }
            Fault::Stall | Fault::StallUp | Fault::StallDown | Fault::Refuse if worker.heals.is_none() => {
                worker.proxy.set(Mood {
                    stall_up: matches!(fault, Fault::Stall | Fault::StallUp),
                    stall_down: matches!(fault, Fault::Stall | Fault::StallDown),
                    refuse: fault == Fault::Refuse,
                    ..Mood::default()
                });
                if fault == Fault::Refuse {
                    worker.proxy.cut(Break::Reset);
                }
                worker.heals = Some(Instant::now() + spell);
                self.timeline.note(format!("{fault:?}: network of {name} for {spell:.1?}"));
                // Sometimes the connections are dead when it is well again.
                if chance.is_multiple_of(3) {
                    worker.proxy.cut(Break::Reset);
                }
            }
            Fault::Blackout => {
                let spell = spell.min(LEASE * 2);
                for worker in &mut self.workers {
                    worker.proxy.set(Mood { refuse: true, ..Mood::default() });
                    worker.proxy.cut(Break::Close);
                    worker.heals = Some(Instant::now() + spell);
                }
                self.timeline.note(format!("Blackout: no network for {spell:.1?}"));
            }
            Fault::Ambush if up => {
                self.timeline
                    .note(format!("Ambush: the others lose their claims for a moment, {name} sees it and is frozen"));
                let others = self.hold_others(n).await;
                self.workers[n].signal(Signal::SIGSTOP);
                self.workers[n].condition = Condition::Frozen(Instant::now() + its * 2);
                self.workers[n].alone = true;
                self.let_go(&others);
                self.later.push((Instant::now() + its, Later::Spring(n)));
            }
            Fault::OtherLease if up => {
                let others: Vec<u64> =
                    OTHER_LEASES.into_iter().filter(|lease| *lease != worker.lease.as_secs()).collect();
                let lease = others[usize::try_from(chance % others.len() as u64).unwrap()];
                worker.kill(Duration::ZERO);
                self.timeline.note(format!("kill -9 of {name}, back with {lease} s instead of {:?}", worker.lease));
                worker.lease = Duration::from_secs(lease);
                if worker.lease == LONGEST {
                    self.later.push((Instant::now() + Duration::from_secs(3), Later::Lose(n)));
                }
            }
            // The one that was meant is down already.
            Fault::Kill
            | Fault::KillForLong
            | Fault::Terminate
            | Fault::TerminateTwice
            | Fault::Interrupt
            | Fault::Freeze
            | Fault::FreezeForLong
            | Fault::Stall
            | Fault::StallUp
            | Fault::StallDown
            | Fault::Refuse
            | Fault::Ambush
            | Fault::OtherLease
            | Fault::Hold => {}
        }
    }

    /// Ends all faults.
    pub async fn heal(&mut self) {
        self.server_is_back().await;
        self.holds.end();
        for (_, what) in std::mem::take(&mut self.later) {
            self.do_later(what).await;
        }
        for worker in &mut self.workers {
            worker.heal();
        }
        self.timeline.note("everything is healed");
    }

    /// Once all builds are final: nothing of them may be left, nor of the workers once they have left.
    pub async fn leave(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        let longest = self.workers.iter().map(|worker| worker.longest).max().unwrap();
        let deadline = Instant::now() + longest + Duration::from_secs(15);
        while !builds_alive(&self.workers).is_empty() {
            if Instant::now() > deadline {
                problems.push(format!("processes of builds are left: {:#?}", builds_alive(&self.workers)));
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.supervise();
        for worker in &mut self.workers {
            if let Err(why) = worker.leave().await {
                problems.push(format!("{}, told to leave: {why}", worker.name));
            }
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        for worker in &self.workers {
            while let Some(keeper) = worker.keeper() {
                if Instant::now() > deadline {
                    problems.push(format!("the keeper of {}, {keeper}, is left", worker.name));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        problems
    }

    /// Leaves everything to be looked at.
    pub fn keep(&self, trace: &Path, seed: u64, problems: &[String]) -> PathBuf {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("torture-{seed}-{}", std::process::id()));
        std::fs::create_dir_all(&kept).unwrap();
        std::fs::copy(trace, kept.join("trace")).unwrap();
        for worker in &self.workers {
            std::fs::copy(&worker.log, kept.join(worker.log.file_name().unwrap())).unwrap();
        }
        let timeline: Vec<String> =
            self.timeline.0.iter().map(|(at, what)| format!("{} {what}\n", clock(*at))).collect();
        std::fs::write(kept.join("faults"), timeline.concat()).unwrap();
        std::fs::write(kept.join("problems"), problems.join("\n\n")).unwrap();
        kept
    }
}
