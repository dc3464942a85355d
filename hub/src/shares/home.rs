//! The task of one share: its session at the saver, its members' streams, and the rules of [`super::share`] between.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::{now_ms, v1};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use v1::{saver_error, shares_down};

use super::batches::{Batches, Outlet};
use super::session::Session;
use super::share::{MemberId, Share};
use super::{HomeHandle, Shared};
use crate::peers::PeerError;
use crate::receivers::Inlet;

/// Commands and messages handled in one turn.
const TURN: usize = 256;
/// After the saver could not be asked, before it is asked again.
const RETRY: Duration = Duration::from_millis(200);
/// How often the logs are looked at, whether or not anything was missed; it also shows the saver that the share lives.
const REFRESH: Duration = Duration::from_secs(30);
/// Before a share moves nothing is handed out for so long at most.
const FINISHING: Duration = Duration::from_secs(2);
/// How long members whose stream was lost count as away at least: their gateway may be there, and comes back.
const LOST_SECONDS: u32 = 30;

pub enum Command {
    Join {
        id: MemberId,
        window: usize,
        expiry_seconds: u32,
        outlet: Outlet,
    },
    Leave {
        id: MemberId,
        kept_seconds: u32,
    },
    Done {
        id: MemberId,
        token: u64,
    },
    Busy {
        id: MemberId,
        token: u64,
    },
    Ready {
        id: MemberId,
    },
    /// The gateway's stream has ended, and with it its members.
    StreamEnded {
        stream: u64,
    },
}

struct Member {
    outlet: Outlet,
    expiry_seconds: u32,
}

pub struct Home {
    shared: Arc<Shared>,
    key: Arc<str>,
    filter: Arc<str>,
    commands: mpsc::UnboundedReceiver<Command>,
    live: mpsc::Receiver<v1::Message>,
    refresh: Arc<Notify>,
    session: Session,
    share: Share,
    members: HashMap<MemberId, Member>,
    /// Until when the share is kept for members that are away, Unix time.
    kept_until_ms: u64,
    /// It has grown, and is to be written.
    is_unwritten: bool,
    asked: FuturesUnordered<BoxFuture<'static, Answered>>,
    is_acking: bool,
    is_refreshing: bool,
    is_writing: bool,
    /// It is to move.
    is_leaving: bool,
    /// … and hands nothing out until this: its members finish what they have.
    finishing_until: Option<Instant>,
    /// The saver failed: nothing is asked before this.
    pause_until: Option<Instant>,
    // What was added to the gauges.
    shown: (i64, i64),
}

enum Answered {
    Positions(Result<Vec<v1::Backlog>, PeerError>),
    Read(Arc<str>, Result<v1::ReadReply, PeerError>),
    /// With the positions, to be tried again.
    Acked(Result<(), PeerError>, Vec<v1::AckPosition>),
    Written(Result<(), PeerError>),
}

/// Why a home ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// No members are left.
    Empty,
    /// The share is at home elsewhere, or must begin anew.
    Lost,
    Stopped,
}

impl Home {
    pub fn new(shared: Arc<Shared>, key: Arc<str>, filter: Arc<str>) -> (HomeHandle, Home) {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (inlet, live) = Inlet::new(shared.metrics.dropped.clone());
        let refresh = inlet.refresh.clone();
        let limits = shared.config.borrow().shares.limits();
        let handle = HomeHandle { commands, filter: filter.clone(), inlet };
        let home = Home {
            // No home uses a million tokens in a millisecond: none is used twice, whichever home gave it.
            share: Share::new(limits, now_ms() << 20),
            session: Session::new(shared.clone(), key.clone(), filter.clone()),
            shared,
            key,
            filter,
            commands: inbox,
            live,
            refresh,
            members: HashMap::new(),
            kept_until_ms: 0,
            is_unwritten: false,
            asked: FuturesUnordered::new(),
            is_acking: false,
            is_refreshing: false,
            is_writing: false,
            is_leaving: false,
            finishing_until: None,
            pause_until: None,
            shown: (0, 0),
        };
        (handle, home)
    }

