//! The end of a connection, for whatever reason: what is due to the device, the saver, the registry and the will.

use std::net::Shutdown;
use std::sync::atomic::Ordering;

use carillon_proto::v1;

use super::Shard;
use super::conn::Phase;
use super::connect::protocol;
use crate::codec::{self, Disconnect, Version, reason};
use crate::event::{ConnId, Event, KickReason};

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// DISCONNECT from the device; with the will if it said so.
    Normal {
        with_will: bool,
    },
    Network,
    Refused,
    /// Not MQTT, or not WebSocket: nothing can be said.
    Malformed,
    /// No PROXY protocol header, or not a right one, where a proxy connects.
    Proxy,
    /// The handshake failed, or a record cannot be opened.
    Tls,
    ConnectTimeout,
    KeepAliveTimeout,
    WriteTimeout,
    TokenExpired,
    /// Its token is revoked now.
    Revoked,
    /// Its address is denied now.
    Banned,
    /// It did not take what it asked for.
    SlowConsumer,
    /// Too many connections wait for their CONNECT, and it was the oldest.
    PendingOverflow,
    ProtocolError {
        reason: u8,
        text: String,
    },
    TakenOver,
    Kicked,
    ShuttingDown,
    /// A publish of an MQTT 3.1.1 device could not be accepted, which its protocol cannot say.
    PublishFailed,
}

impl Reason {
    fn label(&self) -> &'static str {
        match self {
            Reason::Normal { .. } => "normal",
            Reason::Network => "network",
            Reason::Refused => "refused",
            Reason::Malformed => "malformed",
            Reason::Proxy => "proxy_protocol",
            Reason::Tls => "tls",
            Reason::ConnectTimeout => "connect_timeout",
            Reason::KeepAliveTimeout => "keep_alive_timeout",
            Reason::WriteTimeout => "write_timeout",
            Reason::TokenExpired => "token_expired",
            Reason::Revoked => "revoked",
            Reason::Banned => "banned",
            Reason::SlowConsumer => "slow_consumer",
            Reason::PendingOverflow => "pending_overflow",
            Reason::ProtocolError { .. } => "protocol_error",
            Reason::TakenOver => "taken_over",
            Reason::Kicked => "kicked",
            Reason::ShuttingDown => "shutting_down",
            Reason::PublishFailed => "publish_failed",
        }
    }

    /// The reason code of the DISCONNECT that an MQTT 5 device is owed.
    fn code(&self) -> Option<u8> {
        match self {
            Reason::KeepAliveTimeout => Some(reason::KEEP_ALIVE_TIMEOUT),
            Reason::TokenExpired | Reason::Revoked => Some(reason::NOT_AUTHORIZED),
            Reason::Banned => Some(reason::BANNED),
            Reason::ProtocolError { reason, .. } => Some(*reason),
            Reason::TakenOver => Some(reason::SESSION_TAKEN_OVER),
            Reason::Kicked => Some(reason::ADMINISTRATIVE_ACTION),
            Reason::ShuttingDown => Some(reason::SERVER_SHUTTING_DOWN),
            _ => None,
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Reason::ProtocolError { text, .. } => Some(text),
            Reason::TokenExpired => Some("the token has expired"),
            Reason::Revoked => Some("the token has been revoked"),
            _ => None,
        }
    }
}

impl Shard {
    pub(super) fn disconnect(&mut self, index: u32, disconnect: &Disconnect<'_>) {
        let conn = &mut self.conns[index as usize];
        if let Some(session) = &mut conn.session
            && let Some(expiry) = disconnect.session_expiry
        {
            if session.expiry_seconds == 0 && expiry != 0 {
                // MQTT 5.0 §3.14.2.2.2.
                let text = "session expiry may not be raised from 0 by a DISCONNECT".to_owned();
                return self.close(index, Reason::ProtocolError { reason: reason::PROTOCOL_ERROR, text });
            }
            session.expiry_seconds = expiry.min(self.config.max_session_expiry_seconds);
        }
        let with_will = disconnect.reason_code == reason::DISCONNECT_WITH_WILL;
        self.close(index, Reason::Normal { with_will });
    }

