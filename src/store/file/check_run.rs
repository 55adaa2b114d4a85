//! What there is to find in the folder of one run, and in the rows that lead to it.

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::{GapAt, LineCheckpoint, MAX_GAPS, Progress};
use crate::index::{Index, Known, RunNumber};
use crate::journal::Cut;
use crate::layout::{RunFolder, compressed};
use crate::line::Stream;
use crate::logfile::{Fetched, Io, ReadFile, Sound, count_lines};
use crate::run::{JobMetadata, JobRunId};
use crate::store::file::check::{Check, FindingKind, Repair, remove};
use crate::store::file::copied;
use crate::store::file::derive::{Derived, Standing, derive};
use crate::store::file::live::MAX_WAITING;
use crate::store::file::tracker::SCAN_BYTES;

/// What a repair is left to: see [`mend_run`](super::repair::mend_run).
const LATER: fn() -> Result<Repair, LogError> = || Ok(Repair::NotAsked);

/// Looks at one run and notes what does not agree.
pub(crate) fn check_run(check: &mut Check, id: &JobRunId) -> Result<(), LogError> {
    let folder = check.layout.run(id);
    let known = match check.index() {
        Some(index) => match index.find(id)? {
            Some(Known::Run(number, record)) => Some((number, *record)),
            _ => None,
        },
        None => None,
    };
    if !check.options.deep
        && let Some((_, record)) = &known
        && is_plain_and_as_known(&folder, record)?
    {
        return Ok(());
    }
    let (mut lines, mut places) = (Vec::new(), Vec::new());
    let derived = derive(&folder, id, |found| {
        lines.extend_from_slice(&found.lines);
        places.extend_from_slice(&found.places);
        Ok(())
    })?;
    lines.sort_unstable_by_key(|at: &LineCheckpoint| (at.stream, at.line));
    if derived.standing == Standing::Live {
        check.report.live += 1;
        return Ok(());
    }
    for path in folder.unfinished_metadata().into_iter().chain(folder.half_compressed()) {
        let detail = format!("{} was being written", path.display());
        check.found(FindingKind::Leftover, Some(id), detail, || remove(&path))?;
    }
    tables(check, id, &folder)?;
    journal(check, id, &derived)?;
    if derived.standing != Standing::Abandoned {
        metadata(check, id, &folder, &derived)?;
        logs(check, id, &folder, &derived)?;
        if check.options.deep {
            count_all(check, id, &folder, &derived, &lines)?;
        }
        rows(check, id, known, &derived, &lines, &places)?;
    }
    Ok(())
}

/// Whether a run without a journal is over and its logs are as long as the index says; to count their lines is left
/// to a deep check.
fn is_plain_and_as_known(folder: &RunFolder, record: &RunRecord) -> Result<bool, LogError> {
    if record.has_journal || !record.run.state.is_over() || folder.has_journal() {
        return Ok(false);
    }
    let as_long = Stream::BOTH.map(|stream| record.run.totals(stream).bytes) == copied::lengths(folder)?;
    Ok(as_long && folder.read_metadata().is_ok_and(|found| found.is_none_or(|run| same(&run, &record.run))))
}

/// Whether two documents tell the same, but for how much the streams hold and for fields that others added.
fn same(a: &JobMetadata, b: &JobMetadata) -> bool {
    (&a.spec, a.started_at, a.state, &a.note) == (&b.spec, b.started_at, b.state, &b.note)
}

fn length(folder: &RunFolder, stream: Stream) -> Result<u64, LogError> {
    crate::logfile::length(&folder.log(stream))
}

/// Looks whether the compressed files can be read by position.
fn tables(check: &mut Check, id: &JobRunId, folder: &RunFolder) -> Result<(), LogError> {
    for part in folder.parts() {
        if ReadFile::open_if_there(&part)?.is_some_and(|file| file.is_damaged()) {
            let detail = format!("the table of {} is damaged", compressed(&part).display());
            let why = "its frames are looked for, up to the first that is damaged".to_owned();
            check
                .found(FindingKind::CompressedDamaged, Some(id), detail, || Ok(Repair::Impossible { why }))?;
        }
    }
    Ok(())
}

