//! Goes through the folders of attempts: tidies those whose end is recorded and that a full disk or a crash has left untidy, and removes
//! old ones, because their logs are kept for `[log] keep`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::database::Database;
use crate::executor::process::{self, RECORDED};
use crate::model::{AttemptId, BuildId};
use crate::reactor::in_hand::InHand;

/// Between two rounds.
const PERIOD: Duration = Duration::from_secs(3600);

/// Between two rounds while a folder could not be tidied.
const SOON: Duration = Duration::from_secs(120);

/// Goes round for ever. What frees space comes first.
pub async fn run(database: Database, in_hand: InHand, attempts: PathBuf, keep: Duration) {
    loop {
        let untidy = recorded(&database, &in_hand, &attempts).await;
        let folder = attempts.clone();
        let swept = tokio::task::spawn_blocking(move || {
            let left = untidy.iter().filter(|dir| !is_tidied(dir)).count();
            sweep(&folder, keep).map(|removed| (left, removed))
        });
        let mut pause = PERIOD;
        match swept.await {
            Ok(Ok((left, removed))) => {
                if removed > 0 {
                    tracing::info!(removed, "removed folders of old attempts");
                }
                if left > 0 {
                    pause = SOON;
                }
            }
            Ok(Err(error)) => tracing::warn!("cannot remove old attempts in `{}`: {error}", attempts.display()),
            Err(error) => tracing::error!("the janitor failed: {error}"),
        }
        tokio::time::sleep(pause).await;
    }
}

/// Tidies a folder; says whether nothing is left to be done.
fn is_tidied(dir: &Path) -> bool {
    match process::tidy(dir) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!("cannot tidy `{}`: {error}", dir.display());
            false
        }
    }
}

/// Untidy folders of attempts whose end is recorded. Either the folder says so, or the database does.
async fn recorded(database: &Database, in_hand: &InHand, attempts: &Path) -> Vec<PathBuf> {
    let folder = attempts.to_owned();
    let all = tokio::task::spawn_blocking(move || untidy(&folder)).await.unwrap_or_default();
    let mut found = Vec::new();
    for Untidy { dir, id, started_us } in all {
        // The reactor tidies this one, or its attempt still runs.
        if in_hand.has(id) {
            continue;
        }
        let ended = match started_us {
            None => true,
            Some(started_us) => match database.attempt_state(id, started_us).await {
                Ok(Some((state, _))) => state != "running",
                // The attempt is another database's, or its build is deleted, or nobody knows now. The folder goes when it is old.
                Ok(None) | Err(_) => false,
            },
        };
        if ended {
            found.push(dir);
        }
    }
    found
}

struct Untidy {
    dir: PathBuf,
    id: AttemptId,
    /// Where the folder does not say that the end of its attempt is recorded: the start of the attempt.
    started_us: Option<i64>,
}

fn untidy(attempts: &Path) -> Vec<Untidy> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(attempts).into_iter().flatten().flatten() {
        let dir = entry.path();
        let Some(id) = entry.file_name().to_str().and_then(attempt_id) else { continue };
        if !process::is_untidy(&dir) {
            continue;
        }
        let recorded = dir.join(RECORDED).exists();
        let started_us = if recorded { None } else { process::started(&dir) };
        if recorded || started_us.is_some() {
            found.push(Untidy { dir, id, started_us });
        }
    }
    found
}

/// The attempt that a folder is named for.
fn attempt_id(name: &str) -> Option<AttemptId> {
    let (build, attempt) = name.split_once('.')?;
    Some(AttemptId { build: BuildId(build.parse().ok()?), attempt: attempt.parse().ok()? })
}

/// Removes folders of attempts that have not changed for `keep`, and goes on when one cannot be removed. A folder changes when
/// its attempt begins and ends, and no attempt takes longer than 30 days.
fn sweep(attempts: &Path, keep: Duration) -> std::io::Result<usize> {
    const LONGEST: Duration = Duration::from_secs(30 * 86_400);
    let mut removed = 0;
    for entry in std::fs::read_dir(attempts)? {
        let folder = entry?.path();
        // What has ended and is not recorded yet waits for its database.
        let status = std::fs::metadata(folder.join(RECORDED));
        let keep = if status.is_ok() { keep } else { keep.max(LONGEST) };
        let Ok(changed) = status.or_else(|_| std::fs::metadata(&folder)).and_then(|found| found.modified()) else {
            continue;
        };
        let age = SystemTime::now().duration_since(changed).unwrap_or_default();
        if age > keep {
            match process::remove_path(&folder) {
                Ok(()) => removed += 1,
                Err(error) => tracing::warn!("cannot remove `{}`: {error}", folder.display()),
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ended_and_old_attempts_go() {
        let root = std::env::temp_dir().join(format!("buildreactor-janitor-{}", std::process::id()));
        for name in ["1.1", "2.1", "3.1"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        for name in ["1.1", "2.1"] {
            std::fs::write(root.join(name).join(RECORDED), "{}").unwrap();
        }
        let old = SystemTime::now() - Duration::from_secs(7200);
        std::fs::File::open(root.join("1.1").join(RECORDED)).unwrap().set_modified(old).unwrap();
        assert_eq!(sweep(&root, Duration::from_secs(3600)).unwrap(), 1);
        assert!(!root.join("1.1").exists() && root.join("2.1").exists() && root.join("3.1").exists());
        std::fs::remove_dir_all(root).unwrap();
    }
}
