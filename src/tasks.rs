//! The one way to start a task that is not in a JoinSet or TaskTracker.

use tokio_util::task::AbortOnDropHandle;

/// Runs `future` until it ends or the handle is dropped. Awaiting the handle tells of a panic.
#[expect(clippy::disallowed_methods, reason = "the handle keeps the task from outliving its owner")]
pub fn spawn<F>(future: F) -> AbortOnDropHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    AbortOnDropHandle::new(tokio::task::spawn(future))
}
