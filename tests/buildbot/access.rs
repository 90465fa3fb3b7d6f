//! Who may ask a master what, when nothing is asked of it, and how people steer what is there.

use std::path::Path;
use std::sync::Arc;

use super::{Gate, HOUR, builder, command, queue, request_of, shared, waiting, waits_because, worker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::buildbot::Buildbot;
use crate::support::{Daemon, Db, TempDir, smtp, temp_dir, wait_for};

#[tokio::test]
async fn a_running_build_is_cancelled_on_the_master() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "wait").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let id = queue(&db, "wait", r#"{"gate": "/nonexistent/never"}"#).await;
    waiting(&db, id).await;
    let said: String = db.one(&format!("SELECT cancel_build({id}, 'not wanted')")).await;
    assert_eq!(said, "its worker is told to stop it");
    assert_eq!(db.finished(id).await, "cancelled");
    assert_eq!(db.one::<String>(&format!("SELECT detail FROM builds WHERE id = {id}")).await, "cancelled: not wanted");
    let asked = request_of(&db, buildbot, id).await;
    assert_eq!((asked.len(), &asked[0]["complete"], &asked[0]["results"]), (1, &true.into(), &6.into()));
    assert_eq!(
        db.one::<String>(&format!("SELECT state FROM build_steps WHERE build_id = {id} AND position = 2")).await,
        "cancelled"
    );
}

#[tokio::test]
async fn nothing_is_claimed_that_the_master_could_not_build_and_it_says_why() {
    let Some(mut buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, executor, settings) VALUES
         ('ok', 'buildbot', '{}'), ('nobody', 'buildbot', '{}'), ('elsewhere', 'buildbot', '{\"master\": \"other\"}'),
         ('scheduled', 'buildbot', '{\"builder\": \"ok\", \"scheduler\": \"nightly\"}'),
         ('narrow', 'buildbot', '{\"builder\": \"fail\", \"scheduler\": \"narrow\"}'),
         ('mute', 'buildbot', '{\"builder\": \"ok\", \"scheduler\": \"mute\"}')",
    )
    .await;
    let mut daemon = worker(&db, "w", &buildbot.config()).await;
    for (name, why) in [
        ("nobody", "master `main` has no builder `nobody`"),
        ("elsewhere", "no worker that may take it has a section [buildbot.other]"),
        ("scheduled", "master `main` has no force scheduler `nightly`"),
        (
            "narrow",
            "force scheduler `narrow` of master `main` does not start builder `fail`: add it to its builderNames",
        ),
        ("mute", "drops the reason of a build: its reasonString must contain %(reason)s"),
    ] {
        let id = queue(&db, name, "{}").await;
        waits_because(&db, why).await;
        let attempts = if name == "mute" { 1 } else { 0 };
        assert_eq!(
            db.one::<i64>(&format!("SELECT count(*) FROM build_attempts WHERE build_id = {id}")).await,
            attempts,
            "{name}"
        );
        db.execute(&format!("SELECT cancel_build({id})")).await;
        db.wait("SELECT count(*) = 0 FROM build_queue").await;
    }

    let worker_ids: Vec<u64> =
        buildbot.rows("workers").await.iter().map(|row| row["workerid"].as_u64().unwrap()).collect();
    for id in &worker_ids {
        buildbot.call(&format!("workers/{id}"), "pause", serde_json::json!({"reason": "maintenance"})).await;
    }
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "each connected worker of builder `ok` on master `main` is paused or about to stop (w").await;
    for id in &worker_ids {
        buildbot.call(&format!("workers/{id}"), "unpause", serde_json::json!({})).await;
    }
    assert_eq!(db.finished(id).await, "passed");

    // Somebody else's.
    let gate = Gate::shut();
    builder(&db, "wait").await;
    buildbot.force("wait", &[("gate", gate.file().to_str().unwrap())]).await;
    let id = queue(&db, "wait", &gate.properties()).await;
    waits_because(&db, "builder `wait` on master `main` is busy (1 waiting or running there, 1 allowed)").await;
    gate.open();
    assert_eq!(db.finished(id).await, "passed");

    for number in [1, 2] {
        buildbot.kill_worker(number);
    }
    buildbot.connected(0).await;
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "no worker of builder `ok` is connected to master `main`").await;
    daemon.says("builds of ok wait: no worker of builder `ok` is connected to master `main`").await;
    buildbot.kill_master();
    waits_because(&db, &format!("master `main` cannot be reached at `{}`: Connection refused", buildbot.url())).await;
    assert_eq!(db.one::<i32>(&format!("SELECT attempt FROM builds WHERE id = {id}")).await, 0);
    daemon.says("builds of ok wait: master `main` cannot be reached").await;
    buildbot.start_master().await;
    buildbot.start_worker(1);
    assert_eq!(db.finished(id).await, "passed");
    daemon.says("builds of ok start again").await;
    assert!(!daemon.has_said("is busy"), "nothing to mend");
}

