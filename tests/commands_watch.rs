//! `buildreactor log` and `buildreactor watch`, as people and scripts use them.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{self, Daemon, Db, PROGRAM, SOON, buildreactor, text};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// A command that runs beside the test.
pub struct Beside {
    child: Child,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
}

impl Beside {
    fn start(db: &Db, arguments: &[&str]) -> Beside {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).args(["--database", &db.url()]);
        Beside::run(command)
    }

    pub fn run(mut command: Command) -> Beside {
        let mut child = command
            .env_remove("DATABASE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (out, err) = (collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap()));
        Beside { child, out, err }
    }

    pub fn out(&self) -> String {
        text(&self.out.lock().unwrap())
    }

    fn err(&self) -> String {
        text(&self.err.lock().unwrap())
    }

    pub async fn prints(&self, what: &str) {
        support::wait_for(&format!("`{what}` on stdout"), || async { self.out().contains(what) }).await;
    }

    async fn notes(&self, what: &str) {
        support::wait_for(&format!("`{what}` on stderr"), || async { self.err().contains(what) }).await;
    }

    /// Waits for its end; comes back with the exit code, and both outputs whole.
    async fn exited(&mut self) -> (Option<i32>, String, String) {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // The threads that collect hold the other half until they have read all.
                while Arc::strong_count(&self.out) + Arc::strong_count(&self.err) > 2 {
                    assert!(Instant::now() < deadline, "its output does not end");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                return (status.code(), self.out(), self.err());
            }
            assert!(Instant::now() < deadline, "it does not end: {}{}", self.out(), self.err());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&all);
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            into.lock().unwrap().extend_from_slice(&buffer[..read]);
        }
    });
    all
}

/// Runs a command to its end: exit code, stdout, stderr.
fn run(db: &Db, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = buildreactor(arguments, &[("BUILDREACTOR_DATABASE_URL", &db.url())]);
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A build that runs, without a daemon: the test writes its log.
async fn running_by_hand(db: &Db) -> i64 {
    db.builder("hand", "true").await;
    let id: i64 = db.one("INSERT INTO builds (builder) VALUES ('hand') RETURNING id").await;
    db.execute(&format!(
        "UPDATE builds SET state = 'running', attempt = 1, worker = 'w', queued_at = now(), started_at = now() WHERE id = {id};
         INSERT INTO build_attempts (build_id, attempt, worker, started_at) VALUES ({id}, 1, 'w', now())"
    ))
    .await;
    id
}

async fn write(db: &Db, build: i64, seq: i64, content: &str) {
    db.execute(&format!(
        "INSERT INTO build_log (build_id, attempt, seq, content) VALUES ({build}, 1, {seq}, E'{content}')"
    ))
    .await;
}

async fn end_by_hand(db: &Db, build: i64, state: &str) {
    db.execute(&format!("UPDATE builds SET state = '{state}', finished_at = now() WHERE id = {build}")).await;
}

/// No new connections, and the commands' ones cut: for them the database is away.
async fn cut_off(db: &Db) {
    allow_connections(db, false).await;
    db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'buildreactor watch' AND datname = current_database()").await;
}

async fn allow_connections(db: &Db, allow: bool) {
    let elsewhere = support::connect(&support::server().url("postgres")).await;
    elsewhere.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS {allow}", db.name())).await.unwrap();
}

#[tokio::test]
async fn a_log_is_printed_as_it_is_stored_page_by_page() {
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    let id_text = id.to_string();
    db.execute(&format!(
        "INSERT INTO build_log (build_id, attempt, seq, content) SELECT {id}, 1, n, n || E': \\u20ac 10%\\r20%\\n' FROM generate_series(1, 100) n"
    ))
    .await;
    write(&db, id, 101, "half a line").await;
    let stored: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert_eq!(run(&db, &["log", &id_text]), (Some(0), stored.clone(), String::new()));
    assert_eq!(run(&db, &["log", &id_text, "1"]).1, stored);
    assert_eq!(
        run(&db, &["log", &id_text, "2"]),
        (Some(1), String::new(), format!("buildreactor: build {id} has no attempt 2: it has had 1\n"))
    );
}

#[tokio::test]
async fn a_log_that_is_not_there_is_explained() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await.to_string();
    let (code, out, err) = run(&db, &["log", "4711"]);
    assert_eq!((code, out.as_str(), err.as_str()), (Some(66), "", "buildreactor: there is no build 4711\n"));
    let (code, out, err) = run(&db, &["log", &id]);
    assert_eq!(
        (code, out.as_str(), err),
        (Some(0), "", format!("buildreactor: build {id} has no attempt yet: it is queued\n"))
    );
    let empty = Db::empty().await;
    let (code, _, err) = run(&empty, &["log", "1"]);
    assert_eq!(code, Some(78));
    assert!(err.contains("run `buildreactor migrate` first"), "{err}");
}

