//! Executor `process`: a script on this machine, under a [guardian], forked by the worker's [keeper].

mod client;
mod environment;
mod fork;
mod guardian;
pub mod keeper;
mod namespace;
mod notes;
mod peer;
mod prepare;
mod protocol;
mod remove;
mod tidy;
mod tree;

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::client::{KeeperClient, left};
pub use self::fork::{is_ignored, reset_signals, set_environment};
use self::prepare::{Unprepared, prepare};
use self::protocol::{End, Status};
pub use self::remove::remove_path;
use self::tidy::ALL_LEVELS;
pub use self::tidy::{RECORDED, is_untidy, reopen, started, tidy};
use super::{Begin, Executor, Folders, Ready, Running, Tether, boot_id, human};
use crate::logs::private;
use crate::model::{BuildId, Builder, Ended, Exit, Job, Outcome, Usage, clean_line};

/// Between terminate and kill at a time limit.
pub const KILL_AFTER: Duration = Duration::from_secs(5);

/// After a build could not be started here: others may take them.
const UNABLE: Duration = Duration::from_secs(30);

/// Likewise where the disk was full, which the end of another build may have mended.
const FULL: Duration = Duration::from_secs(5);

/// EX_TEMPFAIL of sysexits.h: the script says that the machinery failed, and to try again.
pub const TEMPFAIL: i32 = 75;

/// What the process executor needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The worker's folders.
    pub folders: Folders,
    /// Bytes of output kept on disk for each attempt.
    pub file_limit: u64,
    /// Put attempts into PID namespaces, where the kernel allows it.
    pub pid_namespace: bool,
}

/// Runs scripts.
pub struct ProcessExecutor {
    settings: Settings,
    keeper: KeeperClient,
    /// Why builds could not be started lately, and until when none is tried.
    unable: Mutex<Option<(String, Instant)>>,
}

impl ProcessExecutor {
    /// Prepares the worker's folder, and finds the keeper that an earlier daemon left, or starts one. Without a living one it waits until
    /// every process of earlier attempts on this folder is gone.
    ///
    /// # Errors
    /// The folder cannot be used, or another daemon uses it.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn new(settings: Settings) -> io::Result<ProcessExecutor> {
        private::make_dir(&settings.folders.attempts())?;
        let keeper = KeeperClient::new(settings.folders.root()).await?;
        Ok(ProcessExecutor { settings, keeper, unable: Mutex::default() })
    }

    /// Nothing was started, and nothing is for `pause`.
    fn give_back(&self, job: &Job, error: &str, pause: Duration) -> Ended {
        let why = format!("worker `{}` cannot start builds: {error}", job.worker);
        let detail = format!("given back: {why}");
        *self.unable.lock().unwrap_or_else(PoisonError::into_inner) = Some((why, Instant::now() + pause));
        Ended::without_process(Outcome::GivenBack, detail)
    }

    async fn run_script(&self, job: &Job, begin: Begin, tether: Tether) -> Ended {
        let dir = job.dir.clone();
        let reopen = || {
            tokio::task::spawn_blocking({
                let dir = dir.clone();
                move || reopen(&dir, ALL_LEVELS)
            })
        };
        let status = match begin {
            Begin::Adopt => {
                let _reopened = reopen().await;
                if started(&job.dir) != Some(job.started_us) {
                    // Nobody had an answer to its beginning.
                    let detail = format!("given back: worker `{}` has nothing of it", job.worker);
                    return Ended::without_process(Outcome::GivenBack, detail);
                }
                match self.keeper.adopt(&job.id.to_string(), &job.dir, &tether).await {
                    // By a daemon that had no time to record it.
                    Ok(Some(status)) if status.end == End::Stopped => {
                        let detail = format!("given back: worker `{}` stopped", job.worker);
                        return Ended {
                            outcome: Outcome::GivenBack,
                            exit: None,
                            detail: Some(detail),
                            ..ended(&status)
                        };
                    }
                    Ok(Some(status)) => Ok(status),
                    Ok(None) => {
                        let detail = "its keeper was gone when the worker came back";
                        return Ended::without_process(Outcome::Lost, detail.to_owned());
                    }
                    Err(error) => Err(error),
                }
            }
            Begin::Start => {
                let (for_files, settings) = (job.clone(), self.settings.clone());
                let prepared = tokio::task::spawn_blocking(move || prepare(&for_files, &settings)).await;
                match prepared.unwrap_or_else(|error| Err(io::Error::other(error).into())) {
                    Ok(spec) => match self.keeper.run(spec, &tether).await {
                        Ok(Ok(status)) => Ok(status),
                        Ok(Err(error)) => return self.give_back(job, &error.to_string(), UNABLE),
                        Err(error) => Err(error),
                    },
                    Err(Unprepared::Full(error)) => return self.give_back(job, &error.to_string(), FULL),
                    Err(Unprepared::Failed(error)) => {
                        return Ended::without_process(Outcome::Error, format!("cannot prepare the build: {error}"));
                    }
                    Err(Unprepared::Recipe(why)) => return Ended::without_process(Outcome::Impossible, why),
                }
            }
        };
        let _reopened = reopen().await;
        match status {
            Ok(status) => ended(&status),
            Err(error) => Ended::without_process(Outcome::Error, format!("the keeper failed: {error}")),
        }
    }
}

