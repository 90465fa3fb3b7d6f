//! The folder a server lives in: `data`, `run` (its socket) and `postgres.log`.
//!
//! Everything inside is made by the server's user: as root we would otherwise follow whatever links that user put there.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::kill;
use nix::unistd::{Pid, mkdtemp};

use super::account::Account;
use super::error::EmbeddedError;
use super::watchdog::{is_alive, pause};

/// A socket's address holds 107 bytes (unix(7), sun_path less its NUL), of which the server takes these.
const SOCKET_NAME: &str = "/.s.PGSQL.65535";
const SOCKET_PATH_MAX: usize = 107;
/// Start a new log file above this size, bytes, and keep one old one.
const LOG_MAX: u64 = 16 << 20;
/// How much of the log an error shows.
const LOG_TAIL_LINES: usize = 20;
const LOG_TAIL_BYTES: u64 = 8 << 10;

#[derive(Debug, Clone)]
pub(super) struct Folder {
    pub root: PathBuf,
    /// PostgreSQL's data folder.
    pub data: PathBuf,
    /// Removed with its server.
    pub throw_away: bool,
}

impl Folder {
    /// A new private folder in the temp dir, or in `/tmp` where the server's user can't use that or its path is too
    /// long for a socket.
    pub fn throw_away(account: &Account) -> Result<Folder, EmbeddedError> {
        const TEMPLATE: &str = "buildreactor-pg-XXXXXX";
        // The watchdog removes the folder, so its user must be allowed to.
        let suits = |base: &PathBuf| fits_socket(&base.join(TEMPLATE).join("run")) && account.can_write(base);
        let base = std::env::temp_dir().canonicalize().ok().filter(suits).unwrap_or_else(|| PathBuf::from("/tmp"));
        let root = private_folder(&base.join(TEMPLATE), account)?;
        Ok(Folder { data: root.join("data"), root, throw_away: true })
    }

    /// The folder a user names; nothing is created yet. Error: the server's user can't get there.
    pub fn kept(dir: &Path, account: &Account) -> Result<Folder, EmbeddedError> {
        let dir = std::path::absolute(dir).map_err(EmbeddedError::folder("resolve", dir))?;
        let there = dir.ancestors().find(|step| step.exists()).unwrap_or(Path::new("/"));
        let missing = dir.strip_prefix(there).unwrap_or(Path::new(""));
        let there = there.canonicalize().map_err(EmbeddedError::folder("resolve", there))?;
        let root = if missing.as_os_str().is_empty() { there } else { there.join(missing) };
        // The folder itself may still be root's: `create` gives it away when it is empty.
        account.must_reach(root.parent().unwrap_or(&root))?;
        Ok(Folder { data: root.join("data"), root, throw_away: false })
    }

    /// Makes a kept folder, or checks that the one there is ours to use.
    pub fn create(&self, account: &Account) -> Result<(), EmbeddedError> {
        let root = &self.root;
        match fs::metadata(root) {
            Ok(found) => {
                let mut entries = fs::read_dir(root).map_err(EmbeddedError::folder("read", root))?;
                if found.uid() == account.uid {
                    return Ok(());
                }
                if !(account.other && found.uid() == 0 && entries.next().is_none()) {
                    return Err(EmbeddedError::NotOurs {
                        dir: root.clone(),
                        owner: found.uid(),
                        user: account.name.clone(),
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let missing: Vec<&Path> = root.ancestors().skip(1).take_while(|step| !step.exists()).collect();
                for parent in missing.into_iter().rev() {
                    fs::create_dir(parent).map_err(EmbeddedError::folder("create", parent))?;
                    if account.other {
                        // Whatever root's umask: the server's user has to pass.
                        fs::set_permissions(parent, PermissionsExt::from_mode(0o755))
                            .map_err(EmbeddedError::folder("open to others", parent))?;
                    }
                }
                let made = DirBuilder::new().mode(0o700).create(root);
                made.map_err(EmbeddedError::folder("create", root))?;
            }
            Err(error) => return Err(EmbeddedError::folder("look at", root)(error)),
        }
        if account.other {
            lchown(root, Some(account.uid), Some(account.gid)).map_err(EmbeddedError::folder("give away", root))?;
        }
        Ok(())
    }

    pub fn log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// The major version that made the data; none before there is any.
    pub fn data_version(&self) -> Result<Option<u32>, EmbeddedError> {
        let data = &self.data;
        match fs::symlink_metadata(data) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EmbeddedError::folder("look at", data)(error)),
            Ok(_) => {}
        }
        let version = fs::read_to_string(data.join("PG_VERSION")).ok();
        // Before 10 the major version had two parts (9.6); the first is enough to say that it doesn't fit.
        let major = version.as_deref().and_then(|text| text.trim().split('.').next()?.parse().ok());
        major.map(Some).ok_or(EmbeddedError::NotData { path: data.clone() })
    }

    /// Takes the folder for one server: nobody else holds its lock, and no server runs in it. One that is just ending,
    /// or not yet told that its holder was killed, is waited for: 10 s; one that is up and well: 1 s.
    /// The lock lasts until every copy of the file is closed.
    pub fn lock(&self) -> Result<File, EmbeddedError> {
        let lock = File::open(&self.root).map_err(EmbeddedError::folder("open", &self.root))?;
        let begin = Instant::now();
        loop {
            let held = match lock.try_lock() {
                Ok(()) => false,
                Err(TryLockError::WouldBlock) => true,
                Err(TryLockError::Error(error)) => {
                    // Some network file systems can't lock a folder; PostgreSQL's own postmaster.pid still guards it.
                    tracing::debug!(%error, "no lock on `{}`", self.root.display());
                    false
                }
            };
            let running = self.postmaster().filter(|one| one.is_alive_in(&self.data));
            let (patience, error) = match &running {
                None if !held => {
                    self.forget_stale_postmaster();
                    return Ok(lock);
                }
                None => (10, EmbeddedError::Busy { dir: self.root.clone() }),
                Some(one) => {
                    let dir = self.root.clone();
                    (if one.ready { 1 } else { 10 }, EmbeddedError::Running { dir, pid: one.pid })
                }
            };
            if begin.elapsed() >= Duration::from_secs(patience) {
                return Err(error);
            }
            pause();
        }
    }

    /// PostgreSQL deals with a postmaster.pid left by a crash, unless a process of the same user has that id by
    /// now: in a container, where ids start low each time, that may well be us.
    fn forget_stale_postmaster(&self) {
        let Some(stale) = self.postmaster().filter(|one| is_alive(one.pid)) else {
            return;
        };
        let path = self.data.join("postmaster.pid");
        tracing::warn!("process {} is no server of `{}`: removing the stale file", stale.pid, path.display());
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(%error, "could not remove `{}`", path.display());
        }
    }

