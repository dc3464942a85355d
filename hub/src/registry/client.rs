//! Speaking to the owners of topics: publishes that are sent again until a deadline, and questions about a topic.
//!
//! A task holds one stream to each owner. What is published to a topic is sequenced in the order of the calls, also while its
//! slot moves and while its owner cannot be had ([`in_order`]).

mod in_order;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use carillon_agent::{Instance, Role, SlotMap};
use carillon_proto::exchange::{self, CallError, Exchange, Publishing};
use carillon_proto::topic::{self, SLOTS};
use carillon_proto::v1::{self, PublishCode, registry_client::RegistryClient};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use self::in_order::{InOrder, Way};
use crate::peers::{self, Directory, PeerError};

/// Limits of an [`OwnerClient`].
#[derive(Debug, Clone)]
pub struct Options {
    /// From a call to its answer, all attempts together.
    pub deadline: Duration,
    /// Publishes that may be unanswered.
    pub queue: usize,
    /// Bytes of payload that may be unanswered.
    pub queue_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { deadline: Duration::from_secs(5), queue: 65_536, queue_bytes: 256 * 1024 * 1024 }
    }
}

/// Between two attempts to ask: grows from the first to the second, jittered.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How often it is looked for publishes that are to be tried again.
const TICK: Duration = Duration::from_millis(10);

/// Why a message was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Not carried out.
    #[error("too many messages are waiting to be published")]
    Overloaded,
    /// It may have been carried out.
    #[error("not accepted in time: {0}")]
    TimedOut(String),
    /// Never acceptable as it is.
    #[error("{0}")]
    Refused(String),
}

/// A cheap handle; the task ends when the last one is dropped.
#[derive(Clone)]
pub struct OwnerClient {
    directory: Directory,
    calls: mpsc::Sender<Call>,
    bytes: Arc<AtomicUsize>,
    options: Options,
}

/// Payload bytes that are counted for as long as this lives.
struct Counted(Arc<AtomicUsize>, usize);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

struct Call {
    request: v1::PublishRequest,
    reply: oneshot::Sender<Result<v1::Published, PublishError>>,
    /// What the last attempt came to, shown when the deadline has passed.
    last: Arc<parking_lot::Mutex<String>>,
    _counted: Counted,
}

impl Call {
    fn topic(&self) -> &str {
        self.request.message.as_ref().map_or("", |message| &message.topic)
    }
}

impl OwnerClient {
    /// Starts the task. Must be called within a tokio runtime.
    pub fn start(directory: Directory, options: Options) -> Self {
        let (calls, receiver) = mpsc::channel(options.queue);
        let task = Publisher {
            directory: directory.clone(),
            options: options.clone(),
            owners: HashMap::new(),
            order: InOrder::new(),
            accepted: vec![0; SLOTS as usize],
        };
        tokio::spawn(task.run(receiver));
        OwnerClient { directory, calls, bytes: Arc::default(), options }
    }

    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Queues the request now, so that calls keep their order, and gives a future for the owner's acceptance.
    /// A message with an id is published once, however often it has to be sent.
    pub fn publish(
        &self,
        request: v1::PublishRequest,
    ) -> BoxFuture<'static, Result<v1::Published, PublishError>> {
        let bytes = request.message.as_ref().map_or(0, |message| message.payload.len());
        let counted = Counted(self.bytes.clone(), bytes);
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > self.options.queue_bytes {
            return Box::pin(async { Err(PublishError::Overloaded) });
        }
        let (reply, answer) = oneshot::channel();
        let last = Arc::new(parking_lot::Mutex::new("no answer yet".to_owned()));
        let call = Call { request, reply, last: last.clone(), _counted: counted };
        if self.calls.try_send(call).is_err() {
            return Box::pin(async { Err(PublishError::Overloaded) });
        }
        let deadline = Instant::now() + self.options.deadline;
        Box::pin(async move {
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(PublishError::TimedOut("publishing has been stopped".to_owned())),
                Err(_) => Err(PublishError::TimedOut(last.lock().clone())),
            }
        })
    }

    /// Asks the owner of `topic`; looks for it again until the deadline while it is not to be had.
    pub async fn ask_owner<T, F, A>(&self, topic: &str, ask: F) -> Result<T, Status>
    where
        F: Fn(RegistryClient<Channel>) -> A,
        A: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.options.deadline;
        let mut backoff = BACKOFF.0;
        loop {
            let attempt = async {
                let owner = self.directory.owner_of(topic).ok_or_else(|| {
                    Status::unavailable("no registry instance owns the slot of the topic at the moment")
                })?;
                let client =
                    self.directory.registry(&owner).map_err(|error| Status::internal(error.to_string()))?;
                ask(client).await
            };
            let failed = match tokio::time::timeout_at(deadline, attempt).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) if !matches!(status.code(), Code::Aborted | Code::Unavailable) => {
                    return Err(status);
                }
                Ok(Err(status)) => status,
                Err(_) => return Err(Status::deadline_exceeded("no answer from the topic's owner in time")),
            };
            if Instant::now() + backoff >= deadline {
                return Err(Status::unavailable(failed.message()));
            }
            tokio::time::sleep(jittered(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// The last report of every gateway, each once, whatever number of registry instances it is attached to.
    pub async fn overview(&self) -> Result<Vec<v1::GatewayOverview>, Status> {
        let asked = self.directory.instances(Role::Registry).into_iter().map(|instance| async move {
            let mut client =
                self.directory.registry(&instance).map_err(|error| Status::internal(error.to_string()))?;
            match tokio::time::timeout(self.options.deadline, client.overview(v1::OverviewRequest {})).await {
                Ok(reply) => Ok(reply?.into_inner().gateways),
                Err(_) => Err(Status::deadline_exceeded(format!("no answer from {} in time", instance.id))),
            }
        });
        let mut gateways: BTreeMap<String, v1::GatewayOverview> = BTreeMap::new();
        let mut failed = None;
        for answer in futures::future::join_all(asked).await {
            match answer {
                Ok(overviews) => {
                    for overview in overviews {
                        match gateways.get(&overview.instance) {
                            Some(known) if known.age_ms <= overview.age_ms => {}
                            _ => drop(gateways.insert(overview.instance.clone(), overview)),
                        }
                    }
                }
                Err(status) => failed = Some(status),
            }
        }
        match failed {
            Some(status) if gateways.is_empty() => Err(status),
            _ => Ok(gateways.into_values().collect()),
        }
    }
}

fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.5..1.5))
}

