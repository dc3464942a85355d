//! The properties of MQTT 5.0 (§2.2.2): one table of what each is and which packets of a client may have it, a walk that
//! checks a packet's block against the table, and user properties that stay in the packet until somebody asks.

use super::reader::Reader;
use super::{DecodeError, PacketType, Place};

pub(super) mod id {
    pub(crate) const PAYLOAD_FORMAT: u8 = 1;
    pub(crate) const MESSAGE_EXPIRY: u8 = 2;
    pub(crate) const CONTENT_TYPE: u8 = 3;
    pub(crate) const RESPONSE_TOPIC: u8 = 8;
    pub(crate) const CORRELATION_DATA: u8 = 9;
    pub(crate) const SUBSCRIPTION_IDENTIFIER: u8 = 11;
    pub(crate) const SESSION_EXPIRY: u8 = 17;
    pub(crate) const ASSIGNED_CLIENT_ID: u8 = 18;
    pub(crate) const SERVER_KEEP_ALIVE: u8 = 19;
    pub(crate) const AUTHENTICATION_METHOD: u8 = 21;
    pub(crate) const AUTHENTICATION_DATA: u8 = 22;
    pub(crate) const REQUEST_PROBLEM_INFORMATION: u8 = 23;
    pub(crate) const WILL_DELAY: u8 = 24;
    pub(crate) const REQUEST_RESPONSE_INFORMATION: u8 = 25;
    pub(crate) const RESPONSE_INFORMATION: u8 = 26;
    pub(crate) const SERVER_REFERENCE: u8 = 28;
    pub(crate) const REASON_STRING: u8 = 31;
    pub(crate) const RECEIVE_MAXIMUM: u8 = 33;
    pub(crate) const TOPIC_ALIAS_MAXIMUM: u8 = 34;
    pub(crate) const TOPIC_ALIAS: u8 = 35;
    pub(crate) const MAXIMUM_QOS: u8 = 36;
    pub(crate) const RETAIN_AVAILABLE: u8 = 37;
    pub(crate) const USER_PROPERTY: u8 = 38;
    pub(crate) const MAXIMUM_PACKET_SIZE: u8 = 39;
    pub(crate) const WILDCARD_AVAILABLE: u8 = 40;
    pub(crate) const SUBSCRIPTION_IDENTIFIERS_AVAILABLE: u8 = 41;
    pub(crate) const SHARED_AVAILABLE: u8 = 42;
}

/// The will of a CONNECT has properties of its own (§3.1.3.2); next to the bits of the packet types.
const WILL: u16 = 1;

const fn bit(packet: PacketType) -> u16 {
    1 << packet as u8
}

const CONNECT: u16 = bit(PacketType::Connect);
const CONNACK: u16 = bit(PacketType::ConnAck);
const PUBLISH: u16 = bit(PacketType::Publish);
const ACKS: u16 =
    bit(PacketType::PubAck) | bit(PacketType::PubRec) | bit(PacketType::PubRel) | bit(PacketType::PubComp);
const SUBSCRIBE: u16 = bit(PacketType::Subscribe);
const UNSUBSCRIBE: u16 = bit(PacketType::Unsubscribe);
const DISCONNECT: u16 = bit(PacketType::Disconnect);
const AUTH: u16 = bit(PacketType::Auth);

#[derive(Clone, Copy)]
enum Kind {
    /// A byte that is 0 or 1.
    Flag,
    U16,
    /// 0 is a protocol error.
    U16NotZero,
    U32,
    U32NotZero,
    VarintNotZero,
    Text,
    Binary,
    Pair,
}

struct Definition {
    name: &'static str,
    kind: Kind,
    /// Which packets of a client may have it.
    from_client: u16,
    /// Which packets only when they come from a server, though a client sends such packets too.
    from_server: u16,
}

