//! Node to node: one gRPC channel to each other node, a stream for the log, calls for the rest.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use carillon_agent::tls::{self, Tls, scheme};
use carillon_proto::MAX_GRPC_MESSAGE_BYTES;
use carillon_proto::v1;
use carillon_proto::v1::keeper_peer_client::KeeperPeerClient;
use futures::{Stream, StreamExt as _};
use openraft::async_runtime::WatchReceiver as _;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{BasicNode, OptionalSend, RaftMetrics};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::types::{Snapshot, TypeConfig, Vote};
use super::wire;
use crate::identity::{CLUSTER_METADATA, Identity, NODE_METADATA, node_text};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection on which nothing comes back is given up after about twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Before a node that could not be reached is tried again.
const BACKOFF: Duration = Duration::from_millis(100);
/// Before a node that did not take a snapshot is sent it again: doubled with each time, up to 64 times this. To send one is
/// to read the whole of it.
const SNAPSHOT_BACKOFF: Duration = Duration::from_millis(100);
/// Size of a part of a snapshot.
const PART_BYTES: usize = 512 * 1024;
/// Parts of a snapshot that may be under way.
const PARTS: usize = 4;
/// Requests that wait to be sent on a stream of appends.
const APPENDS: usize = 16;

/// A client that says which cluster it is of, and which node it means.
pub(crate) type PeerClient = KeeperPeerClient<InterceptedService<Channel, Labels>>;

/// What is written on every call.
#[derive(Clone)]
pub(crate) struct Labels {
    identity: Arc<Identity>,
    /// None: whichever node is at the address.
    node: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Labels {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        if let Some(cluster) = self.identity.cluster()
            && let Ok(cluster) = cluster.parse()
        {
            metadata.insert(CLUSTER_METADATA, cluster);
        }
        if let Some(node) = &self.node {
            metadata.insert(NODE_METADATA, node.clone());
        }
        Ok(request)
    }
}

/// Makes connections to other nodes, and keeps those to members.
#[derive(Clone)]
pub(crate) struct Network {
    identity: Arc<Identity>,
    tls: Option<Arc<Tls>>,
    /// By member: its address, and the channel to it.
    channels: Arc<Mutex<HashMap<u64, (String, Channel)>>>,
    /// By member: the last heartbeat there and back.
    round_trips: Arc<Mutex<HashMap<u64, Duration>>>,
    /// Of this node's consensus, once it runs.
    metrics: Arc<OnceLock<WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>>>,
}

impl Network {
    pub(crate) fn new(identity: Arc<Identity>, tls: Option<Arc<Tls>>) -> Self {
        Network {
            identity,
            tls,
            channels: Arc::default(),
            round_trips: Arc::default(),
            metrics: Arc::default(),
        }
    }

    /// From now on members are where consensus says that they are.
    pub(crate) fn follow(&self, metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>) {
        let _ = self.metrics.set(metrics);
    }

    /// Where a member is now.
    fn address_of(&self, node: u64) -> Option<String> {
        let metrics = self.metrics.get()?.borrow_watched();
        metrics.membership_config.membership().get_node(&node).map(|node| node.addr.clone())
    }

    /// As the leader: has a majority been heard lately?
    fn in_touch(&self) -> bool {
        let metrics = self.metrics.get();
        metrics.is_some_and(|metrics| super::hears_majority(&metrics.borrow_watched(), super::TOUCH))
    }

    /// How long the last heartbeat to a member took, and back.
    pub(super) fn round_trip(&self, node: u64) -> Option<Duration> {
        self.round_trips.lock().get(&node).copied()
    }

