//! Many watches on one keeper, which is a process of its own so that what it takes can be seen: a change reaches all of
//! them, and one that does not read costs little and misses nothing.
//!
//! `CARILLON_WATCHES` says how many (10,000 unless said), `CARILLON_WATCHES_EACH` how many share a connection (1; agents do not).

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use carillon_agent::admin::{Admin, ChangeOptions};
use carillon_agent::document::DocumentKind;
use carillon_agent::keys;
use carillon_agent::revoked::Revoked;
use carillon_keeper::{Keeper, KeeperOptions};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use futures::StreamExt as _;
use tokio::net::TcpListener;
use tonic::Streaming;
use tonic::transport::Channel;
use v1::op::{Op, Put};
use v1::watch_response::Kind;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// Writes that nobody watches.
const UNRELATED: usize = 300;
/// So long it is looked what the keeper does when nothing happens.
const IDLE: Duration = Duration::from_secs(5);
/// Connections that are being made at the same time.
const AT_ONCE: usize = 64;

/// The keeper's process: this test binary, told to be it.
struct Process {
    child: Child,
    url: String,
    directory: tempfile::TempDir,
}

impl Process {
    async fn start() -> Process {
        let directory = tempfile::tempdir().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_keeper_of_the_other_tests", "--ignored"])
            .env("CARILLON_TEST_KEEPER", directory.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Killed when dropped, whatever comes.
        let mut process = Process { child, url: String::new(), directory };
        let begun = Instant::now();
        while process.url.is_empty() {
            assert!(begun.elapsed() < PATIENCE, "the keeper does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
            process.url = std::fs::read_to_string(process.directory.path().join("url")).unwrap_or_default();
        }
        process
    }

    /// CPU time so far.
    fn busy(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // After the name, which ends with the last parenthesis: utime and stime are the 12th and 13th, in hundredths.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Resident memory, bytes.
    fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test: what [`Process`] runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other tests run it as a process"]
async fn the_keeper_of_the_other_tests() {
    let Some(directory) = std::env::var_os("CARILLON_TEST_KEEPER").map(PathBuf::from) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let kinds = vec![DocumentKind::of::<Revoked>()];
    let mut options = KeeperOptions::new(directory.join("data"), listener, kinds);
    // All of them come from this machine.
    options.limits.watches_per_caller = options.limits.watches;
    let keeper = Keeper::start(options).await.unwrap();
    write_whole(&directory.join("url"), &keeper.endpoint());
    std::future::pending::<()>().await;
}

fn write_whole(path: &Path, text: &str) {
    let unfinished = path.with_extension("new");
    std::fs::write(&unfinished, text).unwrap();
    std::fs::rename(unfinished, path).unwrap();
}

struct Watcher {
    stream: Streaming<v1::WatchResponse>,
    _client: KeeperClient<Channel>,
}

impl Watcher {
    async fn start(mut client: KeeperClient<Channel>, prefixes: Vec<String>) -> Watcher {
        let request = v1::WatchRequest { prefixes, after_revision: 0 };
        let mut stream = client.watch(request).await.unwrap().into_inner();
        while stream.message().await.unwrap().unwrap().kind() != Kind::StateEnd {}
        Watcher { stream, _client: client }
    }

    async fn events(&mut self) -> v1::WatchResponse {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("in time");
            let message = message.unwrap().expect("the watch goes on");
            if message.kind() != Kind::Progress {
                return message;
            }
        }
    }
}

async fn connect(url: &str) -> KeeperClient<Channel> {
    let begun = Instant::now();
    loop {
        match KeeperClient::connect(url.to_owned()).await {
            Ok(client) => return client,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
}

/// Past the test runner's capture: the figures are the point.
fn say(line: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_configuration_reaches_ten_thousand_agents() {
    let (count, share) = (number("CARILLON_WATCHES", 10_000), number("CARILLON_WATCHES_EACH", 1));
    let keeper = Process::start().await;
    let (before, begun) = (keeper.memory(), Instant::now());
    let watchers = futures::stream::iter((0..count).step_by(share)).map(|first| {
        let url = keeper.url.clone();
        async move {
            let client = connect(&url).await;
            let mut watchers = Vec::new();
            for number in first..count.min(first + share) {
                let prefixes = [keys::CONFIG, keys::INSTANCES, keys::SLOTS].map(str::to_owned).into_iter();
                let prefixes = prefixes.chain([keys::commands(&format!("gateway-{number}"))]).collect();
                watchers.push(Watcher::start(client.clone(), prefixes).await);
            }
            watchers
        }
    });
    let watchers: Vec<Vec<Watcher>> = watchers.buffer_unordered(AT_ONCE).collect().await;
    let watchers: Vec<Watcher> = watchers.into_iter().flatten().collect();
    let each = keeper.memory().saturating_sub(before) / count;
    let connected = begun.elapsed();
    let admin = Admin::new(vec![keeper.url.clone()]);
    assert_eq!(admin.status().await.unwrap().watches, count as u64);

    let begun = Instant::now();
    let published = admin.publish("revoked/demo", "{}", ChangeOptions::default()).await.unwrap();
    let all = watchers.into_iter().map(async |mut watcher| {
        let message = watcher.events().await;
        let item = message.events[0].item.clone().unwrap();
        assert_eq!((message.kind(), item.key.as_str()), (Kind::Events, "carillon/config/revoked/demo"));
        watcher
    });
    let watchers = futures::future::join_all(all).await;
    say(&format!(
        "{count} watches, {share} on a connection: {each} bytes each with its part of the connection; there in {:.1} s; \
         revision {} at all of them in {:.0} ms",
        connected.as_secs_f64(),
        published.revision,
        begun.elapsed().as_secs_f64() * 1000.0
    ));
    assert!(each < 96 * 1024, "{each} bytes for each watch");

    // What concerns none of them wakes none of them.
    let mut client = connect(&keeper.url).await;
    let before = keeper.busy();
    tokio::time::sleep(IDLE).await;
    // Progress notices and the like: what so many watches take while nothing happens.
    let idle = (keeper.busy() - before).as_secs_f64() / IDLE.as_secs_f64();
    let (before, begun) = (keeper.busy(), Instant::now());
    for change in 0..UNRELATED {
        let put = Put { key: format!("other/{change}"), value: "x".into(), lease: 0 };
        let then = vec![v1::Op { op: Some(Op::Put(put)) }];
        client.txn(v1::TxnRequest { then, ..Default::default() }).await.unwrap();
    }
    let took = begun.elapsed().as_secs_f64();
    let each = ((keeper.busy() - before).as_secs_f64() - idle * took) * 1000.0 / UNRELATED as f64;
    say(&format!(
        "a write that concerns none of them: {each:.2} ms of the keeper's CPU, answered after {:.2} ms",
        took * 1000.0 / UNRELATED as f64
    ));
    assert!(each < 20.0, "{each} ms: it looks as if all were woken");
    drop(watchers);
    let begun = Instant::now();
    while admin.status().await.unwrap().watches > 0 {
        assert!(begun.elapsed() < PATIENCE, "watches of agents that are gone stay");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_that_do_not_read_cost_little_and_miss_nothing() {
    const WATCHERS: usize = 100;
    const CHANGES: usize = 600;
    const BYTES: usize = 20_000;
    let keeper = Process::start().await;
    let mut watchers = Vec::new();
    for _ in 0..WATCHERS {
        watchers.push(Watcher::start(connect(&keeper.url).await, vec!["load/".to_owned()]).await);
    }
    let mut client = connect(&keeper.url).await;
    let before = keeper.memory();
    for change in 0..CHANGES {
        let put = Put {
            key: format!("load/{:04}", change % 10),
            value: vec![change as u8; BYTES].into(),
            lease: 0,
        };
        let then = vec![v1::Op { op: Some(Op::Put(put)) }];
        client.txn(v1::TxnRequest { then, ..Default::default() }).await.unwrap();
    }
    // Time for the keeper to hand out what it would.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let grown = keeper.memory().saturating_sub(before);
    let unread = WATCHERS * CHANGES * BYTES;
    let (unread_mb, grown_mb) = (CHANGES * BYTES / 1_000_000, grown / 1_000_000);
    say(&format!(
        "{WATCHERS} watchers have {unread_mb} MB unread each; the keeper has grown by {grown_mb} MB"
    ));
    assert!(grown < unread / 8, "{grown} bytes");
    for watcher in &mut watchers {
        let (mut seen, mut last) = (0, 0);
        while seen < CHANGES {
            let message = watcher.events().await;
            assert_eq!(message.kind(), Kind::Events);
            for event in message.events {
                let item = event.item.unwrap();
                assert!(last == 0 || item.mod_revision == last + 1, "{} after {last}", item.mod_revision);
                assert_eq!((item.value.len(), item.value[0]), (BYTES, seen as u8));
                (seen, last) = (seen + 1, item.mod_revision);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_is_not_left_behind_by_what_does_not_concern_it() {
    const TRANSACTIONS: usize = 200;
    /// All that one may have; together they are more than the keeper keeps for who is behind.
    const CHANGES: usize = 128;
    let keeper = Process::start().await;
    let mut watcher = Watcher::start(connect(&keeper.url).await, vec!["mine/".to_owned()]).await;
    let mut client = connect(&keeper.url).await;
    let mut write = async |keys: Vec<String>| {
        let put = |key| v1::Op { op: Some(Op::Put(Put { key, value: "x".into(), lease: 0 })) };
        let then = keys.into_iter().map(put).collect();
        client.txn(v1::TxnRequest { then, ..Default::default() }).await.unwrap().into_inner().revision
    };
    for round in ["1", "2"] {
        for _ in 0..TRANSACTIONS {
            write((0..CHANGES).map(|i| format!("others/{i}")).collect()).await;
        }
        let key = format!("mine/{round}");
        let revision = write(vec![key.clone()]).await;
        let message = watcher.events().await;
        assert_eq!((message.kind(), message.revision), (Kind::Events, revision));
        assert_eq!(message.events[0].item.as_ref().unwrap().key, key);
    }
    // And it can be resumed from where it is said to be.
    let status = Admin::new(vec![keeper.url.clone()]).status().await.unwrap();
    assert!(status.compacted_revision > 0, "more than is kept");
}
