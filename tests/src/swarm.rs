//! A swarm: tens of thousands of MQTT devices in one process with one thread, to hold and to load a gateway with.
//!
//! It is a tool, not a client library: bare sockets on one epoll, 24 bytes a device and 8 for its next ping, nothing else
//! that grows with their number. It is driven by lines on its stdin and answers with JSON lines (see [`status`]), and
//! ends when its stdin does, so that it never outlives who started it.

pub mod crowd;
pub mod histogram;
pub mod status;
pub mod sys;
pub mod wheel;
pub mod wire;
