//! The keeper for people and tools: read and change configuration, send commands, look around.
//!
//! [`Admin`] is a cheap handle that connects when it is first used, and tries one keeper after another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use parking_lot::Mutex;
use tonic::transport::Channel;

use crate::document::Violation;
use crate::keepers::Keepers;
use crate::tls::Tls;
use crate::{Instance, SlotMap, board};

mod calls;
mod configuration;
mod documents;
mod members;

use calls::{CALL_TIMEOUT, explain};
pub use configuration::{
    Difference, Explained, Explanation, Override, Published, Release, ReleaseAction, Source, Standing, State,
    Step,
};
pub use documents::{Applied, Change, ChangeOptions, Document, Kind, Revision};
pub use members::{KeeperStatus, Member, Protection, parse_node};

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
    /// The certificate shown does not allow it.
    #[error("the keeper does not allow it: {0}")]
    Denied(String),
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
        Admin::secured(keepers, None)
    }

    /// The same with certificates: `https://host:port` each.
    pub fn secured(keepers: Vec<String>, tls: Option<Arc<Tls>>) -> Self {
        Admin::sharing(Arc::new(Keepers::new(keepers, tls)))
    }

    /// What one learns of the members, all know.
    pub(crate) fn sharing(keepers: Arc<Keepers>) -> Self {
        Admin { inner: Arc::new(Inner { keepers, client: Mutex::new(None) }) }
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

    /// As a hub with a store of its own: says that this store is the cluster's saver. `take_over`: the store that is given up
    /// for it. [`AdminError::Invalid`] when another is; saying it twice does no harm.
    pub async fn claim_saver(
        &self,
        store: &str,
        instance: &str,
        take_over: Option<&str>,
    ) -> Result<(), AdminError> {
        let request = v1::ClaimSaverRequest {
            store: store.to_owned(),
            instance: instance.to_owned(),
            take_over: take_over.unwrap_or_default().to_owned(),
        };
        let claim = async |mut client: KeeperClient<Channel>, request| match client.claim_saver(request).await
        {
            // A keeper that is older than claims.
            Err(status) if status.code() == tonic::Code::Unimplemented => {
                Ok(tonic::Response::new(v1::ClaimSaverResponse {}))
            }
            answer => answer,
        };
        self.call(request, claim).await.map(drop)
    }

    /// As the owner of slots that are to go to others: hands these over, by slot and epoch. Returns how many have gone;
    /// saying it twice does no harm.
    pub async fn yield_slots(
        &self,
        instance: &str,
        incarnation: u64,
        slots: &[(u32, u64)],
    ) -> Result<u32, AdminError> {
        let slots = slots.iter().map(|&(slot, epoch)| v1::yield_slots_request::Slot { slot, epoch });
        let (instance, slots) = (instance.to_owned(), slots.collect());
        let request = v1::YieldSlotsRequest { instance, incarnation, slots };
        let answer =
            self.call(request, async |mut client, request| client.yield_slots(request).await).await?;
        Ok(answer.moved)
    }
}
