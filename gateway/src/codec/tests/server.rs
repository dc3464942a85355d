//! What the server sends, byte for byte.

use super::codec::{
    AuthProperties, ConnAckProperties, QoS, Version, auth, connack, disconnect, pingresp, puback, pubcomp,
    pubrec, pubrel, reason, suback, unsuback,
};
use super::{packet, props, s};

/// The bytes of one packet; the length that was told must be true also when something is before it.
fn written(write: impl Fn(&mut Vec<u8>) -> usize) -> Vec<u8> {
    let mut out = Vec::new();
    assert_eq!(write(&mut out), out.len());
    let mut after = vec![1, 2, 3];
    write(&mut after);
    assert_eq!(after[3..], out);
    out
}

#[test]
fn connack_without_properties() {
    let none = ConnAckProperties::default();
    assert_eq!(written(|out| connack(out, Version::V5, true, 0, &none)), [0x20, 3, 1, 0, 0]);
    assert_eq!(written(|out| connack(out, Version::V5, false, 0, &none)), [0x20, 3, 0, 0, 0]);
    assert_eq!(written(|out| connack(out, Version::V4, true, 0, &none)), [0x20, 2, 1, 0]);
    // [MQTT-3.2.2-6]
    assert_eq!(written(|out| connack(out, Version::V5, true, 0x87, &none)), [0x20, 3, 0, 0x87, 0]);
    assert_eq!(written(|out| connack(out, Version::V4, true, 0x87, &none)), [0x20, 2, 0, 5]);
}

/// 3.1.1 §3.2.2.3 table 3.1.
#[test]
fn connack_return_codes() {
    for (reason, code) in [
        (reason::SUCCESS, 0),
        (reason::UNSUPPORTED_PROTOCOL_VERSION, 1),
        (reason::CLIENT_IDENTIFIER_NOT_VALID, 2),
        (reason::SERVER_UNAVAILABLE, 3),
        (reason::SERVER_BUSY, 3),
        (reason::QUOTA_EXCEEDED, 3),
        (reason::USE_ANOTHER_SERVER, 3),
        (reason::BAD_USER_NAME_OR_PASSWORD, 4),
        (reason::NOT_AUTHORIZED, 5),
        (reason::BANNED, 5),
    ] {
        assert_eq!(reason::connack_return_code(reason), code, "{reason:#04x}");
    }
}

#[test]
fn connack_with_all_properties() {
    let all = ConnAckProperties {
        session_expiry: Some(1),
        receive_maximum: Some(2),
        maximum_qos: QoS::AtLeastOnce,
        retain_available: false,
        maximum_packet_size: Some(3),
        assigned_client_id: Some("id"),
        topic_alias_maximum: 4,
        reason_string: Some("why"),
        wildcard_available: false,
        subscription_identifiers_available: false,
        shared_available: false,
        server_keep_alive: Some(5),
        response_information: Some("r"),
        server_reference: Some("other:1883"),
        authentication_method: Some("m"),
        authentication_data: Some(&[9]),
        user_properties: &[("a", "b"), ("a", "c")],
    };
    let block = props(&[
        &[0x11, 0, 0, 0, 1, 0x21, 0, 2, 0x24, 1, 0x25, 0, 0x27, 0, 0, 0, 3],
        &[0x12],
        &s("id"),
        &[0x22, 0, 4, 0x1f],
        &s("why"),
        &[0x28, 0, 0x29, 0, 0x2a, 0, 0x13, 0, 5, 0x1a],
        &s("r"),
        &[0x1c],
        &s("other:1883"),
        &[0x15],
        &s("m"),
        &[0x16],
        &s([9]),
        &[0x26],
        &s("a"),
        &s("b"),
        &[0x26],
        &s("a"),
        &s("c"),
    ]);
    assert_eq!(written(|out| connack(out, Version::V5, false, 0, &all)), packet(0x20, &[&[0, 0], &block]));
    assert_eq!(written(|out| connack(out, Version::V4, false, 0, &all)), [0x20, 2, 0, 0]);
}