    pub async fn run(mut self) {
        let stop = self.shared.stop.clone();
        loop {
            let opened = tokio::select! {
                opened = self.open() => opened,
                () = stop.cancelled() => return,
            };
            let end = if opened { self.serve().await } else { End::Lost };
            tracing::debug!(share = %self.key, ?end, "a shared subscription is not served here any more");
            match end {
                End::Empty => {
                    if self.close().await {
                        return;
                    }
                }
                End::Lost => {
                    self.last_acks().await;
                    if self.lost() {
                        return;
                    }
                }
                End::Stopped => {
                    self.last_acks().await;
                    return;
                }
            }
        }
    }

    /// Waits until the owners route to us, and takes the share's session. False: the share is not ours.
    async fn open(&mut self) -> bool {
        loop {
            if !self.shared.ownership.owns(&self.key) {
                return false;
            }
            if self.shared.receivers.is_routed(&self.filter) {
                match self.try_open().await {
                    Ok(()) => return true,
                    Err(error) => {
                        tracing::warn!(share = %self.key, %error, "a shared subscription cannot be opened, trying again");
                        tokio::time::sleep(RETRY).await;
                    }
                }
            } else {
                let _ = tokio::time::timeout(RETRY / 10, self.refresh.notified()).await;
            }
        }
    }

    async fn try_open(&mut self) -> Result<(), PeerError> {
        let (record, positions) = self.session.open().await?;
        self.kept_until_ms = self.kept_until_ms.max(record.kept_until_ms);
        self.share.skip(record.settled);
        self.place(positions);
        Ok(())
    }

    fn place(&mut self, positions: Vec<v1::Backlog>) {
        for position in positions {
            self.share.position(&position.topic, position.after, position.head);
        }
    }

    async fn serve(&mut self) -> End {
        let stop = self.shared.stop.clone();
        let mut slots = self.shared.slots();
        let mut config = self.shared.config.clone();
        let mut refresh_at = tokio::time::interval_at(Instant::now() + REFRESH, REFRESH);
        let mut due_refresh = false;
        let mut commands = Vec::with_capacity(TURN);
        let mut messages = Vec::with_capacity(TURN);
        let mut is_routed = self.shared.receivers.is_routed(&self.filter);
        self.look_whether_it_leaves();
        loop {
            let (pause, finishing) = (self.pause_until, self.finishing_until);
            // A message on a topic that is new to the share says that all before it was seen. So after a gap, which is what a
            // refresh is for, the cursors are asked for first.
            let is_whole = !due_refresh && !self.is_refreshing && is_routed;
            tokio::select! {
                biased;
                () = self.refresh.notified() => due_refresh = true,
                count = self.commands.recv_many(&mut commands, TURN) => {
                    if count == 0 {
                        return End::Stopped;
                    }
                    for command in commands.drain(..) {
                        if let Some(joined) = self.handle(command) {
                            self.answer_joined(joined);
                        }
                    }
                }
                Some(answered) = self.asked.next() => {
                    if let Err(end) = self.answered(answered) {
                        return end;
                    }
                }
                _ = refresh_at.tick() => due_refresh = true,
                Ok(()) = slots.changed() => {
                    slots.borrow_and_update();
                    if !self.shared.ownership.owns(&self.key) {
                        return End::Lost;
                    }
                    self.look_whether_it_leaves();
                }
                () = tokio::time::sleep_until(finishing.unwrap_or_else(Instant::now)), if finishing.is_some() => {
                    // The keepers may be away: then it goes on.
                    self.finishing_until = None;
                }
                Ok(()) = config.changed() => {
                    let limits = config.borrow_and_update().shares.limits();
                    self.share.set_limits(limits);
                }
                () = tokio::time::sleep_until(pause.unwrap_or_else(Instant::now)), if pause.is_some() => {
                    self.pause_until = None;
                }
                // Nothing says for sure when it is again: a refresh is due just before a route counts, and the registry
                // that was waited for may have gone.
                () = tokio::time::sleep(RETRY), if !is_routed => {}
                () = stop.cancelled() => return End::Stopped,
                _ = self.live.recv_many(&mut messages, TURN), if is_whole => {
                    for message in messages.drain(..) {
                        self.share.offer(message);
                    }
                }
            }
            let was_routed = is_routed;
            is_routed = self.shared.receivers.is_routed(&self.filter);
            // What was stored meanwhile may never have been sent to us.
            due_refresh |= is_routed && !was_routed;
            if due_refresh && !self.is_refreshing && self.pause_until.is_none() {
                (due_refresh, self.is_refreshing) = (false, true);
                let positions = self.session.positions();
                self.asked.push(Box::pin(async move { Answered::Positions(positions.await) }));
            }
            self.act();
            if self.members.is_empty() && self.commands.is_empty() {
                if stop.is_cancelled() {
                    return End::Stopped;
                }
                return End::Empty;
            }
        }
    }

