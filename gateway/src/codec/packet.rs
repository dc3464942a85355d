//! The packets that a client sends, borrowed from the bytes they came in.

use std::fmt;

use super::property::UserProperties;
use super::reader::Reader;
use super::{PacketType, QoS, Version};

/// A packet from a client, valid in itself. What depends on the session (is this alias known, is this packet identifier
/// in use, is this QoS offered) is for the session to judge.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(clippy::large_enum_variant)] // lives on the stack for the handling of one packet
pub enum Packet<'a> {
    Connect(Connect<'a>),
    Publish(Publish<'a>),
    PubAck(Ack<'a>),
    PubRec(Ack<'a>),
    PubRel(Ack<'a>),
    PubComp(Ack<'a>),
    Subscribe(Subscribe<'a>),
    Unsubscribe(Unsubscribe<'a>),
    PingReq,
    Disconnect(Disconnect<'a>),
    /// Only in 5.0.
    Auth(Auth<'a>),
}

impl Packet<'_> {
    pub fn packet_type(&self) -> PacketType {
        match self {
            Packet::Connect(_) => PacketType::Connect,
            Packet::Publish(_) => PacketType::Publish,
            Packet::PubAck(_) => PacketType::PubAck,
            Packet::PubRec(_) => PacketType::PubRec,
            Packet::PubRel(_) => PacketType::PubRel,
            Packet::PubComp(_) => PacketType::PubComp,
            Packet::Subscribe(_) => PacketType::Subscribe,
            Packet::Unsubscribe(_) => PacketType::Unsubscribe,
            Packet::PingReq => PacketType::PingReq,
            Packet::Disconnect(_) => PacketType::Disconnect,
            Packet::Auth(_) => PacketType::Auth,
        }
    }
}

/// §3.1. For 3.1.1 the fields that only 5.0 has are as 5.0 would have them by default, but for `session_expiry`.
#[derive(Clone, PartialEq, Eq)]
pub struct Connect<'a> {
    pub version: Version,
    /// "Clean session" in 3.1.1.
    pub clean_start: bool,
    /// Seconds; 0: none.
    pub keep_alive: u16,
    /// Empty when the server shall choose.
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    pub will: Option<Will<'a>>,
    /// Seconds after the end of the connection; `u32::MAX`: for ever (§3.1.2.11.2). For 3.1.1 what its clean session
    /// means: 0 with it, `u32::MAX` without.
    pub session_expiry: u32,
    /// How many QoS 1 and 2 messages the client takes at once (§3.1.2.11.3), at least 1.
    pub receive_maximum: u16,
    /// Bytes; larger packets must not be sent to it (§3.1.2.11.4).
    pub maximum_packet_size: Option<u32>,
    /// The largest topic alias that may be sent to it; 0: none.
    pub topic_alias_maximum: u16,
    pub request_response_information: bool,
    /// If not, reason strings and user properties may go only with PUBLISH, CONNACK and DISCONNECT (§3.1.2.11.7).
    pub request_problem_information: bool,
    pub user_properties: UserProperties<'a>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
}

impl fmt::Debug for Connect<'_> {
    /// Without the password and the authentication data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("version", &self.version)
            .field("clean_start", &self.clean_start)
            .field("keep_alive", &self.keep_alive)
            .field("client_id", &self.client_id)
            .field("username", &self.username)
            .field("password", &self.password.map(|_| "…"))
            .field("will", &self.will)
            .field("session_expiry", &self.session_expiry)
            .field("receive_maximum", &self.receive_maximum)
            .field("maximum_packet_size", &self.maximum_packet_size)
            .field("topic_alias_maximum", &self.topic_alias_maximum)
            .field("request_response_information", &self.request_response_information)
            .field("request_problem_information", &self.request_problem_information)
            .field("user_properties", &self.user_properties)
            .field("authentication_method", &self.authentication_method)
            .field("authentication_data", &self.authentication_data.map(|_| "…"))
            .finish()
    }
}

/// The message to publish when the connection ends without a DISCONNECT (§3.1.2.5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Will<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub qos: QoS,
    pub retain: bool,
    /// Seconds between the end of the connection and the publishing (§3.1.3.2.2).
    pub delay_seconds: u32,
    /// Never a topic alias.
    pub props: PublishProperties<'a>,
}

impl Will<'_> {
    /// As [`Publish::payload_is_as_declared`]; the reason code for the CONNACK is 0x99.
    pub fn payload_is_as_declared(&self) -> bool {
        self.props.declares_truly(self.payload)
    }
}

/// §3.3.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publish<'a> {
    pub dup: bool,
    pub qos: QoS,
    pub retain: bool,
    /// A topic name, without wildcards. Empty only when `props.topic_alias` stands for it.
    pub topic: &'a str,
    /// None with QoS 0; never 0.
    pub packet_id: Option<u16>,
    pub payload: &'a [u8],
    /// Empty in 3.1.1.
    pub props: PublishProperties<'a>,
}

impl Publish<'_> {
    /// False when the message is declared to be UTF-8 and is not; a server may refuse it with 0x99 (§3.3.2.3.2).
    /// Not part of decoding, as the refusal of one message is no reason to end the connection.
    pub fn payload_is_as_declared(&self) -> bool {
        self.props.declares_truly(self.payload)
    }
}

/// The properties that travel with a message (§3.3.2.3), of a PUBLISH or a will.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PublishProperties<'a> {
    /// `Some(true)`: the payload is UTF-8; `Some(false)`: said to be unspecified bytes, as is `None`.
    pub payload_format: Option<bool>,
    /// Seconds.
    pub message_expiry: Option<u32>,
    /// Never 0.
    pub topic_alias: Option<u16>,
    /// A topic name, without wildcards.
    pub response_topic: Option<&'a str>,
    pub correlation_data: Option<&'a [u8]>,
    pub content_type: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

impl PublishProperties<'_> {
    fn declares_truly(&self, payload: &[u8]) -> bool {
        self.payload_format != Some(true) || std::str::from_utf8(payload).is_ok()
    }
}

