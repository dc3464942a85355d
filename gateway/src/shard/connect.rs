//! CONNECT to CONNACK: admission, take-over, and the session that was kept.

use std::net::SocketAddr;

use carillon_proto::v1;

use super::Shard;
use super::close::Reason;
use super::conn::{OpeningConnect, Phase, Session, Will};
use super::inflight::Inflight;
use super::publishing::Publishing;
use super::timers::{Entry, TICK, ticks};
use crate::auth::{self, Admitted, Refusal};
use crate::codec::{self, ConnAckProperties, Connect, DecodeError, Version, reason};
use crate::config::GatewayConfig;
use crate::delivery::session_key;
use crate::event::ConnId;
use crate::link::SaverFailure;

/// No CONNACK that accepts is longer, assigned client ids included.
const CONNACK_BYTES: usize = 128;

impl Shard {
    pub(super) fn connect(&mut self, index: u32, connect: &Connect<'_>) {
        let conn = &mut self.conns[index as usize];
        if conn.phase != Phase::Connecting {
            // MQTT 5.0 §3.1.0-2.
            let text = "a second CONNECT on one connection".to_owned();
            return self.close(index, Reason::ProtocolError { reason: reason::PROTOCOL_ERROR, text });
        }
        conn.version = connect.version;
        if self.refuses() {
            return self.refuse_elsewhere(index);
        }
        let certificate = self.conns[index as usize].take_certificate_user();
        let (apps, keyring) = (self.shared.apps.load_full(), self.shared.keyring.load_full());
        let leeway = self.config.token_leeway_seconds;
        let admitted = self
            .is_busy()
            .and_then(|()| auth::admit(connect, certificate, &apps, &keyring, leeway))
            .and_then(|admitted| self.will(connect, &admitted, &apps).map(|will| (admitted, will)))
            .and_then(|(admitted, will)| self.enter_app(&admitted).map(|()| (admitted, will)));
        let (admitted, will) = match admitted {
            Ok(admitted) => admitted,
            Err(Refusal { reason, text, failure }) => {
                if let Some(failure) = failure {
                    self.note_failure(index, failure);
                }
                // It must not make the packet larger than the device takes (MQTT 5.0 §3.2.2.3.9).
                let max = connect.maximum_packet_size.unwrap_or(u32::MAX) as usize;
                let is_short = text.len() + codec::REASON_BYTES <= max;
                return self.refuse(index, reason, if is_short { &text } else { "" });
            }
        };
        let session = self.session(index, connect, admitted, will);
        if !self.takes_connack(&session) {
            self.shared.admission.leave_app(&session.app);
            return self.refuse(index, reason::PACKET_TOO_LARGE, "");
        }
        self.not_pending();
        let (key, connection) = (session.key, session.connection);
        let conn = &mut self.conns[index as usize];
        conn.session = Some(Box::new(session));
        conn.forget_arrival();
        conn.phase = Phase::Opening;
        self.link.cancel_will(key, None);
        let id = self.id(index);
        match self.link.sessions().take(key, id, connection) {
            Some(before) if usize::from(before.shard) == self.index => {
                let left = self.hand_over(before, connect.clean_start);
                self.handed_over(id, left);
            }
            Some(before) => {
                self.conns[index as usize].is_paused = true;
                self.ask_for(before, id, connect.clean_start);
            }
            None => self.open(index),
        }
    }

