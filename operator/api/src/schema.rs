//! The definitions as they are given to Kubernetes: what the derive makes, without what the API server does not take or
//! nobody reads.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::Value;

use crate::{App, GatewayPool, Profile, PushCluster};

/// Formats of numbers that the API server knows; others are answered with a warning at each apply.
const NUMBER_FORMATS: [&str; 4] = ["int32", "int64", "float", "double"];

/// Fields that hold types of Kubernetes' own core. `kubectl explain pod.spec` tells of them: with all of that text, the
/// definitions would be too large for `kubectl apply`.
const OF_THE_CORE: [&str; 6] =
    ["resources", "env", "tolerations", "affinity", "topologySpreadConstraints", "imagePullSecrets"];

/// The definitions of all resources, by name.
pub fn crds() -> Vec<CustomResourceDefinition> {
    let mut crds = vec![App::crd(), GatewayPool::crd(), Profile::crd(), PushCluster::crd()];
    for crd in &mut crds {
        for version in &mut crd.spec.versions {
            let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
            let Some(schema) = schema else { continue };
            let Ok(mut value) = serde_json::to_value(&*schema) else { continue };
            tidy(&mut value);
            if let Ok(tidied) = serde_json::from_value(value) {
                *schema = tidied;
            }
        }
    }
    crds
}

/// Free-form documents by kind.
pub(crate) fn documents(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
    })
}

/// One schema and all below it.
fn tidy(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    // A null is the same as nothing, without it being kept.
    fields.remove("nullable");
    fields.remove("title");
    if fields.contains_key("x-kubernetes-int-or-string") {
        fields.remove("format");
    }
    if let Some(Value::String(format)) = fields.get("format") {
        let is_number = matches!(fields.get("type").and_then(Value::as_str), Some("integer" | "number"));
        if is_number && !NUMBER_FORMATS.contains(&format.as_str()) {
            fields.remove("format");
        }
    }
    if let Some(Value::Object(properties)) = fields.get_mut("properties") {
        for (name, property) in properties.iter_mut() {
            if OF_THE_CORE.contains(&name.as_str()) {
                forget_descriptions_below(property);
            }
            tidy(property);
        }
    }
    for below in ["items", "additionalProperties"] {
        if let Some(below) = fields.get_mut(below) {
            tidy(below);
        }
    }
}

fn forget_descriptions_below(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    let mut forget = |below: &mut Value| {
        if let Some(fields) = below.as_object_mut() {
            fields.remove("description");
        }
        forget_descriptions_below(below);
    };
    if let Some(properties) = fields.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(&mut forget);
    }
    for below in ["items", "additionalProperties"] {
        if let Some(below) = fields.get_mut(below) {
            forget(below);
        }
    }
}
