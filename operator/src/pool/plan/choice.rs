//! Which pods begin to go now: those that hold nobody at once, the others within the budget, the room and the rate.

use super::actions::{Action, Event, Plan};
use super::census::{Census, Doomed, is_leaving};
use super::decision::What;
use super::drains::{decided, free_rate};
use super::given::{JobKind, Pod};
use super::targets::{fair_share, lacking, makes_room, room, targets_for};

/// No drain is slower; the gateway takes no smaller rate.
const LEAST_RATE: f64 = 0.1;
/// Others wait until so much of the rate is free: a drain keeps the rate that it began with.
const LEAST_PART: f64 = 0.1;

pub fn choose(census: &Census, plan: &mut Plan) {
    let mut candidates = Vec::new();
    for doomed in census.doomed.iter().filter(|doomed| !is_leaving(doomed.pod)) {
        if census.holds_nobody(doomed.pod) {
            plan.delete(&doomed.pod.name, None, "nobody is connected to it");
            let message =
                format!("pod {} holds nobody and is deleted ({})", doomed.pod.name, doomed.why.text());
            plan.tell(Some(&doomed.pod.name), Event::normal("PodDeleted", message));
        } else {
            candidates.push(*doomed);
        }
    }
    if candidates.is_empty() {
        return;
    }
    match select(census, &candidates, plan) {
        Ok(chosen) => drain(census, &chosen, plan),
        Err(why) => plan.blocked = Some(why),
    }
}

/// The pods to drain now, or why none is.
fn select<'a>(
    census: &Census<'a>,
    candidates: &[Doomed<'a>],
    plan: &mut Plan,
) -> Result<Vec<Doomed<'a>>, String> {
    if census.keeper_since.is_none() {
        return Err("the keeper does not answer".to_owned());
    }
    let drains = census.doomed.iter().any(|doomed| is_leaving(doomed.pod));
    let targets = targets_for(census, candidates[0].pod);
    if targets.is_empty() {
        return Err(format!("no pod of revision {} takes devices yet", census.pool.revision));
    }
    if census.is_starting() || census.to_create() > 0 {
        return Err("other pods are starting".to_owned());
    }
    if stop_rebalances(census, plan) {
        return Err("devices are still moved to even the load out".to_owned());
    }
    let free = free_rate(census);
    if free < LEAST_RATE.max(census.pool.rate_per_second * LEAST_PART) {
        return Err("other pods drain, at the rate that there is".to_owned());
    }
    // One by one, into pods that will be drained themselves: as few devices as may be.
    let makes_room = makes_room(census);
    if makes_room && drains {
        return Err("another pod is drained first".to_owned());
    }
    let most = if makes_room { 1 } else { (free / LEAST_RATE) as usize };
    let (room, share) = (room(census, &targets), fair_share(census, &targets));
    let offer = Offer { most, room, share, free, drains };
    let (chosen, is_forced, no_room) = pick(census, candidates, &offer);
    if let (true, Some(first)) = (chosen.is_empty(), no_room) {
        let is_settled = census.kept.iter().all(|pod| census.is_capable(pod));
        // Room that is still to come is waited for without an end.
        if !drains && is_settled {
            wait(census, first, plan);
        }
        return Err(format!("the pods that stay have no room for the devices of {}", first.pod.name));
    }
    if chosen.is_empty() {
        return Err("others go first, so that enough are left".to_owned());
    }
    let holds_some = chosen.iter().any(|doomed| doomed.pod.connections() > 0);
    let are_out = census.doomed.iter().all(|doomed| !doomed.pod.is_serving);
    if holds_some && !are_out && !is_forced && !makes_room {
        return Err("the pods that are to go leave the Service first".to_owned());
    }
    Ok(chosen)
}

struct Offer {
    /// Pods at a time.
    most: usize,
    /// Devices, for as many as can be.
    room: u64,
    /// Devices, for as many as should be; the first pod to go need not fit.
    share: u64,
    free: f64,
    /// Some are on their way already.
    drains: bool,
}

