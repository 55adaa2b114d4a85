//! The open database: held by one process, given back clean, and replaced when it fails.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, StorageError, WriteTransaction,
};

use crate::error::LogError;
use crate::index::codec::Damaged;
use crate::index::commit::Changes;
use crate::index::schema;
use crate::layout::StoreLock;
use crate::line::UnixMicros;
use crate::run::{FORMAT_VERSION, Tombstone};

/// The most memory that the database caches pages in.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
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
    /// Which folder it is in.
    home: Option<(u64, u64)>,
    /// Whether that was away when it was last looked for.
    away: AtomicBool,
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

/// A database that does no harm when it is let go of: a damaged one can panic then.
#[derive(Debug)]
pub(super) struct Guarded(Option<Database>);

impl Guarded {
    pub(super) const fn new(database: Database) -> Self {
        Self(Some(database))
    }

    const fn get(&self) -> Option<&Database> {
        self.0.as_ref()
    }

    fn close(mut self) -> Result<(), Failure> {
        self.0.take().map_or(Ok(()), |database| caught(|| Ok(database.close()?)))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let database = self.0.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(database))));
    }
}

/// What is wrong with a database that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ailment {
    /// It refuses everything since this error of the disk: the same file is opened again.
    Stuck(String),
    /// It is not what it was: it is moved aside.
    Damaged(String),
}

/// Why a transaction failed.
pub(super) enum Failure {
    Database(redb::Error),
    Damaged(Damaged),
    /// The database panicked, as it does on damaged pages.
    GaveUp,
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

pub(super) fn damaged(error: Damaged) -> Failure {
    Failure::Damaged(error)
}

impl Failure {
    pub(super) fn describe(&self) -> String {
        match self {
            // Its own words tell who uses it in a program what to do.
            Self::Database(redb::Error::PreviousIo) => {
                "the disk refused an earlier write; it is tried again".to_owned()
            }
            Self::Database(error) => error.to_string(),
            Self::Damaged(damaged) => damaged.to_string(),
            Self::GaveUp => GAVE_UP.to_owned(),
        }
    }

    fn ailment(&self) -> Option<Ailment> {
        match self {
            Self::Database(redb::Error::Io(error)) if !is_damage(error.kind()) => {
                Some(Ailment::Stuck(error.to_string()))
            }
            Self::Database(redb::Error::PreviousIo) => Some(Ailment::Stuck(self.describe())),
            // What this program does wrong is not the file's fault.
            Self::Database(redb::Error::ValueTooLarge(_)) => None,
            failure => Some(Ailment::Damaged(failure.describe())),
        }
    }
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
        let (home, away) = (path.parent().and_then(file_at), AtomicBool::new(false));
        Self { path, home, away, held: RwLock::new(held), ailment: Mutex::new(None) }
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
        let database = held.database.as_mut().and_then(|database| database.0.as_mut());
        let Some(database) = database else { return Err(LogError::Closed) };
        caught(|| Ok(database.compact()?)).map_err(|failure| self.failed(&failure))
    }

