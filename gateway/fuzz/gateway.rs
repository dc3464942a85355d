//! The part of the gateway that reads what strangers send, compiled from its own files: the rest of the gateway would
//! take minutes to build and only slow the fuzzer down.

#[path = "../src"]
pub mod gateway {
    pub mod codec;
    pub mod websocket;

    /// The client's half of the codec, from its tests.
    #[path = "codec/tests/client.rs"]
    pub mod client;
}
