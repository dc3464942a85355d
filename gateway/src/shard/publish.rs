//! PUBLISH from a device: checked, forwarded to the topic's owner, answered when the owner has accepted it.

use bytes::Bytes;
use carillon_proto::{topic, v1};

use super::Shard;
use super::close::Reason;
use super::publishing::PendingPublish;
use super::timers::millis;
use crate::auth;
use crate::codec::{self, Publish, PublishProperties, QoS, Version, reason};
use crate::event::{ConnId, Event, PublishOutcome};

/// Publishes of one device under way before it is not read from any more.
const PUBLISHING_MAX: usize = 1000;
/// And payload bytes of these.
const PUBLISHING_BYTES: usize = 4 * 1024 * 1024;

impl Shard {
    pub(super) fn publish(&mut self, index: u32, publish: &Publish<'_>) {
        let protocol_error = |reason: u8, text: &str| Reason::ProtocolError { reason, text: text.to_owned() };
        self.counts.published[usize::from(publish.qos.level())] += 1;
        let topic = match self.unaliased(index, publish) {
            Ok(topic) => topic,
            Err((code, text)) => return self.close(index, protocol_error(code, &text)),
        };
        // First of all: what is refused or said again costs as much as what is forwarded.
        self.pace(index, publish.payload.len());
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        self.apps[session.app_index as usize].1.published += 1;
        let packet_id = publish.packet_id.unwrap_or(0);
        if let Some(publishing) = &mut session.publishing
            && publish.qos == QoS::ExactlyOnce
        {
            // A message has been taken over with this identifier: it is said again, and that is all [MQTT-4.3.3-10].
            if publishing.is_forwarding(packet_id) {
                return; // the answer to the first one is on its way
            }
            if publishing.has_received(packet_id) {
                let reason = Some(reason::SUCCESS);
                let again =
                    PendingPublish { packet_id, qos: publish.qos, reason, bytes: 0, message_id: None };
                publishing.queue.push_back(again);
                return self.answer_publishes(index);
            }
        }
        let unanswered = session.publishing.as_ref().map_or(0, |publishing| publishing.queue.len());
        if publish.qos != QoS::AtMostOnce && conn.version == Version::V5 {
            let unfinished = session.publishing.as_ref().map_or(0, |publishing| publishing.unfinished());
            if unfinished >= self.config.receive_maximum.into() {
                let maximum = self.config.receive_maximum;
                let text = format!("more than {maximum} publishes of QoS 1 and 2 without an answer");
                return self.close(index, protocol_error(reason::RECEIVE_MAXIMUM_EXCEEDED, &text));
            }
        }
        let apps = self.shared.apps.load();
        let topic = topic.as_deref().unwrap_or(publish.topic);
        let is_too_long = topic.len() > self.config.max_topic_bytes.into();
        let allowed = session
            .resolve(topic)
            .filter(|(full, _, who)| {
                apps.get(&**who.app)
                    .is_some_and(|app| auth::may_publish(app, who.rights, who.user, auth::below(full)))
            })
            .map(|(full, _, who)| (full, who.app.clone(), who.is_root, session.who_ref(who)));
        let refused = match &allowed {
            _ if is_too_long => Some(reason::TOPIC_NAME_INVALID),
            None => Some(reason::NOT_AUTHORIZED),
            Some((full, ..)) if topic::check_name(full).is_err() => Some(reason::TOPIC_NAME_INVALID),
            Some((full, ..)) if auth::levels(full) > self.config.max_topic_levels.into() => {
                Some(reason::TOPIC_NAME_INVALID)
            }
            Some(_) if !publish.payload_is_as_declared() => Some(reason::PAYLOAD_FORMAT_INVALID),
            Some(_) => None,
        };
        // Not if it is refused: the token of its app may come with the next SUBSCRIBE only.
        let message_id = session
            .publishing
            .as_mut()
            .filter(|_| publish.qos == QoS::ExactlyOnce && (refused.is_none() || !publish.dup))
            .and_then(|publishing| publishing.earlier_id(packet_id, publish.dup));
        let forwarded = match (allowed, refused) {
            (Some((full, app, is_root, publisher)), None) => {
                let mut message = message(
                    full,
                    publish.payload,
                    publish.qos,
                    publish.retain,
                    &publish.props,
                    &app,
                    is_root,
                    publisher,
                    self.now_ms,
                );
                if let Some(earlier) = message_id {
                    message.id = earlier.into();
                }
                Some(message)
            }
            _ => None,
        };
        let publishing = session.publishing.get_or_insert_default();
        let ticket = publishing.first_ticket + publishing.queue.len() as u64;
        publishing.bytes += publish.payload.len();
        let bytes = publishing.bytes;
        let is_once = publish.qos == QoS::ExactlyOnce;
        publishing.queue.push_back(PendingPublish {
            packet_id,
            qos: publish.qos,
            reason: refused,
            bytes: publish.payload.len() as u32,
            message_id: forwarded.as_ref().filter(|_| is_once).map(|message| message.id.as_str().into()),
        });
        if let Some(message) = forwarded {
            // Backpressure: the device is read again when the owners have caught up with it.
            if unanswered >= PUBLISHING_MAX || bytes >= PUBLISHING_BYTES {
                conn.is_paused = true;
            }
            let publisher = publishing.publisher.clone();
            let id = self.id(index);
            let shard = self.link.shard(self.index).clone();
            let done = move |outcome| shard.post(Event::Published { conn: id, ticket, outcome });
            self.link.publish(&publisher, message, done);
        } else {
            self.answer_publishes(index);
        }
    }

