//! The keeper takes orders from the daemon of its worker and from nobody else, whatever builds do to the folder that they share; and it
//! does not outlive that folder.

use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::support::beating::{Beating, attempts, uptime};
use crate::support::{Daemon, Db, buildreactor, name_of, processes_of, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
/// Whatever ends within the time of a test has not ended by its lease.
const LONG: [(&str, &str); 3] = [HOUR, ("BUILDREACTOR_LEASE_LEASE", "600s"), ("BUILDREACTOR_LEASE_GRACE", "700s")];

fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    [&LONG, more].concat()
}

/// Calls the keeper again and again, in every way: silent, with half an order, with whole ones, closed at once, kept open. Prints what it
/// was told.
const CALLS: &str = r#"#!/usr/bin/env python3
import json, os, socket, sys
os.chdir(os.path.join(os.environ['BUILD_DIR'], '../../..'))
other = sys.argv[1] if len(sys.argv) > 1 else '1.1'
here = os.environ['BUILD_DIR']
start = dict(say='start', id='9.9', command=['/bin/sh', '-c', 'touch %s/started' % here], workdir=here, env=[], dir=here,
             timeout_ms=60000, silence_ms=None, kill_after_ms=100, file_limit=1000, until_ms=2 ** 53, namespace=False)
orders = [b'', b'{"say": "st', b'\n\n', b'x' * 100000, b'\xff\n'] + [json.dumps(order).encode() + b'\n' for order in
    (dict(say='leave'), dict(say='stop', id=other), dict(say='renew', id=other, until_ms=1), start)]
kept, heard = [], b''
for n in range(3000):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(60)
    s.connect('keeper.sock')
    try:
        s.sendall(orders[n % len(orders)])
        if n % 7 == 0: heard += s.recv(1000)
    except (BrokenPipeError, ConnectionResetError): pass
    if n % 10 == 0 and len(kept) < 300: kept.append(s)
    else: s.close()
for s in kept:
    try: heard += s.recv(1000)
    except ConnectionResetError: pass
print('heard', heard, flush=True)
"#;

/// Eight who call without a pause.
const CROWD: &str = r#"#!/usr/bin/env python3
import os, socket
os.chdir(os.path.join(os.environ['BUILD_DIR'], '../../..'))
children = []
for n in range(8):
    pid = os.fork()
    if pid == 0:
        while not os.path.exists('GATE'):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            s.connect('keeper.sock')
            s.close()
        os._exit(0)
    children.append(pid)
print('crowded', flush=True)
for pid in children: os.waitpid(pid, 0)
"#;

#[tokio::test]
async fn a_build_that_calls_the_keeper_thousands_of_times_is_sent_away_and_costs_nobody_anything() {
    for namespace in ["true", "false"] {
        let db = Db::new().await;
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        db.builder("calls", CALLS).await;
        let mut daemon = Daemon::start(&db, "w", &with(&[("BUILDREACTOR_WORKER_PID_NAMESPACE", namespace)])).await;
        let id = db.enqueue("b").await;
        build.beats_in(1).await;
        let keeper = daemon.keeper().unwrap();
        let open = || std::fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().count();
        let before = open();
        let calls = db.enqueue("calls").await;
        assert_eq!(db.finished(calls).await, "passed");
        assert_eq!(db.one::<String>(&format!("SELECT build_log_text({calls})")).await, "heard b''\n");
        assert!(!daemon.state.path().join(format!("w/attempts/{calls}.1/work/started")).exists());
        wait_for("the calls to be closed", || async { open() <= before }).await;
        daemon.says("a connection that is not this worker's daemon is refused").await;
        assert!(daemon.times_said("is refused") <= 5, "one line a minute is enough");
        // Who was connected still is, and the next daemon is let in, however many are at the door.
        let third = db.enqueue("calls").await;
        assert_eq!(db.finished(third).await, "passed");
        let gate = build.gate().with_file_name("enough");
        db.builder("crowd", &CROWD.replace("GATE", gate.to_str().unwrap())).await;
        let crowd = db.enqueue("crowd").await;
        db.wait(&format!("SELECT build_log_text({crowd}) LIKE '%crowded%'")).await;
        daemon.kill();
        daemon.spawn_again();
        daemon.ready().await;
        assert_eq!(daemon.keeper(), Some(keeper));
        std::fs::write(gate, "").unwrap();
        assert_eq!(db.finished(crowd).await, "passed");
        build.beats_at(uptime()).await;
        build.open();
        assert_eq!(db.finished(id).await, "failed");
        assert_eq!(attempts(&db, id).await, ["1|w|failed|3|exit code 3"]);
    }
}

