//! Topic names, topic filters and slots: what is valid (MQTT 5.0 §4.7), what matches what, and who owns what.

/// Number of slots that topics are spread over. Fixed for the life of a cluster.
pub const SLOTS: u32 = 1024;
/// Longest topic name or filter, bytes of UTF-8. A default; gateways may be configured lower.
pub const MAX_TOPIC_BYTES: usize = 1024;
/// Most levels in a topic name or filter.
pub const MAX_TOPIC_LEVELS: usize = 32;
/// Longest app name, bytes.
pub const MAX_APP_BYTES: usize = 64;
/// Longest user name, bytes.
pub const MAX_USER_BYTES: usize = 256;

/// Why a topic name, filter, app or user is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTopic {
    #[error("is empty")]
    Empty,
    #[error("is longer than {0} bytes")]
    TooLong(usize),
    #[error("has more than {MAX_TOPIC_LEVELS} levels")]
    TooDeep,
    #[error("contains a NUL or another control character")]
    Control,
    #[error("contains a wildcard (+ or #), which only a filter may")]
    Wildcard,
    #[error("has a + that is not a whole level")]
    PlusNotAlone,
    #[error("has a # that is not the last level on its own")]
    HashNotLast,
    #[error("may hold only letters, digits, '-', '_' and '.', and must begin with a letter or digit")]
    BadName,
    #[error("may not contain '/', '+' or '#'")]
    BadUser,
    #[error("may not begin with '$', which is kept for Carillon's own")]
    Reserved,
}

/// Checks a topic name (MQTT 5.0 §4.7.3).
pub fn check_name(topic: &str) -> Result<(), InvalidTopic> {
    check_shape(topic)?;
    if topic.bytes().any(|b| b == b'+' || b == b'#') { Err(InvalidTopic::Wildcard) } else { Ok(()) }
}

/// Checks a topic filter (MQTT 5.0 §4.7.1, §4.7.3), without a `$share/…/` prefix.
pub fn check_filter(filter: &str) -> Result<(), InvalidTopic> {
    check_shape(filter)?;
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        if level.contains('#') && (level.len() > 1 || levels.peek().is_some()) {
            return Err(InvalidTopic::HashNotLast);
        }
        if level.contains('+') && level.len() > 1 {
            return Err(InvalidTopic::PlusNotAlone);
        }
    }
    Ok(())
}

fn check_shape(text: &str) -> Result<(), InvalidTopic> {
    if text.is_empty() {
        return Err(InvalidTopic::Empty);
    }
    if text.len() > MAX_TOPIC_BYTES {
        return Err(InvalidTopic::TooLong(MAX_TOPIC_BYTES));
    }
    if text.bytes().filter(|&b| b == b'/').count() >= MAX_TOPIC_LEVELS {
        return Err(InvalidTopic::TooDeep);
    }
    if text.chars().any(char::is_control) { Err(InvalidTopic::Control) } else { Ok(()) }
}

/// Checks an app's name: the first level of all its topics.
pub fn check_app(app: &str) -> Result<(), InvalidTopic> {
    if app.is_empty() {
        return Err(InvalidTopic::Empty);
    }
    if app.len() > MAX_APP_BYTES {
        return Err(InvalidTopic::TooLong(MAX_APP_BYTES));
    }
    let ok = app.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if ok && app.as_bytes()[0].is_ascii_alphanumeric() { Ok(()) } else { Err(InvalidTopic::BadName) }
}

/// Checks the name of a user or a group: one topic level.
pub fn check_user(user: &str) -> Result<(), InvalidTopic> {
    if user.is_empty() {
        return Err(InvalidTopic::Empty);
    }
    if user.len() > MAX_USER_BYTES {
        return Err(InvalidTopic::TooLong(MAX_USER_BYTES));
    }
    if user.chars().any(char::is_control) {
        return Err(InvalidTopic::Control);
    }
    if user.starts_with('$') {
        return Err(InvalidTopic::Reserved);
    }
    if user.contains(['/', '+', '#']) { Err(InvalidTopic::BadUser) } else { Ok(()) }
}

/// Does this filter hold a wildcard?
pub fn is_wildcard(filter: &str) -> bool {
    filter.bytes().any(|b| b == b'+' || b == b'#')
}

