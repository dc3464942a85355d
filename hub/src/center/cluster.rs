//! What the center asks of the rest of the cluster, so that its own logic can be tested without one.

use super::revoke;
use async_trait::async_trait;
use carillon_agent::revoked::RevokedUser;
use carillon_proto::exchange::CallError;
use carillon_proto::v1::registry_client::RegistryClient;
use carillon_proto::{topic, v1};
use futures::future::BoxFuture;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::peers::PeerError;
use crate::registry::{OwnerClient, PublishError};

/// Why it was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// Not reached, or no answer: it may or may not have been carried out.
    #[error("{0}")]
    Unavailable(String),
    /// Not carried out: a queue is full.
    #[error("{0}")]
    Overloaded(String),
    /// Never acceptable as it is.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    NotFound(String),
    /// Not in the state it is in.
    #[error("{0}")]
    Conflict(String),
}

/// Owners of topics, and the saver. Every call ends within a bounded time.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// Queues the request now, so that calls keep their order, and gives a future for the owner's answer.
    fn publish(&self, request: v1::PublishRequest)
    -> BoxFuture<'static, Result<v1::Published, ClusterError>>;
    async fn sessions(&self, request: v1::SessionsRequest) -> Result<v1::SessionsReply, ClusterError>;
    async fn kick(&self, request: v1::KickRequest) -> Result<v1::KickReply, ClusterError>;
    /// Revokes tokens of a user; it holds when this returns, and gateways follow within about a second.
    async fn revoke(&self, app: &str, user: &str, revoked: RevokedUser) -> Result<(), ClusterError>;
    /// The last report of every gateway, each gateway once.
    async fn overview(&self) -> Result<Vec<v1::GatewayOverview>, ClusterError>;
    async fn start_broadcast(
        &self,
        request: v1::StartBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError>;
    async fn get_broadcast(&self, request: v1::GetBroadcastRequest)
    -> Result<v1::BroadcastJob, ClusterError>;
    async fn control_broadcast(
        &self,
        request: v1::ControlBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError>;
    /// Reads a topic's log.
    async fn read(&self, request: v1::Read) -> Result<v1::ReadReply, ClusterError>;
}

/// Owners are found and asked by the client of the registry, which tries again until its deadline.
#[async_trait]
impl Cluster for OwnerClient {
    fn publish(
        &self,
        request: v1::PublishRequest,
    ) -> BoxFuture<'static, Result<v1::Published, ClusterError>> {
        let answer = OwnerClient::publish(self, request);
        Box::pin(async move {
            answer.await.map_err(|error| match error {
                PublishError::Overloaded => ClusterError::Overloaded(error.to_string()),
                PublishError::TimedOut(_) => ClusterError::Unavailable(error.to_string()),
                PublishError::Refused(text) => ClusterError::Refused(text),
            })
        })
    }

    async fn sessions(&self, request: v1::SessionsRequest) -> Result<v1::SessionsReply, ClusterError> {
        let topic = topic::inbox(&request.app, &request.user);
        let ask = |mut client: RegistryClient<Channel>| {
            let request = request.clone();
            async move { client.sessions(request).await }
        };
        Ok(self.ask_owner(&topic, ask).await?)
    }

    async fn kick(&self, request: v1::KickRequest) -> Result<v1::KickReply, ClusterError> {
        let topic = topic::inbox(&request.app, &request.user);
        let ask = |mut client: RegistryClient<Channel>| {
            let request = request.clone();
            async move { client.kick(request).await }
        };
        Ok(self.ask_owner(&topic, ask).await?)
    }

    async fn revoke(&self, app: &str, user: &str, revoked: RevokedUser) -> Result<(), ClusterError> {
        revoke::revoke(&self.directory().admin(), app, user, revoked).await
    }

    async fn overview(&self) -> Result<Vec<v1::GatewayOverview>, ClusterError> {
        Ok(OwnerClient::overview(self).await?)
    }

    async fn start_broadcast(
        &self,
        request: v1::StartBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        let topic = request.message.as_ref().map_or_else(String::new, |message| message.topic.clone());
        let ask = |mut client: RegistryClient<Channel>| {
            let request = request.clone();
            async move { client.start_broadcast(request).await }
        };
        Ok(self.ask_owner(&topic, ask).await?)
    }

    async fn get_broadcast(
        &self,
        request: v1::GetBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        let topic = topic::everyone(&request.app);
        let ask = |mut client: RegistryClient<Channel>| {
            let request = request.clone();
            async move { client.get_broadcast(request).await }
        };
        Ok(self.ask_owner(&topic, ask).await?)
    }

    async fn control_broadcast(
        &self,
        request: v1::ControlBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        let topic = topic::everyone(&request.app);
        let ask = |mut client: RegistryClient<Channel>| {
            let request = request.clone();
            async move { client.control_broadcast(request).await }
        };
        Ok(self.ask_owner(&topic, ask).await?)
    }

    async fn read(&self, request: v1::Read) -> Result<v1::ReadReply, ClusterError> {
        self.directory().read(request).await.map_err(|error| match error {
            PeerError::Call(CallError::Overloaded(_)) => ClusterError::Overloaded(error.to_string()),
            PeerError::Saver { code: v1::saver_error::Code::Invalid, text } => ClusterError::Refused(text),
            error => ClusterError::Unavailable(error.to_string()),
        })
    }
}

impl From<Status> for ClusterError {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::NotFound => ClusterError::NotFound(text),
            Code::FailedPrecondition | Code::AlreadyExists => ClusterError::Conflict(text),
            Code::InvalidArgument | Code::OutOfRange | Code::PermissionDenied => ClusterError::Refused(text),
            Code::ResourceExhausted => ClusterError::Overloaded(text),
            code => {
                ClusterError::Unavailable(if text.is_empty() { code.description().to_owned() } else { text })
            }
        }
    }
}
