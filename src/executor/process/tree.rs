//! Who descends from whom, read from `/proc`, and signals that reach nobody else.
//!
//! A number that was read from `/proc` is a hint. The process may end, and the kernel may give its number to a stranger, before the
//! next line of this file runs: numbers are few, and a guardian may be stopped for long. So a signal goes through a pidfd
//! (pidfd_open(2)), in three steps: pin, make sure that the pinned process still descends from us, send. No number is reused while
//! its process has not been waited for, so what is read of a number between the pin and a send that succeeds is of the pinned process.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};

/// So many processes are pinned at a time: a process may have 1024 files open as a rule (getrlimit(2)).
const AT_ONCE: usize = 256;

/// A process as a look at `/proc` saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    pub pid: Pid,
    parent: Pid,
}

/// What became of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The process has it. It may be a zombie, to which signals mean nothing.
    Delivered,
    /// There is no such process any more.
    Gone,
    /// It is another user's (EPERM).
    Refused,
    /// Not sent. The number is not known to be of a descendant now: a stranger has it, or the process was given to another parent
    /// that very moment. The next look tells.
    Unsure,
}

/// All living descendants of `root` (without itself), parents before children. As `root` is a subreaper, a process that
/// double-forked, called setsid or was orphaned still descends from it.
pub fn descendants(root: Pid) -> Vec<Listed> {
    descendants_beside(root, &[])
}

/// As [`descendants`], without `spared` and what is below them. One look at the processes decides, never two: a process that was
/// forked between them would be taken for one that is not below `spared`.
pub fn descendants_beside(root: Pid, spared: &[Pid]) -> Vec<Listed> {
    // On a machine full of processes reading them all takes longer than a process of a fork bomb lives. What the kernel lists as children
    // may lack some when others end meanwhile (proc(5)), so an empty answer is not believed.
    let found = walk(root, spared, |pid| children_of(pid).unwrap_or_default());
    if found.is_empty() { all_beside(root, spared) } else { found }
}

fn all_beside(root: Pid, spared: &[Pid]) -> Vec<Listed> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if let Some(parent) = parent_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    walk(root, spared, |pid| children.remove(&pid).unwrap_or_default())
}

fn walk(root: Pid, spared: &[Pid], mut children: impl FnMut(i32) -> Vec<i32>) -> Vec<Listed> {
    let mut found = Vec::new();
    let mut next = vec![root];
    // A number that changes hands during the look could make a circle of what it read.
    let mut seen = HashSet::from([root]);
    while let Some(parent) = next.pop() {
        for child in children(parent.as_raw()) {
            let pid = Pid::from_raw(child);
            if !spared.contains(&pid) && seen.insert(pid) {
                found.push(Listed { pid, parent });
                next.push(pid);
            }
        }
    }
    found
}

/// Children of all threads of a process, where the kernel lists them (CONFIG_PROC_CHILDREN).
fn children_of(pid: i32) -> Option<Vec<i32>> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).ok()?;
        found.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    Some(found)
}

/// Parent of a process (proc(5), `/proc/PID/stat`: field 4, the second after the name in parentheses, which may itself
/// contain anything). Zombies count: one may be the dead first thread of a process that lives on.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    fields.nth(1)?.parse().ok()
}

/// Pins processes. Each step of a signal is a function of its own, so that a test can give a number to somebody else in between.
struct Pinned(Vec<(Pid, Pin)>);

enum Pin {
    Held(OwnedFd),
    /// Nothing can be pinned here: a kernel before 5.3, a seccomp filter, or no file left to open. Such a process is signalled by its
    /// number, right after the look that found it to be ours. That leaves some microseconds.
    ByNumber,
    Gone,
    /// The number is of a thread now.
    Changed,
}

impl Pinned {
    fn these(pids: &[Pid]) -> Pinned {
        let pin = |pid: &Pid| {
            let Some(number) = rustix::process::Pid::from_raw(pid.as_raw()) else { return (*pid, Pin::Changed) };
            let pin = match pidfd_open(number, PidfdFlags::empty()) {
                Ok(held) => Pin::Held(held),
                Err(rustix::io::Errno::SRCH) => Pin::Gone,
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Pin::Changed,
                Err(_) => Pin::ByNumber,
            };
            (*pid, pin)
        };
        Pinned(pids.iter().map(pin).collect())
    }

