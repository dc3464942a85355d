//! Listening sockets: one for each shard on the same address (SO_REUSEPORT), so that the kernel spreads connections.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("the port of {0} is in use by another process")]
    InUse(SocketAddr),
    #[error("cannot listen on {address}: {error}")]
    Other { address: SocketAddr, error: io::Error },
}

/// Listens on an address, once for each shard; gives it with its port as the kernel chose it.
pub fn listen(address: SocketAddr, shards: usize) -> Result<(SocketAddr, Vec<TcpListener>), ListenError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address),
        _ => ListenError::Other { address, error },
    };
    // With SO_REUSEPORT the kernel would share the port with another process of ours without a word: a first socket
    // without it finds out.
    let alone = socket(address, false).map_err(failed)?;
    let mut actual = alone.local_addr().map_err(failed)?.as_socket().unwrap_or(address);
    drop(alone);
    let mut sockets = Vec::with_capacity(shards);
    for _ in 0..shards {
        let socket = socket(actual, true).map_err(failed)?;
        actual = socket.local_addr().map_err(failed)?.as_socket().unwrap_or(actual);
        sockets.push(socket.into());
    }
    Ok((actual, sockets))
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.ip() == IpAddr::from([0; 16]) {
        // `[::]` is IPv4 as well, whatever the system's default.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    // Connections inherit it: a call less for each of them.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn connections_send_without_delay_because_their_listeners_would() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let (bound, listeners) = match listen(address.parse().unwrap(), 1) {
                Ok(listening) => listening,
                // A machine without IPv6.
                Err(_) if address.starts_with('[') => continue,
                Err(error) => panic!("{error}"),
            };
            let _client = TcpStream::connect(bound).unwrap();
            listeners[0].set_nonblocking(false).unwrap();
            let (accepted, _) = listeners[0].accept().unwrap();
            assert!(accepted.nodelay().unwrap(), "{address}");
        }
    }
}
