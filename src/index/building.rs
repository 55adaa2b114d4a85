//! Making an index beside the old one, and asking the old one for what only it knows.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{DatabaseError, ReadableDatabase, StorageBackend, WriteTransaction};

use crate::error::LogError;
use crate::index::commit::Changes;
use crate::index::database::{self, Guarded};
use crate::index::failure::GAVE_UP;
use crate::index::handle::Index;
use crate::index::lookup;
use crate::run::Tombstone;

/// An index up to this size is made in memory and written when it is closed, a larger one is made in its file.
const HELD_BYTES: usize = 4 * 1024 * 1024;

/// How many rows are written with one commit, more or less.
const ROWS_A_COMMIT: usize = 200_000;

/// The file of an index that is being made. Nothing in it counts before it is renamed, so it is synced once, when it is
/// closed, however often the database would: each sync takes longer than writing 1,000 rows. And while it is small the
/// database's many small writes go to memory.
#[derive(Debug)]
struct NewFile {
    file: File,
    /// What is to be written, until it is too large or the file is closed.
    held: Mutex<Option<Vec<u8>>>,
}

impl NewFile {
    fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Self { file, held: Mutex::new(Some(Vec::with_capacity(HELD_BYTES))) })
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what is held to the file, which takes everything from now on.
    fn let_go(&self, held: &mut Option<Vec<u8>>) -> io::Result<()> {
        held.take().map_or(Ok(()), |bytes| self.file.write_all_at(&bytes, 0))
    }
}

