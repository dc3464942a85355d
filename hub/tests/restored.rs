//! The keeper is lost and restored from a snapshot that is older than the last changes of owners.

#[path = "harness/cluster.rs"]
mod harness;

use carillon_agent::app::App;
use carillon_agent::document::DocumentKind;
use carillon_hub::config::HubConfig;
use carillon_hub::peers::PeerError;
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions, snapshot};
use carillon_proto::topic::slot_of;
use carillon_proto::v1::{self, PublishCode, saver_error, saver_request};
use harness::{Cluster, eventually, message, request};
use tokio::net::TcpListener;

const TOPIC: &str = "demo/g/a";

async fn keeper(directory: std::path::PathBuf, address: &str) -> KeeperHandle {
    let listener = eventually("the address is free", async || TcpListener::bind(address).await.ok()).await;
    let kinds = vec![DocumentKind::of::<App>(), DocumentKind::of::<HubConfig>()];
    Keeper::start(KeeperOptions::new(directory, listener, kinds)).await.unwrap()
}

/// The epoch and number that a stored message gets, when it is accepted.
async fn accepted(cluster: &Cluster, text: &str) -> (u64, u64) {
    let owners = cluster.owners();
    eventually("a message is accepted", async || {
        let published = owners.publish(request(TOPIC, text, 1)).await.ok()?;
        (published.code() == PublishCode::Accepted).then_some((published.epoch, published.seq))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saver_that_has_seen_later_epochs_takes_a_restored_clusters_messages() {
    let mut cluster = Cluster::start(&[("demo", "{}")]).await;
    let saved = cluster.dir.path().join("saved");
    std::fs::write(&saved, cluster.admin.save_snapshot().await.unwrap()).unwrap();
    // Each start is another owner; the saver hears of it.
    for _ in 0..3 {
        cluster.stop_hub().await;
        cluster.start_hub().await;
    }
    let (seen, first) = accepted(&cluster, "before").await;
    assert!(seen >= 4, "{seen}");

    let (address, id) = (cluster.keeper.addr().to_string(), cluster.keeper.status().cluster_id);
    let placeholder = keeper(cluster.dir.path().join("placeholder"), "127.0.0.1:0").await;
    std::mem::replace(&mut cluster.keeper, placeholder).stop().await;
    let directory = cluster.dir.path().join("restored");
    let info = snapshot::restore(&saved, &directory, &id, &address).await.unwrap();
    assert_eq!(info.instances, ["hub-1"]);
    let restored = keeper(directory, &address).await;
    std::mem::replace(&mut cluster.keeper, restored).stop().await;

    // The claim on the saver is not in a restored cluster; but the hub that has the store is there, and claims it again.
    for refusal in ["hub-1", "--take-over-saver"] {
        eventually(refusal, async || {
            let refused = cluster.admin.claim_saver("another", "hub-2", None).await.unwrap_err();
            refused.to_string().contains(refusal).then_some(())
        })
        .await;
    }

    // The same hub process, all the while.
    let (epoch, next) = eventually("it owns its slots under a new epoch", async || {
        Some(accepted(&cluster, "after").await).filter(|(epoch, _)| *epoch > seen)
    })
    .await;
    assert!(next > first && epoch > 1 << 50, "{epoch}:{next}");
    // Who was the owner before has no say any more.
    let stale = v1::Append {
        slot: slot_of(TOPIC),
        message: Some(v1::Message { epoch: seen, seq: next + 1, ..message(TOPIC, "stale", 1) }),
        log: true,
        ..v1::Append::default()
    };
    let refused = cluster.directory().ask_saver(saver_request::Op::Append(stale)).await.unwrap_err();
    assert!(matches!(&refused, PeerError::Saver { code: saver_error::Code::Fenced, .. }), "{refused}");
    cluster.stop().await;
}
