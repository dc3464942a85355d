//! Messages from devices, forwarded to the owners of their topics.

use std::time::Duration;

use carillon_proto::exchange::CallError;
use carillon_proto::v1::{self, PublishCode};
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
    /// Forwards a message; `done` is called once, from another thread, when it was accepted or refused or nobody
    /// answered in time. Publishes of one thread to one topic are sequenced in the order of these calls.
    pub fn publish(&self, message: v1::Message, done: impl FnOnce(PublishOutcome) + Send + 'static) {
        // The first try is queued here and now: order is the order of calls.
        let first = self.forward(&message);
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let deadline = Instant::now() + OWNER_WAIT;
            let mut attempt = first;
            let mut backoff = Duration::from_millis(10);
            let outcome = loop {
                let answer = match attempt {
                    Some(call) => call.await,
                    None => Err(CallError::Disconnected("the topic's owner".to_owned())),
                };
                match answer {
                    Ok(reply) => match reply.code() {
                        PublishCode::Accepted if reply.has_route => break SUCCESS,
                        PublishCode::Accepted => break NO_MATCHING_SUBSCRIBERS,
                        PublishCode::Refused => break NOT_AUTHORIZED,
                        PublishCode::Overloaded => break QUOTA_EXCEEDED,
                        PublishCode::NotOwner | PublishCode::StoreUnavailable | PublishCode::Unspecified => {}
                    },
                    Err(CallError::Overloaded(_)) => break QUOTA_EXCEEDED,
                    Err(CallError::Disconnected(_) | CallError::TimedOut(_)) => {}
                }
                if Instant::now() + backoff >= deadline {
                    break UNSPECIFIED_ERROR;
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(Duration::from_millis(500));
                // It may have been accepted although we have not heard so; then it is published twice, with one id. That is
                // what QoS 1 promises, and cheaper than a look-up for each message.
                attempt = link.forward(&message);
            };
            done(PublishOutcome { reason: outcome });
        });
    }

    fn forward(
        &self,
        message: &v1::Message,
    ) -> Option<impl Future<Output = Result<v1::Published, CallError>> + Send + use<>> {
        let owner = self.inner.owner(&message.topic)?;
        let registries = self.inner.registries.read();
        let request = v1::PublishRequest {
            correlation: 0,
            message: Some(message.clone()),
            store: None,
            idempotent: false,
        };
        Some(registries.get(&owner)?.publish.call(request))
    }
}
