//! The server's side of WebSocket (RFC 6455) as a pipe for MQTT (MQTT 5.0 §6), no I/O: the handshake, a decoder that
//! turns frames into one stream of MQTT bytes in the buffer they came in, and the headers of what is sent.
//!
//! MQTT packets and WebSocket frames need not align either way [MQTT-6.0.0-2]. No extensions, so no compression: it
//! would cost each connection a window.

mod decoder;
mod handshake;

#[cfg(test)]
mod tests;

pub use decoder::{Decoded, Decoder, End, FrameError};
pub use handshake::{Handshake, HandshakeError, MAX_HANDSHAKE_BYTES, handshake};

/// Close codes (RFC 6455 §7.4.1) that a server here sends.
pub mod close_code {
    pub const NORMAL: u16 = 1000;
    pub const GOING_AWAY: u16 = 1001;
    pub const PROTOCOL_ERROR: u16 = 1002;
    pub const UNSUPPORTED_DATA: u16 = 1003;
    pub const INVALID_DATA: u16 = 1007;
    pub const POLICY_VIOLATION: u16 = 1008;
    pub const TOO_BIG: u16 = 1009;
    pub const INTERNAL_ERROR: u16 = 1011;
    pub const TRY_AGAIN_LATER: u16 = 1013;
}

const FIN: u8 = 0x80;
const MASK: u8 = 0x80;
/// The longest payload of a control frame (§5.5).
const MAX_CONTROL_BYTES: usize = 125;

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// The header of a whole binary frame from a server, for `payload_bytes` that follow: the first so many of the bytes
/// (§5.2).
pub fn header(payload_bytes: usize) -> ([u8; 10], usize) {
    let mut bytes = [0; 10];
    bytes[0] = FIN | BINARY;
    let width = if payload_bytes <= 125 {
        bytes[1] = payload_bytes as u8;
        2
    } else if let Ok(short) = u16::try_from(payload_bytes) {
        bytes[1] = 126;
        bytes[2..4].copy_from_slice(&short.to_be_bytes());
        4
    } else {
        bytes[1] = 127;
        bytes[2..10].copy_from_slice(&(payload_bytes as u64).to_be_bytes());
        10
    };
    (bytes, width)
}

/// Appends a pong (§5.5.3). At most the first 125 bytes of `payload` go with it.
pub fn pong(out: &mut Vec<u8>, payload: &[u8]) {
    control(out, PONG, payload);
}

/// Appends a close frame (§5.5.1). At most 123 bytes of `why` go with it.
pub fn close(out: &mut Vec<u8>, code: u16, why: &str) {
    let why = &why[..why.floor_char_boundary(MAX_CONTROL_BYTES - 2)];
    out.extend([FIN | CLOSE, 2 + why.len() as u8]);
    out.extend(code.to_be_bytes());
    out.extend(why.as_bytes());
}

fn control(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    let payload = &payload[..payload.len().min(MAX_CONTROL_BYTES)];
    out.extend([FIN | opcode, payload.len() as u8]);
    out.extend(payload);
}
