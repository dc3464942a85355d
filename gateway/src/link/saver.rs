//! What the gateway asks of the saver: sessions, cursors, backlogs, retained messages.

use std::sync::Arc;

use carillon_proto::topic;
use carillon_proto::v1::saver_error::Code;
use carillon_proto::v1::saver_reply::Result as Reply;
use carillon_proto::v1::saver_request::Op;
use carillon_proto::v1::{self, SaverRequest};
use tokio::sync::oneshot;

use super::publish::{NOT_AUTHORIZED, UNSPECIFIED_ERROR};
use super::{AttachCommand, Link, OWNER_WAIT};
use crate::delivery::Delivery;
use crate::event::{ConnId, Event, Granted};
use crate::routes::Joined;

/// Between two tries to reach a saver.
const SAVER_RETRY: std::time::Duration = std::time::Duration::from_millis(100);

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

/// A filter of a SUBSCRIBE that the device may subscribe to; its route is joined already.
pub struct Wanted {
    pub filter: Arc<str>,
    pub subscription: v1::Subscription,
    pub joined: Joined,
    /// MQTT 5.0 §3.8.3.1: 0 = send retained messages, 1 = if the subscription is new, 2 = not.
    pub retain_handling: u8,
    /// The connection has a subscription with this filter (known without the saver).
    pub existed: bool,
}

impl Link {
    /// Queues the request now; the future is for its answer.
    fn ask(&self, op: Op) -> impl Future<Output = Result<Reply, SaverFailure>> + Send + use<> {
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

    /// Queues a request whose answer changes nothing here.
    fn tell(&self, op: Op) {
        let sent = match self.inner.saver.load().as_ref() {
            Some(saver) => saver.send(SaverRequest { correlation: 0, op: Some(op) }).is_ok(),
            None => false,
        };
        if !sent {
            self.inner.metrics.saver_unsent.inc();
        }
    }

    fn answer(&self, conn: ConnId, event: Event) {
        self.shard(conn.shard as usize).post(event);
    }

    /// Answered by [`Event::Opened`].
    pub fn open_session(&self, conn: ConnId, session: v1::SessionRef, open: v1::OpenSession) {
        let asked = self.ask(Op::OpenSession(open));
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let result = asked.await.and_then(|reply| match reply {
                Reply::SessionOpened(opened) => Ok(opened),
                other => Err(unexpected("OpenSession", &other)),
            });
            link.answer(conn, Event::Opened { conn, session, result });
        });
    }

    /// Nothing is to be kept for this session any more.
    pub fn forget_session(&self, open: v1::OpenSession) {
        self.tell(Op::OpenSession(open));
    }

    pub fn ack(&self, ack: v1::Ack) {
        self.tell(Op::Ack(ack));
    }

    pub fn close_session(&self, close: v1::CloseSession) {
        self.tell(Op::CloseSession(close));
    }

    /// Resolves when all that was told to the saver before has been carried out.
    pub fn flushed(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        let asked = self.ask(Op::Heads(v1::Heads { topics: Vec::new() }));
        self.inner.runtime.spawn(async move {
            let _ = asked.await;
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

    /// Announces routes that were joined first by this; to be called for each [`Joined`].
    pub fn announce(&self, filter: &Arc<str>, joined: &Joined) {
        if !matches!(joined, Joined::Wait { announce: true, .. }) {
            return;
        }
        if topic::is_wildcard(filter) {
            self.inner.to_all(|| AttachCommand::WildRoute(filter.clone()));
        } else {
            self.inner.to_owner(filter, AttachCommand::Route(filter.clone()));
        }
    }

    /// Joins a route for a shard's subscriber.
    pub fn join(&self, filter: &Arc<str>, shard: usize) -> Joined {
        let joined = if topic::is_wildcard(filter) {
            self.inner.routes.join_wild(filter, shard, &self.inner.registry_names())
        } else {
            self.inner.routes.join(filter, shard)
        };
        self.announce(filter, &joined);
        joined
    }

    /// Carries out a SUBSCRIBE whose routes are joined; answered by [`Event::Subscribed`] when the saver has it, the
    /// owners route to us, and the retained messages are at hand. `session`: the kept session and its attachment.
    pub fn subscribe(
        &self,
        conn: ConnId,
        packet_id: u16,
        session: Option<(v1::SessionRef, u64)>,
        wanted: Vec<Wanted>,
    ) {
        let is_kept = session.is_some();
        let needs_position =
            |w: &Wanted| is_kept || (w.subscription.qos > 0 && topic::inbox_user(&w.filter).is_some());
        let asked: Vec<usize> = (0..wanted.len()).filter(|&i| needs_position(&wanted[i])).collect();
        let retained: Vec<_> = wanted
            .iter()
            .map(|w| {
                let want = w.retain_handling == 0 || (w.retain_handling == 1 && !w.existed);
                want.then(|| self.ask(Op::Retained(v1::Retained { filter: w.filter.to_string(), limit: 0 })))
            })
            .collect();
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            // First the routes, then the positions: what is published between the two is in the log after a position,
            // and a message that is routed before its position is known is not missed either.
            let mut wanted = wanted;
            let mut routed = Vec::with_capacity(wanted.len());
            let deadline = tokio::time::Instant::now() + OWNER_WAIT;
            for wanted in &mut wanted {
                routed.push(in_force(&wanted.filter, &mut wanted.joined, deadline).await);
            }
            let mut placed: Vec<Result<v1::SubscribedOne, u8>> = wanted
                .iter()
                .map(|w| Ok(v1::SubscribedOne { existed: w.existed, positions: Vec::new() }))
                .collect();
            if !asked.is_empty() {
                let (session, attachment) =
                    session.map_or((None, 0), |(session, attachment)| (Some(session), attachment));
                let subscriptions = asked.iter().map(|&i| wanted[i].subscription.clone()).collect();
                let op = Op::Subscribe(v1::Subscribe { session, attachment, subscriptions });
                let answer = link.ask(op).await.and_then(|reply| match reply {
                    Reply::Subscribed(subscribed) if subscribed.results.len() == asked.len() => {
                        Ok(subscribed.results)
                    }
                    other => Err(unexpected("Subscribe", &other)),
                });
                match answer {
                    Ok(results) => {
                        for (&i, result) in asked.iter().zip(results) {
                            placed[i] = Ok(result);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "subscription could not be kept");
                        let code = if matches!(error, SaverFailure::Moved) {
                            NOT_AUTHORIZED
                        } else {
                            UNSPECIFIED_ERROR
                        };
                        for &i in &asked {
                            placed[i] = Err(code);
                        }
                    }
                }
            }
            let mut outcomes = Vec::with_capacity(wanted.len());
            for (((wanted, placed), retained), routed) in
                wanted.into_iter().zip(placed).zip(retained).zip(routed)
            {
                outcomes.push(match (placed, routed) {
                    (Ok(placed), Ok(last)) => grant(wanted, placed, retained, last).await,
                    (Err(code), _) | (_, Err(code)) => Err(code),
                });
            }
            link.answer(conn, Event::Subscribed { conn, packet_id, outcomes });
        });
    }
}

