//! Attach streams: what a gateway, or another receiver, says and is told for as long as it is attached.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use carillon_proto::v1::{self, attach_down, attach_up};
use futures::Stream;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, Streaming};

use super::broadcast::Jobs;
use super::core::{Attached, Receiver};
use super::metrics::Metrics;
use super::worker::{Input, Workers};

/// What waits to be sent on one attach stream: bounded by messages and by bytes. When it is full the stream is closed;
/// the receiver attaches again and catches up from the log.
pub struct Outbound {
    queue: mpsc::UnboundedSender<Queued>,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    max_messages: usize,
    max_bytes: usize,
    closed: CancellationToken,
    overflows: prometheus::IntCounter,
}

struct Queued {
    down: v1::AttachDown,
    messages: usize,
    bytes: usize,
}

/// How many messages and bytes may wait on one attach stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboundLimits {
    pub messages: usize,
    pub bytes: usize,
}

impl Outbound {
    pub fn new(limits: OutboundLimits, overflows: prometheus::IntCounter) -> (Arc<Outbound>, OutboundStream) {
        let (queue, receiver) = mpsc::unbounded_channel();
        let outbound = Arc::new(Outbound {
            queue,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            max_messages: limits.messages,
            max_bytes: limits.bytes,
            closed: CancellationToken::new(),
            overflows,
        });
        let stream = OutboundStream {
            queue: receiver,
            closed: Box::pin(outbound.closed.clone().cancelled_owned()),
            outbound: outbound.clone(),
            ended: false,
        };
        (outbound, stream)
    }

    /// Queues it, or closes the stream when that would be too much. Never waits.
    pub fn push(&self, body: attach_down::Body) {
        if self.closed.is_cancelled() {
            return;
        }
        let (messages, bytes) = match &body {
            attach_down::Body::Deliver(deliver) => {
                (deliver.messages.len(), deliver.messages.iter().map(message_bytes).sum())
            }
            attach_down::Body::Announced(announced) => (1, announced.heads.len() * 8 + 32),
            _ => (1, 256),
        };
        let waiting = self.messages.fetch_add(messages, Ordering::Relaxed) + messages;
        let waiting_bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if waiting > self.max_messages || waiting_bytes > self.max_bytes {
            self.overflows.inc();
            tracing::warn!(waiting, waiting_bytes, "a receiver is too slow, closing its stream");
            self.close();
            return;
        }
        let _ = self.queue.send(Queued { down: v1::AttachDown { body: Some(body) }, messages, bytes });
    }

    pub fn close(&self) {
        self.closed.cancel();
    }
}

/// What a message costs in memory, roughly.
pub fn message_bytes(message: &v1::Message) -> usize {
    message.payload.len() + message.topic.len() + message.id.len() + 128
}

/// The stream's sending side.
pub struct OutboundStream {
    queue: mpsc::UnboundedReceiver<Queued>,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    outbound: Arc<Outbound>,
    ended: bool,
}

