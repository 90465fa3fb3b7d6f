//! Fills a [`Config`] from the file and the environment and collects everything that is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use jiff::SignedDuration;
use toml::de::{DeTable, DeValue};

use super::buildbot;
use super::keys::{self, Key, NOT_YET, nearest, sections};
use super::value::{Value, is_worker_name, one_line, quoted, wrong_type};
use super::{Config, ConfigErrors, KILL_TIME};

const PREFIX: &str = "BUILDREACTOR_";

/// Variables with our prefix that are no settings: read by the embedded server, the logger, clap,
/// the mail room (no configuration file is to hold a password) and the tests.
const OTHER_VARIABLES: &[&str] =
    &["BUILDREACTOR_PG_BIN", "BUILDREACTOR_LOG", "BUILDREACTOR_CONFIG", "BUILDREACTOR_MAIL_PASSWORD"];
const TEST_PREFIX: &str = "BUILDREACTOR_TEST_";

/// `("lease", "grace")`.
type Id = (&'static str, &'static str);

/// [`Config::load`] with the place of the default file and the built-in settings given.
pub(super) fn load(
    path: Option<&Path>,
    default_path: &Path,
    mut variables: Vec<(String, String)>,
    defaults: Config,
) -> Result<Config, ConfigErrors> {
    let mut reader = Reader { config: defaults, errors: Vec::new(), places: BTreeMap::new(), refused: BTreeSet::new() };
    variables.sort();
    let read = reader.file(path, default_path);
    reader.environment(&variables);
    // What an unreadable file says about these is not known.
    if read.is_ok() {
        reader.host_name();
        reader.relations();
    }
    if reader.errors.is_empty() { Ok(reader.config) } else { Err(ConfigErrors(reader.errors)) }
}

/// The file could not be read as TOML; the errors have been collected.
struct Unread;

struct Reader {
    config: Config,
    errors: Vec<String>,
    /// Where each key was set last: "FILE:LINE" or the variable's name.
    places: BTreeMap<Id, String>,
    /// Keys set to something that was refused, so that their value says nothing.
    refused: BTreeSet<Id>,
}

impl Reader {
    fn file(&mut self, path: Option<&Path>, default_path: &Path) -> Result<(), Unread> {
        let file = path.unwrap_or(default_path);
        let name = file.display().to_string();
        let bytes = match (std::fs::read(file), path) {
            (Ok(bytes), _) => bytes,
            (Err(error), None) if error.kind() == ErrorKind::NotFound => return Ok(()),
            (Err(error), _) => {
                self.errors.push(format!("{name}: the configuration file cannot be read: {error}"));
                return Err(Unread);
            }
        };
        self.config.file = Some(file.to_owned());
        match str::from_utf8(&bytes) {
            Ok(text) => self.toml(&name, text),
            Err(error) => {
                let (line, column) = position(&bytes, error.valid_up_to());
                self.errors
                    .push(format!("{name}:{line}:{column}: the configuration file is not UTF-8, save it as UTF-8"));
                Err(Unread)
            }
        }
    }

    fn toml(&mut self, file: &str, text: &str) -> Result<(), Unread> {
        let (table, mut syntax) = DeTable::parse_recoverable(text);
        if !syntax.is_empty() {
            let start = |error: &toml::de::Error| error.span().map_or(text.len(), |span| span.start);
            syntax.sort_by_key(start);
            for error in &syntax {
                let (line, column) = position(text.as_bytes(), start(error));
                // Only `message`: `Display` shows the line, which may hold a password.
                self.errors.push(format!("{file}:{line}:{column}: this is not TOML: {}", error.message()));
            }
            return Err(Unread);
        }
        // By line; the tables are sorted by name.
        let mut found: Vec<(usize, String)> = Vec::new();
        for (section, value) in table.get_ref() {
            let line = position(text.as_bytes(), section.span().start).0;
            let section = section.get_ref().as_ref();
            match value.get_ref() {
                other if section == buildbot::SECTION => {
                    let at = |byte| position(text.as_bytes(), byte).0;
                    found.extend(buildbot::section(&mut self.config, other, line, at));
                }
                _ if NOT_YET.contains(&section) => found.push((line, not_yet(section))),
                DeValue::Table(entries) if sections().contains(&section) => {
                    for (name, value) in entries {
                        let line = position(text.as_bytes(), name.span().start).0;
                        let name = name.get_ref();
                        let place = format!("{file}:{line}");
                        if let Err(wrong) = self.entry(section, name, value.get_ref(), place) {
                            found.push((line, wrong));
                        }
                    }
                }
                other => found.push((line, wrong_section(section, other))),
            }
        }
        found.sort();
        let with_place = |(line, wrong)| format!("{file}:{line}: {wrong}");
        self.errors.extend(found.into_iter().map(with_place));
        Ok(())
    }

