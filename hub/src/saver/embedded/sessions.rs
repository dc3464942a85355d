//! Kept sessions: opening, subscribing, acknowledging, closing.

use std::collections::BTreeSet;

use carillon_proto::{topic, v1};

use super::cursors::start;
use super::index::{
    self, Session, SessionId, Subscribed, TopicId, add_subscriber, remove_subscriber, session_name,
};
use super::plan::Planner;
use crate::saver::store::{
    MAX_BACKLOG_BYTES, MAX_CLIENT_ID_BYTES, MAX_SUBSCRIPTIONS, StoreError, StoreResult,
};

fn invalid(text: impl Into<String>) -> StoreError {
    StoreError::Invalid(text.into())
}

/// Is this filter exactly one user's inbox?
pub fn is_inbox(filter: &str) -> bool {
    topic::inbox_user(filter).is_some() && !topic::is_wildcard(filter)
}

pub fn check_filter(filter: &str) -> StoreResult<()> {
    topic::check_filter(filter).map_err(|error| invalid(format!("filter {filter:?} {error}")))
}

pub fn name_of(session: Option<&v1::SessionRef>) -> StoreResult<String> {
    let session = session.ok_or_else(|| invalid("no session is named"))?;
    topic::check_app(&session.app).map_err(|error| invalid(format!("app {:?} {error}", session.app)))?;
    if session.user.contains('\0') || session.client_id.contains('\0') {
        return Err(invalid("a session's user or client id contains a NUL"));
    }
    if session.user.len() > topic::MAX_USER_BYTES || session.client_id.len() > MAX_CLIENT_ID_BYTES {
        return Err(invalid("a session's user or client id is too long"));
    }
    Ok(session_name(session))
}

