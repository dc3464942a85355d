//! New connections.

use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::{Interest, Token};

use super::conn::Conn;
use super::timers::{Entry, ticks};
use super::{ACCEPT_BUDGET, LISTENERS, Shard};
use crate::listeners::{LiveSettings, Settings};

/// Shortest pause in accepting: then some more are accepted together.
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);

impl Shard {
    pub(super) fn listen(&mut self, id: usize, socket: TcpListener, settings: LiveSettings) {
        let mut socket = mio::net::TcpListener::from_std(socket);
        match self.poll.registry().register(&mut socket, Token(LISTENERS + id), Interest::READABLE) {
            Ok(()) => {
                self.listeners.insert(id, (socket, settings));
            }
            Err(error) => tracing::error!(shard = self.index, %error, "a listener cannot be served"),
        }
    }

    /// Closes the socket; who is in its queue is accepted before that.
    pub(super) fn unlisten(&mut self, id: usize) {
        self.accept_later(id);
        self.accept_paused_until = None;
        self.accept(Instant::now());
        self.listeners.remove(&id);
    }

    /// A listener may have something to accept. Once is enough: while accepting pauses, it says so with each connection.
    pub(super) fn accept_later(&mut self, listener: usize) {
        if !self.accept_again.contains(&listener) {
            self.accept_again.push(listener);
        }
    }

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
                // One that is gone has had its connections accepted before.
                let Some((socket, settings)) = self.listeners.get(&listener) else { break };
                if let Some(wait) = self.shared.admission.wait(present, &self.config) {
                    // What comes faster waits in the kernel's queue, where it costs nothing.
                    self.link.metrics().accept_pauses.inc();
                    self.accept_paused_until = Some(present + wait.max(ACCEPT_PAUSE));
                    self.accept_again.push(listener);
                    break;
                }
                match socket.accept() {
                    Ok((stream, peer)) => {
                        let settings = settings.load_full();
                        if let Err(error) = self.accepted(stream, peer.ip(), &settings) {
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

    pub(super) fn accepted(
        &mut self,
        mut stream: mio::net::TcpStream,
        address: IpAddr,
        settings: &Arc<Settings>,
    ) -> io::Result<()> {
        let Some(source) = self.enter(address, settings.proxy_protocol) else { return Ok(()) };
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let entry = self.conns.vacant_entry();
        let index = entry.key();
        // Both at once, edge-triggered: an idle socket costs no further call for either.
        self.poll
            .registry()
            .register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)
            .inspect_err(|_| self.shared.admission.leave(source))?;
        entry.insert(Conn::new(stream, generation, settings, source, self.now));
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        let deadline = self.now + ticks(Duration::from_millis(self.config.connect_timeout_ms.into()));
        self.timers.add(deadline, Entry { index: index as u32, generation, once: true });
        self.note_pending(index as u32, generation);
        Ok(())
    }
}
