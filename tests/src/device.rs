//! A device of few bytes, for tests with thousands of them: it keeps its session, acks what it gets, and goes where it is
//! sent: by Server Reference (5.0), or to where the dispatcher says (3.1.1).

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::cluster::Dispatcher;
use crate::mqtt::{packet, string};

/// A will: topic, payload, delay in seconds (5.0 only).
#[derive(Debug, Clone)]
pub struct Will {
    pub topic: String,
    pub payload: String,
    pub delay_seconds: u32,
}

/// How a device connects.
#[derive(Debug, Clone)]
pub struct Options {
    /// 4 (3.1.1) or 5.
    pub version: u8,
    pub client_id: String,
    pub keep_alive: u16,
    /// 0: nothing is kept.
    pub expiry_seconds: u32,
    pub clean: bool,
    pub will: Option<Will>,
}

impl Options {
    /// A kept session; the user is named as the client.
    pub fn kept(version: u8, client_id: &str) -> Self {
        Options {
            version,
            client_id: client_id.to_owned(),
            keep_alive: 300,
            expiry_seconds: 3600,
            clean: false,
            will: None,
        }
    }

    fn connect(&self) -> Vec<u8> {
        let mut flags = u8::from(self.clean) << 1;
        if self.will.is_some() {
            flags |= 0x04 | 0x08;
        }
        let mut body = string("MQTT");
        body.extend_from_slice(&[self.version, flags]);
        body.extend_from_slice(&self.keep_alive.to_be_bytes());
        if self.version == 5 {
            body.extend_from_slice(&[5, 0x11]);
            body.extend_from_slice(&self.expiry_seconds.to_be_bytes());
        }
        body.extend_from_slice(&string(&self.client_id));
        if let Some(will) = &self.will {
            if self.version == 5 {
                body.extend_from_slice(&[5, 0x18]);
                body.extend_from_slice(&will.delay_seconds.to_be_bytes());
            }
            body.extend_from_slice(&string(&will.topic));
            body.extend_from_slice(&string(&will.payload));
        }
        packet(0x10, &body)
    }
}

/// A message that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub topic: String,
    pub payload: String,
    pub qos: u8,
    pub dup: bool,
    pub packet_id: u16,
}

/// What came from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    Publish(Received),
    /// Reason code and Server Reference; None: the connection ended without a word.
    End(Option<(u8, Option<String>)>),
    Other(u8, Vec<u8>),
}

/// Why a CONNECT was not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Reason code (5.0) or return code (3.1.1).
    pub code: u8,
    pub reference: Option<String>,
}

/// A connection.
pub struct Device {
    stream: BufReader<TcpStream>,
    version: u8,
    pub session_present: bool,
    next_id: u16,
}

