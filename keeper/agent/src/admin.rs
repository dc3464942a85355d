//! The keeper for people and tools: read and change configuration, send commands, look around.
//!
//! [`Admin`] is a cheap handle that connects when it is first used, and tries one keeper after another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::document::Violation;
use crate::keepers::Keepers;
use crate::target::Target;
use crate::{Instance, SlotMap, board, link};

mod configuration;

pub use configuration::{
    Difference, Explained, Explanation, Override, Published, Release, ReleaseAction, Source, Standing, State,
    Step,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// … and one that changes the keeper's members.
const SLOW_CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a call to the keeper came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nothing is listening, or no keeper has a leader. May be tried again.
    #[error("no keeper answers at {keepers}: {reason}")]
    Unreachable { keepers: String, reason: String },
    /// The document was not accepted.
    #[error("{document} is refused: {}", list(.violations))]
    Refused { document: String, violations: Vec<Violation> },
    /// Somebody else has changed the document since.
    #[error(
        "{document} is at revision {current} by now, not at {expected}: look at it again and repeat the change"
    )]
    Conflict { document: String, expected: u64, current: u64 },
    #[error("{0}")]
    NotFound(String),
    /// The call makes no sense as it is.
    #[error("{0}")]
    Invalid(String),
    /// The command was carried out and failed, or was not carried out in time.
    #[error("command {name} at {instance} {outcome}: {output}")]
    Command { name: String, instance: String, outcome: &'static str, output: String },
    /// The call may have been carried out, or may still be: look before it is repeated.
    #[error("whether it was done is not known ({0}): look before repeating it")]
    Uncertain(String),
    #[error("keeper: {0}")]
    Other(String),
}

fn list(violations: &[Violation]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// One revision of a document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Revision {
    pub document: String,
    /// 1, 2, 3 …; 0 = never published.
    pub revision: u64,
    pub yaml: String,
    pub author: String,
    /// Unix time, milliseconds.
    pub time_ms: u64,
    pub comment: String,
    /// The document was taken away at this revision.
    pub deleted: bool,
    /// Address it was published from, as the keeper saw it.
    pub peer: String,
    /// What is different for some processes.
    pub overrides: Vec<Override>,
    /// If it was released to some processes first: what was done with it.
    pub steps: Vec<Step>,
}

impl From<v1::ConfigRevision> for Revision {
    fn from(revision: v1::ConfigRevision) -> Self {
        Revision {
            document: revision.document,
            revision: revision.revision,
            yaml: revision.yaml,
            author: revision.author,
            time_ms: revision.time_ms,
            comment: revision.comment,
            deleted: revision.deleted,
            peer: revision.peer,
            overrides: revision.overrides.into_iter().map(Into::into).collect(),
            steps: revision.steps.into_iter().map(Into::into).collect(),
        }
    }
}

/// A document as it is published, and as it works.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Document {
    #[serde(flatten)]
    pub revision: Revision,
    /// With all defaults filled in; without overrides.
    pub effective: serde_json::Value,
    /// Of the current revision: what is being released to some processes.
    pub release: Option<Release>,
}

/// A kind of document.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Kind {
    pub kind: String,
    pub named: bool,
    pub schema: serde_json::Value,
}

/// What an instance has made of a document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Applied {
    pub instance: String,
    pub document: String,
    /// 0 = the defaults.
    pub applied_revision: u64,
    /// A later revision that it refused, and why.
    pub refused: Option<(u64, String)>,
    pub time_ms: u64,
}

impl From<v1::AppliedConfig> for Applied {
    fn from(applied: v1::AppliedConfig) -> Self {
        Applied {
            instance: applied.instance,
            document: applied.document,
            applied_revision: applied.applied_revision,
            refused: (!applied.refusal.is_empty()).then_some((applied.refused_revision, applied.refusal)),
            time_ms: applied.time_ms,
        }
    }
}

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
}

/// An instance, since when it is there, and how busy it is.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LiveInstance {
    #[serde(flatten)]
    pub instance: Instance,
    /// Unix time at which it registered, milliseconds.
    pub since_ms: u64,
    /// What it said last of its load; empty when it has said nothing to the keeper that leads now.
    pub load: BTreeMap<String, f64>,
    /// Milliseconds since then.
    pub load_age_ms: Option<u64>,
}

