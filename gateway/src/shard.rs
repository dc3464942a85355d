//! One thread with its own listeners and its own connections, which never move: an epoll loop.
//!
//! A round: sockets that are ready are read and handled, then what came from outside (deliveries, answers), then
//! deadlines, and last what was queued for sockets goes out. Nothing in here waits for anything but epoll.

mod broadcast;
mod close;
mod conn;
mod connect;
mod deliver;
mod outbound;
mod publish;
mod read;
mod subscribe;
mod timers;
mod topics;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use carillon_proto::v1;
use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use tokio::sync::oneshot;

use crate::auth::Apps;
use crate::config::GatewayConfig;
use crate::event::{self, ConnId, Event, Inbox, ShardHandle};
use crate::link::Link;
use crate::metrics::{AppCounts, AppTotals, Counts, Metrics};
use conn::{Conn, conn_id};
use timers::{Entry, TICK, Tick, Timers, ticks};
use topics::Topics;

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
    pub metrics: Metrics,
    pub totals: AppTotals,
    pub connections: AtomicUsize,
    pub next_connection: AtomicU64,
}

/// A listening socket of one shard.
pub struct Listener {
    pub socket: std::net::TcpListener,
    pub is_websocket: bool,
}

pub struct Shard {
    index: usize,
    shared: Arc<Shared>,
    link: Link,
    poll: Poll,
    inbox: Inbox,
    listeners: Vec<(TcpListener, bool)>,
    /// Listeners that may have more to accept, and when accepting may go on after it failed.
    accept_again: Vec<usize>,
    accept_paused_until: Option<Instant>,
    conns: Slab<Conn>,
    next_generation: u32,
    topics: Topics,
    timers: Timers,
    counts: Counts,
    /// The apps that have had connections here, and what they have done since the last adding up.
    apps: Vec<(Arc<str>, AppCounts)>,
    round: u32,
    now: Tick,
    now_ms: u64,
    config: Arc<GatewayConfig>,
    /// By connection: the positions that its acks have reached.
    acks: HashMap<u32, Vec<(Arc<str>, u64)>>,
    acks_flushed: Instant,
    doomed: Vec<u32>,
    dirty: Vec<u32>,
    /// Connections whose reading of the log failed.
    retry: Vec<(u32, u32)>,
    jobs: Vec<broadcast::Job>,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Shard {
    /// Makes a shard; [`run`](Self::run) is to be called on a thread of its own.
    pub fn new(
        index: usize,
        shared: Arc<Shared>,
        link: Link,
        listeners: Vec<Listener>,
    ) -> io::Result<(Shard, ShardHandle)> {
        let poll = Poll::new()?;
        let (handle, inbox) = event::inbox(mio::Waker::new(poll.registry(), BELL)?);
        let mut registered = Vec::new();
        for (i, listener) in listeners.into_iter().enumerate() {
            listener.socket.set_nonblocking(true)?;
            let mut socket = TcpListener::from_std(listener.socket);
            poll.registry().register(&mut socket, Token(LISTENERS + i), Interest::READABLE)?;
            registered.push((socket, listener.is_websocket));
        }
        let started = Instant::now();
        let config = shared.config.load_full();
        let shard = Shard {
            index,
            shared,
            link,
            poll,
            inbox,
            listeners: registered,
            accept_again: Vec::new(),
            accept_paused_until: None,
            conns: Slab::new(),
            next_generation: 0,
            topics: Topics::default(),
            timers: Timers::new(started),
            counts: Counts::default(),
            apps: Vec::new(),
            round: 0,
            now: 0,
            now_ms: carillon_proto::now_ms(),
            config,
            acks: HashMap::new(),
            acks_flushed: started,
            doomed: Vec::new(),
            dirty: Vec::new(),
            retry: Vec::new(),
            jobs: Vec::new(),
            buffer: vec![0; READ_BUFFER_BYTES],
            scratch: Vec::new(),
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
                    Token(token) if token >= LISTENERS => self.accept_again.push(token - LISTENERS),
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
            if let Some(done) = self.stopping.take() {
                self.stop(done);
                return;
            }
        }
    }

    fn timeout(&self) -> Duration {
        let unfinished = !self.inbox.is_empty()
            || !self.dirty.is_empty()
            || (!self.accept_again.is_empty() && self.accept_paused_until.is_none());
        if unfinished {
            Duration::ZERO
        } else if !self.acks.is_empty() || !self.jobs.is_empty() {
            ACK_INTERVAL
        } else {
            self.timers.until_next(Instant::now()).min(TICK)
        }
    }

    fn accept(&mut self, present: Instant) {
        if self.accept_paused_until.is_some_and(|until| present < until) {
            return;
        }
        self.accept_paused_until = None;
        for listener in std::mem::take(&mut self.accept_again) {
            for accepted in 0.. {
                if accepted == ACCEPT_BUDGET {
                    self.accept_again.push(listener);
                    break;
                }
                let (socket, is_websocket) = &self.listeners[listener];
                match socket.accept() {
                    Ok((stream, _)) => {
                        let is_websocket = *is_websocket;
                        if let Err(error) = self.accepted(stream, is_websocket) {
                            tracing::debug!(%error, "connection could not be set up");
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The connection went before it was accepted; the next one may be fine.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept connections, pausing");
                        self.accept_paused_until = Some(present + Duration::from_millis(100));
                        self.accept_again.push(listener);
                        break;
                    }
                }
            }
        }
    }

    fn accepted(&mut self, mut stream: mio::net::TcpStream, is_websocket: bool) -> io::Result<()> {
        stream.set_nodelay(true)?;
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let entry = self.conns.vacant_entry();
        let index = entry.key();
        // Both at once, edge-triggered: an idle socket costs no further call for either.
        self.poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        entry.insert(Conn::new(stream, generation, is_websocket, self.now));
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        let deadline = self.now + ticks(Duration::from_millis(self.config.connect_timeout_ms.into()));
        self.timers.add(deadline, Entry { index: index as u32, generation, once: true });
        Ok(())
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
            Event::Subscribed { conn, packet_id, outcomes } => self.subscribed(conn, packet_id, outcomes),
            Event::Unsubscribed { conn, packet_id, kept } => self.unsubscribed(conn, packet_id, kept),
            Event::Published { conn, ticket, outcome } => self.published(conn, ticket, outcome),
            Event::Read { conn, topic, result } => self.have_read(conn, &topic, result),
            Event::Kick { conn, reason, then } => self.kick(conn, reason, then),
            Event::Proceed { conn } => self.proceed(conn),
            Event::AnnounceSessions(announcement) => self.announce_sessions(&announcement),
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

    /// Looks at a connection's deadlines.
    fn look_at(&mut self, entry: Entry) {
        let Some(conn) = self.conns.get_mut(entry.index as usize) else { return };
        if conn.generation != entry.generation {
            return;
        }
        if entry.once && conn.out.is_none() {
            conn.is_watched = false;
        }
        let now = self.now;
        let connect_deadline =
            conn.accepted + ticks(Duration::from_millis(self.config.connect_timeout_ms.into()));
        let mut next = None;
        let mut soonest = |deadline: Tick, extra: bool| {
            if extra == entry.once {
                next = Some(next.map_or(deadline, |next: Tick| next.min(deadline)));
            }
        };
        if conn.session.is_none() {
            if now >= connect_deadline {
                return self.close(entry.index, close::Reason::ConnectTimeout);
            }
            soonest(connect_deadline, true);
        }
        if conn.keep_alive > 0 {
            // One and a half times the keep-alive (MQTT 5.0 §3.1.2.10).
            let deadline = conn.last_read + ticks(Duration::from_millis(u64::from(conn.keep_alive) * 1500));
            if now >= deadline && !conn.is_paused {
                return self.close(entry.index, close::Reason::KeepAliveTimeout);
            }
            soonest(deadline.max(now + 10), false);
        }
        if let Some(out) = &conn.out {
            let deadline = out.progressed + ticks(Duration::from_millis(self.config.write_timeout_ms.into()));
            if now >= deadline {
                return self.close(entry.index, close::Reason::WriteTimeout);
            }
            soonest(deadline, true);
        }
        if let Some(session) = &conn.session
            && session.expires != 0
        {
            let left_ms = session.expires.saturating_mul(1000).saturating_sub(self.now_ms);
            if left_ms == 0 {
                return self.close(entry.index, close::Reason::TokenExpired);
            }
            soonest(now.saturating_add(ticks(Duration::from_millis(left_ms))), false);
        }
        if let Some(next) = next {
            self.timers.add(next, entry);
        }
    }

    fn each_second(&mut self) {
        self.config = self.shared.config.load_full();
        self.counts.flush(&self.shared.metrics);
        for (app, counts) in &mut self.apps {
            self.shared.totals.add(app, std::mem::take(counts));
        }
        for (index, generation) in std::mem::take(&mut self.retry) {
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                self.retry_behind(index);
            }
        }
    }

    fn app_index(&mut self, app: &Arc<str>) -> u16 {
        if let Some(index) = self.apps.iter().position(|(name, _)| name == app) {
            return index as u16;
        }
        self.apps.push((app.clone(), AppCounts::default()));
        (self.apps.len() - 1) as u16
    }

    fn announce_sessions(&self, announcement: &crate::link::SlotAnnouncement) {
        for (_, conn) in &self.conns {
            let Some(session) = conn.session.as_ref().filter(|session| session.is_online) else { continue };
            let inbox = carillon_proto::topic::inbox(&session.app, &session.user);
            if announcement.has(carillon_proto::topic::slot_of(&inbox)) {
                self.link.session_changed(connect::online(session, true));
            }
        }
    }

    /// A saver that has restarted takes every session for closed, and lets it expire, until it hears of it.
    fn claim_sessions(&self) {
        for (_, conn) in &self.conns {
            if let Some(session) = conn.session.as_ref().filter(|session| session.attachment.is_some()) {
                self.send_acks(session, Vec::new());
            }
        }
    }

    /// Remembers that a connection has something queued that is to go out at the end of the round.
    fn note_queued(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if conn.is_dirty {
            return;
        }
        conn.is_dirty = true;
        self.dirty.push(index);
    }

    fn flush_dirty(&mut self) {
        // A socket that took all that was queued may have room for what is behind, which is queued in turn.
        for _ in 0..FLUSH_TURNS {
            for index in std::mem::take(&mut self.dirty) {
                let Some(conn) = self.conns.get_mut(index as usize) else { continue };
                if !conn.is_dirty {
                    continue;
                }
                conn.is_dirty = false;
                if conn.out.as_ref().is_none_or(|out| out.is_blocked) {
                    continue;
                }
                self.flush(index);
                let conn = &self.conns[index as usize];
                let waits = conn.session.as_ref().is_some_and(|s| s.behind.is_some() || s.waiting.is_some());
                if waits && conn.out.is_none() && !conn.is_doomed {
                    self.pump(index);
                }
            }
            if self.dirty.is_empty() {
                break;
            }
        }
    }

    fn flush(&mut self, index: u32) {
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        match conn.flush(now) {
            Ok(outbound::Sent::All) => {}
            Ok(outbound::Sent::Queued) => self.watch_write(index),
            Err(_) => self.doom(index),
        }
    }

    /// The socket is full: look whether it has moved when the write timeout is over.
    fn watch_write(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if std::mem::replace(&mut conn.is_watched, true) {
            return;
        }
        let generation = conn.generation;
        let deadline = self.now + ticks(Duration::from_millis(self.config.write_timeout_ms.into()));
        self.timers.add(deadline, Entry { index, generation, once: true });
    }

    /// To be closed at the end of the round: closing in the middle of a fan-out would change the list being walked.
    fn doom(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if !conn.is_doomed {
            conn.is_doomed = true;
            self.doomed.push(index);
        }
    }

    fn bury(&mut self) {
        while let Some(index) = self.doomed.pop() {
            let Some(conn) = self.conns.get_mut(index as usize).filter(|conn| conn.is_doomed) else {
                continue;
            };
            // It takes nothing any more, but what it has sent (acks, a DISCONNECT) is still to be heard.
            (conn.is_doomed, conn.is_deaf, conn.readable) = (false, true, true);
            conn.out = None;
            let generation = conn.generation;
            self.resume(index);
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                self.close(index, close::Reason::Network);
            }
        }
    }

    fn writable(&mut self, index: u32) {
        let Some(conn) = self.conns.get_mut(index as usize) else { return };
        let Some(out) = &mut conn.out else { return };
        out.is_blocked = false;
        self.flush(index);
        let Some(conn) = self.conns.get(index as usize) else { return };
        if !conn.is_doomed && conn.out.is_none() {
            self.pump(index);
        }
    }

    fn flush_acks(&mut self) {
        for (index, positions) in std::mem::take(&mut self.acks) {
            if let Some(conn) = self.conns.get(index as usize)
                && let Some(session) = &conn.session
            {
                self.send_acks(session, positions);
            }
        }
    }

    fn send_acks(&self, session: &conn::Session, positions: Vec<(Arc<str>, u64)>) {
        let positions = positions
            .into_iter()
            .map(|(topic, seq)| v1::AckPosition { topic: topic.to_string(), seq })
            .collect();
        self.link.ack(v1::Ack {
            session: Some(session.session_ref()),
            attachment: session.attachment.unwrap_or(0),
            positions,
        });
    }

    fn stop(mut self, done: oneshot::Sender<()>) {
        self.listeners.clear();
        self.flush_acks();
        let all: Vec<u32> = self.conns.iter().map(|(index, _)| index as u32).collect();
        for index in all {
            self.close(index, close::Reason::ShuttingDown);
        }
        self.each_second();
        let _ = done.send(());
    }
}

/// Addresses of a socket that are not there: it is on its way out.
fn peer(stream: &mio::net::TcpStream) -> SocketAddr {
    stream.peer_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)))
}
