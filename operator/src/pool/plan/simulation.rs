//! A small world for plans to act on: pods that take their time, devices that move at a rate, commands that fail. It is
//! the same in each run, and looks after what must never happen.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::census::Census;
use super::*;

/// Gateways say this often how they are.
const REPORT_EVERY_SECONDS: u64 = 2;

pub struct World {
    pub now: u64,
    pub pool: Pool,
    pub pods: Vec<Pod_>,
    /// Where each device is (a pod's name), and how often it was moved since the last `forget_moves`.
    pub devices: Vec<Device>,
    pub keeper_since: Option<u64>,
    pub memory: Memory,
    /// Seconds that a pod needs to start; of a revision that never does: none.
    pub starts_in: u64,
    pub broken_revisions: Vec<String>,
    /// Pods whose gateways take no commands.
    pub deaf: Vec<String>,
    /// So many more actions are carried out; then the operator dies and another one begins.
    pub dies_after: Option<usize>,
    pub trace: String,
    pub is_traced: bool,
    made: u32,
    most_rate: f64,
}

pub struct Device {
    pub at: Option<String>,
    pub moved: u32,
}

/// A pod as it is; `seen` is what the operator knows of it.
pub struct Pod_ {
    pub seen: Pod,
    pub state: State,
    pub job: Option<SimulatedJob>,
    pub ends_at: Option<u64>,
    pub is_dead: bool,
    pub is_mute: bool,
    pub is_unready: bool,
    ready_at: u64,
}

#[derive(Clone)]
pub struct SimulatedJob {
    job: Job,
    targets: Vec<String>,
    due: f64,
    left: Option<u64>,
    deadline: u64,
}

impl World {
    pub fn new(pool: Pool) -> World {
        World {
            now: 1000,
            pool,
            pods: Vec::new(),
            devices: Vec::new(),
            keeper_since: Some(0),
            memory: Memory::default(),
            starts_in: 5,
            broken_revisions: Vec::new(),
            deaf: Vec::new(),
            dies_after: None,
            trace: String::new(),
            is_traced: true,
            made: 0,
            most_rate: 0.0,
        }
    }

    pub fn seen(&self) -> Seen {
        Seen {
            pods: self.pods.iter().map(|pod| pod.seen.clone()).collect(),
            keeper_since: self.keeper_since,
            memory: self.memory.clone(),
        }
    }

    pub fn pod(&mut self, name: &str) -> Option<&mut Pod_> {
        self.pods.iter_mut().find(|pod| pod.seen.name == name)
    }

    pub fn held(&self, name: &str) -> u64 {
        self.devices.iter().filter(|device| device.at.as_deref() == Some(name)).count() as u64
    }

    pub fn connect(&mut self, count: usize) {
        self.devices.extend((0..count).map(|_| Device { at: None, moved: 0 }));
        self.home();
        self.report(true);
    }

    /// A second passes; then the operator looks.
    pub fn tick(&mut self) -> usize {
        self.now += 1;
        self.start_pods();
        self.move_devices();
        self.end_pods();
        self.home();
        self.report(false);
        self.operate()
    }

