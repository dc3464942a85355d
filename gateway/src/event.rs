//! What reaches a shard from outside its sockets: deliveries, answers to what it asked, and orders.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use carillon_proto::v1;
use crossbeam_channel::{Receiver, Sender};
use tokio::sync::oneshot;

use crate::delivery::Delivery;
use crate::drain::Plan;
use crate::link::{Member, SaverFailure, SlotAnnouncement};
use crate::listeners::LiveSettings;
use crate::shard::Left;

/// A connection, named from outside its shard. The generation tells a connection from an earlier one in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnId {
    pub shard: u16,
    pub index: u32,
    pub generation: u32,
}

/// Why the server ends a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KickReason {
    TakenOver,
    Administrative,
}

pub enum Event {
    Deliver(Arc<Delivery>),
    /// A message to be sent to this shard's subscribers at a rate that `BroadcastRate` sets; until then it waits.
    Broadcast {
        job: Arc<str>,
        delivery: Arc<Delivery>,
    },
    BroadcastRate {
        job: Arc<str>,
        state: v1::broadcast_control::State,
        rate_per_second: f64,
    },
    /// The topic's log has grown to `head` while this gateway could not hear of it.
    Behind {
        topic: Arc<str>,
        head: u64,
    },
    /// `session`: whose, because the connection may be gone by now and what was opened must be closed.
    Opened {
        conn: ConnId,
        session: v1::SessionRef,
        result: Result<v1::SessionOpened, SaverFailure>,
    },
    /// The saver has forgotten what it kept for this connection.
    TakenUp {
        conn: ConnId,
        result: Result<(), SaverFailure>,
    },
    /// `outcomes`: of each filter that was asked for, in order; an error is its reason code.
    Subscribed {
        conn: ConnId,
        packet_id: u16,
        outcomes: Vec<Result<Granted, u8>>,
    },
    Unsubscribed {
        conn: ConnId,
        packet_id: u16,
        kept: bool,
    },
    Published {
        conn: ConnId,
        ticket: u64,
        outcome: PublishOutcome,
    },
    Read {
        conn: ConnId,
        topic: Arc<str>,
        result: Result<v1::ReadReply, SaverFailure>,
    },
    /// A message of a share that this connection is to have; answered with `share_done` or `share_busy`.
    Share {
        conn: ConnId,
        member: Member,
        token: u64,
        delivery: Arc<Delivery>,
    },
    Kick {
        conn: ConnId,
        reason: KickReason,
    },
    /// The user of a further app on this connection is to go, its session key says which.
    KickGuest {
        conn: ConnId,
        key: u128,
    },
    /// A device that this shard had, or whose session is parked here, has connected to another shard. `clean`: it does
    /// not want its session.
    HandOver {
        from: ConnId,
        to: ConnId,
        clean: bool,
    },
    /// The answer, if there is something to go on with: its topics, and of each whether messages that are in no log are
    /// wanted. They are to be held first.
    Prepare {
        from: ConnId,
        conn: ConnId,
        topics: Vec<(Arc<str>, bool)>,
    },
    /// That is so: give the session up.
    GiveUp {
        from: ConnId,
        to: ConnId,
    },
    /// The answer: what is left of the session, if it is to go on from there.
    HandedOver {
        conn: ConnId,
        left: Option<Box<Left>>,
    },
    /// Choose the devices of a job that moves them away; answered with their number.
    PlanMove {
        job: u64,
        plan: Plan,
        answer: oneshot::Sender<u64>,
    },
    /// Send so many of them away; `u64::MAX`: all, at once.
    MoveAway {
        job: u64,
        count: u64,
    },
    /// The job is over; answered when that is so here.
    EndMove(oneshot::Sender<()>),
    /// There is more to read.
    Proceed {
        conn: ConnId,
    },
    /// Announce the sessions whose users' inboxes are in these slots.
    AnnounceSessions(Arc<SlotAnnouncement>),
    /// Accept connections here from now on.
    Listen {
        id: usize,
        socket: std::net::TcpListener,
        settings: LiveSettings,
    },
    /// Accept no more; answered when the socket is closed.
    Unlisten {
        id: usize,
        done: std::sync::mpsc::Sender<()>,
    },
    /// Another saver, or the same one after a restart: tell it which sessions are here.
    SaverChanged,
    /// Disconnect everyone and end; answered when their sessions have been handed to the saver.
    Stop(oneshot::Sender<()>),
}

/// A filter of a SUBSCRIBE that is in force.
pub struct Granted {
    /// seq after which messages are due on a topic name.
    pub position: u64,
    /// Up to here they were sent before, and not acked.
    pub sent: u64,
    /// Where a wildcard filter has messages waiting.
    pub backlog: Vec<v1::Backlog>,
    pub retained: Vec<Arc<Delivery>>,
}

/// How a device's PUBLISH came out; the MQTT 5 reason code of its PUBACK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishOutcome {
    pub reason: u8,
}

/// The way into a shard: a queue and a bell.
#[derive(Clone)]
pub struct ShardHandle {
    events: Sender<Event>,
    waker: Arc<mio::Waker>,
    rung: Arc<AtomicBool>,
    queued: Arc<AtomicUsize>,
}

/// The shard's end of it.
pub struct Inbox {
    events: Receiver<Event>,
    rung: Arc<AtomicBool>,
    queued: Arc<AtomicUsize>,
}

pub fn inbox(waker: mio::Waker) -> (ShardHandle, Inbox) {
    let (sender, receiver) = crossbeam_channel::unbounded();
    let (rung, queued) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    (
        ShardHandle { events: sender, waker: Arc::new(waker), rung: rung.clone(), queued: queued.clone() },
        Inbox { events: receiver, rung, queued },
    )
}

/// Deliveries that may wait for a shard before its feeders do; answers to a shard's own questions always get in, their
/// number being bounded by the questions'.
const QUEUED_MAX: usize = 16_384;

impl ShardHandle {
    /// Queues an event and wakes the shard. A shard that has ended takes no more; then nobody is left to care.
    pub fn post(&self, event: Event) {
        self.queued.fetch_add(1, Ordering::Relaxed);
        if self.events.send(event).is_ok()
            && !self.rung.swap(true, Ordering::AcqRel)
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "cannot wake a shard");
        }
    }

    /// Is it behind by so much that deliveries should wait?
    pub fn is_full(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > QUEUED_MAX
    }
}

impl Inbox {
    /// To be called before a round of [`take`](Self::take): what is posted from now on rings again.
    pub fn answer(&self) {
        self.rung.store(false, Ordering::Release);
    }

    pub fn take(&self) -> Option<Event> {
        let event = self.events.try_recv().ok()?;
        self.queued.fetch_sub(1, Ordering::Relaxed);
        Some(event)
    }

    pub fn len(&self) -> usize {
        self.events.len()
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}
