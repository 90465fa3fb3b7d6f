//! Which pieces of a log are in the database: the beginning, then at most one gap with a marker that says its size, then one
//! unbroken run up to the newest byte. True after each commit, so whoever reads meanwhile is never told a lie.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use crate::database::queries::{LogChange, LogPiece};
use crate::logs::file::OutputReader;

/// Largest piece, bytes of output.
const PIECE: u64 = 64 << 10;

/// State of one log in the database. Offsets count bytes of output.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// Bytes for the beginning, and as many for the end.
    half: u64,
    /// Where people find the rest.
    rest: String,
    /// Everything before this offset is there or in the gap.
    position: u64,
    /// The next piece's seq.
    seq: i64,
    /// Bytes of text in the beginning.
    head: u64,
    gap: Option<Gap>,
}

/// The beginning is full.
#[derive(Clone, Debug)]
struct Gap {
    /// The offset at which the beginning ends.
    from: u64,
    /// The offset at which the end begins.
    to: u64,
    /// The marker's seq.
    marker: i64,
    /// Size that the marker says, where there is one.
    marked: Option<u64>,
    /// Pieces of the end: seq, offset after it, bytes of text.
    tail: VecDeque<(i64, u64, u64)>,
}

impl Pieces {
    /// Of an empty log. `limit`: bytes of text to keep, to within a piece. `rest`: where the whole log is.
    pub fn new(limit: u64, rest: String) -> Pieces {
        Pieces { half: limit / 2, rest, position: 0, seq: 1, head: 0, gap: None }
    }

    /// Of a log of which an earlier daemon has written these, in order.
    pub fn resume(limit: u64, rest: String, written: &[LogPiece]) -> Pieces {
        let mut pieces = Pieces::new(limit, rest);
        for piece in written {
            let position = piece.position;
            if let Some(size) = piece.left_out {
                let from = position.saturating_sub(size);
                pieces.gap =
                    Some(Gap { from, to: position, marker: piece.seq, marked: Some(size), tail: VecDeque::new() });
            } else {
                // The marker's seq is kept free once the beginning is full.
                if pieces.gap.is_none() && piece.seq > pieces.seq {
                    pieces.seq = piece.seq - 1;
                    pieces.open_gap();
                }
                match &mut pieces.gap {
                    Some(gap) => gap.tail.push_back((piece.seq, position, piece.size)),
                    None => pieces.head += piece.size,
                }
            }
            pieces.position = position;
            pieces.seq = piece.seq + 1;
        }
        pieces
    }

