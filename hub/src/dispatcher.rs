//! Tells a device which gateways to try: the same device is sent to the same gateways as long as they are there.

mod metrics;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use carillon_agent::{Instance, Live};
use http::{HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use metrics::Metrics;

use crate::center::http::{Parameters, cors, method_not_allowed};
use crate::center::routes::ENDPOINTS;
use crate::problem::{Kind, Problem};

/// Limits of the dispatcher.
#[derive(Debug, Clone)]
pub struct Options {
    /// Gateways in one answer.
    pub max_endpoints: usize,
    /// How long a device may keep the answer.
    pub ttl: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options { max_endpoints: 8, ttl: Duration::from_secs(60) }
    }
}

/// What the dispatcher is built from.
pub struct Deps {
    /// The gateways that are alive.
    pub gateways: Live<Vec<Instance>>,
    pub metrics: Metrics,
    pub options: Options,
}

/// A handle; clones share everything.
#[derive(Clone)]
pub struct Dispatcher {
    deps: Arc<Deps>,
}

/// Gateways to try, best first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoints {
    pub endpoints: Vec<Endpoint>,
    /// Ask again after this time, and whenever none of them answers.
    pub ttl_seconds: u64,
}

/// A gateway's addresses: those it has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    pub gateway: String,
    /// MQTT over TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mqtt: Option<String>,
    /// MQTT over TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mqtts: Option<String>,
    /// MQTT over WebSocket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ws: Option<String>,
    /// MQTT over WebSocket over TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wss: Option<String>,
}

/// Longest name of a device that can be asked for, bytes.
const MAX_DEVICE_BYTES: usize = 1024;
/// Where a gateway speaks MQTT over WebSocket.
const WEBSOCKET_PATH: &str = "/mqtt";

impl Dispatcher {
    pub fn new(deps: Deps) -> Self {
        Dispatcher { deps: Arc::new(deps) }
    }

    /// `GET /v1/endpoints`, with no fallback for other paths: to be merged with others.
    pub fn http_router(&self) -> axum::Router {
        axum::Router::new()
            .route(ENDPOINTS, get(endpoints))
            .method_not_allowed_fallback(method_not_allowed)
            .layer(cors())
            .with_state(self.clone())
    }

    /// Gateways for a device.
    pub fn endpoints(&self, device: &str) -> Result<Endpoints, Problem> {
        if device.is_empty() {
            return Err(Problem::field("device", "is empty"));
        }
        if device.len() > MAX_DEVICE_BYTES {
            return Err(Problem::field("device", format!("is longer than {MAX_DEVICE_BYTES} bytes")));
        }
        let gateways = self.deps.gateways.borrow().clone();
        let endpoints = rank(&gateways, device, self.deps.options.max_endpoints);
        if endpoints.is_empty() {
            return Err(Problem::new(Kind::NoGateway, "no gateway is there, or all of them are draining"));
        }
        Ok(Endpoints { endpoints, ttl_seconds: self.deps.options.ttl.as_secs() })
    }
}

/// Rendezvous hashing: each gateway has a score for the device, the highest is the first to try. When a gateway comes
/// or goes, only the devices that it wins or loses move. Every dispatcher must come to the same order: the hash is XXH3.
fn rank(gateways: &[Instance], device: &str, max: usize) -> Vec<Endpoint> {
    let seed = xxh3_64_with_seed(device.as_bytes(), 0);
    let mut ranked: Vec<(u64, &str, Endpoint)> = gateways
        .iter()
        .filter(|gateway| !gateway.draining)
        .filter_map(|gateway| {
            let score = xxh3_64_with_seed(gateway.id.as_bytes(), seed);
            Some((score, gateway.id.as_str(), endpoint(gateway)?))
        })
        .collect();
    ranked.sort_unstable_by(|a, b| (b.0, b.1).cmp(&(a.0, a.1)));
    ranked.into_iter().take(max).map(|(_, _, endpoint)| endpoint).collect()
}

/// None when a device has no way to reach it.
fn endpoint(gateway: &Instance) -> Option<Endpoint> {
    let url = |scheme: &str, path: &str| {
        gateway.addresses.get(scheme).map(|address| format!("{scheme}://{address}{path}"))
    };
    let endpoint = Endpoint {
        gateway: gateway.id.clone(),
        mqtt: url("mqtt", ""),
        mqtts: url("mqtts", ""),
        ws: url("ws", WEBSOCKET_PATH),
        wss: url("wss", WEBSOCKET_PATH),
    };
    let reachable = endpoint.mqtt.is_some()
        || endpoint.mqtts.is_some()
        || endpoint.ws.is_some()
        || endpoint.wss.is_some();
    reachable.then_some(endpoint)
}

async fn endpoints(State(dispatcher): State<Dispatcher>, request: Request) -> Response {
    let started = Instant::now();
    let (parts, _) = request.into_parts();
    let asked = || -> Result<Endpoints, Problem> {
        let mut parameters = Parameters::of(&parts)?;
        let device = parameters.take("device").ok_or_else(|| Problem::field("device", "is missing"))?;
        parameters.end()?;
        dispatcher.endpoints(&device)
    };
    let mut response = asked().map(Json).into_response();
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    dispatcher.deps.metrics.request(response.status().as_str(), started.elapsed());
    response
}

#[cfg(test)]
mod tests;
