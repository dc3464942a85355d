//! Raw MQTT bytes, for what no well-made client sends.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A TCP connection that speaks whatever bytes it is given.
pub struct Raw {
    stream: TcpStream,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A packet: its first byte and its body.
    Packet(u8, Vec<u8>),
    /// The server closed the connection.
    Closed,
    /// Nothing, for as long as was waited.
    Silence,
}

impl Answer {
    /// The reason code, if it is a DISCONNECT (MQTT 5.0 §3.14.2.1).
    pub fn disconnect(&self) -> Option<u8> {
        match self {
            Answer::Packet(0xE0, body) => Some(body.first().copied().unwrap_or(0)),
            _ => None,
        }
    }
}

impl Raw {
    pub async fn connect(server: SocketAddr) -> Raw {
        Raw {
            stream: crate::within("a connection", TcpStream::connect(server))
                .await
                .expect("the server listens"),
        }
    }

    /// From another address of this machine.
    pub async fn connect_from(address: &str, server: SocketAddr) -> Raw {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::new(address.parse().expect("an address"), 0)).expect("an address of ours");
        let connecting = crate::within("a connection", socket.connect(server));
        Raw { stream: connecting.await.expect("the server listens") }
    }

    /// Connected as a device: version 4 (3.1.1) or 5.
    pub async fn device(server: SocketAddr, version: u8, client_id: &str) -> Raw {
        let mut raw = Raw::connect(server).await;
        raw.send(&connect(version, client_id, 60)).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) => assert_eq!(body[1], 0, "CONNACK {body:02x?}"),
            other => panic!("no CONNACK but {other:02x?}"),
        }
        raw
    }

    /// Sends bytes; a server that has closed already is no failure here.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next packet, within ten seconds.
    pub async fn answer(&mut self) -> Answer {
        self.answer_within(Duration::from_secs(10)).await
    }

    pub async fn answer_within(&mut self, time: Duration) -> Answer {
        match tokio::time::timeout(time, read_packet(&mut self.stream)).await {
            Ok(Ok((first, body))) => Answer::Packet(first, body),
            Ok(Err(_)) => Answer::Closed,
            Err(_) => Answer::Silence,
        }
    }
}

/// The next packet: its first byte and its body.
pub async fn read_packet(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
    let first = stream.read_u8().await?;
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        let byte = stream.read_u8().await?;
        length |= usize::from(byte & 0x7F) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok((first, body))
}

/// A packet of a first byte and a body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    let mut length = body.len();
    loop {
        let byte = (length & 0x7F) as u8;
        length >>= 7;
        packet.push(if length > 0 { byte | 0x80 } else { byte });
        if length == 0 {
            break;
        }
    }
    packet.extend_from_slice(body);
    packet
}

/// A string with its length before it (MQTT 5.0 §1.5.4).
pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u16).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// CONNECT with a clean start and nothing else; version 4 (3.1.1) or 5.
pub fn connect(version: u8, client_id: &str, keep_alive: u16) -> Vec<u8> {
    Connect { keep_alive, ..Connect::new(version, client_id) }.bytes()
}

/// PUBLISH of version 4 (3.1.1) or 5, without properties.
pub fn publish(version: u8, topic: &str, payload: &[u8], packet_id: Option<u16>) -> Vec<u8> {
    let mut body = string(topic);
    if let Some(id) = packet_id {
        body.extend_from_slice(&id.to_be_bytes());
    }
    if version == 5 {
        body.push(0);
    }
    body.extend_from_slice(payload);
    packet(if packet_id.is_some() { 0x32 } else { 0x30 }, &body)
}

/// SUBSCRIBE of version 4 (3.1.1) or 5 to one filter.
pub fn subscribe(version: u8, packet_id: u16, filter: &str, options: u8) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == 5 {
        body.push(0);
    }
    body.extend_from_slice(&string(filter));
    body.push(options);
    packet(0x82, &body)
}

/// CONNECT with a password and a clean start, of version 4 (3.1.1) or 5.
pub fn connect_with_token(version: u8, client_id: &str, token: &str) -> Vec<u8> {
    let mut body = string("MQTT");
    // With a user name, which 3.1.1 wants where there is a password.
    body.extend_from_slice(&[version, 0xC2, 0, 60]);
    if version == 5 {
        body.push(0);
    }
    for field in [client_id, "ignored", token] {
        body.extend_from_slice(&string(field));
    }
    packet(0x10, &body)
}

/// SUBSCRIBE of version 5 with a user property `token`.
pub fn subscribe_with_token(packet_id: u16, filter: &str, options: u8, token: &str) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    body.extend(with_length(&[&[0x26][..], &string("token"), &string(token)].concat()));
    body.extend_from_slice(&string(filter));
    body.push(options);
    packet(0x82, &body)
}

