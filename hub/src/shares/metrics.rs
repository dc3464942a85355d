//! The metrics of shared subscriptions: names and help in one table.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

pub const SHARES: (&str, &str) = ("carillon_shares_open", "Shared subscriptions at home in this instance");
pub const MEMBERS: (&str, &str) = ("carillon_shares_members", "Their members, over all gateways");
pub const WAITING: (&str, &str) =
    ("carillon_shares_waiting_messages", "Messages in memory that wait for a member with room");
pub const ASSIGNED: (&str, &str) = (
    "carillon_shares_assigned_total",
    "Messages given to a member, by attempt (first, again: another member had it and went)",
);
pub const DROPPED: (&str, &str) = (
    "carillon_shares_dropped_total",
    "Messages that were in no log, found no member with room and as many waiting as may",
);
pub const READS: (&str, &str) =
    ("carillon_shares_log_reads_total", "Reads of logs, of messages that were not taken in live");
pub const REFUSED: (&str, &str) =
    ("carillon_shares_refused_total", "Shared subscriptions refused because there are as many as may be");

#[derive(Clone)]
pub struct Metrics {
    pub shares: IntGauge,
    pub members: IntGauge,
    pub waiting: IntGauge,
    pub assigned: IntCounterVec,
    pub dropped: IntCounter,
    pub reads: IntCounter,
    pub refused: IntCounter,
}

impl Metrics {
    /// Errors when one of the names is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Metrics {
            shares: IntGauge::new(SHARES.0, SHARES.1)?,
            members: IntGauge::new(MEMBERS.0, MEMBERS.1)?,
            waiting: IntGauge::new(WAITING.0, WAITING.1)?,
            assigned: IntCounterVec::new(Opts::new(ASSIGNED.0, ASSIGNED.1), &["attempt"])?,
            dropped: IntCounter::new(DROPPED.0, DROPPED.1)?,
            reads: IntCounter::new(READS.0, READS.1)?,
            refused: IntCounter::new(REFUSED.0, REFUSED.1)?,
        };
        registry.register(Box::new(metrics.shares.clone()))?;
        registry.register(Box::new(metrics.members.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        registry.register(Box::new(metrics.assigned.clone()))?;
        registry.register(Box::new(metrics.dropped.clone()))?;
        registry.register(Box::new(metrics.reads.clone()))?;
        registry.register(Box::new(metrics.refused.clone()))?;
        Ok(metrics)
    }
}
