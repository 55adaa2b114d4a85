//! Evicting runs: which ones, how, and how an eviction that was cut short is finished.
//!
//! A run goes in four steps: who reads it is told; its folder is moved to the trash, under a name that says when and
//! why; its rows leave the index and a tombstone takes their place, in one commit for many runs; its files are
//! removed. On a full disk the logs are removed before the commit, which needs room itself. Whatever step a crash
//! comes after, what is in the trash tells how to go on.

mod evictions;
mod trash;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::{Index, RunNumber};
use crate::layout::{Disk, Removal};
use crate::line::UnixMicros;
use crate::meter;
use crate::retention::{
    Candidate, EvictedRun, EvictionReason, GcReport, GcRequest, KeptRun, RetentionPolicy, Standing, plan,
};
use crate::run::{JobRunId, Tombstone};
use crate::store::file::commit::commit_all;
use crate::store::file::shared::Shared;

pub(crate) use evictions::Evictions;
use evictions::{Turn, lock};
use trash::remove;
pub(crate) use trash::{outstanding, tombstone};

/// Runs that are evicted with one commit.
const BATCH: usize = 256;
/// Runs that one request evicts.
const MOST_EVICTED: usize = 1_000;
/// Runs that a request names which evicts none.
const MOST_NAMED: usize = 10_000;
/// What an eviction on a full disk leaves free beyond the floor, so that what comes next finds room.
const ROOM: u64 = 1024 * 1024;
/// After a try that freed nothing, how long until the next.
const NEXT_RESCUE: Duration = Duration::from_secs(1);

/// How much is to go at once, and what is done with it.
#[derive(Clone, Copy, Debug)]
struct Order {
    policy: RetentionPolicy,
    /// Bytes that have to become free in any case.
    to_free: u64,
    dry_run: bool,
    at_most: usize,
}

/// A run whose turn it is.
struct Victim {
    row: Candidate,
    reason: EvictionReason,
    stone: Tombstone,
}

fn heard_later(error: &LogError) -> String {
    format!("the index hears later of what was evicted: {error}")
}

impl Shared {
    /// Evicts what the policy and the request say.
    ///
    /// # Errors
    ///
    /// [`LogError::Unsupported`] in a store without its index; [`LogError::Closed`], or what the index said.
    pub(crate) fn gc(&self, request: &GcRequest) -> Result<GcReport, LogError> {
        let index = self.index_to_evict()?;
        self.discovery.wait_until_done();
        commit_all(self, index);
        let order = Order {
            policy: request.over(self.options.retention),
            to_free: 0,
            dry_run: request.dry_run,
            at_most: if request.dry_run { MOST_NAMED } else { MOST_EVICTED },
        };
        let mut turn = lock(&self.evictions.turn);
        // Whoever asks may have mended what stood in the way.
        turn.refused.clear();
        let begun_before = if order.dry_run { Ok(()) } else { self.finish_what_was_begun(index, &mut turn) };
        let mut report = self.evict(index, &mut turn, order)?;
        if let Err(error) = begun_before {
            report.unfinished.get_or_insert_with(|| heard_later(&error));
        }
        Ok(report)
    }

    /// Evicts what the store's own policy says, and finishes what was begun before.
    pub(crate) fn keep_policy(&self) -> Result<(), LogError> {
        let index = self.index_to_evict()?;
        let mut turn = lock(&self.evictions.turn);
        // What is still to be done is told there, and tried again the next time.
        drop(self.finish_what_was_begun(index, &mut turn));
        let policy = self.options.retention;
        let order = Order { policy, to_free: 0, dry_run: false, at_most: MOST_EVICTED };
        while policy.is_on() && !self.is_closed() && self.evict(index, &mut turn, order)?.more {}
        Ok(())
    }

    /// Looks again at everything that is only looked at now and then.
    pub(crate) fn forget_what_was_seen(&self) {
        let mut turn = lock(&self.evictions.turn);
        (turn.beside, turn.trash) = (None, true);
        turn.refused.clear();
    }

    /// Evicts the oldest runs until the disk has so many bytes more than it is to keep free. Gives whether it has
    /// them. Nothing is evicted when nothing ever is.
    pub(crate) fn make_room(&self, bytes: u64) -> bool {
        let (policy, Ok(index)) = (self.options.retention, self.index_to_evict()) else { return false };
        let lacking = |room: u64| {
            let disk = Disk::at(self.layout.root()).ok()?;
            let floor = disk.floor(self.options.min_free_bytes);
            Some((floor + bytes + room).saturating_sub(disk.free))
        };
        if !policy.is_on() {
            return false;
        }
        let mut turn = lock(&self.evictions.turn);
        // Somebody else may have made room while this waited for its turn.
        match lacking(ROOM / 4) {
            Some(0) => return true,
            None => return false,
            Some(_) => {}
        }
        if turn.in_vain.is_some_and(|at| at.elapsed() < NEXT_RESCUE) {
            return false;
        }
        let only_for_room = RetentionPolicy { max_age: None, max_bytes: None, ..policy };
        let to_free = lacking(ROOM).unwrap_or(0);
        let order = Order { policy: only_for_room, to_free, dry_run: false, at_most: usize::MAX };
        let mut evicted = self.evict(index, &mut turn, order);
        if matches!(&evicted, Ok(report) if report.evicted.is_empty()) {
            // Runs may have ended that the index has not heard of yet.
            commit_all(self, index);
            evicted = self.evict(index, &mut turn, order);
        }
        if let Err(error) = evicted {
            tracing::error!(%error, "making room on a full disk");
        }
        let has_room = lacking(0) == Some(0);
        turn.in_vain = (!has_room).then(Instant::now);
        has_room
    }

