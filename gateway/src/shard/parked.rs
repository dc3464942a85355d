//! Flash disconnect: a kept session whose connection dropped stays here for a while. Its device comes back to it without
//! the saver being asked, and nobody is told that it was away.
//!
//! A parked session has no place in the lists of subscribers; its topics are held, as by a SUBSCRIBE under way, so that
//! their routes stay. What is stored meanwhile is read from the log when the device is back, as by any subscription that
//! is behind; what is not is held up to a bound, and QoS 0 is dropped. Nothing of this costs a connected device anything.
//! How a session gets from one shard to another: `hand_over.rs`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::Shard;
use super::close::Reason;
use super::conn::{Conn, Phase, Session, Waiting};
use super::connect::online;
use super::deliver::HELD_MAX;
use super::passed::TooMany;
use super::timers::{Tick, ticks};
use super::topics::{Hold, Sub, TopicId, Topics};
use crate::codec::QoS;
use crate::delivery::Delivery;
use crate::event::ConnId;

/// All parked sessions of a shard, and what is held for them and for those that are about to come here.
#[derive(Default)]
pub struct Parking {
    /// By the connection that each had.
    sessions: HashMap<ConnId, Box<Parked>>,
    /// When each is given up, the first on top: shard, index and generation of the connection it had.
    until: BinaryHeap<Reverse<(Tick, u16, u32, u32)>>,
    /// By the connection that a session had here, or is to have here.
    holdings: HashMap<ConnId, Holding>,
    by_topic: HashMap<TopicId, SmallVec<[ConnId; 1]>>,
}

struct Parked {
    left: Left,
    why: Reason,
}

/// Topics that are held for a session, and what came on them.
#[derive(Default)]
pub struct Holding {
    /// In the order of the subscriptions; whether messages that are in no log are wanted.
    topics: Vec<(Hold, bool)>,
    /// Not in any log, came while nobody was there.
    held: Vec<Arc<Delivery>>,
}

/// What is left of a connection for the next one, in this shard or another.
pub struct Left {
    pub session: Box<Session>,
    pub subs: Vec<(Arc<str>, Sub)>,
    pub owed: Owed,
    /// Holds on the topics, in the shard that goes on with it: to be released when it does.
    pub holds: Vec<Hold>,
}

/// What a session is to be sent when it goes on.
#[derive(Default)]
pub struct Owed {
    /// Topics with messages due beyond what the subscription knows.
    pub due: HashMap<Arc<str>, Due>,
    /// Not in any log, came while nobody was there.
    pub held: Vec<Arc<Delivery>>,
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

impl Owed {
    fn due(&mut self, topic: &Arc<str>) -> &mut Due {
        self.due.entry(topic.clone()).or_default()
    }

    /// What came by on the topics that were held for it in a shard.
    pub(super) fn take_in(&mut self, holding: Holding, topics: &Topics) -> Result<(), TooMany> {
        for hold in holding.holds() {
            for (name, (prev, seq)) in topics.passed_since(hold)? {
                self.note_passed(&name, prev, seq);
            }
        }
        for delivery in holding.held {
            // Of two shards that both hold the topics each has it.
            let has_it = self.held.iter().any(|held| Arc::ptr_eq(held, &delivery));
            if !has_it && self.held.len() < HELD_MAX {
                self.held.push(delivery);
            }
        }
        Ok(())
    }

    /// A stored message came by, or several: `prev` of the first, seq of the last.
    fn note_passed(&mut self, topic: &Arc<str>, prev: u64, seq: u64) {
        let due = self.due(topic);
        due.target = due.target.max(seq);
        // Whichever of them is heard of first.
        due.from = Some(due.from.map_or(prev, |from| from.min(prev)));
    }
}

impl Left {
    /// A message has come to this shard, and has not been offered to the connection.
    pub(super) fn owe(&mut self, delivery: &Arc<Delivery>) {
        let message = &delivery.message;
        let is_wanted = |(name, sub): &(Arc<str>, Sub)| {
            sub.options.qos > 0 && carillon_proto::topic::matches(name, &delivery.topic)
        };
        if !self.subs.iter().any(is_wanted) {
            return;
        }
        if message.stored {
            self.owed.note_passed(&delivery.topic, message.prev, message.seq);
        } else if message.qos > 0 && self.owed.held.len() < HELD_MAX {
            self.owed.held.push(delivery.clone());
        }
    }

