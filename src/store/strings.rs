//! The methods of [`LogStore`] that speak of lines and strings, on top of those that are typed.

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use crate::error::LogError;
use crate::line::{LineNumber, Stream, View};
use crate::run::JobRunId;
use crate::store::{LogStore, ReadEnd, ReadEvent, ReadOptions, Start};

/// How to stream the lines of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Keep streaming new lines until the run ends.
    pub follow: bool,
    /// Skip this many lines: start after line N.
    pub since_line: usize,
    /// End after this many lines.
    pub max_lines: Option<usize>,
    /// Start with the last N lines instead.
    pub tail: Option<usize>,
}

impl StreamOptions {
    fn read_options(&self, stream: Stream) -> ReadOptions {
        let after = LineNumber(self.since_line as u64);
        ReadOptions {
            start: match self.tail {
                Some(count) => Start::LastLines { count: count as u64, after },
                None => Start::After(after),
            },
            limit: self.max_lines.map(|lines| lines as u64),
            follow: self.follow,
            ..ReadOptions::new(View::One(stream))
        }
    }
}

/// Appends a line.
pub(super) fn append_line<S: LogStore + ?Sized>(
    store: &S,
    id: &str,
    stream: Stream,
    line: &str,
) -> Result<(), LogError> {
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(b'\n');
    store.append(&id.parse()?, stream, &bytes)
}

/// Streams lines; what keeps it from that is its only item.
pub(super) fn stream_lines<S: LogStore + ?Sized>(
    store: &S,
    id: &str,
    stream: Stream,
    options: StreamOptions,
) -> BoxStream<'static, Result<String, LogError>> {
    let opened = id
        .parse::<JobRunId>()
        .map_err(LogError::from)
        .and_then(|id| store.read(&id, options.read_options(stream)));
    match opened {
        Ok(events) => events.flat_map(|event| stream::iter(strings(event))).boxed(),
        Err(error) => stream::iter([Err(error)]).boxed(),
    }
}

fn strings(event: Result<ReadEvent, LogError>) -> Vec<Result<String, LogError>> {
    match event {
        Ok(ReadEvent::Lines(batch)) => {
            batch.lines().map(|line| Ok(String::from_utf8_lossy(line.text).into_owned())).collect()
        }
        Ok(ReadEvent::Gap { gap, .. }) => vec![Err(LogError::Gap(gap))],
        Ok(ReadEvent::End(ReadEnd::Complete(_) | ReadEnd::Running { .. })) => Vec::new(),
        Ok(ReadEvent::End(ReadEnd::Evicted(tombstone))) => vec![Err(LogError::Evicted(tombstone))],
        Ok(ReadEvent::End(ReadEnd::Shutdown)) => vec![Err(LogError::Closed)],
        Err(error) => vec![Err(error)],
    }
}
