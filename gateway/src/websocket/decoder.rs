//! Frames of a client (RFC 6455 §5) into the bytes that they carry.

use std::ops::Range;

use super::{
    BINARY, CLOSE, CONTINUATION, FIN, MASK, MAX_CONTROL_BYTES, PING, PONG, TEXT, close, close_code, pong,
};

/// What a connection keeps between reads: 24 bytes, and a little more only while a control frame is split by a read.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// The payload of a ping or close, of which some has not come yet.
    control: Option<Box<Control>>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Header {
        /// Of a header that is not complete.
        bytes: [u8; 13],
        len: u8,
        /// A message has begun, and its next frame is to continue it.
        in_message: bool,
    },
    Payload {
        /// Bytes to come; never 0.
        remaining: u32,
        /// Turned so that the first byte is for the next of the payload.
        mask: [u8; 4],
        opcode: u8,
        in_message: bool,
    },
    /// Closed by the client or by an error: whatever comes is dropped.
    Ended,
}

#[derive(Debug)]
struct Control {
    bytes: [u8; MAX_CONTROL_BYTES],
    len: u8,
}

/// What one read has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Where in the input the MQTT bytes now are, in one piece.
    pub data: Range<usize>,
    /// The stream is over after `data`. The close frame that this calls for is already in `replies`: send it and close.
    pub end: Option<End>,
}

/// Why a stream is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client has closed, with this code if it gave one.
    Closed(Option<u16>),
    Error(FrameError),
}

/// What a client must not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("reserved bits are set, but no extension was agreed on")]
    ReservedBits,
    #[error("there is no opcode {0:#x}")]
    Opcode(u8),
    #[error("text, but MQTT is binary")]
    Text,
    #[error("a frame without mask")]
    NotMasked,
    #[error("a frame of {bytes} bytes, the limit is {limit}")]
    TooBig { bytes: u64, limit: u32 },
    #[error("a length that is not written in the fewest bytes")]
    Length,
    #[error("a control frame that is fragmented or longer than {MAX_CONTROL_BYTES} bytes")]
    Control,
    #[error("a continuation of nothing")]
    Continuation,
    #[error("a new message inside of a fragmented one")]
    Interleaved,
    #[error("a close frame with a code that cannot be sent, or with half of one")]
    CloseCode,
    #[error("a close frame with a reason that is not UTF-8")]
    CloseReason,
}

impl FrameError {
    /// The code to close with (§7.4.1; for text MQTT 5.0 [MQTT-6.0.0-1]).
    pub fn close_code(self) -> u16 {
        match self {
            FrameError::Text => close_code::UNSUPPORTED_DATA,
            FrameError::TooBig { .. } => close_code::TOO_BIG,
            FrameError::CloseReason => close_code::INVALID_DATA,
            _ => close_code::PROTOCOL_ERROR,
        }
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    pub const fn new() -> Self {
        Decoder { state: State::between_frames(false), control: None }
    }

    /// Takes all of `input`, unmasks it in place and moves the MQTT bytes in it together. Nothing of the input needs to
    /// be kept but those.
    ///
    /// `replies` gets what the protocol answers by itself, ready to be sent: one pong at most, to the last ping (§5.5.3),
    /// and one close frame. A frame over `max_frame_bytes` is refused.
    pub fn decode(&mut self, input: &mut [u8], max_frame_bytes: u32, replies: &mut Vec<u8>) -> Decoded {
        let mut walk = Walk { input, at: 0, data: 0..0, max_frame_bytes, ping: None };
        let mut end = None;
        while walk.at < walk.input.len() {
            match self.step(&mut walk) {
                Ok(None) => {}
                Ok(Some(closed)) => end = Some(closed),
                Err(error) => end = Some(End::Error(error)),
            }
            if end.is_some() || matches!(self.state, State::Ended) {
                self.state = State::Ended;
                self.control = None;
                break;
            }
        }
        if let Some((payload, len)) = walk.ping {
            pong(replies, &payload[..len.into()]);
        }
        match end {
            None => {}
            // §5.5.1: answered with the code that was received.
            Some(End::Closed(code)) => close(replies, code.unwrap_or(close_code::NORMAL), ""),
            Some(End::Error(error)) => close(replies, error.close_code(), &error.to_string()),
        }
        Decoded { data: walk.data, end }
    }

    /// One header, or as much of a payload as there is.
    fn step(&mut self, walk: &mut Walk<'_>) -> Result<Option<End>, FrameError> {
        match self.state {
            State::Ended => Ok(None),
            State::Header { bytes, len, in_message } => self.header(walk, bytes, len, in_message),
            State::Payload { remaining, mask, opcode, in_message } => {
                let available = walk.input.len() - walk.at;
                let count = available.min(remaining as usize);
                let from = walk.at;
                walk.at += count;
                unmask(&mut walk.input[from..from + count], mask);
                let left = remaining - count as u32; // count is at most remaining
                self.state = if left > 0 {
                    let mut mask = mask;
                    mask.rotate_left(count % 4);
                    State::Payload { remaining: left, mask, opcode, in_message }
                } else {
                    State::between_frames(in_message)
                };
                match opcode {
                    BINARY | CONTINUATION => {
                        walk.keep(from..from + count);
                        Ok(None)
                    }
                    PONG => Ok(None), // unasked for, which is allowed (§5.5.3)
                    _ => self.control_payload(walk, opcode, from..from + count, left == 0),
                }
            }
        }
    }

    /// Collects a header, §5.2.
    fn header(
        &mut self,
        walk: &mut Walk<'_>,
        partial: [u8; 13],
        partial_len: u8,
        in_message: bool,
    ) -> Result<Option<End>, FrameError> {
        let mut bytes = [0; 14];
        let mut len = usize::from(partial_len);
        bytes[..len].copy_from_slice(&partial[..len]);
        let opcode;
        loop {
            let needed = match len {
                0 => 1,
                1 => 2,
                _ => match bytes[1] & !MASK {
                    126 => 8,
                    127 => 14,
                    _ => 6,
                },
            };
            // What is wrong is said at the first byte that tells, however the bytes come in.
            if len == 1 {
                check_first(bytes[0], in_message)?;
            } else if len == 2 {
                check_second(bytes[0], bytes[1])?;
            }
            if len == needed {
                opcode = bytes[0] & 0x0f;
                break;
            }
            let Some(&byte) = walk.input.get(walk.at) else {
                let mut partial = [0; 13];
                partial[..len].copy_from_slice(&bytes[..len]);
                self.state = State::Header { bytes: partial, len: len as u8, in_message };
                return Ok(None);
            };
            walk.at += 1;
            bytes[len] = byte;
            len += 1;
        }
        let [_, second, rest @ ..] = bytes;
        let (length, mask) = match second & !MASK {
            126 => (u64::from(u16::from_be_bytes([rest[0], rest[1]])), [rest[2], rest[3], rest[4], rest[5]]),
            127 => (
                u64::from_be_bytes([rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], rest[6], rest[7]]),
                [rest[8], rest[9], rest[10], rest[11]],
            ),
            short => (u64::from(short), [rest[0], rest[1], rest[2], rest[3]]),
        };
        let fewest = match second & !MASK {
            126 => 126,
            127 => 65_536,
            _ => 0,
        };
        if length < fewest || length >> 63 != 0 {
            return Err(FrameError::Length);
        }
        let remaining = match u32::try_from(length) {
            Ok(length) if length <= walk.max_frame_bytes => length,
            _ => return Err(FrameError::TooBig { bytes: length, limit: walk.max_frame_bytes }),
        };
        let in_message = if is_control(opcode) { in_message } else { bytes[0] & FIN == 0 };
        if remaining > 0 {
            self.state = State::Payload { remaining, mask, opcode, in_message };
            return Ok(None);
        }
        self.state = State::between_frames(in_message);
        if matches!(opcode, PING | CLOSE) { self.control_payload(walk, opcode, 0..0, true) } else { Ok(None) }
    }

