//! The center in front of a real cluster: keeper, registry and saver in this process, over loopback and a data
//! directory; what was pushed is there again when it is pulled, also after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use carillon_agent::admin::{Admin, ChangeOptions};
use carillon_agent::app::App;
use carillon_agent::document::DocumentKind;
use carillon_agent::{Agent, Instance, Role};
use carillon_hub::config::HubConfig;
use carillon_hub::{Hub, HubHandle, HubOptions};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_proto::v1::{self, attach_down, attach_up};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;

const WAIT: Duration = Duration::from_secs(20);
const KEY: &str = "first-key-0123456789";

fn app_document(key: &str) -> String {
    json!({"api_keys": [{"name": "test", "key": key}], "limits": {"max_payload_bytes": 1000}}).to_string()
}

struct Cluster {
    dir: tempfile::TempDir,
    keeper: KeeperHandle,
    admin: Admin,
    client: reqwest::Client,
    incarnation: u64,
    running: Option<(Agent, HubHandle)>,
}

impl Cluster {
    async fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let kinds = vec![DocumentKind::of::<App>(), DocumentKind::of::<HubConfig>()];
        let keeper = Keeper::start(KeeperOptions::new(dir.path().join("keeper"), listener, kinds)).await?;
        let admin = Admin::new(vec![keeper.endpoint()]);
        admin.publish("app/demo", &app_document(KEY), ChangeOptions::default()).await?;
        let client = reqwest::Client::new();
        let mut cluster = Cluster { dir, keeper, admin, client, incarnation: 0, running: None };
        cluster.start_hub().await?;
        Ok(cluster)
    }

    async fn start_hub(&mut self) -> anyhow::Result<()> {
        self.incarnation += 1;
        let agent = Agent::start(carillon_agent::Options { keepers: vec![self.keeper.endpoint()] });
        let options = HubOptions {
            instance_id: "hub-1".to_owned(),
            incarnation: self.incarnation,
            cluster: "test".to_owned(),
            roles: vec![Role::Saver, Role::Registry, Role::Center, Role::Dispatcher],
            grpc: TcpListener::bind("127.0.0.1:0").await?,
            http: Some(TcpListener::bind("127.0.0.1:0").await?),
            data_dir: self.dir.path().join("hub"),
            advertise: BTreeMap::new(),
            labels: BTreeMap::new(),
            // A console takes all paths that are nobody else's.
            console: axum::Router::new().fallback(|| async { "the console" }),
            metrics: prometheus::Registry::new(),
        };
        let hub = Box::pin(Hub::start(options, agent.clone())).await?;
        tokio::time::timeout(WAIT, hub.ready()).await?;
        self.running = Some((agent, hub));
        Ok(())
    }

    async fn stop_hub(&mut self) -> anyhow::Result<()> {
        if let Some((agent, hub)) = self.running.take() {
            tokio::time::timeout(WAIT, hub.stop()).await?;
            agent.stop().await;
        }
        Ok(())
    }

    fn hub(&self) -> &HubHandle {
        &self.running.as_ref().expect("the hub runs").1
    }

    fn agent(&self) -> &Agent {
        &self.running.as_ref().expect("the hub runs").0
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.hub().http_address().expect("it serves HTTP"))
    }

    async fn ask(
        &self,
        method: &str,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> anyhow::Result<(u16, Value)> {
        let request = self.client.request(method.parse()?, self.url(path)).bearer_auth(KEY);
        let response = request.body(body).send().await?;
        Ok((response.status().as_u16(), response.json().await?))
    }

    async fn push(&self, user: &str, body: Value) -> anyhow::Result<(u16, Value)> {
        self.ask("POST", &format!("/v1/apps/demo/users/{user}/messages"), body.to_string()).await
    }

    /// The whole log of a topic, read in pages.
    async fn pull_all(&self, topic: &str, limit: u32) -> anyhow::Result<Vec<Value>> {
        let (mut messages, mut after) = (Vec::new(), "0:0".to_owned());
        loop {
            let path = format!("/v1/apps/demo/topics/{topic}/messages?after={after}&limit={limit}");
            let (status, page) = self.ask("GET", &path, "").await?;
            anyhow::ensure!(status == 200, "{page}");
            messages.extend(page["messages"].as_array().cloned().unwrap_or_default());
            after = page["next"].as_str().unwrap_or_default().to_owned();
            if page["more"] == false {
                return Ok(messages);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pushed_is_kept_and_a_retry_is_harmless() -> anyhow::Result<()> {
    let mut cluster = Cluster::start().await?;
    let (status, first) = cluster.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((status, &first["topic"], &first["seq"]), (202, &json!("demo/u/alice"), &json!(1)), "{first}");
    let (status, retry) = cluster.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((status, &retry["seq"], &retry["duplicate"]), (202, &json!(1), &json!(true)), "{retry}");
    assert_eq!(retry["epoch"], first["epoch"]);
    let body =
        json!({"payload_base64": "/wD+", "properties": {"kind": "binary"}, "content_type": "application/x"});
    cluster.push("alice", body).await?;
    let (_, unstored) = cluster.push("alice", json!({"payload": "gone", "qos": 0})).await?;
    let unstored = unstored["seq"].as_u64().expect("sequenced though not stored");
    let (_, last) = cluster.push("alice", json!({"payload": "three", "ttl_seconds": 3600})).await?;
    assert!(last["seq"].as_u64() > Some(unstored), "{last}");

    let before = cluster.pull_all("u/alice", 2).await?;
    let payloads: Vec<_> = before.iter().map(|message| message["payload"].as_str()).collect();
    assert_eq!(payloads, [Some("one"), None, Some("three")], "{before:?}");
    assert_eq!(
        (&before[1]["payload_base64"], &before[1]["properties"]["kind"]),
        (&json!("/wD+"), &json!("binary"))
    );
    assert_eq!(before[1]["content_type"], "application/x");
    assert!(before[2]["expires_at"].is_string());

    cluster.stop_hub().await?;
    cluster.start_hub().await?;
    assert_eq!(cluster.pull_all("demo%2Fu%2Falice", 100).await?, before, "a restart changes nothing");
    let (_, retry) = cluster.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((&retry["seq"], &retry["duplicate"]), (&json!(1), &json!(true)), "nor that a retry is one");
    let (_, next) = cluster.push("alice", json!({"payload": "four"})).await?;
    assert!(
        next["seq"].as_u64() > last["seq"].as_u64() && next["epoch"].as_u64() > last["epoch"].as_u64(),
        "{next}"
    );
    cluster.stop_hub().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_a_thousand_is_accepted_in_order_and_kept() -> anyhow::Result<()> {
    let mut cluster = Cluster::start().await?;
    let mut body = String::new();
    for i in 0..1000 {
        let line =
            json!({"user": format!("user-{}", i % 10), "payload": format!("{i}"), "id": format!("line-{i}")});
        body.push_str(&format!("{line}\n"));
        if i == 500 {
            body.push_str("{\"user\": \"a/b\", \"payload\": \"\"}\n");
        }
    }
    let request =
        cluster.client.post(cluster.url("/v1/apps/demo/messages:batch")).bearer_auth(KEY).body(body);
    let text = request.send().await?.text().await?;
    let mut answers: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(answers.len(), 1001);
    let problem = answers.remove(501);
    assert_eq!((&problem["field"], &problem["line"]), (&json!("user"), &json!(502)), "{problem}");
    for (i, answer) in answers.iter().enumerate() {
        let (id, seq) = (format!("line-{i}"), i / 10 + 1);
        assert_eq!((&answer["id"], &answer["seq"]), (&json!(id), &json!(seq)), "{answer}");
    }
    for user in 0..10 {
        let messages = cluster.pull_all(&format!("u/user-{user}"), 30).await?;
        let payloads: Vec<_> = messages.iter().filter_map(|message| message["payload"].as_str()).collect();
        let expected: Vec<_> = (0..100).map(|i| (i * 10 + user).to_string()).collect();
        assert_eq!(payloads, expected);
    }
    cluster.stop_hub().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_while_it_runs_and_the_port_is_shared() -> anyhow::Result<()> {
    let mut cluster = Cluster::start().await?;
    let overview = |key: &'static str| {
        let request = cluster.client.get(cluster.url("/v1/apps/demo/overview")).bearer_auth(key);
        async move { anyhow::Ok(request.send().await?.status().as_u16()) }
    };
    assert_eq!((overview(KEY).await?, overview("wrong-key-0123456789").await?), (200, 401));
    cluster
        .admin
        .publish("app/demo", &app_document("second-key-0123456789"), ChangeOptions::default())
        .await?;
    let rotated = async {
        while overview("second-key-0123456789").await? != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(WAIT, rotated).await??;
    assert_eq!(overview(KEY).await?, 401);

    // On one port: the console, the API and its own 404, gRPC.
    let console = cluster.client.get(cluster.url("/some/page")).send().await?.text().await?;
    assert_eq!(console, "the console");
    assert_eq!(cluster.client.get(cluster.url("/v1/nothing")).send().await?.status(), 404);
    let mut grpc = v1::center_client::CenterClient::connect(cluster.url("")).await?;
    let refused = grpc.push(v1::PushRequest { app: "demo".to_owned(), ..v1::PushRequest::default() }).await;
    assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::Unauthenticated));
    cluster.stop_hub().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_at_a_gateway_is_found_and_kicked_and_a_broadcast_is_watched() -> anyhow::Result<()> {
    let mut cluster = Cluster::start().await?;
    let (status, none) = cluster.ask("GET", "/v1/endpoints?device=phone", "").await?;
    assert_eq!((status, &none["type"]), (503, &json!("https://carillon.dev/problems/no-gateway")));
    let (_, user) = cluster.ask("GET", "/v1/apps/demo/users/alice", "").await?;
    assert_eq!(user, json!({"online": false, "sessions": []}));

    // A gateway: discoverable, attached, with one device.
    cluster.agent().register(Instance {
        id: "gateway-1".to_owned(),
        incarnation: 1,
        roles: vec![Role::Gateway],
        addresses: BTreeMap::from([("mqtt".to_owned(), "127.0.0.1:1883".to_owned())]),
        labels: BTreeMap::new(),
        draining: false,
    });
    let mut registry =
        v1::registry_client::RegistryClient::connect(format!("http://{}", cluster.hub().grpc_address()))
            .await?;
    let (up, outbound) = tokio::sync::mpsc::channel(16);
    let send = async |body| up.send(v1::AttachUp { body: Some(body) }).await;
    let hello = v1::Hello { instance: "gateway-1".to_owned(), incarnation: 1, ..v1::Hello::default() };
    send(attach_up::Body::Hello(hello)).await?;
    let mut down = registry.attach(ReceiverStream::new(outbound)).await?.into_inner();
    let session =
        v1::SessionRef { app: "demo".to_owned(), user: "alice".to_owned(), client_id: "phone".to_owned() };
    let change = v1::SessionChange {
        session: Some(session.clone()),
        online: true,
        since_ms: 1_000,
        address: "203.0.113.7:50112".to_owned(),
        connection: 5,
        ..v1::SessionChange::default()
    };
    send(attach_up::Body::Sessions(v1::SessionChanges { changes: vec![change] })).await?;
    let apps = vec![v1::AppReport { app: "demo".to_owned(), connections: 1, ..v1::AppReport::default() }];
    send(attach_up::Body::Report(v1::GatewayReport {
        connections: 1,
        apps,
        bytes_resident: 0,
        ..v1::GatewayReport::default()
    }))
    .await?;

    let found = async {
        loop {
            let (_, user) = cluster.ask("GET", "/v1/apps/demo/users/alice", "").await?;
            let (_, overview) = cluster.ask("GET", "/v1/apps/demo/overview", "").await?;
            let (status, endpoints) = cluster.ask("GET", "/v1/endpoints?device=phone", "").await?;
            if user["online"] == true && overview["connections"] == 1 && status == 200 {
                return anyhow::Ok((user, overview, endpoints));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (user, overview, endpoints) = tokio::time::timeout(WAIT, found).await??;
    let expected = json!({
        "device": "phone", "gateway": "gateway-1", "since": "1970-01-01T00:00:01.000Z", "address": "203.0.113.7:50112",
    });
    assert_eq!(user["sessions"], json!([expected]));
    assert_eq!(overview["gateways"][0]["gateway"], "gateway-1");
    assert_eq!(endpoints["endpoints"], json!([{"gateway": "gateway-1", "mqtt": "mqtt://127.0.0.1:1883"}]));

    let (status, kicked) = cluster.ask("DELETE", "/v1/apps/demo/users/alice/sessions?device=tv", "").await?;
    assert_eq!((status, kicked), (200, json!({"kicked": 0})));
    let (status, kicked) = cluster.ask("DELETE", "/v1/apps/demo/users/alice/sessions", "").await?;
    assert_eq!((status, kicked), (200, json!({"kicked": 1})));
    let told = async {
        while let Some(message) = down.message().await? {
            if let Some(attach_down::Body::Kick(kick)) = message.body {
                return anyhow::Ok(kick);
            }
        }
        anyhow::bail!("the stream ended before the kick")
    };
    let kick = tokio::time::timeout(WAIT, told).await??;
    assert_eq!((kick.session, kick.connection), (Some(session), 5));

    let body = json!({"payload": "hi all", "id": "sale", "rate_per_second": 100}).to_string();
    let (status, job) = cluster.ask("POST", "/v1/apps/demo/broadcasts", body.clone()).await?;
    assert_eq!((status, &job["id"], &job["topic"]), (202, &json!("sale"), &json!("demo/all")), "{job}");
    let (status, again) = cluster.ask("POST", "/v1/apps/demo/broadcasts", body).await?;
    assert_eq!((status, &again["seq"]), (202, &job["seq"]), "a retry starts no second one: {again}");
    let mut states = BTreeSet::new();
    for (verb, expected) in [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")] {
        let (status, job) = cluster.ask("POST", &format!("/v1/apps/demo/broadcasts/sale:{verb}"), "").await?;
        assert_eq!((status, &job["state"]), (200, &json!(expected)), "{job}");
        let (_, seen) = cluster.ask("GET", "/v1/apps/demo/broadcasts/sale", "").await?;
        states.insert(seen["state"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(states.len(), 3, "{states:?}");
    let (status, problem) = cluster.ask("POST", "/v1/apps/demo/broadcasts/sale:resume", "").await?;
    assert_eq!(
        (status, &problem["type"]),
        (409, &json!("https://carillon.dev/problems/conflict")),
        "{problem}"
    );
    let (status, problem) = cluster.ask("GET", "/v1/apps/demo/broadcasts/other", "").await?;
    assert_eq!((status, &problem["type"]), (404, &json!("https://carillon.dev/problems/unknown-broadcast")));
    cluster.stop_hub().await
}
