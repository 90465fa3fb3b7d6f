//! No process of a build is left, whatever it started and however it ends: in a PID namespace, under a subreaper alone, and under
//! a subreaper of an ordinary user.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::freezer::Freezer;
use crate::support::{
    Daemon, Db, Launch, PROGRAM, TempDir, anything_of, copy_program, processes_of, server, temp_dir, wait_for,
};
use crate::support::{below, name_of};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const SMALL: [(&str, &str); 4] = [
    HOUR,
    ("BUILDREACTOR_LEASE_PING", "500ms"),
    ("BUILDREACTOR_LEASE_LEASE", "3s"),
    ("BUILDREACTOR_LEASE_GRACE", "13s"),
];

/// Leaves processes behind in every way that we know: daemons by setsid and a double fork, one of them deaf to SIGTERM and without our
/// pipes, nohup, and 200 more, of which some live short and fork their successor, and one more when they are told to end. All in all some
/// 130 forks a second; more would take all of a small machine. Bounded in number and in time, in case we fail.
const NASTY: &str = r#"#!/usr/bin/env python3
import os, random, signal, subprocess, sys, time
last = time.monotonic() + 100
def daemonise(ignore):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if ignore:
                for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
            null = os.open('/dev/null', os.O_RDWR)
            if ignore:
                for fd in (0, 1, 2): os.dup2(null, fd)
            time.sleep(600)
        os._exit(0)
def more(number, frame):
    if os.fork() == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
def hop():
    signal.signal(signal.SIGTERM, more)
    for _ in range(60):
        if time.monotonic() > last: break
        time.sleep(random.uniform(1, 2))
        if os.fork() != 0: os._exit(0)
    os._exit(0)
daemonise(False); daemonise(True)
subprocess.Popen(['nohup', 'sleep', '600'], start_new_session=True)
for _ in range(200):
    if os.fork() == 0: hop()
print('ready', flush=True)
"#;

/// How a worker runs its builds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Namespace,
    Subreaper,
    OrdinaryUser,
    /// An ordinary user to whom /proc shows nobody else's processes (hidepid).
    Blind,
}

/// A worker that runs builds so; none, where this machine cannot.
struct Worker {
    daemon: Daemon,
    /// With the program, for a user who cannot enter the folder that it was built in.
    _program: TempDir,
}

