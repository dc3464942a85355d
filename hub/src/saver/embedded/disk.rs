//! How the embedded store lies on disk: keyspaces, keys and values, and the reading of them.
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | `log` | topic id (4), seq (8) | position (8), appended at ms (8), `Message` without its topic |
//! | `retained` | `m`, topic name | `Message` |
//! | `retained` | `k`, topic name | expires at ms (8) |
//! | `ids` | `i`, topic id (4), message id | epoch (8), seq (8), ms (8) |
//! | `ids` | `t`, ms (8), topic id (4), message id | |
//! | `meta` | `t`, topic id (4) | [`TopicRecord`] |
//! | `meta` | `s`, session id (8) | [`SessionRecord`] |
//! | `meta` | `c`, session id (8), topic id (4) | acked (8), sent (8) |
//! | `meta` | `e`, slot (4) | epoch (8) |
//! | `meta` | `a` | last attachment (8) |
//! | `meta` | `r`, kind, NUL, key | expires at ms (8), value |
//!
//! Numbers are big-endian, so that keys are in their order.

use std::path::Path;

use carillon_proto::v1;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, UserValue};
use prost::Message as _;

use super::index::{Index, Session, SessionId, Subscribed, Topic, TopicId};

/// Bytes before the message in a log's value.
pub const LOG_HEADER_BYTES: usize = 16;

/// An error of the database, or data that cannot be what was written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("the database: {0}")]
    Database(#[from] fjall::Error),
    #[error("{0} cannot be decoded")]
    Damaged(String),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TopicRecord {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    #[prost(uint64, tag = "3")]
    pub seq: u64,
    #[prost(uint64, tag = "4")]
    pub trimmed: u64,
    #[prost(uint64, tag = "5")]
    pub deleted: u64,
    #[prost(uint64, tag = "6")]
    pub count: u64,
    #[prost(uint64, tag = "7")]
    pub bytes: u64,
    #[prost(uint64, tag = "8")]
    pub first_position: u64,
    #[prost(uint64, tag = "9")]
    pub last_position: u64,
    #[prost(uint64, tag = "10")]
    pub oldest_ms: u64,
    #[prost(message, optional, tag = "11")]
    pub retention: Option<v1::Retention>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SessionRecord {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub attachment: u64,
    #[prost(string, tag = "3")]
    pub gateway: String,
    #[prost(uint64, tag = "4")]
    pub incarnation: u64,
    #[prost(bool, tag = "5")]
    pub open: bool,
    #[prost(uint64, tag = "6")]
    pub closed_ms: u64,
    #[prost(uint32, tag = "7")]
    pub expiry_seconds: u32,
    #[prost(message, repeated, tag = "8")]
    pub subscriptions: Vec<v1::Subscription>,
    /// Baselines of the subscriptions, in their order.
    #[prost(uint64, repeated, tag = "9")]
    pub baselines: Vec<u64>,
    #[prost(bool, tag = "10")]
    pub presumed_closed: bool,
    #[prost(message, optional, tag = "11")]
    pub delivery: Option<v1::DeliveryState>,
    #[prost(uint64, tag = "12")]
    pub connected_ms: u64,
}

pub fn log_key(topic: TopicId, seq: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&topic.to_be_bytes());
    key[4..].copy_from_slice(&seq.to_be_bytes());
    key
}

pub fn topic_key(topic: TopicId) -> [u8; 5] {
    let mut key = [b't'; 5];
    key[1..].copy_from_slice(&topic.to_be_bytes());
    key
}

pub fn session_key(session: SessionId) -> [u8; 9] {
    let mut key = [b's'; 9];
    key[1..].copy_from_slice(&session.to_be_bytes());
    key
}

pub fn cursor_key(session: SessionId, topic: TopicId) -> [u8; 13] {
    let mut key = [b'c'; 13];
    key[1..9].copy_from_slice(&session.to_be_bytes());
    key[9..].copy_from_slice(&topic.to_be_bytes());
    key
}

pub fn epoch_key(slot: u32) -> [u8; 5] {
    let mut key = [b'e'; 5];
    key[1..].copy_from_slice(&slot.to_be_bytes());
    key
}

pub const ATTACHMENT_KEY: [u8; 1] = [b'a'];

pub fn record_key(kind: &str, key: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(kind.len() + key.len() + 2);
    bytes.push(b'r');
    bytes.extend_from_slice(kind.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(key.as_bytes());
    bytes
}

pub fn retained_key(tag: u8, topic: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(topic.len() + 1);
    bytes.push(tag);
    bytes.extend_from_slice(topic.as_bytes());
    bytes
}

pub fn id_key(topic: TopicId, id: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(id.len() + 5);
    bytes.push(b'i');
    bytes.extend_from_slice(&topic.to_be_bytes());
    bytes.extend_from_slice(id.as_bytes());
    bytes
}

pub fn id_age_key(at_ms: u64, topic: TopicId, id: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(id.len() + 13);
    bytes.push(b't');
    bytes.extend_from_slice(&at_ms.to_be_bytes());
    bytes.extend_from_slice(&topic.to_be_bytes());
    bytes.extend_from_slice(id.as_bytes());
    bytes
}

pub fn numbers<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_be_bytes()).collect()
}

