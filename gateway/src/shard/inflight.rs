//! Deliveries of QoS 1 and 2 that a device has yet to finish, in the order they were sent; here and over connections
//! (MQTT 5.0 §4.3, §4.4). No I/O.

use std::collections::VecDeque;
use std::sync::Arc;

use carillon_proto::v1;

use super::resend::Resending;
use crate::codec::QoS;

/// Exists only while there is something in flight.
#[derive(Default)]
pub struct Inflight {
    pub flights: VecDeque<Flight>,
    /// Some were sent on an earlier connection and are to be sent again on this one, before anything else.
    pub resending: Option<Box<Resending>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flight {
    /// 0: nothing to wait for, only to keep the cursor behind what was sent before.
    pub packet_id: u16,
    pub qos: QoS,
    pub state: FlightState,
    /// Sent as a retained message: it moves no cursor.
    pub is_retained: bool,
    /// A stored message's topic and seq: where its end moves the cursor to, and where it is found to be sent again.
    pub position: Option<(Arc<str>, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlightState {
    /// Sent on an earlier connection, not yet on this one.
    Due,
    /// Waits for its PUBACK or PUBREC.
    Sent,
    /// The device has it: waits for its PUBCOMP.
    Released,
    Done,
}

/// What a PUBREC means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// To be answered with a PUBREL.
    Release,
    /// The device has refused the message: that was all (MQTT 5.0 §4.3.3).
    Finished,
    Unknown,
}

impl Inflight {
    fn find(&mut self, packet_id: u16, qos: QoS) -> Option<&mut Flight> {
        // Devices answer in order, so it is among the first.
        self.flights.iter_mut().find(|flight| {
            flight.packet_id == packet_id && flight.qos == qos && flight.state != FlightState::Done
        })
    }

    /// PUBACK. False: no message with this identifier waits for one.
    pub fn acked(&mut self, packet_id: u16) -> bool {
        let found = self.find(packet_id, QoS::AtLeastOnce);
        found.map(|flight| flight.state = FlightState::Done).is_some()
    }

    /// Of a message of QoS 2 from a log that waits for its PUBREC.
    pub fn position(&self, packet_id: u16) -> Option<(&Arc<str>, u64)> {
        let is_it = |flight: &&Flight| {
            flight.packet_id == packet_id && flight.qos == QoS::ExactlyOnce && !flight.is_retained
        };
        let (topic, seq) = self.flights.iter().find(is_it)?.position.as_ref()?;
        Some((topic, *seq))
    }

    /// PUBREC; `refused`: with a reason code of 0x80 or more.
    pub fn received(&mut self, packet_id: u16, refused: bool) -> Received {
        let Some(flight) = self.find(packet_id, QoS::ExactlyOnce) else { return Received::Unknown };
        if refused {
            flight.state = FlightState::Done;
            return Received::Finished;
        }
        flight.state = FlightState::Released;
        Received::Release
    }

    /// PUBCOMP. False: no message with this identifier waits for one.
    pub fn completed(&mut self, packet_id: u16) -> bool {
        match self.find(packet_id, QoS::ExactlyOnce) {
            Some(flight) if flight.state == FlightState::Released => {
                flight.state = FlightState::Done;
                true
            }
            _ => false,
        }
    }

    /// Takes out what is done and has nothing unfinished before it; gives the positions that cursors may move to. What a
    /// device has received is its own, although its identifier is still in use.
    pub fn settle(&mut self, mut reached: impl FnMut(Arc<str>, u64)) {
        let mut at = 0;
        while let Some(flight) = self.flights.get_mut(at) {
            if !matches!(flight.state, FlightState::Released | FlightState::Done) {
                break;
            }
            if let Some((topic, seq)) = flight.position.take().filter(|_| !flight.is_retained) {
                reached(topic, seq);
            }
            if flight.state == FlightState::Done {
                self.flights.remove(at);
            } else {
                at += 1;
            }
        }
    }

    pub fn uses(&self, packet_id: u16) -> bool {
        self.flights.iter().any(|flight| flight.packet_id == packet_id)
    }

    /// What the session's next connection has to know: up to where topics have been sent, and what is in flight.
    pub fn state(&self) -> (Vec<v1::AckPosition>, Vec<v1::InFlight>) {
        let (mut sent, mut in_flight) = (Vec::<v1::AckPosition>::new(), Vec::new());
        for flight in &self.flights {
            if let Some((topic, seq)) = flight.position.as_ref().filter(|_| !flight.is_retained) {
                match sent.iter_mut().find(|position| *position.topic == **topic) {
                    Some(position) => position.seq = position.seq.max(*seq),
                    None => sent.push(v1::AckPosition { topic: topic.to_string(), seq: *seq }),
                }
            }
            if flight.packet_id == 0 || flight.state == FlightState::Done {
                continue;
            }
            let found = flight.position.as_ref().filter(|_| flight.state != FlightState::Released);
            if found.is_none() && flight.qos != QoS::ExactlyOnce {
                continue; // it is in no log, thus cannot be sent again
            }
            in_flight.push(v1::InFlight {
                packet_id: flight.packet_id.into(),
                qos: flight.qos.level().into(),
                released: found.is_none(),
                topic: found.map(|(topic, _)| topic.to_string()).unwrap_or_default(),
                seq: found.map_or(0, |(_, seq)| *seq),
                retained: flight.is_retained,
            });
        }
        (sent, in_flight)
    }

    /// As its next connection in this gateway goes on with it: what is in a log is sent again, the rest is done with. Not
    /// with QoS 2 among it, which has more to remember. None: nothing.
    pub fn resumed(mut self) -> Option<Inflight> {
        for flight in self.flights.iter_mut().filter(|flight| flight.state != FlightState::Done) {
            flight.state = if flight.position.is_some() { FlightState::Due } else { FlightState::Done };
        }
        let has_due = self.flights.iter().any(|flight| flight.state == FlightState::Due);
        self.resending = has_due.then(Box::default);
        (!self.flights.is_empty()).then_some(self)
    }

    /// From what an earlier connection left. None: nothing.
    pub fn restored(in_flight: Vec<v1::InFlight>) -> Option<Inflight> {
        let mut inflight = Inflight::default();
        for one in in_flight {
            let (Ok(packet_id), Some(qos)) = (u16::try_from(one.packet_id), qos(one.qos)) else { continue };
            if packet_id == 0 || inflight.uses(packet_id) || (one.released && qos != QoS::ExactlyOnce) {
                continue;
            }
            inflight.flights.push_back(Flight {
                packet_id,
                qos,
                state: if one.released { FlightState::Released } else { FlightState::Due },
                is_retained: one.retained,
                position: (!one.released).then(|| (one.topic.into(), one.seq)),
            });
        }
        if inflight.flights.is_empty() {
            return None;
        }
        if inflight.flights.iter().any(|flight| flight.state == FlightState::Due) {
            inflight.resending = Some(Box::default());
        }
        Some(inflight)
    }
}

/// Of messages on these topics only the identifiers of QoS 2 stay: the device may have received them, so a PUBREL is due
/// before another message can have one, or the device would take that for a repetition.
pub fn identifiers_alone(in_flight: &mut Vec<v1::InFlight>, is_meant: impl Fn(&str) -> bool) {
    in_flight.retain_mut(|flight| {
        if flight.released || !is_meant(&flight.topic) {
            return true;
        }
        *flight = v1::InFlight {
            packet_id: flight.packet_id,
            qos: flight.qos,
            released: true,
            ..Default::default()
        };
        flight.qos == u32::from(QoS::ExactlyOnce.level())
    });
}

/// QoS 1 or 2.
fn qos(level: u32) -> Option<QoS> {
    QoS::from_level(u8::try_from(level).ok()?).filter(|qos| *qos != QoS::AtMostOnce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flight(packet_id: u16, qos: QoS, state: FlightState, seq: u64) -> Flight {
        let position = (seq != 0).then(|| ("demo/a".into(), seq));
        Flight { packet_id, qos, state, is_retained: false, position }
    }

    fn inflight(flights: impl IntoIterator<Item = Flight>) -> Inflight {
        Inflight { flights: flights.into_iter().collect(), resending: None }
    }

    fn settled(inflight: &mut Inflight) -> Vec<u64> {
        let mut seqs = Vec::new();
        inflight.settle(|_, seq| seqs.push(seq));
        seqs
    }

    use FlightState::{Done, Due, Released, Sent};
    use QoS::{AtLeastOnce as Q1, ExactlyOnce as Q2};

    #[test]
    fn a_cursor_follows_what_is_finished_in_order() {
        let mut some = inflight([flight(1, Q1, Sent, 5), flight(2, Q1, Sent, 6), flight(3, Q1, Sent, 7)]);
        assert!(some.acked(2));
        assert!(settled(&mut some).is_empty());
        assert!(some.acked(1));
        assert_eq!(settled(&mut some), [5, 6]);
        assert!(!some.acked(1), "it is finished");
        assert!(some.acked(3));
        assert_eq!((settled(&mut some), some.flights.len()), (vec![7], 0));
    }

    #[test]
    fn what_is_in_no_log_does_not_fill_the_window_of_the_next_connection() {
        let some = inflight([flight(1, Q1, Sent, 0), flight(2, Q1, Sent, 6), flight(3, Q1, Sent, 0)]);
        let mut next = some.resumed().unwrap();
        assert!(settled(&mut next).is_empty());
        let left: Vec<_> = next.flights.iter().map(|flight| (flight.packet_id, flight.state)).collect();
        assert_eq!(left, [(2, Due), (3, Done)]);
        assert!(next.resending.is_some());
        let mut next = inflight([flight(1, Q1, Sent, 0)]).resumed().unwrap();
        assert!(next.resending.is_none());
        assert!(settled(&mut next).is_empty() && next.flights.is_empty());
    }

    #[test]
    fn what_was_received_moves_the_cursor_and_keeps_its_identifier() {
        let mut some = inflight([flight(1, Q2, Sent, 5), flight(2, Q1, Sent, 6)]);
        assert_eq!(some.received(1, false), Received::Release);
        assert_eq!(settled(&mut some), [5]);
        assert!(settled(&mut some).is_empty(), "once");
        assert!(some.uses(1));
        assert_eq!(some.received(1, false), Received::Release, "again, for its PUBREL may have been lost");
        assert!(some.acked(2));
        assert_eq!(settled(&mut some), [6], "nothing unfinished is before it");
        assert!(some.completed(1));
        assert!(!some.completed(1));
        assert_eq!((settled(&mut some), some.flights.len()), (vec![], 0));
    }

    #[test]
    fn answers_of_the_wrong_kind_finish_nothing() {
        let mut some = inflight([flight(1, Q2, Sent, 5), flight(2, Q1, Sent, 6)]);
        assert!(!some.acked(1));
        assert!(!some.completed(1), "no PUBREC yet");
        assert_eq!(some.received(2, false), Received::Unknown);
        assert_eq!(some.received(3, false), Received::Unknown);
        assert_eq!(some.received(1, true), Received::Finished);
        assert_eq!(some.received(1, false), Received::Unknown);
        assert_eq!(settled(&mut some), [5]);
    }

    #[test]
    fn a_retained_message_moves_no_cursor() {
        let mut some = inflight([Flight { is_retained: true, ..flight(1, Q1, Sent, 5) }]);
        let (sent, in_flight) = some.state();
        assert_eq!((sent.len(), in_flight[0].seq, in_flight[0].retained), (0, 5, true));
        assert!(some.acked(1));
        assert!(settled(&mut some).is_empty());
    }

    #[test]
    fn the_next_connection_is_told_what_is_unfinished() {
        let some = inflight([
            flight(9, Q1, Sent, 5),
            flight(0, Q1, Done, 6),
            flight(2, Q2, Released, 0),
            flight(3, Q2, Due, 7),
            // In no log: of QoS 1 nothing is left, of QoS 2 the identifier.
            flight(4, Q1, Sent, 0),
            flight(5, Q2, Sent, 0),
            flight(6, Q1, Done, 8),
        ]);
        let (sent, in_flight) = some.state();
        assert_eq!(sent, [v1::AckPosition { topic: "demo/a".into(), seq: 8 }]);
        let told: Vec<_> =
            in_flight.iter().map(|one| (one.packet_id, one.qos, one.released, one.seq)).collect();
        assert_eq!(told, [(9, 1, false, 5), (2, 2, true, 0), (3, 2, false, 7), (5, 2, true, 0)]);
        let restored = Inflight::restored(in_flight).unwrap();
        let expected = [
            flight(9, Q1, Due, 5),
            flight(2, Q2, Released, 0),
            flight(3, Q2, Due, 7),
            flight(5, Q2, Released, 0),
        ];
        assert_eq!(restored.flights, expected);
        assert!(restored.resending.is_some());
    }

    #[test]
    fn of_a_guests_messages_the_identifiers_stay() {
        let mut in_flight = inflight([
            flight(1, Q1, Sent, 5),
            flight(2, Q2, Sent, 6),
            flight(3, Q2, Released, 0),
            Flight { position: Some(("shop/a".into(), 7)), ..flight(4, Q1, Sent, 0) },
            Flight { position: Some(("shop/a".into(), 8)), ..flight(5, Q2, Sent, 0) },
        ])
        .state()
        .1;
        identifiers_alone(&mut in_flight, |topic| topic.starts_with("shop/"));
        let restored = Inflight::restored(in_flight).unwrap();
        let expected = [
            flight(1, Q1, Due, 5),
            flight(2, Q2, Due, 6),
            flight(3, Q2, Released, 0),
            flight(5, Q2, Released, 0),
        ];
        assert_eq!(restored.flights, expected);
    }

    #[test]
    fn what_makes_no_sense_is_not_restored() {
        let one = |packet_id, qos, released| v1::InFlight {
            packet_id,
            qos,
            released,
            topic: "demo/a".into(),
            seq: 1,
            ..v1::InFlight::default()
        };
        let senseless = vec![
            one(0, 1, false),
            one(70_000, 1, false),
            one(1, 0, false),
            one(1, 3, false),
            one(1, 1, true),
        ];
        assert!(Inflight::restored(senseless).is_none());
        let twice = Inflight::restored(vec![one(1, 2, true), one(1, 1, false)]).unwrap();
        assert_eq!((twice.flights.len(), twice.resending.is_some()), (1, false));
    }
}
