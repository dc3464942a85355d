//! `Saver.Exchange` over any back end: takes requests as they come, keeps the order that `saver.proto` promises (appends
//! by topic, session operations by session, records by key), and answers in batches.
//!
//! Each stream has one task. It holds the store's futures itself, so a request costs no task of its own.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;

use carillon_proto::{topic, v1};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::metrics::Metrics;
use super::store::{Store, StoreError, StoreResult};
use v1::saver_reply::Result as Reply;
use v1::saver_request::Op;

/// Limits of one stream.
#[derive(Debug, Clone, Copy)]
pub struct ServiceLimits {
    /// Requests taken and not answered; then no more are read. Default 16,384.
    pub in_flight: usize,
    /// Appends given to the store at once, by one lane. Default 1024.
    pub append_batch: usize,
}

impl Default for ServiceLimits {
    fn default() -> Self {
        ServiceLimits { in_flight: 16_384, append_batch: 1024 }
    }
}

/// Batches of appends that a stream has under way at the same time. A topic always is of the same lane.
const APPEND_LANES: usize = 4;
/// Replies in one batch, and bytes after which a batch is sent.
const REPLY_BATCH: usize = 1024;
const REPLY_BYTES: usize = 8 << 20;
/// Bytes of answers that wait to be sent, beyond which no more are waited for.
const OUTGOING_BYTES: usize = 32 << 20;

/// The gRPC service. Clones share the store.
#[derive(Clone)]
pub struct SaverService {
    store: Arc<dyn Store>,
    limits: ServiceLimits,
    metrics: Metrics,
    stop: CancellationToken,
}

impl SaverService {
    /// Serves `store`, until `stop` is cancelled: then streams answer what they have taken, and end.
    pub fn new(
        store: Arc<dyn Store>,
        limits: ServiceLimits,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        SaverService { store, limits, metrics, stop }
    }
}

