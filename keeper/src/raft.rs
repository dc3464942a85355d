//! Consensus behind one small boundary: [`Node`]. Nothing of openraft is seen outside this module.

mod admission;
mod codec;
mod cutting;
mod forwarding;
mod groups;
mod log_store;
mod machine;
mod measures;
mod members;
pub(crate) mod network;
mod proposing;
mod reading;
mod storage;
pub(crate) mod types;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::tls::Tls;
use carillon_proto::v1;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{InitializeError, RaftError};
use openraft::{BasicNode, Config, Instant as _, Raft, RaftMetrics, SnapshotPolicy};
use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Status;

use crate::core::Limits;
use crate::identity::Identity;
use crate::interests::Interests;
use crate::state::State;
use admission::Admission;
pub(crate) use admission::Admitted;
use forwarding::Forwarding;
pub(crate) use log_store::LogStore;
use machine::Machine;
pub(crate) use machine::SnapshotFile;
pub(crate) use measures::Measures;
use network::{Network, within};
use reading::Readers;
pub(crate) use storage::{Found, Storage, StorageError};
use types::TypeConfig;

const HEARTBEAT_MS: u64 = 150;
const ELECTION_MIN_MS: u64 = 1_000;
const ELECTION_MAX_MS: u64 = 2_000;
/// A snapshot must be with a follower within this.
const SNAPSHOT_TIMEOUT_MS: u64 = 60_000;
/// An entry that is not committed within this is given up waiting for; a leader is waited for as long.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks for a leader.
const RETRY: Duration = Duration::from_millis(50);
/// A node that has neither heard a leader nor (as the leader) a majority for this long is out of touch.
const TOUCH: Duration = Duration::from_secs(5);

/// Consensus did not start.
#[derive(Debug, thiserror::Error)]
#[error("consensus did not start: {0}")]
pub(crate) struct NodeError(String);

/// Nothing can be decided here at present; another node may, or this one later.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Unavailable {
    /// Nothing was done.
    #[error("this keeper is not the leader; the leader is {}", leader.as_deref().unwrap_or("not known"))]
    NotLeader { leader: Option<String> },
    #[error("it was not decided within 10 s")]
    Timeout,
    /// It may have been decided, or may still be.
    #[error("whether it was decided is not known: {0}")]
    Unknown(String),
    /// Nothing was done.
    #[error("the keeper has failed: {0}")]
    Failed(String),
    /// The leader has no room; nothing was done.
    #[error("{0}")]
    Full(String),
    /// Nothing was done, and can be a moment later.
    #[error(
        "the keeper is busy: what it was asked and has not decided has {limit} bytes, which is the most; try again"
    )]
    Busy { limit: u32 },
}

impl Unavailable {
    /// In a word.
    fn reason(&self) -> &'static str {
        match self {
            Unavailable::NotLeader { .. } => "no_leader",
            Unavailable::Timeout => "timeout",
            Unavailable::Unknown(_) => "unknown",
            Unavailable::Failed(_) => "failed",
            Unavailable::Full(_) => "full",
            Unavailable::Busy { .. } => "busy",
        }
    }
}

/// The term in which this node leads: what is proposed with it is refused when another term has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leadership {
    term: u64,
    node_id: u64,
}

/// How consensus is going.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    pub term: u64,
    pub leader: Option<u64>,
    pub last_log: u64,
    pub committed: u64,
    pub applied: u64,
    pub snapshot: u64,
}

/// A cheap handle to this node.
#[derive(Clone)]
pub(crate) struct Node {
    identity: Arc<Identity>,
    raft: Raft<TypeConfig, Machine>,
    machine: Machine,
    log: LogStore,
    network: Network,
    readers: Readers,
    admission: Admission,
    forwarding: Forwarding,
    /// When a leader was last heard.
    heard: Arc<Mutex<Instant>>,
    /// Held while the membership is changed.
    changing: Arc<tokio::sync::Mutex<()>>,
    leadership: watch::Receiver<Option<Leadership>>,
    failure: watch::Receiver<Option<String>>,
    measures: Measures,
}

/// As the leader sees it.
pub(crate) struct PeerProgress {
    pub id: u64,
    /// Entries that are not known to be on its disk.
    pub lag: u64,
    /// The last heartbeat there and back.
    pub round_trip: Option<Duration>,
}

