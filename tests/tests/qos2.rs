//! Delivery protocol state, byte by byte: QoS 2 both ways, what a session keeps of it, packet identifiers, flow control
//! (MQTT 5.0 §4.3, §4.4, §4.9; 3.1.1 §4.3, §4.4).

use std::net::SocketAddr;
use std::time::Duration;

use carillon_tests::mqtt::{self, Answer, Connect, Device, Publish};
use carillon_tests::{Server, eventually};

const VERSIONS: [u8; 2] = [4, 5];
const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;
const NOT_FOUND: u8 = 0x92;

/// A device that sends, with a clean session.
async fn sender(server: SocketAddr, version: u8) -> Device {
    Device::connect(server, &Connect::new(version, &format!("sender-{version}"))).await
}

/// A device that has subscribed with QoS 2.
async fn receiver(server: SocketAddr, version: u8, filter: &str) -> Device {
    let mut device = Device::connect(server, &Connect::new(version, &format!("receiver-{version}"))).await;
    assert_eq!(device.subscribe(filter, 2).await, 2, "QoS 2 is granted");
    device
}

/// Sends a message with QoS 2, to its end.
async fn send(device: &mut Device, id: u16, topic: &str, payload: &str) {
    device.publish(&Publish::new(2, id, topic, payload)).await;
    assert!(device.acked(PUBREC, id).await < 0x80);
    device.ack(PUBREL, id).await;
    assert_eq!(device.acked(PUBCOMP, id).await, 0);
}

/// Takes a message of QoS 2, to its end.
async fn take(device: &mut Device) -> Publish {
    let got = device.got().await;
    assert_eq!(got.qos, 2, "{got:?}");
    device.ack(PUBREC, got.id).await;
    assert_eq!(device.acked(PUBREL, got.id).await, 0);
    device.ack(PUBCOMP, got.id).await;
    got
}

fn reason(version: u8, code: u8) -> u8 {
    if version == 5 { code } else { 0 }
}

#[tokio::test]
async fn a_message_is_forwarded_once_until_it_is_released() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let topic = format!("once/{version}");
        let mut receiver = receiver(mqtt, version, &topic).await;
        let mut sender = sender(mqtt, version).await;
        let message = Publish::new(2, 7, &topic, "one");
        sender.publish(&message).await;
        assert_eq!(sender.acked(PUBREC, 7).await, 0);
        // The same identifier is the same message, whether it says so or not.
        for again in [message.clone().dup(), message] {
            sender.publish(&again).await;
            assert_eq!(sender.acked(PUBREC, 7).await, 0);
        }
        let got = take(&mut receiver).await;
        assert_eq!((got.payload.as_str(), got.dup, got.retain), ("one", false, false));
        sender.ack(PUBREL, 7).await;
        assert_eq!(sender.acked(PUBCOMP, 7).await, 0);
        // From now on it is another one.
        send(&mut sender, 7, &topic, "two").await;
        assert_eq!(take(&mut receiver).await.payload, "two");
        receiver.nothing().await;
    }
}

#[tokio::test]
async fn an_identifier_that_is_unknown_is_said_to_be() {
    let server = Server::start().await;
    for version in VERSIONS {
        let mut device = sender(server.addresses().mqtt, version).await;
        device.ack(PUBREL, 5).await;
        assert_eq!(device.acked(PUBCOMP, 5).await, reason(version, NOT_FOUND));
        device.ack(PUBREC, 6).await;
        assert_eq!(device.acked(PUBREL, 6).await, reason(version, NOT_FOUND));
        // These end an exchange, so there is nothing to say.
        device.ack(PUBCOMP, 6).await;
        device.ack(PUBACK, 6).await;
        if version == 5 {
            device.raw.send(&mqtt::packet(PUBREC, &[0, 6, 0x80])).await;
        }
        device.nothing().await;
    }
}

#[tokio::test]
async fn a_refused_message_frees_its_identifier() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut five = sender(mqtt, 5).await;
    let wrong = Publish::new(2, 3, "refused", "\u{fffd}").with(0x01, &[1]);
    let mut bytes = wrong.bytes(5);
    *bytes.last_mut().unwrap() = 0xff; // no UTF-8, as it says to be
    five.raw.send(&bytes).await;
    assert_eq!(five.acked(PUBREC, 3).await, 0x99);
    five.ack(PUBREL, 3).await;
    assert_eq!(five.acked(PUBCOMP, 3).await, NOT_FOUND);
    five.publish(&Publish::new(2, 4, "otherapp/x", "").with(0x23, &[0, 1])).await;
    assert!(five.acked(PUBREC, 4).await < 0x80, "in the root app every name is a topic");
}

