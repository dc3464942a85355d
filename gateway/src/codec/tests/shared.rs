//! The shared PUBLISH against one that is put together plainly, part by part.

use proptest::prelude::*;

use super::codec::{EncodeError, Packet, PublishFields, QoS, SharedPublish, Variation, Version, decode};
use super::{packet, props, s};

#[derive(Debug, Clone)]
struct Message {
    topic: String,
    payload: Vec<u8>,
    retain: bool,
    payload_format: Option<bool>,
    message_expiry: Option<u32>,
    content_type: Option<String>,
    response_topic: Option<String>,
    correlation_data: Option<Vec<u8>>,
    user_properties: Vec<(String, String)>,
}

impl Message {
    fn fields(&self) -> PublishFields<'_> {
        PublishFields {
            topic: &self.topic,
            payload: &self.payload,
            retain: self.retain,
            payload_format: self.payload_format,
            message_expiry: self.message_expiry,
            content_type: self.content_type.as_deref(),
            response_topic: self.response_topic.as_deref(),
            correlation_data: self.correlation_data.as_deref(),
        }
    }

    fn shared(&self, version: Version) -> SharedPublish {
        let user_properties =
            self.user_properties.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        SharedPublish::encode(version, &self.fields(), user_properties).unwrap()
    }

    /// The frame, from the standard.
    fn plainly(&self, version: Version, variation: &Variation<'_>) -> Vec<u8> {
        let dup = variation.dup && variation.qos != QoS::AtMostOnce;
        let first_byte = 0x30 | u8::from(dup) << 3 | variation.qos.level() << 1 | u8::from(variation.retain);
        let packet_id = if variation.qos == QoS::AtMostOnce {
            vec![]
        } else {
            variation.packet_id.to_be_bytes().to_vec()
        };
        if version == Version::V4 {
            return packet(first_byte, &[&s(&self.topic), &packet_id, &self.payload]);
        }
        let mut block = Vec::new();
        if let Some(seconds) = variation.message_expiry.or(self.message_expiry) {
            block.push(0x02);
            block.extend(seconds.to_be_bytes());
        }
        for &id in variation.subscription_ids {
            block.push(0x0b);
            super::codec::encode::varint(&mut block, id);
        }
        if let Some((alias, _)) = variation.topic_alias {
            block.push(0x23);
            block.extend(alias.to_be_bytes());
        }
        if let Some(utf8) = self.payload_format {
            block.extend([0x01, u8::from(utf8)]);
        }
        for (id, value) in [
            (0x03, self.content_type.as_ref().map(String::as_bytes)),
            (0x08, self.response_topic.as_ref().map(String::as_bytes)),
            (0x09, self.correlation_data.as_deref()),
        ] {
            if let Some(value) = value {
                block.push(id);
                block.extend(s(value));
            }
        }
        for (name, value) in &self.user_properties {
            block.push(0x26);
            block.extend(s(name));
            block.extend(s(value));
        }
        let topic = if matches!(variation.topic_alias, Some((_, false))) { "" } else { &self.topic };
        packet(first_byte, &[&s(topic), &packet_id, &props(&[&block]), &self.payload])
    }
}

fn message() -> impl Strategy<Value = Message> {
    let content = (
        "[a-zé/ ]{1,40}",
        // Lengths on both sides of where the remaining length gets wider.
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            (16_300_usize..16_500).prop_map(|length| vec![b'x'; length])
        ],
        any::<bool>(),
    );
    let properties = (
        prop::option::of(any::<bool>()),
        prop::option::of(any::<u32>()),
        prop::option::of("[a-z/]{0,20}"),
        prop::option::of("[a-z/]{1,20}"),
        prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
        prop::collection::vec(("[a-z]{0,5}", ".{0,30}".prop_map(|text| text.replace('\0', ""))), 0..5),
    );
    (content, properties).prop_map(
        |(
            (topic, payload, retain),
            (payload_format, message_expiry, content_type, response_topic, correlation_data, user_properties),
        )| Message {
            topic,
            payload,
            retain,
            payload_format,
            message_expiry,
            content_type,
            response_topic,
            correlation_data,
            user_properties,
        },
    )
}

#[derive(Debug, Clone)]
struct Own {
    qos: QoS,
    dup: bool,
    retain: bool,
    packet_id: u16,
    subscription_ids: Vec<u32>,
    topic_alias: Option<(u16, bool)>,
    message_expiry: Option<u32>,
}

impl Own {
    fn variation(&self) -> Variation<'_> {
        Variation {
            qos: self.qos,
            dup: self.dup,
            retain: self.retain,
            packet_id: self.packet_id,
            subscription_ids: &self.subscription_ids,
            topic_alias: self.topic_alias,
            message_expiry: self.message_expiry,
        }
    }
}

fn own() -> impl Strategy<Value = Own> {
    (
        (0_u8..3).prop_map(|level| QoS::from_level(level).unwrap()),
        any::<bool>(),
        any::<bool>(),
        1_u16..,
        prop::collection::vec(1_u32..268_435_456, 0..40),
        prop::option::of((1_u16.., any::<bool>())),
        prop::option::of(any::<u32>()),
    )
        .prop_map(|(qos, dup, retain, packet_id, subscription_ids, topic_alias, message_expiry)| Own {
            qos,
            dup,
            retain,
            packet_id,
            subscription_ids,
            topic_alias,
            message_expiry,
        })
}

