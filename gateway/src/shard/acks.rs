//! PUBACK, PUBREC and PUBCOMP from devices, and the cursors that follow them to the saver.

use std::sync::Arc;

use carillon_proto::{topic, v1};

use super::Shard;
use super::conn;
use super::inflight::{Flight, FlightState, Received};
use super::timers::millis;
use crate::codec::{self, Ack, QoS, reason};

impl Shard {
    /// PUBACK from the device. Whatever its reason code, the message is done with.
    pub(super) fn acked(&mut self, index: u32, packet_id: u16) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        // An unknown one is of a message sent on another connection.
        if session.inflight.as_mut().is_some_and(|inflight| inflight.acked(packet_id)) {
            self.settle_front(index);
            self.share_acked(index, packet_id);
            self.pump(index);
        }
    }

    /// PUBREC from the device.
    pub(super) fn pubrec(&mut self, index: u32, ack: &Ack<'_>) {
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let refused = ack.reason_code >= 0x80;
        let inflight = session.inflight.as_ref().filter(|_| session.attachment.is_some());
        if let Some((topic, seq)) = inflight.and_then(|inflight| inflight.position(ack.packet_id)) {
            session.reached.get_or_insert_default().note(topic, seq);
        }
        let received = match &mut session.inflight {
            Some(inflight) => inflight.received(ack.packet_id, refused),
            None => Received::Unknown,
        };
        let answer = match received {
            Received::Release => Some(reason::SUCCESS),
            Received::Finished => None,
            // Nothing is to follow an error (MQTT 5.0 §4.3.3).
            Received::Unknown => (!refused).then_some(reason::PACKET_IDENTIFIER_NOT_FOUND),
        };
        if let Some(code) = answer {
            self.scratch.clear();
            codec::pubrel(&mut self.scratch, conn.version, ack.packet_id, code, None);
            self.reply(index);
        }
        if received != Received::Unknown {
            self.settle_front(index);
            self.pump(index);
        }
    }

    /// PUBCOMP from the device: also one that says that it did not know the identifier ends it.
    pub(super) fn pubcomp(&mut self, index: u32, packet_id: u16) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        if session.inflight.as_mut().is_some_and(|inflight| inflight.completed(packet_id)) {
            self.settle_front(index);
            self.pump(index);
        }
    }

    /// PUBREL from the device: its packet identifier is free again.
    pub(super) fn pubrel(&mut self, index: u32, packet_id: u16) {
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let is_known = session.publishing.as_mut().is_some_and(|publishing| publishing.released(packet_id));
        if session.publishing.as_ref().is_some_and(|publishing| publishing.is_idle(millis(now))) {
            session.publishing = None;
        }
        // MQTT 3.1.1 does not tell the two apart.
        let code = if is_known { reason::SUCCESS } else { reason::PACKET_IDENTIFIER_NOT_FOUND };
        self.scratch.clear();
        codec::pubcomp(&mut self.scratch, conn.version, packet_id, code, None);
        self.reply(index);
    }

    /// Counts a message as done that needs no PUBACK; the cursor still follows what was sent before it.
    pub(super) fn settle(&mut self, index: u32, position: Option<(Arc<str>, u64)>) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let inflight = session.inflight.get_or_insert_default();
        inflight.flights.push_back(Flight {
            packet_id: 0,
            qos: QoS::AtMostOnce,
            state: FlightState::Done,
            is_retained: false,
            position,
        });
        self.settle_front(index);
    }

    pub(super) fn settle_front(&mut self, index: u32) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let is_kept = session.attachment.is_some();
        // Cursors are kept in the session's own app alone.
        let session_app = session.guests.is_some().then_some(&session.app);
        let Some(inflight) = &mut session.inflight else { return };
        inflight.settle(|topic, seq| {
            let is_kept = is_kept && session_app.is_none_or(|app| topic::app_of(&topic) == &**app);
            if !is_kept && topic::inbox_user(&topic).is_none() {
                return;
            }
            let positions = self.acks.entry(index).or_default();
            match positions.iter_mut().find(|(name, _)| *name == topic) {
                Some((_, position)) => *position = (*position).max(seq),
                None => positions.push((topic, seq)),
            }
        });
        if inflight.flights.is_empty() {
            session.inflight = None;
        }
    }

    pub(super) fn flush_acks(&mut self) {
        for (index, positions) in std::mem::take(&mut self.acks) {
            if let Some(conn) = self.conns.get(index as usize)
                && let Some(session) = &conn.session
            {
                self.send_acks(session, positions);
            }
        }
    }

    pub(super) fn send_acks(&self, session: &conn::Session, positions: Vec<(Arc<str>, u64)>) {
        let (own, others): (Vec<_>, Vec<_>) =
            positions.into_iter().partition(|(topic, _)| session.is_own(topic));
        for (topic, seq) in others {
            // An inbox of a further app is consumed by its own user.
            if let Some(guest) = session.guest_ref(&topic) {
                let positions = vec![v1::AckPosition { topic: topic.to_string(), seq }];
                self.link.ack(v1::Ack { session: Some(guest), attachment: 0, positions });
            }
        }
        let positions: Vec<_> =
            own.into_iter().map(|(topic, seq)| v1::AckPosition { topic: topic.to_string(), seq }).collect();
        self.link.ack(v1::Ack {
            session: Some(session.session_ref()),
            attachment: session.attachment.unwrap_or(0),
            positions,
        });
    }
}