/// PUBACK, PUBREC, PUBREL, PUBCOMP (§3.4 to §3.7).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ack<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// Success in 3.1.1.
    pub reason_code: u8,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

/// §3.8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subscribe<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// Never 0.
    pub subscription_id: Option<u32>,
    pub user_properties: UserProperties<'a>,
    /// At least one.
    pub filters: SubscribeFilters<'a>,
}

/// What a subscription asks for (§3.8.3.1); in 3.1.1 only the QoS.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SubscribeOptions {
    pub qos: QoS,
    /// The client's own messages are not to be sent to it.
    pub no_local: bool,
    /// The retain flag of messages is to be left as published.
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
}

/// When retained messages are to be sent (§3.8.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum RetainHandling {
    /// At each SUBSCRIBE; so always in 3.1.1.
    #[default]
    Send,
    /// Only if the subscription did not exist.
    SendIfNew,
    DoNotSend,
}

/// The topic filters of a SUBSCRIBE in their order, each with its options. Nothing is copied: each walk reads the packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SubscribeFilters<'a> {
    /// Valid as a whole.
    pub(super) bytes: &'a [u8],
    pub(super) count: u32,
}

impl<'a> SubscribeFilters<'a> {
    pub fn iter(&self) -> SubscribeFiltersIter<'a> {
        SubscribeFiltersIter {
            reader: Reader::new(self.bytes, PacketType::Subscribe),
            left: self.count as usize,
        }
    }

    /// Never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.count as usize
    }
}

impl fmt::Debug for SubscribeFilters<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> IntoIterator for SubscribeFilters<'a> {
    type Item = (&'a str, SubscribeOptions);
    type IntoIter = SubscribeFiltersIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// See [`SubscribeFilters`].
#[derive(Clone)]
pub struct SubscribeFiltersIter<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for SubscribeFiltersIter<'a> {
    type Item = (&'a str, SubscribeOptions);

    fn next(&mut self) -> Option<Self::Item> {
        // Decoding has found all of it valid, so an error here could only mean the end.
        let filter = self.reader.utf8("").ok()?;
        let options = super::decode::subscribe_options(&mut self.reader, Version::V5).ok()?;
        self.left = self.left.saturating_sub(1);
        Some((filter, options))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for SubscribeFiltersIter<'_> {}

/// §3.10.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsubscribe<'a> {
    /// Never 0.
    pub packet_id: u16,
    pub user_properties: UserProperties<'a>,
    /// At least one.
    pub filters: UnsubscribeFilters<'a>,
}

/// The topic filters of an UNSUBSCRIBE in their order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UnsubscribeFilters<'a> {
    /// Valid as a whole.
    pub(super) bytes: &'a [u8],
    pub(super) count: u32,
}

impl<'a> UnsubscribeFilters<'a> {
    pub fn iter(&self) -> UnsubscribeFiltersIter<'a> {
        UnsubscribeFiltersIter {
            reader: Reader::new(self.bytes, PacketType::Unsubscribe),
            left: self.count as usize,
        }
    }

    /// Never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.count as usize
    }
}

impl fmt::Debug for UnsubscribeFilters<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> IntoIterator for UnsubscribeFilters<'a> {
    type Item = &'a str;
    type IntoIter = UnsubscribeFiltersIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// See [`UnsubscribeFilters`].
#[derive(Clone)]
pub struct UnsubscribeFiltersIter<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for UnsubscribeFiltersIter<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<Self::Item> {
        let filter = self.reader.utf8("").ok()?;
        self.left = self.left.saturating_sub(1);
        Some(filter)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for UnsubscribeFiltersIter<'_> {}

/// §3.14.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disconnect<'a> {
    /// Normal disconnection in 3.1.1. 0x04: the will is to be published all the same.
    pub reason_code: u8,
    /// Seconds, replaces that of the CONNECT; must not be there if that was 0 (§3.14.2.2.2).
    pub session_expiry: Option<u32>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

/// §3.15.
#[derive(Clone, PartialEq, Eq)]
pub struct Auth<'a> {
    /// Continue or re-authenticate.
    pub reason_code: u8,
    pub method: &'a str,
    pub data: Option<&'a [u8]>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

impl fmt::Debug for Auth<'_> {
    /// Without the authentication data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("reason_code", &self.reason_code)
            .field("method", &self.method)
            .field("data", &self.data.map(|_| "…"))
            .field("reason_string", &self.reason_string)
            .field("user_properties", &self.user_properties)
            .finish()
    }
}
