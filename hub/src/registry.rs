//! The owner of topics: sequences, has stored, and routes them; knows who is online; runs broadcasts. See ARCHITECTURE.md.
//!
//! The decisions are in [`core`], without I/O; [`worker`] runs a core for each share of the slots; [`attach`] holds the
//! streams to the gateways, [`broadcast`] the jobs, [`service`] the gRPC face. [`client`] is how others find an owner.

mod attach;
mod broadcast;
pub mod client;
mod core;
mod giving_up;
pub mod metrics;
mod service;
mod worker;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::document::Violation;
use carillon_agent::{Agent, Live, Role, SlotMap, app::App};
use carillon_proto::topic::{self, SLOTS};
use carillon_proto::v1::{self, registry_server::RegistryServer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::attach::message_bytes;
pub use self::client::{OwnerClient, PublishError};
use self::core::Limits;
pub use self::core::PresenceEvent;
use self::giving_up::GivingUp;
use self::service::{Service, Shared};
use self::worker::{Input, Slots, WorkerDeps, Workers};
use crate::config::{HubConfig, within};
use crate::peers::Directory;

/// Part `registry` of the `hub` document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Topics kept in memory that no gateway has subscribers for, per instance; the least recently used go first.
    pub idle_topics: u64,
    /// Publishes that may be unanswered, per instance; further ones are answered OVERLOADED.
    pub unanswered_messages: u64,
    /// Bytes of their payloads.
    pub unanswered_bytes: u64,
    /// Messages that may wait on the stream to one gateway; past it the stream is closed, and the gateway attaches
    /// again and catches up from the log.
    pub attach_queue_messages: u64,
    /// Their bytes.
    pub attach_queue_bytes: u64,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        RegistryConfig {
            idle_topics: 1_000_000,
            unanswered_messages: 262_144,
            unanswered_bytes: 256 * MIB,
            attach_queue_messages: 262_144,
            attach_queue_bytes: 128 * MIB,
        }
    }
}

const MIB: u64 = 1024 * 1024;

impl RegistryConfig {
    pub(crate) fn check(&self, path: &str, found: &mut Vec<Violation>) {
        within(found, format!("{path}.idle_topics"), self.idle_topics, 1000..=1_000_000_000);
        within(found, format!("{path}.unanswered_messages"), self.unanswered_messages, 1000..=10_000_000);
        within(found, format!("{path}.unanswered_bytes"), self.unanswered_bytes, 32 * MIB..=64 * 1024 * MIB);
        within(found, format!("{path}.attach_queue_messages"), self.attach_queue_messages, 1000..=10_000_000);
        within(
            found,
            format!("{path}.attach_queue_bytes"),
            self.attach_queue_bytes,
            32 * MIB..=64 * 1024 * MIB,
        );
    }

    /// Of one of `workers` cores.
    fn limits(&self, workers: usize) -> Limits {
        Limits {
            unanswered: (self.unanswered_messages as usize).div_ceil(workers),
            idle_topics: (self.idle_topics as usize).div_ceil(workers),
        }
    }
}

/// Where presence events go, below the app's level: `{app}/up/$presence`. The registry that sees the event publishes
/// it there as a stored message without a publisher, its payload a [`PresenceEvent`] in JSON; the coordinator
/// takes it from there. What devices publish to this topic has a publisher, and so is no presence event.
pub const PRESENCE_KIND: &str = "$presence";
/// Presence events that wait to be published; further ones are dropped and counted.
const PRESENCE_QUEUE: usize = 65_536;
/// Wills that wait to be published; further ones are dropped and counted.
const WILL_QUEUE: usize = 262_144;
/// How often jobs are tended.
const TEND: Duration = Duration::from_millis(250);
/// How long a stop waits for what is in flight.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What the registry needs.
pub struct RegistryDeps {
    pub instance: String,
    pub incarnation: u64,
    pub directory: Directory,
    /// For presence events, whose topic may be owned elsewhere.
    pub owners: OwnerClient,
    pub metrics: prometheus::Registry,
}

/// Is a topic's slot ours, as far as the keeper has said?
#[derive(Clone)]
pub struct Ownership {
    slots: Live<SlotMap>,
    instance: Arc<str>,
    incarnation: u64,
}

impl Ownership {
    /// To wait for changes.
    pub fn slots(&self) -> Live<SlotMap> {
        self.slots.clone()
    }

    pub fn owns(&self, name: &str) -> bool {
        let slots = self.slots.borrow();
        slots.owner_of(name).is_some_and(|(_, owner)| self.is_us(owner))
    }

    /// Is it ours, and to be given up?
    pub fn leaves(&self, name: &str) -> bool {
        self.slots.borrow().moving_to.contains_key(&topic::slot_of(name)) && self.owns(name)
    }

    fn is_us(&self, owner: &carillon_agent::SlotOwner) -> bool {
        owner.instance == self.instance && owner.incarnation == self.incarnation
    }
}

