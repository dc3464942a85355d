//! The custom resources before a real API server: what it takes and what it refuses, defaults, columns, scale, and several
//! who write to one resource.

use std::path::{Path, PathBuf};

use carillon_operator_api::{AppSpec, GatewayPoolSpec, PushClusterSpec};
use carillon_tests::kubernetes::{Kubernetes, Namespace};
use serde::Deserialize;
use serde_json::{Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A namespace in a cluster that knows the resources.
async fn namespace(name: &str) -> Option<Namespace> {
    let cluster = Kubernetes::api().await?;
    let crds = root().join("crds");
    let apply = ["apply", "--server-side", "--force-conflicts", "--filename", crds.to_str().unwrap()];
    let output = cluster.try_kubectl(&apply).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(told, "", "a definition that is warned of");
    for kind in ["apps", "gatewaypools", "profiles", "pushclusters"] {
        let name = format!("crd/{kind}.carillon.dev");
        cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &name]).await;
    }
    Some(cluster.namespace(name).await)
}

async fn json(space: &Namespace, what: &str) -> Value {
    serde_json::from_str(&space.kubectl(&["get", what, "--output", "json"]).await).unwrap()
}

fn resource(kind: &str, name: &str, spec: &Value) -> String {
    let resource = json!({
        "apiVersion": "carillon.dev/v1alpha1", "kind": kind, "metadata": { "name": name }, "spec": spec,
    });
    resource.to_string()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    why: String,
    kind: String,
    name: Option<String>,
    spec: Value,
    before: Option<Value>,
    refused: Option<String>,
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_words_that_help() {
    let Some(space) = namespace("refused").await else { return };
    let table = root().join("operator/api/tests/refused.yaml");
    let cases: Vec<Case> = serde_yaml::from_str(&std::fs::read_to_string(table).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let name = case.name.clone().unwrap_or_else(|| format!("case-{i}"));
        if let Some(before) = &case.before {
            space.apply(&resource(&case.kind, &name, before)).await;
        }
        let output = space.try_apply(&resource(&case.kind, &name, &case.spec)).await;
        let told = String::from_utf8_lossy(&output.stderr);
        let fits = match &case.refused {
            Some(refused) => !output.status.success() && told.contains(refused.as_str()),
            None => output.status.success(),
        };
        if !fits {
            wrong.push(format!("{} ({}): {told}", case.why, case.kind));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[tokio::test]
async fn defaults_are_those_of_the_types() {
    let Some(space) = namespace("defaults").await else { return };
    space.apply(&resource("PushCluster", "main", &json!({}))).await;
    space.apply(&resource("GatewayPool", "edge", &json!({ "cluster": "main" }))).await;
    space.apply(&resource("App", "demo", &json!({ "cluster": "main" }))).await;
    let profile = json!({ "cluster": "main", "target": { "pool": "edge" } });
    space.apply(&resource("Profile", "once", &profile)).await;
    for (what, spec) in [
        ("pushcluster/main", serde_json::to_value(PushClusterSpec::default()).unwrap()),
        ("gatewaypool/edge", serde_json::to_value(GatewayPoolSpec::of("main")).unwrap()),
        ("app.carillon.dev/demo", serde_json::to_value(AppSpec::of("main")).unwrap()),
        (
            "profile/once",
            json!({
                "cluster": "main", "target": { "pool": "edge" },
                "kind": "cpu", "seconds": 30, "ttlSeconds": 86_400,
            }),
        ),
    ] {
        assert_eq!(json(&space, what).await["spec"], spec, "{what}");
    }
    // What is nothing is not kept, and a part of an object has its own defaults.
    let spec = json!({ "cluster": "main", "autoscaling": null, "drain": { "ratePerSecond": 7 } });
    space.apply(&resource("GatewayPool", "parts", &spec)).await;
    let spec = json(&space, "gatewaypool/parts").await["spec"].clone();
    assert_eq!(spec["drain"], json!({ "ratePerSecond": 7, "deadlineSeconds": 600 }));
    assert_eq!(spec.get("autoscaling"), None);
}

#[tokio::test]
async fn pools_are_scaled_and_listed() {
    let Some(space) = namespace("scaled").await else { return };
    space.apply(&resource("GatewayPool", "edge", &json!({ "cluster": "main", "replicas": 2 }))).await;
    let status = json!({ "status": {
        "replicas": 3, "readyReplicas": 2, "updatedReplicas": 1, "draining": 1, "connections": 12_000,
        "selector": "carillon.dev/pool=edge",
        "conditions": [{
            "type": "Ready", "status": "False", "reason": "Updating", "message": "1 of 3 gateways is new",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
        }],
    }});
    let patch = ["patch", "gatewaypool/edge", "--subresource=status", "--type=merge", "--patch"];
    let status = status.to_string();
    space.kubectl(&[&patch[..], &[&status]].concat()).await;

    space.kubectl(&["scale", "gatewaypool/edge", "--replicas=4"]).await;
    let scale = space.kubectl(&["get", "gatewaypool/edge", "--subresource=scale", "--output", "json"]).await;
    let scale: Value = serde_json::from_str(&scale).unwrap();
    assert_eq!(scale["spec"]["replicas"], 4);
    assert_eq!(scale["status"], json!({ "replicas": 3, "selector": "carillon.dev/pool=edge" }));
    assert_eq!(json(&space, "gatewaypool/edge").await["spec"]["replicas"], 4);

    let listed = space.kubectl(&["get", "gatewaypools"]).await;
    let rows: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NAME", "DESIRED", "READY", "UPDATED", "CONNECTIONS", "DRAINING", "AGE"]);
    assert_eq!(rows[1][..6], ["edge", "4", "2", "1", "12000", "1"]);
    let wide = space.kubectl(&["get", "gwp", "--output", "wide"]).await;
    assert!(wide.contains("CLUSTER") && wide.contains("1 of 3 gateways is new"), "{wide}");
}

#[tokio::test]
async fn resources_are_found_by_their_short_names_and_together() {
    let Some(space) = namespace("names").await else { return };
    let quickstart = std::fs::read_to_string(root().join("examples/quickstart.yaml")).unwrap();
    space.apply(&quickstart).await;
    let profile = json!({ "cluster": "main", "target": { "role": "hub" } });
    space.apply(&resource("Profile", "once", &profile)).await;
    let all = space.kubectl(&["get", "carillon", "--output", "name"]).await;
    let mut all: Vec<&str> = all.lines().collect();
    all.sort_unstable();
    let expected = [
        "app.carillon.dev/demo",
        "gatewaypool.carillon.dev/edge",
        "profile.carillon.dev/once",
        "pushcluster.carillon.dev/main",
    ];
    assert_eq!(all, expected);
    for (short, name) in [("pcl", "main"), ("gwp", "edge"), ("capp", "demo"), ("cprof", "once")] {
        let found = space.kubectl(&["get", short, "--no-headers"]).await;
        assert_eq!(found.split_whitespace().next(), Some(name), "{short}: {found}");
    }
    let of_main = ["get", "gwp", "--field-selector", "spec.cluster=main", "--output", "name"];
    assert_eq!(space.kubectl(&of_main).await.trim(), "gatewaypool.carillon.dev/edge");
    let told = space.kubectl(&["explain", "gatewaypool.spec.drain.ratePerSecond"]).await;
    let told: Vec<&str> = told.split_whitespace().collect();
    assert!(told.join(" ").contains("a million take 33 minutes at 500"), "{told:?}");
}

/// `kubectl apply --server-side` of one who writes.
async fn apply_as(space: &Namespace, manager: &str, yaml: &str) -> std::process::Output {
    let file = tempfile::NamedTempFile::with_suffix(".json").unwrap();
    std::fs::write(file.path(), yaml).unwrap();
    let manager = format!("--field-manager={manager}");
    let path = file.path().to_str().unwrap();
    space.try_kubectl(&["apply", "--server-side", &manager, "--filename", path]).await
}

#[tokio::test]
async fn several_may_write_to_one_resource() {
    let Some(space) = namespace("several").await else { return };
    let one = resource(
        "GatewayPool",
        "edge",
        &json!({
            "cluster": "main",
            "listeners": [{ "name": "mqtt", "protocol": "mqtt", "port": 1883 }],
            "template": { "env": [{ "name": "A", "value": "1" }] },
        }),
    );
    let two = resource(
        "GatewayPool",
        "edge",
        &json!({
            "cluster": "main",
            "listeners": [{ "name": "ws", "protocol": "ws", "port": 8083 }],
            "template": { "env": [{ "name": "B", "value": "2" }], "labels": { "team": "push" } },
        }),
    );
    for (manager, yaml) in [("one", &one), ("two", &two), ("one", &one)] {
        let output = apply_as(&space, manager, yaml).await;
        assert!(output.status.success(), "{manager}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let pool = json(&space, "gatewaypool/edge").await;
    let names = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&pool["spec"]["listeners"]), ["mqtt", "ws"]);
    assert_eq!(names(&pool["spec"]["template"]["env"]), ["A", "B"]);
    // The same again is no change.
    assert!(apply_as(&space, "two", &two).await.status.success());
    let again = json(&space, "gatewaypool/edge").await;
    assert_eq!(pool["metadata"]["resourceVersion"], again["metadata"]["resourceVersion"]);
    assert_eq!(again["metadata"]["generation"], pool["metadata"]["generation"]);
    // Another value for what is somebody else's is told, not taken.
    let other = one.replace("1883", "1884");
    let output = apply_as(&space, "two", &other).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("conflict with \"one\""), "{told}");
}
