//! What is the caller's to get right: names, ids, sizes, properties. Each failure names its field.

use bytes::Bytes;
use carillon_proto::{now_ms, topic, v1};

use super::Caller;
use crate::problem::{Kind, Problem};

/// Longest id that a caller may give, bytes.
const MAX_ID_BYTES: usize = 128;
/// Most user properties of a message.
const MAX_USER_PROPERTIES: usize = 64;
/// All properties of a message together, bytes.
const MAX_PROPERTIES_BYTES: usize = 16 * 1024;
/// Longest client id that can be asked for, bytes (MQTT 5.0 §1.5.4).
const MAX_DEVICE_BYTES: usize = 65_535;

/// The message, once all that is the caller's to get right has been checked.
#[allow(clippy::too_many_arguments)] // each is a field of the message
pub fn message(
    caller: &Caller,
    topic: String,
    payload: Bytes,
    qos: Option<u64>,
    ttl_seconds: u32,
    id: Option<String>,
    retain: bool,
    properties: v1::Properties,
) -> Result<v1::Message, Problem> {
    topic::check_name(&topic).map_err(|error| Problem::field("topic", error))?;
    let qos = match qos.unwrap_or(1) {
        qos @ 0..=2 => qos as u32,
        _ => return Err(Problem::field("qos", "must be 0, 1 or 2")),
    };
    if let Some(id) = &id {
        check_id(id)?;
    }
    check_properties(&properties)?;
    let max = caller.app.limits.max_payload_bytes;
    if payload.len() > max as usize {
        return Err(Problem {
            field: Some("payload".to_owned()),
            ..Problem::new(
                Kind::PayloadTooLarge,
                format!(
                    "`payload` has {} bytes; app `{}` allows {max} (limits.max_payload_bytes)",
                    payload.len(),
                    caller.name
                ),
            )
        });
    }
    let now = now_ms();
    Ok(v1::Message {
        topic,
        payload,
        qos,
        retain,
        id: id.unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
        published_ms: now,
        expires_ms: if ttl_seconds == 0 { 0 } else { now + u64::from(ttl_seconds) * 1000 },
        properties: Some(properties),
        ..v1::Message::default()
    })
}

/// The full name of a topic that was named in full or without the app's level.
pub fn full_topic(app: &str, name: &str) -> Result<String, Problem> {
    let below = name.strip_prefix(app).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name);
    let invalid = |error| Problem::field("topic", error);
    topic::check_name(below).map_err(invalid)?;
    let full = format!("{app}/{below}");
    topic::check_name(&full).map_err(invalid)?;
    Ok(full)
}

pub fn check_id(id: &str) -> Result<(), Problem> {
    let ok = (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    if ok {
        Ok(())
    } else {
        Err(Problem::field("id", format!("must be 1 to {MAX_ID_BYTES} visible ASCII characters")))
    }
}

pub fn check_device(device: &str) -> Result<(), Problem> {
    if device.is_empty() {
        return Err(Problem::field("device", "is empty"));
    }
    if device.len() > MAX_DEVICE_BYTES {
        return Err(Problem::field("device", format!("is longer than {MAX_DEVICE_BYTES} bytes")));
    }
    Ok(())
}

pub fn check_properties(properties: &v1::Properties) -> Result<(), Problem> {
    if properties.user.len() > MAX_USER_PROPERTIES {
        return Err(Problem::field("properties", format!("has more than {MAX_USER_PROPERTIES} entries")));
    }
    // MQTT 5.0 §1.5.4: no NUL in a string.
    if properties.content_type.contains('\0') {
        return Err(Problem::field("content_type", "contains a NUL"));
    }
    if !properties.response_topic.is_empty() {
        topic::check_name(&properties.response_topic)
            .map_err(|error| Problem::field("response_topic", error))?;
    }
    let mut bytes =
        properties.content_type.len() + properties.response_topic.len() + properties.correlation_data.len();
    for pair in &properties.user {
        if pair.key.contains('\0') || pair.value.contains('\0') {
            return Err(Problem::field("properties", "contains a NUL"));
        }
        bytes += pair.key.len() + pair.value.len();
    }
    if bytes > MAX_PROPERTIES_BYTES {
        return Err(Problem::field(
            "properties",
            format!("are longer than {MAX_PROPERTIES_BYTES} bytes together"),
        ));
    }
    Ok(())
}

pub fn parse_position(text: &str) -> Result<(u64, u64), Problem> {
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok()).flatten();
    text.split_once(':').and_then(|(epoch, seq)| Some((digits(epoch)?, digits(seq)?))).ok_or_else(|| {
        Problem::field("after", "must be {epoch}:{seq}, two numbers, as `next` of the answer before")
    })
}
