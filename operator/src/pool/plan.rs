//! What is to be done with a pool's pods now: a function from what is wanted, what is seen and the time, to actions.
//!
//! It has no state. What it must remember is in what it sees: a decision that takes more than one step is written to its
//! pod ([`Decision`]) in one pass and acted on in later ones, which read it there; so an operator that dies anywhere is
//! followed by one that goes on. An action that fails, or whose effect is not seen yet, is asked for again by the next
//! pass; all of them may be repeated. A pool that is as it is to be gets no action.
//!
//! In one pass: count ([`census`]), who is in the Service ([`gates`]), create ([`scale`]), go on with drains that are
//! decided ([`drains`]), decide others ([`choice`]), even the load out ([`rebalance`]).

pub mod actions;
pub mod autoscaling;
pub mod budget;
mod census;
mod choice;
pub mod decision;
mod drains;
mod gates;
pub mod given;
pub mod progress;
mod rebalance;
mod scale;
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod simulation;
mod targets;
#[cfg(test)]
mod tests;

pub use actions::{Action, Event, Plan};
pub use autoscaling::{Autoscaling, Memory};
pub use budget::Amount;
pub use decision::{Decision, What, Why};
pub use given::{Gateway, Job, JobKind, Node, Phase, Pod, Pool, Rebalancing, Seen, State};
pub use progress::Progress;

use census::Census;

/// What to do with the pods of `pool` at `now` (Unix, seconds).
///
/// The actions are to be carried out in their order. When one fails, what follows it for the same pod is left out; what
/// is for other pods is done all the same.
pub fn plan(pool: &Pool, seen: &Seen, now: u64) -> Plan {
    let scaled = autoscaling::scale(pool, seen, now);
    let census = Census::take(pool, seen, scaled.replicas, now);
    let mut plan = Plan::new(scaled.memory);
    if let Some(event) = scaled.event {
        plan.tell(None, event);
    }
    gates::set(&census, &mut plan);
    scale::bury(&census, &mut plan);
    scale::create(&census, &mut plan);
    if census.desired == 0 {
        scale::delete_all(&census, &mut plan);
    } else {
        drains::go_on(&census, &mut plan);
        choice::choose(&census, &mut plan);
        rebalance::even_out(&census, &mut plan);
    }
    plan.progress = progress::progress(&census, plan.blocked.as_deref());
    plan.look_again_within(census.look_again_within());
    if let Some(at) = scaled.look_at {
        plan.look_again_at(at, now);
    }
    plan
}