/// A node's id as people write it.
pub fn parse_node(text: &str) -> Result<u64, String> {
    match u64::from_str_radix(text, 16) {
        Ok(node) if node != 0 && text.len() <= 16 => Ok(node),
        _ => Err(format!("{text:?} is not the id of a keeper: up to 16 hexadecimal digits")),
    }
}

/// What is to be done with a document.
#[derive(Debug, Clone)]
pub enum Change {
    /// The whole document, YAML or JSON.
    Yaml(String),
    /// Some fields: path and YAML value; None takes the field out, so that its default holds.
    Sets(Vec<(String, Option<String>)>),
    /// Back to what it was at this revision, as a new revision.
    RollbackTo(u64),
    /// Takes the document away.
    Delete,
    /// Makes or changes an override: what is different for some processes.
    Override {
        name: String,
        /// Whom it is for; None: as it is.
        target: Option<Target>,
        /// Path and YAML value; a value of `null` brings the default back, None takes the field out of the override.
        sets: Vec<(String, Option<String>)>,
    },
    /// All fields of an override, YAML.
    OverrideYaml {
        name: String,
        target: Option<Target>,
        yaml: String,
    },
    RemoveOverride(String),
}

/// Who changes a document, and on what conditions.
#[derive(Debug, Clone, Default)]
pub struct ChangeOptions {
    pub author: String,
    pub comment: String,
    /// Refuse with [`AdminError::Conflict`] when the document has another revision.
    pub expected_revision: Option<u64>,
    /// Only check.
    pub dry_run: bool,
    /// To these processes only; [`Admin::release`] decides what becomes of it.
    pub release_to: Option<Target>,
}

/// A cheap handle.
#[derive(Clone)]
pub struct Admin {
    inner: Arc<Inner>,
}

struct Inner {
    keepers: Arc<Keepers>,
    client: Mutex<Option<KeeperClient<Channel>>>,
}

impl Admin {
    /// `keepers`: `http://host:port` each. Connects when first used.
    pub fn new(keepers: Vec<String>) -> Self {
        Admin::sharing(Arc::new(Keepers::new(keepers)))
    }

    /// What one learns of the members, all know.
    pub(crate) fn sharing(keepers: Arc<Keepers>) -> Self {
        Admin { inner: Arc::new(Inner { keepers, client: Mutex::new(None) }) }
    }

    /// The document as it is now, or as it was at a revision. One that was never published has revision 0 and its
    /// defaults; one of a named kind is then `NotFound`.
    pub async fn get(&self, document: &str, revision: Option<u64>) -> Result<Document, AdminError> {
        let request = v1::GetConfigRequest { document: document.to_owned(), revision: revision.unwrap_or(0) };
        let answer = self.call(request, async |mut client, request| client.get_config(request).await).await?;
        let effective = serde_json::from_str(&answer.effective_json)
            .map_err(|error| AdminError::Other(format!("its answer cannot be read: {error}")))?;
        let release = answer.release.map(Into::into);
        Ok(Document { revision: answer.revision.unwrap_or_default().into(), effective, release })
    }

    /// Changes a document; it is checked before it is accepted.
    pub async fn change(
        &self,
        document: &str,
        change: Change,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        Ok(self.publish_change(document, change, options).await?.revision)
    }

