//! Finds the machine's own server binaries.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::EmbeddedError;
use crate::config::without_secrets;

/// Names the folder to look in first.
const VARIABLE: &str = "BUILDREACTOR_PG_BIN";
/// Major versions this project is tested with.
const OLDEST: u32 = 14;
const NEWEST: u32 = 18;

/// Where packages put servers beside `PATH`; one `*` in a component. In this order, the highest version of each first.
const PATTERNS: [&str; 11] = [
    "/usr/lib/postgresql/*/bin",                          // Debian, Ubuntu
    "/usr/pgsql-*/bin",                                   // postgresql.org's packages for Fedora, RHEL, SUSE
    "/usr/lib/postgresql*/bin",                           // openSUSE
    "/usr/libexec/postgresql*",                           // Alpine
    "/usr/lib64/postgresql-*/bin",                        // Gentoo
    "/usr/lib64/pgsql*/bin",                              // Slackware
    "/usr/local/pgsql/bin",                               // built from source
    "/opt/homebrew/opt/postgresql@*/bin",                 // Homebrew
    "/usr/local/opt/postgresql@*/bin",                    // Homebrew on Intel
    "/opt/local/lib/postgresql*/bin",                     // MacPorts
    "/Applications/Postgres.app/Contents/Versions/*/bin", // Postgres.app
];

/// A folder with `initdb` and `postgres` side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    pub dir: PathBuf,
    /// Major and minor version; a beta or release candidate has minor 0.
    pub version: (u32, u32),
}

impl Binaries {
    /// Looks at one folder. Error: a program is missing, doesn't run, or is older than 14.
    pub fn at(dir: &Path) -> Result<Binaries, EmbeddedError> {
        let dir = std::path::absolute(dir).map_err(EmbeddedError::folder("resolve", dir))?;
        let bad = |reason: String| EmbeddedError::BadBinaries { dir: dir.clone(), reason };
        for name in ["initdb", "postgres"] {
            if !dir.join(name).is_file() {
                return Err(bad(format!("there is no `{name}` in it")));
            }
        }
        // Asking for the version is the one thing `postgres` does for root too.
        let output = without_secrets(&mut Command::new(dir.join("postgres")))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| bad(format!("`postgres --version` does not run: {error}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(version) = parse_version(&text) else {
            let complaint = String::from_utf8_lossy(&output.stderr);
            return Err(bad(format!("`postgres --version` said `{}{}`", text.trim(), complaint.trim())));
        };
        if version.0 < OLDEST {
            return Err(bad(format!("it is PostgreSQL {}, and {OLDEST} or newer is needed", version.0)));
        }
        // A link such as Alpine's /usr/bin/postgres: the other programs are where it leads.
        let home = dir.join("postgres").canonicalize().ok();
        let home = home.as_deref().and_then(Path::parent).filter(|home| home.join("initdb").is_file());
        let dir = home.map_or(dir.clone(), Path::to_owned);
        Ok(Binaries { dir, version })
    }
}

/// The server binaries to use: `BUILDREACTOR_PG_BIN`, then `PATH` (`initdb` and `postgres` next to each other), then
/// `pg_config --bindir`, then where distributions put them, highest version first. Versions newer than this project
/// knows come last, with a warning. Error: none, with the places looked at and what to install.
pub fn find_binaries() -> Result<Binaries, EmbeddedError> {
    Places::of_this_machine().search(None).map_err(|miss| miss.error(None))
}

/// Like [`find_binaries`], of this major version: that of the data in `data`, which no other can read.
pub(super) fn find_binaries_for(data: &Path, major: u32) -> Result<Binaries, EmbeddedError> {
    Places::of_this_machine().search(Some(major)).map_err(|miss| miss.error(Some((data, major))))
}

/// Where to look; a value, so that tests can look at a pretended machine.
struct Places {
    /// The value of [`VARIABLE`].
    named: Option<PathBuf>,
    path: OsString,
    /// Put in front of [`PATTERNS`].
    root: PathBuf,
}

enum Miss {
    /// Looked here and found nothing that suits.
    Nothing { looked: Vec<String> },
    /// What the user named is no such folder: say so, don't take another.
    Named(EmbeddedError),
}

impl Miss {
    fn error(self, data: Option<(&Path, u32)>) -> EmbeddedError {
        match (self, data) {
            (Miss::Named(error), _) => error,
            (Miss::Nothing { looked }, None) => EmbeddedError::NoBinaries { looked: looked.join(", ") },
            (Miss::Nothing { looked }, Some((dir, needs))) => {
                EmbeddedError::WrongVersion { dir: dir.to_owned(), needs, looked: looked.join(", ") }
            }
        }
    }
}

impl Places {
    fn of_this_machine() -> Places {
        Places {
            named: std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from),
            path: std::env::var_os("PATH").unwrap_or_default(),
            root: PathBuf::from("/"),
        }
    }

