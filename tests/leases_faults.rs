//! The lease chain when its own links break: keepers and guardians that are killed or stopped, folders from elsewhere, full disks,
//! answers that are lost, sessions of the dead. Whatever breaks, no build runs twice at once.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use buildreactor::embedded::Server;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use crate::support::beating::{Beating, Pair, SMALL, Stopped, attempts, signal, uptime};
use crate::support::proxy::{Break, Mood, Proxy, When};
use crate::support::{Daemon, Db, TempDir, processes_of, server_with_port, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const STATE_DIR: &str = "BUILDREACTOR_WORKER_STATE_DIR";

#[tokio::test]
async fn builds_of_a_killed_keeper_are_given_up_when_their_trees_are_gone_and_not_before() {
    let db = Db::new().await;
    let build = Beating::new();
    db.builder("b", &build.script()).await;
    db.builder("next", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    build.beats_in(1).await;
    // A guardian that has no time to kill its tree.
    let stopped = Stopped::these(daemon.guardians());
    signal(daemon.keeper().unwrap(), Signal::SIGKILL);
    // This one wants a new keeper, and gets none as long as the dead one's trees are there.
    let next = db.enqueue("next").await;
    db.wait(&format!("SELECT state = 'running' FROM builds WHERE id = {next}")).await;
    daemon.says("the keeper is gone, and its builds cannot be given up yet").await;
    build.beats_at(uptime()).await;
    assert_eq!(attempts(&db, id).await, ["1|w|running"]);
    assert_eq!(attempts(&db, next).await, ["1|w|running"]);
    drop(stopped);
    assert_eq!(db.finished(next).await, "passed");
    build.beats_in(2).await;
    build.one_at_a_time();
    build.open();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db, id).await, ["1|w|error|its keeper was killed", "2|w|failed|3|exit code 3"]);
    assert_eq!(attempts(&db, next).await, ["1|w|passed|0"]);
}

