//! Calls over one long-lived, pipelined, batched stream: how publishers speak to a registry, and everyone to a saver.
//!
//! Callers hold a cheap handle; a task owns the stream, sends what has queued up as one batch, matches answers by
//! number, and reconnects with backoff. A queue that is full and an answer that does not come are errors within a
//! bounded time, never a wait without end.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::v1;

/// What is spoken on the stream.
pub trait Protocol: Send + Sync + 'static {
    type Request: Send + 'static;
    type Reply: Send + 'static;
    type RequestBatch: Send + 'static;
    type ReplyBatch: Send + 'static;
    fn batch(requests: Vec<Self::Request>) -> Self::RequestBatch;
    fn unbatch(batch: Self::ReplyBatch) -> Vec<Self::Reply>;
    fn set_correlation(request: &mut Self::Request, correlation: u64);
    fn correlation(reply: &Self::Reply) -> u64;
    /// Bytes of the request on the wire.
    fn bytes(request: &Self::Request) -> usize;
    fn open(
        channel: Channel,
        requests: ReceiverStream<Self::RequestBatch>,
    ) -> impl Future<Output = Result<Streaming<Self::ReplyBatch>, Status>> + Send;
}

/// `Registry.Publish`.
pub struct Publishing;
/// `Saver.Exchange`.
pub struct Saving;

impl Protocol for Publishing {
    type Request = v1::PublishRequest;
    type Reply = v1::Published;
    type RequestBatch = v1::PublishBatch;
    type ReplyBatch = v1::PublishedBatch;
    fn batch(requests: Vec<Self::Request>) -> Self::RequestBatch {
        v1::PublishBatch { requests }
    }
    fn unbatch(batch: Self::ReplyBatch) -> Vec<Self::Reply> {
        batch.replies
    }
    fn set_correlation(request: &mut Self::Request, correlation: u64) {
        request.correlation = correlation;
    }
    fn correlation(reply: &Self::Reply) -> u64 {
        reply.correlation
    }
    fn bytes(request: &Self::Request) -> usize {
        prost::Message::encoded_len(request)
    }
    async fn open(
        channel: Channel,
        requests: ReceiverStream<Self::RequestBatch>,
    ) -> Result<Streaming<Self::ReplyBatch>, Status> {
        let mut client = v1::registry_client::RegistryClient::new(channel)
            .max_decoding_message_size(crate::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(crate::MAX_GRPC_MESSAGE_BYTES);
        Ok(client.publish(Request::new(requests)).await?.into_inner())
    }
}

impl Protocol for Saving {
    type Request = v1::SaverRequest;
    type Reply = v1::SaverReply;
    type RequestBatch = v1::SaverRequests;
    type ReplyBatch = v1::SaverReplies;
    fn batch(requests: Vec<Self::Request>) -> Self::RequestBatch {
        v1::SaverRequests { requests }
    }
    fn unbatch(batch: Self::ReplyBatch) -> Vec<Self::Reply> {
        batch.replies
    }
    fn set_correlation(request: &mut Self::Request, correlation: u64) {
        request.correlation = correlation;
    }
    fn correlation(reply: &Self::Reply) -> u64 {
        reply.correlation
    }
    fn bytes(request: &Self::Request) -> usize {
        prost::Message::encoded_len(request)
    }
    async fn open(
        channel: Channel,
        requests: ReceiverStream<Self::RequestBatch>,
    ) -> Result<Streaming<Self::ReplyBatch>, Status> {
        let mut client = v1::saver_client::SaverClient::new(channel)
            .max_decoding_message_size(crate::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(crate::MAX_GRPC_MESSAGE_BYTES);
        Ok(client.exchange(Request::new(requests)).await?.into_inner())
    }
}

/// Why there is no answer. In every case the request may or may not have been carried out, except `Overloaded`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("too many requests are waiting for {0}")]
    Overloaded(String),
    #[error("the connection to {0} was lost")]
    Disconnected(String),
    #[error("no answer from {0} in time")]
    TimedOut(String),
}

/// Limits of one exchange.
#[derive(Debug, Clone)]
pub struct Options {
    /// Requests that may wait to be sent.
    pub queue: usize,
    /// Requests that may be unanswered.
    pub in_flight: usize,
    /// Requests in one batch.
    pub batch: usize,
    /// From call to answer.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options { queue: 65_536, in_flight: 65_536, batch: 1024, timeout: Duration::from_secs(10) }
    }
}

