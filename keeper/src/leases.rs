//! When leases end: deadlines that only the leader knows, and the task that turns those that pass into log entries. And
//! what the holders say of their load, which comes with the keep-alives and is in the leader's memory alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::keys;
use carillon_proto::v1;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::core::Core;
use crate::raft::{Leadership, Unavailable};
use crate::state::State;

/// Deadlines are looked at no more often than this, so that what ends together ends in one entry.
const STEP: Duration = Duration::from_millis(50);
/// … and at least this often.
const IDLE: Duration = Duration::from_secs(1);
/// When the task itself wakes up this much too late, the machine stood still, and keep-alives with it.
const STALL: Duration = Duration::from_secs(1);

/// When each lease ends, on the leader's clock. None while another node leads.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    deadlines: Mutex<Option<HashMap<u64, Instant>>>,
    loads: Mutex<HashMap<u64, Load>>,
    granted: Notify,
}

/// How busy the holder of a lease is, by its own words.
#[derive(Debug)]
struct Load {
    numbers: HashMap<String, f64>,
    since: Instant,
}

/// The leases that an entry grants, and their times to live.
pub(crate) fn grants(entry: &v1::KeeperEntry) -> Vec<(u64, u64)> {
    let ops = entry.txn.iter().flat_map(|txn| txn.then.iter().chain(&txn.otherwise));
    let grants = ops.filter_map(|op| match &op.op {
        Some(v1::op::Op::GrantLease(grant)) => Some((grant.lease, grant.ttl_ms)),
        _ => None,
    });
    grants.collect()
}

impl Leases {
    /// This node leads from now on: every lease gets its whole time again, and `grace`, because its holder may first
    /// have to find this node.
    fn begin(&self, state: &State, grace: Duration, now: Instant) {
        let deadlines =
            state.leases().map(|(lease, ttl_ms)| (lease, now + Duration::from_millis(ttl_ms) + grace));
        *self.deadlines.lock() = Some(deadlines.collect());
    }

    fn end(&self) {
        *self.deadlines.lock() = None;
        self.loads.lock().clear();
    }

    /// The holder of a lease that is alive says how busy it is; nothing said leaves it as it was.
    pub(crate) fn report(&self, lease: u64, numbers: HashMap<String, f64>, now: Instant) {
        if !numbers.is_empty() {
            self.loads.lock().insert(lease, Load { numbers, since: now });
        }
    }

    /// What was reported of instances, and is not of a lease that has ended.
    pub(crate) fn loads(&self, state: &State, now: Instant) -> Vec<v1::InstanceLoad> {
        let loads = self.loads.lock();
        let instances = state.prefix(keys::INSTANCES).filter_map(|(key, item)| {
            let load = loads.get(&item.lease)?;
            Some(v1::InstanceLoad {
                lease: item.lease,
                instance: key.strip_prefix(keys::INSTANCES).unwrap_or(key).to_owned(),
                load: load.numbers.clone(),
                age_ms: u64::try_from(now.saturating_duration_since(load.since).as_millis())
                    .unwrap_or(u64::MAX),
            })
        });
        instances.collect()
    }

    /// Is this node the one that knows the deadlines?
    pub(crate) fn leads(&self) -> bool {
        self.deadlines.lock().is_some()
    }

    /// A lease's holder has shown itself. False: it is over, or this node does not lead.
    pub(crate) fn renew(&self, lease: u64, ttl_ms: u64, now: Instant) -> bool {
        match self.deadlines.lock().as_mut().and_then(|deadlines| deadlines.get_mut(&lease)) {
            Some(deadline) => {
                *deadline = now + Duration::from_millis(ttl_ms);
                true
            }
            None => false,
        }
    }

    /// A lease that was just written.
    pub(crate) fn granted(&self, lease: u64, ttl_ms: u64, now: Instant) {
        if let Some(deadlines) = self.deadlines.lock().as_mut() {
            deadlines.insert(lease, now + Duration::from_millis(ttl_ms));
        }
        self.granted.notify_one();
    }

