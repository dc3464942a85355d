//! The handshake, the examples of RFC 6455, and that it does not matter how the bytes come in.

use proptest::prelude::*;

use super::{
    Decoder, End, FrameError, Handshake, HandshakeError, MAX_HANDSHAKE_BYTES, close, close_code, handshake,
    header, pong,
};

const LIMIT: u32 = 1 << 20;
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// The request of RFC 6455 §1.3, for MQTT; a header given again replaces that of the same name, an empty one drops it.
fn request(line: &str, changed: &[(&str, &str)]) -> Vec<u8> {
    let mut headers = vec![
        ("Host", "server.example.com"),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Origin", "http://example.com"),
        ("Sec-WebSocket-Protocol", "mqtt"),
        ("Sec-WebSocket-Version", "13"),
    ];
    headers.retain(|(name, _)| !changed.iter().any(|(other, _)| other == name));
    headers.extend(changed.iter().filter(|(_, value)| !value.is_empty()));
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("{line}\r\n{headers}\r\n").into_bytes()
}

fn accepted(request: &[u8]) -> String {
    match handshake(request) {
        Handshake::Accept { consumed, response } => {
            assert_eq!(consumed, request.len());
            String::from_utf8(response).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

fn refused(request: &[u8]) -> (HandshakeError, String) {
    match handshake(request) {
        Handshake::Refuse { error, response } => (error, String::from_utf8(response).unwrap()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn handshake_of_the_standard() {
    let expected = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";
    assert_eq!(accepted(&request("GET /mqtt HTTP/1.1", &[])), expected);
    assert_eq!(accepted(&request("GET / HTTP/1.1", &[])), expected);
    assert_eq!(accepted(&request("GET /mqtt?a=b HTTP/1.1", &[])), expected);
}

#[test]
fn handshakes_of_browsers_and_old_clients() {
    let of = |changed: &[(&str, &str)]| accepted(&request("GET /mqtt HTTP/1.1", changed));
    assert!(of(&[("Connection", "keep-alive, Upgrade"), ("Upgrade", "WebSocket")]).contains("101"));
    assert!(of(&[("Sec-WebSocket-Protocol", "mqttv3.1, mqtt")]).contains("Protocol: mqtt\r\n"));
    assert!(of(&[("Sec-WebSocket-Protocol", "mqttv3.1")]).contains("Protocol: mqttv3.1\r\n"));
    // A list header may come in parts (RFC 6455 §11.3.4). No extension is ever agreed on.
    let parts = [("Sec-WebSocket-Protocol", "chat"), ("Sec-WebSocket-Protocol", "mqtt")];
    assert!(of(&parts).contains("Protocol: mqtt\r\n"));
    assert!(!of(&[("Sec-WebSocket-Extensions", "permessage-deflate")]).contains("Extensions"));
}

#[test]
fn handshake_waits_for_its_end_and_leaves_what_follows() {
    let request = request("GET /mqtt HTTP/1.1", &[]);
    for end in 0..request.len() {
        assert_eq!(handshake(&request[..end]), Handshake::Incomplete, "{end}");
    }
    let with_frames = [request.as_slice(), &[0x82, 0x80, 1, 2, 3, 4]].concat();
    assert!(
        matches!(handshake(&with_frames), Handshake::Accept { consumed, .. } if consumed == request.len())
    );
}

#[test]
fn handshakes_that_are_refused() {
    use HandshakeError as E;
    let get = "GET /mqtt HTTP/1.1";
    for (request, error, status) in [
        (request("POST /mqtt HTTP/1.1", &[]), E::Method, "405 Method Not Allowed\r\nAllow: GET\r\n"),
        (request("GET /other HTTP/1.1", &[]), E::Path, "404"),
        (request("GET /mqtt HTTP/1.0", &[]), E::HttpVersion, "400"),
        (request(get, &[("Upgrade", "")]), E::NotUpgrade, "426"),
        (request(get, &[("Connection", "close")]), E::NotUpgrade, "426"),
        (request(get, &[("Upgrade", "h2c")]), E::NotUpgrade, "426"),
        (request(get, &[("Host", "")]), E::Host, "400"),
        (request(get, &[("Sec-WebSocket-Version", "8")]), E::Version, "426"),
        (request(get, &[("Sec-WebSocket-Version", "")]), E::Version, "426"),
        (request(get, &[("Sec-WebSocket-Key", "")]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Key", "c2hvcnQ=")]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Key", &"A".repeat(24))]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Key", &"A".repeat(400))]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="); 2]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Version", "13"); 2]), E::Version, "426"),
        (request(get, &[("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ!!")]), E::Key, "400"),
        (request(get, &[("Sec-WebSocket-Protocol", "")]), E::Subprotocol, "400"),
        (request(get, &[("Sec-WebSocket-Protocol", "amqp, mqttv5")]), E::Subprotocol, "400"),
        (b"\x10\x12\x00\x04MQTT\x04\x02".to_vec(), E::NotHttp, "400"),
        (b"GET / HTTP/9\r\n\r\n".to_vec(), E::NotHttp, "400"),
        (vec![b'a'; MAX_HANDSHAKE_BYTES], E::TooLarge, "431"),
        (request(get, &vec![("A", "b"); 65]), E::TooLarge, "431"),
        (request(get, &[("A", "b".repeat(MAX_HANDSHAKE_BYTES).as_str())]), E::TooLarge, "431"),
    ] {
        let shown = String::from_utf8_lossy(&request).into_owned();
        let (found, response) = refused(&request);
        assert_eq!(found, error, "{shown}");
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{shown}: {response}");
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, format!("{error}\n"));
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())) && head.contains("close"),
            "{head}"
        );
    }
}

