//! Runs whose turn it is: whether they may go, and moving their folders away.

use std::fmt;

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::{Index, Known, RunNumber};
use crate::layout::{FolderStamp, RunFolder};
use crate::line::UnixMicros;
use crate::retention::{Candidate, EvictionReason, GcReport, KeptRun};
use crate::run::Tombstone;
use crate::store::file::identity::{is_being_written, is_surely_of};
use crate::store::file::shared::Shared;

use super::Order;
use super::evictions::Turn;

/// A run whose turn it is.
pub(super) struct Victim {
    pub(super) row: Candidate,
    record: RunRecord,
    /// Its folder when it was looked at.
    looked: Option<FolderStamp>,
    pub(super) reason: EvictionReason,
    pub(super) stone: Tombstone,
}

/// Why a run can't go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hindrance {
    /// The index has to hear of its end first.
    Ending,
    /// Its id was used again.
    Anothers,
    /// Somebody writes it, or seems to.
    Locked,
    /// There is nothing to be removed.
    NotThere,
    /// The whole log folder is not where it was.
    Away,
    /// The disk does not tell which run is in its folder.
    Unknown,
    /// Somebody wants it to be kept.
    Pinned,
}

impl fmt::Display for Hindrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ending => "its end is just being written",
            Self::Anothers => "its folder is that of another run by now",
            Self::Locked => "somebody has its journal locked",
            Self::NotThere => "its folder is not there, or is a link",
            Self::Away => "the log folder was moved or removed",
            Self::Unknown => "the disk does not tell what is in its folder",
            Self::Pinned => "it is pinned",
        })
    }
}

/// Why what is in a folder is not the run of a record that is over, if it is not.
fn not_over(folder: &RunFolder, record: &RunRecord) -> Option<Hindrance> {
    let looked = || -> Result<Option<Hindrance>, LogError> {
        if !is_surely_of(folder, record)? {
            return Ok(Some(Hindrance::Anothers));
        }
        Ok(is_being_written(folder)?.then_some(Hindrance::Locked))
    };
    looked().unwrap_or_else(|error| {
        tracing::warn!(%error, "a run is not evicted before it is known which it is");
        Some(Hindrance::Unknown)
    })
}

impl Shared {
    /// Looks at the runs whose turn it is, and leaves out those that can't go: others go in their place.
    pub(super) fn look_at(
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
                turn.refuse_for_now(row.number);
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
            if let Some(hindrance) = self.hindrance(index, &record, row.number, order.dry_run) {
                if hindrance == Hindrance::NotThere {
                    // What is not there takes up nothing.
                    report.bytes_after = report.bytes_after.saturating_sub(row.bytes);
                }
                turn.refuse_for_now(row.number);
                report.kept.push(KeptRun { id, why: hindrance.to_string() });
                continue;
            }
            let stone = Tombstone::of(&record.run, evicted_at, reason.under(&order.policy));
            victims.push(Victim { row, record, looked, reason, stone });
        }
        Ok(victims)
    }

    /// Why a run can't go, if it can't. What the index has not heard of yet it hears now.
    pub(super) fn hindrance(
        &self,
        index: &Index,
        record: &RunRecord,
        number: RunNumber,
        dry_run: bool,
    ) -> Option<Hindrance> {
        let id = record.run.id();
        match self.tracked(id) {
            Some(tracked) if tracked.run().number == Some(number) => return Some(Hindrance::Ending),
            Some(_) => {
                if !dry_run {
                    self.forget_rows(number);
                }
                return Some(Hindrance::Anothers);
            }
            None => {}
        }
        let folder = self.layout.run(id);
        let Ok(is_there) = folder.is_there() else { return Some(Hindrance::Unknown) };
        if !is_there {
            if self.check_home().is_err() {
                return Some(Hindrance::Away);
            }
            if !dry_run {
                self.forget_rows(number);
            }
            return Some(Hindrance::NotThere);
        }
        // Whoever compresses a run has its journal locked, and is waited for.
        let may_be_locked = |why: &Hindrance| *why == Hindrance::Locked && self.compressions.is_under_way(id);
        if let Some(why) = not_over(&folder, record).filter(|why| !may_be_locked(why)) {
            if !dry_run {
                match index.find(id) {
                    // The row of the other run is there already.
                    Ok(Some(Known::Run(other, _))) if other != number => self.forget_rows(number),
                    _ => self.watching().into_iter().for_each(|watch| watch.take_up(id)),
                }
            }
            return Some(why);
        }
        if !folder.is_pinned() {
            return None;
        }
        if !dry_run {
            self.tell_of_pin(index, id, number, true);
        }
        Some(Hindrance::Pinned)
    }

    /// Moves the folder of a run to the trash, or says why not. Its id may have been used again since it was looked at:
    /// another run is moved back.
    pub(super) fn move_to_trash(&self, victim: &Victim) -> Result<RunFolder, String> {
        let Victim { record, looked, reason, stone, .. } = victim;
        let there = self.layout.run(&stone.id);
        if there.stamp().ok().flatten() != *looked
            && let Some(why) = not_over(&there, record)
        {
            return Err(why.to_string());
        }
        let moved = self.layout.move_to_trash(&stone.id, stone.evicted_at, reason.as_str());
        let folder = moved.map_err(|error| error.to_string())?;
        match not_over(&folder, record) {
            None => Ok(folder),
            Some(why) => {
                self.layout.take_back(&stone.id, &folder).map_err(|error| error.to_string())?;
                Err(why.to_string())
            }
        }
    }
}
