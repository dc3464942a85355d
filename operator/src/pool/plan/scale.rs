//! Pods that are missing, and those that have ended.

use super::actions::{Action, Event, Plan};
use super::census::Census;

/// Pods made in one pass.
const MOST_AT_ONCE: usize = 50;
/// A pod that ends this soon after it was made is not made again at once: whatever ended it may do it again.
const YOUNG_SECONDS: u64 = 60;
const AGAIN_AFTER_SECONDS: u64 = 10;

/// Pods whose containers have ended are deleted. Young ones stay a while: they are how it is known that there were some.
pub fn bury(census: &Census, plan: &mut Plan) {
    for pod in &census.ended {
        let until = pod.created_at.saturating_add(YOUNG_SECONDS);
        if census.now < until {
            plan.look_again_at(until, census.now);
            continue;
        }
        plan.delete(&pod.name, None, "its containers have ended");
        let message = format!("pod {} has ended and is deleted", pod.name);
        plan.tell(Some(&pod.name), Event::warning("PodEnded", message));
    }
}

pub fn create(census: &Census, plan: &mut Plan) {
    let count = census.to_create().min(MOST_AT_ONCE);
    if count == 0 {
        return;
    }
    let young = census.ended.iter().filter(|pod| census.now < pod.created_at.saturating_add(YOUNG_SECONDS));
    let again_at = young.map(|pod| pod.created_at.saturating_add(AGAIN_AFTER_SECONDS)).max().unwrap_or(0);
    if census.now < again_at {
        plan.blocked = Some("pods end as soon as they are made".to_owned());
        return plan.look_again_at(again_at, census.now);
    }
    plan.add(Action::Create { revision: census.pool.revision.clone(), count });
    let message = format!("{count} pods of revision {}", census.pool.revision);
    plan.tell(None, Event::normal("PodsCreated", message));
}

/// None are wanted, so there is nowhere to drain to.
pub fn delete_all(census: &Census, plan: &mut Plan) {
    for pod in &census.alive {
        plan.delete(&pod.name, None, "no pods are wanted");
        plan.tell(
            Some(&pod.name),
            Event::normal("PodDeleted", format!("pod {}: no pods are wanted", pod.name)),
        );
    }
}
