//! The operator as a process, against a real API server and a real keeper: who acts, and what becomes of apps.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use carillon_tests::carillon;
use carillon_tests::keepers::{KeeperProcess, free_address, patiently};
use carillon_tests::kubernetes::{Kubernetes, Namespace, PATIENCE};
use serde_json::{Value, json};
use tokio::process::Child;

/// A namespace, in a cluster that knows the resources.
async fn namespace(name: &str) -> Option<Namespace> {
    let cluster = Kubernetes::api().await?;
    let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../crds");
    cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", crds]).await;
    for kind in ["apps", "pushclusters"] {
        let name = format!("crd/{kind}.carillon.dev");
        cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &name]).await;
    }
    Some(cluster.namespace(name).await)
}

/// A running operator that looks after one namespace.
struct Operator {
    child: Child,
    ops: SocketAddr,
    logs: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Operator {
    fn start(space: &Namespace, identity: &str, keeper: &str) -> Operator {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("log");
        let ops = free_address();
        let mut command = carillon(&["operator", "--lease-seconds", "6", "--log-format", "text"]);
        command.args(["--namespace", &space.name, "--lease-namespace", &space.name, "--identity", identity]);
        command.args(["--keeper-address", keeper, "--ops", &ops.to_string()]);
        command.env("KUBECONFIG", &space.cluster.kubeconfig);
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&logs).unwrap());
        Operator { child: command.spawn().unwrap(), ops, logs, _dir: dir }
    }

    async fn get(&self, path: &str) -> Result<String, String> {
        let answer =
            reqwest::get(format!("http://{}{path}", self.ops)).await.map_err(|error| error.to_string())?;
        let is_ok = answer.status().is_success();
        let text = answer.text().await.map_err(|error| error.to_string())?;
        if is_ok { Ok(text) } else { Err(text) }
    }

    /// The sum of a metric over those of its series that have these labels.
    async fn metric(&self, name: &str, labels: &str) -> Result<f64, String> {
        let text = self.get("/metrics").await?;
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(labels));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    async fn leads(&self, expected: bool) {
        let ask = async || match self.metric("carillon_operator_leader_state", "").await? {
            state if (state == 1.0) == expected && self.get("/readyz").await.is_ok() => Ok(()),
            state => Err(format!("its state is {state}")),
        };
        let what = format!("an operator that is ready, and leads: {expected}");
        patiently(&what, PATIENCE, ask).await.unwrap_or_else(|error| panic!("{error}"));
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = self.child.id().expect("it runs");
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is its own.
        unsafe { libc::kill(pid as libc::pid_t, signal) };
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = std::fs::read_to_string(&self.logs).unwrap_or_default();
            eprintln!("--- the operator's log ---\n{logs}---");
        }
    }
}

#[tokio::test]
async fn one_of_several_acts_and_another_when_that_is_gone() {
    let Some(space) = namespace("lead").await else { return };
    let mut first = Operator::start(&space, "first", "http://127.0.0.1:1");
    first.leads(true).await;
    let second = Operator::start(&space, "second", "http://127.0.0.1:1");
    second.leads(false).await;
    // In order: the lease is given back.
    first.signal(libc::SIGTERM);
    let status = tokio::time::timeout(Duration::from_secs(30), first.child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    second.leads(true).await;
    // Out of order: whoever finds its lease with another acts no more, and ends with a reason.
    second.signal(libc::SIGSTOP);
    let third = Operator::start(&space, "third", "http://127.0.0.1:1");
    third.leads(true).await;
    let mut second = second;
    second.signal(libc::SIGCONT);
    let status = tokio::time::timeout(Duration::from_secs(60), second.child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(1));
    let logs = std::fs::read_to_string(&second.logs).unwrap();
    assert!(logs.contains("the operator cannot go on: the lease carillon-operator"), "{logs}");
    third.leads(true).await;
}

fn resource(kind: &str, name: &str, spec: &Value) -> String {
    let resource = json!({
        "apiVersion": "carillon.dev/v1alpha1", "kind": kind, "metadata": { "name": name }, "spec": spec,
    });
    resource.to_string()
}

fn secret(name: &str, key: &str) -> String {
    json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name }, "stringData": { "key": key } })
        .to_string()
}

