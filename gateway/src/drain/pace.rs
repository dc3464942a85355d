//! How many devices may go now, and how many of them from which shard: arithmetic alone.

use std::time::{Duration, Instant};

/// Faster than the rate by this much while what a stall has held up is made up for: no bursts.
const CATCH_UP: f64 = 1.5;
/// The longest step that is taken in one go.
const STEP: Duration = Duration::from_millis(100);
/// What could not be used for longer than this is not made up for.
const FORGET: Duration = Duration::from_secs(2);

/// Keeps a rate over the whole time, evenly: what is due since the beginning, less what went.
#[derive(Debug)]
pub struct Pace {
    per_second: f64,
    began: Instant,
    last: Instant,
    taken: u64,
}

impl Pace {
    pub fn new(per_second: f64, now: Instant) -> Self {
        Pace { per_second, began: now, last: now, taken: 0 }
    }

    /// How many may go at this moment; they count as gone.
    pub fn take(&mut self, now: Instant) -> u64 {
        let step = now.saturating_duration_since(self.last).min(STEP);
        self.last = now;
        let due = (self.per_second * now.saturating_duration_since(self.began).as_secs_f64()) as u64;
        let most_behind = (self.per_second * FORGET.as_secs_f64()).ceil() as u64;
        self.taken = self.taken.max(due.saturating_sub(most_behind));
        let at_once = (self.per_second * step.as_secs_f64() * CATCH_UP).ceil() as u64;
        let count = due.saturating_sub(self.taken).min(at_once.max(1));
        self.taken += count;
        count
    }

    /// So many of those that were taken did not go.
    pub fn give_back(&mut self, count: u64) {
        self.taken = self.taken.saturating_sub(count);
    }
}

/// Splits a number over parts by what is left in each, never more than that; the sum is exact.
pub fn split(count: u64, left: &[u64]) -> Vec<u64> {
    let total: u64 = left.iter().sum();
    let count = count.min(total);
    if total == 0 {
        return vec![0; left.len()];
    }
    let exact = |left: u64| u128::from(count) * u128::from(left);
    let mut parts: Vec<u64> = left.iter().map(|&left| (exact(left) / u128::from(total)) as u64).collect();
    let mut by_remainder: Vec<usize> = (0..left.len()).collect();
    by_remainder.sort_by_key(|&part| std::cmp::Reverse(exact(left[part]) % u128::from(total)));
    let missing = (count - parts.iter().sum::<u64>()) as usize;
    for part in by_remainder.into_iter().take(missing) {
        parts[part] += 1;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many go in each second, when `take` is called after each of these steps in turn.
    fn run(per_second: f64, seconds: u64, steps_ms: &[u64]) -> Vec<u64> {
        let began = Instant::now();
        let mut pace = Pace::new(per_second, began);
        let mut gone = vec![0; seconds as usize];
        let mut at_ms = 0;
        for step in steps_ms.iter().cycle() {
            at_ms += step;
            let Some(second) = gone.get_mut((at_ms / 1000) as usize) else { break };
            *second += pace.take(began + Duration::from_millis(at_ms));
        }
        gone
    }

    #[test]
    fn the_rate_is_kept_over_the_whole_and_in_each_second() {
        for (rate, steps) in [(1000.0, &[20][..]), (500.0, &[20, 35, 5]), (333.3, &[7]), (3.0, &[20])] {
            let gone = run(rate, 20, steps);
            let sum: u64 = gone.iter().sum();
            assert!((sum as f64 - rate * 20.0).abs() <= rate * 0.05 + 1.0, "{rate}: {sum}");
            assert!(gone.iter().all(|&n| (n as f64 - rate).abs() <= rate * 0.1 + 1.0), "{rate}: {gone:?}");
        }
    }

    #[test]
    fn a_stall_is_made_up_for_without_a_burst() {
        let began = Instant::now();
        let mut pace = Pace::new(1000.0, began);
        assert_eq!(pace.take(began + Duration::from_secs(1)), 150);
        let mut sum = 150;
        for tick in 1..=250 {
            let now = pace.take(began + Duration::from_secs(1) + Duration::from_millis(tick * 20));
            assert!(now <= 30, "{now} in 20 ms");
            sum += now;
        }
        assert_eq!(sum, 6000);
    }

    #[test]
    fn what_did_not_go_is_due_again_but_not_for_ever() {
        let began = Instant::now();
        let mut pace = Pace::new(100.0, began);
        assert_eq!(pace.take(began + Duration::from_millis(100)), 10);
        pace.give_back(4);
        assert_eq!(pace.take(began + Duration::from_millis(120)), 3);
        let later = began + Duration::from_secs(600);
        let mut sum = pace.take(later);
        for tick in 1..=500 {
            sum += pace.take(later + Duration::from_millis(tick * 20));
        }
        assert!((1195..=1205).contains(&sum), "two seconds' and ten seconds' worth, not ten minutes': {sum}");
    }

    #[test]
    fn parts_follow_what_is_left_and_sum_up() {
        assert_eq!(split(10, &[100, 100]), [5, 5]);
        assert_eq!(split(10, &[900, 100]), [9, 1]);
        assert_eq!(split(1, &[3, 2]), [1, 0]);
        assert_eq!(split(3, &[1, 1, 1, 1]).iter().sum::<u64>(), 3);
        assert_eq!(split(100, &[3, 0, 4]), [3, 0, 4]);
        assert_eq!(split(5, &[]), [0u64; 0]);
        assert_eq!(split(7, &[0, 0]), [0, 0]);
        for count in 0..200 {
            let left = [1, 50, 3, 77, 0, 12];
            let parts = split(count, &left);
            assert_eq!(parts.iter().sum::<u64>(), count.min(143));
            assert!(parts.iter().zip(&left).all(|(part, left)| part <= left), "{parts:?}");
        }
    }
}
