//! Reading a run that is kept in files: from where it was asked for, through the backlog, into what is being
//! written.

mod journal_order;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::LogError;
use crate::index::Index;
use crate::line::{LineNumber, Stream, View};
use crate::logfile::{Io, ReadFile};
use crate::run::{Gap, GapReason};
use crate::store::file::cuts::CutWatch;
use crate::store::file::lines::{LineReader, Reach, Taken};
use crate::store::file::live::LiveRun;
use crate::store::file::places::{Moment, Places};
use crate::store::follow::{Source, Step};
use crate::store::{Batch, ReadEnd, ReadEvent, ReadOptions};
use journal_order::JournalOrder;

/// A read of one run.
pub(crate) struct FileSource {
    run: Arc<LiveRun>,
    view: View,
    follow: bool,
    batch_bytes: usize,
    /// Lines that may still be given.
    left: u64,
    /// The position behind the last line given.
    position: LineNumber,
    readers: [Option<LineReader>; 2],
    order: Order,
    index: Option<Arc<Index>>,
    cuts: Arc<CutWatch>,
    /// Set when the store is being closed.
    closed: Arc<AtomicBool>,
    /// Whether it was said that a log does not hold what was written to it.
    said_missing: bool,
}

/// Where the order of lines comes from.
enum Order {
    /// There is only one stream, and nobody asks for times: the file says it all.
    File(Stream),
    /// The journal says when lines of which stream arrived.
    Journal(Box<JournalOrder>),
}

impl FileSource {
    pub(crate) fn open(
        run: Arc<LiveRun>,
        index: Option<Arc<Index>>,
        closed: Arc<AtomicBool>,
        options: &ReadOptions,
    ) -> Result<Self, LogError> {
        let (has_journal, has_all_gaps) = {
            let state = run.state();
            (state.has_journal, state.has_all_gaps())
        };
        let in_one_file = match options.view {
            View::One(stream) if !has_journal || (has_all_gaps && !options.times) => Some(stream),
            _ => None,
        };
        let places = Places { run: &run, index: index.as_deref() };
        let position = places.position(options.view, options.start, in_one_file.is_none())?;
        let mut source = Self {
            view: options.view,
            follow: options.follow,
            batch_bytes: options.batch_bytes.clamp(1, Batch::MAX_LINE_BYTES),
            left: options.limit.unwrap_or(u64::MAX),
            position: LineNumber::START,
            readers: [None, None],
            order: Order::File(Stream::Stdout),
            index,
            cuts: Arc::new(CutWatch::new(Arc::clone(&run))),
            closed,
            said_missing: false,
            run,
        };
        source.position = LineNumber(position);
        source.order = match in_one_file {
            Some(stream) => {
                let (place, file) = source.places().line_floor(stream, position)?;
                source.set_reader(stream, file, place, position);
                Order::File(stream)
            }
            None => Order::Journal(Box::new(source.open_journal(position)?)),
        };
        Ok(source)
    }

