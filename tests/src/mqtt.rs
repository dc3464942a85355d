//! Raw MQTT bytes, for what no well-made client sends.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
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
        match tokio::time::timeout(time, self.packet()).await {
            Ok(Ok((first, body))) => Answer::Packet(first, body),
            Ok(Err(_)) => Answer::Closed,
            Err(_) => Answer::Silence,
        }
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
    let mut body = string("MQTT");
    body.extend_from_slice(&[version, 0x02]);
    body.extend_from_slice(&keep_alive.to_be_bytes());
    if version == 5 {
        body.push(0);
    }
    body.extend_from_slice(&string(client_id));
    packet(0x10, &body)
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
    let property = [&[0x26][..], &string("token"), &string(token)].concat();
    let mut length = property.len();
    let mut body = packet_id.to_be_bytes().to_vec();
    while length >= 0x80 {
        body.push((length & 0x7F) as u8 | 0x80);
        length >>= 7;
    }
    body.push(length as u8);
    body.extend_from_slice(&property);
    body.extend_from_slice(&string(filter));
    body.push(options);
    packet(0x82, &body)
}
