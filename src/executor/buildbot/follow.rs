//! An attempt's request, followed to its end: through builds that the master repeats, and through outages of the master.

use std::time::Duration;

use tokio::time::Instant;

use super::events::Bell;
use super::idle::Farm;
use super::master::MasterError;
use super::output::{Output, micros, page};
use super::request::{self, Token};
use super::rows::{BuildRow, Builds, RequestRow};
use crate::clock::boottime;
use crate::executor::{Tether, human};
use crate::model::{Ended, Job, Outcome, clean_line};
use crate::report::Trouble;

/// Between two looks at a request, while its first half minute lasts and later. Its end is told by an event; workers send output every 5 s.
const LOOK: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(5));
const FIRST: Duration = Duration::from_secs(30);

/// Between two tries to reach a master.
pub(super) const AGAIN: Duration = Duration::from_secs(1);

/// Between two calls to end a request: one that comes while a build is being set up may get lost.
const END_AGAIN: Duration = Duration::from_secs(5);

/// How long a master that answers may take to end a request.
const TO_END: Duration = Duration::from_secs(60);

/// How long it is asked to by somebody who may not.
const REFUSED_TO_END: Duration = Duration::from_secs(10);

/// How long the rest of the logs may hold up the result.
const LAST_LOGS: Duration = Duration::from_secs(30);

/// `results` of requests and builds that say what became of the build itself.
const SUCCESS: i64 = 0;
const WARNINGS: i64 = 1;
const FAILURE: i64 = 2;
const SKIPPED: i64 = 3;
pub(super) const EXCEPTION: i64 = 4;
const CANCELLED: i64 = 6;

/// What the master is told when it is to end a request, and says in the build's state: by us, or because of a limit of ours.
const OURS: &str = "stopped by buildreactor";
const OUR_LIMIT: &str = "stopped by buildreactor: ";

/// Why a request is not followed to an end of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The claim is lost: others may follow it now.
    LetGo,
    /// The attempt is to be stopped.
    Stop,
    /// It has taken, or been silent for, too long: how long.
    TimeOut(String),
}

/// An attempt on its master.
pub(super) struct Following<'a> {
    pub farm: &'a Farm,
    pub job: &'a Job,
    pub builder: &'a str,
    pub scheduler: &'a str,
    pub tether: Tether,
    pub output: Output,
    /// When its timeout is over.
    deadline: Instant,
    /// It may have been asked for more than once.
    pub doubt: bool,
    /// When something new was last heard of the build; `None`: it is not being built.
    heard: Option<Instant>,
    trouble: Trouble,
}

/// That a request is to be ended early.
struct Ending {
    order: Order,
    /// When the master was told last, heard or not.
    tried: Option<Instant>,
    /// When it heard it first.
    heard: Option<Instant>,
    /// What it said to that, where it was no.
    refused: Option<String>,
}

impl Ending {
    fn new(order: Order) -> Ending {
        Ending { order, tried: None, heard: None, refused: None }
    }
}

