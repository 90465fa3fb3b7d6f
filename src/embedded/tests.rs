//! Real servers. As root they run as user `postgres` or `nobody`; one test runs another as an ordinary user.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};

use super::watchdog::{is_alive, pause};
use super::*;

/// Set for a process that only holds a server: `throw-away`, or the folder to keep.
const HOLD: &str = "BUILDREACTOR_TEST_HOLD";

fn throw_away() -> Server {
    Server::start(Options::default()).unwrap()
}

fn keep(dir: &Path) -> Result<Server, EmbeddedError> {
    Server::start(Options { dir: Some(dir.to_owned()), ..Options::default() })
}

fn failure(result: Result<Server, EmbeddedError>) -> String {
    result.expect_err("the server should not have started").to_string()
}

/// A folder of a test that everybody can enter and write to, removed afterwards.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        let place = nix::unistd::mkdtemp("/tmp/buildreactor-test-XXXXXX").unwrap();
        fs::set_permissions(&place, PermissionsExt::from_mode(0o777)).unwrap();
        Place(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited 30 s and still not so: {what}");
        pause();
    }
}

/// The first column of the last row the statements return, as text.
fn ask(url: &str, sql: &str) -> Option<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
        let work = async move { client.simple_query(sql).await.unwrap() };
        let (messages, _) = tokio::join!(work, connection);
        messages.iter().rev().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    })
}

fn process_owner(pid: i32) -> u32 {
    fs::metadata(format!("/proc/{pid}")).unwrap().uid()
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Not there, or dead and merely not yet waited for by whoever inherited it.
fn is_gone(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim().is_empty() || rest.trim().starts_with(['Z', 'X']))
}

