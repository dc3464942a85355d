//! Orders of a few messages, by hand; and any order of events, by chance.

use proptest::prelude::*;

use super::*;

const TOPIC: &str = "demo/g/a";

fn way(epoch: u64, accepts: bool) -> Way {
    Way { epoch, connection: 1, accepts }
}

fn numbers(order: &mut InOrder<u32>, way: Way, now: Instant) -> Vec<u32> {
    std::iter::from_fn(|| order.next(TOPIC, way, now)).map(|(_, call)| call).collect()
}

const NONE: [u32; 0] = [];

#[test]
fn what_is_on_one_way_does_not_wait() {
    let now = Instant::now();
    let mut order = InOrder::new();
    for call in 0..3 {
        assert_eq!(order.begin(TOPIC, call, way(1, true)), Some((u64::from(call), call)));
    }
    for ticket in 0..3 {
        order.settled(TOPIC, ticket);
    }
    assert_eq!(numbers(&mut order, way(1, true), now), NONE);
    assert!(order.sent.is_empty() && order.lanes.is_empty() && order.held() == 0, "nothing is remembered");
}

#[test]
fn a_new_owner_gets_nothing_before_the_former_one_has_answered_and_then_one() {
    let now = Instant::now();
    let mut order = InOrder::new();
    let (zero, first) = order.begin(TOPIC, 0, way(1, true)).unwrap();
    assert!(order.begin(TOPIC, 1, way(2, false)).is_none());
    assert!(order.begin("demo/g/b", 7, way(2, false)).is_some(), "another topic");
    assert!(order.begin(TOPIC, 2, way(2, false)).is_none());
    assert_eq!(numbers(&mut order, way(2, true), now), NONE, "though others have found that it accepts");
    order.failed(TOPIC, zero, first, now, false);
    assert_eq!(order.held(), 3);
    assert_eq!(numbers(&mut order, way(2, false), now), NONE, "it has its pause");
    order.hurry(now);
    assert_eq!(order.due(now), [TOPIC.into()]);
    assert_eq!(numbers(&mut order, way(2, false), now), [0]);
    assert!(order.begin(TOPIC, 3, way(2, true)).is_none());
    order.settled(TOPIC, zero);
    // It has accepted, but it is not the owner any more.
    assert_eq!(numbers(&mut order, way(3, false), now), [1]);
    order.settled(TOPIC, 2);
    assert_eq!(numbers(&mut order, way(3, true), now), [2, 3]);
    assert_eq!(order.held(), 0);
    assert!(order.begin(TOPIC, 4, way(3, true)).is_some());
}

#[test]
fn what_comes_back_is_tried_alone_after_all_that_was_under_way() {
    let now = Instant::now();
    let mut order = InOrder::new();
    for call in 0..3 {
        order.begin(TOPIC, call, way(1, true)).unwrap();
    }
    order.failed(TOPIC, 1, 1, now, false);
    order.hurry(now);
    assert_eq!(numbers(&mut order, way(1, true), now), NONE, "0 may come back, too");
    order.failed(TOPIC, 0, 0, now, false);
    assert_eq!(numbers(&mut order, way(1, true), now), NONE);
    order.failed(TOPIC, 2, 2, now, false);
    order.hurry(now);
    assert_eq!(numbers(&mut order, way(1, true), now), [0]);
    order.failed(TOPIC, 0, 0, now, false);
    assert_eq!(numbers(&mut order, way(1, true), now), NONE, "a pause again");
    assert_eq!(numbers(&mut order, way(1, true), now + 2 * BACKOFF.1), [0]);
    order.failed(TOPIC, 0, 0, now, true);
    assert_eq!(numbers(&mut order, way(2, false), now), [0], "another owner needs none");
    order.settled(TOPIC, 0);
    assert_eq!(numbers(&mut order, way(2, true), now), [1, 2]);
}

#[test]
fn over_another_connection_nothing_goes_before_the_answers_of_the_first() {
    let now = Instant::now();
    let mut order = InOrder::new();
    let (zero, first) = order.begin(TOPIC, 0, way(1, true)).unwrap();
    let again = Way { connection: 2, ..way(1, true) };
    assert!(order.begin(TOPIC, 1, again).is_none(), "the first may have been lost");
    order.failed(TOPIC, zero, first, now, false);
    order.hurry(now);
    assert_eq!(numbers(&mut order, again, now), [0]);
    order.settled(TOPIC, zero);
    assert_eq!(numbers(&mut order, again, now), [1]);
}

#[test]
fn what_nobody_wants_any_more_is_dropped() {
    let now = Instant::now();
    let mut order = InOrder::new();
    let (zero, first) = order.begin(TOPIC, 0, way(1, true)).unwrap();
    order.failed(TOPIC, zero, first, now, false);
    for call in 1..4 {
        assert!(order.begin(TOPIC, call, way(1, true)).is_none());
    }
    order.give_up(|call| *call == 2);
    assert_eq!(order.held(), 3);
    order.hurry(now);
    let (ticket, call) = order.next(TOPIC, way(1, true), now).unwrap();
    assert_eq!(call, 0);
    order.dropped(TOPIC, ticket);
    assert_eq!(numbers(&mut order, way(1, true), now), [1], "alone, like the one before it");
    order.settled(TOPIC, 1);
    assert_eq!(numbers(&mut order, way(1, true), now), [3]);
    order.settled(TOPIC, 3);
    assert_eq!(numbers(&mut order, way(1, true), now), NONE);
    assert!(order.sent.is_empty() && order.lanes.is_empty());
}

