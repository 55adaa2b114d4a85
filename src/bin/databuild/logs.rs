//! `databuild logs`: shows the log of a run.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use databuild_logs::{
    Batch, ClientEnd, ClientEvent, Completion, GapNotice, JobRunId, LineNumber, LogQuery, StateKind, Stream,
    UnixMicros, View,
};
use futures_util::{FutureExt, StreamExt};

use crate::args::{LogFormat, LogsArgs, Tail};
use crate::failure::{Code, Failure};
use crate::locate::{Located, RunName, locate};
use crate::printing::{Format, Printer, Style, Terminal, byte_count, gap, note, outcome, printable, status};
use crate::settings::{Settings, runtime};
use crate::source::Source;
use crate::stop;

/// How long a connection may be broken before it is asked whether the service is away, and from then on how often.
const AWAY: Duration = Duration::from_secs(1);

/// How long the next piece of a hole is waited for.
const NEXT_PIECE: Duration = Duration::from_millis(500);

/// Shows the log of a run; the exit code is the run's if that is asked for.
pub(crate) fn run(args: LogsArgs, settings: &Settings) -> Result<ExitCode, Failure> {
    let request = Request::check(args, settings)?;
    runtime()?.block_on(show(&request, settings))
}

async fn show(request: &Request, settings: &Settings) -> Result<ExitCode, Failure> {
    stop::on_interrupt()?;
    if request.query.follow {
        stop::on_closed_output();
    }
    let Located { source, id, started_at } = locate(settings, &request.name, request.wait).await?;
    let printer = Printer::to_stdout(request.format);
    let viewer = Viewer { source, id, started_at, printer, holes: [None, None], told_away: false };
    let end = match request.bytes_of() {
        Some(stream) => viewer.copy(stream, &request.query).await?,
        None => viewer.print(&request.query, settings).await?,
    };
    request.conclude(end)
}

/// What is asked for, checked.
struct Request {
    name: RunName,
    query: LogQuery,
    format: Format,
    wait: bool,
    exit_status: bool,
}

impl Request {
    fn check(args: LogsArgs, settings: &Settings) -> Result<Self, Failure> {
        let view = match (args.view.stderr, args.view.all) {
            (_, true) => View::All,
            (true, _) => View::STDERR,
            _ => View::STDOUT,
        };
        let color = settings.color(&io::stdout())?;
        let format = match args.output {
            LogFormat::Json => Format::Json,
            LogFormat::Raw => Format::Raw,
            LogFormat::Text => Format::Text(Style {
                timestamps: args.timestamps,
                stream_names: view == View::All,
                color_stderr: color && view == View::All,
                terminal: Terminal::of_stdout(color),
            }),
        };
        let lines = match args.tail {
            Tail::All => None,
            Tail::Lines(count) => Some(count),
        };
        let since = args.since_line;
        Ok(Self {
            name: RunName::parse(&args.run)?,
            query: LogQuery { follow: args.follow, since, lines, ..LogQuery::new(view) },
            format,
            wait: args.follow && !args.no_wait,
            exit_status: args.exit_status,
        })
    }

    /// The stream whose bytes are copied as they are, without looking at lines.
    fn bytes_of(&self) -> Option<Stream> {
        match (self.format, self.query.view, self.query.follow) {
            (Format::Raw, View::One(stream), false) => Some(stream),
            _ => None,
        }
    }

    fn conclude(&self, End { id, completion }: End) -> Result<ExitCode, Failure> {
        if self.query.follow {
            note(outcome(&id, &completion));
        }
        if let Some(text) = &completion.note {
            note(format_args!("-- {} --", printable(text)));
        }
        if !self.exit_status {
            return Ok(ExitCode::SUCCESS);
        }
        let code = match (completion.exit_code, completion.signal, completion.state) {
            (_, _, StateKind::Running) => {
                let what = format_args!("run {id} goes on: it has no exit code yet");
                return Err(Failure::new(Code::General, what).hint("--follow waits for its end"));
            }
            (Some(code), ..) => code,
            (None, Some(signal), _) => 128 + signal,
            (None, None, _) => {
                return Err(Failure::new(
                    Code::General,
                    format_args!("the exit code of run {id} is not known"),
                ));
            }
        };
        // The system keeps the lowest 8 bits, of the job's code as of ours. What failed by another tool's word with a
        // code that has none of these set is no success.
        let code = code.to_le_bytes()[0];
        Ok(ExitCode::from(if completion.state == StateKind::Failed { code.max(1) } else { code }))
    }
}

/// How the run stood when the log had been shown.
struct End {
    id: JobRunId,
    completion: Completion,
}

/// Shows one run.
struct Viewer {
    source: Source,
    id: JobRunId,
    started_at: Option<UnixMicros>,
    printer: Printer,
    /// The hole of each stream that is not told yet: a hole can come in pieces.
    holes: [Option<GapNotice>; 2],
    /// Whether it was told that the service is away, where nobody watches.
    told_away: bool,
}

impl Viewer {
    /// Copies the bytes of a stream.
    async fn copy(mut self, stream: Stream, query: &LogQuery) -> Result<End, Failure> {
        self.copy_window(stream, query.since, query.lines).await?;
        self.printer.flush()?;
        let run = self.source.run(&self.id).await?;
        let lost = run.totals(stream).dropped_bytes;
        if lost > 0 {
            note(format_args!("-- {} of {stream} could not be kept --", byte_count(lost)));
        }
        Ok(End { id: self.id, completion: run.completion() })
    }

