//! openraft's own suite against our storage, and what it does not test: restarts, snapshots, damage.

use openraft::storage::{
    IOFlushed, RaftLogReader as _, RaftLogStorage as _, RaftLogStorageExt as _, RaftSnapshotBuilder as _,
    RaftStateMachine as _,
};
use std::io;
use std::path::{Path, PathBuf};

use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt as _;
use openraft::type_config::alias::OneshotReceiverOf;
use tempfile::TempDir;
use tokio::time::timeout;

use super::types::{Entry, LogEntry, LogId, Payload, Vote};
use super::*;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), openraft::StorageError<TypeConfig>> {
        let directory = TempDir::new().unwrap();
        let log = LogStore::open(&directory.path().join("log")).unwrap();
        let machine = Machine::open(&directory.path().join("snapshot")).unwrap();
        Ok((directory, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openraft_suite() {
    Suite::test_all(Builder).await.unwrap();
}

fn put(key: &str, value: &str) -> v1::KeeperEntry {
    let put = v1::op::Put { key: key.to_owned(), value: value.to_owned().into(), lease: 0 };
    let op = v1::Op { op: Some(v1::op::Op::Put(put)) };
    v1::KeeperEntry { txn: Some(v1::TxnRequest { then: vec![op], ..Default::default() }) }
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: openraft::impls::leader_id_adv::LeaderId { term, node_id: 7 }, index }
}

fn entry(index: u64) -> LogEntry {
    LogEntry { log_id: log_id(1, index), payload: Payload::Normal(Entry(put("k", &index.to_string()))) }
}

async fn append(log: &mut LogStore, entries: Vec<LogEntry>) {
    log.blocking_append(entries).await.unwrap();
}

#[tokio::test]
async fn votes_and_entries_are_there_after_a_restart() {
    let directory = TempDir::new().unwrap();
    let vote =
        Vote { leader_id: openraft::impls::leader_id_adv::LeaderId { term: 3, node_id: 7 }, committed: true };
    {
        let mut log = LogStore::open(directory.path()).unwrap();
        log.save_vote(&vote).await.unwrap();
        append(&mut log, (0..100).map(entry).collect()).await;
        log.save_committed(Some(log_id(1, 90))).await.unwrap();
        log.truncate_after(Some(log_id(1, 94))).await.unwrap();
        log.purge(log_id(1, 9)).await.unwrap();
        append(&mut log, vec![entry(95)]).await;
    }
    let mut log = LogStore::open(directory.path()).unwrap();
    assert_eq!(log.read_vote().await.unwrap(), Some(vote));
    let state = log.get_log_state().await.unwrap();
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(log_id(1, 9)), Some(log_id(1, 95))));
    assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 90)));
    let entries = log.try_get_log_entries(0..1000).await.unwrap();
    assert_eq!(
        entries.iter().map(|entry| entry.log_id.index).collect::<Vec<_>>(),
        (10..=95).collect::<Vec<_>>()
    );
    assert!(matches!(&entries[0].payload, Payload::Normal(Entry(content)) if *content == put("k", "10")));
}

