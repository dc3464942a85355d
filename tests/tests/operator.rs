//! The operator as a process, against a real API server and a real keeper: who acts, and what becomes of apps.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use carillon_tests::carillon;
use carillon_tests::keepers::{KeeperProcess, free_address, patiently};
use carillon_tests::kubernetes::{Kubernetes, Namespace, PATIENCE};
use serde_json::{Value, json};
use tokio::process::Child;

const ROLES: [&str; 2] = ["carillon-operator", "carillon-operator-lease"];

/// A namespace, in a cluster that knows the resources, and what the operator may do.
async fn namespace(name: &str) -> Option<Namespace> {
    let cluster = Kubernetes::api().await?;
    let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../crds");
    cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", crds]).await;
    let rbac = concat!(env!("CARGO_MANIFEST_DIR"), "/../operator/rbac.yaml");
    cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", rbac]).await;
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
    /// As a service account of that name, which may do what the operator's roles say.
    async fn start(space: &Namespace, identity: &str, keeper: &str) -> Operator {
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = dir.path().join("kubeconfig");
        std::fs::write(&kubeconfig, account(space, identity).await).unwrap();
        let logs = dir.path().join("log");
        let ops = free_address();
        let mut command = carillon(&["operator", "--lease-seconds", "6", "--log-format", "text"]);
        command.args(["--namespace", &space.name, "--lease-namespace", &space.name, "--identity", identity]);
        command.args(["--keeper-address", keeper, "--ops", &ops.to_string()]);
        command.env("KUBECONFIG", &kubeconfig);
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

/// Makes a service account with the operator's roles in this namespace; gives the kubeconfig of whoever it is.
async fn account(space: &Namespace, name: &str) -> String {
    space.kubectl(&["create", "serviceaccount", name]).await;
    let subject = format!("--serviceaccount={}:{name}", space.name);
    for role in ROLES {
        let (binding, role) = (format!("{name}-{role}"), format!("--clusterrole={role}"));
        space.kubectl(&["create", "rolebinding", &binding, &role, &subject]).await;
    }
    let token = space.kubectl(&["create", "token", name, "--duration=1h"]).await;
    let config = space.cluster.kubectl(&["config", "view", "--raw", "--minify", "--output", "json"]).await;
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["users"][0]["user"] = json!({ "token": token.trim() });
    config.to_string()
}

impl Drop for Operator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = std::fs::read_to_string(&self.logs).unwrap_or_default();
            eprintln!("--- the operator's log ---\n{logs}---");
        }
    }
}

/// How long an operator may take to notice that the one that acted is gone: the lease, two looks at it, and a busy machine.
const TAKEN_OVER: Duration = Duration::from_secs(20);

