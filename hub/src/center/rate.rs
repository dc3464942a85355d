//! How many pushes an app may make: a token bucket each, holding at most a second's worth.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The buckets of all apps. There are no more than there are apps with a limit: callers ask for configured apps only.
#[derive(Default)]
pub struct Rates {
    buckets: Mutex<HashMap<String, Bucket>>,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Rates {
    /// Takes a token of `app`'s bucket, or says how long until there is one. 0 a second = no limit.
    pub fn take(&self, app: &str, per_second: u32, now: Instant) -> Result<(), Duration> {
        if per_second == 0 {
            return Ok(());
        }
        let per_second = f64::from(per_second);
        let mut buckets = self.buckets.lock();
        if !buckets.contains_key(app) {
            buckets.insert(app.to_owned(), Bucket { tokens: per_second, at: now });
        }
        let Some(bucket) = buckets.get_mut(app) else { return Ok(()) };
        let gained = now.saturating_duration_since(bucket.at).as_secs_f64() * per_second;
        bucket.tokens = (bucket.tokens + gained).min(per_second);
        bucket.at = now;
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - bucket.tokens) / per_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_gives_the_rate_and_no_more() {
        let rates = Rates::default();
        let mut now = Instant::now();
        for _ in 0..10 {
            assert_eq!(rates.take("a", 10, now), Ok(()));
        }
        let wait = rates.take("a", 10, now).expect_err("the bucket is empty");
        assert!(wait <= Duration::from_millis(100), "{wait:?}");
        assert_eq!(rates.take("b", 10, now), Ok(()), "another app has its own");
        assert_eq!(rates.take("a", 0, now), Ok(()), "0 is no limit");
        now += wait + Duration::from_millis(1);
        assert_eq!(rates.take("a", 10, now), Ok(()));
        assert!(rates.take("a", 10, now).is_err());
        // Hours of silence save up no more than a second's worth.
        now += Duration::from_secs(3600);
        let taken = (0..100).filter(|_| rates.take("a", 10, now).is_ok()).count();
        assert_eq!(taken, 10);
    }
}