/// Another process that holds a server.
struct Holder {
    process: Child,
    postmaster: i32,
    watchdog: i32,
    root: PathBuf,
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// This test binary again, to run one test of this file.
fn test_process(program: &Path, test: &str) -> Command {
    let path = module_path!().split_once("::").unwrap().1;
    let mut command = Command::new(program);
    command.args(["--exact", "--nocapture", "--test-threads=1", &format!("{path}::{test}")]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

fn holder_process(hold: &str, temp: &Path) -> Child {
    let mut command = test_process(&std::env::current_exe().unwrap(), "a_holder");
    command.env(HOLD, hold).env("TMPDIR", temp).spawn().unwrap()
}

fn holder(hold: &str, temp: &Path) -> Holder {
    let mut process = holder_process(hold, temp);
    let line = BufReader::new(process.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.split_once("holding ").map(|(_, told)| told.to_owned()))
        .expect("the holder should have said what it holds");
    let mut told = line.splitn(3, ' ');
    let mut number = || told.next().unwrap().parse().unwrap();
    let (postmaster, watchdog) = (number(), number());
    let root = PathBuf::from(told.next().unwrap());
    assert!(root.exists() && is_alive(postmaster) && is_alive(watchdog));
    Holder { process, postmaster, watchdog, root }
}

/// Not a test by itself: what [`holder`] runs.
#[test]
fn a_holder() {
    let Ok(hold) = std::env::var(HOLD) else {
        return;
    };
    let server = if hold == "throw-away" { throw_away() } else { keep(Path::new(&hold)).unwrap() };
    let watchdog = server.running.as_ref().unwrap().child_id();
    println!("holding {} {watchdog} {}", server.postmaster_pid().unwrap(), server.folder.root.display());
    // Until it is killed, or whoever started it is gone.
    std::io::stdin().lines().for_each(drop);
}

#[test]
fn a_throw_away_answers_on_its_socket_and_leaves_nothing() {
    let mut server = throw_away();
    let pid = server.postmaster_pid().unwrap();
    let root = server.folder.root.clone();
    let url = server.url("postgres");
    let version: u32 = ask(&url, "SHOW server_version_num").unwrap().parse().unwrap();
    assert_eq!((version / 10000, version % 10000), server.version());
    assert_eq!(ask(&url, "SHOW data_directory").map(PathBuf::from).as_deref(), Some(server.data_dir()));
    for (name, value) in [
        ("server_encoding", "UTF8"),
        ("lc_collate", "C"),
        ("listen_addresses", ""),
        ("fsync", "off"),
        ("synchronous_commit", "on"),
        ("max_connections", "300"),
        ("timezone", "UTC"),
    ] {
        let sql =
            format!("SELECT coalesce(current_setting('{name}', true), (SELECT datcollate FROM pg_database LIMIT 1))");
        assert_eq!(ask(&url, &sql).as_deref(), Some(value), "{name}");
    }
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(server.socket_dir()).unwrap().mode() & 0o777, 0o700);
    if geteuid().is_root() {
        assert_ne!(process_owner(pid), 0, "the server runs as root");
        assert_eq!(process_owner(pid), server.account.uid);
    } else {
        assert_eq!(process_owner(pid), geteuid().as_raw());
    }
    server.stop(StopMode::Fast).unwrap();
    assert!(is_gone(pid) && !root.exists());
    assert_eq!(server.postmaster_pid(), None);
    server.stop(StopMode::Smart).unwrap();
    let gone = server.restart(StopMode::Fast).unwrap_err();
    assert!(matches!(gone, EmbeddedError::Removed { .. }), "{gone}");
}

#[test]
fn an_ordinary_user_runs_a_server_as_himself() {
    if !geteuid().is_root() {
        return; // the other tests are just this
    }
    let nobody = User::from_name("nobody").unwrap().unwrap();
    // Root's target folder may be closed to him.
    let place = Place::new();
    let program = place.0.join("tests");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    for test in
        ["a_throw_away_answers_on_its_socket_and_leaves_nothing", "data_of_a_kept_folder_survives_a_stop_and_a_start"]
    {
        let mut command = test_process(&program, test);
        command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw()).current_dir("/").stdin(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn data_of_a_kept_folder_survives_a_stop_and_a_start() {
    let place = Place::new();
    let dir = place.0.join("some/where");
    let mut server = keep(&dir).unwrap();
    let url = server.url("postgres");
    ask(&url, "CREATE TABLE t (x int); INSERT INTO t VALUES (42)");
    assert_eq!(ask(&url, "SHOW fsync").as_deref(), Some("on"));
    assert_eq!(ask(&url, "SHOW max_connections").as_deref(), Some("100"));
    assert_eq!(ask(&url, "SHOW data_checksums").as_deref(), Some("on"));
    server.stop(StopMode::Smart).unwrap();
    assert!(dir.join("data/PG_VERSION").exists() && dir.join("postgres.log").exists());

    let again = keep(&dir).unwrap();
    assert_eq!(again.url("postgres"), url);
    assert_eq!(ask(&url, "SELECT x FROM t").as_deref(), Some("42"));
    drop(again);
    server.restart(StopMode::Fast).unwrap();
    assert_eq!(ask(&url, "SELECT x FROM t").as_deref(), Some("42"));
}

#[test]
fn killing_the_holder_leaves_neither_server_nor_folder() {
    let place = Place::new();
    let mut holder = holder("throw-away", &place.0);
    assert!(holder.root.starts_with(&place.0));
    holder.process.kill().unwrap();
    wait_until("the server has ended", || is_gone(holder.postmaster));
    wait_until("its watchdog has ended", || is_gone(holder.watchdog));
    assert!(!holder.root.exists());
}

#[test]
fn a_temp_dir_the_servers_user_cannot_tidy_is_not_used() {
    if !geteuid().is_root() {
        return; // only root runs it as another
    }
    let place = Place::new();
    fs::set_permissions(&place.0, PermissionsExt::from_mode(0o755)).unwrap();
    let mut holder = holder("throw-away", &place.0);
    assert!(holder.root.starts_with("/tmp") && !holder.root.starts_with(&place.0));
    holder.process.kill().unwrap();
    wait_until("the folder is gone", || !holder.root.exists());
}

#[test]
fn killing_the_holder_during_initdb_leaves_neither_server_nor_folder() {
    let place = Place::new();
    let mut process = holder_process("throw-away", &place.0);
    let entries = || fs::read_dir(&place.0).unwrap().flatten().collect::<Vec<_>>();
    wait_until("initdb has begun", || entries().iter().any(|one| one.path().join("data.new/base").exists()));
    process.kill().unwrap();
    process.wait().unwrap();
    wait_until("the folder is gone", || entries().is_empty());
}

#[test]
fn killing_watchdog_and_holder_leaves_neither_server_nor_folder() {
    let place = Place::new();
    let mut holder = holder("throw-away", &place.0);
    send(holder.watchdog, Signal::SIGKILL);
    wait_until("the watchdog is gone", || is_gone(holder.watchdog));
    assert!(!is_gone(holder.postmaster), "the server does not depend on its watchdog");
    holder.process.kill().unwrap();
    wait_until("the server has ended", || is_gone(holder.postmaster));
    wait_until("the folder is gone", || !holder.root.exists());
}

#[test]
fn a_stop_works_without_the_watchdog_too() {
    let mut server = throw_away();
    let (pid, root) = (server.postmaster_pid().unwrap(), server.folder.root.clone());
    send(server.running.as_ref().unwrap().child_id(), Signal::SIGKILL);
    server.stop(StopMode::Fast).unwrap();
    assert!(is_gone(pid) && !root.exists());
}

#[test]
fn a_sigterm_for_all_of_the_watchdogs_group_stops_the_server_at_once() {
    let place = Place::new();
    let server = keep(&place.0.join("pg")).unwrap();
    // A client that stays, which the server by itself would wait for.
    let url = server.url("postgres");
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
            println!("{:?}", connection.await); // until the server cuts it
            drop(client);
        });
    });
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    wait_until("the client is there", || ask(&server.url("postgres"), sessions).as_deref() == Some("2"));
    send(-server.running.as_ref().unwrap().child_id(), Signal::SIGTERM);
    wait_until("the server has ended", || server.postmaster_pid().is_none());
    client.join().unwrap();
}

