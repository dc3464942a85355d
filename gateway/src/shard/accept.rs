//! New connections.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::{Interest, Token};

use super::conn::Conn;
use super::timers::{Entry, ticks};
use super::{ACCEPT_BUDGET, Shard};

impl Shard {
    pub(super) fn accept(&mut self, present: Instant) {
        if self.accept_paused_until.is_some_and(|until| present < until) {
            return;
        }
        self.accept_paused_until = None;
        for listener in std::mem::take(&mut self.accept_again) {
            for accepted in 0.. {
                if accepted == ACCEPT_BUDGET {
                    self.accept_again.push(listener);
                    break;
                }
                let (socket, is_websocket) = &self.listeners[listener];
                match socket.accept() {
                    Ok((stream, _)) => {
                        let is_websocket = *is_websocket;
                        if let Err(error) = self.accepted(stream, is_websocket) {
                            tracing::debug!(%error, "connection could not be set up");
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The connection went before it was accepted; the next one may be fine.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept connections, pausing");
                        self.accept_paused_until = Some(present + Duration::from_millis(100));
                        self.accept_again.push(listener);
                        break;
                    }
                }
            }
        }
    }

    pub(super) fn accepted(&mut self, mut stream: mio::net::TcpStream, is_websocket: bool) -> io::Result<()> {
        stream.set_nodelay(true)?;
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let entry = self.conns.vacant_entry();
        let index = entry.key();
        // Both at once, edge-triggered: an idle socket costs no further call for either.
        self.poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        entry.insert(Conn::new(stream, generation, is_websocket, self.now));
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        let deadline = self.now + ticks(Duration::from_millis(self.config.connect_timeout_ms.into()));
        self.timers.add(deadline, Entry { index: index as u32, generation, once: true });
        Ok(())
    }
}
