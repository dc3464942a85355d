//! Wills whose delay runs (MQTT 5.0 §3.1.3.2.2): this gateway publishes them in time, and the owner of the user's inbox
//! knows of them, to do it should this gateway be gone by then. docs/adr/0010.

use std::collections::HashMap;
use std::time::Duration;

use carillon_proto::{now_ms, topic, v1};
use parking_lot::Mutex;

use super::{AttachCommand, Inner, Link, Publisher};

/// By session key.
#[derive(Default)]
pub(super) struct Wills {
    waiting: Mutex<HashMap<u128, Waiting>>,
}

struct Waiting {
    /// What the registry was told.
    change: v1::SessionChange,
    due_ms: u64,
    timer: tokio::task::AbortHandle,
}

impl Link {
    /// Publishes a will after its delay, unless its session comes back first, here or at another gateway. `change`: how the
    /// session stands without it; `publisher`: what it has published before, which a will without a delay stays behind.
    pub fn publish_will(
        &self,
        key: u128,
        change: v1::SessionChange,
        message: v1::Message,
        delay: Duration,
        publisher: &Publisher,
    ) {
        if delay.is_zero() {
            self.session_changed(change);
            return self.publish_now(publisher, message);
        }
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let will = v1::Will { message: Some(message.clone()), delay_ms, due: true };
        let change = v1::SessionChange { will: Some(Box::new(will)), ..change };
        self.session_changed(change.clone());
        let link = self.clone();
        let connection = change.connection;
        let mut waiting = self.inner.wills.waiting.lock();
        let timer = self.inner.runtime.spawn(async move {
            tokio::time::sleep(delay).await;
            let waiting = {
                let mut all = link.inner.wills.waiting.lock();
                match all.get(&key) {
                    Some(waiting) if waiting.change.connection == connection => all.remove(&key),
                    _ => None,
                }
            };
            let Some(waiting) = waiting else { return };
            link.publish_now(&Publisher::default(), message);
            link.session_changed(v1::SessionChange { online: false, will: None, ..waiting.change });
        });
        let waits =
            Waiting { change, due_ms: now_ms().saturating_add(delay_ms), timer: timer.abort_handle() };
        if let Some(before) = waiting.insert(key, waits) {
            before.timer.abort();
        }
    }

    /// The session is back: its will is not to be published. `connection`: only the will of this one.
    pub fn cancel_will(&self, key: u128, connection: Option<u64>) {
        self.inner.cancel_will(key, connection);
    }

    /// The session has ended, without its device having come back. Its will goes on waiting, if it does.
    pub fn session_ended(&self, key: u128, gone: v1::SessionChange) {
        let mut gone = gone;
        if let Some(waiting) = self.inner.wills.waiting.lock().get_mut(&key)
            && waiting.change.connection == gone.connection
        {
            gone.will = waiting.change.will.take();
            if let Some(will) = &mut gone.will {
                will.delay_ms = waiting.due_ms.saturating_sub(now_ms());
            }
            waiting.change = gone.clone();
        }
        self.session_changed(gone);
    }

    fn publish_now(&self, publisher: &Publisher, mut message: v1::Message) {
        message.published_ms = now_ms();
        // The owner of the inbox may come to publish it too.
        self.publish_once(publisher, message);
    }
}

impl Inner {
    pub(super) fn cancel_will(&self, key: u128, connection: Option<u64>) {
        let mut waiting = self.wills.waiting.lock();
        let is_it = |will: &Waiting| connection.is_none_or(|connection| connection == will.change.connection);
        if !waiting.is_empty()
            && waiting.get(&key).is_some_and(is_it)
            && let Some(will) = waiting.remove(&key)
        {
            will.timer.abort();
        }
    }

    /// Tells a registry of the wills that wait, of sessions in these slots.
    pub(super) fn announce_wills(&self, registry: &str, slots: &[v1::SlotEpoch]) {
        let now = now_ms();
        for waiting in self.wills.waiting.lock().values() {
            let Some(session) = &waiting.change.session else { continue };
            let slot = topic::slot_of(&topic::inbox(&session.app, &session.user));
            if slots.binary_search_by_key(&slot, |complete| complete.slot).is_err() {
                continue;
            }
            let mut change = v1::SessionChange { again: true, ..waiting.change.clone() };
            if let Some(will) = &mut change.will {
                will.delay_ms = waiting.due_ms.saturating_sub(now);
            }
            self.to(registry, AttachCommand::Session(change));
        }
    }
}
