//! Who is online: the sessions of the users of one slot, as the gateways announce them. Soft state.
//!
//! A session whose gateway's stream is gone is *lost*: it is no longer shown, but its end is reported only when the
//! gateway is gone from discovery, or has not announced it again for a while. So a stream that breaks for a moment fires
//! no presence events; nor does a device that its gateway has sent to another one, if it arrives there in the time that its
//! gateway gives it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use carillon_agent::app::App;
use carillon_proto::{topic, v1};

use super::Output;
use super::routing::{Attached, Receiver, Routing};
use super::wills::{Online, Wills};

/// How long a lost session may take to be announced again.
const LOST_MS: u64 = 30_000;
/// The reason of an end that is to be the beginning at another gateway.
const MOVED: &str = "moved";

/// A session came or went. Shaped as the coordinator's webhook shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PresenceEvent {
    pub app: String,
    pub user: String,
    pub client_id: String,
    pub online: bool,
    /// Sessions of this user that are online after this event: 1 with `online` is the first, 0 without it the last.
    pub sessions: usize,
    /// Unix time in milliseconds at which the session came.
    pub since_ms: u64,
    /// Unix time in milliseconds of the event.
    pub at_ms: u64,
    /// Of the device, "ip:port".
    pub address: String,
    /// Instance id.
    pub gateway: String,
    /// Why it went; empty when it came.
    pub reason: String,
}

#[derive(Debug)]
struct Session {
    client_id: Box<str>,
    receiver: Receiver,
    connection: u64,
    since_ms: u64,
    address: Box<str>,
    lost: Option<Box<Lost>>,
}

/// Whose stream it was, and when that was gone.
#[derive(Debug)]
struct Lost {
    gateway: Attached,
    at_ms: u64,
    /// It was sent to another gateway, and may take so long to arrive there: that this one goes is of no account.
    arrival_ms: Option<u64>,
}

#[derive(Debug, Default)]
pub struct Sessions {
    /// By the user's inbox topic.
    users: HashMap<Box<str>, Vec<Session>>,
    /// How many there are, lost ones too.
    len: usize,
    lost: usize,
    wills: Wills,
}

impl Sessions {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn change(
        &mut self,
        receiver: Receiver,
        change: v1::SessionChange,
        now_ms: u64,
        routing: &Routing,
        apps: &BTreeMap<String, Arc<App>>,
        out: &mut Vec<Output>,
    ) {
        if change.will.is_none() && self.wills.is_empty() {
            return self.changed(receiver, change, now_ms, routing, apps, out);
        }
        let Some(name) = &change.session else { return };
        let inbox = topic::inbox(&name.app, &name.user);
        self.changed(receiver, change.clone(), now_ms, routing, apps, out);
        let mut user = self.users.get(inbox.as_str()).into_iter().flatten();
        let online = user.find(|session| *session.client_id == *name.client_id).map(|session| Online {
            receiver: session.receiver,
            connection: session.connection,
            since_ms: session.since_ms,
        });
        let key = (inbox.into(), name.client_id.as_str().into());
        self.wills.change(receiver, key, &change, online, now_ms, routing, out);
    }

    fn changed(
        &mut self,
        receiver: Receiver,
        change: v1::SessionChange,
        now_ms: u64,
        routing: &Routing,
        apps: &BTreeMap<String, Arc<App>>,
        out: &mut Vec<Output>,
    ) {
        let Some(name) = change.session.clone() else { return };
        let inbox = topic::inbox(&name.app, &name.user);
        let gateway =
            routing.get(receiver).map(|attached| String::from(&*attached.instance)).unwrap_or_default();
        if !change.online {
            let Some(user) = self.users.get_mut(inbox.as_str()) else { return };
            let place = user.iter().position(|session| {
                *session.client_id == *name.client_id
                    && session.receiver == receiver
                    && session.connection == change.connection
            });
            let Some(place) = place else { return };
            if change.reason == MOVED
                && change.arrival_ms != Some(0)
                && let Some(attached) = routing.get(receiver)
            {
                let arrival_ms = Some(change.arrival_ms.unwrap_or(LOST_MS));
                let lost = Lost { gateway: attached.clone(), at_ms: now_ms, arrival_ms };
                self.lost += usize::from(user[place].lost.is_none());
                user[place].lost = Some(Box::new(lost));
                return;
            }
            let session = user.swap_remove(place);
            self.len -= 1;
            let event = ended(&inbox, &session, user, gateway, &change.reason, now_ms);
            if user.is_empty() {
                self.users.remove(inbox.as_str());
            }
            return report(event, apps, out);
        }
        // Most users have one session, and a Vec would begin with room for four.
        let user = self.users.entry(inbox.as_str().into()).or_insert_with(|| Vec::with_capacity(1));
        let new = Session {
            client_id: name.client_id.as_str().into(),
            receiver,
            connection: change.connection,
            since_ms: change.since_ms,
            address: change.address.as_str().into(),
            lost: None,
        };
        let Some(old) = user.iter_mut().find(|session| session.client_id == new.client_id) else {
            let event = PresenceEvent {
                app: name.app,
                user: name.user,
                client_id: name.client_id,
                online: true,
                sessions: shown(user) + 1,
                since_ms: change.since_ms,
                at_ms: now_ms,
                address: change.address,
                gateway,
                reason: String::new(),
            };
            user.push(new);
            self.len += 1;
            if !change.again {
                report(event, apps, out);
            }
            return;
        };
        let same_gateway = match &old.lost {
            Some(lost) => routing.get(receiver).is_some_and(|attached| {
                attached.instance == lost.gateway.instance && attached.incarnation == lost.gateway.incarnation
            }),
            None => old.receiver == receiver,
        };
        let same = same_gateway && old.connection == new.connection;
        // A new connection is the newer one; of two that are told about again, the one that began later.
        let newer = same
            || if same_gateway {
                new.connection > old.connection
            } else {
                !change.again || new.since_ms >= old.since_ms
            };
        let (kept, kicked) = if newer {
            self.lost -= usize::from(old.lost.is_some());
            let kicked = (!same && old.lost.is_none()).then_some((old.receiver, old.connection));
            *old = new;
            (true, kicked)
        } else {
            (false, Some((receiver, change.connection)))
        };
        tracing::trace!(%inbox, kept, "a session with a client id that was online");
        if let Some((to, connection)) = kicked {
            let kick = v1::KickSession {
                session: Some(name),
                connection,
                reason: v1::kick_session::Reason::TakenOver.into(),
            };
            out.push(Output::Kick { to, kick });
        }
    }

