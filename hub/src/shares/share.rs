//! One share: who gets which message, what is not settled yet, how far the cursors may move. Decisions only, without I/O.
//!
//! Messages wait in the order in which they came in, and go to the members in turn, passing over those that have no
//! room. What a member gives back takes its old place. Stored messages are taken in as far as there is room; the rest
//! stays in the log and is read when there is. A topic's cursor follows its messages as far as all of them are settled.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use carillon_proto::v1;

use crate::registry::message_bytes;

/// A gateway's stream, and the number of the member on it.
pub type MemberId = (u64, u64);

/// Messages read from a log at once.
const READ_LIMIT: u32 = 100;
/// Logs that are read at the same time.
const READS: usize = 4;
/// Topics kept of which all is settled.
const IDLE_TOPICS: usize = 1000;

/// What a share may hold in memory: messages that wait, and that are with members.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub messages: usize,
    pub bytes: usize,
}

/// A message for a member.
#[derive(Debug, PartialEq)]
pub struct Assigned {
    pub to: MemberId,
    pub token: u64,
    pub message: v1::Message,
    /// Another member had it before.
    pub again: bool,
}

/// A log is to be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    pub topic: Arc<str>,
    pub after: u64,
    pub limit: u32,
}

#[derive(Debug)]
struct Held {
    message: v1::Message,
    again: bool,
}

#[derive(Debug)]
struct Seat {
    window: usize,
    unsettled: BTreeMap<u64, Held>,
    /// It has said that it has no room.
    is_busy: bool,
    /// It is in the ring of those that can be given something.
    is_in_turn: bool,
}

impl Seat {
    fn has_room(&self) -> bool {
        !self.is_busy && self.unsettled.len() < self.window
    }
}

#[derive(Debug, Default)]
struct Lane {
    /// seq of the last stored message that was taken in, or that need not be.
    last: u64,
    /// The log has messages after `last`, up to this at least; 0: it has not.
    behind: u64,
    /// What `behind` was when the log was last asked.
    behind_when_asked: u64,
    is_reading: bool,
    is_listed: bool,
    /// What was taken in, by seq, and whether it is settled; from the first that is not.
    open: VecDeque<(u64, bool)>,
    /// The cursor may move to here.
    done: u64,
    moved: bool,
}

impl Lane {
    fn is_idle(&self) -> bool {
        self.open.is_empty() && self.behind == 0 && !self.moved && !self.is_reading
    }
}

/// See the module.
#[derive(Debug)]
pub struct Share {
    limits: Limits,
    seats: HashMap<MemberId, Seat>,
    turn: VecDeque<MemberId>,
    /// By token, which is the order in which they came.
    waiting: BTreeMap<u64, Held>,
    next_token: u64,
    held: usize,
    held_bytes: usize,
    lanes: HashMap<Arc<str>, Lane>,
    /// Topics whose logs are to be read.
    lagging: VecDeque<Arc<str>>,
    reading: usize,
    moved: Vec<Arc<str>>,
    /// Messages that are settled although they come from the log again, by topic.
    settled: HashMap<String, HashSet<u64>>,
    /// Messages that were in no log and found no room.
    pub dropped: u64,
}

impl Share {
    /// `first_token`: greater than any that an earlier home of the share has used.
    pub fn new(limits: Limits, first_token: u64) -> Self {
        Share {
            limits,
            seats: HashMap::new(),
            turn: VecDeque::new(),
            waiting: BTreeMap::new(),
            next_token: first_token,
            held: 0,
            held_bytes: 0,
            lanes: HashMap::new(),
            lagging: VecDeque::new(),
            reading: 0,
            moved: Vec::new(),
            settled: HashMap::new(),
            dropped: 0,
        }
    }

    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub fn members(&self) -> usize {
        self.seats.len()
    }

