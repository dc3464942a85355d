//! SUBSCRIBE and UNSUBSCRIBE. While one is under way nothing more is read from the connection, so that packets take
//! effect in the order they were sent.

use std::collections::HashMap;
use std::sync::Arc;

use carillon_proto::{share, topic, v1};

use super::close::Reason;
use super::conn::{Conn, PendingEntry, PendingSubscribe};
use super::timers::ticks;
use super::topics::{Hold, Sub, SubOptions, SubRef, TopicId};
use super::{Shard, shared};
use crate::auth;
use crate::codec::{self, RetainHandling, Subscribe, SubscribeOptions, Unsubscribe, reason};
use crate::event::{ConnId, Granted};
use crate::link::{Begun, OWNER_WAIT, Underway, Wanted};

/// Says why a filter is refused; 3.1.1 devices get 0x80 for all.
struct Refused(u8);

impl Shard {
    pub(super) fn subscribe(&mut self, index: u32, subscribe: &Subscribe<'_>) {
        let mut entries = Vec::with_capacity(subscribe.filters.len());
        let mut wanted = Vec::new();
        let identifier = subscribe.subscription_id.unwrap_or(0);
        let tokens = self.take_tokens(index, subscribe.user_properties.iter());
        if !self.conns.contains(index as usize) {
            return;
        }
        for (filter, options) in subscribe.filters {
            let allowed = tokens.map_err(Refused).and_then(|()| self.may_subscribe(index, filter, &wanted));
            match allowed {
                Ok((full, relative)) => {
                    let options_kept = SubOptions {
                        qos: options.qos.level(),
                        no_local: options.no_local,
                        retain_as_published: options.retain_as_published,
                        relative,
                    };
                    let handling = retain_handling(options);
                    entries.push(if share::parse(&full).is_some() {
                        self.want_share(index, &full, options_kept, identifier, &mut wanted)
                    } else {
                        self.want(index, &full, options_kept, identifier, handling, &mut wanted)
                    });
                }
                Err(Refused(code)) => entries.push(PendingEntry::Refused(code)),
            }
        }
        self.ask(index, PendingSubscribe { packet_id: subscribe.packet_id, entries }, wanted);
    }

    /// The subscriptions of a kept session, before its CONNECT is answered.
    pub(super) fn restore_subscriptions(&mut self, index: u32, subscriptions: Vec<v1::Subscription>) {
        let mut entries = Vec::with_capacity(subscriptions.len());
        let mut wanted = Vec::new();
        for subscription in subscriptions {
            let options = SubOptions {
                qos: subscription.qos.min(2) as u8,
                no_local: subscription.no_local,
                retain_as_published: subscription.retain_as_published,
                relative: subscription.relative,
            };
            let (filter, identifier) = (&subscription.filter, subscription.identifier);
            entries.push(if share::parse(filter).is_some() {
                self.want_share(index, filter, options, identifier, &mut wanted)
            } else {
                self.want(index, filter, options, identifier, 2, &mut wanted)
            });
        }
        self.ask(index, PendingSubscribe { packet_id: 0, entries }, wanted);
    }