impl Device {
    /// Err: the socket failed. Ok(Err): refused.
    pub async fn connect(server: SocketAddr, options: &Options) -> io::Result<Result<Device, Refused>> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let mut device = Device {
            stream: BufReader::with_capacity(512, stream),
            version: options.version,
            session_present: false,
            next_id: 0,
        };
        device.write(&options.connect()).await?;
        let (first, body) = device.packet().await?;
        if first != 0x20 || body.len() < 2 {
            return Err(io::Error::other(format!("no CONNACK but {first:02x} {body:02x?}")));
        }
        device.session_present = body[0] & 1 == 1;
        if body[1] != 0 {
            let reference = (options.version == 5).then(|| property(&body[2..], 0x1C)).flatten();
            return Ok(Err(Refused { code: body[1], reference }));
        }
        Ok(Ok(device))
    }

    /// Connected, or the test fails.
    pub async fn connected(server: SocketAddr, options: &Options) -> Device {
        let connected = tokio::time::timeout(Duration::from_secs(20), Device::connect(server, options)).await;
        connected.expect("an answer").expect("a connection").expect("accepted")
    }

    /// Subscribes with QoS 1 and waits for the SUBACK; what is published before it comes is given too.
    pub async fn subscribe(&mut self, filter: &str, qos: u8) -> io::Result<Vec<Received>> {
        self.next_id += 1;
        let subscribe = crate::mqtt::subscribe(self.version, self.next_id, filter, qos);
        self.write(&subscribe).await?;
        let mut early = Vec::new();
        loop {
            match self.next().await? {
                Packet::Other(0x90, body) => {
                    let code = body.last().copied().unwrap_or(0x80);
                    if code >= 0x80 {
                        return Err(io::Error::other(format!("SUBACK {body:02x?}")));
                    }
                    return Ok(early);
                }
                Packet::Publish(received) => early.push(received),
                Packet::End(why) => return Err(io::Error::other(format!("ended: {why:?}"))),
                Packet::Other(..) => {}
            }
        }
    }

    pub async fn ack(&mut self, packet_id: u16) -> io::Result<()> {
        let id = packet_id.to_be_bytes();
        self.write(&[0x40, 2, id[0], id[1]]).await
    }

    pub async fn publish(&mut self, topic: &str, payload: &str, packet_id: Option<u16>) -> io::Result<()> {
        let publish = crate::mqtt::publish(self.version, topic, payload.as_bytes(), packet_id);
        self.write(&publish).await
    }

    /// DISCONNECT: the device ends the connection itself.
    pub async fn disconnect(mut self) {
        let _ = self.write(&[0xE0, 0]).await;
    }

    /// The next packet. An end by the server is no error.
    pub async fn next(&mut self) -> io::Result<Packet> {
        let (first, body) = match self.packet().await {
            Ok(packet) => packet,
            Err(_) => return Ok(Packet::End(None)),
        };
        Ok(match first >> 4 {
            3 => Packet::Publish(self.received(first, &body)?),
            14 => {
                let code = body.first().copied().unwrap_or(0);
                Packet::End(Some((code, body.get(1..).and_then(|rest| property(rest, 0x1C)))))
            }
            _ => Packet::Other(first, body),
        })
    }

    /// The next message, within a time; None: nothing came.
    pub async fn message(&mut self, within: Duration) -> Option<Received> {
        let until = tokio::time::Instant::now() + within;
        loop {
            match tokio::time::timeout_at(until, self.next()).await {
                Ok(Ok(Packet::Publish(received))) => return Some(received),
                Ok(Ok(Packet::End(why))) => panic!("the connection ended: {why:?}"),
                Ok(Ok(Packet::Other(..))) => {}
                Ok(Err(error)) => panic!("{error}"),
                Err(_) => return None,
            }
        }
    }

    fn received(&self, first: u8, body: &[u8]) -> io::Result<Received> {
        let short = || io::Error::other("a PUBLISH that is too short");
        let length = usize::from(u16::from_be_bytes([
            *body.first().ok_or_else(short)?,
            *body.get(1).ok_or_else(short)?,
        ]));
        let topic = String::from_utf8_lossy(body.get(2..2 + length).ok_or_else(short)?).into_owned();
        let mut at = 2 + length;
        let qos = first >> 1 & 3;
        let mut packet_id = 0;
        if qos > 0 {
            packet_id = u16::from_be_bytes([body[at], body[at + 1]]);
            at += 2;
        }
        if self.version == 5 {
            let (properties, used) = varint(&body[at..]);
            at += used + properties;
        }
        let payload = String::from_utf8_lossy(body.get(at..).ok_or_else(short)?).into_owned();
        Ok(Received { topic, payload, qos, dup: first & 8 != 0, packet_id })
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes).await
    }

    async fn packet(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let first = self.stream.read_u8().await?;
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let byte = self.stream.read_u8().await?;
            length |= usize::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok((first, body))
    }
}

fn varint(bytes: &[u8]) -> (usize, usize) {
    let (mut value, mut used) = (0, 0);
    for &byte in bytes {
        value |= usize::from(byte & 0x7F) << (7 * used);
        used += 1;
        if byte & 0x80 == 0 {
            break;
        }
    }
    (value, used)
}

