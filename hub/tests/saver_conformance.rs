//! The conformance suite of the saver, run against the embedded back end.

use std::sync::Arc;

use async_trait::async_trait;
use carillon_hub::saver::conformance::Factory;
use carillon_hub::saver::{Embedded, Limits, Metrics, Store};

struct Directories(tempfile::TempDir);

#[async_trait]
impl Factory for Directories {
    async fn open(&self, name: &str) -> Arc<dyn Store> {
        let path = self.0.path().join(name);
        let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
        let limits = Limits { reserve_bytes: 0, ..Limits::default() };
        Arc::new(Embedded::open(&path, "test", limits, metrics).expect("the store opens"))
    }
}

fn directories() -> Arc<dyn Factory> {
    Arc::new(Directories(tempfile::tempdir().expect("a directory")))
}

carillon_hub::saver_conformance!(directories);