    fn may_subscribe(&self, index: u32, filter: &str, wanted: &[Wanted]) -> Result<(String, bool), Refused> {
        let conn = &self.conns[index as usize];
        let Some(session) = &conn.session else { return Err(Refused(reason::UNSPECIFIED_ERROR)) };
        if filter.len() > self.config.max_topic_bytes.into() {
            return Err(Refused(reason::TOPIC_FILTER_INVALID));
        }
        let Some((full, relative, who)) = shared::resolve(session, filter) else {
            return Err(Refused(reason::NOT_AUTHORIZED));
        };
        if topic::check_filter(&full).is_err() || auth::levels(&full) > self.config.max_topic_levels.into() {
            return Err(Refused(reason::TOPIC_FILTER_INVALID));
        }
        // Of a shared subscription, what is below the share must be allowed.
        let plain = share::parse(&full).map_or(&*full, |(_, plain)| plain);
        let apps = self.shared.apps.load();
        let allowed = apps
            .get(&**who.app)
            .is_some_and(|app| auth::may_subscribe(app, who.rights, who.user, auth::below(plain)));
        if !allowed {
            return Err(Refused(reason::NOT_AUTHORIZED));
        }
        if share::parse(&full).is_some() && !session.is_own(plain) {
            // A share is a part of the session; a guest on its connection is not.
            return Err(Refused(reason::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED));
        }
        if conn.subs.len() + self.shares_of(index) + wanted.len() >= self.config.max_subscriptions as usize
            && self.subscription(conn, &full).is_none()
            && !self.is_in_share(index, &full)
        {
            return Err(Refused(reason::QUOTA_EXCEEDED));
        }
        if topic::is_wildcard(&full) {
            let wild = conn.subs.iter().filter(|sub| self.topics.get(sub.topic).is_wild()).count()
                + self.wild_shares_of(index);
            let more = wanted.iter().filter(|wanted| topic::is_wildcard(&wanted.filter)).count();
            if wild + more >= self.config.max_wildcard_subscriptions as usize
                && self.subscription(conn, &full).is_none()
                && !self.is_in_share(index, &full)
            {
                return Err(Refused(reason::QUOTA_EXCEEDED));
            }
        }
        Ok((full, relative))
    }

    fn subscription(&self, conn: &Conn, full: &str) -> Option<SubRef> {
        let id = self.topics.find(full)?;
        conn.subs.iter().find(|sub| sub.topic == id).copied()
    }

    fn want(
        &mut self,
        index: u32,
        full: &str,
        options: SubOptions,
        identifier: u32,
        retain_handling: u8,
        wanted: &mut Vec<Wanted>,
    ) -> PendingEntry {
        let conn = &self.conns[index as usize];
        let existed = self.subscription(conn, full).is_some();
        let is_own = conn.session.as_ref().is_some_and(|session| session.is_own(full));
        let (hold, name) = self.topics.hold(full);
        let subscription = v1::Subscription {
            filter: full.to_owned(),
            qos: options.qos.into(),
            no_local: options.no_local,
            retain_as_published: options.retain_as_published,
            identifier,
            relative: options.relative,
        };
        wanted.push(Wanted { filter: name, subscription, retain_handling, existed, is_own, share: None });
        PendingEntry::Wanted { hold, options, identifier }
    }

    fn ask(&mut self, index: u32, pending: PendingSubscribe, wanted: Vec<Wanted>) {
        let id = self.id(index);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        let packet_id = pending.packet_id;
        debug_assert!(session.pending.is_none(), "nothing is read while one is under way");
        session.pending = Some(Box::new(pending));
        let kept = session.attachment.map(|attachment| (session.session_ref(), attachment));
        if wanted.is_empty() {
            self.subscribed(id, packet_id, Vec::new());
        } else {
            match self.link.subscribe(id, packet_id, kept, wanted) {
                Begun::Done(outcomes) => self.subscribed(id, packet_id, outcomes),
                Begun::Underway(underway) => {
                    conn.is_paused = true;
                    if let Some(underway) = underway {
                        self.await_routes(underway);
                    }
                }
            }
        }
    }

    fn await_routes(&mut self, underway: Arc<Underway>) {
        let deadline = self.now + ticks(OWNER_WAIT);
        self.awaiting_routes.push_back((deadline, underway));
    }

    /// SUBSCRIBEs that have waited for their routes long enough go on without them.
    pub(super) fn time_out_routes(&mut self) {
        while let Some((deadline, _)) = self.awaiting_routes.front()
            && *deadline <= self.now
        {
            if let Some((_, underway)) = self.awaiting_routes.pop_front() {
                underway.time_out();
            }
        }
        // What has gone on meanwhile is nobody's but ours.
        while self.awaiting_routes.front().is_some_and(|(_, underway)| Arc::strong_count(underway) == 1) {
            self.awaiting_routes.pop_front();
        }
    }