/// Waits for a route to be in force; the last stored seq that has come by on it.
async fn in_force(filter: &Arc<str>, joined: &mut Joined, deadline: tokio::time::Instant) -> Result<u64, u8> {
    match joined {
        Joined::Ready(last) => Ok(*last),
        Joined::Wait { in_force, .. } => match tokio::time::timeout_at(deadline, in_force).await {
            Ok(Ok(last)) => Ok(last),
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(%filter, "no owner put the route in force in time");
                Err(UNSPECIFIED_ERROR)
            }
        },
    }
}

async fn grant(
    wanted: Wanted,
    placed: v1::SubscribedOne,
    retained: Option<impl Future<Output = Result<Reply, SaverFailure>>>,
    route_last: u64,
) -> Result<Granted, u8> {
    let mut deliveries = Vec::new();
    if let Some(retained) = retained
        && (wanted.retain_handling == 0 || !placed.existed)
    {
        match retained.await {
            Ok(Reply::Retained(reply)) => {
                deliveries =
                    reply.messages.into_iter().map(|message| Arc::new(Delivery::new(message))).collect();
            }
            Ok(other) => return Err(refuse(&unexpected("Retained", &other))),
            Err(error) => return Err(refuse(&error)),
        }
    }
    let is_wild = topic::is_wildcard(&wanted.filter);
    let (position, sent) = match placed.positions.first() {
        Some(position) if !is_wild => (position.after, position.sent),
        _ => (route_last, 0),
    };
    let backlog = if is_wild { placed.positions } else { Vec::new() };
    Ok(Granted { position, sent, backlog, retained: deliveries })
}

fn refuse(error: &SaverFailure) -> u8 {
    tracing::warn!(%error, "retained messages could not be read");
    UNSPECIFIED_ERROR
}

fn unexpected(asked: &str, _got: &Reply) -> SaverFailure {
    SaverFailure::Invalid(format!("{asked} was answered with something else"))
}
