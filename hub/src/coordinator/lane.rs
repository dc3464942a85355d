//! One topic on its way to a webhook: what is queued, what has to be read from the log, when to try again.
//! Decisions only; nothing here waits.

use std::collections::VecDeque;

use carillon_proto::v1;

/// What a batch may hold.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimits {
    pub events: usize,
    pub bytes: usize,
}

#[derive(Debug, Default)]
pub struct Lane {
    /// seq of the last stored message that was queued here; posted ones too.
    last: u64,
    /// The log has messages after `last` that are not queued.
    gap: bool,
    /// seq of the newest stored message that was left to the log.
    left: u64,
    /// What `left` was when the log was last asked.
    left_when_asked: u64,
    queue: VecDeque<v1::Message>,
    /// Failed attempts of what is first in the queue.
    pub failures: u32,
    /// It is ready, under way, or waits for its next attempt: not to be made ready again.
    pub busy: bool,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    Queued,
    /// It is in the log, and will be read from there.
    Left,
    /// It was queued before.
    Known,
    /// It is in no log, and there is no room.
    Dropped,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Nothing,
    Read { after: u64 },
    Post(Vec<v1::Message>),
}

impl Lane {
    /// All stored messages up to `last` are dealt with.
    pub fn new(last: u64) -> Self {
        Lane { last, ..Lane::default() }
    }

    /// How many messages are queued.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Nothing is to be done, and nothing would be forgotten with it: the saver has the cursor.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.gap && !self.busy
    }

    /// A message that was delivered live.
    pub fn offer(&mut self, message: v1::Message, room: bool) -> Offered {
        if !message.stored {
            if !room {
                return Offered::Dropped;
            }
            self.queue.push_back(message);
            return Offered::Queued;
        }
        if message.seq <= self.last {
            return Offered::Known;
        }
        if self.gap || !room || message.prev > self.last {
            self.gap = true;
            self.left = self.left.max(message.seq);
            return Offered::Left;
        }
        self.last = message.seq;
        self.queue.push_back(message);
        Offered::Queued
    }

    /// The saver says that the log goes up to `head`.
    pub fn behind(&mut self, head: u64) {
        if head > self.last {
            self.gap = true;
            self.left = self.left.max(head);
        }
    }

    pub fn next(&mut self, limits: BatchLimits) -> Step {
        if self.queue.is_empty() {
            self.left_when_asked = self.left;
            return if self.gap { Step::Read { after: self.last } } else { Step::Nothing };
        }
        let mut bytes = 0;
        let fitting =
            self.queue.iter().take(limits.events.max(1)).enumerate().take_while(|(place, message)| {
                bytes += message.payload.len();
                *place == 0 || bytes <= limits.bytes
            });
        Step::Post(fitting.map(|(_, message)| message.clone()).collect())
    }

    /// What the log had after `last`.
    pub fn read(&mut self, reply: v1::ReadReply) {
        let head = reply.head.map_or(0, |head| head.seq);
        for message in reply.messages {
            if message.seq > self.last {
                self.last = message.seq;
                self.queue.push_back(message);
            }
        }
        self.last = self.last.max(reply.next);
        // What was left to the log since it was asked may be missing in the answer; what was left before may not.
        let since = if self.left > self.left_when_asked { self.left } else { 0 };
        self.gap = self.last < head.max(since);
    }

    /// The webhook has taken the first `count` messages; gives the seq up to which the cursor may move.
    pub fn posted(&mut self, count: usize) -> Option<u64> {
        self.failures = 0;
        let count = count.min(self.queue.len());
        self.queue.drain(..count).filter(|message| message.stored).map(|message| message.seq).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BatchLimits = BatchLimits { events: 2, bytes: 100 };

    fn stored(seq: u64, prev: u64) -> v1::Message {
        v1::Message { seq, prev, stored: true, ..v1::Message::default() }
    }

    fn seqs(step: Step) -> Vec<u64> {
        match step {
            Step::Post(messages) => messages.iter().map(|message| message.seq).collect(),
            other => panic!("not a post: {other:?}"),
        }
    }

    #[test]
    fn live_messages_are_posted_in_batches() {
        let mut lane = Lane::new(0);
        for seq in 1..=3 {
            assert_eq!(lane.offer(stored(seq, seq - 1), true), Offered::Queued);
        }
        assert_eq!(lane.offer(stored(2, 1), true), Offered::Known);
        assert_eq!(seqs(lane.next(LIMITS)), [1, 2]);
        assert_eq!(lane.posted(2), Some(2));
        assert_eq!(seqs(lane.next(LIMITS)), [3]);
        assert_eq!(lane.posted(1), Some(3));
        assert_eq!(lane.next(LIMITS), Step::Nothing);
        assert!(lane.is_idle());
    }

    #[test]
    fn a_gap_is_read_from_the_log_before_anything_newer() {
        let mut lane = Lane::new(5);
        assert_eq!(lane.offer(stored(8, 7), true), Offered::Left);
        assert_eq!(lane.next(LIMITS), Step::Read { after: 5 });
        // After the log was read, before the answer is here.
        assert_eq!(lane.offer(stored(9, 8), true), Offered::Left);
        lane.read(v1::ReadReply {
            messages: vec![stored(6, 5), stored(7, 6), stored(8, 7)],
            head: Some(v1::Head { seq: 8, ..v1::Head::default() }),
            next: 8,
        });
        assert_eq!(seqs(lane.next(LIMITS)), [6, 7]);
        lane.posted(3);
        assert_eq!(lane.next(LIMITS), Step::Read { after: 8 });
        lane.read(v1::ReadReply {
            messages: vec![stored(9, 8)],
            head: Some(v1::Head { seq: 9, ..v1::Head::default() }),
            next: 9,
        });
        lane.posted(1);
        assert_eq!(lane.next(LIMITS), Step::Nothing);
    }

    #[test]
    fn a_log_that_lost_what_was_announced_is_not_read_for_ever() {
        let mut lane = Lane::new(5);
        lane.behind(8);
        assert_eq!(lane.next(LIMITS), Step::Read { after: 5 });
        lane.read(v1::ReadReply::default());
        assert_eq!(lane.next(LIMITS), Step::Nothing);
    }

    #[test]
    fn without_room_stored_messages_are_left_to_the_log_and_others_dropped() {
        let mut lane = Lane::new(0);
        assert_eq!(lane.offer(stored(1, 0), false), Offered::Left);
        let unstored = v1::Message { seq: 2, ..v1::Message::default() };
        assert_eq!(lane.offer(unstored.clone(), false), Offered::Dropped);
        assert_eq!(lane.offer(unstored, true), Offered::Queued);
        assert_eq!(seqs(lane.next(LIMITS)), [2]);
        assert_eq!(lane.posted(1), None);
        assert_eq!(lane.next(LIMITS), Step::Read { after: 0 });
    }

    #[test]
    fn a_batch_stops_at_its_bytes_but_holds_one_at_least() {
        let mut lane = Lane::new(0);
        for seq in 1..=2 {
            let payload = vec![0; 200].into();
            lane.offer(v1::Message { payload, ..stored(seq, seq - 1) }, true);
        }
        assert_eq!(seqs(lane.next(LIMITS)), [1]);
    }
}
