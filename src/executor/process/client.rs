//! The daemon's side of the keeper: finds or starts it, gives it orders, hears how attempts end.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::RECORDED;
use super::guardian::STATUS;
use super::keeper::{LOCK, program};
use super::peer::{self, DAEMON, KEEPER, Mark, SOCKET, is_at, own_file};
use super::protocol::{FromKeeper, Spec, Status, ToKeeper, VERSION};
use crate::executor::Tether;

/// Name of the daemon's own lock file in the worker's folder; it holds its process id.
const ONLY: &str = "daemon.lock";

/// How long processes of earlier attempts may take to die before somebody is told.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a keeper may take to put its socket right, if somebody has removed it.
const FOUND: Duration = Duration::from_secs(4);
/// How long a keeper may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// What is known of the attempts of a keeper.
type Attempts = Arc<std::sync::Mutex<HashMap<String, Known>>>;

enum Known {
    /// It runs, and nobody has asked for it yet.
    Found,
    /// It runs, and this attempt waits for its end.
    Awaited(oneshot::Sender<Status>),
    /// It ended before anybody asked for it.
    Ended(Status),
}

/// Orders to a keeper that is started when there is none.
pub struct KeeperClient {
    dir: PathBuf,
    live: Mutex<Option<Live>>,
    no_namespace: std::sync::Mutex<Option<String>>,
    seat: std::sync::Mutex<Seat>,
}

/// Held for the life of this daemon: one of them a folder.
struct Seat {
    lock: File,
    /// By this the keeper knows the daemon.
    mark: Mark,
}

struct Live {
    orders: OwnedWriteHalf,
    attempts: Attempts,
    gone: CancellationToken,
    no_namespace: Option<String>,
    /// Of another program file than this one: to be replaced when nothing runs under it.
    outdated: bool,
    reader: AbortOnDropHandle<()>,
}

impl Seat {
    fn take(dir: &Path) -> io::Result<Seat> {
        let lock = only_daemon(dir)?;
        Ok(Seat { lock, mark: Mark::put(&dir.join(DAEMON))? })
    }

    /// Takes it again in a folder that was made anew.
    fn keep(&mut self, dir: &Path) -> io::Result<()> {
        if !is_at(&dir.join(ONLY), &self.lock)? {
            std::fs::create_dir_all(dir)?;
            self.lock = only_daemon(dir)?;
        }
        self.mark.put_right()
    }
}

impl KeeperClient {
    /// For the keeper of the worker's folder `dir`: the one that is there, or a new one.
    ///
    /// # Errors
    /// Another daemon uses the folder, processes of earlier attempts do not die, or no keeper can be started.
    ///
    /// # Cancel safety
    /// Safe; a keeper that was started leaves by itself.
    pub async fn new(dir: &Path) -> io::Result<KeeperClient> {
        let client = KeeperClient {
            dir: dir.to_owned(),
            live: Mutex::new(None),
            no_namespace: std::sync::Mutex::new(None),
            seat: std::sync::Mutex::new(Seat::take(dir)?),
        };
        let aside = dir.to_owned();
        tokio::task::spawn_blocking(move || peer::remove_aside(&aside));
        {
            let mut live = client.live.lock().await;
            if let Some(found) = find(dir, &client.seat).await {
                let running = lock(&found.attempts).len();
                tracing::info!(running, "found the keeper of an earlier daemon");
                *live = Some(found);
            }
            client.ready(&mut live).await?;
        }
        Ok(client)
    }

    /// Why attempts get no PID namespace here; `None`: they do.
    pub fn no_namespace(&self) -> Option<String> {
        lock(&self.no_namespace).clone()
    }