/// A running registry.
pub struct Registry {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Registry {
    /// Starts the workers; they own slots as soon as the keeper says so. Errors when its metrics are registered twice.
    pub fn start(deps: RegistryDeps) -> Result<Self, prometheus::Error> {
        let metrics = metrics::Metrics::new(&deps.metrics)?;
        let agent: &Agent = deps.directory.agent();
        let config = agent.config::<HubConfig>();
        let apps = agent.configs::<App>();
        let count = std::thread::available_parallelism().map_or(4, usize::from).clamp(4, 8);
        let (presence, events) = mpsc::channel(PRESENCE_QUEUE);
        let (wills, due_wills) = mpsc::channel(WILL_QUEUE);
        let stop = CancellationToken::new();
        let worker_deps = WorkerDeps {
            directory: deps.directory.clone(),
            metrics: metrics.clone(),
            presence,
            wills,
            stop: stop.clone(),
        };
        let registry = config.borrow().registry.clone();
        let workers = Workers::start(
            count,
            &deps.instance,
            &registry.limits(count),
            registry.unanswered_bytes as usize,
            &worker_deps,
        );
        let ownership = Ownership {
            slots: agent.slots(),
            instance: deps.instance.as_str().into(),
            incarnation: deps.incarnation,
        };
        let attachments = Arc::new(attach::Attachments::new(metrics.clone()));
        let jobs =
            Arc::new(broadcast::Jobs::new(deps.directory.clone(), attachments.clone(), metrics.clone()));
        let shared = Arc::new(Shared {
            workers: workers.clone(),
            attachments,
            jobs,
            ownership: ownership.clone(),
            apps: apps.clone(),
            config: config.clone(),
            metrics: metrics.clone(),
            closing: CancellationToken::new(),
            streams: TaskTracker::new(),
        });
        let giving_up = GivingUp { admin: agent.admin(), ownership: ownership.clone() };
        tokio::spawn(stop.clone().run_until_cancelled_owned(giving_up.run()));
        let feed = Feed { workers, ownership, apps, config, gateways: agent.instances(Role::Gateway) };
        tokio::spawn(stop.clone().run_until_cancelled_owned(feed.run()));
        let publishing = publish_wills(due_wills, deps.owners.clone(), metrics.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(publishing));
        tokio::spawn(stop.clone().run_until_cancelled_owned(publish_presence(events, deps.owners, metrics)));
        tokio::spawn(stop.clone().run_until_cancelled_owned(tend(shared.clone())));
        Ok(Registry { shared, stop })
    }

    pub fn service(&self) -> RegistryServer<impl v1::registry_server::Registry> {
        RegistryServer::new(Service(self.shared.clone()))
            .max_decoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
    }

    pub fn ownership(&self) -> Ownership {
        self.shared.ownership.clone()
    }

    /// Does it own at least one slot, or does the keeper give them all to others?
    pub fn is_ready(&self) -> bool {
        let slots = self.shared.ownership.slots.borrow();
        !slots.slots.is_empty() && slots.slots.iter().all(|owner| !owner.instance.is_empty())
    }

    /// Takes no more publishes, answers what is in flight, closes the streams. Bounded by a few seconds.
    pub async fn stop(&self) {
        self.shared.closing.cancel();
        // The reading ends at once; the answers follow as the saver gives them.
        let answered = async {
            while self.shared.workers.unanswered() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(STOP_TIMEOUT, answered).await.is_err() {
            tracing::warn!("publishes were still unanswered when the registry was stopped");
        }
        // Before the streams are closed, so that their end is not taken for the gateways' having finished.
        self.shared.jobs.interrupt_all();
        self.shared.attachments.close_all();
        self.shared.streams.close();
        if tokio::time::timeout(Duration::from_secs(1), self.shared.streams.wait()).await.is_err() {
            tracing::warn!("streams were still open when the registry was stopped");
        }
        let shared = &self.shared;
        let jobs = shared.jobs.tend(|name| shared.ownership.owns(name));
        if tokio::time::timeout(Duration::from_secs(1), jobs).await.is_err() {
            tracing::warn!("records of broadcast jobs were not written when the registry was stopped");
        }
        self.stop.cancel();
    }
}

/// Tells the workers what the keeper says.
struct Feed {
    workers: Workers,
    ownership: Ownership,
    apps: Live<std::collections::BTreeMap<String, Arc<App>>>,
    config: Live<HubConfig>,
    gateways: Live<Vec<carillon_agent::Instance>>,
}

impl Feed {
    async fn run(mut self) {
        self.apps.mark_changed();
        self.gateways.mark_changed();
        self.ownership.slots.mark_changed();
        self.config.mark_changed();
        loop {
            // An error means that the agent has gone, and so has the process.
            tokio::select! {
                biased;
                Ok(()) = self.apps.changed() => {
                    let apps = self.apps.borrow_and_update().clone();
                    self.workers.to_all(|| Input::Apps(apps.clone())).await;
                }
                Ok(()) = self.config.changed() => {
                    let config = self.config.borrow_and_update().registry.clone();
                    let limits = config.limits(self.workers.len());
                    self.workers.set_max_bytes(config.unanswered_bytes as usize);
                    self.workers.to_all(|| Input::Limits(limits.clone())).await;
                }
                Ok(()) = self.gateways.changed() => {
                    let gateways = self.gateways.borrow_and_update().clone();
                    let live: HashSet<(Arc<str>, u64)> = gateways
                        .iter()
                        .map(|instance| (instance.id.as_str().into(), instance.incarnation))
                        .collect();
                    self.workers.to_all(|| Input::Live(live.clone())).await;
                }
                Ok(()) = self.ownership.slots.changed() => self.slots().await,
                else => return,
            }
        }
    }

