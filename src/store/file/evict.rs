//! Evicting runs: which ones, how, and how an eviction that was cut short is finished.
//!
//! A run goes in four steps: who reads it is told; its folder is moved to the trash, under a name that says when and
//! why; its rows leave the index and a tombstone takes their place, in one commit for many runs; its files are
//! removed. On a full disk the logs are removed before the commit, which needs room itself. Whatever step a crash
//! comes after, what is in the trash tells how to go on.
//!
//! What the index says is not believed without a second witness, for what is evicted does not come back. That a run is old
//! is confirmed by its record. What all of them take up is confirmed by adding up the rows before the first one goes for
//! that, and again every ten minutes while others do: not each time, so that what one eviction takes does not grow with the
//! runs; in between each commit writes the sum anew. (What the file system has in use is no witness: files with two names,
//! and file systems that store the same bytes once, let a sum that is right be larger.) An index that is found to be wrong is
//! moved aside and made anew, and nothing is evicted by it.

mod by_folder;
mod evictions;
mod trash;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::{Index, RunNumber, Urgency};
use crate::layout::{Disk, FolderStamp, Removal, RunFolder};
use crate::line::UnixMicros;
use crate::meter;
use crate::retention::{
    Candidate, EvictedRun, EvictionReason, GcReport, GcRequest, KeptRun, RetentionPolicy, Standing, plan,
};
use crate::run::Tombstone;
use crate::store::file::commit::commit_all;
use crate::store::file::identity::{is_being_written, is_of};
use crate::store::file::reconcile::mend;
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
/// For how long what the index has added up is confirmed.
const CONFIRMED_FOR: Duration = Duration::from_secs(10 * 60);

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
    record: RunRecord,
    /// Its folder when it was looked at.
    looked: Option<FolderStamp>,
    reason: EvictionReason,
    stone: Tombstone,
}

/// Sees that what the index has added up is so, if runs are to go because of it.
fn confirm_totals(
    index: &Index,
    turn: &mut Turn,
    planned: &[(Candidate, EvictionReason)],
    policy: RetentionPolicy,
) -> Result<(), LogError> {
    // How many are kept is counted from the number of all.
    let counts = policy.keep_last > 0 || planned.iter().any(|(_, why)| *why == EvictionReason::SizeCap);
    if counts && turn.confirmed.is_none_or(|at| at.elapsed() > CONFIRMED_FOR) {
        index.confirm_totals()?;
        turn.confirmed = Some(Instant::now());
    }
    Ok(())
}

/// Why a run is not evicted whose id was used again.
const ANOTHERS: &str = "its folder is that of another run by now";
/// Why one is not that somebody writes, or seems to.
const LOCKED: &str = "somebody has its journal locked";

/// Why what is in a folder is not the run of a record that is over, if it is not.
fn not_over(folder: &RunFolder, record: &RunRecord) -> Option<&'static str> {
    if !is_of(folder, record) {
        return Some(ANOTHERS);
    }
    is_being_written(folder).then_some(LOCKED)
}

fn heard_later(error: &LogError) -> String {
    format!("the index hears later of what was evicted: {error}")
}

impl Shared {
    /// Evicts what the policy and the request say. When the index is found to be damaged, that is done by the one that is
    /// made in its place.
    ///
    /// # Errors
    ///
    /// [`LogError::Unsupported`] in a store without its index; [`LogError::Closed`], or what the index said.
    pub(crate) fn gc(&self, request: &GcRequest) -> Result<GcReport, LogError> {
        let renewals = self.discovery.renewals();
        let done = self.gc_by_this_index(request);
        if let (Err(LogError::Index { .. }), Some(index)) = (&done, &self.index) {
            mend(self, index);
            if self.discovery.renewals() != renewals {
                return self.gc_by_this_index(request);
            }
        }
        done
    }