    /// What postmaster.pid says; none without one.
    pub fn postmaster(&self) -> Option<Postmaster> {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        let mut lines = text.lines();
        Some(Postmaster {
            pid: lines.next()?.trim().parse().ok().filter(|pid| *pid > 0)?,
            ready: lines.nth(6).is_some_and(|status| status.trim() == "ready"), // line 8 of pidfile.h
        })
    }

    /// The folder for the socket: `run`, or where that path is too long a short one in `/tmp`, which `run` then
    /// links to, so that it stays the same over restarts.
    pub fn socket_dir(&self, account: &Account) -> Result<PathBuf, EmbeddedError> {
        let run = self.root.join("run");
        let link = fs::read_link(&run).ok();
        if fits_socket(&run) {
            if link.is_some() {
                fs::remove_file(&run).map_err(EmbeddedError::folder("remove the old link", &run))?;
            }
            return Ok(run);
        }
        // Temp dirs are cleaned at boot, and then anybody could make that name: only a folder of our user will do.
        if let Some(short) = &link
            && let Ok(found) = fs::symlink_metadata(short)
            && found.is_dir()
            && found.uid() == account.uid
        {
            return Ok(short.clone());
        }
        let short = private_folder(Path::new("/tmp/buildreactor-XXXXXX"), account)?;
        let gone = if link.is_some() { fs::remove_file(&run) } else { fs::remove_dir_all(&run) };
        match gone {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(EmbeddedError::folder("replace by a link", &run)(error))
            }
            _ => symlink(&short, &run).map_err(EmbeddedError::folder("create the link", &run)),
        }?;
        tracing::info!("`{}` is too long for a socket: it is in `{}`", run.display(), short.display());
        Ok(short)
    }

    /// The size of the log, bytes; a long one is put aside first.
    pub fn log_size(&self) -> u64 {
        let log = self.log();
        let size = fs::symlink_metadata(&log).map_or(0, |found| found.len());
        if size > LOG_MAX && fs::rename(&log, self.root.join("postgres.log.1")).is_ok() {
            return 0;
        }
        size
    }

    /// The last lines of the log, of what was written from byte `from` on.
    pub fn log_tail(&self, from: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            // Not through a link: that could make root show a file the server's user may not read.
            let mut file = OpenOptions::new().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(self.log())?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(from.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
            let mut text = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut text)?;
            Ok(text)
        };
        match read() {
            Ok(text) if text.is_empty() => "(nothing)".to_owned(),
            Ok(text) => {
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<&str> = text.lines().collect();
                format!("\n{}", lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"))
            }
            Err(error) => format!("(`{}` can't be read: {error})", self.log().display()),
        }
    }
}

/// What a postmaster.pid says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Postmaster {
    pub pid: i32,
    pub ready: bool,
}

impl Postmaster {
    /// Whether that process lives and works in this data folder: its id may be somebody else's by now.
    fn is_alive_in(&self, data: &Path) -> bool {
        // A process we may not signal belongs to another user, and the data does not.
        if kill(Pid::from_raw(self.pid), None).is_err() {
            return false;
        }
        // Linux only; elsewhere to be alive is enough, as it is for PostgreSQL.
        match fs::read_link(format!("/proc/{}/cwd", self.pid)) {
            Ok(cwd) => data.canonicalize().is_ok_and(|data| data == cwd),
            Err(_) => true,
        }
    }
}

fn fits_socket(dir: &Path) -> bool {
    dir.as_os_str().as_bytes().len() + SOCKET_NAME.len() <= SOCKET_PATH_MAX
}

/// A new folder with a random name, mode 0700, of the server's user.
fn private_folder(template: &Path, account: &Account) -> Result<PathBuf, EmbeddedError> {
    let folder = mkdtemp(template).map_err(|error| EmbeddedError::folder("create", template)(error.into()))?;
    if account.other {
        lchown(&folder, Some(account.uid), Some(account.gid)).map_err(EmbeddedError::folder("give away", &folder))?;
    }
    Ok(folder)
}
