//! A SUBSCRIBE on its way: routes are put in force by the topics' owners, then the saver says where the session stands and
//! gives the retained messages. What needs none of these is answered at once; a task is made only for the saver's part.

use std::sync::Arc;

use carillon_proto::topic;
use carillon_proto::v1;
use carillon_proto::v1::saver_reply::Result as Reply;
use carillon_proto::v1::saver_request::Op;
use parking_lot::Mutex;

use super::publish::{NOT_AUTHORIZED, UNSPECIFIED_ERROR};
use super::saver::{SaverFailure, unexpected};
use super::shares::ShareMember;
use super::{AttachCommand, Link};
use crate::delivery::Delivery;
use crate::event::{ConnId, Event, Granted};
use crate::routes::{Joined, RouteState, Waiter};

/// A kept session and its attachment, if there is one.
type Kept = Option<(v1::SessionRef, u64)>;

/// A filter of a SUBSCRIBE that the device may subscribe to.
pub struct Wanted {
    pub filter: Arc<str>,
    pub subscription: v1::Subscription,
    /// MQTT 5.0 §3.8.3.1: 0 = send retained messages, 1 = if the subscription is new, 2 = not.
    pub retain_handling: u8,
    /// The connection has a subscription with this filter (known without the saver).
    pub existed: bool,
    /// It is in the app of the connection's own session: may be kept with that.
    pub is_own: bool,
    /// Of a shared subscription: who is to be a member.
    pub share: Option<ShareMember>,
}

impl Wanted {
    fn wants_retained(&self) -> bool {
        self.retain_handling == 0 || (self.retain_handling == 1 && !self.existed)
    }
}

/// A SUBSCRIBE that waits for its routes.
pub struct Underway {
    link: Link,
    conn: ConnId,
    packet_id: u16,
    state: Mutex<State>,
}

struct State {
    /// The kept session and its attachment.
    session: Option<(v1::SessionRef, u64)>,
    wanted: Vec<Wanted>,
    /// Of each wanted filter, when it is known.
    routed: Vec<Option<Result<RouteState, u8>>>,
    left: usize,
}

/// What became of a SUBSCRIBE at once.
pub enum Begun {
    /// Everything is known: the outcomes.
    Done(Vec<Result<Granted, u8>>),
    /// [`Event::Subscribed`] answers it. With routes to wait for, [`Underway::time_out`] ends the waiting.
    Underway(Option<Arc<Underway>>),
}

impl Link {
    /// Carries out a SUBSCRIBE of a connection of this shard: joins the routes, and answers when the owners route to us,
    /// the saver has it if it is to be kept, and the retained messages are at hand.
    pub fn subscribe(
        &self,
        conn: ConnId,
        packet_id: u16,
        session: Option<(v1::SessionRef, u64)>,
        wanted: Vec<Wanted>,
    ) -> Begun {
        let filters: Vec<(Arc<str>, Option<ShareMember>)> =
            wanted.iter().map(|wanted| (wanted.filter.clone(), wanted.share)).collect();
        let left = filters.len();
        let state = State { session, wanted, routed: vec![None; left], left };
        let mut ready = Vec::with_capacity(left);
        let mut underway: Option<Arc<Underway>> = None;
        let mut state = Some(state);
        for (place, (filter, share)) in filters.iter().enumerate() {
            let mut waits = || {
                let underway = underway.get_or_insert_with(|| {
                    let state = Mutex::new(state.take().unwrap_or_default());
                    Arc::new(Underway { link: self.clone(), conn, packet_id, state })
                });
                underway.clone()
            };
            if let Some(member) = share {
                if member.is_new {
                    let underway = waits();
                    let answer = move |outcome: Result<(), u8>| {
                        underway.routed(&[(place, outcome.map(|()| RouteState::SHARE))]);
                    };
                    self.join_share(conn, filter, *member, Box::new(answer));
                } else {
                    ready.push((place, Ok(RouteState::SHARE)));
                }
                continue;
            }
            let waiter = || -> Waiter {
                let underway = waits();
                Box::new(move |route| underway.routed(&[(place, Ok(route))]))
            };
            let joined = if topic::is_wildcard(filter) {
                let registries = self.inner.registry_names();
                self.inner.routes.join_wild(filter, conn.shard.into(), &registries, waiter)
            } else {
                self.inner.routes.join(filter, conn.shard.into(), waiter)
            };
            match joined {
                Joined::Ready(route) => ready.push((place, Ok(route))),
                Joined::Wait { announce: true } if topic::is_wildcard(filter) => {
                    self.inner.to_all(|| AttachCommand::WildRoute(filter.clone()));
                }
                Joined::Wait { announce: true } => {
                    self.inner.to_owner(filter, AttachCommand::Route(filter.clone()));
                }
                Joined::Wait { announce: false } => {}
            }
        }
        if let Some(underway) = underway {
            underway.routed(&ready);
            return Begun::Underway(Some(underway));
        }
        let mut state = state.unwrap_or_default();
        for (place, route) in ready {
            state.routed[place] = Some(route);
        }
        match self.routes_known(conn, packet_id, state) {
            Some(outcomes) => Begun::Done(outcomes),
            None => Begun::Underway(None),
        }
    }

