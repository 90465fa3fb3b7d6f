//! `buildreactor demo`: everything once, on a private PostgreSQL that is thrown away afterwards, driven by the real psql.

use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::output::{Stdout, is_closed_pipe, note};
use super::terminal::{harmless, harmless_line};
use crate::database::ConnInfo;
use crate::database::migrate::migrate;
use crate::embedded::{Options, Server, StopMode};

/// Room for the debug build of a project of this size, bytes.
const ROOM: u64 = 2 << 30;
/// How long the worker may take to report in.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long all builds may take; above the longest builder's timeout.
const BUILD_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How long the worker may take to stop: more than it gives itself.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the builds.
const LOOK: Duration = Duration::from_millis(500);
/// Between two lines of progress where there is no terminal.
const LINE: Duration = Duration::from_secs(5);
/// How much of a log is shown when something went wrong.
const TAIL_LINES: usize = 30;
/// What the builds must end as.
const EXPECTED: [(&str, &str); 3] = [("hello", "passed"), ("broken", "failed"), ("cargo", "passed")];
/// A cargo that is not in its usual place needs these; a worker hands on none of them by itself.
const CARGO_VARIABLES: [&str; 12] = [
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "CARGO_NET_OFFLINE",
    "CARGO_HTTP_CAINFO",
    "SSL_CERT_FILE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
];

const BUILDERS: &str = r#"INSERT INTO builders (name, description, timeout, script) VALUES
  ('hello', 'passes', '1 minute', $$
echo "Hello from build $BUILD_ID, attempt $BUILD_ATTEMPT, on worker $BUILD_WORKER."
$$),
  ('broken', 'fails', '1 minute', $$
echo "test the_answer: expected 42, got $PROP_ANSWER"
test "$PROP_ANSWER" = 42
$$),
  ('cargo', 'a real build', '10 minutes', $$
export PATH="$PATH:$HOME/.cargo/bin"
command -v cargo || { echo "There is no cargo on this worker's PATH: install Rust (rustup)."; exit 1; }
safe='-c safe.directory=*'  # the repository may belong to somebody else
git $safe clone --quiet --upload-pack "git $safe upload-pack" "$PROP_REPOSITORY" source
cd source
git checkout --quiet --detach "$PROP_REVISION"
export CARGO_TARGET_DIR="$BUILD_CACHE/target" CARGO_PROFILE_DEV_DEBUG=0
cargo build --locked
$$);"#;

#[derive(clap::Args)]
pub struct Arguments {
    /// The git checkout of a Rust project whose HEAD is built (default: the current directory)
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
}

/// Shows it, and takes everything away again, whatever happens.
pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let begin = Instant::now();
    let mut interrupted = Interrupts::listen()?;
    let source = Source::find(arguments.source.as_deref()).await?;
    let folder = Folder::new()?;
    say(&format!(
        "One PostgreSQL, one worker, three builds: one passes, one fails, and one is real: cargo builds
`{}`, as of its last commit. This takes a few minutes.
Everything is temporary and removed at the end, or when you press Ctrl-C.\n",
        source.repository
    ))?;
    // Not in the select below: a server that is just starting is waited for, so that it can be stopped.
    let server = tokio::task::spawn_blocking(|| Server::start(Options::default())).await?;
    let server = server.context("`make setup` installs what is missing")?;
    let mut stage = Stage { worker: None, server, folder };
    let outcome = tokio::select! {
        outcome = show(&mut stage, &source) => outcome,
        name = interrupted.next() => Err(Interrupted(name).into()),
    };
    let worker_log = stage.stop_worker().await;
    let closed = stage.close().await;
    if let Err(error) = outcome {
        if let Err(error) = closed {
            note(&format!("{error:#}"));
        }
        if is_closed_pipe(&error) {
            // Quietly: whoever read it has seen enough.
            return Err(error);
        }
        if !error.is::<Interrupted>() {
            show_tail("the worker's log", &worker_log);
        }
        return Err(error.context("the demo did not get to its end, and has taken away what it started"));
    }
    closed?;
    say(&format!(
        "\nThe demo went as expected, in {} s; worker and server are stopped and removed.",
        begin.elapsed().as_secs()
    ))?;
    go_on()?;
    Ok(ExitCode::SUCCESS)
}

