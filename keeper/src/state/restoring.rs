//! A state that goes on after its cluster was lost: what was given out since it was saved is not known, and must not be given
//! out again.

use carillon_proto::v1::op::Put;

use super::State;

impl State {
    /// The largest number that was given out as a revision or a fencing token.
    pub(crate) fn newest(&self) -> u64 {
        self.leases.values().map(|lease| lease.granted).fold(self.revision, u64::max)
    }

    /// Goes on above `floor`, which is larger than all that was ever given out: tokens of leases, in their order, and
    /// revisions. `changed` is written at the first new revision, and what begins with one of `forgotten` is deleted. No watch is resumed from before: what it has seen
    /// since may not have happened here.
    pub(crate) fn raise(&mut self, floor: u64, changed: &[Put], forgotten: &[&str]) {
        let mut leases: Vec<_> = self.leases.values_mut().collect();
        leases.sort_by_key(|lease| lease.granted);
        let mut revision = floor;
        for lease in leases {
            revision += 1;
            lease.granted = revision;
        }
        revision += 1;
        for put in changed {
            self.put(revision, put);
        }
        for prefix in forgotten {
            let keys: Vec<String> = self.prefix(prefix).map(|(key, _)| key.to_owned()).collect();
            for key in keys {
                self.delete(revision, &key);
            }
        }
        self.revision = revision;
        self.events.clear();
        self.event_bytes = 0;
        self.compacted = revision;
    }
}
