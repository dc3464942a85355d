//! Broken packets, the standard's own examples, and round trips.

mod client;
mod corpus;
mod malformed;
mod round_trip;
mod server;
mod shared;
mod vectors;

use super::super::codec; // by this path also `client` is compiled outside of the tests

/// A packet of a first byte and the parts of its body.
fn packet(first_byte: u8, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut bytes = vec![first_byte];
    codec::encode::varint(&mut bytes, body.len() as u32);
    bytes.extend(body);
    bytes
}

/// A string, or binary data, as it is on the wire.
fn s(text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode::binary(&mut bytes, text.as_ref());
    bytes
}

/// A block of properties, with its length.
fn props(properties: &[&[u8]]) -> Vec<u8> {
    let block = properties.concat();
    let mut bytes = Vec::new();
    codec::encode::varint(&mut bytes, block.len() as u32);
    bytes.extend(block);
    bytes
}
