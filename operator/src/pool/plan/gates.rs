//! Who is in the Service: the condition of each pod's readiness gate.

use super::actions::{Action, Plan};
use super::census::{Census, is_leaving};
use super::given::{Pod, State};

pub fn set(census: &Census, plan: &mut Plan) {
    let mut set = |pod: &Pod, serving: bool| {
        if pod.is_serving != serving {
            plan.add(Action::SetServing { pod: pod.name.clone(), serving });
        }
    };
    for pod in &census.terminating {
        set(pod, false);
    }
    // Nothing is known that could be a reason to change them, unless nobody would be left.
    if census.keeper_since.is_none() {
        if !census.alive.iter().any(|pod| pod.is_serving && pod.is_ready) {
            census.alive.iter().filter(|pod| pod.is_ready && !is_leaving(pod)).for_each(|pod| set(pod, true));
        }
        return;
    }
    let doomed_are_out = doomed_are_out(census);
    for pod in &census.alive {
        let is_out = is_leaving(pod)
            || !pod.is_registered
            || pod.state().is_some_and(|state| state != State::Active)
            || (doomed_are_out && census.doomed(&pod.name).is_some());
        // Before the gateway has said something it is not known to be there for anyone.
        if is_out {
            set(pod, false);
        } else if pod.gateway.is_some() {
            set(pod, true);
        }
    }
}

/// All pods that are to go leave the Service before the first device is moved, when pods that stay can take those of the
/// first: a device that comes back by the Service's address must not meet a pod that it will be sent away from again.
fn doomed_are_out(census: &Census) -> bool {
    if census.desired == 0 {
        return true;
    }
    let targets = census.targets();
    let room = targets.iter().fold(0u64, |sum, pod| sum.saturating_add(pod.room(census.pool)));
    let emptied = census.doomed.iter().map(|doomed| doomed.pod);
    let emptied: Vec<&Pod> = emptied.filter(|pod| !is_leaving(pod) && !census.holds_nobody(pod)).collect();
    if emptied.iter().any(|pod| !pod.is_serving) {
        return room > 0;
    }
    let first = emptied.iter().map(|pod| pod.connections()).min().unwrap_or(0);
    !targets.is_empty() && !census.is_starting() && room >= first.max(1)
}
