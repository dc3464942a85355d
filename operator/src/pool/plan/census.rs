//! Which pods there are, which of them stay, and which are to go, in which order.

use super::budget::Budget;
use super::decision::{What, Why};
use super::given::{Node, Phase, Pod, Pool, SILENT_AFTER_SECONDS, Seen, State};

/// Pods that start are waited for this long before others are emptied into those that are there: so that all fill evenly.
pub const STARTS_WITHIN_SECONDS: u64 = 60;
/// Pods that a device may be sent to; in larger pools the emptiest.
pub const MOST_TARGETS: usize = 100;

pub struct Census<'a> {
    pub pool: &'a Pool,
    pub now: u64,
    pub keeper_since: Option<u64>,
    pub desired: usize,
    pub budget: Budget,
    /// Neither told to terminate, nor ended, nor on a node that is lost.
    pub alive: Vec<&'a Pod>,
    pub terminating: Vec<&'a Pod>,
    pub ended: Vec<&'a Pod>,
    /// Alive, and to stay.
    pub kept: Vec<&'a Pod>,
    /// Alive, and to go: who costs least to empty first.
    pub doomed: Vec<Doomed<'a>>,
}

#[derive(Clone, Copy)]
pub struct Doomed<'a> {
    pub pod: &'a Pod,
    pub why: Why,
}

