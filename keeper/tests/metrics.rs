//! What `/metrics` tells of keepers, and that each of it moves when what it counts does.

use std::time::{Duration, Instant};

use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_keeper::metrics::*;
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use prometheus::{Registry, TextEncoder};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use v1::op::{Op, Put};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

struct Node {
    keeper: KeeperHandle,
    registry: Registry,
    _directory: TempDir,
}

impl Node {
    async fn start(listener: TcpListener, peers: &[String]) -> Node {
        let (directory, registry) = (TempDir::new().unwrap(), Registry::new());
        let mut options = KeeperOptions::new(directory.path(), listener, vec![DocumentKind::of::<Revoked>()]);
        options.peers = peers.to_vec();
        options.registry = Some(registry.clone());
        Node { keeper: Keeper::start(options).await.unwrap(), registry, _directory: directory }
    }

    async fn alone() -> Node {
        Node::start(TcpListener::bind("127.0.0.1:0").await.unwrap(), &[]).await
    }

    async fn three() -> Vec<Node> {
        let mut listeners = Vec::new();
        for _ in 0..3 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let peers: Vec<String> =
            listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
        let mut nodes = Vec::new();
        for listener in listeners {
            nodes.push(Node::start(listener, &peers).await);
        }
        nodes
    }

    /// The sum of all lines of the text that a scrape gets which begin so: a name, and perhaps labels. None: there is none.
    fn read(&self, begin: &str) -> Option<f64> {
        let text = TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix(begin)?.rsplit_once(' '));
        // Not those of which it is only the beginning of the name.
        let values = lines.filter(|(rest, _)| rest.is_empty() || rest.starts_with(['{', ',', '}']));
        values.map(|(_, value)| value.parse::<f64>().unwrap()).reduce(|a, b| a + b)
    }

    fn value(&self, begin: &str) -> f64 {
        self.read(begin).unwrap_or_else(|| panic!("{begin} is missing"))
    }

    async fn until(&self, begin: &str, fine: impl Fn(f64) -> bool) -> f64 {
        let begun = Instant::now();
        loop {
            let value = self.read(begin);
            if let Some(value) = value.filter(|value| fine(*value)) {
                return value;
            }
            assert!(begun.elapsed() < PATIENCE, "{begin} stays at {value:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn client(&self) -> KeeperClient<Channel> {
        KeeperClient::connect(self.keeper.endpoint()).await.unwrap()
    }

    /// So many keys, at the same time.
    async fn write(&self, count: usize) {
        let client = self.client().await;
        let writes = (0..count).map(|i| {
            let mut client = client.clone();
            async move { client.txn(puts(&[format!("k/{i}")])).await.unwrap() }
        });
        futures::future::join_all(writes).await;
    }
}

fn puts(keys: &[String]) -> v1::TxnRequest {
    let put = |key: &String| Op::Put(Put { key: key.clone(), value: "some value".into(), lease: 0 });
    v1::TxnRequest {
        then: keys.iter().map(|key| v1::Op { op: Some(put(key)) }).collect(),
        ..Default::default()
    }
}

/// Which of them leads, once one does and the others follow.
async fn leader(nodes: &[Node]) -> usize {
    let begun = Instant::now();
    loop {
        let status: Vec<_> = nodes.iter().map(|node| node.keeper.status()).collect();
        if let Some(leader) = status.iter().position(|status| status.leads)
            && status
                .iter()
                .all(|status| status.in_touch && status.term == nodes[leader].keeper.status().term)
            && nodes[leader].read(PEER_LAG).is_some()
        {
            return leader;
        }
        assert!(begun.elapsed() < PATIENCE, "nobody leads: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_decided_and_put_on_disk_is_seen() {
    let nodes = Node::three().await;
    let leads = leader(&nodes).await;
    let follows = (leads + 1) % 3;
    // All three are members.
    nodes[leads].until(PEER_LAG, |lag| lag == 0.0).await;
    let moved = [LOG_INDEX, COMMITTED_INDEX, APPLIED_INDEX, REVISION, KEYS, STORE_BYTES];
    let before: Vec<Vec<f64>> =
        nodes.iter().map(|node| moved.iter().map(|name| node.value(name)).collect()).collect();
    let [fsyncs, entries] = [format!("{FSYNC_SECONDS}_count"), format!("{APPEND_ENTRIES}_sum")];
    let disk: Vec<_> = nodes.iter().map(|node| (node.value(&fsyncs), node.value(&entries))).collect();
    nodes[follows].write(100).await;
    for (node, (before, disk)) in nodes.iter().zip(before.iter().zip(&disk)) {
        for (name, before) in moved.iter().zip(before) {
            node.until(name, |now| now >= before + 100.0).await;
        }
        node.until(APPLY_LAG, |lag| lag == 0.0).await;
        node.until(&fsyncs, |count| count > disk.0).await;
        node.until(&entries, |sum| sum >= disk.1 + 100.0).await;
        assert!(node.value(&format!("{FSYNC_SECONDS}_sum")) > 0.0);
        assert!(node.value(LOG_BYTES) > 0.0);
        assert_eq!(node.value(PROPOSALS_PENDING), 0.0);
        assert!(node.value(TERM) >= 1.0);
    }
    assert_eq!(nodes[follows].value(REQUESTS), 100.0);
    assert_eq!(nodes[leads].value(LEADER), 1.0);
    assert_eq!(nodes[follows].value(LEADER), 0.0);
    // What the leader knows of the others, and only it.
    nodes[leads].until(PEER_LAG, |lag| lag == 0.0).await;
    let took = nodes[leads].until(PEER_ROUND_TRIP_SECONDS, |seconds| seconds > 0.0).await;
    assert!(took < 60.0, "{took}");
    for place in [follows, (leads + 2) % 3] {
        let peer = format!("{PEER_LAG}{{node=\"{:016x}\"}}", nodes[place].keeper.status().node_id);
        assert_eq!(nodes[leads].read(&peer), Some(0.0));
        assert_eq!(nodes[place].read(PEER_LAG), None);
        assert_eq!(nodes[place].read(PEER_ROUND_TRIP_SECONDS), None);
    }
    // A snapshot.
    assert_eq!(nodes[leads].value(&format!("{SNAPSHOT_SECONDS}_count")), 0.0);
    assert_eq!(nodes[leads].value(SNAPSHOT_BYTES), 0.0);
    nodes[leads].keeper.snapshot().await.unwrap();
    nodes[leads].until(&format!("{SNAPSHOT_SECONDS}_count"), |count| count == 1.0).await;
    nodes[leads].until(SNAPSHOT_INDEX, |index| index >= 100.0).await;
    assert!(nodes[leads].value(SNAPSHOT_BYTES) > 100.0);
    for node in nodes {
        node.keeper.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_go_and_leaders_that_change_are_seen() {
    let mut nodes = Node::three().await;
    let leads = leader(&nodes).await;
    nodes[leads].write(1).await;
    // One that is away falls behind.
    let gone = nodes.remove((leads + 1) % 3);
    let peer = format!("{PEER_LAG}{{node=\"{:016x}\"}}", gone.keeper.status().node_id);
    gone.keeper.stop().await;
    let leads = leader(&nodes).await;
    nodes[leads].write(20).await;
    nodes[leads].until(&peer, |lag| lag >= 20.0).await;
    // The leader goes: nobody is left who could decide. It has handed over, or tried to.
    let left = 1 - leads;
    let (seen, term) = (nodes[left].value(LEADERS_SEEN), nodes[left].value(TERM));
    assert!(seen >= 1.0);
    nodes.remove(leads).keeper.stop().await;
    let left = nodes.remove(0);
    left.until(LEADERS_SEEN, |now| now > seen).await;
    left.until(TERM, |now| now > term).await;
    let mut client = left.client().await;
    let asked = tokio::spawn(async move { client.txn(puts(&["k".to_owned()])).await });
    left.until(PROPOSALS_PENDING, |pending| pending >= 1.0).await;
    assert_eq!(left.read(PROPOSALS_FAILED), None);
    assert!(asked.await.unwrap().is_err());
    left.until(PROPOSALS_FAILED, |failed| failed >= 1.0).await;
    left.keeper.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_and_leases_are_seen() {
    let node = Node::alone().await;
    let mut client = node.client().await;
    let request = v1::WatchRequest { prefixes: vec!["k/".to_owned()], after_revision: 0 };
    let mut watch = client.watch(request).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    assert_eq!(node.value(WATCHES), 1.0);
    assert_eq!(node.value(WATCH_EVENTS), 0.0);
    node.write(7).await;
    let mut events = 0;
    while events < 7 {
        events += watch.message().await.unwrap().unwrap().events.len();
    }
    assert_eq!(node.value(WATCH_EVENTS), 7.0);
    drop(watch);
    node.until(WATCHES, |watches| watches == 0.0).await;

    client.lease_grant(v1::LeaseGrantRequest { ttl_ms: 1_000 }).await.unwrap();
    assert_eq!((node.value(LEASES), node.value(LEASES_EXPIRED)), (1.0, 0.0));
    node.until(LEASES_EXPIRED, |expired| expired == 1.0).await;
    node.until(LEASES, |leases| leases == 0.0).await;

    // More changes than are kept: who resumes before them is cut off.
    assert_eq!(node.value(WATCHES_COMPACTED), 0.0);
    for round in 0..170 {
        let keys: Vec<String> = (0..120).map(|i| format!("k/{round}/{i}")).collect();
        client.txn(puts(&keys)).await.unwrap();
    }
    let request = v1::WatchRequest { prefixes: vec!["k/".to_owned()], after_revision: 1 };
    let mut watch = client.watch(request).await.unwrap().into_inner();
    while watch.message().await.unwrap().is_some() {}
    assert_eq!(node.value(WATCHES_COMPACTED), 1.0);
    assert!(node.value(QUOTA_BYTES) > node.value(STORE_BYTES));
    node.keeper.stop().await;
}
