//! What a server sends, but for PUBLISH (see [`super::SharedPublish`]): each function appends one packet to `out` and
//! returns its length in bytes, so that a caller can check it against the client's maximum packet size and take it back.
//!
//! Strings over 65,535 bytes, which MQTT cannot carry, are cut at a character; binary data is cut too.

use super::property::id;
use super::{MAX_REMAINING_LENGTH, PacketType, QoS, Version, reason};

/// §3.2.2.3, only for 5.0. The default says nothing, which means what §3.2.2.3 says that absence means.
#[derive(Clone, Copy, Debug)]
pub struct ConnAckProperties<'a> {
    /// Seconds, when the server uses another than the client asked for.
    pub session_expiry: Option<u32>,
    /// How many QoS 1 and 2 messages the server takes at once; must not be 0.
    pub receive_maximum: Option<u16>,
    /// What the server supports.
    pub maximum_qos: QoS,
    pub retain_available: bool,
    /// Bytes; must not be 0.
    pub maximum_packet_size: Option<u32>,
    /// The client identifier that the server has chosen for a client that sent an empty one.
    pub assigned_client_id: Option<&'a str>,
    /// The largest topic alias that the server accepts; 0: none.
    pub topic_alias_maximum: u16,
    pub reason_string: Option<&'a str>,
    pub wildcard_available: bool,
    pub subscription_identifiers_available: bool,
    pub shared_available: bool,
    /// Seconds; the client must use it instead of its own.
    pub server_keep_alive: Option<u16>,
    pub response_information: Option<&'a str>,
    /// Another server to use (§4.11).
    pub server_reference: Option<&'a str>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
    pub user_properties: &'a [(&'a str, &'a str)],
}

impl Default for ConnAckProperties<'_> {
    fn default() -> Self {
        ConnAckProperties {
            session_expiry: None,
            receive_maximum: None,
            maximum_qos: QoS::ExactlyOnce,
            retain_available: true,
            maximum_packet_size: None,
            assigned_client_id: None,
            topic_alias_maximum: 0,
            reason_string: None,
            wildcard_available: true,
            subscription_identifiers_available: true,
            shared_available: true,
            server_keep_alive: None,
            response_information: None,
            server_reference: None,
            authentication_method: None,
            authentication_data: None,
            user_properties: &[],
        }
    }
}

/// §3.2. `code` is a reason code of 5.0, for 3.1.1 put into its return codes ([`reason::connack_return_code`]).
/// A session is never present with an error [MQTT-3.2.2-6].
pub fn connack(
    out: &mut Vec<u8>,
    version: Version,
    session_present: bool,
    code: u8,
    properties: &ConnAckProperties<'_>,
) -> usize {
    packet(out, PacketType::ConnAck, |out| {
        out.push(u8::from(session_present && code == reason::SUCCESS));
        match version {
            Version::V4 => out.push(reason::connack_return_code(code)),
            Version::V5 => {
                out.push(code);
                with_length(out, |out| connack_properties(out, properties));
            }
        }
    })
}