#[test]
fn a_terminated_watchdog_stops_the_server_first() {
    let place = Place::new();
    let mut server = keep(&place.0.join("pg")).unwrap();
    let pid = server.postmaster_pid().unwrap();
    send(server.running.as_ref().unwrap().child_id(), Signal::SIGTERM);
    wait_until("the server has ended", || server.postmaster_pid().is_none());
    assert!(is_gone(pid));
    let log = fs::read_to_string(server.folder.log()).unwrap();
    assert!(log.contains("received fast shutdown request"), "{log}");
    server.restart(StopMode::Fast).unwrap();
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
}

#[test]
fn committed_rows_survive_an_immediate_restart_and_a_crash() {
    let mut server = throw_away();
    let url = server.url("postgres");
    ask(&url, "CREATE TABLE t (x int); INSERT INTO t VALUES (1)");
    let first = server.postmaster_pid().unwrap();
    server.restart(StopMode::Immediate).unwrap();
    assert_eq!(ask(&url, "INSERT INTO t VALUES (2); SELECT count(*) FROM t").as_deref(), Some("2"));
    let second = server.postmaster_pid().unwrap();
    assert_ne!(first, second);
    send(second, Signal::SIGKILL);
    wait_until("the crash is noticed", || server.postmaster_pid().is_none());
    server.restart(StopMode::Fast).unwrap();
    assert_eq!(ask(&url, "SELECT count(*) FROM t").as_deref(), Some("2"));
    let root = server.folder.root.clone();
    drop(server);
    assert!(!root.exists());
}

#[test]
fn a_crashed_throw_away_is_removed_with_its_holder() {
    let place = Place::new();
    let mut holder = holder("throw-away", &place.0);
    send(holder.postmaster, Signal::SIGKILL);
    wait_until("the server has ended", || is_gone(holder.postmaster));
    assert!(holder.root.exists(), "its log may be wanted while the holder lives");
    holder.process.kill().unwrap();
    wait_until("the folder is gone", || !holder.root.exists());
}

#[test]
fn a_folder_with_a_long_path_keeps_its_short_socket() {
    let place = Place::new();
    let dir = place.0.join("a-rather-long-name, with \"everything\"".repeat(4));
    let server = keep(&dir).unwrap();
    let socket_dir = server.socket_dir().to_owned();
    assert!(socket_dir.starts_with("/tmp") && !socket_dir.starts_with(&place.0));
    assert_eq!(fs::read_link(dir.join("run")).unwrap(), socket_dir);
    assert_eq!(fs::metadata(&socket_dir).unwrap().mode() & 0o777, 0o700);
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
    drop(server);
    let again = keep(&dir).unwrap();
    assert_eq!(again.socket_dir(), socket_dir);
    drop(again);
    fs::remove_dir_all(&socket_dir).unwrap();
    let again = keep(&dir).unwrap();
    assert_ne!(again.socket_dir(), socket_dir, "the temp dir was cleaned");
    assert_eq!(ask(&again.url("postgres"), "SELECT 1").as_deref(), Some("1"));
    let socket_dir = again.socket_dir().to_owned();
    drop(again);
    fs::remove_dir_all(socket_dir).unwrap();
}

#[test]
fn odd_names_of_folders_and_databases_work() {
    let place = Place::new();
    let server = keep(&place.0.join("a, \"b\" c%20&?#=ü")).unwrap();
    ask(&server.url("postgres"), "CREATE DATABASE \"x/y ?&=%\"");
    assert_eq!(ask(&server.url("x/y ?&=%"), "SELECT current_database()").as_deref(), Some("x/y ?&=%"));
}

#[test]
fn a_second_server_in_the_same_folder_is_refused_by_the_pid_of_the_first() {
    let place = Place::new();
    let dir = place.0.join("pg");
    let holder = holder(dir.to_str().unwrap(), Path::new("/tmp"));
    let refused = failure(keep(&dir));
    assert!(refused.contains(&format!("process {}", holder.postmaster)), "{refused}");
    // Its holder killed, the server is waited for instead.
    let postmaster = holder.postmaster;
    drop(holder);
    let server = keep(&dir).unwrap();
    assert!(is_gone(postmaster));
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
}

