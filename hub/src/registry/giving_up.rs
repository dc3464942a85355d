//! Slots that are to go to another owner: this one goes on for a moment, in which others get ready, and hands them over.
//!
//! It takes messages until it hears that a slot has gone: to stop before that would make publishers wait for the keeper,
//! too. What has a number by then is finished, and answered as it turns out at the saver, which no older epoch gets past.

use std::time::Duration;

use carillon_agent::admin::Admin;
use carillon_proto::topic::SLOTS;

use super::Ownership;

/// So long whoever has just heard of the next owner has to connect to it, and members of shares to finish what they have.
const READY: Duration = Duration::from_millis(300);
/// What has not gone by then is handed over again; after longer and longer, while the keepers are away.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));

/// The task, for as long as the registry lives.
pub struct GivingUp {
    pub admin: Admin,
    pub ownership: Ownership,
}

impl GivingUp {
    pub async fn run(self) {
        let mut slots = self.ownership.slots();
        loop {
            // An error means that the agent has gone, and so has the process.
            let Ok(()) = slots.wait_for(|map| !self.ownership.leaving(map).is_empty()).await.map(drop) else {
                return;
            };
            tokio::time::sleep(READY).await;
            let mut pause = AGAIN.0;
            loop {
                let leaving = self.ownership.leaving(&slots.borrow_and_update());
                if leaving.is_empty() {
                    break;
                }
                // All together: one change, which everyone hears of.
                let handed_over = self.hand_over(&leaving).await;
                tokio::time::sleep(pause).await;
                if handed_over {
                    // What is to go from now on has its moment, too.
                    break;
                }
                pause = (pause * 2).min(AGAIN.1);
            }
        }
    }

    async fn hand_over(&self, slots: &[(u32, u64)]) -> bool {
        let Ownership { instance, incarnation, .. } = &self.ownership;
        match self.admin.yield_slots(instance, *incarnation, slots).await {
            Ok(moved) => {
                tracing::info!(slots = slots.len(), moved, "slots handed over");
                true
            }
            // The keeper takes them in the end.
            Err(error) => {
                tracing::warn!(%error, slots = slots.len(), "slots could not be handed over");
                false
            }
        }
    }
}

impl Ownership {
    /// Ours that are to go, with their epochs.
    fn leaving(&self, map: &carillon_agent::SlotMap) -> Vec<(u32, u64)> {
        let leaving = (0..SLOTS)
            .zip(&map.slots)
            .filter(|(slot, owner)| map.moving_to.contains_key(slot) && self.is_us(owner));
        leaving.map(|(slot, owner)| (slot, owner.epoch)).collect()
    }
}
