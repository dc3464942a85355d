//! Shared subscriptions: how a share is named (MQTT 5.0 §4.8.2).

/// What the filter of a shared subscription begins with.
pub const PREFIX: &str = "$share/";

/// The share's name and the filter below it; None if it is not a shared subscription at all, or not a whole one.
/// `$share/{name}/{filter}`: the name is one level without wildcards.
pub fn parse(text: &str) -> Option<(&str, &str)> {
    let (name, filter) = text.strip_prefix(PREFIX)?.split_once('/')?;
    (!name.is_empty() && !filter.is_empty() && !crate::topic::is_wildcard(name)).then_some((name, filter))
}

/// The name of a share in the whole cluster: `filter` begins with the app. Members of shares that differ in one or the
/// other have nothing to do with each other.
pub fn key(name: &str, filter: &str) -> String {
    format!("{PREFIX}{name}/{filter}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_has_a_name_and_a_filter() {
        assert_eq!(parse("$share/g/demo/#"), Some(("g", "demo/#")));
        assert_eq!(parse("$share/g//x"), Some(("g", "/x")));
        for wrong in [
            "g/demo/#",
            "$share",
            "$share/",
            "$share/g",
            "$share/g/",
            "$share//x",
            "$share/g+/x",
            "$share/#/x",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        assert_eq!(parse(&key("g", "demo/x")), Some(("g", "demo/x")));
    }
}
