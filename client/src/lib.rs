//! The Rust SDK: [`Device`] receives and publishes over MQTT 5, [`Backend`] pushes over HTTP.
//!
//! ```no_run
//! use carillon_client::{Device, DeviceOptions, Event};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let options = DeviceOptions::new("demo", "alice").address("mqtt://127.0.0.1:1883");
//! let mut device = Device::start(options)?;
//! while let Some(event) = device.next().await {
//!     if let Event::Message(message) = event {
//!         println!("{}: {}", message.topic, String::from_utf8_lossy(&message.payload));
//!     }
//! }
//! # Ok(()) }
//! ```

pub mod backend;
pub mod device;

pub use backend::{ApiError, Backend, Problem};
pub use device::{Device, DeviceOptions, Event, Message};
