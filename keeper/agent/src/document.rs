//! Typed configuration documents: a Rust type, its schema, its rules, and the check that a YAML text meets all three.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_path_to_error::Segment;
use serde_yaml::{Mapping, Value};

use crate::layers;

/// Most that is told of what does not fit in one text.
const MAX_VIOLATIONS: usize = 64;

/// A configuration document: YAML in, this struct out. Unknown fields must be refused (`deny_unknown_fields`) and
/// every field must have a default (`serde(default)`), so that an empty document is a valid one.
///
/// A new kind is a struct, its defaults, and one constant; its rules, if it has any, are [`check`](Self::check). The keeper
/// is given [`DocumentKind::of`] it, processes read it with [`Agent::config`](crate::Agent::config):
///
/// ```
/// use carillon_agent::document::{ConfigDocument, Violation, parse};
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
/// #[serde(default, deny_unknown_fields)]
/// struct Mailer {
///     relay: String,
///     batch: u32,
///     password: Option<String>,
/// }
///
/// impl Default for Mailer {
///     fn default() -> Self {
///         Mailer { relay: "localhost:25".to_owned(), batch: 100, password: None }
///     }
/// }
///
/// impl ConfigDocument for Mailer {
///     const KIND: &'static str = "mailer";
///     const SECRETS: &'static [&'static str] = &["password"];
///
///     fn check(&self, _name: Option<&str>) -> Vec<Violation> {
///         let fits = (1..=1000).contains(&self.batch);
///         if fits { Vec::new() } else { vec![Violation::new("batch", "must be from 1 to 1000")] }
///     }
/// }
///
/// // What somebody publishes is read, completed and checked in one go, by the keeper before it is accepted.
/// assert_eq!(parse::<Mailer>(None, "relay: mail:25").unwrap().batch, 100);
/// assert_eq!(parse::<Mailer>(None, "batch: 0").unwrap_err()[0].to_string(), "batch: must be from 1 to 1000");
/// let unknown = parse::<Mailer>(None, "bach: 7").unwrap_err()[0].to_string();
/// assert!(unknown.starts_with("bach: unknown field `bach`, expected one of"));
/// ```
pub trait ConfigDocument:
    Serialize + DeserializeOwned + JsonSchema + Default + Clone + Send + Sync + 'static
{
    /// The document's kind: `gateway`, `hub`, `app`.
    const KIND: &'static str;
    /// One document a cluster (`gateway`), or one for each name (`app/demo`).
    const NAMED: bool = false;
    /// Paths of fields whose values are never shown when somebody looks at differences, history, where a value comes from, or
    /// why a document was refused: `api_keys[].key`, where `[]` is every element. The rules below must not tell them either.
    const SECRETS: &'static [&'static str] = &[];

    /// Rules that the schema cannot say. `name` is the document's name if the kind is named.
    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        Vec::new()
    }

    /// Changes that need care: what of `next` may not follow `self`.
    fn check_change(&self, _next: &Self) -> Vec<Violation> {
        Vec::new()
    }

    /// Rules over all documents of a named kind: what of `self` does not go with the `others`.
    fn check_among(&self, _others: &BTreeMap<String, Self>) -> Vec<Violation> {
        Vec::new()
    }
}

/// What is wrong with a document, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// Path of the field: `listeners[0].address`; empty for the document as a whole.
    pub path: String,
    pub message: String,
}

impl Violation {
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Violation { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

/// Parses and checks a YAML (or JSON) text. What is wrong is told of every field; its rules are asked once all fields fit their
/// types.
pub fn parse<T: ConfigDocument>(name: Option<&str>, yaml: &str) -> Result<T, Vec<Violation>> {
    let value = layers::mapping(yaml).map_err(|violation| vec![violation])?;
    let Ok(document) = read::<T>(value.clone(), &[]) else {
        let mut found = Vec::new();
        misfits::<T>(&value, &|value| value, &mut Vec::new(), &mut found);
        return Err(found);
    };
    let violations = document.check(name);
    if violations.is_empty() { Ok(document) } else { Err(violations) }
}

/// Reads a value as the type, or says where it does not fit. `places`: by depth, which element of its list the first one
/// is, where all others were left out.
fn read<T: ConfigDocument>(value: Value, places: &[Option<usize>]) -> Result<T, Violation> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (mut path, mut pattern, mut is_whole) = (String::new(), String::new(), true);
        for (depth, segment) in error.path().iter().enumerate() {
            is_whole &= matches!(segment, Segment::Seq { .. } | Segment::Map { .. });
            match segment {
                Segment::Seq { index } => {
                    let place = places.get(depth).copied().flatten().unwrap_or(*index);
                    path.push_str(&format!("[{place}]"));
                }
                segment if path.is_empty() => path.push_str(&segment.to_string()),
                segment => path.push_str(&format!(".{segment}")),
            }
            // Beyond what is no field it is not known what is a secret: that counts as what it is in.
            match segment {
                _ if !is_whole => {}
                Segment::Seq { .. } => pattern.push_str("[]"),
                segment if pattern.is_empty() => pattern.push_str(&segment.to_string()),
                segment => pattern.push_str(&format!(".{segment}")),
            }
        }
        let message = error.into_inner().to_string();
        Violation::new(path, told(T::SECRETS, &pattern, message))
    })
}

