//! The keeper's objects: its StatefulSet, which peers there are, its Services and its disruption budget.
//!
//! Which peers there are stands in a ConfigMap that the pods read as they start, not in their template: a change of the
//! template would restart every keeper whenever one comes or goes. And it must be up to date: a keeper that has lost its disk
//! and is told of itself alone would found a cluster of its own.

use std::collections::BTreeMap;

use carillon_agent::subject::CertificateRole;
use carillon_operator_api::PushClusterSpec;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, ConfigMapKeySelector, EnvVar, EnvVarSource};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::names::{KEEPER_PORT, Names, Part};
use super::pods::{Image, Process, certificate_file, field, stateful_set};

/// The key in the ConfigMap.
const PEERS: &str = "peers";
/// Handing the lead over takes at most 2 s of it.
const STOP_SECONDS: i64 = 15;

/// How many keepers there are to be at present: places 0 and up. The number that is wanted is reached one by one.
pub fn peers(names: &Names, places: u32) -> ConfigMap {
    let addresses: Vec<String> = (0..places).map(|place| names.keeper_address(place)).collect();
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(names.peers()),
            namespace: Some(names.namespace.clone()),
            labels: Some(names.labels(Part::Keeper.as_str())),
            ..Default::default()
        },
        data: Some(BTreeMap::from([(PEERS.to_owned(), addresses.join(","))])),
        ..Default::default()
    }
}

/// How many the ConfigMap says; None: it says something else.
pub fn places(names: &Names, peers: &ConfigMap) -> Option<u32> {
    let text = peers.data.as_ref()?.get(PEERS)?;
    let addresses = text.split(',').enumerate();
    let mut count = 0;
    for (place, address) in addresses {
        let place = u32::try_from(place).ok()?;
        if names.keeper_address(place) != address {
            return None;
        }
        count = place + 1;
    }
    Some(count)
}

/// The keepers, `places` of them.
pub fn keepers(names: &Names, spec: &PushClusterSpec, image: &Image, places: u32) -> StatefulSet {
    let peers = ConfigMapKeySelector { name: names.peers(), key: PEERS.to_owned(), optional: None };
    let peers = EnvVar {
        name: "CARILLON_PEERS".to_owned(),
        value_from: Some(EnvVarSource { config_map_key_ref: Some(peers), ..Default::default() }),
        ..Default::default()
    };
    let process = Process {
        part: Part::Keeper,
        replicas: i32::try_from(places).unwrap_or(i32::MAX),
        pod: &spec.keeper.pod,
        storage: &spec.keeper.storage,
        service: names.peers(),
        role: CertificateRole::Keeper,
        arguments: vec![
            format!("--grpc=0.0.0.0:{KEEPER_PORT}"),
            format!("--advertise-grpc={}:{KEEPER_PORT}", names.keeper_host("$(POD_NAME)")),
            format!("--tls-certificate={}", certificate_file("tls.crt")),
            format!("--tls-key={}", certificate_file("tls.key")),
            format!("--tls-client-ca={}", certificate_file("ca.crt")),
        ],
        environment: vec![field("POD_NAME", "metadata.name"), peers],
        ports: vec![("grpc", KEEPER_PORT)],
        stop_seconds: STOP_SECONDS,
        requests: ("50m", "128Mi"),
    };
    stateful_set(names, spec, image, process)
}
