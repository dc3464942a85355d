//! What can be wrong with a packet, where, and what MQTT 5.0 calls it.

use std::fmt;

use super::{PacketType, reason};

/// Where in a packet something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub packet: PacketType,
    pub field: &'static str,
    /// From 1 for a field that repeats, otherwise 0.
    pub index: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.packet, self.field)?;
        if self.index > 0 {
            write!(f, " {}", self.index)?;
        }
        Ok(())
    }
}

/// Why bytes are not a packet that a server may accept.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("there is no packet type {}", first_byte >> 4)]
    UnknownPacketType { first_byte: u8 },
    #[error("{packet} is not in MQTT 3.1.1")]
    NotInVersion { packet: PacketType },
    #[error("{packet}: only a server sends it")]
    NotFromClient { packet: PacketType },
    #[error("{packet}: header flags are {flags:#06b}, must be {expected:#06b}")]
    HeaderFlags { packet: PacketType, flags: u8, expected: u8 },
    #[error("remaining length takes more than four bytes")]
    RemainingLength,
    #[error("{packet}: {bytes} bytes, the limit is {limit}")]
    PacketTooLarge { packet: PacketType, bytes: usize, limit: usize },
    #[error("not exactly one packet: its header says {expected} bytes, there are {actual}")]
    NotOnePacket { expected: usize, actual: usize },
    #[error("{packet} before CONNECT")]
    ConnectExpected { packet: PacketType },
    #[error("a second CONNECT")]
    SecondConnect,
    #[error("CONNECT: protocol name is not MQTT")]
    ProtocolName,
    /// Level 3 is MQTT 3.1 (protocol name "MQIsdp").
    #[error("CONNECT: protocol level {level} is not supported, only 4 (3.1.1) and 5 (5.0)")]
    UnsupportedVersion { level: u8 },
    #[error("{0}: the packet ends inside of it")]
    Truncated(Place),
    #[error("{packet}: {count} bytes too many at its end")]
    TrailingBytes { packet: PacketType, count: usize },
    #[error("{0}: not UTF-8")]
    NotUtf8(Place),
    #[error("{0}: has the character U+0000")]
    NullCharacter(Place),
    #[error("{0}: not a variable byte integer of the fewest possible bytes")]
    Varint(Place),
    #[error("{place}: {value:#010b} has reserved bits set")]
    ReservedBits { place: Place, value: u8 },
    #[error("{0}: QoS 3 does not exist")]
    QoS3(Place),
    #[error("{0}: QoS 3 does not exist")]
    SubscribeQoS3(Place),
    #[error("PUBLISH: DUP is set on QoS 0")]
    DupAtQoS0,
    #[error("CONNECT: will QoS or will retain without a will")]
    WillFlagsWithoutWill,
    #[error("CONNECT: password without user name")]
    PasswordWithoutUserName,
    #[error("CONNECT: client identifier is empty and the session is not clean")]
    EmptyClientId,
    #[error("{packet}: packet identifier is 0")]
    ZeroPacketId { packet: PacketType },
    #[error("{place}: there is no property {id}")]
    UnknownProperty { place: Place, id: u32 },
    #[error("{place}: {property} does not belong here")]
    PropertyNotAllowed { place: Place, property: &'static str },
    #[error("{place}: only a server sends {property}")]
    PropertyFromServer { place: Place, property: &'static str },
    #[error("{place}: {property} is there twice")]
    DuplicateProperty { place: Place, property: &'static str },
    #[error("{place}: must not be {value}")]
    PropertyValue { place: Place, value: u32 },
    #[error("PUBLISH: topic alias is 0")]
    ZeroTopicAlias,
    #[error("{0}: is empty")]
    EmptyTopic(Place),
    #[error("{0}: has a wildcard")]
    TopicWildcard(Place),
    #[error("{place}: {why}")]
    TopicFilter { place: Place, why: &'static str },
    #[error("{packet}: has no topic filter")]
    NoFilters { packet: PacketType },
    #[error("{0}: No Local on a shared subscription")]
    NoLocalOnShared(Place),
    #[error("{0}: retain handling 3 does not exist")]
    RetainHandling3(Place),
    #[error("{packet}: reason code {code:#04x} is not one that a client may send")]
    ReasonCode { packet: PacketType, code: u8 },
    #[error("{packet}: authentication data without authentication method")]
    AuthenticationDataAlone { packet: PacketType },
    #[error("AUTH: authentication method is missing")]
    NoAuthenticationMethod,
}

impl DecodeError {
    /// The reason code of MQTT 5.0 (§2.4) for the DISCONNECT, or CONNACK, that answers the packet. A 3.1.1 client is
    /// disconnected without one, except that [`super::connack`] has return codes for 0x84 and 0x85.
    pub fn reason_code(&self) -> u8 {
        use DecodeError as E;
        match self {
            E::PacketTooLarge { .. } => reason::PACKET_TOO_LARGE,
            E::ProtocolName | E::UnsupportedVersion { .. } => reason::UNSUPPORTED_PROTOCOL_VERSION,
            E::EmptyClientId => reason::CLIENT_IDENTIFIER_NOT_VALID,
            E::ZeroTopicAlias => reason::TOPIC_ALIAS_INVALID,
            E::TopicWildcard(_) => reason::TOPIC_NAME_INVALID,
            E::TopicFilter { .. } => reason::TOPIC_FILTER_INVALID,
            E::NotFromClient { .. }
            | E::ConnectExpected { .. }
            | E::SecondConnect
            | E::SubscribeQoS3(_)
            | E::ZeroPacketId { .. }
            | E::PropertyFromServer { .. }
            | E::DuplicateProperty { .. }
            | E::PropertyValue { .. }
            | E::EmptyTopic(_)
            | E::NoFilters { .. }
            | E::NoLocalOnShared(_)
            | E::RetainHandling3(_)
            | E::ReasonCode { .. }
            | E::AuthenticationDataAlone { .. }
            | E::NoAuthenticationMethod => reason::PROTOCOL_ERROR,
            E::UnknownPacketType { .. }
            | E::NotInVersion { .. }
            | E::HeaderFlags { .. }
            | E::RemainingLength
            | E::NotOnePacket { .. }
            | E::Truncated(_)
            | E::TrailingBytes { .. }
            | E::NotUtf8(_)
            | E::NullCharacter(_)
            | E::Varint(_)
            | E::ReservedBits { .. }
            | E::QoS3(_)
            | E::DupAtQoS0
            | E::WillFlagsWithoutWill
            | E::PasswordWithoutUserName
            | E::UnknownProperty { .. }
            | E::PropertyNotAllowed { .. } => reason::MALFORMED_PACKET,
        }
    }
}

/// Why a PUBLISH cannot be put on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    /// Strings and binary data have a length of two bytes (§1.5.4).
    #[error("{field} of {bytes} bytes, MQTT can carry 65535")]
    FieldTooLong { field: &'static str, bytes: usize },
    #[error("PUBLISH of {bytes} bytes, the limit is {limit}")]
    PacketTooLong { bytes: usize, limit: usize },
}
