//! The keeper: Raft, and on it typed configuration, discovery, slot assignment and commands. See ARCHITECTURE.md.
//!
//! [`Keeper::start`] gives a running keeper on a listener; everyone speaks to it over gRPC, most with `carillon-agent`.
//! Alone or one of several, it is the same code: any node can be asked anything, what only the leader can do is handed to
//! it. What decides ([`state`], [`slots`]) is pure; what consensus is made of stays in
//! [`raft`].

mod access;
#[doc(hidden)]
pub mod bench;
mod blocking;
mod budget;
mod commands;
mod configuration;
mod core;
mod discovery;
mod disk;
mod home;
mod identity;
mod interests;
mod joining;
mod leases;
mod membership;
pub mod metrics;
mod opening;
mod origin;
mod peers;
mod raft;
mod saver_claim;
mod secured;
mod seldom;
mod service;
#[cfg(test)]
mod simulation;
mod slots;
pub mod snapshot;
mod state;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::document::DocumentKind;
use carillon_agent::subject::{CertificateRole, Subject};
use carillon_agent::tls::{Tls, scheme};
use carillon_proto::MAX_GRPC_MESSAGE_BYTES;
use carillon_proto::v1::keeper_peer_server::KeeperPeerServer;
use carillon_proto::v1::keeper_server::KeeperServer;
use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpIncoming};

use crate::access::{Gate, Protection};
use crate::budget::Budget;
use crate::core::Core;
pub use crate::core::Limits;
use crate::disk::Disk;
use crate::home::Home;
pub use crate::home::HomeError;
use crate::identity::node_text;
use crate::leases::Leases;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::raft::{Node, NodeError, StorageError};
use crate::service::Service;

/// A node that is alone must lead within this.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Snapshots that may be saved at a time.
const SNAPSHOTS_SAVED: usize = 2;
/// A leader that stops hands its lead over within this, if somebody can take it.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Calls under way are given this long to end when the keeper stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// What one connection may send before it is read, several streams' worth.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// What a keeper needs.
pub struct KeeperOptions<L = TcpListener> {
    /// Its own directory: log, snapshots, identity. Created when missing; a foreign one is refused.
    pub data_dir: PathBuf,
    /// Bound already, so that the caller knows the address, and that a port in use is the caller's error.
    pub listener: L,
    /// The kinds of document that exist.
    pub kinds: Vec<DocumentKind>,
    /// Refuse a data directory of another cluster; None: any, and a new one gets a random id.
    pub cluster_id: Option<String>,
    /// `host:port` that others reach this node at; None: the listener's address.
    pub advertise: Option<String>,
    /// `host:port` of all keepers that are to form the cluster, this one among them; the first by name founds it. Empty: this
    /// node alone.
    pub peers: Vec<String>,
    /// Its certificate, which must be a keeper's, and whose certificates it takes. None: it is reached without TLS, and whoever
    /// reaches it may do everything.
    pub tls: Option<Arc<Tls>>,
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
            peers: Vec::new(),
            tls: None,
            registry: None,
            limits: Limits::default(),
        }
    }
}

impl<L> KeeperOptions<L> {
    /// The same on what accepts from the listener.
    fn listening<M>(self, accept: impl FnOnce(L) -> M) -> KeeperOptions<M> {
        KeeperOptions {
            data_dir: self.data_dir,
            listener: accept(self.listener),
            kinds: self.kinds,
            cluster_id: self.cluster_id,
            advertise: self.advertise,
            peers: self.peers,
            tls: self.tls,
            registry: self.registry,
            limits: self.limits,
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
    #[error("keeper: {own} is not among the peers {peers}: name it as the others do (--advertise-grpc)")]
    NotAmongPeers { own: String, peers: String },
    #[error(
        "keeper: {damage}; it is alone, so that nobody has another copy: restore a snapshot, or the volume"
    )]
    Damaged { damage: String },
    #[error(
        "keeper: {damage}; it can start over as soon as the others have a leader, but none of {} says so",
        others.join(", ")
    )]
    DamagedAndAlone { damage: String, others: Vec<String> },
    #[error(
        "keeper: node {node} runs at {address} already: this data directory is a copy of that one's, and two with one id would have two votes; start with an empty one"
    )]
    Twice { node: String, address: String },
    #[error("keeper: peer {peer} is of cluster {found}, not of {expected}")]
    OtherCluster { peer: String, found: String, expected: String },
    #[error("keeper: two document kinds are called {0}")]
    DuplicateKind(&'static str),
    #[error("keeper: it did not become the leader within {} s", READY_TIMEOUT.as_secs())]
    NoLeader,
    #[error("keeper: the listener is of no use: {0}")]
    Listener(std::io::Error),
    #[error(
        "keeper: the certificate in {} is that of {subject}: a keeper needs one with the URI carillon://keeper",
        path.display()
    )]
    NotAKeeper { path: PathBuf, subject: Subject },
    #[error("keeper: metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl From<NodeError> for KeeperError {
    fn from(error: NodeError) -> Self {
        KeeperError::Node(error.to_string())
    }
}

