//! The gRPC face of the registry.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use carillon_agent::Live;
use carillon_agent::app::App;
use carillon_proto::{topic, v1};
use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::attach::{self, AttachContext, Attachments, Outbound, OutboundLimits, OutboundStream};
use super::broadcast::Jobs;
use super::core::Publish;
use super::metrics::Metrics;
use super::worker::{Input, To, Workers};
use super::{Ownership, RegistryConfig};

/// Publishes of one stream that may be unanswered; then no more are read from it.
const STREAM_UNANSWERED: usize = 65_536;
/// Answers in one batch.
const REPLIES: usize = 1024;

/// What all calls share.
pub struct Shared {
    pub workers: Workers,
    pub attachments: Arc<Attachments>,
    pub jobs: Arc<Jobs>,
    pub ownership: Ownership,
    pub apps: Live<BTreeMap<String, Arc<App>>>,
    pub config: Live<crate::config::HubConfig>,
    pub metrics: Metrics,
    /// No more publishes are taken.
    pub closing: CancellationToken,
    /// Publish and attach streams that are open.
    pub streams: TaskTracker,
}

#[derive(Clone)]
pub struct Service(pub Arc<Shared>);

impl Shared {
    fn owned(&self, name: &str) -> Result<(), Status> {
        if self.ownership.owns(name) { Ok(()) } else { Err(not_owner()) }
    }

    fn inbox(&self, app: &str, user: &str) -> Result<String, Status> {
        topic::check_app(app).map_err(|error| Status::invalid_argument(format!("app {error}")))?;
        topic::check_user(user).map_err(|error| Status::invalid_argument(format!("user {error}")))?;
        Ok(topic::inbox(app, user))
    }

    fn limits(&self) -> OutboundLimits {
        let RegistryConfig { attach_queue_messages, attach_queue_bytes, .. } = self.config.borrow().registry;
        OutboundLimits { messages: attach_queue_messages as usize, bytes: attach_queue_bytes as usize }
    }
}

fn not_owner() -> Status {
    Status::aborted("the slot is owned by another registry instance")
}

fn stopping() -> Status {
    Status::unavailable("the registry is being stopped")
}

type Replies = Pin<Box<dyn Stream<Item = Result<v1::PublishedBatch, Status>> + Send>>;

#[tonic::async_trait]
impl v1::registry_server::Registry for Service {
    type PublishStream = Replies;

    async fn publish(
        &self,
        request: Request<Streaming<v1::PublishBatch>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        if self.0.closing.is_cancelled() {
            return Err(stopping());
        }
        let mut inbound = request.into_inner();
        let (sender, receiver) = mpsc::channel(STREAM_UNANSWERED);
        let workers = self.0.workers.clone();
        let closing = self.0.closing.clone();
        // Each request takes its place among the answers along. So the stream of answers ends when the last request
        // has been answered, and a publisher that reads no answers is read from no more.
        self.0.streams.spawn(async move {
            loop {
                let batch = tokio::select! {
                    biased;
                    () = closing.cancelled() => break,
                    batch = inbound.message() => batch,
                };
                let Ok(Some(batch)) = batch else { break };
                for request in batch.requests {
                    let Ok(permit) = sender.clone().reserve_owned().await else { return };
                    let to = To::Stream { correlation: request.correlation, permit };
                    let publish = Publish {
                        token: 0,
                        message: request.message.unwrap_or_default(),
                        store: request.store,
                        idempotent: request.idempotent,
                        broadcast: None,
                    };
                    workers.publish(publish, to);
                }
            }
        });
        let replies = futures::stream::unfold(receiver, async |mut receiver| {
            let mut replies = Vec::with_capacity(64);
            let count = receiver.recv_many(&mut replies, REPLIES).await;
            (count > 0).then_some((Ok(v1::PublishedBatch { replies }), receiver))
        });
        Ok(Response::new(Box::pin(replies)))
    }

    type AttachStream = OutboundStream;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachUp>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        if self.0.closing.is_cancelled() {
            return Err(stopping());
        }
        let (outbound, stream) = Outbound::new(self.0.limits(), self.0.metrics.overflows.clone());
        let context = AttachContext {
            workers: self.0.workers.clone(),
            attachments: self.0.attachments.clone(),
            jobs: self.0.jobs.clone(),
        };
        self.0.streams.spawn(attach::serve(Arc::new(context), request.into_inner(), outbound));
        Ok(Response::new(stream))
    }

    async fn sessions(
        &self,
        request: Request<v1::SessionsRequest>,
    ) -> Result<Response<v1::SessionsReply>, Status> {
        let v1::SessionsRequest { app, user } = request.into_inner();
        let inbox = self.0.inbox(&app, &user)?;
        let (reply, answer) = oneshot::channel();
        self.0.workers.to_owner(&inbox, Input::Who { app, user, reply }).await;
        let sessions = answer.await.map_err(|_| stopping())?.ok_or_else(not_owner)?;
        Ok(Response::new(v1::SessionsReply { sessions }))
    }

    async fn kick(&self, request: Request<v1::KickRequest>) -> Result<Response<v1::KickReply>, Status> {
        let v1::KickRequest { app, user, client_id } = request.into_inner();
        let inbox = self.0.inbox(&app, &user)?;
        let (reply, answer) = oneshot::channel();
        self.0.workers.to_owner(&inbox, Input::Kick { app, user, client_id, reply }).await;
        let kicked = answer.await.map_err(|_| stopping())?.ok_or_else(not_owner)?;
        Ok(Response::new(v1::KickReply { kicked }))
    }

    async fn overview(
        &self,
        _request: Request<v1::OverviewRequest>,
    ) -> Result<Response<v1::OverviewReply>, Status> {
        Ok(Response::new(v1::OverviewReply { gateways: self.0.attachments.overview() }))
    }

    async fn start_broadcast(
        &self,
        request: Request<v1::StartBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        let request = request.into_inner();
        let name = request.message.as_ref().map_or("", |message| message.topic.as_str());
        self.0.owned(name)?;
        let app = self.0.apps.borrow().get(topic::app_of(name)).cloned().unwrap_or_default();
        let job = Box::pin(self.0.jobs.start(&self.0.workers, &app, request)).await?;
        Ok(Response::new(job))
    }

    async fn get_broadcast(
        &self,
        request: Request<v1::GetBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        let v1::GetBroadcastRequest { app, job } = request.into_inner();
        self.0.owned(&topic::everyone(&app))?;
        Ok(Response::new(self.0.jobs.get(&app, &job).await?))
    }

    async fn control_broadcast(
        &self,
        request: Request<v1::ControlBroadcastRequest>,
    ) -> Result<Response<v1::BroadcastJob>, Status> {
        let request = request.into_inner();
        self.0.owned(&topic::everyone(&request.app))?;
        let job = self.0.jobs.control(&request.app, &request.job, request.state()).await?;
        Ok(Response::new(job))
    }
}
