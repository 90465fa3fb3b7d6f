//! The connection service file (PostgreSQL's manual, libpq, "The Connection Service File").

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::{ConnInfoError, Origin};

/// One line of a service's section.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) key: String,
    pub(super) value: String,
}

/// A service somebody asked for, and where that was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) name: &'a str,
    pub(super) origin: &'a Origin,
}

/// Where to look: a file that was named, which must exist, then the usual ones.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) named: Option<(PathBuf, Origin)>,
    pub(super) usual: Vec<PathBuf>,
}

/// Finds the service's section in the first file that has it.
///
/// # Errors
/// A named file that cannot be read, a line that is not `key=value`, no section of that name.
pub(super) fn find(asked: Asked<'_>, files: &Files) -> Result<(PathBuf, Vec<Line>), ConnInfoError> {
    let named = files.named.as_ref();
    let candidates = named
        .map(|(path, origin)| (path, origin))
        .into_iter()
        .chain(files.usual.iter().map(|path| (path, &Origin::Default)));
    for (path, origin) in candidates {
        let content = match fs::read_to_string(path) {
            Ok(content) => content,
            Err(error) if *origin == Origin::Default && is_absent(&error) => continue,
            Err(error) => {
                return Err(ConnInfoError::File {
                    origin: origin.clone(),
                    what: "service file",
                    path: path.clone(),
                    advice: "it must be a text file that this user can read",
                    source: Some(error.into()),
                });
            }
        };
        if let Some(lines) = section(&content, asked.name, path)? {
            return Ok((path.clone(), lines));
        }
    }
    let searched: Vec<String> = named
        .map(|(path, _)| path)
        .into_iter()
        .chain(&files.usual)
        .map(|path| format!("`{}`", path.display()))
        .collect();
    Err(ConnInfoError::ServiceNotFound {
        origin: asked.origin.clone(),
        name: asked.name.to_owned(),
        searched: searched.join(" or "),
    })
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The lines of `[name]`, up to the next section; `None` where there is no such section.
fn section(content: &str, name: &str, path: &Path) -> Result<Option<Vec<Line>>, ConnInfoError> {
    let mut found: Option<Vec<Line>> = None;
    for (index, line) in content.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            let named = header.strip_prefix(name);
            found = named.is_some_and(|rest| rest.starts_with(']')).then(Vec::new);
            continue;
        }
        let Some(lines) = &mut found else { continue };
        let number = index + 1;
        let wrong = |problem: &str| ConnInfoError::Syntax {
            origin: Origin::Service { name: name.into(), file: path.into(), line: number },
            problem: problem.to_owned(),
        };
        let (key, value) = line.split_once('=').ok_or_else(|| wrong("the line is not `key=value`"))?;
        // libpq would take `host ` for a key of its own; say so rather than accept what psql won't.
        if key.ends_with(char::is_whitespace) {
            return Err(wrong("there is a space before the `=`; write `key=value`"));
        }
        if matches!(key, "service" | "servicefile") {
            return Err(wrong("a service cannot refer to another service"));
        }
        lines.push(Line { number, key: key.to_owned(), value: value.to_owned() });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# farm\n[farm-old]\nhost=old\n\n[farm]\n  host=db.example\nport=5433\n\
                        options=-c search_path=farm\n# x\n[other]\nhost=no\nbroken\n";

    fn lines(name: &str) -> Result<Option<Vec<(usize, String)>>, String> {
        section(FILE, name, Path::new("/f"))
            .map(|found| {
                found.map(|lines| {
                    let shown = |l: Line| (l.number, format!("{}={}", l.key, l.value));
                    lines.into_iter().map(shown).collect()
                })
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_section_ends_where_the_next_begins() {
        let farm = lines("farm").unwrap().unwrap();
        assert_eq!(farm[0], (6, "host=db.example".to_owned()));
        assert_eq!(farm[2], (8, "options=-c search_path=farm".to_owned()));
        assert_eq!(farm.len(), 3);
        assert_eq!(lines("far"), Ok(None));
    }

    #[test]
    fn a_broken_line_is_named_by_its_number_and_not_repeated() {
        let said = lines("other").unwrap_err();
        assert_eq!(said, "service `other` in `/f` line 12: the line is not `key=value`");
    }
}
