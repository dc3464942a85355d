//! A message on its way to devices: encoded once for each protocol version and way of naming the topic, then shared.

use std::sync::{Arc, OnceLock};

use carillon_proto::{topic, v1};
use xxhash_rust::xxh3::xxh3_128;

use crate::codec::{EncodeError, PublishFields, SharedPublish, Version};

/// A session's identity as a number: who published (for "no local"), and who takes over whom.
pub fn session_key(app: &str, user: &str, client_id: &str) -> u128 {
    let mut text = Vec::with_capacity(app.len() + user.len() + client_id.len() + 2);
    // Neither an app's nor a user's name can hold a NUL or '/', so no two identities give the same text.
    text.extend_from_slice(app.as_bytes());
    text.push(b'/');
    text.extend_from_slice(user.as_bytes());
    text.push(b'/');
    text.extend_from_slice(client_id.as_bytes());
    xxh3_128(&text)
}

pub struct Delivery {
    pub message: v1::Message,
    pub topic: Arc<str>,
    /// [`session_key`] of the publishing session; 0 if it was not a device.
    pub publisher: u128,
    // By version and by whether the app's level is left out.
    frames: [OnceLock<Option<SharedPublish>>; 4],
}

impl Delivery {
    pub fn new(message: v1::Message) -> Self {
        let topic = Arc::from(message.topic.as_str());
        let publisher = message.publisher.as_ref().map_or(0, |p| session_key(&p.app, &p.user, &p.client_id));
        Delivery { message, topic, publisher, frames: Default::default() }
    }

    /// The PUBLISH for a protocol version; `relative`: for a device of the root app, which does not name the app.
    /// None if MQTT cannot carry the message (a field of more than 65,535 bytes).
    pub fn frame(&self, version: Version, relative: bool) -> Option<&SharedPublish> {
        let index = usize::from(version == Version::V5) * 2 + usize::from(relative);
        let encode = || match self.encode(version, relative) {
            Ok(frame) => Some(frame),
            Err(error) => {
                tracing::warn!(topic = %self.topic, %error, "message cannot be sent to devices");
                None
            }
        };
        self.frames[index].get_or_init(encode).as_ref()
    }

    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.message.expires_ms != 0 && self.message.expires_ms <= now_ms
    }

    /// Seconds left now, if the frame says something else: it has waited since it was encoded (MQTT 5.0 §3.3.2.3.3).
    pub fn expiry_left(&self, frame: &SharedPublish, now_ms: u64) -> Option<u32> {
        let encoded = frame.message_expiry()?;
        Some(self.seconds_left(now_ms)).filter(|left| *left != encoded)
    }

    fn seconds_left(&self, now_ms: u64) -> u32 {
        let left_ms = self.message.expires_ms.saturating_sub(now_ms);
        u32::try_from(left_ms.div_ceil(1000)).unwrap_or(u32::MAX)
    }

    fn encode(&self, version: Version, relative: bool) -> Result<SharedPublish, EncodeError> {
        let message = &self.message;
        let name =
            if relative { self.topic.split_once('/').map_or("", |(_, rest)| rest) } else { &*self.topic };
        let default = v1::Properties::default();
        let properties = message.properties.as_ref().unwrap_or(&default);
        let (epoch, seq) = (message.epoch.to_string(), message.seq.to_string());
        let mut user: Vec<(&str, &str)> = Vec::with_capacity(4 + properties.user.len());
        // Who does not name the app knows nothing of Carillon, and gets what the publisher sent and nothing else.
        if !relative {
            if message.seq != 0 {
                user.push(("epoch", &epoch));
                user.push(("seq", &seq));
            }
            if !message.id.is_empty() {
                user.push(("id", &message.id));
            }
            if !message.stored {
                user.push(("stored", "0"));
            }
        }
        user.extend(properties.user.iter().map(|p| (p.key.as_str(), p.value.as_str())));
        let message_expiry = (message.expires_ms != 0).then(|| self.seconds_left(carillon_proto::now_ms()));
        let response_topic = if relative {
            let app = topic::app_of(&self.topic);
            properties
                .response_topic
                .strip_prefix(app)
                .and_then(|rest| rest.strip_prefix('/'))
                .unwrap_or(&properties.response_topic)
        } else {
            &properties.response_topic
        };
        let fields = PublishFields {
            topic: name,
            payload: &message.payload,
            retain: false,
            payload_format: properties.payload_is_utf8.then_some(true),
            message_expiry,
            content_type: (!properties.content_type.is_empty()).then_some(properties.content_type.as_str()),
            response_topic: (!response_topic.is_empty()).then_some(response_topic),
            correlation_data: (!properties.correlation_data.is_empty())
                .then_some(&properties.correlation_data[..]),
        };
        SharedPublish::encode(version, &fields, user.iter().copied())
    }
}
