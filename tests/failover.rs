//! A server that dies for good, and its replica that takes its place; and what a crash leaves when commits are not waited for.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use buildreactor::embedded::{Options, Server, StopMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, Db, TempDir, connect, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const PING: (&str, &str) = ("BUILDREACTOR_LEASE_PING", "500ms");

async fn server(dir: &Path, settings: &[(&str, &str)]) -> Server {
    let mut options = Options { dir: Some(dir.to_owned()), tcp_port: Some(0), ..Options::default() };
    options.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    tokio::task::spawn_blocking(|| Server::start(options).unwrap()).await.unwrap()
}

/// A primary and its streaming replica, which has all that was committed.
struct Pair {
    primary: Server,
    replica: Server,
    _folder: TempDir,
}

impl Pair {
    async fn start() -> Pair {
        let folder = temp_dir();
        let fast = [("fsync", "off")];
        let primary = server(&folder.path().join("primary"), &fast).await;
        // Its folder is made by one who may write there: the user of the servers.
        let replica = folder.path().join("replica");
        std::fs::create_dir(&replica).unwrap();
        let owner = std::fs::metadata(primary.data_dir()).unwrap();
        std::os::unix::fs::chown(&replica, Some(owner.uid()), Some(owner.gid())).unwrap();
        let copied = Command::new(primary.bin_dir().join("pg_basebackup"))
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--username=postgres", "--pgdata"])
            .arg(replica.join("data"))
            .arg("--host")
            .arg(primary.socket_dir())
            .arg(format!("--port={}", primary.port()))
            .uid(owner.uid())
            .gid(owner.gid())
            .current_dir("/")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(copied.status.success(), "{copied:?}");
        let pair = Pair { primary, replica: server(&replica, &fast).await, _folder: folder };
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
        client.batch_execute("SELECT pg_promote()").await.unwrap();
    }
}

async fn attempts(db: &Db) -> Vec<String> {
    db.all("SELECT concat_ws(' ', build_id, attempt, worker, state, exit_code, claims) FROM build_attempts ORDER BY build_id, attempt")
        .await
}

#[tokio::test]
async fn a_build_goes_on_over_a_failover_in_the_same_attempt_and_those_that_wait_start() {
    let pair = Pair::start().await;
    let db = Db::on(&pair.primary).await;
    let folder = temp_dir();
    let (gate, trace) = (folder.path().join("gate"), folder.path().join("trace"));
    let script = format!(
        "echo $BUILD_ID.$BUILD_ATTEMPT >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done; exit 3",
        trace.display(),
        gate.display()
    );
    db.builder("b", &script).await;
    let mut one = Daemon::start_at(&pair.url(), "one", &[HOUR, PING]).await;
    let running = db.enqueue("b").await;
    db.wait("SELECT claim_held FROM running_builds").await;
    wait_for("its script", || async { trace.exists() }).await;
    let other = Daemon::start_at(&pair.url(), "other", &[HOUR, PING]).await;
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
    let script = format!(
        "echo $BUILD_ID.$BUILD_ATTEMPT >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done; exit 3",
        trace.display(),
        gate.display()
    );
    db.builder("b", &script).await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, PING]).await;
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
