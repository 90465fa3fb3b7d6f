//! Everything, as plain lines: one for each change.

use std::collections::HashMap;
use std::io::Write;
use std::process::ExitCode;

use super::link::{Link, WhenAway};
use super::pause;
use super::tables::Farm;
use super::text::{Place, runs, verdict_of_recent, waits};
use crate::cli::output::{Stdout, note, stdout_is_closed};
use crate::config::Config;
use crate::model::BuildId;

/// As many finished builds as the view `recent_builds` has.
const ALL_RECENT: usize = 100;

/// Prints changes until stdout is closed.
///
/// # Errors
/// The database refuses us, or stdout is closed.
pub async fn watch(config: &Config) -> anyhow::Result<ExitCode> {
    let mut link = Link::open(config, WhenAway::Wait, note).await?;
    let mut changes = Changes::default();
    loop {
        let begun = tokio::time::Instant::now();
        let farm = Farm::look(&mut link, i64::try_from(ALL_RECENT)?).await?;
        for line in changes.since_last(&farm) {
            writeln!(Stdout, "{line}")?;
        }
        Stdout.flush()?;
        tokio::time::sleep(pause(begun.elapsed())).await;
        if stdout_is_closed() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// What was printed last.
#[derive(Default)]
struct Changes {
    builds: HashMap<BuildId, String>,
    workers: Option<Vec<(String, String)>>,
}

impl Changes {
    /// The lines that say what is new. At first: the workers, what waits and what runs; not what has finished before.
    fn since_last(&mut self, farm: &Farm) -> Vec<String> {
        let mut lines = Vec::new();
        let workers = farm.workers.iter().map(|worker| (worker.name.clone(), worker.status.clone())).collect();
        let first = self.workers.is_none();
        if self.workers.as_ref() != Some(&workers) {
            lines.push(farm.workers_line());
            self.workers = Some(workers);
        }
        let finished: Vec<(BuildId, String)> =
            farm.recent.iter().map(|recent| (recent.build, verdict_of_recent(recent))).collect();
        if first {
            self.builds.extend(finished.iter().cloned());
        } else if finished.len() >= ALL_RECENT && finished.iter().all(|(id, line)| self.builds.get(id) != Some(line)) {
            lines.push("more builds have finished than are shown here".to_owned());
        }
        let mut builds: HashMap<BuildId, String> = HashMap::new();
        let now = farm
            .waiting
            .rows
            .iter()
            .map(|waiting| (waiting.build, waits(waiting, Place::Hidden)))
            .chain(farm.running.rows.iter().map(|running| (running.build, runs(running))))
            .chain(finished.into_iter().rev());
        for (id, line) in now {
            let before = builds.get(&id).or_else(|| self.builds.get(&id));
            if before != Some(&line) {
                lines.push(line.clone());
            }
            builds.insert(id, line);
        }
        self.builds = builds;
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::reading::{Recent, Rows, Running, Waiting, Worker};

    fn waiting(id: i64, position: i64, because: &str) -> Waiting {
        Waiting {
            build: BuildId(id),
            builder: "linux".into(),
            position,
            waiting_seconds: Some(1.0),
            expected_seconds: None,
            because: because.into(),
        }
    }

    fn running(id: i64, elapsed_seconds: f64) -> Running {
        Running {
            build: BuildId(id),
            builder: "linux".into(),
            worker: "w1".into(),
            attempt: 1,
            elapsed_seconds,
            usual_seconds: Some(elapsed_seconds),
            last_log_line: None,
        }
    }

    fn passed(id: i64) -> Recent {
        Recent {
            build: BuildId(id),
            builder: "linux".into(),
            state: "passed".into(),
            attempt: 1,
            worker: Some("w1".into()),
            detail: None,
            ran_seconds: Some(2.0),
            ago_seconds: 1.0,
        }
    }

    #[test]
    fn each_change_is_one_line_and_what_stays_is_none() {
        let mut changes = Changes::default();
        let waiting_rows = vec![waiting(2, 1, "about to start"), waiting(3, 2, "its turn comes")];
        let mut farm = Farm {
            waiting: Rows { rows: waiting_rows, total: 2 },
            running: Rows { rows: Vec::new(), total: 0 },
            recent: vec![passed(1)],
            workers: vec![Worker { name: "w1".into(), status: "active".into(), running: 0, slots: 1 }],
        };
        assert_eq!(
            changes.since_last(&farm),
            ["workers: w1 0/1", "build 2 of linux waits: about to start", "build 3 of linux waits: its turn comes"]
        );
        assert_eq!(changes.since_last(&farm), Vec::<String>::new());
        farm.waiting.rows = vec![waiting(3, 1, "its turn comes")];
        farm.running.rows = vec![running(2, 1.0)];
        farm.workers[0].running = 1;
        assert_eq!(changes.since_last(&farm), ["build 2 of linux runs, attempt 1 on w1"]);
        farm.running.rows = vec![running(2, 2.0)];
        assert_eq!(changes.since_last(&farm), Vec::<String>::new());
        // The looks of one round are not of one moment.
        farm.recent.insert(0, passed(2));
        assert_eq!(changes.since_last(&farm), ["build 2 of linux passed in 2.0s"]);
        farm.running.rows.clear();
        assert_eq!(changes.since_last(&farm), Vec::<String>::new());
    }
}
