//! Standard output and standard error of a command. `println!` and `eprintln!` panic when nobody reads them or the disk is full; these
//! don't.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::terminal::harmless_line;

/// Standard output, with errors that say so. A reader that has gone ([`is_closed_pipe`]) is no error of the command.
#[derive(Clone, Copy, Debug)]
pub struct Stdout;

/// A write to standard output failed.
#[derive(Debug)]
struct Unwritten(io::Error);

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "standard output cannot be written: {}", self.0)
    }
}

impl std::error::Error for Unwritten {}

/// Waits for a reader that is slow, also where somebody else who holds this file has made it non-blocking.
fn when_ready<T>(mut act: impl FnMut(&mut io::Stdout) -> io::Result<T>) -> io::Result<T> {
    let mut stdout = io::stdout();
    loop {
        match act(&mut stdout) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ready = poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            result => return result.map_err(unwritten),
        }
    }
}

fn unwritten(error: io::Error) -> io::Error {
    // `write_all` tries these again.
    if error.kind() == io::ErrorKind::Interrupted { error } else { io::Error::new(error.kind(), Unwritten(error)) }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        when_ready(|stdout| stdout.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        when_ready(Write::flush)
    }
}

/// Whether a command failed only because the reader of standard output has gone: the quiet end of `| head`.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        error.kind() == io::ErrorKind::BrokenPipe && error.get_ref().is_some_and(|inner| inner.is::<Unwritten>())
    })
}

/// Whether the reader of our stdout has gone. A write would tell as well, but a silent build has nothing to write.
pub fn stdout_is_closed() -> bool {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents().is_some_and(|events| events.intersects(gone))
}

/// A line on standard error, if anybody reads it.
pub fn note(line: &str) {
    let _read = writeln!(io::stderr(), "buildreactor: {}", harmless_line(line));
}
