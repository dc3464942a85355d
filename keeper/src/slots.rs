//! Who owns which slot: a pure function of what was and who is alive, and the leader's task that keeps it true.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_agent::keys;
use carillon_proto::topic::SLOTS;
use carillon_proto::v1;
use prost::Message as _;

use crate::core::{Core, compare_mod_revision, put};
use crate::raft::{Leadership, Unavailable};
use crate::state::{Changes, State};

/// The role whose instances own slots.
const ROLE: &str = "registry";

/// An instance that may own slots.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub instance: String,
    pub incarnation: u64,
}

/// Who owns each slot, and since which epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// `SLOTS` of them.
    slots: Vec<(Option<Owner>, u64)>,
}

impl Default for Assignment {
    fn default() -> Self {
        Assignment { slots: vec![(None, 0); SLOTS as usize] }
    }
}

/// The next assignment: even to within one slot, nobody loses a slot that need not, and the epoch of each slot whose
/// owner or owner's incarnation changes grows.
pub(crate) fn assign(previous: &Assignment, instances: &[Owner]) -> Assignment {
    let alive: BTreeMap<&str, &Owner> =
        instances.iter().map(|owner| (owner.instance.as_str(), owner)).collect();
    let mut held: BTreeMap<&str, Vec<usize>> = alive.keys().map(|&id| (id, Vec::new())).collect();
    let mut free = Vec::new();
    for (slot, (owner, _)) in previous.slots.iter().enumerate() {
        match owner.as_ref().and_then(|owner| held.get_mut(owner.instance.as_str())) {
            Some(slots) => slots.push(slot),
            None => free.push(slot),
        }
    }
    // Who holds most keeps the odd slot: that moves least.
    let mut order: Vec<&str> = held.keys().copied().collect();
    order.sort_by_key(|id| (std::cmp::Reverse(held[id].len()), *id));
    let count = order.len().max(1);
    let share = |place: usize| SLOTS as usize / count + usize::from(place < SLOTS as usize % count);
    for (place, id) in order.iter().enumerate() {
        if let Some(slots) = held.get_mut(id) {
            let keep = share(place).min(slots.len());
            free.extend(slots.drain(keep..));
        }
    }
    free.sort_unstable();
    let mut free = free.into_iter();
    for (place, id) in order.iter().enumerate() {
        if let Some(slots) = held.get_mut(id) {
            let missing = share(place) - slots.len();
            slots.extend(free.by_ref().take(missing));
        }
    }
    let mut next: Vec<Option<Owner>> = vec![None; SLOTS as usize];
    for (id, slots) in &held {
        for &slot in slots {
            next[slot] = Some(alive[id].clone());
        }
    }
    let slots = next.into_iter().zip(&previous.slots).map(|(owner, (before, epoch))| {
        let epoch = if owner == *before { *epoch } else { epoch + 1 };
        (owner, epoch)
    });
    Assignment { slots: slots.collect() }
}

impl Assignment {
    fn to_record(&self) -> v1::SlotRecord {
        let mut record = v1::SlotRecord::default();
        let mut places: BTreeMap<&Owner, u32> = BTreeMap::new();
        for (owner, epoch) in &self.slots {
            let place = owner.as_ref().map_or(0, |owner| {
                *places.entry(owner).or_insert_with(|| {
                    let Owner { instance, incarnation } = owner.clone();
                    record.owners.push(v1::slot_record::Owner { instance, incarnation });
                    record.owners.len() as u32
                })
            });
            record.owner_of.push(place);
            record.epochs.push(*epoch);
        }
        record
    }

    fn from_record(record: &v1::SlotRecord) -> Self {
        let mut assignment = Assignment::default();
        let both = record.owner_of.iter().zip(&record.epochs);
        for (slot, (place, epoch)) in assignment.slots.iter_mut().zip(both) {
            let owner = (*place as usize).checked_sub(1).and_then(|place| record.owners.get(place));
            let owner = owner.map(|o| Owner { instance: o.instance.clone(), incarnation: o.incarnation });
            *slot = (owner, *epoch);
        }
        assignment
    }
}

/// Who may own slots. When all of them drain, they go on until there is somebody else.
fn candidates(state: &State) -> Vec<Owner> {
    let instances = state.prefix(keys::INSTANCES).filter_map(|(key, item)| {
        v1::InstanceRecord::decode(item.value.clone())
            .inspect_err(|error| tracing::warn!(key, %error, "instance record cannot be read"))
            .ok()
    });
    let (active, draining): (Vec<_>, Vec<_>) = instances
        .filter(|instance| instance.roles.iter().any(|role| role == ROLE))
        .partition(|instance| !instance.draining);
    let chosen = if active.is_empty() { draining } else { active };
    chosen.into_iter().map(|i| Owner { instance: i.id, incarnation: i.incarnation }).collect()
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
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    }
}

async fn lead(core: &Core, leader: Leadership) -> Result<(), Unavailable> {
    // What former leaders have decided comes first.
    core.node.linearize().await?;
    let mut revisions = core.node.revision();
    let watched = [keys::INSTANCES.to_owned(), keys::SLOTS.to_owned()];
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
            concerned.then(|| {
                let item = state.get(keys::SLOTS);
                let record = item.and_then(|item| v1::SlotRecord::decode(item.value.clone()).ok());
                let previous = record.as_ref().map(Assignment::from_record).unwrap_or_default();
                (item.map_or(0, |item| item.mod_revision), previous, candidates(&state))
            })
        };
        if let Some((mod_revision, previous, candidates)) = work {
            let next = assign(&previous, &candidates);
            if next != previous {
                let moved = next
                    .slots
                    .iter()
                    .zip(&previous.slots)
                    .filter(|(next, before)| next.1 != before.1)
                    .count();
                let txn = v1::TxnRequest {
                    compare: vec![compare_mod_revision(keys::SLOTS, mod_revision)],
                    then: vec![put(keys::SLOTS, &next.to_record(), 0)],
                    otherwise: Vec::new(),
                };
                let applied = core.node.propose_as(leader, v1::KeeperEntry { txn: Some(txn) }).await?;
                if applied.txn.is_some_and(|txn| txn.succeeded) {
                    core.metrics.slots_moved.inc_by(moved as u64);
                    tracing::info!(moved, owners = candidates.len(), "slots assigned");
                } else {
                    seen = None;
                    continue;
                }
            }
        }
        if revisions.changed().await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
