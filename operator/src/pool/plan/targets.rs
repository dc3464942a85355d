//! Where devices may be sent, how many of them, and to whom first.

use super::census::{Census, is_leaving};
use super::given::{Pod, State};

/// The pods that a pod's devices may be sent to.
pub fn targets_for<'a>(census: &Census<'a>, pod: &Pod) -> Vec<&'a Pod> {
    let targets = census.targets();
    if !targets.is_empty() || !makes_room(census) {
        return targets;
    }
    let others = census.doomed.iter().map(|doomed| doomed.pod);
    let mut others: Vec<&Pod> =
        others.filter(|other| other.name != pod.name && census.is_capable(other)).collect();
    others.sort_by_key(|pod| (pod.connections(), &pod.name));
    others
}

/// There is no pod of those wanted, and no room to make one: one must go, and its devices to others that will go later.
/// Only without a surge, or when the revision changes again in the middle of an update.
pub fn makes_room(census: &Census) -> bool {
    census.desired > 0 && census.kept.is_empty() && census.to_create() == 0
}

/// Devices that these can take.
pub fn room(census: &Census, targets: &[&Pod]) -> u64 {
    let room = targets.iter().fold(0u64, |sum, pod| sum.saturating_add(pod.room(census.pool)));
    room.saturating_sub(on_the_way(census))
}

/// How many devices the targets can take until they hold what will be theirs when all pods are there: those that are made
/// last must not stay empty, or devices would have to move again.
pub fn fair_share(census: &Census, targets: &[&Pod]) -> u64 {
    let theirs = all(census) * targets.len() as u128 / census.desired as u128;
    let held: u128 = targets.iter().map(|pod| u128::from(pod.connections())).sum();
    let left = theirs.saturating_sub(held + u128::from(on_the_way(census)));
    u64::try_from(left).unwrap_or(u64::MAX)
}

/// Devices that are on their way to others, or soon will be.
pub fn on_the_way(census: &Census) -> u64 {
    let leaving = census.alive.iter().filter(|pod| is_leaving(pod));
    let terminating = census.terminating.iter().filter(|pod| !census.is_silent(pod));
    leaving.chain(terminating).fold(0, |sum, pod| sum.saturating_add(pod.connections()))
}

fn all(census: &Census) -> u128 {
    let there = census.alive.iter().chain(census.terminating.iter().filter(|pod| !census.is_silent(pod)));
    there.map(|pod| u128::from(pod.connections())).sum()
}

/// Those of the targets that hold less than will be theirs, counting what is on its way to them, if they can take so many
/// devices together; else all. A gateway fills the emptiest first, and does not know what others still send there.
pub fn lacking<'a>(census: &Census, targets: Vec<&'a Pod>, devices: u64) -> Vec<&'a Pod> {
    let share = all(census) / census.desired.max(1) as u128;
    let coming = |target: &Pod| -> u128 {
        let senders =
            census.alive.iter().filter(|pod| is_leaving(pod) && pod.state() != Some(State::Drained));
        let from = senders.filter_map(|pod| {
            let to = &pod.decision.as_ref()?.targets;
            to.contains(&target.name).then(|| u128::from(pod.connections()) / to.len() as u128)
        });
        from.sum()
    };
    let lack = |pod: &Pod| share.saturating_sub(u128::from(pod.connections()) + coming(pod));
    let few: Vec<&Pod> = targets.iter().copied().filter(|pod| lack(pod) > 0).collect();
    let sum: u128 = few.iter().map(|pod| lack(pod).min(u128::from(pod.room(census.pool)))).sum();
    // What is left over of a share that does not divide is no reason to spread it.
    if sum + targets.len() as u128 >= u128::from(devices) && !few.is_empty() { few } else { targets }
}
