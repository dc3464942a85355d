//! The wills of one slot's sessions, for the case that their gateway is gone before it has published them. Soft state, as
//! who is online is: the gateways announce it. docs/adr/0010.

use std::collections::HashMap;

use carillon_proto::v1;

use super::Output;
use super::routing::{Attached, Receiver, Routing};

#[derive(Debug)]
struct Held {
    gateway: Attached,
    receiver: Receiver,
    connection: u64,
    since_ms: u64,
    message: v1::Message,
    delay_ms: u64,
    /// The connection has ended: when it is to be published.
    due_ms: Option<u64>,
    /// When the gateway's stream was gone.
    lost_ms: Option<u64>,
}

/// The user's inbox and the client id.
type Key = (Box<str>, Box<str>);

/// Only sessions with a will have an entry.
#[derive(Debug, Default)]
pub struct Wills {
    held: HashMap<Key, Held>,
    lost: usize,
}

/// The connection that a user's client has now, as far as is known.
#[derive(Debug, Clone, Copy)]
pub struct Online {
    pub receiver: Receiver,
    pub connection: u64,
    pub since_ms: u64,
}

impl Wills {
    /// What a gateway says of a session. `online`: how the session stands after it.
    #[allow(clippy::too_many_arguments)] // what is said, and all that it is to be seen with
    pub fn change(
        &mut self,
        receiver: Receiver,
        key: Key,
        change: &v1::SessionChange,
        online: Option<Online>,
        now_ms: u64,
        routing: &Routing,
        out: &mut Vec<Output>,
    ) {
        let (Some(name), Some(gateway)) = (&change.session, routing.get(receiver)) else { return };
        let cancel = |to, connection| Output::Kick {
            to,
            kick: v1::KickSession {
                session: Some(name.clone()),
                connection,
                reason: v1::kick_session::Reason::TakenOver.into(),
            },
        };
        let is_own = |held: &Held| {
            held.gateway.instance == gateway.instance
                && held.gateway.incarnation == gateway.incarnation
                && held.connection == change.connection
        };
        // The session is at another connection that came later: this will is not to be published.
        let is_over = online.is_some_and(|online| {
            (online.receiver, online.connection) != (receiver, change.connection)
                && online.since_ms >= change.since_ms
        });
        let will = change.will.as_ref().and_then(|will| Some((will, will.message.clone()?)));
        if let Some((will, message)) = will {
            if is_over {
                if will.due {
                    out.push(cancel(receiver, change.connection));
                }
                return;
            }
            let held = Held {
                gateway: gateway.clone(),
                receiver,
                connection: change.connection,
                since_ms: change.since_ms,
                message,
                delay_ms: will.delay_ms,
                due_ms: will.due.then(|| now_ms.saturating_add(will.delay_ms)),
                lost_ms: None,
            };
            if let Some(before) = self.held.insert(key, held) {
                self.lost -= usize::from(before.lost_ms.is_some());
                if before.due_ms.is_some() && before.receiver != receiver {
                    out.push(cancel(before.receiver, before.connection));
                }
            }
            return;
        }
        let Some(held) = self.held.get(&key) else { return };
        let goes = if is_own(held) {
            // Announced again: the session may be parked, with its will still to come.
            !(change.online && change.again && held.due_ms.is_some())
        } else {
            change.online && !is_over && held.since_ms <= change.since_ms
        };
        if goes && let Some(held) = self.held.remove(&key) {
            self.lost -= usize::from(held.lost_ms.is_some());
            if held.due_ms.is_some() && held.receiver != receiver {
                out.push(cancel(held.receiver, held.connection));
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The stream of a receiver is gone.
    pub fn lose(&mut self, receiver: Receiver, now_ms: u64) {
        for held in self.held.values_mut() {
            if held.receiver == receiver && held.lost_ms.is_none() {
                held.lost_ms = Some(now_ms);
                self.lost += 1;
            }
        }
    }

    /// A gateway that was lost has announced all it has: what it did not speak of is no more.
    pub fn complete(&mut self, gateway: &Attached) {
        if self.lost == 0 {
            return;
        }
        // Of an earlier process of that name nothing can be announced any more: its wills are due.
        let is_its = |held: &Held| {
            held.gateway.instance == gateway.instance && held.gateway.incarnation == gateway.incarnation
        };
        self.held.retain(|_, held| held.lost_ms.is_none() || !is_its(held));
        self.lost = self.held.values().filter(|held| held.lost_ms.is_some()).count();
    }

    /// Publishes what is due of gateways that are gone.
    pub fn tick(&mut self, now_ms: u64, routing: &Routing, out: &mut Vec<Output>) {
        if self.lost == 0 {
            return;
        }
        let lost = &mut self.lost;
        self.held.retain(|_, held| {
            let Some(lost_ms) = held.lost_ms else { return true };
            let due_ms = held.due_ms.unwrap_or(lost_ms.saturating_add(held.delay_ms));
            if now_ms < due_ms || routing.is_live(&held.gateway.instance, held.gateway.incarnation) {
                return true;
            }
            *lost -= 1;
            let message = std::mem::take(&mut held.message);
            out.push(Output::Will(v1::Message { published_ms: now_ms, ..message }));
            false
        });
    }
}