impl<'a> Census<'a> {
    pub fn take(pool: &'a Pool, seen: &'a Seen, desired: usize, now: u64) -> Census<'a> {
        let mut census = Census {
            pool,
            now,
            keeper_since: seen.keeper_since,
            desired,
            budget: Budget::of(desired, pool.max_surge, pool.max_unavailable),
            alive: Vec::new(),
            terminating: Vec::new(),
            ended: Vec::new(),
            kept: Vec::new(),
            doomed: Vec::new(),
        };
        for pod in &seen.pods {
            if pod.is_terminating {
                census.terminating.push(pod);
            } else if pod.phase == Phase::Ended {
                census.ended.push(pod);
            } else if pod.node != Node::Lost || !census.is_silent(pod) {
                census.alive.push(pod);
            }
        }
        for pods in [&mut census.alive, &mut census.terminating, &mut census.ended] {
            pods.sort_by(|a, b| a.name.cmp(&b.name));
        }
        census.part();
        census
    }

    /// Parts the pods that are alive into those that stay and those that go.
    fn part(&mut self) {
        let (mut good, bad): (Vec<&Pod>, Vec<&Pod>) = self.alive.iter().partition(|pod| self.is_good(pod));
        good.sort_by_key(|pod| self.cost(pod));
        // A paused update leaves things as they are, with the pods that it has too many.
        let is_mixed = good.iter().any(|pod| pod.revision != self.pool.revision);
        let stay = if is_mixed { self.desired + self.budget.surge } else { self.desired };
        let surplus = good.len().saturating_sub(stay);
        self.kept = good.split_off(surplus);
        self.kept.sort_by(|a, b| a.name.cmp(&b.name));
        let why = |pod: &Pod| if self.is_current(pod) { Why::Node } else { Why::Update };
        let mut doomed: Vec<Doomed> = bad.iter().map(|pod| Doomed { pod, why: why(pod) }).collect();
        doomed.extend(good.iter().map(|pod| Doomed { pod, why: Why::ScaleDown }));
        doomed.sort_by_key(|doomed| self.cost(doomed.pod));
        self.doomed = doomed;
    }

    /// A pod that an update has nothing to do with; while it is paused, one whose drain has not been decided.
    fn is_current(&self, pod: &Pod) -> bool {
        pod.revision == self.pool.revision || (self.pool.paused && !is_drained_for(pod, Why::Update))
    }

    fn is_good(&self, pod: &Pod) -> bool {
        self.is_current(pod) && pod.node != Node::Cordoned
    }

    /// The order in which pods go: what holds nobody, what is decided already (so that a choice lasts), what is out of the
    /// Service already, other revisions, then by connections.
    fn cost(&self, pod: &'a Pod) -> impl Ord + use<'a> {
        let is_old = pod.revision != self.pool.revision;
        let is_decided = matches!(&pod.decision, Some(decision) if decision.what != What::Rebalance);
        (!self.holds_nobody(pod), !is_decided, pod.is_serving, !is_old, pod.connections(), &pod.name)
    }

    /// Nothing new is known of it, though its keeper answers.
    pub fn is_silent(&self, pod: &Pod) -> bool {
        let answered = pod.gateway.as_ref().map_or(pod.created_at, |gateway| gateway.answered_at);
        // A keeper that has only just come back may not have told everything.
        let since = answered.max(self.keeper_since.unwrap_or(0));
        self.now >= since.saturating_add(SILENT_AFTER_SECONDS)
    }

    /// Deleting it costs nothing.
    pub fn holds_nobody(&self, pod: &Pod) -> bool {
        if pod.phase == Phase::Pending {
            return true;
        }
        if pod.is_ready || self.keeper_since.is_none() {
            return false;
        }
        match &pod.gateway {
            None => !pod.is_registered || self.is_silent(pod),
            Some(gateway) => gateway.connections == 0 || self.is_silent(pod),
        }
    }

    /// It takes devices, as far as is known.
    pub fn is_capable(&self, pod: &Pod) -> bool {
        pod.phase == Phase::Running
            && pod.is_ready
            && pod.is_registered
            && pod.state() == Some(State::Active)
            && !is_leaving(pod)
            && !self.is_silent(pod)
    }

    /// It is to go, but it may well be of use until then.
    pub fn is_up(&self, pod: &Pod) -> bool {
        pod.phase == Phase::Running
            && pod.is_ready
            && !is_leaving(pod)
            && !matches!(pod.state(), Some(State::Draining | State::Drained))
    }

    /// How many pods serve: those that stay must be known to, of the others it is enough that nothing speaks against it.
    pub fn available(&self) -> usize {
        let kept = self.kept.iter().filter(|pod| self.is_capable(pod)).count();
        kept + self.doomed.iter().filter(|doomed| self.is_up(doomed.pod)).count()
    }

    /// Pods that stay and take devices, the emptiest first.
    pub fn targets(&self) -> Vec<&'a Pod> {
        let mut targets: Vec<&Pod> = self.kept.iter().copied().filter(|pod| self.is_capable(pod)).collect();
        targets.sort_by_key(|pod| (pod.connections(), &pod.name));
        targets
    }

    /// A pod that stays and does not take devices yet, but soon may.
    pub fn is_starting(&self) -> bool {
        self.kept.iter().any(|pod| {
            !self.is_capable(pod)
                && pod.decision.is_none()
                && self.now < pod.created_at.saturating_add(STARTS_WITHIN_SECONDS)
        })
    }

    pub fn doomed(&self, name: &str) -> Option<Doomed<'a>> {
        self.doomed.iter().find(|doomed| doomed.pod.name == name).copied()
    }

    /// More pods of the wanted revision that are needed and may be made.
    pub fn to_create(&self) -> usize {
        let needed = self.desired.saturating_sub(self.kept.len());
        needed.min(self.most().saturating_sub(self.alive.len()))
    }

    /// Pods that there may be at a time, by what is decided here.
    pub fn most(&self) -> usize {
        self.footprint() + self.budget.surge
    }

    /// The pods that the pool has room for: those wanted, or, when it is to become smaller and of another revision at once,
    /// those that it had. Else its devices would first be moved among pods that all go.
    fn footprint(&self) -> usize {
        let of = |revision: &str| self.alive.iter().filter(|pod| pod.revision == revision).count();
        let old = self.alive.iter().filter(|pod| !self.is_current(pod)).map(|pod| of(&pod.revision));
        old.max().unwrap_or(0).max(self.desired)
    }

    /// While something is under way it is looked at more often.
    pub fn look_again_within(&self) -> u64 {
        let moves = |pod: &&&Pod| is_leaving(pod) || pod.job_running().is_some();
        if self.desired > 0 && self.keeper_since.is_some() && self.alive.iter().any(|pod| moves(&pod)) {
            2
        } else if !self.doomed.is_empty() || self.kept.len() < self.desired || self.is_starting() {
            5
        } else {
            u64::MAX
        }
    }
}

/// It is decided that all its devices go.
pub fn is_leaving(pod: &Pod) -> bool {
    matches!(&pod.decision, Some(decision) if decision.what == What::Drain)
}

fn is_drained_for(pod: &Pod, why: Why) -> bool {
    matches!(&pod.decision, Some(decision) if decision.what == What::Drain && decision.why == why)
}

pub fn names(pods: &[&Pod]) -> Vec<String> {
    pods.iter().take(MOST_TARGETS).map(|pod| pod.name.clone()).collect()
}
