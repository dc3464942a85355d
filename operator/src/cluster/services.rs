//! Services, and how many pods of a part may be taken away at a time.

use std::collections::BTreeMap;

use carillon_operator_api::{ApiSpec, ServiceType};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{API_PORT, HUB_PORT, KEEPER_PORT, Names, Part};

fn service(names: &Names, name: String, part: Part, ports: &[(&str, i32)]) -> Service {
    let port = |(name, number): &(&str, i32)| ServicePort {
        name: Some((*name).to_owned()),
        port: *number,
        protocol: Some("TCP".to_owned()),
        target_port: Some(IntOrString::String((*name).to_owned())),
        ..Default::default()
    };
    Service {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(names.namespace.clone()),
            labels: Some(names.labels(part.as_str())),
            ..Default::default()
        },
        spec: Some(ServiceSpec {
            type_: Some(ServiceType::ClusterIP.as_str().to_owned()),
            selector: Some(names.selector(part)),
            ports: Some(ports.iter().map(port).collect()),
            ..Default::default()
        }),
        status: None,
    }
}

fn headless(mut service: Service, also_not_ready: bool) -> Service {
    if let Some(spec) = &mut service.spec {
        spec.cluster_ip = Some("None".to_owned());
        spec.publish_not_ready_addresses = also_not_ready.then_some(true);
    }
    service
}

/// All Services of a cluster.
pub fn services(names: &Names, api: &ApiSpec) -> Vec<Service> {
    let mut for_backends = service(names, names.api(), Part::Hub, &[("http", API_PORT)]);
    if let Some(spec) = &mut for_backends.spec {
        spec.type_ = Some(api.service_type.as_str().to_owned());
    }
    let annotations: &BTreeMap<String, String> = &api.annotations;
    for_backends.metadata.annotations = Some(annotations.clone()).filter(|all| !all.is_empty());
    vec![
        // Those who are not ready yet are to find each other.
        headless(service(names, names.peers(), Part::Keeper, &[("grpc", KEEPER_PORT)]), true),
        service(names, names.part(Part::Keeper), Part::Keeper, &[("grpc", KEEPER_PORT)]),
        headless(service(names, names.part(Part::Hub), Part::Hub, &[("grpc", HUB_PORT)]), false),
        for_backends,
    ]
}

/// One at a time: also where there is one alone, so that nodes can be emptied.
pub fn budget(names: &Names, part: Part) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(names.part(part)),
            namespace: Some(names.namespace.clone()),
            labels: Some(names.labels(part.as_str())),
            ..Default::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector { match_labels: Some(names.selector(part)), ..Default::default() }),
            ..Default::default()
        }),
        status: None,
    }
}
