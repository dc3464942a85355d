//! What a session's last gateway knew reaches the next one, also when the saver or a gateway is away in between.

use std::time::Duration;

use carillon_tests::Server;
use carillon_tests::cluster::Cluster;
use carillon_tests::mqtt::{Answer, Connect, Device, Publish};

const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;
const NOT_FOUND: u8 = 0x92;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_ends_while_the_saver_is_away_is_told_when_it_is_back() {
    let mut cluster = Cluster::start(2, "").await;
    let (first, second) = (cluster.gateways[0].mqtt, cluster.gateways[1].mqtt);
    let kept = |name: &str| Connect::kept(5, name);
    let mut device = Device::connect(first, &kept("sender")).await;
    device.publish(&Publish::new(2, 100, "handed/on", "once")).await;
    assert!(device.acked(PUBREC, 100).await < 0x80);
    let mut forgets = Device::connect(first, &kept("forgets")).await;
    assert_eq!(forgets.subscribe("handed/on", 1).await, 1);
    drop(forgets);
    let mut receiver = Device::connect(first, &kept("receiver")).await;
    assert_eq!(receiver.subscribe("handed/over", 2).await, 2);
    device.publish(&Publish::new(2, 101, "handed/over", "received")).await;
    assert!(device.acked(PUBREC, 101).await < 0x80);
    let received = receiver.got().await;
    assert_eq!(received.qos, 2);
    // Beyond the time that a request may wait for the saver's stream.
    cluster.kill_hub().await;
    drop(device);
    // Nobody hears how far the device is until its connection ends, and that is told later.
    receiver.ack(PUBREC, received.id).await;
    assert_eq!(receiver.acked(PUBREL, received.id).await, 0);
    drop(receiver);
    // A clean start that keeps nothing needs no saver.
    let clean = Device::connect(first, &Connect { keep_alive: 600, ..Connect::new(5, "forgets") }).await;
    assert!(!clean.is_present);
    // A request waits for the saver's stream for 10 s: only what is told again after that is heard below.
    tokio::time::sleep(Duration::from_secs(12)).await;
    cluster.restart_hub().await;
    carillon_tests::eventually("the saver has heard it", || async {
        let untold = cluster.metric(0, "carillon_gateway_saver_untold_sessions").await;
        if untold == 0.0 { Ok(()) } else { Err(format!("{untold} untold")) }
    })
    .await;
    let mut receiver = Device::connect(second, &kept("receiver")).await;
    assert!(receiver.is_present);
    assert_eq!(receiver.acked(PUBREL, received.id).await, 0, "it has the message");
    receiver.ack(PUBCOMP, received.id).await;
    receiver.nothing().await;
    let mut device = Device::connect(second, &kept("sender")).await;
    assert!(device.is_present);
    device.ack(PUBREL, 100).await;
    assert_eq!(device.acked(PUBCOMP, 100).await, 0, "the identifier was handed on");
    device.ack(PUBREL, 100).await;
    assert_eq!(device.acked(PUBCOMP, 100).await, NOT_FOUND, "and is released");
    drop(clean);
    assert!(!Device::connect(second, &kept("forgets")).await.is_present, "nothing was to be kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_dies_before_the_first_ack_takes_nothing_along() {
    let mut cluster = Cluster::start(3, "").await;
    let kept = Connect::kept(5, "alice");
    let mut device = Device::connect(cluster.gateways[0].mqtt, &kept).await;
    assert_eq!(device.subscribe("handed/on", 1).await, 1);
    for text in ["one", "two", "three", "four"] {
        cluster.publish("handed/on", text).await;
    }
    let mut got = Vec::new();
    for _ in 0..4 {
        got.push(device.got().await);
    }
    device.ack(PUBACK, got[0].id).await;
    device.ack(PUBACK, got[1].id).await;
    device.nothing().await;
    // In order, so that it is not kept by its gateway; the saver hears of it within milliseconds.
    device.raw.send(&[0xE0, 0]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let left: Vec<_> = got[2..].iter().map(|publish| (publish.id, publish.payload.clone(), true)).collect();
    assert_eq!(left[0].0, 3, "not what a new connection would begin with");
    for gateway in 1..3 {
        let mut device = Device::connect(cluster.gateways[gateway].mqtt, &kept).await;
        assert!(device.is_present);
        let again = [device.got().await, device.got().await];
        let again: Vec<_> = again.into_iter().map(|got| (got.id, got.payload, got.dup)).collect();
        assert_eq!(again, left, "gateway {gateway}");
        if gateway == 1 {
            cluster.gateways[1].kill().await;
        }
    }
}

/// A subscription of QoS 0 to a topic keeps no count; the wildcard of QoS 1 beside it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_with_qos_0_under_a_wildcard_with_qos_1_is_caught_up_at_once() {
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let kept = Connect::kept(5, "overlapping");
    let mut device = Device::connect(mqtt, &kept).await;
    assert_eq!(device.subscribe("over/#", 1).await, 1);
    assert_eq!(device.subscribe("over/x", 0).await, 0);
    // The kernel gives each connection to one of two shards: after a dozen both ways have been gone.
    for round in 0..12 {
        server.publish("over/x", &format!("live {round}")).await;
        let live = device.got().await;
        assert_eq!((live.qos, live.payload), (1, format!("live {round}")), "the higher of the two");
        device.ack(PUBACK, live.id).await;
        device.nothing().await;
        if round % 3 == 0 {
            // Through the saver.
            device.raw.send(&[0xE0, 0]).await;
        }
        drop(device);
        tokio::time::sleep(Duration::from_millis(100)).await;
        for text in ["one", "two"] {
            server.publish("over/x", &format!("{text} {round}")).await;
        }
        device = Device::connect(mqtt, &kept).await;
        assert!(device.is_present, "round {round}");
        for text in ["one", "two"] {
            let got = device.got().await;
            assert_eq!(got.payload, format!("{text} {round}"));
            device.ack(PUBACK, got.id).await;
        }
    }
    // The count goes from one subscription to the other and back, and nothing comes twice.
    for (qos, text) in [(1, "counts"), (0, "does not"), (2, "counts again")] {
        assert_eq!(device.subscribe("over/x", qos).await, qos);
        server.publish("over/x", text).await;
        let got = device.got().await;
        assert_eq!((got.qos, got.payload.as_str()), (1, text));
        device.ack(PUBACK, got.id).await;
    }
    device.unsubscribe("over/x").await;
    server.publish("over/x", "wildcard").await;
    assert_eq!(device.got().await.payload, "wildcard");
    device.nothing().await;
}

/// Each message is on a topic of its own, so that no later one shows that it is missed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wildcard_session_goes_from_shard_to_shard_under_a_stream_and_misses_nothing() {
    let server = Server::start_with(&["--shards", "2"]).await;
    let mqtt = server.addresses().mqtt;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let kept = Connect::kept(5, "wanderer").with(0x21, &1000_u16.to_be_bytes());
    let mut device = Device::connect(mqtt, &kept).await;
    assert_eq!(device.subscribe("stream/+", 1).await, 1);
    let publisher = tokio::spawn(async move {
        let mut publisher = Device::connect(mqtt, &Connect::new(5, "streamer")).await;
        let (mut sent, mut acked) = (0_u32, 0);
        while acked < sent || !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            while sent < acked + 8 && !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                sent += 1;
                let id = (sent % 60_000) as u16 + 1;
                publisher.publish(&Publish::new(1, id, &format!("stream/{sent}"), &sent.to_string())).await;
            }
            acked += 1;
            assert!(publisher.acked(PUBACK, (acked % 60_000) as u16 + 1).await < 0x80, "{acked}");
            // As fast as the device takes it: not how it catches up is in question here, but what it is owed.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        sent
    });
    let mut got = std::collections::HashSet::new();
    let began = std::time::Instant::now();
    let mut rounds = 0;
    while began.elapsed() < Duration::from_secs(20) {
        // While messages come, in the middle of one or between two.
        let until = tokio::time::Instant::now() + Duration::from_millis(20 + rounds % 7 * 10);
        while let Ok(answer) = tokio::time::timeout_at(until, device.raw.answer()).await {
            match answer {
                Answer::Packet(first @ (0x32 | 0x3A), body) => {
                    let publish = Publish::parse(5, first, &body);
                    got.insert(publish.payload);
                    device.ack(PUBACK, publish.id).await;
                }
                other => panic!("{other:02x?}"),
            }
        }
        // Sometimes dropped, sometimes taken over while it is there.
        let before = device;
        if rounds % 2 == 0 {
            drop(before);
            device = Device::connect(mqtt, &kept).await;
        } else {
            device = Device::connect(mqtt, &kept).await;
        }
        assert!(device.is_present);
        rounds += 1;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = publisher.await.expect("no panic");
    while got.len() < sent as usize {
        match device.raw.answer_within(Duration::from_secs(5)).await {
            Answer::Packet(first @ (0x32 | 0x3A), body) => {
                let publish = Publish::parse(5, first, &body);
                got.insert(publish.payload);
                device.ack(PUBACK, publish.id).await;
            }
            other => {
                let missed: Vec<u32> = (1..=sent).filter(|i| !got.contains(&i.to_string())).collect();
                panic!("{} of {sent} were missed in {rounds} rounds: {missed:?}; {other:02x?}", missed.len());
            }
        }
    }
    let resumed = server.metric("carillon_gateway_resumed_total").await;
    assert!(rounds > 50 && resumed > 0.9 * f64::from(rounds as u32), "{resumed} of {rounds} went on here");
}

