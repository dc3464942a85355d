//! From a message to the sockets of its subscribers, in the order of each topic, with nothing skipped that is stored.
//!
//! A subscription with QoS >= 1 knows the seq of the last stored message it was sent. The next one names its
//! predecessor (`prev`): if that was seen, it goes out at once; if not, or if the device's window is full, the
//! subscription is *behind* and reads the topic's log from where it is until it has caught up.

use std::sync::Arc;

use carillon_proto::topic;
use smallvec::SmallVec;

use super::Shard;
use super::conn::{Session, Target, Waiting};
use super::inflight::{Flight, FlightState};
use super::topics::{SubOptions, SubRef, TopicId};
use crate::codec::{QoS, SharedPublish, Variation, Version};
use crate::delivery::Delivery;

/// Messages that are in no log and are held for one device while it catches up or its window is full.
pub(super) const HELD_MAX: usize = 1000;
/// Topics on which one device's wildcard subscriptions remember where they are; beyond it one of them begins anew.
const WILD_CURSORS_MAX: usize = 10_000;

/// Shorter topic names cost no more than their alias.
const ALIASED_BYTES: usize = 4;

/// How one message goes to one device that has to answer for it.
pub(super) struct Acked {
    /// 1 or 2.
    pub qos: QoS,
    pub packet_id: u16,
    pub dup: bool,
    pub is_retained: bool,
}

impl Shard {
    /// Sends a message to all of this shard's subscribers.
    pub(super) fn deliver(&mut self, delivery: &Arc<Delivery>) {
        if delivery.is_expired(self.now_ms) {
            self.counts.dropped_expired += 1;
            return;
        }
        if self.waits_for_job(delivery) {
            return;
        }
        let mut wild: SmallVec<[TopicId; 4]> = SmallVec::new();
        self.topics.wild_matching(&delivery.topic, &mut wild);
        let exact = self.topics.find(&delivery.topic);
        self.hold_for_parked(exact, &wild, delivery);
        if delivery.message.stored {
            for &filter in &wild {
                self.topics.note_passed(filter, &delivery.topic, delivery.message.prev, delivery.message.seq);
            }
        }
        if wild.is_empty() {
            let Some(exact) = exact else { return };
            for position in 0..self.topics.get(exact).subs.len() {
                let sub = self.topics.get(exact).subs[position];
                let mut target = Target { options: sub.options, ..Target::default() };
                if sub.identifier != 0 {
                    target.identifiers.push(sub.identifier);
                }
                target.exact = Some(SubRef { topic: exact, position: position as u32 });
                self.offer(sub.conn, &target, delivery);
            }
            return;
        }
        for conn in self.receivers(exact, &wild) {
            if let Some(target) = self.target(conn, &delivery.topic) {
                self.offer(conn, &target, delivery);
            }
        }
    }

    /// The connections that subscribe to any of these.
    pub(super) fn receivers(&self, exact: Option<TopicId>, wild: &[TopicId]) -> Vec<u32> {
        let mut conns: Vec<u32> = exact
            .iter()
            .chain(wild)
            .flat_map(|&id| self.topics.get(id).subs.iter().map(|sub| sub.conn))
            .collect();
        conns.sort_unstable();
        conns.dedup();
        conns
    }

    /// What a connection's subscriptions ask for on a topic, together: one delivery with the highest QoS and all
    /// subscription identifiers (MQTT 5.0 §3.3.4).
    pub(super) fn target(&self, index: u32, name: &str) -> Option<Target> {
        let conn = self.conns.get(index as usize)?;
        let mut target: Option<Target> = None;
        for sub in &conn.subs {
            let topic = self.topics.get(sub.topic);
            let is_exact = *topic.name == *name;
            let matches = is_exact || (topic.is_wild() && topic::matches(&topic.name, name));
            if !matches {
                continue;
            }
            let its = &topic.subs[sub.position as usize];
            let target = target.get_or_insert_with(|| Target {
                options: SubOptions { no_local: true, ..its.options },
                ..Target::default()
            });
            target.options.qos = target.options.qos.max(its.options.qos);
            target.options.no_local &= its.options.no_local;
            target.options.retain_as_published |= its.options.retain_as_published;
            if its.identifier != 0 {
                target.identifiers.push(its.identifier);
            }
            // With QoS 0 it keeps no count of what is owed: a filter of QoS 1 beside it does.
            if is_exact && its.options.qos > 0 {
                target.exact = Some(*sub);
            }
        }
        target
    }

