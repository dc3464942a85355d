//! Receiving what filters match, as gateways do: attached to every registry instance, with a route for each filter.
//!
//! Whoever receives gives each of its tasks an [`Inlet`]. What does not go through it, because its queue was full, a
//! stream was lost or an owner has moved, is found in the logs: `refresh` says when there is reason to look.

mod attached;
mod routed;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use carillon_agent::{Instance, Role};
use carillon_proto::filter_tree::FilterTree;
use carillon_proto::{topic, v1};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::routed::Routed;
use crate::peers::{Directory, GRPC};

/// Messages that wait to be taken from an inlet.
const INLET: usize = 10_000;

/// Where messages for a task go in.
#[derive(Clone)]
pub struct Inlet {
    live: mpsc::Sender<v1::Message>,
    /// The logs have, or may have, what was not delivered live.
    pub refresh: Arc<Notify>,
    dropped: prometheus::IntCounter,
}

impl Inlet {
    /// `dropped` counts what did not fit in, and is in no log.
    pub fn new(dropped: prometheus::IntCounter) -> (Inlet, mpsc::Receiver<v1::Message>) {
        let (live, receiver) = mpsc::channel(INLET);
        (Inlet { live, refresh: Arc::default(), dropped }, receiver)
    }

    /// Never waits: whoever's queue is full looks into the logs later.
    fn offer(&self, message: &v1::Message) {
        if self.live.try_send(message.clone()).is_err() {
            if message.stored {
                self.refresh.notify_one();
            } else {
                self.dropped.inc();
            }
        }
    }
}

/// Filters, and where what they match goes.
#[derive(Default)]
pub struct Routes {
    by_filter: BTreeMap<Arc<str>, Vec<Inlet>>,
    tree: FilterTree<Vec<Inlet>>,
}

impl FromIterator<(Arc<str>, Inlet)> for Routes {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, Inlet)>>(routes: I) -> Self {
        let mut all = Routes::default();
        for (filter, inlet) in routes {
            all.tree.entry(&filter).push(inlet.clone());
            all.by_filter.entry(filter).or_default().push(inlet);
        }
        all
    }
}

/// Who receives.
pub struct Identity {
    /// Of the hub's instance, and what in it receives: `{instance}/{name}`.
    pub name: String,
    pub incarnation: u64,
}

/// Attached to the registries until it is stopped.
pub struct Receivers {
    shared: Arc<Shared>,
}

struct Shared {
    identity: Identity,
    directory: Directory,
    routes: watch::Sender<Arc<Routes>>,
    routed: Routed,
}

impl Receivers {
    /// Attaches at once; nothing comes before there are routes.
    pub fn start(identity: Identity, directory: Directory, stop: CancellationToken) -> Receivers {
        let routes = watch::Sender::new(Arc::default());
        let shared = Arc::new(Shared { identity, directory, routes, routed: Routed::default() });
        let follow = follow_registries(shared.clone(), stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(follow));
        Receivers { shared }
    }

    /// From now on these are wanted.
    pub fn set(&self, routes: Routes) {
        self.shared.routes.send_replace(Arc::new(routes));
    }

    /// Do all registries that must know of it send what this filter matches?
    pub fn is_routed(&self, filter: &str) -> bool {
        let Shared { directory, routed, .. } = &*self.shared;
        if topic::is_wildcard(filter) {
            let registries = directory.instances(Role::Registry);
            let knows = |instance: &Instance| routed.has(filter, &instance.id, instance.incarnation);
            !registries.is_empty() && registries.iter().all(knows)
        } else {
            let slots = directory.slots();
            let owner = slots.owner_of(filter);
            owner.is_some_and(|(_, owner)| routed.has(filter, &owner.instance, owner.incarnation))
        }
    }
}

impl Shared {
    /// A registry has gone. What it had stored and not sent is in the logs, and the owners that follow it may know our
    /// wildcards since long: they announce nothing.
    fn look_at_the_logs(&self) {
        let routes = self.routes.borrow();
        let wild = routes.by_filter.iter().filter(|(filter, _)| topic::is_wildcard(filter));
        wild.flat_map(|(_, inlets)| inlets).for_each(|inlet| inlet.refresh.notify_one());
    }
}

/// Keeps attached to each registry instance.
async fn follow_registries(shared: Arc<Shared>, stop: CancellationToken) {
    let mut registries = shared.directory.watch(Role::Registry);
    let mut receivers: HashMap<(String, u64, String), CancellationToken> = HashMap::new();
    loop {
        let found = registries.borrow_and_update().clone();
        let alive: HashMap<(String, u64, String), &Instance> = found
            .iter()
            .filter_map(|instance| {
                let address = instance.addresses.get(GRPC)?.clone();
                Some(((instance.id.clone(), instance.incarnation, address), instance))
            })
            .collect();
        receivers.retain(|key, stop| {
            let is_alive = alive.contains_key(key);
            if !is_alive {
                stop.cancel();
                shared.routed.lost(&key.0, key.1);
                shared.look_at_the_logs();
            }
            is_alive
        });
        for (key, instance) in alive {
            receivers.entry(key).or_insert_with(|| {
                let stop = stop.child_token();
                let task = attached::run(shared.clone(), instance.clone());
                tokio::spawn(stop.clone().run_until_cancelled_owned(task));
                stop
            });
        }
        if registries.changed().await.is_err() {
            // The agent has gone, and so has the process.
            return;
        }
    }
}
