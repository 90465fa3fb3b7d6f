//! The freezer of control groups: what is in it stands still, and is not told.

use std::io::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{SOON, unique, wait_for};

/// A control group of one's own. Gone when dropped, after those that are in it.
pub struct Freezer {
    path: PathBuf,
    first_version: bool,
}

/// What is in it stands still until this is dropped: those who clean up after a failed test wait for it.
pub struct Frozen<'a>(&'a Freezer);

impl Freezer {
    /// Of either version of control groups, or why there can be none.
    pub fn of_either_version() -> Result<Freezer, Error> {
        Freezer::first_version().or_else(|_| {
            let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
            let place = places.into_iter().find(|place| place.join("cgroup.controllers").exists());
            Freezer::below(place.ok_or(std::io::ErrorKind::NotFound)?, false)
        })
    }

    /// What is frozen there does not even die of SIGKILL until it is thawed, as one that waits for a disk.
    pub fn first_version() -> Result<Freezer, Error> {
        Freezer::below(Path::new("/sys/fs/cgroup/freezer"), true)
    }

    fn below(place: &Path, first_version: bool) -> Result<Freezer, Error> {
        let path = place.join(format!("buildreactor-{}-{}", std::process::id(), unique()));
        std::fs::create_dir(&path)?;
        Ok(Freezer { path, first_version })
    }

    /// What stands before a command that is to be in it, with all that it starts.
    pub fn before(&self) -> Vec<String> {
        let script = format!("echo $$ > '{}' && exec \"$@\"", self.path.join("cgroup.procs").display());
        ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
    }

    /// Puts a process into it.
    pub fn take(&self, pid: i32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub async fn freeze(&self) -> Frozen<'_> {
        let frozen = Frozen(self);
        self.order(true).unwrap();
        let (file, word) = if self.first_version { ("freezer.state", "FROZEN") } else { ("cgroup.events", "frozen 1") };
        wait_for("all in it to stand still", || async {
            std::fs::read_to_string(self.path.join(file)).unwrap().lines().any(|line| line == word)
        })
        .await;
        frozen
    }

    fn order(&self, freeze: bool) -> Result<(), Error> {
        let (file, words) =
            if self.first_version { ("freezer.state", ["THAWED", "FROZEN"]) } else { ("cgroup.freeze", ["0", "1"]) };
        std::fs::write(self.path.join(file), words[usize::from(freeze)])
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _thawed = self.0.order(false);
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let deadline = Instant::now() + SOON;
        // Not while somebody is in it.
        while std::fs::remove_dir(&self.path).is_err() && Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
