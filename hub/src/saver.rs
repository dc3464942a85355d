//! The saver: messages kept for who is away. Topic logs, cursors of sessions, retained messages, small records.
//!
//! [`Store`] is what a back end does; [`Embedded`] is the one that needs nothing but a directory;
//! [`SaverService`] serves either over gRPC. [`Saver`] puts them together.

mod claim;
#[doc(hidden)] // For the tests of back ends.
pub mod conformance;
mod embedded;
pub mod metrics;
mod service;
mod store;

use std::path::PathBuf;
use std::sync::Arc;

use carillon_proto::{MAX_GRPC_MESSAGE_BYTES, v1};
use tokio_util::sync::CancellationToken;

pub(crate) use self::claim::Claim;
pub use self::embedded::{DirectoryError, Embedded, Limits};
pub use self::metrics::Metrics;
pub use self::service::{SaverService, ServiceLimits};
pub use self::store::{
    Logs, MAX_BACKLOG_BYTES, MAX_CLIENT_ID_BYTES, MAX_HEADS, MAX_ID_BYTES, MAX_MESSAGE_BYTES,
    MAX_RECORD_BYTES, MAX_RECORD_KEY_BYTES, MAX_RETAINED_BYTES, MAX_SUBSCRIPTIONS, NEVER, Records, Sessions,
    Store, StoreError, StoreResult, Swept,
};

/// How a saver is set up.
#[derive(Debug, Clone)]
pub struct SaverOptions {
    /// The store's own directory; made when it does not exist.
    pub data_dir: PathBuf,
    /// The cluster that the store belongs to: a directory of another one is refused.
    pub cluster: String,
    pub limits: Limits,
    pub service: ServiceLimits,
}

impl SaverOptions {
    /// The defaults, for this directory and cluster.
    pub fn new(data_dir: impl Into<PathBuf>, cluster: impl Into<String>) -> Self {
        SaverOptions {
            data_dir: data_dir.into(),
            cluster: cluster.into(),
            limits: Limits::default(),
            service: ServiceLimits::default(),
        }
    }
}

/// Why a saver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SaverError {
    #[error("saver store: {0}")]
    Directory(#[from] DirectoryError),
    #[error("saver metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The keeper says that another store is the cluster's, or that this process may not have one.
    #[error("{0}")]
    NotTheSaver(String),
    #[error("saver store: opening it was cut short: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// A running saver: the handle that the hub holds. Clones share it.
#[derive(Clone)]
pub struct Saver {
    store: Arc<dyn Store>,
    embedded: Option<Arc<Embedded>>,
    service: SaverService,
    stop: CancellationToken,
}

impl Saver {
    /// Opens the embedded store and registers its metrics. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the directory cannot be used: in use, of another cluster, foreign, damaged; or when the metrics are
    /// registered already.
    pub async fn open(options: SaverOptions, registry: &prometheus::Registry) -> Result<Saver, SaverError> {
        let metrics = Metrics::register(registry)?;
        let SaverOptions { data_dir, cluster, limits, service } = options;
        let store = {
            let metrics = metrics.clone();
            tokio::task::spawn_blocking(move || Embedded::open(&data_dir, &cluster, limits, metrics))
                .await??
        };
        let store = Arc::new(store);
        Ok(Saver { embedded: Some(store.clone()), ..Saver::over(store, service, metrics) })
    }

    /// A saver over a store that is open.
    pub fn over(store: Arc<dyn Store>, limits: ServiceLimits, metrics: Metrics) -> Saver {
        let stop = CancellationToken::new();
        let service = SaverService::new(store.clone(), limits, metrics, stop.clone());
        Saver { store, embedded: None, service, stop }
    }

    /// The gRPC service, with its message limits set, for a tonic router.
    pub fn service(&self) -> v1::saver_server::SaverServer<SaverService> {
        v1::saver_server::SaverServer::new(self.service.clone())
            .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES)
    }

    /// The store itself, for what is not on the wire.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The store, if it is one of which a cluster may have one only.
    pub(crate) fn embedded(&self) -> Option<&Arc<Embedded>> {
        self.embedded.as_ref()
    }

    /// Streams take no more requests, what is pending is written out, the directory is let go of. What is asked
    /// for after this is answered `UNAVAILABLE`.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.store.stop().await;
    }
}
