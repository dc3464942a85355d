//! A device against a server that speaks raw bytes.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::super::{Device, DeviceOptions, Event};
use super::*;

/// Reads one MQTT packet: its first byte and its body.
async fn packet(socket: &mut TcpStream) -> (u8, Vec<u8>) {
    let read = async {
        let first = socket.read_u8().await.unwrap();
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let byte = socket.read_u8().await.unwrap();
            length |= usize::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut body = vec![0; length];
        socket.read_exact(&mut body).await.unwrap();
        (first, body)
    };
    tokio::time::timeout(Duration::from_secs(5), read).await.expect("a packet within 5 s")
}

const CONNACK: &[u8] = &[0x20, 3, 0, 0, 0];

/// A PUBLISH of QoS 1 on demo/u/alice with the user properties epoch=1 and seq.
fn publish(packet_id: u8, seq: &str) -> Vec<u8> {
    let mut properties = Vec::new();
    for (key, value) in [("epoch", "1"), ("seq", seq)] {
        properties.push(0x26);
        for text in [key, value] {
            properties.extend_from_slice(&(text.len() as u16).to_be_bytes());
            properties.extend_from_slice(text.as_bytes());
        }
    }
    let topic = b"demo/u/alice";
    let mut body = vec![0, topic.len() as u8];
    body.extend_from_slice(topic);
    body.extend_from_slice(&[0, packet_id, properties.len() as u8]);
    body.extend_from_slice(&properties);
    body.extend_from_slice(b"hello");
    let mut packet = vec![0x32, body.len() as u8];
    packet.extend_from_slice(&body);
    packet
}

async fn accept(listener: &TcpListener) -> TcpStream {
    let (mut socket, _) = listener.accept().await.unwrap();
    let (first, body) = packet(&mut socket).await;
    assert_eq!(first, 0x10, "CONNECT");
    assert!(body.windows(5).any(|window| window == b"alice"), "the user is in it");
    socket.write_all(CONNACK).await.unwrap();
    let (first, body) = packet(&mut socket).await;
    assert_eq!(first, 0x82, "SUBSCRIBE");
    let suback = [0x90, 4, body[0], body[1], 0, 1];
    socket.write_all(&suback).await.unwrap();
    socket
}

async fn event(device: &mut Device) -> Event {
    tokio::time::timeout(Duration::from_secs(10), device.next())
        .await
        .expect("an event in time")
        .expect("an event")
}

#[tokio::test]
async fn a_message_is_acknowledged_when_taken_and_a_repeat_is_dropped() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("mqtt://{}", listener.local_addr().unwrap());
    let mut device = Device::start(DeviceOptions::new("demo", "alice").address(address)).unwrap();
    let mut socket = accept(&listener).await;
    assert!(matches!(event(&mut device).await, Event::Online { session_present: false, .. }));

    socket.write_all(&publish(1, "1")).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), socket.peek(&mut byte)).await;
    assert!(early.is_err(), "acknowledged before it was taken");
    let Event::Message(message) = event(&mut device).await else { panic!("a message") };
    assert_eq!((message.topic.as_str(), message.payload.as_ref()), ("demo/u/alice", b"hello".as_ref()));
    assert_eq!((message.position, message.qos), (Some((1, 1)), 1));
    assert_eq!(packet(&mut socket).await.1[..2], [0, 1], "PUBACK of the first");

    // The same again under another packet id, then the next one: only that is seen, all are acknowledged.
    socket.write_all(&publish(2, "1")).await.unwrap();
    socket.write_all(&publish(3, "2")).await.unwrap();
    let Event::Message(message) = event(&mut device).await else { panic!("a message") };
    assert_eq!(message.position, Some((1, 2)));
    assert_eq!(packet(&mut socket).await.1[..2], [0, 2]);
    assert_eq!(packet(&mut socket).await.1[..2], [0, 3]);
    assert_eq!(device.duplicates(), 1);
    device.stop().await;
    assert_eq!(packet(&mut socket).await.0, 0xE0, "DISCONNECT");
}

#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("mqtt://{}", listener.local_addr().unwrap());
    let mut device = Device::start(DeviceOptions::new("demo", "alice").address(address)).unwrap();
    let socket = accept(&listener).await;
    assert!(matches!(event(&mut device).await, Event::Online { .. }));
    drop(socket);
    let Event::Offline { retry_in, .. } = event(&mut device).await else { panic!("offline") };
    assert!(retry_in <= FIRST_RETRY);
    let _socket = accept(&listener).await;
    assert!(matches!(event(&mut device).await, Event::Online { .. }));
}

#[tokio::test]
async fn wrong_credentials_end_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("mqtt://{}", listener.local_addr().unwrap());
    let mut device = Device::start(DeviceOptions::new("demo", "alice").address(address)).unwrap();
    let (mut socket, _) = listener.accept().await.unwrap();
    packet(&mut socket).await;
    socket.write_all(&[0x20, 3, 0, 0x87, 0]).await.unwrap();
    let Event::Refused { reason } = event(&mut device).await else { panic!("refused") };
    assert_eq!(reason, "the server refused the connection: not authorized");
    assert!(device.next().await.is_none());
}

#[tokio::test]
async fn a_publish_is_answered_by_its_acknowledgement() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("mqtt://{}", listener.local_addr().unwrap());
    let mut device = Device::start(DeviceOptions::new("demo", "alice").address(address)).unwrap();
    let mut socket = accept(&listener).await;
    assert!(matches!(event(&mut device).await, Event::Online { .. }));
    let publisher = device.publisher();
    let refused = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.publish("demo/up/chat", "one", 1, PublishOptions::default()).await }
    });
    let (first, body) = packet(&mut socket).await;
    assert_eq!((first & 0xF0, &body[..2]), (0x30, [0, 12].as_ref()));
    socket.write_all(&[0x40, 4, 0, body[15], 0x87, 0]).await.unwrap();
    let error = refused.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the server did not accept the message: not authorized");

    let lost =
        tokio::spawn(
            async move { publisher.publish("demo/up/chat", "two", 1, PublishOptions::default()).await },
        );
    packet(&mut socket).await;
    drop(socket);
    assert!(matches!(lost.await.unwrap(), Err(PublishError::Lost)));
}
