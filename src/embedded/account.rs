//! Who runs the server. `postgres` and `initdb` refuse root, and CI runs as root.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::unistd::{User, geteuid};

use super::error::EmbeddedError;

/// The user the server's processes and files belong to.
#[derive(Debug, Clone)]
pub(super) struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// We are root and this is somebody else.
    pub other: bool,
}

impl Account {
    /// Ourselves; as root `postgres`, or `nobody` where there is none.
    pub fn choose() -> Result<Account, EmbeddedError> {
        let me = geteuid();
        if !me.is_root() {
            let user = User::from_uid(me).ok().flatten();
            return Ok(Account {
                name: user.map_or_else(|| me.to_string(), |user| user.name),
                uid: me.as_raw(),
                gid: nix::unistd::getegid().as_raw(),
                other: false,
            });
        }
        let user = ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| User::from_name(name).ok().flatten())
            .ok_or(EmbeddedError::NoAccount)?;
        Ok(Account { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), other: true })
    }

    /// A command run by this user, from `/` (our own working folder may be closed to it), in English, without our passwords, and without
    /// the `PG*` variables that would lead a server or `initdb` elsewhere.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        crate::config::without_secrets(&mut command).current_dir("/").env("LC_ALL", "C");
        if self.other {
            // std also drops our supplementary groups when it changes the user.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// An error naming the first folder on the way to `path`, itself included, that this user cannot enter (or the
    /// file it cannot execute). What does not exist yet is no obstacle. Asks the kernel as that user, so access
    /// control lists count. Ourselves we don't ask about: the first real use fails with a clear enough error.
    pub fn must_reach(&self, path: &Path) -> Result<(), EmbeddedError> {
        if !self.other {
            return Ok(());
        }
        let mut way: Vec<&Path> = path.ancestors().filter(|step| step.exists()).collect();
        way.reverse();
        let output = self.shell(r#"for p; do [ -x "$p" ] || { printf %s "$p"; exit 1; }; done"#, &way)?;
        if output.status.success() {
            return Ok(());
        }
        Err(EmbeddedError::Unreachable {
            path: PathBuf::from(OsString::from_vec(output.stdout)),
            user: self.name.clone(),
        })
    }

    /// Whether this user can make a folder here, and remove it again.
    pub fn can_write(&self, folder: &Path) -> bool {
        self.shell(r#"[ -d "$1" ] && [ -x "$1" ] && [ -w "$1" ]"#, &[folder])
            .is_ok_and(|output| output.status.success())
    }

    fn shell(&self, script: &str, arguments: &[&Path]) -> Result<Output, EmbeddedError> {
        let program = "/bin/sh";
        self.command(program)
            .args(["-c", script, "sh"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| self.spawn_error(program, source))
    }

    pub fn spawn_error(&self, program: &str, source: std::io::Error) -> EmbeddedError {
        EmbeddedError::Spawn { program: program.to_owned(), user: self.name.clone(), source }
    }
}
