//! The examples that the standards give, byte for byte, and what the two versions tell apart.

use super::codec::{
    Packet, QoS, RetainHandling, SubscribeOptions, Version, decode, encode::varint, encode::varint_width,
    frame,
};
use super::{packet, props, s};

/// §1.5.5 table 1-1; 3.1.1 §2.2.3 table 2.4.
#[test]
fn variable_byte_integers() {
    for (value, bytes) in [
        (0, &[0x00_u8][..]),
        (127, &[0x7f]),
        (128, &[0x80, 0x01]),
        (16_383, &[0xff, 0x7f]),
        (16_384, &[0x80, 0x80, 0x01]),
        (2_097_151, &[0xff, 0xff, 0x7f]),
        (2_097_152, &[0x80, 0x80, 0x80, 0x01]),
        (268_435_455, &[0xff, 0xff, 0xff, 0x7f]),
    ] {
        let mut encoded = Vec::new();
        varint(&mut encoded, value);
        assert_eq!(encoded, bytes, "{value}");
        assert_eq!(varint_width(value as usize), bytes.len(), "{value}");
        let start = [&[0x30], bytes].concat();
        assert_eq!(
            super::codec::packet_length(&start, usize::MAX),
            Ok(Some(1 + bytes.len() + value as usize))
        );
        assert_eq!(frame(&[0x30, 0xff, 0xff, 0xff], usize::MAX), Ok(None));
    }
}

/// §1.5.4 figure 1-2: "A" and U+2A6D4. §1.5.4: U+FEFF is a character as any other.
#[test]
fn strings() {
    let bytes = packet(0x30, &[&[0x00, 0x05, 0x41, 0xf0, 0xaa, 0x9b, 0x94]]);
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V4)) else { panic!() };
    assert_eq!(publish.topic, "A\u{2a6d4}");
    let bytes = packet(0x30, &[&[0x00, 0x03, 0xef, 0xbb, 0xbf]]);
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V4)) else { panic!() };
    assert_eq!(publish.topic, "\u{feff}");
}

/// §3.1.2.12 figure 3-6.
#[test]
fn connect_v5() {
    let bytes = packet(
        0x10,
        &[
            &[0x00, 0x04, b'M', b'Q', b'T', b'T', 0x05, 0b1100_1110, 0x00, 0x0a],
            &[0x05, 0x11, 0x00, 0x00, 0x00, 0x0a],
            &s("client"),
            &props(&[]),
            &s("will"),
            &s("gone"),
            &s("user"),
            &s([0xff]),
        ],
    );
    let Ok(Packet::Connect(connect)) = decode(&bytes, None) else { panic!() };
    assert_eq!(connect.version, Version::V5);
    assert!(connect.clean_start);
    assert_eq!(connect.keep_alive, 10);
    assert_eq!(connect.session_expiry, 10);
    assert_eq!(connect.client_id, "client");
    assert_eq!(connect.username, Some("user"));
    assert_eq!(connect.password, Some(&[0xff][..]));
    let will = connect.will.as_ref().unwrap();
    assert_eq!(
        (will.topic, will.payload, will.qos, will.retain),
        ("will", &b"gone"[..], QoS::AtLeastOnce, false)
    );
    assert_eq!(will.delay_seconds, 0);
    // What is absent has the value that §3.1.2.11 gives it.
    assert_eq!(connect.receive_maximum, 65_535);
    assert_eq!(connect.maximum_packet_size, None);
    assert_eq!(connect.topic_alias_maximum, 0);
    assert!(!connect.request_response_information);
    assert!(connect.request_problem_information);
    let shown = format!("{connect:?}");
    assert!(!shown.contains("255") && shown.contains("user"), "{shown}");
}

/// 3.1.1 §3.1.2.9 figure 3.6 (variable header), and how its clean session is told.
#[test]
fn connect_v4() {
    let head: &[u8] = &[0x00, 0x04, b'M', b'Q', b'T', b'T', 0x04, 0b1100_1110, 0x00, 0x0a];
    let bytes = packet(0x10, &[head, &s("client"), &s("will"), &s("gone"), &s("user"), &s("secret")]);
    let Ok(Packet::Connect(connect)) = decode(&bytes, None) else { panic!() };
    assert_eq!(connect.version, Version::V4);
    assert_eq!((connect.clean_start, connect.session_expiry, connect.keep_alive), (true, 0, 10));
    assert_eq!(connect.password, Some(&b"secret"[..]));

    let bytes = packet(0x10, &[&s("MQTT"), &[4, 0, 0, 0], &s("kept")]);
    let Ok(Packet::Connect(connect)) = decode(&bytes, None) else { panic!() };
    assert_eq!((connect.clean_start, connect.session_expiry), (false, u32::MAX));
}

