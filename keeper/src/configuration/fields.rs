//! A document as its fields: what differs between two, and which of them are nobody's business.

use carillon_agent::document::{self, DocumentKind};
use carillon_agent::layers;
use carillon_agent::target::Target;
use carillon_proto::v1;
use serde_json::Value;

use super::path::{FieldPath, Step};

/// What stands for a secret.
pub(super) const SECRET: &str = "(secret)";
/// … and for one that is another than before.
const OTHER_SECRET: &str = "(another secret)";

/// All fields of a document that have no fields of their own, with their paths.
pub(super) fn leaves(value: &Value) -> Vec<(FieldPath, &Value)> {
    let mut found = Vec::new();
    descend(&FieldPath::root(), value, &mut found);
    found
}

fn descend<'a>(path: &FieldPath, value: &'a Value, found: &mut Vec<(FieldPath, &'a Value)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                descend(&path.then(Step::Field(name.clone())), value, found);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, value) in list.iter().enumerate() {
                descend(&path.then(Step::Index(index)), value, found);
            }
        }
        value => found.push((path.clone(), value)),
    }
}

/// The value at a path.
pub(super) fn at<'a>(value: &'a Value, path: &FieldPath) -> Option<&'a Value> {
    path.steps().iter().try_fold(value, |value, step| match step {
        Step::Field(name) => value.get(name),
        Step::Index(index) => value.get(index),
    })
}

/// Is a field, or something in it, a secret?
pub(super) fn is_secret(kind: &DocumentKind, path: &FieldPath) -> bool {
    let mut pattern = String::new();
    for step in path.steps() {
        match step {
            Step::Field(name) if pattern.is_empty() => pattern.push_str(name),
            Step::Field(name) => pattern.extend([".", name]),
            Step::Index(_) => pattern.push_str("[]"),
        }
    }
    document::is_secret(kind.secrets, &pattern)
}

/// A value as it may be shown.
pub(super) fn shown(kind: &DocumentKind, path: &FieldPath, value: &Value) -> Value {
    let empty = match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    if !empty && is_secret(kind, path) { Value::String(SECRET.to_owned()) } else { value.clone() }
}

/// The document with its defaults; None: there is none.
pub(super) fn whole(
    kind: &DocumentKind,
    name: Option<&str>,
    revision: Option<&v1::ConfigRevision>,
) -> Option<Value> {
    match revision.filter(|revision| !revision.deleted) {
        // A revision from before a rule was made need not be valid by today's; it can still be looked at.
        Some(revision) => (kind.check)(name, &revision.yaml).ok().or_else(|| raw(&revision.yaml)),
        None if kind.named => None,
        None => (kind.check)(name, "").ok(),
    }
}

/// What a text says, without defaults.
pub(super) fn raw(yaml: &str) -> Option<Value> {
    serde_json::to_value(layers::mapping(yaml).ok()?).ok()
}

/// All fields of a revision, and of its overrides.
fn all(
    kind: &DocumentKind,
    name: Option<&str>,
    revision: Option<&v1::ConfigRevision>,
) -> Vec<(String, FieldPath, Value)> {
    let mut found = Vec::new();
    if let Some(whole) = whole(kind, name, revision) {
        found.extend(leaves(&whole).into_iter().map(|(path, value)| (path.to_string(), path, value.clone())));
    }
    for one in revision.iter().flat_map(|revision| &revision.overrides) {
        let place = format!("overrides.{}", one.name);
        let target = one.target.as_ref().map(Target::from).unwrap_or_default().to_string();
        found.push((format!("{place} for"), FieldPath::root(), Value::String(target)));
        for (path, value) in leaves(&raw(&one.yaml).unwrap_or_default()) {
            if !path.steps().is_empty() {
                found.push((format!("{place}.{path}"), path, value.clone()));
            }
        }
    }
    found
}

