//! The gRPC service: counts, checks what comes from outside, and hands over.

mod watching;

use carillon_agent::keys;
use carillon_proto::v1;
use carillon_proto::v1::keeper_server::Keeper;
use prost::Message as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use v1::op::Op;

use crate::access::{self, Caller};
use crate::core::{Core, Shared};
use crate::saver_claim::SAVER_ROLE;

/// Longest key, bytes.
const MAX_KEY_BYTES: usize = 1024;
/// Most keys in the answer to a range.
const MAX_RANGE: u32 = 1000;
/// … and most bytes.
const MAX_RANGE_BYTES: usize = 4 * 1024 * 1024;

type Answer<T> = Result<Response<T>, Status>;

/// What tonic serves.
pub(crate) struct Service {
    core: Shared,
}

impl Service {
    pub(crate) fn new(core: Shared) -> Self {
        Service { core }
    }

    fn count(&self, method: &str) {
        self.core.metrics.requests.with_label_values(&[method]).inc();
    }

    /// Counts what is refused for what a call is about.
    fn allowed<T>(&self, checked: Result<T, Status>) -> Result<T, Status> {
        checked.inspect_err(|status| {
            if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) {
                access::note(&self.core.metrics, status);
            }
        })
    }
}

fn check_key(key: &str, what: &str) -> Result<(), Status> {
    if key.is_empty() {
        return Err(Status::invalid_argument(format!("{what} is empty")));
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(Status::invalid_argument(format!("{what} is longer than {MAX_KEY_BYTES} bytes")));
    }
    Ok(())
}

/// A key that a client wants to write.
fn check_own(key: &str, prefix: bool) -> Result<(), Status> {
    let touches = key.starts_with(keys::OWN) || (prefix && keys::OWN.starts_with(key));
    if touches {
        let text =
            format!("{key:?} is the keeper's own: use the calls for configuration, instances and commands");
        return Err(Status::permission_denied(text));
    }
    Ok(())
}

/// Where a call comes from, for the history. Whoever is asked writes by itself, so this is always the caller, also where
/// another keeper leads.
fn peer<T>(request: &Request<T>) -> String {
    request.remote_addr().map(|address| address.to_string()).unwrap_or_default()
}

impl Core {
    async fn range(&self, request: v1::RangeRequest) -> Result<v1::RangeResponse, Status> {
        if !request.prefix {
            check_key(&request.key, "key")?;
        }
        self.node.linearize().await?;
        let state = self.node.state();
        let mut answer = v1::RangeResponse { revision: state.revision(), ..Default::default() };
        if !request.prefix {
            answer.items.extend(state.get(&request.key).map(|item| item.to_proto(&request.key)));
            return Ok(answer);
        }
        let limit = if request.limit == 0 { MAX_RANGE } else { request.limit.min(MAX_RANGE) } as usize;
        let after = (!request.after.is_empty()).then_some(request.after.as_str());
        let mut bytes = 0;
        for (key, item) in state.prefix_after(&request.key, after) {
            if answer.items.len() >= limit || bytes >= MAX_RANGE_BYTES {
                answer.more = true;
                break;
            }
            bytes += key.len() + item.value.len();
            answer.items.push(item.to_proto(key));
        }
        Ok(answer)
    }

    async fn txn(&self, request: v1::TxnRequest) -> Result<v1::TxnResponse, Status> {
        let most = self.limits.transaction_ops;
        if request.compare.len() > most || request.then.len() > most || request.otherwise.len() > most {
            return Err(Status::invalid_argument(format!(
                "more than {most} operations or compares in a transaction"
            )));
        }
        let bytes = request.encoded_len();
        if bytes > self.limits.request_bytes {
            let text = format!(
                "the transaction has {bytes} bytes, at most {} are allowed",
                self.limits.request_bytes
            );
            return Err(Status::invalid_argument(text));
        }
        for compare in &request.compare {
            if compare.target.is_none() {
                return Err(Status::invalid_argument(format!(
                    "the compare of {:?} has no target",
                    compare.key
                )));
            }
        }
        let mut puts = false;
        for op in request.then.iter().chain(&request.otherwise) {
            match &op.op {
                Some(Op::Put(put)) => {
                    check_key(&put.key, "the key of a put")?;
                    check_own(&put.key, false)?;
                    puts = true;
                }
                Some(Op::Delete(key)) => {
                    check_key(key, "the key of a delete")?;
                    check_own(key, false)?;
                }
                Some(Op::DeletePrefix(prefix)) => {
                    check_key(prefix, "the prefix of a delete")?;
                    check_own(prefix, true)?;
                }
                Some(Op::GrantLease(_) | Op::RevokeLeases(_)) => {
                    return Err(Status::invalid_argument("leases have calls of their own"));
                }
                None => return Err(Status::invalid_argument("an operation is empty")),
            }
        }
        if puts {
            self.check_quota(bytes)?;
        }
        let applied = self.node.propose(v1::KeeperEntry { txn: Some(request) }).await?;
        match applied {
            v1::KeeperApplied { missing_lease: 0, txn } => Ok(txn.unwrap_or_default()),
            v1::KeeperApplied { missing_lease, .. } => Err(crate::core::lease_gone(missing_lease)),
        }
    }

