//! Members and snapshots of the keeper itself, asked of any node: what only the leader can do is handed to it.

use std::time::Duration;

use carillon_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status};

use crate::core::Core;
use crate::raft::network::{PeerClient, within};

const FORWARD_TIMEOUT: Duration = Duration::from_secs(20);
/// A new leader has heard everyone who is alive after this.
const AFTER_HAND_OVER: Duration = Duration::from_secs(1);
/// A part of a snapshot that nobody takes within this ends the call.
const PART_TIMEOUT: Duration = Duration::from_secs(10);
/// Size of a part of a snapshot that is saved.
const PART_BYTES: usize = 512 * 1024;
/// Parts under way.
const PARTS: usize = 4;

/// What the leader has answered, without what its connection adds.
fn forwarded(status: Status) -> Status {
    match status.code() {
        Code::Ok => Status::internal("an empty failure"),
        _ => Status::new(status.code(), status.message()),
    }
}

impl Core {
    fn leader(&self) -> Result<PeerClient, Status> {
        Ok(self.node.leader_client()?)
    }

    pub(crate) async fn member_list(&self) -> Result<v1::MemberListResponse, Status> {
        let leader_id = self.node.progress().leader.unwrap_or(0);
        if self.node.leads() {
            return Ok(v1::MemberListResponse { members: self.node.members(), leader_id });
        }
        // The leader knows more of them; when there is none, what is known here must do.
        if let Ok(mut leader) = self.leader() {
            let request = within(FORWARD_TIMEOUT, v1::IdentifyRequest { confirm: false });
            if let Ok(answer) = leader.identify(request).await {
                let answer = answer.into_inner();
                return Ok(v1::MemberListResponse { members: answer.members, leader_id: answer.leader_id });
            }
        }
        Ok(v1::MemberListResponse { members: self.node.members(), leader_id })
    }

    pub(crate) async fn take_in(&self, address: String, node_id: u64) -> Result<u64, Status> {
        check_address(&address)?;
        if self.node.leads() {
            return self.node.take_in(&address, node_id).await;
        }
        let request = within(FORWARD_TIMEOUT, v1::JoinRequest { address, node_id });
        let answer = self.leader()?.join(request).await;
        answer.map(|answer| answer.into_inner().node_id).map_err(forwarded)
    }

    pub(crate) async fn take_out(&self, node_id: u64) -> Result<(), Status> {
        if self.node.leads() {
            if node_id != self.node.id() {
                return self.node.remove(node_id).await;
            }
            // Whoever leads then takes this node out, once it has heard who is alive.
            self.node.hand_over(0).await?;
            tokio::time::sleep(AFTER_HAND_OVER).await;
        }
        let request = within(FORWARD_TIMEOUT, v1::MemberRemoveRequest { node_id });
        self.leader()?.remove_member(request).await.map(drop).map_err(forwarded)
    }

    pub(crate) async fn hand_over(&self, node_id: u64) -> Result<u64, Status> {
        if self.node.leads() {
            return self.node.hand_over(node_id).await;
        }
        let request = within(FORWARD_TIMEOUT, v1::LeadershipTransferRequest { node_id });
        let answer: Result<Response<v1::LeadershipTransferResponse>, Status> =
            self.leader()?.move_lead(request).await;
        answer.map(|answer| answer.into_inner().node_id).map_err(forwarded)
    }

    /// The state as of now, as a snapshot's file.
    pub(crate) async fn save_snapshot(
        &self,
    ) -> Result<ReceiverStream<Result<v1::SaveSnapshotResponse, Status>>, Status> {
        self.node.linearize().await?;
        let node = self.node.clone();
        let (sender, receiver) = mpsc::channel(PARTS);
        let permit = self.saving.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("another snapshot is being saved"))?;
        let file = tokio::task::spawn_blocking(move || node.snapshot_file()).await;
        let file = file.map_err(|error| Status::internal(error.to_string()))?;
        let file = bytes::Bytes::from(file.map_err(|error| Status::internal(error.to_string()))?);
        tokio::spawn(async move {
            for at in (0..file.len()).step_by(PART_BYTES) {
                let part = file.slice(at..(at + PART_BYTES).min(file.len()));
                let part = Ok(v1::SaveSnapshotResponse { part });
                if sender.send_timeout(part, PART_TIMEOUT).await.is_err() {
                    break;
                }
            }
            drop(permit);
        });
        Ok(ReceiverStream::new(receiver))
    }
}

fn check_address(address: &str) -> Result<(), Status> {
    let port =
        address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(port)) if port != 0 => Ok(()),
        _ => Err(Status::invalid_argument(format!("{address:?} is not an address: it must be host:port"))),
    }
}

/// For as long as this node leads: promotes learners that have caught up, and sees to it that the others know where this
/// node is.
pub(crate) async fn steward(core: std::sync::Arc<Core>, address: String) {
    let mut pause = tokio::time::interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            _ = pause.tick() => {}
            () = core.stop.cancelled() => return,
        }
        if !core.node.leads() {
            continue;
        }
        let changes = async {
            core.node.finish_change().await?;
            core.node.announce(&address).await?;
            core.node.promote().await
        };
        tokio::select! {
            outcome = changes => if let Err(status) = outcome {
                tracing::debug!(error = status.message(), "members not changed, trying again");
            },
            () = core.stop.cancelled() => return,
        }
    }
}