    /// A client for a member. It connects when first used.
    pub(crate) fn member(&self, node: u64, address: &str) -> Result<PeerClient, Status> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(&node) {
            Some((known, channel)) if known == address => channel.clone(),
            _ => {
                let channel = self.channel(address)?;
                if let Some(metrics) = self.metrics.get() {
                    let metrics = metrics.borrow_watched();
                    let members = metrics.membership_config.membership();
                    channels.retain(|known, _| members.get_node(known).is_some());
                    self.round_trips.lock().retain(|known, _| members.get_node(known).is_some());
                }
                channels.insert(node, (address.to_owned(), channel.clone()));
                channel
            }
        };
        drop(channels);
        Ok(self.labelled(channel, Some(node)))
    }

    /// A client for whichever node is at an address.
    pub(crate) fn stranger(&self, address: &str) -> Result<PeerClient, Status> {
        Ok(self.labelled(self.channel(address)?, None))
    }

    fn channel(&self, address: &str) -> Result<Channel, Status> {
        let endpoint = Endpoint::from_shared(format!("{}://{address}", scheme(self.tls.as_ref())))
            .map_err(|error| Status::invalid_argument(format!("{address:?} is not host:port: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        if let Some(tls) = &self.tls {
            return Ok(tls::connect_lazy(&endpoint, tls));
        }
        #[cfg(not(test))]
        let channel = endpoint.connect_lazy();
        #[cfg(test)]
        let channel = crate::simulation::connect_lazy(&endpoint);
        Ok(channel)
    }

    fn labelled(&self, channel: Channel, node: Option<u64>) -> PeerClient {
        let node = node.and_then(|node| node_text(node).parse().ok());
        let labels = Labels { identity: self.identity.clone(), node };
        KeeperPeerClient::with_interceptor(channel, labels)
            .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES)
    }
}

/// A call that takes longer fails.
pub(crate) fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// A connection to one other node.
pub(crate) struct Peer {
    network: Network,
    node: u64,
    /// Where it was when this was made.
    address: String,
    /// Tries in a row that a snapshot was not taken.
    snapshots_failed: u32,
    /// Nothing is under way on it.
    idle: Option<Appending>,
}

/// A stream of appends: it outlives what is sent on it, because opening one costs more than a heartbeat.
struct Appending {
    requests: mpsc::Sender<v1::RaftAppend>,
    answers: Streaming<v1::RaftAppended>,
}

impl Peer {
    fn client(&self) -> Result<PeerClient, RPCError<TypeConfig>> {
        let address = self.network.address_of(self.node).unwrap_or_else(|| self.address.clone());
        self.network.member(self.node, &address).map_err(|status| self.failed(&status))
    }

    /// openraft waits before it tries again what is unreachable, and not otherwise.
    fn failed(&self, status: &Status) -> RPCError<TypeConfig> {
        let text = format!("keeper {} at {}: {}", node_text(self.node), self.address, status.message());
        match status.code() {
            Code::DeadlineExceeded => RPCError::Network(NetworkError::from_string(text)),
            _ => RPCError::Unreachable(Unreachable::from_string(text)),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer {
            network: self.clone(),
            node: target,
            address: node.addr.clone(),
            snapshots_failed: 0,
            idle: None,
        }
    }
}

impl Peer {
    /// The stream that is there, or a new one.
    async fn appending(&mut self, limit: Duration) -> Result<Appending, RPCError<TypeConfig>> {
        if let Some(idle) = self.idle.take().filter(|idle| !idle.requests.is_closed()) {
            return Ok(idle);
        }
        let (requests, receiver) = mpsc::channel(APPENDS);
        let mut client = self.client()?;
        match tokio::time::timeout(limit, client.append(ReceiverStream::new(receiver))).await {
            Ok(Ok(answers)) => Ok(Appending { requests, answers: answers.into_inner() }),
            Ok(Err(status)) => {
                // openraft waits only once it is asked for a request, and it was not: a connection that is refused
                // would be tried again at once, for ever.
                tokio::time::sleep(BACKOFF).await;
                Err(self.failed(&status))
            }
            Err(_) => Err(self.failed(&Status::unavailable("it does not answer"))),
        }
    }
}

/// What is being sent on a stream. Unless it comes to its end, the stream ends with it.
struct Sending<'s, S> {
    peer: &'s mut Peer,
    stream: Appending,
    /// None: all of it is sent.
    input: Option<S>,
    /// Requests without an answer yet: when each was sent, if nothing has to go to disk first.
    pending: VecDeque<Option<Instant>>,
}

type Appended = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;

impl<'s, S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin> Sending<'s, S> {
    /// The next answer, and what is left; None: everything is answered.
    async fn next(mut self) -> Option<(Appended, Option<Self>)> {
        loop {
            let Some(input) = &mut self.input else {
                if self.pending.is_empty() {
                    self.peer.idle = Some(self.stream);
                    return None;
                }
                return Some(self.answer().await);
            };
            let in_touch = self.peer.network.in_touch();
            tokio::select! {
                request = input.next() => match request.map(|request| wire::append(request, in_touch)) {
                    Some(Ok(request)) => {
                        // Behind others, it would wait for what they have to put on disk.
                        let quick = request.entries.is_empty() && self.pending.is_empty();
                        self.pending.push_back(quick.then(Instant::now));
                        if self.stream.requests.send(request).await.is_err() {
                            return Some((Err(self.lost("the stream has ended")), None));
                        }
                    }
                    Some(Err(error)) => return Some((Err(self.lost(&error.to_string())), None)),
                    None => self.input = None,
                },
                answer = self.stream.answers.message(), if !self.pending.is_empty() => {
                    return Some(self.taken(answer));
                }
            }
        }
    }