/// Does `filter` match `topic`? Both valid. A wildcard does not match a first level that begins with `$` (MQTT 5.0
/// §4.7.2); nor a second level, because each app is a tree of its own: what is `$x` to its devices is `{app}/$x` here.
pub fn matches(filter: &str, topic: &str) -> bool {
    let mut names = topic.split('/');
    for (depth, level) in filter.split('/').enumerate() {
        let name = names.next();
        if matches!(level, "+" | "#") && depth < 2 && name.is_some_and(|name| name.starts_with('$')) {
            return false;
        }
        match name {
            _ if level == "#" => return true,
            Some(name) if level == "+" || level == name => {}
            _ => return false,
        }
    }
    names.next().is_none()
}

/// The app that a topic belongs to: its first level.
pub fn app_of(topic: &str) -> &str {
    topic.split('/').next().unwrap_or_default()
}

/// The slot of a topic: XXH3-64 of the name, modulo [`SLOTS`].
pub fn slot_of(topic: &str) -> u32 {
    (xxhash_rust::xxh3::xxh3_64(topic.as_bytes()) % u64::from(SLOTS)) as u32
}

/// A user's own topic.
pub fn inbox(app: &str, user: &str) -> String {
    // Not `format!`: this is done several times for each connect.
    [app, "/u/", user].concat()
}

/// The user whose inbox this topic is.
pub fn inbox_user(topic: &str) -> Option<&str> {
    let mut levels = topic.splitn(4, '/');
    let (_, u, user, rest) = (levels.next()?, levels.next()?, levels.next()?, levels.next());
    (u == "u" && rest.is_none()).then_some(user)
}

/// A group's topic.
pub fn group(app: &str, group: &str) -> String {
    format!("{app}/g/{group}")
}

/// The topic of everyone in an app.
pub fn everyone(app: &str) -> String {
    format!("{app}/all")
}

/// Is this topic on its way from devices to the app's backend, `{app}/up/{kind}`?
pub fn is_upstream(topic: &str) -> bool {
    topic.split('/').nth(1) == Some("up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_the_standard_says() {
        for (filter, topic, expected) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/ranking", true),
            ("sport/#", "sport", true),
            ("#", "a/b", true),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "$SYS/x", false),
            ("+/monitor/Clients", "$SYS/monitor/Clients", false),
            ("$SYS/#", "$SYS/", true),
            ("demo/#", "demo/$SYS/x", false),
            ("demo/+", "demo/$x", false),
            ("+/$x", "demo/$x", true),
            ("demo/u/#", "demo/u/$x", true),
            ("#", "demo/$x", true),
            ("demo/#", "demo", true),
            ("a/b", "a/b/c", false),
            ("a/b/c", "a/b", false),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} ~ {topic}");
        }
    }

    #[test]
    fn bad_names_and_filters_say_what_is_wrong() {
        assert_eq!(check_name(""), Err(InvalidTopic::Empty));
        assert_eq!(check_name("a/+"), Err(InvalidTopic::Wildcard));
        assert_eq!(check_name("a\0"), Err(InvalidTopic::Control));
        assert_eq!(check_name(&"a".repeat(1025)), Err(InvalidTopic::TooLong(1024)));
        assert_eq!(check_name(&"/".repeat(32)), Err(InvalidTopic::TooDeep));
        assert_eq!(check_filter("a/#/b"), Err(InvalidTopic::HashNotLast));
        assert_eq!(check_filter("a#"), Err(InvalidTopic::HashNotLast));
        assert_eq!(check_filter("a+/b"), Err(InvalidTopic::PlusNotAlone));
        assert_eq!(check_filter("+/a/#"), Ok(()));
        assert_eq!(check_app("de/mo"), Err(InvalidTopic::BadName));
        assert_eq!(check_app("demo"), Ok(()));
        assert_eq!(check_user("a/b"), Err(InvalidTopic::BadUser));
        assert_eq!(check_user("$coordinator"), Err(InvalidTopic::Reserved));
    }

    #[test]
    fn an_inbox_is_exactly_three_levels() {
        assert_eq!(inbox_user("demo/u/alice"), Some("alice"));
        assert_eq!(inbox_user("demo/u/alice/x"), None);
        assert_eq!(inbox_user("demo/g/alice"), None);
        assert_eq!(inbox_user("demo/u"), None);
    }

    #[test]
    fn slots_are_stable() {
        // A change of these breaks every running cluster.
        assert_eq!(slot_of("demo/u/alice"), slot_of("demo/u/alice"));
        assert!(slot_of("demo/all") < SLOTS);
    }
}
