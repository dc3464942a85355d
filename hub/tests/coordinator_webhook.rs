//! Webhooks that fail at first, that are broken for ever, that were away: each event reaches its own at least once.

#[path = "harness/cluster.rs"]
mod harness;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use carillon_hub::coordinator::event::{Event, SIGNATURE, signature};
use carillon_proto::v1;
use parking_lot::Mutex;

use crate::harness::{Cluster, eventually, message, online};

const SECRET: &str = "the secret of a webhook";

/// A backend that answers as it is told, and remembers what it took.
#[derive(Clone, Default)]
struct Backend {
    taken: Arc<Mutex<Vec<Event>>>,
    /// Statuses of the next answers; then 200.
    answers: Arc<Mutex<VecDeque<u16>>>,
    always: Arc<Mutex<Option<u16>>>,
    posts: Arc<Mutex<usize>>,
    url: String,
}

impl Backend {
    async fn start() -> Backend {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/events", listener.local_addr().unwrap());
        let backend = Backend { url, ..Backend::default() };
        let router =
            axum::Router::new().route("/events", axum::routing::post(take)).with_state(backend.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        backend
    }

    fn app(&self) -> String {
        format!("webhook: {{ url: '{}', secret: '{SECRET}', presence: true, timeout_ms: 2000 }}", self.url)
    }

    fn payloads(&self, of_kind: &str) -> Vec<String> {
        let taken = self.taken.lock();
        let upstream = taken.iter().filter_map(|event| match event {
            Event::Upstream { kind, payload, .. } if kind == of_kind => payload.clone(),
            _ => None,
        });
        upstream.collect()
    }
}

async fn take(State(backend): State<Backend>, headers: HeaderMap, body: axum::body::Bytes) -> StatusCode {
    *backend.posts.lock() += 1;
    assert_eq!(headers[SIGNATURE], signature(SECRET, &body));
    if let Some(status) = *backend.always.lock() {
        return StatusCode::from_u16(status).unwrap();
    }
    if let Some(status) = backend.answers.lock().pop_front() {
        return StatusCode::from_u16(status).unwrap();
    }
    backend.taken.lock().extend(serde_json::from_slice::<Vec<Event>>(&body).unwrap());
    StatusCode::NO_CONTENT
}

fn upstream(app: &str, kind: &str, payload: &str, qos: u32) -> v1::PublishRequest {
    let publisher = v1::SessionRef { app: app.into(), user: "alice".into(), client_id: "phone".into() };
    v1::PublishRequest {
        message: Some(v1::Message {
            publisher: Some(publisher),
            ..message(&format!("{app}/up/{kind}"), payload, qos)
        }),
        ..v1::PublishRequest::default()
    }
}

async fn serving(cluster: &Cluster, apps: f64) {
    eventually("the webhooks are served", async || {
        (cluster.metric("carillon_coordinator_apps") == apps
            // The coordinator, and the shares.
            && cluster.metric("carillon_registry_attached_streams") >= 2.0)
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn events_arrive_in_order_though_the_webhook_fails_at_first() {
    let backend = Backend::start().await;
    backend.answers.lock().extend([500, 503]);
    let cluster = Cluster::start(&[("demo", &backend.app())]).await;
    serving(&cluster, 1.0).await;
    let owners = cluster.owners();
    for i in 0..250 {
        owners.publish(upstream("demo", "order", &i.to_string(), 1)).await.unwrap();
    }
    let expected: Vec<String> = (0..250).map(|i| i.to_string()).collect();
    eventually("all are taken", async || (backend.payloads("order").len() >= 250).then_some(())).await;
    assert_eq!(backend.payloads("order"), expected);
    match &backend.taken.lock()[0] {
        Event::Upstream { app, topic, user, client_id, seq, .. } => {
            assert_eq!((app.as_str(), topic.as_str(), *seq), ("demo", "demo/up/order", 1));
            assert_eq!((user.as_deref(), client_id.as_deref()), (Some("alice"), Some("phone")));
        }
        other => panic!("{other:?}"),
    }
    // In no log, but the webhook is there: it comes all the same. A topic of several levels is a kind.
    owners.publish(upstream("demo", "typing/now", "quick", 0)).await.unwrap();
    eventually("the unstored one is taken", async || {
        (backend.payloads("typing/now") == ["quick"]).then_some(())
    })
    .await;
    assert!(cluster.metric("carillon_coordinator_posts_total") >= 4.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_accepted_while_the_webhook_was_away_survives_a_restart() {
    let backend = Backend::start().await;
    *backend.always.lock() = Some(500);
    let mut cluster = Cluster::start(&[("demo", &backend.app())]).await;
    serving(&cluster, 1.0).await;
    let owners = cluster.owners();
    for i in 0..50 {
        owners.publish(upstream("demo", "order", &i.to_string(), 1)).await.unwrap();
    }
    eventually("it is tried", async || (*backend.posts.lock() >= 2).then_some(())).await;
    cluster.stop_hub().await;
    *backend.always.lock() = None;
    cluster.start_hub().await;
    eventually("all are taken", async || (backend.payloads("order").len() >= 50).then_some(())).await;
    assert_eq!(backend.payloads("order"), (0..50).map(|i| i.to_string()).collect::<Vec<_>>());
    // The cursor has moved: a further restart repeats nothing.
    cluster.stop_hub().await;
    cluster.start_hub().await;
    let owners = cluster.owners();
    owners.publish(upstream("demo", "order", "last", 1)).await.unwrap();
    eventually("the last is taken", async || {
        (backend.payloads("order").last().is_some_and(|last| last == "last")).then_some(())
    })
    .await;
    assert_eq!(backend.payloads("order").len(), 51);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_broken_webhook_delays_nobody_else_and_one_that_comes_later_is_served() {
    let (good, broken) = (Backend::start().await, Backend::start().await);
    *broken.always.lock() = Some(500);
    let cluster = Cluster::start(&[("broken", &broken.app()), ("good", "")]).await;
    serving(&cluster, 1.0).await;
    let owners = cluster.owners();
    for i in 0..20 {
        owners.publish(upstream("broken", &format!("k{i}"), "x", 1)).await.unwrap();
    }
    eventually("the broken one is tried", async || (*broken.posts.lock() >= 4).then_some(())).await;
    // Before it had a webhook nothing was owed to it.
    owners.publish(upstream("good", "order", "too early", 1)).await.unwrap();
    cluster.publish_app("good", &good.app()).await;
    serving(&cluster, 2.0).await;
    let begun = std::time::Instant::now();
    owners.publish(upstream("good", "order", "now", 1)).await.unwrap();
    eventually("the good one is served", async || (good.payloads("order") == ["now"]).then_some(())).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(broken.taken.lock().is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn presence_is_told_to_the_webhook() {
    let backend = Backend::start().await;
    let cluster = Cluster::start(&[("demo", &backend.app())]).await;
    serving(&cluster, 1.0).await;
    let gateway = cluster.attach("g1").await;
    gateway.session(online("alice", "phone", 1)).await;
    gateway.session(v1::SessionChange { again: true, ..online("bob", "laptop", 2) }).await;
    gateway
        .session(v1::SessionChange { online: false, reason: "normal".into(), ..online("alice", "phone", 1) })
        .await;
    let told = eventually("both events are told", async || {
        let taken = backend.taken.lock().clone();
        (taken.len() >= 2).then_some(taken)
    })
    .await;
    let told: Vec<_> = told
        .iter()
        .map(|event| match event {
            Event::Presence { user, client_id, online, sessions, reason, gateway, .. } => {
                format!(
                    "{user} {client_id} {online} {sessions} {} {gateway}",
                    reason.as_deref().unwrap_or("-")
                )
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told, ["alice phone true 1 - g1", "alice phone false 0 normal g1"]);
    cluster.stop().await;
}
