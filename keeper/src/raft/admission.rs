//! How much may wait to be decided, bytes. Until then an entry is in memory, here and at the node that leads; without a
//! majority for as long as that takes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::types::Entry;
use super::{Node, Unavailable};

/// What an entry takes besides its bytes, about.
const ENTRY_BYTES: usize = 512;

/// A cheap handle.
#[derive(Clone)]
pub(super) struct Admission {
    /// For what this node is asked: what has no room is refused.
    asked: Arc<Semaphore>,
    /// For what other nodes hand on to this one: their streams wait, so that it is they who refuse.
    handed_on: Arc<Semaphore>,
    bytes: u32,
}

/// Room for an entry, until this and all copies of it are dropped.
#[derive(Clone)]
pub(crate) struct Admitted {
    _room: Arc<OwnedSemaphorePermit>,
}

impl Admission {
    /// So many bytes for the one, and as many for the other.
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = u32::try_from(bytes.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX).max(1);
        let room = || Arc::new(Semaphore::new(bytes as usize));
        Admission { asked: room(), handed_on: room(), bytes }
    }

    /// One that is larger than all of the room gets all of it.
    fn needed(&self, entry: &Entry) -> u32 {
        u32::try_from(entry.len() + ENTRY_BYTES).unwrap_or(u32::MAX).min(self.bytes)
    }

    fn admit(&self, entry: &Entry) -> Result<Admitted, Unavailable> {
        let room = self.asked.clone().try_acquire_many_owned(self.needed(entry));
        let room = room.map_err(|_| Unavailable::Busy { limit: self.bytes })?;
        Ok(Admitted { _room: Arc::new(room) })
    }

    async fn admit_handed_on(&self, entry: &Entry) -> Option<Admitted> {
        let room = self.handed_on.clone().acquire_many_owned(self.needed(entry)).await;
        // It is never closed.
        Some(Admitted { _room: Arc::new(room.ok()?) })
    }
}

impl Node {
    /// Room for what this node is asked.
    pub(super) fn admit(&self, entry: &Entry) -> Result<Admitted, Unavailable> {
        self.admission.admit(entry)
    }

    /// Room for what another node hands on to this one, as soon as there is.
    pub(crate) async fn admit_handed_on(&self, entry: &Entry) -> Option<Admitted> {
        self.admission.admit_handed_on(entry).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use carillon_proto::v1;
    use tokio::time::timeout;

    use super::*;

    fn entry(bytes: usize) -> Entry {
        let put = v1::op::Put { value: vec![0; bytes].into(), ..Default::default() };
        let then = vec![v1::Op { op: Some(v1::op::Op::Put(put)) }];
        Entry(v1::KeeperEntry { txn: Some(v1::TxnRequest { then, ..Default::default() }) })
    }

    #[test]
    fn what_has_no_room_is_refused_until_there_is() {
        let admission = Admission::new(10_000);
        let first = admission.admit(&entry(4_000)).unwrap();
        let copy = first.clone();
        let _second = admission.admit(&entry(4_000)).unwrap();
        let refused = admission.admit(&entry(4_000)).err().unwrap();
        assert!(matches!(refused, Unavailable::Busy { limit: 10_000 }));
        assert!(refused.to_string().ends_with("try again"), "{refused}");
        drop(first);
        assert!(admission.admit(&entry(4_000)).is_err(), "a copy of it is still there");
        drop(copy);
        assert!(admission.admit(&entry(4_000)).is_ok());
        // Entries without a byte take room, too.
        let empty: Vec<_> = (0..100).map_while(|_| admission.admit(&entry(0)).ok()).collect();
        assert!(empty.len() < 12, "{}", empty.len());
    }

    #[test]
    fn one_that_is_larger_than_the_room_is_let_in_alone() {
        let admission = Admission::new(10_000);
        let large = admission.admit(&entry(50_000)).unwrap();
        assert!(admission.admit(&entry(1)).is_err());
        drop(large);
        assert!(admission.admit(&entry(1)).is_ok());
    }

    #[tokio::test]
    async fn what_others_hand_on_waits_for_room_of_its_own() {
        let admission = Admission::new(10_000);
        let _asked = admission.admit(&entry(9_000)).unwrap();
        let first = admission.admit_handed_on(&entry(9_000)).await.unwrap();
        let second = entry(9_000);
        let second = admission.admit_handed_on(&second);
        tokio::pin!(second);
        let early = timeout(Duration::from_millis(50), &mut second).await;
        assert!(early.is_err(), "there was no room for it");
        drop(first);
        assert!(timeout(Duration::from_secs(30), second).await.unwrap().is_some());
    }
}
