//! Words and numbers for people.

use crate::cli::terminal::harmless_line;
use crate::database::reading::{BuildNow, Elsewhere, Recent, Running, Step, Waiting};
use crate::model::{BuildId, clean_line};

/// Longest text of a cell, characters.
const LONGEST: usize = 300;

/// A time span: `3.2s`, `42s`, `4m 05s`, `3h 07m`, `2d 03h`. Seconds; negative ones, of a clock set back, are none.
pub fn span(seconds: f64) -> String {
    if seconds < 9.95 {
        return format!("{:.1}s", seconds.max(0.0));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is at least 9.95")]
    let whole = seconds.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{minutes}m {:02}s", whole % 60),
        3600..86_400 => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

/// [`span`], or a dash.
pub fn span_or_dash(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), span)
}

/// One line that does nothing to a terminal, of what people, scripts and builds wrote. Names of workers and states are such text too: whoever may
/// write to the database may have written them.
pub fn line(text: &str) -> String {
    harmless_line(&clean_line(text.trim(), LONGEST))
}

/// [`line()`], or nothing.
pub fn line_or_nothing(text: Option<&str>) -> String {
    text.map(line).unwrap_or_default()
}

/// How a build ended: `build 42 of linux failed in 3.2s: exit code 1`.
pub fn verdict(id: BuildId, build: &BuildNow) -> String {
    ended(id, &build.builder, &build.state, build.ran_seconds, build.detail.as_deref())
}

/// As [`verdict`], of a row of the last builds.
pub fn verdict_of_recent(recent: &Recent) -> String {
    ended(recent.build, &recent.builder, &recent.state, recent.ran_seconds, recent.detail.as_deref())
}

fn ended(id: BuildId, builder: &str, state: &str, ran_seconds: Option<f64>, detail: Option<&str>) -> String {
    let took = match ran_seconds {
        Some(seconds) if matches!(state, "passed" | "failed") => format!(" in {}", span(seconds)),
        Some(seconds) if state == "timed_out" => format!(" after {}", span(seconds)),
        _ => String::new(),
    };
    let why = detail.map(|detail| format!(": {}", line(detail))).unwrap_or_default();
    let is = match state {
        "passed" | "failed" | "timed_out" => state.replace('_', " "),
        "error" => "ended in error".to_owned(),
        other => format!("was {}", line(other)),
    };
    format!("build {id} of {} {is}{took}{why}", line(builder))
}

/// Whether a line tells the place in the queue, which changes with each build that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It does.
    Shown,
    /// It does not.
    Hidden,
}

/// A waiting build in one line that changes only when something happens.
pub fn waits(waiting: &Waiting, place: Place) -> String {
    let Waiting { build, builder, position, because, .. } = waiting;
    let place = match place {
        Place::Shown => format!(", place {position}"),
        Place::Hidden => String::new(),
    };
    format!("build {build} of {} waits{place}: {}", line(builder), line(because))
}

/// A running build in one line that changes only when something happens.
pub fn runs(running: &Running) -> String {
    let Running { build, builder, attempt, worker, .. } = running;
    format!("build {build} of {} runs, attempt {attempt} on {}", line(builder), line(worker))
}

/// Where another system builds it: `  http://localhost:8010/#/builders/1/builds/7 on oak`.
pub fn place(elsewhere: &Elsewhere) -> String {
    let worker = elsewhere.worker.as_deref().map_or_else(String::new, |worker| format!(" on {}", line(worker)));
    format!("  {}{worker}", line(&elsewhere.url))
}

/// A step: `  2 compile failed in 3.0s: 'make' (failure)`.
pub fn step(step: &Step) -> String {
    let Step { position, name, state, detail, seconds } = step;
    let name = line(name);
    let took = seconds.map_or_else(String::new, |seconds| format!(" in {}", span(seconds)));
    let why = detail.as_deref().map_or_else(String::new, |detail| format!(": {}", line(detail)));
    match state.as_str() {
        // What it says is what it does.
        "running" => format!("  {position} {name} runs"),
        "passed" => format!("  {position} {name} passed{took}"),
        "failed" => format!("  {position} {name} failed{took}{why}"),
        "warnings" => format!("  {position} {name} passed with warnings{took}{why}"),
        "error" => format!("  {position} {name} ended in error{took}{why}"),
        other => format!("  {position} {name} was {}{why}", line(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_short_and_exact_enough() {
        let all = [0.0, -1.0, 3.24, 9.96, 59.4, 59.6, 245.0, 3599.7, 11_220.0, 183_600.0].map(span);
        assert_eq!(all, ["0.0s", "0.0s", "3.2s", "10s", "59s", "1m 00s", "4m 05s", "1h 00m", "3h 07m", "2d 03h"]);
    }

    #[test]
    fn steps_are_lines() {
        let say = |state: &str| {
            let detail = Some("'make' (done)".to_owned());
            step(&Step { position: 2, name: "compile".to_owned(), state: state.to_owned(), detail, seconds: Some(3.0) })
        };
        assert_eq!(say("running"), "  2 compile runs");
        assert_eq!(say("passed"), "  2 compile passed in 3.0s");
        assert_eq!(say("failed"), "  2 compile failed in 3.0s: 'make' (done)");
        assert_eq!(say("lost"), "  2 compile was lost: 'make' (done)");
    }

    #[test]
    fn verdicts_are_sentences() {
        let say = |state, detail| ended(BuildId(42), "linux", state, Some(3.21), detail);
        assert_eq!(say("passed", None), "build 42 of linux passed in 3.2s");
        assert_eq!(say("timed_out", Some("silent\nfor 2s")), "build 42 of linux timed out after 3.2s: silent for 2s");
        assert_eq!(say("cancelled", Some("by ann")), "build 42 of linux was cancelled: by ann");
    }
}
