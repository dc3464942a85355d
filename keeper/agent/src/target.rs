//! Which processes something of the configuration is for. Keeper and agents decide it by the same pure functions, so that
//! both mean the same processes.

use std::collections::BTreeMap;
use std::fmt;

use carillon_proto::v1;
use serde::Serialize;

use crate::{Instance, Role, keys};

/// Most instances, roles or labels that one target names.
const MAX_CONDITIONS: usize = 256;
/// What the share is counted in.
const WHOLE: u32 = 10_000;

/// Processes: all conditions that are given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Target {
    /// One of these ids.
    pub instances: Vec<String>,
    /// One of these roles.
    pub roles: Vec<String>,
    /// All of these.
    pub labels: BTreeMap<String, String>,
    /// So many of 10,000, by a hash of document and instance id.
    pub per_ten_thousand: Option<u32>,
}

impl Target {
    /// Without a condition it would be for everyone.
    pub fn is_empty(&self) -> bool {
        *self == Target::default()
    }

    /// Is it fit to be published? Says what is not.
    pub fn check(&self) -> Result<(), String> {
        let most = self.instances.len().max(self.roles.len()).max(self.labels.len());
        if most > MAX_CONDITIONS {
            return Err(format!(
                "a target has at most {MAX_CONDITIONS} instances, roles or labels, not {most}"
            ));
        }
        for id in &self.instances {
            keys::check_instance(id).map_err(|what| format!("instance id {id:?} {what}"))?;
        }
        for role in &self.roles {
            role.parse::<Role>().map_err(|error| error.to_string())?;
        }
        check_labels(&self.labels)?;
        match self.per_ten_thousand {
            Some(share) if !(1..=WHOLE).contains(&share) => {
                Err("a percentage is from 0.01 to 100".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Is it for this process? It is when one of the process's instances is meant.
    pub fn matches(&self, document: &str, process: &Process) -> bool {
        process.0.iter().any(|(id, facets)| {
            let named = self.instances.is_empty() || self.instances.contains(id);
            let role = self.roles.is_empty() || self.roles.iter().any(|role| facets.roles.contains(role));
            let labels = self.labels.iter().all(|(key, value)| facets.labels.get(key) == Some(value));
            let share = self.per_ten_thousand.is_none_or(|share| place(document, id) < share);
            named && role && labels && share
        })
    }

    pub fn to_wire(&self) -> v1::ConfigTarget {
        v1::ConfigTarget {
            instances: self.instances.clone(),
            roles: self.roles.clone(),
            labels: self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect(),
            per_ten_thousand: self.per_ten_thousand.unwrap_or(0),
        }
    }
}

impl From<&v1::ConfigTarget> for Target {
    fn from(wire: &v1::ConfigTarget) -> Self {
        // A label without a value is one that nobody has.
        let label = |label: &String| {
            let (key, value) = label.split_once('=').unwrap_or((label, ""));
            (key.to_owned(), value.to_owned())
        };
        Target {
            instances: wire.instances.clone(),
            roles: wire.roles.clone(),
            labels: wire.labels.iter().map(label).collect(),
            per_ten_thousand: (wire.per_ten_thousand != 0).then_some(wire.per_ten_thousand),
        }
    }
}

/// `25 %, role gateway, pool=edge`
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(share) = self.per_ten_thousand {
            parts.push(format!("{} %", f64::from(share) / 100.0));
        }
        if !self.roles.is_empty() {
            parts.push(format!("role {}", self.roles.join(" or ")));
        }
        parts.extend(self.labels.iter().map(|(key, value)| format!("{key}={value}")));
        if !self.instances.is_empty() {
            parts.push(format!("instance {}", self.instances.join(" or ")));
        }
        if parts.is_empty() { f.write_str("all") } else { f.write_str(&parts.join(", ")) }
    }
}

/// Where an instance stands among all, from 0 to 9999: the same for ever, and another order for each document, so that
/// not always the same ones go first.
fn place(document: &str, instance: &str) -> u32 {
    let hash = xxhash_rust::xxh3::xxh3_64(format!("{document}\n{instance}").as_bytes());
    (hash % u64::from(WHOLE)) as u32
}

/// What an instance is told apart by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facets {
    roles: Vec<String>,
    labels: BTreeMap<String, String>,
}

/// A process, as the instances that it is: one, except for `carillon dev`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process(BTreeMap<String, Facets>);

impl Process {
    /// Adds an instance, or what is new about it.
    pub fn add(&mut self, id: &str, roles: &[String], labels: BTreeMap<String, String>) {
        self.0.insert(id.to_owned(), Facets { roles: roles.to_vec(), labels });
    }

    /// So many instances.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn add_instance(&mut self, instance: &Instance) {
        let roles: Vec<String> = instance.roles.iter().map(ToString::to_string).collect();
        self.add(&instance.id, &roles, instance.labels.clone());
    }
}

