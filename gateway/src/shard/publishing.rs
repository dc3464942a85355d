//! The device's own publishes that it or the gateway has yet to finish (MQTT 5.0 §4.3): an answer for each in the order
//! they came, and the QoS 2 identifiers that it has not released. No I/O.

use std::collections::VecDeque;

use carillon_proto::v1;

use super::pace::Pace;
use super::timers::Tick;
use crate::codec::QoS;
use crate::link::Publisher;

/// Exists only while there is something to remember.
#[derive(Default)]
pub struct Publishing {
    /// Ticket of the first of the queue.
    pub first_ticket: u64,
    /// Not answered yet.
    pub queue: VecDeque<PendingPublish>,
    /// Bytes of the payloads under way.
    pub bytes: usize,
    /// QoS 2 that was accepted and waits for its PUBREL; whether it came on this connection.
    received: Vec<(u16, bool)>,
    /// QoS 2 that was forwarded on an earlier connection, which ended before the answer: the messages' ids.
    unanswered: Vec<(u16, Box<str>)>,
    /// Keeps their order at the owners.
    pub publisher: Publisher,
    pub pace: Pace,
    /// Published above its rate: not to be read before this.
    pub read_again: Tick,
}

pub struct PendingPublish {
    /// 0: QoS 0, not to be answered.
    pub packet_id: u16,
    pub qos: QoS,
    pub reason: Option<u8>,
    pub bytes: u32,
    /// The id that a message of QoS 2 was forwarded with. None: it was not.
    pub message_id: Option<Box<str>>,
}

impl Publishing {
    /// QoS 2: has a message with this identifier been accepted, and not been released?
    pub fn has_received(&self, packet_id: u16) -> bool {
        self.received.iter().any(|(id, _)| *id == packet_id)
    }

    /// QoS 2: is a message with this identifier on its way?
    pub fn is_forwarding(&self, packet_id: u16) -> bool {
        self.queue.iter().any(|pending| pending.packet_id == packet_id && pending.qos == QoS::ExactlyOnce)
    }

    /// Publishes of this connection that count against the Receive Maximum (MQTT 5.0 §4.9).
    pub fn unfinished(&self) -> usize {
        let unanswered = self.queue.iter().filter(|pending| pending.qos != QoS::AtMostOnce).count();
        unanswered + self.received.iter().filter(|(_, is_of_this_connection)| *is_of_this_connection).count()
    }

    /// The id under which this message was forwarded before, if `is_repeated` (DUP) says that it may have been; one that is
    /// not is another message.
    pub fn earlier_id(&mut self, packet_id: u16, is_repeated: bool) -> Option<Box<str>> {
        let at = self.unanswered.iter().position(|(id, _)| *id == packet_id)?;
        let (_, message_id) = self.unanswered.swap_remove(at);
        is_repeated.then_some(message_id)
    }

    /// QoS 2: it is answered on this connection; what an earlier one forwarded with this identifier is done with.
    pub fn answered(&mut self, packet_id: u16) {
        self.unanswered.retain(|(id, _)| *id != packet_id);
    }

    /// QoS 2: from now until its PUBREL this identifier stands for a message that was accepted.
    pub fn accepted(&mut self, packet_id: u16) {
        if !self.has_received(packet_id) {
            self.received.push((packet_id, true));
        }
    }

    /// PUBREL. False: there is nothing to release.
    pub fn released(&mut self, packet_id: u16) -> bool {
        self.answered(packet_id);
        let at = self.received.iter().position(|(id, _)| *id == packet_id);
        at.map(|at| self.received.swap_remove(at)).is_some()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.received.is_empty() && self.unanswered.is_empty()
    }

    /// Nothing is to be remembered, not even how fast it has published of late. `now_ms`: since the shard began.
    pub fn is_idle(&self, now_ms: f64) -> bool {
        self.is_empty() && self.pace.is_over(now_ms)
    }

    /// What the session's next connection has to know.
    pub fn state(&self) -> Vec<v1::ReceivedPublish> {
        let accepted = self.received.iter().map(|(id, _)| (*id, None));
        let unanswered = self.unanswered.iter().map(|(id, message_id)| (*id, Some(message_id)));
        let forwarded = self.queue.iter().filter_map(|pending| {
            let message_id = pending.message_id.as_ref()?;
            // One that was refused is to be published anew.
            let is_refused = pending.reason.is_some_and(|reason| reason >= 0x80);
            (!is_refused).then_some((pending.packet_id, Some(message_id)))
        });
        accepted
            .chain(unanswered)
            .chain(forwarded)
            .map(|(packet_id, message_id)| v1::ReceivedPublish {
                packet_id: packet_id.into(),
                message_id: message_id.map(ToString::to_string).unwrap_or_default(),
            })
            .collect()
    }

