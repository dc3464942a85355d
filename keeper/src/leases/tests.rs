//! Deadlines, with the clock in the test's hand.

use super::*;

fn state(leases: &[(u64, u64)]) -> State {
    let mut state = State::default();
    for &(lease, ttl_ms) in leases {
        let op = v1::Op { op: Some(v1::op::Op::GrantLease(v1::op::GrantLease { lease, ttl_ms })) };
        let txn = v1::TxnRequest { then: vec![op], ..Default::default() };
        state.apply(&v1::KeeperEntry { txn: Some(txn) });
    }
    state
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_new_leader_gives_everyone_the_whole_time_and_a_grace() {
    let (leases, now) = (Leases::default(), Instant::now());
    assert!(!leases.renew(1, 1000, now), "nobody leads yet");
    leases.begin(&state(&[(1, 1000), (2, 1000)]), 500 * MS, now);
    assert_eq!(leases.take_expired(now + 1499 * MS), Vec::<u64>::new());
    assert!(leases.renew(2, 1000, now + 1400 * MS));
    assert_eq!(leases.take_expired(now + 1500 * MS), vec![1]);
    assert!(!leases.renew(1, 1000, now + 1500 * MS), "what is about to end cannot be kept alive");
    assert_eq!(leases.take_expired(now + 2400 * MS), vec![2]);
}

#[test]
fn all_that_ends_together_is_taken_together() {
    let (leases, now) = (Leases::default(), Instant::now());
    let many: Vec<(u64, u64)> = (1..=1000).map(|lease| (lease, 500)).collect();
    leases.begin(&state(&many), Duration::ZERO, now);
    assert_eq!(leases.take_expired(now + 500 * MS).len(), 1000);
    assert_eq!(leases.next(), None);
}

#[test]
fn leases_that_the_state_has_are_never_without_a_deadline() {
    let (leases, now) = (Leases::default(), Instant::now());
    leases.begin(&state(&[(1, 1000)]), Duration::ZERO, now);
    leases.reconcile(&state(&[(2, 700)]), now);
    assert_eq!(leases.take_expired(now + 5000 * MS), vec![2], "1 is gone, 2 was found");
}

#[test]
fn a_standstill_is_not_held_against_anyone() {
    let (leases, now) = (Leases::default(), Instant::now());
    leases.begin(&state(&[(1, 1000)]), Duration::ZERO, now);
    leases.extend_all(3000 * MS);
    assert_eq!(leases.take_expired(now + 3999 * MS), Vec::<u64>::new());
    assert_eq!(leases.take_expired(now + 4000 * MS), vec![1]);
}
