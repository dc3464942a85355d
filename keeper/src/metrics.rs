//! The keeper's metrics: one table of names, read from the node at the moment of the scrape.

use std::sync::{Arc, Weak};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::core::Core;
use crate::identity::node_text;

pub const LEADER: &str = "carillon_keeper_leader_state";
pub const TERM: &str = "carillon_keeper_term_number";
pub const LEADERS_SEEN: &str = "carillon_keeper_leaders_seen_total";
pub const LOG_INDEX: &str = "carillon_keeper_log_index";
pub const COMMITTED_INDEX: &str = "carillon_keeper_committed_index";
pub const APPLIED_INDEX: &str = "carillon_keeper_applied_index";
pub const APPLY_LAG: &str = "carillon_keeper_apply_lag_entries";
pub const SNAPSHOT_INDEX: &str = "carillon_keeper_snapshot_index";
pub const SNAPSHOT_SECONDS: &str = "carillon_keeper_snapshot_seconds";
pub const FSYNC_SECONDS: &str = "carillon_keeper_fsync_seconds";
pub const APPEND_ENTRIES: &str = "carillon_keeper_append_entries";
pub const PROPOSALS_PENDING: &str = "carillon_keeper_proposals_pending";
pub const PROPOSALS_FAILED: &str = "carillon_keeper_proposals_failed_total";
pub const PEER_ROUND_TRIP_SECONDS: &str = "carillon_keeper_peer_round_trip_seconds";
pub const PEER_LAG: &str = "carillon_keeper_peer_lag_entries";
pub const LOG_BYTES: &str = "carillon_keeper_log_bytes";
pub const SNAPSHOT_BYTES: &str = "carillon_keeper_snapshot_bytes";
pub const REVISION: &str = "carillon_keeper_revision_number";
pub const KEYS: &str = "carillon_keeper_keys";
pub const STORE_BYTES: &str = "carillon_keeper_store_bytes";
pub const QUOTA_BYTES: &str = "carillon_keeper_quota_bytes";
pub const LEASES: &str = "carillon_keeper_leases";
pub const LEASES_EXPIRED: &str = "carillon_keeper_leases_expired_total";
pub const WATCHES: &str = "carillon_keeper_watches";
pub const WATCH_EVENTS: &str = "carillon_keeper_watch_events_total";
pub const WATCHES_COMPACTED: &str = "carillon_keeper_watches_compacted_total";
pub const REQUESTS: &str = "carillon_keeper_requests_total";
pub const REFUSED: &str = "carillon_keeper_refused_total";
pub const SLOTS_MOVED: &str = "carillon_keeper_slots_moved_total";
pub const DENIED: &str = "carillon_keeper_denied_total";
pub const CERTIFICATE_EXPIRY: &str = "carillon_keeper_certificate_expiry_timestamp_seconds";

/// Name and help of every metric.
pub const ALL: [(&str, &str); 31] = [
    (LEADER, "1 while this node leads"),
    (TERM, "Raft term"),
    (LEADERS_SEEN, "elections that this node has seen the outcome of"),
    (LOG_INDEX, "index of the last entry in the log"),
    (COMMITTED_INDEX, "index of the last entry that the cluster has decided, as far as this node has heard"),
    (APPLIED_INDEX, "index of the last entry applied"),
    (APPLY_LAG, "entries that are decided and not applied yet"),
    (SNAPSHOT_INDEX, "index of the last entry in the snapshot"),
    (SNAPSHOT_SECONDS, "time to make a snapshot, until it is on disk"),
    (FSYNC_SECONDS, "time to write a group of entries and fsync it"),
    (APPEND_ENTRIES, "entries that went to disk by one fsync"),
    (
        PROPOSALS_PENDING,
        "entries that this node has proposed, or had the leader propose, and that are not decided",
    ),
    (PROPOSALS_FAILED, "entries that this node could not get decided, by reason"),
    (PEER_ROUND_TRIP_SECONDS, "as the leader: the last heartbeat to another node and back, by node"),
    (PEER_LAG, "as the leader: entries that are not known to be on the disk of another node, by node"),
    (LOG_BYTES, "size of the log on disk"),
    (SNAPSHOT_BYTES, "size of the snapshot on disk"),
    (REVISION, "revision of the store"),
    (KEYS, "keys in the store"),
    (STORE_BYTES, "keys and values in the store"),
    (QUOTA_BYTES, "most that the store may hold"),
    (LEASES, "leases that are alive"),
    (LEASES_EXPIRED, "leases that ended because nobody kept them alive"),
    (WATCHES, "watches that are open"),
    (WATCH_EVENTS, "changes that were sent to watches"),
    (WATCHES_COMPACTED, "watches that were too far behind to be resumed"),
    (REQUESTS, "calls, by method"),
    (REFUSED, "configuration documents that were refused, by kind"),
    (SLOTS_MOVED, "slots whose owner has changed"),
    (DENIED, "connections and calls that were refused for their certificate, by what"),
    (CERTIFICATE_EXPIRY, "when the keeper's certificate ends, Unix seconds; 0 = it has none"),
];

/// From a disk that has a cache that a battery keeps, to one that is about to fail.
const SECONDS: [f64; 12] = [0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0, 4.0];
const ENTRIES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];

pub(crate) fn options(name: &str) -> Opts {
    let help = ALL.iter().find(|(known, _)| *known == name).map_or("", |(_, help)| help);
    Opts::new(name, help)
}

/// Of something that takes the disk some time.
pub(crate) fn seconds(name: &str) -> HistogramOpts {
    HistogramOpts { common_opts: options(name), buckets: SECONDS.to_vec() }
}

/// Of a number of entries.
pub(crate) fn entries(name: &str) -> HistogramOpts {
    HistogramOpts { common_opts: options(name), buckets: ENTRIES.to_vec() }
}

