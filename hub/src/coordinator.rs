//! Sends what devices publish upstream (`{app}/up/{kind}`), and presence events, to the apps' webhooks: at least once.
//!
//! For each app with a webhook one coordinator keeps a session at the saver, with a cursor per topic. It is attached to
//! every registry instance with a wildcard route, so that it learns of new messages at once; what it did not learn of
//! it reads from the log. A cursor moves when the webhook has answered 2xx. An app's webhook that is slow or broken
//! holds up its own topics alone.
//!
//! An app is looked after by one coordinator of those that live ([`is_mine`]); the saver's session fences the others.

mod app;
pub mod event;
mod lane;
mod metrics;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::app::App;
use carillon_agent::document::Violation;
use carillon_agent::{Instance, Live, Role};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::app::{AppHandle, AppTask};
use self::metrics::Metrics;
use crate::config::{HubConfig, within};
use crate::peers::Directory;
use crate::receivers::{Identity, Receivers};

/// User and client id of the session that a coordinator keeps for an app. Devices may not use names with `$` first.
pub const SESSION_NAME: &str = "$coordinator";
/// How long a stop waits for posts that are under way.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Part `coordinator` of the `hub` document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CoordinatorConfig {
    /// Events in one POST.
    pub batch_events: u64,
    /// Payload bytes after which a POST takes no more events.
    pub batch_bytes: u64,
    /// POSTs to one app's webhook at the same time, each with events of one topic.
    pub posts_per_app: u64,
    /// Longest wait between two attempts; it begins with half a second and doubles, jittered.
    pub retry_max_ms: u64,
    /// Messages of an app kept in memory until they are posted; further ones are read from the log again.
    pub queue_messages: u64,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        CoordinatorConfig {
            batch_events: 100,
            batch_bytes: 1024 * 1024,
            posts_per_app: 4,
            retry_max_ms: 60_000,
            queue_messages: 10_000,
        }
    }
}

impl CoordinatorConfig {
    pub(crate) fn check(&self, path: &str, found: &mut Vec<Violation>) {
        within(found, format!("{path}.batch_events"), self.batch_events, 1..=1000);
        within(found, format!("{path}.batch_bytes"), self.batch_bytes, 1024..=4 * 1024 * 1024);
        within(found, format!("{path}.posts_per_app"), self.posts_per_app, 1..=64);
        within(found, format!("{path}.retry_max_ms"), self.retry_max_ms, 500..=3_600_000);
        within(found, format!("{path}.queue_messages"), self.queue_messages, 100..=1_000_000);
    }
}

/// What the coordinator needs.
pub struct CoordinatorDeps {
    pub instance: String,
    pub incarnation: u64,
    pub directory: Directory,
    pub metrics: prometheus::Registry,
}

/// Why a coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the HTTP client for webhooks: {0}")]
    Client(#[from] reqwest::Error),
}

/// A running coordinator.
pub struct Coordinator {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Coordinator {
    pub fn start(deps: CoordinatorDeps) -> Result<Self, CoordinatorError> {
        let metrics = Metrics::new(&deps.metrics)?;
        // A webhook is where the app says it is, and nowhere else.
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .pool_idle_timeout(Duration::from_secs(60))
            .user_agent(concat!("carillon/", env!("CARGO_PKG_VERSION")))
            .build()?;
        let agent = deps.directory.agent();
        let shared = Arc::new(Shared {
            instance: deps.instance,
            incarnation: deps.incarnation,
            apps: agent.configs::<App>(),
            config: agent.config::<HubConfig>(),
            directory: deps.directory.clone(),
            http,
            metrics,
        });
        let stop = CancellationToken::new();
        let identity =
            Identity { name: format!("{}/coordinator", shared.instance), incarnation: shared.incarnation };
        let receivers = Receivers::start(identity, deps.directory.clone(), stop.clone());
        let manager = Manager {
            coordinators: agent.instances(Role::Coordinator),
            apps: shared.apps.clone(),
            shared,
            running: BTreeMap::new(),
            receivers,
        };
        let task = tokio::spawn(manager.run(stop.clone()));
        Ok(Coordinator { stop, task })
    }

    /// Begins no more posts, waits for those under way, gives the sessions back. Bounded by a few seconds.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await.is_err() {
            tracing::warn!("posts to webhooks were still under way when the coordinator was stopped");
            self.task.abort();
        }
    }
}

/// What all tasks of a coordinator use.
struct Shared {
    instance: String,
    incarnation: u64,
    apps: Live<BTreeMap<String, Arc<App>>>,
    config: Live<HubConfig>,
    directory: Directory,
    http: reqwest::Client,
    metrics: Metrics,
}

struct Manager {
    shared: Arc<Shared>,
    apps: Live<BTreeMap<String, Arc<App>>>,
    coordinators: Live<Vec<Instance>>,
    running: BTreeMap<String, AppHandle>,
    receivers: Receivers,
}

impl Manager {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            self.settle();
            tokio::select! {
                Ok(()) = self.apps.changed() => {}
                Ok(()) = self.coordinators.changed() => {}
                () = stop.cancelled() => break,
                // The agent has gone, and so has the process.
                else => break,
            }
        }
        let ended = self.running.into_values().map(|handle| handle.stop(false));
        futures::future::join_all(ended).await;
    }

    /// Makes what runs what should run.
    fn settle(&mut self) {
        let apps = self.apps.borrow_and_update().clone();
        let coordinators = self.coordinators.borrow_and_update().clone();
        let wanted: Vec<&String> = apps
            .iter()
            .filter(|(name, app)| {
                app.webhook.is_some() && is_mine(name, &self.shared.instance, &coordinators)
            })
            .map(|(name, _)| name)
            .collect();
        let mut changed = false;
        let gone: Vec<String> = self.running.keys().filter(|name| !wanted.contains(name)).cloned().collect();
        for name in gone {
            if let Some(handle) = self.running.remove(&name) {
                // Without a webhook nobody will ever want what the session would keep.
                let forget = apps.get(&name).is_none_or(|app| app.webhook.is_none());
                tokio::spawn(handle.stop(forget));
                changed = true;
            }
        }
        for name in wanted {
            if !self.running.contains_key(name) {
                self.running.insert(name.clone(), AppTask::start(name, self.shared.clone()));
                changed = true;
            }
        }
        if changed {
            let route = |(name, handle): (&String, &AppHandle)| (upstream(name).into(), handle.inlet.clone());
            self.receivers.set(self.running.iter().map(route).collect());
        }
    }
}

/// What devices of an app send to its backend.
fn upstream(app: &str) -> String {
    format!("{app}/up/#")
}

/// Of the coordinators that live, the one that an app belongs to: by rendezvous hashing, so that few apps move when one
/// comes or goes.
fn is_mine(app: &str, instance: &str, coordinators: &[Instance]) -> bool {
    let weight = |id: &str| xxhash_rust::xxh3::xxh3_64(format!("{app}\0{id}").as_bytes());
    coordinators
        .iter()
        .filter(|other| !other.draining || other.id == instance)
        .max_by_key(|other| (weight(&other.id), other.id.clone()))
        .is_some_and(|chosen| chosen.id == instance)
}
