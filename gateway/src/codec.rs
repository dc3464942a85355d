//! MQTT 3.1.1 and 5.0 as a server sees it: packets in, packets out, no I/O.
//!
//! Own rather than a crate because of three things that the gateway lives on: what is received borrows from the read
//! buffer, a PUBLISH is encoded once and shared by all its receivers, and a connection without traffic holds nothing.
//! Section numbers are those of MQTT 5.0 unless "3.1.1" is said. See `docs/adr/0001-own-mqtt-codec.md`.

mod decode;
mod encode;
mod error;
mod filter;
mod packet;
mod property;
mod reader;
pub mod reason;
mod shared;

#[cfg(test)]
mod tests;

use std::fmt;

pub use decode::{connect_version, decode};
pub use encode::{
    AuthProperties, ConnAckProperties, auth, connack, disconnect, pingresp, puback, pubcomp, pubrec, pubrel,
    suback, unsuback,
};
pub use error::{DecodeError, EncodeError, Place};
pub use packet::{
    Ack, Auth, Connect, Disconnect, Packet, Publish, PublishProperties, RetainHandling, Subscribe,
    SubscribeFilters, SubscribeFiltersIter, SubscribeOptions, Unsubscribe, UnsubscribeFilters,
    UnsubscribeFiltersIter, Will,
};
pub use property::{UserProperties, UserPropertiesIter};
pub use shared::{PublishFields, SharedPublish, Variation};

/// The largest value of a variable byte integer (§1.5.5), thus of the remaining length of a packet.
pub const MAX_REMAINING_LENGTH: usize = 268_435_455;

/// A CONNACK or DISCONNECT with nothing but a reason code and a reason string is no longer than the string and this.
pub const REASON_BYTES: usize = 16;

/// The protocol version of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Version {
    /// MQTT 3.1.1, protocol level 4.
    V4,
    /// MQTT 5.0, protocol level 5.
    V5,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Version::V4 => "3.1.1",
            Version::V5 => "5.0",
        })
    }
}

/// Quality of service (§4.3). The order is that of the levels, so `min` gives the granted one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum QoS {
    #[default]
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl QoS {
    /// The level of the number; none for 3 and more.
    pub fn from_level(level: u8) -> Option<QoS> {
        match level {
            0 => Some(QoS::AtMostOnce),
            1 => Some(QoS::AtLeastOnce),
            2 => Some(QoS::ExactlyOnce),
            _ => None,
        }
    }

    /// 0, 1 or 2.
    pub fn level(self) -> u8 {
        self as u8
    }
}

/// The type of a control packet, the upper half of its first byte (§2.1.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PacketType {
    Connect = 1,
    ConnAck = 2,
    Publish = 3,
    PubAck = 4,
    PubRec = 5,
    PubRel = 6,
    PubComp = 7,
    Subscribe = 8,
    SubAck = 9,
    Unsubscribe = 10,
    UnsubAck = 11,
    PingReq = 12,
    PingResp = 13,
    Disconnect = 14,
    Auth = 15,
}

impl PacketType {
    /// The name as the standard writes it.
    pub fn name(self) -> &'static str {
        match self {
            PacketType::Connect => "CONNECT",
            PacketType::ConnAck => "CONNACK",
            PacketType::Publish => "PUBLISH",
            PacketType::PubAck => "PUBACK",
            PacketType::PubRec => "PUBREC",
            PacketType::PubRel => "PUBREL",
            PacketType::PubComp => "PUBCOMP",
            PacketType::Subscribe => "SUBSCRIBE",
            PacketType::SubAck => "SUBACK",
            PacketType::Unsubscribe => "UNSUBSCRIBE",
            PacketType::UnsubAck => "UNSUBACK",
            PacketType::PingReq => "PINGREQ",
            PacketType::PingResp => "PINGRESP",
            PacketType::Disconnect => "DISCONNECT",
            PacketType::Auth => "AUTH",
        }
    }

    fn from_bits(bits: u8) -> Option<PacketType> {
        Some(match bits {
            1 => PacketType::Connect,
            2 => PacketType::ConnAck,
            3 => PacketType::Publish,
            4 => PacketType::PubAck,
            5 => PacketType::PubRec,
            6 => PacketType::PubRel,
            7 => PacketType::PubComp,
            8 => PacketType::Subscribe,
            9 => PacketType::SubAck,
            10 => PacketType::Unsubscribe,
            11 => PacketType::UnsubAck,
            12 => PacketType::PingReq,
            13 => PacketType::PingResp,
            14 => PacketType::Disconnect,
            15 => PacketType::Auth,
            _ => return None,
        })
    }

    /// The type in the first byte of a packet, which must be one that a client may send, with the flags that it must
    /// have (§2.1.3, [MQTT-2.1.3-1]).
    fn of_client(first_byte: u8) -> Result<PacketType, DecodeError> {
        let kind =
            PacketType::from_bits(first_byte >> 4).ok_or(DecodeError::UnknownPacketType { first_byte })?;
        let flags = first_byte & 0x0f;
        let expected = match kind {
            PacketType::Publish => return Ok(kind),
            PacketType::PubRel | PacketType::Subscribe | PacketType::Unsubscribe => 0b0010,
            PacketType::ConnAck | PacketType::SubAck | PacketType::UnsubAck | PacketType::PingResp => {
                return Err(DecodeError::NotFromClient { packet: kind });
            }
            _ => 0,
        };
        if flags != expected {
            return Err(DecodeError::HeaderFlags { packet: kind, flags, expected });
        }
        Ok(kind)
    }
}

impl fmt::Display for PacketType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Looks at the start of `input` for one whole packet (§2.1): its length in bytes, fixed header included, which may be
/// more than `input` has; `None` when the fixed header itself is not complete yet.
///
/// A first byte that no client may send, and a packet longer than `max_packet_bytes`, are refused as soon as the bytes
/// that tell are there, so that nothing is read or kept for them.
pub fn packet_length(input: &[u8], max_packet_bytes: usize) -> Result<Option<usize>, DecodeError> {
    let Some((&first_byte, rest)) = input.split_first() else { return Ok(None) };
    let packet = PacketType::of_client(first_byte)?;
    let Some((remaining, width)) = remaining_length(rest)? else { return Ok(None) };
    let bytes = 1 + width + remaining;
    if bytes > max_packet_bytes {
        return Err(DecodeError::PacketTooLarge { packet, bytes, limit: max_packet_bytes });
    }
    Ok(Some(bytes))
}

/// The length in bytes of the packet that `input` starts with, once it is there whole; `None`: more bytes are needed.
/// Otherwise as [`packet_length`].
pub fn frame(input: &[u8], max_packet_bytes: usize) -> Result<Option<usize>, DecodeError> {
    Ok(packet_length(input, max_packet_bytes)?.filter(|&bytes| bytes <= input.len()))
}

/// The remaining length (§2.1.4) and how many bytes it takes.
fn remaining_length(bytes: &[u8]) -> Result<Option<(usize, usize)>, DecodeError> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= 4 { Err(DecodeError::RemainingLength) } else { Ok(None) }
}
