//! The embedded store is the cluster's only one: the keeper knows which, and a hub asks before it serves. ADR 17.

use std::sync::Arc;
use std::time::Duration;

use carillon_agent::admin::{Admin, AdminError};
use tokio::time::Instant;

use super::{Embedded, SaverError};

/// Before a keeper is asked again that did not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked that the claim still stands.
const LOOK: Duration = Duration::from_secs(10);
/// What is refused for so long is lost. After a restore of the keeper it may know savers of before for a moment.
const LOST_AFTER: Duration = Duration::from_secs(30);

/// One store's claim.
pub(crate) struct Claim {
    pub store: Arc<Embedded>,
    pub instance: String,
    pub admin: Admin,
}

impl Claim {
    /// Before the store is served. One that was the saver when the keeper was asked last goes on as such while no keeper
    /// answers; another waits for one. `take_over`: the store that is given up for this one.
    ///
    /// # Errors
    /// When another store is the cluster's saver.
    pub async fn make(&self, take_over: Option<&str>) -> Result<(), SaverError> {
        let mut is_said = false;
        loop {
            match self.ask(take_over).await? {
                Asked::Granted => return Ok(()),
                Asked::Refused(text) => return Err(SaverError::NotTheSaver(text)),
                Asked::NoAnswer(reason) if self.store.is_claimed() => {
                    tracing::warn!(%reason, "no keeper answers: this store was the saver, and goes on");
                    return Ok(());
                }
                Asked::NoAnswer(reason) => {
                    if !std::mem::replace(&mut is_said, true) {
                        tracing::warn!(%reason, "waiting for the keeper to say that this store may be the saver");
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Looks after it; returns why it is lost.
    pub async fn keep(self) -> String {
        let mut refused_since = None;
        loop {
            tokio::time::sleep(LOOK.mul_f64(rand::random_range(0.8..1.2))).await;
            match self.ask(None).await {
                Ok(Asked::Granted) => refused_since = None,
                Ok(Asked::Refused(text)) => {
                    let since = *refused_since.get_or_insert_with(Instant::now);
                    tracing::error!(reason = text, "this store is not the cluster's saver any more");
                    if since.elapsed() >= LOST_AFTER {
                        return text;
                    }
                }
                Ok(Asked::NoAnswer(_)) => {}
                Err(error) => tracing::warn!(%error, "it cannot be noted whether this store is the saver"),
            }
        }
    }

    async fn ask(&self, take_over: Option<&str>) -> Result<Asked, SaverError> {
        match self.admin.claim_saver(self.store.id(), &self.instance, take_over).await {
            Ok(()) => {
                self.store.set_claimed(true).await?;
                Ok(Asked::Granted)
            }
            Err(error @ (AdminError::Invalid(_) | AdminError::Denied(_))) => {
                self.store.set_claimed(false).await?;
                Ok(Asked::Refused(error.to_string()))
            }
            Err(error) => Ok(Asked::NoAnswer(error)),
        }
    }
}

enum Asked {
    Granted,
    Refused(String),
    NoAnswer(AdminError),
}
