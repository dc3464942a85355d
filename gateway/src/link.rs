//! The gateway's side of the wire to the hubs: routes announced, messages received, sessions kept, publishes forwarded.
//!
//! Shards call a [`Link`] without waiting; what comes back arrives in their inboxes as [`Event`]s. Everything here runs
//! on tokio; nothing here touches a device's socket.

mod attach;
mod in_order;
mod publish;
mod saver;
mod shares;
mod subscribe;
mod untold;
mod wills;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use carillon_agent::{Agent, Instance, Role, SlotMap};
use carillon_proto::exchange::{Exchange, Options, Publishing, Saving};
use carillon_proto::{topic, v1};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::event::{Event, ShardHandle};
use crate::metrics::Metrics;
use crate::routes::{Routes, ShardSet};
use crate::sessions::Sessions;

pub use attach::SlotAnnouncement;
pub use publish::Publisher;
pub use saver::SaverFailure;
pub use shares::{Member, ShareMember};
pub use subscribe::{Begun, Underway, Wanted};

/// How long a SUBSCRIBE waits for the topics' owners, and a publish for being accepted.
pub const OWNER_WAIT: Duration = Duration::from_secs(10);
/// Changes waiting for one registry before its stream is given up and begun anew.
const ATTACH_QUEUE: usize = 1 << 20;
/// How long one registry may take to say how all gateways do.
const OVERVIEW_WITHIN: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    agent: Agent,
    instance: String,
    incarnation: u64,
    runtime: tokio::runtime::Handle,
    pub(crate) routes: Routes,
    pub(crate) sessions: Sessions,
    pub(crate) metrics: Metrics,
    shards: OnceLock<Vec<ShardHandle>>,
    saver: ArcSwapOption<Exchange<Saving>>,
    /// What the saver has to hear of sessions, and has not answered yet.
    untold: untold::Untold,
    /// Held for reading from the look-up of a message's shards until it is in their queues.
    delivering: RwLock<()>,
    registries: RwLock<HashMap<Arc<str>, Registry>>,
    slots: ArcSwap<SlotMap>,
    /// They have changed: what was refused may be taken now.
    slots_changed: Notify,
    /// The newest epoch known of each slot: older deliveries come from a deposed owner.
    epochs: Vec<AtomicU64>,
    /// By slot: the newest epoch in which an owner has accepted a publish from here.
    accepted: Vec<AtomicU64>,
    broadcasts: Mutex<HashMap<Arc<str>, BroadcastCount>>,
    wills: wills::Wills,
    /// To the table of members of shares.
    shares: mpsc::UnboundedSender<shares::Command>,
    next_member: AtomicU64,
    stop: CancellationToken,
}

/// What this gateway knows of one registry instance.
struct Registry {
    incarnation: u64,
    address: String,
    publish: Exchange<Publishing>,
    attach: mpsc::Sender<AttachCommand>,
    /// Something could not be queued for it: the stream is to begin anew, with everything.
    overflowed: Arc<Notify>,
    stop: CancellationToken,
}

/// What an attach task is to tell its registry.
enum AttachCommand {
    /// This topic has come or gone: look it up when sending.
    Route(Arc<str>),
    WildRoute(Arc<str>),
    /// These slots are this registry's now (or still, but it answered that they are not).
    Slots(Vec<u32>),
    Session(v1::SessionChange),
    /// Everything in these slots has been announced.
    Complete(Vec<v1::SlotEpoch>),
    Progress(v1::BroadcastProgress),
    Report(v1::GatewayReport),
}

/// A broadcast's progress in this gateway, over its shards.
#[derive(Default)]
struct BroadcastCount {
    owner: Arc<str>,
    /// By shard: total, done.
    shards: HashMap<usize, (u64, u64)>,
    expected: usize,
    rate: Option<(v1::broadcast_control::State, f64)>,
}

