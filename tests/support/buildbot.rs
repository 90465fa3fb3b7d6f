//! A real Buildbot master with two workers, from the virtual environment that `make setup` has made.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};

use super::{TempDir, temp_dir, wait_for_within};

/// Python on a loaded machine.
const START: Duration = Duration::from_secs(120);

/// The folder of the virtual environment. `None`, with a line that says so: it could not be installed here.
pub fn environment() -> Option<PathBuf> {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache");
    if let Ok(why) = std::fs::read_to_string(cache.join("buildbot.missing")) {
        println!("SKIPPED: there is no Buildbot here, because {why}");
        return None;
    }
    let environment = cache.join("buildbot");
    assert!(environment.join("bin/buildbot").exists(), "no Buildbot in {}: run make setup", environment.display());
    Some(environment)
}

/// A folder for what lives as long as the run, and so is never dropped: removed by the next run.
pub fn kept(name: &str) -> TempDir {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("buildbot");
    for run in std::fs::read_dir(&root).into_iter().flatten().flatten() {
        if !Path::new("/proc").join(run.file_name()).exists() {
            let _gone = std::fs::remove_dir_all(run.path());
        }
    }
    let folder = root.join(std::process::id().to_string()).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    TempDir(folder)
}

fn tool(environment: &Path, name: &str) -> Command {
    let mut command = Command::new(environment.join("bin").join(name));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Folders of a master and its workers that were never started: to be copied, which is faster than making them.
fn pristine(environment: &Path) -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let dir = kept("pristine");
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(tool(environment, "buildbot").args(["create-master", "-q", "-r"]).arg(dir.path().join("master")));
        for name in ["w1", "w2"] {
            let folder = dir.path().join(name);
            run(tool(environment, "buildbot-worker").args(["create-worker", "-q", "-r"]).arg(&folder).args([
                "127.0.0.1:1",
                name,
                "pass",
            ]));
        }
        dir
    });
    made.path()
}

/// One master; its processes are gone when it is dropped.
pub struct Buildbot {
    environment: PathBuf,
    pub folder: TempDir,
    pub port: u16,
    workers_port: u16,
    settings: Vec<(String, String)>,
    master: Option<Child>,
    workers: Vec<Option<Child>>,
}

impl Buildbot {
    /// Starts a master and its workers, and waits until both are connected. `settings`: as `master.cfg` has them. `None`: there is no
    /// Buildbot here.
    pub async fn start(settings: &[(&str, &str)]) -> Option<Buildbot> {
        Buildbot::start_in(temp_dir(), settings).await
    }

    /// [`Buildbot::start`] in a folder that is there.
    pub async fn start_in(folder: TempDir, settings: &[(&str, &str)]) -> Option<Buildbot> {
        let environment = environment()?;
        let from = environment.clone();
        let to = folder.path().to_owned();
        tokio::task::spawn_blocking(move || {
            for name in ["master", "w1", "w2"] {
                let copied = Command::new("cp").arg("-r").arg(pristine(&from).join(name)).arg(&to).status().unwrap();
                assert!(copied.success());
            }
        })
        .await
        .unwrap();
        let config = include_str!("../buildbot/master.cfg");
        std::fs::write(folder.path().join("master/master.cfg"), config).unwrap();
        let free = || std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let (port, workers_port) = (free(), free());
        for name in ["w1", "w2"] {
            let file = folder.path().join(name).join("buildbot.tac");
            let text = std::fs::read_to_string(&file).unwrap();
            let text = text
                .lines()
                .map(
                    |line| if line.starts_with("port = ") { format!("port = {workers_port}") } else { line.to_owned() },
                )
                .collect::<Vec<_>>()
                .join("\n");
            // They come back at once, and end with the test.
            let text =
                "import buildbot_worker.pbutil\nbuildbot_worker.pbutil.backoffPolicy = lambda: lambda attempt: 0.3\n"
                    .to_owned()
                    + &text
                    + "\nimport threading, time\nstarted_by = os.getppid()\n\
                   def end():\n    while os.getppid() == started_by:\n        time.sleep(0.5)\n    os._exit(1)\n\
                   threading.Thread(target=end, daemon=True).start()\n";
            std::fs::write(file, text).unwrap();
        }
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut buildbot =
            Buildbot { environment, folder, port, workers_port, settings, master: None, workers: vec![None, None] };
        buildbot.start_master().await;
        buildbot.start_worker(1);
        buildbot.start_worker(2);
        buildbot.connected(2).await;
        Some(buildbot)
    }

    fn twistd(&self, folder: &str) -> Child {
        tool(&self.environment, "twistd")
            .args(["--nodaemon", "--no_save", "--pidfile=", "--logfile=twistd.log", "-y", "buildbot.tac"])
            .current_dir(self.folder.path().join(folder))
            .env("BB_WWW", self.port.to_string())
            .env("BB_PB", self.workers_port.to_string())
            .envs(self.settings.iter().map(|(key, value)| (key, value)))
            .process_group(0)
            .spawn()
            .unwrap()
    }

