//! App resources become the keeper's `app` documents; their keys are taken from Secrets, and follow those.

mod document;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::admin::{Admin, AdminError, Change, ChangeOptions};
use carillon_agent::app::App as Document;
use carillon_agent::document::{ConfigDocument, Violation};
use carillon_operator_api::conditions::{self, Status};
use carillon_operator_api::{App, AppStatus, PushCluster};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use self::document::SecretData;
use crate::controller::{self, RESYNC};
use crate::error::ReconcileError;
use crate::keeper::KeeperError;
use crate::leader::Leadership;
use crate::{Context, FIELD_MANAGER};

pub const KIND: &str = "App";

/// Holds a deleted App until its document is gone from the keeper.
pub const FINALIZER: &str = "carillon.dev/app";
/// An App that is deleted while no keeper answers is let go after this time.
const FORGET_AFTER: Duration = Duration::from_secs(300);
/// What is refused, or missing, is tried again after this time, besides when something changes.
const RETRY: Duration = Duration::from_secs(30);

/// Keys are found in their Secrets.
pub const KEYS_FOUND: &str = "KeysFound";

/// Keeps all documents as their resources say.
pub async fn run(context: Arc<Context>) {
    let apps = controller::of::<App>(context.all());
    let store = apps.store();
    let of_secret = {
        let store = store.clone();
        move |secret: PartialObjectMeta<Secret>| {
            let (namespace, name) = (secret.namespace(), secret.name_any());
            which(&store, |app| app.namespace() == namespace && secrets_of(app).contains(&name))
        }
    };
    let of_cluster = {
        let store = store.clone();
        move |cluster: PushCluster| {
            let (namespace, name) = (cluster.namespace(), cluster.name_any());
            which(&store, |app| app.namespace() == namespace && app.spec.cluster == name)
        }
    };
    // Of Secrets nothing but their names is kept in memory.
    let secrets = controller::followed(context.all::<PartialObjectMeta<Secret>>(), controller::watching());
    let clusters = controller::followed(context.all::<PushCluster>(), controller::watching());
    let apps = apps.watches_stream(secrets, of_secret).watches_stream(clusters, of_cluster);
    let reconcile = move |app, context| reconcile(app, context, store.clone());
    controller::run(KIND, apps, context, reconcile).await;
}

fn which(store: &Store<App>, wanted: impl Fn(&App) -> bool) -> Vec<ObjectRef<App>> {
    store.state_filter(|app| wanted(app)).iter().map(|app| ObjectRef::from_obj(&**app)).collect()
}

/// Names of the Secrets that its keys are in.
fn secrets_of(app: &App) -> BTreeSet<String> {
    let spec = &app.spec;
    let api = spec.api_keys.iter().map(|key| &key.secret_ref);
    let token = spec.token_keys.iter().map(|key| &key.secret_ref);
    let webhook = spec.webhook.iter().filter_map(|webhook| webhook.secret_ref.as_ref());
    api.chain(token).chain(webhook).map(|secret| secret.name.clone()).collect()
}

/// Its name at the keeper.
fn name_of(app: &App) -> String {
    app.spec.name.clone().unwrap_or_else(|| app.name_any())
}

/// The document at the keeper.
fn document_of(app: &App) -> String {
    format!("{}/{}", Document::KIND, name_of(app))
}

async fn reconcile(
    app: Arc<App>,
    context: Arc<Context>,
    store: Store<App>,
) -> Result<Action, ReconcileError> {
    let namespace = app.namespace().ok_or(ReconcileError::Impossible("an App without a namespace"))?;
    let apps: Api<App> = context.within(&namespace);
    if app.meta().deletion_timestamp.is_some() {
        return delete(&app, &namespace, &apps, &context, &store).await;
    }
    if !app.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        let mut finalizers = app.finalizers().to_vec();
        finalizers.push(FINALIZER.to_owned());
        set_finalizers(&apps, &app, &finalizers).await?;
        // The change itself brings it back here.
        return Ok(Action::await_change());
    }
    let outcome = apply(&app, &namespace, &context, &store).await;
    let again = if outcome.error.is_some() || !outcome.is_ready() { RETRY } else { RESYNC };
    tell(&apps, &app, &context, &outcome).await?;
    match outcome.error {
        // By now people can see it; the back-off decides when it is tried again.
        Some(error) => Err(error),
        None => Ok(Action::requeue(again)),
    }
}

/// What became of one attempt.
#[derive(Debug, Default)]
struct Outcome {
    /// Type, status, reason, message.
    conditions: Vec<(&'static str, Status, &'static str, String)>,
    revision: Option<u64>,
    error: Option<ReconcileError>,
}

