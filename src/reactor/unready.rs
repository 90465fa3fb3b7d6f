//! Builders whose builds this worker cannot start now, and single builds.

use std::collections::BTreeMap;

use crate::model::BuildId;

/// The most builds that are told of; they are in the order of trying.
const MOST: usize = 100;

/// What could not be started at the last try, with the reason, for `workers.unready`: builders by name, builds as `#ID`.
#[derive(Debug, Default)]
pub struct Unready {
    why: BTreeMap<String, String>,
    news: bool,
}

impl Unready {
    /// Its builds cannot start. False: that was known, with this reason.
    pub fn insert(&mut self, builder: &str, why: String) -> bool {
        let new = self.why.insert(builder.to_owned(), why.clone()) != Some(why);
        self.news |= new;
        new
    }

    /// This build cannot start. False: that was known, with this reason, or it is one too many.
    pub fn insert_build(&mut self, build: BuildId, why: String) -> bool {
        let key = format!("#{build}");
        (self.why.contains_key(&key) || self.why.len() < MOST) && self.insert(&key, why)
    }

    /// This build has started, or need not be started any more.
    pub fn remove_build(&mut self, build: BuildId) {
        self.remove(&format!("#{build}"));
    }

    /// A build of it could be started, as far as its executor goes.
    pub fn remove(&mut self, builder: &str) {
        self.news |= self.why.remove(builder).is_some();
    }

    /// Forgets the builders of which nothing waits any more, and all builds but those that are still passed over.
    pub fn retain(&mut self, waits: impl Fn(&str) -> bool, aside: impl Fn(BuildId) -> bool) {
        let before = self.why.len();
        self.why.retain(|key, _| match key.strip_prefix('#') {
            Some(build) => build.parse().is_ok_and(|build| aside(BuildId(build))),
            None => waits(key),
        });
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
