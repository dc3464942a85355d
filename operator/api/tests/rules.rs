//! Each rule of the schemas is in tests/refused.yaml; `tests/tests/resources.rs` asks a real API server about all of it.

use carillon_operator_api::crds;
use serde::Deserialize;
use serde_json::Value;

/// The part of a case that is read here.
#[derive(Deserialize)]
struct Case {
    refused: Option<String>,
}

fn cases() -> Vec<Case> {
    serde_yaml::from_str(include_str!("refused.yaml")).unwrap()
}

fn schema(kind: &str) -> Value {
    let crd = crds().into_iter().find(|crd| crd.spec.names.kind == kind).unwrap();
    let schema = crd.spec.versions[0].schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
    serde_json::to_value(schema).unwrap()
}

#[test]
fn each_rule_is_in_the_table() {
    let mut found = Vec::new();
    for crd in crds() {
        messages(&schema(&crd.spec.names.kind), &mut found);
    }
    assert!(found.len() > 30, "{found:?}");
    let cases = cases();
    for message in found {
        let shown = cases.iter().filter_map(|case| case.refused.as_ref()).any(|refused| message == *refused);
        assert!(shown, "no case is refused with {message:?}");
    }
}

fn messages(schema: &Value, found: &mut Vec<String>) {
    match schema {
        Value::Object(fields) => {
            for rule in fields.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten()
            {
                found.push(rule["message"].as_str().expect("every rule has a message").to_owned());
            }
            fields.values().for_each(|below| messages(below, found));
        }
        Value::Array(list) => list.iter().for_each(|below| messages(below, found)),
        _ => {}
    }
}

/// `kubectl apply` puts the whole definition into an annotation.
#[test]
fn definitions_are_small_enough_to_be_applied() {
    for crd in crds() {
        let size = serde_json::to_string(&crd).unwrap().len();
        assert!(size < 200_000, "{}: {size} bytes", crd.spec.names.kind);
    }
}
