//! gRPC: `carillon.v1.Center`, the same calls as HTTP+JSON.

use std::pin::Pin;

use carillon_proto::v1;
use carillon_proto::v1::push_request;
use futures::stream::FuturesOrdered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Accepted, Broadcast, Caller, Center, DEFAULT_PULL, Push, To, auth};
use crate::problem::{Kind, Problem};

/// The gRPC skin.
#[derive(Clone)]
pub struct Grpc {
    center: Center,
}

impl Grpc {
    pub fn new(center: Center) -> Self {
        Grpc { center }
    }

    /// Carries out one call: admission, the key, the time it took.
    async fn call<Q, A, F>(
        &self,
        method: &'static str,
        request: Request<Q>,
        app: fn(&Q) -> &str,
        carry_out: impl FnOnce(Center, Caller, Q) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Problem>>,
    {
        let started = Instant::now();
        let _in_flight = self.center.inner.metrics.begin();
        let result = async {
            let Ok(_permit) = self.center.inner.requests.try_acquire() else {
                return Err(Problem::new(Kind::Overloaded, "too many requests are being carried out"));
            };
            let key = request.metadata().get("authorization").map(|value| value.as_bytes());
            let caller = self.center.authorise(app(request.get_ref()), auth::bearer(key))?;
            let limit = self.center.inner.options.request_timeout;
            match tokio::time::timeout(limit, carry_out(self.center.clone(), caller, request.into_inner()))
                .await
            {
                Ok(result) => result,
                Err(_) => {
                    Err(Problem::new(Kind::Unavailable, format!("no answer within {} s", limit.as_secs())))
                }
            }
        };
        let result = result.await;
        let code = result.as_ref().map_or_else(|problem| problem.kind.entry().code, |_| Code::Ok);
        self.center.inner.metrics.request(method, &format!("{code:?}"), started.elapsed());
        result.map(Response::new).map_err(Status::from)
    }
}

fn push_of(request: v1::PushRequest) -> Result<Push, Problem> {
    let to = match request.to {
        Some(push_request::To::User(user)) => To::User(user),
        Some(push_request::To::Group(group)) => To::Group(group),
        Some(push_request::To::Topic(topic)) => To::Topic(topic),
        None => return Err(Problem::field("to", "is missing: give one of `user`, `group` and `topic`")),
    };
    Ok(Push {
        to,
        payload: request.payload,
        qos: request.qos.map(u64::from),
        ttl_seconds: request.ttl_seconds,
        store: request.store,
        id: (!request.id.is_empty()).then_some(request.id),
        retain: request.retain,
        properties: request.properties.unwrap_or_default(),
    })
}

fn reply_of(accepted: Accepted) -> v1::PushReply {
    let Accepted { id, topic, epoch, seq, duplicate } = accepted;
    v1::PushReply { id, topic, epoch, seq, duplicate, error: String::new() }
}

#[tonic::async_trait]
impl v1::center_server::Center for Grpc {
    async fn push(&self, request: Request<v1::PushRequest>) -> Result<Response<v1::PushReply>, Status> {
        self.call("Push", request, |request| &request.app, |center, caller, request| async move {
            Ok(reply_of(center.push(&caller, push_of(request)?)?.await?))
        })
        .await
    }

    type PushStreamStream = Pin<Box<dyn Stream<Item = Result<v1::PushReply, Status>> + Send>>;

