//! The open database: held by one process, given back clean, and replaced when it fails.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};

use crate::error::LogError;
use crate::index::database::{Guarded, create_complete, open_existing, quarantine, tombstones_of, write};
use crate::index::failure::{Ailment, Failure, caught};
use crate::layout::{FileId, Home, StoreLock, file_at};
use crate::run::{JobRunId, Tombstone};

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
    /// Whether the last try to make it anew found no room on the disk.
    no_room: AtomicBool,
}

#[derive(Debug)]
struct Held {
    /// `None` once the index is closed, and while it is being made anew.
    database: Option<Guarded>,
    /// What the last one told of evicted runs, until the next one has it.
    evicted: Vec<Tombstone>,
    /// Which file that is: device and inode.
    file: Option<FileId>,
    /// `None` once the index is closed, and in an index that is being built.
    lock: Option<StoreLock>,
    closed: bool,
}

impl Index {
    /// Opens the index, or makes an empty one. An index that can't be used is moved aside: everything in it can be
    /// had from the run folders again. On a disk that has no room for it, it [is missing](Self::is_missing) until it is
    /// [mended](Self::mend).
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, or what the disk said.
    pub(crate) fn open(path: PathBuf) -> Result<Self, LogError> {
        let lock = StoreLock::take(&path)?;
        match open_existing(&path) {
            Ok(Some(database)) => return Ok(Self::of(path, database, Some(lock))),
            Ok(None) => {}
            Err(LogError::Index { detail, .. }) => quarantine(&path, &detail)?,
            Err(error) => return Err(error),
        }
        match create_complete(&path, &[]) {
            Ok(database) => Ok(Self::of(path, database, Some(lock))),
            Err(error) if error.is_disk_full() => {
                tracing::error!(%error, "there is no room for an index; logs are read without one until there is");
                let index = Self::with(path, None, Some(lock));
                *index.ailment() = Some(Ailment::Damaged(error.to_string()));
                index.no_room.store(true, Ordering::Release);
                Ok(index)
            }
            Err(error) => Err(error),
        }
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
        Self::with(path, Some(database), lock)
    }

    fn with(path: PathBuf, database: Option<Guarded>, lock: Option<StoreLock>) -> Self {
        let held = Held { file: file_at(&path), database, evicted: Vec::new(), lock, closed: false };
        Self {
            home: Home::of(path.parent().unwrap_or(&path)),
            path,
            no_room: AtomicBool::new(false),
            held: RwLock::new(held),
            ailment: Mutex::new(None),
        }
    }

    /// Whether there is none at this moment: it could not be made yet.
    pub(crate) fn is_missing(&self) -> bool {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.database.is_none() && !held.closed
    }

    /// Whether that is for lack of room on the disk.
    pub(crate) fn lacks_room(&self) -> bool {
        self.no_room.load(Ordering::Acquire) && self.is_missing()
    }

    /// What is known of an evicted run by an index that is missing.
    pub(super) fn evicted_before(&self, id: &JobRunId) -> Option<Tombstone> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.evicted.iter().find(|stone| stone.id == *id).cloned()
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

    /// Looks at every page of the database: whether each is what was written. What redb can mend it mends, but for one that
    /// was [opened to look](Self::open_to_look).
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
                _ if self.no_room.load(Ordering::Acquire) => {
                    self.error("can't be made before the disk has room for it".to_owned())
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
        let ailment = |held: &Held| self.ailment().clone().or_else(|| self.is_another_file(held));
        if ailment(&self.held.read().unwrap_or_else(PoisonError::into_inner)).is_none() {
            return Ok(false);
        }
        let mut held = self.held_alone();
        // Another thread may have mended it while this one waited.
        let Some(ailment) = ailment(&held).filter(|_| !held.closed) else { return Ok(false) };
        let mended = self.replace(&mut held, &ailment);
        *self.ailment() = mended.is_err().then_some(ailment);
        let no_room = mended.as_ref().is_err_and(LogError::is_disk_full);
        self.no_room.store(no_room, Ordering::Release);
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

    fn is_another_file(&self, held: &Held) -> Option<Ailment> {
        let gone = !held.closed && file_at(&self.path) != held.file;
        gone.then(|| Ailment::Damaged("the file was taken away or replaced".to_owned()))
    }

    fn replace(&self, held: &mut Held, ailment: &Ailment) -> Result<bool, LogError> {
        if let Some(database) = held.database.take() {
            held.evicted = database.get().map(tombstones_of).unwrap_or_default();
        }
        let mut why = match ailment {
            Ailment::Damaged(why) => Some(why.clone()),
            Ailment::Stuck(_) => None,
        };
        if why.is_none() {
            match open_existing(&self.path) {
                Ok(Some(database)) => {
                    tracing::info!(path = %self.path.display(), "the index is opened again after an error of the disk");
                    (held.database, held.evicted) = (Some(database), Vec::new());
                    return Ok(false);
                }
                Ok(None) => {}
                Err(LogError::Index { detail, .. }) => why = Some(detail),
                Err(error) => return Err(error),
            }
        }
        if self.path.exists() {
            quarantine(&self.path, &why.unwrap_or_default())?;
        } else if !self.no_room.load(Ordering::Acquire) {
            tracing::error!(path = %self.path.display(), "the index is gone and is made anew");
        }
        let database = create_complete(&self.path, &held.evicted)?;
        held.file = file_at(&self.path);
        (held.database, held.evicted) = (Some(database), Vec::new());
        Ok(true)
    }
}
