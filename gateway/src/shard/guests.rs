//! Further apps on a connection: whoever's token came with a SUBSCRIBE (user property `token`) is a *guest* on it, with
//! its own user, rights and end. Its subscriptions last as long as the connection and the token; the session that is
//! kept beyond the connection is that of the CONNECT's user alone.

use std::cmp::Reverse;
use std::sync::Arc;

use carillon_proto::{topic, v1};

use super::Shard;
use super::close::Reason;
use super::conn::Session;
use crate::auth::{self, Rights, Stamp, Verified};
use crate::codec::reason;
use crate::delivery::session_key;
use crate::event::ConnId;

/// Guests of one connection.
const GUESTS_MAX: usize = 16;

pub struct Guest {
    pub app: Arc<str>,
    /// Index of the app in the shard's counts.
    pub app_index: u16,
    pub is_root: bool,
    pub user: Box<str>,
    pub rights: Option<Box<Rights>>,
    /// [`session_key`] of its app and user with the connection's client id.
    pub key: u128,
    pub stamp: Stamp,
    /// Unix seconds.
    pub expires: u64,
    /// Its token has ended, or it was told to go. It is remembered so that its app's topics are refused from then on: in
    /// silence they would be taken for topics of the root app.
    pub is_ended: bool,
}

/// As whom a device uses a topic.
#[derive(Clone, Copy)]
pub struct Who<'a> {
    pub app: &'a Arc<str>,
    pub is_root: bool,
    pub user: &'a str,
    pub rights: Option<&'a Rights>,
}

impl Session {
    fn owner(&self) -> Who<'_> {
        Who { app: &self.app, is_root: self.is_root, user: &self.user, rights: self.rights.as_deref() }
    }

    /// Those who are here.
    pub fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.iter().flat_map(|guests| guests.iter()).filter(|guest| !guest.is_ended)
    }

    /// As [`auth::resolve`], for all whose tokens the connection has: a topic of an app that one of them is in, else one
    /// of the root app, if one of them is in that.
    pub fn resolve(&self, written: &str) -> Option<(String, bool, Who<'_>)> {
        let everyone = || std::iter::once(self.owner()).chain(self.guests().map(Guest::who));
        let app = topic::app_of(written);
        if self
            .guests
            .iter()
            .flat_map(|guests| guests.iter())
            .any(|guest| guest.is_ended && *guest.app == *app)
        {
            return None;
        }
        let who = everyone().find(|who| **who.app == *app).or_else(|| everyone().find(|who| who.is_root))?;
        let (full, relative) = auth::resolve(who.app, who.is_root, written)?;
        Some((full, relative, who))
    }

    /// Index in the shard's counts of the app that a topic belongs to.
    pub fn app_index_of(&self, full: &str) -> u16 {
        if self.guests.is_none() {
            return self.app_index;
        }
        let app = topic::app_of(full);
        self.guests().find(|guest| *guest.app == *app).map_or(self.app_index, |guest| guest.app_index)
    }

    /// Is it a topic of the app of the CONNECT, whose subscriptions and cursors the saver may keep?
    pub fn is_own(&self, full: &str) -> bool {
        self.guests.is_none() || topic::app_of(full) == &*self.app
    }

    /// Was the message published on this connection's behalf?
    pub fn is_publisher(&self, publisher: u128) -> bool {
        publisher == self.key || self.guests().any(|guest| guest.key == publisher)
    }

    pub fn who_ref(&self, who: Who<'_>) -> v1::SessionRef {
        v1::SessionRef {
            app: String::from(&**who.app),
            user: who.user.to_owned(),
            client_id: String::from(&*self.client_id),
        }
    }

    /// The guest in whose app a topic is.
    pub fn guest_ref(&self, full: &str) -> Option<v1::SessionRef> {
        let app = topic::app_of(full);
        let guest = self.guests().find(|guest| *guest.app == *app)?;
        Some(self.who_ref(guest.who()))
    }

    /// `arrival_ms`: how long it may take to arrive elsewhere, if it was sent there.
    pub fn left(&self, guest: &Guest, why: &str, arrival_ms: u64) -> Left {
        tracing::debug!(app = %guest.app, reason = why, "further app of a connection ends");
        let online = self.guest_online(guest, false);
        let offline = v1::SessionChange {
            online: false,
            reason: why.to_owned(),
            arrival_ms: Some(arrival_ms),
            ..online
        };
        Left { offline, key: guest.key, app_index: guest.app_index }
    }

    /// "This guest is online here", as a session of its own app.
    pub fn guest_online(&self, guest: &Guest, again: bool) -> v1::SessionChange {
        let session = Some(self.who_ref(guest.who()));
        // The will is the session's own.
        v1::SessionChange { session, will: None, ..super::connect::online(self, again) }
    }
}

/// A guest that is not here any more.
pub struct Left {
    offline: v1::SessionChange,
    key: u128,
    app_index: u16,
}

impl Guest {
    fn who(&self) -> Who<'_> {
        Who { app: &self.app, is_root: self.is_root, user: &self.user, rights: self.rights.as_deref() }
    }
}

