//! One broadcast job: its shares of the rate, its progress, its end. Decisions only; nothing here waits.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_proto::v1::{self, broadcast_control, broadcast_job};

use crate::registry::core::Receiver;

/// A gateway's share changes by less than this: it is not told.
const SHARE_TOLERANCE: f64 = 0.01;

#[derive(Debug)]
pub struct Job {
    /// As it is shown; `total` and `done` are computed from the parts.
    shown: v1::BroadcastJob,
    /// By gateway instance.
    parts: BTreeMap<Arc<str>, Part>,
    /// It differs from its durable record.
    pub dirty: bool,
}

#[derive(Debug, Default)]
struct Part {
    /// None: not attached.
    receiver: Option<Receiver>,
    total: Option<u64>,
    done: u64,
    finished: bool,
    /// What it was told last.
    told: Option<(broadcast_control::State, f64)>,
}

/// What a gateway is to be told.
pub type Told = (Receiver, broadcast_control::State, f64);

/// Why a job cannot be controlled so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    #[error("the job has ended: it is {0}")]
    Ended(&'static str),
    #[error("the state must be RUN, PAUSE or CANCEL")]
    NoState,
}

impl Job {
    pub fn new(id: &str, topic: &str, rate_per_second: f64, now_ms: u64) -> Self {
        let shown = v1::BroadcastJob {
            id: id.to_owned(),
            topic: topic.to_owned(),
            state: broadcast_job::State::Running.into(),
            rate_per_second,
            started_ms: now_ms,
            ..v1::BroadcastJob::default()
        };
        Job { shown, parts: BTreeMap::new(), dirty: true }
    }

    pub fn view(&self) -> v1::BroadcastJob {
        let mut view = self.shown.clone();
        view.total = self.parts.values().filter_map(|part| part.total).sum();
        view.done = self.parts.values().map(|part| part.done).sum();
        view
    }

    pub fn is_active(&self) -> bool {
        matches!(self.shown.state(), broadcast_job::State::Running | broadcast_job::State::Paused)
    }

    /// Was it ended before this time?
    pub fn ended_before(&self, ms: u64) -> bool {
        !self.is_active() && self.shown.ended_ms < ms
    }

    pub fn topic(&self) -> &str {
        &self.shown.topic
    }

    /// The message is on its way to these gateways.
    pub fn published(
        &mut self,
        epoch: u64,
        seq: u64,
        gateways: &[(Arc<str>, Receiver)],
        now_ms: u64,
    ) -> Vec<Told> {
        (self.shown.epoch, self.shown.seq) = (epoch, seq);
        self.dirty = true;
        for (instance, receiver) in gateways {
            self.parts.entry(instance.clone()).or_default().receiver.get_or_insert(*receiver);
        }
        self.settle(now_ms)
    }

    /// A gateway says how far it is.
    pub fn progress(
        &mut self,
        receiver: Receiver,
        instance: &Arc<str>,
        progress: &v1::BroadcastProgress,
        now_ms: u64,
    ) -> Vec<Told> {
        let part = self.parts.entry(instance.clone()).or_default();
        if part.receiver != Some(receiver) {
            // Attached again, and still at it: it is told its share anew.
            part.receiver = Some(receiver);
            part.told = None;
        }
        part.total = Some(progress.total);
        part.done = part.done.max(progress.done);
        part.finished = progress.finished;
        self.settle(now_ms)
    }

    /// A stream is gone: its gateway counts as finished, unless it comes back with progress.
    pub fn detached(&mut self, receiver: Receiver, now_ms: u64) -> Vec<Told> {
        for part in self.parts.values_mut().filter(|part| part.receiver == Some(receiver)) {
            part.receiver = None;
            part.told = None;
        }
        self.settle(now_ms)
    }

    /// A gateway that takes part has a new stream: it is told its share on it.
    pub fn attached(&mut self, receiver: Receiver, instance: &Arc<str>, now_ms: u64) -> Vec<Told> {
        match self.parts.get_mut(instance) {
            Some(part) if !part.finished => {
                part.receiver = Some(receiver);
                part.told = None;
                self.settle(now_ms)
            }
            _ => Vec::new(),
        }
    }

    pub fn control(
        &mut self,
        state: broadcast_control::State,
        now_ms: u64,
    ) -> Result<Vec<Told>, ControlError> {
        let wanted = match state {
            broadcast_control::State::Run => broadcast_job::State::Running,
            broadcast_control::State::Pause => broadcast_job::State::Paused,
            broadcast_control::State::Cancel => broadcast_job::State::Cancelled,
            broadcast_control::State::Unspecified => return Err(ControlError::NoState),
        };
        if self.shown.state() == wanted {
            return Ok(Vec::new());
        }
        if !self.is_active() {
            return Err(ControlError::Ended(self.shown.state().as_str_name()));
        }
        self.shown.state = wanted.into();
        self.dirty = true;
        if wanted == broadcast_job::State::Cancelled {
            self.shown.ended_ms = now_ms;
        }
        Ok(self.settle(now_ms))
    }

    /// Its owner was lost, or stops: its message is in the log, but nobody looks after its spreading any more.
    pub fn interrupt(&mut self, now_ms: u64) {
        self.shown.state = broadcast_job::State::Interrupted.into();
        self.shown.ended_ms = now_ms;
        self.dirty = true;
    }

    /// Ends the job when all gateways have; tells the others their shares.
    fn settle(&mut self, now_ms: u64) -> Vec<Told> {
        // Before it is published its gateways are not known.
        if self.shown.seq == 0 {
            return Vec::new();
        }
        // A gateway that is away while the job is paused still has it, and waits for word.
        let is_running = self.shown.state() == broadcast_job::State::Running;
        let over = |part: &Part| part.finished || (is_running && part.receiver.is_none());
        if self.is_active() && self.parts.values().all(over) {
            self.shown.state = broadcast_job::State::Finished.into();
            self.shown.ended_ms = now_ms;
            self.dirty = true;
        }
        self.tell()
    }

    fn tell(&mut self) -> Vec<Told> {
        let state = match self.shown.state() {
            broadcast_job::State::Running => broadcast_control::State::Run,
            broadcast_job::State::Paused => broadcast_control::State::Pause,
            broadcast_job::State::Cancelled => broadcast_control::State::Cancel,
            _ => return Vec::new(),
        };
        let rate = self.shown.rate_per_second;
        let mut active: Vec<_> = self
            .parts
            .values_mut()
            .filter(|part| !part.finished)
            .filter_map(|part| part.receiver.map(|receiver| (receiver, part)))
            .collect();
        // Until all have said how many subscribers they have, they share equally.
        let known = active.iter().all(|(_, part)| part.total.is_some());
        let weight = |part: &Part| if known { part.total.unwrap_or(0).max(1) as f64 } else { 1.0 };
        let sum: f64 = active.iter().map(|(_, part)| weight(part)).sum();
        let mut told = Vec::new();
        for (receiver, part) in &mut active {
            let share = if state == broadcast_control::State::Run { rate * weight(part) / sum } else { 0.0 };
            let same = part.told.is_some_and(|(before, at)| {
                before == state && (at - share).abs() <= at.max(share) * SHARE_TOLERANCE
            });
            if !same {
                part.told = Some((state, share));
                told.push((*receiver, state, share));
            }
        }
        told
    }
}
