//! This gateway in discovery: its addresses change with its listeners, and it leaves before its devices do.

use std::collections::BTreeMap;

use carillon_agent::{Agent, Instance};
use parking_lot::Mutex;

pub struct Registration {
    agent: Agent,
    instance: Mutex<Instance>,
}

impl Registration {
    /// Makes the instance discoverable.
    pub fn new(agent: Agent, instance: Instance) -> Registration {
        agent.register(instance.clone());
        Registration { agent, instance: Mutex::new(instance) }
    }

    /// What devices are told to connect to, by protocol.
    pub fn set_addresses(&self, addresses: BTreeMap<String, String>) {
        self.change(|instance| instance.addresses = addresses);
    }

    pub fn set_draining(&self, draining: bool) {
        self.change(|instance| instance.draining = draining);
    }

    fn change(&self, change: impl FnOnce(&mut Instance)) {
        let mut instance = self.instance.lock();
        let mut next = instance.clone();
        change(&mut next);
        if next != *instance {
            *instance = next.clone();
            // With the lock held, so that what is registered last is what was changed last.
            self.agent.register(next);
        }
    }
}
