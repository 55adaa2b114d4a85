//! The client of a log service: lists runs, and reads their logs without losing or repeating a line, whatever
//! happens to the connection.

mod decode;
mod error;
#[cfg(test)]
mod fuzz;
mod reader;
mod sse;
mod transport;

use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::de::DeserializeOwned;

use crate::line::{LineNumber, Stream, UnixMicros, View};
use crate::retention::{GcReport, GcRequest};
use crate::run::{Completion, JobMetadata, JobRunId, Tombstone};
use crate::store::{Batch, Compression, ReadOptions, RunQuery, Start};
use crate::wire::{Compressed, GapNotice, Problem, RunList};

pub use error::ClientError;

/// How long to wait for a connection, and for the head of an answer on it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection on which nothing comes for this long is dead: the service sends a heartbeat every 15 seconds.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long evicting may take: many large files are removed by one request.
const GC_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// The longest answer that is read into memory: 64 MiB, far above a page of runs.
const MAX_DOCUMENT_BYTES: usize = 64 * 1024 * 1024;

/// A client of one service. Cloning it is cheap; clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
}

/// What to read of a run: the parameters of `GET /api/job_runs/{id}/logs/{view}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogQuery {
    /// One stream or both.
    pub view: View,
    /// Go on with new lines until the run ends, and wait for a run that does not exist yet.
    pub follow: bool,
    /// Skip the lines up to this one.
    pub since: Option<LineNumber>,
    /// Start with the first line that arrived at this moment or later.
    pub since_time: Option<UnixMicros>,
    /// Without `since`, only the last so many lines; with it, at most so many from there. With `follow` it limits
    /// the backlog and not what comes after.
    pub lines: Option<u64>,
}

impl LogQuery {
    /// The whole of what is there now.
    #[must_use]
    pub const fn new(view: View) -> Self {
        Self { view, follow: false, since: None, since_time: None, lines: None }
    }

    /// The same question to a [`LogStore`](crate::LogStore).
    #[must_use]
    pub fn read_options(&self) -> ReadOptions {
        let after = self.since.unwrap_or_default();
        let start = match (self.lines, self.since, self.since_time) {
            (_, None, Some(time)) => Start::Since(time),
            (Some(count), since, _) if since.is_none() || self.follow => Start::LastLines { count, after },
            _ => Start::After(after),
        };
        ReadOptions {
            start,
            limit: self.lines.filter(|_| !self.follow),
            follow: self.follow,
            times: true,
            ..ReadOptions::new(self.view)
        }
    }
}

/// One event of a read.
#[derive(Debug)]
pub enum ClientEvent {
    /// Lines of one stream.
    Lines(Batch),
    /// Lines that could not be kept.
    Gap(GapNotice),
    /// The connection broke, and is being made again; nothing is lost. Told once for every time that it breaks.
    Reconnecting {
        /// What broke it.
        why: ClientError,
        /// The position behind the last line given, where the read goes on; `None` if it has not begun.
        next: Option<LineNumber>,
    },
    /// Nothing comes after this.
    End(ClientEnd),
}

/// Why a read ended.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientEnd {
    /// The run is over, and every line up to the limit was given.
    Complete(Completion),
    /// The run goes on, but the read does not follow.
    Running {
        /// The position behind the last line given: where another read would go on.
        next: LineNumber,
    },
    /// The run was evicted while it was being read.
    Evicted(Box<Tombstone>),
}

