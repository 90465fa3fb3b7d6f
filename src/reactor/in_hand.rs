//! Attempts that this daemon has anything to do with, from their beginning until nothing is done in their folders any more. By number
//! alone: a server that takes over without the last commits gives a number again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::AttemptId;

/// All of them.
#[derive(Clone, Default)]
pub struct InHand(Arc<Mutex<HashSet<AttemptId>>>);

/// One of them, until dropped.
pub struct Hand {
    all: InHand,
    id: AttemptId,
}

impl InHand {
    /// `None`: one of this number is.
    pub fn take(&self, id: AttemptId) -> Option<Hand> {
        self.lock().insert(id).then(|| Hand { all: self.clone(), id })
    }

    /// Whether one of this number is.
    pub fn has(&self, id: AttemptId) -> bool {
        self.lock().contains(&id)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<AttemptId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.all.lock().remove(&self.id);
    }
}