/// As after a crash of the machine, and as on another machine that has the folder (a copy, a network file system): what is not seen here
/// may be alive there.
#[tokio::test]
async fn what_a_folder_from_another_boot_or_machine_was_running_is_left_to_grace() {
    for copied_before_it_began in [false, true] {
        let db = Db::new().await;
        let build = Beating::new();
        db.builder("b", &build.script()).await;
        let mut there = Daemon::start(&db, "w", &SMALL).await;
        let id = db.enqueue("b").await;
        build.beats_in(1).await;
        there.kill();
        let copy = temp_dir();
        let copied = Command::new("cp").arg("-a").arg(there.state.path().join("w")).arg(copy.path()).status().unwrap();
        assert!(copied.success());
        let attempt = copy.path().join(format!("w/attempts/{id}.1"));
        if copied_before_it_began {
            std::fs::remove_dir_all(attempt).unwrap();
        } else {
            assert!(attempt.join("started").exists());
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert_eq!(db.one::<String>("SELECT boot FROM build_attempts").await, boot.trim());
        db.execute("UPDATE build_attempts SET boot = '6d0bd1f8-0000-4000-8000-000000000000'").await;

        let dir = copy.path().display().to_string();
        let _here = Daemon::start(&db, "w", &[SMALL.as_slice(), &[(STATE_DIR, dir.as_str())]].concat()).await;
        let started = Instant::now();
        build.beats_in(2).await;
        assert!(started.elapsed() > Duration::from_secs(9), "{:?} is not the grace", started.elapsed());
        build.one_at_a_time();
        assert_eq!(processes_of(&there.state), Vec::<i32>::new());
        build.open();
        assert_eq!(db.finished(id).await, "failed");
        assert_eq!(attempts(&db, id).await, ["1|w|lost|worker `w` disappeared", "2|w|failed|3|exit code 3"]);
    }
}

/// A small disk of one's own.
struct Disk(TempDir);

impl Disk {
    /// Or why there can be none.
    fn new(size: &str) -> Result<Disk, String> {
        let folder = temp_dir();
        let options = format!("size={size}");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|error| format!("mount tmpfs: {error}"))?;
        Ok(Disk(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("filler")).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_result_that_the_full_disk_has_no_room_for_is_kept_by_the_keeper_for_the_next_daemon() {
    let disk = match Disk::new("4m") {
        Ok(disk) => disk,
        Err(why) => return println!("NOT TESTED, we may not mount: {why}"),
    };
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &format!("while [ ! -e '{}' ]; do sleep 0.05; done; exit 3", gate.display())).await;
    let dir = disk.path().display().to_string();
    let settings = [HOUR, (STATE_DIR, dir.as_str()), ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0")];
    let mut daemon = Daemon::start(&db, "w", &settings).await;
    let id = db.enqueue("b").await;
    wait_for("its guardian", || async { !daemon.guardians().is_empty() }).await;
    db.wait("SELECT claim_held FROM running_builds").await;
    daemon.kill();
    disk.fill();
    std::fs::write(&gate, "").unwrap();
    wait_for("the end of its guardian", || async { daemon.guardians().is_empty() }).await;
    let keeper = daemon.keeper();
    assert!(!disk.path().join(format!("w/attempts/{id}.1/status.json")).exists(), "there was no room");
    daemon.spawn_again();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db, id).await, ["1|w|failed|3|exit code 3"]);
    assert_eq!(daemon.keeper(), keeper);
    assert!(daemon.has_said("found the keeper of an earlier daemon"));
    assert_eq!(daemon.stop().await, Some(0));
    wait_for("the keeper's end: it has told all", || async { daemon.keeper().is_none() }).await;
}

#[tokio::test]
async fn a_worker_that_comes_back_with_fewer_slots_holds_all_that_it_was_running_and_takes_no_more() {
    const BUILDS: i64 = 5;
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("b", &format!("while [ ! -e '{}' ]; do sleep 0.05; done; exit 3", gate.display())).await;
    db.builder("next", "true").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "5")]).await;
    db.execute(&format!("INSERT INTO build_queue (builder) SELECT 'b' FROM generate_series(1, {BUILDS})")).await;
    let all_held = format!("SELECT count(*) = {BUILDS} FROM running_builds WHERE claim_held");
    db.wait(&all_held).await;
    wait_for("all to run", || async { daemon.guardians().len() == 5 }).await;
    daemon.kill();
    let next = db.enqueue("next").await;
    daemon.set("BUILDREACTOR_WORKER_SLOTS", "1");
    daemon.spawn_again();
    daemon.ready().await;
    db.wait(&all_held).await;
    assert_eq!(db.one::<i32>("SELECT slots FROM workers").await, 1);
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {next}")).await, "queued");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(next).await, "passed");
    let others = "SELECT started_at FROM build_attempts WHERE builder = 'next'";
    let before = format!("SELECT count(*) FROM build_attempts WHERE builder = 'b' AND finished_at < ({others})");
    assert_eq!(db.one::<i64>(&before).await, BUILDS, "there was room for it when all of them had ended");
    assert_eq!(
        db.all::<String>(
            "SELECT DISTINCT concat_ws(' ', attempt, state, exit_code, claims) FROM build_attempts WHERE builder = 'b'"
        )
        .await,
        ["1 failed 3 2"]
    );
}

/// A worker that reaches its database through a proxy.
async fn behind_proxy() -> (Server, Db, Proxy, Daemon) {
    let server = server_with_port(&[]).await;
    let db = Db::on(&server).await;
    let proxy = Proxy::to_server(&server).await;
    let daemon = Daemon::start_at(&proxy.url(), "w", &[HOUR]).await;
    (server, db, proxy, daemon)
}

#[tokio::test]
async fn an_attempt_whose_beginning_is_in_doubt_is_given_back_uncharged_and_runs_once() {
    let (_server, db, proxy, mut daemon) = behind_proxy().await;
    let folder = temp_dir();
    for when in [When::BeforeTheServer, When::BeforeTheAnswer] {
        let trace = folder.path().join(format!("{when:?}"));
        let name = format!("{when:?}");
        db.builder(&name, &format!("echo $BUILD_ATTEMPT >> '{}'", trace.display())).await;
        db.execute("UPDATE builders SET max_attempts = 1").await;
        proxy.set(Mood { trap_begin: Some(when), ..Mood::default() });
        let id = db.enqueue(&name).await;
        // Again and again, until the proxy lets it pass.
        match when {
            When::BeforeTheServer => {
                daemon.says(&format!("cannot claim a build of {name}: cannot start an attempt")).await;
                assert_eq!(attempts(&db, id).await, Vec::<String>::new());
            }
            When::BeforeTheAnswer => daemon.says("given back: worker `w` has nothing of it").await,
        }
        proxy.set(Mood::default());
        assert_eq!(db.finished(id).await, "passed");
        let mut attempts = attempts(&db, id).await;
        let last = attempts.pop().unwrap();
        assert_eq!(last, format!("{}|w|passed|0", attempts.len() + 1));
        assert_eq!(attempts.is_empty(), when == When::BeforeTheServer, "{attempts:?}");
        for (n, attempt) in attempts.iter().enumerate() {
            let given_back = "cancelled|given back: worker `w` has nothing of it";
            assert_eq!(*attempt, format!("{}|w|{given_back}", n + 1));
        }
        assert_eq!(std::fs::read_to_string(&trace).unwrap(), format!("{}\n", attempts.len() + 1), "it ran once");
    }
    assert_eq!(daemon.stop().await, Some(0));
    drop(db);
}