    async fn slots(&mut self) {
        let map = self.ownership.slots.borrow_and_update().clone();
        let mut parts: Vec<Slots> = (0..self.workers.len()).map(|_| Slots::default()).collect();
        let (mut owned, mut leaving, mut coming) = (0, 0, 0);
        for (slot, owner) in (0..SLOTS).zip(&map.slots) {
            let part = &mut parts[self.workers.worker_of(slot)];
            let to = map.moving_to.get(&slot);
            if self.ownership.is_us(owner) {
                part.owned.insert(slot, owner.epoch);
                owned += 1;
                leaving += usize::from(to.is_some());
            } else if to.is_some_and(|to| *to == self.ownership.instance) {
                part.coming.insert(slot);
                coming += 1;
            }
        }
        tracing::info!(slots = owned, leaving, coming, revision = map.revision, "slots are assigned");
        for (worker, part) in parts.into_iter().enumerate() {
            self.workers.to(worker, Input::Slots(part)).await;
        }
    }
}

async fn tend(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(TEND);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        shared.jobs.tend(|name| shared.ownership.owns(name)).await;
    }
}

/// Publishes presence events to their apps' presence topics, in order.
async fn publish_presence(
    mut events: mpsc::Receiver<PresenceEvent>,
    owners: OwnerClient,
    metrics: metrics::Metrics,
) {
    /// Events that may be unanswered.
    const UNANSWERED: usize = 1024;
    let under_way = Arc::new(tokio::sync::Semaphore::new(UNANSWERED));
    while let Some(event) = events.recv().await {
        let Ok(permit) = under_way.clone().acquire_owned().await else { return };
        let payload = match serde_json::to_vec(&event) {
            Ok(payload) => payload,
            Err(error) => {
                tracing::error!(%error, "cannot write a presence event");
                continue;
            }
        };
        let message = v1::Message {
            topic: format!("{}/up/{PRESENCE_KIND}", event.app),
            payload: payload.into(),
            qos: 1,
            id: uuid::Uuid::now_v7().to_string(),
            ..v1::Message::default()
        };
        let request =
            v1::PublishRequest { message: Some(message), store: Some(true), ..v1::PublishRequest::default() };
        let published = owners.publish(request);
        let metrics = metrics.clone();
        tokio::spawn(async move {
            let outcome = match published.await {
                Ok(_) => "published",
                Err(error) => {
                    tracing::warn!(app = event.app, %error, "a presence event is lost");
                    "dropped"
                }
            };
            metrics.presence.with_label_values(&[outcome]).inc();
            drop(permit);
        });
    }
}

/// Publishes the wills of sessions whose gateway is gone. The gateway may have come to it: the ids make it once.
async fn publish_wills(
    mut wills: mpsc::Receiver<v1::Message>,
    owners: OwnerClient,
    metrics: metrics::Metrics,
) {
    /// Wills that may be unanswered: as many devices may go with one gateway.
    const UNANSWERED: usize = 1024;
    /// A will is the last that is heard of a device: worth more than one deadline.
    const ATTEMPTS: usize = 12;
    let under_way = Arc::new(tokio::sync::Semaphore::new(UNANSWERED));
    while let Some(message) = wills.recv().await {
        let Ok(permit) = under_way.clone().acquire_owned().await else { return };
        let (owners, metrics) = (owners.clone(), metrics.clone());
        tokio::spawn(async move {
            let mut outcome = "dropped";
            for _ in 0..ATTEMPTS {
                let request = v1::PublishRequest {
                    message: Some(message.clone()),
                    idempotent: true,
                    ..v1::PublishRequest::default()
                };
                match owners.publish(request).await {
                    Ok(_) => {
                        outcome = "published";
                        break;
                    }
                    Err(error) => {
                        tracing::warn!(topic = message.topic, %error, "a will could not be published");
                        if matches!(error, PublishError::Refused(_)) {
                            break;
                        }
                    }
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            metrics.wills.with_label_values(&[outcome]).inc();
            drop(permit);
        });
    }
}

/// Is this message a presence event of the registry's, rather than what a device published?
pub fn is_presence(message: &v1::Message) -> bool {
    topic::is_upstream(&message.topic)
        && message.topic.split('/').nth(2) == Some(PRESENCE_KIND)
        && message.publisher.is_none()
}
