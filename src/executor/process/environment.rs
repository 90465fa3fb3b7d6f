//! The environment of a script: a short list from the daemon's own, the builder's `env`, `PROP_...` from the properties,
//! and `BUILD_...`. Whoever may only INSERT a build can set `PROP_...` and nothing else.

use std::collections::BTreeMap;
use std::ffi::OsString;

use nix::unistd::{SysconfVar, Uid, User, sysconf};

use crate::model::{Job, clean_line};

/// What scripts inherit from the daemon. Not its whole environment: that may hold the database's password.
const INHERITED: &[&str] = &["HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER"];

/// Used where the daemon has no PATH, as under some supervisors.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the kernel takes for one variable, bytes: its name, `=`, its value and a NUL (execve(2), MAX_ARG_STRLEN).
const MAX_VARIABLE: usize = 128 << 10;
/// What the kernel takes for all of them at most, whatever the limit of the stack, bytes (execve(2)).
const MAX_ALL: usize = 6 << 20;
/// Of that, bytes for the command line and the path of the script.
const COMMAND: usize = 16 << 10;

/// What a row of builders may ask for, bytes, as `V12__limits.sql` has it.
const MAX_ENV: usize = 1 << 20;

/// Properties with larger values, bytes, and those past so many bytes of variables, are in BUILD_FILE alone: a script starts others,
/// with arguments and variables of their own.
const MAX_PROPERTY: usize = 64 << 10;
const MAX_PROPERTIES: usize = 512 << 10;

/// How many properties a note names, and how many notes of a kind there are.
const NAMED: usize = 10;

/// An environment that the kernel would not take; says which part of it is too large.
#[derive(Debug)]
pub enum Unfit {
    /// The limits of the worker's processes are lower than usual (ulimit -s).
    Here(String),
    /// No worker can start it.
    Everywhere(String),
}

/// The whole environment of a job.
#[derive(Debug)]
pub struct Environment {
    /// Names and values.
    pub variables: Vec<(String, String)>,
    /// What its author should know; lines for the build's log.
    pub notes: Vec<String>,
}

/// The whole environment of a job.
///
/// # Errors
/// The kernel would not start a program with it.
pub fn of(job: &Job, workdir: &str, cache: &str, file: &str) -> Result<Environment, Unfit> {
    let user = User::from_uid(Uid::effective()).ok().flatten();
    let mut env = inherited(std::env::vars_os(), user.as_ref());
    for (name, value) in &job.env {
        if cost(name, value) - POINTER > MAX_VARIABLE {
            return Err(Unfit::Everywhere(format!(
                "`{}` in builders.env has {} bytes; the kernel takes at most {MAX_VARIABLE} for a variable with its name",
                clean_line(name, 60),
                value.len()
            )));
        }
        env.insert(name.clone(), value.clone());
    }
    let attempt = job.id.attempt.to_string();
    let build = job.id.build.to_string();
    for (key, value) in [
        ("BUILD_ID", build.as_str()),
        ("BUILD_BUILDER", &job.builder),
        ("BUILD_ATTEMPT", &attempt),
        ("BUILD_WORKER", &job.worker),
        ("BUILD_DIR", workdir),
        ("BUILD_CACHE", cache),
        ("BUILD_FILE", file),
        ("PWD", workdir),
    ] {
        env.insert(key.to_owned(), value.to_owned());
    }
    let room = room();
    let taken: usize = env.iter().map(|(name, value)| cost(name, value)).sum();
    if taken > room {
        let why = format!(
            "builders.env and what the worker adds come to {taken} bytes; the kernel takes at most {room} for all variables on this worker"
        );
        // What the limits of the rows allow, another worker may take.
        let asked: usize = job.env.iter().map(|(name, value)| cost(name, value) - POINTER).sum();
        return Err(if asked > MAX_ENV { Unfit::Everywhere(why) } else { Unfit::Here(why) });
    }
    let mut notes = Vec::new();
    env.extend(properties(&job.properties, MAX_PROPERTIES.min(room - taken), &mut notes));
    Ok(Environment { variables: env.into_iter().collect(), notes })
}

