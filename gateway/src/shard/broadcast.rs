//! A broadcast: one message to many subscribers at a given rate, so that a push is not an attack on whoever answers it.
//!
//! Later messages on the topic wait behind it, because a topic has one order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carillon_proto::v1::broadcast_control::State;
use smallvec::SmallVec;

use super::Shard;
use crate::delivery::Delivery;

/// Sends of one round when the rate is unlimited.
const ROUND_MAX: usize = 1000;
/// A job may be ahead of its rate by this much after a pause of the thread.
const BURST: Duration = Duration::from_millis(100);
/// Between two reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Messages that wait behind a job.
const WAITING_MAX: usize = 10_000;

pub struct Job {
    name: Arc<str>,
    delivery: Arc<Delivery>,
    /// Subscribers when it came, by index and generation; served from the front.
    receivers: Vec<(u32, u32)>,
    next: usize,
    state: State,
    rate_per_second: f64,
    credit: f64,
    advanced: Instant,
    reported: Instant,
    waiting: VecDeque<Arc<Delivery>>,
}

impl Job {
    pub(super) fn delivery(&self) -> &Arc<Delivery> {
        &self.delivery
    }

    /// Messages that wait for its end.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Arc<Delivery>> {
        self.waiting.iter()
    }

    /// Has it this connection still before it?
    pub(super) fn is_due_to(&self, index: u32, generation: u32) -> bool {
        // Receivers are in the order of their indices.
        self.receivers[self.next..].binary_search(&(index, generation)).is_ok()
    }
}

impl Shard {
    pub(super) fn broadcast(&mut self, name: Arc<str>, delivery: Arc<Delivery>) {
        let mut wild = SmallVec::new();
        self.topics.wild_matching(&delivery.topic, &mut wild);
        let exact = self.topics.find(&delivery.topic);
        self.hold_for_parked(exact, &wild, &delivery);
        if delivery.message.stored {
            for &filter in &wild {
                let message = &delivery.message;
                self.topics.note_passed(filter, &delivery.topic, message.prev, message.seq);
            }
        }
        let receivers: Vec<(u32, u32)> = self
            .receivers(exact, &wild)
            .into_iter()
            .map(|index| (index, self.conns[index as usize].generation))
            .collect();
        self.link.broadcast_progress(&name, self.index, receivers.len() as u64, 0);
        if receivers.is_empty() {
            return;
        }
        let now = Instant::now();
        self.jobs.push(Job {
            name,
            delivery,
            receivers,
            next: 0,
            state: State::Unspecified,
            rate_per_second: 0.0,
            credit: 0.0,
            advanced: now,
            reported: now,
            waiting: VecDeque::new(),
        });
    }

    pub(super) fn broadcast_rate(&mut self, name: &str, state: State, rate_per_second: f64) {
        let Some(at) = self.jobs.iter().position(|job| *job.name == *name) else { return };
        let job = &mut self.jobs[at];
        (job.state, job.rate_per_second) = (state, rate_per_second);
        job.advanced = Instant::now();
        if state == State::Cancel {
            let job = self.jobs.remove(at);
            self.cancel(&job);
            self.finish(job);
        }
    }

    /// True: the message is kept until the job before it on its topic is done.
    pub(super) fn waits_for_job(&mut self, delivery: &Arc<Delivery>) -> bool {
        // The last of them: several jobs on one topic follow each other.
        let Some(job) = self.jobs.iter_mut().rev().find(|job| job.delivery.topic == delivery.topic) else {
            return false;
        };
        if job.waiting.len() < WAITING_MAX {
            job.waiting.push_back(delivery.clone());
        } else {
            // Whoever needs it finds it in the log, at the gap.
            self.counts.dropped_slow += 1;
        }
        true
    }

    pub(super) fn advance_jobs(&mut self, present: Instant) {
        let mut at = 0;
        while at < self.jobs.len() {
            let topic = self.jobs[at].delivery.topic.clone();
            let is_first = self.jobs[..at].iter().all(|job| job.delivery.topic != topic);
            if is_first {
                self.advance_job(at, present);
            }
            if self.jobs[at].next >= self.jobs[at].receivers.len() {
                let job = self.jobs.remove(at);
                let total = job.receivers.len() as u64;
                self.link.broadcast_progress(&job.name, self.index, total, total);
                self.finish(job);
            } else {
                at += 1;
            }
        }
    }

    fn advance_job(&mut self, at: usize, present: Instant) {
        let job = &mut self.jobs[at];
        if job.state != State::Run {
            job.advanced = present;
            return;
        }
        let elapsed = present.duration_since(job.advanced).as_secs_f64();
        job.advanced = present;
        let budget = if job.rate_per_second > 0.0 {
            let burst = (job.rate_per_second * BURST.as_secs_f64()).max(1.0);
            job.credit = (job.credit + elapsed * job.rate_per_second).min(burst);
            let whole = job.credit.floor();
            job.credit -= whole;
            whole as usize
        } else {
            ROUND_MAX
        };
        let until = (job.next + budget).min(job.receivers.len());
        let delivery = job.delivery.clone();
        let due: Vec<(u32, u32)> = job.receivers[job.next..until].to_vec();
        job.next = until;
        let (name, done, total) = (job.name.clone(), until as u64, job.receivers.len() as u64);
        let reports = present.duration_since(job.reported) >= REPORT_INTERVAL && done < total;
        if reports {
            job.reported = present;
        }
        for (index, generation) in due {
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation)
                && let Some(target) = self.target(index, &delivery.topic)
            {
                self.offer(index, &target, &delivery);
            }
        }
        if reports {
            self.link.broadcast_progress(&name, self.index, total, done);
        }
    }

    /// Those that have not got it are not to get it from the log either when the next message comes.
    fn cancel(&mut self, job: &Job) {
        let message = &job.delivery.message;
        if !message.stored {
            return;
        }
        for &(index, generation) in &job.receivers[job.next..] {
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation)
                && let Some(target) = self.target(index, &job.delivery.topic)
                && target.options.qos > 0
            {
                // Who still has something before it to get reads the log, and finds this one there too.
                let topic = &job.delivery.topic;
                let session = self.conns[index as usize].session.as_mut();
                let is_behind = session.is_some_and(|session| session.behind_on(topic).is_some());
                if !is_behind && self.last(index, &target, topic).is_none_or(|last| last >= message.prev) {
                    self.set_last(index, &target, topic, message.seq);
                }
            }
        }
    }

    fn finish(&mut self, job: Job) {
        for delivery in job.waiting {
            self.deliver(&delivery);
        }
    }
}
