//! Typed configuration: documents that are checked before they are accepted, with their history.
//!
//! A revision is a text and its overrides, what is different for some processes; it is in force for all at once, or released
//! to some first ([`releases`]). Agents find out by themselves what is meant for them (`carillon_agent::layers`).

mod checks;
mod explain;
pub(crate) mod fields;
mod path;
mod releases;
mod sets;
mod standings;
mod transitions;
mod variants;

use carillon_agent::document::{DocumentKind, Violation};
use carillon_agent::target::Target;
use carillon_agent::{keys, layers};
use carillon_proto::{now_ms, v1};
use tonic::Status;
use v1::publish_config_request::Change;
use v1::publish_config_response::{ConfigRefused, Outcome};

use crate::core::{Core, compare_mod_revision, decode, delete, put};
use crate::discovery::truncate;
use sets::{set, set_text};

/// Revisions of a document that are kept.
const HISTORY: usize = 100;
/// Largest document, bytes of YAML.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;
const MAX_NAME_BYTES: usize = 128;
const MAX_AUTHOR_BYTES: usize = 256;
const MAX_COMMENT_BYTES: usize = 1024;
const ATTEMPTS: usize = 5;

/// What became of a change.
#[derive(Debug)]
enum Refusal {
    Violations(Vec<Violation>),
    Status(Status),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Refusal::Status(status)
    }
}

impl From<Violation> for Refusal {
    fn from(violation: Violation) -> Self {
        Refusal::Violations(vec![violation])
    }
}

/// What a document is to be.
struct Draft {
    yaml: String,
    overrides: Vec<v1::ConfigOverride>,
}

/// Who asks for a change, and from where.
struct Author<'a> {
    name: &'a str,
    comment: &'a str,
    peer: &'a str,
}

impl Core {
    /// The kind that a document is of; an error that says which there are, when there is none.
    pub(crate) fn kind_of(&self, document: &str) -> Result<&DocumentKind, Status> {
        let (kind, name) = keys::split_document(document);
        let Some(found) = self.kinds.iter().find(|known| known.kind == kind) else {
            let known = self.kinds.iter().map(|known| known.kind).collect::<Vec<_>>().join(", ");
            return Err(Status::invalid_argument(format!(
                "there is no kind of document {kind:?}; there are: {known}"
            )));
        };
        match (found.named, name) {
            (true, Some(name)) if !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.contains('/') => {
                Ok(found)
            }
            (true, _) => {
                let text = format!("{document:?} needs a name without slashes, like {kind}/example");
                Err(Status::invalid_argument(text))
            }
            (false, None) => Ok(found),
            (false, Some(_)) => Err(Status::invalid_argument(format!(
                "there is one document {kind} in a cluster, it has no name"
            ))),
        }
    }

    /// `peer`: the address of the caller.
    pub(crate) async fn publish_config(
        &self,
        mut request: v1::PublishConfigRequest,
        peer: &str,
    ) -> Result<v1::PublishConfigResponse, Status> {
        let kind = *self.kind_of(&request.document)?;
        truncate(&mut request.author, MAX_AUTHOR_BYTES);
        truncate(&mut request.comment, MAX_COMMENT_BYTES);
        if let Some(target) = &request.release_to {
            releases::check_target(target)?;
        }
        let _one_at_a_time = self.publishing.lock().await;
        for _ in 0..ATTEMPTS {
            match self.try_publish(&kind, &request, peer).await {
                Ok(None) => {}
                Ok(Some(answer)) => return Ok(answer),
                Err(Refusal::Status(status)) => return Err(status),
                Err(Refusal::Violations(violations)) => {
                    self.metrics.refused.with_label_values(&[kind.kind]).inc();
                    let violations = violations
                        .into_iter()
                        .map(|v| v1::Violation { path: v.path, message: v.message })
                        .collect();
                    return Ok(answer(Outcome::Refused(ConfigRefused { violations })));
                }
            }
        }
        Err(Status::aborted(format!("{} is being changed by others at the same time", request.document)))
    }