impl Shard {
    /// Takes in the tokens that came with a SUBSCRIBE: of a further app, or new ones for those that are here. Err: one of
    /// them is refused; the reason code of the SUBACK.
    pub(super) fn take_tokens<'a>(
        &mut self,
        index: u32,
        properties: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), u8> {
        for (_, token) in properties.filter(|(name, _)| *name == "token") {
            let Some(session) = &self.conns[index as usize].session else { return Ok(()) };
            let (apps, keyring) = (self.shared.apps.load(), self.shared.keyring.load());
            let leeway = self.config.token_leeway_seconds;
            match auth::verify(token.as_bytes(), &session.client_id, &apps, &keyring, leeway) {
                Ok(verified) => self.take_token(index, verified)?,
                Err(refusal) => {
                    tracing::debug!(text = refusal.text, "token with a subscribe refused");
                    if refusal.failure.is_some_and(|failure| self.note_failure(index, failure)) {
                        // Who is in already is not to go on guessing.
                        let text = "too many tokens were refused".to_owned();
                        let reason = reason::NOT_AUTHORIZED;
                        self.close(index, Reason::ProtocolError { reason, text });
                    }
                    return Err(reason::NOT_AUTHORIZED);
                }
            }
        }
        Ok(())
    }

    fn take_token(&mut self, index: u32, verified: Verified) -> Result<(), u8> {
        let app_index = self.app_index(&verified.app);
        let generation = self.conns[index as usize].generation;
        let id = self.id(index);
        let Some(session) = &mut self.conns[index as usize].session else { return Ok(()) };
        let Verified { app, is_root, user, rights, expires, stamp } = verified;
        if app == session.app {
            // A new token for the user who is here: the connection goes on under it.
            if *user != *session.user || session.expires == 0 {
                return Err(reason::NOT_AUTHORIZED);
            }
            (session.rights, session.expires, session.stamp) = (rights, expires, stamp);
            return Ok(());
        }
        let guests = session.guests.get_or_insert_default();
        guests.retain(|guest| guest.app != app || !guest.is_ended);
        if let Some(guest) = guests.iter_mut().find(|guest| guest.app == app) {
            if *guest.user != *user {
                return Err(reason::NOT_AUTHORIZED);
            }
            (guest.rights, guest.stamp) = (rights, stamp);
            if guest.expires != expires {
                guest.expires = expires;
                self.guest_ends.push(Reverse((expires, index, generation)));
            }
            return Ok(());
        }
        if guests.len() >= GUESTS_MAX {
            return Err(reason::QUOTA_EXCEEDED);
        }
        let key = session_key(&app, &user, &session.client_id);
        let app = self.apps[app_index as usize].0.clone();
        let user = user.into();
        guests.push(Guest { app, app_index, is_root, user, rights, key, stamp, expires, is_ended: false });
        let connection = session.connection;
        if let Some(guest) = session.guests().last() {
            self.link.session_changed(session.guest_online(guest, false));
        }
        self.apps[app_index as usize].1.connections += 1;
        self.link.sessions().take_guest(key, id, connection);
        self.guest_ends.push(Reverse((expires, index, generation)));
        Ok(())
    }

    /// Ends guests whose tokens have.
    pub(super) fn end_guests(&mut self) {
        let now = self.now_ms / 1000;
        while let Some(&Reverse((expires, index, generation))) = self.guest_ends.peek() {
            if expires > now {
                return;
            }
            self.guest_ends.pop();
            let Some(conn) = self.conns.get(index as usize) else { continue };
            if conn.generation == generation {
                self.drop_guests_of(index, "token_expired", |guest| guest.expires <= now);
            }
        }
    }

    /// Ends the guests of all connections that are meant.
    pub(super) fn drop_guests(&mut self, why: &str, is_meant: impl Fn(&Guest) -> bool) {
        let hosts: Vec<u32> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.session.as_ref().is_some_and(|s| s.guests().any(&is_meant)))
            .map(|(index, _)| index as u32)
            .collect();
        for index in hosts {
            self.drop_guests_of(index, why, &is_meant);
        }
    }

    /// Somebody else is this guest now, or it was told to go.
    pub(super) fn kick_guest(&mut self, id: ConnId, key: u128, why: &str) {
        if let Some(index) = self.find(id) {
            self.drop_guests_of(index, why, |guest| guest.key == key);
        }
    }

    /// The connection goes on without these guests and their subscriptions.
    fn drop_guests_of(&mut self, index: u32, why: &str, is_meant: impl Fn(&Guest) -> bool) {
        // What they have acked so far still counts.
        if let Some(positions) = self.acks.remove(&index)
            && let Some(session) = &self.conns[index as usize].session
        {
            self.send_acks(session, positions);
        }
        let Some(session) = &mut self.conns[index as usize].session else { return };
        let left: Vec<Left> = session
            .guests()
            .filter(|guest| is_meant(guest))
            .map(|guest| session.left(guest, why, 0))
            .collect();
        if left.is_empty() {
            return;
        }
        let mut gone: Vec<Arc<str>> = Vec::new();
        for guest in session.guests.iter_mut().flat_map(|guests| guests.iter_mut()) {
            if !guest.is_ended && is_meant(guest) {
                guest.is_ended = true;
                gone.push(guest.app.clone());
            }
        }
        self.guests_left(left);
        let is_gone = |name: &str| gone.iter().any(|app| **app == *topic::app_of(name));
        let conn = &mut self.conns[index as usize];
        let (dropped, kept): (Vec<_>, Vec<_>) =
            conn.subs.iter().copied().partition(|sub| is_gone(&self.topics.get(sub.topic).name));
        conn.subs = kept.into();
        for &sub in &dropped {
            // The one before may have moved it.
            self.drop_subscription(sub);
        }
        self.link.metrics().subscriptions.sub(dropped.len() as i64);
        if let Some(session) = &mut self.conns[index as usize].session {
            for waiting in session.waiting.iter_mut() {
                waiting.retain(|waiting| !is_gone(&waiting.delivery.topic));
            }
        }
        self.forget_wild_cursors(index);
        self.pump(index);
    }

    /// Tells those who were told that guests were here.
    pub(super) fn guests_left(&mut self, left: Vec<Left>) {
        for Left { offline, key, app_index } in left {
            self.link.sessions().release_guest(key, offline.connection);
            self.link.session_changed(offline);
            self.apps[app_index as usize].1.connections -= 1;
        }
    }
}
