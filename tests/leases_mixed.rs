//! Workers whose `[lease]` differs: whoever takes a build over waits for the lease that the build lives by, not for its own.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::{Daemon, Db, TempDir, buildreactor, processes_of, temp_dir, text, wait_for, wait_for_within};

/// Waits for a long lease, and grace after it.
const LONG: Duration = Duration::from_secs(400);

/// Seconds; grace as short as it may be.
fn numbers(lease: u64) -> [(&'static str, String); 4] {
    [
        ("BUILDREACTOR_REACTOR_POLL", "1h".to_owned()),
        ("BUILDREACTOR_LEASE_PING", "500ms".to_owned()),
        ("BUILDREACTOR_LEASE_LEASE", format!("{lease}s")),
        ("BUILDREACTOR_LEASE_GRACE", format!("{}s", lease + 10)),
    ]
}

async fn worker(db: &Db, name: &str, lease: u64) -> Daemon {
    let numbers = numbers(lease);
    let env: Vec<(&str, &str)> = numbers.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Daemon::start(db, name, &env).await
}

/// Other numbers from the next start on.
fn change(daemon: &mut Daemon, lease: u64) {
    for (key, value) in numbers(lease) {
        daemon.set(key, &value);
    }
}

/// A build that says each 50 ms that it lives and where, will not be terminated, and ends when told to.
struct Beating {
    db: Db,
    folder: TempDir,
    id: i64,
}

impl Beating {
    async fn queued() -> Beating {
        let (db, folder) = (Db::new().await, temp_dir());
        let at = folder.path().display();
        let script = format!(
            "trap '' TERM\nwhile [ ! -e '{at}/gate' ]; do echo \"$BUILD_WORKER $BUILD_ATTEMPT\" >> '{at}/trace'; sleep 0.05; done"
        );
        db.builder("b", &script).await;
        let id = db.enqueue("b").await;
        Beating { db, folder, id }
    }

    fn trace(&self) -> PathBuf {
        self.folder.path().join("trace")
    }

    fn lines(&self) -> Vec<String> {
        std::fs::read_to_string(self.trace()).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    async fn beats_on(&self, worker: &str) {
        wait_for_within(LONG, "the build to run", || async {
            self.lines().iter().any(|line| line.starts_with(worker))
        })
        .await;
    }

    async fn lease(&self) -> f64 {
        self.db.one("SELECT extract(epoch FROM lease)::float8 FROM build_attempts WHERE attempt = 1").await
    }

    /// Waits for somebody else to run it, and sees to it that the first was dead by then.
    async fn goes_over_from(&self, first: &str, dead: &TempDir) {
        wait_for_within(LONG, "another to run it", || async {
            self.lines().iter().any(|line| !line.starts_with(first))
        })
        .await;
        assert_eq!(processes_of(dead), Vec::<i32>::new());
        std::fs::write(self.folder.path().join("gate"), "").unwrap();
        assert_eq!(self.db.finished(self.id).await, "passed");
        let lines = self.lines();
        let over = lines.iter().position(|line| !line.starts_with(first)).unwrap();
        assert!(lines[over..].iter().all(|line| line.ends_with(" 2")), "two runs at once");
        let attempts: Vec<String> =
            self.db.all("SELECT concat_ws(' ', attempt, state, detail) FROM build_attempts ORDER BY attempt").await;
        assert_eq!(attempts, [format!("1 lost worker `{first}` disappeared"), "2 passed".to_owned()]);
    }
}

#[tokio::test]
async fn builds_of_a_killed_worker_with_a_long_lease_are_dead_before_others_start_them() {
    let build = Beating::queued().await;
    let mut oak = worker(&build.db, "oak", 24).await;
    build.beats_on("oak").await;
    assert_eq!(build.lease().await, 24.0);
    let (anvil, birch) = tokio::join!(worker(&build.db, "anvil", 3), worker(&build.db, "birch", 6));
    let shown = "SELECT string_agg(concat_ws(' ', worker, lease, grace), ', ' ORDER BY worker) FROM worker_status";
    assert_eq!(
        build.db.one::<String>(shown).await,
        "anvil 00:00:03 00:00:13, birch 00:00:06 00:00:16, oak 00:00:24 00:00:34"
    );
    oak.kill();
    build.goes_over_from("oak", &oak.state).await;
    drop((anvil, birch));
}

#[tokio::test]
async fn a_worker_with_a_long_grace_takes_it_at_its_own_time_and_a_stopped_one_is_no_exception() {
    let build = Beating::queued().await;
    let anvil = worker(&build.db, "anvil", 3).await;
    build.beats_on("anvil").await;
    let oak = worker(&build.db, "oak", 12).await;
    // The server holds its claim for some time more.
    anvil.signal(Signal::SIGSTOP);
    build.goes_over_from("anvil", &anvil.state).await;
    anvil.signal(Signal::SIGCONT);
    wait_for("the stopped one's word on it", || async { anvil.has_said("no longer ours") }).await;
    drop(oak);
}

/// What the keeper was promised first holds, whatever the next daemon is set to.
#[tokio::test]
async fn a_restart_with_a_shorter_lease_does_not_shorten_what_was_promised() {
    let build = Beating::queued().await;
    let mut oak = worker(&build.db, "oak", 24).await;
    build.beats_on("oak").await;
    let anvil = worker(&build.db, "anvil", 3).await;
    oak.kill();
    change(&mut oak, 3);
    oak.spawn_again();
    oak.says("is held again").await;
    assert_eq!(build.lease().await, 24.0);
    assert_eq!(build.db.one::<String>("SELECT lease::text FROM workers WHERE name = 'oak'").await, "00:00:03");
    oak.kill();
    build.goes_over_from("oak", &oak.state).await;
    drop(anvil);
}

#[tokio::test]
async fn a_restart_with_a_longer_lease_is_written_down_before_the_keeper_is_told() {
    let build = Beating::queued().await;
    let mut oak = worker(&build.db, "oak", 3).await;
    build.beats_on("oak").await;
    let anvil = worker(&build.db, "anvil", 3).await;
    for lease in [9, 24, 6] {
        oak.kill();
        change(&mut oak, lease);
        oak.spawn_again();
        oak.says("is held again").await;
    }
    assert_eq!(build.lease().await, 24.0);
    oak.kill();
    build.goes_over_from("oak", &oak.state).await;
    drop(anvil);
}

/// As a program left it that wrote no lease.
#[tokio::test]
async fn an_attempt_of_an_older_program_is_adopted_with_its_default_or_left_alone_for_that() {
    let build = Beating::queued().await;
    let mut oak = worker(&build.db, "oak", 3).await;
    build.beats_on("oak").await;
    build.db.execute("UPDATE build_attempts SET lease = NULL").await;
    oak.kill();
    oak.spawn_again();
    oak.says("is held again").await;
    assert_eq!(build.lease().await, 40.0);
    // Never adopted: its worker was lost in the upgrade.
    build.db.execute("UPDATE build_attempts SET lease = NULL").await;
    oak.kill();
    let anvil = worker(&build.db, "anvil", 3).await;
    let began = std::time::Instant::now();
    build.goes_over_from("oak", &oak.state).await;
    assert!(began.elapsed() > Duration::from_secs(45), "{:?}", began.elapsed());
    drop(anvil);
}

/// What a daemon of an older program does when it was running while the tables were migrated.
#[tokio::test]
async fn a_daemon_of_an_older_program_ends_what_it_runs_and_begins_and_gives_up_nothing() {
    let build = Beating::queued().await;
    let oak = worker(&build.db, "oak", 24).await;
    build.beats_on("oak").await;
    let older = build.db.session().await;
    let refused = async |sql: &str| {
        let error = older.batch_execute(sql).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert!(error.hint().unwrap().contains("restart this worker"), "{error:?}");
        error.message().to_owned()
    };
    older.batch_execute("SET buildreactor.session = 'daemon'").await.unwrap();
    for slot in [1, 2] {
        let begins = format!(
            "INSERT INTO build_attempts (build_id, attempt, builder, worker, started_at, slot) VALUES ({}, 2, 'b', 'old', now(), {slot})",
            build.id
        );
        assert_eq!(refused(&begins).await, "worker \"old\" starts nothing more: its program is older than the tables");
    }
    for change in ["state = 'lost', finished_at = now()", "finished_at = now(), detail = 'x', state = 'lost'"] {
        let said = refused(&format!("UPDATE build_attempts SET {change}")).await;
        assert!(said.contains("does not know how long its processes live"), "{said}");
    }
    // Its own, from before.
    older.batch_execute("UPDATE build_attempts SET lease = NULL").await.unwrap();
    for state in ["passed', exit_code = '0", "lost", "error"] {
        let ends = format!("BEGIN; UPDATE build_attempts SET finished_at = now(), state = '{state}'; ROLLBACK");
        older.batch_execute(&ends).await.unwrap();
    }
    // And said where people look.
    build.db.execute("UPDATE workers SET lease = NULL, grace = NULL").await;
    build.db.enqueue("b").await;
    assert_eq!(
        build.db.one::<String>("SELECT waiting_because FROM queue_status").await,
        "worker oak is of a program older than the tables: install the one that migrated them, and restart it"
    );
    drop(oak);
}

/// The slots of builds that an older program holds: by other advisory locks than ours.
#[tokio::test]
async fn slots_that_an_older_program_uses_are_left_to_it_and_the_others_are_used() {
    let build = Beating::queued().await;
    build.db.execute("UPDATE builders SET max_running = 2").await;
    let oak = worker(&build.db, "oak", 24).await;
    build.beats_on("oak").await;
    // As that one has it: no lease, and nothing that shows its slot to be used.
    build.db.execute("UPDATE build_attempts SET lease = NULL").await;
    let anvil = worker(&build.db, "anvil", 3).await;
    build.db.execute("INSERT INTO builders (name, script) VALUES ('quick', 'true')").await;
    for _ in 0..3 {
        let second = build.db.enqueue("b").await;
        build.db.wait(&format!("SELECT state = 'running' FROM builds WHERE id = {second}")).await;
        assert_eq!(
            build.db.all::<i32>("SELECT a.slot FROM build_attempts a WHERE a.state = 'running' ORDER BY slot").await,
            [1, 2]
        );
        build.db.execute(&format!("SELECT cancel_build({second})")).await;
        assert_eq!(build.db.finished(second).await, "cancelled");
    }
    drop((oak, anvil));
}

#[tokio::test]
async fn numbers_that_the_database_refuses_keep_a_worker_from_starting_and_it_says_so() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    // Its own numbers are looked at before it connects.
    for (lease, grace) in [("20s", "29s"), ("1m", "1m"), ("150s", "159999ms")] {
        let folder = temp_dir();
        let state = folder.path().display().to_string();
        let env = [
            ("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()),
            ("BUILDREACTOR_LEASE_LEASE", lease),
            ("BUILDREACTOR_LEASE_GRACE", grace),
        ];
        let output = buildreactor(&["run", "--database", &db.url()], &env);
        assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("lease.grace"), "{}", text(&output.stderr));
    }
    // So does the database: of a program that counts on less than others do...
    for (lease, grace) in [("20 s", "29.9 s"), ("1 day", "1 day"), ("0", "1 min")] {
        let sql = format!(
            "INSERT INTO workers (name, host, pid, version, slots, labels, state, lease, grace) VALUES ('x', 'h', 1, '1', 1, '{{}}', 'active', '{lease}', '{grace}')"
        );
        let refusal = db.refusal(&sql).await;
        assert!(refusal.contains("grace_is_at_least_the_lease_and_10_seconds"), "{refusal}");
    }
    // ...and by a rule of the farm's own.
    db.execute("ALTER TABLE workers ADD CONSTRAINT leases_here_are_at_most_a_minute CHECK (lease <= '1 min')").await;
    let id = db.enqueue("b").await;
    let numbers = [("BUILDREACTOR_LEASE_LEASE", "150s"), ("BUILDREACTOR_LEASE_GRACE", "200s")];
    let mut daemon = Daemon::spawn(&db.url(), "w", &numbers);
    daemon.says("leases_here_are_at_most_a_minute").await;
    assert_eq!(daemon.exited().await, Some(78));
    assert_eq!(db.one::<String>(&format!("SELECT state::text FROM builds WHERE id = {id}")).await, "queued");
}

#[tokio::test]
async fn check_names_the_workers_whose_numbers_differ_and_what_follows() {
    let db = Db::new().await;
    let check = async |lease: &str, grace: &str| {
        let folder = temp_dir();
        let state = folder.path().display().to_string();
        let (url, lease, grace) = (db.url(), lease.to_owned(), grace.to_owned());
        let output = tokio::task::spawn_blocking(move || {
            let env = [
                ("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()),
                ("BUILDREACTOR_WORKER_NAME", "w"),
                ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0"),
                ("BUILDREACTOR_LEASE_LEASE", &lease),
                ("BUILDREACTOR_LEASE_GRACE", &grace),
            ];
            buildreactor(&["check", "--database", &url], &env)
        });
        let output = output.await.unwrap();
        let all = text(&output.stdout);
        all.lines().filter(|line| line.contains("leases:")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        check("40s", "60s").await,
        ["ok       leases: [lease] lease is 40 s, grace 60 s, and no other worker's differ"]
    );
    let oak = worker(&db, "oak", 150).await;
    assert_eq!(
        check("40s", "60s").await,
        [
            "note     leases: [lease] lease is 40 s, grace 60 s, and 150 s and 160 s at worker `oak`: if it disappears, its builds start here after 170 s, and this one's there after 160 s"
        ]
    );
    assert_eq!(
        check("151s", "170s").await,
        [
            "note     leases: [lease] lease is 151 s, grace 170 s, and 150 s and 160 s at worker `oak`: if it disappears, its builds start here after 170 s, and this one's there after 161 s"
        ]
    );
    assert!(check("150s", "160s").await[0].starts_with("ok "));
    // Of an older program.
    db.execute("UPDATE workers SET lease = NULL, grace = NULL").await;
    let said = check("150s", "160s").await;
    assert!(said[0].contains("worker `oak` is of a program older than the tables"), "{said:?}");
    assert_eq!(said.len(), 1);
    drop(oak);
}
