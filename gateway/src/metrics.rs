//! The gateway's metrics: names in one table, described once. Shards count for themselves and add up once a second.

use std::sync::Arc;

use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

pub const CONNECTIONS: &str = "carillon_gateway_connections";
pub const CONNECTS: &str = "carillon_gateway_connects_total";
pub const DISCONNECTS: &str = "carillon_gateway_disconnects_total";
pub const DELIVERED: &str = "carillon_gateway_deliveries_total";
pub const DROPPED: &str = "carillon_gateway_deliveries_dropped_total";
pub const PUBLISHED: &str = "carillon_gateway_publishes_total";
pub const SUBSCRIPTIONS: &str = "carillon_gateway_subscriptions";
pub const BYTES: &str = "carillon_gateway_bytes_total";
pub const ROUTES: &str = "carillon_gateway_routes";
pub const ATTACHED: &str = "carillon_gateway_registries_attached";
pub const ATTACH_OVERFLOWS: &str = "carillon_gateway_attach_overflows_total";
pub const STALE_EPOCH: &str = "carillon_gateway_stale_epoch_messages_total";
pub const SAVER_UNSENT: &str = "carillon_gateway_saver_unsent_total";
pub const SAVER_UNTOLD: &str = "carillon_gateway_saver_untold_sessions";
pub const SAVER_GIVEN_UP: &str = "carillon_gateway_saver_given_up_total";
pub const TIMER_ENTRIES: &str = "carillon_gateway_timer_entries";
pub const LOG_READS: &str = "carillon_gateway_log_reads_total";
pub const LISTENERS: &str = "carillon_gateway_listener_open_state";
pub const TLS_HANDSHAKES: &str = "carillon_gateway_tls_handshakes_total";
pub const CERTIFICATE_EXPIRY: &str = "carillon_gateway_certificate_expiry_timestamp_seconds";
pub const CERTIFICATE_LOADS: &str = "carillon_gateway_certificate_loads_total";
pub const PROXY_ERRORS: &str = "carillon_gateway_proxy_errors_total";
pub const ACCEPTS_REFUSED: &str = "carillon_gateway_accepts_refused_total";
pub const ACCEPT_PAUSES: &str = "carillon_gateway_accept_pauses_total";
pub const PENDING_CONNECTS: &str = "carillon_gateway_pending_connects";
pub const SOURCE_ADDRESSES: &str = "carillon_gateway_source_addresses";
pub const BLOCKED_ADDRESSES: &str = "carillon_gateway_blocked_addresses";
pub const AUTH_FAILURES: &str = "carillon_gateway_auth_failures_total";
pub const THROTTLED: &str = "carillon_gateway_publish_pauses_total";
pub const OVERLOADED: &str = "carillon_gateway_overloaded_state";
pub const MEMORY_RATIO: &str = "carillon_gateway_memory_ratio";
pub const MEMORY_LIMIT: &str = "carillon_gateway_memory_limit_bytes";
pub const LOOP_LAG: &str = "carillon_gateway_loop_lag_seconds";
pub const DRAINING: &str = "carillon_gateway_draining";
pub const MOVED: &str = "carillon_gateway_moved_total";
pub const PARKED: &str = "carillon_gateway_parked_sessions";
pub const RESUMED: &str = "carillon_gateway_resumed_total";
pub const PARKED_ENDED: &str = "carillon_gateway_parked_ended_total";