    pub fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.tick();
        }
    }

    /// Runs until no action has been asked for during this time; how long that took, or None after `most`.
    pub fn run_until_quiet(&mut self, quiet_seconds: u64, most: u64) -> Option<u64> {
        let began = self.now;
        let mut quiet_since = self.now;
        while self.now < began + most {
            if self.tick() > 0 {
                quiet_since = self.now;
            }
            if self.now - quiet_since >= quiet_seconds {
                return Some(quiet_since - began);
            }
        }
        None
    }

    fn start_pods(&mut self) {
        let now = self.now;
        for pod in &mut self.pods {
            let starts = !pod.is_dead && !self.broken_revisions.contains(&pod.seen.revision);
            if starts && pod.ready_at <= now && pod.seen.phase == Phase::Pending {
                pod.seen.phase = Phase::Running;
                pod.seen.node = if pod.seen.node == Node::None { Node::Ready } else { pod.seen.node };
                pod.seen.is_registered = true;
            }
            pod.seen.is_ready = pod.seen.phase == Phase::Running
                && !pod.is_dead
                && !pod.is_unready
                && pod.state == State::Active
                && !pod.seen.is_terminating;
        }
    }

    fn report(&mut self, at_once: bool) {
        let held: BTreeMap<String, u64> =
            self.pods.iter().map(|pod| (pod.seen.name.clone(), self.held(&pod.seen.name))).collect();
        for (index, pod) in self.pods.iter_mut().enumerate() {
            let is_due = at_once || (self.now + index as u64).is_multiple_of(REPORT_EVERY_SECONDS);
            let speaks = pod.seen.phase == Phase::Running && !pod.is_dead && !pod.is_mute;
            if is_due && speaks && self.keeper_since.is_some() {
                pod.seen.gateway = Some(Gateway {
                    answered_at: self.now,
                    state: pod.state,
                    connections: held[&pod.seen.name],
                    max_connections: None,
                    job: pod.job.as_ref().map(|job| job.job.clone()),
                });
            }
        }
    }

    fn takes(&self, pod: &Pod_) -> bool {
        pod.is_target() && self.held(&pod.seen.name) < self.pool.max_connections.unwrap_or(u64::MAX)
    }

    /// The emptiest pod that a device can go to: one of these, or else any in the Service.
    fn to(&self, targets: Option<&[String]>, from: &str) -> Option<String> {
        let wanted = |pod: &&Pod_| {
            pod.seen.name != from
                && self.takes(pod)
                && match targets {
                    Some(targets) => targets.is_empty() || targets.contains(&pod.seen.name),
                    None => pod.seen.is_serving,
                }
        };
        let names = self.pods.iter().filter(wanted).map(|pod| pod.seen.name.clone());
        names.min_by_key(|name| self.held(name))
    }

    fn home(&mut self) {
        for index in 0..self.devices.len() {
            if self.devices[index].at.is_none() {
                self.devices[index].at = self.to(None, "");
            }
        }
    }

    fn move_devices(&mut self) {
        for index in 0..self.pods.len() {
            let name = self.pods[index].seen.name.clone();
            let Some(mut job) = self.pods[index].job.clone().filter(|job| job.job.is_running) else {
                continue;
            };
            if self.pods[index].is_dead {
                continue;
            }
            job.due += job.job.rate_per_second;
            let is_drain = job.job.kind == JobKind::Drain;
            let is_late = is_drain && self.now >= job.deadline;
            while self.held(&name) > 0 && job.left != Some(0) && (is_late || job.due >= 1.0) {
                let to = self.to(Some(&job.targets), &name);
                if to.is_none() && !is_drain {
                    job.left = Some(0);
                    break;
                }
                let device =
                    self.devices.iter_mut().find(|device| device.at.as_deref() == Some(&name)).unwrap();
                device.at = to;
                device.moved += 1;
                job.job.moved += 1;
                job.due -= 1.0;
                job.left = job.left.map(|left| left - 1);
            }
            job.due = job.due.min(job.job.rate_per_second.max(1.0));
            if self.held(&name) == 0 || job.left == Some(0) {
                job.job.is_running = false;
                if is_drain {
                    self.pods[index].state = State::Drained;
                }
            }
            self.pods[index].job = Some(job);
        }
    }

    fn end_pods(&mut self) {
        let now = self.now;
        let gone = |pod: &Pod_, held: u64| {
            pod.ends_at.is_some_and(|at| now >= at || held == 0 || pod.is_dead) && pod.seen.is_terminating
        };
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|pod| gone(pod, self.held(&pod.seen.name)))
            .map(|pod| pod.seen.name.clone())
            .collect();
        self.pods.retain(|pod| !gone.contains(&pod.seen.name));
        let there: Vec<String> =
            self.pods.iter().filter(|pod| !pod.is_dead).map(|pod| pod.seen.name.clone()).collect();
        for device in &mut self.devices {
            if device.at.as_ref().is_some_and(|at| !there.contains(at)) {
                device.at = None;
            }
        }
    }

    pub fn is_terminating(&self, name: &str) -> bool {
        self.pods.iter().any(|pod| pod.seen.name == name && pod.seen.is_terminating)
    }

    pub fn kill(&mut self, name: &str) {
        if let Some(pod) = self.pod(name) {
            pod.is_dead = true;
            pod.seen.phase = Phase::Ended;
            pod.seen.is_ready = false;
            pod.seen.is_registered = false;
        }
    }

    /// Its container fails its readiness probe for good, but its devices stay.
    pub fn broken(&mut self, name: &str) {
        if let Some(pod) = self.pod(name) {
            pod.is_unready = true;
        }
    }

    /// Told to terminate: it drains by itself, into whoever takes devices.
    pub fn terminate(&mut self, name: &str, grace_seconds: u64) {
        let (now, rate) = (self.now, self.pool.rate_per_second);
        let Some(pod) = self.pod(name) else { return };
        pod.seen.is_terminating = true;
        pod.seen.is_ready = false;
        pod.ends_at = Some(now + grace_seconds.max(1));
        if pod.state == State::Active && pod.seen.phase == Phase::Running {
            pod.start(JobKind::Drain, now, rate, Vec::new(), None, now + grace_seconds);
        }
    }

    /// One pass: plans, looks after the rules, and carries out. How many actions there were.
    pub fn operate(&mut self) -> usize {
        let plan = plan(&self.pool, &self.seen(), self.now);
        let again = super::plan(&self.pool, &self.seen(), self.now);
        assert_eq!(plan, again, "a plan is a function");
        self.memory = plan.memory.clone();
        assert!(plan.requeue_after_seconds > 0);
        let before = self.serving();
        let mut failed: Vec<String> = Vec::new();
        for action in &plan.actions {
            if action.pod().is_some_and(|pod| failed.iter().any(|failed| failed == pod)) {
                continue;
            }
            if let Some(left) = &mut self.dies_after {
                if *left == 0 {
                    self.dies_after = None;
                    self.note("the operator dies");
                    break;
                }
                *left -= 1;
            }
            self.look_after(action);
            let result = self.carry_out(action);
            let text = describe(action, self.now);
            match result {
                Ok(()) => self.note(&text),
                Err(error) => {
                    self.note(&format!("{text}: failed: {error}"));
                    failed.extend(action.pod().map(str::to_owned));
                }
            }
        }
        let desired = plan.progress.desired as usize;
        let budget = budget::Budget::of(desired, self.pool.max_surge, self.pool.max_unavailable);
        let after = self.serving();
        assert!(
            after >= before || after + budget.unavailable >= desired,
            "{before} pods served, {after} do, {desired} are wanted:\n{}",
            self.trace
        );
        self.look_after_rate();
        plan.actions.len()
    }

    fn note(&mut self, text: &str) {
        if self.is_traced {
            let _ = writeln!(self.trace, "{:>4}  {text}", self.now - 1000);
        }
    }

    /// Pods that really take devices.
    fn serving(&self) -> usize {
        let serves = |pod: &&Pod_| {
            pod.seen.is_ready
                && pod.state == State::Active
                && !pod.seen.is_terminating
                && !is_leaving(&pod.seen)
        };
        self.pods.iter().filter(serves).count()
    }

    fn look_after(&self, action: &Action) {
        let find = |name: &str| self.pods.iter().find(|pod| pod.seen.name == name).expect(name);
        match action {
            Action::StartDrain { pod, targets, .. } => {
                let decision = find(pod).seen.decision.as_ref();
                let is_decided = decision
                    .is_some_and(|decision| decision.what == What::Drain && decision.targets == *targets);
                assert!(is_decided, "{pod} is drained as decided before:\n{}", self.trace);
                assert!(!find(pod).seen.is_terminating, "{pod} drains already");
                assert!(!targets.contains(pod), "{pod} is drained into itself");
                self.look_after_targets(targets);
            }
            Action::Rebalance { pod, targets, .. } => {
                let decision = find(pod).seen.decision.as_ref();
                assert!(decision.is_some_and(|decision| decision.what == What::Rebalance), "{pod}");
                self.look_after_targets(targets);
            }
            Action::Delete { pod, why, .. } => {
                let it = find(pod);
                assert!(!it.seen.is_terminating, "{pod} is deleted twice");
                let may = match *why {
                    "drained" => it.state == State::Drained && self.held(pod) == 0,
                    "nobody is connected to it" => !it.seen.is_ready && !is_leaving(&it.seen),
                    "its containers have ended" => it.seen.phase == Phase::Ended,
                    "no pods are wanted" => self.memory.replicas.unwrap_or(self.pool.replicas) == 0,
                    "its drain did not end by its deadline" => {
                        it.seen.decision.as_ref().is_some_and(|decision| self.now >= decision.deadline)
                    }
                    "its gateway does not answer" => {
                        let answered_at = it.seen.gateway.as_ref().map_or(0, |gateway| gateway.answered_at);
                        is_leaving(&it.seen) && self.now >= answered_at + 60
                    }
                    _ => false,
                };
                assert!(may, "{pod} with {} devices is deleted: {why}\n{}", self.held(pod), self.trace);
            }
            _ => {}
        }
    }

    /// None of the targets is to go, but when nobody stays.
    fn look_after_targets(&self, targets: &[String]) {
        let seen = self.seen();
        let desired = self.memory.replicas.unwrap_or(self.pool.replicas) as usize;
        let census = Census::take(&self.pool, &seen, desired, self.now);
        for pod in &seen.pods {
            let is_bad = is_leaving(pod) || (!census.kept.is_empty() && census.doomed(&pod.name).is_some());
            assert!(
                pod.is_terminating || !is_bad || !targets.contains(&pod.name),
                "{} is to go, and gets devices:\n{}",
                pod.name,
                self.trace
            );
        }
    }

    /// Drains that were asked for keep the rate together.
    fn look_after_rate(&mut self) {
        let running = self.pods.iter().filter(|pod| !pod.seen.is_terminating && !pod.is_dead);
        let jobs = running.filter_map(|pod| pod.job.as_ref()).filter(|job| job.job.is_running);
        let sum: f64 = jobs.map(|job| job.job.rate_per_second).sum();
        // A rate that is lowered holds for those that are decided later.
        let is_decided = self.pods.iter().any(|pod| pod.seen.decision.is_some());
        let until_now = if sum > 0.0 || is_decided { self.most_rate } else { 0.0 };
        self.most_rate = until_now.max(self.pool.rate_per_second);
        let most = self.most_rate + 0.1 * self.pods.len() as f64;
        assert!(sum <= most, "{sum} devices a second, {most} is the rate:\n{}", self.trace);
    }

    fn carry_out(&mut self, action: &Action) -> Result<(), &'static str> {
        let now = self.now;
        match action {
            Action::Tell(_) => {}
            Action::Create { revision, count } => {
                for _ in 0..*count {
                    self.create(revision);
                }
                let seen = self.seen();
                let desired = self.memory.replicas.unwrap_or(self.pool.replicas) as usize;
                let census = Census::take(&self.pool, &seen, desired, now);
                assert!(census.alive.len() <= census.most(), "too many pods:\n{}", self.trace);
            }
            Action::Decide { pod, decision } => {
                let decision = Decision::parse(&decision.text());
                self.pod(pod).ok_or("no such pod")?.seen.decision = Some(decision);
            }
            Action::ClearDecision { pod } => self.pod(pod).ok_or("no such pod")?.seen.decision = None,
            Action::SetServing { pod, serving } => {
                self.pod(pod).ok_or("no such pod")?.seen.is_serving = *serving;
            }
            Action::Delete { pod, grace_seconds, .. } => {
                let own = self.pool.deadline_seconds + 30;
                self.terminate(pod, grace_seconds.unwrap_or(own));
            }
            Action::StartDrain { pod, targets, rate_per_second, deadline_seconds } => {
                let is_there = |other: &Pod_| targets.contains(&other.seen.name) && other.is_target();
                if !self.pods.iter().any(is_there) {
                    return Err("no target");
                }
                let pod = self.hears(pod)?;
                if pod.job.as_ref().is_some_and(|job| job.job.is_running) {
                    return Err("busy");
                }
                pod.state = State::Draining;
                pod.start(
                    JobKind::Drain,
                    now,
                    *rate_per_second,
                    targets.clone(),
                    None,
                    now + deadline_seconds,
                );
            }
            Action::StopDrain { pod } => {
                let pod = self.hears(pod)?;
                pod.state = State::Active;
                if let Some(job) = &mut pod.job {
                    job.job.is_running = false;
                }
            }
            Action::Rebalance { pod, count, targets, rate_per_second, .. } => {
                let pod = self.hears(pod)?;
                if pod.job.as_ref().is_some_and(|job| job.job.is_running) {
                    return Err("busy");
                }
                pod.start(JobKind::Rebalance, now, *rate_per_second, targets.clone(), Some(*count), u64::MAX);
            }
        }
        Ok(())
    }

    fn hears(&mut self, name: &str) -> Result<&mut Pod_, &'static str> {
        let is_deaf = self.deaf.iter().any(|deaf| deaf == name || deaf == "*");
        let keeper = self.keeper_since.is_some();
        let pod = self.pod(name).ok_or("no such pod")?;
        if is_deaf || !keeper || pod.is_dead || pod.is_mute { Err("no answer") } else { Ok(pod) }
    }

    fn create(&mut self, revision: &str) {
        self.made += 1;
        let seen = Pod {
            name: format!("p{}", self.made),
            revision: revision.to_owned(),
            created_at: self.now,
            node: Node::None,
            phase: Phase::Pending,
            is_ready: false,
            is_serving: false,
            is_terminating: false,
            decision: None,
            is_registered: false,
            gateway: None,
        };
        self.pods.push(Pod_ {
            seen,
            state: State::Active,
            job: None,
            ends_at: None,
            is_dead: false,
            is_mute: false,
            is_unready: false,
            ready_at: self.now + self.starts_in,
        });
    }

    /// The pods, a line each.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for pod in &self.pods {
            let seen = &pod.seen;
            let mut words = vec![seen.name.clone(), seen.revision.clone()];
            words.push(format!("{} devices", self.held(&seen.name)));
            words.push(format!("{:?}", pod.state).to_lowercase());
            if seen.is_serving {
                words.push("serving".to_owned());
            }
            if let Some(decision) = &seen.decision {
                words.push(format!("{:?}", decision.what).to_lowercase());
            }
            if seen.is_terminating {
                words.push("terminating".to_owned());
            }
            let _ = writeln!(text, "{}", words.join(" "));
        }
        text
    }

    pub fn forget_moves(&mut self) {
        for device in &mut self.devices {
            device.moved = 0;
        }
    }
}

