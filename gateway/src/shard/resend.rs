//! A session that comes back: what was in flight is sent again, with its packet identifiers and in its order, before
//! anything else of QoS 1 and 2 is sent (MQTT 5.0 §4.4).

use std::sync::Arc;

use carillon_proto::v1;

use super::Shard;
use super::conn::Target;
use super::deliver::Acked;
use super::inflight::FlightState;
use super::topics::SubOptions;
use crate::codec::{self, QoS, reason};
use crate::delivery::Delivery;
use crate::link::SaverFailure;

/// Messages read at a time.
const READ_LIMIT: usize = 100;

/// Where the sending again stands.
#[derive(Default)]
pub struct Resending {
    /// Read from the logs, and not sent yet.
    read: Vec<Arc<Delivery>>,
    /// A log is being read, after this seq.
    reading_after: Option<u64>,
    /// The last read failed: try again in the next second.
    has_failed: bool,
}

impl Shard {
    /// Sends a PUBREL for each message that the device has received, and begins with the others.
    pub(super) fn begin_resending(&mut self, index: u32) {
        let conn = &self.conns[index as usize];
        let Some(inflight) = conn.session.as_ref().and_then(|session| session.inflight.as_ref()) else {
            return;
        };
        self.scratch.clear();
        for flight in inflight.flights.iter().filter(|flight| flight.state == FlightState::Released) {
            codec::pubrel(&mut self.scratch, conn.version, flight.packet_id, reason::SUCCESS, None);
        }
        if !self.scratch.is_empty() {
            self.reply(index);
        }
        self.resend(index);
    }

    /// Sends again what can be. True when there is nothing left to send again.
    pub(super) fn resend(&mut self, index: u32) -> bool {
        loop {
            let Some(conn) = self.conns.get_mut(index as usize) else { return false };
            let has_room = conn.outbound_bytes() < self.config.max_outbound_bytes as usize && !conn.is_doomed;
            let Some(session) = &mut conn.session else { return false };
            let window = usize::from(session.window);
            let Some(inflight) = &mut session.inflight else { return true };
            let Some(resending) = &mut inflight.resending else { return true };
            let due = inflight.flights.iter().position(|flight| flight.state == FlightState::Due);
            let Some(at) = due else {
                inflight.resending = None;
                return true;
            };
            let sent = inflight.flights.iter().filter(|flight| flight.state == FlightState::Sent).count();
            if sent >= window || !has_room {
                return false;
            }
            let flight = &mut inflight.flights[at];
            let Some((topic, seq)) = flight.position.clone() else {
                flight.state = FlightState::Done;
                continue;
            };
            let found = resending.read.iter().position(|d| d.message.seq == seq && d.topic == topic);
            if let Some(found) = found {
                let delivery = resending.read.swap_remove(found);
                self.send_again(index, at, &delivery);
                continue;
            }
            if resending.reading_after.is_some() || resending.has_failed {
                return false;
            }
            let after = seq.saturating_sub(1);
            resending.reading_after = Some(after);
            let more = |flight: &&super::inflight::Flight| {
                flight.state == FlightState::Due
                    && flight.position.as_ref().is_some_and(|(name, _)| *name == topic)
            };
            let limit = inflight.flights.iter().filter(more).count().min(READ_LIMIT) as u32;
            let id = self.id(index);
            self.link.metrics().log_reads.inc();
            self.link.read(id, topic, after, limit);
            return false;
        }
    }

    fn send_again(&mut self, index: u32, at: usize, delivery: &Arc<Delivery>) {
        let target = self.target(index, &delivery.topic);
        let Some(session) = &mut self.conns[index as usize].session else { return };
        // Unsubscribed from meanwhile: what has begun is finished all the same (MQTT 5.0 §3.10.4).
        let target = target.unwrap_or_else(|| Target {
            options: SubOptions { relative: session.is_root, ..SubOptions::default() },
            ..Target::default()
        });
        let Some(flight) = session.inflight.as_mut().and_then(|inflight| inflight.flights.get_mut(at)) else {
            return;
        };
        flight.state = FlightState::Sent;
        let (packet_id, qos, is_retained) = (flight.packet_id, flight.qos, flight.is_retained);
        if !self.write_acked(index, &target, delivery, &Acked { qos, packet_id, dup: true, is_retained }) {
            self.give_up(index, packet_id);
        }
    }

    /// A message that was sent before, and cannot be sent again. The device may have it and wait for a PUBREL: with that its
    /// identifier is free on both sides.
    fn give_up(&mut self, index: u32, packet_id: u16) {
        let conn = &mut self.conns[index as usize];
        let version = conn.version;
        let Some(inflight) = conn.session.as_mut().and_then(|session| session.inflight.as_mut()) else {
            return;
        };
        let Some(flight) = inflight.flights.iter_mut().find(|flight| flight.packet_id == packet_id) else {
            return;
        };
        if flight.qos != QoS::ExactlyOnce {
            flight.state = FlightState::Done;
            return;
        }
        flight.state = FlightState::Released;
        self.scratch.clear();
        codec::pubrel(&mut self.scratch, version, packet_id, reason::SUCCESS, None);
        self.reply(index);
    }

    /// The log's answer, if it was asked for the sake of what is to be sent again.
    pub(super) fn have_read_again(
        &mut self,
        index: u32,
        topic: &Arc<str>,
        result: &mut Result<v1::ReadReply, SaverFailure>,
    ) -> bool {
        let id = self.id(index);
        let Some(session) = &mut self.conns[index as usize].session else { return false };
        let Some(inflight) = &mut session.inflight else { return false };
        let Some(resending) = inflight.resending.as_mut() else { return false };
        let Some(after) = resending.reading_after.take() else { return false };
        let reply = match result {
            Ok(reply) => std::mem::take(reply),
            Err(error) => {
                tracing::debug!(%topic, %error, "log could not be read, trying again");
                resending.has_failed = true;
                self.retry.push((id.index, id.generation));
                return true;
            }
        };
        let mut gone = Vec::new();
        let mut messages = reply.messages;
        for flight in inflight.flights.iter().filter(|flight| flight.state == FlightState::Due) {
            let Some((_, seq)) = flight.position.as_ref().filter(|(name, _)| name == topic) else { continue };
            if resending.read.iter().any(|read| read.message.seq == *seq && read.topic == *topic) {
                continue;
            }
            match messages.iter().position(|message| message.seq == *seq) {
                Some(at) => resending.read.push(Arc::new(Delivery::new(messages.swap_remove(at)))),
                // Trimmed, or expired: it is among those that were asked for, and not among those that were found. The
                // first of them is so however far the answer goes.
                None if *seq == after + 1 || (*seq > after && *seq <= reply.next) => {
                    gone.push(flight.packet_id)
                }
                None => {}
            }
        }
        for packet_id in gone {
            self.give_up(index, packet_id);
        }
        self.settle_front(index);
        self.pump(index);
        true
    }

    pub(super) fn retry_resending(&mut self, index: u32) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        if let Some(resending) = session.inflight.as_mut().and_then(|inflight| inflight.resending.as_mut()) {
            resending.has_failed = false;
        }
    }
}
