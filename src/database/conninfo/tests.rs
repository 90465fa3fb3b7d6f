//! Whole descriptions, from text to decided settings.

mod sources;
mod ssl;

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio_postgres::config::Host;

use super::*;

/// A home directory of its own and an environment that holds nothing else.
struct Home {
    path: PathBuf,
    variables: HashMap<String, String>,
}

impl Home {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("conninfo-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(path.join(".postgresql")).unwrap();
        let shown = path.to_str().unwrap().to_owned();
        // The machine's own service file stays out of it.
        let variables = [("HOME", shown.clone()), ("PGSYSCONFDIR", shown)];
        let variables = variables.map(|(name, value)| (name.to_owned(), value));
        Self { path, variables: variables.into() }
    }

    fn with(mut self, variables: &[(&str, &str)]) -> Self {
        for (name, value) in variables {
            self.variables.insert((*name).to_owned(), (*value).to_owned());
        }
        self
    }

    fn file(&self, name: &str, mode: u32, content: &str) -> String {
        let path = self.path.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn resolve(&self, text: &str) -> Result<ConnInfo, ConnInfoError> {
        ConnInfo::resolve(Some(text), &|name| self.variables.get(name).cloned())
    }

    fn ok(&self, text: &str) -> ConnInfo {
        self.resolve(text).unwrap()
    }

    fn error(&self, text: &str) -> String {
        self.resolve(text).unwrap_err().to_string()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.path).unwrap();
    }
}

fn process_user() -> String {
    User::from_uid(Uid::effective()).unwrap().unwrap().name
}

fn password(info: &ConnInfo) -> Option<String> {
    let config = info.config();
    config.get_password().map(|p| String::from_utf8_lossy(p).into_owned())
}

fn tcp(host: &str) -> Host {
    Host::Tcp(host.to_owned())
}

#[test]
fn without_any_word_it_is_the_own_user_on_the_default_socket() {
    let home = Home::new();
    let user = process_user();
    for text in [None, Some(""), Some(" \n")] {
        let info = ConnInfo::resolve(text, &|name| home.variables.get(name).cloned()).unwrap();
        let config = info.config();
        assert_eq!(config.get_user(), Some(user.as_str()));
        assert_eq!(config.get_dbname(), Some(user.as_str()));
        assert_eq!(config.get_ports(), [5432]);
        assert_eq!(config.get_password(), None);
        assert!(matches!(&config.get_hosts(), [Host::Unix(_)]));
    }
}

#[test]
fn the_database_is_named_like_the_user_unless_it_is_named() {
    let home = Home::new();
    assert_eq!(home.ok("user=alice").config().get_dbname(), Some("alice"));
    assert_eq!(home.ok("builds").config().get_dbname(), Some("builds"));
    let info = home.ok("postgresql:///builds");
    assert_eq!(info.config().get_user(), Some(process_user().as_str()));
}

#[test]
fn several_hosts_have_one_port_or_one_each() {
    let home = Home::new().with(&[("PGPORT", "7000")]);
    for (text, ports) in [
        ("postgresql://h1:1,h2:2/d", [1, 2]),
        ("postgresql://h1,h2:2/d", [5432, 2]),
        ("host=h1,h2 port=3", [3, 3]),
        ("host=h1,h2 port=3,", [3, 5432]),
        ("host=h1,h2", [7000, 7000]),
    ] {
        let config = home.ok(text).config();
        assert_eq!(config.get_hosts(), [tcp("h1"), tcp("h2")], "{text}");
        assert_eq!(config.get_ports(), ports, "{text}");
    }
    assert_eq!(
        home.error("host=h1,h2 port=1,2,3"),
        "connection string: `port` has 3 numbers for 2 hosts; give one for all, or one each"
    );
    assert_eq!(
        home.error("host=h1,h2 hostaddr=192.0.2.1"),
        "connection string: `hostaddr` has 1 addresses for 2 hosts"
    );
}

