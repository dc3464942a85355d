//! The hub's StatefulSet: one replica with a volume, while the store is embedded.

use carillon_agent::subject::CertificateRole;
use carillon_operator_api::PushClusterSpec;
use k8s_openapi::api::apps::v1::StatefulSet;

use super::names::{API_PORT, HUB_PORT, Names, Part};
use super::pods::{Image, Process, certificate_file, field, stateful_set};

/// It hands its slots over, which may take 8 s, and flushes its store.
const STOP_SECONDS: i64 = 30;

/// The hubs. Each is called what its pod is called, and says to the others where that pod is: its name in the DNS may lead to
/// where it was for as long as somebody remembers.
pub fn hubs(names: &Names, spec: &PushClusterSpec, image: &Image) -> StatefulSet {
    let process = Process {
        part: Part::Hub,
        replicas: spec.hub.replicas,
        pod: &spec.hub.pod,
        storage: &spec.hub.storage,
        service: names.part(Part::Hub),
        role: CertificateRole::Hub,
        arguments: vec![
            "--instance=$(POD_NAME)".to_owned(),
            format!("--keeper={}", names.keeper_url()),
            format!("--keeper-ca={}", certificate_file("ca.crt")),
            format!("--keeper-certificate={}", certificate_file("tls.crt")),
            format!("--keeper-key={}", certificate_file("tls.key")),
            format!("--grpc=0.0.0.0:{HUB_PORT}"),
            format!("--advertise-grpc=$(POD_IP):{HUB_PORT}"),
            format!("--http=0.0.0.0:{API_PORT}"),
        ],
        environment: vec![field("POD_NAME", "metadata.name"), field("POD_IP", "status.podIP")],
        ports: vec![("grpc", HUB_PORT), ("http", API_PORT)],
        stop_seconds: STOP_SECONDS,
        requests: ("100m", "256Mi"),
    };
    stateful_set(names, spec, image, process)
}
