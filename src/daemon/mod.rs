//! Builds everything in order, listens to signals, stops in order.

mod janitor;
mod retention;

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::config::{Config, KILL_TIME};
use crate::database::migrate::{SchemaState, known_version, schema_state};
use crate::database::queries::Hello;
use crate::database::{ConnInfo, Database, DatabaseError, SessionLimits};
use crate::executor::{Folders, Registry, process};
pub use crate::reactor::Left;
use crate::reactor::herald::Herald;
use crate::reactor::{self, Order, Outage, Reactor, Shared};

/// After the order to stop: how long results are waited for. Terminate (5 s), kill, and the COMMIT fit in.
const LAST_PATIENCE: Duration = Duration::from_secs(15);

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
    /// Signals cannot be received.
    #[error("cannot listen to signals: {0}")]
    Signals(std::io::Error),
}

/// Runs a worker until it is told to leave.
///
/// # Errors
/// It could not start. A database that is down is waited for, at the start too.
pub async fn run(config: &Config, info: ConnInfo) -> Result<Left, DaemonError> {
    let (orders, receive_orders) = mpsc::unbounded_channel();
    let signals = listen_to_signals(orders)?;
    let worker = &config.worker;
    let slots = i32::try_from(worker.slots).unwrap_or(i32::MAX);
    let hello = Hello {
        name: worker.name.clone(),
        host: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        pid: i32::try_from(std::process::id()).unwrap_or(0),
        slots,
        labels: worker.labels.clone(),
        builders: worker.builders.clone(),
    };
    let folders = Folders::new(&worker.state_dir, &worker.name);
    let settings = process::Settings { folders: folders.clone(), file_limit: config.log.file_limit };
    // Waits for processes of an earlier daemon, so not on a thread of the runtime.
    let mut receive_orders = receive_orders;
    let executors = tokio::select! {
        executors = tokio::task::spawn_blocking(move || Registry::new(settings)) => executors,
        _ = receive_orders.recv() => return Ok(Left::Ordered),
    };
    let executors = executors
        .map_err(std::io::Error::other)
        .and_then(|result| result)
        .map_err(|source| DaemonError::Folder { folder: folders.root().display().to_string(), source })?;

    if !schema_fits(&info, &mut receive_orders).await? {
        return Ok(Left::Ordered);
    }
    // The server lets go of a claim later than we do (lease), and earlier than others take it over (grace).
    let limits = SessionLimits { slots: worker.slots, claim_idle: config.lease.lease + KILL_TIME };
    let database = Database::new(info, limits, &format!("buildreactor {}", worker.name))?;
    let (herald, proclaim) = Herald::new(database.clone());
    let proclaim = crate::tasks::spawn(proclaim);
    let tidying = TaskTracker::new();
    let retention = crate::tasks::spawn(retention::run(database.clone(), config.retention.clone()));
    let janitor = crate::tasks::spawn(janitor::run(folders.attempts(), config.log.keep));
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
        giving_back: giving_back.clone(),
        giving_up: giving_up.clone(),
        tidying: tidying.clone(),
    });
    let deadline = crate::tasks::spawn(async move {
        giving_back.cancelled().await;
        tokio::time::sleep(LAST_PATIENCE).await;
        giving_up.cancel();
    });
    let left = Reactor::new(shared, receive_orders).run().await;
    drop((signals, janitor, retention, deadline));
    tidying.close();
    // The reactor has dropped its heralds; what they said is still sent, and old folders removed, but not for ever.
    let farewell = async {
        tidying.wait().await;
        if let Err(error) = proclaim.await {
            tracing::debug!(%error, "events were not sent");
        }
    };
    if tokio::time::timeout(Duration::from_secs(2), farewell).await.is_err() {
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

/// SIGTERM and SIGINT stop and give back; SIGUSR1 drains.
fn listen_to_signals(orders: mpsc::UnboundedSender<Order>) -> Result<AbortOnDropHandle<()>, DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let mut drain = signal(SignalKind::user_defined1()).map_err(DaemonError::Signals)?;
    Ok(crate::tasks::spawn(async move {
        loop {
            let order = tokio::select! {
                _ = terminate.recv() => Order::Stop,
                _ = interrupt.recv() => Order::Stop,
                _ = drain.recv() => Order::Drain,
            };
            if orders.send(order).is_err() {
                break;
            }
        }
    }))
}
