//! How a call finds a keeper that answers, and when it may be tried again.

use std::sync::Arc;
use std::time::Duration;

use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::{Admin, AdminError};
use crate::keepers::Keepers;
use crate::link;
use crate::tls::{self, Tls};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// … and one that changes the keeper's members.
const SLOW_CALL_TIMEOUT: Duration = Duration::from_secs(30);

impl Admin {
    /// For what changes nothing: tries one keeper after another, whatever has become of the call at the last.
    pub(super) async fn call<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(CALL_TIMEOUT, true, request, send).await
    }

    /// For what changes something: goes on to the next keeper only when the last one has certainly not done it.
    pub(super) async fn write<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(CALL_TIMEOUT, false, request, send).await
    }

    /// The same, for what the keeper itself must wait for.
    pub(super) async fn slow_write<Q: Clone, A>(
        &self,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        self.call_within(SLOW_CALL_TIMEOUT, false, request, send).await
    }

    async fn call_within<Q: Clone, A>(
        &self,
        limit: Duration,
        repeatable: bool,
        request: Q,
        send: impl AsyncFn(KeeperClient<Channel>, Q) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, AdminError> {
        let keepers = self.inner.keepers.all();
        let mut reason = "no keeper is configured".to_owned();
        let known = self.inner.client.lock().clone();
        let known = known.into_iter().map(Ok);
        for candidate in known.chain(keepers.iter().map(Err)) {
            let (client, fresh) = match candidate {
                Ok(client) => (client, false),
                Err(keeper) => match connect(keeper, self.inner.keepers.tls()).await {
                    Ok(client) => (client, true),
                    Err(error) => {
                        reason = error;
                        continue;
                    }
                },
            };
            match tokio::time::timeout(limit, send(client.clone(), request.clone())).await {
                Ok(Ok(answer)) => {
                    if fresh {
                        tokio::spawn(learn(self.inner.keepers.clone(), client.clone()));
                    }
                    *self.inner.client.lock() = Some(client);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) if was_not_done(&status) => status.message().clone_into(&mut reason),
                Ok(Err(status)) if may_be_done(status.code()) => {
                    if !repeatable {
                        return Err(AdminError::Uncertain(status.message().to_owned()));
                    }
                    status.message().clone_into(&mut reason);
                }
                Ok(Err(status)) => return Err(explain(status)),
                Err(_) => {
                    reason = format!("no answer within {} s", limit.as_secs());
                    if !repeatable {
                        return Err(AdminError::Uncertain(reason));
                    }
                }
            }
        }
        *self.inner.client.lock() = None;
        Err(AdminError::Unreachable { keepers: keepers.join(", "), reason })
    }
}

/// Who the members are, for when this keeper is gone.
async fn learn(keepers: Arc<Keepers>, mut client: KeeperClient<Channel>) {
    let asked = client.member_list(v1::MemberListRequest {});
    if let Ok(Ok(list)) = tokio::time::timeout(CALL_TIMEOUT, asked).await {
        let members: Vec<String> =
            list.into_inner().members.into_iter().map(|member| member.address).collect();
        keepers.learn(&members);
    }
}

/// The keeper says that it has done nothing and that another may (`UNAVAILABLE`, from itself), or was not even reached.
fn was_not_done(status: &Status) -> bool {
    let Some(mut source) = std::error::Error::source(status) else {
        return status.code() == Code::Unavailable;
    };
    loop {
        if source.is::<tonic::ConnectError>() {
            return true;
        }
        match source.source() {
            Some(next) => source = next,
            None => return false,
        }
    }
}

/// The call got lost, or its outcome.
fn may_be_done(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled | Code::Internal
    )
}

async fn connect(keeper: &str, tls: Option<&Arc<Tls>>) -> Result<KeeperClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(keeper.to_owned()).map_err(|error| error.to_string())?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    Ok(link::client(tls::connect(&endpoint, tls).await?))
}

pub(super) fn explain(status: Status) -> AdminError {
    let message = status.message().to_owned();
    match status.code() {
        Code::NotFound => AdminError::NotFound(message),
        Code::PermissionDenied | Code::Unauthenticated => AdminError::Denied(message),
        Code::InvalidArgument | Code::FailedPrecondition | Code::ResourceExhausted => {
            AdminError::Invalid(message)
        }
        _ => AdminError::Other(message),
    }
}
