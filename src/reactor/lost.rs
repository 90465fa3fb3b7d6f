//! Running builds that nobody holds: left to their owner for `grace`, then taken as lost.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::executor::Folders;
use crate::model::{AttemptId, Unlocked};

/// When each unlocked attempt was first seen so, over one healthy connection.
pub struct Lost {
    grace: Duration,
    worker: String,
    folders: Folders,
    first_seen: HashMap<AttemptId, Instant>,
    in_hand: Vec<AttemptId>,
}

impl Lost {
    /// For this worker.
    pub fn new(grace: Duration, worker: String, folders: Folders) -> Lost {
        Lost { grace, worker, folders, first_seen: HashMap::new(), in_hand: Vec::new() }
    }

    /// After a lost connection the waiting starts anew: what was not seen unlocked may have been held.
    pub fn forget(&mut self) {
        self.first_seen.clear();
    }

    /// The one is dealt with, or has to be tried again.
    pub fn done(&mut self, id: AttemptId) {
        self.in_hand.retain(|known| *known != id);
    }

    /// Takes a look's result; comes back with those whose time is over, and their worker. `mine`: attempts that this daemon
    /// runs itself.
    pub fn ripe(&mut self, unlocked: Vec<Unlocked>, mine: impl Fn(AttemptId) -> bool) -> Vec<(AttemptId, String)> {
        let now = Instant::now();
        self.first_seen.retain(|id, _| unlocked.iter().any(|seen| seen.id == *id));
        let mut ripe = Vec::new();
        for Unlocked { id, worker, .. } in unlocked {
            if mine(id) || self.in_hand.contains(&id) {
                continue;
            }
            let since = *self.first_seen.entry(id).or_insert(now);
            // An earlier daemon of this name and folder: the keeper's lock, which we waited for at the start, has shown
            // that every process of it is gone. Without the attempt's folder it ran elsewhere, under the same name.
            let left_by_us = worker == self.worker && self.folders.attempt(id).exists();
            if left_by_us || now.duration_since(since) >= self.grace {
                self.in_hand.push(id);
                ripe.push((id, worker));
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
        let mut lost =
            Lost::new(Duration::from_secs(60), "me".into(), Folders::new(std::path::Path::new("/nonexistent"), "me"));
        let id = AttemptId { build: BuildId(1), attempt: 1 };
        let seen = || vec![Unlocked { id, worker: "other".into(), builder: "b".into(), slot: 1 }];
        assert!(lost.ripe(seen(), |_| false).is_empty());
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(lost.ripe(seen(), |_| false).is_empty());
        assert!(lost.ripe(vec![], |_| false).is_empty(), "it was held in between");
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(lost.ripe(seen(), |_| false).is_empty());
        lost.forget();
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(lost.ripe(seen(), |_| false).is_empty());
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(lost.ripe(seen(), |_| false), vec![(id, "other".to_owned())]);
        assert!(lost.ripe(seen(), |_| false).is_empty(), "it is in hand");
        lost.done(id);
        assert!(lost.ripe(seen(), |_| true).is_empty(), "it is our own");
    }
}
