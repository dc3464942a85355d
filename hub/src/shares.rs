//! Shared subscriptions (MQTT 5.0 §4.8.2): each message goes to one member of a share, over all gateways.
//!
//! A share has one home, the registry instance that owns the slot of its name. There a task ([`home`]) gets what the
//! share's filter matches, as any other receiver does, and hands it out by the rules in [`share`]; what is stored is
//! read from the logs where it was not delivered live, from the cursors of a session that the share has of its own at the
//! saver. So a share loses nothing that a kept session would not lose, and plain subscriptions do not know of any of this.
//!
//! [`service`] is what gateways speak to.

mod batches;
mod home;
mod metrics;
mod service;
mod session;
mod share;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use carillon_agent::document::Violation;
use carillon_agent::{Live, SlotMap};
use carillon_proto::share as naming;
use carillon_proto::v1::{self, shares_down, shares_server::SharesServer};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::home::{Command, Home};
use self::metrics::Metrics;
use self::share::Limits;
use crate::config::{HubConfig, within};
use crate::peers::Directory;
use crate::receivers::{Identity, Inlet, Receivers};
use crate::registry::Ownership;

/// How long a stop waits for the last cursors to be written.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Part `shares` of the `hub` document: shared subscriptions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SharesConfig {
    /// Messages of one share that may wait or be with members. Beyond it those that are stored stay in their logs, and
    /// others are dropped.
    pub queue_messages: u64,
    /// Their bytes.
    pub queue_bytes: u64,
    /// Shares at home in one instance; who would be the first member of another is refused.
    pub max_shares: u64,
}

impl Default for SharesConfig {
    fn default() -> Self {
        SharesConfig { queue_messages: 10_000, queue_bytes: 16 * 1024 * 1024, max_shares: 10_000 }
    }
}

impl SharesConfig {
    pub(crate) fn check(&self, path: &str, found: &mut Vec<Violation>) {
        within(found, format!("{path}.queue_messages"), self.queue_messages, 1..=1_000_000);
        within(found, format!("{path}.queue_bytes"), self.queue_bytes, 64 * 1024..=1024 * 1024 * 1024);
        within(found, format!("{path}.max_shares"), self.max_shares, 1..=1_000_000);
    }

    fn limits(&self) -> Limits {
        Limits { messages: self.queue_messages as usize, bytes: self.queue_bytes as usize }
    }
}

/// What shared subscriptions need.
pub struct SharesDeps {
    pub instance: String,
    pub incarnation: u64,
    pub directory: Directory,
    pub ownership: Ownership,
    pub metrics: prometheus::Registry,
}

/// The shares that are at home in this instance.
pub struct Shares {
    shared: Arc<Shared>,
}

/// What all tasks use.
struct Shared {
    instance: String,
    incarnation: u64,
    directory: Directory,
    ownership: Ownership,
    config: Live<HubConfig>,
    metrics: Metrics,
    homes: Mutex<HashMap<Arc<str>, HomeHandle>>,
    /// What the filters of the homes match comes in through these.
    receivers: Receivers,
    next_stream: AtomicU64,
    stop: CancellationToken,
    tasks: TaskTracker,
}

struct HomeHandle {
    commands: mpsc::UnboundedSender<Command>,
    filter: Arc<str>,
    inlet: Inlet,
}

impl Shares {
    /// Serves at once. Errors when its metrics are registered twice.
    pub fn start(deps: SharesDeps) -> Result<Self, prometheus::Error> {
        let agent = deps.directory.agent();
        let stop = CancellationToken::new();
        let identity = Identity { name: format!("{}/shares", deps.instance), incarnation: deps.incarnation };
        let shared = Arc::new(Shared {
            receivers: Receivers::start(identity, deps.directory.clone(), stop.clone()),
            config: agent.config::<HubConfig>(),
            metrics: Metrics::new(&deps.metrics)?,
            instance: deps.instance,
            incarnation: deps.incarnation,
            directory: deps.directory,
            ownership: deps.ownership,
            homes: Mutex::default(),
            next_stream: AtomicU64::new(1),
            stop,
            tasks: TaskTracker::new(),
        });
        Ok(Shares { shared })
    }

    pub fn service(&self) -> SharesServer<impl v1::shares_server::Shares> {
        SharesServer::new(service::Service(self.shared.clone()))
            .max_decoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
    }

    /// Hands nothing more out, has the last cursors written, ends the streams. The shares' sessions stay open: the
    /// gateways join again where they are at home then.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(STOP_TIMEOUT, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!("cursors of shared subscriptions were not all written when they were stopped");
        }
    }
}

impl Shared {
    /// Tells a share's home, which begins with the first member.
    fn tell(self: &Arc<Self>, key: &Arc<str>, command: Command) {
        let mut homes = self.homes.lock();
        if let Some(home) = homes.get(key) {
            let _ = home.commands.send(command);
            return;
        }
        // Whoever leaves, or is done with something, is of a home that has ended.
        let Command::Join { id, outlet, .. } = &command else { return };
        let max = self.config.borrow().shares.max_shares;
        if homes.len() as u64 >= max {
            let text = format!("this instance is home to {max} shares already");
            self.metrics.refused.inc();
            tracing::debug!(share = %key, text, "a shared subscription is refused");
            let refused = shares_down::Body::Refused(v1::MemberRefused { member: id.1, text });
            let _ = outlet.send(Ok(v1::SharesDown { body: Some(refused) }));
            return;
        }
        let Some((_, filter)) = naming::parse(key) else { return };
        let (handle, home) = Home::new(self.clone(), key.clone(), filter.into());
        let _ = handle.commands.send(command);
        homes.insert(key.clone(), handle);
        self.metrics.shares.set(homes.len() as i64);
        self.publish_routes(&homes);
        drop(homes);
        self.tasks.spawn(home.run());
    }

    /// Forgets a home, unless `is_wanted` (asked with the table locked) says that it has come to be needed again.
    fn end(&self, key: &str, is_wanted: impl FnOnce() -> bool) -> bool {
        let mut homes = self.homes.lock();
        if is_wanted() {
            return false;
        }
        homes.remove(key);
        self.metrics.shares.set(homes.len() as i64);
        self.publish_routes(&homes);
        true
    }

    fn publish_routes(&self, homes: &HashMap<Arc<str>, HomeHandle>) {
        self.receivers.set(homes.values().map(|home| (home.filter.clone(), home.inlet.clone())).collect());
    }

    fn slots(&self) -> Live<SlotMap> {
        self.ownership.slots()
    }
}