    /// Some of the payload of a ping or close, at `range` of the input.
    fn control_payload(
        &mut self,
        walk: &mut Walk<'_>,
        opcode: u8,
        range: Range<usize>,
        complete: bool,
    ) -> Result<Option<End>, FrameError> {
        let mut whole = match self.control.take() {
            Some(control) => *control,
            None => Control { bytes: [0; MAX_CONTROL_BYTES], len: 0 },
        };
        let len = usize::from(whole.len) + range.len(); // the header was not let through if this could be over 125
        whole.bytes[usize::from(whole.len)..len].copy_from_slice(&walk.input[range]);
        whole.len = len as u8;
        if !complete {
            self.control = Some(Box::new(whole));
            return Ok(None);
        }
        if opcode == PING {
            walk.ping = Some((whole.bytes, whole.len));
            return Ok(None);
        }
        closed(&whole.bytes[..len]).map(|code| Some(End::Closed(code)))
    }
}

impl State {
    const fn between_frames(in_message: bool) -> Self {
        State::Header { bytes: [0; 13], len: 0, in_message }
    }
}

/// The way through one input.
struct Walk<'i> {
    input: &'i mut [u8],
    at: usize,
    data: Range<usize>,
    max_frame_bytes: u32,
    /// The payload of the last ping.
    ping: Option<([u8; MAX_CONTROL_BYTES], u8)>,
}

impl Walk<'_> {
    /// Adds unmasked bytes to the data: where they are if they are the first, else moved to its end.
    fn keep(&mut self, range: Range<usize>) {
        if self.data.is_empty() {
            self.data = range;
            return;
        }
        let end = self.data.end;
        self.data.end += range.len();
        self.input.copy_within(range, end);
    }
}

fn is_control(opcode: u8) -> bool {
    opcode & 0x8 != 0
}

fn check_first(first: u8, in_message: bool) -> Result<(), FrameError> {
    if first & 0x70 != 0 {
        return Err(FrameError::ReservedBits);
    }
    match first & 0x0f {
        CONTINUATION if !in_message => Err(FrameError::Continuation),
        BINARY | TEXT if in_message => Err(FrameError::Interleaved),
        TEXT => Err(FrameError::Text),
        CLOSE | PING | PONG if first & FIN == 0 => Err(FrameError::Control),
        CONTINUATION | BINARY | CLOSE | PING | PONG => Ok(()),
        opcode => Err(FrameError::Opcode(opcode)),
    }
}

fn check_second(first: u8, second: u8) -> Result<(), FrameError> {
    if second & MASK == 0 {
        return Err(FrameError::NotMasked); // §5.1
    }
    if is_control(first & 0x0f) && usize::from(second & !MASK) > MAX_CONTROL_BYTES {
        return Err(FrameError::Control);
    }
    Ok(())
}

/// The code of a close frame (§5.5.1, §7.4).
fn closed(payload: &[u8]) -> Result<Option<u16>, FrameError> {
    let Some((code, why)) = payload.split_first_chunk() else {
        return if payload.is_empty() { Ok(None) } else { Err(FrameError::CloseCode) };
    };
    let code = u16::from_be_bytes(*code);
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(FrameError::CloseCode);
    }
    if std::str::from_utf8(why).is_err() {
        return Err(FrameError::CloseReason);
    }
    Ok(Some(code))
}

/// XORs with the mask (§5.3), eight bytes at a time.
fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, tail) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in tail.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= mask;
    }
}