impl From<StorageError> for KeeperError {
    fn from(error: StorageError) -> Self {
        KeeperError::Node(error.to_string())
    }
}

/// How a keeper is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeeperStatus {
    pub cluster_id: String,
    pub node_id: u64,
    pub leads: bool,
    /// It hears a leader, or leads and hears a majority.
    pub in_touch: bool,
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
        let addr = options.listener.local_addr().map_err(KeeperError::Listener)?;
        let metrics = Metrics::new()?;
        match options.tls.clone() {
            Some(tls) => {
                let subject = tls.now().subject.clone();
                if subject.role != CertificateRole::Keeper {
                    return Err(KeeperError::NotAKeeper { path: tls.files().certificate.clone(), subject });
                }
                let counted = metrics.clone();
                let accept = |listener| secured::incoming(listener, tls, counted);
                Keeper::start_on(options.listening(accept), addr, metrics).await
            }
            None => {
                if !addr.ip().is_loopback() {
                    tracing::warn!(
                        %addr,
                        "without TLS whoever reaches this keeper may change everything: --tls-certificate, --tls-key, \
                         --tls-client-ca"
                    );
                }
                let accept = |listener| TcpIncoming::from(listener).with_nodelay(Some(true));
                Keeper::start_on(options.listening(accept), addr, metrics).await
            }
        }
    }

    /// The same on connections that come from wherever.
    async fn start_on<I, IO>(
        options: KeeperOptions<I>,
        addr: SocketAddr,
        metrics: Metrics,
    ) -> Result<KeeperHandle, KeeperError>
    where
        I: Stream<Item = std::io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Connected<ConnectInfo: Clone + Send + Sync> + Unpin + Send + 'static,
    {
        for (i, kind) in options.kinds.iter().enumerate() {
            if options.kinds[..i].iter().any(|other| other.kind == kind.kind) {
                return Err(KeeperError::DuplicateKind(kind.kind));
            }
        }
        let advertise = options.advertise.unwrap_or_else(|| addr.to_string());
        if !options.peers.is_empty() && !options.peers.contains(&advertise) {
            return Err(KeeperError::NotAmongPeers { own: advertise, peers: options.peers.join(", ") });
        }
        let (path, expected) = (options.data_dir.clone(), options.cluster_id.clone());
        let mut home = crate::blocking::run(move || Home::open(&path, expected.as_deref()))
            .await
            .map_err(|error| KeeperError::Node(error.to_string()))??;
        let tls = options.tls;
        let storage =
            opening::verified(&mut home, &options.data_dir, &options.peers, &advertise, tls.as_ref()).await?;
        let home = Arc::new(home);
        let (node, observer) =
            Node::start(home.identity().clone(), tls.clone(), storage, &options.limits).await?;
        let core = Arc::new(Core {
            node,
            kinds: options.kinds,
            watches: Budget::new(options.limits.watches, options.limits.watches_per_caller),
            limits: options.limits,
            leases: Leases::default(),
            disk: Disk::new(options.data_dir),
            metrics,
            protection: Protection::new(tls, addr),
            publishing: tokio::sync::Mutex::new(()),
            saving: Arc::new(tokio::sync::Semaphore::new(SNAPSHOTS_SAVED)),
            stop: CancellationToken::new(),
        });
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
        tasks.spawn(disk::run(core.clone()));
        tasks.spawn(slots::keeping::run(core.clone()));
        tasks.spawn(commands::sweep(core.clone()));
        tasks.spawn(access::follow_files(core.clone()));
        tasks.spawn(membership::steward(core.clone(), advertise.clone()));
        let server = tokio::spawn(serve(core.clone(), &home, options.listener));
        let (not_joined, failure) = tokio::sync::watch::channel(None);
        let running = Running { server, tasks, observer, _registered: registered, _home: home.clone() };
        let mut handle = KeeperHandle { addr, core: core.clone(), failure, running: Some(running) };
        let cluster_id = options.cluster_id;
        if options.peers.is_empty() && !home.is_claimed() {
            let alone = async {
                joining::join(&core, &home, &advertise, &[], cluster_id.as_deref()).await?;
                // Others may have been taken in since; then one of them may lead.
                if core.node.is_alone() { handle.lead().await } else { Ok(()) }
            };
            if let Err(error) = alone.await {
                handle.stop().await;
                return Err(error);
            }
            tracing::info!(%addr, cluster = core.cluster_id(), revision = core.node.state().revision(), "keeper is ready");
        } else if let Some(running) = &mut handle.running {
            running.tasks.spawn(async move {
                let joined =
                    joining::join(&core, &home, &advertise, &options.peers, cluster_id.as_deref()).await;
                if let Err(error) = joined {
                    not_joined.send_replace(Some(error.to_string()));
                    core.stop.cancelled().await;
                }
            });
            tracing::info!(%addr, node = node_text(handle.core.node.id()), "keeper serves");
        }
        Ok(handle)
    }
}

