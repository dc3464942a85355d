//! Which connection holds which session, over all shards of this gateway: for take-over and for kicks from outside.

use std::hash::{BuildHasherDefault, Hasher};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::event::ConnId;

/// By [`session_key`](crate::delivery::session_key).
#[derive(Default)]
pub struct Sessions {
    held: DashMap<u128, (ConnId, u64), BuildHasherDefault<KeyHasher>>,
    /// Further apps' users, each on some session's connection.
    guests: DashMap<u128, (ConnId, u64), BuildHasherDefault<KeyHasher>>,
}

/// The keys are hashes already.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxhash_rust::xxh3::xxh3_64(bytes);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Sessions {
    /// This connection holds the session from now on; gives the one that held it before.
    pub fn take(&self, key: u128, conn: ConnId, connection: u64) -> Option<ConnId> {
        self.held.insert(key, (conn, connection)).map(|(before, _)| before)
    }

    /// The connection has ended; a later holder of the session stays.
    pub fn release(&self, key: u128, conn: ConnId) {
        if let Entry::Occupied(held) = self.held.entry(key)
            && held.get().0 == conn
        {
            held.remove();
        }
    }

    /// This connection serves the further app's user from now on.
    pub fn take_guest(&self, key: u128, conn: ConnId, connection: u64) {
        self.guests.insert(key, (conn, connection));
    }

    /// It does not any more; a later one stays.
    pub fn release_guest(&self, key: u128, connection: u64) {
        if let Entry::Occupied(held) = self.guests.entry(key)
            && held.get().1 == connection
        {
            held.remove();
        }
    }

    pub fn find_guest(&self, key: u128) -> Option<(ConnId, u64)> {
        self.guests.get(&key).map(|held| *held)
    }

    /// Who holds it, and the number of that connection.
    pub fn find(&self, key: u128) -> Option<(ConnId, u64)> {
        self.held.get(&key).map(|held| *held)
    }
}