/// It waits until the daemon's files are free, and calls then.
const USURPS: &str = r#"#!/usr/bin/env python3
import fcntl, os, socket, time
os.chdir(os.path.join(os.environ['BUILD_DIR'], '../../..'))
f, g = open('daemon.pid', 'r+'), open('daemon.lock', 'r+')
print('waits', flush=True)
fcntl.lockf(f, fcntl.LOCK_EX)
fcntl.flock(g, fcntl.LOCK_EX)
s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
s.connect('keeper.sock')
try:
    s.sendall(b'{"say": "stop", "id": "1.1"}\n')
    print('heard', s.recv(1000), flush=True)
except (BrokenPipeError, ConnectionResetError): print('heard nothing', flush=True)
open('usurped', 'w').close()
time.sleep(600)
"#;

#[tokio::test]
async fn a_build_that_holds_the_daemons_files_while_there_is_no_daemon_gives_no_orders() {
    for namespace in ["true", "false"] {
        let db = Db::new().await;
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        db.builder("usurps", USURPS).await;
        let mut daemon = Daemon::start(&db, "w", &with(&[("BUILDREACTOR_WORKER_PID_NAMESPACE", namespace)])).await;
        let id = db.enqueue("b").await;
        build.beats_in(1).await;
        let usurps = db.enqueue("usurps").await;
        db.wait(&format!("SELECT build_log_text({usurps}) = E'waits\\n'")).await;
        let keeper = daemon.keeper();
        daemon.kill();
        let usurped = daemon.state.path().join("w/usurped");
        wait_for("the build to call", || async { usurped.exists() }).await;
        daemon.spawn_again();
        daemon.ready().await;
        assert!(daemon.has_said("found the keeper of an earlier daemon"));
        assert_eq!(daemon.keeper(), keeper);
        // And a second daemon is refused as ever.
        let second = [
            ("BUILDREACTOR_WORKER_NAME", "w"),
            ("BUILDREACTOR_WORKER_STATE_DIR", daemon.state.path().to_str().unwrap()),
        ];
        let output = buildreactor(&["run", "--database", &db.url()], &second);
        assert_eq!(output.status.code(), Some(75), "{output:?}");
        db.wait(&format!("SELECT build_log_text({usurps}) LIKE E'waits\\nheard%'")).await;
        let log: String = db.one(&format!("SELECT build_log_text({usurps})")).await;
        assert!(["waits\nheard nothing\n", "waits\nheard b''\n"].contains(&log.as_str()), "{log}");
        db.execute(&format!("SELECT cancel_build({usurps}, 'enough')")).await;
        assert_eq!(db.finished(usurps).await, "cancelled");
        build.beats_at(uptime()).await;
        build.open();
        assert_eq!(db.finished(id).await, "failed");
        assert_eq!(attempts(&db, id).await, ["1|w|failed|3|exit code 3"]);
    }
}

/// What somebody can put in the place of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Instead {
    Nothing,
    EmptyFolder,
    Folder,
    File,
    Fifo,
    LinkToNowhere,
    LinkToFile,
    LinkToFolder,
    /// Where somebody answers who is not the keeper.
    Socket,
    LinkToSocket,
}

const ALL: [Instead; 10] = [
    Instead::Nothing,
    Instead::EmptyFolder,
    Instead::Folder,
    Instead::File,
    Instead::Fifo,
    Instead::LinkToNowhere,
    Instead::LinkToFile,
    Instead::LinkToFolder,
    Instead::Socket,
    Instead::LinkToSocket,
];

