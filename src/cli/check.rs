//! `buildreactor check`

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use nix::unistd::{Uid, User};

use super::output::Stdout;
use super::terminal::harmless_line;
use crate::config::{self, Config, KILL_TIME, Worker};
use crate::database::SessionLimits;
use crate::database::examine::{Asked, Finding, Findings, Level, OnMaster, examine};
use crate::executor::Folders;
use crate::executor::buildbot::{BuildbotExecutor, Master, MasterError, Settings};
use crate::mail::Mailer;
use crate::reactor::eligible;
use crate::report::Chain;

#[derive(clap::Args)]
pub struct Arguments {
    /// Also send a test mail to ADDRESS, as [mail] says
    #[arg(long, value_name = "ADDRESS")]
    mail: Option<String>,
}

/// Looks at everything a worker needs, one line each; fails when there is a problem.
pub async fn run(arguments: Arguments, config: &Config) -> anyhow::Result<ExitCode> {
    let mut found = Findings::default();
    found.ok("configuration", config.source());
    let worker = config.worker.clone();
    let mut found = tokio::task::spawn_blocking(move || {
        machine(&worker, &mut found);
        found
    })
    .await?;
    let (builders, refused) = match database(config, &mut found).await {
        Ok(builders) => (builders, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    if let Some(error) = &refused {
        found.problem("connection", Chain(error.as_ref()).to_string());
    }
    buildbot(config, &builders, &mut found).await;
    kick(config, &mut found);
    mail(arguments.mail.as_deref(), config, &mut found).await;
    match print(&found) {
        // Whoever reads it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed?,
    }
    Ok(match refused {
        Some(error) => ExitCode::from(super::exit_code(&error)),
        None if found.has_problem() => ExitCode::FAILURE,
        None => ExitCode::SUCCESS,
    })
}

/// Comes back with the builders that run on our Buildbot masters.
async fn database(config: &Config, found: &mut Findings) -> anyhow::Result<Vec<OnMaster>> {
    let info = super::conninfo(config)?;
    // As the daemon sets them.
    let limits = SessionLimits { slots: config.worker.slots, claim_idle: config.lease.lease + KILL_TIME };
    let asked = Asked {
        worker: config.worker.name.clone(),
        limits,
        lease: config.lease.lease,
        grace: config.lease.grace,
        masters: config.buildbot.keys().cloned().collect(),
        labels: config.worker.labels.clone(),
        deletes_builds: config.retention.builds.is_some() || config.retention.builds_per_builder.is_some(),
    };
    Ok(examine(&info, &asked, found).await?)
}

/// Each master: who it is, and who we are to it; and whether it has what `builders` ask for. Whether it lets us start builds is seen only by
/// doing so.
async fn buildbot(config: &Config, builders: &[OnMaster], found: &mut Findings) {
    const SUBJECT: &str = "buildbot";
    let mut bad = Vec::new();
    for (name, settings) in &config.buildbot {
        let master = match Master::new(name, settings) {
            Ok(master) => master,
            Err(error) => {
                bad.push(name.clone());
                found.problem(SUBJECT, error);
                continue;
            }
        };
        match master.about().await {
            Ok(about) => {
                let who = settings
                    .user
                    .as_ref()
                    .map_or_else(|| "nobody is logged in".to_owned(), |user| format!("logged in as `{user}`"));
                let text = format!("master `{name}` at {} is Buildbot {}; {who}", settings.url, about.version());
                found.ok(SUBJECT, text);
            }
            Err(error) => {
                let cure = match error {
                    MasterError::NotReached(_) => {
                        format!(": is [buildbot.{name}] url its web interface, and does it run?")
                    }
                    // These have it in them.
                    MasterError::Unreachable(_)
                    | MasterError::Login(_)
                    | MasterError::NotFound(_)
                    | MasterError::Busy(_)
                    | MasterError::Refused { .. } => String::new(),
                };
                bad.push(name.clone());
                found.problem(SUBJECT, format!("{error}{cure}"));
            }
        }
        if master.shows_password() {
            let text = format!(
                "others on the network can read the password for master `{name}`: put a proxy with TLS before it, and https:// into [buildbot.{name}] url"
            );
            found.note(SUBJECT, text);
        }
    }
    // What is wrong with a master is wrong with its builders, and has been said.
    let good = config.buildbot.clone().into_iter().filter(|(name, _)| !bad.contains(name));
    let settings = Settings { masters: good.collect(), file_limit: config.log.file_limit };
    let Ok(executor) = BuildbotExecutor::new(settings) else { return };
    let ours = |builder: &str| config.worker.builders.iter().any(|pattern| eligible::matches(pattern, builder));
    let to_ask = builders.iter().filter(|elsewhere| ours(&elsewhere.name) && !bad.contains(&elsewhere.master));
    for OnMaster { name: builder, settings, master } in to_ask {
        match executor.knows(builder, settings).await {
            Ok(()) => {
                found.ok(
                    SUBJECT,
                    format!("builds of `{builder}` have a builder and a force scheduler on master `{master}`"),
                );
            }
            Err(why) => found.problem(SUBJECT, format!("builds of `{builder}` cannot start: {why}")),
        }
    }
}

fn kick(config: &Config, found: &mut Findings) {
    const SUBJECT: &str = "kick";
    let Some(address) = config.kick.listen else { return };
    match std::net::TcpListener::bind(address) {
        Ok(_) => found.ok(SUBJECT, format!("every connection to {address} will be a wake")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let text = format!(
                "somebody listens on {address} already: if it is not this worker, name another in [kick] listen"
            );
            found.note(SUBJECT, text);
        }
        Err(error) => {
            let text = format!("cannot listen on {address}: {error}; name another address or port in [kick] listen");
            found.problem(SUBJECT, text);
        }
    }
}

/// The settings and templates; and a mail to `address`.
async fn mail(address: Option<&str>, config: &Config, found: &mut Findings) {
    const SUBJECT: &str = "mail";
    if !config.mail.is_on() {
        let off = "this daemon sends none: [mail] has neither url nor dry_run";
        return if address.is_some() { found.problem(SUBJECT, off) } else { found.ok(SUBJECT, off) };
    }
    let mut mailer = match Mailer::new(&config.mail) {
        Ok(mailer) => mailer,
        Err(error) => return found.problem(SUBJECT, error.to_string()),
    };
    let place = mailer.describe();
    if let Err(what) = mailer.look().await {
        return found.problem(SUBJECT, what);
    }
    let Some(address) = address else {
        let text = format!("settings and templates are good; `buildreactor check --mail ADDRESS` sends one to {place}");
        return found.ok(SUBJECT, text);
    };
    let letter = match mailer.write_test(address) {
        Ok(letter) => letter,
        Err(error) => return found.problem(SUBJECT, error.to_string()),
    };
    if !mailer.allows(address) {
        found.note(SUBJECT, format!("`{address}` is in none of [mail] domains: builds send no mail there"));
    }
    match mailer.deliver(&letter).await {
        Ok(()) => found.ok(SUBJECT, format!("{place} has taken a mail to {address}")),
        Err(failure) => {
            found.problem(SUBJECT, format!("{place} has not taken a mail to {address}: {}", failure.words()))
        }
    }
    mailer.rest().await;
}

fn print(found: &Findings) -> io::Result<()> {
    let mut out = Stdout;
    for Finding { level, subject, text } in &found.0 {
        let level = match level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "PROBLEM",
        };
        // A server's message may have more than one line.
        let text = harmless_line(&text.split_whitespace().collect::<Vec<_>>().join(" "));
        writeln!(out, "{level:<7}  {subject}: {text}")?;
    }
    out.flush()
}

/// What can be seen without the database.
fn machine(worker: &Worker, found: &mut Findings) {
    let folders = Folders::new(&worker.state_dir, &worker.name);
    let folder = folders.root().display();
    // The daemon makes what is missing.
    let Some(nearest) = folders.root().ancestors().find(|path| path.exists()) else {
        return found.problem("folder", format!("`{folder}` cannot be reached: name another [worker] state_dir"));
    };
    let place = nearest.display();
    let uid = Uid::effective();
    let user = User::from_uid(uid).ok().flatten().map_or(uid.to_string(), |user| user.name);
    match run_program_in(nearest) {
        Ok(()) => {
            found.ok("folder", format!("user `{user}` can write to `{place}` and run programs there"));
        }
        Err(Failed::Write(error)) => {
            let remedy = format!("make `{folder}` and chown it to `{user}`, or name another [worker] state_dir");
            found.problem("folder", format!("user `{user}` cannot write to `{place}`: {error}; {remedy}"));
        }
        Err(Failed::Run(error)) => {
            let remedy = "remount it if it is mounted noexec, or name another [worker] state_dir";
            found.problem("folder", format!("programs cannot run in `{place}`: {error}; {remedy}"));
        }
    }
    match nix::sys::statvfs::statvfs(nearest) {
        Ok(disk) => {
            let free = disk.blocks_available().saturating_mul(disk.fragment_size());
            let text =
                format!("{} free in `{place}`, [worker] min_free_disk is {}", size(free), size(worker.min_free_disk));
            if free < worker.min_free_disk {
                found.problem("disk", format!("{text}: make room, or lower it"));
            } else if disk.files() > 0 && disk.files_available() == 0 {
                found.problem("disk", format!("no inodes are free in `{place}`: remove files"));
            } else {
                found.ok("disk", text);
            }
        }
        Err(error) => found.problem("disk", format!("cannot see how much is free in `{place}`: {error}")),
    }
}

enum Failed {
    Write(io::Error),
    Run(io::Error),
}

/// Makes a folder with a small script in `dir`, runs it, and removes all.
fn run_program_in(dir: &Path) -> Result<(), Failed> {
    let folder = dir.join(format!(".buildreactor-check-{}", std::process::id()));
    std::fs::create_dir(&folder).map_err(Failed::Write)?;
    let script = folder.join("script");
    let outcome = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(&script)
        .and_then(|mut file| file.write_all(b"#!/bin/sh\nexit 0\n"))
        .map_err(Failed::Write)
        .and_then(|()| match config::without_secrets(&mut std::process::Command::new(&script)).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failed::Run(io::Error::other(status.to_string()))),
            Err(error) => Err(Failed::Run(error)),
        });
    outcome.and(std::fs::remove_dir_all(&folder).map_err(Failed::Write))
}

/// Bytes, for people.
fn size(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, unit)| bytes >= *unit) {
        // One decimal, cut rather than rounded: what is shown is there.
        Some((name, unit)) => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        let shown = [0, 1023, 1024, (5 << 30) + (1 << 29)].map(size);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "5.5 GiB"]);
    }

    #[test]
    fn a_program_is_run_and_nothing_is_left() {
        let dir = std::env::temp_dir().join(format!("buildreactor-check-test-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        assert!(run_program_in(&dir).is_ok());
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        std::fs::remove_dir(&dir).unwrap();
        assert!(matches!(run_program_in(&dir), Err(Failed::Write(_))));
    }
}
