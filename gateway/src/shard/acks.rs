//! PUBACKs from devices, and the cursors that follow them to the saver.

use std::sync::Arc;

use carillon_proto::{topic, v1};

use super::Shard;
use super::conn::{self, Flight};

impl Shard {
    /// PUBACK from the device.
    pub(super) fn acked(&mut self, index: u32, packet_id: u16) {
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let Some(inflight) = &mut session.inflight else { return };
        // Devices ack in order, so it is the first; an unknown one is of a message sent on another connection.
        let Some(flight) = inflight.flights.iter_mut().find(|flight| flight.packet_id == packet_id) else {
            return;
        };
        flight.is_acked = true;
        self.settle_front(index);
        self.pump(index);
    }

    /// Counts a message as acked that needs no PUBACK; the cursor still follows what was sent before it.
    pub(super) fn settle(&mut self, index: u32, cursor: Option<(Arc<str>, u64)>) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let inflight = session.inflight.get_or_insert_default();
        inflight.flights.push_back(Flight { packet_id: 0, is_acked: true, cursor });
        self.settle_front(index);
    }

    pub(super) fn settle_front(&mut self, index: u32) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let is_kept = session.attachment.is_some();
        // Cursors are kept in the session's own app alone.
        let session_app = session.guests.is_some().then_some(&session.app);
        let Some(inflight) = &mut session.inflight else { return };
        while inflight.flights.front().is_some_and(|flight| flight.is_acked) {
            let Some(Flight { cursor: Some((topic, seq)), .. }) = inflight.flights.pop_front() else {
                continue;
            };
            let is_kept = is_kept && session_app.is_none_or(|app| topic::app_of(&topic) == &**app);
            if !is_kept && topic::inbox_user(&topic).is_none() {
                continue;
            }
            let positions = self.acks.entry(index).or_default();
            match positions.iter_mut().find(|(name, _)| *name == topic) {
                Some((_, position)) => *position = (*position).max(seq),
                None => positions.push((topic, seq)),
            }
        }
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