/// The device sends, and the connection ends in each of the four states of the exchange.
#[tokio::test]
async fn a_sender_may_lose_its_connection_in_any_state() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let topic = format!("sender/{version}");
        let mut receiver = receiver(mqtt, version, &topic).await;
        let kept = Connect::kept(version, &format!("kept-sender-{version}"));

        // Before the PUBREC: whatever became of the first PUBLISH, the second is the same message.
        for round in 1..=10_u16 {
            let mut device = Device::connect(mqtt, &kept).await;
            let message = Publish::new(2, round, &topic, &format!("unanswered {round}"));
            device.publish(&message).await;
            device.nothing_or_pubrec(round).await;
            drop(device);
            let mut device = Device::connect(mqtt, &kept).await;
            assert!(device.is_present, "v{version}");
            device.publish(&message.dup()).await;
            assert!(device.acked(PUBREC, round).await < 0x80);
            device.ack(PUBREL, round).await;
            assert_eq!(device.acked(PUBCOMP, round).await, 0);
            assert_eq!(take(&mut receiver).await.payload, format!("unanswered {round}"), "v{version}");
        }
        receiver.nothing().await;

        // After the PUBREC.
        let mut device = Device::connect(mqtt, &kept).await;
        let message = Publish::new(2, 100, &topic, "received");
        device.publish(&message).await;
        device.acked(PUBREC, 100).await;
        drop(device);
        let mut device = Device::connect(mqtt, &kept).await;
        device.publish(&message.dup()).await;
        assert_eq!(device.acked(PUBREC, 100).await, 0);
        drop(device);
        // After the PUBREC, and it has been heard.
        let mut device = Device::connect(mqtt, &kept).await;
        device.ack(PUBREL, 100).await;
        assert_eq!(device.acked(PUBCOMP, 100).await, 0, "v{version}: it was remembered");
        drop(device);
        // After the PUBCOMP, which was not heard.
        let mut device = Device::connect(mqtt, &kept).await;
        device.ack(PUBREL, 100).await;
        assert_eq!(device.acked(PUBCOMP, 100).await, reason(version, NOT_FOUND));
        // The identifier is free.
        send(&mut device, 100, &topic, "next").await;
        let both = [receiver.got().await, receiver.got().await];
        for got in &both {
            receiver.ack(PUBREC, got.id).await;
            receiver.acked(PUBREL, got.id).await;
            receiver.ack(PUBCOMP, got.id).await;
        }
        assert_eq!(both.map(|got| got.payload), ["received", "next"], "v{version}: nothing came twice");
        receiver.nothing().await;
        // A clean session has forgotten it all.
        device.publish(&Publish::new(2, 101, &topic, "before")).await;
        device.acked(PUBREC, 101).await;
        drop(device);
        let mut device = Device::connect(mqtt, &Connect { clean: true, ..kept.clone() }).await;
        assert!(!device.is_present);
        device.ack(PUBREL, 101).await;
        assert_eq!(device.acked(PUBCOMP, 101).await, reason(version, NOT_FOUND));
        assert_eq!(take(&mut receiver).await.payload, "before");
    }
}

/// The device receives, and the connection ends in each of the states of the exchange.
#[tokio::test]
async fn a_receiver_may_lose_its_connection_in_any_state() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let topic = format!("receiver/{version}");
        let kept = Connect::kept(version, &format!("kept-receiver-{version}"));
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.subscribe(&topic, 2).await, 2);
        let mut sender = sender(mqtt, version).await;
        // An identifier that is not the first, so that it cannot be right by chance.
        send(&mut sender, 1, &topic, "zero").await;
        take(&mut device).await;
        send(&mut sender, 1, &topic, "one").await;
        let first = device.got().await;
        assert_eq!((first.id, first.qos, first.dup, first.payload.as_str()), (2, 2, false, "one"));
        drop(device);

        // Before the PUBREC: again, with its identifier, and what came meanwhile after it.
        send(&mut sender, 2, &topic, "two").await;
        let mut device = Device::connect(mqtt, &kept).await;
        assert!(device.is_present);
        assert_eq!(device.got().await, Publish { dup: true, ..first }, "v{version}");
        let second = device.got().await;
        assert_eq!((second.id != 2, second.dup, second.payload.as_str()), (true, false, "two"));
        device.ack(PUBREC, 2).await;
        assert_eq!(device.acked(PUBREL, 2).await, 0);
        drop(device);

        // After the PUBREC: only the PUBREL comes again, and the message behind it.
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.acked(PUBREL, 2).await, 0, "v{version}");
        assert_eq!(device.got().await, Publish { dup: true, ..second.clone() });
        // A device that has not heard the PUBREL may say PUBREC again.
        device.ack(PUBREC, 2).await;
        assert_eq!(device.acked(PUBREL, 2).await, 0);
        device.ack(PUBREC, second.id).await;
        assert_eq!(device.acked(PUBREL, second.id).await, 0);
        device.ack(PUBCOMP, second.id).await;
        drop(device);

        // After one PUBCOMP, and not the other.
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.acked(PUBREL, 2).await, 0, "v{version}");
        device.ack(PUBCOMP, 2).await;
        device.nothing().await;
        drop(device);

        let mut device = Device::connect(mqtt, &kept).await;
        device.nothing().await;
        send(&mut sender, 3, &topic, "three").await;
        assert_eq!(take(&mut device).await.payload, "three");
    }
}