#[tokio::test]
async fn a_daemon_that_is_to_leave_gives_back_what_began_without_an_answer() {
    for order in [Signal::SIGUSR1, Signal::SIGINT] {
        let (_server, db, proxy, mut daemon) = behind_proxy().await;
        db.builder("b", "true").await;
        proxy.set(Mood { stall_begin: true, ..Mood::default() });
        let id = db.enqueue("b").await;
        proxy.has_stalled().await;
        daemon.signal(order);
        daemon.says(if order == Signal::SIGINT { "stopping; " } else { "claiming nothing more; " }).await;
        proxy.cut(Break::Reset);
        proxy.set(Mood::default());
        assert_eq!(daemon.exited().await, Some(0));
        assert_eq!(attempts(&db, id).await, ["1|w|cancelled|given back: worker `w` has nothing of it"], "{order}");
        assert_eq!(db.one::<String>("SELECT state::text FROM builds").await, "queued");
        assert!(!daemon.has_said("cannot tidy"));
        drop(db);
    }
}

#[tokio::test]
async fn an_attempt_that_begins_long_after_its_connection_was_lost_is_found_and_given_back() {
    let (_server, db, proxy, mut daemon) = behind_proxy().await;
    db.builder("b", "true").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    proxy.set(Mood { late_begin: true, ..Mood::default() });
    let id = db.enqueue("b").await;
    daemon.says("cannot claim a build of b: cannot start an attempt").await;
    // The daemon, which tries again and again, cannot have the row; what it had sent before does not need it.
    let person = db.session().await;
    person.batch_execute("BEGIN; SELECT FROM build_queue FOR UPDATE").await.unwrap();
    assert_eq!(attempts(&db, id).await, Vec::<String>::new());
    proxy.set(Mood::default());
    db.wait("SELECT state = 'running' FROM builds").await;
    person.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(attempts(&db, id).await, ["1|w|cancelled|given back: worker `w` has nothing of it", "2|w|passed|0"]);
    assert!(daemon.has_said("build 1.1 of b is taken over: the database has it running here"));
    assert_eq!(daemon.stop().await, Some(0));
    drop((person, db));
}

#[tokio::test]
async fn a_dead_predecessors_session_is_waited_for_and_another_daemons_is_not() {
    let (_server, db, proxy, mut daemon) = behind_proxy().await;
    let dead = daemon.pid();
    // The server hears nothing of its end.
    proxy.set(Mood { stall_up: true, stall_down: true, ..Mood::default() });
    daemon.kill();
    daemon.connect_to(&db.url());
    daemon.spawn_again();
    daemon.says(&format!("worker name `w` is in use by process {dead} on ")).await;
    assert!(daemon.has_said("trying again until it works"));
    // To whom the folder does not belong does not wait.
    let mut other = Daemon::spawn(&db.url(), "w", &[HOUR]);
    other.says(&format!("worker name `w` is in use by process {dead} on ")).await;
    assert_eq!(other.exited().await, Some(75));
    assert!(!daemon.has_said("is ready"));
    proxy.set(Mood::default());
    daemon.ready().await;
    db.builder("b", "true").await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    drop((daemon, db));
}

