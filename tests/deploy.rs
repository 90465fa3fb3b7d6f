//! What stands in `deploy/`, used as an operator would: a real supervisord, systemd's own checker, psql. And the demo.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, Db, PROGRAM, SOON, TempDir, buildreactor, processes_of, temp_dir, text, wait_for};

fn deploy(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy")).join(name)
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// The text of a file of ours, for another place than the one it is written for.
fn elsewhere(name: &str, replace: &[(&str, &str)]) -> String {
    let mut text = std::fs::read_to_string(deploy(name)).unwrap();
    for (from, to) in replace {
        assert!(text.contains(from), "{name} does not say `{from}`");
        text = text.replace(from, to);
    }
    text
}

#[tokio::test]
async fn the_systemd_unit_is_valid_and_its_command_line_is_understood() {
    let unit = std::fs::read_to_string(deploy("buildreactor.service")).unwrap();
    let settings: Vec<(&str, &str)> = unit
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with('['))
        .map(|line| line.split_once('=').unwrap_or_else(|| panic!("`{line}` is no setting")))
        .collect();
    let value = |key: &str| settings.iter().find(|(name, _)| *name == key).unwrap_or_else(|| panic!("no {key}")).1;
    for (key, expected) in
        [("Type", "notify"), ("KillMode", "process"), ("Restart", "always"), ("RestartPreventExitStatus", "78")]
    {
        assert_eq!(value(key), expected, "{key}");
    }
    assert!(value("TimeoutStopSec").parse::<u32>().unwrap() > 5, "the daemon gives itself 2 s");
    let (program, arguments) = value("ExecStart").split_once(' ').unwrap();
    let arguments: Vec<&str> = arguments.split(' ').chain(["--help"]).collect();
    let output = buildreactor(&arguments, &[]);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    assert!(!buildreactor(&["run", "--no-such-option", "--help"], &[]).status.success(), "which says nothing");

    if installed("systemd-analyze") {
        let folder = temp_dir();
        let file = folder.path().join("buildreactor.service");
        std::fs::write(&file, elsewhere("buildreactor.service", &[(program, PROGRAM)])).unwrap();
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().unwrap();
        // It looks at other units of the machine as well; what it says of ours names the file.
        let complaints = text(&output.stderr);
        let complaints: Vec<&str> = complaints.lines().filter(|line| line.contains("buildreactor")).collect();
        assert!(output.status.success() && complaints.is_empty(), "{complaints:#?}");
    }
}