/// What is done with an answer. Called once; dropped uncalled only when the runtime ends.
type Answer<R> = Box<dyn FnOnce(Result<R, CallError>) + Send>;

struct Call<P: Protocol> {
    request: P::Request,
    // None: nobody waits for the answer.
    answer: Option<Answer<P::Reply>>,
    deadline: Instant,
    /// It is to go over this connection or not at all; None: over any.
    connection: Option<u64>,
}

impl<P: Protocol> Call<P> {
    fn fail(self, error: impl FnOnce() -> CallError) {
        if let Some(answer) = self.answer {
            answer(Err(error()));
        }
    }
}

/// A handle; clones share the stream. The stream ends when the last handle is dropped.
pub struct Exchange<P: Protocol> {
    calls: mpsc::Sender<Call<P>>,
    target: String,
    timeout: Duration,
    connection: Connection,
}

impl<P: Protocol> Clone for Exchange<P> {
    fn clone(&self) -> Self {
        Exchange {
            calls: self.calls.clone(),
            target: self.target.clone(),
            timeout: self.timeout,
            connection: self.connection.clone(),
        }
    }
}

/// The number of the connection that there is, or that is being made: another after each that was lost, and no two of a
/// process have the same.
#[derive(Clone)]
struct Connection(Arc<AtomicU64>);

impl Connection {
    fn unused() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    fn new() -> Self {
        Connection(Arc::new(AtomicU64::new(Connection::unused())))
    }

    fn number(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn is_lost(&self) {
        self.0.store(Connection::unused(), Ordering::Release);
    }
}

impl<P: Protocol> Exchange<P> {
    /// Starts the task that connects to `endpoint` and stays connected. Must be called within a tokio runtime.
    pub fn start(endpoint: Endpoint, options: Options) -> Self {
        let (calls, receiver) = mpsc::channel(options.queue);
        let target = endpoint.uri().to_string();
        let timeout = options.timeout;
        let connection = Connection::new();
        tokio::spawn(run::<P>(endpoint, target.clone(), receiver, options, connection.clone()));
        Exchange { calls, target, timeout, connection }
    }

    /// Which connection calls go over now, for [`call_over`](Self::call_over). Another number once that was lost: before
    /// anyone hears that his answer will not come.
    pub fn connection(&self) -> u64 {
        self.connection.number()
    }

    /// What waits to be sent over the connection that there is now will not be, nor over another.
    pub fn give_up_connection(&self) {
        self.connection.is_lost();
    }

    /// Queues the request now (so that calls keep their order) and gives a future for its answer.
    pub fn call(
        &self,
        request: P::Request,
    ) -> impl Future<Output = Result<P::Reply, CallError>> + Send + use<P> {
        self.wait_for(request, None)
    }

    /// As [`call`](Self::call), but once this connection is lost the request is not sent over the next one: there, it might
    /// come before others that were lost with it.
    pub fn call_over(
        &self,
        connection: u64,
        request: P::Request,
    ) -> impl Future<Output = Result<P::Reply, CallError>> + Send + use<P> {
        self.wait_for(request, Some(connection))
    }

    fn wait_for(
        &self,
        request: P::Request,
        connection: Option<u64>,
    ) -> impl Future<Output = Result<P::Reply, CallError>> + Send + use<P> {
        let (reply, answer) = oneshot::channel();
        let deadline = Instant::now() + self.timeout;
        self.queue(request, connection, Box::new(move |result| drop(reply.send(result))));
        let target = self.target.clone();
        async move {
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(CallError::Disconnected(target)),
                Err(_) => Err(CallError::TimedOut(target)),
            }
        }
    }