impl Instead {
    /// `beside`: a folder for what a link leads to.
    fn put(self, path: &Path, beside: &Path) -> Told {
        let (file, folder, socket) = (beside.join("precious"), beside.join("folder"), beside.join("socket"));
        std::fs::write(&file, "precious").unwrap();
        std::fs::create_dir_all(folder.join("precious")).unwrap();
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            let _none = std::fs::remove_file(path);
        }
        let _none = std::fs::remove_file(&socket);
        match self {
            Instead::Nothing => {}
            Instead::EmptyFolder => std::fs::create_dir(path).unwrap(),
            Instead::Folder => std::fs::create_dir_all(path.join("much/in/it")).unwrap(),
            Instead::File => std::fs::write(path, "a file").unwrap(),
            Instead::Fifo => nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            Instead::LinkToNowhere => symlink("/nowhere/at/all", path).unwrap(),
            Instead::LinkToFile => symlink(&file, path).unwrap(),
            Instead::LinkToFolder => symlink(&folder, path).unwrap(),
            Instead::Socket => {
                let listener = UnixListener::bind(&socket).unwrap();
                std::fs::rename(&socket, path).unwrap();
                return impostor(listener);
            }
            Instead::LinkToSocket => {
                let listener = UnixListener::bind(&socket).unwrap();
                symlink(&socket, path).unwrap();
                return impostor(listener);
            }
        }
        Told::default()
    }
}

/// What somebody was told.
type Told = Arc<Mutex<Vec<u8>>>;

/// Says what a keeper says, and listens.
fn impostor(listener: UnixListener) -> Told {
    let told = Told::default();
    let ours = Arc::clone(&told);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let hello = br#"{"say": "hello", "version": 1, "pid": 1, "running": ["1.1"], "no_namespace": null}"#;
            let _gone = stream.write_all(&[hello.as_slice(), b"\n"].concat());
            let mut buffer = [0; 1000];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                ours.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        }
    });
    told
}

/// What links led to is as it was, and nobody told the one who answered anything.
fn untouched(beside: &Path, told: &Told, what: &str) {
    assert_eq!(std::fs::read_to_string(beside.join("precious")).unwrap(), "precious", "{what}");
    assert_eq!(std::fs::read_dir(beside.join("folder")).unwrap().count(), 1, "{what}");
    assert_eq!(String::from_utf8_lossy(&told.lock().unwrap()), "", "{what}");
}

fn aside(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().contains("aside")).count()
}

#[tokio::test]
async fn what_stands_in_the_place_of_the_keepers_files_costs_no_running_build_and_is_put_right() {
    let db = Db::new().await;
    let build = Beating::new();
    let beside = temp_dir();
    db.builder("b", &build.script()).await;
    db.builder("next", "true").await;
    let mut daemon = Daemon::start(&db, "w", &LONG).await;
    let id = db.enqueue("b").await;
    build.beats_in(1).await;
    let keeper = daemon.keeper().unwrap();
    let folder = daemon.state.path().join("w");
    for name in ["keeper.sock", "keeper.pid", "daemon.pid"] {
        for instead in ALL {
            let what = format!("{name}: {instead:?}");
            daemon.kill();
            let told = instead.put(&folder.join(name), beside.path());
            daemon.spawn_again();
            daemon.ready().await;
            assert!(daemon.has_said("found the keeper of an earlier daemon"), "{what}: {:#?}", daemon.log);
            assert_eq!(name_of(keeper), "br-keeper", "{what}");
            let next = db.enqueue("next").await;
            assert_eq!(db.finished(next).await, "passed", "{what}");
            untouched(beside.path(), &told, &what);
        }
    }
    build.beats_at(uptime()).await;
    build.open();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db, id).await, ["1|w|failed|3|exit code 3"]);
    assert_eq!(daemon.stop().await, Some(0));
    wait_for("the keeper's end", || async { name_of(keeper) != "br-keeper" }).await;
    // Nothing runs: each name may have been taken by anything.
    for name in ["keeper.sock", "keeper.pid", "daemon.pid", "keeper.lock", "daemon.lock"] {
        for instead in ALL {
            let what = format!("{name}: {instead:?}");
            let told = instead.put(&folder.join(name), beside.path());
            daemon.spawn_again();
            daemon.ready().await;
            let next = db.enqueue("next").await;
            assert_eq!(db.finished(next).await, "passed", "{what}");
            untouched(beside.path(), &told, &what);
            let keeper = daemon.keeper().unwrap();
            assert_eq!(daemon.stop().await, Some(0));
            wait_for("the keeper's end", || async { name_of(keeper) != "br-keeper" }).await;
        }
    }
    daemon.spawn_again();
    daemon.ready().await;
    wait_for("what was put aside to be removed", || async { aside(&folder) == 0 }).await;
}