    fn session(
        &mut self,
        index: u32,
        connect: &Connect<'_>,
        admitted: Admitted,
        will: Option<Will>,
    ) -> Session {
        let expiry = match connect.version {
            Version::V5 => connect.session_expiry.min(self.config.max_session_expiry_seconds),
            Version::V4 if connect.clean_start => 0,
            Version::V4 => self.config.default_session_expiry_seconds,
        };
        let app_index = self.app_index(&admitted.app);
        let address = self.conns[index as usize].peer();
        Session {
            key: session_key(&admitted.app, &admitted.user, &admitted.client_id),
            app: self.apps[app_index as usize].0.clone(),
            app_index,
            is_root: admitted.is_root,
            user: admitted.user.into(),
            client_id: admitted.client_id.into(),
            rights: admitted.rights,
            connection: self.shared.next_connection.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            since_ms: self.now_ms,
            address,
            expires: admitted.expires,
            stamp: admitted.stamp,
            guests: None,
            expiry_seconds: expiry,
            attachment: None,
            is_online: false,
            window: connect.receive_maximum.min(self.config.max_inflight),
            max_packet_bytes: connect.maximum_packet_size.unwrap_or(u32::MAX),
            alias_maximum: connect.topic_alias_maximum.min(self.config.topic_alias_maximum),
            alias_offered: match connect.version {
                Version::V5 => self.config.topic_alias_maximum,
                Version::V4 => 0,
            },
            wants_problems: connect.request_problem_information,
            will: will.map(Box::new),
            opening: Some(Box::new(OpeningConnect {
                clean_start: connect.clean_start,
                requested_expiry: connect.session_expiry,
                requested_keep_alive: connect.keep_alive,
                is_client_id_assigned: admitted.is_client_id_assigned,
                session_present: false,
                sent: Vec::new(),
            })),
            inflight: None,
            publishing: None,
            aliases: None,
            behind: None,
            waiting: None,
            pending: None,
            unsubscribing: None,
            wild_last: None,
            reached: None,
            next_packet_id: 0,
        }
    }

    fn will(
        &self,
        connect: &Connect<'_>,
        admitted: &Admitted,
        apps: &auth::Apps,
    ) -> Result<Option<Will>, Refusal> {
        let Some(will) = &connect.will else { return Ok(None) };
        let refuse = |reason, text: String| Err(Refusal { reason, text, failure: None });
        if !will.payload_is_as_declared() {
            return refuse(
                reason::PAYLOAD_FORMAT_INVALID,
                "the will's payload is not UTF-8 as it says".to_owned(),
            );
        }
        let resolved = auth::resolve(&admitted.app, admitted.is_root, will.topic);
        let allowed = resolved.and_then(|(topic, _)| {
            let app = apps.get(&*admitted.app)?;
            let allowed =
                auth::may_publish(app, admitted.rights.as_deref(), &admitted.user, auth::below(&topic));
            allowed.then_some(topic)
        });
        let Some(topic) = allowed else {
            return refuse(
                reason::NOT_AUTHORIZED,
                format!("the will's topic {:?} may not be published to", will.topic),
            );
        };
        if let Err(error) = carillon_proto::topic::check_name(&topic) {
            return refuse(reason::TOPIC_NAME_INVALID, format!("the will's topic {error}"));
        }
        let publisher = v1::SessionRef {
            app: admitted.app.to_string(),
            user: admitted.user.clone(),
            client_id: admitted.client_id.clone(),
        };
        let mut message = super::publish::message(
            topic,
            will.payload,
            will.qos,
            will.retain,
            &will.props,
            &admitted.app,
            admitted.is_root,
            publisher,
            self.now_ms,
        );
        // Its life begins when it is published.
        message.expires_ms = 0;
        // Whoever publishes it: once.
        message.id = uuid::Uuid::now_v7().to_string();
        Ok(Some(Will { message, delay_seconds: will.delay_seconds }))
    }

    /// The session is this connection's alone now: fetch what was kept, or begin afresh.
    pub(super) fn open(&mut self, index: u32) {
        let id = self.id(index);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &conn.session else { return };
        let Some(opening) = &session.opening else { return };
        let open = v1::OpenSession {
            session: Some(session.session_ref()),
            gateway: self.link.instance().to_owned(),
            incarnation: self.link.incarnation(),
            clean_start: opening.clean_start,
            // A session that is to end with the connection, but goes on with what was kept, is kept until then.
            expiry_seconds: if opening.clean_start {
                session.expiry_seconds
            } else {
                session.expiry_seconds.max(1)
            },
            connected_ms: session.since_ms,
        };
        let key = session.key;
        if open.clean_start && open.expiry_seconds == 0 {
            // Nothing to wait for: whatever there was is forgotten.
            self.link.forget_session(key, open);
            self.accept_connect(index);
        } else {
            conn.is_paused = true;
            self.link.open_session(id, key, open);
        }
    }

    pub(super) fn proceed(&mut self, id: ConnId) {
        let Some(index) = self.find(id) else { return };
        if !self.conns[index as usize].is_paused {
            self.resume(index);
        }
    }

