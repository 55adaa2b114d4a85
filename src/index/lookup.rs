//! Looking things up in the index.

use redb::{ReadTransaction, ReadableMultimapTable, ReadableTable};

use crate::error::LogError;
use crate::index::checkpoints;
use crate::index::codec::{self, Damaged, RunRecord};
use crate::index::failure::{Failure, damaged};
use crate::index::handle::Index;
use crate::index::progress::{Checkpointer, LineCheckpoint, Progress, Resume};
use crate::index::schema::{self, RunNumber};
use crate::journal::Place;
use crate::line::{Stream, UnixMicros};
use crate::run::{JobRunId, Tombstone};

/// What the index knows of an id.
#[derive(Debug)]
pub(crate) enum Known {
    /// A run.
    Run(RunNumber, Box<RunRecord>),
    /// A run that was evicted.
    Evicted(Tombstone),
}

/// What the tables that only point to runs say of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StandingRows {
    /// Whether it is among those that are not over.
    pub(crate) live: bool,
    /// Bytes on disk that its eviction would free, or would if it were not pinned.
    pub(crate) evictable: Option<u64>,
    /// Whether it is never evicted.
    pub(crate) pinned: bool,
    /// Whether each of its partitions leads to it.
    pub(crate) found_by_partition: bool,
}

/// Runs that are over and not compressed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NotCompressed {
    /// The oldest first.
    pub(crate) runs: Vec<JobRunId>,
    /// Where to look for more; `None` if there are none.
    pub(crate) behind: Option<(u64, RunNumber)>,
}

/// A place in a log with at most so many lines before it, and the one that is kept behind it if that is known too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineFloor {
    pub(crate) place: Place,
    pub(crate) next: Option<Place>,
}