/// What is counted as it happens.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub requests: IntCounterVec,
    pub refused: IntCounterVec,
    pub denied: IntCounterVec,
    pub leases_expired: IntCounter,
    pub slots_moved: IntCounter,
    pub watch_events: IntCounter,
    pub watches_compacted: IntCounter,
    pub watches: IntGauge,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let denied = IntCounterVec::new(options(DENIED), &["what"])?;
        // Both are there from the start, for alerts.
        ["connection", "call"].iter().for_each(|what| denied.with_label_values(&[what]).reset());
        Ok(Metrics {
            requests: IntCounterVec::new(options(REQUESTS), &["method"])?,
            refused: IntCounterVec::new(options(REFUSED), &["kind"])?,
            denied,
            leases_expired: IntCounter::with_opts(options(LEASES_EXPIRED))?,
            slots_moved: IntCounter::with_opts(options(SLOTS_MOVED))?,
            watch_events: IntCounter::with_opts(options(WATCH_EVENTS))?,
            watches_compacted: IntCounter::with_opts(options(WATCHES_COMPACTED))?,
            watches: IntGauge::with_opts(options(WATCHES))?,
        })
    }
}

/// What a registry holds of a keeper.
#[derive(Clone)]
struct Scrape {
    core: Weak<Core>,
    counted: Arc<Vec<Box<dyn Collector>>>,
    gauges: Arc<Vec<(&'static str, IntGauge)>>,
    peers: [GaugeVec; 2],
}

/// Puts the keeper's metrics into a registry; they are taken out again when the answer is dropped.
pub(crate) fn register(core: &Arc<Core>, registry: Registry) -> Result<Registered, prometheus::Error> {
    let read = [
        LEADER,
        TERM,
        LOG_INDEX,
        COMMITTED_INDEX,
        APPLIED_INDEX,
        APPLY_LAG,
        SNAPSHOT_INDEX,
        LOG_BYTES,
        SNAPSHOT_BYTES,
        REVISION,
        KEYS,
        STORE_BYTES,
        QUOTA_BYTES,
        LEASES,
        CERTIFICATE_EXPIRY,
    ];
    let mut gauges = Vec::new();
    for name in read {
        gauges.push((name, IntGauge::with_opts(options(name))?));
    }
    let Metrics {
        requests,
        refused,
        denied,
        leases_expired,
        slots_moved,
        watch_events,
        watches_compacted,
        watches,
    } = core.metrics.clone();
    let mut counted: Vec<Box<dyn Collector>> = vec![
        Box::new(requests),
        Box::new(refused),
        Box::new(denied),
        Box::new(leases_expired),
        Box::new(slots_moved),
        Box::new(watch_events),
        Box::new(watches_compacted),
        Box::new(watches),
    ];
    counted.extend(core.node.measures().collectors());
    let by_node = |name| GaugeVec::new(options(name), &["node"]);
    let scrape = Scrape {
        core: Arc::downgrade(core),
        counted: Arc::new(counted),
        gauges: Arc::new(gauges),
        peers: [by_node(PEER_ROUND_TRIP_SECONDS)?, by_node(PEER_LAG)?],
    };
    registry.register(Box::new(scrape.clone()))?;
    Ok(Registered { registry, scrape })
}

pub(crate) struct Registered {
    registry: Registry,
    scrape: Scrape,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.registry.unregister(Box::new(self.scrape.clone()));
    }
}

impl Scrape {
    /// Only of those who are members now, and only while this node leads.
    fn read_peers(&self, core: &Core) {
        let [round_trip, lag] = &self.peers;
        round_trip.reset();
        lag.reset();
        let set = |gauge: &GaugeVec, node: &str, value: f64| gauge.with_label_values(&[node]).set(value);
        for peer in core.node.peers() {
            let node = node_text(peer.id);
            set(lag, &node, peer.lag as f64);
            if let Some(took) = peer.round_trip {
                set(round_trip, &node, took.as_secs_f64());
            }
        }
    }
}

impl Collector for Scrape {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = self.gauges.iter().flat_map(|(_, gauge)| gauge.desc());
        let peers = self.peers.iter().flat_map(Collector::desc);
        gauges.chain(peers).chain(self.counted.iter().flat_map(|counted| counted.desc())).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(core) = self.core.upgrade() else { return Vec::new() };
        self.read_peers(&core);
        let progress = core.node.progress();
        let (log_bytes, snapshot_bytes) = (core.node.log_bytes(), core.node.snapshot_bytes());
        let leads = core.node.leads();
        let state = core.node.state();
        for (name, gauge) in self.gauges.iter() {
            let value = match *name {
                LEADER => u64::from(leads),
                TERM => progress.term,
                LOG_INDEX => progress.last_log,
                COMMITTED_INDEX => progress.committed,
                APPLIED_INDEX => progress.applied,
                APPLY_LAG => progress.committed.saturating_sub(progress.applied),
                SNAPSHOT_INDEX => progress.snapshot,
                LOG_BYTES => log_bytes,
                SNAPSHOT_BYTES => snapshot_bytes,
                REVISION => state.revision(),
                KEYS => state.len() as u64,
                STORE_BYTES => state.bytes() as u64,
                QUOTA_BYTES => core.limits.quota_bytes as u64,
                LEASES => state.lease_count() as u64,
                CERTIFICATE_EXPIRY => core.protection.certificate_ends(),
                _ => continue,
            };
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        drop(state);
        let gauges = self.gauges.iter().flat_map(|(_, gauge)| gauge.collect());
        let peers = self.peers.iter().flat_map(Collector::collect);
        gauges.chain(peers).chain(self.counted.iter().flat_map(|counted| counted.collect())).collect()
    }
}
