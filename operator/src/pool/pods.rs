//! What a gateway's pod is made of: a function from the pool and its cluster.

use std::collections::BTreeMap;

use carillon_operator_api::{ExposureType, GatewayPoolSpec, Listener, Protocol, PushClusterSpec};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction,
    ObjectFieldSelector, Pod, PodReadinessGate, PodSecurityContext, PodSpec, Probe, ResourceRequirements,
    SeccompProfile, SecretVolumeSource, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::revision::revision;

pub const POOL_LABEL: &str = "carillon.dev/pool";
pub const CLUSTER_LABEL: &str = "carillon.dev/cluster";
pub const REVISION_LABEL: &str = "carillon.dev/revision";
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// What was decided about a pod: `plan::Decision`.
pub const DECISION_ANNOTATION: &str = "carillon.dev/decision";
/// The pod condition that is the readiness gate: only the operator sets it.
pub const SERVING_CONDITION: &str = "carillon.dev/serving";
/// Of the one container.
pub const CONTAINER: &str = "gateway";

/// Metrics and health.
const OPS_PORT: i32 = 9090;
/// The user of the image, who has no rights.
const USER: i64 = 65532;
const DATA: &str = "/var/lib/carillon";
const KEEPER_CERTIFICATE: &str = "/etc/carillon/tls";
const LISTENER_CERTIFICATES: &str = "/etc/carillon/listeners";
/// Besides the time that its devices have to go: the process ends by itself before the pod's time is over.
const STOP_SECONDS: i64 = 15;
const GRACE_REST_SECONDS: i64 = 15;
/// A gateway waits for keeper and hub; so long it may take, then it is started again.
const START_SECONDS: i32 = 3600;

/// What a pool's pods are told of the world around them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    pub namespace: String,
    /// Where a keeper is found, `https://…`.
    pub keeper_url: String,
    /// The Secret with the gateways' certificate for the keepers: `tls.crt`, `tls.key`, `ca.crt`.
    pub keeper_secret: String,
    /// The operator's own image, when nothing else is said.
    pub image: String,
    pub image_pull_policy: Option<String>,
}

/// A pod that is to be made. `suffix` makes its name, and so the gateway's instance id, unlike all others'.
pub fn pod(
    name: &str,
    suffix: &str,
    pool: &GatewayPoolSpec,
    cluster: &PushClusterSpec,
    around: &Surroundings,
    owner: OwnerReference,
) -> Pod {
    let mut labels = pool.template.labels.clone();
    labels.extend(self::labels(name, pool));
    labels.insert(REVISION_LABEL.to_owned(), revision(cluster, pool));
    Pod {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{suffix}")),
            namespace: Some(around.namespace.clone()),
            labels: Some(labels),
            annotations: Some(pool.template.annotations.clone()).filter(|given| !given.is_empty()),
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec: Some(spec(name, pool, cluster, around)),
        status: None,
    }
}

