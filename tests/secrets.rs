//! What the daemon knows and builds must not: its environment, its memory, its command line, and the logs of others.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use crate::support::beating::Beating;
use crate::support::{Daemon, Db, Launch, TempDir, below, copy_program, name_of, server, temp_dir, wait_for};

const HOUR: (&str, &str) = ("BUILDREACTOR_REACTOR_POLL", "1h");

/// In each of them the same word.
const SECRET: &str = "open-sesame-7";
const VARIABLES: [(&str, &str); 6] = [
    ("PGPASSWORD", "open-sesame-7"),
    ("BUILDREACTOR_MAIL_PASSWORD", "open-sesame-7"),
    ("BUILDREACTOR_TEST_ANY", "open-sesame-7"),
    ("OUR_DEPLOY_TOKEN", "open-sesame-7"),
    ("https_proxy", "http://user:open-sesame-7@proxy.example.org:3128"),
    ("harmless", "open-sesame-7"),
];

fn with_secrets(db: &Db) -> (String, Vec<(&'static str, &'static str)>) {
    let url = format!("{}{}password={SECRET}", db.url(), if db.url().contains('?') { "&" } else { "?" });
    (url, [&[HOUR], &VARIABLES[..]].concat())
}

/// Whether a process has the word in its memory.
fn remembers(pid: i32) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // Some parts cannot be read by anybody.
        let read = memory.read_at(&mut bytes, from).unwrap_or(0);
        if bytes[..read].windows(SECRET.len()).any(|window| window == SECRET.as_bytes()) {
            return true;
        }
    }
    false
}

#[tokio::test]
async fn what_the_daemon_was_started_with_is_neither_shown_nor_handed_down() {
    let db = Db::new().await;
    let (url, settings) = with_secrets(&db);
    let build = Beating::new();
    db.builder("b", &build.script()).await;
    let daemon = Daemon::start_at(&url, "w", &settings).await;
    let id = db.enqueue("b").await;
    build.beats_in(1).await;
    let keeper = daemon.keeper().unwrap();
    let mut looked = Vec::new();
    let own = |pid: &i32| name_of(*pid).starts_with("br-");
    for pid in [daemon.pid()].into_iter().chain(below(keeper).into_iter().filter(own)) {
        for file in ["environ", "cmdline"] {
            let shown = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
            let shown = String::from_utf8_lossy(&shown);
            assert!(!shown.contains(SECRET), "{} {file}: {shown}", name_of(pid));
        }
        looked.push(name_of(pid));
        // What a daemon needs again it has to remember. Where builds see it, nobody may look: see below.
        if pid != daemon.pid() && nix::unistd::geteuid().is_root() {
            assert!(!remembers(pid), "{}", name_of(pid));
        }
    }
    for name in ["buildreactor", "br-keeper", "br-guardian"] {
        assert!(looked.iter().any(|looked| looked == name), "{name} in {looked:?}");
    }
    if nix::unistd::geteuid().is_root() {
        assert!(remembers(daemon.pid()), "or this test does not see what it looks for");
    }
    build.open();
    assert_eq!(db.finished(id).await, "failed");
}

/// Where an ordinary user runs the daemon, and builds are that user's too.
const LOOKS: &str = r#"
cd "$BUILD_DIR/../../.."
id -u
keeper=$(cat keeper.lock)
for pid in $(cat daemon.lock) $keeper $(cat /proc/$keeper/task/$keeper/children); do
    cat /proc/$pid/comm
    for file in environ mem maps auxv fd/0 exe root cwd; do
        if head -c 1 /proc/$pid/$file >/dev/null 2>&1 || ls /proc/$pid/$file/ >/dev/null 2>&1 || readlink /proc/$pid/$file; then
            echo "$file of $pid is open"
        fi
    done
    ls /proc/$pid/fd /proc/$pid/map_files >/dev/null 2>&1 && echo "files of $pid are open"
done
cat /proc/self/environ >/dev/null && ls /proc/self/fd >/dev/null && readlink /proc/$$/exe >/dev/null && echo 'mine are mine'
"#;