impl Stream for OutboundStream {
    type Item = Result<v1::AttachDown, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.closed.as_mut().poll(cx).is_ready() {
            self.ended = true;
            return Poll::Ready(Some(Err(Status::unavailable("the stream was closed; attach again"))));
        }
        match self.queue.poll_recv(cx) {
            Poll::Ready(Some(queued)) => {
                self.outbound.messages.fetch_sub(queued.messages, Ordering::Relaxed);
                self.outbound.bytes.fetch_sub(queued.bytes, Ordering::Relaxed);
                Poll::Ready(Some(Ok(queued.down)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for OutboundStream {
    fn drop(&mut self) {
        self.outbound.close();
    }
}

/// Answers one `Announce` when all workers have put its routes in force.
pub struct Announcing {
    request: u64,
    left: AtomicUsize,
    answer: Mutex<v1::Announced>,
    outbound: Arc<Outbound>,
}

impl Announcing {
    fn new(request: u64, routes: usize, answers: usize, outbound: Arc<Outbound>) -> Arc<Self> {
        let answer = v1::Announced { request, heads: vec![0; routes], ..v1::Announced::default() };
        let announcing =
            Announcing { request, left: AtomicUsize::new(answers), answer: Mutex::new(answer), outbound };
        if answers == 0 {
            announcing.send();
        }
        Arc::new(announcing)
    }

    /// `head`: None when another instance owns the slot.
    pub fn answer(&self, index: u32, head: Option<u64>, retained: bool) {
        {
            let mut answer = self.answer.lock();
            if retained {
                answer.retained.push(index);
            }
            match head {
                None => answer.not_owner.push(index),
                Some(0) => {}
                Some(head) => {
                    if let Some(place) = answer.heads.get_mut(index as usize) {
                        *place = head;
                    }
                }
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.send();
        }
    }

    fn send(&self) {
        let answer = std::mem::take(&mut *self.answer.lock());
        tracing::trace!(request = self.request, routes = answer.heads.len(), "routes are in force");
        self.outbound.push(attach_down::Body::Announced(answer));
    }
}

/// Everyone who is attached to this instance.
pub struct Attachments {
    next: AtomicU64,
    streams: Mutex<HashMap<Receiver, Entry>>,
    metrics: Metrics,
}

struct Entry {
    attached: Attached,
    outbound: Arc<Outbound>,
    report: Option<(v1::GatewayReport, Instant)>,
}

impl Attachments {
    pub fn new(metrics: Metrics) -> Self {
        Attachments { next: AtomicU64::new(1), streams: Mutex::new(HashMap::new()), metrics }
    }

    /// Lets a stream in, unless a newer incarnation of its instance is here. Gives the streams that it replaces.
    fn enter(
        &self,
        attached: &Attached,
        outbound: &Arc<Outbound>,
    ) -> Result<(Receiver, Vec<Receiver>), Status> {
        let mut streams = self.streams.lock();
        let same: Vec<Receiver> = streams
            .iter()
            .filter(|(_, entry)| entry.attached.instance == attached.instance)
            .map(|(&receiver, _)| receiver)
            .collect();
        if same.iter().any(|receiver| streams[receiver].attached.incarnation > attached.incarnation) {
            return Err(Status::already_exists("a newer incarnation of this instance is attached"));
        }
        for receiver in &same {
            if let Some(entry) = streams.remove(receiver) {
                entry.outbound.close();
            }
        }
        let receiver = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Entry { attached: attached.clone(), outbound: outbound.clone(), report: None };
        streams.insert(receiver, entry);
        self.metrics.attached.set(streams.len() as i64);
        Ok((receiver, same))
    }

    fn leave(&self, receiver: Receiver) {
        let mut streams = self.streams.lock();
        streams.remove(&receiver);
        self.metrics.attached.set(streams.len() as i64);
    }

    pub fn instance(&self, receiver: Receiver) -> Option<Arc<str>> {
        self.streams.lock().get(&receiver).map(|entry| entry.attached.instance.clone())
    }

    pub fn push(&self, receiver: Receiver, body: attach_down::Body) {
        let outbound = self.streams.lock().get(&receiver).map(|entry| entry.outbound.clone());
        if let Some(outbound) = outbound {
            outbound.push(body);
        }
    }

    fn report(&self, receiver: Receiver, report: v1::GatewayReport) {
        if let Some(entry) = self.streams.lock().get_mut(&receiver) {
            entry.report = Some((report, Instant::now()));
        }
    }

    pub fn overview(&self) -> Vec<v1::GatewayOverview> {
        let streams = self.streams.lock();
        let reported = streams.values().filter_map(|entry| {
            let (report, at) = entry.report.as_ref()?;
            Some(v1::GatewayOverview {
                instance: entry.attached.instance.to_string(),
                report: Some(report.clone()),
                age_ms: at.elapsed().as_millis() as u64,
            })
        });
        reported.collect()
    }

    pub fn close_all(&self) {
        for entry in self.streams.lock().values() {
            entry.outbound.close();
        }
    }
}

/// What an attach stream works with.
pub struct AttachContext {
    pub workers: Workers,
    pub attachments: Arc<Attachments>,
    pub jobs: Arc<Jobs>,
}

/// Reads one attach stream to its end.
pub async fn serve(
    context: Arc<AttachContext>,
    mut inbound: Streaming<v1::AttachUp>,
    outbound: Arc<Outbound>,
) {
    let closed = outbound.closed.clone();
    let hello = tokio::select! {
        () = closed.cancelled() => return,
        message = inbound.message() => match message {
            Ok(Some(v1::AttachUp { body: Some(attach_up::Body::Hello(hello)) })) => hello,
            _ => {
                tracing::debug!("an attach stream that does not begin with hello");
                return outbound.close();
            }
        },
    };
    let attached = Attached {
        instance: hello.instance.as_str().into(),
        incarnation: hello.incarnation,
        routes_only: hello.routes_only,
    };
    let (receiver, replaced) = match context.attachments.enter(&attached, &outbound) {
        Ok(entered) => entered,
        Err(status) => {
            tracing::debug!(instance = %attached.instance, incarnation = attached.incarnation, %status, "refused");
            return outbound.close();
        }
    };
    // First of all, before there is anything else to tell.
    outbound
        .push(attach_down::Body::Welcome(v1::Welcome { instance: context.workers.instance().to_owned() }));
    for old in replaced {
        context.workers.to_all(|| Input::Detach { receiver: old }).await;
        context.jobs.detached(old);
    }
    tracing::info!(instance = %attached.instance, incarnation = attached.incarnation, receiver, "attached");
    context
        .workers
        .to_all(|| Input::Attach { receiver, attached: attached.clone(), outbound: outbound.clone() })
        .await;
    context.jobs.attached(receiver, &attached.instance);
    loop {
        let body = tokio::select! {
            () = closed.cancelled() => break,
            message = inbound.message() => match message {
                Ok(Some(message)) => message.body,
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(instance = %attached.instance, %status, "attach stream failed");
                    break;
                }
            },
        };
        match body {
            Some(attach_up::Body::Announce(announce)) => {
                announced(&context.workers, receiver, announce, &outbound).await;
            }
            Some(attach_up::Body::Complete(complete)) => {
                let split = context.workers.split(complete.slots, |slot| slot.slot);
                for (worker, slots) in split {
                    context.workers.to(worker, Input::Complete { receiver, slots }).await;
                }
            }
            Some(attach_up::Body::Sessions(sessions)) => {
                let split = context.workers.split(sessions.changes, |change| {
                    change.session.as_ref().map_or(0, |session| {
                        carillon_proto::topic::slot_of(&carillon_proto::topic::inbox(
                            &session.app,
                            &session.user,
                        ))
                    })
                });
                for (worker, changes) in split {
                    context.workers.to(worker, Input::Sessions { receiver, changes }).await;
                }
            }
            Some(attach_up::Body::Report(report)) => context.attachments.report(receiver, report),
            Some(attach_up::Body::Progress(progress)) => {
                context.jobs.progress(receiver, &attached.instance, &progress);
            }
            Some(attach_up::Body::Hello(_)) | None => {
                tracing::debug!(instance = %attached.instance, "an attach message that has no place here");
            }
        }
    }
    context.attachments.leave(receiver);
    context.workers.to_all(|| Input::Detach { receiver }).await;
    context.jobs.detached(receiver);
    outbound.close();
    tracing::info!(instance = %attached.instance, receiver, "detached");
}

async fn announced(workers: &Workers, receiver: Receiver, announce: v1::Announce, outbound: &Arc<Outbound>) {
    let routes = announce.routes.len();
    let mut wildcards = Vec::new();
    let mut exact = Vec::with_capacity(routes);
    for (index, route) in announce.routes.into_iter().enumerate() {
        let route = (index as u32, route.filter, route.present);
        if carillon_proto::topic::is_wildcard(&route.1) { wildcards.push(route) } else { exact.push(route) }
    }
    let answers = exact.len() + wildcards.len() * workers.len();
    let announcing = Announcing::new(announce.request, routes, answers, outbound.clone());
    if !wildcards.is_empty() {
        workers
            .to_all(|| Input::Announce {
                receiver,
                announcing: announcing.clone(),
                routes: wildcards.clone(),
                wildcards: true,
            })
            .await;
    }
    let split = workers.split(exact, |(_, filter, _)| carillon_proto::topic::slot_of(filter));
    for (worker, routes) in split {
        let announcing = announcing.clone();
        workers.to(worker, Input::Announce { receiver, announcing, routes, wildcards: false }).await;
    }
}
