//! The index: where lines are, what runs there are, which one is oldest. Derived from the run folders, and never
//! trusted beyond what they bear out.
//!
//! Every call opens a transaction of its own and drops it before it returns: a reader that holds one would make
//! the file grow. A commit syncs the disk, so only the [`Committer`]'s thread and the opening of a store commit.

pub(crate) mod codec;
mod committer;
pub(crate) mod progress;
mod schema;

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageError, WriteTransaction,
};

use crate::error::LogError;
use crate::index::codec::{Damaged, RunRecord};
use crate::index::progress::{LineCheckpoint, Progress};
use crate::line::{Stream, UnixMicros};
use crate::run::{FORMAT_VERSION, JobRunId, Tombstone};

pub(crate) use committer::{Committed, Committer, Urgency};
pub(crate) use schema::RunNumber;

/// The most memory that the database caches pages in.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// An open index. Only one process at a time can have it open.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    /// `None` once the index is closed.
    database: RwLock<Option<Database>>,
}

/// What a commit writes.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Runs that are new, or whose record changed.
    pub(crate) runs: Vec<(RunNumber, RunRecord)>,
    /// Places of lines, in rising order for each run and stream.
    pub(crate) lines: Vec<(RunNumber, LineCheckpoint)>,
    /// Places in journals.
    pub(crate) progress: Vec<(RunNumber, Progress)>,
    /// Runs whose folders are gone.
    pub(crate) forgotten: Vec<RunNumber>,
    /// What is left of runs that were evicted.
    pub(crate) tombstones: Vec<Tombstone>,
}

impl Changes {
    pub(crate) const fn is_empty(&self) -> bool {
        self.runs.is_empty()
            && self.lines.is_empty()
            && self.progress.is_empty()
            && self.forgotten.is_empty()
            && self.tombstones.is_empty()
    }
}

/// What the index knows of an id.
#[derive(Debug)]
pub(crate) enum Known {
    /// A run.
    Run(RunNumber, Box<RunRecord>),
    /// A run that was evicted.
    Evicted(Tombstone),
}

/// Why a transaction failed.
enum Failure {
    Database(redb::Error),
    Damaged(Damaged),
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

impl Failure {
    fn describe(self) -> String {
        match self {
            Self::Database(error) => error.to_string(),
            Self::Damaged(damaged) => damaged.to_string(),
        }
    }
}

fn damaged(error: Damaged) -> Failure {
    Failure::Damaged(error)
}

impl Index {
    /// Opens the index, or makes an empty one. An index that can't be used is moved aside: everything in it can be
    /// had from the run folders again.
    ///
    /// # Errors
    ///
    /// [`LogError::InUse`] if another process has it open, or what the disk said.
    pub(crate) fn open(path: PathBuf) -> Result<Self, LogError> {
        match fs::metadata(&path) {
            Ok(file) if file.len() > 0 => match Self::open_existing(&path) {
                Ok(index) => return Ok(index),
                Err(LogError::Index { detail, .. }) => quarantine(&path, &detail)?,
                Err(error) => return Err(error),
            },
            Ok(_) => quarantine(&path, "the file is empty")?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(LogError::io("looking at", path)(error)),
        }
        let index = Self::with_database(path, |builder, path| builder.create(path))?;
        index.write(|transaction| {
            let mut meta = transaction.open_table(schema::META)?;
            meta.insert(schema::FORMAT, FORMAT_VERSION.to_le_bytes().as_slice())?;
            meta.insert(schema::COMPLETE, [1].as_slice())?;
            transaction.open_table(schema::RUN_IDS)?;
            transaction.open_table(schema::RUNS)?;
            transaction.open_table(schema::LIVE)?;
            transaction.open_table(schema::CHECKPOINTS)?;
            transaction.open_table(schema::TIMES)?;
            transaction.open_table(schema::EVICTABLE)?;
            transaction.open_multimap_table(schema::PARTITIONS)?;
            transaction.open_table(schema::TOMBSTONES)?;
            Ok(())
        })?;
        Ok(index)
    }

