//! Sending devices to other gateways at a rate: a drain takes them all, a rebalance some of them.
//!
//! One job runs at a time. A task here decides when how many go ([`pace`]) and keeps in view where to ([`targets`]);
//! the shards choose which of their devices go, and close them (`shard::move_away`).

mod asked;
pub mod pace;
pub mod targets;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use carillon_agent::{Agent, Role};
use carillon_proto::{now_ms, v1};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use self::asked::checked_rate;
pub use self::asked::{Devices, Drain, MoveError, Rebalance};
use crate::config::DRAIN_SECONDS;
use crate::event::{Event, ShardHandle};
use crate::link::Link;
use crate::registration::Registration;
use crate::shard::Shared;
use pace::Pace;
use targets::{Targets, Wanted};

/// How often some devices go.
const TICK: Duration = Duration::from_millis(20);
/// How often it is looked where to.
const LOOK: Duration = Duration::from_secs(1);
/// How long a drain waits until it is known to others before it sends the first device away.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// What the shards look at.
#[derive(Default)]
pub struct Moving {
    /// The job that runs; 0 = none. Looked at before each device: when this is 0, nobody is moved any more.
    pub job: AtomicU64,
    /// New connections are sent elsewhere.
    pub refuses: AtomicBool,
    pub targets: ArcSwap<Targets>,
    /// Devices moved by the job.
    pub moved: AtomicU64,
    /// Devices that were allowed to go and did not.
    pub unused: AtomicU64,
    /// By shard: devices that the job has still to move.
    pub left: Vec<AtomicU64>,
}

impl Moving {
    pub fn new(shards: usize) -> Self {
        Moving { left: (0..shards).map(|_| AtomicU64::new(0)).collect(), ..Moving::default() }
    }

    fn left(&self) -> Vec<u64> {
        self.left.iter().map(|left| left.load(Ordering::Relaxed)).collect()
    }
}

/// Which devices a job is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    All,
    /// At most so many of a shard's, of those that can follow a Server Reference and connected before this (Unix, ms).
    Some {
        count: u64,
        connected_before_ms: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Active,
    Draining,
    Drained,
}

impl State {
    pub fn wire(self) -> v1::GatewayState {
        match self {
            State::Active => v1::GatewayState::Active,
            State::Draining => v1::GatewayState::Draining,
            State::Drained => v1::GatewayState::Drained,
        }
    }

    pub fn name(self) -> &'static str {
        self.wire().name()
    }
}

/// A job, for whoever asks how far it is.
#[derive(Debug, Clone)]
struct Job {
    kind: v1::move_progress::Kind,
    began_ms: u64,
    ended_ms: u64,
    aborted: bool,
    rate_per_second: f64,
    total: u64,
    moved: u64,
    left: u64,
    end: CancellationToken,
}

/// Moves devices; a cheap handle.
#[derive(Clone)]
pub struct Mover {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    link: Link,
    agent: Agent,
    shards: Vec<ShardHandle>,
    instance: String,
    registration: Arc<Registration>,
    state: AtomicU8,
    next_job: AtomicU64,
    job: Mutex<Option<Job>>,
    /// Held while a job is begun or aborted.
    changing: tokio::sync::Mutex<()>,
}

impl Mover {
    pub fn new(
        shared: Arc<Shared>,
        link: Link,
        agent: Agent,
        shards: Vec<ShardHandle>,
        registration: Arc<Registration>,
    ) -> Self {
        let inner = Inner {
            shared,
            instance: link.instance().to_owned(),
            link,
            agent,
            shards,
            registration,
            state: AtomicU8::new(State::Active as u8),
            next_job: AtomicU64::new(1),
            job: Mutex::new(None),
            changing: tokio::sync::Mutex::default(),
        };
        Mover { inner: Arc::new(inner) }
    }

    pub fn state(&self) -> State {
        match self.inner.state.load(Ordering::Acquire) {
            0 => State::Active,
            1 => State::Draining,
            _ => State::Drained,
        }
    }

