//! The reference of all fields, from the same schemas that Kubernetes is given.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;

const INTRODUCTION: &str = "\
# Resources

<!-- Generated from operator/api by `make crds`: change it there. -->

All of them are namespaced, of group `carillon.dev/v1alpha1`; `kubectl get carillon` lists them. A field that is not given has
its default, unless it is **required**. What cannot be is refused when it is applied, with a message that says why; what only
the keeper can tell is told by a condition. Sizes are Kubernetes quantities (`10Gi`), times are whole seconds or milliseconds,
as the field's name says.
";

/// Types of Kubernetes' own: named, not repeated. Field, and what it is.
const OF_KUBERNETES: [(&str, &str); 8] = [
    (
        "resources",
        "[ResourceRequirements](https://kubernetes.io/docs/concepts/configuration/manage-resources-containers/)",
    ),
    (
        "env",
        "list of [EnvVar](https://kubernetes.io/docs/tasks/inject-data-application/define-environment-variable-container/)",
    ),
    (
        "tolerations",
        "list of [Toleration](https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/)",
    ),
    ("affinity", "[Affinity](https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/)"),
    (
        "topologySpreadConstraints",
        "list of [TopologySpreadConstraint](https://kubernetes.io/docs/concepts/scheduling-eviction/topology-spread-constraints/)",
    ),
    ("imagePullSecrets", "list of `{name}`"),
    ("conditions", "list of Condition"),
    ("config", "map of documents"),
];

/// docs/resources.md.
pub fn page(crds: &[CustomResourceDefinition]) -> String {
    let mut page = INTRODUCTION.to_owned();
    for crd in crds {
        let names = &crd.spec.names;
        let Some(version) = crd.spec.versions.first() else { continue };
        let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
        let schema = serde_json::to_value(schema).unwrap_or_default();
        let short = names.short_names.iter().flatten().map(|name| format!("`{name}`"));
        let short = short.collect::<Vec<_>>().join(", ");
        let _ = write!(page, "\n## {}\n\n{}\n", names.kind, text(&schema["description"]));
        let _ = write!(page, "\n`kubectl get {}`, short {short}", names.plural);
        if version.subresources.as_ref().is_some_and(|subresources| subresources.scale.is_some()) {
            let _ = write!(page, "; `kubectl scale` and autoscalers work on it");
        }
        page.push_str(".\n");
        for rule in rules(&schema) {
            let _ = writeln!(page, "\nRule: {rule}.");
        }
        for part in ["spec", "status"] {
            let of = &schema["properties"][part];
            let _ = write!(page, "\n### {}, `{part}`\n\n", names.kind);
            for rule in rules(of) {
                let _ = write!(page, "Rule: {rule}.\n\n");
            }
            page.push_str("| field | type | default | |\n| --- | --- | --- | --- |\n");
            rows(&mut page, "", of, part == "status");
        }
    }
    page
}

/// A row for each field of an object, and for those of the objects in it.
fn rows(page: &mut String, prefix: &str, schema: &Value, is_status: bool) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let is_required = |name: &str| {
        schema["required"].as_array().is_some_and(|names| names.iter().any(|required| required == name))
    };
    for (name, field) in properties {
        let path = format!("{prefix}{name}");
        let of_kubernetes = OF_KUBERNETES.iter().find(|(known, _)| known == name);
        let type_ = of_kubernetes.map_or_else(|| type_of(field), |(_, type_)| (*type_).to_owned());
        let default = match &field["default"] {
            _ if is_required(name) && !is_status => "**required**".to_owned(),
            // An object's default is that of its fields, which have rows of their own.
            Value::Null | Value::Object(_) => String::new(),
            default => format!("`{default}`"),
        };
        let mut about = text(&field["description"]);
        for rule in rules(field).into_iter().chain(rules(&field["items"])) {
            let _ = write!(about, " Rule: {rule}.");
        }
        let _ = writeln!(page, "| `{path}` | {type_} | {default} | {} |", about.trim().replace('|', "\\|"));
        if of_kubernetes.is_none() {
            rows(page, &format!("{path}."), field, is_status);
            rows(page, &format!("{path}[]."), &field["items"], is_status);
        }
    }
}

fn type_of(field: &Value) -> String {
    if field["x-kubernetes-int-or-string"] == true {
        return if text(&field["description"]).contains("percentage") {
            "number or percentage".to_owned()
        } else {
            "quantity".to_owned()
        };
    }
    if let Some(values) = field["enum"].as_array() {
        return values.iter().map(|value| format!("`{}`", text(value))).collect::<Vec<_>>().join(", ");
    }
    match field["type"].as_str() {
        Some("array") => format!("list of {}{}", type_of(&field["items"]), most(field, "maxItems")),
        Some("object") if field["additionalProperties"].is_object() => {
            format!("map of {}", type_of(&field["additionalProperties"]))
        }
        Some("integer" | "number") => match (field["minimum"].as_f64(), field["maximum"].as_f64()) {
            (Some(low), Some(high)) => format!("number, {low} to {high}"),
            (Some(low), None) => format!("number, at least {low}"),
            (None, Some(high)) => format!("number, at most {high}"),
            (None, None) => "number".to_owned(),
        },
        Some("string") if field["format"] == "date-time" => "time".to_owned(),
        Some("string") => format!("string{}", most(field, "maxLength")),
        Some(other) => other.to_owned(),
        None => "any".to_owned(),
    }
}

fn most(field: &Value, of: &str) -> String {
    field[of].as_u64().map(|most| format!(", at most {most}")).unwrap_or_default()
}

/// What the schema's rules say when they do not hold.
fn rules(schema: &Value) -> Vec<String> {
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    rules.map(|rule| text(&rule["message"])).collect()
}

/// On one line.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}
