//! Where log lines go: to standard error, through a queue and a thread of its own. Whoever logs never waits for a reader that has
//! stopped reading, and a line that cannot be written (a full disk, a reader that has gone) is no error of the program. Such lines
//! are lost; how many is said as soon as a line can be written again.
//!
//! An own writer, because tracing-appender's `non_blocking` counts lines that find its queue full but not those whose write fails,
//! and tells nobody about either.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::fmt::MakeWriter;

use super::terminal::Screen;

/// How much waits for a reader that is slow, bytes.
const ROOM: usize = 1 << 20;
/// How long the end of the program waits for the last lines to be written.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Text,
    /// With colours. What others' texts could do to a terminal is shown instead.
    Terminal,
    Json,
}

/// The thread that writes. Dropped, it has [`PATIENCE`] to write what still waits.
pub struct Log(LogWriter);

/// Takes lines; each write is one.
#[derive(Clone)]
pub struct LogWriter(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    /// Told of every change of `queue`.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    /// Of all lines in `entries`.
    bytes: usize,
    /// The thread is writing an entry that is no longer in `entries`.
    writing: bool,
}

enum Entry {
    Line(Vec<u8>),
    /// So many lines found no room here.
    Lost(u64),
}

impl Log {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn to_stderr(style: Style) -> io::Result<Log> {
        Log::start(Stderr, style)
    }

    fn start(sink: impl Write + Send + 'static, style: Style) -> io::Result<Log> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let writer = LogWriter(Arc::clone(&shared));
        let mut pen = Pen { sink, style, lost: 0, in_line: false };
        std::thread::Builder::new().name("log".to_owned()).spawn(move || {
            loop {
                let entry = shared.next();
                pen.write(entry);
                shared.lock().writing = false;
                shared.changed.notify_all();
            }
        })?;
        Ok(Log(writer))
    }

