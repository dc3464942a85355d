//! Two hubs with a store each: only one of the stores is the cluster's saver, whatever is started, killed or restored.

use carillon_tests::cluster::{Cluster, Process};
use carillon_tests::eventually;
use carillon_tests::mqtt::{Connect, Device};
use serde_json::Value;

/// It must end by itself, with an error; gives what it has logged.
async fn refused(mut hub: Process) -> String {
    let status = hub.gone().await;
    let logs = hub.logs();
    assert_eq!(status.code(), Some(1), "{logs}");
    logs
}

fn store_of(hub: &Process) -> String {
    let marker = std::fs::read_to_string(hub.data().join("saver/marker.json")).expect("a store");
    let marker: Value = serde_json::from_str(&marker).expect("JSON");
    marker["id"].as_str().expect("an id").to_owned()
}

async fn kept(cluster: &Cluster, text: &str) -> bool {
    let page = cluster.get("topics/kept/messages?limit=100").await;
    page["messages"].as_array().expect("messages").iter().any(|message| message["payload"] == text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_store_is_no_saver_until_the_first_is_given_up() {
    let mut cluster = Cluster::start(1, "").await;
    cluster.publish("kept", "one").await;
    let (first, store) = (cluster.hub().instance(), store_of(cluster.hub()));

    // Beside the living one: a hub as anyone would start it, and one that is told to take over.
    let logs = refused(cluster.hub_beside("second", &[])).await;
    assert!(logs.contains(&format!("is {store}, of instance {first}")), "{logs}");
    assert!(logs.contains("--roles registry,center,coordinator,dispatcher"), "{logs}");
    let logs = refused(cluster.hub_beside("second", &["--take-over-saver", &store])).await;
    assert!(logs.contains(&format!("stop {first} first")), "{logs}");
    // It was never there for anybody.
    assert!(!cluster.cli(&["instances"]).await.contains("second"));
    let savers = cluster.cli(&["instances"]).await.matches("saver").count();
    assert_eq!(savers, 1);
    cluster.add_registry().await;

    // The same store comes back, also after a loss of all.
    cluster.kill_hub().await;
    cluster.kill_keeper().await;
    cluster.restart_keeper().await;
    cluster.restart_hub().await;
    assert!(kept(&cluster, "one").await);

    // The first is dead, and the keeper has noticed: its store is still the saver.
    cluster.kill_hub().await;
    eventually("the dead hub is not known any more", || async {
        let known = cluster.cli(&["instances"]).await;
        if known.contains(&first) { Err(known) } else { Ok(()) }
    })
    .await;
    let logs = refused(cluster.hub_beside("second", &[])).await;
    assert!(logs.contains(&format!("--take-over-saver {store}")), "{logs}");
    let logs = refused(cluster.hub_beside("second", &["--take-over-saver", "another"])).await;
    assert!(logs.contains(&format!("--take-over-saver {store}")), "{logs}");

    // Given up deliberately.
    let mut second = cluster.hub_beside("second", &["--take-over-saver", &store]);
    second.ready().await;
    assert_ne!(store_of(&second), store);
    let mut device = Device::connect(cluster.gateways[0].mqtt, &Connect::new(5, "device")).await;
    assert_eq!(device.subscribe("kept", 1).await, 1, "the gateway uses the other saver");
    // The former one is refused, and the other may be started again as it was, or without the flag.
    assert_eq!(cluster.start_hub_again().await.code(), Some(1));
    assert!(cluster.hub().logs().contains(&format!(
        "is {}, of instance {}",
        store_of(&second),
        second.instance()
    )));
    second.kill().await;
    for flags in [&["--take-over-saver", &store] as &[&str], &[]] {
        let mut again = cluster.hub_beside("second", flags);
        again.ready().await;
        again.kill().await;
    }
}
