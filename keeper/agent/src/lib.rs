//! The keeper's library inside every process: typed configuration that changes live, discovery, slots, commands.
//!
//! An [`Agent`] is a cheap handle; a task behind it speaks with the keeper, reconnects with jitter, resumes its watches
//! and registers again. What a process reads here is always the last that was known, also while the keeper is away.
//! [`process`] makes a whole process of it in few lines. With a cache ([`Options::with_cache`]) a process starts even when
//! no keeper can be reached. [`admin::Admin`] is the other side: for people and tools that change configuration and send
//! commands.

pub mod admin;
pub mod app;
pub mod document;
pub mod keys;
pub mod layers;
pub mod pem;
pub mod process;
pub mod revoked;
pub mod subject;
pub mod target;
pub mod tls;

mod board;
mod cache;
mod keepers;
mod link;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use carillon_proto::v1;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::board::Board;
use crate::cache::Cache;
pub use crate::cache::CacheOptions;
use crate::keepers::Keepers;
use crate::tls::Tls;

/// What kinds of process there are. A closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Gateway,
    Registry,
    Center,
    Saver,
    Coordinator,
    Dispatcher,
}

impl Role {
    pub const ALL: [Role; 6] =
        [Role::Gateway, Role::Registry, Role::Center, Role::Saver, Role::Coordinator, Role::Dispatcher];

