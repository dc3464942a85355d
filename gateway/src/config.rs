//! The `gateway` document: limits and manners of every gateway, changed live.

use carillon_agent::document::{ConfigDocument, Violation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::admission::Network;
use crate::listeners::config::{self as listeners, ListenerConfig};

/// Entries of `allow` and of `deny`: the lists are walked for each connection.
const MAX_NETWORKS: u64 = 1000;

/// `gateway`. What is changed applies to the next packet or connection; nobody is disconnected by a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Connections in all; a CONNECT above it is refused with "server busy".
    pub max_connections: u32,
    /// Connections from one address (IPv6: one /64), closed at once above it; 0 = no limit.
    pub max_connections_per_ip: u32,
    /// Networks that may connect (`10.0.0.0/8`, `2001:db8::/32`, `192.0.2.1`); none: all.
    pub allow: Vec<String>,
    /// Networks that may not, also if they are among `allow`. Both lists hold for connected devices, too.
    pub deny: Vec<String>,
    /// Connections accepted per second; what comes faster waits in the kernel's queue; 0 = no limit.
    pub connect_rate_per_second: u32,
    /// Connections accepted at once before the rate holds.
    pub connect_burst: u32,
    /// Connections that have not sent a complete CONNECT; above it the oldest of them is closed.
    pub max_pending_connects: u32,
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
    /// Publishes of QoS 1 and 2 that a device may have unanswered (MQTT 5 Receive Maximum).
    pub receive_maximum: u16,
    /// Deliveries of QoS 1 and 2 that may be unanswered by a device, whatever it allows.
    pub max_inflight: u16,
    /// Topic aliases that a device may use (MQTT 5 Topic Alias Maximum), and that are used towards it if it allows as many;
    /// each that is in use costs the length of its topic. 0 = none.
    pub topic_alias_maximum: u16,
    /// Subscriptions of one session.
    pub max_subscriptions: u32,
    /// Those among them that hold a wildcard.
    pub max_wildcard_subscriptions: u32,
    /// Longest topic name or filter, bytes.
    pub max_topic_bytes: u16,
    /// Most levels of a topic name or filter, its app's included.
    pub max_topic_levels: u8,
    /// PUBLISH packets per second of one connection (an app may say its own); above it the connection is not read for a
    /// while; 0 = no limit.
    pub publish_messages_per_second: u32,
    /// The same for their payload bytes.
    pub publish_bytes_per_second: u32,
    /// Bytes queued towards one device: above it QoS 0 messages are dropped, and stored ones wait in the log.
    pub max_outbound_bytes: u32,
    /// How long bytes may wait for a device that does not read before it is disconnected.
    pub write_timeout_ms: u32,
    /// Clock skew allowed when a token's times are checked, seconds.
    pub token_leeway_seconds: u32,
    /// CONNECTs and SUBSCRIBEs with credentials that prove nothing, from one address (IPv6: one /64) within
    /// `auth_failure_window_seconds`, before the address is refused for `auth_block_seconds`; 0 = no limit.
    pub max_auth_failures: u32,
    pub auth_failure_window_seconds: u32,
    pub auth_block_seconds: u32,
    pub overload: OverloadConfig,
    /// Addresses that devices connect to, besides those of the command line.
    pub listeners: Vec<ListenerConfig>,
    /// How long a kept session whose connection dropped stays here, to go on when its device comes back; 0 = not. As long
    /// may a device that was sent to another gateway take to arrive there before it counts as away.
    pub resume_window_seconds: u32,
    /// A device that connected less than this ago is not moved by a rebalance, so that none is sent round in circles.
    pub rebalance_cooldown_seconds: u32,
    /// How devices are sent to other gateways unless the command says otherwise, and when the process is told to stop.
    pub drain: DrainConfig,
}

/// When CONNECTs are refused with "server busy" so that those who are connected are served on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OverloadConfig {
    /// Memory used, of the tightest limit that holds for this process: from here on CONNECTs are refused …
    pub memory_high_ratio: f64,
    /// … until it is below this again.
    pub memory_low_ratio: f64,
    /// The limit, if it is not to be read from the system (cgroups and the machine's memory), bytes; 0 = read it.
    pub memory_limit_bytes: u64,
    /// Longest round of a shard's loop: above it CONNECTs are refused until it is below half of it; 0 = no limit.
    pub loop_lag_ms: u32,
}

impl Default for OverloadConfig {
    fn default() -> Self {
        OverloadConfig {
            memory_high_ratio: 0.85,
            memory_low_ratio: 0.80,
            memory_limit_bytes: 0,
            loop_lag_ms: 1000,
        }
    }
}

/// Part `drain` of the `gateway` document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DrainConfig {
    /// Devices sent away each second.
    pub rate_per_second: f64,
    /// Who is still there after this time is closed at once, seconds.
    pub deadline_seconds: u32,
}

impl Default for DrainConfig {
    fn default() -> Self {
        DrainConfig { rate_per_second: 1000.0, deadline_seconds: 1800 }
    }
}