    /// None: somebody else was faster, try again.
    async fn try_publish(
        &self,
        kind: &DocumentKind,
        request: &v1::PublishConfigRequest,
        peer: &str,
    ) -> Result<Option<v1::PublishConfigResponse>, Refusal> {
        self.node.linearize().await.map_err(Status::from)?;
        let document = &request.document;
        let (_, name) = keys::split_document(document);
        let seen = self.node.state().revision();
        let (mod_revision, current) = self.current(document)?;
        let present = current.as_ref().map_or(0, |current| current.revision);
        if request.expected_revision.is_some_and(|expected| expected != present) {
            return Ok(Some(answer(Outcome::Conflict(present))));
        }
        let Some(change) = &request.change else {
            return Err(Status::invalid_argument("the change is missing").into());
        };
        let (draft, what) = self.draft(kind, document, current.as_ref(), change)?;
        let release = self.release_of(document)?.map(|(_, release)| release);
        if let Some(release) = &release {
            return releases::while_released(release, draft.as_ref(), request)
                .map(|candidate| Some(answer(Outcome::Accepted(candidate))))
                .map_err(Refusal::Status);
        }
        match &draft {
            Some(draft) => {
                let back = request.release_to.is_some();
                self.check(kind, document, name, current.as_ref(), draft, back)?;
            }
            None if current.is_none() => {
                return Err(Status::not_found(format!("there is no document {document}")).into());
            }
            None if request.release_to.is_some() => {
                let text = format!("{document} can be taken away from all only, not from some first");
                return Err(Status::failed_precondition(text).into());
            }
            None => {}
        }
        if let (Some(draft), Some(current)) = (&draft, &current)
            && draft.yaml == current.yaml
            && draft.overrides == current.overrides
        {
            if request.release_to.is_some() {
                let text =
                    format!("{document} is already so at revision {present}: there is nothing to release");
                return Err(Status::failed_precondition(text).into());
            }
            return Ok(Some(answer(Outcome::Accepted(current.clone()))));
        }
        let newest = self.history_keys(document).last().map_or(0, |(_, revision)| *revision);
        let deleted = draft.is_none();
        let draft = draft.unwrap_or(Draft { yaml: String::new(), overrides: Vec::new() });
        let mut revision = v1::ConfigRevision {
            document: document.clone(),
            revision: newest.max(present) + 1,
            deleted,
            yaml: draft.yaml,
            overrides: draft.overrides,
            author: request.author.clone(),
            time_ms: now_ms(),
            comment: match (request.comment.as_str(), change) {
                ("", _) => what,
                (why, Change::RollbackTo(_)) => format!("{what}: {why}"),
                (why, _) => why.to_owned(),
            },
            peer: peer.to_owned(),
            steps: Vec::new(),
        };
        let mut accepted = v1::PublishConfigResponse {
            differences: fields::differences(kind, name, current.as_ref(), Some(&revision)),
            ..Default::default()
        };
        let mut compare = vec![
            compare_mod_revision(&keys::config(document), mod_revision),
            compare_mod_revision(&keys::release(document), 0),
        ];
        let mut then = Vec::new();
        if let Some(target) = &request.release_to {
            let author = Author { name: &request.author, comment: "", peer };
            releases::note(&mut revision, v1::config_step::Kind::Released, Some(target), &author)?;
            (accepted.matched, accepted.readers) =
                self.matched(document, kind.kind, &Target::from(target))?;
            let release =
                v1::ConfigRelease { candidate: Some(revision.clone()), target: Some(target.clone()) };
            then.push(put(&keys::release(document), &release, 0));
        } else if deleted {
            then.push(delete(&keys::config(document)));
        } else {
            then.push(put(&keys::config(document), &revision, 0));
        }
        accepted.outcome = Some(Outcome::Accepted(revision.clone()));
        if request.dry_run {
            return Ok(Some(accepted));
        }
        self.check_quota(layers_bytes(&revision) * 2)?;
        then.extend(self.history_ops(&revision));
        if kind.named {
            // The rules that were checked are about all documents of the kind.
            for prefix in [keys::CONFIG, keys::RELEASES] {
                let target = Some(v1::compare::Target::PrefixUnchangedSince(seen));
                compare.push(v1::Compare { key: format!("{prefix}{}/", kind.kind), target });
            }
        }
        let written = self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?;
        Ok(written.map(|_| {
            let (author, number) = (&revision.author, revision.revision);
            let released = request.release_to.as_ref().map(|target| Target::from(target).to_string());
            tracing::info!(document, revision = number, author, peer, released, "configuration published");
            accepted
        }))
    }