    /// One key of a known section.
    fn entry(&mut self, section: &str, name: &str, value: &DeValue<'_>, place: String) -> Result<(), String> {
        let is_it = |key: &&'static Key| key.section == section && key.name == name;
        let Some(key) = keys::all().find(is_it) else {
            return Err(unknown_key(section, name));
        };
        self.set(key, &Value::File(value), place).map_err(|wrong| {
            let example = key.file_example();
            format!("{section}.{name}: {wrong}, it must be {}, for example {example}", key.must)
        })
    }

    /// `variables` sorted by name.
    fn environment(&mut self, variables: &[(String, String)]) {
        // Other programs read `DATABASE_URL` too, where an empty one means that there is none.
        let shared = |(name, value): &&(String, String)| name == "DATABASE_URL" && !value.is_empty();
        let own = |(name, _): &&(String, String)| {
            name.starts_with(PREFIX) && !name.starts_with(TEST_PREFIX) && !OTHER_VARIABLES.contains(&name.as_str())
        };
        // The shared one first, so that our own overrides it.
        let ordered = variables.iter().filter(shared);
        let mut overrides: BTreeMap<Id, String> = BTreeMap::new();
        let mut others = Vec::new();
        for (variable, value) in ordered.chain(variables.iter().filter(own)) {
            if let Some(set) = buildbot::variable(&mut self.config, variable, value) {
                if let Err(wrong) = set {
                    self.errors.push(format!("{variable}: {wrong}"));
                }
                others.push(variable.clone());
                continue;
            }
            let is_it = |key: &&'static Key| match variable.as_str() {
                "DATABASE_URL" => key.section == "database" && key.name == "url",
                other => key.variable() == other,
            };
            let Some(key) = keys::all().find(is_it) else {
                self.errors.push(format!("{variable}: {}", unknown_variable(variable)));
                continue;
            };
            overrides.insert((key.section, key.name), variable.clone());
            if let Err(wrong) = self.set(key, &Value::Variable(value), variable.clone()) {
                let example = key.variable_example(variable);
                self.errors.push(format!("{variable}: {wrong}, it must be {}, for example {example}", key.must));
            }
        }
        self.config.overrides = overrides.into_values().chain(others).collect();
    }

    fn set(&mut self, key: &Key, value: &Value<'_>, place: String) -> Result<(), String> {
        let id = (key.section, key.name);
        self.places.insert(id, place);
        (key.set)(&mut self.config, value).inspect_err(|_| {
            self.refused.insert(id);
        })
    }

    /// The host name names the worker where nothing else does, if it can.
    fn host_name(&mut self) {
        let name = &self.config.worker.name;
        if !self.places.contains_key(&("worker", "name")) && !is_worker_name(name) {
            self.errors.push(format!(
                "worker.name: the host name {} cannot be the worker's name (1 to 63 characters of \
                 `A-Z a-z 0-9 . _ -`, not only dots), set `worker.name` or \
                 `BUILDREACTOR_WORKER_NAME`",
                quoted(name)
            ));
        }
    }

    /// How the settings must fit together.
    fn relations(&mut self) {
        let lease = self.config.lease.clone();
        if lease.lease < 3 * lease.ping {
            let (is, ping) = (human(lease.lease), human(lease.ping));
            let least = human(3 * lease.ping);
            self.relation(
                ("lease", "lease"),
                ("lease", "ping"),
                format!("`{is}` is less than three times `lease.ping` (`{ping}`)"),
                &least,
            );
        }
        if lease.grace < lease.lease + KILL_TIME {
            let (is, of_lease) = (human(lease.grace), human(lease.lease));
            let (kill, least) = (human(KILL_TIME), human(lease.lease + KILL_TIME));
            self.relation(
                ("lease", "grace"),
                ("lease", "lease"),
                format!("`{is}` is less than `lease.lease` (`{of_lease}`) and `{kill}` to kill a tree"),
                &least,
            );
        }
        if self.config.mail.password_file.is_some() && self.config.mail.user.is_none() {
            let place = self.places.get(&("mail", "password_file"));
            let place = place.map_or_else(String::new, |place| format!("{place}: "));
            self.errors.push(format!("{place}mail.password_file: whose password is it? Add `user`"));
        }
        for (name, master) in &self.config.buildbot {
            if master.password_file.is_some() && master.user.is_none() {
                self.errors.push(format!(
                    "buildbot.{name}.password_file: whose password is it? Add `user` to [buildbot.{name}]"
                ));
            }
        }
        if self.config.mail.shows_password() {
            let id = ("mail", "starttls");
            let place = self.places.get(&id).or_else(|| self.places.get(&("mail", "user")));
            let place = place.map_or_else(String::new, |place| format!("{place}: "));
            self.errors.push(format!(
                "{place}mail.starttls: others on the network could read the password, with `user` it must be \
                 `required`, or `url` must name this machine"
            ));
        }
        let log = self.config.log.clone();
        if log.file_limit < log.database_limit {
            let (is, least) = (human_size(log.file_limit), human_size(log.database_limit));
            self.relation(
                ("log", "file_limit"),
                ("log", "database_limit"),
                format!("`{is}` is less than `log.database_limit`"),
                &least,
            );
        }
    }

    /// Reports that `subject` is too small for `other`, at the place that set one of them. A
    /// refused value has been reported already and proves nothing.
    fn relation(&mut self, subject: Id, other: Id, wrong: String, least: &str) {
        if [subject, other].iter().any(|id| self.refused.contains(id)) {
            return;
        }
        let place = self.places.get(&subject).or_else(|| self.places.get(&other));
        let place = place.map_or_else(String::new, |place| format!("{place}: "));
        let (section, name) = subject;
        self.errors.push(format!(
            "{place}{section}.{name}: {wrong}, it must be at least `{least}`, for example \
             `{name} = \"{least}\"`"
        ));
    }
}

