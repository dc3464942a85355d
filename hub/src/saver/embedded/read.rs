//! Reading the disk, beside the writer.

use std::sync::Arc;

use carillon_proto::{now_ms, v1};
use prost::Message as _;

use super::disk::{self, Disk, DiskError};
use super::index::TopicId;
use crate::saver::store::MAX_RETAINED_BYTES;

/// Records that one `Read` looks at, given or not.
const READ_RECORDS: usize = 10_000;

/// Reads on from `after`, at most to the head as it was committed.
pub fn log(
    disk: &Disk,
    id: TopicId,
    topic: &str,
    after: u64,
    head: v1::Head,
    limit: usize,
    max_bytes: usize,
) -> Result<v1::ReadReply, DiskError> {
    let now_ms = now_ms();
    let mut messages: Vec<v1::Message> = Vec::new();
    let (mut next, mut bytes, mut looked_at) = (after, 0, 0);
    // Messages chain in the answer whatever was trimmed or left out between them.
    let mut last = after;
    for record in disk.records(id, after.max(head.trimmed), head.seq) {
        if messages.len() >= limit || bytes >= max_bytes || looked_at >= READ_RECORDS {
            return Ok(v1::ReadReply { messages, head: Some(head), next });
        }
        let record = record?;
        looked_at += 1;
        let mut message = disk::decode_log(record.value, topic)?;
        if message.expires_ms == 0 || message.expires_ms > now_ms {
            if !messages.is_empty() && bytes + message.payload.len() > max_bytes {
                return Ok(v1::ReadReply { messages, head: Some(head), next });
            }
            bytes += message.payload.len();
            message.prev = message.prev.min(last);
            last = message.seq;
            messages.push(message);
        }
        next = record.seq;
    }
    Ok(v1::ReadReply { messages, head: Some(head), next: next.max(head.seq) })
}

/// The retained messages of these topics, until they are more than one answer holds.
pub fn retained(disk: &Disk, filter: &str, names: Vec<Arc<str>>) -> Result<Vec<v1::Message>, DiskError> {
    let mut messages = Vec::with_capacity(names.len());
    let mut bytes = 0;
    for name in names {
        // Planned, and not committed yet, or cleared since: then it is not there.
        let Some(value) = disk.retained.get(disk::retained_key(b'm', &name))? else { continue };
        bytes += value.len();
        if bytes > MAX_RETAINED_BYTES && !messages.is_empty() {
            tracing::warn!(%filter, "more retained messages than one answer holds");
            break;
        }
        let message = v1::Message::decode(bytes::Bytes::copy_from_slice(&value))
            .map_err(|_| DiskError::Damaged(format!("the retained message of {name:?}")))?;
        messages.push(message);
    }
    Ok(messages)
}

pub fn record(disk: &Disk, kind: &str, key: String) -> Result<Option<v1::Record>, DiskError> {
    let value = disk.meta.get(disk::record_key(kind, &key))?;
    Ok(value.and_then(|value| decode_record(key, &value, now_ms())))
}

/// By key, at most `limit`, until they are more than one answer holds.
pub fn records(disk: &Disk, kind: &str, prefix: &str, limit: usize) -> Result<Vec<v1::Record>, DiskError> {
    let now_ms = now_ms();
    let mut records = Vec::new();
    let mut bytes = 0;
    for guard in disk.meta.prefix(disk::record_key(kind, prefix)) {
        if records.len() >= limit || bytes >= MAX_RETAINED_BYTES {
            break;
        }
        let (key, value) = guard.into_inner()?;
        let key = std::str::from_utf8(&key[kind.len() + 2..])
            .map_err(|_| DiskError::Damaged("a record's key".to_owned()))?;
        if let Some(record) = decode_record(key.to_owned(), &value, now_ms) {
            bytes += value.len();
            records.push(record);
        }
    }
    Ok(records)
}

fn decode_record(key: String, value: &[u8], now_ms: u64) -> Option<v1::Record> {
    let expires_ms = disk::number(value, 0)?;
    let live = expires_ms == 0 || expires_ms > now_ms;
    live.then(|| v1::Record { key, value: bytes::Bytes::copy_from_slice(&value[8..]) })
}