    fn status(&self) -> v1::KeeperStatusResponse {
        let (progress, measures) = (self.node.progress(), self.node.measures());
        // Before the state, which must not be held up by the disk.
        let log_bytes = self.node.log_bytes();
        let state = self.node.state();
        v1::KeeperStatusResponse {
            cluster_id: self.cluster_id(),
            node_id: self.node.id(),
            leader_id: progress.leader.unwrap_or(0),
            term: progress.term,
            last_log_index: progress.last_log,
            applied_index: progress.applied,
            snapshot_index: progress.snapshot,
            committed_index: progress.committed,
            revision: state.revision(),
            compacted_revision: state.compacted(),
            keys: state.len() as u64,
            bytes: state.bytes() as u64,
            quota_bytes: self.limits.quota_bytes as u64,
            leases: state.lease_count() as u64,
            watches: u64::try_from(self.metrics.watches.get()).unwrap_or(0),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            in_touch: self.node.in_touch(),
            log_bytes,
            snapshot_bytes: self.node.snapshot_bytes(),
            proposals_pending: measures.pending(),
            fsyncs: measures.fsyncs.get_sample_count(),
            fsync_us: (measures.fsyncs.get_sample_sum() * 1e6) as u64,
            leaders_seen: measures.leaders_seen.get(),
            leases_expired: self.metrics.leases_expired.get(),
            protection: self.protection.to_proto().into(),
        }
    }
}

#[tonic::async_trait]
impl Keeper for Service {
    type WatchStream = watching::Messages;
    type SaveSnapshotStream = ReceiverStream<Result<v1::SaveSnapshotResponse, Status>>;

    async fn range(&self, request: Request<v1::RangeRequest>) -> Answer<v1::RangeResponse> {
        self.count("range");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        self.allowed(caller.check_keys(&request.key, request.prefix))?;
        self.core.range(request).await.map(Response::new)
    }

    async fn txn(&self, request: Request<v1::TxnRequest>) -> Answer<v1::TxnResponse> {
        self.count("txn");
        self.core.txn(request.into_inner()).await.map(Response::new)
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        self.count("watch");
        let caller = Caller::of(&request);
        let who = caller.counted_as(request.remote_addr());
        let request = request.into_inner();
        for prefix in &request.prefixes {
            self.allowed(caller.check_keys(prefix, true))?;
        }
        watching::start(&self.core, request, &who).await.map(Response::new)
    }

    async fn lease_grant(&self, request: Request<v1::LeaseGrantRequest>) -> Answer<v1::LeaseGrantResponse> {
        self.count("lease_grant");
        self.core.grant_lease(request.into_inner().ttl_ms).await.map(Response::new)
    }

    async fn lease_keep_alive(
        &self,
        request: Request<v1::LeaseKeepAliveRequest>,
    ) -> Answer<v1::LeaseKeepAliveResponse> {
        self.count("lease_keep_alive");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        self.allowed(self.core.check_lease(&caller, request.lease).await)?;
        self.core.keep_alive(request).await.map(Response::new)
    }