/// What a CONNECT says; the default is a clean start of MQTT 5.
#[derive(Debug, Clone)]
pub struct Connect {
    pub version: u8,
    pub client_id: String,
    pub clean: bool,
    pub keep_alive: u16,
    /// Property block of version 5, without its length.
    pub properties: Vec<u8>,
    /// Will: QoS, retain, topic, payload.
    pub will: Option<(u8, bool, String, Vec<u8>)>,
    /// Its property block of version 5, without its length.
    pub will_properties: Vec<u8>,
}

impl Connect {
    pub fn new(version: u8, client_id: &str) -> Connect {
        let client_id = client_id.to_owned();
        let (properties, will_properties) = (Vec::new(), Vec::new());
        Connect { version, client_id, clean: true, keep_alive: 60, properties, will: None, will_properties }
    }

    /// A session that outlives the connection: clean session 0, or an expiry of an hour.
    pub fn kept(version: u8, client_id: &str) -> Connect {
        Connect { clean: false, ..Connect::new(version, client_id) }.with(0x11, &3600_u32.to_be_bytes())
    }

    /// With a further property, which 3.1.1 leaves out.
    pub fn with(mut self, property: u8, value: &[u8]) -> Connect {
        self.properties.push(property);
        self.properties.extend_from_slice(value);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut flags = u8::from(self.clean) << 1;
        if let Some((qos, retain, ..)) = &self.will {
            flags |= 0x04 | qos << 3 | u8::from(*retain) << 5;
        }
        let mut body = string("MQTT");
        body.extend_from_slice(&[self.version, flags]);
        body.extend_from_slice(&self.keep_alive.to_be_bytes());
        if self.version == 5 {
            body.extend(with_length(&self.properties));
        }
        body.extend(string(&self.client_id));
        if let Some((_, _, topic, payload)) = &self.will {
            if self.version == 5 {
                body.extend(with_length(&self.will_properties));
            }
            body.extend(string(topic));
            body.extend((payload.len() as u16).to_be_bytes());
            body.extend(payload);
        }
        packet(0x10, &body)
    }
}

/// A PUBLISH, as sent or as received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Publish {
    pub dup: bool,
    pub qos: u8,
    pub retain: bool,
    pub topic: String,
    /// 0 with QoS 0.
    pub id: u16,
    /// Of version 5, in their order: identifier and value.
    pub properties: Vec<(u8, Vec<u8>)>,
    pub payload: String,
}

impl Publish {
    pub fn new(qos: u8, id: u16, topic: &str, payload: &str) -> Publish {
        let (topic, payload) = (topic.to_owned(), payload.to_owned());
        Publish { qos, id, topic, payload, ..Publish::default() }
    }

    pub fn with(mut self, property: u8, value: &[u8]) -> Publish {
        self.properties.push((property, value.to_vec()));
        self
    }

    pub fn dup(mut self) -> Publish {
        self.dup = true;
        self
    }

    pub fn bytes(&self, version: u8) -> Vec<u8> {
        let mut body = string(&self.topic);
        if self.qos > 0 {
            body.extend(self.id.to_be_bytes());
        }
        if version == 5 {
            let properties: Vec<u8> =
                self.properties.iter().flat_map(|(id, value)| [&[*id], &value[..]].concat()).collect();
            body.extend(with_length(&properties));
        }
        body.extend(self.payload.as_bytes());
        packet(0x30 | u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain), &body)
    }

    /// From what the server sent; panics if it is no PUBLISH.
    pub fn parse(version: u8, first: u8, body: &[u8]) -> Publish {
        assert_eq!(first >> 4, 3, "a PUBLISH: {first:02x} {body:02x?}");
        let mut rest = body;
        let topic = String::from_utf8(take_string(&mut rest)).expect("a topic of UTF-8");
        let qos = first >> 1 & 3;
        let id = if qos > 0 { u16::from_be_bytes(take(&mut rest, 2).try_into().unwrap()) } else { 0 };
        let properties = if version == 5 { take_properties(&mut rest) } else { Vec::new() };
        let payload = String::from_utf8_lossy(rest).into_owned();
        Publish { dup: first & 8 != 0, qos, retain: first & 1 != 0, topic, id, properties, payload }
    }

    pub fn property(&self, id: u8) -> Option<&[u8]> {
        property(&self.properties, id)
    }
}

fn with_length(bytes: &[u8]) -> Vec<u8> {
    packet(0, bytes)[1..].to_vec()
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, tail) = bytes.split_at(count);
    *bytes = tail;
    head
}

pub fn take_string(bytes: &mut &[u8]) -> Vec<u8> {
    let length = u16::from_be_bytes(take(bytes, 2).try_into().unwrap());
    take(bytes, length.into()).to_vec()
}

