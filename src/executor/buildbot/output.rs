//! What a master knows of the inside of a request: its steps, and their logs, copied into the attempt's log file in one order that does not
//! depend on when it was looked at. So the daemon that takes an attempt over writes the same file again.

use super::master::{Master, MasterError};
use super::rows::{BuildRow, Chunks, LogRow, Logs, StepRow, Steps, Workers};
use crate::logs::file::OutputWriter;
use crate::model::{Seen, Step, clean_line};

/// Lines in one look at a log; the master cuts lines at 4 KiB.
const LINES: u64 = 2000;

/// Looks at logs in one call; then others are heard.
const LOOKS: u32 = 20;

/// The logs of one request on their way into a file.
pub struct Output {
    writer: OutputWriter,
    bytes: u64,
    /// How many builds, steps of the next build and logs of the next step are copied whole, and lines of the next log.
    builds: usize,
    steps: usize,
    logs: usize,
    lines: u64,
    /// The heading of the build, or of the step, is written.
    build_named: bool,
    step_named: bool,
    /// Steps of each build, as last read.
    known: Vec<Vec<StepRow>>,
    /// Who builds the last build.
    worker: Option<String>,
    /// Lines that the logs of the next step have, copied or not.
    told: u64,
    /// Looks left in this call.
    looks: u32,
}

