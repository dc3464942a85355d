//! A device's life from its TCP handshake on: CONNECT, SUBSCRIBE, pings, what it receives, and how it ends.

use std::io;

use super::{Crowd, State, reason};
use crate::mqtt;
use crate::swarm::status::Received;
use crate::swarm::sys::{self, ENDED, READABLE, WRITABLE};
use crate::swarm::wire::{self, Kind, Split, Stamp};

impl Crowd {
    /// Churn: ends connections in all the ways in which devices end them, and makes them again at once.
    pub(super) fn churn(&mut self, now: u64) {
        let elapsed = now - std::mem::replace(&mut self.churned_ms, now);
        if self.options.churn_per_second == 0.0 || !self.ramped() || self.stopped() {
            return;
        }
        self.churn_due += self.options.churn_per_second * elapsed as f64 / 1000.0;
        while self.churn_due >= 1.0 {
            self.churn_due -= 1.0;
            let talking = u64::from(self.next - self.options.silent.min(self.next));
            let index = self.options.silent + self.random(talking) as u32;
            let Some(device) = self.devices.get_mut(index as usize) else { return };
            if device.state != State::Ready {
                continue;
            }
            let fd = std::mem::replace(&mut device.fd, -1);
            device.state = State::Closed;
            device.rest = None;
            self.status.ready -= 1;
            self.status.churned += 1;
            match self.status.churned % 3 {
                0 => {
                    // If it cannot be sent any more, then it ends as the next kind does.
                    let _ = sys::send(fd, &wire::DISCONNECT);
                    sys::close(fd, false);
                }
                1 => sys::close(fd, false),
                _ => sys::close(fd, true),
            }
            self.connect(index, now);
        }
    }

    /// Ends every connection that is there, and begins to make all of them again before it looks at anything else.
    pub(super) fn cut(&mut self) {
        let now = self.now_ms();
        self.cut_ms = Some(now);
        self.options.window = u32::MAX;
        self.status.settled = false;
        let ready: Vec<u32> =
            (0..self.next).filter(|&index| self.devices[index as usize].state == State::Ready).collect();
        for &index in &ready {
            let device = &mut self.devices[index as usize];
            let fd = std::mem::replace(&mut device.fd, -1);
            device.state = State::Closed;
            device.rest = None;
            self.status.ready -= 1;
            self.status.cut += 1;
            sys::close(fd, true);
        }
        for index in ready {
            self.connect(index, self.now_ms());
        }
    }

    /// Pings, and connects again.
    pub(super) fn due(&mut self, now: u64) {
        while let Some(entries) = self.wheel.due(now) {
            for (index, generation) in entries {
                let device = &self.devices[index as usize];
                if device.generation != generation {
                    continue;
                }
                match device.state {
                    State::Ready => {
                        self.status.pings += 1;
                        match sys::send(device.fd, &wire::PINGREQ) {
                            Ok(()) => self.plan_ping(index, now),
                            Err(error) => self.end(index, &reason(&error), false),
                        }
                    }
                    State::Closed if self.stopped() => {}
                    State::Closed if self.status.pending < self.options.window => self.connect(index, now),
                    State::Closed => self.retry(index),
                    _ => {}
                }
            }
        }
    }

    /// A device's keep-alive, seconds: always the same one, spread over what is wanted.
    fn keep_alive(&self, index: u32) -> u16 {
        let (low, high) = self.options.keep_alive;
        let spread = u32::from(high.saturating_sub(low)) + 1;
        low + (index.wrapping_mul(2_654_435_761) % spread) as u16
    }

    fn plan_ping(&mut self, index: u32, now: u64) {
        let keep_alive = u64::from(self.keep_alive(index));
        if keep_alive > 0 && index >= self.options.silent {
            // A little within it, as it must be (MQTT 5.0 §3.1.2.10).
            self.wheel.plan(now + keep_alive * 950, (index, self.devices[index as usize].generation));
        }
    }

    pub(super) fn happened(&mut self, index: u32, generation: u16, flags: u32) {
        let Some(device) = self.devices.get_mut(index as usize) else { return };
        if device.generation != generation || device.state == State::Closed {
            return;
        }
        if device.state == State::Connecting {
            if let Some(error) = sys::connect_error(device.fd) {
                self.end(index, &reason(&error), false);
                return;
            }
            if flags & WRITABLE == 0 {
                return;
            }
            let name = format!("d{}", self.options.first + u64::from(index));
            let (version, keep_alive) = (self.options.version, self.keep_alive(index));
            let packet = if self.options.kept {
                mqtt::Connect { keep_alive, ..mqtt::Connect::kept(version, &name) }.bytes()
            } else {
                mqtt::connect(version, &name, keep_alive)
            };
            if index < self.options.silent {
                self.devices[index as usize].since_ms = self.now_ms() as u32;
            }
            if !self.advance(index, State::Greeting, &packet) {
                return;
            }
        }
        if flags & (READABLE | ENDED) != 0 {
            let mut buffer = std::mem::take(&mut self.buffer);
            self.receive(index, &mut buffer, flags & ENDED != 0);
            self.buffer = buffer;
        }
    }

    pub(super) fn advance(&mut self, index: u32, state: State, packet: &[u8]) -> bool {
        let device = &mut self.devices[index as usize];
        device.state = state;
        match sys::send(device.fd, packet) {
            Ok(()) => true,
            Err(error) => {
                self.end(index, &reason(&error), false);
                false
            }
        }
    }

