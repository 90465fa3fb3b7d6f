//! `buildreactor watch`

mod farm;
pub mod link;
mod live;
mod one;
mod tables;
pub mod text;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use console::Term;
use indicatif::ProgressDrawTarget;

use self::link::{Link, WhenAway};
use self::live::Live;
use self::tables::Farm;
use super::output::{Stdout, is_closed_pipe, note};
use super::terminal::harmless_line;
use crate::config::Config;
use crate::model::BuildId;

/// How often the views are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Exit code after Ctrl-C: 128 and SIGINT, as a shell would say.
const INTERRUPTED: u8 = 130;

#[derive(clap::Args)]
pub struct Arguments {
    /// Wait for this build, then exit with 0 if it passed, else 1; without it, show everything until Ctrl-C
    id: Option<i64>,

    /// Print what there is, and leave
    #[arg(long)]
    once: bool,
}

/// Shows what waits, runs and has finished: live on a terminal, else a plain line for each change.
pub async fn run(arguments: Arguments, config: &Config) -> anyhow::Result<ExitCode> {
    let whole_farm = arguments.id.is_none();
    let watching = async {
        match (arguments.id.map(BuildId), arguments.once) {
            (Some(id), once) => one::watch(id, once, config).await,
            (None, true) => print_once(config).await,
            (None, false) if is_terminal() => watch_live(config).await,
            (None, false) => farm::watch(config).await,
        }
    };
    // Whatever it was about to read is of no use to anybody then; what is on the screen stays there.
    let result = tokio::select! {
        result = watching => result,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            if is_terminal() {
                writeln!(Stdout)?;
            }
            Ok(if whole_farm { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
        }
    };
    match result {
        // Nobody listens any more; but nobody knows either whether the build passed.
        Err(error) if is_closed_pipe(&error) => Ok(if whole_farm { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        result => result,
    }
}

/// Whether stdout is a terminal that can do more than print (`TERM=dumb` cannot).
fn is_terminal() -> bool {
    !ProgressDrawTarget::stdout().is_hidden()
}

/// How long to wait after a look that took `took`: a queue of a million rows takes seconds to look at, and the server has
/// more to do than to show it.
fn pause(took: Duration) -> Duration {
    PERIOD.max(took * 4)
}

async fn print_once(config: &Config) -> anyhow::Result<ExitCode> {
    let mut link = Link::open(config, WhenAway::Fail, note).await?;
    let farm = Farm::look(&mut link, tables::MOST_RECENT).await?;
    let width = is_terminal().then(|| Term::stdout().size().1);
    let Farm { waiting, running, recent, .. } = &farm;
    let mut out = Stdout;
    writeln!(out, "{}", farm.waiting_title(waiting.rows.len()))?;
    if !waiting.rows.is_empty() {
        writeln!(out, "{}", tables::waiting_table(&waiting.rows, width))?;
    }
    writeln!(out, "\n{}", farm.running_title(running.rows.len()))?;
    if !running.rows.is_empty() {
        writeln!(out, "{}", tables::running_table(&running.rows, width))?;
    }
    if !recent.is_empty() {
        writeln!(out, "\nfinished:\n{}", tables::recent_table(recent, width))?;
    }
    writeln!(out, "\n{}", farm.workers_line())?;
    Ok(ExitCode::SUCCESS)
}

async fn watch_live(config: &Config) -> anyhow::Result<ExitCode> {
    let mut live = Live::new()?;
    let above = live.above();
    let mut link = Link::open(config, WhenAway::Wait, move |line| {
        // Nobody to tell where the terminal is gone.
        let _told = above.println(harmless_line(line));
    })
    .await?;
    loop {
        let begun = tokio::time::Instant::now();
        let farm = Farm::look(&mut link, tables::MOST_RECENT).await?;
        live.show(&farm);
        tokio::time::sleep(pause(begun.elapsed())).await;
    }
}
