//! What becomes of daemon and commands when nobody reads what they write, or it cannot be written.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::support::{Daemon, Db, Launch, PROGRAM, SOON, TempDir, temp_dir, text, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A daemon whose standard error is `redirection` of a shell (with options before it). Its log is not read by the test's support.
async fn daemon(db: &Db, redirection: &str, env: &[(&str, &str)]) -> Daemon {
    let script = format!("exec \"$@\" {redirection}");
    let before = ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec();
    let env = [&[HOUR], env].concat();
    let daemon = Daemon::launch(Launch { before, ..Launch::default() }, &db.url(), "w", &env);
    db.wait("SELECT count(*) = 1 FROM worker_status WHERE status = 'active'").await;
    daemon
}

/// Builds of each kind of end.
async fn builds_end(db: &Db) {
    for (builder, state) in [("good", "passed"), ("bad", "failed"), ("gone", "error")] {
        let id = db.enqueue(builder).await;
        assert_eq!(db.finished(id).await, state, "{builder}");
    }
}

async fn builders(db: &Db) {
    db.builder("good", "true").await;
    db.builder("bad", "exit 3").await;
    // Its worker warns of it.
    db.builder("gone", "exit 75").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
}

struct Fifo {
    path: PathBuf,
    _folder: TempDir,
}

impl Fifo {
    fn new() -> Fifo {
        let folder = temp_dir();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        Fifo { path, _folder: folder }
    }

    /// A reader that does not wait for writers.
    fn reader(&self) -> File {
        File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&self.path).unwrap()
    }

    fn redirection(&self) -> String {
        format!("2> {}", self.path.display())
    }
}

/// What has been written to it since.
fn read(reader: &mut File, into: &mut Vec<u8>) {
    let mut buffer = [0; 1 << 16];
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        into.extend_from_slice(&buffer[..count]);
    }
}

async fn says(reader: &mut File, what: &str) -> String {
    let mut all = Vec::new();
    let mut said = String::new();
    wait_for(&format!("`{what}` in the log"), || {
        read(reader, &mut all);
        said = text(&all);
        let found = said.contains(what);
        async move { found }
    })
    .await;
    said
}

#[tokio::test]
async fn a_log_on_a_full_disk_or_none_at_all_does_not_end_the_daemon() {
    let db = Db::new().await;
    builders(&db).await;
    for redirection in ["2>/dev/full", "--json 2>/dev/full", "2>&-", "<&- >&- 2>&-", "2</dev/null"] {
        let mut daemon = daemon(&db, redirection, &[("BUILDREACTOR_LOG", "debug")]).await;
        builds_end(&db).await;
        assert_eq!(daemon.stop().await, Some(0), "{redirection}");
    }
}

