//! Shared subscriptions (MQTT 5.0 §4.8.2): this shard's members of shares. Which member gets which message is decided
//! where the share is at home (`link::shares`); here it is sent, or said that there is no room.
//!
//! Only connections that are members have anything here.

use std::collections::HashMap;
use std::sync::Arc;

use carillon_proto::{share, topic, v1};

use super::Shard;
use super::conn::{PendingEntry, Session, Target};
use super::guests::Who;
use super::topics::SubOptions;
use crate::codec::{QoS, reason};
use crate::delivery::Delivery;
use crate::event::{ConnId, Granted};
use crate::link::{Member, ShareMember, Wanted};

/// By connection.
pub type Memberships = HashMap<u32, Vec<Membership>>;

pub struct Membership {
    member: Member,
    share: Arc<str>,
    options: SubOptions,
    /// MQTT 5 subscription identifier; 0 = none.
    identifier: u32,
    state: State,
    /// A message was refused for want of room: none comes until we say that there is.
    is_busy: bool,
    /// Sent, and not acknowledged: packet identifier and token.
    flights: Vec<(u16, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its SUBSCRIBE is not answered yet.
    Joining,
    Live,
    /// It is unsubscribed; what was sent before is waited for (MQTT 5.0 §3.10.4).
    Leaving,
}

/// A filter as a device wrote it, made full, as [`Session::resolve`] does; that of a shared subscription becomes the name
/// of the share.
pub fn resolve<'a>(session: &'a Session, written: &str) -> Option<(String, bool, Who<'a>)> {
    match share::parse(written) {
        None => session.resolve(written),
        Some((name, filter)) => {
            let (full, relative, who) = session.resolve(filter)?;
            Some((share::key(name, &full), relative, who))
        }
    }
}

impl Shard {
    fn membership(&mut self, index: u32, member: Member) -> Option<&mut Membership> {
        self.memberships.get_mut(&index)?.iter_mut().find(|membership| membership.member == member)
    }

    /// Shared subscriptions of a connection.
    pub(super) fn shares_of(&self, index: u32) -> usize {
        if self.memberships.is_empty() {
            return 0;
        }
        let held = self.memberships.get(&index).into_iter().flatten();
        held.filter(|membership| membership.state != State::Leaving).count()
    }

    /// Those of them with a wildcard.
    pub(super) fn wild_shares_of(&self, index: u32) -> usize {
        if self.memberships.is_empty() {
            return 0;
        }
        let held = self.memberships.get(&index).into_iter().flatten();
        let is_wild = |membership: &&Membership| topic::is_wildcard(&membership.share);
        held.filter(|membership| membership.state != State::Leaving).filter(is_wild).count()
    }

    pub(super) fn is_in_share(&self, index: u32, share: &str) -> bool {
        let mut held = self.memberships.get(&index).into_iter().flatten();
        held.any(|membership| *membership.share == *share && membership.state != State::Leaving)
    }

    /// As `want`, for a shared subscription. Retained messages are not sent (§4.8.2).
    pub(super) fn want_share(
        &mut self,
        index: u32,
        share: &str,
        options: SubOptions,
        identifier: u32,
        wanted: &mut Vec<Wanted>,
    ) -> PendingEntry {
        // Who does not finish a message of QoS 2 must get it again, and nobody else may (§4.8.2): a share is for the work
        // to be done, whoever does it.
        let options = SubOptions { qos: options.qos.min(1), ..options };
        let (window, expiry_seconds) = match &self.conns[index as usize].session {
            Some(session) => (session.window, kept_seconds(session)),
            None => (1, 0),
        };
        let held = self.memberships.entry(index).or_default();
        let existing = held.iter().find(|membership| *membership.share == *share);
        let existed = existing.is_some_and(|membership| membership.state != State::Leaving);
        let is_new = existing.is_none();
        let (member, name) = match existing {
            Some(existing) => (existing.member, existing.share.clone()),
            None => {
                let (member, share): (Member, Arc<str>) = (self.link.next_member(), share.into());
                held.push(Membership {
                    member,
                    share: share.clone(),
                    options,
                    identifier,
                    state: State::Joining,
                    is_busy: false,
                    flights: Vec::new(),
                });
                (member, share)
            }
        };
        let subscription = v1::Subscription {
            filter: share.to_owned(),
            qos: options.qos.into(),
            no_local: false,
            retain_as_published: options.retain_as_published,
            identifier,
            relative: options.relative,
        };
        let share = Some(ShareMember { member, is_new, window, expiry_seconds });
        wanted.push(Wanted { filter: name, subscription, retain_handling: 2, existed, is_own: true, share });
        PendingEntry::Share { member, options, identifier }
    }

    /// The SUBSCRIBE of a shared subscription has come out; gives its reason code.
    pub(super) fn share_joined(
        &mut self,
        index: u32,
        (member, options, identifier): (Member, SubOptions, u32),
        outcome: Result<Granted, u8>,
    ) -> u8 {
        let Some(membership) = self.membership(index, member) else { return reason::UNSPECIFIED_ERROR };
        if let Err(code) = outcome {
            if membership.state == State::Joining {
                self.end_membership(index, member, 0);
            }
            return code;
        }
        let was = std::mem::replace(&mut membership.state, State::Live);
        (membership.options, membership.identifier) = (options, identifier);
        if was != State::Live {
            self.link.metrics().subscriptions.inc();
        }
        // What came before the SUBSCRIBE was answered was sent back.
        self.members_have_room(index);
        options.qos
    }

