//! Builds everything in order, listens to signals, stops in order.

mod janitor;
mod kick;
mod postman;
mod retention;

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use self::postman::Postman;
use crate::config::{Config, KILL_TIME};
use crate::database::mail::Reach;
use crate::database::migrate::{SchemaState, known_version, schema_state};
use crate::database::queries::Hello;
use crate::database::{ConnInfo, Database, DatabaseError, News, SessionLimits, trust};
use crate::executor::buildbot::{self, BuildbotExecutor};
use crate::executor::{Folders, Registry, boot_id, new_id, process};
use crate::mail::{MailError, Mailer};
pub use crate::reactor::Left;
use crate::reactor::herald::Herald;
use crate::reactor::in_hand::InHand;
use crate::reactor::{self, Order, Outage, Reactor, Shared};
use crate::report::Chain;

/// After the order to stop: how long results are waited for. Terminate (5 s), kill, and the COMMIT fit in.
const LAST_PATIENCE: Duration = Duration::from_secs(15);

/// After SIGTERM, how long a second one can still turn leaving into stopping. With [`LAST_WORDS`] and the farewell it stays within two
/// seconds.
const SECOND_THOUGHT: Duration = Duration::from_millis(800);

/// What a daemon that leaves gives the database for its last statements.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// Why a daemon could not start, or had to leave.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The database refuses us, or the worker's name is in use.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// There is no schema, or it does not fit.
    #[error("{0}")]
    Schema(String),
    /// The state folder cannot be used.
    #[error("cannot use `{folder}` ([worker] state_dir): {source}")]
    Folder {
        /// The folder.
        folder: String,
        /// Why.
        source: std::io::Error,
    },
    /// `[mail]` cannot work as it is.
    #[error(transparent)]
    Mail(#[from] MailError),
    /// The kick port cannot be opened.
    #[error("cannot listen on `{address}` ([kick] listen): {source}")]
    Kick {
        /// The port.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// A section `[buildbot.NAME]` cannot work as it is.
    #[error("{0}")]
    Buildbot(String),
    /// Signals cannot be received.
    #[error("cannot listen to signals: {0}")]
    Signals(std::io::Error),
}

/// Runs a worker until it is told to leave.
///
/// # Errors
/// It could not start. A database that is down is waited for, at the start too.
pub async fn run(config: &Config, info: ConnInfo) -> Result<Left, DaemonError> {
    let mailer = config.mail.is_on().then(|| Mailer::new(&config.mail)).transpose()?;
    let (orders, receive_orders) = mpsc::unbounded_channel();
    let leaving = CancellationToken::new();
    let signals = listen_to_signals(orders, leaving.clone())?;
    let worker = &config.worker;
    let slots = i32::try_from(worker.slots).unwrap_or(i32::MAX);
    let folders = Folders::new(&worker.state_dir, &worker.name);
    let unusable = |source| DaemonError::Folder { folder: folders.root().display().to_string(), source };
    let hello = Hello {
        name: worker.name.clone(),
        folder: folders.id().map_err(unusable)?,
        boot: boot_id(),
        run: new_id().map_err(unusable)?,
        host: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        pid: i32::try_from(std::process::id()).unwrap_or(0),
        slots,
        labels: worker.labels.clone(),
        builders: worker.builders.clone(),
        lease: config.lease.lease,
        grace: config.lease.grace,
    };
    let settings = process::Settings {
        folders: folders.clone(),
        file_limit: config.log.file_limit,
        pid_namespace: worker.pid_namespace,
    };
    let port = match config.kick.listen {
        Some(address) => Some(
            kick::open(address).await.map_err(|source| DaemonError::Kick { address: address.to_string(), source })?,
        ),
        None => None,
    };
    let masters = buildbot::Settings { masters: config.buildbot.clone(), file_limit: config.log.file_limit };
    let masters = BuildbotExecutor::new(masters).map_err(DaemonError::Buildbot)?;
    // May wait for processes of an earlier daemon.
    let mut receive_orders = receive_orders;
    let executors = tokio::select! {
        executors = Registry::new(settings, masters) => executors,
        _ = receive_orders.recv() => return Ok(Left::Ordered),
    };
    let executors =
        executors.map_err(|source| DaemonError::Folder { folder: folders.root().display().to_string(), source })?;

    if !schema_fits(&info, &mut receive_orders).await? {
        return Ok(Left::Ordered);
    }
    // Nothing of it is needed to run: `check` says the same.
    match trust::give_paths_at_start(&info).await {
        Ok(notes) => notes.iter().for_each(|note| tracing::warn!("{note}")),
        Err(error) => tracing::warn!("{}", Chain(&error)),
    }
    // The server lets go of a claim later than we do (lease), and earlier than others take it over (grace).
    let limits = SessionLimits { slots: worker.slots, claim_idle: config.lease.lease + KILL_TIME };
    let database = Database::new(info, limits, &format!("buildreactor {}", worker.name))?;
    let bell = Arc::new(Notify::new());
    let (herald, proclaim) = Herald::new(database.clone(), Arc::clone(&bell));
    let proclaim = crate::tasks::spawn(proclaim);
    let (tidying, in_hand) = (TaskTracker::new(), InHand::default());
    let retention =
        crate::tasks::spawn(retention::run(database.clone(), worker.name.clone(), config.retention.clone()));
    let janitor =
        crate::tasks::spawn(janitor::run(database.clone(), in_hand.clone(), folders.attempts(), config.log.keep));
    let stopping = CancellationToken::new();
    let postman = mailer.map(|mailer| {
        // No other daemon calls itself so, not even the next one of this worker: that one must not take this one's mail for its own.
        let name = format!("{} {} {}", worker.name, hello.pid, jiff::Timestamp::now());
        let (database, stopping) = (database.clone(), stopping.clone());
        let reach = Reach::default();
        crate::tasks::spawn(Postman { database, mailer, reach, name, bell, stopping }.run())
    });
    let news = Arc::new(News::default());
    let kicks = port.map(|port| crate::tasks::spawn(kick::run(port, Arc::clone(&news))));
    let (giving_back, giving_up) = (CancellationToken::new(), CancellationToken::new());
    let shared = Arc::new(Shared {
        database,
        hello,
        settings: reactor::Settings {
            slots: worker.slots,
            builders: worker.builders.clone(),
            poll: config.reactor.poll,
            ping: config.lease.ping,
            lease: config.lease.lease,
            grace: config.lease.grace,
            database_limit: config.log.database_limit,
            min_free_disk: config.worker.min_free_disk,
        },
        executors,
        folders,
        herald,
        leaving: leaving.clone(),
        giving_back: giving_back.clone(),
        giving_up: giving_up.clone(),
        tidying: tidying.clone(),
        in_hand,
    });
    let deadline = crate::tasks::spawn(async move {
        giving_back.cancelled().await;
        tokio::time::sleep(LAST_PATIENCE).await;
        giving_up.cancel();
    });
    let gone = async {
        leaving.cancelled().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let left = tokio::select! {
        left = Reactor::new(shared, receive_orders, news).run() => left,
        // A result may be under way at this moment; the next daemon asks the attempt's own row.
        () = gone => Ok(Left::Ordered),
    };
    drop((signals, kicks, janitor, retention, deadline));
    stopping.cancel();
    tidying.close();
    // The reactor has dropped its heralds; what they said is still sent, and old folders removed, but not for ever.
    let farewell = async {
        tidying.wait().await;
        if let Some(postman) = postman
            && let Err(error) = postman.await
        {
            tracing::error!("the postman failed, please report this: {error}");
        }
        if let Err(error) = proclaim.await {
            tracing::debug!(%error, "events were not sent");
        }
    };
    let patience = if leaving.is_cancelled() { Duration::from_millis(200) } else { Duration::from_secs(2) };
    if tokio::time::timeout(patience, farewell).await.is_err() {
        tracing::debug!("left before everything was tidied up");
    }
    Ok(left?)
}

/// Waits for the database, then looks at the schema. False: told to leave meanwhile.
async fn schema_fits(info: &ConnInfo, orders: &mut mpsc::UnboundedReceiver<Order>) -> Result<bool, DaemonError> {
    let (mut backoff, mut outage) = (reactor::backoff(), Outage::default());
    let state = loop {
        match schema_state(info).await {
            Ok(state) => break state,
            Err(error) if !error.is_transient() => return Err(error.into()),
            Err(error) => {
                outage.failed(&error);
                let delay = backoff.next().unwrap_or(Duration::from_secs(15));
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    _ = orders.recv() => return Ok(false),
                }
            }
        }
    };
    outage.over();
    let place = info.describe();
    match state {
        SchemaState::Current { .. } | SchemaState::Newer { usable: true, .. } => Ok(true),
        SchemaState::Missing => Err(DaemonError::Schema(format!(
            "there are no tables of buildreactor in {place}: run `buildreactor migrate` first"
        ))),
        SchemaState::Older { version } => Err(DaemonError::Schema(format!(
            "the schema in {place} is of an older program (version {version}, this one brings {}): run `buildreactor migrate` first",
            known_version()
        ))),
        SchemaState::Newer { version, usable: false } => Err(DaemonError::Schema(format!(
            "the schema in {place} is at version {version}, and this program knows versions up to {}: install the newer program",
            known_version()
        ))),
    }
}

/// SIGTERM leaves what runs to the next daemon, a second one or SIGINT stops it and gives it back; SIGUSR1 drains.
fn listen_to_signals(
    orders: mpsc::UnboundedSender<Order>,
    leaving: CancellationToken,
) -> Result<AbortOnDropHandle<()>, DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let mut drain = signal(SignalKind::user_defined1()).map_err(DaemonError::Signals)?;
    // Under nohup, or in the background of a shell: the terminal's signals do nothing to us. They are caught rather than ignored, because
    // whatever we start would inherit that.
    let kinds = [(Signal::SIGHUP, SignalKind::hangup()), (Signal::SIGQUIT, SignalKind::quit())];
    for (_, kind) in kinds.into_iter().filter(|(number, _)| process::is_ignored(*number)) {
        // Caught from now on, whether or not anybody listens.
        let _caught = signal(kind).map_err(DaemonError::Signals)?;
    }
    Ok(crate::tasks::spawn(async move {
        let (mut leave_at, mut stopping) = (None, false);
        loop {
            let order = tokio::select! {
                _ = terminate.recv() => if leave_at.is_some() || stopping { Order::Stop } else { Order::Leave },
                _ = interrupt.recv() => Order::Stop,
                _ = drain.recv() => Order::Drain,
                () = tokio::time::sleep_until(leave_at.unwrap_or_else(Instant::now)), if leave_at.is_some() => {
                    leaving.cancel();
                    std::future::pending().await
                }
            };
            match order {
                Order::Leave => leave_at = Some(Instant::now() + SECOND_THOUGHT),
                Order::Stop => (leave_at, stopping) = (None, true),
                // To drain is less than to leave.
                Order::Drain => {}
            }
            if orders.send(order).is_err() {
                break;
            }
        }
    }))
}