/// Where the bytes from `offset` on are in memory; an error if not all of them are.
fn range(held: &[u8], offset: u64, length: usize) -> io::Result<Range<usize>> {
    let begin = usize::try_from(offset).ok();
    let range = begin.and_then(|begin| Some(begin..begin.checked_add(length)?));
    range.filter(|range| range.end <= held.len()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

impl StorageBackend for NewFile {
    fn len(&self) -> io::Result<u64> {
        match &*self.held() {
            Some(held) => Ok(held.len() as u64),
            None => self.file.metadata().map(|file| file.len()),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match &*self.held() {
            Some(held) => out.copy_from_slice(&held[range(held, offset, out.len())?]),
            None => self.file.read_exact_at(out, offset)?,
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut held = self.held();
        match (&mut *held, usize::try_from(len)) {
            (Some(bytes), Ok(len)) if len <= HELD_BYTES => bytes.resize(len, 0),
            _ => {
                self.let_go(&mut held)?;
                self.file.set_len(len)?;
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &mut *self.held() {
            Some(held) => {
                let range = range(held, offset, data.len())?;
                held[range].copy_from_slice(data);
            }
            None => self.file.write_all_at(data, offset)?,
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.let_go(&mut self.held())?;
        self.file.sync_all()
    }
}

/// An index that is being made. It does not count as one until it is [finished](Self::finish).
pub(crate) struct NewIndex {
    /// What is written and not committed yet, and how many rows that is. It is let go of before the database is.
    uncommitted: Option<(WriteTransaction, usize)>,
    index: Index,
}

impl Drop for NewIndex {
    fn drop(&mut self) {
        let uncommitted = self.uncommitted.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(uncommitted))));
    }
}

impl NewIndex {
    /// Makes an empty one. Nothing stands at `path`.
    pub(crate) fn create(path: PathBuf) -> Result<Self, LogError> {
        let file = NewFile::create(&path).map_err(LogError::io("creating", &path))?;
        let database = database::with_builder(&path, |builder| builder.create_with_backend(file))?;
        let index = Index::of(path, Guarded::new(database), None);
        let transaction = index.guarded(|database| {
            let transaction = database.begin_write()?;
            database::make_tables(&transaction)?;
            Ok(transaction)
        })?;
        Ok(Self { index, uncommitted: Some((transaction, 0)) })
    }

    /// Writes rows.
    pub(crate) fn put(&mut self, changes: &Changes) -> Result<(), LogError> {
        let uncommitted = self.uncommitted.take();
        self.uncommitted = self.index.guarded(|database| {
            let (transaction, rows) = match uncommitted {
                Some(uncommitted) => uncommitted,
                None => (database.begin_write()?, 0),
            };
            changes.put(&transaction)?;
            let rows = rows + changes.rows();
            if rows < ROWS_A_COMMIT {
                return Ok(Some((transaction, rows)));
            }
            transaction.commit()?;
            Ok(None)
        })?;
        Ok(())
    }

    /// Says that the index holds everything, and closes it: its file is synced. A small one gives back what it does not
    /// use when it is closed the next time.
    pub(crate) fn finish(mut self) -> Result<(), LogError> {
        let uncommitted = self.uncommitted.take();
        self.index.guarded(|database| {
            let transaction = match uncommitted {
                Some((transaction, _)) => transaction,
                None => database.begin_write()?,
            };
            database::say_complete(&transaction)?;
            Ok(transaction.commit()?)
        })?;
        self.index.close_as_large_as_it_is()
    }
}

impl Index {
    /// What an index that nobody has open tells of evicted runs, read without changing its file; `None` if there is
    /// none. The caller has its lock.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, [`LogError::Index`] if it can't be used, or what the disk
    /// said.
    pub(crate) fn tombstones_at(path: &Path) -> Result<Option<Vec<Tombstone>>, LogError> {
        if !database::is_there(path)? {
            return Ok(None);
        }
        let opened = database::with_builder(path, |builder| match builder.open_read_only(path) {
            Err(DatabaseError::RepairAborted) => Ok(None),
            opened => opened.map(Some),
        })?;
        let Some(database) = opened else {
            // Who had it was killed: what redb has to mend before it can be read is written to the file.
            let index = Self::open_as_it_is(path.to_owned())?;
            return index.map(|index| index.tombstones()).transpose();
        };
        let look = move || {
            database::check(&database)?;
            let transaction = database.begin_read().map_err(|error| error.to_string())?;
            lookup::tombstones(&transaction).map_err(|failure| failure.describe())
        };
        let stones = catch_unwind(AssertUnwindSafe(look)).unwrap_or_else(|_| Err(GAVE_UP.to_owned()));
        stones.map(Some).map_err(|detail| LogError::Index { path: path.to_owned(), detail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::progress::LineCheckpoint;
    use crate::journal::Place;
    use crate::line::{Stream, UnixMicros};
    use std::fs;

    /// A place that no rule would give, so that each takes its bytes.
    fn place(number: u64) -> (u64, LineCheckpoint) {
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24;
        let (line, offset) = (number << 40 | mixed, number << 40 | mixed.rotate_left(7) >> 24);
        (1, LineCheckpoint { stream: Stream::Stdout, line, offset, time: UnixMicros(mixed) })
    }

    #[test]
    fn an_index_holds_what_was_put_into_it_however_large_it_became() {
        let folder = tempfile::tempdir().unwrap();
        for (batches, is_held) in [(1, true), (120, false)] {
            let path = folder.path().join(format!("{batches}.redb"));
            let mut index = NewIndex::create(path.clone()).unwrap();
            let places: Vec<_> = (1..=batches * 2048).map(place).collect();
            for lines in places.chunks(2048) {
                index.put(&Changes { lines: lines.to_vec(), ..Changes::default() }).unwrap();
                assert!(fs::metadata(&path).unwrap().len() == 0 || !is_held, "nothing is written yet");
            }
            assert_eq!(fs::metadata(&path).unwrap().len() > HELD_BYTES as u64, !is_held);
            index.finish().unwrap();
            let index = Index::open(path.clone()).unwrap();
            for (_, at) in places.iter().step_by(37) {
                let floor = index.line_floor(1, Stream::Stdout, at.line).unwrap();
                let expected = Place { lines: at.line, offset: at.offset };
                assert_eq!(floor.map(|floor| floor.place), Some(expected));
            }
            index.close().unwrap();
        }
    }

    #[test]
    fn an_index_that_was_not_finished_is_none() {
        let folder = tempfile::tempdir().unwrap();
        for batches in [1, 120] {
            let path = folder.path().join(format!("{batches}.redb"));
            let mut index = NewIndex::create(path.clone()).unwrap();
            for batch in 0..batches {
                let lines = (1..=2048).map(|number| place(batch * 2048 + number)).collect();
                index.put(&Changes { lines, ..Changes::default() }).unwrap();
            }
            drop(index);
            assert!(matches!(Index::open_as_it_is(path), Err(LogError::Index { .. })));
        }
    }
}