    /// The topic that the PUBLISH's alias stands for, if it leaves it out (MQTT 5.0 §3.3.2.3.4).
    fn unaliased(&mut self, index: u32, publish: &Publish<'_>) -> Result<Option<String>, (u8, String)> {
        let Some(alias) = publish.props.topic_alias else { return Ok(None) };
        let Some(session) = &mut self.conns[index as usize].session else { return Ok(None) };
        if alias > session.alias_offered {
            let text =
                format!("topic alias {alias} is above the Topic Alias Maximum, {}", session.alias_offered);
            return Err((reason::TOPIC_ALIAS_INVALID, text));
        }
        if publish.topic.is_empty() {
            let known = session.aliases.as_ref().and_then(|aliases| aliases.get(alias));
            return match known {
                Some(topic) => Ok(Some(topic.to_owned())),
                None => Err((reason::PROTOCOL_ERROR, format!("topic alias {alias} has not been set"))),
            };
        }
        // Of a topic that is too long as much is kept as shows that.
        let longest = usize::from(self.config.max_topic_bytes) + 1;
        let kept = &publish.topic[..publish.topic.ceil_char_boundary(longest)];
        session.aliases.get_or_insert_default().set(alias, kept);
        Ok(None)
    }

    pub(super) fn published(&mut self, id: ConnId, ticket: u64, outcome: PublishOutcome) {
        let Some(index) = self.find(id) else { return };
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let Some(publishing) = &mut session.publishing else { return };
        let Some(place) = ticket.checked_sub(publishing.first_ticket) else { return };
        if let Some(pending) = publishing.queue.get_mut(place as usize) {
            pending.reason = Some(outcome.reason);
        }
        self.answer_publishes(index);
    }

