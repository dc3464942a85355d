//! Entries that are to be decided: here, by the node that leads, or only while this one does.

use carillon_proto::v1;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use openraft::type_config::alias::CommittedLeaderIdOf;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::types::{Entry, TypeConfig, leader_id};
use super::{Admitted, Leadership, Node, PROPOSE_TIMEOUT, RETRY, Unavailable};

/// An entry that consensus has been given. It takes room until it is decided, also when nobody waits for that any more.
struct Given {
    answer: oneshot::Receiver<ClientWriteResult<TypeConfig>>,
    /// None: it is decided, or was let in without.
    admitted: Option<Admitted>,
}

impl Drop for Given {
    fn drop(&mut self) {
        if let (Some(admitted), Ok(runtime)) = (self.admitted.take(), Handle::try_current()) {
            let answer = std::mem::replace(&mut self.answer, oneshot::channel().1);
            runtime.spawn(async move {
                let _ = answer.await;
                drop(admitted);
            });
        }
    }
}

impl Node {
    /// Has an entry decided on, here or by the node that leads, and says what came of it. Waits for a leader if there is
    /// none.
    pub(crate) async fn propose(&self, entry: v1::KeeperEntry) -> Result<v1::KeeperApplied, Unavailable> {
        let _pending = self.measures.proposed();
        let entry = Entry(entry);
        let admitted = self.measures.counted(self.admit(&entry))?;
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        loop {
            let (entry, admitted) = (entry.clone(), admitted.clone());
            let attempt = async {
                if self.leads() {
                    self.propose_here(entry, admitted).await
                } else {
                    self.propose_there(entry, admitted).await
                }
            };
            let outcome = timeout_at(deadline, attempt).await.unwrap_or(Err(Unavailable::Timeout));
            match outcome {
                Err(Unavailable::NotLeader { .. }) if Instant::now() + RETRY < deadline => sleep(RETRY).await,
                outcome => return self.measures.counted(outcome),
            }
        }
    }

    /// The same, by this node or not at all.
    pub(crate) async fn propose_here(
        &self,
        entry: Entry,
        admitted: Admitted,
    ) -> Result<v1::KeeperApplied, Unavailable> {
        if !self.leads() {
            return Err(self.not_leader());
        }
        if let Some(failure) = self.failure.borrow().clone() {
            return Err(Unavailable::Failed(failure));
        }
        self.give(entry, None, Some(admitted)).await
    }

    async fn propose_there(
        &self,
        entry: Entry,
        admitted: Admitted,
    ) -> Result<v1::KeeperApplied, Unavailable> {
        let (leader, address) = self.leader().ok_or(Unavailable::NotLeader { leader: None })?;
        // To the very node that the stream will be known as: who leads may have changed meanwhile.
        let connect = || {
            let client = self.network.member(leader, &address);
            client.map_err(|_| Unavailable::NotLeader { leader: Some(address.clone()) })
        };
        match self.forwarding.ask((leader, address.clone()), connect, entry.0, admitted).await {
            Some(answer) => answer,
            None => Err(self.not_leader()),
        }
    }

    /// The same by the keeper itself, and only while this leadership lasts.
    pub(crate) async fn propose_as(
        &self,
        leadership: Leadership,
        entry: v1::KeeperEntry,
    ) -> Result<v1::KeeperApplied, Unavailable> {
        let _pending = self.measures.proposed();
        let leader = leader_id(leadership.term, leadership.node_id);
        // What the keeper itself has to do is done however much it is asked: there is little of it at a time.
        let outcome = self.give(Entry(entry), Some(leader), None).await;
        self.measures.counted(outcome)
    }

    /// What openraft says of an entry that it did not commit.
    fn refused(&self, error: ClientWriteError<TypeConfig>) -> Unavailable {
        match error {
            // Before it was appended.
            ClientWriteError::ForwardToLeader(_) => self.not_leader(),
            // Among others: it was in the log, and another leader has put something else there.
            error => Unavailable::Unknown(error.to_string()),
        }
    }

    /// Gives an entry to consensus, and waits for what comes of it. `leader`: only if this is who leads.
    pub(super) async fn give(
        &self,
        entry: Entry,
        leader: Option<CommittedLeaderIdOf<TypeConfig>>,
        admitted: Option<Admitted>,
    ) -> Result<v1::KeeperApplied, Unavailable> {
        let (responder, answer) = ProgressResponder::complete_only();
        let mut write = self.raft.write(entry).responder(responder);
        if let Some(leader) = leader {
            write = write.with_leader(leader);
        }
        let decided = async {
            write.await.map_err(|error| Unavailable::Failed(error.to_string()))?;
            let mut given = Given { answer, admitted };
            let answer = (&mut given.answer).await;
            given.admitted = None;
            match answer {
                Ok(Ok(answer)) => Ok(answer.data.0),
                Ok(Err(error)) => Err(self.refused(error)),
                // It may be with other nodes already.
                Err(_) => Err(Unavailable::Unknown("it has stopped".to_owned())),
            }
        };
        timeout(PROPOSE_TIMEOUT, decided).await.unwrap_or(Err(Unavailable::Timeout))
    }
}