    /// Looks at every page of the database: whether each is what was written. What redb can mend it mends.
    pub(crate) fn is_sound(&self) -> Result<bool, LogError> {
        let mut held = self.held_alone();
        let database = held.database.as_mut().and_then(|database| database.0.as_mut());
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

    /// Whether the log folder is not where it was opened: another is there, or none. Then nothing at its path says
    /// anything of its runs.
    pub(crate) fn is_away(&self) -> bool {
        let path = self.path.parent().unwrap_or(&self.path);
        let is_away = file_at(path) != self.home;
        if is_away != self.away.swap(is_away, Ordering::AcqRel) {
            match is_away {
                true => {
                    tracing::warn!(path = %path.display(), "the log folder was moved or removed; its runs wait until it is back");
                }
                false => tracing::info!(path = %path.display(), "the log folder is back"),
            }
        }
        is_away
    }

    /// The same as an error.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if it is away.
    pub(crate) fn check_home(&self) -> Result<(), LogError> {
        match self.is_away() {
            true => Err(self.error("the log folder was moved or removed; it has to come back".to_owned())),
            false => Ok(()),
        }
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

/// What a call of the database gives. It can panic on damaged pages; that stays here.
fn caught<T>(call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Failure::GaveUp))
}

/// How many indexes that were moved aside are kept.
const KEPT_ASIDE: usize = 3;

pub(super) const GAVE_UP: &str = "the database gave up on a damaged page";

fn write<T>(
    database: &Database,
    change: impl FnOnce(&WriteTransaction) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut transaction = database.begin_write()?;
    // Measured: reopening 1 GB after a kill takes 6 to 14 ms with it, seconds without.
    transaction.set_quick_repair(true);
    let value = change(&transaction)?;
    transaction.commit()?;
    Ok(value)
}

/// What a damaged database still tells of evicted runs.
fn tombstones_of(database: &Database) -> Vec<Tombstone> {
    let look = || -> Result<Vec<Tombstone>, Failure> { super::lookup::tombstones(&database.begin_read()?) };
    caught(look).unwrap_or_default()
}

/// Whether there is a file that may be a database.
pub(super) fn is_there(path: &Path) -> Result<bool, LogError> {
    match fs::metadata(path) {
        Ok(file) if !file.is_file() => {
            Err(LogError::Index { path: path.to_owned(), detail: "it is not a file".to_owned() })
        }
        Ok(file) if file.len() == 0 => {
            Err(LogError::Index { path: path.to_owned(), detail: "the file is empty".to_owned() })
        }
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(LogError::io("looking at", path)(error)),
    }
}

/// Opens the database that is there; `None` if there is none.
fn open_existing(path: &Path) -> Result<Option<Guarded>, LogError> {
    if !is_there(path)? {
        return Ok(None);
    }
    let guarded = Guarded::new(with_builder(path, |builder| builder.open(path))?);
    let usable = guarded.get().map_or(Ok(()), check);
    usable.map_err(|detail| LogError::Index { path: path.to_owned(), detail })?;
    Ok(Some(guarded))
}

/// Why a database is not an index that can be used, if it is not.
pub(super) fn check(database: &impl ReadableDatabase) -> Result<(), String> {
    let look = || -> Result<_, Failure> {
        let transaction = database.begin_read()?;
        // An index of an earlier day of this format has no such table.
        transaction.open_table(schema::PINNED)?;
        let meta = transaction.open_table(schema::META)?;
        let format = meta.get(schema::FORMAT)?.map(|value| value.value().to_vec());
        Ok((format, meta.get(schema::COMPLETE)?.is_some()))
    };
    let (format, complete) = caught(look).map_err(|failure| failure.describe())?;
    if format.as_deref() != Some(&FORMAT_VERSION.to_le_bytes()) {
        return Err(format!("is of format {format:?}, this program writes {FORMAT_VERSION}"));
    }
    if complete { Ok(()) } else { Err("was not made to its end".to_owned()) }
}

/// Makes an empty index.
fn create_complete(path: &Path) -> Result<Guarded, LogError> {
    let created = Guarded::new(with_builder(path, |builder| builder.create(path))?);
    let fill = |transaction: &WriteTransaction| {
        make_tables(transaction)?;
        say_complete(transaction)
    };
    let written = created.get().map_or(Ok(()), |database| write(database, fill));
    written.map_err(|failure| LogError::Index { path: path.to_owned(), detail: failure.describe() })?;
    Ok(created)
}

/// Makes the tables of an index that does not count as one yet.
pub(super) fn make_tables(transaction: &WriteTransaction) -> Result<(), Failure> {
    transaction.open_table(schema::META)?.insert(schema::FORMAT, FORMAT_VERSION.to_le_bytes().as_slice())?;
    transaction.open_table(schema::RUN_IDS)?;
    transaction.open_table(schema::RUNS)?;
    transaction.open_table(schema::LIVE)?;
    transaction.open_table(schema::CHECKPOINTS)?;
    transaction.open_table(schema::TIMES)?;
    transaction.open_table(schema::EVICTABLE)?;
    transaction.open_table(schema::PINNED)?;
    transaction.open_table(schema::TOTALS)?;
    transaction.open_multimap_table(schema::PARTITIONS)?;
    transaction.open_table(schema::TOMBSTONES)?;
    transaction.open_table(schema::TOMBSTONE_TIMES)?;
    Ok(())
}

/// Says that an index holds everything that it is to hold.
pub(super) fn say_complete(transaction: &WriteTransaction) -> Result<(), Failure> {
    transaction.open_table(schema::META)?.insert(schema::COMPLETE, [1].as_slice())?;
    Ok(())
}

/// Has redb open or make a database, with a cache of our size.
pub(super) fn with_builder<T>(
    path: &Path,
    open: impl FnOnce(&Builder) -> Result<T, DatabaseError>,
) -> Result<T, LogError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let path = path.to_owned();
    match catch_unwind(AssertUnwindSafe(|| open(&builder))) {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(LogError::InUse { path }),
        Ok(Err(DatabaseError::Storage(StorageError::Io(error)))) if !is_damage(error.kind()) => {
            Err(LogError::io("opening", path)(error))
        }
        Ok(Err(error)) => Err(LogError::Index { path, detail: Failure::from(error).describe() }),
        Err(_) => Err(LogError::Index { path, detail: GAVE_UP.to_owned() }),
    }
}

/// Which file stands at a path: device and inode.
fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Whether an error of the system says that a file is not a database.
fn is_damage(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput)
}

pub(crate) fn quarantine(path: &Path, why: &str) -> Result<(), LogError> {
    let aside = path.with_extension(format!("redb.corrupt-{}", UnixMicros::now().0));
    tracing::error!(path = %path.display(), aside = %aside.display(), why, "the index can't be used and is made anew");
    fs::rename(path, &aside).map_err(LogError::io("moving aside", path))?;
    remove_all_but_newest(path);
    Ok(())
}

/// Indexes that were moved aside are kept for a look at them, but on a disk that damages one after the other they
/// must not fill it.
fn remove_all_but_newest(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    let prefix = format!("{name}.corrupt-");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_aside = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix))
    };
    let mut aside: Vec<_> = entries.filter(is_aside).collect();
    // Their names end in a time, and times have the same number of digits.
    aside.sort_unstable();
    let old = aside.len().saturating_sub(KEPT_ASIDE);
    for path in &aside[..old] {
        if let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "an index that was moved aside stays");
        }
    }
}
