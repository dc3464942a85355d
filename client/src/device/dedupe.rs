//! Drops what was received before: per topic, anything not newer than the last (epoch, seq).
//!
//! Delivery per topic is in order, and a redelivery repeats from an older point but never reorders, so one position a
//! topic is enough. An epoch counts first: what was not stored may lose its seq when its owner dies, and the seq is
//! then given again under the next epoch.

use std::collections::{HashMap, VecDeque};

/// The last position of each of a bounded number of topics.
#[derive(Debug)]
pub struct Dedupe {
    last: HashMap<String, (u64, u64)>,
    /// Topics in the order they were first seen: the oldest is forgotten first.
    order: VecDeque<String>,
    capacity: usize,
}

impl Dedupe {
    /// Remembers at most `capacity` topics.
    pub fn new(capacity: usize) -> Self {
        Dedupe { last: HashMap::new(), order: VecDeque::new(), capacity: capacity.max(1) }
    }

    /// True the first time; false for what was seen before.
    pub fn is_new(&mut self, topic: &str, epoch: u64, seq: u64) -> bool {
        if let Some(last) = self.last.get_mut(topic) {
            let new = (epoch, seq) > *last;
            if new {
                *last = (epoch, seq);
            }
            return new;
        }
        if self.order.len() >= self.capacity
            && let Some(oldest) = self.order.pop_front()
        {
            self.last.remove(&oldest);
        }
        self.order.push_back(topic.to_owned());
        self.last.insert(topic.to_owned(), (epoch, seq));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_dropped_and_the_next_passes() {
        let mut dedupe = Dedupe::new(10);
        let seen: Vec<bool> = [(1, 1), (1, 2), (1, 1), (1, 2), (1, 3), (2, 3), (1, 9), (2, 4)]
            .map(|(epoch, seq)| dedupe.is_new("demo/u/alice", epoch, seq))
            .into();
        assert_eq!(seen, [true, true, false, false, true, true, false, true]);
        assert!(dedupe.is_new("demo/u/bob", 1, 1), "topics do not disturb each other");
    }

    #[test]
    fn the_number_of_topics_is_bounded() {
        let mut dedupe = Dedupe::new(2);
        for topic in ["a", "b", "c"] {
            assert!(dedupe.is_new(topic, 1, 1));
        }
        assert_eq!(dedupe.last.len(), 2);
        assert!(!dedupe.is_new("c", 1, 1));
        assert!(dedupe.is_new("a", 1, 1), "the oldest was forgotten");
    }
}
