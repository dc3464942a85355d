//! What the next commit will write, and the planner that every operation runs through.
//!
//! An operation changes the index and notes in [`Pending`] what has to follow on disk; values are encoded from the index
//! once, at the commit, however many operations touched them. Nobody is answered before the commit, and after a commit
//! that failed nothing is planned any more: the index then is ahead of the disk, and only reopening sets it right.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use fjall::{OwnedWriteBatch, PersistMode};
use prost::Message as _;

use super::disk::{self, Disk, DiskError};
use super::index::{Index, SessionId, TopicId};
use crate::saver::metrics::Metrics;
use crate::saver::store::StoreError;

/// Messages that one operation or commit deletes at most; the rest follows with later ones.
pub const DELETE_MESSAGES: usize = 10_000;

#[derive(Default)]
pub struct Pending {
    /// New records of logs: position and value.
    pub log: BTreeMap<(TopicId, u64), (u64, Vec<u8>)>,
    pub log_deleted: Vec<(TopicId, u64)>,
    pub topics: HashSet<TopicId>,
    /// Sessions that changed, or are gone when the index has them no more. So with cursors.
    pub sessions: HashSet<SessionId>,
    pub cursors: HashSet<(SessionId, TopicId)>,
    /// `None`: cleared.
    pub retained: HashMap<Arc<str>, Option<(u64, Vec<u8>)>>,
    pub ids: HashMap<(TopicId, String), IdEntry>,
    /// Keys to remove from `ids`.
    pub ids_deleted: Vec<Vec<u8>>,
    pub epochs: BTreeSet<u32>,
    pub records: HashMap<Vec<u8>, Option<Vec<u8>>>,
    pub attachment: bool,
    /// Appends among it, for the metrics.
    pub appends: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdEntry {
    pub epoch: u64,
    pub seq: u64,
    pub at_ms: u64,
}

impl Pending {
    pub fn is_empty(&self) -> bool {
        self.log.is_empty()
            && self.log_deleted.is_empty()
            && self.topics.is_empty()
            && self.sessions.is_empty()
            && self.cursors.is_empty()
            && self.retained.is_empty()
            && self.ids.is_empty()
            && self.ids_deleted.is_empty()
            && self.epochs.is_empty()
            && self.records.is_empty()
            && !self.attachment
    }

    /// Roughly how many keys it will write.
    pub fn len(&self) -> usize {
        self.log.len() + self.log_deleted.len() + self.topics.len() + self.sessions.len() + self.cursors.len()
    }

    /// Writes everything in one atomic batch; with `durable`, it is on the disk when this returns.
    pub fn commit(self, index: &Index, disk: &Disk, durable: bool) -> Result<Vec<TopicId>, DiskError> {
        let mode = if durable { PersistMode::SyncAll } else { PersistMode::Buffer };
        let capacity = self.len() + 2 * (self.retained.len() + self.ids.len()) + self.ids_deleted.len() + 8;
        let mut batch =
            OwnedWriteBatch::with_capacity(disk.database.clone(), capacity).durability(Some(mode));
        for ((topic, seq), (_, value)) in self.log {
            batch.insert(&disk.log, disk::log_key(topic, seq), value);
        }
        for (topic, seq) in self.log_deleted {
            batch.remove(&disk.log, disk::log_key(topic, seq));
        }
        for (name, retained) in self.retained {
            let (entry, message) = (disk::retained_key(b'k', &name), disk::retained_key(b'm', &name));
            match retained {
                Some((expires_ms, value)) => {
                    batch.insert(&disk.retained, entry, disk::numbers([expires_ms]));
                    batch.insert(&disk.retained, message, value);
                }
                None => {
                    batch.remove(&disk.retained, entry);
                    batch.remove(&disk.retained, message);
                }
            }
        }
        for ((topic, id), entry) in self.ids {
            batch.insert(&disk.ids, disk::id_age_key(entry.at_ms, topic, &id), []);
            let value = disk::numbers([entry.epoch, entry.seq, entry.at_ms]);
            batch.insert(&disk.ids, disk::id_key(topic, &id), value);
        }
        for key in self.ids_deleted {
            batch.remove(&disk.ids, key);
        }
        for &topic in &self.topics {
            let record = disk::topic_record(index.at(topic));
            batch.insert(&disk.meta, disk::topic_key(topic), record.encode_to_vec());
        }
        for &id in &self.sessions {
            match index.sessions.get(&id) {
                Some(session) => {
                    let record = disk::session_record(session);
                    batch.insert(&disk.meta, disk::session_key(id), record.encode_to_vec());
                }
                None => batch.remove(&disk.meta, disk::session_key(id)),
            }
        }
        for &(id, topic) in &self.cursors {
            let key = disk::cursor_key(id, topic);
            match index.sessions.get(&id).and_then(|session| session.cursor(topic)) {
                Some(cursor) => batch.insert(&disk.meta, key, disk::numbers([cursor.acked, cursor.sent])),
                None => batch.remove(&disk.meta, key),
            }
        }
        for &slot in &self.epochs {
            batch.insert(&disk.meta, disk::epoch_key(slot), disk::numbers([index.epochs[slot as usize]]));
        }
        if self.attachment {
            batch.insert(&disk.meta, disk::ATTACHMENT_KEY, disk::numbers([index.last_attachment]));
        }
        for (key, value) in self.records {
            match value {
                Some(value) => batch.insert(&disk.meta, key, value),
                None => batch.remove(&disk.meta, key),
            }
        }
        batch.commit()?;
        Ok(self.topics.into_iter().collect())
    }
}

/// Carries one operation out on the index, with what it must read from the disk.
pub struct Planner<'a> {
    pub index: &'a mut Index,
    pub pending: &'a mut Pending,
    pub disk: &'a Disk,
    pub metrics: &'a Metrics,
    pub now_ms: u64,
    /// How long message ids are remembered.
    pub id_window_ms: u64,
}

impl From<DiskError> for StoreError {
    fn from(error: DiskError) -> Self {
        StoreError::Unavailable(format!("the store cannot be read: {error}"))
    }
}
