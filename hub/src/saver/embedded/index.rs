//! What the embedded store knows without reading the disk: where every log stands, who subscribes to what, which
//! topics have a retained message. O(topics) + O(sessions); no payload is in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use carillon_proto::filter_tree::FilterTree;
use carillon_proto::{topic, v1};

use crate::saver::store::NEVER;

/// A topic's number in this store: dense, from 0, never given twice.
pub type TopicId = u32;
/// A session's number in this store: never given twice.
pub type SessionId = u64;

/// A topic's log, without its messages.
#[derive(Debug, Clone)]
pub struct Topic {
    pub name: Arc<str>,
    pub epoch: u64,
    /// seq of the last message appended.
    pub seq: u64,
    /// The same two as of the last commit: what readers may be told.
    pub committed: (u64, u64),
    /// Messages up to this seq are no longer readable …
    pub trimmed: u64,
    /// … and up to this one they are gone from the disk as well.
    pub deleted: u64,
    /// Messages, and their bytes, after `deleted`.
    pub count: u64,
    pub bytes: u64,
    /// Store-wide position of the first message ever appended here, and of the last.
    pub first_position: u64,
    pub last_position: u64,
    /// When the oldest readable message was appended, or earlier. Unix time, milliseconds.
    pub oldest_ms: u64,
    pub retention: v1::Retention,
    /// Its entry in `Index::ages`, 0 when it has none.
    pub age_due_ms: u64,
}

impl Topic {
    pub fn head(&self) -> v1::Head {
        v1::Head { epoch: self.committed.0, seq: self.committed.1, trimmed: self.trimmed, retained: false }
    }

    /// Is there something to read after this cursor?
    pub fn has_after(&self, after: u64) -> bool {
        self.seq > after.max(self.trimmed)
    }
}

/// One subscription of a kept session.
#[derive(Debug, Clone, PartialEq)]
pub struct Subscribed {
    pub subscription: v1::Subscription,
    /// Store-wide position at which it was made: messages with a greater one are for it.
    pub baseline: u64,
}

/// Where a session stands on one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub topic: TopicId,
    pub acked: u64,
    pub sent: u64,
}

/// A kept session.
#[derive(Debug, Clone)]
pub struct Session {
    /// See [`session_name`].
    pub name: Arc<str>,
    pub attachment: u64,
    pub gateway: String,
    pub incarnation: u64,
    pub open: bool,
    /// It was open when the store last ended. Any sign of life from its gateway opens it again.
    pub presumed_closed: bool,
    pub closed_ms: u64,
    pub expiry_seconds: u32,
    pub subscriptions: Vec<Subscribed>,
    /// Ordered by topic.
    pub cursors: Vec<Cursor>,
    /// What its last gateway left for its next one, which has not gone on from there yet.
    pub delivery: Option<Box<v1::DeliveryState>>,
    /// When the device that it was last opened for connected, by its gateway's clock, Unix milliseconds.
    pub connected_ms: u64,
}

impl Session {
    /// Unix time in milliseconds at which it is forgotten; 0 = not.
    pub fn expires_ms(&self) -> u64 {
        if self.open || self.expiry_seconds == NEVER {
            0
        } else {
            self.closed_ms + u64::from(self.expiry_seconds) * 1000
        }
    }

    pub fn cursor(&self, topic: TopicId) -> Option<&Cursor> {
        self.cursors.binary_search_by_key(&topic, |cursor| cursor.topic).ok().map(|at| &self.cursors[at])
    }

    /// The cursor, made at `acked` when there is none.
    pub fn cursor_entry(&mut self, topic: TopicId, acked: u64) -> &mut Cursor {
        let at = match self.cursors.binary_search_by_key(&topic, |cursor| cursor.topic) {
            Ok(at) => at,
            Err(at) => {
                self.cursors.insert(at, Cursor { topic, acked, sent: 0 });
                at
            }
        };
        &mut self.cursors[at]
    }

    /// Does one of its subscriptions with QoS ≥ 1 match?
    pub fn covers(&self, topic: &str) -> bool {
        self.subscriptions
            .iter()
            .any(|held| held.subscription.qos > 0 && topic::matches(&held.subscription.filter, topic))
    }
}

/// A session's key: app, user and client id, which hold no NUL.
pub fn session_name(session: &v1::SessionRef) -> String {
    // Not `format!`: this is done for each connect.
    [&*session.app, "\0", &*session.user, "\0", &*session.client_id].concat()
}

/// Is this topic the inbox of the session's user? `session` as [`session_name`] gives it.
pub fn is_inbox_of(topic_name: &str, session: &str) -> bool {
    let mut parts = session.split('\0');
    let (app, user) = (parts.next().unwrap_or_default(), parts.next());
    topic::app_of(topic_name) == app && user.is_some() && topic::inbox_user(topic_name) == user
}

