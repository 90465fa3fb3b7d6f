//! Who descends from whom, read from `/proc`.

use std::collections::HashMap;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// All living descendants of `root` (without itself), parents before children. As `root` is a subreaper, a process that
/// double-forked, called setsid or was orphaned still descends from it.
pub fn descendants(root: Pid) -> Vec<Pid> {
    descendants_beside(root, &[])
}

/// As [`descendants`], without `spared` and what is below them. One look at the processes decides, never two: a process that was
/// forked between them would be taken for one that is not below `spared`.
pub fn descendants_beside(root: Pid, spared: &[Pid]) -> Vec<Pid> {
    // On a machine full of processes reading them all takes longer than a process of a fork bomb lives. What the kernel lists as children
    // may lack some when others end meanwhile (proc(5)), so an empty answer is not believed.
    let found = walk(root, spared, |pid| children_of(pid).unwrap_or_default());
    if found.is_empty() { all_beside(root, spared) } else { found }
}

fn all_beside(root: Pid, spared: &[Pid]) -> Vec<Pid> {
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

fn walk(root: Pid, spared: &[Pid], mut children: impl FnMut(i32) -> Vec<i32>) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut next = vec![root.as_raw()];
    while let Some(pid) = next.pop() {
        for child in children(pid) {
            let pid = Pid::from_raw(child);
            if !spared.contains(&pid) {
                found.push(pid);
                next.push(child);
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

/// Those of `pids` that are of another user, who alone can kill them. None while one may yet die: what is dead and not yet waited for is
/// on its way out, unless it is beside one of theirs, who may never wait for it.
pub fn left_for_good(pids: &[Pid]) -> Vec<Pid> {
    let mut theirs = Vec::new();
    for pid in pids {
        match kill(*pid, Signal::SIGKILL) {
            // Gone.
            Err(nix::errno::Errno::ESRCH) => {}
            _ if is_dead(*pid) => {}
            Err(nix::errno::Errno::EPERM) => theirs.push(*pid),
            Ok(()) | Err(_) => return Vec::new(),
        }
    }
    theirs
}

/// Dead in all its threads, and not yet waited for. What cannot be seen (another user's, where /proc hides those) is not taken for dead.
fn is_dead(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.rfind(')').is_some_and(|end| stat[end..].starts_with(") Z")) && threads() <= 1
}

/// Sends `signal` to every descendant of `root` that `which` names.
pub fn signal_descendants(root: Pid, signal: Signal, which: impl Fn(Pid) -> bool) {
    for pid in descendants(root).into_iter().filter(|pid| which(*pid)) {
        // Gone meanwhile, or another user's: those are counted as survivors in the end.
        let _sent = kill(pid, signal);
    }
}
