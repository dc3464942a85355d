//! What the gateway asks of the saver: sessions, cursors, backlogs, retained messages.

use std::sync::Arc;

use carillon_proto::v1::saver_error::Code;
use carillon_proto::v1::saver_reply::Result as Reply;
use carillon_proto::v1::saver_request::Op;
use carillon_proto::v1::{self, SaverRequest};
use tokio::sync::oneshot;

use super::{Link, OWNER_WAIT};
use crate::event::{ConnId, Event};

/// Between two tries to reach a saver.
pub(super) const SAVER_RETRY: std::time::Duration = std::time::Duration::from_millis(100);

/// Why the saver did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SaverFailure {
    #[error("the saver is unavailable: {0}")]
    Unavailable(String),
    #[error("the session has moved to another gateway")]
    Moved,
    #[error("the saver refused: {0}")]
    Invalid(String),
}

impl Link {
    /// Queues the request now; the future is for its answer.
    pub(super) fn ask(&self, op: Op) -> impl Future<Output = Result<Reply, SaverFailure>> + Send + use<> {
        let inner = self.inner.clone();
        let again = op.clone();
        let call = move |op| {
            inner.saver.load().as_ref().map(|saver| saver.call(SaverRequest { correlation: 0, op: Some(op) }))
        };
        let mut called = call(op);
        async move {
            let deadline = tokio::time::Instant::now() + OWNER_WAIT;
            let reply = loop {
                let error = match called {
                    Some(call) => match call.await {
                        Ok(reply) => break reply,
                        Err(error) => error.to_string(),
                    },
                    None => "none is known".to_owned(),
                };
                // A saver that is replaced takes its stream with it; all that is asked here may be asked twice.
                if tokio::time::Instant::now() + SAVER_RETRY >= deadline {
                    return Err(SaverFailure::Unavailable(error));
                }
                tokio::time::sleep(SAVER_RETRY).await;
                called = call(again.clone());
            };
            match reply.result {
                Some(Reply::Error(error)) => Err(match error.code() {
                    Code::SessionMoved => SaverFailure::Moved,
                    Code::Unavailable => SaverFailure::Unavailable(error.text),
                    Code::Invalid | Code::Fenced | Code::Unspecified => SaverFailure::Invalid(error.text),
                }),
                Some(result) => Ok(result),
                None => Err(SaverFailure::Invalid("an empty answer".to_owned())),
            }
        }
    }

    /// Queues a request whose answer changes nothing here, and whose loss is mended by itself.
    pub(super) fn tell(&self, op: Op) {
        let sent = match self.inner.saver.load().as_ref() {
            Some(saver) => saver.send(SaverRequest { correlation: 0, op: Some(op) }).is_ok(),
            None => false,
        };
        if !sent {
            self.inner.metrics.saver_unsent.inc();
        }
    }

    /// Posts an answer to the shard that asked.
    pub(super) fn answer(&self, conn: ConnId, event: Event) {
        self.shard(conn.shard as usize).post(event);
    }

    /// Answered by [`Event::Opened`].
    pub fn open_session(&self, conn: ConnId, key: u128, open: v1::OpenSession) {
        let session = open.session.clone().unwrap_or_default();
        let begin = move |link: &Link, may: bool| {
            let asked = may.then(|| link.ask(Op::OpenSession(open)));
            let link = link.clone();
            link.inner.runtime.clone().spawn(async move {
                let result = match asked {
                    Some(asked) => asked.await.and_then(|reply| match reply {
                        Reply::SessionOpened(opened) => Ok(opened),
                        other => Err(unexpected("OpenSession", &other)),
                    }),
                    None => Err(SaverFailure::Unavailable("the session's end is not told yet".to_owned())),
                };
                link.answer(conn, Event::Opened { conn, session, result });
            });
        };
        self.after_told(key, begin);
    }

    /// The saver is to forget what it has kept for the next connection, for this is it. Answered by [`Event::TakenUp`].
    pub fn take_up(&self, conn: ConnId, session: v1::SessionRef, attachment: u64) {
        let asked = self.ask(Op::Ack(v1::Ack { session: Some(session), attachment, positions: Vec::new() }));
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let result = asked.await.map(drop);
            link.answer(conn, Event::TakenUp { conn, result });
        });
    }

    pub fn ack(&self, ack: v1::Ack) {
        self.tell(Op::Ack(ack));
    }

    /// Resolves when all that was told to the saver before has been carried out.
    pub fn flushed(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        let asked = self.ask(Op::Heads(v1::Heads { topics: Vec::new() }));
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let _ = asked.await;
            while !link.inner.untold.is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            let _ = done.send(());
        });
        flushed
    }

    /// Answered by [`Event::Read`].
    pub fn read(&self, conn: ConnId, topic: Arc<str>, after: u64, limit: u32) {
        let read = v1::Read { topic: topic.to_string(), after, limit, max_bytes: 0 };
        let asked = self.ask(Op::Read(read));
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let result = asked.await.and_then(|reply| match reply {
                Reply::Read(read) => Ok(read),
                other => Err(unexpected("Read", &other)),
            });
            link.answer(conn, Event::Read { conn, topic, result });
        });
    }

    /// Answered by [`Event::Unsubscribed`].
    pub fn unsubscribe(&self, conn: ConnId, packet_id: u16, unsubscribe: v1::Unsubscribe) {
        let asked = self.ask(Op::Unsubscribe(unsubscribe));
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let kept = asked.await.is_ok();
            link.answer(conn, Event::Unsubscribed { conn, packet_id, kept });
        });
    }
}

pub(super) fn unexpected(asked: &str, _got: &Reply) -> SaverFailure {
    SaverFailure::Invalid(format!("{asked} was answered with something else"))
}