#[tokio::test]
async fn a_request_that_waits_on_the_master_is_cancelled_there() {
    let Some(buildbot) = Buildbot::start(&[]).await else { return };
    let db = Db::new().await;
    let _daemon = worker(&db, "w", &buildbot.config()).await;
    let gate = Gate::shut();
    builder(&db, "wait-on-w1").await;
    db.execute("UPDATE builders SET max_running = 3").await;
    // One builder builds one thing at a time on a worker: the second waits.
    let first = gate.started(&db, "wait-on-w1").await;
    let second = queue(&db, "wait-on-w1", &gate.properties()).await;
    db.wait(&format!("SELECT external_url LIKE '%/#/buildrequests/%' FROM build_attempts WHERE build_id = {second}"))
        .await;
    db.execute(&format!("SELECT cancel_build({second}, 'changed my mind')")).await;
    assert_eq!(db.finished(second).await, "cancelled");
    let asked = request_of(&db, &buildbot, second).await;
    assert_eq!((&asked[0]["complete"], &asked[0]["results"]), (&true.into(), &6.into()));
    let builds = buildbot.rows(&format!("builds?buildrequestid={}", asked[0]["buildrequestid"])).await;
    assert!(builds.is_empty(), "{builds:?}");
    gate.open();
    assert_eq!(db.finished(first).await, "passed");
}

#[tokio::test]
async fn a_login_is_made_where_a_user_is_configured() {
    let Some(buildbot) = Buildbot::start(&[("BB_AUTH", "read"), ("BB_COOKIE_SECONDS", "2")]).await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    let password = buildbot.folder.path().join("password");
    std::fs::write(&password, "wrong\n").unwrap();
    let login = format!("user = \"bot\"\npassword_file = \"{}\"", password.display());
    let daemon = worker(&db, "w", &buildbot.config_at(&buildbot.url(), &login)).await;
    let id = queue(&db, "ok", "{}").await;
    waits_because(&db, "master `main` refuses user `bot`: wrong user or password").await;
    std::fs::write(&password, "s3cret\n").unwrap();
    assert_eq!(db.finished(id).await, "passed");
    // The cookie has expired by now, or will during these.
    for _ in 0..3 {
        let id = queue(&db, "ok", "{}").await;
        assert_eq!(db.finished(id).await, "passed");
    }
    let log = daemon.log.lock().unwrap().join("\n");
    let everything: String = db.one("SELECT string_agg(concat(to_jsonb(b), to_jsonb(a), to_jsonb(w)), '') FROM builds b, build_attempts a, workers w").await;
    for secret in ["s3cret", "TWISTED_SESSION"] {
        assert!(!log.contains(secret) && !everything.contains(secret), "{secret}");
    }
    drop(daemon);

    // Who may look, and not force.
    std::fs::write(&password, "pw").unwrap();
    let login = login.replace("bot", "alice");
    let _daemon = worker(&db, "v", &buildbot.config_at(&buildbot.url(), &login)).await;
    queue(&db, "ok", "{}").await;
    waits_because(&db, "master `main` does not allow it to user `alice`").await;
}

