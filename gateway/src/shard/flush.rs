//! What is queued goes out at the end of a round, or when the socket has room again; who takes nothing is closed.

use std::time::Duration;

use super::timers::{Entry, ticks};
use super::{FLUSH_TURNS, Shard, close, outbound};

impl Shard {
    /// Remembers that a connection has something queued that is to go out at the end of the round.
    pub(super) fn note_queued(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if conn.is_dirty {
            return;
        }
        conn.is_dirty = true;
        self.dirty.push(index);
    }

    pub(super) fn flush_dirty(&mut self) {
        // A socket that took all that was queued may have room for what is behind, which is queued in turn.
        for _ in 0..FLUSH_TURNS {
            for index in std::mem::take(&mut self.dirty) {
                let Some(conn) = self.conns.get_mut(index as usize) else { continue };
                if !conn.is_dirty {
                    continue;
                }
                conn.is_dirty = false;
                if conn.out.as_ref().is_none_or(|out| out.is_blocked) {
                    continue;
                }
                self.flush(index);
                let conn = &self.conns[index as usize];
                let waits = conn
                    .session
                    .as_ref()
                    .is_some_and(|s| s.behind.is_some() || s.waiting.is_some() || s.is_resending());
                if waits && conn.out.is_none() && !conn.is_doomed {
                    self.pump(index);
                }
            }
            if self.dirty.is_empty() {
                break;
            }
        }
    }

    pub(super) fn flush(&mut self, index: u32) {
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        match conn.flush(now) {
            Ok(outbound::Sent::All) => {}
            Ok(outbound::Sent::Queued) => self.watch_write(index),
            Err(_) => self.doom(index),
        }
    }

    /// The socket is full: look whether it has moved when the write timeout is over.
    pub(super) fn watch_write(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if std::mem::replace(&mut conn.is_watched, true) {
            return;
        }
        let generation = conn.generation;
        let deadline = self.now + ticks(Duration::from_millis(self.config.write_timeout_ms.into()));
        self.timers.add(deadline, Entry { index, generation, once: true });
    }

    /// To be closed at the end of the round: closing in the middle of a fan-out would change the list being walked.
    pub(super) fn doom(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if !conn.is_doomed {
            conn.is_doomed = true;
            self.doomed.push(index);
        }
    }

    pub(super) fn bury(&mut self) {
        while let Some(index) = self.doomed.pop() {
            let Some(conn) = self.conns.get_mut(index as usize).filter(|conn| conn.is_doomed) else {
                continue;
            };
            // It takes nothing any more, but what it has sent (acks, a DISCONNECT) is still to be heard.
            (conn.is_doomed, conn.is_deaf, conn.readable) = (false, true, true);
            conn.out = None;
            let generation = conn.generation;
            // What is under way ends with it.
            let pending = conn.session.as_mut().and_then(|session| session.pending.take());
            if let Some(pending) = pending {
                self.release_pending(&pending);
            }
            if self.conns[index as usize].session.as_ref().is_none_or(|session| session.opening.is_none()) {
                self.resume(index);
            }
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                let is_slow = self.conns[index as usize].is_slow;
                let why = if is_slow { close::Reason::SlowConsumer } else { close::Reason::Network };
                self.close(index, why);
            }
        }
    }

    pub(super) fn writable(&mut self, index: u32) {
        let Some(conn) = self.conns.get_mut(index as usize) else { return };
        let Some(out) = &mut conn.out else { return };
        out.is_blocked = false;
        self.flush(index);
        let Some(conn) = self.conns.get(index as usize) else { return };
        if !conn.is_doomed && conn.out.is_none() {
            self.pump(index);
        }
    }
}
