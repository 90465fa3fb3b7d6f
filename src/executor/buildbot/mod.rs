//! Executor `buildbot`: a builder of a Buildbot master, started by a force scheduler and followed over the REST API.
//!
//! The build runs elsewhere, whatever becomes of this daemon, and the master is asked for it once. So a daemon that loses its claim leaves
//! it alone, and whoever claims the build next goes on with the same request: two runs never overlap.

mod events;
mod follow;
mod idle;
mod master;
mod obtain;
mod output;
mod request;
mod rows;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::follow::Following;
use self::idle::Farm;
pub use self::master::{Master, MasterError};
use self::obtain::Unasked;
use self::output::Output;
use super::{Begin, Executor, Ready, Running, Tether};
use crate::config;
use crate::logs::file::OutputWriter;
use crate::logs::private;
use crate::model::{BuildId, Builder, Ended, Job, Outcome, clean_line};

/// How long a builder is left alone that the master has refused to start, the first time and at most.
const REFUSED: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(900));

/// How long a daemon that is about to end waits for a master that does not answer: results are waited for 15 s.
const LAST_TRY: Duration = Duration::from_secs(8);

/// How long a master may take to say whether a builder is idle.
const READY: Duration = Duration::from_secs(3);

/// Which master an attempt runs on: its builder's settings may change meanwhile.
const TARGET: &str = "buildbot.json";

/// What the buildbot executor needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[buildbot.NAME]`, by NAME.
    pub masters: BTreeMap<String, config::Buildbot>,
    /// Bytes of output kept on disk for each attempt.
    pub file_limit: u64,
}

/// Runs builds on masters.
pub struct BuildbotExecutor {
    file_limit: u64,
    farms: BTreeMap<String, Farm>,
    /// Builders that could not be started.
    refused: Mutex<HashMap<String, Refusal>>,
    /// What the log says of builders whose builds wait.
    said: Mutex<HashMap<String, String>>,
}

struct Refusal {
    why: String,
    /// None is tried until then.
    until: Instant,
    /// How long that is.
    hold: Duration,
}

/// `builders.settings`, with what was left out of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Target {
    /// `None`: the only one.
    master: Option<String>,
    #[serde(default = "usual_scheduler")]
    scheduler: String,
    /// Its name there.
    #[serde(default)]
    builder: String,
}

fn usual_scheduler() -> String {
    "force".to_owned()
}

impl BuildbotExecutor {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// The settings of a master cannot be used; for people.
    pub fn new(settings: Settings) -> Result<BuildbotExecutor, String> {
        let farms = settings.masters.iter().map(|(name, master)| {
            let master = Master::new(name, master)?;
            Ok((name.clone(), Farm::new(Arc::new(master))))
        });
        let farms = farms.collect::<Result<_, String>>()?;
        Ok(BuildbotExecutor {
            file_limit: settings.file_limit,
            farms,
            refused: Mutex::default(),
            said: Mutex::default(),
        })
    }

    fn refused(&self) -> std::sync::MutexGuard<'_, HashMap<String, Refusal>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The master of a target.
    fn farm(&self, target: &Target) -> Result<&Farm, String> {
        match (&target.master, self.farms.len()) {
            (Some(name), _) => self
                .farms
                .get(name)
                .ok_or_else(|| format!("no worker that may take it has a section [buildbot.{name}]")),
            (None, 0 | 1) => {
                let only = self.farms.values().next();
                only.ok_or_else(|| "no worker that may take it has a section [buildbot.NAME]".to_owned())
            }
            (None, _) => Err("its settings name no \"master\", and its worker knows more than one".to_owned()),
        }
    }

