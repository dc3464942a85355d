//! What the pods of keeper and hub have in common: who they run as, what they may, how they are looked after.

use std::collections::BTreeMap;

use carillon_agent::subject::CertificateRole;
use carillon_operator_api::{PodTemplate, PushClusterSpec, Storage};
use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction,
    ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec, PodSecurityContext, PodSpec,
    PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext,
    TopologySpreadConstraint, Volume, VolumeMount, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{Names, OPS_PORT, Part};

/// The user of the image, who has no rights.
const USER: i64 = 65532;
/// Where the volume is mounted. Data is in a directory below: a volume has its own `lost+found`.
const VOLUME: &str = "/var/lib/carillon";
pub const DATA: &str = "/var/lib/carillon/data";
const CERTIFICATES: &str = "/etc/carillon/tls";
/// A new process has so long until it must answer: it may have much to read, and waits for others. Afterwards it is started
/// again.
const START_SECONDS: i32 = 3600;
/// A pod counts for others only when it has been ready for so long.
const READY_SECONDS: i32 = 5;
/// What is left of a pod's time when its process should be done.
const GRACE_REST_SECONDS: i64 = 15;

/// What an image is, where nothing else is said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub name: String,
    pub pull_policy: Option<String>,
}

/// What differs between the parts.
pub(super) struct Process<'a> {
    pub part: Part,
    pub replicas: i32,
    pub pod: &'a PodTemplate,
    pub storage: &'a Storage,
    /// The headless Service.
    pub service: String,
    pub role: CertificateRole,
    pub arguments: Vec<String>,
    pub environment: Vec<EnvVar>,
    /// Besides the one of metrics and health.
    pub ports: Vec<(&'static str, i32)>,
    pub stop_seconds: i64,
    /// CPU and memory that are asked for when nothing is said.
    pub requests: (&'static str, &'static str),
}

/// A variable with a field of the pod: `metadata.name`, `status.podIP`.
pub(super) fn field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), ..Default::default() };
    let source = EnvVarSource { field_ref: Some(field), ..Default::default() };
    EnvVar { name: name.to_owned(), value_from: Some(source), ..Default::default() }
}

/// The file of a certificate's Secret in the pod.
pub(super) fn certificate_file(file: &str) -> String {
    format!("{CERTIFICATES}/{file}")
}

/// The StatefulSet of a part. Its pods start together, and are updated one by one.
pub(super) fn stateful_set(
    names: &Names,
    spec: &PushClusterSpec,
    image: &Image,
    process: Process<'_>,
) -> StatefulSet {
    let metadata = ObjectMeta {
        name: Some(names.part(process.part)),
        namespace: Some(names.namespace.clone()),
        labels: Some(names.labels(process.part.as_str())),
        ..Default::default()
    };
    let retain = || Some("Retain".to_owned());
    let spec = StatefulSetSpec {
        replicas: Some(process.replicas),
        service_name: Some(process.service.clone()),
        pod_management_policy: Some("Parallel".to_owned()),
        min_ready_seconds: Some(READY_SECONDS),
        revision_history_limit: Some(5),
        selector: LabelSelector { match_labels: Some(names.selector(process.part)), ..Default::default() },
        update_strategy: Some(StatefulSetUpdateStrategy {
            type_: Some("RollingUpdate".to_owned()),
            ..Default::default()
        }),
        // Nothing but a person, or the step that has taken a member out before, deletes data: neither a scale by hand nor the
        // deletion of the PushCluster.
        persistent_volume_claim_retention_policy: Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
            when_deleted: retain(),
            when_scaled: retain(),
        }),
        volume_claim_templates: Some(vec![claim(names, &process)]),
        template: template(names, spec, image, process),
        ordinals: None,
    };
    StatefulSet { metadata, spec: Some(spec), status: None }
}

fn claim(names: &Names, process: &Process<'_>) -> PersistentVolumeClaim {
    let requests = BTreeMap::from([("storage".to_owned(), process.storage.size.clone())]);
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some("data".to_owned()),
            labels: Some(names.selector(process.part)),
            ..Default::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: process.storage.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            ..Default::default()
        }),
        status: None,
    }
}