/// A key of the top level that is not a known section's table.
fn wrong_section(section: &str, value: &DeValue<'_>) -> String {
    if sections().contains(&section) {
        let given = wrong_type(value);
        return format!("{section}: {given}, it must be a section, for example `[{section}]`");
    }
    let shown = quoted(section);
    match value {
        DeValue::Table(_) => format!(
            "unknown section {shown}, {}",
            match nearest(section, sections().into_iter()) {
                Some(near) => format!("did you mean `[{near}]`?"),
                None => format!("known are `{}`, `buildbot.NAME`", sections().join("`, `")),
            }
        ),
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_)
        | DeValue::Array(_) => {
            let owner = keys::all().find(|key| key.name == section);
            let cure = owner.map_or_else(String::new, |key| format!(", move it below a line `[{}]`", key.section));
            format!("unknown key {shown} outside of any section{cure}")
        }
    }
}

fn unknown_key(section: &str, name: &str) -> String {
    let known = || keys::all().filter(|key| key.section == section);
    let unknown = format!("{section}.{}: unknown key", one_line(name));
    if let Some(near) = nearest(name, known().map(|key| key.name)) {
        return format!("{unknown}, did you mean `{near}`?");
    }
    if let Some(key) = keys::all().find(|key| key.name == name) {
        return format!("{unknown}, did you mean the one in `[{}]`?", key.section);
    }
    let names: Vec<_> = known().map(|key| key.name).collect();
    format!("{unknown}, known are `{}`", names.join("`, `"))
}

fn unknown_variable(variable: &str) -> String {
    let rest = variable.strip_prefix(PREFIX).unwrap_or(variable);
    let section = rest.split('_').next().unwrap_or(rest).to_lowercase();
    if NOT_YET.contains(&section.as_str()) {
        return not_yet(&section);
    }
    // Without the prefix, in which nothing can differ.
    let known: Vec<String> = keys::all().map(|key| key.variable()).collect();
    let known = known.iter().filter_map(|name| name.strip_prefix(PREFIX));
    match nearest(rest, known) {
        Some(near) => format!("unknown variable, did you mean `{PREFIX}{near}`?"),
        None => format!(
            "unknown variable, after `{PREFIX}` come a section and a key, for example \
             `BUILDREACTOR_WORKER_SLOTS=2`"
        ),
    }
}

fn not_yet(section: &str) -> String {
    format!("section `{section}` is not supported by this version, remove it")
}

/// Line and column, in characters, of a byte; both count from 1.
fn position(text: &[u8], offset: usize) -> (usize, usize) {
    let before = &text[..offset.min(text.len())];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    (line, String::from_utf8_lossy(&before[start..]).chars().count() + 1)
}

/// `1m 30s`: what the duration parser reads again.
fn human(duration: Duration) -> String {
    SignedDuration::try_from(duration)
        .map_or_else(|_| format!("{}s", duration.as_secs()), |duration| format!("{duration:#}"))
}

/// `64 KiB`: what the size parser reads again.
fn human_size(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor)) {
        Some((unit, factor)) => format!("{} {unit}", bytes / factor),
        None => format!("{bytes} B"),
    }
}
