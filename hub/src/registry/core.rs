//! The owner's decisions, without I/O: which number a message gets, who gets it and when, who is online.
//!
//! A core owns some of the slots. It is told what happens (a publish, a route, an answer from the saver), and leaves
//! what is to be done in a list of [`Output`]s. It never waits and never reads a clock, so everything it does can be
//! tested as a table.

mod policy;
mod presence;
mod routing;
mod topic;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use carillon_agent::app::App;
use carillon_proto::topic::{app_of, slot_of};
use carillon_proto::v1::{self, PublishCode, saver_error, saver_reply, saver_request};

pub use presence::PresenceEvent;
use presence::Sessions;
use routing::Routing;
pub use routing::{Attached, Receiver};
use topic::{Load, Pending, State, Topic};

/// Topics whose heads are asked for in one request.
const HEADS_AT_ONCE: usize = 512;
/// How long to wait before the saver is asked again.
const RETRY_MS: u64 = 200;
/// Ids of messages that are not stored, remembered so that a retry is harmless.
const RECENT_IDS: usize = 16_384;
/// Messages read at once when a topic's log may have more than was delivered.
const RECOVER_AT_ONCE: u32 = 1000;

/// Limits of one core.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Publishes that may be unanswered; past it they are refused as OVERLOADED.
    pub unanswered: usize,
    /// Topics kept that nobody is subscribed to.
    pub idle_topics: usize,
}

/// A publish that is on its way through the core. `token` comes back with its answer.
#[derive(Debug, Clone)]
pub struct Publish {
    pub token: u64,
    pub message: v1::Message,
    pub store: Option<bool>,
    pub idempotent: bool,
    /// The job, if it is a broadcast.
    pub broadcast: Option<Arc<str>>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// A question to the saver, to be answered with [`Core::answered`]. In this order.
    Ask {
        tag: u64,
        op: saver_request::Op,
    },
    /// The answer to a publish. `targets`: whom a broadcast went to.
    Reply {
        token: u64,
        published: v1::Published,
        targets: Vec<Receiver>,
    },
    Deliver {
        to: Vec<Receiver>,
        message: v1::Message,
        broadcast: Option<Arc<str>>,
    },
    /// One route of an announcement is in force; `head` is None when another instance owns the slot.
    Announced {
        request: u64,
        index: u32,
        head: Option<u64>,
    },
    Kick {
        to: Receiver,
        kick: v1::KickSession,
    },
    Presence(PresenceEvent),
    /// The slot was found to be owned elsewhere.
    GaveUp {
        slot: u32,
    },
}

impl Output {
    fn refuse(token: u64, code: PublishCode, text: impl Into<String>) -> Output {
        let published = v1::Published { code: code.into(), text: text.into(), ..v1::Published::default() };
        Output::Reply { token, published, targets: Vec::new() }
    }
}

/// Why the saver has not done it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AskError {
    /// The slot has a newer epoch.
    Fenced,
    /// Not carried out; may be asked again.
    Unavailable(String),
    /// It may have been carried out.
    Unknown(String),
    /// Never acceptable.
    Invalid(String),
}

impl AskError {
    /// The error in a saver's reply.
    pub fn of(error: v1::SaverError) -> AskError {
        match error.code() {
            saver_error::Code::Fenced => AskError::Fenced,
            saver_error::Code::Invalid => AskError::Invalid(error.text),
            _ => AskError::Unavailable(error.text),
        }
    }

    fn code_and_text(self) -> (PublishCode, String) {
        match self {
            AskError::Fenced => (PublishCode::NotOwner, "the slot has a newer owner".to_owned()),
            AskError::Unavailable(text) | AskError::Unknown(text) => (PublishCode::StoreUnavailable, text),
            AskError::Invalid(text) => (PublishCode::Refused, text),
        }
    }
}

#[derive(Debug)]
enum Asked {
    Fence { slot: u32, epoch: u64 },
    Heads { topics: Vec<(u32, u64, Box<str>)> },
    Append { slot: u32, epoch: u64, topic: Box<str>, seq: u64 },
    Recover { slot: u32, epoch: u64, topic: Box<str> },
}

