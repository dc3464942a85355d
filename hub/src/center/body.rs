//! The JSON shapes of the HTTP API, and the way between them and the messages inside.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use carillon_proto::v1;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Accepted, Broadcast, Push, To};
use crate::problem::{Kind, Problem, ProblemDocument};

/// Base64 as everyone writes it, with padding or without.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A request body with the fields of every message, and some of its own.
macro_rules! message_body {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
            /// The payload as text. Exactly one of `payload` and `payload_base64` is given.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub payload: Option<String>,
            /// The payload in base64 (RFC 4648 §4).
            #[serde(skip_serializing_if = "Option::is_none")]
            pub payload_base64: Option<String>,
            /// 0: at most once. 1 (the default): at least once.
            #[serde(skip_serializing_if = "Option::is_none")]
            #[schemars(range(min = 0, max = 1))]
            pub qos: Option<u64>,
            /// It is not delivered after this time. 0 (the default): as long as the topic keeps messages.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub ttl_seconds: Option<u32>,
            /// Keep it for who is away? The default is what the app's rule for the topic says.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub store: Option<bool>,
            /// Makes a retry harmless: a second message with this id on the topic is the first one. 1 to 128 visible
            /// ASCII characters. Made by the server when it is not given.
            #[serde(skip_serializing_if = "Option::is_none")]
            #[schemars(length(min = 1, max = 128))]
            pub id: Option<String>,
            /// MQTT content type of the payload.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub content_type: Option<String>,
            /// MQTT user properties.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub properties: Option<BTreeMap<String, String>>,
        }

        impl $name {
            fn payload(&self) -> Result<(Bytes, bool), Problem> {
                payload(self.payload.as_deref(), self.payload_base64.as_deref())
            }

            fn properties(&self, payload_is_utf8: bool) -> v1::Properties {
                properties(payload_is_utf8, self.content_type.clone(), self.properties.clone())
            }
        }
    };
}

message_body! {
    /// A message whose receiver is named by the path.
    MessageBody {
        /// Keep it as the topic's retained message.
        retain: bool,
    }
}
message_body! {
    /// A message to a topic.
    TopicMessageBody {
        /// The topic, in full (`demo/news/local`) or without the app's level (`news/local`).
        topic: String,
        /// Keep it as the topic's retained message.
        retain: bool,
    }
}
message_body! {
    /// A line of a batch. Exactly one of `user`, `group` and `topic` is given.
    BatchLine {
        /// To this user's inbox.
        user: String,
        /// To this group.
        group: String,
        /// To this topic, in full or without the app's level.
        topic: String,
        /// Keep it as the topic's retained message.
        retain: bool,
    }
}
message_body! {
    /// A message to everyone in the app.
    BroadcastBody {
        /// Sends per second over all gateways together. 0 (the default): what the app's limits say.
        rate_per_second: f64,
    }
}

macro_rules! into_push {
    ($name:ident) => {
        impl $name {
            /// The push this asks for.
            pub fn into_push(self, to: To) -> Result<Push, Problem> {
                let (payload, is_utf8) = self.payload()?;
                let properties = self.properties(is_utf8);
                Ok(Push {
                    to,
                    payload,
                    qos: self.qos,
                    ttl_seconds: self.ttl_seconds.unwrap_or(0),
                    store: self.store,
                    id: self.id,
                    retain: self.retain.unwrap_or(false),
                    properties,
                })
            }
        }
    };
}
into_push!(MessageBody);
into_push!(TopicMessageBody);
into_push!(BatchLine);

impl TopicMessageBody {
    /// Its receiver.
    pub fn to(&self) -> Result<To, Problem> {
        self.topic.clone().map(To::Topic).ok_or_else(|| Problem::field("topic", "is missing"))
    }
}

impl BatchLine {
    /// Its receiver.
    pub fn to(&self) -> Result<To, Problem> {
        match (&self.user, &self.group, &self.topic) {
            (Some(user), None, None) => Ok(To::User(user.clone())),
            (None, Some(group), None) => Ok(To::Group(group.clone())),
            (None, None, Some(topic)) => Ok(To::Topic(topic.clone())),
            (None, None, None) => {
                Err(Problem::field("user", "is missing: give one of `user`, `group` and `topic`"))
            }
            (Some(_), Some(_), _) => Err(Problem::field("group", "is one too many: `user` is given")),
            (_, _, Some(_)) => Err(Problem::field("topic", "is one too many: `user` or `group` is given")),
        }
    }
}