    pub(super) fn opened(
        &mut self,
        id: ConnId,
        session: v1::SessionRef,
        result: Result<v1::SessionOpened, SaverFailure>,
    ) {
        let Some(index) = self.find(id) else {
            // The device went before its session came; what was kept goes on being kept from now.
            if let Ok(opened) = result
                && opened.kept
            {
                let key = session_key(&session.app, &session.user, &session.client_id);
                let close = v1::CloseSession {
                    session: Some(session),
                    attachment: opened.attachment,
                    expiry_seconds: self.config.default_session_expiry_seconds,
                    sent: Vec::new(),
                    delivery: opened.delivery,
                };
                self.link.close_session(key, close);
            }
            return;
        };
        let opened = match result {
            Ok(opened) => opened,
            Err(error) => return self.refuse_unopened(index, &error),
        };
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        session.attachment = opened.kept.then_some(opened.attachment);
        let delivery = opened.delivery.unwrap_or_default();
        let has_received = !delivery.received.is_empty();
        session.inflight = Inflight::restored(delivery.in_flight).map(Box::new);
        session.publishing = Publishing::restored(delivery.received).map(Box::new);
        if let Some(opening) = &mut session.opening {
            opening.session_present = opened.present;
            opening.sent = delivery.sent;
        }
        if !opened.subscriptions.is_empty() {
            self.restore_subscriptions(index, opened.subscriptions);
        } else if has_received {
            // The saver is to forget the identifiers that the device has not released before it can release one and use
            // it for another message (SessionOpened.delivery); the restoring of subscriptions makes it. From here, where a
            // connection that ends meanwhile tells it again what there was.
            self.link.take_up(id, session.session_ref(), opened.attachment);
        } else {
            self.accept_connect(index);
        }
    }

    pub(super) fn taken_up(&mut self, id: ConnId, result: Result<(), SaverFailure>) {
        let Some(index) = self.find(id) else { return };
        match result {
            Ok(()) => self.accept_connect(index),
            Err(error) => self.refuse_unopened(index, &error),
        }
    }

    fn refuse_unopened(&mut self, index: u32, error: &SaverFailure) {
        tracing::warn!(%error, "session could not be opened");
        self.refuse(index, reason::SERVER_UNAVAILABLE, "the session could not be opened, try again");
    }

    /// Is the CONNACK to come one that the device takes? What it says may not be left out, so it is not said at all
    /// (MQTT 5.0 §3.1.2.11.4).
    fn takes_connack(&mut self, session: &Session) -> bool {
        let Some(opening) = &session.opening else { return true };
        if session.may_be_sent(CONNACK_BYTES) {
            return true;
        }
        self.scratch.clear();
        let properties = connack_properties(&self.config, session, opening);
        codec::connack(&mut self.scratch, Version::V5, false, reason::SUCCESS, &properties);
        session.may_be_sent(self.scratch.len())
    }

    /// Sends the CONNACK; the device is online.
    pub(super) fn accept_connect(&mut self, index: u32) {
        let config = self.config.clone();
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let Some(opening) = session.opening.take() else { return };
        let overruling = overruling_keep_alive(&config, &opening);
        conn.keep_alive = match overruling {
            Some(max) if conn.version == Version::V5 => max,
            _ => opening.requested_keep_alive,
        };
        conn.phase = Phase::Live;
        conn.last_read = self.now;
        session.is_online = true;
        let properties = connack_properties(&config, session, &opening);
        self.scratch.clear();
        codec::connack(
            &mut self.scratch,
            conn.version,
            opening.session_present,
            reason::SUCCESS,
            &properties,
        );
        self.link.session_changed(online(session, false));
        let (keep_alive, expires, generation) = (conn.keep_alive, session.expires, conn.generation);
        let protocol = protocol(conn.version);
        let app = session.app_index as usize;
        self.apps[app].1.connections += 1;
        self.link.metrics().connections.with_label_values(&[protocol]).inc();
        self.link.metrics().connects.with_label_values(&["accepted"]).inc();
        if keep_alive > 0 || expires != 0 {
            let first = ticks(std::time::Duration::from_secs(u64::from(keep_alive.max(1))).max(TICK));
            self.timers.add(self.now + first, Entry { index, generation, once: false });
        }
        self.reply(index);
        self.begin_resending(index);
        let conn = &mut self.conns[index as usize];
        if conn.is_paused {
            self.resume(index);
        }
    }

