//! What a shard keeps for a connection. What an idle one does not need is not there: it is in a box that comes and goes.
#![allow(clippy::box_collection)] // a box is 8 bytes where an absent Vec is 24, and almost always it is absent

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use carillon_proto::v1;
use mio::net::TcpStream;
use smallvec::SmallVec;

use super::guests::Guest;
use super::layers::{Layers, first_phase};
use super::outbound::Outbound;
use super::pace::Pace;
use super::timers::Tick;
use super::topics::{SubOptions, SubRef, TopicId};
use crate::admission::SourceId;
use crate::auth::{Rights, Stamp};
use crate::codec::Version;
use crate::delivery::Delivery;
use crate::event::ConnId;
use crate::listeners::Settings;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Behind a proxy only: the PROXY protocol's header is not complete.
    Proxied,
    /// TLS only: the handshake is not done.
    Securing,
    /// WebSocket only: the HTTP request is not complete.
    Upgrading,
    /// No CONNECT yet.
    Connecting,
    /// The CONNECT is accepted, its session is being fetched; nothing more is read.
    Opening,
    Live,
}

pub struct Conn {
    pub stream: TcpStream,
    pub generation: u32,
    pub phase: Phase,
    pub version: Version,
    /// Nothing is read for now; `readable` tells whether there is something.
    pub is_paused: bool,
    pub readable: bool,
    /// The device has closed its side: read to the end, for nobody will say again that there is something.
    pub has_hung_up: bool,
    /// The timer wheel looks after what is queued for it.
    pub is_watched: bool,
    /// To be closed at the end of this round; set when a write failed in the middle of a fan-out.
    pub is_doomed: bool,
    /// It takes nothing any more: nothing is sent to it, but what it has sent is still heard.
    pub is_deaf: bool,
    /// In the list of those with something queued in this round.
    pub is_dirty: bool,
    /// The round of the last direct send: a second message in one round is queued, to go out together with others.
    pub round: u32,
    pub accepted: Tick,
    pub last_read: Tick,
    /// Seconds; 0 = none.
    pub keep_alive: u16,
    /// Bytes that it asked for and did not take are too many.
    pub is_slow: bool,
    /// The address that it is counted for.
    pub source: SourceId,
    /// Bytes of a packet that is not complete, or that is not handled yet.
    pub partial: Option<Box<Vec<u8>>>,
    pub out: Option<Box<Outbound>>,
    /// What is between the socket and MQTT.
    pub layers: Option<Box<Layers>>,
    pub session: Option<Box<Session>>,
    pub subs: SmallVec<[SubRef; 1]>,
}

/// What a CONNECT brought, and what came of it.
pub struct Session {
    pub app: Arc<str>,
    /// Index of the app in the shard's counts.
    pub app_index: u16,
    pub is_root: bool,
    pub user: Box<str>,
    pub client_id: Box<str>,
    pub key: u128,
    pub rights: Option<Box<Rights>>,
    /// Number of this connection in the gateway.
    pub connection: u64,
    pub since_ms: u64,
    pub address: SocketAddr,
    /// Unix seconds at which the token ends; 0 = never.
    pub expires: u64,
    /// Of the token.
    pub stamp: Stamp,
    /// Further apps that this connection serves.
    pub guests: Option<Box<Vec<Guest>>>,
    pub expiry_seconds: u32,
    /// Is there something kept in the saver, and under which attachment?
    pub attachment: Option<u64>,
    /// Has it been announced as online?
    pub is_online: bool,
    /// Unacked deliveries allowed.
    pub window: u16,
    /// Longest packet that the device takes, bytes.
    pub max_packet_bytes: u32,
    /// MQTT 5 Request Problem Information: reason strings may be sent.
    pub wants_problems: bool,
    pub will: Option<Box<Will>>,
    /// The CONNECT, until it is answered.
    pub opening: Option<Box<OpeningConnect>>,
    pub inflight: Option<Box<Inflight>>,
    pub publishing: Option<Box<Publishing>>,
    pub behind: Option<Box<Vec<Behind>>>,
    pub waiting: Option<Box<VecDeque<Waiting>>>,
    /// The SUBSCRIBE under way; nothing is read meanwhile, so there is at most one.
    pub pending: Option<Box<PendingSubscribe>>,
    /// The reason codes of the UNSUBACK under way.
    pub unsubscribing: Option<Box<Vec<u8>>>,
    /// By topic: seq of the last stored message sent, for topics that only a filter with wildcards matches.
    pub wild_last: Option<Box<HashMap<Arc<str>, u64>>>,
    pub next_packet_id: u16,
}

pub struct Will {
    pub message: v1::Message,
    pub delay_seconds: u32,
}

