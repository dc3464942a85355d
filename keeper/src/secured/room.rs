//! Who may shake hands at the same time. Strangers have a room, and those who have shaken hands before have one of their own,
//! so that connections which say nothing keep nobody out: not those who are known, and strangers only until they have had
//! their time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::origin::Origin;

/// Handshakes at a time of strangers, and as many of those who are known.
const HANDSHAKES: usize = 256;
/// … of them from one address.
const FROM_ONE: usize = 64;
/// Where there is no room, the one that has been at it longest gives way, if it has had this much time.
const FAIR_TIME: Duration = Duration::from_secs(2);
/// Addresses that are remembered, those that came last.
const KNOWN: usize = 4096;

struct Guest {
    number: u64,
    origin: Origin,
    known: bool,
    since: Instant,
}

/// Why one more may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error("its address has {FROM_ONE} handshakes under way already")]
    Address,
    #[error("{HANDSHAKES} handshakes are under way already")]
    Room,
}

#[derive(Default)]
pub(super) struct Room {
    guests: Vec<Guest>,
    /// Who has shaken hands, and when last.
    known: HashMap<Origin, Instant>,
    next: u64,
}

impl Room {
    /// Lets one in. Gives its number, and who has to go for it.
    pub(super) fn enter(&mut self, origin: Origin, now: Instant) -> Result<(u64, Option<u64>), Full> {
        let known = self.known.contains_key(&origin);
        let out = match self.full(FROM_ONE, |guest| guest.origin == origin, now) {
            Ok(None) => self.full(HANDSHAKES, |guest| guest.known == known, now).map_err(|()| Full::Room)?,
            Ok(out) => out,
            Err(()) => return Err(Full::Address),
        };
        if let Some(out) = out {
            self.guests.retain(|guest| guest.number != out);
        }
        self.next += 1;
        self.guests.push(Guest { number: self.next, origin, known, since: now });
        Ok((self.next, out))
    }

    /// Ok(None): there is room for one more beside these; Ok(Some): in place of that one; Err: there is none.
    fn full(&self, most: usize, these: impl Fn(&Guest) -> bool, now: Instant) -> Result<Option<u64>, ()> {
        if self.guests.iter().filter(|guest| these(guest)).count() < most {
            return Ok(None);
        }
        // They are in the order in which they came.
        let oldest = self.guests.iter().find(|guest| these(guest));
        let oldest = oldest.filter(|guest| now.saturating_duration_since(guest.since) >= FAIR_TIME);
        oldest.map(|guest| Some(guest.number)).ok_or(())
    }

    /// One has finished; `shaken`: with a certificate that is good here.
    pub(super) fn leave(&mut self, number: u64, shaken: bool, now: Instant) {
        let Some(place) = self.guests.iter().position(|guest| guest.number == number) else { return };
        let guest = self.guests.remove(place);
        if !shaken {
            return;
        }
        if self.known.len() >= KNOWN && !self.known.contains_key(&guest.origin) {
            let longest = self.known.iter().min_by_key(|(_, last)| **last).map(|(origin, _)| *origin);
            longest.map(|origin| self.known.remove(&origin));
        }
        self.known.insert(guest.origin, now);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::*;

    fn origin(number: u32) -> Origin {
        Origin::from(SocketAddr::new(IpAddr::V4((0x0a00_0000 + number).into()), 1))
    }

    #[test]
    fn one_address_does_not_take_the_room() {
        let (mut room, now) = (Room::default(), Instant::now());
        let first = room.enter(origin(1), now).unwrap().0;
        for _ in 1..FROM_ONE {
            assert_eq!(room.enter(origin(1), now).unwrap().1, None);
        }
        assert_eq!(room.enter(origin(1), now), Err(Full::Address));
        assert_eq!(room.enter(origin(2), now).unwrap().1, None, "others are not kept out");
        // Its own oldest gives way, not somebody else's.
        assert_eq!(room.enter(origin(1), now + FAIR_TIME).unwrap().1, Some(first));
    }

    #[test]
    fn strangers_that_say_nothing_keep_out_nobody_who_is_known() {
        let (mut room, now) = (Room::default(), Instant::now());
        let friend = room.enter(origin(1), now).unwrap().0;
        room.leave(friend, true, now);
        let refused = room.enter(origin(2), now).unwrap().0;
        room.leave(refused, false, now);
        let silent: Vec<u64> =
            (0..HANDSHAKES as u32).map(|i| room.enter(origin(100 + i), now).unwrap().0).collect();
        assert_eq!(room.enter(origin(2), now), Err(Full::Room), "its certificate was not good");
        assert_eq!(room.enter(origin(1), now).unwrap().1, None);
        // A stranger waits for their fair time, not for their deadline.
        let later = now + FAIR_TIME;
        assert_eq!(room.enter(origin(2), later).unwrap().1, Some(silent[0]));
        assert_eq!(room.enter(origin(3), later).unwrap().1, Some(silent[1]));
    }

    #[test]
    fn only_so_many_are_remembered() {
        let (mut room, now) = (Room::default(), Instant::now());
        for i in 0..=KNOWN as u32 {
            let at = now + Duration::from_millis(u64::from(i));
            let number = room.enter(origin(i), at).unwrap().0;
            room.leave(number, true, at);
        }
        assert_eq!(
            (room.known.len(), room.known.contains_key(&origin(0)), room.guests.len()),
            (KNOWN, false, 0)
        );
        room.leave(u64::MAX, true, now);
        assert_eq!(room.known.len(), KNOWN, "nobody has this number");
    }
}