/// What comes from the daemon, and for what its environment lacks, as under some supervisors and cron, from the user database.
fn inherited(variables: impl Iterator<Item = (OsString, OsString)>, user: Option<&User>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for (key, value) in variables {
        if let (Ok(key), Ok(value)) = (key.into_string(), value.into_string())
            && (INHERITED.contains(&key.as_str()) || key.starts_with("LC_"))
        {
            env.insert(key, value);
        }
    }
    // git and `cd ~` take an empty one for none.
    env.retain(|key, value| !(value.is_empty() && ["HOME", "LOGNAME", "SHELL", "USER"].contains(&key.as_str())));
    let text = |path: &std::path::Path| path.to_str().filter(|path| !path.is_empty()).map(str::to_owned);
    let home = user.and_then(|user| text(&user.dir)).unwrap_or_else(|| "/".to_owned());
    let shell = user.and_then(|user| text(&user.shell)).unwrap_or_else(|| "/bin/sh".to_owned());
    let name = user.map(|user| user.name.clone());
    let defaults = [
        ("HOME", Some(home)),
        ("SHELL", Some(shell)),
        ("USER", name.clone()),
        ("LOGNAME", name),
        ("PATH", Some(DEFAULT_PATH.to_owned())),
    ];
    for (key, value) in defaults {
        if let Some(value) = value {
            env.entry(key.to_owned()).or_insert(value);
        }
    }
    env
}

/// Bytes of a pointer in the list of variables, which the kernel counts.
const POINTER: usize = size_of::<usize>();

/// What a variable takes of what the kernel has for all.
fn cost(name: &str, value: &str) -> usize {
    name.len() + value.len() + "=\0".len() + POINTER
}

/// Bytes for all variables of a program that this process starts.
fn room() -> usize {
    let all = sysconf(SysconfVar::ARG_MAX).ok().flatten().and_then(|all| usize::try_from(all).ok());
    all.unwrap_or(MAX_VARIABLE).min(MAX_ALL).saturating_sub(COMMAND)
}

/// `PROP_...` of all properties that fit into `room` bytes, always the same ones, whatever order the database gives them in.
fn properties(all: &[(String, String)], mut room: usize, notes: &mut Vec<String>) -> BTreeMap<String, String> {
    let mut all: Vec<&(String, String)> = all.iter().collect();
    all.sort();
    let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut left_out = Vec::new();
    let mut env = BTreeMap::new();
    for (name, value) in all {
        let variable = property_name(name);
        let known = names.entry(variable.clone()).or_default();
        known.push(name);
        // The first one has it, whether or not it is too large: a name never gets the value of another for that.
        if known.len() > 1 {
            continue;
        }
        let cost = cost(&variable, value);
        if value.len() > MAX_PROPERTY || cost - POINTER > MAX_VARIABLE || cost > room {
            left_out.push((name.as_str(), value.len()));
        } else if !value.contains('\0') {
            room -= cost;
            env.insert(variable, value.clone());
        }
    }
    let shown = |name: &str| format!("`{}`", clean_line(name, 60));
    let mut told = |mut lines: Vec<String>| {
        if lines.len() > NAMED {
            let more = lines.len() - NAMED;
            lines.truncate(NAMED);
            lines.push(format!("there are {more} more of these"));
        }
        notes.extend(lines);
    };
    let several = names.iter().filter(|(_, names)| names.len() > 1);
    told(
        several
            .map(|(variable, names)| {
                let all = list(names.iter().map(|name| shown(name)));
                let variable = clean_line(variable, 60);
                format!(
                    "the properties {all} are all {variable}, which has the value of {}; BUILD_FILE has all",
                    shown(names[0])
                )
            })
            .collect(),
    );
    let nameless = names.iter().filter(|(variable, _)| variable["PROP_".len()..].chars().all(|c| c == '_'));
    told(
        nameless
            .map(|(variable, names)| {
                format!(
                    "the property {} has no letter or digit for a name of a variable; it is {}",
                    shown(names[0]),
                    clean_line(variable, 60)
                )
            })
            .collect(),
    );
    if !left_out.is_empty() {
        let all = list(left_out.iter().map(|(name, size)| format!("{} ({size} bytes)", shown(name))));
        notes.push(format!("too large for the environment, and in BUILD_FILE alone: {all}"));
    }
    env
}

/// "`a`, `b` and 3 more"
fn list(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(NAMED);
    let mut text = all.take(NAMED).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    text
}

