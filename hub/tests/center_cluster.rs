//! The center in front of a real cluster: keeper, registry and saver in this process, over loopback and a data
//! directory; what was pushed is there again when it is pulled, also after a restart.

#[path = "harness/cluster.rs"]
mod harness;

use std::collections::BTreeSet;
use std::time::Duration;

use carillon_proto::v1::{self, attach_up};
use serde_json::{Value, json};

use crate::harness::{Cluster, WAIT, online};

const KEY: &str = "first-key-0123456789";

fn app_document(key: &str) -> String {
    json!({"api_keys": [{"name": "test", "key": key}], "limits": {"max_payload_bytes": 1000}}).to_string()
}

/// The API of a cluster.
struct Api {
    cluster: Cluster,
    client: reqwest::Client,
}

impl Api {
    async fn start() -> Self {
        Api { cluster: Cluster::start(&[("demo", &app_document(KEY))]).await, client: reqwest::Client::new() }
    }

    fn url(&self, path: &str) -> String {
        self.cluster.http_url(path)
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
    let mut api = Api::start().await;
    let (status, first) = api.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((status, &first["topic"], &first["seq"]), (202, &json!("demo/u/alice"), &json!(1)), "{first}");
    let (status, retry) = api.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((status, &retry["seq"], &retry["duplicate"]), (202, &json!(1), &json!(true)), "{retry}");
    assert_eq!(retry["epoch"], first["epoch"]);
    let body =
        json!({"payload_base64": "/wD+", "properties": {"kind": "binary"}, "content_type": "application/x"});
    api.push("alice", body).await?;
    let (_, unstored) = api.push("alice", json!({"payload": "gone", "qos": 0})).await?;
    let unstored = unstored["seq"].as_u64().expect("sequenced though not stored");
    let (_, last) = api.push("alice", json!({"payload": "three", "ttl_seconds": 3600})).await?;
    assert!(last["seq"].as_u64() > Some(unstored), "{last}");

    let before = api.pull_all("u/alice", 2).await?;
    let payloads: Vec<_> = before.iter().map(|message| message["payload"].as_str()).collect();
    assert_eq!(payloads, [Some("one"), None, Some("three")], "{before:?}");
    assert_eq!(
        (&before[1]["payload_base64"], &before[1]["properties"]["kind"]),
        (&json!("/wD+"), &json!("binary"))
    );
    assert_eq!(before[1]["content_type"], "application/x");
    assert!(before[2]["expires_at"].is_string());

    api.cluster.stop_hub().await;
    api.cluster.start_hub().await;
    assert_eq!(api.pull_all("demo%2Fu%2Falice", 100).await?, before, "a restart changes nothing");
    let (_, retry) = api.push("alice", json!({"payload": "one", "id": "id-1"})).await?;
    assert_eq!((&retry["seq"], &retry["duplicate"]), (&json!(1), &json!(true)), "nor that a retry is one");
    let (_, next) = api.push("alice", json!({"payload": "four"})).await?;
    assert!(
        next["seq"].as_u64() > last["seq"].as_u64() && next["epoch"].as_u64() > last["epoch"].as_u64(),
        "{next}"
    );
    api.cluster.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_a_thousand_is_accepted_in_order_and_kept() -> anyhow::Result<()> {
    let api = Api::start().await;
    let mut body = String::new();
    for i in 0..1000 {
        let line =
            json!({"user": format!("user-{}", i % 10), "payload": format!("{i}"), "id": format!("line-{i}")});
        body.push_str(&format!("{line}\n"));
        if i == 500 {
            body.push_str("{\"user\": \"a/b\", \"payload\": \"\"}\n");
        }
    }
    let request = api.client.post(api.url("/v1/apps/demo/messages:batch")).bearer_auth(KEY).body(body);
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
        let messages = api.pull_all(&format!("u/user-{user}"), 30).await?;
        let payloads: Vec<_> = messages.iter().filter_map(|message| message["payload"].as_str()).collect();
        let expected: Vec<_> = (0..100).map(|i| (i * 10 + user).to_string()).collect();
        assert_eq!(payloads, expected);
    }
    api.cluster.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_while_it_runs_and_the_port_is_shared() -> anyhow::Result<()> {
    let api = Api::start().await;
    let overview = |key: &'static str| {
        let request = api.client.get(api.url("/v1/apps/demo/overview")).bearer_auth(key);
        async move { anyhow::Ok(request.send().await?.status().as_u16()) }
    };
    assert_eq!((overview(KEY).await?, overview("wrong-key-0123456789").await?), (200, 401));
    api.cluster.publish_app("demo", &app_document("second-key-0123456789")).await;
    let rotated = async {
        while overview("second-key-0123456789").await? != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(WAIT, rotated).await??;
    assert_eq!(overview(KEY).await?, 401);

    // On one port: the console, the API and its own 404, gRPC.
    let console = api.client.get(api.url("/some/page")).send().await?.text().await?;
    assert_eq!(console, "the console");
    assert_eq!(api.client.get(api.url("/v1/nothing")).send().await?.status(), 404);
    let mut grpc = v1::center_client::CenterClient::connect(api.url("")).await?;
    let refused = grpc.push(v1::PushRequest { app: "demo".to_owned(), ..v1::PushRequest::default() }).await;
    assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::Unauthenticated));
    api.cluster.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_at_a_gateway_is_found_and_kicked_and_a_broadcast_is_watched() -> anyhow::Result<()> {
    let api = Api::start().await;
    let (status, none) = api.ask("GET", "/v1/endpoints?device=phone", "").await?;
    assert_eq!((status, &none["type"]), (503, &json!("https://carillon.dev/problems/no-gateway")));
    let (_, user) = api.ask("GET", "/v1/apps/demo/users/alice", "").await?;
    assert_eq!(user, json!({"online": false, "sessions": []}));

    // A gateway: discoverable, attached, with one device.
    api.cluster.register_gateway("gateway-1", 1);
    let mut gateway = api.cluster.attach("gateway-1").await;
    let change = v1::SessionChange {
        since_ms: 1_000,
        address: "203.0.113.7:50112".to_owned(),
        ..online("alice", "phone", 5)
    };
    let session = change.session.clone();
    gateway.session(change).await;
    let apps = vec![v1::AppReport { app: "demo".to_owned(), connections: 1, ..v1::AppReport::default() }];
    let report = v1::GatewayReport { connections: 1, apps, ..v1::GatewayReport::default() };
    gateway.send(attach_up::Body::Report(report)).await;

    let found = async {
        loop {
            let (_, user) = api.ask("GET", "/v1/apps/demo/users/alice", "").await?;
            let (_, overview) = api.ask("GET", "/v1/apps/demo/overview", "").await?;
            let (status, endpoints) = api.ask("GET", "/v1/endpoints?device=phone", "").await?;
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

    let (status, kicked) = api.ask("DELETE", "/v1/apps/demo/users/alice/sessions?device=tv", "").await?;
    assert_eq!((status, kicked), (200, json!({"kicked": 0})));
    let (status, kicked) = api.ask("DELETE", "/v1/apps/demo/users/alice/sessions", "").await?;
    assert_eq!((status, kicked), (200, json!({"kicked": 1})));
    let kick = gateway.kicked().await;
    assert_eq!((kick.session, kick.connection), (session, 5));

    let body = json!({"payload": "hi all", "id": "sale", "rate_per_second": 100}).to_string();
    let (status, job) = api.ask("POST", "/v1/apps/demo/broadcasts", body.clone()).await?;
    assert_eq!((status, &job["id"], &job["topic"]), (202, &json!("sale"), &json!("demo/all")), "{job}");
    let (status, again) = api.ask("POST", "/v1/apps/demo/broadcasts", body).await?;
    assert_eq!((status, &again["seq"]), (202, &job["seq"]), "a retry starts no second one: {again}");
    let mut states = BTreeSet::new();
    for (verb, expected) in [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")] {
        let (status, job) = api.ask("POST", &format!("/v1/apps/demo/broadcasts/sale:{verb}"), "").await?;
        assert_eq!((status, &job["state"]), (200, &json!(expected)), "{job}");
        let (_, seen) = api.ask("GET", "/v1/apps/demo/broadcasts/sale", "").await?;
        states.insert(seen["state"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(states.len(), 3, "{states:?}");
    let (status, problem) = api.ask("POST", "/v1/apps/demo/broadcasts/sale:resume", "").await?;
    assert_eq!(
        (status, &problem["type"]),
        (409, &json!("https://carillon.dev/problems/conflict")),
        "{problem}"
    );
    let (status, problem) = api.ask("GET", "/v1/apps/demo/broadcasts/other", "").await?;
    assert_eq!((status, &problem["type"]), (404, &json!("https://carillon.dev/problems/unknown-broadcast")));
    api.cluster.stop().await;
    Ok(())
}