fn journal(check: &mut Check, id: &JobRunId, derived: &Derived) -> Result<(), LogError> {
    let (torn, at) = (derived.torn, derived.progress.journal);
    match derived.standing {
        Standing::Abandoned => {
            let detail = "it has no end, and its writer is gone".to_owned();
            check.found(FindingKind::Abandoned, Some(id), detail, LATER)?;
        }
        Standing::OverByMetadata => {
            let detail = format!("the journal ends at byte {at}, before the run does");
            check.found(FindingKind::JournalDamaged, Some(id), detail, LATER)?;
        }
        Standing::Over | Standing::Live => {}
    }
    if !derived.record.has_journal && check.layout.run(id).has_journal() {
        let why = "the lines are counted in the logs, and when they arrived is not known".to_owned();
        let detail = "the journal has no sound beginning".to_owned();
        check.found(FindingKind::JournalDamaged, Some(id), detail, || Ok(Repair::Impossible { why }))?;
    }
    if torn > 0 && derived.standing != Standing::OverByMetadata {
        let detail = format!("{torn} bytes behind the last sound record, at byte {at}");
        check.found(FindingKind::JournalTorn, Some(id), detail, LATER)?;
    }
    Ok(())
}

fn metadata(check: &mut Check, id: &JobRunId, folder: &RunFolder, derived: &Derived) -> Result<(), LogError> {
    let (kind, detail) = match folder.read_metadata() {
        Ok(Some(written)) if !derived.record.has_journal || agrees(&written, &derived.record.run) => {
            return Ok(());
        }
        Ok(None) if !derived.record.has_journal => return Ok(()),
        Ok(Some(_)) => {
            (FindingKind::MetadataDiffers, "metadata.json tells something else than the journal".to_owned())
        }
        Ok(None) => {
            (FindingKind::MetadataMissing, "the run is over and there is no metadata.json".to_owned())
        }
        Err(LogError::Corrupt { what, .. }) => {
            (FindingKind::MetadataDiffers, format!("metadata.json can't be read: {what}"))
        }
        Err(error) => return Err(error),
    };
    check.found(kind, Some(id), detail, LATER)
}

/// Whether `metadata.json` is what the journal says; others may have added fields to it since.
fn agrees(written: &JobMetadata, journal: &JobMetadata) -> bool {
    let other = journal.other.clone();
    JobMetadata { other, ..written.clone() } == *journal
}

fn logs(check: &mut Check, id: &JobRunId, folder: &RunFolder, derived: &Derived) -> Result<(), LogError> {
    for stream in Stream::BOTH {
        let (is, was) = (length(folder, stream)?, derived.record.run.totals(stream).bytes);
        let detail = format!("{stream}.log has {is} bytes, of which the run wrote {was}");
        if is < was {
            let why = format!("{} bytes are lost", was - is);
            check.found(FindingKind::LogShort, Some(id), detail, || Ok(Repair::Impossible { why }))?;
        } else if is > was {
            let why = "nothing tells what the bytes behind its end are".to_owned();
            check.found(FindingKind::LogLong, Some(id), detail, || Ok(Repair::Impossible { why }))?;
        }
    }
    Ok(())
}

