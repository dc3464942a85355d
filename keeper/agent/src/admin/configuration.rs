//! Configuration as people look at it and release it: to some processes first, with what differs and where it comes from.

use carillon_proto::v1;
use serde::Serialize;
use serde_json::Value;

use super::{Admin, AdminError, Applied, Change, ChangeOptions, Revision};
use crate::document::Violation;
use crate::target::Target;

/// What is different for some processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Override {
    pub name: String,
    pub target: Target,
    pub yaml: String,
}

impl From<v1::ConfigOverride> for Override {
    fn from(wire: v1::ConfigOverride) -> Self {
        Override { name: wire.name, target: target(wire.target.as_ref()), yaml: wire.yaml }
    }
}

fn target(wire: Option<&v1::ConfigTarget>) -> Target {
    wire.map(Target::from).unwrap_or_default()
}

/// What was done with a revision that was released to some processes first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// `released`, `targeted`, `promoted`, `abandoned`
    pub what: &'static str,
    pub target: Option<Target>,
    pub author: String,
    /// Unix time, milliseconds.
    pub time_ms: u64,
    pub peer: String,
    pub comment: String,
}

impl From<v1::ConfigStep> for Step {
    fn from(wire: v1::ConfigStep) -> Self {
        use v1::config_step::Kind;
        Step {
            what: match wire.kind() {
                Kind::Released => "released",
                Kind::Targeted => "targeted",
                Kind::Promoted => "promoted",
                Kind::Abandoned => "abandoned",
                Kind::Unspecified => "unknown",
            },
            target: wire.target.as_ref().map(Target::from),
            author: wire.author,
            time_ms: wire.time_ms,
            peer: wire.peer,
            comment: wire.comment,
        }
    }
}

/// A revision that is in force for some processes, while the others keep the current one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Release {
    pub candidate: Revision,
    pub target: Target,
}

impl From<v1::ConfigRelease> for Release {
    fn from(wire: v1::ConfigRelease) -> Self {
        Release { candidate: wire.candidate.unwrap_or_default().into(), target: target(wire.target.as_ref()) }
    }
}

/// What was accepted, and for whom.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Published {
    #[serde(flatten)]
    pub revision: Revision,
    pub differences: Vec<Difference>,
    /// Of a release: the live instances that it is for; and how many read this kind of document.
    pub matched: Vec<String>,
    pub readers: u32,
}

/// What becomes of a revision that is being released.
#[derive(Debug, Clone)]
pub enum ReleaseAction {
    /// From now on to these.
    Target(Target),
    /// It becomes the current revision.
    Promote,
    /// The current revision is in force again for all.
    Abandon,
}

/// One field that differs; None: there is no such field. Secrets are replaced.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    pub path: String,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

impl From<v1::ConfigDifference> for Difference {
    fn from(wire: v1::ConfigDifference) -> Self {
        Difference {
            path: wire.path,
            before: wire.before_json.as_deref().map(json),
            after: wire.after_json.as_deref().map(json),
        }
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// Has an instance what is meant for it?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Applied,
    Lags,
    Refuses,
}

/// What an instance has made of what is meant for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Standing {
    #[serde(flatten)]
    pub applied: Applied,
    pub state: State,
    pub meant_revision: u64,
    /// … because that is being released to it.
    pub by_release: bool,
    pub overrides: Vec<String>,
    /// It has not said anything yet.
    pub silent: bool,
}

