//! The replicated state: keys with revisions, leases, and the changes that watchers can still resume from.
//!
//! Pure: an entry goes in, the state changes, what came of it comes out, the same on every node. No clock, no I/O.

mod restoring;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use carillon_proto::v1;
use v1::compare::Target;
use v1::op;

/// Changes that are kept for watchers: at most this many …
const MAX_EVENTS: usize = 20_000;
/// … and at most this many bytes of keys and values.
const MAX_EVENT_BYTES: usize = 16 * 1024 * 1024;

/// A key as it is now. Cloning shares the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub value: Bytes,
    pub create_revision: u64,
    pub mod_revision: u64,
    pub version: u64,
    pub lease: u64,
}

impl Item {
    pub(crate) fn to_proto(&self, key: &str) -> v1::KeyValue {
        v1::KeyValue {
            key: key.to_owned(),
            value: self.value.clone(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            lease: self.lease,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    ttl_ms: u64,
    /// The revision at which it was granted: its fencing token.
    granted: u64,
    keys: BTreeSet<String>,
}

/// The state at one revision. Cloning copies the tree but shares the values: for snapshots.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    /// Grows by one with each entry that changes something.
    revision: u64,
    items: BTreeMap<String, Item>,
    leases: BTreeMap<u64, Lease>,
    /// Keys and values, bytes.
    bytes: usize,
    /// By revision, oldest first.
    events: VecDeque<Arc<v1::WatchEvent>>,
    event_bytes: usize,
    /// All changes after this revision are in `events`.
    compacted: u64,
}

/// What a watcher sees next.
#[derive(Debug, PartialEq)]
pub(crate) enum Changes {
    /// All that concerns it up to this revision (there may be more after it).
    Up { revision: u64, events: Vec<Arc<v1::WatchEvent>> },
    /// The changes are not kept any more up to this revision.
    Compacted(u64),
    /// It knows more than there is.
    Ahead(u64),
}

impl State {
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    pub(crate) fn compacted(&self) -> u64 {
        self.compacted
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Size of all keys and values.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Item> {
        self.items.get(key)
    }

    /// All keys with this prefix, in order.
    pub(crate) fn prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Item)> {
        self.prefix_after(prefix, None)
    }

    /// All keys with this prefix after a key, in order.
    pub(crate) fn prefix_after<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
    ) -> impl Iterator<Item = (&'a str, &'a Item)> {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.items
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, item)| (key.as_str(), item))
    }

    /// All leases with their times to live, milliseconds.
    pub(crate) fn leases(&self) -> impl Iterator<Item = (u64, u64)> {
        self.leases.iter().map(|(&lease, body)| (lease, body.ttl_ms))
    }

    pub(crate) fn lease_ttl_ms(&self, lease: u64) -> Option<u64> {
        self.leases.get(&lease).map(|lease| lease.ttl_ms)
    }

    /// The keys that end with a lease; None: it is not alive.
    pub(crate) fn attached(&self, lease: u64) -> Option<impl Iterator<Item = &str>> {
        self.leases.get(&lease).map(|lease| lease.keys.iter().map(String::as_str))
    }

    /// A lease's fencing token; 0 when it is not alive.
    pub(crate) fn lease_token(&self, lease: u64) -> u64 {
        self.leases.get(&lease).map_or(0, |lease| lease.granted)
    }

    pub(crate) fn lease_count(&self) -> usize {
        self.leases.len()
    }

    /// Carries out an entry.
    pub(crate) fn apply(&mut self, entry: &v1::KeeperEntry) -> v1::KeeperApplied {
        let Some(txn) = &entry.txn else {
            return v1::KeeperApplied { txn: Some(self.answer(true, 0)), missing_lease: 0 };
        };
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        if let Some(lease) = self.missing_lease(ops) {
            return v1::KeeperApplied { txn: Some(self.answer(false, 0)), missing_lease: lease };
        }
        let revision = self.revision + 1;
        let before = self.events.len();
        let mut deleted = 0;
        let mut leases_changed = false;
        for op in ops {
            match &op.op {
                Some(op::Op::Put(put)) => self.put(revision, put),
                Some(op::Op::Delete(key)) => deleted += u64::from(self.delete(revision, key)),
                Some(op::Op::DeletePrefix(prefix)) => {
                    let keys: Vec<String> = self.prefix(prefix).map(|(key, _)| key.to_owned()).collect();
                    deleted += keys.iter().filter(|key| self.delete(revision, key)).count() as u64;
                }
                Some(op::Op::GrantLease(grant)) => {
                    leases_changed = true;
                    let lease = self.leases.entry(grant.lease).or_insert_with(|| Lease {
                        ttl_ms: 0,
                        granted: revision,
                        keys: BTreeSet::new(),
                    });
                    lease.ttl_ms = grant.ttl_ms;
                }
                Some(op::Op::RevokeLeases(revoke)) => {
                    for lease in &revoke.leases {
                        if let Some(lease) = self.leases.remove(lease) {
                            leases_changed = true;
                            deleted +=
                                lease.keys.iter().filter(|key| self.delete(revision, key)).count() as u64;
                        }
                    }
                }
                None => {}
            }
        }
        if self.events.len() > before || leases_changed {
            self.revision = revision;
        }
        self.compact();
        v1::KeeperApplied { txn: Some(self.answer(succeeded, deleted)), missing_lease: 0 }
    }

    fn answer(&self, succeeded: bool, deleted: u64) -> v1::TxnResponse {
        v1::TxnResponse { revision: self.revision, succeeded, deleted }
    }

    fn holds(&self, compare: &v1::Compare) -> bool {
        let item = self.items.get(&compare.key);
        match &compare.target {
            None => true,
            Some(Target::ModRevision(revision)) => item.map_or(0, |item| item.mod_revision) == *revision,
            Some(Target::Version(version)) => item.map_or(0, |item| item.version) == *version,
            Some(Target::Value(value)) => item.is_some_and(|item| item.value == *value),
            Some(Target::Lease(lease)) => self.leases.contains_key(lease),
            Some(Target::PrefixUnchangedSince(revision)) => {
                // Deletions are seen in the changes; when those are gone, nothing can be promised.
                let known = self.compacted <= *revision;
                let written = self.prefix(&compare.key).any(|(_, item)| item.mod_revision > *revision);
                known
                    && !written
                    && !self.events_after(*revision).any(|event| key_of(event).starts_with(&compare.key))
            }
        }
    }

    /// The first lease that a put names and that is neither alive nor granted before it in the same transaction.
    fn missing_lease(&self, ops: &[v1::Op]) -> Option<u64> {
        let mut alive: BTreeMap<u64, bool> = BTreeMap::new();
        for op in ops {
            match &op.op {
                Some(op::Op::GrantLease(grant)) => drop(alive.insert(grant.lease, true)),
                Some(op::Op::RevokeLeases(revoke)) => {
                    alive.extend(revoke.leases.iter().map(|&lease| (lease, false)))
                }
                Some(op::Op::Put(put))
                    if put.lease != 0
                        && !alive
                            .get(&put.lease)
                            .copied()
                            .unwrap_or_else(|| self.leases.contains_key(&put.lease)) =>
                {
                    return Some(put.lease);
                }
                _ => {}
            }
        }
        None
    }

    fn put(&mut self, revision: u64, put: &op::Put) {
        let before = self.items.get(&put.key);
        let item = Item {
            value: put.value.clone(),
            create_revision: before.map_or(revision, |item| item.create_revision),
            mod_revision: revision,
            version: before.map_or(1, |item| item.version + 1),
            lease: put.lease,
        };
        if let Some(before) = before {
            self.bytes -= put.key.len() + before.value.len();
            self.detach(before.lease, &put.key);
        }
        self.bytes += put.key.len() + put.value.len();
        if let Some(lease) = self.leases.get_mut(&put.lease) {
            lease.keys.insert(put.key.clone());
        }
        let event = v1::WatchEvent { item: Some(item.to_proto(&put.key)), deleted: false };
        self.items.insert(put.key.clone(), item);
        self.record(event);
    }

    fn delete(&mut self, revision: u64, key: &str) -> bool {
        let Some(item) = self.items.remove(key) else { return false };
        self.bytes -= key.len() + item.value.len();
        self.detach(item.lease, key);
        let item = v1::KeyValue { key: key.to_owned(), mod_revision: revision, ..Default::default() };
        self.record(v1::WatchEvent { item: Some(item), deleted: true });
        true
    }

    fn detach(&mut self, lease: u64, key: &str) {
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.remove(key);
        }
    }

    fn record(&mut self, event: v1::WatchEvent) {
        self.event_bytes += event_bytes(&event);
        self.events.push_back(Arc::new(event));
    }

    /// Forgets the oldest changes, whole revisions at a time.
    fn compact(&mut self) {
        while self.events.len() > MAX_EVENTS || self.event_bytes > MAX_EVENT_BYTES {
            let Some(revision) = self.events.front().map(|event| revision_of(event)) else { return };
            while let Some(event) = self.events.front()
                && revision_of(event) == revision
            {
                self.event_bytes -= event_bytes(event);
                self.events.pop_front();
            }
            self.compacted = revision;
        }
    }

    /// Which keys have changed after a revision, and at which, in order; None: that is not kept any more.
    pub(crate) fn changed_after(&self, revision: u64) -> Option<impl Iterator<Item = (&str, u64)>> {
        let changes = self.events_after(revision).map(|event| (key_of(event), revision_of(event)));
        (self.compacted <= revision && revision <= self.revision).then_some(changes)
    }

    fn events_after(&self, revision: u64) -> impl Iterator<Item = &Arc<v1::WatchEvent>> {
        let first = self.events.partition_point(|event| revision_of(event) <= revision);
        self.events.range(first..)
    }

    /// The changes after a revision that concern a watcher, up to about `bytes`; a revision is never split.
    pub(crate) fn changes(&self, prefixes: &[String], after: u64, bytes: usize) -> Changes {
        if after > self.revision {
            return Changes::Ahead(self.revision);
        }
        if after < self.compacted {
            return Changes::Compacted(self.compacted);
        }
        let mut events = Vec::new();
        let mut taken = 0;
        let mut last = after;
        for event in self.events_after(after) {
            let revision = revision_of(event);
            if taken >= bytes && revision != last {
                return Changes::Up { revision: last, events };
            }
            last = revision;
            if concerns(prefixes, key_of(event)) {
                taken += event_bytes(event);
                events.push(event.clone());
            }
        }
        Changes::Up { revision: self.revision, events }
    }

    /// All keys that concern a watcher.
    pub(crate) fn matching(&self, prefixes: &[String]) -> Vec<(String, Item)> {
        let mut seen = BTreeMap::new();
        for prefix in prefixes {
            seen.extend(self.prefix(prefix).map(|(key, item)| (key.to_owned(), item.clone())));
        }
        seen.into_iter().collect()
    }
}

fn concerns(prefixes: &[String], key: &str) -> bool {
    prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()))
}

fn revision_of(event: &v1::WatchEvent) -> u64 {
    event.item.as_ref().map_or(0, |item| item.mod_revision)
}

fn key_of(event: &v1::WatchEvent) -> &str {
    event.item.as_ref().map_or("", |item| &item.key)
}

fn event_bytes(event: &v1::WatchEvent) -> usize {
    // The rest is about what an event takes besides its key and value.
    event.item.as_ref().map_or(0, |item| item.key.len() + item.value.len()) + 96
}

#[cfg(test)]
mod tests;
