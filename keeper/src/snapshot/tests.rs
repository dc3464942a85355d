//! What is given out after a restore is larger than what was given out before it, whichever snapshot it was and however often.

use super::*;
use crate::raft::types::Entry;
use crate::state::{Changes, State};

const NOW_US: u64 = 1_800_000_000_000_000;

fn apply(state: &mut State, op: v1::op::Op) {
    let then = vec![v1::Op { op: Some(op) }];
    let entry = Entry(v1::KeeperEntry { txn: Some(v1::TxnRequest { then, ..Default::default() }) });
    state.apply(&entry.0);
}

/// Slots under epoch 7, and two leases.
fn lost() -> SnapshotFile {
    let mut state = State::default();
    for lease in [900, 5] {
        apply(&mut state, v1::op::Op::GrantLease(v1::op::GrantLease { lease, ttl_ms: 1000 }));
    }
    let value = Assignment::default().under(7).to_record().encode_to_vec().into();
    apply(&mut state, v1::op::Op::Put(Put { key: keys::SLOTS.to_owned(), value, lease: 0 }));
    for key in [keys::command("hub-1", "0"), keys::SAVER.to_owned()] {
        apply(&mut state, v1::op::Op::Put(Put { key, value: "v".into(), lease: 0 }));
    }
    apply(&mut state, v1::op::Op::Put(Put { key: "k".to_owned(), value: "v".into(), lease: 5 }));
    let body = state.encode(
        br#"{"applied":null,"membership":{"log_id":null,"membership":{"configs":[],"nodes":{}}}}"#.to_vec(),
    );
    SnapshotFile::of_body(&body).unwrap()
}

fn epoch(file: &SnapshotFile) -> u64 {
    let record = v1::SlotRecord::decode(file.state().get(keys::SLOTS).unwrap().value.clone()).unwrap();
    assert!(record.epochs.iter().all(|epoch| *epoch == record.epochs[0]));
    record.epochs[0]
}

#[test]
fn a_restored_cluster_gives_out_larger_numbers_than_the_lost_one() {
    let path = Path::new("saved");
    let mut file = lost();
    assert_eq!((file.state().revision(), epoch(&file)), (6, 7));
    raise(path, &mut file, NOW_US).unwrap();
    assert_eq!(epoch(&file), NOW_US);
    let state = file.state();
    assert!(
        NOW_US < state.lease_token(900) && state.lease_token(900) < state.lease_token(5),
        "in their order"
    );
    assert!(state.lease_token(5) < state.revision());
    assert_eq!(state.get(keys::SLOTS).unwrap().mod_revision, state.revision());
    assert_eq!(state.get("k").map(|item| (item.mod_revision, &item.value[..])), Some((6, &b"v"[..])));
    // A command would be carried out again; and another may be the saver by now.
    assert_eq!(state.prefix(keys::COMMANDS).count() + state.prefix(keys::SAVER).count(), 0);
    // Who knows the lost cluster takes all anew, also when that was further on than the snapshot.
    for known in [1, 4, 1_000_000] {
        assert_eq!(state.changes(&[String::new()], known, 1), Changes::Compacted(state.revision()));
    }
    let before = state.revision();
    let mut after = state.clone();
    apply(&mut after, v1::op::Op::GrantLease(v1::op::GrantLease { lease: 6, ttl_ms: 1000 }));
    assert!(after.lease_token(6) > before);
    assert!(before < 1 << 53, "exact in JSON");
}

#[test]
fn a_snapshot_that_is_restored_twice_gives_nothing_out_twice() {
    let path = Path::new("saved");
    let (mut first, mut second) = (lost(), lost());
    raise(path, &mut first, NOW_US).unwrap();
    raise(path, &mut second, NOW_US + 60_000_000).unwrap();
    assert!(epoch(&second) > epoch(&first) && second.state().newest() > first.state().newest() + 50_000_000);
    // A snapshot of a restored cluster.
    let again = raise(path, &mut second, NOW_US + 50_000_000).unwrap_err().to_string();
    assert!(again.starts_with("the clock of this machine is wrong"), "{again}");
    raise(path, &mut second, NOW_US + 70_000_000).unwrap();
    assert_eq!(epoch(&second), NOW_US + 70_000_000);
}

#[test]
fn a_clock_that_cannot_be_right_restores_nothing() {
    let refused = raise(Path::new("saved"), &mut lost(), 3_600_000_000).unwrap_err().to_string();
    assert!(refused.contains("it says 3600000000 microseconds since 1970"), "{refused}");
}
