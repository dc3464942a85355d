//! The coordinator's metrics: names and help in one table.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

pub const POSTS: (&str, &str) =
    ("carillon_coordinator_posts_total", "POSTs to webhooks, by outcome (ok, failed)");
pub const EVENTS: (&str, &str) =
    ("carillon_coordinator_events_total", "Events that webhooks have taken, by type (upstream, presence)");
pub const POST_SECONDS: (&str, &str) =
    ("carillon_coordinator_post_seconds", "From the beginning of a POST to its answer");
pub const DROPPED: (&str, &str) = (
    "carillon_coordinator_dropped_events_total",
    "Events that were in no log and found their app's queue full",
);
pub const READS: (&str, &str) =
    ("carillon_coordinator_log_reads_total", "Reads of logs, of messages that were not delivered live");
pub const APPS: (&str, &str) =
    ("carillon_coordinator_apps", "Apps whose webhook is served by this instance: their session is open");
pub const QUEUED: (&str, &str) =
    ("carillon_coordinator_queued_events", "Events in memory that wait for their webhook");

#[derive(Clone)]
pub struct Metrics {
    pub posts: IntCounterVec,
    pub events: IntCounterVec,
    pub post_seconds: Histogram,
    pub dropped: IntCounter,
    pub reads: IntCounter,
    pub apps: IntGauge,
    pub queued: IntGauge,
}

impl Metrics {
    /// Errors when one of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Metrics {
            posts: IntCounterVec::new(Opts::new(POSTS.0, POSTS.1), &["outcome"])?,
            events: IntCounterVec::new(Opts::new(EVENTS.0, EVENTS.1), &["type"])?,
            post_seconds: Histogram::with_opts(HistogramOpts::new(POST_SECONDS.0, POST_SECONDS.1))?,
            dropped: IntCounter::new(DROPPED.0, DROPPED.1)?,
            reads: IntCounter::new(READS.0, READS.1)?,
            apps: IntGauge::new(APPS.0, APPS.1)?,
            queued: IntGauge::new(QUEUED.0, QUEUED.1)?,
        };
        registry.register(Box::new(metrics.posts.clone()))?;
        registry.register(Box::new(metrics.events.clone()))?;
        registry.register(Box::new(metrics.post_seconds.clone()))?;
        registry.register(Box::new(metrics.dropped.clone()))?;
        registry.register(Box::new(metrics.reads.clone()))?;
        registry.register(Box::new(metrics.apps.clone()))?;
        registry.register(Box::new(metrics.queued.clone()))?;
        Ok(metrics)
    }
}
