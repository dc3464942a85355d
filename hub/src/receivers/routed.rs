//! Which registries are known to send what a filter matches.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

/// Instance ids, with incarnations.
type Registries = HashSet<(Arc<str>, u64)>;

#[derive(Default)]
pub struct Routed {
    by_filter: Mutex<HashMap<Arc<str>, Registries>>,
}

impl Routed {
    /// The route is in force at this registry instance (id and incarnation).
    pub fn add(&self, filter: &Arc<str>, instance: &str, incarnation: u64) {
        self.by_filter.lock().entry(filter.clone()).or_default().insert((instance.into(), incarnation));
    }

    /// It is not, or not any more.
    pub fn remove(&self, filter: &str, instance: &str, incarnation: u64) {
        let mut by_filter = self.by_filter.lock();
        if let Some(registries) = by_filter.get_mut(filter) {
            registries.remove(&(instance.into(), incarnation));
            if registries.is_empty() {
                by_filter.remove(filter);
            }
        }
    }

    /// The stream to this registry has ended: it knows nothing of us any more.
    pub fn lost(&self, instance: &str, incarnation: u64) {
        let gone: (Arc<str>, u64) = (instance.into(), incarnation);
        self.by_filter.lock().retain(|_, registries| {
            registries.remove(&gone);
            !registries.is_empty()
        });
    }

    pub fn has(&self, filter: &str, instance: &str, incarnation: u64) -> bool {
        let by_filter = self.by_filter.lock();
        by_filter.get(filter).is_some_and(|registries| registries.contains(&(instance.into(), incarnation)))
    }
}
