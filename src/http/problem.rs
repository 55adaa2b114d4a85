//! Errors as `application/problem+json` (RFC 9457), and which status each of the store's errors is.

use std::io;

use axum::http::header::{CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use rustix::io::Errno;

use crate::error::LogError;
use crate::run::InvalidId;
use crate::wire::Problem;

/// A request that is not done, and why.
#[derive(Debug)]
pub(super) struct Refusal(Box<Answer>);

#[derive(Debug)]
struct Answer {
    problem: Problem,
    headers: HeaderMap,
}

impl Refusal {
    fn new(status: StatusCode, kind: &str, detail: impl Into<String>) -> Self {
        let problem = Problem {
            kind: kind.to_owned(),
            title: status.canonical_reason().unwrap_or_default().to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            parameter: None,
            tombstone: None,
        };
        Self(Box::new(Answer { problem, headers: HeaderMap::new() }))
    }

    fn with_header(mut self, name: axum::http::HeaderName, value: HeaderValue) -> Self {
        self.0.headers.insert(name, value);
        self
    }

    pub(super) fn bad_parameter(name: &str, detail: impl Into<String>) -> Self {
        let mut refusal = Self::new(StatusCode::BAD_REQUEST, "bad-parameter", detail);
        refusal.0.problem.parameter = Some(name.to_owned());
        refusal
    }

    pub(super) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad-request", detail)
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub(super) fn method() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method-not-allowed",
            "what is here does not know this method",
        )
    }

    pub(super) fn unauthorized() -> Self {
        let detail = "this service wants its token as `Authorization: Bearer <token>`";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
            .with_header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
    }

    pub(super) fn foreign_host(host: &str) -> Self {
        let detail = format!(
            "this service listens on loopback: it goes by localhost, 127.0.0.1 and [::1], not {host:?}"
        );
        Self::new(StatusCode::FORBIDDEN, "foreign-host", detail)
    }

    pub(super) fn foreign_origin() -> Self {
        let detail = "only pages of this service may ask it to change something";
        Self::new(StatusCode::FORBIDDEN, "foreign-origin", detail)
    }

    /// 416: the range asked for has no byte in these `length` bytes.
    pub(super) fn range(length: u64) -> Self {
        let detail = format!("the range has no byte in it: there are {length} bytes");
        let value = HeaderValue::try_from(format!("bytes */{length}"));
        let refusal = Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "range-not-satisfiable", detail);
        match value {
            Ok(value) => refusal.with_header(CONTENT_RANGE, value),
            Err(_) => refusal,
        }
    }

    pub(super) fn internal(error: &dyn std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string())
    }

    /// The same trouble as 503: it is the service that is not ready, whatever a single request would be told.
    pub(super) fn unavailable(mut self) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        self.0.problem.status = status.as_u16();
        self.0.problem.title = status.canonical_reason().unwrap_or_default().to_owned();
        self
    }

    /// What a client is told, in place of a response or as the data of an `error` event.
    pub(super) fn problem(&self) -> &Problem {
        &self.0.problem
    }
}

impl From<InvalidId> for Refusal {
    fn from(error: InvalidId) -> Self {
        Self::bad_parameter("job_run_id", error.to_string())
    }
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        let detail = error.to_string();
        match error {
            // Nobody here knows the id. It may have been evicted so long ago that its tombstone is gone too.
            LogError::NotFound { .. } => Self::not_found(detail),
            // It was here and will not come back: a client must not try again.
            LogError::Evicted(tombstone) => {
                let mut refusal = Self::new(StatusCode::GONE, "evicted", detail);
                refusal.0.problem.tombstone = Some(*tombstone);
                refusal
            }
            // The caller's mistake, and which one.
            LogError::InvalidId(error) => Self::from(error),
            LogError::InvalidParameter { name, .. } => Self::bad_parameter(name, detail),
            // The run is in another state than the caller takes it to be in.
            LogError::AlreadyExists { .. } => Self::new(StatusCode::CONFLICT, "already-exists", detail),
            LogError::Finished { .. } => Self::new(StatusCode::CONFLICT, "finished", detail),
            LogError::Unfinished { .. } => Self::new(StatusCode::CONFLICT, "unfinished", detail),
            LogError::Unsupported { .. } => Self::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail),
            // Passes: a restart, another process that lets go of the folder, an index that is being rebuilt.
            LogError::Closed => Self::passing("shutting-down", detail),
            LogError::InUse { .. } => Self::passing("in-use", detail),
            LogError::Index { .. } => Self::passing("index", detail),
            // A disk that is full may have room again; one that is broken is for somebody to look at.
            LogError::Io { .. } if error.is_disk_full() => Self::passing("disk-full", detail),
            LogError::Io { ref source, .. } if is_passing(source) => Self::passing("busy", detail),
            LogError::Io { .. } => Self::logged("io", detail),
            LogError::Corrupt { .. } => Self::logged("corrupt", detail),
            // Holes are events of a stream; one here is a mistake of ours.
            LogError::Gap(_) => Self::logged("gap", detail),
            // What the store behind says, in its meaning, with the words of all on the way.
            LogError::Inner { source, .. } => {
                let mut refusal = Self::from(*source);
                refusal.0.problem.detail = detail;
                refusal
            }
        }
    }
}

impl Refusal {
    fn passing(kind: &str, detail: String) -> Self {
        tracing::warn!(kind, detail, "a request has to be tried again");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail)
            .with_header(RETRY_AFTER, HeaderValue::from_static("1"))
    }

    fn logged(kind: &str, detail: String) -> Self {
        tracing::error!(kind, detail, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, kind, detail)
    }
}

/// Whether the system had no more of what others give back: handles of files, or memory.
fn is_passing(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN))
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Answer { problem, headers } = *self.0;
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        (status, headers, [(CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}
