//! One topic at its owner: the next number, what waits for the saver, and the release of messages in order.

use std::collections::VecDeque;
use std::sync::Arc;

use carillon_proto::v1::{self, PublishCode};

use super::routing::{Receiver, Routing};
use super::{Output, Publish};

/// How much is known about a topic's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Its head has not been read yet.
    Cold,
    /// Its head is being read.
    Loading,
    /// An append's outcome is not known: what the log has after `last_stored` is to be read and delivered.
    Stale,
    /// That is being read.
    Recovering,
    Ready,
}

#[derive(Debug)]
pub struct Topic {
    /// The last number given out.
    pub seq: u64,
    /// seq of the last stored message that was delivered.
    pub last_stored: u64,
    /// There is, or may be, a retained message.
    pub retained: bool,
    pub load: Load,
    /// Used since eviction last looked.
    pub used: bool,
    /// Sequenced and not delivered yet, by seq.
    pub pending: VecDeque<Pending>,
    /// Receivers that announced this topic.
    pub routes: Vec<Receiver>,
    /// What waits until the topic is loaded.
    pub waiting: Option<Box<Waiting>>,
}

#[derive(Debug, Default)]
pub struct Waiting {
    pub publishes: Vec<Publish>,
    /// Request and index of routes whose answer needs the head.
    pub announces: Vec<(u64, u32)>,
}

#[derive(Debug)]
pub struct Pending {
    pub token: u64,
    pub message: v1::Message,
    pub broadcast: Option<Arc<str>>,
    pub state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not answered by the saver yet.
    Appending,
    /// In the log; `prev` is the stored message before it.
    Stored {
        prev: u64,
    },
    /// Needs no log: may go when it is its turn.
    Free,
    Duplicate {
        epoch: u64,
        seq: u64,
    },
    Failed(PublishCode, String),
}

impl Default for Topic {
    fn default() -> Self {
        Topic {
            seq: 0,
            last_stored: 0,
            retained: false,
            load: Load::Cold,
            used: true,
            pending: VecDeque::new(),
            routes: Vec::new(),
            waiting: None,
        }
    }
}

impl Topic {
    pub fn waiting(&mut self) -> &mut Waiting {
        self.waiting.get_or_insert_default()
    }

    /// Nothing would be lost but its number and its head, which the log and the slot's floor remember.
    pub fn is_idle(&self) -> bool {
        self.routes.is_empty()
            && self.pending.is_empty()
            && self.waiting.is_none()
            && matches!(self.load, Load::Ready | Load::Cold)
    }

    /// Sets the state of a pending message.
    pub fn resolve(&mut self, seq: u64, state: State) {
        if let Ok(place) = self.pending.binary_search_by_key(&seq, |pending| pending.message.seq) {
            self.pending[place].state = state;
        }
    }

    /// Delivers and answers what may go, in order. Gives how many publishes were answered.
    pub fn release(&mut self, name: &str, whole: bool, routing: &Routing, out: &mut Vec<Output>) -> usize {
        let mut answered = 0;
        while self.pending.front().is_some_and(|pending| pending.state != State::Appending) {
            let Some(Pending { token, mut message, broadcast, state }) = self.pending.pop_front() else {
                break;
            };
            answered += 1;
            if message.retain && !matches!(state, State::Duplicate { .. }) {
                // What failed may have been set all the same.
                self.retained = !message.payload.is_empty() || matches!(state, State::Failed(..));
            }
            match state {
                State::Stored { prev } => {
                    message.prev = prev;
                    self.last_stored = message.seq;
                }
                State::Free | State::Appending => message.prev = self.last_stored,
                State::Duplicate { epoch, seq } => {
                    // Stored by us, but we never learned of it and so never delivered it.
                    if seq > self.last_stored {
                        self.load = Load::Stale;
                    }
                    let published =
                        v1::Published { epoch, seq, duplicate: true, has_route: true, ..accepted() };
                    out.push(Output::Reply { token, published, targets: Vec::new() });
                    continue;
                }
                State::Failed(code, text) => {
                    out.push(Output::refuse(token, code, text));
                    continue;
                }
            }
            let targets = routing.targets(name, &self.routes, whole);
            let published = v1::Published {
                epoch: message.epoch,
                seq: message.seq,
                // Sessions that are away, but kept, are known to the saver alone.
                has_route: message.stored || !targets.is_empty(),
                ..accepted()
            };
            let reached = if broadcast.is_some() { targets.clone() } else { Vec::new() };
            if !targets.is_empty() {
                out.push(Output::Deliver { to: targets, message, broadcast });
            }
            out.push(Output::Reply { token, published, targets: reached });
        }
        if self.pending.is_empty() {
            // Room for four of them is 2 kB, and most topics are somebody's inbox, where the next message is far away.
            self.pending = VecDeque::new();
        }
        answered
    }
}

fn accepted() -> v1::Published {
    v1::Published { code: PublishCode::Accepted.into(), ..v1::Published::default() }
}