/// Appends one entry after the other, without waiting; each is told when it is on disk.
async fn append_at_once(
    log: &mut LogStore,
    count: u64,
) -> Vec<OneshotReceiverOf<TypeConfig, io::Result<()>>> {
    let mut told = Vec::new();
    for index in 0..count {
        let (sender, receiver) = TypeConfig::oneshot();
        log.append([entry(index)], IOFlushed::signal(sender)).await.unwrap();
        told.push(receiver);
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_during_an_fsync_goes_to_disk_with_the_next() {
    let directory = TempDir::new().unwrap();
    let original = directory.path().join("original");
    let mut log = LogStore::open(&original).unwrap();
    for told in append_at_once(&mut log, 500).await {
        told.await.unwrap().unwrap();
    }
    let (fsyncs, entries) = (log.groups().seconds.get_sample_count(), log.groups().sizes.get_sample_sum());
    assert!((1..250).contains(&fsyncs), "{fsyncs} fsyncs");
    assert_eq!(entries, 500.0);
    // Whoever was told may rely on it: as after a SIGKILL.
    let copied = directory.path().join("copied");
    copy(&original, &copied);
    let mut log = LogStore::open(&copied).unwrap();
    assert_eq!(log.try_get_log_entries(0..1000).await.unwrap().len(), 500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_ever_when_the_log_is_closed() {
    for _ in 0..20 {
        let directory = TempDir::new().unwrap();
        let mut log = LogStore::open(directory.path()).unwrap();
        let told = append_at_once(&mut log, 100).await;
        log.close();
        for told in told {
            let told = timeout(Duration::from_secs(30), told).await.expect("it is told").unwrap();
            assert!(
                told.as_ref().is_err_and(|error| error.to_string().contains("does not write"))
                    || told.is_ok()
            );
        }
        assert!(log.append([entry(100)], IOFlushed::noop()).await.is_err());
    }
}

/// What is on disk at this moment, as a crash would leave it for the next start.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let target = to.join(file.file_name());
        if file.file_type().unwrap().is_dir() {
            copy(&file.path(), &target);
        } else if file.file_name() != "LOCK" {
            std::fs::copy(file.path(), target).unwrap();
        }
    }
}

/// The newest file of the log.
fn last_chunk(log: &Path) -> PathBuf {
    let mut files: Vec<PathBuf> = std::fs::read_dir(log).unwrap().map(|file| file.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "wal"));
    files.sort();
    files.pop().unwrap()
}

#[tokio::test]
async fn a_torn_tail_is_cut_off_and_damage_before_it_is_refused() {
    let directory = TempDir::new().unwrap();
    let original = directory.path().join("original");
    let mut log = LogStore::open(&original).unwrap();
    append(&mut log, (0..50).map(entry).collect()).await;
    let whole = std::fs::read(last_chunk(&original)).unwrap();

    for cut in [1, 7, 20] {
        let torn = directory.path().join(format!("torn-{cut}"));
        copy(&original, &torn);
        std::fs::write(last_chunk(&torn), &whole[..whole.len() - cut]).unwrap();
        let mut log = LogStore::open(&torn).unwrap();
        let entries = log.try_get_log_entries(0..1000).await.unwrap();
        assert!(entries.len() >= 48 && entries.len() < 50, "{} entries are left", entries.len());
        append(&mut log, vec![entry(entries.len() as u64)]).await;
    }

    let damaged = directory.path().join("damaged");
    copy(&original, &damaged);
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(last_chunk(&damaged), bytes).unwrap();
    let opened = tokio::task::spawn_blocking(move || LogStore::open(&damaged).map(drop)).await;
    assert!(!matches!(opened, Ok(Ok(()))), "a flipped bit in the middle of the log went unnoticed");
}

/// Not as a torn tail either: what is after it was acknowledged.
#[tokio::test]
async fn a_flipped_bit_anywhere_in_the_log_is_refused() {
    let directory = TempDir::new().unwrap();
    let original = directory.path().join("original");
    let mut log = LogStore::open(&original).unwrap();
    log.save_vote(&Vote { leader_id: log_id(1, 0).leader_id, committed: true }).await.unwrap();
    append(&mut log, (0..6).map(entry).collect()).await;
    log.close();
    let path = last_chunk(&original);
    let whole = std::fs::read(&path).unwrap();
    let mut unnoticed = Vec::new();
    for at in 0..whole.len() {
        for bit in [0, 3, 7] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, bytes).unwrap();
            let original = original.clone();
            let opened =
                tokio::task::spawn_blocking(move || LogStore::open(&original).map(|log| log.close()));
            if matches!(opened.await, Ok(Ok(()))) {
                unnoticed.push((at, bit));
            }
            std::fs::write(&path, &whole).unwrap();
        }
    }
    assert!(unnoticed.is_empty(), "of {} bytes: {unnoticed:?}", whole.len());
}

async fn get(node: &Node, key: &str) -> Option<String> {
    node.linearize().await.unwrap();
    node.state().get(key).map(|item| String::from_utf8(item.value.to_vec()).unwrap())
}

async fn lead(directory: &Path) -> (Node, Leadership, Duration) {
    let begun = std::time::Instant::now();
    let identity = Arc::new(Identity::new(7, Some("test")));
    let limits = Limits { snapshot_every: 1_000, ..Limits::default() };
    let storage = Storage::open(directory).await.unwrap();
    let (node, _) = Node::start(identity, None, storage, &limits).await.unwrap();
    node.found(BTreeMap::from([(node.id(), "127.0.0.1:1".to_owned())])).await.unwrap();
    let leadership = node.leadership().wait_for(Option::is_some).await.unwrap().unwrap();
    (node, leadership, begun.elapsed())
}

