//! The log as its benchmark (`benches/log.rs`) sees it. Nothing else is to use this.

use std::io;
use std::path::Path;

use bytes::Bytes;
use carillon_proto::v1;
use openraft::storage::{IOFlushed, RaftLogStorage as _};
use openraft::type_config::TypeConfigExt as _;

use crate::raft::LogStore;
use crate::raft::types::{Entry, LogEntry, LogId, Payload, TypeConfig, leader_id};

/// A log that is alone on its disk.
pub struct Log {
    store: LogStore,
    next: u64,
}

fn log_id(index: u64) -> LogId {
    LogId { leader_id: leader_id(1, 1), index }
}

impl Log {
    /// In a runtime: it is there that the end of an fsync is told.
    pub fn open(directory: &Path) -> io::Result<Log> {
        Ok(Log { store: LogStore::open(directory)?, next: 0 })
    }

    /// Appends a transaction that puts this value. Resolves at once; what it gives resolves when it is on the disk.
    pub async fn append(
        &mut self,
        value: Bytes,
    ) -> io::Result<impl Future<Output = io::Result<()>> + Send + use<>> {
        let put = v1::op::Put { key: format!("bench/{}", self.next % 1000), value, lease: 0 };
        let then = vec![v1::Op { op: Some(v1::op::Op::Put(put)) }];
        let content = v1::KeeperEntry { txn: Some(v1::TxnRequest { then, ..Default::default() }) };
        let entry = LogEntry { log_id: log_id(self.next), payload: Payload::Normal(Entry(content)) };
        self.next += 1;
        let (sender, told) = TypeConfig::oneshot();
        self.store.append([entry], IOFlushed::signal(sender)).await?;
        Ok(async move { told.await.map_err(io::Error::other)? })
    }

    /// Gives up all but the last so many entries.
    pub async fn keep(&mut self, entries: u64) -> io::Result<()> {
        match self.next.checked_sub(entries + 1) {
            Some(upto) => self.store.purge(log_id(upto)).await,
            None => Ok(()),
        }
    }
}
