//! Sends what is in the outbox. Any number of daemons do: each mail is claimed, handed over outside of any transaction, and marked.
//! Nothing here is in the way of a build; with the mail server down, mails wait in their table.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::database::mail::{Claimed, Reach};
use crate::database::{Database, DatabaseError};
use crate::mail::{Failure, Letter, Mailer, clean_line};
use crate::report::{Chain, Trouble};

/// Between two looks: results that another daemon recorded, which rings no bell here.
const PERIOD: Duration = Duration::from_secs(5);
/// After the database refused something.
const AFTER_TROUBLE: Duration = Duration::from_secs(10);
/// After the mail server could not be reached: this, then twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Between the tries of one mail likewise, for two days (`build_mail.give_up_at`).
const FIRST_RETRY: Duration = Duration::from_secs(60);
const LONGEST_RETRY: Duration = Duration::from_secs(3600);

/// Carries mails.
pub struct Postman {
    /// Where the outbox is.
    pub database: Database,
    /// How they leave.
    pub mailer: Mailer,
    /// What is known of where it begins.
    pub reach: Reach,
    /// Who claims them: no other daemon calls itself so.
    pub name: String,
    /// Rung when this daemon has recorded a result.
    pub bell: Arc<Notify>,
    /// Cancelled when it is to stop after the mail at hand.
    pub stopping: CancellationToken,
}

impl Postman {
    /// Goes round until it is told to stop. A mail that it is dropped over is sent again, by whoever comes first after a while.
    pub async fn run(mut self) {
        tracing::info!("mail goes to {}", self.mailer.describe());
        let (mut trouble, mut pause, mut in_doubt) = (Trouble::default(), None, false);
        while !self.stopping.is_cancelled() {
            let round = async {
                if in_doubt {
                    self.database.mail_back(&self.name).await?;
                }
                self.round(&mut pause).await
            };
            let round = round.await;
            in_doubt = round.is_err();
            let wait = match round {
                Ok(wait) => {
                    trouble.is_over();
                    wait
                }
                Err(error) => {
                    let what = format!("cannot look after the mail: {}", Chain(&error));
                    if trouble.is_new() {
                        tracing::warn!("{what}; trying again until it works");
                    }
                    AFTER_TROUBLE
                }
            };
            self.mailer.rest().await;
            // While the server cannot be reached, no bell makes it be asked sooner.
            let at_once = pause.is_none();
            tokio::select! {
                () = self.bell.notified(), if at_once => {}
                () = tokio::time::sleep(wait) => {}
                () = self.stopping.cancelled() => {}
            }
        }
    }

    /// Sends all that is due. `pause`: how long the last one was, after which the mail server still could not be reached.
    async fn round(&mut self, pause: &mut Option<Duration>) -> Result<Duration, DatabaseError> {
        let limits = self.mailer.limits();
        while !self.stopping.is_cancelled() {
            let lease = self.mailer.longest();
            let Some(claimed) = self.database.claim_mail(&mut self.reach, &self.name, limits, lease).await? else {
                let due = self.database.mail_wait(&mut self.reach, PERIOD).await?;
                return Ok(due.map_or(PERIOD, |due| due.clamp(Duration::from_millis(50), PERIOD)));
            };
            if let Some(why) = self.carry(&claimed).await? {
                let longer = pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
                if pause.is_none() {
                    tracing::warn!("mail cannot be sent: {why}; trying again until it works, builds go on");
                }
                *pause = Some(longer);
                self.database.mail_give_up(&why).await?;
                return Ok(longer);
            }
            if pause.take().is_some() {
                tracing::info!("mail can be sent again");
            }
        }
        Ok(PERIOD)
    }

    /// Sends one mail and notes what became of it. Comes back with why the mail server could not be reached.
    async fn carry(&mut self, claimed: &Claimed) -> Result<Option<String>, DatabaseError> {
        let (ids, Some(first)) = (claimed.ids(), claimed.rows.first()) else { return Ok(None) };
        if !self.mailer.allows(&first.address) {
            let why = format!("`{}` is in none of [mail] domains", clean_line(&first.address, 300));
            self.database.mail_end(&ids, &self.name, "discarded", &why).await?;
            return Ok(None);
        }
        // The build is gone, and with it its mails.
        let Some(facts) = self.database.mail_facts(first.id).await? else { return Ok(None) };
        let letter = match self.mailer.write(claimed, facts) {
            Ok(letter) => letter,
            Err(error) => {
                tracing::warn!(mail.id = first.id, build.id = %first.build, "mail {} is parked: {error}", first.id);
                self.database.mail_end(&ids, &self.name, "parked", &clean_line(&error.to_string(), 1000)).await?;
                return Ok(None);
            }
        };
        match self.mailer.deliver(&letter).await {
            Ok(()) => {
                self.sent(claimed, &ids, &letter).await;
                Ok(None)
            }
            Err(Failure::Refused(why)) => {
                tracing::warn!(mail.id = first.id, build.id = %first.build, "mail {} is parked, the server refused it: {why}", first.id);
                self.database.mail_end(&ids, &self.name, "parked", &why).await?;
                Ok(None)
            }
            Err(failure @ (Failure::NotNow(_) | Failure::Unreachable(_))) => {
                let why = failure.words();
                let doublings = u32::try_from(first.tries - 1).unwrap_or(0).min(10);
                let wait = (FIRST_RETRY * 2_u32.pow(doublings)).min(LONGEST_RETRY);
                if self.database.mail_again(&ids, &self.name, why, wait).await? {
                    tracing::warn!(mail.id = first.id, build.id = %first.build, "mail {} is parked, its two days are over: {why}", first.id);
                }
                Ok(matches!(failure, Failure::Unreachable(_)).then(|| why.to_owned()))
            }
        }
    }

    /// The server has it: said to the database until that has heard, or it would be sent again.
    async fn sent(&self, claimed: &Claimed, ids: &[i64], letter: &Letter) {
        tracing::debug!(builds = claimed.rows.len(), "mail {} was sent", letter.id);
        let mut trouble = Trouble::default();
        while let Err(error) = self.database.mail_sent(ids).await {
            if trouble.is_new() {
                tracing::warn!("{}; saying it until it works", Chain(&error));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