    /// What the document is to be, None: nothing; and what is done, for the history.
    fn draft(
        &self,
        kind: &DocumentKind,
        document: &str,
        current: Option<&v1::ConfigRevision>,
        change: &Change,
    ) -> Result<(Option<Draft>, String), Refusal> {
        let (_, name) = keys::split_document(document);
        let present = current.map_or("", |current| current.yaml.as_str());
        let overrides = current.map(|current| current.overrides.clone()).unwrap_or_default();
        Ok(match change {
            Change::Yaml(yaml) => (Some(Draft { yaml: yaml.clone(), overrides }), String::new()),
            Change::Sets(sets) => {
                let whole = (kind.check)(name, present).or_else(|_| (kind.check)(name, "")).ok();
                let check = |yaml: &str| (kind.check)(name, yaml).map(drop);
                let yaml = set(present, whole, check, &sets.sets)?;
                (Some(Draft { yaml, overrides }), set_text(&sets.sets))
            }
            Change::RollbackTo(to) => {
                let found = self.revision(document, *to)?;
                let draft = Draft { yaml: found.yaml, overrides: found.overrides };
                ((!found.deleted).then_some(draft), format!("rolled back to {to}"))
            }
            Change::Delete(_) => (None, "deleted".to_owned()),
            Change::Override(change) => {
                let (overrides, what) = overridden(kind, name, present, overrides, change)?;
                (Some(Draft { yaml: present.to_owned(), overrides }), what)
            }
        })
    }

    /// The current revision, and the store's revision that it was written at; 0: there is none.
    fn current(&self, document: &str) -> Result<(u64, Option<v1::ConfigRevision>), Status> {
        Ok(match self.read(&keys::config(document))? {
            Some((mod_revision, current)) => (mod_revision, Some(current)),
            None => (0, None),
        })
    }

    /// Puts a revision into the history; the oldest go.
    fn history_ops(&self, revision: &v1::ConfigRevision) -> Vec<v1::Op> {
        let document = &revision.document;
        let key = keys::history(document, revision.revision);
        let mut known = self.history_keys(document);
        known.retain(|(present, _)| *present != key);
        let excess = (known.len() + 1).saturating_sub(HISTORY);
        let mut ops = vec![put(&key, revision, 0)];
        ops.extend(known.iter().take(excess).map(|(key, _)| delete(key)));
        ops
    }

    /// The current documents of a kind.
    fn documents(&self, kind: &str) -> Result<Vec<v1::ConfigRevision>, Status> {
        let records: Vec<_> = {
            let state = self.node.state();
            state.prefix(keys::CONFIG).map(|(key, item)| (key.to_owned(), item.value.clone())).collect()
        };
        let all = records.into_iter().map(|(key, value)| decode::<v1::ConfigRevision>(&key, value));
        all.filter(|found| {
            found
                .as_ref()
                .map_or(true, |found| kind.is_empty() || keys::split_document(&found.document).0 == kind)
        })
        .collect()
    }

    /// Keys and numbers of the revisions that are kept, oldest first.
    fn history_keys(&self, document: &str) -> Vec<(String, u64)> {
        let prefix = format!("{}{document}/", keys::HISTORY);
        let state = self.node.state();
        let numbers = state.prefix(&prefix).filter_map(|(key, _)| {
            let number = key.strip_prefix(prefix.as_str())?.parse().ok()?;
            Some((key.to_owned(), number))
        });
        numbers.collect()
    }