impl BroadcastBody {
    pub fn into_broadcast(self) -> Result<Broadcast, Problem> {
        let (payload, is_utf8) = self.payload()?;
        let properties = self.properties(is_utf8);
        Ok(Broadcast {
            payload,
            qos: self.qos,
            ttl_seconds: self.ttl_seconds.unwrap_or(0),
            store: self.store,
            id: self.id,
            rate_per_second: self.rate_per_second.unwrap_or(0.0),
            properties,
        })
    }
}

fn payload(text: Option<&str>, base64: Option<&str>) -> Result<(Bytes, bool), Problem> {
    match (text, base64) {
        (Some(text), None) => Ok((Bytes::copy_from_slice(text.as_bytes()), true)),
        (None, Some(base64)) => match LENIENT.decode(base64) {
            Ok(bytes) => Ok((bytes.into(), false)),
            Err(error) => Err(Problem::field("payload_base64", format!("is not base64: {error}"))),
        },
        (None, None) => Err(Problem::field("payload", "is missing: give `payload` or `payload_base64`")),
        (Some(_), Some(_)) => Err(Problem::field("payload_base64", "is one too many: `payload` is given")),
    }
}

fn properties(
    payload_is_utf8: bool,
    content_type: Option<String>,
    user: Option<BTreeMap<String, String>>,
) -> v1::Properties {
    let user =
        user.unwrap_or_default().into_iter().map(|(key, value)| v1::UserProperty { key, value }).collect();
    v1::Properties {
        payload_is_utf8,
        content_type: content_type.unwrap_or_default(),
        user,
        ..v1::Properties::default()
    }
}

/// Parses one JSON object; says which field is wrong, or the line and column where it stops being JSON.
pub fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let start = json.iter().position(|b| !b.is_ascii_whitespace());
    let Some(start) = start else {
        return Err(Problem::new(Kind::MalformedJson, "the body is empty; a JSON object is expected"));
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    // serde takes an array for a struct; people should not.
    if json[start] != b'{' {
        if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(json) {
            return Err(malformed(&error));
        }
        return Err(Problem::new(Kind::MalformedJson, "a JSON object is expected"));
    }
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        if error.classify() != serde_json::error::Category::Data {
            return malformed(&error);
        }
        let mut text = error.to_string();
        if let Some(at) = text.rfind(" at line ") {
            text.truncate(at);
        }
        // An unknown field is the object's error; name the field all the same.
        let unknown = ["unknown field `", "duplicate field `"]
            .iter()
            .find_map(|before| text.strip_prefix(before)?.split_once('`').map(|(name, _)| name.to_owned()));
        let field = match unknown {
            Some(name) => name,
            None if path == "." => return Problem::new(Kind::InvalidField, text),
            None => path,
        };
        Problem {
            field: Some(field.clone()),
            ..Problem::new(Kind::InvalidField, format!("`{field}`: {text}"))
        }
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> Problem {
    Problem::new(Kind::MalformedJson, error.to_string())
}

/// A message that was accepted: its place in its topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Accepted")]
pub struct AcceptedBody {
    pub id: String,
    /// The full topic.
    pub topic: String,
    /// The ownership under which it was sequenced.
    pub epoch: u64,
    /// Its place in the topic: later messages have larger ones.
    pub seq: u64,
    /// An earlier message had this id; `epoch` and `seq` are that one's, and nothing was published now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub duplicate: bool,
}

impl From<Accepted> for AcceptedBody {
    fn from(accepted: Accepted) -> Self {
        let Accepted { id, topic, epoch, seq, duplicate } = accepted;
        AcceptedBody { id, topic, epoch, seq, duplicate }
    }
}

/// A line of the answer to a batch: what became of the line of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum BatchResult {
    Accepted(AcceptedBody),
    Problem(ProblemDocument),
}

/// A broadcast and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Broadcast")]
pub struct JobBody {
    pub id: String,
    /// The full topic.
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    pub state: JobState,
    /// Subscribers, as far as the gateways have counted them.
    pub total: u64,
    /// How many of them it was sent to, or are gone.
    pub done: u64,
    /// Sends per second over all gateways together; 0: as fast as they can.
    pub rate_per_second: f64,
    /// RFC 3339, UTC.
    pub started_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
}

/// What a broadcast is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    Running,
    Paused,
    Cancelled,
    Finished,
    /// The owner was lost while it ran; who missed it gets it from the log when reconnecting, if it was stored.
    Interrupted,
}

