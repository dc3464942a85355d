//! The rules of the schemas, without an API server: what tests/refused.yaml says of them is so. `tests/tests/resources.rs` asks a
//! real one, about all of it.

use carillon_operator_api::crds;
use kube::core::cel::Validator;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    why: String,
    kind: String,
    #[serde(default)]
    name: Option<String>,
    spec: Value,
    #[serde(default)]
    before: Option<Value>,
    #[serde(default)]
    refused: Option<String>,
    #[serde(default)]
    by: Option<String>,
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
fn rules_refuse_what_they_are_for_and_nothing_else() {
    let mut wrong = Vec::new();
    for case in cases().into_iter().filter(|case| case.by.is_none()) {
        let schema = schema(&case.kind);
        let name = case.name.as_deref().unwrap_or("x");
        let object = |spec: &Value| json!({ "metadata": { "name": name }, "spec": spec });
        let before = case.before.as_ref().map(object);
        let answer = Validator::new().validate_with_defaults(&schema, &object(&case.spec), before.as_ref());
        let found = match answer {
            Ok(()) => Vec::new(),
            Err(errors) => errors.as_slice().iter().map(ToString::to_string).collect::<Vec<_>>(),
        };
        let fits = match &case.refused {
            Some(refused) => found.iter().any(|error| error.contains(refused)),
            None => found.is_empty(),
        };
        if !fits {
            wrong.push(format!("{} ({}): {found:?}", case.why, case.kind));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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
