//! Text of builds and of other people, made fit for a terminal. Colours pass; whatever else could move the cursor, clear the screen, set
//! a title, write to the clipboard, or show a text as another one is shown in a form that can be seen: `^[` for ESC, `^G` for BEL, as
//! `less -R` does, and `<U+202E>` for what has no caret form.
//!
//! Nothing but SGR passes, so only SGR has to be understood: a parser of all of ECMA-48, such as the crate vte, would parse sequences
//! whose bytes are shown here one by one.

use std::fmt::Write;

use crate::report::deceives;

/// Longest parameters of a colour that is passed, bytes. Each of the 16 attributes that ECMA-48 knows, with a colour of 24 bits for text and ground.
const LONGEST: usize = 100;

/// A text that comes in pieces. State is kept between them: a sequence may be cut in two.
#[derive(Debug, Default)]
pub struct Screen {
    state: State,
    /// A colour or other attribute is on.
    coloured: bool,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// After so many CR: at a line end they are part of it, else they would let what follows overwrite the line.
    Returns(usize),
    /// After ESC.
    Escape,
    /// After ESC [ and these parameters.
    Parameters(String),
}

impl Screen {
    /// What to print of the next piece. The beginning of a sequence at its end comes with the piece after it.
    pub fn show(&mut self, piece: &str) -> String {
        let mut shown = String::with_capacity(piece.len());
        for c in piece.chars() {
            self.next(c, &mut shown);
        }
        shown
    }

    /// What to print after the last piece, or before words of our own: what was held back, and colours off.
    pub fn end(&mut self) -> String {
        let mut shown = String::new();
        self.break_off(&mut shown);
        if std::mem::take(&mut self.coloured) {
            shown.push_str("\u{1b}[0m");
        }
        shown
    }

    fn next(&mut self, c: char, shown: &mut String) {
        match (&mut self.state, c) {
            (State::Returns(_), '\n') => self.state = State::Text,
            (State::Returns(count), '\r') => {
                *count += 1;
                return;
            }
            (State::Escape, '[') => {
                self.state = State::Parameters(String::new());
                return;
            }
            (State::Parameters(text), '0'..='9' | ';' | ':') if text.len() < LONGEST => {
                text.push(c);
                return;
            }
            (State::Parameters(text), 'm') if !conceals(text) => {
                self.coloured = !matches!(text.as_str(), "" | "0");
                let _infallible = write!(shown, "\u{1b}[{text}m");
                self.state = State::Text;
                return;
            }
            // Erase to the end of the line. Compilers print it after each colour; where lines only grow nothing is there.
            (State::Parameters(text), 'K') if matches!(text.as_str(), "" | "0") => {
                self.state = State::Text;
                return;
            }
            (State::Returns(_) | State::Escape | State::Parameters(_), _) => self.break_off(shown),
            (State::Text, _) => {}
        }
        match c {
            '\r' => self.state = State::Returns(1),
            '\u{1b}' => self.state = State::Escape,
            '\n' | '\t' => shown.push(c),
            c => push_visibly(c, shown),
        }
    }

    /// Shows what was held back: it is no sequence that passes.
    fn break_off(&mut self, shown: &mut String) {
        match std::mem::take(&mut self.state) {
            State::Text => {}
            // What would overwrite the line follows below it.
            State::Returns(count) => {
                shown.push_str(&"^M".repeat(count));
                shown.push('\n');
            }
            State::Escape => shown.push_str("^["),
            State::Parameters(text) => {
                let _infallible = write!(shown, "^[[{text}");
            }
        }
    }
}

/// Whether SGR with these parameters hides text (8), which is no colour.
fn conceals(parameters: &str) -> bool {
    let mut all = parameters.split(';').map(|one| one.trim_start_matches('0'));
    while let Some(one) = all.next() {
        match one {
            one if one.split(':').next() == Some("8") => return true,
            // A colour follows: of a palette, or red, green and blue.
            "38" | "48" | "58" => match all.next() {
                Some("5") => drop(all.next()),
                Some("2") => drop(all.nth(2)),
                // Not ours to guess what a terminal makes of the rest.
                Some(_) => return true,
                None => {}
            },
            _ => {}
        }
    }
    false
}

/// Whole lines of text, each one fit for a terminal. Without colours: for errors and notes, which have none.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            c => push_visibly(c, &mut shown),
        }
    }
    shown
}

/// One line of text; white space and control characters are blanks.
pub fn harmless_line(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.trim().chars() {
        push_visibly(if c.is_control() { ' ' } else { c }, &mut shown);
    }
    shown
}