    /// Brings the database up to what the log in `dir` holds now. `last`: it has ended; what looks like half a character
    /// is not waited for, and the end is made as long as the limit allows.
    ///
    /// # Errors
    /// The files cannot be read.
    pub fn advance(&mut self, dir: &Path, last: bool) -> io::Result<Vec<LogChange>> {
        let reader = OutputReader::new(dir);
        let total = match reader.total() {
            Ok(total) => total,
            // Nothing has been written yet, or the attempt never had a folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let mut changes = Vec::new();
        while self.gap.is_none() && self.position < total {
            let want = PIECE.min(self.half.saturating_sub(self.head));
            let Some((from, text, to)) =
                (if want == 0 { None } else { read(&reader, self.position, want, last, total)? })
            else {
                if want == 0 {
                    self.open_gap();
                    break;
                }
                return Ok(changes);
            };
            if from > self.position {
                // The file has a gap of its own before the beginning was full.
                self.open_gap();
                break;
            }
            self.head += text.len() as u64;
            self.position = to;
            self.put(text, &mut changes);
        }
        if self.gap.is_some() && (self.position < total || last) {
            self.advance_tail(&reader, total, last, &mut changes)?;
        }
        Ok(changes)
    }

    fn open_gap(&mut self) {
        self.gap =
            Some(Gap { from: self.position, to: self.position, marker: self.seq, marked: None, tail: VecDeque::new() });
        self.seq += 1;
    }

    /// Adds the text that ends at `position`.
    fn put(&mut self, content: String, changes: &mut Vec<LogChange>) -> i64 {
        let (seq, position) = (self.seq, self.position);
        self.seq += 1;
        changes.push(LogChange::Put { seq, content, position, left_out: None });
        seq
    }

    fn advance_tail(
        &mut self,
        reader: &OutputReader,
        total: u64,
        last: bool,
        changes: &mut Vec<LogChange>,
    ) -> io::Result<()> {
        let Some(mut gap) = self.gap.take() else { return Ok(()) };
        // While it runs a flood is skipped down to its newest piece; at the end the limit decides.
        let newest = total.saturating_sub(if last { self.half } else { PIECE }).max(gap.from);
        let skip = if last {
            // Also when an earlier skip left the end shorter than it may be.
            self.position < newest || (gap.to > newest && gap.to > gap.from)
        } else {
            self.position < newest
        };
        if skip {
            if let (Some((first, ..)), Some((end, ..))) = (gap.tail.front(), gap.tail.back()) {
                changes.push(LogChange::Delete { first: *first, last: *end });
            }
            gap.tail.clear();
            self.position = newest;
            gap.to = newest;
            // A missing seq tells who follows the log that something was left out.
            self.seq += 1;
        }
        while self.position < total {
            let Some((from, text, to)) = read(reader, self.position, PIECE.min(total - self.position), last, total)?
            else {
                break;
            };
            if gap.tail.is_empty() {
                gap.to = from;
            }
            self.position = to;
            let len = text.len() as u64;
            let seq = self.put(text, changes);
            gap.tail.push_back((seq, to, len));
        }
        let mut size: u64 = gap.tail.iter().map(|(_, _, len)| len).sum();
        while size > self.half + PIECE && gap.tail.len() > 1 {
            if let Some((seq, to, len)) = gap.tail.pop_front() {
                changes.push(LogChange::Delete { first: seq, last: seq });
                gap.to = to;
                size -= len;
            }
        }
        let left_out = gap.to - gap.from;
        if left_out > 0 && gap.marked != Some(left_out) {
            let content = format!("\n[buildreactor: {left_out} bytes of output left out here; see {}]\n", self.rest);
            let (seq, position) = (gap.marker, gap.to);
            changes.push(LogChange::Put { seq, content, position, left_out: Some(left_out) });
            gap.marked = Some(left_out);
        } else if left_out == 0 && gap.marked.take().is_some() {
            changes.push(LogChange::Delete { first: gap.marker, last: gap.marker });
        }
        self.gap = Some(gap);
        Ok(())
    }
}

/// Text of up to `want` bytes from `offset` on, with the offsets at which it begins and ends. `None`: nothing there, or
/// nothing but the first bytes of a character whose others may still come.
fn read(
    reader: &OutputReader,
    offset: u64,
    want: u64,
    last: bool,
    total: u64,
) -> io::Result<Option<(u64, String, u64)>> {
    // At least one character, or the beginning could never be filled to its last byte.
    let (from, mut bytes) = reader.read(offset, usize::try_from(want.max(4)).unwrap_or(usize::MAX))?;
    if !last || from + (bytes.len() as u64) < total {
        let whole = whole_characters(&bytes);
        // Nothing but a beginning, with more behind it: then it is none.
        if whole > 0 || !last {
            bytes.truncate(whole);
        }
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some((from, clean(&bytes), from + bytes.len() as u64)))
}

/// Length without an unfinished character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Ok(_) => bytes.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Something invalid further up: only an unfinished character within the last three bytes counts.
        Err(_) => (1..=3.min(bytes.len()))
            .map(|back| bytes.len() - back)
            .find(|&at| bytes[at] >= 0xC0 && std::str::from_utf8(&bytes[at..]).is_err_and(|e| e.error_len().is_none()))
            .unwrap_or(bytes.len()),
    }
}

