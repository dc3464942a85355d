//! The keeper: Raft, and on it typed configuration, discovery, slot assignment and commands. DESIGN.md §6.
//!
//! [`Keeper::start`] gives a running keeper on a listener; everyone speaks to it over gRPC, most with `carillon-agent`.
//! A keeper is a single node for now. What decides ([`state`], [`slots`]) is pure; what consensus is made of stays in
//! [`raft`].

mod commands;
mod configuration;
mod core;
mod discovery;
mod home;
mod leases;
pub mod metrics;
mod raft;
mod service;
mod slots;
mod state;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::document::DocumentKind;
use carillon_proto::MAX_GRPC_MESSAGE_BYTES;
use carillon_proto::v1::keeper_server::KeeperServer;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::core::Core;
pub use crate::core::Limits;
use crate::home::Home;
pub use crate::home::HomeError;
use crate::leases::Leases;
use crate::metrics::Metrics;
use crate::raft::{Node, NodeError};
use crate::service::Service;

/// A node that founds or finds its cluster must lead within this.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Calls under way are given this long to end when the keeper stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a keeper needs.
pub struct KeeperOptions {
    /// Its own directory: log, snapshots, identity. Created when missing; a foreign one is refused.
    pub data_dir: PathBuf,
    /// Bound already, so that the caller knows the address, and that a port in use is the caller's error.
    pub listener: TcpListener,
    /// The kinds of document that exist.
    pub kinds: Vec<DocumentKind>,
    /// Refuse a data directory of another cluster; None: any, and a new one gets a random id.
    pub cluster_id: Option<String>,
    /// `host:port` that others reach this node at; None: the listener's address.
    pub advertise: Option<String>,
    /// Where its metrics go, until it is stopped.
    pub registry: Option<prometheus::Registry>,
    pub limits: Limits,
}

impl KeeperOptions {
    /// With the defaults for the rest.
    pub fn new(data_dir: impl Into<PathBuf>, listener: TcpListener, kinds: Vec<DocumentKind>) -> Self {
        KeeperOptions {
            data_dir: data_dir.into(),
            listener,
            kinds,
            cluster_id: None,
            advertise: None,
            registry: None,
            limits: Limits::default(),
        }
    }
}

/// Why a keeper could not be started.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error("keeper: {0}")]
    Node(String),
    #[error("keeper: two document kinds are called {0}")]
    DuplicateKind(&'static str),
    #[error("keeper: it did not become the leader within {} s", READY_TIMEOUT.as_secs())]
    NoLeader,
    #[error("keeper: the listener is of no use: {0}")]
    Listener(std::io::Error),
    #[error("keeper: metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl From<NodeError> for KeeperError {
    fn from(error: NodeError) -> Self {
        KeeperError::Node(error.to_string())
    }
}

/// How a keeper is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeeperStatus {
    pub cluster_id: String,
    pub node_id: u64,
    pub leads: bool,
    pub term: u64,
    pub applied_index: u64,
    pub snapshot_index: u64,
    /// Of the store.
    pub revision: u64,
    pub keys: usize,
    pub bytes: usize,
    pub leases: usize,
    /// Why it has stopped deciding, if it has: only a restart helps.
    pub failure: Option<String>,
}

/// The way to start one.
pub struct Keeper;