/// The demo itself.
async fn show(stage: &mut Stage, source: &Source) -> anyhow::Result<()> {
    let admin = Psql::new(&stage.server, "postgres");
    say(&format!(
        "-- A private PostgreSQL {}.{} runs. It gets a database, and the database its tables:",
        stage.server.version().0,
        stage.server.version().1
    ))?;
    admin.show("CREATE DATABASE builds;").await?;
    let url = stage.server.url("builds");
    let psql = Psql::new(&stage.server, "builds");
    say(&format!("$ buildreactor migrate --database '{url}'"))?;
    // Nothing but this URL: variables such as PGOPTIONS are meant for another server.
    let report = migrate(&ConnInfo::resolve(Some(&url), &|_| None)?).await?;
    say(&format!("schema `{}` is at version {}\n", report.schema, report.version))?;

    say("-- A worker waits for builds; as a rule a supervisor starts it:")?;
    say(&format!("$ buildreactor run --database '{url}'"))?;
    stage.start_worker(&url)?;
    let deadline = Instant::now() + START_PATIENCE;
    while psql.ask("SELECT count(*) FROM worker_status WHERE status = 'active'").await? != "1" {
        stage.check_worker()?;
        ensure!(Instant::now() < deadline, "the worker did not report in within {} s", START_PATIENCE.as_secs());
        tokio::time::sleep(LOOK).await;
    }
    psql.show("SELECT worker, status, slots, version FROM worker_status;").await?;

    say("-- A builder is a row that says how to build:")?;
    psql.show(BUILDERS).await?;
    let env = cargo_variables();
    if !env.is_empty() {
        say("-- cargo is set up in the environment here, which a worker does not hand on by itself:")?;
        let env = literal(&serde_json::Value::Object(env).to_string());
        psql.show(&format!("UPDATE builders SET env = {env}\nWHERE name = 'cargo';")).await?;
    }
    say("-- A build is an INSERT. The worker is woken by it and starts at once:")?;
    psql.show("INSERT INTO build_queue (builder) VALUES ('hello') RETURNING build_id;").await?;
    psql.show(
        "INSERT INTO build_queue (builder, properties) VALUES ('broken', '{\"answer\": 41}')\nRETURNING build_id;",
    )
    .await?;
    let properties = serde_json::json!({ "repository": source.repository, "revision": source.revision }).to_string();
    psql.show(&format!(
        "INSERT INTO build_queue (builder, reason, properties)\nVALUES ('cargo', 'the demo', {})\nRETURNING build_id;",
        literal(&properties)
    ))
    .await?;

    say(
        "-- While a build runs, a transaction holds its row of the queue (claim_held). Watching until all have ended:",
    )?;
    watch(stage, &psql).await?;

    say("-- How it went:")?;
    psql.show("SELECT build_id, builder, state, attempt, waited, ran, exit_code, detail FROM recent_builds;").await?;
    psql.show("SELECT builder, status, slots_used, max_running, waiting, last_state FROM builder_status;").await?;
    psql.show("SELECT builder, runs, passed, pass_rate, median_time, median_waiting FROM build_stats;").await?;
    say("-- Why it failed is in its log:")?;
    psql.show_with(&["-At"], "SELECT right(build_log_text(id), 1000) FROM builds WHERE builder = 'broken';").await?;
    judge(&psql).await
}

