//! Addresses from which credentials came that prove nothing: who guesses is refused for a while.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::config::GatewayConfig;

/// Addresses remembered. Beyond it others are forgotten, those that are refused last.
const ADDRESSES_MAX: usize = 10_000;
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Failures {
    tallies: HashMap<IpAddr, Tally>,
    /// When what is over was last looked for: not for each of a flood.
    swept: Option<Instant>,
}

/// What came of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guessed {
    Noted,
    /// With this one the address is refused, for a while.
    Enough,
    /// It is already.
    Blocked,
}

struct Tally {
    count: u32,
    /// Of the window in which they are counted, or of the refusal.
    until: Instant,
    is_blocked: bool,
}

impl Failures {
    pub fn is_blocked(&self, address: IpAddr, now: Instant) -> bool {
        self.tallies.get(&address).is_some_and(|tally| tally.is_blocked && now < tally.until)
    }

    pub fn blocked(&self, now: Instant) -> usize {
        self.tallies.values().filter(|tally| tally.is_blocked && now < tally.until).count()
    }

    pub fn note(&mut self, address: IpAddr, now: Instant, config: &GatewayConfig) -> Guessed {
        let is_known = self.tallies.contains_key(&address);
        let is_full = !is_known && self.tallies.len() >= ADDRESSES_MAX;
        if config.max_auth_failures == 0 || (is_full && !self.make_room(now)) {
            return Guessed::Noted;
        }
        let window = Duration::from_secs(config.auth_failure_window_seconds.into());
        let fresh = Tally { count: 0, until: now + window, is_blocked: false };
        let tally = self.tallies.entry(address).or_insert_with(|| Tally { ..fresh });
        if now >= tally.until {
            *tally = fresh;
        }
        tally.count = tally.count.saturating_add(1);
        if tally.is_blocked {
            return Guessed::Blocked;
        }
        if tally.count < config.max_auth_failures {
            return Guessed::Noted;
        }
        tally.is_blocked = true;
        tally.until = now + Duration::from_secs(config.auth_block_seconds.into());
        Guessed::Enough
    }

    fn make_room(&mut self, now: Instant) -> bool {
        if self.swept.is_none_or(|swept| now >= swept + SWEEP_INTERVAL) {
            self.swept = Some(now);
            self.tallies.retain(|_, tally| now < tally.until);
        }
        if self.tallies.len() < ADDRESSES_MAX {
            return true;
        }
        let other = self.tallies.iter().find(|(_, tally)| !tally.is_blocked).map(|(&address, _)| address);
        other.is_some_and(|other| self.tallies.remove(&other).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn address(n: u32) -> IpAddr {
        Ipv4Addr::from(n).into()
    }

    #[test]
    fn an_address_is_refused_after_so_many_failures_in_a_window() {
        let config = GatewayConfig {
            max_auth_failures: 3,
            auth_failure_window_seconds: 10,
            auth_block_seconds: 30,
            ..GatewayConfig::default()
        };
        let (mut failures, begin) = (Failures::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(failures.note(address(1), at(0), &config), Guessed::Noted);
        assert_eq!(failures.note(address(1), at(1), &config), Guessed::Noted);
        // The window is over: it begins anew.
        assert_eq!(failures.note(address(1), at(10), &config), Guessed::Noted);
        assert_eq!(failures.note(address(1), at(11), &config), Guessed::Noted);
        assert!(!failures.is_blocked(address(1), at(11)));
        assert_eq!(failures.note(address(1), at(12), &config), Guessed::Enough, "the third");
        assert_eq!(failures.note(address(1), at(13), &config), Guessed::Blocked);
        assert!(failures.is_blocked(address(1), at(41)) && !failures.is_blocked(address(2), at(12)));
        assert_eq!(failures.blocked(at(41)), 1);
        assert!(!failures.is_blocked(address(1), at(42)), "for a while");
        assert_eq!(failures.note(address(1), at(42), &config), Guessed::Noted, "and it is forgiven");
        let unlimited = GatewayConfig { max_auth_failures: 0, ..config };
        assert_eq!(Failures::default().note(address(1), begin, &unlimited), Guessed::Noted);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_refused_stay() {
        let config = GatewayConfig { max_auth_failures: 2, ..GatewayConfig::default() };
        let (mut failures, now) = (Failures::default(), Instant::now());
        failures.note(address(0), now, &config);
        assert_eq!(failures.note(address(0), now, &config), Guessed::Enough);
        for n in 1..=2 * ADDRESSES_MAX as u32 {
            failures.note(address(n), now, &config);
        }
        assert_eq!(failures.tallies.len(), ADDRESSES_MAX);
        assert!(failures.is_blocked(address(0), now));
        // What is over makes room first.
        failures.note(address(u32::MAX), now + Duration::from_secs(61), &config);
        assert_eq!(failures.tallies.len(), 1);
    }
}
