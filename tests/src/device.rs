//! A device of few bytes, for tests with thousands of them: it keeps its session, acks what it gets, and goes where it is
//! sent: by Server Reference (5.0), or to where the dispatcher says (3.1.1).

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::cluster::Dispatcher;
use crate::mqtt::{self, Connect, Publish};

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
        let connect =
            Connect::new(self.version, &self.client_id).with(0x11, &self.expiry_seconds.to_be_bytes());
        let mut connect = Connect { clean: self.clean, keep_alive: self.keep_alive, ..connect };
        if let Some(will) = &self.will {
            connect.will = Some((1, false, will.topic.clone(), will.payload.clone().into_bytes()));
            connect.will_properties = [&[0x18][..], &will.delay_seconds.to_be_bytes()].concat();
        }
        connect.bytes()
    }
}

/// What came from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    Publish(Publish),
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
        let (first, body) = mqtt::read_packet(&mut device.stream).await?;
        if first != 0x20 || body.len() < 2 {
            return Err(io::Error::other(format!("no CONNACK but {first:02x} {body:02x?}")));
        }
        device.session_present = body[0] & 1 == 1;
        if body[1] != 0 {
            let reference = (options.version == 5).then(|| reference(&body[2..])).flatten();
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
    pub async fn subscribe(&mut self, filter: &str, qos: u8) -> io::Result<Vec<Publish>> {
        self.next_id += 1;
        let subscribe = mqtt::subscribe(self.version, self.next_id, filter, qos);
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
        let publish = mqtt::publish(self.version, topic, payload.as_bytes(), packet_id);
        self.write(&publish).await
    }

    /// DISCONNECT: the device ends the connection itself.
    pub async fn disconnect(mut self) {
        let _ = self.write(&[0xE0, 0]).await;
    }

    /// The next packet. An end by the server is no error.
    pub async fn next(&mut self) -> io::Result<Packet> {
        let (first, body) = match mqtt::read_packet(&mut self.stream).await {
            Ok(packet) => packet,
            Err(_) => return Ok(Packet::End(None)),
        };
        Ok(match first >> 4 {
            3 => Packet::Publish(Publish::parse(self.version, first, &body)),
            14 => {
                let code = body.first().copied().unwrap_or(0);
                Packet::End(Some((code, body.get(1..).filter(|rest| !rest.is_empty()).and_then(reference))))
            }
            _ => Packet::Other(first, body),
        })
    }

    /// The next message, within a time; None: nothing came.
    pub async fn message(&mut self, within: Duration) -> Option<Publish> {
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

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes).await
    }
}

/// The Server Reference among the properties of a CONNACK or DISCONNECT.
fn reference(mut properties: &[u8]) -> Option<String> {
    let properties = mqtt::take_properties(&mut properties);
    let mut value = mqtt::property(&properties, 0x1C)?;
    Some(String::from_utf8_lossy(&mqtt::take_string(&mut value)).into_owned())
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
                let (id, is_new) = (received.id, journey.lock().received.insert(received.payload));
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