#[tokio::test]
async fn what_is_in_flight_comes_back_in_its_order_with_its_identifiers() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let kept = Connect::kept(version, &format!("flight-{version}"));
        let mut device = Device::connect(mqtt, &kept).await;
        for filter in [format!("flight/{version}/a"), format!("flight/{version}/#")] {
            device.subscribe(&filter, 2).await;
        }
        let mut sender = sender(mqtt, version).await;
        let mut sent = Vec::new();
        for i in 0..12_u16 {
            // Three topics, two qualities of service.
            let topic = format!("flight/{version}/{}", ["a", "b", "c"][usize::from(i % 3)]);
            let qos = 1 + (i % 2) as u8;
            sender.publish(&Publish::new(qos, 1, &topic, &i.to_string())).await;
            sender.acked(if qos == 1 { PUBACK } else { PUBREC }, 1).await;
            if qos == 2 {
                sender.ack(PUBREL, 1).await;
                sender.acked(PUBCOMP, 1).await;
            }
            sent.push(device.got().await);
        }
        let ids: Vec<u16> = sent.iter().map(|publish| publish.id).collect();
        assert_eq!(ids, (1..=12).collect::<Vec<_>>());
        // Some are finished, out of their order: 0 to 11 are of QoS 1, 2, 1, 2 …
        for at in [4, 6] {
            device.ack(PUBACK, sent[at].id).await;
        }
        for at in [1, 3] {
            device.ack(PUBREC, sent[at].id).await;
            device.acked(PUBREL, sent[at].id).await;
        }
        device.ack(PUBCOMP, sent[3].id).await;
        device.nothing().await;
        drop(device);
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.acked(PUBREL, sent[1].id).await, 0, "v{version}");
        for at in [0, 2, 5, 7, 8, 9, 10, 11] {
            assert_eq!(device.got().await, Publish { dup: true, ..sent[at].clone() }, "v{version}: {at}");
        }
        device.nothing().await;
        // What is new takes no identifier that is in use, and comes once.
        send(&mut sender, 1, &format!("flight/{version}/b"), "new").await;
        let new = take(&mut device).await;
        assert_eq!((new.dup, new.payload.as_str()), (false, "new"));
        assert!([0, 1, 2, 5, 7, 8, 9, 10, 11].iter().all(|&at| sent[at].id != new.id), "{}", new.id);
        // And once more, from the connection that only had them again.
        drop(device);
        let mut device = Device::connect(mqtt, &kept).await;
        device.acked(PUBREL, sent[1].id).await;
        device.ack(PUBCOMP, sent[1].id).await;
        for at in [0, 2, 5, 7, 8, 9, 10, 11] {
            assert_eq!(device.got().await, Publish { dup: true, ..sent[at].clone() });
        }
        for at in [0, 2, 8, 10] {
            device.ack(PUBACK, sent[at].id).await;
        }
        for at in [5, 7, 9, 11] {
            device.ack(PUBREC, sent[at].id).await;
        }
        for at in [5, 7, 9, 11] {
            assert_eq!(device.acked(PUBREL, sent[at].id).await, 0);
            device.ack(PUBCOMP, sent[at].id).await;
        }
        device.nothing().await;
        drop(device);
        Device::connect(mqtt, &kept).await.nothing().await;
    }
}

