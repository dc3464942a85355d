//! Consensus behind one small boundary: [`Node`]. Nothing of openraft is seen outside this module.

mod codec;
mod log_store;
mod machine;
mod network;
mod types;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::v1;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::impls::ProgressResponder;
use openraft::{BasicNode, Config, Raft, ReadPolicy, SnapshotPolicy};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::state::State;
use log_store::LogStore;
use machine::Machine;
use types::{Entry, TypeConfig};

/// A snapshot is made after this many entries; so many are read again at most at a start.
const SNAPSHOT_EVERY: u64 = 5_000;
/// Entries that stay in the log after a snapshot, for followers that are a little behind.
const KEEP_ENTRIES: u64 = 1_000;
const HEARTBEAT_MS: u64 = 100;
const ELECTION_MIN_MS: u64 = 500;
const ELECTION_MAX_MS: u64 = 1_000;
/// An entry that is not committed within this is given up waiting for.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("the log in {} cannot be opened: {source}", path.display())]
    Log { path: PathBuf, source: io::Error },
    #[error("the snapshot in {} cannot be opened: {source}", path.display())]
    Snapshot { path: PathBuf, source: io::Error },
    #[error("consensus did not start: {0}")]
    Raft(String),
}

/// Nothing can be decided here at present; another node may, or this one later.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Unavailable {
    #[error("this keeper is not the leader; the leader is {}", leader.as_deref().unwrap_or("not known"))]
    NotLeader { leader: Option<String> },
    #[error("it was not decided within 10 s")]
    Timeout,
    #[error("the keeper has failed: {0}")]
    Failed(String),
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
    pub applied: u64,
    pub snapshot: u64,
}

/// A cheap handle to this node.
#[derive(Clone)]
pub(crate) struct Node {
    id: u64,
    raft: Raft<TypeConfig, Machine>,
    machine: Machine,
    log: LogStore,
    leadership: watch::Receiver<Option<Leadership>>,
    failure: watch::Receiver<Option<String>>,
}

impl Node {
    /// Starts the node: recovers what is on disk, founds a cluster of one when there is nothing.
    pub(crate) async fn start(
        id: u64,
        directory: &Path,
        address: String,
    ) -> Result<(Node, JoinHandle<()>), NodeError> {
        let log_path = directory.join("log");
        let snapshot_path = directory.join("snapshot");
        let (log, machine) = open(log_path, snapshot_path).await?;
        let config = Config {
            cluster_name: "carillon".to_owned(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MIN_MS,
            election_timeout_max: ELECTION_MAX_MS,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: KEEP_ENTRIES,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            ..Config::default()
        };
        let config = config.validate().map_err(|error| NodeError::Raft(error.to_string()))?;
        let raft = Raft::new(id, Arc::new(config), network::Network, log.clone(), machine.clone())
            .await
            .map_err(|error| NodeError::Raft(error.to_string()))?;
        let founded = raft.is_initialized().await.map_err(|error| NodeError::Raft(error.to_string()))?;
        if founded {
            // Alone, there is nobody whose heartbeat one would have to wait for.
            if raft.voter_ids().eq([id]) {
                raft.trigger().elect(false).await.map_err(|error| NodeError::Raft(error.to_string()))?;
            }
        } else {
            let members = BTreeMap::from([(id, BasicNode::new(address))]);
            match raft.initialize(members).await {
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(error) => return Err(NodeError::Raft(error.to_string())),
            }
        }
        let (leadership_sender, leadership) = watch::channel(None);
        let (failure_sender, failure) = watch::channel(None);
        let task = tokio::spawn(observe(raft.clone(), id, leadership_sender, failure_sender));
        Ok((Node { id, raft, machine, log, leadership, failure }, task))
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The state as it is here. Hold it briefly, never across an await: nothing is applied meanwhile.
    pub(crate) fn state(&self) -> impl std::ops::Deref<Target = State> {
        self.machine.state()
    }

    /// The state's revision, as it grows.
    pub(crate) fn revision(&self) -> watch::Receiver<u64> {
        self.machine.revision()
    }

    /// Does this node lead?
    pub(crate) fn leadership(&self) -> watch::Receiver<Option<Leadership>> {
        self.leadership.clone()
    }

    /// Why consensus has ended, once it has. It does not come back without a restart.
    pub(crate) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }

    /// Has an entry decided on, and says what came of it.
    pub(crate) async fn propose(&self, entry: v1::KeeperEntry) -> Result<v1::KeeperApplied, Unavailable> {
        match timeout(PROPOSE_TIMEOUT, self.raft.client_write(Entry(entry))).await {
            Ok(Ok(answer)) => Ok(answer.data.0),
            Ok(Err(RaftError::APIError(error))) => Err(not_leader(error)),
            Ok(Err(RaftError::Fatal(error))) => Err(Unavailable::Failed(error.to_string())),
            Err(_) => Err(Unavailable::Timeout),
        }
    }

    /// The same, but only while this leadership lasts.
    pub(crate) async fn propose_as(
        &self,
        leadership: Leadership,
        entry: v1::KeeperEntry,
    ) -> Result<v1::KeeperApplied, Unavailable> {
        let (responder, answer) = ProgressResponder::complete_only();
        let leader =
            openraft::impls::leader_id_adv::LeaderId { term: leadership.term, node_id: leadership.node_id };
        self.raft
            .write(Entry(entry))
            .with_leader(leader)
            .responder(responder)
            .await
            .map_err(|error| Unavailable::Failed(error.to_string()))?;
        match timeout(PROPOSE_TIMEOUT, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer.data.0),
            Ok(Ok(Err(error))) => Err(not_leader(error)),
            Ok(Err(_)) => Err(Unavailable::Failed("it has stopped".to_owned())),
            Err(_) => Err(Unavailable::Timeout),
        }
    }

