//! The order of the journal: which stream's lines come next, when they arrived, and what is missing between them.

use super::FileSource;
use crate::error::LogError;
use crate::index::progress::{Progress, gap_of_cut};
use crate::journal::{Cut, Place, What};
use crate::line::{LineNumber, Stream, View};
use crate::logfile::{Io, ReadFile};
use crate::run::{Gap, GapReason};
use crate::store::file::lines::{LineReader, Reach, Taken};
use crate::store::file::marks::{Arrivals, JournalReader, Next, Walk};
use crate::store::file::places::{Moment, lines_of};
use crate::store::follow::Step;
use crate::store::{LineTime, ReadEvent};

/// So many marks of what is given up are passed over by who may not block; days of output have millions of them.
const PASSED_OVER_AT_ONCE: u32 = 4096;

/// What is read of the journal, and where that has come to.
pub(super) struct JournalOrder {
    arrivals: Arrivals,
    /// What is given up of each stream and is to be told before anything else.
    given_up: [Option<Lost>; 2],
    /// Lines that were told to be given up and that the position does not count yet.
    told: u64,
    /// The place that is sought first: so many lines of the view lie before it.
    seek: Option<u64>,
    plan: Option<Plan>,
}

/// Lines of one stream that are given up.
#[derive(Clone, Copy)]
struct Lost {
    gap: Gap,
    /// How many of them the reader has not passed yet.
    fresh: u64,
    /// Where the stream goes on: lines before, and bytes.
    behind: (u64, u64),
    /// Whether some of what is given up was given to the reader before.
    is_rest: bool,
}

/// Lines of one stream that come next.
struct Plan {
    stream: Stream,
    /// The run from where the journal is read again if the plan comes to nothing. Marks that were not in it yet may lie
    /// between that and the first.
    before: Progress,
    /// Where the first mark begins: lines of the stream before it, and bytes.
    begin: (u64, u64),
    /// Lines of the stream before the end of the plan.
    until_line: u64,
    /// Where it ends in the file.
    end: u64,
    times: Vec<LineTime>,
}

impl FileSource {
    pub(super) fn open_journal(&self, position: u64) -> Result<JournalOrder, LogError> {
        let view = self.view;
        let at = self.places().progress_while(|at| lines_of(at, view) <= position);
        let file = ReadFile::open_when_there(&self.run.folder.journal())?;
        let mut arrivals = Arrivals::new(JournalReader::new(file), at);
        if let View::One(stream) = view {
            let other = 1 - stream.index();
            arrivals.taken[other] = u64::MAX;
        }
        let seek = Some(position);
        Ok(JournalOrder { arrivals, given_up: [None; 2], told: 0, seek, plan: None })
    }

    /// The next event in the order of the journal.
    pub(super) fn next_in_journal(
        &mut self,
        order: &mut JournalOrder,
        moment: &Moment,
        io: Io,
    ) -> Result<Option<Step>, LogError> {
        if let Some(seek) = order.seek {
            match self.seek(&mut order.arrivals, seek, moment, io)? {
                Sought::Found => order.seek = None,
                Sought::NotYet
                    if !moment.is_over()
                        && moment.without_marks().iter().all(|&stream| moment.end_of(stream).0 < seek) =>
                {
                    return Ok(None);
                }
                Sought::NotYet => {
                    self.seek_behind_journal(&mut order.arrivals, seek);
                    order.seek = None;
                }
                Sought::WouldBlock => return Ok(Some(Step::WouldBlock)),
            }
        }
        let mut passed_over = 0;
        loop {
            if let Some(plan) = &order.plan {
                match self.follow_plan(plan, moment, io)? {
                    Followed::Step(step) => return Ok(Some(step)),
                    Followed::Done => {}
                    // What is left of it is told together with what else is given up.
                    Followed::GivenUp(line) => order.arrivals.go_back(plan.before, plan.stream, line),
                }
                order.plan = None;
            }
            let next = match order.arrivals.next(moment.progress.journal, &moment.tail, io)? {
                Walk::WouldBlock => return Ok(Some(Step::WouldBlock)),
                Walk::Next(next) => match self.given_up(&order.arrivals, &next) {
                    Some(cut) => {
                        let reader = &self.readers[next.arrival.stream.index()];
                        order.note_loss(&next, &cut, reader.as_ref().and_then(LineReader::place));
                        passed_over += 1;
                        if io == Io::CachedOnly && passed_over == PASSED_OVER_AT_ONCE {
                            return Ok(Some(Step::WouldBlock));
                        }
                        continue;
                    }
                    None => Some(next),
                },
                Walk::Nothing => None,
            };
            if let Some(lost) = order.given_up.iter_mut().find_map(Option::take) {
                order.told += lost.fresh;
                // No place lies between the holes of both streams: they came by turns. Who is cut off there is told of
                // both again.
                let is_last = order.given_up.iter().all(Option::is_none);
                let passed = if is_last { std::mem::take(&mut order.told) } else { 0 };
                return self.give_loss(lost, passed, moment).map(Some);
            }
            match next {
                Some(next) => match next.arrival.what {
                    What::Gap(reason) => return self.give_gap(&mut order.arrivals, &next, reason).map(Some),
                    What::Mark { .. } => {
                        order.plan = Some(self.make_plan(&mut order.arrivals, &next, moment, io)?)
                    }
                },
                None => return self.next_behind_journal(&mut order.arrivals, moment, io),
            }
        }
    }

