//! What a shard keeps for a connection. What an idle one does not need is not there: it is in a box that comes and goes.
#![allow(clippy::box_collection)] // a box is 8 bytes where an absent Vec is 24, and almost always it is absent

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use carillon_proto::v1;
use mio::net::TcpStream;
use smallvec::SmallVec;

use super::aliases::Aliases;
use super::guests::Guest;
use super::inflight::Inflight;
use super::layers::{Layers, first_phase};
use super::outbound::Outbound;
use super::publishing::Publishing;
use super::reached::Reached;
use super::timers::Tick;
use super::topics::{Hold, SubOptions, SubRef};
use crate::admission::SourceId;
use crate::auth::{Rights, Stamp};
use crate::codec::Version;
use crate::delivery::Delivery;
use crate::event::ConnId;
use crate::link::Member;
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
    /// Topic aliases that may be used towards the device.
    pub alias_maximum: u16,
    /// Topic aliases that the device may use: as its CONNACK said, whatever the configuration has become.
    pub alias_offered: u16,
    /// MQTT 5 Request Problem Information: reason strings may be sent.
    pub wants_problems: bool,
    pub will: Option<Box<Will>>,
    /// The CONNECT, until it is answered.
    pub opening: Option<Box<OpeningConnect>>,
    pub inflight: Option<Box<Inflight>>,
    pub publishing: Option<Box<Publishing>>,
    pub aliases: Option<Box<Aliases>>,
    pub behind: Option<Box<Vec<Behind>>>,
    pub waiting: Option<Box<VecDeque<Waiting>>>,
    /// The SUBSCRIBE under way; nothing is read meanwhile, so there is at most one.
    pub pending: Option<Box<PendingSubscribe>>,
    /// The reason codes of the UNSUBACK under way.
    pub unsubscribing: Option<Box<Vec<u8>>>,
    /// By topic: seq of the last stored message sent, for topics that only a filter with wildcards matches.
    pub wild_last: Option<Box<HashMap<Arc<str>, u64>>>,
    /// Of a kept session, if there is QoS 2.
    pub reached: Option<Box<Reached>>,
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
    /// By topic: up to here everything was sent on the session's last connection, and is finished or in flight.
    pub sent: Vec<v1::AckPosition>,
}

/// A topic on which the device has messages due that are to be read from the log.
pub struct Behind {
    pub topic: Arc<str>,
    /// seq up to which the log has been read.
    pub after: u64,
    /// seq up to which it must be read at least.
    pub target: u64,
    /// That, when the read under way was begun.
    pub asked: u64,
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
    /// The subscription to the topic name itself, if it has QoS 1 or 2: then it holds the cursor.
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
    Wanted {
        hold: Hold,
        options: SubOptions,
        identifier: u32,
    },
    /// A shared subscription.
    Share {
        member: Member,
        options: SubOptions,
        identifier: u32,
    },
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
        // Not `to_string`, which goes through formatting: this is done several times for each connect.
        v1::SessionRef {
            app: String::from(&*self.app),
            user: String::from(&*self.user),
            client_id: String::from(&*self.client_id),
        }
    }

    pub fn in_flight(&self) -> usize {
        self.inflight.as_ref().map_or(0, |inflight| inflight.flights.len())
    }

    /// Does the device take a packet of so many bytes (MQTT 5 Maximum Packet Size)?
    pub fn may_be_sent(&self, bytes: usize) -> bool {
        bytes <= self.max_packet_bytes as usize
    }

    /// What an earlier connection left in flight is not sent again yet.
    pub fn is_resending(&self) -> bool {
        self.inflight.as_ref().is_some_and(|inflight| inflight.resending.is_some())
    }

    /// The next packet identifier that is not in use.
    pub fn take_packet_id(&mut self) -> u16 {
        loop {
            self.next_packet_id = self.next_packet_id.checked_add(1).unwrap_or(1);
            let id = self.next_packet_id;
            if !self.inflight.as_ref().is_some_and(|inflight| inflight.uses(id)) {
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

#[cfg(test)]
mod tests {
    use super::super::timers;
    use super::super::topics::Sub;
    use super::*;

    /// The aim is 0.8 kB resident, with names, hash tables that are not full, and the allocator's classes.
    #[test]
    fn an_idle_connection_is_made_of_little() {
        let parts = [
            ("connection", size_of::<Option<Conn>>()),
            ("session", size_of::<Session>()),
            ("subscription, at its topic", size_of::<Sub>()),
            ("deadline", size_of::<timers::Entry>()),
            ("who holds the session", size_of::<(u128, (ConnId, u64))>()),
        ];
        let all: usize = parts.iter().map(|(_, bytes)| bytes).sum();
        assert!(all <= 600, "{parts:?}");
    }
}