/// Waits until the App's condition is as told; gives the App.
async fn app_is(space: &Namespace, name: &str, status: &str, message: &str) -> Value {
    let what = format!("app.carillon.dev/{name}");
    let wanted = |text: &str| {
        let app: Value = serde_json::from_str(text).unwrap_or_default();
        let current = app["status"]["observedGeneration"] == app["metadata"]["generation"];
        let conditions = app["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready =
            conditions.iter().find(|condition| condition["type"] == "Ready").cloned().unwrap_or_default();
        current && ready["status"] == status && ready["message"].as_str().unwrap_or("").contains(message)
    };
    let told = format!("{name} with Ready={status}: {message}");
    serde_json::from_str(&space.eventually(&told, &["get", &what, "--output", "json"], wanted).await).unwrap()
}

/// The document of an app at the keeper; None if there is none.
async fn document(keeper: &KeeperProcess, name: &str) -> Option<String> {
    let mut command = carillon(&["config", "get", &format!("app/{name}"), "--keeper", &keeper.endpoint()]);
    let output = command.output().await.unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

async fn has_key(keeper: &KeeperProcess, name: &str, key: &str) {
    let ask = async || match document(keeper, name).await {
        Some(text) if text.contains(key) => Ok(()),
        text => Err(format!("{text:?}")),
    };
    patiently(key, PATIENCE, ask).await.unwrap_or_else(|error| panic!("{error}"));
}

#[tokio::test]
async fn an_app_is_what_its_resource_and_secrets_say() {
    let Some(space) = namespace("apps").await else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = KeeperProcess::alone(dir.path());
    keeper.start();
    let operator = Operator::start(&space, "only", &keeper.endpoint());
    operator.leads(true).await;

    let spec = json!({
        "cluster": "main",
        "apiKeys": [{ "name": "shop", "secretRef": { "name": "keys", "key": "key" } }],
        "limits": { "maxPayloadBytes": 1000 },
    });
    space.apply(&resource("App", "shop", &spec)).await;
    app_is(&space, "shop", "False", "spec.cluster: there is no PushCluster main").await;
    space.apply(&resource("PushCluster", "main", &json!({}))).await;
    app_is(&space, "shop", "False", "spec.apiKeys[0].secretRef: there is no Secret keys").await;
    assert_eq!(document(&keeper, "shop").await, None, "not half of it");

    space.apply(&secret("keys", "short")).await;
    app_is(&space, "shop", "False", "spec.apiKeys[0].secretRef: is shorter than 16 characters").await;
    space.apply(&secret("keys", "the-first-key-of-the-shop")).await;
    let app = app_is(&space, "shop", "True", "the keeper has it as app/shop").await;
    let revision = app["status"]["revision"].as_i64().unwrap();
    let text = document(&keeper, "shop").await.expect("it is there");
    assert!(text.contains("the-first-key-of-the-shop") && text.contains("1000"), "{text}");

    // Nothing to be done is nothing done: neither here nor at the keeper.
    let before = operator.metric("carillon_operator_reconciles_total", "").await.unwrap();
    space.kubectl(&["annotate", "app.carillon.dev/shop", "team=push"]).await;
    let annotated: Value =
        serde_json::from_str(&space.kubectl(&["get", "app.carillon.dev/shop", "--output", "json"]).await)
            .unwrap();
    let ask = async || match operator.metric("carillon_operator_reconciles_total", "").await? {
        now if now > before => Ok(()),
        now => Err(format!("{now} reconciles")),
    };
    patiently("another reconcile", PATIENCE, ask).await.unwrap_or_else(|error| panic!("{error}"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after: Value =
        serde_json::from_str(&space.kubectl(&["get", "app.carillon.dev/shop", "--output", "json"]).await)
            .unwrap();
    assert_eq!(after["metadata"]["resourceVersion"], annotated["metadata"]["resourceVersion"]);
    assert_eq!(after["status"]["revision"], revision);

    // Another key in the Secret is another key at the keeper.
    space.apply(&secret("keys", "the-second-key-of-the-shop")).await;
    has_key(&keeper, "shop", "the-second-key-of-the-shop").await;
    // What somebody changes at the keeper is brought back.
    let mut command = carillon(&["config", "set", "app/shop", "limits.max_payload_bytes=7", "--keeper"]);
    assert!(command.arg(keeper.endpoint()).status().await.unwrap().success());
    space.kubectl(&["annotate", "app.carillon.dev/shop", "team=other", "--overwrite"]).await;
    has_key(&keeper, "shop", "1000").await;
    // The cluster says which app is its root.
    space.apply(&resource("PushCluster", "main", &json!({ "rootApp": "shop" }))).await;
    has_key(&keeper, "shop", "root: true").await;

    // A name is taken by who was first.
    space.apply(&resource("App", "late", &json!({ "cluster": "main", "name": "shop" }))).await;
    app_is(&space, "late", "False", "app shop is the App shop's already").await;
    space.kubectl(&["delete", "app.carillon.dev/late", "--timeout=60s"]).await;
    assert!(document(&keeper, "shop").await.is_some(), "it was not the late one's");

    let events = space.kubectl(&["get", "events.events.k8s.io", "--output", "json"]).await;
    for reason in ["ClusterNotFound", "KeyNotFound", "Refused", "Accepted", "NameTaken"] {
        assert!(events.contains(&format!("\"reason\": \"{reason}\"")), "no Event {reason}: {events}");
    }

    space.kubectl(&["delete", "app.carillon.dev/shop", "--timeout=60s"]).await;
    assert_eq!(document(&keeper, "shop").await, None);

    // A cluster that is gone holds nobody.
    space.apply(&resource("App", "left", &json!({ "cluster": "main" }))).await;
    app_is(&space, "left", "True", "").await;
    keeper.kill().await;
    space.kubectl(&["delete", "pushcluster/main"]).await;
    space.kubectl(&["delete", "app.carillon.dev/left", "--timeout=60s"]).await;
}