    /// Those that an entry of another node has granted, if it was carried out.
    pub(crate) fn granted_all(&self, grants: &[(u64, u64)], applied: &v1::KeeperApplied) {
        if applied.missing_lease == 0 && applied.txn.as_ref().is_some_and(|txn| txn.succeeded) {
            for &(lease, ttl_ms) in grants {
                self.granted(lease, ttl_ms, Instant::now());
            }
        }
    }

    /// Brings the deadlines in line with the leases that there are.
    fn reconcile(&self, state: &State, now: Instant) {
        if let Some(deadlines) = self.deadlines.lock().as_mut() {
            deadlines.retain(|&lease, _| state.lease_ttl_ms(lease).is_some());
            for (lease, ttl_ms) in state.leases() {
                deadlines.entry(lease).or_insert(now + Duration::from_millis(ttl_ms));
            }
        }
        self.loads.lock().retain(|&lease, _| state.lease_ttl_ms(lease).is_some());
    }

    /// Takes out those that are over. From here on a keep-alive finds them gone.
    fn take_expired(&self, now: Instant) -> Vec<u64> {
        let mut deadlines = self.deadlines.lock();
        let Some(deadlines) = deadlines.as_mut() else { return Vec::new() };
        let mut expired: Vec<u64> =
            deadlines.iter().filter(|(_, deadline)| **deadline <= now).map(|(&lease, _)| lease).collect();
        expired.sort_unstable();
        deadlines.retain(|_, deadline| *deadline > now);
        expired
    }

    fn extend_all(&self, by: Duration) {
        if let Some(deadlines) = self.deadlines.lock().as_mut() {
            for deadline in deadlines.values_mut() {
                *deadline += by;
            }
        }
    }

    fn next(&self) -> Option<Instant> {
        self.deadlines.lock().as_ref().and_then(|deadlines| deadlines.values().min().copied())
    }
}

/// Ends leases for as long as this node leads.
pub(crate) async fn run(core: Arc<Core>) {
    let mut leadership = core.node.leadership();
    loop {
        let leader = *leadership.borrow_and_update();
        if let Some(leader) = leader {
            let outcome = tokio::select! {
                outcome = lead(&core, leader) => outcome,
                _ = leadership.changed() => Ok(()),
                () = core.stop.cancelled() => return,
            };
            core.leases.end();
            match outcome {
                Ok(()) => continue,
                Err(error) if core.node.failure().borrow().is_none() => {
                    tracing::warn!(%error, "leases not ended, trying again");
                    tokio::time::sleep(STEP).await;
                    continue;
                }
                Err(_) => return,
            }
        }
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            () = core.stop.cancelled() => return,
        }
    }
}

async fn lead(core: &Core, leader: Leadership) -> Result<(), Unavailable> {
    core.node.linearize().await?;
    core.leases.begin(&core.node.state(), core.limits.lease_grace, Instant::now());
    let mut looked = Instant::now();
    loop {
        let (soonest, latest) = (looked + STEP, looked + IDLE);
        let planned = core.leases.next().map_or(latest, |next| next.clamp(soonest, latest));
        tokio::select! {
            biased;
            () = sleep_until(planned) => {}
            // Perhaps one that ends sooner than all others.
            () = core.leases.granted.notified() => continue,
        }
        looked = Instant::now();
        let now = Instant::now();
        let late = now.saturating_duration_since(planned);
        if late > STALL {
            tracing::warn!(
                late_ms = late.as_millis() as u64,
                "this process stood still, leases are extended"
            );
            core.leases.extend_all(late + core.limits.lease_grace);
            continue;
        }
        core.leases.reconcile(&core.node.state(), now);
        let expired = core.leases.take_expired(now);
        if expired.is_empty() {
            continue;
        }
        let count = expired.len();
        let revoke = v1::op::RevokeLeases { leases: expired, expired: true };
        let op = v1::Op { op: Some(v1::op::Op::RevokeLeases(revoke)) };
        let txn = v1::TxnRequest { then: vec![op], ..Default::default() };
        let applied = core.node.propose_as(leader, v1::KeeperEntry { txn: Some(txn) }).await?;
        let deleted = applied.txn.map_or(0, |txn| txn.deleted);
        core.metrics.leases_expired.inc_by(count as u64);
        tracing::info!(leases = count, keys = deleted, "leases expired");
    }
}

#[cfg(test)]
mod tests;
