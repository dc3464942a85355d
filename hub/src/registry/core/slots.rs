//! Gaining and losing slots, and who is attached to them: receivers, their routes, the sessions they announce.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use carillon_proto::topic::slot_of;
use carillon_proto::v1::{self, PublishCode, saver_reply, saver_request};

use super::presence::Sessions;
use super::routing::{Attached, Receiver};
use super::topic::{Load, State, Topic};
use super::{AskError, Asked, Core, Fence, MOVED, Output, RETRY_MS, Slot, topic_entry};

/// What receivers say of slots that are not ours (yet) waits for this long, and at most so much of it.
pub(super) const EARLY_MS: u64 = 1000;
const EARLY: usize = 65_536;

/// Topics and who announced them.
type Routes = Vec<(Box<str>, Vec<Receiver>)>;

/// What a receiver said of a slot before it was ours.
#[derive(Debug)]
pub struct Early {
    until_ms: u64,
    slot: u32,
    said: Said,
}

#[derive(Debug)]
enum Said {
    Route { receiver: Receiver, request: u64, index: u32, filter: Box<str>, present: bool },
    Complete { receiver: Receiver, epoch: u64 },
    Session { receiver: Receiver, change: v1::SessionChange },
}

impl Core {
    /// All slots of this core that the keeper says are ours, with their epochs.
    pub fn set_slots(&mut self, owned: &HashMap<u32, u64>, now_ms: u64) {
        let changed: Vec<u32> = self
            .slots
            .iter()
            .filter(|(number, slot)| owned.get(number) != Some(&slot.epoch))
            .map(|(&number, _)| number)
            .collect();
        // A slot that is ours again under another epoch: what receivers have told of it is true as before.
        let mut kept = HashMap::new();
        for number in changed {
            if let Some(soft) = self.drop_slot(number)
                && owned.contains_key(&number)
            {
                kept.insert(number, soft);
            }
        }
        for (&number, &epoch) in owned {
            let refused = self.given_up.get(&number).is_some_and(|&given_up| epoch <= given_up);
            if refused || self.slots.contains_key(&number) {
                continue;
            }
            self.given_up.remove(&number);
            let (routes, sessions) = kept.remove(&number).unwrap_or_default();
            let mut slot = Slot {
                epoch,
                fence: Fence::Asked,
                topics: HashMap::new(),
                floor: 0,
                complete: HashSet::new(),
                whole: false,
                sessions,
            };
            slot.whole = self.routing.is_whole(&slot.complete);
            self.topics += routes.len();
            self.routed_topics += routes.len();
            for (name, receivers) in routes {
                slot.topics.insert(name, Topic { routes: receivers, ..Topic::default() });
            }
            self.slots.insert(number, slot);
            self.fence(number);
            for publish in self.arrived(number) {
                self.take(number, publish, now_ms);
            }
        }
        for early in std::mem::take(&mut self.early) {
            match self.slots.contains_key(&early.slot) {
                true => self.again(early, now_ms),
                false => self.early.push_back(early),
            }
        }
    }

    /// Has the saver fenced all slots?
    pub fn is_in_force(&self) -> bool {
        self.slots.values().all(|slot| slot.fence == Fence::InForce)
    }

    /// Receivers may learn of a slot's new epoch before we do: what they say of it waits for a moment.
    fn hold(&mut self, slot: u32, said: Said, now_ms: u64) {
        let early = Early { until_ms: now_ms + EARLY_MS, slot, said };
        if self.early.len() < EARLY { self.early.push_back(early) } else { self.too_early(early) }
    }

    fn again(&mut self, early: Early, now_ms: u64) {
        match early.said {
            Said::Route { receiver, request, index, filter, present } => {
                self.announce(receiver, request, index, &filter, present, now_ms);
            }
            Said::Complete { receiver, epoch } => {
                self.complete(receiver, &[v1::SlotEpoch { slot: early.slot, epoch }], now_ms);
            }
            Said::Session { receiver, change } => self.session_change(receiver, change, now_ms),
        }
    }

    fn too_early(&mut self, early: Early) {
        if let Said::Route { request, index, .. } = early.said {
            self.out.push(Output::Announced { request, index, head: None, retained: false });
        }
    }

