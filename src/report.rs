//! One way to print an error with its causes, one to say it once, and which characters of others' texts deceive a reader.

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

/// Characters without a shape of their own that turn, join or hide others, so that a text reads as another one: marks of direction
/// (U+202E and its kind), zero-width ones, fillers, tags, separators that only some programs take for a line end. Control characters
/// (`char::is_control`) are not among them. Of Unicode's Default_Ignorable_Code_Point and Bidi_Control, without the variation selectors
/// that emoji need (U+FE00 to U+FE0F).
pub fn deceives(c: char) -> bool {
    matches!(c,
        '\u{ad}'
        | '\u{34f}'
        | '\u{61c}'
        | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{3164}'
        | '\u{feff}'
        | '\u{ffa0}'
        | '\u{fff0}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}')
}