fn push_visibly(c: char, shown: &mut String) {
    let _infallible = match c {
        '\0'..='\u{1f}' | '\u{7f}' => write!(shown, "^{}", char::from(u8::try_from(c).unwrap_or(0) ^ 0x40)),
        c if c.is_control() || deceives(c) => write!(shown, "<U+{:04X}>", u32::from(c)),
        c => shown.write_char(c),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of pieces and at their end.
    fn shown(pieces: &[&str]) -> String {
        let mut screen = Screen::default();
        let all: String = pieces.iter().map(|piece| screen.show(piece)).collect();
        all + &screen.end()
    }

    const SAME: &[&str] = &[
        "plain\ttext\n",
        "Grüße, שלום, سلام, 日本語, ✔️ 🎉 e\u{301}\n",
        "\u{1b}[31mred\u{1b}[0m",
        "\u{1b}[1;38;5;8mgrey 8\u{1b}[m",
        "\u{1b}[38;2;8;8;8;48;2;0;8;0mrgb\u{1b}[0m",
        "\u{1b}[38:2::8:8:8mrgb with colons\u{1b}[0m",
        "\u{1b}[4:3mcurly\u{1b}[0m",
    ];

    const OTHERS: &[(&str, &str)] = &[
        // Titles, clipboard, links, notifications: BEL, ST, C1 or no end at all.
        ("\u{1b}]0;title\u{7}x", "^[]0;title^Gx"),
        ("\u{1b}]52;c;aGk=\u{1b}\\x", "^[]52;c;aGk=^[\\x"),
        ("\u{1b}]8;;http://evil\u{1b}\\bank\u{1b}]8;;\u{1b}\\", "^[]8;;http://evil^[\\bank^[]8;;^[\\"),
        ("\u{9d}0;title\u{9c}x", "<U+009D>0;title<U+009C>x"),
        ("\u{1b}]0;endless", "^[]0;endless"),
        // Screen and cursor.
        ("\u{1b}[2J\u{1b}[H\u{1b}[1A\u{1b}[2K", "^[[2J^[[H^[[1A^[[2K"),
        ("\u{1b}[?1049h\u{1b}[?25l\u{1b}[6n\u{1b}[c", "^[[?1049h^[[?25l^[[6n^[[c"),
        ("\u{1b}c\u{1b}7\u{1b}(0\u{1b}#8\u{1b}P1$r\u{1b}\\", "^[c^[7^[(0^[#8^[P1$r^[\\"),
        ("\u{9b}2J\u{9b}31m", "<U+009B>2J<U+009B>31m"),
        // What only looks like a colour: xterm's modifiers, a question, an intermediate byte, text that is hidden.
        ("\u{1b}[>4;2m\u{1b}[?4m\u{1b}[1 m", "^[[>4;2m^[[?4m^[[1 m"),
        ("\u{1b}[8mhidden\u{1b}[1;08mtoo\u{1b}[38;5;1;8mand", "^[[8mhidden^[[1;08mtoo^[[38;5;1;8mand"),
        ("\u{1b}[38;9;1m", "^[[38;9;1m"),
        // Sequences within sequences, and control characters in them.
        ("\u{1b}\u{1b}[31m\u{1b}[0m", "^[\u{1b}[31m\u{1b}[0m"),
        ("\u{1b}[3\u{1b}[31m\u{1b}[0m", "^[[3\u{1b}[31m\u{1b}[0m"),
        ("\u{1b}[3\u{7}1m", "^[[3^G1m"),
        ("\u{1b}[3\n1m", "^[[3\n1m"),
        // Control characters.
        ("a\u{8}\u{8}b\u{b}c\u{c}d\u{e}e\u{7f}f\u{0}g\u{85}h", "a^H^Hb^Kc^Ld^Ne^?f^@g<U+0085>h"),
        // Directions, zero width, fillers, tags, line ends of some programs.
        ("a\u{202e}b\u{2066}c\u{200b}d\u{feff}e\u{61c}f", "a<U+202E>b<U+2066>c<U+200B>d<U+FEFF>e<U+061C>f"),
        ("\u{2028}\u{2029}\u{ad}\u{3164}\u{e0041}", "<U+2028><U+2029><U+00AD><U+3164><U+E0041>"),
        // Lines that would be overwritten; line ends of other systems.
        ("10%\r20%\rdone\r\n", "10%^M\n20%^M\ndone\n"),
        ("a\r\r\nb\r\rc", "a\nb^M^M\nc"),
        ("rm -rf /\r\u{1b}[Kecho harmless", "rm -rf /^M\necho harmless"),
        // Compilers.
        ("\u{1b}[01m\u{1b}[Kx.c:1\u{1b}[m\u{1b}[K\n", "\u{1b}[01mx.c:1\u{1b}[m\n"),
        // Colours end with the text.
        ("\u{1b}[31mred", "\u{1b}[31mred\u{1b}[0m"),
        ("\u{1b}[0;7mturned", "\u{1b}[0;7mturned\u{1b}[0m"),
    ];

    #[test]
    fn colours_pass_and_everything_else_is_shown() {
        let same = SAME.iter().map(|text| (*text, *text));
        for (text, expected) in same.chain(OTHERS.iter().copied()) {
            assert_eq!(shown(&[text]), expected, "{text:?}");
        }
    }

    #[test]
    fn it_does_not_matter_where_a_text_is_cut() {
        let same = SAME.iter().map(|text| (*text, *text));
        for (text, expected) in same.chain(OTHERS.iter().copied()) {
            let single: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(shown(&single.iter().map(String::as_str).collect::<Vec<_>>()), expected, "{text:?}");
            for (at, _) in text.char_indices() {
                let (first, second) = text.split_at(at);
                assert_eq!(shown(&[first, second]), expected, "{first:?} {second:?}");
            }
        }
    }

    #[test]
    fn endless_parameters_are_not_held_back() {
        let mut screen = Screen::default();
        let text = screen.show(&format!("\u{1b}[{}", "1;".repeat(100_000)));
        assert!(text.starts_with("^[[1;1;") && text.len() > 200_000 - LONGEST, "{}", text.len());
    }

    #[test]
    fn a_line_is_one_line() {
        assert_eq!(harmless_line(" a\u{1b}[31mb\r\nc\u{202e}d\u{9b}e "), "a [31mb  c<U+202E>d e");
        assert_eq!(harmless("a\u{1b}[31mb\nc\u{202e}\rd\u{9b}"), "a^[[31mb\nc<U+202E>^Md<U+009B>");
    }
}