fn connack_properties(out: &mut Vec<u8>, properties: &ConnAckProperties<'_>) {
    put_u32(out, id::SESSION_EXPIRY, properties.session_expiry);
    put_u16(out, id::RECEIVE_MAXIMUM, properties.receive_maximum);
    if properties.maximum_qos != QoS::ExactlyOnce {
        out.extend([id::MAXIMUM_QOS, properties.maximum_qos.level()]);
    }
    put_unavailable(out, id::RETAIN_AVAILABLE, properties.retain_available);
    put_u32(out, id::MAXIMUM_PACKET_SIZE, properties.maximum_packet_size);
    put_text(out, id::ASSIGNED_CLIENT_ID, properties.assigned_client_id);
    put_u16(
        out,
        id::TOPIC_ALIAS_MAXIMUM,
        Some(properties.topic_alias_maximum).filter(|&maximum| maximum > 0),
    );
    put_text(out, id::REASON_STRING, properties.reason_string);
    put_unavailable(out, id::WILDCARD_AVAILABLE, properties.wildcard_available);
    put_unavailable(
        out,
        id::SUBSCRIPTION_IDENTIFIERS_AVAILABLE,
        properties.subscription_identifiers_available,
    );
    put_unavailable(out, id::SHARED_AVAILABLE, properties.shared_available);
    put_u16(out, id::SERVER_KEEP_ALIVE, properties.server_keep_alive);
    put_text(out, id::RESPONSE_INFORMATION, properties.response_information);
    put_text(out, id::SERVER_REFERENCE, properties.server_reference);
    put_text(out, id::AUTHENTICATION_METHOD, properties.authentication_method);
    put_binary(out, id::AUTHENTICATION_DATA, properties.authentication_data);
    for &(name, value) in properties.user_properties {
        out.push(id::USER_PROPERTY);
        text(out, name);
        text(out, value);
    }
}

/// §3.4.
pub fn puback(
    out: &mut Vec<u8>,
    version: Version,
    packet_id: u16,
    reason: u8,
    reason_string: Option<&str>,
) -> usize {
    ack(out, PacketType::PubAck, version, packet_id, reason, reason_string)
}

/// §3.5.
pub fn pubrec(
    out: &mut Vec<u8>,
    version: Version,
    packet_id: u16,
    reason: u8,
    reason_string: Option<&str>,
) -> usize {
    ack(out, PacketType::PubRec, version, packet_id, reason, reason_string)
}

/// §3.6.
pub fn pubrel(
    out: &mut Vec<u8>,
    version: Version,
    packet_id: u16,
    reason: u8,
    reason_string: Option<&str>,
) -> usize {
    ack(out, PacketType::PubRel, version, packet_id, reason, reason_string)
}

/// §3.7.
pub fn pubcomp(
    out: &mut Vec<u8>,
    version: Version,
    packet_id: u16,
    reason: u8,
    reason_string: Option<&str>,
) -> usize {
    ack(out, PacketType::PubComp, version, packet_id, reason, reason_string)
}

fn ack(
    out: &mut Vec<u8>,
    kind: PacketType,
    version: Version,
    packet_id: u16,
    reason: u8,
    reason_string: Option<&str>,
) -> usize {
    packet(out, kind, |out| {
        out.extend(packet_id.to_be_bytes());
        if version == Version::V5 {
            reason_and_properties(out, reason, &[(id::REASON_STRING, reason_string)]);
        }
    })
}

/// §3.9. One code for each filter of the SUBSCRIBE, in its order [MQTT-3.8.4-6]: the granted QoS or a reason code over
/// 0x80, which 3.1.1 is told as 0x80.
pub fn suback(out: &mut Vec<u8>, version: Version, packet_id: u16, codes: &[u8]) -> usize {
    packet(out, PacketType::SubAck, |out| {
        out.extend(packet_id.to_be_bytes());
        match version {
            Version::V4 => out.extend(codes.iter().map(|&code| reason::suback_return_code(code))),
            Version::V5 => {
                out.push(0); // no properties
                out.extend(codes);
            }
        }
    })
}

/// §3.11. One code for each filter of the UNSUBSCRIBE, in its order [MQTT-3.11.3-1]; 3.1.1 is told none.
pub fn unsuback(out: &mut Vec<u8>, version: Version, packet_id: u16, codes: &[u8]) -> usize {
    packet(out, PacketType::UnsubAck, |out| {
        out.extend(packet_id.to_be_bytes());
        if version == Version::V5 {
            out.push(0); // no properties
            out.extend(codes);
        }
    })
}

/// §3.13.
pub fn pingresp(out: &mut Vec<u8>) -> usize {
    packet(out, PacketType::PingResp, |_| {})
}

