//! What eviction needs of the index: which runs are oldest, what all of them take up, which are pinned, and what is
//! left of those that are gone.
//!
//! The sum of what finished runs take up is kept beside their rows and written in the same transaction, so nobody has
//! to add them up each time.
//!
//! These rows are bare numbers, without the checksum that a record has, and one wrong bit in them is as good as any other
//! number: a second ago is long ago, and 1 MB is 35 TB. So whoever removes a run because of them first sees that they agree
//! with something else: an end with that in the run's record, and the sum with the rows.

use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata, Table, WriteTransaction};

use crate::error::LogError;
use crate::index::codec::{self, RunRecord};
use crate::index::commit::forget_run;
use crate::index::failure::{Failure, damaged};
use crate::index::handle::Index;
use crate::index::schema::{self, RunNumber};
use crate::line::UnixMicros;
use crate::retention::Candidate;
use crate::run::Tombstone;

/// The most tombstones that are kept; beyond that the oldest go, and their runs are as if they had never been.
pub(crate) const MAX_TOMBSTONES: u64 = 100_000;

/// How many runs there are, and what those that are over take up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Runs that are over.
    pub(crate) finished: u64,
    /// Of those, runs that may be evicted.
    pub(crate) evictable: u64,
    /// Bytes on disk of all runs that are over.
    pub(crate) finished_bytes: u64,
}

/// The rows of runs that are over, and the sum of what they take up.
pub(super) struct Finished<'t> {
    evictable: Table<'t, (u64, RunNumber), u64>,
    pinned: Table<'t, RunNumber, u64>,
    added: u64,
    taken: u64,
}

impl<'t> Finished<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, Failure> {
        let evictable = transaction.open_table(schema::EVICTABLE)?;
        Ok(Self { evictable, pinned: transaction.open_table(schema::PINNED)?, added: 0, taken: 0 })
    }

    /// Notes what a run takes up that is over.
    pub(super) fn put(&mut self, ended: UnixMicros, number: RunNumber, bytes: u64) -> Result<(), Failure> {
        let is_pinned = self.pinned.get(number)?.is_some();
        let before = match is_pinned {
            true => self.pinned.insert(number, bytes)?.map(|bytes| bytes.value()),
            false => self.evictable.insert((ended.0, number), bytes)?.map(|bytes| bytes.value()),
        };
        self.added += bytes;
        self.taken += before.unwrap_or(0);
        Ok(())
    }

    /// Takes out the rows of a run.
    pub(super) fn remove(&mut self, ended: Option<UnixMicros>, number: RunNumber) -> Result<(), Failure> {
        self.taken += self.pinned.remove(number)?.map_or(0, |bytes| bytes.value());
        if let Some(ended) = ended {
            self.taken += self.evictable.remove((ended.0, number))?.map_or(0, |bytes| bytes.value());
        }
        Ok(())
    }

    /// Moves a run between those that may be evicted and those that are pinned. One that goes on takes up nothing yet.
    fn pin(&mut self, ended: Option<UnixMicros>, number: RunNumber, pinned: bool) -> Result<(), Failure> {
        if pinned {
            let bytes = match ended {
                Some(ended) => self.evictable.remove((ended.0, number))?.map(|bytes| bytes.value()),
                None => None,
            };
            if self.pinned.get(number)?.is_none() {
                self.pinned.insert(number, bytes.unwrap_or(0))?;
            }
        } else {
            let bytes = self.pinned.remove(number)?.map(|bytes| bytes.value());
            if let (Some(bytes), Some(ended)) = (bytes, ended) {
                self.evictable.insert((ended.0, number), bytes)?;
            }
        }
        Ok(())
    }

    /// Writes the sum.
    pub(super) fn close(self, transaction: &WriteTransaction) -> Result<(), Failure> {
        if self.added == self.taken {
            return Ok(());
        }
        let mut totals = transaction.open_table(schema::TOTALS)?;
        let before = totals.get(schema::FINISHED_BYTES)?.map_or(0, |sum| sum.value());
        let after = before.saturating_add(self.added).saturating_sub(self.taken);
        totals.insert(schema::FINISHED_BYTES, after)?;
        Ok(())
    }
}

