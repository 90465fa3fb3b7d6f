//! The log files of one attempt. The first half of the limit goes to `log`; what follows goes to segments `log.OFFSET`, of
//! which only the newest are kept, so that the end of a long log is there too. [`finish`] joins them with a marker.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Segments that hold the tail; with one more being written, at most `1 + 1 / SEGMENTS` of the tail's share is on disk.
const SEGMENTS: u64 = 4;

/// Name of the log in an attempt's folder.
pub const LOG: &str = "log";

/// Writes output; never fails towards the build: what cannot be written is counted and dropped.
pub struct OutputWriter {
    dir: PathBuf,
    head: u64,
    segment: u64,
    file: Option<File>,
    /// Offset of the first byte of the current file.
    start: u64,
    total: u64,
    error: Option<String>,
}

impl OutputWriter {
    /// Creates `log` in `dir`. `limit`: bytes to keep.
    pub fn create(dir: &Path, limit: u64) -> OutputWriter {
        let head = limit / 2;
        let mut writer = OutputWriter {
            dir: dir.to_owned(),
            head,
            segment: ((limit - head) / SEGMENTS).max(1),
            file: None,
            start: 0,
            total: 0,
            error: None,
        };
        writer.open(LOG.to_owned());
        writer
    }

    fn open(&mut self, name: String) {
        match super::private::open(OpenOptions::new().create(true).append(true), &self.dir.join(name)) {
            Ok(file) => self.file = Some(file),
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        self.file = None;
        self.error.get_or_insert_with(|| error.to_string());
    }

    /// Adds output.
    pub fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = if self.start == 0 { self.head } else { self.segment } - (self.total - self.start);
            if room == 0 {
                self.start = self.total;
                self.open(format!("{LOG}.{}", self.start));
                self.drop_old_segments();
                continue;
            }
            let part = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (now, rest) = bytes.split_at(part);
            if let Some(Err(error)) = self.file.as_mut().map(|file| file.write_all(now)) {
                self.fail(&error);
            }
            self.total += part as u64;
            bytes = rest;
        }
    }

    fn drop_old_segments(&mut self) {
        let keep_from = self.start.saturating_sub(self.segment * SEGMENTS);
        for (start, path) in segments(&self.dir).unwrap_or_default() {
            if start < keep_from
                && let Err(error) = std::fs::remove_file(path)
            {
                self.fail(&error);
            }
        }
    }

    /// Bytes of output so far, and the first error that kept some of it off the disk.
    pub fn end(self) -> (u64, Option<String>) {
        (self.total, self.error)
    }
}