impl Link {
    pub fn start(
        agent: Agent,
        instance: String,
        incarnation: u64,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Link {
        let (share_commands, to_shares) = mpsc::unbounded_channel();
        let inner = Arc::new(Inner {
            agent,
            instance,
            incarnation,
            runtime: tokio::runtime::Handle::current(),
            routes: Routes::default(),
            sessions: Sessions::default(),
            metrics,
            shards: OnceLock::new(),
            saver: ArcSwapOption::empty(),
            untold: untold::Untold::default(),
            delivering: RwLock::new(()),
            registries: RwLock::default(),
            slots: ArcSwap::default(),
            slots_changed: Notify::new(),
            epochs: (0..topic::SLOTS).map(|_| AtomicU64::new(0)).collect(),
            accepted: (0..topic::SLOTS).map(|_| AtomicU64::new(0)).collect(),
            broadcasts: Mutex::default(),
            wills: wills::Wills::default(),
            shares: share_commands,
            next_member: AtomicU64::new(1),
            stop,
        });
        tokio::spawn(shares::run(inner.clone(), to_shares));
        Link { inner }
    }

    /// The shards are there: messages may come.
    pub fn serve(&self, shards: Vec<ShardHandle>) {
        if self.inner.shards.set(shards).is_err() {
            unreachable!("a link is served once");
        }
        tokio::spawn(follow_savers(self.inner.clone()));
        tokio::spawn(follow_registries(self.inner.clone()));
        tokio::spawn(follow_slots(self.inner.clone()));
    }

    pub fn sessions(&self) -> &Sessions {
        &self.inner.sessions
    }

    pub fn routes(&self) -> &Routes {
        &self.inner.routes
    }

    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    pub fn shard(&self, index: usize) -> &ShardHandle {
        &self.inner.shards()[index]
    }

    pub fn shards_count(&self) -> usize {
        self.inner.shards().len().max(1)
    }

    pub fn instance(&self) -> &str {
        &self.inner.instance
    }

    pub fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// Why this gateway cannot serve fully yet; empty when it can.
    pub fn not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.inner.saver.load().is_none() {
            reasons.push("no saver is known".to_owned());
        }
        let slots = self.inner.slots.load();
        let unowned = slots.slots.iter().filter(|owner| owner.instance.is_empty()).count();
        if slots.slots.is_empty() || unowned > 0 {
            reasons.push("not every topic slot has an owner".to_owned());
        }
        if self.inner.registries.read().is_empty() {
            reasons.push("no registry is known".to_owned());
        }
        let gateways = self.inner.agent.instances(Role::Gateway);
        let is_found = gateways.borrow().iter().any(|gateway| {
            gateway.id == self.inner.instance && gateway.incarnation == self.inner.incarnation
        });
        if !is_found {
            reasons.push("this gateway is not in discovery yet".to_owned());
        }
        reasons
    }

    /// Says who came online or went offline, to the owner of the user's inbox.
    pub fn session_changed(&self, change: v1::SessionChange) {
        let Some(session) = &change.session else { return };
        let inbox = topic::inbox(&session.app, &session.user);
        self.inner.to_owner(&inbox, AttachCommand::Session(change));
    }

    /// The shard has no subscriber for the filter any more.
    pub fn leave(&self, filter: &Arc<str>, shard: usize) {
        if topic::is_wildcard(filter) {
            if self.inner.routes.leave_wild(filter, shard) {
                self.inner.to_all(|| AttachCommand::WildRoute(filter.clone()));
            }
        } else if self.inner.routes.leave(filter, shard) {
            self.inner.to_owner(filter, AttachCommand::Route(filter.clone()));
        }
    }

    /// Calls back when all messages that were routed before this are in the shards' queues.
    pub fn after_deliveries(&self, then: impl FnOnce() + Send + 'static) {
        let inner = self.inner.clone();
        // Not here: it waits for those that are being routed, and a shard waits for nothing.
        self.inner.runtime.spawn(async move {
            let none_under_way = inner.delivering.write();
            // Still held: what is routed from now on is queued behind what this queues.
            then();
            drop(none_under_way);
        });
    }

    /// Tells every registry how this gateway does.
    pub fn report(&self, report: &v1::GatewayReport) {
        self.inner.to_all(|| AttachCommand::Report(report.clone()));
    }

    /// How all gateways do, as one of the registries was told; every gateway reports to each.
    pub async fn overview(&self) -> Result<v1::OverviewReply, String> {
        let addresses: Vec<String> =
            self.inner.registries.read().values().map(|registry| registry.address.clone()).collect();
        let mut failed = "no registry is known".to_owned();
        for address in addresses {
            let asked = async {
                let endpoint = endpoint(&address).ok_or("its address is not valid")?;
                let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
                let mut client = v1::registry_client::RegistryClient::new(channel);
                let reply = client.overview(v1::OverviewRequest {}).await;
                reply.map(tonic::Response::into_inner).map_err(|status| status.to_string())
            };
            match tokio::time::timeout(OVERVIEW_WITHIN, asked).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(error)) => failed = format!("{address}: {error}"),
                Err(_) => failed = format!("{address}: no answer in time"),
            }
        }
        Err(failed)
    }

    /// A shard's part of a broadcast: how many it has to serve, how many it has.
    pub fn broadcast_progress(&self, job: &Arc<str>, shard: usize, total: u64, done: u64) {
        self.inner.broadcast_progress(job, shard, total, done);
    }
}

