//! Where the store is opened.

use std::io;
use std::path::Path;
use std::sync::Arc;

use databuild_logs::{FileLogStore, FileStoreOptions, LogError, LogStore};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// The store of a service: it holds the index, and keeps others from holding it.
pub(crate) fn open_for_service(dir: &Path, options: FileStoreOptions) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(FileLogStore::open(dir, options)?))
}

/// The folder without its index, for any number of processes at once.
pub(crate) fn open_folder(dir: &Path, options: FileStoreOptions) -> Result<Arc<dyn LogStore>, LogError> {
    Ok(Arc::new(FileLogStore::open_folder(dir, options)?))
}

/// Makes a call that may wait for a disk.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    tokio::task::spawn_blocking(call).await.unwrap_or(Err(LogError::Closed))
}

/// Makes a write beyond the limit on file sizes fail, as on a full disk, in place of ending us. It takes a runtime,
/// and holds from then on; a command that we execute finds the signal as it was.
pub(crate) fn survive_file_size_limit() -> io::Result<()> {
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}
