//! The state machine, entry by entry.

use super::*;
use v1::op::{GrantLease, Op as Operation, Put, RevokeLeases};

fn put(key: &str, value: &str, lease: u64) -> v1::Op {
    let put = Put { key: key.to_owned(), value: Bytes::copy_from_slice(value.as_bytes()), lease };
    v1::Op { op: Some(Operation::Put(put)) }
}

fn delete(key: &str) -> v1::Op {
    v1::Op { op: Some(Operation::Delete(key.to_owned())) }
}

fn delete_prefix(prefix: &str) -> v1::Op {
    v1::Op { op: Some(Operation::DeletePrefix(prefix.to_owned())) }
}

fn grant(lease: u64) -> v1::Op {
    v1::Op { op: Some(Operation::GrantLease(GrantLease { lease, ttl_ms: 1000 })) }
}

fn revoke(leases: &[u64]) -> v1::Op {
    v1::Op { op: Some(Operation::RevokeLeases(RevokeLeases { leases: leases.to_vec(), expired: true })) }
}

fn compare(key: &str, target: Target) -> v1::Compare {
    v1::Compare { key: key.to_owned(), target: Some(target) }
}

fn apply(
    state: &mut State,
    compare: Vec<v1::Compare>,
    then: Vec<v1::Op>,
    otherwise: Vec<v1::Op>,
) -> v1::KeeperApplied {
    state.apply(&v1::KeeperEntry { txn: Some(v1::TxnRequest { compare, then, otherwise }) })
}

fn do_it(state: &mut State, ops: Vec<v1::Op>) -> v1::TxnResponse {
    let applied = apply(state, Vec::new(), ops, Vec::new());
    assert_eq!(applied.missing_lease, 0);
    applied.txn.unwrap()
}

fn value(state: &State, key: &str) -> Option<String> {
    state.get(key).map(|item| String::from_utf8(item.value.to_vec()).unwrap())
}

fn holds(state: &mut State, key: &str, target: Target) -> bool {
    let before = state.clone();
    let succeeded = apply(state, vec![compare(key, target)], Vec::new(), Vec::new()).txn.unwrap().succeeded;
    assert_eq!(*state, before, "a transaction that does nothing changes nothing");
    succeeded
}

#[test]
fn revisions_and_versions() {
    let mut state = State::default();
    assert_eq!(do_it(&mut state, vec![put("a", "1", 0), put("b", "1", 0)]).revision, 1);
    assert_eq!(do_it(&mut state, vec![put("a", "2", 0)]).revision, 2);
    let a = state.get("a").unwrap();
    assert_eq!((a.create_revision, a.mod_revision, a.version), (1, 2, 2));
    let b = state.get("b").unwrap();
    assert_eq!((b.create_revision, b.mod_revision, b.version), (1, 1, 1));
    assert_eq!(do_it(&mut state, vec![delete("nothing")]).revision, 2, "nothing happened");
    let gone = do_it(&mut state, vec![delete("a")]);
    assert_eq!((gone.revision, gone.deleted), (3, 1));
    do_it(&mut state, vec![put("a", "3", 0)]);
    let a = state.get("a").unwrap();
    assert_eq!((a.create_revision, a.mod_revision, a.version), (4, 4, 1), "a new life");
    assert_eq!(state.bytes(), 4);
}

#[test]
fn ranges_are_ordered_and_can_be_continued() {
    let mut state = State::default();
    do_it(&mut state, ["a/2", "b/1", "a/1", "a/3", "a"].map(|key| put(key, "", 0)).to_vec());
    let keys = |after| state.prefix_after("a/", after).map(|(key, _)| key.to_owned()).collect::<Vec<_>>();
    assert_eq!(keys(None), ["a/1", "a/2", "a/3"]);
    assert_eq!(keys(Some("a/1")), ["a/2", "a/3"]);
    assert_eq!(keys(Some("a/3")), Vec::<String>::new());
    assert_eq!(keys(Some("")), ["a/1", "a/2", "a/3"]);
    assert_eq!(state.prefix("").count(), 5);
}