/// Labels of everything of a pool.
pub fn labels(name: &str, pool: &GatewayPoolSpec) -> BTreeMap<String, String> {
    let mut labels = selector(name, pool);
    for (key, value) in [
        ("app.kubernetes.io/name", "carillon"),
        ("app.kubernetes.io/instance", &pool.cluster),
        ("app.kubernetes.io/managed-by", "carillon-operator"),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

/// What a pool's pods are found by.
pub fn selector(name: &str, pool: &GatewayPoolSpec) -> BTreeMap<String, String> {
    [(CLUSTER_LABEL, pool.cluster.as_str()), (COMPONENT_LABEL, "gateway"), (POOL_LABEL, name)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn spec(name: &str, pool: &GatewayPoolSpec, cluster: &PushClusterSpec, around: &Surroundings) -> PodSpec {
    let template = &pool.template;
    let pull_secrets = match template.image_pull_secrets.as_slice() {
        [] => cluster.image_pull_secrets.as_slice(),
        own => own,
    };
    let spread = match template.topology_spread_constraints.as_slice() {
        [] => spread(name, pool),
        own => own.to_vec(),
    };
    PodSpec {
        affinity: template.affinity.clone(),
        // It speaks with nobody at Kubernetes.
        automount_service_account_token: Some(false),
        containers: vec![container(name, pool, cluster, around)],
        // Services would become variables, and variables beginning with CARILLON_ are flags.
        enable_service_links: Some(false),
        image_pull_secrets: some(pull_secrets.to_vec()),
        node_selector: Some(template.node_selector.clone()).filter(|given| !given.is_empty()),
        priority_class_name: template.priority_class_name.clone(),
        readiness_gates: Some(vec![PodReadinessGate { condition_type: SERVING_CONDITION.to_owned() }]),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        termination_grace_period_seconds: Some(stop_seconds(pool) + GRACE_REST_SECONDS),
        tolerations: some(template.tolerations.clone()),
        topology_spread_constraints: Some(spread),
        volumes: Some(volumes(pool, around)),
        ..Default::default()
    }
}

fn stop_seconds(pool: &GatewayPoolSpec) -> i64 {
    i64::from(pool.drain.deadline_seconds) + STOP_SECONDS
}

fn container(
    name: &str,
    pool: &GatewayPoolSpec,
    cluster: &PushClusterSpec,
    around: &Surroundings,
) -> Container {
    let template = &pool.template;
    let image = template.image.as_ref().or(cluster.image.as_ref()).unwrap_or(&around.image);
    let policy = template.image_pull_policy.or(cluster.image_pull_policy);
    let policy = policy.map(|policy| policy.as_str().to_owned());
    // The operator's own pull policy is about the operator's own image.
    let policy = policy.or_else(|| around.image_pull_policy.clone().filter(|_| *image == around.image));
    let mut environment = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_IP", "status.podIP"),
        field("HOST_IP", "status.hostIP"),
        field("NODE_NAME", "spec.nodeName"),
    ];
    let further = template.env.iter().filter(|one| environment.iter().all(|own| own.name != one.name));
    let further: Vec<EnvVar> = further.cloned().collect();
    environment.extend(further);
    let mut ports = vec![port("ops", OPS_PORT, None)];
    let is_host = pool.exposure.kind == ExposureType::HostPort;
    ports.extend(
        pool.listeners
            .iter()
            .map(|listener| port(&listener.name, listener.port, is_host.then_some(listener.port))),
    );
    Container {
        name: CONTAINER.to_owned(),
        image: Some(image.clone()),
        image_pull_policy: policy,
        args: Some(arguments(name, pool, around)),
        env: Some(environment),
        ports: Some(ports),
        resources: Some(template.resources.clone().unwrap_or_else(requests)),
        startup_probe: Some(probe("/healthz", 2, START_SECONDS / 2)),
        liveness_probe: Some(probe("/healthz", 10, 6)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..Default::default()
        }),
        volume_mounts: Some(mounts(pool)),
        ..Default::default()
    }
}

fn arguments(name: &str, pool: &GatewayPoolSpec, around: &Surroundings) -> Vec<String> {
    let mut arguments: Vec<String> = vec![
        "gateway".to_owned(),
        format!("--data-dir={DATA}/data"),
        format!("--ops=0.0.0.0:{OPS_PORT}"),
        format!("--drain-seconds={}", stop_seconds(pool)),
        "--log-format=json".to_owned(),
        "--instance=$(POD_NAME)".to_owned(),
        format!("--pool={name}"),
        "--label=node=$(NODE_NAME)".to_owned(),
        format!("--keeper={}", around.keeper_url),
        format!("--keeper-ca={KEEPER_CERTIFICATE}/ca.crt"),
        format!("--keeper-certificate={KEEPER_CERTIFICATE}/tls.crt"),
        format!("--keeper-key={KEEPER_CERTIFICATE}/tls.key"),
    ];
    for protocol in [Protocol::Mqtt, Protocol::Ws, Protocol::Mqtts, Protocol::Wss] {
        let flag = protocol.as_str();
        match of_flags(pool).into_iter().find(|listener| listener.protocol == protocol) {
            Some(listener) => {
                arguments.push(format!("--{flag}=0.0.0.0:{}", listener.port));
                arguments.push(format!("--advertise-{flag}={}:{}", advertised_host(pool), listener.port));
            }
            // Those without TLS are there unless it is said that they are not.
            None if !protocol.is_tls() => arguments.push(format!("--{flag}=none")),
            None => {}
        }
    }
    if let Some(secret) = of_flags(pool).into_iter().find_map(|listener| listener.tls_secret_name.as_ref()) {
        let folder = certificate_folder(secret);
        arguments.push(format!("--tls-certificate={folder}/tls.crt"));
        arguments.push(format!("--tls-key={folder}/tls.key"));
    }
    arguments
}

/// The listeners that the command line can say: one of each protocol, without PROXY protocol, and one certificate for those
/// with TLS. The first by name.
fn of_flags(pool: &GatewayPoolSpec) -> Vec<&Listener> {
    let mut chosen: Vec<&Listener> = Vec::new();
    for listener in in_order(pool) {
        let is_other = chosen.iter().all(|other| other.protocol != listener.protocol);
        let secret = chosen.iter().find_map(|other| other.tls_secret_name.as_ref());
        let is_same_secret = !listener.protocol.is_tls()
            || secret.is_none_or(|secret| Some(secret) == listener.tls_secret_name.as_ref());
        if is_other && is_same_secret && !listener.proxy_protocol {
            chosen.push(listener);
        }
    }
    chosen
}

/// The listeners that the command line cannot say: for the pool's variant of the `gateway` document, as it has them under
/// `listeners`.
pub fn further_listeners(pool: &GatewayPoolSpec) -> Vec<serde_json::Value> {
    let by_flags: Vec<&str> = of_flags(pool).into_iter().map(|listener| listener.name.as_str()).collect();
    let further = in_order(pool).into_iter().filter(|listener| !by_flags.contains(&listener.name.as_str()));
    let config = |listener: &Listener| {
        let mut config = serde_json::json!({
            "name": listener.name,
            "protocol": listener.protocol,
            "address": format!("0.0.0.0:{}", listener.port),
            "proxy_protocol": listener.proxy_protocol,
        });
        if let Some(host) = &pool.exposure.advertised_host {
            config["advertise"] = format!("{}:{}", bracketed(host), listener.port).into();
        }
        if let Some(secret) = &listener.tls_secret_name {
            let folder = certificate_folder(secret);
            config["tls"] = serde_json::json!({
                "certificates": [{ "certificate": format!("{folder}/tls.crt"), "key": format!("{folder}/tls.key") }],
            });
        }
        config
    };
    further.map(config).collect()
}

fn in_order(pool: &GatewayPoolSpec) -> Vec<&Listener> {
    let mut listeners: Vec<&Listener> = pool.listeners.iter().collect();
    listeners.sort_by(|a, b| a.name.cmp(&b.name));
    listeners
}

/// Where devices find this pod's gateway: a name that is given, its node, or itself.
fn advertised_host(pool: &GatewayPoolSpec) -> String {
    match (&pool.exposure.advertised_host, pool.exposure.kind) {
        (Some(host), _) => bracketed(host),
        (None, ExposureType::HostPort) => "$(HOST_IP)".to_owned(),
        (None, _) => "$(POD_IP)".to_owned(),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn certificate_folder(secret: &str) -> String {
    format!("{LISTENER_CERTIFICATES}/{secret}")
}

/// Each Secret once, in order.
fn listener_secrets(pool: &GatewayPoolSpec) -> Vec<&str> {
    let mut secrets: Vec<&str> =
        pool.listeners.iter().filter_map(|listener| listener.tls_secret_name.as_deref()).collect();
    secrets.sort_unstable();
    secrets.dedup();
    secrets
}

fn volumes(pool: &GatewayPoolSpec, around: &Surroundings) -> Vec<Volume> {
    let secret = |name: String, secret: &str| Volume {
        name,
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            default_mode: Some(0o440),
            ..Default::default()
        }),
        ..Default::default()
    };
    let empty = |name: &str, size: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(Quantity(size.to_owned())),
            ..Default::default()
        }),
        ..Default::default()
    };
    // What was last known of the cluster is kept over restarts of the container; it is 64 MiB at most, written twice.
    let mut volumes = vec![
        empty("data", "256Mi"),
        empty("tmp", "64Mi"),
        secret("keeper-certificate".to_owned(), &around.keeper_secret),
    ];
    let listeners = listener_secrets(pool).into_iter().enumerate();
    volumes.extend(listeners.map(|(index, name)| secret(format!("listener-{index}"), name)));
    volumes
}

