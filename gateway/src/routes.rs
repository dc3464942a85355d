//! Which topics this gateway has subscribers for, in which of its shards, and whether the topics' owners know it.
//!
//! Soft state: the registry forgets it with the connection to us, and is told again from here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use carillon_proto::filter_tree::FilterTree;
use carillon_proto::topic;
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;

/// Shards of one gateway: a bit each.
pub type ShardSet = u64;
/// Most shards a gateway can have.
pub const MAX_SHARDS: usize = 64;

#[derive(Debug, Default)]
struct Route {
    shards: ShardSet,
    announced: bool,
    /// seq of the last stored message on the topic that has reached this gateway, or that was there before it joined.
    last: u64,
    waiters: Vec<oneshot::Sender<u64>>,
}

#[derive(Debug, Default)]
struct WildRoute {
    shards: ShardSet,
    announced_to: HashSet<Arc<str>>,
    waiters: Vec<oneshot::Sender<u64>>,
}

/// How a subscriber joins a route.
pub enum Joined {
    /// In force already; the last stored seq that has come by.
    Ready(u64),
    /// Resolves with it once the owner has put the route in force. `announce`: nobody has asked the owner yet.
    Wait { in_force: oneshot::Receiver<u64>, announce: bool },
}

type Slot = Mutex<HashMap<Arc<str>, Route>>;

/// The table; by slot, so that a slot that moves is announced again without looking at the others.
pub struct Routes {
    slots: Box<[Slot]>,
    wild: RwLock<FilterTree<WildRoute>>,
    wild_filters: Mutex<HashSet<Arc<str>>>,
    wild_count: AtomicUsize,
}

impl Default for Routes {
    fn default() -> Self {
        Routes {
            slots: (0..topic::SLOTS).map(|_| Mutex::default()).collect(),
            wild: RwLock::default(),
            wild_filters: Mutex::default(),
            wild_count: AtomicUsize::new(0),
        }
    }
}

impl Routes {
    fn slot(&self, topic: &str) -> &Slot {
        &self.slots[topic::slot_of(topic) as usize]
    }

    /// A shard has a subscriber for this topic name.
    pub fn join(&self, topic: &Arc<str>, shard: usize) -> Joined {
        let mut slot = self.slot(topic).lock();
        let announce = !slot.contains_key(topic);
        let route = slot.entry(topic.clone()).or_default();
        route.shards |= 1 << shard;
        if route.announced {
            return Joined::Ready(route.last);
        }
        let (waiter, in_force) = oneshot::channel();
        route.waiters.push(waiter);
        Joined::Wait { in_force, announce }
    }

    /// A shard has no subscriber for it any more. True: nor has any other, so the owner is to be told.
    pub fn leave(&self, topic: &str, shard: usize) -> bool {
        let mut slot = self.slot(topic).lock();
        let Some(route) = slot.get_mut(topic) else { return false };
        route.shards &= !(1 << shard);
        if route.shards != 0 {
            return false;
        }
        slot.remove(topic);
        // The map keeps its table for ever otherwise: a slot that once had a million topics would stay that large.
        if slot.is_empty() {
            slot.shrink_to_fit();
        }
        true
    }

    /// What to tell the owner of this topic now: present or not, and the last stored seq seen.
    pub fn state(&self, topic: &str) -> (bool, u64) {
        self.slot(topic).lock().get(topic).map_or((false, 0), |route| (true, route.last))
    }

    /// The owner has put the route in force, its log ending at `head`. Some(shards): these have missed messages,
    /// because the route was in force before and the log has grown since.
    pub fn in_force(&self, topic: &str, head: u64) -> Option<ShardSet> {
        let mut slot = self.slot(topic).lock();
        let route = slot.get_mut(topic)?;
        let missed = route.announced && head > route.last;
        route.last = route.last.max(head);
        route.announced = true;
        for waiter in route.waiters.drain(..) {
            let _ = waiter.send(route.last);
        }
        missed.then_some(route.shards)
    }

    /// Topics of a slot, with the last stored seq seen: to be announced to its new owner.
    pub fn topics_of_slot(&self, slot: u32) -> Vec<(Arc<str>, u64)> {
        self.slots[slot as usize].lock().iter().map(|(topic, route)| (topic.clone(), route.last)).collect()
    }

    /// The shards that are to get a message; notes its seq if it is stored.
    pub fn shards_for(&self, topic: &str, stored_seq: Option<u64>) -> ShardSet {
        let mut shards = 0;
        if let Some(route) = self.slot(topic).lock().get_mut(topic) {
            shards = route.shards;
            if let Some(seq) = stored_seq {
                route.last = route.last.max(seq);
            }
        }
        if self.wild_count.load(Ordering::Acquire) > 0 {
            self.wild.read().matching(topic, |route| shards |= route.shards);
        }
        shards
    }

    /// The last stored seq on the topic that has come by.
    pub fn last(&self, topic: &str) -> u64 {
        self.state(topic).1
    }

