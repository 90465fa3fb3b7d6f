//! Removes folders of old attempts: their logs are kept for `[log] keep`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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

/// Removes ended attempts (those with a status) that have not changed for `keep`.
fn sweep(attempts: &Path, keep: Duration) -> std::io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(attempts)? {
        let folder = entry?.path();
        let Ok(status) = std::fs::metadata(folder.join("status.json")) else { continue };
        let age = SystemTime::now().duration_since(status.modified()?).unwrap_or_default();
        if age > keep {
            std::fs::remove_dir_all(&folder)?;
            removed += 1;
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
            std::fs::write(root.join(name).join("status.json"), "{}").unwrap();
        }
        let old = SystemTime::now() - Duration::from_secs(7200);
        std::fs::File::open(root.join("1.1/status.json")).unwrap().set_modified(old).unwrap();
        assert_eq!(sweep(&root, Duration::from_secs(3600)).unwrap(), 1);
        assert!(!root.join("1.1").exists() && root.join("2.1").exists() && root.join("3.1").exists());
        std::fs::remove_dir_all(root).unwrap();
    }
}