    pub async fn start_master(&mut self) {
        assert!(self.master.is_none());
        self.master = Some(self.twistd("master"));
        let log = self.folder.path().join("master/twistd.log");
        wait_for_within(START, &format!("the master to answer: see {}", log.display()), || async {
            self.read("masters?field=active").await.is_some_and(|rows| rows["masters"][0]["active"] == true)
                // Where reading needs a login too.
                || self.status("masters").await == Some(403)
        })
        .await;
    }

    /// The worker `w1` or `w2`.
    pub fn start_worker(&mut self, number: usize) {
        assert!(self.workers[number - 1].is_none());
        self.workers[number - 1] = Some(self.twistd(&format!("w{number}")));
    }

    /// Waits until so many workers are connected.
    pub async fn connected(&self, count: usize) {
        if self.status("workers").await == Some(403) {
            // Nobody may look: what else does not depend on it.
            return;
        }
        wait_for_within(START, "the workers to be connected", || async {
            let rows = self.read("workers?field=name&field=connected_to").await.unwrap_or_default();
            let connected = |row: &&Value| row["connected_to"].as_array().is_some_and(|list| !list.is_empty());
            rows["workers"].as_array().is_some_and(|rows| rows.iter().filter(connected).count() == count)
        })
        .await;
    }

    /// kill -9.
    pub fn kill_master(&mut self) {
        end(&mut self.master, nix::sys::signal::Signal::SIGKILL);
    }

    /// SIGTERM, as `buildbot stop` sends it.
    pub fn stop_master(&mut self) {
        end(&mut self.master, nix::sys::signal::Signal::SIGTERM);
    }

    /// kill -9.
    pub fn kill_worker(&mut self, number: usize) {
        end(&mut self.workers[number - 1], nix::sys::signal::Signal::SIGKILL);
    }

    pub fn signal_master(&self, signal: nix::sys::signal::Signal) {
        let pid = i32::try_from(self.master.as_ref().unwrap().id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A configuration file with the master as `main`, in a folder that goes with the master.
    pub fn config(&self) -> String {
        self.config_at(&self.url(), "")
    }

    /// [`Buildbot::config`] of another address, and with more lines.
    pub fn config_at(&self, url: &str, more: &str) -> String {
        let file = self.folder.path().join(format!("buildreactor-{}.toml", super::unique()));
        std::fs::write(&file, format!("[buildbot.main]\nurl = \"{url}\"\n{more}\n")).unwrap();
        file.display().to_string()
    }

    async fn status(&self, path: &str) -> Option<u16> {
        let url = format!("{}/api/v2/{path}", self.url());
        let answer = client().get(url).send().await.ok()?;
        let status = answer.status().as_u16();
        // Whoever goes away in the middle of an answer can break a master of version 4.3.
        answer.bytes().await.ok()?;
        Some(status)
    }

    /// Rows as the API answers.
    pub async fn read(&self, path: &str) -> Option<Value> {
        let url = format!("{}/api/v2/{path}", self.url());
        let answer = client().get(url).header("accept", "application/json").send().await.ok()?;
        let good = answer.status().is_success();
        let answer: Option<Value> = answer.json().await.ok();
        answer.filter(|_| good)
    }

    /// [`Buildbot::read`] of what must be there: the list under the name of its kind.
    pub async fn rows(&self, path: &str) -> Vec<Value> {
        let answer = self.read(path).await.unwrap_or_else(|| panic!("{path}"));
        let fields = answer.as_object().unwrap();
        fields.iter().find(|(name, _)| *name != "meta").unwrap().1.as_array().unwrap().clone()
    }

    pub async fn call(&self, path: &str, method: &str, params: Value) -> Value {
        let url = format!("{}/api/v2/{path}", self.url());
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        client().post(url).json(&body).send().await.unwrap().json().await.unwrap()
    }

    /// Somebody else's build; comes back with the number of its request.
    pub async fn force(&self, builder: &str, params: &[(&str, &str)]) -> u64 {
        let mut all = json!({"builderNames": [builder], "reason": "somebody else's"});
        for (name, value) in params {
            all[*name] = json!(value);
        }
        let answer = self.call("forceschedulers/force", "force", all).await;
        answer["result"][1].as_object().unwrap_or_else(|| panic!("{answer}")).values().next().unwrap().as_u64().unwrap()
    }

    /// Requests of ours, all there ever were.
    pub async fn asked(&self) -> Vec<Value> {
        let mut requests = Vec::new();
        for set in self.rows("buildsets?reason__contains=(br-&order=bsid").await {
            requests.extend(self.rows(&format!("buildrequests?buildsetid={}", set["bsid"])).await);
        }
        requests
    }
}

fn end(child: &mut Option<Child>, signal: nix::sys::signal::Signal) {
    let Some(mut child) = child.take() else { return };
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let _gone = nix::sys::signal::kill(pid, signal);
    child.wait().unwrap();
}

impl Drop for Buildbot {
    fn drop(&mut self) {
        for child in self.workers.iter_mut().chain([&mut self.master]) {
            end(child, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// For plain HTTP.
pub fn client() -> reqwest::Client {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let tls = tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().timeout(START).build().unwrap()
}