impl Worker {
    async fn start(mode: Mode, db: &Db, settings: &[(&str, &str)]) -> Option<Worker> {
        let root = nix::unistd::geteuid().is_root();
        let ordinary = matches!(mode, Mode::OrdinaryUser | Mode::Blind);
        if mode != Mode::OrdinaryUser && !root {
            println!("NOT TESTED, we are not root: {mode:?}");
            return None;
        }
        let folder = temp_dir();
        let mut launch = Launch::default();
        if root && ordinary {
            // The one who may enter the folder of the server's socket.
            let owner = std::fs::metadata(server().socket_dir()).unwrap();
            assert_ne!(owner.uid(), 0);
            launch.user = Some((owner.uid(), owner.gid()));
            launch.program = folder.path().join("buildreactor");
            copy_program(&launch.program);
            for path in [folder.path(), &launch.program] {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
            if mode == Mode::Blind {
                let Some(becomes_root) = becomes_root(folder.path()) else {
                    println!("NOT TESTED, there is no setpriv");
                    return None;
                };
                let blind = format!(
                    "mount -t proc -o hidepid=2 proc /proc; exec setpriv --reuid {} --regid {} --clear-groups \"$@\"",
                    owner.uid(),
                    owner.gid()
                );
                let more = ["unshare", "--mount", "sh", "-c", &blind, "sh"];
                launch.before = becomes_root.split(' ').chain(more).map(str::to_owned).collect();
            }
        }
        let namespace = ("BUILDREACTOR_WORKER_PID_NAMESPACE", if mode == Mode::Subreaper { "false" } else { "true" });
        let mut daemon = Daemon::launch(launch, &db.url(), "w", &[settings, &[namespace]].concat());
        daemon.ready().await;
        let detail: String = db.one("SELECT detail FROM workers").await;
        match mode {
            Mode::Namespace if detail != "process trees: PID namespace" => {
                println!("NOT TESTED, there are no namespaces here: {detail}");
                return None;
            }
            Mode::Namespace => {}
            Mode::Subreaper => assert_eq!(detail, "process trees: subreaper ([worker] pid_namespace is false)"),
            Mode::OrdinaryUser | Mode::Blind => {
                assert!(detail.starts_with("process trees: subreaper (unshare: "), "{detail}")
            }
        }
        Some(Worker { daemon, _program: folder })
    }

    /// Queues a build of a nasty script that ends with `end`, and waits until it has got there.
    async fn run(&self, db: &Db, timeout: &str, end: &str) -> i64 {
        let name = format!("b{}", crate::support::unique());
        db.builder(&name, &format!("{NASTY}{end}\n")).await;
        db.execute(&format!("UPDATE builders SET timeout = '{timeout}', max_attempts = 1")).await;
        let id = db.enqueue(&name).await;
        db.wait(&format!("SELECT coalesce(build_log_text({id}) = E'ready\\n', false)")).await;
        id
    }

    async fn grown(&self) {
        wait_for("its children", || async { processes_of(&self.daemon.state).len() > 150 }).await;
    }

    /// That nothing is left of its builds, at this moment. Some would show up only now and then, as they fork and end.
    fn nothing_left(&self, when: &str) {
        for _ in 0..3 {
            assert_eq!(processes_of(&self.daemon.state), Vec::<i32>::new(), "{when}");
        }
    }

    fn ours(&self, name: &str) -> i32 {
        let keeper = self.daemon.keeper().expect("a keeper");
        below(keeper).into_iter().find(|pid| name_of(*pid) == name).expect(name)
    }

    /// Leaves, and with it all that it ever started.
    async fn leave(&mut self) {
        assert_eq!(self.daemon.stop().await, Some(0));
        wait_for("the keeper's end", || async { anything_of(&self.daemon.state).is_empty() }).await;
    }
}

async fn told(db: &Db, id: i64) -> String {
    db.finished(id).await;
    db.one(&format!("SELECT concat_ws('|', state, exit_code, term_signal, detail) FROM builds WHERE id = {id}")).await
}

async fn ends_by_itself(mode: Mode) {
    let db = Db::new().await;
    let Some(mut worker) = Worker::start(mode, &db, &[HOUR]).await else { return };
    for (end, expected) in [
        ("sys.exit(0)", "passed|0"),
        ("sys.exit(3)", "failed|3|exit code 3"),
        ("os.kill(os.getpid(), 9)", "failed|9|ended by SIGKILL"),
    ] {
        let id = worker.run(&db, "1 hour", &format!("time.sleep(0.7)\n{end}")).await;
        let told = told(&db, id).await;
        worker.nothing_left(end);
        assert_eq!(told, expected);
    }
    worker.leave().await;
}

async fn is_ended(mode: Mode) {
    let db = Db::new().await;
    let Some(mut worker) = Worker::start(mode, &db, &[HOUR]).await else { return };
    const DEAF: &str = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)";
    let id = worker.run(&db, "15 seconds", DEAF).await;
    let timed_out = told(&db, id).await;
    worker.nothing_left("timeout");
    assert_eq!(timed_out, "timed_out|9|ran longer than its timeout of 15s");

    let id = worker.run(&db, "1 hour", DEAF).await;
    db.execute(&format!("SELECT cancel_build({id}, 'enough')")).await;
    let cancelled = told(&db, id).await;
    worker.nothing_left("cancel");
    assert_eq!(cancelled, "cancelled|9|cancelled: enough");
    worker.leave().await;
}

