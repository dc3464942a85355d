//! The leader's task that keeps the assignment of slots true, and the call of an owner that has given slots up.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::keys;
use carillon_proto::topic::SLOTS;
use carillon_proto::v1;
use prost::Message as _;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use super::{Assignment, Owner, Present, Slot, assign};
use crate::core::{Core, compare_mod_revision, put};
use crate::raft::{Leadership, Unavailable};
use crate::state::{Changes, State};

/// A write that others keep getting in the way of is given up after this many attempts.
const ATTEMPTS: usize = 8;

/// The assignment as it is, and the revision at which it was written.
fn current(state: &State) -> (u64, Assignment) {
    let item = state.get(keys::SLOTS);
    let record = item.and_then(|item| v1::SlotRecord::decode(item.value.clone()).ok());
    let assignment = record.as_ref().map(Assignment::from_record).unwrap_or_default();
    (item.map_or(0, |item| item.mod_revision), assignment)
}

fn change(mod_revision: u64, next: &Assignment) -> v1::TxnRequest {
    v1::TxnRequest {
        compare: vec![compare_mod_revision(keys::SLOTS, mod_revision)],
        then: vec![put(keys::SLOTS, &next.to_record(), 0)],
        otherwise: Vec::new(),
    }
}

/// Since when slots have been on their way, by number and epoch. In the leader's memory: another leader gives the owners
/// their time again.
#[derive(Debug, Default)]
struct Waits {
    since: HashMap<(usize, u64), Instant>,
}

impl Waits {
    fn follow(&mut self, assignment: &Assignment, now: Instant) {
        let before = std::mem::take(&mut self.since);
        self.since =
            assignment.moving().map(|moving| (moving, before.get(&moving).copied().unwrap_or(now))).collect();
    }

    fn is_over(&self, number: usize, slot: &Slot, limit: Duration, now: Instant) -> bool {
        self.since.get(&(number, slot.epoch)).is_some_and(|since| *since + limit <= now)
    }

    /// When the first of them has had its time.
    fn next(&self, limit: Duration) -> Option<Instant> {
        self.since.values().min().map(|since| *since + limit)
    }
}

/// Keeps the assignment true for as long as this node leads.
pub(crate) async fn run(core: Arc<Core>) {
    let mut leadership = core.node.leadership();
    loop {
        let leader = *leadership.borrow_and_update();
        let outcome = match leader {
            Some(leader) => tokio::select! {
                outcome = lead(&core, leader) => outcome,
                changed = leadership.changed() => changed.map_err(|_| Unavailable::Failed("it has stopped".to_owned())),
                () = core.stop.cancelled() => return,
            },
            None => tokio::select! {
                changed = leadership.changed() => changed.map_err(|_| Unavailable::Failed("it has stopped".to_owned())),
                () = core.stop.cancelled() => return,
            },
        };
        if let Err(error) = outcome {
            if core.node.failure().borrow().is_some() {
                return;
            }
            tracing::warn!(%error, "slots not assigned, trying again");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

async fn lead(core: &Core, leader: Leadership) -> Result<(), Unavailable> {
    // What former leaders have decided comes first.
    core.node.linearize().await?;
    let mut revisions = core.node.revision();
    let watched = [keys::INSTANCES.to_owned(), keys::SLOTS.to_owned()];
    let limit = core.limits.slot_hand_over;
    let mut waits = Waits::default();
    let mut seen = None;
    loop {
        revisions.mark_unchanged();
        let work = {
            let state = core.node.state();
            let now = state.revision();
            let concerned = seen.is_none_or(|seen| match state.changes(&watched, seen, 1) {
                Changes::Up { events, .. } => !events.is_empty(),
                Changes::Compacted(_) | Changes::Ahead(_) => true,
            });
            seen = Some(now);
            concerned.then(|| (current(&state), Present::of(&state)))
        };
        if let Some(((mod_revision, previous), present)) = work {
            let now = Instant::now();
            waits.follow(&previous, now);
            let overdue = |number: usize, slot: &Slot| waits.is_over(number, slot, limit, now);
            let next = assign(&previous, &present, overdue);
            if next != previous {
                let pairs = || next.slots.iter().zip(&previous.slots);
                let moved = pairs().filter(|(next, before)| next.epoch != before.epoch).count();
                let told = pairs()
                    .filter(|(next, before)| next.moving_to.is_some() && next.moving_to != before.moving_to);
                let told = told.count();
                let late = previous
                    .moving()
                    .filter(|(number, epoch)| next.slots[*number].epoch != *epoch)
                    .filter(|(number, _)| overdue(*number, &previous.slots[*number]))
                    .count();
                let txn = change(mod_revision, &next);
                let applied = core.node.propose_as(leader, v1::KeeperEntry { txn: Some(txn) }).await?;
                if !applied.txn.is_some_and(|txn| txn.succeeded) {
                    seen = None;
                    continue;
                }
                core.metrics.slots_moved.inc_by(moved as u64);
                tracing::info!(moved, told, owners = present.candidates.len(), "slots assigned");
                if late > 0 {
                    tracing::warn!(
                        slots = late,
                        "owners did not give up slots in time, they are taken from them"
                    );
                }
            }
        }
        let over = waits.next(limit);
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return Ok(()) },
            () = sleep_until(over.unwrap_or_else(Instant::now)), if over.is_some() => seen = None,
        }
    }
}

impl Core {
    /// An owner has finished with slots that are to go to others.
    pub(crate) async fn yield_slots(
        &self,
        request: v1::YieldSlotsRequest,
    ) -> Result<v1::YieldSlotsResponse, Status> {
        if request.slots.len() > SLOTS as usize {
            let text = format!("{} slots are given up, there are {SLOTS}", request.slots.len());
            return Err(Status::invalid_argument(text));
        }
        let owner = Owner { instance: request.instance, incarnation: request.incarnation };
        let given_up: Vec<(u32, u64)> = request.slots.iter().map(|slot| (slot.slot, slot.epoch)).collect();
        for attempt in 0..ATTEMPTS {
            // What is here mostly is new enough, and the compare sees to it that it was: a round less, during which nobody
            // takes messages of these slots.
            if attempt > 0 {
                self.node.linearize().await?;
            }
            let (mod_revision, next, moved) = {
                let state = self.node.state();
                let (mod_revision, mut next) = current(&state);
                let moved = next.yielded(&owner, &given_up, &Present::of(&state).living);
                (mod_revision, next, moved)
            };
            if moved == 0 {
                if attempt == 0 {
                    continue;
                }
                return Ok(v1::YieldSlotsResponse { moved: 0 });
            }
            if self.write(change(mod_revision, &next)).await?.is_some() {
                self.metrics.slots_moved.inc_by(moved as u64);
                tracing::info!(moved, from = owner.instance, "slots handed over");
                return Ok(v1::YieldSlotsResponse { moved: moved as u32 });
            }
        }
        Err(Status::aborted("the slots keep changing"))
    }
}
