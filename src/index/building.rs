//! Making an index beside the old one, and asking the old one for what only it knows.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{DatabaseError, ReadableDatabase, StorageBackend};

use crate::error::LogError;
use crate::index::commit::Changes;
use crate::index::handle::{self, GAVE_UP, Index};
use crate::index::lookup;
use crate::index::schema;
use crate::run::Tombstone;

/// The file of an index that is being made. Nothing in it counts before it is renamed, so it is synced once, at its
/// end, however often the database would: each sync takes longer than writing 1,000 rows.
#[derive(Debug)]
struct UnsyncedFile(File);

impl StorageBackend for UnsyncedFile {
    fn len(&self) -> io::Result<u64> {
        self.0.metadata().map(|file| file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

impl Index {
    /// Makes an empty index that does not count as one until it is [built](Self::built). Nothing stands at
    /// `path`.
    pub(crate) fn build(path: PathBuf) -> Result<Self, LogError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = UnsyncedFile(file.map_err(LogError::io("creating", &path))?);
        let database = handle::create(&path, false, |builder| builder.create_with_backend(file))?;
        Ok(Self::of(path, database, None, true))
    }

    /// Writes the last rows, says that the index holds everything, closes it, and syncs its file.
    pub(crate) fn built(self, last: &Changes) -> Result<(), LogError> {
        self.write(|transaction| {
            last.put(transaction)?;
            transaction.open_table(schema::META)?.insert(schema::COMPLETE, [1].as_slice())?;
            Ok(())
        })?;
        self.close()?;
        let path = self.path();
        File::open(path).and_then(|file| file.sync_all()).map_err(LogError::io("syncing", path))
    }

    /// What an index that nobody has open tells of evicted runs, read without changing its file; `None` if there is
    /// none. The caller has its lock.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, [`LogError::Index`] if it can't be used, or what the disk
    /// said.
    pub(crate) fn tombstones_at(path: &Path) -> Result<Option<Vec<Tombstone>>, LogError> {
        if !handle::is_there(path)? {
            return Ok(None);
        }
        let opened = handle::with_builder(path, |builder| match builder.open_read_only(path) {
            Err(DatabaseError::RepairAborted) => Ok(None),
            opened => opened.map(Some),
        })?;
        let Some(database) = opened else {
            // Who had it was killed: what redb has to mend before it can be read is written to the file.
            let index = Self::open_as_it_is(path.to_owned())?;
            return index.map(|index| index.tombstones()).transpose();
        };
        let look = move || {
            handle::check(&database)?;
            let transaction = database.begin_read().map_err(|error| error.to_string())?;
            lookup::tombstones(&transaction).map_err(|failure| failure.describe())
        };
        let stones = catch_unwind(AssertUnwindSafe(look)).unwrap_or_else(|_| Err(GAVE_UP.to_owned()));
        stones.map(Some).map_err(|detail| LogError::Index { path: path.to_owned(), detail })
    }
}