    fn revision(&self, document: &str, revision: u64) -> Result<v1::ConfigRevision, Status> {
        if let Some((_, found)) = self.read(&keys::history(document, revision))? {
            return Ok(found);
        }
        // Others may have come since, and been taken back: then the history does not reach back to it.
        if let (_, Some(current)) = self.current(document)?
            && current.revision == revision
        {
            return Ok(current);
        }
        let kept = self.history_keys(document);
        let text = match (kept.first(), kept.last()) {
            (Some((_, first)), Some((_, last))) => {
                format!("{document} has no revision {revision}; it has {first} to {last}")
            }
            _ => format!("{document} has no revision {revision}: it was never published"),
        };
        Err(Status::not_found(text))
    }

    pub(crate) async fn get_config(
        &self,
        request: v1::GetConfigRequest,
    ) -> Result<v1::GetConfigResponse, Status> {
        let document = &request.document;
        let kind = self.kind_of(document)?;
        let (_, name) = keys::split_document(document);
        self.node.linearize().await?;
        let revision = if request.revision != 0 {
            self.revision(document, request.revision)?
        } else {
            match self.read::<v1::ConfigRevision>(&keys::config(document))? {
                Some((_, current)) => current,
                None if kind.named => {
                    return Err(Status::not_found(format!("there is no document {document}")));
                }
                None => v1::ConfigRevision { document: document.clone(), ..Default::default() },
            }
        };
        // A revision from before a rule was made need not be valid by today's; it can still be looked at.
        let effective = if revision.deleted { None } else { (kind.check)(name, &revision.yaml).ok() };
        let effective_json = effective.unwrap_or(serde_json::Value::Null).to_string();
        let release = if request.revision == 0 { self.release_of(document)? } else { None };
        let release = release.map(|(_, release)| release);
        Ok(v1::GetConfigResponse { revision: Some(revision), effective_json, release })
    }

    pub(crate) async fn list_config(&self, kind: &str) -> Result<v1::ListConfigResponse, Status> {
        self.node.linearize().await?;
        Ok(v1::ListConfigResponse { documents: self.documents(kind)?, releases: self.releases(kind)? })
    }

    pub(crate) async fn config_history(
        &self,
        request: v1::ConfigHistoryRequest,
    ) -> Result<v1::ConfigHistoryResponse, Status> {
        let kind = self.kind_of(&request.document)?;
        self.node.linearize().await?;
        let limit = if request.limit == 0 { HISTORY } else { request.limit as usize };
        let mut revisions = Vec::new();
        for (key, _) in self.history_keys(&request.document).into_iter().rev().take(limit) {
            if let Some((_, revision)) = self.read(&key)? {
                revisions.push(fields::redacted(kind, revision));
            }
        }
        Ok(v1::ConfigHistoryResponse { revisions })
    }

    pub(crate) async fn diff_config(
        &self,
        request: v1::DiffConfigRequest,
    ) -> Result<v1::DiffConfigResponse, Status> {
        let document = &request.document;
        let kind = self.kind_of(document)?;
        let (_, name) = keys::split_document(document);
        self.node.linearize().await?;
        let to = match request.to {
            0 => match self.release_of(document)?.and_then(|(_, release)| release.candidate) {
                Some(candidate) => Some(candidate),
                None => self.newest(document)?,
            },
            to => Some(self.revision(document, to)?),
        };
        let from = match (request.from, &to) {
            (0, None) => None,
            (0, Some(to)) => self.made_from(to)?,
            (from, _) => Some(self.revision(document, from)?),
        };
        let number = |revision: &Option<v1::ConfigRevision>| revision.as_ref().map_or(0, |one| one.revision);
        Ok(v1::DiffConfigResponse {
            from: number(&from),
            to: number(&to),
            differences: fields::differences(kind, name, from.as_ref(), to.as_ref()),
        })
    }

