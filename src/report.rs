//! One way to print an error with its causes, and one to say it once.

use std::error::Error;
use std::fmt;

/// Displays an error and all its causes on one line. A bare `tokio_postgres::Error` prints just `db error`; its cause
/// holds the server's words.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many errors repeat their cause's text in their own.
            if !last.contains(&text) {
                write!(f, ": {text}")?;
                last = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

/// A trouble of something that is tried again and again: said once, until it has worked in between.
#[derive(Debug, Default)]
pub struct Trouble {
    known: bool,
}

impl Trouble {
    /// It has failed. True: for the first time since it last worked.
    pub fn is_new(&mut self) -> bool {
        !std::mem::replace(&mut self.known, true)
    }

    /// It has worked.
    pub fn is_over(&mut self) {
        self.known = false;
    }
}