/// What differs between two revisions.
pub(super) fn differences(
    kind: &DocumentKind,
    name: Option<&str>,
    before: Option<&v1::ConfigRevision>,
    after: Option<&v1::ConfigRevision>,
) -> Vec<v1::ConfigDifference> {
    let (before, after) = (all(kind, name, before), all(kind, name, after));
    let find = |list: &[(String, FieldPath, Value)], text: &str| {
        list.iter().find(|(known, ..)| known == text).map(|(.., value)| value.clone())
    };
    let gone = before.iter().filter(|(text, ..)| !after.iter().any(|(known, ..)| known == text));
    let mut found = Vec::new();
    for (text, path, _) in after.iter().chain(gone) {
        let (old, new) = (find(&before, text), find(&after, text));
        if old == new {
            continue;
        }
        let mut new_shown = new.map(|new| shown_at(kind, path, &new));
        let old_shown = old.map(|old| shown_at(kind, path, &old));
        if old_shown.is_some() && old_shown == new_shown {
            new_shown = Some(Value::String(OTHER_SECRET.to_owned()));
        }
        found.push(v1::ConfigDifference {
            path: text.clone(),
            before_json: old_shown.map(|value| value.to_string()),
            after_json: new_shown.map(|value| value.to_string()),
        });
    }
    found
}

/// The root stands for what is no field of the document.
fn shown_at(kind: &DocumentKind, path: &FieldPath, value: &Value) -> Value {
    if path.steps().is_empty() { value.clone() } else { shown(kind, path, value) }
}

/// All secrets that a revision holds, as texts.
pub(crate) fn secrets(kind: &DocumentKind, revision: &v1::ConfigRevision) -> Vec<String> {
    let texts = [&revision.yaml].into_iter().chain(revision.overrides.iter().map(|one| &one.yaml));
    let mut found = Vec::new();
    for value in texts.filter_map(|yaml| raw(yaml)) {
        let secret = leaves(&value).into_iter().filter(|(path, _)| is_secret(kind, path));
        found.extend(secret.filter_map(|(_, value)| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }));
    }
    found
}

/// A text about a document without the secrets in it.
pub(crate) fn hide_in(text: &str, secrets: &[String]) -> String {
    /// Shorter ones are hidden only where they are quoted: else they could be a part of any word.
    const SHORTEST: usize = 4;
    let mut forms: Vec<(String, String)> = Vec::new();
    for secret in secrets {
        forms.extend(
            ['"', '`', '\'']
                .map(|quote| (format!("{quote}{secret}{quote}"), format!("{quote}{SECRET}{quote}"))),
        );
        // As Rust shows it.
        forms.push((format!("{secret:?}"), format!("{SECRET:?}")));
        if secret.len() >= SHORTEST {
            forms.push((secret.clone(), SECRET.to_owned()));
        }
    }
    // The longest first: one may be a part of another.
    forms.sort_by_key(|(form, _)| std::cmp::Reverse(form.len()));
    forms.iter().fold(text.to_owned(), |text, (form, shown)| text.replace(form, shown))
}

/// A revision without its secrets.
pub(crate) fn redacted(kind: &DocumentKind, mut revision: v1::ConfigRevision) -> v1::ConfigRevision {
    if !kind.secrets.is_empty() {
        revision.yaml = redacted_text(kind, &revision.yaml);
        for one in &mut revision.overrides {
            one.yaml = redacted_text(kind, &one.yaml);
        }
    }
    revision
}

/// The same of a document as JSON.
pub(crate) fn redacted_json(kind: &DocumentKind, json: &str) -> String {
    let Ok(mut value) = serde_json::from_str(json) else { return String::new() };
    hide(kind, &FieldPath::root(), &mut value);
    value.to_string()
}

fn redacted_text(kind: &DocumentKind, yaml: &str) -> String {
    if yaml.trim().is_empty() {
        return String::new();
    }
    let Some(mut value) = raw(yaml) else { return String::new() };
    hide(kind, &FieldPath::root(), &mut value);
    serde_yaml::to_string(&value).unwrap_or_default()
}

fn hide(kind: &DocumentKind, path: &FieldPath, value: &mut Value) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                hide(kind, &path.then(Step::Field(name.clone())), value);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, value) in list.iter_mut().enumerate() {
                hide(kind, &path.then(Step::Index(index)), value);
            }
        }
        value => *value = shown(kind, path, value),
    }
}