#[derive(Clone)]
pub struct Metrics {
    /// By protocol: `mqtt3`, `mqtt5`.
    pub connections: IntGaugeVec,
    /// By result: `accepted`, or the MQTT 5 reason code of the refusal ("0x87").
    pub connects: IntCounterVec,
    /// By reason: `normal`, `keep_alive_timeout`, `network`, …
    pub disconnects: IntCounterVec,
    /// By QoS.
    pub delivered: IntCounterVec,
    /// By reason: `slow_consumer`, `expired`, `too_large`, `inflight`.
    pub dropped: IntCounterVec,
    /// By QoS.
    pub published: IntCounterVec,
    pub subscriptions: IntGauge,
    /// By direction: `in`, `out`.
    pub bytes: IntCounterVec,
    pub routes: IntGauge,
    pub attached: IntGauge,
    pub attach_overflows: IntCounter,
    pub stale_epoch: IntCounter,
    pub saver_unsent: IntCounter,
    pub saver_untold: IntGauge,
    pub saver_given_up: IntCounter,
    pub log_reads: IntCounter,
    /// By listener and protocol: 1 while it accepts, 0 while something is in its way.
    pub listeners: IntGaugeVec,
    /// By result: `full`, `resumed`, or why not.
    pub tls_handshakes: IntCounterVec,
    /// By listener: when the first of its certificates ends, Unix seconds.
    pub certificate_expiry: IntGaugeVec,
    /// By result: `loaded`, `failed`.
    pub certificate_loads: IntCounterVec,
    /// By error: `missing`, `version_1`, …
    pub proxy_errors: IntCounterVec,
    /// By reason: `denied`, `ip_connections`, `auth_failures`.
    pub accepts_refused: IntCounterVec,
    pub accept_pauses: IntCounter,
    pub pending_connects: IntGauge,
    pub source_addresses: IntGauge,
    pub blocked_addresses: IntGauge,
    /// By reason, as in `auth::Failure`.
    pub auth_failures: IntCounterVec,
    pub throttled: IntCounter,
    pub overloaded: IntGauge,
    pub memory_ratio: Gauge,
    pub memory_limit: IntGauge,
    pub loop_lag: Gauge,
    /// 0 = active, 1 = draining, 2 = drained.
    pub draining: IntGauge,
    pub moved: IntCounter,
    pub parked: IntGauge,
    pub resumed: IntCounter,
    pub parked_ended: IntCounter,
    pub timer_entries: IntGauge,
}

