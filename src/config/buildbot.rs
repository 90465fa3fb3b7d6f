//! `[buildbot.NAME]`: one section a master. The only ones whose name is people's own.

use std::path::PathBuf;

use toml::de::DeValue;

use super::Config;
use super::keys::nearest;
use super::value::{Value, is_worker_name, one_line, quoted, wrong_type};

/// Where a Buildbot master is, and who we are to it. NAME is what `builders.settings` calls it: 1 to 63 of `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Buildbot {
    /// Its web interface: `http://HOST[:PORT][/PATH]`, or `https://`. Needed.
    pub url: String,
    /// User name there. Default: `None`, nobody is logged in.
    pub user: Option<String>,
    /// File with the password, read anew for each login. Default: the file `$CREDENTIALS_DIRECTORY/buildbot_NAME_password` (systemd's
    /// LoadCredential).
    pub password_file: Option<PathBuf>,
    /// Certificate authorities to trust besides the system's, PEM.
    pub ca_file: Option<PathBuf>,
}

pub(super) const SECTION: &str = "buildbot";
const VARIABLES: &str = "BUILDREACTOR_BUILDBOT_";

pub(super) struct Key {
    pub(super) name: &'static str,
    must: &'static str,
    pub(super) example: &'static str,
    set: fn(&mut Buildbot, &Value<'_>) -> Result<(), String>,
}

pub(super) static KEYS: &[Key] = &[
    Key {
        name: "url",
        must: "an address that begins with `https://` or `http://`",
        example: "\"http://localhost:8010\"",
        set: |b, v| url(v).map(|url| b.url = url),
    },
    Key {
        name: "user",
        must: "a user name",
        example: "\"buildreactor\"",
        set: |b, v| v.text().map(|user| b.user = Some(user)),
    },
    Key {
        name: "password_file",
        must: "an absolute path",
        example: "\"/etc/buildreactor/buildbot_password\"",
        set: |b, v| v.absolute_path().map(|path| b.password_file = Some(path)),
    },
    Key {
        name: "ca_file",
        must: "an absolute path",
        example: "\"/etc/ssl/our-ca.pem\"",
        set: |b, v| v.absolute_path().map(|path| b.ca_file = Some(path)),
    },
];

fn url(value: &Value<'_>) -> Result<String, String> {
    let text = value.text()?;
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let Some(rest) = rest else { return Err(format!("{} is no such address", quoted(&text))) };
    // Never shown: it may be a password.
    if rest.contains('@') {
        return Err("user and password are keys of their own".to_owned());
    }
    if rest.is_empty()
        || rest.starts_with([':', '/'])
        || rest.contains(|c: char| "?# \"<>\\".contains(c) || !c.is_ascii())
    {
        return Err(format!("{} is no such address", quoted(&text)));
    }
    Ok(text)
}

/// A section `[buildbot.NAME]` of the file; `line` tells where in it a byte is.
pub(super) fn section(
    config: &mut Config,
    value: &DeValue<'_>,
    own_line: usize,
    line: impl Fn(usize) -> usize,
) -> Vec<(usize, String)> {
    let DeValue::Table(masters) = value else {
        let given = wrong_type(value);
        return vec![(own_line, format!("buildbot: {given}, it must be a section, for example `[buildbot.main]`"))];
    };
    let mut wrong = Vec::new();
    for (name, value) in masters {
        let (at, name) = (line(name.span().start), name.get_ref().as_ref());
        let shown = format!("buildbot.{}", one_line(name));
        let DeValue::Table(entries) = value.get_ref() else {
            let given = wrong_type(value.get_ref());
            let cure = "put it into a section that names the master, for example `[buildbot.main]`";
            wrong.push((at, format!("{shown}: {given}, {cure}")));
            continue;
        };
        if !is_worker_name(name) {
            wrong.push((at, format!("{shown}: a master's name must be 1 to 63 characters of `A-Z a-z 0-9 . _ -`")));
            continue;
        }
        let mut master = Buildbot::default();
        let mut has_url = false;
        for (key, value) in entries {
            let (at, key) = (line(key.span().start), key.get_ref().as_ref());
            has_url |= key == "url";
            let Some(known) = KEYS.iter().find(|known| known.name == key) else {
                let unknown = format!("{shown}.{}: unknown key", one_line(key));
                wrong.push((
                    at,
                    match nearest(key, KEYS.iter().map(|known| known.name)) {
                        Some(near) => format!("{unknown}, did you mean `{near}`?"),
                        None => format!("{unknown}, known are `url`, `user`, `password_file`, `ca_file`"),
                    },
                ));
                continue;
            };
            if let Err(what) = (known.set)(&mut master, &Value::File(value.get_ref())) {
                let Key { must, example, .. } = known;
                wrong.push((at, format!("{shown}.{key}: {what}, it must be {must}, for example `{key} = {example}`")));
            }
        }
        if !has_url {
            wrong.push((at, format!("{shown}: it has no `url`, for example `url = {}`", KEYS[0].example)));
        }
        config.buildbot.insert(name.to_owned(), master);
    }
    wrong
}

/// A variable `BUILDREACTOR_BUILDBOT_NAME_KEY`, where NAME is a section's in upper case, other characters as `_`. `None`: it is none.
pub(super) fn variable(config: &mut Config, variable: &str, value: &str) -> Option<Result<(), String>> {
    let rest = variable.strip_prefix(VARIABLES)?;
    let found = KEYS.iter().find_map(|key| Some((key, rest.strip_suffix(&format!("_{}", key.name.to_uppercase()))?)));
    let Some((key, name)) = found else {
        let example = format!("`{VARIABLES}MAIN_URL=http://localhost:8010`");
        return Some(Err(format!(
            "unknown variable, after `{VARIABLES}` come a master and a key, for example {example}"
        )));
    };
    let as_variable = |name: &str| name.to_uppercase().replace(['.', '-'], "_");
    let Some((_, master)) = config.buildbot.iter_mut().find(|(known, _)| as_variable(known) == name) else {
        return Some(Err(format!("the file has no section [buildbot.{}] that it could override", name.to_lowercase())));
    };
    Some((key.set)(master, &Value::Variable(value)).map_err(|what| {
        let example = key.example.replace('"', "");
        format!("{what}, it must be {}, for example `{variable}={example}`", key.must)
    }))
}
