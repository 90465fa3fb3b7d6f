//! `buildreactor log`

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;

use super::output::{Stdout, is_closed_pipe, note, stdout_is_closed};
use super::terminal::Screen;
use super::watch::link::{Link, WhenAway};
use super::watch::text::verdict;
use crate::config::Config;
use crate::database::reading::Piece;
use crate::model::BuildId;

/// How often a follower looks for more.
const PERIOD: Duration = Duration::from_millis(300);

/// Pieces read at a time: at most 16 times 64 KiB of output, which is all that is held in memory.
const PAGE: i64 = 16;

/// How the marker row of a log begins (`logs::pieces`): it says how much was left out in its place.
const MARKER: &str = "\n[buildreactor: ";

#[derive(clap::Args)]
pub struct Arguments {
    /// The build
    id: i64,

    /// Which attempt, from 1; without it, the last one
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    attempt: Option<i32>,

    /// Go on until the build has ended, through further attempts; then exit with 0 if it passed, else 1
    #[arg(long, short)]
    follow: bool,

    /// Give a terminal the log as it is, whatever it does to the terminal; without it, colours alone pass, and the rest is shown as ^[ or <U+202E>
    #[arg(long)]
    raw: bool,
}

/// Exit code after Ctrl-C: 128 and SIGINT, as a shell would say.
const INTERRUPTED: u8 = 130;

/// Prints a log to stdout, into a pipe as it is stored, and what there is to say about it to stderr.
pub async fn run(arguments: Arguments, config: &Config) -> anyhow::Result<ExitCode> {
    let screen = (io::stdout().is_terminal() && !arguments.raw).then(Screen::default);
    let on_screen = screen.is_some();
    let mut printer = Printer { screen, ..Printer::default() };
    let result = tokio::select! {
        result = print(&arguments, config, &mut printer) => result,
        // So that the terminal is not left in the colours of the log.
        interrupted = tokio::signal::ctrl_c(), if on_screen => {
            interrupted?;
            Ok(ExitCode::from(INTERRUPTED))
        }
    };
    let rest = printer.rest().map_err(anyhow::Error::from);
    match result.and_then(|code| rest.map(|()| code)) {
        Err(error) if is_closed_pipe(&error) => Ok(ExitCode::SUCCESS),
        result => result,
    }
}

