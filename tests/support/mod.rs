//! What the tests stand on: one private PostgreSQL for the run, a database for each test, real daemons, and waiting.

pub mod beating;
pub mod buildbot;
pub mod dice;
pub mod freezer;
pub mod ordinary;
pub mod proxy;
mod roles;
pub mod smtp;

use std::future::Future;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use buildreactor::database::conninfo::ConnInfo;
use buildreactor::database::{Database, SessionLimits};
use buildreactor::embedded::{Options, Server};
use tokio_postgres::{Client, NoTls};

/// For anything that should happen soon on a slow, busy machine.
pub const SOON: Duration = Duration::from_secs(240);

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_buildreactor");

/// Puts a copy of it at `to`. By another process: a child that this one forks meanwhile would hold the file open for writing, and nobody
/// could start it (ETXTBSY).
pub fn copy_program(to: &Path) {
    let copied = std::process::Command::new("cp").arg(PROGRAM).arg(to).status().unwrap();
    assert!(copied.success());
}

/// The run's PostgreSQL: thrown away when this process ends, however it ends.
pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(Options::default()).expect("a private PostgreSQL"))
}

/// A number that no other test of this run has.
pub fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A folder of its own, removed when dropped.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

pub fn temp_dir() -> TempDir {
    let dir = std::env::temp_dir().join(format!("buildreactor-test-{}-{}", std::process::id(), unique()));
    std::fs::create_dir_all(&dir).unwrap();
    TempDir(dir)
}

/// Asks until the answer is yes; fails, naming `what`, after [`SOON`].
pub async fn wait_for<F, Fut>(what: &str, condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    wait_for_within(SOON, what, condition).await;
}

