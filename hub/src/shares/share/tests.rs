use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const LIMITS: Limits = Limits { messages: 100, bytes: 1 << 20 };
const A: MemberId = (1, 1);
const B: MemberId = (1, 2);
const C: MemberId = (2, 1);

fn share(members: &[(MemberId, usize)]) -> Share {
    let mut share = Share::new(LIMITS, 1000);
    for &(id, window) in members {
        share.join(id, window);
    }
    share
}

fn stored(seq: u64) -> v1::Message {
    v1::Message { topic: "demo/x".into(), seq, prev: seq - 1, stored: true, ..v1::Message::default() }
}

fn unstored(seq: u64) -> v1::Message {
    v1::Message { topic: "demo/y".into(), seq, ..v1::Message::default() }
}

fn assign(share: &mut Share) -> Vec<(MemberId, u64, u64)> {
    let mut out = Vec::new();
    share.assign(1, &mut out);
    out.into_iter().map(|one| (one.to, one.token, one.message.seq)).collect()
}

/// Who got which seq.
fn given(share: &mut Share) -> Vec<(MemberId, u64)> {
    assign(share).into_iter().map(|(to, _, seq)| (to, seq)).collect()
}

fn acked(share: &mut Share) -> Option<u64> {
    share.acks().first().map(|position| position.seq)
}

#[test]
fn members_are_served_in_turn_each_message_once() {
    let mut share = share(&[(A, 10), (B, 10), (C, 10)]);
    (1..=6).for_each(|seq| share.offer(stored(seq)));
    assert_eq!(given(&mut share), [(A, 1), (B, 2), (C, 3), (A, 4), (B, 5), (C, 6)]);
    assert!(given(&mut share).is_empty());
}

#[test]
fn a_full_window_is_passed_over_and_when_all_are_full_messages_wait() {
    let mut share = share(&[(A, 1), (B, 2)]);
    (1..=5).for_each(|seq| share.offer(stored(seq)));
    let assigned = assign(&mut share);
    assert_eq!(assigned.iter().map(|one| (one.0, one.2)).collect::<Vec<_>>(), [(A, 1), (B, 2), (B, 3)]);
    assert_eq!(share.waiting(), 2);
    share.done(A, assigned[0].1);
    assert_eq!(given(&mut share), [(A, 4)]);
}

#[test]
fn who_is_busy_gets_nothing_until_it_is_ready() {
    let mut share = share(&[(A, 10), (B, 10)]);
    share.offer(stored(1));
    let (to, token, _) = assign(&mut share)[0];
    assert_eq!(to, A);
    share.busy(A, token);
    (2..=3).for_each(|seq| share.offer(stored(seq)));
    assert_eq!(given(&mut share), [(B, 1), (B, 2), (B, 3)]);
    share.ready(A);
    (4..=5).for_each(|seq| share.offer(stored(seq)));
    assert_eq!(given(&mut share), [(B, 4), (A, 5)]);
}

#[test]
fn what_a_member_leaves_behind_goes_to_others_before_later_messages() {
    let mut share = share(&[(A, 10), (B, 10)]);
    (1..=4).for_each(|seq| share.offer(stored(seq)));
    let assigned = assign(&mut share);
    share.done(A, assigned[0].1);
    share.offer(stored(5));
    assert!(share.leave(A) && !share.leave(A));
    let mut out = Vec::new();
    share.assign(1, &mut out);
    let out: Vec<_> = out.into_iter().map(|one| (one.to, one.message.seq, one.again)).collect();
    assert_eq!(out, [(B, 3, true), (B, 5, false)]);
    // What it says afterwards is of no account.
    share.done(A, assigned[2].1);
    assert_eq!(acked(&mut share), Some(1));
}

#[test]
fn a_cursor_moves_as_far_as_all_is_settled() {
    let mut share = share(&[(A, 10), (B, 10)]);
    (1..=3).for_each(|seq| share.offer(stored(seq)));
    let assigned = assign(&mut share);
    share.done(B, assigned[1].1);
    assert_eq!(acked(&mut share), None);
    share.done(A, assigned[0].1);
    assert_eq!(acked(&mut share), Some(2));
    assert_eq!(acked(&mut share), None);
    share.done(A, assigned[2].1);
    let positions = share.acks();
    assert_eq!(positions[0].seq, 3);
    share.unacked(&positions);
    assert_eq!(acked(&mut share), Some(3), "an ack that failed is made again");
}