/// In front of the master, with a certificate for `localhost`; its port, and the certificate.
async fn tls(buildbot: &Buildbot) -> (u16, TempDir, String) {
    let (acceptor, pem) = smtp::certificate("localhost");
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (port, master) = (listener.local_addr().unwrap().port(), buildbot.port);
    tokio::spawn(async move {
        let acceptor = Arc::new(acceptor);
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = Arc::clone(&acceptor);
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let mut server = tokio::net::TcpStream::connect(("127.0.0.1", master)).await.unwrap();
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let folder = temp_dir();
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, pem).unwrap();
    let file = file.display().to_string();
    (port, folder, file)
}

#[tokio::test]
async fn a_master_behind_tls_is_trusted_by_its_authority_alone() {
    let Some(buildbot) = shared().await else { return };
    let db = Db::new().await;
    builder(&db, "ok").await;
    db.execute("UPDATE builders SET max_running = 10").await;
    let (port, _folder, ca) = tls(buildbot).await;
    let url = format!("https://localhost:{port}/");
    let mut daemon = worker(&db, "w", &buildbot.config_at(&url, "")).await;
    let id = db.enqueue("ok").await;
    let why = format!("master `main` cannot be reached at `https://localhost:{port}`: invalid peer certificate");
    waits_because(&db, &why).await;
    assert_eq!(daemon.stop().await, Some(0));
    let _daemon = worker(&db, "v", &buildbot.config_at(&url, &format!("ca_file = \"{ca}\""))).await;
    assert_eq!(db.finished(id).await, "passed");
}

#[tokio::test]
async fn every_connection_to_the_kick_port_is_a_wake() {
    let db = Db::new().await;
    db.builder("b", "true").await;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_KICK_LISTEN", &listen)]).await;
    // As a replicated row comes: no trigger runs, and the transaction that it names is another server's.
    let row = |id: i64| {
        format!(
            "SET session_replication_role = replica; INSERT INTO builds (id, builder, state, queued_at, submitted_by) VALUES ({id}, 'b', 'queued', now(), 'x'); INSERT INTO build_queue (build_id, builder, queued_xid) VALUES ({id}, 'b', '3')"
        )
    };
    db.execute(&row(1)).await;
    assert_eq!(db.one::<String>("SELECT state::text FROM builds WHERE id = 1").await, "queued");
    drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    assert_eq!(db.finished(1).await, "passed");
    // A flood, and then another row.
    for _ in 0..2000 {
        drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    }
    db.execute(&row(2)).await;
    drop(tokio::net::TcpStream::connect(&listen).await.unwrap());
    assert_eq!(db.finished(2).await, "passed");
    wait_for("the port to be closed at once", || async {
        use tokio::io::AsyncReadExt;
        let mut stream = tokio::net::TcpStream::connect(&listen).await.unwrap();
        stream.read(&mut [0; 1]).await.is_ok_and(|n| n == 0)
    })
    .await;
}

#[tokio::test]
async fn check_says_of_each_master_who_it_is_or_what_is_wrong_with_it() {
    let Some(buildbot) = Buildbot::start(&[("BB_AUTH", "read")]).await else { return };
    let db = Db::new().await;
    db.execute(
        "INSERT INTO builders (name, executor, settings) VALUES
         ('ok', 'buildbot', '{\"master\": \"main\"}'), ('there', 'buildbot', '{\"master\": \"other\"}'), ('unsaid', 'buildbot', '{}'),
         ('late', 'buildbot', '{\"master\": \"main\", \"builder\": \"ok\", \"scheduler\": \"nightly\"}')",
    )
    .await;
    let folder = temp_dir();
    let state = folder.path().display().to_string();
    let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
    std::fs::write(&good, "s3cret\n").unwrap();
    std::fs::write(&bad, "wrong\n").unwrap();
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let login = |file: &Path| format!("user = \"bot\"\npassword_file = \"{}\"", file.display());
    let url = buildbot.url();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let kick = std::cell::RefCell::new(closed.to_string());
    let check = async |config: &str| {
        let kick = kick.borrow().clone();
        let env = [
            ("BUILDREACTOR_CONFIG", config),
            ("BUILDREACTOR_WORKER_STATE_DIR", state.as_str()),
            ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0"),
            ("BUILDREACTOR_KICK_LISTEN", kick.as_str()),
        ];
        let (code, lines) = command(&["check", "--database", &db.url()], &env).await;
        let about = |line: &String| line.contains(" buildbot: ") || line.contains(" kick: ");
        (code, lines.into_iter().filter(about).collect::<Vec<_>>())
    };

    let (code, lines) = check(&buildbot.config_at(&url, &login(&good))).await;
    let mut expected = [
        "note     buildbot: there is no section [buildbot.other] here, and no other worker is registered that could build `there`".to_owned(),
        format!("ok       buildbot: master `main` at {url} is Buildbot 4.3.0; logged in as `bot`"),
        "PROBLEM  buildbot: builds of `late` cannot start: master `main` has no force scheduler `nightly`".to_owned(),
        "ok       buildbot: builds of `ok` have a builder and a force scheduler on master `main`".to_owned(),
        "PROBLEM  buildbot: builds of `unsaid` cannot start: master `main` has no builder `unsaid`".to_owned(),
        format!("ok       kick: every connection to {closed} will be a wake"),
    ];
    assert_eq!((code, lines), (Some(1), expected.to_vec()));

    // There is somebody else now, and all that this one has to build can be.
    db.execute("DELETE FROM builders WHERE name IN ('late', 'unsaid'); INSERT INTO workers (name, host, pid, slots, version) VALUES ('x', 'h', 1, 1, '1')").await;
    kick.replace(taken.local_addr().unwrap().to_string());
    let (code, lines) = check(&buildbot.config_at(&url, &login(&good))).await;
    expected[0] =
        "note     buildbot: there is no section [buildbot.other] here: other workers have to build `there`".to_owned();
    expected[5] = format!(
        "note     kick: somebody listens on {} already: if it is not this worker, name another in [kick] listen",
        kick.borrow()
    );
    assert_eq!((code, lines), (Some(0), [0, 1, 3, 5].map(|line| expected[line].clone()).to_vec()));
    db.execute(
        "INSERT INTO builders (name, executor, settings, labels) VALUES ('unsaid', 'buildbot', '{}', '{}'),
         ('nobody', 'buildbot', '{\"master\": \"open\"}', '{}'), ('not-ours', 'buildbot', '{\"master\": \"open\"}', '{arm}')",
    )
    .await;
    // An address for documents, which no machine has.
    kick.replace("192.0.2.1:7999".to_owned());

    let others = format!(
        "{}\n[buildbot.open]\nurl = \"{url}\"\n[buildbot.off]\nurl = \"http://{closed}\"\n\
         [buildbot.untrusted]\nurl = \"https://localhost\"\nca_file = \"/nonexistent/ca.pem\"\n\
         [buildbot.far]\nurl = \"http://0.0.0.0:1\"\n{}",
        login(&bad),
        login(&good),
    );
    let (code, lines) = check(&buildbot.config_at(&url, &others)).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    for expected in [
        "note     buildbot: there is no section [buildbot.other] here: other workers have to build `there`",
        "note     buildbot: there is more than one master here, and the settings of `unsaid` name none: other workers have to build `unsaid`",
        "PROBLEM  kick: cannot listen on 192.0.2.1:7999: Cannot assign requested address",
        "PROBLEM  buildbot: master `main` refuses user `bot`: wrong user or password",
        &format!("ok       buildbot: master `open` at {url} is Buildbot 4.3.0; nobody is logged in"),
        &format!(
            "PROBLEM  buildbot: master `off` cannot be reached at `http://{closed}`: Connection refused (os error 111): is [buildbot.off] url its web interface, and does it run?"
        ),
        // One that is away, or wrong, keeps nobody from looking at the others.
        "PROBLEM  buildbot: builds of `nobody` cannot start: master `open` does not allow it without a user",
        "PROBLEM  buildbot: [buildbot.untrusted] ca_file: cannot use `/nonexistent/ca.pem`: ",
        "PROBLEM  buildbot: master `far` ",
        "note     buildbot: others on the network can read the password for master `far`: ",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(expected)), "no {expected} in {lines:#?}");
    }
    assert!(!lines.iter().any(|line| line.contains("`ok`") || line.contains("`not-ours`")), "{lines:#?}");
}