/// Are these fit to be an instance's labels? Says what is not.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    /// As Kubernetes has it, whose labels these often are.
    const MOST_BYTES: usize = 63;
    if labels.len() > MAX_CONDITIONS {
        return Err(format!("there are {} labels, at most {MAX_CONDITIONS} are allowed", labels.len()));
    }
    let fits = |text: &str, more: &[u8]| {
        text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b) || more.contains(&b))
    };
    for (key, value) in labels {
        if key.is_empty() || key.len() > 4 * MOST_BYTES || !fits(key, b"/") {
            return Err(format!(
                "label {key:?}: a key has from 1 to {} letters, digits, '-', '_', '.' and '/'",
                4 * MOST_BYTES
            ));
        }
        if value.is_empty() || value.len() > MOST_BYTES || !fits(value, b"") {
            return Err(format!(
                "label {key}={value:?}: a value has from 1 to {MOST_BYTES} letters, digits, '-', '_' and '.'"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(id: &str, roles: &[&str], labels: &[(&str, &str)]) -> Process {
        let mut process = Process::default();
        let roles: Vec<String> = roles.iter().map(ToString::to_string).collect();
        let labels = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        process.add(id, &roles, labels);
        process
    }

    fn target(instances: &[&str], roles: &[&str], labels: &[&str], per_ten_thousand: u32) -> Target {
        let all = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        let wire = v1::ConfigTarget {
            instances: all(instances),
            roles: all(roles),
            labels: all(labels),
            per_ten_thousand,
        };
        Target::from(&wire)
    }

    #[test]
    fn all_conditions_must_hold() {
        let edge = process("gw-1", &["gateway"], &[("pool", "edge"), ("zone", "a")]);
        for (target, expected) in [
            (target(&[], &[], &[], 0), true),
            (target(&["gw-1", "gw-2"], &[], &[], 0), true),
            (target(&["gw-2"], &[], &[], 0), false),
            (target(&[], &["registry", "gateway"], &[], 0), true),
            (target(&[], &["registry"], &[], 0), false),
            (target(&[], &[], &["pool=edge", "zone=a"], 0), true),
            (target(&[], &[], &["pool=edge", "zone=b"], 0), false),
            (target(&[], &[], &["pool"], 0), false),
            (target(&["gw-1"], &["gateway"], &["pool=edge"], 10_000), true),
            (target(&["gw-1"], &["gateway"], &["pool=core"], 10_000), false),
        ] {
            assert_eq!(target.matches("gateway", &edge), expected, "{target}");
        }
        let nobody = Process::default();
        assert!(!target(&[], &[], &[], 10_000).matches("gateway", &nobody), "it is not known who it is");
        let mut both = process("dev-hub", &["registry"], &[]);
        both.add("dev-gateway", &["gateway".to_owned()], BTreeMap::new());
        assert!(target(&["dev-gateway"], &[], &[], 0).matches("hub", &both), "one of its instances is meant");
        assert!(!target(&["dev-gateway"], &["registry"], &[], 0).matches("hub", &both), "none is both");
    }

    #[test]
    fn who_is_in_stays_in_as_the_share_grows() {
        let everyone: Vec<Process> =
            (0..2000).map(|i| process(&format!("gw-{i}"), &["gateway"], &[])).collect();
        let mut before: Vec<bool> = vec![false; everyone.len()];
        for share in [1, 100, 1000, 2500, 5000, 9999, 10_000] {
            let target = target(&[], &[], &[], share);
            let now: Vec<bool> = everyone.iter().map(|one| target.matches("gateway", one)).collect();
            assert!(before.iter().zip(&now).all(|(before, now)| !before || *now), "{share}: somebody left");
            let part = now.iter().filter(|is| **is).count() as f64 / everyone.len() as f64;
            assert!((part - f64::from(share) / 10_000.0).abs() < 0.03, "{share}: {part}");
            before = now;
        }
        assert!(before.iter().all(|is| *is));
        let half = target(&[], &[], &[], 5000);
        let differ = everyone.iter().filter(|one| half.matches("gateway", one) != half.matches("hub", one));
        assert!(differ.count() > 500, "each document has an order of its own");
        // Written down: agents of all versions must agree.
        assert_eq!((place("gateway", "gw-1"), place("hub", "gw-1")), (2011, 7576));
    }

    #[test]
    fn a_target_says_what_it_is_and_what_is_wrong_with_it() {
        let all = target(&["gw-1", "gw-2"], &["gateway"], &["pool=edge"], 250);
        assert_eq!(all.to_string(), "2.5 %, role gateway, pool=edge, instance gw-1 or gw-2");
        assert_eq!(Target::from(&all.to_wire()), all);
        assert_eq!(all.check(), Ok(()));
        for (target, expected) in [
            (target(&["a b"], &[], &[], 0), "instance id \"a b\" may hold only"),
            (target(&[], &["gatway"], &[], 0), "\"gatway\" is not a role; the roles are"),
            (target(&[], &[], &["pool"], 0), "label pool=\"\": a value has"),
            (target(&[], &[], &["=x"], 0), "label \"\": a key has"),
            (target(&[], &[], &["a b=x"], 0), "label \"a b\": a key has"),
            (target(&[], &[], &[], 10_001), "a percentage is from 0.01 to 100"),
        ] {
            let said = target.check().unwrap_err();
            assert!(said.starts_with(expected), "{said}");
        }
    }
}
