//! What changes for whom when a revision follows another one: an override that is made, changed or taken away changes the
//! document for its processes, and may do so only as any change may.

use std::collections::BTreeSet;

use carillon_agent::document::Violation;
use carillon_agent::layers;
use carillon_agent::target::{Process, Target};
use carillon_proto::v1;

use super::Draft;
use super::variants::{Variant, sets};

/// Most ways in which overrides of both can go together.
const MAX_TRANSITIONS: usize = 512;

/// The document for some processes, before and after.
#[derive(Debug, PartialEq)]
pub(super) struct Transition {
    pub before: Variant,
    pub after: Variant,
}

impl Transition {
    /// A violation of this change, for who published the document.
    pub(super) fn tell(&self, violation: Violation) -> Violation {
        let mut violation = self.after.tell(violation);
        let gone: Vec<&str> = self
            .before
            .overrides
            .iter()
            .filter(|name| !self.after.overrides.contains(name))
            .map(String::as_str)
            .collect();
        if !gone.is_empty() {
            let word = if gone.len() == 1 { "override" } else { "overrides" };
            violation.message = format!("{} (without {word} {})", violation.message, gone.join(" and "));
        }
        violation
    }
}

/// Which overrides are for somebody, as places in the list.
fn chosen(overrides: &[v1::ConfigOverride], applies: impl Fn(&Target) -> bool) -> Vec<usize> {
    let is_for =
        |one: &v1::ConfigOverride| applies(&one.target.as_ref().map(Target::from).unwrap_or_default());
    (0..overrides.len()).filter(|&i| is_for(&overrides[i])).collect()
}

/// A text with these of its overrides.
fn variant(yaml: &str, overrides: &[v1::ConfigOverride], chosen: &[usize]) -> Result<Variant, Violation> {
    let chosen: Vec<_> = chosen.iter().map(|&i| &overrides[i]).collect();
    let text = layers::merged(yaml, chosen.iter().map(|one| one.yaml.as_str()))?.into_owned();
    Ok(Variant { overrides: chosen.into_iter().map(|one| one.name.clone()).collect(), yaml: text })
}

/// What the draft is for processes that are several instances: these may have overrides together that no instance has.
pub(super) fn for_processes(
    document: &str,
    draft: &Draft,
    processes: &[Process],
) -> Result<Vec<Variant>, Violation> {
    let sets: BTreeSet<Vec<usize>> = processes
        .iter()
        .map(|process| chosen(&draft.overrides, |target| target.matches(document, process)))
        .collect();
    sets.iter().map(|set| variant(&draft.yaml, &draft.overrides, set)).collect()
}

