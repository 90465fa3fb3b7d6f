//! What a private server is told on its command line.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::folder::Folder;

/// Where a server listens.
#[derive(Debug, Clone)]
pub(super) struct Listen {
    pub socket_dir: PathBuf,
    /// Of TCP, and the number in the socket's name even where nothing listens on TCP.
    pub port: u16,
    /// On this address too.
    pub tcp: Option<IpAddr>,
}

/// For a throw-away: fast, and enough connections for a test run.
const THROW_AWAY: [(&str, &str); 5] = [
    ("fsync", "off"),
    ("full_page_writes", "off"),  // no crash of the machine is survived anyway
    ("synchronous_commit", "on"), // a commit still means that the WAL was written, as tests expect
    ("max_connections", "300"),
    ("shared_buffers", "128MB"),
];
/// For a kept one: all is as initdb wrote it (durable, 100 connections), so that an operator may edit postgresql.conf.
const KEPT: [(&str, &str); 0] = [];
const BOTH: [(&str, &str); 4] = [
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("log_checkpoints", "off"),
    // A connection that says nothing holds up even a fast shutdown, measured on 15, by a default of one minute.
    ("authentication_timeout", "10s"),
];

/// What follows `postgres`: the defaults, then `given`, then what is ours alone. Of a setting given twice the last counts.
pub(super) fn arguments(folder: &Folder, listen: &Listen, given: &[(String, String)]) -> Vec<OsString> {
    let defaults: &[(&str, &str)] = if folder.throw_away { &THROW_AWAY } else { &KEPT };
    let given = given.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    // The log is the watchdog's, and where it listens is what the URL says.
    let (port, address) = (listen.port.to_string(), listen.tcp.map(|address| address.to_string()));
    let fixed = [
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
        ("listen_addresses", address.as_deref().unwrap_or_default()),
        ("port", port.as_str()),
        ("unix_socket_permissions", "0700"),
    ];
    let mut arguments = vec!["-D".into(), folder.data.clone().into_os_string()];
    for (name, value) in defaults.iter().copied().chain(BOTH).chain(given).chain(fixed) {
        arguments.extend(["-c".into(), format!("{name}={value}").into()]);
    }
    arguments.extend(["-c".into(), socket_setting(&listen.socket_dir)]);
    arguments
}

/// The setting is a list of folders: quoted, or a comma would begin another.
fn socket_setting(dir: &Path) -> OsString {
    let mut setting = b"unix_socket_directories=\"".to_vec();
    for byte in dir.as_os_str().as_bytes() {
        setting.extend(if *byte == b'"' { b"\"\"".as_slice() } else { std::slice::from_ref(byte) });
    }
    setting.push(b'"');
    OsString::from_vec(setting)
}

impl Listen {
    /// A URL of this database over the socket, for user `postgres`.
    pub fn url(&self, database: &str) -> String {
        let host = percent_encode(self.socket_dir.as_os_str().as_bytes());
        let database = percent_encode(database.as_bytes()).replace('/', "%2F");
        format!("postgresql:///{database}?host={host}&port={}&user=postgres", self.port)
    }
}

/// For a URL: everything but letters, digits and `-._~/`.
fn percent_encode(bytes: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    bytes.iter().map(|&byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