#[test]
fn a_path_is_a_socket_directory_and_an_address_needs_no_name() {
    let home = Home::new();
    let config = home.ok("postgresql://%2Fvar%2Frun/db?sslmode=verify-full").config();
    assert_eq!(config.get_hosts(), [Host::Unix("/var/run".into())]);
    // PostgreSQL has no TLS there, and libpq ignores the mode.
    assert_eq!(config.get_ssl_mode(), WireMode::Disable);

    let info = home.ok("hostaddr=192.0.2.1");
    assert_eq!(info.config().get_hosts(), [tcp("192.0.2.1")]);
    assert!(info.libpq_string().starts_with("hostaddr=192.0.2.1 port=5432 "));
    assert!(home.error("hostaddr=192.0.2.1 sslmode=verify-full").contains("add `host`"));
    assert!(home.error("hostaddr=localhost").contains("names belong in `host`"));
    assert!(home.error("host=@/abstract").contains("abstract socket"));
    assert!(home.error("host=/tmp,h sslmode=require").contains("sockets only"));
}

#[test]
fn numbers_are_seconds_but_tcp_user_timeout_is_milliseconds() {
    let home = Home::new();
    let config =
        home.ok("host=h keepalives_idle=5 keepalives_interval=2 keepalives_count=3 tcp_user_timeout=1500").config();
    assert_eq!(config.get_keepalives_idle(), Duration::from_secs(5));
    assert_eq!(config.get_keepalives_interval(), Some(Duration::from_secs(2)));
    assert_eq!(config.get_keepalives_retries(), Some(3));
    assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_millis(1500)));
    assert!(config.get_keepalives());
    let config = home.ok("keepalives=0 connect_timeout=0 keepalives_idle=-1").config();
    assert!(!config.get_keepalives());
    assert_eq!(config.get_connect_timeout(), None);
    assert_eq!(
        home.error("connect_timeout=soon"),
        "connection string: `connect_timeout` must be a whole number that fits 32 bits"
    );
}

#[test]
fn wrong_settings_are_named_with_their_source_and_the_remedy() {
    let home = Home::new().with(&[("PGPORT", "65536"), ("PGSSLMODE", "verify")]);
    assert!(home.error("").starts_with("variable `PGPORT`: `port` must be a number from 1 to"));
    assert_eq!(
        home.error("host=h port=1"),
        "variable `PGSSLMODE`: `sslmode` is `verify`, but must be `disable`, `allow`, `prefer`, \
         `require`, `verify-ca` or `verify-full`"
    );
    let home = Home::new();
    assert_eq!(home.error("hots=h"), "connection string: there is no connection setting `hots`; did you mean `host`?");
    assert_eq!(
        home.error("postgresql://h/d?colour=red"),
        "connection string: there is no connection setting `colour`; PostgreSQL's manual lists \
         them under libpq, \"Parameter Key Words\""
    );
    for port in ["0", "x", "-1", "1.5"] {
        assert!(home.error(&format!("port={port}")).contains("from 1 to 65535"), "{port}");
    }
}

#[test]
fn the_description_has_place_and_user_and_no_password() {
    let home = Home::new();
    for (text, expected) in [
        (
            "postgresql://alice:hunter2@%2Fvar%2Frun%2Fpostgresql/builds",
            "database `builds` on /var/run/postgresql port 5432 as `alice`",
        ),
        (
            "host=h1,h2 hostaddr=192.0.2.1,192.0.2.2 port=1,2 user=u password=hunter2",
            "database `u` on h1 (192.0.2.1) port 1 or h2 (192.0.2.2) port 2 as `u`",
        ),
    ] {
        let info = home.ok(text);
        assert_eq!(info.describe(), expected);
        let all = format!("{info:?} {} {:?}", info.libpq_string(), info.psql_env());
        assert!(!all.contains("hunter2"), "{all}");
    }
}

#[test]
fn psql_is_led_to_the_same_place() {
    let home = Home::new().with(&[("PGOPTIONS", "-c search_path='x y'")]);
    let info = home.ok(r"host=h,/tmp port=1,2 user='o\'k\\' dbname=builds password=p sslmode=prefer");
    assert_eq!(
        info.libpq_string(),
        r"host=h,/tmp port=1,2 user='o\'k\\' dbname=builds options='-c search_path=\'x y\'' sslmode=prefer"
    );
    let variables = info.psql_env();
    let pairs = [
        ("PGHOST", "h,/tmp"),
        ("PGPORT", "1,2"),
        ("PGUSER", r"o'k\"),
        ("PGDATABASE", "builds"),
        ("PGOPTIONS", "-c search_path='x y'"),
        ("PGSSLMODE", "prefer"),
    ];
    let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(variables, pairs);
    // What we say is also what we read.
    let again = home.ok(&info.libpq_string());
    assert_eq!(again.describe(), info.describe());
}