    /// Gives back what a SUBSCRIBE under way held.
    pub(super) fn release_pending(&mut self, pending: &PendingSubscribe) {
        for entry in &pending.entries {
            if let PendingEntry::Wanted { hold, .. } = entry {
                self.release(*hold);
            }
        }
    }

    pub(super) fn release(&mut self, hold: Hold) {
        if let Some(name) = self.topics.release(hold) {
            self.link.leave(&name, self.index);
        }
    }

    pub(super) fn subscribed(&mut self, id: ConnId, packet_id: u16, outcomes: Vec<Result<Granted, u8>>) {
        // A connection that is gone has given back its holds when it went.
        let Some(index) = self.find(id) else { return };
        let was_paused = self.conns[index as usize].is_paused;
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let is_attached = session.attachment.is_some();
        let Some(pending) = session.pending.take() else { return };
        let sent = match &session.opening {
            Some(opening) if packet_id == 0 => opening.sent.clone(),
            _ => Vec::new(),
        };
        let mut outcomes = outcomes.into_iter();
        let mut codes = Vec::with_capacity(pending.entries.len());
        let mut installed = Vec::new();
        for entry in &pending.entries {
            match *entry {
                PendingEntry::Refused(code) => codes.push(code),
                PendingEntry::Share { member, options, identifier } => {
                    let outcome = outcomes.next().unwrap_or(Err(reason::UNSPECIFIED_ERROR));
                    codes.push(self.share_joined(index, (member, options, identifier), outcome));
                }
                PendingEntry::Wanted { hold, options, identifier } => {
                    let topic = hold.topic;
                    let name = self.topics.get(topic).name.clone();
                    let session = self.conns[index as usize].session.as_ref();
                    let is_own = session.is_some_and(|session| session.is_own(&name));
                    let is_kept = is_attached && is_own;
                    let outcome = outcomes.next().unwrap_or(Err(reason::UNSPECIFIED_ERROR));
                    // A further app's token may have ended meanwhile.
                    let may = is_own || session.is_some_and(|session| session.guest_ref(&name).is_some());
                    // What came by on a filter's topics meanwhile is due to a kept session.
                    let passed = if is_kept { self.topics.passed_since(hold) } else { Ok(HashMap::new()) };
                    match if may { outcome } else { Err(reason::NOT_AUTHORIZED) } {
                        // More than can be remembered: it is not known what the device would be missing.
                        Ok(_) if passed.is_err() => codes.push(reason::UNSPECIFIED_ERROR),
                        Ok(mut granted) => {
                            self.go_on_after(index, topic, &sent, &mut granted);
                            self.install(index, topic, options, identifier, &granted);
                            codes.push(options.qos);
                            let passed = passed.unwrap_or_default();
                            installed.push((topic, options, identifier, granted, passed));
                        }
                        Err(code) => codes.push(code),
                    }
                    self.release(hold);
                }
            }
        }
        if packet_id == 0 && codes.iter().any(|&code| code >= 0x80) {
            // "Session present" would be a lie: the device is to try again when hubs are there.
            let text = "the session's subscriptions could not be restored, try again";
            return self.refuse(index, reason::SERVER_UNAVAILABLE, text);
        }
        if packet_id == 0 {
            // Reads on if the CONNECT was waiting for this.
            self.conns[index as usize].is_paused = false;
            self.accept_connect(index);
        } else {
            self.scratch.clear();
            let version = self.conns[index as usize].version;
            codec::suback(&mut self.scratch, version, packet_id, &codes);
            if !self.reply_if_taken(index) {
                return;
            }
        }
        for (topic, options, identifier, granted, passed) in installed {
            for delivery in &granted.retained {
                self.send_retained(index, delivery, options, identifier);
            }
            self.catch_up_after(index, topic, options, &granted, &passed);
        }
        self.pump(index);
        if was_paused && self.conns.get(index as usize).is_some_and(|conn| conn.generation == id.generation) {
            self.resume(index);
        }
    }

