//! Packets that a server must not accept: for each the section that forbids it, what is said of it, and the reason code.

use super::codec::{DecodeError, Version, connect_version, decode, frame};
use super::{packet, props, s};

const V4: Option<Version> = Some(Version::V4);
const V5: Option<Version> = Some(Version::V5);

struct Case {
    section: &'static str,
    version: Option<Version>,
    bytes: Vec<u8>,
    error: &'static str,
    reason_code: u8,
}

fn case(
    section: &'static str,
    version: Option<Version>,
    bytes: Vec<u8>,
    error: &'static str,
    reason_code: u8,
) -> Case {
    Case { section, version, bytes, error, reason_code }
}

/// CONNECT of a level with flags and keep alive 60; `rest` begins with the properties in 5.0.
fn connect(level: u8, flags: u8, rest: &[&[u8]]) -> Vec<u8> {
    let mut body = vec![s("MQTT"), vec![level, flags, 0, 60]];
    body.extend(rest.iter().map(|part| part.to_vec()));
    packet(0x10, &body.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// CONNECT of 5.0 with clean start, these properties, and client identifier "c".
fn connect_with(properties: &[&[u8]]) -> Vec<u8> {
    connect(5, 0b10, &[&props(properties), &s("c")])
}

/// PUBLISH of 5.0, QoS 0, to "t" with these properties and payload "x".
fn publish_with(properties: &[&[u8]]) -> Vec<u8> {
    packet(0x30, &[&s("t"), &props(properties), b"x"])
}

fn subscribe(filter: impl AsRef<[u8]>, options: u8) -> Vec<u8> {
    packet(0x82, &[&[0, 1], &props(&[]), &s(filter), &[options]])
}

fn headers() -> Vec<Case> {
    vec![
        case("2.1.2", V5, vec![0x00, 0], "there is no packet type 0", 0x81),
        case("2.1.2", V5, vec![0x20, 2, 0, 0], "CONNACK: only a server sends it", 0x82),
        case("2.1.2", V5, vec![0x90, 3, 0, 1, 0], "SUBACK: only a server sends it", 0x82),
        case("2.1.2", V5, vec![0xb0, 2, 0, 1], "UNSUBACK: only a server sends it", 0x82),
        case("2.1.2", V5, vec![0xd0, 0], "PINGRESP: only a server sends it", 0x82),
        case("3.1.1 2.2.1", V4, vec![0xf0, 0], "AUTH is not in MQTT 3.1.1", 0x81),
        case("2.1.3", None, vec![0x11, 0], "CONNECT: header flags are 0b0001, must be 0b0000", 0x81),
        case("2.1.3", V5, vec![0x42, 2, 0, 1], "PUBACK: header flags are 0b0010, must be 0b0000", 0x81),
        case("3.6.1", V5, vec![0x60, 2, 0, 1], "PUBREL: header flags are 0b0000, must be 0b0010", 0x81),
        case("3.8.1", V5, vec![0x80, 0], "SUBSCRIBE: header flags are 0b0000, must be 0b0010", 0x81),
        case("3.10.1", V4, vec![0xa3, 0], "UNSUBSCRIBE: header flags are 0b0011, must be 0b0010", 0x81),
        case("3.12.1", V4, vec![0xc1, 0], "PINGREQ: header flags are 0b0001, must be 0b0000", 0x81),
        case("3.14.1", V5, vec![0xe8, 0], "DISCONNECT: header flags are 0b1000, must be 0b0000", 0x81),
        case("3.15.1", V5, vec![0xf1, 0], "AUTH: header flags are 0b0001, must be 0b0000", 0x81),
        case(
            "1.5.5",
            V5,
            vec![0x30, 0xff, 0xff, 0xff, 0xff, 0x7f],
            "remaining length takes more than four bytes",
            0x81,
        ),
        case(
            "1.5.5",
            V5,
            vec![0xc0, 0x80, 0x00],
            "PINGREQ: remaining length: not a variable byte integer of the fewest possible bytes",
            0x81,
        ),
        case("2.1.4", V5, vec![0xc0, 1, 0], "PINGREQ: 1 bytes too many at its end", 0x81),
        case("2.1.4", V4, vec![0xe0, 1, 0], "DISCONNECT: 1 bytes too many at its end", 0x81),
        case("2.1.4", V4, vec![0x40, 3, 0, 1, 0], "PUBACK: 1 bytes too many at its end", 0x81),
        case("3.1", None, vec![0xc0, 0], "PINGREQ before CONNECT", 0x82),
        case("3.1", None, vec![0x30, 3, 0, 1, b't'], "PUBLISH before CONNECT", 0x82),
        case("3.1", V5, connect_with(&[]), "a second CONNECT", 0x82),
        case("3.1", V4, connect(4, 2, &[&s("c")]), "a second CONNECT", 0x82),
        case("-", V5, vec![], "not exactly one packet: its header says 2 bytes, there are 0", 0x81),
        case("-", V5, vec![0xc0], "not exactly one packet: its header says 2 bytes, there are 1", 0x81),
        case(
            "-",
            V5,
            vec![0xc0, 0, 0xc0, 0],
            "not exactly one packet: its header says 2 bytes, there are 4",
            0x81,
        ),
    ]
}

fn connects() -> Vec<Case> {
    vec![
        case(
            "3.1.2.1",
            None,
            packet(0x10, &[&s("HTTP"), &[5, 2, 0, 0, 0, 0, 0]]),
            "CONNECT: protocol name is not MQTT",
            0x84,
        ),
        case(
            "3.1.2.1",
            None,
            packet(0x10, &[&s("mqtt"), &[4, 2, 0, 0, 0, 0]]),
            "CONNECT: protocol name is not MQTT",
            0x84,
        ),
        case(
            "3.1.2.1",
            None,
            packet(0x10, &[&s("MQIsdp"), &[4, 2, 0, 0, 0, 0]]),
            "CONNECT: protocol name is not MQTT",
            0x84,
        ),
        case(
            "3.1.2.2",
            None,
            packet(0x10, &[&s("MQIsdp"), &[3, 2, 0, 0], &s("c")]),
            "CONNECT: protocol level 3 is not supported, only 4 (3.1.1) and 5 (5.0)",
            0x84,
        ),
        case(
            "3.1.2.2",
            None,
            connect(6, 2, &[&[0], &s("c")]),
            "CONNECT: protocol level 6 is not supported, only 4 (3.1.1) and 5 (5.0)",
            0x84,
        ),
        case(
            "3.1.2.2",
            None,
            connect(0x84, 2, &[&s("c")]),
            "CONNECT: protocol level 132 is not supported, only 4 (3.1.1) and 5 (5.0)",
            0x84,
        ),
        case(
            "3.1.2.1",
            None,
            packet(0x10, &[]),
            "CONNECT: protocol name: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.2.1",
            None,
            packet(0x10, &[&[0, 4, b'M']]),
            "CONNECT: protocol name: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.2.2",
            None,
            packet(0x10, &[&s("MQTT")]),
            "CONNECT: protocol level: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.2.3",
            None,
            packet(0x10, &[&s("MQTT"), &[5]]),
            "CONNECT: connect flags: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.2.10",
            None,
            packet(0x10, &[&s("MQTT"), &[5, 2, 0]]),
            "CONNECT: keep alive: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.2.3",
            None,
            connect(5, 0b11, &[&[0], &s("c")]),
            "CONNECT: connect flags: 0b00000011 has reserved bits set",
            0x81,
        ),
        case(
            "3.1.1 3.1.2.3",
            None,
            connect(4, 0b11, &[&s("c")]),
            "CONNECT: connect flags: 0b00000011 has reserved bits set",
            0x81,
        ),
        case(
            "3.1.2.6",
            None,
            connect(5, 0b1_1110, &[&[0], &s("c"), &[0], &s("w"), &s("")]),
            "CONNECT: will: QoS 3 does not exist",
            0x81,
        ),
        case(
            "3.1.2.6",
            None,
            connect(5, 0b1010, &[&[0], &s("c")]),
            "CONNECT: will QoS or will retain without a will",
            0x81,
        ),
        case(
            "3.1.2.7",
            None,
            connect(4, 0b10_0010, &[&s("c")]),
            "CONNECT: will QoS or will retain without a will",
            0x81,
        ),
        case(
            "3.1.1 3.1.2.9",
            None,
            connect(4, 0b100_0010, &[&s("c"), &s("p")]),
            "CONNECT: password without user name",
            0x81,
        ),
        case(
            "3.1.1 3.1.3.1",
            None,
            connect(4, 0, &[&s("")]),
            "CONNECT: client identifier is empty and the session is not clean",
            0x85,
        ),
        case("3.1.2.11", None, connect(5, 2, &[]), "CONNECT: properties: the packet ends inside of it", 0x81),
        case(
            "3.1.2.11",
            None,
            connect(5, 2, &[&[9], &s("c")]),
            "CONNECT: properties: the packet ends inside of it",
            0x81,
        ),
        case(
            "1.5.5",
            None,
            connect(5, 2, &[&[0x80, 0x00], &s("c")]),
            "CONNECT: properties: not a variable byte integer of the fewest possible bytes",
            0x81,
        ),
        case(
            "1.5.5",
            None,
            connect(5, 2, &[&[0x80, 0x80, 0x80, 0x80, 0x01], &s("c")]),
            "CONNECT: properties: not a variable byte integer of the fewest possible bytes",
            0x81,
        ),
        case(
            "3.1.3.1",
            None,
            connect(5, 2, &[&[0]]),
            "CONNECT: client identifier: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.3.1",
            None,
            connect(5, 2, &[&[0], &s([0xff])]),
            "CONNECT: client identifier: not UTF-8",
            0x81,
        ),
        case(
            "1.5.4",
            None,
            connect(5, 2, &[&[0], &s([0xed, 0xa0, 0x80])]),
            "CONNECT: client identifier: not UTF-8",
            0x81,
        ),
        case(
            "1.5.4",
            None,
            connect(5, 2, &[&[0], &s([0xc0, 0x80])]),
            "CONNECT: client identifier: not UTF-8",
            0x81,
        ),
        case(
            "1.5.4",
            None,
            connect(5, 2, &[&[0], &s("a\0b")]),
            "CONNECT: client identifier: has the character U+0000",
            0x81,
        ),
        case(
            "3.1.1 1.5.3",
            None,
            connect(4, 2, &[&s("a\0b")]),
            "CONNECT: client identifier: has the character U+0000",
            0x81,
        ),
        case(
            "3.1.3.3",
            None,
            connect(5, 0b110, &[&[0], &s("c"), &[0]]),
            "CONNECT: will topic: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.3.3",
            None,
            connect(5, 0b110, &[&[0], &s("c"), &[0], &s(""), &s("")]),
            "CONNECT: will topic: is empty",
            0x82,
        ),
        case(
            "4.7.1",
            None,
            connect(4, 0b110, &[&s("c"), &s("a/+"), &s("")]),
            "CONNECT: will topic: has a wildcard",
            0x90,
        ),
        case(
            "3.1.3.3",
            None,
            connect(4, 0b110, &[&s("c"), &s([0xff]), &s("")]),
            "CONNECT: will topic: not UTF-8",
            0x81,
        ),
        case(
            "3.1.3.4",
            None,
            connect(4, 0b110, &[&s("c"), &s("w"), &[0, 9]]),
            "CONNECT: will payload: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.3.2",
            None,
            connect(5, 0b110, &[&[0], &s("c"), &[2, 0x23, 0]]),
            "CONNECT: will properties: topic alias does not belong here",
            0x81,
        ),
        case(
            "3.1.3.2",
            None,
            connect(5, 0b110, &[&[0], &s("c"), &[5, 0x11, 0, 0, 0, 1]]),
            "CONNECT: will properties: session expiry interval does not belong here",
            0x81,
        ),
        case(
            "3.1.3.2.2",
            None,
            connect(
                5,
                0b110,
                &[&[0], &s("c"), &props(&[&[0x18, 0, 0, 0, 1], &[0x18, 0, 0, 0, 1]]), &s("w"), &s("")],
            ),
            "CONNECT: will properties: will delay interval is there twice",
            0x82,
        ),
        case(
            "3.1.3.5",
            None,
            connect(4, 0b1000_0010, &[&s("c")]),
            "CONNECT: user name: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.1.3.5",
            None,
            connect(4, 0b1000_0010, &[&s("c"), &s([0x80])]),
            "CONNECT: user name: not UTF-8",
            0x81,
        ),
        case(
            "3.1.3.6",
            None,
            connect(4, 0b1100_0010, &[&s("c"), &s("u")]),
            "CONNECT: password: the packet ends inside of it",
            0x81,
        ),
        case("3.1.3", None, connect(4, 2, &[&s("c"), b"more"]), "CONNECT: 4 bytes too many at its end", 0x81),
    ]
}

fn properties() -> Vec<Case> {
    vec![
        case("2.2.2.2", None, connect_with(&[&[0x00]]), "CONNECT: properties: there is no property 0", 0x81),
        case(
            "2.2.2.2",
            None,
            connect_with(&[&[0x04, 0]]),
            "CONNECT: properties: there is no property 4",
            0x81,
        ),
        case(
            "2.2.2.2",
            None,
            connect_with(&[&[0xff, 0x7f]]),
            "CONNECT: properties: there is no property 16383",
            0x81,
        ),
        case(
            "2.2.2.2",
            None,
            connect_with(&[&[0x23, 0, 1]]),
            "CONNECT: properties: topic alias does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            None,
            connect_with(&[&[0x25, 1]]),
            "CONNECT: properties: retain available does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            publish_with(&[&[0x11, 0, 0, 0, 1]]),
            "PUBLISH: properties: session expiry interval does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            publish_with(&[&[0x1f], &s("why")]),
            "PUBLISH: properties: reason string does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            packet(0x82, &[&[0, 1], &[2, 0x01, 1], &s("t"), &[0]]),
            "SUBSCRIBE: properties: payload format indicator does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            packet(0xa2, &[&[0, 1], &[2, 0x0b, 1], &s("t")]),
            "UNSUBSCRIBE: properties: subscription identifier does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            packet(0x40, &[&[0, 1, 0], &[5, 0x11, 0, 0, 0, 1]]),
            "PUBACK: properties: session expiry interval does not belong here",
            0x81,
        ),
        case(
            "2.2.2.2",
            V5,
            packet(0xe0, &[&[0], &props(&[&[0x15], &s("m")])]),
            "DISCONNECT: properties: authentication method does not belong here",
            0x81,
        ),
        case(
            "3.3.4",
            V5,
            publish_with(&[&[0x0b, 1]]),
            "PUBLISH: properties: only a server sends subscription identifier",
            0x82,
        ),
        case(
            "3.14.2.2.5",
            V5,
            packet(0xe0, &[&[0], &props(&[&[0x1c], &s("elsewhere")])]),
            "DISCONNECT: properties: only a server sends server reference",
            0x82,
        ),
        case(
            "2.2.2",
            None,
            connect_with(&[&[0x11, 0, 0]]),
            "CONNECT: session expiry interval: the packet ends inside of it",
            0x81,
        ),
        case(
            "2.2.2",
            None,
            connect_with(&[&[0x26], &s("name")]),
            "CONNECT: user property value: the packet ends inside of it",
            0x81,
        ),
        case(
            "1.5.7",
            None,
            connect_with(&[&[0x26], &s([0xfe]), &s("v")]),
            "CONNECT: user property name: not UTF-8",
            0x81,
        ),
        case(
            "1.5.7",
            V5,
            publish_with(&[&[0x26], &s("n"), &s("a\0")]),
            "PUBLISH: user property value: has the character U+0000",
            0x81,
        ),
        case(
            "3.1.2.11.2",
            None,
            connect_with(&[&[0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1]]),
            "CONNECT: properties: session expiry interval is there twice",
            0x82,
        ),
        case(
            "3.1.2.11.3",
            None,
            connect_with(&[&[0x21, 0, 0]]),
            "CONNECT: receive maximum: must not be 0",
            0x82,
        ),
        case(
            "3.1.2.11.3",
            None,
            connect_with(&[&[0x21, 0, 1, 0x21, 0, 1]]),
            "CONNECT: properties: receive maximum is there twice",
            0x82,
        ),
        case(
            "3.1.2.11.4",
            None,
            connect_with(&[&[0x27, 0, 0, 0, 0]]),
            "CONNECT: maximum packet size: must not be 0",
            0x82,
        ),
        case(
            "3.1.2.11.5",
            None,
            connect_with(&[&[0x22, 0, 1, 0x22, 0, 1]]),
            "CONNECT: properties: topic alias maximum is there twice",
            0x82,
        ),
        case(
            "3.1.2.11.6",
            None,
            connect_with(&[&[0x19, 2]]),
            "CONNECT: request response information: must not be 2",
            0x82,
        ),
        case(
            "3.1.2.11.7",
            None,
            connect_with(&[&[0x17, 0xff]]),
            "CONNECT: request problem information: must not be 255",
            0x82,
        ),
        case(
            "3.1.2.11.10",
            None,
            connect_with(&[&[0x16], &s("data")]),
            "CONNECT: authentication data without authentication method",
            0x82,
        ),
        case(
            "3.1.2.11.9",
            None,
            connect_with(&[&[0x15], &s("m"), &[0x15], &s("m")]),
            "CONNECT: properties: authentication method is there twice",
            0x82,
        ),
        case(
            "3.3.2.3.2",
            V5,
            publish_with(&[&[0x01, 2]]),
            "PUBLISH: payload format indicator: must not be 2",
            0x82,
        ),
        case(
            "3.3.2.3.3",
            V5,
            publish_with(&[&[0x02, 0, 0, 0, 9, 0x02, 0, 0, 0, 9]]),
            "PUBLISH: properties: message expiry interval is there twice",
            0x82,
        ),
        case("3.3.2.3.4", V5, publish_with(&[&[0x23, 0, 0]]), "PUBLISH: topic alias is 0", 0x94),
        case(
            "3.3.2.3.4",
            V5,
            publish_with(&[&[0x23, 0, 1, 0x23, 0, 2]]),
            "PUBLISH: properties: topic alias is there twice",
            0x82,
        ),
        case(
            "3.3.2.3.5",
            V5,
            publish_with(&[&[0x08], &s("a/#")]),
            "PUBLISH: response topic: has a wildcard",
            0x90,
        ),
        case("4.7.3", V5, publish_with(&[&[0x08], &s("")]), "PUBLISH: response topic: is empty", 0x82),
        case(
            "3.3.2.3.5",
            V5,
            publish_with(&[&[0x08], &s([0xc3])]),
            "PUBLISH: response topic: not UTF-8",
            0x81,
        ),
        case(
            "3.3.2.3.6",
            V5,
            publish_with(&[&[0x09], &s("1"), &[0x09], &s("2")]),
            "PUBLISH: properties: correlation data is there twice",
            0x82,
        ),
        case(
            "3.3.2.3.9",
            V5,
            publish_with(&[&[0x03], &s([0xff, 0xff])]),
            "PUBLISH: content type: not UTF-8",
            0x81,
        ),
        case(
            "3.3.2.3.9",
            V5,
            publish_with(&[&[0x03, 0, 9, b'x']]),
            "PUBLISH: content type: the packet ends inside of it",
            0x81,
        ),
    ]
}

fn publishes() -> Vec<Case> {
    vec![
        case(
            "3.3.1.2",
            V5,
            packet(0x36, &[&s("t"), &[0, 1, 0]]),
            "PUBLISH: header: QoS 3 does not exist",
            0x81,
        ),
        case(
            "3.1.1 3.3.1.2",
            V4,
            packet(0x36, &[&s("t"), &[0, 1]]),
            "PUBLISH: header: QoS 3 does not exist",
            0x81,
        ),
        case("3.3.1.1", V4, packet(0x38, &[&s("t")]), "PUBLISH: DUP is set on QoS 0", 0x81),
        case("3.3.2.1", V4, packet(0x30, &[]), "PUBLISH: topic: the packet ends inside of it", 0x81),
        case(
            "3.3.2.1",
            V4,
            packet(0x30, &[&[0, 9, b't']]),
            "PUBLISH: topic: the packet ends inside of it",
            0x81,
        ),
        case("3.3.2.1", V4, packet(0x30, &[&s([b'a', 0xe2, 0x82])]), "PUBLISH: topic: not UTF-8", 0x81),
        case("1.5.4", V5, packet(0x30, &[&s("a\0"), &[0]]), "PUBLISH: topic: has the character U+0000", 0x81),
        case("3.3.2.1", V4, packet(0x30, &[&s("a/+/b")]), "PUBLISH: topic: has a wildcard", 0x90),
        case("3.3.2.1", V5, packet(0x30, &[&s("#"), &[0]]), "PUBLISH: topic: has a wildcard", 0x90),
        case("3.1.1 4.7.3", V4, packet(0x30, &[&s("")]), "PUBLISH: topic: is empty", 0x82),
        case("3.3.2.1", V5, packet(0x30, &[&s(""), &[0], b"x"]), "PUBLISH: topic: is empty", 0x82),
        case("2.2.1", V5, packet(0x32, &[&s("t"), &[0, 0, 0]]), "PUBLISH: packet identifier is 0", 0x82),
        case("2.2.1", V4, packet(0x34, &[&s("t"), &[0, 0]]), "PUBLISH: packet identifier is 0", 0x82),
        case(
            "3.3.2.2",
            V4,
            packet(0x32, &[&s("t"), &[1]]),
            "PUBLISH: packet identifier: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.3.2.3",
            V5,
            packet(0x30, &[&s("t")]),
            "PUBLISH: properties: the packet ends inside of it",
            0x81,
        ),
    ]
}

fn acknowledgements() -> Vec<Case> {
    vec![
        case(
            "3.4.2",
            V5,
            packet(0x40, &[&[1]]),
            "PUBACK: packet identifier: the packet ends inside of it",
            0x81,
        ),
        case("3.4.2", V4, packet(0x40, &[]), "PUBACK: packet identifier: the packet ends inside of it", 0x81),
        case("2.2.1", V4, packet(0x40, &[&[0, 0]]), "PUBACK: packet identifier is 0", 0x82),
        case(
            "3.4.2.1",
            V5,
            packet(0x40, &[&[0, 1, 0x92]]),
            "PUBACK: reason code 0x92 is not one that a client may send",
            0x82,
        ),
        case(
            "3.5.2.1",
            V5,
            packet(0x50, &[&[0, 1, 0x01]]),
            "PUBREC: reason code 0x01 is not one that a client may send",
            0x82,
        ),
        case(
            "3.6.2.1",
            V5,
            packet(0x62, &[&[0, 1, 0x10]]),
            "PUBREL: reason code 0x10 is not one that a client may send",
            0x82,
        ),
        case(
            "3.7.2.1",
            V5,
            packet(0x70, &[&[0, 1, 0x80]]),
            "PUBCOMP: reason code 0x80 is not one that a client may send",
            0x82,
        ),
        case(
            "3.4.2.2",
            V5,
            packet(0x40, &[&[0, 1, 0, 3, 0x1f]]),
            "PUBACK: properties: the packet ends inside of it",
            0x81,
        ),
        case("3.4.2.2", V5, packet(0x40, &[&[0, 1, 0, 0, 7]]), "PUBACK: 1 bytes too many at its end", 0x81),
        case(
            "3.4.2.2.2",
            V5,
            packet(0x40, &[&[0, 1, 0], &props(&[&[0x1f], &s("a"), &[0x1f], &s("b")])]),
            "PUBACK: properties: reason string is there twice",
            0x82,
        ),
    ]
}

fn subscriptions() -> Vec<Case> {
    vec![
        case("3.8.3", V5, packet(0x82, &[&[0, 1, 0]]), "SUBSCRIBE: has no topic filter", 0x82),
        case("3.1.1 3.8.3", V4, packet(0x82, &[&[0, 1]]), "SUBSCRIBE: has no topic filter", 0x82),
        case("2.2.1", V4, packet(0x82, &[&[0, 0], &s("t"), &[0]]), "SUBSCRIBE: packet identifier is 0", 0x82),
        case(
            "3.8.3",
            V4,
            packet(0x82, &[&[0, 1], &s("t")]),
            "SUBSCRIBE: options of filter 1: the packet ends inside of it",
            0x81,
        ),
        case(
            "3.8.3",
            V5,
            packet(0x82, &[&[0, 1, 0], &s("a"), &[1], &s([0xff]), &[1]]),
            "SUBSCRIBE: filter 2: not UTF-8",
            0x81,
        ),
        case(
            "3.8.3",
            V5,
            packet(0x82, &[&[0, 1, 0], &s("a"), &[1], &[0, 3, b'b']]),
            "SUBSCRIBE: filter 2: the packet ends inside of it",
            0x81,
        ),
        case("3.8.3.1", V5, subscribe("t", 3), "SUBSCRIBE: options of filter 1: QoS 3 does not exist", 0x82),
        case(
            "3.1.1 3.8.3",
            V4,
            packet(0x82, &[&[0, 1], &s("t"), &[3]]),
            "SUBSCRIBE: options of filter 1: QoS 3 does not exist",
            0x82,
        ),
        case(
            "3.8.3.1",
            V5,
            subscribe("t", 0x40),
            "SUBSCRIBE: options of filter 1: 0b01000000 has reserved bits set",
            0x81,
        ),
        case(
            "3.8.3.1",
            V5,
            subscribe("t", 0x81),
            "SUBSCRIBE: options of filter 1: 0b10000001 has reserved bits set",
            0x81,
        ),
        case(
            "3.1.1 3.8.3",
            V4,
            packet(0x82, &[&[0, 1], &s("t"), &[0x04]]),
            "SUBSCRIBE: options of filter 1: 0b00000100 has reserved bits set",
            0x81,
        ),
        case(
            "3.8.3.1",
            V5,
            subscribe("t", 0x30),
            "SUBSCRIBE: options of filter 1: retain handling 3 does not exist",
            0x82,
        ),
        case(
            "3.8.3.1",
            V5,
            subscribe("$share/g/t", 0x04),
            "SUBSCRIBE: filter 1: No Local on a shared subscription",
            0x82,
        ),
        case(
            "3.8.2.1.2",
            V5,
            packet(0x82, &[&[0, 1, 2, 0x0b, 0], &s("t"), &[0]]),
            "SUBSCRIBE: subscription identifier: must not be 0",
            0x82,
        ),
        case(
            "3.8.2.1.2",
            V5,
            packet(0x82, &[&[0, 1, 4, 0x0b, 1, 0x0b, 1], &s("t"), &[0]]),
            "SUBSCRIBE: properties: subscription identifier is there twice",
            0x82,
        ),
        case(
            "1.5.5",
            V5,
            packet(0x82, &[&[0, 1, 6, 0x0b, 0xff, 0xff, 0xff, 0xff, 0x01], &s("t"), &[0]]),
            "SUBSCRIBE: subscription identifier: not a variable byte integer of the fewest possible bytes",
            0x81,
        ),
        case("4.7.3", V5, subscribe("", 0), "SUBSCRIBE: filter 1: is empty", 0x8f),
        case(
            "4.7.3",
            V4,
            packet(0x82, &[&[0, 1], &s("a\0b"), &[0]]),
            "SUBSCRIBE: filter 1: has the character U+0000",
            0x81,
        ),
        case("4.7.1.2", V5, subscribe("a/#/b", 0), "SUBSCRIBE: filter 1: '#' is not the last level", 0x8f),
        case(
            "4.7.1.2",
            V5,
            subscribe("a#", 0),
            "SUBSCRIBE: filter 1: a wildcard is not alone in its level",
            0x8f,
        ),
        case(
            "4.7.1.3",
            V5,
            subscribe("a/b+/c", 0),
            "SUBSCRIBE: filter 1: a wildcard is not alone in its level",
            0x8f,
        ),
        case(
            "4.7.1.3",
            V4,
            packet(0x82, &[&[0, 1], &s("a"), &[0], &s("++"), &[0]]),
            "SUBSCRIBE: filter 2: a wildcard is not alone in its level",
            0x8f,
        ),
        case(
            "4.8.2",
            V5,
            subscribe("$share", 0),
            "SUBSCRIBE: filter 1: a shared subscription has no share name",
            0x8f,
        ),
        case(
            "4.8.2",
            V5,
            subscribe("$share//t", 0),
            "SUBSCRIBE: filter 1: a shared subscription has no share name",
            0x8f,
        ),
        case(
            "4.8.2",
            V5,
            subscribe("$share/g", 0),
            "SUBSCRIBE: filter 1: a shared subscription has no topic filter",
            0x8f,
        ),
        case("4.8.2", V5, subscribe("$share/g/", 0), "SUBSCRIBE: filter 1: is empty", 0x8f),
        case(
            "4.8.2",
            V5,
            subscribe("$share/g+/t", 0),
            "SUBSCRIBE: filter 1: a share name has a wildcard",
            0x8f,
        ),
        case("3.10.3", V5, packet(0xa2, &[&[0, 1, 0]]), "UNSUBSCRIBE: has no topic filter", 0x82),
        case("3.1.1 3.10.3", V4, packet(0xa2, &[&[0, 1]]), "UNSUBSCRIBE: has no topic filter", 0x82),
        case("2.2.1", V5, packet(0xa2, &[&[0, 0, 0], &s("t")]), "UNSUBSCRIBE: packet identifier is 0", 0x82),
        case(
            "3.10.3",
            V4,
            packet(0xa2, &[&[0, 1], &s("a"), &s("b"), &s([0xf5])]),
            "UNSUBSCRIBE: filter 3: not UTF-8",
            0x81,
        ),
        case(
            "4.7.1.2",
            V4,
            packet(0xa2, &[&[0, 1], &s("#/a")]),
            "UNSUBSCRIBE: filter 1: '#' is not the last level",
            0x8f,
        ),
    ]
}

fn ends() -> Vec<Case> {
    vec![
        case(
            "3.14.2.1",
            V5,
            packet(0xe0, &[&[0x8e]]),
            "DISCONNECT: reason code 0x8e is not one that a client may send",
            0x82,
        ),
        case(
            "3.14.2.1",
            V5,
            packet(0xe0, &[&[0x01]]),
            "DISCONNECT: reason code 0x01 is not one that a client may send",
            0x82,
        ),
        case("3.14.2.2", V5, packet(0xe0, &[&[0, 0, 0]]), "DISCONNECT: 1 bytes too many at its end", 0x81),
        case(
            "3.14.2.2.2",
            V5,
            packet(0xe0, &[&[0, 10, 0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1]]),
            "DISCONNECT: properties: session expiry interval is there twice",
            0x82,
        ),
        case(
            "3.15.2.1",
            V5,
            packet(0xf0, &[]),
            "AUTH: reason code 0x00 is not one that a client may send",
            0x82,
        ),
        case(
            "3.15.2.1",
            V5,
            packet(0xf0, &[&[0x20, 0]]),
            "AUTH: reason code 0x20 is not one that a client may send",
            0x82,
        ),
        case("3.15.2.2.2", V5, packet(0xf0, &[&[0x18, 0]]), "AUTH: authentication method is missing", 0x82),
        case(
            "3.15.2.2.2",
            V5,
            packet(0xf0, &[&[0x18], &props(&[&[0x16], &s("data")])]),
            "AUTH: authentication method is missing",
            0x82,
        ),
    ]
}

fn cases() -> Vec<Case> {
    [headers(), connects(), properties(), publishes(), acknowledgements(), subscriptions(), ends()]
        .into_iter()
        .flatten()
        .collect()
}

#[test]
fn each_says_what_is_wrong() {
    let cases = cases();
    assert!(cases.len() > 150, "{}", cases.len());
    for Case { section, version, bytes, error, reason_code } in cases {
        match decode(&bytes, version) {
            Ok(packet) => panic!("§{section}: {bytes:02x?} is accepted as {packet:?}, expected: {error}"),
            Err(found) => {
                assert_eq!(found.to_string(), error, "§{section}: {bytes:02x?}");
                assert_eq!(found.reason_code(), reason_code, "§{section}: {error}");
            }
        }
    }
}

/// Whatever is wrong with a header shows in `frame` as in `decode`, before the rest is waited for.
#[test]
fn frame_refuses_what_no_client_sends() {
    for (bytes, error) in [
        (&[0x00_u8][..], "there is no packet type 0"),
        (&[0x20], "CONNACK: only a server sends it"),
        (b"GET / HTTP/1.1", "PUBACK: header flags are 0b0111, must be 0b0000"),
        (&[0x16, 0x03, 0x01], "CONNECT: header flags are 0b0110, must be 0b0000"), // TLS on a plain port
        (&[0x30, 0x80, 0x80, 0x80, 0x80], "remaining length takes more than four bytes"),
        (&[0x30, 99], "PUBLISH: 101 bytes, the limit is 100"),
        (&[0x30, 0xff, 0xff, 0xff, 0x7f], "PUBLISH: 268435460 bytes, the limit is 100"),
    ] {
        assert_eq!(
            frame(bytes, 100).map_err(|error| error.to_string()),
            Err(error.to_owned()),
            "{bytes:02x?}"
        );
    }
    assert_eq!(
        DecodeError::PacketTooLarge { packet: super::codec::PacketType::Publish, bytes: 2, limit: 1 }
            .reason_code(),
        0x95
    );
}

#[test]
fn frame_waits_for_the_whole_packet() {
    let bytes = packet(0x30, &[&s("topic"), &[0], &[b'x'; 200]]);
    for end in 0..bytes.len() {
        assert_eq!(frame(&bytes[..end], 1000), Ok(None), "{end}");
    }
    assert_eq!(frame(&bytes, 1000), Ok(Some(bytes.len())));
    assert_eq!(frame(&bytes, bytes.len()), Ok(Some(bytes.len())));
    assert_eq!(frame(&[bytes.clone(), vec![0xc0, 0]].concat(), 1000), Ok(Some(bytes.len())));
    assert_eq!(super::codec::packet_length(&bytes[..3], 1000), Ok(Some(bytes.len())));
}

/// Every prefix of a valid packet, with its remaining length made right, is either refused or valid in itself; none may
/// panic. And none is accepted where the standard allows nothing to be left out.
#[test]
fn cut_packets_are_refused() {
    let full = connect(
        5,
        0b1110_1110,
        &[
            &props(&[&[0x11, 0, 0, 0, 9, 0x26], &s("n"), &s("v")]),
            &s("client"),
            &props(&[&[0x18, 0, 0, 0, 9]]),
            &s("will/topic"),
            &s("gone"),
            &s("user"),
            &s("secret"),
        ],
    );
    assert!(decode(&full, None).is_ok());
    for end in 2..full.len() {
        let cut = packet(0x10, &[&full[2..end]]);
        assert!(decode(&cut, None).is_err(), "{cut:02x?}");
    }
    let full = packet(0x82, &[&[0, 1], &props(&[&[0x0b, 1]]), &s("a/b"), &[1]]);
    for end in 2..full.len() {
        assert!(decode(&packet(0x82, &[&full[2..end]]), V5).is_err());
    }
}

#[test]
fn version_to_refuse_a_connect_in() {
    let version = |bytes: &[u8]| connect_version(bytes);
    assert_eq!(version(&packet(0x10, &[&s("MQIsdp"), &[3, 2, 0, 0], &s("c")])), Some(Version::V4));
    assert_eq!(version(&connect(4, 0xff, &[])), Some(Version::V4));
    assert_eq!(version(&connect(0x84, 2, &[&s("c")])), Some(Version::V4));
    assert_eq!(version(&connect(5, 0xff, &[])), Some(Version::V5));
    assert_eq!(version(&connect(6, 2, &[])), Some(Version::V5));
    assert_eq!(version(&packet(0x10, &[&s("HTTP"), &[5]])), None);
    assert_eq!(version(&packet(0x10, &[])), None);
    assert_eq!(version(&[0xc0, 0]), None);
    assert_eq!(version(&[]), None);
}
