//! Leases that are kept alive never end, however the keepers stand still; those that are not, do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use carillon_proto::v1;
use carillon_tests::keepers::client::{Client, Failure, put};
use carillon_tests::keepers::fault::{Call, How};
use carillon_tests::keepers::{leader, patiently, three};

const TTL: Duration = Duration::from_secs(5);
const HOLDERS: usize = 6;
const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps a lease alive through any keeper, until it is told to stop or the lease is over.
async fn hold(clients: Vec<Client>, lease: u64, stop: Arc<AtomicBool>, kept: Arc<AtomicUsize>) -> bool {
    let mut at = lease as usize;
    while !stop.load(Ordering::Relaxed) {
        match clients[at % clients.len()].keep_alive(lease).await {
            Ok(()) => {
                kept.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(TTL / 5).await;
            }
            Err(Failure::Refused(_)) => return false,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
        at += 1;
    }
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_kept_alive_outlives_keepers_that_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let keepers = three(dir.path()).await;
    let clients: Vec<Client> = keepers.iter().map(|(_, client)| client.clone()).collect();
    let kept = Arc::new(AtomicUsize::new(0));
    let mut holders = Vec::new();
    for number in 0..HOLDERS {
        let lease = patiently("a lease", PATIENCE, async || clients[0].grant(TTL).await).await.unwrap();
        let op = put(&format!("held/{number}"), "1", lease);
        let txn = v1::TxnRequest { then: vec![op], ..Default::default() };
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(hold(clients.clone(), lease, stop.clone(), kept.clone()));
        patiently("a key", PATIENCE, async || clients[0].txn(txn.clone()).await).await.unwrap();
        holders.push((stop, task));
    }
    let revisions = async || {
        let (_, items) =
            patiently("a list", PATIENCE, async || clients[1].list("held/").await).await.unwrap();
        items.into_iter().map(|item| (item.key, item.mod_revision)).collect::<Vec<_>>()
    };
    let before = revisions().await;
    assert_eq!(before.len(), HOLDERS);

    for (what, all, seconds) in [
        ("a leader that is slow", false, 2),
        ("a leader that stands still beyond its lease and all others", false, 9),
        ("all keepers standing still, as on a machine that is paused", true, 8),
    ] {
        let leads = leader(&keepers).await;
        let stopped = || keepers.iter().enumerate().filter(|(place, _)| all || *place == leads);
        stopped().for_each(|(_, (keeper, _))| keeper.signal(libc::SIGSTOP));
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        stopped().for_each(|(_, (keeper, _))| keeper.signal(libc::SIGCONT));
        leader(&keepers).await;
        // What the one that stood still would end, it ends at once.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(revisions().await, before, "{what}");
    }
    let leads = leader(&keepers).await;
    if let Some(faults) = &keepers[leads].0.faults {
        faults.arm(Call::Sync, "/log/", 1, How::Slow);
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(revisions().await, before, "a leader with a slow disk");
        faults.disarm();
    }

    // The test can fail: one that is let go of ends, and no other does.
    let (stop, task) = holders.remove(0);
    stop.store(true, Ordering::Relaxed);
    assert!(task.await.unwrap());
    let gone = async || {
        let left = revisions().await;
        if left[..] == before[1..] { Ok(()) } else { Err(format!("{left:?}")) }
    };
    patiently("the lease that nobody holds ends, and no other", PATIENCE, gone).await.unwrap();
    for (stop, task) in holders {
        stop.store(true, Ordering::Relaxed);
        assert!(task.await.unwrap(), "a lease was over while it was held");
    }
    eprintln!("{} keep-alives", kept.load(Ordering::Relaxed));
}