    /// Its name in configuration, listings and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Registry => "registry",
            Role::Center => "center",
            Role::Saver => "saver",
            Role::Coordinator => "coordinator",
            Role::Dispatcher => "dispatcher",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(name: &str) -> Result<Self, UnknownRole> {
        Role::ALL.into_iter().find(|role| role.as_str() == name).ok_or_else(|| UnknownRole(name.to_owned()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a role; the roles are gateway, registry, center, saver, coordinator, dispatcher")]
pub struct UnknownRole(pub String);

/// An instance that is alive as far as the keeper knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Stable over restarts of the same process on the same volume (kept in its data directory).
    pub id: String,
    /// Grows with each start; a newer incarnation replaces the older one at once.
    pub incarnation: u64,
    pub roles: Vec<Role>,
    /// Addresses by name: `grpc` (for other roles), `mqtt`, `ws`, `http` (for devices and backends). "host:port".
    pub addresses: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// `active` unless it drains.
    pub draining: bool,
}

impl Instance {
    /// Of a process that says no more of itself: no roles, no addresses, and an incarnation by the clock.
    pub fn new(id: impl Into<String>) -> Self {
        Instance {
            id: id.into(),
            incarnation: carillon_proto::now_ms(),
            roles: Vec::new(),
            addresses: BTreeMap::new(),
            labels: BTreeMap::new(),
            draining: false,
        }
    }

    /// With a further address, "host:port".
    #[must_use]
    pub fn with_address(mut self, name: &str, address: &str) -> Self {
        self.addresses.insert(name.to_owned(), address.to_owned());
        self
    }

    /// Roles that this version does not know are left out.
    pub fn from_record(record: v1::InstanceRecord) -> Self {
        Instance {
            id: record.id,
            incarnation: record.incarnation,
            roles: record.roles.iter().filter_map(|role| role.parse().ok()).collect(),
            addresses: record.addresses.into_iter().collect(),
            labels: record.labels.into_iter().collect(),
            draining: record.draining,
        }
    }

    fn to_record(&self) -> v1::InstanceRecord {
        v1::InstanceRecord {
            id: self.id.clone(),
            incarnation: self.incarnation,
            roles: self.roles.iter().map(ToString::to_string).collect(),
            addresses: self.addresses.clone().into_iter().collect(),
            labels: self.labels.clone().into_iter().collect(),
            draining: self.draining,
            ..Default::default()
        }
    }
}

/// Who owns each slot, and since which epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotMap {
    /// Keeper revision of this assignment.
    pub revision: u64,
    /// By slot, `topic::SLOTS` of them, or none before the first assignment.
    pub slots: Vec<SlotOwner>,
    /// Slots whose owner is to give them up, and the instance that is to get them. Until it has, it owns them.
    pub moving_to: BTreeMap<u32, Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotOwner {
    /// Instance id and incarnation; empty when no registry instance is alive.
    pub instance: Arc<str>,
    pub incarnation: u64,
    /// Grows with each change of owner.
    pub epoch: u64,
}

impl SlotMap {
    /// The owner of a topic's slot.
    pub fn owner_of(&self, topic: &str) -> Option<(u32, &SlotOwner)> {
        let slot = carillon_proto::topic::slot_of(topic);
        let owner = self.slots.get(slot as usize)?;
        (!owner.instance.is_empty()).then_some((slot, owner))
    }
}

/// A live value: the last known, and a way to wait for the next.
pub type Live<T> = watch::Receiver<Arc<T>>;

/// The longest wait for the keeper to hear of what commands came to, at a process's end.
const TOLD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// Commands that wait to be taken by [`Agent::commands`]; a further one is answered "busy".
const COMMAND_QUEUE: usize = 64;

/// Where the keeper is, and who we are.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://host:port` of the keeper's nodes, `https://` with certificates; one is enough, the others are learned from it.
    pub keepers: Vec<String>,
    /// Our certificate for the keepers; None: they are spoken to without TLS.
    pub tls: Option<Arc<Tls>>,
    /// Where the last known state is kept over restarts; None: it is not.
    pub cache: Option<CacheOptions>,
}

impl Options {
    pub fn new(keepers: Vec<String>) -> Self {
        Options { keepers, tls: None, cache: None }
    }

    /// With certificates, or without.
    #[must_use]
    pub fn with_tls(self, tls: Option<Arc<Tls>>) -> Self {
        Options { tls, ..self }
    }

    /// With a cache: a file in the data directory of `owner`, the process's instance id.
    #[must_use]
    pub fn with_cache(self, path: impl Into<std::path::PathBuf>, owner: impl Into<String>) -> Self {
        Options { cache: Some(CacheOptions { path: path.into(), owner: owner.into() }), ..self }
    }
}

/// What an instance says of how busy it is: a few numbers by name, as `connections`. Asked for with each keep-alive.
pub type Measure = Arc<dyn Fn() -> BTreeMap<String, f64> + Send + Sync>;

/// A cheap handle; see the crate's page.
#[derive(Clone)]
pub struct Agent {
    shared: Arc<Shared>,
}

/// What handles and the task share.
struct Shared {
    keepers: Arc<Keepers>,
    /// Tells the keeper which instances are one process.
    process: u64,
    cache: Option<Arc<Cache>>,
    board: Mutex<Board>,
    /// By instance.
    measures: Mutex<BTreeMap<String, Measure>>,
    /// Sent to when there is something new to tell the keeper: a registration, a report, an answer.
    wake: watch::Sender<u64>,
    ready: watch::Sender<bool>,
    connected: watch::Sender<bool>,
    commands: Mutex<(mpsc::Sender<Command>, Option<mpsc::Receiver<Command>>)>,
    stop: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn wake(&self) {
        self.wake.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Agent {
    /// Starts the agent's task on the current Tokio runtime; returns at once. What is live is empty or default until
    /// the keeper answers, or the last known from the cache. The task ends with [`Agent::stop`] or with the runtime, not
    /// with the last handle.
    pub fn start(options: Options) -> Agent {
        let (sender, receiver) = mpsc::channel(COMMAND_QUEUE);
        let keepers = Arc::new(Keepers::new(options.keepers, options.tls));
        let mut board = Board::new();
        let (cache, found) = options.cache.map(Cache::open).unzip();
        if let Some(found) = found.flatten() {
            tracing::info!(
                cluster = found.cluster_id,
                saved_ms = found.saved_ms,
                records = found.items.len(),
                "the last known state is in force until a keeper answers"
            );
            keepers.learn(&found.keepers);
            board.restore(found);
        }
        let shared = Arc::new(Shared {
            keepers,
            process: rand::random::<u64>().max(1),
            cache: cache.map(Arc::new),
            ready: watch::Sender::new(board.synced),
            board: Mutex::new(board),
            measures: Mutex::new(BTreeMap::new()),
            wake: watch::Sender::new(0),
            connected: watch::Sender::new(false),
            commands: Mutex::new((sender, Some(receiver))),
            stop: CancellationToken::new(),
            task: Mutex::new(None),
        });
        let task = tokio::spawn(link::run(shared.clone()));
        *shared.task.lock() = Some(task);
        Agent { shared }
    }

    /// Resolves when there is a full view (configuration, instances, slots): from a keeper, or from the cache.
    pub async fn ready(&self) {
        // An error means that the sender is gone, which it is not while this handle lives.
        let _ = self.shared.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Is there a full view? See [`ready`](Self::ready).
    pub fn is_ready(&self) -> bool {
        *self.shared.ready.borrow()
    }

    /// Which cluster this is; None before that is known.
    pub fn cluster_id(&self) -> Option<String> {
        let board = self.shared.board.lock();
        Some(board.view.cluster_id.clone()).filter(|cluster| !cluster.is_empty())
    }

    /// Is the keeper answering at present?
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.shared.connected.subscribe()
    }

    /// Says who this process is before it registers: which configuration is meant for it goes by that, from the first one
    /// on. To be called before the first `config` or `configs`.
    pub fn identify(&self, id: &str, roles: &[Role], labels: BTreeMap<String, String>) {
        let roles: Vec<String> = roles.iter().map(ToString::to_string).collect();
        self.shared.board.lock().identify(|process| process.add(id, &roles, labels));
        self.shared.wake();
    }

    /// Makes this instance discoverable for as long as the process lives; call again to change it (draining).
    /// Another id is another instance of the same process.
    pub fn register(&self, instance: Instance) {
        self.shared.board.lock().register(instance);
        self.shared.wake();
    }

    /// How busy an instance of this process is, for listings and balancing: at most 32 numbers with names of at most 64
    /// bytes. `measure` is called with each keep-alive, about every three seconds: it must not block.
    pub fn measure(
        &self,
        instance: &str,
        measure: impl Fn() -> BTreeMap<String, f64> + Send + Sync + 'static,
    ) {
        self.shared.measures.lock().insert(instance.to_owned(), Arc::new(measure));
    }

    /// The one document of a kind; its default until one is published. Each valid revision is acknowledged as applied;
    /// one that does not parse is reported to the keeper and not delivered.
    ///
    /// # Panics
    /// When the process uses the kind with another Rust type as well.
    pub fn config<T: document::ConfigDocument>(&self) -> Live<T> {
        let receiver = self.shared.board.lock().config::<T>();
        self.shared.wake();
        receiver
    }

    /// What is in the way of a document that was applied (an address in use, a file that is missing); none once nothing
    /// is. It is told to the keeper as what this process refuses of the revision.
    pub fn report_problem(&self, document: &str, problem: Option<String>) {
        if self.shared.board.lock().report_problem(document, problem) {
            self.shared.wake();
        }
    }

    /// All documents of a named kind, by name.
    ///
    /// # Panics
    /// When the process uses the kind with another Rust type as well.
    pub fn configs<T: document::ConfigDocument>(&self) -> Live<BTreeMap<String, Arc<T>>> {
        let receiver = self.shared.board.lock().configs::<T>();
        self.shared.wake();
        receiver
    }

    /// All live instances that have this role, also those that drain; by id.
    pub fn instances(&self, role: Role) -> Live<Vec<Instance>> {
        self.shared.board.lock().instances(role)
    }

    pub fn slots(&self) -> Live<SlotMap> {
        self.shared.board.lock().slots()
    }

    /// The other side, for what a process changes itself.
    pub fn admin(&self) -> admin::Admin {
        admin::Admin::sharing(self.shared.keepers.clone())
    }

    /// Waits until every command that was begun has its answer and the keeper has got it; [`TOLD_TIMEOUT`] at most.
    async fn told(&self) {
        let told = async {
            loop {
                {
                    let board = self.shared.board.lock();
                    if board.carried_out == 0 && board.answers.is_empty() {
                        break;
                    }
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(TOLD_TIMEOUT, told).await;
    }

    /// Commands to this process's instances. One receiver a process: a later call takes over from the earlier one.
    /// Each command must be answered; one that is dropped is answered as failed.
    pub fn commands(&self) -> mpsc::Receiver<Command> {
        let mut commands = self.shared.commands.lock();
        if let Some(receiver) = commands.1.take() {
            return receiver;
        }
        let (sender, receiver) = mpsc::channel(COMMAND_QUEUE);
        commands.0 = sender;
        receiver
    }

    /// Deregisters (the lease is revoked) and ends the agent's task; takes at most about two seconds.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        let task = self.shared.task.lock().take();
        if let Some(task) = task {
            let _ = task.await;
        }
    }
}

/// A command to this instance (`drain`, `log-level`, …), from the keeper.
pub struct Command {
    pub id: String,
    pub name: String,
    pub arguments: BTreeMap<String, String>,
    /// Unix time in milliseconds after which it must not be carried out any more.
    pub deadline_ms: u64,
    /// Answers it: a text for people, or why it failed.
    pub answer: tokio::sync::oneshot::Sender<Result<String, String>>,
}