impl From<v1::BroadcastJob> for JobBody {
    fn from(job: v1::BroadcastJob) -> Self {
        use v1::broadcast_job::State;
        let state = match job.state() {
            State::Unspecified | State::Running => JobState::Running,
            State::Paused => JobState::Paused,
            State::Cancelled => JobState::Cancelled,
            State::Finished => JobState::Finished,
            State::Interrupted => JobState::Interrupted,
        };
        JobBody {
            state,
            id: job.id,
            topic: job.topic,
            epoch: job.epoch,
            seq: job.seq,
            total: job.total,
            done: job.done,
            rate_per_second: job.rate_per_second,
            started_at: rfc3339(job.started_ms),
            ended_at: (job.ended_ms != 0).then(|| rfc3339(job.ended_ms)),
        }
    }
}

/// Who is online of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "User")]
pub struct UserBody {
    pub online: bool,
    pub sessions: Vec<SessionBody>,
}

/// One connected device of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Session")]
pub struct SessionBody {
    /// Its MQTT client id.
    pub device: String,
    /// The gateway that holds the connection.
    pub gateway: String,
    /// RFC 3339, UTC.
    pub since: String,
    /// The device's address, "ip:port".
    pub address: String,
}

impl From<v1::SessionsReply> for UserBody {
    fn from(reply: v1::SessionsReply) -> Self {
        let sessions: Vec<_> = reply
            .sessions
            .into_iter()
            .map(|online| SessionBody {
                device: online.session.unwrap_or_default().client_id,
                gateway: online.gateway,
                since: rfc3339(online.since_ms),
                address: online.address,
            })
            .collect();
        UserBody { online: !sessions.is_empty(), sessions }
    }
}

/// How many connections were told to close.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Kicked")]
pub struct KickedBody {
    pub kicked: u32,
}

/// Which of a user's tokens are revoked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Revoke")]
pub struct RevokeBody {
    /// Those issued (claim `iat`) before this Unix time in seconds, and those that do not say; default: all up to now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// How long the app's tokens live at most, seconds: after that the revocation is forgotten. Default: it is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_lifetime_seconds: Option<u64>,
}

/// What is refused from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Revoked")]
pub struct RevokedBody {
    /// The user's tokens issued before this Unix time, seconds.
    pub before: u64,
}

/// Messages of a topic's log, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Messages")]
pub struct PulledBody {
    pub messages: Vec<PulledMessage>,
    /// Pass it as `after` to read on: "{epoch}:{seq}".
    pub next: String,
    /// There are more already.
    pub more: bool,
}

/// A message of a topic's log. Its payload is in `payload` when it is text (UTF-8), else in `payload_base64`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Message")]
pub struct PulledMessage {
    pub id: String,
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload_base64: Option<String>,
    pub qos: u32,
    /// RFC 3339, UTC.
    pub published_at: String,
    /// Not delivered after this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// MQTT user properties; of a key that is there several times, the last.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// The user whose device published it; not there when a backend did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publisher: Option<String>,
}

impl From<v1::Message> for PulledMessage {
    fn from(message: v1::Message) -> Self {
        let properties = message.properties.unwrap_or_default();
        let (payload, payload_base64) = match std::str::from_utf8(&message.payload) {
            Ok(text) => (Some(text.to_owned()), None),
            Err(_) => (None, Some(BASE64.encode(&message.payload))),
        };
        PulledMessage {
            id: message.id,
            topic: message.topic,
            epoch: message.epoch,
            seq: message.seq,
            payload,
            payload_base64,
            qos: message.qos,
            published_at: rfc3339(message.published_ms),
            expires_at: (message.expires_ms != 0).then(|| rfc3339(message.expires_ms)),
            content_type: (!properties.content_type.is_empty()).then_some(properties.content_type),
            properties: properties.user.into_iter().map(|pair| (pair.key, pair.value)).collect(),
            publisher: message.publisher.map(|publisher| publisher.user),
        }
    }
}

impl From<v1::PullReply> for PulledBody {
    fn from(reply: v1::PullReply) -> Self {
        PulledBody {
            messages: reply.messages.into_iter().map(PulledMessage::from).collect(),
            next: reply.next,
            more: reply.more,
        }
    }
}

/// Unix milliseconds as RFC 3339 in UTC with milliseconds; civil dates from days as in Hinnant's "chrono-compatible
/// low-level date algorithms".
pub fn rfc3339(ms: u64) -> String {
    let (seconds, millis) = (ms / 1000, ms % 1000);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests;
