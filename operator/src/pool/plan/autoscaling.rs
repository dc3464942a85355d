//! How many pods there are to be: `replicas`, or by the connections that there are.

use serde::{Deserialize, Serialize};

use super::actions::Event;
use super::given::{Phase, Pool, SILENT_AFTER_SECONDS, Seen};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Autoscaling {
    pub min: u32,
    pub max: u32,
    pub connections_per_pod: u64,
    /// Fewer pods only when fewer were enough for so long.
    pub stabilization_seconds: u64,
}

/// What must be known of the past. It changes when the number of pods does, when fewer pods begin to be enough, and
/// while they are when more of them are needed than before: not with each connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// How many pods autoscaling wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<Below>,
}

/// Fewer pods are enough.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Below {
    /// Unix, seconds.
    pub since: u64,
    /// The most that were needed since.
    pub most: u32,
}

pub(super) struct Scaled {
    pub replicas: usize,
    pub memory: Memory,
    pub event: Option<Event>,
    /// When to look again, though nothing may have changed.
    pub look_at: Option<u64>,
}

pub(super) fn scale(pool: &Pool, seen: &Seen, now: u64) -> Scaled {
    let Some(policy) = &pool.autoscaling else {
        let replicas = pool.replicas as usize;
        return Scaled { replicas, memory: Memory::default(), event: None, look_at: None };
    };
    let current = seen.memory.replicas.unwrap_or(pool.replicas).clamp(policy.min, policy.max.max(policy.min));
    let needed = needed(pool, policy, seen, now, current);
    let (replicas, below) = decide(policy, seen.memory.below.as_ref(), current, needed, now);
    let event = (replicas != current).then(|| {
        let message = format!(
            "from {current} to {replicas} pods, for {} connections a pod at most",
            policy.connections_per_pod
        );
        Event::normal("Autoscaled", message)
    });
    let look_at = below.as_ref().map(|below| below.since + policy.stabilization_seconds);
    let memory = Memory { replicas: Some(replicas), below };
    Scaled { replicas: replicas as usize, memory, event, look_at }
}

/// Reports are older than one another by this much at most, as a rule.
const REPORTS_SECONDS: f64 = 8.0;

/// How many pods the connections need; as many as there are to be while not all of them are known, or more when those
/// that are known need more.
fn needed(pool: &Pool, policy: &Autoscaling, seen: &Seen, now: u64, current: u32) -> u32 {
    let Some(keeper_since) = seen.keeper_since else { return current };
    let (mut connections, mut counted_twice) = (0u64, 0.0);
    let mut is_all = true;
    for pod in seen.pods.iter().filter(|pod| pod.phase != Phase::Ended) {
        let answered = pod.gateway.as_ref().map(|gateway| gateway.answered_at.max(keeper_since));
        let is_known = pod.is_registered && answered.is_some_and(|at| at + SILENT_AFTER_SECONDS > now);
        if is_known {
            connections += pod.connections();
            // A device that moves may be in the reports of two gateways.
            let rate = match (pod.job_running(), &pod.decision) {
                (Some(job), _) => job.rate_per_second,
                _ if pod.is_terminating => pool.rate_per_second,
                // It may have begun.
                (_, Some(decision)) if now <= decision.deadline => decision.rate_per_second,
                _ => 0.0,
            };
            counted_twice += REPORTS_SECONDS * rate;
        } else if pod.is_ready && !pod.is_terminating {
            is_all = false;
        }
    }
    let of = |connections: u64| {
        let needed = connections.div_ceil(policy.connections_per_pod.max(1));
        u32::try_from(needed).unwrap_or(u32::MAX).clamp(policy.min, policy.max.max(policy.min))
    };
    let least = of(connections.saturating_sub(counted_twice as u64));
    let most = if is_all { of(connections) } else { u32::MAX };
    // Between the two nothing speaks for a change.
    current.clamp(least, most)
}

fn decide(
    policy: &Autoscaling,
    below: Option<&Below>,
    current: u32,
    needed: u32,
    now: u64,
) -> (u32, Option<Below>) {
    if needed >= current {
        return (needed, None);
    }
    let below = match below {
        Some(below) => Below { since: below.since, most: below.most.max(needed).min(current) },
        None => Below { since: now, most: needed },
    };
    if now < below.since.saturating_add(policy.stabilization_seconds) {
        return (current, Some(below));
    }
    let further = (needed < below.most).then_some(Below { since: now, most: needed });
    (below.most, further)
}