impl Pod_ {
    fn is_target(&self) -> bool {
        self.seen.phase == Phase::Running
            && !self.is_dead
            && self.state == State::Active
            && !self.seen.is_terminating
    }

    pub fn start(
        &mut self,
        kind: JobKind,
        now: u64,
        rate_per_second: f64,
        targets: Vec<String>,
        left: Option<u64>,
        deadline: u64,
    ) {
        if kind == JobKind::Drain {
            self.state = State::Draining;
        }
        let job = Job { kind, began_at: now, is_running: true, rate_per_second, moved: 0 };
        self.job = Some(SimulatedJob { job, targets, due: 0.0, left, deadline });
    }
}

fn is_leaving(pod: &Pod) -> bool {
    super::census::is_leaving(pod)
}

fn describe(action: &Action, now: u64) -> String {
    match action {
        Action::Create { revision, count } => format!("create {count} of {revision}"),
        Action::Decide { pod, decision } => {
            let Decision { what, why, targets, rate_per_second, count, .. } = decision;
            let count = if *count > 0 { format!(" {count}") } else { String::new() };
            let left = decision.deadline.saturating_sub(now);
            let to = if targets.is_empty() { String::new() } else { format!(" to {}", targets.join(" ")) };
            format!("decide {pod}: {what:?}{count} ({why:?}){to}, {rate_per_second}/s, {left} s")
        }
        Action::ClearDecision { pod } => format!("clear {pod}"),
        Action::StartDrain { pod, .. } => format!("drain {pod}"),
        Action::StopDrain { pod } => format!("stop {pod}"),
        Action::Rebalance { pod, count, .. } => format!("rebalance {pod}: {count}"),
        Action::SetServing { pod, serving: true } => format!("in {pod}"),
        Action::SetServing { pod, serving: false } => format!("out {pod}"),
        Action::Delete { pod, grace_seconds, why } => match grace_seconds {
            Some(seconds) => format!("delete {pod} within {seconds} s: {why}"),
            None => format!("delete {pod}: {why}"),
        },
        Action::Tell(event) => {
            let sign = if event.is_warning { "!" } else { "" };
            format!("{sign}{}: {}", event.reason, event.message)
        }
    }
}
