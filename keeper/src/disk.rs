//! Whether the disk has room. Below the reserve nothing is put any more; what deletes, leases and members still need goes
//! on. A log that cannot be written ends the process: it must not come to that because of what can be refused.
//!
//! The log itself may be what fills the disk. It is cut when it is large, and as far as it can be when the disk is full: a
//! follower that misses what is gone gets the snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::keys;
use carillon_proto::v1;
use parking_lot::Mutex;
use tonic::Status;
use v1::op::Op;

use crate::core::Core;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// Of the most that the log may have, this part stays when it is cut: every cut may take a snapshot.
const KEPT_PART: u64 = 4;
/// Of the reserve, this part stays when a snapshot is made to gain room: one that fails would end the process.
const SPARED_PART: u64 = 4;

pub(crate) struct Disk {
    directory: PathBuf,
    /// What those are told who want to put something.
    full: Mutex<Option<String>>,
}

impl Disk {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Disk { directory, full: Mutex::default() }
    }

    /// How much room there is, if that can be told.
    fn look(&self, reserve: u64) -> Option<u64> {
        let available = match fs4::available_space(&self.directory) {
            Ok(available) => available,
            Err(error) => {
                tracing::warn!(%error, "cannot tell how much room the keeper's disk has");
                return None;
            }
        };
        let mut full = self.full.lock();
        if available >= reserve {
            if full.take().is_some() {
                tracing::info!(available, "the keeper's disk has room again");
            }
            return Some(available);
        }
        if full.is_none() {
            tracing::error!(available, reserve, "the keeper's disk is full: nothing is put any more");
        }
        *full = Some(format!(
            "the keeper's disk is full: {available} bytes are left, {reserve} are kept in reserve"
        ));
        Some(available)
    }

    fn is_full(&self) -> bool {
        self.full.lock().is_some()
    }

    /// May something be put?
    pub(crate) fn check(&self) -> Result<(), Status> {
        match &*self.full.lock() {
            Some(full) => Err(Status::resource_exhausted(full.clone())),
            None => Ok(()),
        }
    }
}

/// Does an entry put keys that are not the keeper's own?
pub(crate) fn puts(entry: &v1::KeeperEntry) -> bool {
    let mut ops = entry.txn.iter().flat_map(|txn| txn.then.iter().chain(&txn.otherwise));
    ops.any(|op| matches!(&op.op, Some(Op::Put(put)) if !put.key.starts_with(keys::OWN)))
}

/// Looks again and again. A snapshot is written beside the one that it replaces, so that there must be room for it.
pub(crate) async fn run(core: Arc<Core>) {
    loop {
        let (snapshot, limits) = (core.node.state().snapshot_bytes() as u64, &core.limits);
        let available = core.disk.look(limits.disk_reserve_bytes + snapshot);
        let keep = match core.disk.is_full() {
            true => Some(0),
            false => (core.node.log_bytes() > limits.log_bytes).then_some(limits.log_bytes / KEPT_PART),
        };
        if let Some(keep) = keep {
            let needed = snapshot + limits.disk_reserve_bytes / SPARED_PART;
            let may_snapshot = available.is_none_or(|available| available > needed);
            // It says itself why it fails.
            let _ = core.node.cut_log(keep, may_snapshot).await;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = core.stop.cancelled() => return,
        }
    }
}