    fn open_existing(path: &Path) -> Result<Self, LogError> {
        let index = Self::with_database(path.to_owned(), |builder, path| builder.open(path))?;
        let (format, complete) = index.read(|transaction| {
            let meta = transaction.open_table(schema::META)?;
            let format = meta.get(schema::FORMAT)?.map(|value| value.value().to_vec());
            Ok((format, meta.get(schema::COMPLETE)?.is_some()))
        })?;
        if format.as_deref() != Some(&FORMAT_VERSION.to_le_bytes()) {
            return Err(index.error(format!("is of format {format:?}, this program writes {FORMAT_VERSION}")));
        }
        if !complete {
            return Err(index.error("was not made to its end".to_owned()));
        }
        Ok(index)
    }

    fn with_database(
        path: PathBuf,
        open: impl FnOnce(&redb::Builder, &Path) -> Result<Database, DatabaseError>,
    ) -> Result<Self, LogError> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        match catch_unwind(AssertUnwindSafe(|| open(&builder, &path))) {
            Ok(Ok(database)) => Ok(Self { path, database: RwLock::new(Some(database)) }),
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(LogError::InUse { path }),
            Ok(Err(DatabaseError::Storage(StorageError::Io(error)))) if !is_damage(error.kind()) => {
                Err(LogError::io("opening", path)(error))
            }
            Ok(Err(error)) => Err(LogError::Index { path, detail: error.to_string() }),
            Err(_) => Err(LogError::Index { path, detail: "the database gave up on it".to_owned() }),
        }
    }

    /// Closes the database cleanly. Every later call says that the index is closed.
    pub(crate) fn close(&self) -> Result<(), LogError> {
        let database = self.database.write().unwrap_or_else(PoisonError::into_inner).take();
        match database.map(Database::close) {
            Some(Err(error)) => Err(self.error(error.to_string())),
            _ => Ok(()),
        }
    }

    fn error(&self, detail: String) -> LogError {
        LogError::Index { path: self.path.clone(), detail }
    }

