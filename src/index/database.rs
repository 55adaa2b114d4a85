//! The database in its file: opened, made, looked at, moved aside.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError, ReadableDatabase, StorageError, WriteTransaction};

use crate::error::LogError;
use crate::index::failure::{Failure, GAVE_UP, caught, is_damage};
use crate::index::retention::put_tombstones;
use crate::index::{lookup, schema};
use crate::line::UnixMicros;
use crate::run::{FORMAT_VERSION, Tombstone};

/// The most memory that the database caches pages in.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// How many indexes that were moved aside are kept.
const KEPT_ASIDE: usize = 3;

/// A database that does no harm when it is let go of: a damaged one can panic then.
#[derive(Debug)]
pub(super) struct Guarded(Option<Database>);

impl Guarded {
    pub(super) const fn new(database: Database) -> Self {
        Self(Some(database))
    }

    pub(super) const fn get(&self) -> Option<&Database> {
        self.0.as_ref()
    }

    pub(super) const fn get_mut(&mut self) -> Option<&mut Database> {
        self.0.as_mut()
    }

    pub(super) fn close(mut self) -> Result<(), Failure> {
        self.0.take().map_or(Ok(()), |database| caught(|| Ok(database.close()?)))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let database = self.0.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(database))));
    }
}

/// Changes what is in a database, all or nothing, and syncs the disk.
pub(super) fn write<T>(
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
pub(super) fn tombstones_of(database: &Database) -> Vec<Tombstone> {
    let look = || -> Result<Vec<Tombstone>, Failure> { lookup::tombstones(&database.begin_read()?) };
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
pub(super) fn open_existing(path: &Path) -> Result<Option<Guarded>, LogError> {
    open_by(path, |builder| builder.open(path))
}

/// The same with another way to open it.
pub(super) fn open_by(
    path: &Path,
    open: impl FnOnce(&Builder) -> Result<Database, DatabaseError>,
) -> Result<Option<Guarded>, LogError> {
    if !is_there(path)? {
        return Ok(None);
    }
    let guarded = Guarded::new(with_builder(path, open)?);
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

/// Makes an index that holds nothing but these evicted runs. Nothing stands at `path`; and when it can't be made, nothing
/// stands there afterwards.
pub(super) fn create_complete(path: &Path, evicted: &[Tombstone]) -> Result<Guarded, LogError> {
    let created = create(path, evicted);
    if created.as_ref().is_err_and(|error| !matches!(error, LogError::InUse { .. }))
        && let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "an index that could not be made stays");
    }
    created
}

fn create(path: &Path, evicted: &[Tombstone]) -> Result<Guarded, LogError> {
    let created = Guarded::new(with_builder(path, |builder| builder.create(path))?);
    let fill = |transaction: &WriteTransaction| {
        make_tables(transaction)?;
        put_tombstones(transaction, evicted)?;
        say_complete(transaction)
    };
    let written = created.get().map_or(Ok(()), |database| caught(|| write(database, fill)));
    written.map_err(|failure| failure.of("making", path))?;
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

/// Moves aside what can't be used, for somebody to look at.
///
/// # Errors
///
/// What the disk said.
pub(crate) fn quarantine(path: &Path, why: &str) -> Result<(), LogError> {
    let aside = path.with_extension(format!("redb.corrupt-{}", UnixMicros::now().0));
    tracing::error!(path = %path.display(), aside = %aside.display(), why, "the index can't be used and is made anew");
    fs::rename(path, &aside).map_err(LogError::io("moving aside", path))?;
    remove_all_but_newest(path);
    Ok(())
}

/// Indexes that were moved aside are kept for a look at them, but on a disk that damages one after the other they
/// must not fill it. What is no file is somebody else's, and stays.
fn remove_all_but_newest(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    let prefix = format!("{name}.corrupt-");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_aside = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix))
            && fs::symlink_metadata(path).is_ok_and(|aside| !aside.is_dir())
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
