//! Removes folders of old attempts: their logs are kept for `[log] keep`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::executor::process::RECORDED;

/// Between two rounds.
const PERIOD: Duration = Duration::from_secs(3600);

/// Goes round for ever.
pub async fn run(attempts: PathBuf, keep: Duration) {
    loop {
        let folder = attempts.clone();
        match tokio::task::spawn_blocking(move || sweep(&folder, keep)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => tracing::info!(removed, "removed folders of old attempts"),
            Ok(Err(error)) => tracing::warn!("cannot remove old attempts in `{}`: {error}", attempts.display()),
            Err(error) => tracing::error!("the janitor failed: {error}"),
        }
        tokio::time::sleep(PERIOD).await;
    }
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
            match std::fs::remove_dir_all(&folder) {
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
