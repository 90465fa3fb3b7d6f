//! The network goes silent: packets of an established connection are dropped on their way, and neither end is told. The worker
//! that is cut off must have ended its builds before another starts them.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use buildreactor::embedded::{Options, Server};

use crate::support::{Daemon, Db, Launch, processes_of, temp_dir, unique, wait_for, wait_for_within};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");
const SMALL: [(&str, &str); 4] = [
    HOUR,
    ("BUILDREACTOR_LEASE_PING", "500ms"),
    ("BUILDREACTOR_LEASE_LEASE", "3s"),
    ("BUILDREACTOR_LEASE_GRACE", "13s"),
];

/// What the cut-off worker no longer hears or says.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lost {
    Both,
    /// The server hears the worker, and its answers are lost.
    Answers,
    /// The worker's words are lost.
    Questions,
    /// Both, and the server lets go of the claim at that moment: the earliest that others can see it.
    BothAndTheClaim,
}

/// A network namespace with the worker, another with a router, and the server where we are. The router drops packets by a
/// blackhole rule: no ICMP, no RST, no carrier that goes, no neighbour that falls silent, and no error of the local interface, as
/// `ip link set down` or a full queue on one of the ends would give. So each end sees what it would see of a dead line somewhere
/// between two buildings.
struct Net {
    router: String,
    worker: String,
    /// Our end of the link to the router.
    link: String,
    server_address: String,
    worker_address: String,
}

impl Net {
    /// Or why there can be none.
    fn new() -> Result<Net, String> {
        let name = format!("br{}-{}", std::process::id(), unique());
        // Two nets of four addresses from those for benchmarks (RFC 2544), which nobody routes.
        let block = (std::process::id() * 64 + unique()) % 16384 * 8;
        let address = |n: u32| std::net::Ipv4Addr::from((198 << 24 | 18 << 16) + block + n).to_string();
        let net = Net {
            router: format!("{name}r"),
            worker: format!("{name}w"),
            server_address: address(1),
            worker_address: address(6),
            link: name,
        };
        let Net { router, worker, link, server_address, worker_address } = &net;
        let commands = [
            format!("netns add {router}"),
            format!("netns add {worker}"),
            format!("link add {link} type veth peer name near netns {router}"),
            format!("-n {worker} link add far type veth peer name wide netns {router}"),
            format!("addr add {server_address}/30 dev {link}"),
            format!("link set {link} up"),
            format!("-n {router} addr add {}/30 dev near", address(2)),
            format!("-n {router} link set near up"),
            format!("-n {router} addr add {}/30 dev wide", address(5)),
            format!("-n {router} link set wide up"),
            format!("-n {worker} addr add {worker_address}/30 dev far"),
            format!("-n {worker} link set far up"),
            format!("-n {worker} route add default via {}", address(5)),
            format!("route add {}/30 via {}", address(4), address(2)),
        ];
        // What needs the rights comes first; what fails later is a fault of this test.
        let (rights, rest) = commands.split_at(4);
        for command in rights {
            ip(command)?;
        }
        for command in rest {
            ip(command).unwrap();
        }
        let forward = ["netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"];
        assert!(Command::new("ip").args(forward).status().unwrap().success());
        Ok(net)
    }

    fn cut(&self, lost: Lost) {
        if lost != Lost::Answers {
            ip(&format!("-n {} rule add pref 1 from {} blackhole", self.router, self.worker_address)).unwrap();
        }
        if lost != Lost::Questions {
            ip(&format!("-n {} rule add pref 1 to {} blackhole", self.router, self.worker_address)).unwrap();
        }
    }

