//! What a build inherits of the way in which its daemon was started.

use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::support::ordinary::ordinary;
use crate::support::{Daemon, Db, Launch};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// Becomes the command in its arguments with signals ignored and blocked: `ignore` and `block` are lists for Python. Where Python refuses
/// a signal, because the C library keeps it to itself, by the system call.
fn with_signals(ignore: &str, block: &str) -> Vec<String> {
    let code = format!(
        r"
import ctypes, os, platform, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
for number in {ignore}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        if platform.machine() == 'x86_64' and number not in (9, 19):
            assert libc.syscall(13, number, (ctypes.c_ulong * 4)(1, 0, 0, 0), None, 8) == 0
signal.pthread_sigmask(signal.SIG_BLOCK, set({block}) - {{32, 33}})
os.execv(sys.argv[1], sys.argv[1:])"
    );
    ["python3", "-c", &code].map(str::to_owned).to_vec()
}

/// A field of /proc/PID/status that is a set of signals.
fn signals(pid: i32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as u64 - 1)
}

async fn started_by(db: &Db, before: Vec<String>, settings: &[(&str, &str)]) -> Daemon {
    let launch = Launch { before, ..Launch::default() };
    let mut daemon = Daemon::launch(launch, &db.url(), "w", &[&[HOUR], settings].concat());
    daemon.ready().await;
    daemon
}

async fn log_of(db: &Db, script: &str) -> String {
    let name = format!("b{}", crate::support::unique());
    db.builder(&name, script).await;
    let id = db.enqueue(&name).await;
    assert_eq!(db.finished(id).await, "passed", "{}", db.one::<String>(&format!("SELECT build_log_text({id})")).await);
    db.one(&format!("SELECT build_log_text({id})")).await
}

#[tokio::test]
async fn every_signal_is_at_its_default_however_the_daemon_was_started() {
    for (ignore, block) in [
        ("[signal.SIGCHLD]", "[]"),
        ("[signal.SIGHUP, signal.SIGQUIT, signal.SIGTTOU]", "[signal.SIGTERM]"),
        ("[]", "[signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2, 40]"),
        ("range(1, 65)", "range(1, 65)"),
    ] {
        for namespace in ["true", "false"] {
            let db = Db::new().await;
            let namespace = ("BUILDREACTOR_WORKER_PID_NAMESPACE", namespace);
            let mut daemon = started_by(&db, with_signals(ignore, block), &[namespace]).await;
            let log = log_of(&db, "grep -E '^(SigPnd|ShdPnd|SigBlk|SigIgn)' /proc/self/status").await;
            let sets: Vec<&str> = log.lines().map(|line| line.split_whitespace().last().unwrap()).collect();
            assert_eq!(sets, ["0000000000000000"; 4], "{ignore} {block} {namespace:?}: {log}");
            for pid in [daemon.pid(), daemon.keeper().unwrap()] {
                // Rust's runtime ignores SIGPIPE, and the daemon wants errors instead.
                assert_eq!(signals(pid, "SigIgn"), bit(Signal::SIGPIPE), "{ignore} {block}");
            }
            for thread in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
                let thread = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
                assert_eq!(signals(thread, "SigBlk"), 0, "{ignore} {block}");
            }
            // A build that ends by a signal does.
            let id = {
                db.builder("hup", "kill -HUP $$; sleep 600").await;
                db.enqueue("hup").await
            };
            assert_eq!(db.finished(id).await, "failed");
            assert_eq!(
                db.one::<String>(&format!("SELECT detail FROM builds WHERE id = {id}")).await,
                "ended by SIGHUP",
                "{ignore} {block}"
            );
            assert_eq!(daemon.stop().await, Some(0), "{ignore} {block}");
        }
    }
}

#[tokio::test]
async fn a_daemon_under_nohup_outlives_its_terminal_and_others_do_not() {
    let db = Db::new().await;
    let mut daemon = started_by(&db, vec!["nohup".to_owned()], &[]).await;
    for signal in [Signal::SIGHUP, Signal::SIGHUP] {
        daemon.signal(signal);
        assert_eq!(log_of(&db, "echo goes on").await, "goes on\n");
    }
    assert_eq!(daemon.stop().await, Some(0));
    let mut daemon = started_by(&db, with_signals("[]", "[]"), &[]).await;
    daemon.signal(Signal::SIGHUP);
    assert_eq!(daemon.exited().await, None);
}

#[tokio::test]
async fn niceness_and_limits_are_handed_down_and_protection_from_the_oom_killer_is_not() {
    let db = Db::new().await;
    // Refused without CAP_SYS_RESOURCE, as in some containers; then there is no protection to hand down.
    let odd = "sh -c 'echo -700 > /proc/$PPID/oom_score_adj' 2> /dev/null || :; ulimit -n 777; ulimit -c 0; umask 027; exec nice -n 3 \"$@\"";
    let before = ["sh", "-c", odd, "sh"].map(str::to_owned).to_vec();
    let daemon = started_by(&db, before, &[]).await;
    let log = log_of(&db, "cat /proc/self/oom_score_adj; nice; ulimit -n; umask").await;
    let here = crate::support::text(&std::process::Command::new("nice").output().unwrap().stdout);
    let nice = (here.trim().parse::<i32>().unwrap() + 3).min(19);
    assert_eq!(log, format!("0\n{nice}\n777\n0027\n"));
    let score = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(score(daemon.pid()), score(daemon.keeper().unwrap()), "the keeper keeps it");
}

#[tokio::test]
async fn a_score_that_offers_builds_to_the_oom_killer_is_handed_down() {
    let db = Db::new().await;
    let before = ["sh", "-c", "echo 300 > /proc/self/oom_score_adj; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let _daemon = started_by(&db, before, &[]).await;
    assert_eq!(log_of(&db, "cat /proc/self/oom_score_adj").await, "300\n");
}

#[tokio::test]
async fn capabilities_of_the_daemon_are_not_handed_down() {
    if !geteuid().is_root() {
        println!("NOT TESTED, we are not root");
        return;
    }
    let db = Db::new().await;
    let (mut launch, _program) = ordinary();
    let (user, group) = launch.user.take().unwrap();
    let odd = format!(
        "chown {user}:{group} \"$BUILDREACTOR_WORKER_STATE_DIR\"; exec setpriv --reuid {user} --regid {group} --clear-groups \\
         --inh-caps +net_raw,+sys_nice --ambient-caps +net_raw,+sys_nice \"$@\""
    );
    launch.before = ["sh", "-c", &odd, "sh"].map(str::to_owned).to_vec();
    let mut daemon = Daemon::launch(launch, &db.url(), "w", &[HOUR]);
    daemon.ready().await;
    assert_ne!(signals(daemon.pid(), "CapEff"), 0, "the daemon has them");
    let log = log_of(&db, "grep -E '^Cap(Eff|Prm|Amb)' /proc/self/status").await;
    assert!(log.lines().all(|line| line.ends_with("\t0000000000000000")) && log.lines().count() == 3, "{log}");
}
