//! The server: accepts connections, and at the shutdown lets each of them come to its end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt;

use super::{App, ServerOptions};
use crate::store::LogStore;

/// Connections that may wait to be accepted: when a service restarts, all its followers come back at once.
const BACKLOG: u32 = 4096;

/// How long a connection may stay without a request, or take to send the head of one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Opens a listener that bears every follower reconnecting at once.
///
/// # Errors
///
/// What the system says: that the address is in use, or may not be used.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A future that is done when the process gets TERM or INT; both are caught from this call on.
///
/// # Errors
///
/// What the system says.
pub fn stop_signal() -> io::Result<impl Future<Output = ()> + Send> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// Serves the store until `shutdown` is done.
///
/// Then nothing new is accepted, the store is closed, and with it every open stream ends with
/// `event: shutdown`; connections have [`ServerOptions::drain`] to finish, and are dropped after that.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if the listener is not on loopback and there is no token; else what the system
/// says of the listener, or the store of being closed.
pub async fn serve(
    listener: TcpListener,
    store: Arc<dyn LogStore>,
    mut options: ServerOptions,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && options.token.is_none() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("listening on {address}, which others can reach, needs a token"),
        ));
    }
    options.loopback_hosts_only |= address.ip().is_loopback();
    let drain = options.drain;
    let app = App::new(Arc::clone(&store), options);
    let (closing, closed) = watch::channel(());

    let mut connections = accept_until(shutdown, listener, &app.router(), &closed).await;

    app.shared.closing.store(true, Ordering::Relaxed);
    let closing_store = tokio::task::spawn_blocking(move || store.close());
    closing.send_replace(());
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout_at(Instant::now() + drain, all_ended).await.is_err() {
        tracing::warn!(connections = connections.len(), "dropping connections that did not end in time");
        connections.shutdown().await;
    }
    closing_store.await?.map_err(io::Error::other)
}

async fn accept_until(
    shutdown: impl Future<Output = ()>,
    listener: TcpListener,
    router: &Router,
    closed: &watch::Receiver<()>,
) -> JoinSet<()> {
    let mut shutdown = pin!(shutdown);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut shutdown => return connections,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, router.clone(), closed.clone()));
                }
                Err(error) => accept_failed(&error).await,
            },
        }
    }
}

/// A connection that was gone before it was accepted is nothing; without a free file descriptor, accepting again at
/// once would fail at once.
async fn accept_failed(error: &io::Error) {
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        tracing::warn!(%error, "accepting a connection");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn connection(socket: TcpStream, router: Router, mut closed: watch::Receiver<()>) {
    // An event is a small write that somebody waits for.
    drop(socket.set_nodelay(true));
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        router.clone().oneshot(Request::from(request.map(axum::body::Body::new)))
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(socket), service)
    );
    let ended = tokio::select! {
        ended = &mut connection => ended,
        _ = closed.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
