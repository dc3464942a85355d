//! What openraft is told about our types.

use std::fmt;

use carillon_proto::v1;
use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

openraft::declare_raft_types!(
    /// Protobuf entries, `u64` node ids.
    pub(crate) TypeConfig: D = Entry, R = Applied
);

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, Vec<u8>>;
pub(crate) type Payload = openraft::type_config::alias::PayloadOf<TypeConfig>;
pub(crate) type LogEntry = openraft::type_config::alias::EntryOf<TypeConfig>;

pub(crate) fn leader_id(term: u64, node_id: u64) -> openraft::type_config::alias::LeaderIdOf<TypeConfig> {
    openraft::impls::leader_id_adv::LeaderId { term, node_id }
}

/// An entry's content.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry(pub v1::KeeperEntry);

/// What came of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Applied(pub v1::KeeperApplied);

impl Entry {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.encode_to_vec()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        v1::KeeperEntry::decode(bytes).map(Entry)
    }

    /// Size as bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.encoded_len()
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let txn = self.0.txn.as_ref();
        let ops = txn.map_or(0, |txn| txn.then.len() + txn.otherwise.len());
        write!(f, "transaction of {ops} operations")
    }
}

// openraft asks for serde; what is written is protobuf.
impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.to_bytes())
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        Entry::from_bytes(&bytes).map_err(D::Error::custom)
    }
}

impl Serialize for Applied {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0.encode_to_vec())
    }
}

impl<'de> Deserialize<'de> for Applied {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        v1::KeeperApplied::decode(bytes.as_slice()).map(Applied).map_err(D::Error::custom)
    }
}
