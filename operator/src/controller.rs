//! What all kinds of resources have in common: how they are watched, and what surrounds each reconcile.

use std::fmt::Debug;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{Predicate, PredicateConfig, WatchStreamExt, predicates, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tracing::Instrument;

use crate::Context;
use crate::backoff::Backoff;
use crate::error::ReconcileError;

/// Resources of a kind that are reconciled at a time.
const CONCURRENCY: u16 = 16;
/// Changes that follow one another this closely are reconciled once.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Longest that one reconcile may take; a wait for something goes by a later one.
const LONGEST: Duration = Duration::from_secs(60);
/// Objects that are listed by one request.
const PAGE: u32 = 500;
/// Everything is looked at again so often, whatever has been missed.
pub const RESYNC: Duration = Duration::from_secs(300);

/// Selects what the operator has made.
pub const MADE_HERE: &str = "app.kubernetes.io/managed-by=carillon-operator";

/// How resources are watched.
pub fn watching() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

/// A controller of a kind. Kept in memory without what nobody here reads.
pub fn of<K>(api: Api<K>) -> Controller<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let seen = watcher(api, watching()).default_backoff().modify(trim).reflect(writer).applied_objects();
    // A status that was written is no reason to look again: one that differs each time would have no end.
    let matters = predicates::generation
        .combine(predicates::labels)
        .combine(predicates::annotations)
        .combine(predicates::finalizers);
    Controller::for_stream(seen.predicate_filter(matters, PredicateConfig::default()), reader)
}

/// Objects that a controller follows besides its own kind; also those that go.
pub fn followed<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = Result<K, watcher::Error>> + Send + 'static
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, config).default_backoff().modify(trim).touched_objects()
}

fn trim<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

/// Has every resource of the kind reconciled, while this process leads, until it is told to stop.
pub async fn run<K, F, R>(kind: &'static str, controller: Controller<K>, context: Arc<Context>, reconcile: F)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone,
    F: Fn(Arc<K>, Arc<Context>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Result<Action, ReconcileError>> + Send + 'static,
{
    let store = controller.store();
    let backoff: Arc<Backoff<ObjectRef<K>>> = Arc::default();
    let succeeded = backoff.clone();
    let reconcile = move |object: Arc<K>, context: Arc<Context>| {
        let (store, backoff, reconcile) = (store.clone(), succeeded.clone(), reconcile.clone());
        async move {
            // Who does not lead has everything in memory and waits here: what is reconciled then is as it is then.
            if !context.leadership.wait().await {
                return Ok(Action::await_change());
            }
            let key = ObjectRef::from_obj(&*object);
            let Some(object) = store.get(&key) else {
                backoff.forget(&key);
                return Ok(Action::await_change());
            };
            let span = tracing::info_span!("reconcile", kind, name = %key);
            let result =
                timed(kind, &context, Box::pin(reconcile(object, context.clone()))).instrument(span).await;
            if result.is_ok() {
                backoff.forget(&key);
            }
            result
        }
    };
    let failed = move |object: Arc<K>, error: &ReconcileError, _: Arc<Context>| {
        let key = ObjectRef::from_obj(&*object);
        let name = key.to_string();
        let again = backoff.failed(key);
        tracing::warn!(kind, name, %error, again_in_ms = again.as_millis() as u64, "not reconciled");
        Action::requeue(again)
    };
    controller
        .with_config(Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .graceful_shutdown_on(context.stop.clone().cancelled_owned())
        .run(reconcile, failed, context)
        .for_each(|result| async move {
            // Failed reconciles have been logged; this is what failed before.
            if let Err(error @ kube::runtime::controller::Error::QueueError(_)) = result {
                tracing::warn!(kind, %error, "cannot be watched at present");
            }
        })
        .await;
}

async fn timed(
    kind: &'static str,
    context: &Context,
    reconcile: impl Future<Output = Result<Action, ReconcileError>>,
) -> Result<Action, ReconcileError> {
    let started = Instant::now();
    let result = tokio::time::timeout(LONGEST, reconcile).await;
    let result = result.unwrap_or(Err(ReconcileError::TooLong(LONGEST.as_secs())));
    let metrics = &context.metrics;
    metrics.reconcile_seconds.with_label_values(&[kind]).observe(started.elapsed().as_secs_f64());
    match &result {
        Ok(_) => metrics.reconciles.with_label_values(&[kind, "ok"]).inc(),
        Err(error) => {
            metrics.reconciles.with_label_values(&[kind, "error"]).inc();
            metrics.errors.with_label_values(&[kind, error.reason()]).inc();
        }
    }
    result
}