    /// From what an earlier connection left. None: nothing.
    pub fn restored(received: Vec<v1::ReceivedPublish>) -> Option<Publishing> {
        let mut publishing = Publishing::default();
        for one in received {
            let Ok(packet_id @ 1..) = u16::try_from(one.packet_id) else { continue };
            if one.message_id.is_empty() {
                publishing.received.push((packet_id, false));
            } else {
                publishing.unanswered.push((packet_id, one.message_id.into()));
            }
        }
        (!publishing.is_empty()).then_some(publishing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(packet_id: u16, qos: QoS, reason: Option<u8>, message_id: Option<&str>) -> PendingPublish {
        PendingPublish { packet_id, qos, reason, bytes: 0, message_id: message_id.map(Into::into) }
    }

    #[test]
    fn an_identifier_is_remembered_until_it_is_released() {
        let mut publishing = Publishing::default();
        publishing.accepted(7);
        publishing.accepted(7);
        assert!(publishing.has_received(7) && !publishing.has_received(8));
        assert!(!publishing.released(8));
        assert!(publishing.released(7));
        assert!(!publishing.released(7) && publishing.is_empty());
    }

    #[test]
    fn the_receive_maximum_counts_what_this_connection_has_not_finished() {
        let mut publishing =
            Publishing::restored(vec![v1::ReceivedPublish { packet_id: 1, message_id: String::new() }])
                .expect("there is one");
        assert_eq!(publishing.unfinished(), 0);
        publishing.accepted(2);
        publishing.queue.push_back(pending(0, QoS::AtMostOnce, None, None));
        publishing.queue.push_back(pending(3, QoS::AtLeastOnce, None, None));
        publishing.queue.push_back(pending(4, QoS::ExactlyOnce, None, Some("four")));
        assert_eq!(publishing.unfinished(), 3);
        assert!(publishing.is_forwarding(4) && !publishing.is_forwarding(3));
    }

    #[test]
    fn the_next_connection_is_told_what_was_forwarded_and_how() {
        let mut publishing = Publishing::default();
        publishing.accepted(1);
        publishing.queue.push_back(pending(2, QoS::ExactlyOnce, None, Some("two")));
        publishing.queue.push_back(pending(3, QoS::ExactlyOnce, Some(0x87), Some("three")));
        publishing.queue.push_back(pending(4, QoS::AtLeastOnce, None, None));
        let told = publishing.state();
        let mut next = Publishing::restored(told.clone()).unwrap();
        assert_eq!(next.state(), told);
        assert!(next.has_received(1) && !next.has_received(2) && !next.has_received(3));
        assert_eq!(next.earlier_id(2, true).as_deref(), Some("two"));
        assert_eq!(next.earlier_id(2, true), None, "once");
        assert_eq!(next.earlier_id(3, true), None, "it was refused");
    }

    #[test]
    fn an_identifier_that_was_answered_or_released_stands_for_no_earlier_message() {
        let told =
            [2, 3].map(|packet_id| v1::ReceivedPublish { packet_id, message_id: "earlier".to_owned() });
        let mut publishing = Publishing::restored(told.into()).unwrap();
        publishing.answered(2);
        assert_eq!(publishing.earlier_id(2, true), None, "an error, and it is free");
        assert!(!publishing.released(3));
        assert_eq!(publishing.earlier_id(3, true), None);
        assert!(publishing.is_empty());
    }

    #[test]
    fn another_message_may_take_an_identifier_that_was_never_answered() {
        let told = vec![v1::ReceivedPublish { packet_id: 2, message_id: "two".to_owned() }];
        let mut publishing = Publishing::restored(told).unwrap();
        assert_eq!(publishing.earlier_id(2, false), None);
        assert!(publishing.is_empty());
        let senseless =
            [0, 70_000].map(|packet_id| v1::ReceivedPublish { packet_id, message_id: String::new() });
        assert!(Publishing::restored(senseless.into()).is_none());
    }
}
