//! A hub: some of the roles in one process, behind one gRPC listener and one HTTP listener.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use carillon_agent::app::App;
use carillon_agent::{Agent, Instance, Role};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use crate::center::{self, Center};
use crate::coordinator::{Coordinator, CoordinatorDeps};
use crate::dispatcher::{self, Dispatcher};
use crate::peers::{Directory, GRPC, WINDOW_BYTES};
use crate::registry::{OwnerClient, Registry, RegistryDeps, client};
use crate::saver::{Claim, Saver, SaverError, SaverOptions};
use crate::shares::{Shares, SharesDeps};

/// Name of the address that backends and devices speak HTTP to.
pub const HTTP: &str = "http";
/// How long a stop waits for requests that are being answered.
const GRACE: Duration = Duration::from_secs(5);
/// How long a stop waits for other registry instances to take over the slots: longer than the keeper waits for us (5 s).
const HAND_OVER: Duration = Duration::from_secs(8);

/// What a hub is started with.
pub struct HubOptions {
    /// Stable over restarts on the same data directory.
    pub instance_id: String,
    /// Grows with each start.
    pub incarnation: u64,
    /// The cluster's name: a data directory of another cluster is refused.
    pub cluster: String,
    /// Gateway is not among them.
    pub roles: Vec<Role>,
    /// Other roles speak to this one.
    pub grpc: TcpListener,
    /// Backends and devices speak to this one: center, dispatcher, and `console`.
    pub http: Option<TcpListener>,
    /// The saver's store is in `saver` below it.
    pub data_dir: PathBuf,
    /// Id of the store that was the cluster's saver and is given up for the one here; `*`: whichever was.
    pub take_over_saver: Option<String>,
    /// Where others reach this instance, "host:port" by name (`grpc`, `http`); what is not said is the listener's own
    /// address.
    pub advertise: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// Further HTTP routes, such as the console's.
    pub console: axum::Router,
    pub metrics: prometheus::Registry,
}

