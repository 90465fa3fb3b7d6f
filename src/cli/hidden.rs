//! What a daemon is started with may hold passwords: in its environment, and in a connection string on its command line. The kernel keeps
//! both as they were at the exec, and shows them in `/proc/PID/environ` and `/proc/PID/cmdline`, whatever the process does later. So
//! the daemon executes its own program once more, without them, and hands them over in memory that only it has. It keeps its process
//! id, its open files and its standard output; its standard input, which it does not use, carries the memory.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

/// Name of the memory; the kernel shows it as the file behind a descriptor.
const NAME: &std::ffi::CStr = c"buildreactor-start";
const SHOWN: &str = "/memfd:buildreactor-start (deleted)";

/// Variables that stay where everybody may see them, because the loader or the C library reads them before the program has its turn.
const PLAIN: &[&str] = &["HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "TZDIR", "USER"];
const PLAIN_PREFIXES: &[&str] = &["LC_", "LD_", "GLIBC_", "MALLOC_"];

#[derive(Default, Serialize, Deserialize)]
struct Start {
    arguments: Vec<Vec<u8>>,
    environment: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The command line that this program was started with.
pub struct CommandLine {
    pub arguments: Vec<OsString>,
    /// Nothing of it is to be seen from outside any more.
    is_hidden: bool,
}

impl CommandLine {
    /// Of this process, or of the one that executed it by [`CommandLine::hide`], whose environment it takes over. At the start of the
    /// program, which has one thread then.
    pub fn take() -> CommandLine {
        match handed_over() {
            Some(start) => {
                let _named = nix::sys::prctl::set_name(c"buildreactor");
                let pairs = start.environment.into_iter();
                let variables = pairs.map(|(name, value)| (OsString::from_vec(name), OsString::from_vec(value)));
                crate::executor::process::set_environment(variables);
                let arguments = start.arguments.into_iter().map(OsString::from_vec).collect();
                CommandLine { arguments, is_hidden: true }
            }
            None => CommandLine { arguments: std::env::args_os().collect(), is_hidden: false },
        }
    }

    /// Executes this program again with nothing to be seen. Comes back if that has been done, or why it cannot be.
    ///
    /// # Errors
    /// No memory, or no `/proc`.
    pub fn hide(&self) -> std::io::Result<()> {
        if self.is_hidden {
            return Ok(());
        }
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        let start = Start {
            arguments: self.arguments.iter().map(|argument| bytes(argument)).collect(),
            environment: std::env::vars_os().map(|(name, value)| (bytes(&name), bytes(&value))).collect(),
        };
        let memory = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC)?);
        (&memory).write_all(&serde_json::to_vec(&start)?)?;
        rustix::fs::seek(&memory, rustix::fs::SeekFrom::Start(0))?;
        let mut command = Command::new("/proc/self/exe");
        let (program, arguments) = self.arguments.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
        command.arg0(program).args(arguments.iter().map(|argument| shown(argument)));
        command.env_clear().envs(std::env::vars_os().filter(|(name, _)| is_plain(name)));
        Err(command.stdin(Stdio::from(OwnedFd::from(memory))).exec())
    }
}

fn handed_over() -> Option<Start> {
    if std::fs::read_link("/proc/self/fd/0").ok()?.to_str() != Some(SHOWN) {
        return None;
    }
    let mut memory = File::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
    let mut text = Vec::new();
    memory.read_to_end(&mut text).ok()?;
    // Whoever inherits it finds nothing in it.
    memory.set_len(0).ok()?;
    nix::unistd::dup2_stdin(File::open("/dev/null").ok()?).ok()?;
    serde_json::from_slice(&text).ok()
}

fn is_plain(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    PLAIN.contains(&name.as_ref()) || PLAIN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// An argument as `ps` may show it: a connection string may hold a password.
fn shown(argument: &OsStr) -> OsString {
    let text = argument.to_string_lossy();
    let name = text.split_once('=').map(|(name, _)| name).filter(|name| name.starts_with('-'));
    if !text.contains('@') && !text.contains("://") && !text.to_ascii_lowercase().contains("password") {
        argument.to_owned()
    } else {
        name.map_or_else(|| "...".into(), |name| format!("{name}=...").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_strings_are_not_shown_and_all_else_is() {
        for (argument, expected) in [
            ("run", "run"),
            ("--config=/etc/b.toml", "--config=/etc/b.toml"),
            ("--database=postgresql://u:secret@h/b", "--database=..."),
            ("postgresql:///b?password=secret", "..."),
            ("host=h PASSWORD='secret'", "..."),
            ("-dhost=h password=secret", "-dhost=..."),
            ("builds", "builds"),
        ] {
            assert_eq!(shown(OsStr::new(argument)), expected, "{argument}");
        }
    }
}
