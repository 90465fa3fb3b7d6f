//! Tidies the folder of an attempt whose end is recorded, again and again: the disk may be full, or something may hold the folder.

use std::path::Path;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::executor::process;

/// After the first try; doubled after each.
const AGAIN: Duration = Duration::from_secs(1);

/// The last one comes some eight minutes after the first. What remains then is left to the janitor, who goes round for ever.
const TRIES: u32 = 10;

/// Comes back when it is done, or was left to the janitor of this daemon or the next.
pub async fn tidy(dir: &Path, leaving: &CancellationToken, giving_back: &CancellationToken) {
    let mut pause = AGAIN;
    for tried in 1..=TRIES {
        let folder = dir.to_owned();
        match tokio::task::spawn_blocking(move || process::tidy(&folder)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) if tried == 1 => tracing::warn!("cannot tidy `{}` yet: {error}", dir.display()),
            Ok(Err(_)) => {}
            Err(error) => {
                tracing::error!("tidying `{}` failed, please report this: {error}", dir.display());
                return;
            }
        }
        if tried < TRIES {
            tokio::select! {
                () = tokio::time::sleep(pause) => pause *= 2,
                () = leaving.cancelled() => return,
                () = giving_back.cancelled() => return,
            }
        }
    }
}