/// Why a hub cannot start.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("a hub hosts no {0}")]
    NotAHubRole(Role),
    #[error("a hub needs at least one role")]
    NoRole,
    #[error("the {listener} listener: {error}")]
    Listener { listener: &'static str, error: std::io::Error },
    #[error(transparent)]
    Saver(#[from] SaverError),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("coordinator: {0}")]
    Coordinator(#[from] crate::coordinator::CoordinatorError),
}

/// Starts hubs.
pub struct Hub;

/// A running hub.
pub struct HubHandle {
    instance: Instance,
    grpc: SocketAddr,
    http: Option<SocketAddr>,
    agent: Agent,
    directory: Directory,
    saver: Option<Saver>,
    registry: Option<Registry>,
    shares: Option<Shares>,
    coordinator: Option<Coordinator>,
    stop_http: CancellationToken,
    stop_grpc: CancellationToken,
    servers: Vec<(&'static str, JoinHandle<()>)>,
    /// Why it cannot go on.
    failure: watch::Receiver<Option<String>>,
}

impl Hub {
    /// Opens what the roles need, serves them, and makes the instance discoverable. `agent` has been started; the hub
    /// does not stop it.
    pub async fn start(options: HubOptions, agent: Agent) -> Result<HubHandle, HubError> {
        if options.roles.is_empty() {
            return Err(HubError::NoRole);
        }
        if options.roles.contains(&Role::Gateway) {
            return Err(HubError::NotAHubRole(Role::Gateway));
        }
        let has = |role| options.roles.contains(&role);
        let address = |listener: &TcpListener, name| {
            listener.local_addr().map_err(|error| HubError::Listener { listener: name, error })
        };
        let grpc = address(&options.grpc, GRPC)?;
        let http = options.http.as_ref().map(|listener| address(listener, HTTP)).transpose()?;

        let directory = Directory::new(agent.clone());
        let owners = OwnerClient::start(directory.clone(), client::Options::default());
        let (stop_http, stop_grpc) = (CancellationToken::new(), CancellationToken::new());
        let saver = match has(Role::Saver) {
            true => {
                let saver = SaverOptions::new(options.data_dir.join("saver"), &options.cluster);
                Some(Box::pin(Saver::open(saver, &options.metrics)).await?)
            }
            false => None,
        };
        let (failed, failure) = watch::channel(None);
        if let Some(saver) = &saver {
            if let Some(store) = saver.embedded() {
                let claim = Claim::new(store.clone(), options.instance_id.clone(), agent.admin());
                if let Err(error) = claim.make(options.take_over_saver.as_deref()).await {
                    saver.stop().await;
                    return Err(error.into());
                }
                let stopped = stop_grpc.clone();
                tokio::spawn(async move {
                    if let Some(reason) = stopped.run_until_cancelled(claim.keep()).await {
                        failed.send_replace(Some(reason));
                    }
                });
            }
            let closing = close_abandoned(saver.store().clone(), agent.instances(Role::Gateway));
            let stopped = stop_grpc.clone();
            tokio::spawn(async move { stopped.run_until_cancelled(closing).await });
        }
        let registry = match has(Role::Registry) {
            true => Some(Registry::start(RegistryDeps {
                instance: options.instance_id.clone(),
                incarnation: options.incarnation,
                directory: directory.clone(),
                owners: owners.clone(),
                metrics: options.metrics.clone(),
            })?),
            false => None,
        };
        let shares = match &registry {
            Some(registry) => Some(Shares::start(SharesDeps {
                instance: options.instance_id.clone(),
                incarnation: options.incarnation,
                directory: directory.clone(),
                ownership: registry.ownership(),
                metrics: options.metrics.clone(),
            })?),
            None => None,
        };
        let apps = agent.configs::<App>();
        let center = match has(Role::Center) {
            true => Some(Center::new(center::Deps {
                apps,
                cluster: Arc::new(owners),
                metrics: center::metrics::Metrics::register(&options.metrics)?,
                options: center::Options::default(),
            })),
            false => None,
        };
        let dispatcher = match has(Role::Dispatcher) {
            true => Some(Dispatcher::new(dispatcher::Deps {
                gateways: agent.instances(Role::Gateway),
                metrics: dispatcher::Metrics::register(&options.metrics)?,
                options: dispatcher::Options::default(),
            })),
            false => None,
        };
        let coordinator = match has(Role::Coordinator) {
            true => Some(Coordinator::start(CoordinatorDeps {
                instance: options.instance_id.clone(),
                incarnation: options.incarnation,
                directory: directory.clone(),
                metrics: options.metrics.clone(),
            })?),
            false => None,
        };

        let mut routes = tonic::service::RoutesBuilder::default();
        if let Some(saver) = &saver {
            routes.add_service(saver.service());
        }
        if let Some(registry) = &registry {
            routes.add_service(registry.service());
        }
        if let Some(shares) = &shares {
            routes.add_service(shares.service());
        }
        if let Some(center) = &center {
            routes.add_service(center.grpc_service());
        }
        let mut servers = vec![("grpc", serve_grpc(options.grpc, routes.routes(), stop_grpc.clone()))];
        if let Some(listener) = options.http {
            let mut router = options.console;
            if let Some(center) = &center {
                router = router.merge(center.http_router());
            }
            if let Some(dispatcher) = &dispatcher {
                router = router.merge(dispatcher.http_router());
            }
            servers.push(("http", serve_http(listener, router, stop_http.clone())));
        }

        let mut addresses = options.advertise;
        addresses.entry(GRPC.to_owned()).or_insert_with(|| grpc.to_string());
        if let Some(http) = http {
            addresses.entry(HTTP.to_owned()).or_insert_with(|| http.to_string());
        }
        let instance = Instance {
            id: options.instance_id,
            incarnation: options.incarnation,
            roles: options.roles,
            addresses,
            labels: options.labels,
            draining: false,
        };
        tracing::info!(id = instance.id, incarnation = instance.incarnation, %grpc, ?http, "the hub has started");
        agent.register(instance.clone());
        Ok(HubHandle {
            instance,
            grpc,
            http,
            agent,
            directory,
            saver,
            registry,
            shares,
            coordinator,
            stop_http,
            stop_grpc,
            servers,
            failure,
        })
    }
}

impl HubHandle {
    /// Where other roles reach it on this machine.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http
    }

    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Resolves when it cannot go on, with the reason: another store is the cluster's saver by now.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let mut failure = self.failure.clone();
        async move {
            let reason = failure.wait_for(Option::is_some).await.map(|reason| reason.clone());
            match reason {
                Ok(reason) => reason.unwrap_or_default(),
                // Nobody looks any more, and so nothing fails.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Is it discoverable, are all slots owned, and is there a saver? For readiness probes.
    pub fn is_ready(&self) -> bool {
        let me = |role| {
            self.directory.live(role).iter().any(|instance| {
                instance.id == self.instance.id && instance.incarnation == self.instance.incarnation
            })
        };
        self.instance.roles.iter().all(|&role| me(role))
            && self
                .registry
                .as_ref()
                .is_none_or(|registry| registry.is_ready() && self.directory.saver().is_ok())
    }

    /// Resolves when it [`is_ready`](Self::is_ready); waits for the keeper as long as it takes.
    pub async fn ready(&self) {
        self.agent.ready().await;
        while !self.is_ready() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Takes no more requests, answers what is in flight, flushes the saver. Takes at most about twenty seconds, and
    /// well below one when nothing is in flight.
    pub async fn stop(mut self) {
        self.agent.register(Instance { draining: true, ..self.instance.clone() });
        self.stop_http.cancel();
        self.join("http").await;
        if let Some(registry) = self.registry.take() {
            self.hand_over().await;
            // Before the registry's streams end, on which their messages come.
            if let Some(shares) = self.shares.take() {
                shares.stop().await;
            }
            registry.stop().await;
        }
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.stop().await;
        }
        if let Some(saver) = self.saver.take() {
            saver.stop().await;
        }
        self.stop_grpc.cancel();
        self.join("grpc").await;
        tracing::info!(id = self.instance.id, "the hub has stopped");
    }

    /// Waits until other registry instances have our slots, if there are others.
    async fn hand_over(&self) {
        let others = self
            .directory
            .live(Role::Registry)
            .iter()
            .any(|instance| instance.id != self.instance.id && !instance.draining);
        if !others {
            return;
        }
        let gone = async {
            while self.directory.slots().slots.iter().any(|owner| *owner.instance == *self.instance.id) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(HAND_OVER, gone).await.is_err() {
            tracing::warn!("the slots of this registry were not taken over in time");
        }
    }

    async fn join(&mut self, name: &str) {
        let Some(place) = self.servers.iter().position(|(server, _)| *server == name) else { return };
        let (_, mut task) = self.servers.swap_remove(place);
        if tokio::time::timeout(GRACE, &mut task).await.is_err() {
            tracing::warn!(server = name, "connections were still open when the server was stopped");
            task.abort();
        }
    }
}

/// Sessions of a gateway that is gone, or that has started anew, count as closed from now: their expiry begins.
async fn close_abandoned(
    store: Arc<dyn crate::saver::Store>,
    mut gateways: carillon_agent::Live<Vec<Instance>>,
) {
    let mut known: std::collections::HashMap<String, u64> = std::collections::HashMap::new();
    loop {
        let alive: std::collections::HashMap<String, u64> = gateways
            .borrow_and_update()
            .iter()
            .map(|instance| (instance.id.clone(), instance.incarnation))
            .collect();
        let gone = known.iter().filter(|(id, _)| !alive.contains_key(*id)).map(|(id, last)| (id, last + 1));
        let again = alive.iter().filter(|(id, now)| known.get(*id) != Some(*now)).map(|(id, now)| (id, *now));
        for (gateway, below) in gone.chain(again) {
            match store.close_attached(gateway.clone(), below).await {
                Ok(0) => {}
                Ok(sessions) => {
                    tracing::info!(%gateway, sessions, "closed the sessions of a gateway that is gone")
                }
                Err(error) => {
                    tracing::warn!(%gateway, %error, "cannot close the sessions of a gateway that is gone")
                }
            }
        }
        known = alive;
        if gateways.changed().await.is_err() {
            return;
        }
    }
}

fn serve_grpc(
    listener: TcpListener,
    routes: tonic::service::Routes,
    stop: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let served = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_routes(routes)
            .serve_with_incoming_shutdown(NoDelay(TcpListenerStream::new(listener)), stop.cancelled())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the gRPC server has ended");
        }
    })
}

/// Accepted connections that send small frames at once.
struct NoDelay(TcpListenerStream);

impl futures::Stream for NoDelay {
    type Item = std::io::Result<tokio::net::TcpStream>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::pin::Pin::new(&mut self.0).poll_next(cx).map(|accepted| {
            accepted.map(|accepted| accepted.inspect(|stream| drop(stream.set_nodelay(true))))
        })
    }
}

fn serve_http(listener: TcpListener, router: axum::Router, stop: CancellationToken) -> JoinHandle<()> {
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "the HTTP server has ended");
        }
    })
}