    async fn answer(mut self) -> (Appended, Option<Self>) {
        let answer = self.stream.answers.message().await;
        self.taken(answer)
    }

    fn taken(mut self, answer: Result<Option<v1::RaftAppended>, Status>) -> (Appended, Option<Self>) {
        if let Some(sent) = self.pending.pop_front().flatten() {
            self.peer.network.round_trips.lock().insert(self.peer.node, sent.elapsed());
        }
        match answer.map(|answer| answer.map(wire::parse_appended).transpose()) {
            Ok(Ok(Some(Ok(place)))) => (Ok(Ok(place)), Some(self)),
            // The other node ends the stream after a refusal.
            Ok(Ok(Some(refused))) => (Ok(refused), None),
            Ok(Ok(None)) => (Err(self.lost("the stream has ended")), None),
            Ok(Err(status)) | Err(status) => (Err(self.peer.failed(&status)), None),
        }
    }

    fn lost(&self, why: &str) -> RPCError<TypeConfig> {
        self.peer.failed(&Status::unavailable(why))
    }
}

impl NetStreamAppend<TypeConfig> for Peer {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Appended>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let stream = self.appending(option.hard_ttl()).await?;
            let sending = Sending { peer: self, stream, input: Some(input), pending: VecDeque::new() };
            let answers = futures::stream::unfold(Some(sending), |sending| async { sending?.next().await });
            Ok(Box::pin(answers) as BoxStream<'s, _>)
        })
    }
}

impl Peer {
    async fn ballot(
        &self,
        request: VoteRequest<TypeConfig>,
        pre_vote: bool,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let ballot = within(option.soft_ttl(), wire::ballot(&request, pre_vote));
        let answer = self.client()?.vote(ballot).await;
        answer
            .and_then(|answer| wire::parse_ballot_answer(answer.into_inner()))
            .map_err(|status| self.failed(&status))
    }
}

impl NetVote<TypeConfig> for Peer {
    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ballot(request, false, option).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ballot(request, true, option).await
    }
}

impl NetSnapshot<TypeConfig> for Peer {
    type SnapshotData = Vec<u8>;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        use v1::raft_snapshot_part::Part;
        if self.snapshots_failed > 0 {
            tokio::time::sleep(SNAPSHOT_BACKOFF * 2_u32.pow(self.snapshots_failed.min(6))).await;
        }
        self.snapshots_failed += 1;
        let head = wire::snapshot_head(&vote, &snapshot.meta, snapshot.snapshot.len())
            .map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
        let (sender, receiver) = mpsc::channel(PARTS);
        let feed = async move {
            let body = bytes::Bytes::from(snapshot.snapshot);
            let mut part = Part::Head(head);
            let mut at = 0;
            while sender.send(v1::RaftSnapshotPart { part: Some(part) }).await.is_ok() && at < body.len() {
                let end = (at + PART_BYTES).min(body.len());
                part = Part::Bytes(body.slice(at..end));
                at = end;
            }
        };
        let mut client = self.client()?;
        let parts = ReceiverStream::new(receiver);
        let sent = async {
            let ((), answer) =
                futures::future::join(feed, client.install_snapshot(within(option.hard_ttl(), parts))).await;
            answer
        };
        tokio::select! {
            answer = sent => {
                let answer = answer.map_err(|status| StreamingError::from(self.failed(&status)))?;
                let vote = wire::parse_vote(answer.into_inner().vote)
                    .map_err(|status| StreamingError::from(self.failed(&status)))?;
                self.snapshots_failed = 0;
                Ok(SnapshotResponse { vote })
            }
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }
}

impl NetTransferLeader<TypeConfig> for Peer {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let call = within(option.soft_ttl(), wire::take_lead(&request));
        let answer = self.client()?.take_lead(call).await.map_err(|status| self.failed(&status))?;
        wire::parse_take_lead_answer(answer.into_inner(), &request).map_err(|status| self.failed(&status))
    }
}

impl NetBackoff<TypeConfig> for Peer {
    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}