    /// Answers what can be answered, in the order it was sent (MQTT 5.0 §4.6).
    fn answer_publishes(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        let version = conn.version;
        let Some(session) = &mut conn.session else { return };
        let Some(publishing) = &mut session.publishing else { return };
        self.scratch.clear();
        while let Some(&PendingPublish { packet_id, qos, reason: Some(code), bytes, .. }) =
            publishing.queue.front()
        {
            if packet_id != 0 && version == Version::V4 && code >= 0x80 && code != reason::NOT_AUTHORIZED {
                // 3.1.1 has no way to say no. What may work later is tried again by the device when it is back; what
                // it is not allowed to is acked, and dropped (3.1.1 §3.3.5).
                return self.close(index, Reason::PublishFailed);
            }
            publishing.queue.pop_front();
            publishing.bytes -= bytes as usize;
            publishing.first_ticket += 1;
            match qos {
                QoS::AtMostOnce => {}
                QoS::AtLeastOnce => {
                    codec::puback(&mut self.scratch, version, packet_id, code, None);
                }
                QoS::ExactlyOnce => {
                    publishing.answered(packet_id);
                    // With an error the identifier is free at once (MQTT 5.0 §4.3.3).
                    if code < 0x80 || version == Version::V4 {
                        publishing.accepted(packet_id);
                    }
                    codec::pubrec(&mut self.scratch, version, packet_id, code, None);
                }
            }
        }
        if publishing.queue.is_empty() && publishing.queue.capacity() > 64 {
            publishing.queue.shrink_to_fit();
        }
        if publishing.is_idle(millis(self.now)) {
            session.publishing = None;
        }
        if !self.scratch.is_empty() {
            self.reply(index);
        }
        self.read_on_if_due(index);
    }

    /// Reads on a connection that was paused for its publishes, if nothing else holds it up.
    pub(super) fn read_on_if_due(&mut self, index: u32) {
        let conn = &self.conns[index as usize];
        let Some(session) = &conn.session else { return };
        let is_due = session.publishing.as_ref().is_none_or(|publishing| {
            publishing.queue.len() < PUBLISHING_MAX / 2
                && publishing.bytes < PUBLISHING_BYTES / 2
                && publishing.read_again <= self.now
        });
        let is_waiting =
            session.pending.is_some() || session.unsubscribing.is_some() || session.opening.is_some();
        if conn.is_paused && !is_waiting && is_due {
            self.resume(index);
        }
    }
}

/// A device's message in the shape that crosses the wire.
#[allow(clippy::too_many_arguments)] // from two packets, PUBLISH and CONNECT's will
pub(super) fn message(
    topic: String,
    payload: &[u8],
    qos: QoS,
    retain: bool,
    properties: &PublishProperties<'_>,
    app: &str,
    is_root: bool,
    publisher: v1::SessionRef,
    now_ms: u64,
) -> v1::Message {
    let has_properties = properties.payload_format.is_some()
        || properties.content_type.is_some()
        || properties.response_topic.is_some()
        || properties.correlation_data.is_some()
        || properties.user_properties.iter().next().is_some();
    // A response topic is a topic of the same device: made full, so that whoever answers need not know its app.
    let response_topic = properties
        .response_topic
        .and_then(|written| auth::resolve(app, is_root, written))
        .map(|(full, _)| full)
        .unwrap_or_default();
    v1::Message {
        topic,
        payload: Bytes::copy_from_slice(payload),
        qos: qos.level().into(),
        retain,
        // What is accepted at least once must be told from its second try.
        id: if qos == QoS::AtMostOnce { String::new() } else { uuid::Uuid::now_v7().to_string() },
        published_ms: now_ms,
        expires_ms: properties.message_expiry.map_or(0, |seconds| now_ms + u64::from(seconds) * 1000),
        properties: has_properties.then(|| v1::Properties {
            payload_is_utf8: properties.payload_format == Some(true),
            content_type: properties.content_type.unwrap_or_default().to_owned(),
            response_topic,
            correlation_data: properties.correlation_data.map(Bytes::copy_from_slice).unwrap_or_default(),
            user: properties
                .user_properties
                .iter()
                .map(|(key, value)| v1::UserProperty { key: key.to_owned(), value: value.to_owned() })
                .collect(),
        }),
        publisher: Some(publisher),
        ..v1::Message::default()
    }
}
