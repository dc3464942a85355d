//! Flash disconnect: a kept session whose connection dropped stays here for a while. Its device comes back to it without
//! the saver being asked, and nobody is told that it was away.
//!
//! A parked session has no place in the lists of subscribers; its topics are held, as by a SUBSCRIBE under way, so that
//! their routes stay. What is stored meanwhile is read from the log when the device is back, as by any subscription that
//! is behind; what is not is held up to a bound, and QoS 0 is dropped. Nothing of this costs a connected device anything.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::{Shard, broadcast};
use super::close::Reason;
use super::conn::{Conn, Phase, Session, Waiting};
use super::connect::online;
use super::deliver::HELD_MAX;
use super::timers::{Tick, ticks};
use super::topics::{PASSED_MAX, Sub, TopicId};
use crate::codec::QoS;
use crate::delivery::Delivery;
use crate::event::{ConnId, Event};

/// All parked sessions of a shard, by the connection that each had.
#[derive(Default)]
pub struct Parking {
    sessions: HashMap<ConnId, Box<Parked>>,
    /// When each is given up, the first on top: shard, index and generation of the connection it had.
    until: BinaryHeap<Reverse<(Tick, u16, u32, u32)>>,
    by_topic: HashMap<TopicId, SmallVec<[ConnId; 1]>>,
}

struct Parked {
    left: Left,
    /// The holds on the topics, in the order of the subscriptions.
    holds: Vec<TopicId>,
    why: Reason,
}

/// What is left of a connection for the next one, in this shard or another.
pub struct Left {
    pub session: Box<Session>,
    pub subs: Vec<(Arc<str>, Sub)>,
    /// Topics with messages due beyond what the subscription knows.
    pub due: HashMap<Arc<str>, Due>,
    /// Not in any log, came while nobody was there.
    pub held: Vec<Arc<Delivery>>,
    /// The shard that goes on with it holds the topics already.
    pub is_held: bool,
}

#[derive(Default)]
pub struct Due {
    /// seq up to which the log is to be read at least.
    pub target: u64,
    /// Up to here it was sent: DUP.
    pub sent: u64,
    /// Where a subscription with wildcards begins on it, if it has not been there yet.
    pub from: Option<u64>,
}

impl Left {
    fn due(&mut self, topic: &Arc<str>) -> &mut Due {
        self.due.entry(topic.clone()).or_default()
    }

    /// A stored message came by, or several: `prev` of the first, seq of the last.
    fn note_passed(&mut self, topic: &Arc<str>, prev: u64, seq: u64) {
        let due = self.due(topic);
        due.target = due.target.max(seq);
        due.from.get_or_insert(prev);
    }

    /// A message has come to this shard, and has not been offered to the connection.
    fn owe(&mut self, delivery: &Arc<Delivery>) {
        let message = &delivery.message;
        let is_wanted = |(name, sub): &(Arc<str>, Sub)| {
            sub.options.qos > 0 && carillon_proto::topic::matches(name, &delivery.topic)
        };
        if !self.subs.iter().any(is_wanted) {
            return;
        }
        if message.stored {
            self.note_passed(&delivery.topic, message.prev, message.seq);
        } else if message.qos > 0 && self.held.len() < HELD_MAX {
            self.held.push(delivery.clone());
        }
    }

    /// Takes stock of what was under way. What is in flight stays so, and is sent again with its packet identifiers.
    fn take_stock(&mut self) {
        for behind in self.session.behind.take().into_iter().flat_map(|behind| *behind) {
            let due = self.due(&behind.topic);
            due.target = due.target.max(behind.target);
            due.sent = due.sent.max(behind.sent);
            // Where nothing of it was sent yet: what was read ahead does not count.
            due.from = Some(behind.queue.front().map_or(behind.after, |first| first.message.seq - 1));
            self.held.extend(behind.held);
        }
        self.held.truncate(HELD_MAX);
        for Waiting { target, .. } in self.session.waiting.iter_mut().flat_map(|waiting| waiting.iter_mut()) {
            target.exact = None;
        }
    }
}