/// Notes which runs are pinned, and which are not any more.
pub(super) fn put_pins(transaction: &WriteTransaction, pins: &[(RunNumber, bool)]) -> Result<(), Failure> {
    if pins.is_empty() {
        return Ok(());
    }
    let runs = transaction.open_table(schema::RUNS)?;
    let mut finished = Finished::open(transaction)?;
    for &(number, pinned) in pins {
        let Some(value) = runs.get(number)? else { continue };
        let record = codec::decode_run(number, value.value()).map_err(damaged)?;
        finished.pin(record.run.state.ended(), number, pinned)?;
    }
    finished.close(transaction)
}

/// Notes what is left of evicted runs, and lets go of the oldest beyond a number.
pub(super) fn put_tombstones(transaction: &WriteTransaction, stones: &[Tombstone]) -> Result<(), Failure> {
    if stones.is_empty() {
        return Ok(());
    }
    let mut tombstones = transaction.open_table(schema::TOMBSTONES)?;
    let mut times = transaction.open_table(schema::TOMBSTONE_TIMES)?;
    for stone in stones {
        let id = stone.id.as_str();
        let before = tombstones.insert(id, codec::encode_tombstone(stone).as_slice())?;
        if let Some(before) = before
            && let Ok(before) = codec::decode_tombstone(stone.id.clone(), before.value())
        {
            times.remove((before.evicted_at.0, id))?;
        }
        times.insert((stone.evicted_at.0, id), ())?;
    }
    while times.len()? > MAX_TOMBSTONES
        && let Some((key, ())) = times.pop_first()?.map(|(key, value)| (key, value.value()))
    {
        tombstones.remove(key.value().1)?;
    }
    Ok(())
}

impl Index {
    /// How many runs there are and what they take up, without looking at any of them.
    pub(crate) fn totals(&self) -> Result<Totals, LogError> {
        self.read(|transaction| {
            let runs = transaction.open_table(schema::RUNS)?.len()?;
            let live = transaction.open_table(schema::LIVE)?.len()?;
            Ok(Totals {
                finished: runs.saturating_sub(live),
                evictable: transaction.open_table(schema::EVICTABLE)?.len()?,
                finished_bytes: total(transaction, schema::FINISHED_BYTES)?.unwrap_or(0),
            })
        })
    }

    /// What finished runs take up, added up row by row.
    pub(crate) fn count_finished_bytes(&self) -> Result<u64, LogError> {
        self.read(|transaction| {
            let (evictable, pinned) = (schema::EVICTABLE, schema::PINNED);
            Ok(add_up(&transaction.open_table(evictable)?, &transaction.open_table(pinned)?)?.1)
        })
    }

    /// Sees that the sum and the number of the rows are those that are kept of them. What that takes grows with the runs.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if not: the index is damaged then, and is to be [mended](Self::mend).
    pub(crate) fn confirm_totals(&self) -> Result<(), LogError> {
        self.read(|transaction| {
            let evictable = transaction.open_table(schema::EVICTABLE)?;
            let (rows, sum) = add_up(&evictable, &transaction.open_table(schema::PINNED)?)?;
            if rows != evictable.len()? {
                return Err(Failure::Disagrees("there are not as many rows of runs as were counted"));
            }
            if total(transaction, schema::FINISHED_BYTES)?.unwrap_or(0) != sum {
                return Err(Failure::Disagrees("what runs take up is not the sum of their rows"));
            }
            Ok(())
        })
    }

    /// The record of a run that may be evicted; `None` if it has gone since, or may not be evicted any more.
    ///
    /// # Errors
    ///
    /// [`LogError::Index`] if the run ended at another time than its row says: the index is damaged then, and is to be
    /// [mended](Self::mend).
    pub(crate) fn record_to_evict(&self, row: &Candidate) -> Result<Option<RunRecord>, LogError> {
        self.read(|transaction| {
            let evictable = transaction.open_table(schema::EVICTABLE)?;
            let has_row = |ended: UnixMicros| -> Result<bool, Failure> {
                Ok(evictable.get((ended.0, row.number))?.is_some())
            };
            let is_there = has_row(row.ended)?;
            let record = match transaction.open_table(schema::RUNS)?.get(row.number)? {
                Some(value) => Some(codec::decode_run(row.number, value.value()).map_err(damaged)?),
                None => None,
            };
            let agrees = match record.as_ref().and_then(|record| record.run.state.ended()) {
                Some(ended) if ended == row.ended => true,
                // The index may have been made anew since the row was read, and the number be another run's.
                Some(ended) => {
                    let is_pinned = transaction.open_table(schema::PINNED)?.get(row.number)?.is_some();
                    !is_there && (is_pinned || has_row(ended)?)
                }
                None => !is_there,
            };
            match agrees {
                true => Ok(record.filter(|_| is_there)),
                false => Err(Failure::Disagrees("a run did not end when its row among those to evict says")),
            }
        })
    }

