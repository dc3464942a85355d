//! PROXY protocol version 2 (haproxy.org, "The PROXY protocol", §2.2), no I/O: what a proxy puts before a connection to say
//! whose it is. The information that may follow the addresses (TLVs) is skipped.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// The longest header that is waited for, TLVs included; proxies in use send some hundred bytes.
pub const MAX_HEADER_BYTES: usize = 2048;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// How the text that version 1 was begins.
const VERSION_1: &[u8] = b"PROXY ";
/// Signature, version and command, family, length.
const FIXED_BYTES: usize = 16;
/// Two addresses and two ports.
const INET_BYTES: usize = 12;
const INET6_BYTES: usize = 36;
const UNIX_BYTES: usize = 216;

/// What the start of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed; never said of [`MAX_HEADER_BYTES`] or more.
    Incomplete,
    Header {
        /// Bytes of the header; what follows is the client's.
        consumed: usize,
        /// The client's address. None: the connection is the proxy's own (LOCAL), or its client has no IP address.
        client: Option<SocketAddr>,
    },
}

/// Why a connection is not accepted from a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    #[error("a PROXY protocol header was expected, and the connection does not begin with one")]
    Missing,
    #[error("the header is of PROXY protocol version 1; the proxy must send version 2")]
    Version1,
    #[error("the header is of PROXY protocol version {0}, only 2 is supported")]
    Version(u8),
    #[error("there is no PROXY protocol command {0}")]
    Command(u8),
    #[error("there is no PROXY protocol address family and transport {0:#04x}")]
    Family(u8),
    #[error("the header has {got} bytes of addresses, {needed} are needed")]
    Addresses { got: usize, needed: usize },
    #[error("the header has {0} bytes, the limit is {MAX_HEADER_BYTES}")]
    TooLong(usize),
}

impl ProxyError {
    /// Its name in metrics.
    pub fn label(self) -> &'static str {
        match self {
            ProxyError::Missing => "missing",
            ProxyError::Version1 => "version_1",
            ProxyError::Version(_) => "version",
            ProxyError::Command(_) => "command",
            ProxyError::Family(_) => "family",
            ProxyError::Addresses { .. } => "addresses",
            ProxyError::TooLong(_) => "too_long",
        }
    }
}

/// Looks at all that a connection has sent so far. What is wrong is said at the first byte that tells.
pub fn parse(input: &[u8]) -> Result<Parsed, ProxyError> {
    let signature = input.len().min(SIGNATURE.len());
    if input[..signature] != SIGNATURE[..signature] {
        return match input {
            _ if input.starts_with(VERSION_1) => Err(ProxyError::Version1),
            _ if VERSION_1.starts_with(input) => Ok(Parsed::Incomplete),
            _ => Err(ProxyError::Missing),
        };
    }
    if let Some(&version_and_command) = input.get(12) {
        if version_and_command >> 4 != 2 {
            return Err(ProxyError::Version(version_and_command >> 4));
        }
        if version_and_command & 0xF > 1 {
            return Err(ProxyError::Command(version_and_command & 0xF));
        }
    }
    let Some(&[command, family, high, low]) = input.get(12..FIXED_BYTES) else {
        return Ok(Parsed::Incomplete);
    };
    let is_local = command & 0xF == 0;
    let length = usize::from(u16::from_be_bytes([high, low]));
    // Of a connection of the proxy's own nothing else counts, whatever it says.
    let needed = match family {
        _ if is_local => 0,
        0x00 => 0,
        0x11 | 0x12 => INET_BYTES,
        0x21 | 0x22 => INET6_BYTES,
        0x31 | 0x32 => UNIX_BYTES,
        other => return Err(ProxyError::Family(other)),
    };
    if length < needed {
        return Err(ProxyError::Addresses { got: length, needed });
    }
    let consumed = FIXED_BYTES + length;
    if consumed > MAX_HEADER_BYTES {
        return Err(ProxyError::TooLong(consumed));
    }
    let Some(addresses) = input.get(FIXED_BYTES..consumed) else { return Ok(Parsed::Incomplete) };
    let client = match needed {
        INET_BYTES => client::<4, 8>(addresses).map(|(ip, port)| (Ipv4Addr::from(ip), port).into()),
        INET6_BYTES => client::<16, 32>(addresses).map(|(ip, port)| (Ipv6Addr::from(ip), port).into()),
        _ => None,
    };
    Ok(Parsed::Header { consumed, client })
}

/// The source address, and the source port, which comes after both addresses.
fn client<const ADDRESS: usize, const PORT_AT: usize>(addresses: &[u8]) -> Option<([u8; ADDRESS], u16)> {
    let ip = *addresses.first_chunk::<ADDRESS>()?;
    let port = *addresses.get(PORT_AT..)?.first_chunk::<2>()?;
    Some((ip, u16::from_be_bytes(port)))
}

#[cfg(test)]
mod tests;
