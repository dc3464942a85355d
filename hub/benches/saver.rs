//! How fast the embedded store is: appends with 1, 64 and 1024 in flight, acks, cold reads, and opening with many topics.
//! A measurement of its own instead of a statistics framework: what matters is throughput with so many in flight, and
//! that depends on the disk's fsync. `cargo bench -p carillon-hub --bench saver [-- SECONDS]`
#![allow(clippy::print_stdout)] // It is what a measurement is for.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use carillon_hub::saver::{Embedded, Limits, Logs, Metrics, Sessions, Store};
use carillon_proto::{topic, v1};

const PAYLOAD_BYTES: usize = 200;
const MANY_TOPICS: u64 = 100_000;

fn open(path: &Path) -> Arc<Embedded> {
    let metrics = Metrics::register(&prometheus::Registry::new()).expect("metrics");
    Arc::new(Embedded::open(path, "bench", Limits::default(), metrics).expect("the store opens"))
}

fn append(topic: &str, seq: u64) -> v1::Append {
    let message = v1::Message {
        topic: topic.to_owned(),
        payload: vec![b'x'; PAYLOAD_BYTES].into(),
        qos: 1,
        id: format!("{topic}-{seq}"),
        epoch: 1,
        seq,
        ..v1::Message::default()
    };
    let retention = v1::Retention {
        max_age_seconds: 7 * 24 * 3600,
        max_count: 1000,
        max_bytes: 1 << 20,
        consumed: topic::inbox_user(topic).is_some(),
    };
    v1::Append {
        slot: topic::slot_of(topic),
        message: Some(message),
        log: true,
        retention: Some(retention),
        ..v1::Append::default()
    }
}

fn percentile(sorted: &[u64], part: f64) -> f64 {
    sorted.get((sorted.len() as f64 * part) as usize).map_or(0.0, |us| *us as f64 / 1000.0)
}

/// So many tasks, each with one append in flight to a topic of its own.
async fn appends(store: &Arc<Embedded>, in_flight: usize, time: Duration, acked: bool) {
    let end = Instant::now() + time;
    let begun = Instant::now();
    let total = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..in_flight {
        let (store, total) = (store.clone(), total.clone());
        tasks.spawn(async move {
            let topic = format!("demo/u/{acked}-{in_flight}-{number}");
            let mut times = Vec::new();
            for seq in 1.. {
                let begun = Instant::now();
                store.append(vec![append(&topic, seq)]).await.remove(0).expect("appended");
                times.push(begun.elapsed().as_micros() as u64);
                total.fetch_add(1, Ordering::Relaxed);
                if acked {
                    let positions = vec![v1::AckPosition { topic: topic.clone(), seq }];
                    let ack = v1::Ack { session: None, attachment: 0, positions };
                    store.ack(ack).await.expect("acked");
                }
                if Instant::now() >= end {
                    break;
                }
            }
            times
        });
    }
    let mut times = Vec::new();
    while let Some(done) = tasks.join_next().await {
        times.extend(done.expect("a task"));
    }
    times.sort_unstable();
    let rate = total.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    println!(
        "append{} in flight {in_flight:>5}: {rate:>9.0}/s   p50 {:>7.2} ms   p99 {:>7.2} ms",
        if acked { ", then ack," } else { "           " },
        percentile(&times, 0.5),
        percentile(&times, 0.99)
    );
}

async fn many_topics(path: &Path) {
    let store = open(path);
    let begun = Instant::now();
    for chunk in 0..MANY_TOPICS / 1000 {
        let batch =
            (0..1000).map(|number| append(&format!("demo/many/{}", chunk * 1000 + number), 1)).collect();
        assert!(store.append(batch).await.iter().all(Result::is_ok));
    }
    println!("{MANY_TOPICS} topics written in {:.2} s", begun.elapsed().as_secs_f64());
    store.stop().await;
    drop(store);
    let begun = Instant::now();
    let store = open(path);
    println!("store with {MANY_TOPICS} topics opened in {:.2} s", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let reads = 2000;
    for number in 0..reads {
        let topic = format!("demo/many/{}", (number * 7919) % MANY_TOPICS);
        let reply = store.read(v1::Read { topic, ..v1::Read::default() }).await.expect("a read");
        assert_eq!(reply.messages.len(), 1);
    }
    println!("reads of cold topics: {:.3} ms each", begun.elapsed().as_secs_f64() * 1000.0 / reads as f64);
    store.stop().await;
}

fn main() {
    let seconds = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let directory = tempfile::tempdir_in(".").expect("a directory on this disk");
        let store = open(&directory.path().join("appends"));
        for in_flight in [1, 64, 1024] {
            appends(&store, in_flight, time, false).await;
        }
        appends(&store, 1024, time, true).await;
        store.stop().await;
        many_topics(&directory.path().join("topics")).await;
    });
}