fn serve<I, IO>(
    core: Arc<Core>,
    home: &Arc<Home>,
    incoming: I,
) -> impl Future<Output = ()> + Send + use<I, IO>
where
    I: Stream<Item = std::io::Result<IO>> + Send + 'static,
    IO: AsyncRead + AsyncWrite + Connected<ConnectInfo: Clone + Send + Sync> + Unpin + Send + 'static,
{
    let service = KeeperServer::new(Service::new(core.clone()))
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let peers = KeeperPeerServer::new(Peers::new(core.clone(), home))
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let secured = core.protection.is_tls();
    let service = Gate::new(service, secured, core.metrics.clone());
    let peers = Gate::new(peers, secured, core.metrics.clone());
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        // A stream of appends or proposals must not keep heartbeats and votes from the connection that they share.
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_service(service)
        .add_service(peers)
        .serve_with_incoming_shutdown(incoming, core.stop.clone().cancelled_owned());
    async move {
        if let Err(error) = served.await {
            tracing::error!(%error, "keeper does not serve any more");
        }
    }
}

struct Running {
    server: JoinHandle<()>,
    tasks: JoinSet<()>,
    observer: JoinHandle<()>,
    _registered: Option<metrics::Registered>,
    /// Last: the directory is locked until everything else has ended.
    _home: Arc<Home>,
}

/// A running keeper. Dropping it ends the keeper without waiting; [`KeeperHandle::stop`] waits.
pub struct KeeperHandle {
    addr: SocketAddr,
    core: Arc<Core>,
    /// Why it cannot join its cluster, if it cannot.
    failure: tokio::sync::watch::Receiver<Option<String>>,
    running: Option<Running>,
}

impl KeeperHandle {
    /// Waits until this node leads.
    async fn lead(&self) -> Result<(), KeeperError> {
        let mut leadership = self.core.node.leadership();
        let led = tokio::time::timeout(READY_TIMEOUT, leadership.wait_for(Option::is_some)).await;
        if matches!(led, Ok(Ok(_))) {
            return Ok(());
        }
        let failure = self.core.node.failure().borrow().clone();
        Err(failure.map_or(KeeperError::NoLeader, KeeperError::Node))
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://host:port`, or `https://`, as the agent wants it.
    pub fn endpoint(&self) -> String {
        let tls = match &self.core.protection {
            Protection::Tls(tls) => Some(tls),
            Protection::Loopback | Protection::Open => None,
        };
        format!("{}://{}", scheme(tls), self.addr)
    }

    pub fn status(&self) -> KeeperStatus {
        let progress = self.core.node.progress();
        let leads = self.core.node.leads();
        let failure = self.core.node.failure().borrow().clone();
        let state = self.core.node.state();
        KeeperStatus {
            cluster_id: self.core.cluster_id(),
            node_id: self.core.node.id(),
            leads,
            in_touch: self.core.node.in_touch(),
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
        let (mut consensus, mut joining) = (self.core.node.failure(), self.failure.clone());
        async move {
            let failed = tokio::select! {
                failed = consensus.wait_for(Option::is_some) => failed.map(|failed| failed.clone()),
                Ok(failed) = joining.wait_for(Option::is_some) => Ok(failed.clone()),
            };
            failed.ok().flatten().unwrap_or_else(|| "it has stopped".to_owned())
        }
    }

    /// Makes a snapshot in the background; it happens by itself every few thousand entries.
    pub async fn snapshot(&self) -> Result<(), KeeperError> {
        self.core.node.snapshot().await.map_err(|error| KeeperError::Node(error.to_string()))
    }

    /// Ends calls and watches, then consensus, then lets go of the directory.
    pub async fn stop(mut self) {
        let Some(mut running) = self.running.take() else { return };
        if self.core.node.leads() && self.core.node.members().len() > 1 {
            match tokio::time::timeout(HAND_OVER_TIMEOUT, self.core.node.hand_over(0)).await {
                Ok(Ok(heir)) => tracing::info!(heir = node_text(heir), "the lead is handed over"),
                Ok(Err(status)) => tracing::warn!(reason = status.message(), "the lead is not handed over"),
                Err(_) => tracing::warn!("the lead is not handed over in time"),
            }
        }
        self.core.stop();
        if tokio::time::timeout(STOP_TIMEOUT, &mut running.server).await.is_err() {
            tracing::debug!("calls are still under way, they are cut off");
            running.server.abort();
            let _ = running.server.await;
        }
        let ended = async { while running.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
            running.tasks.shutdown().await;
        }
        self.core.node.stop().await;
        let _ = running.observer.await;
        tracing::info!(addr = %self.addr, "keeper has stopped");
    }
}

impl Drop for KeeperHandle {
    fn drop(&mut self) {
        self.core.stop();
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
