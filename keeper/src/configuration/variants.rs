//! What a document may come to: its text, and its text with each set of overrides that one process can have together.
//! Every one of these is checked before the document is accepted.

use std::collections::BTreeMap;

use carillon_agent::document::Violation;
use carillon_agent::layers;
use carillon_agent::target::Target;
use carillon_proto::v1;

use super::MAX_DOCUMENT_BYTES;

/// Most overrides of a document.
const MAX_OVERRIDES: usize = 32;
/// Most texts that a document may come to.
const MAX_VARIANTS: usize = 256;
const MAX_NAME_BYTES: usize = 64;

/// What the document is for processes that these overrides apply to, and no others.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Variant {
    pub overrides: Vec<String>,
    pub yaml: String,
}

impl Variant {
    /// A violation of this text, for who published the document.
    pub(super) fn tell(&self, mut violation: Violation) -> Violation {
        if let [_, ..] = self.overrides.as_slice() {
            let names = self.overrides.join(" and ");
            let word = if self.overrides.len() == 1 { "override" } else { "overrides" };
            violation.message = format!("{} (with {word} {names})", violation.message);
        }
        violation
    }
}

/// Conditions of several targets together.
#[derive(Clone, Default)]
struct Joint {
    /// None: any.
    instances: Option<Vec<String>>,
    /// One of each.
    roles: Vec<Vec<String>>,
    labels: BTreeMap<String, String>,
}

impl Joint {
    /// Who meets these and the target's conditions; None: nobody can.
    fn and(&self, target: &Target) -> Option<Joint> {
        let mut joint = self.clone();
        if !target.instances.is_empty() {
            let both = match &joint.instances {
                Some(known) => known.iter().filter(|id| target.instances.contains(id)).cloned().collect(),
                None => target.instances.clone(),
            };
            if both.is_empty() {
                return None;
            }
            joint.instances = Some(both);
        }
        if !target.roles.is_empty() {
            joint.roles.push(target.roles.clone());
        }
        for (key, value) in &target.labels {
            if joint.labels.insert(key.clone(), value.clone()).is_some_and(|known| known != *value) {
                return None;
            }
        }
        Some(joint)
    }