impl Parking {
    /// A message that is in no log, for those who are away.
    fn hold(&mut self, topics: &[TopicId], delivery: &Arc<Delivery>) -> u64 {
        let mut dropped = 0;
        for topic in topics {
            for id in self.by_topic.get(topic).into_iter().flatten() {
                let Some(parked) = self.sessions.get_mut(id) else { continue };
                let wants = parked
                    .holds
                    .iter()
                    .zip(&parked.left.subs)
                    .any(|(hold, (_, sub))| hold == topic && sub.options.qos > 0);
                let has_it = parked.left.held.last().is_some_and(|last| Arc::ptr_eq(last, delivery));
                if !wants || has_it {
                    continue;
                }
                if parked.left.held.len() < HELD_MAX {
                    parked.left.held.push(delivery.clone());
                } else {
                    dropped += 1;
                }
            }
        }
        dropped
    }

    fn take(&mut self, id: ConnId) -> Option<Box<Parked>> {
        let parked = self.sessions.remove(&id)?;
        for topic in &parked.holds {
            if let Some(ids) = self.by_topic.get_mut(topic) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.by_topic.remove(topic);
                }
            }
        }
        if self.sessions.is_empty() {
            // Their tables would stay as large as the worst moment has made them.
            *self = Parking::default();
        }
        Some(parked)
    }

    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values().map(|parked| &*parked.left.session)
    }

    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

impl Shard {
    /// Does the session of a connection that ends stay here for its device?
    pub(super) fn parks(&self, conn: &Conn, why: &Reason) -> bool {
        let dropped = matches!(why, Reason::Network | Reason::KeepAliveTimeout | Reason::TakenOverHere);
        dropped
            && self.config.resume_window_seconds > 0
            && conn.phase == Phase::Live
            && !self.refuses()
            && conn.session.as_ref().is_some_and(|session| {
                session.attachment.is_some()
                    && session.expiry_seconds > 0
                    && session.pending.is_none()
                    && session.unsubscribing.is_none()
                    && !has_qos2_state(session)
            })
    }

    /// Puts the session of a connection that has ended aside.
    pub(super) fn park(
        &mut self,
        id: ConnId,
        session: Box<Session>,
        subs: &[super::topics::SubRef],
        why: Reason,
    ) {
        let mut left =
            Left { session, subs: Vec::new(), due: HashMap::new(), held: Vec::new(), is_held: false };
        let mut holds = Vec::with_capacity(subs.len());
        for &sub in subs {
            let topic = self.topics.get(sub.topic);
            let (name, kept) = (topic.name.clone(), topic.subs[sub.position as usize]);
            if !left.session.is_own(&name) {
                // A guest's: it has gone with the connection.
                self.drop_subscription(sub);
                continue;
            }
            holds.push(self.topics.hold(&name).0);
            self.drop_subscription(sub);
            self.parking.by_topic.entry(sub.topic).or_default().push(id);
            left.subs.push((name, kept));
        }
        if let Some(mut inflight) = left.session.inflight.take() {
            let is_own = |topic: &str| left.session.is_own(topic);
            inflight.flights.retain(|flight| flight.position.as_ref().is_none_or(|(topic, _)| is_own(topic)));
            left.session.inflight = Some(inflight);
        }
        if let Some(mut waiting) = left.session.waiting.take() {
            waiting.retain(|waiting| left.session.is_own(&waiting.delivery.topic));
            left.session.waiting = Some(waiting);
        }
        left.session.guests = None;
        left.take_stock();
        for job in &self.jobs {
            if job.is_due_to(id.index, id.generation) {
                left.owe(job.delivery());
            }
        }
        let window = self.config.resume_window_seconds.min(left.session.expiry_seconds);
        let until = self.now.saturating_add(ticks(Duration::from_secs(window.into())));
        self.parking.until.push(Reverse((until, id.shard, id.index, id.generation)));
        self.parking.sessions.insert(id, Box::new(Parked { left, holds, why }));
        self.link.metrics().parked.inc();
    }

