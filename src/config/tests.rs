#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::keys::all;
use super::{Config, ConfigErrors, reader};

/// A file that is removed with its guard.
struct Scratch(PathBuf);

impl Scratch {
    fn new(content: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("buildreactor-config-{}-{number}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

pub(super) fn on_host(name: &str) -> Config {
    let mut config = Config::default();
    name.clone_into(&mut config.worker.name);
    config
}

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

pub(super) fn read(file: &[u8], pairs: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let file = Scratch::new(file);
    let path = file.0.display().to_string();
    reader::load(Some(&file.0), Path::new("/nowhere"), variables(pairs), on_host("host"))
        .map_err(|errors| errors.iter().map(|e| e.replace(&path, "FILE")).collect())
}

pub(super) fn without_file(pairs: &[(&str, &str)], host: &str) -> Result<Config, ConfigErrors> {
    let nowhere = Path::new("/nowhere/buildreactor.toml");
    reader::load(None, nowhere, variables(pairs), on_host(host))
}

pub(super) fn accepts(file: &str) -> Config {
    read(file.as_bytes(), &[]).unwrap()
}

#[track_caller]
pub(super) fn refuses(file: &str, expected: &[&str]) {
    assert_eq!(read(file.as_bytes(), &[]).unwrap_err(), expected);
}

#[track_caller]
pub(super) fn refuses_variable(name: &str, value: &str, expected: &str) {
    let errors = without_file(&[(name, value)], "host").unwrap_err();
    assert_eq!(errors.to_string(), expected);
}

#[test]
fn without_file_and_environment_all_is_default() {
    let config = without_file(&[("PATH", "/bin"), ("DATABASE_URL", "")], "host").unwrap();
    assert_eq!(config, on_host("host"));
    assert_eq!(config.database.url, None);
    assert_eq!(config.worker.slots, 2);
    assert_eq!(config.worker.builders, ["*"]);
    assert_eq!(config.worker.min_free_disk, 1_073_741_824);
    assert_eq!(config.reactor.poll, Duration::from_secs(30));
    assert_eq!(config.lease.grace, Duration::from_secs(60));
    assert_eq!(config.log.database_limit, 1_048_576);
    assert_eq!(config.log.file_limit, 268_435_456);
    assert_eq!(config.log.keep, Duration::from_secs(2_592_000));
    assert_eq!(config.source(), "no file, all defaults");
}

#[test]
fn letters_that_changed_places_are_one_slip() {
    for (name, meant) in [("ulr", "url"), ("mial", "mail"), ("pol", "poll"), ("wroker", "worker")] {
        assert_eq!(super::keys::nearest(name, ["url", "mail", "poll", "worker"].into_iter()), Some(meant));
    }
    assert_eq!(super::keys::nearest("xyz", ["url", "mail"].into_iter()), None);
}

#[test]
fn every_key_is_read_from_the_file() {
    let config = accepts(
        r#"
        lease = { ping = "500ms", lease = "1m 30s", grace = "1h" }
        [database]
        url = "host=db user=build"
        [worker]
        name = "linux-1"
        slots = 0x10
        labels = ["linux", " big "]
        builders = ["linux-*", "doc?"]
        state_dir = "/srv/build"
        min_free_disk = 0
        [reactor]
        poll = "2 minutes"
        [log]
        database_limit = "20 kB"
        file_limit = "1GiB"
        keep = "2 weeks"
        "#,
    );
    assert_eq!(config.database.url.as_deref(), Some("host=db user=build"));
    assert_eq!(config.worker.name, "linux-1");
    assert_eq!(config.worker.slots, 16);
    assert_eq!(config.worker.labels, ["linux", "big"]);
    assert_eq!(config.worker.builders, ["linux-*", "doc?"]);
    assert_eq!(config.worker.state_dir, Path::new("/srv/build"));
    assert_eq!(config.worker.min_free_disk, 0);
    assert_eq!(config.reactor.poll, Duration::from_secs(120));
    assert_eq!(config.lease.ping, Duration::from_millis(500));
    assert_eq!(config.lease.lease, Duration::from_secs(90));
    assert_eq!(config.lease.grace, Duration::from_secs(3600));
    assert_eq!(config.log.database_limit, 20_000);
    assert_eq!(config.log.file_limit, 1 << 30);
    assert_eq!(config.log.keep, Duration::from_secs(14 * 86_400));
}

#[test]
fn every_key_is_read_from_its_variable_and_its_example_is_good() {
    for key in all() {
        let example = key.variable_example(&key.variable()).replace('`', "");
        let (name, value) = example.split_once('=').unwrap();
        // The only key that is nothing by itself.
        let (more, line) = if key.name == "password_file" {
            (Some(("BUILDREACTOR_MAIL_USER", "u")), "user = \"u\"")
        } else {
            (None, "")
        };
        without_file(&[(name, value)].into_iter().chain(more).collect::<Vec<_>>(), "host").unwrap();
        accepts(&format!("[{}]\n{}\n{line}", key.section, key.file_example().replace('`', "")));
    }
    let set = [
        ("BUILDREACTOR_WORKER_SLOTS", "4"),
        ("BUILDREACTOR_WORKER_LABELS", "linux, big"),
        ("BUILDREACTOR_WORKER_STATE_DIR", "/srv"),
        ("BUILDREACTOR_LOG_KEEP", "1 day"),
        ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0"),
    ];
    let config = without_file(&set, "host").unwrap();
    assert_eq!(config.worker.slots, 4);
    assert_eq!(config.worker.labels, ["linux", "big"]);
    assert_eq!(config.worker.state_dir, Path::new("/srv"));
    assert_eq!(config.worker.min_free_disk, 0);
    assert_eq!(config.log.keep, Duration::from_secs(86_400));
}

#[test]
fn a_variable_wins_over_the_file_and_the_own_database_url_over_the_shared_one() {
    let file = b"[database]\nurl = \"a\"\n[worker]\nslots = 1\nlabels = [\"x\"]\n";
    let url = |pairs: &[(&str, &str)]| read(file, pairs).unwrap().database.url.unwrap();
    let (shared, own) = (("DATABASE_URL", "b"), ("BUILDREACTOR_DATABASE_URL", "c"));
    assert_eq!(url(&[]), "a");
    assert_eq!(url(&[shared]), "b");
    assert_eq!(url(&[own]), "c");
    assert_eq!(url(&[own, shared]), "c");
    let labels = ("BUILDREACTOR_WORKER_LABELS", "");
    let config = read(file, &[labels, ("BUILDREACTOR_WORKER_SLOTS", "9")]).unwrap();
    assert_eq!((config.worker.slots, config.worker.labels), (9, Vec::new()));
}

#[test]
fn the_source_names_the_file_and_the_variables_that_count_but_no_values() {
    let secret = [
        ("DATABASE_URL", "secret"),
        ("BUILDREACTOR_DATABASE_URL", "secret"),
        ("BUILDREACTOR_WORKER_NAME", "secret"),
        ("BUILDREACTOR_TEST_X", "secret"),
    ];
    let config = without_file(&secret, "host").unwrap();
    assert_eq!(config.source(), "no file, all defaults except `BUILDREACTOR_DATABASE_URL`, `BUILDREACTOR_WORKER_NAME`");
    let hidden = format!("{:?}", config.database);
    assert_eq!(hidden, "Database { url: Some(\"<hidden>\") }");

    let file = Scratch::new(b"");
    let load = |pairs| Config::load(Some(&file.0), &|| variables(pairs)).unwrap();
    let name = ("BUILDREACTOR_WORKER_NAME", "x");
    let path = file.0.display();
    assert_eq!(
        load(&[name, ("DATABASE_URL", "secret")]).source(),
        format!("file `{path}`, overridden by `DATABASE_URL`, `BUILDREACTOR_WORKER_NAME`")
    );
    let config = reader::load(None, &file.0, Vec::new(), on_host("host")).unwrap();
    assert_eq!(config.source(), format!("file `{path}`"));
}

#[test]
fn all_errors_are_reported_at_once_and_in_order() {
    let file = "\
[wroker]
[worker]
slot = 3
slots = 0
labels = [\"a\"]
[http]
url = \"smtp://localhost\"
from = \"x@example.org\"
[lease]
ping = 5
grace = \"41s\"
";
    let pairs = [("BUILDREACTOR_WORKER_SLOT", "1"), ("BUILDREACTOR_REACTOR_POLL", "1ms")];
    assert_eq!(
        read(file.as_bytes(), &pairs).unwrap_err(),
        [
            "FILE:1: unknown section `wroker`, did you mean `[worker]`?",
            "FILE:3: worker.slot: unknown key, did you mean `slots`?",
            "FILE:4: worker.slots: `0` is out of range, it must be a whole number from 1 to 1000, \
             for example `slots = 2`",
            "FILE:6: section `http` is not supported by this version, remove it",
            "FILE:10: lease.ping: `5` has no unit, it must be a duration with a unit, from 1 ms to \
             1 day, for example `ping = \"5s\"`",
            "BUILDREACTOR_REACTOR_POLL: `1ms` is out of range, it must be a duration with a unit, \
             from 100 ms to 1 day, for example `BUILDREACTOR_REACTOR_POLL=30s`",
            "BUILDREACTOR_WORKER_SLOT: unknown variable, did you mean `BUILDREACTOR_WORKER_SLOTS`?",
            "FILE:11: lease.grace: `41s` is less than `lease.lease` (`40s`) and `10s` to kill a \
             tree, it must be at least `50s`, for example `grace = \"50s\"`",
        ]
    );
}

#[test]
fn a_host_name_that_cannot_name_a_worker_asks_for_a_name() {
    assert_eq!(
        without_file(&[], "my_höst").unwrap_err().to_string(),
        "worker.name: the host name `my_höst` cannot be the worker's name (1 to 63 characters of \
         `A-Z a-z 0-9 . _ -`, not only dots), set `worker.name` or `BUILDREACTOR_WORKER_NAME`"
    );
    let named = without_file(&[("BUILDREACTOR_WORKER_NAME", "a")], "my_höst").unwrap();
    assert_eq!(named.worker.name, "a");
}

#[test]
fn syntax_errors_have_line_and_column_and_show_no_content() {
    let file = "[worker]\nslots = max\n[database]\nurl = \"é\" password\n";
    refuses(
        file,
        &[
            "FILE:2:9: this is not TOML: string values must be quoted, expected literal string",
            "FILE:4:11: this is not TOML: unexpected key or value, expected newline, `#`",
        ],
    );
    refuses("[worker]\r\nslots = 1\r\nslots = 2\r\n", &["FILE:3:1: this is not TOML: duplicate key"]);
    let with_variable = read(b"[worker", &[("BUILDREACTOR_X", "")]).unwrap_err();
    assert_eq!(with_variable.len(), 2, "{with_variable:?}");
}

#[test]
fn a_file_that_cannot_be_read_is_refused_with_the_reason() {
    let errors =
        |path: &str| Config::load(Some(Path::new(path)), &|| variables(&[("BUILDREACTOR_X", "")])).unwrap_err();
    let missing = errors("/nowhere/b.toml");
    assert_eq!(
        missing.iter().next().unwrap(),
        "/nowhere/b.toml: the configuration file cannot be read: No such file or directory (os \
         error 2)"
    );
    assert_eq!(missing.iter().count(), 2);
    assert!(errors("/").to_string().starts_with("/: the configuration file cannot be read: "));
    let found = reader::load(None, Path::new("/"), Vec::new(), on_host("host"));
    assert!(found.is_err(), "a default file that is there must be readable");
    assert_eq!(
        read(b"[worker]\nname = \"\xff\"\n", &[]).unwrap_err(),
        ["FILE:2:9: the configuration file is not UTF-8, save it as UTF-8"]
    );
    refuses_variable(
        "BUILDREACTOR_WORKER_STATE_DIR",
        "/srv/\u{fffd}",
        "BUILDREACTOR_WORKER_STATE_DIR: it is not UTF-8, it must be an absolute path, for example \
         `BUILDREACTOR_WORKER_STATE_DIR=/var/lib/buildreactor`",
    );
}

#[test]
fn the_example_file_shows_every_key_with_its_default() {
    let example = include_str!("../../deploy/buildreactor.toml");
    let same = |config: &Config| {
        (config.worker.clone(), config.reactor.clone()) == (on_host("host").worker, on_host("host").reactor)
            && (config.lease.clone(), config.log.clone()) == Default::default()
    };
    let as_it_is = accepts(example);
    assert_eq!((as_it_is.retention.clone(), as_it_is.mail.clone()), Default::default());
    assert!(same(&as_it_is) && as_it_is.database.url.is_none());

    let names: Vec<&str> = all().map(|key| key.name).chain(super::buildbot::KEYS.iter().map(|key| key.name)).collect();
    let is_key = |line: &str| names.iter().any(|name| line.starts_with(&format!("#{name} =")));
    let uncommented: Vec<&str> =
        example.lines().map(|line| if is_key(line) || line.starts_with("#[") { &line[1..] } else { line }).collect();
    let config = accepts(&uncommented.join("\n"));
    assert!(same(&config), "{config:?}");
    assert_eq!(config.database.url.as_deref(), Some("postgresql:///builds"));
    for key in all() {
        let (header, line) = (format!("[{}]", key.section), format!("{} = ", key.name));
        let section = uncommented.iter().skip_while(|line| **line != header).skip(1);
        let mut section = section.take_while(|line| !line.starts_with('['));
        assert!(section.any(|l| l.starts_with(&line)), "{header} {line}");
    }
    for key in super::buildbot::KEYS {
        assert!(example.contains(&format!("\n#{} = {}\n", key.name, key.example)), "{}", key.name);
    }
}
