//! Mending a run and the rows that lead to it.

use crate::error::LogError;
use crate::index::{Changes, Index, Known};
use crate::layout::Layout;
use crate::logfile::AppendFile;
use crate::run::JobRunId;
use crate::store::file::FileStoreOptions;
use crate::store::file::adopt::ForeignRun;
use crate::store::file::check::{Check, FindingKind, Repair, done};
use crate::store::file::copied;
use crate::store::file::derive::{Standing, derive};

const COMPRESSED: &str = "its journal is compressed, and what is compressed is not written to";

/// Mends what was found of a run, from finding number `from` on: its folder first, then its rows.
pub(crate) fn mend_run(check: &mut Check, id: &JobRunId, from: usize) -> Result<(), LogError> {
    let mut rows_are_wrong = false;
    for at in from..check.report.findings.len() {
        let finding = &check.report.findings[at];
        if finding.repair != Repair::NotAsked {
            continue;
        }
        let kind = finding.kind;
        let repair = match kind {
            FindingKind::Abandoned => end_as_lost(&check.layout, id)?,
            FindingKind::JournalTorn => cut_journal(&check.layout, id)?,
            FindingKind::JournalDamaged => complete_journal(&check.layout, id)?,
            FindingKind::MetadataMissing | FindingKind::MetadataDiffers => write_metadata(&check.layout, id)?,
            FindingKind::Orphan => done("taken up"),
            FindingKind::RecordDiffers | FindingKind::PlacesDiffer => done("its rows are written anew"),
            // The others were mended when they were found, or can't be.
            _ => continue,
        };
        rows_are_wrong |= matches!(repair, Repair::Done { .. });
        check.report.findings[at].repair = repair;
    }
    if rows_are_wrong {
        check.write_rows(id)?;
    }
    Ok(())
}

/// Writes the rows of a run as its folder gives them, in place of those that there are.
pub(crate) fn write_rows(layout: &Layout, index: &Index, id: &JobRunId) -> Result<(), LogError> {
    let mut changes = Changes::default();
    let number = match index.find(id)? {
        Some(Known::Run(number, _)) => {
            changes.forgotten.push(number);
            number
        }
        _ => index.last_number()? + 1,
    };
    let derived = derive(&layout.run(id), id, |found| {
        changes.lines.extend(found.lines.iter().map(|at| (number, *at)));
        changes.progress.extend(found.places.iter().map(|at| (number, *at)));
        Ok(())
    })?;
    changes.runs.push((number, derived.record));
    if layout.run(id).is_pinned() {
        changes.pins.push((number, true));
    }
    index.commit(&changes)
}

/// Ends a run that nobody writes any more, as a service does when it opens the folder.
fn end_as_lost(layout: &Layout, id: &JobRunId) -> Result<Repair, LogError> {
    let run = ForeignRun::open(layout, id, None, None)?;
    if run.is_compressed() {
        return Ok(impossible(COMPRESSED));
    }
    let options = FileStoreOptions::default();
    let ended = run.run.is_over() || (run.writer_is_gone()? && run.recover(&options)?);
    run.complete_end(&options)?;
    Ok(match ended {
        true => done("ended as lost"),
        false if copied::is_changing(&run.run.folder) => impossible(
            "its folder changed a moment ago, and it may be being copied: try again in some seconds",
        ),
        false => impossible("somebody writes it after all"),
    })
}

/// Cuts off what stands behind the last sound record.
fn cut_journal(layout: &Layout, id: &JobRunId) -> Result<Repair, LogError> {
    let folder = layout.run(id);
    if !folder.journal().exists() {
        return Ok(impossible(COMPRESSED));
    }
    let mut journal = AppendFile::open(folder.journal())?;
    if !journal.try_lock()? {
        return Ok(impossible("somebody writes it after all"));
    }
    let derived = derive_only(layout, id)?;
    let torn = journal.len().saturating_sub(derived.progress.journal);
    if torn > 0 {
        journal.cut(derived.progress.journal)?;
        journal.sync()?;
    }
    Ok(done("cut off"))
}

/// Lets a journal that ends too early go on: with marks of what it does not tell of, and the end by `metadata.json`.
fn complete_journal(layout: &Layout, id: &JobRunId) -> Result<Repair, LogError> {
    let derived = derive_only(layout, id)?;
    let end = &derived.record.run;
    let counted = derived.progress.streams.map(|stream| stream.totals());
    if counted != [end.stdout, end.stderr] {
        return Ok(impossible("the logs do not hold what metadata.json says"));
    }
    let run = ForeignRun::open(layout, id, None, None)?;
    if run.is_compressed() {
        return Ok(impossible(COMPRESSED));
    }
    Ok(match run.complete_journal(end, &FileStoreOptions::default())? {
        true => done("cut off there; its end is written anew, without the times of the lines between"),
        false => impossible("somebody writes it after all"),
    })
}

/// Writes what the journal says of the run's end.
fn write_metadata(layout: &Layout, id: &JobRunId) -> Result<Repair, LogError> {
    let derived = derive_only(layout, id)?;
    if derived.standing != Standing::Over || !derived.record.has_journal {
        return Ok(impossible("there is no journal that tells of the end"));
    }
    let folder = layout.run(id);
    let mut run = derived.record.run;
    if let Ok(Some(written)) = folder.read_metadata() {
        for (key, value) in written.other {
            run.other.entry(key).or_insert(value);
        }
    }
    folder.write_metadata(&run, true)?;
    Ok(done("written as the journal says"))
}

fn derive_only(layout: &Layout, id: &JobRunId) -> Result<super::derive::Derived, LogError> {
    derive(&layout.run(id), id, |_| Ok(()))
}

fn impossible(why: &str) -> Repair {
    Repair::Impossible { why: why.to_owned() }
}
