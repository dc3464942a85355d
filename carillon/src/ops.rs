//! The ops server: `/metrics` for Prometheus, `/healthz` and `/readyz` for whoever runs the process.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus::{Encoder, IntGaugeVec, Opts, TextEncoder};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long a stop waits for requests that are being answered.
const GRACE: Duration = Duration::from_secs(1);

/// Why the process cannot do its work at present; empty = ready.
pub type Readiness = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// Why nothing but a restart helps, if that is so. It ends by itself then; should the end be held up, it must not look alive.
pub type Liveness = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// A running ops server.
pub struct Ops {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

struct Shared {
    metrics: prometheus::Registry,
    readiness: Readiness,
    liveness: Liveness,
}

/// Serves until stopped. The metrics are those of `metrics` and of the process as a whole.
pub fn serve(
    listener: TcpListener,
    metrics: prometheus::Registry,
    readiness: Readiness,
    liveness: Liveness,
) -> Ops {
    let stop = CancellationToken::new();
    let router = Router::new()
        .route("/", get("/metrics\n/healthz\n/readyz\n"))
        .route("/metrics", get(scrape))
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .with_state(Arc::new(Shared { metrics, readiness, liveness }));
    let stopped = stop.clone().cancelled_owned();
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
            tracing::error!(%error, "the ops server has ended");
        }
    });
    Ops { stop, task }
}

impl Ops {
    pub async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(GRACE, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

async fn scrape(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let mut families = shared.metrics.gather();
    families.extend(prometheus::gather());
    let mut text = Vec::new();
    match TextEncoder::new().encode(&families, &mut text) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text),
        Err(error) => {
            let plain = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
            (StatusCode::INTERNAL_SERVER_ERROR, plain, format!("{error}\n").into_bytes())
        }
    }
}

async fn alive(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    match (shared.liveness)() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let reasons = (shared.readiness)();
    if reasons.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

/// Registers what every process tells about itself: which build it is, and what it uses (memory, CPU, open files).
pub fn register_process(metrics: &prometheus::Registry, command: &str) -> prometheus::Result<()> {
    let opts =
        Opts::new("carillon_process_build_info", "1, with the version and the command of this process.");
    let info = IntGaugeVec::new(opts, &["version", "command"])?;
    info.with_label_values(&[env!("CARGO_PKG_VERSION"), command]).set(1);
    metrics.register(Box::new(info))?;
    metrics.register(Box::new(crate::process_metrics::ProcessMetrics::new()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_cannot_go_on_is_not_alive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/healthz", listener.local_addr().unwrap());
        let failure = Arc::new(std::sync::Mutex::new(None));
        let told = failure.clone();
        let liveness: Liveness = Arc::new(move || told.lock().unwrap().clone());
        let ops = serve(listener, prometheus::Registry::new(), Arc::new(Vec::new), liveness);
        let get = async || {
            let answer = reqwest::get(&url).await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        };
        assert_eq!(get().await, (200, "alive\n".to_owned()));
        *failure.lock().unwrap() = Some("consensus has ended".to_owned());
        assert_eq!(get().await, (503, "consensus has ended\n".to_owned()));
        ops.stop().await;
    }
}