impl Outcome {
    fn say(
        &mut self,
        type_: &'static str,
        status: impl Into<Status>,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.conditions.push((type_, status.into(), reason, message.into()));
    }

    /// Ready is False for this reason, and whatever else was found out is told, too.
    fn stop(mut self, reason: &'static str, message: impl Into<String>) -> Self {
        self.say(conditions::READY, Status::False, reason, message);
        self
    }

    fn is_ready(&self) -> bool {
        self.conditions
            .iter()
            .any(|(type_, status, ..)| *type_ == conditions::READY && *status == Status::True)
    }
}

/// Brings the keeper's document to what the resource says.
async fn apply(app: &App, namespace: &str, context: &Context, store: &Store<App>) -> Outcome {
    let mut outcome = Outcome::default();
    let name = name_of(app);
    if let Some(other) = older_of_the_same_name(app, store) {
        let message = format!("app {name} is the App {other}'s already: choose another spec.name");
        return outcome.stop("NameTaken", message);
    }
    let clusters: Api<PushCluster> = context.within(namespace);
    let cluster = match clusters.get_opt(&app.spec.cluster).await {
        Ok(Some(cluster)) => cluster,
        Ok(None) => {
            let message =
                format!("spec.cluster: there is no PushCluster {} in {namespace}", app.spec.cluster);
            return outcome.stop("ClusterNotFound", message);
        }
        Err(error) => {
            let message = error.to_string();
            outcome.error = Some(error.into());
            return outcome.stop("KubernetesFailed", message);
        }
    };
    let secrets = match read_secrets(app, &context.within(namespace)).await {
        Ok(secrets) => secrets,
        Err(error) => {
            let message = error.to_string();
            outcome.error = Some(error.into());
            return outcome.stop("KubernetesFailed", message);
        }
    };
    let is_root = cluster.spec.root_app.as_ref() == Some(&name);
    let wanted = match document::build(&app.spec, is_root, &secrets) {
        Ok(wanted) => wanted,
        Err(missing) => {
            let message = list(&missing);
            outcome.say(KEYS_FOUND, Status::False, "KeyNotFound", message.clone());
            return outcome.stop("KeyNotFound", message);
        }
    };
    outcome.say(KEYS_FOUND, Status::True, "Found", "");
    let violations = wanted.check(Some(&name));
    if !violations.is_empty() {
        return refused(outcome, &violations);
    }
    let admin = match context.keepers.of(&context.client, namespace, &app.spec.cluster).await {
        Ok(admin) => admin,
        Err(error) => return failed(outcome, error),
    };
    match publish(&admin, &document_of(app), &wanted, &context.leadership).await {
        Ok(revision) => {
            outcome.revision = Some(revision);
            outcome.say(conditions::CONFIG_ACCEPTED, Status::True, "Accepted", "");
            outcome.say(
                conditions::READY,
                Status::True,
                "Accepted",
                format!("the keeper has it as {}", document_of(app)),
            );
            outcome
        }
        Err(KeeperError::Admin(AdminError::Refused { violations, .. })) => refused(outcome, &violations),
        Err(error) => failed(outcome, error),
    }
}

fn refused(mut outcome: Outcome, violations: &[Violation]) -> Outcome {
    let message = list(&violations.iter().map(document::in_spec).collect::<Vec<_>>());
    outcome.say(conditions::CONFIG_ACCEPTED, Status::False, "Refused", message.clone());
    outcome.stop("Refused", message)
}

fn failed(mut outcome: Outcome, error: KeeperError) -> Outcome {
    let message = error.to_string();
    let reason = match &error {
        KeeperError::NoCertificate { .. } => "KeeperNotReady",
        KeeperError::Admin(AdminError::Unreachable { .. }) => "KeeperUnreachable",
        KeeperError::Admin(AdminError::Denied(_)) => "KeeperDenied",
        _ => "KeeperFailed",
    };
    outcome.error = Some(error.into());
    outcome.stop(reason, message)
}