/// Tail segments in `dir`, by the offset of their first byte.
fn segments(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let offset = name.to_str().and_then(|name| name.strip_prefix("log.")).and_then(|offset| offset.parse().ok());
        if let Some(offset) = offset {
            found.push((offset, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads the output of an attempt that may still be writing.
pub struct OutputReader {
    dir: PathBuf,
}

impl OutputReader {
    /// Of the attempt in `dir`.
    pub fn new(dir: &Path) -> OutputReader {
        OutputReader { dir: dir.to_owned() }
    }

    /// Bytes of output written so far.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn total(&self) -> io::Result<u64> {
        // A segment may be dropped between the listing and the look; then there is a newer one.
        for _ in 0..3 {
            let newest = segments(&self.dir)?.pop();
            let (start, path) = newest.unwrap_or_else(|| (0, self.dir.join(LOG)));
            match std::fs::metadata(path) {
                Ok(metadata) => return Ok(start + metadata.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Up to `max` bytes from `offset` on, and the offset that they really start at: later than asked where that part has
    /// been left out. Empty at the end.
    ///
    /// # Errors
    /// The files cannot be read.
    pub fn read(&self, offset: u64, max: usize) -> io::Result<(u64, Vec<u8>)> {
        let mut files = vec![(0, self.dir.join(LOG))];
        files.extend(segments(&self.dir)?);
        let mut bytes = Vec::new();
        let mut from = offset;
        for (start, path) in files {
            let mut file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let end = start + file.metadata()?.len();
            if end <= from {
                continue;
            }
            if start > from {
                if !bytes.is_empty() {
                    break;
                }
                from = start;
            }
            file.seek(SeekFrom::Start(from - start))?;
            let before = bytes.len();
            file.take((max - before) as u64).read_to_end(&mut bytes)?;
            from += (bytes.len() - before) as u64;
            if bytes.len() >= max {
                break;
            }
        }
        Ok((from - bytes.len() as u64, bytes))
    }
}

/// Joins head and tail of an ended attempt into the one file `log`, with a marker in between that says how many bytes are
/// left out. Nothing to do for a log within the limit, or a second time.
///
/// # Errors
/// The files cannot be read or written; they stay as they are.
pub fn finish(dir: &Path) -> io::Result<()> {
    let tail = segments(dir)?;
    let Some((first, _)) = tail.first() else { return Ok(()) };
    let mut log = OpenOptions::new().append(true).open(dir.join(LOG))?;
    let head = log.metadata()?.len();
    let joined = join(&mut log, first.saturating_sub(head), &tail);
    if joined.is_err() {
        // A full disk, perhaps. What is joined in part would be joined twice.
        log.set_len(head)?;
    }
    joined?;
    for (_, path) in tail {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

fn join(log: &mut File, left_out: u64, tail: &[(u64, PathBuf)]) -> io::Result<()> {
    if left_out > 0 {
        log.write_all(marker(left_out).as_bytes())?;
    }
    for (_, path) in tail {
        io::copy(&mut File::open(path)?, log)?;
    }
    Ok(())
}

/// The line that stands where output was left out.
pub fn marker(bytes: u64) -> String {
    format!("\n[buildreactor: {bytes} bytes of output left out here]\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = std::env::temp_dir().join(format!(
            "buildreactor-output-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_short_log_is_one_file() {
        let dir = folder();
        let mut writer = OutputWriter::create(&dir, 100);
        writer.write(b"hello ");
        writer.write(b"world");
        let reader = OutputReader::new(&dir);
        assert_eq!(reader.total().unwrap(), 11);
        assert_eq!(reader.read(6, 100).unwrap(), (6, b"world".to_vec()));
        assert_eq!(writer.end(), (11, None));
        finish(&dir).unwrap();
        assert_eq!(std::fs::read(dir.join(LOG)).unwrap(), b"hello world");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_middle_of_a_long_log_is_left_out_and_counted() {
        let dir = folder();
        let all: Vec<u8> = (0..1000u32).flat_map(|n| format!("{n:09}\n").into_bytes()).collect();
        let mut writer = OutputWriter::create(&dir, 2000);
        for part in all.chunks(77) {
            writer.write(part);
        }
        let reader = OutputReader::new(&dir);
        assert_eq!(reader.total().unwrap(), 10_000);
        let (from, bytes) = reader.read(9_990, 100).unwrap();
        assert_eq!((from, bytes.as_slice()), (9_990, &all[9_990..]));
        let (from, bytes) = reader.read(5_000, 100_000).unwrap();
        assert!(from > 5_000 && bytes.len() >= 1000, "{from} {}", bytes.len());
        assert_eq!(bytes, all[usize::try_from(from).unwrap()..]);
        finish(&dir).unwrap();
        let log = std::fs::read(dir.join(LOG)).unwrap();
        let text = String::from_utf8(log).unwrap();
        let left_out = from - 1000;
        let expected = format!(
            "{}{}{}",
            std::str::from_utf8(&all[..1000]).unwrap(),
            marker(left_out),
            std::str::from_utf8(&all[usize::try_from(from).unwrap()..]).unwrap()
        );
        assert_eq!(text, expected);
        assert!(log_is_alone(&dir));
        std::fs::remove_dir_all(dir).unwrap();
    }

    fn log_is_alone(dir: &Path) -> bool {
        std::fs::read_dir(dir).unwrap().count() == 1
    }
}
