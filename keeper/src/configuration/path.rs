//! Changing single fields of a YAML document: `limits.max_payload_bytes=65536`, `topics[0].store=false`.

use std::fmt;

use carillon_agent::document::Violation;
use serde_yaml::{Mapping, Value};

/// Deepest path.
const MAX_DEPTH: usize = 16;
/// Most elements that a list may be given one by one.
const MAX_LIST: usize = 10_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Field(String),
    Index(usize),
}

/// A parsed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldPath(Vec<Step>);

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_steps(f, &self.0)
    }
}

fn write_steps(f: &mut dyn fmt::Write, steps: &[Step]) -> fmt::Result {
    for (i, step) in steps.iter().enumerate() {
        match step {
            Step::Field(name) if i == 0 => f.write_str(name)?,
            Step::Field(name) => write!(f, ".{name}")?,
            Step::Index(index) => write!(f, "[{index}]")?,
        }
    }
    Ok(())
}

fn text_of(steps: &[Step]) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = write_steps(&mut text, steps);
    text
}

impl FieldPath {
    /// With one more step.
    pub(crate) fn then(&self, step: Step) -> FieldPath {
        let mut steps = self.0.clone();
        steps.push(step);
        FieldPath(steps)
    }

    pub(crate) fn root() -> FieldPath {
        FieldPath(Vec::new())
    }

    pub(crate) fn steps(&self) -> &[Step] {
        &self.0
    }

    pub(crate) fn parse(text: &str) -> Result<Self, Violation> {
        let wrong = |what: &str| {
            Violation::new(text, format!("is not a path like limits.max_count or topics[0].store: {what}"))
        };
        let mut steps = Vec::new();
        for (i, part) in text.split('.').enumerate() {
            let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
            if name.is_empty() {
                return Err(wrong(if i == 0 && text.is_empty() {
                    "it is empty"
                } else {
                    "a name is missing"
                }));
            }
            steps.push(Step::Field(name.to_owned()));
            while let Some(inner) = rest.strip_prefix('[') {
                let Some((index, after)) = inner.split_once(']') else { return Err(wrong("a ] is missing")) };
                let index = index.parse().map_err(|_| wrong("what stands in [ ] is not a number"))?;
                steps.push(Step::Index(index));
                rest = after;
            }
            if !rest.is_empty() {
                return Err(wrong("something stands after a ]"));
            }
        }
        if steps.len() > MAX_DEPTH {
            return Err(wrong("it is too deep"));
        }
        Ok(FieldPath(steps))
    }

    /// Sets the field, or takes it out (None). `whole` is the document with its defaults: where the path leads into a
    /// list that the document does not have, the default list is what is changed.
    pub(crate) fn apply(
        &self,
        document: &mut Value,
        whole: &Value,
        value: Option<Value>,
    ) -> Result<(), Violation> {
        self.descend(document, Some(whole), 0, value)
    }

    fn descend(
        &self,
        node: &mut Value,
        whole: Option<&Value>,
        depth: usize,
        value: Option<Value>,
    ) -> Result<(), Violation> {
        let Some(step) = self.0.get(depth) else {
            *node = value.unwrap_or(Value::Null);
            return Ok(());
        };
        let last = depth + 1 == self.0.len();
        match step {
            Step::Field(name) => {
                if node.is_null() {
                    *node = Value::Mapping(Mapping::new());
                }
                let Value::Mapping(map) = node else {
                    return Err(self.violation(depth, "has no fields of its own"));
                };
                let whole = whole.and_then(|whole| whole.get(name.as_str()));
                let absent = map.get(name.as_str()).is_none_or(Value::is_null);
                let start = match self.0.get(depth + 1) {
                    Some(Step::Index(_)) if absent => whole.filter(|whole| whole.is_sequence()).cloned(),
                    _ => None,
                };
                if value.is_none() && (last || (absent && start.is_none())) {
                    map.remove(name.as_str());
                    return Ok(());
                }
                if absent {
                    map.insert(Value::String(name.clone()), start.unwrap_or(Value::Null));
                }
                let removing = value.is_none();
                let Some(child) = map.get_mut(name.as_str()) else { return Ok(()) };
                self.descend(child, whole, depth + 1, value)?;
                // What was only there to hold the field goes with it.
                if removing && child.as_mapping().is_some_and(Mapping::is_empty) {
                    map.remove(name.as_str());
                }
                Ok(())
            }
            Step::Index(index) => {
                if node.is_null() {
                    *node = Value::Sequence(Vec::new());
                }
                let Value::Sequence(list) = node else { return Err(self.violation(depth, "is not a list")) };
                let length = list.len();
                if *index > length || *index >= MAX_LIST || (*index == length && value.is_none()) {
                    return Err(
                        self.violation(depth, &format!("has {length} elements, there is no [{index}]"))
                    );
                }
                if last && value.is_none() {
                    list.remove(*index);
                    return Ok(());
                }
                if *index == length {
                    list.push(Value::Null);
                }
                let whole = whole.and_then(|whole| whole.get(*index));
                match list.get_mut(*index) {
                    Some(child) => self.descend(child, whole, depth + 1, value),
                    None => Ok(()),
                }
            }
        }
    }

    fn violation(&self, depth: usize, message: &str) -> Violation {
        Violation::new(text_of(&self.0[..depth]), message)
    }
}

/// What somebody typed, as a YAML value. Text that is not YAML, and text of several lines (which YAML would fold), is
/// taken as it is.
pub(crate) fn value(text: &str) -> Value {
    match serde_yaml::from_str::<Value>(text) {
        Ok(Value::String(_)) if !text.trim_start().starts_with(['"', '\'', '|', '>']) => {
            Value::String(text.to_owned())
        }
        Ok(value) => value,
        Err(_) => Value::String(text.to_owned()),
    }
}