    /// Prints lines, and flushes them whenever there is none more to be had at once. A follower whose service stays
    /// away goes on in the folder, if that has the run.
    async fn print(mut self, query: &LogQuery, settings: &Settings) -> Result<End, Failure> {
        let mut events = self.source.read(&self.id, query.clone()).await?;
        // What is left to be read, while the service is away.
        let mut rest: Option<LogQuery> = None;
        loop {
            let event = match events.next().now_or_never() {
                Some(event) => event,
                None => {
                    self.printer.flush()?;
                    let hole = self.holes.iter().any(Option::is_some);
                    tokio::select! {
                        event = events.next() => event,
                        () = tokio::time::sleep(NEXT_PIECE), if hole => {
                            self.tell_holes()?;
                            continue;
                        }
                        folder = self.folder_instead(settings), if rest.is_some() => {
                            self.note(format!("{} does not answer: reading {folder}", self.source))?;
                            self.source = folder;
                            let query = rest.take().unwrap_or_else(|| query.clone());
                            events = self.source.read(&self.id, query).await?;
                            continue;
                        }
                    }
                }
            };
            let Some(event) = event.transpose()? else {
                return Err(Failure::new(Code::General, "the log ended without an end"));
            };
            rest = None;
            if !matches!(event, ClientEvent::Gap(_)) {
                self.tell_holes()?;
            }
            match event {
                ClientEvent::Lines(batch) => self.lines(&batch).await?,
                ClientEvent::Gap(hole) => self.hole(hole)?,
                ClientEvent::Reconnecting { next, .. } => {
                    self.printer.flush()?;
                    status(format_args!("reconnecting to {}", self.source));
                    rest = query.follow.then(|| match next {
                        Some(next) => LogQuery { since: Some(next), lines: None, ..query.clone() },
                        None => query.clone(),
                    });
                }
                ClientEvent::End(end) => {
                    self.printer.flush()?;
                    return self.end(end).await;
                }
            }
        }
    }

    /// Waits until the service does not answer and the folder has the run: then another `databuild logs` would read
    /// that too.
    async fn folder_instead(&mut self, settings: &Settings) -> Source {
        loop {
            tokio::time::sleep(AWAY).await;
            if !self.source.run(&self.id).await.is_err_and(|error| error.none_answers()) {
                continue;
            }
            if let Ok(Some(folder)) = settings.folder().await
                && let Ok(run) = folder.run(&self.id).await
                && self.started_at.is_none_or(|started_at| started_at == run.started_at)
            {
                return folder;
            }
            if !io::stderr().is_terminal() && !std::mem::replace(&mut self.told_away, true) {
                note(format_args!("reconnecting to {}", self.source));
            }
        }
    }

    async fn lines(&mut self, batch: &Batch) -> Result<(), Failure> {
        match (batch.cut, self.printer.is_raw()) {
            (Some(_), true) => {
                let before = LineNumber(batch.first_line.0 - 1);
                self.copy_window(batch.stream, Some(before), Some(1)).await?;
            }
            (Some(cut), false) => {
                self.printer.lines(batch)?;
                let (line, shown, all) = (batch.first_line, batch.bytes.len(), cut.full_bytes);
                self.note(format!(
                    "-- line {line} of {} is cut: {shown} of {all} bytes; `-o raw` has them all --",
                    batch.stream
                ))?;
            }
            (None, _) => self.printer.lines(batch)?,
        }
        Ok(())
    }

    async fn copy_window(
        &mut self,
        stream: Stream,
        since: Option<LineNumber>,
        lines: Option<u64>,
    ) -> Result<(), Failure> {
        let mut pieces = self.source.raw(&self.id, stream, since, lines).await?;
        while let Some(piece) = pieces.next().await {
            self.printer.bytes(&piece?)?;
        }
        Ok(())
    }

    /// Takes a hole, which may be the next piece of the one before.
    fn hole(&mut self, hole: GapNotice) -> Result<(), Failure> {
        let before = &mut self.holes[hole.stream.index()];
        match before {
            Some(all) if all.reason == hole.reason && all.from.plus(all.lines) == hole.from => {
                all.lines += hole.lines;
                all.bytes += hole.bytes;
                Ok(())
            }
            _ => before.replace(hole).map_or(Ok(()), |other| self.note(gap(&other))),
        }
    }

    /// Tells of the holes that have come to their end.
    fn tell_holes(&mut self) -> Result<(), Failure> {
        let holes = std::mem::take(&mut self.holes);
        holes.into_iter().flatten().try_for_each(|hole| self.note(gap(&hole)))
    }

    /// A line on stderr, behind the lines before it.
    fn note(&mut self, line: String) -> Result<(), Failure> {
        self.printer.flush()?;
        note(line);
        Ok(())
    }

    async fn end(self, end: ClientEnd) -> Result<End, Failure> {
        let completion = match end {
            ClientEnd::Complete(completion) => completion,
            ClientEnd::Running { .. } => self.source.run(&self.id).await?.completion(),
            ClientEnd::Evicted(tombstone) => {
                let what = format_args!(
                    "run {} was evicted at {}: {}",
                    tombstone.id, tombstone.evicted_at, tombstone.reason
                );
                return Err(Failure::new(Code::NotFound, what));
            }
        };
        Ok(End { id: self.id, completion })
    }
}
