//! The process executor: what a script gets, how its end is told, and that nothing of it is left.

use nix::sys::signal::Signal;

use crate::support::{Daemon, Db, processes_of, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// Runs one build of `script` and says its state and detail.
async fn run(db: &Db, script: &str) -> (i64, String) {
    let name = format!("b{}", crate::support::unique());
    db.builder(&name, script).await;
    let id = db.enqueue(&name).await;
    db.finished(id).await;
    let told = db
        .one(&format!("SELECT concat_ws('|', state, exit_code, term_signal, detail) FROM builds WHERE id = {id}"))
        .await;
    (id, told)
}

async fn log(db: &Db, id: i64) -> String {
    db.one(&format!("SELECT build_log_text({id})")).await
}

#[tokio::test]
async fn exit_codes_and_signals_are_told() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    for (script, expected) in [
        ("true", "passed|0"),
        ("echo no >&2; exit 3", "failed|3|exit code 3"),
        ("false; echo not reached", "failed|1|exit code 1"),
        ("kill -SEGV $$", "failed|11|ended by SIGSEGV"),
        ("#!/bin/sh\nfalse; echo reached", "passed|0"),
        ("#!/usr/bin/env python3\nimport sys; sys.exit(42)", "failed|42|exit code 42"),
    ] {
        assert_eq!(run(&db, script).await.1, expected, "{script}");
    }
}

#[tokio::test]
async fn a_script_sees_its_build_and_nothing_of_the_daemons_secrets() {
    let db = Db::new().await;
    db.execute("ALTER TABLE builds ADD COLUMN branch text DEFAULT 'main'").await;
    db.builder(
        "b",
        "pwd; [ \"$(pwd)\" = \"$BUILD_DIR\" ]; wc -c < /dev/stdin; ls -A; touch \"$BUILD_CACHE/seen\"; cat \"$BUILD_FILE\"; echo; env",
    )
    .await;
    db.execute("UPDATE builders SET env = '{\"CI\": \"yes\", \"PATH\": \"/opt/tool:/usr/bin:/bin\"}'").await;
    let secret = ("PGPASSWORD", "secret-of-the-daemon");
    let _daemon = Daemon::start(&db, "w", &[HOUR, secret]).await;
    db.execute(
        r#"INSERT INTO build_queue (builder, properties, reason) VALUES
           ('b', '{"git-rev": "abc", "n": 7, "list": [1, 2], "none": null, "LD_PRELOAD": "x", "multi": "a\nb"}', 'because')"#,
    )
    .await;
    assert_eq!(db.finished(1).await, "passed");
    let log = log(&db, 1).await;
    for line in [
        "0",
        "BUILD_ID=1",
        "BUILD_BUILDER=b",
        "BUILD_ATTEMPT=1",
        "BUILD_WORKER=w",
        "CI=yes",
        "PATH=/opt/tool:/usr/bin:/bin",
        "PROP_GIT_REV=abc",
        "PROP_N=7",
        "PROP_LIST=[1, 2]",
        "PROP_NONE=",
        "PROP_LD_PRELOAD=x",
        "PROP_MULTI=a",
        "b",
    ] {
        assert!(log.lines().any(|l| l == line), "{line} in {log}");
    }
    assert!(
        !log.contains("secret-of-the-daemon") && !log.contains("\nLD_PRELOAD") && !log.contains("BUILDREACTOR"),
        "{log}"
    );
    let file = log.lines().find(|line| line.starts_with('{')).expect("BUILD_FILE");
    let row: serde_json::Value = serde_json::from_str(file).unwrap();
    assert_eq!(
        (&row["branch"], &row["properties"]["git-rev"], &row["reason"], &row["state"], &row["attempt"]),
        (&"main".into(), &"abc".into(), &"because".into(), &"running".into(), &1.into())
    );
}