fn list(violations: &[Violation]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Publishes the document unless it is there as it ought to be; gives its revision.
async fn publish(
    admin: &Admin,
    document: &str,
    wanted: &Document,
    leadership: &Leadership,
) -> Result<u64, KeeperError> {
    let present = match admin.get(document, None).await {
        Ok(present) => Some(present),
        Err(AdminError::NotFound(_)) => None,
        Err(error) => return Err(error.into()),
    };
    let is_as_wanted = |effective: &serde_json::Value| {
        serde_json::from_value::<Document>(effective.clone()).is_ok_and(|present| present == *wanted)
    };
    if let Some(present) = &present
        && is_as_wanted(&present.effective)
        && !present.revision.deleted
    {
        return Ok(present.revision.revision);
    }
    let text = serde_json::to_string(wanted).map_err(|error| AdminError::Other(error.to_string()))?;
    let options = ChangeOptions {
        author: FIELD_MANAGER.to_owned(),
        // What somebody else has published meanwhile is looked at first.
        expected_revision: present.map(|present| present.revision.revision),
        ..ChangeOptions::default()
    };
    leadership.fence()?;
    Ok(admin.publish(document, &text, options).await?.revision)
}

/// Another App of the same name in the same cluster, which was there first.
fn older_of_the_same_name(app: &App, store: &Store<App>) -> Option<String> {
    let age = |app: &App| (app.creation_timestamp(), app.uid());
    let others = store.state_filter(|other| {
        other.namespace() == app.namespace()
            && other.spec.cluster == app.spec.cluster
            && name_of(other) == name_of(app)
            && other.uid() != app.uid()
            && age(other) < age(app)
    });
    others.iter().map(|other| other.name_any()).min()
}

async fn read_secrets(app: &App, secrets: &Api<Secret>) -> Result<BTreeMap<String, SecretData>, kube::Error> {
    let mut found = BTreeMap::new();
    for name in secrets_of(app) {
        if let Some(secret) = secrets.get_opt(&name).await? {
            let data = secret.data.unwrap_or_default();
            found.insert(name, data.into_iter().map(|(key, value)| (key, value.0)).collect());
        }
    }
    Ok(found)
}

/// Writes the status when it differs, and says once what has changed.
async fn tell(
    apps: &Api<App>,
    app: &App,
    context: &Context,
    outcome: &Outcome,
) -> Result<(), ReconcileError> {
    let before = app.status.clone().unwrap_or_default();
    let next = status(app, outcome, Timestamp::now());
    if next == before {
        return Ok(());
    }
    let patch = json!({
        "apiVersion": App::api_version(&()),
        "kind": App::kind(&()),
        "metadata": { "name": app.name_any() },
        "status": next,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    apps.patch_status(&app.name_any(), &params, &Patch::Apply(patch)).await?;
    let ready = |status: &AppStatus| {
        conditions::get(&status.conditions, conditions::READY)
            .map(|ready| (ready.status.clone(), ready.reason.clone(), ready.message.clone()))
    };
    if let Some((status, reason, message)) = ready(&next).filter(|now| ready(&before).as_ref() != Some(now)) {
        match status.as_str() {
            "True" => context.events.normal(app, &reason, "Publish", &message).await,
            _ => context.events.warning(app, &reason, "Publish", &message).await,
        }
    }
    Ok(())
}

fn status(app: &App, outcome: &Outcome, now: Timestamp) -> AppStatus {
    let mut status = app.status.clone().unwrap_or_default();
    status.observed_generation = app.metadata.generation;
    status.name = Some(name_of(app));
    let revision = outcome.revision.and_then(|revision| i64::try_from(revision).ok());
    status.revision = revision.or(status.revision);
    let generation = app.metadata.generation;
    let varies = outcome.error.as_ref().is_some_and(ReconcileError::text_varies);
    for (type_, is, reason, message) in &outcome.conditions {
        let before = conditions::get(&status.conditions, type_).filter(|before| {
            before.status == is.as_str()
                && before.reason == *reason
                && before.observed_generation == generation
        });
        // Of texts that differ at each attempt the first is kept; the log has all of them.
        let message = match before {
            Some(before) if varies => before.message.clone(),
            _ => message.clone(),
        };
        conditions::set(&mut status.conditions, type_, *is, reason, &message, generation, now);
    }
    for type_ in [KEYS_FOUND, conditions::CONFIG_ACCEPTED] {
        if !outcome.conditions.iter().any(|(told, ..)| *told == type_) {
            let message = "not looked at, for the reason that Ready tells";
            conditions::set(
                &mut status.conditions,
                type_,
                Status::Unknown,
                "NotChecked",
                message,
                generation,
                now,
            );
        }
    }
    status
}

/// Takes the document away, and lets the resource go.
async fn delete(
    app: &App,
    namespace: &str,
    apps: &Api<App>,
    context: &Context,
    store: &Store<App>,
) -> Result<Action, ReconcileError> {
    if !app.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        return Ok(Action::await_change());
    }
    if let Err(error) = withdraw(app, namespace, context, store).await {
        let since =
            app.meta().deletion_timestamp.as_ref().map(|since| Timestamp::now().duration_since(since.0));
        if since.is_some_and(|since| since.unsigned_abs() < FORGET_AFTER) {
            return Err(error);
        }
        let note = format!("the keeper could not be told that {} is gone: {error}", document_of(app));
        context.events.warning(app, "DocumentLeft", "Delete", &note).await;
    }
    let others: Vec<String> =
        app.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).cloned().collect();
    set_finalizers(apps, app, &others).await?;
    Ok(Action::await_change())
}

/// Takes the document away from the keeper, if there is one, and if it is this resource's.
async fn withdraw(
    app: &App,
    namespace: &str,
    context: &Context,
    store: &Store<App>,
) -> Result<(), ReconcileError> {
    if older_of_the_same_name(app, store).is_some() {
        return Ok(());
    }
    let clusters: Api<PushCluster> = context.within(namespace);
    let cluster = clusters.get_opt(&app.spec.cluster).await?;
    if cluster.is_none_or(|cluster| cluster.meta().deletion_timestamp.is_some()) {
        // The keeper goes, or is gone, and takes everything with it.
        return Ok(());
    }
    let admin = context.keepers.of(&context.client, namespace, &app.spec.cluster).await?;
    let options = ChangeOptions { author: FIELD_MANAGER.to_owned(), ..ChangeOptions::default() };
    context.leadership.fence().map_err(KeeperError::from)?;
    match admin.change(&document_of(app), Change::Delete, options).await {
        Ok(_) | Err(AdminError::NotFound(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Refused by the API server if the resource is another by now.
async fn set_finalizers(apps: &Api<App>, app: &App, finalizers: &[String]) -> Result<(), ReconcileError> {
    let patch = json!({
        "metadata": { "finalizers": finalizers, "resourceVersion": app.resource_version() },
    });
    match apps.patch(&app.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        // It is gone already.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use carillon_operator_api::AppSpec;

    use super::*;

    fn app() -> App {
        let mut app = App::new("shop", AppSpec::of("main"));
        app.metadata.generation = Some(3);
        app
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_status_that_says_the_same_is_the_same() {
        let mut app = app();
        let outcome = || {
            Outcome { revision: Some(7), ..Outcome::default() }.stop("KeeperUnreachable", "no keeper answers")
        };
        let first = status(&app, &outcome(), at(1));
        app.status = Some(first.clone());
        assert_eq!(status(&app, &outcome(), at(2)), first, "nothing to write");
        let types: Vec<&str> = first.conditions.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, [conditions::READY, conditions::CONFIG_ACCEPTED, KEYS_FOUND]);
        assert!(first.conditions.iter().all(|condition| condition.observed_generation == Some(3)));
        assert_eq!((first.name.as_deref(), first.revision), (Some("shop"), Some(7)));
        app.metadata.generation = Some(4);
        assert_eq!(status(&app, &outcome(), at(2)).observed_generation, Some(4));
    }

    #[test]
    fn a_text_that_is_another_one_each_time_is_written_once() {
        let mut app = app();
        let unreachable = |reason: &str| {
            let keepers = "http://main-keeper:7400".to_owned();
            let error = AdminError::Unreachable { keepers, reason: reason.to_owned() };
            failed(Outcome::default(), error.into())
        };
        let message = |status: &AppStatus| {
            conditions::get(&status.conditions, conditions::READY).unwrap().message.clone()
        };
        let first = status(&app, &unreachable("refused by port 40001"), at(1));
        assert!(message(&first).contains("40001"));
        app.status = Some(first.clone());
        assert_eq!(status(&app, &unreachable("refused by port 40002"), at(2)), first, "nothing to write");
        // Another reason, or another text of what says the same each time, is news.
        let denied = failed(Outcome::default(), AdminError::Denied("no".to_owned()).into());
        assert_eq!(message(&status(&app, &denied, at(3))), "the keeper does not allow it: no");
        let missing = |what: &str| {
            let error = KeeperError::NoCertificate { secret: "s".to_owned(), what: what.to_owned() };
            failed(Outcome::default(), error)
        };
        app.status = Some(status(&app, &missing("is not there"), at(4)));
        assert!(message(&status(&app, &missing("has no ca.crt"), at(5))).ends_with("has no ca.crt"));
        // And so is the same with a resource that has changed.
        app.status = Some(first);
        app.metadata.generation = Some(4);
        assert!(message(&status(&app, &unreachable("refused by port 40003"), at(6))).contains("40003"));
    }

    #[test]
    fn what_is_refused_is_told_in_words_of_the_resource() {
        let violation = Violation::new("token_keys[1].key", "is shorter than 32 bytes");
        let outcome = refused(Outcome::default(), &[violation]);
        let (_, status, reason, message) = &outcome.conditions[0];
        assert_eq!((*status, *reason), (Status::False, "Refused"));
        assert_eq!(message, "spec.tokenKeys[1].secretRef: is shorter than 32 bytes");
        assert!(!outcome.is_ready());
    }
}
