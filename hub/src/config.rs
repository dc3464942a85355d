//! The `hub` document: the limits of the roles that a hub hosts. Each role owns its part.

use carillon_agent::document::{ConfigDocument, Violation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::coordinator::CoordinatorConfig;
use crate::registry::RegistryConfig;
use crate::shares::SharesConfig;

/// One document a cluster, kind `hub`. Changes take effect on running hubs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HubConfig {
    pub registry: RegistryConfig,
    pub coordinator: CoordinatorConfig,
    pub shares: SharesConfig,
}

impl ConfigDocument for HubConfig {
    const KIND: &'static str = "hub";

    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        let mut found = Vec::new();
        self.registry.check("registry", &mut found);
        self.coordinator.check("coordinator", &mut found);
        self.shares.check("shares", &mut found);
        found
    }
}

/// Adds a violation when `value` is outside `range`.
pub(crate) fn within(
    found: &mut Vec<Violation>,
    path: String,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
) {
    if !range.contains(&value) {
        found.push(Violation::new(path, format!("must be from {} to {}", range.start(), range.end())));
    }
}
