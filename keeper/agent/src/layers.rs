//! What of a document is in force for a process: which revision, and over it what is different for some.

use std::borrow::Cow;

use carillon_proto::v1;
use serde_yaml::{Mapping, Value};

use crate::document::{Violation, without_value};
use crate::target::{Process, Target};

/// The revision that is meant for a process, and whether because it is being released to it.
pub fn choose<'a>(
    document: &str,
    current: Option<&'a v1::ConfigRevision>,
    release: Option<&'a v1::ConfigRelease>,
    process: &Process,
) -> (Option<&'a v1::ConfigRevision>, bool) {
    match release.and_then(|release| Some((release.candidate.as_ref()?, target_of(&release.target)))) {
        Some((candidate, target)) if target.matches(document, process) => (Some(candidate), true),
        _ => (current, false),
    }
}

/// A target from the wire. One that is missing is for nobody that has an id.
fn target_of(wire: &Option<v1::ConfigTarget>) -> Target {
    let nobody = || Target { instances: vec![String::new()], ..Target::default() };
    wire.as_ref().map_or_else(nobody, Target::from)
}

/// The overrides of a revision that apply to a process, in the order in which they do.
pub fn overrides_for<'a>(
    revision: &'a v1::ConfigRevision,
    process: &Process,
) -> impl Iterator<Item = &'a v1::ConfigOverride> {
    let applies = |one: &&v1::ConfigOverride| target_of(&one.target).matches(&revision.document, process);
    revision.overrides.iter().filter(applies)
}

/// The text that is in force for a process.
pub fn text_for<'a>(revision: &'a v1::ConfigRevision, process: &Process) -> Result<Cow<'a, str>, Violation> {
    merged(&revision.yaml, overrides_for(revision, process).map(|one| one.yaml.as_str()))
}

/// A document's text with patches over it, the later over the earlier (RFC 7396).
pub fn merged<'a, 'b>(
    yaml: &'a str,
    patches: impl IntoIterator<Item = &'b str>,
) -> Result<Cow<'a, str>, Violation> {
    let mut patches = patches.into_iter().peekable();
    if patches.peek().is_none() {
        return Ok(Cow::Borrowed(yaml));
    }
    let mut whole = mapping(yaml)?;
    for patch in patches {
        merge(&mut whole, mapping(patch)?);
    }
    serde_yaml::to_string(&whole).map(Cow::Owned).map_err(|error| Violation::new("", error.to_string()))
}

/// A text as the mapping that it must be; an empty one is an empty mapping.
pub fn mapping(yaml: &str) -> Result<Value, Violation> {
    if yaml.trim().is_empty() {
        return Ok(Value::Mapping(Mapping::new()));
    }
    // A value that is not what its tag says; whose, and whether it is a secret, is not known yet.
    let told = |error: serde_yaml::Error| {
        let text = error.to_string();
        // After the path, which the YAML reader says first.
        let (path, what) = text.split_at(text.find("invalid ").unwrap_or(0));
        without_value(what).map_or_else(|| text.clone(), |what| format!("{path}{what}"))
    };
    match serde_yaml::from_str(yaml).map_err(|error| Violation::new("", told(error)))? {
        Value::Null => Ok(Value::Mapping(Mapping::new())),
        value @ Value::Mapping(_) => Ok(value),
        _ => Err(Violation::new("", "is not a mapping of fields to values")),
    }
}

fn merge(into: &mut Value, patch: Value) {
    let Value::Mapping(patch) = patch else {
        *into = patch;
        return;
    };
    if !into.is_mapping() {
        *into = Value::Mapping(Mapping::new());
    }
    let Value::Mapping(fields) = into else { return };
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(&key);
        } else {
            merge(fields.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(base: &str, patches: &[&str]) -> Value {
        serde_yaml::from_str(&merged(base, patches.iter().copied()).unwrap()).unwrap()
    }

    #[test]
    fn patches_are_merged_in_order() {
        let yaml = |text: &str| serde_yaml::from_str::<Value>(text).unwrap();
        for (base, patches, expected) in [
            ("a: 1\nb: {c: 2, d: 3}", &["b: {c: 5}"][..], "{a: 1, b: {c: 5, d: 3}}"),
            ("a: 1", &["a: 2", "a: 3"], "{a: 3}"),
            ("a: 1\nb: 2", &["a: null"], "{b: 2}"),
            ("a: [1, 2]", &["a: [3]"], "{a: [3]}"),
            ("", &["a: {b: 1, c: null}"], "{a: {b: 1}}"),
            ("a: 1", &["a: {b: 1}"], "{a: {b: 1}}"),
            ("a: '1'", &["", "b: '2'"], "{a: '1', b: '2'}"),
        ] {
            assert_eq!(over(base, patches), yaml(expected), "{base} {patches:?}");
        }
        assert_eq!(merged("# as written\na: 1", []).unwrap(), "# as written\na: 1");
        assert_eq!(merged("- a", ["b: 1"]).unwrap_err().to_string(), "is not a mapping of fields to values");
    }

    #[test]
    fn each_process_has_its_revision() {
        let to = |instances: &[&str], labels: &[&str]| v1::ConfigTarget {
            instances: instances.iter().map(ToString::to_string).collect(),
            labels: labels.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let revision = |revision, yaml: &str| v1::ConfigRevision {
            document: "gate".into(),
            revision,
            yaml: yaml.into(),
            overrides: vec![v1::ConfigOverride {
                name: "edge".into(),
                target: Some(to(&[], &["pool=edge"])),
                yaml: "b: 9".into(),
            }],
            ..Default::default()
        };
        let (current, candidate) = (revision(1, "a: 1\nb: 1"), revision(2, "a: 2"));
        let release = v1::ConfigRelease { candidate: Some(candidate), target: Some(to(&["one"], &[])) };
        let says = |id: &str, pool: &str| {
            let mut process = Process::default();
            process.add(id, &[], [("pool".to_owned(), pool.to_owned())].into());
            let (chosen, by_release) = choose("gate", Some(&current), Some(&release), &process);
            let text = text_for(chosen.unwrap(), &process).unwrap();
            let fields: Value = serde_yaml::from_str(&text).unwrap();
            (fields["a"].as_u64(), fields["b"].as_u64(), by_release)
        };
        assert_eq!(says("one", "core"), (Some(2), None, true));
        assert_eq!(says("two", "core"), (Some(1), Some(1), false));
        assert_eq!(says("two", "edge"), (Some(1), Some(9), false));
        assert_eq!(says("one", "edge"), (Some(2), Some(9), true));
        // What is not said is for nobody.
        let broken = v1::ConfigRelease { target: None, ..release.clone() };
        let mut process = Process::default();
        process.add("one", &[], Default::default());
        assert!(!choose("gate", Some(&current), Some(&broken), &process).1);
    }
}
