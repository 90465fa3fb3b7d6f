//! Waiting builds that others have passed by: their needs have ended, somebody wants them cancelled, a newer build takes their place.

use std::sync::Arc;

use super::{Finished, Reactor};
use crate::database::DatabaseError;
use crate::model::{BuildId, Recorded};
use crate::report::Chain;

/// What is to be settled, and whether a task is at it. What comes meanwhile is for the next one.
#[derive(Default)]
pub(super) struct Settling {
    pub(super) under_way: bool,
    /// Builds that have ended and that others hang on.
    pub(super) ended: Vec<BuildId>,
    pub(super) everything: bool,
    /// Where the next look at everything begins in a deep queue.
    pub(super) from: Option<i64>,
}

impl Reactor {
    /// Settles all waiting builds that have to be.
    pub(super) fn settle_everything(&mut self) {
        self.settling.everything = true;
        self.settle();
    }

    /// Starts settling what there is to settle, unless a task is at it.
    pub(super) fn settle(&mut self) {
        let settling = &mut self.settling;
        if settling.under_way || (settling.ended.is_empty() && !settling.everything) {
            return;
        }
        settling.under_way = true;
        let (ended, everything) = (std::mem::take(&mut settling.ended), std::mem::take(&mut settling.everything));
        let mut from = settling.from;
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let result = shared.database.settle(&ended, everything, &mut from).await;
            Finished::Settled(result, from)
        });
    }

    /// What follows from a result that was recorded: of this build, and of those that hang on it.
    pub(super) fn follow(&mut self, build: BuildId, recorded: &Recorded) {
        self.plan_retry(recorded);
        if recorded.needed {
            self.settling.ended.push(build);
            self.settle();
        }
    }

    /// A task that settled has ended.
    pub(super) fn settled(&mut self, result: Result<bool, DatabaseError>, from: Option<i64>) {
        self.settling.from = from;
        self.settling.under_way = false;
        self.has_settled = true;
        match result {
            Ok(false) => {}
            // Released rows are seen by the look that follows; other workers have to be told.
            Ok(true) => self.wake_others(),
            Err(error) => tracing::warn!("{}", Chain(&error)),
        }
        self.settle();
    }
}
