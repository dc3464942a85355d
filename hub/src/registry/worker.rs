//! The tasks that run the cores: a share of the slots each, fed by bounded queues, never waiting for anything else.

mod task;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use carillon_agent::app::App;
use carillon_proto::topic;
use carillon_proto::v1::{self, PublishCode};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::task::Worker;
use super::attach::{Announcing, Outbound};
use super::core::{Attached, Core, Limits, PresenceEvent, Publish, Receiver, Sizes};
use super::metrics::Metrics;
use crate::peers::Directory;

/// Inputs that wait at one worker.
const QUEUE: usize = 16_384;

/// What a worker is told.
#[allow(clippy::large_enum_variant)] // nearly all of them are publishes, the large variant
pub enum Input {
    Publish {
        publish: Publish,
        reply: ReplyTo,
    },
    Attach {
        receiver: Receiver,
        attached: Attached,
        outbound: Arc<Outbound>,
    },
    Detach {
        receiver: Receiver,
    },
    /// (index in the request, filter, present)
    Announce {
        receiver: Receiver,
        announcing: Arc<Announcing>,
        routes: Vec<(u32, String, bool)>,
        wildcards: bool,
    },
    Complete {
        receiver: Receiver,
        slots: Vec<v1::SlotEpoch>,
    },
    Sessions {
        receiver: Receiver,
        changes: Vec<v1::SessionChange>,
    },
    Slots(Slots),
    Live(HashSet<(Arc<str>, u64)>),
    Apps(Arc<BTreeMap<String, Arc<App>>>),
    Limits(Limits),
    /// None: the slot is not owned here.
    Who {
        app: String,
        user: String,
        reply: oneshot::Sender<Option<Vec<v1::OnlineSession>>>,
    },
    Kick {
        app: String,
        user: String,
        client_id: String,
        reply: oneshot::Sender<Option<u32>>,
    },
}

/// The slots of a worker's share that concern this instance.
#[derive(Debug, Default)]
pub struct Slots {
    /// Ours, with their epochs.
    pub owned: HashMap<u32, u64>,
    /// Those of others that are to be ours.
    pub coming: HashSet<u32>,
}

/// Where the answer to a publish goes. Dropped unanswered only when the process ends.
pub struct ReplyTo {
    pub to: To,
    /// Payload bytes that are counted until the answer.
    pub _admitted: Admitted,
}

pub enum To {
    Stream {
        correlation: u64,
        permit: mpsc::OwnedPermit<v1::Published>,
    },
    /// The answer, and whom a broadcast went to.
    One(oneshot::Sender<(v1::Published, Vec<Receiver>)>),
}

impl ReplyTo {
    pub fn send(self, mut published: v1::Published, targets: Vec<Receiver>) {
        match self.to {
            To::Stream { correlation, permit } => {
                published.correlation = correlation;
                permit.send(published);
            }
            To::One(sender) => drop(sender.send((published, targets))),
        }
    }
}

/// A publish and its payload's bytes, counted while it is unanswered.
pub struct Admitted {
    count: Arc<AtomicUsize>,
    count_bytes: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.count_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Handles to all workers; a cheap clone.
#[derive(Clone)]
pub struct Workers {
    inboxes: Arc<[mpsc::Sender<Input>]>,
    instance: Arc<str>,
    admitted: Arc<AtomicUsize>,
    unanswered: Arc<AtomicUsize>,
    max_bytes: Arc<AtomicUsize>,
}

/// What workers share with the rest of the registry.
#[derive(Clone)]
pub struct WorkerDeps {
    pub directory: Directory,
    pub metrics: Metrics,
    pub presence: mpsc::Sender<PresenceEvent>,
    /// Wills of sessions whose gateway is gone.
    pub wills: mpsc::Sender<v1::Message>,
    /// Ends the workers.
    pub stop: CancellationToken,
}

impl Workers {
    pub fn start(
        count: usize,
        instance: &str,
        limits: &Limits,
        max_bytes: usize,
        deps: &WorkerDeps,
    ) -> Workers {
        let sizes = Arc::new(Mutex::new(vec![Sizes::default(); count]));
        let inboxes = (0..count).map(|index| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            let worker = Worker::new(index, Core::new(limits.clone()), deps.clone(), sizes.clone());
            tokio::spawn(worker.run(receiver));
            sender
        });
        Workers {
            inboxes: inboxes.collect(),
            instance: instance.into(),
            admitted: Arc::default(),
            unanswered: Arc::default(),
            max_bytes: Arc::new(AtomicUsize::new(max_bytes)),
        }
    }

    pub fn len(&self) -> usize {
        self.inboxes.len()
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub fn set_max_bytes(&self, max_bytes: usize) {
        self.max_bytes.store(max_bytes, Ordering::Relaxed);
    }

    /// Publishes that were taken and are not answered yet.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::Relaxed)
    }

    pub fn worker_of(&self, slot: u32) -> usize {
        slot as usize % self.inboxes.len()
    }

    /// Hands a publish to the worker of its slot at once, or answers it OVERLOADED.
    pub fn publish(&self, publish: Publish, to: To) {
        let bytes = publish.message.payload.len();
        let waiting = self.admitted.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        let (count, count_bytes) = (self.unanswered.clone(), self.admitted.clone());
        let reply = ReplyTo { to, _admitted: Admitted { count, count_bytes, bytes } };
        if waiting > self.max_bytes.load(Ordering::Relaxed) {
            return reply.send(overloaded("too many bytes wait to be published"), Vec::new());
        }
        let worker = self.worker_of(topic::slot_of(&publish.message.topic));
        let failed = self.inboxes[worker].try_send(Input::Publish { publish, reply });
        if let Err(error) = failed
            && let Input::Publish { reply, .. } = error.into_inner()
        {
            reply.send(overloaded("too many messages wait to be published"), Vec::new());
        }
    }

    /// Waits for room in the worker's queue.
    pub async fn to(&self, worker: usize, input: Input) {
        // An error means that the process ends.
        let _ = self.inboxes[worker].send(input).await;
    }

    pub async fn to_owner(&self, topic: &str, input: Input) {
        self.to(self.worker_of(topic::slot_of(topic)), input).await;
    }

    pub async fn to_all(&self, input: impl Fn() -> Input) {
        for worker in 0..self.inboxes.len() {
            self.to(worker, input()).await;
        }
    }

    /// Splits items by the worker that has their slot, each part in order.
    pub fn split<T>(&self, items: Vec<T>, slot: impl Fn(&T) -> u32) -> Vec<(usize, Vec<T>)> {
        let mut parts: Vec<(usize, Vec<T>)> =
            (0..self.inboxes.len()).map(|worker| (worker, Vec::new())).collect();
        for item in items {
            let worker = self.worker_of(slot(&item));
            parts[worker].1.push(item);
        }
        parts.retain(|(_, part)| !part.is_empty());
        parts
    }
}

fn overloaded(text: &str) -> v1::Published {
    v1::Published { code: PublishCode::Overloaded.into(), text: text.to_owned(), ..v1::Published::default() }
}
