//! What a topic needs before it can be published to: its head, and what its log has that was never delivered. And
//! forgetting topics again.

use carillon_proto::v1::{self, saver_reply, saver_request};

use super::topic::Load;
use super::{AskError, Asked, Core, Fence, Output, RETRY_MS};

/// Topics whose heads are asked for in one request.
const HEADS_AT_ONCE: usize = 512;
/// Messages read at once when a topic's log may have more than was delivered.
const RECOVER_AT_ONCE: u32 = 1000;

impl Core {
    /// Begins what makes a topic ready, if it can be begun now.
    pub(super) fn load(&mut self, number: u32, name: &str) {
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

    pub(super) fn load_cold(&mut self) {
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

    pub(super) fn heads_read(
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
                    topic.retained = head.retained;
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
    pub(super) fn fail_waiting(&mut self, number: u32, name: &str, error: AskError, retry_at: Option<u64>) {
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

    /// What the log has after the last message that was delivered.
    pub(super) fn recovered(
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
            topic.retained |= message.retain;
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

    /// While there are too many idle topics: forgets those of one slot that were not used since it was last looked at.
    pub(super) fn evict(&mut self) {
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