/// Table 2-4 of §2.2.2.2.
const fn definition(id: u32) -> Option<Definition> {
    const fn of(name: &'static str, kind: Kind, from_client: u16) -> Option<Definition> {
        Some(Definition { name, kind, from_client, from_server: 0 })
    }
    const fn of_server(
        name: &'static str,
        kind: Kind,
        from_client: u16,
        from_server: u16,
    ) -> Option<Definition> {
        Some(Definition { name, kind, from_client, from_server })
    }
    if id > u8::MAX as u32 {
        return None;
    }
    match id as u8 {
        id::PAYLOAD_FORMAT => of("payload format indicator", Kind::Flag, PUBLISH | WILL),
        id::MESSAGE_EXPIRY => of("message expiry interval", Kind::U32, PUBLISH | WILL),
        id::CONTENT_TYPE => of("content type", Kind::Text, PUBLISH | WILL),
        id::RESPONSE_TOPIC => of("response topic", Kind::Text, PUBLISH | WILL),
        id::CORRELATION_DATA => of("correlation data", Kind::Binary, PUBLISH | WILL),
        id::SUBSCRIPTION_IDENTIFIER => {
            of_server("subscription identifier", Kind::VarintNotZero, SUBSCRIBE, PUBLISH)
        }
        id::SESSION_EXPIRY => of("session expiry interval", Kind::U32, CONNECT | DISCONNECT),
        id::ASSIGNED_CLIENT_ID => of("assigned client identifier", Kind::Text, 0),
        id::SERVER_KEEP_ALIVE => of("server keep alive", Kind::U16, 0),
        id::AUTHENTICATION_METHOD => of("authentication method", Kind::Text, CONNECT | AUTH),
        id::AUTHENTICATION_DATA => of("authentication data", Kind::Binary, CONNECT | AUTH),
        id::REQUEST_PROBLEM_INFORMATION => of("request problem information", Kind::Flag, CONNECT),
        id::WILL_DELAY => of("will delay interval", Kind::U32, WILL),
        id::REQUEST_RESPONSE_INFORMATION => of("request response information", Kind::Flag, CONNECT),
        id::RESPONSE_INFORMATION => of("response information", Kind::Text, 0),
        id::SERVER_REFERENCE => of_server("server reference", Kind::Text, 0, CONNACK | DISCONNECT),
        id::REASON_STRING => of("reason string", Kind::Text, ACKS | DISCONNECT | AUTH),
        id::RECEIVE_MAXIMUM => of("receive maximum", Kind::U16NotZero, CONNECT),
        id::TOPIC_ALIAS_MAXIMUM => of("topic alias maximum", Kind::U16, CONNECT),
        id::TOPIC_ALIAS => of("topic alias", Kind::U16, PUBLISH),
        id::MAXIMUM_QOS => of("maximum QoS", Kind::Flag, 0),
        id::RETAIN_AVAILABLE => of("retain available", Kind::Flag, 0),
        id::USER_PROPERTY => {
            let all = CONNECT | WILL | PUBLISH | ACKS | SUBSCRIBE | UNSUBSCRIBE | DISCONNECT | AUTH;
            of("user property", Kind::Pair, all)
        }
        id::MAXIMUM_PACKET_SIZE => of("maximum packet size", Kind::U32NotZero, CONNECT),
        id::WILDCARD_AVAILABLE => of("wildcard subscription available", Kind::Flag, 0),
        id::SUBSCRIPTION_IDENTIFIERS_AVAILABLE => of("subscription identifiers available", Kind::Flag, 0),
        id::SHARED_AVAILABLE => of("shared subscription available", Kind::Flag, 0),
        _ => None,
    }
}

/// A property's value as the table says it is; what cannot be 0 is not.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Flag(bool),
    U16(u16),
    /// Also a variable byte integer.
    U32(u32),
    Text(&'a str),
    Binary(&'a [u8]),
    Pair(&'a str, &'a str),
}

/// A walk over one block of properties that checks each.
pub(super) struct Properties<'a> {
    reader: Reader<'a>,
    block: &'a [u8],
    field: &'static str,
    holder: u16,
    seen: u64,
}

