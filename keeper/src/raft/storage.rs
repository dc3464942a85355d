//! What a node has on disk, opened: its log and its state.

use std::io;
use std::path::{Path, PathBuf};

use openraft::StorageHelper;
use openraft::storage::RaftLogStorage as _;

use super::log_store::LogStore;
use super::machine::{Machine, SnapshotFile};

/// Why log or snapshot cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("the log in {} cannot be opened: {source}", path.display())]
    Log { path: PathBuf, source: io::Error },
    #[error("the snapshot in {} cannot be opened: {source}", path.display())]
    Snapshot { path: PathBuf, source: io::Error },
    #[error("what is on disk cannot be read: {0}")]
    Unreadable(String),
}

impl StorageError {
    /// Is what lies there not what was written? Then it stays so, whereas a disk may be full or away for a while.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            StorageError::Log { source, .. } | StorageError::Snapshot { source, .. } => {
                matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
            }
            StorageError::Unreadable(_) => true,
        }
    }
}

/// Log and state.
pub(crate) struct Storage {
    pub(super) log: LogStore,
    pub(super) machine: Machine,
}

/// What is there, before it is used.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Term and index of the last entry; None: nothing was ever written.
    pub last_log: Option<(u64, u64)>,
    /// Id and address of each member, as far as the node knew.
    pub members: Vec<(u64, String)>,
}

impl Storage {
    pub(crate) async fn open(directory: &Path) -> Result<Storage, StorageError> {
        let (log, snapshot) = (directory.join("log"), directory.join("snapshot"));
        let path = log.clone();
        let work = move || {
            let log = LogStore::open(&log).map_err(|source| StorageError::Log { path: log, source })?;
            let machine = Machine::open(&snapshot)
                .map_err(|source| StorageError::Snapshot { path: snapshot, source })?;
            Ok(Storage { log, machine })
        };
        // A log that is damaged in a way that its reader does not expect makes it panic: an error here, not the end.
        match crate::blocking::run(work).await {
            Ok(opened) => opened,
            Err(error) => {
                let source = io::Error::new(io::ErrorKind::InvalidData, error.to_string());
                Err(StorageError::Log { path, source })
            }
        }
    }

    /// What a node has that begins with a snapshot, alone.
    pub(crate) async fn restore(
        directory: &Path,
        file: SnapshotFile,
        node: u64,
        address: &str,
    ) -> io::Result<()> {
        let vote = file.write_alone(&directory.join("snapshot"), node, address)?;
        let mut log = LogStore::open(&directory.join("log"))?;
        // It has seen the term of what it holds.
        log.save_vote(&vote).await?;
        log.close();
        Ok(())
    }

    pub(crate) async fn look(&mut self) -> Result<Found, StorageError> {
        let unreadable = |error: &dyn std::fmt::Display| StorageError::Unreadable(error.to_string());
        let state = self.log.get_log_state().await.map_err(|error| unreadable(&error))?;
        let applied = self.machine.applied_id();
        let last_log = state.last_log_id.max(applied).map(|id| (id.leader_id.term, id.index));
        let membership = StorageHelper::new(&mut self.log, &mut self.machine).get_membership().await;
        let membership = membership.map_err(|error| unreadable(&error))?;
        let nodes = membership.effective().membership().nodes();
        let members = nodes.map(|(&id, node)| (id, node.addr.clone())).collect();
        Ok(Found { last_log, members })
    }

    /// Lets go of the files.
    pub(crate) fn close(self) {
        self.log.close();
    }
}