async fn loses_its_machinery(mode: Mode) {
    let db = Db::new().await;
    let Some(mut worker) = Worker::start(mode, &db, &SMALL).await else { return };
    for (victim, expected) in [
        ("br-guardian", "error|attempt 1 of 1 broke: its guardian was killed"),
        ("br-keeper", "error|9|attempt 1 of 1 broke: its keeper was killed"),
    ] {
        let id = worker.run(&db, "1 hour", "time.sleep(600)").await;
        worker.grown().await;
        kill(Pid::from_raw(worker.ours(victim)), Signal::SIGKILL).unwrap();
        let told = told(&db, id).await;
        worker.nothing_left(victim);
        assert_eq!(told, expected);
    }
    // A daemon that never comes back: its tree lives to the end of its lease, and some time to be killed.
    let id = worker.run(&db, "1 hour", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)").await;
    worker.grown().await;
    worker.daemon.kill();
    let killed = Instant::now();
    wait_for("the end of its tree", || async { anything_of(&worker.daemon.state).is_empty() }).await;
    let took = killed.elapsed();
    worker.nothing_left("daemon killed");
    // 3 s from the last ping, then 2 s from terminate to kill.
    assert!(took > Duration::from_secs(2), "{took:?}");
    worker.daemon.spawn_again();
    // With its signal, if there was time to see it.
    let told = told(&db, id).await;
    assert!(told.ends_with("|attempt 1 of 1 lost: its claim was not confirmed within the lease"), "{told}");
    worker.nothing_left("the next daemon");
    worker.leave().await;
}

macro_rules! in_each_mode {
    ($($what:ident: $namespace:ident $subreaper:ident $ordinary:ident;)*) => { $(
        #[tokio::test]
        async fn $namespace() {
            $what(Mode::Namespace).await;
        }

        #[tokio::test]
        async fn $subreaper() {
            $what(Mode::Subreaper).await;
        }

        #[tokio::test]
        async fn $ordinary() {
            $what(Mode::OrdinaryUser).await;
        }
    )* };
}

in_each_mode! {
    ends_by_itself: a_tree_that_ends_by_itself_in_a_namespace_leaves_nothing
        a_tree_that_ends_by_itself_under_a_subreaper_leaves_nothing
        a_tree_that_ends_by_itself_under_an_ordinary_user_leaves_nothing;
    is_ended: a_tree_that_is_ended_in_a_namespace_leaves_nothing
        a_tree_that_is_ended_under_a_subreaper_leaves_nothing
        a_tree_that_is_ended_under_an_ordinary_user_leaves_nothing;
    loses_its_machinery: a_tree_that_loses_guardian_keeper_or_daemon_in_a_namespace_leaves_nothing
        a_tree_that_loses_guardian_keeper_or_daemon_under_a_subreaper_leaves_nothing
        a_tree_that_loses_guardian_keeper_or_daemon_under_an_ordinary_user_leaves_nothing;
}

