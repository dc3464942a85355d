//! The task of one worker: feeds its core with what comes in, and does what the core says.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use carillon_proto::exchange::{CallError, Exchange, Saving};
use carillon_proto::now_ms;
use carillon_proto::v1::{self, PublishCode, attach_down, saver_reply, saver_request};
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::super::attach::{Announcing, Outbound, message_bytes};
use super::super::core::{AskError, Core, Output, Receiver, Sizes};
use super::{Input, ReplyTo, WorkerDeps};
use crate::peers::PeerError;

/// Inputs handled in one turn.
const TURN: usize = 1024;
const TICK: Duration = Duration::from_millis(100);
/// A batch of messages to one receiver is sent on when it has reached this size.
const DELIVER_BYTES: usize = 1024 * 1024;

type Answer = (u64, Result<saver_reply::Result, AskError>);

pub struct Worker {
    index: usize,
    core: Core,
    deps: WorkerDeps,
    outbounds: HashMap<Receiver, Arc<Outbound>>,
    replies: HashMap<u64, ReplyTo>,
    /// By the core's request number: the announcement, and how many of its routes are not answered yet.
    announcing: HashMap<u64, (Arc<Announcing>, usize)>,
    next_token: u64,
    asks: FuturesUnordered<BoxFuture<'static, Answer>>,
    /// Since when there are slots that the saver has not fenced yet.
    taking: Option<Instant>,
    sizes: Arc<Mutex<Vec<Sizes>>>,
}

impl Worker {
    /// One of several; `sizes` has a place for each.
    pub fn new(index: usize, core: Core, deps: WorkerDeps, sizes: Arc<Mutex<Vec<Sizes>>>) -> Self {
        Worker {
            index,
            core,
            deps,
            outbounds: HashMap::new(),
            replies: HashMap::new(),
            announcing: HashMap::new(),
            next_token: 1,
            asks: FuturesUnordered::new(),
            taking: None,
            sizes,
        }
    }

