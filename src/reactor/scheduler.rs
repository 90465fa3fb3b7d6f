//! Queues the builds of `build_schedules`. Every daemon does; a row lock and the time that was seen decide which of them queues
//! the build of a tick, so each tick comes once. Level-triggered like the rest (invariant 4): rows are looked at with
//! everything, after news on `build_control`, and when the earliest is due, by the server's clock.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::schedule::next;
use super::{AFTER_FAILURE, Finished, Reactor};
use crate::database::schedules::Schedule;
use crate::database::{Database, DatabaseError};
use crate::model::BuildId;
use crate::report::Chain;

/// At most so many schedules at once; more are looked at directly afterwards.
const MOST: i64 = 100;
/// After the database refused something.
const AFTER_TROUBLE: Duration = Duration::from_secs(10);

/// When schedules are looked at next, and whether a task does so now.
pub(super) struct Scheduler {
    pub(super) at: Instant,
    under_way: bool,
    /// There was a reason to look since the task under way began.
    again: bool,
}

impl Scheduler {
    pub(super) fn new(now: Instant) -> Scheduler {
        Scheduler { at: now, under_way: false, again: false }
    }
}

/// What came of a look at the schedules.
pub(super) struct Tended {
    /// Builds queued.
    fired: usize,
    /// Until the next look. `None`: nothing is planned.
    wait: Option<Duration>,
}

impl Reactor {
    /// Starts a look at the schedules, or has another done after the one under way.
    pub(super) fn tend_schedules(&mut self) {
        // Until the task says better. Also while leaving: others do it, or the next start.
        self.scheduler.at = Instant::now() + self.shared.settings.poll;
        if self.leaving.is_some() {
            return;
        }
        if self.scheduler.under_way {
            self.scheduler.again = true;
            return;
        }
        self.scheduler.under_way = true;
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move { Finished::Schedules(tend(&shared.database).await) });
    }

    pub(super) fn schedules_tended(&mut self, result: Result<Tended, DatabaseError>) {
        self.scheduler.under_way = false;
        let now = Instant::now();
        let wait = match result {
            Ok(tended) => {
                // The look that follows finds the new rows; this session's INSERT has woken nobody else.
                if tended.fired > 0 {
                    self.wake_others();
                }
                tended.wait
            }
            Err(error) => {
                tracing::warn!("{}", Chain(&error));
                // Builds may have been queued before it, or by a COMMIT whose answer is what was lost.
                self.wake_others();
                Some(AFTER_TROUBLE)
            }
        };
        // A wait beyond the poll comes around by itself.
        self.scheduler.at = now + wait.unwrap_or(Duration::MAX).min(self.shared.settings.poll);
        if std::mem::take(&mut self.scheduler.again) {
            self.tend_schedules();
        }
    }
}

/// Plans what is to be planned and queues what is due, till nothing is left.
async fn tend(database: &Database) -> Result<Tended, DatabaseError> {
    let mut fired = 0;
    // Schedules that could not be moved, and when to try again: the others are not to wait for them.
    let mut aside: Vec<String> = Vec::new();
    let mut again: Option<Duration> = None;
    loop {
        let schedules = database.schedules_due(&aside, MOST).await?;
        for schedule in &schedules {
            let name = &schedule.name;
            let within = match act(database, schedule).await {
                Ok(Acted::Fired(build)) => {
                    tracing::info!(build.id = %build, schedule = name, "schedule {name} has queued build {build}");
                    fired += 1;
                    continue;
                }
                Ok(Acted::Moved) => continue,
                // Another daemon is at it. Should that one die, the row is free again.
                Ok(Acted::Left) => AFTER_FAILURE,
                // The server's answer to this one, such as a trigger of somebody's own on builds.
                Err(error) if error.sqlstate().is_some() && !error.is_transient() => {
                    tracing::warn!(schedule = name, "schedule {name}: {}", Chain(&error));
                    AFTER_TROUBLE
                }
                Err(error) => return Err(error),
            };
            aside.push(name.clone());
            again = Some(again.map_or(within, |again| again.min(within)));
        }
        if (schedules.len() as i64) < MOST {
            break;
        }
    }
    let wait = database.schedule_wait(&aside).await?;
    Ok(Tended { fired, wait: wait.into_iter().chain(again).min() })
}

/// What was done about a schedule.
enum Acted {
    /// Its build was queued.
    Fired(BuildId),
    /// It was planned, or disabled.
    Moved,
    /// Nothing: it has changed since it was read.
    Left,
}

async fn act(database: &Database, schedule: &Schedule) -> Result<Acted, DatabaseError> {
    let why = match next(&schedule.cron, &schedule.time_zone, schedule.now) {
        Ok(Some(next)) => match schedule.due {
            Some(due) => {
                return Ok(database.fire_schedule(schedule, due, next).await?.map_or(Acted::Left, Acted::Fired));
            }
            None => {
                let planned = database.plan_schedule(schedule, next).await?;
                return Ok(if planned { Acted::Moved } else { Acted::Left });
            }
        },
        Ok(None) => format!("cron `{}` never comes", schedule.cron),
        Err(why) => why,
    };
    let name = &schedule.name;
    if !database.refuse_schedule(schedule, &why).await? {
        return Ok(Acted::Left);
    }
    tracing::warn!(schedule = name, "schedule {name} is disabled: {why}");
    Ok(Acted::Moved)
}
