//! Going on with what is decided about a pod: its drain is begun, watched, stopped, or given up for lost.

use super::actions::{Action, Event, Plan};
use super::census::{Census, Doomed, is_leaving, names};
use super::decision::{Decision, What, Why};
use super::given::{JobKind, Pod, State};
use super::targets::{makes_room, targets_for};

/// At the deadline the gateway itself closes who is left; so long it may take until that is seen.
const MARGIN_SECONDS: u64 = 15;
/// As long again while nothing can be seen, because the keeper is away.
const BLIND_MARGIN_SECONDS: u64 = 60;
/// Of a pod whose drain had its time. One that could not be told to drain is deleted with its own, in which it drains.
const FORCED_GRACE_SECONDS: u64 = 30;

pub fn go_on(census: &Census, plan: &mut Plan) {
    for pod in &census.alive {
        let Some(decision) = &pod.decision else { continue };
        match (decision.what, census.doomed(&pod.name)) {
            (What::Drain, Some(doomed)) => drain(census, doomed, decision, plan),
            (What::Drain | What::Unknown | What::Wait, None) => take_back(census, pod, decision, plan),
            // Decided anew when its turn comes.
            (What::Wait | What::Unknown, Some(_)) | (What::Rebalance, _) => {}
        }
    }
}

fn drain(census: &Census, doomed: Doomed, decision: &Decision, plan: &mut Plan) {
    let pod = doomed.pod;
    if census.keeper_since.is_some() && is_drained(pod, decision) {
        plan.delete(&pod.name, None, "drained");
        let drained = format!("pod {} is drained and deleted ({})", pod.name, doomed.why.text());
        let event = if census.now >= decision.deadline {
            Event::warning(
                "DrainForced",
                format!("{drained}; at its deadline the gateway closed who was left"),
            )
        } else {
            Event::normal("PodDrained", drained)
        };
        return plan.tell(Some(&pod.name), event);
    }
    if give_up(census, pod, decision, plan) || census.keeper_since.is_none() {
        return;
    }
    if has_bad_targets(census, decision) {
        return redirect(census, doomed, decision, plan);
    }
    if pod.state() == Some(State::Active) {
        if pod.job_running().is_some() {
            plan.add(Action::StopDrain { pod: pod.name.clone() });
        }
        plan.add(Action::StartDrain {
            pod: pod.name.clone(),
            targets: decision.targets.clone(),
            rate_per_second: decision.rate_per_second,
            deadline_seconds: decision.deadline.saturating_sub(census.now).max(1),
        });
    }
}

/// It has said so since it was decided: what it said before may be about a drain that was taken back.
fn is_drained(pod: &Pod, decision: &Decision) -> bool {
    let gateway = pod.gateway.as_ref();
    gateway.is_some_and(|gateway| gateway.state == State::Drained && gateway.answered_at > decision.since)
}

/// The pod stays after all. What is seen of it may be older than a drain that has begun, so it is told to stop in any case,
/// and the decision stays until it has heard that.
fn take_back(census: &Census, pod: &Pod, decision: &Decision, plan: &mut Plan) {
    if decision.what == What::Wait {
        return plan.add(Action::ClearDecision { pod: pod.name.clone() });
    }
    // One that cannot be told is of no use when it is empty: another is made in its place.
    if give_up(census, pod, decision, plan) || census.keeper_since.is_none() {
        return;
    }
    plan.add(Action::StopDrain { pod: pod.name.clone() });
    plan.add(Action::ClearDecision { pod: pod.name.clone() });
    let message = format!("pod {} stays: it is not drained", pod.name);
    plan.tell(Some(&pod.name), Event::normal("DrainStopped", message));
}

/// Deletes a pod that was waited for long enough. False: it is still waited for.
fn give_up(census: &Census, pod: &Pod, decision: &Decision, plan: &mut Plan) -> bool {
    let margin = if census.keeper_since.is_some() { MARGIN_SECONDS } else { BLIND_MARGIN_SECONDS };
    let heard = pod.gateway.as_ref().map_or(0, |gateway| gateway.answered_at).max(decision.since);
    let is_silent = census.keeper_since.is_some_and(|keeper_since| {
        census.now >= heard.max(keeper_since).saturating_add(super::given::SILENT_AFTER_SECONDS)
    });
    let (grace_seconds, why) = if census.now >= decision.deadline.saturating_add(margin) {
        // Whoever was never told to drain has the pod's own time for it.
        let grace_seconds = (pod.state() != Some(State::Active)).then_some(FORCED_GRACE_SECONDS);
        (grace_seconds, "its drain did not end by its deadline")
    } else if is_silent {
        (None, "its gateway does not answer")
    } else {
        return false;
    };
    plan.delete(&pod.name, grace_seconds, why);
    let message = format!("pod {} is deleted before it is drained: {why}", pod.name);
    plan.tell(Some(&pod.name), Event::warning("DrainForced", message));
    true
}

/// Some of the targets will be drained themselves, or none is left.
fn has_bad_targets(census: &Census, decision: &Decision) -> bool {
    let is_target = |pod: &Pod| decision.targets.contains(&pod.name);
    if makes_room(census) {
        let mut left = census.doomed.iter().filter(|doomed| is_target(doomed.pod)).peekable();
        left.peek().is_none() || left.any(|doomed| is_leaving(doomed.pod))
    } else {
        census.doomed.iter().any(|doomed| is_target(doomed.pod))
            || !census.kept.iter().any(|pod| is_target(pod))
    }
}

/// Other targets, in the time that it has; when there are none it takes devices again until there are.
fn redirect(census: &Census, doomed: Doomed, decision: &Decision, plan: &mut Plan) {
    let pod = doomed.pod;
    let targets = targets_for(census, pod);
    plan.add(Action::StopDrain { pod: pod.name.clone() });
    if targets.is_empty() {
        plan.add(Action::ClearDecision { pod: pod.name.clone() });
        let message = format!("pod {} is not drained now: there is nowhere to go", pod.name);
        return plan.tell(Some(&pod.name), Event::normal("DrainStopped", message));
    }
    let decision = Decision { why: doomed.why, targets: names(&targets), ..decision.clone() };
    plan.add(Action::Decide { pod: pod.name.clone(), decision });
}

/// Devices a second that are not in use by who moves some.
pub fn free_rate(census: &Census) -> f64 {
    let of_alive = census.alive.iter().map(|pod| match (&pod.decision, pod.job_running()) {
        (Some(decision), _) if decision.what == What::Drain && pod.state() != Some(State::Drained) => {
            decision.rate_per_second
        }
        (_, Some(job)) if !census.is_silent(pod) => job.rate_per_second,
        _ => 0.0,
    });
    let of_terminating = census.terminating.iter().filter(|pod| !census.is_silent(pod)).map(|pod| {
        pod.job_running().filter(|job| job.kind == JobKind::Drain).map_or(0.0, |job| job.rate_per_second)
    });
    census.pool.rate_per_second - of_alive.sum::<f64>() - of_terminating.sum::<f64>()
}

/// A drain that begins now.
pub fn decided(census: &Census, what: What, why: Why, targets: &[&Pod], rate_per_second: f64) -> Decision {
    Decision {
        what,
        why,
        since: census.now,
        deadline: census.now.saturating_add(census.pool.deadline_seconds),
        targets: names(targets),
        rate_per_second,
        count: 0,
    }
}