/// All that may change for somebody. `processes`: those that are several instances.
pub(super) fn transitions(
    current: &v1::ConfigRevision,
    draft: &Draft,
    processes: &[Process],
) -> Result<Vec<Transition>, Violation> {
    let mut targets: Vec<Target> = Vec::new();
    for one in current.overrides.iter().chain(&draft.overrides) {
        let target = one.target.as_ref().map(Target::from).unwrap_or_default();
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    let sets = sets(&targets, MAX_TRANSITIONS).ok_or_else(|| {
        let text = format!(
            "these overrides and those before them can go together in more than {MAX_TRANSITIONS} ways: change fewer of them at \
             a time"
        );
        Violation::new("overrides", text)
    })?;
    // Each once, in the order in which they are found.
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    let mut add = |applies: &dyn Fn(&Target) -> bool| {
        let (before, after) = (chosen(&current.overrides, applies), chosen(&draft.overrides, applies));
        if seen.insert((before.clone(), after.clone())) {
            let before = variant(&current.yaml, &current.overrides, &before)?;
            let after = variant(&draft.yaml, &draft.overrides, &after)?;
            if before.yaml != after.yaml {
                found.push(Transition { before, after });
            }
        }
        Ok::<(), Violation>(())
    };
    for set in sets {
        add(&|target| set.iter().any(|&i| targets[i] == *target))?;
    }
    for process in processes {
        add(&|target| target.matches(&current.document, process))?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(name: &str, label: &str, yaml: &str) -> v1::ConfigOverride {
        v1::ConfigOverride {
            name: name.into(),
            target: Some(v1::ConfigTarget { labels: vec![label.into()], ..Default::default() }),
            yaml: yaml.into(),
        }
    }

    fn told(
        current: &[v1::ConfigOverride],
        next: &[v1::ConfigOverride],
        processes: &[Process],
    ) -> Vec<String> {
        let current = v1::ConfigRevision {
            document: "gate".into(),
            yaml: "a: 1".into(),
            overrides: current.to_vec(),
            ..Default::default()
        };
        let draft = Draft { yaml: "a: 1".into(), overrides: next.to_vec() };
        let line = |one: &Transition| {
            let side = |one: &Variant| format!("{} [{}]", one.yaml.trim_end(), one.overrides.join("+"));
            format!("{} -> {}", side(&one.before), side(&one.after))
        };
        transitions(&current, &draft, processes).unwrap().iter().map(line).collect()
    }

    #[test]
    fn what_is_taken_away_changes_something_too() {
        let edge = [over("edge", "pool=edge", "a: 2")];
        let zone = over("zone", "zone=b", "a: 3");
        assert_eq!(told(&[], &[], &[]), [] as [&str; 0]);
        assert_eq!(told(&edge, &edge, &[]), [] as [&str; 0]);
        assert_eq!(told(&[], &edge, &[]), ["a: 1 [] -> a: 2 [edge]"]);
        assert_eq!(told(&edge, &[], &[]), ["a: 2 [edge] -> a: 1 []"]);
        // Whose it was, and whose it becomes.
        assert_eq!(
            told(&edge, &[over("edge", "pool=core", "a: 2")], &[]),
            ["a: 2 [edge] -> a: 1 []", "a: 1 [] -> a: 2 [edge]"]
        );
        // With the later one over it, it makes no difference.
        assert_eq!(told(&[edge[0].clone(), zone.clone()], &[zone], &[]), ["a: 2 [edge] -> a: 1 []"]);
        let violation = Violation::new("a", "only grows");
        let before = Variant { overrides: vec!["edge".into()], yaml: String::new() };
        let after = Variant { overrides: Vec::new(), yaml: String::new() };
        let said = Transition { before, after }.tell(violation).to_string();
        assert_eq!(said, "a: only grows (without override edge)");
    }

    #[test]
    fn a_process_of_several_instances_has_what_no_instance_has() {
        let pools = [over("edge", "pool=edge", "a: 2"), over("core", "pool=core", "b: 3")];
        let mut both = Process::default();
        for pool in ["edge", "core"] {
            both.add(pool, &[], [("pool".to_owned(), pool.to_owned())].into());
        }
        let draft = Draft { yaml: "a: 1".into(), overrides: pools.to_vec() };
        let found = for_processes("gate", &draft, &[both.clone()]).unwrap();
        assert_eq!(
            (found[0].overrides.join("+").as_str(), found[0].yaml.as_str()),
            ("edge+core", "a: 2\nb: 3\n")
        );
        assert!(told(&[], &pools, &[]).iter().all(|line| !line.contains("edge+core")));
        assert!(told(&[], &pools, &[both]).contains(&"a: 1 [] -> a: 2\nb: 3 [edge+core]".to_owned()));
    }

    #[test]
    fn there_is_an_end_to_it() {
        let free = |from: usize| -> Vec<_> {
            (from..from + 8).map(|i| over(&format!("k{i}"), &format!("k{i}=x"), "a: 2")).collect()
        };
        let current = v1::ConfigRevision { overrides: free(0), ..Default::default() };
        let draft = |overrides| Draft { yaml: "a: 1".into(), overrides };
        assert!(transitions(&current, &draft(free(0)[1..].to_vec()), &[]).is_ok());
        let refused = transitions(&current, &draft(free(8)), &[]).unwrap_err().to_string();
        assert!(
            refused.starts_with("overrides: these overrides and those before them can go together"),
            "{refused}"
        );
    }
}
