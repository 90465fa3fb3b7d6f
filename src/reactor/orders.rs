//! What people and supervisors tell a running reactor.

use tokio::time::Instant;

use super::Reactor;

/// Orders to a running reactor, each going further than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// Claim nothing more; leave when what runs has ended.
    Drain,
    /// Claim nothing more, and leave soon; what runs goes on without this daemon.
    Leave,
    /// Claim nothing more; stop what runs, give it back, leave.
    Stop,
}

impl Reactor {
    /// Whether an order to leave has been carried out.
    pub(super) fn is_done(&self) -> bool {
        // An attempt that has begun without an answer is this daemon's to give back, or the next one's.
        let in_doubt =
            self.in_doubt.is_some() && self.leaving != Some(Order::Leave) && !self.shared.giving_up.is_cancelled();
        self.leaving.is_some() && self.tasks.is_empty() && !in_doubt
    }

    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Drain => {
                tracing::info!(running = self.running.len(), "claiming nothing more; leaving when what runs has ended")
            }
            Order::Leave => {
                tracing::info!(
                    running = self.running.len(),
                    "leaving; what runs goes on, for the next start of this worker"
                )
            }
            Order::Stop => {
                tracing::info!(running = self.running.len(), "stopping; what runs is given back to the queue")
            }
        }
        // An order only goes further than the one before.
        self.leaving = self.leaving.max(Some(order));
        if order == Order::Stop {
            self.stop_all();
        }
        // Shows as draining in worker_status.
        self.timers.everything = Instant::now();
    }

    pub(super) fn stop_all(&mut self) {
        self.shared.giving_back.cancel();
        for active in self.running.values() {
            active.stop.give_back();
        }
    }
}
