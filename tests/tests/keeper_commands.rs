//! Operating several keepers from the command line: members, the lead, and what is left when all disks are lost.

use carillon_tests::keepers::{KeeperProcess, free_address, leader, settled, three};
use carillon_tests::server::carillon;

/// What a command prints; it must succeed.
async fn run(keepers: &str, arguments: &[&str]) -> String {
    let mut command = carillon(arguments);
    if !keepers.is_empty() {
        command.args(["--keeper", keepers]);
    }
    let output = command.output().await.expect("carillon runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "carillon {arguments:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// A word of a line, counted from 0.
fn word(line: &str, n: usize) -> &str {
    line.split_whitespace().nth(n).unwrap_or_else(|| panic!("word {n} of {line:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_the_lead_and_a_restore_after_the_loss_of_everything() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut keepers = three(dir.path()).await;
    let all: Vec<String> = keepers.iter().map(|(keeper, _)| keeper.endpoint()).collect();
    let all = all.join(",");

    // The lead goes to another, which says so.
    let before = leader(&keepers).await;
    let said = run(&all, &["keeper", "member", "transfer"]).await;
    assert!(said.trim_end().ends_with(" leads"), "{said}");
    assert_ne!(leader(&keepers).await, before);
    let list = run(&all, &["keeper", "member", "list"]).await;
    assert_eq!((list.lines().count(), list.matches("leader").count()), (3, 1), "{list}");

    // One is taken out for good, another is taken in at a new address.
    let follower = (leader(&keepers).await + 1) % 3;
    let address = keepers[follower].0.grpc.to_string();
    let line = list.lines().find(|line| line.contains(&address)).expect("its line").to_owned();
    let said = run(&all, &["keeper", "member", "remove", word(&line, 0)]).await;
    assert!(said.contains("is taken out"), "{said}");
    keepers[follower].0.kill().await;
    let mut fourth = KeeperProcess::new(free_address(), dir.path().join("fourth"));
    // It does not ask by itself: whom it knows is not there.
    fourth.peers = vec![fourth.grpc.to_string(), address.clone()];
    fourth.start();
    let added = async || {
        let mut command = carillon(&["keeper", "member", "add", &fourth.grpc.to_string(), "--keeper", &all]);
        let output = command.output().await.expect("carillon runs");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(err) }
    };
    let patience = std::time::Duration::from_secs(60);
    carillon_tests::keepers::patiently("the fourth is added", patience, added).await.expect("it is");
    let client = carillon_tests::keepers::client::Client::new(&fourth.endpoint());
    keepers[follower] = (fourth, client);
    settled(&keepers).await;
    let all: Vec<String> = keepers.iter().map(|(keeper, _)| keeper.endpoint()).collect();
    let all = all.join(",");

    // A snapshot, and then all disks are lost.
    run(&all, &["config", "set", "gateway", "max_packet_bytes=54321"]).await;
    let file = dir.path().join("snapshot");
    let file = file.to_str().expect("UTF-8");
    let saved = run(&all, &["keeper", "snapshot", "save", file]).await;
    let cluster =
        word(saved.lines().find(|line| line.starts_with("cluster")).expect("the cluster"), 1).to_owned();
    let inspected = run("", &["keeper", "snapshot", "inspect", file]).await;
    assert!(inspected.contains("revision"), "{inspected}");
    for (keeper, _) in &mut keepers {
        keeper.kill().await;
        std::fs::remove_dir_all(&keeper.dir).expect("it had one");
    }
    let (first, data) = (keepers[0].0.grpc.to_string(), keepers[0].0.dir.to_str().expect("UTF-8").to_owned());
    let restore = ["keeper", "snapshot", "restore", file, "--data-dir", &data, "--cluster", &cluster];
    let restored = run("", &[&restore[..], &["--advertise-grpc", &first]].concat()).await;
    assert!(restored.contains("restored: start it with"), "{restored}");
    let addresses: Vec<String> = keepers.iter().map(|(keeper, _)| keeper.grpc.to_string()).collect();
    for (keeper, _) in &mut keepers {
        keeper.peers.clone_from(&addresses);
        keeper.start();
    }
    settled(&keepers).await;
    let found = run(&all, &["config", "get", "gateway"]).await;
    assert!(found.contains("54321"), "{found}");
    let status = run(&all, &["keeper", "status"]).await;
    assert!(status.contains(&cluster), "{status}");
}