impl Node {
    /// Starts the node on what it has. A blank one does nothing until it has [founded](Node::found) a cluster, or one
    /// has taken it in.
    pub(crate) async fn start(
        identity: Arc<Identity>,
        tls: Option<Arc<Tls>>,
        storage: Storage,
        limits: &Limits,
    ) -> Result<(Node, JoinHandle<()>), NodeError> {
        let Storage { log, machine } = storage;
        let config = Config {
            cluster_name: "carillon".to_owned(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MIN_MS,
            election_timeout_max: ELECTION_MAX_MS,
            install_snapshot_timeout: SNAPSHOT_TIMEOUT_MS,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(limits.snapshot_every),
            max_in_snapshot_log_to_keep: limits.snapshot_every,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            ..Config::default()
        };
        let failed = |error: &dyn std::fmt::Display| NodeError(error.to_string());
        let config = config.validate().map_err(|error| failed(&error))?;
        let id = identity.node_id();
        let network = Network::new(identity.clone(), tls);
        let raft = Raft::new(id, Arc::new(config), network.clone(), log.clone(), machine.clone())
            .await
            .map_err(|error| failed(&error))?;
        network.follow(raft.metrics());
        let founded = raft.is_initialized().await.map_err(|error| failed(&error))?;
        // Alone, there is nobody whose heartbeat one would have to wait for.
        if founded && raft.voter_ids().eq([id]) {
            raft.trigger().elect(false).await.map_err(|error| failed(&error))?;
        }
        let (leadership_sender, leadership) = watch::channel(None);
        let (failure_sender, failure) = watch::channel(None);
        let measures = Measures::new(&log, &machine).map_err(|error| failed(&error))?;
        let seen = measures.leaders_seen.clone();
        let task = tokio::spawn(observe(raft.clone(), id, seen, leadership_sender, failure_sender));
        let node = Node {
            identity,
            raft,
            machine,
            log,
            network,
            readers: Readers::default(),
            admission: Admission::new(limits.proposal_bytes),
            forwarding: Forwarding::default(),
            heard: Arc::new(Mutex::new(Instant::now())),
            changing: Arc::default(),
            leadership,
            failure,
            measures,
        };
        Ok((node, task))
    }

    /// Founds a cluster of these nodes, by id and address, this one among them: all have a vote at once. Nothing happens when
    /// this one belongs to one already.
    /// False: it has voted already in a founding that is not finished.
    pub(crate) async fn found(&self, members: BTreeMap<u64, String>) -> Result<bool, NodeError> {
        let members = members.into_iter().map(|(id, address)| (id, BasicNode::new(address)));
        match self.raft.initialize(members.collect::<BTreeMap<_, _>>()).await {
            Ok(()) => Ok(true),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                self.is_initialized().await.map_err(|error| NodeError(error.to_string()))
            }
            Err(error) => Err(NodeError(error.to_string())),
        }
    }

    /// Does it have a log: is it a member of a cluster, or was it one? A vote alone is nothing that was decided.
    pub(crate) async fn is_initialized(&self) -> Result<bool, Unavailable> {
        let has_log = self.raft.with_raft_state(|state| state.log_ids.last().is_some()).await;
        has_log.map_err(|error| Unavailable::Failed(error.to_string()))
    }

    pub(crate) fn id(&self) -> u64 {
        self.identity.node_id()
    }

    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    /// What other nodes' calls go to.
    pub(crate) fn raft(&self) -> &Raft<TypeConfig, Machine> {
        &self.raft
    }

    /// A leader has shown itself.
    pub(crate) fn leader_heard(&self) {
        *self.heard.lock() = Instant::now();
    }

    pub(crate) fn leads(&self) -> bool {
        self.leadership.borrow().is_some()
    }

    /// As the leader: did a majority answer so recently that nobody else can lead yet?
    pub(crate) fn has_majority(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.state.is_leader() && hears_majority(&metrics, Duration::from_millis(ELECTION_MAX_MS))
    }

    /// Is this node all there is?
    pub(crate) fn is_alone(&self) -> bool {
        self.raft.voter_ids().eq([self.id()])
    }

    /// Does this node hear a leader, or lead and hear a majority? Out of touch, what it has may be old, and stays so.
    pub(crate) fn in_touch(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.state.is_leader() {
            return hears_majority(&metrics, TOUCH);
        }
        metrics.current_leader.is_some() && self.heard.lock().elapsed() < TOUCH
    }