/// `PROP_<NAME>`: upper case, other characters than letters and digits as `_`.
fn property_name(name: &str) -> String {
    let name = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    "PROP_".chars().chain(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_properties(all: &[(&str, &str)], room: usize) -> (BTreeMap<String, String>, Vec<String>) {
        let mut all: Vec<_> = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut notes = Vec::new();
        let env = properties(&all, room, &mut notes);
        // Whatever order they come in.
        all.reverse();
        let mut again = Vec::new();
        assert_eq!((properties(&all, room, &mut again), &again), (env.clone(), &notes));
        (env, notes)
    }

    #[test]
    fn property_names_are_upper_case_with_underscores() {
        assert_eq!(property_name("git-branch.1"), "PROP_GIT_BRANCH_1");
        assert_eq!(property_name("größe"), "PROP_GR__E");
        assert_eq!(property_name("LD_PRELOAD"), "PROP_LD_PRELOAD");
    }

    #[test]
    fn properties_of_one_variable_are_told_and_the_first_by_its_bytes_has_it() {
        let (env, notes) = of_properties(&[("a.b", "dot"), ("x", "1"), ("a-b", "minus"), ("A_B", "plain")], 1000);
        assert_eq!((env["PROP_A_B"].as_str(), env["PROP_X"].as_str()), ("plain", "1"));
        assert_eq!(
            notes,
            ["the properties `A_B`, `a-b`, `a.b` are all PROP_A_B, which has the value of `A_B`; BUILD_FILE has all"]
        );
        // Too large for a variable: nobody takes its place.
        let (env, notes) = of_properties(&[("K", &"x".repeat(70_000)), ("k", "small")], 1 << 20);
        assert!(env.is_empty() && notes.len() == 2 && notes[1].contains("`K` (70000 bytes)"), "{notes:?}");
        let many: Vec<String> = (0..30).flat_map(|n| [format!("n.{n}"), format!("n-{n}")]).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "")).collect();
        let (_, notes) = of_properties(&many, 100_000);
        assert_eq!((notes.len(), notes[10].as_str()), (11, "there are 20 more of these"));
    }

    #[test]
    fn names_without_a_letter_or_digit_are_told() {
        for name in ["", "-", "日本", "\n\u{1b}"] {
            let (env, notes) = of_properties(&[(name, "v"), ("fine", "")], 1000);
            assert_eq!((env.len(), notes.len()), (2, 1), "{name:?}");
            assert!(notes[0].contains("has no letter or digit") && !notes[0].contains(['\n', '\u{1b}']), "{notes:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_told() {
        // Each takes 7 bytes of name, 1 of value, 2 of punctuation, and a pointer.
        let (env, notes) = of_properties(&[("aa", "1"), ("bb", "2"), ("cc", "3")], 2 * (10 + POINTER) + 1);
        assert_eq!(
            (env.len(), notes),
            (2, vec!["too large for the environment, and in BUILD_FILE alone: `cc` (1 bytes)".to_owned()])
        );
        let (long, value) = ("n".repeat(200_000), "v".repeat(65_536));
        let (env, notes) = of_properties(&[(&long, "x"), ("just", &value), ("over", &format!("{value}v"))], 1 << 20);
        assert_eq!(env.into_keys().collect::<Vec<_>>(), ["PROP_JUST"]);
        assert!(notes[0].len() < 300 && notes[0].contains("`over` (65537 bytes)"), "{notes:?}");
    }

    #[test]
    fn the_user_database_fills_in_what_the_environment_lacks() {
        let user = User {
            name: "ann".to_owned(),
            passwd: std::ffi::CString::default(),
            uid: Uid::from_raw(1000),
            gid: nix::unistd::Gid::from_raw(1000),
            gecos: std::ffi::CString::default(),
            dir: "/home/ann".into(),
            shell: "".into(),
        };
        let given =
            |all: &[(&str, &str)]| all.iter().map(|(k, v)| (k.into(), v.into())).collect::<Vec<_>>().into_iter();
        let login = |env: &BTreeMap<String, String>| {
            ["HOME", "USER", "LOGNAME", "SHELL"].map(|key| env.get(key).cloned().unwrap_or_default()).join(" ")
        };
        assert_eq!(login(&inherited(given(&[]), Some(&user))), "/home/ann ann ann /bin/sh");
        let some = [("HOME", ""), ("USER", "bob"), ("SHELL", "/bin/zsh"), ("PGPASSWORD", "secret"), ("LC_ALL", "C")];
        let env = inherited(given(&some), Some(&user));
        assert_eq!((login(&env).as_str(), env["LC_ALL"].as_str()), ("/home/ann bob ann /bin/zsh", "C"));
        assert!(!env.contains_key("PGPASSWORD"));
        // A number without a user, as in containers.
        assert_eq!(login(&inherited(given(&[]), None)), "/   /bin/sh");
    }
}
