//! What a plan is made from: what is wanted of the pool, and what is seen of its pods.

use super::autoscaling::{Autoscaling, Memory};
use super::budget::Amount;
use super::decision::Decision;

/// A management answer older than this is none: a pod of which nothing newer is known is not waited for.
pub const SILENT_AFTER_SECONDS: u64 = 60;

/// What is wanted. Its numbers are within the bounds of the resource's schema.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// Of a pod as it would be made now.
    pub revision: String,
    /// Not looked at with `autoscaling`, but for where to begin.
    pub replicas: u32,
    pub max_surge: Amount,
    pub max_unavailable: Amount,
    /// Pods of other revisions stay; those that are being drained for an update still go.
    pub paused: bool,
    /// Devices a second, of all pods that drain or rebalance together.
    pub rate_per_second: f64,
    /// Of one pod's drain.
    pub deadline_seconds: u64,
    /// None: load is not evened out.
    pub rebalance: Option<Rebalancing>,
    pub autoscaling: Option<Autoscaling>,
    /// How many connections a pod may hold, as far as its gateway does not say.
    pub max_connections: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebalancing {
    /// A pod may hold so much more or less than its share.
    pub tolerance_percent: u32,
    /// Between two rebalances of the pool (30 at least), and of one device.
    pub cooldown_seconds: u64,
}

/// What is seen of the world, and what the pass before left for this one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    pub pods: Vec<Pod>,
    /// Since when the keeper answers (and its instances are known); None: it does not. Without it nobody is moved and
    /// no pod deleted for being old or too many.
    pub keeper_since: Option<u64>,
    /// As the last plan gave it.
    pub memory: Memory,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Pod {
    /// Also the gateway's instance id.
    pub name: String,
    pub revision: String,
    pub created_at: u64,
    pub node: Node,
    pub phase: Phase,
    /// Its container is ready: the readiness gate does not count here.
    pub is_ready: bool,
    /// The condition of the readiness gate is true.
    pub is_serving: bool,
    /// It has a deletion timestamp.
    pub is_terminating: bool,
    pub decision: Option<Decision>,
    /// The keeper knows the instance.
    pub is_registered: bool,
    /// What the gateway said last of itself.
    pub gateway: Option<Gateway>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// The pod is not scheduled.
    None,
    Ready,
    Cordoned,
    /// Not ready, unreachable, or gone.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Pending,
    Running,
    /// Its containers have ended, well or not, and will not run again.
    Ended,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Gateway {
    pub answered_at: u64,
    pub state: State,
    pub connections: u64,
    /// How many it takes at most, if it says so.
    pub max_connections: Option<u64>,
    /// The drain or rebalance that runs, or else the last one.
    pub job: Option<Job>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Active,
    Draining,
    Drained,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub kind: JobKind,
    pub began_at: u64,
    pub is_running: bool,
    pub rate_per_second: f64,
    pub moved: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    Drain,
    Rebalance,
}

impl Pod {
    pub fn connections(&self) -> u64 {
        self.gateway.as_ref().map_or(0, |gateway| gateway.connections)
    }

    pub fn state(&self) -> Option<State> {
        self.gateway.as_ref().map(|gateway| gateway.state)
    }

    pub fn job_running(&self) -> Option<&Job> {
        self.gateway.as_ref()?.job.as_ref().filter(|job| job.is_running)
    }

    /// Devices that it may still take.
    pub fn room(&self, pool: &Pool) -> u64 {
        let said = self.gateway.as_ref().and_then(|gateway| gateway.max_connections);
        let most = said.or(pool.max_connections).unwrap_or(u64::MAX);
        most.saturating_sub(self.connections())
    }

    /// How many it is for, among others: its share of the load goes by this.
    pub fn weight(&self, pool: &Pool) -> u64 {
        let said = self.gateway.as_ref().and_then(|gateway| gateway.max_connections);
        said.or(pool.max_connections).unwrap_or(1).max(1)
    }
}
