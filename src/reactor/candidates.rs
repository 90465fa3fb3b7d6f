//! Rows that may be claimed, in memory, so that claiming stays flat however many rows wait and however many dead ones lie
//! about. A hint, never the truth: the lock on the row decides.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use tokio::time::Instant;

use crate::model::{BuildId, Candidate};

/// How many of each builder a look brings.
pub const EACH: usize = 200;
/// Above this the worst are forgotten; the next dry store brings them back.
const MOST: usize = 1000;

type Key = (Reverse<i32>, BuildId);

#[derive(Default)]
struct Line {
    order: BTreeSet<Key>,
    /// The table holds rows behind the last one here.
    more: bool,
}

/// Candidates by builder, in the order in which they are claimed: priority, then id.
#[derive(Default)]
pub struct Candidates {
    lines: HashMap<String, Line>,
    known: HashMap<BuildId, (String, i32)>,
    /// Builds that are passed over until then.
    aside: HashMap<BuildId, Instant>,
}

impl Candidates {
    /// Forgets everything, for `found`: what a look at the whole queue brought. A builder with [`EACH`] or more may have more.
    pub fn replace(&mut self, found: Vec<Candidate>) {
        self.lines.clear();
        self.known.clear();
        let now = Instant::now();
        self.aside.retain(|_, until| now < *until);
        for candidate in found {
            self.insert(candidate);
        }
        for line in self.lines.values_mut() {
            line.more = line.more || line.order.len() >= EACH;
        }
    }

    /// How many of each builder a look is to bring: some are passed over.
    pub fn wanted(&self) -> usize {
        EACH + self.aside.len()
    }

    /// Passes a build over until then; a look at everything after that brings it back.
    pub fn set_aside(&mut self, build: BuildId, until: Instant) {
        self.remove(build);
        self.aside.insert(build, until);
    }

    /// Adds what is new, or changed.
    pub fn add(&mut self, found: Vec<Candidate>) {
        for candidate in found {
            self.remove(candidate.build);
            // Whoever held it has let it go.
            self.aside.remove(&candidate.build);
            self.insert(candidate);
        }
    }

    /// The time after which every build that is set aside now may be tried again; `None`: no build is.
    pub fn aside_until(&self) -> Option<Instant> {
        self.aside.values().max().copied()
    }

    /// Whether a build is passed over.
    pub fn is_aside(&self, build: BuildId) -> bool {
        self.aside.contains_key(&build)
    }

    fn insert(&mut self, candidate: Candidate) {
        if self.aside.get(&candidate.build).is_some_and(|until| Instant::now() < *until) {
            return;
        }
        let key = (Reverse(candidate.priority), candidate.build);
        let line = self.lines.entry(candidate.builder.clone()).or_default();
        // Behind the last known with unknown ones between them: claiming it would be out of order.
        if line.more && line.order.last().is_none_or(|last| *last < key) {
            return;
        }
        line.order.insert(key);
        self.known.insert(candidate.build, (candidate.builder, candidate.priority));
        if line.order.len() > MOST
            && let Some((_, build)) = line.order.pop_last()
        {
            line.more = true;
            self.known.remove(&build);
        }
    }

    /// Forgets a build: claimed, or gone.
    pub fn remove(&mut self, build: BuildId) {
        if let Some((builder, priority)) = self.known.remove(&build)
            && let Some(line) = self.lines.get_mut(&builder)
        {
            line.order.remove(&(Reverse(priority), build));
        }
    }

    /// The first `n` of a builder.
    pub fn first(&self, builder: &str, n: usize) -> Vec<BuildId> {
        self.lines
            .get(builder)
            .map(|line| line.order.iter().take(n).map(|(_, build)| *build).collect())
            .unwrap_or_default()
    }

    /// Rank of a builder's first candidate: smaller goes first.
    pub fn rank(&self, builder: &str) -> Option<(Reverse<i32>, BuildId)> {
        self.lines.get(builder)?.order.first().copied()
    }

    /// Whether some builder has run dry here and not in the table.
    pub fn is_dry(&self) -> bool {
        self.lines.values().any(|line| line.more && line.order.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(build: i64, priority: i32) -> Candidate {
        Candidate { build: BuildId(build), builder: "b".into(), priority }
    }

    fn ids(candidates: &Candidates) -> Vec<i64> {
        candidates.first("b", 10_000).iter().map(|id| id.0).collect()
    }

    #[test]
    fn the_order_is_priority_then_id() {
        let mut candidates = Candidates::default();
        candidates.replace(vec![row(3, 0), row(1, 0), row(2, 5)]);
        assert_eq!(ids(&candidates), [2, 1, 3]);
        candidates.add(vec![row(3, 9)]);
        assert_eq!(ids(&candidates), [3, 2, 1], "a changed priority moves the row");
        candidates.remove(BuildId(2));
        assert_eq!(ids(&candidates), [3, 1]);
    }

    #[test]
    fn a_row_behind_unknown_ones_waits_for_the_next_look() {
        let mut candidates = Candidates::default();
        candidates.replace((0..EACH as i64).map(|n| row(n, 0)).collect());
        candidates.add(vec![row(5000, 0), row(5001, 1)]);
        assert_eq!(ids(&candidates).len(), EACH + 1);
        assert_eq!(ids(&candidates)[0], 5001);
        for n in 0..EACH as i64 {
            candidates.remove(BuildId(n));
        }
        candidates.remove(BuildId(5001));
        assert!(candidates.is_dry());
        candidates.replace(vec![row(5000, 0)]);
        assert!(!candidates.is_dry());
    }

    #[test]
    fn a_store_that_is_too_full_forgets_the_last() {
        let mut candidates = Candidates::default();
        candidates.replace(vec![]);
        candidates.add((0..MOST as i64 + 5).map(|n| row(n, 0)).collect());
        assert_eq!(ids(&candidates).len(), MOST);
        assert_eq!(ids(&candidates)[0], 0);
        assert!(candidates.known.len() == MOST);
    }
}
