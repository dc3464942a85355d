//! What is said of the pool: its numbers and conditions. Nothing in it changes with each look.

use super::census::{Census, is_leaving};
use super::given::{Pod, State};

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    pub desired: u32,
    /// Pods that are there and were not told to terminate.
    pub replicas: u32,
    /// Of those, the ones that take devices.
    pub ready: u32,
    /// Of those, the ones of the wanted revision.
    pub updated: u32,
    pub draining: u32,
    /// Rounded to two digits; None: not known.
    pub connections: Option<u64>,
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    pub kind: &'static str,
    pub is_true: bool,
    pub reason: &'static str,
    pub message: String,
}

pub fn progress(census: &Census, blocked: Option<&str>) -> Progress {
    let serves = |pod: &&&Pod| match census.keeper_since {
        Some(_) => census.is_capable(pod),
        None => pod.is_ready && !is_leaving(pod),
    };
    let is_updated = |pod: &&&Pod| pod.revision == census.pool.revision;
    let ready = census.alive.iter().filter(serves).count();
    let connections = census.alive.iter().chain(&census.terminating).filter(|pod| !census.is_silent(pod));
    Progress {
        desired: census.desired as u32,
        replicas: census.alive.len() as u32,
        ready: ready as u32,
        updated: census.alive.iter().filter(|pod| is_updated(pod)).count() as u32,
        draining: census.alive.iter().filter(|pod| is_leaving(pod)).count() as u32,
        connections: census.keeper_since.map(|_| two_digits(connections.map(|pod| pod.connections()).sum())),
        conditions: conditions(census, ready, blocked),
    }
}

fn conditions(census: &Census, ready: usize, blocked: Option<&str>) -> Vec<Condition> {
    let condition = |kind, is_true, reason, message: &str| Condition {
        kind,
        is_true,
        reason,
        message: message.to_owned(),
    };
    let needed = census.desired - census.budget.unavailable;
    let is_available = ready >= needed;
    let available = if is_available {
        condition("Available", true, "EnoughPods", "enough pods take devices")
    } else {
        condition("Available", false, "TooFewPods", "too few pods take devices")
    };
    let blocked = blocked.unwrap_or_default();
    let is_old = census.alive.iter().any(|pod| pod.revision != census.pool.revision);
    let progressing = if is_old && census.pool.paused {
        condition("Progressing", false, "Paused", "the update is paused")
    } else if is_old {
        condition("Progressing", true, "Updating", blocked)
    } else if !census.doomed.is_empty() {
        condition("Progressing", true, "ScalingDown", blocked)
    } else if census.kept.len() < census.desired || census.is_starting() {
        condition("Progressing", true, "ScalingUp", blocked)
    } else {
        condition("Progressing", false, "AsWanted", "")
    };
    let degraded = degraded(census);
    let is_degraded = degraded.is_some();
    let (reason, message) = degraded.unwrap_or(("AsWanted", String::new()));
    let degraded = condition("Degraded", is_degraded, reason, &message);
    let ready = match (&available, &progressing, &degraded) {
        (available, ..) if !available.is_true => {
            condition("Ready", false, available.reason, &available.message)
        }
        (.., degraded) if degraded.is_true => condition("Ready", false, degraded.reason, &degraded.message),
        (_, progressing, _) if progressing.is_true => {
            condition("Ready", false, progressing.reason, &progressing.message)
        }
        _ => condition("Ready", true, "AsWanted", "all pods are as wanted"),
    };
    vec![ready, available, progressing, degraded]
}

/// What does not get better by waiting.
fn degraded(census: &Census) -> Option<(&'static str, String)> {
    if census.keeper_since.is_none() {
        return Some(("KeeperUnreachable", "the keeper does not answer: pods are not drained".to_owned()));
    }
    let left_alone = |pod: &&&Pod| pod.decision.is_none() && !census.is_capable(pod);
    if census.is_starting() {
        return None;
    }
    let pod = census.kept.iter().find(left_alone)?;
    let why = match pod.state() {
        Some(State::Draining | State::Drained) => "was drained by someone else",
        _ if !pod.is_ready => "is not ready",
        _ if !pod.is_registered => "is not known to the keeper",
        _ => "does not answer",
    };
    Some(("PodNotServing", format!("pod {} {why}", pod.name)))
}

/// The first two digits of a number, the rest zeros.
pub fn two_digits(number: u64) -> u64 {
    let Some(digits) = number.checked_ilog10().filter(|digits| *digits > 1) else { return number };
    let unit = 10u64.pow(digits - 1);
    (number + unit / 2) / unit * unit
}
