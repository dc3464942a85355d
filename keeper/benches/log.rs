//! Appends that are on the disk when they are answered: the keeper's log, and redb doing the same, in the same run on the
//! same disk. By one caller that waits for each, and by 64 at once, whose entries go to the disk together in both.
//! `cargo bench -p carillon-keeper --bench log`

#![allow(missing_docs)] // made by criterion's macros

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use carillon_keeper::bench::Log;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use redb::{Database, TableDefinition};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, mpsc, oneshot};

/// Both give up what is older, from time to time, as after a snapshot.
const KEPT: u64 = 20_000;
const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");

/// One entry, on the disk.
trait Append: Clone + Send + 'static {
    fn append(&self, value: Bytes) -> impl Future<Output = ()> + Send;
}

#[derive(Clone)]
struct Ours(Arc<Mutex<(Log, u64)>>);

impl Append for Ours {
    async fn append(&self, value: Bytes) {
        let told = {
            let (log, appended) = &mut *self.0.lock().await;
            *appended += 1;
            if appended.is_multiple_of(KEPT) {
                log.keep(KEPT).await.expect("the log takes it");
            }
            log.append(value).await.expect("the log takes it")
        };
        told.await.expect("it is on the disk");
    }
}

type Asked = (Bytes, oneshot::Sender<()>);

/// A thread that writes; what comes meanwhile goes with the next transaction.
#[derive(Clone)]
struct Redb(mpsc::Sender<Asked>);

impl Redb {
    fn open(path: &Path) -> Redb {
        let database = Database::create(path).expect("a database");
        let (sender, receiver) = mpsc::channel(1024);
        std::thread::spawn(move || Redb::run(&database, receiver));
        Redb(sender)
    }

    fn run(database: &Database, mut asked: mpsc::Receiver<Asked>) {
        let mut next = 0;
        let mut group: Vec<Asked> = Vec::new();
        while asked.blocking_recv_many(&mut group, 1024) > 0 {
            let transaction = database.begin_write().expect("a transaction");
            {
                let mut table = transaction.open_table(TABLE).expect("a table");
                for (value, _) in &group {
                    table.insert(next, value.as_ref()).expect("inserted");
                    next += 1;
                    if next % KEPT == 0 {
                        table.retain_in(..next.saturating_sub(KEPT), |_, _| false).expect("deleted");
                    }
                }
            }
            // Durable by default: it is on the disk after this.
            transaction.commit().expect("committed");
            for (_, told) in group.drain(..) {
                let _ = told.send(());
            }
        }
    }
}

impl Append for Redb {
    async fn append(&self, value: Bytes) {
        let (sender, told) = oneshot::channel();
        self.0.send((value, sender)).await.expect("the thread runs");
        told.await.expect("it is on the disk");
    }
}

/// So many appends by so many callers, each of which waits for its own.
async fn appends(log: &impl Append, callers: u64, count: u64, value: &Bytes) -> Duration {
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for caller in 0..callers.min(count) {
        let (log, value) = (log.clone(), value.clone());
        let own = count / callers + u64::from(caller < count % callers);
        tasks.spawn(async move {
            for _ in 0..own {
                log.append(value.clone()).await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no panic");
    }
    begun.elapsed()
}

fn appending(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    // Not in /tmp, which may be memory.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    for bytes in [256, 4096] {
        let value = Bytes::from(vec![b'x'; bytes]);
        let path = |name: &str| directory.path().join(format!("{name}-{bytes}"));
        let entered = runtime.enter();
        let ours = Ours(Arc::new(Mutex::new((Log::open(&path("log")).expect("a log"), 0))));
        let redb = Redb::open(&path("redb"));
        drop(entered);
        for callers in [1, 64] {
            let mut group = criterion.benchmark_group(format!("append {bytes} B, {callers} waiting"));
            group.throughput(Throughput::Elements(1)).sample_size(10);
            group.bench_function("raft-log", |bencher| {
                bencher.iter_custom(|count| runtime.block_on(appends(&ours, callers, count, &value)));
            });
            group.bench_function("redb", |bencher| {
                bencher.iter_custom(|count| runtime.block_on(appends(&redb, callers, count, &value)));
            });
            group.finish();
        }
    }
}

criterion_group!(benches, appending);
criterion_main!(benches);
