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
    store: Arc<Embedded>,
    instance: String,
    admin: Admin,
    look: Duration,
    lost_after: Duration,
}

impl Claim {
    pub fn new(store: Arc<Embedded>, instance: String, admin: Admin) -> Self {
        Claim { store, instance, admin, look: LOOK, lost_after: LOST_AFTER }
    }

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
            tokio::time::sleep(self.look.mul_f64(rand::random_range(0.8..1.2))).await;
            match self.ask(None).await {
                Ok(Asked::Granted) => refused_since = None,
                Ok(Asked::Refused(text)) => {
                    let since = *refused_since.get_or_insert_with(Instant::now);
                    tracing::error!(reason = text, "this store is not the cluster's saver any more");
                    if since.elapsed() >= self.lost_after {
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

#[cfg(test)]
mod tests {
    use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
    use tokio::net::TcpListener;

    use super::*;
    use crate::saver::{Limits, Metrics, Store as _};

    const WAIT: Duration = Duration::from_secs(30);

    fn store(dir: &std::path::Path) -> Arc<Embedded> {
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        Arc::new(Embedded::open(dir, "test", Limits::default(), metrics).unwrap())
    }

    async fn keeper(dir: &std::path::Path) -> KeeperHandle {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Keeper::start(KeeperOptions::new(dir.join("keeper"), listener, Vec::new())).await.unwrap()
    }

    fn claim(store: &Arc<Embedded>, instance: &str, keeper: &str) -> Claim {
        let moment = Duration::from_millis(50);
        let claim = Claim::new(store.clone(), instance.to_owned(), Admin::new(vec![keeper.to_owned()]));
        Claim { look: moment, lost_after: 4 * moment, ..claim }
    }

    #[tokio::test]
    async fn a_store_that_was_given_up_while_it_ran_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = keeper(dir.path()).await;
        let (one, two) = (store(&dir.path().join("one")), store(&dir.path().join("two")));
        let first = claim(&one, "hub-1", &keeper.endpoint());
        first.make(None).await.unwrap();
        let mut kept = tokio::spawn(first.keep());
        assert!(tokio::time::timeout(Duration::from_secs(1), &mut kept).await.is_err(), "it stands");
        let second = claim(&two, "hub-2", &keeper.endpoint());
        let refused = second.make(None).await.unwrap_err();
        assert!(refused.to_string().contains(one.id()), "{refused}");
        assert!(one.is_claimed() && !two.is_claimed());
        // It is not in discovery, as if it were cut off.
        second.make(Some(one.id())).await.unwrap();
        let lost = tokio::time::timeout(WAIT, kept).await.expect("it ends").unwrap();
        assert!(lost.contains(two.id()), "{lost}");
        assert!(!one.is_claimed() && two.is_claimed());
        keeper.stop().await;
    }

    #[tokio::test]
    async fn without_a_keeper_only_the_store_goes_on_that_was_the_saver() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = keeper(dir.path()).await;
        let (one, two) = (store(&dir.path().join("one")), store(&dir.path().join("two")));
        claim(&one, "hub-1", &keeper.endpoint()).make(None).await.unwrap();
        let (id, gone) = (one.id().to_owned(), keeper.endpoint());
        keeper.stop().await;
        one.stop().await;
        drop(one);
        let one = store(&dir.path().join("one"));
        assert_eq!(one.id(), id, "wherever it is, and however often it is opened");
        tokio::time::timeout(WAIT, claim(&one, "hub-1", &gone).make(None)).await.unwrap().unwrap();
        let second = claim(&two, "hub-2", &gone);
        let waits = second.make(None);
        assert!(tokio::time::timeout(Duration::from_secs(1), waits).await.is_err(), "it waits");
    }

    #[tokio::test]
    async fn a_store_of_before_there_were_ids_gets_one_and_was_the_saver() {
        let dir = tempfile::tempdir().unwrap();
        let opened = store(dir.path());
        opened.stop().await;
        drop(opened);
        let marker = dir.path().join("marker.json");
        std::fs::write(&marker, r#"{"store":"saver","format":1,"cluster":"test","ready":true}"#).unwrap();
        let opened = store(dir.path());
        assert!(opened.is_claimed());
        let id = opened.id().to_owned();
        assert!(!id.is_empty());
        opened.stop().await;
        drop(opened);
        assert_eq!(store(dir.path()).id(), id);
    }
}
