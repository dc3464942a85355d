//! Any valid packet, encoded as a client would, decodes to itself.

use proptest::prelude::*;

use super::codec::{
    Ack, Auth, Connect, Disconnect, Packet, Publish, PublishProperties, QoS, Subscribe, SubscribeFilters,
    Unsubscribe, UnsubscribeFilters, UserProperties, Version, Will, decode, frame,
};
use super::{client, s};

/// Owned random material, of which a packet of any type is made.
#[derive(Debug, Clone)]
struct Material {
    version: Version,
    numbers: (u16, u32, u32, u16),
    switches: Vec<bool>,
    qos: QoS,
    text: [String; 4],
    binary: [Vec<u8>; 2],
    topic: String,
    filters: Vec<(String, u8)>,
    user_properties: Vec<(String, String)>,
    reason: prop::sample::Index,
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{0,12}", ".{0,30}"].prop_map(|text: String| text.replace('\0', "0"))
}

fn material() -> impl Strategy<Value = Material> {
    let filter = prop_oneof![
        "[a-z$/ ü]{1,20}",
        "([a-z]{0,4}|\\+)(/([a-z]{0,4}|\\+)){0,4}(/#)?".prop_filter("empty", |filter| !filter.is_empty()),
        Just("#".to_owned()),
        "\\$share/[a-z]{1,5}/[a-z]{1,5}",
    ]
    .prop_filter("share", |filter| {
        filter != "$share" && (!filter.starts_with("$share/") || filter.matches('/').count() == 2)
    });
    let options = (0_u8..3, 0_u8..4, 0_u8..3).prop_map(|(qos, flags, retain)| qos | flags << 2 | retain << 4);
    let numbers = (1_u16.., any::<u32>(), 1_u32..268_435_456, any::<u16>());
    (
        (any::<bool>(), numbers, prop::collection::vec(any::<bool>(), 24), 0_u8..3),
        (text(), text(), text(), text()),
        (prop::collection::vec(any::<u8>(), 0..200), prop::collection::vec(any::<u8>(), 0..40)),
        "[a-zA-Z0-9/$ é\u{1f600}]{1,40}",
        prop::collection::vec((filter, options), 1..8),
        prop::collection::vec((text(), text()), 0..4),
        any::<prop::sample::Index>(),
    )
        .prop_map(
            |((v5, numbers, switches, qos), text, binary, topic, filters, user_properties, reason)| {
                Material {
                    version: if v5 { Version::V5 } else { Version::V4 },
                    numbers,
                    switches,
                    qos: QoS::from_level(qos).unwrap(),
                    text: text.into(),
                    binary: binary.into(),
                    topic,
                    filters,
                    user_properties,
                    reason,
                }
            },
        )
}

/// What only 5.0 has, taken if the switch says so.
macro_rules! some {
    ($material:ident, $switch:literal, $value:expr) => {
        ($material.version == Version::V5 && $material.switches[$switch]).then_some($value)
    };
}

