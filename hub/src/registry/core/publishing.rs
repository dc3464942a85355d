//! The way of a message: its number, its append, its release and the answer to its publisher.

use std::sync::Arc;

use carillon_agent::app::App;
use carillon_proto::topic::{app_of, slot_of};
use carillon_proto::v1::{self, PublishCode, saver_reply, saver_request};

use super::topic::{Load, Pending, State};
use super::{AskError, Asked, Core, MOVED, Output, Publish, policy, topic_entry};

impl Core {
    pub fn publish(&mut self, publish: Publish, now_ms: u64) {
        let refuse = |code, text: String| Output::refuse(publish.token, code, text);
        if let Err(text) = policy::check(&publish.message) {
            return self.out.push(refuse(PublishCode::Refused, text));
        }
        let number = slot_of(&publish.message.topic);
        if !self.slots.contains_key(&number) && !self.coming.contains_key(&number) {
            return self.out.push(refuse(PublishCode::NotOwner, format!("slot {number} is not owned here")));
        }
        if self.unanswered >= self.limits.unanswered {
            return self.out.push(refuse(
                PublishCode::Overloaded,
                format!("{} publishes are waiting for their answer", self.unanswered),
            ));
        }
        self.unanswered += 1;
        self.take(number, publish, now_ms);
    }

    /// A publish that is counted, to a slot that is ours or will be.
    pub(super) fn take(&mut self, number: u32, publish: Publish, now_ms: u64) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return self.wait(number, publish, now_ms);
        };
        let topic = topic_entry(&mut slot.topics, &publish.message.topic, &mut self.topics);
        topic.used = true;
        if topic.load == Load::Ready {
            self.sequence(number, publish, now_ms);
        } else {
            let name: Box<str> = publish.message.topic.as_str().into();
            topic.waiting().publishes.push(publish);
            self.load(number, &name);
        }
    }

    /// Gives a message its number, has it stored, and delivers what may be delivered. The topic must be ready.
    pub(super) fn sequence(&mut self, number: u32, publish: Publish, now_ms: u64) {
        let Publish { token, mut message, store, idempotent, broadcast } = publish;
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(topic) = slot.topics.get_mut(message.topic.as_str()) else { return };
        let default_app;
        let app = match self.apps.get(app_of(&message.topic)) {
            Some(app) => app,
            None => {
                // Its document may not have arrived here yet; whether the app exists is checked at the edge.
                default_app = Arc::new(App::default());
                &default_app
            }
        };
        let policy = policy::policy(app, &message, store);
        let idempotent = idempotent && !message.id.is_empty();
        if idempotent && !policy.store && !message.retain {
            if let Some((epoch, seq)) = self.recent.get(&message.topic, &message.id) {
                let mut reply = Output::refuse(token, PublishCode::Accepted, "");
                if let Output::Reply { published, .. } = &mut reply {
                    (published.epoch, published.seq, published.duplicate) = (epoch, seq, true);
                }
                return self.answer(reply);
            }
            self.recent.insert(&message.topic, &message.id, (slot.epoch, topic.seq + 1));
        }
        topic.seq += 1;
        message.epoch = slot.epoch;
        message.seq = topic.seq;
        message.prev = 0;
        message.stored = policy.store;
        if message.published_ms == 0 {
            message.published_ms = now_ms;
        }
        let name: Box<str> = message.topic.as_str().into();
        if policy.store || message.retain {
            let append = v1::Append {
                slot: number,
                message: Some(message.clone()),
                log: policy.store,
                retain: message.retain,
                idempotent: idempotent && policy.store,
                retention: Some(policy.retention),
            };
            let (epoch, seq) = (slot.epoch, topic.seq);
            topic.pending.push_back(Pending { token, message, broadcast, state: State::Appending });
            let asked = Asked::Append { slot: number, epoch, topic: name, seq };
            self.ask(asked, saver_request::Op::Append(append));
        } else {
            topic.pending.push_back(Pending { token, message, broadcast, state: State::Free });
            self.release(number, &name, now_ms);
        }
    }

    /// Delivers what may be delivered; recovers the topic if that turned out to be necessary.
    pub(super) fn release(&mut self, number: u32, name: &str, now_ms: u64) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(topic) = slot.topics.get_mut(name) else { return };
        self.unanswered -= topic.release(name, slot.whole, &self.routing, &mut self.out);
        match topic.load {
            Load::Stale => self.load(number, name),
            Load::Ready => {
                // What had to wait while the topic was loaded, in the order in which it came.
                let Some(waiting) = topic.waiting.take() else { return };
                let (head, retained) = (Some(topic.last_stored), topic.retained);
                for (request, index) in waiting.announces {
                    self.out.push(Output::Announced { request, index, head, retained });
                }
                for publish in waiting.publishes {
                    self.sequence(number, publish, now_ms);
                }
            }
            _ => {}
        }
    }

    pub(super) fn appended(
        &mut self,
        tag: u64,
        (number, epoch): (u32, u64),
        name: &str,
        seq: u64,
        answer: Result<saver_reply::Result, AskError>,
        now_ms: u64,
    ) {
        if let Some((token, seq)) = self.orphans.remove(&tag) {
            return self.answer_orphan(token, epoch, seq, answer);
        }
        let Some(slot) = self.slots.get_mut(&number).filter(|slot| slot.epoch == epoch) else { return };
        let Some(topic) = slot.topics.get_mut(name) else { return };
        let state = match answer {
            Ok(saver_reply::Result::Appended(appended)) if appended.duplicate => {
                State::Duplicate { epoch: appended.epoch, seq: appended.seq }
            }
            Ok(saver_reply::Result::Appended(appended)) => {
                let place = topic.pending.binary_search_by_key(&seq, |pending| pending.message.seq);
                match place.map(|place| topic.pending[place].message.stored) {
                    Ok(true) => State::Stored { prev: appended.prev },
                    _ => State::Free,
                }
            }
            Ok(_) => {
                topic.load = Load::Stale;
                State::Failed(
                    PublishCode::StoreUnavailable,
                    "the saver gave an answer of another kind".to_owned(),
                )
            }
            Err(AskError::Fenced) => {
                topic.resolve(seq, State::Failed(PublishCode::NotOwner, MOVED.to_owned()));
                return self.give_up(number, epoch);
            }
            Err(error) => {
                if matches!(error, AskError::Unknown(_)) {
                    topic.load = Load::Stale;
                }
                let (code, text) = error.code_and_text();
                State::Failed(code, text)
            }
        };
        topic.resolve(seq, state);
        self.release(number, name, now_ms);
    }

    /// The slot went while this was appended. If it is in the log, the new owner has it there.
    pub(super) fn answer_orphan(
        &mut self,
        token: u64,
        epoch: u64,
        seq: u64,
        answer: Result<saver_reply::Result, AskError>,
    ) {
        let output = match answer {
            Ok(saver_reply::Result::Appended(appended)) => {
                let (epoch, seq) =
                    if appended.duplicate { (appended.epoch, appended.seq) } else { (epoch, seq) };
                let published = v1::Published {
                    code: PublishCode::Accepted.into(),
                    epoch,
                    seq,
                    duplicate: appended.duplicate,
                    has_route: true,
                    ..v1::Published::default()
                };
                Output::Reply { token, published, targets: Vec::new() }
            }
            _ => Output::refuse(token, PublishCode::NotOwner, MOVED),
        };
        self.answer(output);
    }

    /// Answers a publish that was counted.
    pub(super) fn answer(&mut self, reply: Output) {
        self.unanswered -= 1;
        self.out.push(reply);
    }
}