#[tonic::async_trait]
impl v1::saver_server::Saver for SaverService {
    type ExchangeStream = ReceiverStream<Result<v1::SaverReplies, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::SaverRequests>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (replies, outbound) = mpsc::channel(4);
        let stream = Stream {
            store: self.store.clone(),
            limits: self.limits,
            lanes: Default::default(),
            keyed: HashMap::new(),
            running: FuturesUnordered::new(),
            outgoing: VecDeque::new(),
            outgoing_bytes: 0,
            in_flight: 0,
        };
        let (metrics, stop) = (self.metrics.clone(), self.stop.clone());
        tokio::spawn(async move {
            metrics.streams.inc();
            stream.run(request.into_inner(), replies, stop).await;
            metrics.streams.dec();
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// What has to stay in order with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Lane(usize),
    /// A session's, a record's: by hash. Two that share one wait for each other needlessly, no more.
    Serial(u64),
    None,
}

type Running = Pin<Box<dyn Future<Output = (Key, Vec<v1::SaverReply>)> + Send>>;

/// Appends to the topics of one lane.
#[derive(Default)]
struct Lane {
    waiting: VecDeque<(u64, v1::Append)>,
    busy: bool,
}

struct Stream {
    store: Arc<dyn Store>,
    limits: ServiceLimits,
    lanes: [Lane; APPEND_LANES],
    /// What waits for an operation with the same key that is under way.
    keyed: HashMap<u64, VecDeque<(u64, Op)>>,
    running: FuturesUnordered<Running>,
    /// With their bytes, where they may be many.
    outgoing: VecDeque<(usize, v1::SaverReply)>,
    outgoing_bytes: usize,
    /// Taken and not yet sent back.
    in_flight: usize,
}

impl Stream {
    async fn run(
        mut self,
        mut inbound: Streaming<v1::SaverRequests>,
        replies: mpsc::Sender<Result<v1::SaverReplies, Status>>,
        stop: CancellationToken,
    ) {
        let mut reading = true;
        // Nobody is there for the answers any more. What has been taken is carried out all the same, also what waits for
        // its turn: it may be the closing of a session behind its last ack.
        let mut is_alone = false;
        while reading || !self.running.is_empty() || !self.outgoing.is_empty() {
            if is_alone {
                self.outgoing.clear();
                self.outgoing_bytes = 0;
                if self.running.is_empty() {
                    return;
                }
            }
            tokio::select! {
                permit = replies.reserve(), if !self.outgoing.is_empty() => match permit {
                    Ok(permit) => permit.send(Ok(self.next_batch())),
                    Err(_) => (reading, is_alone) = (false, true),
                },
                Some((key, answers)) = self.running.next(),
                    if !self.running.is_empty() && self.outgoing_bytes < OUTGOING_BYTES =>
                {
                    self.finished(key, answers);
                    while self.outgoing_bytes < OUTGOING_BYTES
                        && let Some(Some((key, answers))) = self.running.next().now_or_never()
                    {
                        self.finished(key, answers);
                    }
                }
                received = inbound.message(), if reading && self.in_flight < self.limits.in_flight => match received {
                    Ok(Some(batch)) => {
                        for request in batch.requests {
                            self.take(request);
                        }
                        self.start_lanes();
                    }
                    Ok(None) => reading = false,
                    Err(status) => {
                        tracing::debug!(%status, "a saver stream failed");
                        (reading, is_alone) = (false, true);
                    }
                },
                () = stop.cancelled(), if reading => reading = false,
            }
        }
    }

    fn next_batch(&mut self) -> v1::SaverReplies {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some((size, reply)) = self.outgoing.pop_front() {
            if batch.len() >= REPLY_BATCH || (bytes > 0 && bytes + size > REPLY_BYTES) {
                self.outgoing.push_front((size, reply));
                break;
            }
            bytes += size;
            self.in_flight -= 1;
            batch.push(reply);
        }
        self.outgoing_bytes -= bytes;
        v1::SaverReplies { replies: batch }
    }

    fn take(&mut self, request: v1::SaverRequest) {
        self.in_flight += 1;
        let correlation = request.correlation;
        match request.op {
            Some(Op::Append(append)) => {
                let slot = append.message.as_ref().map_or(0, |message| topic::slot_of(&message.topic));
                self.lanes[slot as usize % APPEND_LANES].waiting.push_back((correlation, append));
            }
            Some(op) => match serial_key(&op) {
                Some(key) => match self.keyed.get_mut(&key) {
                    Some(waiting) => waiting.push_back((correlation, op)),
                    // A device that keeps nothing and has nothing kept, as most do when they connect.
                    None if forgets_nothing(&*self.store, &op) => {
                        if correlation == 0 {
                            self.in_flight -= 1;
                            return;
                        }
                        let nothing = Reply::SessionOpened(v1::SessionOpened::default());
                        self.outgoing.push_back((0, reply(correlation, Ok(nothing))));
                    }
                    None => {
                        self.keyed.insert(key, VecDeque::new());
                        self.start(Key::Serial(key), correlation, op);
                    }
                },
                None => self.start(Key::None, correlation, op),
            },
            None => {
                let error =
                    StoreError::Invalid("a request without an operation this version knows".to_owned());
                self.outgoing.push_back((0, reply(correlation, Err(error))));
            }
        }
    }

    fn start(&mut self, key: Key, correlation: u64, op: Op) {
        let store = self.store.clone();
        self.running.push(Box::pin(async move {
            let result = carry_out(&*store, op).await;
            (key, vec![reply(correlation, result)])
        }));
    }

    fn start_lanes(&mut self) {
        for lane in 0..APPEND_LANES {
            self.start_lane(lane);
        }
    }

    fn start_lane(&mut self, at: usize) {
        let lane = &mut self.lanes[at];
        if lane.busy || lane.waiting.is_empty() {
            return;
        }
        lane.busy = true;
        let count = lane.waiting.len().min(self.limits.append_batch);
        let (correlations, appends): (Vec<_>, Vec<_>) = lane.waiting.drain(..count).unzip();
        let store = self.store.clone();
        self.running.push(Box::pin(async move {
            let results = store.append(appends).await;
            let answers = correlations.into_iter().zip(results);
            (
                Key::Lane(at),
                answers.map(|(number, result)| reply(number, result.map(Reply::Appended))).collect(),
            )
        }));
    }

    fn finished(&mut self, key: Key, answers: Vec<v1::SaverReply>) {
        for answer in answers {
            let size = size_of(&answer);
            self.outgoing_bytes += size;
            self.outgoing.push_back((size, answer));
        }
        match key {
            Key::Lane(at) => {
                self.lanes[at].busy = false;
                self.start_lane(at);
            }
            Key::Serial(key) => match self.keyed.get_mut(&key).and_then(VecDeque::pop_front) {
                Some((correlation, op)) => self.start(Key::Serial(key), correlation, op),
                None => {
                    self.keyed.remove(&key);
                }
            },
            Key::None => {}
        }
    }
}

fn forgets_nothing(store: &dyn Store, op: &Op) -> bool {
    let Op::OpenSession(v1::OpenSession { session: Some(session), expiry_seconds: 0, .. }) = op else {
        return false;
    };
    !store.may_be_kept(session)
}

/// Bytes of an answer that may be large; the others' batch is bounded by their number.
fn size_of(reply: &v1::SaverReply) -> usize {
    match &reply.result {
        Some(
            Reply::Heads(_)
            | Reply::Read(_)
            | Reply::Retained(_)
            | Reply::Records(_)
            | Reply::SessionOpened(_)
            | Reply::Subscribed(_),
        ) => reply.encoded_len(),
        _ => 0,
    }
}

fn reply(correlation: u64, result: StoreResult<Reply>) -> v1::SaverReply {
    let result = result.unwrap_or_else(|error| {
        Reply::Error(v1::SaverError { code: error.code().into(), text: error.to_string() })
    });
    v1::SaverReply { correlation, result: Some(result) }
}

/// What an operation has to stay in order with.
fn serial_key(op: &Op) -> Option<u64> {
    let session = |session: &Option<v1::SessionRef>| {
        session.as_ref().map(|session| hash(&(0, &session.app, &session.user, &session.client_id)))
    };
    match op {
        Op::OpenSession(op) => session(&op.session),
        Op::Subscribe(op) => session(&op.session),
        Op::Unsubscribe(op) => session(&op.session),
        Op::Ack(op) => session(&op.session),
        Op::CloseSession(op) => session(&op.session),
        Op::PutRecord(op) => Some(hash(&(1, &op.kind, &op.key))),
        Op::GetRecord(op) => Some(hash(&(1, &op.kind, &op.key))),
        Op::Fence(op) => Some(hash(&(2, op.slot))),
        Op::Append(_) | Op::Heads(_) | Op::Read(_) | Op::Retained(_) | Op::ListRecords(_) => None,
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

async fn carry_out(store: &dyn Store, op: Op) -> StoreResult<Reply> {
    let done = |()| Reply::Done(v1::Done {});
    Ok(match op {
        // Appends go in batches; one that comes here is a batch of one.
        Op::Append(append) => match store.append(vec![append]).await.pop() {
            Some(result) => Reply::Appended(result?),
            None => return Err(StoreError::Unavailable("the store gave no answer".to_owned())),
        },
        Op::Fence(v1::Fence { slot, epoch }) => done(store.fence(slot, epoch).await?),
        Op::Heads(v1::Heads { topics }) => Reply::Heads(v1::HeadsReply { heads: store.heads(topics).await? }),
        Op::Read(read) => Reply::Read(store.read(read).await?),
        Op::Retained(v1::Retained { filter, limit }) => {
            Reply::Retained(v1::RetainedReply { messages: store.retained(filter, limit).await? })
        }
        Op::OpenSession(open) => Reply::SessionOpened(store.open_session(open).await?),
        Op::Subscribe(subscribe) => {
            Reply::Subscribed(v1::Subscribed { results: store.subscribe(subscribe).await? })
        }
        Op::Unsubscribe(unsubscribe) => done(store.unsubscribe(unsubscribe).await?),
        Op::Ack(ack) => done(store.ack(ack).await?),
        Op::CloseSession(close) => done(store.close_session(close).await?),
        Op::PutRecord(record) => done(store.put_record(record).await?),
        Op::GetRecord(v1::GetRecord { kind, key }) => {
            Reply::Records(v1::Records { records: store.get_record(kind, key).await?.into_iter().collect() })
        }
        Op::ListRecords(list) => Reply::Records(v1::Records { records: store.list_records(list).await? }),
    })
}