#[tokio::test]
async fn timeouts_terminate_then_kill_and_say_which() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "4")]).await;
    db.builder("whole", "while :; do echo tick; sleep 0.2; done").await;
    db.builder("stubborn", "trap '' TERM; while :; do echo tick; sleep 0.2; done").await;
    db.builder("silent", "echo going quiet; sleep 600").await;
    db.builder("polite", "trap 'echo cleaning up; exit 0' TERM; while :; do echo tick; sleep 0.2; done").await;
    db.execute("UPDATE builders SET timeout = '5 seconds' WHERE name <> 'silent'").await;
    db.execute("UPDATE builders SET silence_timeout = '1 second' WHERE name = 'silent'").await;
    db.execute("INSERT INTO build_queue (builder) VALUES ('whole'), ('stubborn'), ('silent'), ('polite')").await;
    for id in 1..=4 {
        assert_eq!(db.finished(id).await, "timed_out");
    }
    let told: Vec<String> =
        db.all("SELECT concat_ws('|', builder, exit_code, term_signal, detail) FROM builds ORDER BY id").await;
    assert_eq!(
        told,
        [
            "whole|15|ran longer than its timeout of 5s",
            "stubborn|9|ran longer than its timeout of 5s",
            "silent|15|no output for 1s",
            "polite|0|ran longer than its timeout of 5s"
        ]
    );
    assert!(log(&db, 4).await.contains("cleaning up"));
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
}

#[tokio::test]
async fn what_an_attempt_used_is_recorded() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let (id, told) = run(
        &db,
        "#!/usr/bin/env python3\nimport time\nx = bytearray(80 << 20)\nt = time.process_time()\nwhile time.process_time() < t + 0.5: sum(range(20000))\nprint('x' * 99)",
    )
    .await;
    assert_eq!(told, "passed|0");
    let usage: String = db
        .one(&format!(
            "SELECT concat_ws(' ', user_seconds + system_seconds BETWEEN 0.5 AND 10, user_seconds > 0.05, max_rss_bytes BETWEEN 80 << 20 AND 300 << 20, log_bytes) FROM build_attempts WHERE build_id = {id}"
        ))
        .await;
    assert_eq!(usage, "t t t 100");
}

/// Whoever starts the daemon may have left anything open.
#[tokio::test]
async fn a_build_inherits_none_of_the_files_that_the_daemon_was_started_with() {
    let db = Db::new().await;
    let before = ["sh", "-c", "exec 9> /dev/null; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let launch = crate::support::Launch { before, ..Default::default() };
    let mut daemon = Daemon::launch(launch, &db.url(), "w", &[HOUR]);
    daemon.ready().await;
    assert!(std::path::Path::new(&format!("/proc/{}/fd/9", daemon.pid())).exists());
    let (_, told) = run(&db, "[ -e /proc/$$/fd/2 ] && [ ! -e /proc/$$/fd/9 ]").await;
    assert_eq!(told, "passed|0");
}

#[tokio::test]
async fn a_real_time_signal_is_told_and_leaves_nothing() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let (_, told) = run(&db, "sleep 600 & setsid sleep 600 & sleep 0.3; kill -40 $$").await;
    assert_eq!(told, "failed|40|ended by signal 40");
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
}

#[tokio::test]
async fn a_result_needs_no_room_on_the_workers_disk() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    // Where the guardian would write its status there is a folder that cannot be replaced.
    let (_, told) = run(&db, "mkdir -p \"$BUILD_DIR/../status.json/x\"; exit 3").await;
    assert_eq!(told, "failed|3|exit code 3");
}

#[tokio::test]
async fn properties_that_other_readers_of_json_refuse_are_no_trouble() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "echo ${#PROP_N} ${#PROP_DEEP}").await;
    db.execute("INSERT INTO build_queue (builder, properties) VALUES ('b', jsonb_build_object('n', 1e400, 'deep', (repeat('[', 300) || repeat(']', 300))::jsonb))").await;
    assert_eq!(db.finished(1).await, "passed");
    assert_eq!(log(&db, 1).await, "401 600\n");
}

#[tokio::test]
async fn builds_beside_one_whose_guardian_is_killed_lose_no_process() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    // Always forking. A child that is killed by somebody is a failure.
    let busy = format!("while [ ! -e {} ]; do /bin/true || exit 9; done", gate.display());
    db.builder("busy", &busy).await;
    db.builder("victim", "sleep 600").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let bystander = db.enqueue("busy").await;
    wait_for("the bystander's guardian", || async { daemon.guardians().len() == 1 }).await;
    let spared = daemon.guardians();
    for _ in 0..20 {
        let id = db.enqueue("victim").await;
        wait_for("its guardian", || async { daemon.guardians().len() == 2 }).await;
        for pid in daemon.guardians().into_iter().filter(|pid| !spared.contains(pid)) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        assert_eq!(db.finished(id).await, "error");
    }
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(bystander).await, "passed");
}

