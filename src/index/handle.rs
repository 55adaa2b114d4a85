//! The open database: held by one process, given back clean, and replaced when it fails.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};

use crate::error::LogError;
use crate::index::commit::Changes;
use crate::index::database::{
    Guarded, create_complete, file_at, open_existing, quarantine, tombstones_of, write,
};
use crate::index::failure::{Ailment, Failure, caught};
use crate::layout::{Home, StoreLock};

/// Up to so many bytes an index is compacted when it is closed, which takes a few milliseconds then. redb doubles a
/// young file when it grows: half of it may be unused.
const COMPACTED_ON_CLOSE: u64 = 1024 * 1024;

/// An open index. Only one process at a time can have it open.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    held: RwLock<Held>,
    /// What the last failure says of the database.
    ailment: Mutex<Option<Ailment>>,
    /// The log folder that it is in.
    home: Home,
}

#[derive(Debug)]
struct Held {
    /// `None` once the index is closed, and while it is being made anew.
    database: Option<Guarded>,
    /// Which file that is: device and inode.
    file: Option<(u64, u64)>,
    /// `None` once the index is closed, and in an index that is being built.
    lock: Option<StoreLock>,
    closed: bool,
}

impl Index {
    /// Opens the index, or makes an empty one. An index that can't be used is moved aside: everything in it can be
    /// had from the run folders again.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, or what the disk said.
    pub(crate) fn open(path: PathBuf) -> Result<Self, LogError> {
        let lock = StoreLock::take(&path)?;
        let database = match open_existing(&path) {
            Ok(Some(database)) => database,
            Ok(None) => create_complete(&path)?,
            Err(LogError::Index { detail, .. }) => {
                quarantine(&path, &detail)?;
                create_complete(&path)?
            }
            Err(error) => return Err(error),
        };
        Ok(Self::of(path, database, Some(lock)))
    }

    /// Opens an index as it is; `None` if there is none. The caller has its lock.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, [`LogError::Index`] if it can't be used, or what the
    /// disk said.
    pub(crate) fn open_as_it_is(path: PathBuf) -> Result<Option<Self>, LogError> {
        Ok(open_existing(&path)?.map(|database| Self::of(path, database, None)))
    }

    pub(super) fn of(path: PathBuf, database: Guarded, lock: Option<StoreLock>) -> Self {
        let held = Held { file: file_at(&path), database: Some(database), lock, closed: false };
        let home = Home::of(path.parent().unwrap_or(&path));
        Self { path, home, held: RwLock::new(held), ailment: Mutex::new(None) }
    }

    /// Closes the database cleanly; a small one gives back what it does not use. Every later call says that the index
    /// is closed.
    pub(crate) fn close(&self) -> Result<(), LogError> {
        let is_small = fs::metadata(&self.path).is_ok_and(|file| file.len() <= COMPACTED_ON_CLOSE);
        let was_well = self.ailment().is_none();
        if is_small && let Err(error) = self.compact() {
            tracing::debug!(%error, "the index is closed as large as it is");
        }
        let only_stays_large = was_well && matches!(*self.ailment(), Some(Ailment::Stuck(_)));
        match self.close_as_large_as_it_is() {
            // All that was to be written is.
            Err(_) if only_stays_large => Ok(()),
            closed => closed,
        }
    }

    /// Closes the database cleanly.
    pub(super) fn close_as_large_as_it_is(&self) -> Result<(), LogError> {
        let mut held = self.held_alone();
        held.closed = true;
        let closed = held.database.take().map_or(Ok(()), Guarded::close);
        held.lock = None;
        closed.map_err(|failure| self.failed(&failure))
    }

    /// Gives back to the file system what is not used. Gives whether there was anything.
    pub(crate) fn compact(&self) -> Result<bool, LogError> {
        let mut held = self.held_alone();
        let database = held.database.as_mut().and_then(Guarded::get_mut);
        let Some(database) = database else { return Err(LogError::Closed) };
        caught(|| Ok(database.compact()?)).map_err(|failure| self.failed(&failure))
    }

    /// Looks at every page of the database: whether each is what was written. What redb can mend it mends.
    pub(crate) fn is_sound(&self) -> Result<bool, LogError> {
        let mut held = self.held_alone();
        let database = held.database.as_mut().and_then(Guarded::get_mut);
        let Some(database) = database else { return Err(LogError::Closed) };
        caught(|| Ok(database.check_integrity()?)).map_err(|failure| self.failed(&failure))
    }

