//! What the timer wheel brings up: connections whose time may be over.

use std::time::Duration;

use super::timers::{Entry, Tick, millis, ticks};
use super::{Shard, close};

impl Shard {
    /// Looks at a connection's deadlines.
    pub(super) fn look_at(&mut self, entry: Entry) {
        let Some(conn) = self.conns.get_mut(entry.index as usize) else { return };
        if conn.generation != entry.generation {
            return;
        }
        if entry.once && conn.out.is_none() {
            conn.is_watched = false;
        }
        let now = self.now;
        let connect_deadline =
            conn.accepted + ticks(Duration::from_millis(self.config.connect_timeout_ms.into()));
        let mut next = None;
        let mut soonest = |deadline: Tick, extra: bool| {
            if extra == entry.once {
                next = Some(next.map_or(deadline, |next: Tick| next.min(deadline)));
            }
        };
        if conn.session.is_none() {
            if now >= connect_deadline {
                return self.close(entry.index, close::Reason::ConnectTimeout);
            }
            soonest(connect_deadline, true);
        }
        if conn.keep_alive > 0 {
            // One and a half times the keep-alive (MQTT 5.0 §3.1.2.10).
            let deadline = conn.last_read + ticks(Duration::from_millis(u64::from(conn.keep_alive) * 1500));
            if now >= deadline && !conn.is_paused {
                return self.close(entry.index, close::Reason::KeepAliveTimeout);
            }
            soonest(deadline.max(now + 10), false);
        }
        if let Some(out) = &conn.out {
            let deadline = out.progressed + ticks(Duration::from_millis(self.config.write_timeout_ms.into()));
            if now >= deadline {
                return self.close(entry.index, close::Reason::WriteTimeout);
            }
            soonest(deadline, true);
        }
        if let Some(session) = &mut conn.session
            && session.publishing.as_ref().is_some_and(|publishing| publishing.is_idle(millis(now)))
        {
            session.publishing = None;
        }
        if let Some(session) = &conn.session
            && session.expires != 0
        {
            let left_ms = session.expires.saturating_mul(1000).saturating_sub(self.now_ms);
            if left_ms == 0 {
                return self.close(entry.index, close::Reason::TokenExpired);
            }
            soonest(now.saturating_add(ticks(Duration::from_millis(left_ms))), false);
        }
        if let Some(next) = next {
            self.timers.add(next, entry);
        }
    }
}