    fn receive(&mut self, index: u32, buffer: &mut [u8], ended: bool) {
        loop {
            let device = &mut self.devices[index as usize];
            let mut length = 0;
            if let Some(rest) = device.rest.take() {
                length = rest.len();
                buffer[..length].copy_from_slice(&rest);
            }
            let count = match sys::read(device.fd, &mut buffer[length..]) {
                Ok(0) => return self.ended(index, "closed by the gateway"),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    device.rest = (length > 0).then(|| Box::new(buffer[..length].to_vec()));
                    return;
                }
                Err(error) => return self.ended(index, &reason(&error)),
            };
            let full = length + count == buffer.len();
            length += count;
            let mut begin = 0;
            loop {
                match wire::split(&buffer[begin..length]) {
                    Split::Packet(first, body, used) => {
                        if !self.packet(index, first, body) {
                            return;
                        }
                        begin += used;
                    }
                    Split::Incomplete if begin == 0 && full => {
                        return self.end(index, "a packet is longer than 64 KiB", true);
                    }
                    Split::Incomplete => break,
                    Split::Malformed => return self.end(index, "what came is not MQTT", true),
                }
            }
            if begin < length {
                self.devices[index as usize].rest = Some(Box::new(buffer[begin..length].to_vec()));
            }
            // Less than there was room for: the socket is empty. What comes after is another event, but not an end
            // that has been told already.
            if !full && !ended {
                return;
            }
        }
    }

    /// The gateway has ended the connection.
    fn ended(&mut self, index: u32, reason: &str) {
        let device = &self.devices[index as usize];
        if index < self.options.silent && device.state == State::Ready {
            let silence = self.now_ms() as i64 - i64::from(device.since_ms);
            self.status.silent.ended(silence - i64::from(self.keep_alive(index)) * 1500);
            let device = &mut self.devices[index as usize];
            device.state = State::Closed;
            sys::close(std::mem::replace(&mut device.fd, -1), false);
            self.status.ready -= 1;
            self.retry(index);
            return;
        }
        let reason = match device.state {
            State::Greeting => format!("{reason} instead of CONNACK"),
            State::Subscribing => format!("{reason} instead of SUBACK"),
            _ => reason.to_owned(),
        };
        self.end(index, &reason, false);
    }

    /// False: the connection is over.
    fn packet(&mut self, index: u32, first: u8, body: &[u8]) -> bool {
        let state = self.devices[index as usize].state;
        match (first >> 4, state) {
            (2, State::Greeting) => match body.get(1) {
                Some(0) if index < self.options.silent => self.is_ready(index),
                Some(0) => {
                    let inbox = format!("u/d{}", self.options.first + u64::from(index));
                    let filters = [inbox.as_str(), "all"];
                    let packet = wire::subscribe(self.options.version, filters, self.options.qos);
                    return self.advance(index, State::Subscribing, &packet);
                }
                code => {
                    let code = code.copied().unwrap_or(0xFF);
                    self.end(index, &format!("refused: CONNACK says {code:#04x}"), false);
                    return false;
                }
            },
            (9, State::Subscribing) => {
                let codes = &body[body.len().saturating_sub(2)..];
                if let Some(code) = codes.iter().find(|&&code| code >= 0x80) {
                    self.end(index, &format!("refused: SUBACK says {code:#04x}"), false);
                    return false;
                }
                self.is_ready(index);
            }
            (3, State::Ready | State::Subscribing) => return self.published(index, first, body),
            (13, State::Ready) => self.status.pongs += 1,
            (14, _) => {
                // The close that follows says the same, less precisely.
                let code = body.first().copied().unwrap_or(0);
                self.ended(index, &format!("DISCONNECT {code:#04x}"));
                return false;
            }
            _ => {
                self.end(index, &format!("a packet {first:#04x} that was not expected"), true);
                return false;
            }
        }
        true
    }

    fn is_ready(&mut self, index: u32) {
        let now = self.now_ms();
        let device = &mut self.devices[index as usize];
        device.state = State::Ready;
        self.report.connect.record(now.saturating_sub(u64::from(device.since_ms)) * 1000);
        if let Some(cut_ms) = self.cut_ms {
            self.report.back.record((now - cut_ms) * 1000);
        }
        self.status.pending -= 1;
        self.status.ready += 1;
        self.status.connects += 1;
        self.failing_ms = None;
        self.plan_ping(index, now);
    }

    fn published(&mut self, index: u32, first: u8, body: &[u8]) -> bool {
        let Some((packet_id, payload)) = wire::publish(self.options.version, first, body) else {
            self.end(index, "a malformed PUBLISH", true);
            return false;
        };
        let device = &mut self.devices[index as usize];
        if let Some(stamp) = Stamp::of(payload) {
            let (received, round): (&mut Received, &mut u8) = match stamp.kind {
                Kind::Broadcast => (&mut self.report.broadcast, &mut device.broadcast_round),
                Kind::Unicast => (&mut self.report.unicast, &mut device.unicast_round),
            };
            if *round == stamp.round {
                received.repeated += 1;
            } else {
                *round = stamp.round;
                let now = sys::monotonic_ns();
                received.latency.record(now.saturating_sub(stamp.sent_ns) / 1000);
                received.last_ns = now;
            }
        }
        if let Some(packet_id) = packet_id
            && let Err(error) = sys::send(device.fd, &wire::puback(packet_id))
        {
            self.end(index, &reason(&error), false);
            return false;
        }
        true
    }
}