#[test]
fn an_order_to_start_that_was_under_way_for_longer_than_the_lease_starts_nothing() {
    let folder = temp_dir();
    let (mut orders, theirs) = UnixStream::pair().unwrap();
    let mut keeper = Command::new(PROGRAM)
        .arg("keeper")
        .arg(folder.path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    let mut answers = BufReader::new(orders.try_clone().unwrap()).lines();
    assert!(answers.next().unwrap().unwrap().contains("hello"));
    for (id, until_ms, expected) in [("1.1", 1, "lease_over"), ("2.1", u64::MAX / 2, "exited")] {
        let dir = folder.path().join(id);
        std::fs::create_dir(&dir).unwrap();
        let order = serde_json::json!({
            "say": "start", "id": id, "command": ["/bin/sh", "-c", "touch ran"], "workdir": dir, "env": [], "dir": dir,
            "timeout_ms": 60_000, "silence_ms": null, "kill_after_ms": 5000, "file_limit": 1000, "until_ms": until_ms, "namespace": false
        });
        writeln!(orders, "{order}").unwrap();
        let ended: serde_json::Value = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert_eq!(ended["status"]["end"], expected);
        assert_eq!(dir.join("ran").exists(), expected == "exited");
        // The first thing that a guardian makes; a script that is terminated at once may have done nothing yet.
        assert_eq!(dir.join("log").exists(), expected == "exited", "no guardian");
    }
    drop((orders, answers));
    assert!(keeper.wait().unwrap().success());
}

/// A copy of setpriv, in `folder`, with which anybody becomes root, as with sudo. None: there is no setpriv.
fn becomes_root(folder: &std::path::Path) -> Option<String> {
    let program = folder.join("becomes-root");
    std::fs::copy("/usr/bin/setpriv", &program).ok()?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
    Some(format!("{} --reuid 0 --regid 0 --clear-groups", program.display()))
}

#[tokio::test]
async fn what_the_worker_may_not_kill_is_given_up_and_counted() {
    may_not_kill(Mode::OrdinaryUser).await;
}

#[tokio::test]
async fn what_the_worker_may_neither_kill_nor_see_is_given_up_and_counted() {
    may_not_kill(Mode::Blind).await;
}

async fn may_not_kill(mode: Mode) {
    let db = Db::new().await;
    let folder = temp_dir();
    let Some(becomes_root) = becomes_root(folder.path()) else { return println!("NOT TESTED, there is no setpriv") };
    if !nix::unistd::geteuid().is_root() {
        return println!("NOT TESTED, we are not root");
    }
    let Some(mut worker) = Worker::start(mode, &db, &[HOUR]).await else { return };
    // Beside it one that may be killed, and has to be.
    let script = format!(
        "setsid sleep 600 &\n{becomes_root} setsid sleep 600 >/dev/null 2>&1 &\nwhile kill -0 $!; do sleep 0.05; done; exit 3"
    );
    db.builder("b", &script).await;
    let id = db.enqueue("b").await;
    assert_eq!(told(&db, id).await, "failed|3|exit code 3; a process of another user could not be killed");
    assert!(db.one::<bool>("SELECT finished_at - started_at > '9 s' FROM builds").await, "not without trying");
    let left = processes_of(&worker.daemon.state);
    let [left] = left[..] else { panic!("{left:?}") };
    kill(Pid::from_raw(left), Signal::SIGKILL).unwrap();
    wait_for("its end", || async { processes_of(&worker.daemon.state).is_empty() }).await;
    db.builder("next", "true").await;
    let next = db.enqueue("next").await;
    assert_eq!(told(&db, next).await, "passed|0");
    worker.leave().await;
}

async fn is_stuck(mode: Mode) {
    let db = Db::new().await;
    let Some(mut worker) = Worker::start(mode, &db, &[HOUR]).await else { return };
    let freezer = match Freezer::first_version() {
        Ok(freezer) => freezer,
        Err(why) => return println!("NOT TESTED, this machine has no freezer of the first version: {why}"),
    };
    db.builder("b", "sleep 600 & echo ready; wait").await;
    let id = db.enqueue("b").await;
    db.wait(&format!("SELECT build_log_text({id}) LIKE 'ready%'")).await;
    wait_for("its child", || async { processes_of(&worker.daemon.state).iter().any(|pid| name_of(*pid) == "sleep") })
        .await;
    let stuck = processes_of(&worker.daemon.state).into_iter().find(|pid| name_of(*pid) == "sleep").unwrap();
    freezer.take(stuck);
    let frozen = freezer.freeze().await;
    db.execute(&format!("SELECT cancel_build({id}, 'enough')")).await;
    wait_for("the others' end", || async { processes_of(&worker.daemon.state) == [stuck] }).await;
    // Twice as long as what another user's may cost.
    let since = Instant::now();
    wait_for("some time", || async { since.elapsed() > Duration::from_secs(20) }).await;
    assert_eq!(db.one::<String>("SELECT state::text FROM builds").await, "running", "it could come to life again");
    assert_eq!(processes_of(&worker.daemon.state), [stuck]);
    drop(frozen);
    let told = told(&db, id).await;
    worker.nothing_left("thawed");
    assert!(told.starts_with("cancelled|") && told.ends_with("|cancelled: enough"), "{told}");
    worker.leave().await;
}

#[tokio::test]
async fn a_tree_that_does_not_die_is_not_given_up_in_a_namespace() {
    is_stuck(Mode::Namespace).await;
}

#[tokio::test]
async fn a_tree_that_does_not_die_is_not_given_up_under_a_subreaper() {
    is_stuck(Mode::Subreaper).await;
}