#[tokio::test]
async fn what_the_machinery_breaks_is_tried_again_and_not_called_a_failure() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let (id, told) = run(&db, "if [ $BUILD_ATTEMPT -lt 3 ]; then exit 75; fi; echo third").await;
    assert_eq!(told, "passed|0|passed in try 3");
    let attempts: Vec<String> = db
        .all(&format!("SELECT concat_ws(' ', attempt, state, exit_code, detail) FROM build_attempts WHERE build_id = {id} ORDER BY attempt"))
        .await;
    assert_eq!(attempts[0], "1 error 75 exit code 75: the script asks to be tried again");
    assert_eq!(attempts[2], "3 passed 0");
    // Backoff: 1 s, then 2 s.
    let waits: Vec<bool> = db
        .all(&format!("SELECT a.started_at - b.finished_at BETWEEN make_interval(secs => b.attempt) AND '60 s' FROM build_attempts a JOIN build_attempts b ON b.build_id = a.build_id AND b.attempt = a.attempt - 1 WHERE a.build_id = {id}"))
        .await;
    assert_eq!(waits, [true, true]);

    let (_, told) = run(&db, "#!/no/such/interpreter -e\n").await;
    assert_eq!(
        told,
        "error|attempt 3 of 3 broke: cannot start the script: its first line names `/no/such/interpreter`, which is not on this machine"
    );
    let (_, told) = run(&db, "#!/bin/sh\r\ntrue\r\n").await;
    assert!(
        told.ends_with(": cannot start the script: it has line ends of Windows; take the CR at their ends away"),
        "{told}"
    );

    db.builder("flaky", "[ $BUILD_ATTEMPT -ge 2 ]").await;
    db.execute("UPDATE builders SET retry_failed = 2 WHERE name = 'flaky'").await;
    let id = db.enqueue("flaky").await;
    assert_eq!(db.finished(id).await, "passed");
    db.builder("broken", "exit 4").await;
    db.execute("UPDATE builders SET retry_failed = 1 WHERE name = 'broken'").await;
    let id = db.enqueue("broken").await;
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(
        db.one::<String>(&format!("SELECT detail FROM builds WHERE id = {id}")).await,
        "try 2 of 2: exit code 4"
    );
    // Queued again it has its tries anew.
    db.execute(&format!("INSERT INTO build_queue (build_id) VALUES ({id})")).await;
    db.wait(&format!("SELECT attempt = 4 AND state = 'failed' FROM builds WHERE id = {id}")).await;
}

#[tokio::test]
async fn a_kept_workspace_is_there_for_the_next_build_and_others_are_removed() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("keep", "ls; touch made-by-$BUILD_ID").await;
    db.builder("fresh", "ls; touch made-by-$BUILD_ID; chmod 500 .").await;
    db.execute("UPDATE builders SET keep_workspace = true WHERE name = 'keep'").await;
    for _ in 0..2 {
        for name in ["keep", "fresh"] {
            let id = db.enqueue(name).await;
            assert_eq!(db.finished(id).await, "passed");
        }
    }
    assert_eq!(log(&db, 3).await, "made-by-1\n");
    assert_eq!(log(&db, 4).await, "");
    let attempts = daemon.state.path().join("w/attempts");
    wait_for("the workspace to be removed", || async { !attempts.join("4.1/work").exists() }).await;
    assert!(attempts.join("4.1/log").exists(), "the log stays");
}