    /// Sends an answer that is as long as the device's question. One that is longer than it takes may not be sent
    /// (MQTT 5.0 §3.1.2.11.4), and without it neither side knows where it stands: that ends the connection.
    fn reply_if_taken(&mut self, index: u32) -> bool {
        let bytes = self.scratch.len();
        if self.conns[index as usize].session.as_ref().is_none_or(|session| session.may_be_sent(bytes)) {
            self.reply(index);
            return true;
        }
        let text = format!("the answer of {bytes} bytes is larger than the device's maximum packet size");
        self.close(index, Reason::ProtocolError { reason: reason::PACKET_TOO_LARGE, text });
        false
    }

    /// What was sent on the session's last connection is not read from the logs again: it is finished, or in flight.
    fn go_on_after(&mut self, index: u32, topic: TopicId, sent: &[v1::AckPosition], granted: &mut Granted) {
        if sent.is_empty() {
            return;
        }
        let name = self.topics.get(topic).name.clone();
        let own = std::iter::once((&*name, &mut granted.position));
        let backlog = granted.backlog.iter_mut().map(|backlog| (&*backlog.topic, &mut backlog.after));
        let mut reached = Vec::new();
        for (name, after) in own.chain(backlog) {
            if let Some(sent) = sent.iter().find(|sent| *sent.topic == *name && sent.seq > *after) {
                *after = sent.seq;
                reached.push((name.into(), sent.seq));
            }
        }
        for (topic, seq) in reached {
            if let Some(session) = &mut self.conns[index as usize].session {
                // The acknowledgement of this may be lost as well.
                session.reached.get_or_insert_default().note(&topic, seq);
            }
            self.settle(index, Some((topic, seq)));
        }
    }

    fn install(
        &mut self,
        index: u32,
        topic: TopicId,
        options: SubOptions,
        identifier: u32,
        granted: &Granted,
    ) {
        let conn = &mut self.conns[index as usize];
        let name = self.topics.get(topic).name.clone();
        let is_kept = conn
            .session
            .as_ref()
            .is_some_and(|session| session.attachment.is_some() && session.is_own(&name));
        // What came by while the SUBSCRIBE was under way is due to a kept session and to an inbox; for another
        // subscription it was before its time.
        let joins_now = !is_kept && topic::inbox_user(&name).is_none();
        let last =
            if joins_now { self.link.routes().last(&name).max(granted.position) } else { granted.position };
        // Who keeps count of the topic may be another subscription from now on.
        let wild_last = match &mut self.conns[index as usize].session {
            Some(session) if options.qos > 0 => {
                session.wild_last.as_mut().and_then(|cursors| cursors.remove(&name))
            }
            _ => None,
        };
        let last = last.max(wild_last.unwrap_or(0));
        let conn = &mut self.conns[index as usize];
        if let Some(sub) = conn.subs.iter().find(|sub| sub.topic == topic) {
            let sub = &mut self.topics.get_mut(topic).subs[sub.position as usize];
            let counted = (sub.options.qos > 0).then_some(sub.last);
            if sub.options.qos == 0 && options.qos > 0 {
                // Until now it kept no count.
                sub.last = sub.last.max(last);
            }
            (sub.options, sub.identifier) = (options, identifier);
            if let Some(counted) = counted.filter(|_| options.qos == 0)
                && let Some(target) = self.target(index, &name).filter(|target| target.options.qos > 0)
            {
                self.set_last(index, &target, &name, counted);
            }
            return;
        }
        let sub = self.topics.subscribe(topic, Sub { conn: index, identifier, last, options });
        conn.subs.push(sub);
        self.link.metrics().subscriptions.inc();
    }

