//! Messages from devices, forwarded to the owners of their topics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use carillon_proto::exchange::CallError;
use carillon_proto::topic;
use carillon_proto::v1::{self, PublishCode};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::in_order::{Begun, InOrder, Next, Publish};
use super::{Link, OWNER_WAIT};
use crate::event::PublishOutcome;

/// MQTT 5.0 §3.4.2.1.
pub const SUCCESS: u8 = 0x00;
pub const NO_MATCHING_SUBSCRIBERS: u8 = 0x10;
pub const UNSPECIFIED_ERROR: u8 = 0x80;
pub const NOT_AUTHORIZED: u8 = 0x87;
pub const QUOTA_EXCEEDED: u8 = 0x97;

/// Before a second try; doubled with each further one. It is over when the slots change.
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
/// How long it is waited for an answer before it is looked whether what waits for it is out of time.
const WAIT: Duration = Duration::from_millis(500);

/// The order of one connection's publishes.
#[derive(Clone, Default)]
pub struct Publisher {
    order: Arc<Mutex<InOrder>>,
    /// Something that was sent for the first time has been answered.
    answered: Arc<Notify>,
}

/// A slot's owner, if it has one, and the epoch of its ownership.
type Owner = (Option<Arc<str>>, u64);

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
    pub fn publish_once(&self, publisher: &Publisher, message: v1::Message) {
        self.publish_as(publisher, message, true, Box::new(|_| {}));
    }

    fn publish_as(
        &self,
        publisher: &Publisher,
        message: v1::Message,
        idempotent: bool,
        done: Box<dyn FnOnce(PublishOutcome) + Send>,
    ) {
        let (slot, deadline) = (topic::slot_of(&message.topic), Instant::now() + OWNER_WAIT);
        let (owner, epoch) = self.owner_now(&message.topic);
        let accepts = self.accepts(slot, epoch);
        let publish = Publish { message, idempotent, slot, deadline, done };
        let begun = publisher.order.lock().begin(publish, epoch, accepts);
        match begun {
            // The first try is queued here and now: order is the order of calls.
            Begun::Send(ticket, publish) => self.send(publisher, ticket, publish, (owner, epoch)),
            Begun::Waits => {}
            Begun::WaitsFirst => {
                drop(self.inner.runtime.spawn(self.clone().try_again(publisher.clone(), slot, None)))
            }
        }
    }

    /// With the epoch of its ownership; nobody has epoch 0.
    fn owner_now(&self, topic: &str) -> Owner {
        let slots = self.inner.slots.load();
        slots.owner_of(topic).map_or((None, 0), |(_, owner)| (Some(owner.instance.clone()), owner.epoch))
    }

    /// The same epoch, by slot.
    fn epoch_of(&self, slot: u32) -> u64 {
        let slots = self.inner.slots.load();
        let owner = slots.slots.get(slot as usize).filter(|owner| !owner.instance.is_empty());
        owner.map_or(0, |owner| owner.epoch)
    }

    /// Has the slot's owner accepted a publish from here in this epoch?
    fn accepts(&self, slot: u32, epoch: u64) -> bool {
        self.inner.accepted[slot as usize].load(Ordering::Relaxed) == epoch
    }

    fn send(&self, publisher: &Publisher, ticket: u64, publish: Publish, owner: Owner) {
        let (message, idempotent, slot) = (publish.message.clone(), publish.idempotent, publish.slot);
        let (link, publisher, epoch) = (self.clone(), publisher.clone(), owner.1);
        self.forward(owner, message, idempotent, move |answer| {
            let outcome = outcome(answer);
            let mut order = publisher.order.lock();
            order.answered(ticket);
            if let Some(reason) = outcome {
                drop(order);
                publisher.answered.notify_waiters();
                return (publish.done)(PublishOutcome { reason });
            }
            // A task only for what needs another try.
            if order.failed(ticket, publish) {
                link.inner.runtime.spawn(link.clone().try_again(publisher.clone(), slot, Some(epoch)));
            }
            drop(order);
            publisher.answered.notify_waiters();
        });
    }

    /// Looks after what is to be tried again in a slot, until nothing is. `failed`: the epoch of the owner that has just not
    /// accepted something; it is asked again after a pause, and another at once.
    async fn try_again(self, publisher: Publisher, slot: u32, mut failed: Option<u64>) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            // Before it is looked at what they tell of.
            let changed = self.inner.slots_changed.notified();
            let answered = publisher.answered.notified();
            tokio::pin!(changed, answered);
            changed.as_mut().enable();
            answered.as_mut().enable();
            if let Some(epoch) = failed.take() {
                if self.epoch_of(slot) == epoch {
                    tokio::select! {
                        () = tokio::time::sleep(backoff) => {}
                        () = changed => backoff = FIRST_BACKOFF,
                    }
                } else {
                    backoff = FIRST_BACKOFF;
                }
                continue;
            }
            let next = publisher.order.lock().next(slot, Instant::now());
            let (ticket, message, idempotent) = match next {
                Next::Wait => {
                    tokio::select! {
                        () = answered => {}
                        () = tokio::time::sleep(WAIT) => {}
                    }
                    continue;
                }
                Next::End => return,
                Next::GiveUp(publish) => {
                    (publish.done)(PublishOutcome { reason: UNSPECIFIED_ERROR });
                    continue;
                }
                Next::Try(ticket, message, idempotent) => (ticket, message, idempotent),
            };
            // It may have been accepted although we have not heard so; then it is published twice, with one id. That is
            // what QoS 1 promises, and cheaper than a look-up for each message; of QoS 2 the owner takes it
            // only once.
            let (answered, answer) = oneshot::channel();
            let topic = message.topic.clone();
            let owner = self.owner_now(&topic);
            let tried = owner.1;
            self.forward(owner, message, idempotent, move |result| drop(answered.send(result)));
            let Some(reason) = answer.await.ok().and_then(outcome) else {
                failed = Some(tried);
                backoff = (backoff * 2).min(Duration::from_millis(500));
                continue;
            };
            backoff = FIRST_BACKOFF;
            let settled = publisher.order.lock().settled(slot, ticket);
            if let Some(publish) = settled {
                (publish.done)(PublishOutcome { reason });
            }
            loop {
                // All topics of a slot have one owner.
                let owner = self.owner_now(&topic);
                let followed = publisher.order.lock().follow(slot, owner.1, self.accepts(slot, owner.1));
                let Some((ticket, publish)) = followed else { break };
                self.send(&publisher, ticket, publish, owner);
            }
        }
    }

    fn forward(
        &self,
        (owner, epoch): Owner,
        message: v1::Message,
        idempotent: bool,
        answer: impl FnOnce(Result<v1::Published, CallError>) + Send + 'static,
    ) {
        let registries = self.inner.registries.read();
        match owner.and_then(|owner| registries.get(&owner)) {
            Some(registry) => {
                let (inner, slot) = (self.inner.clone(), topic::slot_of(&message.topic));
                let answer = move |result: Result<v1::Published, CallError>| {
                    if result.as_ref().is_ok_and(|reply| reply.code() == PublishCode::Accepted) {
                        inner.accepted[slot as usize].fetch_max(epoch, Ordering::Relaxed);
                    }
                    answer(result);
                };
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