impl Planner<'_> {
    pub fn open_session(&mut self, open: v1::OpenSession) -> StoreResult<v1::SessionOpened> {
        let name = name_of(open.session.as_ref())?;
        let mut kept = self.index.session_ids.get(name.as_str()).copied();
        if let Some(id) = kept {
            let expires = self.index.sessions.get(&id).map_or(0, Session::expires_ms);
            let connected_ms = self.index.sessions.get(&id).map_or(0, |session| session.connected_ms);
            let is_late = open.connected_ms != 0 && connected_ms > open.connected_ms;
            if open.expiry_seconds == 0 && is_late {
                return Err(StoreError::SessionMoved);
            }
            let expired = expires != 0 && expires <= self.now_ms;
            if expired || open.clean_start || open.expiry_seconds == 0 {
                self.forget_session(id)?;
                kept = None;
            }
        }
        if open.expiry_seconds == 0 {
            return Ok(v1::SessionOpened::default());
        }
        self.index.last_attachment += 1;
        self.pending.attachment = true;
        let attachment = self.index.last_attachment;
        let attach = |session: &mut Session| {
            session.attachment = attachment;
            session.gateway = open.gateway.clone();
            session.incarnation = open.incarnation;
            session.open = true;
            session.presumed_closed = false;
            session.expiry_seconds = open.expiry_seconds;
            session.connected_ms = open.connected_ms;
            session.delivery.clone()
        };
        let id = kept.unwrap_or(attachment);
        let mut delivery = None;
        if kept.is_some() {
            self.index.change_session(id, |session| delivery = attach(session));
        } else {
            let mut session = Session {
                name: name.into(),
                attachment,
                gateway: String::new(),
                incarnation: 0,
                open: true,
                presumed_closed: false,
                closed_ms: 0,
                expiry_seconds: 0,
                subscriptions: Vec::new(),
                cursors: Vec::new(),
                delivery: None,
                connected_ms: 0,
            };
            attach(&mut session);
            self.index.add_session(id, session);
        }
        self.pending.sessions.insert(id);
        let subscriptions = self.subscriptions(id).into_iter().map(|held| held.subscription).collect();
        let backlog = self.backlog(id, None)?;
        Ok(v1::SessionOpened {
            present: kept.is_some(),
            attachment,
            subscriptions,
            backlog,
            kept: true,
            delivery: delivery.map(|delivery| *delivery),
        })
    }

    pub fn subscribe(&mut self, subscribe: v1::Subscribe) -> StoreResult<Vec<v1::SubscribedOne>> {
        for subscription in &subscribe.subscriptions {
            check_filter(&subscription.filter)?;
        }
        let id = self.attached(subscribe.session.as_ref(), subscribe.attachment)?;
        let held = self.index.sessions.get(&id).map_or(0, |session| session.subscriptions.len());
        if held + subscribe.subscriptions.len() > MAX_SUBSCRIPTIONS {
            return Err(invalid(format!("more than {MAX_SUBSCRIPTIONS} subscriptions of one session")));
        }
        let mut results = Vec::with_capacity(subscribe.subscriptions.len());
        for subscription in subscribe.subscriptions {
            results.push(self.subscribe_one(id, subscription)?);
        }
        self.pending.sessions.insert(id);
        Ok(results)
    }

    fn subscribe_one(
        &mut self,
        id: SessionId,
        subscription: v1::Subscription,
    ) -> StoreResult<v1::SubscribedOne> {
        let filter = subscription.filter.clone();
        let exact = !topic::is_wildcard(&filter);
        // An inbox begins at its beginning: what nobody has consumed is waiting.
        let baseline = if is_inbox(&filter) { 0 } else { self.index.position };
        if is_inbox(&filter) || subscription.qos == 0 {
            self.pin_cursors(id, &filter)?;
        }
        let (existed, was_acked) = {
            let Some(session) = self.index.sessions.get_mut(&id) else {
                return Err(StoreError::SessionMoved);
            };
            match session.subscriptions.iter_mut().find(|held| held.subscription.filter == filter) {
                Some(held) => {
                    let was_acked = held.subscription.qos > 0;
                    // With QoS 0 nothing was acknowledged and nothing is owed: with QoS 1 it begins now.
                    if !was_acked {
                        held.baseline = baseline;
                    }
                    held.subscription = subscription.clone();
                    (true, was_acked)
                }
                None => {
                    session.subscriptions.push(Subscribed { subscription: subscription.clone(), baseline });
                    (false, false)
                }
            }
        };
        if subscription.qos > 0 {
            add_subscriber(&mut self.index.subscribers, &filter, id);
        } else {
            remove_subscriber(&mut self.index.subscribers, &filter, id);
            if was_acked {
                self.drop_cursors(id, &filter)?;
            }
        }
        if !exact {
            let positions =
                if existed && subscription.qos > 0 { self.backlog(id, Some(&filter))? } else { Vec::new() };
            return Ok(v1::SubscribedOne { existed, positions });
        }
        let Some(topic) = self.index.topic(&filter) else {
            let position = v1::Backlog { topic: filter, after: 0, sent: 0, head: 0 };
            return Ok(v1::SubscribedOne { existed, positions: vec![position] });
        };
        let (after, sent) = if subscription.qos > 0 {
            let after = self.standing(id, topic)?;
            self.move_cursor(id, topic, after, 0);
            let sent =
                self.index.sessions.get(&id).and_then(|session| session.cursor(topic)).map_or(0, |c| c.sent);
            (after, sent)
        } else {
            (start(self.index, topic), 0)
        };
        let at = self.index.at(topic);
        let position = v1::Backlog { topic: filter, after: after.max(at.trimmed), sent, head: at.seq };
        Ok(v1::SubscribedOne { existed, positions: vec![position] })
    }

    pub fn unsubscribe(&mut self, unsubscribe: v1::Unsubscribe) -> StoreResult<()> {
        let id = self.attached(unsubscribe.session.as_ref(), unsubscribe.attachment)?;
        for filter in &unsubscribe.filters {
            self.pin_cursors(id, filter)?;
            let Some(session) = self.index.sessions.get_mut(&id) else { continue };
            let before = session.subscriptions.len();
            session.subscriptions.retain(|held| held.subscription.filter != *filter);
            if session.subscriptions.len() < before {
                remove_subscriber(&mut self.index.subscribers, filter, id);
                self.pending.sessions.insert(id);
                self.drop_cursors(id, filter)?;
            }
        }
        Ok(())
    }

    pub fn ack(&mut self, ack: v1::Ack) -> StoreResult<()> {
        let id = match ack.attachment {
            0 => None,
            attachment => Some(self.attached(ack.session.as_ref(), attachment)?),
        };
        if let Some(id) = id
            && !ack.positions.is_empty()
            && self.index.sessions.get(&id).is_some_and(|session| session.delivery.is_some())
        {
            // Messages were sent and acknowledged since: what was in flight before is not what is now.
            self.index.change_session(id, |session| session.delivery = None);
            self.pending.sessions.insert(id);
        }
        self.metrics.acks.inc_by(ack.positions.len() as u64);
        for v1::AckPosition { topic, seq } in ack.positions {
            let Some(topic) = self.index.topic(&topic) else { continue };
            let mut acked = seq.min(self.index.at(topic).seq);
            if let Some(id) = id {
                acked = self.advance(id, topic, acked, 0)?;
            }
            if self.index.at(topic).retention.consumed {
                // Somebody else who reads an inbox (with the right to) does not empty it.
                let is_owner = ack.session.as_ref().is_some_and(|session| {
                    index::is_inbox_of(&self.index.at(topic).name, &index::session_name(session))
                });
                if is_owner || id.is_some() {
                    self.consume(topic, is_owner.then_some(acked))?;
                }
            }
        }
        Ok(())
    }

    pub fn close_session(&mut self, close: v1::CloseSession) -> StoreResult<()> {
        let id = self.attached(close.session.as_ref(), close.attachment)?;
        if close.expiry_seconds == 0 {
            self.forget_session(id)?;
            return Ok(());
        }
        for v1::AckPosition { topic, seq } in close.sent {
            if let Some(topic) = self.index.topic(&topic) {
                let sent = seq.min(self.index.at(topic).seq);
                self.advance(id, topic, 0, sent)?;
            }
        }
        let now_ms = self.now_ms;
        self.index.change_session(id, |session| {
            session.open = false;
            session.presumed_closed = false;
            session.closed_ms = now_ms;
            session.expiry_seconds = close.expiry_seconds;
            session.delivery = close.delivery.map(Box::new);
        });
        self.pending.sessions.insert(id);
        Ok(())
    }

    pub fn close_attached(&mut self, gateway: &str, below: u64) -> u64 {
        let gone = |session: &Session| {
            let attached = session.open || session.presumed_closed;
            attached && session.gateway == gateway && session.incarnation < below
        };
        let ids: Vec<SessionId> =
            self.index.sessions.iter().filter(|(_, session)| gone(session)).map(|(&id, _)| id).collect();
        let now_ms = self.now_ms;
        for &id in &ids {
            self.index.change_session(id, |session| {
                if session.open {
                    session.closed_ms = now_ms;
                }
                session.open = false;
                session.presumed_closed = false;
            });
            self.pending.sessions.insert(id);
        }
        ids.len() as u64
    }

    /// Forgets sessions whose time has come, at most `most`. Answers how many.
    pub fn forget_expired(&mut self, now_ms: u64, most: usize) -> StoreResult<u64> {
        let mut forgotten = 0;
        while let Some(&(expires, id)) = self.index.expiries.first()
            && expires <= now_ms
            && forgotten < most
        {
            self.forget_session(id)?;
            forgotten += 1;
        }
        self.metrics.expired_sessions.inc_by(forgotten as u64);
        Ok(forgotten as u64)
    }

    /// The session, if it still is the caller's.
    pub fn attached(&mut self, session: Option<&v1::SessionRef>, attachment: u64) -> StoreResult<SessionId> {
        let name = name_of(session)?;
        let id = *self.index.session_ids.get(name.as_str()).ok_or(StoreError::SessionMoved)?;
        let session = self.index.sessions.get(&id).ok_or(StoreError::SessionMoved)?;
        if session.attachment != attachment {
            return Err(StoreError::SessionMoved);
        }
        if session.presumed_closed {
            // The store was away, the gateway was not.
            self.index.change_session(id, |session| {
                session.open = true;
                session.presumed_closed = false;
            });
            self.pending.sessions.insert(id);
        }
        // The gateway goes on from what it was told. From now on the device may release its identifiers and use them for
        // other messages, of which nobody hears here: a message that an old one stood for would be lost.
        if session_has_received(self.index.sessions.get(&id)) {
            self.index.change_session(id, |session| {
                session.delivery.iter_mut().for_each(|delivery| delivery.received.clear());
            });
            self.pending.sessions.insert(id);
        }
        Ok(id)
    }

    /// The session's subscriptions, by filter.
    fn subscriptions(&self, id: SessionId) -> Vec<Subscribed> {
        self.index.sessions.get(&id).map(|session| session.subscriptions.clone()).unwrap_or_default()
    }

    /// Topics with messages that the session has yet to acknowledge: of one filter, or of all with QoS ≥ 1.
    fn backlog(&mut self, id: SessionId, only: Option<&str>) -> StoreResult<Vec<v1::Backlog>> {
        let mut topics = BTreeSet::new();
        let Some(session) = self.index.sessions.get(&id) else { return Ok(Vec::new()) };
        for held in &session.subscriptions {
            let filter = held.subscription.filter.as_str();
            if held.subscription.qos == 0 || only.is_some_and(|only| only != filter) {
                continue;
            }
            if !topic::is_wildcard(filter) {
                topics.extend(self.index.topic(filter));
                continue;
            }
            for (_, &topic) in index::matching(&self.index.names, filter) {
                let news = self.index.at(topic).last_position > held.baseline;
                if news || session.cursor(topic).is_some() {
                    topics.insert(topic);
                }
            }
        }
        let mut backlog = Vec::new();
        let mut bytes = 0;
        for topic in topics {
            let after = self.standing(id, topic)?;
            let at = self.index.at(topic);
            if !at.has_after(after) {
                continue;
            }
            bytes += at.name.len() + 32;
            if bytes > MAX_BACKLOG_BYTES {
                tracing::warn!("a session has a backlog on more topics than one answer holds");
                break;
            }
            let (name, head, after) = (at.name.to_string(), at.seq, after.max(at.trimmed));
            // Found once: the cursor keeps it.
            self.move_cursor(id, topic, after, 0);
            let cursor = self.index.sessions.get(&id).and_then(|session| session.cursor(topic));
            backlog.push(v1::Backlog { topic: name, after, sent: cursor.map_or(0, |c| c.sent), head });
        }
        Ok(backlog)
    }

    fn forget_session(&mut self, id: SessionId) -> StoreResult<()> {
        let Some(session) = self.index.remove_session(id) else { return Ok(()) };
        self.pending.sessions.insert(id);
        let mut released: BTreeSet<TopicId> = BTreeSet::new();
        for cursor in session.cursors {
            self.pending.cursors.insert((id, cursor.topic));
            released.insert(cursor.topic);
        }
        for held in &session.subscriptions {
            released.extend(self.held_back(&held.subscription.filter));
        }
        for topic in released {
            self.consume(topic, None)?;
        }
        Ok(())
    }
}

fn session_has_received(session: Option<&Session>) -> bool {
    let delivery = session.and_then(|session| session.delivery.as_ref());
    delivery.is_some_and(|delivery| !delivery.received.is_empty())
}
