//! Ids of recent messages that are in no log, so that a retry of one is harmless.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// How many are remembered; the oldest go first.
const RECENT_IDS: usize = 16_384;

/// Ids of recent messages that are in no log.
#[derive(Debug, Default)]
pub(super) struct RecentIds {
    positions: HashMap<Arc<str>, (u64, u64)>,
    order: VecDeque<Arc<str>>,
}

impl RecentIds {
    fn key(topic: &str, id: &str) -> Arc<str> {
        format!("{topic}\0{id}").into()
    }

    pub(super) fn get(&self, topic: &str, id: &str) -> Option<(u64, u64)> {
        self.positions.get(&Self::key(topic, id)).copied()
    }

    pub(super) fn insert(&mut self, topic: &str, id: &str, position: (u64, u64)) {
        let key = Self::key(topic, id);
        self.positions.insert(key.clone(), position);
        self.order.push_back(key);
        if self.order.len() > RECENT_IDS
            && let Some(oldest) = self.order.pop_front()
        {
            self.positions.remove(&oldest);
        }
    }
}
