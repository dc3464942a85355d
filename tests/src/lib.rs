//! The harness: real `carillon` processes on ports from the kernel, and the programs that they are tested with.
//!
//! A test reads as a story: start a [`Server`], let some program speak with it, assert what came out. Nothing here
//! knows how Carillon works inside.

pub mod certificates;
pub mod cluster;
pub mod device;
pub mod fleet;
pub mod keepers;
pub mod kubernetes;
pub mod mqtt;
pub mod server;
pub mod swarm;
pub mod tools;
pub mod torture;

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

pub use cluster::Cluster;
pub use server::{Server, carillon};

/// How long a test waits for what must happen, unless it says otherwise. Long, because machines are slow at times;
/// a test that passes never waits for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Asks again and again until the answer is `Ok`; panics with the last `Err` when patience runs out.
pub async fn eventually<T, E: Debug, F: Future<Output = Result<T, E>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return value,
            Err(error) if began.elapsed() > PATIENCE => panic!("{what}: not within {PATIENCE:?}: {error:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// A time within which something must end.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}