fn take_varint(bytes: &mut &[u8]) -> usize {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = take(bytes, 1)[0];
        value |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

/// A property block of version 5 with its length (MQTT 5.0 §2.2.2): identifiers and values.
pub fn take_properties(bytes: &mut &[u8]) -> Vec<(u8, Vec<u8>)> {
    let length = take_varint(bytes);
    let mut block = take(bytes, length);
    let mut properties = Vec::new();
    while !block.is_empty() {
        let property = take(&mut block, 1)[0];
        let before = block;
        match property {
            0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28..=0x2A => drop(take(&mut block, 1)),
            0x13 | 0x21..=0x23 => drop(take(&mut block, 2)),
            0x02 | 0x11 | 0x18 | 0x27 => drop(take(&mut block, 4)),
            0x0B => drop(take_varint(&mut block)),
            0x03 | 0x08 | 0x09 | 0x12 | 0x15 | 0x16 | 0x1A | 0x1C | 0x1F => drop(take_string(&mut block)),
            0x26 => drop((take_string(&mut block), take_string(&mut block))),
            other => panic!("there is no property {other:02x}"),
        }
        properties.push((property, before[..before.len() - block.len()].to_vec()));
    }
    properties
}

/// The value of the first property with this identifier.
pub fn property(properties: &[(u8, Vec<u8>)], id: u8) -> Option<&[u8]> {
    properties.iter().find(|(property, _)| *property == id).map(|(_, value)| &value[..])
}

/// A raw connection of a device, packet by packet.
pub struct Device {
    pub raw: Raw,
    pub version: u8,
    /// CONNACK: was a session present?
    pub is_present: bool,
    /// CONNACK: the bytes after the reason code.
    pub connack: Vec<u8>,
}

impl Device {
    pub async fn connect(server: SocketAddr, connect: &Connect) -> Device {
        let mut raw = Raw::connect(server).await;
        raw.send(&connect.bytes()).await;
        match raw.answer().await {
            Answer::Packet(0x20, body) => {
                assert_eq!(body[1], 0, "CONNACK {body:02x?}");
                let (is_present, connack) = (body[0] == 1, body[2..].to_vec());
                Device { raw, version: connect.version, is_present, connack }
            }
            other => panic!("no CONNACK but {other:02x?}"),
        }
    }

    pub async fn publish(&mut self, publish: &Publish) {
        self.raw.send(&publish.bytes(self.version)).await;
    }

    /// PUBACK, PUBREC, PUBREL or PUBCOMP by its first byte, without a reason.
    pub async fn ack(&mut self, first: u8, id: u16) {
        self.raw.send(&packet(first, &id.to_be_bytes())).await;
    }

    /// The next packet has to be this acknowledgement; gives its reason code.
    pub async fn acked(&mut self, first: u8, id: u16) -> u8 {
        match self.raw.answer().await {
            Answer::Packet(kind, body) => {
                assert_eq!((kind, &body[..2]), (first, &id.to_be_bytes()[..]), "{body:02x?}");
                assert!(self.version == 5 || body.len() == 2, "{body:02x?}");
                body.get(2).copied().unwrap_or(0)
            }
            other => panic!("no {first:02x} but {other:02x?}"),
        }
    }

    /// The next packet has to be a PUBLISH.
    pub async fn got(&mut self) -> Publish {
        match self.raw.answer().await {
            Answer::Packet(first, body) => Publish::parse(self.version, first, &body),
            other => panic!("no PUBLISH but {other:02x?}"),
        }
    }

    /// Subscribes; gives what was granted.
    pub async fn subscribe(&mut self, filter: &str, options: u8) -> u8 {
        self.raw.send(&subscribe(self.version, 9999, filter, options)).await;
        match self.raw.answer().await {
            Answer::Packet(0x90, body) => {
                assert_eq!(body[..2], 9999_u16.to_be_bytes());
                *body.last().expect("a code")
            }
            other => panic!("no SUBACK but {other:02x?}"),
        }
    }

    pub async fn unsubscribe(&mut self, filter: &str) {
        let mut body = 9998_u16.to_be_bytes().to_vec();
        if self.version == 5 {
            body.push(0);
        }
        body.extend(string(filter));
        self.raw.send(&packet(0xA2, &body)).await;
        let answer = self.raw.answer().await;
        assert!(matches!(answer, Answer::Packet(0xB0, _)), "no UNSUBACK but {answer:02x?}");
    }

    /// Nothing is on its way: what comes next is the answer to a ping.
    pub async fn nothing(&mut self) {
        self.raw.send(&[0xC0, 0]).await;
        assert_eq!(self.raw.answer().await, Answer::Packet(0xD0, vec![]), "PINGRESP and nothing before it");
    }
}
