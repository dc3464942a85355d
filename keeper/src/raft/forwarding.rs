//! What is asked here and decided by the node that leads: one stream of entries to it, each answered when it is decided. A
//! call for each would cost both nodes more than the entry does.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_proto::v1;
use futures::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use v1::proposal_answer::Outcome;

use super::network::PeerClient;
use super::{Admitted, Unavailable, was_not_sent};

/// Entries that wait to be sent.
const WAITING: usize = 1024;

type Answer = Result<v1::KeeperApplied, Unavailable>;

/// An entry, and who is told. One that is let go of without an answer was never sent.
struct Asked {
    entry: v1::KeeperEntry,
    told: oneshot::Sender<Answer>,
    _admitted: Admitted,
}

/// The stream to the leader, if there is one.
#[derive(Clone, Default)]
pub(super) struct Forwarding {
    link: Arc<Mutex<Option<Link>>>,
}

struct Link {
    leader: u64,
    address: String,
    asked: mpsc::Sender<Asked>,
}

impl Forwarding {
    /// Has the leader decide. None: it was never sent.
    pub(super) async fn ask(
        &self,
        (leader, address): (u64, String),
        connect: impl FnOnce() -> Result<PeerClient, Unavailable>,
        entry: v1::KeeperEntry,
        admitted: Admitted,
    ) -> Option<Answer> {
        let link = {
            let mut link = self.link.lock();
            match &*link {
                Some(link) if link.leads(leader, &address) => link.asked.clone(),
                _ => {
                    let client = match connect() {
                        Ok(client) => client,
                        Err(error) => return Some(Err(error)),
                    };
                    let (asked, receiver) = mpsc::channel(WAITING);
                    tokio::spawn(run(client, receiver));
                    *link = Some(Link { leader, address, asked: asked.clone() });
                    asked
                }
            }
        };
        let (told, answer) = oneshot::channel();
        link.send(Asked { entry, told, _admitted: admitted }).await.ok()?;
        answer.await.ok()
    }
}

impl Link {
    fn leads(&self, leader: u64, address: &str) -> bool {
        self.leader == leader && self.address == address && !self.asked.is_closed()
    }
}

/// Those whose entries were sent. Whatever ends this, they learn that nobody knows what came of them.
#[derive(Default)]
struct Sent(Mutex<BTreeMap<u64, oneshot::Sender<Answer>>>);

impl Sent {
    fn answer(&self, id: u64, answer: Answer) {
        if let Some(told) = self.0.lock().remove(&id) {
            let _ = told.send(answer);
        }
    }

    fn answer_all(&self, answer: &Answer) {
        for (_, told) in std::mem::take(&mut *self.0.lock()) {
            let _ = told.send(answer.clone());
        }
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.answer_all(&Err(Unavailable::Unknown("the connection to the leader has ended".to_owned())));
    }
}

/// Sends what is asked, and tells what comes back, until the stream ends.
async fn run(mut client: PeerClient, asked: mpsc::Receiver<Asked>) {
    let sent = Arc::new(Sent::default());
    let (sending, mut id) = (sent.clone(), 0);
    // What nobody waits for any more is not sent: the leader may not have taken anything for long.
    let wanted = ReceiverStream::new(asked).filter(|asked| std::future::ready(!asked.told.is_closed()));
    let proposals = wanted.map(move |Asked { entry, told, _admitted }| {
        id += 1;
        sending.0.lock().insert(id, told);
        v1::Proposal { id, entry: Some(entry) }
    });
    let status = match client.propose(proposals).await {
        Ok(answers) => told(answers.into_inner(), &sent).await,
        // FAILED_PRECONDITION: another node, or one of another cluster, is at the address.
        Err(status) if was_not_sent(&status) || status.code() == Code::FailedPrecondition => {
            sent.answer_all(&Err(Unavailable::NotLeader { leader: None }));
            return;
        }
        Err(status) => status,
    };
    sent.answer_all(&Err(Unavailable::Unknown(status.message().to_owned())));
}

/// Why the answers have ended.
async fn told(mut answers: tonic::Streaming<v1::ProposalAnswer>, sent: &Sent) -> Status {
    loop {
        match answers.message().await {
            Ok(Some(v1::ProposalAnswer { id, outcome })) => sent.answer(id, parsed(outcome)),
            Ok(None) => return Status::unavailable("the leader has ended the stream"),
            Err(status) => return status,
        }
    }
}

fn parsed(outcome: Option<Outcome>) -> Answer {
    match outcome {
        Some(Outcome::Applied(applied)) => Ok(applied),
        Some(Outcome::Refused(v1::ProposalRefused { code, message })) => Err(match Code::from(code) {
            Code::Aborted => Unavailable::NotLeader { leader: None },
            Code::DeadlineExceeded => Unavailable::Timeout,
            Code::ResourceExhausted => Unavailable::Full(message),
            _ => Unavailable::Unknown(message),
        }),
        None => Err(Unavailable::Unknown("the leader's answer makes no sense".to_owned())),
    }
}
