//! Connections as PostgreSQL people write them.
//!
//! tokio-postgres refuses `sslmode=verify-full`, `service=`, `passfile=`, `sslrootcert=` and more,
//! and reads neither `PG*` variables nor `.pgpass`. So the text is parsed here, the way libpq
//! documents it (PostgreSQL's manual, chapter libpq), and a finished [`tokio_postgres::Config`] is
//! handed over.
//!
//! Where this differs from libpq:
//! - `sslmode=allow` is treated as `prefer`: TLS is tried first.
//! - With `prefer` no certificate is ever verified, and a TLS handshake that fails ends the
//!   attempt. libpq would verify and then go on without TLS, which protects from nobody either.
//! - `target_session_attrs=primary` is treated as `read-write`, which is stricter.
//! - One password serves all hosts. A password file that gives them different ones is refused.
//! - The name in a certificate is looked for in its `subjectAltName` only, not in `CN`.
//! - `connect_timeout` limits the TCP connection, not the log-in after it.
//! - `PGREQUIRESSL`, `PGTZ`, `PGDATESTYLE` and `PGGEQO` are ignored.
//! - What cannot be honoured and would leave the connection weaker than asked for is an error.

mod endpoint;
mod error;
mod keys;
mod parse;
mod passfile;
mod service;
mod settings;
mod ssl;
#[cfg(test)]
mod tests;

use std::env::VarError;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use tokio_postgres::Config;
use tokio_postgres::config::{
    ChannelBinding, LoadBalanceHosts, SslMode as WireMode, SslNegotiation, TargetSessionAttrs,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls::{self, SslMode, TlsSettings};
use endpoint::Endpoint;
pub use error::{ConnInfoError, Origin};
use passfile::{PassFile, Wanted};
use settings::Settings;

/// Settings that make another client reach the same server as the same user with the same care.
/// Newer ones, which an older psql would refuse, and secrets are not among them.
const SHARED_WITH_PSQL: &[&str] = &[
    "passfile",
    "options",
    "target_session_attrs",
    "channel_binding",
    "sslmode",
    "sslrootcert",
    "sslcrl",
    "sslcert",
    "sslkey",
];

/// A connection with every setting decided. `Debug` shows what [`ConnInfo::describe`] says.
#[derive(Clone)]
pub struct ConnInfo {
    settings: Settings,
    endpoints: Vec<Endpoint>,
    user: String,
    dbname: String,
    config: Config,
    tls: TlsSettings,
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnInfo").field(&self.describe()).finish()
    }
}

impl ConnInfo {
    /// Decides every setting: from `text`, then the service file, then `PG*` variables, then
    /// libpq's defaults. Reads the service file and the password file, blocking.
    ///
    /// `text` is a URL (`postgresql://` or `postgres://`), a key=value string or a database name;
    /// `None` and blank text leave everything to the other sources. `env` looks a variable up.
    ///
    /// Defaults: `user` is the operating system's name of the process, `dbname` is the user,
    /// `port` is 5432, `host` is the first of `/var/run/postgresql`, `/run/postgresql` and `/tmp`
    /// with a socket for that port, `sslmode` is `prefer`.
    ///
    /// # Errors
    /// Whatever psql would refuse, and what psql would honour but this program cannot: see the
    /// module. The message names the source, the setting and the remedy, never the password.
    pub fn resolve(text: Option<&str>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConnInfoError> {
        let mut settings = Settings::default();
        if let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) {
            for (key, value) in parse::parse(text)? {
                settings.put(&key, value, Origin::Text)?;
            }
        }
        let home = home_directory(env);
        add_service(&mut settings, env, home.as_deref())?;
        settings.put_variables(env)?;

        let endpoints = endpoint::read(&settings)?;
        let on_socket = endpoints.iter().any(Endpoint::is_socket);
        settings.refuse_unsupported(|key| key != "requirepeer" || on_socket)?;
        let user = match settings.get("user") {
            Some(user) => user.to_owned(),
            None => system_user()?,
        };
        let dbname = settings.get("dbname").unwrap_or(&user).to_owned();
        let password = match settings.take("password") {
            Some(password) => Some(password),
            None => password_from_file(&settings, &endpoints, &dbname, &user, home.as_deref())?,
        };
        let tls = ssl::read(&settings, &endpoints, home.as_deref())?;

        let mut config = config(&settings, &endpoints, &tls)?;
        config.user(&user).dbname(&dbname);
        if let Some(password) = password {
            config.password(password);
        }
        Ok(Self { settings, endpoints, user, dbname, config, tls })
    }

