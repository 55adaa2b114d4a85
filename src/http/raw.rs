//! `GET /api/job_runs/{id}/logs/{stdout,stderr}/raw`: a log as it is, byte for byte.
//!
//! Of a run that goes on, what is there when it is asked for. Once the run is over the bytes cannot change, so they
//! have a strong `ETag`. What is given up in the middle of a log is left out.

use std::io;
use std::ops::Range;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    IF_NONE_MATCH, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};

use super::App;
use super::params::{LogPath, Params, path, run_id};
use super::problem::Refusal;
use crate::error::LogError;
use crate::line::{ByteOffset, LineNumber, Stream as LogStream};
use crate::run::JobRunId;
use crate::store::{LogStore, Start};

/// How much is read at once.
const PIECE_BYTES: u64 = 256 * 1024;

/// The handler.
pub(super) async fn bytes(
    State(app): State<App>,
    parts: LogPath,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (id, name) = path(parts)?;
    let Some(log) = LogStream::BOTH.into_iter().find(|log| log.as_str() == name) else {
        return Err(Refusal::not_found(format!("a run has no file {name:?}: it has stdout and stderr")));
    };
    let id = run_id(&id)?;
    let (since, lines) = (params.number("since")?, params.number("lines")?);
    let asked = id.clone();
    let window = app.blocking(move |store| window(store, &asked, log, since, lines)).await?;

    let length = window.length();
    let mut answer = HeaderMap::new();
    let mut put = |name: HeaderName, value: String| {
        if let Ok(value) = value.try_into() {
            answer.insert(name, value);
        }
    };
    put(CACHE_CONTROL, "no-cache".to_owned());
    put(ACCEPT_RANGES, "bytes".to_owned());
    if let Some(tag) = &window.tag {
        put(ETAG, tag.clone());
        if text_of(&headers, &IF_NONE_MATCH).is_some_and(|wanted| names(wanted, tag)) {
            return Ok((StatusCode::NOT_MODIFIED, answer).into_response());
        }
    }
    put(CONTENT_TYPE, "text/plain; charset=utf-8".to_owned());
    put(CONTENT_DISPOSITION, format!("attachment; filename=\"{id}.{log}.log\""));

    // A part is of use only beside the other parts of the same bytes.
    // More may have been left out since the first of them was given; who can't say which it was gets all.
    let same_bytes = text_of(&headers, &IF_RANGE)
        .map_or(window.given_up.is_none(), |tag| window.tag.as_deref() == Some(tag));
    let wanted = text_of(&headers, &RANGE).filter(|_| same_bytes);
    let (status, part) = match wanted.map_or(Asked::Whole, |range| asked_range(range, length)) {
        Asked::Whole => (StatusCode::OK, 0..length),
        Asked::Part(part) => {
            put(CONTENT_RANGE, format!("bytes {}-{}/{length}", part.start, part.end - 1));
            (StatusCode::PARTIAL_CONTENT, part)
        }
        Asked::Nothing => return Err(Refusal::range(length)),
    };
    put(CONTENT_LENGTH, (part.end - part.start).to_string());
    // What can't be given at all is said with a status.
    let (first, rest) = match window.part(part) {
        parts if parts.iter().all(Range::is_empty) => (Bytes::new(), parts),
        parts => piece(&app, &id, log, parts).await?,
    };
    let body = stream::once(async { Ok(first) }).chain(pieces(app, id, log, rest));
    Ok((status, answer, Body::from_stream(body)).into_response())
}

/// Which bytes of the file a request is about.
struct Window {
    bytes: Range<u64>,
    /// The part of them that is given up.
    given_up: Option<Range<u64>>,
    /// Set when the bytes can't change any more.
    tag: Option<String>,
}

impl Window {
    /// The bytes before what is given up, and those behind it.
    fn both(&self) -> [Range<u64>; 2] {
        let Range { start, end } = self.bytes;
        let out = self.given_up.clone().unwrap_or(end..end);
        [start..out.start.clamp(start, end), out.end.clamp(start, end)..end]
    }

    fn length(&self) -> u64 {
        self.both().iter().map(|part| part.end - part.start).sum()
    }

    /// Where a part of what there is lies in the file.
    fn part(&self, part: Range<u64>) -> [Range<u64>; 2] {
        let [before, behind] = self.both();
        let first = before.end - before.start;
        let place = |at: u64| before.start + at.min(first);
        let place_behind = |at: u64| behind.start + at.saturating_sub(first);
        [place(part.start)..place(part.end), place_behind(part.start)..place_behind(part.end)]
    }
}

fn window(
    store: &dyn LogStore,
    id: &JobRunId,
    log: LogStream,
    since: Option<u64>,
    lines: Option<u64>,
) -> Result<Window, LogError> {
    // First the run: what is appended after this is not in the answer, and an end that comes after this gives no tag.
    let run = store.run(id)?;
    let end_of_file = run.totals(log).bytes;
    let offset = |start| store.byte_offset(id, log, start).map(|ByteOffset(bytes)| bytes.min(end_of_file));
    let (start, end) = match (since, lines) {
        (None, None) => (0, end_of_file),
        (Some(since), None) => (offset(Start::After(LineNumber(since)))?, end_of_file),
        (None, Some(count)) => (offset(Start::LastLines { count, after: LineNumber::START })?, end_of_file),
        (Some(since), Some(count)) => {
            let first = LineNumber(since);
            let end = match offset(Start::After(first.plus(count))) {
                // The bytes up to the hole are given, and what is missing is said where they end.
                Err(LogError::Corrupt { .. }) => end_of_file,
                end => end?,
            };
            (offset(Start::After(first))?, end)
        }
    };
    let tag = run.state.ended().map(|ended| format!("\"{:x}-{start:x}-{end:x}\"", ended.0));
    let given_up = store.given_up(id, log)?.map(|part| part.start.0..part.end.0);
    let given_up = given_up.filter(|part| part.start < end && start < part.end);
    Ok(Window { bytes: start..end.max(start), given_up, tag })
}

fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether an `If-None-Match` names this tag.
fn names(wanted: &str, tag: &str) -> bool {
    wanted.split(',').map(str::trim).any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
}

#[derive(Debug, PartialEq)]
enum Asked {
    Whole,
    Part(Range<u64>),
    Nothing,
}

/// Reads a `Range` over `length` bytes. What is not one range of bytes is ignored, as RFC 9110 allows.
fn asked_range(header: &str, length: u64) -> Asked {
    let Some((first, last)) = header.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-'))
    else {
        return Asked::Whole;
    };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number that is too large for us is behind every end.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let part = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
        (Some(first), None) if last.is_empty() => first..length,
        (None, Some(count)) if first.is_empty() => length.saturating_sub(count)..length,
        _ => return Asked::Whole,
    };
    if part.start < part.end { Asked::Part(part) } else { Asked::Nothing }
}

/// The bytes in pieces, each read when the connection has room for it.
fn pieces(
    app: App,
    id: JobRunId,
    log: LogStream,
    parts: [Range<u64>; 2],
) -> impl Stream<Item = io::Result<Bytes>> {
    stream::try_unfold((app, id, parts), move |(app, id, parts)| async move {
        if parts.iter().all(Range::is_empty) {
            return Ok(None);
        }
        match piece(&app, &id, log, parts).await {
            Ok((piece, rest)) => Ok(Some((piece, (app, id, rest)))),
            Err(refusal) => {
                // An error makes the server drop what it has not sent: it sends that while it waits.
                tokio::task::yield_now().await;
                Err(io::Error::other(refusal.problem().detail.clone()))
            }
        }
    })
}

/// The first bytes of parts of which one is not empty, and the rest of them.
async fn piece(
    app: &App,
    id: &JobRunId,
    log: LogStream,
    [first, second]: [Range<u64>; 2],
) -> Result<(Bytes, [Range<u64>; 2]), Refusal> {
    let (range, then) = if first.is_empty() { (second, 0..0) } else { (first, second) };
    let length = usize::try_from(PIECE_BYTES.min(range.end - range.start)).unwrap_or(usize::MAX);
    let (asked, offset) = (id.clone(), ByteOffset(range.start));
    let piece = app.blocking(move |store| store.read_bytes(&asked, log, offset, length)).await?;
    if piece.is_empty() {
        let missing = range.end - range.start;
        let what =
            format!("{log} of run {id} ends at byte {offset}, and {missing} bytes behind it are missing");
        return Err(Refusal::internal(&what));
    }
    let rest = range.start + piece.len() as u64..range.end;
    Ok((piece, [rest, then]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        for (header, length, expected) in [
            ("bytes=0-0", 10, Asked::Part(0..1)),
            ("bytes=2-", 10, Asked::Part(2..10)),
            ("bytes=-3", 10, Asked::Part(7..10)),
            ("bytes=-30", 10, Asked::Part(0..10)),
            ("bytes=5-99999999999999999999999", 10, Asked::Part(5..10)),
            ("bytes=10-", 10, Asked::Nothing),
            ("bytes=-0", 10, Asked::Nothing),
            ("bytes=0-", 0, Asked::Nothing),
            ("bytes=5-4", 10, Asked::Whole),
            ("bytes=0-1,3-4", 10, Asked::Whole),
            ("bytes=", 10, Asked::Whole),
            ("bytes=-", 10, Asked::Whole),
            ("bytes=+1-2", 10, Asked::Whole),
            ("lines=0-1", 10, Asked::Whole),
        ] {
            assert_eq!(asked_range(header, length), expected, "{header} of {length}");
        }
    }

    #[test]
    fn what_is_given_up_is_no_part_of_the_bytes() {
        let window = |bytes, given_up| Window { bytes, given_up, tag: None };
        let holey = window(10..100, Some(30..70));
        assert_eq!(holey.length(), 50);
        assert_eq!(holey.part(0..50), [10..30, 70..100]);
        assert_eq!(holey.part(5..15), [15..25, 70..70]);
        assert_eq!(holey.part(15..25), [25..30, 70..75]);
        assert_eq!(holey.part(20..50), [30..30, 70..100]);
        assert_eq!(window(10..100, None).part(1..4), [11..14, 100..100]);
        let [begins_within, ends_within] = [window(40..100, Some(30..70)), window(10..50, Some(30..70))];
        assert_eq!((begins_within.length(), begins_within.part(0..30)), (30, [40..40, 70..100]));
        assert_eq!((ends_within.length(), ends_within.part(0..20)), (20, [10..30, 50..50]));
        assert_eq!(window(40..50, Some(30..70)).length(), 0);
    }

    #[test]
    fn a_tag_is_found_in_a_list() {
        assert!(names("\"a\", W/\"b\"", "\"b\""));
        assert!(names("*", "\"b\""));
        assert!(!names("\"a\"", "\"b\""));
    }
}