#[tokio::test]
async fn following_waits_for_the_first_attempt_and_moves_on_to_the_next() {
    let db = Db::new().await;
    let folder = support::temp_dir();
    let gate = folder.path().join("gate");
    let script = format!(
        "printf 'try %s, ' $BUILD_ATTEMPT; while [ ! -e {}.$BUILD_ATTEMPT ]; do sleep 0.05; done; [ $BUILD_ATTEMPT = 2 ] || exit 75",
        gate.display()
    );
    db.builder("flaky", &script).await;
    let id = db.enqueue("flaky").await.to_string();
    let mut log = Beside::start(&db, &["log", &id, "--follow"]);
    log.notes("has no attempt 1 yet: it is queued").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    // Before the build has ended, and half a line.
    log.prints("try 1, ").await;
    std::fs::write(format!("{}.1", gate.display()), "").unwrap();
    log.notes(&format!("attempt 2 of build {id} begins")).await;
    log.prints("try 1, try 2, ").await;
    std::fs::write(format!("{}.2", gate.display()), "").unwrap();
    let (code, out, err) = log.exited().await;
    assert_eq!((code, out.as_str()), (Some(0), "try 1, try 2, "), "{err}");
    assert!(err.contains(&format!("build {id} of flaky passed")), "{err}");
    // Afterwards an attempt alone, or all from the first on.
    assert_eq!(run(&db, &["log", &id]).1, "try 2, ");
    assert_eq!(run(&db, &["log", &id, "1", "-f"]).1, "try 1, try 2, ");
}

#[tokio::test]
async fn following_a_build_that_fails_exits_with_1() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("bad", "echo oops; exit 3").await;
    let id = db.enqueue("bad").await.to_string();
    let mut log = Beside::start(&db, &["log", &id, "-f"]);
    let (code, out, err) = log.exited().await;
    assert_eq!((code, out.as_str()), (Some(1), "oops\n"));
    assert!(err.contains("failed") && err.contains("exit code 3"), "{err}");
}

#[tokio::test]
async fn a_follower_is_told_of_output_that_it_missed_and_of_nothing_else() {
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    let mut log = Beside::start(&db, &["log", &id.to_string(), "-f"]);
    write(&db, id, 1, "one\\n").await;
    // 2 is the place of a marker that is not needed yet.
    write(&db, id, 3, "three\\n").await;
    log.prints("one\nthree\n").await;
    assert!(!log.err().contains("left out"), "{}", log.err());
    // 4 and 5 came and went; the marker behind the follower says so to others.
    db.execute(&format!("BEGIN; INSERT INTO build_log (build_id, attempt, seq, content) VALUES ({id}, 1, 2, E'\\n[buildreactor: 9 bytes of output left out here; see x]\\n'), ({id}, 1, 6, E'six\\n'); DELETE FROM build_log WHERE build_id = {id} AND seq = 3; COMMIT")).await;
    log.prints("three\nsix\n").await;
    end_by_hand(&db, id, "passed").await;
    let (code, out, err) = log.exited().await;
    assert_eq!((code, out.as_str()), (Some(0), "one\nthree\nsix\n"));
    assert_eq!(err.matches("output is left out here").count(), 1, "{err}");
    assert!(err.contains("piece 3 of this log is followed by piece 6"), "{err}");
    // Who comes later reads the marker, and needs no other word.
    let (_, out, err) = run(&db, &["log", &id.to_string()]);
    assert_eq!(out, "one\n\n[buildreactor: 9 bytes of output left out here; see x]\nsix\n");
    assert_eq!(err, "");
}

#[tokio::test]
async fn the_marker_of_a_real_log_explains_its_gap() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_LOG_DATABASE_LIMIT", "64 KiB")]).await;
    db.builder("flood", "seq -f %07.0f 0 499999").await;
    let id = db.enqueue("flood").await;
    assert_eq!(db.finished(id).await, "passed");
    let (code, out, err) = run(&db, &["log", &id.to_string()]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(out, db.one::<String>(&format!("SELECT build_log_text({id})")).await);
}

#[tokio::test]
async fn following_survives_a_database_that_is_away() {
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    write(&db, id, 1, "one\\n").await;
    let mut log = Beside::start(&db, &["log", &id.to_string(), "-f"]);
    log.prints("one\n").await;
    cut_off(&db).await;
    log.notes("trying again until it is back").await;
    write(&db, id, 2, "two\\n").await;
    allow_connections(&db, true).await;
    log.prints("one\ntwo\n").await;
    write(&db, id, 3, "three\\n").await;
    end_by_hand(&db, id, "failed").await;
    let (code, out, err) = log.exited().await;
    assert_eq!((code, out.as_str()), (Some(1), "one\ntwo\nthree\n"));
    assert_eq!(err.matches("trying again").count(), 1, "{err}");
    assert_eq!(err.matches("the database is back").count(), 1, "{err}");
}

#[tokio::test]
async fn a_follower_ends_quietly_when_nobody_reads_it_any_more() {
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    write(&db, id, 1, "one\\n").await;
    // The build says nothing more, and never ends.
    for command in ["log $ID -f", "watch"] {
        let mut pipe = Command::new("sh");
        pipe.arg("-c").arg(format!("$PROGRAM {command} | head -n 1")).env("PROGRAM", PROGRAM).env("ID", id.to_string());
        pipe.env("BUILDREACTOR_DATABASE_URL", db.url());
        let (code, out, err) = Beside::run(pipe).exited().await;
        assert_eq!((code, out.lines().count(), err.as_str()), (Some(0), 1, ""), "{command}: {out}");
    }
}

