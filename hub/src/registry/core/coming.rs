//! Slots that another instance is to give up to us. Publishers may hear before we do that it has: what they send waits for that
//! moment here, instead of going back and forth.

use std::collections::HashSet;

use carillon_proto::v1::PublishCode;

use super::slots::EARLY_MS;
use super::{Core, MOVED, Output, Publish};

impl Core {
    /// Which slots of others are to be ours. Called after [`set_slots`](Self::set_slots).
    pub fn set_coming(&mut self, coming: &HashSet<u32>) {
        for &number in coming {
            if !self.slots.contains_key(&number) {
                self.coming.entry(number).or_default();
            }
        }
        let gone: Vec<u32> = self.coming.keys().filter(|number| !coming.contains(number)).copied().collect();
        for number in gone {
            for publish in self.arrived(number) {
                self.answer(Output::refuse(publish.token, PublishCode::NotOwner, MOVED));
            }
        }
    }

    /// A publish to a slot that is not ours yet.
    pub(super) fn wait(&mut self, number: u32, publish: Publish, now_ms: u64) {
        self.coming.entry(number).or_default().push((now_ms + EARLY_MS, publish));
    }

    /// What has waited long enough: whoever sent it tries the owner that he knows then.
    pub(super) fn end_waits(&mut self, now_ms: u64) {
        let mut late = Vec::new();
        for waiting in self.coming.values_mut() {
            let over = waiting.partition_point(|(until_ms, _)| *until_ms <= now_ms);
            late.extend(waiting.drain(..over));
        }
        for (_, publish) in late {
            self.answer(Output::refuse(publish.token, PublishCode::NotOwner, MOVED));
        }
    }

    /// A slot is ours now: what has come too early.
    pub(super) fn arrived(&mut self, number: u32) -> Vec<Publish> {
        let waiting = self.coming.remove(&number).unwrap_or_default();
        waiting.into_iter().map(|(_, publish)| publish).collect()
    }
}
