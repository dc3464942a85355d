//! The keeper itself: how it is, which its nodes are, and its data as a file.

use carillon_proto::v1;

use super::calls::{CALL_TIMEOUT, explain};
use super::{Admin, AdminError};

/// How the keeper itself is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KeeperStatus {
    pub cluster_id: String,
    pub node_id: u64,
    pub leader_id: Option<u64>,
    pub term: u64,
    pub last_log_index: u64,
    pub applied_index: u64,
    pub snapshot_index: u64,
    pub revision: u64,
    pub compacted_revision: u64,
    pub keys: u64,
    pub bytes: u64,
    pub quota_bytes: u64,
    pub leases: u64,
    pub watches: u64,
    pub version: String,
    /// Last entry that the cluster has decided, as far as this node has heard.
    pub committed_index: u64,
    /// It hears a leader, or leads and hears a majority.
    pub in_touch: bool,
    /// Sizes on disk.
    pub log_bytes: u64,
    pub snapshot_bytes: u64,
    /// Entries that are proposed here and not decided.
    pub proposals_pending: u64,
    /// Writes to the log so far, and how long they and their fsync took.
    pub fsyncs: u64,
    pub fsync_us: u64,
    /// Elections that this node has seen the outcome of.
    pub leaders_seen: u64,
    pub leases_expired: u64,
    pub protection: Protection,
}

/// What is between a keeper and whoever reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// Both sides show a certificate, and what a caller may do goes by it.
    Tls,
    /// None; it can be reached from its own machine alone.
    Loopback,
    /// None: whoever reaches it may do everything.
    Open,
    /// It does not say.
    Unknown,
}

impl From<v1::KeeperProtection> for Protection {
    fn from(protection: v1::KeeperProtection) -> Self {
        match protection {
            v1::KeeperProtection::Tls => Protection::Tls,
            v1::KeeperProtection::Loopback => Protection::Loopback,
            v1::KeeperProtection::Open => Protection::Open,
            v1::KeeperProtection::Unspecified => Protection::Unknown,
        }
    }
}

/// One of the keeper's nodes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Member {
    /// 16 hexadecimal digits.
    pub node: String,
    /// host:port
    pub address: String,
    pub leads: bool,
    /// It has a vote; a learner has none yet.
    pub voter: bool,
    /// Last entry that is known to be on its disk; 0 = not known.
    pub matched_index: u64,
    /// Milliseconds since the leader last heard it; None = never.
    pub heard_ms: Option<u64>,
    /// The leader's last heartbeat to it and back; None = not known.
    pub round_trip_us: Option<u64>,
}

/// A node's id as people write it.
pub fn parse_node(text: &str) -> Result<u64, String> {
    match u64::from_str_radix(text, 16) {
        Ok(node) if node != 0 && text.len() <= 16 => Ok(node),
        _ => Err(format!("{text:?} is not the id of a keeper: up to 16 hexadecimal digits")),
    }
}

impl Admin {
    /// How the keeper itself is.
    pub async fn status(&self) -> Result<KeeperStatus, AdminError> {
        let request = v1::KeeperStatusRequest {};
        let s = self.call(request, async |mut client, request| client.keeper_status(request).await).await?;
        Ok(KeeperStatus {
            protection: s.protection().into(),
            cluster_id: s.cluster_id,
            node_id: s.node_id,
            leader_id: (s.leader_id != 0).then_some(s.leader_id),
            term: s.term,
            last_log_index: s.last_log_index,
            applied_index: s.applied_index,
            snapshot_index: s.snapshot_index,
            revision: s.revision,
            compacted_revision: s.compacted_revision,
            keys: s.keys,
            bytes: s.bytes,
            quota_bytes: s.quota_bytes,
            leases: s.leases,
            watches: s.watches,
            version: s.version,
            committed_index: s.committed_index,
            in_touch: s.in_touch,
            log_bytes: s.log_bytes,
            snapshot_bytes: s.snapshot_bytes,
            proposals_pending: s.proposals_pending,
            fsyncs: s.fsyncs,
            fsync_us: s.fsync_us,
            leaders_seen: s.leaders_seen,
            leases_expired: s.leases_expired,
        })
    }

    /// The keeper's nodes.
    pub async fn members(&self) -> Result<Vec<Member>, AdminError> {
        let request = v1::MemberListRequest {};
        let list = self.call(request, async |mut client, request| client.member_list(request).await).await?;
        let member = |member: v1::KeeperMember| Member {
            node: format!("{:016x}", member.node_id),
            address: member.address,
            leads: member.node_id == list.leader_id,
            voter: member.voter,
            matched_index: member.matched_index,
            heard_ms: u64::try_from(member.heard_ms).ok(),
            round_trip_us: (member.round_trip_us != 0).then_some(member.round_trip_us),
        };
        Ok(list.members.into_iter().map(member).collect())
    }

    /// Takes in the keeper that waits at an address; returns its id.
    pub async fn add_member(&self, address: &str) -> Result<String, AdminError> {
        let request = v1::MemberAddRequest { address: address.to_owned() };
        let answer =
            self.slow_write(request, async |mut client, request| client.member_add(request).await).await?;
        Ok(format!("{:016x}", answer.node_id))
    }

    /// Takes a keeper out of the cluster.
    pub async fn remove_member(&self, node_id: u64) -> Result<(), AdminError> {
        let request = v1::MemberRemoveRequest { node_id };
        let answer =
            self.slow_write(request, async |mut client, request| client.member_remove(request).await).await;
        answer.map(drop)
    }

    /// Hands the lead to a node, or (None) to the one that is furthest along; returns which leads then.
    pub async fn transfer_lead(&self, to: Option<u64>) -> Result<String, AdminError> {
        let request = v1::LeadershipTransferRequest { node_id: to.unwrap_or(0) };
        let answer = self
            .slow_write(request, async |mut client, request| client.leadership_transfer(request).await)
            .await?;
        Ok(format!("{:016x}", answer.node_id))
    }

    /// All that the keeper holds, as a snapshot's file.
    pub async fn save_snapshot(&self) -> Result<Vec<u8>, AdminError> {
        let request = v1::SaveSnapshotRequest {};
        let mut parts =
            self.call(request, async |mut client, request| client.save_snapshot(request).await).await?;
        let mut file = Vec::new();
        loop {
            match tokio::time::timeout(CALL_TIMEOUT, parts.message()).await {
                Ok(Ok(Some(part))) => file.extend_from_slice(&part.part),
                Ok(Ok(None)) => return Ok(file),
                Ok(Err(status)) => return Err(explain(status)),
                Err(_) => return Err(AdminError::Other("no answer within 10 s".to_owned())),
            }
        }
    }
}
