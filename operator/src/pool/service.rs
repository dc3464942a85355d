//! How a pool is reached, and how many of its pods may be taken away at a time: its Service and PodDisruptionBudget.

use carillon_operator_api::{ExposureType, GatewayPoolSpec};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::pods::{labels, selector};

/// Of both. A PushCluster's Services have other endings, so that a pool and a cluster may share a name.
pub fn service_name(pool: &str) -> String {
    format!("{pool}-gateways")
}

fn metadata(name: &str, namespace: &str, pool: &GatewayPoolSpec, owner: OwnerReference) -> ObjectMeta {
    ObjectMeta {
        name: Some(service_name(name)),
        namespace: Some(namespace.to_owned()),
        labels: Some(labels(name, pool)),
        owner_references: Some(vec![owner]),
        ..Default::default()
    }
}

pub fn service(name: &str, namespace: &str, pool: &GatewayPoolSpec, owner: OwnerReference) -> Service {
    let exposure = &pool.exposure;
    let kind = match exposure.kind {
        // The node's own ports lead to its pod; the Service is for those inside.
        ExposureType::ClusterIP | ExposureType::HostPort => "ClusterIP",
        ExposureType::NodePort => "NodePort",
        ExposureType::LoadBalancer => "LoadBalancer",
    };
    let mut listeners: Vec<_> = pool.listeners.iter().collect();
    listeners.sort_by(|a, b| a.name.cmp(&b.name));
    let ports = listeners.into_iter().map(|listener| ServicePort {
        name: Some(listener.name.clone()),
        port: listener.port,
        target_port: Some(IntOrString::Int(listener.port)),
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    });
    // Limits by address need the device's own.
    let is_local = exposure.kind == ExposureType::LoadBalancer;
    Service {
        metadata: ObjectMeta {
            annotations: Some(exposure.annotations.clone()).filter(|given| !given.is_empty()),
            ..metadata(name, namespace, pool, owner)
        },
        spec: Some(ServiceSpec {
            type_: Some(kind.to_owned()),
            selector: Some(selector(name, pool)),
            ports: Some(ports.collect()),
            external_traffic_policy: is_local.then(|| "Local".to_owned()),
            load_balancer_class: exposure.load_balancer_class.clone(),
            ..Default::default()
        }),
        status: None,
    }
}

/// As many as an update may take away, and at least one, or a node could never be emptied. Pods that are not ready do not
/// stand in the way: they serve nobody, or are being drained and go on with that when they are told to terminate.
pub fn disruption_budget(
    name: &str,
    namespace: &str,
    pool: &GatewayPoolSpec,
    owner: OwnerReference,
) -> PodDisruptionBudget {
    let most = match &pool.update.max_unavailable {
        IntOrString::Int(count) => IntOrString::Int((*count).max(1)),
        IntOrString::String(percent) if percent == "0%" => IntOrString::Int(1),
        percent => percent.clone(),
    };
    PodDisruptionBudget {
        metadata: metadata(name, namespace, pool, owner),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(most),
            selector: Some(LabelSelector { match_labels: Some(selector(name, pool)), ..Default::default() }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..Default::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> OwnerReference {
        OwnerReference { name: "edge".to_owned(), ..Default::default() }
    }

    #[test]
    fn what_is_exposed_is_what_is_listened_on() {
        let mut pool = GatewayPoolSpec::of("chat");
        for (kind, expected, policy) in [
            (ExposureType::ClusterIP, "ClusterIP", None),
            (ExposureType::HostPort, "ClusterIP", None),
            (ExposureType::NodePort, "NodePort", None),
            (ExposureType::LoadBalancer, "LoadBalancer", Some("Local")),
        ] {
            pool.exposure.kind = kind;
            let service = service("edge", "push", &pool, owner());
            assert_eq!(service.metadata.name.as_deref(), Some("edge-gateways"));
            let spec = service.spec.unwrap();
            assert_eq!(spec.type_.as_deref(), Some(expected));
            assert_eq!(spec.external_traffic_policy.as_deref(), policy);
            let ports: Vec<_> =
                spec.ports.unwrap().into_iter().map(|port| (port.name.unwrap(), port.port)).collect();
            assert_eq!(ports, [("mqtt".to_owned(), 1883), ("ws".to_owned(), 8083)]);
            assert_eq!(spec.selector.unwrap()["carillon.dev/pool"], "edge");
        }
    }

    #[test]
    fn a_node_can_always_be_emptied() {
        let mut pool = GatewayPoolSpec::of("chat");
        for (unavailable, expected) in [
            (IntOrString::Int(0), IntOrString::Int(1)),
            (IntOrString::Int(3), IntOrString::Int(3)),
            (IntOrString::String("0%".to_owned()), IntOrString::Int(1)),
            (IntOrString::String("25%".to_owned()), IntOrString::String("25%".to_owned())),
        ] {
            pool.update.max_unavailable = unavailable;
            let budget = disruption_budget("edge", "push", &pool, owner()).spec.unwrap();
            assert_eq!(budget.max_unavailable, Some(expected));
            assert_eq!(budget.unhealthy_pod_eviction_policy.as_deref(), Some("AlwaysAllow"));
        }
    }
}
