//! The table of the specification's cases, and bytes that nobody should send.

use proptest::prelude::*;

use super::*;

/// A header of version 2.
fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend([command, family]);
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn inet() -> Vec<u8> {
    vec![192, 0, 2, 7, 10, 0, 0, 1, 0xC0, 0x01, 0x07, 0x5B]
}

fn inet6() -> Vec<u8> {
    let mut body = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7).octets().to_vec();
    body.extend(Ipv6Addr::LOCALHOST.octets());
    body.extend([0xC0, 0x01, 0x07, 0x5B]);
    body
}

#[test]
fn every_kind_of_header() {
    let with_tlvs = [inet(), vec![0x03, 0, 4, 1, 2, 3, 4]].concat();
    let v4: SocketAddr = "192.0.2.7:49153".parse().unwrap();
    let v6: SocketAddr = "[2001:db8::7]:49153".parse().unwrap();
    type Case = (&'static str, Vec<u8>, Result<Option<SocketAddr>, ProxyError>);
    let table: [Case; 18] = [
        ("TCP over IPv4", header(0x21, 0x11, &inet()), Ok(Some(v4))),
        ("UDP over IPv4", header(0x21, 0x12, &inet()), Ok(Some(v4))),
        ("IPv4 with TLVs", header(0x21, 0x11, &with_tlvs), Ok(Some(v4))),
        ("TCP over IPv6", header(0x21, 0x21, &inet6()), Ok(Some(v6))),
        ("a Unix socket", header(0x21, 0x31, &[b'/'; 216]), Ok(None)),
        ("unspecified", header(0x21, 0x00, &[]), Ok(None)),
        ("unspecified, with something", header(0x21, 0x00, &[1, 2, 3]), Ok(None)),
        ("local", header(0x20, 0x00, &[]), Ok(None)),
        ("local, with addresses to be ignored", header(0x20, 0x11, &inet()), Ok(None)),
        ("local, of no known family", header(0x20, 0xFF, &[]), Ok(None)),
        ("version 1", b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n".to_vec(), Err(ProxyError::Version1)),
        ("MQTT", vec![0x10, 0x0C, 0, 4, b'M', b'Q', b'T', b'T'], Err(ProxyError::Missing)),
        ("version 3", header(0x31, 0x11, &inet()), Err(ProxyError::Version(3))),
        ("a command", header(0x22, 0x11, &inet()), Err(ProxyError::Command(2))),
        ("a family", header(0x21, 0x41, &inet()), Err(ProxyError::Family(0x41))),
        ("a transport", header(0x21, 0x13, &inet()), Err(ProxyError::Family(0x13))),
        (
            "too little of an address",
            header(0x21, 0x21, &inet()),
            Err(ProxyError::Addresses { got: 12, needed: 36 }),
        ),
        ("too long", header(0x21, 0x11, &[0; 4000]), Err(ProxyError::TooLong(4016))),
    ];
    for (what, bytes, expected) in table {
        let whole = match expected {
            Ok(client) => Ok(Parsed::Header { consumed: bytes.len(), client }),
            Err(error) => Err(error),
        };
        assert_eq!(parse(&bytes), whole, "{what}");
        // Byte by byte: incomplete, until it is what it is.
        let first = (0..=bytes.len())
            .map(|len| parse(&bytes[..len]))
            .find(|parsed| *parsed != Ok(Parsed::Incomplete));
        assert_eq!(first, Some(whole), "{what}, byte by byte");
        // What follows is the client's.
        if let Ok(client) = expected {
            let followed = [&bytes[..], b"\x10\x0c"].concat();
            assert_eq!(
                parse(&followed),
                Ok(Parsed::Header { consumed: bytes.len(), client }),
                "{what}, followed"
            );
        }
    }
}

proptest! {
    #[test]
    fn anything_is_refused_or_within_bounds(
        start in prop_oneof![Just(vec![]), Just(SIGNATURE.to_vec()), Just(header(0x21, 0x11, &[])[..14].to_vec())],
        rest in proptest::collection::vec(any::<u8>(), 0..3000),
    ) {
        let bytes = [start, rest].concat();
        match parse(&bytes) {
            Ok(Parsed::Incomplete) => prop_assert!(bytes.len() < MAX_HEADER_BYTES),
            Ok(Parsed::Header { consumed, .. }) => prop_assert!(consumed <= bytes.len().min(MAX_HEADER_BYTES)),
            Err(_) => {}
        }
        // Once it is refused, no further byte mends it.
        let refused = (0..bytes.len()).find(|&len| parse(&bytes[..len]).is_err());
        if let Some(at) = refused {
            prop_assert_eq!(parse(&bytes[..at]), parse(&bytes));
        }
    }
}