fn template(names: &Names, spec: &PushClusterSpec, image: &Image, process: Process<'_>) -> PodTemplateSpec {
    let pod = process.pod;
    let mut labels = pod.labels.clone();
    labels.extend(names.labels(process.part.as_str()));
    let pull_secrets = match pod.image_pull_secrets.as_slice() {
        [] => &spec.image_pull_secrets,
        own => own,
    };
    let spread = match pod.topology_spread_constraints.as_slice() {
        [] => spread(names, process.part),
        own => own.to_vec(),
    };
    let pod_spec = PodSpec {
        affinity: pod.affinity.clone(),
        // It speaks with nobody at Kubernetes.
        automount_service_account_token: Some(false),
        // Services would become variables, and variables beginning with CARILLON_ are flags.
        enable_service_links: Some(false),
        image_pull_secrets: some(pull_secrets.to_vec()),
        node_selector: Some(pod.node_selector.clone()).filter(|selector| !selector.is_empty()),
        priority_class_name: pod.priority_class_name.clone(),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        termination_grace_period_seconds: Some(process.stop_seconds + GRACE_REST_SECONDS),
        tolerations: some(pod.tolerations.clone()),
        topology_spread_constraints: Some(spread),
        volumes: Some(volumes(names, process.role)),
        containers: vec![container(spec, image, process)],
        ..Default::default()
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(pod.annotations.clone()).filter(|annotations| !annotations.is_empty()),
            ..Default::default()
        }),
        spec: Some(pod_spec),
    }
}

fn container(spec: &PushClusterSpec, image: &Image, process: Process<'_>) -> Container {
    let pod = process.pod;
    let name = pod.image.as_ref().or(spec.image.as_ref()).unwrap_or(&image.name);
    let policy = pod.image_pull_policy.or(spec.image_pull_policy).map(|policy| policy.as_str().to_owned());
    // The operator's own pull policy is about the operator's own image.
    let policy = policy.or_else(|| image.pull_policy.clone().filter(|_| *name == image.name));
    let mut arguments = vec![process.part.as_str().to_owned()];
    arguments.extend([
        format!("--data-dir={DATA}"),
        format!("--ops=0.0.0.0:{OPS_PORT}"),
        format!("--drain-seconds={}", process.stop_seconds),
        "--log-format=json".to_owned(),
    ]);
    arguments.extend(process.arguments);
    let mut environment = process.environment;
    let further = pod.env.iter().filter(|one| environment.iter().all(|own| own.name != one.name));
    let further: Vec<EnvVar> = further.cloned().collect();
    environment.extend(further);
    let mut ports = vec![port("ops", OPS_PORT)];
    ports.extend(process.ports.iter().map(|(name, number)| port(name, *number)));
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..Default::default()
    };
    Container {
        name: process.part.as_str().to_owned(),
        image: Some(name.clone()),
        image_pull_policy: policy,
        args: Some(arguments),
        env: Some(environment),
        ports: Some(ports),
        resources: Some(pod.resources.clone().unwrap_or_else(|| requests(process.requests))),
        startup_probe: Some(probe("/healthz", 5, START_SECONDS / 5)),
        liveness_probe: Some(probe("/healthz", 10, 6)),
        readiness_probe: Some(probe("/readyz", 3, 2)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..Default::default()
        }),
        volume_mounts: Some(vec![
            mount("data", VOLUME, false),
            mount("certificates", CERTIFICATES, true),
            mount("tmp", "/tmp", false),
        ]),
        ..Default::default()
    }
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    Some(list).filter(|list| !list.is_empty())
}

fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    }
}

fn requests((cpu, memory): (&str, &str)) -> ResourceRequirements {
    let quantity = |name: &str, text: &str| (name.to_owned(), Quantity(text.to_owned()));
    ResourceRequirements {
        requests: Some(BTreeMap::from([quantity("cpu", cpu), quantity("memory", memory)])),
        ..Default::default()
    }
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
fn spread(names: &Names, part: Part) -> Vec<TopologySpreadConstraint> {
    let over = |key: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(names.selector(part)),
            ..Default::default()
        }),
        ..Default::default()
    };
    vec![over("kubernetes.io/hostname"), over("topology.kubernetes.io/zone")]
}

fn volumes(names: &Names, role: CertificateRole) -> Vec<Volume> {
    vec![
        Volume {
            name: "certificates".to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(names.certificate(role)),
                default_mode: Some(0o440),
                ..Default::default()
            }),
            ..Default::default()
        },
        Volume {
            name: "tmp".to_owned(),
            empty_dir: Some(EmptyDirVolumeSource {
                size_limit: Some(Quantity("64Mi".to_owned())),
                ..Default::default()
            }),
            ..Default::default()
        },
    ]
}
