//! Is there too much to do? Then new devices are refused, before the kernel kills the process with all that it holds.

mod memory;

use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::Duration;

use crate::config::OverloadConfig;
use crate::metrics::Metrics;

pub use memory::{Memory, resident_bytes};

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Load {
    #[default]
    Normal,
    Memory,
    Cpu,
}

/// Shared by the shards, which are told, and the sampler, which finds out.
#[derive(Default)]
pub struct Overload {
    load: AtomicU8,
    /// Longest round of any shard since the last sample, milliseconds.
    lag_ms: AtomicU32,
}

impl Overload {
    pub fn load(&self) -> Load {
        match self.load.load(Ordering::Relaxed) {
            0 => Load::Normal,
            1 => Load::Memory,
            _ => Load::Cpu,
        }
    }

    pub fn note_lag(&self, round: Duration) {
        let ms = u32::try_from(round.as_millis()).unwrap_or(u32::MAX);
        self.lag_ms.fetch_max(ms, Ordering::Relaxed);
    }

    /// Looks, once a second. `root` is where `proc` and `sys` are.
    pub fn sample(&self, root: &Path, config: &OverloadConfig, metrics: &Metrics) {
        let memory = match config.memory_limit_bytes {
            0 => memory::tightest(root),
            limit_bytes => resident_bytes(root).map(|used_bytes| Memory { used_bytes, limit_bytes }),
        };
        let lag_ms = self.lag_ms.swap(0, Ordering::Relaxed);
        let before = self.load();
        let ratio = memory.map_or(0.0, Memory::ratio);
        let after = decide(before, ratio, lag_ms, config);
        if after != before {
            tracing::warn!(?before, ?after, memory_ratio = ratio, lag_ms, "load has changed");
        }
        self.load.store(after as u8, Ordering::Relaxed);
        metrics.overloaded.set(i64::from(after != Load::Normal));
        metrics.memory_ratio.set(ratio);
        metrics
            .memory_limit
            .set(memory.map_or(0, |memory| i64::try_from(memory.limit_bytes).unwrap_or(i64::MAX)));
        metrics.loop_lag.set(f64::from(lag_ms) / 1000.0);
    }
}

/// What holds from one sample to the next: it begins above the high mark and ends below the low one.
fn decide(before: Load, memory_ratio: f64, lag_ms: u32, config: &OverloadConfig) -> Load {
    let memory_mark = if before == Load::Memory { config.memory_low_ratio } else { config.memory_high_ratio };
    if memory_ratio >= memory_mark {
        return Load::Memory;
    }
    let lag_mark = if before == Load::Cpu { config.loop_lag_ms / 2 } else { config.loop_lag_ms };
    if config.loop_lag_ms > 0 && lag_ms > lag_mark { Load::Cpu } else { Load::Normal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_above_the_high_mark_and_ends_below_the_low_one() {
        let config = OverloadConfig {
            memory_high_ratio: 0.85,
            memory_low_ratio: 0.8,
            memory_limit_bytes: 0,
            loop_lag_ms: 100,
        };
        let mut load = Load::Normal;
        for (ratio, lag_ms, expected) in [
            (0.84, 100, Load::Normal),
            (0.85, 0, Load::Memory),
            (0.82, 0, Load::Memory),
            (0.79, 0, Load::Normal),
            (0.82, 101, Load::Cpu),
            (0.82, 51, Load::Cpu),
            (0.9, 51, Load::Memory),
            (0.1, 51, Load::Normal),
            (0.1, 101, Load::Cpu),
            (0.1, 50, Load::Normal),
        ] {
            load = decide(load, ratio, lag_ms, &config);
            assert_eq!(load, expected, "{ratio} {lag_ms}");
        }
        let no_lag = OverloadConfig { loop_lag_ms: 0, ..config };
        assert_eq!(decide(Load::Normal, 0.0, u32::MAX, &no_lag), Load::Normal);
    }
}
