//! Executor `buildbot`, against a real Buildbot 4.3 master with two workers.

mod access;
mod faults;
mod results;

use std::path::PathBuf;

use crate::support::buildbot::{Buildbot, kept};
use crate::support::proxy::Proxy;
use crate::support::{Daemon, Db, TempDir, temp_dir};

/// What only polls must not decide.
const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// The master of tests that break nothing; it ends with the run.
async fn shared() -> Option<&'static Buildbot> {
    static SHARED: tokio::sync::OnceCell<Option<Buildbot>> = tokio::sync::OnceCell::const_new();
    SHARED.get_or_init(|| Buildbot::start_in(kept("shared"), &[])).await.as_ref()
}

async fn builder(db: &Db, name: &str) {
    db.execute(&format!("INSERT INTO builders (name, executor) VALUES ('{name}', 'buildbot')")).await;
}

/// A worker that knows the master as `main`.
async fn worker(db: &Db, name: &str, config: &str) -> Daemon {
    Daemon::start(db, name, &[HOUR, ("BUILDREACTOR_CONFIG", config)]).await
}

async fn queue(db: &Db, builder: &str, properties: &str) -> i64 {
    let sql = format!(
        "INSERT INTO build_queue (builder, properties) VALUES ('{builder}', '{properties}') RETURNING build_id"
    );
    db.one(&sql).await
}

/// What builds of `wait` wait for.
struct Gate(TempDir);

impl Gate {
    fn shut() -> Gate {
        Gate(temp_dir())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("gate")
    }

    fn properties(&self) -> String {
        format!("{{\"gate\": \"{}\"}}", self.file().display())
    }

    fn open(&self) {
        std::fs::write(self.file(), "").unwrap();
    }

    /// A build that waits for it, on Buildbot.
    async fn started(&self, db: &Db, builder: &str) -> i64 {
        let id = queue(db, builder, &self.properties()).await;
        waiting(db, id).await;
        id
    }
}

async fn waits_because(db: &Db, text: &str) {
    db.wait(&format!(
        "SELECT count(*) > 0 FROM queue_status WHERE waiting_because LIKE '%{}%'",
        text.replace('\'', "''")
    ))
    .await;
}

/// Waits until Buildbot builds it: its log says so.
async fn waiting(db: &Db, build: i64) {
    db.wait(&format!("SELECT build_log_text({build}) LIKE '%waiting%'")).await;
}

/// Requests for a build of this database.
async fn request_of(db: &Db, buildbot: &Buildbot, id: i64) -> Vec<serde_json::Value> {
    let first: i64 = db
        .one(&format!(
            "SELECT (extract(epoch FROM min(started_at)) * 1000000)::bigint FROM build_attempts WHERE build_id = {id}"
        ))
        .await;
    let mut requests = Vec::new();
    for set in buildbot.rows(&format!("buildsets?reason__contains=(br-{first:x}-{id}-&order=bsid")).await {
        requests.extend(buildbot.rows(&format!("buildrequests?buildsetid={}", set["bsid"])).await);
    }
    requests
}

/// A worker that reaches the master through a proxy.
async fn through(proxy: &Proxy, buildbot: &Buildbot, db: &Db, name: &str) -> Daemon {
    worker(db, name, &buildbot.config_at(&format!("http://127.0.0.1:{}", proxy.port()), "")).await
}

async fn proxy(buildbot: &Buildbot) -> Proxy {
    Proxy::to(([127, 0, 0, 1], buildbot.port).into()).await
}

/// Exit code and lines of a command.
async fn command(arguments: &[&str], env: &[(&str, &str)]) -> (Option<i32>, Vec<String>) {
    let own = |text: &&str| (*text).to_owned();
    let arguments: Vec<String> = arguments.iter().map(own).collect();
    let env: Vec<(String, String)> = env.iter().map(|(key, value)| (own(key), own(value))).collect();
    let output = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        crate::support::buildreactor(&arguments, &env)
    })
    .await
    .unwrap();
    (output.status.code(), crate::support::text(&output.stdout).lines().map(str::to_owned).collect())
}
