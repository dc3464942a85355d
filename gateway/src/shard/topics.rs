//! Who of this shard's connections subscribes to what: a list of subscribers for each topic name or filter.

use std::collections::HashMap;
use std::sync::Arc;

use carillon_proto::filter_tree::FilterTree;
use carillon_proto::topic;
use slab::Slab;
use smallvec::SmallVec;

use super::passed::{Passed, TooMany};

/// Index of a topic name or filter in [`Topics`].
pub type TopicId = u32;

/// One connection's subscription. 24 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sub {
    pub conn: u32,
    /// MQTT 5 subscription identifier; 0 = none.
    pub identifier: u32,
    /// With QoS >= 1 on a topic name: seq of the last stored message sent. What is after it is due.
    pub last: u64,
    pub options: SubOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SubOptions {
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    /// The device leaves out its app's level.
    pub relative: bool,
}

/// Where a connection's subscription is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubRef {
    pub topic: TopicId,
    pub position: u32,
}

/// Keeps a topic here from when it was taken, with what comes by on it, until [`Topics::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    pub topic: TopicId,
    /// Of a filter: see [`Passed`].
    since: u64,
}

#[derive(Debug)]
pub struct Topic {
    pub name: Arc<str>,
    pub subs: SmallVec<[Sub; 1]>,
    /// For SUBSCRIBEs under way that will add to it, and for sessions that are parked.
    holds: u32,
    /// Of a filter, while it is held.
    passed: Option<Box<Passed>>,
}

impl Topic {
    pub fn is_wild(&self) -> bool {
        topic::is_wildcard(&self.name)
    }
}

#[derive(Default)]
pub struct Topics {
    index: HashMap<Arc<str>, TopicId>,
    topics: Slab<Topic>,
    wild: FilterTree<TopicId>,
}

/// A subscriber was moved to another place in its list: its connection's reference is to be set to this.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    pub conn: u32,
    pub topic: TopicId,
    pub from: u32,
    pub to: u32,
}

impl Topics {
    pub fn find(&self, filter: &str) -> Option<TopicId> {
        self.index.get(filter).copied()
    }

    pub fn get(&self, id: TopicId) -> &Topic {
        &self.topics[id as usize]
    }

    pub fn get_mut(&mut self, id: TopicId) -> &mut Topic {
        &mut self.topics[id as usize]
    }

    /// Makes sure that the topic is there and stays until [`release`](Self::release).
    pub fn hold(&mut self, filter: &str) -> (Hold, Arc<str>) {
        let id = match self.index.get(filter) {
            Some(&id) => id,
            None => {
                let name: Arc<str> = filter.into();
                let id = self.topics.insert(Topic {
                    name: name.clone(),
                    subs: SmallVec::new(),
                    holds: 0,
                    passed: None,
                }) as TopicId;
                if topic::is_wildcard(filter) {
                    self.wild.insert(filter, id);
                }
                self.index.insert(name, id);
                id
            }
        };
        let topic = &mut self.topics[id as usize];
        topic.holds += 1;
        let since = if topic.is_wild() { topic.passed.get_or_insert_default().begin() } else { 0 };
        (Hold { topic: id, since }, topic.name.clone())
    }

    /// Some(name): nobody is interested any more, the topic is gone.
    pub fn release(&mut self, hold: Hold) -> Option<Arc<str>> {
        let topic = &mut self.topics[hold.topic as usize];
        topic.holds -= 1;
        if let Some(passed) = &mut topic.passed {
            passed.end(hold.since);
            if passed.is_empty() {
                topic.passed = None;
            }
        }
        self.remove_if_unused(hold.topic)
    }

    /// A stored message came by on a filter: who is about to subscribe to it must not miss it.
    pub fn note_passed(&mut self, id: TopicId, name: &Arc<str>, prev: u64, seq: u64) {
        if let Some(passed) = &mut self.topics[id as usize].passed {
            passed.note(name, prev, seq);
        }
    }

    /// What has been noted since then: by topic, `prev` of the first, seq of the last.
    pub fn passed_since(&self, hold: Hold) -> Result<HashMap<Arc<str>, (u64, u64)>, TooMany> {
        match &self.topics[hold.topic as usize].passed {
            Some(passed) => passed.since(hold.since),
            None => Ok(HashMap::new()),
        }
    }

    pub fn subscribe(&mut self, id: TopicId, sub: Sub) -> SubRef {
        let topic = &mut self.topics[id as usize];
        topic.subs.push(sub);
        SubRef { topic: id, position: topic.subs.len() as u32 - 1 }
    }

    /// Removes one subscription. The last of the list takes its place.
    pub fn unsubscribe(&mut self, sub: SubRef) -> (Option<Moved>, Option<Arc<str>>) {
        let topic = &mut self.topics[sub.topic as usize];
        let from = topic.subs.len() as u32 - 1;
        topic.subs.swap_remove(sub.position as usize);
        let moved = (from != sub.position).then(|| Moved {
            conn: topic.subs[sub.position as usize].conn,
            topic: sub.topic,
            from,
            to: sub.position,
        });
        if topic.subs.len() * 4 < topic.subs.capacity() && topic.subs.capacity() > 16 {
            topic.subs.shrink_to_fit();
        }
        (moved, self.remove_if_unused(sub.topic))
    }

    fn remove_if_unused(&mut self, id: TopicId) -> Option<Arc<str>> {
        let topic = &self.topics[id as usize];
        if !topic.subs.is_empty() || topic.holds > 0 {
            return None;
        }
        let topic = self.topics.remove(id as usize);
        self.index.remove(&topic.name);
        if topic.is_wild() {
            self.wild.remove(&topic.name);
        }
        if self.index.capacity() > 1024 && self.index.len() * 4 < self.index.capacity() {
            self.index.shrink_to_fit();
        }
        Some(topic.name)
    }

    /// The filters with wildcards that match a topic name.
    pub fn wild_matching(&self, topic: &str, found: &mut SmallVec<[TopicId; 4]>) {
        if !self.wild.is_empty() {
            self.wild.matching(topic, |id| found.push(*id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sub(conn: u32) -> Sub {
        Sub { conn, identifier: 0, last: 0, options: SubOptions::default() }
    }

    #[test]
    fn the_last_subscriber_takes_a_removed_ones_place() {
        let mut topics = Topics::default();
        let (hold, _) = topics.hold("demo/all");
        let id = hold.topic;
        let refs: Vec<SubRef> = (0..3).map(|conn| topics.subscribe(id, sub(conn))).collect();
        assert_eq!(topics.release(hold), None);
        let (moved, gone) = topics.unsubscribe(refs[0]);
        assert_eq!((moved, gone), (Some(Moved { conn: 2, topic: id, from: 2, to: 0 }), None));
        assert_eq!(topics.unsubscribe(refs[1]), (None, None));
        let (moved, gone) = topics.unsubscribe(SubRef { topic: id, position: 0 });
        assert_eq!((moved, gone.as_deref()), (None, Some("demo/all")));
        assert_eq!(topics.find("demo/all"), None);
    }

    #[test]
    fn wildcards_are_found_until_they_are_gone() {
        let mut topics = Topics::default();
        let (hold, _) = topics.hold("demo/g/+");
        let mut found = SmallVec::new();
        topics.wild_matching("demo/g/a", &mut found);
        assert_eq!(found.as_slice(), [hold.topic]);
        assert_eq!(topics.release(hold).as_deref(), Some("demo/g/+"));
        found.clear();
        topics.wild_matching("demo/g/a", &mut found);
        assert!(found.is_empty());
    }
}