/// Devices that can be asked to be moved each second.
pub const MOVE_RATES: std::ops::RangeInclusive<f64> = 0.1..=1_000_000.0;
/// The longest that a drain may take, seconds.
pub const DRAIN_SECONDS: std::ops::RangeInclusive<u32> = 1..=86_400;

impl Default for GatewayConfig {
    fn default() -> Self {
        GatewayConfig {
            max_connections: 1_000_000,
            max_connections_per_ip: 0,
            allow: Vec::new(),
            deny: Vec::new(),
            connect_rate_per_second: 10_000,
            connect_burst: 30_000,
            max_pending_connects: 20_000,
            max_packet_bytes: 1024 * 1024,
            connect_timeout_ms: 10_000,
            max_keep_alive_seconds: 0,
            max_session_expiry_seconds: 30 * 24 * 3600,
            default_session_expiry_seconds: 7 * 24 * 3600,
            receive_maximum: 64,
            max_inflight: 64,
            topic_alias_maximum: 16,
            max_subscriptions: 1000,
            max_wildcard_subscriptions: 100,
            max_topic_bytes: 1024,
            max_topic_levels: carillon_proto::topic::MAX_TOPIC_LEVELS as u8,
            publish_messages_per_second: 10_000,
            publish_bytes_per_second: 32 * 1024 * 1024,
            max_outbound_bytes: 1024 * 1024,
            write_timeout_ms: 30_000,
            token_leeway_seconds: 60,
            listeners: Vec::new(),
            max_auth_failures: 100,
            auth_failure_window_seconds: 60,
            auth_block_seconds: 60,
            overload: OverloadConfig::default(),
            resume_window_seconds: 10,
            rebalance_cooldown_seconds: 300,
            drain: DrainConfig::default(),
        }
    }
}

impl ConfigDocument for GatewayConfig {
    const KIND: &'static str = "gateway";

    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        let ranges: [(&str, u64, u64, u64); 21] = [
            ("max_connections", self.max_connections.into(), 1, 16_000_000),
            ("max_packet_bytes", self.max_packet_bytes.into(), 128, 16 * 1024 * 1024),
            ("connect_timeout_ms", self.connect_timeout_ms.into(), 100, 100_000),
            ("receive_maximum", self.receive_maximum.into(), 1, 65_535),
            ("max_inflight", self.max_inflight.into(), 1, 65_535),
            ("topic_alias_maximum", self.topic_alias_maximum.into(), 0, 1024),
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
            ("connect_burst", self.connect_burst.into(), 1, 10_000_000),
            ("max_pending_connects", self.max_pending_connects.into(), 16, 1_000_000),
            (
                "max_topic_levels",
                self.max_topic_levels.into(),
                2,
                carillon_proto::topic::MAX_TOPIC_LEVELS as u64,
            ),
            ("auth_failure_window_seconds", self.auth_failure_window_seconds.into(), 1, 3600),
            ("auth_block_seconds", self.auth_block_seconds.into(), 1, 86_400),
            ("allow", self.allow.len() as u64, 0, MAX_NETWORKS),
            ("deny", self.deny.len() as u64, 0, MAX_NETWORKS),
            ("resume_window_seconds", self.resume_window_seconds.into(), 0, 600),
            ("rebalance_cooldown_seconds", self.rebalance_cooldown_seconds.into(), 0, 86_400),
            (
                "drain.deadline_seconds",
                self.drain.deadline_seconds.into(),
                u64::from(*DRAIN_SECONDS.start()),
                u64::from(*DRAIN_SECONDS.end()),
            ),
        ];
        let rate = self.drain.rate_per_second;
        let rate = (!MOVE_RATES.contains(&rate)).then(|| {
            let text = format!("is {rate}, must be from {} to {}", MOVE_RATES.start(), MOVE_RATES.end());
            Violation::new("drain.rate_per_second", text)
        });
        let mut found: Vec<Violation> = ranges
            .iter()
            .filter(|(_, value, low, high)| !(low..=high).contains(&value))
            .map(|(path, value, low, high)| {
                Violation::new(*path, format!("is {value}, must be from {low} to {high}"))
            })
            .chain(listeners::check(&self.listeners))
            .chain(rate)
            .collect();
        for (field, list) in [("allow", &self.allow), ("deny", &self.deny)] {
            for (i, network) in list.iter().enumerate() {
                if let Err(error) = network.parse::<Network>() {
                    found.push(Violation::new(format!("{field}[{i}]"), error.to_string()));
                }
            }
        }
        let OverloadConfig { memory_high_ratio: high, memory_low_ratio: low, .. } = self.overload;
        if !(0.0..=1.0).contains(&high) {
            found.push(Violation::new(
                "overload.memory_high_ratio",
                format!("is {high}, must be from 0 to 1"),
            ));
        }
        if !(0.0..=high).contains(&low) {
            found.push(Violation::new(
                "overload.memory_low_ratio",
                format!("is {low}, must be from 0 to memory_high_ratio"),
            ));
        }
        found
    }
}