/// Shows progress until every build has ended.
async fn watch(stage: &mut Stage, psql: &Psql) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut bar: Option<ProgressBar> = None;
    let mut next_line = begin;
    loop {
        let builds = unfinished(psql).await?;
        if builds.is_empty() {
            break;
        }
        stage.check_worker()?;
        ensure!(begin.elapsed() < BUILD_PATIENCE, "builds still run after {} minutes", BUILD_PATIENCE.as_secs() / 60);
        match &bar {
            None if builds.iter().any(|build| build.state == "queued") => {}
            None => {
                psql.show("SELECT build_id, builder, worker, attempt, elapsed, claim_held FROM running_builds;")
                    .await?;
                bar = Some(spinner()?);
            }
            Some(bar) => {
                let text = builds.iter().map(Build::progress).collect::<Vec<_>>().join("; ");
                if std::io::stderr().is_terminal() {
                    bar.set_message(text);
                } else if Instant::now() >= next_line {
                    say(&text)?;
                    next_line = Instant::now() + LINE;
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    drop(bar);
    say(&format!("all builds have ended after {} s\n", begin.elapsed().as_secs()))
}

async fn unfinished(psql: &Psql) -> anyhow::Result<Vec<Build>> {
    let sql = "SELECT coalesce(json_agg(row_to_json(s) ORDER BY s.id), '[]') FROM (
        SELECT b.id, b.builder, b.state, floor(extract(epoch FROM r.elapsed))::integer AS seconds, r.last_log_line
        FROM builds b LEFT JOIN running_builds r ON r.build_id = b.id WHERE b.finished_at IS NULL) s";
    serde_json::from_str(&psql.ask(sql).await?).context("psql's answer about the builds")
}

/// A line that redraws itself; draws nothing where there is no terminal.
fn spinner() -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
    bar.set_style(ProgressStyle::with_template("{spinner} {wide_msg}")?);
    bar.enable_steady_tick(Duration::from_millis(125));
    Ok(bar)
}

/// Whether the builds ended as they should.
async fn judge(psql: &Psql) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for (builder, expected) in EXPECTED {
        let state = psql.ask(&format!("SELECT state FROM recent_builds WHERE builder = '{builder}'")).await?;
        if state != expected {
            let log = psql.ask(&format!("SELECT build_log_text(id) FROM builds WHERE builder = '{builder}'")).await?;
            show_tail(&format!("the log of `{builder}`"), &log);
            let state = if state.is_empty() { "not in recent_builds" } else { &state };
            wrong.push(format!("the build of `{builder}` is {state} instead of {expected}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join(", "));
    Ok(())
}

/// What a person may do next.
fn go_on() -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    // As root the server runs as user postgres, who has to get there.
    let (settings, dir) = if nix::unistd::geteuid().is_root() {
        (String::new(), "/var/lib/buildreactor/postgres".to_owned())
    } else {
        let home = std::env::var("HOME").unwrap_or_else(|_| "/tmp".to_owned());
        (format!("BUILDREACTOR_WORKER_STATE_DIR={home}/buildreactor/worker "), format!("{home}/buildreactor/postgres"))
    };
    let (program, url) = (program.display(), format!("postgresql:///postgres?host={dir}/run&user=postgres"));
    say(&format!(
        "
To go on, with data that stays:
  {settings}{program} run --embedded {dir}
and in another terminal:
  psql '{url}'
  {program} watch --database '{url}'
With a PostgreSQL of your own: see README.md."
    ))
}

/// An unfinished build, as `watch` asks for it.
#[derive(serde::Deserialize)]
struct Build {
    id: i64,
    builder: String,
    state: String,
    seconds: Option<u64>,
    last_log_line: Option<String>,
}

impl Build {
    fn progress(&self) -> String {
        let Build { id, builder, state, .. } = self;
        let Some(seconds) = self.seconds else { return format!("build {id} ({builder}) is {state}") };
        let line = harmless_line(self.last_log_line.as_deref().unwrap_or(""));
        format!("build {id} ({builder}) {}:{:02} {line}", seconds / 60, seconds % 60)
    }
}

/// What is built: the last commit of a git checkout.
struct Source {
    repository: String,
    revision: String,
}

impl Source {
    async fn find(dir: Option<&Path>) -> anyhow::Result<Source> {
        let dir = dir.unwrap_or(Path::new("."));
        let advice = "`--source DIR` names the git checkout of a Rust project, such as that of buildreactor";
        let Ok(repository) = git(dir, &["rev-parse", "--show-toplevel"]).await? else {
            bail!("`{}` is not in a git checkout: {advice}", dir.display());
        };
        let Ok(revision) = git(dir, &["rev-parse", "--verify", "--quiet", "HEAD^{commit}"]).await? else {
            bail!("`{repository}` has no commit yet: {advice}");
        };
        for file in ["Cargo.toml", "Cargo.lock"] {
            if git(dir, &["cat-file", "-e", &format!("{revision}:{file}")]).await?.is_err() {
                bail!("there is no {file} in the last commit of `{repository}`: {advice}");
            }
        }
        Ok(Source { repository, revision })
    }
}

/// What git answers; inside, `Err` is its complaint.
async fn git(dir: &Path, arguments: &[&str]) -> anyhow::Result<Result<String, String>> {
    let mut git = Command::new("git");
    // Who names a folder here trusts it, whoever it belongs to. The variables are set by git's hooks, for another repository.
    git.arg("-C").arg(dir).args(["-c", "safe.directory=*"]).args(arguments);
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        git.env_remove(name);
    }
    let output = git.stdin(Stdio::null()).kill_on_drop(true).output().await.context("could not run `git`")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

/// All that has to be taken away. Dropped instead of closed (a panic), everything ends as well, less politely.
struct Stage {
    worker: Option<Child>,
    server: Server,
    folder: Folder,
}

impl Stage {
    /// A daemon as an operator would start it, with settings of its own instead of this machine's.
    fn start_worker(&mut self, url: &str) -> anyhow::Result<()> {
        let (root, log) = (&self.folder.0, self.worker_log());
        let config = root.join("buildreactor.toml");
        let state_dir = toml::Value::String(root.join("state").display().to_string());
        std::fs::write(&config, format!("[worker]\nname = \"demo\"\nslots = 2\nstate_dir = {state_dir}\n"))?;
        let log = std::fs::File::create(&log).with_context(|| format!("could not create `{}`", log.display()))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--config").arg(&config).args(["run", "--database", url]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // A Ctrl-C is for the demo, which then stops the worker.
        command.process_group(0).kill_on_drop(true);
        without(&mut command, &["PG", "BUILDREACTOR_", "DATABASE_URL"]);
        self.worker = Some(command.spawn().context("could not start the worker")?);
        Ok(())
    }

    fn worker_log(&self) -> PathBuf {
        self.folder.0.join("worker.log")
    }

    /// Error: the worker has ended.
    fn check_worker(&mut self) -> anyhow::Result<()> {
        match self.worker.as_mut().map(Child::try_wait).transpose()?.flatten() {
            Some(status) => bail!("the worker ended ({status})"),
            None => Ok(()),
        }
    }

    /// Stops the worker and its builds, and waits for it. Comes back with its log.
    async fn stop_worker(&mut self) -> String {
        if let Some(mut worker) = self.worker.take() {
            // There is an id as long as nobody has waited for it, and until then the number is its own.
            if let Some(pid) = worker.id().and_then(|id| i32::try_from(id).ok())
                && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGINT)
            {
                tracing::warn!("could not stop the worker (process {pid}): {error}");
            }
            if tokio::time::timeout(STOP_PATIENCE, worker.wait()).await.is_err() {
                tracing::warn!("the worker does not stop; it is killed");
                // Dropping it does that.
            }
        }
        match std::fs::read(self.worker_log()) {
            Ok(log) => String::from_utf8_lossy(&log).into_owned(),
            Err(error) => format!("(cannot be read: {error})"),
        }
    }

    /// Stops the server and removes the folder.
    async fn close(mut self) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || {
            self.server.stop(StopMode::Fast)?;
            self.folder.remove()
        })
        .await?
    }
}

