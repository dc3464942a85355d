//! What is asked for, and why it may not begin.

use super::State;
use crate::config::{DRAIN_SECONDS, MOVE_RATES};

/// A drain, as it is asked for; what is not said is as configured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drain {
    pub rate_per_second: Option<f64>,
    pub deadline_seconds: Option<u32>,
    /// Instance ids; empty: any.
    pub targets: Vec<String>,
}

/// A rebalance, as it is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Rebalance {
    pub devices: Devices,
    pub rate_per_second: Option<f64>,
    pub cooldown_seconds: Option<u32>,
    pub targets: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// So many go.
    Count(u64),
    /// So many stay.
    DownTo(u64),
}

/// Why a job does not begin.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MoveError {
    #[error("a {kind} is under way ({moved} of {total} devices are moved): abort it first")]
    Busy { kind: &'static str, moved: u64, total: u64 },
    #[error("no other gateway takes devices: {0}")]
    NoTarget(&'static str),
    #[error("rate_per_second is {0}, must be from {low} to {high}", low = MOVE_RATES.start(), high = MOVE_RATES.end())]
    Rate(f64),
    #[error("deadline_seconds is {0}, must be from {low} to {high}", low = DRAIN_SECONDS.start(), high = DRAIN_SECONDS.end())]
    Deadline(u32),
    #[error("the gateway is {}: there is nothing to rebalance", .0.name())]
    NotActive(State),
    #[error("the gateway is active and moves no devices: there is nothing to abort")]
    Idle,
}

pub(super) fn checked_rate(rate: f64) -> Result<f64, MoveError> {
    if MOVE_RATES.contains(&rate) { Ok(rate) } else { Err(MoveError::Rate(rate)) }
}