    /// As [`call`](Self::call), without a future: `answer` is called with the result, from the stream's task or at once,
    /// and must not block. No answer is noticed up to a second late.
    pub fn call_then(
        &self,
        request: P::Request,
        answer: impl FnOnce(Result<P::Reply, CallError>) + Send + 'static,
    ) {
        self.queue(request, None, Box::new(answer));
    }

    fn queue(&self, request: P::Request, connection: Option<u64>, answer: Answer<P::Reply>) {
        let deadline = Instant::now() + self.timeout;
        let call = Call { request, answer: Some(answer), deadline, connection };
        if let Err(error) = self.calls.try_send(call) {
            error.into_inner().fail(|| CallError::Overloaded(self.target.clone()));
        }
    }

    /// Queues a request whose answer nobody needs; in order with the calls of this handle.
    pub fn send(&self, request: P::Request) -> Result<(), CallError> {
        let deadline = Instant::now() + self.timeout;
        let call = Call { request, answer: None, deadline, connection: None };
        self.calls.try_send(call).map_err(|_| CallError::Overloaded(self.target.clone()))
    }
}

async fn run<P: Protocol>(
    endpoint: Endpoint,
    target: String,
    mut calls: mpsc::Receiver<Call<P>>,
    options: Options,
    connection: Connection,
) {
    let mut next_correlation = 1_u64;
    let mut backoff = Duration::from_millis(20);
    // Taken from the callers and not sent yet, in their order.
    let mut queued: VecDeque<Call<P>> = VecDeque::new();
    // One round a connection.
    loop {
        let (batches, outbound) = mpsc::channel(64);
        let opened = async {
            let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
            P::open(channel, ReceiverStream::new(outbound)).await.map_err(|status| status.to_string())
        };
        match meanwhile(&mut calls, &mut queued, &options, &target, opened).await {
            Ok(inbound) => {
                backoff = Duration::from_millis(20);
                let ended = converse::<P>(
                    &mut calls,
                    &mut queued,
                    batches,
                    inbound,
                    &mut next_correlation,
                    &options,
                    Line { target: &target, connection: &connection },
                );
                if ended.await {
                    return;
                }
                tracing::debug!(%target, "stream ended, connecting again");
            }
            Err(error) => {
                tracing::debug!(%target, %error, "cannot connect, trying again");
                backoff = (backoff * 2).min(Duration::from_secs(2));
            }
        }
        if calls.is_closed() {
            // Nobody wants the target any more, and it does not answer.
            while let Ok(call) = calls.try_recv() {
                queued.push_back(call);
            }
            for call in queued {
                call.fail(|| CallError::Disconnected(target.clone()));
            }
            return;
        }
        let pause = tokio::time::sleep(backoff.mul_f64(0.5 + f64::from(jitter()) / 65536.0));
        meanwhile(&mut calls, &mut queued, &options, &target, pause).await;
    }
}

/// Waits for something; calls wait in the queue meanwhile, no longer than until their deadline.
async fn meanwhile<P: Protocol, T>(
    calls: &mut mpsc::Receiver<Call<P>>,
    queued: &mut VecDeque<Call<P>>,
    options: &Options,
    target: &str,
    something: impl Future<Output = T>,
) -> T {
    tokio::pin!(something);
    let mut sweep = tokio::time::interval(SWEEP);
    let mut taken = Vec::new();
    loop {
        tokio::select! {
            done = &mut something => return done,
            count = calls.recv_many(&mut taken, options.batch), if queued.len() < options.queue => {
                if count == 0 {
                    // No handle is left: whoever has called gets what is still to come.
                    return something.await;
                }
                queued.extend(taken.drain(..));
            }
            _ = sweep.tick() => expire(queued, target),
        }
    }
}

/// Deadlines are in the order of the calls.
fn expire<P: Protocol>(queued: &mut VecDeque<Call<P>>, target: &str) {
    let now = Instant::now();
    while queued.front().is_some_and(|call| call.deadline <= now) {
        if let Some(call) = queued.pop_front() {
            call.fail(|| CallError::TimedOut(target.to_owned()));
        }
    }
}

/// How often it is looked for calls whose time is over.
const SWEEP: Duration = Duration::from_secs(1);