    /// A shard has a subscriber for this filter with wildcards; `registries` are those that must know of it.
    pub fn join_wild(&self, filter: &Arc<str>, shard: usize, registries: &[Arc<str>]) -> Joined {
        let mut wild = self.wild.write();
        let announce = self.wild_filters.lock().insert(filter.clone());
        if announce {
            self.wild_count.fetch_add(1, Ordering::AcqRel);
        }
        let route = wild.entry(filter);
        route.shards |= 1 << shard;
        if !registries.is_empty() && registries.iter().all(|registry| route.announced_to.contains(registry)) {
            return Joined::Ready(0);
        }
        let (waiter, in_force) = oneshot::channel();
        route.waiters.push(waiter);
        Joined::Wait { in_force, announce }
    }

    /// As [`leave`](Self::leave).
    pub fn leave_wild(&self, filter: &str, shard: usize) -> bool {
        let mut wild = self.wild.write();
        let Some(route) = wild.get_mut(filter) else { return false };
        route.shards &= !(1 << shard);
        if route.shards != 0 {
            return false;
        }
        wild.remove(filter);
        self.wild_filters.lock().remove(filter);
        self.wild_count.fetch_sub(1, Ordering::AcqRel);
        true
    }

    pub fn is_wild_present(&self, filter: &str) -> bool {
        self.wild.read().get(filter).is_some()
    }

    pub fn wild_filters(&self) -> Vec<Arc<str>> {
        self.wild_filters.lock().iter().cloned().collect()
    }

    /// A registry has put the filter in force; `registries` are all that there are.
    pub fn wild_in_force(&self, filter: &str, by: &Arc<str>, registries: &[Arc<str>]) {
        let mut wild = self.wild.write();
        let Some(route) = wild.get_mut(filter) else { return };
        route.announced_to.insert(by.clone());
        if registries.iter().all(|registry| route.announced_to.contains(registry)) {
            for waiter in route.waiters.drain(..) {
                let _ = waiter.send(0);
            }
        }
    }

    /// The stream to a registry ended: it knows nothing of us any more.
    pub fn wild_forgotten(&self, by: &str) {
        let filters = self.wild_filters();
        let mut wild = self.wild.write();
        for filter in filters {
            if let Some(route) = wild.get_mut(&filter) {
                route.announced_to.remove(by);
            }
        }
    }

    /// Topics and filters with subscribers.
    pub fn len(&self) -> usize {
        self.slots.iter().map(|slot| slot.lock().len()).sum::<usize>()
            + self.wild_count.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_join_announces_and_the_last_to_leave_withdraws() {
        let routes = Routes::default();
        let topic: Arc<str> = "demo/u/alice".into();
        let Joined::Wait { mut in_force, announce: true } = routes.join(&topic, 0) else {
            panic!("first must announce")
        };
        assert!(matches!(routes.join(&topic, 1), Joined::Wait { announce: false, .. }));
        assert_eq!(routes.in_force(&topic, 7), None);
        assert_eq!(in_force.try_recv(), Ok(7));
        assert!(matches!(routes.join(&topic, 2), Joined::Ready(7)));
        assert_eq!(routes.shards_for(&topic, Some(8)), 0b111);
        assert_eq!(routes.last(&topic), 8);
        assert!(!routes.leave(&topic, 0) && !routes.leave(&topic, 1) && routes.leave(&topic, 2));
        assert_eq!(routes.len(), 0);
    }

    #[test]
    fn an_owner_that_comes_back_with_a_longer_log_shows_who_missed_something() {
        let routes = Routes::default();
        let topic: Arc<str> = "demo/u/alice".into();
        routes.join(&topic, 3);
        assert_eq!(routes.in_force(&topic, 5), None);
        assert_eq!(routes.in_force(&topic, 5), None);
        assert_eq!(routes.in_force(&topic, 6), Some(1 << 3));
    }

    #[test]
    fn a_wildcard_is_in_force_when_every_registry_has_it() {
        let routes = Routes::default();
        let filter: Arc<str> = "demo/g/#".into();
        let both: Vec<Arc<str>> = vec!["a".into(), "b".into()];
        let Joined::Wait { mut in_force, announce: true } = routes.join_wild(&filter, 1, &both) else {
            panic!()
        };
        routes.wild_in_force(&filter, &both[0], &both);
        assert!(in_force.try_recv().is_err());
        routes.wild_in_force(&filter, &both[1], &both);
        assert_eq!(in_force.try_recv(), Ok(0));
        assert_eq!(routes.shards_for("demo/g/x", Some(1)), 1 << 1);
        routes.wild_forgotten("a");
        assert!(matches!(routes.join_wild(&filter, 1, &both), Joined::Wait { announce: false, .. }));
        assert!(routes.leave_wild(&filter, 1));
        assert_eq!(routes.shards_for("demo/g/x", Some(1)), 0);
    }
}