#[derive(Debug, Default)]
pub struct Index {
    pub topics: Vec<Topic>,
    pub names: BTreeMap<Arc<str>, TopicId>,
    /// Position of the last append, over all topics.
    pub position: u64,
    /// By slot.
    pub epochs: Vec<u64>,
    pub sessions: HashMap<SessionId, Session>,
    pub session_ids: HashMap<Arc<str>, SessionId>,
    /// Who subscribes with QoS ≥ 1.
    pub subscribers: FilterTree<Vec<SessionId>>,
    /// Topics with a retained message, and when it expires (0: never).
    pub retained: BTreeMap<Arc<str>, u64>,
    /// When the oldest message of a log with an age limit is due.
    pub ages: BTreeSet<(u64, TopicId)>,
    /// When closed sessions expire.
    pub expiries: BTreeSet<(u64, SessionId)>,
    /// Topics with `deleted < trimmed`.
    pub undeleted: BTreeSet<TopicId>,
    pub last_attachment: u64,
    /// Sums over all topics.
    pub messages: u64,
    pub bytes: u64,
}

/// The part of a filter before its first wildcard: every topic that it matches begins with it.
pub fn literal_prefix(filter: &str) -> &str {
    let end = filter.find(['+', '#']).unwrap_or(filter.len());
    // "a/#" matches "a" too.
    filter[..end].strip_suffix('/').unwrap_or(&filter[..end])
}

/// The entries whose key `filter` matches, in the order of the keys.
pub fn matching<'a, T>(
    map: &'a BTreeMap<Arc<str>, T>,
    filter: &'a str,
) -> impl Iterator<Item = (&'a Arc<str>, &'a T)> + 'a {
    let prefix = literal_prefix(filter);
    map.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded))
        .take_while(move |(name, _)| name.starts_with(prefix))
        .filter(move |(name, _)| topic::matches(filter, name))
}

impl Index {
    pub fn new() -> Self {
        Index { epochs: vec![0; topic::SLOTS as usize], ..Index::default() }
    }

    pub fn topic(&self, name: &str) -> Option<TopicId> {
        self.names.get(name).copied()
    }

    pub fn at(&self, id: TopicId) -> &Topic {
        &self.topics[id as usize]
    }

    pub fn at_mut(&mut self, id: TopicId) -> &mut Topic {
        &mut self.topics[id as usize]
    }

    /// The topic's number, given now if it has none.
    pub fn intern(&mut self, name: &str) -> TopicId {
        if let Some(id) = self.topic(name) {
            return id;
        }
        let id = TopicId::try_from(self.topics.len()).expect("fewer than four thousand million topics");
        let name: Arc<str> = name.into();
        self.topics.push(Topic {
            name: name.clone(),
            epoch: 0,
            seq: 0,
            committed: (0, 0),
            trimmed: 0,
            deleted: 0,
            count: 0,
            bytes: 0,
            first_position: 0,
            last_position: 0,
            oldest_ms: 0,
            retention: v1::Retention::default(),
            age_due_ms: 0,
        });
        self.names.insert(name, id);
        id
    }

    /// Puts the topic in `ages` where it belongs now.
    pub fn schedule_age(&mut self, id: TopicId) {
        let topic = &mut self.topics[id as usize];
        let limit = topic.retention.max_age_seconds;
        let readable = topic.seq > topic.trimmed;
        let due = if limit == 0 || !readable {
            0
        } else {
            topic.oldest_ms.saturating_add(limit.saturating_mul(1000)).max(1)
        };
        let before = std::mem::replace(&mut topic.age_due_ms, due);
        if before != due {
            self.ages.remove(&(before, id));
            if due != 0 {
                self.ages.insert((due, id));
            }
        }
    }

    /// Moves `trimmed` up to `seq`; the messages are deleted later. Answers whether it moved.
    pub fn trim_to(&mut self, id: TopicId, seq: u64) -> bool {
        let topic = &mut self.topics[id as usize];
        let seq = seq.min(topic.seq);
        if seq <= topic.trimmed {
            return false;
        }
        topic.trimmed = seq;
        self.undeleted.insert(id);
        true
    }

    pub fn add_session(&mut self, id: SessionId, session: Session) {
        self.session_ids.insert(session.name.clone(), id);
        for held in &session.subscriptions {
            if held.subscription.qos > 0 {
                add_subscriber(&mut self.subscribers, &held.subscription.filter, id);
            }
        }
        let expires = session.expires_ms();
        if expires != 0 {
            self.expiries.insert((expires, id));
        }
        self.sessions.insert(id, session);
    }

    /// Takes the session out of every index.
    pub fn remove_session(&mut self, id: SessionId) -> Option<Session> {
        let session = self.sessions.remove(&id)?;
        self.session_ids.remove(&session.name);
        for held in &session.subscriptions {
            remove_subscriber(&mut self.subscribers, &held.subscription.filter, id);
        }
        self.expiries.remove(&(session.expires_ms(), id));
        Some(session)
    }

    /// Changes what decides when a session expires.
    pub fn change_session(&mut self, id: SessionId, change: impl FnOnce(&mut Session)) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let before = session.expires_ms();
        change(session);
        let after = session.expires_ms();
        if before != after {
            self.expiries.remove(&(before, id));
            if after != 0 {
                self.expiries.insert((after, id));
            }
        }
    }
}

pub fn add_subscriber(tree: &mut FilterTree<Vec<SessionId>>, filter: &str, id: SessionId) {
    let sessions = tree.entry(filter);
    if !sessions.contains(&id) {
        sessions.push(id);
    }
}

pub fn remove_subscriber(tree: &mut FilterTree<Vec<SessionId>>, filter: &str, id: SessionId) {
    if let Some(sessions) = tree.get_mut(filter) {
        sessions.retain(|&held| held != id);
        if sessions.is_empty() {
            tree.remove(filter);
        }
    }
}
