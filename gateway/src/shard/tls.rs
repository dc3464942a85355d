//! TLS of one connection: bytes of the wire in, bytes of the next layer out, and the other way round. rustls without
//! buffers of its own: records are opened in the shard's read buffer, and only one that is not complete is held.

use std::io;

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::{Error, HandshakeKind};

use crate::listeners::Settings;

/// The most that is held of what is not complete: a record, or a handshake message over several (a long chain of
/// certificates).
const MAX_HELD_BYTES: usize = 32 * 1024;
/// Plaintext of a record, and what a record adds to it at most (RFC 8446 §5.2, RFC 5246 §6.2.3).
const RECORD_BYTES: usize = 16 * 1024;
const RECORD_OVERHEAD: usize = 64;

pub struct Tls {
    connection: UnbufferedServerConnection,
    /// What was received and is not done with; rustls wants to see it again, unchanged, at every call.
    held: Vec<u8>,
    /// It is over: rustls is not asked any more, which would have it look at the same bytes again.
    has_failed: bool,
}

/// What has come of received bytes.
#[derive(Debug, PartialEq)]
pub enum Received {
    Open,
    /// The peer has said that it sends no more.
    PeerClosed,
    Failed(Error),
}

impl Tls {
    pub fn new(settings: &Settings) -> Result<Tls, Error> {
        let config = settings.tls.clone().ok_or(Error::General("no TLS is configured".to_owned()))?;
        Ok(Tls { connection: UnbufferedServerConnection::new(config)?, held: Vec::new(), has_failed: false })
    }

    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    pub fn is_resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// The device's own certificate, DER.
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        self.connection.peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// Takes bytes from the wire. What they carry is appended to `plain`; what is to be answered, to `wire`, also when it
    /// fails (the alert).
    pub fn receive(&mut self, bytes: &mut [u8], plain: &mut Vec<u8>, wire: &mut Vec<u8>) -> Received {
        let received = self.take(bytes, plain, wire);
        let is_too_much = received == Received::Open && self.held.len() > MAX_HELD_BYTES;
        let received = if is_too_much { Received::Failed(Error::PeerSentOversizedRecord) } else { received };
        self.has_failed = matches!(received, Received::Failed(_));
        received
    }

    fn take(&mut self, bytes: &mut [u8], plain: &mut Vec<u8>, wire: &mut Vec<u8>) -> Received {
        if self.has_failed {
            return Received::Failed(Error::General("it has failed before".to_owned()));
        }
        if self.held.is_empty() {
            let (consumed, received) = advance(&mut self.connection, bytes, plain, wire);
            self.held = bytes[consumed..].to_vec();
            return received;
        }
        self.held.extend_from_slice(bytes);
        let (consumed, received) = advance(&mut self.connection, &mut self.held, plain, wire);
        if consumed == self.held.len() {
            self.held = Vec::new();
        } else {
            self.held.drain(..consumed);
        }
        received
    }

    /// Records with `head` and `body` in them, one after the other.
    pub fn seal(&mut self, head: &[u8], body: &[u8]) -> io::Result<Vec<u8>> {
        let together;
        let bytes = if head.is_empty() {
            body
        } else {
            together = [head, body].concat();
            &together
        };
        let records = bytes.len() / RECORD_BYTES + 1;
        self.write(bytes.len() + records * RECORD_OVERHEAD, |traffic, out| traffic.encrypt(bytes, out))
    }

    /// The record that says that no more is sent.
    pub fn close_notify(&mut self) -> io::Result<Vec<u8>> {
        self.write(RECORD_OVERHEAD, |traffic, out| traffic.queue_close_notify(out))
    }

