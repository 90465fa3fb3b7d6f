//! What has to be on the disk before an attempt starts: its folder, the script, `build.json`, the working directory, the cache.

use std::ffi::{CString, OsStr};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, mkdirat, renameat, statat};
use rustix::io::Errno;

use super::environment::{self, Environment, Unfit};
use super::protocol::Spec;
use super::remove::{let_owner_in, open_folder, remove, remove_path};
use super::tidy::{ALL_LEVELS, MARK, WORK, is_closed, reopen};
use super::{KILL_AFTER, Settings, millis};
use crate::executor::new_id;
use crate::logs::private;
use crate::model::Job;

/// A build with more than this of its own to be written may be what does not fit on the disk.
const SMALL: usize = 1 << 20;

/// Held while folders that builds share are made or repaired. Two builds that begin at once would otherwise make the same folder, and one
/// of them would fail.
static SHARED_FOLDERS: Mutex<()> = Mutex::new(());

/// Why an attempt cannot be started.
#[derive(Debug)]
pub enum Unprepared {
    /// The disk is full, or out of inodes: nothing can be started here until there is room.
    Full(io::Error),
    /// Another error of this machine's.
    Failed(io::Error),
    /// What the rows ask for cannot be, on any machine; for people.
    Recipe(String),
}

impl From<io::Error> for Unprepared {
    fn from(error: io::Error) -> Unprepared {
        Unprepared::Failed(error)
    }
}

/// Makes everything that the attempt needs. What a build of before has left in its place is put right, and the build's log says so.
///
/// # Errors
/// See [`Unprepared`].
pub fn prepare(job: &Job, settings: &Settings) -> Result<Spec, Unprepared> {
    let small = job.row.len() + job.script.as_ref().map_or(0, String::len) < SMALL;
    write_all(job, settings).map_err(|unprepared| match unprepared {
        Unprepared::Failed(error)
            if small && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
        {
            Unprepared::Full(error)
        }
        other => other,
    })
}

fn write_all(job: &Job, settings: &Settings) -> Result<Spec, Unprepared> {
    let named = |what: &str, path: &Path| {
        let text = format!("{what} `{}`", path.display());
        move |error: io::Error| io::Error::new(error.kind(), format!("{text}: {error}"))
    };
    let dir = &job.dir;
    let root = settings.folders.root();
    reopen(dir, ALL_LEVELS);
    // Left by another database that used the same state_dir.
    remove_path(dir).map_err(named("make room for", dir))?;
    private::make_dir(dir).map_err(named("make", dir))?;
    let mut notes = Vec::new();
    let workdir = if job.keep_workspace {
        let path = settings.folders.kept_workspace(&job.builder, job.slot);
        make_lasting(root, &path, "its kept workspace", &mut notes).map_err(named("make", &path))?;
        path
    } else {
        let path = dir.join(WORK);
        std::fs::create_dir(&path).map_err(named("make", &path))?;
        path
    };
    let cache = settings.folders.cache(&job.builder);
    make_lasting(root, &cache, "BUILD_CACHE", &mut notes).map_err(named("make", &cache))?;
    let mark = dir.join(MARK);
    private::write(&mark, job.started_us.to_string().as_bytes()).map_err(named("write", &mark))?;
    let file = dir.join("build.json");
    private::write(&file, job.row.as_bytes()).map_err(named("write", &file))?;
    let text = script_text(job.script.as_deref().unwrap_or_default());
    let script = dir.join("script");
    // People's editors end files with a newline; people's SQL does not.
    let end = if text.ends_with('\n') { "" } else { "\n" };
    write_script(&script, &format!("{text}{end}")).map_err(named("write", &script))?;
    let script = path_text(&script)?;
    let command =
        if text.starts_with("#!") { vec![script] } else { vec!["/bin/sh".to_owned(), "-e".to_owned(), script] };
    let Environment { variables, notes: of_environment } =
        environment::of(job, &path_text(&workdir)?, &path_text(&cache)?, &path_text(&file)?).map_err(|unfit| {
            match unfit {
                Unfit::Here(why) => Unprepared::Failed(io::Error::other(why)),
                Unfit::Everywhere(why) => Unprepared::Recipe(why),
            }
        })?;
    notes.extend(of_environment);
    Ok(Spec {
        id: job.id.to_string(),
        command,
        env: variables,
        notes: notes.into_iter().map(|note| format!("[buildreactor: {note}]\n")).collect(),
        workdir,
        dir: dir.clone(),
        timeout_ms: millis(job.timeout),
        silence_ms: job.silence_timeout.map(millis),
        kill_after_ms: millis(KILL_AFTER),
        file_limit: settings.file_limit,
        // Filled in when it is started.
        until_ms: 0,
        namespace: settings.pid_namespace,
    })
}

/// What is run of a script. Editors put a byte order mark before the first line, and SQL a line break behind its opening quotes: then the
/// kernel would not see the `#!`. A byte order mark goes in any case, because no shell knows it.
fn script_text(script: &str) -> &str {
    let text = script.trim_start_matches(|c: char| c == '\u{feff}' || c.is_whitespace());
    if text.starts_with("#!") { text } else { script.trim_start_matches('\u{feff}') }
}

