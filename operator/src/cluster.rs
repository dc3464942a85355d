//! PushCluster: from the resource to what runs.
//!
//! One pass looks at what is there, does what is to be done next, and says in the status what it has found; nothing is
//! remembered between passes, so that an operator that is killed anywhere goes on where it was. What belongs to a cluster goes
//! with it by owner references: there is no finalizer that could be in the way. Volumes stay.

mod applying;
pub mod certificates;
mod configuration;
mod hub;
mod keeper;
mod membership;
pub mod names;
mod pass;
mod pods;
mod quantity;
mod services;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use carillon_operator_api::{GROUP, PushCluster};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::json;

use self::applying::{ApplyError, Objects};
use self::certificates::CertificatesError;
use self::names::Names;
use self::pass::Pass;
pub use self::pods::Image;
use crate::controller::{self, MADE_HERE};
use crate::error::ReconcileError;
use crate::keeper::Keepers;
use crate::{Context, FIELD_MANAGER};

pub const KIND: &str = "PushCluster";

/// While something moves it is looked at again after this …
const SOON: Duration = Duration::from_secs(5);
/// … and otherwise after this: also what others have changed at the keeper is seen then.
const SELDOM: Duration = Duration::from_secs(60);

/// Why a pass has not come to its end. What there is to say is in the status, too.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("the PushCluster has no namespace or no uid: it is not from an API server")]
    NotStored,
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Certificates(#[from] CertificatesError),
    #[error("the status cannot be written: {0}")]
    Status(Box<kube::Error>),
}

impl ClusterError {
    /// For conditions and Events.
    pub fn reason(&self) -> &'static str {
        match self {
            ClusterError::Apply(ApplyError::Foreign { .. })
            | ClusterError::Certificates(CertificatesError::Apply(ApplyError::Foreign { .. })) => "NameTaken",
            ClusterError::Certificates(CertificatesError::Authority(_)) => "CertificatesFailed",
            _ => "ApplyFailed",
        }
    }
}

/// Something that was done, for people to read as an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// One word in CamelCase.
    pub reason: &'static str,
    pub message: String,
}

/// What has become of a pass.
#[derive(Debug, Default)]
pub struct Outcome {
    /// When to look again, if nothing happens before.
    pub again_in: Duration,
    pub notes: Vec<Note>,
    /// Objects that were written or deleted, and the status if it was: 0 when all was as it should be.
    pub writes: usize,
}

/// What a pass needs besides the resource.
pub struct Clusters<'a> {
    pub client: &'a Client,
    /// Of clusters that do not say.
    pub image: Image,
    pub keepers: &'a Keepers,
    pub clock: fn() -> Timestamp,
}

/// Keeps all clusters as their resources say.
pub async fn run(context: Arc<Context>) {
    let clusters = controller::of::<PushCluster>(context.all());
    // Of what is made nothing is kept in memory: what changes says only whose it is.
    let made = || controller::watching().labels(MADE_HERE);
    let sets = controller::followed(context.all::<PartialObjectMeta<StatefulSet>>(), made());
    let maps = controller::followed(context.all::<PartialObjectMeta<ConfigMap>>(), made());
    let secrets = controller::followed(context.all::<PartialObjectMeta<Secret>>(), made());
    let services = controller::followed(context.all::<PartialObjectMeta<Service>>(), made());
    let clusters = clusters
        .watches_stream(sets, |set| owner(&set))
        .watches_stream(maps, |map| owner(&map))
        .watches_stream(secrets, |secret| owner(&secret))
        .watches_stream(services, |service| owner(&service));
    controller::run(KIND, clusters, context, reconcile).await;
}

/// The cluster that something was made for.
fn owner<K>(made: &K) -> Option<ObjectRef<PushCluster>>
where
    K: kube::Resource,
{
    let owners = made.meta().owner_references.iter().flatten();
    let mut clusters = owners.filter(|owner| owner.kind == KIND && owner.api_version.starts_with(GROUP));
    let cluster = clusters.next()?;
    Some(ObjectRef::new(&cluster.name).within(made.meta().namespace.as_deref()?))
}

async fn reconcile(cluster: Arc<PushCluster>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let clusters = Clusters {
        client: &context.client,
        image: Image { name: context.image.clone(), pull_policy: None },
        keepers: &context.keepers,
        clock: Timestamp::now,
    };
    let outcome = clusters.reconcile(&cluster).await;
    for note in outcome.iter().flat_map(|outcome| &outcome.notes) {
        context.events.normal(&*cluster, note.reason, "Reconcile", &note.message).await;
    }
    match outcome {
        Ok(outcome) => Ok(Action::requeue(outcome.again_in)),
        Err(error) => {
            context.events.warning(&*cluster, error.reason(), "Reconcile", &error.to_string()).await;
            Err(error.into())
        }
    }
}

impl From<ClusterError> for ReconcileError {
    fn from(error: ClusterError) -> Self {
        ReconcileError::Cluster(Box::new(error))
    }
}

impl Clusters<'_> {
    /// One pass over a PushCluster.
    pub async fn reconcile(&self, cluster: &PushCluster) -> Result<Outcome, ClusterError> {
        let (Some(namespace), Some(owner)) = (cluster.namespace(), cluster.controller_owner_ref(&())) else {
            return Err(ClusterError::NotStored);
        };
        let names = Names::new(&namespace, &cluster.name_any());
        if cluster.metadata.deletion_timestamp.is_some() {
            self.keepers.forget(&names.namespace, &names.cluster);
            return Ok(Outcome { again_in: SELDOM, ..Default::default() });
        }
        let now = (self.clock)();
        let objects = Objects::new(self.client.clone(), &namespace, owner);
        let mut pass = Pass::new(self, cluster, &names, &objects, now);
        let passed = Box::pin(pass.run()).await;
        if let Err(error) = &passed {
            pass.facts.failure = Some((error.reason(), error.to_string()));
        }
        let Pass { facts, notes, .. } = pass;

        let before = cluster.status.clone().unwrap_or_default();
        let status = status::status(&facts, &before, cluster.metadata.generation, now);
        if Some(&status) != cluster.status.as_ref() {
            let clusters: Api<PushCluster> = Api::namespaced(self.client.clone(), &namespace);
            let wanted = json!({
                "apiVersion": PushCluster::api_version(&()),
                "kind": PushCluster::kind(&()),
                "metadata": {"name": names.cluster},
                "status": status,
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            match clusters.patch_status(&names.cluster, &params, &Patch::Apply(&wanted)).await {
                Ok(_) => objects.wrote(),
                // It was deleted meanwhile.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(ClusterError::Status(Box::new(error))),
            }
        }
        passed?;
        let again_in = if facts.is_moving() { SOON } else { SELDOM };
        Ok(Outcome { again_in, notes, writes: objects.writes() })
    }
}
