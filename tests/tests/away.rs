//! Devices that are away for a moment, or for good: flash disconnect, take-over by another gateway, wills.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use carillon_tests::cluster::Cluster;
use carillon_tests::device::{Device, Options, Packet, Will};
use carillon_tests::mqtt::Publish;
use carillon_tests::{PATIENCE, eventually};
use serde_json::json;

const PRESENCE: &str = "webhook: { url: 'http://127.0.0.1:9/', presence: true }";
const SOON: Duration = Duration::from_secs(5);

/// Presence events that were published for the webhook.
async fn presence(cluster: &Cluster) -> f64 {
    cluster.hub_metric("carillon_registry_presence_events_total").await
}

async fn is_online(cluster: &Cluster, user: &str) -> bool {
    cluster.get(&format!("users/{user}")).await["online"].as_bool().expect("a bool")
}

async fn subscribed(server: SocketAddr, options: &Options, filter: &str) -> Device {
    let mut device = Device::connected(server, options).await;
    device.subscribe(filter, 1).await.expect("a SUBACK");
    device
}

async fn text(device: &mut Device) -> String {
    let received = device.message(PATIENCE).await.expect("a message");
    if received.qos > 0 {
        device.ack(received.id).await.expect("a connection");
    }
    received.payload
}

/// Waits until the gateway has noticed that a connection is gone.
async fn parked(cluster: &Cluster, count: f64) {
    eventually("the session is parked", || async {
        let now = cluster.metric(0, "carillon_gateway_parked_sessions").await;
        if now == count { Ok(()) } else { Err(now) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_comes_back_soon_goes_on_without_the_saver_or_an_event() {
    for version in [5, 4] {
        let cluster = Cluster::start(1, PRESENCE).await;
        let server = cluster.gateways[0].mqtt;
        let options = Options::kept(version, "alice");
        let mut device = subscribed(server, &options, "demo/u/alice").await;
        device.subscribe("demo/g/+", 1).await.expect("a SUBACK");
        device.subscribe("demo/quiet", 0).await.expect("a SUBACK");
        cluster.push("alice", "before").await;
        assert_eq!(text(&mut device).await, "before");
        eventually("the online event", || async {
            let events = presence(&cluster).await;
            if events == 1.0 { Ok(()) } else { Err(events) }
        })
        .await;
        // The kernel gives each connection to one of two shards: after a dozen both ways have been gone.
        for round in 0..12 {
            drop(device);
            parked(&cluster, 1.0).await;
            cluster.push("alice", &format!("inbox {round}")).await;
            let publish = |topic: &str, store: bool| {
                let body =
                    json!({ "topic": topic, "payload": format!("{topic} {round} {store}"), "store": store });
                cluster.post("messages", body)
            };
            publish("g/news", true).await;
            publish("g/news", false).await;
            publish("quiet", false).await;
            // Into the gateway, before the device is back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(is_online(&cluster, "alice").await);
            device = Device::connected(server, &options).await;
            assert!(device.session_present, "round {round}");
            let mut got = vec![text(&mut device).await, text(&mut device).await, text(&mut device).await];
            got.sort();
            let expected =
                [format!("g/news {round} false"), format!("g/news {round} true"), format!("inbox {round}")];
            assert_eq!(got, expected, "version {version}, round {round}");
            cluster.push("alice", "live").await;
            assert_eq!(text(&mut device).await, "live", "round {round}");
        }
        assert_eq!(device.message(Duration::from_millis(300)).await, None, "and nothing twice");
        assert_eq!(presence(&cluster).await, 1.0, "nobody was told");
        assert_eq!(cluster.metric(0, "carillon_gateway_resumed_total").await, 12.0);
        assert_eq!(cluster.metric(0, "carillon_gateway_routes").await, 3.0);
        device.disconnect().await;
        eventually("the end is told", || async {
            let events = presence(&cluster).await;
            if events == 2.0 { Ok(()) } else { Err(events) }
        })
        .await;
        parked(&cluster, 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_subscribes_while_another_is_away_gets_nothing_from_before() {
    let cluster = Cluster::start(1, "").await;
    let server = cluster.gateways[0].mqtt;
    let options = Options::kept(5, "alice");
    drop(subscribed(server, &options, "demo/g/+").await);
    parked(&cluster, 1.0).await;
    let publish = |payload: &str| {
        cluster.post("messages", json!({ "topic": "g/news", "payload": payload, "store": true }))
    };
    publish("old").await;
    // Into the gateway, whose hold for alice remembers it.
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The kernel gives each connection to one of two shards: some come to alice's.
    let mut others = Vec::new();
    for n in 0..8 {
        others.push(subscribed(server, &Options::kept(5, &format!("bob{n}")), "demo/g/+").await);
    }
    publish("new").await;
    for other in &mut others {
        assert_eq!(text(other).await, "new");
    }
    let mut alice = Device::connected(server, &options).await;
    assert!(alice.session_present);
    assert_eq!([text(&mut alice).await, text(&mut alice).await], ["old", "new"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_acked_comes_again_with_dup_and_in_order() {
    let cluster = Cluster::start(1, "").await;
    let server = cluster.gateways[0].mqtt;
    let options = Options::kept(5, "alice");
    let mut device = subscribed(server, &options, "demo/u/alice").await;
    for i in 0..6 {
        cluster.push("alice", &format!("{i}")).await;
    }
    for i in 0..5 {
        let received = device.message(SOON).await.expect("a message");
        assert_eq!((received.payload.as_str(), received.dup), (i.to_string().as_str(), false));
        if i < 2 {
            device.ack(received.id).await.expect("a connection");
        }
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(device);
    parked(&cluster, 1.0).await;
    cluster.push("alice", "6").await;
    // The old connection need not even be noticed to be gone, the second time.
    for _ in 0..2 {
        let mut device = Device::connected(server, &options).await;
        assert!(device.session_present);
        let mut got: Vec<Publish> = Vec::new();
        for _ in 2..7 {
            got.push(device.message(SOON).await.expect("a message"));
        }
        let payloads: Vec<&str> = got.iter().map(|received| received.payload.as_str()).collect();
        assert_eq!(payloads, ["2", "3", "4", "5", "6"]);
        assert!(got[..4].iter().all(|received| received.dup), "{got:?}");
        std::mem::forget(device);
    }
    assert_eq!(cluster.metric(0, "carillon_gateway_resumed_total").await, 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_come_back_in_time_is_away_and_finds_everything_later() {
    let cluster = Cluster::start(2, PRESENCE).await;
    cluster.cli(&["config", "set", "gateway", "resume_window_seconds=2"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let server = cluster.gateways[0].mqtt;
    let options = Options::kept(5, "alice");
    let device = subscribed(server, &options, "demo/u/alice").await;
    drop(device);
    parked(&cluster, 1.0).await;
    let began = Instant::now();
    cluster.push("alice", "one").await;
    eventually("alice is away", || async {
        if is_online(&cluster, "alice").await { Err(()) } else { Ok(()) }
    })
    .await;
    assert!(began.elapsed() > Duration::from_secs(1), "not before the window is over: {:?}", began.elapsed());
    eventually("and her end is told", || async {
        let events = presence(&cluster).await;
        if events == 2.0 { Ok(()) } else { Err(events) }
    })
    .await;
    assert_eq!(cluster.metric(0, "carillon_gateway_parked_ended_total").await, 1.0);
    eventually("nothing is left of her", || async {
        let routes = cluster.metric(0, "carillon_gateway_routes").await;
        if routes == 0.0 { Ok(()) } else { Err(routes) }
    })
    .await;
    cluster.push("alice", "two").await;
    let mut device = Device::connected(server, &options).await;
    assert!(device.session_present);
    assert_eq!((text(&mut device).await, text(&mut device).await), ("one".into(), "two".into()));
    // Away again, and back at the other gateway within the window.
    drop(device);
    parked(&cluster, 1.0).await;
    cluster.push("alice", "three").await;
    let mut device = Device::connected(cluster.gateways[1].mqtt, &options).await;
    assert!(device.session_present);
    assert_eq!(text(&mut device).await, "three");
    parked(&cluster, 0.0).await;
    assert_eq!(presence(&cluster).await, 3.0, "she came once more, and was not away since");
    // A clean start wants nothing of what is parked.
    drop(device);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let clean = Options { clean: true, ..options };
    let device = Device::connected(cluster.gateways[1].mqtt, &clean).await;
    assert!(!device.session_present);
    assert_eq!(cluster.metric(1, "carillon_gateway_parked_sessions").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_goes_to_another_gateway_with_all_that_was_not_acked() {
    let mut cluster = Cluster::start(3, PRESENCE).await;
    let [first, second, third] = [0, 1, 2].map(|i| cluster.gateways[i].mqtt);
    let options = Options::kept(5, "alice");
    let mut one = subscribed(first, &options, "demo/u/alice").await;
    for i in 0..5 {
        cluster.push("alice", &format!("{i}")).await;
    }
    for i in 0..5 {
        let received = one.message(SOON).await.expect("a message");
        if i < 2 {
            one.ack(received.id).await.expect("a connection");
        }
    }
    // Acks reach the saver within milliseconds.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut two = Device::connected(second, &options).await;
    assert!(two.session_present);
    assert_eq!(one.next().await.expect("an end"), Packet::End(Some((0x8E, None))), "session taken over");
    for i in 2..5 {
        let received = two.message(SOON).await.expect("a message");
        assert_eq!(received.payload, i.to_string());
    }
    assert_eq!(presence(&cluster).await, 1.0, "alice was online all the time");
    let sessions = cluster.get("users/alice").await;
    assert_eq!(sessions["sessions"].as_array().expect("a list").len(), 1, "{sessions}");
    // The gateway dies with three messages that nobody has acked; a fourth comes while it is dead.
    cluster.gateways[1].kill().await;
    cluster.push("alice", "5").await;
    let mut three = Device::connected(third, &options).await;
    assert!(three.session_present);
    for i in 2..6 {
        assert_eq!(text(&mut three).await, i.to_string());
    }
    assert_eq!(three.message(Duration::from_millis(300)).await, None);
    // The lease of the dead one, 10 s, lapses, which is looked for each second: no news of alice, who is somewhere else.
    // That nothing happens can only be seen by waiting beyond it.
    tokio::time::sleep(Duration::from_secs(13)).await;
    assert_eq!(presence(&cluster).await, 1.0);
    assert!(is_online(&cluster, "alice").await);
}

fn with_will(client_id: &str, delay_seconds: u32) -> Options {
    let will = Will { topic: "demo/wills".into(), payload: format!("{client_id} is gone"), delay_seconds };
    Options { will: Some(will), ..Options::kept(5, client_id) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wills_outlive_their_gateway_and_are_published_once() {
    let mut cluster = Cluster::start(2, "").await;
    let [first, second] = [0, 1].map(|i| cluster.gateways[i].mqtt);
    let mut watcher = subscribed(second, &Options::kept(5, "watcher"), "demo/wills").await;
    // At once, though it is parked; and a delay that is over while the gateway lives.
    let quick = Device::connected(first, &with_will("quick", 0)).await;
    drop(quick);
    assert_eq!(text(&mut watcher).await, "quick is gone");
    let slow = Device::connected(first, &with_will("slow", 1)).await;
    drop(slow);
    assert_eq!(text(&mut watcher).await, "slow is gone");

    let good = Device::connected(first, &with_will("good", 0)).await;
    good.disconnect().await;
    let waiting = Device::connected(first, &with_will("waiting", 30)).await;
    drop(waiting);
    let returns = Device::connected(first, &with_will("returns", 15)).await;
    let back_in_time = Device::connected(first, &with_will("back-in-time", 15)).await;
    drop(back_in_time);
    let _at_once = Device::connected(first, &with_will("at-once", 0)).await;
    let _delayed = Device::connected(first, &with_will("delayed", 3)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Back at the other gateway while the first lives.
    let _back_in_time = Device::connected(second, &Options::kept(5, "back-in-time")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    cluster.gateways[0].kill().await;
    drop(returns);
    let _returns = Device::connected(second, &Options::kept(5, "returns")).await;
    // The delays begin with the kill, and are over when the gateway is given up.
    let mut gone = [text(&mut watcher).await, text(&mut watcher).await];
    gone.sort();
    assert_eq!(gone, ["at-once is gone", "delayed is gone"]);
    let lease = began.elapsed();
    assert!(lease > Duration::from_secs(3), "only when the gateway is given up: {lease:?}");
    let waiting = watcher.message(Duration::from_secs(40)).await.expect("the will with a long delay");
    assert_eq!(waiting.payload, "waiting is gone");
    let took = began.elapsed();
    assert!((28..34).contains(&took.as_secs()), "its own delay, not that from the kill: {took:?}");
    assert_eq!(watcher.message(Duration::from_secs(1)).await, None, "nobody else, and none twice");
    assert_eq!(cluster.hub_metric("carillon_registry_wills_total").await, 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_will_of_a_device_that_is_moved_is_not_published_if_it_arrives() {
    let cluster = Cluster::start(2, PRESENCE).await;
    let [first, second] = [0, 1].map(|i| cluster.gateways[i].mqtt);
    let mut watcher = subscribed(second, &Options::kept(5, "watcher"), "demo/wills").await;
    let mut device = Device::connected(first, &with_will("alice", 0)).await;
    let before = eventually("both are online", || async {
        let events = presence(&cluster).await;
        if events == 2.0 { Ok(events) } else { Err(events) }
    })
    .await;
    let drain = ["drain", &cluster.gateways[0].id, "--rate", "10"];
    let (_, end) = tokio::join!(cluster.cli(&drain), device.next());
    assert_eq!(end.expect("an end"), Packet::End(Some((0x9C, Some(second.to_string())))));
    let _device = Device::connected(second, &with_will("alice", 0)).await;
    assert_eq!(watcher.message(Duration::from_secs(3)).await, None);
    assert_eq!(presence(&cluster).await, before, "she was online all the time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paced_broadcast_reaches_who_drops_before_its_turn() {
    let cluster = Cluster::start(1, "").await;
    let server = cluster.gateways[0].mqtt;
    let mut devices = Vec::new();
    for name in 0..8 {
        let options = Options::kept(5, &format!("device-{name}"));
        devices.push((subscribed(server, &options, "demo/+").await, options));
    }
    cluster.post("broadcasts", json!({ "payload": "paced", "rate_per_second": 1 })).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut waiting = Vec::new();
    for (mut device, options) in devices {
        if device.message(Duration::from_millis(1)).await.is_none() {
            waiting.push((device, options));
        }
    }
    assert!(waiting.len() >= 4, "one a second: {}", waiting.len());
    // Each of these subscribes with a wildcard alone, which has never seen the topic.
    let before = waiting.len();
    let mut back = Vec::new();
    for (device, options) in waiting {
        drop(device);
        back.push(options);
    }
    parked(&cluster, before as f64).await;
    let began = Instant::now();
    let mut connected = Vec::new();
    for options in &back {
        let mut device = Device::connected(server, options).await;
        assert!(device.session_present);
        assert_eq!(text(&mut device).await, "paced");
        connected.push(device);
    }
    assert!(began.elapsed() < Duration::from_secs(2), "from the log: {:?}", began.elapsed());
    assert_eq!(cluster.metric(0, "carillon_gateway_resumed_total").await, before as f64);
    for device in &mut connected {
        assert_eq!(device.message(Duration::from_millis(200)).await, None, "once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moved_device_that_does_not_arrive_is_away_when_the_resume_window_is_over() {
    let cluster = Cluster::start(2, PRESENCE).await;
    cluster.cli(&["config", "set", "gateway", "resume_window_seconds=3"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let [first, second] = [0, 1].map(|i| cluster.gateways[i].mqtt);
    let mut watcher = subscribed(second, &Options::kept(5, "watcher"), "demo/wills").await;
    let mut device = Device::connected(first, &with_will("alice", 0)).await;
    let before = eventually("both are online", || async {
        let events = presence(&cluster).await;
        if events == 2.0 { Ok(events) } else { Err(events) }
    })
    .await;
    let drain = ["drain", &cluster.gateways[0].id, "--rate", "10"];
    let (_, end) = tokio::join!(cluster.cli(&drain), device.next());
    let began = Instant::now();
    assert_eq!(end.expect("an end"), Packet::End(Some((0x9C, Some(second.to_string())))));
    drop(device);
    assert_eq!(presence(&cluster).await, before, "she is on her way");
    // As one that dropped, and does not come back.
    assert_eq!(text(&mut watcher).await, "alice is gone");
    eventually("and her end is told", || async {
        let events = presence(&cluster).await;
        if events == before + 1.0 { Ok(()) } else { Err(events) }
    })
    .await;
    let took = began.elapsed();
    assert!((1..10).contains(&took.as_secs()), "{took:?}");
}
