//! What was decided about a pod, as it is written on the pod: JSON in the annotation `carillon.dev/decision`.

use serde::{Deserialize, Serialize};

/// Times are Unix, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    pub what: What,
    pub why: Why,
    pub since: u64,
    /// When it is no longer waited for.
    pub deadline: u64,
    /// Pods that its devices are sent to, the emptiest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    #[serde(default)]
    pub rate_per_second: f64,
    /// Of a rebalance: how many devices.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub count: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum What {
    /// All devices go, then the pod is deleted.
    Drain,
    /// It is to be drained when there is room for its devices elsewhere, or else at the deadline.
    Wait,
    /// Some devices go; kept for the time of the cool-down.
    Rebalance,
    /// Not something that this version knows.
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Why {
    /// Another revision is wanted.
    Update,
    /// Its node takes no pods.
    Node,
    /// There are more pods than wanted.
    ScaleDown,
    /// It holds more than its share.
    Balance,
    #[serde(other)]
    Unknown,
}

impl Why {
    pub fn text(self) -> &'static str {
        match self {
            Why::Update => "of another revision",
            Why::Node => "on a node that is cordoned",
            Why::ScaleDown => "one more than wanted",
            Why::Balance => "it holds more than its share",
            Why::Unknown => "of a reason that this version does not know",
        }
    }
}

impl Decision {
    /// From the annotation. What cannot be read is a decision of which nothing is known: it is taken back when the pod
    /// is to stay, and replaced when it is not.
    pub fn parse(text: &str) -> Decision {
        serde_json::from_str(text).unwrap_or(Decision {
            what: What::Unknown,
            why: Why::Unknown,
            since: 0,
            deadline: u64::MAX,
            targets: Vec::new(),
            rate_per_second: 0.0,
            count: 0,
        })
    }

    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers are JSON")
    }
}
