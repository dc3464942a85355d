//! Is a history linearizable? The search of Wing and Gong with Lowe's memory, as Porcupine does it: a register with
//! compare-and-set for each key, since a history is linearizable when that of each key is. It is held against
//! stateright's checker in `tests/checker.rs`.

use std::collections::{BTreeMap, HashSet};

use super::history::{Action, NEVER, Operation, Value};

/// Most places of the search that are remembered for a key: some hundred megabytes.
const MOST_PLACES: usize = 3_000_000;

/// Why a history does not pass.
#[derive(Debug)]
pub enum Fault {
    /// No order explains it; the operations around the first one that fits nowhere.
    NotLinearizable { key: String, around: Vec<Operation> },
    /// The search became too large.
    TooLarge { key: String, operations: usize },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::NotLinearizable { key, around } => {
                writeln!(f, "{key}: no order of its operations explains what they returned; around:")?;
                around.iter().try_for_each(|operation| writeln!(f, "  {operation}"))
            }
            Fault::TooLarge { key, operations } => {
                write!(f, "{key}: its {operations} operations are too many to decide")
            }
        }
    }
}

/// Checks every key.
pub fn check(operations: &[Operation]) -> Result<(), Fault> {
    let mut keys: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in operations {
        keys.entry(&operation.key).or_default().push(operation);
    }
    keys.into_iter().try_for_each(|(key, operations)| check_key(key, operations))
}

/// What the register holds afterwards; None: it cannot have been now.
fn step(value: Value, operation: &Operation) -> Option<Value> {
    match operation.action {
        Action::Read(read) => (read == value).then_some(value),
        Action::Write(written) => Some(written),
        Action::Swap(from, to, _) if !operation.returned() => {
            Some(if value == Some(from) { Some(to) } else { value })
        }
        Action::Swap(from, to, true) => (value == Some(from)).then_some(Some(to)),
        Action::Swap(from, _, false) => (value != Some(from)).then_some(value),
    }
}

/// A call or a return in order of time, in a list from which both are taken out while they are placed.
#[derive(Clone, Copy)]
struct Event {
    operation: usize,
    /// Of a call: its return.
    end: Option<usize>,
    previous: usize,
    next: usize,
}

struct Events {
    /// The first is none: what is next to it is the first.
    list: Vec<Event>,
}

const HEAD: usize = 0;
const TAIL: usize = usize::MAX;

impl Events {
    fn new(operations: &[&Operation]) -> Events {
        // At the same time calls come before returns: then they overlap, which allows more.
        let mut order: Vec<(u64, bool, usize)> = Vec::new();
        for (i, operation) in operations.iter().enumerate() {
            order.push((operation.call, false, i));
            order.push((operation.end, true, i));
        }
        order.sort_unstable();
        let mut list = vec![Event { operation: usize::MAX, end: None, previous: TAIL, next: 1 }];
        let mut calls = vec![0; operations.len()];
        for (_, is_end, operation) in order {
            let at = list.len();
            list.push(Event { operation, end: None, previous: at - 1, next: at + 1 });
            if is_end {
                list[calls[operation]].end = Some(at);
            } else {
                calls[operation] = at;
            }
        }
        if let Some(last) = list.last_mut() {
            last.next = TAIL;
        }
        Events { list }
    }

    fn unlink(&mut self, at: usize) {
        let Event { previous, next, .. } = self.list[at];
        self.list[previous].next = next;
        if next != TAIL {
            self.list[next].previous = previous;
        }
    }

    fn relink(&mut self, at: usize) {
        let Event { previous, next, .. } = self.list[at];
        self.list[previous].next = at;
        if next != TAIL {
            self.list[next].previous = at;
        }
    }
}

fn check_key(key: &str, operations: Vec<&Operation>) -> Result<(), Fault> {
    // Each call that never returned doubles the search. One that wrote what nobody has seen may as well not have happened:
    // if that explains the rest, it is explained. (If not, it may be what a swap failed on.)
    let seen: HashSet<u64> = operations.iter().filter_map(|operation| sees(operation)).collect();
    let may_matter = |operation: &&&Operation| match operation.action {
        _ if operation.returned() => true,
        Action::Write(Some(value)) | Action::Swap(_, value, _) => seen.contains(&value),
        Action::Write(None) | Action::Read(_) => true,
    };
    let fewer: Vec<&Operation> = operations.iter().filter(may_matter).copied().collect();
    if fewer.len() < operations.len() && search(key, fewer).is_ok() {
        return Ok(());
    }
    search(key, operations)
}

/// The value that it found, if it found any.
fn sees(operation: &Operation) -> Option<u64> {
    match operation.action {
        Action::Read(value) => value,
        Action::Swap(from, _, true) => Some(from),
        _ => None,
    }
}

fn search(key: &str, operations: Vec<&Operation>) -> Result<(), Fault> {
    // Deletes that never returned are all alike: of two the one that was called first comes first, if any does.
    let mut open_deletes: Vec<usize> = (0..operations.len())
        .filter(|&i| !operations[i].returned() && operations[i].action == Action::Write(None))
        .collect();
    open_deletes.sort_by_key(|&i| operations[i].call);
    let mut events = Events::new(&operations);
    let mut value: Value = None;
    let mut placed = vec![0u64; operations.len().div_ceil(64)];
    let mut seen: HashSet<(Vec<u64>, Value)> = HashSet::new();
    let mut stack: Vec<(usize, Value)> = Vec::new();
    // Of the furthest that the search has come: the return that it could not pass.
    let (mut furthest, mut blocked) = (0, None);
    let mut at = events.list[HEAD].next;
    while at != TAIL {
        let event = events.list[at];
        let (word, bit) = (event.operation / 64, 1u64 << (event.operation % 64));
        if let Some(end) = event.end {
            let is_open_delete = open_deletes.contains(&event.operation);
            let first_open = open_deletes.iter().find(|&&i| placed[i / 64] & 1 << (i % 64) == 0);
            if is_open_delete && first_open != Some(&event.operation) {
                at = event.next;
                continue;
            }
            let Some(next) = step(value, operations[event.operation]) else {
                at = event.next;
                continue;
            };
            placed[word] |= bit;
            if !seen.insert((placed.clone(), next)) {
                placed[word] &= !bit;
                at = event.next;
                continue;
            }
            if seen.len() > MOST_PLACES {
                return Err(Fault::TooLarge { key: key.to_owned(), operations: operations.len() });
            }
            stack.push((at, value));
            value = next;
            events.unlink(at);
            events.unlink(end);
            at = events.list[HEAD].next;
            continue;
        }
        // A return whose call could not be placed before it: something that was placed must come later.
        if stack.len() >= furthest {
            (furthest, blocked) = (stack.len(), Some(event.operation));
        }
        let Some((back, before)) = stack.pop() else {
            let blocked = blocked.map_or(NEVER, |operation| operations[operation].end);
            let mut around: Vec<Operation> = operations.into_iter().cloned().collect();
            around.sort_by_key(|operation| operation.call);
            let middle = around.partition_point(|operation| operation.call <= blocked);
            let around = around[middle.saturating_sub(20)..around.len().min(middle + 3)].to_vec();
            return Err(Fault::NotLinearizable { key: key.to_owned(), around });
        };
        let undone = events.list[back];
        placed[undone.operation / 64] &= !(1u64 << (undone.operation % 64));
        value = before;
        if let Some(end) = undone.end {
            events.relink(end);
        }
        events.relink(back);
        at = undone.next;
    }
    Ok(())
}
