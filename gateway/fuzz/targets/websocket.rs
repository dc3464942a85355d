//! Any bytes as a handshake and as frames: nothing panics, and it does not matter in which pieces they come.
//!
//! The first byte is the size of the pieces.

#![no_main]

use carillon_gateway_fuzz::gateway::websocket::{Decoder, End, Handshake, handshake};
use libfuzzer_sys::fuzz_target;

const MAX_FRAME_BYTES: u32 = 1 << 16;

fuzz_target!(|input: &[u8]| {
    let Some((&size, bytes)) = input.split_first() else { return };
    if let Handshake::Accept { consumed, .. } = handshake(bytes) {
        assert!(consumed <= bytes.len());
        assert_eq!(handshake(&bytes[..consumed - 1]), Handshake::Incomplete);
    }
    let (whole, end) = decode(bytes, bytes.len().max(1));
    assert!(whole.len() <= bytes.len());
    assert_eq!(decode(bytes, usize::from(size.max(1))), (whole, end));
});

fn decode(bytes: &[u8], size: usize) -> (Vec<u8>, Option<End>) {
    let mut decoder = Decoder::new();
    let mut data = Vec::new();
    for piece in bytes.chunks(size) {
        let mut piece = piece.to_vec();
        let mut replies = Vec::new();
        let decoded = decoder.decode(&mut piece, MAX_FRAME_BYTES, &mut replies);
        assert!(replies.len() <= 2 * 127, "a pong and a close frame");
        data.extend(&piece[decoded.data]);
        if decoded.end.is_some() {
            return (data, decoded.end);
        }
    }
    (data, None)
}