async fn print(arguments: &Arguments, config: &Config, printer: &mut Printer) -> anyhow::Result<ExitCode> {
    let id = BuildId(arguments.id);
    let when_away = if arguments.follow { WhenAway::Wait } else { WhenAway::Fail };
    let mut link = Link::open(config, when_away, note).await?;
    let mut current = arguments.attempt;
    let mut known = false;
    loop {
        // First the state, then the log: the log of an attempt that is over is complete.
        let Some(build) = link.ask(async |reader| reader.build(id).await).await? else {
            if known {
                bail!("build {id} has been deleted");
            }
            return Err(super::Refused::NoSuchBuild(id).into());
        };
        known = true;
        let attempt = *current.get_or_insert(build.attempt.max(1));
        if attempt <= build.attempt {
            printer.catch_up(&mut link, id, attempt).await?;
        } else if arguments.attempt.is_some() && (build.is_final || !arguments.follow) {
            bail!("build {id} has no attempt {attempt}: it has had {}", build.attempt);
        }
        let why = build.detail.as_deref().map(|detail| format!(" ({detail})")).unwrap_or_default();
        if !arguments.follow {
            if build.attempt == 0 {
                printer.say(format!("build {id} has no attempt yet: it is {}{why}", build.state));
            } else if printer.seq == 0 {
                printer.say(format!(
                    "attempt {attempt} of build {id} has no output in the database; the build is {}{why}",
                    build.state
                ));
            }
            return Ok(ExitCode::SUCCESS);
        }
        if attempt < build.attempt {
            current = Some(attempt + 1);
            printer.turn_page();
            printer.say(format!("attempt {} of build {id} begins", attempt + 1));
            continue;
        }
        if build.is_final {
            printer.say(verdict(id, &build));
            return Ok(if build.state == "passed" { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if attempt > build.attempt {
            printer.say(format!("build {id} has no attempt {attempt} yet: it is {}{why}; waiting for it", build.state));
        } else if build.last_ended {
            printer.say(format!("attempt {attempt} of build {id} is over; the build is {}{why}", build.state));
        }
        tokio::time::sleep(PERIOD).await;
        if stdout_is_closed() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Where we are in the log of one attempt, and on the terminal.
#[derive(Debug, Default)]
struct Printer {
    /// Printed up to this seq.
    seq: i64,
    /// Whether the place of the marker, between the beginning and the end, lies behind.
    past_marker: bool,
    /// Whether the last line printed has no end yet.
    in_line: bool,
    /// What was said last on stderr.
    said: String,
    /// Where stdout is a terminal and the log is not wanted raw.
    screen: Option<Screen>,
}

impl Printer {
    /// Prints all there is.
    async fn catch_up(&mut self, link: &mut Link, id: BuildId, attempt: i32) -> anyhow::Result<()> {
        loop {
            let after = self.seq;
            let page = link.ask(async |reader| reader.log(id, attempt, after, PAGE).await).await?;
            let mut follows_marker = false;
            for piece in &page {
                let before = self.seq;
                if self.step(piece, follows_marker) {
                    self.say(format!(
                        "piece {before} of this log is followed by piece {}: output is left out here, or comes again",
                        piece.seq
                    ));
                }
                follows_marker = piece.content.starts_with(MARKER);
                match &mut self.screen {
                    Some(screen) => {
                        let shown = screen.show(&piece.content);
                        self.write(&shown)?;
                    }
                    None => self.write(&piece.content)?,
                }
            }
            if i64::try_from(page.len())? < PAGE {
                return Ok(());
            }
        }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        Stdout.write_all(text.as_bytes())?;
        Stdout.flush()?;
        let text = text.trim_end_matches("\u{1b}[0m").trim_end_matches("\u{1b}[m");
        if !text.is_empty() {
            self.in_line = !text.ends_with('\n');
        }
        Ok(())
    }

    /// Shows what a terminal has not been shown yet, and ends the log's colours.
    fn rest(&mut self) -> io::Result<()> {
        let rest = self.screen.as_mut().map(Screen::end).unwrap_or_default();
        self.write(&rest)
    }

    /// Says something on stderr, once, on a line of its own.
    fn say(&mut self, line: String) {
        if line == self.said {
            return;
        }
        // Not in the colours of the log, which may be those of the ground. Whether stdout can be written is seen by the next piece.
        let _seen_later = self.rest();
        if std::mem::take(&mut self.in_line) && io::stderr().is_terminal() {
            let _read = writeln!(io::stderr());
        }
        note(&line);
        self.said = line;
    }

    /// Begins the log of another attempt.
    fn turn_page(&mut self) {
        (self.seq, self.past_marker) = (0, false);
    }

    /// Moves on to `piece`. True: seqs are missing before it, and that means missing output.
    ///
    /// The pieces of a log are its beginning, without gaps; a place for the marker, where there is one only if something was
    /// left out; and its end, whose first pieces go when it grows too long. So the first gap alone means nothing, and one
    /// right behind a marker of the same page is what the marker tells of. A marker that appears, or is updated, behind us
    /// tells of pieces that we have printed.
    fn step(&mut self, piece: &Piece, follows_marker: bool) -> bool {
        let gap = piece.seq > self.seq + 1;
        let told = follows_marker || !self.past_marker;
        self.past_marker |= gap || piece.content.starts_with(MARKER);
        self.seq = piece.seq;
        gap && !told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seqs before which something is said to be missing, when these pages are printed one after the other; `-4` is a
    /// marker with seq 4.
    fn gaps(pages: &[&[i64]]) -> Vec<i64> {
        let mut printer = Printer::default();
        let mut gaps = Vec::new();
        for page in pages {
            let mut follows_marker = false;
            for seq in *page {
                let content = if *seq < 0 { format!("{MARKER}9 bytes ...]\n") } else { "text\n".to_owned() };
                if printer.step(&Piece { seq: seq.abs(), content }, follows_marker) {
                    gaps.push(seq.abs());
                }
                follows_marker = *seq < 0;
            }
        }
        gaps
    }

    #[test]
    fn a_whole_log_has_no_gap_and_a_place_without_a_marker_is_none() {
        assert_eq!(gaps(&[&[1, 2, 3, 5, 6]]), Vec::<i64>::new());
        assert_eq!(gaps(&[&[1, 2], &[3], &[5], &[6, 7]]), Vec::<i64>::new());
    }

    #[test]
    fn what_the_marker_tells_of_is_not_told_again() {
        assert_eq!(gaps(&[&[1, 2, 3, -4, 9, 10]]), Vec::<i64>::new());
        assert_eq!(gaps(&[&[1, 2, 3], &[-4, 9, 10], &[11]]), Vec::<i64>::new());
    }

    #[test]
    fn pieces_that_went_before_they_were_printed_are_told() {
        assert_eq!(gaps(&[&[1, 2, 3, 5, 6], &[9, 10], &[11]]), [9]);
        assert_eq!(gaps(&[&[1, 2, -3, 5, 6], &[8]]), [8]);
        // The marker was of an earlier page, and more may have gone since.
        assert_eq!(gaps(&[&[1, 2, -3], &[8]]), [8]);
    }
}
