//! The embedded store against crashes and failing disks: a child process (this test binary again) writes to it and is
//! killed in the middle, or is not allowed to write any more. What was answered has to be there.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use carillon_hub::saver::{DirectoryError, Embedded, Limits, Logs, Metrics, Sessions, Store, StoreError};
use carillon_proto::{topic, v1};

const DIRECTORY: &str = "CARILLON_TEST_SAVER_DIRECTORY";
const TOPICS: usize = 7;

fn open(path: &Path, limits: Limits) -> Result<Embedded, DirectoryError> {
    let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
    Embedded::open(path, "test", limits, metrics)
}

fn limits() -> Limits {
    Limits { reserve_bytes: 0, ..Limits::default() }
}

fn append(topic: &str, seq: u64, bytes: usize) -> v1::Append {
    let message = v1::Message {
        topic: topic.to_owned(),
        payload: format!("{topic} {seq} {}", "x".repeat(bytes)).into(),
        id: format!("{topic}-{seq}"),
        epoch: 1,
        seq,
        ..v1::Message::default()
    };
    let retention =
        v1::Retention { consumed: topic::inbox_user(topic).is_some(), ..v1::Retention::default() };
    v1::Append {
        slot: topic::slot_of(topic),
        message: Some(message),
        log: true,
        idempotent: true,
        retention: Some(retention),
        ..v1::Append::default()
    }
}

fn session() -> Option<v1::SessionRef> {
    Some(v1::SessionRef { app: "demo".to_owned(), user: "crash".to_owned(), client_id: "c".to_owned() })
}

/// Starts this binary again to run one of the ignored tests below, which is the child.
fn child(test: &str, directory: &Path, shell: Option<&str>) -> Child {
    let binary = std::env::current_exe().expect("this binary");
    let mut command = match shell {
        Some(script) => {
            let mut command = Command::new("sh");
            command.arg("-c").arg(script).arg("sh").arg(binary);
            command
        }
        None => Command::new(binary),
    };
    command
        .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the child starts")
}

fn directory_of_child() -> Option<std::path::PathBuf> {
    std::env::var_os(DIRECTORY).map(Into::into)
}

/// Appends to several topics for ever, with many in flight; consumes an inbox; tells each thing that was answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of the test below"]
async fn child_appends_for_ever() {
    let Some(directory) = directory_of_child() else { return };
    let store = Arc::new(open(&directory, limits()).expect("the store opens"));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..TOPICS {
        let store = store.clone();
        tasks.spawn(async move {
            let name = format!("demo/t/{number}");
            let mut seq = store.heads(vec![name.clone()]).await.expect("heads")[0].seq;
            loop {
                let batch = (1..=20).map(|more| append(&name, seq + more, 100)).collect();
                for result in store.append(batch).await {
                    tell(&format!("appended {name} {}", result.expect("appended").seq));
                }
                seq += 20;
            }
        });
    }
    tasks.spawn(async move {
        let inbox = "demo/u/crash";
        let open = v1::OpenSession { session: session(), expiry_seconds: 3600, ..v1::OpenSession::default() };
        let attachment = store.open_session(open).await.expect("opened").attachment;
        let subscription =
            v1::Subscription { filter: inbox.to_owned(), qos: 1, ..v1::Subscription::default() };
        let subscribe = v1::Subscribe { session: session(), attachment, subscriptions: vec![subscription] };
        store.subscribe(subscribe).await.expect("subscribed");
        let mut seq = store.heads(vec![inbox.to_owned()]).await.expect("heads")[0].seq;
        loop {
            let batch = (1..=10).map(|more| append(inbox, seq + more, 100)).collect();
            for result in store.append(batch).await {
                tell(&format!("appended {inbox} {}", result.expect("appended").seq));
            }
            seq += 10;
            // Told before it is done: it may have been done, or not.
            tell(&format!("acking {inbox} {}", seq - 3));
            let positions = vec![v1::AckPosition { topic: inbox.to_owned(), seq: seq - 3 }];
            store.ack(v1::Ack { session: session(), attachment, positions }).await.expect("acked");
        }
    });
    while tasks.join_next().await.is_some() {}
}

fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    // The parent may be gone.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_survives_sigkill() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut answered: HashMap<String, u64> = HashMap::new();
    let mut acking: HashMap<String, u64> = HashMap::new();
    for round in 0..8 {
        let mut child = child("child_appends_for_ever", directory.path(), None);
        let lines = BufReader::new(child.stdout.take().expect("its output"));
        let (kill_at, mut count) = (300 + round * 217, 0);
        for line in lines.lines() {
            // What it had told before it was killed counts, though it is read after.
            let Ok(line) = line else { break };
            let words: Vec<&str> = line.split(' ').collect();
            let map = match words[..] {
                ["appended", ..] => &mut answered,
                ["acking", ..] => &mut acking,
                _ => continue,
            };
            // A line that was cut short by the kill ends the output: its number may be cut.
            let Some(seq) = words.get(2).and_then(|seq| seq.parse::<u64>().ok()) else { continue };
            let highest = map.entry(words[1].to_owned()).or_default();
            *highest = seq.max(*highest);
            count += 1;
            if count == kill_at {
                child.kill().expect("SIGKILL");
            }
        }
        child.wait().expect("its end");
        assert!(count >= kill_at, "the child ended by itself after {count} lines");

        let store = open(directory.path(), limits()).expect("the store opens after a crash");
        for (topic, &highest) in &answered {
            let head = store.heads(vec![topic.clone()]).await.expect("heads")[0];
            assert!(head.seq >= highest, "{topic}: {highest} was answered, the head is {head:?}");
            let acked = acking.get(topic).copied().unwrap_or(0);
            assert!(head.trimmed <= acked, "{topic}: trimmed to {}, acked {acked}", head.trimmed);
            let mut expected = head.trimmed + 1;
            let mut after = head.trimmed;
            while after < head.seq {
                let read = v1::Read { topic: topic.clone(), after, limit: 1000, max_bytes: 0 };
                let reply = store.read(read).await.expect("a read");
                for message in reply.messages {
                    assert_eq!(message.seq, expected, "{topic}: a message is missing or out of order");
                    assert!(message.payload.starts_with(format!("{topic} {expected} ").as_bytes()));
                    expected += 1;
                }
                after = reply.next;
            }
            assert_eq!(expected, head.seq + 1, "{topic}: the log ends before its head");
            // And an id that was accepted is known.
            if head.trimmed < highest {
                let retry =
                    store.append(vec![append(topic, head.seq + 1, 1)]).await.remove(0).expect("appended");
                assert!(!retry.duplicate);
                let mut again = append(topic, head.seq + 2, 1);
                again.message.as_mut().expect("a message").id = format!("{topic}-{highest}");
                let again = store.append(vec![again]).await.remove(0).expect("answered");
                assert!(again.duplicate && again.seq == highest, "{again:?}");
            }
        }
        // The cursor of the session is not beyond what was acked, nor is anything lost between it and the log.
        if round > 0 {
            let open =
                v1::OpenSession { session: session(), expiry_seconds: 3600, ..v1::OpenSession::default() };
            let opened = store.open_session(open).await.expect("opened");
            assert!(opened.present);
            for backlog in opened.backlog {
                let head = store.heads(vec![backlog.topic.clone()]).await.expect("heads")[0];
                assert_eq!(backlog.after, head.trimmed.max(backlog.after));
                assert!(backlog.after <= acking[&backlog.topic]);
            }
        }
        store.stop().await;
    }
    assert_eq!(answered.len(), TOPICS + 1);
}

