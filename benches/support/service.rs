//! A service in this process, and its clients.

use std::future::pending;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use axum::Router;
use databuild_logs::{LogStore, ServerOptions, listen, serve};
use tokio::runtime::Runtime;

fn any_port() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    let address = listener.local_addr().expect("the listener is bound");
    (listener, address)
}

/// Serves a store for as long as the runtime lives.
pub(crate) fn serve_store(runtime: &Runtime, store: Arc<dyn LogStore>) -> SocketAddr {
    let _entered = runtime.enter();
    let (listener, address) = any_port();
    runtime.spawn(serve(listener, store, ServerOptions::default(), pending()));
    address
}

/// Serves something else in the way that axum itself does.
pub(crate) fn serve_router(runtime: &Runtime, router: Router) -> SocketAddr {
    use axum::serve::ListenerExt;
    let _entered = runtime.enter();
    let (listener, address) = any_port();
    let listener = listener.tap_io(|socket| drop(socket.set_nodelay(true)));
    runtime.spawn(axum::serve(listener, router).into_future());
    address
}

fn send_request(address: SocketAddr, target: &str, version: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("the server listens");
    let request = format!("GET {target} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).expect("the request is sent");
    socket
}

/// Reads a whole answer; gives its length.
pub(crate) fn fetch(address: SocketAddr, target: &str, buffer: &mut [u8]) -> usize {
    let mut socket = send_request(address, target, "1.1");
    let mut received = 0;
    loop {
        match socket.read(buffer).expect("the answer goes on") {
            0 => return received,
            length => received += length,
        }
    }
}

/// Reads a stream of events as it comes, in the order of its bytes, for as long as `take` says so.
pub(crate) fn follow(address: SocketAddr, target: &str, mut take: impl FnMut(&[u8]) -> bool) {
    // An answer of HTTP/1.0 is not cut into chunks.
    let mut socket = send_request(address, target, "1.0");
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = socket.read(&mut buffer) {
        if !take(&buffer[..length]) {
            return;
        }
    }
}