    fn held_alone(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn ailment(&self) -> MutexGuard<'_, Option<Ailment>> {
        self.ailment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn error(&self, detail: String) -> LogError {
        LogError::Index { path: self.path.clone(), detail }
    }

    /// Runs `action` on the database.
    pub(super) fn guarded<T>(
        &self,
        action: impl FnOnce(&Database) -> Result<T, Failure>,
    ) -> Result<T, LogError> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = held.database.as_ref().and_then(Guarded::get) else {
            return Err(match &*self.ailment() {
                _ if held.closed => LogError::Closed,
                Some(Ailment::Stuck(why)) => {
                    self.error(format!("is to be opened again after an error: {why}"))
                }
                _ => self.error("is being made anew".to_owned()),
            });
        };
        caught(|| action(database)).map_err(|failure| self.failed(&failure))
    }

    /// Notes what a failure says of the database, and gives what to tell of it. What is refused because of an earlier
    /// error is told with that one.
    fn failed(&self, failure: &Failure) -> LogError {
        let mut ailment = self.ailment();
        if let (Failure::Database(redb::Error::PreviousIo), Some(Ailment::Stuck(why))) = (failure, &*ailment)
        {
            return self.error(format!("the disk refused an earlier write: {why}"));
        }
        if let Some(found) = failure.ailment()
            && !matches!(*ailment, Some(Ailment::Damaged(_)))
        {
            *ailment = Some(found);
        }
        self.error(failure.describe())
    }

    pub(super) fn read<T>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<T, Failure>,
    ) -> Result<T, LogError> {
        self.guarded(|database| look(&database.begin_read()?))
    }

    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, Failure>,
    ) -> Result<T, LogError> {
        self.guarded(|database| write(database, change))
    }

    /// Makes an index that failed usable again, and one whose file is no longer there. When it is empty then, and
    /// what is in the run folders has to be taken up again, `on_empty` is told before anybody can look into it.
    ///
    /// # Errors
    ///
    /// What the disk said; calling again tries again.
    pub(crate) fn mend(&self, on_empty: impl FnOnce()) -> Result<bool, LogError> {
        if self.is_away() {
            // What is at its path is not ours, and ours is where it was moved to.
            return Ok(false);
        }
        let ailment = self.ailment().clone();
        let Some(ailment) = ailment.or_else(|| self.is_another_file()) else { return Ok(false) };
        let mut held = self.held_alone();
        if held.closed {
            return Ok(false);
        }
        let mended = self.replace(&mut held, &ailment);
        *self.ailment() = mended.is_err().then_some(ailment);
        if let Ok(true) = mended {
            on_empty();
        }
        mended
    }

    /// Whether the log folder, or the folder of runs in it, is not where it was opened: another is there, or none. Then
    /// nothing at its path says anything of its runs.
    pub(crate) fn is_away(&self) -> bool {
        self.home.away().is_some()
    }

    /// The same as an error.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if it is away.
    pub(crate) fn check_home(&self) -> Result<(), LogError> {
        self.home.away().map_or(Ok(()), |why| Err(self.error(why)))
    }

    fn is_another_file(&self) -> Option<Ailment> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let gone = !held.closed && file_at(&self.path) != held.file;
        gone.then(|| Ailment::Damaged("the file was taken away or replaced".to_owned()))
    }

    fn replace(&self, held: &mut Held, ailment: &Ailment) -> Result<bool, LogError> {
        let mut stones = Vec::new();
        if let Some(database) = held.database.take() {
            stones = database.get().map(tombstones_of).unwrap_or_default();
        }
        let mut why = match ailment {
            Ailment::Damaged(why) => Some(why.clone()),
            Ailment::Stuck(_) => None,
        };
        if why.is_none() {
            match open_existing(&self.path) {
                Ok(Some(database)) => {
                    tracing::info!(path = %self.path.display(), "the index is opened again after an error of the disk");
                    held.database = Some(database);
                    return Ok(false);
                }
                Ok(None) => {}
                Err(LogError::Index { detail, .. }) => why = Some(detail),
                Err(error) => return Err(error),
            }
        }
        if self.path.exists() {
            quarantine(&self.path, &why.unwrap_or_default())?;
        } else {
            tracing::error!(path = %self.path.display(), "the index is gone and is made anew");
        }
        let database = create_complete(&self.path)?;
        held.file = file_at(&self.path);
        held.database = Some(database);
        if !stones.is_empty()
            && let Some(database) = held.database.as_ref().and_then(Guarded::get)
        {
            let kept = Changes { tombstones: stones, ..Changes::default() };
            if let Err(failure) = write(database, |transaction| kept.put(transaction)) {
                tracing::error!(error = failure.describe(), "what is known of evicted runs is lost");
            }
        }
        Ok(true)
    }
}
