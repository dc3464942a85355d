//! A PUBLISH to many: encoded once for each protocol version, shared by all receivers, with only what differs between
//! them written anew.
//!
//! The shared bytes are a whole QoS 0 frame. For another receiver its parts are taken up again around the few bytes that
//! are its own:
//!
//! ```text
//! shared   header | length | topic |          property length | expiry | other properties, payload
//! another  ------ own ----- shared  packet id, property length, expiry, own properties | shared
//! ```

use std::fmt;
use std::sync::Arc;

use super::encode::{binary, varint, varint_width};
use super::property::id;
use super::{EncodeError, MAX_REMAINING_LENGTH, PacketType, QoS, Version};

/// What is left free of the largest packet for what a [`Variation`] adds, so that adding cannot fail: about 13,000
/// subscription identifiers.
const VARIATION_BYTES: usize = 64 * 1024;

/// A message as all its receivers get it, user properties aside (§3.3). 3.1.1 carries only topic, payload and retain.
#[derive(Clone, Copy, Default)]
pub struct PublishFields<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    /// Of the frame that [`SharedPublish::plain`] gives.
    pub retain: bool,
    /// `Some(true)`: the payload is UTF-8.
    pub payload_format: Option<bool>,
    /// Seconds left at the time of encoding.
    pub message_expiry: Option<u32>,
    pub content_type: Option<&'a str>,
    pub response_topic: Option<&'a str>,
    pub correlation_data: Option<&'a [u8]>,
}

/// What one receiver's frame has of its own. The default is QoS 0 and nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Variation<'a> {
    pub qos: QoS,
    /// Only with QoS 1 and 2 [MQTT-3.3.1-2]; left out otherwise.
    pub dup: bool,
    pub retain: bool,
    /// Not 0; only with QoS 1 and 2.
    pub packet_id: u16,
    /// Of the receiver's subscriptions that the message matches (§3.3.2.3.8). Not in 3.1.1.
    pub subscription_ids: &'a [u32],
    /// The alias, and whether this frame is the first to use it on the connection, thus also has the topic itself
    /// (§3.3.2.3.4). Not in 3.1.1.
    pub topic_alias: Option<(u16, bool)>,
    /// Seconds left now, for a message that has waited since it was encoded (§3.3.2.3.3). Not in 3.1.1.
    pub message_expiry: Option<u32>,
}

/// A PUBLISH for one protocol version, encoded once, shared by all its receivers. 32 bytes; a clone shares the frame.
#[derive(Clone)]
pub struct SharedPublish {
    /// A whole frame of QoS 0.
    bytes: Arc<[u8]>,
    topic_end: u32,
    /// Of the properties but the expiry, or of the payload.
    rest_start: u32,
    /// Properties but the expiry.
    properties_len: u32,
    /// Of the topic, with its length.
    topic_start: u8,
    expires: bool,
    version: Version,
}

