//! Topics on which a device is behind: their logs are read, as far as its window has room, until it has caught up.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use carillon_proto::v1;

use super::Shard;
use super::conn::{Behind, Waiting};
use super::topics::{SubOptions, TopicId};
use crate::delivery::Delivery;
use crate::event::{ConnId, Granted};
use crate::link::SaverFailure;

/// Messages read from a log at a time for one device.
const READ_LIMIT: u32 = 100;

impl Shard {
    pub(super) fn fall_behind(&mut self, index: u32, topic: &Arc<str>, after: u64, target: u64, sent: u64) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        if let Some(behind) = session.behind_on(topic) {
            behind.target = behind.target.max(target);
            return;
        }
        session.behind.get_or_insert_default().push(Behind {
            topic: topic.clone(),
            after,
            target,
            asked: 0,
            sent,
            is_reading: false,
            has_failed: false,
            queue: VecDeque::new(),
            held: VecDeque::new(),
        });
    }

    /// Sends what waits, as far as there is room, and asks for more of the logs.
    pub(super) fn pump(&mut self, index: u32) {
        if !self.resend(index) {
            return;
        }
        loop {
            let Some(conn) = self.conns.get_mut(index as usize) else { return };
            let Some(session) = &mut conn.session else { return };
            if session.waiting.is_none() || !self.has_room(index) {
                break;
            }
            let Some(session) = &mut self.conns[index as usize].session else { return };
            match session.waiting.as_mut().and_then(|waiting| waiting.pop_front()) {
                Some(Waiting { delivery, target, retain }) => {
                    self.send_waiting(index, &target, &delivery, retain);
                }
                None => {
                    session.waiting = None;
                    break;
                }
            }
        }
        let mut at = 0;
        loop {
            let Some(session) = self.conns.get(index as usize).and_then(|conn| conn.session.as_ref()) else {
                return;
            };
            let Some(behind) = session.behind.as_ref().and_then(|behind| behind.get(at)) else { break };
            let topic = behind.topic.clone();
            if self.pump_topic(index, at, &topic) {
                let Some(session) = &mut self.conns[index as usize].session else { return };
                let Some(all) = &mut session.behind else { return };
                let caught_up = all.remove(at);
                if all.is_empty() {
                    session.behind = None;
                }
                if let Some(target) = self.target(index, &caught_up.topic) {
                    for delivery in caught_up.held {
                        self.offer(index, &target, &delivery);
                    }
                }
            } else {
                at += 1;
            }
        }
        self.members_have_room(index);
    }

    /// True when the topic is caught up with (or nobody wants it any more).
    pub(super) fn pump_topic(&mut self, index: u32, at: usize, topic: &Arc<str>) -> bool {
        let Some(target) = self.target(index, topic).filter(|target| target.options.qos > 0) else {
            return true;
        };
        loop {
            let has_room = self.has_room(index);
            let id = self.id(index);
            let Some(session) = &mut self.conns[index as usize].session else { return false };
            let room = usize::from(session.window).saturating_sub(session.in_flight());
            let publisher = session.behind.as_ref().and_then(|behind| behind.get(at)?.queue.front());
            let is_publisher = publisher.is_some_and(|delivery| session.is_publisher(delivery.publisher));
            let Some(behind) = session.behind.as_mut().and_then(|behind| behind.get_mut(at)) else {
                return true;
            };
            if let Some(delivery) = behind.queue.front() {
                if !has_room {
                    return false;
                }
                let delivery = delivery.clone();
                behind.queue.pop_front();
                let (seq, dup) = (delivery.message.seq, delivery.message.seq <= behind.sent);
                let is_due = self.last(index, &target, topic).is_none_or(|last| seq > last);
                if delivery.is_expired(self.now_ms) || (target.options.no_local && is_publisher) {
                    self.set_last(index, &target, topic, seq);
                    self.settle(index, Some((topic.clone(), seq)));
                } else if is_due {
                    self.send_stored(index, &target, &delivery, dup);
                }
                continue;
            }
            if behind.is_reading || behind.has_failed {
                return false;
            }
            if behind.after >= behind.target {
                let after = behind.after;
                self.set_last(index, &target, topic, after);
                return true;
            }
            if !has_room {
                return false;
            }
            behind.is_reading = true;
            behind.asked = behind.target;
            let after = behind.after;
            self.link.metrics().log_reads.inc();
            self.link.read(id, topic.clone(), after, (room as u32).clamp(1, READ_LIMIT));
            return false;
        }
    }

    /// The log's answer.
    pub(super) fn have_read(
        &mut self,
        id: ConnId,
        topic: &Arc<str>,
        mut result: Result<v1::ReadReply, SaverFailure>,
    ) {
        let Some(index) = self.find(id) else { return };
        if self.have_read_again(index, topic, &mut result) {
            return;
        }
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let Some(behind) = session.behind_on(topic) else { return };
        behind.is_reading = false;
        match result {
            Ok(reply) => {
                let head = reply.head.as_ref().map_or(0, |head| head.seq);
                behind.after = behind.after.max(reply.next);
                if reply.messages.is_empty() && behind.after >= head {
                    // The end of the log: what we were told of beyond it has been trimmed away. What came by while it was
                    // read may be newer than the answer.
                    behind.after = behind.after.max(behind.asked);
                } else {
                    behind.target = behind.target.max(head);
                }
                behind
                    .queue
                    .extend(reply.messages.into_iter().map(|message| Arc::new(Delivery::new(message))));
                self.pump(index);
            }
            Err(error) => {
                tracing::debug!(%topic, %error, "log could not be read, trying again");
                behind.has_failed = true;
                self.retry.push((id.index, id.generation));
            }
        }
    }

    pub(super) fn retry_behind(&mut self, index: u32) {
        self.retry_resending(index);
        if let Some(session) = &mut self.conns[index as usize].session {
            for behind in session.behind.iter_mut().flat_map(|behind| behind.iter_mut()) {
                behind.has_failed = false;
            }
            self.pump(index);
        }
    }

    /// A new subscription catches up with what its log has for it.
    pub(super) fn catch_up_after(
        &mut self,
        index: u32,
        topic: TopicId,
        options: SubOptions,
        granted: &Granted,
        passed: &HashMap<Arc<str>, (u64, u64)>,
    ) {
        if options.qos == 0 || !self.conns.contains(index as usize) {
            return;
        }
        let name = self.topics.get(topic).name.clone();
        if self.topics.get(topic).is_wild() {
            for backlog in &granted.backlog {
                let name: Arc<str> = backlog.topic.as_str().into();
                if let Some(target) = self.target(index, &name)
                    && target.exact.is_none()
                {
                    self.set_last(index, &target, &name, backlog.after);
                    self.fall_behind(index, &name, backlog.after, backlog.head, backlog.sent);
                }
            }
            for (name, (prev, seq)) in passed {
                let Some(target) = self.target(index, name).filter(|target| target.exact.is_none()) else {
                    continue;
                };
                if self.last(index, &target, name).is_none() {
                    self.set_last(index, &target, name, *prev);
                }
                let last = self.last(index, &target, name).unwrap_or(*prev);
                if *seq > last {
                    self.fall_behind(index, name, last, *seq, 0);
                }
            }
            return;
        }
        let Some(target) = self.target(index, &name) else { return };
        let last = self.last(index, &target, &name).unwrap_or(granted.position);
        let head = self.link.routes().last(&name);
        if head > last {
            self.fall_behind(index, &name, last, head, granted.sent);
        }
    }

    /// The owner has come back, and the log has grown meanwhile.
    pub(super) fn topic_is_behind(&mut self, name: &Arc<str>, head: u64) {
        let Some(topic) = self.topics.find(name) else { return };
        for conn in self.receivers(Some(topic), &[]) {
            let Some(target) = self.target(conn, name) else { continue };
            let last = self.last(conn, &target, name).unwrap_or(head);
            if target.options.qos > 0 && last < head {
                self.fall_behind(conn, name, last, head, 0);
                self.pump(conn);
            }
        }
    }
}