    /// Takes stock of what was under way. What is in flight stays so, and is sent again with its packet identifiers.
    fn take_stock(&mut self) {
        for behind in self.session.behind.take().into_iter().flat_map(|behind| *behind) {
            let due = self.owed.due(&behind.topic);
            due.target = due.target.max(behind.target);
            due.sent = due.sent.max(behind.sent);
            // Where nothing of it was sent yet: what was read ahead does not count.
            due.from = Some(behind.queue.front().map_or(behind.after, |first| first.message.seq - 1));
            self.owed.held.extend(behind.held);
        }
        self.owed.held.truncate(HELD_MAX);
        for Waiting { target, .. } in self.session.waiting.iter_mut().flat_map(|waiting| waiting.iter_mut()) {
            target.exact = None;
        }
    }
}

impl Holding {
    /// With whether messages that are in no log are wanted.
    pub fn new(topics: Vec<(Hold, bool)>) -> Self {
        Holding { topics, held: Vec::new() }
    }

    pub fn holds(&self) -> impl Iterator<Item = Hold> {
        self.topics.iter().map(|(hold, _)| *hold)
    }
}

impl Parking {
    /// From now on messages on these topics, which are held, are kept for a session.
    pub(super) fn keep(&mut self, id: ConnId, holding: Holding) {
        for hold in holding.holds() {
            self.by_topic.entry(hold.topic).or_default().push(id);
        }
        self.holdings.insert(id, holding);
    }

