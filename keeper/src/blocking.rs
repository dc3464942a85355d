//! Work that blocks, away from the runtime's threads.

use tokio::task::JoinError;

/// In a simulation it is done at once: there, other threads would come back whenever they like.
pub(crate) async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    #[cfg(test)]
    if turmoil::in_simulation() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}