impl Keeper {
    /// Recovers what is on disk, serves, and returns when it leads: what was decided before can be read.
    pub async fn start(options: KeeperOptions) -> Result<KeeperHandle, KeeperError> {
        for (i, kind) in options.kinds.iter().enumerate() {
            if options.kinds[..i].iter().any(|other| other.kind == kind.kind) {
                return Err(KeeperError::DuplicateKind(kind.kind));
            }
        }
        let addr = options.listener.local_addr().map_err(KeeperError::Listener)?;
        let (path, expected) = (options.data_dir.clone(), options.cluster_id.clone());
        let home = tokio::task::spawn_blocking(move || Home::open(&path, expected.as_deref()))
            .await
            .map_err(|error| KeeperError::Node(error.to_string()))??;
        let advertise = options.advertise.unwrap_or_else(|| addr.to_string());
        let (node, observer) = Node::start(home.node_id, &options.data_dir, advertise).await?;
        let core = Arc::new(Core {
            node,
            cluster_id: home.cluster_id.clone(),
            kinds: options.kinds,
            limits: options.limits,
            leases: Leases::default(),
            metrics: Metrics::new()?,
            publishing: tokio::sync::Mutex::new(()),
            stop: CancellationToken::new(),
        });
        let mut leadership = core.node.leadership();
        let led = tokio::time::timeout(READY_TIMEOUT, leadership.wait_for(Option::is_some)).await;
        if !matches!(led, Ok(Ok(_))) {
            core.node.stop().await;
            let failure = core.node.failure().borrow().clone();
            return Err(failure.map_or(KeeperError::NoLeader, KeeperError::Node));
        }
        let registered = match options.registry.map(|registry| metrics::register(&core, registry)).transpose()
        {
            Ok(registered) => registered,
            Err(error) => {
                core.node.stop().await;
                return Err(error.into());
            }
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(leases::run(core.clone()));
        tasks.spawn(slots::run(core.clone()));
        tasks.spawn(commands::sweep(core.clone()));
        let server = tokio::spawn(serve(core.clone(), options.listener));
        tracing::info!(%addr, cluster = core.cluster_id, revision = core.node.state().revision(), "keeper is ready");
        let running = Running { server, tasks, observer, _registered: registered, _home: home };
        Ok(KeeperHandle { addr, core, running: Some(running) })
    }
}

async fn serve(core: Arc<Core>, listener: TcpListener) {
    let service = KeeperServer::new(Service::new(core.clone()))
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, core.stop.clone().cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "keeper does not serve any more");
    }
}

struct Running {
    server: JoinHandle<()>,
    tasks: JoinSet<()>,
    observer: JoinHandle<()>,
    _registered: Option<metrics::Registered>,
    /// Last: the directory is locked until everything else has ended.
    _home: Home,
}

/// A running keeper. Dropping it ends the keeper without waiting; [`KeeperHandle::stop`] waits.
pub struct KeeperHandle {
    addr: SocketAddr,
    core: Arc<Core>,
    running: Option<Running>,
}

impl KeeperHandle {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://host:port`, as the agent wants it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn status(&self) -> KeeperStatus {
        let progress = self.core.node.progress();
        let leads = self.core.node.leadership().borrow().is_some();
        let failure = self.core.node.failure().borrow().clone();
        let state = self.core.node.state();
        KeeperStatus {
            cluster_id: self.core.cluster_id.clone(),
            node_id: self.core.node.id(),
            leads,
            term: progress.term,
            applied_index: progress.applied,
            snapshot_index: progress.snapshot,
            revision: state.revision(),
            keys: state.len(),
            bytes: state.bytes(),
            leases: state.lease_count(),
            failure,
        }
    }

    /// Resolves when the keeper cannot go on (its disk fails, consensus has ended), with the reason: the process had
    /// better end.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let mut failure = self.core.node.failure();
        async move {
            match failure.wait_for(Option::is_some).await {
                Ok(failure) => failure.clone().unwrap_or_default(),
                Err(_) => "it has stopped".to_owned(),
            }
        }
    }

    /// Makes a snapshot in the background; it happens by itself every few thousand entries.
    pub async fn snapshot(&self) -> Result<(), KeeperError> {
        self.core.node.snapshot().await.map_err(|error| KeeperError::Node(error.to_string()))
    }

    /// Ends calls and watches, then consensus, then lets go of the directory.
    pub async fn stop(mut self) {
        let Some(mut running) = self.running.take() else { return };
        self.core.stop.cancel();
        if tokio::time::timeout(STOP_TIMEOUT, &mut running.server).await.is_err() {
            tracing::debug!("calls are still under way, they are cut off");
            running.server.abort();
            let _ = running.server.await;
        }
        while running.tasks.join_next().await.is_some() {}
        self.core.node.stop().await;
        let _ = running.observer.await;
        tracing::info!(addr = %self.addr, "keeper has stopped");
    }
}

impl Drop for KeeperHandle {
    fn drop(&mut self) {
        self.core.stop.cancel();
        let Some(running) = self.running.take() else { return };
        running.server.abort();
        // Consensus ends in the background, and the directory stays locked until it has.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let core = self.core.clone();
            runtime.spawn(async move {
                core.node.stop().await;
                drop(running);
            });
        }
    }
}
