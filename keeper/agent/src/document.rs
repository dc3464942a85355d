//! Typed configuration documents: a Rust type, its schema, its rules, and the check that a YAML text meets all three.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

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
    /// Paths of fields whose values are never shown when somebody looks at differences, history or where a value comes
    /// from: `api_keys[].key`, where `[]` is every element.
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

/// Parses and checks a YAML (or JSON) text.
pub fn parse<T: ConfigDocument>(name: Option<&str>, yaml: &str) -> Result<T, Vec<Violation>> {
    let value: serde_yaml::Value = if yaml.trim().is_empty() {
        serde_yaml::Value::Mapping(serde_yaml::Mapping::new())
    } else {
        serde_yaml::from_str(yaml).map_err(|error| vec![Violation::new("", error.to_string())])?
    };
    let value = if value.is_null() { serde_yaml::Value::Mapping(serde_yaml::Mapping::new()) } else { value };
    let document: T = serde_path_to_error::deserialize(value).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => String::new(),
            path => path,
        };
        vec![Violation::new(path, error.into_inner().to_string())]
    })?;
    let violations = document.check(name);
    if violations.is_empty() { Ok(document) } else { Err(violations) }
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
