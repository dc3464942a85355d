//! The objects as they are sent. A change of the files here restarts the pods of every cluster when its operator is replaced.

use carillon_operator_api::PushClusterSpec;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::names::{Names, Part};
use crate::cluster::pods::Image;
use crate::cluster::{hub, keeper, services};

fn names() -> Names {
    Names::new("push", "chat")
}

fn spec(value: Value) -> PushClusterSpec {
    serde_json::from_value(value).unwrap()
}

fn image() -> Image {
    Image { name: "carillon:1".to_owned(), pull_policy: Some("Never".to_owned()) }
}

/// Compares with a file; CARILLON_BLESS=1 writes it.
fn is_as_in(file: &str, object: &impl Serialize) {
    let path = format!("{}/src/cluster/testdata/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = serde_yaml::to_string(object).unwrap();
    if std::env::var_os("CARILLON_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{file}: if it is meant, CARILLON_BLESS=1");
}

#[test]
fn a_cluster_of_defaults_is_as_in_the_files() {
    let spec = spec(json!({}));
    is_as_in("keeper.yaml", &keeper::keepers(&names(), &spec, &image(), 3));
    is_as_in("hub.yaml", &hub::hubs(&names(), &spec, &image()));
    is_as_in("peers.yaml", &keeper::peers(&names(), 3));
    is_as_in("services.yaml", &services::services(&names(), &spec.api));
    is_as_in("budget.yaml", &services::budget(&names(), Part::Keeper));
}

#[test]
fn how_many_keepers_there_are_is_not_in_their_template() {
    let spec = spec(json!({}));
    let template = |places| keeper::keepers(&names(), &spec, &image(), places).spec.unwrap().template;
    assert_eq!(template(3), template(4));
    for places in [1, 3, 5] {
        assert_eq!(keeper::places(&names(), &keeper::peers(&names(), places)), Some(places));
    }
    let other = keeper::peers(&Names::new("push", "other"), 3);
    assert_eq!(keeper::places(&names(), &other), None);
}

#[test]
fn what_is_said_of_pods_is_in_them() {
    let spec = spec(json!({
        "image": "registry/carillon:2",
        "imagePullPolicy": "Always",
        "imagePullSecrets": [{"name": "all"}],
        "keeper": {
            "labels": {"team": "push"}, "annotations": {"a": "b"}, "nodeSelector": {"disk": "fast"},
            "resources": {"limits": {"memory": "1Gi"}}, "priorityClassName": "high",
            "env": [{"name": "CARILLON_LOG_LEVEL", "value": "debug"}, {"name": "POD_NAME", "value": "evil"}],
            "tolerations": [{"key": "k", "operator": "Exists"}],
            "topologySpreadConstraints": [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}],
            "storage": {"size": "5Gi", "storageClassName": "fast"},
        },
        "hub": {"image": "carillon:1", "imagePullSecrets": [{"name": "own"}]},
        "api": {"type": "LoadBalancer", "annotations": {"lb": "inner"}},
    }));
    let set = serde_json::to_value(keeper::keepers(&names(), &spec, &image(), 3)).unwrap();
    let template = &set["spec"]["template"];
    let pod = &template["spec"];
    assert_eq!(template["metadata"]["labels"]["team"], "push");
    assert_eq!(template["metadata"]["labels"]["carillon.dev/cluster"], "chat");
    assert_eq!(template["metadata"]["annotations"], json!({"a": "b"}));
    assert_eq!(pod["nodeSelector"], json!({"disk": "fast"}));
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "all"}]));
    assert_eq!(pod["priorityClassName"], "high");
    assert_eq!(pod["tolerations"][0]["key"], "k");
    assert_eq!(pod["topologySpreadConstraints"].as_array().unwrap().len(), 1);
    let container = &pod["containers"][0];
    assert_eq!(container["image"], "registry/carillon:2");
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["resources"], json!({"limits": {"memory": "1Gi"}}));
    let env: Vec<&str> =
        container["env"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(
        env,
        ["POD_NAME", "CARILLON_PEERS", "CARILLON_LOG_LEVEL"],
        "what the operator needs is not overwritten"
    );
    assert!(container["env"][0]["valueFrom"].is_object());
    let claim = &set["spec"]["volumeClaimTemplates"][0]["spec"];
    assert_eq!(claim["resources"]["requests"]["storage"], "5Gi");
    assert_eq!(claim["storageClassName"], "fast");

    let set = serde_json::to_value(hub::hubs(&names(), &spec, &image())).unwrap();
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "own"}]));
    assert_eq!(pod["containers"][0]["image"], "carillon:1");
    let api = serde_json::to_value(services::services(&names(), &spec.api).pop().unwrap()).unwrap();
    assert_eq!(
        (&api["spec"]["type"], &api["metadata"]["annotations"]["lb"]),
        (&json!("LoadBalancer"), &json!("inner"))
    );
}