/// Who of the candidates can go together; whether one of them has waited for room in vain; and the first that has none.
fn pick<'a>(
    census: &Census<'a>,
    candidates: &[Doomed<'a>],
    offer: &Offer,
) -> (Vec<Doomed<'a>>, bool, Option<Doomed<'a>>) {
    let needed = census.desired - census.budget.unavailable;
    let mut spare = census.available().saturating_sub(needed);
    let (mut room, mut share) = (offer.room, offer.share);
    // All of them end together, within half of the time that each has.
    let mut in_time = (offer.free * census.pool.deadline_seconds as f64 / 2.0) as u64;
    let (mut chosen, mut is_forced, mut no_room) = (Vec::new(), false, None);
    for doomed in candidates {
        let (pod, connections) = (doomed.pod, doomed.pod.connections());
        if chosen.len() == offer.most || (!chosen.is_empty() && connections > in_time) {
            break;
        }
        if census.is_up(pod) && spare == 0 {
            continue;
        }
        let has_waited = pod
            .decision
            .as_ref()
            .is_some_and(|decision| decision.what == What::Wait && census.now >= decision.deadline);
        if connections > share && (offer.drains || !chosen.is_empty()) {
            continue;
        }
        if connections > room && !has_waited {
            no_room = no_room.or(Some(*doomed));
            continue;
        }
        is_forced |= connections > room;
        spare -= usize::from(census.is_up(pod));
        share = share.saturating_sub(connections);
        room = room.saturating_sub(connections);
        in_time = in_time.saturating_sub(connections);
        chosen.push(*doomed);
    }
    (chosen, is_forced, no_room)
}

/// Pods that go share what is free of the rate by their devices, so that they end together.
fn drain(census: &Census, chosen: &[Doomed], plan: &mut Plan) {
    let free = free_rate(census);
    let weight = |pod: &Pod| pod.connections().max(1) as f64;
    let sum: f64 = chosen.iter().map(|doomed| weight(doomed.pod)).sum();
    // Each has the least rate, and what is over is shared.
    let over = free - LEAST_RATE * chosen.len() as f64;
    let devices = chosen.iter().map(|doomed| doomed.pod.connections()).sum();
    for doomed in chosen {
        let pod = doomed.pod;
        let rate = LEAST_RATE + over * weight(pod) / sum;
        let rate = (rate * 100.0 + 1e-6).floor() / 100.0;
        let targets = lacking(census, targets_for(census, pod), devices);
        let decision = decided(census, What::Drain, doomed.why, &targets, rate);
        plan.add(Action::Decide { pod: pod.name.clone(), decision });
        let what = format!("pod {}, {}: its {} devices go", pod.name, doomed.why.text(), pod.connections());
        let event = match &pod.decision {
            Some(decision) if decision.what == What::Wait && pod.connections() > room(census, &targets) => {
                Event::warning("DrainForced", format!("{what}, although there is no room for all of them"))
            }
            _ => Event::normal("Draining", format!("{what}, {rate} a second")),
        };
        plan.tell(Some(&pod.name), event);
    }
    plan.look_again_within(1);
}

/// Writes down since when a pod waits for room.
fn wait(census: &Census, doomed: Doomed, plan: &mut Plan) {
    let pod = doomed.pod;
    if let Some(decision) = pod.decision.as_ref().filter(|decision| decision.what == What::Wait) {
        return plan.look_again_at(decision.deadline, census.now);
    }
    let decision = decided(census, What::Wait, doomed.why, &[], 0.0);
    plan.add(Action::Decide { pod: pod.name.clone(), decision });
    let message = format!(
        "pod {}, {}: the pods that stay have no room for its {} devices; it goes in {} s at the latest",
        pod.name,
        doomed.why.text(),
        pod.connections(),
        census.pool.deadline_seconds
    );
    plan.tell(Some(&pod.name), Event::warning("NoRoom", message));
}

/// Whoever evens the load out stops: true while someone does.
fn stop_rebalances(census: &Census, plan: &mut Plan) -> bool {
    let mut is_running = false;
    for pod in &census.kept {
        if pod.job_running().is_some_and(|job| job.kind == JobKind::Rebalance) {
            is_running = true;
            plan.add(Action::StopDrain { pod: pod.name.clone() });
        }
    }
    is_running
}
