//! What an app's document says about a message: is it kept, and for how long.

use carillon_agent::app::{App, TopicRule};
use carillon_proto::{topic, v1};

/// Longest payload that is accepted at all, bytes; apps have lower limits of their own.
pub const MAX_PAYLOAD_BYTES: usize = 16 * 1024 * 1024;

/// The verdict on one message.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Append it to the topic's log.
    pub store: bool,
    pub retention: v1::Retention,
}

/// What is done with a message; `store` is what its publisher asks for.
pub fn policy(app: &App, message: &v1::Message, store: Option<bool>) -> Policy {
    let below = message.topic.split_once('/').map_or("", |(_, below)| below);
    let rule = app.rule(below);
    // A webhook is promised each upstream message at least once, so these are kept until it has taken them.
    let for_webhook = app.webhook.is_some() && topic::is_upstream(&message.topic);
    let by_rule = message.qos >= 1 && (rule.is_some_and(|rule| rule.store) || for_webhook);
    let fallback;
    let rule = match rule {
        Some(rule) => rule,
        None => {
            fallback = TopicRule::keep("#");
            &fallback
        }
    };
    Policy {
        store: store.unwrap_or(by_rule),
        retention: v1::Retention {
            max_age_seconds: rule.max_age_seconds,
            max_count: rule.max_count,
            max_bytes: rule.max_bytes,
            consumed: topic::inbox_user(&message.topic).is_some(),
        },
    }
}

/// Why a message is never acceptable.
pub fn check(message: &v1::Message) -> Result<(), String> {
    topic::check_name(&message.topic).map_err(|error| format!("topic {error}"))?;
    if message.qos > 2 {
        return Err(format!("qos is {}, not 0, 1 or 2", message.qos));
    }
    if message.payload.len() > MAX_PAYLOAD_BYTES {
        return Err(format!("payload has {} bytes, more than {MAX_PAYLOAD_BYTES}", message.payload.len()));
    }
    Ok(())
}
