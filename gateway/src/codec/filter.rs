//! How topic names and topic filters are written (§4.7, §4.8.2).

/// Whether the topic name has a wildcard, which a name must not [MQTT-3.3.2-2].
pub(super) fn has_wildcard(name: &str) -> bool {
    name.bytes().any(|byte| matches!(byte, b'+' | b'#'))
}

/// What is wrong with a topic filter, shared subscriptions included.
pub(super) fn check(filter: &str) -> Result<(), &'static str> {
    let plain = match filter.strip_prefix("$share/") {
        None if filter == "$share" => return Err("a shared subscription has no share name"),
        None => filter,
        Some(shared) => {
            // §4.8.2 [MQTT-4.8.2-1], [MQTT-4.8.2-2]
            let (name, plain) = shared.split_once('/').ok_or("a shared subscription has no topic filter")?;
            if name.is_empty() {
                return Err("a shared subscription has no share name");
            }
            if has_wildcard(name) {
                return Err("a share name has a wildcard");
            }
            plain
        }
    };
    if plain.is_empty() {
        return Err("is empty"); // [MQTT-4.7.3-1]
    }
    if !has_wildcard(plain) {
        return Ok(());
    }
    let mut levels = plain.split('/').peekable();
    while let Some(level) = levels.next() {
        match level {
            "+" => {}
            "#" if levels.peek().is_none() => {}
            "#" => return Err("'#' is not the last level"), // [MQTT-4.7.1-1]
            _ if has_wildcard(level) => return Err("a wildcard is not alone in its level"), // [MQTT-4.7.1-1, -2]
            _ => {}
        }
    }
    Ok(())
}
