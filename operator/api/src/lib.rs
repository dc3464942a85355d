//! The custom resources of `carillon.dev`, and nothing else: what people write, and what they read of it.
//!
//! What is written here is what `kubectl explain` says, what `crds/` and docs/resources.md hold (`make crds`), and what the
//! API server refuses.

mod app;
pub mod conditions;
mod gateway_pool;
mod pod;
#[allow(clippy::duplicated_attributes, reason = "several columns are of one type")]
mod profile;
mod push_cluster;
mod schema;

pub use app::*;
pub use gateway_pool::*;
pub use pod::*;
pub use profile::*;
pub use push_cluster::*;
pub use schema::crds;

/// The API group of all resources.
pub const GROUP: &str = "carillon.dev";
/// Its only version.
pub const VERSION: &str = "v1alpha1";