/// While the owners of its topics come and go, what a device publishes to a topic is numbered in the order it was sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_device_publishes_keeps_its_order_while_owners_change() {
    const TOPICS: usize = 16;
    let mut cluster = Cluster::start(1, "").await;
    let mqtt = cluster.gateways[0].mqtt;
    let mut receiver = Device::connect(mqtt, &Connect::new(5, "receiver")).await;
    // By their names: what of a wildcard's a registry takes along when it goes is seen with the topic's next message only.
    for topic in 0..TOPICS {
        assert_eq!(receiver.subscribe(&format!("order/{topic}"), 1).await, 1);
    }
    let seen = std::sync::Arc::new(std::sync::Mutex::new(vec![Vec::<u32>::new(); TOPICS]));
    let noted = seen.clone();
    tokio::spawn(async move {
        loop {
            match receiver.raw.answer_within(Duration::from_secs(120)).await {
                Answer::Packet(first @ (0x32 | 0x3A), body) => {
                    let publish = Publish::parse(5, first, &body);
                    receiver.ack(PUBACK, publish.id).await;
                    let topic: usize = publish.topic.rsplit('/').next().unwrap().parse().unwrap();
                    let number = publish.payload.parse().unwrap();
                    let mut seen = noted.lock().unwrap();
                    // Accepted twice, with nobody having heard of the first time: at least once.
                    if !seen[topic].contains(&number) {
                        seen[topic].push(number);
                    }
                }
                _ => return,
            }
        }
    });
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let publisher = tokio::spawn(async move {
        let mut device = Device::connect(mqtt, &Connect::new(5, "publisher")).await;
        let (mut sent, mut acked) = (0_u32, 0);
        while acked < sent || !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            while sent < acked + 48 && !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let topic = format!("order/{}", sent as usize % TOPICS);
                let id = (sent % 60_000) as u16 + 1;
                device.publish(&Publish::new(1, id, &topic, &sent.to_string())).await;
                sent += 1;
            }
            assert!(device.acked(PUBACK, (acked % 60_000) as u16 + 1).await < 0x80, "{acked}");
            acked += 1;
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        sent
    });
    for _ in 0..3 {
        cluster.add_registry().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.stop_registry().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = publisher.await.expect("no panic");
    carillon_tests::eventually("everything has come", || async {
        let count: usize = seen.lock().unwrap().iter().map(Vec::len).sum();
        if count == sent as usize { Ok(()) } else { Err(format!("{count} of {sent}")) }
    })
    .await;
    for (topic, numbers) in seen.lock().unwrap().iter().enumerate() {
        let overtaken = numbers.windows(2).find(|pair| pair[0] > pair[1]);
        assert_eq!(overtaken, None, "on order/{topic}, {sent} messages");
    }
}