/// Bytes of requests in one batch, far below what a gRPC message may have; one that is larger goes alone.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

fn next_batch<P: Protocol>(outgoing: &mut VecDeque<P::Request>) -> Vec<P::Request> {
    let mut batch = Vec::with_capacity(outgoing.len());
    let mut bytes = 0;
    while let Some(request) = outgoing.front() {
        bytes += P::bytes(request) + 8;
        if !batch.is_empty() && bytes > BATCH_BYTES {
            break;
        }
        batch.extend(outgoing.pop_front());
    }
    batch
}

fn jitter() -> u16 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.subsec_nanos() as u16)
}

/// To whom it is spoken, and over which connection.
struct Line<'a> {
    target: &'a str,
    connection: &'a Connection,
}

/// Speaks on one connection until it ends. True when no handle is left.
async fn converse<P: Protocol>(
    calls: &mut mpsc::Receiver<Call<P>>,
    queued: &mut VecDeque<Call<P>>,
    batches: mpsc::Sender<P::RequestBatch>,
    mut inbound: Streaming<P::ReplyBatch>,
    next_correlation: &mut u64,
    options: &Options,
    Line { target, connection }: Line<'_>,
) -> bool {
    let mut waiting: HashMap<u64, (Answer<P::Reply>, Instant)> = HashMap::new();
    let mut taken = Vec::with_capacity(options.batch);
    // The next batch, until the stream has room for it; answers are read meanwhile.
    let mut outgoing = VecDeque::new();
    let mut sweep = tokio::time::interval(SWEEP);
    let all_gone = loop {
        // What waited for the connection goes first.
        if outgoing.is_empty() && taken.is_empty() && !queued.is_empty() && waiting.len() < options.in_flight
        {
            taken.extend(queued.drain(..queued.len().min(options.batch)));
        }
        let now = Instant::now();
        for call in taken.drain(..) {
            // Whoever has given up by now must not have it carried out later.
            if call.deadline <= now {
                call.fail(|| CallError::TimedOut(target.to_owned()));
                continue;
            }
            if call.connection.is_some_and(|meant| meant != connection.number()) {
                call.fail(|| CallError::Disconnected(target.to_owned()));
                continue;
            }
            let Call { mut request, answer, deadline, .. } = call;
            // What nobody waits for has none: it may be left unanswered.
            let mut correlation = 0;
            if let Some(answer) = answer {
                correlation = *next_correlation;
                *next_correlation += 1;
                waiting.insert(correlation, (answer, deadline));
            }
            P::set_correlation(&mut request, correlation);
            outgoing.push_back(request);
        }
        tokio::select! {
            received = inbound.message() => match received {
                Ok(Some(batch)) => for reply in P::unbatch(batch) {
                    if let Some((answer, _)) = waiting.remove(&P::correlation(&reply)) {
                        answer(Ok(reply));
                    }
                },
                Ok(None) => break false,
                Err(status) => {
                    tracing::debug!(%target, %status, "stream failed");
                    break false;
                }
            },
            permit = batches.reserve(), if !outgoing.is_empty() => match permit {
                Ok(permit) => permit.send(P::batch(next_batch::<P>(&mut outgoing))),
                Err(_) => break false,
            },
            count = calls.recv_many(&mut taken, options.batch),
                if outgoing.is_empty() && queued.is_empty() && waiting.len() < options.in_flight =>
            {
                if count == 0 {
                    break true;
                }
            },
            _ = sweep.tick() => {
                expire(queued, target);
                let now = Instant::now();
                let late: Vec<u64> = waiting
                    .iter()
                    .filter(|(_, (_, deadline))| *deadline <= now)
                    .map(|(&correlation, _)| correlation)
                    .collect();
                for correlation in late {
                    if let Some((answer, _)) = waiting.remove(&correlation) {
                        answer(Err(CallError::TimedOut(target.to_owned())));
                    }
                }
            },
        }
    };
    connection.is_lost();
    for (_, (answer, _)) in waiting {
        answer(Err(CallError::Disconnected(target.to_owned())));
    }
    all_gone
}
