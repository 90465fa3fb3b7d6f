//! The looks at the queue: what is new, what is due, what has lost its owner, what people ask for.

use std::sync::Arc;

use tokio::time::Instant;

use super::eligible::{matches, short_of_disk};
use super::{AFTER_FAILURE, ASKERS, Active, Finished, LOST, NEW, Order, PROMOTE, Reactor, Stop, adopt, attempt};
use crate::database::DatabaseError;
use crate::model::{AttemptId, Builder};
use crate::report::Chain;

impl Reactor {
    /// Looks at what is due: everything, or what is new.
    pub(super) async fn look(&mut self) -> Result<(), DatabaseError> {
        if self.watch.is_some() && !self.adopted {
            // Before anything is claimed: these builds have their slots.
            self.adopt("is taken over from this worker's last daemon", |_| true).await?;
            self.adopted = true;
        }
        let Some(watch) = &self.watch else { return Ok(()) };
        let now = Instant::now();
        let kicked = self.news.take_kick();
        let mut everything = kicked || now >= self.timers.everything || self.snapshot.is_none();
        let control = self.news.take_control();
        if control {
            // A person may have ended a build that others need.
            self.timers.settle = now;
        }
        if control || everything {
            let builders = watch.builders(&self.shared.hello.labels).await?;
            let patterns = &self.shared.settings.builders;
            let mine: Vec<Builder> =
                builders.into_iter().filter(|builder| patterns.iter().any(|p| matches(p, &builder.name))).collect();
            // A new builder's rows were passed over by every look before.
            if mine != self.builders {
                everything = true;
                // Nor were they settled: what is superseded is not to be begun.
                self.has_settled = false;
                self.timers.settle = now;
            }
            self.builders = mine;
        }
        if everything || self.timers.due.is_some_and(|due| now >= due) {
            let (promoted, due) = watch.promote(PROMOTE).await?;
            // Overdue and not made ready: somebody holds the row.
            let due = if promoted == 0 { due.map(|due| due.max(AFTER_FAILURE)) } else { due };
            self.timers.due = due.map(|due| Instant::now() + due);
            if promoted > 0 && self.free_slots() == 0 {
                self.wake_others();
            }
        }
        let names: Vec<String> = self.builders.iter().map(|builder| builder.name.clone()).collect();
        let snapshot = match self.snapshot.take() {
            Some(since) if !everything => {
                let new = watch.look_new(&since, &names, NEW).await?;
                if let Some(due) = new.due {
                    let due = Instant::now() + due;
                    self.timers.due = Some(self.timers.due.map_or(due, |known| known.min(due)));
                }
                if new.needy {
                    self.timers.settle = now;
                }
                if new.count >= NEW as usize {
                    self.timers.settle = now;
                    None
                } else {
                    self.candidates.add(new.candidates);
                    Some(new.snapshot)
                }
            }
            Some(_) | None => None,
        };
        self.snapshot = match snapshot {
            Some(snapshot) => Some(snapshot),
            None => {
                let each = i32::try_from(self.candidates.wanted()).unwrap_or(i32::MAX);
                let (snapshot, found) = watch.look_all(&names, each).await?;
                self.candidates.replace(found);
                // Builds that are set aside are not among the candidates. Only a look at the whole queue brings them back.
                let poll = now + self.shared.settings.poll;
                self.timers.everything = self.candidates.aside_until().map_or(poll, |at| poll.min(at));
                Some(snapshot)
            }
        };
        if everything {
            let candidates = &self.candidates;
            self.unready.retain(|builder| candidates.rank(builder).is_some(), |build| candidates.is_aside(build));
        }
        let tend = everything || now >= self.timers.lost;
        if tend || control {
            for (id, reason) in watch.cancels(&self.shared.hello.name).await? {
                if let Some(active) = self.running.get(&id) {
                    active.stop.cancel_build(reason);
                }
            }
        }
        if !self.running.is_empty() && now >= self.timers.askers {
            self.timers.askers = now + ASKERS;
            for id in watch.askers(&self.shared.hello.name).await? {
                if let Some(active) = self.running.get(&id) {
                    active.stop.step_aside();
                }
            }
        }
        if tend {
            let mut unlocked = watch.unlocked().await?;
            self.occupied.clear();
            for build in &unlocked {
                self.occupied.entry(build.builder.clone()).or_default().push(build.slot);
                // Its row can be locked, but not claimed: that would be refused.
                self.candidates.remove(build.id.build);
            }
            unlocked.retain(|build| !build.held);
            self.timers.lost = now + self.shared.settings.ping.min(LOST);
            // It began here in a statement that got no answer, and that may have come through long after its connection was lost.
            let unknown: Vec<AttemptId> = unlocked
                .iter()
                .filter(|build| build.worker == self.shared.hello.name && !self.shared.in_hand.has(build.id))
                // Its claim under way may be the one that began it.
                .filter(|build| !self.claiming.contains_key(&build.builder))
                .map(|build| build.id)
                .collect();
            if !unknown.is_empty() && self.leaving != Some(Order::Leave) {
                self.adopt("is taken over: the database has it running here, and this daemon has not", |id| {
                    unknown.contains(&id)
                })
                .await?;
            }
            self.in_doubt = self.in_doubt.filter(|at| now < *at);
            let in_hand = &self.shared.in_hand;
            for lost in self.lost.ripe(unlocked, |id| in_hand.has(id)) {
                let shared = Arc::clone(&self.shared);
                self.tasks.spawn(async move { Finished::Recovery(lost.id, attempt::recover(&shared, &lost).await) });
            }
            if let Some(ripe) = self.lost.next() {
                // Not at once for one that was ripe and could not be taken.
                self.timers.lost = self.timers.lost.min(ripe.max(now + AFTER_FAILURE));
            }
        }
        if tend {
            self.not_accepting = short_of_disk(self.shared.folders.root(), self.shared.settings.min_free_disk);
        }
        let told = self.said_not_accepting == self.not_accepting.is_some() && !self.unready.has_news();
        if everything || control || !told {
            // Through another connection: its trouble is not this one's.
            match self.report_in().await {
                Ok(()) => {}
                // Its numbers do not go with those of this farm.
                Err(error) if !self.said_hello && error.is_bad_data() => return Err(error),
                Err(error) => tracing::warn!("{}", Chain(&error)),
            }
        }
        if now >= self.timers.settle {
            self.timers.settle = now + self.shared.settings.poll;
            self.settle_everything();
        }
        if everything || control || now >= self.scheduler.at {
            self.tend_schedules();
        }
        if everything || self.timers.blocked.is_some_and(|at| now >= at) {
            self.unblock();
        }
        Ok(())
    }

