//! The gateway: holds the connections of devices. MQTT codec and sessions, listeners, fan-out.
//!
//! Devices are served by *shards*, threads that run an epoll loop each (`shard`); the hubs are spoken to on tokio
//! (`link`). Between the two are a queue into each shard (`event`) and the table of routes (`routes`).

mod admission;
mod auth;
pub mod codec;
pub mod config;
mod delivery;
pub mod drain;
mod event;
mod link;
pub mod listeners;
pub mod metrics;
mod overload;
pub mod proxy_protocol;
mod registration;
mod routes;
mod sessions;
mod shard;
pub mod websocket;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

use arc_swap::ArcSwap;
use carillon_agent::app::App;
use carillon_agent::revoked::Revoked;
use carillon_agent::{Agent, Instance, Role};
use carillon_proto::v1;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use admission::Admission;
use auth::Keyring;
use config::GatewayConfig;
use drain::{Mover, State};
use event::{Event, ShardHandle};
use link::Link;
use listeners::config::{ListenerConfig, Protocol};
use listeners::{ListenerError, Listeners};
use metrics::{AppTotals, Metrics};
use overload::Overload;
use registration::Registration;
use shard::{Shard, Shared};

/// How long a gateway that starts waits for its configuration: to accept a device under limits and addresses that are not
/// those that were set for it is worse than to accept it a moment later, and to accept nobody for want of a keeper is worse
/// than that.
const CONFIG_WITHIN: Duration = Duration::from_secs(5);

/// How a gateway is started.
pub struct GatewayOptions {
    /// Stable over restarts.
    pub instance_id: String,
    /// Grows with each start.
    pub incarnation: u64,
    /// What configuration may be for it by.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Where devices connect, whatever the configuration says besides.
    pub listeners: Vec<ListenerConfig>,
    /// Threads that hold connections; 0 = one a core.
    pub shards: usize,
    pub metrics: prometheus::Registry,
}

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("listener {:?}: {error}", listener.name)]
    Listener { listener: Box<ListenerConfig>, error: ListenerError },
    #[error("cannot set up a shard: {0}")]
    Shard(std::io::Error),
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A running gateway.
pub struct GatewayHandle {
    addresses: Vec<(Protocol, SocketAddr)>,
    shards: Vec<ShardHandle>,
    threads: Vec<std::thread::JoinHandle<()>>,
    link: Link,
    mover: Mover,
    stop: CancellationToken,
}

pub struct Gateway;

impl Gateway {
    /// Waits for the first configuration, listens, starts the shards, and registers with the keeper. Must be called within a
    /// tokio runtime.
    pub async fn start(options: GatewayOptions, agent: Agent) -> Result<GatewayHandle, GatewayError> {
        raise_file_limit();
        let metrics = Metrics::register(&options.metrics)?;
        if tokio::time::timeout(CONFIG_WITHIN, agent.ready()).await.is_err() {
            tracing::warn!(
                waited = ?CONFIG_WITHIN,
                "no configuration from the keeper yet, serving with the default limits and without apps until it comes"
            );
        }
        let count = match options.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        }
        .min(routes::MAX_SHARDS);
        let mut listeners = Listeners::open(options.listeners, count, metrics.clone())
            .map_err(|(listener, error)| GatewayError::Listener { listener, error })?;

        let stop = CancellationToken::new();
        let mut configs = agent.config::<GatewayConfig>();
        let mut apps = agent.configs::<App>();
        let mut revoked = agent.configs::<Revoked>();
        let (config, known) = (configs.borrow_and_update().clone(), apps.borrow_and_update().clone());
        let keyring = Keyring::default().next(&known, &revoked.borrow_and_update());
        let shared = Arc::new(Shared {
            admission: Admission::new(&config, std::time::Instant::now()),
            overload: Overload::default(),
            config: ArcSwap::new(config),
            apps: ArcSwap::new(known),
            keyring: ArcSwap::from_pointee(keyring),
            metrics: metrics.clone(),
            totals: AppTotals::default(),
            connections: AtomicUsize::new(0),
            next_connection: AtomicU64::new(1),
            moving: drain::Moving::new(count),
        });
        let link = Link::start(
            agent.clone(),
            options.instance_id.clone(),
            options.incarnation,
            metrics,
            stop.clone(),
        );
        let mut shards = Vec::new();
        let mut built = Vec::new();
        for index in 0..count {
            let (shard, handle) =
                Shard::new(index, shared.clone(), link.clone()).map_err(GatewayError::Shard)?;
            shards.push(handle);
            built.push(shard);
        }
        link.serve(shards.clone());
        let mut threads = Vec::new();
        for (index, shard) in built.into_iter().enumerate() {
            let thread =
                std::thread::Builder::new().name(format!("shard-{index}")).spawn(move || shard.run());
            threads.push(thread.map_err(GatewayError::Shard)?);
        }