    pub async fn run(mut self, mut inbox: mpsc::Receiver<Input>) {
        let mut inputs = Vec::with_capacity(TURN);
        let mut outputs = Vec::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                count = inbox.recv_many(&mut inputs, TURN) => {
                    if count == 0 {
                        return;
                    }
                    let now = now_ms();
                    for input in inputs.drain(..) {
                        self.handle(input, now);
                    }
                }
                Some((tag, answer)) = self.asks.next() => {
                    let now = now_ms();
                    self.answered(tag, answer, now);
                    // Others are often there too: a turn for all of them.
                    for _ in 1..TURN {
                        match self.asks.next().now_or_never() {
                            Some(Some((tag, answer))) => self.answered(tag, answer, now),
                            _ => break,
                        }
                    }
                }
                _ = tick.tick() => {
                    self.core.tick(now_ms());
                    self.measure();
                }
                () = self.deps.stop.cancelled() => return,
            }
            self.core.turn(&mut outputs);
            self.perform(&mut outputs);
            if let Some(since) = self.taking.take_if(|_| self.core.is_in_force()) {
                self.deps.metrics.take_over.observe(since.elapsed().as_secs_f64());
            }
        }
    }

    fn handle(&mut self, input: Input, now_ms: u64) {
        match input {
            Input::Publish { mut publish, reply } => {
                publish.token = self.token();
                self.replies.insert(publish.token, reply);
                self.core.publish(publish, now_ms);
            }
            Input::Attach { receiver, attached, outbound } => {
                self.outbounds.insert(receiver, outbound);
                self.core.attach(receiver, attached);
            }
            Input::Detach { receiver } => {
                if self.outbounds.remove(&receiver).is_some() {
                    self.core.detach(receiver, now_ms);
                }
            }
            Input::Announce { receiver, announcing, routes, wildcards } => {
                if !self.outbounds.contains_key(&receiver) {
                    return;
                }
                let request = self.token();
                self.announcing.insert(request, (announcing, routes.len()));
                for (index, filter, present) in routes {
                    if wildcards {
                        self.core.announce_wildcard(receiver, &filter, present);
                        self.announced(request, index, Some(0), false);
                    } else {
                        self.core.announce(receiver, request, index, &filter, present, now_ms);
                    }
                }
            }
            Input::Complete { receiver, slots } => self.core.complete(receiver, &slots, now_ms),
            Input::Sessions { receiver, changes } => {
                for change in changes {
                    self.core.session_change(receiver, change, now_ms);
                }
            }
            Input::Slots(slots) => {
                let was_in_force = self.core.is_in_force();
                self.core.set_slots(&slots.owned, now_ms);
                self.core.set_coming(&slots.coming);
                if !slots.coming.is_empty() {
                    // Connected before it is needed.
                    drop(self.deps.directory.saver());
                }
                if was_in_force && !self.core.is_in_force() {
                    self.taking = Some(Instant::now());
                }
            }
            Input::Live(live) => self.core.set_live(live),
            Input::Apps(apps) => self.core.set_apps(apps),
            Input::Limits(limits) => self.core.set_limits(limits),
            Input::Who { app, user, reply } => {
                let _ = reply.send(self.core.sessions(&app, &user));
            }
            Input::Kick { app, user, client_id, reply } => {
                let _ = reply.send(self.core.kick(&app, &user, &client_id));
            }
        }
    }

    fn answered(&mut self, tag: u64, answer: Result<saver_reply::Result, AskError>, now_ms: u64) {
        if let Err(error) = &answer {
            self.deps.metrics.saver_errors.inc();
            tracing::debug!(?error, "the saver could not be asked, or refuses");
        }
        self.core.answered(tag, answer, now_ms);
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn announced(&mut self, request: u64, index: u32, head: Option<u64>, retained: bool) {
        if let Some((announcing, left)) = self.announcing.get_mut(&request) {
            announcing.answer(index, head, retained);
            *left -= 1;
            if *left == 0 {
                self.announcing.remove(&request);
            }
        }
    }

    fn perform(&mut self, outputs: &mut Vec<Output>) {
        if outputs.is_empty() {
            return;
        }
        let mut saver = None;
        let mut batches: BTreeMap<Receiver, (Vec<v1::Message>, usize)> = BTreeMap::new();
        // Publishers and announcers are answered when everything is on its way.
        let mut replies = Vec::new();
        let mut announced = Vec::new();
        for output in outputs.drain(..) {
            match output {
                Output::Ask { tag, op } => {
                    let saver = saver.get_or_insert_with(|| self.deps.directory.saver());
                    self.asks.push(ask(saver, tag, op));
                }
                Output::Deliver { to, message, broadcast: None } => {
                    self.deps.metrics.delivered.inc_by(to.len() as u64);
                    let bytes = message_bytes(&message);
                    // Most go to one: the last gets the message itself.
                    let copies = std::iter::repeat_n(message, to.len());
                    for (receiver, message) in to.into_iter().zip(copies) {
                        let batch = batches.entry(receiver).or_default();
                        batch.0.push(message);
                        batch.1 += bytes;
                        if batch.1 >= DELIVER_BYTES {
                            let (messages, _) = std::mem::take(batch);
                            self.deliver(receiver, messages, String::new());
                        }
                    }
                }
                Output::Deliver { to, message, broadcast: Some(job) } => {
                    self.deps.metrics.delivered.inc_by(to.len() as u64);
                    for receiver in to {
                        // What came before it on its topic goes before it.
                        if let Some((messages, _)) = batches.remove(&receiver) {
                            self.deliver(receiver, messages, String::new());
                        }
                        self.deliver(receiver, vec![message.clone()], job.to_string());
                    }
                }
                Output::Reply { token, published, targets } => replies.push((token, published, targets)),
                Output::Announced { request, index, head, retained } => {
                    announced.push((request, index, head, retained));
                }
                Output::Kick { to, kick } => {
                    self.deps.metrics.kicks.inc();
                    if let Some(outbound) = self.outbounds.get(&to) {
                        outbound.push(attach_down::Body::Kick(kick));
                    }
                }
                Output::Presence(event) => {
                    if self.deps.presence.try_send(event).is_err() {
                        self.deps.metrics.presence.with_label_values(&["dropped"]).inc();
                    }
                }
                Output::Will(message) => {
                    if self.deps.wills.try_send(message).is_err() {
                        self.deps.metrics.wills.with_label_values(&["dropped"]).inc();
                    }
                }
                Output::GaveUp { slot } => {
                    self.deps.metrics.gave_up.inc();
                    tracing::warn!(slot, "gave up a slot: the saver knows a newer owner");
                }
            }
        }
        for (receiver, (messages, _)) in batches {
            if !messages.is_empty() {
                self.deliver(receiver, messages, String::new());
            }
        }
        for (request, index, head, retained) in announced {
            self.announced(request, index, head, retained);
        }
        for (token, published, targets) in replies {
            let code = match published.code() {
                PublishCode::Accepted if published.duplicate => "duplicate",
                PublishCode::Accepted => "accepted",
                PublishCode::NotOwner => "not_owner",
                PublishCode::StoreUnavailable => "store_unavailable",
                PublishCode::Overloaded => "overloaded",
                PublishCode::Refused | PublishCode::Unspecified => "refused",
            };
            self.deps.metrics.published.with_label_values(&[code]).inc();
            if let Some(reply) = self.replies.remove(&token) {
                reply.send(published, targets);
            }
        }
    }

    fn deliver(&self, receiver: Receiver, messages: Vec<v1::Message>, broadcast: String) {
        if let Some(outbound) = self.outbounds.get(&receiver) {
            outbound.push(attach_down::Body::Deliver(v1::Deliver { messages, broadcast }));
        }
    }

    fn measure(&self) {
        let mut all = self.sizes.lock();
        all[self.index] = self.core.sizes();
        if self.index == 0 {
            let metrics = &self.deps.metrics;
            let sum = |size: fn(&Sizes) -> usize| all.iter().map(size).sum::<usize>() as i64;
            metrics.slots.set(sum(|sizes| sizes.slots));
            metrics.slots_not_whole.set(sum(|sizes| sizes.slots_not_whole));
            metrics.topics.set(sum(|sizes| sizes.topics));
            metrics.sessions.set(sum(|sizes| sizes.sessions));
            metrics.unanswered.set(sum(|sizes| sizes.unanswered));
        }
    }
}

fn ask(
    saver: &Result<Exchange<Saving>, PeerError>,
    tag: u64,
    op: saver_request::Op,
) -> BoxFuture<'static, Answer> {
    let call = match saver {
        Ok(saver) => saver.call(v1::SaverRequest { correlation: 0, op: Some(op) }),
        Err(error) => {
            let error = AskError::Unavailable(error.to_string());
            return Box::pin(async move { (tag, Err(error)) });
        }
    };
    Box::pin(async move {
        let answer = match call.await {
            Ok(v1::SaverReply { result: Some(saver_reply::Result::Error(error)), .. }) => {
                Err(AskError::of(error))
            }
            Ok(v1::SaverReply { result: Some(result), .. }) => Ok(result),
            Ok(v1::SaverReply { result: None, .. }) => {
                Err(AskError::Unknown("the saver gave an empty answer".to_owned()))
            }
            Err(error @ CallError::Overloaded(_)) => Err(AskError::Unavailable(error.to_string())),
            Err(error) => Err(AskError::Unknown(error.to_string())),
        };
        (tag, answer)
    })
}