impl From<v1::ConfigStanding> for Standing {
    fn from(wire: v1::ConfigStanding) -> Self {
        use v1::config_standing::State as Wire;
        Standing {
            state: match wire.state() {
                Wire::Applied => State::Applied,
                Wire::Refuses => State::Refuses,
                Wire::Lags | Wire::Unspecified => State::Lags,
            },
            applied: wire.applied.unwrap_or_default().into(),
            meant_revision: wire.meant_revision,
            by_release: wire.by_release,
            overrides: wire.overrides,
            silent: wire.silent,
        }
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// `default`, `document`, `override`, `release`
    pub kind: &'static str,
    pub value: Value,
    /// Since when it says so; 0 for defaults.
    pub revision: u64,
    pub author: String,
    pub time_ms: u64,
    pub peer: String,
    /// The override's name.
    #[serde(rename = "override")]
    pub override_name: String,
    /// Of an override or a release: for whom.
    pub target: Option<Target>,
}

impl From<v1::ConfigSource> for Source {
    fn from(wire: v1::ConfigSource) -> Self {
        use v1::config_source::Kind;
        Source {
            kind: match wire.kind() {
                Kind::Default => "default",
                Kind::Document => "document",
                Kind::Override => "override",
                Kind::Release => "release",
                Kind::Unspecified => "unknown",
            },
            value: json(&wire.value_json),
            revision: wire.revision,
            author: wire.author,
            time_ms: wire.time_ms,
            peer: wire.peer,
            override_name: wire.r#override,
            target: wire.target.as_ref().map(Target::from),
        }
    }
}

/// One field, and where its value comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explained {
    pub path: String,
    pub value: Value,
    /// All that say something about it; the last one is the one that counts.
    pub sources: Vec<Source>,
    /// When no instance was asked for: for whom it is another.
    pub elsewhere: Vec<Source>,
}

/// What is in force, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    pub document: String,
    pub revision: u64,
    pub by_release: bool,
    pub overrides: Vec<String>,
    pub standing: Option<Standing>,
    pub values: Vec<Explained>,
}

fn sets(sets: Vec<(String, Option<String>)>) -> v1::ConfigSets {
    v1::ConfigSets { sets: sets.into_iter().map(|(path, value)| v1::ConfigSet { path, value }).collect() }
}

fn to_wire(change: Change) -> v1::publish_config_request::Change {
    use v1::config_override_change::Change as Inner;
    use v1::publish_config_request::Change as Wire;
    let over = |name: String, target: Option<Target>, change| {
        let target = target.map(|target| target.to_wire());
        Wire::Override(v1::ConfigOverrideChange { name, target, change })
    };
    match change {
        Change::Yaml(yaml) => Wire::Yaml(yaml),
        Change::Sets(fields) => Wire::Sets(sets(fields)),
        Change::RollbackTo(revision) => Wire::RollbackTo(revision),
        Change::Delete => Wire::Delete(true),
        Change::Override { name, target, sets: fields } => {
            over(name, target, (!fields.is_empty()).then(|| Inner::Sets(sets(fields))))
        }
        Change::OverrideYaml { name, target, yaml } => over(name, target, Some(Inner::Yaml(yaml))),
        Change::RemoveOverride(name) => over(name, None, Some(Inner::Remove(true))),
    }
}

impl Admin {
    /// As [`Admin::change`], and says what it changes and for whom.
    pub async fn publish_change(
        &self,
        document: &str,
        change: Change,
        options: ChangeOptions,
    ) -> Result<Published, AdminError> {
        use v1::publish_config_response::Outcome;
        let request = v1::PublishConfigRequest {
            document: document.to_owned(),
            change: Some(to_wire(change)),
            expected_revision: options.expected_revision,
            author: options.author,
            comment: options.comment,
            dry_run: options.dry_run,
            release_to: options.release_to.map(|target| target.to_wire()),
        };
        let answer =
            self.write(request, async |mut client, request| client.publish_config(request).await).await?;
        match answer.outcome {
            Some(Outcome::Accepted(revision)) => Ok(Published {
                revision: revision.into(),
                differences: answer.differences.into_iter().map(Into::into).collect(),
                matched: answer.matched,
                readers: answer.readers,
            }),
            Some(Outcome::Refused(refused)) => Err(AdminError::Refused {
                document: document.to_owned(),
                violations: refused
                    .violations
                    .into_iter()
                    .map(|v| Violation::new(v.path, v.message))
                    .collect(),
            }),
            Some(Outcome::Conflict(current)) => Err(AdminError::Conflict {
                document: document.to_owned(),
                expected: options.expected_revision.unwrap_or(0),
                current,
            }),
            None => Err(AdminError::Other("its answer is empty".to_owned())),
        }
    }

