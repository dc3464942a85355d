//! Which topics this gateway has subscribers for, in which of its shards, and whether the topics' owners know it.
//!
//! Soft state: the registry forgets it with the connection to us, and is told again from here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use carillon_proto::filter_tree::FilterTree;
use carillon_proto::{topic, v1};
use parking_lot::{Mutex, RwLock};

/// Shards of one gateway: a bit each.
pub type ShardSet = u64;
/// Most shards a gateway can have.
pub const MAX_SHARDS: usize = 64;

#[derive(Default)]
struct Route {
    shards: ShardSet,
    announced: bool,
    /// seq of the last stored message on the topic that has reached this gateway, or that was there before it joined.
    last: u64,
    /// The topic has a retained message, as far as is known here.
    has_retained: bool,
    waiters: Vec<Waiter>,
}

#[derive(Default)]
struct WildRoute {
    shards: ShardSet,
    announced_to: HashSet<Arc<str>>,
    waiters: Vec<Waiter>,
}

/// What is known of a topic whose route is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteState {
    /// The last stored seq that has come by, or was there before; 0 for filters with wildcards.
    pub last: u64,
    /// It may have a retained message.
    pub has_retained: bool,
}

impl RouteState {
    /// Of a filter with wildcards nothing is known but that messages come.
    const WILD: RouteState = RouteState { last: 0, has_retained: true };
    /// Of a share its home knows where it is; retained messages are not sent (MQTT 5.0 §4.8.2).
    pub const SHARE: RouteState = RouteState { last: 0, has_retained: false };
}

/// Who waits for a route to be in force. Called once, or dropped when the route goes before.
pub type Waiter = Box<dyn FnOnce(RouteState) + Send + Sync>;

/// How a subscriber joins a route.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    /// In force already.
    Ready(RouteState),
    /// The waiter is called once the owner has put it in force. `announce`: nobody has asked the owner yet.
    Wait { announce: bool },
}

/// A route is in force now.
#[derive(Default)]
#[must_use]
pub struct InForce {
    /// These shards have missed messages: the route was in force before, and the log has grown since.
    pub missed: ShardSet,
    waiters: Vec<Waiter>,
    state: Option<RouteState>,
}

