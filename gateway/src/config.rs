//! The `gateway` document: limits and manners of every gateway, changed live.

use carillon_agent::document::{ConfigDocument, Violation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::listeners::config::{self as listeners, ListenerConfig};

/// `gateway`. What is changed applies to the next packet or connection; nobody is disconnected by a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Connections in all; a CONNECT above it is refused with "server busy".
    pub max_connections: u32,
    /// Longest MQTT packet accepted from a device, bytes (MQTT 5 Maximum Packet Size).
    pub max_packet_bytes: u32,
    /// From accept to a complete CONNECT.
    pub connect_timeout_ms: u32,
    /// Keep-alive asked of devices that ask for none or for more (MQTT 5 Server Keep Alive), seconds; 0 = theirs.
    pub max_keep_alive_seconds: u16,
    /// Longest session expiry granted, seconds.
    pub max_session_expiry_seconds: u32,
    /// Session expiry of MQTT 3.1.1 devices with clean session 0, which cannot say one, seconds.
    pub default_session_expiry_seconds: u32,
    /// QoS 1 publishes that a device may have unanswered (MQTT 5 Receive Maximum).
    pub receive_maximum: u16,
    /// QoS 1 deliveries that may be unanswered by a device, whatever it allows.
    pub max_inflight: u16,
    /// Subscriptions of one session.
    pub max_subscriptions: u32,
    /// Longest topic name or filter, bytes.
    pub max_topic_bytes: u16,
    /// Bytes queued towards one device: above it QoS 0 messages are dropped, and stored ones wait in the log.
    pub max_outbound_bytes: u32,
    /// How long bytes may wait for a device that does not read before it is disconnected.
    pub write_timeout_ms: u32,
    /// Clock skew allowed when a token's times are checked, seconds.
    pub token_leeway_seconds: u32,
    /// Addresses that devices connect to, besides those of the command line.
    pub listeners: Vec<ListenerConfig>,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        GatewayConfig {
            max_connections: 1_000_000,
            max_packet_bytes: 1024 * 1024,
            connect_timeout_ms: 10_000,
            max_keep_alive_seconds: 0,
            max_session_expiry_seconds: 30 * 24 * 3600,
            default_session_expiry_seconds: 7 * 24 * 3600,
            receive_maximum: 64,
            max_inflight: 64,
            max_subscriptions: 1000,
            max_topic_bytes: 1024,
            max_outbound_bytes: 1024 * 1024,
            write_timeout_ms: 30_000,
            token_leeway_seconds: 60,
            listeners: Vec::new(),
        }
    }
}

impl ConfigDocument for GatewayConfig {
    const KIND: &'static str = "gateway";

    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        let ranges: [(&str, u64, u64, u64); 10] = [
            ("max_connections", self.max_connections.into(), 1, 16_000_000),
            ("max_packet_bytes", self.max_packet_bytes.into(), 128, 16 * 1024 * 1024),
            ("connect_timeout_ms", self.connect_timeout_ms.into(), 100, 100_000),
            ("receive_maximum", self.receive_maximum.into(), 1, 65_535),
            ("max_inflight", self.max_inflight.into(), 1, 65_535),
            ("max_subscriptions", self.max_subscriptions.into(), 1, 100_000),
            (
                "max_topic_bytes",
                self.max_topic_bytes.into(),
                16,
                carillon_proto::topic::MAX_TOPIC_BYTES as u64,
            ),
            ("max_outbound_bytes", self.max_outbound_bytes.into(), 16 * 1024, 256 * 1024 * 1024),
            ("write_timeout_ms", self.write_timeout_ms.into(), 1000, 600_000),
            ("token_leeway_seconds", self.token_leeway_seconds.into(), 0, 3600),
        ];
        ranges
            .iter()
            .filter(|(_, value, low, high)| !(low..=high).contains(&value))
            .map(|(path, value, low, high)| {
                Violation::new(*path, format!("is {value}, must be from {low} to {high}"))
            })
            .chain(listeners::check(&self.listeners))
            .collect()
    }
}
