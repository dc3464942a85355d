//! Slots that another instance is to give up to us. Publishers may hear before we do that it has: what they send waits for that
//! moment here, instead of going back and forth.

use std::collections::HashSet;

use carillon_proto::v1::PublishCode;

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
            for publish in self.coming.remove(&number).unwrap_or_default() {
                self.answer(Output::refuse(publish.token, PublishCode::NotOwner, MOVED));
            }
        }
    }

    /// A slot is ours now: what has come too early.
    pub(super) fn arrived(&mut self, number: u32) -> Vec<Publish> {
        self.coming.remove(&number).unwrap_or_default()
    }
}