impl Index {
    /// The runs that ended at `until` at the latest and are not compressed, from the place of one look on, among so
    /// many rows. From the beginning, all pinned ones come first.
    pub(crate) fn not_compressed(
        &self,
        from: (u64, RunNumber),
        until: UnixMicros,
        rows: usize,
    ) -> Result<NotCompressed, LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?;
            let table = transaction.open_table(schema::EVICTABLE)?;
            let mut found = NotCompressed::default();
            let look_at = |found: &mut NotCompressed, number| -> Result<(), Failure> {
                let Some(value) = runs.get(number)? else { return Ok(()) };
                let record = codec::decode_run(number, value.value()).map_err(damaged)?;
                if !record.compressed && record.run.state.ended().is_some_and(|ended| ended <= until) {
                    found.runs.push(record.run.id().clone());
                }
                Ok(())
            };
            if from == (0, 0) {
                for row in transaction.open_table(schema::PINNED)?.iter()? {
                    look_at(&mut found, row?.0.value())?;
                }
            }
            if from > (until.0, RunNumber::MAX) {
                return Ok(found);
            }
            for row in table.range(from..=(until.0, RunNumber::MAX))?.take(rows) {
                let (ended, number) = row?.0.value();
                found.behind = Some((ended, number.saturating_add(1)));
                look_at(&mut found, number)?;
            }
            Ok(found)
        })
    }

    /// What is known of an id.
    pub(crate) fn find(&self, id: &JobRunId) -> Result<Option<Known>, LogError> {
        let found = self.read(|transaction| {
            if let Some(number) = transaction.open_table(schema::RUN_IDS)?.get(id.as_str())? {
                let number = number.value();
                let record = transaction.open_table(schema::RUNS)?.get(number)?;
                // Every id has a record: both rows are written together.
                let record = codec::decode_run(number, record.ok_or(damaged(Damaged))?.value());
                let record = record.ok().filter(|record| record.run.id() == id).ok_or(damaged(Damaged))?;
                return Ok(Some(Known::Run(number, Box::new(record))));
            }
            match transaction.open_table(schema::TOMBSTONES)?.get(id.as_str())? {
                Some(value) => {
                    let stone = codec::decode_tombstone(id.clone(), value.value()).map_err(damaged)?;
                    Ok(Some(Known::Evicted(stone)))
                }
                None => Ok(None),
            }
        });
        found.or_else(|error| match self.evicted_before(id) {
            Some(stone) => Ok(Some(Known::Evicted(stone))),
            None => Err(error),
        })
    }

    /// The last place kept of a stream that has at most `line` lines before it: (lines before, byte offset).
    pub(crate) fn line_floor(
        &self,
        run: RunNumber,
        stream: Stream,
        line: u64,
    ) -> Result<Option<LineFloor>, LogError> {
        self.read(|transaction| {
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            let found = checkpoints::floor(&table, run, stream, line)?;
            let place = |at: LineCheckpoint| Place { lines: at.line, offset: at.offset };
            Ok(found.map(|(at, next)| LineFloor { place: place(at), next: next.map(place) }))
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
                    low = middle.saturating_add(1);
                    continue;
                };
                let (key, value) = row?;
                let progress = place(run, key.value(), value.value())?;
                if is_before(&progress) {
                    best = Some(progress);
                    let Some(above) = middle.checked_add(1) else { break };
                    low = above;
                } else {
                    let Some(below) = key.value().1.checked_sub(1) else { break };
                    high = below;
                }
            }
            Ok(best)
        })
    }

    /// From where a run that was not over is to be followed on: its last place kept, and what was known there.
    pub(crate) fn resume(&self, run: RunNumber) -> Result<Option<Resume>, LogError> {
        self.read(|transaction| {
            let Some(value) = transaction.open_table(schema::RUNS)?.get(run)? else { return Ok(None) };
            let record = codec::decode_run(run, value.value()).map_err(damaged)?;
            let times = transaction.open_table(schema::TIMES)?;
            let Some(row) = times.range((run, 0)..=(run, u64::MAX))?.next_back() else { return Ok(None) };
            let (key, value) = row?;
            let progress = place(run, key.value(), value.value())?;
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            let mut next_offset = [Checkpointer::EVERY_BYTES; 2];
            for stream in Stream::BOTH {
                if let Some((at, _)) = checkpoints::floor(&table, run, stream, progress.of(stream).lines)? {
                    next_offset[stream.index()] = at.offset + Checkpointer::EVERY_BYTES;
                }
            }
            let is_before = |at: &crate::index::progress::GapAt| {
                at.gap.after.0.saturating_add(at.gap.lines) <= progress.of(at.gap.stream).lines
            };
            let gaps = record.gaps.into_iter().filter(is_before).collect();
            let checkpointer = Checkpointer::behind_a_place(next_offset);
            let (started_at, cuts) = (record.run.started_at, record.cuts);
            Ok(Some(Resume { started_at, progress, checkpointer, gaps, cuts }))
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
                    found.push((number, codec::decode_run(number, value.value()).map_err(damaged)?));
                }
            }
            Ok(found)
        })
    }

    /// The highest run number given so far.
    pub(crate) fn last_number(&self) -> Result<RunNumber, LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?;
            let Some((key, value)) = runs.last()? else { return Ok(0) };
            // A damaged number could be the last that there is.
            codec::decode_run(key.value(), value.value()).map_err(damaged)?;
            Ok(key.value())
        })
    }

    /// Gives every id and its run number, in the order of the ids, to `take` until that returns false.
    pub(crate) fn ids(&self, mut take: impl FnMut(&str, RunNumber) -> bool) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_table(schema::RUN_IDS)?.iter()? {
                let (id, number) = row?;
                if !take(id.value(), number.value()) {
                    break;
                }
            }
            Ok(())
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
                let record = codec::decode_run(key.value(), value.value()).map_err(damaged)?;
                if !take(key.value(), record) {
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
                    && !take(number, codec::decode_run(number, value.value()).map_err(damaged)?)
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
                let number = number.value();
                if let Some(value) = runs.get(number)? {
                    take(number, codec::decode_run(number, value.value()).map_err(damaged)?);
                }
            }
            Ok(())
        })
    }

    /// All that is kept of evicted runs, in the order of their ids.
    pub(crate) fn tombstones(&self) -> Result<Vec<Tombstone>, LogError> {
        self.read(tombstones)
    }

    /// The record of a run.
    pub(crate) fn record(&self, run: RunNumber) -> Result<Option<RunRecord>, LogError> {
        self.read(|transaction| match transaction.open_table(schema::RUNS)?.get(run)? {
            Some(value) => Ok(Some(codec::decode_run(run, value.value()).map_err(damaged)?)),
            None => Ok(None),
        })
    }

    /// Gives every place kept of a run's lines, stream by stream in rising order.
    pub(crate) fn checkpoints(
        &self,
        run: RunNumber,
        mut take: impl FnMut(LineCheckpoint),
    ) -> Result<(), LogError> {
        self.read(|transaction| {
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            for row in table.range((run, 0, 0)..=(run, u8::MAX, u64::MAX))? {
                let (key, value) = row?;
                checkpoints::places(key.value(), value.value())?.into_iter().for_each(&mut take);
            }
            Ok(())
        })
    }

    /// Gives every place kept of a run's journal, in rising order.
    pub(crate) fn places(&self, run: RunNumber, mut take: impl FnMut(Progress)) -> Result<(), LogError> {
        self.read(|transaction| {
            let table = transaction.open_table(schema::TIMES)?;
            for row in table.range((run, 0)..=(run, u64::MAX))? {
                let (key, value) = row?;
                take(place(run, key.value(), value.value())?);
            }
            Ok(())
        })
    }

    /// What the smaller tables say of a run with this record.
    pub(crate) fn standing(&self, run: RunNumber, record: &RunRecord) -> Result<StandingRows, LogError> {
        self.read(|transaction| {
            let evictable = match record.run.state.ended() {
                Some(ended) => transaction.open_table(schema::EVICTABLE)?.get((ended.0, run))?,
                None => None,
            };
            let pinned = transaction.open_table(schema::PINNED)?.get(run)?.map(|bytes| bytes.value());
            let partitions = transaction.open_multimap_table(schema::PARTITIONS)?;
            let mut found_by_partition = true;
            for partition in &record.run.spec.building_partitions {
                let mut runs = partitions.get(partition.as_str())?;
                found_by_partition &= runs.any(|number| number.is_ok_and(|number| number.value() == run));
            }
            Ok(StandingRows {
                live: transaction.open_table(schema::LIVE)?.get(run)?.is_some(),
                evictable: evictable.map(|bytes| bytes.value()).xor(pinned),
                pinned: pinned.is_some(),
                found_by_partition,
            })
        })
    }

    /// Gives every row for eviction: (end in µs, run, bytes on disk), oldest first.
    pub(crate) fn evictable(&self, mut take: impl FnMut(u64, RunNumber, u64)) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_table(schema::EVICTABLE)?.iter()? {
                let (key, bytes) = row?;
                take(key.value().0, key.value().1, bytes.value());
            }
            Ok(())
        })
    }

    /// Gives every partition and the runs that build it.
    pub(crate) fn partitions(&self, mut take: impl FnMut(&str, RunNumber)) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_multimap_table(schema::PARTITIONS)?.iter()? {
                let (partition, numbers) = row?;
                for number in numbers {
                    take(partition.value(), number?.value());
                }
            }
            Ok(())
        })
    }

    /// Run numbers that some table has rows of, each once for every table and in rising order within one.
    pub(crate) fn numbers_in_use(&self, mut take: impl FnMut(RunNumber)) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_table(schema::RUNS)?.iter()? {
                take(row?.0.value());
            }
            for row in transaction.open_table(schema::LIVE)?.iter()? {
                take(row?.0.value());
            }
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            let mut from = 0;
            while let Some(row) = table.range((from, 0, 0)..)?.next() {
                let number = row?.0.value().0;
                take(number);
                let Some(next) = number.checked_add(1) else { break };
                from = next;
            }
            let table = transaction.open_table(schema::TIMES)?;
            let mut from = 0;
            while let Some(row) = table.range((from, 0)..)?.next() {
                let number = row?.0.value().0;
                take(number);
                let Some(next) = number.checked_add(1) else { break };
                from = next;
            }
            Ok(())
        })
    }
}

pub(super) fn tombstones(transaction: &ReadTransaction) -> Result<Vec<Tombstone>, Failure> {
    let mut stones = Vec::new();
    for row in transaction.open_table(schema::TOMBSTONES)?.iter()? {
        let (id, value) = row?;
        let id = id.value().parse().map_err(|_| damaged(Damaged))?;
        stones.push(codec::decode_tombstone(id, value.value()).map_err(damaged)?);
    }
    Ok(stones)
}

/// A row of places in a journal; sound and of this run, or an error.
fn place(run: RunNumber, (number, time): (RunNumber, u64), value: &[u8]) -> Result<Progress, Failure> {
    let progress = codec::decode_progress(run, value).map_err(damaged)?;
    if number != run || progress.time.0 != time {
        return Err(damaged(Damaged));
    }
    Ok(progress)
}
