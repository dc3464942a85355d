//! Which of this shard's devices are sent to other gateways, in which order, and how. When is decided in `drain`.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Shard;
use super::close::Reason;
use super::conn::{Conn, Phase};
use super::timers::{Tick, ticks};
use crate::codec::{self, ConnAckProperties, Version, reason};
use crate::drain::Plan;
use crate::listeners::config::Protocol;

/// How long a device that has something under way may take to end it before it goes all the same.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);
/// A socket whose device was told to go elsewhere is kept this long: one that is dropped with something unread in it
/// takes back what it was to bring the device (RFC 1122 §4.2.2.13).
const LINGER: Duration = Duration::from_secs(1);

/// A job's devices in this shard.
pub struct MoveAway {
    job: u64,
    plan: Plan,
    /// Index and generation; who costs least goes first.
    order: VecDeque<(u32, u32)>,
    /// They have something under way, and since when they have been waited for.
    aside: VecDeque<(u32, u32, Tick)>,
}

impl MoveAway {
    fn left(&self) -> u64 {
        (self.order.len() + self.aside.len()) as u64
    }
}

/// The scheme of the address that a device uses.
fn scheme(conn: &Conn) -> &'static str {
    let protocol = match (conn.is_websocket(), conn.is_tls()) {
        (false, false) => Protocol::Mqtt,
        (false, true) => Protocol::Mqtts,
        (true, false) => Protocol::Ws,
        (true, true) => Protocol::Wss,
    };
    protocol.as_str()
}

/// What moving a device costs: messages or answers under way, then a session that has to be written down and read.
fn cost(conn: &Conn) -> u8 {
    let is_kept = conn.session.as_ref().is_some_and(|session| session.attachment.is_some());
    2 * u8::from(is_busy(conn)) + u8::from(is_kept)
}

/// Something is under way with this device that ends by itself, and soon.
fn is_busy(conn: &Conn) -> bool {
    conn.phase != Phase::Live
        || conn.out.is_some()
        || conn.session.as_ref().is_some_and(|session| {
            session.inflight.is_some()
                || session.waiting.is_some()
                || session.pending.is_some()
                || session.unsubscribing.is_some()
                || session.publishing.as_ref().is_some_and(|publishing| !publishing.queue.is_empty())
        })
}

impl Shard {
    /// Chooses the devices of a job; how many they are.
    pub(super) fn plan_move(&mut self, job: u64, plan: Plan) -> u64 {
        if plan == Plan::All {
            self.end_all_parked();
        }
        let mut chosen: Vec<(u8, u32, u32)> = self
            .conns
            .iter()
            .filter(|(_, conn)| match (plan, &conn.session) {
                (_, None) => false,
                (Plan::All, Some(_)) => true,
                (Plan::Some { connected_before_ms, .. }, Some(session)) => {
                    conn.phase == Phase::Live
                        && conn.version == Version::V5
                        && session.since_ms <= connected_before_ms
                }
            })
            .map(|(index, conn)| (cost(conn), index as u32, conn.generation))
            .collect();
        chosen.sort_unstable();
        if let Plan::Some { count, .. } = plan {
            chosen.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        }
        let order = chosen.into_iter().map(|(_, index, generation)| (index, generation)).collect();
        let moving = MoveAway { job, plan, order, aside: VecDeque::new() };
        let left = moving.left();
        self.shared.moving.left[self.index].store(left, Ordering::Release);
        self.moving = Some(Box::new(moving));
        left
    }

    /// Sends so many devices away; `u64::MAX`: all, whatever they have under way.
    pub(super) fn move_away(&mut self, job: u64, count: u64) {
        let Some(mut moving) = self.moving.take().filter(|moving| moving.job == job) else { return };
        let moved = self.move_some(&mut moving, count);
        self.shared.moving.moved.fetch_add(moved, Ordering::Relaxed);
        if count != u64::MAX {
            self.shared.moving.unused.fetch_add(count - moved, Ordering::Relaxed);
        }
        self.link.metrics().moved.inc_by(moved);
        let (is_done, plan) = (moving.left() == 0, moving.plan);
        self.shared.moving.left[self.index].store(moving.left(), Ordering::Release);
        self.moving = Some(moving);
        if is_done && plan == Plan::All && self.runs(job) {
            // Who was in the middle of a CONNECT when the others were chosen.
            self.plan_move(job, plan);
        }
    }

