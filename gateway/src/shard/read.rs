//! From a readable socket to packets.

use std::io::{ErrorKind, Read};

use super::Shard;
use super::close::Reason;
use super::conn::Phase;
use crate::codec::{self, DecodeError, Packet};
use crate::websocket::{self, End, Handshake};

/// Reads of one connection in one round before the others get their turn.
const READ_BUDGET: usize = 8;

impl Shard {
    pub(super) fn readable(&mut self, index: u32) {
        self.read(index, false);
    }

    /// `may_shake_hands`: else a TLS handshake waits for its turn.
    pub(super) fn read(&mut self, index: u32, may_shake_hands: bool) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for turn in 0.. {
            let Some(conn) = self.conns.get_mut(index as usize) else { break };
            if conn.is_paused || conn.is_doomed {
                conn.readable = true;
                break;
            }
            if conn.phase == Phase::Securing && !may_shake_hands {
                self.handshakes.push_back((index, conn.generation));
                break;
            }
            if turn == READ_BUDGET {
                // Edge-triggered: nobody would say again that there is more.
                conn.readable = true;
                let id = self.id(index);
                self.link.shard(self.index).post(crate::event::Event::Proceed { conn: id });
                break;
            }
            match conn.stream.read(&mut buffer) {
                Ok(0) => {
                    self.close(index, Reason::Network);
                    break;
                }
                Ok(count) => {
                    conn.last_read = self.now;
                    self.received(index, &mut buffer[..count]);
                    // A read that did not fill the buffer has emptied the socket, but for the end that may be behind it.
                    let ends = self.conns.get(index as usize).is_some_and(|conn| conn.has_hung_up);
                    if count < buffer.len() && !ends {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.close(index, Reason::Network);
                    break;
                }
            }
        }
        self.buffer = buffer;
    }

    /// Goes on reading a connection that was paused.
    pub(super) fn resume(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        conn.is_paused = false;
        if let Some(partial) = conn.partial.take() {
            self.mqtt(index, &partial);
        }
        if let Some(conn) = self.conns.get_mut(index as usize)
            && !conn.is_paused
            && std::mem::take(&mut conn.readable)
        {
            self.readable(index);
        }
    }

    pub(super) fn received(&mut self, index: u32, bytes: &mut [u8]) {
        let conn = &self.conns[index as usize];
        match conn.phase {
            Phase::Proxied => self.proxied(index, bytes),
            Phase::Securing => self.secured(index, bytes),
            _ if conn.is_tls() => self.secured(index, bytes),
            _ => {
                self.counts.bytes_in += bytes.len() as u64;
                self.clear(index, bytes);
            }
        }
    }

    /// Bytes as they are inside of TLS.
    pub(super) fn clear(&mut self, index: u32, bytes: &mut [u8]) {
        let conn = &self.conns[index as usize];
        if conn.phase == Phase::Upgrading {
            return self.upgrade(index, bytes);
        }
        if !conn.is_websocket() {
            return self.with_partial(index, bytes);
        }
        self.unframe(index, bytes);
    }

    fn upgrade(&mut self, index: u32, bytes: &[u8]) {
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        let mut request = conn.partial.take().map_or_else(Vec::new, |partial| *partial);
        request.extend_from_slice(bytes);
        match websocket::handshake(&request) {
            Handshake::Incomplete => conn.partial = Some(Box::new(request)),
            Handshake::Accept { consumed, response } => {
                conn.phase = Phase::Connecting;
                if conn.send_raw(&response, now).is_err() {
                    return self.close(index, Reason::Network);
                }
                conn.layers.get_or_insert_default().websocket = Some(websocket::Decoder::new());
                if consumed < request.len() {
                    self.unframe(index, &mut request[consumed..]);
                }
            }
            Handshake::Refuse { response, error } => {
                tracing::debug!(%error, "websocket refused");
                let _ = conn.send_raw(&response, now);
                self.close(index, Reason::Malformed);
            }
        }
    }

    fn unframe(&mut self, index: u32, bytes: &mut [u8]) {
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        let Some(decoder) = conn.websocket() else { return };
        let mut replies = Vec::new();
        let decoded = decoder.decode(bytes, self.config.max_packet_bytes.saturating_add(1024), &mut replies);
        if !decoded.data.is_empty() {
            self.with_partial(index, &bytes[decoded.data]);
        }
        let Some(conn) = self.conns.get_mut(index as usize) else { return };
        if !replies.is_empty() {
            let sent = conn.send_raw(&replies, now);
            self.after_send(index, sent);
        }
        match decoded.end {
            None => {}
            Some(End::Closed(_)) => self.close(index, Reason::Network),
            Some(End::Error(error)) => {
                tracing::debug!(%error, "websocket closed");
                self.close(index, Reason::Malformed);
            }
        }
    }

