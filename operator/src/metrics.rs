//! The operator's metrics: one table of names.

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry};

pub const LEADER: &str = "carillon_operator_leader_state";
pub const RECONCILES: &str = "carillon_operator_reconciles_total";
pub const RECONCILE_SECONDS: &str = "carillon_operator_reconcile_seconds";
pub const ERRORS: &str = "carillon_operator_errors_total";

/// Name and help of every metric.
pub const ALL: [(&str, &str); 4] = [
    (LEADER, "1 while this operator holds the lease and acts"),
    (
        RECONCILES,
        "resources that were brought to where they ought to be, or not, by kind and result (ok, error)",
    ),
    (RECONCILE_SECONDS, "time that took, by kind"),
    (ERRORS, "why they were not, by kind and reason"),
];

const SECONDS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0];

/// Counted by everyone who reconciles.
#[derive(Clone)]
pub struct Metrics {
    pub leads: IntGauge,
    pub reconciles: IntCounterVec,
    pub reconcile_seconds: HistogramVec,
    pub errors: IntCounterVec,
}

impl Metrics {
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let opts = |(name, help): (&str, &str)| Opts::new(name, help);
        let seconds = HistogramOpts::new(ALL[2].0, ALL[2].1).buckets(SECONDS.to_vec());
        let metrics = Metrics {
            leads: IntGauge::with_opts(opts(ALL[0]))?,
            reconciles: IntCounterVec::new(opts(ALL[1]), &["kind", "result"])?,
            reconcile_seconds: HistogramVec::new(seconds, &["kind"])?,
            errors: IntCounterVec::new(opts(ALL[3]), &["kind", "reason"])?,
        };
        registry.register(Box::new(metrics.leads.clone()))?;
        registry.register(Box::new(metrics.reconciles.clone()))?;
        registry.register(Box::new(metrics.reconcile_seconds.clone()))?;
        registry.register(Box::new(metrics.errors.clone()))?;
        Ok(metrics)
    }
}