    /// Gives up those whose devices have not come back in time.
    pub(super) fn end_late_parked(&mut self) {
        while let Some(&Reverse((until, shard, index, generation))) = self.parking.until.peek() {
            if until > self.now {
                break;
            }
            self.parking.until.pop();
            let id = ConnId { shard, index, generation };
            if self.end_parked(id, None) {
                self.link.metrics().parked_ended.inc();
            }
        }
    }

    pub(super) fn end_all_parked(&mut self) {
        let all: Vec<ConnId> = self.parking.sessions.keys().copied().collect();
        for id in all {
            self.end_parked(id, Some(Reason::Moved { to: None }));
        }
    }

    /// The session ends here, as its connection has. `why`: if not for the reason that the connection ended.
    pub(super) fn end_parked(&mut self, id: ConnId, why: Option<Reason>) -> bool {
        let Some(parked) = self.parking.take(id) else { return false };
        self.link.metrics().parked.dec();
        for topic in parked.holds {
            self.release(topic);
        }
        let why = why.unwrap_or(parked.why);
        self.link.sessions().release(parked.left.session.key, id);
        self.give_up_parked(parked.left.session, &why);
        true
    }

    fn give_up_parked(&self, mut session: Box<Session>, why: &Reason) {
        self.close_kept(&mut session);
        let gone = carillon_proto::v1::SessionChange {
            online: false,
            reason: why.label().to_owned(),
            ..online(&session, false)
        };
        self.link.session_ended(session.key, gone);
    }

    /// Takes the session of this connection or of this parked one out, for a new connection of the same device.
    /// `clean`: it does not want it.
    pub(super) fn hand_over(&mut self, from: ConnId, to: ConnId, clean: bool) -> Option<Box<Left>> {
        if let Some(index) = self.find(from) {
            self.close(index, if clean { Reason::TakenOver } else { Reason::TakenOverHere });
        }
        if clean {
            self.end_parked(from, Some(Reason::TakenOver));
            return None;
        }
        let overflowed =
            |topic: TopicId, topics: &super::topics::Topics| topics.passed_len(topic) >= PASSED_MAX;
        let lost_count =
            self.parking.sessions.get(&from)?.holds.iter().any(|&topic| overflowed(topic, &self.topics));
        if lost_count {
            // More topics than could be remembered: the saver knows where the session is on each of them.
            self.end_parked(from, Some(Reason::TakenOver));
            return None;
        }
        let parked = self.parking.take(from)?;
        self.link.metrics().parked.dec();
        let mut left = parked.left;
        for &topic in &parked.holds {
            for (name, prev, seq) in self.topics.passed(topic) {
                left.note_passed(&name, prev, seq);
            }
        }
        // The shard that goes on with it joins the routes before this one leaves them.
        left.is_held = usize::from(to.shard) == self.index;
        if !left.is_held {
            // What waits behind a broadcast here reaches nobody there.
            for delivery in self.jobs.iter().flat_map(broadcast::Job::waiting) {
                left.owe(delivery);
            }
            for (topic, (name, _)) in parked.holds.into_iter().zip(&left.subs) {
                self.link.join_in_force(name, to.shard.into());
                self.release(topic);
            }
        }
        Some(Box::new(left))
    }

    /// The answer to a CONNECT that takes a session over from another connection of this gateway.
    pub(super) fn handed_over(&mut self, id: ConnId, left: Option<Box<Left>>) {
        let index = self.find(id);
        match (index, left) {
            (Some(index), Some(left)) => self.go_on(index, *left),
            (Some(index), None) => self.open(index),
            (None, Some(left)) => {
                // The device went again before it was answered.
                self.leave_joined(&left);
                self.give_up_parked(left.session, &Reason::Network);
            }
            (None, None) => {}
        }
    }

    /// Gives back what was joined for a connection that is no more.
    fn leave_joined(&mut self, left: &Left) {
        for (name, _) in &left.subs {
            match self.topics.find(name) {
                Some(topic) if left.is_held => self.release(topic),
                Some(_) => {}
                None => self.link.leave(name, self.index),
            }
        }
    }

