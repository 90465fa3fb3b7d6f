//! What can go wrong with a private server: each variant says what failed, for which folder, and what to do.

use std::io;
use std::path::PathBuf;

/// Why a private PostgreSQL could not be found, started or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    #[error(
        "found no PostgreSQL server (`initdb` and `postgres` in one folder) of version 14 or newer; looked in: {looked}. \
         Install one (Debian, Ubuntu: `apt install postgresql`; Fedora: `dnf install postgresql-server`; \
         Alpine: `apk add postgresql17`; Arch: `pacman -S postgresql`) or set BUILDREACTOR_PG_BIN to its folder"
    )]
    NoBinaries { looked: String },

    #[error("`{dir}` cannot be used as the folder of the PostgreSQL binaries: {reason}")]
    BadBinaries { dir: PathBuf, reason: String },

    #[error(
        "the data in `{dir}` was made by PostgreSQL {needs} and only {needs} can read it; looked in: {looked}. \
         Install PostgreSQL {needs}, or set BUILDREACTOR_PG_BIN to the folder of its binaries"
    )]
    WrongVersion { dir: PathBuf, needs: u32, looked: String },

    #[error(
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody` to run it as; \
         create one (`useradd --system postgres`) or run as an ordinary user"
    )]
    NoAccount,

    #[error(
        "user `{user}`, who runs the server because PostgreSQL refuses root, cannot get into `{path}`; \
         choose a place that user can reach (such as /var/lib or /srv), or allow it: `chmod o+x {path}`"
    )]
    Unreachable { path: PathBuf, user: String },

    #[error(
        "`{dir}` belongs to user id {owner} and is not for `{user}`, who runs the server; \
         choose another folder, or `chown -R {user} {dir}` if it is meant for this"
    )]
    NotOurs { dir: PathBuf, owner: u32, user: String },

    #[error(
        "`{path}` is there but holds no PostgreSQL data (no readable PG_VERSION in it); move it away or choose another folder"
    )]
    NotData { path: PathBuf },

    #[error(
        "a PostgreSQL server is already running in `{dir}` (process {pid}); stop whoever started it, or choose another folder"
    )]
    Running { dir: PathBuf, pid: i32 },

    #[error("another process is just preparing or stopping a server in `{dir}`; wait for it, or choose another folder")]
    Busy { dir: PathBuf },

    #[error("could not {action} `{path}`")]
    Folder { action: &'static str, path: PathBuf, source: io::Error },

    #[error("could not run `{program}` as user `{user}`")]
    Spawn { program: String, user: String, source: io::Error },

    #[error("PostgreSQL {version} {failed} in `{dir}`; the end of its log: {log}")]
    Start { dir: PathBuf, version: String, failed: String, log: String },

    #[error("the server in `{dir}` (process {pid}) was told to stop ({mode}) and still runs after {seconds} s; {hint}")]
    Stop { dir: PathBuf, pid: i32, mode: &'static str, seconds: u64, hint: &'static str },

    #[error("the throw-away server in `{dir}` has been stopped and its data removed; start a new one")]
    Removed { dir: PathBuf },
}

impl EmbeddedError {
    /// For `map_err`: an io error with what was tried and where.
    pub(super) fn folder(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| EmbeddedError::Folder { action, path, source }
    }
}
