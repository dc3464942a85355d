//! The order of what one connection publishes, while some of it has to be tried again: what is behind a message in the same
//! slot, and so perhaps on its topic, waits for it. No I/O.
//!
//! So does what would go to a new owner of the slot while the former one has not answered, or while the new one has not
//! accepted a first message: it may hear later than this gateway that the slot is its own.
//!
//! What was sent already when a message turned out to need another try is beyond recall: if its owner accepts it all the
//! same, it is before. An owner that is deposed or gone accepts none of it.
//!
//! Bounded by whoever publishes: a device with too many unanswered publishes is not read from.

use std::collections::{BTreeMap, VecDeque};

use carillon_proto::v1;
use tokio::time::Instant;

use crate::event::PublishOutcome;

/// One message, and what is done when it is accepted, refused or given up.
pub(super) struct Publish {
    pub message: v1::Message,
    pub idempotent: bool,
    pub slot: u32,
    pub deadline: Instant,
    pub done: Box<dyn FnOnce(PublishOutcome) + Send>,
}

#[derive(Default)]
pub(super) struct InOrder {
    next_ticket: u64,
    /// Sent for the first time, and not answered.
    sent: VecDeque<Sent>,
    /// Slots in which something is tried again.
    again: Vec<Again>,
}

#[derive(Clone, Copy)]
struct Sent {
    ticket: u64,
    slot: u32,
    /// Of the owner that it was sent to.
    epoch: u64,
}

/// What is to be done with a message.
#[allow(clippy::large_enum_variant)] // it lives for one call, and nearly always is the large one
pub(super) enum Begun {
    /// It is to be sent now; its ticket.
    Send(u64, Publish),
    /// It waits for what is before it.
    Waits,
    /// The same, and its slot is to be looked after from now on, with [`next`](InOrder::next).
    WaitsFirst,
}

/// What waits in one slot, by ticket: the first is tried, the others when it is accepted.
#[derive(Default)]
struct Again {
    slot: u32,
    waiting: BTreeMap<u64, Publish>,
    /// Something has come back since the last try.
    has_failed: bool,
}

/// What is to be done next in a slot in which something is tried again.
pub(super) enum Next {
    /// An earlier one is not answered yet: look again.
    Wait,
    /// Send this one.
    Try(u64, v1::Message, bool),
    /// Its time is over.
    GiveUp(Publish),
    /// Nothing is left.
    End,
}

impl InOrder {
    /// `epoch`: of the slot's owner now; `accepts`: it has accepted something in that epoch.
    pub fn begin(&mut self, publish: Publish, epoch: u64, accepts: bool) -> Begun {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let slot = publish.slot;
        if let Some(again) = self.find(slot) {
            again.waiting.insert(ticket, publish);
            return Begun::Waits;
        }
        if self.is_held_up(slot, epoch, accepts) {
            self.again.push(Again { slot, waiting: BTreeMap::from([(ticket, publish)]), has_failed: true });
            return Begun::WaitsFirst;
        }
        self.sent.push_back(Sent { ticket, slot, epoch });
        Begun::Send(ticket, publish)
    }

    /// Something is on its way to another owner, or to one that may not know yet that it is.
    fn is_held_up(&self, slot: u32, epoch: u64, accepts: bool) -> bool {
        self.sent.iter().any(|sent| sent.slot == slot && !(accepts && sent.epoch == epoch))
    }

    fn find(&mut self, slot: u32) -> Option<&mut Again> {
        self.again.iter_mut().find(|again| again.slot == slot)
    }

    /// The answer to what was sent for the first time has come.
    pub fn answered(&mut self, ticket: u64) {
        if let Some(at) = self.sent.iter().position(|sent| sent.ticket == ticket) {
            self.sent.remove(at);
        }
    }

    /// It is to be tried again. True: its slot is to be looked after from now on, with [`next`](Self::next).
    pub fn failed(&mut self, ticket: u64, publish: Publish) -> bool {
        let slot = publish.slot;
        let is_new = self.find(slot).is_none();
        if is_new {
            self.again.push(Again { slot, ..Again::default() });
        }
        if let Some(again) = self.find(slot) {
            again.waiting.insert(ticket, publish);
            again.has_failed = true;
        }
        is_new
    }

    /// What to do in a slot after a pause.
    pub fn next(&mut self, slot: u32, now: Instant) -> Next {
        let sent_before = self.sent.iter().filter(|sent| sent.slot == slot).map(|sent| sent.ticket).min();
        let Some(again) = self.find(slot) else { return Next::End };
        let Some((&ticket, first)) = again.waiting.first_key_value() else {
            self.again.retain(|again| again.slot != slot);
            return Next::End;
        };
        if now >= first.deadline {
            return again.waiting.remove(&ticket).map_or(Next::Wait, Next::GiveUp);
        }
        if sent_before.is_some_and(|sent| sent < ticket) {
            return Next::Wait;
        }
        again.has_failed = false;
        Next::Try(ticket, first.message.clone(), first.idempotent)
    }

    /// What [`next`](Self::next) gave was accepted or refused.
    pub fn settled(&mut self, slot: u32, ticket: u64) -> Option<Publish> {
        self.find(slot)?.waiting.remove(&ticket)
    }

