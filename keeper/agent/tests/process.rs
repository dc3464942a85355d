//! `examples/process.rs`, as a process of its own, against a real keeper.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use carillon_agent::admin::{Admin, AdminError, Change, ChangeOptions};
use carillon_agent::document::DocumentKind;
use carillon_agent::target::Target;
use carillon_keeper::{Keeper, KeeperOptions};
use tokio::net::TcpListener;

#[allow(dead_code, reason = "it is run as a process; here only its document is needed")]
#[path = "../examples/process.rs"]
mod process;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// The example's binary, which `cargo test` builds, unless it is told to build this test alone.
fn binary() -> PathBuf {
    let target = std::env::current_exe().unwrap();
    let binary = target.parent().and_then(|deps| deps.parent()).unwrap().join("examples/process");
    assert!(
        binary.exists(),
        "{} is not there: cargo build -p carillon-agent --example process",
        binary.display()
    );
    binary
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_is_a_whole_process() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let kinds = vec![DocumentKind::of::<process::Greeting>()];
    let keeper = Keeper::start(KeeperOptions::new(directory.path(), listener, kinds)).await.unwrap();
    let admin = Admin::new(vec![keeper.endpoint()]);
    let say = async |text: &str| {
        let set = vec![("text".to_owned(), Some(text.to_owned()))];
        admin.set("greeting", set, ChangeOptions::default()).await
    };
    say("hello").await.unwrap();
    let for_one = Change::Override {
        name: "one".to_owned(),
        target: Some(Target { instances: vec!["greeter-1".to_owned()], ..Target::default() }),
        sets: vec![("text".to_owned(), Some("hello, you".to_owned()))],
    };
    admin.change("greeting", for_one, ChangeOptions::default()).await.unwrap();

    let mut child = Command::new(tokio::task::spawn_blocking(binary).await.unwrap())
        .args(["greeter-1", &keeper.endpoint()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (sender, lines) = mpsc::channel();
    let output = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        BufReader::new(output).lines().try_for_each(|line| sender.send(line.unwrap()))
    });
    let next = || tokio::task::block_in_place(|| lines.recv_timeout(PATIENCE)).expect("a line in time");
    assert_eq!(next(), "started with \"hello\"");
    assert_eq!(next(), "configured with \"hello, you\"", "once it has said who it is");
    let removed = Change::RemoveOverride("one".to_owned());
    admin.change("greeting", removed, ChangeOptions::default()).await.unwrap();
    assert_eq!(next(), "configured with \"hello\"");
    say("good day").await.unwrap();
    assert_eq!(next(), "configured with \"good day\"");
    let refused = say(&"x".repeat(81)).await.unwrap_err().to_string();
    assert_eq!(refused, "greeting is refused: text: is longer than 80 bytes");

    // Discoverable, with its address.
    let begun = std::time::Instant::now();
    let live = loop {
        let live = admin.live().await.unwrap();
        if let Some(live) = live.into_iter().next() {
            break live;
        }
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((live.instance.id.as_str(), live.instance.draining), ("greeter-1", false));
    assert_eq!(live.instance.addresses["http"], "127.0.0.1:8000");

    let command = async |name: &str, who: &str| {
        let arguments = BTreeMap::from([("name".to_owned(), who.to_owned())]);
        admin.command("greeter-1", name, arguments, PATIENCE).await
    };
    assert_eq!(command("greet", "Ada").await.unwrap(), "good day, Ada");
    assert!(matches!(command("dance", "").await, Err(AdminError::Command { .. })));
    assert_eq!(command("drain", "").await.unwrap(), "drained");
    assert_eq!(next(), "drained");
    let live = admin.live().await.unwrap();
    assert!(live[0].instance.draining, "others see that it drains");
    assert_eq!(command("greet", "Ada").await.unwrap(), "good day, Ada", "what is open is finished");
    assert_eq!(command("stop", "").await.unwrap(), "stopping");
    assert_eq!(next(), "stopped", "and it is not drained twice");
    let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert!(status.success());
    assert!(admin.live().await.unwrap().is_empty(), "it has deregistered");
    keeper.stop().await;
}