    /// Runs `action` on the database. It can panic on damaged pages; that stays here.
    fn guarded<T>(&self, action: impl FnOnce(&Database) -> Result<T, Failure>) -> Result<T, LogError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = database.as_ref() else { return Err(LogError::Closed) };
        match catch_unwind(AssertUnwindSafe(|| action(database))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(failure)) => Err(self.error(failure.describe())),
            Err(_) => Err(self.error("the database gave up on a damaged page".to_owned())),
        }
    }

    fn read<T>(&self, look: impl FnOnce(&ReadTransaction) -> Result<T, Failure>) -> Result<T, LogError> {
        self.guarded(|database| look(&database.begin_read()?))
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, Failure>) -> Result<T, LogError> {
        self.guarded(|database| {
            let mut transaction = database.begin_write()?;
            // Measured: reopening 1 GB after a kill takes 6 to 14 ms with it, seconds without.
            transaction.set_quick_repair(true);
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })
    }

    /// Writes changes, all or none, and syncs the disk.
    pub(crate) fn commit(&self, changes: &Changes) -> Result<(), LogError> {
        self.write(|transaction| {
            put_runs(transaction, &changes.runs)?;
            let mut lines = transaction.open_table(schema::CHECKPOINTS)?;
            for (number, at) in &changes.lines {
                lines.insert((*number, at.stream.index() as u8, at.line), (at.offset, at.time.0))?;
            }
            let mut times = transaction.open_table(schema::TIMES)?;
            for (number, progress) in &changes.progress {
                times.insert((*number, progress.time.0), codec::encode_progress(progress).as_slice())?;
            }
            drop((lines, times));
            for &number in &changes.forgotten {
                forget_run(transaction, number)?;
            }
            let mut tombstones = transaction.open_table(schema::TOMBSTONES)?;
            for stone in &changes.tombstones {
                tombstones.insert(stone.id.as_str(), codec::encode_tombstone(stone).as_slice())?;
            }
            Ok(())
        })
    }

    /// Lets go of the places that are kept of these runs, for whoever is about to derive them again: after a power cut
    /// the index can know of more than the files do.
    pub(crate) fn forget_places(&self, runs: impl Iterator<Item = RunNumber>) -> Result<(), LogError> {
        self.write(|transaction| {
            for number in runs {
                forget_places(transaction, number)?;
            }
            Ok(())
        })
    }

    /// What is known of an id.
    pub(crate) fn find(&self, id: &JobRunId) -> Result<Option<Known>, LogError> {
        self.read(|transaction| {
            if let Some(number) = transaction.open_table(schema::RUN_IDS)?.get(id.as_str())? {
                let number = number.value();
                let record = transaction.open_table(schema::RUNS)?.get(number)?;
                return match record {
                    Some(value) => {
                        let record = codec::decode_run(value.value()).map_err(damaged)?;
                        Ok(Some(Known::Run(number, Box::new(record))))
                    }
                    None => Ok(None),
                };
            }
            match transaction.open_table(schema::TOMBSTONES)?.get(id.as_str())? {
                Some(value) => {
                    let stone = codec::decode_tombstone(id.clone(), value.value()).map_err(damaged)?;
                    Ok(Some(Known::Evicted(stone)))
                }
                None => Ok(None),
            }
        })
    }

    /// The last place kept of a stream that has at most `line` lines before it: (lines before, byte offset).
    pub(crate) fn line_floor(
        &self,
        run: RunNumber,
        stream: Stream,
        line: u64,
    ) -> Result<Option<(u64, u64)>, LogError> {
        let stream = stream.index() as u8;
        self.read(|transaction| {
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            let last = table.range((run, stream, 0)..=(run, stream, line))?.next_back();
            Ok(last.transpose()?.map(|(key, value)| (key.value().2, value.value().0)))
        })
    }

    /// The last place kept of a journal for which `is_before` holds; it has to hold for a beginning of the run and
    /// for nothing behind that. Found by bisecting time, in which everything a [`Progress`] counts only rises.
    pub(crate) fn progress_while(
        &self,
        run: RunNumber,
        is_before: impl Fn(&Progress) -> bool,
    ) -> Result<Option<Progress>, LogError> {
        self.read(|transaction| {
            let table = transaction.open_table(schema::TIMES)?;
            let mut all = table.range((run, 0)..=(run, u64::MAX))?;
            let Some(first) = all.next() else { return Ok(None) };
            let mut low = first?.0.value().1;
            let mut high = all.next_back().transpose()?.map_or(low, |(key, _)| key.value().1);
            let mut best = None;
            while low <= high {
                let middle = low + (high - low) / 2;
                let Some(row) = table.range((run, low)..=(run, middle))?.next_back() else {
                    low = middle + 1;
                    continue;
                };
                let (key, value) = row?;
                let progress = codec::decode_progress(value.value()).map_err(damaged)?;
                if is_before(&progress) {
                    best = Some(progress);
                    low = middle + 1;
                } else {
                    let Some(below) = key.value().1.checked_sub(1) else { break };
                    high = below;
                }
            }
            Ok(best)
        })
    }

    /// The runs that were not over when their record was written.
    pub(crate) fn live_runs(&self) -> Result<Vec<(RunNumber, RunRecord)>, LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?;
            let mut found = Vec::new();
            for row in transaction.open_table(schema::LIVE)?.iter()? {
                let number = row?.0.value();
                if let Some(value) = runs.get(number)? {
                    found.push((number, codec::decode_run(value.value()).map_err(damaged)?));
                }
            }
            Ok(found)
        })
    }

    /// The highest run number given so far.
    pub(crate) fn last_number(&self) -> Result<RunNumber, LogError> {
        self.read(|transaction| {
            let last = transaction.open_table(schema::RUNS)?.last()?.map(|(key, _)| key.value());
            Ok(last.unwrap_or(0))
        })
    }

    /// Which of these ids have no row.
    pub(crate) fn unknown(&self, mut ids: Vec<JobRunId>) -> Result<Vec<JobRunId>, LogError> {
        ids.sort_unstable();
        self.read(|transaction| {
            let table = transaction.open_table(schema::RUN_IDS)?;
            let mut unknown = Vec::new();
            for id in ids {
                if table.get(id.as_str())?.is_none() {
                    unknown.push(id);
                }
            }
            Ok(unknown)
        })
    }

    /// Gives the runs below a number, newest first, to `take` until that returns false.
    pub(crate) fn newest_below(
        &self,
        below: RunNumber,
        mut take: impl FnMut(RunNumber, RunRecord) -> bool,
    ) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_table(schema::RUNS)?.range(..below)?.rev() {
                let (key, value) = row?;
                if !take(key.value(), codec::decode_run(value.value()).map_err(damaged)?) {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Gives the runs below a number that build a partition, newest first, to `take` until that returns false.
    pub(crate) fn newest_of_partition(
        &self,
        partition: &str,
        below: RunNumber,
        mut take: impl FnMut(RunNumber, RunRecord) -> bool,
    ) -> Result<(), LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?;
            for number in transaction.open_multimap_table(schema::PARTITIONS)?.get(partition)?.rev() {
                let number = number?.value();
                if number >= below {
                    continue;
                }
                if let Some(value) = runs.get(number)?
                    && !take(number, codec::decode_run(value.value()).map_err(damaged)?)
                {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Gives the runs whose id starts so to `take`, in the order of their ids.
    pub(crate) fn with_prefix(
        &self,
        prefix: &str,
        mut take: impl FnMut(RunNumber, RunRecord),
    ) -> Result<(), LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?;
            for row in transaction.open_table(schema::RUN_IDS)?.range(prefix..)? {
                let (id, number) = row?;
                if !id.value().starts_with(prefix) {
                    break;
                }
                if let Some(value) = runs.get(number.value())? {
                    take(number.value(), codec::decode_run(value.value()).map_err(damaged)?);
                }
            }
            Ok(())
        })
    }
}