    fn places(&self) -> Places<'_> {
        Places { run: &self.run, index: self.index.as_deref() }
    }

    /// Opens the reader of a stream at a place, to give the lines behind `line`.
    fn open_reader(
        &mut self,
        stream: Stream,
        place: (u64, u64),
        line: u64,
    ) -> Result<&mut LineReader, LogError> {
        let file = ReadFile::open_when_there(&self.run.folder.log(stream))?;
        Ok(self.set_reader(stream, file, place, line))
    }

    fn set_reader(
        &mut self,
        stream: Stream,
        file: ReadFile,
        place: (u64, u64),
        line: u64,
    ) -> &mut LineReader {
        let reader = LineReader::new(stream, file, place, self.batch_bytes);
        let mut reader = reader.beside(Arc::clone(&self.cuts));
        reader.skip_to(line);
        self.readers[stream.index()].insert(reader)
    }

    /// The next event in the order of one file.
    fn next_in_file(&mut self, stream: Stream, moment: &Moment, io: Io) -> Result<Option<Step>, LogError> {
        let Some(reader) = &mut self.readers[stream.index()] else { return Ok(None) };
        let gaps = moment.gaps_of(stream);
        let end = moment.visible[stream.index()];
        let mut lines = self.left;
        if moment.is_over() {
            // A log with more ends of lines than were written to it is damaged; no line has such a number.
            lines = lines.min(moment.end_of(stream).0.saturating_sub(reader.line()));
        }
        let reach = Reach { lines, end, ended: moment.is_over(), gaps: &gaps };
        let before = reader.line();
        let mut taken = reader.next(reach, io)?;
        while let Taken::Damaged(line, offset) = taken {
            let (lines, bytes) = moment.end_of(stream);
            let until = if offset < bytes { (line, offset) } else { (lines.max(line), bytes) };
            if until.0 > reader.line() {
                return Ok(self.missing(stream, until));
            }
            // Nobody asked for what is damaged.
            reader.pass_over(until.0, until.1);
            taken = reader.next(reach, io)?;
        }
        match taken {
            Taken::Lines(batch) => Ok(Some(self.give(batch))),
            Taken::Gap(gap) | Taken::Cut(gap) => {
                self.position = self.position.plus(reader.line() - before);
                Ok(Some(Step::Event(ReadEvent::Gap { gap, next: self.position })))
            }
            Taken::Nothing => Ok(None),
            Taken::Missing if io == Io::CachedOnly => Ok(Some(Step::WouldBlock)),
            // The writer may have cut off a line that it could not keep; it is going to say so.
            Taken::Missing if !moment.is_over() => Ok(None),
            Taken::Missing | Taken::Damaged(..) => Ok(self.missing(stream, moment.end_of(stream))),
            Taken::WouldBlock => Ok(Some(Step::WouldBlock)),
        }
    }

    /// Hands out a batch of the view.
    fn give(&mut self, mut batch: Batch) -> Step {
        batch.first_position = self.position.plus(1);
        self.position = self.position.plus(batch.lines);
        self.left -= batch.lines;
        Step::Event(ReadEvent::Lines(batch))
    }

    /// Says that the lines up to `end` (so many lines, so many bytes) are not in the file as they were written, and
    /// goes on behind them; `None` if the reader is there already.
    fn missing(&mut self, stream: Stream, end: (u64, u64)) -> Option<Step> {
        let reader = self.readers[stream.index()].as_mut()?;
        let (lines, bytes) = (end.0.checked_sub(reader.line())?, end.1.saturating_sub(reader.offset()));
        if lines == 0 {
            return None;
        }
        // Its file was not open when it went.
        if let Some(stone) = self.run.state().evicted.clone() {
            return Some(Step::Event(ReadEvent::End(ReadEnd::Evicted(stone))));
        }
        if self.index.as_ref().is_some_and(|index| index.is_away()) {
            // It may be whole where it is now. Whoever comes again is told why it can't be read.
            return Some(Step::Event(ReadEvent::End(ReadEnd::Shutdown)));
        }
        let gap = Gap { stream, after: LineNumber(reader.line()), lines, bytes, reason: GapReason::Corrupt };
        if !std::mem::replace(&mut self.said_missing, true) {
            let (path, offset) = (self.run.folder.log(stream), reader.offset());
            tracing::error!(path = %path.display(), offset, lines, "a log does not hold what was written to it; `databuild index check --deep` says where");
        }
        reader.jump(end.0, end.1);
        self.position = self.position.plus(lines);
        Some(Step::Event(ReadEvent::Gap { gap, next: self.position }))
    }

    /// Why there is nothing more, if the read is at its end.
    fn end(&self) -> Option<ReadEnd> {
        let state = self.run.state();
        // Who does not follow has everything, and how it ended: files that are open stay whole.
        let has_all = !self.follow && state.run.state.is_over();
        if state.is_replaced && !has_all {
            Some(ReadEnd::Shutdown)
        } else if let Some(tombstone) = state.evicted.as_ref().filter(|_| !has_all) {
            Some(ReadEnd::Evicted(tombstone.clone()))
        } else if state.run.state.is_over() {
            Some(ReadEnd::Complete(Box::new(state.metadata())))
        } else if !self.follow || self.left == 0 {
            Some(ReadEnd::Running { next: self.position })
        } else {
            None
        }
    }
}

impl Source for FileSource {
    fn next(&mut self, io: Io) -> Result<Step, LogError> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(Step::Event(ReadEvent::End(ReadEnd::Shutdown)));
        }
        if self.left > 0 {
            // The moment is taken before the files are looked at: a run that ends in between is asked once more.
            let moment = Moment::of(&self.run.state());
            let step = match std::mem::replace(&mut self.order, Order::File(Stream::Stdout)) {
                Order::File(stream) if moment.has_all_gaps => {
                    self.order = Order::File(stream);
                    self.next_in_file(stream, &moment, io)?
                }
                Order::File(stream) if io == Io::CachedOnly => {
                    self.order = Order::File(stream);
                    Some(Step::WouldBlock)
                }
                Order::File(_) => {
                    // There are more holes by now than are kept here.
                    self.readers = [None, None];
                    self.order = Order::Journal(Box::new(self.open_journal(self.position.0)?));
                    return self.next(io);
                }
                Order::Journal(mut order) => {
                    let step = self.next_in_journal(&mut order, &moment, io);
                    self.order = Order::Journal(order);
                    step?
                }
            };
            if let Some(step) = step {
                return Ok(step);
            }
            if !moment.is_over() && self.run.is_over() {
                return self.next(io);
            }
        }
        Ok(self.end().map_or(Step::CaughtUp, |end| Step::Event(ReadEvent::End(end))))
    }
}