    /// The job that runs, or else the last one.
    pub fn progress(&self) -> Option<v1::MoveProgress> {
        let job = self.inner.job.lock().clone()?;
        let (moved, left) = if job.ended_ms == 0 {
            let moving = &self.inner.shared.moving;
            (moving.moved.load(Ordering::Relaxed), moving.left().iter().sum())
        } else {
            (job.moved, job.left)
        };
        Some(v1::MoveProgress {
            kind: job.kind.into(),
            began_ms: job.began_ms,
            ended_ms: job.ended_ms,
            aborted: job.aborted,
            rate_per_second: job.rate_per_second,
            total: job.total,
            moved,
            left,
        })
    }

    /// Begins to send all devices away, and takes no new ones. Returns when it has begun.
    pub async fn drain(&self, drain: Drain) -> Result<String, MoveError> {
        let config = self.inner.shared.config.load().drain.clone();
        let rate = checked_rate(drain.rate_per_second.unwrap_or(config.rate_per_second))?;
        let seconds = drain.deadline_seconds.unwrap_or(config.deadline_seconds);
        if !DRAIN_SECONDS.contains(&seconds) {
            return Err(MoveError::Deadline(seconds));
        }
        let _changing = self.inner.changing.lock().await;
        self.not_busy()?;
        let wanted = Wanted { instances: drain.targets, emptier_than: None };
        self.look(&wanted, true).await;
        if self.inner.shared.moving.targets.load().is_empty() {
            return Err(MoveError::NoTarget(
                "there is none, or all are draining, or it is not one of `targets`",
            ));
        }
        self.set_state(State::Draining);
        let deadline = Instant::now() + Duration::from_secs(seconds.into());
        let (number, end) = self.begin(v1::move_progress::Kind::Drain, rate);
        // First of all out of discovery, so that devices are not sent back to here.
        let left = tokio::time::timeout(LEAVE_WITHIN, self.known_to_leave()).await;
        if left.is_err() {
            tracing::warn!("the keeper does not confirm that this gateway is draining; going on");
        }
        let total = self.plan(number, Plan::All).await;
        tracing::info!(devices = total, rate, seconds, "draining");
        let mover = self.clone();
        tokio::spawn(async move { mover.run(number, rate, Some(deadline), None, wanted, end).await });
        Ok(format!("draining {total} devices at {rate} a second, for at most {seconds} s"))
    }

    /// Begins to send some devices to emptier gateways. Returns when it has begun.
    pub async fn rebalance(&self, rebalance: Rebalance) -> Result<String, MoveError> {
        let config = self.inner.shared.config.load_full();
        let rate = checked_rate(rebalance.rate_per_second.unwrap_or(config.drain.rate_per_second))?;
        let cooldown_ms =
            1000 * u64::from(rebalance.cooldown_seconds.unwrap_or(config.rebalance_cooldown_seconds));
        let _changing = self.inner.changing.lock().await;
        self.not_busy()?;
        if self.state() != State::Active {
            return Err(MoveError::NotActive(self.state()));
        }
        let connections = self.inner.shared.connections.load(Ordering::Relaxed) as u64;
        let count = match rebalance.devices {
            Devices::Count(count) => count,
            Devices::DownTo(stay) => connections.saturating_sub(stay),
        };
        let wanted = Wanted { instances: rebalance.targets, emptier_than: Some(connections) };
        self.look(&wanted, true).await;
        if count > 0 && self.inner.shared.moving.targets.load().is_empty() {
            return Err(MoveError::NoTarget("none is emptier than this one and not draining"));
        }
        let (number, end) = self.begin(v1::move_progress::Kind::Rebalance, rate);
        let connected_before_ms = now_ms().saturating_sub(cooldown_ms);
        let able = self.plan(number, Plan::Some { count, connected_before_ms }).await;
        let count = count.min(able);
        if let Some(job) = self.inner.job.lock().as_mut() {
            job.total = count;
        }
        tracing::info!(devices = count, rate, "rebalancing");
        let mover = self.clone();
        tokio::spawn(async move { mover.run(number, rate, None, Some(count), wanted, end).await });
        Ok(format!("moving {count} devices at {rate} a second"))
    }

