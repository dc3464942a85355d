//! Several keepers as one: how a cluster comes about, who may belong to it, and that any node can be asked anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carillon_agent::admin::{Admin, ChangeOptions};
use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_agent::{Agent, Instance, Options};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions, Limits};
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::Code;
use tonic::transport::Channel;
use v1::op::{Op, Put};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(40);

/// A node that can be stopped and started again at the same address.
struct Node {
    address: String,
    directory: PathBuf,
    keeper: Option<KeeperHandle>,
}

struct Cluster {
    directory: TempDir,
    nodes: Vec<Node>,
    peers: Vec<String>,
    limits: Limits,
}

/// An address that is free, and stays so: nothing else on this machine takes ports of this address.
async fn free_address(place: usize) -> String {
    let listener = TcpListener::bind((format!("127.0.7.{}", place + 1), 0)).await.unwrap();
    listener.local_addr().unwrap().to_string()
}

async fn options(directory: &Path, address: &str, peers: &[String]) -> KeeperOptions {
    let begun = Instant::now();
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{address}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let mut options = KeeperOptions::new(directory, listener, vec![DocumentKind::of::<Revoked>()]);
    options.peers = peers.to_vec();
    options
}

impl Cluster {
    /// Addresses and directories; nothing runs yet.
    async fn plan(count: usize) -> Cluster {
        let directory = TempDir::new().unwrap();
        let mut nodes = Vec::new();
        for place in 0..count {
            let address = free_address(place).await;
            nodes.push(Node { address, directory: directory.path().join(place.to_string()), keeper: None });
        }
        let peers = nodes.iter().map(|node| node.address.clone()).collect();
        Cluster { directory, nodes, peers, limits: Limits::default() }
    }

    async fn of(count: usize) -> Cluster {
        let mut cluster = Cluster::plan(count).await;
        for place in 0..count {
            cluster.start(place).await;
        }
        cluster.settled(count).await;
        cluster
    }

    async fn start(&mut self, place: usize) {
        let node = &mut self.nodes[place];
        let mut options = options(&node.directory, &node.address, &self.peers).await;
        options.limits = self.limits.clone();
        node.keeper = Some(Keeper::start(options).await.unwrap());
    }

    async fn stop(&mut self, place: usize) {
        self.nodes[place].keeper.take().unwrap().stop().await;
    }

    fn keeper(&self, place: usize) -> &KeeperHandle {
        self.nodes[place].keeper.as_ref().unwrap()
    }