    fn look_whether_it_leaves(&mut self) {
        let is_leaving = self.shared.ownership.leaves(&self.key);
        if is_leaving != std::mem::replace(&mut self.is_leaving, is_leaving) {
            self.finishing_until = is_leaving.then(|| Instant::now() + FINISHING);
        }
    }

    /// Some: a member that has joined, and is to be told so.
    fn handle(&mut self, command: Command) -> Option<MemberId> {
        match command {
            Command::Join { id, window, expiry_seconds, outlet } => {
                self.share.join(id, window);
                self.members.insert(id, Member { outlet, expiry_seconds });
                return Some(id);
            }
            Command::Leave { id, kept_seconds } => {
                if self.members.remove(&id).is_some() {
                    self.keep_for(kept_seconds);
                }
                self.share.leave(id);
            }
            Command::Done { id, token } => self.share.done(id, token),
            Command::Busy { id, token } => self.share.busy(id, token),
            Command::Ready { id } => self.share.ready(id),
            Command::StreamEnded { stream } => {
                let gone: Vec<MemberId> =
                    self.members.keys().filter(|(of, _)| *of == stream).copied().collect();
                for id in gone {
                    if let Some(member) = self.members.remove(&id) {
                        self.keep_for(member.expiry_seconds.max(LOST_SECONDS));
                    }
                    self.share.leave(id);
                }
            }
        }
        None
    }

    fn keep_for(&mut self, seconds: u32) {
        let until = now_ms().saturating_add(u64::from(seconds) * 1000);
        if seconds > 0 && until > self.kept_until_ms {
            self.kept_until_ms = until;
            self.is_unwritten = true;
        }
    }

    fn answer_joined(&mut self, id: MemberId) {
        if let Some(member) = self.members.get(&id) {
            let joined = shares_down::Body::Joined(v1::Joined { member: id.1 });
            let _ = member.outlet.send(Ok(v1::SharesDown { body: Some(joined) }));
        }
    }

    /// Gives members what they have room for: what goes to one gateway goes together.
    fn hand_out(&mut self) {
        let mut assigned = Vec::new();
        self.share.assign(now_ms(), &mut assigned);
        let mut batches = Batches::default();
        for one in assigned {
            let attempt = if one.again { "again" } else { "first" };
            self.shared.metrics.assigned.with_label_values(&[attempt]).inc();
            if let Some(member) = self.members.get(&one.to) {
                batches.add(&member.outlet, one);
            }
        }
        batches.send();
    }

    /// Hands out what can be, asks for what is to be read, and has the cursors moved.
    fn act(&mut self) {
        if self.finishing_until.is_none() {
            self.hand_out();
        }
        self.shared.metrics.dropped.inc_by(std::mem::take(&mut self.share.dropped));
        self.show();
        if self.pause_until.is_some() {
            return;
        }
        for wanted in self.share.reads() {
            self.shared.metrics.reads.inc();
            let directory = self.shared.directory.clone();
            let read = v1::Read {
                topic: wanted.topic.to_string(),
                after: wanted.after,
                limit: wanted.limit,
                max_bytes: 0,
            };
            self.asked
                .push(Box::pin(async move { Answered::Read(wanted.topic, directory.read(read).await) }));
        }
        if !self.is_acking {
            let positions = self.share.acks();
            if !positions.is_empty() {
                self.is_acking = true;
                let acked = self.session.ack(positions.clone());
                self.asked.push(Box::pin(async move { Answered::Acked(acked.await, positions) }));
            }
        }
        if self.is_unwritten && !self.is_writing {
            (self.is_unwritten, self.is_writing) = (false, true);
            let written = self.session.write(&self.record(Vec::new()));
            self.asked.push(Box::pin(async move { Answered::Written(written.await) }));
        }
    }