    /// The first that suits: of the wanted major version, else any we know. Stops looking when it has one, because
    /// each look runs a program.
    fn search(&self, wanted: Option<u32>) -> Result<Binaries, Miss> {
        let mut looked = Vec::new();
        if let Some(dir) = &self.named {
            let found = Binaries::at(dir).map_err(Miss::Named)?;
            match wanted {
                Some(major) if major != found.version.0 => {
                    looked.push(format!("{VARIABLE} `{}` ({})", dir.display(), found.version.0));
                }
                Some(_) | None => return Ok(warned(found)),
            }
        } else {
            looked.push(format!("{VARIABLE} (not set)"));
        }

        let mut seen = BTreeSet::new();
        let mut too_new = None;
        let path = std::env::split_paths(&self.path).map(|dir| ("PATH", vec![dir]));
        let asked = std::iter::once_with(|| ("`pg_config --bindir`", self.pg_config().into_iter().collect()));
        let usual = PATTERNS.iter().map(|pattern| (*pattern, expand(&self.root, pattern)));
        for (place, dirs) in path.chain(asked).chain(usual) {
            let mut found: Vec<Binaries> = dirs
                .iter()
                .filter(|dir| dir.is_absolute() && dir.join("initdb").is_file() && dir.join("postgres").is_file())
                .filter(|dir| seen.insert(dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf())))
                .filter_map(|dir| match Binaries::at(dir) {
                    Ok(found) => Some(found),
                    Err(error) => {
                        looked.push(error.to_string());
                        None
                    }
                })
                .collect();
            found.sort_by_key(|one| std::cmp::Reverse(one.version));
            for one in found {
                let major = one.version.0;
                match wanted {
                    Some(wanted) if wanted == major => return Ok(warned(one)),
                    Some(_) => looked.push(format!("`{}` ({major})", one.dir.display())),
                    None if major <= NEWEST => return Ok(one),
                    None => too_new = too_new.or(Some(one)),
                }
            }
            if looked.last().is_none_or(|last| last != place) {
                looked.push(place.to_owned());
            }
        }
        too_new.map(warned).ok_or(Miss::Nothing { looked })
    }

    /// The folder `pg_config` names, if there is one on `PATH`: of a server, or only of the client's headers.
    fn pg_config(&self) -> Option<PathBuf> {
        let program =
            std::env::split_paths(&self.path).map(|dir| dir.join("pg_config")).find(|program| program.is_file())?;
        let mut command = Command::new(program);
        let output = without_secrets(&mut command).arg("--bindir").stdin(Stdio::null()).output().ok()?;
        let dir = String::from_utf8(output.stdout).ok()?;
        Some(PathBuf::from(dir.trim())).filter(|dir| dir.is_absolute())
    }
}

fn warned(found: Binaries) -> Binaries {
    if found.version.0 > NEWEST {
        tracing::warn!(
            postgresql.version = found.version.0,
            "PostgreSQL {} in `{}` is newer than the newest this program is tested with, {NEWEST}",
            found.version.0,
            found.dir.display(),
        );
    }
    found
}

/// `postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)`, `postgres (PostgreSQL) 19beta1`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let number = |part: &str| {
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part.get(..digits)?.parse().ok()
    };
    let (major, minor) = version.split_once('.').unwrap_or((version, "0"));
    Some((number(major)?, number(minor).unwrap_or(0)))
}