    /// Answers a CONNECT with a refusal and closes.
    pub(super) fn refuse(&mut self, index: u32, reason: u8, text: &str) {
        let conn = &self.conns[index as usize];
        tracing::debug!(peer = %conn.peer(), reason, text, "connect refused");
        self.link.metrics().connects.with_label_values(&[&format!("{reason:#04x}")]).inc();
        self.scratch.clear();
        let properties = ConnAckProperties {
            reason_string: Some(text).filter(|text| !text.is_empty()),
            ..ConnAckProperties::default()
        };
        codec::connack(&mut self.scratch, conn.version, false, reason, &properties);
        self.reply(index);
        self.close(index, Reason::Refused);
    }

    /// `answer_in`: the version that it can be answered in, if it says enough for that; whoever does not begin with a
    /// CONNECT is owed nothing (MQTT 5.0 §3.1.0-1).
    pub(super) fn malformed_connect(&mut self, index: u32, answer_in: Option<Version>, error: &DecodeError) {
        let Some(version) = answer_in else { return self.close(index, Reason::Malformed) };
        self.conns[index as usize].version = version;
        self.refuse(index, error.reason_code(), &error.to_string());
    }
}

/// Server Keep Alive, if it is not the device's own.
fn overruling_keep_alive(config: &GatewayConfig, opening: &OpeningConnect) -> Option<u16> {
    let (max, asked) = (config.max_keep_alive_seconds, opening.requested_keep_alive);
    (max > 0 && (asked == 0 || asked > max)).then_some(max)
}

fn connack_properties<'a>(
    config: &GatewayConfig,
    session: &'a Session,
    opening: &OpeningConnect,
) -> ConnAckProperties<'a> {
    ConnAckProperties {
        session_expiry: (session.expiry_seconds != opening.requested_expiry)
            .then_some(session.expiry_seconds),
        receive_maximum: Some(config.receive_maximum),
        maximum_packet_size: Some(config.max_packet_bytes),
        topic_alias_maximum: session.alias_offered,
        assigned_client_id: opening.is_client_id_assigned.then_some(&*session.client_id),
        server_keep_alive: overruling_keep_alive(config, opening),
        ..ConnAckProperties::default()
    }
}

pub(super) fn protocol(version: Version) -> &'static str {
    match version {
        Version::V4 => "mqtt3",
        Version::V5 => "mqtt5",
    }
}

/// "This session is online here"; `again`: it has been said before, to another owner.
pub(super) fn online(session: &Session, again: bool) -> v1::SessionChange {
    v1::SessionChange {
        session: Some(session.session_ref()),
        online: true,
        since_ms: session.since_ms,
        address: address_text(session.address),
        connection: session.connection,
        again,
        reason: String::new(),
        will: session.will.as_ref().map(|will| {
            Box::new(v1::Will {
                message: Some(will.message.clone()),
                delay_ms: 1000 * u64::from(will.delay_seconds.min(session.expiry_seconds)),
                due: false,
            })
        }),
        arrival_ms: None,
    }
}

/// As `Display` writes it. By hand for IPv4, because the formatting machinery is a tenth of a connect.
fn address_text(address: SocketAddr) -> String {
    let SocketAddr::V4(v4) = address else { return address.to_string() };
    let mut text = String::with_capacity("255.255.255.255:65535".len());
    for octet in v4.ip().octets() {
        push_number(&mut text, octet.into());
        text.push('.');
    }
    text.pop();
    text.push(':');
    push_number(&mut text, v4.port());
    text
}

fn push_number(text: &mut String, number: u16) {
    if number >= 10 {
        push_number(text, number / 10);
    }
    text.push(char::from(b'0' + (number % 10) as u8));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_they_are_shown() {
        for text in ["0.0.0.0:0", "127.0.0.1:1883", "255.10.100.9:65535", "[2001:db8::1]:80"] {
            assert_eq!(address_text(text.parse().unwrap()), text);
        }
    }
}