#[test]
fn what_was_missed_is_read_from_the_log_and_in_order() {
    let mut share = share(&[(A, 10)]);
    share.position("demo/x", 2, 2);
    share.offer(stored(5));
    assert!(given(&mut share).is_empty(), "3 and 4 come first");
    let wanted = share.reads();
    assert_eq!(wanted, [Wanted { topic: "demo/x".into(), after: 2, limit: 100 }]);
    assert!(share.reads().is_empty(), "one read at a time");
    // It grows while it is read.
    share.offer(stored(6));
    let reply = v1::ReadReply {
        messages: (3..=5).map(stored).collect(),
        head: Some(v1::Head { seq: 5, ..v1::Head::default() }),
        next: 5,
    };
    share.read(&wanted[0].topic, Some(reply));
    assert_eq!(given(&mut share), [(A, 3), (A, 4), (A, 5)]);
    let wanted = share.reads();
    assert_eq!(wanted[0].after, 5);
    share.read(&wanted[0].topic, None);
    let again = share.reads();
    assert_eq!(again, wanted, "a read that failed is made again");
    let reply = v1::ReadReply {
        messages: vec![stored(6)],
        head: Some(v1::Head { seq: 6, ..v1::Head::default() }),
        next: 6,
    };
    share.read(&again[0].topic, Some(reply));
    share.offer(stored(6));
    share.offer(stored(7));
    assert_eq!(given(&mut share), [(A, 6), (A, 7)]);
    assert!(share.reads().is_empty());
}

#[test]
fn a_log_that_was_trimmed_meanwhile_is_not_waited_for() {
    let mut share = share(&[(A, 10)]);
    share.position("demo/x", 2, 9);
    let wanted = share.reads();
    let empty = |seq| v1::ReadReply {
        messages: Vec::new(),
        head: Some(v1::Head { seq, ..v1::Head::default() }),
        next: seq,
    };
    // Stored after the log was asked: must not be taken for trimmed.
    share.offer(stored(10));
    share.read(&wanted[0].topic, Some(empty(9)));
    assert_eq!(acked(&mut share), Some(9));
    let wanted = share.reads();
    assert_eq!(wanted[0].after, 9);
    let reply = v1::ReadReply { messages: vec![stored(10)], ..empty(10) };
    share.read(&wanted[0].topic, Some(reply));
    assert_eq!(given(&mut share), [(A, 10)]);
}

#[test]
fn memory_is_bounded_and_only_what_is_in_no_log_is_dropped() {
    let mut share = share(&[(A, 1)]);
    (1..=300).for_each(|seq| share.offer(stored(seq)));
    assert_eq!(share.waiting(), LIMITS.messages);
    (1..=5).for_each(|seq| share.offer(unstored(seq)));
    assert_eq!((share.waiting(), share.dropped), (LIMITS.messages, 5));
    assert!(share.reads().is_empty(), "no room for what would be read");
    let (id, token, _) = assign(&mut share)[0];
    share.done(id, token);
    assert_eq!(share.reads(), [Wanted { topic: "demo/x".into(), after: 100, limit: 1 }]);
}

#[test]
fn what_has_expired_is_settled_without_a_member() {
    let mut share = share(&[(A, 1)]);
    share.offer(stored(1));
    share.offer(v1::Message { expires_ms: 5, ..stored(2) });
    let (id, token, _) = assign(&mut share)[0];
    let mut out = Vec::new();
    share.assign(5, &mut out);
    assert!(out.is_empty() && share.waiting() == 0);
    share.done(id, token);
    assert_eq!(acked(&mut share), Some(2));
}

