//! Log lines that others can cause as often as they like.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

const EVERY: Duration = Duration::from_secs(1);

/// Lets one line a second through.
pub(crate) struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    pub(crate) const fn new() -> Self {
        Seldom(Mutex::new((None, 0)))
    }

    /// May a line be written now? Then how many were not since the last one.
    pub(crate) fn now(&self) -> Option<u64> {
        let mut held = self.0.lock();
        match held.0 {
            Some(last) if last.elapsed() < EVERY => {
                held.1 += 1;
                None
            }
            _ => {
                held.0 = Some(Instant::now());
                Some(std::mem::take(&mut held.1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_others_are_counted() {
        let seldom = Seldom::new();
        assert_eq!([seldom.now(), seldom.now(), seldom.now()], [Some(0), None, None]);
        seldom.0.lock().0 = Instant::now().checked_sub(EVERY);
        assert_eq!([seldom.now(), seldom.now()], [Some(2), None]);
    }
}
