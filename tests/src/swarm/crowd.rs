//! The loop of a swarm: connects its devices, keeps them connected, and counts what they receive.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::RawFd;

use super::status::{CUT, HALT, REPORT, RESET, Report, Status};
use super::sys::{self, Epoll, Event, READABLE, WRITABLE};
use super::wheel::{Entry, Wheel};

mod connected;

/// Connections from one source address: the kernel first gives out every other port of its range (14,000 of them by
/// default), and is slow to find one once those are used up.
const PER_SOURCE: u32 = 8_000;
/// From connect to SUBACK.
const CONNECT_TIMEOUT_MS: u64 = 30_000;
/// A connection that was lost or failed is tried again after this, and up to as much again.
const RETRY_MS: u64 = 1_000;
/// After so long without any success a swarm that still lacks devices gives up.
const GIVE_UP_MS: u64 = 60_000;
const TELL_MS: u64 = 1_000;
const STDIN: RawFd = 0;
const STDIN_TOKEN: u64 = u64::MAX;
/// Longest packet that is expected, with room to spare.
const BUFFER_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone)]
pub struct Options {
    pub gateway: SocketAddrV4,
    /// The first of its own addresses; the next one is used every 8,000 devices.
    pub source: Ipv4Addr,
    pub count: u32,
    /// Number of the first device; it is user and client `d{number}`.
    pub first: u64,
    /// 4 (3.1.1) or 5.
    pub version: u8,
    /// Of the subscriptions to the inbox and to `all`.
    pub qos: u8,
    /// Their sessions outlive their connections, and are gone on with.
    pub kept: bool,
    /// Each device has one between these, seconds; 0: no keep-alive.
    pub keep_alive: (u16, u16),
    /// Most devices between connect and SUBACK.
    pub window: u32,
    /// Connects a second while ramping up; 0: as fast as the window allows.
    pub rate: u32,
    /// Connections ended, and made again, a second.
    pub churn_per_second: f64,
    /// The first so many devices subscribe to nothing and never send anything after CONNECT.
    pub silent: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Connecting,
    /// CONNECT is sent.
    Greeting,
    /// SUBSCRIBE is sent.
    Subscribing,
    Ready,
}

/// What a device costs here, with 8 bytes for its next ping.
struct Device {
    fd: RawFd,
    /// Raised with each connection, to know events of former ones.
    generation: u16,
    state: State,
    broadcast_round: u8,
    unicast_round: u8,
    /// When it began to connect; of a silent one, when it sent its CONNECT. Milliseconds.
    since_ms: u32,
    /// The beginning of a packet whose end was not there yet.
    #[allow(clippy::box_collection, reason = "a word rather than three for what is almost never there")]
    rest: Option<Box<Vec<u8>>>,
}

const _: () = assert!(size_of::<Device>() == 24);

pub struct Crowd {
    options: Options,
    epoll: Epoll,
    devices: Vec<Device>,
    wheel: Wheel,
    /// In the order in which they began, with when.
    connecting: VecDeque<(Entry, u64)>,
    /// Devices from this index on were not connected yet.
    next: u32,
    halted: bool,
    began_ns: u64,
    status: Status,
    report: Report,
    buffer: Vec<u8>,
    commands: Vec<u8>,
    stdin_ended: bool,
    told_ms: u64,
    /// Since when every connection has failed.
    failing_ms: Option<u64>,
    /// When all connections were cut; those that come back are timed from here.
    cut_ms: Option<u64>,
    /// Connections that churn owes.
    churn_due: f64,
    churned_ms: u64,
    random: u64,
}

