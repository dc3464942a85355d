//! Documents as they are published: read, changed, listed, and what was made of them.

use carillon_proto::v1;

use super::{Admin, AdminError, Override, Release, Step};
use crate::target::Target;

/// One revision of a document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Revision {
    pub document: String,
    /// 1, 2, 3 …; 0 = never published.
    pub revision: u64,
    pub yaml: String,
    pub author: String,
    /// Unix time, milliseconds.
    pub time_ms: u64,
    pub comment: String,
    /// The document was taken away at this revision.
    pub deleted: bool,
    /// Address it was published from, as the keeper saw it.
    pub peer: String,
    /// What is different for some processes.
    pub overrides: Vec<Override>,
    /// If it was released to some processes first: what was done with it.
    pub steps: Vec<Step>,
}

impl From<v1::ConfigRevision> for Revision {
    fn from(revision: v1::ConfigRevision) -> Self {
        Revision {
            document: revision.document,
            revision: revision.revision,
            yaml: revision.yaml,
            author: revision.author,
            time_ms: revision.time_ms,
            comment: revision.comment,
            deleted: revision.deleted,
            peer: revision.peer,
            overrides: revision.overrides.into_iter().map(Into::into).collect(),
            steps: revision.steps.into_iter().map(Into::into).collect(),
        }
    }
}

/// A document as it is published, and as it works.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Document {
    #[serde(flatten)]
    pub revision: Revision,
    /// With all defaults filled in; without overrides.
    pub effective: serde_json::Value,
    /// Of the current revision: what is being released to some processes.
    pub release: Option<Release>,
}

/// A kind of document.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Kind {
    pub kind: String,
    pub named: bool,
    pub schema: serde_json::Value,
}

/// What an instance has made of a document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Applied {
    pub instance: String,
    pub document: String,
    /// 0 = the defaults.
    pub applied_revision: u64,
    /// A later revision that it refused, and why.
    pub refused: Option<(u64, String)>,
    pub time_ms: u64,
}

impl From<v1::AppliedConfig> for Applied {
    fn from(applied: v1::AppliedConfig) -> Self {
        Applied {
            instance: applied.instance,
            document: applied.document,
            applied_revision: applied.applied_revision,
            refused: (!applied.refusal.is_empty()).then_some((applied.refused_revision, applied.refusal)),
            time_ms: applied.time_ms,
        }
    }
}

/// What is to be done with a document.
#[derive(Debug, Clone)]
pub enum Change {
    /// The whole document, YAML or JSON.
    Yaml(String),
    /// Some fields: path and YAML value; None takes the field out, so that its default holds.
    Sets(Vec<(String, Option<String>)>),
    /// Back to what it was at this revision, as a new revision.
    RollbackTo(u64),
    /// Takes the document away.
    Delete,
    /// Makes or changes an override: what is different for some processes.
    Override {
        name: String,
        /// Whom it is for; None: as it is.
        target: Option<Target>,
        /// Path and YAML value; a value of `null` brings the default back, None takes the field out of the override.
        sets: Vec<(String, Option<String>)>,
    },
    /// All fields of an override, YAML.
    OverrideYaml {
        name: String,
        target: Option<Target>,
        yaml: String,
    },
    RemoveOverride(String),
}

/// Who changes a document, and on what conditions.
#[derive(Debug, Clone, Default)]
pub struct ChangeOptions {
    pub author: String,
    pub comment: String,
    /// Refuse with [`AdminError::Conflict`] when the document has another revision.
    pub expected_revision: Option<u64>,
    /// Only check.
    pub dry_run: bool,
    /// To these processes only; [`Admin::release`] decides what becomes of it.
    pub release_to: Option<Target>,
}

impl Admin {
    /// The document as it is now, or as it was at a revision. One that was never published has revision 0 and its
    /// defaults; one of a named kind is then `NotFound`.
    pub async fn get(&self, document: &str, revision: Option<u64>) -> Result<Document, AdminError> {
        let request = v1::GetConfigRequest { document: document.to_owned(), revision: revision.unwrap_or(0) };
        let answer = self.call(request, async |mut client, request| client.get_config(request).await).await?;
        let effective = serde_json::from_str(&answer.effective_json)
            .map_err(|error| AdminError::Other(format!("its answer cannot be read: {error}")))?;
        let release = answer.release.map(Into::into);
        Ok(Document { revision: answer.revision.unwrap_or_default().into(), effective, release })
    }

    /// Changes a document; it is checked before it is accepted.
    pub async fn change(
        &self,
        document: &str,
        change: Change,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        Ok(self.publish_change(document, change, options).await?.revision)
    }

    /// Sets some fields of the current document: `[("limits.max_payload_bytes", Some("65536"))]`.
    pub async fn set(
        &self,
        document: &str,
        sets: Vec<(String, Option<String>)>,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::Sets(sets), options).await
    }

    /// Publishes a whole document.
    pub async fn publish(
        &self,
        document: &str,
        yaml: &str,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::Yaml(yaml.to_owned()), options).await
    }

    /// Makes a former revision the newest again.
    pub async fn rollback(
        &self,
        document: &str,
        to: u64,
        options: ChangeOptions,
    ) -> Result<Revision, AdminError> {
        self.change(document, Change::RollbackTo(to), options).await
    }

    /// All published documents, or those of a kind, by name.
    pub async fn list(&self, kind: Option<&str>) -> Result<Vec<Revision>, AdminError> {
        let request = v1::ListConfigRequest { kind: kind.unwrap_or_default().to_owned() };
        let answer =
            self.call(request, async |mut client, request| client.list_config(request).await).await?;
        Ok(answer.documents.into_iter().map(Into::into).collect())
    }

    /// A document's revisions, newest first.
    pub async fn history(&self, document: &str, limit: u32) -> Result<Vec<Revision>, AdminError> {
        let request = v1::ConfigHistoryRequest { document: document.to_owned(), limit };
        let answer =
            self.call(request, async |mut client, request| client.config_history(request).await).await?;
        Ok(answer.revisions.into_iter().map(Into::into).collect())
    }

    /// Which kinds of document there are.
    pub async fn kinds(&self) -> Result<Vec<Kind>, AdminError> {
        let request = v1::ConfigKindsRequest {};
        let answer =
            self.call(request, async |mut client, request| client.config_kinds(request).await).await?;
        let kind = |kind: v1::ConfigKind| Kind {
            kind: kind.kind,
            named: kind.named,
            schema: serde_json::from_str(&kind.schema_json).unwrap_or(serde_json::Value::Null),
        };
        Ok(answer.kinds.into_iter().map(kind).collect())
    }

    /// What each instance has applied of a document, or of all.
    pub async fn applied(&self, document: Option<&str>) -> Result<Vec<Applied>, AdminError> {
        let request = v1::ConfigStatusRequest { document: document.unwrap_or_default().to_owned() };
        let answer =
            self.call(request, async |mut client, request| client.config_status(request).await).await?;
        Ok(answer.applied.into_iter().map(Into::into).collect())
    }
}