impl Inner {
    fn shards(&self) -> &[ShardHandle] {
        self.shards.get().map_or(&[], Vec::as_slice)
    }

    fn post(&self, shards: ShardSet, mut event: impl FnMut() -> Event) {
        let mut rest = shards;
        while rest != 0 {
            let index = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if let Some(shard) = self.shards().get(index) {
                shard.post(event());
            }
        }
    }

    fn owner(&self, topic: &str) -> Option<Arc<str>> {
        self.slots.load().owner_of(topic).map(|(_, owner)| owner.instance.clone())
    }

    fn to_owner(&self, topic: &str, command: AttachCommand) {
        if let Some(owner) = self.owner(topic) {
            self.to(&owner, command);
        }
        // Without an owner there is nobody to tell; whoever becomes it is told everything.
    }

    fn to(&self, registry: &str, command: AttachCommand) {
        if let Some(registry) = self.registries.read().get(registry) {
            self.queue(registry, command);
        }
    }

    fn to_all(&self, mut command: impl FnMut() -> AttachCommand) {
        for registry in self.registries.read().values() {
            self.queue(registry, command());
        }
    }

    fn queue(&self, registry: &Registry, command: AttachCommand) {
        if registry.attach.try_send(command).is_err() {
            self.metrics.attach_overflows.inc();
            registry.overflowed.notify_one();
        }
    }

    fn registry_names(&self) -> Vec<Arc<str>> {
        self.registries.read().keys().cloned().collect()
    }

    fn broadcast_progress(&self, job: &Arc<str>, shard: usize, total: u64, done: u64) {
        let mut broadcasts = self.broadcasts.lock();
        let Some(count) = broadcasts.get_mut(job) else { return };
        let is_new = count.shards.insert(shard, (total, done)).is_none();
        if count.shards.len() < count.expected {
            return;
        }
        let (total, done) = count.shards.values().fold((0, 0), |(t, d), (total, done)| (t + total, d + done));
        let finished = done >= total;
        let owner = count.owner.clone();
        if is_new && let Some((state, rate)) = count.rate {
            // Now that all the shards' parts are known, each gets its share of the gateway's rate.
            self.share_out(job, count, state, rate);
        }
        if finished {
            broadcasts.remove(job);
        }
        drop(broadcasts);
        let progress = v1::BroadcastProgress { job: job.to_string(), total, done, finished };
        self.to(&owner, AttachCommand::Progress(progress));
    }

    fn broadcast_control(&self, control: &v1::BroadcastControl) {
        let job: Arc<str> = control.job.as_str().into();
        let mut broadcasts = self.broadcasts.lock();
        let Some(count) = broadcasts.get_mut(&job) else { return };
        let (state, rate) = (control.state(), control.rate_per_second);
        count.rate = Some((state, rate));
        self.share_out(&job, count, state, rate);
    }

    /// The owner of these jobs is gone: what it has left here goes out, or later messages would wait behind it for ever.
    fn release_broadcasts(&self, owner: &str) {
        let run = v1::broadcast_control::State::Run;
        for (job, count) in self.broadcasts.lock().iter_mut().filter(|(_, count)| *count.owner == *owner) {
            count.rate = Some((run, 0.0));
            self.share_out(job, count, run, 0.0);
        }
    }

    fn share_out(
        &self,
        job: &Arc<str>,
        count: &BroadcastCount,
        state: v1::broadcast_control::State,
        rate: f64,
    ) {
        let left: u64 = count.shards.values().map(|(total, done)| total - done).sum();
        for (&shard, (total, done)) in &count.shards {
            let share = if left == 0 { rate } else { rate * (total - done) as f64 / left as f64 };
            if let Some(handle) = self.shards().get(shard) {
                handle.post(Event::BroadcastRate { job: job.clone(), state, rate_per_second: share });
            }
        }
    }