#[tokio::test]
async fn systemd_is_told_once_the_worker_is_ready() {
    let (db, folder) = (Db::new().await, temp_dir());
    let path = folder.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let mut daemon = Daemon::spawn(&db.url(), "notifier", &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let mut message = [0; 256];
    let length = tokio::time::timeout(SOON, socket.recv(&mut message)).await.expect("a message in time").unwrap();
    assert!(text(&message[..length]).lines().any(|line| line == "READY=1"), "{}", text(&message[..length]));
    assert_eq!(db.one::<i64>("SELECT count(*) FROM worker_status WHERE status = 'active'").await, 1);
    assert_eq!(daemon.stop().await, Some(0));
}

/// A supervisord of our own, with the section that we ship.
struct Supervisor {
    child: Child,
    folder: TempDir,
}

impl Supervisor {
    async fn start(db: &Db, worker: &str) -> Supervisor {
        assert!(installed("supervisord"), "supervisord is not installed: `make setup` does that");
        let folder = temp_dir();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let config = format!(
            "[database]\nurl = \"{}\"\n[worker]\nname = \"{worker}\"\nstate_dir = \"{}\"\n",
            db.url(),
            at("state")
        );
        std::fs::write(at("buildreactor.toml"), config).unwrap();
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name;
        let section = elsewhere(
            "buildreactor.supervisor.conf",
            &[
                ("/usr/local/bin/buildreactor", PROGRAM),
                ("/etc/buildreactor/buildreactor.toml", &at("buildreactor.toml")),
                ("user=buildreactor", &format!("user={user}")),
                ("/var/lib/buildreactor", &folder.path().display().to_string()),
                ("/var/log/supervisor/buildreactor.log", &at("buildreactor.log")),
            ],
        );
        let frame = format!(
            "[supervisord]\nnodaemon=true\nlogfile={}\npidfile={}\n[unix_http_server]\nfile={socket}\n\
             [rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\
             [supervisorctl]\nserverurl=unix://{socket}\n",
            at("supervisord.log"),
            at("supervisord.pid"),
            socket = at("sock"),
        );
        std::fs::write(at("supervisord.conf"), format!("{frame}\n{section}")).unwrap();
        let child = Command::new("supervisord")
            .arg("--configuration")
            .arg(at("supervisord.conf"))
            .env_remove("DATABASE_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let supervisor = Supervisor { child, folder };
        wait_for("supervisord to start the program", async || supervisor.status().contains("RUNNING")).await;
        supervisor
    }

    fn control(&self, arguments: &[&str]) -> Output {
        let config = self.folder.path().join("supervisord.conf");
        Command::new("supervisorctl").arg("--configuration").arg(config).args(arguments).output().unwrap()
    }

    fn status(&self) -> String {
        text(&self.control(&["status"]).stdout)
    }

    fn pid(&self) -> i32 {
        text(&self.control(&["pid", "buildreactor"]).stdout).trim().parse().unwrap()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["supervisord.log", "buildreactor.log"] {
                let log = std::fs::read_to_string(self.folder.path().join(name));
                eprintln!("{name}: {}", log.unwrap_or_default());
            }
        }
        // It stops its program before it ends; killed, it would leave that behind.
        let _told = kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Signal::SIGTERM);
        let deadline = Instant::now() + SOON;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The worker is up, as another process than `before`.
async fn active_again(db: &Db, before: i32) {
    db.wait(&format!("SELECT EXISTS (SELECT FROM worker_status WHERE status = 'active' AND pid <> {before})")).await;
}

#[tokio::test]
async fn under_supervisord_the_worker_starts_restarts_survives_a_kill_drains_and_keeps_builds_running() {
    let db = Db::new().await;
    let folder = temp_dir();
    let gate = folder.path().join("gate");
    db.builder("hello", "echo hello").await;
    db.builder("long", "sleep 600").await;
    db.builder("gated", &format!("until [ -e '{}' ]; do sleep 0.05; done", gate.display())).await;
    let supervisor = Supervisor::start(&db, "supervised").await;
    active_again(&db, 0).await;
    let build = db.enqueue("hello").await;
    assert_eq!(db.finished(build).await, "passed");
    let first = supervisor.pid();

    let output = supervisor.control(&["restart", "buildreactor"]);
    assert!(output.status.success() && text(&output.stdout).contains("started"), "{output:?}");
    active_again(&db, first).await;
    let second = supervisor.pid();
    let build = db.enqueue("hello").await;
    assert_eq!(db.finished(build).await, "passed");

    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    active_again(&db, second).await;
    let build = db.enqueue("hello").await;
    assert_eq!(db.finished(build).await, "passed");

    let long = db.enqueue("long").await;
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {long}")).await;
    let before = supervisor.pid();
    let output = supervisor.control(&["restart", "buildreactor"]);
    assert!(output.status.success() && text(&output.stdout).contains("started"), "{output:?}");
    active_again(&db, before).await;
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {long}")).await;
    let alive = processes_of(&supervisor.folder);
    let output = supervisor.control(&["stop", "buildreactor"]);
    assert!(output.status.success() && text(&output.stdout).contains("stopped"), "{output:?}");
    assert_eq!(processes_of(&supervisor.folder), alive, "the build goes on, in the same processes");
    assert_eq!(
        db.one::<String>(&format!("SELECT concat_ws(' ', state, attempt) FROM builds WHERE id = {long}")).await,
        "running 1"
    );
    // Where its goodbye took too long it was left out.
    let status = db.one::<String>("SELECT status FROM worker_status").await;
    assert!(["stopped", "gone"].contains(&status.as_str()), "{status}");
    assert!(supervisor.status().contains("STOPPED"), "not started again: {}", supervisor.status());

    let output = supervisor.control(&["start", "buildreactor"]);
    assert!(output.status.success(), "{output:?}");
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {long}")).await;
    let output = supervisor.control(&["signal", "INT", "buildreactor"]);
    assert!(output.status.success(), "{output:?}");
    db.wait(&format!("SELECT detail LIKE 'given back: %' FROM builds WHERE id = {long}")).await;
    db.wait("SELECT EXISTS (SELECT FROM running_builds WHERE attempt = 2)").await;
    db.execute(&format!("SELECT cancel_build({long})")).await;
    assert_eq!(db.finished(long).await, "cancelled");

    let third = supervisor.pid();
    let gated = db.enqueue("gated").await;
    db.wait(&format!("SELECT claim_held FROM running_builds WHERE build_id = {gated}")).await;
    let output = supervisor.control(&["signal", "USR1", "buildreactor"]);
    assert!(output.status.success(), "{output:?}");
    db.wait("SELECT EXISTS (SELECT FROM worker_status WHERE status = 'draining')").await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(gated).await, "passed", "it was finished first");
    active_again(&db, third).await;
}

#[tokio::test]
async fn roles_allow_what_they_are_for_and_no_more() {
    let db = Db::new().await;
    let file = deploy("roles.sql");
    let file = file.to_str().unwrap();
    for time in ["first", "second"] {
        let output = db.psql(&["-q", "-f", file]);
        assert!(output.status.success(), "{time} time: {}", text(&output.stderr));
    }
    db.execute(
        "CREATE ROLE deploy_daemon LOGIN IN ROLE build_worker; CREATE ROLE deploy_alice LOGIN IN ROLE build_submitter;
         CREATE ROLE deploy_board LOGIN IN ROLE build_viewer; CREATE ROLE deploy_ann LOGIN IN ROLE build_operator",
    )
    .await;
    let unseen: Vec<String> = db
        .all("SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND NOT has_any_column_privilege('build_viewer', oid, 'SELECT')")
        .await;
    assert_eq!(unseen, ["build_schema_history"], "a new table or view belongs in roles.sql");
    db.builder("linux", "echo built").await;
    db.builder("flaky", "test $BUILD_ATTEMPT -gt 1 || exit 75").await;

    let insert = "INSERT INTO build_queue (builder, properties, reason) VALUES ('linux', '{\"revision\": \"1a\"}', 'asked') RETURNING build_id";
    assert_eq!(db.ask_as("deploy_alice", insert), "1");
    assert_eq!(db.ask_as("deploy_alice", "INSERT INTO builds (builder) VALUES ('flaky') RETURNING id"), "2");
    assert_eq!(db.ask_as("deploy_alice", "INSERT INTO build_queue (build_id) VALUES (2) RETURNING build_id"), "2");
    assert_eq!(db.one::<String>("SELECT string_agg(DISTINCT submitted_by, ',') FROM builds").await, "deploy_alice");
    for role in ["deploy_alice", "deploy_board"] {
        assert_eq!(
            db.ask_as(role, "SELECT build_id, waiting_because FROM queue_status WHERE build_id = 1"),
            "1|no worker is running: start one with buildreactor run"
        );
        for view in ["running_builds", "recent_builds", "builder_status", "worker_status", "build_stats", "build_log"] {
            assert!(!db.ask_as(role, &format!("SELECT * FROM {view}")).contains("ERROR"), "{role} and {view}");
        }
        for refused in [
            "UPDATE builds SET state = 'passed'",
            "INSERT INTO builds (builder, state, finished_at) VALUES ('linux', 'cancelled', now())",
            "DELETE FROM build_queue",
            "UPDATE builders SET script = 'rm -rf /'",
            "INSERT INTO builders (name, script) VALUES ('mine', 'true')",
            "SELECT env FROM builders",
            "SELECT script FROM builders",
            "SELECT pause_builder('linux')",
            "SELECT build_queue_supersede('linux', 'key', 1)",
            "SELECT build_needs_settle(1)",
            "SELECT build_needs_follow('{1}', 1)",
            "SELECT build_cancel(1, '', '')",
            "SELECT build_cancel_settle(1)",
        ] {
            let answer = db.ask_as(role, refused);
            assert!(answer.contains("permission denied"), "{role}: {refused}: {answer}");
        }
    }
    let answer = db.ask_as("deploy_board", insert);
    assert!(answer.contains("permission denied for table build_queue"), "{answer}");

    for (asked, answer) in [
        ("SELECT pause_builder('linux', 'a moment')", "paused; what runs goes on"),
        ("SELECT resume_builder('linux')", "resumed"),
        ("SELECT prioritize_build(1, 5)", "priority 5"),
        ("INSERT INTO build_queue (builder) VALUES ('linux') RETURNING build_id", "3"),
        ("SELECT cancel_build(3)", "cancelled"),
        ("SELECT retry_build(3)", "queued"),
        ("SELECT cancel_build(3, 'after all not')", "cancelled"),
        ("SELECT detail FROM recent_builds WHERE build_id = 3", "cancelled by deploy_ann: after all not"),
        (
            "INSERT INTO build_schedules (name, builder, cron) VALUES ('nightly', 'linux', '0 3 * * *') RETURNING name",
            "nightly",
        ),
        ("DELETE FROM build_schedules RETURNING name", "nightly"),
    ] {
        assert_eq!(db.ask_as("deploy_ann", asked), answer, "{asked}");
    }
    for refused in [
        "UPDATE builds SET state = 'passed'",
        "UPDATE builders SET script = 'rm -rf /'",
        "DELETE FROM builds",
        "SELECT env FROM builders",
        "SELECT prune_builds('0')",
    ] {
        let answer = db.ask_as("deploy_ann", refused);
        assert!(answer.contains("permission denied"), "{refused}: {answer}");
    }

    let url = db.url_as("deploy_daemon");
    let mut daemon = Daemon::start_at(&url, "restricted", &[]).await;
    assert_eq!(db.finished(1).await, "passed");
    assert_eq!(db.finished(2).await, "passed");
    assert_eq!(db.one::<i32>("SELECT attempt FROM builds WHERE id = 2").await, 2);
    assert_eq!(db.ask_as("deploy_board", "SELECT build_log_text(1)"), "built");
    assert_eq!(daemon.stop().await, Some(0));
    for refused in
        ["UPDATE builders SET script = 'rm -rf /'", "DELETE FROM builds", "UPDATE build_locks SET capacity = 9"]
    {
        let answer = db.ask_as("deploy_daemon", refused);
        assert!(answer.contains("permission denied"), "{refused}: {answer}");
    }
    let state = temp_dir();
    let settings = [("BUILDREACTOR_WORKER_STATE_DIR", state.path().to_str().unwrap())];
    let output = buildreactor(&["check", "--database", &url], &settings);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));

    // The names are the operator's to choose.
    let names = [
        "-q",
        "-v",
        "worker=deploy_w",
        "-v",
        "submitter=deploy_s",
        "-v",
        "viewer=deploy_v",
        "-v",
        "operator=deploy_o",
        "-f",
        file,
    ];
    let output = db.psql(&names);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(db.one::<bool>("SELECT has_table_privilege('deploy_s', 'build_queue', 'INSERT') AND NOT has_table_privilege('deploy_v', 'build_queue', 'INSERT')").await);
}

