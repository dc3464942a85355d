//! How votes and entries are written to the log.

use std::io::{self, Read, Write};

use raft_log::codeq::{Decode, Encode};
use xxhash_rust::xxh3::xxh3_64;

use super::types::{Entry, LogId, Payload, Vote, leader_id};

/// The log's own types.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct WalTypes;

impl raft_log::Types for WalTypes {
    type LogId = WalLogId;
    type LogPayload = WalPayload;
    type Vote = WalVote;
    type Callback = super::groups::Group;
    type UserData = String;

    fn log_index(log_id: &WalLogId) -> u64 {
        log_id.0.index
    }

    fn payload_size(payload: &WalPayload) -> u64 {
        match &payload.0 {
            Payload::Normal(entry) => entry.len() as u64,
            _ => 64,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WalLogId(pub LogId);

#[derive(Debug, Clone)]
pub(crate) struct WalPayload(pub Payload);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) struct WalVote(pub Vote);

impl Encode for WalLogId {
    fn encode<W: Write>(&self, mut w: W) -> io::Result<usize> {
        let mut n = self.0.leader_id.term.encode(&mut w)?;
        n += self.0.leader_id.node_id.encode(&mut w)?;
        n += self.0.index.encode(&mut w)?;
        Ok(n)
    }
}

impl Decode for WalLogId {
    fn decode<R: Read>(mut r: R) -> io::Result<Self> {
        let (term, node_id) = (u64::decode(&mut r)?, u64::decode(&mut r)?);
        Ok(WalLogId(LogId { leader_id: leader_id(term, node_id), index: u64::decode(&mut r)? }))
    }
}

impl Encode for WalVote {
    fn encode<W: Write>(&self, mut w: W) -> io::Result<usize> {
        let mut n = self.0.leader_id.term.encode(&mut w)?;
        n += self.0.leader_id.node_id.encode(&mut w)?;
        n += u8::from(self.0.committed).encode(&mut w)?;
        Ok(n)
    }
}

impl Decode for WalVote {
    fn decode<R: Read>(mut r: R) -> io::Result<Self> {
        let (term, node_id) = (u64::decode(&mut r)?, u64::decode(&mut r)?);
        let committed = u8::decode(&mut r)? != 0;
        Ok(WalVote(Vote { leader_id: leader_id(term, node_id), committed }))
    }
}

const BLANK: u8 = 16;
const NORMAL: u8 = 17;
const MEMBERSHIP: u8 = 18;

/// Of kind and length. A record that ends after the file does is taken for one that a crash has cut off: a length that
/// was damaged must not look like that, or what follows would be cut off as well.
fn head_check(kind: u8, length: u32) -> u32 {
    let [a, b, c, d] = length.to_be_bytes();
    xxh3_64(&[kind, a, b, c, d]) as u32
}

/// A byte for the kind, a `u32` length, a checksum of both, the bytes. (The record as a whole has one too.)
impl Encode for WalPayload {
    fn encode<W: Write>(&self, mut w: W) -> io::Result<usize> {
        let (kind, bytes) = match &self.0 {
            Payload::Blank => (BLANK, Vec::new()),
            Payload::Normal(entry) => (NORMAL, entry.to_bytes()),
            Payload::Membership(membership) => (MEMBERSHIP, serde_json::to_vec(membership)?),
        };
        let length =
            u32::try_from(bytes.len()).map_err(|_| io::Error::other("an entry is larger than 4 GiB"))?;
        let mut n = kind.encode(&mut w)? + length.encode(&mut w)?;
        n += head_check(kind, length).encode(&mut w)?;
        w.write_all(&bytes)?;
        Ok(n + bytes.len())
    }
}

impl Decode for WalPayload {
    fn decode<R: Read>(mut r: R) -> io::Result<Self> {
        let kind = u8::decode(&mut r)?;
        let length = u32::decode(&mut r)?;
        let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        if u32::decode(&mut r)? != head_check(kind, length) {
            return Err(invalid("the head of a log entry is damaged, or of another version".to_owned()));
        }
        // Not allocated before it is there: a broken length must not ask for 4 GiB.
        let mut bytes = Vec::new();
        r.by_ref().take(u64::from(length)).read_to_end(&mut bytes)?;
        if bytes.len() < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let payload = match kind {
            BLANK => Payload::Blank,
            NORMAL => Payload::Normal(Entry::from_bytes(&bytes).map_err(|error| invalid(error.to_string()))?),
            MEMBERSHIP => Payload::Membership(serde_json::from_slice(&bytes)?),
            other => {
                return Err(invalid(format!(
                    "a log entry is of unknown kind {other}: written by a newer version?"
                )));
            }
        };
        Ok(WalPayload(payload))
    }
}