    /// Messages that wait for a member with room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn join(&mut self, id: MemberId, window: usize) {
        self.leave(id);
        let seat =
            Seat { window: window.max(1), unsettled: BTreeMap::new(), is_busy: false, is_in_turn: false };
        self.seats.insert(id, seat);
        self.line_up(id);
    }

    /// What it has not settled waits for another member.
    pub fn leave(&mut self, id: MemberId) -> bool {
        let Some(seat) = self.seats.remove(&id) else { return false };
        if seat.is_in_turn {
            self.turn.retain(|other| *other != id);
        }
        self.waiting
            .extend(seat.unsettled.into_iter().map(|(token, held)| (token, Held { again: true, ..held })));
        true
    }

    /// The member has room again.
    pub fn ready(&mut self, id: MemberId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.is_busy = false;
            self.line_up(id);
        }
    }

    /// The member is done with a message.
    pub fn done(&mut self, id: MemberId, token: u64) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Some(held) = seat.unsettled.remove(&token) else { return };
        self.line_up(id);
        self.settle(&held.message);
    }

    /// The member has no room for a message: it goes to another, and no further ones to this one until it is `ready`.
    pub fn busy(&mut self, id: MemberId, token: u64) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Some(held) = seat.unsettled.remove(&token) else { return };
        seat.is_busy = true;
        self.waiting.insert(token, held);
    }

    /// A message that was delivered live.
    pub fn offer(&mut self, message: v1::Message) {
        let has_room = self.has_room();
        if !message.stored {
            if has_room {
                self.take_in(message)
            } else {
                self.dropped += 1
            }
            return;
        }
        let topic = self.lane(&message.topic, message.prev);
        let Some(lane) = self.lanes.get_mut(&topic) else { return };
        if message.seq <= lane.last {
            return;
        }
        if lane.behind > 0 || lane.is_reading || !has_room || message.prev > lane.last {
            let seq = message.seq;
            return self.fall_behind(&topic, seq);
        }
        lane.last = message.seq;
        lane.open.push_back((message.seq, false));
        self.take_in_stored(message);
    }

    /// The saver says that a topic's cursor is at `after` and its log goes up to `head`.
    pub fn position(&mut self, topic: &str, after: u64, head: u64) {
        let topic = self.lane(topic, after);
        if self.lanes.get(&topic).is_some_and(|lane| head > lane.last) {
            self.fall_behind(&topic, head);
        }
    }

    /// The logs that are to be read now; each is answered with [`read`](Self::read).
    pub fn reads(&mut self) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        // Nobody to give it to: the log keeps it as well.
        while self.reading < READS && self.has_room() && !self.seats.is_empty() {
            let Some(topic) = self.lagging.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&topic) else { continue };
            (lane.is_listed, lane.is_reading) = (false, true);
            lane.behind_when_asked = lane.behind;
            self.reading += 1;
            let room = self.limits.messages.saturating_sub(self.held);
            let limit = u32::try_from(room).unwrap_or(READ_LIMIT).clamp(1, READ_LIMIT);
            wanted.push(Wanted { after: lane.last, topic, limit });
        }
        wanted
    }

    /// What the log has after `last`; None: it could not be read, and is to be tried again.
    pub fn read(&mut self, topic: &Arc<str>, reply: Option<v1::ReadReply>) {
        let Some(lane) = self.lanes.get_mut(topic).filter(|lane| lane.is_reading) else { return };
        lane.is_reading = false;
        self.reading -= 1;
        let mut came = Vec::new();
        if let Some(reply) = reply {
            let head = reply.head.map_or(0, |head| head.seq);
            for message in reply.messages {
                if message.seq > lane.last {
                    lane.last = message.seq;
                    lane.open.push_back((message.seq, false));
                    came.push(message);
                }
            }
            lane.last = lane.last.max(reply.next);
            if lane.last >= head && came.is_empty() {
                // The end of the log: what we knew of beyond it when we asked has been trimmed away.
                lane.last = lane.last.max(lane.behind_when_asked);
            }
            lane.behind = lane.behind.max(head);
            if lane.last >= lane.behind {
                lane.behind = 0;
            }
            if lane.open.is_empty() && lane.last > lane.done {
                // Nothing was left to give to anyone (expired, trimmed): the cursor goes past it.
                lane.done = lane.last;
                if !std::mem::replace(&mut lane.moved, true) {
                    self.moved.push(topic.clone());
                }
            }
        }
        if lane.behind > 0 && !std::mem::replace(&mut lane.is_listed, true) {
            self.lagging.push_back(topic.clone());
        }
        for message in came {
            self.take_in_stored(message);
        }
    }

    /// Gives what waits to members, in turn.
    pub fn assign(&mut self, now_ms: u64, out: &mut Vec<Assigned>) {
        while let Some((&token, held)) = self.waiting.first_key_value() {
            if held.message.expires_ms != 0 && held.message.expires_ms <= now_ms {
                if let Some((_, held)) = self.waiting.pop_first() {
                    self.settle(&held.message);
                }
                continue;
            }
            let Some(id) = self.next_in_turn() else { return };
            let Some(seat) = self.seats.get_mut(&id) else { continue };
            let Some((_, held)) = self.waiting.pop_first() else { return };
            out.push(Assigned { to: id, token, message: held.message.clone(), again: held.again });
            seat.unsettled.insert(token, held);
            self.line_up(id);
        }
    }

    /// The cursors that may move, since it was asked last.
    pub fn acks(&mut self) -> Vec<v1::AckPosition> {
        let mut positions = Vec::with_capacity(self.moved.len());
        for topic in std::mem::take(&mut self.moved) {
            let Some(lane) = self.lanes.get_mut(&topic) else { continue };
            lane.moved = false;
            positions.push(v1::AckPosition { topic: topic.to_string(), seq: lane.done });
        }
        positions
    }

    /// What is settled beyond the cursors, because something before it is not.
    pub fn settled_beyond(&self) -> Vec<v1::SettledBeyond> {
        let beyond = self.lanes.iter().map(|(topic, lane)| v1::SettledBeyond {
            topic: topic.to_string(),
            seqs: lane.open.iter().filter(|(_, is_settled)| *is_settled).map(|(seq, _)| *seq).collect(),
        });
        let unread = self.settled.iter().map(|(topic, seqs)| v1::SettledBeyond {
            topic: topic.clone(),
            seqs: seqs.iter().copied().collect(),
        });
        beyond.chain(unread).filter(|beyond| !beyond.seqs.is_empty()).collect()
    }

    /// An earlier home has said this of what the logs have.
    pub fn skip(&mut self, beyond: Vec<v1::SettledBeyond>) {
        for one in beyond {
            self.settled.entry(one.topic).or_default().extend(one.seqs);
        }
    }

    /// These were not moved after all: they are among the next.
    pub fn unacked(&mut self, positions: &[v1::AckPosition]) {
        for position in positions {
            let Some((topic, _)) = self.lanes.get_key_value(position.topic.as_str()) else { continue };
            let topic = topic.clone();
            if self.lanes.get_mut(&topic).is_some_and(|lane| !std::mem::replace(&mut lane.moved, true)) {
                self.moved.push(topic);
            }
        }
    }

    fn has_room(&self) -> bool {
        self.held < self.limits.messages && self.held_bytes < self.limits.bytes
    }

    /// The topic's lane, made if there is none: all stored messages up to `last` are dealt with then.
    fn lane(&mut self, topic: &str, last: u64) -> Arc<str> {
        if let Some((topic, _)) = self.lanes.get_key_value(topic) {
            return topic.clone();
        }
        if self.lanes.len() >= IDLE_TOPICS {
            // Of a topic without a lane everything before the next message is settled, and the saver has the cursor.
            self.lanes.retain(|_, lane| !lane.is_idle());
        }
        let topic: Arc<str> = topic.into();
        self.lanes.insert(topic.clone(), Lane { last, done: last, ..Lane::default() });
        topic
    }

    fn fall_behind(&mut self, topic: &Arc<str>, seq: u64) {
        let Some(lane) = self.lanes.get_mut(topic) else { return };
        lane.behind = lane.behind.max(seq);
        if !lane.is_reading && !std::mem::replace(&mut lane.is_listed, true) {
            self.lagging.push_back(topic.clone());
        }
    }

    fn take_in_stored(&mut self, message: v1::Message) {
        if let Some(settled) = self.settled.get_mut(&message.topic)
            && settled.remove(&message.seq)
        {
            if settled.is_empty() {
                self.settled.remove(&message.topic);
            }
            return self.mark_settled(&message.topic, message.seq);
        }
        self.take_in(message);
    }

    fn take_in(&mut self, message: v1::Message) {
        self.held += 1;
        self.held_bytes += message_bytes(&message);
        self.waiting.insert(self.next_token, Held { message, again: false });
        self.next_token += 1;
    }

    /// A message is dealt with.
    fn settle(&mut self, message: &v1::Message) {
        self.held -= 1;
        self.held_bytes -= message_bytes(message);
        if message.stored {
            self.mark_settled(&message.topic, message.seq);
        }
    }

    fn mark_settled(&mut self, topic: &str, seq: u64) {
        let Some((topic, _)) = self.lanes.get_key_value(topic) else { return };
        let topic = topic.clone();
        let Some(lane) = self.lanes.get_mut(&topic) else { return };
        if let Ok(place) = lane.open.binary_search_by_key(&seq, |(seq, _)| *seq) {
            lane.open[place].1 = true;
        }
        let before = lane.done;
        while let Some((seq, true)) = lane.open.front() {
            lane.done = *seq;
            lane.open.pop_front();
        }
        if lane.done > before && !std::mem::replace(&mut lane.moved, true) {
            self.moved.push(topic);
        }
    }

    fn line_up(&mut self, id: MemberId) {
        if let Some(seat) = self.seats.get_mut(&id)
            && seat.has_room()
            && !std::mem::replace(&mut seat.is_in_turn, true)
        {
            self.turn.push_back(id);
        }
    }

    fn next_in_turn(&mut self) -> Option<MemberId> {
        while let Some(id) = self.turn.pop_front() {
            let Some(seat) = self.seats.get_mut(&id) else { continue };
            seat.is_in_turn = false;
            if seat.has_room() {
                return Some(id);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