    /// No more; gives what there is. The holds on the topics are the caller's now.
    pub(super) fn let_go(&mut self, id: ConnId) -> Option<Holding> {
        let holding = self.holdings.remove(&id)?;
        for Hold { topic, .. } in holding.holds() {
            if let Some(ids) = self.by_topic.get_mut(&topic) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.by_topic.remove(&topic);
                }
            }
        }
        if self.holdings.is_empty() && self.sessions.is_empty() {
            // Their tables would stay as large as the worst moment has made them.
            *self = Parking::default();
        }
        Some(holding)
    }

    /// A message that is in no log, for those who are away.
    fn hold(&mut self, topics: &[TopicId], delivery: &Arc<Delivery>) -> u64 {
        let mut dropped = 0;
        for topic in topics {
            for id in self.by_topic.get(topic).into_iter().flatten() {
                let Some(holding) = self.holdings.get_mut(id) else { continue };
                let wants = holding.topics.iter().any(|(hold, is_wanted)| hold.topic == *topic && *is_wanted);
                let has_it = holding.held.last().is_some_and(|last| Arc::ptr_eq(last, delivery));
                if !wants || has_it {
                    continue;
                }
                if holding.held.len() < HELD_MAX {
                    holding.held.push(delivery.clone());
                } else {
                    dropped += 1;
                }
            }
        }
        dropped
    }

    /// A parked session, what was held for it, and why its connection ended.
    pub(super) fn take(&mut self, id: ConnId) -> Option<(Left, Holding, Reason)> {
        let Parked { left, why } = *self.sessions.remove(&id)?;
        let holding = self.let_go(id).unwrap_or_default();
        Some((left, holding, why))
    }

    pub(super) fn left(&self, id: ConnId) -> Option<&Left> {
        self.sessions.get(&id).map(|parked| &parked.left)
    }

    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values().map(|parked| &*parked.left.session)
    }

    pub fn is_empty(&self) -> bool {
        self.holdings.is_empty()
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
        let mut left = Left { session, subs: Vec::new(), owed: Owed::default(), holds: Vec::new() };
        let mut topics = Vec::with_capacity(subs.len());
        for &sub in subs {
            let topic = self.topics.get(sub.topic);
            let (name, kept) = (topic.name.clone(), topic.subs[sub.position as usize]);
            if !left.session.is_own(&name) {
                // A guest's: it has gone with the connection.
                self.drop_subscription(sub);
                continue;
            }
            topics.push((self.topics.hold(&name).0, kept.options.qos > 0));
            self.drop_subscription(sub);
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
        // One bound for what was held before and what comes.
        let held = std::mem::take(&mut left.owed.held);
        self.parking.keep(id, Holding { topics, held });
        self.parking.sessions.insert(id, Box::new(Parked { left, why }));
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
        let Some((left, holding, ended)) = self.parking.take(id) else { return false };
        self.link.metrics().parked.dec();
        for hold in holding.holds() {
            self.release(hold);
        }
        let key = left.session.key;
        self.give_up_parked(left.session, &why.unwrap_or(ended));
        // Not before: whoever finds nobody here has the saver asked behind what it is told now.
        self.link.sessions().release(key, id);
        true
    }

    pub(super) fn give_up_parked(&self, mut session: Box<Session>, why: &Reason) {
        self.close_kept(&mut session);
        let gone = carillon_proto::v1::SessionChange {
            online: false,
            reason: why.label().to_owned(),
            arrival_ms: Some(1000 * u64::from(self.arrival_seconds(why))),
            ..online(&session, false)
        };
        self.link.session_ended(session.key, gone);
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
}

/// What is said once and must be heard by whichever gateway the device comes back to: through the saver alone.
fn has_qos2_state(session: &Session) -> bool {
    session.publishing.as_ref().is_some_and(|publishing| !publishing.state().is_empty())
        || session
            .inflight
            .as_ref()
            .is_some_and(|inflight| inflight.flights.iter().any(|flight| flight.qos == QoS::ExactlyOnce))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use carillon_proto::v1;

    use super::*;

    const FILTER: &str = "demo/s/+";

    /// What reaches a shard.
    enum Event {
        Message(Arc<Delivery>),
        Prepare,
        GiveUp,
        HandedOver(Owed),
    }

    /// As much of a shard as the hand-over of a session with one wildcard needs.
    #[derive(Default)]
    struct Side {
        topics: Topics,
        parking: Parking,
        queue: VecDeque<Event>,
    }

    const ID: ConnId = ConnId { shard: 0, index: 0, generation: 0 };

    impl Side {
        fn keep(&mut self) {
            let (hold, _) = self.topics.hold(FILTER);
            self.parking.keep(ID, Holding::new(vec![(hold, true)]));
        }

        fn come_by(&mut self, delivery: &Arc<Delivery>) {
            let mut wild = SmallVec::new();
            self.topics.wild_matching(&delivery.topic, &mut wild);
            if delivery.message.stored {
                for &filter in &wild {
                    self.topics.note_passed(
                        filter,
                        &delivery.topic,
                        delivery.message.prev,
                        delivery.message.seq,
                    );
                }
            } else {
                self.parking.hold(&wild, delivery);
            }
        }

        fn let_go(&mut self, owed: &mut Owed) {
            let holding = self.parking.let_go(ID).unwrap();
            let holds: Vec<Hold> = holding.holds().collect();
            owed.take_in(holding, &self.topics).unwrap();
            for hold in holds {
                self.topics.release(hold);
            }
        }
    }

    struct Model {
        sides: [Side; 2],
        /// Sides with a route.
        routed: [bool; 2],
        /// Sides that the message goes to: looked up, and not in their queues yet.
        on_its_way: Option<[bool; 2]>,
        is_prepared: bool,
        is_live: bool,
        owed: Owed,
        /// Sent to the device of itself, after it went on.
        live: usize,
    }

    impl Model {
        fn new() -> Model {
            let mut sides = [Side::default(), Side::default()];
            sides[0].keep();
            sides[1].queue.push_back(Event::Prepare);
            Model {
                sides,
                routed: [true, false],
                on_its_way: None,
                is_prepared: false,
                is_live: false,
                owed: Owed::default(),
                live: 0,
            }
        }

        /// One event of a side.
        fn step(&mut self, side: usize) {
            match self.sides[side].queue.pop_front() {
                None => {}
                Some(Event::Message(_)) if side == 1 && self.is_live => self.live += 1,
                Some(Event::Message(delivery)) => self.sides[side].come_by(&delivery),
                Some(Event::Prepare) => {
                    self.sides[1].keep();
                    self.routed[1] = true;
                    self.is_prepared = true;
                }
                Some(Event::GiveUp) => {
                    let mut owed = Owed::default();
                    self.sides[0].let_go(&mut owed);
                    self.routed[0] = false;
                    self.sides[1].queue.push_back(Event::HandedOver(owed));
                }
                Some(Event::HandedOver(mut owed)) => {
                    self.sides[1].let_go(&mut owed);
                    self.owed = owed;
                    self.is_live = true;
                }
            }
        }

        /// What `Link::after_deliveries` does. `waits`: for what is being routed.
        fn barrier(&mut self, waits: bool) {
            if self.is_prepared && !(waits && self.on_its_way.is_some()) {
                self.is_prepared = false;
                self.sides[0].queue.push_back(Event::GiveUp);
            }
        }
    }

    /// Every order of: a look-up, a posting, the barrier, and the two sides' turns. Gives how often the message is missed and
    /// how often it comes more than once.
    fn all_orders(delivery: &Arc<Delivery>, waits: bool) -> (usize, usize) {
        let (mut missed, mut repeated) = (0, 0);
        for order in 0..5_u32.pow(7) {
            let mut model = Model::new();
            let mut is_published = false;
            let mut rest = order;
            let turns = (0..7).map(|_| (rest % 5, rest /= 5).0).collect::<Vec<_>>();
            // And at the end everything has its turn.
            for turn in turns.into_iter().chain([2, 3, 0, 1, 4, 0, 1, 0, 1, 4, 0, 1, 0, 1, 0, 1]) {
                match turn {
                    side @ 0..=1 => model.step(side as usize),
                    2 if !is_published => {
                        is_published = true;
                        model.on_its_way = Some(model.routed);
                    }
                    3 => {
                        let sides = model.on_its_way.take().unwrap_or_default();
                        for side in (0..2).filter(|&side| sides[side]) {
                            model.sides[side].queue.push_back(Event::Message(delivery.clone()));
                        }
                    }
                    4 => model.barrier(waits),
                    _ => {}
                }
            }
            assert!(model.is_live && model.sides.iter().all(|side| side.queue.is_empty()));
            let held = model.owed.held.len();
            let due = model.owed.due.get("demo/s/x").map(|due| (due.from, due.target));
            assert!(due.is_none_or(|due| due == (Some(0), 1)));
            let times = held + model.live + usize::from(due.is_some());
            missed += usize::from(times == 0);
            // Of a stored one that is due and comes by as well the second is known by its seq.
            repeated += usize::from(held + model.live > 1);
        }
        (missed, repeated)
    }

    fn delivery(stored: bool) -> Arc<Delivery> {
        let topic = "demo/s/x".to_owned();
        let seq = u64::from(stored);
        Arc::new(Delivery::new(v1::Message { topic, seq, stored, qos: 1, ..v1::Message::default() }))
    }

    #[test]
    fn what_is_due_begins_with_the_oldest_whichever_is_heard_of_first() {
        let mut side = Side::default();
        side.keep();
        side.come_by(&delivery(true));
        let mut owed = Owed::default();
        owed.note_passed(&"demo/s/x".into(), 1, 2);
        side.let_go(&mut owed);
        let due = &owed.due["demo/s/x"];
        assert_eq!((due.from, due.target), (Some(0), 2));
    }

    #[test]
    fn a_session_that_goes_to_another_shard_misses_nothing_that_a_wildcard_matches() {
        assert_eq!(all_orders(&delivery(true), true), (0, 0));
        assert_eq!(all_orders(&delivery(false), true), (0, 0), "once, though both shards have heard it");
        // What the barrier is there for.
        assert!(all_orders(&delivery(true), false).0 > 0);
    }
}