    /// Sends to those that descend from `root` now, and neither are nor descend from `spared`. `looked`: the look that named them.
    fn send(self, root: Pid, spared: &[Pid], looked: &[Listed], signal: Signal) -> Vec<(Pid, Sent)> {
        let pids: Vec<Pid> = self.0.iter().map(|(pid, _)| *pid).collect();
        let ours = still_below(root, spared, &pids, looked);
        let send = |(pid, pin): (Pid, Pin)| {
            let sent = match pin {
                Pin::Gone => Sent::Gone,
                Pin::Changed => Sent::Unsure,
                Pin::Held(_) | Pin::ByNumber if !ours.contains(&pid) => Sent::Unsure,
                Pin::Held(held) => match rustix::process::Signal::from_named_raw(signal as i32) {
                    Some(signal) => {
                        outcome(pidfd_send_signal(held, signal).map_err(|e| Errno::from_raw(e.raw_os_error())))
                    }
                    None => Sent::Unsure,
                },
                Pin::ByNumber => outcome(kill(pid, signal)),
            };
            (pid, sent)
        };
        self.0.into_iter().map(send).collect()
    }
}

fn outcome(sent: Result<(), Errno>) -> Sent {
    match sent {
        Ok(()) => Sent::Delivered,
        Err(Errno::ESRCH) => Sent::Gone,
        Err(Errno::EPERM) => Sent::Refused,
        Err(_) => Sent::Unsure,
    }
}

/// Those of `pids` whose numbers are of descendants of `root` now.
///
/// Parents are read before their children. Each of `pids` was pinned before the first of these reads, and the ancestors of a living
/// process only become fewer: an orphan goes to one of its former ancestors. So the parent that a process names was its ancestor, and
/// held its number, at the earlier time when that number was read.
fn still_below(root: Pid, spared: &[Pid], pids: &[Pid], looked: &[Listed]) -> HashSet<Pid> {
    let parents: HashMap<Pid, Pid> = looked.iter().map(|listed| (listed.pid, listed.parent)).collect();
    let mut wanted = HashSet::new();
    for pid in pids {
        let mut at = *pid;
        while at != root && wanted.insert(at) {
            let Some(parent) = parents.get(&at) else { break };
            at = *parent;
        }
    }
    let mut ours = HashSet::from([root]);
    let mut children = None;
    // A look names parents before children.
    for pid in looked.iter().map(|listed| listed.pid).filter(|pid| wanted.contains(pid) && !spared.contains(pid)) {
        let known = parent_of(pid.as_raw()).is_some_and(|parent| ours.contains(&Pid::from_raw(parent)));
        // What /proc hides from us (hidepid) is named by its parent all the same.
        let mut named =
            || children.get_or_insert_with(|| children_of(root.as_raw()).unwrap_or_default()).contains(&pid.as_raw());
        if known || named() {
            ours.insert(pid);
        }
    }
    ours.remove(&root);
    ours
}

/// Sends `signal` to those that an earlier look has `listed`, as far as they still descend from `root` beside `spared`, and are `chosen`.
pub fn signal_listed(
    root: Pid,
    spared: &[Pid],
    listed: &[Listed],
    signal: Signal,
    chosen: impl Fn(Pid) -> bool,
) -> Vec<(Pid, Sent)> {
    let pids: Vec<Pid> = listed.iter().map(|listed| listed.pid).filter(|pid| chosen(*pid)).collect();
    pids.chunks(AT_ONCE).flat_map(|some| Pinned::these(some).send(root, spared, listed, signal)).collect()
}

/// Sends `signal` to every descendant of `root` that `which` names.
pub fn signal_descendants(root: Pid, signal: Signal, which: impl Fn(Pid) -> bool) {
    // Gone meanwhile, or another user's: those are counted as survivors in the end.
    let _sent = signal_listed(root, &[], &descendants(root), signal, which);
}

