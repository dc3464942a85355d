//! `PushCluster`: a keeper, hubs, their store, certificates and configuration. Gateways belong to one by name.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::LocalObjectReference;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pod::{ImagePullPolicy, PodTemplate, SecretKey, Storage};

/// A cluster of Carillon: keeper and hubs, what they keep, how they trust each other, and how they are configured.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "carillon.dev",
    version = "v1alpha1",
    kind = "PushCluster",
    plural = "pushclusters",
    namespaced,
    status = "PushClusterStatus",
    shortname = "pcl",
    category = "carillon",
    derive = "PartialEq",
    doc = "A cluster of Carillon: keeper and hubs, what they keep, how they trust each other, and how they are configured.",
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("the name begins those of services: at most 40 lower-case letters, digits and '-', a letter first"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Keepers", type_ = "integer", json_path = ".status.keeper.readyReplicas", description = "Keepers that are ready"),
    printcolumn(name = "Hubs", type_ = "integer", json_path = ".status.hub.readyReplicas", description = "Hubs that are ready"),
    printcolumn(name = "Message", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].message"#, priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.hub) || !has(self.hub.replicas) || self.hub.replicas == 1 || (has(self.store) && !has(self.store.embedded))").message("more than one hub needs an external store (store.redis and store.sql): the embedded one is on one hub's disk").field_path(".hub.replicas"))]
pub struct PushClusterSpec {
    /// The image of everything in the cluster. Default: the operator's own, so that they are of one version.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub image: Option<String>,
    /// When the image is pulled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,
    /// Secrets with credentials for the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// The Raft service that holds configuration and knows who is there.
    #[serde(default)]
    pub keeper: KeeperSpec,
    /// The processes that host registry, center, saver, coordinator and dispatcher.
    #[serde(default)]
    pub hub: HubSpec,
    /// Where messages are kept. Default: embedded, on the hub's volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreSpec>,
    /// Who signs the certificates by which the processes know each other. Default: managed, by the operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ClusterTlsSpec>,
    /// Name of the app whose topics are used without its name by devices that know nothing of apps. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub root_app: Option<String>,
    /// The cluster's documents by kind, `gateway` and `hub`, as `carillon config schema` tells them. The keeper checks them:
    /// condition ConfigAccepted says what it refuses, and where.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[x_kube(validation = Rule::new("self.all(kind, kind != 'app')").message("apps are not configured here: make an App resource for each"))]
    #[x_kube(validation = Rule::new("self.all(kind, kind != 'revoked')").message("revoked users are not configured here: use `carillon revoke`"))]
    #[schemars(schema_with = "crate::schema::documents")]
    pub config: BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
    /// How backends reach the API.
    #[serde(default)]
    pub api: ApiSpec,
}

/// The keeper's nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeeperSpec {
    /// How many there are: 1 (for trying), 3, or 5. Members are taken in and out one by one.
    #[serde(default = "three")]
    #[x_kube(validation = Rule::new("self in [1, 3, 5]").message("must be 1, 3 or 5: an even number survives no more losses than the odd one below it"))]
    pub replicas: i32,
    /// The volume of each.
    #[serde(default = "one_gibibyte")]
    pub storage: Storage,
    #[serde(flatten)]
    pub pod: PodTemplate,
}

fn three() -> i32 {
    3
}

fn one() -> i32 {
    1
}

fn one_gibibyte() -> Storage {
    Storage { size: Quantity("1Gi".to_owned()), storage_class_name: None }
}

fn ten_gibibytes() -> Storage {
    Storage { size: Quantity("10Gi".to_owned()), storage_class_name: None }
}

impl Default for KeeperSpec {
    fn default() -> Self {
        KeeperSpec { replicas: three(), storage: one_gibibyte(), pod: PodTemplate::default() }
    }
}

/// The hubs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HubSpec {
    /// How many there are; one while the store is embedded.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub replicas: i32,
    /// The volume with the embedded store.
    #[serde(default = "ten_gibibytes")]
    pub storage: Storage,
    #[serde(flatten)]
    pub pod: PodTemplate,
}

impl Default for HubSpec {
    fn default() -> Self {
        HubSpec { replicas: one(), storage: ten_gibibytes(), pod: PodTemplate::default() }
    }
}

/// Where messages are kept: embedded, or Redis in front of SQL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.embedded) != (has(self.redis) || has(self.sql))").message("give exactly one kind of store: embedded, or redis together with sql"))]
#[x_kube(validation = Rule::new("has(self.redis) == has(self.sql)").message("redis and sql are one store, used together: give both, or embedded instead"))]
pub struct StoreSpec {
    /// On the hub's own volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedded: Option<EmbeddedStore>,
    /// Redis or Valkey, in front of `sql`. Not supported yet: condition Available tells so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<ExternalStore>,
    /// PostgreSQL, MySQL or MariaDB, behind `redis`. Not supported yet: condition Available tells so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sql: Option<ExternalStore>,
}

/// It has nothing to be set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EmbeddedStore {}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExternalStore {
    /// Its URL, with user and password.
    pub url_secret: SecretKey,
}

/// Who signs the cluster's certificates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.managed) != has(self.certManager)").message("give exactly one of managed and certManager"))]
pub struct ClusterTlsSpec {
    /// The operator makes an authority for this cluster, keeps it in a Secret, and renews what it signs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedTls>,
    /// cert-manager's Certificates, of an issuer that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_manager: Option<CertManagerTls>,
}

/// It has nothing to be set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManagedTls {}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CertManagerTls {
    /// The issuer. It must be an authority of its own: whoever has a certificate of it may speak with the keeper.
    pub issuer_ref: IssuerRef,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuerRef {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// `Issuer` or `ClusterIssuer`, or another kind of an external issuer's group.
    #[serde(default = "issuer")]
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    #[serde(default = "cert_manager_group")]
    #[schemars(length(min = 1, max = 253))]
    pub group: String,
}

fn issuer() -> String {
    "Issuer".to_owned()
}

fn cert_manager_group() -> String {
    "cert-manager.io".to_owned()
}

/// The Service of the API for backends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiSpec {
    /// The Service's type.
    #[serde(default, rename = "type")]
    pub service_type: ServiceType,
    /// Annotations of the Service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub annotations: BTreeMap<String, String>,
}

/// A Service's type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
}

impl ServiceType {
    pub fn as_str(self) -> &'static str {
        match self {
            ServiceType::ClusterIP => "ClusterIP",
            ServiceType::NodePort => "NodePort",
            ServiceType::LoadBalancer => "LoadBalancer",
        }
    }
}

/// How the cluster is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PushClusterStatus {
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready sums up; Available, Progressing, Degraded, ConfigAccepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    #[serde(default)]
    pub keeper: KeeperStatus,
    #[serde(default)]
    pub hub: HubStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeeperStatus {
    /// Keepers that are ready.
    #[serde(default)]
    pub ready_replicas: i32,
    /// The keeper's nodes as its leader knows them, by id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["node".into()]))]
    pub members: Vec<KeeperMember>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeeperMember {
    /// Its id, 16 hexadecimal digits.
    pub node: String,
    /// host:port
    pub address: String,
    /// It has a vote; a learner has none yet.
    pub voter: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HubStatus {
    /// Hubs that are ready.
    #[serde(default)]
    pub ready_replicas: i32,
}