/// Counts the lines of both logs, and looks whether each checkpoint stands where as many lines have ended.
fn count_all(
    check: &mut Check,
    id: &JobRunId,
    folder: &RunFolder,
    derived: &Derived,
    lines: &[LineCheckpoint],
) -> Result<(), LogError> {
    for stream in Stream::BOTH {
        let of_stream = lines.iter().filter(|at| at.stream == stream);
        let gaps: Vec<_> = derived.record.gaps.iter().filter(|at| at.gap.stream == stream).collect();
        let totals = derived.record.run.totals(stream);
        if length(folder, stream)? != totals.bytes {
            continue;
        }
        let mut log = Counting::new(folder, stream)?;
        let cut = derived.record.cuts.of(stream);
        log.given_up = cut.map(|cut| GivenUp::new(cut, &gaps));
        let mut damaged = |log: &mut Counting| {
            log.damaged.drain(..).try_for_each(|(from, to)| {
                let detail =
                    format!("the bytes from {from} to {to} of {stream}.log are in a frame that is damaged");
                let why = "they are lost".to_owned();
                check.found(FindingKind::CompressedDamaged, Some(id), detail, || {
                    Ok(Repair::Impossible { why })
                })
            })
        };
        let mut wrong = None;
        // Of more holes than are kept, the totals tell.
        let known = match derived.record.gaps.len() < MAX_GAPS {
            true => u64::MAX,
            false => gaps.last().map_or(0, |gap| gap.gap.after.0),
        };
        let of_stream = of_stream.filter(|at| cut.is_none_or(|cut| !cut.covers(at.offset)));
        for at in of_stream.filter(|at| at.line <= known) {
            let lost: u64 =
                gaps.iter().filter(|gap| ends_before(gap, at.line)).map(|gap| gap.gap.lines).sum();
            log.count_to(at.offset)?;
            // Within what is damaged, lines can't be counted.
            if log.offset == at.offset && (log.lines + lost != at.line || log.last != Some(b'\n')) {
                wrong.get_or_insert_with(|| {
                    let (offset, line, is) = (at.offset, at.line, log.lines + lost);
                    format!("{line} lines end before byte {offset} of {stream}.log by the journal, {is} by the log")
                });
            }
        }
        log.count_to(totals.bytes)?;
        damaged(&mut log)?;
        let unterminated = u64::from(log.last.is_some_and(|last| last != b'\n'));
        let given_up = log.given_up.map_or(0, |part| part.lines);
        let counted = (log.lines + unterminated + totals.dropped_lines).saturating_sub(given_up);
        if counted != totals.lines {
            let lines = totals.lines;
            wrong.get_or_insert(format!("{stream}.log has {counted} lines, and {lines} by what was written"));
        }
        if let Some(detail) = wrong {
            let why = "which of the two is right can't be told".to_owned();
            check.found(FindingKind::LinesDiffer, Some(id), detail, || Ok(Repair::Impossible { why }))?;
        }
    }
    Ok(())
}

const fn ends_before(gap: &GapAt, line: u64) -> bool {
    gap.gap.after.0.saturating_add(gap.gap.lines) <= line
}

/// What is in a log no more: its lines are taken as they were counted once.
#[derive(Clone, Copy)]
struct GivenUp {
    cut: Cut,
    /// Lines that the log held of it.
    lines: u64,
    /// Lines that the log holds before it.
    before: u64,
}

impl GivenUp {
    /// `gaps` are those of its stream.
    fn new(cut: Cut, gaps: &[&GapAt]) -> Self {
        let lost = |from: u64, to: u64| -> u64 {
            let within = |at: &&&GapAt| from <= at.gap.after.0 && ends_before(at, to);
            gaps.iter().filter(within).map(|at| at.gap.lines).sum()
        };
        let before = cut.begin.lines.saturating_sub(lost(0, cut.begin.lines));
        let lines = cut.lines().saturating_sub(lost(cut.begin.lines, cut.end.lines));
        Self { cut, lines, before }
    }

    /// Where the log can be read again behind what is damaged from `offset` on: lines before, and its byte.
    const fn behind_damage(&self, offset: u64, sound: Sound) -> (u64, u64) {
        let Cut { begin, end, .. } = self.cut;
        if offset < begin.offset && begin.offset <= sound.offset {
            (self.before, begin.offset)
        } else if end.offset <= offset {
            // The end of its last line is still there, and was counted.
            ((sound.lines + self.lines).saturating_sub(1), sound.offset)
        } else {
            (sound.lines, sound.offset)
        }
    }
}

/// Counts lines from the beginning of a log on.
struct Counting {
    file: Option<ReadFile>,
    given_up: Option<GivenUp>,
    offset: u64,
    lines: u64,
    last: Option<u8>,
    /// What can't be read: from which byte to which.
    damaged: Vec<(u64, u64)>,
}

impl Counting {
    fn new(folder: &RunFolder, stream: Stream) -> Result<Self, LogError> {
        let file = ReadFile::open_if_there(&folder.log(stream))?;
        Ok(Self { file, given_up: None, offset: 0, lines: 0, last: None, damaged: Vec::new() })
    }

