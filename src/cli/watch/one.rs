//! One build, until it has ended.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::link::{Link, WhenAway};
use super::live::{BAR, BAR_CHARS, progress, set_progress};
use super::text::{self, Place, runs, span, verdict, waits};
use super::{is_terminal, pause};
use crate::cli::output::{Stdout, note, stdout_is_closed};
use crate::cli::terminal::harmless_line;
use crate::config::Config;
use crate::database::reading::{BuildNow, Elsewhere, Running, Waiting};
use crate::model::BuildId;

/// How often the state is looked at; the views more rarely.
const PERIOD: Duration = Duration::from_millis(300);

/// Waits for a build and tells what becomes of it; with `once` only what it is now.
///
/// # Errors
/// There is no such build, or the database refuses us.
pub async fn watch(id: BuildId, once: bool, config: &Config) -> anyhow::Result<ExitCode> {
    let mut teller = if once || !is_terminal() { Teller::plain() } else { Teller::on_terminal()? };
    let when_away = if once { WhenAway::Fail } else { WhenAway::Wait };
    let mut link = Link::open(config, when_away, teller.voice()).await?;
    let mut seen: Option<BuildNow> = None;
    let mut due = Instant::now();
    let mut told = Told::default();
    loop {
        let Some(build) = link.ask(async |reader| reader.build(id).await).await? else {
            if seen.is_some() {
                bail!("build {id} has been deleted");
            }
            return Err(crate::cli::Refused::NoSuchBuild(id).into());
        };
        if build.is_final {
            teller.add(&told.news(link.ask(async |reader| reader.elsewhere(id).await).await?, Runs::Told))?;
            teller.end(&verdict(id, &build))?;
            return Ok(if build.state == "passed" { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if Instant::now() >= due || seen.as_ref() != Some(&build) {
            let begun = Instant::now();
            if let Some(stage) = Stage::look(&mut link, id, &build).await? {
                teller.tell(&stage)?;
            }
            if build.state == "running" {
                let elsewhere = link.ask(async |reader| reader.elsewhere(id).await).await?;
                teller.add(&told.news(elsewhere, teller.what_runs()))?;
            }
            due = Instant::now() + pause(begun.elapsed());
        }
        if once {
            return Ok(ExitCode::FAILURE);
        }
        seen = Some(build);
        tokio::time::sleep(PERIOD).await;
        if stdout_is_closed() {
            return Ok(ExitCode::FAILURE);
        }
    }
}

/// How far it has come.
enum Stage {
    Described(String),
    Waiting(Waiting),
    Running(Running),
}

impl Stage {
    /// `None`: it has just moved on.
    async fn look(link: &mut Link, id: BuildId, build: &BuildNow) -> anyhow::Result<Option<Stage>> {
        Ok(match build.state.as_str() {
            "queued" => {
                let rows = link.ask(async |reader| reader.queue(Some(id), 1).await).await?;
                rows.rows.into_iter().next().map(Stage::Waiting)
            }
            "running" => {
                let rows = link.ask(async |reader| reader.running(Some(id), 1).await).await?;
                rows.rows.into_iter().next().map(Stage::Running)
            }
            other => Some(Stage::Described(format!(
                "build {id} of {} is {}, not queued: INSERT INTO build_queue (build_id) VALUES ({id});",
                text::line(&build.builder),
                text::line(other)
            ))),
        })
    }

    /// Changes only when something happens.
    fn line(&self) -> String {
        match self {
            Stage::Described(line) => line.clone(),
            Stage::Waiting(waiting) => waits(waiting, Place::Shown),
            Stage::Running(running) => runs(running),
        }
    }
}

/// Whether it is told that a step runs: where a line follows another, nothing else says so.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runs {
    Told,
    Shown,
}

/// What has been told of what another system does.
#[derive(Default)]
struct Told {
    attempt: i32,
    place: String,
    /// The state of each step.
    steps: BTreeMap<i32, String>,
}

impl Told {
    /// What is new, in lines.
    fn news(&mut self, elsewhere: Option<Elsewhere>, runs: Runs) -> Vec<String> {
        let Some(elsewhere) = elsewhere else { return Vec::new() };
        if self.attempt != elsewhere.attempt {
            *self = Told { attempt: elsewhere.attempt, ..Told::default() };
        }
        let mut lines = Vec::new();
        let place = text::place(&elsewhere);
        if self.place != place {
            lines.push(place.clone());
            self.place = place;
        }
        for step in &elsewhere.steps {
            let news = self.steps.get(&step.position) != Some(&step.state);
            if news && (runs == Runs::Told || step.state != "running") {
                lines.push(text::step(step));
                self.steps.insert(step.position, step.state.clone());
            }
        }
        lines
    }
}

/// Where it is told.
enum Teller {
    /// A line for each change.
    Lines { last: String },
    /// One line that changes.
    Terminal(Box<Screen>),
}

/// A line of words, or a progress bar while the build runs.
struct Screen {
    bar: ProgressBar,
    words: ProgressStyle,
    progress: ProgressStyle,
}

impl Teller {
    fn plain() -> Teller {
        Teller::Lines { last: String::new() }
    }

    fn on_terminal() -> anyhow::Result<Teller> {
        let words = ProgressStyle::with_template("{spinner} {wide_msg}")?;
        let progress = format!("{{spinner}} {{prefix}} {BAR} {{wide_msg}}");
        let progress = ProgressStyle::with_template(&progress)?.progress_chars(BAR_CHARS);
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()).with_style(words.clone());
        Ok(Teller::Terminal(Box::new(Screen { bar, words, progress })))
    }

    /// For what there is to say of the connection.
    fn voice(&self) -> impl Fn(&str) + 'static {
        let bar = match self {
            Teller::Lines { .. } => None,
            Teller::Terminal(screen) => Some(screen.bar.clone()),
        };
        move |line: &str| match &bar {
            None => note(line),
            Some(bar) => bar.println(harmless_line(line)),
        }
    }

    fn tell(&mut self, stage: &Stage) -> io::Result<()> {
        match self {
            Teller::Lines { last } => {
                let line = stage.line();
                if *last == line {
                    return Ok(());
                }
                match stage {
                    Stage::Running(Running { usual_seconds: Some(usual), .. }) => {
                        writeln!(Stdout, "{line}, usually {}", span(*usual))?;
                    }
                    _ => writeln!(Stdout, "{line}")?,
                }
                *last = line;
            }
            Teller::Terminal(screen) => screen.show(stage),
        }
        Ok(())
    }

    fn what_runs(&self) -> Runs {
        match self {
            Teller::Lines { .. } => Runs::Told,
            Teller::Terminal(_) => Runs::Shown,
        }
    }

    /// Lines that stay.
    fn add(&self, lines: &[String]) -> io::Result<()> {
        for line in lines {
            match self {
                Teller::Lines { .. } => writeln!(Stdout, "{line}")?,
                Teller::Terminal(screen) => screen.bar.println(line),
            }
        }
        Ok(())
    }

    fn end(self, verdict: &str) -> io::Result<()> {
        if let Teller::Terminal(screen) = &self {
            screen.bar.finish_and_clear();
        }
        writeln!(Stdout, "{verdict}")
    }
}

impl Screen {
    fn show(&self, stage: &Stage) {
        let Screen { bar, words, progress: style } = self;
        match stage {
            Stage::Described(_) => {
                bar.set_style(words.clone());
                bar.set_message(stage.line());
            }
            Stage::Waiting(waiting) => {
                let start = waiting.expected_seconds.filter(|seconds| *seconds >= 1.0);
                let start = start.map(|seconds| format!(" (starts in about {})", span(seconds)));
                bar.set_style(words.clone());
                bar.set_message(stage.line() + &start.unwrap_or_default());
            }
            Stage::Running(running) => {
                bar.set_style(style.clone());
                let (builder, worker) = (text::line(&running.builder), text::line(&running.worker));
                bar.set_prefix(format!("build {} of {builder} on {worker}", running.build));
                set_progress(bar, running);
                bar.set_message(progress(running));
            }
        }
        bar.tick();
        bar.force_draw();
    }
}

impl Drop for Screen {
    /// Leaves the line as it is: see [`super::live::Live`].
    fn drop(&mut self) {
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
    }
}