    /// Sets the sum of what finished runs take up to what their rows add up to; gives whether that changed it.
    pub(crate) fn correct_finished_bytes(&self) -> Result<bool, LogError> {
        self.write(|transaction| {
            let (_, sum) = add_up(
                &transaction.open_table(schema::EVICTABLE)?,
                &transaction.open_table(schema::PINNED)?,
            )?;
            let mut totals = transaction.open_table(schema::TOTALS)?;
            let before = totals.insert(schema::FINISHED_BYTES, sum)?.map_or(0, |sum| sum.value());
            Ok(before != sum)
        })
    }

    /// Shows the runs that may be evicted to `look`, oldest first; what is not taken is not read. Runs that ended in
    /// the same microsecond come by their numbers: in the order in which they became known.
    pub(crate) fn oldest_first<T>(
        &self,
        look: impl FnOnce(&mut dyn Iterator<Item = Candidate>) -> T,
    ) -> Result<T, LogError> {
        self.read(|transaction| {
            let table = transaction.open_table(schema::EVICTABLE)?;
            let mut failed = None;
            let mut rows = table.iter()?.map_while(|row| match row {
                Ok((key, bytes)) => {
                    let (ended, number) = key.value();
                    Some(Candidate { ended: UnixMicros(ended), number, bytes: bytes.value() })
                }
                Err(error) => {
                    failed = Some(error);
                    None
                }
            });
            let seen = look(&mut rows);
            drop(rows);
            failed.map_or(Ok(seen), |error| Err(error.into()))
        })
    }

    /// Takes out the rows of evicted runs and notes what is left of them, all or nothing. A number that is another
    /// run's by now is left alone.
    pub(crate) fn evict(&self, evicted: &[(Option<RunNumber>, Tombstone)]) -> Result<(), LogError> {
        self.write(|transaction| {
            for (number, stone) in evicted {
                let Some(number) = *number else { continue };
                let known = {
                    let ids = transaction.open_table(schema::RUN_IDS)?;
                    ids.get(stone.id.as_str())?.map(|known| known.value())
                };
                if known == Some(number) {
                    forget_run(transaction, number)?;
                }
            }
            let stones: Vec<Tombstone> = evicted.iter().map(|(_, stone)| stone.clone()).collect();
            put_tombstones(transaction, &stones)
        })
    }

    /// Whether a run is pinned.
    pub(crate) fn is_pinned(&self, number: RunNumber) -> Result<bool, LogError> {
        self.read(|transaction| Ok(transaction.open_table(schema::PINNED)?.get(number)?.is_some()))
    }

    /// Gives every pinned run and what it takes up; a run that goes on, 0.
    pub(crate) fn pinned(&self, mut take: impl FnMut(RunNumber, u64)) -> Result<(), LogError> {
        self.read(|transaction| {
            for row in transaction.open_table(schema::PINNED)?.iter()? {
                let (number, bytes) = row?;
                take(number.value(), bytes.value());
            }
            Ok(())
        })
    }

    /// When what the index says of sizes was last compared with the disk.
    pub(crate) fn audited_at(&self) -> Result<Option<UnixMicros>, LogError> {
        self.read(|transaction| Ok(total(transaction, schema::AUDITED_AT)?.map(UnixMicros)))
    }

    /// Notes when that was.
    pub(crate) fn set_audited_at(&self, time: UnixMicros) -> Result<(), LogError> {
        self.write(|transaction| {
            transaction.open_table(schema::TOTALS)?.insert(schema::AUDITED_AT, time.0)?;
            Ok(())
        })
    }
}

/// How many runs may be evicted by their rows, and what all of them take up, pinned ones included.
fn add_up(
    evictable: &impl ReadableTable<(u64, RunNumber), u64>,
    pinned: &impl ReadableTable<RunNumber, u64>,
) -> Result<(u64, u64), Failure> {
    let (mut rows, mut sum) = (0, 0_u64);
    for row in evictable.iter()? {
        rows += 1;
        sum = sum.saturating_add(row?.1.value());
    }
    for row in pinned.iter()? {
        sum = sum.saturating_add(row?.1.value());
    }
    Ok((rows, sum))
}

fn total(transaction: &ReadTransaction, name: &str) -> Result<Option<u64>, Failure> {
    Ok(transaction.open_table(schema::TOTALS)?.get(name)?.map(|number| number.value()))
}