#[test]
fn compares() {
    let mut state = State::default();
    do_it(&mut state, vec![grant(9), put("a", "1", 0), put("dir/x", "1", 0)]);
    do_it(&mut state, vec![put("a", "2", 0)]);
    let table = [
        ("a", Target::ModRevision(2), true),
        ("a", Target::ModRevision(1), false),
        ("a", Target::ModRevision(0), false),
        ("none", Target::ModRevision(0), true),
        ("a", Target::Version(2), true),
        ("none", Target::Version(0), true),
        ("a", Target::Value(Bytes::from_static(b"2")), true),
        ("a", Target::Value(Bytes::from_static(b"1")), false),
        ("none", Target::Value(Bytes::new()), false),
        ("", Target::Lease(9), true),
        ("", Target::Lease(8), false),
        ("dir/", Target::PrefixUnchangedSince(1), true),
        ("dir/", Target::PrefixUnchangedSince(0), false),
        ("a", Target::PrefixUnchangedSince(1), false),
    ];
    for (key, target, expected) in table {
        assert_eq!(holds(&mut state, key, target.clone()), expected, "{key} {target:?}");
    }
    do_it(&mut state, vec![delete("dir/x")]);
    assert!(!holds(&mut state, "dir/", Target::PrefixUnchangedSince(2)), "a deletion is a change");
    assert!(holds(&mut state, "dir/", Target::PrefixUnchangedSince(3)));
}

#[test]
fn otherwise_is_carried_out_when_a_compare_fails() {
    let mut state = State::default();
    let absent = || vec![compare("lock", Target::ModRevision(0))];
    let first = apply(&mut state, absent(), vec![put("lock", "me", 0)], vec![put("lost", "me", 0)]);
    assert!(first.txn.unwrap().succeeded);
    let second = apply(&mut state, absent(), vec![put("lock", "you", 0)], vec![put("lost", "you", 0)]);
    assert!(!second.txn.unwrap().succeeded);
    assert_eq!(
        (value(&state, "lock").as_deref(), value(&state, "lost").as_deref()),
        (Some("me"), Some("you"))
    );
}

#[test]
fn leases_take_their_keys_with_them_in_one_revision() {
    let mut state = State::default();
    do_it(
        &mut state,
        vec![grant(1), grant(2), put("a", "", 1), put("b", "", 1), put("c", "", 2), put("d", "", 2)],
    );
    // A key that is written again without the lease, or with another one, leaves the first.
    do_it(&mut state, vec![put("b", "", 0), put("d", "", 1)]);
    let expired = do_it(&mut state, vec![revoke(&[1, 2, 77])]);
    assert_eq!((expired.deleted, expired.revision), (3, 3));
    assert_eq!(state.prefix("").map(|(key, _)| key).collect::<Vec<_>>(), ["b"]);
    assert_eq!(state.lease_count(), 0);
    let Changes::Up { events, .. } = state.changes(&[String::new()], 2, usize::MAX) else { panic!() };
    assert!(events.iter().all(|event| event.deleted && revision_of(event) == 3));
    assert_eq!(events.len(), 3);
}

#[test]
fn a_put_with_a_lease_that_is_gone_changes_nothing() {
    let mut state = State::default();
    do_it(&mut state, vec![grant(1), put("a", "1", 1)]);
    let before = state.clone();
    let applied = apply(&mut state, Vec::new(), vec![put("a", "2", 0), put("b", "", 5)], Vec::new());
    assert_eq!(applied.missing_lease, 5);
    assert_eq!(state, before);
    let applied = apply(&mut state, Vec::new(), vec![revoke(&[1]), put("b", "", 1)], Vec::new());
    assert_eq!(applied.missing_lease, 1, "ended earlier in the same transaction");
    assert_eq!(state, before);
}