impl Crowd {
    pub fn new(options: Options) -> io::Result<Crowd> {
        let epoll = Epoll::new()?;
        sys::unblock(STDIN)?;
        epoll.add(STDIN, READABLE, STDIN_TOKEN)?;
        let furthest_ms = (u64::from(options.keep_alive.1) * 1000).max(2 * RETRY_MS);
        Ok(Crowd {
            epoll,
            devices: Vec::with_capacity(options.count as usize),
            wheel: Wheel::new(furthest_ms, 0),
            connecting: VecDeque::new(),
            next: 0,
            halted: false,
            began_ns: sys::monotonic_ns(),
            status: Status::default(),
            report: Report::default(),
            buffer: vec![0; BUFFER_BYTES],
            commands: Vec::new(),
            stdin_ended: false,
            told_ms: 0,
            failing_ms: None,
            cut_ms: None,
            churn_due: 0.0,
            churned_ms: 0,
            random: options.first.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            options,
        })
    }

    /// Until stdin ends.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = vec![Event { events: 0, u64: 0 }; 1024];
        while !self.stdin_ended {
            let now = self.now_ms();
            self.ramp(now);
            self.churn(now);
            self.due(now);
            self.time_out(now);
            let settled =
                self.status.pending == 0 && (self.status.ready == self.options.count || self.stopped());
            // Whoever waits for the last device learns of it at once.
            let settles = settled && !std::mem::replace(&mut self.status.settled, settled);
            if settles || now >= self.told_ms + TELL_MS {
                self.told_ms = now;
                self.tell(None)?;
            }
            let busy = self.options.rate > 0 && !self.ramped() || self.options.churn_per_second > 0.0;
            let wait = self.wheel.wait_ms(now).min(if busy { 10 } else { TELL_MS });
            let count = self.epoll.wait(&mut events, wait)?;
            for event in &events[..count] {
                let (token, flags) = (event.u64, event.events);
                if token == STDIN_TOKEN {
                    self.obey()?;
                } else {
                    self.happened(token as u32, (token >> 32) as u16, flags);
                }
            }
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        (sys::monotonic_ns() - self.began_ns) / 1_000_000
    }

    fn random(&mut self, below: u64) -> u64 {
        // xorshift64: good enough to spread things.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below.max(1)
    }

    fn ramped(&self) -> bool {
        self.halted || self.status.gave_up || self.next == self.options.count
    }

    fn stopped(&self) -> bool {
        self.halted || self.status.gave_up
    }

    fn ramp(&mut self, now: u64) {
        let allowed = match self.options.rate {
            0 => u64::from(self.options.count),
            rate => u64::from(rate) * now / 1000 + 1,
        };
        while !self.ramped() && self.status.pending < self.options.window && u64::from(self.next) < allowed {
            let index = self.next;
            self.next += 1;
            self.devices.push(Device {
                fd: -1,
                generation: 0,
                state: State::Closed,
                broadcast_round: 0,
                unicast_round: 0,
                since_ms: 0,
                rest: None,
            });
            self.connect(index, now);
        }
    }

    fn connect(&mut self, index: u32, now: u64) {
        let source = Ipv4Addr::from(u32::from(self.options.source) + index / PER_SOURCE);
        let device = &mut self.devices[index as usize];
        device.generation = device.generation.wrapping_add(1);
        device.since_ms = now as u32;
        let entry = (index, device.generation);
        let token = u64::from(index) | u64::from(device.generation) << 32;
        match sys::connect(source, self.options.gateway) {
            Ok(fd) => {
                device.fd = fd;
                device.state = State::Connecting;
                self.status.pending += 1;
                self.connecting.push_back((entry, now));
                if let Err(error) = self.epoll.add(fd, READABLE | WRITABLE, token) {
                    self.end(index, &format!("cannot be watched: {error}"), false);
                }
            }
            Err(error) => {
                self.failed(reason(&error));
                self.retry(index);
            }
        }
    }

    fn retry(&mut self, index: u32) {
        let now = self.now_ms();
        let at = now + RETRY_MS + self.random(RETRY_MS);
        self.wheel.plan(at, (index, self.devices[index as usize].generation));
    }