#[tokio::test]
async fn one_of_several_acts_and_another_when_that_is_gone() {
    let Some(space) = namespace("lead").await else { return };
    space.apply(&resource("PushCluster", "main", &json!({}))).await;
    let nobody = "http://127.0.0.1:1";
    let mut first = Operator::start(&space, "first", nobody).await;
    first.leads(true).await;
    let mut second = Operator::start(&space, "second", nobody).await;
    second.leads(false).await;

    // In order: the lease is given back.
    first.signal(libc::SIGTERM);
    let status = tokio::time::timeout(Duration::from_secs(30), first.child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    second.leads(true).await;

    // Killed: the lease runs out.
    let mut third = Operator::start(&space, "third", nobody).await;
    third.leads(false).await;
    second.child.kill().await.unwrap();
    let killed = Instant::now();
    space.apply(&resource("App", "killed", &json!({ "cluster": "main" }))).await;
    app_is(&space, "killed", "False", "no keeper answers").await;
    assert!(killed.elapsed() < TAKEN_OVER, "{:?}", killed.elapsed());

    // Held up, for longer than the lease: it finds what has changed meanwhile, and must not act on it.
    let fourth = Operator::start(&space, "fourth", nobody).await;
    fourth.leads(false).await;
    third.signal(libc::SIGSTOP);
    space.apply(&resource("App", "stopped", &json!({ "cluster": "main" }))).await;
    app_is(&space, "stopped", "False", "no keeper answers").await;
    fourth.leads(true).await;
    let fourth_leads = space.audit("fourth").into_iter().find(|asked| asked.verb == "update").unwrap().at;
    for name in ["one", "two", "three"] {
        space.apply(&resource("App", name, &json!({ "cluster": "main" }))).await;
    }
    third.signal(libc::SIGCONT);
    let status = tokio::time::timeout(Duration::from_secs(60), third.child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(1));
    let logs = std::fs::read_to_string(&third.logs).unwrap();
    assert!(logs.contains("the operator cannot go on: the lease carillon-operator"), "{logs}");
    app_is(&space, "three", "False", "no keeper answers").await;
    fourth.leads(true).await;
    let asked = space.audit("third");
    let writes: Vec<&Asked> = asked.iter().filter(|asked| asked.writes()).collect();
    assert!(writes.iter().any(|asked| asked.resource == "apps/status"), "it has acted: {asked:?}");
    let late: Vec<_> = writes.iter().filter(|asked| asked.at > fourth_leads).collect();
    assert!(late.is_empty(), "since {fourth_leads}: {late:?}");
    assert!(asked.iter().any(|asked| asked.at > fourth_leads), "it went on: {asked:?}");

    // With the cluster its apps go, though its keeper never answered.
    space.kubectl(&["delete", "pushcluster/main"]).await;
    space.kubectl(&["delete", "apps.carillon.dev", "--all", "--timeout=60s"]).await;
}

/// What an operator asked of the API server.
#[derive(Debug)]
struct Asked {
    /// As the API server's clock says it: sorts as text.
    at: String,
    verb: String,
    group: String,
    /// With the subresource.
    resource: String,
    code: i64,
}

impl Asked {
    fn writes(&self) -> bool {
        !["get", "list", "watch"].contains(&self.verb.as_str())
    }
}

trait Audit {
    /// What a service account of the namespace asked for, in order.
    fn audit(&self, account: &str) -> Vec<Asked>;
}

impl Audit for Namespace {
    fn audit(&self, account: &str) -> Vec<Asked> {
        let log = self.cluster.kubeconfig.with_file_name("logs").join("audit.log");
        let user = format!("system:serviceaccount:{}:{account}", self.name);
        let text = std::fs::read_to_string(log).unwrap();
        let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let ours = entries.filter(|entry| entry["user"]["username"] == user.as_str());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut asked: Vec<Asked> = ours
            .map(|entry| {
                let object = &entry["objectRef"];
                let sub = object["subresource"].as_str().map(|sub| format!("/{sub}")).unwrap_or_default();
                Asked {
                    at: text(&entry["requestReceivedTimestamp"]),
                    verb: text(&entry["verb"]),
                    group: text(&object["apiGroup"]),
                    resource: format!("{}{sub}", text(&object["resource"])),
                    code: entry["responseStatus"]["code"].as_i64().unwrap_or_default(),
                }
            })
            .collect();
        asked.sort_by(|a, b| a.at.cmp(&b.at));
        asked
    }
}

/// Group, resource, verb.
type Right = (String, String, String);

/// What the operator's roles allow.
async fn granted(space: &Namespace) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    for role in ROLES {
        let role = space.kubectl(&["get", "clusterrole", role, "--output", "json"]).await;
        let role: Value = serde_json::from_str(&role).unwrap();
        let strings = |list: &Value| -> Vec<String> {
            list.as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
        };
        for rule in role["rules"].as_array().unwrap() {
            for group in strings(&rule["apiGroups"]) {
                for resource in strings(&rule["resources"]) {
                    for verb in strings(&rule["verbs"]) {
                        rights.insert((group.clone(), resource.clone(), verb));
                    }
                }
            }
        }
    }
    rights
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
    let operator = Operator::start(&space, "only", &keeper.endpoint()).await;
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

    // A key that goes is told, and the keeper keeps what it has until it is back.
    space.kubectl(&["delete", "secret", "keys"]).await;
    app_is(&space, "shop", "False", "spec.apiKeys[0].secretRef: there is no Secret keys").await;
    assert!(document(&keeper, "shop").await.is_some_and(|text| text.contains("the-first-key")));
    space.apply(&secret("keys", "the-first-key-of-the-shop")).await;
    let app = app_is(&space, "shop", "True", "the keeper has it as app/shop").await;
    assert_eq!(app["status"]["revision"], revision, "it was there as it ought to be");

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

    // It was refused nothing, and all that it may do it needs.
    let asked = space.audit("only");
    let forbidden: Vec<&Asked> = asked.iter().filter(|asked| [401, 403].contains(&asked.code)).collect();
    assert!(forbidden.is_empty(), "{forbidden:?}");
    let used = asked.into_iter().filter(|asked| !asked.group.is_empty() || !asked.resource.is_empty());
    let used: BTreeSet<Right> = used.map(|asked| (asked.group, asked.resource, asked.verb)).collect();
    assert_eq!(used, granted(&space).await);
}