/// With the epoch in which it was sent.
type Answer = (u64, Call, u64, Result<v1::Published, CallError>);
type InFlight = FuturesUnordered<BoxFuture<'static, Answer>>;

struct Publisher {
    directory: Directory,
    options: Options,
    /// By address; cancelled when no instance has the address any more, so that nothing waits for one that is gone.
    owners: HashMap<String, (Exchange<Publishing>, CancellationToken)>,
    order: InOrder<Call>,
    /// By slot: the epoch in which its owner has accepted something last.
    accepted: Vec<u64>,
}

/// Who owns what, looked up once for a batch of publishes.
struct View {
    slots: Arc<SlotMap>,
    registries: Arc<Vec<Instance>>,
}

impl Publisher {
    async fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        let mut in_flight = InFlight::new();
        let mut taken = Vec::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut open = true;
        let mut registries = self.directory.watch(Role::Registry);
        let mut slots = self.directory.agent().slots();
        while open || !in_flight.is_empty() || self.order.held() > 0 {
            let room = self.options.queue.saturating_sub(in_flight.len() + self.order.held());
            tokio::select! {
                count = calls.recv_many(&mut taken, room.min(1024)), if open && room > 0 => {
                    open = count > 0;
                    let view = self.view();
                    for call in taken.drain(..) {
                        self.begin(&view, call, &in_flight);
                    }
                }
                Some(answer) = in_flight.next() => self.answered(answer, &in_flight),
                _ = tick.tick(), if self.order.held() > 0 => self.retry(&in_flight),
                Ok(()) = slots.changed() => {
                    slots.borrow_and_update();
                    self.connect();
                    self.order.hurry(Instant::now());
                    self.retry(&in_flight);
                }
                Ok(()) = registries.changed() => {
                    let alive = registries.borrow_and_update().clone();
                    self.owners.retain(|address, (exchange, gone)| {
                        let here = alive.iter().any(|one| one.addresses.get(peers::GRPC) == Some(address));
                        if !here {
                            exchange.give_up_connection();
                            gone.cancel();
                        }
                        here
                    });
                }
            }
        }
    }

    fn view(&self) -> View {
        View { slots: self.directory.slots(), registries: self.directory.live(Role::Registry) }
    }

    /// How a topic's owner is reached, or why it cannot be.
    fn way(&mut self, view: &View, topic: &str) -> (Way, Result<Target, CallError>) {
        let unknown = |what: &str| Err(CallError::Disconnected(what.to_owned()));
        let mut way = Way { epoch: 0, connection: 0, accepts: false };
        let Some((slot, owner)) = view.slots.owner_of(topic) else {
            return (way, unknown("the slot's owner: it has none"));
        };
        way.epoch = owner.epoch;
        way.accepts = self.accepted[slot as usize] == owner.epoch;
        let instance = view.registries.iter().find(|instance| *instance.id == *owner.instance);
        let Some((instance, address)) =
            instance.and_then(|instance| Some((instance, instance.addresses.get(peers::GRPC)?)))
        else {
            return (way, unknown("the slot's owner: it is not there"));
        };
        match self.owner_at(&instance.id, address) {
            Ok(target) => {
                way.connection = target.exchange.connection();
                (way, Ok(target))
            }
            Err(error) => (way, unknown(&error.to_string())),
        }
    }

    fn owner_at(&mut self, instance: &str, address: &str) -> Result<Target, PeerError> {
        if let Some((exchange, gone)) = self.owners.get(address) {
            return Ok(Target { exchange: exchange.clone(), gone: gone.clone() });
        }
        let options = exchange::Options { timeout: self.options.deadline, ..exchange::Options::default() };
        let exchange = Exchange::start(peers::endpoint(instance, address)?, options);
        let gone = CancellationToken::new();
        self.owners.insert(address.to_owned(), (exchange.clone(), gone.clone()));
        Ok(Target { exchange, gone })
    }

    /// To those who are to own slots soon, before there is something to send.
    fn connect(&mut self) {
        let view = self.view();
        for instance in view.registries.iter() {
            let is_next = view.slots.moving_to.values().any(|next| **next == *instance.id);
            if let Some(address) = instance.addresses.get(peers::GRPC).filter(|_| is_next) {
                // An address that is none is said when it is needed.
                let _ = self.owner_at(&instance.id, address);
            }
        }
    }

    fn begin(&mut self, view: &View, call: Call, in_flight: &InFlight) {
        let (way, target) = self.way(view, call.topic());
        let topic = call.topic().to_owned();
        if let Some((ticket, call)) = self.order.begin(&topic, call, way) {
            in_flight.push(send(ticket, call, way, target));
        }
    }

    /// Sends what may go of a topic.
    fn follow(&mut self, view: &View, topic: &str, in_flight: &InFlight) {
        loop {
            let (way, target) = self.way(view, topic);
            let Some((ticket, call)) = self.order.next(topic, way, Instant::now()) else { return };
            if call.reply.is_closed() {
                // Its caller has given up.
                self.order.dropped(topic, ticket);
            } else {
                in_flight.push(send(ticket, call, way, target));
            }
        }
    }

    fn answered(&mut self, (ticket, mut call, epoch, answer): Answer, in_flight: &InFlight) {
        let topic = call.topic().to_owned();
        let outcome = match answer {
            Ok(published) => match published.code() {
                PublishCode::Accepted => {
                    // Not the epoch in the answer: of a duplicate it is the first one's.
                    let accepted = &mut self.accepted[topic::slot_of(&topic) as usize];
                    *accepted = epoch.max(*accepted);
                    Ok(Ok(published))
                }
                PublishCode::Refused | PublishCode::Unspecified => {
                    Ok(Err(PublishError::Refused(published.text)))
                }
                code => Err(format!("{}: {}", code.as_str_name(), published.text)),
            },
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(result) => {
                let _ = call.reply.send(result);
                self.order.settled(&topic, ticket);
            }
            Err(text) => {
                *call.last.lock() = text;
                // It may have been carried out all the same.
                call.request.idempotent |=
                    call.request.message.as_ref().is_some_and(|message| !message.id.is_empty());
                let owner = self.directory.slots().owner_of(&topic).map_or(0, |(_, owner)| owner.epoch);
                self.order.failed(&topic, ticket, call, Instant::now(), owner != epoch);
            }
        }
        if self.order.held() > 0 {
            self.follow(&self.view(), &topic, in_flight);
        }
    }

    fn retry(&mut self, in_flight: &InFlight) {
        if self.order.held() + in_flight.len() >= self.options.queue {
            // No room for more: at once, not when their turn comes.
            self.order.give_up(|call| call.reply.is_closed());
        }
        let view = self.view();
        for topic in self.order.due(Instant::now()) {
            self.follow(&view, &topic, in_flight);
        }
    }
}

/// Where a publish goes.
struct Target {
    exchange: Exchange<Publishing>,
    gone: CancellationToken,
}

fn send(ticket: u64, call: Call, way: Way, target: Result<Target, CallError>) -> BoxFuture<'static, Answer> {
    let Target { exchange, gone } = match target {
        Ok(target) => target,
        Err(error) => return Box::pin(async move { (ticket, call, way.epoch, Err(error)) }),
    };
    let answer = exchange.call_over(way.connection, call.request.clone());
    Box::pin(async move {
        let answer = tokio::select! {
            answer = answer => answer,
            () = gone.cancelled_owned() => Err(CallError::Disconnected("the slot's owner: it is gone".to_owned())),
        };
        (ticket, call, way.epoch, answer)
    })
}