    /// What is given up, if the line that comes next is in it.
    fn given_up(&self, arrivals: &Arrivals, next: &Next) -> Option<Cut> {
        let stream = next.arrival.stream;
        let line = arrivals.taken[stream.index()].max(next.before.of(stream).lines);
        self.cuts.known(stream).filter(|cut| cut.covers_line(line))
    }

    /// Tells of lines that are given up, and goes so many on. Where nothing can lie between them, that is of all of them,
    /// as without times.
    fn give_loss(&mut self, lost: Lost, passed: u64, moment: &Moment) -> Result<Step, LogError> {
        let stream = lost.gap.stream;
        let gap = match (self.view, self.cuts.known(stream)) {
            (View::One(_), Some(cut)) if cut.end.lines == lost.behind.0 && !lost.is_rest => {
                gap_of_cut(&cut, cut.begin, &moment.gaps_of(stream))
            }
            _ => lost.gap,
        };
        self.go_to(stream, lost.behind)?;
        self.position = self.position.plus(passed);
        Ok(Step::Event(ReadEvent::Gap { gap, next: self.position }))
    }

    /// Lets the reader of a stream go on at a place.
    fn go_to(&mut self, stream: Stream, place: (u64, u64)) -> Result<(), LogError> {
        match &mut self.readers[stream.index()] {
            Some(reader) => reader.jump(place.0, place.1),
            None => {
                self.open_reader(stream, place, place.0)?;
            }
        }
        Ok(())
    }

    /// Walks the journal to the place with `line` lines before it.
    fn seek(&self, arrivals: &mut Arrivals, line: u64, moment: &Moment, io: Io) -> Result<Sought, LogError> {
        loop {
            let here = self.taken(arrivals);
            if here >= line {
                return Ok(Sought::Found);
            }
            let next = match arrivals.next(moment.progress.journal, &moment.tail, io)? {
                Walk::Next(next) => next,
                Walk::Nothing => return Ok(Sought::NotYet),
                Walk::WouldBlock => return Ok(Sought::WouldBlock),
            };
            let taken = &mut arrivals.taken[next.arrival.stream.index()];
            let fresh = next.after.of(next.arrival.stream).lines - *taken;
            *taken += fresh.min(line - here);
        }
    }

    /// Lines of the view that are taken.
    fn taken(&self, arrivals: &Arrivals) -> u64 {
        match self.view {
            View::One(stream) => arrivals.taken[stream.index()],
            View::All => arrivals.taken.iter().sum(),
        }
    }

    /// What is sought lies behind the journal's end: in lines that no mark tells of, standard output's first.
    fn seek_behind_journal(&self, arrivals: &mut Arrivals, line: u64) {
        let mut missing = line - self.taken(arrivals);
        for &stream in self.view.streams() {
            let taken = &mut arrivals.taken[stream.index()];
            let step = missing.min(self.run.state().lines(View::One(stream)).saturating_sub(*taken));
            *taken += step;
            missing -= step;
        }
    }

