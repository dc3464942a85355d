//! A keeper, a hub and clients in one process, over real sockets and a real data directory.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::collections::BTreeMap;
use std::time::Duration;

use carillon_agent::admin::{Admin, ChangeOptions};
use carillon_agent::app::App;
use carillon_agent::document::DocumentKind;
use carillon_agent::{Agent, Instance, Role};
use carillon_hub::config::HubConfig;
use carillon_hub::peers::Directory;
use carillon_hub::registry::{OwnerClient, client};
use carillon_hub::{Hub, HubHandle, HubOptions};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_proto::v1::{self, attach_down, attach_up};
use carillon_proto::{MAX_GRPC_MESSAGE_BYTES, topic::SLOTS};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use v1::registry_client::RegistryClient;

pub const WAIT: Duration = Duration::from_secs(20);

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub keeper: KeeperHandle,
    pub admin: Admin,
    incarnation: u64,
    running: Option<Running>,
}

struct Running {
    agent: Agent,
    hub: HubHandle,
    metrics: prometheus::Registry,
}

impl Cluster {
    /// A keeper with these apps (name, YAML), and a hub.
    pub async fn start(apps: &[(&str, &str)]) -> Cluster {
        // Shown for a test that fails: RUST_LOG says how much.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let kinds = vec![DocumentKind::of::<App>(), DocumentKind::of::<HubConfig>()];
        let keeper =
            Keeper::start(KeeperOptions::new(dir.path().join("keeper"), listener, kinds)).await.unwrap();
        let admin = Admin::new(vec![keeper.endpoint()]);
        let mut cluster = Cluster { dir, keeper, admin, incarnation: 0, running: None };
        for (name, yaml) in apps {
            cluster.publish_app(name, yaml).await;
        }
        cluster.start_hub().await;
        cluster
    }

    pub async fn publish_app(&self, name: &str, yaml: &str) {
        self.admin.publish(&format!("app/{name}"), yaml, ChangeOptions::default()).await.unwrap();
    }

    pub async fn start_hub(&mut self) {
        self.incarnation += 1;
        let agent = Agent::start(carillon_agent::Options::new(vec![self.keeper.endpoint()]));
        let metrics = prometheus::Registry::new();
        let options = HubOptions {
            instance_id: "hub-1".into(),
            incarnation: self.incarnation,
            cluster: "test".into(),
            roles: vec![Role::Saver, Role::Registry, Role::Center, Role::Dispatcher, Role::Coordinator],
            grpc: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            http: Some(TcpListener::bind("127.0.0.1:0").await.unwrap()),
            data_dir: self.dir.path().join("hub"),
            take_over_saver: None,
            advertise: BTreeMap::new(),
            labels: BTreeMap::new(),
            // A console takes all paths that are nobody else's.
            console: axum::Router::new().fallback(|| async { "the console" }),
            metrics: metrics.clone(),
        };
        let hub = Box::pin(Hub::start(options, agent.clone())).await.unwrap();
        tokio::time::timeout(WAIT, hub.ready()).await.expect("the hub becomes ready");
        self.running = Some(Running { agent, hub, metrics });
    }

    pub async fn stop_hub(&mut self) {
        if let Some(Running { agent, hub, .. }) = self.running.take() {
            tokio::time::timeout(WAIT, hub.stop()).await.expect("the hub stops");
            agent.stop().await;
        }
    }

    pub async fn stop(mut self) {
        self.stop_hub().await;
        self.keeper.stop().await;
    }

    pub fn agent(&self) -> &Agent {
        &self.running.as_ref().unwrap().agent
    }

    pub fn directory(&self) -> Directory {
        Directory::new(self.agent().clone())
    }

    pub fn owners(&self) -> OwnerClient {
        OwnerClient::start(self.directory(), client::Options::default())
    }

    /// The value of a counter or gauge, all labels together.
    pub fn metric(&self, name: &str) -> f64 {
        let families = self.running.as_ref().unwrap().metrics.gather();
        let Some(family) = families.iter().find(|family| family.name() == name) else { return 0.0 };
        let values = family.get_metric().iter();
        values.map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
    }

    pub async fn registry(&self) -> RegistryClient<tonic::transport::Channel> {
        let address = self.running.as_ref().unwrap().hub.grpc_address();
        RegistryClient::connect(format!("http://{address}"))
            .await
            .unwrap()
            .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
    }

    /// Where other roles reach the hub.
    pub fn grpc_url(&self) -> String {
        format!("http://{}", self.running.as_ref().unwrap().hub.grpc_address())
    }