    fn write(
        &mut self,
        bytes: usize,
        mut put: impl FnMut(&mut WriteTraffic<'_, ServerConnectionData>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> io::Result<Vec<u8>> {
        if self.has_failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut out = Vec::with_capacity(bytes);
        loop {
            // Nothing of what is held can be of use now, but it must be there: rustls remembers how much of it it has seen.
            let UnbufferedStatus { discard, state, .. } = self.connection.process_tls_records(&mut self.held);
            let is_written = match state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let at = out.len();
                    out.resize(at + bytes, 0);
                    let written = loop {
                        match put(&mut traffic, &mut out[at..]) {
                            Ok(written) => break written,
                            Err(EncryptError::InsufficientSize(needed))
                                if needed.required_size > out.len() - at =>
                            {
                                out.resize(at + needed.required_size, 0);
                            }
                            Err(error) => return Err(io::Error::other(error)),
                        }
                    };
                    out.truncate(at + written);
                    true
                }
                Ok(ConnectionState::EncodeTlsData(mut message)) => {
                    encode(&mut out, |room| message.encode(room));
                    false
                }
                Ok(ConnectionState::TransmitTlsData(transmit)) => {
                    transmit.done();
                    false
                }
                Ok(ConnectionState::BlockedHandshake) => {
                    return Err(io::Error::other(Error::HandshakeNotComplete));
                }
                Ok(_) => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(error) => {
                    self.has_failed = true;
                    return Err(io::Error::other(error));
                }
            };
            self.held.drain(..discard);
            if is_written {
                return Ok(out);
            }
        }
    }
}

/// Takes as much of `bytes` as is complete; gives how much that was.
fn advance(
    connection: &mut UnbufferedServerConnection,
    bytes: &mut [u8],
    plain: &mut Vec<u8>,
    wire: &mut Vec<u8>,
) -> (usize, Received) {
    let mut consumed = 0;
    let mut received = Received::Open;
    loop {
        let UnbufferedStatus { mut discard, state, .. } =
            connection.process_tls_records(&mut bytes[consumed..]);
        let goes_on = match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    match record {
                        Ok(record) => {
                            plain.extend_from_slice(record.payload);
                            discard += record.discard;
                        }
                        Err(error) => received = Received::Failed(error),
                    }
                }
                matches!(received, Received::Open)
            }
            Ok(ConnectionState::EncodeTlsData(mut message)) => {
                encode(wire, |room| message.encode(room));
                true
            }
            Ok(ConnectionState::TransmitTlsData(transmit)) => {
                transmit.done();
                true
            }
            Ok(ConnectionState::PeerClosed) => {
                received = Received::PeerClosed;
                false
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => false,
            // Early data is not offered, and after the end nothing is asked.
            Ok(_) => false,
            Err(error) => {
                consumed += discard;
                say_last(connection, &mut bytes[consumed..], wire);
                return (consumed, Received::Failed(error));
            }
        };
        consumed += discard;
        if !goes_on {
            return (consumed, received);
        }
    }
}

/// Appends what is to be said after a failure: the alert, and what was due before it. No more is asked than there is to be
/// said, for then rustls would look at the same bytes again.
fn say_last(connection: &mut UnbufferedServerConnection, bytes: &mut [u8], wire: &mut Vec<u8>) {
    while connection.wants_write() {
        match connection.process_tls_records(bytes).state {
            Ok(ConnectionState::EncodeTlsData(mut message)) => encode(wire, |room| message.encode(room)),
            _ => return,
        }
    }
}

/// Appends what `encode` writes, with as much room as it asks for.
fn encode(out: &mut Vec<u8>, mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>) {
    let at = out.len();
    loop {
        match encode(&mut out[at..]) {
            Ok(written) => return out.truncate(at + written),
            Err(EncodeError::InsufficientSize(needed)) if needed.required_size > out.len() - at => {
                out.resize(at + needed.required_size, 0);
            }
            // It is encoded once.
            Err(_) => return out.truncate(at),
        }
    }
}

/// Why a handshake failed, in metrics.
pub fn label(error: &Error) -> &'static str {
    match error {
        Error::NoCertificatesPresented => "no_client_certificate",
        Error::InvalidCertificate(_) => "bad_client_certificate",
        Error::AlertReceived(_) => "refused_by_client",
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => "incompatible",
        Error::InvalidMessage(_) => "not_tls",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests;