fn write_script(path: &Path, text: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(path)?;
    // Whatever the umask.
    file.set_permissions(std::fs::Permissions::from_mode(0o700))?;
    file.write_all(text.as_bytes())
}

fn path_text(path: &Path) -> io::Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("`{}` is not UTF-8", path.display())))
}

/// Makes a folder that builds keep between them, and puts right what they have made of it. `what`: its name in the notes for the build's
/// log. The worker's folder, and the first folder in it, may be an operator's symbolic links; what is below is ours.
fn make_lasting(root: &Path, path: &Path, what: &str, notes: &mut Vec<String>) -> io::Result<()> {
    let _alone = SHARED_FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    let below = path.strip_prefix(root).map_err(io::Error::other)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here: OwnedFd = rustix::fs::open(root, flags, Mode::empty())?;
    let let_in =
        |part: &OsStr| format!("{what}: nobody could read, write and search `{}`; its owner can again", part.display());
    for (depth, part) in below.iter().enumerate() {
        let name = CString::new(part.as_encoded_bytes())?;
        if depth == 0
            && let Ok(linked) = rustix::fs::openat(&here, &*name, flags, Mode::empty())
        {
            if let_owner_in(linked.as_fd())? {
                notes.push(let_in(part));
            }
            here = linked;
            continue;
        }
        here = match open_folder(here.as_fd(), &name) {
            Ok((folder, changed)) => {
                if changed {
                    notes.push(let_in(part));
                }
                if is_closed(&folder) {
                    // Another user's, through sudo. The folder that it is in is ours.
                    let aside = root.join(format!("aside-{}", new_id()?));
                    renameat(&here, &*name, rustix::fs::CWD, &aside)?;
                    let aside = aside.display();
                    notes.push(format!("{what} belonged to another user; it was made anew, the old one is `{aside}`"));
                    make(&here, &name)?
                } else {
                    folder
                }
            }
            Err(Errno::NOENT) => make(&here, &name)?,
            // An operator's bind mount.
            Err(Errno::XDEV) => rustix::fs::openat(&here, &*name, flags | OFlags::NOFOLLOW, Mode::empty())?,
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let kind = statat(&here, &*name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode;
                let kind = match FileType::from_raw_mode(kind) {
                    FileType::Symlink => "a symbolic link",
                    FileType::RegularFile => "a file",
                    _ => "no folder",
                };
                remove(here.as_fd(), part)?;
                notes.push(format!("{what} was {kind}; it was made anew"));
                make(&here, &name)?
            }
            Err(error) => return Err(error.into()),
        };
    }
    Ok(())
}

fn make(folder: &OwnedFd, name: &CString) -> io::Result<OwnedFd> {
    mkdirat(folder, &**name, Mode::from_raw_mode(0o777))?;
    let (made, _) = open_folder(folder.as_fd(), name)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_that_begin_at_once_make_their_shared_folders_once() {
        let root = std::env::temp_dir().join(format!("buildreactor-prepare-{}", new_id().unwrap()));
        for round in 0..200 {
            std::fs::create_dir_all(&root).unwrap();
            if round % 2 == 0 {
                // An earlier build has left a file where the folder belongs.
                std::fs::write(root.join("cache"), "").unwrap();
            }
            let made = |builder: String| {
                make_lasting(&root, &root.join("cache").join(builder), "BUILD_CACHE", &mut Vec::new())
            };
            std::thread::scope(|scope| {
                let builds: Vec<_> = (0..8).map(|n| scope.spawn(move || made(format!("b{}", n / 2)))).collect();
                for build in builds {
                    build.join().unwrap().unwrap();
                }
            });
            assert_eq!(std::fs::read_dir(root.join("cache")).unwrap().count(), 4);
            remove_path(&root).unwrap();
        }
    }

    #[test]
    fn what_stands_before_the_first_line_is_taken_off() {
        for (script, run) in [
            ("#!/bin/sh\ntrue", "#!/bin/sh\ntrue"),
            ("\u{feff}#!/bin/sh\ntrue", "#!/bin/sh\ntrue"),
            ("\n\n#!/bin/sh\ntrue", "#!/bin/sh\ntrue"),
            ("\r\n \t\r\n\u{feff}\n  #!/bin/sh\ntrue", "#!/bin/sh\ntrue"),
            ("\u{feff}\r\n#!/bin/sh\r\ntrue", "#!/bin/sh\r\ntrue"),
            ("\u{feff}echo 1", "echo 1"),
            // Line numbers in messages of the shell stay right.
            ("\n\n  echo 1\n#!/bin/sh", "\n\n  echo 1\n#!/bin/sh"),
            ("# comment\n#!/bin/sh", "# comment\n#!/bin/sh"),
            ("", ""),
        ] {
            assert_eq!(script_text(script), run, "{script:?}");
        }
    }
}
