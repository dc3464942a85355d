//! What is counted and timed as it happens, for `/metrics` and `carillon keeper status`.

use prometheus::core::Collector;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::Unavailable;
use super::log_store::LogStore;
use super::machine::Machine;
use crate::metrics::{self, options};

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Measures {
    /// From the write of a group of entries to the end of its fsync, seconds.
    pub fsyncs: Histogram,
    /// Entries in a group.
    appended: Histogram,
    /// Seconds.
    snapshots: Histogram,
    pub leaders_seen: IntCounter,
    pending: IntGauge,
    failed: IntCounterVec,
}

impl Measures {
    pub(super) fn new(log: &LogStore, machine: &Machine) -> Result<Self, prometheus::Error> {
        Ok(Measures {
            fsyncs: log.groups().seconds.clone(),
            appended: log.groups().sizes.clone(),
            snapshots: machine.seconds().clone(),
            leaders_seen: IntCounter::with_opts(options(metrics::LEADERS_SEEN))?,
            pending: IntGauge::with_opts(options(metrics::PROPOSALS_PENDING))?,
            failed: IntCounterVec::new(options(metrics::PROPOSALS_FAILED), &["reason"])?,
        })
    }

    pub(crate) fn collectors(&self) -> [Box<dyn Collector>; 6] {
        [
            Box::new(self.fsyncs.clone()),
            Box::new(self.appended.clone()),
            Box::new(self.snapshots.clone()),
            Box::new(self.leaders_seen.clone()),
            Box::new(self.pending.clone()),
            Box::new(self.failed.clone()),
        ]
    }

    /// Entries that are proposed and not decided.
    pub(crate) fn pending(&self) -> u64 {
        u64::try_from(self.pending.get()).unwrap_or(0)
    }

    /// One more, until the answer is dropped.
    pub(super) fn proposed(&self) -> Proposed<'_> {
        self.pending.inc();
        Proposed(&self.pending)
    }

    pub(super) fn counted<T>(&self, outcome: Result<T, Unavailable>) -> Result<T, Unavailable> {
        outcome.inspect_err(|error| self.failed.with_label_values(&[error.reason()]).inc())
    }
}

pub(super) struct Proposed<'a>(&'a IntGauge);

impl Drop for Proposed<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
