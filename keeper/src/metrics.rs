//! The keeper's metrics: one table of names, read from the node at the moment of the scrape.

use std::sync::{Arc, Weak};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::core::Core;

pub const LEADER: &str = "carillon_keeper_leader_state";
pub const TERM: &str = "carillon_keeper_term_number";
pub const LOG_INDEX: &str = "carillon_keeper_log_index";
pub const APPLIED_INDEX: &str = "carillon_keeper_applied_index";
pub const SNAPSHOT_INDEX: &str = "carillon_keeper_snapshot_index";
pub const LOG_BYTES: &str = "carillon_keeper_log_bytes";
pub const REVISION: &str = "carillon_keeper_revision_number";
pub const KEYS: &str = "carillon_keeper_keys";
pub const STORE_BYTES: &str = "carillon_keeper_store_bytes";
pub const QUOTA_BYTES: &str = "carillon_keeper_quota_bytes";
pub const LEASES: &str = "carillon_keeper_leases";
pub const WATCHES: &str = "carillon_keeper_watches";
pub const REQUESTS: &str = "carillon_keeper_requests_total";
pub const REFUSED: &str = "carillon_keeper_refused_total";
pub const LEASES_EXPIRED: &str = "carillon_keeper_leases_expired_total";
pub const SLOTS_MOVED: &str = "carillon_keeper_slots_moved_total";
pub const WATCHES_COMPACTED: &str = "carillon_keeper_watches_compacted_total";

/// Name and help of every metric.
pub const ALL: [(&str, &str); 17] = [
    (LEADER, "1 while this node leads"),
    (TERM, "Raft term"),
    (LOG_INDEX, "index of the last entry in the log"),
    (APPLIED_INDEX, "index of the last entry applied"),
    (SNAPSHOT_INDEX, "index of the last entry in the snapshot"),
    (LOG_BYTES, "size of the log on disk"),
    (REVISION, "revision of the store"),
    (KEYS, "keys in the store"),
    (STORE_BYTES, "keys and values in the store"),
    (QUOTA_BYTES, "most that the store may hold"),
    (LEASES, "leases that are alive"),
    (WATCHES, "watches that are open"),
    (REQUESTS, "calls, by method"),
    (REFUSED, "configuration documents that were refused, by kind"),
    (LEASES_EXPIRED, "leases that ended because nobody kept them alive"),
    (SLOTS_MOVED, "slots whose owner has changed"),
    (WATCHES_COMPACTED, "watches that were too far behind to be resumed"),
];

fn options(name: &str) -> Opts {
    let help = ALL.iter().find(|(known, _)| *known == name).map_or("", |(_, help)| help);
    Opts::new(name, help)
}

/// What is counted as it happens.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub requests: IntCounterVec,
    pub refused: IntCounterVec,
    pub leases_expired: IntCounter,
    pub slots_moved: IntCounter,
    pub watches_compacted: IntCounter,
    pub watches: IntGauge,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        Ok(Metrics {
            requests: IntCounterVec::new(options(REQUESTS), &["method"])?,
            refused: IntCounterVec::new(options(REFUSED), &["kind"])?,
            leases_expired: IntCounter::with_opts(options(LEASES_EXPIRED))?,
            slots_moved: IntCounter::with_opts(options(SLOTS_MOVED))?,
            watches_compacted: IntCounter::with_opts(options(WATCHES_COMPACTED))?,
            watches: IntGauge::with_opts(options(WATCHES))?,
        })
    }
}

/// What a registry holds of a keeper.
#[derive(Clone)]
struct Scrape {
    core: Weak<Core>,
    counted: Metrics,
    gauges: Arc<Vec<(&'static str, IntGauge)>>,
}

/// Puts the keeper's metrics into a registry; they are taken out again when the answer is dropped.
pub(crate) fn register(core: &Arc<Core>, registry: Registry) -> Result<Registered, prometheus::Error> {
    let read = [
        LEADER,
        TERM,
        LOG_INDEX,
        APPLIED_INDEX,
        SNAPSHOT_INDEX,
        LOG_BYTES,
        REVISION,
        KEYS,
        STORE_BYTES,
        QUOTA_BYTES,
        LEASES,
    ];
    let mut gauges = Vec::new();
    for name in read {
        gauges.push((name, IntGauge::with_opts(options(name))?));
    }
    let scrape =
        Scrape { core: Arc::downgrade(core), counted: core.metrics.clone(), gauges: Arc::new(gauges) };
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
    fn counted(&self) -> [&dyn Collector; 6] {
        let counted = &self.counted;
        [
            &counted.requests,
            &counted.refused,
            &counted.leases_expired,
            &counted.slots_moved,
            &counted.watches_compacted,
            &counted.watches,
        ]
    }
}

impl Collector for Scrape {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = self.gauges.iter().flat_map(|(_, gauge)| gauge.desc());
        gauges.chain(self.counted().into_iter().flat_map(|counted| counted.desc())).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(core) = self.core.upgrade() else { return Vec::new() };
        let progress = core.node.progress();
        let log_bytes = core.node.log_bytes();
        let leads = core.node.leadership().borrow().is_some();
        let state = core.node.state();
        for (name, gauge) in self.gauges.iter() {
            let value = match *name {
                LEADER => u64::from(leads),
                TERM => progress.term,
                LOG_INDEX => progress.last_log,
                APPLIED_INDEX => progress.applied,
                SNAPSHOT_INDEX => progress.snapshot,
                LOG_BYTES => log_bytes,
                REVISION => state.revision(),
                KEYS => state.len() as u64,
                STORE_BYTES => state.bytes() as u64,
                QUOTA_BYTES => core.limits.quota_bytes as u64,
                LEASES => state.lease_count() as u64,
                _ => continue,
            };
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        let gauges = self.gauges.iter().flat_map(|(_, gauge)| gauge.collect());
        gauges.chain(self.counted().into_iter().flat_map(|counted| counted.collect())).collect()
    }
}
