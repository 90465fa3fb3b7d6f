//! Where the servers are: `host`, `hostaddr` and `port`, each a list.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use super::error::ConnInfoError;
use super::settings::Settings;

/// Where servers put their socket, by the distributions' habits, in the order they are tried.
const SOCKET_DIRECTORIES: &[&str] = &["/var/run/postgresql", "/run/postgresql", "/tmp"];

const DEFAULT_PORT: u16 = 5432;

/// One server to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    place: Place,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Directory of a socket.
    Socket(String),
    /// Name or address to look up.
    Host(String),
    /// Address to go to, with the name to expect there, if one was given.
    Address(IpAddr, Option<String>),
}

impl Endpoint {
    pub(super) fn is_socket(&self) -> bool {
        matches!(self.place, Place::Socket(_))
    }

    /// Whether there is something to compare with the name in a certificate.
    pub(super) fn has_name(&self) -> bool {
        !matches!(self.place, Place::Address(_, None))
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn address(&self) -> Option<IpAddr> {
        match self.place {
            Place::Address(address, _) => Some(address),
            Place::Socket(_) | Place::Host(_) => None,
        }
    }

    /// What libpq calls `host`, empty where only an address was given.
    pub(super) fn host(&self) -> &str {
        match &self.place {
            Place::Socket(host) | Place::Host(host) | Place::Address(_, Some(host)) => host,
            Place::Address(_, None) => "",
        }
    }

    /// What tokio-postgres wants for a host: without one it would refuse any TLS.
    pub(super) fn host_or_address(&self) -> String {
        match &self.place {
            Place::Socket(host) | Place::Host(host) | Place::Address(_, Some(host)) => host.clone(),
            Place::Address(address, None) => address.to_string(),
        }
    }

    /// The name under which the password file knows it: `localhost` for the default socket.
    pub(super) fn passfile_name(&self) -> String {
        let own = self.host_or_address();
        if own == socket_directory(SOCKET_DIRECTORIES, self.port) {
            return "localhost".to_owned();
        }
        own
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Socket(host) | Place::Host(host) => f.write_str(host)?,
            Place::Address(address, Some(host)) => write!(f, "{host} ({address})")?,
            Place::Address(address, None) => write!(f, "{address}")?,
        }
        write!(f, " port {}", self.port)
    }
}

/// The servers, in the order written; at least one.
pub(super) fn read(settings: &Settings) -> Result<Vec<Endpoint>, ConnInfoError> {
    let list = |key: &str| -> Vec<&str> {
        let value = settings.get(key);
        value.map(|value| value.split(',').collect()).unwrap_or_default()
    };
    let hosts = list("host");
    let addresses = list("hostaddr");
    let ports = list("port");
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err(settings.bad("hostaddr", format!("has {} addresses for {} hosts", addresses.len(), hosts.len())));
    }
    let count = hosts.len().max(addresses.len()).max(1);
    if ports.len() > 1 && ports.len() != count {
        return Err(settings
            .bad("port", format!("has {} numbers for {count} hosts; give one for all, or one each", ports.len())));
    }
    (0..count)
        .map(|i| {
            let port = ports.get(i).or(ports.first()).copied().unwrap_or_default();
            let port = parse_port(settings, port)?;
            let host = hosts.get(i).copied().unwrap_or_default();
            let place = match addresses.get(i) {
                Some(address) => {
                    let named = !host.is_empty() && !host.starts_with('/');
                    Place::Address(parse_address(settings, address)?, named.then(|| host.to_owned()))
                }
                None if host.is_empty() => Place::Socket(socket_directory(SOCKET_DIRECTORIES, port).to_owned()),
                None if host.starts_with('/') => Place::Socket(host.to_owned()),
                None if host.starts_with('@') => {
                    return Err(
                        settings.bad("host", "begins with `@`, an abstract socket; name the socket's directory")
                    );
                }
                None => Place::Host(host.to_owned()),
            };
            Ok(Endpoint { place, port })
        })
        .collect()
}

/// The value is not repeated: a mistake in a URL can put a piece of the password here.
fn parse_port(settings: &Settings, port: &str) -> Result<u16, ConnInfoError> {
    if port.is_empty() {
        return Ok(DEFAULT_PORT);
    }
    let parsed = port.trim().parse().ok().filter(|&port| port > 0);
    parsed.ok_or_else(|| {
        settings.bad(
            "port",
            "must be a number from 1 to 65535; in a URL write an IPv6 address in brackets, and \
             `%3A`, `%2F`, `%40` for `:`, `/`, `@` in a password",
        )
    })
}

fn parse_address(settings: &Settings, address: &str) -> Result<IpAddr, ConnInfoError> {
    address.parse().map_err(|_| {
        settings.bad(
            "hostaddr",
            "must be an IP address for each host, like `192.0.2.1` or `2001:db8::1`; names belong \
             in `host`",
        )
    })
}

/// The first directory with a socket for `port`; else the first one if it exists, else the last.
fn socket_directory<'a>(directories: &[&'a str], port: u16) -> &'a str {
    let socket = format!(".s.PGSQL.{port}");
    let living = directories.iter().find(|directory| Path::new(directory).join(&socket).exists());
    let usual = directories.first().filter(|first| Path::new(first).is_dir());
    living.or(usual).or(directories.last()).copied().unwrap_or("/tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_directory_is_the_one_with_a_socket_then_the_first_that_exists() {
        let base = std::env::temp_dir().join(format!("conninfo-sockets-{}", std::process::id()));
        let make = |name: &str| {
            let path = base.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (first, second) = (make("first"), make("second"));
        let missing = base.join("missing").to_str().unwrap().to_owned();
        std::fs::write(base.join("second/.s.PGSQL.5433"), "").unwrap();

        let both = [first.as_str(), second.as_str()];
        assert_eq!(socket_directory(&both, 5433), second);
        assert_eq!(socket_directory(&both, 5432), first);
        assert_eq!(socket_directory(&[&missing, &second], 5432), second);
        assert_eq!(socket_directory(&[&missing, "/tmp"], 1), "/tmp");
        std::fs::remove_dir_all(&base).unwrap();
    }
}
