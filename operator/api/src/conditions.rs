//! Conditions: what is so of a resource and since when, set by type, in one order, and changed only when something has.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Sums the others up.
pub const READY: &str = "Ready";
/// It does what it is for, at present.
pub const AVAILABLE: &str = "Available";
/// It is on its way from one state to another.
pub const PROGRESSING: &str = "Progressing";
/// Something is wrong with it, which may not be seen from outside yet.
pub const DEGRADED: &str = "Degraded";
/// The keeper has taken the configuration.
pub const CONFIG_ACCEPTED: &str = "ConfigAccepted";

/// In which order they are listed; all others follow, by name.
const ORDER: [&str; 4] = [READY, AVAILABLE, PROGRESSING, DEGRADED];

/// Longest message that the API server is given, bytes.
const MAX_MESSAGE_BYTES: usize = 4096;

/// What a condition says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::True => "True",
            Status::False => "False",
            Status::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(holds: bool) -> Self {
        if holds { Status::True } else { Status::False }
    }
}

/// Sets the condition of a type, as of a generation. `reason`: one word in CamelCase. The time is that at which the status was
/// another one last; a message that changes leaves it as it is.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Status,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) {
    let before = conditions.iter().find(|condition| condition.type_ == type_);
    let since = match before {
        Some(before) if before.status == status.as_str() => before.last_transition_time.clone(),
        _ => Time(now),
    };
    let condition = Condition {
        last_transition_time: since,
        message: shortened(message),
        observed_generation: generation,
        reason: reason.to_owned(),
        status: status.as_str().to_owned(),
        type_: type_.to_owned(),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == type_) {
        Some(before) => *before = condition,
        None => conditions.push(condition),
    }
    conditions.sort_by(|a, b| place(&a.type_).cmp(&place(&b.type_)));
}

/// Takes the condition of a type away.
pub fn remove(conditions: &mut Vec<Condition>, type_: &str) {
    conditions.retain(|condition| condition.type_ != type_);
}

/// The condition of a type.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// It is there and says True.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    get(conditions, type_).is_some_and(|condition| condition.status == Status::True.as_str())
}

fn place(type_: &str) -> (usize, &str) {
    (ORDER.iter().position(|known| *known == type_).unwrap_or(ORDER.len()), type_)
}

fn shortened(message: &str) -> String {
    if message.len() <= MAX_MESSAGE_BYTES {
        return message.to_owned();
    }
    let end = message.floor_char_boundary(MAX_MESSAGE_BYTES - '…'.len_utf8());
    format!("{}…", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_time_changes_with_the_status_and_with_nothing_else() {
        let mut list = Vec::new();
        set(&mut list, READY, Status::False, "Starting", "no gateway yet", Some(1), at(1));
        set(&mut list, READY, Status::False, "Waiting", "one gateway of two", Some(2), at(2));
        assert_eq!(list[0].last_transition_time, Time(at(1)));
        assert_eq!((list[0].reason.as_str(), list[0].observed_generation), ("Waiting", Some(2)));
        set(&mut list, READY, Status::True, "AllReady", "", Some(2), at(3));
        assert_eq!(list[0].last_transition_time, Time(at(3)));
        let before = list.clone();
        set(&mut list, READY, Status::True, "AllReady", "", Some(2), at(4));
        assert_eq!(list, before, "nothing to write");
        assert!(is_true(&list, READY) && !is_true(&list, DEGRADED));
        assert_eq!(list.len(), 1);
    }

    #[test]
    fn the_order_is_always_the_same() {
        let types = ["KeysFound", DEGRADED, READY, CONFIG_ACCEPTED, PROGRESSING, AVAILABLE];
        for first in 0..types.len() {
            let mut list = Vec::new();
            for type_ in types.iter().cycle().skip(first).take(types.len()) {
                set(&mut list, type_, true.into(), "Test", "", None, at(0));
            }
            let order: Vec<&str> = list.iter().map(|condition| condition.type_.as_str()).collect();
            assert_eq!(order, [READY, AVAILABLE, PROGRESSING, DEGRADED, CONFIG_ACCEPTED, "KeysFound"]);
        }
    }

    #[test]
    fn a_message_is_never_too_long() {
        let mut list = Vec::new();
        set(&mut list, READY, Status::False, "Test", &"ä".repeat(40_000), None, at(0));
        assert!(list[0].message.len() <= MAX_MESSAGE_BYTES && list[0].message.ends_with("ä…"));
    }
}
