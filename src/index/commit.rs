//! Writing to the index: what runs have to say, all of it or none.

use redb::{ReadableTable, WriteTransaction};

use crate::error::LogError;
use crate::index::checkpoints;
use crate::index::codec::{self, RunRecord};
use crate::index::failure::Failure;
use crate::index::handle::Index;
use crate::index::progress::{LineCheckpoint, Progress};
use crate::index::retention::{Finished, put_pins, put_tombstones};
use crate::index::schema::{self, RunNumber};
use crate::run::Tombstone;

/// What a commit writes.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Runs whose rows are taken out before anything is written: their folders are gone, or their rows are wrong.
    pub(crate) forgotten: Vec<RunNumber>,
    /// Runs that are new, or whose record changed.
    pub(crate) runs: Vec<(RunNumber, RunRecord)>,
    /// Runs that are compressed now, and the bytes that each takes up on disk. What the index does not know any more
    /// is passed over.
    pub(crate) compressed: Vec<(RunNumber, u64)>,
    /// Places of lines, in rising order for each run and stream.
    pub(crate) lines: Vec<(RunNumber, LineCheckpoint)>,
    /// Places in journals.
    pub(crate) progress: Vec<(RunNumber, Progress)>,
    /// Runs that are never to be evicted, or may be again.
    pub(crate) pins: Vec<(RunNumber, bool)>,
    /// What is left of runs that were evicted.
    pub(crate) tombstones: Vec<Tombstone>,
}

impl Changes {
    pub(crate) const fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// How many rows that is, more or less.
    pub(crate) const fn rows(&self) -> usize {
        self.runs.len()
            + self.compressed.len()
            + self.lines.len()
            + self.progress.len()
            + self.forgotten.len()
            + self.pins.len()
            + self.tombstones.len()
    }

    /// Lets go of everything, and keeps the room that it took.
    pub(crate) fn clear(&mut self) {
        let Self { forgotten, runs, compressed, lines, progress, pins, tombstones } = self;
        forgotten.clear();
        runs.clear();
        compressed.clear();
        lines.clear();
        progress.clear();
        pins.clear();
        tombstones.clear();
    }

    pub(super) fn put(&self, transaction: &WriteTransaction) -> Result<(), Failure> {
        for &number in &self.forgotten {
            forget_run(transaction, number)?;
        }
        put_runs(transaction, &self.runs)?;
        put_runs(transaction, &compressed(transaction, &self.compressed)?)?;
        put_pins(transaction, &self.pins)?;
        put_tombstones(transaction, &self.tombstones)?;
        checkpoints::put(transaction, &self.lines)?;
        let mut times = transaction.open_table(schema::TIMES)?;
        for (number, progress) in &self.progress {
            let value = codec::encode_progress(*number, progress);
            times.insert((*number, progress.time.0), value.as_slice())?;
        }
        Ok(())
    }
}

impl Index {
    /// Writes changes, all or none, and syncs the disk.
    pub(crate) fn commit(&self, changes: &Changes) -> Result<(), LogError> {
        self.write(|transaction| changes.put(transaction))
    }

    /// Lets go of the places that are kept of runs behind where they are followed on from: they are derived again, and
    /// after a power cut the index can know of more than the files do.
    pub(crate) fn forget_places_behind(
        &self,
        runs: &[(RunNumber, Option<Progress>)],
    ) -> Result<(), LogError> {
        self.write(|transaction| {
            for (number, place) in runs {
                forget_places(transaction, *number, place.as_ref())?;
            }
            Ok(())
        })
    }
}

fn put_runs(transaction: &WriteTransaction, runs: &[(RunNumber, RunRecord)]) -> Result<(), Failure> {
    if runs.is_empty() {
        return Ok(());
    }
    let mut ids = transaction.open_table(schema::RUN_IDS)?;
    let mut records = transaction.open_table(schema::RUNS)?;
    let mut live = transaction.open_table(schema::LIVE)?;
    let mut finished = Finished::open(transaction)?;
    let mut partitions = transaction.open_multimap_table(schema::PARTITIONS)?;
    for (number, record) in runs {
        ids.insert(record.run.id().as_str(), number)?;
        records.insert(number, codec::encode_run(*number, record).as_slice())?;
        for partition in &record.run.spec.building_partitions {
            partitions.insert(partition.as_str(), number)?;
        }
        if let Some(ended) = record.run.state.ended() {
            live.remove(number)?;
            finished.put(ended, *number, record.disk_bytes)?;
        } else {
            live.insert(number, ())?;
        }
    }
    finished.close(transaction)
}

/// The records of runs that are compressed now.
fn compressed(
    transaction: &WriteTransaction,
    runs: &[(RunNumber, u64)],
) -> Result<Vec<(RunNumber, RunRecord)>, Failure> {
    let mut found = Vec::new();
    if runs.is_empty() {
        return Ok(found);
    }
    let records = transaction.open_table(schema::RUNS)?;
    for &(number, disk_bytes) in runs {
        if let Some(value) = records.get(number)?
            && let Ok(record) = codec::decode_run(number, value.value())
        {
            found.push((number, RunRecord { disk_bytes, compressed: true, ..record }));
        }
    }
    Ok(found)
}

pub(super) fn forget_run(transaction: &WriteTransaction, number: RunNumber) -> Result<(), Failure> {
    let record = {
        let mut records = transaction.open_table(schema::RUNS)?;
        let removed = records.remove(number)?;
        removed.and_then(|value| codec::decode_run(number, value.value()).ok())
    };
    transaction.open_table(schema::LIVE)?.remove(number)?;
    forget_places(transaction, number, None)?;
    let mut finished = Finished::open(transaction)?;
    finished.remove(record.as_ref().and_then(|record| record.run.state.ended()), number)?;
    finished.close(transaction)?;
    let Some(record) = record else { return Ok(()) };
    let id = record.run.id().as_str();
    let mut ids = transaction.open_table(schema::RUN_IDS)?;
    // The id may have another number by now.
    if ids.get(id)?.is_some_and(|known| known.value() == number) {
        ids.remove(id)?;
    }
    let mut partitions = transaction.open_multimap_table(schema::PARTITIONS)?;
    for partition in &record.run.spec.building_partitions {
        partitions.remove(partition.as_str(), number)?;
    }
    Ok(())
}

/// Takes out the places of a run behind this one, or all of them.
fn forget_places(
    transaction: &WriteTransaction,
    number: RunNumber,
    place: Option<&Progress>,
) -> Result<(), Failure> {
    checkpoints::forget(transaction, number, place)?;
    let behind = place.map_or(0, |place| place.time.0.saturating_add(1));
    transaction.open_table(schema::TIMES)?.retain_in((number, behind)..=(number, u64::MAX), |_, _| false)?;
    Ok(())
}
