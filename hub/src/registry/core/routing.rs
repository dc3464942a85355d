//! Who gets a message: receivers by topic and by wildcard filter, and everyone while a slot is not whole.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use carillon_proto::filter_tree::FilterTree;

/// Number of an attach stream: unique within the process and growing.
pub type Receiver = u64;

/// The one at the other end of an attach stream.
#[derive(Debug, Clone)]
pub struct Attached {
    pub instance: Arc<str>,
    pub incarnation: u64,
    /// Not a gateway: gets what its routes match, also while a slot is not whole.
    pub routes_only: bool,
}

/// All that is known about receivers, apart from the routes by topic (these are kept with the topics).
#[derive(Debug, Default)]
pub struct Routing {
    attached: HashMap<Receiver, Attached>,
    /// Gateways that are attached, sorted.
    gateways: Vec<Receiver>,
    wildcards: FilterTree<Vec<Receiver>>,
    wildcards_of: HashMap<Receiver, HashSet<Box<str>>>,
    /// Gateways in discovery: instance id and incarnation.
    live: HashSet<(Arc<str>, u64)>,
}

impl Routing {
    pub fn attach(&mut self, receiver: Receiver, attached: Attached) {
        if !attached.routes_only
            && let Err(place) = self.gateways.binary_search(&receiver)
        {
            self.gateways.insert(place, receiver);
        }
        self.attached.insert(receiver, attached);
    }

    /// Forgets a receiver and its wildcards. False when it was not known.
    pub fn detach(&mut self, receiver: Receiver) -> bool {
        if self.attached.remove(&receiver).is_none() {
            return false;
        }
        if let Ok(place) = self.gateways.binary_search(&receiver) {
            self.gateways.remove(place);
        }
        for filter in self.wildcards_of.remove(&receiver).unwrap_or_default() {
            self.remove_wildcard(&filter, receiver);
        }
        true
    }

    pub fn get(&self, receiver: Receiver) -> Option<&Attached> {
        self.attached.get(&receiver)
    }

    pub fn set_live(&mut self, live: HashSet<(Arc<str>, u64)>) {
        self.live = live;
    }

    pub fn is_live(&self, instance: &Arc<str>, incarnation: u64) -> bool {
        self.live.contains(&(instance.clone(), incarnation))
    }

    pub fn set_wildcard(&mut self, filter: &str, receiver: Receiver, present: bool) {
        if !self.attached.contains_key(&receiver) {
            return;
        }
        let own = self.wildcards_of.entry(receiver).or_default();
        if present {
            if own.insert(filter.into()) {
                self.wildcards.entry(filter).push(receiver);
            }
        } else if own.remove(filter) {
            self.remove_wildcard(filter, receiver);
        }
    }

    fn remove_wildcard(&mut self, filter: &str, receiver: Receiver) {
        if let Some(receivers) = self.wildcards.get_mut(filter) {
            receivers.retain(|&other| other != receiver);
            if receivers.is_empty() {
                self.wildcards.remove(filter);
            }
        }
    }

    /// Has every gateway that lives said that it announced all it has? `complete`: those that have.
    pub fn is_whole(&self, complete: &HashSet<Receiver>) -> bool {
        if !self.gateways.iter().all(|gateway| complete.contains(gateway)) {
            return false;
        }
        self.live.iter().all(|(instance, incarnation)| {
            self.gateways.iter().any(|gateway| {
                let attached = &self.attached[gateway];
                attached.instance == *instance && attached.incarnation >= *incarnation
            })
        })
    }

    /// Who gets a message on `topic`, each once, sorted. `routes`: the receivers that announced this very topic.
    pub fn targets(&self, topic: &str, routes: &[Receiver], whole: bool) -> Vec<Receiver> {
        let mut targets = if whole { routes.to_vec() } else { [routes, &self.gateways].concat() };
        if !self.wildcards.is_empty() {
            self.wildcards.matching(topic, |receivers| targets.extend_from_slice(receivers));
        }
        if targets.len() > 1 {
            targets.sort_unstable();
            targets.dedup();
        }
        targets
    }
}