#[tokio::test]
async fn a_device_may_refuse_a_message() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let kept = Connect::kept(5, "refuser").with(0x21, &[0, 1]);
    let mut device = Device::connect(mqtt, &kept).await;
    device.subscribe("refused/by/device", 2).await;
    let mut sender = sender(mqtt, 5).await;
    for text in ["one", "two", "three"] {
        send(&mut sender, 1, "refused/by/device", text).await;
    }
    let one = device.got().await;
    assert_eq!(one.payload, "one");
    device.nothing().await; // the window is one
    device.raw.send(&mqtt::packet(PUBREC, &[&one.id.to_be_bytes()[..], &[0x97]].concat())).await;
    let two = device.got().await;
    assert_eq!(two.payload, "two", "no PUBREL, and the next one");
    drop(device);
    let mut device = Device::connect(mqtt, &kept).await;
    assert_eq!(
        device.got().await,
        Publish { dup: true, ..two.clone() },
        "what was refused does not come again"
    );
    device.ack(PUBREC, two.id).await;
    device.acked(PUBREL, two.id).await;
    device.nothing().await;
    device.ack(PUBCOMP, two.id).await;
    assert_eq!(take(&mut device).await.payload, "three");
}

#[tokio::test]
async fn the_receive_maximum_counts_both_qualities_of_service() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut device = Device::connect(mqtt, &Connect::new(5, "narrow").with(0x21, &[0, 2])).await;
    device.subscribe("narrow", 2).await;
    let mut sender = sender(mqtt, 5).await;
    for i in 0..6_u8 {
        let qos = 1 + i % 2;
        sender.publish(&Publish::new(qos, 1, "narrow", &i.to_string())).await;
        sender.acked(if qos == 1 { PUBACK } else { PUBREC }, 1).await;
        if qos == 2 {
            sender.ack(PUBREL, 1).await;
            sender.acked(PUBCOMP, 1).await;
        }
    }
    let (zero, one) = (device.got().await, device.got().await);
    assert_eq!((zero.qos, one.qos), (1, 2));
    device.nothing().await;
    // A PUBREC makes no room, a PUBCOMP does.
    device.ack(PUBREC, one.id).await;
    device.acked(PUBREL, one.id).await;
    device.nothing().await;
    device.ack(PUBCOMP, one.id).await;
    device.ack(PUBACK, zero.id).await;
    let (mut rest, mut released) = (Vec::new(), 0);
    while rest.len() < 4 || released < 2 {
        match device.raw.answer().await {
            Answer::Packet(PUBREL, body) => {
                device.raw.send(&mqtt::packet(PUBCOMP, &body)).await;
                released += 1;
            }
            Answer::Packet(first, body) => {
                let got = Publish::parse(5, first, &body);
                device.ack(if got.qos == 1 { PUBACK } else { PUBREC }, got.id).await;
                rest.push(got);
            }
            other => panic!("{other:?}"),
        }
    }
    let mut texts: Vec<String> = rest.into_iter().map(|publish| publish.payload).collect();
    texts.sort();
    assert_eq!(texts, ["2", "3", "4", "5"]);
}

#[tokio::test]
async fn a_device_that_exceeds_the_receive_maximum_is_disconnected() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut device = sender(mqtt, 5).await;
    // 64 may be unfinished, and a PUBREC does not finish one.
    for id in 1..=64 {
        device.publish(&Publish::new(2, id, "too/many", "x")).await;
        assert!(device.acked(PUBREC, id).await < 0x80);
    }
    // Not one more, but one of them again.
    device.publish(&Publish::new(2, 64, "too/many", "x").dup()).await;
    device.acked(PUBREC, 64).await;
    device.ack(PUBREL, 1).await;
    assert_eq!(device.acked(PUBCOMP, 1).await, 0);
    device.publish(&Publish::new(1, 1, "too/many", "x")).await;
    assert!(device.acked(PUBACK, 1).await < 0x80);
    device.publish(&Publish::new(2, 65, "too/many", "x")).await;
    device.acked(PUBREC, 65).await;
    device.publish(&Publish::new(2, 66, "too/many", "x")).await;
    assert_eq!(device.raw.answer().await.disconnect(), Some(0x93));
}