    fn note_epoch(&self, slot: u32, epoch: u64) -> bool {
        let known = self.epochs[slot as usize].fetch_max(epoch, Ordering::AcqRel);
        known <= epoch
    }
}

fn endpoint(address: &str) -> Option<Endpoint> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    Some(
        endpoint
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(8 * 1024 * 1024)
            .initial_connection_window_size(16 * 1024 * 1024),
    )
}

/// Keeps `saver` at one that lives; it stays with the one it has for as long as that does.
async fn follow_savers(inner: Arc<Inner>) {
    let mut savers = inner.agent.instances(Role::Saver);
    let mut current: Option<(String, u64, String)> = None;
    loop {
        let found = savers.borrow_and_update().clone();
        let name = |instance: &Instance| {
            let address = instance.addresses.get("grpc").cloned().unwrap_or_default();
            (instance.id.clone(), instance.incarnation, address)
        };
        let kept =
            current.as_ref().is_some_and(|current| found.iter().any(|instance| name(instance) == *current));
        // When there is none, the last known stays: it may well be there although the keeper cannot say so.
        if !kept
            && let Some(next) = found.iter().find(|instance| !instance.draining).or(found.first()).map(name)
            && let Some(endpoint) = endpoint(&next.2)
        {
            tracing::info!(saver = %next.0, address = %next.2, "using saver");
            inner.saver.store(Some(Arc::new(Exchange::start(endpoint, Options::default()))));
            current = Some(next);
            for shard in inner.shards() {
                shard.post(Event::SaverChanged);
            }
        }
        tokio::select! {
            changed = savers.changed() => if changed.is_err() { return },
            () = inner.stop.cancelled() => return,
        }
    }
}

/// Keeps one attach task and one publish stream for each registry instance.
async fn follow_registries(inner: Arc<Inner>) {
    let mut registries = inner.agent.instances(Role::Registry);
    loop {
        let found = registries.borrow_and_update().clone();
        {
            let mut known = inner.registries.write();
            known.retain(|id, registry| {
                let alive = found.iter().any(|instance| {
                    *instance.id == **id
                        && instance.incarnation == registry.incarnation
                        && instance.addresses.get("grpc") == Some(&registry.address)
                });
                if !alive {
                    registry.stop.cancel();
                }
                alive
            });
            for instance in found.iter() {
                let id: Arc<str> = instance.id.as_str().into();
                let Some(address) = instance.addresses.get("grpc") else { continue };
                if known.contains_key(&id) {
                    continue;
                }
                let Some(endpoint) = endpoint(address) else {
                    tracing::error!(registry = %id, %address, "the address of a registry is not valid");
                    continue;
                };
                tracing::info!(registry = %id, %address, incarnation = instance.incarnation, "attaching to registry");
                let (attach, commands) = mpsc::channel(ATTACH_QUEUE);
                let overflowed = Arc::new(Notify::new());
                let stop = inner.stop.child_token();
                tokio::spawn(attach::run(
                    inner.clone(),
                    id.clone(),
                    endpoint.clone(),
                    commands,
                    overflowed.clone(),
                    stop.clone(),
                ));
                let publish = Exchange::start(endpoint, Options::default());
                let (incarnation, address) = (instance.incarnation, address.clone());
                known.insert(id, Registry { incarnation, address, publish, attach, overflowed, stop });
            }
        }
        tokio::select! {
            changed = registries.changed() => if changed.is_err() { return },
            () = inner.stop.cancelled() => return,
        }
    }
}

/// Announces again what is in slots that got another owner or epoch.
async fn follow_slots(inner: Arc<Inner>) {
    let mut maps = inner.agent.slots();
    loop {
        let next = maps.borrow_and_update().clone();
        let before = inner.slots.swap(next.clone());
        inner.slots_changed.notify_waiters();
        let mut moved: HashMap<Arc<str>, Vec<u32>> = HashMap::new();
        for (slot, owner) in next.slots.iter().enumerate() {
            if owner.instance.is_empty() || before.slots.get(slot) == Some(owner) {
                continue;
            }
            inner.note_epoch(slot as u32, owner.epoch);
            moved.entry(owner.instance.clone()).or_default().push(slot as u32);
        }
        for (registry, slots) in moved {
            inner.to(&registry, AttachCommand::Slots(slots));
        }
        tokio::select! {
            changed = maps.changed() => if changed.is_err() { return },
            () = inner.stop.cancelled() => return,
        }
    }
}
