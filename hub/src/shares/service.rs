//! The gRPC face of shared subscriptions: a stream for each gateway.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use carillon_proto::v1::{self, settlement::Outcome, shares_down, shares_up};
use carillon_proto::{share as naming, topic};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Shared;
use super::batches::Outlet;
use super::home::Command;

#[derive(Clone)]
pub struct Service(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::shares_server::Shares for Service {
    type ServeStream = UnboundedReceiverStream<Result<v1::SharesDown, Status>>;

    async fn serve(
        &self,
        request: Request<Streaming<v1::SharesUp>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        if self.0.stop.is_cancelled() {
            return Err(Status::unavailable("the registry is being stopped"));
        }
        let stream = self.0.next_stream.fetch_add(1, Ordering::Relaxed);
        // Bounded by what members may have unsettled, which each home counts.
        let (outlet, down) = mpsc::unbounded_channel();
        let shared = self.0.clone();
        self.0.tasks.spawn(async move {
            let mut members = HashMap::new();
            let talk = talk(&shared, stream, &mut members, request.into_inner(), &outlet);
            if shared.stop.run_until_cancelled(talk).await.is_none() {
                // It is we who go: the members are still there, and join again elsewhere.
                let _ = outlet.send(Err(Status::unavailable("the registry is being stopped")));
                return;
            }
            let keys: HashSet<Arc<str>> = members.into_values().collect();
            for key in keys {
                shared.tell(&key, Command::StreamEnded { stream });
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(down)))
    }
}

/// Reads the stream to its end. `members`: their shares.
async fn talk(
    shared: &Arc<Shared>,
    stream: u64,
    members: &mut HashMap<u64, Arc<str>>,
    mut inbound: Streaming<v1::SharesUp>,
    outlet: &Outlet,
) {
    loop {
        let body = match inbound.message().await {
            Ok(Some(message)) => message.body,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(stream, %status, "a gateway's stream for shared subscriptions failed");
                return;
            }
        };
        match body {
            Some(shares_up::Body::Hello(hello)) => {
                tracing::debug!(stream, gateway = hello.instance, "a gateway has members of shares here");
            }
            Some(shares_up::Body::Join(join)) => {
                let is_valid = naming::parse(&join.share)
                    .is_some_and(|(name, filter)| !name.is_empty() && topic::check_filter(filter).is_ok());
                if !is_valid {
                    // A gateway checks what devices say: this one is broken.
                    tracing::warn!(stream, share = join.share, "a share with a name that is not valid");
                    continue;
                }
                let id = (stream, join.member);
                if !shared.ownership.owns(&join.share) {
                    let lost = shares_down::Body::Lost(v1::MemberLost { member: join.member });
                    let _ = outlet.send(Ok(v1::SharesDown { body: Some(lost) }));
                    continue;
                }
                let key: Arc<str> = join.share.into();
                members.insert(join.member, key.clone());
                shared.tell(
                    &key,
                    Command::Join {
                        id,
                        window: join.window as usize,
                        expiry_seconds: join.expiry_seconds,
                        outlet: outlet.clone(),
                    },
                );
            }
            Some(shares_up::Body::Leave(v1::LeaveShare { member, kept_seconds })) => {
                if let Some(key) = members.remove(&member) {
                    shared.tell(&key, Command::Leave { id: (stream, member), kept_seconds });
                }
            }
            Some(shares_up::Body::Settlements(v1::Settlements { settlements })) => {
                for settlement in settlements {
                    let Some(key) = members.get(&settlement.member) else { continue };
                    let (id, token) = ((stream, settlement.member), settlement.token);
                    match settlement.outcome() {
                        Outcome::Done => shared.tell(key, Command::Done { id, token }),
                        Outcome::Busy => shared.tell(key, Command::Busy { id, token }),
                        Outcome::Unspecified => {}
                    }
                }
            }
            Some(shares_up::Body::Ready(v1::MemberReady { member })) => {
                if let Some(key) = members.get(&member) {
                    shared.tell(key, Command::Ready { id: (stream, member) });
                }
            }
            None => {}
        }
    }
}
