//! `GET /api/job_runs/{id}/logs/{stdout,stderr,all}`: a read of the store as Server-Sent Events.
//!
//! The body pulls: the next lines are read when the connection has room for them. A client that is slow, or has
//! stopped reading, holds its place in the log and nothing else.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, Sleep};

use super::App;
use super::params::{LogPath, Params, path, run_id, wrong};
use super::problem::Refusal;
use super::sse::{Format, Frames};
use crate::error::LogError;
use crate::line::{LineNumber, UnixMicros, View};
use crate::meter::Follower;
use crate::run::JobRunId;
use crate::store::{LogStore, ReadEvent, ReadOptions, ReadStream, Start};
use crate::wire::Cursor;

/// Frames that are there already are put together up to this size, and then sent; nothing waits for more to come.
const CHUNK_BYTES: usize = 64 * 1024;

/// The most text that is turned into frames at once. `benches/sse.rs`, on a busy machine with 2 cores: 8 to 9
/// million lines a second with 128 KiB, 5 to 8 with 256 and 3 to 4 with 64, all of them in memory beforehand.
const BATCH_BYTES: usize = 128 * 1024;

/// The handler.
pub(super) async fn events(
    State(app): State<App>,
    parts: LogPath,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (id, view) = path(parts)?;
    let Ok(view) = view.parse::<View>() else {
        return Err(Refusal::not_found(format!("a run has no log {view:?}: it has stdout, stderr and all")));
    };
    let id = run_id(&id)?;
    let Some(Request { read, format, window }) = request(view, &params, &headers)? else {
        // The client has seen the end. This is the one answer that stops a browser from asking again.
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let follows = read.follow;
    let by_url = matches!(read.start, Start::After(_));
    let (events, at) = app.blocking(move |store| open(store, &id, read, window)).await?;
    let options = app.options();
    let mut body = Frames::new(view, format, options.retry, at);
    if !by_url {
        body.tell_position();
    }
    Ok((
        [
            (CONTENT_TYPE, "text/event-stream"),
            (CACHE_CONTROL, "no-cache, no-transform"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ],
        Body::from_stream(EventStream::new(events, body, options.heartbeat, follows)),
    )
        .into_response())
}

/// Opens a read, and tells the position that it starts behind if that is known.
///
/// A start that is counted from the end, or found by a time, is turned into a position first: a client that is cut
/// off before the first line can go on from there. Not where lines come with their times and no more is waited for: the
/// last lines are those then whose times are known, and a position counts the ones behind them too.
fn open(
    store: &dyn LogStore,
    id: &JobRunId,
    mut read: ReadOptions,
    window: Option<Window>,
) -> Result<(ReadStream, Option<LineNumber>), LogError> {
    let counts_marks = !read.follow && read.times && matches!(read.start, Start::LastLines { .. });
    if !counts_marks && !matches!(read.start, Start::After(_)) {
        match store.position(id, read.view, read.start) {
            Ok(position) => read.start = Start::After(position),
            // Whether that is an error is for the read to say: a follower waits.
            Err(LogError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let at = if let Start::After(line) = read.start { Some(line) } else { None };
    if let (Some(window), Some(seen)) = (window, at) {
        match store.position(id, read.view, Start::Since(window.since)) {
            Ok(begin) => read.limit = Some(begin.plus(window.lines).0.saturating_sub(seen.0)),
            Err(LogError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((store.read(id, read)?, at))
}

/// What a request asks for.
#[derive(Debug, PartialEq)]
struct Request {
    read: ReadOptions,
    format: Format,
    /// What the URL asked for, where its client has seen some of it.
    window: Option<Window>,
}

/// So many lines from a moment on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    since: UnixMicros,
    lines: u64,
}

/// Reads a request; `None` if its client has seen the end already.
///
/// A browser reconnects with the URL it had and a `Last-Event-ID`, so that takes the place of where the URL starts.
/// How much it asks for then means what is left of it: with `since` and `lines`, up to the same last line as
/// before, and so with `since_time`; with `lines` alone, which counted back from an end that may have moved, at most as many again; with
/// `follow`, everything, since `lines` was about the backlog of the first connection.
fn request(view: View, params: &Params, headers: &HeaderMap) -> Result<Option<Request>, Refusal> {
    let follow = params.flag("follow")?;
    let since = params.number("since")?;
    let lines = params.number("lines")?;
    let since_time = params
        .parsed::<UnixMicros>("since_time", "expected an RFC 3339 time such as 2026-01-31T10:42:00Z")?;
    let format = match params.text("format")? {
        None | Some("text") => Format::Text,
        Some("json") => Format::Json,
        Some(text) => return Err(wrong("format", text, "expected text or json")),
    };
    if since.is_some() && since_time.is_some() {
        return Err(Refusal::bad_parameter(
            "since_time",
            "since_time and since both say where to start: give one",
        ));
    }
    if follow && lines.is_some() && since_time.is_some() {
        let detail = "lines limits a backlog that is counted from its end, and since_time says where it starts: \
                      with follow, give one";
        return Err(Refusal::bad_parameter("lines", detail));
    }
    let (start, limit) = match last_event_id(headers)? {
        Some(Cursor::Ended(_)) => return Ok(None),
        Some(Cursor::After(seen)) => {
            let left = |lines: u64| match since {
                Some(since) => since.saturating_add(lines).saturating_sub(seen.0),
                None => lines,
            };
            (Start::After(seen), lines.filter(|_| !follow).map(left))
        }
        None => {
            let after = LineNumber(since.unwrap_or(0));
            match (since_time, lines) {
                (Some(time), lines) => (Start::Since(time), lines),
                (None, Some(count)) if follow || since.is_none() => (Start::LastLines { count, after }, None),
                (None, lines) => (Start::After(after), lines),
            }
        }
    };
    let resumes = matches!(start, Start::After(_));
    let window = since_time.zip(lines).filter(|_| resumes).map(|(since, lines)| Window { since, lines });
    let times = format == Format::Json;
    let read =
        ReadOptions { start, limit, follow, times, batch_bytes: BATCH_BYTES, ..ReadOptions::new(view) };
    Ok(Some(Request { read, format, window }))
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<Cursor>, Refusal> {
    const NAME: &str = "Last-Event-ID";
    let Some(value) = headers.get(NAME) else { return Ok(None) };
    let text = String::from_utf8_lossy(value.as_bytes());
    // A browser that has seen no id yet sends none, others send an empty one.
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse() {
        Ok(cursor) => Ok(Some(cursor)),
        Err(_) => Err(wrong(NAME, &text, "expected a line number, as in an event's id")),
    }
}

/// The body: frames as the read gives events, and a comment when it gives none for long.
struct EventStream {
    events: ReadStream,
    frames: Frames,
    heartbeat: Duration,
    silence: Pin<Box<Sleep>>,
    ended: bool,
    /// Counted while it lives, if it follows.
    _follower: Option<Follower>,
}

impl EventStream {
    fn new(events: ReadStream, frames: Frames, heartbeat: Duration, follows: bool) -> Self {
        let silence = Box::pin(tokio::time::sleep(heartbeat));
        Self { events, frames, heartbeat, silence, ended: false, _follower: follows.then(Follower::new) }
    }

    /// Puts frames together until there are enough, the read ends, or it has nothing more to give at once.
    fn gather(&mut self, context: &mut Context<'_>) {
        while !self.ended && self.frames.len() < CHUNK_BYTES {
            match self.events.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(event))) => {
                    self.frames.event(&event);
                    self.ended = matches!(event, ReadEvent::End(_));
                }
                Poll::Ready(Some(Err(error))) => {
                    self.frames.error(Refusal::from(error).problem());
                    self.ended = true;
                }
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => return,
            }
        }
    }
}

impl Stream for EventStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.gather(context);
        let chunk = if self.frames.len() > 0 {
            self.frames.take()
        } else if self.ended {
            return Poll::Ready(None);
        } else {
            std::task::ready!(self.silence.as_mut().poll(context));
            Bytes::from_static(b":\n\n")
        };
        let next_beat = Instant::now() + self.heartbeat;
        self.silence.as_mut().reset(next_beat);
        Poll::Ready(Some(Ok(chunk)))
    }
}

#[cfg(test)]
mod fuzz;