/// §3.14. Only for 5.0: in 3.1.1 a server just closes the connection.
pub fn disconnect(
    out: &mut Vec<u8>,
    reason: u8,
    reason_string: Option<&str>,
    server_reference: Option<&str>,
) -> usize {
    packet(out, PacketType::Disconnect, |out| {
        let properties = [(id::REASON_STRING, reason_string), (id::SERVER_REFERENCE, server_reference)];
        reason_and_properties(out, reason, &properties);
    })
}

/// §3.15.2.2.
#[derive(Clone, Copy, Default)]
pub struct AuthProperties<'a> {
    pub method: &'a str,
    pub data: Option<&'a [u8]>,
    pub reason_string: Option<&'a str>,
}

/// §3.15. Only for 5.0.
pub fn auth(out: &mut Vec<u8>, reason: u8, properties: &AuthProperties<'_>) -> usize {
    packet(out, PacketType::Auth, |out| {
        out.push(reason);
        with_length(out, |out| {
            put_text(out, id::AUTHENTICATION_METHOD, Some(properties.method));
            put_binary(out, id::AUTHENTICATION_DATA, properties.data);
            put_text(out, id::REASON_STRING, properties.reason_string);
        });
    })
}

/// The end of acknowledgements and DISCONNECT, of which as much is left out as may be.
fn reason_and_properties(out: &mut Vec<u8>, reason: u8, properties: &[(u8, Option<&str>)]) {
    let properties_follow = properties.iter().any(|(_, value)| value.is_some());
    if reason == reason::SUCCESS && !properties_follow {
        return;
    }
    out.push(reason);
    if properties_follow {
        with_length(out, |out| {
            for &(id, value) in properties {
                put_text(out, id, value);
            }
        });
    }
}

/// Appends fixed header and body; the length of both.
fn packet(out: &mut Vec<u8>, kind: PacketType, body: impl FnOnce(&mut Vec<u8>)) -> usize {
    let start = out.len();
    let flags = if kind == PacketType::PubRel { 0b0010 } else { 0 };
    out.push((kind as u8) << 4 | flags);
    with_length(out, body);
    out.len() - start
}

/// Appends what `content` appends, with its length as a variable byte integer before it.
fn with_length(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.push(0); // nearly always wide enough
    content(out);
    let length = out.len() - at - 1;
    if length < 0x80 {
        out[at] = length as u8;
    } else {
        let mut wide = Vec::with_capacity(4);
        varint(&mut wide, length as u32);
        out.splice(at..=at, wide);
    }
}

/// Appends a variable byte integer (§1.5.5) of at most [`MAX_REMAINING_LENGTH`].
pub(super) fn varint(out: &mut Vec<u8>, mut value: u32) {
    debug_assert!(value as usize <= MAX_REMAINING_LENGTH);
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// How many bytes [`varint`] appends.
pub(super) fn varint_width(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    binary(out, &value.as_bytes()[..value.floor_char_boundary(u16::MAX.into())]);
}

pub(super) fn binary(out: &mut Vec<u8>, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX.into())];
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
}

fn put_text(out: &mut Vec<u8>, id: u8, value: Option<&str>) {
    if let Some(value) = value {
        out.push(id);
        text(out, value);
    }
}

fn put_binary(out: &mut Vec<u8>, id: u8, value: Option<&[u8]>) {
    if let Some(value) = value {
        out.push(id);
        binary(out, value);
    }
}

fn put_u32(out: &mut Vec<u8>, id: u8, value: Option<u32>) {
    if let Some(value) = value {
        out.push(id);
        out.extend(value.to_be_bytes());
    }
}

fn put_u16(out: &mut Vec<u8>, id: u8, value: Option<u16>) {
    if let Some(value) = value {
        out.push(id);
        out.extend(value.to_be_bytes());
    }
}

/// Absence means that it is available.
fn put_unavailable(out: &mut Vec<u8>, id: u8, available: bool) {
    if !available {
        out.extend([id, 0]);
    }
}
