//! The pods of a GatewayPool: which there are to be, and how they change without dropping who is connected.

pub mod plan;
