//! Text of others made fit for a mail: no control characters, no tricks with direction or width, not endless.

use std::time::Duration;

use crate::report::deceives;

/// The most of the end of a log, in bytes.
const LOG: usize = 32 << 10;
/// The most of one of its lines, in characters.
const LINE: usize = 500;

/// One line of at most `most` characters; any white space is one space.
pub fn clean_line(text: &str, most: usize) -> String {
    let mut clean = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !clean.is_empty() {
            clean.push(' ');
        }
        clean.extend(word.chars().filter(|c| !tricks(*c)));
    }
    cut(clean, most)
}

/// The last `most` lines of a log as a terminal would show them: of a progress bar what came last, without colours.
pub fn last_lines(log: &str, most: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut room = LOG;
    for line in log.trim_end().lines().rev().take(most) {
        let line = line.trim_end_matches('\r').rsplit('\r').next().unwrap_or_default();
        let line = cut(without_escapes(line), LINE);
        let Some(left) = room.checked_sub(line.len() + 1) else { break };
        room = left;
        lines.push(line);
    }
    lines.reverse();
    lines.join("\n")
}

/// `2 h 3 min`, `3 min 12 s`, `1.2 s`, `250 ms`: two units at most.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..=9 => format!("{:.1} s", time.as_secs_f64()),
        10..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..=86_399 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Characters that could show a text as another, but the two that only join letters and emoji.
fn tricks(c: char) -> bool {
    deceives(c) && !matches!(c, '\u{200c}' | '\u{200d}')
}

fn cut(text: String, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// Without the sequences of ECMA-48 (colours, cursor, titles) and other control characters but tabs.
fn without_escapes(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // Ends with a letter or one of @[\]^_`{|}~.
                Some('[') => drop(chars.find(|c| ('@'..='~').contains(c))),
                // A title, for example; ends with BEL or ESC \.
                Some(']' | 'P' | '_' | '^' | 'X') => {
                    let end = chars.find(|c| matches!(c, '\u{7}' | '\u{1b}'));
                    if end == Some('\u{1b}') {
                        chars.next();
                    }
                }
                _ => {}
            },
            '\t' => clean.push(c),
            c if c.is_control() || tricks(c) => {}
            c => clean.push(c),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_whatever_is_in_it() {
        assert_eq!(clean_line(" a\r\nBcc: x\t\u{0}y\u{2028}z ", 100), "a Bcc: x y z");
        assert_eq!(clean_line("שלום \u{202e}🎉<b>", 100), "שלום 🎉<b>");
        assert_eq!(clean_line("p\u{200b}a\u{61c}y\u{2060}p\u{ad}al\u{e0041}", 100), "paypal");
        assert_eq!(
            clean_line("نمی\u{200c}خواهم 👩\u{200d}💻 ✔\u{fe0f}", 100),
            "نمی\u{200c}خواهم 👩\u{200d}💻 ✔\u{fe0f}"
        );
        assert_eq!(clean_line(&"x".repeat(10_000), 10), format!("{}...", "x".repeat(10)));
        assert_eq!(clean_line("\n", 3), "");
    }

    #[test]
    fn the_end_of_a_log_is_what_a_terminal_would_show() {
        let log = "first\n\u{1b}[1;31mred\u{1b}[0m\r\n10%\r50%\r100%\n\u{1b}]0;title\u{7}end\u{8}\n\n";
        assert_eq!(last_lines(log, 3), "red\n100%\nend");
        assert_eq!(last_lines(log, 0), "");
        assert_eq!(last_lines("", 5), "");
        let long = "y".repeat(600) + "\n";
        let shown = last_lines(&long.repeat(1000), 1000);
        assert!(shown.len() <= LOG && shown.len() > LOG - 600, "{}", shown.len());
    }

    #[test]
    fn spans_are_for_people() {
        let shown = [0.25, 9.96, 59.9, 192.0, 7380.0, 90_000.0].map(|s| span(Duration::from_secs_f64(s)));
        assert_eq!(shown, ["250 ms", "10.0 s", "59 s", "3 min 12 s", "2 h 3 min", "1 d 1 h"]);
    }
}
