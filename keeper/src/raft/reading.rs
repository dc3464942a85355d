//! Reads that see all that was decided before them, on any node. Those that wait at the same time share one round.

use std::sync::Arc;

use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::{Node, PROPOSE_TIMEOUT, RETRY, Unavailable};

type Waiter = oneshot::Sender<Result<(), Unavailable>>;

/// Who waits for the next round.
#[derive(Clone, Default)]
pub(super) struct Readers {
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Default)]
struct Waiting {
    waiters: Vec<Waiter>,
    /// A task is at it.
    busy: bool,
}

/// Should a round come to an unnatural end, the next reader begins another.
struct Busy(Option<Readers>);

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(readers) = &self.0 {
            readers.waiting.lock().busy = false;
        }
    }
}

impl Node {
    /// Resolves when the state here holds all that was decided before the call.
    pub(crate) async fn linearize(&self) -> Result<(), Unavailable> {
        let (sender, receiver) = oneshot::channel();
        let begin = {
            let mut waiting = self.readers.waiting.lock();
            waiting.waiters.push(sender);
            !std::mem::replace(&mut waiting.busy, true)
        };
        if begin {
            tokio::spawn(self.clone().rounds());
        }
        // A round that was on its way may come first.
        match timeout(PROPOSE_TIMEOUT, receiver).await {
            Ok(outcome) => outcome.unwrap_or_else(|_| Err(Unavailable::Failed("it has stopped".to_owned()))),
            Err(_) => Err(self.not_leader()),
        }
    }

    /// Round after round, until nobody waits.
    async fn rounds(self) {
        let mut busy = Busy(Some(self.readers.clone()));
        loop {
            let waiters = {
                let mut waiting = self.readers.waiting.lock();
                if waiting.waiters.is_empty() {
                    // Under the lock: who comes now begins a task of its own.
                    waiting.busy = false;
                    busy.0 = None;
                    return;
                }
                std::mem::take(&mut waiting.waiters)
            };
            let outcome = self.round().await;
            for waiter in waiters {
                let _ = waiter.send(outcome.clone());
            }
        }
    }

    /// One round: the leader says how far all is decided, and what is here is waited for to come so far.
    async fn round(&self) -> Result<(), Unavailable> {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        loop {
            let error = match self.try_round(deadline).await {
                Err(error @ Unavailable::NotLeader { .. }) => error,
                outcome => return outcome,
            };
            if Instant::now() + RETRY >= deadline {
                return Err(error);
            }
            sleep(RETRY).await;
        }
    }

    async fn try_round(&self, deadline: Instant) -> Result<(), Unavailable> {
        let left = deadline.saturating_duration_since(Instant::now());
        if self.leads() {
            return match timeout(left, self.raft.ensure_linearizable(ReadPolicy::ReadIndex)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                    Err(Unavailable::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
                }
                // Its quorum is away at the moment.
                Ok(Err(RaftError::APIError(_))) => Err(Unavailable::NotLeader { leader: None }),
                Ok(Err(RaftError::Fatal(error))) => Err(Unavailable::Failed(error.to_string())),
                Err(_) => Err(self.not_leader()),
            };
        }
        let index = self.ask_read_index(left).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        match timeout(left, self.applied_up_to(index)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.not_leader()),
        }
    }

    /// As the leader: all that was decided before the call has an index of at most this.
    pub(crate) async fn read_index(&self) -> Result<u64, Unavailable> {
        match timeout(PROPOSE_TIMEOUT, self.raft.get_read_linearizer(ReadPolicy::ReadIndex)).await {
            Ok(Ok(linearizer)) => Ok(linearizer.read_log_id().index()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                Err(Unavailable::NotLeader { leader: forward.leader_node.map(|node| node.addr) })
            }
            Ok(Err(RaftError::APIError(_))) => Err(Unavailable::NotLeader { leader: None }),
            Ok(Err(RaftError::Fatal(error))) => Err(Unavailable::Failed(error.to_string())),
            Err(_) => Err(self.not_leader()),
        }
    }

    async fn applied_up_to(&self, index: u64) -> Result<(), Unavailable> {
        let mut applied = self.machine.applied();
        match applied.wait_for(|applied| *applied >= index).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Unavailable::Failed("it has stopped".to_owned())),
        }
    }
}
