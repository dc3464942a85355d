//! The saver's metrics: one table of names, registered once with the process's registry.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Appends by result: `appended`, `duplicate`, `fenced`, `unavailable`, `invalid`.
pub const APPENDS_TOTAL: &str = "carillon_saver_appends_total";
/// Commits by kind: `durable` (one fsync), `deferred` (acks and sweeps).
pub const COMMITS_TOTAL: &str = "carillon_saver_commits_total";
pub const COMMIT_SECONDS: &str = "carillon_saver_commit_seconds";
pub const COMMIT_APPENDS: &str = "carillon_saver_commit_appends";
pub const QUEUE_OPERATIONS: &str = "carillon_saver_queue_operations";
pub const READS_TOTAL: &str = "carillon_saver_reads_total";
pub const READ_MESSAGES_TOTAL: &str = "carillon_saver_read_messages_total";
pub const ACKS_TOTAL: &str = "carillon_saver_acks_total";
/// Messages removed, by reason: `limit`, `age`, `consumed`.
pub const TRIMMED_TOTAL: &str = "carillon_saver_trimmed_messages_total";
pub const EXPIRED_SESSIONS_TOTAL: &str = "carillon_saver_expired_sessions_total";
pub const TOPICS: &str = "carillon_saver_topics";
pub const SESSIONS: &str = "carillon_saver_sessions";
pub const LOG_MESSAGES: &str = "carillon_saver_log_messages";
pub const LOG_BYTES: &str = "carillon_saver_log_bytes";
pub const RETAINED_MESSAGES: &str = "carillon_saver_retained_messages";
/// 1 while writes are accepted; 0 when the disk is full or a write failed.
pub const WRITABLE: &str = "carillon_saver_writable_state";
pub const STREAMS: &str = "carillon_saver_exchange_streams";

/// Handles to the metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    pub appends: IntCounterVec,
    pub commits: IntCounterVec,
    pub commit_seconds: Histogram,
    pub commit_appends: Histogram,
    pub queue: IntGauge,
    pub reads: IntCounter,
    pub read_messages: IntCounter,
    pub acks: IntCounter,
    pub trimmed: IntCounterVec,
    pub expired_sessions: IntCounter,
    pub topics: IntGauge,
    pub sessions: IntGauge,
    pub log_messages: IntGauge,
    pub log_bytes: IntGauge,
    pub retained: IntGauge,
    pub writable: IntGauge,
    pub streams: IntGauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, label: &str| -> Result<IntCounterVec, prometheus::Error> {
            let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| -> Result<Histogram, prometheus::Error> {
            let metric = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        Ok(Metrics {
            appends: counters(APPENDS_TOTAL, "Appends by result.", "result")?,
            commits: counters(COMMITS_TOTAL, "Commits by kind.", "kind")?,
            commit_seconds: histogram(
                COMMIT_SECONDS,
                "Time that a commit with its fsync took.",
                prometheus::exponential_buckets(0.000_1, 2.0, 16)?,
            )?,
            commit_appends: histogram(
                COMMIT_APPENDS,
                "Appends that one commit made durable.",
                prometheus::exponential_buckets(1.0, 2.0, 14)?,
            )?,
            queue: gauge(QUEUE_OPERATIONS, "Operations that wait for the writer.")?,
            reads: counter(READS_TOTAL, "Reads of a log.")?,
            read_messages: counter(READ_MESSAGES_TOTAL, "Messages read from logs.")?,
            acks: counter(ACKS_TOTAL, "Cursor positions acknowledged.")?,
            trimmed: counters(TRIMMED_TOTAL, "Messages removed from logs, by reason.", "reason")?,
            expired_sessions: counter(EXPIRED_SESSIONS_TOTAL, "Sessions forgotten because they expired.")?,
            topics: gauge(TOPICS, "Topics that have, or had, a log.")?,
            sessions: gauge(SESSIONS, "Sessions kept.")?,
            log_messages: gauge(LOG_MESSAGES, "Messages in all logs.")?,
            log_bytes: gauge(LOG_BYTES, "Bytes of the messages in all logs.")?,
            retained: gauge(RETAINED_MESSAGES, "Retained messages.")?,
            writable: gauge(WRITABLE, "1 while writes are accepted.")?,
            streams: gauge(STREAMS, "Exchange streams that are open.")?,
        })
    }
}
