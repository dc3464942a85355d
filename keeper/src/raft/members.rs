//! Who belongs to the cluster: taking nodes in, promoting, taking out, and moving the lead. All of it is the leader's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use carillon_proto::v1;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, Instant as _};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::network::within;
use super::{Node, Unavailable};
use crate::identity::node_text;

/// Most members of a cluster: more would only make deciding slower.
const MAX_MEMBERS: usize = 7;
/// A node that waits to be taken in must say who it is within this.
const IDENTIFY_TIMEOUT: Duration = Duration::from_secs(2);
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A member that was heard this recently counts as alive.
const ALIVE: Duration = Duration::from_secs(3);
/// A learner that lacks at most so many entries is made a voter.
const PROMOTE_LAG: u64 = 100;
/// Only a voter that lacks at most so many entries is handed the lead: until it has them nobody leads.
const TRANSFER_LAG: u64 = 1_000;
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// A member as the leader sees it.
#[derive(Debug, Clone)]
struct Member {
    id: u64,
    address: String,
    voter: bool,
    /// The last entry that is known to be on its disk.
    matched: u64,
    matched_term: u64,
    /// None: not since this node leads.
    heard: Option<Duration>,
}

impl Member {
    fn alive(&self) -> bool {
        self.heard.is_some_and(|heard| heard < ALIVE)
    }
}