    /// Joins a route that another shard has, for a session that goes on in this one. False: it is not in force yet.
    pub fn join_in_force(&self, filter: &Arc<str>, shard: usize) -> bool {
        let nobody = || -> Waiter { Box::new(|_| {}) };
        let joined = if topic::is_wildcard(filter) {
            self.inner.routes.join_wild(filter, shard, &self.inner.registry_names(), nobody)
        } else {
            self.inner.routes.join(filter, shard, nobody)
        };
        if joined == (Joined::Wait { announce: true }) {
            if topic::is_wildcard(filter) {
                self.inner.to_all(|| AttachCommand::WildRoute(filter.clone()));
            } else {
                self.inner.to_owner(filter, AttachCommand::Route(filter.clone()));
            }
        }
        matches!(joined, Joined::Ready(_))
    }

    /// Gives the outcomes if nothing more is needed, else asks the saver and answers with an event.
    fn routes_known(&self, conn: ConnId, packet_id: u16, state: State) -> Option<Vec<Result<Granted, u8>>> {
        let State { session, wanted, routed, .. } = state;
        let routed: Vec<Result<RouteState, u8>> =
            routed.into_iter().map(|route| route.unwrap_or(Err(UNSPECIFIED_ERROR))).collect();
        let has_session = session.is_some();
        let is_kept = |w: &Wanted| has_session && w.is_own;
        let is_inbox = |w: &Wanted| w.subscription.qos > 0 && topic::inbox_user(&w.filter).is_some();
        let kept: Vec<usize> = (0..wanted.len()).filter(|&i| is_kept(&wanted[i])).collect();
        let inboxes: Vec<usize> =
            (0..wanted.len()).filter(|&i| !is_kept(&wanted[i]) && is_inbox(&wanted[i])).collect();
        let has_retained = |w: &Wanted, route: &Result<RouteState, u8>| {
            w.wants_retained() && route.is_ok_and(|r| r.has_retained)
        };
        if kept.is_empty()
            && inboxes.is_empty()
            && !wanted.iter().zip(&routed).any(|(w, route)| has_retained(w, route))
        {
            let granted = |route: RouteState| Granted {
                position: route.last,
                sent: 0,
                backlog: Vec::new(),
                retained: Vec::new(),
            };
            return Some(routed.into_iter().map(|route| route.map(granted)).collect());
        }
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            let outcomes = link.place(wanted, routed, [(kept, session), (inboxes, None)]).await;
            link.answer(conn, Event::Subscribed { conn, packet_id, outcomes });
        });
        None
    }

    /// The saver's part; `asked`: indices of wanted filters, with the session that they are to be kept for. The routes are in force: what is published between now and its answer is in the log after a
    /// position, and a message that is routed before its position is known is not missed either.
    async fn place(
        &self,
        wanted: Vec<Wanted>,
        routed: Vec<Result<RouteState, u8>>,
        asked: [(Vec<usize>, Kept); 2],
    ) -> Vec<Result<Granted, u8>> {
        let mut placed: Vec<Result<v1::SubscribedOne, u8>> = wanted
            .iter()
            .map(|w| Ok(v1::SubscribedOne { existed: w.existed, positions: Vec::new() }))
            .collect();
        for (asked, session) in asked.into_iter().filter(|(asked, _)| !asked.is_empty()) {
            let (session, attachment) =
                session.map_or((None, 0), |(session, attachment)| (Some(session), attachment));
            let subscriptions = asked.iter().map(|&i| wanted[i].subscription.clone()).collect();
            let op = Op::Subscribe(v1::Subscribe { session, attachment, subscriptions });
            let answer = self.ask(op).await.and_then(|reply| match reply {
                Reply::Subscribed(subscribed) if subscribed.results.len() == asked.len() => {
                    Ok(subscribed.results)
                }
                other => Err(unexpected("Subscribe", &other)),
            });
            match answer {
                Ok(results) => {
                    for (&i, result) in asked.iter().zip(results) {
                        placed[i] = Ok(result);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "subscription could not be kept");
                    let is_moved = matches!(error, SaverFailure::Moved);
                    let code = if is_moved { NOT_AUTHORIZED } else { UNSPECIFIED_ERROR };
                    for &i in &asked {
                        placed[i] = Err(code);
                    }
                }
            }
        }
        let mut outcomes = Vec::with_capacity(wanted.len());
        for ((wanted, placed), routed) in wanted.into_iter().zip(placed).zip(routed) {
            outcomes.push(match (placed, routed) {
                (Ok(placed), Ok(route)) => self.grant(wanted, placed, route).await,
                (Err(code), _) | (_, Err(code)) => Err(code),
            });
        }
        outcomes
    }

    async fn grant(
        &self,
        wanted: Wanted,
        placed: v1::SubscribedOne,
        route: RouteState,
    ) -> Result<Granted, u8> {
        let mut retained = Vec::new();
        if route.has_retained && wanted.wants_retained() && (wanted.retain_handling == 0 || !placed.existed) {
            let op = Op::Retained(v1::Retained { filter: wanted.filter.to_string(), limit: 0 });
            match self.ask(op).await {
                Ok(Reply::Retained(reply)) => {
                    retained =
                        reply.messages.into_iter().map(|message| Arc::new(Delivery::new(message))).collect();
                }
                Ok(other) => return Err(refuse(&unexpected("Retained", &other))),
                Err(error) => return Err(refuse(&error)),
            }
        }
        let is_wild = topic::is_wildcard(&wanted.filter);
        let (position, sent) = match placed.positions.first() {
            Some(position) if !is_wild => (position.after, position.sent),
            _ => (route.last, 0),
        };
        let backlog = if is_wild { placed.positions } else { Vec::new() };
        Ok(Granted { position, sent, backlog, retained })
    }
}