#[derive(Debug)]
struct Slot {
    epoch: u64,
    fence: Fence,
    topics: HashMap<Box<str>, Topic>,
    /// No topic of the slot gets a number up to this one: the largest of those that were evicted.
    floor: u64,
    /// Gateways that have announced all they have, under this epoch.
    complete: HashSet<Receiver>,
    whole: bool,
    sessions: Sessions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fence {
    Asked,
    RetryAt(u64),
    InForce,
}

/// Figures for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    pub slots: usize,
    pub slots_not_whole: usize,
    pub topics: usize,
    pub sessions: usize,
    pub unanswered: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    apps: Arc<BTreeMap<String, Arc<App>>>,
    slots: HashMap<u32, Slot>,
    /// Slots that turned out to be owned elsewhere: the epoch up to which they are not taken again.
    given_up: HashMap<u32, u64>,
    routing: Routing,
    asked: HashMap<u64, Asked>,
    /// Publishes whose slot went while their append was under way, by the append's tag.
    orphans: HashMap<u64, (u64, u64)>,
    next_tag: u64,
    unanswered: usize,
    topics: usize,
    routed_topics: usize,
    /// Topics to load at the end of the turn.
    cold: Vec<(u32, Box<str>)>,
    /// Topics to load again, and when.
    retry: VecDeque<(u64, u32, Box<str>)>,
    recent: RecentIds,
    sweep: u32,
    out: Vec<Output>,
}

impl Core {
    pub fn new(limits: Limits) -> Self {
        Core {
            limits,
            apps: Arc::default(),
            slots: HashMap::new(),
            given_up: HashMap::new(),
            routing: Routing::default(),
            asked: HashMap::new(),
            orphans: HashMap::new(),
            next_tag: 1,
            unanswered: 0,
            topics: 0,
            routed_topics: 0,
            cold: Vec::new(),
            retry: VecDeque::new(),
            recent: RecentIds::default(),
            sweep: 0,
            out: Vec::new(),
        }
    }

    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub fn set_apps(&mut self, apps: Arc<BTreeMap<String, Arc<App>>>) {
        self.apps = apps;
    }

    /// Ends a turn: asks for what is to be loaded, evicts, and gives what is to be done, in order.
    pub fn turn(&mut self, outputs: &mut Vec<Output>) {
        self.load_cold();
        self.evict();
        outputs.append(&mut self.out);
    }

    /// Time passes; call it several times a second.
    pub fn tick(&mut self, now_ms: u64) {
        let due: Vec<u32> = self
            .slots
            .iter()
            .filter(|(_, slot)| matches!(slot.fence, Fence::RetryAt(at) if at <= now_ms))
            .map(|(&number, _)| number)
            .collect();
        for number in due {
            self.fence(number);
        }
        while self.retry.front().is_some_and(|(at, _, _)| *at <= now_ms) {
            let Some((_, number, name)) = self.retry.pop_front() else { break };
            self.load(number, &name);
        }
        for slot in self.slots.values_mut() {
            slot.sessions.end_lost(now_ms, &self.routing, &self.apps, &mut self.out);
        }
    }

    pub fn sizes(&self) -> Sizes {
        Sizes {
            slots: self.slots.len(),
            slots_not_whole: self.slots.values().filter(|slot| !slot.whole).count(),
            topics: self.topics,
            sessions: self.slots.values().map(|slot| slot.sessions.len()).sum(),
            unanswered: self.unanswered,
        }
    }

    // --- slots ---

    /// All slots of this core that the keeper says are ours, with their epochs.
    pub fn set_slots(&mut self, owned: &HashMap<u32, u64>) {
        let lost: Vec<u32> = self
            .slots
            .iter()
            .filter(|(number, slot)| owned.get(number) != Some(&slot.epoch))
            .map(|(&number, _)| number)
            .collect();
        for number in lost {
            self.drop_slot(number);
        }
        for (&number, &epoch) in owned {
            let refused = self.given_up.get(&number).is_some_and(|&given_up| epoch <= given_up);
            if refused || self.slots.contains_key(&number) {
                continue;
            }
            self.given_up.remove(&number);
            let mut slot = Slot {
                epoch,
                fence: Fence::Asked,
                topics: HashMap::new(),
                floor: 0,
                complete: HashSet::new(),
                whole: false,
                sessions: Sessions::default(),
            };
            slot.whole = self.routing.is_whole(&slot.complete);
            self.slots.insert(number, slot);
            self.fence(number);
        }
    }

