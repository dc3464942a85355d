//! Raft's messages as they go from node to node, and back.

use carillon_proto::v1;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest, VoteRequest,
    VoteResponse,
};
use openraft::raft::{TransferLeaderError, TransferLeaderResponse};
use tonic::Status;
use v1::raft_appended::Outcome;
use v1::raft_entry;
use v1::raft_take_lead_answer::Refused;

use super::types::{Entry, LogEntry, LogId, Payload, SnapshotMeta, TypeConfig, Vote, leader_id};

/// What another node has sent makes no sense.
pub(crate) fn malformed(what: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("malformed message of another keeper: {what}"))
}

fn needed<T>(field: Option<T>, name: &str) -> Result<T, Status> {
    field.ok_or_else(|| malformed(format_args!("{name} is missing")))
}

pub(crate) fn log_id(id: &LogId) -> v1::RaftLogId {
    v1::RaftLogId { term: id.leader_id.term, node_id: id.leader_id.node_id, index: id.index }
}

fn parse_log_id(id: v1::RaftLogId) -> LogId {
    LogId { leader_id: leader_id(id.term, id.node_id), index: id.index }
}

pub(crate) fn vote(vote: &Vote) -> v1::RaftVote {
    let Vote { leader_id, committed } = vote;
    v1::RaftVote { term: leader_id.term, node_id: leader_id.node_id, committed: *committed }
}

pub(crate) fn parse_vote(vote: Option<v1::RaftVote>) -> Result<Vote, Status> {
    let vote = needed(vote, "vote")?;
    Ok(Vote { leader_id: leader_id(vote.term, vote.node_id), committed: vote.committed })
}

fn entry(entry: LogEntry) -> Result<v1::RaftEntry, serde_json::Error> {
    let payload = match entry.payload {
        Payload::Blank => raft_entry::Payload::Blank(v1::RaftBlank {}),
        Payload::Normal(Entry(content)) => raft_entry::Payload::Entry(content),
        Payload::Membership(membership) => {
            raft_entry::Payload::Membership(serde_json::to_vec(&membership)?.into())
        }
    };
    Ok(v1::RaftEntry { id: Some(log_id(&entry.log_id)), payload: Some(payload) })
}

fn parse_entry(entry: v1::RaftEntry) -> Result<LogEntry, Status> {
    let payload = match entry.payload {
        // Of a newer version.
        None => return Err(malformed("an entry of a kind that is not known")),
        Some(raft_entry::Payload::Blank(_)) => Payload::Blank,
        Some(raft_entry::Payload::Entry(content)) => Payload::Normal(Entry(content)),
        Some(raft_entry::Payload::Membership(bytes)) => {
            Payload::Membership(serde_json::from_slice(&bytes).map_err(malformed)?)
        }
    };
    Ok(LogEntry { log_id: parse_log_id(needed(entry.id, "the id of an entry")?), payload })
}

pub(crate) fn append(
    request: AppendEntriesRequest<TypeConfig>,
    in_touch: bool,
) -> Result<v1::RaftAppend, serde_json::Error> {
    Ok(v1::RaftAppend {
        in_touch,
        vote: Some(vote(&request.vote)),
        previous: request.prev_log_id.as_ref().map(log_id),
        entries: request.entries.into_iter().map(entry).collect::<Result<_, _>>()?,
        leader_commit: request.leader_commit.as_ref().map(log_id),
    })
}

pub(crate) fn parse_append(request: v1::RaftAppend) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let vote = parse_vote(request.vote)?;
    if !vote.committed {
        return Err(malformed("an append of a node that does not lead"));
    }
    let entries: Vec<LogEntry> = request.entries.into_iter().map(parse_entry).collect::<Result<_, _>>()?;
    let first = entries.first().map(|entry| entry.log_id.index);
    let expected = request.previous.as_ref().map_or(Some(0), |previous| previous.index.checked_add(1));
    let follows =
        entries.windows(2).all(|pair| pair[0].log_id.index.checked_add(1) == Some(pair[1].log_id.index));
    if first.is_some() && (first != expected || !follows) {
        return Err(malformed("entries that do not follow one another"));
    }
    Ok(AppendEntriesRequest {
        vote,
        prev_log_id: request.previous.map(parse_log_id),
        entries,
        leader_commit: request.leader_commit.map(parse_log_id),
    })
}

