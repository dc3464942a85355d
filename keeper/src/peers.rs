//! What other keepers ask of this one.

use std::pin::Pin;
use std::sync::{Arc, Weak};

use carillon_proto::v1;
use carillon_proto::v1::keeper_peer_server::KeeperPeer;
use futures::{Stream, StreamExt as _};
use openraft::errors::RaftError;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};
use v1::proposal_answer::Outcome;
use v1::raft_snapshot_part::Part;

use crate::core::{Core, Shared};
use crate::home::Home;
use crate::identity::node_text;
use crate::raft::types::{Entry, Snapshot, TypeConfig};
use crate::raft::wire::{self, malformed};
use crate::raft::{Admitted, Unavailable};

/// Largest snapshot that is taken from another node, bytes.
const MAX_SNAPSHOT_BYTES: u64 = 4 * 1024 * 1024 * 1024;
/// Snapshots that are taken at a time.
const SNAPSHOTS: usize = 1;

/// Entries of another node that are being decided on at a time.
const PROPOSALS: usize = 4096;

type Answer<T> = Result<Response<T>, Status>;

pub(crate) struct Peers {
    core: Shared,
    /// Not held: the directory is let go of when the keeper stops, whoever is still connected.
    home: Weak<Home>,
    snapshots: Semaphore,
}

impl Peers {
    pub(crate) fn new(core: Shared, home: &Arc<Home>) -> Self {
        Peers { core, home: Arc::downgrade(home), snapshots: Semaphore::new(SNAPSHOTS) }
    }

    /// Refuses whoever does not mean this node of this cluster.
    fn check<T>(&self, request: Request<T>) -> Result<T, Status> {
        self.core.node.identity().check(request.metadata())?;
        Ok(request.into_inner())
    }
}

/// Has an entry of another node decided on.
async fn decided(core: &Core, entry: Entry, admitted: Admitted) -> Result<v1::KeeperApplied, Status> {
    if crate::disk::puts(&entry.0) {
        core.disk.check()?;
    }
    let granted = crate::leases::grants(&entry.0);
    let applied = core.node.propose_here(entry, admitted).await.map_err(|error| match error {
        Unavailable::NotLeader { .. } => Status::aborted(error.to_string()),
        error => error.into(),
    })?;
    core.leases.granted_all(&granted, &applied);
    Ok(applied)
}

fn fatal(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("this keeper has failed: {error}"))
}

fn refused<E: std::error::Error>(error: RaftError<TypeConfig, E>) -> Status {
    fatal(error)
}

#[tonic::async_trait]
impl KeeperPeer for Peers {
    type ProposeStream = Pin<Box<dyn Stream<Item = Result<v1::ProposalAnswer, Status>> + Send>>;
    type AppendStream = Pin<Box<dyn Stream<Item = Result<v1::RaftAppended, Status>> + Send>>;

