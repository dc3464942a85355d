//! The dispatcher's metrics: rate, errors and duration of the questions of devices.

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

/// Questions of devices, by HTTP `status`.
pub const REQUESTS_TOTAL: &str = "carillon_dispatcher_requests_total";
/// Time until the answer.
pub const REQUEST_SECONDS: &str = "carillon_dispatcher_request_seconds";

/// Handles to the metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    seconds: Histogram,
}

impl Metrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let buckets = prometheus::exponential_buckets(0.000_01, 4.0, 8)?;
        let metrics = Metrics {
            requests: IntCounterVec::new(Opts::new(REQUESTS_TOTAL, "Questions of devices."), &["status"])?,
            seconds: Histogram::with_opts(
                HistogramOpts::new(REQUEST_SECONDS, "Time until the answer.").buckets(buckets),
            )?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        Ok(metrics)
    }

    pub fn request(&self, status: &str, took: Duration) {
        self.requests.with_label_values(&[status]).inc();
        self.seconds.observe(took.as_secs_f64());
    }
}