    /// Does whoever meets these meet the target's as well?
    fn implies(&self, target: &Target) -> bool {
        let within = |few: &[String], many: &[String]| few.iter().all(|one| many.contains(one));
        let instances = target.instances.is_empty()
            || self.instances.as_ref().is_some_and(|known| within(known, &target.instances));
        let roles = target.roles.is_empty() || self.roles.iter().any(|known| within(known, &target.roles));
        instances && roles && target.labels.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

/// Which of these targets one instance can be meant by together, as places in the list: first none. None: in more than
/// `most` ways.
pub(super) fn sets(targets: &[Target], most: usize) -> Option<Vec<Vec<usize>>> {
    let mut sets: Vec<(Vec<usize>, Joint)> = vec![(Vec::new(), Joint::default())];
    for (i, target) in targets.iter().enumerate() {
        let with: Vec<_> = sets
            .iter()
            .filter_map(|(set, joint)| Some(([set.as_slice(), &[i]].concat(), joint.and(target)?)))
            .collect();
        sets.extend(with);
        // Sets that nobody can have are counted, too: the bound is on the work.
        if sets.len() > most {
            return None;
        }
    }
    let possible = sets.into_iter().filter(|(set, joint)| {
        let mut others = targets.iter().enumerate().filter(|(i, _)| !set.contains(i));
        !others.any(|(_, target)| joint.implies(target))
    });
    Some(possible.map(|(set, _)| set).collect())
}

/// All that a document may come to: first itself alone.
pub(super) fn variants(yaml: &str, overrides: &[v1::ConfigOverride]) -> Result<Vec<Variant>, Violation> {
    let targets: Vec<Target> =
        overrides.iter().map(|one| one.target.as_ref().map(Target::from).unwrap_or_default()).collect();
    let sets = sets(&targets, MAX_VARIANTS).ok_or_else(|| {
        let text = format!(
            "these overrides can go together in more than {MAX_VARIANTS} ways: let fewer of them be for the same processes"
        );
        Violation::new("overrides", text)
    })?;
    let variant = |set: Vec<usize>| {
        let chosen = set.iter().map(|&i| &overrides[i]);
        let yaml = layers::merged(yaml, chosen.clone().map(|one| one.yaml.as_str()))?.into_owned();
        Ok(Variant { overrides: chosen.map(|one| one.name.clone()).collect(), yaml })
    };
    sets.into_iter().map(variant).collect()
}

/// Is each override well formed by itself?
pub(super) fn check_overrides(overrides: &[v1::ConfigOverride]) -> Result<(), Violation> {
    if overrides.len() > MAX_OVERRIDES {
        let text = format!("there are {}, at most {MAX_OVERRIDES} are allowed", overrides.len());
        return Err(Violation::new("overrides", text));
    }
    let bytes: usize = overrides.iter().map(|one| one.yaml.len()).sum();
    if bytes > MAX_DOCUMENT_BYTES {
        let text = format!("are {bytes} bytes long together, at most {MAX_DOCUMENT_BYTES} are allowed");
        return Err(Violation::new("overrides", text));
    }
    for one in overrides {
        let wrong = |what: String| Violation::new(format!("overrides.{}", one.name), what);
        let fits = one.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if one.name.is_empty() || one.name.len() > MAX_NAME_BYTES || !fits {
            let text = format!(
                "{:?} is no name for an override: it has from 1 to {MAX_NAME_BYTES} letters, digits, '-' and '_'",
                one.name
            );
            return Err(Violation::new("overrides", text));
        }
        let target = one.target.as_ref().map(Target::from).unwrap_or_default();
        if target.is_empty() {
            return Err(wrong("is for nobody in particular: give it instances, roles or labels".to_owned()));
        }
        if target.per_ten_thousand.is_some() {
            let text = "is for a percentage: what differs for good is for instances, roles or labels; a \
                        percentage is for a release";
            return Err(wrong(text.to_owned()));
        }
        target.check().map_err(wrong)?;
        layers::mapping(&one.yaml).map_err(|violation| wrong(violation.to_string()))?;
    }
    Ok(())
}

/// Takes in an override: what names instances goes over what does not, and of two the later one.
pub(super) fn place(overrides: &mut Vec<v1::ConfigOverride>, one: v1::ConfigOverride) {
    let names_instances =
        |one: &v1::ConfigOverride| one.target.as_ref().is_some_and(|target| !target.instances.is_empty());
    match overrides.iter().position(|known| known.name == one.name) {
        Some(i) if names_instances(&overrides[i]) == names_instances(&one) => overrides[i] = one,
        found => {
            found.map(|i| overrides.remove(i));
            let end = if names_instances(&one) {
                overrides.len()
            } else {
                overrides.iter().position(names_instances).unwrap_or(overrides.len())
            };
            overrides.insert(end, one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(name: &str, instances: &[&str], labels: &[&str], yaml: &str) -> v1::ConfigOverride {
        let all = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        v1::ConfigOverride {
            name: name.into(),
            target: Some(v1::ConfigTarget {
                instances: all(instances),
                labels: all(labels),
                ..Default::default()
            }),
            yaml: yaml.into(),
        }
    }

    fn names(overrides: &[v1::ConfigOverride]) -> Vec<String> {
        let variants = variants("a: 1", overrides).unwrap();
        variants.iter().map(|variant| variant.overrides.join("+")).collect()
    }

    #[test]
    fn only_what_can_go_together_does() {
        let (edge, core) =
            (over("edge", &[], &["pool=edge"], "a: 2"), over("core", &[], &["pool=core"], "a: 3"));
        let one = over("one", &["gw-1"], &[], "a: 4");
        let zone = over("zone", &[], &["pool=edge", "zone=b"], "a: 5");
        assert_eq!(names(&[]), [""]);
        assert_eq!(names(&[edge.clone(), core.clone()]), ["", "edge", "core"]);
        assert_eq!(names(&[edge.clone(), one.clone()]), ["", "edge", "one", "edge+one"]);
        // Who is in the zone is in the pool.
        assert_eq!(names(&[edge.clone(), zone.clone()]), ["", "edge", "edge+zone"]);
        assert_eq!(names(&[one.clone(), over("two", &["gw-2"], &[], "")]), ["", "one", "two"]);
        let texts = variants("a: 1\nb: 1", &[edge, zone]).unwrap();
        let texts: Vec<&str> = texts.iter().map(|variant| variant.yaml.as_str()).collect();
        assert_eq!(texts, ["a: 1\nb: 1", "a: 2\nb: 1\n", "a: 5\nb: 1\n"], "the later goes over the earlier");
    }

    #[test]
    fn there_is_an_end_to_combinations() {
        let pools: Vec<_> =
            (0..32).map(|i| over(&format!("p{i}"), &[], &[&format!("pool=p{i}")], "a: 2")).collect();
        assert_eq!(names(&pools).len(), 33, "pools exclude each other");
        let free: Vec<_> =
            (0..9).map(|i| over(&format!("k{i}"), &[], &[&format!("k{i}=x")], "a: 2")).collect();
        assert_eq!(names(&free[..8]).len(), 256);
        let refused = variants("", &free).unwrap_err().to_string();
        assert!(refused.starts_with("overrides: these overrides can go together in more than 256 ways"));
    }

    #[test]
    fn what_names_instances_goes_over_what_does_not() {
        let mut overrides = Vec::new();
        let order = |overrides: &[v1::ConfigOverride]| {
            overrides.iter().map(|one| one.name.clone()).collect::<Vec<_>>().join(" ")
        };
        place(&mut overrides, over("one", &["gw-1"], &[], ""));
        place(&mut overrides, over("edge", &[], &["pool=edge"], ""));
        place(&mut overrides, over("zone", &[], &["zone=b"], ""));
        place(&mut overrides, over("two", &["gw-2"], &[], ""));
        assert_eq!(order(&overrides), "edge zone one two");
        place(&mut overrides, over("edge", &[], &["pool=edge"], "a: 1"));
        assert_eq!((order(&overrides).as_str(), overrides[0].yaml.as_str()), ("edge zone one two", "a: 1"));
        place(&mut overrides, over("edge", &["gw-3"], &[], ""));
        assert_eq!(order(&overrides), "zone one two edge");
    }

    #[test]
    fn overrides_are_checked_by_themselves() {
        let refused = |one: v1::ConfigOverride| check_overrides(&[one]).unwrap_err().to_string();
        assert!(refused(over("e/f", &["a"], &[], "")).starts_with("overrides: \"e/f\" is no name"));
        assert!(refused(over("e", &[], &[], "")).starts_with("overrides.e: is for nobody in particular"));
        assert!(refused(over("e", &["a b"], &[], "")).starts_with("overrides.e: instance id \"a b\" may"));
        assert!(refused(over("e", &["a"], &[], "- 1")).starts_with("overrides.e: is not a mapping"));
        let mut some = over("e", &["a"], &[], "");
        some.target.as_mut().unwrap().per_ten_thousand = 5;
        assert!(refused(some).starts_with("overrides.e: is for a percentage"));
        let many: Vec<_> = (0..33).map(|i| over(&format!("o{i}"), &["a"], &[], "")).collect();
        assert_eq!(
            check_overrides(&many).unwrap_err().to_string(),
            "overrides: there are 33, at most 32 are allowed"
        );
    }
}
