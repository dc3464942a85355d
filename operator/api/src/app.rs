//! `App`: a tenant of a cluster. Its fields are those of the keeper's `app` document; keys are taken from Secrets.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pod::SecretKey;

/// A tenant of a cluster: its keys, what its devices may do, how its messages are kept, its webhook and limits.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "carillon.dev",
    version = "v1alpha1",
    kind = "App",
    plural = "apps",
    namespaced,
    status = "AppStatus",
    shortname = "capp",
    category = "carillon",
    derive = "PartialEq",
    selectable = ".spec.cluster",
    doc = "A tenant of a cluster: its keys, what its devices may do, how its messages are kept, its webhook and limits.",
    validation = Rule::new("has(self.spec.name) || self.metadata.name.size() <= 64").message("an app's name has at most 64 characters: say a shorter one in spec.name"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Revision", type_ = "integer", json_path = ".status.revision", description = "The document's revision at the keeper"),
    printcolumn(name = "Message", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].message"#, priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)").message("an app cannot change its name, which its topics begin with: make another App").field_path(".name"))]
pub struct AppSpec {
    /// The PushCluster that it is an app of, in the same namespace.
    #[schemars(length(min = 1, max = 40))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("an app cannot change its cluster: make another App there, and delete this one"))]
    pub cluster: String,
    /// Its name in topics and tokens. Default: the resource's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9][A-Za-z0-9._-]*$')").message("may hold only letters, digits, '-', '_' and '.', and must begin with a letter or digit"))]
    pub name: Option<String>,
    /// Devices may connect without a token. Their user is the MQTT user name, or the client id if there is none.
    #[serde(default)]
    pub anonymous_devices: bool,
    /// Bearer keys of backends. Several, so that they can be rotated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub api_keys: Vec<AppApiKey>,
    /// Keys that device tokens (JWT) are signed with. Several, so that they can be rotated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["id".into()]))]
    pub token_keys: Vec<AppTokenKey>,
    /// What devices may publish to when their token does not say: filters below the app's level; `{user}` stands for the
    /// device's user.
    #[serde(default = "upstream")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[x_kube(validation = Rule::new("self.all(filter, filter.matches('^([^/#+]*|[+])(/([^/#+]*|[+]))*(/#)?$|^#$') && filter != '')").message("each must be a topic filter: + and # are whole levels, and # is the last one"))]
    #[schemars(inner(length(max = 1024)))]
    pub device_publish: Vec<String>,
    /// The same for what devices may subscribe to.
    #[serde(default = "inbox_groups_all")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[x_kube(validation = Rule::new("self.all(filter, filter.matches('^([^/#+]*|[+])(/([^/#+]*|[+]))*(/#)?$|^#$') && filter != '')").message("each must be a topic filter: + and # are whole levels, and # is the last one"))]
    #[schemars(inner(length(max = 1024)))]
    pub device_subscribe: Vec<String>,
    /// How topics are kept; the first rule whose filter matches is the one.
    #[serde(default = "everything_for_a_week")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub topics: Vec<AppTopicRule>,
    /// Where upstream messages (`up/#`) and presence events go. Default: upstream messages are kept only by their rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook: Option<AppWebhook>,
    #[serde(default)]
    pub limits: AppLimits,
}

fn upstream() -> Vec<String> {
    vec!["up/#".to_owned()]
}

fn inbox_groups_all() -> Vec<String> {
    vec!["u/{user}".to_owned(), "g/#".to_owned(), "all".to_owned()]
}

fn everything_for_a_week() -> Vec<AppTopicRule> {
    vec![AppTopicRule {
        filter: "#".to_owned(),
        store: yes(),
        max_age_seconds: week(),
        max_count: ten_thousand(),
        max_bytes: sixteen_mebibytes(),
    }]
}

