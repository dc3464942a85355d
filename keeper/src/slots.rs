//! Who owns which slot: a pure function of what was and who is there. A slot whose owner lives goes over in two steps: the
//! owner is told that it is to give it up, and the other gets it when it has, or when that takes too long. ADR 16.
//!
//! [`keeping`] is the leader's task that keeps this true, and what owners that give slots up ask for.

pub(crate) mod keeping;

use std::collections::BTreeMap;

use carillon_agent::keys;
use carillon_proto::topic::SLOTS;
use carillon_proto::v1;
use prost::Message as _;

use crate::state::State;

/// The role whose instances own slots.
const ROLE: &str = "registry";

/// An instance that may own slots.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub instance: String,
    pub incarnation: u64,
}

/// Who owns a slot, since which epoch, and who is to get it when it is given up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    owner: Option<Owner>,
    epoch: u64,
    moving_to: Option<Owner>,
}

impl Slot {
    /// Under another owner, or another life of the same.
    fn goes_to(&self, owner: Option<Owner>) -> Slot {
        Slot { owner, epoch: self.epoch + 1, moving_to: None }
    }
}

/// All slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// `SLOTS` of them.
    slots: Vec<Slot>,
}

impl Default for Assignment {
    fn default() -> Self {
        Assignment { slots: vec![Slot::default(); SLOTS as usize] }
    }
}

/// Who is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Present {
    /// All that live.
    living: Vec<Owner>,
    /// Those among them that are to own slots.
    candidates: Vec<Owner>,
}

impl Present {
    /// When all that live drain, they go on until there is somebody else.
    pub(crate) fn of(state: &State) -> Present {
        let instances = state.prefix(keys::INSTANCES).filter_map(|(key, item)| {
            v1::InstanceRecord::decode(item.value.clone())
                .inspect_err(|error| tracing::warn!(key, %error, "instance record cannot be read"))
                .ok()
        });
        let instances: Vec<(bool, Owner)> = instances
            .filter(|instance| instance.roles.iter().any(|role| role == ROLE))
            .map(|i| (i.draining, Owner { instance: i.id, incarnation: i.incarnation }))
            .collect();
        let living: Vec<Owner> = instances.iter().map(|(_, owner)| owner.clone()).collect();
        let active: Vec<Owner> =
            instances.into_iter().filter(|(draining, _)| !draining).map(|(_, owner)| owner).collect();
        Present { candidates: if active.is_empty() { living.clone() } else { active }, living }
    }
}