    pub(super) fn unsubscribe(&mut self, index: u32, unsubscribe: &Unsubscribe<'_>) {
        let mut codes = Vec::with_capacity(unsubscribe.filters.len());
        let mut removed = Vec::new();
        for filter in unsubscribe.filters {
            let conn = &self.conns[index as usize];
            let Some(session) = &conn.session else { return };
            let full = shared::resolve(session, filter).map(|(full, ..)| full);
            if let Some(share) = full.as_ref().filter(|full| share::parse(full).is_some()).cloned() {
                codes.push(if self.unsubscribe_share(index, &share) {
                    removed.push(share);
                    reason::SUCCESS
                } else {
                    reason::NO_SUBSCRIPTION_EXISTED
                });
                continue;
            }
            let is_own = full.as_ref().is_some_and(|full| session.is_own(full));
            match full.and_then(|full| self.subscription(conn, &full).map(|sub| (full, sub))) {
                Some((full, sub)) => {
                    self.conns[index as usize].subs.retain(|other| *other != sub);
                    self.drop_subscription(sub);
                    self.link.metrics().subscriptions.dec();
                    if is_own {
                        removed.push(full);
                    }
                    codes.push(reason::SUCCESS);
                }
                None => codes.push(reason::NO_SUBSCRIPTION_EXISTED),
            }
        }
        self.forget_wild_cursors(index);
        let id = self.id(index);
        let conn = &mut self.conns[index as usize];
        let Some(session) = &mut conn.session else { return };
        session.unsubscribing = Some(Box::new(codes));
        match session.attachment {
            Some(attachment) if !removed.is_empty() => {
                conn.is_paused = true;
                let session = Some(session.session_ref());
                let unsubscribe_kept = v1::Unsubscribe { session, attachment, filters: removed };
                self.link.unsubscribe(id, unsubscribe.packet_id, unsubscribe_kept);
            }
            _ => self.unsubscribed(id, unsubscribe.packet_id, true),
        }
    }

    pub(super) fn unsubscribed(&mut self, id: ConnId, packet_id: u16, kept: bool) {
        let Some(index) = self.find(id) else { return };
        let conn = &mut self.conns[index as usize];
        let Some(mut codes) = conn.session.as_mut().and_then(|session| session.unsubscribing.take()) else {
            return;
        };
        if !kept {
            for code in codes.iter_mut().filter(|code| **code == reason::SUCCESS) {
                *code = reason::UNSPECIFIED_ERROR;
            }
        }
        self.scratch.clear();
        codec::unsuback(&mut self.scratch, conn.version, packet_id, &codes);
        let was_paused = conn.is_paused;
        if self.reply_if_taken(index) && was_paused {
            self.resume(index);
        }
    }

    /// What no filter matches any more is forgotten: a later subscription begins anew.
    pub(super) fn forget_wild_cursors(&mut self, index: u32) {
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let Some(mut cursors) = session.wild_last.take() else { return };
        cursors.retain(|name, _| {
            self.target(index, name).is_some_and(|target| target.exact.is_none() && target.options.qos > 0)
        });
        if let Some(session) = &mut self.conns[index as usize].session {
            session.wild_last = (!cursors.is_empty()).then_some(cursors);
        }
    }

    /// Takes a subscription out of its topic's list; the connection's own list is the caller's.
    pub(super) fn drop_subscription(&mut self, sub: SubRef) {
        let (moved, gone) = self.topics.unsubscribe(sub);
        if let Some(moved) = moved
            && let Some(conn) = self.conns.get_mut(moved.conn as usize)
            && let Some(there) =
                conn.subs.iter_mut().find(|sub| sub.topic == moved.topic && sub.position == moved.from)
        {
            there.position = moved.to;
        }
        if let Some(name) = gone {
            self.link.leave(&name, self.index);
        }
    }
}

fn retain_handling(options: SubscribeOptions) -> u8 {
    match options.retain_handling {
        RetainHandling::Send => 0,
        RetainHandling::SendIfNew => 1,
        RetainHandling::DoNotSend => 2,
    }
}