#[tokio::test]
async fn watching_a_build_tells_each_change_once_and_exits_with_its_verdict() {
    let db = Db::new().await;
    let folder = support::temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
    db.builder("bad", "exit 3").await;
    let (first, second) = (db.enqueue("b").await, db.enqueue("b").await);
    let mut watch = Beside::start(&db, &["watch", &second.to_string()]);
    watch.prints("waits, place 2: no worker is running").await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    watch.prints("waits, place 1: builder b is busy (1 of 1)").await;
    std::fs::write(&gate, "").unwrap();
    let (code, out, err) = watch.exited().await;
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    assert!(out.lines().last().unwrap().starts_with(&format!("build {second} of b passed in ")), "{out}");
    assert!(!out.chars().any(|c| c.is_control() && c != '\n'), "{out:?}");
    let mut lines: Vec<&str> = out.lines().collect();
    lines.dedup();
    assert_eq!(lines.len(), out.lines().count(), "{out}");
    assert_eq!(run(&db, &["watch", &first.to_string()]).0, Some(0));

    let bad = db.enqueue("bad").await;
    let (code, out, _) = Beside::start(&db, &["watch", &bad.to_string()]).exited().await;
    assert_eq!(code, Some(1));
    assert!(out.ends_with(": exit code 3\n"), "{out}");
    assert_eq!(
        run(&db, &["watch", "4711"]),
        (Some(66), String::new(), "buildreactor: there is no build 4711\n".to_owned())
    );
}

#[tokio::test]
async fn watching_everything_prints_a_line_for_each_change_and_survives_a_cut() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "true").await;
    db.builder("mac", "true").await;
    db.execute("UPDATE builders SET labels = '{mac}' WHERE name = 'mac'").await;
    let old = db.enqueue("b").await;
    assert_eq!(db.finished(old).await, "passed");
    let mut watch = Beside::start(&db, &["watch"]);
    watch.prints("workers: w 0/2\n").await;
    let mac = db.enqueue("mac").await;
    watch.prints(&format!("build {mac} of mac waits: no running worker takes builder mac with labels mac")).await;
    cut_off(&db).await;
    watch.notes("trying again until it is back").await;
    allow_connections(&db, true).await;
    watch.notes("the database is back").await;
    let new = db.enqueue("b").await;
    watch.prints(&format!("build {new} of b passed in ")).await;
    watch.interrupt();
    let (code, out, _) = watch.exited().await;
    assert_eq!(code, Some(0));
    assert!(!out.contains(&format!("build {old} ")), "what had finished before is no change: {out}");
    assert_eq!(out.matches(&format!("build {mac} of mac waits")).count(), 1, "{out}");
    assert!(!out.chars().any(|c| c.is_control() && c != '\n'), "{out:?}");
    drop(daemon);
}

#[tokio::test]
async fn once_prints_the_tables_and_leaves() {
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    write(&db, id, 1, "\\x1b[31mcompiling\\x1b[0m\\tx.c\\n").await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET paused = true, paused_reason = E'broken\\ncompiler' WHERE name = 'b'").await;
    db.execute("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, 20)").await;
    let (code, out, err) = run(&db, &["watch", "--once"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.contains("waiting: 20 (the first 15)\n"), "{out}");
    assert_eq!(out.matches("builder b is paused: broken compiler\n").count(), 15, "{out}");
    assert!(out.contains("running: 1\n") && out.contains("compiling x.c\n"), "{out}");
    assert!(out.ends_with("workers: none is running; start one with buildreactor run\n"), "{out}");
    assert!(!out.chars().any(|c| c.is_control() && c != '\n'), "{out:?}");
    let (code, out, _) = run(&db, &["watch", &id.to_string(), "--once"]);
    assert_eq!((code, out), (Some(1), format!("build {id} of hand runs, attempt 1 on w\n")));
}

/// `script` gives the command a terminal.
#[tokio::test]
async fn on_a_terminal_a_running_build_has_a_progress_bar() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("no `script` here");
        return;
    }
    let db = Db::new().await;
    let id = running_by_hand(&db).await;
    write(&db, id, 1, "linking\\n").await;
    db.execute("INSERT INTO builds (builder, state, attempt, worker, queued_at, started_at, finished_at) VALUES ('hand', 'passed', 1, 'w', now() - interval '1 h', now() - interval '1 h', now() - interval '50 min')").await;
    for arguments in ["watch".to_owned(), format!("watch {id}")] {
        let mut terminal = Command::new("script");
        terminal.args(["-qefc", &format!("stty cols 100 rows 30; {PROGRAM} {arguments}"), "/dev/null"]);
        terminal.env("BUILDREACTOR_DATABASE_URL", db.url()).env("TERM", "xterm");
        let watch = Beside::run(terminal);
        support::wait_for("a bar", || async {
            let out = watch.out();
            out.contains(" / 10m 00s linking") && out.contains("[>") | out.contains("m>")
        })
        .await;
    }
}
