//! What builds do to the disk of their worker: they fill it, leave folders that are hard to remove, and put other things in the place of
//! those that are kept.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::geteuid;

use crate::support::ordinary::ordinary;
use crate::support::{Daemon, Db, TempDir, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const NO_FREE_DISK: (&str, &str) = ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0");

async fn log(db: &Db, id: i64) -> String {
    db.one(&format!("SELECT build_log_text({id})")).await
}

/// A build of `script` in a builder of its own.
async fn run(db: &Db, script: &str) -> i64 {
    let name = format!("b{}", crate::support::unique());
    db.builder(&name, script).await;
    let id = db.enqueue(&name).await;
    let state = db.finished(id).await;
    assert_eq!(state, "passed", "{script}: {}", log(db, id).await);
    id
}

/// An ordinary user's daemon; the folder has its program.
async fn ordinary_daemon(db: &Db) -> (Daemon, TempDir) {
    let (launch, program) = ordinary();
    let mut daemon = Daemon::launch(launch, &db.url(), "w", &[HOUR]);
    daemon.ready().await;
    (daemon, program)
}

/// A small file system of a test's own.
struct Disk(TempDir);

impl Disk {
    /// None: we may not mount.
    fn new(options: &str) -> Option<Disk> {
        let folder = temp_dir();
        let mounted = mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options));
        if let Err(error) = mounted {
            println!("NOT TESTED, tmpfs cannot be mounted here: {error}");
            return None;
        }
        Some(Disk(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_build_that_fills_the_disk_is_tidied_away_and_builds_go_on() {
    for (options, fill) in [
        ("size=6m", "dd if=/dev/zero of=fill bs=64k 2> /dev/null || echo full"),
        (
            "size=6m",
            "i=0; while mkdir -p a$i/b && head -c 300000 /dev/zero > a$i/b/f; do i=$((i+1)); done 2> /dev/null; echo full",
        ),
        ("size=64m,nr_inodes=300", "i=0; while touch f$i; do i=$((i+1)); done 2> /dev/null; echo full"),
        ("size=64m,nr_inodes=300", "while mkdir d && cd d; do :; done 2> /dev/null; echo full"),
    ] {
        let Some(disk) = Disk::new(options) else { return };
        let db = Db::new().await;
        let state = ("BUILDREACTOR_WORKER_STATE_DIR", disk.path().to_str().unwrap());
        let _daemon = Daemon::start(&db, "w", &[HOUR, NO_FREE_DISK, state]).await;
        for _ in 0..3 {
            let id = run(&db, fill).await;
            // Its own log may not have had room either.
            let attempt = disk.path().join(format!("w/attempts/{id}.1"));
            wait_for("the folder to be tidied", || async {
                !attempt.join("work").exists() && attempt.join("recorded.json").exists()
            })
            .await;
        }
        let id = run(&db, "head -c 500000 /dev/zero > x; echo fits").await;
        assert_eq!(log(&db, id).await, "fits\n", "{options}");
    }
}

#[tokio::test]
async fn while_a_disk_is_full_builds_wait_and_then_go_on_by_themselves() {
    for (options, files) in [("size=4m", 1), ("size=64m,nr_inodes=100", 200)] {
        let Some(disk) = Disk::new(options) else { return };
        let db = Db::new().await;
        let state = ("BUILDREACTOR_WORKER_STATE_DIR", disk.path().to_str().unwrap());
        let mut daemon = Daemon::start(&db, "w", &[HOUR, NO_FREE_DISK, state]).await;
        run(&db, "true").await;
        let foreign = disk.path().join("foreign");
        std::fs::create_dir(&foreign).unwrap();
        for n in 0..files {
            // Until it is full.
            let _full = std::fs::write(foreign.join(n.to_string()), vec![0; if files == 1 { 8 << 20 } else { 0 }]);
        }
        db.builder("waits", "echo at last").await;
        let id = db.enqueue("waits").await;
        db.wait("SELECT waiting_because ~ 'disk|[Nn]o space' FROM queue_status").await;
        // Nor does a full disk keep a worker from coming back.
        assert_eq!(daemon.stop().await, Some(0));
        daemon.spawn_again();
        daemon.ready().await;
        std::fs::remove_dir_all(&foreign).unwrap();
        assert_eq!(db.finished(id).await, "passed");
        let charged: i64 = db.one("SELECT count(*) FROM build_attempts WHERE state IN ('error', 'lost')").await;
        assert_eq!((charged, log(&db, id).await.as_str()), (0, "at last\n"));
    }
}

#[tokio::test]
async fn what_a_killed_daemon_left_untidy_is_tidied_by_the_next() {
    let db = Db::new().await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let (marked, unmarked) = (run(&db, "true").await, run(&db, "true").await);
    let attempts = daemon.state.path().join("w/attempts");
    let tidy = |id: i64| {
        let dir = attempts.join(format!("{id}.1"));
        dir.join("recorded.json").exists() && !dir.join("work").exists()
    };
    wait_for("both to be tidied", || async { tidy(marked) && tidy(unmarked) }).await;
    daemon.kill();
    for id in [marked, unmarked] {
        std::fs::create_dir_all(attempts.join(format!("{id}.1/work/large"))).unwrap();
    }
    std::fs::rename(
        attempts.join(format!("{unmarked}.1/recorded.json")),
        attempts.join(format!("{unmarked}.1/status.json")),
    )
    .unwrap();
    daemon.spawn_again();
    daemon.ready().await;
    wait_for("both to be tidied again", || async { tidy(marked) && tidy(unmarked) }).await;
}

/// Each leaves its working directory in another state.
const STUBBORN: &[&str] = &[
    "mkdir a && touch a/f && chmod 000 a",
    "mkdir -p a/b/c && touch a/b/c/f && chmod 500 a/b/c && chmod 400 a/b && chmod 100 a",
    "mkdir -p r/s; touch r/s/f r/f; chmod 000 r/s r .",
    "mkdir x && touch x/f && chmod 333 x; chmod 000 .. .",
    "perl -e 'for (1 .. 3000) { mkdir \"d\"; chdir \"d\" or die } open my $f, \">end\"; chmod 0, \".\"'",
    "mkdir -- -rf '*' 'a b' \"$(printf 'n\\nl')\" \"$(printf '\\377')\"; touch -- -rf/'?' '*'/f; chmod 0 -- ./-rf '*'",
    "mkfifo pipe; ln -s / root; ln -s no/such dangling; ln -s . self; mkdir d; ln -s ../.. d/up; chmod 000 d",
    "mkdir keep; touch keep/f; chmod 1555 keep; umask 777; mkdir closed; touch file",
];

#[tokio::test]
async fn whatever_a_build_of_an_ordinary_user_leaves_is_removed() {
    let db = Db::new().await;
    let (daemon, _program) = ordinary_daemon(&db).await;
    for script in STUBBORN {
        let id = run(&db, &format!("{script}; echo done")).await;
        assert_eq!(log(&db, id).await, "done\n", "{script}");
        let attempt = daemon.state.path().join(format!("w/attempts/{id}.1"));
        wait_for(script, || async { attempt.join("recorded.json").exists() && !attempt.join("work").exists() }).await;
    }
    // What was shut on the way is open for those that follow.
    for script in ["chmod 000 ../../../cache ../../../attempts", "chmod 000 ../../..", "cd ../../../..; chmod 000 w ."]
    {
        let id = run(&db, &format!("{script}; sleep 1; echo done")).await;
        assert!(log(&db, id).await.ends_with("done\n"), "{script}: its log is whole");
    }
    run(&db, "true").await;
    assert!(!daemon.has_said("cannot tidy"));
}

#[tokio::test]
async fn files_that_must_not_change_and_mounts_are_no_obstacle_for_root() {
    if !geteuid().is_root() {
        println!("NOT TESTED, we are not root");
        return;
    }
    let db = Db::new().await;
    let (kept, no_namespace) = (temp_dir(), ("BUILDREACTOR_WORKER_PID_NAMESPACE", "false"));
    std::fs::write(kept.path().join("precious"), "").unwrap();
    let daemon = Daemon::start(&db, "w", &[HOUR, no_namespace]).await;
    let kept_path = kept.path().display();
    for script in [
        "mkdir -p a/b; touch a/b/f a/g; chattr +i a/b/f || echo cannot; chattr +a a/b || :; chattr +i a . || :",
        &format!(
            "mkdir -p m/n; mount --bind {kept_path} m/n; mount --bind {kept_path} m/n; touch f; mount --bind {kept_path}/precious f"
        ),
        "mkdir t; mount -t tmpfs none t; mkdir t/inside",
    ] {
        let id = run(&db, script).await;
        let attempt = daemon.state.path().join(format!("w/attempts/{id}.1"));
        wait_for(script, || async { attempt.join("recorded.json").exists() && !attempt.join("work").exists() }).await;
    }
    assert!(kept.path().join("precious").exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(daemon.state.path().to_str().unwrap()), "{mounts}");
}

#[tokio::test]
async fn a_cache_or_kept_workspace_that_a_build_replaced_is_made_anew() {
    let db = Db::new().await;
    let (daemon, _program) = ordinary_daemon(&db).await;
    let elsewhere = temp_dir();
    std::fs::write(elsewhere.path().join("precious"), "").unwrap();
    std::fs::set_permissions(elsewhere.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let elsewhere_path = elsewhere.path().display();
    for (what, variable) in [("BUILD_CACHE", "$BUILD_CACHE"), ("its kept workspace", "$BUILD_DIR")] {
        for (spoil, told) in [
            ("rm -rf \"$F\"; echo > \"$F\"".to_owned(), "was a file; it was made anew"),
            (format!("rm -rf \"$F\"; ln -s {elsewhere_path} \"$F\""), "was a symbolic link; it was made anew"),
            ("rm -rf \"$F\"; ln -s /no/such \"$F\"".to_owned(), "was a symbolic link; it was made anew"),
            ("rm -rf \"$F\"; mkfifo \"$F\"".to_owned(), "was no folder; it was made anew"),
            ("chmod 000 \"$F\"".to_owned(), "; its owner can again"),
            ("chmod 444 \"$F\"".to_owned(), "; its owner can again"),
            ("cd \"$F\"/..; chmod 055 .".to_owned(), "; its owner can again"),
            ("rm -rf \"$F\"".to_owned(), ""),
        ] {
            // The parents of both are shared by builders, so it is asked of the one that follows at once.
            let name = format!("b{}", crate::support::unique());
            let script = format!(
                "F={variable}; if [ ! -e ../../../spoiled.{name} ] && [ $BUILD_ATTEMPT = 1 ] && [ \"$PROP_SPOIL\" = 1 ]; then {spoil}; else touch \"$BUILD_CACHE/c\" w; pwd; fi"
            );
            db.builder(&name, &script).await;
            db.execute(&format!("UPDATE builders SET keep_workspace = true WHERE name = '{name}'")).await;
            db.execute(&format!(
                "INSERT INTO build_queue (builder, properties) VALUES ('{name}', '{{\"spoil\": \"1\"}}')"
            ))
            .await;
            let first: i64 = db.one("SELECT max(id) FROM builds").await;
            assert_eq!(db.finished(first).await, "passed", "{spoil} {}", log(&db, first).await);
            let id = db.enqueue(&name).await;
            assert_eq!(db.finished(id).await, "passed", "{spoil}");
            let log = log(&db, id).await;
            let first_line = log.lines().next().unwrap();
            if told.is_empty() {
                assert!(first_line.starts_with('/'), "{what} {spoil}: {log}");
            } else if told.starts_with(';') && spoil.contains("/..") {
                assert!(
                    first_line.starts_with("[buildreactor: ") && first_line.contains(told),
                    "{what} {spoil}: {log}"
                );
            } else {
                assert!(
                    first_line.starts_with(&format!("[buildreactor: {what}")) && first_line.contains(told),
                    "{log}"
                );
            }
        }
    }
    assert!(elsewhere.path().join("precious").exists());
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1, "nobody wrote through the link");
    assert!(daemon.keeper().is_some());
}

#[tokio::test]
async fn a_build_that_has_shut_its_folder_is_found_by_the_next_daemon() {
    let db = Db::new().await;
    let (mut daemon, _program) = ordinary_daemon(&db).await;
    let gate = temp_dir();
    let path = gate.path().join("gate");
    for shut in [
        "chmod 000 ..",
        "cd ../..; chmod 000 .",
        "cd ../../..; chmod 000 .",
        "cd ../../..; chmod 000 cache attempts; chmod 000 .. .",
    ] {
        let _left = std::fs::remove_file(&path);
        let name = format!("b{}", crate::support::unique());
        db.builder(
            &name,
            &format!("echo begun; sleep 1; {shut}; until [ -e {} ]; do sleep 0.05; done; echo over", path.display()),
        )
        .await;
        let id = db.enqueue(&name).await;
        let attempt = daemon.state.path().join(format!("w/attempts/{id}.1"));
        wait_for("the folder to be shut", || async {
            let shut = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == 0);
            attempt.ancestors().take(4).any(shut)
        })
        .await;
        assert_eq!(daemon.stop().await, Some(0));
        daemon.spawn_again();
        daemon.ready().await;
        db.wait("SELECT claim_held FROM running_builds").await;
        std::fs::write(&path, "").unwrap();
        assert_eq!(db.finished(id).await, "passed", "{shut}");
        assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 1, "{shut}");
        assert_eq!(log(&db, id).await, "begun\nover\n", "{shut}");
    }
}