    /// Ends what is under way, or what a drain came to: the gateway is active again. When this returns, nobody is moved
    /// any more.
    pub async fn abort(&self) -> Result<String, MoveError> {
        let _changing = self.inner.changing.lock().await;
        let was = self.state();
        let running = self.is_running();
        if !running && was == State::Active {
            return Err(MoveError::Idle);
        }
        self.end(true).await;
        self.set_state(State::Active);
        let moved = self.progress().map_or(0, |progress| progress.moved);
        tracing::info!(moved, "aborted: active");
        Ok(format!("active again; {moved} devices were moved"))
    }

    /// Drains before the process ends: everyone is gone after `within` at the latest. At once when there is nowhere to go.
    pub async fn drain_to_stop(&self, within: Duration) {
        let rebalances = self.progress().is_some_and(|progress| {
            progress.ended_ms == 0 && progress.kind() == v1::move_progress::Kind::Rebalance
        });
        if rebalances && let Err(error) = self.abort().await {
            tracing::debug!(%error, "the rebalance has ended by itself");
        }
        let seconds = u32::try_from(within.as_secs()).unwrap_or(u32::MAX).max(1);
        let configured = self.inner.shared.config.load().drain.deadline_seconds;
        let drain = Drain { deadline_seconds: Some(seconds.min(configured)), ..Drain::default() };
        match self.drain(drain).await {
            Ok(begun) => tracing::info!(begun, "stopping"),
            Err(MoveError::Busy { kind: "drain", .. }) => {}
            Err(error) => {
                tracing::info!(%error, "not drained: everyone is disconnected at once");
                return self.leave();
            }
        }
        let ended = async {
            while self.is_running() {
                tokio::time::sleep(TICK).await;
            }
        };
        if tokio::time::timeout(within, ended).await.is_err() {
            tracing::warn!("devices could not all be moved in time");
        }
    }

    /// Out of discovery, and takes no new devices.
    pub fn leave(&self) {
        if self.state() == State::Active {
            self.set_state(State::Draining);
        }
    }

    fn is_running(&self) -> bool {
        self.inner.job.lock().as_ref().is_some_and(|job| job.ended_ms == 0)
    }

    fn not_busy(&self) -> Result<(), MoveError> {
        let progress = self.progress().filter(|progress| progress.ended_ms == 0);
        match progress {
            None => Ok(()),
            Some(progress) => Err(MoveError::Busy {
                kind: progress.kind().name(),
                moved: progress.moved,
                total: progress.total,
            }),
        }
    }

    fn set_state(&self, state: State) {
        let inner = &self.inner;
        inner.state.store(state as u8, Ordering::Release);
        inner.shared.moving.refuses.store(state != State::Active, Ordering::Release);
        inner.link.metrics().draining.set(i64::from(state as u8));
        inner.registration.set_draining(state != State::Active);
    }

    /// A new job, with the shards at rest.
    fn begin(&self, kind: v1::move_progress::Kind, rate_per_second: f64) -> (u64, CancellationToken) {
        let number = self.inner.next_job.fetch_add(1, Ordering::Relaxed);
        let moving = &self.inner.shared.moving;
        moving.moved.store(0, Ordering::Relaxed);
        moving.unused.store(0, Ordering::Relaxed);
        let end = CancellationToken::new();
        *self.inner.job.lock() = Some(Job {
            kind,
            began_ms: now_ms(),
            ended_ms: 0,
            aborted: false,
            rate_per_second,
            total: 0,
            moved: 0,
            left: 0,
            end: end.clone(),
        });
        moving.job.store(number, Ordering::Release);
        (number, end)
    }

    /// Has every shard choose; how many devices that are together.
    async fn plan(&self, job: u64, plan: Plan) -> u64 {
        let mut total = 0;
        for shard in &self.inner.shards {
            let (answer, planned) = oneshot::channel();
            shard.post(Event::PlanMove { job, plan, answer });
            total += planned.await.unwrap_or(0);
        }
        if let Some(job) = self.inner.job.lock().as_mut() {
            job.total = total;
        }
        total
    }

    /// Ends the job that runs: the shards have put it away when this returns.
    async fn end(&self, aborted: bool) {
        let moving = &self.inner.shared.moving;
        moving.job.store(0, Ordering::Release);
        if let Some(job) = self.inner.job.lock().as_ref() {
            job.end.cancel();
        }
        let left: u64 = moving.left().iter().sum();
        for shard in &self.inner.shards {
            let (answer, ended) = oneshot::channel();
            shard.post(Event::EndMove(answer));
            let _ = ended.await;
        }
        if let Some(job) = self.inner.job.lock().as_mut().filter(|job| job.ended_ms == 0) {
            job.ended_ms = now_ms();
            job.aborted = aborted;
            job.moved = moving.moved.load(Ordering::Relaxed);
            job.left = left;
        }
    }