/// A folder of our own in the temp dir.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Folder> {
        let bases = [std::env::temp_dir(), PathBuf::from("/var/tmp")];
        for base in &bases {
            if let Ok(found) = nix::sys::statvfs::statvfs(base)
                && found.blocks_available() * found.fragment_size() >= ROOM
                && let Ok(folder) = nix::unistd::mkdtemp(&base.join("buildreactor-demo-XXXXXX"))
            {
                std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700))?;
                return Ok(Folder(folder));
            }
        }
        let [first, second] = bases.map(|base| base.display().to_string());
        bail!("the demo needs {} GiB in `{first}` or `{second}`; TMPDIR names another place", ROOM >> 30)
    }

    fn remove(&self) -> anyhow::Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("could not remove `{}`", self.0.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            note(&format!("{error:#}"));
        }
    }
}

/// The real psql, on one database.
struct Psql {
    program: PathBuf,
    database: String,
    url: String,
}

impl Psql {
    fn new(server: &Server, database: &str) -> Psql {
        let beside = server.bin_dir().join("psql");
        let program = if beside.is_file() { beside } else { PathBuf::from("psql") };
        Psql { program, database: database.to_owned(), url: server.url(database) }
    }

    /// Prints a statement as typed at psql's prompt, then psql's answer.
    async fn show(&self, sql: &str) -> anyhow::Result<()> {
        self.show_with(&[], sql).await
    }