    fn gc_by_this_index(&self, request: &GcRequest) -> Result<GcReport, LogError> {
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
        let bytes = totals.finished_bytes.saturating_add(self.bytes_of_live_and_index() + beside);
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
        if matches!(evicted, Err(LogError::Index { .. })) {
            self.nudge(Urgency::Now);
        }
        match evicted {
            Err(error) if order.dry_run || report.evicted.is_empty() => return Err(error),
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
            confirm_totals(index, turn, &planned, order.policy)?;
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
            let Some(record) = index.record_to_evict(&row)? else {
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
            let looked = self.layout.run(&id).stamp().ok().flatten();
            let hindrance = match self.tracked(&id) {
                Some(tracked) if tracked.run().number == Some(row.number) => {
                    turn.busy.push(row.number);
                    Some("its end is just being written")
                }
                Some(_) => {
                    if !order.dry_run {
                        self.forget_rows(row.number);
                    }
                    Some(ANOTHERS)
                }
                None => self.hindrance(index, &record, row.number, order.dry_run),
            };
            if let Some(why) = hindrance {
                if why == LOCKED {
                    turn.busy.push(row.number);
                }
                turn.refused.insert(row.number);
                report.kept.push(KeptRun { id, why: why.to_owned() });
                continue;
            }
            let stone = Tombstone::of(&record.run, evicted_at, reason.under(&order.policy));
            victims.push(Victim { row, record, looked, reason, stone });
        }
        Ok(victims)
    }

    /// Why a run can't go, if it can't. What the index has not heard of yet it hears now.
    fn hindrance(
        &self,
        index: &Index,
        record: &RunRecord,
        number: RunNumber,
        dry_run: bool,
    ) -> Option<&'static str> {
        let id = record.run.id();
        let folder = self.layout.run(id);
        let Ok(is_there) = folder.is_there() else {
            return Some("the disk does not tell whether its folder is there");
        };
        if !is_there {
            if self.check_home().is_err() {
                return Some("the log folder was moved or removed");
            }
            if !dry_run {
                // There is nothing that could be removed, and what is not there takes up nothing.
                self.forget_rows(number);
            }
            return Some("its folder is not there, or is a link");
        }
        // Whoever compresses a run has its journal locked, and is waited for.
        let may_be_locked = |why: &&str| *why == LOCKED && self.compressions.is_under_way(id);
        if let Some(why) = not_over(&folder, record).filter(|why| !may_be_locked(why)) {
            if !dry_run && let Some(watch) = self.watching() {
                watch.take_up(id);
            }
            return Some(why);
        }
        if !folder.is_pinned() {
            return None;
        }
        if !dry_run {
            self.tell_of_pin(index, id, number, true);
        }
        Some("it is pinned")
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
            match self.move_to_trash(&victim) {
                Ok(folder) => gone.push((victim, folder)),
                Err(why) => {
                    self.evictions.show(id);
                    tracing::warn!(error = why, run = %id, "a run can't be evicted");
                    turn.refused.insert(victim.row.number);
                    report.kept.push(KeptRun { id: id.clone(), why });
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
            let Victim { row, reason, stone, .. } = &victim;
            tracing::info!(run = %stone.id, bytes = row.bytes, why = %stone.reason, "a run is evicted");
            meter::evicted(reason.as_str(), 1, row.bytes);
            evicted.push(victim);
        }
        Ok(evicted)
    }

    /// Moves the folder of a run to the trash, or says why not. Its id may have been used again since it was looked at:
    /// another run is moved back.
    fn move_to_trash(&self, victim: &Victim) -> Result<RunFolder, String> {
        let Victim { record, looked, reason, stone, .. } = victim;
        let there = self.layout.run(&stone.id);
        if there.stamp().ok().flatten() != *looked
            && let Some(why) = not_over(&there, record)
        {
            return Err(why.to_owned());
        }
        let moved = self.layout.move_to_trash(&stone.id, stone.evicted_at, reason.as_str());
        let folder = moved.map_err(|error| error.to_string())?;
        match not_over(&folder, record) {
            None => Ok(folder),
            Some(why) => {
                self.layout.take_back(&stone.id, &folder).map_err(|error| error.to_string())?;
                Err(why.to_owned())
            }
        }
    }

    /// Bytes that everything under the log folder takes up.
    fn bytes_of_all(&self, index: &Index, turn: &mut Turn) -> Result<u64, LogError> {
        let beside = *turn.beside.get_or_insert_with(|| self.layout.bytes_beside_runs());
        Ok(index.totals()?.finished_bytes.saturating_add(self.bytes_of_live_and_index() + beside))
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