        listeners.serve(shards.clone());
        let addresses = Protocol::ALL.into_iter();
        let addresses =
            addresses.filter_map(|protocol| Some((protocol, listeners.address(protocol)?))).collect();
        let instance = Instance {
            id: options.instance_id,
            incarnation: options.incarnation,
            roles: vec![Role::Gateway],
            addresses: listeners.addresses(),
            labels: options.labels,
            draining: false,
        };
        let busy = shared.clone();
        agent.measure(&instance.id, move || {
            let connections = busy.connections.load(std::sync::atomic::Ordering::Relaxed) as f64;
            std::collections::BTreeMap::from([("connections".to_owned(), connections)])
        });
        let registration = Arc::new(Registration::new(agent.clone(), instance));
        let gateway_configs = agent.config::<GatewayConfig>();
        tokio::spawn(listeners.follow(agent.clone(), gateway_configs, registration.clone(), stop.clone()));

        let followed = shared.clone();
        let stopped = stop.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    changed = configs.changed() => match changed {
                        Ok(()) => {
                            let config = configs.borrow_and_update().clone();
                            followed.admission.follow(&config);
                            followed.config.store(config);
                        }
                        Err(_) => return,
                    },
                    changed = apps.changed() => match changed {
                        Ok(()) => {
                            let apps = apps.borrow_and_update().clone();
                            followed.keyring.store(Arc::new(followed.keyring.load().next(&apps, &revoked.borrow())));
                            followed.apps.store(apps);
                        }
                        Err(_) => return,
                    },
                    changed = revoked.changed() => match changed {
                        Ok(()) => {
                            let next = followed.keyring.load().next(&apps.borrow(), &revoked.borrow_and_update());
                            followed.keyring.store(Arc::new(next));
                        }
                        Err(_) => return,
                    },
                    () = stopped.cancelled() => return,
                }
            }
        });
        let mover = Mover::new(shared.clone(), link.clone(), agent, shards.clone(), registration);
        tokio::spawn(report(shared, link.clone(), mover.clone(), stop.clone()));
        Ok(GatewayHandle { addresses, shards, threads, link, mover, stop })
    }
}

impl GatewayHandle {
    /// The address that was listened on first for a protocol, if it is one of the options'.
    pub fn address(&self, protocol: Protocol) -> Option<SocketAddr> {
        self.addresses.iter().find(|(known, _)| *known == protocol).map(|(_, address)| *address)
    }

    /// A cheap view for readiness checks.
    pub fn readiness(&self) -> Readiness {
        Readiness { link: self.link.clone(), mover: self.mover.clone() }
    }

    /// Drains and rebalances.
    pub fn mover(&self) -> Mover {
        self.mover.clone()
    }

    /// Sends the devices to other gateways, if there are any, at the configured rate; whoever is left after `within`
    /// is disconnected by [`stop`](Self::stop).
    pub async fn drain(&self, within: Duration) {
        self.mover.drain_to_stop(within).await;
    }

    /// Leaves discovery, tells every device that the server shuts down, hands their sessions to the saver, and ends.
    /// Bounded: what is not done after `deadline` is left.
    pub async fn stop(self, deadline: Duration) {
        self.mover.leave();
        let stopping = async {
            for shard in &self.shards {
                let (done, stopped) = oneshot::channel();
                shard.post(Event::Stop(done));
                let _ = stopped.await;
            }
            let _ = self.link.flushed().await;
        };
        if tokio::time::timeout(deadline, stopping).await.is_err() {
            tracing::warn!(?deadline, "devices could not all be told in time");
        }
        self.stop.cancel();
        for thread in self.threads {
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

/// See [`GatewayHandle::readiness`].
#[derive(Clone)]
pub struct Readiness {
    link: Link,
    mover: Mover,
}

impl Readiness {
    /// Why devices cannot be served yet; empty when they can.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = self.link.not_ready();
        if self.mover.state() != State::Active {
            reasons.push(format!("this gateway is {}", self.mover.state().name()));
        }
        reasons
    }
}

async fn report(shared: Arc<Shared>, link: Link, mover: Mover, stop: CancellationToken) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        shared.overload.sample(Path::new("/"), &shared.config.load().overload, link.metrics());
        let (sources, blocked) = shared.admission.sizes(std::time::Instant::now());
        link.metrics().source_addresses.set(sources as i64);
        link.metrics().blocked_addresses.set(blocked as i64);
        let apps = shared.totals.snapshot();
        link.metrics().routes.set(link.routes().len() as i64);
        link.report(&v1::GatewayReport {
            connections: shared.connections.load(std::sync::atomic::Ordering::Relaxed) as u64,
            apps: apps
                .into_iter()
                .map(|(app, counts)| v1::AppReport {
                    app: app.to_string(),
                    connections: u64::try_from(counts.connections).unwrap_or(0),
                    delivered: counts.delivered,
                    published: counts.published,
                    dropped: counts.dropped,
                })
                .collect(),
            bytes_resident: overload::resident_bytes(Path::new("/")).unwrap_or(0),
            max_connections: shared.config.load().max_connections.into(),
            state: mover.state().wire().into(),
            moving: mover.progress(),
        });
    }
}

/// A gateway needs a file for each connection: takes as many as the system allows this process.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one rlimit that lives here.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}