#[test]
fn what_was_settled_out_of_turn_is_not_given_again_by_a_later_home() {
    let mut before = share(&[(A, 10), (B, 10)]);
    (1..=4).for_each(|seq| before.offer(stored(seq)));
    let assigned = assign(&mut before);
    before.done(B, assigned[1].1);
    before.done(B, assigned[3].1);
    let beyond = before.settled_beyond();
    assert_eq!(beyond, [v1::SettledBeyond { topic: "demo/x".into(), seqs: vec![2, 4] }]);

    let mut after = share(&[(C, 10)]);
    after.skip(beyond);
    after.position("demo/x", 0, 4);
    let wanted = after.reads();
    let head = Some(v1::Head { seq: 4, ..v1::Head::default() });
    after.read(
        &wanted[0].topic,
        Some(v1::ReadReply { messages: (1..=4).map(stored).collect(), head, next: 4 }),
    );
    let assigned = assign(&mut after);
    assert_eq!(assigned.iter().map(|one| one.2).collect::<Vec<_>>(), [1, 3]);
    assigned.iter().for_each(|one| after.done(C, one.1));
    assert_eq!(acked(&mut after), Some(4));
    assert!(after.settled_beyond().is_empty() && after.settled.is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    Publish(bool),
    Join(u64),
    Leave(u64),
    Done(u64),
    Busy(u64),
    Ready(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<bool>().prop_map(Step::Publish),
        1 => (0..4_u64).prop_map(Step::Join),
        1 => (0..4_u64).prop_map(Step::Leave),
        4 => (0..4_u64).prop_map(Step::Done),
        1 => (0..4_u64).prop_map(Step::Busy),
        1 => (0..4_u64).prop_map(Step::Ready),
    ]
}

proptest! {
    /// Whatever members do, each message is with one of them at a time, all are settled in the end, and the cursor never
    /// passes one that is not.
    #[test]
    fn nothing_is_lost_and_nothing_is_with_two(steps in prop::collection::vec(step(), 0..200)) {
        let limits = Limits { messages: 8, bytes: 1 << 20 };
        let mut share = Share::new(limits, 1);
        let mut log: Vec<v1::Message> = Vec::new();
        let mut with: HashMap<u64, Vec<(u64, u64, bool)>> = HashMap::new();
        let mut settled = BTreeSet::new();
        let mut cursor = 0;
        let ends = [Step::Join(9)].into_iter().chain((0..4).map(Step::Leave));
        let ends = ends.chain((0..500).flat_map(|_| [Step::Ready(9), Step::Done(9)]));
        for step in steps.into_iter().chain(ends) {
            match step {
                Step::Publish(is_missed) => {
                    let message = stored(log.len() as u64 + 1);
                    log.push(message.clone());
                    if is_missed { share.position("demo/x", 0, message.seq) } else { share.offer(message) }
                }
                Step::Join(member) if !with.contains_key(&member) => {
                    with.insert(member, Vec::new());
                    share.join((0, member), 2);
                }
                Step::Leave(member) => {
                    with.remove(&member);
                    share.leave((0, member));
                }
                Step::Done(member) => {
                    if let Some((token, seq, _)) = with.get_mut(&member).and_then(Vec::pop) {
                        settled.insert(seq);
                        share.done((0, member), token);
                    }
                }
                Step::Busy(member) => {
                    if let Some((token, _, _)) = with.get_mut(&member).and_then(Vec::pop) {
                        share.busy((0, member), token);
                    }
                }
                Step::Ready(member) => share.ready((0, member)),
                Step::Join(_) => {}
            }
            for wanted in share.reads() {
                let from = wanted.after as usize;
                let messages: Vec<_> = log[from..].iter().take(wanted.limit as usize).cloned().collect();
                let next = messages.last().map_or(wanted.after, |message| message.seq);
                let head = Some(v1::Head { seq: log.len() as u64, ..v1::Head::default() });
                share.read(&wanted.topic, Some(v1::ReadReply { messages, head, next }));
            }
            let mut out = Vec::new();
            share.assign(1, &mut out);
            for one in out {
                prop_assert!(with.values().flatten().all(|(_, seq, _)| *seq != one.message.seq), "with two");
                prop_assert!(!settled.contains(&one.message.seq), "given again after it was settled");
                let held = with.get_mut(&one.to.1).expect("a member");
                held.push((one.token, one.message.seq, one.again));
                prop_assert!(held.len() <= 2, "beyond the window");
            }
            for position in share.acks() {
                prop_assert!((cursor + 1..=position.seq).all(|seq| settled.contains(&seq)), "the cursor passes one");
                cursor = position.seq;
            }
        }
        prop_assert_eq!(settled.len(), log.len());
        prop_assert_eq!(cursor as usize, log.len());
        prop_assert_eq!((share.waiting(), share.held, share.held_bytes), (0, 0, 0));
    }
}
