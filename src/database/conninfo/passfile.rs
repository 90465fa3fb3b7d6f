//! The password file (PostgreSQL's manual, libpq, "The Password File"):
//! `host:port:database:user:password` a line, the first that matches counts.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Whose password is looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) dbname: &'a str,
    pub(super) user: &'a str,
}

/// The text of a password file; never printed.
pub(super) struct PassFile(String);

impl PassFile {
    /// Reads the file. `None` where there is none; one that cannot be used, because it is no plain
    /// file, is unreadable, or lets group or world in, is left out with a warning, as libpq does.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let shown = path.display();
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() => {
                tracing::warn!("password file `{shown}` is left out: it is not a plain file");
                None
            }
            Ok(meta) if meta.permissions().mode() & 0o077 != 0 => {
                tracing::warn!("password file `{shown}` is left out: others may read it; `chmod 600` it");
                None
            }
            Ok(_) => match fs::read_to_string(path) {
                Ok(content) => Some(Self(content)),
                Err(error) => {
                    tracing::warn!("password file `{shown}` is left out: {error}");
                    None
                }
            },
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
                    tracing::warn!("password file `{shown}` is left out: {error}");
                }
                None
            }
        }
    }

    /// The password of the first line that matches.
    pub(super) fn password(&self, wanted: Wanted<'_>) -> Option<String> {
        let port = wanted.port.to_string();
        self.0.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
            let rest = field(line, wanted.host)?;
            let rest = field(rest, &port)?;
            let rest = field(rest, wanted.dbname)?;
            Some(unescape(field(rest, wanted.user)?))
        })
    }
}

/// What follows the first field of `line`, if that field is `*` or, unescaped, `wanted`.
fn field<'a>(line: &'a str, wanted: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let mut wanted = wanted.chars();
    let mut chars = line.chars();
    loop {
        match chars.next()? {
            ':' => return wanted.next().is_none().then_some(chars.as_str()),
            '\\' => {
                if wanted.next() != Some(chars.next()?) {
                    return None;
                }
            }
            c => {
                if wanted.next() != Some(c) {
                    return None;
                }
            }
        }
    }
}

/// The last field: up to a bare `:`, with backslashes taken away.
fn unescape(text: &str) -> String {
    let mut password = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ':' => break,
            // A backslash at the very end stands for itself, as in libpq.
            '\\' => password.push(chars.next().unwrap_or('\\')),
            c => password.push(c),
        }
    }
    password
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(lines: &str) -> Option<String> {
        PassFile(lines.to_owned()).password(Wanted { host: "h", port: 5433, dbname: "a:b", user: r"o\k" })
    }

    #[test]
    fn the_first_matching_line_counts_and_stars_match_all() {
        for (lines, expected) in [
            (r"h:5433:a\:b:o\\k:secret", Some("secret")),
            ("*:*:*:*:any", Some("any")),
            ("*:5433:*:*:any\r\n", Some("any")),
            ("# h:*:*:*:no\n\nh:*:*:*:one\nh:*:*:*:two", Some("one")),
            ("other:*:*:*:no\nh:1:*:*:no\nh:5433:*:*:yes", Some("yes")),
            (r"h:*:*:*:co\:lon\\slash:rest", Some(r"co:lon\slash")),
            (r"h:*:*:*:end\", Some(r"end\")),
            ("h:*:*:*:", Some("")),
            ("h:5433:a:b:no", None),
            ("h*:*:*:*:no", None),
            ("h:*:*", None),
            ("", None),
        ] {
            assert_eq!(lookup(lines).as_deref(), expected, "{lines}");
        }
    }
}