    /// The newest revision that was for all; it may be that the document was taken away.
    fn newest(&self, document: &str) -> Result<Option<v1::ConfigRevision>, Status> {
        if let (_, Some(current)) = self.current(document)? {
            return Ok(Some(current));
        }
        self.before(document, u64::MAX)
    }

    /// The revision that another one was made from.
    fn made_from(&self, revision: &v1::ConfigRevision) -> Result<Option<v1::ConfigRevision>, Status> {
        self.before(&revision.document, revision.revision)
    }

    /// The last revision before a number that was for all.
    fn before(&self, document: &str, number: u64) -> Result<Option<v1::ConfigRevision>, Status> {
        for (key, found) in self.history_keys(document).into_iter().rev() {
            if found < number
                && let Some((_, found)) = self.read::<v1::ConfigRevision>(&key)?
                && releases::was_for_all(&found)
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    pub(crate) fn config_kinds(&self) -> v1::ConfigKindsResponse {
        let kinds = self.kinds.iter().map(|kind| v1::ConfigKind {
            kind: kind.kind.to_owned(),
            named: kind.named,
            schema_json: (kind.schema)().to_string(),
        });
        v1::ConfigKindsResponse { kinds: kinds.collect() }
    }
}

fn answer(outcome: Outcome) -> v1::PublishConfigResponse {
    v1::PublishConfigResponse { outcome: Some(outcome), ..Default::default() }
}

fn layers_bytes(revision: &v1::ConfigRevision) -> usize {
    revision.yaml.len() + revision.overrides.iter().map(|one| one.yaml.len()).sum::<usize>()
}

/// The overrides with one made, changed or removed; and what is done, for the history.
fn overridden(
    kind: &DocumentKind,
    name: Option<&str>,
    present: &str,
    mut overrides: Vec<v1::ConfigOverride>,
    change: &v1::ConfigOverrideChange,
) -> Result<(Vec<v1::ConfigOverride>, String), Refusal> {
    use v1::config_override_change::Change as Inner;
    let known = overrides.iter().find(|one| one.name == change.name).cloned();
    let what = |what: &str| format!("override {}: {what}", change.name);
    if let Some(Inner::Remove(_)) = &change.change {
        if known.is_none() {
            let names = overrides.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ");
            let there =
                if names.is_empty() { "there is none".to_owned() } else { format!("there are: {names}") };
            return Err(Status::not_found(format!("there is no override {:?}; {there}", change.name)).into());
        }
        overrides.retain(|one| one.name != change.name);
        return Ok((overrides, what("removed")));
    }
    let Some(target) = change.target.clone().or_else(|| known.as_ref()?.target.clone()) else {
        let text =
            format!("override {:?} is new: say whom it is for (instances, roles or labels)", change.name);
        return Err(Status::invalid_argument(text).into());
    };
    let patch = known.map(|one| one.yaml).unwrap_or_default();
    let (yaml, said) = match &change.change {
        Some(Inner::Yaml(yaml)) => (yaml.clone(), what("replaced")),
        Some(Inner::Sets(sets)) => {
            let whole = layers::merged(present, [patch.as_str()])?;
            let whole = (kind.check)(name, &whole).or_else(|_| (kind.check)(name, "")).ok();
            let check = |patch: &str| {
                let merged = layers::merged(present, [patch]).map_err(|violation| vec![violation])?;
                (kind.check)(name, &merged).map(drop)
            };
            (set(&patch, whole, check, &sets.sets)?, what(&set_text(&sets.sets)))
        }
        Some(Inner::Remove(_)) | None => (patch, what(&format!("for {}", Target::from(&target)))),
    };
    let one = v1::ConfigOverride { name: change.name.clone(), target: Some(target), yaml };
    variants::place(&mut overrides, one);
    Ok((overrides, said))
}

#[cfg(test)]
mod tests;