    /// The job is over, or given up.
    pub(super) fn end_move(&mut self) {
        self.moving = None;
        self.shared.moving.left[self.index].store(0, Ordering::Release);
    }

    fn runs(&self, job: u64) -> bool {
        self.shared.moving.job.load(Ordering::Acquire) == job
    }

    fn move_some(&mut self, moving: &mut MoveAway, count: u64) -> u64 {
        let all = count == u64::MAX;
        let mut moved = 0;
        let patience = ticks(FLUSH_WITHIN);
        // Bounded: with everyone busy, a step must not look at everyone.
        let mut looks = if all { usize::MAX } else { moving.aside.len().min(2 * count as usize + 16) };
        while moved < count && looks > 0 && self.runs(moving.job) {
            let Some((index, generation, since)) = moving.aside.pop_front() else { break };
            looks -= 1;
            let Some(conn) = self.is_there(index, generation) else { continue };
            if all || !is_busy(conn) || self.now.saturating_sub(since) >= patience {
                moved += u64::from(self.move_one(index, moving.plan));
            } else {
                moving.aside.push_back((index, generation, since));
            }
        }
        let mut looks = if all { usize::MAX } else { 4 * count as usize + 16 };
        while moved < count && looks > 0 && self.runs(moving.job) {
            let Some((index, generation)) = moving.order.pop_front() else { break };
            looks -= 1;
            let Some(conn) = self.is_there(index, generation) else { continue };
            if all || !is_busy(conn) {
                moved += u64::from(self.move_one(index, moving.plan));
            } else {
                moving.aside.push_back((index, generation, self.now));
            }
        }
        moved
    }

    fn is_there(&self, index: u32, generation: u32) -> Option<&Conn> {
        self.conns.get(index as usize).filter(|conn| conn.generation == generation)
    }

    /// False: it stays, because there is nowhere to go for it and it need not.
    fn move_one(&mut self, index: u32, plan: Plan) -> bool {
        let conn = &self.conns[index as usize];
        if conn.phase != Phase::Live {
            self.refuse_elsewhere(index);
            return true;
        }
        let to = self.shared.moving.targets.load().pick(scheme(conn)).map(str::to_owned);
        if to.is_none() && plan != Plan::All {
            return false;
        }
        self.close(index, Reason::Moved { to });
        true
    }

    /// New connections go to other gateways.
    pub(super) fn refuses(&self) -> bool {
        self.shared.moving.refuses.load(Ordering::Acquire)
    }

    /// Answers a CONNECT with the address of another gateway, which 3.1.1 cannot say, and closes.
    pub(super) fn refuse_elsewhere(&mut self, index: u32) {
        let conn = &self.conns[index as usize];
        let targets = self.shared.moving.targets.load();
        let properties = ConnAckProperties {
            reason_string: Some("this gateway is draining"),
            server_reference: targets.pick(scheme(conn)),
            ..ConnAckProperties::default()
        };
        self.link.metrics().connects.with_label_values(&["0x9c"]).inc();
        self.scratch.clear();
        codec::connack(&mut self.scratch, conn.version, false, reason::USE_ANOTHER_SERVER, &properties);
        drop(targets);
        self.reply(index);
        self.close(index, Reason::Refused);
    }

    /// Keeps the socket of a device that was told to go until it has heard it.
    pub(super) fn linger(&mut self, stream: mio::net::TcpStream) {
        self.lingering.push_back((self.now + ticks(LINGER), stream));
    }

    pub(super) fn end_lingering(&mut self) {
        while self.lingering.front().is_some_and(|(until, _)| *until <= self.now) {
            self.lingering.pop_front();
        }
        if self.lingering.is_empty() && self.lingering.capacity() > 0 {
            self.lingering = VecDeque::new();
        }
    }
}