    /// Sends devices away until all (or `count`) are gone, the deadline has passed, or the job is ended.
    async fn run(
        self,
        job: u64,
        rate: f64,
        deadline: Option<Instant>,
        count: Option<u64>,
        wanted: Wanted,
        end: CancellationToken,
    ) {
        let looker = self.clone();
        let looking = async move {
            let mut look = tokio::time::interval(LOOK);
            loop {
                look.tick().await;
                looker.look(&wanted, false).await;
            }
        };
        tokio::spawn(end.clone().run_until_cancelled_owned(looking));
        let moving = &self.inner.shared.moving;
        let mut pace = Pace::new(rate, Instant::now());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut to_go = count.unwrap_or(u64::MAX);
        let finished = async {
            loop {
                tick.tick().await;
                let unused = moving.unused.swap(0, Ordering::Relaxed);
                pace.give_back(unused);
                to_go = to_go.saturating_add(unused);
                let left = moving.left();
                let is_done = match count {
                    Some(count) => moving.moved.load(Ordering::Relaxed) >= count,
                    None => false,
                };
                if is_done || left.iter().all(|&left| left == 0) {
                    return;
                }
                let now = Instant::now();
                if deadline.is_some_and(|deadline| now >= deadline) {
                    tracing::warn!(left = left.iter().sum::<u64>(), "the drain's deadline: all are closed");
                    self.go(job, &vec![u64::MAX; left.len()]);
                    continue;
                }
                let take = pace.take(now);
                let parts = pace::split(take.min(to_go), &left);
                let sum: u64 = parts.iter().sum();
                pace.give_back(take - sum);
                to_go -= sum;
                self.go(job, &parts);
            }
        };
        if end.run_until_cancelled(finished).await.is_none() {
            return;
        }
        let _changing = self.inner.changing.lock().await;
        // An abort may have come between.
        if end.is_cancelled() {
            return;
        }
        self.end(false).await;
        if count.is_none() {
            self.inner.state.store(State::Drained as u8, Ordering::Release);
            self.inner.link.metrics().draining.set(State::Drained as u8 as i64);
        }
        let moved = self.progress().map_or(0, |progress| progress.moved);
        tracing::info!(moved, state = self.state().name(), "devices are moved");
    }

    fn go(&self, job: u64, parts: &[u64]) {
        for (shard, &count) in self.inner.shards.iter().zip(parts) {
            if count > 0 {
                shard.post(Event::MoveAway { job, count });
            }
        }
    }

    /// Looks where devices can be sent. What was known stays while nobody can say. `anew`: another job's figures are not
    /// carried on.
    async fn look(&self, wanted: &Wanted, anew: bool) {
        let inner = &self.inner;
        let reports: BTreeMap<String, v1::GatewayReport> = match inner.link.overview().await {
            Ok(overview) => overview
                .gateways
                .into_iter()
                .filter_map(|gateway| Some((gateway.instance, gateway.report?)))
                .collect(),
            Err(error) => {
                tracing::debug!(%error, "no registry tells how full the gateways are");
                BTreeMap::new()
            }
        };
        let before = if anew { Arc::default() } else { inner.shared.moving.targets.load_full() };
        let gateways = inner.agent.instances(Role::Gateway).borrow().clone();
        let targets = Targets::new(&inner.instance, wanted, &gateways, &reports, &before);
        inner.shared.moving.targets.store(Arc::new(targets));
    }

    /// Resolves when discovery says that this gateway is draining.
    async fn known_to_leave(&self) {
        let mut gateways = self.inner.agent.instances(Role::Gateway);
        loop {
            let own = &self.inner.instance;
            let is_leaving =
                gateways.borrow_and_update().iter().all(|gateway| gateway.id != *own || gateway.draining);
            if is_leaving || gateways.changed().await.is_err() {
                return;
            }
        }
    }
}