#[tokio::test]
async fn a_worker_that_cannot_start_builds_says_so_and_leaves_them_to_others_for_half_a_minute() {
    let db = Db::new().await;
    let settings = [HOUR, ("BUILDREACTOR_WORKER_LABELS", "unable"), ("BUILDREACTOR_WORKER_SLOTS", "1")];
    let unable = Daemon::start(&db, "unable", &settings).await;
    let able = Daemon::start(&db, "able", &[HOUR]).await;
    db.builder("b", "true").await;
    db.builder("behind", "true").await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    db.execute("INSERT INTO builders (name, script, labels) VALUES ('own', 'true', '{unable}')").await;
    // The next keeper cannot make its socket: what is in its place cannot be moved away either.
    let socket = unable.state.path().join("unable/keeper.sock");
    unable.kill_keeper();
    wait_for("its keeper's end", || async { unable.keeper().is_none() }).await;
    std::fs::remove_file(&socket).unwrap();
    std::fs::create_dir(&socket).unwrap();
    if let Err(error) = mount(Some("tmpfs"), &socket, Some("tmpfs"), MsFlags::empty(), None::<&str>) {
        return println!("NOT TESTED, we may not mount: {error}");
    }
    let elsewhere = Stopped::these(vec![able.pid()]);
    db.execute("INSERT INTO build_queue (builder) VALUES ('b'), ('behind')").await;
    let (id, behind) = (1, 2);
    let why = "worker `unable` cannot start builds: the keeper ended; its reason is on the standard error of the daemon that started it";
    db.wait(&format!("SELECT unready ->> 'b' = $x${why}$x$ FROM worker_status WHERE worker = 'unable'")).await;
    let since = Instant::now();
    // It reports in after it was woken, and does not claim.
    for n in 0..3 {
        let seen: String = db.one("SELECT seen_at::text FROM workers WHERE name = 'unable'").await;
        db.execute(&format!("UPDATE builders SET description = '{n}'")).await;
        db.wait(&format!("SELECT seen_at > '{seen}' FROM workers WHERE name = 'unable'")).await;
    }
    let took = since.elapsed();
    if took < Duration::from_secs(25) {
        assert_eq!(attempts(&db, id).await, [format!("1|unable|cancelled|given back: {why}")]);
        assert_eq!(attempts(&db, behind).await, Vec::<String>::new(), "nor what waits behind it");
    }
    drop(elsewhere);
    for id in [id, behind] {
        assert_eq!(db.finished(id).await, "passed");
    }
    assert!(attempts(&db, id).await.last().unwrap().ends_with("|able|passed|0"));
    // It tries again by itself.
    umount2(&socket, MntFlags::MNT_DETACH).unwrap();
    let own = db.enqueue("own").await;
    assert_eq!(db.finished(own).await, "passed");
    assert!(since.elapsed() > Duration::from_secs(25), "{:?}", since.elapsed());
    db.wait("SELECT unready = '{}' FROM worker_status WHERE worker = 'unable'").await;
    drop((unable, able));
}

#[tokio::test]
async fn a_stopped_keeper_whose_daemon_is_killed_has_no_tree_left_when_another_worker_starts_the_build() {
    for namespace in ["true", "false"] {
        let db = Db::new().await;
        let mut pair = Pair::start(&db, namespace).await;
        // In this order: the kernel lets a stopped process go on when the parent dies that tied its group to a session (setpgid(2)).
        pair.first.kill();
        let stopped = Stopped::these(vec![pair.first.keeper().unwrap()]);
        pair.dies(&db, uptime()).await;
        // A supervisor starts the next one: it knows nothing of what the keeper holds, and does not begin beside it.
        pair.first.spawn_again();
        pair.first.says("processes of earlier builds do not die").await;
        assert_eq!(pair.first.exited().await, Some(75));
        pair.runs_again(&db).await;
        assert_eq!(
            attempts(&db, pair.id).await,
            ["1|first|lost|worker `first` disappeared", "2|second|failed|3|exit code 3"]
        );
        drop(stopped);
        wait_for("the keeper's end", || async { pair.first.keeper().is_none() }).await;
        pair.first.spawn_again();
        pair.first.ready().await;
        let own = db.enqueue("own").await;
        assert_eq!(db.finished(own).await, "passed");
        drop(pair);
    }
}

#[tokio::test]
async fn a_keeper_stopped_for_longer_than_the_lease_loses_its_builds_and_its_daemon_keeps_them_from_others() {
    let db = Db::new().await;
    let pair = Pair::start(&db, "true").await;
    let stopped = Stopped::these(vec![pair.first.keeper().unwrap()]);
    pair.dies(&db, uptime()).await;
    // Its daemon has the claim, and has heard nothing of an end. It would be lost to others only without it.
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds").await);
    drop(stopped);
    pair.runs_again(&db).await;
    let attempts = attempts(&db, pair.id).await;
    assert_eq!(attempts[0], "1|first|lost|its claim was not confirmed within the lease");
    assert!(attempts[1].ends_with("|failed|3|exit code 3"), "{attempts:?}");
    drop(pair);
}

