//! The operator: custom resources in, running pods out, and every change to those safe for who is connected to them.
//!
//! Every process watches and keeps what it needs in memory; only the one that holds the lease acts ([`leader`]). Each kind of
//! resource has a module with a `run`: it says what is watched, and gives [`controller::run`] the function that brings one
//! resource to where it ought to be. Whoever loses the lease stops acting and ends.

pub mod app;
pub mod backoff;
pub mod cluster;
pub mod controller;
pub mod error;
pub mod events;
pub mod keeper;
pub mod leader;
pub mod metrics;
pub mod pool;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use kube::{Api, Client, Config, Resource};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::events::Events;
use crate::keeper::Keepers;
use crate::leader::{Leadership, LeaseOptions, State};
use crate::metrics::Metrics;

/// Who writes, in the eyes of server-side apply.
pub const FIELD_MANAGER: &str = "carillon-operator";

/// How the operator runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Watch this namespace only; None: all of them.
    pub namespace: Option<String>,
    /// What this process is called in the lease and in Events: its pod's name.
    pub identity: String,
    /// Namespace of the lease; None: that of the pod, or the current one of the kubeconfig.
    pub lease_namespace: Option<String>,
    /// How long the lease holds without being renewed.
    pub lease_duration: Duration,
    /// The image of clusters that do not say theirs.
    pub image: String,
    /// How a cluster's keeper is reached: a URL with `{cluster}` and `{namespace}` in it.
    pub keeper_address: String,
    /// Certificates for the keepers are put here as files, in a directory that nobody else can read.
    pub directory: PathBuf,
    pub metrics: prometheus::Registry,
}

/// Why the operator does not start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error("no way to a Kubernetes API server is known: {0}")]
    Configuration(#[from] kube::config::InferConfigError),
    #[error("the Kubernetes client cannot be used: {0}")]
    Client(#[source] kube::Error),
    #[error("metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error(transparent)]
    Leader(#[from] leader::LeaderError),
    #[error("what watches {0} resources has ended")]
    ControllerEnded(&'static str),
    #[error("a task has failed: {0}")]
    Task(String),
}

/// What every reconciler is given.
pub struct Context {
    /// Writes nothing while another leads.
    pub client: Client,
    /// The only namespace that is watched, if not all are.
    pub namespace: Option<String>,
    pub image: String,
    pub metrics: Metrics,
    pub events: Events,
    pub keepers: Keepers,
    pub leadership: Leadership,
    /// No reconcile begins any more once it is cancelled.
    pub stop: CancellationToken,
}

impl Context {
    /// All resources of a kind that are looked after.
    pub fn all<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// The resources of a kind in a namespace.
    pub fn within<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// A running operator.
pub struct OperatorHandle {
    stop: CancellationToken,
    leadership: Leadership,
    ended: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

/// Starts it: returns as soon as it is known where the API server is, whether that answers or not.
pub async fn start(options: Options) -> Result<OperatorHandle, OperatorError> {
    let config = Config::infer().await?;
    let namespace = options.lease_namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let lease =
        LeaseOptions { namespace, identity: options.identity.clone(), duration: options.lease_duration };
    let metrics = Metrics::register(&options.metrics)?;
    let stop = CancellationToken::new();
    let (sender, leadership) = leader::leadership(stop.clone());
    let client = leader::fence(config.clone(), leadership.clone()).map_err(OperatorError::Client)?;
    let context = Arc::new(Context {
        events: Events::new(client.clone(), &options.identity),
        keepers: Keepers::new(options.keeper_address, options.directory),
        namespace: options.namespace,
        image: options.image,
        metrics,
        leadership: leadership.clone(),
        stop: stop.clone(),
        client,
    });
    let (told, ended) = watch::channel(None);
    let task = tokio::spawn({
        let stop = stop.clone();
        async move {
            let result = run(config, lease, sender, context).await;
            stop.cancel();
            if let Err(error) = result {
                told.send_replace(Some(error.to_string()));
            }
        }
    });
    Ok(OperatorHandle { stop, leadership, ended, task })
}

/// Serves until it is told to stop, or a part of it cannot go on.
async fn run(
    config: Config,
    lease: LeaseOptions,
    sender: watch::Sender<State>,
    context: Arc<Context>,
) -> Result<(), OperatorError> {
    let mut controllers = JoinSet::new();
    let stop = context.stop.clone();
    // Not `cluster::run` yet: it has not been shown on a real cluster, and operator/rbac.yaml has not what it needs.
    controllers.spawn(ended(app::KIND, app::run(context.clone())));
    let letting_go = CancellationToken::new();
    let leading = leader::hold(config, lease, sender, context.metrics.leads.clone(), letting_go.clone());
    tokio::pin!(leading);
    tokio::select! {
        // With the set, everything ends that acts.
        result = &mut leading => return Ok(result?),
        Some(joined) = controllers.join_next() => match joined {
            Ok(_) if stop.is_cancelled() => {}
            Ok(kind) => return Err(OperatorError::ControllerEnded(kind)),
            Err(error) => return Err(OperatorError::Task(error.to_string())),
        },
    }
    // What was begun is brought to its end first, and the lease renewed until then.
    tokio::select! {
        result = &mut leading => return Ok(result?),
        () = async { while controllers.join_next().await.is_some() {} } => {}
    }
    letting_go.cancel();
    Ok(leading.await?)
}

async fn ended(kind: &'static str, controller: impl Future<Output = ()>) -> &'static str {
    controller.await;
    kind
}

impl OperatorHandle {
    /// Why it cannot do its work at present; not being the leader is no reason.
    pub fn unmet(&self) -> Vec<String> {
        readiness(&self.leadership, &self.ended)
    }

    /// The same, for whoever looks at it while another owns the handle.
    pub fn readiness(&self) -> impl Fn() -> Vec<String> + Send + Sync + 'static {
        let (leadership, ended) = (self.leadership.clone(), self.ended.clone());
        move || readiness(&leadership, &ended)
    }

    /// Resolves when it cannot go on, with the reason.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            let reason = match ended.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone(),
                Err(_) => None,
            };
            match reason {
                Some(reason) => reason,
                None => std::future::pending().await,
            }
        }
    }

    /// Lets go of what is under way, and of the lease, so that another need not wait.
    pub async fn stop(self) {
        self.stop.cancel();
        // A task that has panicked has said so.
        let _ = self.task.await;
    }
}

fn readiness(leadership: &Leadership, ended: &watch::Receiver<Option<String>>) -> Vec<String> {
    let failure = ended.borrow().clone();
    match failure {
        Some(reason) => vec![reason],
        None if !leadership.is_known() => vec!["the API server has not answered yet".to_owned()],
        None => Vec::new(),
    }
}
