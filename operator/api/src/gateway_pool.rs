//! `GatewayPool`: gateways that are alike, and how they are changed without dropping who is connected.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pod::PodTemplate;

/// Gateways that are alike: their listeners and limits, how many, and how devices are moved when they change.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "carillon.dev",
    version = "v1alpha1",
    kind = "GatewayPool",
    plural = "gatewaypools",
    namespaced,
    status = "GatewayPoolStatus",
    shortname = "gwp",
    category = "carillon",
    derive = "PartialEq",
    selectable = ".spec.cluster",
    doc = "Gateways that are alike: their listeners and limits, how many, and how devices are moved when they change.",
    validation = Rule::new("self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("the name begins those of pods and services: at most 50 lower-case letters, digits and '-', a letter first"),
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster", priority = 1),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas", description = "Gateways that are wanted"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas", description = "Gateways that take connections"),
    printcolumn(name = "Updated", type_ = "integer", json_path = ".status.updatedReplicas", description = "Gateways of the newest revision"),
    printcolumn(name = "Connections", type_ = "integer", json_path = ".status.connections", description = "Devices connected, rounded"),
    printcolumn(name = "Draining", type_ = "integer", json_path = ".status.draining", description = "Gateways that send their devices to others"),
    printcolumn(name = "Message", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].message"#, priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct GatewayPoolSpec {
    /// The PushCluster that the gateways belong to, in the same namespace.
    #[schemars(length(min = 1, max = 40))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a pool cannot change its cluster: make another pool, and delete this one"))]
    pub cluster: String,
    /// How many gateways. With `autoscaling`, the operator changes it.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Where and how the gateways run. A change replaces them, by `update`.
    #[serde(default)]
    pub template: PodTemplate,
    /// What devices connect to. A change replaces the gateways, by `update`.
    #[serde(default = "mqtt_and_websocket")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[x_kube(validation = Rule::new("self.all(a, self.exists_one(b, b.port == a.port))").message("two listeners have the same port: give each one of its own"))]
    pub listeners: Vec<Listener>,
    /// Limits of each gateway, instead of those that the cluster's `gateway` document says. Changed live.
    #[serde(default)]
    pub limits: PoolLimits,
    /// How devices are sent to other gateways. Changed live.
    #[serde(default)]
    pub drain: DrainSpec,
    /// How gateways are replaced by those of a new revision.
    #[serde(default)]
    pub update: UpdateSpec,
    /// How load evens out when gateways are added.
    #[serde(default)]
    pub rebalance: RebalanceSpec,
    /// Follow the number of connections. Default: replicas stay as they are said. A HorizontalPodAutoscaler is for other
    /// measures: never both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingSpec>,
    /// How devices reach the gateways from outside.
    #[serde(default)]
    pub exposure: ExposureSpec,
}

fn one() -> i32 {
    1
}

fn mqtt_and_websocket() -> Vec<Listener> {
    let listener = |name: &str, protocol, port| Listener {
        name: name.to_owned(),
        protocol,
        port,
        tls_secret_name: None,
        proxy_protocol: false,
    };
    vec![listener("mqtt", Protocol::Mqtt, 1883), listener("ws", Protocol::Ws, 8083)]
}

impl GatewayPoolSpec {
    /// All that has a default at its default.
    pub fn of(cluster: &str) -> Self {
        GatewayPoolSpec {
            cluster: cluster.to_owned(),
            replicas: one(),
            template: PodTemplate::default(),
            listeners: mqtt_and_websocket(),
            limits: PoolLimits::default(),
            drain: DrainSpec::default(),
            update: UpdateSpec::default(),
            rebalance: RebalanceSpec::default(),
            autoscaling: None,
            exposure: ExposureSpec::default(),
        }
    }
}

/// A port that devices connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(self.protocol in ['mqtts', 'wss']) || has(self.tlsSecretName)").message("mqtts and wss need tlsSecretName: the Secret with the certificate").field_path(".tlsSecretName"))]
#[x_kube(validation = Rule::new("self.protocol in ['mqtts', 'wss'] || !has(self.tlsSecretName)").message("a certificate is of no use to mqtt and ws: choose mqtts or wss, or leave tlsSecretName out").field_path(".tlsSecretName"))]
pub struct Listener {
    /// Name of the Service's port.
    #[schemars(length(min = 1, max = 15))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("must be lower-case letters, digits and '-', a letter first: it is a Service's port name"))]
    pub name: String,
    pub protocol: Protocol,
    /// Where the gateway listens, and the Service, too.
    #[schemars(range(min = 1, max = 65535))]
    #[x_kube(validation = Rule::new("!(self in [7400, 7401, 9090])").message("is a port of Carillon's own (7400, 7401, 9090): choose another"))]
    pub port: i32,
    /// A Secret of type kubernetes.io/tls: the certificate, read again when it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tls_secret_name: Option<String>,
    /// Every connection begins with a PROXY protocol version 2 header, from a load balancer that sends one.
    #[serde(default)]
    pub proxy_protocol: bool,
}

/// What is spoken at a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Mqtt,
    Mqtts,
    Ws,
    Wss,
}

impl Protocol {
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Mqtt => "mqtt",
            Protocol::Mqtts => "mqtts",
            Protocol::Ws => "ws",
            Protocol::Wss => "wss",
        }
    }

    pub fn is_tls(self) -> bool {
        matches!(self, Protocol::Mqtts | Protocol::Wss)
    }
}

