//! What crosses the center's JSON API.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Who a message is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    User(String),
    Group(String),
    /// A topic, with or without the app's level.
    Topic(String),
}

/// A message to push.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Push {
    #[serde(flatten)]
    payload: Payload,
    /// 0, 1 or 2; 1 unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// Not delivered after so many seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u32>,
    /// Keep it in the topic's log, whatever the app's rules say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<bool>,
    /// Makes a retry harmless.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Keep it as the topic's retained message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retain: Option<bool>,
}

/// Text as it is, anything else in base64.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
enum Payload {
    #[serde(rename = "payload")]
    Text(String),
    #[serde(rename = "payload_base64")]
    Base64(String),
}

impl Default for Payload {
    fn default() -> Self {
        Payload::Text(String::new())
    }
}

impl Payload {
    fn of(payload: &[u8]) -> Self {
        match std::str::from_utf8(payload) {
            Ok(text) => Payload::Text(text.to_owned()),
            Err(_) => Payload::Base64(STANDARD.encode(payload)),
        }
    }
}

impl Push {
    pub fn new(payload: impl AsRef<[u8]>) -> Self {
        Push { payload: Payload::of(payload.as_ref()), ..Push::default() }
    }
}

#[derive(Serialize)]
pub(super) struct PushBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<&'a str>,
    #[serde(flatten)]
    pub message: &'a Push,
}

/// A message was accepted, at this place of this topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pushed {
    pub id: String,
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    /// A message with this id had been accepted before; nothing was published now.
    #[serde(default)]
    pub duplicate: bool,
}

/// The answer to one line of a batch.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum BatchResult {
    Accepted(Pushed),
    Refused(Problem),
}

/// A broadcast to start.
#[derive(Debug, Clone, Serialize)]
pub struct BroadcastRequest {
    #[serde(flatten)]
    payload: Payload,
    /// Sends per second over all gateways; unset = the app's default, 0 = as fast as they can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
}

impl BroadcastRequest {
    pub fn new(payload: impl AsRef<[u8]>) -> Self {
        let payload = Payload::of(payload.as_ref());
        BroadcastRequest { payload, rate_per_second: None, id: None, ttl_seconds: None, qos: None }
    }
}

/// How far a broadcast is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Broadcast {
    pub id: String,
    /// The full topic, and the message's place in it.
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    pub state: BroadcastState,
    /// Devices that were connected and subscribed when it reached their gateway.
    #[serde(default)]
    pub total: u64,
    /// Of these: sent to, or gone.
    #[serde(default)]
    pub done: u64,
    #[serde(default)]
    pub rate_per_second: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BroadcastState {
    Running,
    Paused,
    Cancelled,
    Finished,
    /// Its owner was lost while it ran; who missed it gets it on reconnecting.
    Interrupted,
}

impl BroadcastState {
    /// Nothing more will happen to it.
    pub fn is_over(self) -> bool {
        !matches!(self, BroadcastState::Running | BroadcastState::Paused)
    }
}

impl fmt::Display for BroadcastState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BroadcastState::Running => "running",
            BroadcastState::Paused => "paused",
            BroadcastState::Cancelled => "cancelled",
            BroadcastState::Finished => "finished",
            BroadcastState::Interrupted => "interrupted",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BroadcastAction {
    Pause,
    Resume,
    Cancel,
}

impl BroadcastAction {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            BroadcastAction::Pause => "pause",
            BroadcastAction::Resume => "resume",
            BroadcastAction::Cancel => "cancel",
        }
    }
}

/// Whether a user is online, and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct User {
    pub online: bool,
    #[serde(default)]
    pub sessions: Vec<Session>,
}

/// A connected device of a user.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Session {
    /// Its client id.
    pub device: String,
    /// Instance id of the gateway.
    pub gateway: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Of the device, `ip:port`.
    #[serde(default)]
    pub address: String,
}

/// Live numbers of the app; totals since the gateways started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Overview {
    pub app: String,
    pub connections: u64,
    /// Messages sent to devices.
    pub delivered: u64,
    /// Messages published by devices.
    pub published: u64,
    /// QoS 0 messages that slow devices lost.
    pub dropped: u64,
    #[serde(default)]
    pub delivered_per_second: Option<f64>,
    #[serde(default)]
    pub published_per_second: Option<f64>,
    #[serde(default)]
    pub gateways: Vec<GatewayNumbers>,
}

/// One gateway's part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GatewayNumbers {
    pub gateway: String,
    /// `active`, `draining`, `drained`.
    #[serde(default)]
    pub state: String,
    pub connections: u64,
    pub delivered: u64,
    #[serde(default)]
    pub delivered_per_second: Option<f64>,
}

/// How many connections were told to close.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kicked {
    pub kicked: u32,
}

/// Which tokens are refused from now on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Revoked {
    /// Those of the user issued before this Unix time, seconds.
    pub before: u64,
}

/// Messages read from a topic.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pulled {
    pub messages: Vec<PulledMessage>,
    /// Where to read on.
    #[serde(default)]
    pub next: String,
    /// There is more after `next`.
    #[serde(default)]
    pub more: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PulledMessage {
    pub id: String,
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload_base64: Option<String>,
}

impl PulledMessage {
    /// The payload's bytes; none if the server sent base64 that is none.
    pub fn bytes(&self) -> Option<Bytes> {
        match (&self.payload, &self.payload_base64) {
            (Some(text), _) => Some(Bytes::copy_from_slice(text.as_bytes())),
            (None, Some(text)) => STANDARD.decode(text).ok().map(Bytes::from),
            (None, None) => Some(Bytes::new()),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Endpoints {
    endpoints: Vec<GatewayEndpoint>,
}

#[derive(Debug, Deserialize)]
struct GatewayEndpoint {
    #[serde(default)]
    mqtt: Option<String>,
    #[serde(default)]
    ws: Option<String>,
}

impl Endpoints {
    /// TCP before WebSocket, in the dispatcher's order.
    pub(super) fn addresses(self) -> Vec<String> {
        let scheme = |scheme: &str, address: String| {
            if address.contains("://") { address } else { format!("{scheme}://{address}") }
        };
        let of = |endpoint: GatewayEndpoint| {
            endpoint.mqtt.map(|a| scheme("mqtt", a)).or(endpoint.ws.map(|a| scheme("ws", a)))
        };
        self.endpoints.into_iter().filter_map(of).collect()
    }
}

/// What is wrong with a request (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Which kind of problem; stable.
    #[serde(rename = "type", default)]
    pub kind: String,
    pub title: String,
    #[serde(default)]
    pub status: u16,
    #[serde(default)]
    pub detail: String,
    /// The field that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.detail.is_empty() {
            f.write_str(&self.title)
        } else {
            write!(f, "{}: {}", self.title, self.detail)
        }
    }
}