proptest! {
    #[test]
    fn every_variation_is_the_plain_encoding(message in message(), own in own(), v5: bool) {
        let version = if v5 { Version::V5 } else { Version::V4 };
        let shared = message.shared(version);
        let variation = own.variation();
        let expected = message.plainly(version, &variation);

        let mut out = b"before".to_vec();
        shared.write(&mut out, &variation);
        prop_assert_eq!(&out[6..], &expected);
        prop_assert_eq!(shared.len_with(&variation), expected.len());
        let mut scratch = b"left over".to_vec();
        prop_assert_eq!(shared.pieces(&variation, &mut scratch).concat(), expected);

        let plain = message.plainly(version, &Variation { retain: message.retain, ..Default::default() });
        prop_assert_eq!(shared.plain(), plain);
        prop_assert_eq!(shared.topic(), &message.topic);
        prop_assert_eq!(shared.payload(), &message.payload);
    }

    /// What a client would see in it, told by the decoder.
    #[test]
    fn a_frame_says_what_was_encoded(message in message(), own in own()) {
        let shared = message.shared(Version::V5);
        let mut out = Vec::new();
        // A server does not take subscription identifiers from a client, so without.
        let variation = Variation { subscription_ids: &[], ..own.variation() };
        shared.write(&mut out, &variation);
        let Packet::Publish(publish) = decode(&out, Some(Version::V5)).unwrap() else { panic!() };
        prop_assert_eq!(publish.qos, own.qos);
        prop_assert_eq!(publish.dup, own.dup && own.qos != QoS::AtMostOnce);
        prop_assert_eq!(publish.retain, own.retain);
        prop_assert_eq!(publish.packet_id, (own.qos != QoS::AtMostOnce).then_some(own.packet_id));
        let left_out = matches!(own.topic_alias, Some((_, false)));
        prop_assert_eq!(publish.topic, if left_out { "" } else { &message.topic });
        prop_assert_eq!(publish.payload, &message.payload);
        prop_assert_eq!(publish.props.topic_alias, own.topic_alias.map(|(alias, _)| alias));
        prop_assert_eq!(publish.props.message_expiry, own.message_expiry.or(message.message_expiry));
        prop_assert_eq!(publish.props.payload_format, message.payload_format);
        prop_assert_eq!(publish.props.content_type, message.content_type.as_deref());
        prop_assert_eq!(publish.props.response_topic, message.response_topic.as_deref());
        prop_assert_eq!(publish.props.correlation_data, message.correlation_data.as_deref());
        let user_properties: Vec<_> =
            publish.props.user_properties.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        prop_assert_eq!(user_properties, message.user_properties);
    }
}

/// A frame goes to any number of receivers without being copied.
#[test]
fn receivers_share_one_buffer() {
    let fields = PublishFields { topic: "demo/all", payload: b"hello", ..Default::default() };
    let shared = SharedPublish::encode(Version::V5, &fields, [("seq", "7")]).unwrap();
    let clone = shared.clone();
    assert!(std::ptr::eq(shared.plain(), clone.plain()));
    assert!(size_of::<SharedPublish>() <= 32);
    let mut scratch = Vec::new();
    let variation = Variation { qos: QoS::AtLeastOnce, packet_id: 1, ..Default::default() };
    let [head, topic, middle, rest] = shared.pieces(&variation, &mut scratch);
    assert!(shared.plain().as_ptr_range().contains(&topic.as_ptr()));
    assert!(shared.plain().as_ptr_range().contains(&rest.as_ptr()));
    assert_eq!((head.len(), middle.len()), (2, 3));
}

#[test]
fn what_mqtt_cannot_carry_is_refused() {
    let long = "x".repeat(65_536);
    let encode = |fields: PublishFields<'_>| SharedPublish::encode(Version::V5, &fields, []).map(|_| ());
    let too_long = |field| Err(EncodeError::FieldTooLong { field, bytes: 65_536 });
    assert_eq!(encode(PublishFields { topic: &long, ..Default::default() }), too_long("topic"));
    assert_eq!(
        encode(PublishFields { topic: "t", content_type: Some(&long), ..Default::default() }),
        too_long("content type")
    );
    assert_eq!(
        SharedPublish::encode(Version::V5, &PublishFields::default(), [("n", long.as_str())]).map(|_| ()),
        too_long("user property value")
    );
    let payload = vec![0; super::codec::MAX_REMAINING_LENGTH];
    let error = encode(PublishFields { topic: "t", payload: &payload, ..Default::default() }).unwrap_err();
    assert!(matches!(error, EncodeError::PacketTooLong { .. }), "{error}");
    // 3.1.1 has no place for it, so it does not matter.
    assert!(
        SharedPublish::encode(
            Version::V4,
            &PublishFields { content_type: Some(&long), topic: "t", ..Default::default() },
            []
        )
        .is_ok()
    );
}
