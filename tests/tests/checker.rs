//! The checkers of histories are checked: against stateright's, and against histories with bugs planted in them.

use carillon_tests::torture::history::{Action, NEVER, Operation, Value};
use carillon_tests::torture::{checker, revisions};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};

fn operation(client: usize, action: Action, call: u64, end: u64) -> Operation {
    Operation { client, key: "k".to_owned(), action, call, end, revision: 0, written: 0 }
}

/// The register as stateright wants it.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
struct Register(Value);

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Call {
    Read,
    Write(Value),
    Swap(u64, u64),
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Answer {
    Read(Value),
    Written,
    Swapped(bool),
}

impl SequentialSpec for Register {
    type Op = Call;
    type Ret = Answer;

    fn invoke(&mut self, call: &Call) -> Answer {
        match call {
            Call::Read => Answer::Read(self.0),
            Call::Write(value) => {
                self.0 = *value;
                Answer::Written
            }
            Call::Swap(from, to) => {
                let fits = self.0 == Some(*from);
                if fits {
                    self.0 = Some(*to);
                }
                Answer::Swapped(fits)
            }
        }
    }
}

fn stateright_accepts(operations: &[Operation]) -> bool {
    let mut events: Vec<(u64, bool, &Operation)> = Vec::new();
    for operation in operations {
        events.push((operation.call, false, operation));
        if operation.end != NEVER {
            events.push((operation.end, true, operation));
        }
    }
    events.sort_by_key(|(at, is_end, _)| (*at, *is_end));
    let mut tester = LinearizabilityTester::new(Register::default());
    for (_, is_end, operation) in events {
        if is_end {
            let answer = match operation.action {
                Action::Read(value) => Answer::Read(value),
                Action::Write(_) => Answer::Written,
                Action::Swap(_, _, swapped) => Answer::Swapped(swapped),
            };
            tester.on_return(operation.client, answer).unwrap();
        } else {
            let call = match operation.action {
                Action::Read(_) => Call::Read,
                Action::Write(value) => Call::Write(value),
                Action::Swap(from, to, _) => Call::Swap(from, to),
            };
            tester.on_invoke(operation.client, call).unwrap();
        }
    }
    tester.is_consistent()
}

/// A register that is carried out at one moment of each call, and now and then answers wrongly.
fn random_history(random: &mut StdRng, wrong: bool) -> Vec<Operation> {
    let mut register = Register::default();
    let mut operations = Vec::new();
    // Clients whose call goes on: when each is carried out and returns is drawn as time goes by.
    let mut open: Vec<(usize, Action, u64, bool)> = Vec::new();
    let mut now = 0;
    for (client, value) in (1..=9).enumerate() {
        now += 10;
        let action = match random.random_range(0..4) {
            0 => Action::Write(Some(value)),
            1 => Action::Swap(random.random_range(1..=value), value + 100, false),
            2 if random.random_range(0..4) == 0 => Action::Write(None),
            _ => Action::Read(None),
        };
        open.push((client, action, now, false));
        while open.len() > random.random_range(0..4) {
            now += 10;
            let at = random.random_range(0..open.len());
            if open[at].3 {
                let (client, action, call, _) = open.remove(at);
                let lost = random.random_range(0..6) == 0 && !matches!(action, Action::Read(_));
                operations.push(operation(client, action, call, if lost { NEVER } else { now }));
            } else {
                open[at].3 = true;
                let action = &mut open[at].1;
                match action {
                    Action::Read(read) => *read = register.0,
                    Action::Write(value) => register.0 = *value,
                    Action::Swap(from, to, swapped) => {
                        *swapped = register.0 == Some(*from);
                        if *swapped {
                            register.0 = Some(*to);
                        }
                    }
                }
                if wrong && random.random_range(0..4) == 0 {
                    match action {
                        Action::Read(read) => *read = Some(random.random_range(1..10)),
                        Action::Swap(_, _, swapped) => *swapped = !*swapped,
                        Action::Write(_) => {}
                    }
                }
            }
        }
    }
    // The rest never returns, whether carried out or not.
    let lost = open.into_iter().filter(|(_, action, ..)| !matches!(action, Action::Read(_)));
    operations.extend(lost.map(|(client, action, call, _)| operation(client, action, call, NEVER)));
    operations
}

#[test]
fn the_checker_says_what_stateright_says() {
    let mut random = StdRng::seed_from_u64(7);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..3_000 {
        let history = random_history(&mut random, round % 2 == 0);
        let ours = checker::check(&history).is_ok();
        assert_eq!(ours, stateright_accepts(&history), "round {round}: {history:#?}");
        assert!(ours || round % 2 == 0, "round {round} is in order: {history:#?}");
        if ours { accepted += 1 } else { refused += 1 }
    }
    assert!(accepted > 1_500 && refused > 300, "{accepted} accepted, {refused} refused");
}

/// A store of several keys that answers with revisions, as a keeper does; with replicas of which one is behind.
struct Store {
    revision: u64,
    /// All values that the key had, with their revisions.
    values: Vec<(u64, u64)>,
}

/// Thousands of operations of eight clients, of which each sees what was there, except for those that `stale` picks: they
/// read from a follower that lacks the last write, without asking the leader how far it should be.
fn long_history(seed: u64, mut stale: impl FnMut(usize) -> bool) -> Vec<Operation> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut store = Store { revision: 1, values: Vec::new() };
    let mut operations = Vec::new();
    for i in 0..4_000 {
        // One moment each; the calls of different clients overlap.
        let moment = 1_000 + i as u64 * 100;
        let (call, end) = (moment - random.random_range(1..250), moment + random.random_range(1..250));
        let mut operation = operation(i % 8, Action::Read(None), call, end);
        operation.key = format!("k/{}", i / 200);
        if i % 200 == 0 {
            store.values.clear();
        }
        if random.random_range(0..3) == 0 {
            store.revision += 1;
            store.values.push((store.revision, i as u64));
            operation.action = Action::Write(Some(i as u64));
            operation.revision = store.revision;
        } else {
            let behind = usize::from(stale(i) && store.values.len() > 1);
            let seen = store.values.iter().rev().nth(behind);
            operation.action = Action::Read(seen.map(|(_, value)| *value));
            operation.written = seen.map_or(0, |(revision, _)| *revision);
            operation.revision = if behind == 0 { store.revision } else { operation.written };
        }
        operations.push(operation);
    }
    operations
}

