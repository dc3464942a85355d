//! A change by fields: `max_packet_bytes=65536`, and what is typed as text where a text is wanted.

use carillon_agent::document::Violation;
use carillon_agent::layers;
use carillon_proto::v1;
use serde_yaml::Value;
use tonic::Status;

use super::path::{self, FieldPath};
use super::{MAX_COMMENT_BYTES, Refusal};
use crate::discovery::truncate;

/// Most fields in one change.
const MAX_SETS: usize = 256;

/// What a change by fields says of itself. The values are left out: one may be a secret.
pub(super) fn set_text(sets: &[v1::ConfigSet]) -> String {
    let mut text = format!("set {}", sets.iter().map(|set| set.path.as_str()).collect::<Vec<_>>().join(", "));
    truncate(&mut text, MAX_COMMENT_BYTES);
    text
}

/// A text with some fields changed. `whole`: the document with its defaults, where the lists are that a path may lead
/// into; `check`: what is wrong with a text.
pub(super) fn set(
    present: &str,
    whole: Option<serde_json::Value>,
    check: impl Fn(&str) -> Result<(), Vec<Violation>>,
    sets: &[v1::ConfigSet],
) -> Result<String, Refusal> {
    if sets.is_empty() || sets.len() > MAX_SETS {
        return Err(Status::invalid_argument(format!("a change has from 1 to {MAX_SETS} fields")).into());
    }
    let whole = whole.and_then(|whole| serde_yaml::to_value(whole).ok()).unwrap_or(Value::Null);
    let mut paths = Vec::new();
    for set in sets {
        paths.push((FieldPath::parse(&set.path)?, set.value.as_deref()));
    }
    // Again with plain text where a text is wanted: `name=123` and `filter=#` mean what they say.
    let mut as_text = Vec::new();
    for _ in 0..=paths.len() {
        let mut document = layers::mapping(present)?;
        for (i, (path, text)) in paths.iter().enumerate() {
            let value = text.map(|text| {
                if as_text.contains(&i) { Value::String(text.to_owned()) } else { path::value(text) }
            });
            path.apply(&mut document, &whole, value)?;
        }
        let yaml = match document.as_mapping() {
            Some(map) if map.is_empty() => String::new(),
            _ => serde_yaml::to_string(&document).map_err(|error| Violation::new("", error.to_string()))?,
        };
        let Err(violations) = check(&yaml) else { return Ok(yaml) };
        let before = as_text.len();
        for (i, (path, text)) in paths.iter().enumerate() {
            let path = path.to_string();
            let wants_text =
                violations.iter().any(|v| v.path == path && v.message.contains("expected a string"));
            if wants_text && text.is_some() && !as_text.contains(&i) {
                as_text.push(i);
            }
        }
        if as_text.len() == before {
            return Err(Refusal::Violations(violations));
        }
    }
    Err(Violation::new("", "the values do not fit the fields").into())
}