#[tokio::test]
async fn a_keeper_stopped_for_less_than_the_lease_costs_no_build_and_passes_on_a_cancel_when_it_goes_on() {
    let db = Db::new().await;
    let (limited, build, cancelled) = (Beating::new(), Beating::new(), Beating::new());
    for (name, build) in [("limited", &limited), ("b", &build), ("cancelled", &cancelled)] {
        db.builder(name, &build.script()).await;
    }
    db.execute("UPDATE builders SET timeout = '10 seconds' WHERE name = 'limited'").await;
    // Long enough for a busy machine.
    let lease = [("BUILDREACTOR_LEASE_LEASE", "600s"), ("BUILDREACTOR_LEASE_GRACE", "700s")];
    let settings = [[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "3")], lease].concat();
    let daemon = Daemon::start(&db, "w", &settings).await;
    let (a, b, c) = (db.enqueue("limited").await, db.enqueue("b").await, db.enqueue("cancelled").await);
    for build in [&limited, &build, &cancelled] {
        build.beats_in(1).await;
    }
    let stopped = Stopped::these(vec![daemon.keeper().unwrap()]);
    db.execute(&format!("SELECT cancel_build({c}, 'enough')")).await;
    // Time limits are the guardian's own.
    let status = daemon.state.path().join(format!("w/attempts/{a}.1/status.json"));
    wait_for("the end of the one with a time limit", || async { status.exists() }).await;
    let now = uptime();
    build.beats_at(now).await;
    cancelled.beats_at(now).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM running_builds WHERE claim_held").await, 3, "no end is told");
    drop(stopped);
    assert_eq!(db.finished(a).await, "timed_out");
    assert_eq!(db.finished(c).await, "cancelled");
    build.beats_at(uptime()).await;
    build.open();
    assert_eq!(db.finished(b).await, "failed");
    assert_eq!(attempts(&db, b).await, ["1|w|failed|3|exit code 3"]);
}

#[tokio::test]
async fn a_stopped_guardian_is_killed_with_its_tree_when_the_lease_is_over() {
    for namespace in ["true", "false"] {
        let db = Db::new().await;
        let mut pair = Pair::start(&db, namespace).await;
        let stopped = Stopped::these(pair.first.guardians());
        // It goes on as long as its daemon confirms the claim, and no longer.
        pair.build.beats_at(uptime() + 8.0).await;
        pair.first.kill();
        pair.dies(&db, uptime()).await;
        pair.first.spawn_again();
        pair.runs_again(&db).await;
        // By itself; on a machine that is too busy for it, by the other.
        assert!(attempts(&db, pair.id).await[0].starts_with("1|first|lost|"));
        drop((stopped, pair));
    }
}

#[tokio::test]
async fn a_stopped_guardian_keeps_its_time_limit_when_it_goes_on() {
    let db = Db::new().await;
    let build = Beating::new();
    db.builder("b", &build.script()).await;
    db.execute("UPDATE builders SET timeout = '5 seconds'").await;
    let daemon = Daemon::start(&db, "w", &[HOUR]).await;
    let id = db.enqueue("b").await;
    build.beats_in(1).await;
    let stopped = Stopped::these(daemon.guardians());
    build.beats_at(uptime() + 8.0).await;
    assert_eq!(attempts(&db, id).await, ["1|w|running"]);
    drop(stopped);
    assert_eq!(db.finished(id).await, "timed_out");
    build.one_at_a_time();
    assert_eq!(attempts(&db, id).await, ["1|w|timed_out|ran longer than its timeout of 5s"]);
}

/// More of them than a socket had room for.
#[tokio::test]
async fn a_guardian_that_is_stopped_for_hundreds_of_renewals_goes_on_with_the_newest() {
    let db = Db::new().await;
    let build = Beating::new();
    db.builder("b", &build.script()).await;
    let often = ("BUILDREACTOR_LEASE_PING", "10ms");
    let lease = [("BUILDREACTOR_LEASE_LEASE", "3s"), ("BUILDREACTOR_LEASE_GRACE", "13s")];
    let daemon = Daemon::start(&db, "w", &[&[HOUR, often], &lease[..]].concat()).await;
    let id = db.enqueue("b").await;
    build.beats_in(1).await;
    let stopped = Stopped::these(daemon.guardians());
    build.beats_at(uptime() + 15.0).await;
    drop(stopped);
    // What it would do on an old end of its lease it would do at once.
    build.beats_at(uptime() + 4.0).await;
    build.open();
    assert_eq!(db.finished(id).await, "failed");
    build.one_at_a_time();
    assert_eq!(attempts(&db, id).await, ["1|w|failed|3|exit code 3"]);
}