/// What happens to a slot and to whoever publishes to it.
#[derive(Debug, Clone, Copy)]
enum Event {
    Publish,
    /// The keeper gives the slot to the other of two owners; that one and the publisher hear of it later.
    Move,
    /// What the owner knows.
    OwnerHears,
    PublisherHears,
    /// The owner looks at the message that has waited longest on its connection.
    Arrive(bool),
    /// The oldest answer of an owner reaches the publisher.
    Answer(bool),
    /// The connection to an owner is lost, with all that is on it.
    Lose(bool),
    Pause,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Publish),
        1 => Just(Event::Move),
        2 => Just(Event::OwnerHears),
        2 => Just(Event::PublisherHears),
        6 => any::<bool>().prop_map(Event::Arrive),
        6 => any::<bool>().prop_map(Event::Answer),
        1 => any::<bool>().prop_map(Event::Lose),
        3 => Just(Event::Pause),
    ]
}

/// Two owners of one slot, and a publisher with connections to both.
struct World {
    now: Instant,
    order: InOrder<u32>,
    next: u32,
    /// As the keeper has it; owner = epoch % 2. The newer owner's fence holds from the moment that it hears.
    epoch: u64,
    known: u64,
    owned: [u64; 2],
    fenced: u64,
    accepted_in: u64,
    connections: [u64; 2],
    requests: [std::collections::VecDeque<(u64, u32)>; 2],
    answers: [std::collections::VecDeque<(u64, u32, Option<u64>)>; 2],
    /// All that was given a number, by the first time that it was.
    log: Vec<u32>,
}

impl World {
    fn new() -> Self {
        World {
            now: Instant::now(),
            order: InOrder::new(),
            next: 0,
            epoch: 2,
            known: 2,
            owned: [2, 0],
            fenced: 2,
            accepted_in: 0,
            connections: [1, 2],
            requests: Default::default(),
            answers: Default::default(),
            log: Vec::new(),
        }
    }

    fn way(&self) -> Way {
        let connection = self.connections[(self.known % 2) as usize];
        Way { epoch: self.known, connection, accepts: self.accepted_in == self.known }
    }

    fn send(&mut self, ticket: u64, call: u32) {
        self.requests[(self.known % 2) as usize].push_back((ticket, call));
    }

    fn follow(&mut self) {
        while let Some((ticket, call)) = self.order.next(TOPIC, self.way(), self.now) {
            self.send(ticket, call);
        }
    }

    fn is_idle(&self) -> bool {
        self.order.sent.is_empty() && self.order.held() == 0
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Publish => {
                self.next += 1;
                if let Some((ticket, call)) = self.order.begin(TOPIC, self.next, self.way()) {
                    self.send(ticket, call);
                }
            }
            Event::Move => {
                // It does not come back to an owner before the publisher has heard that it had gone, and what was sent there
                // before has arrived: that takes two hand-overs.
                let to = ((self.epoch + 1) % 2) as usize;
                if self.known == self.epoch && self.requests[to].is_empty() {
                    self.epoch += 1;
                }
            }
            Event::OwnerHears => {
                let owner = (self.epoch % 2) as usize;
                self.owned[owner] = self.epoch;
                self.fenced = self.epoch;
            }
            Event::PublisherHears => {
                self.known = self.epoch;
                self.order.hurry(self.now);
                self.follow();
            }
            Event::Arrive(owner) => {
                let owner = usize::from(owner);
                let Some((ticket, call)) = self.requests[owner].pop_front() else { return };
                let epoch = self.owned[owner];
                let accepts = epoch > 0 && epoch == self.fenced;
                if accepts && !self.log.contains(&call) {
                    self.log.push(call);
                }
                self.answers[owner].push_back((ticket, call, accepts.then_some(epoch)));
            }
            Event::Answer(owner) => {
                let Some((ticket, call, accepted)) = self.answers[usize::from(owner)].pop_front() else {
                    return;
                };
                match accepted {
                    Some(epoch) => {
                        self.accepted_in = self.accepted_in.max(epoch);
                        self.order.settled(TOPIC, ticket);
                    }
                    None => self.order.failed(TOPIC, ticket, call, self.now, false),
                }
                self.follow();
            }
            Event::Lose(owner) => {
                let owner = usize::from(owner);
                self.connections[owner] += 2;
                let lost: Vec<(u64, u32)> = self.answers[owner]
                    .drain(..)
                    .map(|(ticket, call, _)| (ticket, call))
                    .chain(self.requests[owner].drain(..))
                    .collect();
                for (ticket, call) in lost {
                    self.order.failed(TOPIC, ticket, call, self.now, false);
                }
                self.follow();
            }
            Event::Pause => {
                self.now += 2 * BACKOFF.1;
                for topic in self.order.due(self.now) {
                    assert_eq!(&*topic, TOPIC);
                    self.follow();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_happens_messages_are_sequenced_in_their_order(
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut world = World::new();
        for event in events {
            world.happens(event);
        }
        // Now all is well, and all of it is accepted in the end.
        for _ in 0..2000 {
            if world.is_idle() {
                break;
            }
            for event in [Event::OwnerHears, Event::PublisherHears, Event::Pause] {
                world.happens(event);
            }
            for owner in [false, true] {
                world.happens(Event::Arrive(owner));
                world.happens(Event::Answer(owner));
            }
        }
        prop_assert!(world.is_idle());
        prop_assert!(world.order.lanes.is_empty());
        let expected: Vec<u32> = (1..=world.next).collect();
        prop_assert_eq!(&world.log, &expected);
    }
}