impl Node {
    fn known_members(&self) -> Vec<Member> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let members = membership.nodes().map(|(&id, node)| {
            let own = id == self.id();
            let (matched_term, matched) = match &metrics.replication {
                _ if own => (metrics.current_term, metrics.last_log_index.unwrap_or(0)),
                Some(replication) => replication
                    .get(&id)
                    .and_then(Option::as_ref)
                    .map_or((0, 0), |log_id| (log_id.leader_id.term, log_id.index)),
                None => (0, 0),
            };
            let heard = match &metrics.heartbeat {
                Some(_) if own => Some(Duration::ZERO),
                Some(heard) => heard.get(&id).and_then(Option::as_ref).map(|at| (**at).elapsed()),
                None => None,
            };
            Member {
                id,
                address: node.addr.clone(),
                voter: voters.contains(&id),
                matched,
                matched_term,
                heard,
            }
        });
        members.collect()
    }

    /// Everyone who belongs to the cluster, as far as this node knows.
    pub(crate) fn members(&self) -> Vec<v1::KeeperMember> {
        let members = self.known_members().into_iter().map(|member| v1::KeeperMember {
            node_id: member.id,
            address: member.address,
            voter: member.voter,
            matched_index: member.matched,
            matched_term: member.matched_term,
            heard_ms: member.heard.map_or(-1, |heard| i64::try_from(heard.as_millis()).unwrap_or(i64::MAX)),
            round_trip_us: match member.heard {
                Some(_) => self.network.round_trip(member.id).map_or(0, |took| took.as_micros() as u64),
                None => 0,
            },
        });
        members.collect()
    }

    fn must_lead(&self) -> Result<(), Status> {
        if self.leads() { Ok(()) } else { Err(self.not_leader().into()) }
    }

    /// Two entries of the log, by way of both memberships at once. Who is taken out does not stay as a learner. It goes on
    /// when the caller has gone: half a change would leave the cluster with both majorities to find.
    async fn change(&self, change: ChangeMembers<u64, BasicNode>) -> Result<(), Status> {
        let raft = self.raft.clone();
        let changed = tokio::spawn(async move { raft.change_membership(change, false).await });
        match timeout(CHANGE_TIMEOUT, changed).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))))) => {
                Err(self.not_leader().into())
            }
            Ok(Ok(Err(RaftError::APIError(error)))) => Err(Status::aborted(error.to_string())),
            Ok(Ok(Err(RaftError::Fatal(error)))) => Err(Unavailable::Unknown(error.to_string()).into()),
            Ok(Err(error)) => Err(Unavailable::Unknown(error.to_string()).into()),
            Err(_) => Err(Unavailable::Timeout.into()),
        }
    }

    /// As the leader: brings a change that a former leader has begun to its end.
    pub(crate) async fn finish_change(&self) -> Result<(), Status> {
        let half_done = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().get_joint_config().len() > 1
        };
        if !half_done {
            return Ok(());
        }
        let Ok(_one_at_a_time) = self.changing.try_lock() else { return Ok(()) };
        self.change(ChangeMembers::AddVoterIds(BTreeSet::new())).await
    }

    /// Takes in the node that waits at an address; the former node of that address is taken out. Returns its id.
    /// `expected`: the node that must be there; 0: whichever.
    pub(crate) async fn take_in(&self, address: &str, expected: u64) -> Result<u64, Status> {
        self.must_lead()?;
        let _one_at_a_time = self.changing.lock().await;
        let mut client = self.network.stranger(address)?;
        let who = client.identify(within(IDENTIFY_TIMEOUT, v1::IdentifyRequest { confirm: false })).await;
        let who = who
            .map_err(|status| {
                Status::failed_precondition(format!("there is no keeper at {address}: {}", status.message()))
            })?
            .into_inner();
        let (id, own) = (who.node_id, self.identity.cluster().unwrap_or_default());
        if id == self.id() || (expected != 0 && id != expected) {
            let text = format!(
                "at {address} the leader reaches keeper {}, not the one that is to be taken in: is its address told right (--advertise-grpc)?",
                node_text(id)
            );
            return Err(Status::failed_precondition(text));
        }
        if !who.cluster_id.is_empty() && *who.cluster_id != *own {
            let text = format!("the keeper at {address} is of cluster {}, not of {own}", who.cluster_id);
            return Err(Status::failed_precondition(text));
        }
        let members = self.known_members();
        let node = BasicNode::new(address);
        if let Some(member) = members.iter().find(|member| member.id == id) {
            if member.address != address {
                tracing::info!(node = node_text(id), address, "keeper has moved");
                self.change(ChangeMembers::SetNodes(BTreeMap::from([(id, node)]))).await?;
            }
            return Ok(id);
        }
        if who.initialized {
            let text = format!(
                "keeper {} at {address} was a member before and is not any more: it must begin anew, with an empty data directory",
                node_text(id)
            );
            return Err(Status::failed_precondition(text));
        }
        let former = members.iter().find(|member| member.address == address);
        if former.is_none() && members.len() >= MAX_MEMBERS {
            return Err(Status::failed_precondition(format!("a cluster has at most {MAX_MEMBERS} keepers")));
        }
        let adopt = v1::AdoptRequest { cluster_id: own.to_string(), node_id: id, claim: true };
        client.adopt(within(IDENTIFY_TIMEOUT, adopt)).await?;
        if let Some(former) = former {
            tracing::warn!(
                former = node_text(former.id),
                node = node_text(id),
                address,
                "another keeper is at a member's address: that member is taken out"
            );
            self.take_out(former.id).await?;
        }
        self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, node)]))).await?;
        tracing::info!(node = node_text(id), address, "keeper taken in as a learner");
        Ok(id)
    }

    /// Takes a member out.
    pub(crate) async fn remove(&self, id: u64) -> Result<(), Status> {
        self.must_lead()?;
        let _one_at_a_time = self.changing.lock().await;
        self.take_out(id).await
    }

    async fn take_out(&self, id: u64) -> Result<(), Status> {
        let members = self.known_members();
        let Some(member) = members.iter().find(|member| member.id == id) else {
            return Err(Status::not_found(format!("there is no keeper {}", node_text(id))));
        };
        if !member.voter {
            return self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id]))).await;
        }
        let voters = members.iter().filter(|member| member.voter).count();
        let left: Vec<&Member> = members.iter().filter(|member| member.voter && member.id != id).collect();
        let alive = left.iter().filter(|member| member.alive()).count();
        // The change itself is decided by those that vote now, and those that will.
        let deciding = alive + usize::from(member.alive());
        if alive < left.len() / 2 + 1 || deciding < voters / 2 + 1 {
            let text = format!(
                "without keeper {} there would be {} voters of which {alive} are alive: too few to decide anything",
                node_text(id),
                left.len()
            );
            return Err(Status::failed_precondition(text));
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id]))).await?;
        tracing::info!(node = node_text(id), address = member.address, "keeper taken out");
        Ok(())
    }

    /// As the leader: makes a voter of a learner that has caught up, if there is one.
    pub(crate) async fn promote(&self) -> Result<(), Status> {
        let last = self.progress().last_log;
        let ready = |member: &Member| {
            !member.voter && member.alive() && member.matched > 0 && member.matched + PROMOTE_LAG >= last
        };
        let Some(learner) = self.known_members().into_iter().find(ready) else { return Ok(()) };
        let _one_at_a_time = self.changing.lock().await;
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([learner.id]))).await?;
        tracing::info!(node = node_text(learner.id), address = learner.address, "keeper has a vote now");
        Ok(())
    }

    /// As the leader: where it is reached has changed, and others should know.
    pub(crate) async fn announce(&self, address: &str) -> Result<(), Status> {
        let moved = self.known_members().iter().any(|m| m.id == self.id() && m.address != address);
        if !moved {
            return Ok(());
        }
        let _one_at_a_time = self.changing.lock().await;
        let node = BTreeMap::from([(self.id(), BasicNode::new(address))]);
        self.change(ChangeMembers::SetNodes(node)).await
    }

    /// Hands the lead to a node, or (0) to the voter that is furthest along; returns which.
    pub(crate) async fn hand_over(&self, to: u64) -> Result<u64, Status> {
        self.must_lead()?;
        let last = self.progress().last_log;
        let members = self.known_members();
        let fit = |member: &&Member| {
            member.voter
                && member.id != self.id()
                && member.alive()
                && member.matched + TRANSFER_LAG >= last
                && (to == 0 || member.id == to)
        };
        if to == self.id() {
            return Ok(to);
        }
        let Some(heir) = members.iter().filter(fit).max_by_key(|member| member.matched) else {
            let text = match to {
                0 => "there is no other voter that is alive and has caught up".to_owned(),
                to => format!("keeper {} is not a voter that is alive and has caught up", node_text(to)),
            };
            return Err(Status::failed_precondition(text));
        };
        let failed = |error: String| Status::from(Unavailable::Failed(error));
        self.raft.trigger().transfer_leader(heir.id).await.map_err(|error| failed(error.to_string()))?;
        let deadline = Instant::now() + TRANSFER_TIMEOUT;
        while Instant::now() < deadline {
            match self.progress().leader {
                Some(leader) if leader != self.id() => return Ok(leader),
                _ => sleep(POLL).await,
            }
        }
        Err(Status::deadline_exceeded(format!(
            "keeper {} did not take the lead within {} s",
            node_text(heir.id),
            TRANSFER_TIMEOUT.as_secs()
        )))
    }
}