#[tokio::test]
async fn a_build_that_takes_its_worker_down_is_counted_and_stops() {
    let db = Db::new().await;
    // The keeper is the parent of the guardian, which is the parent of the script.
    db.builder(
        "poison",
        "while [ ! -e ../../../go$BUILD_ATTEMPT ]; do sleep 0.05; done; k=$(cut -d' ' -f4 /proc/$PPID/stat); d=$(cat ../../../daemon.lock); echo killing $d $k; kill -9 $d $k; sleep 600",
    )
    .await;
    db.builder("good", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_PID_NAMESPACE", "false")]).await;
    let poison = db.enqueue("poison").await;
    for attempt in 1..=3 {
        // Not while the good one of before is under way.
        std::fs::write(daemon.state.path().join(format!("w/go{attempt}")), "").unwrap();
        // A supervisor starts the daemon again and again.
        wait_for("the daemon to die", || async {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.pid()), None).is_err() || is_zombie(daemon.pid())
        })
        .await;
        assert_eq!(daemon.exited().await, None);
        assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {poison}")).await, attempt);
        daemon.spawn_again();
        daemon.ready().await;
        let good = db.enqueue("good").await;
        assert_eq!(db.finished(good).await, "passed", "others go on meanwhile");
    }
    assert_eq!(db.finished(poison).await, "error");
    assert_eq!(
        db.one::<String>(&format!("SELECT concat_ws('|', attempt, detail) FROM builds WHERE id = {poison}")).await,
        "3|attempt 3 of 3 broke: its keeper was killed"
    );
    assert_eq!(processes_of(&daemon.state), Vec::<i32>::new());
}

#[tokio::test]
async fn a_build_in_a_namespace_sees_no_process_but_its_own() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let detail: String = db.one("SELECT detail FROM workers").await;
    if !nix::unistd::geteuid().is_root() {
        assert!(detail.starts_with("process trees: subreaper ("), "{detail}");
        return;
    }
    assert_eq!(detail, "process trees: PID namespace");
    let (id, told) = run(&db, &format!("kill -9 {} || echo cannot; ls -d /proc/[0-9]* | wc -l", daemon.pid())).await;
    assert_eq!(told, "passed|0");
    let log = log(&db, id).await;
    // init, the shell, ls, wc.
    assert!(log.contains("cannot") && log.lines().last().unwrap().parse::<u32>().unwrap() <= 5, "{log}");
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[tokio::test]
async fn large_properties_do_not_keep_a_script_from_starting() {
    let db = Db::new().await;
    let _daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "echo ${PROP_BIG-unset} ${PROP_SMALL}; grep -c xxxxx \"$BUILD_FILE\"").await;
    db.execute("INSERT INTO build_queue (builder, properties) VALUES ('b', jsonb_build_object('big', repeat('x', 900000), 'small', 'y'))").await;
    assert_eq!(db.finished(1).await, "passed");
    assert_eq!(
        log(&db, 1).await,
        "[buildreactor: too large for the environment, and in BUILD_FILE alone: `big` (900000 bytes)]\nunset y\n1\n"
    );
    assert!(db.refusal("INSERT INTO build_queue (builder, properties) VALUES ('b', jsonb_build_object('big', repeat('x', 2000000)))").await.contains("properties_are_at_most_1_mib"));
}

#[tokio::test]
async fn a_worker_without_room_for_its_files_says_so_and_the_build_is_tried_again() {
    let db = Db::new().await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET max_attempts = 6").await;
    // A file where the folder of attempts should be.
    let attempts = daemon.state.path().join("w/attempts");
    std::fs::remove_dir_all(&attempts).unwrap();
    std::fs::write(&attempts, "").unwrap();
    let id = db.enqueue("b").await;
    db.wait(&format!(
        "SELECT detail LIKE 'attempt 1 of 6 broke: cannot prepare the build: make `%' FROM builds WHERE id = {id}"
    ))
    .await;
    std::fs::remove_file(&attempts).unwrap();
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn the_daemon_holds_no_more_than_its_slots() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    for n in 0..6 {
        db.builder(&format!("b{n}"), &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await;
        db.enqueue(&format!("b{n}")).await;
    }
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3")]).await;
    db.wait("SELECT count(*) = 3 FROM running_builds WHERE claim_held").await;
    // Each change of a builder has it look at everything, report in, and then claim what it can.
    for n in 0..3 {
        let seen: String = db.one("SELECT seen_at::text FROM workers").await;
        db.execute(&format!("UPDATE builders SET description = '{n}'")).await;
        db.wait(&format!("SELECT seen_at > '{seen}' FROM workers")).await;
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM running_builds").await, 3);
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM queue_status WHERE waiting_because = 'all fitting workers are busy'").await,
        3
    );
    std::fs::write(&gate, "").unwrap();
    db.wait("SELECT count(*) = 6 FROM builds WHERE state = 'passed'").await;
}