    /// The address of the leader, if one is known.
    fn leader(&self) -> Option<(u64, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|&leader| leader != self.id())?;
        let node = metrics.membership_config.membership().get_node(&leader)?;
        Some((leader, node.addr.clone()))
    }

    fn not_leader(&self) -> Unavailable {
        Unavailable::NotLeader { leader: self.leader().map(|(_, address)| address) }
    }

    /// A client for the leader, which is another node.
    pub(crate) fn leader_client(&self) -> Result<network::PeerClient, Unavailable> {
        let (id, address) = self.leader().ok_or(Unavailable::NotLeader { leader: None })?;
        let client = self.network.member(id, &address);
        client.map_err(|_| Unavailable::NotLeader { leader: Some(address) })
    }

    async fn ask_read_index(&self, limit: Duration) -> Result<u64, Unavailable> {
        let answer = self.leader_client()?.read_index(within(limit, v1::ReadIndexRequest {})).await;
        match answer {
            Ok(answer) => Ok(answer.into_inner().index),
            // Asking twice does no harm, so every failure is one that may pass.
            Err(_) => Err(self.not_leader()),
        }
    }

    /// The state as it is here. Hold it briefly, never across an await: nothing is applied meanwhile.
    pub(crate) fn state(&self) -> impl std::ops::Deref<Target = State> {
        self.machine.state()
    }

    /// The state's revision, as it grows.
    pub(crate) fn revision(&self) -> watch::Receiver<u64> {
        self.machine.revision()
    }

    /// Who waits for which changes.
    pub(crate) fn interests(&self) -> &Interests {
        self.machine.interests()
    }

    /// Has everyone look who waits for changes.
    pub(crate) fn wake_watches(&self) {
        self.machine.wake();
    }

    /// Does this node lead?
    pub(crate) fn leadership(&self) -> watch::Receiver<Option<Leadership>> {
        self.leadership.clone()
    }

    /// Why consensus has ended, once it has. It does not come back without a restart.
    pub(crate) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }

    pub(crate) fn progress(&self) -> Progress {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        Progress {
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_log: metrics.last_log_index.unwrap_or(0),
            committed: metrics.cluster_committed.map_or(0, |id| id.index),
            applied: metrics.last_applied.map_or(0, |id| id.index),
            snapshot: metrics.snapshot.map_or(0, |id| id.index),
        }
    }

    /// The state as it is now, as a snapshot's file.
    pub(crate) fn snapshot_file(&self) -> std::io::Result<Vec<u8>> {
        self.machine.file()
    }

    /// Size of the log's files.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log.disk_bytes()
    }

    /// Size of the snapshot's file.
    pub(crate) fn snapshot_bytes(&self) -> u64 {
        self.machine.disk_bytes()
    }

    /// What is counted here as it happens.
    pub(crate) fn measures(&self) -> &Measures {
        &self.measures
    }

    /// As the leader: how the others follow. Nobody, while another node leads.
    pub(crate) fn peers(&self) -> Vec<PeerProgress> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index.map_or(0, |index| index + 1);
        let others = metrics.replication.iter().flatten().filter(|(id, _)| **id != self.id());
        let progress = others.map(|(&id, matched)| PeerProgress {
            id,
            lag: last.saturating_sub(matched.map_or(0, |matched| matched.index + 1)),
            round_trip: self.network.round_trip(id),
        });
        progress.collect()
    }

    /// Makes a snapshot now, so that the next start has little to read. It is made in the background.
    pub(crate) async fn snapshot(&self) -> Result<(), Unavailable> {
        self.raft.trigger().snapshot().await.map_err(|error| Unavailable::Failed(error.to_string()))
    }

    pub(crate) async fn stop(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not end in order");
        }
        self.log.close();
    }
}

/// Has the leader heard a majority within this time? Alone, it is one.
fn hears_majority(metrics: &RaftMetrics<TypeConfig>, within: Duration) -> bool {
    metrics.membership_config.membership().voter_ids().count() == 1
        || metrics.last_quorum_acked.is_some_and(|at| at.elapsed() < within)
}

/// Did a call not even reach the other node?
fn was_not_sent(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// Turns openraft's metrics into the two things that the rest of the keeper waits for. Of those that change seldom: the
/// others change with each entry.
async fn observe(
    raft: Raft<TypeConfig, Machine>,
    id: u64,
    leaders_seen: IntCounter,
    leadership: watch::Sender<Option<Leadership>>,
    failure: watch::Sender<Option<String>>,
) {
    let mut metrics = raft.server_metrics();
    let last = raft.metrics();
    drop(raft);
    let mut seen = None;
    loop {
        let now = {
            let metrics = metrics.borrow_and_update();
            let term = metrics.vote.leader_id.term;
            let leader = metrics.current_leader.map(|leader| (term, leader));
            if leader.is_some() && std::mem::replace(&mut seen, leader) != leader {
                leaders_seen.inc();
            }
            let leads = metrics.current_leader == Some(id) && metrics.state.is_leader();
            leads.then_some(Leadership { term, node_id: id })
        };
        leadership.send_if_modified(|present| std::mem::replace(present, now) != now);
        // It ends with consensus, whether that was told to, failed, or panicked.
        if metrics.changed().await.is_err() {
            let reason = last.borrow_watched().running_state.as_ref().err().map(ToString::to_string);
            leadership.send_replace(None);
            failure.send_replace(Some(reason.unwrap_or_else(|| "it has stopped".to_owned())));
            return;
        }
    }
}

#[cfg(test)]
mod tests;