    /// What waited for a slot that has not become ours.
    pub(super) fn end_early(&mut self, now_ms: u64) {
        while self.early.front().is_some_and(|early| early.until_ms <= now_ms) {
            let Some(early) = self.early.pop_front() else { break };
            self.too_early(early);
        }
    }

    pub(super) fn fence(&mut self, number: u32) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        slot.fence = Fence::Asked;
        let epoch = slot.epoch;
        let op = saver_request::Op::Fence(v1::Fence { slot: number, epoch });
        self.ask(Asked::Fence { slot: number, epoch }, op);
    }

    /// Gives what receivers have told of it.
    pub(super) fn drop_slot(&mut self, number: u32) -> Option<(Routes, Sessions)> {
        let slot = self.slots.remove(&number)?;
        let mut routes = Vec::new();
        // Appends under way may still become durable: their publishes are answered when that is known.
        let mut under_way = HashMap::new();
        for (&tag, asked) in &self.asked {
            if let Asked::Append { slot: asked_slot, epoch, topic, seq } = asked
                && *asked_slot == number
                && *epoch == slot.epoch
            {
                under_way.insert((topic.clone(), *seq), tag);
            }
        }
        self.topics -= slot.topics.len();
        for (name, topic) in slot.topics {
            self.routed_topics -= usize::from(!topic.routes.is_empty());
            for pending in topic.pending {
                match under_way.get(&(name.clone(), pending.message.seq)) {
                    Some(&tag) if pending.state == State::Appending => {
                        self.orphans.insert(tag, (pending.token, pending.message.seq));
                    }
                    _ => self.answer(Output::refuse(pending.token, PublishCode::NotOwner, MOVED)),
                }
            }
            let waiting = topic.waiting.map(|waiting| *waiting).unwrap_or_default();
            for publish in waiting.publishes {
                self.answer(Output::refuse(publish.token, PublishCode::NotOwner, MOVED));
            }
            for (request, index) in waiting.announces {
                self.out.push(Output::Announced { request, index, head: None, retained: false });
            }
            if !topic.routes.is_empty() {
                routes.push((name, topic.routes));
            }
        }
        Some((routes, slot.sessions))
    }

    /// The saver knows a newer owner.
    pub(super) fn give_up(&mut self, number: u32, epoch: u64) {
        if self.slots.get(&number).is_some_and(|slot| slot.epoch == epoch) {
            self.given_up.insert(number, epoch);
            self.drop_slot(number);
            self.out.push(Output::GaveUp { slot: number });
        }
    }

    pub fn attach(&mut self, receiver: Receiver, attached: Attached) {
        self.routing.attach(receiver, attached);
        self.judge_slots();
    }

    /// The stream is gone, and with it its routes and sessions.
    pub fn detach(&mut self, receiver: Receiver, now_ms: u64) {
        let Some(attached) = self.routing.get(receiver).cloned() else { return };
        self.routing.detach(receiver);
        for slot in self.slots.values_mut() {
            slot.complete.remove(&receiver);
            slot.sessions.lose(receiver, &attached, now_ms);
            for topic in slot.topics.values_mut() {
                if let Some(place) = topic.routes.iter().position(|&other| other == receiver) {
                    topic.routes.swap_remove(place);
                    self.routed_topics -= usize::from(topic.routes.is_empty());
                }
            }
        }
        self.judge_slots();
    }

    /// The gateways in discovery, as (instance id, incarnation).
    pub fn set_live(&mut self, live: HashSet<(Arc<str>, u64)>) {
        self.routing.set_live(live);
        self.judge_slots();
    }

    /// A gateway has announced all it has in these slots.
    pub fn complete(&mut self, receiver: Receiver, slots: &[v1::SlotEpoch], now_ms: u64) {
        if self.routing.get(receiver).is_none() {
            return;
        }
        for &v1::SlotEpoch { slot: number, epoch } in slots {
            match self.slots.get_mut(&number) {
                Some(slot) if slot.epoch == epoch => {
                    slot.complete.insert(receiver);
                    if let Some(gateway) = self.routing.get(receiver) {
                        slot.sessions.complete(gateway);
                    }
                    slot.whole = self.routing.is_whole(&slot.complete);
                }
                Some(slot) if slot.epoch > epoch => {}
                _ => self.hold(number, Said::Complete { receiver, epoch }, now_ms),
            }
        }
    }

    pub(super) fn judge_slots(&mut self) {
        for slot in self.slots.values_mut() {
            slot.whole = self.routing.is_whole(&slot.complete);
        }
    }

    /// A route by topic name. Answered by [`Output::Announced`] once it is in force and the head is known.
    pub fn announce(
        &mut self,
        receiver: Receiver,
        request: u64,
        index: u32,
        filter: &str,
        present: bool,
        now_ms: u64,
    ) {
        let number = slot_of(filter);
        let answer = |head, retained| Output::Announced { request, index, head, retained };
        let Some(slot) = self.slots.get_mut(&number) else {
            let said = Said::Route { receiver, request, index, filter: filter.into(), present };
            return self.hold(number, said, now_ms);
        };
        // A stream that has gone: nobody waits for the answer.
        if self.routing.get(receiver).is_none() {
            return;
        }
        if !present {
            if let Some(topic) = slot.topics.get_mut(filter)
                && let Some(place) = topic.routes.iter().position(|&other| other == receiver)
            {
                topic.routes.swap_remove(place);
                self.routed_topics -= usize::from(topic.routes.is_empty());
            }
            return self.out.push(answer(Some(0), false));
        }
        let topic = topic_entry(&mut slot.topics, filter, &mut self.topics);
        if !topic.routes.contains(&receiver) {
            self.routed_topics += usize::from(topic.routes.is_empty());
            topic.routes.push(receiver);
        }
        if topic.load == Load::Ready {
            return self.out.push(answer(Some(topic.last_stored), topic.retained));
        }
        topic.waiting().announces.push((request, index));
        self.load(number, filter);
    }

    pub fn announce_wildcard(&mut self, receiver: Receiver, filter: &str, present: bool) {
        self.routing.set_wildcard(filter, receiver, present);
    }

    pub fn session_change(&mut self, receiver: Receiver, change: v1::SessionChange, now_ms: u64) {
        let Some(session) = &change.session else { return };
        let number = slot_of(&carillon_proto::topic::inbox(&session.app, &session.user));
        let Some(slot) = self.slots.get_mut(&number) else {
            return self.hold(number, Said::Session { receiver, change }, now_ms);
        };
        if self.routing.get(receiver).is_some() {
            slot.sessions.change(receiver, change, now_ms, &self.routing, &self.apps, &mut self.out);
        }
    }

    /// Who is online; None when the slot is not ours.
    pub fn sessions(&self, app: &str, user: &str) -> Option<Vec<v1::OnlineSession>> {
        let slot = self.slots.get(&slot_of(&carillon_proto::topic::inbox(app, user)))?;
        Some(slot.sessions.online(app, user, &self.routing))
    }

    /// Tells the gateways to disconnect; gives how many sessions, None when the slot is not ours.
    pub fn kick(&mut self, app: &str, user: &str, client_id: &str) -> Option<u32> {
        let slot = self.slots.get(&slot_of(&carillon_proto::topic::inbox(app, user)))?;
        Some(slot.sessions.kick(app, user, client_id, &self.routing, &mut self.out))
    }

    pub(super) fn fenced(
        &mut self,
        number: u32,
        epoch: u64,
        answer: Result<saver_reply::Result, AskError>,
        now_ms: u64,
    ) {
        let Some(slot) = self.slots.get_mut(&number).filter(|slot| slot.epoch == epoch) else { return };
        match answer {
            Ok(_) => {
                slot.fence = Fence::InForce;
                let names: Vec<Box<str>> = slot.topics.keys().cloned().collect();
                for name in names {
                    self.load(number, &name);
                }
            }
            Err(AskError::Fenced) => self.give_up(number, epoch),
            Err(error) => {
                slot.fence = Fence::RetryAt(now_ms + RETRY_MS);
                let names: Vec<Box<str>> = slot.topics.keys().cloned().collect();
                for name in names {
                    self.fail_waiting(number, &name, error.clone(), None);
                }
            }
        }
    }
}
