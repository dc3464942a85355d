//! What comes out of a plan.

use super::autoscaling::Memory;
use super::decision::Decision;
use super::progress::Progress;

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Create {
        revision: String,
        count: usize,
    },
    /// Writes the annotation.
    Decide {
        pod: String,
        decision: Decision,
    },
    /// Takes the annotation away.
    ClearDecision {
        pod: String,
    },
    StartDrain {
        pod: String,
        targets: Vec<String>,
        rate_per_second: f64,
        deadline_seconds: u64,
    },
    /// Ends the drain or rebalance that runs; a gateway that is draining or drained takes devices again.
    StopDrain {
        pod: String,
    },
    Rebalance {
        pod: String,
        count: u64,
        targets: Vec<String>,
        rate_per_second: f64,
        cooldown_seconds: u64,
    },
    /// Sets the condition of the readiness gate.
    SetServing {
        pod: String,
        serving: bool,
    },
    Delete {
        pod: String,
        /// None: the pod's own, which leaves time to drain.
        grace_seconds: Option<u64>,
        why: &'static str,
    },
    Tell(Event),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// None: about the pool.
    pub pod: Option<String>,
    pub reason: &'static str,
    pub message: String,
    pub is_warning: bool,
}

impl Event {
    pub fn normal(reason: &'static str, message: impl Into<String>) -> Event {
        Event { pod: None, reason, message: message.into(), is_warning: false }
    }

    pub fn warning(reason: &'static str, message: impl Into<String>) -> Event {
        Event { is_warning: true, ..Event::normal(reason, message) }
    }
}

impl Action {
    /// The pod that it is about; None: the pool.
    pub fn pod(&self) -> Option<&str> {
        match self {
            Action::Create { .. } => None,
            Action::Tell(event) => event.pod.as_deref(),
            Action::Decide { pod, .. }
            | Action::ClearDecision { pod }
            | Action::StartDrain { pod, .. }
            | Action::StopDrain { pod }
            | Action::Rebalance { pod, .. }
            | Action::SetServing { pod, .. }
            | Action::Delete { pod, .. } => Some(pod),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// When to look again at the latest, in seconds, if nothing is seen to change before.
    pub requeue_after_seconds: u64,
    pub progress: Progress,
    /// What the next pass is to be given; to be written down where it differs.
    pub memory: Memory,
    /// Why what is to go does not go now.
    pub(super) blocked: Option<String>,
}

/// Load changes without anything being seen to change.
const LOOK_EVERY_SECONDS: u64 = 30;

impl Plan {
    pub(super) fn new(memory: Memory) -> Plan {
        Plan {
            actions: Vec::new(),
            requeue_after_seconds: LOOK_EVERY_SECONDS,
            progress: Progress::default(),
            memory,
            blocked: None,
        }
    }

    pub(super) fn add(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// Told when what was added before it for the same pod has been done.
    pub(super) fn tell(&mut self, pod: Option<&str>, event: Event) {
        self.actions.push(Action::Tell(Event { pod: pod.map(str::to_owned), ..event }));
    }

    pub(super) fn delete(&mut self, pod: &str, grace_seconds: Option<u64>, why: &'static str) {
        self.add(Action::Delete { pod: pod.to_owned(), grace_seconds, why });
    }

    pub(super) fn look_again_within(&mut self, seconds: u64) {
        self.requeue_after_seconds = self.requeue_after_seconds.min(seconds.max(1));
    }

    pub(super) fn look_again_at(&mut self, at: u64, now: u64) {
        self.look_again_within(at.saturating_sub(now));
    }
}