    async fn lease_revoke(
        &self,
        request: Request<v1::LeaseRevokeRequest>,
    ) -> Answer<v1::LeaseRevokeResponse> {
        self.count("lease_revoke");
        let caller = Caller::of(&request);
        let lease = request.into_inner().lease;
        self.allowed(self.core.check_lease(&caller, lease).await)?;
        self.core.revoke_lease(lease).await?;
        Ok(Response::new(v1::LeaseRevokeResponse {}))
    }

    async fn publish_config(
        &self,
        request: Request<v1::PublishConfigRequest>,
    ) -> Answer<v1::PublishConfigResponse> {
        self.count("publish_config");
        let (caller, peer) = (Caller::of(&request), peer(&request));
        let mut request = request.into_inner();
        self.allowed(caller.check_document(&request.document))?;
        request.author = caller.author(request.author);
        let mut answer = self.core.publish_config(request, &peer).await?;
        // Whoever changes a field is not to have the keys of an app in the terminal.
        if let Some(v1::publish_config_response::Outcome::Accepted(revision)) = &mut answer.outcome {
            self.core.hide_secrets(revision);
        }
        Ok(Response::new(answer))
    }

    async fn release_config(
        &self,
        request: Request<v1::ReleaseConfigRequest>,
    ) -> Answer<v1::ReleaseConfigResponse> {
        self.count("release_config");
        let (caller, peer) = (Caller::of(&request), peer(&request));
        let mut request = request.into_inner();
        self.allowed(caller.check_document(&request.document))?;
        request.author = caller.author(request.author);
        let mut answer = self.core.release_config(request, &peer).await?;
        if let Some(v1::release_config_response::Outcome::Done(revision)) = &mut answer.outcome {
            self.core.hide_secrets(revision);
        }
        Ok(Response::new(answer))
    }

    async fn diff_config(&self, request: Request<v1::DiffConfigRequest>) -> Answer<v1::DiffConfigResponse> {
        self.count("diff_config");
        self.core.diff_config(request.into_inner()).await.map(Response::new)
    }

    async fn explain_config(
        &self,
        request: Request<v1::ExplainConfigRequest>,
    ) -> Answer<v1::ExplainConfigResponse> {
        self.count("explain_config");
        self.core.explain_config(request.into_inner()).await.map(Response::new)
    }

    async fn get_config(&self, request: Request<v1::GetConfigRequest>) -> Answer<v1::GetConfigResponse> {
        self.count("get_config");
        let caller = Caller::of(&request);
        let mut answer = self.core.get_config(request.into_inner()).await?;
        if let Some(revision) = answer.revision.as_mut().filter(|_| !caller.sees_secrets()) {
            self.core.hide_json_secrets(&revision.document, &mut answer.effective_json);
            self.core.hide_secrets(revision);
            let candidate = answer.release.as_mut().and_then(|release| release.candidate.as_mut());
            candidate.into_iter().for_each(|revision| self.core.hide_secrets(revision));
        }
        Ok(Response::new(answer))
    }

    async fn list_config(&self, request: Request<v1::ListConfigRequest>) -> Answer<v1::ListConfigResponse> {
        self.count("list_config");
        let caller = Caller::of(&request);
        let mut answer = self.core.list_config(&request.into_inner().kind).await?;
        if !caller.sees_secrets() {
            let candidates = answer.releases.iter_mut().filter_map(|release| release.candidate.as_mut());
            answer.documents.iter_mut().chain(candidates).for_each(|one| self.core.hide_secrets(one));
        }
        Ok(Response::new(answer))
    }

    async fn config_history(
        &self,
        request: Request<v1::ConfigHistoryRequest>,
    ) -> Answer<v1::ConfigHistoryResponse> {
        self.count("config_history");
        self.core.config_history(request.into_inner()).await.map(Response::new)
    }

    async fn config_kinds(
        &self,
        _request: Request<v1::ConfigKindsRequest>,
    ) -> Answer<v1::ConfigKindsResponse> {
        self.count("config_kinds");
        Ok(Response::new(self.core.config_kinds()))
    }

    async fn config_status(
        &self,
        request: Request<v1::ConfigStatusRequest>,
    ) -> Answer<v1::ConfigStatusResponse> {
        self.count("config_status");
        self.core.config_status(&request.into_inner().document).await.map(Response::new)
    }