impl Default for State {
    fn default() -> Self {
        State { session: None, wanted: Vec::new(), routed: Vec::new(), left: usize::MAX }
    }
}

impl Underway {
    /// Some of the routes are known; with the last of them it goes on.
    fn routed(&self, routes: &[(usize, Result<RouteState, u8>)]) {
        let state = {
            let mut state = self.state.lock();
            for &(place, route) in routes {
                // A waiter may still be called after the time was over.
                if let Some(known @ None) = state.routed.get_mut(place) {
                    *known = Some(route);
                    state.left -= 1;
                }
            }
            if state.left > 0 {
                return;
            }
            std::mem::take(&mut *state)
        };
        if let Some(outcomes) = self.link.routes_known(self.conn, self.packet_id, state) {
            let event = Event::Subscribed { conn: self.conn, packet_id: self.packet_id, outcomes };
            self.link.answer(self.conn, event);
        }
    }

    /// No owner has put the routes in force in time: those that are not known are refused.
    pub fn time_out(&self) {
        let late: Vec<usize> = {
            let state = self.state.lock();
            (0..state.routed.len()).filter(|&place| state.routed[place].is_none()).collect()
        };
        if !late.is_empty() {
            tracing::warn!(routes = late.len(), "no owner put these routes in force in time");
            let failed: Vec<_> = late.into_iter().map(|place| (place, Err(UNSPECIFIED_ERROR))).collect();
            self.routed(&failed);
        }
    }
}

fn refuse(error: &SaverFailure) -> u8 {
    tracing::warn!(%error, "retained messages could not be read");
    UNSPECIFIED_ERROR
}