/// The text of a property (MQTT 5.0 §2.2.2), of those that a CONNACK or DISCONNECT can have.
fn property(bytes: &[u8], wanted: u8) -> Option<String> {
    let (length, used) = varint(bytes);
    let mut rest = bytes.get(used..used + length)?;
    let text = |rest: &[u8]| -> Option<(String, usize)> {
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        Some((String::from_utf8_lossy(rest.get(2..2 + length)?).into_owned(), 2 + length))
    };
    while let Some((&id, after)) = rest.split_first() {
        let skip = match id {
            0x24 | 0x25 | 0x28..=0x2A => 1,
            0x13 | 0x21 | 0x22 => 2,
            0x11 | 0x27 => 4,
            0x12 | 0x15 | 0x1A | 0x1C | 0x1F => {
                let (value, used) = text(after)?;
                if id == wanted {
                    return Some(value);
                }
                used
            }
            0x26 => {
                let (_, key) = text(after)?;
                key + text(&after[key..])?.1
            }
            other => panic!("a property {other:#04x}"),
        };
        rest = &after[skip..];
    }
    None
}

/// What has happened to a roaming device.
#[derive(Debug, Default)]
pub struct Journey {
    /// When it was told to go, and where it went.
    pub moves: Vec<(Instant, SocketAddr)>,
    /// It was told where (5.0).
    pub referred: usize,
    /// CONNECTs that were refused because the gateway was draining.
    pub refused: usize,
    /// Ends for which there was no reason.
    pub lost: Vec<String>,
    pub server: Option<SocketAddr>,
    /// Payloads, each once.
    pub received: HashSet<String>,
    pub again: usize,
}

/// Stays connected for as long as the task lives: subscribes to its inbox, acks, goes where it is sent.
pub async fn roam(first: SocketAddr, options: Options, dispatcher: Dispatcher, journey: Arc<Mutex<Journey>>) {
    let mut server = first;
    let mut subscribed = false;
    loop {
        match Device::connect(server, &options).await {
            Ok(Ok(device)) => {
                if subscribed && !device.session_present {
                    journey.lock().lost.push("the session was not there".to_owned());
                }
                let stayed = stay(device, &options, &mut subscribed, server, &journey).await;
                let now = Instant::now();
                let reference = match stayed {
                    // The way of 5.0, and of 3.1.1, which cannot say more than this.
                    Some((0x9C, reference)) => reference,
                    None if options.version == 4 => None,
                    other => {
                        journey.lock().lost.push(format!("{other:?}"));
                        None
                    }
                };
                journey.lock().referred += usize::from(reference.is_some());
                server = next(reference, &options, &dispatcher, server).await;
                journey.lock().moves.push((now, server));
            }
            Ok(Err(refused)) => {
                journey.lock().refused += 1;
                server = next(refused.reference, &options, &dispatcher, server).await;
            }
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                server = next(None, &options, &dispatcher, server).await;
            }
        }
    }
}

async fn next(
    reference: Option<String>,
    options: &Options,
    dispatcher: &Dispatcher,
    now: SocketAddr,
) -> SocketAddr {
    match reference.and_then(|reference| reference.parse().ok()) {
        Some(server) => server,
        None => dispatcher.ask(&options.client_id).await.unwrap_or(now),
    }
}

async fn stay(
    mut device: Device,
    options: &Options,
    subscribed: &mut bool,
    server: SocketAddr,
    journey: &Mutex<Journey>,
) -> Option<(u8, Option<String>)> {
    if !*subscribed {
        let filter = format!("demo/u/{}", options.client_id);
        if let Err(error) = device.subscribe(&filter, 1).await {
            journey.lock().lost.push(error.to_string());
            return None;
        }
        *subscribed = true;
    }
    journey.lock().server = Some(server);
    loop {
        match device.next().await {
            Ok(Packet::Publish(received)) => {
                let (id, is_new) = (received.packet_id, journey.lock().received.insert(received.payload));
                journey.lock().again += usize::from(!is_new);
                if received.qos > 0 {
                    let _ = device.ack(id).await;
                }
            }
            Ok(Packet::End(why)) => return why,
            Ok(Packet::Other(..)) => {}
            Err(error) => {
                journey.lock().lost.push(error.to_string());
                return None;
            }
        }
    }
}