/// 5.0 §3.1.2.9: a password without a user name; §3.1.3.1: no client identifier without clean start.
#[test]
fn what_only_v5_allows() {
    let bytes = packet(0x10, &[&s("MQTT"), &[5, 0b0100_0000, 0, 0, 0], &s(""), &s("token")]);
    let Ok(Packet::Connect(connect)) = decode(&bytes, None) else { panic!() };
    assert_eq!((connect.client_id, connect.username, connect.password), ("", None, Some(&b"token"[..])));
}

/// 3.1.1 does not demand the shortest remaining length; 5.0 does, see the malformed ones.
#[test]
fn what_only_v4_allows() {
    assert_eq!(decode(&[0xc0, 0x80, 0x00], Some(Version::V4)), Ok(Packet::PingReq));
    assert!(decode(&[0xc0, 0x80, 0x00], Some(Version::V5)).is_err());
}

/// §3.3.2.4 figure 3-9, and an alias in the place of the topic.
#[test]
fn publish() {
    let bytes = [0x32, 11, 0x00, 0x03, 0x61, 0x2f, 0x62, 0x00, 0x0a, 0x00, b'h', b'i', b'!'];
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V5)) else { panic!() };
    assert_eq!((publish.topic, publish.packet_id, publish.payload), ("a/b", Some(10), &b"hi!"[..]));
    assert_eq!((publish.qos, publish.dup, publish.retain), (QoS::AtLeastOnce, false, false));
    // In 3.1.1 the property length is the first byte of the payload.
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V4)) else { panic!() };
    assert_eq!(publish.payload, b"\0hi!");

    let bytes = packet(0x3d, &[&s(""), &[0xff, 0xff], &props(&[&[0x23, 0, 7]])]);
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V5)) else { panic!() };
    assert_eq!((publish.topic, publish.props.topic_alias, publish.packet_id), ("", Some(7), Some(65_535)));
    assert_eq!((publish.qos, publish.dup, publish.retain), (QoS::ExactlyOnce, true, true));
    assert_eq!(publish.payload, b"");
}

/// §3.3.2.3.2: known when asked, but not a malformed packet.
#[test]
fn payload_format() {
    let of = |format: u8, payload: &[u8]| {
        let bytes = packet(0x30, &[&s("t"), &props(&[&[0x01, format]]), payload]);
        let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V5)) else { panic!() };
        publish.payload_is_as_declared()
    };
    assert!(of(1, "grüß".as_bytes()));
    assert!(!of(1, &[0xff]));
    assert!(of(0, &[0xff]));
}

#[test]
fn user_properties_in_order_with_repeated_names() {
    let bytes = packet(
        0x30,
        &[
            &s("t"),
            &props(&[
                &[0x26],
                &s("a"),
                &s("1"),
                &[0x02, 0, 0, 0, 9, 0x26],
                &s("a"),
                &s("2"),
                &[0x03],
                &s("text/plain"),
            ]),
            b"x",
        ],
    );
    let Ok(Packet::Publish(publish)) = decode(&bytes, Some(Version::V5)) else { panic!() };
    assert_eq!(publish.props.user_properties.iter().collect::<Vec<_>>(), [("a", "1"), ("a", "2")]);
    assert_eq!(publish.props.user_properties.get("a"), Some("1"));
    assert_eq!(publish.props.user_properties.get("b"), None);
    assert_eq!(publish.props.content_type, Some("text/plain"));
    assert_eq!(publish.props.message_expiry, Some(9));
}

/// §3.4.2.1, §3.4.2.2.1, §3.14.2.1: what may be left out from the end.
#[test]
fn short_forms() {
    for (first_byte, code) in [(0x40, 0x10), (0x50, 0x97), (0x62, 0x92), (0x70, 0x92)] {
        for (body, expected) in [
            (&[0, 1][..], 0),
            (&[0, 1, code], code),
            (&[0, 1, code, 0], code),
            (&[0, 1, code, 6, 0x1f, 0, 3, 98, 97, 100], code),
        ] {
            let bytes = packet(first_byte, &[body]);
            let decoded = decode(&bytes, Some(Version::V5));
            let (Ok(Packet::PubAck(ack))
            | Ok(Packet::PubRec(ack))
            | Ok(Packet::PubRel(ack))
            | Ok(Packet::PubComp(ack))) = decoded
            else {
                panic!("{bytes:02x?}: {decoded:?}")
            };
            assert_eq!((ack.packet_id, ack.reason_code), (1, expected));
            assert_eq!(ack.reason_string, (body.len() > 4).then_some("bad"));
        }
    }
    for (bytes, code) in [(&[0xe0, 0][..], 0), (&[0xe0, 1, 4], 4), (&[0xe0, 2, 0x98, 0], 0x98)] {
        let Ok(Packet::Disconnect(disconnect)) = decode(bytes, Some(Version::V5)) else {
            panic!("{bytes:02x?}")
        };
        assert_eq!(disconnect.reason_code, code);
    }
    let Ok(Packet::Disconnect(disconnect)) = decode(&[0xe0, 0], Some(Version::V4)) else { panic!() };
    assert_eq!(disconnect.reason_code, 0);
}

