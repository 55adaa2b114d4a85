//! Reads that survive their connection.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::header::{ACCEPT, ETAG, HeaderValue};
use reqwest::{Response, StatusCode, Url};

use super::decode::{Decoded, Decoder};
use super::sse::SseParser;
use super::{Client, ClientEnd, ClientError, ClientEvent, LogQuery, append};
use crate::line::LineNumber;
use crate::run::JobRunId;
use crate::wire::Cursor;

/// How often in a row a read that does not follow tries to get its connection back: some 10 seconds.
const TRIES: u32 = 7;

/// One read of a log, over as many connections as it takes.
pub(super) struct Reader {
    client: Client,
    id: JobRunId,
    query: LogQuery,
    /// Everything up to here was given out, or was not asked for.
    position: Option<LineNumber>,
    /// How many lines were given out.
    delivered: u64,
    connection: Option<Connection>,
    contacted: bool,
    /// That the connection broke was told; it is not told again until an event has come.
    told: bool,
    backoff: Backoff,
    ended: bool,
}

struct Connection {
    body: BoxStream<'static, reqwest::Result<Bytes>>,
    parser: SseParser,
    decoder: Decoder,
}

impl Reader {
    pub(super) fn new(client: Client, id: JobRunId, query: LogQuery) -> Self {
        Self {
            client,
            id,
            query,
            position: None,
            delivered: 0,
            connection: None,
            contacted: false,
            told: false,
            backoff: Backoff::default(),
            ended: false,
        }
    }