/// Even to within one slot, and nobody loses a slot that need not. `held`: by slot, the candidate that has it, or is to
/// have it.
fn balance(held_by: &[Option<&str>], candidates: &[Owner]) -> Vec<Option<Owner>> {
    let alive: BTreeMap<&str, &Owner> =
        candidates.iter().map(|owner| (owner.instance.as_str(), owner)).collect();
    let mut held: BTreeMap<&str, Vec<usize>> = alive.keys().map(|&id| (id, Vec::new())).collect();
    let mut free = Vec::new();
    for (slot, holder) in held_by.iter().enumerate() {
        match holder.and_then(|holder| held.get_mut(holder)) {
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
    next
}

/// The next assignment. An owner that lives, in the same life, is told first; from one that does not, or that has had its
/// time (`overdue`), a slot goes at once. Its epoch grows with each change of owner, and of an owner's incarnation.
pub(crate) fn assign(
    previous: &Assignment,
    present: &Present,
    overdue: impl Fn(usize, &Slot) -> bool,
) -> Assignment {
    let is_candidate = |owner: &&Owner| present.candidates.iter().any(|one| one.instance == owner.instance);
    // A slot that is on its way counts as where it goes, so that one move is not taken back by the next.
    let held_by: Vec<Option<&str>> = previous
        .slots
        .iter()
        .map(|slot| {
            let holder = slot.moving_to.as_ref().filter(is_candidate).or(slot.owner.as_ref());
            holder.map(|owner| owner.instance.as_str())
        })
        .collect();
    let next = balance(&held_by, &present.candidates);
    let slots = previous.slots.iter().zip(next).enumerate().map(|(number, (slot, next))| {
        if slot.owner == next {
            return Slot { moving_to: None, ..slot.clone() };
        }
        let is_told = slot.owner.as_ref().is_some_and(|owner| present.living.contains(owner));
        match next {
            Some(next) if is_told && !overdue(number, slot) => Slot { moving_to: Some(next), ..slot.clone() },
            next => slot.goes_to(next),
        }
    });
    Assignment { slots: slots.collect() }
}

impl Assignment {
    /// What `owner` has finished with goes over, if it is (still) to: by slot and epoch. Not to somebody who has gone
    /// meanwhile: then the leader looks for another. Returns how many.
    fn yielded(&mut self, owner: &Owner, given_up: &[(u32, u64)], living: &[Owner]) -> usize {
        let mut moved = 0;
        for &(number, epoch) in given_up {
            let Some(slot) = self.slots.get_mut(number as usize) else { continue };
            if slot.epoch == epoch
                && slot.owner.as_ref() == Some(owner)
                && let Some(next) = slot.moving_to.clone().filter(|next| living.contains(next))
            {
                *slot = slot.goes_to(Some(next));
                moved += 1;
            }
        }
        moved
    }

    /// Slots that are on their way, with their epochs.
    fn moving(&self) -> impl Iterator<Item = (usize, u64)> {
        let moving = self.slots.iter().enumerate().filter(|(_, slot)| slot.moving_to.is_some());
        moving.map(|(number, slot)| (number, slot.epoch))
    }

    /// The largest epoch.
    pub(crate) fn newest(&self) -> u64 {
        self.slots.iter().map(|slot| slot.epoch).max().unwrap_or(0)
    }

    /// The same owners, each under this epoch.
    pub(crate) fn under(self, epoch: u64) -> Assignment {
        let slots = self.slots.into_iter().map(|slot| Slot { epoch, moving_to: None, ..slot });
        Assignment { slots: slots.collect() }
    }

    pub(crate) fn to_record(&self) -> v1::SlotRecord {
        let mut places: BTreeMap<&Owner, u32> = BTreeMap::new();
        let mut record = v1::SlotRecord::default();
        for slot in &self.slots {
            record.owner_of.push(place_of(slot.owner.as_ref(), &mut places));
            record.epochs.push(slot.epoch);
            record.moving_to.push(place_of(slot.moving_to.as_ref(), &mut places));
        }
        let mut owners: Vec<(&Owner, u32)> = places.into_iter().collect();
        owners.sort_unstable_by_key(|(_, place)| *place);
        let owners = owners.into_iter().map(|(owner, _)| v1::slot_record::Owner {
            instance: owner.instance.clone(),
            incarnation: owner.incarnation,
        });
        record.owners = owners.collect();
        // Nothing moves: as every version writes it.
        if record.moving_to.iter().all(|place| *place == 0) {
            record.moving_to.clear();
        }
        record
    }

    pub(crate) fn from_record(record: &v1::SlotRecord) -> Self {
        let owner_at = |place: u32| {
            let owner = (place as usize).checked_sub(1).and_then(|place| record.owners.get(place))?;
            Some(Owner { instance: owner.instance.clone(), incarnation: owner.incarnation })
        };
        let mut assignment = Assignment::default();
        let both = record.owner_of.iter().zip(&record.epochs);
        for (number, (slot, (&place, &epoch))) in assignment.slots.iter_mut().zip(both).enumerate() {
            let moving_to = owner_at(record.moving_to.get(number).copied().unwrap_or(0));
            *slot = Slot { owner: owner_at(place), epoch, moving_to };
        }
        assignment
    }
}

/// 1 + the place of an owner among those of a record; 0 = none.
fn place_of<'a>(owner: Option<&'a Owner>, places: &mut BTreeMap<&'a Owner, u32>) -> u32 {
    let next = places.len() as u32 + 1;
    owner.map_or(0, |owner| *places.entry(owner).or_insert(next))
}

#[cfg(test)]
mod tests;
