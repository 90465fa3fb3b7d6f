//! While the database is away.

use std::time::Duration;

use backon::BackoffBuilder;
use tokio::time::Instant;

use crate::database::DatabaseError;
use crate::report::Chain;

/// One line when the database goes away, one when its reason changes, one when it is back.
#[derive(Default)]
pub struct Outage {
    said: Option<String>,
    since: Option<Instant>,
}

impl Outage {
    /// No connection, because of `error`.
    pub fn failed(&mut self, error: &DatabaseError) {
        let text = Chain(error).to_string();
        self.since.get_or_insert_with(Instant::now);
        if self.said.as_ref() != Some(&text) {
            tracing::warn!("{text}; trying again until it works");
            self.said = Some(text);
        }
    }

    /// There is a connection.
    pub fn over(&mut self) {
        if let Some(since) = self.since.take() {
            tracing::info!("connected again after {:.1} s", since.elapsed().as_secs_f64());
        }
        self.said = None;
    }
}

/// First try after 0.2 s, then longer, up to 15 s, with jitter so that a farm does not come back all at once.
pub fn backoff() -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(15))
        .without_max_times()
        .with_jitter()
        .build()
}