async fn here(node: &Node, entry: v1::KeeperEntry) -> Result<v1::KeeperApplied, Unavailable> {
    let entry = Entry(entry);
    let admitted = node.admit(&entry).unwrap();
    node.propose_here(entry, admitted).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_survives_crashes_and_restarts_lead_at_once() {
    let directory = TempDir::new().unwrap();
    let mut at = directory.path().join("0");
    let mut expected = 0u64;
    for round in 1..=4u64 {
        let (node, _, took) = lead(&at).await;
        assert!(took < Duration::from_millis(500), "leading took {took:?}");
        if round > 1 {
            assert_eq!(get(&node, "counter").await.as_deref(), Some(expected.to_string().as_str()));
        }
        for _ in 0..20 {
            expected += 1;
            node.propose(put("counter", &expected.to_string())).await.unwrap();
        }
        if round == 2 {
            let before = node.progress().snapshot;
            node.snapshot().await.unwrap();
            while node.progress().snapshot == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            expected += 1;
            node.propose(put("counter", &expected.to_string())).await.unwrap();
        }
        // The next round starts from what is on disk now, while this node is still running: as after a SIGKILL.
        let next = directory.path().join(round.to_string());
        copy(&at, &next);
        node.stop().await;
        at = next;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_does_not_grow_for_ever() {
    let directory = TempDir::new().unwrap();
    let (node, _, _) = lead(directory.path()).await;
    let value = "x".repeat(4000);
    for round in 0..15u64 {
        let writes = (0..1000).map(|i| {
            let (node, entry) = (node.clone(), put(&format!("k/{i}"), &format!("{round} {value}")));
            tokio::spawn(async move { node.propose(entry).await })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.unwrap().unwrap();
        }
    }
    assert!(node.progress().snapshot > 0);
    // 15,000 entries are 61 MB; three chunks are 48 MiB. A snapshot on its way may still hold some up.
    let began = std::time::Instant::now();
    while node.log_bytes() >= 3 * 16 * 1024 * 1024 + 1024 * 1024 {
        assert!(began.elapsed() < Duration::from_secs(30), "the log stays at {} bytes", node.log_bytes());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let revision = node.state().revision();
    node.stop().await;
    let (node, _, _) = lead(directory.path()).await;
    node.linearize().await.unwrap();
    assert_eq!(node.state().revision(), revision);
    assert!(get(&node, "k/999").await.unwrap().starts_with("14 x"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_proposed_for_a_former_term_is_refused() {
    let directory = TempDir::new().unwrap();
    let (node, leadership, _) = lead(directory.path()).await;
    node.propose_as(leadership, put("a", "1")).await.unwrap();
    let former = Leadership { term: leadership.term - 1, ..leadership };
    let refused = node.propose_as(former, put("a", "2")).await.unwrap_err();
    assert!(matches!(refused, Unavailable::NotLeader { .. }), "{refused}");
    assert_eq!(get(&node, "a").await.as_deref(), Some("1"));
    node.stop().await;
    assert!(matches!(
        here(&node, put("a", "3")).await,
        Err(Unavailable::Failed(_) | Unavailable::NotLeader { .. })
    ));
    assert!(node.failure().wait_for(Option::is_some).await.is_ok());
    assert_eq!(*node.leadership().borrow(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consensus_that_has_panicked_does_not_look_alive() {
    let directory = TempDir::new().unwrap();
    let (node, _, _) = lead(directory.path()).await;
    assert_eq!(*node.failure().borrow(), None);
    let panicked = node.raft.with_raft_state(|_| panic!("as it must not")).await;
    assert!(panicked.is_err());
    let mut failure = node.failure();
    let failed = timeout(Duration::from_secs(30), failure.wait_for(Option::is_some)).await;
    assert!(failed.is_ok_and(|failed| failed.is_ok()));
    assert!(!node.leads());
    assert!(matches!(here(&node, put("a", "1")).await, Err(Unavailable::NotLeader { .. })));
}

#[tokio::test]
async fn a_snapshot_is_whole_or_not_there() {
    let directory = TempDir::new().unwrap();
    let mut machine = Machine::open(directory.path()).unwrap();
    let snapshot = machine.build_snapshot().await.unwrap();
    assert!(machine.get_current_snapshot().await.unwrap().is_some());
    // A crash in the middle of the next one leaves this behind.
    std::fs::write(directory.path().join("new"), b"half").unwrap();
    let mut machine = Machine::open(directory.path()).unwrap();
    assert_eq!(machine.get_current_snapshot().await.unwrap().unwrap().meta, snapshot.meta);

    let path = directory.path().join("current");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = Machine::open(directory.path()).err().unwrap();
    assert_eq!(error.to_string(), "the snapshot is damaged: its checksum does not match");
    std::fs::write(&path, b"something else altogether").unwrap();
    let error = Machine::open(directory.path()).err().unwrap();
    assert_eq!(error.to_string(), "the snapshot is not one of this version");
}