impl Material {
    /// The bytes that user properties and filters borrow from.
    fn blocks(&self) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let user = self.user_properties.iter().filter(|_| self.version == Version::V5);
        let user = user.flat_map(|(name, value)| [vec![0x26], s(name), s(value)].concat()).collect();
        let subscribe = self.filters.iter().flat_map(|(filter, options)| {
            let mut options = if self.version == Version::V5 { *options } else { options & 3 };
            if filter.starts_with("$share/") {
                options &= !0b100;
            }
            [s(filter), vec![options]].concat()
        });
        let unsubscribe = self.filters.iter().flat_map(|(filter, _)| s(filter));
        (user, subscribe.collect(), unsubscribe.collect())
    }

    fn props<'a>(&'a self, user_properties: UserProperties<'a>) -> PublishProperties<'a> {
        PublishProperties {
            payload_format: some!(self, 0, self.switches[1]),
            message_expiry: some!(self, 2, self.numbers.1),
            topic_alias: None,
            response_topic: some!(self, 3, &self.topic),
            correlation_data: some!(self, 4, &self.binary[1]),
            content_type: some!(self, 5, &self.text[0]),
            user_properties,
        }
    }

    fn reason(&self, codes: &[u8]) -> u8 {
        if self.version == Version::V4 { 0 } else { codes[self.reason.index(codes.len())] }
    }

    fn connect<'a>(&'a self, user_properties: UserProperties<'a>) -> Connect<'a> {
        let v4 = self.version == Version::V4;
        let clean_start = self.switches[6] || self.text[0].is_empty();
        let username = self.switches[7].then_some(self.text[1].as_str());
        let password = (self.switches[8] && (!v4 || username.is_some())).then_some(self.binary[1].as_slice());
        let authentication_method = some!(self, 9, self.text[2].as_str());
        let session_expiry = match self.version {
            Version::V4 if clean_start => 0,
            Version::V4 => u32::MAX,
            Version::V5 => self.numbers.1,
        };
        Connect {
            version: self.version,
            clean_start,
            keep_alive: self.numbers.3,
            client_id: &self.text[0],
            username,
            password,
            will: self.switches[10].then(|| Will {
                topic: &self.topic,
                payload: &self.binary[0],
                qos: self.qos,
                retain: self.switches[11],
                delay_seconds: some!(self, 12, self.numbers.2).unwrap_or_default(),
                props: self.props(user_properties),
            }),
            session_expiry,
            receive_maximum: some!(self, 13, self.numbers.0).unwrap_or(u16::MAX),
            maximum_packet_size: some!(self, 14, self.numbers.2),
            topic_alias_maximum: some!(self, 15, self.numbers.3).unwrap_or_default(),
            request_response_information: !v4 && self.switches[16],
            request_problem_information: v4 || self.switches[17],
            user_properties,
            authentication_method,
            authentication_data: authentication_method.and(some!(self, 18, self.binary[0].as_slice())),
        }
    }

    fn publish<'a>(&'a self, user_properties: UserProperties<'a>) -> Publish<'a> {
        let topic_alias = some!(self, 19, self.numbers.0);
        Publish {
            dup: self.switches[20] && self.qos != QoS::AtMostOnce,
            qos: self.qos,
            retain: self.switches[21],
            topic: if topic_alias.is_some() && self.switches[22] { "" } else { &self.topic },
            packet_id: (self.qos != QoS::AtMostOnce).then_some(self.numbers.0),
            payload: &self.binary[0],
            props: PublishProperties { topic_alias, ..self.props(user_properties) },
        }
    }

    fn ack<'a>(&'a self, user_properties: UserProperties<'a>, codes: &[u8]) -> Ack<'a> {
        Ack {
            packet_id: self.numbers.0,
            reason_code: self.reason(codes),
            reason_string: some!(self, 23, self.text[3].as_str()),
            user_properties,
        }
    }
}

fn check(packet: &Packet<'_>, version: Version) -> Result<(), TestCaseError> {
    let bytes = client::encode(packet, version);
    prop_assert_eq!(frame(&bytes, bytes.len()), Ok(Some(bytes.len())));
    let state = if matches!(packet, Packet::Connect(_)) { None } else { Some(version) };
    let decoded = decode(&bytes, state);
    prop_assert_eq!(decoded.as_ref(), Ok(packet), "{:02x?}", bytes);
    Ok(())
}

proptest! {
    #[test]
    fn every_packet_decodes_to_itself(material in material()) {
        let version = material.version;
        let (user, subscribe, unsubscribe) = material.blocks();
        let user_properties = UserProperties { block: &user };
        let count = material.filters.len() as u32;
        let ack_codes = [0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
        let mut packets = vec![
            Packet::Connect(material.connect(user_properties)),
            Packet::Publish(material.publish(user_properties)),
            Packet::PubAck(material.ack(user_properties, &ack_codes)),
            Packet::PubRec(material.ack(user_properties, &ack_codes)),
            Packet::PubRel(material.ack(user_properties, &[0, 0x92])),
            Packet::PubComp(material.ack(user_properties, &[0, 0x92])),
            Packet::Subscribe(Subscribe {
                packet_id: material.numbers.0,
                subscription_id: some!(material, 0, material.numbers.2),
                user_properties,
                filters: SubscribeFilters { bytes: &subscribe, count },
            }),
            Packet::Unsubscribe(Unsubscribe {
                packet_id: material.numbers.0,
                user_properties,
                filters: UnsubscribeFilters { bytes: &unsubscribe, count },
            }),
            Packet::PingReq,
            Packet::Disconnect(Disconnect {
                reason_code: material.reason(&[0, 4, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99]),
                session_expiry: some!(material, 1, material.numbers.1),
                reason_string: some!(material, 2, material.text[0].as_str()),
                user_properties,
            }),
        ];
        if version == Version::V5 {
            packets.push(Packet::Auth(Auth {
                reason_code: material.reason(&[0x18, 0x19]),
                method: &material.text[0],
                data: some!(material, 3, material.binary[0].as_slice()),
                reason_string: some!(material, 4, material.text[1].as_str()),
                user_properties,
            }));
        }
        for packet in &packets {
            check(packet, version)?;
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), version in 0..3) {
        let version = [None, Some(Version::V4), Some(Version::V5)][version as usize];
        let _ = frame(&bytes, 1000);
        let _ = decode(&bytes, version);
        // Right in its header, so that the rest is looked at.
        for first_byte in [0x10, 0x32, 0x40, 0x62, 0x82, 0xa2, 0xe0, 0xf0] {
            let _ = decode(&super::packet(first_byte, &[&bytes]), version);
        }
    }
}