#[tokio::test]
async fn a_gateway_that_stops_in_order_loses_no_identifier_and_a_killed_one_no_message() {
    let mut server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let kept: Vec<Connect> =
        VERSIONS.iter().map(|&version| Connect::kept(version, &format!("stop-{version}"))).collect();
    let mut unfinished = Vec::new();
    for connect in &kept {
        let mut device = Device::connect(mqtt, connect).await;
        device.subscribe("stop", 2).await;
        unfinished.push(device);
    }
    let mut sender5 = sender(mqtt, 5).await;
    send(&mut sender5, 1, "stop", "zero").await;
    for device in &mut unfinished {
        take(device).await;
    }
    send(&mut sender5, 1, "stop", "one").await;
    let mut firsts = Vec::new();
    for device in &mut unfinished {
        firsts.push(device.got().await);
    }
    drop(unfinished);
    assert!(server.stop(libc::SIGTERM).await.success());
    server.restart().await;
    let mqtt = server.addresses().mqtt;
    for (connect, first) in kept.iter().zip(&firsts) {
        let mut device = Device::connect(mqtt, connect).await;
        assert_eq!(device.got().await, Publish { dup: true, ..first.clone() });
    }
    // The saver has to hear of these closings before the processes are killed, for what follows to be about the gateway.
    let mut devices = Vec::new();
    for connect in &kept {
        devices.push(Device::connect(mqtt, connect).await);
    }
    for (device, first) in devices.iter_mut().zip(&firsts) {
        assert_eq!(device.got().await.id, first.id);
    }
    server.kill().await;
    drop(devices);
    server.restart().await;
    let mut finished = Vec::new();
    for (connect, first) in kept.iter().zip(&firsts) {
        let mut device = Device::connect(server.addresses().mqtt, connect).await;
        // Nothing was acknowledged at the gateway that was killed, so all is as it was told before.
        let again = take(&mut device).await;
        assert_eq!((again.payload.as_str(), again.id, again.dup), ("one", first.id, true));
        finished.push(device);
    }
    send(&mut sender(server.addresses().mqtt, 5).await, 1, "stop", "two").await;
    for device in &mut finished {
        assert_eq!(take(device).await.payload, "two");
    }
    // The saver hears of that within milliseconds.
    tokio::time::sleep(Duration::from_millis(300)).await;
    // This one is killed with something unfinished, of which nobody was told.
    send(&mut sender(server.addresses().mqtt, 5).await, 1, "stop", "three").await;
    for device in &mut finished {
        assert!(device.got().await.id > 1);
    }
    server.kill().await;
    drop(finished);
    server.restart().await;
    for connect in &kept {
        let mut device = Device::connect(server.addresses().mqtt, connect).await;
        let again = take(&mut device).await;
        assert_eq!((again.payload.as_str(), again.id), ("three", 1), "under a new identifier");
        device.nothing().await;
    }
}

#[tokio::test]
async fn what_was_unsubscribed_from_in_flight_is_finished() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let kept = Connect::kept(version, &format!("left-{version}"));
        let topic = format!("left/{version}");
        let mut device = Device::connect(mqtt, &kept).await;
        device.subscribe(&topic, 2).await;
        let mut sender = sender(mqtt, version).await;
        send(&mut sender, 1, &topic, "one").await;
        let one = device.got().await;
        device.unsubscribe(&topic).await;
        send(&mut sender, 1, &topic, "unwanted").await;
        drop(device);
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.got().await, Publish { dup: true, ..one.clone() }, "v{version}");
        device.ack(PUBREC, one.id).await;
        assert_eq!(device.acked(PUBREL, one.id).await, 0);
        device.ack(PUBCOMP, one.id).await;
        device.nothing().await;
    }
}

/// A message that is no longer there cannot be sent again; its identifier is given back with a PUBREL.
#[tokio::test]
async fn an_expired_message_in_flight_gives_back_its_identifier() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let kept = Connect::kept(5, "expires");
    let mut device = Device::connect(mqtt, &kept).await;
    device.subscribe("expires", 2).await;
    let mut sender = sender(mqtt, 5).await;
    for qos in [1, 2] {
        sender.publish(&Publish::new(qos, 1, "expires", "soon gone").with(0x02, &1_u32.to_be_bytes())).await;
        sender.acked(if qos == 1 { PUBACK } else { PUBREC }, 1).await;
    }
    let (one, two) = (device.got().await, device.got().await);
    assert_eq!((one.qos, two.qos), (1, 2));
    drop(device);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut device = Device::connect(mqtt, &kept).await;
    assert_eq!(device.acked(PUBREL, two.id).await, 0);
    device.ack(PUBCOMP, two.id).await;
    device.nothing().await;
}