impl SharedPublish {
    /// Encodes the message. `user_properties` is walked twice, and not at all for 3.1.1.
    pub fn encode<'p, P>(
        version: Version,
        fields: &PublishFields<'_>,
        user_properties: P,
    ) -> Result<Self, EncodeError>
    where
        P: IntoIterator<Item = (&'p str, &'p str)>,
        P::IntoIter: Clone,
    {
        let user_properties = user_properties.into_iter();
        let properties_len = match version {
            Version::V4 => 0,
            Version::V5 => properties_len(fields, user_properties.clone())?,
        };
        let expires = version == Version::V5 && fields.message_expiry.is_some();
        let all_properties_len = properties_len + if expires { 5 } else { 0 };
        let topic_len = field_len("topic", fields.topic.as_bytes())?;
        let block_len = match version {
            Version::V4 => 0,
            Version::V5 => varint_width(all_properties_len) + all_properties_len,
        };
        let remaining = topic_len + block_len + fields.payload.len();
        let limit = MAX_REMAINING_LENGTH - VARIATION_BYTES;
        if remaining > limit {
            return Err(EncodeError::PacketTooLong { bytes: remaining, limit });
        }

        let topic_start = 1 + varint_width(remaining);
        let mut out = Vec::with_capacity(topic_start + remaining);
        out.push((PacketType::Publish as u8) << 4 | u8::from(fields.retain));
        varint(&mut out, remaining as u32);
        binary(&mut out, fields.topic.as_bytes());
        let topic_end = out.len();
        let mut rest_start = topic_end;
        if version == Version::V5 {
            varint(&mut out, all_properties_len as u32);
            if let Some(seconds) = fields.message_expiry {
                expiry(&mut out, seconds);
            }
            rest_start = out.len();
            properties(&mut out, fields, user_properties);
        }
        debug_assert_eq!(out.len(), rest_start + properties_len);
        out.extend(fields.payload);
        debug_assert_eq!(out.len(), topic_start + remaining);
        Ok(SharedPublish {
            bytes: out.into(),
            topic_end: topic_end as u32,
            rest_start: rest_start as u32,
            properties_len: properties_len as u32,
            topic_start: topic_start as u8,
            expires,
            version,
        })
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// The whole frame of QoS 0 as it was encoded: one slice for all receivers that need nothing of their own.
    pub fn plain(&self) -> &[u8] {
        &self.bytes
    }

    /// The buffer of [`SharedPublish::plain`] itself, for a queue that needs nothing else of it.
    pub fn plain_shared(&self) -> &Arc<[u8]> {
        &self.bytes
    }

    pub fn topic(&self) -> &str {
        let name = &self.bytes[self.topic_start as usize + 2..self.topic_end as usize];
        std::str::from_utf8(name).unwrap_or_default() // made from a &str
    }

    /// Seconds that were left when it was encoded (§3.3.2.3.3).
    pub fn message_expiry(&self) -> Option<u32> {
        if !self.expires {
            return None;
        }
        self.bytes[..self.rest_start as usize].last_chunk().map(|seconds| u32::from_be_bytes(*seconds))
    }

    pub fn payload(&self) -> &[u8] {
        &self.bytes[(self.rest_start + self.properties_len) as usize..]
    }

    /// Bytes on the wire with this variation.
    pub fn len_with(&self, variation: &Variation<'_>) -> usize {
        let remaining = self.measure(variation).remaining;
        1 + varint_width(remaining) + remaining
    }

    /// Appends the frame with this variation to `out`.
    pub fn write(&self, out: &mut Vec<u8>, variation: &Variation<'_>) {
        let measures = self.measure(variation);
        out.reserve(1 + 4 + measures.remaining);
        self.write_head(out, variation, &measures);
        out.extend_from_slice(self.topic_piece(variation));
        self.write_middle(out, variation, &measures);
        out.extend_from_slice(&self.bytes[self.rest_start as usize..]);
    }

    /// The frame with this variation as four slices, some of them perhaps empty, for `writev`: the first and the third
    /// are in `scratch`, whose former content is dropped; the others are shared.
    pub fn pieces<'a>(&'a self, variation: &Variation<'_>, scratch: &'a mut Vec<u8>) -> [&'a [u8]; 4] {
        let measures = self.measure(variation);
        scratch.clear();
        self.write_head(scratch, variation, &measures);
        let head_len = scratch.len();
        self.write_middle(scratch, variation, &measures);
        let (head, middle) = scratch.split_at(head_len);
        [head, self.topic_piece(variation), middle, &self.bytes[self.rest_start as usize..]]
    }

    fn measure(&self, variation: &Variation<'_>) -> Measures {
        let packet_id_len = if variation.qos == QoS::AtMostOnce { 0 } else { 2 };
        let rest_len = self.bytes.len() - self.rest_start as usize;
        let topic_len = (self.topic_end - u32::from(self.topic_start)) as usize;
        if self.version == Version::V4 {
            return Measures { properties: 0, remaining: topic_len + packet_id_len + rest_len };
        }
        let expires = self.expires || variation.message_expiry.is_some();
        let subscription_ids_len: usize =
            variation.subscription_ids.iter().map(|&id| 1 + varint_width(id as usize)).sum();
        let properties = self.properties_len as usize
            + if expires { 5 } else { 0 }
            + subscription_ids_len
            + if variation.topic_alias.is_some() { 3 } else { 0 };
        let topic_len = if self.leaves_topic_out(variation) { 2 } else { topic_len };
        Measures {
            properties,
            remaining: topic_len + packet_id_len + varint_width(properties) + properties + rest_len
                - self.properties_len as usize,
        }
    }

    fn leaves_topic_out(&self, variation: &Variation<'_>) -> bool {
        self.version == Version::V5 && matches!(variation.topic_alias, Some((_, false)))
    }

    /// The topic with its length, unless an alias stands for it.
    fn topic_piece(&self, variation: &Variation<'_>) -> &[u8] {
        if self.leaves_topic_out(variation) {
            return &[];
        }
        &self.bytes[self.topic_start as usize..self.topic_end as usize]
    }

    /// What is before the topic, or up to its end if it is left out.
    fn write_head(&self, out: &mut Vec<u8>, variation: &Variation<'_>, measures: &Measures) {
        let dup = variation.dup && variation.qos != QoS::AtMostOnce;
        let flags = u8::from(dup) << 3 | variation.qos.level() << 1 | u8::from(variation.retain);
        out.push((PacketType::Publish as u8) << 4 | flags);
        varint(out, measures.remaining as u32);
        if self.leaves_topic_out(variation) {
            out.extend([0, 0]);
        }
    }

    /// What is between the topic and the shared rest.
    fn write_middle(&self, out: &mut Vec<u8>, variation: &Variation<'_>, measures: &Measures) {
        if variation.qos != QoS::AtMostOnce {
            debug_assert_ne!(variation.packet_id, 0);
            out.extend(variation.packet_id.to_be_bytes());
        }
        if self.version == Version::V4 {
            return;
        }
        varint(out, measures.properties as u32);
        if let Some(seconds) = variation.message_expiry {
            expiry(out, seconds);
        } else if self.expires {
            out.extend_from_slice(&self.bytes[self.rest_start as usize - 5..self.rest_start as usize]);
        }
        for &subscription_id in variation.subscription_ids {
            out.push(id::SUBSCRIPTION_IDENTIFIER);
            varint(out, subscription_id);
        }
        if let Some((alias, _)) = variation.topic_alias {
            out.push(id::TOPIC_ALIAS);
            out.extend(alias.to_be_bytes());
        }
    }
}