impl Metrics {
    /// # Errors
    /// When one of the names is taken in this registry.
    pub fn register(registry: &Registry) -> Result<Metrics, prometheus::Error> {
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
        let ratio = |name: &str, help: &str| -> Result<Gauge, prometheus::Error> {
            let metric = Gauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let connections = IntGaugeVec::new(
            Opts::new(CONNECTIONS, "Devices connected, by protocol version"),
            &["protocol"],
        )?;
        registry.register(Box::new(connections.clone()))?;
        let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        Ok(Metrics {
            connections,
            connects: counters(CONNECTS, "CONNECT packets answered, by result", "result")?,
            disconnects: counters(DISCONNECTS, "Connections ended, by reason", "reason")?,
            delivered: counters(DELIVERED, "PUBLISH packets sent to devices, by QoS", "qos")?,
            dropped: counters(DROPPED, "Messages not sent to a subscriber, by reason", "reason")?,
            published: counters(PUBLISHED, "PUBLISH packets received from devices, by QoS", "qos")?,
            subscriptions: gauge(SUBSCRIPTIONS, "Subscriptions of connected devices")?,
            bytes: counters(
                BYTES,
                "Bytes to and from devices, TLS and WebSocket framing aside",
                "direction",
            )?,
            routes: gauge(ROUTES, "Topics and filters that this gateway has subscribers for")?,
            attached: gauge(ATTACHED, "Registry instances that this gateway is attached to")?,
            attach_overflows: counter(
                ATTACH_OVERFLOWS,
                "Announcements lost because a registry did not take them",
            )?,
            stale_epoch: counter(STALE_EPOCH, "Messages refused because they came from a deposed owner")?,
            saver_unsent: counter(SAVER_UNSENT, "Acks that could not be sent to a saver")?,
            saver_untold: gauge(SAVER_UNTOLD, "Ends of sessions that the saver has not answered yet")?,
            saver_given_up: counter(
                SAVER_GIVEN_UP,
                "Ends of sessions that were told no more because the saver did not answer in time, or too many were untold",
            )?,
            log_reads: counter(LOG_READS, "Reads of topic logs for devices that were behind")?,
            listeners: gauges(
                LISTENERS,
                "1 while a listener accepts connections, 0 while something is in its way",
                &["listener", "protocol"],
            )?,
            tls_handshakes: counters(TLS_HANDSHAKES, "TLS handshakes ended, by result", "result")?,
            certificate_expiry: gauges(
                CERTIFICATE_EXPIRY,
                "When the first of a listener's certificates ends, Unix seconds",
                &["listener"],
            )?,
            certificate_loads: counters(
                CERTIFICATE_LOADS,
                "Times that a listener's certificates were read anew, by result",
                "result",
            )?,
            proxy_errors: counters(
                PROXY_ERRORS,
                "Connections closed for their PROXY protocol header, by error",
                "error",
            )?,
            accepts_refused: counters(
                ACCEPTS_REFUSED,
                "Connections closed as soon as they were accepted, by reason",
                "reason",
            )?,
            accept_pauses: counter(
                ACCEPT_PAUSES,
                "Times that accepting paused because connects came faster than their rate",
            )?,
            pending_connects: gauge(PENDING_CONNECTS, "Connections without a complete CONNECT")?,
            source_addresses: gauge(SOURCE_ADDRESSES, "Addresses that connections come from (IPv6: /64)")?,
            blocked_addresses: gauge(
                BLOCKED_ADDRESSES,
                "Addresses refused because their credentials failed too often",
            )?,
            auth_failures: counters(AUTH_FAILURES, "Credentials that were refused, by reason", "reason")?,
            throttled: counter(
                THROTTLED,
                "Times that a device was not read for a while because it published above its rate",
            )?,
            overloaded: gauge(OVERLOADED, "1 while new devices are refused for want of memory or CPU")?,
            memory_ratio: ratio(MEMORY_RATIO, "Memory used, of the tightest limit that holds")?,
            memory_limit: gauge(MEMORY_LIMIT, "The tightest memory limit that holds")?,
            loop_lag: ratio(LOOP_LAG, "Longest round of a shard's loop in the last second")?,
            draining: gauge(DRAINING, "0 = active, 1 = draining, 2 = drained")?,
            moved: counter(MOVED, "Devices sent to other gateways by a drain or a rebalance")?,
            parked: gauge(
                PARKED,
                "Sessions whose connection dropped, kept here until their devices come back",
            )?,
            resumed: counter(RESUMED, "Sessions that went on with a new connection, without the saver")?,
            parked_ended: counter(
                PARKED_ENDED,
                "Sessions whose devices did not come back in the resume window",
            )?,
            timer_entries: gauge(
                TIMER_ENTRIES,
                "Entries in the timer wheels: deadlines of connections to look at",
            )?,
        })
    }
}

/// What one shard has counted since it last added up.
#[derive(Default)]
pub struct Counts {
    pub delivered: [u64; 3],
    pub published: [u64; 3],
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub dropped_slow: u64,
    pub dropped_expired: u64,
    pub dropped_large: u64,
    pub dropped_inflight: u64,
    /// Times that a device was not read for a while because it published above its rate.
    pub throttled: u64,
}

impl Counts {
    pub fn flush(&mut self, metrics: &Metrics) {
        let counts = std::mem::take(self);
        for (qos, label) in ["0", "1", "2"].iter().enumerate() {
            metrics.delivered.with_label_values(&[label]).inc_by(counts.delivered[qos]);
            metrics.published.with_label_values(&[label]).inc_by(counts.published[qos]);
        }
        metrics.throttled.inc_by(counts.throttled);
        metrics.bytes.with_label_values(&["in"]).inc_by(counts.bytes_in);
        metrics.bytes.with_label_values(&["out"]).inc_by(counts.bytes_out);
        let dropped = [
            ("slow_consumer", counts.dropped_slow),
            ("expired", counts.dropped_expired),
            ("too_large", counts.dropped_large),
            ("inflight", counts.dropped_inflight),
        ];
        for (reason, count) in dropped {
            metrics.dropped.with_label_values(&[reason]).inc_by(count);
        }
    }
}

/// An app's totals since the gateway started, over all shards.
#[derive(Default)]
pub struct AppTotals {
    apps: parking_lot::Mutex<std::collections::HashMap<Arc<str>, AppCounts>>,
}

#[derive(Default, Clone, Copy)]
pub struct AppCounts {
    pub connections: i64,
    pub delivered: u64,
    pub published: u64,
    pub dropped: u64,
}

impl AppTotals {
    pub fn add(&self, app: &Arc<str>, counts: AppCounts) {
        let mut apps = self.apps.lock();
        let total = apps.entry(app.clone()).or_default();
        total.connections += counts.connections;
        total.delivered += counts.delivered;
        total.published += counts.published;
        total.dropped += counts.dropped;
    }

    pub fn snapshot(&self) -> Vec<(Arc<str>, AppCounts)> {
        self.apps.lock().iter().map(|(app, counts)| (app.clone(), *counts)).collect()
    }
}