    fn record(&self, settled: Vec<v1::SettledBeyond>) -> v1::ShareRecord {
        v1::ShareRecord { kept_until_ms: self.kept_until_ms, settled }
    }

    fn answered(&mut self, answered: Answered) -> Result<(), End> {
        let error = match answered {
            Answered::Positions(result) => {
                self.is_refreshing = false;
                match result {
                    Ok(positions) => {
                        self.place(positions);
                        return Ok(());
                    }
                    Err(error) => {
                        self.refresh.notify_one();
                        error
                    }
                }
            }
            Answered::Read(topic, Ok(reply)) => {
                self.share.read(&topic, Some(reply));
                return Ok(());
            }
            Answered::Read(topic, Err(error)) => {
                self.share.read(&topic, None);
                error
            }
            Answered::Acked(result, positions) => {
                self.is_acking = false;
                let Err(error) = result else { return Ok(()) };
                self.share.unacked(&positions);
                error
            }
            Answered::Written(result) => {
                self.is_writing = false;
                let Err(error) = result else { return Ok(()) };
                self.is_unwritten = true;
                error
            }
        };
        if matches!(&error, PeerError::Saver { code: saver_error::Code::SessionMoved, .. }) {
            tracing::info!(share = %self.key, "another instance has the session of a shared subscription");
            return Err(End::Lost);
        }
        tracing::debug!(share = %self.key, %error, "the saver could not be asked, trying again");
        self.pause_until = Some(Instant::now() + RETRY);
        Ok(())
    }

    /// The last member has gone: the session is kept for those that are away, or is over. False: somebody has joined
    /// meanwhile.
    async fn close(&mut self) -> bool {
        self.last_acks().await;
        let kept_ms = self.kept_until_ms.saturating_sub(now_ms());
        let expiry = u32::try_from(kept_ms.div_ceil(1000)).unwrap_or(u32::MAX);
        if let Err(error) = self.session.close(expiry).await {
            tracing::debug!(share = %self.key, %error, "the session of a shared subscription could not be closed");
        }
        self.forget();
        let commands = &self.commands;
        self.shared.end(&self.key, || !commands.is_empty())
    }

    /// Its members are to join elsewhere. False: one joined here meanwhile, when the share had become ours again.
    fn lost(&mut self) -> bool {
        loop {
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command);
            }
            for (id, member) in self.members.drain() {
                let lost = shares_down::Body::Lost(v1::MemberLost { member: id.1 });
                let _ = member.outlet.send(Ok(v1::SharesDown { body: Some(lost) }));
            }
            self.forget();
            let commands = &self.commands;
            if self.shared.end(&self.key, || !commands.is_empty()) {
                return true;
            }
        }
    }

    /// Nothing of what was in memory is true any more; what is stored is in the logs.
    fn forget(&mut self) {
        let limits = self.shared.config.borrow().shares.limits();
        self.share = Share::new(limits, now_ms() << 20);
        self.asked = FuturesUnordered::new();
        (self.is_acking, self.is_refreshing, self.is_writing) = (false, false, false);
        self.pause_until = None;
        self.show();
    }

    async fn last_acks(&mut self) {
        while self.is_acking || self.is_writing {
            let Some(answered) = self.asked.next().await else { break };
            // What failed is among what is written now.
            let _ = self.answered(answered);
        }
        let positions = self.share.acks();
        let settled = self.share.settled_beyond();
        let goes_on = !self.members.is_empty() || self.kept_until_ms > now_ms();
        if (self.is_unwritten || (!settled.is_empty() && goes_on))
            && let Err(error) = self.session.write(&self.record(settled)).await
        {
            tracing::debug!(share = %self.key, %error, "the record of a share could not be written");
        }
        if !positions.is_empty()
            && let Err(error) = self.session.ack(positions).await
        {
            tracing::debug!(share = %self.key, %error, "the last cursors of a share could not be moved");
        }
    }

    fn show(&mut self) {
        let now = (self.share.members() as i64, self.share.waiting() as i64);
        self.shared.metrics.members.add(now.0 - self.shown.0);
        self.shared.metrics.waiting.add(now.1 - self.shown.1);
        self.shown = now;
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.shared.metrics.members.sub(self.shown.0);
        self.shared.metrics.waiting.sub(self.shown.1);
    }
}