    /// The next event; `None` after the end.
    pub(super) async fn next(&mut self) -> Result<Option<ClientEvent>, ClientError> {
        while !self.ended {
            let step = match &mut self.connection {
                Some(connection) => connection.step(&self.client).await,
                None => self.connect().await,
            };
            match step {
                Ok(Step::Event(event, position)) => return Ok(Some(self.give(event, position))),
                Ok(Step::Again) => {}
                Ok(Step::Ended) => return self.ended_before().await.map(Some),
                Err(error) if self.may_try_again(&error) => {
                    self.remember_position();
                    self.connection = None;
                    if !std::mem::replace(&mut self.told, true) {
                        return Ok(Some(ClientEvent::Reconnecting { why: error, next: self.position }));
                    }
                }
                Err(error) => {
                    self.ended = true;
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    fn give(&mut self, event: ClientEvent, position: Option<LineNumber>) -> ClientEvent {
        self.position = position.or(self.position);
        self.told = false;
        self.backoff.failures = 0;
        match &event {
            ClientEvent::Lines(batch) => self.delivered += batch.lines,
            ClientEvent::End(_) => self.ended = true,
            ClientEvent::Gap(_) | ClientEvent::Reconnecting { .. } => {}
        }
        event
    }

    fn may_try_again(&self, error: &ClientError) -> bool {
        let left = self.query.follow || self.backoff.failures < TRIES;
        self.contacted && error.is_transient() && left
    }

    /// An id may have come without an event.
    fn remember_position(&mut self) {
        let Some(connection) = &self.connection else { return };
        let id = std::str::from_utf8(connection.parser.last_id()).ok().and_then(|id| id.parse().ok());
        if let Some(Cursor::After(line)) = id
            && self.position != Some(line)
        {
            // Where the read goes on is part of what is told.
            (self.position, self.told) = (Some(line), false);
        }
        self.backoff.server = connection.parser.retry().or(self.backoff.server);
    }

    async fn connect(&mut self) -> Result<Step, ClientError> {
        if self.contacted {
            self.backoff.wait().await;
        }
        let mut request = self.client.http.get(self.url()).header(ACCEPT, "text/event-stream");
        if let Some(position) = self.position.filter(|_| self.query.follow) {
            request = request.header("Last-Event-ID", Cursor::After(position).to_string());
        }
        let response = self.client.send(request, Some(&self.id)).await?;
        self.contacted = true;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(Step::Ended);
        }
        self.client.expect_type(&response, "text/event-stream")?;
        self.connection = Some(Connection {
            body: response.bytes_stream().boxed(),
            parser: SseParser::default(),
            decoder: Decoder::default(),
        });
        Ok(Step::Again)
    }

    /// A follower goes on by `Last-Event-ID`, which overrides the rest. One that does not follow asks for what is left
    /// of its window.
    fn url(&self) -> Url {
        let query = &self.query;
        let mut url = self.client.url(&[self.id.as_str(), "logs", query.view.as_str()]);
        append(&mut url, "format", Some("json"));
        append(&mut url, "follow", query.follow.then_some(true));
        match self.position {
            Some(position) if !query.follow => {
                append(&mut url, "since", Some(position));
                append(&mut url, "lines", query.lines.map(|lines| lines.saturating_sub(self.delivered)));
            }
            _ => {
                append(&mut url, "since", query.since);
                append(&mut url, "since_time", query.since_time);
                append(&mut url, "lines", query.lines);
            }
        }
        url
    }

    /// The service says that the read has ended already: how the run ended is asked for.
    async fn ended_before(&mut self) -> Result<ClientEvent, ClientError> {
        self.ended = true;
        let run = self.client.run(&self.id).await?;
        Ok(ClientEvent::End(ClientEnd::Complete(run.completion())))
    }
}

enum Step {
    /// An event, and where to go on behind it.
    Event(ClientEvent, Option<LineNumber>),
    Again,
    /// There is nothing to connect for.
    Ended,
}

impl Connection {
    async fn step(&mut self, client: &Client) -> Result<Step, ClientError> {
        loop {
            match self.decoder.ready.pop_front() {
                Some(Decoded::Event(event, position)) => return Ok(Step::Event(event, position)),
                Some(Decoded::Shutdown) => {
                    return Err(client.unavailable(503, "it is shutting down".to_owned()));
                }
                Some(Decoded::Failed(problem)) => return Err(client.problem(*problem, None)),
                None => {}
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.take(&bytes).map_err(|what| client.protocol(what))?,
                Some(Err(error)) => return Err(client.network(error)),
                None => return Err(client.unreachable("the connection ended before the log did")),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.parser.push(bytes);
        while let Some(event) = self.parser.next().map_err(|error| error.to_string())? {
            self.decoder.event(event)?;
        }
        self.decoder.flush();
        Ok(())
    }
}

/// The bytes of a log, over as many connections as it takes.
pub(super) struct Raw {
    client: Client,
    id: JobRunId,
    url: Url,
    /// Whether the window stays where it is.
    resumable: bool,
    /// The name of these bytes, if they can't change.
    tag: Option<HeaderValue>,
    body: BoxStream<'static, reqwest::Result<Bytes>>,
    given: u64,
    backoff: Backoff,
}

impl Raw {
    pub(super) async fn open(
        client: Client,
        id: JobRunId,
        url: Url,
        resumable: bool,
    ) -> Result<Self, ClientError> {
        let response = Self::request(&client, &id, &url, 0, None).await?;
        let tag = response.headers().get(ETAG).cloned();
        let resumable = resumable || tag.is_some();
        let (body, given) = (response.bytes_stream().boxed(), 0);
        Ok(Self { client, id, url, resumable, tag, body, given, backoff: Backoff::default() })
    }

    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let mut error = match self.body.next().await {
                Some(Ok(bytes)) => {
                    self.given += bytes.len() as u64;
                    self.backoff.failures = 0;
                    return Ok(Some(bytes));
                }
                None => return Ok(None),
                Some(Err(error)) => self.client.network(error),
            };
            while self.resumable && error.is_transient() && self.backoff.failures < TRIES {
                self.backoff.wait().await;
                let (client, tag) = (&self.client, self.tag.as_ref());
                match Self::request(client, &self.id, &self.url, self.given, tag).await {
                    Ok(response) => {
                        self.body = response.bytes_stream().boxed();
                        break;
                    }
                    Err(next) => error = next,
                }
            }
            if !self.resumable || !error.is_transient() || self.backoff.failures >= TRIES {
                return Err(error);
            }
        }
    }

    async fn request(
        client: &Client,
        id: &JobRunId,
        url: &Url,
        from: u64,
        tag: Option<&HeaderValue>,
    ) -> Result<Response, ClientError> {
        let response = client.send(client.raw_request(url, from, tag), Some(id)).await?;
        if from > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(client.protocol("it does not give a part of a log"));
        }
        client.expect_type(&response, "text/plain")?;
        Ok(response)
    }
}

/// The wait before a reconnect: 100 ms, doubling up to 5 s; what the server asks for in place of the 100 ms.
/// Up to half as much again is added at random, so that the followers of a service that restarts come spread out.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
    server: Option<Duration>,
    jitter: RandomState,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const MOST: Duration = Duration::from_secs(5);
    /// The most that a server can ask for.
    const MOST_FOR_SERVER: Duration = Duration::from_secs(60);

    async fn wait(&mut self) {
        let delay = self.delay();
        self.failures = self.failures.saturating_add(1);
        let share = self.jitter.hash_one(self.failures) % 512;
        tokio::time::sleep(delay + delay * u32::try_from(share).unwrap_or(0) / 1024).await;
    }

    fn delay(&self) -> Duration {
        let first = self.server.map_or(Self::FIRST, |delay| delay.min(Self::MOST_FOR_SERVER));
        let doubled = first.saturating_mul(1 << self.failures.min(16));
        doubled.min(Self::MOST.max(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_seconds_and_never_fall_below_what_the_server_asks() {
        let delay = |failures, server| Backoff { failures, server, ..Backoff::default() }.delay().as_millis();
        assert_eq!([0, 1, 2, 6, 99].map(|n| delay(n, None)), [100, 200, 400, 5000, 5000]);
        let asked = Some(Duration::from_secs(7));
        assert_eq!([delay(0, asked), delay(5, asked)], [7000, 7000]);
        assert_eq!(delay(0, Some(Duration::MAX)), 60_000);
    }
}
