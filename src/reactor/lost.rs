//! Running builds that nobody holds: left to their owner until no process of theirs can be left, then taken as lost.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::{AttemptId, UNKNOWN_LEASE, Unlocked};

/// When each unlocked attempt was first seen so, over one healthy connection.
pub struct Lost {
    lease: Duration,
    grace: Duration,
    /// By attempt and the number of its claims: one that was claimed again meanwhile is another, and may live by another lease.
    first_seen: HashMap<(AttemptId, i32), Seen>,
    looked: Option<Instant>,
    in_hand: Vec<AttemptId>,
}

struct Seen {
    since: Instant,
    /// How long it is left alone from then on.
    patience: Duration,
}

impl Lost {
    /// For a worker that gives its own processes `lease`, and leaves those that live by the same alone for `grace`.
    pub fn new(lease: Duration, grace: Duration) -> Lost {
        Lost { lease, grace, first_seen: HashMap::new(), looked: None, in_hand: Vec::new() }
    }

    /// How long an attempt is left alone whose processes live by `lease` (invariant 6): they are dead at the latest `KILL_TIME` after it.
    /// What `grace` has beyond that of our own lease is kept for theirs; with a shorter one they have all of `grace` all the same.
    fn patience(&self, lease: Option<Duration>) -> Duration {
        self.grace + lease.unwrap_or(UNKNOWN_LEASE).saturating_sub(self.lease)
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
        waiting.map(|(_, seen)| seen.since + seen.patience).min()
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
        for lost in unlocked {
            if mine(lost.id) || self.in_hand.contains(&lost.id) {
                continue;
            }
            let patience = self.patience(lost.lease);
            let seen = self.first_seen.entry((lost.id, lost.claims)).or_insert(Seen { since: now, patience });
            // A person may have written the lease that was not known.
            seen.patience = patience;
            if now.duration_since(seen.since) >= patience {
                self.in_hand.push(lost.id);
                ripe.push(lost);
            }
        }
        ripe
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BuildId;

    fn unlocked(build: i64, claims: i32, lease: Option<u64>) -> Unlocked {
        let id = AttemptId { build: BuildId(build), attempt: 1 };
        let lease = lease.map(Duration::from_secs);
        Unlocked { id, worker: "other".into(), builder: "b".into(), slot: 1, claims, lease, held: false }
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_is_left_alone_for_its_own_lease_and_never_for_less_than_grace() {
        // Our lease and grace, its lease, and the seconds for which it is left alone.
        for (lease, grace, its, left) in [
            (40, 60, Some(150), 170),
            (40, 60, Some(41), 61),
            (40, 60, Some(40), 60),
            (40, 60, Some(3), 60),
            (150, 200, Some(40), 200),
            (3, 13, Some(86_400), 86_410),
            (3, 13, None, 50),
            (150, 200, None, 200),
        ] {
            let (seconds, case) = (Duration::from_secs, (lease, grace, its));
            let mut lost = Lost::new(seconds(lease), seconds(grace));
            let began = Instant::now();
            while lost.ripe(vec![unlocked(1, 1, its)], |_| false).is_empty() {
                assert_eq!(lost.next(), Some(began + seconds(left)), "{case:?}");
                tokio::time::advance(seconds(1)).await;
            }
            assert_eq!(began.elapsed(), seconds(left), "{case:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_of_several_has_its_own_time_and_one_that_was_claimed_again_its_new_lease() {
        let mut lost = Lost::new(Duration::from_secs(3), Duration::from_secs(13));
        let began = Instant::now();
        let mut found = Vec::new();
        while found.len() < 3 {
            let second = if began.elapsed() < Duration::from_secs(10) { (1, 3) } else { (2, 33) };
            let seen = [unlocked(1, 1, Some(8)), unlocked(2, second.0, Some(second.1)), unlocked(3, 1, Some(1))];
            for ripe in lost.ripe(seen.to_vec(), |_| false) {
                found.push((ripe.id.build.0, began.elapsed().as_secs()));
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(found, [(3, 13), (1, 18), (2, 53)]);
    }

    #[tokio::test(start_paused = true)]
    async fn others_are_left_alone_for_grace_counted_without_a_break() {
        let mut lost = Lost::new(Duration::from_secs(40), Duration::from_secs(60));
        let id = AttemptId { build: BuildId(1), attempt: 1 };
        let held = |claims| vec![unlocked(1, claims, Some(40))];
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