impl<'a> Following<'a> {
    pub fn new(
        farm: &'a Farm,
        job: &'a Job,
        (builder, scheduler): (&'a str, &'a str),
        tether: Tether,
        output: Output,
    ) -> Following<'a> {
        let deadline = Instant::now() + job.timeout.saturating_sub(job.age);
        let (doubt, heard, trouble) = (false, None, Trouble::default());
        Following { farm, job, builder, scheduler, tether, output, deadline, doubt, heard, trouble }
    }

    pub fn order(&self) -> Option<Order> {
        if self.tether.claim_lost.is_cancelled() || boottime() >= *self.tether.lease.borrow() {
            return Some(Order::LetGo);
        }
        if self.tether.stop.is_cancelled() {
            return Some(Order::Stop);
        }
        if Instant::now() >= self.deadline {
            return Some(Order::TimeOut(format!("ran longer than its timeout of {}", human(self.job.timeout))));
        }
        let silence = self.job.silence_timeout.filter(|limit| self.heard.is_some_and(|at| at.elapsed() >= *limit));
        silence.map(|limit| Order::TimeOut(format!("no output for {}", human(limit))))
    }

    /// Waits for `time`, or until an order to end may have come.
    pub async fn pause(&self, time: Duration) {
        let (stop, lost) = (&self.tether.stop, &self.tether.claim_lost);
        tokio::select! {
            () = stop.cancelled(), if !stop.is_cancelled() => {}
            () = lost.cancelled(), if !lost.is_cancelled() => {}
            () = tokio::time::sleep(time) => {}
        }
    }

    /// Says once an outage what is wrong.
    pub fn complain(&mut self, error: &MasterError) {
        if self.trouble.is_new() {
            let id = self.job.id;
            tracing::warn!(build.id = %id.build, build.attempt = id.attempt, "build {id} waits for its master: {error}");
        }
    }

    pub async fn follow(&mut self, request: u64) -> Ended {
        let bell = self.farm.events.bell(request);
        let (began, mut ending) = (Instant::now(), None::<Ending>);
        self.show(request, &[]);
        if !self.doubt {
            // The master has better things to do now than to be looked at.
            self.rest_until(LOOK.0, &bell).await;
        }
        loop {
            match self.order() {
                Some(Order::LetGo) => return let_go(),
                Some(order) if ending.is_none() => ending = Some(Ending::new(order)),
                Some(_) | None => {}
            }
            // First, because it may have ended by itself.
            match self.look(request, ending.as_ref().filter(|ending| ending.heard.is_some())).await {
                Ok(Some(ended)) => return ended,
                Ok(None) => {
                    self.trouble.is_over();
                    if let Some(ending) = &mut ending
                        && ending.tried.is_none_or(|at| at.elapsed() >= END_AGAIN)
                    {
                        self.end(request, ending).await;
                    }
                    let limit = |ending: &Ending| if ending.refused.is_some() { REFUSED_TO_END } else { TO_END };
                    if let Some(ending) = &ending
                        && ending.heard.is_some_and(|at| at.elapsed() >= limit(ending))
                    {
                        return self.not_ended(request, ending);
                    }
                }
                Err(error) => {
                    self.complain(&error);
                    // What it does meanwhile is not known.
                    self.heard = self.heard.map(|_| Instant::now());
                    if Instant::now() >= self.deadline {
                        let detail = format!("its timeout is over, and {error}; request {request} may go on there");
                        return Ended::without_process(Outcome::Lost, detail);
                    }
                    self.pause(AGAIN).await;
                    continue;
                }
            }
            let period = if self.output.has_more() {
                Duration::ZERO
            } else if ending.is_some() {
                AGAIN
            } else if began.elapsed() < FIRST {
                LOOK.0
            } else {
                LOOK.1
            };
            self.rest_until(period, &bell).await;
        }
    }

    /// Waits for `time`, the bell, the deadline, or an order.
    async fn rest_until(&self, time: Duration, bell: &Bell) {
        tokio::select! {
            () = self.pause(time.min(self.until_deadline())) => {}
            () = bell.rung.notified() => {}
        }
    }

    fn until_deadline(&self) -> Duration {
        // Once it is over others say when to look.
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { LOOK.0 } else { left }
    }

    async fn end(&mut self, request: u64, ending: &mut Ending) {
        let why = match &ending.order {
            Order::LetGo | Order::Stop => OURS.to_owned(),
            Order::TimeOut(text) => format!("{OUR_LIMIT}{text}"),
        };
        let answer = request::cancel(&self.farm.master, request, &why).await;
        let now = Instant::now();
        ending.tried = Some(now);
        match answer {
            Ok(()) => ending.refused = None,
            Err(error) if error.is_outage() => return self.complain(&error),
            Err(error) => ending.refused = Some(error.to_string()),
        }
        ending.heard.get_or_insert(now);
    }

    /// One look. `Some`: it has ended, and its log is here.
    async fn look(&mut self, request: u64, ending: Option<&Ending>) -> Result<Option<Ended>, MasterError> {
        let before = (self.output.bytes(), self.output.told());
        let builds = self.builds(request).await?;
        self.output.copy(&self.farm.master, &builds).await?;
        let news = self.show(request, &builds) || (self.output.bytes(), self.output.told()) != before;
        if let Some(last) = builds.last()
            && !last.complete
        {
            if news || self.heard.is_none() {
                self.heard = Some(Instant::now());
            }
            return Ok(None);
        }
        self.heard = None;
        let row = match request::read(&self.farm.master, request).await {
            Err(MasterError::NotFound(text)) => return Ok(Some(Ended::without_process(Outcome::Lost, text))),
            read => read?,
        };
        if !row.complete {
            return Ok(None);
        }
        let Some(builds) = self.rest(request, builds).await else { return Ok(Some(let_go())) };
        self.show(request, &builds);
        if self.doubt {
            self.end_others(request).await;
        }
        Ok(Some(verdict(&self.farm.master.name, &row, &builds, ending.map(|ending| &ending.order))))
    }

    async fn builds(&self, request: u64) -> Result<Vec<BuildRow>, MasterError> {
        let builds: Builds = self.farm.master.get(&format!("builds?buildrequestid={request}&order=buildid")).await?;
        Ok(builds.builds)
    }

    /// The builds of a request that is complete, with their logs copied, as far as that can be done in time; `seen` is what was known of
    /// them before. `None`: the claim was lost meanwhile.
    async fn rest(&mut self, request: u64, mut seen: Vec<BuildRow>) -> Option<Vec<BuildRow>> {
        let until = Instant::now() + LAST_LOGS;
        loop {
            // Again: one may have begun and ended between the two looks.
            let copied = async {
                seen = self.builds(request).await?;
                self.output.copy(&self.farm.master, &seen).await
            };
            match tokio::time::timeout_at(until, copied).await {
                Ok(Ok(true)) => return Some(seen),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(error)) => self.complain(&error),
            }
            if self.order() == Some(Order::LetGo) {
                return None;
            }
            if Instant::now() >= until {
                self.output.say("[the rest of the log is on the master]\n");
                return Some(seen);
            }
            if !self.output.has_more() {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// Passes on what is known. True: there is something new.
    fn show(&mut self, request: u64, builds: &[BuildRow]) -> bool {
        let master = &self.farm.master;
        let url =
            builds.last().map_or_else(|| master.page(&format!("buildrequests/{request}")), |build| page(master, build));
        let seen = self.output.seen(url);
        self.tether.seen.send_if_modified(|known| {
            let news = *known != seen;
            *known = seen;
            news
        })
    }

    /// Ends other requests for this build: when an answer got lost, one may have been asked for twice.
    async fn end_others(&mut self, request: u64) {
        match request::find(&self.farm.master, &Token::of(self.job)).await {
            Ok(asked) => {
                let id = self.job.id;
                let left = |asked: &request::Asked| {
                    asked.attempt <= id.attempt && asked.row.buildrequestid != request && !asked.row.complete
                };
                for other in asked.into_iter().filter(left) {
                    tracing::warn!(build.id = %id.build, build.attempt = id.attempt,
                        "master `{}` had been asked for build {id} twice; request {} is cancelled", self.farm.master.name, other.row.buildrequestid);
                    if let Err(error) =
                        request::cancel(&self.farm.master, other.row.buildrequestid, "asked for twice").await
                    {
                        self.complain(&error);
                    }
                }
            }
            Err(error) => self.complain(&error),
        }
    }

    fn not_ended(&self, request: u64, ending: &Ending) -> Ended {
        let name = &self.farm.master.name;
        let mut note = format!("master `{name}` has not ended request {request} within {} s", TO_END.as_secs());
        if let Some(refused) = &ending.refused {
            note = format!("request {request} goes on: {refused}");
        }
        match &ending.order {
            Order::TimeOut(text) => Ended::without_process(Outcome::TimedOut, format!("{text}; {note}")),
            Order::Stop | Order::LetGo => Ended::without_process(Outcome::Lost, note),
        }
    }
}

/// The attempt is over for this daemon; its request goes on, for the next attempt.
pub(super) fn let_go() -> Ended {
    Ended::without_process(Outcome::Lost, "its claim was not confirmed within the lease")
}

/// Whether a request that was left by a lost attempt still has an answer to give.
pub(super) fn has_answer(row: &RequestRow) -> bool {
    !row.complete || [SUCCESS, WARNINGS, FAILURE, EXCEPTION].contains(&row.results)
}

/// What a complete request comes to. The request's `results` count; the buildset's are 0 even for what was never built.
fn verdict(master: &str, request: &RequestRow, builds: &[BuildRow], order: Option<&Order>) -> Ended {
    let last = builds.last();
    let said = last.and_then(|build| build.state_string.as_deref()).map(|text| clean_line(text, 400));
    let said = said.filter(|text| !text.is_empty());
    let with = |text: &str| Some(said.as_ref().map_or_else(|| text.to_owned(), |said| format!("{text}: {said}")));
    let (outcome, detail) = match (request.results, order) {
        (SUCCESS, _) => (Outcome::Passed, said),
        (WARNINGS, _) => (Outcome::Passed, with("with warnings")),
        (FAILURE, _) => (Outcome::Failed, said),
        (SKIPPED, _) if builds.is_empty() => {
            let text = format!(
                "master `{master}` merged its request into a newer one and built nothing: set c['collapseRequests'] = False in master.cfg"
            );
            (Outcome::Error, Some(text))
        }
        (EXCEPTION, _) => (Outcome::Error, with("exception")),
        (CANCELLED, Some(Order::TimeOut(text))) => (Outcome::TimedOut, Some(text.clone())),
        (CANCELLED, Some(Order::Stop | Order::LetGo)) => (Outcome::Lost, Some("stopped".to_owned())),
        // By the daemon before this one, which had no time to record it.
        (CANCELLED, None) if let Some((_, limit)) = said.as_ref().and_then(|text| text.split_once(OUR_LIMIT)) => {
            (Outcome::TimedOut, Some(limit.trim_end_matches(')').to_owned()))
        }
        (CANCELLED, None) if said.as_ref().is_some_and(|text| text.contains(OURS)) => {
            (Outcome::GivenBack, Some("given back: its worker stopped".to_owned()))
        }
        // Whom a master that is shut down interrupts it does not repeat.
        (CANCELLED, None) if said.as_ref().is_some_and(|text| text.contains("Master Shutdown")) => {
            (Outcome::Error, Some(format!("master `{master}` was shut down while it ran")))
        }
        (CANCELLED, None) => (Outcome::Cancelled, with("cancelled in Buildbot")),
        (other, _) => (Outcome::Error, with(&format!("ended with results {other}"))),
    };
    let times = last.and_then(|build| Some((micros(build.started_at?), micros(build.complete_at?))));
    Ended { times, detail, ..Ended::without_process(outcome, "") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(results: i64) -> RequestRow {
        RequestRow { buildrequestid: 1, buildsetid: 1, complete: true, results }
    }

    fn build(state_string: &str) -> BuildRow {
        BuildRow {
            buildid: 1,
            builderid: 1,
            number: 1,
            workerid: None,
            complete: true,
            started_at: Some(10.0),
            complete_at: Some(12.0),
            state_string: Some(state_string.to_owned()),
        }
    }

    #[test]
    fn results_become_outcomes() {
        let time_out = Order::TimeOut("ran longer than its timeout of 1m".to_owned());
        let table = [
            (0, "build successful", None, Outcome::Passed, "build successful"),
            (1, "warnings x", None, Outcome::Passed, "with warnings: warnings x"),
            (2, "failed 'make'", None, Outcome::Failed, "failed 'make'"),
            (3, "skipped", None, Outcome::Error, "ended with results 3: skipped"),
            (4, "finished", None, Outcome::Error, "exception: finished"),
            (5, "lost connection", None, Outcome::Error, "ended with results 5: lost connection"),
            (6, "cancelled (bye)", None, Outcome::Cancelled, "cancelled in Buildbot: cancelled (bye)"),
            (6, "cancelled (stopped by buildreactor: no output for 3s)", None, Outcome::TimedOut, "no output for 3s"),
            (6, "cancelled (stopped by buildreactor)", None, Outcome::GivenBack, "given back: its worker stopped"),
            (6, "cancelled (Master Shutdown)", None, Outcome::Error, "master `m` was shut down while it ran"),
            (6, "cancelled", Some(&Order::Stop), Outcome::Lost, "stopped"),
            (6, "cancelled", Some(&time_out), Outcome::TimedOut, "ran longer than its timeout of 1m"),
            // It had ended before it could be stopped.
            (0, "build successful", Some(&Order::Stop), Outcome::Passed, "build successful"),
        ];
        for (results, said, order, outcome, detail) in table {
            let ended = verdict("m", &request(results), &[build(said)], order);
            assert_eq!((ended.outcome, ended.detail.as_deref()), (outcome, Some(detail)));
            assert_eq!(ended.times, Some((10_000_000, 12_000_000)));
        }
        let collapsed = verdict("m", &request(3), &[], None);
        assert!(
            collapsed.outcome == Outcome::Error
                && collapsed.detail.is_some_and(|text| text.contains("collapseRequests"))
        );
        assert_eq!(verdict("m", &request(6), &[], Some(&Order::Stop)).outcome, Outcome::Lost);
    }
}