impl Executor for ProcessExecutor {
    fn run<'a>(&'a self, job: &'a Job, begin: Begin, tether: Tether) -> Running<'a> {
        Box::pin(self.run_script(job, begin, tether))
    }

    fn ready<'a>(&'a self, _builder: &'a Builder, _candidates: &'a [BuildId]) -> Ready<'a> {
        let unable = self.unable.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = match unable {
            Some((why, until)) if Instant::now() < until => Err(why),
            Some(_) | None => Ok(()),
        };
        Box::pin(std::future::ready(answer))
    }

    /// Started on another machine, or before this one was booted, and without a result: a folder that moves from machine to machine, or
    /// lacks what was written last, proves nothing about the processes there.
    fn is_elsewhere(&self, job: &Job) -> bool {
        job.boot.as_ref().is_some_and(|boot| *boot != boot_id()) && left(&job.dir).is_none()
    }

    fn detail(&self) -> Option<String> {
        let why_not = if self.settings.pid_namespace {
            self.keeper.no_namespace()
        } else {
            Some("[worker] pid_namespace is false".to_owned())
        };
        Some(match why_not {
            None => "process trees: PID namespace".to_owned(),
            Some(why) => format!("process trees: subreaper ({why})"),
        })
    }
}

/// Replaces what is in a small file. On a full disk too, when something was in it: it takes no new block.
fn write_over(file: &std::fs::File, text: &str) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Translates what the guardian saw into an outcome and a line for people.
fn ended(status: &Status) -> Ended {
    let exit = match (status.exit_code, status.term_signal) {
        (Some(code), _) => Some(Exit::Code(code)),
        (None, Some(signal)) => Some(Exit::Signal(signal)),
        (None, None) => None,
    };
    let (outcome, mut detail) = match &status.end {
        End::NotStarted(why) => (Outcome::Error, Some(why.clone())),
        End::GuardianGone => (Outcome::Error, Some("its guardian was killed".to_owned())),
        End::KeeperGone => (Outcome::Error, Some("its keeper was killed".to_owned())),
        End::LeaseOver => (Outcome::Lost, Some("its claim was not confirmed within the lease".to_owned())),
        End::Timeout(ms) => {
            (Outcome::TimedOut, Some(format!("ran longer than its timeout of {}", human(Duration::from_millis(*ms)))))
        }
        End::Silence(ms) => (Outcome::TimedOut, Some(format!("no output for {}", human(Duration::from_millis(*ms))))),
        End::Stopped => (Outcome::Lost, Some("stopped".to_owned())),
        End::Exited => match exit {
            Some(Exit::Code(0)) => (Outcome::Passed, None),
            Some(Exit::Code(TEMPFAIL)) => {
                (Outcome::Error, Some("exit code 75: the script asks to be tried again".to_owned()))
            }
            Some(Exit::Code(code)) => (Outcome::Failed, Some(format!("exit code {code}"))),
            Some(Exit::Signal(signal)) => (Outcome::Failed, Some(format!("ended by {}", signal_name(signal)))),
            None => (Outcome::Error, Some("its end was not seen".to_owned())),
        },
    };
    let mut add = |text: String| {
        detail = Some(match detail.take() {
            Some(before) => format!("{before}; {text}"),
            None => text,
        });
    };
    if let Some(error) = &status.log_error {
        add(format!("its log on the worker is not complete: {error}"));
    }
    match status.survivors {
        0 => {}
        1 => add("a process of another user could not be killed".to_owned()),
        several => add(format!("{several} processes of another user could not be killed")),
    }
    Ended {
        outcome,
        exit,
        detail: detail.map(|text| clean_line(&text, 500)),
        usage: Some(Usage {
            user_seconds: status.user_seconds,
            system_seconds: status.system_seconds,
            max_rss_bytes: status.max_rss_bytes,
        }),
        log_bytes: i64::try_from(status.log_bytes).ok(),
        times: None,
    }
}

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number)
        .map_or_else(|_| format!("signal {number}"), |signal| signal.as_str().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(end: End, exit_code: Option<i32>, term_signal: Option<i32>) -> Status {
        Status { exit_code, term_signal, ..Status::without_process(end) }
    }

    #[test]
    fn exit_codes_and_signals_become_outcomes() {
        let table = [
            (status(End::Exited, Some(0), None), Outcome::Passed, None),
            (status(End::Exited, Some(3), None), Outcome::Failed, Some("exit code 3")),
            (status(End::Exited, None, Some(9)), Outcome::Failed, Some("ended by SIGKILL")),
            (
                status(End::Exited, Some(75), None),
                Outcome::Error,
                Some("exit code 75: the script asks to be tried again"),
            ),
            (
                status(End::Timeout(5_400_000), None, Some(15)),
                Outcome::TimedOut,
                Some("ran longer than its timeout of 1h 30m"),
            ),
            (status(End::Silence(60_000), None, Some(15)), Outcome::TimedOut, Some("no output for 1m")),
            (status(End::Silence(61_500), None, Some(15)), Outcome::TimedOut, Some("no output for 1m 1.5s")),
            (status(End::NotStarted("no".into()), None, None), Outcome::Error, Some("no")),
        ];
        for (status, outcome, detail) in table {
            let ended = ended(&status);
            assert_eq!((ended.outcome, ended.detail.as_deref()), (outcome, detail));
        }
    }
}
