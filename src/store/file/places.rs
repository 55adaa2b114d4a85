//! Finding a place in a run: in what waits for the index, in the index, and without one in the journal.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::Arc;

use memchr::memrchr_iter;

use crate::error::LogError;
use crate::index::progress::{GapAt, Progress};
use crate::index::{Index, LineFloor};
use crate::journal::Arrival;
use crate::line::{Stream, UnixMicros, View};
use crate::logfile::{Fetched, Io, ReadFile, count_lines};
use crate::store::Start;
use crate::store::file::lines::LITTLE_BYTES;
use crate::store::file::live::{LiveRun, State};
use crate::store::file::marks::{Arrivals, JournalReader, Walk};
use crate::store::file::tracker::SCAN_BYTES;

/// Looks up places in a run: in what waits for the index, in the index, and without one in the journal.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    pub(crate) run: &'a LiveRun,
    pub(crate) index: Option<&'a Index>,
}

impl Places<'_> {
    /// A place in a log file with at most `line` lines before it, (lines before, byte offset), and the file: what was
    /// read of it to look at the place need not be read again.
    pub(crate) fn line_floor(&self, stream: Stream, line: u64) -> Result<((u64, u64), ReadFile), LogError> {
        let mut file = ReadFile::open_when_there(&self.run.folder.log(stream))?;
        let cut = self.run.state().cuts.of(stream).filter(|cut| cut.begin.lines <= line);
        let place = match cut {
            Some(cut) if line < cut.end.lines => (cut.begin.lines, cut.begin.offset),
            Some(cut) => {
                let found = self.line_floor_in(stream, line, &mut file)?;
                if found.1 < cut.end.offset { (cut.end.lines, cut.end.offset) } else { found }
            }
            None => self.line_floor_in(stream, line, &mut file)?,
        };
        Ok((place, file))
    }

    /// The same by what is kept of places, also of those in what was given up of the log since.
    fn line_floor_in(&self, stream: Stream, line: u64, file: &mut ReadFile) -> Result<(u64, u64), LogError> {
        if line == 0 {
            return Ok((0, 0));
        }
        if let Some(waiting) = self.run.state().waiting_line_floor(stream, line) {
            return Ok(waiting);
        }
        let found = match (self.index, self.run.number) {
            (Some(index), Some(number)) => {
                self.trusted(index.line_floor(number, stream, line)).map(|floor| {
                    let at = floor.place;
                    self.counted_back(stream, line, floor, file).unwrap_or((at.lines, at.offset))
                })
            }
            _ => {
                let start = Progress::start(self.run.state().run.started_at, 0);
                let (last, _) = self.walk_journal(start, |progress| progress.of(stream).lines <= line)?;
                let at = last.of(stream);
                Some((at.lines, at.line_start))
            }
        };
        Ok(found.filter(|&(_, offset)| self.is_line_start(stream, offset, file)).unwrap_or((0, 0)))
    }

    /// Where a line begins that is nearer to the next place than to the one before it, counted back from there: what has
    /// to be read of a large log to find a line is most of what that takes. `None` if it is not nearer, or there is
    /// anything on the way that is no line.
    fn counted_back(
        &self,
        stream: Stream,
        line: u64,
        floor: LineFloor,
        file: &mut ReadFile,
    ) -> Option<(u64, u64)> {
        let (from, next) = (floor.place, floor.next?);
        let is_nearer = line - from.lines > next.lines - line;
        if !is_nearer || file.is_compressed() || !self.is_unbroken(stream, from.offset..=next.offset) {
            return None;
        }
        // Of the line ends before that place, the one behind which the line begins.
        let mut wanted = usize::try_from(next.lines - line).ok()?;
        let mut end = next.offset;
        while end > from.offset {
            let begin = end.saturating_sub(LITTLE_BYTES as u64).max(from.offset);
            let length = usize::try_from(end - begin).ok()?;
            let Ok(Fetched::Bytes(bytes)) = file.read(begin, length, Io::MayBlock) else { return None };
            if bytes.len() != length || end == next.offset && bytes.last() != Some(&b'\n') {
                return None;
            }
            let found = usize::try_from(count_lines(&bytes)).ok()?;
            if found > wanted {
                let at = memrchr_iter(b'\n', &bytes).nth(wanted)?;
                return Some((line, begin + at as u64 + 1));
            }
            wanted -= found;
            end = begin;
        }
        None
    }

    /// Whether nothing was lost or given up of a part of a log.
    fn is_unbroken(&self, stream: Stream, part: RangeInclusive<u64>) -> bool {
        let state = self.run.state();
        let is_cut = state
            .cuts
            .of(stream)
            .is_some_and(|cut| cut.begin.offset <= *part.end() && *part.start() <= cut.end.offset);
        !is_cut && !state.gaps.iter().any(|at| at.gap.stream == stream && part.contains(&at.offset))
    }

    /// The same by the journal alone, which tells of every hole: right behind `line` lines, or where less of them
    /// arrived with one record. A hole is where it begins, however many lines it has.
    pub(crate) fn line_floor_by_journal(
        &self,
        stream: Stream,
        line: u64,
    ) -> Result<((u64, u64), ReadFile), LogError> {
        let is_before = |progress: &Progress| progress.of(stream).lines <= line;
        let behind = Cell::new(None);
        let (last, _) = self.walk_journal(self.progress_while(is_before), |progress| {
            behind.set(Some(*progress.of(stream)));
            is_before(progress)
        })?;
        let at = last.of(stream);
        let is_in_hole = behind.get().is_some_and(|next| next.dropped_lines > at.dropped_lines);
        let place = (if is_in_hole { line } else { at.lines }, at.line_start);
        Ok((place, ReadFile::open_when_there(&self.run.folder.log(stream))?))
    }

    /// The last place kept of the journal for which `is_before` holds, or its beginning.
    pub(crate) fn progress_while(&self, is_before: impl Fn(&Progress) -> bool + Copy) -> Progress {
        let start = {
            let state = self.run.state();
            if let Some(waiting) = state.waiting_place(is_before) {
                return waiting;
            }
            Progress::start(state.run.started_at, 0)
        };
        let (Some(index), Some(number)) = (self.index, self.run.number) else { return start };
        self.trusted(index.progress_while(number, is_before)).unwrap_or(start)
    }

    /// How many lines of a view lie before a start. With `by_marks` there are only lines that a mark tells of, as for
    /// a read in the order of the journal.
    pub(crate) fn position(&self, view: View, start: Start, by_marks: bool) -> Result<u64, LogError> {
        match start {
            Start::After(line) => Ok(line.0),
            Start::LastLines { count, after } => {
                let lines = match view {
                    View::One(stream) if !by_marks => self.lines_written(stream)?,
                    view => self.run.state().lines(view),
                };
                Ok(lines.saturating_sub(count).max(after.0))
            }
            Start::Since(time) => self.lines_before(view, time),
        }
    }

    /// The lines of a stream that can be read at this moment: of a run of another process also those that its journal
    /// does not tell of yet.
    fn lines_written(&self, stream: Stream) -> Result<u64, LogError> {
        let (mut lines, mut offset, end) = {
            let state = self.run.state();
            let unmarked_from =
                if state.run.state.is_over() { u64::MAX } else { state.progress.of(stream).bytes };
            (state.lines(View::One(stream)), unmarked_from, state.visible[stream.index()])
        };
        if offset >= end {
            return Ok(lines);
        }
        let Some(mut file) = ReadFile::open_if_there(&self.run.folder.log(stream))? else { return Ok(lines) };
        while offset < end {
            let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(SCAN_BYTES);
            let Fetched::Bytes(bytes) = file.read(offset, length, Io::MayBlock)? else { break };
            if bytes.is_empty() {
                break;
            }
            lines += count_lines(&bytes);
            offset += bytes.len() as u64;
        }
        Ok(lines)
    }

    /// How many lines of a view arrived before `time`.
    pub(crate) fn lines_before(&self, view: View, time: UnixMicros) -> Result<u64, LogError> {
        let (ended, has_journal, all) = {
            let state = self.run.state();
            (state.run.state.ended(), state.has_journal, state.lines(view))
        };
        let ended_before = ended.is_some_and(|ended| ended < time);
        if !has_journal {
            // Nothing is known of times but when the run ended.
            return Ok(if ended_before { all } else { 0 });
        }
        let place = self.progress_while(|progress| progress.time < time);
        let (last, is_end) = self.walk_journal(place, |progress| progress.time < time)?;
        // What stands behind the last mark ended with the run.
        Ok(if is_end && ended_before { all } else { lines_of(&last, view) })
    }

    /// An index that fails costs speed and nothing else.
    fn trusted<T>(&self, answer: Result<Option<T>, LogError>) -> Option<T> {
        answer.unwrap_or_else(|error| {
            tracing::warn!(%error, run = %self.run.id, "reading without the index");
            None
        })
    }

    /// Whether a line can begin here: the index may be older than the file, or damaged.
    fn is_line_start(&self, stream: Stream, offset: u64, file: &mut ReadFile) -> bool {
        let is_given_up = || self.run.state().cuts.of(stream).is_some_and(|cut| cut.covers(offset));
        if offset == 0 || is_given_up() {
            return true;
        }
        let sound = match file.read(offset - 1, 1, Io::MayBlock) {
            // It may be given up since it was looked for.
            Ok(Fetched::Bytes(byte)) => byte == "\n" || is_given_up(),
            // Nothing speaks against it, and whoever reads there is told.
            Ok(Fetched::Damaged(_)) => true,
            _ => false,
        };
        if !sound {
            tracing::error!(run = %self.run.id, %stream, offset, "the index points into a line; scanning instead");
        }
        sound
    }

    /// Goes on from `place` for as long as `is_before` holds behind the next arrival; tells whether it holds to the
    /// end.
    fn walk_journal(
        &self,
        place: Progress,
        is_before: impl Fn(&Progress) -> bool,
    ) -> Result<(Progress, bool), LogError> {
        let file = ReadFile::open_when_there(&self.run.folder.journal())?;
        let moment = Moment::of(&self.run.state());
        let mut arrivals = Arrivals::new(JournalReader::new(file), place);
        let mut last = place;
        while let Walk::Next(next) = arrivals.next(moment.progress.journal, &moment.tail, Io::MayBlock)? {
            if !is_before(&next.after) {
                return Ok((last, false));
            }
            arrivals.take(&next);
            last = next.after;
        }
        Ok((last, true))
    }
}