    /// seq of the last stored message that this connection was sent on the topic; none if it has just joined.
    pub(super) fn last(&self, index: u32, target: &Target, name: &str) -> Option<u64> {
        if let Some(exact) = target.exact {
            return Some(self.topics.get(exact.topic).subs[exact.position as usize].last);
        }
        self.conns[index as usize].session.as_ref()?.wild_last.as_ref()?.get(name).copied()
    }

    pub(super) fn set_last(&mut self, index: u32, target: &Target, name: &Arc<str>, seq: u64) {
        if let Some(exact) = target.exact {
            let last = &mut self.topics.get_mut(exact.topic).subs[exact.position as usize].last;
            *last = (*last).max(seq);
        } else if let Some(session) = &mut self.conns[index as usize].session {
            let cursors = session.wild_last.get_or_insert_default();
            if cursors.len() >= WILD_CURSORS_MAX
                && !cursors.contains_key(name)
                && let Some(other) = cursors.keys().next().cloned()
            {
                cursors.remove(&other);
            }
            let last = cursors.entry(name.clone()).or_default();
            *last = (*last).max(seq);
        }
    }

    /// Sends a live message to one connection, or leaves it for later, or leaves it out.
    pub(super) fn offer(&mut self, index: u32, target: &Target, delivery: &Arc<Delivery>) {
        let Some(conn) = self.conns.get_mut(index as usize) else { return };
        let Some(session) = &mut conn.session else { return };
        if conn.is_doomed || (target.options.no_local && session.is_publisher(delivery.publisher)) {
            return;
        }
        let message = &delivery.message;
        if target.options.qos == 0 {
            return self.send_qos0(index, target, delivery, false);
        }
        if !message.stored {
            if let Some(behind) = session.behind_on(&delivery.topic) {
                // In order: after what is being read.
                if behind.held.len() < HELD_MAX {
                    behind.held.push_back(delivery.clone());
                } else {
                    self.counts.dropped_slow += 1;
                }
            } else {
                self.send_unstored(index, target, delivery, false);
            }
            return;
        }
        if let Some(behind) = session.behind_on(&delivery.topic) {
            behind.target = behind.target.max(message.seq);
            return;
        }
        let last = self.last(index, target, &delivery.topic).unwrap_or(message.prev);
        if message.seq <= last {
            return;
        }
        if message.prev > last || !self.has_room(index) {
            self.fall_behind(index, &delivery.topic, last, message.seq, 0);
            self.pump(index);
            return;
        }
        self.send_stored(index, target, delivery, false);
    }

    /// Window and outbound bytes allow another delivery.
    pub(super) fn has_room(&self, index: u32) -> bool {
        let conn = &self.conns[index as usize];
        let Some(session) = &conn.session else { return false };
        session.in_flight() < session.window.into()
            && !session.is_resending()
            && conn.outbound_bytes() < self.config.max_outbound_bytes as usize
            && !conn.is_doomed
    }