    /// Sets some fields of the current document: `[("limits.max_payload_bytes", Some("65536"))]`.
    pub async fn set(
        &self,
        document: &str,
        sets: Vec<(String, Option<String>)>,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::Sets(sets), options).await
    }

    /// Publishes a whole document.
    pub async fn publish(
        &self,
        document: &str,
        yaml: &str,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::Yaml(yaml.to_owned()), options).await
    }

    /// Makes a former revision the newest again.
    pub async fn rollback(
        &self,
        document: &str,
        to: u64,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::RollbackTo(to), options).await
    }

    /// All published documents, or those of a kind, by name.
    pub async fn list(&self, kind: Option<&str>) -> Result<Vec<Revision>, AdminError> {
        let request = v1::ListConfigRequest { kind: kind.unwrap_or_default().to_owned() };
        let answer =
            self.call(request, async |mut client, request| client.list_config(request).await).await?;
        Ok(answer.documents.into_iter().map(Into::into).collect())
    }

    /// A document's revisions, newest first.
    pub async fn history(&self, document: &str, limit: u32) -> Result<Vec<Revision>, AdminError> {
        let request = v1::ConfigHistoryRequest { document: document.to_owned(), limit };
        let answer =
            self.call(request, async |mut client, request| client.config_history(request).await).await?;
        Ok(answer.revisions.into_iter().map(Into::into).collect())
    }

    /// Which kinds of document there are.
    pub async fn kinds(&self) -> Result<Vec<Kind>, AdminError> {
        let request = v1::ConfigKindsRequest {};
        let answer =
            self.call(request, async |mut client, request| client.config_kinds(request).await).await?;
        let kind = |kind: v1::ConfigKind| Kind {
            kind: kind.kind,
            named: kind.named,
            schema: serde_json::from_str(&kind.schema_json).unwrap_or(serde_json::Value::Null),
        };
        Ok(answer.kinds.into_iter().map(kind).collect())
    }

    /// What each instance has applied of a document, or of all.
    pub async fn applied(&self, document: Option<&str>) -> Result<Vec<Applied>, AdminError> {
        let request = v1::ConfigStatusRequest { document: document.unwrap_or_default().to_owned() };
        let answer =
            self.call(request, async |mut client, request| client.config_status(request).await).await?;
        Ok(answer.applied.into_iter().map(Into::into).collect())
    }

    /// The live instances by id, with how busy they say they are.
    pub async fn live(&self) -> Result<Vec<LiveInstance>, AdminError> {
        let request = v1::ListInstancesRequest {};
        let answer =
            self.call(request, async |mut client, request| client.list_instances(request).await).await?;
        let mut loads: BTreeMap<String, v1::InstanceLoad> =
            answer.loads.into_iter().map(|load| (load.instance.clone(), load)).collect();
        let live = answer.instances.into_iter().map(|record| {
            let load = loads.remove(&record.id);
            LiveInstance {
                since_ms: record.registered_ms,
                load_age_ms: load.as_ref().map(|load| load.age_ms),
                load: load.map(|load| load.load.into_iter().collect()).unwrap_or_default(),
                instance: Instance::from_record(record),
            }
        });
        Ok(live.collect())
    }

    /// The live instances by id, and who owns which slot.
    pub async fn instances(&self) -> Result<(Vec<Instance>, SlotMap), AdminError> {
        let request = v1::ListInstancesRequest {};
        let answer =
            self.call(request, async |mut client, request| client.list_instances(request).await).await?;
        let instances = answer.instances.into_iter().map(Instance::from_record).collect();
        Ok((instances, board::slot_map(answer.slots_revision, answer.slots.unwrap_or_default())))
    }

    /// Has an instance do something, and waits for its answer, at most `within`.
    pub async fn command(
        &self,
        instance: &str,
        name: &str,
        arguments: BTreeMap<String, String>,
        within: Duration,
    ) -> Result<String, AdminError> {
        let request = v1::SendCommandRequest {
            instance: instance.to_owned(),
            name: name.to_owned(),
            arguments: arguments.into_iter().collect(),
            timeout_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
        };
        // A keeper that answers is found first: the command itself is sent once, because it may have arrived even when
        // no answer comes.
        self.status().await?;
        let client = self.inner.client.lock().clone();
        let Some(mut client) = client else {
            return Err(AdminError::Other("the connection was lost".to_owned()));
        };
        let answer = tokio::time::timeout(within + CALL_TIMEOUT, client.send_command(request)).await;
        let answer = answer.map_err(|_| AdminError::Other("the keeper did not answer in time".to_owned()))?;
        let command = answer.map_err(explain)?.into_inner().command.unwrap_or_default();
        let outcome = match command.state() {
            v1::CommandState::CommandDone => return Ok(command.output),
            v1::CommandState::CommandFailed => "failed",
            _ => "was not answered in time",
        };
        let (name, instance) = (name.to_owned(), instance.to_owned());
        Err(AdminError::Command { name, instance, outcome, output: command.output })
    }

    /// How the keeper itself is.
    pub async fn status(&self) -> Result<KeeperStatus, AdminError> {
        let request = v1::KeeperStatusRequest {};
        let s = self.call(request, async |mut client, request| client.keeper_status(request).await).await?;
        Ok(KeeperStatus {
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

    /// For what changes nothing: tries one keeper after another, whatever has become of the call at the last.
    async fn call<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(CALL_TIMEOUT, true, request, send).await
    }

    /// For what changes something: goes on to the next keeper only when the last one has certainly not done it.
    async fn write<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(CALL_TIMEOUT, false, request, send).await
    }

    /// The same, for what the keeper itself must wait for.
    async fn slow_write<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(SLOW_CALL_TIMEOUT, false, request, send).await
    }

    async fn call_within<Q: Clone, A>(
        &self,
        limit: Duration,
        repeatable: bool,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        let keepers = self.inner.keepers.all();
        let mut reason = "no keeper is configured".to_owned();
        let known = self.inner.client.lock().clone();
        let known = known.into_iter().map(Ok);
        for candidate in known.chain(keepers.iter().map(Err)) {
            let (client, fresh) = match candidate {
                Ok(client) => (client, false),
                Err(keeper) => match connect(keeper).await {
                    Ok(client) => (client, true),
                    Err(error) => {
                        reason = error;
                        continue;
                    }
                },
            };
            match tokio::time::timeout(limit, send(client.clone(), request.clone())).await {
                Ok(Ok(answer)) => {
                    if fresh {
                        tokio::spawn(learn(self.inner.keepers.clone(), client.clone()));
                    }
                    *self.inner.client.lock() = Some(client);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) if was_not_done(&status) => status.message().clone_into(&mut reason),
                Ok(Err(status)) if may_be_done(status.code()) => {
                    if !repeatable {
                        return Err(AdminError::Uncertain(status.message().to_owned()));
                    }
                    status.message().clone_into(&mut reason);
                }
                Ok(Err(status)) => return Err(explain(status)),
                Err(_) => {
                    reason = format!("no answer within {} s", limit.as_secs());
                    if !repeatable {
                        return Err(AdminError::Uncertain(reason));
                    }
                }
            }
        }
        *self.inner.client.lock() = None;
        Err(AdminError::Unreachable { keepers: keepers.join(", "), reason })
    }
}

