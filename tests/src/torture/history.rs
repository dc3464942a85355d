//! What clients did, when, and what came of it. Two checkers judge it: [`super::checker`] by what was read and written
//! alone, key by key; [`super::revisions`] by the revisions that the keeper gave, over all keys at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

/// Never returned.
pub const NEVER: u64 = u64::MAX;

/// A value; every write has its own. None: no such key.
pub type Value = Option<u64>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// What it read.
    Read(Value),
    /// What it wrote; None: it deleted the key.
    Write(Value),
    /// From, to; did it happen? Not known if the call did not return.
    Swap(u64, u64, bool),
}

/// A call: carried out at one moment between `call` and `end`, or (when it never returned) after `call` or not at all.
#[derive(Debug, Clone)]
pub struct Operation {
    pub client: usize,
    pub key: String,
    pub action: Action,
    /// Nanoseconds since the history began.
    pub call: u64,
    pub end: u64,
    /// Of the store, as answered; 0 = not known.
    pub revision: u64,
    /// What a read said about when the key was written; 0 = it is not there.
    pub written: u64,
}

impl Operation {
    pub fn returned(&self) -> bool {
        self.end != NEVER
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |at: u64| if at == NEVER { "never".to_owned() } else { format!("{:.3}", at as f64 / 1e6) };
        write!(
            f,
            "{:>12} – {:>12} ms  client {:<2}  {}  {:?}  revision {}  written {}",
            ms(self.call),
            ms(self.end),
            self.client,
            self.key,
            self.action,
            self.revision,
            self.written
        )
    }
}

/// Collects operations of all clients.
pub struct History {
    begun: Instant,
    next_value: AtomicU64,
    operations: Mutex<Vec<Operation>>,
}

impl Default for History {
    fn default() -> Self {
        History { begun: Instant::now(), next_value: AtomicU64::new(1), operations: Mutex::default() }
    }
}

impl History {
    pub fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    /// One that nobody else writes.
    pub fn value(&self) -> u64 {
        self.next_value.fetch_add(1, Ordering::Relaxed)
    }

    pub fn add(&self, operation: Operation) {
        self.operations.lock().push(operation);
    }

    pub fn len(&self) -> usize {
        self.operations.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut *self.operations.lock())
    }
}