/// The program where everybody may start it, and the one who may enter the folder of the server's socket.
fn ordinary_user() -> Option<(Launch, TempDir)> {
    if !nix::unistd::geteuid().is_root() {
        return Some((Launch::default(), temp_dir()));
    }
    let folder = temp_dir();
    let owner = std::fs::metadata(server().socket_dir()).unwrap();
    let program = folder.path().join("buildreactor");
    copy_program(&program);
    for path in [folder.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    Some((Launch { program, user: Some((owner.uid(), owner.gid())), ..Launch::default() }, folder))
}

#[tokio::test]
async fn a_build_of_the_same_ordinary_user_cannot_look_into_daemon_keeper_and_guardians() {
    let db = Db::new().await;
    let (url, settings) = with_secrets(&db);
    let (launch, _program) = ordinary_user().unwrap();
    let user = launch.user.map_or_else(|| nix::unistd::getuid().as_raw(), |(user, _)| user);
    let mut daemon = Daemon::launch(launch, &url, "w", &settings);
    daemon.ready().await;
    db.builder("b", LOOKS).await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    assert_eq!(log, format!("{user}\nbuildreactor\nbr-keeper\nbr-guardian\nmine are mine\n"));
}

#[tokio::test]
async fn a_build_of_root_finds_no_process_outside_its_namespace_under_what_is_mounted() {
    let folder = temp_dir();
    let second = folder.path().join("an other/proc");
    std::fs::create_dir_all(&second).unwrap();
    // A machine has more than one: containers, chroots. One of them lies upon another.
    let mounts = format!(
        "mount -t proc proc '{0}' && mount -t proc proc '{0}' && mount --bind /proc/sys '{1}' && exec \"$@\"",
        second.display(),
        std::fs::create_dir(folder.path().join("part")).map(|()| folder.path().join("part")).unwrap().display()
    );
    let before = ["unshare", "--mount", "sh", "-c", &mounts, "sh"].map(str::to_owned).to_vec();
    if !nix::unistd::geteuid().is_root() {
        return println!("NOT TESTED, we are not root");
    }
    let db = Db::new().await;
    let (url, settings) = with_secrets(&db);
    let mut daemon = Daemon::launch(Launch { before, ..Launch::default() }, &url, "w", &settings);
    daemon.ready().await;
    if db.one::<String>("SELECT detail FROM workers").await != "process trees: PID namespace" {
        return println!("NOT TESTED, there are no namespaces here");
    }
    // How many processes it sees at first, and whether it ever sees the daemon.
    let script = format!(
        r#"#!/bin/sh
        daemon=$(cat "$BUILD_DIR/../../../daemon.lock")
        look() {{
            for proc in /proc '{0}' /mnt; do
                for name in "$proc"/*/comm; do
                    case $(cat "$name" 2>/dev/null) in buildreactor|br-keeper|br-guardian) echo "$name is in sight";; esac
                done
                grep -l BUILDREACTOR "$proc"/*/environ 2>/dev/null
            done
        }}
        ls -d /proc/[0-9]* | wc -l
        look
        umount -l '{0}'; look
        umount -l /proc; look
        umount -l /proc; look
        umount -l '{0}'; look
        mount -t proc proc /mnt && look; umount /mnt
        nsenter -t "$daemon" -m true 2>/dev/null && echo 'it is there'
        [ ! -e '{1}/kernel' ] || echo 'a part of it is there'
        echo done
        "#,
        second.display(),
        folder.path().join("part").display()
    );
    db.builder("b", &script).await;
    let id = db.enqueue("b").await;
    assert_eq!(db.finished(id).await, "passed");
    let log: String = db.one(&format!("SELECT build_log_text({id})")).await;
    let told: Vec<&str> = log.lines().filter(|line| !line.starts_with("umount: ")).collect();
    let [seen, "done"] = told[..] else { panic!("{log}") };
    assert!(seen.parse::<u32>().unwrap() <= 6, "{log}");
    // And outside everything is where it was.
    assert!(Path::new(&format!("/proc/{}", daemon.pid())).exists());
    let again = db.enqueue("b").await;
    assert_eq!(db.finished(again).await, "passed");
}

fn modes(dir: &Path) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        // The working directory is the build's own.
        if name != "work" {
            // The oldest part of the end of a log goes when the newest comes.
            found.extend(entry.metadata().ok().map(|found| (name, found.mode() & 0o7777)));
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn logs_and_folders_of_attempts_are_for_the_workers_user_alone_whatever_the_umask() {
    for mask in ["0000", "0022", "0077", "0777"] {
        let db = Db::new().await;
        let before = ["sh", "-c", &format!("umask {mask}; exec \"$@\""), "sh"].map(str::to_owned).to_vec();
        if mask == "0777" && !nix::unistd::geteuid().is_root() {
            continue;
        }
        let limits = [HOUR, ("BUILDREACTOR_LOG_DATABASE_LIMIT", "64 KiB"), ("BUILDREACTOR_LOG_FILE_LIMIT", "64 KiB")];
        let mut daemon = Daemon::launch(Launch { before, ..Launch::default() }, &db.url(), "w", &limits);
        let attempts = daemon.state.path().join("w/attempts");
        // As an older program left it.
        std::fs::create_dir_all(&attempts).unwrap();
        std::fs::set_permissions(&attempts, std::fs::Permissions::from_mode(0o755)).unwrap();
        daemon.ready().await;
        let gate = temp_dir();
        let gate = gate.path().join("gate");
        let script = format!("umask; seq 50000; while [ ! -e {} ]; do sleep 0.05; done", gate.display());
        db.builder("b", &script).await;
        let id = db.enqueue("b").await;
        let attempt = attempts.join(format!("{id}.1"));
        let segments = || modes(&attempt).iter().filter(|(name, _)| name.starts_with("log.")).count();
        wait_for("a long log", || async { attempt.exists() && segments() > 1 }).await;
        let check = |when: &str| {
            for folder in [&attempts, &attempt] {
                assert_eq!(std::fs::metadata(folder).unwrap().mode() & 0o7777, 0o700, "umask {mask}, {when}");
            }
            let modes = modes(&attempt);
            assert!(modes.len() >= 4, "{modes:?}");
            for (name, mode) in modes {
                let expected = if name == "script" { 0o700 } else { 0o600 };
                assert_eq!(mode, expected, "umask {mask}, {when}: {name}");
            }
        };
        check("while it runs");
        std::fs::write(&gate, "").unwrap();
        assert_eq!(db.finished(id).await, "passed");
        wait_for("its folder to be tidied up", || async { attempt.join("recorded.json").exists() && segments() == 0 })
            .await;
        check("at the end");
        assert!(db.one::<String>(&format!("SELECT build_log_text({id})")).await.starts_with(&format!("{mask}\n")));
    }
}