/// Limits of one gateway. What is not given is as the cluster's `gateway` document says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolLimits {
    /// Connections in all; a CONNECT above it is refused with "server busy".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_000_000))]
    pub connections: Option<i32>,
    /// Connections from one address (IPv6: one /64); 0 = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 16_000_000))]
    pub connections_per_ip: Option<i32>,
    /// Connections accepted per second; 0 = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000_000))]
    pub connects_per_second: Option<i32>,
    /// Longest MQTT packet accepted from a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 128, max = 16_777_216))]
    pub packet_bytes: Option<i32>,
    /// PUBLISH packets per second of one connection; 0 = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub publish_messages_per_second: Option<i32>,
    /// Bytes queued towards one device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16_384, max = 268_435_456))]
    pub outbound_bytes: Option<i32>,
}

/// How devices leave a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DrainSpec {
    /// Devices that one gateway sends away each second: a million take 33 minutes at 500.
    #[serde(default = "five_hundred")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rate_per_second: i32,
    /// Who is still there after this time is disconnected at once. It is also the time that a pod gets to end.
    #[serde(default = "ten_minutes")]
    #[schemars(range(min = 1, max = 86_400))]
    pub deadline_seconds: i32,
}

fn five_hundred() -> i32 {
    500
}

fn ten_minutes() -> i32 {
    600
}

fn five_minutes() -> i32 {
    300
}

impl Default for DrainSpec {
    fn default() -> Self {
        DrainSpec { rate_per_second: five_hundred(), deadline_seconds: ten_minutes() }
    }
}

/// How a pool gets to a new revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])").message("maxSurge and maxUnavailable cannot both be 0: no gateway could be replaced"))]
pub struct UpdateSpec {
    /// Gateways above `replicas` while an update runs: a number, or a percentage of `replicas`, rounded up.
    #[serde(default = "a_quarter")]
    #[x_kube(validation = Rule::new("string(self).matches('^(100|[0-9]{1,2})%$') || (self != string(self) && string(self).matches('^(1000|[0-9]{1,3})$'))").message("must be a number from 0 to 1000, or a percentage from 0% to 100%"))]
    pub max_surge: IntOrString,
    /// Gateways that may be missing while an update runs: a number, or a percentage of `replicas`, rounded down.
    #[serde(default = "none")]
    #[x_kube(validation = Rule::new("string(self).matches('^(100|[0-9]{1,2})%$') || (self != string(self) && string(self).matches('^(1000|[0-9]{1,3})$'))").message("must be a number from 0 to 1000, or a percentage from 0% to 100%"))]
    pub max_unavailable: IntOrString,
    /// Begin no further replacement; what is under way is finished.
    #[serde(default)]
    pub paused: bool,
}

fn a_quarter() -> IntOrString {
    IntOrString::String("25%".to_owned())
}

fn none() -> IntOrString {
    IntOrString::Int(0)
}

impl Default for UpdateSpec {
    fn default() -> Self {
        UpdateSpec { max_surge: a_quarter(), max_unavailable: none(), paused: false }
    }
}

/// How load evens out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebalanceSpec {
    /// Send devices from fuller gateways to emptier ones.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// How far above the mean a gateway may be.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 100))]
    pub tolerance_percent: i32,
    /// Time between two rebalances of a pool, at least.
    #[serde(default = "five_minutes")]
    #[schemars(range(min = 0, max = 86_400))]
    pub cooldown_seconds: i32,
}

fn yes() -> bool {
    true
}

fn ten() -> i32 {
    10
}

impl Default for RebalanceSpec {
    fn default() -> Self {
        RebalanceSpec { enabled: yes(), tolerance_percent: ten(), cooldown_seconds: five_minutes() }
    }
}

/// As many gateways as the connections need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("min may not be above max").field_path(".min"))]
pub struct AutoscalingSpec {
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub min: i32,
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,
    /// Connections that one gateway is to have.
    #[schemars(range(min = 1, max = 16_000_000))]
    pub connections_per_pod: i32,
    /// How long fewer gateways must have been enough before there are fewer.
    #[serde(default = "five_minutes")]
    #[schemars(range(min = 0, max = 86_400))]
    pub stabilization_seconds: i32,
}

/// How devices reach the gateways.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.loadBalancerClass) || self.type == 'LoadBalancer'").message("loadBalancerClass is for exposure.type LoadBalancer").field_path(".loadBalancerClass"))]
pub struct ExposureSpec {
    /// `HostPort`: the listeners' ports of the gateway's node, one gateway of the pool on each node.
    #[serde(default, rename = "type")]
    pub kind: ExposureType,
    /// Annotations of the Service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub annotations: BTreeMap<String, String>,
    /// The name or address that the dispatcher gives out. Default: what the type of exposure yields.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?$') || isIP(self)").message("must be a host name or an IP address, without a port: the ports are the listeners'"))]
    pub advertised_host: Option<String>,
    /// Which load balancer is to serve it. Default: the Kubernetes cluster's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub load_balancer_class: Option<String>,
}

/// A way to the gateways.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExposureType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
    HostPort,
}

/// How the pool is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GatewayPoolStatus {
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready sums up; Available, Progressing, Degraded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Gateways that there are, those that are being drained among them.
    #[serde(default)]
    pub replicas: i32,
    /// Those that take connections.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Those of the newest revision.
    #[serde(default)]
    pub updated_replicas: i32,
    /// Those that send their devices to others.
    #[serde(default)]
    pub draining: i32,
    /// Devices connected, to two significant digits, and not more often than every half minute.
    #[serde(default)]
    pub connections: i64,
    /// Selects the pool's pods, for the scale subresource.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The newest revision: what the label carillon.dev/revision of its pods says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}
