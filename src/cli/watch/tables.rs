//! The farm at one moment, and its tables.

use comfy_table::{Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Row, Table, presets};

use super::link::Link;
use super::text::{line, line_or_nothing, span, span_or_dash};
use crate::database::reading::{Recent, Rows, Running, Waiting, Worker};

/// How many waiting builds are shown at most.
pub const MOST_WAITING: i64 = 15;
/// How many running builds.
pub const MOST_RUNNING: i64 = 50;
/// How many finished ones.
pub const MOST_RECENT: i64 = 10;

/// What waits, runs and has finished, and who runs it.
#[derive(Debug)]
pub struct Farm {
    /// What waits, in order.
    pub waiting: Rows<Waiting>,
    /// What runs, the longest first.
    pub running: Rows<Running>,
    /// What has finished, newest first.
    pub recent: Vec<Recent>,
    /// Workers that have not been stopped.
    pub workers: Vec<Worker>,
}

impl Farm {
    /// Looks at everything, `recent` finished builds among it. In this order, so that a build on its way is never missed.
    ///
    /// # Errors
    /// As [`Link::ask`].
    pub async fn look(link: &mut Link, recent: i64) -> anyhow::Result<Farm> {
        link.ask(async |reader| {
            Ok(Farm {
                waiting: reader.queue(None, MOST_WAITING).await?,
                running: reader.running(None, MOST_RUNNING).await?,
                recent: reader.recent(recent).await?,
                workers: reader.workers().await?,
            })
        })
        .await
    }

    /// `waiting: 120 (the first 15)`
    pub fn waiting_title(&self, shown: usize) -> String {
        title("waiting", self.waiting.total, shown)
    }

    /// `running: 2`
    pub fn running_title(&self, shown: usize) -> String {
        title("running", self.running.total, shown)
    }

    /// `workers: w1 1/2, w2 0/2 draining, w3 gone`
    pub fn workers_line(&self) -> String {
        if self.workers.is_empty() {
            return "workers: none is running; start one with buildreactor run".to_owned();
        }
        let all: Vec<String> = self.workers.iter().map(worker).collect();
        format!("workers: {}", all.join(", "))
    }
}

/// `w1 1/2`, `w2 0/2 draining`, `w3 gone`
pub fn worker(worker: &Worker) -> String {
    let Worker { name, status, running, slots } = worker;
    let (name, status) = (line(name), line(status));
    match status.as_str() {
        "active" => format!("{name} {running}/{slots}"),
        "gone" => format!("{name} gone"),
        other => format!("{name} {running}/{slots} {other}"),
    }
}

fn title(what: &str, total: i64, shown: usize) -> String {
    if i64::try_from(shown).is_ok_and(|shown| shown < total) {
        format!("{what}: {total} (the first {shown})")
    } else {
        format!("{what}: {total}")
    }
}

/// What waits. `width`: of the terminal; `None`: as wide as it gets.
pub fn waiting_table(rows: &[Waiting], width: Option<u16>) -> String {
    let row = |row: &Waiting| {
        vec![
            number(row.build),
            Cell::new(line(&row.builder)),
            number(row.position),
            number(span_or_dash(row.waiting_seconds)),
            number(span_or_dash(row.expected_seconds)),
            Cell::new(line(&row.because)),
        ]
    };
    let header = ["build", "builder", "place", "waiting", "starts in", "because"];
    table(&header, rows.iter().map(row), width)
}

/// What runs.
pub fn running_table(rows: &[Running], width: Option<u16>) -> String {
    let row = |row: &Running| {
        vec![
            number(row.build),
            Cell::new(line(&row.builder)),
            Cell::new(line(&row.worker)),
            number(row.attempt),
            number(span(row.elapsed_seconds)),
            number(span_or_dash(row.usual_seconds)),
            Cell::new(line_or_nothing(row.last_log_line.as_deref())),
        ]
    };
    let header = ["build", "builder", "worker", "attempt", "elapsed", "usually", "last line"];
    table(&header, rows.iter().map(row), width)
}

/// What has finished.
pub fn recent_table(rows: &[Recent], width: Option<u16>) -> String {
    let row = |row: &Recent| {
        vec![
            number(row.build),
            Cell::new(line(&row.builder)),
            Cell::new(line(&row.state)).fg(colour(&row.state)),
            number(span_or_dash(row.ran_seconds)),
            number(span(row.ago_seconds)),
            Cell::new(row.worker.as_deref().map_or_else(|| "-".to_owned(), line)),
            Cell::new(line_or_nothing(row.detail.as_deref())),
        ]
    };
    let header = ["build", "builder", "state", "took", "ago", "worker", "detail"];
    table(&header, rows.iter().map(row), width)
}

fn colour(state: &str) -> Color {
    match state {
        "passed" => Color::Green,
        "failed" | "timed_out" | "error" => Color::Red,
        _ => Color::Yellow,
    }
}

fn number(value: impl ToString) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

/// One line a row; the last column is cut to what room there is.
fn table(header: &[&str], rows: impl Iterator<Item = Vec<Cell>>, width: Option<u16>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    for cells in rows {
        let mut row = Row::from(cells);
        row.max_height(1);
        table.add_row(row);
    }
    if let Some(width) = width {
        table.set_width(width).set_content_arrangement(ContentArrangement::Dynamic);
        let last = header.len() - 1;
        for column in table.column_iter_mut().take(last) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.trim_fmt()
}
