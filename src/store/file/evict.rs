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
mod victims;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::error::LogError;
use crate::index::{Index, Urgency};
use crate::layout::{Disk, Removal};
use crate::line::UnixMicros;
use crate::meter;
use crate::retention::{
    Candidate, EvictedRun, EvictionReason, GcReport, GcRequest, KeptRun, RetentionPolicy, Standing, plan,
};
use crate::store::file::commit::commit_all;
use crate::store::file::reconcile::mend;
use crate::store::file::shared::Shared;

pub(crate) use evictions::Evictions;
use evictions::{Turn, lock};
use trash::remove;
pub(crate) use trash::{outstanding, tombstone};
use victims::Victim;

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
        let lacking = |room: u64| self.lacking(bytes + room);
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

    /// How much the disk lacks to have so many bytes more than it is to keep free; `None` if it does not tell.
    fn lacking(&self, bytes: u64) -> Option<u64> {
        let disk = Disk::at(self.layout.root()).ok()?;
        Some((disk.floor(self.options.min_free_bytes) + bytes).saturating_sub(disk.free))
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
        turn.begin(self.discovery.renewals());
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
        // Of those that are passed over, some may have left the index since: then too few seem to be left, and more are
        // kept than need be until the next time.
        let runs = index.totals()?.evictable.saturating_sub(turn.refused.len() as u64);
        let standing = Standing {
            now: UnixMicros::now(),
            runs: if order.policy.keep_last == 0 { u64::MAX } else { runs },
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
