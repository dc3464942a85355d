//! A hashed timer wheel: one short entry for each connection that has a deadline, looked at when its slot comes round.
//!
//! Activity does not touch the wheel. An entry that comes up asks the connection when its next deadline is, and goes
//! back in for then; so a busy connection costs as little here as an idle one.

use std::time::{Duration, Instant};

/// Resolution of all deadlines.
pub const TICK: Duration = Duration::from_millis(100);
const SLOTS: usize = 1024;

/// Ticks since the shard started.
pub type Tick = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub index: u32,
    pub generation: u32,
    /// An extra look, for a CONNECT or a write that must be done in time; it goes back in only for that.
    pub once: bool,
}

pub struct Timers {
    started: Instant,
    now: Tick,
    slots: Box<[Vec<Entry>]>,
    /// Entries in all slots.
    len: usize,
}

/// Ticks that cover a duration.
pub fn ticks(duration: Duration) -> Tick {
    Tick::try_from(duration.as_millis().div_ceil(TICK.as_millis())).unwrap_or(Tick::MAX)
}

/// Milliseconds since the shard began.
pub fn millis(tick: Tick) -> f64 {
    f64::from(tick) * TICK.as_millis() as f64
}

impl Timers {
    pub fn new(started: Instant) -> Self {
        Timers { started, now: 0, slots: (0..SLOTS).map(|_| Vec::new()).collect(), len: 0 }
    }

    pub fn now(&self) -> Tick {
        self.now
    }

    /// How many entries there are, those of connections that have ended since included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Looks at the connection at this tick, or earlier if it is beyond the wheel's span.
    pub fn add(&mut self, at: Tick, entry: Entry) {
        let at = at.clamp(self.now + 1, self.now + SLOTS as Tick - 1);
        self.slots[at as usize % SLOTS].push(entry);
        self.len += 1;
    }

    /// Advances to the present and gives the entries that have come up.
    pub fn advance(&mut self, present: Instant, due: &mut Vec<Entry>) {
        let target = (present.duration_since(self.started).as_millis() / TICK.as_millis()) as Tick;
        // After a long pause (SIGSTOP) one turn of the wheel has seen everything.
        let turns = (target - self.now).min(SLOTS as Tick);
        for tick in target - turns + 1..=target {
            let slot = &mut self.slots[tick as usize % SLOTS];
            self.len -= slot.len();
            // Its room is not kept: each slot would come to keep that of its fullest turn.
            due.append(&mut std::mem::take(slot));
        }
        self.now = target;
    }

    /// Until the next tick.
    pub fn until_next(&self, present: Instant) -> Duration {
        (self.started + TICK * (self.now + 1)).saturating_duration_since(present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_up_at_their_tick_even_after_a_pause() {
        let started = Instant::now();
        let mut timers = Timers::new(started);
        let entry = |index| Entry { index, generation: 0, once: false };
        timers.add(0, entry(1));
        timers.add(5, entry(2));
        timers.add(1_000_000, entry(3));
        assert_eq!(timers.len(), 3);
        let mut due = Vec::new();
        timers.advance(started + TICK, &mut due);
        assert_eq!(due, [entry(1)]);
        due.clear();
        timers.advance(started + TICK * 4, &mut due);
        assert!(due.is_empty());
        timers.advance(started + TICK * 5, &mut due);
        assert_eq!(due, [entry(2)]);
        due.clear();
        timers.advance(started + TICK * 100_000, &mut due);
        assert_eq!(due, [entry(3)]);
        assert_eq!(timers.now(), 100_000);
        assert_eq!(timers.len(), 0);
        assert_eq!(
            timers.slots.iter().map(Vec::capacity).sum::<usize>(),
            0,
            "what has come up takes no room"
        );
    }
}
