//! The connection of a command that goes on when the database has been away.

use std::time::Duration;

use crate::config::Config;
use crate::database::reading::Reader;
use crate::database::{ConnInfo, DatabaseError};
use crate::report::Chain;

/// Longest wait between two tries to connect: somebody is looking.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// What to do while the database is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenAway {
    /// Say so once, try again until it is back.
    Wait,
    /// End with the error.
    Fail,
}

/// A [`Reader`] that is replaced when its connection is lost.
pub struct Link {
    info: ConnInfo,
    reader: Option<Reader>,
    when_away: WhenAway,
    say: Box<dyn Fn(&str)>,
}

impl Link {
    /// Connects. `say`: where news of the connection go, a line each.
    ///
    /// # Errors
    /// No connection: the first one must succeed, so that a wrong host name is told at once.
    pub async fn open(config: &Config, when_away: WhenAway, say: impl Fn(&str) + 'static) -> anyhow::Result<Link> {
        let info = crate::cli::conninfo(config)?;
        let reader = Some(Reader::connect(&info).await?);
        Ok(Link { info, reader, when_away, say: Box::new(say) })
    }

    /// Runs `look` until the database answers.
    ///
    /// # Errors
    /// What trying again would not cure, or, with [`WhenAway::Fail`], any.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn ask<T>(&mut self, look: impl AsyncFn(&Reader) -> Result<T, DatabaseError>) -> anyhow::Result<T> {
        let mut delays = None;
        loop {
            let error = match self.try_once(&look).await {
                Ok(answer) => {
                    if delays.is_some() {
                        (self.say)("the database is back");
                    }
                    return Ok(answer);
                }
                Err(error) => error,
            };
            if self.when_away == WhenAway::Fail || !error.is_transient() {
                return Err(error.into());
            }
            let delays = delays.get_or_insert_with(|| {
                (self.say)(&format!("{}; trying again until it is back", Chain(&error)));
                backoff()
            });
            tokio::time::sleep(delays.next().unwrap_or(LONGEST_WAIT)).await;
        }
    }

    async fn try_once<T>(
        &mut self,
        look: &impl AsyncFn(&Reader) -> Result<T, DatabaseError>,
    ) -> Result<T, DatabaseError> {
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => Reader::connect(&self.info).await?,
        };
        // After an error nobody knows what state the connection is in, so it is not kept.
        let answer = look(&reader).await?;
        self.reader = Some(reader);
        Ok(answer)
    }
}

fn backoff() -> impl Iterator<Item = Duration> {
    use backon::BackoffBuilder;
    backon::ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(LONGEST_WAIT)
        .without_max_times()
        .with_jitter()
        .build()
}
