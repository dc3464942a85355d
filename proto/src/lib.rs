//! The gRPC contracts, generated from `proto/`, and the newtypes and small protocols that cross them.

/// The generated messages, clients and servers of package `carillon.v1`.
#[allow(clippy::all, clippy::large_futures, clippy::doc_markdown)] // generated code
pub mod v1 {
    tonic::include_proto!("carillon.v1");
}

pub mod codec;
pub mod exchange;
pub mod filter_tree;
mod moving;
pub mod share;
pub mod topic;

/// The largest gRPC message that any Carillon process sends or accepts.
pub const MAX_GRPC_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as u64)
}
