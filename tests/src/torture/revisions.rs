//! Is a history strictly serializable over all keys, by the revisions that the keeper itself answered? Quick, and sharper
//! than looking at one key at a time, but it believes the keeper's numbers: [`super::checker`] does not.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use super::history::{Action, Operation, Value};

/// Checks all that has returned; the first thing that is wrong.
pub fn check(operations: &[Operation]) -> Result<(), String> {
    in_time(operations)?;
    let writes = writes(operations)?;
    operations.iter().filter(|operation| operation.returned()).try_for_each(|read| by_reads(read, &writes))
}

fn changes(operation: &Operation) -> Option<Value> {
    match operation.action {
        Action::Write(value) => Some(value),
        Action::Swap(_, to, true) => Some(Some(to)),
        _ => None,
    }
}

/// What ended before another began has no later revision than it; a write an earlier one.
fn in_time(operations: &[Operation]) -> Result<(), String> {
    let returned = || operations.iter().filter(|operation| operation.returned());
    let mut calls: Vec<&Operation> = returned().collect();
    calls.sort_by_key(|operation| operation.call);
    let mut ends = calls.clone();
    ends.sort_by_key(|operation| operation.end);
    let mut ends = ends.into_iter().peekable();
    let mut latest: Option<&Operation> = None;
    for operation in calls {
        while let Some(ended) = ends.next_if(|ended| ended.end < operation.call) {
            if latest.is_none_or(|latest| ended.revision > latest.revision) {
                latest = Some(ended);
            }
        }
        let Some(latest) = latest else { continue };
        // A delete of what is not there changes nothing.
        let new = matches!(operation.action, Action::Write(Some(_)) | Action::Swap(_, _, true));
        if operation.revision < latest.revision || (new && operation.revision == latest.revision) {
            return Err(format!("time runs backwards: after\n  {latest}\ncame\n  {operation}"));
        }
    }
    Ok(())
}

type Writes<'a> = HashMap<&'a str, BTreeMap<u64, &'a Operation>>;

/// By key and revision; a revision is one write's.
fn writes(operations: &[Operation]) -> Result<Writes<'_>, String> {
    let mut all: BTreeMap<u64, &Operation> = BTreeMap::new();
    let mut writes = Writes::new();
    for operation in operations.iter().filter(|operation| operation.returned()) {
        if !matches!(changes(operation), Some(Some(_))) {
            continue;
        }
        if let Some(other) = all.insert(operation.revision, operation) {
            return Err(format!("two writes have one revision:\n  {other}\n  {operation}"));
        }
        writes.entry(&operation.key).or_default().insert(operation.revision, operation);
    }
    Ok(writes)
}

/// A read saw the last write up to its revision, or one whose answer was lost.
fn by_reads(read: &Operation, writes: &Writes) -> Result<(), String> {
    let Action::Read(value) = read.action else { return Ok(()) };
    let Some(writes) = writes.get(read.key.as_str()) else { return Ok(()) };
    if let Some(write) = writes.get(&read.written)
        && changes(write) != Some(value)
    {
        return Err(format!("a read saw another value than was written:\n  {write}\n  {read}"));
    }
    if read.written > read.revision {
        return Err(format!("a read saw what is not written yet:\n  {read}"));
    }
    // A key that is not there may have been deleted at any time.
    let later = (Bound::Excluded(read.written), Bound::Included(read.revision));
    if value.is_some()
        && let Some((_, missed)) = writes.range(later).next()
    {
        return Err(format!("a read missed a write:\n  {missed}\n  {read}"));
    }
    Ok(())
}
