//! Messages from devices, forwarded to the owners of their topics.

use std::sync::Arc;
use std::time::Duration;

use carillon_proto::exchange::CallError;
use carillon_proto::topic;
use carillon_proto::v1::{self, PublishCode};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::in_order::{InOrder, Next, Publish};
use super::{Link, OWNER_WAIT};
use crate::event::PublishOutcome;

/// MQTT 5.0 §3.4.2.1.
pub const SUCCESS: u8 = 0x00;
pub const NO_MATCHING_SUBSCRIBERS: u8 = 0x10;
pub const UNSPECIFIED_ERROR: u8 = 0x80;
pub const NOT_AUTHORIZED: u8 = 0x87;
pub const QUOTA_EXCEEDED: u8 = 0x97;

/// The order of one connection's publishes.
#[derive(Clone, Default)]
pub struct Publisher {
    order: Arc<Mutex<InOrder>>,
}

impl Link {
    /// Forwards a message; `done` is called once, from any thread, when it was accepted or refused or nobody answered in
    /// time. What one publisher publishes to one topic is sequenced in the order of these calls (`in_order.rs`).
    pub fn publish(
        &self,
        publisher: &Publisher,
        message: v1::Message,
        done: impl FnOnce(PublishOutcome) + Send + 'static,
    ) {
        // A device may send a message of QoS 2 again with the same id, over another connection.
        let idempotent = message.qos == 2;
        self.publish_as(publisher, message, idempotent, Box::new(done));
    }

    /// As [`publish`](Self::publish), for a message with an id that another may publish too: it is accepted once.
    pub fn publish_once(&self, message: v1::Message) {
        self.publish_as(&Publisher::default(), message, true, Box::new(|_| {}));
    }

    fn publish_as(
        &self,
        publisher: &Publisher,
        message: v1::Message,
        idempotent: bool,
        done: Box<dyn FnOnce(PublishOutcome) + Send>,
    ) {
        let (slot, deadline) = (topic::slot_of(&message.topic), Instant::now() + OWNER_WAIT);
        let begun = publisher.order.lock().begin(Publish { message, idempotent, slot, deadline, done });
        if let Some((ticket, publish)) = begun {
            // The first try is queued here and now: order is the order of calls.
            self.send(publisher, ticket, publish);
        }
    }

    fn send(&self, publisher: &Publisher, ticket: u64, publish: Publish) {
        let (message, idempotent, slot) = (publish.message.clone(), publish.idempotent, publish.slot);
        let (link, publisher) = (self.clone(), publisher.clone());
        self.forward(message, idempotent, move |answer| {
            let outcome = outcome(answer);
            let mut order = publisher.order.lock();
            order.answered(ticket);
            if let Some(reason) = outcome {
                drop(order);
                return (publish.done)(PublishOutcome { reason });
            }
            // A task only for what needs another try.
            if order.failed(ticket, publish) {
                link.inner.runtime.spawn(link.clone().try_again(publisher.clone(), slot));
            }
        });
    }

    /// Looks after what is to be tried again in a slot, until nothing is.
    async fn try_again(self, publisher: Publisher, slot: u32) {
        let mut backoff = Duration::from_millis(10);
        let mut pauses = true;
        loop {
            if std::mem::replace(&mut pauses, true) {
                tokio::time::sleep(backoff).await;
            }
            let next = publisher.order.lock().next(slot, Instant::now());
            let (ticket, message, idempotent) = match next {
                Next::Wait => continue,
                Next::End => return,
                Next::GiveUp(publish) => {
                    (publish.done)(PublishOutcome { reason: UNSPECIFIED_ERROR });
                    // Those behind it may be late as well.
                    pauses = false;
                    continue;
                }
                Next::Try(ticket, message, idempotent) => (ticket, message, idempotent),
            };
            // It may have been accepted although we have not heard so; then it is published twice, with one id. That is
            // what QoS 1 promises, and cheaper than a look-up for each message; of QoS 2 the owner takes it
            // only once.
            let (answered, answer) = oneshot::channel();
            self.forward(message, idempotent, move |result| drop(answered.send(result)));
            let Some(reason) = answer.await.ok().and_then(outcome) else {
                backoff = (backoff * 2).min(Duration::from_millis(500));
                continue;
            };
            backoff = Duration::from_millis(10);
            let settled = publisher.order.lock().settled(slot, ticket);
            if let Some(publish) = settled {
                (publish.done)(PublishOutcome { reason });
            }
            loop {
                let followed = publisher.order.lock().follow(slot);
                let Some((ticket, publish)) = followed else { break };
                self.send(&publisher, ticket, publish);
            }
        }
    }

    fn forward(
        &self,
        message: v1::Message,
        idempotent: bool,
        answer: impl FnOnce(Result<v1::Published, CallError>) + Send + 'static,
    ) {
        let owner = self.inner.owner(&message.topic);
        let registries = self.inner.registries.read();
        match owner.and_then(|owner| registries.get(&owner)) {
            Some(registry) => {
                let request =
                    v1::PublishRequest { correlation: 0, message: Some(message), store: None, idempotent };
                registry.publish.call_then(request, answer);
            }
            None => answer(Err(CallError::Disconnected("the topic's owner".to_owned()))),
        }
    }
}

/// What the device is told; None: it is worth another try.
fn outcome(answer: Result<v1::Published, CallError>) -> Option<u8> {
    match answer {
        Ok(reply) => match reply.code() {
            PublishCode::Accepted if reply.has_route => Some(SUCCESS),
            PublishCode::Accepted => Some(NO_MATCHING_SUBSCRIBERS),
            PublishCode::Refused => Some(NOT_AUTHORIZED),
            PublishCode::Overloaded => Some(QUOTA_EXCEEDED),
            PublishCode::NotOwner | PublishCode::StoreUnavailable | PublishCode::Unspecified => None,
        },
        Err(CallError::Overloaded(_)) => Some(QUOTA_EXCEEDED),
        Err(CallError::Disconnected(_) | CallError::TimedOut(_)) => None,
    }
}