/// What the CONNACK needs.
pub struct OpeningConnect {
    pub clean_start: bool,
    pub requested_expiry: u32,
    pub requested_keep_alive: u16,
    pub is_client_id_assigned: bool,
    pub session_present: bool,
}

/// Deliveries that wait for their PUBACK, in the order they were sent.
#[derive(Default)]
pub struct Inflight {
    pub flights: VecDeque<Flight>,
}

pub struct Flight {
    /// 0: nothing to wait for, only to keep the cursor behind what was sent before.
    pub packet_id: u16,
    pub is_acked: bool,
    /// The position that the ack moves the cursor to: a stored message's topic and seq.
    pub cursor: Option<(Arc<str>, u64)>,
}

/// The device's own publishes that are not answered yet, in their order.
#[derive(Default)]
pub struct Publishing {
    /// Ticket of the first of the queue.
    pub first_ticket: u64,
    pub queue: VecDeque<PendingPublish>,
    /// Bytes of the payloads under way.
    pub bytes: usize,
    pub pace: Pace,
    /// Published above its rate: not to be read before this.
    pub read_again: Tick,
}

pub struct PendingPublish {
    /// 0: QoS 0, not to be answered.
    pub packet_id: u16,
    pub reason: Option<u8>,
    pub bytes: u32,
}

/// A topic on which the device has messages due that are to be read from the log.
pub struct Behind {
    pub topic: Arc<str>,
    /// seq up to which the log has been read.
    pub after: u64,
    /// seq up to which it must be read at least.
    pub target: u64,
    /// Up to here messages have been sent before: DUP.
    pub sent: u64,
    pub is_reading: bool,
    /// The last read failed: try again in the next second.
    pub has_failed: bool,
    /// Read, and waiting for the window.
    pub queue: VecDeque<Arc<Delivery>>,
    /// Came by meanwhile and is not in the log: to be sent after it.
    pub held: VecDeque<Arc<Delivery>>,
}

/// A message that is not in a log (or is retained) and waits for the window.
pub struct Waiting {
    pub delivery: Arc<Delivery>,
    pub target: Target,
    pub retain: bool,
}

/// What a connection's subscriptions to a message's topic ask for, together.
#[derive(Clone, Default)]
pub struct Target {
    pub options: SubOptions,
    pub identifiers: SmallVec<[u32; 2]>,
    /// The subscription to the topic name itself, which holds the cursor.
    pub exact: Option<SubRef>,
}

/// A SUBSCRIBE that waits for owners and saver.
pub struct PendingSubscribe {
    /// 0: the subscriptions of a kept session.
    pub packet_id: u16,
    pub entries: Vec<PendingEntry>,
}

pub enum PendingEntry {
    Refused(u8),
    Wanted { topic: TopicId, options: SubOptions, identifier: u32 },
}

impl Conn {
    pub fn new(
        stream: TcpStream,
        generation: u32,
        settings: &Arc<Settings>,
        source: SourceId,
        now: Tick,
    ) -> Self {
        Conn {
            stream,
            generation,
            phase: first_phase(settings),
            version: Version::V5,
            is_paused: false,
            readable: false,
            has_hung_up: false,
            is_watched: false,
            is_doomed: false,
            is_deaf: false,
            is_dirty: false,
            round: 0,
            accepted: now,
            last_read: now,
            keep_alive: 0,
            is_slow: false,
            source,
            partial: None,
            out: None,
            layers: Layers::on_arrival(settings),
            session: None,
            subs: SmallVec::new(),
        }
    }

    pub fn outbound_bytes(&self) -> usize {
        self.out.as_ref().map_or(0, |out| out.bytes())
    }
}

impl Session {
    pub fn session_ref(&self) -> v1::SessionRef {
        v1::SessionRef {
            app: self.app.to_string(),
            user: self.user.to_string(),
            client_id: self.client_id.to_string(),
        }
    }

    pub fn in_flight(&self) -> usize {
        self.inflight.as_ref().map_or(0, |inflight| inflight.flights.len())
    }

    /// The next packet identifier that is not in use.
    pub fn take_packet_id(&mut self) -> u16 {
        loop {
            self.next_packet_id = self.next_packet_id.checked_add(1).unwrap_or(1);
            let id = self.next_packet_id;
            let used = self
                .inflight
                .as_ref()
                .is_some_and(|inflight| inflight.flights.iter().any(|f| f.packet_id == id));
            if !used {
                return id;
            }
        }
    }

    pub fn behind_on(&mut self, topic: &str) -> Option<&mut Behind> {
        self.behind.as_mut()?.iter_mut().find(|behind| *behind.topic == *topic)
    }
}

/// A connection in the words of the rest of the gateway.
pub fn conn_id(shard: usize, index: u32, generation: u32) -> ConnId {
    ConnId { shard: shard as u16, index, generation }
}
