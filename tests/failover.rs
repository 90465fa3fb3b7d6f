//! A server that dies for good, and its replica that takes its place; and what a crash leaves when commits are not waited for.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use buildreactor::embedded::{Options, Server, StopMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::beating::Stopped;
use crate::support::proxy::{Mood, Proxy};
use crate::support::{Daemon, Db, TempDir, connect, processes_of, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const PING: (&str, &str) = ("BUILDREACTOR_LEASE_PING", "500ms");
/// Longer than all of it may take.
const LEASE: (&str, &str) = ("BUILDREACTOR_LEASE_LEASE", "10m");
const GRACE: (&str, &str) = ("BUILDREACTOR_LEASE_GRACE", "11m");

async fn server(dir: &Path, settings: &[(&str, &str)]) -> Server {
    let mut options = Options { dir: Some(dir.to_owned()), tcp_port: Some(0), ..Options::default() };
    options.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    tokio::task::spawn_blocking(|| Server::start(options).unwrap()).await.unwrap()
}

/// A primary and its streaming replica.
struct Pair {
    primary: Server,
    replica: Server,
    /// Between the two.
    line: Proxy,
    _folder: TempDir,
}

impl Pair {
    /// `synchronous`: the replica has all that was committed.
    async fn start(synchronous: bool) -> Pair {
        let folder = temp_dir();
        let fast = [("fsync", "off")];
        let primary = server(&folder.path().join("primary"), &fast).await;
        let line = Proxy::to_server(&primary).await;
        // Its folder is made by one who may write there: the user of the servers.
        let replica = folder.path().join("replica");
        std::fs::create_dir(&replica).unwrap();
        let owner = std::fs::metadata(primary.data_dir()).unwrap();
        std::os::unix::fs::chown(&replica, Some(owner.uid()), Some(owner.gid())).unwrap();
        let mut copy = Command::new(primary.bin_dir().join("pg_basebackup"));
        copy.args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--username=postgres", "--pgdata"])
            .arg(replica.join("data"))
            .args(["--host=127.0.0.1".to_owned(), format!("--port={}", line.port())])
            .uid(owner.uid())
            .gid(owner.gid())
            .current_dir("/")
            .stdin(Stdio::null());
        let copied = tokio::task::spawn_blocking(move || copy.output().unwrap()).await.unwrap();
        assert!(copied.status.success(), "{copied:?}");
        let pair = Pair { primary, replica: server(&replica, &fast).await, line, _folder: folder };
        if !synchronous {
            return pair;
        }
        let client = connect(&pair.primary.url("postgres")).await;
        client.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.unwrap();
        client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        wait_for("the replica to be waited for", || async {
            let states = client.query("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'", &[]).await;
            states.unwrap().len() == 1
        })
        .await;
        pair
    }

    /// Both, as an operator names them.
    fn url(&self) -> String {
        let (primary, replica) = (self.primary.port(), self.replica.port());
        format!(
            "host=127.0.0.1,127.0.0.1 port={primary},{replica} user=postgres dbname=postgres target_session_attrs=read-write"
        )
    }

    /// The primary dies without a word, and the replica takes its place.
    async fn fail_over(&self) {
        let postmaster = Pid::from_raw(self.primary.postmaster_pid().unwrap());
        kill(postmaster, Signal::SIGKILL).unwrap();
        let client = connect(&self.replica.url("postgres")).await;
        assert!(client.query_one("SELECT pg_promote()", &[]).await.unwrap().get::<_, bool>(0));
    }
}

async fn attempts(db: &Db) -> Vec<String> {
    db.all("SELECT concat_ws(' ', build_id, attempt, worker, state, exit_code, claims) FROM build_attempts ORDER BY build_id, attempt")
        .await
}

/// A script that notes its start in `trace`, and fails once `gate` is there.
fn until_open(gate: &Path, trace: &Path) -> String {
    format!(
        "echo $BUILD_ID.$BUILD_ATTEMPT >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done; exit 3",
        trace.display(),
        gate.display()
    )
}

#[tokio::test]
async fn a_build_goes_on_over_a_failover_in_the_same_attempt_and_those_that_wait_start() {
    let pair = Pair::start(true).await;
    let db = Db::on(&pair.primary).await;
    let folder = temp_dir();
    let (gate, trace) = (folder.path().join("gate"), folder.path().join("trace"));
    db.builder("b", &until_open(&gate, &trace)).await;
    let mut one = Daemon::start_at(&pair.url(), "one", &[HOUR, PING, LEASE, GRACE]).await;
    let running = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    wait_for("its script", || async { trace.exists() }).await;
    let other = Daemon::start_at(&pair.url(), "other", &[HOUR, PING, LEASE, GRACE]).await;
    let waiting = db.enqueue("b").await;
    pair.fail_over().await;
    let db = Db::there(&pair.replica).await;
    one.says("is held again").await;
    assert_eq!(attempts(&db).await, [format!("{running} 1 one running 2")]);
    assert!(db.one::<bool>("SELECT claim_held FROM running_builds").await);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(running).await, "failed");
    assert_eq!(db.finished(waiting).await, "failed");
    // One of a builder's at a time; and what is queued now is started too.
    let next = db.enqueue("b").await;
    assert_eq!(db.finished(next).await, "failed");
    let ended = attempts(&db).await;
    assert_eq!(ended[0], format!("{running} 1 one failed 3 2"));
    for (attempt, id) in ended[1..].iter().zip([waiting, next]) {
        let worker = if attempt.contains("one") { "one" } else { "other" };
        assert_eq!(*attempt, format!("{id} 1 {worker} failed 3 1"));
    }
    assert_eq!(ended.len(), 3);
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), format!("{running}.1\n{waiting}.1\n{next}.1\n"));
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
    drop((one, other, db));
}

