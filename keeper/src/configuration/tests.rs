//! Changing documents by path, and the messages for what cannot be.

use std::collections::BTreeMap;

use carillon_agent::app::App;
use carillon_agent::document::ConfigDocument;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Gate {
    max_packet_bytes: u32,
    name: String,
    on: bool,
    listeners: Vec<Listener>,
    limits: Limits,
    key: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Listener {
    address: String,
    #[serde(default)]
    tls: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Limits {
    rate: f64,
}

impl Default for Gate {
    fn default() -> Self {
        let listeners = ["a:1", "b:2"].map(|address| Listener { address: address.to_owned(), tls: false });
        Gate {
            max_packet_bytes: 1024,
            name: "gate".to_owned(),
            on: false,
            listeners: listeners.to_vec(),
            limits: Limits::default(),
            key: None,
        }
    }
}

impl ConfigDocument for Gate {
    const KIND: &'static str = "gate";

    fn check(&self, _: Option<&str>) -> Vec<Violation> {
        if self.max_packet_bytes < 16 {
            return vec![Violation::new("max_packet_bytes", "must be at least 16")];
        }
        Vec::new()
    }
}

type Sets<'a> = &'a [(&'a str, Option<&'a str>)];

fn sets(sets: Sets) -> Vec<v1::ConfigSet> {
    sets.iter()
        .map(|(path, value)| v1::ConfigSet { path: path.to_string(), value: value.map(str::to_owned) })
        .collect()
}

fn change(present: &str, changes: Sets) -> Result<String, String> {
    let kind = DocumentKind::of::<Gate>();
    let whole = (kind.check)(None, present).or_else(|_| (kind.check)(None, "")).ok();
    match set(present, whole, |yaml| (kind.check)(None, yaml).map(drop), &sets(changes)) {
        Ok(yaml) => Ok(yaml),
        Err(Refusal::Violations(violations)) => {
            Err(violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        }
        Err(Refusal::Status(status)) => Err(status.message().to_owned()),
    }
}

#[test]
fn fields_are_set() {
    let table: &[(&str, Sets, &str)] = &[
        ("", &[("max_packet_bytes", Some("4096"))], "max_packet_bytes: 4096\n"),
        (
            "name: x\n",
            &[("on", Some("true")), ("limits.rate", Some("1.5"))],
            "name: x\non: true\nlimits:\n  rate: 1.5\n",
        ),
        ("max_packet_bytes: 1\n", &[("max_packet_bytes", Some("99"))], "max_packet_bytes: 99\n"),
        // Taken out, and what was only there to hold it.
        ("on: true\nlimits:\n  rate: 1.0\n", &[("limits.rate", None)], "on: true\n"),
        ("on: true\n", &[("on", None)], ""),
        ("on: true\n", &[("name", None), ("limits.rate", None)], "on: true\n"),
        // Into the default list.
        (
            "",
            &[("listeners[1].tls", Some("true"))],
            "listeners:\n- address: a:1\n  tls: false\n- address: b:2\n  tls: true\n",
        ),
        ("listeners: []\n", &[("listeners[0]", Some("{address: 'c:3'}"))], "listeners:\n- address: c:3\n"),
        ("listeners: []\n", &[("listeners[0].address", Some("c:3"))], "listeners:\n- address: c:3\n"),
        ("", &[("listeners[0]", None)], "listeners:\n- address: b:2\n  tls: false\n"),
        // A text field takes what was typed.
        ("", &[("name", Some("123"))], "name: '123'\n"),
        ("", &[("name", Some("#1"))], "name: '#1'\n"),
        ("", &[("name", Some("a: b"))], "name: 'a: b'\n"),
        ("", &[("name", Some("*x"))], "name: '*x'\n"),
        ("", &[("name", Some(""))], "name: ''\n"),
        ("", &[("name", Some("\"quoted\""))], "name: quoted\n"),
        (
            "",
            &[("name", Some("7")), ("key", Some("8")), ("max_packet_bytes", Some("90"))],
            "name: '7'\nkey: '8'\nmax_packet_bytes: 90\n",
        ),
        ("", &[("key", Some("-----BEGIN\nabc\n"))], "key: |\n  -----BEGIN\n  abc\n"),
        ("key: x\n", &[("key", Some("null"))], "key: null\n"),
    ];
    for (present, changes, expected) in table {
        assert_eq!(change(present, changes).as_deref(), Ok(*expected), "{present:?} {changes:?}");
    }
}

#[test]
fn what_cannot_be_set_is_said_with_its_path() {
    let table: &[(&str, &str, Option<&str>, &str)] = &[
        (
            "",
            "max_packet_bytes",
            Some("many"),
            "max_packet_bytes: invalid type: string \"many\", expected u32",
        ),
        ("", "max_packet_bytes", Some("-1"), "max_packet_bytes: invalid value: integer `-1`, expected u32"),
        ("", "max_packet_bytes", Some("3"), "max_packet_bytes: must be at least 16"),
        ("", "on", Some("5"), "on: invalid type: integer `5`, expected a boolean"),
        ("", "limits.speed", Some("5"), "limits.speed: unknown field `speed`, expected `rate`"),
        ("", "limits", Some("5"), "limits: invalid type: integer `5`, expected struct Limits"),
        (
            "",
            "listeners[0].port",
            Some("5"),
            "listeners[0].port: unknown field `port`, expected `address` or `tls`",
        ),
        ("", "listeners[5].tls", Some("true"), "listeners: has 2 elements, there is no [5]"),
        ("", "listeners[2].tls", Some("true"), "listeners[2]: missing field `address`"),
        ("", "listeners[2]", None, "listeners: has 2 elements, there is no [2]"),
        ("name: x\n", "name.first", Some("y"), "name: has no fields of its own"),
        ("name: x\n", "name[0]", Some("y"), "name: is not a list"),
        ("", "", Some("y"), ": is not a path like limits.max_count or topics[0].store: it is empty"),
        (
            "",
            "a..b",
            Some("y"),
            "a..b: is not a path like limits.max_count or topics[0].store: a name is missing",
        ),
        (
            "",
            "a[x]",
            Some("y"),
            "a[x]: is not a path like limits.max_count or topics[0].store: what stands in [ ] is not a number",
        ),
        ("", "a[0", Some("y"), "a[0: is not a path like limits.max_count or topics[0].store: a ] is missing"),
        (
            "",
            "a[0]b",
            Some("y"),
            "a[0]b: is not a path like limits.max_count or topics[0].store: something stands after a ]",
        ),
    ];
    for (present, path, value, expected) in table {
        let expected = expected.strip_prefix(": ").unwrap_or(expected);
        assert_eq!(
            change(present, &[(path, *value)]),
            Err((*expected).to_owned()),
            "{present:?} {path} {value:?}"
        );
    }
    let unknown = change("", &[("max_packets", Some("5"))]).unwrap_err();
    assert!(
        unknown.starts_with(
            "max_packets: unknown field `max_packets`, expected one of `max_packet_bytes`, `name`"
        ),
        "{unknown}"
    );
}

#[test]
fn broken_documents() {
    let check = |yaml: &str| {
        let violations = (DocumentKind::of::<Gate>().check)(None, yaml).unwrap_err();
        violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    assert_eq!(check("on: true\non: false"), "duplicate entry with key \"on\"");
    assert_eq!(check("- 1"), "is not a mapping of fields to values");
    assert_eq!(
        check("\"text"),
        "found unexpected end of stream at line 1 column 6, while scanning a quoted scalar"
    );
    assert_eq!(check("limits: {rate: fast}"), "limits.rate: invalid type: string \"fast\", expected f64");
}

#[test]
fn one_root_app() {
    let kind = DocumentKind::of::<App>();
    let others = |root: &str| BTreeMap::from([("other".to_owned(), format!("root: {root}"))]);
    assert_eq!((kind.check_among)("mine", "root: true", &others("false")), []);
    assert_eq!((kind.check_among)("mine", "root: false", &others("true")), []);
    let refused = (kind.check_among)("mine", "root: true", &others("true"));
    assert_eq!(
        refused[0].to_string(),
        "root: is already true in app/other: a cluster has at most one root app"
    );
}

fn revision(number: u64, yaml: &str) -> v1::ConfigRevision {
    v1::ConfigRevision {
        document: "app/demo".into(),
        revision: number,
        yaml: yaml.into(),
        ..Default::default()
    }
}

#[test]
fn differences_are_by_field_and_keep_secrets() {
    let kind = DocumentKind::of::<App>();
    let mut old =
        revision(1, "api_keys: [{name: one, key: first-secret-0123}]\nlimits: {push_rate_per_second: 5}");
    let mut new = revision(
        2,
        "api_keys: [{name: one, key: second-secret-012}]\nwebhook: {url: 'http://x', secret: third-secret}",
    );
    let over = |yaml: &str, label: &str| v1::ConfigOverride {
        name: "edge".into(),
        target: Some(v1::ConfigTarget { labels: vec![label.into()], ..Default::default() }),
        yaml: yaml.into(),
    };
    old.overrides = vec![over("webhook: {url: 'http://e', secret: fourth-secret}", "pool=edge")];
    new.overrides =
        vec![over("api_keys: [{name: e, key: fifth-secret-01234}]\nanonymous_devices: true", "pool=rim")];
    let found = fields::differences(&kind, Some("demo"), Some(&old), Some(&new));
    let lines: Vec<String> = found
        .iter()
        .map(|one| {
            let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "-".to_owned());
            format!("{} {} {}", one.path, side(&one.before_json), side(&one.after_json))
        })
        .collect();
    assert_eq!(
        lines,
        [
            "api_keys[0].key \"(secret)\" \"(another secret)\"",
            "limits.push_rate_per_second 5 0",
            "webhook.presence - false",
            "webhook.secret - \"(secret)\"",
            "webhook.timeout_ms - 10000",
            "webhook.url - \"(secret)\"",
            "overrides.edge for \"pool=edge\" \"pool=rim\"",
            "overrides.edge.anonymous_devices - true",
            "overrides.edge.api_keys[0].key - \"(secret)\"",
            "overrides.edge.api_keys[0].name - \"e\"",
            "webhook null -",
            "overrides.edge.webhook.secret \"(secret)\" -",
            "overrides.edge.webhook.url \"(secret)\" -",
        ]
    );
    for one in [fields::redacted(&kind, old), fields::redacted(&kind, new)] {
        let all = format!("{one:?}");
        assert!(!all.contains("-secret") && all.contains("(secret)"), "{all}");
    }
    assert_eq!(fields::differences(&kind, Some("demo"), None, None), []);
    let gate = DocumentKind::of::<Gate>();
    let deleted = v1::ConfigRevision { deleted: true, ..revision(2, "") };
    let back = fields::differences(&gate, None, Some(&revision(1, "on: true")), Some(&deleted));
    assert_eq!((back.len(), back[0].path.as_str()), (1, "on"), "without a document there are its defaults");
}