    /// Sends the next stored message of a topic; the cursor follows when the device is done with it.
    pub(super) fn send_stored(&mut self, index: u32, target: &Target, delivery: &Arc<Delivery>, dup: bool) {
        let message = &delivery.message;
        self.set_last(index, target, &delivery.topic, message.seq);
        let position = Some((delivery.topic.clone(), message.seq));
        match granted(delivery, target) {
            QoS::AtMostOnce => {
                self.send_qos0(index, target, delivery, false);
                self.settle(index, position);
            }
            qos => {
                if !self.send_acked(index, target, delivery, qos, dup, false, position.clone()) {
                    // Larger than the device takes: as if it had been acked (MQTT 5.0 §3.1.2.11.4).
                    self.settle(index, position);
                }
            }
        }
    }

    /// A message that is in no log, or a retained one.
    fn send_unstored(&mut self, index: u32, target: &Target, delivery: &Arc<Delivery>, retain: bool) {
        if granted(delivery, target) == QoS::AtMostOnce {
            return self.send_qos0(index, target, delivery, retain);
        }
        let has_room = self.has_room(index);
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let waiting = session.waiting.as_ref().map_or(0, |waiting| waiting.len());
        if has_room && waiting == 0 {
            self.send_waiting(index, target, delivery, retain);
        } else if waiting < HELD_MAX {
            let waiting = session.waiting.get_or_insert_default();
            waiting.push_back(Waiting { delivery: delivery.clone(), target: target.clone(), retain });
        } else {
            self.counts.dropped_inflight += 1;
        }
    }

    /// There is room for it now. A retained message may be in the log: there it is found when it has to be sent again.
    pub(super) fn send_waiting(
        &mut self,
        index: u32,
        target: &Target,
        delivery: &Arc<Delivery>,
        retain: bool,
    ) {
        if delivery.is_expired(self.now_ms) {
            self.counts.dropped_expired += 1;
            return;
        }
        let message = &delivery.message;
        let position = (retain && message.stored).then(|| (delivery.topic.clone(), message.seq));
        self.send_acked(index, target, delivery, granted(delivery, target), false, retain, position);
    }

    pub(super) fn send_retained(
        &mut self,
        index: u32,
        delivery: &Arc<Delivery>,
        options: SubOptions,
        identifier: u32,
    ) {
        if delivery.is_expired(self.now_ms) || !self.conns.contains(index as usize) {
            return;
        }
        let mut target = Target { options, ..Target::default() };
        if identifier != 0 {
            target.identifiers.push(identifier);
        }
        self.send_unstored(index, &target, delivery, true);
    }

    pub(super) fn send_qos0(
        &mut self,
        index: u32,
        target: &Target,
        delivery: &Arc<Delivery>,
        retained: bool,
    ) {
        let (round, now) = (self.round, self.now);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let Some(frame) = delivery.frame(conn.version, target.options.relative) else { return };
        let retain = retained || (target.options.retain_as_published && delivery.message.retain);
        if conn.out.as_ref().is_some_and(|out| out.bytes() >= self.config.max_outbound_bytes as usize) {
            self.counts.dropped_slow += 1;
            self.apps[session.app_index_of(&delivery.topic) as usize].1.dropped += 1;
            return;
        }
        let left = delivery.expiry_left(frame, self.now_ms);
        let is_plain = !retain
            && (target.identifiers.is_empty() || conn.version == Version::V4)
            && session.alias_maximum == 0
            && left.is_none();
        let app = session.app_index_of(&delivery.topic) as usize;
        let max_packet = session.max_packet_bytes as usize;
        let (length, sent) = if is_plain {
            let plain = frame.plain_shared();
            if plain.len() > max_packet {
                self.counts.dropped_large += 1;
                return;
            }
            (plain.len(), conn.send_shared(plain, round, now))
        } else {
            let variation = Variation {
                retain,
                subscription_ids: &target.identifiers,
                topic_alias: alias(session, target, delivery, frame),
                message_expiry: left,
                ..Variation::default()
            };
            if frame.len_with(&variation) > max_packet {
                self.counts.dropped_large += 1;
                return;
            }
            tell_alias(session, target, delivery, &variation);
            self.scratch.clear();
            frame.write(&mut self.scratch, &variation);
            (self.scratch.len(), conn.send(&self.scratch, round, now))
        };
        self.counts.delivered[0] += 1;
        self.counts.bytes_out += length as u64;
        self.apps[app].1.delivered += 1;
        self.after_send(index, sent);
    }