/// A build that has started, on a server whose replica does not know it.
struct Forgotten {
    pair: Pair,
    first: Daemon,
    folder: TempDir,
    id: i64,
}

impl Forgotten {
    /// `script`: `0` in braces stands for a folder, where it notes `WORKER BUILD.ATTEMPT` in `trace`.
    async fn start(script: &str, max_running: i32) -> Forgotten {
        let pair = Pair::start(false).await;
        let db = Db::on(&pair.primary).await;
        let folder = temp_dir();
        db.builder("b", &script.replace("{0}", &folder.path().display().to_string())).await;
        db.execute(&format!("UPDATE builders SET max_running = {max_running}")).await;
        let id = db.enqueue("b").await;
        let replica = Db::there(&pair.replica).await;
        wait_for("the replica to have it", || async {
            // Before the tables come there are none.
            let there: bool = replica.one("SELECT to_regclass('build_queue') IS NOT NULL").await;
            there && replica.one::<i64>("SELECT count(*) FROM build_queue").await == 1
        })
        .await;
        pair.line.set(Mood { stall_up: true, stall_down: true, ..Mood::default() });
        let first = Daemon::start_at(&pair.url(), "first", &[HOUR, PING, LEASE, GRACE]).await;
        let forgotten = Forgotten { pair, first, folder, id };
        wait_for("its script", || async { forgotten.trace() == format!("first {id}.1\n") }).await;
        assert_eq!(attempts(&db).await, [format!("{id} 1 first running 1")]);
        assert_eq!(attempts(&replica).await, Vec::<String>::new());
        forgotten
    }

    fn trace(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("trace")).unwrap_or_default()
    }
}

const STUBBORN: &str = "trap '' TERM; echo $BUILD_WORKER $BUILD_ID.$BUILD_ATTEMPT >> '{0}/trace'; while [ ! -e '{0}/gate' ] && [ $BUILD_WORKER = first ]; do sleep 0.05; done; exit 3";

#[tokio::test]
async fn a_build_whose_start_the_replica_lacks_is_run_by_another_under_the_same_number_and_the_first_records_nothing() {
    let mut run = Forgotten::start(STUBBORN, 2).await;
    let id = run.id;
    // It finds out only when the other has run it.
    let stopped = Stopped::these(vec![run.first.pid()]);
    let second = Daemon::start_at(&run.pair.url(), "second", &[HOUR, PING, LEASE, GRACE]).await;
    run.pair.fail_over().await;
    let db = Db::there(&run.pair.replica).await;
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(run.trace(), format!("first {id}.1\nsecond {id}.1\n"));
    assert!(!processes_of(&run.first.state).is_empty(), "this is the limit of what we can promise");
    drop(stopped);
    wait_for("the end of the first tree", || async { processes_of(&run.first.state).is_empty() }).await;
    run.first.says("no longer ours").await;
    assert_eq!(attempts(&db).await, [format!("{id} 1 second failed 3 1")]);
    drop((second, db));
}

