//! Comparing documents, and what is said of those that are refused.

use serde_json::json;

use super::*;

fn fields(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn a_document_is_the_same_however_it_is_written() {
    let wanted = fields(json!({"limits": {"a": 1, "b": [1, 2]}, "name": "x"}));
    for same in
        ["name: x\nlimits: {b: [1, 2.0], a: 1}\n", "{\"limits\": {\"a\": 1, \"b\": [1, 2]}, \"name\": \"x\"}"]
    {
        assert!(is_same(same, &wanted), "{same}");
    }
    for other in [
        "name: x",
        "name: x\nlimits: {b: [2, 1], a: 1}",
        "name: x\nlimits: {a: 1, b: [1, 2]}\nmore: 1",
        "- 1",
        "{",
    ] {
        assert!(!is_same(other, &wanted), "{other}");
    }
    assert!(is_same("", &Map::new()) && is_same("{}", &Map::new()) && !is_same("a: 1", &Map::new()));
    assert!(is_same(&yaml(&wanted).unwrap(), &wanted));
}

#[test]
fn what_is_refused_is_said_with_its_path() {
    let violations: Vec<Violation> =
        (0..10).map(|i| Violation::new(format!("limits.l{i}"), "is too much")).collect();
    let text = refused("gateway", &violations);
    assert!(
        text.starts_with("spec.config.gateway.limits.l0: is too much; spec.config.gateway.limits.l1"),
        "{text}"
    );
    assert!(text.ends_with("; and 2 more"), "{text}");
    assert_eq!(refused("hub", &[Violation::new("", "is too long")]), "spec.config.hub: is too long");
}

#[test]
fn a_refusal_counts_more_than_a_keeper_that_is_away() {
    let lost = (UNREACHABLE, "hub: away".to_owned());
    let refused = ("Refused", "gateway: no".to_owned());
    assert_eq!(summed_up(Vec::new()), Accepted::Yes);
    assert_eq!(summed_up(vec![lost.clone()]), Accepted::Unknown("hub: away".to_owned()));
    let no = Accepted::No { reason: "Refused", message: "gateway: no".to_owned() };
    assert_eq!(summed_up(vec![lost, refused]), no);
}
