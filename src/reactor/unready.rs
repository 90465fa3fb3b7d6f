//! Builders whose builds this worker cannot start now.

use std::collections::BTreeMap;

/// Builders whose executor was not ready at the last try, each with the reason, for `workers.unready`.
#[derive(Debug, Default)]
pub struct Unready {
    why: BTreeMap<String, String>,
    news: bool,
}

impl Unready {
    /// Its builds cannot start.
    pub fn insert(&mut self, builder: &str, why: String) {
        self.news |= self.why.insert(builder.to_owned(), why.clone()) != Some(why);
    }

    /// A build of it could be started, as far as its executor goes.
    pub fn remove(&mut self, builder: &str) {
        self.news |= self.why.remove(builder).is_some();
    }

    /// Forgets those of which nothing waits any more.
    pub fn retain(&mut self, waits: impl Fn(&str) -> bool) {
        let before = self.why.len();
        self.why.retain(|builder, _| waits(builder));
        self.news |= self.why.len() < before;
    }

    /// All of them, with the reasons.
    pub fn all(&self) -> &BTreeMap<String, String> {
        &self.why
    }

    /// Whether it has changed since it was reported.
    pub fn has_news(&self) -> bool {
        self.news
    }

    /// It has been reported.
    pub fn reported(&mut self) {
        self.news = false;
    }
}
