//! No keeper can be reached, and processes start all the same: from what they have kept on their disks.

use carillon_tests::cluster::Cluster;
use carillon_tests::eventually;
use carillon_tests::mqtt::{Connect, Device};

/// What the device gets when a text is published for it.
async fn arrives(cluster: &Cluster, device: &mut Device, text: &str) {
    cluster.publish("news", text).await;
    let got = device.got().await;
    assert_eq!((got.topic.as_str(), got.payload.as_str()), ("news", text));
    device.ack(0x40, got.id).await;
}

/// `carillon instances`.
async fn instances(cluster: &Cluster) -> Vec<serde_json::Value> {
    serde_json::from_str(&cluster.cli(&["instances", "--output", "json"]).await).expect("a list")
}

fn incarnations(instances: &[serde_json::Value]) -> Vec<u64> {
    instances.iter().map(|one| one["incarnation"].as_u64().unwrap()).collect()
}

/// Where the hub and the gateway keep what they know.
fn caches(cluster: &Cluster) -> [std::path::PathBuf; 2] {
    [cluster.hub().data(), cluster.gateways[0].data()].map(|data| data.join("agent-cache"))
}

async fn device(cluster: &Cluster, client_id: &str) -> Device {
    let mut device = Device::connect(cluster.gateways[0].mqtt, &Connect::new(5, client_id)).await;
    assert!(device.subscribe("news", 1).await <= 1);
    device
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_and_hub_start_while_no_keeper_can_be_reached() {
    let mut cluster = Cluster::start(1, "").await;
    let mut first = device(&cluster, "first").await;
    arrives(&cluster, &mut first, "before").await;
    eventually("what is known is on their disks", || async {
        let missing: Vec<_> = caches(&cluster)
            .into_iter()
            .filter(|path| {
                let bytes = std::fs::read(path).unwrap_or_default();
                // The app, and who is there: the last that came.
                let has = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
                !has("carillon/config/app/demo") || !has("carillon/instances/gateway-")
            })
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    })
    .await;
    let before = instances(&cluster).await;
    assert_eq!(incarnations(&before), [1, 1]);
    eventually("the gateway tells how many connections it has", || async {
        let now = instances(&cluster).await;
        let gateway = now.iter().find(|one| one["roles"][0] == "gateway").unwrap();
        if gateway["load"]["connections"] == 1.0 { Ok(()) } else { Err(now) }
    })
    .await;

    cluster.kill_keeper().await;
    // Those that run serve on.
    arrives(&cluster, &mut first, "without-a-keeper").await;
    cluster.gateways[0].kill().await;
    cluster.kill_hub().await;
    cluster.start_gateway(0);
    // Returns when both are ready.
    cluster.restart_hub().await;
    let mut second = device(&cluster, "second").await;
    arrives(&cluster, &mut second, "from-what-was-kept").await;
    // And once more, on top of that.
    cluster.kill_hub().await;
    cluster.restart_hub().await;
    arrives(&cluster, &mut second, "twice").await;

    cluster.restart_keeper().await;
    eventually("they are known under their new incarnations", || async {
        let now = instances(&cluster).await;
        let known = incarnations(&now);
        if known.len() == 2 && known.contains(&2) && known.contains(&3) { Ok(()) } else { Err(now) }
    })
    .await;
    arrives(&cluster, &mut second, "after").await;
    // The configuration is live again: a device that is not anonymous does not get in any more.
    cluster.cli(&["config", "set", "app/demo", "anonymous_devices=false"]).await;
    eventually("the gateway follows", || async {
        let mut raw = carillon_tests::mqtt::Raw::connect(cluster.gateways[0].mqtt).await;
        raw.send(&carillon_tests::mqtt::connect(5, "third", 60)).await;
        match raw.answer().await {
            carillon_tests::mqtt::Answer::Packet(0x20, body) if body[1] == 0 => Err("it got in"),
            _ => Ok(()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_starts_without_a_keeper_has_what_is_being_released_to_it() {
    let mut cluster = Cluster::start(2, "").await;
    let one = cluster.gateways[1].id.clone();
    cluster.cli(&["config", "set", "gateway", "max_packet_bytes=1024", "--instance", &one]).await;
    cluster.cli(&["config", "status", "gateway", "--wait", "30"]).await;
    eventually("the release is on its disk", || async {
        let cache = std::fs::read(cluster.gateways[1].data().join("agent-cache")).unwrap_or_default();
        let key = b"carillon/releases/gateway";
        if cache.windows(key.len()).any(|window| window == key) { Ok(()) } else { Err(cache.len()) }
    })
    .await;
    cluster.kill_keeper().await;
    for gateway in 0..2 {
        cluster.gateways[gateway].kill().await;
        cluster.start_gateway(gateway);
        cluster.gateways[gateway].ready().await;
    }
    for (gateway, expected) in [(0, 0x40), (1, 0xE0)] {
        let mut raw = carillon_tests::mqtt::Raw::device(cluster.gateways[gateway].mqtt, 5, "sizes").await;
        raw.send(&carillon_tests::mqtt::publish(5, "sizes", &[b'x'; 5000], Some(1))).await;
        match raw.answer().await {
            carillon_tests::mqtt::Answer::Packet(kind, _) => assert_eq!(kind, expected, "gateway {gateway}"),
            other => panic!("neither PUBACK nor DISCONNECT but {other:02x?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_is_broken_or_another_s_does_not_stop_a_start() {
    let mut cluster = Cluster::start(1, "").await;
    cluster.gateways[0].kill().await;
    cluster.kill_hub().await;
    let [hub, gateway] = caches(&cluster);
    // The hub's own, with one bit wrong; the gateway gets the hub's.
    let mut bytes = std::fs::read(&hub).expect("the hub's cache");
    std::fs::write(&gateway, &bytes).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&hub, &bytes).unwrap();
    cluster.start_gateway(0);
    cluster.restart_hub().await;
    let mut device = device(&cluster, "first").await;
    arrives(&cluster, &mut device, "all-the-same").await;
    for path in [&hub, &gateway] {
        let aside = path.with_extension("aside");
        assert!(aside.exists(), "{} is not there", aside.display());
    }
    let logs = [cluster.hub().logs(), cluster.gateways[0].logs()].concat();
    for reason in ["its checksum does not match", "another process"] {
        assert!(logs.contains(reason), "the log says {reason:?}: {logs}");
    }
}
