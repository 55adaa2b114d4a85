//! What a power cut left of a run: its files can be shorter than they were, and where they are not, blocks that never
//! got to the disk are zeros.

use std::iter;
use std::path::Path;
use std::time::{Duration, SystemTime};

use memchr::memchr;

use crate::error::LogError;
use crate::index::progress::{Cuts, Progress, StreamProgress};
use crate::journal::{Arrival, JournalWriter, Record, What};
use crate::layout::RunFolder;
use crate::line::Stream;
use crate::logfile::{AppendFile, Fetched, Io, ReadFile, count_lines, whole_lines};
use crate::run::JobRunId;
use crate::store::file::marks::{Entry, JournalReader};
use crate::store::file::tracker::{last_touched, plain_metadata};

/// How much of the end of a log is compared with its marks. Large logs are written to the disk while they grow, each
/// 128 MiB: on a disk that keeps up, what was lost lies within what was just being written and what came since.
const CHECKED_BYTES: u64 = 256 * 1024 * 1024;
/// How much of a log is read at once.
const READ_BYTES: usize = 256 * 1024;
/// The least that a disk writes at once; what a file system writes at once is a multiple of it.
const SECTOR: u64 = 512;
/// Zeros of a part of a sector that can be what a line of a job ends or begins with.
const LEAST_HOLE: usize = 8;
/// So much of a journal is looked at for its first record.
const BEGINNING: usize = 64 * 1024;

/// What is sound of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sound {
    /// Up to where; a line begins there, or the log ends.
    pub(super) bytes: u64,
    /// Lines that end before that, those that could not be kept included.
    pub(super) lines: u64,
    /// Bytes behind it that no mark tells of.
    pub(super) unmarked: u64,
    /// Lines behind it that were lost before the power cut, and bytes of the log behind it that were given up.
    pub(super) lost_before: (u64, u64),
}

/// Whether the machine was started after something was last written to a run. Nobody knows to the second when that
/// was; in doubt it is so.
pub(super) fn machine_was_started_since(last_touched: SystemTime) -> bool {
    let uptime = u64::try_from(rustix::system::sysinfo().uptime).unwrap_or_default();
    let started = SystemTime::now().checked_sub(Duration::from_secs(uptime));
    started.is_none_or(|started| last_touched < started + Duration::from_secs(2))
}

/// Compares a log with the marks in its journal, which end at `progress`, but for those of what is given up. Gives what
/// is sound of it, or `None` if all of it is.
pub(super) fn check(
    folder: &RunFolder,
    stream: Stream,
    progress: &Progress,
    cuts: &Cuts,
) -> Result<Option<Sound>, LogError> {
    let path = folder.log(stream);
    let Some(journal) = ReadFile::open_if_there(&folder.journal())? else { return Ok(None) };
    // A log that is not there is as one without a byte.
    let mut log = ReadFile::open_when_there(&path)?;
    let length = log.len()?;
    let marked = *progress.of(stream);
    let from = marked.bytes.saturating_sub(CHECKED_BYTES);
    let is_given_up =
        |before: StreamProgress| cuts.of(stream).is_some_and(|cut| cut.covers(before.line_start));
    let mut journal = JournalReader::new(journal);
    let mut at = Progress { journal: 0, ..*progress };
    at.streams = Default::default();
    let (mut damage, mut prints_zeros) = (None, false);
    while at.journal < progress.journal
        && let Entry::Record(record, behind) = journal.at(at.journal, Io::MayBlock)?
    {
        let before = *at.of(stream);
        if let Record::Arrival(arrival) = record {
            at.advance(&arrival);
            let after = *at.of(stream);
            if damage.is_none()
                && arrival.stream == stream
                && after.bytes > from
                && !is_given_up(before)
                && let Some(sound) = check_mark(&mut log, &arrival, [before, after], &mut prints_zeros)?
            {
                damage = Some((sound, before));
            }
        }
        at.journal = behind;
    }
    let Some((mut sound, before)) = damage else { return check_tail(&mut log, marked, length) };
    let in_holes = at.of(stream);
    sound.lost_before.0 = in_holes.dropped_lines - before.dropped_lines;
    if cuts.of(stream).is_some_and(|cut| sound.bytes <= cut.begin.offset) {
        sound.lost_before.0 += marked.dropped_lines.saturating_sub(in_holes.dropped_lines);
        sound.lost_before.1 = marked.dropped_bytes.saturating_sub(in_holes.dropped_bytes);
    }
    Ok(Some(sound))
}

