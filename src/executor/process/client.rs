//! The daemon's side of the keeper: starts it, gives it orders, hears how attempts end.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::keeper::LOCK;
use super::protocol::{FromKeeper, Spec, Status, ToKeeper, VERSION};

/// How long processes of an earlier daemon may take to die.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

type Waiting = Arc<std::sync::Mutex<HashMap<String, oneshot::Sender<Status>>>>;

/// Orders to a keeper that is started when there is none.
pub struct KeeperClient {
    dir: PathBuf,
    live: Mutex<Option<Live>>,
}

struct Live {
    orders: OwnedWriteHalf,
    waiting: Waiting,
    gone: CancellationToken,
    _reader: AbortOnDropHandle<()>,
}

impl KeeperClient {
    /// For the keeper of the worker's folder `dir`.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn new(dir: &Path) -> io::Result<KeeperClient> {
        wait_for_earlier(dir)?;
        Ok(KeeperClient { dir: dir.to_owned(), live: Mutex::new(None) })
    }

    /// Runs one attempt to its end.
    ///
    /// # Errors
    /// The keeper could not be started, or died; when it died, every process of its attempts is gone.
    pub async fn run(&self, spec: Spec, stop: &CancellationToken) -> io::Result<Status> {
        let id = spec.id.clone();
        let (send, mut receive) = oneshot::channel();
        {
            let mut live = self.live.lock().await;
            if live.as_ref().is_none_or(|live| live.gone.is_cancelled()) {
                *live = None;
                *live = Some(start(&self.dir).await?);
            }
            let Some(keeper) = live.as_mut() else { return Err(io::ErrorKind::NotConnected.into()) };
            lock(&keeper.waiting).insert(id.clone(), send);
            if let Err(error) = say(&mut keeper.orders, &ToKeeper::Start(Box::new(spec))).await {
                lock(&keeper.waiting).remove(&id);
                return Err(error);
            }
        }
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "it died, and its builds with it");
        tokio::select! {
            status = &mut receive => return status.map_err(gone),
            () = stop.cancelled() => {}
        }
        if let Some(keeper) = self.live.lock().await.as_mut() {
            // When it cannot be told, it is gone, and says so on the other channel.
            let _told = say(&mut keeper.orders, &ToKeeper::Stop { id }).await;
        }
        receive.await.map_err(gone)
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Status>>> {
    waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn say(orders: &mut OwnedWriteHalf, message: &ToKeeper) -> io::Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    orders.write_all(&text).await
}

/// Blocks until no keeper or guardian of an earlier daemon on this folder is left: each of them holds the lock, and ends only
/// when its tree is gone.
fn wait_for_earlier(dir: &Path) -> io::Result<()> {
    let file = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK))?;
    let began = std::time::Instant::now();
    while file.try_lock().is_err() {
        if began.elapsed() > PATIENCE {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("another daemon uses `{}`, or processes of its builds do not die", dir.display()),
            ));
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    file.unlock()
}

async fn start(dir: &Path) -> io::Result<Live> {
    let folder = dir.to_owned();
    let stream = tokio::task::spawn_blocking(move || spawn(&folder)).await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    let (reader, orders) = UnixStream::from_std(stream)?.into_split();
    let mut lines = BufReader::new(reader).lines();
    match lines.next_line().await?.map(|line| serde_json::from_str(&line)) {
        Some(Ok(FromKeeper::Hello { version: VERSION })) => {}
        Some(Ok(_)) | Some(Err(_)) | None => {
            return Err(io::Error::other("the keeper did not start; its reason is on this daemon's standard error"));
        }
    }
    let waiting = Waiting::default();
    let gone = CancellationToken::new();
    let (answers, at_end) = (Arc::clone(&waiting), gone.clone());
    let reader = crate::tasks::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(FromKeeper::Ended { id, status }) => {
                    if let Some(sender) = lock(&answers).remove(&id) {
                        // Nobody waits for it when its attempt was given up.
                        let _heard = sender.send(status);
                    }
                }
                Ok(FromKeeper::Hello { .. }) => {}
                Err(error) => tracing::warn!(%error, "the keeper said something that I do not understand"),
            }
        }
        at_end.cancel();
        // Dropping the senders tells every waiting attempt.
        lock(&answers).clear();
    });
    Ok(Live { orders, waiting, gone, _reader: reader })
}

fn spawn(dir: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    wait_for_earlier(dir)?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("buildreactor")
        .arg("keeper")
        .arg(dir)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        // Away from the terminal's Ctrl-C and from what a supervisor sends to the daemon's group.
        .process_group(0)
        // Scripts get theirs from the daemon, message by message; the keeper itself needs none, and least of all secrets.
        .env_clear();
    let mut child = command.spawn()?;
    // Reaps it whenever it ends; std's handle would leave a zombie.
    std::thread::Builder::new().name("keeper-wait".to_owned()).spawn(move || child.wait())?;
    Ok(ours)
}
