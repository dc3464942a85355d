//! The registry with a real keeper and a real saver, seen from where a gateway and a publisher stand.

#[path = "registry_cluster/broadcasts.rs"]
mod broadcasts;
#[path = "harness/cluster.rs"]
mod harness;
#[path = "registry_cluster/presence.rs"]
mod presence;
#[path = "registry_cluster/publishing.rs"]
mod publishing;
#[path = "registry_cluster/shares.rs"]
mod shares;