/// [`wait_for`] what takes its time.
pub async fn wait_for_within<F, Fut>(limit: Duration, what: &str, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited {} s for: {what}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A migrated database of its own.
pub struct Db {
    name: String,
    url: String,
    client: Client,
    /// On the run's server; others are thrown away as a whole.
    shared: bool,
}

impl Db {
    pub async fn new() -> Db {
        let name = format!("test_{}", unique());
        admin().await.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {}", template().await)).await.unwrap();
        let url = server().url(&name);
        Db { client: connect(&url).await, name, url, shared: true }
    }

    /// Without the tables.
    pub async fn empty() -> Db {
        let name = format!("test_{}", unique());
        admin().await.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let url = server().url(&name);
        Db { client: connect(&url).await, name, url, shared: true }
    }

    /// In another encoding than UTF8.
    pub async fn encoded(encoding: &str) -> Db {
        let name = format!("test_{}", unique());
        let create =
            format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        admin().await.batch_execute(&create).await.unwrap();
        let url = server().url(&name);
        buildreactor::database::migrate::migrate(&ConnInfo::from_env(Some(&url)).unwrap()).await.unwrap();
        Db { client: connect(&url).await, name, url, shared: true }
    }

    /// On a server of the test's own.
    pub async fn on(server: &Server) -> Db {
        let url = server.url("postgres");
        buildreactor::database::migrate::migrate(&ConnInfo::from_env(Some(&url)).unwrap()).await.unwrap();
        Db::there(server).await
    }

    /// On a server of the test's own, which has the tables already.
    pub async fn there(server: &Server) -> Db {
        let url = server.url("postgres");
        Db { client: connect(&url).await, name: "postgres".to_owned(), url, shared: false }
    }

    /// The database as a worker uses it.
    pub fn database(&self) -> Database {
        let limits = SessionLimits { slots: 1, claim_idle: Duration::from_secs(50) };
        Database::new(ConnInfo::from_env(Some(&self.url())).unwrap(), limits, "test").unwrap()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Another session, as psql's would be.
    pub async fn session(&self) -> Client {
        connect(&self.url()).await
    }

    pub async fn execute(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// First column of the only row.
    pub async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, sql: &str) -> T {
        self.client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }

    /// First column of all rows.
    pub async fn all<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, sql: &str) -> Vec<T> {
        let rows = self.client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Message, detail and hint of the error that `sql` must give.
    pub async fn refusal(&self, sql: &str) -> String {
        let error = self.client.batch_execute(sql).await.expect_err(sql);
        let error = error.as_db_error().expect("an error of the server");
        format!("{} | {} | {}", error.message(), error.detail().unwrap_or(""), error.hint().unwrap_or(""))
    }

    /// Waits until the query says true.
    pub async fn wait(&self, sql: &str) {
        self.wait_within(SOON, sql).await;
    }

    /// [`Db::wait`] for what takes its time.
    pub async fn wait_within(&self, limit: Duration, sql: &str) {
        let deadline = Instant::now() + limit;
        // No row yet, or null, is no.
        while self.all::<Option<bool>>(sql).await != [Some(true)] {
            if Instant::now() >= deadline {
                let builds: Vec<String> =
                    self.all("SELECT to_jsonb(b)::text FROM builds b ORDER BY id DESC LIMIT 5").await;
                let queue: Vec<String> = self.all("SELECT to_jsonb(q)::text FROM build_queue q LIMIT 5").await;
                panic!("waited {} s for: {sql}\nbuilds: {builds:#?}\nqueue: {queue:#?}", limit.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for a final state and says which.
    pub async fn finished(&self, build: i64) -> String {
        self.wait(&format!("SELECT build_state_is_final(state) FROM builds WHERE id = {build}")).await;
        self.one(&format!("SELECT state::text FROM builds WHERE id = {build}")).await
    }

    /// A builder with a script.
    pub async fn builder(&self, name: &str, script: &str) {
        self.client.execute("INSERT INTO builders (name, script) VALUES ($1, $2)", &[&name, &script]).await.unwrap();
    }

    /// Queues a build of a builder.
    pub async fn enqueue(&self, builder: &str) -> i64 {
        const SQL: &str = "INSERT INTO build_queue (builder) VALUES ($1) RETURNING build_id";
        self.client.query_one(SQL, &[&builder]).await.unwrap().get(0)
    }

    /// The real psql, stopping at the first error.
    pub fn psql(&self, arguments: &[&str]) -> Output {
        Command::new(psql_program())
            .args(["--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.url())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("psql")
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        if !self.shared {
            return;
        }
        // Daemons are declared after the database and so are gone by now; FORCE ends what is left of their sessions.
        let name = self.name.clone();
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let dropped = tokio::time::timeout(SOON, drop_now(&name));
                assert!(dropped.await.is_ok(), "cannot drop {name}");
            });
        });
        let _joined = dropping.join();
    }
}

async fn drop_now(name: &str) {
    admin().await.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await.unwrap();
}

/// psql: next to the server's binaries, or in PATH.
pub fn psql_program() -> PathBuf {
    let beside = server().bin_dir().join("psql");
    if beside.exists() { beside } else { PathBuf::from("psql") }
}

/// A server of its own that is reached over TCP too.
pub async fn server_with_port(settings: &[(&str, &str)]) -> Server {
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let options = Options { tcp_port: Some(0), settings, ..Options::default() };
    tokio::task::spawn_blocking(|| Server::start(options).unwrap()).await.unwrap()
}

pub async fn connect(url: &str) -> Client {
    let (client, connection) =
        tokio_postgres::connect(url, NoTls).await.unwrap_or_else(|error| panic!("{url}: {error:?}"));
    drop(tokio::task::spawn(connection));
    client
}

async fn admin() -> Client {
    connect(&server().url("postgres")).await
}

/// A migrated database to clone: 75 ms instead of a migration.
async fn template() -> &'static str {
    static TEMPLATE: tokio::sync::OnceCell<()> = tokio::sync::OnceCell::const_new();
    TEMPLATE
        .get_or_init(|| async {
            admin().await.batch_execute("CREATE DATABASE template_buildreactor").await.unwrap();
            let info = ConnInfo::from_env(Some(&server().url("template_buildreactor"))).unwrap();
            buildreactor::database::migrate::migrate(&info).await.unwrap();
            wait_for("the template's sessions to end", || async {
                let left: i64 = admin()
                    .await
                    .query_one("SELECT count(*) FROM pg_stat_activity WHERE datname = 'template_buildreactor'", &[])
                    .await
                    .unwrap()
                    .get(0);
                left == 0
            })
            .await;
        })
        .await;
    "template_buildreactor"
}

/// How a daemon's process is made, where that matters.
#[derive(Clone)]
pub struct Launch {
    pub program: PathBuf,
    /// What stands before it: a command that becomes it.
    pub before: Vec<String>,
    /// User and group, instead of our own.
    pub user: Option<(u32, u32)>,
}

impl Default for Launch {
    fn default() -> Launch {
        Launch { program: PathBuf::from(PROGRAM), before: Vec::new(), user: None }
    }
}

/// A real daemon process with a folder of its own.
pub struct Daemon {
    launch: Launch,
    child: Option<Child>,
    pub log: Arc<Mutex<Vec<String>>>,
    command: Vec<(String, String)>,
    url: String,
    pub state: Arc<TempDir>,
}

impl Daemon {
    /// Starts a worker and waits until it is ready. `env` overrides settings: `BUILDREACTOR_SECTION_KEY`.
    pub async fn start(db: &Db, name: &str, env: &[(&str, &str)]) -> Daemon {
        Daemon::start_at(&db.url(), name, env).await
    }

    pub async fn start_at(url: &str, name: &str, env: &[(&str, &str)]) -> Daemon {
        let mut daemon = Daemon::spawn(url, name, env);
        daemon.ready().await;
        daemon
    }

    /// Starts a worker without waiting.
    pub fn spawn(url: &str, name: &str, env: &[(&str, &str)]) -> Daemon {
        Daemon::launch(Launch::default(), url, name, env)
    }

    /// Starts a worker in another way without waiting.
    pub fn launch(launch: Launch, url: &str, name: &str, env: &[(&str, &str)]) -> Daemon {
        let state = Arc::new(temp_dir());
        if let Some((user, group)) = launch.user {
            std::os::unix::fs::chown(state.path(), Some(user), Some(group)).unwrap();
        }
        let mut command = vec![
            ("BUILDREACTOR_WORKER_NAME".to_owned(), name.to_owned()),
            ("BUILDREACTOR_WORKER_STATE_DIR".to_owned(), state.path().display().to_string()),
        ];
        command.extend(env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let mut daemon = Daemon { launch, child: None, log: Arc::default(), command, url: url.to_owned(), state };
        daemon.spawn_again();
        daemon
    }

    /// A setting for the next start.
    pub fn set(&mut self, key: &str, value: &str) {
        self.command.push((key.to_owned(), value.to_owned()));
    }

    /// The database for the next start.
    pub fn connect_to(&mut self, url: &str) {
        url.clone_into(&mut self.url);
    }

    fn setting(&self, key: &str) -> &str {
        &self.command.iter().rfind(|(known, _)| known == key).unwrap().1
    }

    /// The same worker anew, after its process has ended.
    pub fn spawn_again(&mut self) {
        assert!(self.child.is_none());
        lines(&self.log).clear();
        let mut words: Vec<&std::ffi::OsStr> = self.launch.before.iter().map(std::ffi::OsStr::new).collect();
        words.push(self.launch.program.as_os_str());
        let mut command = Command::new(words[0]);
        if let Some((user, group)) = self.launch.user {
            command.uid(user).gid(group);
        }
        let mut child = command
            .args(&words[1..])
            .args(["run", "--database", &self.url])
            .envs(self.command.iter().map(|(key, value)| (key, value)))
            .env_remove("DATABASE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (output, log) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&self.log));
        std::thread::spawn(move || {
            for line in output.map_while(Result::ok) {
                lines(&log).push(line);
            }
        });
        self.child = Some(child);
    }

    pub async fn ready(&mut self) {
        self.says("is ready").await;
    }

    /// Waits until its log has a line with `text`.
    pub async fn says(&mut self, text: &str) {
        let mut deadline = Instant::now() + SOON;
        while !self.has_said(text) {
            if self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some()) {
                // Its last words may still be on their way.
                deadline = deadline.min(Instant::now() + Duration::from_secs(2));
            }
            assert!(Instant::now() < deadline, "no `{text}` in its log: {:#?}", lines(&self.log));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn has_said(&self, text: &str) -> bool {
        lines(&self.log).iter().any(|line| line.contains(text))
    }

    pub fn times_said(&self, text: &str) -> usize {
        lines(&self.log).iter().filter(|line| line.contains(text)).count()
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The keeper, if it lives.
    pub fn keeper(&self) -> Option<i32> {
        let folder =
            Path::new(self.setting("BUILDREACTOR_WORKER_STATE_DIR")).join(self.setting("BUILDREACTOR_WORKER_NAME"));
        let pid = std::fs::read_to_string(folder.join("keeper.lock")).ok()?.parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "br-keeper").then_some(pid)
    }

    /// The guardians of its keeper. Its children alone: a build's first process bears the name too until its exec.
    pub fn guardians(&self) -> Vec<i32> {
        let Some(keeper) = self.keeper() else { return Vec::new() };
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        pids.filter(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "br-guardian\n")
        })
        .collect()
    }

    /// kill -9 of the keeper, and with it of all builds; waits for their end.
    pub fn kill_keeper(&self) {
        let Some(pid) = self.keeper() else { return };
        let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        let deadline = Instant::now() + SOON;
        while !processes_of(&self.state).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end; comes back with the exit code.
    pub async fn exited(&mut self) -> Option<i32> {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                return status.code();
            }
            assert!(Instant::now() < deadline, "the daemon does not end: {:#?}", lines(&self.log));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGTERM, and its end.
    pub async fn stop(&mut self) -> Option<i32> {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.exited().await
    }
}

/// Also after a failed assertion that held it.
fn lines(log: &Mutex<Vec<String>>) -> std::sync::MutexGuard<'_, Vec<String>> {
    log.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill_keeper();
        if let Some(mut child) = self.child.take() {
            let _ended = child.kill();
            let _reaped = child.wait();
            self.kill_keeper();
            if std::thread::panicking() {
                eprintln!("log of the daemon: {:#?}", lines(&self.log));
            }
        }
    }
}

/// Processes of builds of a daemon with this state folder, dead ones not yet reaped left out.
pub fn processes_of(state: &TempDir) -> Vec<i32> {
    let wanted = format!("BUILD_DIR={}/", state.path().display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(wanted.as_bytes())) {
            found.push(pid);
        }
    }
    found
}

/// All that a daemon with this state folder has started: builds, and keeper and guardians, who work in it.
pub fn anything_of(state: &TempDir) -> Vec<i32> {
    let mut found = processes_of(state);
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if std::fs::read_link(entry.path().join("cwd")).is_ok_and(|dir| dir.starts_with(state.path())) {
            found.push(pid);
        }
    }
    found
}

/// Runs the program to its end.
pub fn buildreactor(arguments: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(PROGRAM)
        .args(arguments)
        .env_remove("DATABASE_URL")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// utime + stime in clock ticks (10 ms).
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// The most memory that a process has had so far, in kB.
pub fn peak_memory(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// All descendants of a process.
pub fn below(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent =
                stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)).and_then(|p| p.parse().ok());
            if parent == Some(found[at]) && !found.contains(&pid) {
                found.push(pid);
            }
        }
        at += 1;
    }
    found
}

pub fn name_of(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}
