//! Where a session stands on a topic: its cursor there, if it has one; and the trimming of inboxes by what was acknowledged.
//!
//! Before its first acknowledgement on a topic a session may have no cursor there; then it stands at the last message that was
//! appended before the subscription was made, which the subscription's baseline tells: a position in the order of all
//! appends of the store.

use std::collections::BTreeSet;

use carillon_proto::topic;

use super::disk::DiskError;
use super::index::{self, SessionId, Subscribed, TopicId};
use super::plan::Planner;
use super::sessions::is_inbox;
use crate::saver::store::StoreResult;

impl Planner<'_> {
    /// seq of the last message on the topic that the session is done with.
    pub fn standing(&self, id: SessionId, topic: TopicId) -> Result<u64, DiskError> {
        let Some(session) = self.index.sessions.get(&id) else { return Ok(0) };
        if let Some(cursor) = session.cursor(topic) {
            return Ok(cursor.acked);
        }
        let name = &self.index.at(topic).name;
        let baseline = session
            .subscriptions
            .iter()
            .filter(|held| held.subscription.qos > 0 && topic::matches(&held.subscription.filter, name))
            .map(|held| held.baseline)
            .min();
        match baseline {
            Some(baseline) => self.seq_at(topic, baseline),
            None => Ok(start(self.index, topic)),
        }
    }

    /// seq of the last message of the log with at most this store-wide position; `trimmed` when it is gone.
    fn seq_at(&self, id: TopicId, position: u64) -> Result<u64, DiskError> {
        let topic = self.index.at(id);
        if topic.last_position <= position {
            return Ok(topic.seq);
        }
        if topic.first_position > position {
            return Ok(topic.trimmed);
        }
        let pending = self.pending.log.range((id, 0)..=(id, u64::MAX));
        if let Some((&(_, seq), _)) = pending.rev().find(|(_, (at, _))| *at <= position) {
            return Ok(seq.max(topic.trimmed));
        }
        // Positions grow with seqs: halve the range of seqs until the record is found.
        let (mut low, mut high) = (topic.trimmed, topic.seq);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.disk.records(id, middle, topic.seq).next().transpose()? {
                Some(record) if record.position <= position => low = record.seq,
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// Moves the cursor forward, if the session is to acknowledge messages of this topic. Answers what it has acked now.
    pub fn advance(&mut self, id: SessionId, topic: TopicId, acked: u64, sent: u64) -> StoreResult<u64> {
        let Some(session) = self.index.sessions.get(&id) else { return Ok(acked) };
        if session.cursor(topic).is_none() {
            if !session.covers(&self.index.at(topic).name) {
                return Ok(acked);
            }
            let standing = self.standing(id, topic)?;
            return Ok(self.move_cursor(id, topic, standing.max(acked), sent));
        }
        Ok(self.move_cursor(id, topic, acked, sent))
    }

    /// Moves the cursor forward, making it if there is none. Answers what is acked now.
    pub fn move_cursor(&mut self, id: SessionId, topic: TopicId, acked: u64, sent: u64) -> u64 {
        let Some(session) = self.index.sessions.get_mut(&id) else { return acked };
        let known = session.cursor(topic).is_some();
        let cursor = session.cursor_entry(topic, acked);
        if !known || acked > cursor.acked || sent > cursor.sent {
            cursor.acked = cursor.acked.max(acked);
            cursor.sent = cursor.sent.max(sent);
            self.pending.cursors.insert((id, topic));
        }
        cursor.acked
    }

    /// Makes the cursors that the session stands at without having them, on topics of this filter: before its
    /// subscriptions change, so that what another of them is owed stays as it is.
    pub fn pin_cursors(&mut self, id: SessionId, filter: &str) -> StoreResult<()> {
        let Some(session) = self.index.sessions.get(&id) else { return Ok(()) };
        let others = |held: &Subscribed| held.subscription.qos > 0 && held.subscription.filter != filter;
        if !session.subscriptions.iter().any(others) {
            return Ok(());
        }
        let unpinned: Vec<TopicId> = index::matching(&self.index.names, filter)
            .filter(|(name, topic)| session.cursor(**topic).is_none() && session.covers(name))
            .map(|(_, &topic)| topic)
            .collect();
        for topic in unpinned {
            let standing = self.standing(id, topic)?;
            self.move_cursor(id, topic, standing, 0);
        }
        Ok(())
    }

    /// Removes the cursors on topics of this filter that no other subscription covers.
    pub fn drop_cursors(&mut self, id: SessionId, filter: &str) -> StoreResult<()> {
        let Some(session) = self.index.sessions.get(&id) else { return Ok(()) };
        let dropped: Vec<TopicId> = session
            .cursors
            .iter()
            .map(|cursor| cursor.topic)
            .filter(|&topic| {
                let name = &self.index.at(topic).name;
                topic::matches(filter, name) && !session.covers(name)
            })
            .collect();
        let gone: BTreeSet<TopicId> = dropped.iter().copied().collect();
        if let Some(session) = self.index.sessions.get_mut(&id) {
            session.cursors.retain(|cursor| !gone.contains(&cursor.topic));
        }
        for topic in dropped {
            self.pending.cursors.insert((id, topic));
        }
        for topic in self.held_back(filter) {
            self.consume(topic, None)?;
        }
        Ok(())
    }

    /// Inboxes of this filter that hold messages: a subscription to it may be why.
    pub fn held_back(&self, filter: &str) -> Vec<TopicId> {
        let holds = |id: &TopicId| {
            let topic = self.index.at(*id);
            topic.retention.consumed && topic.seq > topic.trimmed
        };
        index::matching(&self.index.names, filter).map(|(_, &id)| id).filter(holds).collect()
    }

    /// Trims an inbox to what every session kept for it has acked, and `acked`, if its user did just now. Without a session
    /// of its user nothing has been consumed.
    pub fn consume(&mut self, id: TopicId, acked: Option<u64>) -> StoreResult<()> {
        let topic = self.index.at(id);
        if !topic.retention.consumed || acked.is_some_and(|acked| acked <= topic.trimmed) {
            return Ok(());
        }
        let (name, trimmed) = (topic.name.clone(), topic.trimmed);
        let mut sessions = BTreeSet::new();
        self.index.subscribers.matching(&name, |ids| sessions.extend(ids.iter().copied()));
        let is_own = |session: &SessionId| {
            self.index.sessions.get(session).is_some_and(|session| index::is_inbox_of(&name, &session.name))
        };
        if acked.is_none() && !sessions.iter().any(is_own) {
            return Ok(());
        }
        let mut consumed = acked;
        for session in sessions {
            let standing = self.standing(session, id)?;
            consumed = Some(consumed.map_or(standing, |consumed| consumed.min(standing)));
            if consumed <= Some(trimmed) {
                return Ok(());
            }
        }
        if let Some(consumed) = consumed
            && self.index.trim_to(id, consumed)
        {
            self.pending.topics.insert(id);
            self.index.schedule_age(id);
        }
        Ok(())
    }
}

/// Where a new subscription to exactly this topic begins.
pub fn start(index: &index::Index, id: TopicId) -> u64 {
    let topic = index.at(id);
    if is_inbox(&topic.name) { topic.trimmed } else { topic.seq }
}