    fn said(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether builder and scheduler of a builder here are on their master. `settings`: `builders.settings`.
    ///
    /// # Errors
    /// What is not there, or why it cannot be seen; for people.
    pub async fn knows(&self, builder: &str, settings: &str) -> Result<(), String> {
        let target = Target::of(settings, builder)?;
        let place = self.farm(&target)?.place(&target.builder, &target.scheduler).await;
        place.map(drop).map_err(|error| error.to_string())
    }

    async fn is_ready(&self, builder: &Builder, candidates: &[BuildId]) -> Result<(), String> {
        match self.could_start(builder, candidates).await {
            Ok(()) => Ok(()),
            // Nothing to mend, on a farm that others use too.
            Err(MasterError::Busy(why)) => Err(why),
            Err(error) => {
                let why = error.to_string();
                if self.said().insert(builder.name.clone(), why.clone()).as_ref() != Some(&why) {
                    tracing::warn!(builder = builder.name, "builds of {} wait: {why}", builder.name);
                }
                Err(why)
            }
        }
    }

    async fn could_start(&self, builder: &Builder, candidates: &[BuildId]) -> Result<(), MasterError> {
        // Of this daemon's settings and the builder's: no master was asked.
        let unfit = |message| MasterError::Refused { message, values: false };
        if let Some(refusal) = self.refused().get(&builder.name)
            && Instant::now() < refusal.until
        {
            return Err(unfit(refusal.why.clone()));
        }
        let target = Target::of(&builder.settings, &builder.name).map_err(unfit)?;
        let farm = self.farm(&target).map_err(unfit)?;
        let most = usize::try_from(builder.max_running).unwrap_or(1);
        let idle = farm.idle(&target.builder, &target.scheduler, most, candidates);
        // A slot of the worker waits for it.
        let Ok(idle) = tokio::time::timeout(READY, idle).await else {
            let text = format!("master `{}` does not answer within {} s", farm.master.name, READY.as_secs());
            return Err(MasterError::Unreachable(text));
        };
        idle
    }

    async fn run_request(&self, job: &Job, begin: Begin, tether: Tether) -> Ended {
        // Whatever becomes of this daemon, what it asked for can be found.
        tether.begun.store(true, Ordering::Release);
        let known = if begin == Begin::Adopt { read_target(&job.dir) } else { None };
        let target = known.map_or_else(|| Target::of(&job.settings, &job.builder), Ok);
        let found = target.and_then(|target| Ok((self.farm(&target)?, target)));
        let (farm, mut target) = match found {
            Ok(found) => found,
            Err(why) => return Ended::without_process(Outcome::Lost, why),
        };
        // Another may be added while it runs.
        target.master.get_or_insert_with(|| farm.master.name.clone());
        if let Err(error) = prepare(&job.dir, &target) {
            let detail = format!("cannot prepare `{}`: {error}", job.dir.display());
            return Ended::without_process(Outcome::Error, detail);
        }
        let output = Output::new(OutputWriter::create(&job.dir, self.file_limit));
        let mut following = Following::new(farm, job, (&target.builder, &target.scheduler), tether, output);
        let giving_back = following.tether.giving_back.clone();
        let last_try = async {
            giving_back.cancelled().await;
            tokio::time::sleep(LAST_TRY).await;
        };
        let run = async {
            let request = following.obtain(begin).await?;
            self.refused().remove(&job.builder);
            if self.said().remove(&job.builder).is_some() {
                tracing::info!(builder = job.builder, "builds of {} start again", job.builder);
            }
            Ok(following.follow(request).await)
        };
        let ended = tokio::select! {
            ended = run => ended,
            () = last_try => {
                let detail = format!("master `{}` does not answer; a request may go on there", farm.master.name);
                Ok(Ended::without_process(Outcome::Lost, detail))
            }
        };
        let ended = match ended {
            Ok(ended) | Err(Unasked::Ended(ended)) => ended,
            Err(Unasked::Refused(why)) => {
                let ended = Ended::without_process(Outcome::GivenBack, format!("given back: {why}"));
                let mut refused = self.refused();
                let before = refused.get(&job.builder).map(|refusal| refusal.hold * 2);
                let hold = before.unwrap_or(REFUSED.0).min(REFUSED.1);
                refused.insert(job.builder.clone(), Refusal { why, until: Instant::now() + hold, hold });
                ended
            }
        };
        let bytes = i64::try_from(following.output.bytes()).ok();
        let detail = match following.output.end() {
            Some(error) => {
                let note = format!("its log on the worker is not complete: {error}");
                Some(ended.detail.map_or(note.clone(), |detail| format!("{detail}; {note}")))
            }
            None => ended.detail,
        };
        Ended { log_bytes: bytes, detail: detail.map(|text| clean_line(&text, 500)), ..ended }
    }
}

impl Executor for BuildbotExecutor {
    fn run<'a>(&'a self, job: &'a Job, begin: Begin, tether: Tether) -> Running<'a> {
        Box::pin(self.run_request(job, begin, tether))
    }

    fn ready<'a>(&'a self, builder: &'a Builder, candidates: &'a [BuildId]) -> Ready<'a> {
        Box::pin(self.is_ready(builder, candidates))
    }

    /// Its master knows.
    fn is_elsewhere(&self, _job: &Job) -> bool {
        false
    }

    fn detail(&self) -> Option<String> {
        let names: Vec<&str> = self.farms.keys().map(String::as_str).collect();
        (!names.is_empty()).then(|| format!("Buildbot masters: {}", names.join(", ")))
    }
}

impl Target {
    /// Of a builder.
    ///
    /// # Errors
    /// Its settings are not what the table allows; for people.
    fn of(settings: &str, builder: &str) -> Result<Target, String> {
        let mut target: Target = serde_json::from_str(settings)
            .map_err(|error| format!("the settings of builder `{builder}` cannot be read: {error}"))?;
        if target.builder.is_empty() {
            builder.clone_into(&mut target.builder);
        }
        Ok(target)
    }
}

/// Makes the attempt's folder anew: its log is written from the beginning, the same again for one that is taken over.
fn prepare(dir: &Path, target: &Target) -> io::Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    private::make_dir(dir)?;
    private::write(&dir.join(TARGET), &serde_json::to_vec(target)?)
}

fn read_target(dir: &Path) -> Option<Target> {
    serde_json::from_str(&std::fs::read_to_string(dir.join(TARGET)).ok()?).ok()
}