#[tokio::test]
async fn a_build_whose_start_the_replica_lacks_is_tried_again_by_its_own_worker_under_the_next_number() {
    let mut run = Forgotten::start(STUBBORN, 2).await;
    let id = run.id;
    run.pair.fail_over().await;
    let db = Db::there(&run.pair.replica).await;
    run.first.says("no longer ours").await;
    // The number that runs is not started twice: its keeper knows.
    wait_for("its next start", || async { run.trace() == format!("first {id}.1\nfirst {id}.2\n") }).await;
    std::fs::write(run.folder.path().join("gate"), "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db).await, [format!("{id} 1 first cancelled 1"), format!("{id} 2 first failed 3 1")]);
    assert_eq!(run.trace().lines().count(), 2);
}

/// What the first leaves behind is tidied up while the second of its number could run already.
#[tokio::test]
async fn a_number_that_is_given_a_second_time_costs_the_second_neither_its_folder_nor_its_log() {
    const OBEDIENT: &str = "echo $BUILD_WORKER $BUILD_ID.$BUILD_ATTEMPT >> '{0}/trace'; echo output; touch mark; while [ ! -e '{0}/gate' ]; do sleep 0.05; done; [ -e mark ] || exit 9; exit 3";
    let mut run = Forgotten::start(OBEDIENT, 1).await;
    let id = run.id;
    run.pair.fail_over().await;
    let db = Db::there(&run.pair.replica).await;
    run.first.says("no longer ours").await;
    wait_for("its next start", || async { run.trace().lines().count() == 2 }).await;
    let first = run.first.state.path().join(format!("first/attempts/{id}.1"));
    wait_for("the first to be tidied up after", || async { !first.join("work").exists() }).await;
    std::fs::write(run.folder.path().join("gate"), "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    let attempts = attempts(&db).await;
    assert!(attempts.last().unwrap().ends_with(" first failed 3 1"), "{attempts:?}");
    assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, "output\n");
}

#[tokio::test]
async fn a_result_that_the_replica_lacks_is_recorded_again_from_the_workers_disk() {
    let pair = Pair::start(false).await;
    let db = Db::on(&pair.primary).await;
    let folder = temp_dir();
    let (gate, trace) = (folder.path().join("gate"), folder.path().join("trace"));
    db.builder("b", &format!("echo begun; {}", until_open(&gate, &trace).replace("exit 3", "echo over; exit 3"))).await;
    db.execute("UPDATE builders SET max_attempts = 1").await;
    let mut one = Daemon::start_at(&pair.url(), "one", &[HOUR, PING, LEASE, GRACE]).await;
    let id = db.enqueue("b").await;
    let replica = Db::there(&pair.replica).await;
    wait_for("the replica to have its start", || async {
        let there: bool = replica.one("SELECT to_regclass('build_queue') IS NOT NULL").await;
        there && attempts(&replica).await == [format!("{id} 1 one running 1")]
    })
    .await;
    pair.line.set(Mood { stall_up: true, stall_down: true, ..Mood::default() });
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    one.says(&format!("build {id}.1 of b failed")).await;
    let recorded = one.state.path().join(format!("one/attempts/{id}.1/recorded.json"));
    wait_for("its folder to be tidied", || async { recorded.exists() }).await;
    assert_eq!(attempts(&replica).await, [format!("{id} 1 one running 1")]);
    pair.fail_over().await;
    let db = Db::there(&pair.replica).await;
    assert_eq!(db.finished(id).await, "failed");
    assert_eq!(attempts(&db).await, [format!("{id} 1 one failed 3 2")]);
    assert_eq!(db.one::<String>(&format!("SELECT build_log_text({id})")).await, "begun\nover\n");
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), format!("{id}.1\n"));
    drop((one, db));
}

/// Whoever asks for commits that are not waited for loses the last ones in a crash: a daemon does not ask.
#[tokio::test]
async fn a_crash_of_a_server_with_synchronous_commit_off_forgets_neither_a_start_nor_a_result() {
    async fn crash(mut server: Server) -> Server {
        let restarted = tokio::task::spawn_blocking(move || {
            server.restart(StopMode::Immediate).unwrap();
            server
        });
        restarted.await.unwrap()
    }
    let folder = temp_dir();
    // What is not waited for is written this much later.
    let settings = [("fsync", "off"), ("wal_writer_delay", "10s")];
    let server = server(&folder.path().join("pg"), &settings).await;
    let db = Db::on(&server).await;
    db.execute("ALTER DATABASE postgres SET synchronous_commit = off").await;
    let (gate, trace) = (folder.path().join("gate"), folder.path().join("trace"));
    db.builder("b", &until_open(&gate, &trace)).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, PING, LEASE, GRACE]).await;
    let db = Db::there(&server).await;
    assert_eq!(db.one::<String>("SHOW synchronous_commit").await, "off");
    let id = db.enqueue("b").await;
    wait_for("its script", || async { trace.exists() }).await;
    let server = crash(server).await;
    let db = Db::there(&server).await;
    daemon.says("is held again").await;
    assert_eq!(attempts(&db).await, [format!("{id} 1 w running 2")]);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(db.finished(id).await, "failed");
    let server = crash(server).await;
    let db = Db::there(&server).await;
    assert_eq!(attempts(&db).await, [format!("{id} 1 w failed 3 2")]);
    assert_eq!(db.one::<String>("SELECT concat_ws(' ', state, attempt, exit_code) FROM builds").await, "failed 1 3");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM build_queue").await, 0);
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), format!("{id}.1\n"));
    drop((daemon, db));
}