impl Client {
    /// A client of the service at this address, such as `http://127.0.0.1:7780`. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// [`ClientError::BadAddress`] or [`ClientError::BadToken`].
    pub fn new(base_url: &str, token: Option<&str>) -> Result<Self, ClientError> {
        let base = parse_base(base_url)
            .map_err(|reason| ClientError::BadAddress { given: base_url.to_owned(), reason })?;
        let mut headers = HeaderMap::new();
        if let Some(token) = token {
            let mut value =
                HeaderValue::try_from(format!("Bearer {token}")).or(Err(ClientError::BadToken))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = reqwest::Client::builder()
            .default_headers(headers)
            .connect_timeout(HEAD_TIMEOUT)
            .read_timeout(SILENCE_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .tcp_nodelay(true)
            .build()
            .map_err(|error| ClientError::BadAddress {
                given: base_url.to_owned(),
                reason: error.to_string(),
            })?;
        Ok(Self { http, base })
    }

    /// The service's address.
    #[must_use]
    pub fn base_url(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// Lists runs, newest first. `cursor` is [`RunList::next`] of the page before, and overrides that of the query.
    ///
    /// # Errors
    ///
    /// As [`ClientError`] says.
    pub async fn runs(&self, query: &RunQuery, cursor: Option<&str>) -> Result<RunList, ClientError> {
        let mut url = self.url(&[]);
        let number = query.cursor.map(|cursor| cursor.0.to_string());
        append(&mut url, "limit", query.limit);
        append(&mut url, "cursor", cursor.or(number.as_deref()));
        append(&mut url, "state", query.state);
        append(&mut url, "partition", query.partition.as_deref());
        append(&mut url, "id_prefix", query.id_prefix.as_deref());
        self.document(url, None).await
    }

    /// What is known of a run at this moment.
    ///
    /// # Errors
    ///
    /// [`ClientError::NotFound`], [`ClientError::Evicted`], or whatever the connection suffers.
    pub async fn run(&self, id: &JobRunId) -> Result<JobMetadata, ClientError> {
        self.document(self.url(&[id.as_str()]), Some(id)).await
    }

    /// Compresses a run that is over, and waits until that is done.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run); [`ClientError::Refused`] if the service can't do it.
    pub async fn compress(&self, id: &JobRunId) -> Result<Compression, ClientError> {
        let request = self.http.post(self.url(&[id.as_str(), "compress"]));
        let response = self.send(request.header(ACCEPT, "application/json"), Some(id)).await?;
        match self.read_document(response).await? {
            Compressed::Done(done) => Ok(done),
            Compressed::Failed(problem) => Err(self.problem(problem, Some(id))),
        }
    }

    /// Has runs evicted. One call evicts no more than [`GcReport::evicted`] says; while there is
    /// [more](GcReport::more), another one goes on.
    ///
    /// # Errors
    ///
    /// As [`ClientError`] says.
    pub async fn gc(&self, request: &GcRequest) -> Result<GcReport, ClientError> {
        let mut url = self.path(&["api", "gc"]);
        append(&mut url, "dry_run", request.dry_run.then_some(true));
        // A limit of less than a second is one, and 0 is none.
        let seconds = request.older_than.map(|age| age.as_secs() + u64::from(age.subsec_nanos() > 0));
        append(&mut url, "older_than", seconds);
        append(&mut url, "max_bytes", request.max_bytes);
        append(&mut url, "keep_last", request.keep_last);
        let asked = self.http.post(url).header(ACCEPT, "application/json").timeout(GC_TIMEOUT);
        let response = self.send_within(GC_TIMEOUT, asked, None).await?;
        self.read_document(response).await
    }

    /// Pins a run, so that it is never evicted, or takes the pin away.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub async fn set_pinned(&self, id: &JobRunId, pinned: bool) -> Result<(), ClientError> {
        let url = self.url(&[id.as_str(), "pin"]);
        let request = if pinned { self.http.put(url) } else { self.http.delete(url) };
        self.send(request, Some(id)).await.map(drop)
    }

    /// Reads a run's log. A connection that breaks is made again, and the read goes on behind the last line it gave:
    /// without end when it follows, for some seconds when it does not. An error is the last item; if it is
    /// the first too, the service was never reached.
    #[must_use]
    pub fn read(
        &self,
        id: &JobRunId,
        query: LogQuery,
    ) -> BoxStream<'static, Result<ClientEvent, ClientError>> {
        let reader = reader::Reader::new(self.clone(), id.clone(), query);
        stream::try_unfold(reader, async |mut reader| {
            let event = reader.next().await?;
            Ok(event.map(|event| (event, reader)))
        })
        .boxed()
    }

    /// The bytes of a stream as they are: from behind line `since`, or the last `lines` lines, or both.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), before the first byte. Later ones are the last item.
    pub async fn raw(
        &self,
        id: &JobRunId,
        stream: Stream,
        since: Option<LineNumber>,
        lines: Option<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, ClientError>>, ClientError> {
        let mut url = self.url(&[id.as_str(), "logs", stream.as_str(), "raw"]);
        append(&mut url, "since", since);
        append(&mut url, "lines", lines);
        // The window must not move under a reconnect: one that is counted from the front stays where it is, and so
        // does any once the run is over.
        let resumable = since.is_some() || lines.is_none();
        let raw = reader::Raw::open(self.clone(), id.clone(), url, resumable).await?;
        Ok(stream::try_unfold(raw, async |mut raw| {
            let bytes = raw.next().await?;
            Ok(bytes.map(|bytes| (bytes, raw)))
        })
        .boxed())
    }

    /// `/api/job_runs` and these segments below the base.
    fn url(&self, segments: &[&str]) -> Url {
        self.path(&[&["api", "job_runs"], segments].concat())
    }

    /// These segments below the base.
    fn path(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    async fn document<T: DeserializeOwned>(&self, url: Url, id: Option<&JobRunId>) -> Result<T, ClientError> {
        let response = self.send(self.http.get(url).header(ACCEPT, "application/json"), id).await?;
        self.read_document(response).await
    }

    async fn read_document<T: DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        self.expect_type(&response, "application/json")?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body)
            .map_err(|error| self.protocol(format!("the answer can't be read: {error}")))
    }

    /// Sends a request and gives the answer if it is a good one.
    async fn send(&self, request: RequestBuilder, id: Option<&JobRunId>) -> Result<Response, ClientError> {
        self.send_within(HEAD_TIMEOUT, request, id).await
    }

    async fn send_within(
        &self,
        time: Duration,
        request: RequestBuilder,
        id: Option<&JobRunId>,
    ) -> Result<Response, ClientError> {
        let answer = tokio::time::timeout(time, transport::send(request)).await;
        let response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.network(error)),
            Err(_) => {
                let waited = format!("no answer within {} seconds", time.as_secs());
                return Err(self.unreachable(io::Error::new(io::ErrorKind::TimedOut, waited)));
            }
        };
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response, id).await) }
    }

    /// What an answer other than 2xx means.
    async fn refusal(&self, response: Response, id: Option<&JobRunId>) -> ClientError {
        let status = response.status();
        if content_type(&response) == "application/problem+json" {
            return match self.body(response).await {
                Ok(body) => match serde_json::from_slice(&body) {
                    Ok(problem) => self.problem(problem, id),
                    Err(error) => {
                        self.protocol(format!("HTTP {status}, whose reason can't be read: {error}"))
                    }
                },
                Err(error) => error,
            };
        }
        match status {
            StatusCode::UNAUTHORIZED => ClientError::Unauthorized { url: self.base_url().to_owned() },
            // A proxy whose service is away.
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                self.unavailable(status.as_u16(), status.canonical_reason().unwrap_or_default().to_owned())
            }
            _ => self.not_ours(format!("it answers HTTP {status}")),
        }
    }

    fn problem(&self, problem: Problem, id: Option<&JobRunId>) -> ClientError {
        let url = self.base_url().to_owned();
        match (problem.status, problem.tombstone, id) {
            (404, _, Some(id)) => ClientError::NotFound { url, id: id.clone() },
            (410, Some(tombstone), _) => ClientError::Evicted(Box::new(tombstone)),
            (401, ..) => ClientError::Unauthorized { url },
            (403 | 409 | 501, ..) => ClientError::Refused { detail: problem.detail },
            (429 | 502..=504, ..) => self.unavailable(problem.status, problem.detail),
            (500.., ..) => ClientError::Failed { url, detail: problem.detail },
            (400, ..) => ClientError::BadParameter { parameter: problem.parameter, detail: problem.detail },
            (status, ..) => self.protocol(format!("HTTP {status}: {}", problem.detail)),
        }
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.network(error))? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_DOCUMENT_BYTES {
                return Err(self.protocol(format!("an answer is longer than {MAX_DOCUMENT_BYTES} bytes")));
            }
        }
        Ok(body)
    }

    fn expect_type(&self, response: &Response, expected: &str) -> Result<(), ClientError> {
        match content_type(response) {
            found if found == expected => Ok(()),
            "" => Err(self.not_ours(format!("it does not say that its answer is {expected}"))),
            found => Err(self.not_ours(format!("it answers with {found}, and {expected} was expected"))),
        }
    }

    fn network(&self, error: reqwest::Error) -> ClientError {
        // What speaks another protocol is reached, and no restart will make it ours.
        match transport::no_http(&error) {
            Some(text) => self.not_ours(format!("it does not speak HTTP ({text})")),
            None => self.unreachable(error.without_url()),
        }
    }

    fn unreachable(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> ClientError {
        ClientError::Unreachable { url: self.base_url().to_owned(), source: source.into() }
    }

    fn unavailable(&self, status: u16, detail: String) -> ClientError {
        ClientError::Unavailable { url: self.base_url().to_owned(), status, detail }
    }

    fn not_ours(&self, what: String) -> ClientError {
        ClientError::NotOurs { url: self.base_url().to_owned(), what }
    }

    fn protocol(&self, what: impl Into<String>) -> ClientError {
        ClientError::Protocol { url: self.base_url().to_owned(), what: what.into() }
    }

    /// A request for the bytes of a log from this one on, of those that had this name.
    fn raw_request(&self, url: &Url, from: u64, tag: Option<&HeaderValue>) -> RequestBuilder {
        let request = self.http.get(url.clone());
        match (from, tag) {
            (0, _) => request,
            (_, None) => request.header(RANGE, format!("bytes={from}-")),
            (_, Some(tag)) => request.header(RANGE, format!("bytes={from}-")).header(IF_RANGE, tag),
        }
    }
}