    /// A message of a share for this connection.
    pub(super) fn assigned(&mut self, id: ConnId, member: Member, token: u64, delivery: &Arc<Delivery>) {
        // A connection that has gone has left its shares.
        let Some(index) = self.find(id) else { return };
        let has_room = self.has_room(index);
        let now_ms = self.now_ms;
        let Some(membership) = self.membership(index, member) else { return };
        if membership.state != State::Live || membership.is_busy || !has_room {
            membership.is_busy = true;
            return self.link.share_busy(member, token);
        }
        if delivery.is_expired(now_ms) {
            self.counts.dropped_expired += 1;
            return self.link.share_done(member, token);
        }
        let mut target = Target { options: membership.options, ..Target::default() };
        if membership.identifier != 0 {
            target.identifiers.push(membership.identifier);
        }
        if delivery.message.qos.min(target.options.qos.into()) == 0 {
            self.send_qos0(index, &target, delivery, false);
            return self.link.share_done(member, token);
        }
        if !self.send_acked(index, &target, delivery, QoS::AtLeastOnce, false, false, None) {
            // Larger than the device takes: as if it had been acked (MQTT 5.0 §3.1.2.11.4).
            return self.link.share_done(member, token);
        }
        let packet_id =
            self.conns[index as usize].session.as_ref().map_or(0, |session| session.next_packet_id);
        if let Some(membership) = self.membership(index, member) {
            membership.flights.push((packet_id, token));
        }
    }

    /// The device is done with a packet, which may have been of a share.
    pub(super) fn share_acked(&mut self, index: u32, packet_id: u16) {
        if self.memberships.is_empty() {
            return;
        }
        let held = self.memberships.get_mut(&index).into_iter().flatten();
        let mut ended = None;
        for membership in held {
            let flight = membership.flights.iter().position(|(id, _)| *id == packet_id);
            if let Some(flight) = flight {
                let (_, token) = membership.flights.remove(flight);
                self.link.share_done(membership.member, token);
                if membership.state == State::Leaving && membership.flights.is_empty() {
                    ended = Some(membership.member);
                }
                break;
            }
        }
        if let Some(member) = ended {
            self.end_membership(index, member, 0);
        }
    }

    /// Says of members that refused a message that they would take one now.
    pub(super) fn members_have_room(&mut self, index: u32) {
        if self.memberships.is_empty() || !self.memberships.contains_key(&index) || !self.has_room(index) {
            return;
        }
        for membership in self.memberships.get_mut(&index).into_iter().flatten() {
            if membership.state == State::Live && std::mem::take(&mut membership.is_busy) {
                self.link.share_ready(membership.member);
            }
        }
    }

    /// As [`members_have_room`](Self::members_have_room), for all: where a queue went out in the round in which it was full.
    pub(super) fn look_for_room(&mut self) {
        let busy = |held: &Vec<Membership>| held.iter().any(|membership| membership.is_busy);
        let busy: Vec<u32> =
            self.memberships.iter().filter(|(_, held)| busy(held)).map(|(&index, _)| index).collect();
        for index in busy {
            self.members_have_room(index);
        }
    }

    /// UNSUBSCRIBE. False: there was no such subscription.
    pub(super) fn unsubscribe_share(&mut self, index: u32, share: &str) -> bool {
        if !self.is_in_share(index, share) {
            return false;
        }
        let held = self.memberships.get_mut(&index).into_iter().flatten();
        let mut ended = None;
        for membership in held.filter(|membership| *membership.share == *share) {
            membership.state = State::Leaving;
            if membership.flights.is_empty() {
                ended = Some(membership.member);
            }
        }
        self.link.metrics().subscriptions.dec();
        if let Some(member) = ended {
            self.end_membership(index, member, 0);
        }
        true
    }

    fn end_membership(&mut self, index: u32, member: Member, kept_seconds: u32) {
        let Some(held) = self.memberships.get_mut(&index) else { return };
        held.retain(|membership| membership.member != member);
        if held.is_empty() {
            self.memberships.remove(&index);
        }
        self.link.leave_share(member, kept_seconds);
    }

    /// The connection ends: what it has not acknowledged is for others.
    pub(super) fn leave_shares(&mut self, index: u32, session: &Session) {
        if self.memberships.is_empty() {
            return;
        }
        let kept = kept_seconds(session);
        for membership in self.memberships.remove(&index).unwrap_or_default() {
            let kept = if membership.state == State::Live { kept } else { 0 };
            if membership.state == State::Live {
                self.link.metrics().subscriptions.dec();
            }
            self.link.leave_share(membership.member, kept);
        }
    }
}

/// How long the session goes on without its connection.
fn kept_seconds(session: &Session) -> u32 {
    if session.attachment.is_some() { session.expiry_seconds } else { 0 }
}
