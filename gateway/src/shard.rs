//! One thread with its own listeners and its own connections, which never move: an epoll loop.
//!
//! A round: sockets that are ready are read and handled, then what came from outside (deliveries, answers), then
//! deadlines, and last what was queued for sockets goes out. Nothing in here waits for anything but epoll.

mod accept;
mod acks;
mod admit;
mod aliases;
mod broadcast;
mod catch_up;
mod close;
mod conn;
mod connect;
mod deadlines;
mod deliver;
mod flush;
mod guests;
mod hand_over;
mod inflight;
mod layers;
mod move_away;
mod outbound;
mod pace;
mod parked;
mod passed;
mod publish;
mod publishing;
mod reached;
mod read;
mod resend;
mod secure;
mod shared;
mod subscribe;
mod timers;
mod tls;
mod topics;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mio::net::TcpListener;
use mio::{Events, Poll, Token};
use slab::Slab;
use tokio::sync::oneshot;

use crate::admission::Admission;
use crate::auth::{Apps, Keyring};
use crate::config::GatewayConfig;
use crate::drain::Moving;
use crate::event::{self, ConnId, Event, Inbox, ShardHandle};
use crate::link::{Link, Underway};
use crate::listeners::LiveSettings;
use crate::metrics::{AppCounts, AppTotals, Counts, Metrics};
use crate::overload::Overload;
use conn::{Conn, conn_id};
use move_away::MoveAway;
use parked::Parking;
use timers::{TICK, Tick, Timers};
use topics::Topics;

pub use parked::Left;

/// Tokens of listeners and of the bell are above those of connections.
const LISTENERS: usize = 1 << 40;
const BELL: Token = Token(usize::MAX);
/// Sockets handled in one round before other work gets its turn.
const EVENTS: usize = 1024;
/// Events from outside handled in one round.
const INBOX_BUDGET: usize = 4096;
/// Accepts in one round and listener.
const ACCEPT_BUDGET: usize = 512;
/// Bytes of the read buffer that all of a shard's connections borrow.
const READ_BUFFER_BYTES: usize = 64 * 1024;
/// How often a round goes over what is queued; what is left goes out in the next.
const FLUSH_TURNS: usize = 8;
/// Acks are handed to the saver together, at least this often.
const ACK_INTERVAL: Duration = Duration::from_millis(10);

/// What all shards of a gateway share.
pub struct Shared {
    pub config: ArcSwap<GatewayConfig>,
    pub apps: ArcSwap<Apps>,
    pub keyring: ArcSwap<Keyring>,
    pub admission: Admission,
    pub overload: Overload,
    pub metrics: Metrics,
    pub totals: AppTotals,
    pub connections: AtomicUsize,
    pub moving: Moving,
    pub next_connection: AtomicU64,
}

