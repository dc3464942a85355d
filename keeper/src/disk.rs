//! Whether the disk has room. Below the reserve nothing is put any more; what deletes, leases and members still need goes
//! on. A log that cannot be written ends the process: it must not come to that because of what can be refused.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::keys;
use carillon_proto::v1;
use parking_lot::Mutex;
use tonic::Status;
use v1::op::Op;

use crate::core::Core;
use crate::raft::KEPT_ENTRIES;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// A log that is larger than this makes a snapshot due.
const LOG_BYTES: u64 = 256 * 1024 * 1024;

pub(crate) struct Disk {
    directory: PathBuf,
    /// What those are told who want to put something.
    full: Mutex<Option<String>>,
}

impl Disk {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Disk { directory, full: Mutex::default() }
    }

    fn look(&self, reserve: u64) {
        let available = match fs4::available_space(&self.directory) {
            Ok(available) => available,
            Err(error) => {
                tracing::warn!(%error, "cannot tell how much room the keeper's disk has");
                return;
            }
        };
        let mut full = self.full.lock();
        if available >= reserve {
            if full.take().is_some() {
                tracing::info!(available, "the keeper's disk has room again");
            }
            return;
        }
        if full.is_none() {
            tracing::error!(available, reserve, "the keeper's disk is full: nothing is put any more");
        }
        *full = Some(format!(
            "the keeper's disk is full: {available} bytes are left, {reserve} are kept in reserve"
        ));
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
        let state = core.node.state().bytes() as u64;
        core.disk.look(core.limits.disk_reserve_bytes + state);
        let progress = core.node.progress();
        // Entries may be large: the log is cut before there are many, when that gives room.
        if core.node.log_bytes() > LOG_BYTES && progress.applied > progress.snapshot + KEPT_ENTRIES {
            // It says itself why it fails.
            let _ = core.node.snapshot().await;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = core.stop.cancelled() => return,
        }
    }
}
