//! What is the embedded store's own: deletion in bounded parts, and an index that is the same after reopening.

use std::path::Path;

use carillon_hub::saver::{Embedded, Limits, Logs, Metrics, Sessions, Store};
use carillon_proto::{now_ms, topic, v1};

const INBOX: &str = "demo/u/busy";

/// A session of the inbox's user that is not kept.
fn busy() -> Option<v1::SessionRef> {
    Some(v1::SessionRef { app: "demo".to_owned(), user: "busy".to_owned(), client_id: "c".to_owned() })
}

fn open(path: &Path) -> (Embedded, Metrics) {
    let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
    let limits = Limits { reserve_bytes: 0, ..Limits::default() };
    (Embedded::open(path, "test", limits, metrics.clone()).expect("the store opens"), metrics)
}

fn append(topic: &str, seq: u64, retention: v1::Retention) -> v1::Append {
    let message = v1::Message {
        topic: topic.to_owned(),
        payload: b"x".to_vec().into(),
        epoch: 1,
        seq,
        ..v1::Message::default()
    };
    let slot = topic::slot_of(topic);
    v1::Append {
        slot,
        message: Some(message),
        log: true,
        retention: Some(retention),
        ..v1::Append::default()
    }
}

async fn fill(store: &Embedded, topic: &str, seqs: std::ops::RangeInclusive<u64>, retention: v1::Retention) {
    let all: Vec<u64> = seqs.collect();
    for chunk in all.chunks(1000) {
        let batch = chunk.iter().map(|&seq| append(topic, seq, retention)).collect();
        assert!(store.append(batch).await.iter().all(Result::is_ok));
    }
}

async fn readable(store: &Embedded, topic: &str) -> Vec<u64> {
    let read = v1::Read { topic: topic.to_owned(), after: 0, limit: 1000, max_bytes: 0 };
    store.read(read).await.expect("a read").messages.iter().map(|message| message.seq).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_log_is_deleted_in_parts() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, metrics) = open(directory.path());
    let consumed = v1::Retention { consumed: true, ..v1::Retention::default() };
    fill(&store, INBOX, 1..=25_000, consumed).await;
    assert_eq!(metrics.log_messages.get(), 25_000);
    let positions = vec![v1::AckPosition { topic: INBOX.to_owned(), seq: 24_999 }];
    store.ack(v1::Ack { session: busy(), attachment: 0, positions }).await.expect("acked");
    // No longer readable at once, though most of it is there still.
    assert_eq!(readable(&store, INBOX).await, [25_000]);
    store.sweep(now_ms()).await.expect("a sweep");
    let left = metrics.log_messages.get();
    assert!(left > 1 && left < 25_000, "{left}");
    // Stopping deletes a part as well; after reopening it goes on in the middle.
    store.stop().await;
    drop(store);
    let (store, metrics) = open(directory.path());
    assert!(metrics.log_messages.get() > 1 && metrics.log_messages.get() < left);
    assert_eq!(readable(&store, INBOX).await, [25_000]);
    for _ in 0..3 {
        fill(&store, "demo/other", 1..=1, v1::Retention::default()).await;
        store.sweep(now_ms()).await.expect("a sweep");
    }
    fill(&store, INBOX, 25_001..=25_001, consumed).await;
    assert_eq!(metrics.log_messages.get(), 3);
    assert_eq!(readable(&store, INBOX).await, [25_000, 25_001]);
    store.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_log_that_is_too_old_goes_in_parts() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, metrics) = open(directory.path());
    let hour = v1::Retention { max_age_seconds: 3600, ..v1::Retention::default() };
    fill(&store, "demo/log", 1..=25_000, hour).await;
    let later = now_ms() + 3_700_000;
    let mut swept = Vec::new();
    for _ in 0..4 {
        swept.push(store.sweep(later).await.expect("a sweep").messages);
    }
    assert_eq!(swept, [10_000, 10_000, 5_000, 0]);
    assert_eq!(metrics.log_messages.get(), 0);
    assert_eq!(metrics.log_bytes.get(), 0);
    assert_eq!(readable(&store, "demo/log").await, [0; 0]);
    store.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_shrinks_is_reached_in_parts() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, metrics) = open(directory.path());
    fill(&store, "demo/log", 1..=15_000, v1::Retention::default()).await;
    let ten = v1::Retention { max_count: 10, ..v1::Retention::default() };
    fill(&store, "demo/log", 15_001..=15_001, ten).await;
    assert_eq!(metrics.log_messages.get(), 5_001);
    fill(&store, "demo/log", 15_002..=15_002, ten).await;
    assert_eq!(readable(&store, "demo/log").await, (14_993..=15_002).collect::<Vec<_>>());
    assert_eq!(metrics.log_messages.get(), 10);
    store.stop().await;
}

/// A message on its own, acked at once: neither the log nor the index may grow with each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inbox_that_is_consumed_stays_small() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut store, mut metrics) = open(directory.path());
    let consumed = v1::Retention { consumed: true, max_count: 100, ..v1::Retention::default() };
    for round in 0..3_u64 {
        for seq in round * 100 + 1..=round * 100 + 100 {
            fill(&store, INBOX, seq..=seq, consumed).await;
            let positions = vec![v1::AckPosition { topic: INBOX.to_owned(), seq }];
            store.ack(v1::Ack { session: busy(), attachment: 0, positions }).await.expect("acked");
        }
        store.stop().await;
        drop(store);
        (store, metrics) = open(directory.path());
        assert_eq!((metrics.log_messages.get(), metrics.log_bytes.get(), metrics.topics.get()), (0, 0, 1));
        let head = store.heads(vec![INBOX.to_owned()]).await.expect("heads")[0];
        assert_eq!((head.seq, head.trimmed), (round * 100 + 100, round * 100 + 100));
    }
    assert_eq!(metrics.writable.get(), 1);
    store.stop().await;
}