fn mounts(pool: &GatewayPoolSpec) -> Vec<VolumeMount> {
    let mount = |name: String, path: String, read_only: bool| VolumeMount {
        name,
        mount_path: path,
        read_only: read_only.then_some(true),
        ..Default::default()
    };
    let mut mounts = vec![
        mount("data".to_owned(), DATA.to_owned(), false),
        mount("tmp".to_owned(), "/tmp".to_owned(), false),
        mount("keeper-certificate".to_owned(), KEEPER_CERTIFICATE.to_owned(), true),
    ];
    let listeners = listener_secrets(pool).into_iter().enumerate();
    mounts.extend(
        listeners.map(|(index, secret)| mount(format!("listener-{index}"), certificate_folder(secret), true)),
    );
    mounts
}

/// A variable with a field of the pod.
fn field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), ..Default::default() };
    let source = EnvVarSource { field_ref: Some(field), ..Default::default() };
    EnvVar { name: name.to_owned(), value_from: Some(source), ..Default::default() }
}

fn port(name: &str, number: i32, host: Option<i32>) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        host_port: host,
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    }
}

fn requests() -> ResourceRequirements {
    let quantity = |name: &str, text: &str| (name.to_owned(), Quantity(text.to_owned()));
    let requests = BTreeMap::from([quantity("cpu", "100m"), quantity("memory", "128Mi")]);
    ResourceRequirements { requests: Some(requests), ..Default::default() }
}

fn probe(path: &str, every_seconds: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("ops".to_owned()),
            ..Default::default()
        }),
        period_seconds: Some(every_seconds),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Default::default()
    }
}

/// Rather on different nodes, and in different zones; where there is one only, there.
fn spread(name: &str, pool: &GatewayPoolSpec) -> Vec<TopologySpreadConstraint> {
    let over = |key: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(selector(name, pool)),
            ..Default::default()
        }),
        ..Default::default()
    };
    vec![over("kubernetes.io/hostname"), over("topology.kubernetes.io/zone")]
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    Some(list).filter(|list| !list.is_empty())
}

#[cfg(test)]
mod tests;