impl InForce {
    /// Tells who waits. Not done under the table's locks: a waiter may go on to join or leave.
    pub fn tell(self) {
        if let Some(state) = self.state {
            for waiter in self.waiters {
                waiter(state);
            }
        }
    }
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
    pub fn join(&self, topic: &Arc<str>, shard: usize, waiter: impl FnOnce() -> Waiter) -> Joined {
        let mut slot = self.slot(topic).lock();
        let announce = !slot.contains_key(topic);
        let route = slot.entry(topic.clone()).or_default();
        route.shards |= 1 << shard;
        if route.announced {
            return Joined::Ready(RouteState { last: route.last, has_retained: route.has_retained });
        }
        route.waiters.push(waiter());
        Joined::Wait { announce }
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

    /// The owner has put the route in force, its log ending at `head`.
    pub fn in_force(&self, topic: &str, head: u64, has_retained: bool) -> InForce {
        let mut slot = self.slot(topic).lock();
        let Some(route) = slot.get_mut(topic) else { return InForce::default() };
        let missed = if route.announced && head > route.last { route.shards } else { 0 };
        route.last = route.last.max(head);
        route.announced = true;
        // A retained message may have come by since the owner looked.
        route.has_retained |= has_retained;
        let state = Some(RouteState { last: route.last, has_retained: route.has_retained });
        InForce { missed, waiters: std::mem::take(&mut route.waiters), state }
    }

    /// Topics of a slot, with the last stored seq seen: to be announced to its new owner.
    pub fn topics_of_slot(&self, slot: u32) -> Vec<(Arc<str>, u64)> {
        self.slots[slot as usize].lock().iter().map(|(topic, route)| (topic.clone(), route.last)).collect()
    }

    /// The shards that are to get a message; notes what it changes.
    pub fn shards_for(&self, message: &v1::Message) -> ShardSet {
        let mut shards = 0;
        if let Some(route) = self.slot(&message.topic).lock().get_mut(message.topic.as_str()) {
            shards = route.shards;
            if message.stored {
                route.last = route.last.max(message.seq);
            }
            if message.retain {
                route.has_retained = !message.payload.is_empty();
            }
        }
        if self.wild_count.load(Ordering::Acquire) > 0 {
            self.wild.read().matching(&message.topic, |route| shards |= route.shards);
        }
        shards
    }

    /// The last stored seq on the topic that has come by.
    pub fn last(&self, topic: &str) -> u64 {
        self.state(topic).1
    }

    /// A shard has a subscriber for this filter with wildcards; `registries` are those that must know of it.
    pub fn join_wild(
        &self,
        filter: &Arc<str>,
        shard: usize,
        registries: &[Arc<str>],
        waiter: impl FnOnce() -> Waiter,
    ) -> Joined {
        let mut wild = self.wild.write();
        let announce = self.wild_filters.lock().insert(filter.clone());
        if announce {
            self.wild_count.fetch_add(1, Ordering::AcqRel);
        }
        let route = wild.entry(filter);
        route.shards |= 1 << shard;
        if !registries.is_empty() && registries.iter().all(|registry| route.announced_to.contains(registry)) {
            return Joined::Ready(RouteState::WILD);
        }
        route.waiters.push(waiter());
        Joined::Wait { announce }
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
    pub fn wild_in_force(&self, filter: &str, by: &Arc<str>, registries: &[Arc<str>]) -> InForce {
        let mut wild = self.wild.write();
        let Some(route) = wild.get_mut(filter) else { return InForce::default() };
        route.announced_to.insert(by.clone());
        if !registries.iter().all(|registry| route.announced_to.contains(registry)) {
            return InForce::default();
        }
        let waiters = std::mem::take(&mut route.waiters);
        InForce { missed: 0, waiters, state: Some(RouteState::WILD) }
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

    type Heard = Arc<Mutex<Vec<RouteState>>>;

    fn waiter(heard: &Heard) -> Waiter {
        let heard = heard.clone();
        Box::new(move |state| heard.lock().push(state))
    }

    fn message(topic: &str, seq: u64) -> v1::Message {
        v1::Message { topic: topic.to_owned(), seq, stored: true, ..v1::Message::default() }
    }

    fn state(last: u64, has_retained: bool) -> RouteState {
        RouteState { last, has_retained }
    }

    #[test]
    fn the_first_to_join_announces_and_the_last_to_leave_withdraws() {
        let routes = Routes::default();
        let heard = Heard::default();
        let topic: Arc<str> = "demo/u/alice".into();
        let join = |shard| routes.join(&topic, shard, || waiter(&heard));
        assert_eq!(join(0), Joined::Wait { announce: true });
        assert_eq!(join(1), Joined::Wait { announce: false });
        let in_force = routes.in_force(&topic, 7, false);
        assert_eq!((in_force.missed, heard.lock().len()), (0, 0));
        in_force.tell();
        assert_eq!(*heard.lock(), [state(7, false), state(7, false)]);
        assert_eq!(join(2), Joined::Ready(state(7, false)));
        assert_eq!(routes.shards_for(&message(&topic, 8)), 0b111);
        assert_eq!(routes.last(&topic), 8);
        assert!(!routes.leave(&topic, 0) && !routes.leave(&topic, 1) && routes.leave(&topic, 2));
        assert_eq!(routes.len(), 0);
    }

    #[test]
    fn an_owner_that_comes_back_with_a_longer_log_shows_who_missed_something() {
        let routes = Routes::default();
        let topic: Arc<str> = "demo/u/alice".into();
        routes.join(&topic, 3, || waiter(&Heard::default()));
        for (head, missed) in [(5, 0), (5, 0), (6, 1 << 3)] {
            assert_eq!(routes.in_force(&topic, head, false).missed, missed);
        }
    }

    #[test]
    fn whether_there_is_a_retained_message_is_followed() {
        let routes = Routes::default();
        let topic: Arc<str> = "demo/weather".into();
        let retained = || match routes.join(&topic, 0, || waiter(&Heard::default())) {
            Joined::Ready(state) => Some(state.has_retained),
            Joined::Wait { .. } => None,
        };
        assert_eq!(retained(), None);
        routes.in_force(&topic, 0, true).tell();
        assert_eq!(retained(), Some(true));
        let clear = v1::Message { retain: true, ..message(&topic, 1) };
        routes.shards_for(&clear);
        assert_eq!(retained(), Some(false));
        routes.shards_for(&message(&topic, 2));
        assert_eq!(retained(), Some(false));
        routes.shards_for(&v1::Message { payload: "rain".into(), ..clear });
        assert_eq!(retained(), Some(true));
    }

    #[test]
    fn a_wildcard_is_in_force_when_every_registry_has_it() {
        let routes = Routes::default();
        let heard = Heard::default();
        let filter: Arc<str> = "demo/g/#".into();
        let both: Vec<Arc<str>> = vec!["a".into(), "b".into()];
        let join = || routes.join_wild(&filter, 1, &both, || waiter(&heard));
        assert_eq!(join(), Joined::Wait { announce: true });
        routes.wild_in_force(&filter, &both[0], &both).tell();
        assert!(heard.lock().is_empty());
        routes.wild_in_force(&filter, &both[1], &both).tell();
        assert_eq!(*heard.lock(), [RouteState::WILD]);
        assert_eq!(routes.shards_for(&message("demo/g/x", 1)), 1 << 1);
        routes.wild_forgotten("a");
        assert_eq!(join(), Joined::Wait { announce: false });
        assert!(routes.leave_wild(&filter, 1));
        assert_eq!(routes.shards_for(&message("demo/g/x", 1)), 0);
    }
}
