//! Latencies in microseconds, counted in buckets at most 3 % wide, that can be added up over processes.

use serde::{Deserialize, Serialize};

/// Buckets for each power of two.
const STEPS: u64 = 32;
const STEPS_LOG2: u32 = STEPS.trailing_zeros();

/// Counts by bucket. What crosses processes is the list of the buckets that are not empty.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(from = "Sparse", into = "Sparse")]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u64,
    max: u64,
}

#[derive(Serialize, Deserialize)]
struct Sparse {
    counts: Vec<(usize, u64)>,
    sum: u64,
    max: u64,
}

impl Histogram {
    pub fn record(&mut self, micros: u64) {
        let bucket = bucket(micros);
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.count += 1;
        self.sum += micros;
        self.max = self.max.max(micros);
    }

    pub fn add(&mut self, other: &Histogram) {
        if other.counts.len() > self.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The value that this share of all values (0 to 1) does not exceed, rounded up to its bucket's end.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return last_of(bucket).min(self.max);
            }
        }
        self.max
    }
}

/// Values below `STEPS` have a bucket each; above, a power of two has `STEPS` of them.
fn bucket(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let exponent = value.ilog2();
    let step = (value >> (exponent - STEPS_LOG2)) - STEPS;
    (u64::from(exponent - STEPS_LOG2 + 1) * STEPS + step) as usize
}

/// The highest value in a bucket.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let shift = bucket / STEPS - 1;
    let first = (STEPS + bucket % STEPS) << shift;
    first + ((1 << shift) - 1)
}

impl From<Histogram> for Sparse {
    fn from(full: Histogram) -> Sparse {
        let counts = full.counts.into_iter().enumerate().filter(|&(_, count)| count > 0).collect();
        Sparse { counts, sum: full.sum, max: full.max }
    }
}

impl From<Sparse> for Histogram {
    fn from(sparse: Sparse) -> Histogram {
        let length = sparse.counts.last().map_or(0, |&(bucket, _)| bucket + 1);
        let mut counts = vec![0; length];
        for (bucket, count) in sparse.counts {
            // In order, as they were written; one that is not is nobody's.
            if let Some(slot) = counts.get_mut(bucket) {
                *slot = count;
            }
        }
        let count = counts.iter().sum();
        Histogram { counts, count, sum: sparse.sum, max: sparse.max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_at_most_three_percent_wide_and_holds_its_values() {
        for value in (0..5000).chain([1 << 20, (1 << 20) + 12_345, 3_600_000_000]) {
            let last = last_of(bucket(value));
            assert!(
                last >= value && last as f64 <= value as f64 * 1.032,
                "{value} is in a bucket up to {last}"
            );
            assert_ne!(bucket(last), bucket(last + 1), "{last} is the last of its bucket");
        }
    }

    #[test]
    fn quantiles_survive_the_way_between_processes() {
        let (mut low, mut high) = (Histogram::default(), Histogram::default());
        (1..=500).for_each(|value| low.record(value));
        (501..=1000).for_each(|value| high.record(value));
        let sent = serde_json::to_string(&high).unwrap();
        low.add(&serde_json::from_str(&sent).unwrap());
        assert_eq!((low.count(), low.max(), low.mean()), (1000, 1000, 500));
        let half = low.quantile(0.5);
        assert!((500..=516).contains(&half), "{half}");
        assert_eq!(low.quantile(1.0), 1000);
    }
}