    /// A gateway has announced all it has.
    pub fn complete(&mut self, gateway: &Attached) {
        self.wills.complete(gateway);
    }

    /// The stream of a receiver is gone.
    pub fn lose(&mut self, receiver: Receiver, attached: &Attached, now_ms: u64) {
        self.wills.lose(receiver, now_ms);
        for session in self.users.values_mut().flatten() {
            if session.receiver == receiver && session.lost.is_none() {
                session.lost =
                    Some(Box::new(Lost { gateway: attached.clone(), at_ms: now_ms, arrival_ms: None }));
                self.lost += 1;
            }
        }
    }

    /// Ends lost sessions whose gateway is gone, or that were lost too long ago; publishes wills.
    pub fn end_lost(
        &mut self,
        now_ms: u64,
        routing: &Routing,
        apps: &BTreeMap<String, Arc<App>>,
        out: &mut Vec<Output>,
    ) {
        self.wills.tick(now_ms, routing, out);
        if self.lost == 0 {
            return;
        }
        let why = |lost: &Lost| {
            if let Some(arrival_ms) = lost.arrival_ms {
                (now_ms.saturating_sub(lost.at_ms) >= arrival_ms).then_some(MOVED)
            } else if !routing.is_live(&lost.gateway.instance, lost.gateway.incarnation) {
                Some("gateway_lost")
            } else {
                // Its gateway is there, or will be, but has not announced it again.
                (now_ms.saturating_sub(lost.at_ms) >= LOST_MS).then_some("network")
            }
        };
        let (len, lost) = (&mut self.len, &mut self.lost);
        self.users.retain(|inbox, user| {
            let mut place = 0;
            while place < user.len() {
                let Some(reason) = user[place].lost.as_deref().and_then(why) else {
                    place += 1;
                    continue;
                };
                let session = user.swap_remove(place);
                *len -= 1;
                *lost -= 1;
                let gateway = session.lost.as_ref().map(|lost| lost.gateway.instance.to_string());
                report(ended(inbox, &session, user, gateway.unwrap_or_default(), reason, now_ms), apps, out);
            }
            !user.is_empty()
        });
    }

    pub fn online(&self, app: &str, user: &str, routing: &Routing) -> Vec<v1::OnlineSession> {
        let Some(sessions) = self.users.get(topic::inbox(app, user).as_str()) else { return Vec::new() };
        let shown = sessions.iter().filter(|session| session.lost.is_none());
        shown
            .map(|session| v1::OnlineSession {
                session: Some(session_ref(app, user, &session.client_id)),
                gateway: routing
                    .get(session.receiver)
                    .map(|attached| attached.instance.to_string())
                    .unwrap_or_default(),
                since_ms: session.since_ms,
                address: session.address.to_string(),
            })
            .collect()
    }

    /// `client_id` empty: all.
    pub fn kick(
        &self,
        app: &str,
        user: &str,
        client_id: &str,
        routing: &Routing,
        out: &mut Vec<Output>,
    ) -> u32 {
        let Some(sessions) = self.users.get(topic::inbox(app, user).as_str()) else { return 0 };
        let mut kicked = 0;
        for session in sessions {
            let meant = client_id.is_empty() || *session.client_id == *client_id;
            if meant && session.lost.is_none() && routing.get(session.receiver).is_some() {
                let kick = v1::KickSession {
                    session: Some(session_ref(app, user, &session.client_id)),
                    connection: session.connection,
                    reason: v1::kick_session::Reason::Administrative.into(),
                };
                out.push(Output::Kick { to: session.receiver, kick });
                kicked += 1;
            }
        }
        kicked
    }
}

fn session_ref(app: &str, user: &str, client_id: &str) -> v1::SessionRef {
    v1::SessionRef { app: app.to_owned(), user: user.to_owned(), client_id: client_id.to_owned() }
}

fn shown(user: &[Session]) -> usize {
    user.iter().filter(|session| session.lost.is_none()).count()
}

fn ended(
    inbox: &str,
    session: &Session,
    others: &[Session],
    gateway: String,
    reason: &str,
    at_ms: u64,
) -> PresenceEvent {
    PresenceEvent {
        app: topic::app_of(inbox).to_owned(),
        user: topic::inbox_user(inbox).unwrap_or_default().to_owned(),
        client_id: session.client_id.to_string(),
        online: false,
        sessions: shown(others),
        since_ms: session.since_ms,
        at_ms,
        address: session.address.to_string(),
        gateway,
        reason: reason.to_owned(),
    }
}

/// Only apps that ask for presence events get them.
fn report(event: PresenceEvent, apps: &BTreeMap<String, Arc<App>>, out: &mut Vec<Output>) {
    let wanted = apps.get(&event.app).and_then(|app| app.webhook.as_ref()).is_some_and(|hook| hook.presence);
    if wanted {
        out.push(Output::Presence(event));
    }
}
