//! Running builds that nobody holds: left to their owner for `grace`, then taken as lost.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::{AttemptId, Unlocked};

/// When each unlocked attempt was first seen so, over one healthy connection.
pub struct Lost {
    grace: Duration,
    /// By attempt and the number of its claims: one that was claimed again meanwhile is another.
    first_seen: HashMap<(AttemptId, i32), Instant>,
    looked: Option<Instant>,
    in_hand: Vec<AttemptId>,
}

impl Lost {
    /// For this worker.
    pub fn new(grace: Duration) -> Lost {
        Lost { grace, first_seen: HashMap::new(), looked: None, in_hand: Vec::new() }
    }

    /// After a lost connection the waiting starts anew: what was not seen unlocked may have been held.
    pub fn forget(&mut self) {
        self.first_seen.clear();
    }

    /// The one is dealt with, or has to be tried again.
    pub fn done(&mut self, id: AttemptId) {
        self.in_hand.retain(|known| *known != id);
    }

    /// When the next one's time will be over.
    pub fn next(&self) -> Option<Instant> {
        let waiting = self.first_seen.iter().filter(|((id, _), _)| !self.in_hand.contains(id));
        waiting.map(|(_, since)| *since + self.grace).min()
    }

    /// Takes a look's result; comes back with those whose time is over. `mine`: attempts that this daemon runs itself.
    pub fn ripe(&mut self, unlocked: Vec<Unlocked>, mine: impl Fn(AttemptId) -> bool) -> Vec<Unlocked> {
        let now = Instant::now();
        // A daemon that was stopped has not seen what happened meanwhile.
        if self.looked.is_some_and(|looked| now.duration_since(looked) > self.grace / 2) {
            self.first_seen.clear();
        }
        self.looked = Some(now);
        self.first_seen.retain(|key, _| unlocked.iter().any(|seen| (seen.id, seen.claims) == *key));
        let mut ripe = Vec::new();
        for seen in unlocked {
            if mine(seen.id) || self.in_hand.contains(&seen.id) {
                continue;
            }
            let since = *self.first_seen.entry((seen.id, seen.claims)).or_insert(now);
            if now.duration_since(since) >= self.grace {
                self.in_hand.push(seen.id);
                ripe.push(seen);
            }
        }
        ripe
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BuildId;

    #[tokio::test(start_paused = true)]
    async fn others_are_left_alone_for_grace_counted_without_a_break() {
        let mut lost = Lost::new(Duration::from_secs(60));
        let id = AttemptId { build: BuildId(1), attempt: 1 };
        let held = |claims| vec![Unlocked { id, worker: "other".into(), builder: "b".into(), slot: 1, claims }];
        let seen = || held(1);
        assert!(lost.ripe(seen(), |_| false).is_empty());
        // Looks come often; after a long gap it is as if it had never been seen.
        let later = async |lost: &mut Lost, seconds: u64, claims| {
            for _ in 1..seconds {
                tokio::time::advance(Duration::from_secs(1)).await;
                assert!(lost.ripe(held(claims), |_| false).is_empty());
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        };
        later(&mut lost, 59, 1).await;
        assert!(lost.ripe(seen(), |_| false).is_empty());
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(lost.ripe(seen(), |_| false).is_empty(), "nobody looked for an hour");
        later(&mut lost, 59, 1).await;
        assert!(lost.ripe(vec![], |_| false).is_empty(), "it was held in between");
        assert!(lost.ripe(seen(), |_| false).is_empty());
        lost.forget();
        later(&mut lost, 60, 1).await;
        assert!(lost.ripe(held(2), |_| false).is_empty(), "it was claimed again in between");
        later(&mut lost, 60, 2).await;
        assert_eq!(lost.ripe(held(2), |_| false), held(2));
        assert!(lost.ripe(held(2), |_| false).is_empty(), "it is in hand");
        lost.done(id);
        assert!(lost.ripe(seen(), |_| true).is_empty(), "it is our own");
    }
}