    /// A living keeper, and one of this program if nothing runs under the other.
    async fn ready<'a>(&self, live: &'a mut Option<Live>) -> io::Result<&'a mut Live> {
        if let Some(keeper) = live.as_mut()
            && keeper.outdated
            && lock(&keeper.attempts).values().all(|known| matches!(known, Known::Ended(_)))
        {
            tracing::info!("the keeper of an earlier program has nothing left; replacing it");
            let _told = say(&mut keeper.orders, &ToKeeper::Leave).await;
            *live = None;
        }
        if live.as_ref().is_none_or(|keeper| keeper.gone.is_cancelled()) {
            // Its reader first waits until every process of its builds is gone; only then are they given up.
            if let Some(gone) = live.take() {
                let _ended = gone.reader.await;
            }
            lock(&self.seat).keep(&self.dir)?;
            let keeper = start(&self.dir).await?;
            lock(&self.no_namespace).clone_from(&keeper.no_namespace);
            *live = Some(keeper);
        } else if let Some(keeper) = live.as_ref() {
            lock(&self.no_namespace).clone_from(&keeper.no_namespace);
        }
        live.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Runs one attempt to its end. `Ok(Err(why))`: there is no keeper, and nothing was started.
    ///
    /// # Errors
    /// The keeper died; every process of its attempts is gone.
    ///
    /// # Cancel safety
    /// Dropped, the attempt goes on until the end of its lease.
    pub async fn run(&self, mut spec: Spec, tether: &Tether) -> io::Result<Result<Status, io::Error>> {
        let (id, dir) = (spec.id.clone(), spec.dir.clone());
        let (send, receive) = oneshot::channel();
        {
            let mut live = self.live.lock().await;
            let keeper = match self.ready(&mut live).await {
                Ok(keeper) => keeper,
                Err(error) => return Ok(Err(error)),
            };
            lock(&keeper.attempts).insert(id.clone(), Known::Awaited(send));
            // As it is now: the preparations may have taken long.
            spec.until_ms = super::millis(*tether.lease.borrow());
            if let Err(error) = say(&mut keeper.orders, &ToKeeper::Start(Box::new(spec))).await {
                lock(&keeper.attempts).remove(&id);
                return Err(error);
            }
        }
        tether.begun.store(true, Ordering::Release);
        self.attend(&id, &dir, receive, tether).await.map(Ok)
    }

    /// Waits for the end of an attempt that an earlier daemon started. `None`: there is nothing of it.
    ///
    /// # Errors
    /// As of [`KeeperClient::run`].
    ///
    /// # Cancel safety
    /// As of [`KeeperClient::run`].
    pub async fn adopt(&self, id: &str, dir: &Path, tether: &Tether) -> io::Result<Option<Status>> {
        let receive = {
            let live = self.live.lock().await;
            let Some(keeper) = live.as_ref() else { return Ok(left(dir)) };
            let mut attempts = lock(&keeper.attempts);
            match attempts.remove(id) {
                Some(Known::Ended(status)) => return Ok(Some(status)),
                Some(Known::Found | Known::Awaited(_)) => {
                    let (send, receive) = oneshot::channel();
                    attempts.insert(id.to_owned(), Known::Awaited(send));
                    receive
                }
                None => return Ok(left(dir)),
            }
        };
        self.attend(id, dir, receive, tether).await.map(Some)
    }

    /// Passes orders on until the attempt has ended.
    async fn attend(
        &self,
        id: &str,
        dir: &Path,
        mut receive: oneshot::Receiver<Status>,
        tether: &Tether,
    ) -> io::Result<Status> {
        let mut lease = tether.lease.clone();
        let (mut renewable, mut stopped) = (true, false);
        loop {
            let order = tokio::select! {
                status = &mut receive => match status {
                    Ok(status) => return Ok(status),
                    // It may have noted the end before it died.
                    Err(_) => {
                        return left(dir).ok_or_else(|| io::Error::new(io::ErrorKind::BrokenPipe, "it died, and its builds with it"));
                    }
                },
                () = tether.stop.cancelled(), if !stopped => {
                    stopped = true;
                    ToKeeper::Stop { id: id.to_owned() }
                }
                renewed = lease.changed(), if renewable => {
                    if renewed.is_err() {
                        renewable = false;
                        continue;
                    }
                    ToKeeper::Renew { id: id.to_owned(), until_ms: super::millis(*lease.borrow_and_update()) }
                }
            };
            if let Some(keeper) = self.live.lock().await.as_mut() {
                // When it cannot be told, it is gone, and says so on the other channel.
                let _told = say(&mut keeper.orders, &order).await;
            }
        }
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn say(orders: &mut OwnedWriteHalf, message: &ToKeeper) -> io::Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    orders.write_all(&text).await
}

/// What a guardian, or its keeper, noted at the end. Perhaps it was recorded before, and the database has lost that with its last commits.
pub(super) fn left(dir: &Path) -> Option<Status> {
    let read = |name: &str| serde_json::from_slice(&std::fs::read(dir.join(name)).ok()?).ok();
    read(STATUS).or_else(|| read(RECORDED))
}

fn only_daemon(dir: &Path) -> io::Result<File> {
    let path = dir.join(ONLY);
    // Readable for nobody else, who could take the lock (flock(2)).
    let mut file = own_file(&path)?;
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && peer::is_held_by_a_build(&file, &dir.join(KEEPER)) {
        tracing::warn!("a build holds `{}`; replacing it", path.display());
        std::fs::remove_file(&path)?;
        file = own_file(&path)?;
    }
    if let Err(error) = file.try_lock() {
        if let TryLockError::Error(error) = error {
            return Err(io::Error::new(error.kind(), format!("lock `{}`: {error}", path.display())));
        }
        let pid = std::fs::read_to_string(&path).unwrap_or_default();
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!(
                "another daemon uses it, process {pid}; a second one on this machine needs another `[worker] name`"
            ),
        ));
    }
    super::write_over(&file, &std::process::id().to_string())?;
    Ok(file)
}