    /// [`ConnInfo::resolve`] with the variables of this process.
    ///
    /// # Errors
    /// As [`ConnInfo::resolve`]; also a `PG*` variable that is not UTF-8.
    pub fn from_env(text: Option<&str>) -> Result<Self, ConnInfoError> {
        for key in keys::KEYS {
            if let Some(name) = key.variable
                && let Err(VarError::NotUnicode(_)) = std::env::var(name)
            {
                return Err(ConnInfoError::BadValue {
                    origin: Origin::Variable(name),
                    key: key.name,
                    problem: "must be UTF-8".to_owned(),
                });
            }
        }
        Self::resolve(text, &|name| std::env::var(name).ok())
    }

    /// What tokio-postgres needs, password included.
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// The TLS side. Reads certificates and keys from their files, blocking, so that renewed ones
    /// are used by the next call; reads none where no TLS is wanted.
    ///
    /// # Errors
    /// `verify-ca` or `verify-full` without a root certificate; a file that exists but cannot be
    /// used; a private key that others may read.
    pub fn tls(&self) -> Result<MakeRustlsConnect, ConnInfoError> {
        tls::connector(&self.tls)
    }

    /// The connection in words, for messages: ``database `builds` on /var/run/postgresql port 5432
    /// as `alice` ``.
    pub fn describe(&self) -> String {
        let places: Vec<String> = self.endpoints.iter().map(Endpoint::to_string).collect();
        format!("database `{}` on {} as `{}`", self.dbname, places.join(" or "), self.user)
    }

    /// A key=value string that psql accepts and that leads to the same place, without password.
    /// It is not quoted for a shell.
    pub fn libpq_string(&self) -> String {
        let pairs: Vec<String> =
            self.shared_settings().into_iter().map(|(key, value)| format!("{key}={}", quoted(&value))).collect();
        pairs.join(" ")
    }

    /// Variables that lead psql to the same place, without password. `PGSERVICE`, if the process
    /// has it, would go before them: remove it.
    pub fn psql_env(&self) -> Vec<(String, String)> {
        self.shared_settings()
            .into_iter()
            .filter_map(|(key, value)| Some((keys::find(key)?.variable?.to_owned(), value)))
            .collect()
    }

    fn shared_settings(&self) -> Vec<(&'static str, String)> {
        let joined = |part: &dyn Fn(&Endpoint) -> String| -> String {
            let parts: Vec<String> = self.endpoints.iter().map(part).collect();
            parts.join(",")
        };
        let mut shared = Vec::new();
        if self.endpoints.iter().any(Endpoint::has_name) {
            shared.push(("host", joined(&|e| e.host().to_owned())));
        }
        if self.endpoints.iter().any(|e| e.address().is_some()) {
            let address = |e: &Endpoint| e.address().map(|a| a.to_string()).unwrap_or_default();
            shared.push(("hostaddr", joined(&address)));
        }
        shared.push(("port", joined(&|e| e.port().to_string())));
        shared.push(("user", self.user.clone()));
        shared.push(("dbname", self.dbname.clone()));
        for key in SHARED_WITH_PSQL {
            if let Some(value) = self.settings.get(key) {
                shared.push((key, value.to_owned()));
            }
        }
        shared
    }
}

/// A value as a key=value string needs it.
fn quoted(value: &str) -> String {
    let plain = |c: char| !c.is_ascii_whitespace() && c != '\'' && c != '\\';
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// Like libpq: `HOME`, then the user database.
fn home_directory(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let variable = env("HOME").filter(|home| !home.is_empty());
    variable.map(PathBuf::from).or_else(|| {
        let user = User::from_uid(Uid::effective()).ok()??;
        Some(user.dir)
    })
}

fn system_user() -> Result<String, ConnInfoError> {
    let uid = Uid::effective();
    match User::from_uid(uid) {
        Ok(Some(user)) => Ok(user.name),
        Ok(None) | Err(_) => Err(ConnInfoError::NoUser { uid: uid.as_raw() }),
    }
}

/// Adds what the service says, if one is named, below the text and above the variables.
fn add_service(
    settings: &mut Settings,
    env: &dyn Fn(&str) -> Option<String>,
    home: Option<&Path>,
) -> Result<(), ConnInfoError> {
    for (key, variable) in [("service", "PGSERVICE"), ("servicefile", "PGSERVICEFILE")] {
        if let Some(value) = env(variable).filter(|value| !value.is_empty()) {
            settings.put_below(key, value, Origin::Variable(variable))?;
        }
    }
    let Some(name) = settings.get("service").map(str::to_owned) else {
        return Ok(());
    };
    let named = settings.get("servicefile").map(|path| (PathBuf::from(path), settings.origin("servicefile")));
    let personal = home.map(|home| home.join(".pg_service.conf"));
    // The directory is compiled into libpq: Debian's, then the one of most others.
    let system = match env("PGSYSCONFDIR").filter(|directory| !directory.is_empty()) {
        Some(directory) => vec![PathBuf::from(directory)],
        None => vec!["/etc/postgresql-common".into(), "/etc".into()],
    };
    let system = system.into_iter().map(|path| path.join("pg_service.conf"));
    let files = service::Files {
        // As in libpq, a file that is named takes the place of the personal one.
        usual: personal.filter(|_| named.is_none()).into_iter().chain(system).collect(),
        named,
    };
    let origin = settings.origin("service");
    let asked = service::Asked { name: &name, origin: &origin };
    let (file, lines) = service::find(asked, &files)?;
    for line in lines {
        let origin = Origin::Service { name: name.as_str().into(), file: file.as_path().into(), line: line.number };
        settings.put_below(&line.key, line.value, origin)?;
    }
    Ok(())
}

/// The password file's answer, which has to be the same for all hosts.
fn password_from_file(
    settings: &Settings,
    endpoints: &[Endpoint],
    dbname: &str,
    user: &str,
    home: Option<&Path>,
) -> Result<Option<String>, ConnInfoError> {
    let path = match (settings.get("passfile"), home) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(home)) => home.join(".pgpass"),
        (None, None) => return Ok(None),
    };
    let Some(file) = PassFile::read(&path) else {
        return Ok(None);
    };
    let mut answers = endpoints
        .iter()
        .map(|endpoint| file.password(Wanted { host: &endpoint.passfile_name(), port: endpoint.port(), dbname, user }));
    let first = answers.next().flatten();
    // tokio-postgres has one password for all hosts, and would show one host another's.
    if answers.any(|answer| answer != first) {
        return Err(settings.bad(
            "passfile",
            format!("`{}` has not the same password for all hosts; give them one, or name one host", path.display()),
        ));
    }
    Ok(first.filter(|password| !password.is_empty()))
}