/// Appends until a write fails; from then on nothing may be accepted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of the test below"]
async fn child_appends_until_a_write_fails() {
    let Some(directory) = directory_of_child() else { return };
    let store = open(&directory, limits()).expect("the store opens");
    let mut failed = 0;
    for seq in 1..=10_000_u64 {
        if seq == 100 {
            // From here on no file of this process may be written beyond this length; the signal is ignored already.
            let limited = Command::new("prlimit")
                .args([format!("--pid={}", std::process::id()), "--fsize=65536".to_owned()])
                .status()
                .expect("prlimit, of util-linux");
            assert!(limited.success());
        }
        match store.append(vec![append("demo/t/0", seq, 10_000)]).await.remove(0) {
            Ok(appended) => {
                assert_eq!(failed, 0, "accepted after a write failed");
                tell(&format!("appended demo/t/0 {}", appended.seq));
            }
            Err(StoreError::Unavailable(text)) => {
                assert!(text.contains("opened again"), "{text}");
                failed += 1;
            }
            Err(other) => panic!("{other}"),
        }
        if failed == 10 {
            // What was answered can be read still.
            let read = v1::Read { topic: "demo/t/0".to_owned(), after: 0, limit: 1, max_bytes: 0 };
            assert_eq!(store.read(read).await.expect("a read").messages.len(), 1);
            assert!(matches!(store.fence(1, 9).await, Err(StoreError::Unavailable(_))));
            tell("failed as it should");
            return;
        }
    }
    panic!("no write failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_accepted_after_a_failed_write() {
    let directory = tempfile::tempdir().expect("a directory");
    let script = r#"trap "" XFSZ; exec "$@""#;
    let mut child = child("child_appends_until_a_write_fails", directory.path(), Some(script));
    let lines: Vec<String> =
        BufReader::new(child.stdout.take().expect("its output")).lines().map_while(Result::ok).collect();
    assert!(child.wait().expect("its end").success(), "{:?}", lines.last());
    assert!(lines.iter().any(|line| line == "failed as it should"), "{:?}", lines.last());
    let answered = lines.iter().filter(|line| line.starts_with("appended ")).count() as u64;
    assert!(answered >= 99);
    let store = open(directory.path(), limits()).expect("the store opens again");
    let head = store.heads(vec!["demo/t/0".to_owned()]).await.expect("heads")[0];
    assert!(head.seq >= answered, "{answered} were answered, {head:?}");
    store.append(vec![append("demo/t/0", head.seq + 1, 10)]).await.remove(0).expect("it goes on");
    store.stop().await;
}

#[tokio::test]
async fn a_disk_without_room_refuses_and_recovers_nothing_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let full = Limits { reserve_bytes: u64::MAX, ..Limits::default() };
    let store = open(directory.path(), full).expect("the store opens");
    let refused = store.append(vec![append("demo/t/0", 1, 10)]).await.remove(0);
    assert!(matches!(&refused, Err(StoreError::Unavailable(text)) if text.contains("full")), "{refused:?}");
    // What does not grow the store still works.
    store.fence(1, 2).await.expect("a fence");
    assert_eq!(store.heads(vec!["demo/t/0".to_owned()]).await.expect("heads")[0], v1::Head::default());
    store.stop().await;
    drop(store);
    // The lock may live on for a moment in a child that another test is just starting.
    let mut reopened = open(directory.path(), limits());
    for _ in 0..100 {
        if reopened.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        reopened = open(directory.path(), limits());
    }
    let store = reopened.expect("the store opens with room");
    store.append(vec![append("demo/t/0", 1, 10)]).await.remove(0).expect("appended");
    store.stop().await;
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_says_why() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("store");
    let store = open(&path, limits()).expect("the store opens");
    let error = open(&path, limits()).expect_err("twice").to_string();
    assert!(error.ends_with("is in use by another process"), "{error}");
    store.append(vec![append("demo/t/0", 1, 10)]).await.remove(0).expect("appended");
    store.stop().await;
    let stopped = store.append(vec![append("demo/t/0", 2, 10)]).await.remove(0);
    assert!(matches!(stopped, Err(StoreError::Unavailable(_))));
    let read = v1::Read { topic: "demo/t/0".to_owned(), ..v1::Read::default() };
    assert!(matches!(store.read(read).await, Err(StoreError::Unavailable(_))));
    drop(store);

    let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
    let error = Embedded::open(&path, "another", limits(), metrics).expect_err("another cluster").to_string();
    assert!(error.contains(r#"belongs to cluster "test", not to "another""#), "{error}");

    let foreign = directory.path().join("foreign");
    std::fs::create_dir(&foreign).expect("a directory");
    std::fs::write(foreign.join("thesis.txt"), "do not touch").expect("a file");
    let error = open(&foreign, limits()).expect_err("foreign").to_string();
    assert!(error.contains("holds other files"), "{error}");
    assert_eq!(std::fs::read_dir(&foreign).expect("a listing").count(), 1, "nothing was put there");

    let marker = std::fs::read_to_string(path.join("marker.json")).expect("a marker");
    std::fs::write(path.join("marker.json"), marker.replace("\"format\": 1", "\"format\": 9"))
        .expect("a marker");
    let error = open(&path, limits()).expect_err("newer").to_string();
    assert!(error.contains("is in format 9"), "{error}");
    std::fs::write(path.join("marker.json"), "{").expect("a marker");
    let error = open(&path, limits()).expect_err("damaged").to_string();
    assert!(error.contains("is damaged: marker.json"), "{error}");
    std::fs::write(path.join("marker.json"), &marker).expect("a marker");

    // The database itself.
    let moved = directory.path().join("moved");
    std::fs::rename(path.join("db"), &moved).expect("moved");
    let error = open(&path, limits()).expect_err("without its database").to_string();
    assert!(error.contains("the folder db is missing"), "{error}");
    std::fs::rename(&moved, path.join("db")).expect("moved back");
    let version = path.join("db").join("version");
    let kept = std::fs::read(&version).expect("the database's version");
    std::fs::write(&version, b"no such thing").expect("overwritten");
    let error = open(&path, limits()).expect_err("damaged").to_string();
    assert!(error.contains("is damaged"), "{error}");
    std::fs::write(&version, kept).expect("put back");
    let store = open(&path, limits()).expect("whole again");
    assert_eq!(store.heads(vec!["demo/t/0".to_owned()]).await.expect("heads")[0].seq, 1);
    tokio::time::timeout(Duration::from_secs(10), store.stop()).await.expect("it stops");
}

#[tokio::test]
async fn a_creation_that_was_cut_short_begins_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("store");
    open(&path, limits()).expect("the store opens").stop().await;
    let marker = std::fs::read_to_string(path.join("marker.json")).expect("a marker");
    std::fs::write(path.join("marker.json"), marker.replace("true", "false")).expect("a marker");
    std::fs::write(path.join("db").join("version"), b"half").expect("overwritten");
    let store = open(&path, limits()).expect("it is made anew");
    store.append(vec![append("demo/t/0", 1, 10)]).await.remove(0).expect("appended");
    store.stop().await;
}