fn put_runs(transaction: &WriteTransaction, runs: &[(RunNumber, RunRecord)]) -> Result<(), Failure> {
    let mut ids = transaction.open_table(schema::RUN_IDS)?;
    let mut records = transaction.open_table(schema::RUNS)?;
    let mut live = transaction.open_table(schema::LIVE)?;
    let mut evictable = transaction.open_table(schema::EVICTABLE)?;
    let mut partitions = transaction.open_multimap_table(schema::PARTITIONS)?;
    for (number, record) in runs {
        ids.insert(record.run.id().as_str(), number)?;
        records.insert(number, codec::encode_run(record).as_slice())?;
        for partition in &record.run.spec.building_partitions {
            partitions.insert(partition.as_str(), number)?;
        }
        if let Some(ended) = record.run.state.ended() {
            live.remove(number)?;
            evictable.insert((ended.0, *number), record.disk_bytes)?;
        } else {
            live.insert(number, ())?;
        }
    }
    Ok(())
}

fn forget_run(transaction: &WriteTransaction, number: RunNumber) -> Result<(), Failure> {
    let record = {
        let mut records = transaction.open_table(schema::RUNS)?;
        let removed = records.remove(number)?;
        removed.and_then(|value| codec::decode_run(value.value()).ok())
    };
    transaction.open_table(schema::LIVE)?.remove(number)?;
    forget_places(transaction, number)?;
    let Some(record) = record else { return Ok(()) };
    let mut ids = transaction.open_table(schema::RUN_IDS)?;
    let id = record.run.id().as_str();
    // A later run can have the id by now.
    if ids.get(id)?.is_some_and(|of_id| of_id.value() == number) {
        ids.remove(id)?;
    }
    let mut partitions = transaction.open_multimap_table(schema::PARTITIONS)?;
    for partition in &record.run.spec.building_partitions {
        partitions.remove(partition.as_str(), number)?;
    }
    if let Some(ended) = record.run.state.ended() {
        transaction.open_table(schema::EVICTABLE)?.remove((ended.0, number))?;
    }
    Ok(())
}

fn forget_places(transaction: &WriteTransaction, number: RunNumber) -> Result<(), Failure> {
    transaction
        .open_table(schema::CHECKPOINTS)?
        .retain_in((number, 0, 0)..=(number, u8::MAX, u64::MAX), |_, _| false)?;
    transaction.open_table(schema::TIMES)?.retain_in((number, 0)..=(number, u64::MAX), |_, _| false)?;
    Ok(())
}

/// Whether an error of the system when opening a database means that the file is not one.
fn is_damage(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput)
}