/// Lengths that need more than the one byte that is set aside for them.
#[test]
fn long_properties() {
    for length in [100, 120, 124, 125, 126, 127, 128, 129, 16_000, 16_380, 16_383, 16_384, 65_535] {
        let why = "x".repeat(length);
        let expected = packet(0xe0, &[&[0x97], &props(&[&[0x1f], &s(&why)])]);
        assert_eq!(written(|out| disconnect(out, 0x97, Some(&why), None)), expected, "{length}");
    }
}

/// What MQTT cannot carry is cut, and between characters.
#[test]
fn too_long_strings_are_cut() {
    let why = "é".repeat(40_000); // two bytes each
    let expected = packet(0xe0, &[&[0x97], &props(&[&[0x1f], &s("é".repeat(32_767))])]);
    assert_eq!(written(|out| disconnect(out, 0x97, Some(&why), None)), expected);
}

#[test]
fn acknowledgements() {
    let all = [
        (puback as fn(&mut Vec<u8>, Version, u16, u8, Option<&str>) -> usize, 0x40),
        (pubrec, 0x50),
        (pubrel, 0x62),
        (pubcomp, 0x70),
    ];
    for (ack, first_byte) in all {
        assert_eq!(written(|out| ack(out, Version::V4, 258, 0x87, Some("no"))), [first_byte, 2, 1, 2]);
        assert_eq!(written(|out| ack(out, Version::V5, 258, 0, None)), [first_byte, 2, 1, 2]);
        assert_eq!(written(|out| ack(out, Version::V5, 258, 0x92, None)), [first_byte, 3, 1, 2, 0x92]);
        assert_eq!(
            written(|out| ack(out, Version::V5, 258, 0x92, Some("no"))),
            [first_byte, 9, 1, 2, 0x92, 5, 0x1f, 0, 2, b'n', b'o']
        );
        assert_eq!(
            written(|out| ack(out, Version::V5, 258, 0, Some("no"))),
            [first_byte, 9, 1, 2, 0, 5, 0x1f, 0, 2, b'n', b'o']
        );
    }
}

/// §3.9.3 figure 3-26 has granted QoS 0, granted QoS 2, unspecified error; 3.1.1 §3.9.3 figure 3.26 the same.
#[test]
fn subscription_acknowledgements() {
    let codes = [0x00, 0x02, 0x80];
    assert_eq!(written(|out| suback(out, Version::V5, 10, &codes)), [0x90, 6, 0, 10, 0, 0, 2, 0x80]);
    assert_eq!(written(|out| suback(out, Version::V4, 10, &codes)), [0x90, 5, 0, 10, 0, 2, 0x80]);
    assert_eq!(written(|out| suback(out, Version::V4, 10, &[0x87, 0x8f])), [0x90, 4, 0, 10, 0x80, 0x80]);
    assert_eq!(written(|out| unsuback(out, Version::V5, 10, &[0, 0x11])), [0xb0, 5, 0, 10, 0, 0, 0x11]);
    assert_eq!(written(|out| unsuback(out, Version::V4, 10, &[0, 0x11])), [0xb0, 2, 0, 10]);
    assert_eq!(written(|out| suback(out, Version::V5, 1, &[1; 200]))[..3], [0x90, 203, 1]);
}

#[test]
fn the_rest() {
    assert_eq!(written(pingresp), [0xd0, 0]);
    assert_eq!(written(|out| disconnect(out, 0, None, None)), [0xe0, 0]);
    assert_eq!(written(|out| disconnect(out, 0x8b, None, None)), [0xe0, 1, 0x8b]);
    assert_eq!(
        written(|out| disconnect(out, 0x9c, Some("drain"), Some("b"))),
        packet(0xe0, &[&[0x9c], &props(&[&[0x1f], &s("drain"), &[0x1c], &s("b")])])
    );
    let properties = AuthProperties { method: "m", data: Some(&[1]), reason_string: Some("go on") };
    assert_eq!(
        written(|out| auth(out, 0x18, &properties)),
        packet(0xf0, &[&[0x18], &props(&[&[0x15], &s("m"), &[0x16], &s([1]), &[0x1f], &s("go on")])])
    );
}
