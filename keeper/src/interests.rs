//! Who waits for which changes: a change wakes those whom it concerns, not all of them.
//!
//! Watches are found by the prefixes of a changed key: as many look-ups as there are different lengths of prefixes, which are
//! few. What a watch learns is the first revision that concerned it since it last asked; nothing before that has, so
//! that it can pass over changes that others made, however many.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// No change.
const NONE: u64 = u64::MAX;

/// What one watch is told.
struct Signal {
    /// The first revision that concerned it since it last asked.
    first: AtomicU64,
    notify: Notify,
}

impl Signal {
    fn touch(&self, revision: u64) {
        self.first.fetch_min(revision, Ordering::AcqRel);
        self.notify.notify_one();
    }
}

#[derive(Default)]
struct Index {
    /// By prefix, by number.
    by_prefix: HashMap<Arc<str>, HashMap<u64, Arc<Signal>>>,
    /// How many different prefixes have this length, bytes.
    lengths: BTreeMap<usize, usize>,
    all: HashMap<u64, Arc<Signal>>,
    next: u64,
}

/// A cheap handle.
#[derive(Clone, Default)]
pub(crate) struct Interests(Arc<Mutex<Index>>);

impl Interests {
    /// From now on, until it is dropped.
    pub(crate) fn register(&self, prefixes: &[String]) -> Interest {
        let signal = Arc::new(Signal { first: AtomicU64::new(NONE), notify: Notify::new() });
        let mut own: Vec<Arc<str>> = Vec::with_capacity(prefixes.len());
        let mut index = self.0.lock();
        index.next += 1;
        let number = index.next;
        for prefix in prefixes {
            let known = index.by_prefix.get_key_value(prefix.as_str()).map(|(known, _)| known.clone());
            let key = known.unwrap_or_else(|| {
                *index.lengths.entry(prefix.len()).or_insert(0) += 1;
                prefix.as_str().into()
            });
            index.by_prefix.entry(key.clone()).or_default().insert(number, signal.clone());
            own.push(key);
        }
        index.all.insert(number, signal.clone());
        Interest { number, prefixes: own, signal, index: self.0.clone() }
    }

    /// These keys have changed at these revisions, in order.
    pub(crate) fn touch<'a>(&self, changes: impl Iterator<Item = (&'a str, u64)>) {
        let index = self.0.lock();
        for (key, revision) in changes {
            for (&length, _) in index.lengths.range(..=key.len()) {
                let signals = key.get(..length).and_then(|prefix| index.by_prefix.get(prefix));
                signals.into_iter().flat_map(HashMap::values).for_each(|signal| signal.touch(revision));
            }
        }
    }

    /// Anything may have changed.
    pub(crate) fn touch_all(&self) {
        self.0.lock().all.values().for_each(|signal| signal.touch(0));
    }
}

/// What one watch waits for.
pub(crate) struct Interest {
    number: u64,
    prefixes: Vec<Arc<str>>,
    signal: Arc<Signal>,
    index: Arc<Mutex<Index>>,
}

impl Interest {
    /// The first revision that concerned it since the last time; 0: whatever there is has to be looked at; None: none has.
    pub(crate) fn take(&self) -> Option<u64> {
        Some(self.signal.first.swap(NONE, Ordering::AcqRel)).filter(|first| *first != NONE)
    }

    /// Resolves when there is something to take; now and then when there is not.
    pub(crate) async fn changed(&self) {
        self.signal.notify.notified().await;
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        let mut index = self.index.lock();
        index.all.remove(&self.number);
        for prefix in &self.prefixes {
            let Some(signals) = index.by_prefix.get_mut(prefix) else { continue };
            signals.remove(&self.number);
            if !signals.is_empty() {
                continue;
            }
            index.by_prefix.remove(prefix);
            match index.lengths.get_mut(&prefix.len()) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(index.lengths.remove(&prefix.len())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_wakes_those_whom_it_concerns() {
        let interests = Interests::default();
        let register = |prefixes: &[&str]| {
            interests.register(&prefixes.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        let all =
            [register(&["a/", "b/1"]), register(&["b/"]), register(&[""]), register(&["a/", "a/x", "ä"])];
        let touch = |keys: &[&str]| interests.touch(keys.iter().copied().zip(7..));
        let taken = || all.each_ref().map(Interest::take);
        assert_eq!(taken(), [None; 4]);
        touch(&["c", "a/x", "a/y"]);
        assert_eq!(taken(), [Some(8), None, Some(7), Some(8)], "the first of them");
        assert_eq!(taken(), [None; 4], "it is told once");
        touch(&["b/2"]);
        assert_eq!(taken(), [None, Some(7), Some(7), None]);
        touch(&["b/1", "ö"]);
        assert_eq!(taken(), [Some(7), Some(7), Some(7), None]);
        interests.touch_all();
        assert_eq!(taken(), [Some(0); 4]);
        drop(all);
        let index = interests.0.lock();
        assert_eq!(
            (index.all.len(), index.by_prefix.len(), index.lengths.len()),
            (0, 0, 0),
            "nothing is left"
        );
    }
}
