//! The state as bytes: what a snapshot holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use carillon_proto::v1;
use prost::Message as _;

use super::{Item, Lease, State, event_bytes};

/// What a key takes at most besides itself and its value.
const ITEM_BYTES: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("key {key:?} is attached to lease {lease}, which is not in it")]
    DanglingLease { key: String, lease: u64 },
}

impl State {
    /// Encodes the state, and `raft_meta` with it: in many small parts, which protobuf takes for one message, so that not
    /// all of the state has to be there once more.
    pub(crate) fn encode(&self, raft_meta: Vec<u8>) -> Vec<u8> {
        let head = v1::KeeperSnapshot {
            revision: self.revision,
            compacted_revision: self.compacted,
            leases: self.leases.iter().map(|(&lease, body)| encode_lease(lease, body)).collect(),
            raft_meta: raft_meta.into(),
            ..Default::default()
        };
        let mut bytes = Vec::with_capacity(head.encoded_len() + self.snapshot_bytes());
        let mut put = |part: v1::KeeperSnapshot| {
            // A vector always has room.
            let _ = part.encode(&mut bytes);
        };
        put(head);
        for (key, item) in &self.items {
            put(v1::KeeperSnapshot { items: vec![item.to_proto(key)], ..Default::default() });
        }
        for event in &self.events {
            put(v1::KeeperSnapshot { events: vec![(**event).clone()], ..Default::default() });
        }
        bytes
    }

    /// About how many bytes a snapshot of it has.
    pub(crate) fn snapshot_bytes(&self) -> usize {
        self.bytes + self.items.len() * ITEM_BYTES + self.event_bytes
    }

    /// The state and the `raft_meta` that were encoded.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(State, Vec<u8>), SnapshotError> {
        let snapshot = v1::KeeperSnapshot::decode(bytes)?;
        let mut leases: BTreeMap<u64, Lease> = snapshot
            .leases
            .into_iter()
            .map(|lease| {
                let (ttl_ms, granted) = (lease.ttl_ms, lease.granted_revision);
                (lease.lease, Lease { ttl_ms, granted, keys: BTreeSet::new() })
            })
            .collect();
        let mut items = BTreeMap::new();
        let mut bytes = 0;
        for item in snapshot.items {
            if item.lease != 0 {
                let Some(lease) = leases.get_mut(&item.lease) else {
                    return Err(SnapshotError::DanglingLease { key: item.key, lease: item.lease });
                };
                lease.keys.insert(item.key.clone());
            }
            bytes += item.key.len() + item.value.len();
            let value = Item {
                value: item.value,
                create_revision: item.create_revision,
                mod_revision: item.mod_revision,
                version: item.version,
                lease: item.lease,
            };
            items.insert(item.key, value);
        }
        let events: VecDeque<_> = snapshot.events.into_iter().map(Arc::new).collect();
        let state = State {
            revision: snapshot.revision,
            items,
            leases,
            bytes,
            event_bytes: events.iter().map(|event| event_bytes(event)).sum(),
            events,
            compacted: snapshot.compacted_revision,
        };
        Ok((state, snapshot.raft_meta.to_vec()))
    }
}

fn encode_lease(lease: u64, body: &Lease) -> v1::KeeperLease {
    v1::KeeperLease { lease, ttl_ms: body.ttl_ms, granted_revision: body.granted }
}
