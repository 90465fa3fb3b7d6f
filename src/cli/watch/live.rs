//! Everything, on a terminal: tables, and a progress bar for each build that runs.

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::tables::{Farm, recent_table, waiting_table};
use super::text::{line, line_or_nothing, span, span_or_dash};
use crate::database::reading::Running;

/// How a progress bar looks.
pub const BAR: &str = "[{bar:24.green}]";
/// Its characters: done, the tip, to do.
pub const BAR_CHARS: &str = "=> ";

/// Lines that are always there: titles, table headers, blank lines, the workers; and one that stays free, because the
/// terminal scrolls when its last line is full.
const FRAME: usize = 10;

/// The screen: text above, a bar for each running build, text below.
pub struct Live {
    screen: MultiProgress,
    above: ProgressBar,
    bars: Vec<ProgressBar>,
    below: ProgressBar,
    bar_style: ProgressStyle,
}

impl Live {
    /// An empty screen.
    ///
    /// # Errors
    /// A template is wrong: a bug.
    pub fn new() -> anyhow::Result<Live> {
        let screen = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        let text = ProgressStyle::with_template("{msg}")?;
        let above = screen.add(ProgressBar::no_length().with_style(text.clone()));
        let below = screen.add(ProgressBar::no_length().with_style(text));
        let template = format!("{{prefix}} {BAR} {{wide_msg}}");
        let bar_style = ProgressStyle::with_template(&template)?.progress_chars(BAR_CHARS);
        Ok(Live { screen, above, bars: Vec::new(), below, bar_style })
    }

    /// To print lines above everything else.
    pub fn above(&self) -> MultiProgress {
        self.screen.clone()
    }

    /// Shows `farm`, as much of it as fits.
    pub fn show(&mut self, farm: &Farm) {
        let (height, width) = Term::stdout().size();
        let room = usize::from(height).saturating_sub(FRAME);
        let [running, waiting, recent] =
            share(room, [farm.running.rows.len(), farm.waiting.rows.len(), farm.recent.len()]);

        let mut above = farm.waiting_title(waiting);
        if waiting > 0 {
            above = format!("{above}\n{}", waiting_table(&farm.waiting.rows[..waiting], Some(width)));
        }
        self.above.set_message(format!("{above}\n\n{}", farm.running_title(running)));

        let rows = &farm.running.rows[..running];
        while self.bars.len() > rows.len() {
            if let Some(bar) = self.bars.pop() {
                self.screen.remove(&bar);
            }
        }
        while self.bars.len() < rows.len() {
            let bar = ProgressBar::new(1).with_style(self.bar_style.clone());
            self.bars.push(self.screen.insert_before(&self.below, bar));
        }
        let widths = (widest(rows, |row| row.builder.len()), widest(rows, |row| row.worker.len()));
        for (bar, row) in self.bars.iter().zip(rows) {
            let (builder, worker) = widths;
            let names = (line(&row.builder), line(&row.worker));
            bar.set_prefix(format!("{:>6} {:builder$} {:worker$}", row.build.0, names.0, names.1));
            set_progress(bar, row);
            bar.set_message(progress(row));
        }

        let mut below = String::new();
        if recent > 0 {
            below = format!("\nfinished:\n{}\n", recent_table(&farm.recent[..recent], Some(width)));
        }
        self.below.set_message(format!("{below}\n{}", farm.workers_line()));
        // The draws above are limited to some a second; this one is of all that is new.
        self.below.force_draw();
    }
}

impl Drop for Live {
    /// Leaves the screen as it is. Bars left to themselves would clear their lines, and miss them by one where the
    /// terminal has written `^C`.
    fn drop(&mut self) {
        for bar in self.bars.iter().chain([&self.above, &self.below]) {
            self.screen.remove(bar);
        }
    }
}

/// Sets a bar to the elapsed against the usual time; to nothing where no usual time is known.
pub fn set_progress(bar: &ProgressBar, running: &Running) {
    let usual = running.usual_seconds.map_or(0, milliseconds);
    let elapsed = if usual == 0 { 0 } else { milliseconds(running.elapsed_seconds) };
    bar.set_length(usual.max(1));
    bar.set_position(elapsed.min(usual));
}

/// `1m 02s / 3m 10s, attempt 2  last line of the log`
pub fn progress(running: &Running) -> String {
    let again = if running.attempt > 1 { format!("attempt {}  ", running.attempt) } else { String::new() };
    let (elapsed, usual) = (span(running.elapsed_seconds), span_or_dash(running.usual_seconds));
    format!("{elapsed:>7} / {usual:<7} {again}{}", line_or_nothing(running.last_log_line.as_deref()))
}

fn milliseconds(seconds: f64) -> u64 {
    u64::try_from(std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn widest(rows: &[Running], len: impl Fn(&Running) -> usize) -> usize {
    rows.iter().map(len).max().unwrap_or(0)
}

/// Hands out `room` lines one at a time, in turn, to those that want more; earlier ones first.
fn share(room: usize, wants: [usize; 3]) -> [usize; 3] {
    let mut has = [0; 3];
    for turn in 0..room * wants.len() {
        let one = turn % wants.len();
        if has.iter().sum::<usize>() < room && has[one] < wants[one] {
            has[one] += 1;
        }
    }
    has
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_screen_is_shared_and_a_large_one_shows_everything() {
        assert_eq!(share(40, [3, 15, 10]), [3, 15, 10]);
        assert_eq!(share(14, [3, 15, 10]), [3, 6, 5]);
        assert_eq!(share(14, [50, 0, 1]), [13, 0, 1]);
        assert_eq!(share(0, [50, 0, 1]), [0, 0, 0]);
    }
}