    fn fence(&mut self, number: u32) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        slot.fence = Fence::Asked;
        let epoch = slot.epoch;
        let op = saver_request::Op::Fence(v1::Fence { slot: number, epoch });
        self.ask(Asked::Fence { slot: number, epoch }, op);
    }

    fn drop_slot(&mut self, number: u32) {
        let Some(slot) = self.slots.remove(&number) else { return };
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
                self.out.push(Output::Announced { request, index, head: None });
            }
        }
    }

    /// The saver knows a newer owner.
    fn give_up(&mut self, number: u32, epoch: u64) {
        if self.slots.get(&number).is_some_and(|slot| slot.epoch == epoch) {
            self.given_up.insert(number, epoch);
            self.drop_slot(number);
            self.out.push(Output::GaveUp { slot: number });
        }
    }

    // --- receivers ---

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
    pub fn complete(&mut self, receiver: Receiver, slots: &[v1::SlotEpoch]) {
        let Some(attached) = self.routing.get(receiver).cloned() else { return };
        for v1::SlotEpoch { slot: number, epoch } in slots {
            if let Some(slot) = self.slots.get_mut(number).filter(|slot| slot.epoch == *epoch) {
                slot.complete.insert(receiver);
                slot.whole = self.routing.is_whole(&slot.complete);
                slot.sessions.end_not_announced(&attached, &self.apps, &mut self.out);
            }
        }
    }

    fn judge_slots(&mut self) {
        for slot in self.slots.values_mut() {
            slot.whole = self.routing.is_whole(&slot.complete);
        }
    }

    /// A route by topic name. Answered by [`Output::Announced`] once it is in force and the head is known.
    pub fn announce(&mut self, receiver: Receiver, request: u64, index: u32, filter: &str, present: bool) {
        let number = slot_of(filter);
        let answer = |head| Output::Announced { request, index, head };
        let Some(slot) = self.slots.get_mut(&number) else { return self.out.push(answer(None)) };
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
            return self.out.push(answer(Some(0)));
        }
        let topic = topic_entry(&mut slot.topics, filter, &mut self.topics);
        if !topic.routes.contains(&receiver) {
            self.routed_topics += usize::from(topic.routes.is_empty());
            topic.routes.push(receiver);
        }
        if topic.load == Load::Ready {
            return self.out.push(answer(Some(topic.last_stored)));
        }
        topic.waiting().announces.push((request, index));
        self.load(number, filter);
    }

    pub fn announce_wildcard(&mut self, receiver: Receiver, filter: &str, present: bool) {
        self.routing.set_wildcard(filter, receiver, present);
    }

    // --- sessions ---

    pub fn session_change(&mut self, receiver: Receiver, change: v1::SessionChange, now_ms: u64) {
        let Some(session) = &change.session else { return };
        let number = slot_of(&carillon_proto::topic::inbox(&session.app, &session.user));
        let Some(slot) = self.slots.get_mut(&number) else { return };
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

    // --- publishing ---

    pub fn publish(&mut self, publish: Publish, now_ms: u64) {
        let refuse = |code, text: String| Output::refuse(publish.token, code, text);
        if let Err(text) = policy::check(&publish.message) {
            return self.out.push(refuse(PublishCode::Refused, text));
        }
        let number = slot_of(&publish.message.topic);
        let Some(slot) = self.slots.get_mut(&number) else {
            return self.out.push(refuse(PublishCode::NotOwner, format!("slot {number} is not owned here")));
        };
        if self.unanswered >= self.limits.unanswered {
            return self.out.push(refuse(
                PublishCode::Overloaded,
                format!("{} publishes are waiting for their answer", self.unanswered),
            ));
        }
        self.unanswered += 1;
        let topic = topic_entry(&mut slot.topics, &publish.message.topic, &mut self.topics);
        topic.used = true;
        if topic.load == Load::Ready {
            self.sequence(number, publish, now_ms);
        } else {
            let name: Box<str> = publish.message.topic.as_str().into();
            topic.waiting().publishes.push(publish);
            self.load(number, &name);
        }
    }

    /// Gives a message its number, has it stored, and delivers what may be delivered. The topic must be ready.
    fn sequence(&mut self, number: u32, publish: Publish, now_ms: u64) {
        let Publish { token, mut message, store, idempotent, broadcast } = publish;
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(topic) = slot.topics.get_mut(message.topic.as_str()) else { return };
        let default_app;
        let app = match self.apps.get(app_of(&message.topic)) {
            Some(app) => app,
            None => {
                // Its document may not have arrived here yet; whether the app exists is checked at the edge.
                default_app = Arc::new(App::default());
                &default_app
            }
        };
        let policy = policy::policy(app, &message, store);
        let idempotent = idempotent && !message.id.is_empty();
        if idempotent && !policy.store && !message.retain {
            if let Some((epoch, seq)) = self.recent.get(&message.topic, &message.id) {
                let mut reply = Output::refuse(token, PublishCode::Accepted, "");
                if let Output::Reply { published, .. } = &mut reply {
                    (published.epoch, published.seq, published.duplicate) = (epoch, seq, true);
                }
                return self.answer(reply);
            }
            self.recent.insert(&message.topic, &message.id, (slot.epoch, topic.seq + 1));
        }
        topic.seq += 1;
        message.epoch = slot.epoch;
        message.seq = topic.seq;
        message.prev = 0;
        message.stored = policy.store;
        if message.published_ms == 0 {
            message.published_ms = now_ms;
        }
        let name: Box<str> = message.topic.as_str().into();
        if policy.store || message.retain {
            let append = v1::Append {
                slot: number,
                message: Some(message.clone()),
                log: policy.store,
                retain: message.retain,
                idempotent: idempotent && policy.store,
                retention: Some(policy.retention),
            };
            let (epoch, seq) = (slot.epoch, topic.seq);
            topic.pending.push_back(Pending { token, message, broadcast, state: State::Appending });
            let asked = Asked::Append { slot: number, epoch, topic: name, seq };
            self.ask(asked, saver_request::Op::Append(append));
        } else {
            topic.pending.push_back(Pending { token, message, broadcast, state: State::Free });
            self.release(number, &name, now_ms);
        }
    }

    /// Delivers what may be delivered; recovers the topic if that turned out to be necessary.
    fn release(&mut self, number: u32, name: &str, now_ms: u64) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(topic) = slot.topics.get_mut(name) else { return };
        self.unanswered -= topic.release(name, slot.whole, &self.routing, &mut self.out);
        match topic.load {
            Load::Stale => self.load(number, name),
            Load::Ready => {
                // What had to wait while the topic was loaded, in the order in which it came.
                let Some(waiting) = topic.waiting.take() else { return };
                let head = Some(topic.last_stored);
                for (request, index) in waiting.announces {
                    self.out.push(Output::Announced { request, index, head });
                }
                for publish in waiting.publishes {
                    self.sequence(number, publish, now_ms);
                }
            }
            _ => {}
        }
    }

    // --- the saver ---

    fn ask(&mut self, asked: Asked, op: saver_request::Op) {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.asked.insert(tag, asked);
        self.out.push(Output::Ask { tag, op });
    }

    /// Begins what makes a topic ready, if it can be begun now.
    fn load(&mut self, number: u32, name: &str) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        if slot.fence != Fence::InForce {
            return;
        }
        let Some(topic) = slot.topics.get_mut(name) else { return };
        match topic.load {
            Load::Cold => {
                topic.load = Load::Loading;
                self.cold.push((number, name.into()));
            }
            Load::Stale if topic.pending.is_empty() => {
                topic.load = Load::Recovering;
                let (epoch, after) = (slot.epoch, topic.last_stored);
                let op = saver_request::Op::Read(v1::Read {
                    topic: name.to_owned(),
                    after,
                    limit: RECOVER_AT_ONCE,
                    max_bytes: 0,
                });
                self.ask(Asked::Recover { slot: number, epoch, topic: name.into() }, op);
            }
            _ => {}
        }
    }

    fn load_cold(&mut self) {
        while !self.cold.is_empty() {
            let chunk: Vec<_> = self.cold.drain(..self.cold.len().min(HEADS_AT_ONCE)).collect();
            let topics: Vec<_> = chunk
                .into_iter()
                .filter_map(|(number, name)| self.slots.get(&number).map(|slot| (number, slot.epoch, name)))
                .collect();
            let names = topics.iter().map(|(_, _, name)| name.to_string()).collect();
            self.ask(Asked::Heads { topics }, saver_request::Op::Heads(v1::Heads { topics: names }));
        }
    }

    /// The saver's answer to an [`Output::Ask`].
    pub fn answered(&mut self, tag: u64, answer: Result<saver_reply::Result, AskError>, now_ms: u64) {
        match self.asked.remove(&tag) {
            Some(Asked::Fence { slot, epoch }) => self.fenced(slot, epoch, answer, now_ms),
            Some(Asked::Heads { topics }) => self.heads_read(topics, answer, now_ms),
            Some(Asked::Append { slot, epoch, topic, seq }) => {
                self.appended(tag, (slot, epoch), &topic, seq, answer, now_ms);
            }
            Some(Asked::Recover { slot, epoch, topic }) => {
                self.recovered(slot, epoch, &topic, answer, now_ms)
            }
            None => {}
        }
    }

    fn fenced(
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

    fn heads_read(
        &mut self,
        topics: Vec<(u32, u64, Box<str>)>,
        answer: Result<saver_reply::Result, AskError>,
        now_ms: u64,
    ) {
        let answer = match answer {
            Ok(saver_reply::Result::Heads(reply)) if reply.heads.len() == topics.len() => Ok(reply.heads),
            Ok(_) => Err(AskError::Unavailable("the saver gave other heads than were asked for".to_owned())),
            Err(error) => Err(error),
        };
        for (place, (number, epoch, name)) in topics.into_iter().enumerate() {
            let Some(slot) = self.slots.get_mut(&number).filter(|slot| slot.epoch == epoch) else { continue };
            let Some(topic) = slot.topics.get_mut(&name) else { continue };
            match &answer {
                Ok(heads) => {
                    let head = &heads[place];
                    topic.seq = topic.seq.max(head.seq).max(slot.floor);
                    topic.last_stored = head.seq;
                    topic.load = Load::Ready;
                    self.release(number, &name, now_ms);
                }
                Err(error) => {
                    topic.load = Load::Cold;
                    self.fail_waiting(number, &name, error.clone(), Some(now_ms + RETRY_MS));
                }
            }
        }
    }

    /// Publishes that wait for a topic to be loaded are told that it is not; announcements wait on.
    fn fail_waiting(&mut self, number: u32, name: &str, error: AskError, retry_at: Option<u64>) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(topic) = slot.topics.get_mut(name) else { return };
        let publishes =
            topic.waiting.as_mut().map(|waiting| std::mem::take(&mut waiting.publishes)).unwrap_or_default();
        if topic.waiting.as_ref().is_some_and(|waiting| waiting.announces.is_empty()) {
            topic.waiting = None;
        }
        if let Some(at) = retry_at
            && (topic.waiting.is_some() || topic.load == Load::Stale)
        {
            self.retry.push_back((at, number, name.into()));
        }
        let (code, text) = error.code_and_text();
        for publish in publishes {
            self.answer(Output::refuse(publish.token, code, text.clone()));
        }
    }

    fn appended(
        &mut self,
        tag: u64,
        (number, epoch): (u32, u64),
        name: &str,
        seq: u64,
        answer: Result<saver_reply::Result, AskError>,
        now_ms: u64,
    ) {
        if let Some((token, seq)) = self.orphans.remove(&tag) {
            return self.answer_orphan(token, epoch, seq, answer);
        }
        let Some(slot) = self.slots.get_mut(&number).filter(|slot| slot.epoch == epoch) else { return };
        let Some(topic) = slot.topics.get_mut(name) else { return };
        let state = match answer {
            Ok(saver_reply::Result::Appended(appended)) if appended.duplicate => {
                State::Duplicate { epoch: appended.epoch, seq: appended.seq }
            }
            Ok(saver_reply::Result::Appended(appended)) => {
                let place = topic.pending.binary_search_by_key(&seq, |pending| pending.message.seq);
                match place.map(|place| topic.pending[place].message.stored) {
                    Ok(true) => State::Stored { prev: appended.prev },
                    _ => State::Free,
                }
            }
            Ok(_) => {
                topic.load = Load::Stale;
                State::Failed(
                    PublishCode::StoreUnavailable,
                    "the saver gave an answer of another kind".to_owned(),
                )
            }
            Err(AskError::Fenced) => {
                topic.resolve(seq, State::Failed(PublishCode::NotOwner, MOVED.to_owned()));
                return self.give_up(number, epoch);
            }
            Err(error) => {
                if matches!(error, AskError::Unknown(_)) {
                    topic.load = Load::Stale;
                }
                let (code, text) = error.code_and_text();
                State::Failed(code, text)
            }
        };
        topic.resolve(seq, state);
        self.release(number, name, now_ms);
    }

    /// The slot went while this was appended. If it is in the log, the new owner has it there.
    fn answer_orphan(
        &mut self,
        token: u64,
        epoch: u64,
        seq: u64,
        answer: Result<saver_reply::Result, AskError>,
    ) {
        let output = match answer {
            Ok(saver_reply::Result::Appended(appended)) => {
                let (epoch, seq) =
                    if appended.duplicate { (appended.epoch, appended.seq) } else { (epoch, seq) };
                let published = v1::Published {
                    code: PublishCode::Accepted.into(),
                    epoch,
                    seq,
                    duplicate: appended.duplicate,
                    has_route: true,
                    ..v1::Published::default()
                };
                Output::Reply { token, published, targets: Vec::new() }
            }
            _ => Output::refuse(token, PublishCode::NotOwner, MOVED),
        };
        self.answer(output);
    }

    /// What the log has after the last message that was delivered.
    fn recovered(
        &mut self,
        number: u32,
        epoch: u64,
        name: &str,
        answer: Result<saver_reply::Result, AskError>,
        now_ms: u64,
    ) {
        let Some(slot) = self.slots.get_mut(&number).filter(|slot| slot.epoch == epoch) else { return };
        let whole = slot.whole;
        let Some(topic) = slot.topics.get_mut(name) else { return };
        topic.load = Load::Stale;
        let reply = match answer {
            Ok(saver_reply::Result::Read(reply)) => reply,
            Ok(_) => {
                let error = AskError::Unavailable("the saver gave an answer of another kind".to_owned());
                return self.fail_waiting(number, name, error, Some(now_ms + RETRY_MS));
            }
            Err(error) => return self.fail_waiting(number, name, error, Some(now_ms + RETRY_MS)),
        };
        for message in reply.messages {
            topic.last_stored = topic.last_stored.max(message.seq);
            let to = self.routing.targets(name, &topic.routes, whole);
            if !to.is_empty() {
                self.out.push(Output::Deliver { to, message, broadcast: None });
            }
        }
        let head = reply.head.unwrap_or_default();
        topic.last_stored = topic.last_stored.max(reply.next.min(head.seq));
        if reply.next < head.seq {
            return self.load(number, name);
        }
        topic.load = Load::Ready;
        topic.seq = topic.seq.max(head.seq);
        self.release(number, name, now_ms);
    }

    /// Answers a publish that was counted.
    fn answer(&mut self, reply: Output) {
        self.unanswered -= 1;
        self.out.push(reply);
    }

    // --- eviction ---

    /// While there are too many idle topics: forgets those of one slot that were not used since it was last looked at.
    fn evict(&mut self) {
        if self.topics - self.routed_topics <= self.limits.idle_topics {
            return;
        }
        let Some(number) = self.slots.keys().copied().min_by_key(|&number| (number < self.sweep, number))
        else {
            return;
        };
        self.sweep = number + 1;
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let before = slot.topics.len();
        let floor = &mut slot.floor;
        slot.topics.retain(|_, topic| {
            if !topic.is_idle() {
                return true;
            }
            let keep = topic.used;
            topic.used = false;
            if !keep {
                *floor = topic.seq.max(*floor);
            }
            keep
        });
        self.topics -= before - slot.topics.len();
    }
}

const MOVED: &str = "the slot has moved to another owner";

fn topic_entry<'a>(topics: &'a mut HashMap<Box<str>, Topic>, name: &str, count: &mut usize) -> &'a mut Topic {
    if !topics.contains_key(name) {
        topics.insert(name.into(), Topic::default());
        *count += 1;
    }
    topics.get_mut(name).expect("inserted above")
}

/// Ids of recent messages that are in no log.
#[derive(Debug, Default)]
struct RecentIds {
    positions: HashMap<Arc<str>, (u64, u64)>,
    order: VecDeque<Arc<str>>,
}

impl RecentIds {
    fn key(topic: &str, id: &str) -> Arc<str> {
        format!("{topic}\0{id}").into()
    }

    fn get(&self, topic: &str, id: &str) -> Option<(u64, u64)> {
        self.positions.get(&Self::key(topic, id)).copied()
    }

    fn insert(&mut self, topic: &str, id: &str, position: (u64, u64)) {
        let key = Self::key(topic, id);
        self.positions.insert(key.clone(), position);
        self.order.push_back(key);
        if self.order.len() > RECENT_IDS
            && let Some(oldest) = self.order.pop_front()
        {
            self.positions.remove(&oldest);
        }
    }
}