/// The number at `at`, if it is there.
pub fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A log's value.
pub fn encode_log(position: u64, appended_ms: u64, message: &v1::Message) -> Vec<u8> {
    let mut value = Vec::with_capacity(LOG_HEADER_BYTES + message.encoded_len());
    value.extend_from_slice(&position.to_be_bytes());
    value.extend_from_slice(&appended_ms.to_be_bytes());
    message.encode(&mut value).expect("a Vec grows");
    value
}

/// The message in a log's value, its topic put back.
pub fn decode_log(value: UserValue, topic: &str) -> Result<v1::Message, DiskError> {
    let damaged = || DiskError::Damaged(format!("a message of {topic:?}"));
    let bytes = value.get(LOG_HEADER_BYTES..).ok_or_else(damaged)?;
    // One copy of the message; payload and id are slices of it.
    let mut message = v1::Message::decode(bytes::Bytes::copy_from_slice(bytes)).map_err(|_| damaged())?;
    message.topic = topic.to_owned();
    Ok(message)
}

/// One record of a log, its message not decoded.
pub struct LogRecord {
    pub seq: u64,
    pub position: u64,
    pub appended_ms: u64,
    pub value: UserValue,
}

/// The open database. Clones share it.
#[derive(Clone)]
pub struct Disk {
    pub database: Database,
    pub log: Keyspace,
    pub retained: Keyspace,
    pub ids: Keyspace,
    pub meta: Keyspace,
}

impl Disk {
    /// Opens or creates the database in `path`.
    pub fn open(path: &Path, cache_bytes: u64) -> Result<Self, DiskError> {
        // Journals are replayed when the store is opened: keep them short.
        let database = Database::builder(path)
            .cache_size(cache_bytes)
            .max_journaling_size(192 * 1024 * 1024)
            .worker_threads(2)
            .open()?;
        let keyspace = |name: &str, memtable_bytes: u64| {
            database.keyspace(name, || KeyspaceCreateOptions::default().max_memtable_size(memtable_bytes))
        };
        Ok(Disk {
            log: keyspace("log", 32 << 20)?,
            retained: keyspace("retained", 8 << 20)?,
            ids: keyspace("ids", 16 << 20)?,
            meta: keyspace("meta", 16 << 20)?,
            database,
        })
    }

    /// The records of a topic's log with `after < seq <= until`, in order.
    pub fn records(
        &self,
        topic: TopicId,
        after: u64,
        until: u64,
    ) -> impl Iterator<Item = Result<LogRecord, DiskError>> + use<> {
        let range = (after < until).then(|| log_key(topic, after + 1)..=log_key(topic, until));
        let iterator = range.map(|range| self.log.range(range));
        iterator.into_iter().flatten().map(move |guard| {
            let (key, value) = guard.into_inner()?;
            let decoded = (|| {
                Some(LogRecord {
                    seq: number(&key, 4)?,
                    position: number(&value, 0)?,
                    appended_ms: number(&value, 8)?,
                    value,
                })
            })();
            decoded.ok_or_else(|| DiskError::Damaged(format!("a record of topic {topic}")))
        })
    }