    /// For those who log.
    pub fn writer(&self) -> LogWriter {
        self.0.clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let shared = &self.0.0;
        let mut queue = shared.lock();
        while queue.writing || !queue.entries.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = shared.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl LogWriter {
    /// Queues a line, which ends with a line end. Never waits.
    pub fn line(&self, line: Vec<u8>) {
        let shared = &self.0;
        let mut queue = shared.lock();
        if queue.entries.is_empty() || queue.bytes + line.len() <= ROOM {
            queue.bytes += line.len();
            queue.entries.push_back(Entry::Line(line));
        } else if let Some(Entry::Lost(count)) = queue.entries.back_mut() {
            *count += 1;
        } else {
            queue.entries.push_back(Entry::Lost(1));
        }
        drop(queue);
        shared.changed.notify_all();
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LogWriter;

    fn make_writer(&'a self) -> LogWriter {
        self.clone()
    }
}

impl Shared {
    /// A thread that panicked has left the queue whole.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an entry.
    fn next(&self) -> Entry {
        let mut queue = self.lock();
        loop {
            if let Some(entry) = queue.entries.pop_front() {
                if let Entry::Line(line) = &entry {
                    queue.bytes -= line.len();
                }
                queue.writing = true;
                return entry;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the thread knows.
struct Pen<W> {
    sink: W,
    style: Style,
    /// Lines lost since the last one that was written.
    lost: u64,
    /// The last write broke off within a line.
    in_line: bool,
}

impl<W: Write> Pen<W> {
    fn write(&mut self, entry: Entry) {
        let line = match entry {
            Entry::Line(line) if self.style == Style::Terminal => {
                let mut screen = Screen::default();
                let shown = screen.show(&String::from_utf8_lossy(&line));
                (shown + &screen.end()).into_bytes()
            }
            Entry::Line(line) => line,
            Entry::Lost(count) => {
                self.lost += count;
                self.tell_lost();
                return;
            }
        };
        if !self.tell_lost() || !self.put(&line) {
            self.lost += 1;
        }
    }

    /// False: standard error cannot even take this.
    fn tell_lost(&mut self) -> bool {
        if self.lost > 0 {
            let notice = self.notice();
            if !self.put(notice.as_bytes()) {
                return false;
            }
            self.lost = 0;
        }
        true
    }

    /// A line like tracing's, whatever level is logged.
    fn notice(&self) -> String {
        let lost = self.lost;
        let (lines, were) = if lost == 1 { ("line", "was") } else { ("lines", "were") };
        let text = format!("{lost} log {lines} {were} lost: standard error could not be written");
        let at = format!("{:.6}", jiff::Timestamp::now());
        match self.style {
            Style::Text | Style::Terminal => format!("{at}  WARN {text}\n"),
            Style::Json => {
                let line = serde_json::json!({ "timestamp": at, "level": "WARN", "message": text, "lost": lost });
                format!("{line}\n")
            }
        }
    }

    fn put(&mut self, line: &[u8]) -> bool {
        if self.in_line && self.sink.write_all(b"\n").is_err() {
            return false;
        }
        self.in_line = false;
        let mut rest = line;
        while !rest.is_empty() {
            match self.sink.write(rest) {
                Ok(0) => return false,
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.in_line = rest.len() < line.len();
                    return false;
                }
            }
        }
        true
    }
}

/// The file descriptor itself: `io::stderr` holds a lock while it waits, and whoever panics meanwhile would wait too.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            match nix::unistd::write(stderr.as_fd(), bytes) {
                // Somebody else who holds this file has made it non-blocking.
                Err(nix::errno::Errno::EAGAIN) => {
                    let _ready = poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
                }
                result => return Ok(result?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// Answers writes as told; keeps what it has taken.
    struct Scripted {
        answers: VecDeque<io::Result<usize>>,
        taken: String,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let written = self.answers.pop_front().unwrap_or(Ok(bytes.len()))?.min(bytes.len());
            self.taken.push_str(std::str::from_utf8(&bytes[..written]).unwrap());
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn pen(answers: Vec<io::Result<usize>>, style: Style) -> Pen<Scripted> {
        Pen { sink: Scripted { answers: answers.into(), taken: String::new() }, style, lost: 0, in_line: false }
    }

    fn full() -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn line(text: &str) -> Entry {
        Entry::Line(format!("{text}\n").into_bytes())
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_told_with_the_next() {
        let gone = || Err(io::ErrorKind::BrokenPipe.into());
        let mut pen = pen(vec![Ok(99), full(), gone(), Ok(99), Ok(99), gone()], Style::Text);
        for text in ["one", "two", "three", "four", "five", "six"] {
            pen.write(line(text));
        }
        let lines: Vec<&str> = pen.sink.taken.lines().collect();
        let notice = |line: &str, text: &str| assert!(line.ends_with(text), "{line}");
        assert_eq!(lines[0], "one");
        notice(lines[1], "Z  WARN 2 log lines were lost: standard error could not be written");
        assert_eq!(lines[2], "four");
        notice(lines[3], "Z  WARN 1 log line was lost: standard error could not be written");
        assert_eq!(lines[4..], ["six"]);
    }

    #[test]
    fn a_line_that_broke_off_is_ended_before_the_next() {
        let mut pen = pen(vec![Ok(2), full(), full()], Style::Json);
        for text in ["first", "second", "third"] {
            pen.write(line(text));
        }
        let lines: Vec<&str> = pen.sink.taken.lines().collect();
        assert_eq!((lines[0], lines[2], lines.len()), ("fi", "third", 3));
        let notice: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!((notice["level"].as_str(), notice["lost"].as_u64()), (Some("WARN"), Some(2)));
    }

    #[test]
    fn lines_for_a_terminal_have_colours_and_nothing_else() {
        let mut pen = pen(Vec::new(), Style::Terminal);
        pen.write(line("\u{1b}[2m12:00\u{1b}[0m a\u{1b}]0;title\u{7}b\u{202e}c\rd"));
        assert_eq!(pen.sink.taken, "\u{1b}[2m12:00\u{1b}[0m a^[]0;title^Gb<U+202E>c^M\nd\n");
    }

    /// Takes a line for each token.
    struct Slow(Receiver<()>, SyncSender<String>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _over = self.0.recv();
            let _read = self.1.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stops_holds_nobody_up_and_what_it_missed_is_told_in_its_place() {
        let (go, tokens) = sync_channel(100_000);
        let (taken, read) = sync_channel(100_000);
        let log = Log::start(Slow(tokens, taken), Style::Text).unwrap();
        let mut writer = log.writer();
        let text = format!("{}\n", "x".repeat(999));
        let all = 5000;
        for _ in 0..all {
            writer.write_all(text.as_bytes()).unwrap();
        }
        for _ in 0..all {
            go.send(()).unwrap();
        }
        let mut whole = 0;
        let lost = loop {
            let line = read.recv_timeout(Duration::from_secs(60)).unwrap();
            if line == text {
                whole += 1;
            } else {
                break line;
            }
        };
        assert!(whole <= ROOM / text.len() + 1, "{whole}");
        assert!(
            lost.ends_with(&format!(" {} log lines were lost: standard error could not be written\n", all - whole))
        );
        // The end waits for the last line.
        writer.write_all(b"last\n").unwrap();
        drop(log);
        assert_eq!(read.try_recv().unwrap(), "last\n");
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (go, tokens) = sync_channel(1);
        let (taken, _read) = sync_channel(1);
        let log = Log::start(Slow(tokens, taken), Style::Text).unwrap();
        log.writer().line(b"nobody reads this\n".to_vec());
        drop(log);
        drop(go);
    }
}
