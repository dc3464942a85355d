//! The cluster's documents, handed to the keeper.
//!
//! The resource owns the documents of the kinds that it names, as a whole: what somebody else publishes there is set back at the
//! next look, and the history says so. Overrides, which are for some processes, are left alone, and so are kinds that it does
//! not name, also after it has named them. While a revision is being released to some, nothing is published over it.

use std::collections::BTreeMap;

use carillon_agent::admin::{Admin, AdminError, Change, ChangeOptions};
use carillon_agent::document::Violation;
use carillon_operator_api::PushClusterSpec;
use serde_json::{Map, Value};

/// Who is said to have changed a document; an operator's certificate without a name leaves it to the operator to say.
pub const AUTHOR: &str = "operator";
/// Violations that are told of one document.
const MAX_TOLD: usize = 8;

/// Has the keeper taken all that the resource says?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    Yes,
    No {
        reason: &'static str,
        message: String,
    },
    /// The keeper cannot be asked.
    Unknown(String),
}

/// What was found, and the documents that were published: their names and revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub accepted: Accepted,
    pub published: Vec<(String, u64)>,
}

/// A document as it is to be written: YAML, in the order of its fields.
pub fn yaml(fields: &Map<String, Value>) -> Result<String, serde_yaml::Error> {
    // Sorted, whatever the order that they came in.
    let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
    serde_yaml::to_string(&sorted)
}

/// Is a published document what is wanted?
pub fn is_same(published: &str, wanted: &Map<String, Value>) -> bool {
    match serde_yaml::from_str::<Value>(published) {
        Ok(Value::Object(published)) => equal(&Value::Object(published), &Value::Object(wanted.clone())),
        Ok(Value::Null) => wanted.is_empty(),
        _ => false,
    }
}

/// As JSON goes: 1 and 1.0 are one number.
fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(key, one)| other.get(key).is_some_and(|other| equal(one, other)))
        }
        (one, other) => one == other,
    }
}

/// Publishes what differs. `comment`: why, for the history.
pub async fn hand_over(admin: &Admin, spec: &PushClusterSpec, comment: &str) -> Outcome {
    let mut published = Vec::new();
    let mut problems: Vec<(&'static str, String)> = Vec::new();
    for (kind, fields) in &spec.config {
        match document(admin, kind, fields, comment).await {
            Ok(Some(revision)) => published.push((kind.clone(), revision)),
            Ok(None) => {}
            Err(error) => problems.push(problem(kind, error)),
        }
    }
    if let Some(root) = &spec.root_app {
        match make_root(admin, root, comment).await {
            Ok(mut changed) => published.append(&mut changed),
            Err(error) => problems.push(problem("rootApp", error)),
        }
    }
    Outcome { accepted: summed_up(problems), published }
}

const UNREACHABLE: &str = "KeeperUnreachable";

fn summed_up(problems: Vec<(&'static str, String)>) -> Accepted {
    let told = |of: &dyn Fn(&str) -> bool| {
        let some = problems.iter().filter(|(reason, _)| of(reason)).map(|(_, message)| message.as_str());
        some.collect::<Vec<_>>().join("; ")
    };
    // What is refused does not become better by another that cannot be asked about.
    match problems.iter().find(|(reason, _)| *reason != UNREACHABLE) {
        Some((reason, _)) => Accepted::No { reason, message: told(&|reason| reason != UNREACHABLE) },
        None if problems.is_empty() => Accepted::Yes,
        None => Accepted::Unknown(told(&|_| true)),
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Keeper(#[from] AdminError),
    #[error(
        "revision {0} is being released to some processes: promote or abandon it first (carillon config)"
    )]
    Released(u64),
    #[error("there is no app {0} yet")]
    NoApp(String),
    #[error("it cannot be written as YAML: {0}")]
    Yaml(#[from] serde_yaml::Error),
}

fn problem(document: &str, failure: Failure) -> (&'static str, String) {
    match failure {
        Failure::Keeper(AdminError::Refused { violations, .. }) => {
            ("Refused", refused(document, &violations))
        }
        Failure::Keeper(
            error @ (AdminError::Invalid(_) | AdminError::NotFound(_) | AdminError::Denied(_)),
        ) => ("Refused", format!("{document}: {error}")),
        Failure::Keeper(error) => (UNREACHABLE, format!("{document}: {error}")),
        Failure::Released(_) => ("BeingReleased", format!("{document}: {failure}")),
        Failure::NoApp(_) => ("RootAppMissing", format!("{document}: {failure}")),
        Failure::Yaml(_) => ("Refused", format!("{document}: {failure}")),
    }
}

/// Where in `spec.config`, and what.
fn refused(kind: &str, violations: &[Violation]) -> String {
    let told = violations.iter().take(MAX_TOLD).map(|violation| match violation.path.as_str() {
        "" => format!("spec.config.{kind}: {}", violation.message),
        path => format!("spec.config.{kind}.{path}: {}", violation.message),
    });
    let mut told: Vec<String> = told.collect();
    if violations.len() > MAX_TOLD {
        told.push(format!("and {} more", violations.len() - MAX_TOLD));
    }
    told.join("; ")
}

/// The revision that was published, if it was necessary.
async fn document(
    admin: &Admin,
    kind: &str,
    fields: &Map<String, Value>,
    comment: &str,
) -> Result<Option<u64>, Failure> {
    let found = admin.get(kind, None).await?;
    if found.revision.revision > 0 && !found.revision.deleted && is_same(&found.revision.yaml, fields) {
        return Ok(None);
    }
    if let Some(release) = found.release {
        return Err(Failure::Released(release.candidate.revision));
    }
    let change = Change::Yaml(yaml(fields)?);
    publish(admin, kind, change, found.revision.revision, comment).await
}

async fn publish(
    admin: &Admin,
    document: &str,
    change: Change,
    over: u64,
    comment: &str,
) -> Result<Option<u64>, Failure> {
    let options = ChangeOptions {
        author: AUTHOR.to_owned(),
        comment: comment.to_owned(),
        expected_revision: Some(over),
        ..Default::default()
    };
    match admin.change(document, change, options).await {
        Ok(revision) if revision.revision == over => Ok(None),
        Ok(revision) => {
            tracing::info!(document, revision = revision.revision, over, "configuration published");
            Ok(Some(revision.revision))
        }
        // Somebody was faster: what that comes to is seen at the next look.
        Err(AdminError::Conflict { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// One app is the root app, and the others are not: those first, because there may be one at most.
async fn make_root(admin: &Admin, root: &str, comment: &str) -> Result<Vec<(String, u64)>, Failure> {
    let mut apps: Vec<(String, u64, bool)> = Vec::new();
    for app in admin.list(Some("app")).await? {
        let fields: Value = serde_yaml::from_str(&app.yaml).unwrap_or(Value::Null);
        let is_root = fields.get("root").and_then(Value::as_bool).unwrap_or(false);
        apps.push((app.document, app.revision, is_root));
    }
    let own = format!("app/{root}");
    let mut changed = Vec::new();
    apps.sort_by_key(|(document, ..)| *document == own);
    for (document, revision, is_root) in &apps {
        let wanted = *document == own;
        if *is_root != wanted {
            let sets = Change::Sets(vec![("root".to_owned(), Some(wanted.to_string()))]);
            if let Some(now) = publish(admin, document, sets, *revision, comment).await? {
                changed.push((document.clone(), now));
            }
        }
    }
    if apps.iter().any(|(document, ..)| *document == own) {
        Ok(changed)
    } else {
        Err(Failure::NoApp(root.to_owned()))
    }
}

#[cfg(test)]
mod tests;
