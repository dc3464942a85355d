//! `Profile`: a profile of running processes, taken once.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A profile of running processes, taken once; the result is a ConfigMap with pprof and flame graph.
#[derive(CustomResource, Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "carillon.dev",
    version = "v1alpha1",
    kind = "Profile",
    plural = "profiles",
    namespaced,
    status = "ProfileStatus",
    shortname = "cprof",
    category = "carillon",
    derive = "PartialEq",
    selectable = ".spec.cluster",
    doc = "A profile of running processes, taken once; the result is a ConfigMap with pprof and flame graph.",
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Kind", type_ = "string", json_path = ".spec.kind"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#
    ),
    printcolumn(name = "Result", type_ = "string", json_path = ".status.resultConfigMap"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("a profile is taken once, as it was asked for: make another one"))]
pub struct ProfileSpec {
    /// The PushCluster whose processes these are, in the same namespace.
    #[schemars(length(min = 1, max = 40))]
    pub cluster: String,
    /// Which processes.
    pub target: ProfileTarget,
    /// What is measured.
    #[serde(default)]
    pub kind: ProfileKind,
    /// For how long it is measured.
    #[serde(default = "thirty")]
    #[schemars(range(min = 1, max = 300))]
    pub seconds: i32,
    /// The resource and its result are deleted this long after it is done; 0 = never.
    #[serde(default = "a_day")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds: i32,
}

fn thirty() -> i32 {
    30
}

fn a_day() -> i32 {
    86_400
}

/// Which processes: exactly one of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.pool), has(self.pod), has(self.role)].filter(given, given).size() == 1").message("give exactly one of pool, pod and role"))]
pub struct ProfileTarget {
    /// All gateways of a GatewayPool.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub pool: Option<String>,
    /// One pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub pod: Option<String>,
    /// All processes of a role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<ProfileRole>,
}

/// Which pods: all gateways, hubs or keepers of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProfileRole {
    Gateway,
    Hub,
    Keeper,
}

/// What is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProfileKind {
    #[default]
    Cpu,
    Heap,
}

/// How far it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileStatus {
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: the result is there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
    /// What has become of it in each pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub pods: Vec<ProfiledPod>,
    /// The ConfigMap with the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result_config_map: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfiledPod {
    pub name: String,
    pub outcome: ProfileOutcome,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProfileOutcome {
    Running,
    Done,
    Failed,
}