/// All of tokio-postgres's configuration but user, database and password.
fn config(settings: &Settings, endpoints: &[Endpoint], tls: &TlsSettings) -> Result<Config, ConnInfoError> {
    let mut config = Config::new();
    for endpoint in endpoints {
        config.host(endpoint.host_or_address()).port(endpoint.port());
        if let Some(address) = endpoint.address() {
            config.hostaddr(address);
        }
    }
    config.ssl_mode(match tls.mode {
        SslMode::Disable => WireMode::Disable,
        SslMode::Allow | SslMode::Prefer => WireMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => WireMode::Require,
    });
    if tls.direct {
        config.ssl_negotiation(SslNegotiation::Direct);
    }
    if let Some(options) = settings.get("options") {
        config.options(options);
    }
    let name = settings.get("application_name");
    if let Some(name) = name.or(settings.get("fallback_application_name")) {
        config.application_name(name);
    }

    let seconds = |n: u32| Duration::from_secs(n.into());
    if let Some(n) = settings.positive("connect_timeout")? {
        config.connect_timeout(seconds(n));
    }
    if let Some(n) = settings.number::<i32>("keepalives")? {
        config.keepalives(n != 0);
    }
    if let Some(n) = settings.positive("keepalives_idle")? {
        config.keepalives_idle(seconds(n));
    }
    if let Some(n) = settings.positive("keepalives_interval")? {
        config.keepalives_interval(seconds(n));
    }
    if let Some(n) = settings.positive("keepalives_count")? {
        config.keepalives_retries(n);
    }
    // Milliseconds in libpq; tokio-postgres's own parser takes it for seconds.
    if let Some(n) = settings.positive("tcp_user_timeout")? {
        config.tcp_user_timeout(Duration::from_millis(n.into()));
    }

    let sessions = &[
        ("any", Some(TargetSessionAttrs::Any)),
        ("read-write", Some(TargetSessionAttrs::ReadWrite)),
        ("read-only", Some(TargetSessionAttrs::ReadOnly)),
        ("primary", Some(TargetSessionAttrs::ReadWrite)),
        ("standby", None),
        ("prefer-standby", None),
    ];
    match settings.choice("target_session_attrs", sessions)? {
        Some(Some(attributes)) => {
            config.target_session_attrs(attributes);
        }
        Some(None) => {
            return Err(ConnInfoError::Unsupported {
                origin: settings.origin("target_session_attrs"),
                key: "target_session_attrs",
                reason: "a standby takes no builds; use `read-write`, or `read-only` to look on",
            });
        }
        None => {}
    }
    let bindings = &[
        ("disable", ChannelBinding::Disable),
        ("prefer", ChannelBinding::Prefer),
        ("require", ChannelBinding::Require),
    ];
    if let Some(binding) = settings.choice("channel_binding", bindings)? {
        config.channel_binding(binding);
    }
    let balances = &[("disable", LoadBalanceHosts::Disable), ("random", LoadBalanceHosts::Random)];
    if let Some(balance) = settings.choice("load_balance_hosts", balances)? {
        config.load_balance_hosts(balance);
    }
    Ok(config)
}