#[tokio::test]
async fn a_retained_message_in_flight_comes_back_as_one() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let topic = format!("kept/{version}");
        let mut sender = sender(mqtt, version).await;
        sender.publish(&Publish { retain: true, ..Publish::new(2, 1, &topic, "retained") }).await;
        sender.acked(PUBREC, 1).await;
        sender.ack(PUBREL, 1).await;
        sender.acked(PUBCOMP, 1).await;
        let kept = Connect::kept(version, &format!("of-kept-{version}"));
        let mut device = Device::connect(mqtt, &kept).await;
        device.subscribe(&topic, 2).await;
        let retained = device.got().await;
        assert_eq!((retained.qos, retained.retain, retained.payload.as_str()), (2, true, "retained"));
        drop(device);
        let mut device = Device::connect(mqtt, &kept).await;
        assert_eq!(device.got().await, Publish { dup: true, ..retained.clone() }, "v{version}");
        device.ack(PUBREC, retained.id).await;
        assert_eq!(device.acked(PUBREL, retained.id).await, 0);
        device.ack(PUBCOMP, retained.id).await;
        device.nothing().await;
    }
}

#[tokio::test]
async fn a_will_may_have_qos_2() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        let topic = format!("will2/{version}");
        let mut watcher = receiver(mqtt, version, &topic).await;
        let mut connect = Connect::new(version, &format!("mortal-{version}"));
        connect.will = Some((2, false, topic.clone(), b"gone".to_vec()));
        drop(Device::connect(mqtt, &connect).await);
        let will = take(&mut watcher).await;
        assert_eq!((will.topic, will.payload.as_str()), (topic, "gone"));
    }
}

#[tokio::test]
async fn quality_of_service_is_the_lower_of_both() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for version in VERSIONS {
        for subscribed in 0..=2 {
            let topic = format!("lower/{version}/{subscribed}");
            let mut device = Device::connect(mqtt, &Connect::new(version, "lower")).await;
            assert_eq!(device.subscribe(&topic, subscribed).await, subscribed);
            for published in 0..=2 {
                let mut sender = sender(mqtt, version).await;
                sender
                    .publish(&Publish::new(published, if published > 0 { 1 } else { 0 }, &topic, "x"))
                    .await;
                let got = device.got().await;
                assert_eq!(got.qos, subscribed.min(published), "v{version}");
                match got.qos {
                    1 => device.ack(PUBACK, got.id).await,
                    2 => {
                        device.ack(PUBREC, got.id).await;
                        device.acked(PUBREL, got.id).await;
                        device.ack(PUBCOMP, got.id).await;
                    }
                    _ => {}
                }
            }
        }
    }
}

#[tokio::test]
async fn a_push_may_have_qos_2() {
    let server = Server::start().await;
    let mut device = receiver(server.addresses().mqtt, 5, "demo/u/alice").await;
    server.post("messages", serde_json::json!({ "topic": "u/alice", "payload": "x", "qos": 2 })).await;
    assert_eq!(take(&mut device).await.payload, "x");
}

/// MQTT 5.0 §3.3.2.3.3: what is left of a message's life is told when it is sent, not when it came.
#[tokio::test]
async fn a_message_that_waits_has_less_left_of_its_life() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut device = Device::connect(mqtt, &Connect::new(5, "waits").with(0x21, &[0, 1])).await;
    device.subscribe("$SYS-is-not-this", 1).await;
    device.subscribe("waits", 2).await;
    let mut sender = sender(mqtt, 5).await;
    for text in ["one", "two"] {
        sender.publish(&Publish::new(1, 1, "waits", text).with(0x02, &100_u32.to_be_bytes())).await;
        sender.acked(PUBACK, 1).await;
    }
    let left = |publish: &Publish| {
        u32::from_be_bytes(publish.property(0x02).expect("an expiry").try_into().expect("four bytes"))
    };
    let one = device.got().await;
    assert!((99..=100).contains(&left(&one)), "{}", left(&one));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    device.ack(PUBACK, one.id).await;
    let two = device.got().await;
    assert_eq!(two.payload, "two");
    assert!((96..=98).contains(&left(&two)), "{}", left(&two));
}

#[tokio::test]
async fn connack_says_what_is_served() {
    let server = Server::start().await;
    let device = sender(server.addresses().mqtt, 5).await;
    let properties = &device.connack[1..];
    assert!(
        !properties.windows(2).any(|w| w == [0x24, 1] || w == [0x24, 0]),
        "no Maximum QoS: {properties:02x?}"
    );
    assert!(properties.windows(3).any(|w| w == [0x22, 0, 16]), "Topic Alias Maximum 16: {properties:02x?}");
}

