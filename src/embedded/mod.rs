//! A private PostgreSQL from the machine's own server binaries: for `run --embedded`, `demo` and the tests.
//!
//! The server never outlives its holder: a small shell (`watchdog.rs`) stops it when we are gone, however that came.
//! It listens on a Unix socket in a folder only its user may enter, and trusts whoever gets there.
//!
//! Everything here blocks: on an async runtime call it from `spawn_blocking`.

mod account;
mod binaries;
mod error;
mod folder;
mod settings;
#[cfg(test)]
mod tests;
mod watchdog;

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use binaries::{Binaries, find_binaries};
pub use error::EmbeddedError;

use account::Account;
use folder::Folder;
use settings::{Listen, arguments};
use watchdog::{After, Paths, Watchdog, pause};

/// How long a start may take, recovery after a crash included.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// What `initdb` may take on top; usually about a second.
const INITDB_DEADLINE: Duration = Duration::from_secs(60);
/// How long a stop may take: what `pg_ctl` waits too.
const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// PostgreSQL's usual port: part of the socket's name, even where nothing listens on TCP.
const SOCKET_PORT: u16 = 5432;

/// How to run a server. The default is a throw-away with the binaries found, on a Unix socket only.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Keep the data here, with durable settings (default: a throw-away folder in the temp dir, without fsync and
    /// with 300 connections, which is removed with the server).
    pub dir: Option<PathBuf>,
    /// Folder of `initdb` and `postgres` (default: [`find_binaries`], of the version of the data there is).
    pub bin_dir: Option<PathBuf>,
    /// More settings as in postgresql.conf; they win over the defaults, but not over where it listens.
    pub settings: Vec<(String, String)>,
    /// Also listen on this port of 127.0.0.1; 0: on a free one. For tests: every local user gets in without a
    /// password.
    pub tcp_port: Option<u16>,
    /// With a port: listen on this address of the machine's instead of 127.0.0.1. For tests: whom it lets in from there is up
    /// to an `hba_file` among the settings.
    pub tcp_address: Option<IpAddr>,
}

/// How clients are treated at a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits until all have left.
    Smart,
    /// Rolls back and disconnects them.
    Fast,
    /// Like a crash: the next start recovers.
    Immediate,
}

/// A running server. Dropping it stops it (fast), and removes a throw-away.
#[derive(Debug)]
pub struct Server {
    account: Account,
    binaries: Binaries,
    folder: Folder,
    listen: Listen,
    settings: Vec<(String, String)>,
    running: Option<Watchdog>,
    /// Held while this server has its folder; the watchdog holds it too.
    lock: Option<File>,
}

impl Server {
    /// Prepares the folder if need be, starts the server and waits until it takes connections, at most 60 s (120 s
    /// with new data). As root everything runs as user `postgres`, or `nobody` without one.
    ///
    /// Errors: no binaries, or none of the version of the data; the server's user can't reach the folder, or it is
    /// somebody else's; a server runs in it already; the server doesn't start, with the end of its log.
    pub fn start(options: Options) -> Result<Server, EmbeddedError> {
        let account = Account::choose()?;
        let kept = options.dir.map(|dir| Folder::kept(&dir, &account)).transpose()?;
        let data_version = match &kept {
            Some(folder) => folder.data_version()?,
            None => None,
        };
        let binaries = choose_binaries(options.bin_dir.as_deref(), kept.as_ref(), data_version)?;
        account.must_reach(&binaries.dir.join("initdb"))?;
        account.must_reach(&binaries.dir.join("postgres"))?;
        let folder = match kept {
            Some(folder) => {
                folder.create(&account)?;
                folder
            }
            None => Folder::throw_away(&account)?,
        };
        let tcp = options.tcp_port.map(|_| options.tcp_address.unwrap_or(Ipv4Addr::LOCALHOST.into()));
        let mut server = Server {
            listen: Listen { socket_dir: folder.root.join("run"), port: SOCKET_PORT, tcp },
            account,
            binaries,
            folder,
            settings: options.settings,
            running: None,
            lock: None,
        };
        // From here on dropping it tidies up.
        server.listen.port = match options.tcp_port {
            None => SOCKET_PORT,
            Some(0) => free_port().map_err(EmbeddedError::folder("find a free port for", &server.folder.root))?,
            Some(port) => port,
        };
        server.launch()?;
        Ok(server)
    }

    /// A URL of this database over the socket, for user `postgres`; libpq and tokio-postgres read it.
    pub fn url(&self, database: &str) -> String {
        self.listen.url(database)
    }

    /// The folder of the socket: `run` of the kept folder, or a short one in `/tmp` where that path is too long.
    pub fn socket_dir(&self) -> &Path {
        &self.listen.socket_dir
    }

    /// The TCP port, or the number in the socket's name where it doesn't listen on TCP.
    pub fn port(&self) -> u16 {
        self.listen.port
    }

    /// PostgreSQL's data folder.
    pub fn data_dir(&self) -> &Path {
        &self.folder.data
    }

    /// The server's main process; none when it was stopped or has crashed.
    pub fn postmaster_pid(&self) -> Option<i32> {
        self.running.as_ref().map(|running| running.pid).filter(|pid| watchdog::is_alive(*pid))
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.binaries.version
    }

    /// The folder of the server's programs.
    pub fn bin_dir(&self) -> &Path {
        &self.binaries.dir
    }

