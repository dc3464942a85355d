//! How many pods there may be too many, and how many may be missing, while others take their place.

/// A number of pods, or a part of those wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    Count(u32),
    Percent(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub surge: usize,
    pub unavailable: usize,
}

impl Budget {
    /// Of so many pods. A surge is rounded up, what may be missing down, as Deployments do; when both are nothing,
    /// nothing could ever change, so one pod more is taken: unlike one pod less it costs nobody's connection.
    pub fn of(desired: usize, surge: Amount, unavailable: Amount) -> Budget {
        let surge = match surge {
            Amount::Count(count) => count as usize,
            Amount::Percent(percent) => (desired * percent as usize).div_ceil(100),
        };
        let unavailable = match unavailable {
            Amount::Count(count) => count as usize,
            Amount::Percent(percent) => desired * percent as usize / 100,
        };
        let surge = if surge == 0 && unavailable == 0 { 1 } else { surge };
        Budget { surge, unavailable: unavailable.min(desired) }
    }
}

#[cfg(test)]
mod tests {
    use super::Amount::{Count, Percent};
    use super::*;

    #[test]
    fn percentages_round_so_that_something_can_always_change() {
        for (desired, surge, unavailable, expected) in [
            (4, Percent(25), Count(0), (1, 0)),
            (5, Percent(25), Count(0), (2, 0)),
            (100, Percent(25), Percent(10), (25, 10)),
            (3, Percent(0), Percent(25), (1, 0)), // both round to nothing
            (3, Count(0), Count(0), (1, 0)),
            (3, Count(0), Percent(34), (0, 1)),
            (4, Percent(100), Count(0), (4, 0)),
            (4, Percent(0), Percent(100), (0, 4)),
            (2, Count(0), Count(5), (0, 2)),
            (0, Percent(25), Percent(25), (1, 0)),
        ] {
            let budget = Budget::of(desired, surge, unavailable);
            assert_eq!((budget.surge, budget.unavailable), expected, "{desired} {surge:?} {unavailable:?}");
        }
    }
}
