//! What a webhook is sent: a JSON array of events, and the signature over it.
//!
//! An upstream message:
//! ```json
//! {"type": "upstream", "app": "demo", "topic": "demo/up/order", "kind": "order", "user": "alice",
//!  "client_id": "phone-1", "id": "0197…", "epoch": 3, "seq": 42, "qos": 1, "payload": "two coffees",
//!  "published_at": "2026-03-20T09:00:00.000Z"}
//! ```
//! `payload` is there when the payload is UTF-8, else `payload_base64`. `user` and `client_id` are of the device, and not
//! there when a backend published. A presence event:
//! ```json
//! {"type": "presence", "app": "demo", "topic": "demo/up/$presence", "user": "alice", "client_id": "phone-1",
//!  "online": true, "sessions": 1, "since": "2026-03-20T09:00:00.000Z", "at": "2026-03-20T09:00:00.000Z",
//!  "address": "192.0.2.1:50000", "gateway": "edge-1", "id": "0197…", "epoch": 3, "seq": 7,
//!  "published_at": "2026-03-20T09:00:00.001Z"}
//! ```
//! `sessions` is how many the user has online after the event: the first came when it is 1 and `online`, the last went
//! when it is 0. `reason` says why one went. Events of one topic are sent in order; a retry may repeat (same `id`).

use aws_lc_rs::hmac;
use base64::Engine as _;
use carillon_proto::v1;
use serde::{Deserialize, Serialize};

use crate::center::body::rfc3339;
use crate::registry::{PresenceEvent, is_presence};

/// Header with the signature: `sha256={hex HMAC-SHA256 of the body}`, keyed with the webhook's secret.
pub const SIGNATURE: &str = "carillon-signature";

/// One event. Shapes: see the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Event {
    Upstream {
        app: String,
        topic: String,
        /// What comes after `{app}/up/`.
        kind: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        client_id: Option<String>,
        id: String,
        epoch: u64,
        seq: u64,
        qos: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        payload: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        payload_base64: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        content_type: Option<String>,
        published_at: String,
    },
    Presence {
        app: String,
        topic: String,
        user: String,
        client_id: String,
        online: bool,
        sessions: usize,
        since: String,
        at: String,
        address: String,
        gateway: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        id: String,
        epoch: u64,
        seq: u64,
        published_at: String,
    },
}

impl Event {
    pub fn of(message: &v1::Message) -> Event {
        let (app, topic) = (carillon_proto::topic::app_of(&message.topic).to_owned(), message.topic.clone());
        let (id, published_at) = (message.id.clone(), rfc3339(message.published_ms));
        if is_presence(message)
            && let Ok(event) = serde_json::from_slice::<PresenceEvent>(&message.payload)
        {
            return Event::Presence {
                app,
                topic,
                user: event.user,
                client_id: event.client_id,
                online: event.online,
                sessions: event.sessions,
                since: rfc3339(event.since_ms),
                at: rfc3339(event.at_ms),
                address: event.address,
                gateway: event.gateway,
                reason: (!event.reason.is_empty()).then_some(event.reason),
                id,
                epoch: message.epoch,
                seq: message.seq,
                published_at,
            };
        }
        let (payload, payload_base64) = match std::str::from_utf8(&message.payload) {
            Ok(text) => (Some(text.to_owned()), None),
            Err(_) => (None, Some(base64::engine::general_purpose::STANDARD.encode(&message.payload))),
        };
        let content_type = message.properties.as_ref().map(|properties| properties.content_type.clone());
        Event::Upstream {
            app,
            kind: topic.splitn(3, '/').nth(2).unwrap_or_default().to_owned(),
            topic,
            user: message.publisher.as_ref().map(|publisher| publisher.user.clone()),
            client_id: message.publisher.as_ref().map(|publisher| publisher.client_id.clone()),
            id,
            epoch: message.epoch,
            seq: message.seq,
            qos: message.qos,
            payload,
            payload_base64,
            content_type: content_type.filter(|content_type| !content_type.is_empty()),
            published_at,
        }
    }

    /// Its type, as metrics show it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Event::Upstream { .. } => "upstream",
            Event::Presence { .. } => "presence",
        }
    }
}

/// The value of the [`SIGNATURE`] header.
pub fn signature(secret: &str, body: &[u8]) -> String {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), body);
    let mut text = "sha256=".to_owned();
    for byte in tag.as_ref() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_rfc_4231() {
        // Test case 2 (§4.3).
        assert_eq!(
            signature("Jefe", b"what do ya want for nothing?"),
            "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_device_cannot_forge_presence() {
        let event = PresenceEvent {
            app: "demo".into(),
            user: "alice".into(),
            client_id: "phone".into(),
            online: true,
            sessions: 1,
            since_ms: 0,
            at_ms: 0,
            address: "192.0.2.1:5".into(),
            gateway: "edge-1".into(),
            reason: String::new(),
        };
        let mut message = v1::Message {
            topic: "demo/up/$presence".into(),
            payload: serde_json::to_vec(&event).unwrap().into(),
            ..v1::Message::default()
        };
        let genuine = Event::of(&message);
        assert!(
            matches!(&genuine, Event::Presence { user, sessions: 1, .. } if user == "alice"),
            "{genuine:?}"
        );
        message.publisher = Some(v1::SessionRef { user: "mallory".into(), ..v1::SessionRef::default() });
        let forged = Event::of(&message);
        assert!(
            matches!(&forged, Event::Upstream { user: Some(user), kind, .. } if user == "mallory" && kind == "$presence"),
            "{forged:?}"
        );
    }

    #[test]
    fn a_payload_that_is_no_text_is_in_base64() {
        let message = v1::Message {
            topic: "demo/up/a/b".into(),
            payload: vec![0xff, 0x00].into(),
            ..v1::Message::default()
        };
        let json = serde_json::to_value(Event::of(&message)).unwrap();
        assert_eq!(json["payload_base64"], "/wA=");
        assert_eq!(json["kind"], "a/b");
        assert_eq!(json.get("payload"), None);
    }
}
