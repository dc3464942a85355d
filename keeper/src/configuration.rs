//! Typed configuration: documents that are checked before they are accepted, with their history.

mod path;

use std::collections::BTreeMap;

use carillon_agent::document::{DocumentKind, Violation};
use carillon_agent::keys;
use carillon_proto::{now_ms, v1};
use serde_yaml::{Mapping, Value};
use tonic::Status;
use v1::publish_config_request::Change;
use v1::publish_config_response::{ConfigRefused, Outcome};

use crate::core::{Core, compare_mod_revision, decode, delete, put};
use crate::discovery::truncate;
use path::FieldPath;

/// Revisions of a document that are kept.
const HISTORY: usize = 100;
/// Largest document, bytes of YAML.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;
const MAX_NAME_BYTES: usize = 128;
const MAX_AUTHOR_BYTES: usize = 256;
const MAX_COMMENT_BYTES: usize = 1024;
/// Most fields in one change.
const MAX_SETS: usize = 256;
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

    pub(crate) async fn publish_config(
        &self,
        mut request: v1::PublishConfigRequest,
    ) -> Result<v1::PublishConfigResponse, Status> {
        let kind = *self.kind_of(&request.document)?;
        truncate(&mut request.author, MAX_AUTHOR_BYTES);
        truncate(&mut request.comment, MAX_COMMENT_BYTES);
        let _one_at_a_time = self.publishing.lock().await;
        for _ in 0..ATTEMPTS {
            let outcome = match self.try_publish(&kind, &request).await {
                Ok(None) => continue,
                Ok(Some(outcome)) => outcome,
                Err(Refusal::Status(status)) => return Err(status),
                Err(Refusal::Violations(violations)) => {
                    self.metrics.refused.with_label_values(&[kind.kind]).inc();
                    let violations = violations
                        .into_iter()
                        .map(|v| v1::Violation { path: v.path, message: v.message })
                        .collect();
                    Outcome::Refused(ConfigRefused { violations })
                }
            };
            return Ok(v1::PublishConfigResponse { outcome: Some(outcome) });
        }
        Err(Status::aborted(format!("{} is being changed by others at the same time", request.document)))
    }

    /// None: somebody else was faster, try again.
    async fn try_publish(
        &self,
        kind: &DocumentKind,
        request: &v1::PublishConfigRequest,
    ) -> Result<Option<Outcome>, Refusal> {
        self.node.linearize().await.map_err(Status::from)?;
        let document = &request.document;
        let (_, name) = keys::split_document(document);
        let seen = self.node.state().revision();
        let key = keys::config(document);
        let (mod_revision, current) = match self.read::<v1::ConfigRevision>(&key)? {
            Some((mod_revision, current)) => (mod_revision, Some(current)),
            None => (0, None),
        };
        let present = current.as_ref().map_or(0, |current| current.revision);
        if request.expected_revision.is_some_and(|expected| expected != present) {
            return Ok(Some(Outcome::Conflict(present)));
        }
        let present_yaml = current.as_ref().map_or("", |current| current.yaml.as_str());
        let (yaml, what) = match &request.change {
            None => return Err(Status::invalid_argument("the change is missing").into()),
            Some(Change::Yaml(yaml)) => (Some(yaml.clone()), String::new()),
            Some(Change::Sets(sets)) => {
                (Some(set(kind, name, present_yaml, &sets.sets)?), set_text(&sets.sets))
            }
            Some(Change::RollbackTo(to)) => (self.yaml_at(document, *to)?, format!("rolled back to {to}")),
            Some(Change::Delete(_)) => (None, "deleted".to_owned()),
        };
        match &yaml {
            Some(yaml) => self.check(kind, document, name, current.as_ref(), yaml)?,
            None if current.is_none() => {
                return Err(Status::not_found(format!("there is no document {document}")).into());
            }
            None => {}
        }
        if let (Some(yaml), Some(current)) = (&yaml, &current)
            && *yaml == current.yaml
        {
            return Ok(Some(Outcome::Accepted(current.clone())));
        }
        let history = self.history_keys(document);
        let newest = history.last().map_or(0, |(_, revision)| *revision);
        let revision = v1::ConfigRevision {
            document: document.clone(),
            revision: newest + 1,
            deleted: yaml.is_none(),
            yaml: yaml.unwrap_or_default(),
            author: request.author.clone(),
            time_ms: now_ms(),
            comment: if request.comment.is_empty() { what } else { request.comment.clone() },
        };
        if request.dry_run {
            return Ok(Some(Outcome::Accepted(revision)));
        }
        self.check_quota(revision.yaml.len() * 2)?;
        let mut then = vec![put(&keys::history(document, revision.revision), &revision, 0)];
        then.push(if revision.deleted { delete(&key) } else { put(&key, &revision, 0) });
        let excess = (history.len() + 1).saturating_sub(HISTORY);
        then.extend(history.iter().take(excess).map(|(key, _)| delete(key)));
        let mut compare = vec![compare_mod_revision(&key, mod_revision)];
        if kind.named {
            // The rules that were checked are about all documents of the kind.
            let key = keys::config(&format!("{}/", kind.kind));
            compare.push(v1::Compare { key, target: Some(v1::compare::Target::PrefixUnchangedSince(seen)) });
        }
        let written = self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?;
        Ok(written.map(|_| {
            let (author, revision_number) = (&revision.author, revision.revision);
            tracing::info!(document, revision = revision_number, author, "configuration published");
            Outcome::Accepted(revision)
        }))
    }

    fn check(
        &self,
        kind: &DocumentKind,
        document: &str,
        name: Option<&str>,
        current: Option<&v1::ConfigRevision>,
        yaml: &str,
    ) -> Result<(), Refusal> {
        if yaml.len() > MAX_DOCUMENT_BYTES.min(self.limits.request_bytes) {
            let most = MAX_DOCUMENT_BYTES.min(self.limits.request_bytes);
            return Err(Violation::new(
                "",
                format!("is {} bytes long, at most {most} are allowed", yaml.len()),
            )
            .into());
        }
        (kind.check)(name, yaml).map_err(Refusal::Violations)?;
        let mut violations =
            current.map_or_else(Vec::new, |current| (kind.check_change)(name, &current.yaml, yaml));
        if let Some(name) = name {
            let others = self.documents(kind.kind)?.into_iter().filter(|other| other.document != document);
            let others: BTreeMap<String, String> = others
                .filter_map(|other| Some((keys::split_document(&other.document).1?.to_owned(), other.yaml)))
                .collect();
            violations.extend((kind.check_among)(name, yaml, &others));
        }
        if violations.is_empty() { Ok(()) } else { Err(Refusal::Violations(violations)) }
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

    /// What the document said at a revision; None if it was deleted then.
    fn yaml_at(&self, document: &str, revision: u64) -> Result<Option<String>, Status> {
        let found = self.revision(document, revision)?;
        Ok((!found.deleted).then_some(found.yaml))
    }

    fn revision(&self, document: &str, revision: u64) -> Result<v1::ConfigRevision, Status> {
        if let Some((_, found)) = self.read(&keys::history(document, revision))? {
            return Ok(found);
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
        Ok(v1::GetConfigResponse { revision: Some(revision), effective_json })
    }

    pub(crate) async fn list_config(&self, kind: &str) -> Result<v1::ListConfigResponse, Status> {
        self.node.linearize().await?;
        Ok(v1::ListConfigResponse { documents: self.documents(kind)? })
    }

    pub(crate) async fn config_history(
        &self,
        request: v1::ConfigHistoryRequest,
    ) -> Result<v1::ConfigHistoryResponse, Status> {
        self.kind_of(&request.document)?;
        self.node.linearize().await?;
        let limit = if request.limit == 0 { HISTORY } else { request.limit as usize };
        let mut revisions = Vec::new();
        for (key, _) in self.history_keys(&request.document).into_iter().rev().take(limit) {
            if let Some((_, revision)) = self.read(&key)? {
                revisions.push(revision);
            }
        }
        Ok(v1::ConfigHistoryResponse { revisions })
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

/// What a change by fields says of itself. The values are left out: one may be a secret.
fn set_text(sets: &[v1::ConfigSet]) -> String {
    let mut text = format!("set {}", sets.iter().map(|set| set.path.as_str()).collect::<Vec<_>>().join(", "));
    truncate(&mut text, MAX_COMMENT_BYTES);
    text
}

/// The document with some fields changed.
fn set(
    kind: &DocumentKind,
    name: Option<&str>,
    present: &str,
    sets: &[v1::ConfigSet],
) -> Result<String, Refusal> {
    if sets.is_empty() || sets.len() > MAX_SETS {
        return Err(Status::invalid_argument(format!("a change has from 1 to {MAX_SETS} fields")).into());
    }
    let whole = (kind.check)(name, present).or_else(|_| (kind.check)(name, ""));
    let whole = whole.ok().and_then(|whole| serde_yaml::to_value(whole).ok()).unwrap_or(Value::Null);
    let mut paths = Vec::new();
    for set in sets {
        paths.push((FieldPath::parse(&set.path)?, set.value.as_deref()));
    }
    // Again with plain text where a text is wanted: `name=123` and `filter=#` mean what they say.
    let mut as_text = Vec::new();
    for _ in 0..=paths.len() {
        let mut document: Value = if present.trim().is_empty() {
            Value::Mapping(Mapping::new())
        } else {
            serde_yaml::from_str(present).map_err(|error| Violation::new("", error.to_string()))?
        };
        for (i, (path, text)) in paths.iter().enumerate() {
            let value = text.map(|text| {
                if as_text.contains(&i) { Value::String(text.to_owned()) } else { path::value(text) }
            });
            path.apply(&mut document, &whole, value)?;
        }
        let yaml = match document.as_mapping() {
            Some(map) if map.is_empty() => String::new(),
            _ => serde_yaml::to_string(&document).map_err(|error| Violation::new("", error.to_string()))?,
        };
        let Err(violations) = (kind.check)(name, &yaml) else { return Ok(yaml) };
        let before = as_text.len();
        for (i, (path, text)) in paths.iter().enumerate() {
            let path = path.to_string();
            let wants_text =
                violations.iter().any(|v| v.path == path && v.message.contains("expected a string"));
            if wants_text && text.is_some() && !as_text.contains(&i) {
                as_text.push(i);
            }
        }
        if as_text.len() == before {
            return Err(Refusal::Violations(violations));
        }
    }
    Err(Violation::new("", "the values do not fit the fields").into())
}

#[cfg(test)]
mod tests;
