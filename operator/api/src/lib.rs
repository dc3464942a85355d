//! The custom resources of `carillon.dev`, and nothing else: what people write, and what they read of it.