#[test]
fn a_registration_passes_from_one_lease_to_the_next_without_vanishing() {
    let mut state = State::default();
    do_it(&mut state, vec![grant(1), put("me", "1", 1), put("of me", "", 1)]);
    do_it(&mut state, vec![grant(2), put("me", "2", 2), revoke(&[1])]);
    assert_eq!(value(&state, "me").as_deref(), Some("2"));
    assert_eq!(value(&state, "of me"), None);
    let Changes::Up { events, .. } = state.changes(&["me".to_owned()], 1, usize::MAX) else { panic!() };
    assert_eq!(events.iter().map(|event| event.deleted).collect::<Vec<_>>(), [false]);
}

#[test]
fn watchers_see_what_concerns_them_and_never_half_a_revision() {
    let mut state = State::default();
    do_it(&mut state, vec![put("a/1", "", 0), put("a/2", "", 0), put("b/1", "", 0)]);
    do_it(&mut state, vec![put("b/2", "", 0)]);
    do_it(&mut state, vec![delete_prefix("a/")]);
    let prefixes = ["a/".to_owned()];
    let Changes::Up { revision, events } = state.changes(&prefixes, 0, 1) else { panic!() };
    assert_eq!((revision, events.len()), (1, 2), "the limit is reached in the middle of the revision");
    let Changes::Up { revision, events } = state.changes(&prefixes, 1, usize::MAX) else { panic!() };
    assert_eq!((revision, events.len()), (3, 2));
    assert_eq!(state.changes(&prefixes, 3, 9), Changes::Up { revision: 3, events: Vec::new() });
    assert_eq!(state.changes(&prefixes, 4, 9), Changes::Ahead(3));
}

#[test]
fn old_changes_are_forgotten_and_watchers_are_told() {
    let mut state = State::default();
    for i in 0..MAX_EVENTS + 10 {
        do_it(&mut state, vec![put("k", &i.to_string(), 0)]);
    }
    assert_eq!(state.compacted(), 10);
    assert_eq!(state.changes(&[String::new()], 9, 9), Changes::Compacted(10));
    assert!(matches!(state.changes(&[String::new()], 10, 9), Changes::Up { revision: 11, .. }));
    assert!(
        !holds(&mut state, "other/", Target::PrefixUnchangedSince(9)),
        "what is not known is not promised"
    );
    let big = "x".repeat(MAX_EVENT_BYTES / 4);
    for _ in 0..8 {
        do_it(&mut state, vec![put("big", &big, 0)]);
    }
    assert!(state.event_bytes <= MAX_EVENT_BYTES);
    assert!(state.events.len() <= 4);
}

#[test]
fn a_snapshot_holds_everything() {
    let mut state = State::default();
    do_it(&mut state, vec![grant(1), put("a", "1", 1), put("b", "2", 0)]);
    do_it(&mut state, vec![delete("b"), grant(2)]);
    let (restored, meta) = State::decode(&state.encode(b"meta".to_vec())).unwrap();
    assert_eq!(restored, state);
    assert_eq!(meta, b"meta");
    // And it goes on as the original does.
    let (mut a, mut b) = (state, restored);
    for state in [&mut a, &mut b] {
        do_it(state, vec![revoke(&[1]), put("c", "", 2)]);
    }
    assert_eq!(a, b);
}

#[test]
fn broken_snapshots_are_errors() {
    assert!(State::decode(b"\xff\xff\xff").is_err());
    let item = v1::KeyValue { key: "a".to_owned(), lease: 3, ..Default::default() };
    let snapshot = v1::KeeperSnapshot { items: vec![item], ..Default::default() };
    let error = State::decode(&prost::Message::encode_to_vec(&snapshot)).unwrap_err();
    assert_eq!(error.to_string(), "key \"a\" is attached to lease 3, which is not in it");
}