/// Who the members are, for when this keeper is gone.
async fn learn(keepers: Arc<Keepers>, mut client: KeeperClient<Channel>) {
    let asked = client.member_list(v1::MemberListRequest {});
    if let Ok(Ok(list)) = tokio::time::timeout(CALL_TIMEOUT, asked).await {
        let members: Vec<String> =
            list.into_inner().members.into_iter().map(|member| member.address).collect();
        keepers.learn(&members);
    }
}

/// The keeper says that it has done nothing and that another may (`UNAVAILABLE`, from itself), or was not even reached.
fn was_not_done(status: &Status) -> bool {
    let Some(mut source) = std::error::Error::source(status) else {
        return status.code() == Code::Unavailable;
    };
    loop {
        if source.is::<tonic::ConnectError>() {
            return true;
        }
        match source.source() {
            Some(next) => source = next,
            None => return false,
        }
    }
}

/// The call got lost, or its outcome.
fn may_be_done(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled | Code::Internal
    )
}

async fn connect(keeper: &str) -> Result<KeeperClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(keeper.to_owned()).map_err(|error| error.to_string())?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    Ok(link::client(endpoint.connect().await.map_err(|error| link::describe(&error))?))
}

fn explain(status: Status) -> AdminError {
    let message = status.message().to_owned();
    match status.code() {
        Code::NotFound => AdminError::NotFound(message),
        Code::InvalidArgument | Code::FailedPrecondition | Code::ResourceExhausted => {
            AdminError::Invalid(message)
        }
        _ => AdminError::Other(message),
    }
}
