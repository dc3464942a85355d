//! Any bytes as a packet, in any state of the connection: nothing panics, and what is accepted survives being encoded.
//!
//! The first byte chooses the state: before CONNECT, 3.1.1, 5.0.

#![no_main]

use carillon_gateway_fuzz::gateway::client;
use carillon_gateway_fuzz::gateway::codec::{
    Packet, Publish, PublishFields, QoS, SharedPublish, Variation, Version, connect_version, decode, frame,
};
use libfuzzer_sys::fuzz_target;

const MAX_PACKET_BYTES: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((&state, bytes)) = input.split_first() else { return };
    let version = [None, Some(Version::V4), Some(Version::V5)][usize::from(state % 3)];
    let _ = connect_version(bytes);
    // What is not one packet must be refused, never read beyond or panic.
    let direct = decode(bytes, version);
    let Ok(Some(length)) = frame(bytes, MAX_PACKET_BYTES) else {
        if bytes.len() <= MAX_PACKET_BYTES {
            assert!(direct.is_err());
        }
        return;
    };
    for end in 0..length.min(8) {
        assert_eq!(frame(&bytes[..end], MAX_PACKET_BYTES), Ok(None));
    }
    let packet = match decode(&bytes[..length], version) {
        Ok(packet) => packet,
        Err(error) => {
            assert!(error.reason_code() >= 0x80);
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let _ = format!("{packet:?}");
    let spoken = match &packet {
        Packet::Connect(connect) => {
            assert_eq!(connect_version(bytes), Some(connect.version));
            connect.version
        }
        _ => version.expect("only CONNECT without a version"),
    };
    let encoded = client::encode(&packet, spoken);
    assert_eq!(decode(&encoded, version).as_ref(), Ok(&packet));
    match packet {
        Packet::Publish(publish) => shared(&publish, spoken),
        Packet::Subscribe(subscribe) => assert_eq!(subscribe.filters.len(), subscribe.filters.iter().count()),
        Packet::Unsubscribe(unsubscribe) => {
            assert_eq!(unsubscribe.filters.len(), unsubscribe.filters.iter().count())
        }
        _ => {}
    }
});

/// What was received, sent on, says the same.
fn shared(publish: &Publish<'_>, version: Version) {
    let fields = PublishFields {
        topic: publish.topic,
        payload: publish.payload,
        retain: publish.retain,
        payload_format: publish.props.payload_format,
        message_expiry: publish.props.message_expiry,
        content_type: publish.props.content_type,
        response_topic: publish.props.response_topic,
        correlation_data: publish.props.correlation_data,
    };
    let shared =
        SharedPublish::encode(version, &fields, publish.props.user_properties).expect("it came over MQTT");
    let variation = Variation {
        qos: publish.qos,
        dup: publish.dup,
        retain: publish.retain,
        packet_id: publish.packet_id.unwrap_or_default(),
        topic_alias: publish.props.topic_alias.map(|alias| (alias, true)),
        ..Default::default()
    };
    let mut out = Vec::new();
    shared.write(&mut out, &variation);
    assert_eq!(out.len(), shared.len_with(&variation));
    assert_eq!(shared.pieces(&variation, &mut Vec::new()).concat(), out);
    match decode(&out, Some(version)) {
        Ok(Packet::Publish(again)) => assert_eq!(&again, publish),
        other => panic!("{other:?}"),
    }
    if publish.qos == QoS::AtMostOnce && publish.props.topic_alias.is_none() {
        assert_eq!(shared.plain(), out);
    }
}