#[tokio::test]
async fn a_device_may_use_topic_aliases() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut receiver = receiver(mqtt, 5, "aliased/#").await;
    let mut device = sender(mqtt, 5).await;
    let alias = |alias: u16, topic: &str, payload: &str| {
        Publish::new(1, 1, topic, payload).with(0x23, &alias.to_be_bytes())
    };
    for (publish, topic) in [
        (alias(1, "aliased/one", "a"), "aliased/one"),
        (alias(1, "", "b"), "aliased/one"),
        (alias(16, "aliased/last", "c"), "aliased/last"),
        (alias(1, "", "d"), "aliased/one"),
        (alias(1, "aliased/other", "e"), "aliased/other"),
        (alias(1, "", "f"), "aliased/other"),
        (alias(16, "", "g"), "aliased/last"),
    ] {
        device.publish(&publish).await;
        assert_eq!(device.acked(PUBACK, 1).await, 0);
        let got = receiver.got().await;
        receiver.ack(PUBACK, got.id).await;
        assert_eq!((got.topic.as_str(), &got.payload), (topic, &publish.payload));
        assert_eq!(got.property(0x23), None, "an alias is of its connection");
    }
    // With QoS 0 and 2 too.
    device.publish(&Publish::new(0, 0, "", "h").with(0x23, &[0, 1])).await;
    device.publish(&Publish::new(2, 2, "", "i").with(0x23, &[0, 16])).await;
    assert_eq!(device.acked(PUBREC, 2).await, 0);
    let mut got = [receiver.got().await, receiver.got().await].map(|got| (got.payload, got.topic));
    got.sort();
    let expected = [("h", "aliased/other"), ("i", "aliased/last")];
    assert_eq!(got, expected.map(|(payload, topic)| (payload.to_owned(), topic.to_owned())));
    // What is wrong ends the connection, and with it all aliases.
    for (publish, code) in [
        (alias(17, "aliased/above", "x"), 0x94),
        (alias(0, "aliased/zero", "x"), 0x94),
        (alias(1, "", "x"), 0x82),
        (alias(0xffff, "", "x"), 0x94),
    ] {
        let mut device = sender(mqtt, 5).await;
        device.publish(&publish).await;
        assert_eq!(device.raw.answer().await.disconnect(), Some(code), "{publish:?}");
        assert_eq!(device.raw.answer().await, Answer::Closed);
    }
    receiver.nothing().await;
}

#[tokio::test]
async fn topics_are_aliased_for_a_device_that_allows_it() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut device = Device::connect(mqtt, &Connect::new(5, "aliases").with(0x22, &[0, 2])).await;
    let mut plain = Device::connect(mqtt, &Connect::new(5, "plain")).await;
    for filter in ["alias/#", "demo/alias/full"] {
        device.subscribe(filter, 2).await;
        plain.subscribe(filter, 2).await;
    }
    let mut sender = sender(mqtt, 5).await;
    let mut expected = Vec::new();
    for (topic, qos, alias, is_told) in [
        ("alias/one", 0, Some(1), true),
        ("alias/one", 0, Some(1), false),
        ("alias/one", 1, Some(1), false),
        ("alias/one", 2, Some(1), false),
        ("alias/two", 2, Some(2), true),
        ("alias/three", 1, None, true),
        ("alias/two", 0, Some(2), false),
        ("alias/one", 0, Some(1), false),
    ] {
        sender.publish(&Publish::new(qos, u16::from(qos > 0), topic, "x")).await;
        match qos {
            1 => drop(sender.acked(PUBACK, 1).await),
            2 => {
                sender.acked(PUBREC, 1).await;
                sender.ack(PUBREL, 1).await;
                sender.acked(PUBCOMP, 1).await;
            }
            _ => {}
        }
        expected.push(topic);
        let got = device.got().await;
        let topic = if is_told { topic } else { "" };
        assert_eq!((got.topic.as_str(), got.qos, got.payload.as_str()), (topic, qos, "x"));
        assert_eq!(got.property(0x23).map(|alias| u16::from_be_bytes(alias.try_into().unwrap())), alias);
    }
    // Who has not asked for them gets none.
    for topic in expected {
        let got = plain.got().await;
        assert_eq!((got.topic.as_str(), got.property(0x23)), (topic, None));
    }
    // On the next connection they begin anew.
    drop(device);
    let mut device = Device::connect(mqtt, &Connect::new(5, "aliases").with(0x22, &[0, 1])).await;
    device.subscribe("alias/#", 0).await;
    for (topic, alias) in [("alias/two", Some(&[0, 1][..])), ("alias/one", None)] {
        sender.publish(&Publish::new(0, 0, topic, "x")).await;
        let got = device.got().await;
        assert_eq!((got.topic.as_str(), got.property(0x23)), (topic, alias));
    }
}