    /// The API and the console.
    pub fn http_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.running.as_ref().unwrap().hub.http_address().unwrap())
    }

    /// Makes a gateway discoverable, without attaching it.
    pub fn register_gateway(&self, id: &str, incarnation: u64) {
        self.agent().register(Instance {
            id: id.into(),
            incarnation,
            roles: vec![Role::Gateway],
            addresses: BTreeMap::from([("mqtt".to_owned(), "127.0.0.1:1883".to_owned())]),
            labels: BTreeMap::new(),
            draining: false,
        });
    }

    pub async fn attach(&self, id: &str) -> Gateway {
        self.attach_as(id, 1).await
    }

    pub async fn attach_as(&self, id: &str, incarnation: u64) -> Gateway {
        let (up, outbound) = mpsc::channel(64);
        let hello = v1::Hello { instance: id.into(), incarnation, routes_only: false };
        up.send(v1::AttachUp { body: Some(attach_up::Body::Hello(hello)) }).await.unwrap();
        let inbound = self.registry().await.attach(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        let mut gateway = Gateway { up, inbound, next_request: 1 };
        assert!(matches!(gateway.next().await, attach_down::Body::Welcome(_)));
        gateway
    }

    /// All slots, as owned now.
    pub fn slot_epochs(&self) -> Vec<v1::SlotEpoch> {
        let slots = self.agent().slots().borrow().clone();
        (0..SLOTS).zip(&slots.slots).map(|(slot, owner)| v1::SlotEpoch { slot, epoch: owner.epoch }).collect()
    }
}

/// The registry's side of a gateway, by hand.
pub struct Gateway {
    up: mpsc::Sender<v1::AttachUp>,
    inbound: Streaming<v1::AttachDown>,
    next_request: u64,
}

impl Gateway {
    pub async fn send(&self, body: attach_up::Body) {
        self.up.send(v1::AttachUp { body: Some(body) }).await.unwrap();
    }

    pub async fn next(&mut self) -> attach_down::Body {
        tokio::time::timeout(WAIT, self.inbound.message())
            .await
            .expect("something comes")
            .expect("the stream is well")
            .expect("the stream goes on")
            .body
            .expect("it has a body")
    }

    /// How the stream ends; what comes before is dropped.
    pub async fn end(mut self) -> Option<tonic::Status> {
        loop {
            match tokio::time::timeout(WAIT, self.inbound.message()).await.expect("the stream ends") {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    /// Announces that there are subscribers for these, and waits until that is in force.
    pub async fn announce(&mut self, filters: &[&str]) -> v1::Announced {
        let route = |filter: &&str| v1::Route { filter: (*filter).into(), present: true, last: 0 };
        let request = self.next_request;
        self.next_request += 1;
        let routes = filters.iter().map(route).collect();
        self.send(attach_up::Body::Announce(v1::Announce { request, routes })).await;
        loop {
            if let attach_down::Body::Announced(announced) = self.next().await {
                assert_eq!(announced.request, request);
                return announced;
            }
        }
    }

    pub async fn complete(&self, slots: Vec<v1::SlotEpoch>) {
        self.send(attach_up::Body::Complete(v1::SlotComplete { slots })).await;
    }

    pub async fn session(&self, change: v1::SessionChange) {
        self.send(attach_up::Body::Sessions(v1::SessionChanges { changes: vec![change] })).await;
    }

    /// The next messages, `count` of them.
    pub async fn messages(&mut self, count: usize) -> Vec<v1::Message> {
        let mut messages = Vec::new();
        while messages.len() < count {
            if let attach_down::Body::Deliver(deliver) = self.next().await {
                messages.extend(deliver.messages);
            }
        }
        assert_eq!(messages.len(), count);
        messages
    }

    pub async fn kicked(&mut self) -> v1::KickSession {
        loop {
            if let attach_down::Body::Kick(kick) = self.next().await {
                return kick;
            }
        }
    }

    pub async fn control(&mut self) -> v1::BroadcastControl {
        loop {
            if let attach_down::Body::Control(control) = self.next().await {
                return control;
            }
        }
    }
}

pub fn message(topic: &str, payload: &str, qos: u32) -> v1::Message {
    v1::Message {
        topic: topic.into(),
        payload: payload.as_bytes().to_vec().into(),
        qos,
        id: uuid::Uuid::now_v7().to_string(),
        ..v1::Message::default()
    }
}

pub fn request(topic: &str, payload: &str, qos: u32) -> v1::PublishRequest {
    v1::PublishRequest { message: Some(message(topic, payload, qos)), ..v1::PublishRequest::default() }
}

pub fn online(user: &str, client_id: &str, connection: u64) -> v1::SessionChange {
    v1::SessionChange {
        session: Some(v1::SessionRef { app: "demo".into(), user: user.into(), client_id: client_id.into() }),
        online: true,
        since_ms: carillon_proto::now_ms(),
        address: "192.0.2.1:4000".into(),
        connection,
        ..v1::SessionChange::default()
    }
}

/// Asks until it is so.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "it does not come to this: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn payloads(messages: &[v1::Message]) -> Vec<&str> {
    messages.iter().map(|message| std::str::from_utf8(&message.payload).unwrap()).collect()
}