/// The folders a pattern stands for.
fn expand(root: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut dirs = vec![root.to_owned()];
    for component in pattern.split('/').filter(|component| !component.is_empty()) {
        dirs = match component.split_once('*') {
            None => dirs.into_iter().map(|dir| dir.join(component)).collect(),
            Some((start, end)) => dirs
                .iter()
                .filter_map(|dir| std::fs::read_dir(dir).ok())
                .flat_map(|entries| entries.flatten())
                .filter(|entry| {
                    let name = entry.file_name();
                    let name = name.to_string_lossy();
                    name.strip_prefix(start).is_some_and(|rest| rest.ends_with(end))
                })
                .map(|entry| entry.path())
                .collect(),
        };
    }
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with these servers, as small scripts that only know their version.
    fn machine(servers: &[(&str, &str)]) -> PathBuf {
        let root = nix::unistd::mkdtemp("/tmp/buildreactor-test-XXXXXX").unwrap();
        for (dir, version) in servers {
            let dir = root.join(dir);
            std::fs::create_dir_all(&dir).unwrap();
            for name in ["initdb", "postgres"] {
                // Written by another process: were it us, a fork of another test's thread could hold the file open
                // for writing while we run it, which fails with "Text file busy".
                let script = format!("#!/bin/sh\necho '{name} (PostgreSQL) {version}'");
                let write = r#"printf '%s\n' "$1" > "$2" && chmod 755 "$2""#;
                let mut command = Command::new("/bin/sh");
                command.args(["-c", write, "sh", &script]).arg(dir.join(name));
                assert!(command.status().unwrap().success());
            }
        }
        root
    }

    fn search(root: &Path, path: &str, named: Option<&str>, wanted: Option<u32>) -> Result<(u32, u32), String> {
        let places = Places {
            named: named.map(|dir| root.join(dir)),
            path: if path.is_empty() { OsString::new() } else { root.join(path).into() },
            root: root.to_owned(),
        };
        let data = wanted.map(|major| (Path::new("/srv/pg"), major));
        let found = places.search(wanted).map_err(|miss| miss.error(data).to_string());
        found.map(|found| found.version)
    }

    #[test]
    fn the_named_folder_wins_then_path_then_the_highest_known_version() {
        let root = machine(&[
            ("mine", "14.1"),
            ("usr/bin", "16.4"),
            ("usr/lib/postgresql/9.6/bin", "9.6.24"),
            ("usr/lib/postgresql/15/bin", "15.20 (Debian 15.20-0+deb12u1)"),
            ("usr/lib/postgresql/18/bin", "18.4"),
            ("usr/lib/postgresql/19/bin", "19beta1"),
            ("usr/pgsql-17/bin", "17.10"),
        ]);
        assert_eq!(search(&root, "usr/bin", Some("mine"), None), Ok((14, 1)));
        assert_eq!(search(&root, "usr/bin", None, None), Ok((16, 4)));
        assert_eq!(search(&root, "", None, None), Ok((18, 4)));
        assert_eq!(search(&root, "usr/bin", Some("mine"), Some(15)), Ok((15, 20)), "data decides over everything");
        assert_eq!(search(&root, "", None, Some(19)), Ok((19, 0)));
        let missing = search(&root, "", None, Some(12)).unwrap_err();
        assert!(missing.contains("made by PostgreSQL 12") && missing.contains("18/bin` (18)"), "{missing}");
        let named = search(&root, "", Some("usr"), None).unwrap_err();
        assert!(named.contains("no `initdb`"), "what was named is not silently replaced: {named}");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_version_too_new_is_better_than_none_and_one_too_old_is_not() {
        let root = machine(&[("usr/pgsql-20/bin", "20.1"), ("usr/lib/postgresql/13/bin", "13.9")]);
        assert_eq!(search(&root, "", None, None), Ok((20, 1)));
        std::fs::remove_dir_all(root.join("usr/pgsql-20")).unwrap();
        let none = search(&root, "", None, None).unwrap_err();
        for part in
            ["PATH", "/usr/lib/postgresql/*/bin", "PostgreSQL 13", "apt install", "dnf", "apk", "pacman", VARIABLE]
        {
            assert!(none.contains(part), "`{part}` is not in: {none}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn this_machine_has_a_server() {
        let found = find_binaries().unwrap();
        assert!(found.version.0 >= OLDEST && found.dir.join("initdb").is_file(), "{found:?}");
    }
}
