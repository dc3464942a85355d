//! Evening the load out when pods have come: those above their share send the excess to those below it.
//!
//! It is decided when one is further from its share than the tolerance, begins when that is still so a little later (what
//! gateways say is a little old, and devices may be on their way), and ends with all at their share. The decision stays on
//! the pod for the cool-down, so that the next one begins later whoever plans it. Not while pods come or go.

use super::actions::{Action, Event, Plan};
use super::census::Census;
use super::decision::{Decision, What, Why};
use super::drains::decided;
use super::given::{JobKind, Pod, Rebalancing};

/// A pod that is off by fewer devices is not worth it.
const LEAST_DEVICES: u64 = 5;
/// So long it must have been so.
const SETTLES_WITHIN_SECONDS: u64 = 10;
/// A rebalance that could not be begun for so long is not begun any more.
const BEGINS_WITHIN_SECONDS: u64 = 60;
/// Clocks of pods and operator may differ by this much.
const CLOCKS_SECONDS: u64 = 30;
/// After one that moved nobody (MQTT 3.1.1 cannot be told where to go), so many cool-downs.
const IN_VAIN: u64 = 10;
const LEAST_COOLDOWN_SECONDS: u64 = 30;
/// What is known must not be older.
const FRESH_SECONDS: u64 = 30;

pub fn even_out(census: &Census, plan: &mut Plan) {
    if census.keeper_since.is_none() {
        return;
    }
    let is_at_rest = is_at_rest(census);
    let mut is_decided = false;
    for pod in &census.kept {
        if let Some(decision) = pod.decision.as_ref().filter(|decision| decision.what == What::Rebalance) {
            is_decided = true;
            go_on(census, pod, decision, is_at_rest, plan);
        }
    }
    if let (true, false, Some(policy)) = (is_at_rest, is_decided, census.pool.rebalance) {
        begin(census, policy, plan);
    }
}

fn is_at_rest(census: &Census) -> bool {
    let is_fresh = |pod: &Pod| {
        pod.gateway.as_ref().is_some_and(|gateway| gateway.answered_at + FRESH_SECONDS >= census.now)
    };
    census.doomed.is_empty()
        && census.kept.len() == census.desired
        && census.kept.iter().all(|pod| census.is_capable(pod) && is_fresh(pod))
        && census.terminating.iter().all(|pod| census.is_silent(pod))
}

fn go_on(census: &Census, pod: &Pod, decision: &Decision, is_at_rest: bool, plan: &mut Plan) {
    if pod.job_running().is_some() {
        return;
    }
    let job = pod
        .gateway
        .as_ref()
        .and_then(|gateway| gateway.job.as_ref())
        .filter(|job| job.kind == JobKind::Rebalance && job.began_at + CLOCKS_SECONDS >= decision.since);
    let cooldown =
        census.pool.rebalance.map_or(0, |policy| policy.cooldown_seconds.max(LEAST_COOLDOWN_SECONDS));
    if let (None, true, Some(policy)) = (job, census.now < decision.deadline, census.pool.rebalance) {
        let begins_at = decision.since.saturating_add(SETTLES_WITHIN_SECONDS);
        if census.now < begins_at {
            return plan.look_again_at(begins_at, census.now);
        }
        if is_at_rest {
            return start(census, pod, decision, policy, plan);
        }
    }
    let times = if job.is_some_and(|job| job.moved == 0) { IN_VAIN } else { 1 };
    let until = decision.since.saturating_add(cooldown.saturating_mul(times));
    if census.now >= until {
        plan.add(Action::ClearDecision { pod: pod.name.clone() });
    } else {
        plan.look_again_at(until, census.now);
    }
}

fn start(census: &Census, pod: &Pod, decision: &Decision, policy: Rebalancing, plan: &mut Plan) {
    let shares = shares(census);
    let share = census.kept.iter().zip(&shares).find(|(kept, _)| kept.name == pod.name);
    let count = pod.connections().saturating_sub(share.map_or(u64::MAX, |(_, share)| *share));
    let is_there = |target: &String| census.kept.iter().any(|pod| pod.name == *target);
    if count == 0 || !is_uneven(census, &shares, policy) || !decision.targets.iter().all(is_there) {
        return plan.add(Action::ClearDecision { pod: pod.name.clone() });
    }
    plan.add(Action::Rebalance {
        pod: pod.name.clone(),
        count: count.min(decision.count),
        targets: decision.targets.clone(),
        rate_per_second: decision.rate_per_second,
        cooldown_seconds: policy.cooldown_seconds,
    });
    plan.look_again_within(2);
}

fn is_uneven(census: &Census, shares: &[u64], policy: Rebalancing) -> bool {
    census.kept.iter().zip(shares).any(|(pod, &share)| {
        let off = pod.connections().abs_diff(share);
        // Those that have begun already are on their way.
        let is_begun = pod.job_running().is_some();
        is_begun || (off >= LEAST_DEVICES && off * 100 > share * u64::from(policy.tolerance_percent))
    })
}

fn begin(census: &Census, policy: Rebalancing, plan: &mut Plan) {
    if census.kept.iter().any(|pod| pod.decision.is_some() || pod.job_running().is_some()) {
        return;
    }
    let shares = shares(census);
    if !is_uneven(census, &shares, policy) {
        return;
    }
    let both = || census.kept.iter().copied().zip(shares.iter().copied());
    let mut targets: Vec<&Pod> =
        both().filter(|(pod, share)| pod.connections() < *share).map(|(pod, _)| pod).collect();
    targets.sort_by_key(|pod| (pod.connections(), &pod.name));
    let givers = both().filter(|(pod, share)| pod.connections() > *share);
    let givers: Vec<(&Pod, u64)> = givers.map(|(pod, share)| (pod, pod.connections() - share)).collect();
    let sum: u64 = givers.iter().map(|(_, count)| count).sum();
    for (pod, count) in givers {
        let rate = census.pool.rate_per_second * count as f64 / sum as f64;
        let rate = ((rate * 10.0).floor() / 10.0).max(0.1);
        let decision = Decision {
            deadline: census.now.saturating_add(BEGINS_WITHIN_SECONDS),
            count,
            ..decided(census, What::Rebalance, Why::Balance, &targets, rate)
        };
        plan.add(Action::Decide { pod: pod.name.clone(), decision });
        let message = format!("{count} devices of pod {} go to emptier ones, {rate} a second", pod.name);
        plan.tell(Some(&pod.name), Event::normal("Rebalancing", message));
    }
    plan.look_again_within(1);
}

/// How many connections each of the pods that stay should hold: as large a part as it is of them all, rounded so that
/// the sum is right.
fn shares(census: &Census) -> Vec<u64> {
    let weights: Vec<u128> = census.kept.iter().map(|pod| u128::from(pod.weight(census.pool))).collect();
    let total: u128 = census.kept.iter().map(|pod| u128::from(pod.connections())).sum();
    let sum: u128 = weights.iter().sum::<u128>().max(1);
    let (mut upto, mut given) = (0, 0);
    let share = |weight: u128| {
        upto += weight;
        let share = total * upto / sum - given;
        given += share;
        share as u64
    };
    weights.into_iter().map(share).collect()
}