    fn time_out(&mut self, now: u64) {
        while let Some(&((index, generation), since)) = self.connecting.front() {
            let device = &self.devices[index as usize];
            let pending = device.generation == generation
                && matches!(device.state, State::Connecting | State::Greeting | State::Subscribing);
            if pending && now < since + CONNECT_TIMEOUT_MS {
                return;
            }
            self.connecting.pop_front();
            if pending {
                let waited_for = match self.devices[index as usize].state {
                    State::Connecting => {
                        "the TCP handshake (is the gateway's listen queue full? net.core.somaxconn)"
                    }
                    State::Greeting => "CONNACK",
                    _ => "SUBACK",
                };
                self.end(index, &format!("waited 30 s for {waited_for}"), false);
            }
        }
    }

    fn failed(&mut self, reason: String) {
        *self.status.failed.entry(reason).or_default() += 1;
        let now = self.now_ms();
        let since = *self.failing_ms.get_or_insert(now);
        self.status.gave_up |= now > since + GIVE_UP_MS;
    }

    /// The connection is over: counted as what it was, closed, and tried again later.
    fn end(&mut self, index: u32, reason: &str, reset: bool) {
        let silent = index < self.options.silent;
        let device = &mut self.devices[index as usize];
        let state = std::mem::replace(&mut device.state, State::Closed);
        device.rest = None;
        sys::close(std::mem::replace(&mut device.fd, -1), reset);
        match state {
            State::Closed => return,
            State::Ready => {
                self.status.ready -= 1;
                *self.status.lost.entry(reason.to_owned()).or_default() += 1;
            }
            State::Connecting | State::Greeting | State::Subscribing => {
                self.status.pending -= 1;
                let silent = if silent { " (a silent device)" } else { "" };
                self.failed(format!("{reason}{silent}"));
            }
        }
        self.retry(index);
    }

    fn obey(&mut self) -> io::Result<()> {
        let mut bytes = [0; 256];
        loop {
            match sys::read(STDIN, &mut bytes) {
                Ok(0) => {
                    self.stdin_ended = true;
                    break;
                }
                Ok(count) => self.commands.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while let Some(end) = self.commands.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.commands.drain(..=end).collect();
            match std::str::from_utf8(&line).map(str::trim) {
                Ok(REPORT) => {
                    let is_ready = |device: &&Device| device.state == State::Ready;
                    let present = self.devices.iter().take_while(is_ready).count() as u32;
                    self.tell(Some(Box::new(Report { present, ..self.report.clone() })))?;
                }
                Ok(RESET) => self.report = Report::default(),
                Ok(HALT) => self.halted = true,
                Ok(CUT) => self.cut(),
                other => return Err(io::Error::other(format!("no such command: {other:?}"))),
            }
        }
        Ok(())
    }

    fn tell(&mut self, report: Option<Box<Report>>) -> io::Result<()> {
        let status = Status { report, ..self.status.clone() };
        let mut line = serde_json::to_vec(&status)?;
        line.push(b'\n');
        io::stdout().write_all(&line)
    }
}

/// An error, and which limit of this machine it is, if it is one.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "EMFILE: the swarm may open no more files (ulimit -n)".to_owned(),
        Some(libc::ENFILE) => "ENFILE: the machine may open no more files (fs.file-max)".to_owned(),
        Some(libc::EADDRNOTAVAIL) => {
            "EADDRNOTAVAIL: the source address has no free port (net.ipv4.ip_local_port_range)".to_owned()
        }
        Some(libc::ENOBUFS | libc::ENOMEM) => {
            format!("{error}: the kernel has no memory for a socket (net.ipv4.tcp_mem, MemAvailable)")
        }
        Some(libc::ECONNREFUSED) => "refused: nothing listens there".to_owned(),
        Some(libc::ECONNRESET) => "reset by the gateway".to_owned(),
        Some(libc::ETIMEDOUT) => "ETIMEDOUT: no answer to the TCP handshake (net.core.somaxconn)".to_owned(),
        _ if error.kind() == io::ErrorKind::WouldBlock => "the gateway does not read".to_owned(),
        _ => error.to_string(),
    }
}