fn parse_base(given: &str) -> Result<Url, String> {
    let url = Url::parse(given).map_err(|error| format!("{error}; expected http://HOST:PORT"))?;
    match url.scheme() {
        "http" if url.query().is_some() || url.fragment().is_some() => {
            Err("expected http://HOST:PORT, without a query".to_owned())
        }
        "http" => Ok(url),
        "https" => {
            Err("https is not built in; reach the service over http, through a tunnel if need be".to_owned())
        }
        _ => Err("expected http://HOST:PORT".to_owned()),
    }
}

fn append(url: &mut Url, name: &str, value: Option<impl ToString>) {
    if let Some(value) = value {
        url.query_pairs_mut().append_pair(name, &value.to_string());
    }
}

/// The media type of an answer, without parameters; empty if it has none.
fn content_type(response: &Response) -> &str {
    let value =
        response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_none_say_what_would_be_right() {
        for bad in ["", "localhost:7780", "ftp://x", "https://x", "http://", "http://x?y", "unix:/x"] {
            let error = Client::new(bad, None).unwrap_err();
            assert!(
                matches!(&error, ClientError::BadAddress { given, .. } if given == bad),
                "{bad}: {error}"
            );
            assert!(error.to_string().contains("http"), "{error}");
        }
        assert!(matches!(Client::new("http://x", Some("a\nb")), Err(ClientError::BadToken)));
    }

    #[test]
    fn a_base_below_a_path_is_kept() {
        for base in ["http://x/logs", "http://x/logs/"] {
            let client = Client::new(base, None).unwrap();
            assert_eq!(client.url(&["a", "logs", "all"]).as_str(), "http://x/logs/api/job_runs/a/logs/all");
            assert_eq!(client.base_url(), "http://x/logs");
        }
    }

    #[test]
    fn a_query_asks_a_store_the_same_as_a_service() {
        let query = LogQuery::new(View::STDOUT);
        let last = Start::LastLines { count: 5, after: LineNumber(0) };
        let tail = LogQuery { lines: Some(5), ..query.clone() }.read_options();
        assert_eq!((tail.start, tail.limit), (last, Some(5)));
        let since = LogQuery { since: Some(LineNumber(2)), lines: Some(5), ..query.clone() };
        assert_eq!(since.read_options().start, Start::After(LineNumber(2)));
        assert_eq!(since.read_options().limit, Some(5));
        let follow = LogQuery { follow: true, ..since }.read_options();
        assert_eq!(follow.start, Start::LastLines { count: 5, after: LineNumber(2) });
        assert_eq!(follow.limit, None);
    }
}