    async fn show_with(&self, options: &[&str], sql: &str) -> anyhow::Result<()> {
        say(&format!("{}=> {sql}", self.database))?;
        let output = self.run(&[options, &["-c", sql]].concat()).await?;
        say(&harmless(String::from_utf8_lossy(&output.stdout).trim_end()))?;
        say("")
    }

    /// The answer alone.
    async fn ask(&self, sql: &str) -> anyhow::Result<String> {
        let output = self.run(&["-qAt", "-c", sql]).await?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    async fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.program);
        command.args(["--no-psqlrc", "--pset=pager=off", "-v", "ON_ERROR_STOP=1", "-d", &self.url]).args(arguments);
        without(&mut command, &["PG"]);
        // A Ctrl-C is for the demo.
        command.env("LC_ALL", "C.UTF-8").process_group(0).kill_on_drop(true).stdin(Stdio::null());
        let output = command.output().await.with_context(|| {
            format!("could not run `{}`, which belongs to PostgreSQL's client programs", self.program.display())
        })?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(output)
    }
}

/// A signal has ended the demo.
#[derive(Debug, thiserror::Error)]
#[error("ended by {0}")]
struct Interrupted(&'static str);

/// The signals that end the demo.
struct Interrupts([(tokio::signal::unix::Signal, &'static str); 3]);

impl Interrupts {
    fn listen() -> anyhow::Result<Interrupts> {
        Ok(Interrupts([
            (signal(SignalKind::interrupt())?, "SIGINT"),
            (signal(SignalKind::terminate())?, "SIGTERM"),
            (signal(SignalKind::hangup())?, "SIGHUP"),
        ]))
    }

    /// # Cancel safety
    /// Safe: `recv` is.
    async fn next(&mut self) -> &'static str {
        let [(int, int_name), (term, term_name), (hup, hup_name)] = &mut self.0;
        tokio::select! {
            _ = int.recv() => int_name,
            _ = term.recv() => term_name,
            _ = hup.recv() => hup_name,
        }
    }
}

fn without(command: &mut Command, prefixes: &[&str]) {
    for (name, _) in std::env::vars_os() {
        if prefixes.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
}

fn cargo_variables() -> serde_json::Map<String, serde_json::Value> {
    CARGO_VARIABLES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?.into()))).collect()
}

/// A string constant of SQL.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// To standard error, if anybody reads it.
fn show_tail(of: &str, text: &str) {
    let _read = writeln!(std::io::stderr(), "\nThe end of {of}:\n{}\n", harmless(&last_lines(text)));
}

/// Prints a line.
fn say(line: &str) -> anyhow::Result<()> {
    writeln!(Stdout, "{line}").map_err(Into::into)
}