fn quarantine(path: &Path, why: &str) -> Result<(), LogError> {
    let aside = path.with_extension(format!("redb.corrupt-{}", UnixMicros::now().0));
    tracing::error!(path = %path.display(), aside = %aside.display(), why, "the index can't be used and is made anew");
    fs::rename(path, &aside).map_err(LogError::io("moving aside", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{JobMetadata, RunSpec, RunState};

    fn record(id: &str, partition: &str, ended: Option<u64>) -> RunRecord {
        let mut spec = RunSpec::new(id.parse().unwrap());
        spec.building_partitions.push(partition.into());
        let mut run = JobMetadata::started(spec, UnixMicros(1));
        if let Some(ended) = ended {
            run.state = RunState::Succeeded { ended: UnixMicros(ended) };
        }
        RunRecord { run, gaps: Vec::new(), has_journal: true, disk_bytes: 10 }
    }

    fn ids(found: &[(RunNumber, RunRecord)]) -> Vec<&str> {
        found.iter().map(|(_, record)| record.run.id().as_str()).collect()
    }

    fn index() -> (tempfile::TempDir, Index) {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(folder.path().join("index.redb")).unwrap();
        (folder, index)
    }

    #[test]
    fn runs_are_found_by_id_prefix_partition_and_age() {
        let (_folder, index) = index();
        let runs = vec![
            (1, record("aa", "p", Some(5))),
            (2, record("ab", "q", None)),
            (3, record("b", "p", Some(4))),
        ];
        index.commit(&Changes { runs, ..Changes::default() }).unwrap();
        assert!(matches!(index.find(&"ab".parse().unwrap()), Ok(Some(Known::Run(2, _)))));
        assert!(index.find(&"zz".parse().unwrap()).unwrap().is_none());
        let mut found = Vec::new();
        index.with_prefix("a", |number, record| found.push((number, record))).unwrap();
        assert_eq!(ids(&found), ["aa", "ab"]);
        assert_eq!(ids(&index.live_runs().unwrap()), ["ab"]);
        assert_eq!(index.last_number().unwrap(), 3);
        let mut newest = Vec::new();
        index
            .newest_of_partition("p", u64::MAX, |number, _| {
                newest.push(number);
                true
            })
            .unwrap();
        assert_eq!(newest, [3, 1]);
        let stone = Tombstone {
            id: "b".parse().unwrap(),
            evicted_at: UnixMicros(9),
            reason: "older than 7 days".into(),
            lines: 1,
            bytes: 2,
        };
        let changes =
            Changes { forgotten: vec![1, 3], tombstones: vec![stone.clone()], ..Changes::default() };
        index.commit(&changes).unwrap();
        assert!(index.find(&"aa".parse().unwrap()).unwrap().is_none());
        assert!(matches!(index.find(&stone.id), Ok(Some(Known::Evicted(found))) if found == stone));
    }

    #[test]
    fn places_are_found_by_line_time_and_position() {
        let (_folder, index) = index();
        let lines = (1..=100)
            .map(|i| LineCheckpoint {
                stream: Stream::Stdout,
                line: i * 600,
                offset: i * 65_536,
                time: UnixMicros(i),
            })
            .map(|at| (7, at))
            .collect();
        let progress = (1..=50u64)
            .map(|i| {
                let mut progress = Progress::start(UnixMicros(1_000_000 + i * i), i * 10);
                progress.streams[0].lines = i * 100;
                (7, progress)
            })
            .collect();
        index.commit(&Changes { lines, progress, ..Changes::default() }).unwrap();
        assert_eq!(index.line_floor(7, Stream::Stdout, 599).unwrap(), None);
        assert_eq!(index.line_floor(7, Stream::Stdout, 1799).unwrap(), Some((1200, 131_072)));
        assert_eq!(index.line_floor(8, Stream::Stdout, 1799).unwrap(), None);
        assert_eq!(index.line_floor(7, Stream::Stderr, 1799).unwrap(), None);
        let at = |time| index.progress_while(7, |p| p.time.0 < time).unwrap().map(|p| p.lines());
        assert_eq!((at(1_000_001), at(1_000_002), at(u64::MAX)), (None, Some(100), Some(5000)));
        for position in [0, 99, 100, 101, 2549, 2550, 5000, 9000] {
            let found = index.progress_while(7, |p| p.lines() <= position).unwrap().map_or(0, |p| p.lines());
            assert_eq!(found, (position / 100 * 100).min(5000), "{position}");
        }
        assert!(index.progress_while(8, |_| true).unwrap().is_none());
    }

    #[test]
    fn a_second_opener_is_told_so_and_damage_is_moved_aside() {
        let (folder, index) = index();
        let path = folder.path().join("index.redb");
        assert!(matches!(Index::open(path.clone()), Err(LogError::InUse { .. })));
        index.close().unwrap();
        assert!(matches!(index.last_number(), Err(LogError::Closed)));
        for damage in [&b""[..], b"not a database", &[0; 8192]] {
            fs::write(&path, damage).unwrap();
            let index = Index::open(path.clone()).unwrap();
            assert_eq!(index.last_number().unwrap(), 0);
            index.close().unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}
