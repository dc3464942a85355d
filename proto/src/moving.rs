//! What is said of gateways that send devices to others, in words that people and programs read.

use crate::v1;

impl v1::move_progress::Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rebalance => "rebalance",
            Self::Drain | Self::Unspecified => "drain",
        }
    }
}

impl v1::GatewayState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Active | Self::Unspecified => "active",
        }
    }
}