/// §3.8.3.2 figures 3-21 and 3-23; 3.1.1 §3.8.3.1 figure 3.23.
#[test]
fn subscribe() {
    let payload = [0x00, 0x03, 0x61, 0x2f, 0x62, 0x01, 0x00, 0x03, 0x63, 0x2f, 0x64, 0x02];
    let qos = |qos| SubscribeOptions { qos, ..Default::default() };
    let expected = [("a/b", qos(QoS::AtLeastOnce)), ("c/d", qos(QoS::ExactlyOnce))];
    for (version, head) in [(Version::V4, &[0x00, 0x0a][..]), (Version::V5, &[0x00, 0x0a, 0x00])] {
        let bytes = packet(0x82, &[head, &payload]);
        let Ok(Packet::Subscribe(subscribe)) = decode(&bytes, Some(version)) else { panic!() };
        assert_eq!(subscribe.packet_id, 10);
        assert_eq!(subscribe.filters.len(), 2);
        assert_eq!(subscribe.filters.iter().len(), 2);
        assert_eq!(subscribe.filters.iter().collect::<Vec<_>>(), expected);
    }
    let bytes = packet(0x82, &[&[0, 1], &props(&[&[0x0b, 0x80, 0x01]]), &s("$share/g/+/x/#"), &[0x29]]);
    let Ok(Packet::Subscribe(subscribe)) = decode(&bytes, Some(Version::V5)) else { panic!() };
    assert_eq!(subscribe.subscription_id, Some(128));
    let options = SubscribeOptions {
        qos: QoS::AtLeastOnce,
        no_local: false,
        retain_as_published: true,
        retain_handling: RetainHandling::DoNotSend,
    };
    assert_eq!(subscribe.filters.iter().collect::<Vec<_>>(), [("$share/g/+/x/#", options)]);
}

/// §3.10.3.1 figure 3-30; 3.1.1 §3.10.3 figure 3.30.
#[test]
fn unsubscribe() {
    let payload = [0x00, 0x03, 0x61, 0x2f, 0x62, 0x00, 0x03, 0x63, 0x2f, 0x64];
    for (version, head) in [(Version::V4, &[0x00, 0x0a][..]), (Version::V5, &[0x00, 0x0a, 0x00])] {
        let bytes = packet(0xa2, &[head, &payload]);
        let Ok(Packet::Unsubscribe(unsubscribe)) = decode(&bytes, Some(version)) else { panic!() };
        assert_eq!(unsubscribe.filters.len(), 2);
        assert_eq!(unsubscribe.filters.iter().collect::<Vec<_>>(), ["a/b", "c/d"]);
    }
}

/// §4.7.1, §4.7.3: filters that are valid although they look odd.
#[test]
fn valid_filters() {
    for filter in [
        "#",
        "+",
        "/",
        "//",
        "+/+",
        "/+",
        "a/#",
        "+/a/#",
        "$SYS/#",
        "a b",
        "$share/g/#",
        "$share/g//",
        "$shared",
        "$",
    ] {
        let bytes = packet(0x82, &[&[0, 1, 0], &s(filter), &[0]]);
        assert!(decode(&bytes, Some(Version::V5)).is_ok(), "{filter}");
    }
}

#[test]
fn authentication() {
    let bytes = packet(0xf0, &[&[0x18], &props(&[&[0x15], &s("SCRAM"), &[0x16], &s("secret")])]);
    let Ok(Packet::Auth(auth)) = decode(&bytes, Some(Version::V5)) else { panic!() };
    assert_eq!((auth.reason_code, auth.method, auth.data), (0x18, "SCRAM", Some(&b"secret"[..])));
    assert!(!format!("{auth:?}").contains("115")); // the data is not shown
}