/// Compares the lines that ended with a mark with what is in the log. A job that prints zeros among other bytes may print
/// sectors full of them too: once it did, those are no sign of anything.
fn check_mark(
    log: &mut ReadFile,
    arrival: &Arrival,
    [before, after]: [StreamProgress; 2],
    prints_zeros: &mut bool,
) -> Result<Option<Sound>, LogError> {
    if !matches!(arrival.what, What::Mark { .. }) || arrival.lines == 0 {
        return Ok(None);
    }
    let begin = Sound { bytes: before.line_start, lines: before.lines, unmarked: 0, lost_before: (0, 0) };
    let (mut sound, mut found, mut zeros, mut hole) = (begin, 0, false, false);
    let mut offset = before.line_start;
    while offset < after.line_start {
        let wanted = usize::try_from(after.line_start - offset).unwrap_or(READ_BYTES).min(READ_BYTES);
        let Fetched::Bytes(bytes) = log.read(offset, wanted, Io::MayBlock)? else { break };
        if bytes.is_empty() {
            break;
        }
        if !zeros {
            // Before the first zero, lines are what they were.
            let text = &bytes[..memchr(0, &bytes).unwrap_or(bytes.len())];
            zeros = text.len() < bytes.len();
            let whole = whole_lines(text);
            if whole > 0 {
                sound.bytes = offset + whole as u64;
                sound.lines += count_lines(&text[..whole]);
            }
        }
        if zeros {
            // Within a long line, no end of a line tells of a sector that is missing.
            for part in sectors(&bytes, offset) {
                hole |= !*prints_zeros && is_hole(part);
                *prints_zeros |= has_zeros_within(part);
            }
        }
        found += count_lines(&bytes);
        offset += bytes.len() as u64;
    }
    if offset == after.line_start && found == arrival.lines && !hole {
        return Ok(None);
    }
    // Bytes that are other ones than those that were written are not known from power cuts; nothing of them is kept.
    let is_explained = zeros || offset < after.line_start;
    Ok(Some(if is_explained { sound } else { begin }))
}

/// The parts of what was read at a place that are in one sector each.
fn sectors(bytes: &[u8], offset: u64) -> impl Iterator<Item = &[u8]> {
    let first = bytes.len().min((SECTOR - offset % SECTOR) as usize);
    let (first, rest) = bytes.split_at(first);
    iter::once(first).chain(rest.chunks(SECTOR as usize))
}

/// Whether a part of a sector is nothing but zeros; some that a job wrote by itself are no sign of anything.
fn is_hole(part: &[u8]) -> bool {
    part.len() >= LEAST_HOLE && is_zeros(part)
}

/// Whether zeros have something else behind them. A sector that was written before, and not again when more of it was
/// used, ends with zeros.
fn has_zeros_within(part: &[u8]) -> bool {
    memchr(0, part).is_some_and(|first| !is_zeros(&part[first..]))
}

fn is_zeros(part: &[u8]) -> bool {
    part.iter().all(|&byte| byte == 0)
}

/// Looks at what stands behind the last line that the marks tell of.
fn check_tail(log: &mut ReadFile, marked: StreamProgress, length: u64) -> Result<Option<Sound>, LogError> {
    let lines = marked.lines;
    if length < marked.bytes {
        // Nothing is lost that was not given up before.
        let is_damage = marked.unterminated() > 0;
        return Ok(is_damage.then_some(Sound {
            bytes: marked.line_start,
            lines,
            unmarked: 0,
            lost_before: (0, 0),
        }));
    }
    let mut sound = Sound { bytes: marked.line_start, lines, unmarked: 0, lost_before: (0, 0) };
    let (mut offset, mut is_damage) = (marked.line_start, false);
    // A sector that was never written is zeros to its end, whatever stands behind it.
    while !is_damage
        && let length = (offset / SECTOR + 1) * SECTOR - offset
        && let Fetched::Bytes(bytes) = log.read(offset, length as usize, Io::MayBlock)?
        && !bytes.is_empty()
    {
        let text = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let whole = whole_lines(&bytes[..text]);
        if whole > 0 {
            sound.bytes = offset + whole as u64;
            sound.lines += count_lines(&bytes[..whole]);
        }
        is_damage = text < bytes.len();
        offset += bytes.len() as u64;
    }
    sound.unmarked = length.saturating_sub(sound.bytes.max(marked.bytes));
    Ok(is_damage.then_some(sound))
}

/// Begins the journal of a run anew of which a power cut kept the logs, and not the journal's beginning: what is in them
/// is told apart from what was lost then, as in any other run that went on. Gives whether that was so.
pub(super) fn begin_journal_anew(folder: &RunFolder, id: &JobRunId) -> Result<bool, LogError> {
    let (path, touched) = (folder.journal(), last_touched(folder));
    if !machine_was_started_since(touched) || !was_never_written(&path)? {
        return Ok(false);
    }
    let run = plain_metadata(folder, id)?;
    if run.state.is_over() {
        return Ok(false);
    }
    let mut journal = AppendFile::open(path.clone())?;
    if !journal.try_lock()? {
        return Ok(false);
    }
    tracing::error!(run = %id, "the machine stopped before the beginning of a run was on its disk; when it began and what it executes is lost");
    journal.cut(0)?;
    let journal = JournalWriter::begin(journal, &run)?;
    // By the times of its files it is seen what became of the run.
    journal.handle().set_modified(touched).map_err(LogError::io("setting the time of", path))?;
    Ok(true)
}

/// Whether a journal lacks a part of its beginning because that did not get to the disk: it ends there, or a sector of it is
/// all zeros, as nothing is that is written there.
fn was_never_written(path: &Path) -> Result<bool, LogError> {
    let Some(mut journal) = ReadFile::open_if_there(path)?.filter(|journal| !journal.is_compressed()) else {
        return Ok(false);
    };
    let Fetched::Bytes(beginning) = journal.read(0, BEGINNING, Io::MayBlock)? else { return Ok(false) };
    Ok(match JournalReader::new(journal).at(0, Io::MayBlock)? {
        Entry::Nothing => true,
        Entry::Damaged => beginning.chunks(SECTOR as usize).any(is_zeros),
        Entry::Record(..) | Entry::WouldBlock => false,
    })
}