    async fn push_stream(
        &self,
        request: Request<Streaming<v1::PushRequest>>,
    ) -> Result<Response<Self::PushStreamStream>, Status> {
        let permit = self
            .center
            .inner
            .batches
            .clone()
            .try_acquire_owned()
            .map_err(|_| Problem::new(Kind::Overloaded, "too many batches are being carried out"))?;
        let key =
            request.metadata().get("authorization").and_then(|value| auth::bearer(Some(value.as_bytes())));
        if key.is_none() {
            // No message is needed to say so.
            self.center.authorise("", None)?;
        }
        let key = key.map(str::to_owned);
        let requests = request.into_inner();
        let (replies, receiver) = mpsc::channel(64);
        let center = self.center.clone();
        // It ends with the requests, or when nobody takes the replies.
        tokio::spawn(async move {
            let _permit = permit;
            let (started, metrics) = (Instant::now(), center.inner.metrics.clone());
            let in_flight = metrics.begin();
            pushes(center, key, requests, replies).await;
            drop(in_flight);
            metrics.request("PushStream", "Ok", started.elapsed());
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn start_broadcast(
        &self,
        request: Request<v1::CenterBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        self.call(
            "StartBroadcast",
            request,
            |request| &request.app,
            |center, caller, request| async move {
                let broadcast = Broadcast {
                    payload: request.payload,
                    qos: request.qos.map(u64::from),
                    ttl_seconds: request.ttl_seconds,
                    store: request.store,
                    id: (!request.id.is_empty()).then_some(request.id),
                    rate_per_second: request.rate_per_second,
                    properties: request.properties.unwrap_or_default(),
                };
                center.start_broadcast(&caller, broadcast).await
            },
        )
        .await
    }

    async fn get_broadcast(
        &self,
        request: Request<v1::GetBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        self.call(
            "GetBroadcast",
            request,
            |request| &request.app,
            |center, caller, request| async move { center.broadcast(&caller, &request.job).await },
        )
        .await
    }

    async fn control_broadcast(
        &self,
        request: Request<v1::ControlBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        self.call(
            "ControlBroadcast",
            request,
            |request| &request.app,
            |center, caller, request| async move {
                center.control_broadcast(&caller, &request.job, request.state()).await
            },
        )
        .await
    }

    async fn get_user(
        &self,
        request: Request<v1::SessionsRequest>,
    ) -> Result<Response<v1::UserReply>, Status> {
        self.call(
            "GetUser",
            request,
            |request| &request.app,
            |center, caller, request| async move {
                let sessions = center.user(&caller, &request.user).await?.sessions;
                Ok(v1::UserReply { online: !sessions.is_empty(), sessions })
            },
        )
        .await
    }

    async fn kick_user(&self, request: Request<v1::KickRequest>) -> Result<Response<v1::KickReply>, Status> {
        self.call(
            "KickUser",
            request,
            |request| &request.app,
            |center, caller, request| async move {
                let device = (!request.client_id.is_empty()).then_some(request.client_id.as_str());
                Ok(v1::KickReply { kicked: center.kick(&caller, &request.user, device).await? })
            },
        )
        .await
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<v1::PullReply>, Status> {
        self.call(
            "Pull",
            request,
            |request| &request.app,
            |center, caller, request| async move {
                let after = (!request.after.is_empty()).then_some(request.after.as_str());
                let limit = if request.limit == 0 { DEFAULT_PULL } else { request.limit };
                center.pull(&caller, &request.topic, after, limit).await
            },
        )
        .await
    }
}

/// Carries out the pushes of a stream, and replies in their order.
async fn pushes(
    center: Center,
    key: Option<String>,
    mut requests: Streaming<v1::PushRequest>,
    replies: mpsc::Sender<Result<v1::PushReply, Status>>,
) {
    let options = &center.inner.options;
    let mut in_flight = FuturesOrdered::new();
    let (mut bytes, mut open) = (0, true);
    while open || !in_flight.is_empty() {
        let reading =
            open && in_flight.len() < options.batch_in_flight && bytes < options.batch_in_flight_bytes;
        tokio::select! {
            Some((length, reply)) = in_flight.next(), if !in_flight.is_empty() => {
                bytes -= length;
                if replies.send(Ok(reply)).await.is_err() {
                    return;
                }
            }
            () = replies.closed() => return,
            request = requests.message(), if reading => match request {
                Ok(Some(request)) => {
                    let (id, length) = (request.id.clone(), request.payload.len());
                    bytes += length;
                    let begun = begin(&center, key.as_deref(), request).await;
                    in_flight.push_back(async move {
                        let result = match begun {
                            Ok(accepted) => accepted.await,
                            Err(problem) => Err(problem),
                        };
                        let refused = |problem: Problem| v1::PushReply { id, error: problem.detail, ..v1::PushReply::default() };
                        (length, result.map_or_else(refused, reply_of))
                    }.boxed());
                }
                Ok(None) => open = false,
                Err(status) => {
                    tracing::debug!(%status, "push stream failed");
                    open = false;
                }
            },
        }
    }
}

async fn begin(
    center: &Center,
    key: Option<&str>,
    request: v1::PushRequest,
) -> Result<impl Future<Output = Result<Accepted, Problem>> + Send + use<>, Problem> {
    let caller = center.authorise(&request.app, key)?;
    center.push_in_time(&caller, push_of(request)?).await
}
