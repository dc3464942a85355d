//! What is due when, for many devices: a ring of slots of a tenth of a second.

/// A slot's length.
const SLOT_MS: u64 = 100;

/// Who: the device's index, and its generation, so that what was planned for a former connection is known as such.
pub type Entry = (u32, u16);

/// Nothing may be planned further ahead than the wheel was made for.
pub struct Wheel {
    slots: Vec<Vec<Entry>>,
    /// The number of the first slot that was not handed out yet.
    next: u64,
}

impl Wheel {
    pub fn new(furthest_ms: u64, now_ms: u64) -> Wheel {
        let slots = furthest_ms / SLOT_MS + 2;
        Wheel { slots: vec![Vec::new(); slots as usize], next: now_ms / SLOT_MS }
    }

    /// Plans it for this time, rounded up to a slot; the past is the next slot, what is too far is the furthest one.
    pub fn plan(&mut self, at_ms: u64, entry: Entry) {
        let furthest = self.next + self.slots.len() as u64 - 1;
        let slot = at_ms.div_ceil(SLOT_MS).clamp(self.next, furthest);
        let length = self.slots.len() as u64;
        self.slots[(slot % length) as usize].push(entry);
    }

    /// The entries of one slot that is due; `None` when none is.
    pub fn due(&mut self, now_ms: u64) -> Option<Vec<Entry>> {
        if self.next * SLOT_MS > now_ms {
            return None;
        }
        let length = self.slots.len() as u64;
        let entries = std::mem::take(&mut self.slots[(self.next % length) as usize]);
        self.next += 1;
        Some(entries)
    }

    /// From now until the next slot is due.
    pub fn wait_ms(&self, now_ms: u64) -> u64 {
        (self.next * SLOT_MS).saturating_sub(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_comes_once_in_time_and_never_early() {
        let mut wheel = Wheel::new(10_000, 0);
        let mut planned: Vec<u64> = (0..500).map(|i| i * 7919 % 10_000).collect();
        for (index, &at) in planned.iter().enumerate() {
            wheel.plan(at, (index as u32, 0));
        }
        for now in (0..=10_100).step_by(30) {
            while let Some(entries) = wheel.due(now) {
                for (index, _) in entries {
                    let at = std::mem::replace(&mut planned[index as usize], u64::MAX);
                    assert!(at <= now && now < at + 2 * SLOT_MS, "planned for {at}, came at {now}");
                }
            }
        }
        assert!(planned.iter().all(|&at| at == u64::MAX));
    }
}