    /// ICMP messages of the router: it is to be silent.
    fn told(&self) -> String {
        let output =
            Command::new("ip").args(["netns", "exec", &self.router, "cat", "/proc/net/snmp"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let icmp: Vec<Vec<&str>> =
            text.lines().filter(|line| line.starts_with("Icmp:")).map(|line| line.split(' ').collect()).collect();
        icmp[1][icmp[0].iter().position(|name| *name == "OutMsgs").unwrap()].to_owned()
    }

    fn mend(&self) {
        while ip(&format!("-n {} rule del pref 1", self.router)).is_ok() {}
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for command in [
            format!("link del {}", self.link),
            format!("netns del {}", self.worker),
            format!("netns del {}", self.router),
        ] {
            // Some may not have been made.
            let _gone = ip(&command);
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("ip (package iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Seconds on the clock of leases, as scripts read it from here too.
fn uptime() -> f64 {
    std::fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse().unwrap()
}

/// What a script wrote: attempt and time of each sign of life, in the order in which they came.
fn beats(file: &PathBuf) -> Vec<(i32, f64)> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let parse = |line: &str| {
        let (attempt, time) = line.split_once(' ')?;
        Some((attempt.parse().ok()?, time.parse().ok()?))
    };
    text.split_inclusive('\n').filter_map(|line| parse(line.strip_suffix('\n')?)).collect()
}

/// Cuts a worker off while it runs a build. `limits`: its lease and its grace in `settings`.
async fn cut_off(lost: Lost, settings: &[(&str, &str)], limits: (Duration, Duration)) {
    let net = match Net::new() {
        Ok(net) => net,
        Err(why) => return println!("NOT TESTED, this machine gives us no network namespaces: {why}"),
    };
    let folder = temp_dir();
    let hba = folder.path().join("pg_hba.conf");
    std::fs::write(&hba, format!("local all all trust\nhost all all {}/32 trust\n", net.worker_address)).unwrap();
    let options = Options {
        settings: vec![("hba_file".into(), hba.display().to_string())],
        tcp_port: Some(0),
        tcp_address: Some(net.server_address.parse().unwrap()),
        ..Options::default()
    };
    let server = tokio::task::spawn_blocking(|| Server::start(options).unwrap()).await.unwrap();
    let db = Db::on(&server).await;
    let file = folder.path().join("beats");
    // On the first worker it lives for ever, and is terminated in vain; on the second it ends at once.
    let script = format!(
        "[ $BUILD_WORKER = second ] || trap '' TERM\n\
         while :; do read -r up rest < /proc/uptime; echo \"$BUILD_ATTEMPT $up\" >> '{}'; [ $BUILD_WORKER = first ] || exit 0; sleep 0.05; done",
        file.display()
    );
    db.builder("b", &script).await;
    db.builder("of-the-first", "true").await;
    db.execute("UPDATE builders SET labels = '{first}' WHERE name = 'of-the-first'").await;

    let inside =
        Launch { before: ["ip", "netns", "exec", &net.worker].map(str::to_owned).to_vec(), ..Launch::default() };
    let url = format!("postgresql://postgres@{}:{}/postgres", net.server_address, server.port());
    let labels = [settings, &[("BUILDREACTOR_WORKER_LABELS", "first")]].concat();
    let mut first = Daemon::launch(inside, &url, "first", &labels);
    first.ready().await;
    let id = db.enqueue("b").await;
    wait_for("signs of life", || async { beats(&file).len() > 10 }).await;
    let second = Daemon::start(&db, "second", settings).await;
    assert!(db.one::<bool>("SELECT claim_held AND worker = 'first' FROM running_builds").await);

    let (lease, grace) = limits;
    // The server ends a silent claim at the latest 10 s after the lease; then others wait.
    let at_most = lease + Duration::from_secs(10) + grace + Duration::from_secs(10);
    let pid: i32 = db.one("SELECT claim_pid FROM running_builds").await;
    net.cut(lost);
    let cut = uptime();
    if lost == Lost::BothAndTheClaim {
        db.execute(&format!("SELECT pg_terminate_backend({pid})")).await;
    }
    wait_for_within(at_most, "the end of the tree", || async { processes_of(&first.state).is_empty() }).await;
    let dead = uptime();
    assert_eq!(
        db.one::<String>("SELECT concat_ws(' ', worker, attempt) FROM builds WHERE id = 1").await,
        "first 1",
        "it is dead before another starts it"
    );
    assert!(beats(&file).iter().all(|(attempt, _)| *attempt == 1));
    first.says(&format!("is stopped: its claim was lost for longer than the lease of {} s", lease.as_secs())).await;
    let verdict = format!("SELECT state = 'passed' FROM builds WHERE id = {id}");
    db.wait_within(at_most + Duration::from_secs(30), &verdict).await;
    let all = beats(&file);
    let begun = all.iter().position(|(attempt, _)| *attempt == 2).expect("a second attempt");
    assert!(begun == all.len() - 1, "nothing but the second attempt once it has begun");
    let (last, started) = (all[begun - 1].1, all[begun].1);
    assert!(last < started);
    println!(
        "{lost:?} lost, lease {} s, grace {} s: last sign of life {:.1} s after the cut, tree seen dead {:.1} s, started elsewhere {:.1} s",
        lease.as_secs(),
        grace.as_secs(),
        last - cut,
        dead - cut,
        started - cut
    );
    assert!(last - cut < (lease + Duration::from_secs(10)).as_secs_f64(), "within the lease and the time to kill");
    assert!(started - cut < at_most.as_secs_f64(), "{:.1} s", started - cut);

    assert_eq!(net.told(), "0", "nobody was told");
    net.mend();
    first.says("no longer ours").await;
    let next = db.enqueue("of-the-first").await;
    assert_eq!(db.finished(next).await, "passed", "the first one works again");
    let attempts: Vec<String> = db
        .all(&format!("SELECT concat_ws(' ', attempt, worker, state, detail) FROM build_attempts WHERE build_id = {id} ORDER BY attempt"))
        .await;
    assert_eq!(attempts, ["1 first lost worker `first` disappeared", "2 second passed"]);
    assert_eq!(db.finished(id).await, "passed");
    assert_eq!(beats(&file).len(), all.len(), "nothing was started again");
    drop((first, second, db));
}

fn small() -> (Duration, Duration) {
    (Duration::from_secs(3), Duration::from_secs(13))
}

#[tokio::test]
async fn a_worker_that_is_cut_off_is_dead_before_another_starts_its_build() {
    cut_off(Lost::Both, &SMALL, small()).await;
}

#[tokio::test]
async fn a_worker_that_hears_no_answers_is_dead_before_another_starts_its_build() {
    cut_off(Lost::Answers, &SMALL, small()).await;
}

#[tokio::test]
async fn a_worker_that_nobody_hears_is_dead_before_another_starts_its_build() {
    cut_off(Lost::Questions, &SMALL, small()).await;
}

#[tokio::test]
async fn a_worker_that_is_cut_off_and_loses_its_claim_is_dead_before_another_starts_its_build() {
    cut_off(Lost::BothAndTheClaim, &SMALL, small()).await;
}

/// Some 80 s of waiting.
#[tokio::test]
async fn a_worker_that_is_cut_off_is_dead_before_another_starts_its_build_with_the_default_numbers() {
    cut_off(Lost::Both, &[HOUR], (Duration::from_secs(40), Duration::from_secs(60))).await;
}
