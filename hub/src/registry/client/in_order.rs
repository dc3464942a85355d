//! The order of what is published to a topic, while its owner changes or cannot be had: what is behind a message waits for
//! it. No I/O.
//!
//! A topic's messages go out one behind the other, without waiting for answers, as long as one way leads to its owner: the
//! same epoch of the slot, over the same connection, to an owner that has accepted something in that epoch. What would
//! go another way waits until all that is under way has been answered. Of what has come back, the first is tried alone,
//! and the rest follows when that is settled.
//!
//! What was under way already when a message came back is beyond recall: if the same owner accepts it all the same, it is
//! before (a store that fails for one message and not for the next). One that has lost the slot accepts none of it, and
//! a slot does not come back to it before we have heard that it went: that takes two hand-overs.
//!
//! Bounded by whoever publishes: it counts what is [`held`](InOrder::held) and what is under way.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

/// Between two tries of what has come back: grows from the first to the second, jittered.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// How a message gets to the owner of its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// Of the slot; nobody has epoch 0.
    pub epoch: u64,
    /// Which one, of all that there have been to its address.
    pub connection: u64,
    /// The owner has accepted something in this epoch: it knows that it is the owner.
    pub accepts: bool,
}

impl Way {
    fn is_same(self, other: Way) -> bool {
        (self.epoch, self.connection) == (other.epoch, other.connection)
    }
}

pub(super) struct InOrder<C> {
    next_ticket: u64,
    /// By topic: what is under way.
    sent: HashMap<Box<str>, Sent>,
    /// By topic: what waits.
    lanes: HashMap<Box<str>, Lane<C>>,
    held: usize,
}

/// Unanswered messages of one topic.
struct Sent {
    count: usize,
    /// That of all of them.
    way: Way,
}

/// By ticket, which is the order in which they came.
struct Lane<C> {
    waiting: BTreeMap<u64, C>,
    /// Something has come back; None: only the way has changed.
    again: Option<Again>,
}

struct Again {
    /// The one that is being tried.
    trying: Option<u64>,
    at: Instant,
    backoff: Duration,
}

impl<C> InOrder<C> {
    pub fn new() -> Self {
        InOrder { next_ticket: 0, sent: HashMap::new(), lanes: HashMap::new(), held: 0 }
    }

    /// How many wait.
    pub fn held(&self) -> usize {
        self.held
    }

    /// A message: to be sent now, with its ticket, or it waits.
    pub fn begin(&mut self, topic: &str, call: C, way: Way) -> Option<(u64, C)> {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        if let Some(lane) = self.lanes.get_mut(topic) {
            lane.waiting.insert(ticket, call);
            self.held += 1;
            return None;
        }
        match self.sent.get_mut(topic) {
            Some(sent) if way.accepts && way.is_same(sent.way) => sent.count += 1,
            Some(_) => {
                let lane = Lane { waiting: BTreeMap::from([(ticket, call)]), again: None };
                self.lanes.insert(topic.into(), lane);
                self.held += 1;
                return None;
            }
            None => drop(self.sent.insert(topic.into(), Sent { count: 1, way })),
        }
        Some((ticket, call))
    }

    /// One that was sent is accepted, refused or of no more interest. What waits may follow: [`next`](Self::next).
    pub fn settled(&mut self, topic: &str, ticket: u64) {
        self.answered(topic);
        if let Some(lane) = self.lanes.get_mut(topic)
            && lane.again.as_ref().is_some_and(|again| again.trying == Some(ticket))
        {
            lane.again = None;
        }
    }

    /// One that was sent is to be tried again, and everything behind it waits. After a pause, unless the owner `is_another` by
    /// now.
    pub fn failed(&mut self, topic: &str, ticket: u64, call: C, now: Instant, is_another: bool) {
        self.answered(topic);
        let lane =
            self.lanes.entry(topic.into()).or_insert_with(|| Lane { waiting: BTreeMap::new(), again: None });
        let again = lane.again.get_or_insert_with(|| Again {
            trying: None,
            at: now + jittered(BACKOFF.0),
            backoff: BACKOFF.0,
        });
        if again.trying == Some(ticket) {
            again.trying = None;
            again.backoff = (again.backoff * 2).min(BACKOFF.1);
            again.at = now + jittered(again.backoff);
        }
        if is_another {
            (again.at, again.backoff) = (now, BACKOFF.0);
        }
        lane.waiting.insert(ticket, call);
        self.held += 1;
    }

    fn answered(&mut self, topic: &str) {
        if let Some(sent) = self.sent.get_mut(topic) {
            sent.count -= 1;
            if sent.count == 0 {
                self.sent.remove(topic);
            }
        }
    }

    /// What of a topic may go now; call it until there is nothing.
    pub fn next(&mut self, topic: &str, way: Way, now: Instant) -> Option<(u64, C)> {
        let lane = self.lanes.get_mut(topic)?;
        let sent = self.sent.get_mut(topic);
        if lane.waiting.is_empty() {
            // The one that is tried decides for what comes meanwhile.
            if lane.again.is_none() || sent.is_none() {
                self.lanes.remove(topic);
            }
            return None;
        }
        let goes = match (&lane.again, &sent) {
            (Some(again), None) => again.at <= now,
            // An earlier one may still come back.
            (Some(_), Some(_)) => false,
            (None, None) => true,
            (None, Some(sent)) => way.accepts && way.is_same(sent.way),
        };
        if !goes {
            return None;
        }
        let (ticket, call) = lane.waiting.pop_first()?;
        self.held -= 1;
        if let Some(again) = &mut lane.again {
            again.trying = Some(ticket);
        } else if lane.waiting.is_empty() {
            self.lanes.remove(topic);
        }
        match sent {
            Some(sent) => sent.count += 1,
            None => drop(self.sent.insert(topic.into(), Sent { count: 1, way })),
        }
        Some((ticket, call))
    }

    /// What [`next`](Self::next) gave is not sent: nobody wants it any more.
    pub fn dropped(&mut self, topic: &str, ticket: u64) {
        self.answered(topic);
        if let Some(again) = self.lanes.get_mut(topic).and_then(|lane| lane.again.as_mut())
            && again.trying == Some(ticket)
        {
            again.trying = None;
        }
    }

    /// What was refused because a slot moves may be taken now.
    pub fn hurry(&mut self, now: Instant) {
        for again in self.lanes.values_mut().filter_map(|lane| lane.again.as_mut()) {
            (again.at, again.backoff) = (now, BACKOFF.0);
        }
    }

    /// Topics of which something is due to be tried again.
    pub fn due(&self, now: Instant) -> Vec<Box<str>> {
        let due = self.lanes.iter().filter(|(topic, lane)| {
            lane.again.as_ref().is_none_or(|again| again.at <= now) && !self.sent.contains_key(*topic)
        });
        due.map(|(topic, _)| topic.clone()).collect()
    }

    /// Drops what waits and nobody wants any more.
    pub fn give_up(&mut self, is_over: impl Fn(&C) -> bool) {
        for lane in self.lanes.values_mut() {
            let before = lane.waiting.len();
            lane.waiting.retain(|_, call| !is_over(call));
            self.held -= before - lane.waiting.len();
        }
        // A lane without anything that waits stays while one of it is tried.
        let sent = &self.sent;
        self.lanes.retain(|topic, lane| !lane.waiting.is_empty() || sent.contains_key(topic));
    }
}

fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.5..1.5))
}

#[cfg(test)]
mod tests;