/// What somebody sees who opens the address in a browser, or with curl.
#[test]
fn a_plain_request_is_told_what_is_here() {
    let (_, response) = refused(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(
        response,
        "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Content-Type: text/plain; charset=utf-8\r\nContent-Length: 84\r\nConnection: Upgrade, close\r\n\r\n\
         this is MQTT over WebSocket: connect with a WebSocket client and subprotocol \"mqtt\"\n"
    );
}

/// A masked frame, as a client sends it.
fn frame(first_byte: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![first_byte];
    match payload.len() {
        length @ 0..=125 => bytes.push(0x80 | length as u8),
        length @ 126..=65_535 => {
            bytes.push(0x80 | 126);
            bytes.extend((length as u16).to_be_bytes());
        }
        length => {
            bytes.push(0x80 | 127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// Data, replies and end of an input that comes in pieces of at most `size`, until the end.
fn decode_in(input: &[u8], size: usize) -> (Vec<u8>, Vec<u8>, Option<End>) {
    let mut decoder = Decoder::new();
    let (mut data, mut replies) = (Vec::new(), Vec::new());
    for piece in input.chunks(size) {
        let mut piece = piece.to_vec();
        let decoded = decoder.decode(&mut piece, LIMIT, &mut replies);
        data.extend(&piece[decoded.data]);
        if decoded.end.is_some() {
            return (data, replies, decoded.end);
        }
    }
    (data, replies, None)
}

fn decode(input: &[u8]) -> (Vec<u8>, Vec<u8>, Option<End>) {
    decode_in(input, usize::MAX)
}

/// RFC 6455 §5.7. Its text frames are sent here with the opcode of binary ones.
#[test]
fn frames_of_the_standard() {
    // A single-frame masked message.
    let hello = [0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
    assert_eq!(decode(&hello), (b"Hello".to_vec(), vec![], None));
    assert_eq!(frame(0x82, b"Hello", MASK), hello);
    // A masked pong.
    let pong_frame = [0x8a, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
    assert_eq!(decode(&pong_frame), (vec![], vec![], None));
    // A ping is answered with its payload.
    let mut out = Vec::new();
    pong(&mut out, b"Hello");
    assert_eq!(out, [0x8a, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
    assert_eq!(decode(&frame(0x89, b"Hello", MASK)), (vec![], out, None));
    // A fragmented message.
    let fragmented = [frame(0x02, b"Hel", MASK), frame(0x80, b"lo", [1, 2, 3, 4])].concat();
    assert_eq!(decode(&fragmented), (b"Hello".to_vec(), vec![], None));
    // 256 bytes and 64 KiB in one frame each, as a server sends them.
    assert_eq!(header(256), ([0x82, 0x7e, 0x01, 0x00, 0, 0, 0, 0, 0, 0], 4));
    assert_eq!(header(65_536), ([0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0], 10));
    assert_eq!(header(5), ([0x82, 0x05, 0, 0, 0, 0, 0, 0, 0, 0], 2));
    assert_eq!((header(0).1, header(125).1, header(126).1, header(65_535).1), (2, 2, 4, 4));
    // The same lengths from a client.
    for length in [125, 126, 256, 65_535, 65_536, 100_000] {
        let payload: Vec<u8> = (0..length).map(|index| index as u8).collect();
        assert_eq!(decode(&frame(0x82, &payload, MASK)), (payload, vec![], None));
    }
}

#[test]
fn control_frames_inside_of_a_message() {
    let input = [
        frame(0x02, b"a", MASK),
        frame(0x89, b"first", MASK),
        frame(0x00, b"b", MASK),
        frame(0x89, b"second", MASK),
        frame(0x8a, b"", MASK),
        frame(0x80, b"c", MASK),
        frame(0x82, b"", MASK),
        frame(0x82, b"d", MASK),
    ]
    .concat();
    // Of several pings in one read only the last is answered (§5.5.3).
    assert_eq!(decode(&input), (b"abcd".to_vec(), b"\x8a\x06second".to_vec(), None));
}

#[test]
fn closing() {
    let closed = |payload: &[u8]| {
        decode(&[frame(0x82, b"x", MASK), frame(0x88, payload, MASK), vec![1, 2, 3]].concat())
    };
    let reply = |code: u16| [&[0x88, 2], &code.to_be_bytes()[..]].concat();
    assert_eq!(closed(b"\x03\xe9bye"), (b"x".to_vec(), reply(1001), Some(End::Closed(Some(1001)))));
    assert_eq!(closed(b""), (b"x".to_vec(), reply(1000), Some(End::Closed(None))));
    assert_eq!(closed(b"\x0f\xa0"), (b"x".to_vec(), reply(4000), Some(End::Closed(Some(4000)))));
}

#[test]
fn after_the_end_everything_is_dropped() {
    let mut decoder = Decoder::new();
    let mut replies = Vec::new();
    let mut input = frame(0x88, b"", MASK);
    assert_eq!(decoder.decode(&mut input, LIMIT, &mut replies).end, Some(End::Closed(None)));
    let replied = replies.len();
    let mut input = frame(0x82, b"late", MASK);
    let decoded = decoder.decode(&mut input, LIMIT, &mut replies);
    assert_eq!((decoded.data.len(), decoded.end, replies.len()), (0, None, replied));
}

#[test]
fn frames_that_are_refused() {
    let with_length = |length: &[u8]| [&[0x82], length, &MASK].concat();
    for (input, error, code) in [
        (vec![0x82, 0x05, 1, 2, 3], FrameError::NotMasked, 1002),
        (frame(0x81, b"text", MASK), FrameError::Text, 1003),
        (frame(0x01, b"text", MASK), FrameError::Text, 1003),
        (frame(0xc2, b"", MASK), FrameError::ReservedBits, 1002),
        (frame(0x92, b"", MASK), FrameError::ReservedBits, 1002),
        (frame(0x83, b"", MASK), FrameError::Opcode(3), 1002),
        (frame(0x8f, b"", MASK), FrameError::Opcode(15), 1002),
        (frame(0x80, b"", MASK), FrameError::Continuation, 1002),
        ([frame(0x02, b"a", MASK), frame(0x82, b"b", MASK)].concat(), FrameError::Interleaved, 1002),
        ([frame(0x02, b"a", MASK), frame(0x81, b"b", MASK)].concat(), FrameError::Interleaved, 1002),
        (
            [frame(0x02, b"a", MASK), frame(0x80, b"b", MASK), frame(0x80, b"", MASK)].concat(),
            FrameError::Continuation,
            1002,
        ),
        (frame(0x09, b"", MASK), FrameError::Control, 1002),
        (frame(0x89, &[0; 126], MASK), FrameError::Control, 1002),
        (with_length(&[0xfe, 0, 125]), FrameError::Length, 1002),
        (with_length(&[0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff]), FrameError::Length, 1002),
        (with_length(&[0xff, 0x80, 0, 0, 0, 0, 0, 0, 0]), FrameError::Length, 1002),
        (
            with_length(&[0xff, 0, 0, 0, 0, 0, 0x10, 0, 1]),
            FrameError::TooBig { bytes: (1 << 20) + 1, limit: LIMIT },
            1009,
        ),
        (
            with_length(&[0xff, 0, 0, 0, 1, 0, 0, 0, 0]),
            FrameError::TooBig { bytes: 1 << 32, limit: LIMIT },
            1009,
        ),
        (frame(0x88, &[0x03], MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &999_u16.to_be_bytes(), MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &1005_u16.to_be_bytes(), MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &1006_u16.to_be_bytes(), MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &2000_u16.to_be_bytes(), MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &5000_u16.to_be_bytes(), MASK), FrameError::CloseCode, 1002),
        (frame(0x88, &[0x03, 0xe8, 0xff], MASK), FrameError::CloseReason, 1007),
    ] {
        let input = [frame(0x82, b"before", MASK), input].concat();
        for size in [1, 2, 5, usize::MAX] {
            let (data, replies, end) = decode_in(&input, size);
            assert!(data.starts_with(b"before"), "{error}");
            assert_eq!(end, Some(End::Error(error)));
            assert_eq!(error.close_code(), code, "{error}");
            let mut expected = Vec::new();
            close(&mut expected, code, &error.to_string());
            assert_eq!(replies, expected, "{error}");
        }
    }
}

#[test]
fn a_frame_may_be_as_long_as_the_limit() {
    let payload = vec![7; LIMIT as usize];
    assert_eq!(decode(&frame(0x82, &payload, MASK)), (payload, vec![], None));
}

#[test]
fn close_reasons_are_cut_between_characters() {
    let mut out = Vec::new();
    close(&mut out, close_code::POLICY_VIOLATION, &"é".repeat(100));
    assert_eq!(out[..4], [0x88, 124, 0x03, 0xf0]);
    assert_eq!(std::str::from_utf8(&out[4..]), Ok("é".repeat(61).as_str()));
}

#[test]
fn state_of_an_idle_connection_is_small() {
    assert!(size_of::<Decoder>() <= 24, "{}", size_of::<Decoder>());
}

#[derive(Debug, Clone)]
enum Piece {
    Data(Vec<u8>, [u8; 4]),
    Ping(Vec<u8>, [u8; 4]),
    Pong(Vec<u8>, [u8; 4]),
}

fn piece() -> impl Strategy<Value = Piece> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        (100_usize..300).prop_map(|length| (0..length).map(|index| index as u8).collect())
    ];
    (payload, any::<[u8; 4]>(), 0..6).prop_map(|(payload, mask, kind)| match kind {
        0 => Piece::Ping(payload.into_iter().take(125).collect(), mask),
        1 => Piece::Pong(payload.into_iter().take(125).collect(), mask),
        _ => Piece::Data(payload, mask),
    })
}

proptest! {
    #[test]
    fn it_does_not_matter_how_bytes_come_in(
        pieces in prop::collection::vec((piece(), any::<bool>()), 0..12),
        sizes in prop::collection::vec(1_usize..40, 1..20),
        tail in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let (mut input, mut expected, mut in_message, mut pings) = (Vec::new(), Vec::new(), false, Vec::new());
        for (piece, more) in &pieces {
            match piece {
                Piece::Data(payload, mask) => {
                    let opcode = if in_message { 0x00 } else { 0x02 };
                    input.extend(frame(if *more { opcode } else { 0x80 | opcode }, payload, *mask));
                    expected.extend(payload);
                    in_message = *more;
                }
                Piece::Ping(payload, mask) => {
                    input.extend(frame(0x89, payload, *mask));
                    pong(&mut pings, payload);
                }
                Piece::Pong(payload, mask) => input.extend(frame(0x8a, payload, *mask)),
            }
        }
        // Byte by byte every ping is answered.
        prop_assert_eq!(decode_in(&input, 1), (expected.clone(), pings, None));
        prop_assert_eq!(decode(&input).0, expected);

        // Also with anything after it, and cut anywhere.
        input.extend(tail);
        let whole = decode(&input);
        for &size in &sizes {
            let parts = decode_in(&input, size);
            prop_assert_eq!((&parts.0, parts.2), (&whole.0, whole.2));
        }
    }

    #[test]
    fn no_bytes_make_the_handshake_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = handshake(&bytes);
        let _ = handshake(&[b"GET / HTTP/1.1\r\n", bytes.as_slice()].concat());
    }
}

/// The seeds of the fuzz target `websocket`; `CARILLON_WRITE_CORPUS=1` writes them.
#[test]
fn seeds_are_in_the_repository() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/websocket");
    for (name, seed) in [
        ("handshake", request("GET /mqtt HTTP/1.1", &[])),
        ("binary", frame(0x82, b"Hello", MASK)),
        (
            "fragmented",
            [frame(0x02, b"Hel", MASK), frame(0x89, b"ping", MASK), frame(0x80, b"lo", MASK)].concat(),
        ),
        ("medium", frame(0x82, &[7; 200], MASK)),
        ("close", frame(0x88, b"\x03\xe8bye", MASK)),
    ] {
        let seed = [&[3], seed.as_slice()].concat(); // the target's first byte: the size of the pieces
        let path = directory.join(name);
        if std::env::var_os("CARILLON_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, seed).unwrap();
        } else {
            assert_eq!(std::fs::read(&path).ok(), Some(seed), "{}", path.display());
        }
    }
}