    /// After one was accepted those behind it are sent, one after the other, until one of them comes back. The owner may be
    /// another by now: `epoch` and `accepts` as with [`begin`](Self::begin).
    pub fn follow(&mut self, slot: u32, epoch: u64, accepts: bool) -> Option<(u64, Publish)> {
        if self.is_held_up(slot, epoch, accepts) {
            return None;
        }
        let again = self.find(slot).filter(|again| !again.has_failed)?;
        let (ticket, publish) = again.waiting.pop_first()?;
        self.sent.push_back(Sent { ticket, slot, epoch });
        Some((ticket, publish))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn publish(slot: u32, deadline: Instant) -> Publish {
        let message = v1::Message::default();
        Publish { message, idempotent: false, slot, deadline, done: Box::new(|_| {}) }
    }

    fn sent(begun: Begun) -> (u64, Publish) {
        match begun {
            Begun::Send(ticket, publish) => (ticket, publish),
            _ => panic!("it waits"),
        }
    }

    fn tried(next: Next) -> u64 {
        match next {
            Next::Try(ticket, ..) => ticket,
            _ => panic!("none is to be tried"),
        }
    }

    #[test]
    fn nothing_overtakes_what_is_tried_again_in_its_slot() {
        let now = Instant::now();
        let until = now + Duration::from_secs(10);
        let mut order = InOrder::default();
        let (zero, first) = sent(order.begin(publish(7, until), 1, true));
        let (one, second) = sent(order.begin(publish(7, until), 1, true));
        order.answered(one);
        assert!(order.failed(one, second));
        assert!(matches!(order.begin(publish(7, until), 1, true), Begun::Waits), "ticket 2");
        sent(order.begin(publish(8, until), 1, true)); // ticket 3, perhaps to another owner
        assert!(matches!(order.next(7, now), Next::Wait), "the first is not answered yet");
        order.answered(zero);
        assert!(!order.failed(zero, first), "its slot is looked after");
        assert_eq!(tried(order.next(7, now)), zero);
        assert!(matches!(order.begin(publish(7, until), 1, true), Begun::Waits), "ticket 4");
        assert!(order.settled(7, zero).is_some());
        // Accepted: the others follow in their order.
        let (ticket, again) = order.follow(7, 1, true).unwrap();
        assert_eq!(ticket, one);
        assert_eq!(order.follow(7, 1, true).unwrap().0, 2);
        // One comes back: no more go, and it is the first.
        order.answered(one);
        order.failed(one, again);
        assert!(order.follow(7, 1, true).is_none());
        order.answered(2);
        assert_eq!(tried(order.next(7, now)), one);
        order.settled(7, one);
        assert_eq!(order.follow(7, 1, true).unwrap().0, 4);
        assert!(order.follow(7, 1, true).is_none());
        assert!(matches!(order.next(7, now), Next::End));
        sent(order.begin(publish(7, until), 1, true)); // as ever
    }

    #[test]
    fn a_new_owner_gets_nothing_before_the_former_one_has_answered() {
        let now = Instant::now();
        let until = now + Duration::from_secs(10);
        let mut order = InOrder::default();
        let (zero, first) = sent(order.begin(publish(7, until), 1, true));
        assert!(matches!(order.begin(publish(7, until), 2, true), Begun::WaitsFirst), "ticket 1");
        assert!(matches!(order.begin(publish(7, until), 2, true), Begun::Waits), "ticket 2");
        assert!(matches!(order.next(7, now), Next::Wait));
        order.answered(zero);
        assert!(!order.failed(zero, first), "it was not the owner any more");
        assert_eq!(tried(order.next(7, now)), zero);
        order.settled(7, zero);
        assert_eq!(order.follow(7, 2, true).unwrap().0, 1);
        assert!(order.follow(7, 3, true).is_none(), "and once more");
        order.answered(1);
        assert_eq!(tried(order.next(7, now)), 2);
        order.settled(7, 2);
        assert!(matches!(order.next(7, now), Next::End));
    }

    #[test]
    fn a_new_owner_gets_one_until_it_accepts() {
        let now = Instant::now();
        let until = now + Duration::from_secs(10);
        let mut order = InOrder::default();
        let (zero, _) = sent(order.begin(publish(7, until), 1, false));
        sent(order.begin(publish(8, until), 1, false));
        assert!(matches!(order.begin(publish(7, until), 1, false), Begun::WaitsFirst), "ticket 2");
        assert!(matches!(order.next(7, now), Next::Wait));
        order.answered(zero);
        assert_eq!(tried(order.next(7, now)), 2);
    }

    #[test]
    fn what_follows_to_a_new_owner_goes_one_by_one_until_it_accepts() {
        let now = Instant::now();
        let until = now + Duration::from_secs(10);
        let mut order = InOrder::default();
        let (zero, first) = sent(order.begin(publish(7, until), 1, true));
        assert!(matches!(order.begin(publish(7, until), 2, false), Begun::WaitsFirst), "ticket 1");
        assert!(matches!(order.begin(publish(7, until), 2, false), Begun::Waits), "ticket 2");
        order.answered(zero);
        order.failed(zero, first);
        assert_eq!(tried(order.next(7, now)), zero);
        // The former owner has accepted it, just as the slot went to another, which may not have heard so.
        order.settled(7, zero);
        let (one, second) = order.follow(7, 2, false).unwrap();
        assert_eq!(one, 1);
        assert!(order.follow(7, 2, false).is_none(), "ticket 2 could be accepted when ticket 1 is not");
        order.answered(one);
        order.failed(one, second);
        assert_eq!(tried(order.next(7, now)), one);
        order.settled(7, one);
        assert_eq!(order.follow(7, 2, true).unwrap().0, 2);
    }

    #[test]
    fn what_takes_too_long_is_given_up_in_its_order() {
        let now = Instant::now();
        let mut order = InOrder::default();
        let (ticket, first) = sent(order.begin(publish(7, now), 1, true));
        order.answered(ticket);
        order.failed(ticket, first);
        assert!(matches!(order.begin(publish(7, now + Duration::from_secs(1)), 1, true), Begun::Waits));
        assert!(matches!(order.next(7, now), Next::GiveUp(_)));
        assert_eq!(tried(order.next(7, now)), 1, "the next has time left");
    }
}
