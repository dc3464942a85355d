//! How a session goes from one connection of this gateway to the next, which may be in another shard.
//!
//! Within a shard it is one step. Between two it is done in two, so that no message falls between them: the new one holds the
//! topics and joins their routes; when every message that was routed before is in the old one's queue, that one gives the
//! session up, with what came by there. What came by in both is the same twice, and known as such.

use std::sync::Arc;

use super::close::Reason;
use super::parked::{Due, Holding, Left, Owed};
use super::topics::{Hold, Sub};
use super::{Shard, broadcast};
use crate::event::{ConnId, Event};

impl Shard {
    /// Asks another shard for the session of one of its connections.
    pub(super) fn ask_for(&self, from: ConnId, to: ConnId, clean: bool) {
        self.link.shard(from.shard.into()).post(Event::HandOver { from, to, clean });
    }

    /// Another shard asks: it is told the topics, to hold them first; or that there is nothing to go on with.
    pub(super) fn asked_for(&mut self, from: ConnId, to: ConnId, clean: bool) {
        self.set_aside(from, clean);
        let event = match self.parking.left(from) {
            Some(left) => {
                let topics =
                    left.subs.iter().map(|(name, sub)| (name.clone(), sub.options.qos > 0)).collect();
                Event::Prepare { from, conn: to, topics }
            }
            None => Event::HandedOver { conn: to, left: None },
        };
        self.link.shard(to.shard.into()).post(event);
    }

    /// From now on this shard hears what a session that is to come here is owed. Also if its connection has ended meanwhile:
    /// what was begun is ended in order.
    pub(super) fn prepare(&mut self, from: ConnId, conn: ConnId, topics: Vec<(Arc<str>, bool)>) {
        let mut held: Vec<(Hold, bool)> = Vec::with_capacity(topics.len());
        for (name, is_wanted) in topics {
            let (hold, name) = self.topics.hold(&name);
            self.link.join_in_force(&name, self.index);
            held.push((hold, is_wanted));
        }
        self.parking.keep(conn, Holding::new(held));
        let before = self.link.shard(from.shard.into()).clone();
        self.link.after_deliveries(move || before.post(Event::GiveUp { from, to: conn }));
    }

    /// The other shard hears all from now on: the session is its own.
    pub(super) fn yield_to(&mut self, from: ConnId, to: ConnId) {
        let left = self.take_parked(from).and_then(|(mut left, holding)| {
            let holds: Vec<Hold> = holding.holds().collect();
            let is_whole = left.owed.take_in(holding, &self.topics).is_ok();
            // What waits behind a broadcast here reaches nobody there. It is newer than what has come by.
            for delivery in self.jobs.iter().flat_map(broadcast::Job::waiting) {
                left.owe(delivery);
            }
            for hold in holds {
                self.release(hold);
            }
            self.whole(left, is_whole)
        });
        self.link.shard(to.shard.into()).post(Event::HandedOver { conn: to, left });
    }

    /// Takes the session of a connection of this shard, or of a parked one, for a new connection of the same device, here as
    /// well. `clean`: it does not want it.
    pub(super) fn hand_over(&mut self, from: ConnId, clean: bool) -> Option<Box<Left>> {
        self.set_aside(from, clean);
        let (mut left, holding) = self.take_parked(from)?;
        left.holds = holding.holds().collect();
        let is_whole = left.owed.take_in(holding, &self.topics).is_ok();
        if !is_whole {
            for hold in std::mem::take(&mut left.holds) {
                self.release(hold);
            }
        }
        self.whole(left, is_whole)
    }

    /// The connection ends, if it is still there; its session stays, unless nobody wants it.
    fn set_aside(&mut self, from: ConnId, clean: bool) {
        if let Some(index) = self.find(from) {
            self.close(index, if clean { Reason::TakenOver } else { Reason::TakenOverHere });
        }
        if clean {
            self.end_parked(from, Some(Reason::TakenOver));
        }
    }

    fn take_parked(&mut self, from: ConnId) -> Option<(Left, Holding)> {
        let (left, holding, _) = self.parking.take(from)?;
        self.link.metrics().parked.dec();
        Some((left, holding))
    }

    /// None: more topics came by than could be remembered. The saver knows where the session is on each of them.
    fn whole(&mut self, mut left: Left, is_whole: bool) -> Option<Box<Left>> {
        if !is_whole {
            self.close_kept(&mut left.session);
            return None;
        }
        Some(Box::new(left))
    }

    /// The answer to a CONNECT that takes a session over from another connection of this gateway.
    pub(super) fn handed_over(&mut self, id: ConnId, left: Option<Box<Left>>) {
        let index = self.find(id);
        let holding = self.parking.let_go(id).unwrap_or_default();
        let mut holds: Vec<Hold> = holding.holds().collect();
        let left = left.and_then(|mut left| {
            // What waits behind a broadcast here is still to be delivered here.
            let waits = |delivery: &Arc<_>| {
                self.jobs.iter().flat_map(broadcast::Job::waiting).any(|other| Arc::ptr_eq(other, delivery))
            };
            left.owed.held.retain(|delivery| !waits(delivery));
            let is_whole = left.owed.take_in(holding, &self.topics).is_ok();
            self.whole(*left, is_whole)
        });
        match (index, left) {
            (Some(index), Some(mut left)) => {
                left.holds.append(&mut holds);
                self.go_on(index, *left);
            }
            (Some(index), None) => self.open(index),
            (None, Some(left)) => {
                // The device went again before it was answered.
                holds.extend(&left.holds);
                self.give_up_parked(left.session, &Reason::Network);
            }
            (None, None) => {}
        }
        for hold in holds {
            self.release(hold);
        }
    }

    /// A connection goes on with what another has left.
    fn go_on(&mut self, index: u32, left: Left) {
        let id = self.id(index);
        let Left { session: mut before, subs, owed: Owed { due, held }, holds } = left;
        let mut is_routed = true;
        for (name, sub) in &subs {
            let (hold, name) = self.topics.hold(name);
            is_routed &= self.link.join_in_force(&name, self.index);
            let sub = self.topics.subscribe(hold.topic, Sub { conn: index, ..*sub });
            self.conns[index as usize].subs.push(sub);
            self.link.metrics().subscriptions.inc();
            self.release(hold);
        }
        for hold in holds {
            self.release(hold);
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
        session.reached = before.reached.take();
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
}

fn is_exact(name: &str) -> bool {
    !carillon_proto::topic::is_wildcard(name)
}
