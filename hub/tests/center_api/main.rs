//! The center's API over real loopback, HTTP and gRPC on one port; behind it an owner of topics that lives in the
//! test, through the seam that the center has for it.

mod bad_requests;
mod batches;
mod grpc;
mod openapi;
mod owner;
mod requests;

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_agent::app::{ApiKey, App, AppLimits};
use carillon_agent::{Instance, Role};
use carillon_hub::{center, dispatcher};
use owner::TestOwner;
use serde_json::Value;
use tokio::sync::watch;

/// The keys of the apps `demo` and `shop`.
const DEMO: &str = "demo-key-0123456789";
const SHOP: &str = "shop-key-0123456789";

/// A center and a dispatcher that listen, and what they were given.
struct Harness {
    address: String,
    client: reqwest::Client,
    owner: Arc<TestOwner>,
    gateways: watch::Sender<Arc<Vec<Instance>>>,
    metrics: prometheus::Registry,
}

impl Harness {
    async fn start() -> Self {
        Self::with(center::Options::default()).await
    }

    async fn with(options: center::Options) -> Self {
        let app = |key: &str, push_rate_per_second| {
            Arc::new(App {
                api_keys: vec![ApiKey { name: "test".to_owned(), key: key.to_owned() }],
                limits: AppLimits { max_payload_bytes: 1000, push_rate_per_second, ..AppLimits::default() },
                ..App::default()
            })
        };
        let apps = BTreeMap::from([("demo".to_owned(), app(DEMO, 0)), ("shop".to_owned(), app(SHOP, 10))]);
        // What they hold stays when the senders are gone.
        let (_, apps) = watch::channel(Arc::new(apps));
        let (gateways, seen) = watch::channel(Arc::new(vec![gateway("gateway-0"), gateway("gateway-1")]));
        let owner = Arc::new(TestOwner::default());
        let metrics = prometheus::Registry::new();
        let center = center::Center::new(center::Deps {
            apps,
            cluster: owner.clone(),
            metrics: center::metrics::Metrics::register(&metrics).expect("new names"),
            options,
        });
        let dispatcher = dispatcher::Dispatcher::new(dispatcher::Deps {
            gateways: seen,
            metrics: dispatcher::Metrics::register(&metrics).expect("new names"),
            options: dispatcher::Options::default(),
        });
        let router = center.http_router().merge(dispatcher.http_router());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Harness { address, client: reqwest::Client::new(), owner, gateways, metrics }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request with `demo`'s key.
    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = method.parse().expect("a method");
        self.client.request(method, self.url(path)).bearer_auth(DEMO)
    }

    /// Status and JSON of an answer.
    async fn json(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let response = self.request(method, path).body(body.to_owned()).send().await.expect("an answer");
        let status = response.status().as_u16();
        (status, response.json().await.expect("JSON"))
    }
}

fn gateway(id: &str) -> Instance {
    Instance {
        id: id.to_owned(),
        incarnation: 1,
        roles: vec![Role::Gateway],
        addresses: BTreeMap::from([
            ("mqtt".to_owned(), format!("{id}:1883")),
            ("ws".to_owned(), format!("{id}:8083")),
        ]),
        labels: BTreeMap::new(),
        draining: false,
    }
}