    /// Whether logs take more of the disk than they should.
    pub(crate) fn lacks_room(&self) -> bool {
        let Ok(disk) = Disk::at(self.layout.root()) else { return false };
        disk.free < disk.floor(self.options.min_free_bytes).max(ROOM / 4)
    }

    /// Tells the metrics how things stand.
    pub(crate) fn tell_metrics(&self) {
        let Some(index) = &self.index else { return };
        let live = self.all_tracked().iter().filter(|tracked| !tracked.run().is_over()).count() as u64;
        let (Ok(totals), Ok(disk)) = (index.totals(), Disk::at(self.layout.root())) else { return };
        let beside = lock(&self.evictions.turn).beside.unwrap_or(0);
        let bytes = totals.finished_bytes + self.bytes_of_live_and_index() + beside;
        meter::stands(live, totals.finished, bytes, disk.free);
    }

    fn index_to_evict(&self) -> Result<&Index, LogError> {
        if self.is_closed() {
            return Err(LogError::Closed);
        }
        self.check_home()?;
        let what = "a folder that is opened without its index evicts nothing";
        self.index.as_deref().ok_or(LogError::Unsupported { what })
    }

    /// Evicts what there is to evict. Once something is gone the answer is a report that names it, whatever fails then.
    fn evict(&self, index: &Index, turn: &mut Turn, order: Order) -> Result<GcReport, LogError> {
        let begun = Instant::now();
        let mut report = GcReport { dry_run: order.dry_run, ..GcReport::default() };
        for number in std::mem::take(&mut turn.busy) {
            turn.refused.remove(&number);
        }
        let refused_before = turn.refused.clone();
        let evicted = self.evict_in_batches(index, turn, order, &mut report);
        match order.dry_run {
            true => turn.refused = refused_before,
            false => meter::gc_took(begun.elapsed()),
        }
        match evicted {
            Err(error) if order.dry_run || report.evicted.is_empty() || matches!(error, LogError::Closed) => {
                return Err(error);
            }
            Err(error) => {
                report.unfinished.get_or_insert_with(|| error.to_string());
            }
            Ok(()) => {}
        }
        // Whoever is told to go on at once would run into the same.
        report.more &= report.unfinished.is_none();
        Ok(report)
    }

    fn evict_in_batches(
        &self,
        index: &Index,
        turn: &mut Turn,
        order: Order,
        report: &mut GcReport,
    ) -> Result<(), LogError> {
        let mut left = order;
        report.bytes_after = self.bytes_of_all(index, turn)?;
        loop {
            if self.is_closed() {
                return Err(LogError::Closed);
            }
            self.check_home()?;
            left.at_most = (order.at_most - report.evicted.len()).min(BATCH);
            let (planned, more) = self.planned(index, turn, left, report.bytes_after)?;
            report.more = more;
            if planned.is_empty() {
                return Ok(());
            }
            let victims = self.look_at(index, turn, planned, order, report)?;
            let gone = match order.dry_run {
                true => victims,
                false => {
                    self.carry_out(index, turn, victims, order, report).inspect_err(|_| turn.trash = true)?
                }
            };
            if order.dry_run {
                turn.refused.extend(gone.iter().map(|victim| victim.row.number));
            }
            for victim in gone {
                report.bytes_after = report.bytes_after.saturating_sub(victim.row.bytes);
                left.to_free = left.to_free.saturating_sub(victim.row.bytes);
                report.evicted.push(EvictedRun {
                    id: victim.stone.id,
                    ended_at: victim.row.ended,
                    bytes: victim.row.bytes,
                    reason: victim.reason,
                    why: victim.stone.reason,
                });
            }
        }
    }

    fn planned(
        &self,
        index: &Index,
        turn: &Turn,
        order: Order,
        bytes: u64,
    ) -> Result<(Vec<(Candidate, EvictionReason)>, bool), LogError> {
        let totals = index.totals()?;
        let standing = Standing {
            now: UnixMicros::now(),
            runs: totals.evictable.saturating_sub(turn.refused.len() as u64),
            bytes,
            to_free: order.to_free,
        };
        index.oldest_first(|rows| {
            let rows = rows.filter(|row| !turn.refused.contains(&row.number));
            let mut planned = plan(rows, standing, order.policy);
            let victims: Vec<_> = planned.by_ref().take(order.at_most).collect();
            let more = planned.next().is_some();
            (victims, more)
        })
    }

