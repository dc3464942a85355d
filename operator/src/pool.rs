//! The pods of a GatewayPool: which there are to be, how they change without dropping who is connected, what they are made
//! of, and how they are reached.

pub mod plan;
pub mod pods;
pub mod revision;
pub mod service;