    fn id(&self, place: usize) -> u64 {
        self.keeper(place).status().node_id
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|&place| self.nodes[place].keeper.is_some())
    }

    /// The place of the node that leads.
    async fn leader(&self) -> usize {
        let begun = Instant::now();
        loop {
            if let Some(place) = self.running().find(|&place| self.keeper(place).status().leads) {
                return place;
            }
            assert!(begun.elapsed() < PATIENCE, "nobody leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until there are so many voters, and no learner.
    async fn settled(&self, voters: usize) -> Vec<v1::KeeperMember> {
        let begun = Instant::now();
        loop {
            let mut seen = Vec::new();
            for place in self.running() {
                if let Ok(mut client) = self.try_client(place).await
                    && let Ok(list) = client.member_list(v1::MemberListRequest {}).await
                {
                    seen.push(list.into_inner());
                }
            }
            let good = |list: &v1::MemberListResponse| {
                list.leader_id != 0 && list.members.len() == voters && list.members.iter().all(|m| m.voter)
            };
            if seen.len() == self.running().count() && seen.iter().all(good) {
                return seen.remove(0).members;
            }
            assert!(begun.elapsed() < PATIENCE, "{voters} voters are wanted: {seen:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_client(&self, place: usize) -> Result<KeeperClient<Channel>, tonic::transport::Error> {
        KeeperClient::connect(format!("http://{}", self.nodes[place].address)).await
    }

    async fn client(&self, place: usize) -> KeeperClient<Channel> {
        self.try_client(place).await.unwrap()
    }

    async fn write(&self, place: usize, key: &str, value: &str) {
        let put = Put { key: key.to_owned(), value: value.to_owned().into(), lease: 0 };
        let then = vec![v1::Op { op: Some(Op::Put(put)) }];
        let txn = v1::TxnRequest { then, ..Default::default() };
        let begun = Instant::now();
        loop {
            match self.client(place).await.txn(txn.clone()).await {
                Ok(_) => return,
                Err(status) => assert!(begun.elapsed() < PATIENCE, "{status}"),
            }
        }
    }

    async fn read(&self, place: usize, key: &str) -> Option<String> {
        let request = v1::RangeRequest { key: key.to_owned(), ..Default::default() };
        let items = self.client(place).await.range(request).await.unwrap().into_inner().items;
        items.first().map(|item| String::from_utf8(item.value.to_vec()).unwrap())
    }

    async fn stop_all(mut self) {
        for place in 0..self.nodes.len() {
            if let Some(keeper) = self.nodes[place].keeper.take() {
                keeper.stop().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_says_where_a_change_came_from_whichever_node_was_asked() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    for place in 0..3 {
        // An address that no keeper has.
        let own = std::net::Ipv4Addr::new(127, 0, 8, 10 + place as u8);
        let endpoint = Channel::from_shared(format!("http://{}", cluster.nodes[place].address)).unwrap();
        let channel = endpoint.local_address(Some(own.into())).connect().await.unwrap();
        let mut client = KeeperClient::new(channel);
        let yaml = format!("tokens: {{t{place}: 0}}");
        let request = v1::PublishConfigRequest {
            document: "revoked/demo".to_owned(),
            change: Some(v1::publish_config_request::Change::Yaml(yaml)),
            ..Default::default()
        };
        client.publish_config(request).await.unwrap();
        let request = v1::ConfigHistoryRequest { document: "revoked/demo".to_owned(), limit: 1 };
        let newest = client.config_history(request).await.unwrap().into_inner().revisions.remove(0);
        assert_eq!(newest.revision, place as u64 + 1);
        assert!(newest.peer.starts_with(&format!("{own}:")), "{newest:?}, node {leader} leads");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_takes_writes_and_every_node_reads_them_at_once() {
    let cluster = Cluster::of(3).await;
    for (i, (writer, reader)) in [(0, 1), (1, 2), (2, 0), (1, 0), (2, 1)].into_iter().enumerate() {
        cluster.write(writer, "k", &i.to_string()).await;
        assert_eq!(cluster.read(reader, "k").await.as_deref(), Some(i.to_string().as_str()));
    }
    // A lease that was granted through one node is kept alive through another.
    let ttl_ms = 2_000;
    let lease = cluster.client(0).await.lease_grant(v1::LeaseGrantRequest { ttl_ms }).await.unwrap();
    let lease = lease.into_inner().lease;
    for place in [0, 1, 2, 0, 1, 2] {
        tokio::time::sleep(Duration::from_millis(600)).await;
        let mut client = cluster.client(place).await;
        client.lease_keep_alive(v1::LeaseKeepAliveRequest { lease, ..Default::default() }).await.unwrap();
    }
    let clusters: Vec<String> = (0..3).map(|place| cluster.keeper(place).status().cluster_id).collect();
    assert!(clusters.iter().all(|id| !id.is_empty() && *id == clusters[0]), "{clusters:?}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over_and_what_was_written_stays() {
    let mut cluster = Cluster::of(3).await;
    let first = cluster.leader().await;
    cluster.write(first, "before", "1").await;
    let begun = Instant::now();
    cluster.stop(first).await;
    let second = cluster.leader().await;
    let other = cluster.running().find(|&place| place != second).unwrap();
    cluster.write(other, "after", "2").await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!(cluster.read(second, "before").await.as_deref(), Some("1"));
    cluster.start(first).await;
    cluster.settled(3).await;
    assert_eq!(cluster.read(first, "after").await.as_deref(), Some("2"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_decided_by_a_minority() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    cluster.write(leader, "k", "1").await;
    for place in (0..3).filter(|&place| place != leader) {
        // Dropped: it hands nothing over.
        drop(cluster.nodes[place].keeper.take());
    }
    let put = Put { key: "k".to_owned(), value: "2".into(), lease: 0 };
    let txn = v1::TxnRequest { then: vec![v1::Op { op: Some(Op::Put(put)) }], ..Default::default() };
    let mut client = cluster.client(leader).await;
    let refused = client.txn(txn).await.unwrap_err();
    assert!(
        matches!(refused.code(), Code::DeadlineExceeded | Code::Unknown | Code::Unavailable),
        "{refused}"
    );
    let request = v1::RangeRequest { key: "k".to_owned(), ..Default::default() };
    let refused = client.range(request).await.unwrap_err();
    assert!(matches!(refused.code(), Code::DeadlineExceeded | Code::Unavailable), "{refused}");
    assert!(!cluster.keeper(leader).status().in_touch);
    for place in (0..3).filter(|&place| place != leader) {
        cluster.start(place).await;
    }
    cluster.settled(3).await;
    cluster.write(leader, "k", "3").await;
    assert_eq!(cluster.read(leader, "k").await.as_deref(), Some("3"));
    cluster.stop_all().await;
}

/// What cannot be decided takes memory: not more than a limit, however long it lasts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_to_be_decided_is_bounded_by_bytes() {
    let mut cluster = Cluster::plan(3).await;
    cluster.limits.proposal_bytes = 4_000_000;
    for place in 0..3 {
        cluster.start(place).await;
    }
    cluster.settled(3).await;
    let leader = cluster.leader().await;
    for place in (0..3).filter(|&place| place != leader) {
        drop(cluster.nodes[place].keeper.take());
    }
    let client = cluster.client(leader).await;
    let write = async |i: usize| {
        let put = Put { key: format!("big/{i}"), value: vec![0; 900_000].into(), lease: 0 };
        let then = vec![v1::Op { op: Some(Op::Put(put)) }];
        client.clone().txn(v1::TxnRequest { then, ..Default::default() }).await.map(drop)
    };
    let is_busy = |answer: &Result<(), tonic::Status>| match answer {
        Ok(()) => panic!("a minority has decided"),
        Err(status) => status.code() == Code::Unavailable && status.message().contains("is busy"),
    };
    let answers = futures::future::join_all((0..12).map(&write)).await;
    assert_eq!(answers.iter().filter(|answer| is_busy(answer)).count(), 8, "{answers:?}");
    // Nobody waits for the four any more, but they may still be decided.
    let refused = write(12).await;
    assert!(is_busy(&refused), "{refused:?}");
    for place in (0..3).filter(|&place| place != leader) {
        cluster.start(place).await;
    }
    cluster.settled(3).await;
    let begun = Instant::now();
    while let Err(status) = write(13).await {
        assert!(begun.elapsed() < PATIENCE, "{status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_founded_only_when_every_peer_is_there_and_blank() {
    let mut cluster = Cluster::plan(3).await;
    cluster.start(0).await;
    cluster.start(1).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for place in [0, 1] {
        assert_eq!(cluster.keeper(place).status().cluster_id, "", "one peer has not answered yet");
    }
    cluster.start(2).await;
    cluster.settled(3).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_lost_its_disk_is_replaced_even_the_founder() {
    let mut cluster = Cluster::of(3).await;
    cluster.write(1, "k", "1").await;
    let (before, id) = (cluster.id(0), cluster.keeper(1).status().cluster_id);
    cluster.stop(0).await;
    std::fs::remove_dir_all(&cluster.nodes[0].directory).unwrap();
    cluster.start(0).await;
    let members = cluster.settled(3).await;
    let after = cluster.id(0);
    assert_ne!(before, after, "another disk is another node");
    assert!(members.iter().all(|member| member.node_id != before), "{members:?}");
    assert_eq!(cluster.keeper(0).status().cluster_id, id, "it has not founded a cluster of its own");
    assert_eq!(cluster.read(0, "k").await.as_deref(), Some("1"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_taken_out_comes_back_as_another() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    let before = cluster.id(away);
    cluster.stop(away).await;
    let request = v1::MemberRemoveRequest { node_id: before };
    cluster.client(leader).await.member_remove(request).await.unwrap();
    cluster.settled(2).await;
    cluster.write(leader, "k", "1").await;
    cluster.start(away).await;
    cluster.settled(3).await;
    assert_ne!(cluster.id(away), before);
    assert_eq!(cluster.read(away, "k").await.as_deref(), Some("1"));
    let former = cluster.nodes[away].directory.join("former/keeper.json");
    assert!(std::fs::read_to_string(former).unwrap().contains(&before.to_string()));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_log_was_deleted_has_no_vote_under_its_old_id() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let emptied = (leader + 1) % 3;
    let before = cluster.id(emptied);
    cluster.write(leader, "k", "1").await;
    cluster.stop(emptied).await;
    for part in ["log", "snapshot"] {
        std::fs::remove_dir_all(cluster.nodes[emptied].directory.join(part)).unwrap();
    }
    cluster.start(emptied).await;
    cluster.settled(3).await;
    assert_ne!(cluster.id(emptied), before);
    assert_eq!(cluster.read(emptied, "k").await.as_deref(), Some("1"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_grew_a_cluster_starts_again_without_peers() {
    let mut cluster = Cluster::of(2).await;
    let peers = std::mem::take(&mut cluster.peers);
    for place in [0, 1] {
        cluster.stop(place).await;
        cluster.start(place).await;
        cluster.settled(2).await;
    }
    cluster.write(0, "k", "1").await;
    assert_eq!(cluster.read(1, "k").await.as_deref(), Some("1"));
    drop(peers);
    cluster.stop_all().await;
}

/// It was the only one that it was told of when it founded the cluster; so it would found another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_was_alone_comes_back_without_its_disk_when_it_is_told_of_those_who_came() {
    let mut cluster = Cluster::of(1).await;
    cluster.write(0, "k", "1").await;
    let (before, id) = (cluster.id(0), cluster.keeper(0).status().cluster_id);
    for place in 1..3 {
        let address = free_address(place).await;
        let directory = cluster.directory.path().join(place.to_string());
        cluster.peers.push(address.clone());
        cluster.nodes.push(Node { address, directory, keeper: None });
        cluster.start(place).await;
        cluster.settled(place + 1).await;
    }
    cluster.stop(0).await;
    std::fs::remove_dir_all(&cluster.nodes[0].directory).unwrap();
    cluster.start(0).await;
    let members = cluster.settled(3).await;
    assert!(members.iter().all(|member| member.node_id != before), "{members:?}");
    assert_eq!(cluster.keeper(0).status().cluster_id, id, "it has not founded a cluster of its own");
    assert_eq!(cluster.read(0, "k").await.as_deref(), Some("1"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_nobody_knows_the_node_by_is_refused() {
    let directory = TempDir::new().unwrap();
    let (own, other) = (free_address(9).await, "127.0.7.200:7400".to_owned());
    let options = options(directory.path(), &own, std::slice::from_ref(&other)).await;
    let refused = Keeper::start(options).await.err().unwrap().to_string();
    assert!(refused.contains(&format!("{own} is not among the peers {other}")), "{refused}");
    // An address at which the leader reaches itself is nobody's.
    let cluster = Cluster::of(1).await;
    let request = v1::MemberAddRequest { address: cluster.peers[0].clone() };
    let refused = cluster.client(0).await.member_add(request).await.unwrap_err();
    assert!(refused.message().contains("the leader reaches keeper"), "{refused}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_lags_by_a_lot_of_data_catches_up() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    cluster.stop(away).await;
    let value = "x".repeat(900_000);
    // More than one message may have.
    for i in 0..40 {
        cluster.write(leader, &format!("big/{}", i % 4), &format!("{i}{value}")).await;
    }
    cluster.start(away).await;
    cluster.settled(3).await;
    assert!(cluster.read(away, "big/3").await.unwrap().starts_with("39x"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_keeps_no_lease_alive() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let lease = v1::LeaseGrantRequest { ttl_ms: 60_000 };
    let lease = cluster.client(leader).await.lease_grant(lease).await.unwrap().into_inner().lease;
    for place in (0..3).filter(|&place| place != leader) {
        drop(cluster.nodes[place].keeper.take());
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut client = cluster.client(leader).await;
    let refused =
        client.lease_keep_alive(v1::LeaseKeepAliveRequest { lease, ..Default::default() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "another may lead, and end it");
    cluster.stop_all().await;
}

/// Copies a directory, as a volume's backup does.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        if file.file_type().unwrap().is_dir() {
            copy(&file.path(), &to.join(file.file_name()));
        } else {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_older_than_what_it_has_confirmed_is_not_used() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let stale = (leader + 1) % 3;
    cluster.stop(stale).await;
    let (path, backup) = (cluster.nodes[stale].directory.clone(), cluster.directory.path().join("backup"));
    copy(&path, &backup);
    cluster.start(stale).await;
    cluster.settled(3).await;
    let before = cluster.id(stale);
    for i in 0..20 {
        cluster.write(leader, "k", &i.to_string()).await;
    }
    assert_eq!(cluster.read(stale, "k").await.as_deref(), Some("19"));
    cluster.stop(stale).await;
    std::fs::remove_dir_all(&path).unwrap();
    copy(&backup, &path);
    cluster.start(stale).await;
    cluster.settled(3).await;
    assert_ne!(cluster.id(stale), before, "the node that had confirmed more is gone");
    assert_eq!(cluster.read(stale, "k").await.as_deref(), Some("19"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_is_refused() {
    let cluster = Cluster::of(1).await;
    let directory = TempDir::new().unwrap();
    let address = free_address(8).await;
    let foreign = Keeper::start(options(directory.path(), &address, &[]).await).await.unwrap();
    let request = v1::MemberAddRequest { address: address.clone() };
    let refused = cluster.client(0).await.member_add(request).await.unwrap_err();
    let (ours, theirs) = (cluster.keeper(0).status().cluster_id, foreign.status().cluster_id);
    assert_eq!(refused.message(), format!("the keeper at {address} is of cluster {theirs}, not of {ours}"));
    foreign.stop().await;

    // Nor does it go over by itself, when it is told of other peers.
    let peers = [cluster.peers[0].clone(), address.clone()];
    let foreign = Keeper::start(options(directory.path(), &address, &peers).await).await.unwrap();
    assert_eq!(foreign.status().cluster_id, theirs);
    cluster.settled(1).await;
    foreign.stop().await;
    let nonsense = v1::MemberAddRequest { address: "nowhere".to_owned() };
    let refused = cluster.client(0).await.member_add(nonsense).await.unwrap_err();
    assert_eq!(refused.message(), "\"nowhere\" is not an address: it must be host:port");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_and_the_lead_moves() {
    let mut cluster = Cluster::of(1).await;
    cluster.write(0, "k", "1").await;
    // Peers that were not there when the cluster was founded.
    for place in 1..5 {
        let address = free_address(place).await;
        let directory = cluster.directory.path().join(place.to_string());
        cluster.peers.push(address.clone());
        cluster.nodes.push(Node { address, directory, keeper: None });
        cluster.start(place).await;
        cluster.settled(place + 1).await;
    }
    let to = cluster.id(3);
    let request = v1::LeadershipTransferRequest { node_id: to };
    let moved = cluster.client(1).await.leadership_transfer(request).await.unwrap().into_inner();
    assert_eq!(moved.node_id, to);
    assert_eq!(cluster.leader().await, 3);
    // The leader itself is taken out, through another node, and a second one.
    for (place, left) in [(3, 4), (0, 3)] {
        let request = v1::MemberRemoveRequest { node_id: cluster.id(place) };
        cluster.client(1).await.member_remove(request).await.unwrap();
        cluster.stop(place).await;
        cluster.settled(left).await;
    }
    cluster.write(2, "k", "2").await;
    assert_eq!(cluster.read(4, "k").await.as_deref(), Some("2"));
    // With one of three away, the second must not be taken out.
    let away = [1, 2, 4].into_iter().find(|&place| !cluster.keeper(place).status().leads).unwrap();
    cluster.stop(away).await;
    let leader = cluster.leader().await;
    let other = [1, 2, 4].into_iter().find(|&place| place != away && place != leader).unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let request = v1::MemberRemoveRequest { node_id: cluster.id(other) };
    let refused = cluster.client(leader).await.member_remove(request).await.unwrap_err();
    assert!(refused.message().contains("too few to decide anything"), "{refused}");
    let unknown = v1::MemberRemoveRequest { node_id: 5 };
    let refused = cluster.client(leader).await.member_remove(unknown).await.unwrap_err();
    assert_eq!(refused.message(), "there is no keeper 0000000000000005");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_and_tools_follow_the_cluster_when_the_keeper_they_were_told_is_gone() {
    let mut cluster = Cluster::of(3).await;
    let told = vec![format!("http://{}", cluster.nodes[0].address)];
    let agent = Agent::start(Options::new(told.clone()));
    let admin = Admin::new(told);
    tokio::time::timeout(PATIENCE, agent.ready()).await.unwrap();
    agent.measure("hub-0", || BTreeMap::from([("connections".to_owned(), 5.0)]));
    agent.register(Instance { incarnation: 1, ..Instance::new("hub-0") });
    // Load is in the leader's memory, and told by every node.
    for place in 0..3 {
        let one = Admin::new(vec![format!("http://{}", cluster.nodes[place].address)]);
        let begun = Instant::now();
        loop {
            let live = one.live().await.unwrap();
            if live.first().is_some_and(|live| live.load.get("connections") == Some(&5.0)) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "no load at node {place}: {live:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(admin.status().await.unwrap().node_id, cluster.id(0));
    // What both learn of the members they learn in the background.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let mut revoked = agent.configs::<Revoked>();
    cluster.stop(0).await;
    let begun = Instant::now();
    loop {
        let change = admin.publish("revoked/demo", "{}", ChangeOptions::default()).await;
        match change {
            Ok(_) => break,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::timeout(PATIENCE, revoked.wait_for(|all| all.contains_key("demo"))).await.unwrap().unwrap();
    let begun = Instant::now();
    while admin.live().await.unwrap().first().is_none_or(|live| live.load.is_empty()) {
        assert!(begun.elapsed() < PATIENCE, "it is not kept alive by another, with its load");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    agent.stop().await;
    cluster.stop_all().await;
}

/// What the founder has acknowledged is there without it, from the first write on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_loses_its_disk_after_its_first_write_takes_nothing_along() {
    let mut cluster = Cluster::plan(3).await;
    // The first by name founds.
    let founder = (0..3).min_by_key(|&place| cluster.nodes[place].address.clone()).unwrap();
    for place in 0..3 {
        cluster.start(place).await;
    }
    // At once: it is not waited for who has a vote.
    cluster.write(founder, "first", "1").await;
    drop(cluster.nodes[founder].keeper.take());
    let directory = cluster.nodes[founder].directory.clone();
    let begun = Instant::now();
    while std::fs::remove_dir_all(&directory).is_err() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let left = (founder + 1) % 3;
    cluster.leader().await;
    assert_eq!(cluster.read(left, "first").await.as_deref(), Some("1"));
    // And what was not written then can be now.
    cluster.write(left, "second", "2").await;
    cluster.start(founder).await;
    cluster.settled(3).await;
    assert_eq!(cluster.read(founder, "first").await.as_deref(), Some("1"));
    cluster.stop_all().await;
}

/// The founder is lost before anything was decided: who was told of the cluster founds it with its successor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founding_that_was_interrupted_is_done_again() {
    let mut cluster = Cluster::plan(3).await;
    cluster.start(1).await;
    cluster.start(2).await;
    let adopted = v1::AdoptRequest { cluster_id: "begun".to_owned(), node_id: cluster.id(1), claim: false };
    let url = format!("http://{}", cluster.nodes[1].address);
    let mut peer = v1::keeper_peer_client::KeeperPeerClient::connect(url).await.unwrap();
    peer.adopt(adopted).await.unwrap();
    cluster.start(0).await;
    cluster.settled(3).await;
    for place in 0..3 {
        assert_eq!(cluster.keeper(place).status().cluster_id, "begun");
    }
    cluster.write(2, "k", "1").await;
    cluster.stop_all().await;
}

/// `member add` has reached it, and then the leader was lost: nothing else came of it. Nobody that it knows is a member.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_a_cluster_has_claimed_founds_none_and_none_is_founded_with_it() {
    // The one that would found, and the one that it would be founded with.
    for claimed in [0, 1] {
        let cluster = Cluster::of(1).await;
        let id = cluster.keeper(0).status().cluster_id;
        let mut strangers = Cluster::plan(2).await;
        strangers.start(claimed).await;
        let url = format!("http://{}", strangers.nodes[claimed].address);
        let mut peer = v1::keeper_peer_client::KeeperPeerClient::connect(url).await.unwrap();
        let node_id = strangers.id(claimed);
        let claim = v1::AdoptRequest { cluster_id: id.clone(), node_id, claim: true };
        peer.adopt(claim.clone()).await.unwrap();
        let refused = peer.adopt(v1::AdoptRequest { claim: false, ..claim }).await.unwrap_err();
        assert!(refused.message().contains("none is founded with it"), "{refused}");
        // It is on the disk.
        strangers.stop(claimed).await;
        for place in [0, 1] {
            strangers.start(place).await;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(strangers.keeper(claimed).status().cluster_id, id);
        for place in [0, 1] {
            let status = strangers.keeper(place).status();
            assert_eq!((status.term, status.applied_index), (0, 0), "claimed {claimed}: {status:?}");
        }
        // Nor does it when it is told of nobody else.
        let peers = std::mem::take(&mut strangers.peers);
        strangers.stop(claimed).await;
        strangers.start(claimed).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let status = strangers.keeper(claimed).status();
        assert_eq!((status.term, status.applied_index), (0, 0), "claimed {claimed}: {status:?}");
        // Until it is taken in, and with it the one that waited for it.
        let request = v1::MemberAddRequest { address: peers[claimed].clone() };
        cluster.client(0).await.member_add(request).await.unwrap();
        cluster.settled(3).await;
        cluster.write(0, "k", "1").await;
        assert_eq!(strangers.read(claimed, "k").await.as_deref(), Some("1"));
        assert_eq!(strangers.keeper(1 - claimed).status().cluster_id, id);
        strangers.stop_all().await;
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_volume_is_refused_while_its_node_runs() {
    let mut cluster = Cluster::of(3).await;
    cluster.write(1, "k", "1").await;
    let path = cluster.directory.path().join("copied");
    copy(&cluster.nodes[1].directory, &path);
    let address = free_address(5).await;
    let mut peers = cluster.peers.clone();
    peers.push(address.clone());
    let refused = Keeper::start(options(&path, &address, &peers).await).await.err().unwrap().to_string();
    let (id, at) = (format!("{:016x}", cluster.id(1)), &cluster.nodes[1].address);
    assert!(refused.contains(&format!("node {id} runs at {at} already")), "{refused}");
    cluster.settled(3).await;
    // Once that one has gone, it is the node, wherever it is.
    cluster.stop(1).await;
    let moved = Keeper::start(options(&path, &address, &peers).await).await;
    assert!(moved.is_ok(), "{:?}", moved.err());
    moved.unwrap().stop().await;
    cluster.stop_all().await;
}