    /// Looks at the runs whose turn it is, and leaves out those that can't go. They are not tried again: others go in
    /// their place.
    fn look_at(
        &self,
        index: &Index,
        turn: &mut Turn,
        planned: Vec<(Candidate, EvictionReason)>,
        order: Order,
        report: &mut GcReport,
    ) -> Result<Vec<Victim>, LogError> {
        let evicted_at = UnixMicros::now();
        let mut victims = Vec::new();
        for (row, reason) in planned {
            let Some(record) = index.record(row.number)? else {
                turn.refused.insert(row.number);
                continue;
            };
            let id = record.run.id().clone();
            if self.evictions.going(&id).is_some() {
                // It is gone, and its row goes when the index can be written.
                report.bytes_after = report.bytes_after.saturating_sub(row.bytes);
                turn.refuse_for_now(row.number);
                continue;
            }
            let hindrance = match self.tracked(&id) {
                Some(_) => {
                    turn.busy.push(row.number);
                    Some("its end is just being written")
                }
                None => self.hindrance(index, &id, row.number, order.dry_run),
            };
            if let Some(why) = hindrance {
                turn.refused.insert(row.number);
                report.kept.push(KeptRun { id, why: why.to_owned() });
                continue;
            }
            let stone = Tombstone::of(&record.run, evicted_at, reason.under(&order.policy));
            victims.push(Victim { row, reason, stone });
        }
        Ok(victims)
    }

    /// Why a run can't go, if it can't. What the index has not heard of yet it hears now.
    fn hindrance(
        &self,
        index: &Index,
        id: &JobRunId,
        number: RunNumber,
        dry_run: bool,
    ) -> Option<&'static str> {
        let folder = self.layout.run(id);
        let Ok(is_there) = folder.is_there() else {
            return Some("the disk does not tell whether its folder is there");
        };
        if is_there {
            if !folder.is_pinned() {
                return None;
            }
            if !dry_run {
                self.tell_of_pin(index, id, number, true);
            }
            return Some("it is pinned");
        }
        if self.check_home().is_err() {
            return Some("the log folder was moved or removed");
        }
        if !dry_run {
            // There is nothing that could be removed, and what is not there takes up nothing.
            self.forget_rows(number);
        }
        Some("its folder is not there, or is a link")
    }

    /// Evicts runs, and gives those that are gone.
    fn carry_out(
        &self,
        index: &Index,
        turn: &mut Turn,
        victims: Vec<Victim>,
        order: Order,
        report: &mut GcReport,
    ) -> Result<Vec<Victim>, LogError> {
        let mut gone = Vec::new();
        for victim in victims {
            let id = &victim.stone.id;
            self.evictions.hide(&victim.stone);
            self.compressions.wait_for(id);
            match self.layout.move_to_trash(id, victim.stone.evicted_at, victim.reason.as_str()) {
                Ok(folder) => gone.push((victim, folder)),
                Err(error) => {
                    self.evictions.show(id);
                    tracing::warn!(%error, run = %id, "a run can't be evicted");
                    turn.refused.insert(victim.row.number);
                    report.kept.push(KeptRun { id: id.clone(), why: error.to_string() });
                }
            }
        }
        if order.to_free > 0 {
            gone.iter().for_each(|(_, folder)| remove(folder, Removal::LogsOnly));
        }
        let rows: Vec<_> =
            gone.iter().map(|(victim, _)| (Some(victim.row.number), victim.stone.clone())).collect();
        let committed = self.commit_evicted(index, &rows, gone.iter().map(|(_, folder)| folder));
        match &committed {
            Ok(()) => {}
            Err(LogError::Closed) => return Err(LogError::Closed),
            Err(error) => {
                tracing::warn!(%error, "the index hears later of runs that are evicted");
                turn.trash = true;
                report.unfinished = Some(heard_later(error));
            }
        }
        let mut evicted = Vec::new();
        for (victim, folder) in gone {
            if committed.is_ok() {
                lock(&self.evictions.going).remove(&victim.stone.id);
                remove(&folder, Removal::Everything);
            } else {
                turn.refuse_for_now(victim.row.number);
            }
            let Victim { row, reason, stone } = &victim;
            tracing::info!(run = %stone.id, bytes = row.bytes, why = %stone.reason, "a run is evicted");
            meter::evicted(reason.as_str(), 1, row.bytes);
            evicted.push(victim);
        }
        Ok(evicted)
    }

    /// Bytes that everything under the log folder takes up.
    fn bytes_of_all(&self, index: &Index, turn: &mut Turn) -> Result<u64, LogError> {
        let beside = *turn.beside.get_or_insert_with(|| self.layout.bytes_beside_runs());
        Ok(index.totals()?.finished_bytes + self.bytes_of_live_and_index() + beside)
    }

    /// Both grow while nobody counts, so they are looked at each time.
    fn bytes_of_live_and_index(&self) -> u64 {
        let live: u64 = self
            .all_tracked()
            .iter()
            .filter(|tracked| !tracked.run().is_over())
            .map(|tracked| tracked.run().folder.live_bytes())
            .sum();
        live + fs::metadata(self.layout.index()).map_or(0, |file| file.blocks() * 512)
    }
}

#[cfg(test)]
mod tests;
