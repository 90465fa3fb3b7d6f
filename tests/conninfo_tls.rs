//! Connection strings against a real PostgreSQL with TLS: what `sslmode`, root certificates,
//! client certificates, revocation lists and the password file do on the wire.
//!
//! Each test starts a server of its own on 127.0.0.1 and stops it by its pid.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use buildreactor::database::conninfo::ConnInfo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, User};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use tokio_postgres::SimpleQueryMessage;

/// A certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, in PEM.
struct Pair {
    cert: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        // The same name every time: only the key tells one from another.
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        Self { pem: cert.pem(), issuer: Issuer::new(params, key) }
    }

    fn sign(&self, params: &CertificateParams) -> Pair {
        let key = KeyPair::generate().unwrap();
        pair(&params.signed_by(&key, &self.issuer).unwrap(), &key)
    }

    /// A list that revokes one serial number and ends in `year`.
    fn revoke(&self, serial: u64, year: i32) -> String {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

fn pair(cert: &Certificate, key: &KeyPair) -> Pair {
    Pair { cert: cert.pem(), key: key.serialize_pem() }
}

/// A certificate for `db.test` and nothing else.
fn for_host() -> CertificateParams {
    let mut params = CertificateParams::new(["db.test".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "db.test");
    params.serial_number = Some(SerialNumber::from(7));
    params
}

fn for_user(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// A directory that goes away with its owner.
struct Directory(PathBuf);

impl Directory {
    fn new(kind: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("conninfo-{kind}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: &str) -> String {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A PostgreSQL of its own, stopped by `Drop`.
struct Server {
    directory: Directory,
    process: Child,
    port: u16,
    /// Whose the processes and files are, where this test is root: PostgreSQL refuses root.
    owner: Option<User>,
}

/// Roles and how they get in over TCP: `alice` and `clear` freely, with and without TLS; `bob`
/// with a password, `carol` with a certificate, both over TLS only.
const HBA: &str = "\
local     all all                trust
host      all clear 127.0.0.1/32 trust
hostssl   all bob   127.0.0.1/32 scram-sha-256
hostssl   all carol 127.0.0.1/32 cert
hostssl   all alice 127.0.0.1/32 trust
";

const ROLES: &str = "CREATE ROLE alice LOGIN; CREATE ROLE clear LOGIN; CREATE ROLE carol LOGIN; \
                     CREATE ROLE bob LOGIN PASSWORD 'b:o\\b'";

impl Server {
    async fn start(certificate: &Pair, clients: &Authority) -> Self {
        let owner = Uid::effective().is_root().then(|| {
            let known = |name| User::from_name(name).unwrap();
            known("postgres").or_else(|| known("nobody")).unwrap()
        });
        let directory = Directory::new("server");
        own(&directory.0, owner.as_ref());
        let data = directory.0.join("data");
        let initdb = command("initdb", owner.as_ref())
            .args(["-U", "postgres", "--auth=trust", "--no-sync", "--no-instructions"])
            .arg("-D")
            .arg(&data)
            .output()
            .unwrap();
        assert!(initdb.status.success(), "{initdb:?}");

        let port = free_port();
        let socket = directory.0.to_str().unwrap();
        let settings = format!(
            "port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{socket}'\n\
             fsync = off\nssl = on\nssl_ca_file = 'clients.crt'\nlog_checkpoints = off\n"
        );
        for (name, content) in [
            ("server.crt", certificate.cert.as_str()),
            ("server.key", &certificate.key),
            ("clients.crt", &clients.pem),
            ("pg_hba.conf", HBA),
            ("postgresql.auto.conf", &settings),
        ] {
            directory.write(&format!("data/{name}"), content);
            own(&data.join(name), owner.as_ref());
        }
        let mut process =
            command("postgres", owner.as_ref()).arg("-D").arg(&data).stderr(Stdio::piped()).spawn().unwrap();
        let log = process.stderr.take().unwrap();
        // Owned from here on, so that a failure below stops it.
        let server = Self { directory, process, port, owner };
        let mut lines = BufReader::new(log).lines();
        let ready = |line: String| line.contains("ready to accept connections");
        assert!(lines.by_ref().map(Result::unwrap).any(ready), "it ended");
        // Somebody must read on, or the server would hang when the pipe is full.
        std::thread::spawn(move || lines.for_each(drop));
        server.administer(ROLES).await;
        server
    }

    /// Runs a statement as superuser over the socket.
    async fn administer(&self, sql: &str) -> String {
        let home = Directory::new("home");
        let text = format!("{} user=postgres", self.on_socket());
        ask(&home, &text, sql).await.unwrap()
    }

    fn on_socket(&self) -> String {
        let socket = self.directory.0.display();
        format!("host={socket} port={} dbname=postgres", self.port)
    }

    /// Goes to the server under the name `db.test`.
    fn named(&self) -> String {
        format!("host=db.test {}", self.unnamed())
    }

    fn unnamed(&self) -> String {
        format!("hostaddr=127.0.0.1 port={} dbname=postgres user=alice", self.port)
    }

    /// Changes settings and waits until new sessions have them.
    async fn set(&self, settings: &[(&str, &str)]) {
        for (name, value) in settings {
            self.administer(&format!("ALTER SYSTEM SET {name} = '{value}'")).await;
        }
        self.administer("SELECT pg_reload_conf()").await;
        let deadline = Instant::now() + Duration::from_secs(20);
        for (name, value) in settings {
            while self.administer(&format!("SHOW {name}")).await != *value {
                assert!(Instant::now() < deadline, "`{name}` did not become `{value}`");
            }
        }
    }

    /// Shows another certificate to new sessions; `number` tells its files from others.
    async fn show(&self, number: u32, certificate: &Pair) {
        let (cert, key) = (format!("{number}.crt"), format!("{number}.key"));
        for (name, content) in [(&cert, &certificate.cert), (&key, &certificate.key)] {
            self.directory.write(&format!("data/{name}"), content);
            own(&self.directory.0.join("data").join(name), self.owner.as_ref());
        }
        self.set(&[("ssl_cert_file", &cert), ("ssl_key_file", &key)]).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        kill(pid, Signal::SIGQUIT).unwrap();
        self.process.wait().unwrap();
    }
}

fn own(path: &Path, owner: Option<&User>) {
    if let Some(user) = owner {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
}

/// One of the newest server's programs, as the owner of its files.
fn command(program: &str, owner: Option<&User>) -> Command {
    let major = |path: &PathBuf| -> u32 {
        let name = path.file_name().unwrap().to_string_lossy();
        name.parse().unwrap_or(0)
    };
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let newest = versions.map(|entry| entry.unwrap().path()).max_by_key(major).unwrap();
    let mut command = Command::new(newest.join("bin").join(program));
    if let Some(user) = owner {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.current_dir("/").env("LC_ALL", "C").stdin(Stdio::null());
    command
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn resolve(home: &Directory, text: &str) -> ConnInfo {
    let home = home.0.to_str().unwrap().to_owned();
    let env = |name: &str| (name == "HOME").then(|| home.clone());
    ConnInfo::resolve(Some(text), &env).unwrap()
}

/// Connects as `text` says and asks one thing; gives the first column of the first row. An error
/// comes with its causes.
async fn ask(home: &Directory, text: &str, sql: &str) -> Result<String, String> {
    let said = |error: &dyn std::error::Error| {
        let mut chain = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            chain = format!("{chain}: {error}");
            cause = error.source();
        }
        chain
    };
    let info = resolve(home, text);
    let tls = info.tls().map_err(|error| said(&error))?;
    let connecting = info.config().connect(tls).await;
    let (client, connection) = connecting.map_err(|error| said(&error))?;
    let answers = tokio::select! {
        answers = client.simple_query(sql) => answers.map_err(|error| said(&error))?,
        ended = connection => panic!("the connection ended: {ended:?}"),
    };
    let row = answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    Ok(row.unwrap_or_default().to_owned())
}

/// The TLS version a session has, or `none`.
const TLS: &str = "SELECT coalesce(version, 'none') FROM pg_stat_ssl WHERE pid = pg_backend_pid()";

async fn assert_encrypted(home: &Directory, text: &str) {
    assert_eq!(ask(home, text, TLS).await.as_deref(), Ok("TLSv1.3"), "{text}");
}

async fn assert_refused(home: &Directory, text: &str, why: &str) {
    let said = ask(home, text, TLS).await.expect_err(text);
    assert!(said.contains(why), "{text}: {said}");
}

#[tokio::test]
async fn without_root_certificate_all_but_disable_encrypt_and_trust_anybody() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    for mode in ["allow", "prefer", "require"] {
        assert_encrypted(&home, &format!("{} sslmode={mode}", server.named())).await;
        assert_encrypted(&home, &format!("{} sslmode={mode}", server.unnamed())).await;
    }
    let clear = format!("{} user=clear sslmode=disable", server.named());
    assert_eq!(ask(&home, &clear, TLS).await.as_deref(), Ok("none"));
    // Not on sockets, whatever the mode.
    let socket = format!("{} user=alice sslmode=verify-full", server.on_socket());
    assert_eq!(ask(&home, &socket, TLS).await.as_deref(), Ok("none"));
    let missing = "sslmode=require sslrootcert=/nonexistent";
    assert_encrypted(&home, &format!("{} {missing}", server.named())).await;
    server.set(&[("ssl", "off")]).await;
    let clear = format!("{} user=clear", server.named());
    assert_eq!(ask(&home, &clear, TLS).await.as_deref(), Ok("none"));
    let require = format!("{clear} sslmode=require");
    assert_refused(&home, &require, "server does not support TLS").await;
}

#[tokio::test]
async fn verify_ca_wants_the_authority_and_verify_full_also_the_name() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let root = home.write("ca.crt", &authority.pem);
    let wrong = home.write("wrong.crt", &Authority::new().pem);
    let both = home.write("both.crt", &format!("{}{}", Authority::new().pem, authority.pem));
    let wrong_name = format!("host=localhost {}", server.unnamed());
    let address = format!("host=127.0.0.1 {}", server.unnamed());

    for file in [&root, &both] {
        for mode in ["require", "verify-ca", "verify-full"] {
            let text = format!("{} sslmode={mode} sslrootcert={file}", server.named());
            assert_encrypted(&home, &text).await;
        }
        for mode in ["require", "verify-ca"] {
            for target in [&wrong_name, &address, &server.unnamed()] {
                assert_encrypted(&home, &format!("{target} sslmode={mode} sslrootcert={file}")).await;
            }
        }
        for target in [&wrong_name, &address] {
            let text = format!("{target} sslmode=verify-full sslrootcert={file}");
            assert_refused(&home, &text, "not valid for name").await;
        }
    }
    for mode in ["require", "verify-ca", "verify-full"] {
        for target in [&server.named(), &wrong_name] {
            let text = format!("{target} sslmode={mode} sslrootcert={wrong}");
            assert_refused(&home, &text, "invalid peer certificate").await;
        }
    }
    // The system's authorities have not signed it.
    let system = format!("{} sslrootcert=system", server.named());
    assert!(ask(&home, &system, TLS).await.is_err());

    // The usual place, which makes `require` verify, and `prefer` not.
    let usual = Directory::new("home");
    let require = format!("{} sslmode=require", server.named());
    usual.write(".postgresql/root.crt", &authority.pem);
    assert_encrypted(&usual, &require).await;
    usual.write(".postgresql/root.crt", &Authority::new().pem);
    assert_refused(&usual, &require, "invalid peer certificate").await;
    assert_encrypted(&usual, &server.named()).await;

    // TLS 1.2 has its own way to prove the key.
    server.set(&[("ssl_max_protocol_version", "TLSv1.2")]).await;
    let full = format!("{} sslmode=verify-full sslrootcert={root}", server.named());
    assert_eq!(ask(&home, &full, TLS).await.as_deref(), Ok("TLSv1.2"));

    let mut expired = for_host();
    expired.not_after = date_time_ymd(2000, 1, 1);
    server.show(1, &authority.sign(&expired)).await;
    for mode in ["verify-ca", "verify-full"] {
        let text = format!("{} sslmode={mode} sslrootcert={root}", server.named());
        assert_refused(&home, &text, "certificate expired").await;
    }
}

#[tokio::test]
async fn a_self_signed_certificate_is_trusted_where_its_copy_is_the_root() {
    let self_signed = |year: Option<i32>| {
        let mut params = for_host();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        if let Some(year) = year {
            params.not_after = date_time_ymd(year, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        pair(&params.self_signed(&key).unwrap(), &key)
    };
    let certificate = self_signed(None);
    let server = Server::start(&certificate, &Authority::new()).await;
    let home = Directory::new("home");
    let root = home.write("root.crt", &certificate.cert);
    let wrong = home.write("wrong.crt", &self_signed(None).cert);
    let verify_ca = format!("host=localhost {} sslmode=verify-ca", server.unnamed());
    let verify_full = format!("{} sslmode=verify-full", server.named());
    assert_encrypted(&home, &format!("{verify_ca} sslrootcert={root}")).await;
    assert_encrypted(&home, &format!("{verify_full} sslrootcert={root}")).await;
    let text = format!("{verify_full} host=localhost sslrootcert={root}");
    assert_refused(&home, &text, "not valid for name").await;
    for text in [&verify_ca, &verify_full] {
        let text = format!("{text} sslrootcert={wrong}");
        assert_refused(&home, &text, "invalid peer certificate").await;
    }

    let expired = self_signed(Some(2000));
    let root = home.write("expired.crt", &expired.cert);
    server.show(1, &expired).await;
    let text = format!("{verify_ca} sslrootcert={root}");
    assert_refused(&home, &text, "certificate expired").await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let root = home.write("ca.crt", &authority.pem);
    let text = format!("{} sslmode=verify-full sslrootcert={root}", server.named());
    for (serial, year, refusal) in [(8, 2100, None), (7, 2100, Some("Revoked")), (8, 2021, Some("expired"))] {
        let list = home.write("list.crl", &authority.revoke(serial, year));
        let text = format!("{text} sslcrl={list}");
        match refusal {
            None => assert_encrypted(&home, &text).await,
            Some(why) => assert_refused(&home, &text, why).await,
        }
    }
    // The usual place counts as well.
    home.write(".postgresql/root.crl", &authority.revoke(7, 2100));
    assert_refused(&home, &text, "Revoked").await;
}

#[tokio::test]
async fn the_password_file_opens_a_scram_login_bound_to_the_channel() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let text = format!("{} user=bob sslmode=require", server.named());
    assert_refused(&home, &text, "password missing").await;
    let refused = crate::support::buildreactor(&["check", "--database", &text], &[("HOME", home.0.to_str().unwrap())]);
    assert_eq!(refused.status.code(), Some(78), "nobody is going to mend that by waiting");
    let said = crate::support::text(&refused.stdout);
    assert!(
        said.contains("it wants a password: put one into ~/.pgpass, PGPASSWORD or the connection string"),
        "{said}"
    );
    home.write(".pgpass", "*:*:*:alice:no\ndb.test:*:postgres:bob:b\\:o\\\\b\n");
    for binding in ["disable", "prefer", "require"] {
        assert_encrypted(&home, &format!("{text} channel_binding={binding}")).await;
    }
    let other = home.write("other", "*:*:*:*:wrong\n");
    let wrong = format!("{text} passfile={other}");
    assert_refused(&home, &wrong, "password authentication failed").await;
}

#[tokio::test]
async fn a_client_certificate_logs_in_without_password() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let text = format!("{} user=carol sslmode=require", server.named());
    assert_refused(&home, &text, "valid client certificate").await;

    let carol = authority.sign(&for_user("carol"));
    home.write(".postgresql/postgresql.crt", &carol.cert);
    home.write(".postgresql/postgresql.key", &carol.key);
    assert_encrypted(&home, &text).await;
    let without = format!("{text} sslcertmode=disable");
    assert_refused(&home, &without, "valid client certificate").await;

    let dave = authority.sign(&for_user("dave"));
    let (cert, key) = (home.write("dave.crt", &dave.cert), home.write("dave.key", &dave.key));
    let other = format!("{text} sslcert={cert} sslkey={key}");
    assert_refused(&home, &other, "authentication failed").await;
}

/// What PostgreSQL's manual makes with `openssl x509 -req` is of X.509 version 1 with OpenSSL 3.0.
#[tokio::test]
async fn a_version_1_certificate_will_do_where_nothing_is_verified() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let made = Directory::new("openssl");
    let script = "set -e; openssl req -new -nodes -newkey rsa:2048 -subj /CN=db.test \
                  -keyout key -out csr; openssl x509 -req -in csr -days 2 -signkey key -out crt";
    let openssl = Command::new("sh").args(["-c", script]).current_dir(&made.0).output().unwrap();
    assert!(openssl.status.success(), "{openssl:?}");
    let read = |name: &str| fs::read_to_string(made.0.join(name)).unwrap();
    let pair = Pair { cert: read("crt"), key: read("key") };
    server.show(1, &pair).await;
    let text = format!("{} sslmode=require", server.named());
    assert_encrypted(&home, &text).await;
    // Version 3 from OpenSSL 3.4 on, which passes; version 1 cannot be checked, so does not.
    let version =
        Command::new("openssl").args(["x509", "-noout", "-text", "-in", "crt"]).current_dir(&made.0).output().unwrap();
    if String::from_utf8_lossy(&version.stdout).contains("Version: 1") {
        let bound = format!("{text} channel_binding=require");
        assert_refused(&home, &bound, "UnsupportedCertVersion").await;
    }
    server.set(&[("ssl_max_protocol_version", "TLSv1.2")]).await;
    assert_eq!(ask(&home, &text, TLS).await.as_deref(), Ok("TLSv1.2"));
}

#[tokio::test]
async fn psql_goes_where_the_description_says() {
    let authority = Authority::new();
    let server = Server::start(&authority.sign(&for_host()), &authority).await;
    let home = Directory::new("home");
    let root = home.write("it's a ca.crt", &authority.pem);
    let quoted = root.replace('\'', r"\'");
    let info = resolve(
        &home,
        &format!("{} options='-c application_name=us' sslmode=verify-full sslrootcert='{quoted}'", server.named()),
    );
    let sql = "SELECT current_user, current_database(), current_setting('application_name') = 'us', \
               ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let psql = || {
        let mut psql = command("psql", None);
        psql.env_clear().env("HOME", &home.0).args(["-XAtc", sql]);
        psql
    };
    // psql names itself, which goes before `options`; the server saw both.
    for output in [
        psql().arg(info.libpq_string()).env("PGAPPNAME", "us").output().unwrap(),
        psql().envs(info.psql_env()).env("PGAPPNAME", "us").output().unwrap(),
    ] {
        let answer = String::from_utf8_lossy(&output.stdout);
        assert_eq!(answer, "alice|postgres|t|t\n", "{output:?}");
    }
}