    /// Decides what becomes of the revision that is being released, if it is still this one.
    pub async fn release(
        &self,
        document: &str,
        action: ReleaseAction,
        expected: u64,
        author: &str,
        comment: &str,
    ) -> Result<Published, AdminError> {
        use v1::release_config_request::Action;
        use v1::release_config_response::Outcome;
        let action = match action {
            ReleaseAction::Target(target) => Action::Target(target.to_wire()),
            ReleaseAction::Promote => Action::Promote(true),
            ReleaseAction::Abandon => Action::Abandon(true),
        };
        let request = v1::ReleaseConfigRequest {
            document: document.to_owned(),
            action: Some(action),
            expected_revision: expected,
            author: author.to_owned(),
            comment: comment.to_owned(),
        };
        let answer =
            self.write(request, async |mut client, request| client.release_config(request).await).await?;
        match answer.outcome {
            Some(Outcome::Done(revision)) => Ok(Published {
                revision: revision.into(),
                differences: Vec::new(),
                matched: answer.matched,
                readers: answer.readers,
            }),
            Some(Outcome::Conflict(current)) => {
                Err(AdminError::Conflict { document: document.to_owned(), expected, current })
            }
            None => Err(AdminError::Other("its answer is empty".to_owned())),
        }
    }

    /// What differs between two revisions. `to`: None: the current one, or the one that is being released; `from`: None:
    /// the one that `to` was made from. Returns both, and the differences.
    pub async fn diff(
        &self,
        document: &str,
        from: Option<u64>,
        to: Option<u64>,
    ) -> Result<(u64, u64, Vec<Difference>), AdminError> {
        let (from, to) = (from.unwrap_or(0), to.unwrap_or(0));
        let request = v1::DiffConfigRequest { document: document.to_owned(), from, to };
        let answer =
            self.call(request, async |mut client, request| client.diff_config(request).await).await?;
        Ok((answer.from, answer.to, answer.differences.into_iter().map(Into::into).collect()))
    }

    /// Where the values of a document come from: of a field, or of all (an empty path).
    pub async fn explain(
        &self,
        document: &str,
        path: &str,
        instance: Option<&str>,
    ) -> Result<Explanation, AdminError> {
        let request = v1::ExplainConfigRequest {
            document: document.to_owned(),
            path: path.to_owned(),
            instance: instance.unwrap_or_default().to_owned(),
        };
        let answer =
            self.call(request, async |mut client, request| client.explain_config(request).await).await?;
        let value = |value: v1::ConfigValue| Explained {
            path: value.path,
            value: json(&value.value_json),
            sources: value.sources.into_iter().map(Into::into).collect(),
            elsewhere: value.elsewhere.into_iter().map(Into::into).collect(),
        };
        Ok(Explanation {
            document: answer.document,
            revision: answer.revision,
            by_release: answer.by_release,
            overrides: answer.overrides,
            standing: answer.standing.map(Into::into),
            values: answer.values.into_iter().map(value).collect(),
        })
    }

    /// What each instance has made of what is meant for it, of a document or of all.
    pub async fn standings(&self, document: Option<&str>) -> Result<Vec<Standing>, AdminError> {
        let request = v1::ConfigStatusRequest { document: document.unwrap_or_default().to_owned() };
        let answer =
            self.call(request, async |mut client, request| client.config_status(request).await).await?;
        Ok(answer.standings.into_iter().map(Into::into).collect())
    }

    /// What is being released at present.
    pub async fn releases(&self) -> Result<Vec<Release>, AdminError> {
        let request = v1::ListConfigRequest::default();
        let answer =
            self.call(request, async |mut client, request| client.list_config(request).await).await?;
        Ok(answer.releases.into_iter().map(Into::into).collect())
    }
}
