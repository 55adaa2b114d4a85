//! A server of ours, and a client that sees every byte.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use databuild_logs::{LogStore, Problem, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::sse::{Event, Parser};

pub(crate) const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A server until it is stopped or dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<io::Result<()>>,
}

impl Server {
    pub(crate) async fn start(store: impl LogStore + 'static) -> Self {
        Self::start_with(store, ServerOptions::default()).await
    }

    pub(crate) async fn start_with(store: impl LogStore + 'static, options: ServerOptions) -> Self {
        Self::start_at(ANY_PORT, Arc::new(store), options).await
    }

    pub(crate) async fn start_at(
        address: SocketAddr,
        store: Arc<dyn LogStore>,
        options: ServerOptions,
    ) -> Self {
        let listener = databuild_logs::listen(address).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(databuild_logs::serve(listener, store, options, async {
            drop(stopped.await);
        }));
        Self { address, stop, task }
    }

    /// Shuts down, and tells how that went.
    pub(crate) async fn stop(self) -> io::Result<()> {
        self.stop.send(()).expect("the server runs");
        self.task.await.expect("the server does not panic")
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.request("GET", target, &[]).await
    }

    pub(crate) async fn get_with(&self, target: &str, headers: &[(&str, &str)]) -> Answer {
        self.request("GET", target, headers).await
    }

    /// One request on a connection of its own, and the whole of its answer.
    pub(crate) async fn request(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Answer {
        let mut answering = self.open_as(method, target, headers).await;
        let mut body = Vec::new();
        while let Some(piece) = answering.piece().await {
            body.extend_from_slice(&piece);
        }
        Answer { body, ..answering.answer }
    }

    /// A request whose answer is read bit by bit.
    pub(crate) async fn open(&self, target: &str, headers: &[(&str, &str)]) -> Answering {
        self.open_as("GET", target, headers).await
    }

    async fn open_as(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Answering {
        let mut head = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head += &format!("Host: {}\r\n", self.address);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
        Answering::begin(socket, method == "HEAD").await
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        Parser::default().feed(&self.body)
    }

    /// The problem that this answer is, checked for what every problem has.
    pub(crate) fn problem(&self, status: u16) -> Problem {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let problem: Problem = self.json();
        assert_eq!(problem.status, status);
        assert!(!problem.detail.is_empty() && !problem.title.is_empty());
        problem
    }
}

/// An answer that is still coming.
pub(crate) struct Answering {
    socket: TcpStream,
    pub(crate) answer: Answer,
    unread: Vec<u8>,
    body: BodyLength,
    parser: Parser,
}

enum BodyLength {
    Bytes(usize),
    Chunked,
}

impl Answering {
    async fn begin(socket: TcpStream, head_only: bool) -> Self {
        let answer = Answer { status: 0, headers: Vec::new(), body: Vec::new() };
        let body = BodyLength::Bytes(0);
        let mut this = Self { socket, answer, unread: Vec::new(), body, parser: Parser::default() };
        let end = loop {
            if let Some(end) = this.unread.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end;
            }
            assert!(this.receive().await, "the head of the answer is cut off");
        };
        let head = String::from_utf8(this.unread.drain(..end + 4).collect()).unwrap();
        let mut lines = head.split("\r\n").filter(|line| !line.is_empty());
        this.answer.status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        this.answer.headers = lines
            .map(|line| line.split_once(':').unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
            .collect();
        let length = this.answer.header("content-length").map_or(0, |length| length.parse().unwrap());
        this.body = match this.answer.header("transfer-encoding") {
            Some("chunked") if !head_only => BodyLength::Chunked,
            _ => BodyLength::Bytes(if head_only { 0 } else { length }),
        };
        this
    }

    /// Receives more; false at the end of the connection.
    async fn receive(&mut self) -> bool {
        self.socket.read_buf(&mut self.unread).await.unwrap_or(0) > 0
    }

    /// The next piece of the body; `None` at its proper end.
    pub(crate) async fn piece(&mut self) -> Option<Vec<u8>> {
        self.try_piece().await.expect("the body is cut off")
    }

    /// The next piece of the body; an error if the connection ends before it.
    pub(crate) async fn try_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let piece = match &mut self.body {
                BodyLength::Bytes(0) => return Ok(None),
                BodyLength::Bytes(left) => {
                    let length = self.unread.len().min(*left);
                    *left -= length;
                    (length > 0).then_some(0..length)
                }
                BodyLength::Chunked => chunk(&self.unread),
            };
            if let Some(range) = piece {
                let end = if matches!(self.body, BodyLength::Chunked) { range.end + 2 } else { range.end };
                let bytes = self.unread[range].to_vec();
                self.unread.drain(..end);
                return Ok(Some(bytes).filter(|bytes| !bytes.is_empty()));
            }
            if !self.receive().await {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Reads until there is a further event; the events come as a browser would see them.
    pub(crate) async fn events_until(&mut self, last: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut events = Vec::new();
        while !events.last().is_some_and(&last) {
            let Some(piece) = self.piece().await else { panic!("the stream ended after {events:?}") };
            events.extend(self.parser.feed(&piece));
        }
        events
    }
}

/// Where the data of the first chunk is, if all of it is there.
fn chunk(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let line = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    let length = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
    let start = line + 2;
    (bytes.len() >= start + length + 2).then_some(start..start + length)
}
