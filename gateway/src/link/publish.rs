//! Messages from devices, forwarded to the owners of their topics.

use std::time::Duration;

use carillon_proto::exchange::CallError;
use carillon_proto::v1::{self, PublishCode};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Link, OWNER_WAIT};
use crate::event::PublishOutcome;

/// MQTT 5.0 §3.4.2.1.
pub const SUCCESS: u8 = 0x00;
pub const NO_MATCHING_SUBSCRIBERS: u8 = 0x10;
pub const UNSPECIFIED_ERROR: u8 = 0x80;
pub const NOT_AUTHORIZED: u8 = 0x87;
pub const QUOTA_EXCEEDED: u8 = 0x97;

impl Link {
    /// Forwards a message; `done` is called once, from any thread, when it was accepted or refused or nobody answered in
    /// time. Publishes of one thread to one topic are sequenced in the order of these calls.
    pub fn publish(&self, message: v1::Message, done: impl FnOnce(PublishOutcome) + Send + 'static) {
        // A device may send a message of QoS 2 again with the same id, over another connection.
        let idempotent = message.qos == 2;
        self.publish_as(message, idempotent, done);
    }

    /// As [`publish`](Self::publish), for a message with an id that another may publish too: it is accepted once.
    pub fn publish_once(&self, message: v1::Message) {
        self.publish_as(message, true, |_| {});
    }

    fn publish_as(
        &self,
        message: v1::Message,
        idempotent: bool,
        done: impl FnOnce(PublishOutcome) + Send + 'static,
    ) {
        let deadline = Instant::now() + OWNER_WAIT;
        let again = message.clone();
        let link = self.clone();
        let settle = move |answer: Result<v1::Published, CallError>| match outcome(answer) {
            Some(reason) => done(PublishOutcome { reason }),
            // A task only for what needs another try.
            None => link.retry(again, idempotent, deadline, done),
        };
        // The first try is queued here and now: order is the order of calls.
        self.forward(message, idempotent, settle);
    }

    fn retry(
        &self,
        message: v1::Message,
        idempotent: bool,
        deadline: Instant,
        done: impl FnOnce(PublishOutcome) + Send + 'static,
    ) {
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let mut backoff = Duration::from_millis(10);
            let reason = loop {
                if Instant::now() + backoff >= deadline {
                    break UNSPECIFIED_ERROR;
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(Duration::from_millis(500));
                // It may have been accepted although we have not heard so; then it is published twice, with one id. That is
                // what QoS 1 promises, and cheaper than a look-up for each message; of QoS 2 the owner takes it
                // only once.
                let (answered, answer) = oneshot::channel();
                link.forward(message.clone(), idempotent, move |result| drop(answered.send(result)));
                if let Ok(answer) = answer.await
                    && let Some(reason) = outcome(answer)
                {
                    break reason;
                }
            };
            done(PublishOutcome { reason });
        });
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
