//! The roles behind the gateways: registry, center, saver, coordinator and dispatcher, a module each, and the process
//! that hosts some or all of them.

pub mod center;
pub mod config;
pub mod coordinator;
pub mod dispatcher;
mod host;
pub mod peers;
mod problem;
mod receivers;
pub mod registry;
pub mod saver;
pub mod shares;

pub use host::{Hub, HubError, HubHandle, HubOptions};
