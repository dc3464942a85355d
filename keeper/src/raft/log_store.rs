//! The log on disk: votes and entries in a write-ahead log, fsynced in groups before anyone is told that they are there.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use raft_log::api::raft_log_writer::RaftLogWriter as _;
use raft_log::{Config, RaftLog, Types as _};
use tokio::sync::oneshot;

use super::codec::{WalLogId, WalPayload, WalTypes, WalVote};
use super::cutting::LogFile;
use super::groups::{Groups, Told};
use super::types::{LogEntry, LogId, TypeConfig, Vote};

/// A chunk file is closed at this size, and deleted when all that it holds is in a snapshot.
const CHUNK_BYTES: usize = 16 * 1024 * 1024;
const CHUNK_RECORDS: usize = 64 * 1024;
/// Entries held in memory as well; older ones are read from disk.
const CACHE_BYTES: usize = 32 * 1024 * 1024;
const CACHE_ENTRIES: usize = 16 * 1024;
/// Entries that are sent to a follower in one message are about this large, one at least.
const BATCH_BYTES: usize = 1024 * 1024;
const READ_BUFFER_BYTES: usize = 1024 * 1024;
const FLUSH_QUEUE_BYTES: usize = 64 * 1024 * 1024;

/// A cheap handle. All writes go through one lock, so their order on disk is the order of the calls.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Log,
    groups: Groups,
}

/// None once closed.
pub(super) type Log = Arc<Mutex<Option<RaftLog<WalTypes>>>>;
pub(super) type Opened<'a> = MappedMutexGuard<'a, RaftLog<WalTypes>>;

impl LogStore {
    /// Opens or creates the log. An incomplete record at its end is what a crash leaves behind, and is cut off; damage
    /// anywhere else is an error.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let Some(path) = directory.to_str() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not valid UTF-8"));
        };
        let mut config = Config::new(path);
        config.wal.chunk_max_size = Some(CHUNK_BYTES);
        config.wal.chunk_max_records = Some(CHUNK_RECORDS);
        config.wal.read_buffer_size = Some(READ_BUFFER_BYTES);
        config.wal.flush_queue_max_bytes = Some(FLUSH_QUEUE_BYTES);
        // It would wait for company, or (at zero) fsync each request by itself: groups are made here.
        config.wal.flush_batch_wait = Some(Duration::ZERO);
        config.log_cache_capacity = Some(CACHE_BYTES);
        config.log_cache_max_items = Some(CACHE_ENTRIES);
        let log = Arc::new(Mutex::new(Some(RaftLog::open(Arc::new(config))?)));
        Ok(LogStore { groups: Groups::new(&log)?, log })
    }

    /// How long groups take to the disk, and how large they are.
    pub(crate) fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Size of the log's files.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.log.lock().as_ref().map_or(0, RaftLog::on_disk_size)
    }

    /// The files that are written no more, the oldest first, and the size of the one that is.
    pub(super) fn files(&self) -> (Vec<LogFile>, u64) {
        let log = self.log.lock();
        let Some(stat) = log.as_ref().map(RaftLog::stat) else { return (Vec::new(), 0) };
        let files = stat.closed_chunks.iter().map(|chunk| LogFile {
            bytes: chunk.size,
            last: chunk.log_state.last().map_or(0, |last| last.0.index),
        });
        (files.collect(), stat.open_chunk.size)
    }

    /// Lets go of the files, whoever still holds a handle.
    pub(crate) fn close(&self) {
        drop(self.log.lock().take());
    }

    /// In a simulation time must stand still until it is on disk: the log's own thread knows nothing of simulated time.
    #[cfg(test)]
    fn flush_at_once(groups: &Groups, log: &mut RaftLog<WalTypes>) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        groups.flush(log, 0, Told::Call(sender))?;
        futures::executor::block_on(receiver).map_err(io::Error::other)?
    }

    fn opened(&self) -> io::Result<Opened<'_>> {
        opened(&self.log)
    }
}

pub(super) fn opened(log: &Log) -> io::Result<Opened<'_>> {
    MutexGuard::try_map(log.lock(), Option::as_mut).map_err(|_| io::Error::other("the log is closed"))
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<LogEntry>, io::Error> {
        let from = match range.start_bound() {
            Bound::Included(&from) => from,
            Bound::Excluded(&from) => from + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(&to) => to + 1,
            Bound::Excluded(&to) => to,
            Bound::Unbounded => u64::MAX,
        };
        if from >= to {
            return Ok(Vec::new());
        }
        let log = self.opened()?;
        log.read(from, to)
            .map(|entry| entry.map(|(log_id, payload)| LogEntry { log_id: log_id.0, payload: payload.0 }))
            .collect()
    }

    /// What fits into a message: entries may be large, and a follower that lags takes many at once.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<LogEntry>, io::Error> {
        let log = self.opened()?;
        let mut entries = Vec::new();
        let mut bytes = 0;
        for entry in log.read(start, end) {
            let (log_id, payload) = entry?;
            bytes += WalTypes::payload_size(&payload) as usize;
            if bytes > BATCH_BYTES && !entries.is_empty() {
                break;
            }
            entries.push(LogEntry { log_id: log_id.0, payload: payload.0 });
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.opened()?.log_state().vote().map(|vote| vote.0))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let log = self.opened()?;
        let state = log.log_state();
        let last_purged_log_id = state.purged().map(|log_id| log_id.0);
        let last_log_id = state.last().map(|log_id| log_id.0).max(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut log = self.opened()?;
            log.save_vote(WalVote(*vote))?;
            #[cfg(test)]
            if turmoil::in_simulation() {
                return LogStore::flush_at_once(&self.groups, &mut log);
            }
            self.groups.flush(&mut log, 0, Told::Call(sender))?;
        }
        receiver.await.map_err(|_| io::Error::other("the log's writer has ended"))?
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let Some(committed) = committed else { return Ok(()) };
        let mut log = self.opened()?;
        // It only saves time at the next start; it reaches the disk with the next entries.
        log.commit(WalLogId(committed)).map(drop)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.opened()?.log_state().committed().map(|log_id| log_id.0))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut log = self.opened()?;
        let mut count = 0;
        log.append(entries.into_iter().map(|entry| {
            count += 1;
            (WalLogId(entry.log_id), WalPayload(entry.payload))
        }))?;
        #[cfg(test)]
        if turmoil::in_simulation() {
            callback.io_completed(LogStore::flush_at_once(&self.groups, &mut log));
            return Ok(());
        }
        self.groups.flush(&mut log, count, Told::Raft(callback))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let mut log = self.opened()?;
        let state = log.log_state();
        let next = |log_id: Option<&WalLogId>| log_id.map_or(0, |log_id| log_id.0.index + 1);
        let (first, end) = (next(state.purged()), next(state.last()));
        let from = last_log_id.map_or(0, |log_id| log_id.index + 1).max(first);
        if from >= end {
            return Ok(());
        }
        log.truncate(from)?;
        log.flush(true, None)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let mut log = self.opened()?;
        log.purge(WalLogId(log_id))?;
        log.flush(true, None)
    }
}