impl<'a> Properties<'a> {
    /// Takes the length and the block off `reader`.
    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let holder = bit(reader.packet());
        Self::read_for(reader, "properties", holder)
    }

    pub(super) fn read_will(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        Self::read_for(reader, "will properties", WILL)
    }

    fn read_for(reader: &mut Reader<'a>, field: &'static str, holder: u16) -> Result<Self, DecodeError> {
        let length = reader.varint(field)?;
        let block = reader.take(length as usize, field)?;
        Ok(Properties { reader: Reader::new(block, reader.packet()), block, field, holder, seen: 0 })
    }

    pub(super) fn next(&mut self) -> Result<Option<(u8, Value<'a>)>, DecodeError> {
        if self.reader.is_empty() {
            return Ok(None);
        }
        let place = self.reader.place(self.field);
        let id = self.reader.varint(self.field)?;
        let Some(Definition { name, kind, from_client, from_server }) = definition(id) else {
            return Err(DecodeError::UnknownProperty { place, id });
        };
        if from_client & self.holder == 0 {
            return Err(if from_server & self.holder != 0 {
                DecodeError::PropertyFromServer { place, property: name }
            } else {
                DecodeError::PropertyNotAllowed { place, property: name }
            });
        }
        let id = id as u8; // the table has no id over 42
        if id != id::USER_PROPERTY {
            if self.seen & (1 << id) != 0 {
                return Err(DecodeError::DuplicateProperty { place, property: name });
            }
            self.seen |= 1 << id;
        }
        let value = read_value(&mut self.reader, name, kind)?;
        Ok(Some((id, value)))
    }

    pub(super) fn place(&self, field: &'static str) -> Place {
        self.reader.place(field)
    }

    /// The block's user properties. Only after the walk has found the whole block valid.
    pub(super) fn user_properties(&self) -> UserProperties<'a> {
        UserProperties { block: self.block }
    }
}

fn read_value<'a>(reader: &mut Reader<'a>, name: &'static str, kind: Kind) -> Result<Value<'a>, DecodeError> {
    let value_error = |place: Place, value: u32| -> Result<Value<'a>, DecodeError> {
        Err(DecodeError::PropertyValue { place, value })
    };
    let place = reader.place(name);
    Ok(match kind {
        Kind::Flag => match reader.u8(name)? {
            0 => Value::Flag(false),
            1 => Value::Flag(true),
            other => return value_error(place, other.into()),
        },
        Kind::U16 => Value::U16(reader.u16(name)?),
        Kind::U16NotZero => match reader.u16(name)? {
            0 => return value_error(place, 0),
            value => Value::U16(value),
        },
        Kind::U32 => Value::U32(reader.u32(name)?),
        Kind::U32NotZero | Kind::VarintNotZero => {
            let value =
                if matches!(kind, Kind::VarintNotZero) { reader.varint(name)? } else { reader.u32(name)? };
            if value == 0 {
                return value_error(place, 0);
            }
            Value::U32(value)
        }
        Kind::Text => Value::Text(reader.utf8(name)?),
        Kind::Binary => Value::Binary(reader.binary(name)?),
        Kind::Pair => Value::Pair(reader.utf8("user property name")?, reader.utf8("user property value")?),
    })
}

/// The user properties of a packet, in their order; names may repeat (§3.3.2.3.7). Nothing is copied or kept: each walk
/// reads the packet's block again.
#[derive(Clone, Copy, Default)]
pub struct UserProperties<'a> {
    /// A whole block of valid properties, of which the others are skipped.
    pub(super) block: &'a [u8],
}

impl<'a> UserProperties<'a> {
    pub fn iter(&self) -> UserPropertiesIter<'a> {
        UserPropertiesIter { reader: Reader::new(self.block, PacketType::Publish) }
    }

    /// The value of the first user property of this name.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

impl PartialEq for UserProperties<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for UserProperties<'_> {}

impl std::fmt::Debug for UserProperties<'_> {
    /// Names only: values may be secret, such as a token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, _)| name)).finish()
    }
}

impl<'a> IntoIterator for UserProperties<'a> {
    type Item = (&'a str, &'a str);
    type IntoIter = UserPropertiesIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// See [`UserProperties`].
#[derive(Clone)]
pub struct UserPropertiesIter<'a> {
    reader: Reader<'a>,
}

impl<'a> Iterator for UserPropertiesIter<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        // The block has been found valid, so an error here could only mean its end.
        while !self.reader.is_empty() {
            let Definition { name, kind, .. } = definition(self.reader.varint("").ok()?)?;
            if let Value::Pair(key, value) = read_value(&mut self.reader, name, kind).ok()? {
                return Some((key, value));
            }
        }
        None
    }
}