    fn count_to(&mut self, end: u64) -> Result<(), LogError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        while self.offset < end {
            let mut until = end;
            if let Some(part) = self.given_up.filter(|part| self.offset < part.cut.end.offset) {
                if self.offset == part.cut.begin.offset {
                    (self.offset, self.last) = (part.cut.end.offset, Some(b'\n'));
                    self.lines += part.lines;
                    continue;
                }
                until = end.min(part.cut.begin.offset);
            }
            let length = usize::try_from(until - self.offset).unwrap_or(usize::MAX).min(SCAN_BYTES);
            let bytes = match file.read(self.offset, length, Io::MayBlock)? {
                Fetched::Bytes(bytes) => bytes,
                Fetched::Damaged(sound) if sound.offset > self.offset => {
                    let (lines, offset) = match self.given_up {
                        Some(part) => part.behind_damage(self.offset, sound),
                        None => (sound.lines, sound.offset),
                    };
                    self.damaged.push((self.offset, offset));
                    (self.offset, self.lines, self.last) = (offset, lines, Some(b'\n'));
                    continue;
                }
                Fetched::Damaged(_) | Fetched::WouldBlock => break,
            };
            let Some(&last) = bytes.last() else { break };
            self.lines += count_lines(&bytes);
            self.offset += bytes.len() as u64;
            self.last = Some(last);
        }
        Ok(())
    }
}

/// Compares the rows of a run with what its folder gives.
fn rows(
    check: &mut Check,
    id: &JobRunId,
    known: Option<(RunNumber, RunRecord)>,
    derived: &Derived,
    lines: &[LineCheckpoint],
    places: &[Progress],
) -> Result<(), LogError> {
    let Some(index) = check.index() else { return Ok(()) };
    let Some((number, record)) = known else {
        let detail = "the index does not know the run".to_owned();
        return check.found(FindingKind::Orphan, Some(id), detail, LATER);
    };
    let standing = index.standing(number, &record)?;
    let is_indexed = !standing.live
        && standing.evictable == Some(record.disk_bytes)
        && standing.pinned == check.layout.run(id).is_pinned()
        && standing.found_by_partition;
    // What a folder takes up on disk changes when it is copied.
    let same = RunRecord { disk_bytes: record.disk_bytes, ..derived.record.clone() } == record;
    let differences = differences(index, number, lines, places)?;
    if !same || !is_indexed {
        let detail = if same {
            "the index does not find it by its end, its pin or its partitions".to_owned()
        } else if record.run.state == derived.record.run.state {
            "the index has other facts of the run than its folder".to_owned()
        } else {
            let (was, is) = (record.run.state.kind(), derived.record.run.state.kind());
            format!("the run is {was} in the index and {is} by its folder")
        };
        check.found(FindingKind::RecordDiffers, Some(id), detail, LATER)?;
    }
    if let Some(detail) = differences {
        check.found(FindingKind::PlacesDiffer, Some(id), detail, LATER)?;
    }
    Ok(())
}

/// What is wrong with a run's places in the index.
fn differences(
    index: &Index,
    number: RunNumber,
    lines: &[LineCheckpoint],
    places: &[Progress],
) -> Result<Option<String>, LogError> {
    let mut of_lines = Difference::new(lines);
    index.checkpoints(number, |at| of_lines.next(&at))?;
    let mut of_places = Difference::new(places);
    index.places(number, |at| of_places.next(&at))?;
    Ok(of_lines.describe("lines").or_else(|| of_places.describe("the journal")))
}

/// Compares rows in rising order with those that there should be.
struct Difference<'a, T> {
    expected: &'a [T],
    at: usize,
    found: usize,
    wrong: usize,
}

impl<'a, T: PartialEq> Difference<'a, T> {
    const fn new(expected: &'a [T]) -> Self {
        Self { expected, at: 0, found: 0, wrong: 0 }
    }

    fn next(&mut self, row: &T) {
        self.found += 1;
        match self.expected[self.at..].iter().position(|expected| expected == row) {
            Some(skipped) => self.at += skipped + 1,
            None => self.wrong += 1,
        }
    }

    fn describe(&self, what: &str) -> Option<String> {
        let (found, expected, wrong) = (self.found, self.expected.len(), self.wrong);
        // So many can't have waited for the index: every second one of them was let go of.
        let may_lack = expected > MAX_WAITING;
        if wrong > 0 {
            return Some(format!("{wrong} of {found} places of {what} are wrong"));
        }
        (found < expected && !may_lack).then(|| format!("{found} of {expected} places of {what} are kept"))
    }
}
