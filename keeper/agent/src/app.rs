//! The `app` document: a tenant's keys, rights, topics and limits. Every role reads it.

use std::collections::BTreeMap;

use carillon_proto::topic;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::document::{ConfigDocument, Violation};

/// `app/{name}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct App {
    /// Its topics may be used without the app's level by devices that have no token for the topic's first level.
    /// At most one app of a cluster.
    pub root: bool,
    /// Devices may connect without a token. Their user is the MQTT user name, or the client id if there is none.
    pub anonymous_devices: bool,
    /// Bearer keys of backends. Several, so that they can be rotated.
    pub api_keys: Vec<ApiKey>,
    /// Keys that device tokens (JWT) are signed with. Several, so that they can be rotated.
    pub token_keys: Vec<TokenKey>,
    /// What devices may do when their token does not say (claims `publish` and `subscribe`): filters below the app's
    /// level; `{user}` stands for the device's user.
    pub device_publish: Vec<String>,
    pub device_subscribe: Vec<String>,
    /// How topics are kept; the first rule whose filter matches is the one.
    pub topics: Vec<TopicRule>,
    /// Where upstream messages (`up/#`) and presence events go. None: upstream messages are kept only by their rule.
    pub webhook: Option<Webhook>,
    pub limits: AppLimits,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// To tell keys apart in logs and listings.
    pub name: String,
    /// The key itself; at least 16 characters.
    pub key: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenKey {
    /// Matched with the token's `kid` header when it has one.
    pub id: String,
    pub algorithm: TokenAlgorithm,
    /// The shared secret (HS256), or the public key in PEM.
    pub key: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TokenAlgorithm {
    HS256,
    RS256,
    ES256,
    EdDSA,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopicRule {
    /// Filter below the app's level: `u/+`, `g/#`.
    pub filter: String,
    /// Keep messages with QoS >= 1 in the topic's log.
    #[serde(default = "yes")]
    pub store: bool,
    /// Retention; 0 = no such limit.
    #[serde(default = "week")]
    pub max_age_seconds: u64,
    #[serde(default = "ten_thousand")]
    pub max_count: u64,
    #[serde(default = "sixteen_mib")]
    pub max_bytes: u64,
}

fn yes() -> bool {
    true
}
fn week() -> u64 {
    7 * 24 * 3600
}
fn ten_thousand() -> u64 {
    10_000
}
fn sixteen_mib() -> u64 {
    16 * 1024 * 1024
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// `http://` or `https://`; events are POSTed as JSON arrays. It may hold a password or a token, so it is a secret.
    pub url: String,
    /// Signs each request: header `carillon-signature: sha256={hex HMAC of the body}`.
    #[serde(default)]
    pub secret: Option<String>,
    /// Also send online and offline events.
    #[serde(default)]
    pub presence: bool,
    #[serde(default = "ten_seconds")]
    pub timeout_ms: u64,
}

fn ten_seconds() -> u64 {
    10_000
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AppLimits {
    /// Longest payload a backend may push, bytes.
    pub max_payload_bytes: u32,
    /// Sends per second of a broadcast that does not say, over all gateways; 0 = as fast as they can.
    pub broadcast_rate_per_second: f64,
    /// Pushes that a backend may make per second, per center; 0 = no limit.
    pub push_rate_per_second: u32,
    /// Connections of this app that one gateway holds; a CONNECT above it is refused; 0 = no limit of its own.
    pub max_connections_per_gateway: u32,
    /// PUBLISH packets per second of one connection, instead of the `gateway` document's; 0 = no limit.
    pub publish_messages_per_second: Option<u32>,
    /// Payload bytes per second of one connection's PUBLISH packets, instead of the `gateway` document's; 0 = no limit.
    pub publish_bytes_per_second: Option<u32>,
}

impl Default for AppLimits {
    fn default() -> Self {
        AppLimits {
            max_payload_bytes: 256 * 1024,
            broadcast_rate_per_second: 10_000.0,
            push_rate_per_second: 0,
            max_connections_per_gateway: 0,
            publish_messages_per_second: None,
            publish_bytes_per_second: None,
        }
    }
}

impl Default for App {
    fn default() -> Self {
        App {
            root: false,
            anonymous_devices: false,
            api_keys: Vec::new(),
            token_keys: Vec::new(),
            device_publish: vec!["up/#".to_owned()],
            device_subscribe: vec!["u/{user}".to_owned(), "g/#".to_owned(), "all".to_owned()],
            topics: vec![TopicRule::keep("#")],
            webhook: None,
            limits: AppLimits::default(),
        }
    }
}

impl TopicRule {
    /// The default retention, for the topics that match.
    pub fn keep(filter: &str) -> Self {
        TopicRule {
            filter: filter.to_owned(),
            store: true,
            max_age_seconds: week(),
            max_count: ten_thousand(),
            max_bytes: sixteen_mib(),
        }
    }
}

impl App {
    /// The rule for a topic, named without the app's level. None: not kept.
    pub fn rule(&self, below: &str) -> Option<&TopicRule> {
        self.topics.iter().find(|rule| topic::matches(&rule.filter, below))
    }
}

impl ConfigDocument for App {
    const KIND: &'static str = "app";
    const NAMED: bool = true;
    const SECRETS: &'static [&'static str] =
        &["api_keys[].key", "token_keys[].key", "webhook.url", "webhook.secret"];

    fn check(&self, name: Option<&str>) -> Vec<Violation> {
        let mut found = Vec::new();
        if let Some(Err(error)) = name.map(topic::check_app) {
            found.push(Violation::new("", format!("the app's name {error}")));
        }
        for (i, key) in self.api_keys.iter().enumerate() {
            if key.key.len() < 16 {
                found.push(Violation::new(format!("api_keys[{i}].key"), "is shorter than 16 characters"));
            }
        }
        for (i, key) in self.token_keys.iter().enumerate() {
            let path = format!("token_keys[{i}].key");
            match key.algorithm {
                TokenAlgorithm::HS256 if key.key.len() < 32 => {
                    found.push(Violation::new(
                        path,
                        "is shorter than 32 bytes, too short for HS256 (RFC 7518 §3.2)",
                    ));
                }
                TokenAlgorithm::HS256 => {}
                _ if !key.key.contains("-----BEGIN PUBLIC KEY-----") => {
                    found.push(Violation::new(
                        path,
                        "is not a public key in PEM (-----BEGIN PUBLIC KEY-----)",
                    ));
                }
                _ => {}
            }
        }
        let filters =
            [("device_publish", &self.device_publish), ("device_subscribe", &self.device_subscribe)];
        for (field, list) in filters {
            for (i, filter) in list.iter().enumerate() {
                if let Err(error) = topic::check_filter(&filter.replace("{user}", "user")) {
                    found.push(Violation::new(format!("{field}[{i}]"), error.to_string()));
                }
            }
        }
        for (i, rule) in self.topics.iter().enumerate() {
            if let Err(error) = topic::check_filter(&rule.filter) {
                found.push(Violation::new(format!("topics[{i}].filter"), error.to_string()));
            }
        }
        if let Some(webhook) = &self.webhook {
            if !webhook.url.starts_with("http://") && !webhook.url.starts_with("https://") {
                found.push(Violation::new("webhook.url", "must begin with http:// or https://"));
            }
            if !(100..=60_000).contains(&webhook.timeout_ms) {
                found.push(Violation::new("webhook.timeout_ms", "must be from 100 to 60000"));
            }
        }
        if !(1..=16 * 1024 * 1024).contains(&self.limits.max_payload_bytes) {
            found.push(Violation::new("limits.max_payload_bytes", "must be from 1 to 16777216"));
        }
        if !self.limits.broadcast_rate_per_second.is_finite() || self.limits.broadcast_rate_per_second < 0.0 {
            found.push(Violation::new("limits.broadcast_rate_per_second", "must be 0 or more"));
        }
        found
    }

    fn check_among(&self, others: &BTreeMap<String, Self>) -> Vec<Violation> {
        match others.iter().find(|(_, other)| other.root) {
            Some((other, _)) if self.root => {
                let message = format!("is already true in app/{other}: a cluster has at most one root app");
                vec![Violation::new("root", message)]
            }
            _ => Vec::new(),
        }
    }
}