    /// Resolves when the state here holds all that was decided before the call.
    pub(crate) async fn linearize(&self) -> Result<(), Unavailable> {
        match timeout(PROPOSE_TIMEOUT, self.raft.ensure_linearizable(ReadPolicy::ReadIndex)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                Err(Unavailable::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
            }
            Ok(Err(RaftError::APIError(error))) => Err(Unavailable::Failed(error.to_string())),
            Ok(Err(RaftError::Fatal(error))) => Err(Unavailable::Failed(error.to_string())),
            Err(_) => Err(Unavailable::Timeout),
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        Progress {
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_log: metrics.last_log_index.unwrap_or(0),
            applied: metrics.last_applied.map_or(0, |id| id.index),
            snapshot: metrics.snapshot.map_or(0, |id| id.index),
        }
    }

    /// Size of the log's files.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log.disk_bytes()
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

/// Opens log and snapshot.
async fn open(log: PathBuf, snapshot: PathBuf) -> Result<(LogStore, Machine), NodeError> {
    let path = log.clone();
    let work = move || {
        let log = LogStore::open(&log).map_err(|source| NodeError::Log { path: log, source })?;
        let machine =
            Machine::open(&snapshot).map_err(|source| NodeError::Snapshot { path: snapshot, source })?;
        Ok((log, machine))
    };
    // A log that is damaged in a way that its reader does not expect makes it panic: an error here, not the end.
    match tokio::task::spawn_blocking(work).await {
        Ok(opened) => opened,
        Err(error) => Err(NodeError::Log { path, source: io::Error::other(error.to_string()) }),
    }
}

fn not_leader(error: ClientWriteError<TypeConfig>) -> Unavailable {
    match error {
        ClientWriteError::ForwardToLeader(forward) => {
            Unavailable::NotLeader { leader: forward.leader_node.map(|node| node.addr) }
        }
        error => Unavailable::Failed(error.to_string()),
    }
}

/// Turns openraft's metrics into the two things that the rest of the keeper waits for.
async fn observe(
    raft: Raft<TypeConfig, Machine>,
    id: u64,
    leadership: watch::Sender<Option<Leadership>>,
    failure: watch::Sender<Option<String>>,
) {
    let mut metrics = raft.metrics();
    drop(raft);
    loop {
        let (now, failed) = {
            let metrics = metrics.borrow_watched();
            let leads = metrics.current_leader == Some(id) && metrics.state.is_leader();
            let now = leads.then_some(Leadership { term: metrics.current_term, node_id: id });
            (now, metrics.running_state.as_ref().err().map(ToString::to_string))
        };
        leadership.send_if_modified(|present| std::mem::replace(present, now) != now);
        if let Some(failed) = failed {
            leadership.send_replace(None);
            failure.send_replace(Some(failed));
            return;
        }
        if metrics.changed().await.is_err() {
            leadership.send_replace(None);
            failure.send_if_modified(|present| {
                let first = present.is_none();
                present.get_or_insert_with(|| "it has stopped".to_owned());
                first
            });
            return;
        }
    }
}

#[cfg(test)]
mod tests;