impl Output {
    /// Into the log file that `writer` has created.
    pub fn new(writer: OutputWriter) -> Output {
        Output {
            writer,
            bytes: 0,
            builds: 0,
            steps: 0,
            logs: 0,
            lines: 0,
            build_named: false,
            step_named: false,
            known: Vec::new(),
            worker: None,
            told: 0,
            looks: LOOKS,
        }
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A number that changes when a log has grown, although it may not be its turn to be copied.
    pub fn told(&self) -> u64 {
        self.told
    }

    /// Whether the last call broke off with more to copy.
    pub fn has_more(&self) -> bool {
        self.looks == 0
    }

    /// Adds what does not come from the master.
    pub fn say(&mut self, text: &str) {
        self.bytes += text.len() as u64;
        self.writer.write(text.as_bytes());
    }

    /// Closes the file. The first error that kept something out of it.
    pub fn end(self) -> Option<String> {
        self.writer.end().1
    }

    /// Copies what is there of `builds`, all of one request, in order. True: all of it is copied. A lot is copied in several calls.
    ///
    /// # Errors
    /// The master does not answer; the next call goes on.
    pub async fn copy(&mut self, master: &Master, builds: &[BuildRow]) -> Result<bool, MasterError> {
        self.looks = LOOKS;
        while let Some(build) = builds.get(self.builds) {
            if !self.build_named {
                self.name_build(master, build).await?;
            }
            let steps: Steps = master.get(&format!("builds/{}/steps", build.buildid)).await?;
            let steps = steps.steps;
            self.known.truncate(self.builds);
            self.known.push(steps.clone());
            while let Some(step) = steps.get(self.steps) {
                // Of a build that a crash of the master broke off nothing comes any more, whatever its steps say.
                let over = step.complete || build.complete;
                if step.started_at.is_none() && !over {
                    return Ok(false);
                }
                if !self.copy_step(master, step, build.complete).await? || !over {
                    return Ok(false);
                }
                (self.steps, self.logs, self.lines, self.step_named) = (self.steps + 1, 0, 0, false);
            }
            if !build.complete {
                return Ok(false);
            }
            (self.builds, self.steps, self.build_named) = (self.builds + 1, 0, false);
        }
        Ok(true)
    }

    async fn name_build(&mut self, master: &Master, build: &BuildRow) -> Result<(), MasterError> {
        self.worker = match build.workerid {
            Some(id) => {
                master.get::<Workers>(&format!("workers/{id}")).await?.workers.into_iter().next().map(|row| row.name)
            }
            None => None,
        };
        let worker = self.worker.as_deref().map_or_else(String::new, |name| format!(" on {name}"));
        self.say(&format!("[build {}{worker}: {}]\n", build.number, page(master, build)));
        self.build_named = true;
        Ok(())
    }

    /// False: more may come.
    async fn copy_step(&mut self, master: &Master, step: &StepRow, over: bool) -> Result<bool, MasterError> {
        let logs: Logs = master.get(&format!("steps/{}/logs", step.stepid)).await?;
        self.told = logs.logs.iter().map(|log| log.num_lines).sum();
        while let Some(log) = logs.logs.get(self.logs) {
            self.copy_log(master, step, log).await?;
            if self.looks == 0 || (!log.complete && !over) {
                return Ok(false);
            }
            (self.logs, self.lines) = (self.logs + 1, 0);
        }
        Ok(true)
    }

    async fn copy_log(&mut self, master: &Master, step: &StepRow, log: &LogRow) -> Result<(), MasterError> {
        if log.kind == "h" {
            if self.lines == 0 && log.num_lines > 0 {
                self.name_step(step);
                self.say(&format!("[its log `{}` is a web page: see there]\n", clean_line(&log.name, 100)));
                self.lines = log.num_lines;
            }
            return Ok(());
        }
        while self.lines < log.num_lines && self.looks > 0 {
            self.looks -= 1;
            let from = self.lines;
            let chunks: Chunks =
                master.get(&format!("logs/{}/contents?offset={from}&limit={LINES}", log.logid)).await?;
            let text: String = chunks.logchunks.into_iter().map(|chunk| chunk.content).collect();
            let lines = text.lines().count() as u64;
            if lines == 0 {
                break;
            }
            let shown = shown(&text, log.kind == "s");
            if !shown.is_empty() {
                self.name_step(step);
                self.say(&shown);
            }
            self.lines += lines;
        }
        Ok(())
    }

    fn name_step(&mut self, step: &StepRow) {
        if !self.step_named {
            self.step_named = true;
            self.say(&format!("[step {}: {}]\n", step.number, clean_line(&step.name, 100)));
        }
    }

    /// What is known of the request, for the database.
    pub fn seen(&self, url: String) -> Seen {
        let rows = self.known.iter().flatten();
        let steps = rows.zip(1..).map(|(row, position)| Step {
            position,
            name: clean_line(&row.name, 200),
            state: state(row),
            started_us: row.started_at.map(micros),
            finished_us: row.complete_at.map(micros),
            detail: row.state_string.as_deref().map(|text| clean_line(text, 500)).filter(|text| !text.is_empty()),
        });
        Seen { url: Some(url), worker: self.worker.clone(), steps: steps.collect() }
    }
}

/// Where the master shows a build.
pub fn page(master: &Master, build: &BuildRow) -> String {
    master.page(&format!("builders/{}/builds/{}", build.builderid, build.number))
}

/// Microseconds of the master's seconds.
pub fn micros(seconds: f64) -> i64 {
    #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
    let whole = (seconds * 1e6) as i64;
    whole
}

/// Without the master's own lines, which hold the worker's whole environment: in a log of stdout and stderr each line begins with what it
/// is.
fn shown(text: &str, marked: bool) -> String {
    if !marked {
        return text.to_owned();
    }
    text.split_inclusive('\n').filter_map(|line| line.strip_prefix(['o', 'e'])).collect()
}

fn state(step: &StepRow) -> &'static str {
    match step.results {
        None if step.complete => "error",
        None => "running",
        Some(0) => "passed",
        Some(1) => "warnings",
        Some(2) => "failed",
        Some(3) => "skipped",
        Some(4) => "error",
        Some(5) => "lost",
        Some(6) => "cancelled",
        Some(_) => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_build_wrote_is_shown() {
        assert_eq!(shown("hin dir /\nocompiling\neoops\noeh\n", true), "compiling\noops\neh\n");
        assert_eq!(shown("plain\n", false), "plain\n");
    }
}