/// Text that PostgreSQL takes: what is not UTF-8 as U+FFFD, NUL as its picture U+2400.
fn clean(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "\u{2400}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::logs::file::OutputWriter;

    type Row = (String, u64, Option<u64>);

    struct Log {
        dir: std::path::PathBuf,
        writer: OutputWriter,
        pieces: Pieces,
        rows: BTreeMap<i64, Row>,
    }

    impl Log {
        fn new(limit: u64, file_limit: u64) -> Log {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("buildreactor-pieces-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            let writer = OutputWriter::create(&dir, file_limit);
            Log { dir, writer, pieces: Pieces::new(limit, "FILE".into()), rows: BTreeMap::new() }
        }

        fn write(&mut self, bytes: &[u8]) -> &mut Self {
            self.writer.write(bytes);
            self
        }

        fn advance(&mut self, last: bool) -> String {
            for change in self.pieces.advance(&self.dir, last).unwrap() {
                match change {
                    LogChange::Put { seq, content, position, left_out } => {
                        self.rows.insert(seq, (content, position, left_out));
                    }
                    LogChange::Delete { first, last } => self.rows.retain(|seq, _| !(first..=last).contains(seq)),
                }
            }
            self.rows.values().map(|(content, ..)| content.as_str()).collect()
        }

        /// As a new daemon does.
        fn resume(&mut self) -> &mut Self {
            let piece = |(seq, (content, position, left_out)): (&i64, &Row)| LogPiece {
                seq: *seq,
                position: *position,
                left_out: *left_out,
                size: content.len() as u64,
            };
            let written: Vec<LogPiece> = self.rows.iter().map(piece).collect();
            self.pieces = Pieces::resume(self.pieces.half * 2, "FILE".into(), &written);
            self
        }
    }

    impl Drop for Log {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.dir).unwrap();
        }
    }

    /// Checks that head, marker and tail account for every byte.
    fn check(text: &str, all: &str, limit: usize) {
        let (head, rest) = text.split_once("\n[buildreactor: ").expect("a marker");
        let (number, rest) = rest.split_once(" bytes of output left out here; see FILE]\n").expect("a whole marker");
        let left_out: usize = number.parse().unwrap();
        assert!(!rest.contains("[buildreactor"), "one marker");
        assert!(all.starts_with(head));
        assert!(all.ends_with(rest));
        assert_eq!(head.len() + left_out + rest.len(), all.len());
        assert!(head.len() + rest.len() <= limit + (PIECE as usize) * 2, "{} {}", head.len(), rest.len());
    }

    fn lines(from: usize, to: usize) -> String {
        (from..to).map(|n| format!("{n:07}\n")).collect()
    }

    #[test]
    fn half_lines_and_progress_bars_arrive_as_they_are() {
        let mut log = Log::new(1 << 20, 1 << 30);
        assert_eq!(log.write(b"half a li").advance(false), "half a li");
        assert_eq!(log.write(b"ne\n10%\r20%\r").advance(false), "half a line\n10%\r20%\r");
        assert_eq!(log.advance(true), "half a line\n10%\r20%\r");
    }

    #[test]
    fn a_character_cut_in_two_is_put_together_and_garbage_is_replaced() {
        let mut log = Log::new(1 << 20, 1 << 30);
        assert_eq!(log.write("a\u{20ac}".as_bytes().split_last().unwrap().1).advance(false), "a");
        assert_eq!(log.write(b"\xac\0\xff!").advance(false), "a\u{20ac}\u{2400}\u{fffd}!");
        assert_eq!(log.write(b"\xe2\x82").advance(true), "a\u{20ac}\u{2400}\u{fffd}!\u{fffd}");
    }

    #[test]
    fn a_character_is_not_cut_where_two_pieces_meet_at_the_end() {
        let mut log = Log::new(1 << 20, 1 << 30);
        let all = "\u{20ac}".repeat(100_000);
        assert_eq!(log.write(all.as_bytes()).advance(true), all);
    }

    #[test]
    fn a_long_log_keeps_both_ends_and_the_marker_tells_the_truth_at_each_step() {
        let limit = 256 << 10;
        let mut log = Log::new(limit as u64, 1 << 30);
        let mut all = String::new();
        for step in 0..200 {
            let more = lines(step * 1000, (step + 1) * 1000);
            all.push_str(&more);
            let text = log.write(more.as_bytes()).advance(false);
            if all.len() > limit * 2 {
                check(&text, &all, limit);
            }
        }
        let text = log.advance(true);
        check(&text, &all, limit);
        assert!(text.len() >= limit);
    }

    #[test]
    fn a_flood_is_skipped_while_it_runs_and_its_end_is_complete() {
        let limit = 256 << 10;
        let mut log = Log::new(limit as u64, 1 << 30);
        let mut all = String::new();
        for step in 0..3 {
            let more = lines(step * 1_000_000, step * 1_000_000 + 300_000);
            all.push_str(&more);
            check(&log.write(more.as_bytes()).advance(false), &all, limit);
        }
        let text = log.write(b"the end\n").advance(true);
        all.push_str("the end\n");
        check(&text, &all, limit);
        assert!(text.len() >= limit, "{}", text.len());
        let before = text.clone();
        assert_eq!(log.advance(true), before, "a second end changes nothing");
    }

    #[test]
    fn what_the_file_left_out_counts_too() {
        let limit = 64 << 10;
        let mut log = Log::new(limit as u64, 128 << 10);
        let all = lines(0, 200_000);
        check(&log.write(all.as_bytes()).advance(true), &all, limit);
    }

    #[test]
    fn a_new_daemon_goes_on_where_the_last_one_ended_without_a_gap_or_a_repeat() {
        let limit = 256 << 10;
        // Short pieces, long ones, and a flood that is skipped; a new daemon after each.
        for lines_a_step in [10, 700, 20_000] {
            let mut log = Log::new(limit as u64, 1 << 30);
            let mut all = String::new();
            for step in 0..100 {
                let more = lines(step * lines_a_step, (step + 1) * lines_a_step);
                all.push_str(&more);
                let text = log.write(more.as_bytes()).resume().advance(false);
                if all.len() <= limit / 2 {
                    assert_eq!(text, all);
                } else if all.len() > limit * 2 {
                    check(&text, &all, limit);
                }
            }
            let text = log.resume().advance(true);
            if all.len() > limit {
                check(&text, &all, limit)
            } else {
                assert_eq!(text, all)
            }
            let again = log.resume().advance(true);
            assert_eq!(again, text);
        }
    }
}