#[tokio::test]
async fn the_demo_shows_three_builds_and_leaves_nothing_behind() {
    let (project, temporary) = (temp_dir(), temp_dir());
    let at = |name: &str| project.path().join(name);
    std::fs::create_dir(at("src")).unwrap();
    std::fs::write(at("src/main.rs"), "fn main() {}\n").unwrap();
    std::fs::write(at("Cargo.toml"), "[package]\nname = \"tiny\"\nversion = \"0.1.0\"\nedition = \"2024\"\n").unwrap();
    std::fs::write(at("Cargo.lock"), "version = 4\n\n[[package]]\nname = \"tiny\"\nversion = \"0.1.0\"\n").unwrap();
    let git = "git init -q . && git add . && git -c user.name=test -c user.email=test@example.org commit -qm first";
    assert!(Command::new("sh").args(["-c", git]).current_dir(project.path()).status().unwrap().success());

    let (source, temporary_path) = (project.path().to_str().unwrap(), temporary.path().to_str().unwrap());
    let output = buildreactor(&["demo", "--source", source], &[("TMPDIR", temporary_path)]);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{shown}{}", text(&output.stderr));
    for part in [
        "builds=> INSERT INTO build_queue (builder) VALUES ('hello')",
        "expected 42, got 41",
        "run --embedded",
        "README",
    ] {
        assert!(shown.contains(part), "`{part}` is not in: {shown}");
    }
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0, "its folder is gone");
}
