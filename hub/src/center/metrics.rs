//! The center's metrics: rate, errors and duration of each route, and what became of each push.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry};

/// Requests, by `route` (HTTP: method and path template; gRPC: method) and `status` (HTTP status or gRPC code).
pub const REQUESTS_TOTAL: &str = "carillon_center_requests_total";
/// Time from the head of a request to the head of its answer, by `route`; of a push stream, until its end.
pub const REQUEST_SECONDS: &str = "carillon_center_request_seconds";
/// Requests that are being carried out.
pub const IN_FLIGHT_REQUESTS: &str = "carillon_center_in_flight_requests";
/// Messages pushed, singly or in batches, by `result`: accepted, duplicate, or the slug of the problem.
pub const PUSHES_TOTAL: &str = "carillon_center_pushes_total";

/// Handles to the metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    in_flight: IntGauge,
    pushes: IntCounterVec,
}

impl Metrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let buckets = prometheus::exponential_buckets(0.000_25, 2.0, 17)?;
        let metrics = Metrics {
            requests: IntCounterVec::new(Opts::new(REQUESTS_TOTAL, "Requests."), &["route", "status"])?,
            seconds: HistogramVec::new(
                HistogramOpts::new(REQUEST_SECONDS, "Time until the answer.").buckets(buckets),
                &["route"],
            )?,
            in_flight: IntGauge::new(IN_FLIGHT_REQUESTS, "Requests that are being carried out.")?,
            pushes: IntCounterVec::new(Opts::new(PUSHES_TOTAL, "Messages pushed."), &["result"])?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.in_flight.clone()))?;
        registry.register(Box::new(metrics.pushes.clone()))?;
        Ok(metrics)
    }

    pub fn request(&self, route: &str, status: &str, took: Duration) {
        self.requests.with_label_values(&[route, status]).inc();
        self.seconds.with_label_values(&[route]).observe(took.as_secs_f64());
    }

    pub fn push(&self, result: &str) {
        self.pushes.with_label_values(&[result]).inc();
    }

    /// Counts a request for as long as the guard is held.
    pub fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }
}

/// A request that is being carried out.
pub struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