#[test]
fn a_half_made_data_folder_is_made_again() {
    let place = Place::new();
    let dir = place.0.join("pg");
    drop(keep(&dir).unwrap());
    fs::rename(dir.join("data"), dir.join("data.new")).unwrap();
    fs::remove_file(dir.join("data.new/global/pg_control")).unwrap();
    let server = keep(&dir).unwrap();
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
    assert!(!dir.join("data.new").exists());
}

#[test]
fn a_stale_pid_file_with_somebody_elses_process_does_not_stop_a_start() {
    let place = Place::new();
    let dir = place.0.join("pg");
    let mut server = keep(&dir).unwrap();
    // As after a crash: the file stays, and its process id is another's by now (a process of the server's user).
    let pid_file = server.data_dir().join("postmaster.pid");
    let stale = fs::read_to_string(&pid_file).unwrap();
    let mut other = server.account.command("sleep").arg("60").spawn().unwrap();
    let stale = stale.replacen(&server.postmaster_pid().unwrap().to_string(), &other.id().to_string(), 1);
    server.stop(StopMode::Immediate).unwrap();
    fs::write(&pid_file, stale).unwrap();
    fs::set_permissions(&pid_file, PermissionsExt::from_mode(0o644)).unwrap();
    server.restart(StopMode::Fast).unwrap();
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn data_of_a_version_that_is_not_installed_names_the_version() {
    let place = Place::new();
    let dir = place.0.join("pg");
    drop(keep(&dir).unwrap());
    fs::write(dir.join("data/PG_VERSION"), "12\n").unwrap();
    let refused = failure(keep(&dir));
    assert!(refused.contains("made by PostgreSQL 12") && refused.contains("Install PostgreSQL 12"), "{refused}");
    fs::remove_file(dir.join("data/PG_VERSION")).unwrap();
    let refused = failure(keep(&dir));
    assert!(refused.contains("holds no PostgreSQL data"), "{refused}");
}

#[test]
fn a_folder_the_servers_user_cannot_reach_is_refused_before_anything_is_created() {
    if !geteuid().is_root() {
        return; // only root runs it as another
    }
    let place = Place::new();
    let closed = place.0.join("closed");
    fs::DirBuilder::new().mode(0o700).create(&closed).unwrap();
    let refused = failure(keep(&closed.join("deep/pg")));
    assert!(refused.contains(&format!("cannot get into `{}`", closed.display())), "{refused}");
    assert_eq!(fs::read_dir(&closed).unwrap().count(), 0);
}

#[test]
fn a_folder_of_somebody_else_is_refused_and_an_empty_one_of_root_is_taken() {
    if !geteuid().is_root() {
        return; // cannot make one
    }
    let place = Place::new();
    let refused = {
        fs::write(place.0.join("precious"), "").unwrap();
        failure(keep(&place.0))
    };
    assert!(refused.contains("belongs to user id 0"), "{refused}");
    let empty = place.0.join("empty");
    fs::DirBuilder::new().mode(0o700).create(&empty).unwrap();
    drop(keep(&empty).unwrap());
}

#[test]
fn a_server_that_does_not_start_shows_the_end_of_its_log() {
    let place = Place::new();
    let root = place.0.join("pg");
    let refused = failure(Server::start(Options {
        dir: Some(root.clone()),
        settings: vec![("shared_buffers".into(), "nonsense".into())],
        ..Options::default()
    }));
    assert!(refused.contains("invalid value for parameter \"shared_buffers\": \"nonsense\""), "{refused}");
    // Only what this start wrote; and the folder is free again.
    let refused = failure(Server::start(Options {
        dir: Some(root),
        settings: vec![("no_such_setting".into(), "1".into())],
        ..Options::default()
    }));
    assert!(refused.contains("no_such_setting") && !refused.contains("nonsense"), "{refused}");
}

#[test]
fn settings_and_a_tcp_port_are_passed_on() {
    let mut server = Server::start(Options {
        settings: vec![("max_connections".into(), "17".into()), ("port".into(), "1".into())],
        tcp_port: Some(0),
        ..Options::default()
    })
    .unwrap();
    let tcp = format!("postgresql://postgres@127.0.0.1:{}/postgres", server.port());
    assert_eq!(ask(&tcp, "SHOW max_connections").as_deref(), Some("17"));
    server.restart(StopMode::Fast).unwrap();
    assert_eq!(ask(&tcp, "SELECT 1").as_deref(), Some("1"));
    assert_eq!(ask(&server.url("postgres"), "SELECT 1").as_deref(), Some("1"));
}

#[test]
fn a_child_of_ours_does_not_keep_the_server_alive() {
    let mut server = throw_away();
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = server.postmaster_pid().unwrap();
    // Only the pipe's end tells the watchdog here, as when we are killed.
    server.running.as_mut().unwrap().close_pipe();
    wait_until("the server has ended", || is_gone(pid));
    child.kill().unwrap();
    child.wait().unwrap();
}