    /// Sends a message with QoS 1 or 2. False: larger than the device takes, and not sent.
    #[allow(clippy::too_many_arguments)] // each is a fact of its own
    pub(super) fn send_acked(
        &mut self,
        index: u32,
        target: &Target,
        delivery: &Arc<Delivery>,
        qos: QoS,
        dup: bool,
        is_retained: bool,
        position: Option<(Arc<str>, u64)>,
    ) -> bool {
        let Some(session) = &mut self.conns[index as usize].session else { return false };
        let packet_id = session.take_packet_id();
        if !self.write_acked(index, target, delivery, &Acked { qos, packet_id, dup, is_retained }) {
            return false;
        }
        let Some(session) = &mut self.conns[index as usize].session else { return false };
        let inflight = session.inflight.get_or_insert_default();
        inflight.flights.push_back(Flight {
            packet_id,
            qos,
            state: FlightState::Sent,
            is_retained,
            position,
        });
        true
    }

    /// Writes the PUBLISH of a message that the device has to answer. False: larger than the device takes, and not sent.
    pub(super) fn write_acked(
        &mut self,
        index: u32,
        target: &Target,
        delivery: &Arc<Delivery>,
        &Acked { qos, packet_id, dup, is_retained }: &Acked,
    ) -> bool {
        let (round, now) = (self.round, self.now);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return false };
        let Some(frame) = delivery.frame(conn.version, target.options.relative) else { return false };
        let retain = is_retained || (target.options.retain_as_published && delivery.message.retain);
        let identifiers = if conn.version == Version::V5 { target.identifiers.as_slice() } else { &[] };
        let variation = Variation {
            qos,
            dup,
            retain,
            packet_id,
            subscription_ids: identifiers,
            topic_alias: alias(session, target, delivery, frame),
            message_expiry: delivery.expiry_left(frame, self.now_ms),
        };
        if frame.len_with(&variation) > session.max_packet_bytes as usize {
            self.counts.dropped_large += 1;
            return false;
        }
        tell_alias(session, target, delivery, &variation);
        self.scratch.clear();
        frame.write(&mut self.scratch, &variation);
        self.counts.delivered[usize::from(qos.level())] += 1;
        self.counts.bytes_out += self.scratch.len() as u64;
        self.apps[session.app_index_of(&delivery.topic) as usize].1.delivered += 1;
        let sent = conn.send(&self.scratch, round, now);
        self.after_send(index, sent);
        true
    }
}

/// The QoS that a message is delivered with (MQTT 5.0 §3.8.4).
fn granted(delivery: &Delivery, target: &Target) -> QoS {
    let level = delivery.message.qos.min(target.options.qos.into());
    QoS::from_level(level as u8).unwrap_or(QoS::ExactlyOnce)
}

/// The topic alias to send a message with, and whether the device has yet to be told what it stands for.
fn alias(
    session: &Session,
    target: &Target,
    delivery: &Delivery,
    frame: &SharedPublish,
) -> Option<(u16, bool)> {
    if session.alias_maximum == 0 || frame.topic().len() < ALIASED_BYTES {
        return None;
    }
    match &session.aliases {
        Some(aliases) => aliases.alias(&delivery.topic, target.options.relative, session.alias_maximum),
        None => Some((1, true)),
    }
}

/// What is about to be sent tells the device of a new alias.
fn tell_alias(session: &mut Session, target: &Target, delivery: &Delivery, variation: &Variation<'_>) {
    if let Some((_, true)) = variation.topic_alias {
        session.aliases.get_or_insert_default().told(&delivery.topic, target.options.relative);
    }
}