    /// Any wake may mean that a builder is idle again: its claim is tried, but not at the pace at which somebody sends wakes.
    pub(super) fn woken(&mut self) {
        let next = self.retrying.next();
        // None is blocked, or they are tried by then anyway.
        if self.timers.blocked.is_none_or(|at| at <= next) {
            return;
        }
        self.retrying.pass(u32::try_from(self.blocked.len()).unwrap_or(u32::MAX));
        if next <= Instant::now() {
            self.unblock();
        } else {
            self.timers.blocked = Some(next);
        }
    }

    /// Takes over those of the builds that run on this worker, by the database's word, which `are_left`. `how`: for the log.
    async fn adopt(&mut self, how: &str, are_left: impl Fn(AttemptId) -> bool) -> Result<(), DatabaseError> {
        let Some(watch) = &self.watch else { return Ok(()) };
        for mut job in watch.mine(&self.shared.hello).await? {
            job.dir = self.shared.folders.attempt(job.id);
            let executor = self.shared.executors.get(&job.executor);
            // Left alone for `grace`, as another worker's.
            if !are_left(job.id) || executor.is_some_and(|executor| executor.is_elsewhere(&job)) {
                continue;
            }
            let Some(hand) = self.shared.in_hand.take(job.id) else { continue };
            tracing::info!(build.id = %job.id.build, build.attempt = job.id.attempt, builder = job.builder,
                "build {} of {} {how}", job.id, job.builder);
            let (stop, shared) = (Stop::default(), Arc::clone(&self.shared));
            if self.leaving == Some(Order::Stop) {
                stop.give_back();
            }
            self.running.insert(job.id, Active { builder: job.builder.clone(), stop: stop.clone() });
            self.tasks.spawn(async move {
                let builder = job.builder.clone();
                Finished::Attempt(builder, adopt(&shared, job, hand, stop).await)
            });
        }
        self.shared.database.room_for_claims(self.running.len());
        Ok(())
    }

    async fn report_in(&mut self) -> Result<(), DatabaseError> {
        let state = if self.leaving.is_some() { "draining" } else { "active" };
        let hello = &self.shared.hello;
        let accepting = self.not_accepting.is_none();
        let detail = self.not_accepting.clone().unwrap_or_else(|| self.shared.executors.detail());
        let unready = self.unready.all();
        let heard = self.shared.database.hello(hello, state, Some(&detail), accepting, unready).await?;
        self.unready.reported();
        self.said_not_accepting = !accepting;
        self.others = heard.others;
        if heard.drain && self.leaving.is_none() {
            self.obey(Order::Drain);
        }
        let hello = &self.shared.hello;
        if !self.said_hello {
            self.said_hello = true;
            tracing::info!(
                worker = hello.name,
                slots = hello.slots,
                "worker {} is ready at {}",
                hello.name,
                self.shared.database.info().describe()
            );
            // As the last thing: whoever waits for this may enqueue now.
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                tracing::debug!(%error, "systemd was not told");
            }
        }
        Ok(())
    }
}