    pub(super) fn kick(&mut self, id: ConnId, kick: KickReason, then: Option<ConnId>) {
        if let Some(index) = self.find(id) {
            let reason = match kick {
                KickReason::TakenOver => Reason::TakenOver,
                KickReason::Administrative => Reason::Kicked,
            };
            self.close(index, reason);
        }
        if let Some(next) = then {
            self.link.shard(next.shard.into()).post(Event::Proceed { conn: next });
        }
    }

    pub(super) fn close(&mut self, index: u32, why: Reason) {
        if !self.conns.contains(index as usize) {
            return;
        }
        let id = self.id(index);
        let mut conn = self.conns.remove(index as usize);
        tracing::debug!(peer = %conn.peer(), reason = why.label(), "connection ends");
        if conn.phase == Phase::Live && conn.version == Version::V5 {
            self.scratch.clear();
            if let Some(code) = why.code() {
                let wants_text = conn.session.as_ref().is_some_and(|session| session.wants_problems);
                codec::disconnect(&mut self.scratch, code, why.text().filter(|_| wants_text), None);
                let _ = conn.send(&self.scratch, self.round, self.now);
            }
        }
        conn.say_end(self.now);
        // What is queued has had its chance if the socket takes it now.
        let _ = conn.flush(self.now);
        if conn.phase == Phase::Securing && why != Reason::Tls {
            self.count_handshake(why.label());
        }
        let _ = self.poll.registry().deregister(&mut conn.stream);
        let _ = conn.stream.shutdown(Shutdown::Write);
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        self.shared.admission.leave(conn.source);

        for at in 0..conn.subs.len() {
            self.drop_subscription(conn.subs[at]);
        }
        self.link.metrics().subscriptions.sub(conn.subs.len() as i64);
        let Some(mut session) = conn.session.take() else {
            self.not_pending();
            self.link.metrics().disconnects.with_label_values(&[why.label()]).inc();
            return;
        };
        if let Some(pending) = session.pending.take() {
            self.release_pending(&pending);
        }
        self.link.sessions().release(session.key, id);
        if let Some(positions) = self.acks.remove(&index) {
            self.send_acks(&session, positions);
        }
        self.shared.admission.leave_app(&session.app);
        let left = session.guests().map(|guest| session.left(guest, why.label())).collect();
        self.guests_left(left);
        self.close_kept(&mut session);
        self.link.metrics().disconnects.with_label_values(&[why.label()]).inc();
        if !session.is_online {
            return;
        }
        self.apps[session.app_index as usize].1.connections -= 1;
        self.link.metrics().connections.with_label_values(&[protocol(conn.version)]).dec();
        self.link.session_changed(v1::SessionChange {
            online: false,
            reason: why.label().to_owned(),
            ..super::connect::online(&session, false)
        });
        let publishes = |will: &super::conn::Will| match why {
            Reason::Normal { with_will } => with_will,
            // The session goes on elsewhere: a will with a delay is for those that do not (MQTT 5.0 §3.1.4-3).
            Reason::TakenOver => will.delay_seconds == 0,
            // It is not the device that has gone (MQTT 5.0 §3.1.2.5).
            Reason::ShuttingDown => false,
            _ => true,
        };
        if let Some(will) = session.will.take().filter(|will| publishes(will)) {
            // The will goes no later than the session does (MQTT 5.0 §3.1.3.2.2).
            let delay = will.delay_seconds.min(session.expiry_seconds);
            self.link.publish_will(session.key, will.message, std::time::Duration::from_secs(delay.into()));
        }
    }

    /// Tells the saver where its session stands.
    fn close_kept(&self, session: &mut super::conn::Session) {
        let Some(attachment) = session.attachment else { return };
        let mut sent: Vec<v1::AckPosition> = Vec::new();
        for flight in session.inflight.take().into_iter().flat_map(|inflight| inflight.flights) {
            let Some((topic, seq)) = flight.cursor else { continue };
            if !session.is_own(&topic) {
                continue;
            }
            match sent.iter_mut().find(|position| *position.topic == *topic) {
                Some(position) => position.seq = position.seq.max(seq),
                None => sent.push(v1::AckPosition { topic: topic.to_string(), seq }),
            }
        }
        self.link.close_session(v1::CloseSession {
            session: Some(session.session_ref()),
            attachment,
            expiry_seconds: session.expiry_seconds,
            sent,
        });
    }
}