/// Does a field hold a secret? `pattern`: its path with `[]` for every element; empty: the document.
pub fn is_secret(secrets: &[&str], pattern: &str) -> bool {
    // What is below a secret is one; and so is what a secret is below, when it is no list or mapping that can be looked
    // into: a value in the wrong place.
    secrets.iter().any(|secret| is_below(pattern, secret) || is_below(secret, pattern))
}

/// Is a field another one, or in it?
fn is_below(inner: &str, outer: &str) -> bool {
    let rest = inner.strip_prefix(outer);
    outer.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// Why a value does not fit, as it may be told: without the value where it may be a secret.
fn told(secrets: &[&str], pattern: &str, message: String) -> String {
    if !is_secret(secrets, pattern) {
        return message;
    }
    match without_value(&message) {
        Some(message) => message,
        None if secrets.iter().any(|secret| is_below(pattern, secret)) => {
            "does not fit; why is not told, it is a secret".to_owned()
        }
        // Of what only holds a secret: a field that is missing or not known.
        None => message,
    }
}

/// The words of serde for a value that is not what is expected, without the value; None: they are not of that kind.
pub(crate) fn without_value(message: &str) -> Option<String> {
    const KINDS: [&str; 4] = ["invalid type", "invalid value", "invalid length", "unknown variant"];
    let kind = KINDS.into_iter().find(|kind| message.starts_with(kind))?;
    // What is expected comes last, and is the type's own.
    let expected = message.rsplit_once(", expected ").map(|(_, expected)| format!(", expected {expected}"));
    Some(format!("{kind}: (secret){}", expected.unwrap_or_default()))
}

/// Finds all that does not fit the type, not only what is read first: what does not fit is taken apart, as long as it may
/// be there with only one of its parts. `within`: the whole document with nothing but this value.
fn misfits<T: ConfigDocument>(
    value: &Value,
    within: &dyn Fn(Value) -> Value,
    places: &mut Vec<Option<usize>>,
    found: &mut Vec<Violation>,
) {
    if found.len() >= MAX_VIOLATIONS {
        return;
    }
    let Err(violation) = read::<T>(within(value.clone()), places) else { return };
    let before = found.len();
    let may_be = |empty: Value| read::<T>(within(empty), places).is_ok();
    match value {
        Value::Mapping(fields) if may_be(Value::Mapping(Mapping::new())) => {
            for (key, value) in fields {
                let alone = |value| within(Value::Mapping(Mapping::from_iter([(key.clone(), value)])));
                places.push(None);
                misfits::<T>(value, &alone, places, found);
                places.pop();
            }
        }
        Value::Sequence(list) if may_be(Value::Sequence(Vec::new())) => {
            for (index, value) in list.iter().enumerate() {
                let alone = |value| within(Value::Sequence(vec![value]));
                places.push(Some(index));
                misfits::<T>(value, &alone, places, found);
                places.pop();
            }
        }
        _ => {}
    }
    // It has no parts, or each of them fits alone.
    if found.len() == before {
        found.push(violation);
    }
}

type CheckFn = fn(Option<&str>, &str) -> Result<serde_json::Value, Vec<Violation>>;
type CheckChangeFn = fn(Option<&str>, &str, &str) -> Vec<Violation>;
type CheckAmongFn = fn(&str, &str, &BTreeMap<String, String>) -> Vec<Violation>;
type SchemaFn = fn() -> serde_json::Value;

/// A kind of document without its Rust type: what the keeper needs to refuse a bad one. The binary hands the keeper
/// one for each kind that exists.
#[derive(Clone, Copy)]
pub struct DocumentKind {
    pub kind: &'static str,
    pub named: bool,
    /// As [`ConfigDocument::SECRETS`].
    pub secrets: &'static [&'static str],
    /// Checks a text; gives the whole document, defaults filled in.
    pub check: CheckFn,
    /// Name, present text, next text: what of the next may not follow. A present text that is not valid (any more)
    /// may be followed by anything.
    pub check_change: CheckChangeFn,
    /// Name, text, and the texts of the other documents of the kind: what does not go with them.
    pub check_among: CheckAmongFn,
    /// JSON Schema of the document.
    pub schema: SchemaFn,
}

