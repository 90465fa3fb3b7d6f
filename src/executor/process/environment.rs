//! The environment of a script: a short list from the daemon's own, the builder's `env`, `PROP_...` from the properties,
//! and `BUILD_...`. Whoever may only INSERT a build can set `PROP_...` and nothing else.

use std::collections::BTreeMap;

use crate::model::Job;

/// What scripts inherit from the daemon. Not its whole environment: that may hold the database's password.
const INHERITED: &[&str] = &["HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER"];

/// Used where the daemon has no PATH, as under some supervisors.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The kernel takes at most 128 KiB for one variable and a quarter of the stack (2 MiB as a rule) for all, and refuses to
/// start the script otherwise. Properties past these are in BUILD_FILE alone.
const MAX_PROPERTY: usize = 64 << 10;
const MAX_PROPERTIES: usize = 512 << 10;

/// The whole environment of a job.
pub fn of(job: &Job, workdir: &str, cache: &str, file: &str) -> Vec<(String, String)> {
    let mut env = BTreeMap::new();
    for (key, value) in std::env::vars_os() {
        if let (Ok(key), Ok(value)) = (key.into_string(), value.into_string())
            && (INHERITED.contains(&key.as_str()) || key.starts_with("LC_"))
        {
            env.insert(key, value);
        }
    }
    env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    env.extend(job.env.iter().cloned());
    let mut room = MAX_PROPERTIES;
    for (name, value) in &job.properties {
        if value.len() <= MAX_PROPERTY && value.len() + name.len() <= room && !value.contains('\0') {
            room -= value.len() + name.len();
            env.insert(property_name(name), value.clone());
        }
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
    env.into_iter().collect()
}

/// `PROP_<NAME>`: upper case, other characters than letters and digits as `_`.
fn property_name(name: &str) -> String {
    let name = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    "PROP_".chars().chain(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn property_names_are_upper_case_with_underscores() {
        assert_eq!(property_name("git-branch.1"), "PROP_GIT_BRANCH_1");
        assert_eq!(property_name("größe"), "PROP_GR__E");
        assert_eq!(property_name("LD_PRELOAD"), "PROP_LD_PRELOAD");
    }
}
