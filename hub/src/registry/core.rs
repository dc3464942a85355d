//! The owner's decisions, without I/O: which number a message gets, who gets it and when, who is online.
//!
//! A core owns some of the slots. It is told what happens (a publish, a route, an answer from the saver), and leaves
//! what is to be done in a list of [`Output`]s. It never waits and never reads a clock, so everything it does can be
//! tested as a table.

mod coming;
mod loading;
mod policy;
mod presence;
mod publishing;
mod recent;
mod routing;
mod slots;
mod topic;
mod wills;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use carillon_agent::app::App;
use carillon_proto::v1::{self, PublishCode, saver_error, saver_reply, saver_request};

pub use presence::PresenceEvent;
use presence::Sessions;
use recent::RecentIds;
use routing::Routing;
pub use routing::{Attached, Receiver};
use topic::Topic;

/// How long to wait before the saver is asked again.
const RETRY_MS: u64 = 200;

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
        /// The topic has a retained message.
        retained: bool,
    },
    Kick {
        to: Receiver,
        kick: v1::KickSession,
    },
    Presence(PresenceEvent),
    /// The will of a session whose gateway is gone: to be published.
    Will(v1::Message),
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
    /// What was said of slots that are not ours yet, in order.
    early: VecDeque<slots::Early>,
    /// Topics to load at the end of the turn.
    cold: Vec<(u32, Box<str>)>,
    /// Topics to load again, and when.
    retry: VecDeque<(u64, u32, Box<str>)>,
    recent: RecentIds,
    /// What was published to slots that are on their way to us: their publishers have heard first that they are ours.
    coming: HashMap<u32, Vec<(u64, Publish)>>,
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
            early: VecDeque::new(),
            cold: Vec::new(),
            retry: VecDeque::new(),
            recent: RecentIds::default(),
            coming: HashMap::new(),
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
        self.end_early(now_ms);
        self.end_waits(now_ms);
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

    fn ask(&mut self, asked: Asked, op: saver_request::Op) {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.asked.insert(tag, asked);
        self.out.push(Output::Ask { tag, op });
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
}

const MOVED: &str = "the slot has moved to another owner";

fn topic_entry<'a>(topics: &'a mut HashMap<Box<str>, Topic>, name: &str, count: &mut usize) -> &'a mut Topic {
    if !topics.contains_key(name) {
        topics.insert(name.into(), Topic::default());
        *count += 1;
    }
    topics.get_mut(name).expect("inserted above")
}