    /// Stops it, waits until it is gone and removes a throw-away. Fine when it is stopped already or has crashed.
    ///
    /// Error: it still runs after 60 s, as a smart stop does while a client stays; a stricter stop may follow.
    pub fn stop(&mut self, mode: StopMode) -> Result<(), EmbeddedError> {
        self.end(mode, After::Remove)?;
        self.lock = None;
        let root = &self.folder.root;
        if !self.folder.throw_away {
            return Ok(());
        }
        // The watchdog has done that, unless it never ran; or its reader is about to, when the shell was killed.
        match std::fs::remove_dir_all(root) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(EmbeddedError::folder("remove", root)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Stops it and starts it again on the same data, socket and port; only starts it when it has crashed or a kept
    /// one was stopped.
    ///
    /// Error: as [`Server::stop`] and [`Server::start`]; a throw-away that was stopped is gone.
    pub fn restart(&mut self, mode: StopMode) -> Result<(), EmbeddedError> {
        if self.folder.throw_away && !self.folder.root.exists() {
            return Err(EmbeddedError::Removed { dir: self.folder.root.clone() });
        }
        self.end(mode, After::Keep)?;
        self.launch()
    }

    fn launch(&mut self) -> Result<(), EmbeddedError> {
        let begin = Instant::now();
        let lock = match self.lock.take() {
            Some(lock) => lock,
            None => self.folder.lock()?,
        };
        self.listen.socket_dir = self.folder.socket_dir(&self.account)?;
        let deadline =
            if self.folder.data.exists() { begin + START_DEADLINE } else { begin + START_DEADLINE + INITDB_DEADLINE };
        loop {
            let log_begin = self.folder.log_size();
            let running = self.running.insert(spawn_watchdog(
                &self.account,
                &self.binaries,
                &self.folder,
                &lock,
                arguments(&self.folder, &self.listen, &self.settings),
            )?);
            let failed = loop {
                let told = self.folder.postmaster();
                // An old file may say "ready" too: it must be about our process.
                if told.is_some_and(|one| one.ready && one.pid == running.pid) {
                    break None;
                } else if !running.is_running() {
                    break Some("ended instead of starting");
                } else if Instant::now() >= deadline {
                    break Some("was not ready in time");
                }
                pause();
            };
            let Some(failed) = failed else { break };

            let log = self.folder.log_tail(log_begin);
            // A crashed server's sessions may live on for a moment, and PostgreSQL rightly refuses to start beside them.
            let not_yet = log.contains("pre-existing shared memory block") && Instant::now() < deadline;
            self.end(StopMode::Immediate, if not_yet { After::Keep } else { After::Remove })?;
            if !not_yet {
                return Err(EmbeddedError::Start {
                    dir: self.folder.root.clone(),
                    version: self.version_text(),
                    failed: failed.to_owned(),
                    log,
                });
            }
        }
        self.lock = Some(lock);
        tracing::info!(
            duration_ms = begin.elapsed().as_millis(),
            "PostgreSQL {} runs in `{}`: {}",
            self.version_text(),
            self.folder.root.display(),
            self.url("postgres"),
        );
        Ok(())
    }

    /// Ends the server, if there is one, and keeps the lock.
    fn end(&mut self, mode: StopMode, after: After) -> Result<(), EmbeddedError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if !running.end(mode, after, STOP_DEADLINE) {
            let (mode, hint) = match mode {
                StopMode::Smart => ("smart", "a client has not left; stop it fast"),
                StopMode::Fast => ("fast", "its disk may be slow; wait, or stop it at once (immediate)"),
                StopMode::Immediate => ("immediate", "kill it with SIGKILL if waiting does not help"),
            };
            return Err(EmbeddedError::Stop {
                dir: self.folder.root.clone(),
                pid: running.pid,
                mode,
                seconds: STOP_DEADLINE.as_secs(),
                hint,
            });
        }
        self.running = None;
        tracing::info!("PostgreSQL in `{}` has stopped", self.folder.root.display());
        Ok(())
    }

    fn version_text(&self) -> String {
        format!("{}.{}", self.binaries.version.0, self.binaries.version.1)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop(StopMode::Fast) {
            // The pipe closes with the watchdog's value, which is one more order to stop.
            tracing::warn!(error = &error as &dyn std::error::Error, "a private PostgreSQL did not stop in time");
        }
    }
}

/// The binaries asked for, or found, that can read the data there is.
fn choose_binaries(
    asked: Option<&Path>,
    folder: Option<&Folder>,
    data_version: Option<u32>,
) -> Result<Binaries, EmbeddedError> {
    match (asked, folder.zip(data_version)) {
        (None, None) => find_binaries(),
        (None, Some((folder, major))) => binaries::find_binaries_for(&folder.data, major),
        (Some(dir), None) => Binaries::at(dir),
        (Some(dir), Some((folder, major))) => {
            let found = Binaries::at(dir)?;
            if found.version.0 == major {
                return Ok(found);
            }
            Err(EmbeddedError::WrongVersion {
                dir: folder.data.clone(),
                needs: major,
                looked: format!("`{}` ({})", dir.display(), found.version.0),
            })
        }
    }
}

fn spawn_watchdog(
    account: &Account,
    binaries: &Binaries,
    folder: &Folder,
    lock: &File,
    arguments: Vec<OsString>,
) -> Result<Watchdog, EmbeddedError> {
    let sh = "/bin/sh";
    let lock = lock.try_clone().map_err(EmbeddedError::folder("keep the lock on", &folder.root))?;
    let mut postgres = account.command(binaries.dir.join("postgres"));
    postgres.args(arguments);
    let paths = Paths {
        throw_away: folder.throw_away.then_some(folder.root.as_path()),
        log: &folder.log(),
        data: &folder.data,
        run: &folder.root.join("run"),
        initdb: &binaries.dir.join("initdb"),
    };
    Watchdog::spawn(account.command(sh), &paths, lock.into(), postgres)
        .map_err(|source| account.spawn_error(sh, source))
}

/// Free when it was asked for; the server takes it a moment later.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
