//! Is a draft fit to be published: by its schema, by its rules, after what it follows, among the others of its kind, and in
//! all that it may come to for some process.

use std::collections::BTreeMap;

use carillon_agent::document::{DocumentKind, Violation};
use carillon_agent::keys;
use carillon_proto::v1;
use tonic::Status;

use super::transitions::{Transition, for_processes, transitions};
use super::variants::{check_overrides, variants};
use super::{Draft, MAX_DOCUMENT_BYTES, Refusal};
use crate::core::Core;

impl Core {
    /// `back`: it must be possible to go back to the current one, which is still in force for some.
    pub(super) fn check(
        &self,
        kind: &DocumentKind,
        document: &str,
        name: Option<&str>,
        current: Option<&v1::ConfigRevision>,
        draft: &Draft,
        back: bool,
    ) -> Result<(), Refusal> {
        let most = MAX_DOCUMENT_BYTES.min(self.limits.request_bytes);
        if draft.yaml.len() > most {
            let text = format!("is {} bytes long, at most {most} are allowed", draft.yaml.len());
            return Err(Violation::new("", text).into());
        }
        check_overrides(&draft.overrides)?;
        // By itself first: what is wrong with it would be wrong with everything that it may come to.
        (kind.check)(name, &draft.yaml).map_err(Refusal::Violations)?;
        let others = match name {
            Some(_) => self.others(kind, document)?,
            None => Vec::new(),
        };
        let processes = self.processes_of_several()?;
        let mut all = variants(&draft.yaml, &draft.overrides)?;
        for variant in for_processes(document, draft, &processes)? {
            if !all.contains(&variant) {
                all.push(variant);
            }
        }
        let mut violations = Vec::new();
        for variant in all {
            let found = match ((kind.check)(name, &variant.yaml), name) {
                (Err(found), _) => found,
                (Ok(_), Some(name)) => {
                    others.iter().flat_map(|others| (kind.check_among)(name, &variant.yaml, others)).collect()
                }
                (Ok(_), None) => Vec::new(),
            };
            for violation in found {
                let violation = variant.tell(violation);
                if !violations.contains(&violation) {
                    violations.push(violation);
                }
            }
        }
        if !violations.is_empty() {
            return Err(Refusal::Violations(violations));
        }
        let changes = current.map(|current| transitions(current, draft, &processes)).transpose()?;
        for change in changes.unwrap_or_default() {
            for violation in follows(kind, name, &change, back) {
                let violation = change.tell(violation);
                if !violations.contains(&violation) {
                    violations.push(violation);
                }
            }
        }
        if violations.is_empty() { Ok(()) } else { Err(Refusal::Violations(violations)) }
    }

    /// The other documents of a kind. Each map holds all of them; over all maps each one is all that it may come to: current
    /// or being released, with each set of its overrides.
    fn others(&self, kind: &DocumentKind, document: &str) -> Result<Vec<BTreeMap<String, String>>, Status> {
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let candidates = self.releases(kind.kind)?.into_iter().filter_map(|release| release.candidate);
        for other in self.documents(kind.kind)?.into_iter().chain(candidates) {
            let Some(name) = keys::split_document(&other.document).1 else { continue };
            if other.document == document {
                continue;
            }
            let known = texts.entry(name.to_owned()).or_default();
            match variants(&other.yaml, &other.overrides) {
                Ok(variants) => known.extend(variants.into_iter().map(|variant| variant.yaml)),
                // It was accepted under other rules.
                Err(_) => known.push(other.yaml),
            }
        }
        let most = texts.values().map(Vec::len).max().unwrap_or(1);
        let nth = |i: usize| {
            let one = |(name, texts): (&String, &Vec<String>)| {
                Some((name.clone(), texts.get(i % texts.len().max(1))?.clone()))
            };
            texts.iter().filter_map(one).collect()
        };
        Ok((0..most).map(nth).collect())
    }
}

/// May this follow what the same processes have now?
fn follows(kind: &DocumentKind, name: Option<&str>, change: &Transition, back: bool) -> Vec<Violation> {
    let (before, after) = (&change.before.yaml, &change.after.yaml);
    let mut found = (kind.check_change)(name, before, after);
    if back {
        let no_return = (kind.check_change)(name, after, before).into_iter().map(|mut violation| {
            violation.message = format!(
                "could not be taken back, so it cannot be released to some first: {}",
                violation.message
            );
            violation
        });
        found.extend(no_return);
    }
    found
}