/// Descendants of `root` that are of another user, who alone can kill them. None while one may yet die: what is dead and not yet waited
/// for is on its way out, unless it is beside one of theirs, who may never wait for it.
pub fn left_for_good(root: Pid) -> Vec<Pid> {
    let mut theirs = Vec::new();
    for (pid, sent) in signal_listed(root, &[], &descendants(root), Signal::SIGKILL, |_| true) {
        match sent {
            Sent::Gone => {}
            _ if is_dead(pid) => {}
            Sent::Refused => theirs.push(pid),
            Sent::Delivered | Sent::Unsure => return Vec::new(),
        }
    }
    theirs
}

/// Whether `pid` descends from `root`. What cannot be seen (hidepid) does not.
pub fn is_below(root: Pid, pid: Pid) -> bool {
    let mut at = pid.as_raw();
    // More than there can be: a number that changes hands meanwhile could lead round and round.
    for _ in 0..1 << 22 {
        match parent_of(at) {
            Some(parent) if parent == root.as_raw() => return true,
            Some(parent) if parent > 0 => at = parent,
            Some(_) | None => return false,
        }
    }
    false
}

/// Dead in all its threads, and not yet waited for. What cannot be seen (another user's, where /proc hides those) is not taken for dead.
fn is_dead(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.rfind(')').is_some_and(|end| stat[end..].starts_with(") Z")) && threads() <= 1
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Lines, Write};
    use std::process::{Child, ChildStdout, Command, Stdio};

    use super::*;

    /// Set where the test runs in a PID namespace of its own.
    const INSIDE: &str = "BUILDREACTOR_TEST_NUMBERS";
    const OK: &str = "numbers were used again";

    /// A shell that says the number of a process below it, and when it has waited for that.
    struct Shell {
        process: Child,
        says: Lines<BufReader<ChildStdout>>,
    }

    impl Shell {
        fn start(script: &str) -> Shell {
            let mut command = Command::new("sh");
            let mut process =
                command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let says = BufReader::new(process.stdout.take().unwrap()).lines();
            Shell { process, says }
        }

        fn pid(&self) -> Pid {
            number(&self.process)
        }

        fn line(&mut self) -> String {
            self.says.next().unwrap().unwrap()
        }

        fn says_pid(&mut self) -> Pid {
            Pid::from_raw(self.line().parse().unwrap())
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            signal_descendants(self.pid(), Signal::SIGKILL, |_| true);
            self.process.kill().unwrap();
            self.process.wait().unwrap();
        }
    }

    fn number(process: &Child) -> Pid {
        Pid::from_raw(process.id().cast_signed())
    }

    const ONE_CHILD: &str = "sleep 600 & echo $!; wait $!; echo reaped; read line";

    fn all(root: Pid, listed: &[Listed]) -> Vec<Sent> {
        signal_listed(root, &[], listed, Signal::SIGKILL, |_| true).into_iter().map(|(_, sent)| sent).collect()
    }

    fn lives(process: &mut Child) -> bool {
        process.try_wait().unwrap().is_none()
    }

    #[test]
    fn descendants_at_any_depth_are_signalled_and_parents_come_first() {
        let mut shell = Shell::start(
            "sh -c 'sh -c \"sleep 600 & echo \\$\\$; wait\"; :' & sleep 600 & wait; echo reaped; read line",
        );
        let inner = shell.says_pid();
        let listed = descendants(shell.pid());
        assert!(listed.len() >= 4 && listed.iter().any(|listed| listed.pid == inner), "{listed:?}");
        for (at, one) in listed.iter().enumerate() {
            assert!(one.parent == shell.pid() || listed[..at].iter().any(|before| before.pid == one.parent));
        }
        // An orphan of this tree goes out of it: its root is no subreaper. So some may be lost on the way, but not the first.
        assert_eq!(all(shell.pid(), &listed)[0], Sent::Delivered);
    }

    #[test]
    fn numbers_of_strangers_of_their_children_and_of_the_spared_are_not_signalled() {
        let mut shell = Shell::start("sh -c 'sleep 600 & echo $!; wait; :' & echo $!; wait; read line");
        let (one, other) = (shell.says_pid(), shell.says_pid());
        let (spared, below) = if parent_of(one.as_raw()) == Some(other.as_raw()) { (other, one) } else { (one, other) };
        let mut stranger = Shell::start(ONE_CHILD);
        let his = stranger.says_pid();
        let root = shell.pid();
        // As if they had been ours when we looked.
        let lied = [Listed { pid: stranger.pid(), parent: root }, Listed { pid: his, parent: stranger.pid() }];
        assert_eq!(all(root, &lied), [Sent::Unsure, Sent::Unsure]);
        assert_eq!(all(root, &lied[1..]), [Sent::Unsure]);
        for listed in [vec![Listed { pid: below, parent: root }], descendants(root)] {
            let sent = signal_listed(root, &[spared], &listed, Signal::SIGKILL, |_| true);
            assert!(sent.iter().all(|(_, sent)| *sent == Sent::Unsure), "{sent:?}");
        }
        assert!(lives(&mut stranger.process));
        for pid in [spared, below, his] {
            assert!(kill(pid, None).is_ok() && !is_dead(pid), "{pid}");
        }
    }

    /// A process of ours with a number that another one has had.
    fn stranger_with(wanted: Pid) -> Child {
        for _ in 0..1000 {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (wanted.as_raw() - 1).to_string()).unwrap();
            let mut stranger = Command::new("sleep").arg("600").spawn().unwrap();
            if number(&stranger) == wanted {
                return stranger;
            }
            stranger.kill().unwrap();
            stranger.wait().unwrap();
        }
        panic!("{wanted} is not to be had");
    }

    fn end(shell: &mut Shell, victim: Pid) {
        kill(victim, Signal::SIGKILL).unwrap();
        assert_eq!(shell.line(), "reaped");
    }

    fn ended(mut stranger: Child) {
        assert!(lives(&mut stranger), "it was signalled");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    /// The kernel gives numbers again within seconds where much is forked; here it is told to.
    #[test]
    fn a_number_that_is_used_again_at_any_moment_takes_no_signal_to_its_new_owner() {
        if std::env::var_os(INSIDE).is_none() {
            let name = "executor::process::tree::tests::a_number_that_is_used_again_at_any_moment_takes_no_signal_to_its_new_owner";
            let output = Command::new("unshare")
                .args(["--pid", "--fork", "--mount-proc"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture", "--test-threads=1"])
                .env(INSIDE, "yes")
                .output();
            match output {
                Ok(output) if String::from_utf8_lossy(&output.stdout).contains("running 1 test") => {
                    assert!(
                        output.status.success() && String::from_utf8_lossy(&output.stdout).contains(OK),
                        "{output:?}"
                    );
                }
                other => println!("NOT TESTED, we may not make a PID namespace: {other:?}"),
            }
            return;
        }
        // Between the look and the pin.
        let mut shell = Shell::start(ONE_CHILD);
        let victim = shell.says_pid();
        let listed = descendants(shell.pid());
        assert_eq!(listed, [Listed { pid: victim, parent: shell.pid() }]);
        end(&mut shell, victim);
        assert_eq!(all(shell.pid(), &listed), [Sent::Gone]);
        let stranger = stranger_with(victim);
        assert_eq!(all(shell.pid(), &listed), [Sent::Unsure]);
        ended(stranger);

        // Between the pin and the signal.
        let mut shell = Shell::start(ONE_CHILD);
        let victim = shell.says_pid();
        let listed = descendants(shell.pid());
        let pinned = Pinned::these(&[victim]);
        end(&mut shell, victim);
        let stranger = stranger_with(victim);
        assert_eq!(pinned.send(shell.pid(), &[], &listed, Signal::SIGKILL), [(victim, Sent::Unsure)]);
        ended(stranger);

        // Its new owner is a child of the same parent: the pin tells that it is not the one that was seen.
        let mut shell =
            Shell::start("sleep 600 & echo $!; wait $!; echo reaped; read line; sleep 600 & echo $!; read line");
        let victim = shell.says_pid();
        let listed = descendants(shell.pid());
        let pinned = Pinned::these(&[victim]);
        end(&mut shell, victim);
        std::fs::write("/proc/sys/kernel/ns_last_pid", (victim.as_raw() - 1).to_string()).unwrap();
        shell.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert_eq!(shell.says_pid(), victim);
        assert_eq!(pinned.send(shell.pid(), &[], &listed, Signal::SIGKILL), [(victim, Sent::Gone)]);
        assert!(!is_dead(victim));
        println!("{OK}");
    }
}