#[tokio::test]
async fn a_reader_of_the_log_that_goes_away_costs_the_lines_meanwhile() {
    let db = Db::new().await;
    builders(&db).await;
    let fifo = Fifo::new();
    let mut reader = fifo.reader();
    let mut daemon = daemon(&db, &fifo.redirection(), &[]).await;
    says(&mut reader, "is ready").await;
    drop(reader);
    builds_end(&db).await;
    // Somebody reads again: the next line says what was lost.
    let mut reader = fifo.reader();
    builds_end(&db).await;
    let said = says(&mut reader, "build 4").await;
    let first = said.lines().next().unwrap();
    assert!(first.contains("WARN") && first.ends_with(" lost: standard error could not be written"), "{said}");
    assert_eq!(said.matches("could not be written").count(), 1, "{said}");
    drop(reader);
    builds_end(&db).await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_reader_of_the_log_that_stops_reading_holds_nothing_up() {
    let db = Db::new().await;
    builders(&db).await;
    // Each piece of its log is a line of the daemon's, as a parameter.
    db.builder("flood", "yes 'a line of the log' | head -c 8000000").await;
    let fifo = Fifo::new();
    let mut reader = fifo.reader();
    fcntl(&reader, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let env = [("BUILDREACTOR_LOG", "debug"), ("BUILDREACTOR_LOG_DATABASE_LIMIT", "16 MiB")];
    let mut daemon = daemon(&db, &fifo.redirection(), &env).await;
    let id = db.enqueue("flood").await;
    assert_eq!(db.finished(id).await, "passed");
    builds_end(&db).await;
    says(&mut reader, " lost: standard error could not be written").await;
    // Nobody reads when it leaves.
    let id = db.enqueue("flood").await;
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_keeper_whose_complaints_nobody_reads_serves_its_builds() {
    let db = Db::new().await;
    builders(&db).await;
    let fifo = Fifo::new();
    let reader = fifo.reader();
    fcntl(&reader, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let daemon = daemon(&db, &fifo.redirection(), &[]).await;
    builds_end(&db).await;
    let socket = daemon.state.path().join("w/keeper.sock");
    for _ in 0..3 {
        let Ok(mut stranger) = UnixStream::connect(&socket) else { break };
        // It complains of each line, or of the stranger.
        let _heard = stranger.write_all("nonsense\n".repeat(1000).as_bytes());
    }
    builds_end(&db).await;
}

/// The end of a pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Stdio::from(OwnedFd::from(writer))
}

fn full_disk() -> Stdio {
    Stdio::from(File::options().write(true).open("/dev/full").unwrap())
}

/// Exit code and standard error of a command with this standard output.
fn to(stdout: Stdio, db: &Db, folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(PROGRAM)
        .args(arguments)
        .current_dir(folder)
        .env_remove("DATABASE_URL")
        .env("BUILDREACTOR_DATABASE_URL", db.url())
        .env("BUILDREACTOR_WORKER_STATE_DIR", folder)
        .stdin(Stdio::null())
        .stdout(stdout)
        .output()
        .unwrap();
    (output.status.code(), text(&output.stderr))
}

/// A git checkout as the demo wants it.
fn checkout() -> TempDir {
    let folder = temp_dir();
    for file in ["Cargo.toml", "Cargo.lock"] {
        std::fs::write(folder.path().join(file), "").unwrap();
    }
    let script = "git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm x";
    assert!(Command::new("sh").args(["-c", script]).current_dir(folder.path()).status().unwrap().success());
    folder
}

#[tokio::test]
async fn commands_end_quietly_without_a_reader_and_with_an_error_on_a_full_disk() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    db.execute(
        "INSERT INTO builds (builder) VALUES ('b');
         UPDATE builds SET state = 'passed', attempt = 1, worker = 'w', queued_at = now(), started_at = now(), finished_at = now();
         INSERT INTO build_attempts (build_id, attempt, worker, started_at) VALUES (1, 1, 'w', now());
         INSERT INTO build_log (build_id, attempt, seq, content) SELECT 1, 1, n, repeat('x', 60000) FROM generate_series(1, 40) n",
    )
    .await;
    let folder = checkout();
    // `None`: whatever it found.
    for (arguments, without_reader) in [
        (&["log", "1"][..], Some(0)),
        (&["log", "1", "-f"], Some(0)),
        (&["watch", "--once"], Some(0)),
        (&["watch"], Some(0)),
        // It passed, but nobody has been told.
        (&["watch", "1"], Some(1)),
        (&["check"], None),
        (&["migrate"], Some(0)),
        (&["demo"], Some(1)),
        (&["--help"], Some(0)),
        (&["help", "run"], Some(0)),
        (&["log", "--help"], Some(0)),
        (&["--version"], Some(0)),
    ] {
        let (code, said) = to(closed_pipe(), &db, folder.path(), arguments);
        assert!(without_reader.is_none_or(|expected| code == Some(expected)), "{arguments:?}: {code:?} {said}");
        assert_eq!(said, "", "{arguments:?}");
        let (code, said) = to(full_disk(), &db, folder.path(), arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {said}");
        let line = "buildreactor: standard output cannot be written: No space left on device (os error 28)";
        assert_eq!(said.trim_end(), line, "{arguments:?}");
    }
}

#[tokio::test]
async fn errors_that_nobody_reads_have_their_exit_codes() {
    let db = Db::new().await;
    let folder = temp_dir();
    for (arguments, code) in [
        (&["log", "4711"][..], 66),
        (&["watch", "4711"], 66),
        (&["nonsense"], 2),
        (&["--config", "/nowhere/at/all", "run"], 78),
    ] {
        for stderr in [closed_pipe(), full_disk()] {
            let status = Command::new(PROGRAM)
                .args(arguments)
                .current_dir(folder.path())
                .env_remove("DATABASE_URL")
                .env("BUILDREACTOR_DATABASE_URL", db.url())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(stderr)
                .status()
                .unwrap();
            assert_eq!(status.code(), Some(code), "{arguments:?}");
        }
    }
}

#[tokio::test]
async fn what_cannot_start_ends_although_its_stderr_is_stuck() {
    let fifo = Fifo::new();
    let _reader = fifo.reader();
    let mut filler = File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&fifo.path).unwrap();
    while filler.write(b"x").is_ok() {}
    for (arguments, expected) in [
        (&["--config", "/nowhere/at/all", "run"][..], 78),
        (&["migrate", "--database", "postgresql://127.0.0.1:1/none"], 69),
    ] {
        let stuck = File::options().write(true).open(&fifo.path).unwrap();
        let mut command = tokio::process::Command::new(PROGRAM);
        command.args(arguments).env_remove("DATABASE_URL").stdin(Stdio::null()).stderr(stuck).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let ended = tokio::time::timeout(SOON, child.wait()).await.expect("it does not end");
        assert_eq!(ended.unwrap().code(), Some(expected), "{arguments:?}");
    }
}