#[test]
fn a_follower_that_reads_without_asking_is_caught() {
    let fine = long_history(1, |_| false);
    checker::check(&fine).unwrap();
    revisions::check(&fine).unwrap();
    let mut caught = [0, 0];
    for seed in 0..10 {
        let stale = long_history(seed, |i| i % 400 == 399);
        // Those that overlap with the write that they lack are in order.
        caught[0] += usize::from(checker::check(&stale).is_err());
        caught[1] += usize::from(revisions::check(&stale).is_err());
    }
    assert!(caught[0] >= 8 && caught[1] >= 8, "{caught:?} of 10");
}

#[test]
fn a_write_that_is_lost_or_done_twice_is_caught() {
    let write = |value, call, end| operation(0, Action::Write(Some(value)), call, end);
    let read = |value, call, end| operation(1, Action::Read(value), call, end);
    // Acknowledged, then gone.
    let lost = [write(1, 0, 10), write(2, 20, 30), read(Some(1), 40, 50)];
    let fault = checker::check(&lost).unwrap_err().to_string();
    assert!(fault.contains("no order of its operations explains"), "{fault}");
    // Without an answer it may come later, but only once.
    let late = [write(1, 0, NEVER), write(2, 20, 30), read(Some(2), 40, 50), read(Some(1), 60, 70)];
    checker::check(&late).unwrap();
    let twice = [&late[..], &[write(3, 80, 90), read(Some(1), 100, 110)]].concat();
    assert!(checker::check(&twice).is_err());
    // Two swaps from one value both succeeded.
    let swap = |to, call, end| operation(2, Action::Swap(1, to, true), call, end);
    let both = [write(1, 0, 10), swap(2, 20, 60), swap(3, 30, 50)];
    assert!(checker::check(&both).is_err());
}

#[test]
fn revisions_that_contradict_time_or_each_other_are_caught() {
    let with = |mut operation: Operation, revision, written| {
        (operation.revision, operation.written) = (revision, written);
        operation
    };
    let write =
        |value, call, end, revision| with(operation(0, Action::Write(Some(value)), call, end), revision, 0);
    let read = |value, call, end, revision, written| {
        with(operation(1, Action::Read(value), call, end), revision, written)
    };
    let fault = |history: &[Operation]| revisions::check(history).unwrap_err();
    assert!(fault(&[write(1, 0, 10, 5), write(2, 20, 30, 4)]).starts_with("time runs backwards"));
    assert!(fault(&[write(1, 0, 10, 5), write(2, 5, 30, 5)]).starts_with("two writes have one revision"));
    assert!(fault(&[write(1, 0, 10, 5), read(Some(2), 20, 30, 5, 5)]).starts_with("a read saw another"));
    let missed = [write(1, 0, 10, 5), write(2, 0, 30, 6), read(Some(1), 20, 40, 6, 5)];
    assert!(fault(&missed).starts_with("a read missed a write"));
}