#[tokio::test]
async fn without_a_master_its_builds_wait_with_a_reason_and_nothing_else_does() {
    let db = Db::new().await;
    builder(&db, "far").await;
    db.builder("near", "true").await;
    let mut daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_WORKER_SLOTS", "1")]).await;
    db.execute("INSERT INTO build_queue (builder, priority) VALUES ('far', 9), ('far', 9)").await;
    waits_because(&db, "no worker that may take it has a section [buildbot.NAME]").await;
    daemon.says("builds of far wait: no worker that may take it has a section [buildbot.NAME]").await;
    for _ in 0..20 {
        let id = db.enqueue("near").await;
        assert_eq!(db.finished(id).await, "passed");
    }
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM builds WHERE builder = 'far' AND state = 'queued' AND attempt = 0").await,
        2
    );
    assert_eq!(daemon.times_said("builds of far wait"), 1, "however often it is asked");
}

/// What answers requests in this way, each by its first line.
async fn web_server(answer: fn(&str) -> &'static str) -> String {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            if let Ok(length) = stream.read(&mut request).await {
                let answer = answer(&String::from_utf8_lossy(&request[..length]));
                let _gone = stream.write_all(answer.as_bytes()).await;
            }
        }
    });
    url
}

#[tokio::test]
async fn what_is_no_buildbot_is_said_to_be_none() {
    let page = web_server(
        |_| "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 31\r\n\r\n<!DOCTYPE html><h1>Oh no!</h1>\n",
    )
    .await;
    const MOVED: &str = "HTTP/1.1 301 Moved Permanently\r\nLocation: https://ci.example.org/?state=8f3a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let moved = web_server(|_| MOVED).await;
    let db = Db::new().await;
    let folder = temp_dir();
    let config = folder.path().join("b.toml");
    std::fs::write(&config, format!("[buildbot.page]\nurl = \"{page}\"\n[buildbot.moved]\nurl = \"{moved}\"")).unwrap();
    db.execute(
        "INSERT INTO builders (name, executor, settings) VALUES
         ('page', 'buildbot', '{\"master\": \"page\"}'), ('moved', 'buildbot', '{\"master\": \"moved\"}');
         INSERT INTO build_queue (builder) VALUES ('page'), ('moved')",
    )
    .await;
    let _daemon = Daemon::start(&db, "w", &[HOUR, ("BUILDREACTOR_CONFIG", config.to_str().unwrap())]).await;
    for why in [
        format!("master `page` answers 404 Not Found at `{page}`: (a web page)"),
        format!(
            "`{moved}` redirects to `https://ci.example.org/`, which is not followed: correct [buildbot.moved] url"
        ),
    ] {
        waits_because(&db, &why).await;
    }

    // A proxy whose master has just gone.
    let half = web_server(|request| {
        if request.starts_with("GET /config ") {
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 35\r\n\r\n{\"versions\":[[\"Buildbot\",\"4.3.0\"]]}"
        } else {
            "HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nContent-Length: 6\r\n\r\n<html>"
        }
    })
    .await;
    std::fs::write(&config, format!("[buildbot.page]\nurl = \"{half}\"")).unwrap();
    let state = temp_dir();
    let env = [
        ("BUILDREACTOR_CONFIG", config.to_str().unwrap()),
        ("BUILDREACTOR_WORKER_STATE_DIR", state.path().to_str().unwrap()),
        ("BUILDREACTOR_WORKER_MIN_FREE_DISK", "0"),
    ];
    let (code, lines) = command(&["check", "--database", &db.url()], &env).await;
    let expected = format!(
        "PROBLEM  buildbot: builds of `page` cannot start: master `page` answers 502 Bad Gateway at `{half}`: (a web page)"
    );
    assert!(code == Some(1) && lines.contains(&expected), "{lines:#?}");
}