    /// Puts what came before a packet was complete in front.
    fn with_partial(&mut self, index: u32, bytes: &[u8]) {
        let conn = &mut self.conns[index as usize];
        match conn.partial.take() {
            None if conn.is_paused => conn.partial = Some(Box::new(bytes.to_vec())),
            None => self.mqtt(index, bytes),
            Some(mut partial) => {
                partial.extend_from_slice(bytes);
                // A packet that comes in many pieces is put together in one buffer, not copied with each of them.
                let incomplete =
                    matches!(codec::frame(&partial, self.config.max_packet_bytes as usize), Ok(None));
                if conn.is_paused || incomplete {
                    conn.partial = Some(partial);
                } else {
                    self.mqtt(index, &partial);
                }
            }
        }
    }

    /// Handles all complete packets; keeps what is left.
    fn mqtt(&mut self, index: u32, mut bytes: &[u8]) {
        loop {
            let Some(conn) = self.conns.get_mut(index as usize) else { return };
            if conn.is_doomed || conn.is_paused {
                break;
            }
            let length = match codec::frame(bytes, self.config.max_packet_bytes as usize) {
                Ok(Some(length)) => length,
                Ok(None) => break,
                Err(error) => return self.malformed(index, &error),
            };
            let version = (conn.phase != Phase::Connecting).then_some(conn.version);
            let generation = conn.generation;
            match codec::decode(&bytes[..length], version) {
                Ok(packet) => self.packet(index, packet),
                Err(error) => {
                    if version.is_none() {
                        let answer_in = codec::connect_version(&bytes[..length]);
                        return self.malformed_connect(index, answer_in, &error);
                    }
                    return self.malformed(index, &error);
                }
            }
            if self.conns.get(index as usize).is_none_or(|conn| conn.generation != generation) {
                return;
            }
            bytes = &bytes[length..];
        }
        if !bytes.is_empty() {
            self.conns[index as usize].partial = Some(Box::new(bytes.to_vec()));
        }
    }

    fn malformed(&mut self, index: u32, error: &DecodeError) {
        let conn = &self.conns[index as usize];
        tracing::debug!(peer = %conn.peer(), %error, "malformed packet");
        if conn.phase == Phase::Connecting {
            return self.close(index, Reason::Malformed);
        }
        self.close(index, Reason::ProtocolError { reason: error.reason_code(), text: error.to_string() });
    }

    fn packet(&mut self, index: u32, packet: Packet<'_>) {
        match packet {
            Packet::Connect(connect) => self.connect(index, &connect),
            Packet::Publish(publish) => self.publish(index, &publish),
            Packet::PubAck(ack) => self.acked(index, ack.packet_id),
            Packet::PubRec(ack) => self.pubrec(index, &ack),
            Packet::PubRel(ack) => self.pubrel(index, ack.packet_id),
            Packet::PubComp(ack) => self.pubcomp(index, ack.packet_id),
            Packet::Subscribe(subscribe) => self.subscribe(index, &subscribe),
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(index, &unsubscribe),
            Packet::PingReq => {
                self.scratch.clear();
                codec::pingresp(&mut self.scratch);
                self.reply(index);
            }
            Packet::Disconnect(disconnect) => self.disconnect(index, &disconnect),
            Packet::Auth(_) => self.close(
                index,
                Reason::ProtocolError {
                    reason: codec::reason::PROTOCOL_ERROR,
                    text: "enhanced authentication is not supported".to_owned(),
                },
            ),
        }
    }

    /// Sends what is in `scratch`.
    pub(super) fn reply(&mut self, index: u32) {
        let (round, now) = (self.round, self.now);
        self.counts.bytes_out += self.scratch.len() as u64;
        let sent = self.conns[index as usize].send(&self.scratch, round, now);
        self.after_send(index, sent);
    }

    pub(super) fn after_send(&mut self, index: u32, sent: std::io::Result<super::outbound::Sent>) {
        // Deliveries stop at the limit; what goes beyond it are answers to a device that asks and does not read.
        if self.conns[index as usize].outbound_bytes() > 2 * self.config.max_outbound_bytes as usize {
            self.conns[index as usize].is_slow = true;
            return self.doom(index);
        }
        match sent {
            Ok(super::outbound::Sent::All) => {}
            Ok(super::outbound::Sent::Queued) => {
                if self.conns[index as usize].out.as_ref().is_some_and(|out| out.is_blocked) {
                    self.watch_write(index);
                } else {
                    self.note_queued(index);
                }
            }
            Err(_) => self.doom(index),
        }
    }
}
