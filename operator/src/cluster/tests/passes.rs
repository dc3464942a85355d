//! Passes from nothing to a cluster that is configured, with a keeper that is a real one and all else played.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use carillon_agent::admin::{Admin, ChangeOptions};
use carillon_agent::app::App;
use carillon_agent::document::{ConfigDocument, DocumentKind, Violation};
use carillon_agent::tls::{Tls, TlsFiles};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_operator_api::{PushCluster, conditions};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::api::Api;
use crate::cluster::names::Names;
use crate::cluster::pods::Image;
use crate::cluster::{ClusterError, Clusters, Outcome};
use crate::keeper::Keepers;

const PATIENCE: Duration = Duration::from_secs(60);
const CLUSTER: &str = "/apis/carillon.dev/v1alpha1/namespaces/push/pushclusters/chat";
const VOLUMES: &str = "/api/v1/namespaces/push/persistentvolumeclaims";

/// A document with one rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Gateways {
    limit: u32,
}

impl ConfigDocument for Gateways {
    const KIND: &'static str = "gateway";

    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        if self.limit > 10 { vec![Violation::new("limit", "must be from 0 to 10")] } else { Vec::new() }
    }
}

struct World {
    api: Api,
    client: Client,
    keepers: Keepers,
    port: u16,
    data: tempfile::TempDir,
}

impl World {
    /// A PushCluster, and nothing else.
    async fn with(spec: Value) -> World {
        let api = Api::default();
        api.put(
            CLUSTER,
            json!({"apiVersion": "carillon.dev/v1alpha1", "kind": "PushCluster", "spec": spec,
                "metadata": {"name": "chat", "namespace": "push", "uid": "its-uid", "generation": 1}}),
        );
        // Free, and nobody else's: taken again when the keeper starts.
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let data = tempfile::tempdir().unwrap();
        let keepers = Keepers::new(format!("https://localhost:{port}"), data.path().join("operator"));
        World { client: api.client(), api, keepers, port, data }
    }

    async fn pass(&self) -> Result<Outcome, ClusterError> {
        let cluster: PushCluster =
            serde_json::from_value(self.api.get("pushclusters/chat").unwrap()).unwrap();
        let clusters = Clusters {
            client: &self.client,
            image: Image { name: "carillon:1".to_owned(), pull_policy: None },
            keepers: &self.keepers,
            clock: Timestamp::now,
        };
        clusters.reconcile(&cluster).await
    }

