//! What all parts of the keeper share, and how they write.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use carillon_agent::document::DocumentKind;
use carillon_proto::v1;
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::access::Protection;
use crate::budget::Budget;
use crate::disk::Disk;
use crate::leases::Leases;
use crate::metrics::Metrics;
use crate::raft::{Node, Unavailable};

/// Bounds. The defaults are meant for thousands of instances.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most that all keys and values may take, bytes. Beyond it nothing is put any more, while deleting goes on, so
    /// that it clears itself. Registrations, slots and commands' answers are let through: they are bounded otherwise.
    pub quota_bytes: usize,
    /// Largest transaction or document, bytes.
    pub request_bytes: usize,
    /// Most operations, and most compares, in a transaction.
    pub transaction_ops: usize,
    /// Most watches at a time.
    pub watches: usize,
    /// … of them of one caller: a certificate's name, or an address.
    pub watches_per_caller: usize,
    /// Most commands to an instance that are neither answered nor past their deadline.
    pub open_commands: usize,
    /// How long an instance stays without a keep-alive, if it does not say.
    pub instance_ttl: Duration,
    /// What every lease gets on top when another node has become the leader, or this one has been started.
    pub lease_grace: Duration,
    /// An owner that is told to give slots up has so long for it; then they are taken from it.
    pub slot_hand_over: Duration,
    /// A quiet watch is told this often how far it has come.
    pub progress_interval: Duration,
    /// Below this much room on the disk, and the size of the store on top, nothing is put any more, until there is room
    /// again. Bytes.
    pub disk_reserve_bytes: u64,
    /// A snapshot is made after this many entries; so many are applied again at most at a start. As many stay in the log
    /// after a snapshot, for followers that are behind.
    pub snapshot_every: u64,
    /// The log is cut to a quarter of this when it is larger, however few entries that are; to the file that is being
    /// written (16 MiB) when the disk is full. Bytes.
    pub log_bytes: u64,
    /// Most that may wait to be decided: of what a node is asked, beyond which it refuses, and once more of what other nodes
    /// hand on to it while it leads. Bytes.
    pub proposal_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            quota_bytes: 256 * 1024 * 1024,
            request_bytes: 1024 * 1024,
            transaction_ops: 128,
            watches: 20_000,
            watches_per_caller: 2000,
            open_commands: 64,
            instance_ttl: Duration::from_secs(10),
            lease_grace: Duration::from_secs(3),
            slot_hand_over: Duration::from_secs(5),
            progress_interval: Duration::from_secs(5),
            disk_reserve_bytes: 64 * 1024 * 1024,
            snapshot_every: 20_000,
            log_bytes: 256 * 1024 * 1024,
            proposal_bytes: 64 * 1024 * 1024,
        }
    }
}

/// Shared by the calls and the leader's tasks.
pub(crate) struct Core {
    pub node: Node,
    pub kinds: Vec<DocumentKind>,
    /// Those that are open.
    pub watches: Budget,
    pub limits: Limits,
    pub leases: Leases,
    pub disk: Disk,
    pub metrics: Metrics,
    pub protection: Protection,
    /// Publishing is one at a time here; across nodes the compares see to it.
    pub publishing: tokio::sync::Mutex<()>,
    /// Snapshots that are being saved.
    pub saving: Arc<tokio::sync::Semaphore>,
    pub stop: CancellationToken,
}

impl From<Unavailable> for Status {
    fn from(error: Unavailable) -> Self {
        match error {
            Unavailable::Failed(_) | Unavailable::NotLeader { .. } | Unavailable::Busy { .. } => {
                Status::unavailable(error.to_string())
            }
            // It may still be decided.
            Unavailable::Timeout => Status::deadline_exceeded(error.to_string()),
            Unavailable::Unknown(_) => Status::unknown(error.to_string()),
            Unavailable::Full(text) => Status::resource_exhausted(text),
        }
    }
}

impl Core {
    /// Calls and watches end.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
        self.node.wake_watches();
    }

    /// Empty until this node belongs to one.
    pub(crate) fn cluster_id(&self) -> String {
        self.node.identity().cluster().map(|cluster| cluster.to_string()).unwrap_or_default()
    }

    /// Writes, whatever the quota. `Some(revision)` when the compares held.
    pub(crate) async fn write(&self, txn: v1::TxnRequest) -> Result<Option<u64>, Status> {
        let applied = self.node.propose(v1::KeeperEntry { txn: Some(txn) }).await?;
        if applied.missing_lease != 0 {
            return Err(lease_gone(applied.missing_lease));
        }
        let answer = applied.txn.unwrap_or_default();
        Ok(answer.succeeded.then_some(answer.revision))
    }

    /// Is there room for this much more, in the store and on the disk?
    pub(crate) fn check_quota(&self, more: usize) -> Result<(), Status> {
        self.disk.check()?;
        let (used, quota) = (self.node.state().bytes(), self.limits.quota_bytes);
        if used + more > quota {
            let text =
                format!("the keeper's store is full ({used} of {quota} bytes): delete something first");
            return Err(Status::resource_exhausted(text));
        }
        Ok(())
    }

    /// Reads a record of the keeper's own.
    pub(crate) fn read<T: Message + Default>(&self, key: &str) -> Result<Option<(u64, T)>, Status> {
        let found = self.node.state().get(key).map(|item| (item.mod_revision, item.value.clone()));
        match found {
            Some((mod_revision, value)) => Ok(Some((mod_revision, decode(key, value)?))),
            None => Ok(None),
        }
    }
}

/// Decodes a record of the keeper's own.
pub(crate) fn decode<T: Message + Default>(key: &str, value: Bytes) -> Result<T, Status> {
    T::decode(value).map_err(|error| Status::data_loss(format!("record {key} cannot be read: {error}")))
}

pub(crate) fn lease_gone(lease: u64) -> Status {
    Status::not_found(format!("lease {lease:016x} is not alive"))
}

/// `key` must have been written last at this revision; 0 = not exist.
pub(crate) fn compare_mod_revision(key: &str, revision: u64) -> v1::Compare {
    v1::Compare { key: key.to_owned(), target: Some(v1::compare::Target::ModRevision(revision)) }
}

pub(crate) fn put(key: &str, record: &impl Message, lease: u64) -> v1::Op {
    let put = v1::op::Put { key: key.to_owned(), value: record.encode_to_vec().into(), lease };
    v1::Op { op: Some(v1::op::Op::Put(put)) }
}

pub(crate) fn delete(key: &str) -> v1::Op {
    v1::Op { op: Some(v1::op::Op::Delete(key.to_owned())) }
}

/// A handle's worth of everything.
pub(crate) type Shared = Arc<Core>;
