//! What a swarm says on stdout, a JSON line each second and one when asked, and what it is told on stdin.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::histogram::Histogram;

/// A line on stdin. Its end ends the swarm.
pub const REPORT: &str = "report";
/// Connect no more devices; those that are connected stay.
pub const HALT: &str = "halt";
/// Forget the latencies and deliveries so far.
pub const RESET: &str = "reset";
/// End every connection at once, as a network does that fails, and make all of them again at once; from now on as many as
/// there are may be between connect and SUBACK.
pub const CUT: &str = "cut";

/// A line on stdout.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    /// Devices that are connected and subscribed.
    pub ready: u32,
    /// Devices between connect and SUBACK.
    pub pending: u32,
    /// All devices are ready, or no more will be.
    pub settled: bool,
    /// Every connection failed for a minute, so no more are tried.
    pub gave_up: bool,
    /// Connections that became ready, over all.
    pub connects: u64,
    /// Connections that did not become ready, by reason; each is tried again.
    pub failed: BTreeMap<String, u64>,
    /// Connections that were ready and ended without having been asked to, by reason.
    pub lost: BTreeMap<String, u64>,
    /// Connections that this swarm ended, to connect again.
    pub churned: u64,
    /// Connections that `cut` ended.
    pub cut: u64,
    pub pings: u64,
    pub pongs: u64,
    pub silent: Silent,
    /// Only in the answer to `report`.
    pub report: Option<Box<Report>>,
}

/// Devices that connect and then say nothing: the gateway has to end them after 1.5 times their keep-alive
/// (MQTT 5.0 §3.1.2.10).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Silent {
    pub ended: u64,
    /// Later than that, milliseconds: the least and the most. Below 0: too early.
    pub least_late_ms: i64,
    pub most_late_ms: i64,
    pub sum_late_ms: i64,
    /// Ended more than a second too early or too late.
    pub off: u64,
}

impl Silent {
    pub fn ended(&mut self, late_ms: i64) {
        if self.ended == 0 {
            (self.least_late_ms, self.most_late_ms) = (late_ms, late_ms);
        }
        self.ended += 1;
        self.least_late_ms = self.least_late_ms.min(late_ms);
        self.most_late_ms = self.most_late_ms.max(late_ms);
        self.sum_late_ms += late_ms;
        self.off += u64::from(late_ms.abs() > 1000);
    }
}

/// Since the start, or the last `reset`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// From the first device on, so many are all ready.
    pub present: u32,
    /// From connect to SUBACK.
    pub connect: Histogram,
    /// From the last `cut` to SUBACK, with all that was tried in vain in between.
    pub back: Histogram,
    pub broadcast: Received,
    pub unicast: Received,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Received {
    /// From the stamp in the payload to the read of the last of its bytes.
    pub latency: Histogram,
    /// Of a round that the device had already.
    pub repeated: u64,
    /// When the last one was read, on the machine's monotonic clock; 0: none was.
    pub last_ns: u64,
}

impl Received {
    pub fn add(&mut self, other: &Received) {
        self.latency.add(&other.latency);
        self.repeated += other.repeated;
        self.last_ns = self.last_ns.max(other.last_ns);
    }
}
