//! One pass over a PushCluster: in which order what is made, and what the keeper is told.

use std::time::Duration;

use carillon_agent::admin::{Admin, AdminError, parse_node};
use carillon_operator_api::PushCluster;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use serde_json::json;

use super::applying::{ApplyError, Objects, contained, failed};
use super::certificates::{self, Certificates};
use super::configuration;
use super::membership::{self, Step, heir_for_update, members};
use super::names::{Names, Part};
use super::status::{Facts, Workload};
use super::{ClusterError, Clusters, Note, hub, keeper, quantity, services};
use crate::FIELD_MANAGER;

/// The keeper is asked for no longer than this.
const ASK_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) struct Pass<'a> {
    clusters: &'a Clusters<'a>,
    cluster: &'a PushCluster,
    names: &'a Names,
    objects: &'a Objects,
    now: Timestamp,
    pub(super) facts: Facts,
    pub(super) notes: Vec<Note>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        clusters: &'a Clusters<'a>,
        cluster: &'a PushCluster,
        names: &'a Names,
        objects: &'a Objects,
        now: Timestamp,
    ) -> Self {
        let wanted = u32::try_from(cluster.spec.keeper.replicas).unwrap_or(1).max(1);
        let facts = Facts { wanted, ..Default::default() };
        Pass { clusters, cluster, names, objects, now, facts, notes: Vec::new() }
    }

    pub(super) async fn run(&mut self) -> Result<(), ClusterError> {
        let (names, objects, spec) = (self.names, self.objects, &self.cluster.spec);
        let keepers: Option<StatefulSet> = objects.live(&names.part(Part::Keeper)).await?;
        let hubs: Option<StatefulSet> = objects.live(&names.part(Part::Hub)).await?;
        self.facts.keeper = keepers.as_ref().map(Workload::of);
        self.facts.hub = hubs.as_ref().map(Workload::of);
        if spec.store.as_ref().is_some_and(|store| store.redis.is_some() || store.sql.is_some()) {
            self.facts.external_store = true;
            return Ok(());
        }
        let certificates =
            certificates::ensure(objects, names, spec.tls.as_ref(), self.now.as_second()).await?;
        let has_certificates = certificates == Certificates::Ready;
        self.facts.certificates = Some(certificates);
        for service in services::services(names, &spec.api) {
            self.objects.apply(service).await?;
        }
        for part in [Part::Keeper, Part::Hub] {
            self.objects.apply(services::budget(names, part)).await?;
        }
        let places = self.places(keepers.as_ref()).await?;
        self.objects.apply(keeper::peers(names, places)).await?;
        // Pods could not start without; those that run go on.
        if !has_certificates && keepers.is_none() {
            return Ok(());
        }
        let admin = self.look(keepers.is_some()).await;
        let places = match &admin {
            Some(admin) => self.step(admin, places).await?,
            None => places,
        };
        Box::pin(self.keepers(admin.as_ref(), keepers, places)).await?;
        let mut wanted = hub::hubs(names, spec, &self.clusters.image);
        if let Some(live) = &hubs {
            keep_claims(&mut wanted, live);
        }
        self.facts.hub = Some(Workload::of(&objects.apply_over(wanted, hubs).await?));
        if let Some(admin) = &admin {
            self.configure(admin).await;
        }
        self.volumes(Part::Keeper, places).await?;
        self.volumes(Part::Hub, u32::MAX).await
    }

    /// How many keepers there are to be at present: as the ConfigMap of peers says, or the StatefulSet, whichever says more,
    /// so that neither a deletion nor a scale by hand makes a member's pod go.
    async fn places(&self, keepers: Option<&StatefulSet>) -> Result<u32, ApplyError> {
        let peers: Option<ConfigMap> = self.objects.live(&self.names.peers()).await?;
        let said = peers.and_then(|peers| keeper::places(self.names, &peers));
        let replicas = keepers.and_then(|set| set.spec.as_ref()?.replicas);
        let replicas = replicas.and_then(|replicas| u32::try_from(replicas).ok());
        Ok(said.max(replicas).map_or(self.facts.wanted, |places| places.max(1)))
    }

    /// Asks the keeper for its members. Gives the way to it, if it answers.
    async fn look(&mut self, is_there: bool) -> Option<Admin> {
        if !is_there {
            self.facts.unreachable = Some("it is being started".to_owned());
            return None;
        }
        let Names { namespace, cluster } = self.names;
        let admin = match self.clusters.keepers.of(self.clusters.client, namespace, cluster).await {
            Ok(admin) => admin,
            Err(error) => {
                self.facts.unreachable = Some(error.to_string());
                return None;
            }
        };
        match tokio::time::timeout(ASK_TIMEOUT, admin.members()).await {
            Ok(Ok(said)) => self.facts.members = members(self.names, &said),
            Ok(Err(error)) => {
                self.facts.unreachable = Some(error.to_string());
                return None;
            }
            Err(_) => {
                self.facts.unreachable =
                    Some(format!("the keeper does not answer within {} s", ASK_TIMEOUT.as_secs()));
                return None;
            }
        }
        Some(admin)
    }

    /// The next step of the keeper's members. Returns how many places there are to be then.
    async fn step(&mut self, admin: &Admin, places: u32) -> Result<u32, ApplyError> {
        let step = membership::next(self.facts.wanted, places, self.facts.members.as_deref());
        self.facts.step = Some(step.clone());
        let done = match &step {
            Step::Steady | Step::Wait(_) => return Ok(places),
            Step::Places(to) => {
                // Written down before it is so.
                self.objects.apply(keeper::peers(self.names, *to)).await?;
                self.note("KeepersScaled", format!("from {places} to {to} keepers"));
                return Ok(*to);
            }
            Step::HandOver { to, from } => match parse_node(to) {
                Ok(node) => admin
                    .transfer_lead(Some(node))
                    .await
                    .map(|_| ("LeadHandedOver", format!("from keeper {from}, which is to go, to {to}"))),
                Err(error) => Err(AdminError::Other(error)),
            },
            Step::TakeOut { node, address } => match parse_node(node) {
                Ok(id) => admin
                    .remove_member(id)
                    .await
                    .map(|()| ("KeeperTakenOut", format!("{node} at {address} is no member any more"))),
                Err(error) => Err(AdminError::Other(error)),
            },
        };
        match done {
            Ok((reason, message)) => {
                self.objects.wrote();
                self.note(reason, message);
            }
            // What has become of it is seen at the next look.
            Err(error) => {
                tracing::warn!(cluster = self.names.cluster, ?step, %error, "a step of the keeper's members failed");
                self.facts.failure = Some(("MembersNotChanged", error.to_string()));
            }
        }
        Ok(places)
    }

    async fn keepers(
        &mut self,
        admin: Option<&Admin>,
        live: Option<StatefulSet>,
        places: u32,
    ) -> Result<(), ApplyError> {
        let mut wanted = keeper::keepers(self.names, &self.cluster.spec, &self.clusters.image, places);
        if let Some(live) = &live {
            keep_claims(&mut wanted, live);
            let heir = self.facts.members.as_deref().and_then(heir_for_update);
            if let (Some(admin), Some(heir)) = (admin, heir)
                && is_restart(&wanted, live)
                && let Ok(node) = parse_node(&heir.node)
                // Without it the lead moves a few times more, no harm is done.
                && let Err(error) = admin.transfer_lead(Some(node)).await
            {
                tracing::warn!(cluster = self.names.cluster, %error, "the lead is not handed over before the update");
            }
        }
        self.facts.keeper = Some(Workload::of(&self.objects.apply_over(wanted, live).await?));
        Ok(())
    }

    async fn configure(&mut self, admin: &Admin) {
        let comment = format!(
            "PushCluster {}/{}, generation {}",
            self.names.namespace,
            self.names.cluster,
            self.cluster.metadata.generation.unwrap_or(0)
        );
        let outcome = configuration::hand_over(admin, &self.cluster.spec, &comment).await;
        for (document, revision) in outcome.published {
            self.objects.wrote();
            self.note("ConfigPublished", format!("{document}, revision {revision}"));
        }
        self.facts.config = Some(outcome.accepted);
    }

    /// Lets volumes grow, and deletes those of places that are given up: what a former member holds is of no use.
    async fn volumes(&mut self, part: Part, places: u32) -> Result<(), ClusterError> {
        let selector = self.names.selector(part);
        let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let api = self.objects.api::<PersistentVolumeClaim>();
        let about = |name: &str, source| failed::<PersistentVolumeClaim>(name, source);
        let all = api.list(&ListParams::default().labels(&selector.join(","))).await;
        let all = all.map_err(|source| about(&selector.join(","), source))?;
        let size = match part {
            Part::Keeper => &self.cluster.spec.keeper.storage.size,
            Part::Hub => &self.cluster.spec.hub.storage.size,
        };
        for claim in all {
            let name = claim.name_any();
            let Some(place) = self.names.place_of_volume(part, &name) else { continue };
            if place >= places {
                if self.is_given_up(place).await? {
                    let uid = claim.metadata.uid.clone();
                    let params =
                        DeleteParams::default().preconditions(Preconditions { uid, resource_version: None });
                    match api.delete(&name, &params).await {
                        Ok(_) => {
                            self.objects.wrote();
                            self.note("VolumeDeleted", format!("{name}: its keeper is no member any more"));
                        }
                        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => {}
                        Err(source) => return Err(about(&name, source).into()),
                    }
                }
                continue;
            }
            let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
            let has = requests.and_then(|requests| quantity::value(&requests.get("storage")?.0));
            if has.zip(quantity::value(&size.0)).is_some_and(|(has, wanted)| has < wanted) {
                let patch = json!({"spec": {"resources": {"requests": {"storage": size}}}});
                let params =
                    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..Default::default() };
                match api.patch(&name, &params, &Patch::Merge(&patch)).await {
                    Ok(_) => self.objects.wrote(),
                    // Its storage class does not allow it; all else goes on.
                    Err(error) => self.facts.failure = Some(("VolumeNotGrown", format!("{name}: {error}"))),
                }
            }
        }
        Ok(())
    }

    /// Nobody is at this place of the keeper, is to be, or runs there: as far as everyone says who can.
    async fn is_given_up(&self, place: u32) -> Result<bool, ApplyError> {
        let Some(members) = &self.facts.members else { return Ok(false) };
        if self.facts.step != Some(Step::Steady) || members.iter().any(|member| member.place == Some(place)) {
            return Ok(false);
        }
        let name = self.names.pod(Part::Keeper, place);
        let pod = self.objects.api::<Pod>().get_metadata_opt(&name).await;
        Ok(pod.map_err(|source| failed::<Pod>(&name, source))?.is_none())
    }

    fn note(&mut self, reason: &'static str, message: String) {
        self.notes.push(Note { reason, message });
    }
}

/// What a StatefulSet says of its volumes cannot be changed: they grow one by one.
fn keep_claims(wanted: &mut StatefulSet, live: &StatefulSet) {
    let live = live.spec.iter().flat_map(|spec| spec.volume_claim_templates.iter().flatten());
    for live in live {
        let claims = wanted.spec.iter_mut().flat_map(|spec| spec.volume_claim_templates.iter_mut().flatten());
        for claim in claims.filter(|claim| claim.metadata.name == live.metadata.name) {
            if let (Some(spec), Some(live)) = (&mut claim.spec, &live.spec) {
                spec.resources = live.resources.clone();
                spec.storage_class_name = live.storage_class_name.clone();
            }
        }
    }
}

/// Will its pods be restarted?
fn is_restart(wanted: &StatefulSet, live: &StatefulSet) -> bool {
    let template = |set: &StatefulSet| serde_json::to_value(set.spec.as_ref().map(|spec| &spec.template));
    match (template(wanted), template(live)) {
        (Ok(wanted), Ok(live)) => !contained(&wanted, &live),
        _ => false,
    }
}