pub struct Shard {
    index: usize,
    shared: Arc<Shared>,
    link: Link,
    poll: Poll,
    inbox: Inbox,
    listeners: HashMap<usize, (TcpListener, LiveSettings)>,
    /// Listeners that may have more to accept, and when accepting may go on after it failed.
    accept_again: Vec<usize>,
    accept_paused_until: Option<Instant>,
    conns: Slab<Conn>,
    next_generation: u32,
    topics: Topics,
    timers: Timers,
    /// Entries of the wheel, as the metric has them.
    told_timers: i64,
    counts: Counts,
    /// The apps that have had connections here, and what they have done since the last adding up.
    apps: Vec<(Arc<str>, AppCounts)>,
    round: u32,
    now: Tick,
    now_ms: u64,
    config: Arc<GatewayConfig>,
    keyring: Arc<Keyring>,
    /// Connections in the order they were accepted, among them those that wait for their CONNECT, and how many these are.
    pending: VecDeque<(u32, u32)>,
    pending_count: usize,
    /// Those that publish too fast: when to read on, index and generation.
    paced: BinaryHeap<Reverse<(Tick, u32, u32)>>,
    /// When tokens of further apps end (Unix seconds), with index and generation of their connections.
    guest_ends: BinaryHeap<Reverse<(u64, u32, u32)>>,
    /// The longest round of this second.
    longest_round: Duration,
    /// By connection: the positions that its acks have reached.
    acks: HashMap<u32, Vec<(Arc<str>, u64)>>,
    acks_flushed: Instant,
    doomed: Vec<u32>,
    dirty: Vec<u32>,
    /// Connections whose reading of the log failed.
    retry: Vec<(u32, u32)>,
    /// SUBSCRIBEs that wait for routes, and until when.
    awaiting_routes: VecDeque<(Tick, Arc<Underway>)>,
    jobs: Vec<broadcast::Job>,
    /// Connections whose TLS handshake has something to go on with, and their generations.
    handshakes: VecDeque<(u32, u32)>,
    memberships: shared::Memberships,
    buffer: Vec<u8>,
    /// What one read of a connection over TLS has brought.
    plain: Vec<u8>,
    scratch: Vec<u8>,
    parking: Parking,
    /// The devices that are being moved to other gateways.
    moving: Option<Box<MoveAway>>,
    /// Sockets of devices that were told to go, until when.
    lingering: VecDeque<(Tick, mio::net::TcpStream)>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Shard {
    /// Makes a shard; [`run`](Self::run) is to be called on a thread of its own.
    pub fn new(index: usize, shared: Arc<Shared>, link: Link) -> io::Result<(Shard, ShardHandle)> {
        let poll = Poll::new()?;
        let (handle, inbox) = event::inbox(mio::Waker::new(poll.registry(), BELL)?);
        let started = Instant::now();
        let config = shared.config.load_full();
        let keyring = shared.keyring.load_full();
        let shard = Shard {
            index,
            shared,
            link,
            poll,
            inbox,
            listeners: HashMap::new(),
            accept_again: Vec::new(),
            accept_paused_until: None,
            conns: Slab::new(),
            next_generation: 0,
            topics: Topics::default(),
            timers: Timers::new(started),
            told_timers: 0,
            counts: Counts::default(),
            apps: Vec::new(),
            round: 0,
            now: 0,
            now_ms: carillon_proto::now_ms(),
            config,
            keyring,
            pending: VecDeque::new(),
            pending_count: 0,
            paced: BinaryHeap::new(),
            guest_ends: BinaryHeap::new(),
            longest_round: Duration::ZERO,
            acks: HashMap::new(),
            acks_flushed: started,
            doomed: Vec::new(),
            dirty: Vec::new(),
            retry: Vec::new(),
            awaiting_routes: VecDeque::new(),
            jobs: Vec::new(),
            handshakes: VecDeque::new(),
            memberships: shared::Memberships::default(),
            buffer: vec![0; READ_BUFFER_BYTES],
            plain: Vec::new(),
            scratch: Vec::new(),
            parking: Parking::default(),
            moving: None,
            lingering: VecDeque::new(),
            stopping: None,
        };
        Ok((shard, handle))
    }

    /// Runs until it is told to stop.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS);
        let mut due = Vec::new();
        let mut last_second = 0;
        loop {
            let timeout = self.timeout();
            if let Err(error) = self.poll.poll(&mut events, Some(timeout))
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(shard = self.index, %error, "epoll failed; the shard ends");
                return;
            }
            self.round = self.round.wrapping_add(1);
            self.now_ms = carillon_proto::now_ms();
            let present = Instant::now();
            for event in &events {
                match event.token() {
                    BELL => {}
                    Token(token) if token >= LISTENERS => self.accept_later(token - LISTENERS),
                    Token(index) => {
                        let index = index as u32;
                        // Reading first: what a device said before it left counts, also if it takes nothing any more.
                        let has_hung_up = event.is_read_closed() || event.is_error();
                        if has_hung_up && let Some(conn) = self.conns.get_mut(index as usize) {
                            conn.has_hung_up = true;
                        }
                        if event.is_readable() || has_hung_up {
                            self.readable(index);
                        }
                        if event.is_writable() {
                            self.writable(index);
                        }
                    }
                }
            }
            self.accept(present);
            self.shake_hands();
            self.inbox.answer();
            // What is posted meanwhile, by this shard itself too, is for the next round.
            for _ in 0..self.inbox.len().min(INBOX_BUDGET) {
                let Some(event) = self.inbox.take() else { break };
                self.handle(event);
            }
            self.advance_jobs(present);
            self.timers.advance(present, &mut due);
            self.now = self.timers.now();
            for entry in due.drain(..) {
                self.look_at(entry);
            }
            self.read_paced();
            self.end_late_parked();
            self.end_lingering();
            if self.now / 10 != last_second {
                last_second = self.now / 10;
                self.each_second();
            }
            if !self.acks.is_empty() && present.duration_since(self.acks_flushed) >= ACK_INTERVAL {
                self.flush_acks();
                self.acks_flushed = present;
            }
            self.flush_dirty();
            self.bury();
            self.longest_round = self.longest_round.max(present.elapsed());
            if let Some(done) = self.stopping.take() {
                self.stop(done);
                return;
            }
        }
    }

    fn timeout(&self) -> Duration {
        let unfinished = !self.inbox.is_empty()
            || !self.dirty.is_empty()
            || !self.handshakes.is_empty()
            || (!self.accept_again.is_empty() && self.accept_paused_until.is_none());
        if unfinished {
            Duration::ZERO
        } else if let Some(until) = self.accept_paused_until {
            until.saturating_duration_since(Instant::now()).min(ACK_INTERVAL)
        } else if !self.acks.is_empty() || !self.jobs.is_empty() {
            ACK_INTERVAL
        } else {
            self.timers.until_next(Instant::now()).min(TICK)
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Deliver(delivery) => self.deliver(&delivery),
            Event::Broadcast { job, delivery } => self.broadcast(job, delivery),
            Event::BroadcastRate { job, state, rate_per_second } => {
                self.broadcast_rate(&job, state, rate_per_second)
            }
            Event::Behind { topic, head } => self.topic_is_behind(&topic, head),
            Event::Opened { conn, session, result } => self.opened(conn, session, result),
            Event::TakenUp { conn, result } => self.taken_up(conn, result),
            Event::Subscribed { conn, packet_id, outcomes } => self.subscribed(conn, packet_id, outcomes),
            Event::Unsubscribed { conn, packet_id, kept } => self.unsubscribed(conn, packet_id, kept),
            Event::Published { conn, ticket, outcome } => self.published(conn, ticket, outcome),
            Event::Read { conn, topic, result } => self.have_read(conn, &topic, result),
            Event::Share { conn, member, token, delivery } => self.assigned(conn, member, token, &delivery),
            Event::KickGuest { conn, key } => self.kick_guest(conn, key, "kicked"),
            Event::Kick { conn, reason } => self.kick(conn, reason),
            Event::HandOver { from, to, clean } => self.asked_for(from, to, clean),
            Event::Prepare { from, conn, topics } => self.prepare(from, conn, topics),
            Event::GiveUp { from, to } => self.yield_to(from, to),
            Event::HandedOver { conn, left } => self.handed_over(conn, left),
            Event::PlanMove { job, plan, answer } => drop(answer.send(self.plan_move(job, plan))),
            Event::MoveAway { job, count } => self.move_away(job, count),
            Event::EndMove(answer) => {
                self.end_move();
                let _ = answer.send(());
            }
            Event::Proceed { conn } => self.proceed(conn),
            Event::AnnounceSessions(announcement) => self.announce_sessions(&announcement),
            Event::Listen { id, socket, settings } => self.listen(id, socket, settings),
            Event::Unlisten { id, done } => {
                self.unlisten(id);
                let _ = done.send(());
            }
            Event::SaverChanged => self.claim_sessions(),
            Event::Stop(done) => self.stopping = Some(done),
        }
    }

    /// The connection's index here, if it is still the one that was meant.
    fn find(&self, id: ConnId) -> Option<u32> {
        let conn = self.conns.get(id.index as usize)?;
        (conn.generation == id.generation).then_some(id.index)
    }

    fn id(&self, index: u32) -> ConnId {
        conn_id(self.index, index, self.conns[index as usize].generation)
    }

    fn each_second(&mut self) {
        self.follow_documents();
        self.end_guests();
        self.shared.overload.note_lag(std::mem::take(&mut self.longest_round));
        self.counts.flush(&self.shared.metrics);
        let timers = self.timers.len() as i64;
        self.shared.metrics.timer_entries.add(timers - std::mem::replace(&mut self.told_timers, timers));
        for (app, counts) in &mut self.apps {
            self.shared.totals.add(app, std::mem::take(counts));
        }
        self.time_out_routes();
        for (index, generation) in std::mem::take(&mut self.retry) {
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                self.retry_behind(index);
            }
        }
        self.look_for_room();
    }

    fn app_index(&mut self, app: &Arc<str>) -> u16 {
        if let Some(index) = self.apps.iter().position(|(name, _)| name == app) {
            return index as u16;
        }
        self.apps.push((app.clone(), AppCounts::default()));
        (self.apps.len() - 1) as u16
    }

    fn announce_sessions(&self, announcement: &crate::link::SlotAnnouncement) {
        let connected = self.conns.iter().filter_map(|(_, conn)| conn.session.as_deref());
        for session in connected.chain(self.parking.sessions()).filter(|session| session.is_online) {
            let inbox = carillon_proto::topic::inbox(&session.app, &session.user);
            if announcement.has(carillon_proto::topic::slot_of(&inbox)) {
                self.link.session_changed(connect::online(session, true));
            }
            for guest in session.guests() {
                let inbox = carillon_proto::topic::inbox(&guest.app, &guest.user);
                if announcement.has(carillon_proto::topic::slot_of(&inbox)) {
                    self.link.session_changed(session.guest_online(guest, true));
                }
            }
        }
    }

    /// A saver that has restarted takes every session for closed, and lets it expire, until it hears of it.
    fn claim_sessions(&self) {
        let connected = self.conns.iter().filter_map(|(_, conn)| conn.session.as_deref());
        for session in connected.chain(self.parking.sessions()) {
            if session.attachment.is_some() {
                self.send_acks(session, Vec::new());
            }
        }
    }

    fn stop(mut self, done: oneshot::Sender<()>) {
        self.listeners.clear();
        self.flush_acks();
        let all: Vec<u32> = self.conns.iter().map(|(index, _)| index as u32).collect();
        for index in all {
            self.close(index, close::Reason::ShuttingDown);
        }
        self.end_all_parked();
        self.each_second();
        let _ = done.send(());
    }
}
