//! What a fleet and its swarms use at one moment, by role.

use std::time::Instant;

use serde::Serialize;

use super::Fleet;
use super::machine::{Memory, Usage};
use super::swarms::Swarms;

#[derive(Debug, Clone, Serialize)]
pub struct Snapshot {
    #[serde(skip)]
    pub at: Instant,
    pub connections: u64,
    pub gateways: Usage,
    pub hub: Usage,
    pub keeper: Usage,
    pub swarms: Usage,
    /// This process.
    pub driver: Usage,
    pub memory: Memory,
}

impl Snapshot {
    pub fn take(fleet: &Fleet, swarms: &Swarms) -> anyhow::Result<Snapshot> {
        Ok(Snapshot {
            at: Instant::now(),
            connections: swarms.ready(),
            gateways: Usage::sum(fleet.gateways.iter().map(super::Member::pid)),
            hub: Usage::sum([fleet.hub.pid()]),
            keeper: Usage::sum([fleet.keeper.pid()]),
            swarms: Usage::sum(swarms.pids()),
            driver: Usage::of(std::process::id())?,
            memory: Memory::read()?,
        })
    }

    pub fn roles(&self) -> [(&'static str, Usage); 5] {
        [
            ("gateways", self.gateways),
            ("hub", self.hub),
            ("keeper", self.keeper),
            ("swarms", self.swarms),
            ("driver", self.driver),
        ]
    }

    /// What all these processes have for themselves, kB.
    pub fn own_kb(&self) -> u64 {
        self.roles().iter().map(|(_, usage)| usage.own_kb).sum()
    }

    /// What the machine lacks since then and no process of ours has: the kernel's, kB. Whatever else runs on the machine
    /// is in it.
    pub fn kernel_kb(&self, before: &Snapshot) -> i64 {
        let gone = before.memory.available_kb as i64 - self.memory.left_kb(&before.memory) as i64;
        gone - (self.own_kb() as i64 - before.own_kb() as i64)
    }
}