/// A topic that is too large to be sent takes no alias: the device would not know what it stands for.
#[tokio::test]
async fn an_alias_is_told_by_what_is_sent() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let connect = Connect::new(5, "small").with(0x22, &[0, 2]).with(0x27, &60_u32.to_be_bytes());
    let mut device = Device::connect(mqtt, &connect).await;
    device.subscribe("small/#", 1).await;
    let mut sender = sender(mqtt, 5).await;
    for (qos, payload) in
        [(0, "x".repeat(100)), (1, "x".repeat(100)), (1, "fits".to_owned()), (1, "too".to_owned())]
    {
        sender.publish(&Publish::new(qos, u16::from(qos), "small/topic", &payload)).await;
        if qos == 1 {
            sender.acked(PUBACK, 1).await;
        }
    }
    for (topic, payload) in [("small/topic", "fits"), ("", "too")] {
        let got = device.got().await;
        assert_eq!((got.topic.as_str(), got.payload.as_str()), (topic, payload));
        assert_eq!(got.property(0x23), Some(&[0, 1][..]));
    }
}

/// Who leaves the app's level out is a client that knows nothing of Carillon: it gets the publisher's user properties, and
/// nothing else (MQTT 5.0 [MQTT-3.3.2-17]).
#[tokio::test]
async fn user_properties_are_the_publishers_own_for_who_leaves_the_app_out() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut short = receiver(mqtt, 5, "props/x").await;
    let mut full = Device::connect(mqtt, &Connect::new(5, "full")).await;
    full.subscribe("demo/props/x", 2).await;
    let mut sender = sender(mqtt, 5).await;
    let pair = [mqtt::string("a"), mqtt::string("1")].concat();
    sender.publish(&Publish::new(2, 1, "props/x", "").with(0x26, &pair)).await;
    assert_eq!(take(&mut short).await.properties, [(0x26, pair.clone())]);
    let got = take(&mut full).await;
    let names: Vec<&[u8]> =
        got.properties.iter().map(|(_, value)| &value[2..2 + usize::from(value[1])]).collect();
    assert_eq!(names, [&b"epoch"[..], b"seq", b"id", b"a"]);
}

/// Bytes that no device should send, in the middle of exchanges of QoS 2: the server stays well.
#[tokio::test]
async fn broken_acknowledgements_end_the_connection() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    for (bytes, code) in [
        (mqtt::packet(0x60, &[0, 1]), 0x81),            // PUBREL with flags of 0
        (mqtt::packet(0x52, &[0, 1]), 0x81),            // PUBREC with flags
        (mqtt::packet(0x72, &[0, 1]), 0x81),            // PUBCOMP with flags
        (mqtt::packet(0x62, &[0, 0]), 0x82),            // packet identifier 0
        (mqtt::packet(0x62, &[0, 1, 0x10]), 0x82),      // not a reason of a PUBREL
        (mqtt::packet(0x50, &[0]), 0x81),               // half an identifier
        (mqtt::packet(0x36, b"\0\x01a\0\x01\0"), 0x81), // QoS 3
        (Publish::new(2, 0, "a", "").bytes(5), 0x82),
    ] {
        let mut device = sender(mqtt, 5).await;
        device.raw.send(&bytes).await;
        assert_eq!(device.raw.answer().await.disconnect(), Some(code), "{bytes:02x?}");
        let mut device = sender(mqtt, 4).await;
        device.raw.send(&Publish::new(2, 0, "a", "").bytes(4)).await;
        assert_eq!(device.raw.answer().await, Answer::Closed);
    }
    eventually("the server serves", || async {
        let mut device = sender(mqtt, 5).await;
        send(&mut device, 1, "still", "there").await;
        Ok::<(), ()>(())
    })
    .await;
}

trait Impatient {
    /// Either the PUBREC is there, or nothing yet: the connection is to end at a random moment of the exchange.
    async fn nothing_or_pubrec(&mut self, id: u16);
}

impl Impatient for Device {
    async fn nothing_or_pubrec(&mut self, id: u16) {
        // Odd rounds do not wait at all.
        if id.is_multiple_of(2) {
            let answer = self.raw.answer_within(Duration::from_millis(u64::from(id))).await;
            assert!(matches!(answer, Answer::Silence | Answer::Packet(PUBREC, _)), "{answer:?}");
        }
    }
}