    async fn append(&self, request: Request<Streaming<v1::RaftAppend>>) -> Answer<Self::AppendStream> {
        let requests = self.check(request)?;
        let node = self.core.node.clone();
        // A stream that breaks, or says what makes no sense, ends here, and the leader begins another.
        let requests = requests.take_until(self.core.stop.clone().cancelled_owned()).map(move |request| {
            if request.as_ref().is_ok_and(|request| request.in_touch) {
                node.leader_heard();
            }
            request.and_then(wire::parse_append)
        });
        let requests = requests.take_while(|request| {
            let fine = request.as_ref().inspect_err(|status| {
                tracing::debug!(error = status.message(), "a leader's stream has ended");
            });
            std::future::ready(fine.is_ok())
        });
        let requests = requests.filter_map(|request| std::future::ready(request.ok()));
        let answers = self.core.node.raft().stream_append(requests);
        let answers = answers.map(|answer| answer.map(wire::appended).map_err(fatal));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn vote(&self, request: Request<v1::RaftBallot>) -> Answer<v1::RaftBallotAnswer> {
        let ballot = self.check(request)?;
        let pre_vote = ballot.pre_vote;
        let request = wire::parse_ballot(ballot)?;
        let raft = self.core.node.raft();
        let answer = if pre_vote { raft.pre_vote(request).await } else { raft.vote(request).await };
        Ok(Response::new(wire::ballot_answer(&answer.map_err(refused)?)))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<v1::RaftSnapshotPart>>,
    ) -> Answer<v1::RaftSnapshotInstalled> {
        let mut parts = self.check(request)?;
        let Some(v1::RaftSnapshotPart { part: Some(Part::Head(head)) }) = parts.message().await? else {
            return Err(malformed("a snapshot begins without its head"));
        };
        if head.size > MAX_SNAPSHOT_BYTES {
            return Err(malformed(format_args!("a snapshot of {} bytes", head.size)));
        }
        let _one_at_a_time = self
            .snapshots
            .try_acquire()
            .map_err(|_| Status::unavailable("another snapshot is being taken"))?;
        let (vote, meta) = (wire::parse_vote(head.vote)?, wire::parse_snapshot_meta(&head.meta)?);
        let mut body = Vec::new();
        while let Some(part) = parts.message().await? {
            let Some(Part::Bytes(bytes)) = part.part else {
                return Err(malformed("a snapshot has a second head"));
            };
            body.extend_from_slice(&bytes);
            if body.len() as u64 > head.size {
                return Err(malformed("a snapshot is larger than was said"));
            }
        }
        if body.len() as u64 != head.size {
            return Err(malformed("a snapshot is not whole"));
        }
        // openraft takes what is not a snapshot of this cluster for a mistake of its own, and ends.
        let place = crate::raft::SnapshotFile::of_body(&body).map_err(malformed)?.place();
        let said = meta.last_log_id.map_or((0, 0), |id| (id.leader_id.term, id.index));
        if place != said || meta.last_log_id.is_some_and(|id| id.leader_id.term > vote.leader_id.term) {
            return Err(malformed("a snapshot that is not what its head says"));
        }
        let snapshot = Snapshot { meta, snapshot: body };
        let answer = self.core.node.raft().install_full_snapshot(vote, snapshot).await.map_err(fatal)?;
        Ok(Response::new(v1::RaftSnapshotInstalled { vote: Some(wire::vote(&answer.vote)) }))
    }

    async fn take_lead(&self, request: Request<v1::RaftTakeLead>) -> Answer<v1::RaftTakeLeadAnswer> {
        let request = wire::parse_take_lead(self.check(request)?)?;
        let answer = self.core.node.raft().handle_transfer_leader(request).await.map_err(fatal)?;
        Ok(Response::new(wire::take_lead_answer(&answer)))
    }

    async fn propose(&self, request: Request<Streaming<v1::Proposal>>) -> Answer<Self::ProposeStream> {
        let proposals = self.check(request)?;
        let core = self.core.clone();
        let proposals = proposals.take_until(core.stop.clone().cancelled_owned());
        // One that makes no sense ends the stream: those that follow it cannot be read either.
        let proposals = proposals.take_while(|proposal| std::future::ready(proposal.is_ok()));
        // The next is not even read before there is room for this one: whoever sends too much is held up.
        let node = self.core.node.clone();
        let proposals = proposals.filter_map(move |proposal| {
            let node = node.clone();
            async move {
                let proposal = proposal.ok()?;
                let entry = Entry(proposal.entry.unwrap_or_default());
                let admitted = node.admit_handed_on(&entry).await?;
                Some((proposal.id, entry, admitted))
            }
        });
        let answers = proposals.map(move |(id, entry, admitted)| {
            let core = core.clone();
            async move {
                let outcome = match decided(&core, entry, admitted).await {
                    Ok(applied) => Outcome::Applied(applied),
                    Err(status) => Outcome::Refused(v1::ProposalRefused {
                        code: status.code() as i32,
                        message: status.message().to_owned(),
                    }),
                };
                Ok(v1::ProposalAnswer { id, outcome: Some(outcome) })
            }
        });
        Ok(Response::new(Box::pin(answers.buffer_unordered(PROPOSALS))))
    }

    async fn read_index(&self, request: Request<v1::ReadIndexRequest>) -> Answer<v1::ReadIndexResponse> {
        self.check(request)?;
        let index = self.core.node.read_index().await?;
        Ok(Response::new(v1::ReadIndexResponse { index }))
    }

    async fn keep_alive(
        &self,
        request: Request<v1::LeaseKeepAliveRequest>,
    ) -> Answer<v1::LeaseKeepAliveResponse> {
        let request = self.check(request)?;
        self.core.keep_alive_here(request).map(Response::new)
    }

    async fn loads(&self, request: Request<v1::LoadsRequest>) -> Answer<v1::LoadsResponse> {
        self.check(request)?;
        if !self.core.node.leads() {
            return Err(Status::unavailable("this keeper is not the leader"));
        }
        Ok(Response::new(v1::LoadsResponse { loads: self.core.loads_here() }))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Answer<v1::JoinResponse> {
        let request = self.check(request)?;
        let node_id = self.core.take_in(request.address, request.node_id).await?;
        Ok(Response::new(v1::JoinResponse { node_id }))
    }

    async fn remove_member(
        &self,
        request: Request<v1::MemberRemoveRequest>,
    ) -> Answer<v1::MemberRemoveResponse> {
        let request = self.check(request)?;
        self.core.node.remove(request.node_id).await?;
        Ok(Response::new(v1::MemberRemoveResponse {}))
    }

    async fn move_lead(
        &self,
        request: Request<v1::LeadershipTransferRequest>,
    ) -> Answer<v1::LeadershipTransferResponse> {
        let request = self.check(request)?;
        let node_id = self.core.node.hand_over(request.node_id).await?;
        Ok(Response::new(v1::LeadershipTransferResponse { node_id }))
    }

    async fn identify(&self, request: Request<v1::IdentifyRequest>) -> Answer<v1::IdentifyResponse> {
        let node = &self.core.node;
        // Whether somebody is a member is only told when it is certain.
        let certain = request.into_inner().confirm && node.leads() && node.read_index().await.is_ok();
        let cluster = node.identity().cluster();
        let progress = node.progress();
        Ok(Response::new(v1::IdentifyResponse {
            node_id: node.id(),
            cluster_id: cluster.map(|cluster| cluster.to_string()).unwrap_or_default(),
            initialized: node.is_initialized().await?,
            leader_id: progress.leader.unwrap_or(0),
            members: node.members(),
            confirmed: certain,
            claimed: self.home.upgrade().is_some_and(|home| home.is_claimed()),
        }))
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Answer<v1::AdoptResponse> {
        let request = request.into_inner();
        let own = self.core.node.id();
        if request.node_id != own {
            let text = format!("this is keeper {}, not {}", node_text(own), node_text(request.node_id));
            return Err(Status::failed_precondition(text));
        }
        if request.cluster_id.is_empty() {
            return Err(malformed("a cluster without an id"));
        }
        let home = self.home.upgrade().ok_or_else(|| Status::unavailable("the keeper is stopping"))?;
        let settled = if request.claim {
            // Not while this node founds a cluster of its own.
            let not_founding = home.founding().clone().lock_owned().await;
            if self.core.node.is_initialized().await? {
                let text = format!("keeper {} is a member of a cluster, or was one", node_text(own));
                return Err(Status::failed_precondition(text));
            }
            crate::blocking::run(move || {
                let _not_founding = not_founding;
                home.claim(&request.cluster_id)
            })
            .await
        } else {
            crate::blocking::run(move || home.settle(&request.cluster_id)).await
        };
        match settled {
            Ok(Ok(())) => Ok(Response::new(v1::AdoptResponse {})),
            Ok(Err(error)) => Err(Status::failed_precondition(error.to_string())),
            Err(error) => Err(fatal(error)),
        }
    }
}