/// What a source looks at in a run's state, all at one moment.
pub(crate) struct Moment {
    pub(crate) visible: [u64; 2],
    pub(crate) progress: Progress,
    pub(crate) tail: Vec<Arrival>,
    gaps: Arc<Vec<GapAt>>,
    /// Whether every hole is known here; if not, only the journal tells of all of them.
    pub(crate) has_all_gaps: bool,
    has_journal: bool,
    /// When the run ended; `None` while it goes on.
    pub(crate) ended: Option<UnixMicros>,
    /// Where each stream ends for now: lines, and the bytes up to the end of the last of them.
    ends: [(u64, u64); 2],
}

impl Moment {
    pub(crate) fn of(state: &State) -> Self {
        Self {
            visible: state.visible,
            progress: state.progress,
            tail: state.tail.clone(),
            gaps: Arc::clone(&state.gaps),
            has_all_gaps: state.has_all_gaps(),
            has_journal: state.has_journal,
            ended: state.run.state.ended(),
            ends: Stream::BOTH.map(|stream| state.end_of(stream)),
        }
    }

    pub(crate) const fn is_over(&self) -> bool {
        self.ended.is_some()
    }

    /// The streams of which lines come that no mark tells of. The order of a run without a journal is that of its
    /// streams, so of the second one nothing comes before the first has ended.
    pub(crate) const fn without_marks(&self) -> &'static [Stream] {
        match (self.is_over(), self.has_journal) {
            (true, _) => &Stream::BOTH,
            (false, false) => &[Stream::Stdout],
            (false, true) => &[],
        }
    }

    /// Where a stream ends for now: lines, and the bytes up to the end of the last of them.
    pub(crate) const fn end_of(&self, stream: Stream) -> (u64, u64) {
        self.ends[stream.index()]
    }

    /// The holes of a stream; none where the journal has to tell of them.
    pub(crate) fn gaps_of(&self, stream: Stream) -> Vec<GapAt> {
        if !self.has_all_gaps {
            return Vec::new();
        }
        self.gaps.iter().filter(|at| at.gap.stream == stream).copied().collect()
    }
}

/// How many lines of a view a progress counts.
pub(crate) fn lines_of(progress: &Progress, view: View) -> u64 {
    match view {
        View::One(stream) => progress.of(stream).lines,
        View::All => progress.lines(),
    }
}
