//! A device that publishes above its rate is not read for a while: what it sends then waits in its own socket.

use std::cmp::Reverse;
use std::time::Duration;

use carillon_agent::app::AppLimits;

use super::Shard;
use super::timers::{millis, ticks};
use crate::config::GatewayConfig;

/// When a device's publishes so far would have been due at its rate, messages and bytes apart; milliseconds since the
/// shard began. A second's worth may be ahead of its time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pace {
    messages_due_ms: f64,
    bytes_due_ms: f64,
}

/// How far ahead of its time a device may be, milliseconds.
const AHEAD_MS: f64 = 1000.0;

/// Messages and bytes per second; 0 = no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    messages: u32,
    bytes: u32,
}

impl Rates {
    /// The app's, where it says; else the gateway's.
    pub fn of(config: &GatewayConfig, limits: &AppLimits) -> Rates {
        Rates {
            messages: limits.publish_messages_per_second.unwrap_or(config.publish_messages_per_second),
            bytes: limits.publish_bytes_per_second.unwrap_or(config.publish_bytes_per_second),
        }
    }
}

impl Pace {
    /// It is as if nothing had ever been counted.
    pub fn is_over(&self, now_ms: f64) -> bool {
        self.messages_due_ms.max(self.bytes_due_ms) <= now_ms - AHEAD_MS
    }

    /// Counts a publish; gives how long nothing is to be read after it, if at all.
    pub fn count(&mut self, bytes: usize, rates: Rates, now_ms: f64) -> Option<Duration> {
        let count = |due_ms: &mut f64, amount: f64, rate: u32| {
            if rate == 0 {
                return 0.0;
            }
            *due_ms = due_ms.max(now_ms - AHEAD_MS) + amount * 1000.0 / f64::from(rate);
            *due_ms - now_ms
        };
        let messages_ms = count(&mut self.messages_due_ms, 1.0, rates.messages);
        let bytes_ms = count(&mut self.bytes_due_ms, bytes as f64, rates.bytes);
        let wait_ms = messages_ms.max(bytes_ms);
        (wait_ms > 0.0).then(|| Duration::from_secs_f64(wait_ms / 1000.0))
    }
}

impl Shard {
    /// Counts a PUBLISH of the device against its rates.
    pub(super) fn pace(&mut self, index: u32, bytes: usize) {
        let now_ms = millis(self.now);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let apps = self.shared.apps.load();
        let Some(rates) = apps.get(&*session.app).map(|app| Rates::of(&self.config, &app.limits)) else {
            return;
        };
        let publishing = session.publishing.get_or_insert_default();
        let Some(wait) = publishing.pace.count(bytes, rates, now_ms) else { return };
        let until = self.now + ticks(wait);
        publishing.read_again = until;
        conn.is_paused = true;
        self.paced.push(Reverse((until, index, conn.generation)));
        self.counts.throttled += 1;
    }

    /// Reads on those whose time has come.
    pub(super) fn read_paced(&mut self) {
        while let Some(&Reverse((until, index, generation))) = self.paced.peek() {
            if until > self.now {
                return;
            }
            self.paced.pop();
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                self.read_on_if_due(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_ahead_at_most_and_then_the_rate_holds() {
        let rates = Rates { messages: 10, bytes: 0 };
        let mut pace = Pace::default();
        let now = 50_000.0;
        for i in 0..10 {
            assert_eq!(pace.count(5000, rates, now), None, "{i}");
        }
        assert_eq!(pace.count(0, rates, now), Some(Duration::from_millis(100)));
        // It waits that long each time: 10 a second.
        let (mut at, mut sent) = (now + 100.0, 0);
        while at < now + 5100.0 {
            let wait = pace.count(0, rates, at);
            sent += 1;
            at += wait.map_or(0.0, |wait| wait.as_secs_f64() * 1000.0);
        }
        assert!((50..=51).contains(&sent), "{sent}");
        // However long it was silent.
        let later = now + 1e9;
        assert_eq!((0..100).take_while(|_| pace.count(0, rates, later).is_none()).count(), 10);
    }

    #[test]
    fn bytes_count_apart() {
        let rates = Rates { messages: 1000, bytes: 1000 };
        let mut pace = Pace::default();
        assert_eq!(pace.count(1000, rates, 5000.0), None);
        assert_eq!(pace.count(500, rates, 5000.0), Some(Duration::from_millis(500)));
        assert_eq!(Pace::default().count(usize::MAX / 2, Rates { messages: 0, bytes: 0 }, 0.0), None);
    }

    #[test]
    fn an_apps_rates_go_before_the_gateways() {
        let config = GatewayConfig {
            publish_messages_per_second: 7,
            publish_bytes_per_second: 8,
            ..GatewayConfig::default()
        };
        let limits = AppLimits { publish_messages_per_second: Some(0), ..AppLimits::default() };
        assert_eq!(Rates::of(&config, &limits), Rates { messages: 0, bytes: 8 });
    }
}