    /// Gathers marks of one stream, as long as no other stream's lines come between.
    fn make_plan(
        &self,
        arrivals: &mut Arrivals,
        first: &Next,
        moment: &Moment,
        io: Io,
    ) -> Result<Plan, LogError> {
        let stream = first.arrival.stream;
        let begin = first.before.of(stream);
        let from = arrivals.taken[stream.index()];
        let mut plan = Plan {
            stream,
            before: arrivals.here(),
            begin: (begin.lines, begin.line_start),
            until_line: first.after.of(stream).lines,
            end: first.after.of(stream).line_start,
            times: vec![LineTime { from: LineNumber(from + 1), time: first.after.time }],
        };
        arrivals.take(first);
        while plan.end - begin.line_start < self.batch_bytes as u64
            && let Walk::Next(next) = arrivals.next(moment.progress.journal, &moment.tail, io)?
            && next.arrival.stream == stream
            && matches!(next.arrival.what, What::Mark { .. })
            && self.given_up(arrivals, &next).is_none()
        {
            plan.times.push(LineTime { from: LineNumber(plan.until_line + 1), time: next.after.time });
            plan.until_line = next.after.of(stream).lines;
            plan.end = next.after.of(stream).line_start;
            arrivals.take(&next);
        }
        Ok(plan)
    }

    /// Gives the next lines of a plan.
    fn follow_plan(&mut self, plan: &Plan, moment: &Moment, io: Io) -> Result<Followed, LogError> {
        let first = plan.times.first().map_or(0, |time| time.from.0 - 1);
        let stream = plan.stream;
        if self.readers[stream.index()].is_none() {
            self.open_reader(stream, plan.begin, first)?;
        }
        let Some(reader) = &mut self.readers[stream.index()] else { return Ok(Followed::Done) };
        let (line, place) = (reader.line(), reader.place());
        let lines = plan.until_line.saturating_sub(line).min(self.left);
        if lines == 0 {
            if line == plan.until_line && reader.offset() != plan.end {
                // The log has more ends of lines than the journal knows; the journal says where the next begins.
                reader.jump(plan.until_line, plan.end);
            }
            return Ok(Followed::Done);
        }
        let gaps = moment.gaps_of(stream);
        Ok(match reader.next(Reach { lines, end: plan.end, ended: false, gaps: &gaps }, io)? {
            Taken::Lines(mut batch) => {
                batch.times = times_of(&plan.times, batch.first_line, batch.lines);
                Followed::Step(self.give(batch))
            }
            Taken::Gap(_) => return self.follow_plan(plan, moment, io),
            Taken::Cut(_) if self.cuts.known(stream).is_some_and(|cut| cut.covers_line(line)) => {
                match place {
                    Some(place) => reader.jump(place.lines, place.offset),
                    None => self.readers[stream.index()] = None,
                }
                Followed::GivenUp(line)
            }
            Taken::WouldBlock => Followed::Step(Step::WouldBlock),
            Taken::Missing if io == Io::CachedOnly => Followed::Step(Step::WouldBlock),
            Taken::Damaged(damaged, offset) if damaged < plan.until_line => {
                if damaged <= reader.line() {
                    reader.pass_over(damaged, offset);
                    return self.follow_plan(plan, moment, io);
                }
                self.missing(stream, (damaged, offset)).map_or(Followed::Done, Followed::Step)
            }
            Taken::Damaged(..) => {
                self.missing(stream, (plan.until_line, plan.end)).map_or(Followed::Done, Followed::Step)
            }
            // There is no end of a line where the journal says that there was one, or other lines are said to be given up.
            Taken::Missing | Taken::Nothing | Taken::Cut(_) => {
                self.missing(stream, (plan.until_line, plan.end)).map_or(Followed::Done, Followed::Step)
            }
        })
    }

