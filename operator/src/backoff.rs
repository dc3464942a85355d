//! How long a resource that fails is left alone: longer each time, for each one on its own.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;

/// After the first failure …
const FIRST: Duration = Duration::from_secs(1);
/// … and at most.
pub const LONGEST: Duration = Duration::from_secs(300);

/// Failures in a row, by resource.
pub struct Backoff<K> {
    failures: Mutex<HashMap<K, u32>>,
}

impl<K: Eq + Hash> Default for Backoff<K> {
    fn default() -> Self {
        Backoff { failures: Mutex::new(HashMap::new()) }
    }
}

impl<K: Eq + Hash> Backoff<K> {
    /// It has failed (again): how long to wait, up to a fifth less, so that many are not tried at once.
    pub fn failed(&self, key: K) -> Duration {
        let mut failures = self.failures.lock();
        let count = failures.entry(key).or_insert(0);
        *count = count.saturating_add(1);
        delay(*count).mul_f64(1.0 - rand::random_range(0.0..0.2))
    }

    /// It has succeeded, or is gone.
    pub fn forget(&self, key: &K) {
        self.failures.lock().remove(key);
    }
}

fn delay(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST * 2u32.pow(doublings)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_resource_waits_longer_until_it_succeeds() {
        let backoff = Backoff::default();
        let mut last = Duration::ZERO;
        for _ in 0..8 {
            let next = backoff.failed("a");
            assert!(next > last, "{next:?} after {last:?}");
            last = next;
        }
        assert!(backoff.failed("b") <= FIRST);
        backoff.forget(&"a");
        assert!(backoff.failed("a") <= FIRST);
    }

    #[test]
    fn the_delay_has_an_end() {
        assert_eq!((delay(1), delay(2), delay(9), delay(10)), (FIRST, FIRST * 2, FIRST * 256, LONGEST));
        assert_eq!(delay(u32::MAX), LONGEST);
    }
}