impl DocumentKind {
    pub fn of<T: ConfigDocument>() -> Self {
        DocumentKind {
            kind: T::KIND,
            named: T::NAMED,
            secrets: T::SECRETS,
            check: |name, yaml| {
                let document = parse::<T>(name, yaml)?;
                serde_json::to_value(&document).map_err(|error| vec![Violation::new("", error.to_string())])
            },
            check_change: |name, present, next| match (parse::<T>(name, present), parse::<T>(name, next)) {
                (Ok(present), Ok(next)) => present.check_change(&next),
                (_, Err(violations)) => violations,
                (Err(_), Ok(_)) => Vec::new(),
            },
            check_among: |name, yaml, others| {
                let others = others
                    .iter()
                    .filter_map(|(other, yaml)| Some((other.clone(), parse::<T>(Some(other), yaml).ok()?)))
                    .collect();
                match parse::<T>(Some(name), yaml) {
                    Ok(document) => document.check_among(&others),
                    Err(violations) => violations,
                }
            },
            schema: || schemars::schema_for!(T).to_value(),
        }
    }
}

impl fmt::Debug for DocumentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DocumentKind")
            .field("kind", &self.kind)
            .field("named", &self.named)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Shop {
        size: u32,
        name: String,
        limits: Limits,
        doors: Vec<Door>,
        by_name: BTreeMap<String, Door>,
    }

    #[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        low: u32,
        high: u32,
    }

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Door {
        width: u32,
        height: u32,
    }

    impl ConfigDocument for Shop {
        const KIND: &'static str = "shop";
    }

    fn paths(yaml: &str) -> Vec<String> {
        let found = parse::<Shop>(None, yaml).unwrap_err();
        assert!(found.iter().all(|violation| !violation.message.is_empty()), "{found:?}");
        found.into_iter().map(|violation| violation.path).collect()
    }

    #[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Safe {
        code: String,
        pin: Option<u32>,
        keys: Vec<Key>,
        open: u32,
    }

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Key {
        name: String,
        cut: u32,
    }

    impl ConfigDocument for Safe {
        const KIND: &'static str = "safe";
        const SECRETS: &'static [&'static str] = &["code", "pin", "keys[].cut"];
    }

    #[test]
    fn secrets_are_not_in_what_is_told_of_what_does_not_fit() {
        for (yaml, expected) in [
            ("code: [hunter]", "code: invalid type: (secret), expected a string"),
            ("code: {hunter: 1}", "code: invalid type: (secret), expected a string"),
            ("pin: 'hunter, expected it'", "pin: invalid type: (secret), expected u32"),
            ("pin: -471147", "pin: invalid value: (secret), expected u32"),
            ("keys: [{name: a, cut: hunter}]", "keys[0].cut: invalid type: (secret), expected u32"),
            // In the wrong place.
            ("keys: hunter", "keys: invalid type: (secret), expected a sequence"),
            ("keys: [hunter]", "keys[0]: invalid type: (secret), expected struct Key"),
            ("keys: [{cut: 5}]", "keys[0]: missing field `name`"),
            ("open: everyone", "open: invalid type: string \"everyone\", expected u32"),
            ("keys: [{name: 5, cut: 1}]", "keys[0].name: invalid type: integer `5`, expected a string"),
        ] {
            let found = parse::<Safe>(None, yaml).unwrap_err();
            assert_eq!(found[0].to_string(), expected, "{yaml}");
            assert_eq!(found.len(), 1, "{found:?}");
        }
        let tagged = parse::<Safe>(None, "code: !!int hunter").unwrap_err();
        let expected = "code: invalid value: (secret), expected an integer at line 1 column 7";
        assert_eq!(tagged[0].to_string(), expected);
        assert_eq!(
            told(&["a"], "a", "hunter is bad".into()),
            "does not fit; why is not told, it is a secret"
        );
        assert_eq!(told(&["a"], "", "invalid type: string \"x\"".into()), "invalid type: (secret)");
    }

    #[test]
    fn every_field_that_does_not_fit_is_told() {
        let good = "{width: 1, height: 2}";
        for (yaml, expected) in [
            ("size: x", &["size"][..]),
            ("{size: x, name: [], shape: round}", &["size", "name", "shape"]),
            (
                "limits: {low: x, high: -1, middle: {a: 1, b: 2}}",
                &["limits.low", "limits.high", "limits.middle"],
            ),
            (
                &format!("doors: [{good}, 7, {good}, {{width: x, height: 1}}]"),
                &["doors[1]", "doors[3].width"],
            ),
            // What is missing in it keeps it from being taken apart: one of them then.
            ("doors: [{width: 1}, {width: x, height: y}]", &["doors[0]", "doors[1].width"]),
            (&format!("by_name: {{a: {good}, b: {{}}, c: 1}}"), &["by_name.b", "by_name.c"]),
            ("{limits: 7, doors: {a: 1}}", &["limits", "doors"]),
            ("- a\n- b", &[""]),
            ("7", &[""]),
            ("size: [", &[""]),
        ] {
            assert_eq!(paths(yaml), expected, "{yaml}");
        }
        let many: String = (0..1000).map(|i| format!("field_{i}: 1\n")).collect();
        assert_eq!(paths(&many).len(), MAX_VIOLATIONS);
        assert!(parse::<Shop>(None, &format!("{{size: 1, doors: [{good}]}}")).is_ok());
    }
}
