//! What a keeper tells those who run it: whether it lives, and whether it can do its work.

use std::time::{Duration, Instant};

use carillon_tests::keepers::client::{Client, Failure};
use carillon_tests::keepers::fault::{Call, Faults, How};
use carillon_tests::keepers::{KeeperProcess, leader, patiently, settled, three};

const PATIENCE: Duration = Duration::from_secs(60);
/// A process that cannot go on must not look alive for longer.
const LOOKS_ALIVE: Duration = Duration::from_secs(5);

/// Status and text of `/healthz` or `/readyz`.
async fn get(keeper: &KeeperProcess, path: &str) -> Result<(u16, String), String> {
    let url = format!("http://{}{path}", keeper.ops.expect("it was started"));
    let asked = async {
        let answer = reqwest::get(url).await?;
        let status = answer.status().as_u16();
        answer.text().await.map(|text| (status, text))
    };
    match tokio::time::timeout(Duration::from_secs(5), asked).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}

async fn until(keeper: &KeeperProcess, path: &str, wanted: u16) -> String {
    let ask = async || match get(keeper, path).await {
        Ok((status, text)) if status == wanted => Ok(text),
        other => Err(format!("{other:?}")),
    };
    let what = format!("{path} of {} is {wanted}", keeper.grpc);
    patiently(&what, PATIENCE, ask).await.unwrap_or_else(|error| panic!("{error}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_it_is_not_ready_but_alive_and_ready_again_with_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut keepers = three(dir.path()).await;
    for (keeper, _) in &keepers {
        assert_eq!(until(keeper, "/readyz", 200).await, "ready\n");
    }
    // The leader is left, and then one that follows.
    for leads in [true, false] {
        let leader = leader(&keepers).await;
        let left = if leads { leader } else { (leader + 1) % 3 };
        for place in (0..3).filter(|&place| place != left) {
            keepers[place].0.kill().await;
        }
        let text = until(&keepers[left].0, "/readyz", 503).await;
        assert_eq!(text, "the keeper hears no leader, or as the leader no majority\n");
        assert_eq!(get(&keepers[left].0, "/healthz").await, Ok((200, "alive\n".to_owned())));
        for place in (0..3).filter(|&place| place != left) {
            keepers[place].0.start();
        }
        settled(&keepers).await;
        for (keeper, _) in &keepers {
            until(keeper, "/readyz", 200).await;
        }
    }
}

/// In the process as it is: the task of consensus panics when it has begun a new file of its log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_whose_consensus_has_panicked_does_not_look_alive_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = KeeperProcess::alone(dir.path());
    keeper.faults = Faults::new(&keeper.dir);
    if keeper.faults.is_none() {
        return carillon_tests::tools::missing("cc");
    }
    keeper.start();
    let client = Client::new(&keeper.endpoint());
    patiently("it serves", PATIENCE, async || client.read("0").await).await.unwrap();
    assert_eq!(until(&keeper, "/healthz", 200).await, "alive\n");
    keeper.faults.as_ref().unwrap().arm(Call::Create, "/log/", 1, How::Panic);
    // A file of the log is closed at 16 MB.
    let value = "x".repeat(600_000);
    let mut acknowledged = 0;
    while keeper.faults.as_ref().unwrap().struck() == 0 {
        assert!(acknowledged < 60, "no file was made");
        match client.put("k", &format!("{} {value}", acknowledged + 1)).await {
            Ok(_) => acknowledged += 1,
            Err(Failure::Refused(text)) => panic!("{text}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
    let struck = Instant::now();
    let ended = loop {
        if let Ok((status, text)) = get(&keeper, "/healthz").await {
            let fine = status == 503 || struck.elapsed() < LOOKS_ALIVE;
            assert!(fine, "{status} {text} after {:?}", struck.elapsed());
        }
        if let Some(ended) = keeper.has_ended() {
            break ended;
        }
        assert!(struck.elapsed() < PATIENCE, "it does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(ended.code(), Some(1));
    let logs = keeper.logs();
    assert!(logs.contains("panicked at") && logs.contains("the keeper cannot go on"), "{logs}");
    keeper.faults.as_ref().unwrap().disarm();
    keeper.start();
    let found = patiently("it serves again", PATIENCE, async || client.read("k").await).await.unwrap();
    let found: u64 = found.value.unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(found >= acknowledged, "{found} of {acknowledged}");
}