/// Blocks until no keeper or guardian of an earlier daemon on this folder is left: each of them holds the lock `file`, and ends only
/// when its tree is gone.
fn wait_for_earlier(file: &File, dir: &Path) -> io::Result<()> {
    let began = Instant::now();
    while let Err(error) = file.try_lock() {
        if let TryLockError::Error(error) = error {
            return Err(error);
        }
        if began.elapsed() > PATIENCE {
            let text = format!(
                "processes of earlier builds do not die: as root, `fuser {}/{LOCK}` shows who still holds its lock",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    file.unlock()
}

/// The keeper that an earlier daemon left. `None`: there is none, or it cannot be talked to; its leases end by themselves.
async fn find(dir: &Path, seat: &std::sync::Mutex<Seat>) -> Option<Live> {
    let began = Instant::now();
    loop {
        let error = match call(dir).await {
            Ok(live) => return Some(live),
            Err(error) => error,
        };
        // Somebody may have put something else in its place, or in place of what the keeper knows us by. It puts its own right.
        if lock(seat).keep(dir).is_err() || own_file(&dir.join(LOCK)).is_ok_and(|file| file.try_lock().is_ok()) {
            return None;
        }
        if began.elapsed() > FOUND {
            tracing::warn!("the keeper of an earlier daemon cannot be used: {error}");
            return None;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn call(dir: &Path) -> io::Result<Live> {
    // A link would lead elsewhere.
    if !std::fs::symlink_metadata(dir.join(SOCKET))?.file_type().is_socket() {
        return Err(io::Error::other(format!("`{}` is no socket", dir.join(SOCKET).display())));
    }
    // The path of a socket is short (unix(7)), a folder's may be long.
    let folder = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
    // Waits for its turn, where many call.
    let called = tokio::task::spawn_blocking(move || std::os::unix::net::UnixStream::connect(path));
    let called = tokio::time::timeout(HELLO, called).await.map_err(|_| io::ErrorKind::TimedOut)?;
    let stream = called.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    peer::check(&stream, &dir.join(KEEPER)).map_err(|who| io::Error::other(format!("who answers is not it: {who}")))?;
    connect(dir, stream).await
}

async fn start(dir: &Path) -> io::Result<Live> {
    let folder = dir.to_owned();
    let stream = tokio::task::spawn_blocking(move || spawn(&folder)).await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    connect(dir, UnixStream::from_std(stream)?).await
}

async fn connect(dir: &Path, stream: UnixStream) -> io::Result<Live> {
    // What it holds, wherever the folder is by the time it ends.
    let held = own_file(&dir.join(LOCK))?;
    let (reader, mut orders) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let first = tokio::time::timeout(HELLO, lines.next_line()).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let (version, running, no_namespace, theirs) = match first.as_deref().map(serde_json::from_str) {
        Some(Ok(FromKeeper::Hello { version, running, no_namespace, program, .. })) => {
            (version, running, no_namespace, program)
        }
        Some(Ok(FromKeeper::Ended { .. }) | Err(_)) | None => {
            return Err(io::Error::other(
                "the keeper ended; its reason is on the standard error of the daemon that started it",
            ));
        }
    };
    if version != VERSION {
        // The one message that all versions know. Its builds end with their leases.
        say(&mut orders, &ToKeeper::Leave).await?;
        return Err(io::Error::other(format!("it speaks version {version}, and this program {VERSION}")));
    }
    let attempts = Attempts::default();
    lock(&attempts).extend(running.into_iter().map(|id| (id, Known::Found)));
    let gone = CancellationToken::new();
    let reader = crate::tasks::spawn(listen(lines, Arc::clone(&attempts), gone.clone(), (held, dir.to_owned())));
    Ok(Live { orders, attempts, gone, no_namespace, outdated: theirs != program(), reader })
}

/// Hears how attempts end, until the keeper is gone.
async fn listen(
    mut lines: Lines<BufReader<OwnedReadHalf>>,
    attempts: Attempts,
    gone: CancellationToken,
    held: (File, PathBuf),
) {
    let held = Arc::new(held);
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(FromKeeper::Ended { id, status }) => {
                let mut attempts = lock(&attempts);
                match attempts.remove(&id) {
                    Some(Known::Awaited(sender)) => {
                        // Nobody waits for it when its attempt was given up.
                        let _heard = sender.send(status);
                    }
                    Some(Known::Found | Known::Ended(_)) => drop(attempts.insert(id, Known::Ended(status))),
                    None => drop(attempts.insert(id, Known::Ended(status))),
                }
            }
            Ok(FromKeeper::Hello { .. }) => {}
            Err(error) => tracing::warn!(%error, "the keeper said something that I do not understand"),
        }
    }
    gone.cancel();
    // Its guardians are killing their trees now. Nobody is told of an end before they are done.
    loop {
        let held = Arc::clone(&held);
        match tokio::task::spawn_blocking(move || wait_for_earlier(&held.0, &held.1)).await {
            Ok(Ok(())) | Err(_) => break,
            Ok(Err(error)) => tracing::error!("the keeper is gone, and its builds cannot be given up yet: {error}"),
        }
    }
    // Dropping the senders tells every waiting attempt.
    lock(&attempts).clear();
}

fn spawn(dir: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    wait_for_earlier(&own_file(&dir.join(LOCK))?, dir)?;
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