    /// A connection goes on with what another has left.
    fn go_on(&mut self, index: u32, left: Left) {
        let id = self.id(index);
        let Left { session: mut before, subs, due, held, is_held } = left;
        let mut is_routed = true;
        for (name, sub) in &subs {
            let (topic, name) = self.topics.hold(name);
            is_routed &= self.link.join_in_force(&name, self.index);
            let sub = self.topics.subscribe(topic, Sub { conn: index, ..*sub });
            self.conns[index as usize].subs.push(sub);
            self.link.metrics().subscriptions.inc();
            self.release(topic);
            if is_held {
                self.release(topic);
            }
        }
        if !is_routed {
            // A route was given back in between: from the saver, as if it had been another gateway.
            for at in 0..self.conns[index as usize].subs.len() {
                self.drop_subscription(self.conns[index as usize].subs[at]);
            }
            self.link.metrics().subscriptions.sub(subs.len() as i64);
            self.conns[index as usize].subs.clear();
            self.close_kept(&mut before);
            return self.open(index);
        }
        let Some(session) = &mut self.conns[index as usize].session else { return };
        session.attachment = before.attachment;
        session.wild_last = before.wild_last.take();
        session.waiting = before.waiting.take();
        session.next_packet_id = before.next_packet_id;
        session.inflight = before.inflight.take().and_then(|inflight| inflight.resumed()).map(Box::new);
        if let Some(opening) = &mut session.opening {
            opening.session_present = true;
        }
        self.link.metrics().resumed.inc();
        // What cannot be sent again is done with, and must not fill the window.
        self.settle_front(index);
        self.accept_connect(index);
        let Some(index) = self.find(id) else { return };
        for (name, sub) in subs.iter().filter(|(name, sub)| sub.options.qos > 0 && is_exact(name)) {
            let known = due.get(name);
            let head = self.link.routes().last(name).max(known.map_or(0, |due| due.target));
            if head > sub.last {
                self.fall_behind(index, name, sub.last, head, known.map_or(0, |due| due.sent));
            }
        }
        for (topic, Due { target: head, sent, from }) in due {
            let Some(target) = self.target(index, &topic).filter(|target| target.exact.is_none()) else {
                continue;
            };
            if target.options.qos == 0 {
                continue;
            }
            let last = self.last(index, &target, &topic).unwrap_or(from.unwrap_or(0));
            self.set_last(index, &target, &topic, last);
            if head > last {
                self.fall_behind(index, &topic, last, head, sent);
            }
        }
        for delivery in held {
            if let Some(target) = self.target(index, &delivery.topic) {
                self.offer(index, &target, &delivery);
            }
        }
        self.pump(index);
    }

    /// A message that is in no log: who is parked gets it when it is back.
    pub(super) fn hold_for_parked(
        &mut self,
        exact: Option<TopicId>,
        wild: &[TopicId],
        delivery: &Arc<Delivery>,
    ) {
        if self.parking.is_empty() || delivery.message.stored || delivery.message.qos == 0 {
            return;
        }
        let topics: SmallVec<[TopicId; 4]> = exact.into_iter().chain(wild.iter().copied()).collect();
        self.counts.dropped_inflight += self.parking.hold(&topics, delivery);
    }

    /// Asks another shard for the session of one of its connections.
    pub(super) fn ask_for(&self, from: ConnId, to: ConnId, clean: bool) {
        self.link.shard(from.shard.into()).post(Event::HandOver { from, to, clean });
    }
}

/// What is said once and must be heard by whichever gateway the device comes back to: through the saver alone.
fn has_qos2_state(session: &Session) -> bool {
    session.publishing.as_ref().is_some_and(|publishing| !publishing.state().is_empty())
        || session
            .inflight
            .as_ref()
            .is_some_and(|inflight| inflight.flights.iter().any(|flight| flight.qos == QoS::ExactlyOnce))
}

fn is_exact(name: &str) -> bool {
    !carillon_proto::topic::is_wildcard(name)
}
