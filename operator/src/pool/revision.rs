//! What makes a pod another one: a short hash of what people have written about it.
//!
//! Only that. What the operator adds by itself (its own image among it) is not in it, or its upgrade would replace every
//! gateway; nor is what gateways follow while they run. A field that is not given is as if it did not exist, so that a
//! later version's fields change nothing either.

use std::fmt::Write;

use carillon_operator_api::{GatewayPoolSpec, PushClusterSpec};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

/// Ten hexadecimal digits: the value of the label `carillon.dev/revision`.
pub fn revision(cluster: &PushClusterSpec, pool: &GatewayPoolSpec) -> String {
    let template = &pool.template;
    let pull_secrets = match template.image_pull_secrets.as_slice() {
        [] => &cluster.image_pull_secrets,
        own => own,
    };
    let mut listeners = pool.listeners.clone();
    listeners.sort_by(|a, b| a.name.cmp(&b.name));
    let made_of = json!({
        "template": template,
        "image": template.image.as_ref().or(cluster.image.as_ref()),
        "imagePullPolicy": template.image_pull_policy.or(cluster.image_pull_policy),
        "imagePullSecrets": pull_secrets,
        "listeners": listeners,
        "exposure": pool.exposure.kind,
        "advertisedHost": pool.exposure.advertised_host,
    });
    let mut text = String::new();
    write_canonical(&made_of, &mut text);
    format!("{:010x}", xxh3_64(text.as_bytes()) >> 24)
}

/// Keys in order; nothing of what is null, an empty list or false, which is the same as not given. An empty object may mean
/// something: resources without any, a selector of everything.
fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().filter(|(_, value)| !is_nothing(value)).collect();
            fields.sort_by_key(|(name, _)| *name);
            text.push('{');
            for (name, value) in fields {
                let _ = write!(text, "{name:?}:");
                write_canonical(value, text);
                text.push(',');
            }
            text.push('}');
        }
        Value::Array(values) => {
            text.push('[');
            for value in values {
                write_canonical(value, text);
                text.push(',');
            }
            text.push(']');
        }
        other => _ = write!(text, "{other}"),
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use carillon_operator_api::{
        AutoscalingSpec, ExposureType, ImagePullPolicy, Listener, Protocol, PushClusterSpec,
    };
    use k8s_openapi::api::core::v1::{LocalObjectReference, Toleration};
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    use super::*;

    type Change = fn(&mut PushClusterSpec, &mut GatewayPoolSpec);

    fn changed(change: Change) -> bool {
        let (mut cluster, mut pool) = (PushClusterSpec::default(), GatewayPoolSpec::of("chat"));
        let before = revision(&cluster, &pool);
        change(&mut cluster, &mut pool);
        before != revision(&cluster, &pool)
    }

    /// An operator of a later version must come to the same: if this fails, every gateway of everyone would be replaced.
    #[test]
    fn it_is_the_same_in_all_versions() {
        assert_eq!(revision(&PushClusterSpec::default(), &GatewayPoolSpec::of("chat")), "678a7c3100");
    }

    #[test]
    fn what_a_pod_is_made_of_changes_it() {
        let changes: [(&str, Change); 12] = [
            ("image", |_, pool| pool.template.image = Some("carillon:2".to_owned())),
            ("image of the cluster", |cluster, _| cluster.image = Some("carillon:2".to_owned())),
            ("pull policy", |cluster, _| cluster.image_pull_policy = Some(ImagePullPolicy::Always)),
            ("pull secrets", |cluster, _| {
                cluster.image_pull_secrets = vec![LocalObjectReference { name: "registry".to_owned() }];
            }),
            ("labels", |_, pool| _ = pool.template.labels.insert("team".to_owned(), "push".to_owned())),
            ("resources", |_, pool| pool.template.resources = Some(Default::default())),
            ("tolerations", |_, pool| pool.template.tolerations = vec![Toleration::default(); 2]),
            ("a port", |_, pool| pool.listeners[0].port = 1884),
            ("a listener", |_, pool| _ = pool.listeners.pop()),
            ("PROXY protocol", |_, pool| pool.listeners[0].proxy_protocol = true),
            ("host ports", |_, pool| pool.exposure.kind = ExposureType::HostPort),
            ("what devices are told", |_, pool| {
                pool.exposure.advertised_host = Some("edge.example.com".to_owned());
            }),
        ];
        for (what, change) in changes {
            assert!(changed(change), "{what}");
        }
    }

    #[test]
    fn what_is_followed_live_does_not() {
        let changes: [(&str, Change); 11] = [
            ("replicas", |_, pool| pool.replicas = 7),
            ("limits", |_, pool| pool.limits.connections = Some(5)),
            ("drain rate", |_, pool| pool.drain.rate_per_second = 5),
            ("drain deadline", |_, pool| pool.drain.deadline_seconds = 5),
            ("update", |_, pool| pool.update.max_surge = IntOrString::Int(3)),
            ("paused", |_, pool| pool.update.paused = true),
            ("rebalance", |_, pool| pool.rebalance.enabled = false),
            ("autoscaling", |_, pool| {
                pool.autoscaling = Some(AutoscalingSpec {
                    min: 1,
                    max: 2,
                    connections_per_pod: 5,
                    stabilization_seconds: 5,
                });
            }),
            ("annotations of the Service", |_, pool| {
                pool.exposure.annotations.insert("a".to_owned(), "b".to_owned());
            }),
            ("order of the listeners", |_, pool| pool.listeners.reverse()),
            ("the cluster's other parts", |cluster, _| {
                cluster.keeper.replicas = 5;
                cluster.root_app = Some("demo".to_owned());
            }),
        ];
        for (what, change) in changes {
            assert!(!changed(change), "{what}");
        }
        // The same image, said elsewhere.
        let mut cluster = PushClusterSpec { image: Some("carillon:2".to_owned()), ..Default::default() };
        let mut pool = GatewayPoolSpec::of("chat");
        let before = revision(&cluster, &pool);
        pool.listeners.push(Listener {
            name: "tls".to_owned(),
            protocol: Protocol::Mqtts,
            port: 8883,
            tls_secret_name: Some("edge".to_owned()),
            proxy_protocol: false,
        });
        assert_ne!(before, revision(&cluster, &pool));
        pool.listeners.pop();
        cluster.hub.replicas = 1;
        assert_eq!(before, revision(&cluster, &pool));
    }
}
