//! How an attempt comes to its request: asks for it, or finds the one that it, or the lost attempt before it, has asked for.

use std::cmp::Reverse;

use super::follow::{AGAIN, Following, Order, has_answer, let_go};
use super::master::MasterError;
use super::request::{self, Absent, Token};
use crate::executor::Begin;
use crate::model::{Ended, Outcome};

/// Why there is no request to follow.
pub(super) enum Unasked {
    /// The attempt ends.
    Ended(Ended),
    /// The builder can take no build from here, and why.
    Refused(String),
}

/// What earlier attempts have left on the master.
enum Earlier {
    /// This one's to follow.
    Request(u64),
    /// Others that are being ended.
    Ending,
    Nothing,
}

impl Following<'_> {
    /// The request of this attempt.
    pub(super) async fn obtain(&mut self, begin: Begin) -> Result<u64, Unasked> {
        let token = Token::of(self.job);
        if begin == Begin::Start && self.job.id.attempt == 1 {
            // Nobody can have asked before.
            return self.force(&token).await;
        }
        // What somebody asked for before may still be under way.
        self.doubt = true;
        let lost_before = self.job.adopt_from < self.job.id.attempt;
        let mut absent = Absent::default();
        loop {
            let order = self.order();
            // What is there has to be known before it can be stopped, or its result be recorded, however late.
            if begin == Begin::Start || order == Some(Order::LetGo) {
                self.unless_ordered(order.clone())?;
            }
            match self.earlier(&token, begin).await {
                Ok(Earlier::Request(request)) => return Ok(request),
                Ok(Earlier::Ending) => {
                    self.unless_ordered(order)?;
                    absent.interrupted();
                }
                Ok(Earlier::Nothing) => {
                    let believed = absent.again();
                    match begin {
                        Begin::Start if believed || !lost_before => return self.force(&token).await,
                        Begin::Adopt if believed => {
                            self.unless_ordered(order)?;
                            let detail = "given back: its master had not been asked for it";
                            return Err(Unasked::Ended(Ended::without_process(Outcome::GivenBack, detail)));
                        }
                        Begin::Start | Begin::Adopt => {}
                    }
                }
                Err(error) if error.is_outage() => {
                    self.complain(&error);
                    self.unless_ordered(order)?;
                    absent.interrupted();
                }
                Err(error) => return Err(Unasked::Refused(error.to_string())),
            }
            self.pause(AGAIN).await;
        }
    }

    /// Nothing has been asked for, or nobody will hear of it: what an order makes of the attempt.
    fn unless_ordered(&self, order: Option<Order>) -> Result<(), Unasked> {
        let ended = match order {
            None => return Ok(()),
            Some(Order::LetGo) => let_go(),
            Some(Order::Stop) => Ended::without_process(Outcome::Lost, "stopped"),
            Some(Order::TimeOut(_)) => Ended::without_process(
                Outcome::Lost,
                format!("master `{}` could not be asked for it within its timeout", self.farm.master.name),
            ),
        };
        Err(Unasked::Ended(ended))
    }

    async fn earlier(&mut self, token: &Token, begin: Begin) -> Result<Earlier, MasterError> {
        let asked = request::find(&self.farm.master, token).await?;
        let own = self.job.id.attempt;
        // This attempt's own is followed whatever it has come to meanwhile.
        let is_mine = |asked: &request::Asked| {
            (begin == Begin::Adopt && asked.attempt == own)
                || ((self.job.adopt_from..=own).contains(&asked.attempt) && has_answer(&asked.row))
        };
        let adopted = asked
            .iter()
            .filter(|asked| is_mine(asked))
            .max_by_key(|asked| (asked.attempt, Reverse(asked.row.buildsetid)))
            .map(|asked| asked.row.buildrequestid);
        let mut ending = false;
        let left = |asked: &&request::Asked| {
            asked.attempt <= own && !asked.row.complete && Some(asked.row.buildrequestid) != adopted
        };
        for other in asked.iter().filter(left) {
            ending = true;
            let why = format!("left by attempt {}.{}", self.job.id.build, other.attempt);
            match request::cancel(&self.farm.master, other.row.buildrequestid, &why).await {
                Ok(()) | Err(MasterError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(match adopted {
            Some(request) => Earlier::Request(request),
            None if ending => Earlier::Ending,
            None => Earlier::Nothing,
        })
    }

    /// Asks for a build, until it is known that there is one request.
    async fn force(&mut self, token: &Token) -> Result<u64, Unasked> {
        let broken = |detail: String| Unasked::Ended(Ended::without_process(Outcome::Error, detail));
        let given_back = |error: MasterError| {
            let detail = format!("given back: {error}");
            Unasked::Ended(Ended::without_process(Outcome::GivenBack, detail))
        };
        // Twice without a word of it: what it says is not about the connection.
        for last in [false, true] {
            let place = match self.farm.place(self.builder, self.scheduler).await {
                Ok(place) => place,
                Err(error) if error.is_outage() => return Err(given_back(error)),
                Err(error) => return Err(Unasked::Refused(error.to_string())),
            };
            let params = match request::parameters(self.job, self.builder, self.scheduler, &place, token) {
                Ok(params) => params,
                Err(_) => {
                    // What is known of the scheduler may be half a minute old.
                    self.farm.forget(self.builder, self.scheduler);
                    let Ok(place) = self.farm.place(self.builder, self.scheduler).await else { continue };
                    request::parameters(self.job, self.builder, self.scheduler, &place, token).map_err(broken)?
                }
            };
            let path = format!("forceschedulers/{}", super::idle::segment(self.scheduler));
            // As late as can be: whoever was stopped since the claim must not ask any more.
            let still = || self.order().is_none();
            let error = match self.farm.master.call_while(&path, "force", &params, &still).await {
                Ok(answer) => {
                    if let Some(request) = request::in_answer(&answer) {
                        return self.findable(request, token, &place.findable).await;
                    }
                    MasterError::Unreachable(format!("the answer is not known here: {answer}"))
                }
                Err(error @ MasterError::NotReached(_)) => {
                    self.unless_ordered(self.order())?;
                    return Err(given_back(error));
                }
                Err(error @ MasterError::Unreachable(_)) => error,
                Err(MasterError::Refused { message, values: true }) => return Err(broken(message)),
                Err(error) => {
                    self.farm.forget(self.builder, self.scheduler);
                    return Err(Unasked::Refused(error.to_string()));
                }
            };
            // Perhaps there is one.
            self.complain(&error);
            self.doubt = true;
            if let Some(request) = self.search(token).await? {
                return Ok(request);
            }
            if last {
                return Err(broken(format!("asked twice, and nothing came of it: {error}")));
            }
        }
        Err(broken(format!(
            "force scheduler `{}` of master `{}` could not be looked up",
            self.scheduler, self.farm.master.name
        )))
    }

    /// The request that a call of this attempt's has led to, once that is known. `None`: to none.
    async fn search(&mut self, token: &Token) -> Result<Option<u64>, Unasked> {
        let mut absent = Absent::default();
        loop {
            // Whoever is to stop has to know first what there is to be stopped.
            let order = self.order();
            if order == Some(Order::LetGo) {
                self.unless_ordered(order.clone())?;
            }
            match request::find(&self.farm.master, token).await {
                Ok(asked) => {
                    let own = asked.iter().find(|asked| asked.attempt == self.job.id.attempt);
                    if let Some(own) = own {
                        return Ok(Some(own.row.buildrequestid));
                    }
                    if absent.again() {
                        self.unless_ordered(self.order())?;
                        return Ok(None);
                    }
                }
                Err(error) => {
                    absent.interrupted();
                    self.complain(&error);
                    if matches!(order, Some(Order::TimeOut(_))) {
                        self.unless_ordered(order)?;
                    }
                }
            }
            self.pause(AGAIN).await;
        }
    }

    /// Looks once for each scheduler whether its requests can be found again, which is what everything here relies on.
    async fn findable(
        &mut self,
        request: u64,
        token: &Token,
        known: &std::sync::atomic::AtomicBool,
    ) -> Result<u64, Unasked> {
        use std::sync::atomic::Ordering;
        if known.load(Ordering::Relaxed) {
            return Ok(request);
        }
        match request::find(&self.farm.master, token).await {
            Ok(asked) if asked.iter().any(|asked| asked.row.buildrequestid == request) => {
                known.store(true, Ordering::Relaxed);
            }
            Ok(_) => {
                if let Err(error) = request::cancel(&self.farm.master, request, "it could not be found again").await {
                    self.complain(&error);
                }
                return Err(Unasked::Refused(format!(
                    "force scheduler `{}` of master `{}` drops the reason of a build: its reasonString must contain %(reason)s",
                    self.scheduler, self.farm.master.name
                )));
            }
            // Another time.
            Err(error) => self.complain(&error),
        }
        Ok(request)
    }
}