impl AppSpec {
    /// All that has a default at its default.
    pub fn of(cluster: &str) -> Self {
        AppSpec {
            cluster: cluster.to_owned(),
            name: None,
            anonymous_devices: false,
            api_keys: Vec::new(),
            token_keys: Vec::new(),
            device_publish: upstream(),
            device_subscribe: inbox_groups_all(),
            topics: everything_for_a_week(),
            webhook: None,
            limits: AppLimits::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppApiKey {
    /// To tell keys apart in logs and listings.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    /// The key itself; at least 16 characters.
    pub secret_ref: SecretKey,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppTokenKey {
    /// Matched with the token's `kid` header when it has one.
    #[schemars(length(min = 1, max = 128))]
    pub id: String,
    pub algorithm: TokenAlgorithm,
    /// The shared secret (HS256, at least 32 bytes), or the public key in PEM.
    pub secret_ref: SecretKey,
}

/// How device tokens are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TokenAlgorithm {
    HS256,
    RS256,
    ES256,
    EdDSA,
}

/// How the topics are kept that a filter matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppTopicRule {
    /// Filter below the app's level: `u/+`, `g/#`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^([^/#+]*|[+])(/([^/#+]*|[+]))*(/#)?$|^#$')").message("must be a topic filter: + and # are whole levels, and # is the last one"))]
    pub filter: String,
    /// Keep messages with QoS >= 1 in the topic's log.
    #[serde(default = "yes")]
    pub store: bool,
    /// Retention by age; 0 = no such limit.
    #[serde(default = "week")]
    #[schemars(range(min = 0))]
    pub max_age_seconds: i64,
    /// Retention by number of messages; 0 = no such limit.
    #[serde(default = "ten_thousand")]
    #[schemars(range(min = 0))]
    pub max_count: i64,
    /// Retention by size; 0 = no such limit.
    #[serde(default = "sixteen_mebibytes")]
    #[schemars(range(min = 0))]
    pub max_bytes: i64,
}

fn yes() -> bool {
    true
}

fn week() -> i64 {
    7 * 24 * 3600
}

fn ten_thousand() -> i64 {
    10_000
}

fn sixteen_mebibytes() -> i64 {
    16 * 1024 * 1024
}

fn ten_seconds() -> i32 {
    10_000
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppWebhook {
    /// Events are POSTed to it as JSON arrays.
    #[schemars(length(max = 2048))]
    #[x_kube(validation = Rule::new("self.startsWith('http://') || self.startsWith('https://')").message("must begin with http:// or https://"))]
    pub url: String,
    /// Signs each request: header `carillon-signature: sha256={hex HMAC of the body}`. Default: not signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretKey>,
    /// Also send online and offline events.
    #[serde(default)]
    pub presence: bool,
    /// For one request.
    #[serde(default = "ten_seconds")]
    #[schemars(range(min = 100, max = 60_000))]
    pub timeout_ms: i32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppLimits {
    /// Longest payload that a backend may push.
    #[serde(default = "payload")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub max_payload_bytes: i32,
    /// Sends per second of a broadcast that does not say, over all gateways; 0 = as fast as they can.
    #[serde(default = "ten_thousand")]
    #[schemars(range(min = 0))]
    pub broadcast_rate_per_second: i64,
    /// Pushes that a backend may make per second, per center; 0 = no limit.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub push_rate_per_second: i32,
    /// Connections of this app that one gateway holds; 0 = no limit of its own.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub max_connections_per_gateway: i32,
    /// PUBLISH packets per second of one connection; 0 = no limit. Default: as the `gateway` document says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub publish_messages_per_second: Option<i32>,
    /// Payload bytes per second of one connection's PUBLISH packets; 0 = no limit. Default: as the `gateway` document says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub publish_bytes_per_second: Option<i32>,
}

fn payload() -> i32 {
    256 * 1024
}

impl Default for AppLimits {
    fn default() -> Self {
        AppLimits {
            max_payload_bytes: payload(),
            broadcast_rate_per_second: ten_thousand(),
            push_rate_per_second: 0,
            max_connections_per_gateway: 0,
            publish_messages_per_second: None,
            publish_bytes_per_second: None,
        }
    }
}

/// How the app is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppStatus {
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready sums up; KeysFound, ConfigAccepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Its name at the keeper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Revision of its document at the keeper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
}