    /// Gives a hole; a reader that begins within it is told of all of it, and counts on from where it began.
    fn give_gap(
        &mut self,
        arrivals: &mut Arrivals,
        next: &Next,
        reason: GapReason,
    ) -> Result<Step, LogError> {
        let stream = next.arrival.stream;
        let before = next.before.of(stream);
        let fresh = next.after.of(stream).lines - arrivals.taken[stream.index()];
        arrivals.take(next);
        let gap = Gap {
            stream,
            after: LineNumber(before.lines),
            lines: next.arrival.lines,
            bytes: next.arrival.bytes,
            reason,
        };
        self.go_to(stream, (next.after.of(stream).lines, next.after.of(stream).line_start))?;
        self.position = self.position.plus(fresh);
        Ok(Step::Event(ReadEvent::Gap { gap, next: self.position }))
    }

    /// What no mark tells of: all of a run without a journal, or an unterminated last line once the run is over.
    fn next_behind_journal(
        &mut self,
        arrivals: &mut Arrivals,
        moment: &Moment,
        io: Io,
    ) -> Result<Option<Step>, LogError> {
        let without_marks = moment.without_marks();
        for &stream in self.view.streams().iter().filter(|stream| without_marks.contains(stream)) {
            if self.readers[stream.index()].is_none() {
                if io == Io::CachedOnly {
                    return Ok(Some(Step::WouldBlock));
                }
                let line = arrivals.taken[stream.index()];
                if moment.progress.journal > 0 {
                    self.open_reader(stream, arrivals.place(stream), line)?;
                } else {
                    let (place, file) = self.places().line_floor(stream, line)?;
                    self.set_reader(stream, file, place, line);
                }
            }
            let mut step = self.next_in_file(stream, moment, io)?;
            if let Some(reader) = &self.readers[stream.index()] {
                arrivals.taken[stream.index()] = reader.line();
            }
            if let Some(Step::Event(ReadEvent::Lines(batch))) = &mut step
                && moment.progress.journal > 0
                && let Some(time) = moment.ended
            {
                // These lines ended with the run.
                batch.times = vec![LineTime { from: batch.first_line, time }];
            }
            if step.is_some() {
                return Ok(step);
            }
        }
        Ok(None)
    }
}

/// What became of a plan.
enum Followed {
    Step(Step),
    Done,
    /// What comes next was given up; so many lines of the stream were given before.
    GivenUp(u64),
}

enum Sought {
    Found,
    NotYet,
    WouldBlock,
}

impl JournalOrder {
    /// Adds what of an arrival is given up to what is to be told of its stream, and takes it. `reader` is where the
    /// stream's reader is.
    fn note_loss(&mut self, next: &Next, cut: &Cut, reader: Option<Place>) {
        let stream = next.arrival.stream;
        let (before, after) = (next.before.of(stream), next.after.of(stream));
        // Cuts are made between marks; of one that is not, a part is told.
        let taken = &mut self.arrivals.taken[stream.index()];
        let overtaken = reader.filter(|place| place.lines == *taken);
        let begin = overtaken.unwrap_or(Place {
            lines: before.lines.max(cut.begin.lines),
            offset: before.line_start.max(cut.begin.offset),
        });
        let end = (after.lines.min(cut.end.lines), after.line_start.min(cut.end.offset));
        let lost = self.given_up[stream.index()].get_or_insert(Lost {
            gap: Gap { stream, after: LineNumber(begin.lines), lines: 0, bytes: 0, reason: cut.reason() },
            fresh: 0,
            behind: end,
            is_rest: begin.lines > cut.begin.lines && overtaken.is_some(),
        });
        lost.gap.lines += end.0 - begin.lines;
        let bytes = match next.arrival.what {
            What::Mark { .. } => end.1.saturating_sub(begin.offset),
            What::Gap(_) => next.arrival.bytes,
        };
        lost.gap.bytes = lost.gap.bytes.saturating_add(bytes);
        lost.fresh += end.0 - *taken;
        lost.behind = end;
        *taken = end.0;
    }
}

/// The times that matter for lines of a batch.
fn times_of(times: &[LineTime], first: LineNumber, lines: u64) -> Vec<LineTime> {
    let last = LineNumber(first.0 + lines - 1);
    let begin = times.partition_point(|time| time.from <= first).saturating_sub(1);
    times[begin..].iter().take_while(|time| time.from <= last).copied().collect()
}
