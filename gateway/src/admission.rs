//! Who may connect at all: decided when a connection is accepted, before a byte of it is read, because a refusal there
//! costs the least. What is kept is bounded: an entry for each address that has connections, and so many for those
//! whose credentials failed.

mod failures;
mod network;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use slab::Slab;

use crate::config::GatewayConfig;
use failures::Failures;

pub use failures::Guessed;
pub use network::{Network, Networks};

/// The address that a connection is counted for, while it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceId(u32);

/// Why a connection is closed as soon as it is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    /// By `allow` and `deny`.
    Denied,
    /// Its address has as many connections as it may.
    Full,
    /// Credentials from its address failed too often.
    Failures,
}

impl Turned {
    pub fn label(self) -> &'static str {
        match self {
            Turned::Denied => "denied",
            Turned::Full => "ip_connections",
            Turned::Failures => "auth_failures",
        }
    }
}

/// Shared by all shards; locked when a connection comes and when it goes.
pub struct Admission {
    networks: ArcSwap<Networks>,
    state: Mutex<State>,
}

struct State {
    connects: Bucket,
    by_address: HashMap<IpAddr, SourceId>,
    sources: Slab<Source>,
    /// Connections whose CONNECT was let in, by app.
    apps: HashMap<Arc<str>, u32>,
    failures: Failures,
}

struct Source {
    address: IpAddr,
    connections: u32,
}

/// What connections from an address are counted under: a household or a device has a whole IPv6 /64 to choose from.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        v4 => v4,
    }
}

impl Admission {
    pub fn new(config: &GatewayConfig, now: Instant) -> Self {
        Admission {
            networks: ArcSwap::from_pointee(Networks::of(config)),
            state: Mutex::new(State {
                connects: Bucket { empty_at: now },
                by_address: HashMap::new(),
                sources: Slab::new(),
                apps: HashMap::new(),
                failures: Failures::default(),
            }),
        }
    }

    /// The lists may have changed.
    pub fn follow(&self, config: &GatewayConfig) {
        self.networks.store(Arc::new(Networks::of(config)));
    }

    pub fn permits(&self, address: IpAddr) -> bool {
        self.networks.load().permit(address)
    }

    /// How long to leave further connections in the kernel's queue; none: accept.
    pub fn wait(&self, now: Instant, config: &GatewayConfig) -> Option<Duration> {
        self.state.lock().connects.wait(now, config)
    }

    /// Lets a connection in; to be given back with [`leave`](Self::leave).
    pub fn enter(&self, address: IpAddr, now: Instant, config: &GatewayConfig) -> Result<SourceId, Turned> {
        let mut state = self.state.lock();
        let id = self.check(&mut state, address, now, config)?;
        state.connects.take(now, config);
        Ok(id)
    }

    /// As [`enter`](Self::enter) for a connection of a proxy, of which nothing is asked: what matters is the client that
    /// it will name.
    pub fn enter_proxy(&self, proxy: IpAddr, now: Instant, config: &GatewayConfig) -> SourceId {
        let mut state = self.state.lock();
        state.connects.take(now, config);
        state.count(counted_as(proxy))
    }

    /// The proxy has named the client: the connection is the client's, if that one may connect.
    pub fn move_to(
        &self,
        proxy: SourceId,
        client: IpAddr,
        now: Instant,
        config: &GatewayConfig,
    ) -> Result<SourceId, Turned> {
        let mut state = self.state.lock();
        let id = self.check(&mut state, client, now, config)?;
        state.leave(proxy);
        Ok(id)
    }

    fn check(
        &self,
        state: &mut State,
        address: IpAddr,
        now: Instant,
        config: &GatewayConfig,
    ) -> Result<SourceId, Turned> {
        if !self.permits(address) {
            return Err(Turned::Denied);
        }
        let address = counted_as(address);
        if config.max_auth_failures > 0 && state.failures.is_blocked(address, now) {
            return Err(Turned::Failures);
        }
        let connections =
            state.by_address.get(&address).map_or(0, |id| state.sources[id.0 as usize].connections);
        if config.max_connections_per_ip > 0 && connections >= config.max_connections_per_ip {
            return Err(Turned::Full);
        }
        Ok(state.count(address))
    }

    pub fn leave(&self, id: SourceId) {
        self.state.lock().leave(id);
    }

    /// Counts a connection of the app, if it is below `max`; 0 = no limit. To be given back with
    /// [`leave_app`](Self::leave_app).
    pub fn enter_app(&self, app: &Arc<str>, max: u32) -> bool {
        let mut state = self.state.lock();
        let connections = state.apps.entry(app.clone()).or_default();
        if max > 0 && *connections >= max {
            return false;
        }
        *connections += 1;
        true
    }

    pub fn leave_app(&self, app: &str) {
        let mut state = self.state.lock();
        if let Some(connections) = state.apps.get_mut(app) {
            *connections -= 1;
            if *connections == 0 {
                state.apps.remove(app);
            }
        }
    }

    /// Credentials that prove nothing came over this connection.
    pub fn failed(&self, id: SourceId, now: Instant, config: &GatewayConfig) -> Guessed {
        let mut state = self.state.lock();
        let address = state.sources[id.0 as usize].address;
        state.failures.note(address, now, config)
    }

    /// Addresses that have connections, and those that are refused for their failures.
    pub fn sizes(&self, now: Instant) -> (usize, usize) {
        let state = self.state.lock();
        (state.sources.len(), state.failures.blocked(now))
    }
}

impl State {
    fn count(&mut self, address: IpAddr) -> SourceId {
        let State { by_address, sources, .. } = self;
        let id = *by_address
            .entry(address)
            .or_insert_with(|| SourceId(sources.insert(Source { address, connections: 0 }) as u32));
        sources[id.0 as usize].connections += 1;
        id
    }

    fn leave(&mut self, id: SourceId) {
        let source = &mut self.sources[id.0 as usize];
        source.connections -= 1;
        if source.connections == 0 {
            let source = self.sources.remove(id.0 as usize);
            self.by_address.remove(&source.address);
        }
    }
}

/// A token bucket, kept as the time at which it would have been empty.
struct Bucket {
    empty_at: Instant,
}

impl Bucket {
    fn wait(&self, now: Instant, config: &GatewayConfig) -> Option<Duration> {
        let rate = config.connect_rate_per_second;
        if rate == 0 {
            return None;
        }
        let full_after = Duration::from_secs(1).mul_f64(f64::from(config.connect_burst) / f64::from(rate));
        let ahead = self.empty_at.saturating_duration_since(now);
        (ahead >= full_after).then(|| ahead - full_after + Duration::from_secs(1) / rate)
    }

    fn take(&mut self, now: Instant, config: &GatewayConfig) {
        if config.connect_rate_per_second > 0 {
            self.empty_at = self.empty_at.max(now) + Duration::from_secs(1) / config.connect_rate_per_second;
        }
    }
}

#[cfg(test)]
mod tests;