    /// Passes until the last has written nothing; the notes of all.
    async fn settle(&self) -> Vec<String> {
        let (begun, mut notes) = (Instant::now(), Vec::new());
        loop {
            let outcome = self.pass().await.unwrap();
            notes.extend(outcome.notes.iter().map(|note| format!("{}: {}", note.reason, note.message)));
            self.run_pods();
            if outcome.writes == 0 {
                return notes;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end: {:?}", self.api.writes());
        }
    }

    /// What Kubernetes would do of itself: pods are ready, volumes are there.
    fn run_pods(&self) {
        for (name, part) in [("statefulsets/chat-keeper", "keeper"), ("statefulsets/chat-hub", "hub")] {
            let Some(set) = self.api.get(name) else { continue };
            let replicas = set["spec"]["replicas"].as_i64().unwrap();
            self.api.change(name, |set| {
                set["status"] = json!({"replicas": replicas, "readyReplicas": replicas, "updatedReplicas": replicas,
                    "observedGeneration": set["metadata"]["generation"]});
            });
            for place in 0..replicas {
                let volume = format!("data-chat-{part}-{place}");
                if self.api.get(&format!("persistentvolumeclaims/{volume}")).is_none() {
                    let claim = &set["spec"]["volumeClaimTemplates"][0];
                    let mut claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": claim["spec"],
                        "metadata": {"labels": claim["metadata"]["labels"], "namespace": "push", "uid": volume}});
                    claim["metadata"]["name"] = json!(volume);
                    self.api.put(&format!("{VOLUMES}/{volume}"), claim);
                }
            }
        }
    }

    fn material(&self, secret: &str) -> [Vec<u8>; 3] {
        let secret = self.api.get(&format!("secrets/{secret}")).unwrap();
        ["tls.crt", "tls.key", "ca.crt"].map(|key| {
            base64::engine::general_purpose::STANDARD.decode(secret["data"][key].as_str().unwrap()).unwrap()
        })
    }

    /// What a pod has mounted.
    fn tls(&self, secret: &str) -> Arc<Tls> {
        let directory = self.data.path().join(secret);
        std::fs::create_dir_all(&directory).unwrap();
        let [certificate, key, authorities] =
            ["tls.crt", "tls.key", "ca.crt"].map(|part| directory.join(part));
        let files = TlsFiles { authorities, certificate, key };
        for (file, content) in
            [&files.certificate, &files.key, &files.authorities].into_iter().zip(self.material(secret))
        {
            std::fs::write(file, content).unwrap();
        }
        Tls::open(files).unwrap()
    }

    /// The first keeper, with the certificate that was made for it, at the address that it would have.
    async fn keeper(&self) -> KeeperHandle {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], self.port))).await.unwrap();
        let kinds = vec![DocumentKind::of::<Gateways>(), DocumentKind::of::<App>()];
        let mut options = KeeperOptions::new(self.data.path().join("keeper"), listener, kinds);
        options.advertise = Some(Names::new("push", "chat").keeper_address(0));
        options.tls = Some(self.tls("chat-keeper-tls"));
        Keeper::start(options).await.unwrap()
    }

    fn admin(&self, secret: &str) -> Admin {
        Admin::secured(vec![format!("https://localhost:{}", self.port)], Some(self.tls(secret)))
    }

    fn change_spec(&self, change: impl FnOnce(&mut Value)) {
        self.api.change("pushclusters/chat", |cluster| {
            change(&mut cluster["spec"]);
            let generation = cluster["metadata"]["generation"].as_i64().unwrap();
            cluster["metadata"]["generation"] = json!(generation + 1);
        });
    }

    /// Status, reason and message of a condition.
    fn condition(&self, type_: &str) -> (String, String, String) {
        let cluster: PushCluster =
            serde_json::from_value(self.api.get("pushclusters/chat").unwrap()).unwrap();
        let status = cluster.status.unwrap();
        assert_eq!(status.observed_generation, cluster.metadata.generation);
        let found = conditions::get(&status.conditions, type_).unwrap();
        assert_eq!(found.observed_generation, cluster.metadata.generation);
        (found.status.clone(), found.reason.clone(), found.message.clone())
    }

    fn is(&self, type_: &str, status: &str, reason: &str) {
        let (found, why, message) = self.condition(type_);
        assert_eq!((found.as_str(), why.as_str()), (status, reason), "{type_}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_comes_to_be_and_then_nothing_is_written() {
    let world = World::with(json!({"keeper": {"replicas": 1}, "config": {"gateway": {"limit": 5}}})).await;
    let first = world.pass().await.unwrap();
    assert!(first.writes > 10, "{}", first.writes);
    let mut written = world.api.writes();
    written.sort();
    let expected = [
        "configmaps/chat-keeper-peers",
        "poddisruptionbudgets/chat-hub",
        "poddisruptionbudgets/chat-keeper",
        "secrets/chat-authority",
        "secrets/chat-gateway-tls",
        "secrets/chat-hub-tls",
        "secrets/chat-keeper-tls",
        "secrets/chat-operator-tls",
        "services/chat-api",
        "services/chat-hub",
        "services/chat-keeper",
        "services/chat-keeper-peers",
        "statefulsets/chat-hub",
        "statefulsets/chat-keeper",
        "status",
    ];
    assert_eq!(written, expected);
    world.is("Ready", "False", "Starting");
    world.is("ConfigAccepted", "Unknown", "NotHandedOver");
    let owner = &world.api.get("statefulsets/chat-keeper").unwrap()["metadata"]["ownerReferences"];
    assert_eq!((&owner[0]["uid"], &owner[0]["controller"]), (&json!("its-uid"), &json!(true)));

    let keeper = world.keeper().await;
    world.run_pods();
    assert_eq!(world.settle().await, ["ConfigPublished: gateway, revision 1"]);
    for (type_, status, reason) in [
        ("Ready", "True", "Ready"),
        ("Available", "True", "Serving"),
        ("Progressing", "False", "Complete"),
        ("Degraded", "False", "AsExpected"),
        ("ConfigAccepted", "True", "Accepted"),
        ("CertificatesReady", "True", "Issued"),
    ] {
        world.is(type_, status, reason);
    }
    let status = &world.api.get("pushclusters/chat").unwrap()["status"];
    assert_eq!(status["keeper"]["members"][0]["address"], "chat-keeper-0.chat-keeper-peers.push.svc:7400");
    world.api.writes();
    for _ in 0..3 {
        assert_eq!(world.pass().await.unwrap().writes, 0);
    }
    assert_eq!(world.api.writes(), [""; 0]);
    let admin = world.admin("chat-operator-tls");
    assert_eq!(admin.history("gateway", 10).await.unwrap().len(), 1, "nor is anything published");
    assert_eq!(admin.history("gateway", 1).await.unwrap()[0].author, "operator");

    // What somebody changes is set back, what is taken away is made again.
    world.api.change("services/chat-api", |service| service["spec"]["type"] = json!("NodePort"));
    world.api.change("statefulsets/chat-keeper", |set| set["spec"]["replicas"] = json!(0));
    world.api.delete("configmaps/chat-keeper-peers");
    world.pass().await.unwrap();
    let mut written = world.api.writes();
    written.retain(|write| write != "status");
    assert_eq!(written, ["services/chat-api", "configmaps/chat-keeper-peers", "statefulsets/chat-keeper"]);
    assert_eq!(world.api.get("statefulsets/chat-keeper").unwrap()["spec"]["replicas"], 1);
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_are_the_resources_and_what_is_refused_is_said() {
    let world = World::with(json!({"keeper": {"replicas": 1}, "config": {"gateway": {"limit": 11}}})).await;
    world.pass().await.unwrap();
    let keeper = world.keeper().await;
    world.run_pods();
    assert_eq!(world.settle().await, [""; 0]);
    world.is("ConfigAccepted", "False", "Refused");
    assert_eq!(world.condition("ConfigAccepted").2, "spec.config.gateway.limit: must be from 0 to 10");
    assert_eq!(world.condition("Ready").2, "spec.config.gateway.limit: must be from 0 to 10");
    world.change_spec(|spec| spec["config"]["gateway"] = json!({"limits": 1}));
    world.settle().await;
    assert!(
        world.condition("ConfigAccepted").2.starts_with("spec.config.gateway"),
        "{:?}",
        world.condition("ConfigAccepted")
    );
    world.change_spec(|spec| spec["config"]["gateway"] = json!({"limit": 3}));
    assert_eq!(world.settle().await, ["ConfigPublished: gateway, revision 1"]);
    world.is("ConfigAccepted", "True", "Accepted");

    // Somebody else's change is set back, once.
    let admin = world.admin("chat-operator-tls");
    admin.publish("gateway", "limit: 4", ChangeOptions::default()).await.unwrap();
    assert_eq!(world.settle().await, ["ConfigPublished: gateway, revision 3"]);
    assert_eq!(admin.get("gateway", None).await.unwrap().effective["limit"], 3);
    // A kind that is not named (any more) is left as it is.
    world.change_spec(|spec| spec["config"] = json!({}));
    admin.publish("gateway", "limit: 5", ChangeOptions::default()).await.unwrap();
    assert_eq!(world.settle().await, [""; 0]);
    assert_eq!(admin.get("gateway", None).await.unwrap().effective["limit"], 5);
    // A kind that there is not.
    world.change_spec(|spec| spec["config"] = json!({"gatewey": {}}));
    world.settle().await;
    assert!(world.condition("ConfigAccepted").2.contains("there is no kind of document \"gatewey\""));

    // The root app: it must be there, and there is one.
    world.change_spec(|spec| {
        spec["config"] = json!({});
        spec["rootApp"] = json!("fleet");
    });
    world.settle().await;
    world.is("ConfigAccepted", "False", "RootAppMissing");
    admin.publish("app/demo", "root: true", ChangeOptions::default()).await.unwrap();
    admin.publish("app/fleet", "{}", ChangeOptions::default()).await.unwrap();
    world.settle().await;
    world.is("ConfigAccepted", "True", "Accepted");
    let root = async |app: &str| admin.get(app, None).await.unwrap().effective["root"].clone();
    assert_eq!((root("app/demo").await, root("app/fleet").await), (json!(false), json!(true)));
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepers_are_added_one_by_one_and_volumes_follow() {
    let world = World::with(json!({"keeper": {"replicas": 1}})).await;
    world.pass().await.unwrap();
    let keeper = world.keeper().await;
    world.run_pods();
    world.settle().await;
    world.change_spec(|spec| {
        spec["keeper"] = json!({"replicas": 3, "storage": {"size": "2Gi"}});
        spec["hub"] = json!({"storage": {"size": "20Gi"}});
    });
    world.api.writes();
    let claims = world.api.get("statefulsets/chat-keeper").unwrap()["spec"]["volumeClaimTemplates"].clone();
    assert_eq!(world.settle().await, ["KeepersScaled: from 1 to 2 keepers"], "the second is not taken in");
    let set = world.api.get("statefulsets/chat-keeper").unwrap();
    assert_eq!((&set["spec"]["replicas"], &set["spec"]["volumeClaimTemplates"]), (&json!(2), &claims));
    let peers = world.api.get("configmaps/chat-keeper-peers").unwrap()["data"]["peers"].clone();
    assert_eq!(
        peers,
        "chat-keeper-0.chat-keeper-peers.push.svc:7400,chat-keeper-1.chat-keeper-peers.push.svc:7400"
    );
    world.is("Progressing", "True", "MembersChanging");
    assert_eq!(world.condition("Progressing").2, "2 of 3 keepers: the keeper at place 1 is not taken in yet");
    let size = |claim: &str| {
        world.api.get(&format!("persistentvolumeclaims/{claim}")).unwrap()["spec"]["resources"]["requests"]["storage"].clone()
    };
    assert_eq!((size("data-chat-keeper-0"), size("data-chat-keeper-1")), (json!("2Gi"), json!("2Gi")));
    assert_eq!(size("data-chat-hub-0"), json!("20Gi"));

    // Back: the place goes, and its volume when its pod has gone.
    world.change_spec(|spec| spec["keeper"]["replicas"] = json!(1));
    let pod = "/api/v1/namespaces/push/pods/chat-keeper-1";
    world.api.put(pod, json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "chat-keeper-1", "namespace": "push"}}));
    assert_eq!(world.settle().await, ["KeepersScaled: from 2 to 1 keepers"]);
    world.api.delete("pods/chat-keeper-1");
    assert_eq!(world.settle().await, ["VolumeDeleted: data-chat-keeper-1: its keeper is no member any more"]);
    assert!(world.api.get("persistentvolumeclaims/data-chat-keeper-0").is_some());
    keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_cert_manager_are_waited_for() {
    let tls = json!({"certManager": {"issuerRef": {"name": "inner"}}});
    let world = World::with(json!({"keeper": {"replicas": 1}, "tls": tls})).await;
    world.api.0.lock().unknown.push("certificates");
    world.pass().await.unwrap();
    world.is("CertificatesReady", "False", "CertManagerNotInstalled");
    world.is("Ready", "False", "CertManagerNotInstalled");
    world.api.0.lock().unknown.clear();
    world.pass().await.unwrap();
    world.is("CertificatesReady", "False", "WaitingForCertManager");
    assert!(
        world.condition("Ready").2.contains("chat-keeper-tls: is not there yet"),
        "{:?}",
        world.condition("Ready")
    );
    assert!(world.api.get("statefulsets/chat-keeper").is_none(), "pods could not start");
    let issuer = world.api.get("certificates/chat-hub-tls").unwrap()["spec"]["issuerRef"].clone();
    assert_eq!(issuer, json!({"name": "inner", "kind": "Issuer", "group": "cert-manager.io"}));

    // What cert-manager would put there is what another cluster's operator has made.
    let other = World::with(json!({"keeper": {"replicas": 1}})).await;
    other.pass().await.unwrap();
    for role in ["keeper", "hub", "gateway", "operator"] {
        let name = format!("chat-{role}-tls");
        let mut secret = other.api.get(&format!("secrets/{name}")).unwrap();
        secret["metadata"]["ownerReferences"] = json!([]);
        world.api.put(&format!("/api/v1/namespaces/push/secrets/{name}"), secret);
    }
    world.pass().await.unwrap();
    world.is("CertificatesReady", "True", "Issued");
    assert!(world.api.get("statefulsets/chat-keeper").is_some());
    world.run_pods();
    world.api.writes();
    world.settle().await;
    assert!(!world.api.writes().iter().any(|write| write.starts_with("certificates/")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_somebody_elses_is_not_taken_and_an_external_store_changes_nothing() {
    let world = World::with(json!({"keeper": {"replicas": 1}})).await;
    world.api.put(
        "/api/v1/namespaces/push/services/chat-api",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat-api", "namespace": "push"}}),
    );
    let refused = world.pass().await.unwrap_err();
    assert!(refused.to_string().starts_with("Service chat-api is there already"), "{refused}");
    world.is("Degraded", "True", "NameTaken");
    world.is("Ready", "False", "NameTaken");
    assert!(world.api.get("services/chat-api").unwrap().get("spec").is_none());

    let url = json!({"urlSecret": {"name": "store", "key": "url"}});
    world.change_spec(|spec| spec["store"] = json!({"redis": url, "sql": url}));
    world.api.writes();
    world.pass().await.unwrap();
    world.is("Available", "False", "StoreNotSupported");
    assert_eq!(world.api.writes(), ["status"]);
}
