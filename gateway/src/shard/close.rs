//! The end of a connection, for whatever reason: what is due to the device, the saver, the registry and the will.

use std::net::Shutdown;
use std::sync::atomic::Ordering;

use carillon_proto::v1;

use super::Shard;
use super::conn::Phase;
use super::connect::{online, protocol};
use crate::codec::{self, Disconnect, Version, reason};
use crate::event::{ConnId, KickReason};

/// Sockets of a shard kept until their devices have heard why they were disconnected, those of a drain aside: it keeps its
/// own rate, and strangers must not be able to fill the table of open files.
const MAX_LINGERING: usize = 256;

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
    /// By another connection to this gateway, which goes on with the session.
    TakenOverHere,
    Kicked,
    ShuttingDown,
    /// Sent to another gateway: its "host:port", if there is one with the scheme that the device uses.
    Moved {
        to: Option<String>,
    },
    /// A publish of an MQTT 3.1.1 device could not be accepted, which its protocol cannot say.
    PublishFailed,
}

impl Reason {
    pub(super) fn label(&self) -> &'static str {
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
            Reason::TakenOver | Reason::TakenOverHere => "taken_over",
            Reason::Moved { .. } => "moved",
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
            Reason::TakenOver | Reason::TakenOverHere => Some(reason::SESSION_TAKEN_OVER),
            Reason::Moved { .. } => Some(reason::USE_ANOTHER_SERVER),
            Reason::Kicked => Some(reason::ADMINISTRATIVE_ACTION),
            Reason::ShuttingDown => Some(reason::SERVER_SHUTTING_DOWN),
            _ => None,
        }
    }

    fn server_reference(&self) -> Option<&str> {
        match self {
            Reason::Moved { to } => to.as_deref(),
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

    pub(super) fn kick(&mut self, id: ConnId, kick: KickReason) {
        let reason = match kick {
            KickReason::TakenOver => Reason::TakenOver,
            KickReason::Administrative => Reason::Kicked,
        };
        match self.find(id) {
            Some(index) => self.close(index, reason),
            None => drop(self.end_parked(id, Some(reason))),
        }
    }

    /// How long the device may take to come back, here or at another gateway, before anybody hears that it is away: one that
    /// was told to go to another gateway has as long as one whose connection dropped (`resume_window_seconds`).
    pub(super) fn arrival_seconds(&self, why: &Reason) -> u32 {
        if matches!(why, Reason::Moved { .. }) { self.config.resume_window_seconds } else { 0 }
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
                // It must not make the packet larger than the device takes (MQTT 5.0 §3.14.2.2.3).
                let may_say = |text: &&str| {
                    conn.session.as_ref().is_some_and(|session| {
                        session.wants_problems && session.may_be_sent(text.len() + codec::REASON_BYTES)
                    })
                };
                let text = why.text().filter(may_say);
                codec::disconnect(&mut self.scratch, code, text, why.server_reference());
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
        // A member of a share is replaced at once by others.
        let parks = self.parks(&conn, &why) && !self.memberships.contains_key(&index);
        // Closed at once, what the device has still sent would be answered by a reset, which can overtake the DISCONNECT.
        let was_told = conn.phase == Phase::Live && conn.version == Version::V5 && why.code().is_some();
        let has_room = self.lingering.len() < MAX_LINGERING;
        if matches!(why, Reason::Moved { .. }) || (was_told && has_room) {
            self.linger(conn.stream);
        }

        self.link.metrics().subscriptions.sub(conn.subs.len() as i64);
        self.link.metrics().disconnects.with_label_values(&[why.label()]).inc();
        if !parks {
            for at in 0..conn.subs.len() {
                self.drop_subscription(conn.subs[at]);
            }
        }
        let Some(mut session) = conn.session.take() else { return self.not_pending() };
        if let Some(pending) = session.pending.take() {
            self.release_pending(&pending);
        }
        self.leave_shares(index, &session);
        if let Some(positions) = self.acks.remove(&index) {
            self.send_acks(&session, positions);
        }
        self.shared.admission.leave_app(&session.app);
        let arrival_ms = 1000 * u64::from(self.arrival_seconds(&why));
        let left = session.guests().map(|guest| session.left(guest, why.label(), arrival_ms)).collect();
        self.guests_left(left);
        if session.is_online {
            self.apps[session.app_index as usize].1.connections -= 1;
            self.link.metrics().connections.with_label_values(&[protocol(conn.version)]).dec();
        }
        if parks {
            if session.will.is_some() {
                let still = online(&session, true);
                self.settle_will(&mut session, &why, still);
            }
            return self.park(id, session, &conn.subs, why);
        }
        self.close_kept(&mut session);
        // Not before: whoever finds nobody here has the saver asked behind what it was told now.
        self.link.sessions().release(session.key, id);
        if session.is_online {
            let gone = v1::SessionChange {
                online: false,
                reason: why.label().to_owned(),
                arrival_ms: Some(arrival_ms),
                ..online(&session, false)
            };
            self.settle_will(&mut session, &why, gone);
        }
    }

    /// What becomes of the will when its connection ends; `change` is what the registry is told of the session.
    fn settle_will(&self, session: &mut super::conn::Session, why: &Reason, change: v1::SessionChange) {
        let publishes = |will: &super::conn::Will| match why {
            Reason::Normal { with_will } => *with_will,
            // The session goes on elsewhere: a will with a delay is for those that do not (MQTT 5.0 §3.1.4-3).
            Reason::TakenOver | Reason::TakenOverHere => will.delay_seconds == 0,
            // It is not the device that has gone (MQTT 5.0 §3.1.2.5).
            Reason::ShuttingDown => false,
            _ => true,
        };
        let will = session.will.take();
        let change = v1::SessionChange { will: None, ..change };
        let Some(will) = will.filter(|will| publishes(will)) else {
            return self.link.session_changed(change);
        };
        // The will goes no later than the session does (MQTT 5.0 §3.1.3.2.2).
        let delay_seconds = match why {
            // The device is on its way; it has gone if it does not arrive.
            Reason::Moved { .. } => {
                will.delay_seconds.min(session.expiry_seconds).max(self.arrival_seconds(why))
            }
            _ => will.delay_seconds.min(session.expiry_seconds),
        };
        let delay = std::time::Duration::from_secs(delay_seconds.into());
        let publisher = session.publishing.as_ref().map(|publishing| publishing.publisher.clone());
        let publisher = publisher.unwrap_or_default();
        self.link.publish_will(session.key, change, will.message, delay, &publisher);
    }

    /// Tells the saver where its session stands.
    pub(super) fn close_kept(&self, session: &mut super::conn::Session) {
        let Some(attachment) = session.attachment else { return };
        let (mut sent, mut in_flight) =
            session.inflight.take().map(|inflight| inflight.state()).unwrap_or_default();
        if let Some(reached) = session.reached.take() {
            reached.add_to(&mut sent);
        }
        // What went to a guest is not the session's to keep; the identifiers of QoS 2 are.
        sent.retain(|position| session.is_own(&position.topic));
        super::inflight::identifiers_alone(&mut in_flight, |topic| !session.is_own(topic));
        if let Some(opening) = session.opening.as_ref().filter(|opening| !opening.sent.is_empty()) {
            // The CONNECT was not even answered: it stands where it stood.
            sent.clone_from(&opening.sent);
        }
        let received = session.publishing.as_ref().map(|publishing| publishing.state()).unwrap_or_default();
        let close = v1::CloseSession {
            session: Some(session.session_ref()),
            attachment,
            expiry_seconds: session.expiry_seconds,
            sent: sent.clone(),
            delivery: Some(v1::DeliveryState { in_flight, sent, received }),
        };
        self.link.close_session(session.key, close);
    }
}