pub(crate) fn appended(result: StreamAppendResult<TypeConfig>) -> v1::RaftAppended {
    let outcome = match result {
        Ok(id) => Outcome::Accepted(v1::RaftPlace { id: id.as_ref().map(log_id) }),
        Err(StreamAppendError::Conflict(id)) => Outcome::Conflict(log_id(&id)),
        Err(StreamAppendError::HigherVote(higher)) => Outcome::HigherVote(vote(&higher)),
    };
    v1::RaftAppended { outcome: Some(outcome) }
}

pub(crate) fn parse_appended(answer: v1::RaftAppended) -> Result<StreamAppendResult<TypeConfig>, Status> {
    Ok(match needed(answer.outcome, "outcome")? {
        Outcome::Accepted(place) => Ok(place.id.map(parse_log_id)),
        Outcome::Conflict(id) => Err(StreamAppendError::Conflict(parse_log_id(id))),
        Outcome::HigherVote(higher) => Err(StreamAppendError::HigherVote(parse_vote(Some(higher))?)),
    })
}

pub(crate) fn ballot(request: &VoteRequest<TypeConfig>, pre_vote: bool) -> v1::RaftBallot {
    v1::RaftBallot {
        vote: Some(vote(&request.vote)),
        last_log: request.last_log_id.as_ref().map(log_id),
        leadership_transfer: request.leadership_transfer,
        pre_vote,
    }
}

pub(crate) fn parse_ballot(ballot: v1::RaftBallot) -> Result<VoteRequest<TypeConfig>, Status> {
    let mut request = VoteRequest::new(parse_vote(ballot.vote)?, ballot.last_log.map(parse_log_id));
    request.leadership_transfer = ballot.leadership_transfer;
    Ok(request)
}

pub(crate) fn ballot_answer(answer: &VoteResponse<TypeConfig>) -> v1::RaftBallotAnswer {
    v1::RaftBallotAnswer {
        vote: Some(vote(&answer.vote)),
        granted: answer.vote_granted,
        last_log: answer.last_log_id.as_ref().map(log_id),
    }
}

pub(crate) fn parse_ballot_answer(answer: v1::RaftBallotAnswer) -> Result<VoteResponse<TypeConfig>, Status> {
    let last_log = answer.last_log.map(parse_log_id);
    Ok(VoteResponse::new(parse_vote(answer.vote)?, last_log, answer.granted))
}

pub(crate) fn snapshot_head(
    from: &Vote,
    meta: &SnapshotMeta,
    size: usize,
) -> Result<v1::RaftSnapshotHead, serde_json::Error> {
    let meta = serde_json::to_vec(meta)?.into();
    Ok(v1::RaftSnapshotHead { vote: Some(vote(from)), meta, size: size as u64 })
}

pub(crate) fn parse_snapshot_meta(meta: &[u8]) -> Result<SnapshotMeta, Status> {
    serde_json::from_slice(meta).map_err(malformed)
}

pub(crate) fn take_lead(request: &TransferLeaderRequest<TypeConfig>) -> v1::RaftTakeLead {
    v1::RaftTakeLead {
        from: Some(vote(request.from_leader())),
        to: *request.to_node_id(),
        last_log: request.last_log_id().map(log_id),
    }
}

pub(crate) fn parse_take_lead(
    request: v1::RaftTakeLead,
) -> Result<TransferLeaderRequest<TypeConfig>, Status> {
    let last_log = request.last_log.map(parse_log_id);
    Ok(TransferLeaderRequest::new(parse_vote(request.from)?, request.to, last_log))
}

pub(crate) fn take_lead_answer(answer: &TransferLeaderResponse<TypeConfig>) -> v1::RaftTakeLeadAnswer {
    let refused = match answer {
        Ok(()) => None,
        Err(TransferLeaderError::VoteChanged { actual, .. }) => Some(Refused::VoteChanged(vote(actual))),
        Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
            Some(Refused::NotFlushed(v1::RaftPlace { id: actual.as_ref().map(log_id) }))
        }
    };
    v1::RaftTakeLeadAnswer { refused }
}

pub(crate) fn parse_take_lead_answer(
    answer: v1::RaftTakeLeadAnswer,
    asked: &TransferLeaderRequest<TypeConfig>,
) -> Result<TransferLeaderResponse<TypeConfig>, Status> {
    Ok(match answer.refused {
        None => Ok(()),
        Some(Refused::VoteChanged(actual)) => Err(TransferLeaderError::VoteChanged {
            expected: *asked.from_leader(),
            actual: parse_vote(Some(actual))?,
        }),
        Some(Refused::NotFlushed(place)) => Err(TransferLeaderError::LogNotFlushed {
            expected: asked.last_log_id().copied(),
            actual: place.id.map(parse_log_id),
        }),
    })
}