    async fn report_config(
        &self,
        request: Request<v1::ReportConfigRequest>,
    ) -> Answer<v1::ReportConfigResponse> {
        self.count("report_config");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        let own = self.allowed(self.core.check_lease(&caller, request.lease).await)?;
        let other = request.applied.iter().find(|one| own.as_ref().is_some_and(|own| one.instance != *own));
        if let Some(other) = other {
            let text =
                format!("{caller} may not report for {}: the lease is another instance's", other.instance);
            return self.allowed(Err(Status::permission_denied(text)));
        }
        self.core.report_config(request).await?;
        Ok(Response::new(v1::ReportConfigResponse {}))
    }

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Answer<v1::RegisterResponse> {
        self.count("register");
        let caller = Caller::of(&request);
        self.allowed(self.core.register(&caller, request.into_inner()).await).map(Response::new)
    }

    async fn list_instances(
        &self,
        _request: Request<v1::ListInstancesRequest>,
    ) -> Answer<v1::ListInstancesResponse> {
        self.count("list_instances");
        self.core.list_instances().await.map(Response::new)
    }

    async fn yield_slots(&self, request: Request<v1::YieldSlotsRequest>) -> Answer<v1::YieldSlotsResponse> {
        self.count("yield_slots");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        self.allowed(self.core.check_registered(&caller, &request.instance).await)?;
        self.core.yield_slots(request).await.map(Response::new)
    }

    async fn claim_saver(&self, request: Request<v1::ClaimSaverRequest>) -> Answer<v1::ClaimSaverResponse> {
        self.count("claim_saver");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        // Whose instance it is to be: a hub's, and its own if the certificate says which.
        let saver = v1::InstanceRecord {
            id: request.instance.clone(),
            roles: vec![SAVER_ROLE.to_owned()],
            ..Default::default()
        };
        self.allowed(caller.check_instance(&saver))?;
        self.core.claim_saver(request).await.map(Response::new)
    }

    async fn send_command(
        &self,
        request: Request<v1::SendCommandRequest>,
    ) -> Answer<v1::SendCommandResponse> {
        self.count("send_command");
        let command = self.core.send_command(request.into_inner()).await?;
        Ok(Response::new(v1::SendCommandResponse { command: Some(command) }))
    }

    async fn answer_command(
        &self,
        request: Request<v1::AnswerCommandRequest>,
    ) -> Answer<v1::AnswerCommandResponse> {
        self.count("answer_command");
        let caller = Caller::of(&request);
        let request = request.into_inner();
        self.allowed(self.core.check_registered(&caller, &request.instance).await)?;
        self.core.answer_command(request).await?;
        Ok(Response::new(v1::AnswerCommandResponse {}))
    }

    async fn keeper_status(
        &self,
        _request: Request<v1::KeeperStatusRequest>,
    ) -> Answer<v1::KeeperStatusResponse> {
        self.count("keeper_status");
        Ok(Response::new(self.core.status()))
    }

    async fn member_list(&self, _request: Request<v1::MemberListRequest>) -> Answer<v1::MemberListResponse> {
        self.count("member_list");
        self.core.member_list().await.map(Response::new)
    }

    async fn member_add(&self, request: Request<v1::MemberAddRequest>) -> Answer<v1::MemberAddResponse> {
        self.count("member_add");
        let node_id = self.core.take_in(request.into_inner().address, 0).await?;
        Ok(Response::new(v1::MemberAddResponse { node_id }))
    }

    async fn member_remove(
        &self,
        request: Request<v1::MemberRemoveRequest>,
    ) -> Answer<v1::MemberRemoveResponse> {
        self.count("member_remove");
        self.core.take_out(request.into_inner().node_id).await?;
        Ok(Response::new(v1::MemberRemoveResponse {}))
    }

    async fn leadership_transfer(
        &self,
        request: Request<v1::LeadershipTransferRequest>,
    ) -> Answer<v1::LeadershipTransferResponse> {
        self.count("leadership_transfer");
        let node_id = self.core.hand_over(request.into_inner().node_id).await?;
        Ok(Response::new(v1::LeadershipTransferResponse { node_id }))
    }

    async fn save_snapshot(
        &self,
        _request: Request<v1::SaveSnapshotRequest>,
    ) -> Answer<Self::SaveSnapshotStream> {
        self.count("save_snapshot");
        self.core.save_snapshot().await.map(Response::new)
    }
}
