//! An address at which a server can come back.

use std::fmt;
use std::net::SocketAddr;

use tokio::net::TcpSocket;

use super::http::ANY_PORT;

/// An address of this machine for as long as this lives. A port that a server gave back can go to whoever asks for any
/// port, and to a client that tries to connect to it from just that port; one that a socket is bound to can't.
pub(crate) struct HeldAddress {
    pub(crate) address: SocketAddr,
    _socket: TcpSocket,
}

impl HeldAddress {
    pub(crate) fn any() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        // So that a server, which sets the same, can have the port while this socket does not listen.
        socket.set_reuseaddr(true).unwrap();
        socket.bind(ANY_PORT).unwrap();
        Self { address: socket.local_addr().unwrap(), _socket: socket }
    }
}

impl fmt::Display for HeldAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}