    /// Reads everything but messages.
    pub fn load(&self) -> Result<Index, DiskError> {
        let mut index = Index::new();
        let mut cursors = Vec::new();
        let mut sessions: Vec<(SessionId, SessionRecord)> = Vec::new();
        for guard in self.meta.iter() {
            let (key, value) = guard.into_inner()?;
            // Broadcast jobs and the like stay on disk.
            if key.first() == Some(&b'r') {
                continue;
            }
            let loaded = match key.first() {
                Some(b't') => load_topic(&mut index, &key, &value),
                Some(b's') => (|| {
                    sessions.push((number(&key, 1)?, SessionRecord::decode(&value[..]).ok()?));
                    Some(())
                })(),
                Some(b'c') => (|| {
                    let cursor =
                        (number(&key, 1)?, number32(&key, 9)?, number(&value, 0)?, number(&value, 8)?);
                    cursors.push(cursor);
                    Some(())
                })(),
                Some(b'e') => (|| {
                    *index.epochs.get_mut(number32(&key, 1)? as usize)? = number(&value, 0)?;
                    Some(())
                })(),
                Some(b'a') => number(&value, 0).map(|last| index.last_attachment = last),
                _ => None,
            };
            loaded.ok_or_else(|| DiskError::Damaged(format!("the entry {:?} of meta", &key[..])))?;
        }
        for (id, record) in sessions {
            index.last_attachment = index.last_attachment.max(id).max(record.attachment);
            index.add_session(id, session_of(record));
        }
        // Keys are in order: so are each session's cursors.
        for (session, topic, acked, sent) in cursors {
            let known = index.topics.len() > topic as usize;
            match index.sessions.get_mut(&session) {
                Some(session) if known => {
                    let cursor = session.cursor_entry(topic, acked);
                    cursor.sent = sent;
                }
                _ => return Err(DiskError::Damaged(format!("a cursor of session {session}"))),
            }
        }
        for guard in self.retained.prefix(b"k") {
            let (key, value) = guard.into_inner()?;
            let damaged = || DiskError::Damaged("the entry of a retained message".to_owned());
            let name = std::str::from_utf8(&key[1..]).map_err(|_| damaged())?;
            index.retained.insert(name.into(), number(&value, 0).ok_or_else(damaged)?);
        }
        Ok(index)
    }
}

fn load_topic(index: &mut Index, key: &[u8], value: &[u8]) -> Option<()> {
    let id = number32(key, 1)?;
    let record = TopicRecord::decode(value).ok()?;
    // Numbers are dense and keys in order.
    if id as usize != index.topics.len() || index.intern(&record.name) != id {
        return None;
    }
    index.position = index.position.max(record.last_position);
    index.messages += record.count;
    index.bytes += record.bytes;
    if record.deleted < record.trimmed {
        index.undeleted.insert(id);
    }
    let topic = index.at_mut(id);
    *topic = Topic {
        name: topic.name.clone(),
        epoch: record.epoch,
        seq: record.seq,
        committed: (record.epoch, record.seq),
        trimmed: record.trimmed,
        deleted: record.deleted,
        count: record.count,
        bytes: record.bytes,
        first_position: record.first_position,
        last_position: record.last_position,
        oldest_ms: record.oldest_ms,
        retention: record.retention.unwrap_or_default(),
        age_due_ms: 0,
    };
    index.schedule_age(id);
    Some(())
}

fn session_of(record: SessionRecord) -> Session {
    let baselines = record.baselines.into_iter().chain(std::iter::repeat(0));
    Session {
        name: record.name.into(),
        attachment: record.attachment,
        gateway: record.gateway,
        incarnation: record.incarnation,
        open: record.open,
        presumed_closed: record.presumed_closed,
        closed_ms: record.closed_ms,
        expiry_seconds: record.expiry_seconds,
        subscriptions: record
            .subscriptions
            .into_iter()
            .zip(baselines)
            .map(|(subscription, baseline)| Subscribed { subscription, baseline })
            .collect(),
        cursors: Vec::new(),
        delivery: record.delivery.map(Box::new),
        connected_ms: record.connected_ms,
    }
}

pub fn topic_record(topic: &Topic) -> TopicRecord {
    TopicRecord {
        name: topic.name.to_string(),
        epoch: topic.epoch,
        seq: topic.seq,
        trimmed: topic.trimmed,
        deleted: topic.deleted,
        count: topic.count,
        bytes: topic.bytes,
        first_position: topic.first_position,
        last_position: topic.last_position,
        oldest_ms: topic.oldest_ms,
        retention: Some(topic.retention),
    }
}

pub fn session_record(session: &Session) -> SessionRecord {
    SessionRecord {
        name: session.name.to_string(),
        attachment: session.attachment,
        gateway: session.gateway.clone(),
        incarnation: session.incarnation,
        open: session.open,
        closed_ms: session.closed_ms,
        expiry_seconds: session.expiry_seconds,
        subscriptions: session.subscriptions.iter().map(|held| held.subscription.clone()).collect(),
        baselines: session.subscriptions.iter().map(|held| held.baseline).collect(),
        presumed_closed: session.presumed_closed,
        delivery: session.delivery.as_deref().cloned(),
        connected_ms: session.connected_ms,
    }
}