impl fmt::Debug for SharedPublish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedPublish")
            .field("version", &self.version)
            .field("topic", &self.topic())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

/// Bytes of one variation's frame.
struct Measures {
    /// Value of the property length.
    properties: usize,
    /// Value of the remaining length.
    remaining: usize,
}

/// Bytes of a string or binary data on the wire.
fn field_len(field: &'static str, value: &[u8]) -> Result<usize, EncodeError> {
    if value.len() > u16::MAX.into() {
        return Err(EncodeError::FieldTooLong { field, bytes: value.len() });
    }
    Ok(2 + value.len())
}

/// Bytes of all properties but the expiry.
fn properties_len<'p>(
    fields: &PublishFields<'_>,
    user_properties: impl Iterator<Item = (&'p str, &'p str)>,
) -> Result<usize, EncodeError> {
    let mut bytes = 0;
    if fields.payload_format.is_some() {
        bytes += 2;
    }
    let optional = [
        ("content type", fields.content_type.map(str::as_bytes)),
        ("response topic", fields.response_topic.map(str::as_bytes)),
        ("correlation data", fields.correlation_data),
    ];
    for (field, value) in optional {
        if let Some(value) = value {
            bytes += 1 + field_len(field, value)?;
        }
    }
    for (name, value) in user_properties {
        bytes += 1 + field_len("user property name", name.as_bytes())?;
        bytes += field_len("user property value", value.as_bytes())?;
    }
    Ok(bytes)
}

fn properties<'p>(
    out: &mut Vec<u8>,
    fields: &PublishFields<'_>,
    user_properties: impl Iterator<Item = (&'p str, &'p str)>,
) {
    if let Some(utf8) = fields.payload_format {
        out.extend([id::PAYLOAD_FORMAT, u8::from(utf8)]);
    }
    let optional = [
        (id::CONTENT_TYPE, fields.content_type.map(str::as_bytes)),
        (id::RESPONSE_TOPIC, fields.response_topic.map(str::as_bytes)),
        (id::CORRELATION_DATA, fields.correlation_data),
    ];
    for (id, value) in optional {
        if let Some(value) = value {
            out.push(id);
            binary(out, value);
        }
    }
    for (name, value) in user_properties {
        out.push(id::USER_PROPERTY);
        binary(out, name.as_bytes());
        binary(out, value.as_bytes());
    }
}

fn expiry(out: &mut Vec<u8>, seconds: u32) {
    out.push(id::MESSAGE_EXPIRY);
    out.extend(seconds.to_be_bytes());
}
