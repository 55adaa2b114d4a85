//! Where the store is opened.

use std::path::Path;
use std::sync::Arc;

use databuild_logs::{FileLogStore, FileStoreOptions, LogError, LogStore};

/// The store of a service: it holds the index, and keeps others from holding it.
pub(crate) fn open_for_service(dir: &Path) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(FileLogStore::open(dir, FileStoreOptions::default())?))
}

/// The folder without its index, for any number of processes at once.
pub(crate) fn open_folder(dir: &Path) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(FileLogStore::open_folder(dir, FileStoreOptions::default())?))
}

/// Makes a call that may wait for a disk.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    tokio::task::spawn_blocking(call).await.unwrap_or(Err(LogError::Closed))
}