/// How a folder vanishes.
#[derive(Clone, Copy, Debug)]
enum Vanishes {
    Removed,
    RemovedWithAllAbove,
    Renamed,
    /// A new one is in its place.
    Replaced,
}

impl Vanishes {
    fn with(self, folder: &Path, away: &Path) {
        match self {
            Vanishes::Removed => std::fs::remove_dir_all(folder).unwrap(),
            Vanishes::RemovedWithAllAbove => std::fs::remove_dir_all(folder.parent().unwrap()).unwrap(),
            Vanishes::Renamed => std::fs::rename(folder, away).unwrap(),
            Vanishes::Replaced => {
                std::fs::rename(folder, away).unwrap();
                std::fs::create_dir(folder).unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_keeper_whose_folder_has_vanished_ends_its_builds_and_leaves_without_a_daemon() {
    let ways = [Vanishes::Removed, Vanishes::RemovedWithAllAbove, Vanishes::Renamed, Vanishes::Replaced];
    for (way, namespace) in ways.into_iter().zip(["true", "false", "false", "true"]) {
        let db = Db::new().await;
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        let mut daemon = Daemon::start(&db, "w", &with(&[("BUILDREACTOR_WORKER_PID_NAMESPACE", namespace)])).await;
        db.enqueue("b").await;
        build.beats_in(1).await;
        let keeper = daemon.keeper().unwrap();
        daemon.kill();
        let since = uptime();
        let away = temp_dir();
        way.with(&daemon.state.path().join("w"), &away.path().join("w"));
        wait_for("the keeper's end", || async { name_of(keeper) != "br-keeper" }).await;
        assert_eq!(processes_of(&daemon.state), Vec::<i32>::new(), "{way:?}");
        println!("{way:?}: {:.1} s", uptime() - since);
        std::fs::create_dir_all(daemon.state.path()).unwrap();
    }
}

#[tokio::test]
async fn a_worker_whose_folder_has_vanished_tries_its_builds_again_in_a_new_one() {
    for way in [Vanishes::Removed, Vanishes::RemovedWithAllAbove, Vanishes::Renamed, Vanishes::Replaced] {
        let db = Db::new().await;
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        let daemon = Daemon::start(&db, "w", &LONG).await;
        let id = db.enqueue("b").await;
        build.beats_in(1).await;
        let keeper = daemon.keeper().unwrap();
        let folder: PathBuf = daemon.state.path().join("w");
        let away = temp_dir();
        way.with(&folder, &away.path().join("w"));
        wait_for("the keeper's end", || async { name_of(keeper) != "br-keeper" }).await;
        build.beats_in(2).await;
        build.one_at_a_time();
        build.open();
        assert_eq!(db.finished(id).await, "failed");
        let found = attempts(&db, id).await;
        let gone = format!("|the worker's folder `{}` has vanished", folder.display());
        assert!(found.len() == 2 && found[0].starts_with("1|w|error|") && found[0].ends_with(&gone), "{found:?}");
        assert_eq!(found[1], "2|w|failed|3|exit code 3");
        assert!(folder.join("daemon.lock").exists(), "nobody else may use the new one");
        drop(daemon);
    }
}
