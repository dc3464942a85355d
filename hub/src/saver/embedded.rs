//! The embedded back end: one directory, one process, an LSM tree ([`fjall`]) under it.
//!
//! One thread writes ([`writer`]), with group commit. What it decides from is in memory ([`index`]): where every log
//! stands, but no message. Readers look at that index and then read the disk beside the writer.

mod cursors;
mod directory;
mod disk;
mod index;
mod logs;
mod plan;
mod read;
mod sessions;
mod writer;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use carillon_proto::{now_ms, topic, v1};
use parking_lot::RwLock;
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::directory::Directory;
pub use self::directory::DirectoryError;
use self::disk::{Disk, DiskError};
use self::index::Index;
use self::plan::Pending;
use self::writer::{Op, Writer};
use super::metrics::Metrics;
use super::store::{Logs, MAX_HEADS, Records, Sessions, Store, StoreError, StoreResult, Swept};

/// Limits and times of the embedded back end.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Memory for blocks read from the disk. Default 64 MiB.
    pub cache_bytes: u64,
    /// Operations that may wait for the writer. Default 16,384.
    pub queue: usize,
    /// Bytes of appends that may wait for the writer. Default 64 MiB.
    pub queue_bytes: usize,
    /// How long an operation may wait to be queued. Default 5 s.
    pub queue_timeout: Duration,
    /// Reads of the disk at the same time. Default 32.
    pub readers: usize,
    /// How long acks may stay unwritten. Default 500 ms.
    pub deferred: Duration,
    /// Time between sweeps. Default 5 s.
    pub sweep: Duration,
    /// How long message ids are remembered. Default 24 h.
    pub id_window: Duration,
    /// Free bytes of the file system below which nothing more is accepted. Default 128 MiB.
    pub reserve_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            cache_bytes: 64 << 20,
            queue: 16_384,
            queue_bytes: 64 << 20,
            queue_timeout: Duration::from_secs(5),
            readers: 32,
            deferred: Duration::from_millis(500),
            sweep: Duration::from_secs(5),
            id_window: Duration::from_secs(24 * 3600),
            reserve_bytes: 128 << 20,
        }
    }
}

const READ_DEFAULT: u32 = 100;
const READ_MOST: u32 = 1000;
const READ_BYTES_DEFAULT: u32 = 256 << 10;
const READ_BYTES_MOST: u32 = 4 << 20;
const RETAINED_DEFAULT: u32 = 10_000;
const RECORDS_DEFAULT: u32 = 1_000;

/// The open database and the directory whose lock it is under: dropped in this order.
pub(crate) struct Opened {
    disk: Disk,
    directory: Directory,
}

/// The embedded store.
pub struct Embedded {
    id: String,
    queue: mpsc::Sender<Op>,
    queue_bytes: Arc<Semaphore>,
    readers: Arc<Semaphore>,
    index: Arc<RwLock<Index>>,
    // None once it is stopped.
    opened: RwLock<Option<Arc<Opened>>>,
    limits: Limits,
    metrics: Metrics,
}

impl Embedded {
    /// Opens the store in `root`, or makes one there, for the cluster of this name. Blocks while it reads the index.
    pub fn open(
        root: &Path,
        cluster: &str,
        limits: Limits,
        metrics: Metrics,
    ) -> Result<Self, DirectoryError> {
        let begun = std::time::Instant::now();
        let mut directory = Directory::open(root, cluster)?;
        let path = directory.db();
        // The database asserts what it expects of its files: a panic is how it reports some kinds of damage.
        let loaded = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let disk = Disk::open(&path, limits.cache_bytes)?;
            let index = disk.load()?;
            Ok::<_, DiskError>((disk, index))
        }));
        let corrupt = |detail: String| DirectoryError::Corrupt { path: root.to_owned(), detail };
        let (disk, mut index) = match loaded {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(DiskError::Database(fjall::Error::Locked))) => {
                return Err(DirectoryError::InUse(root.to_owned()));
            }
            Ok(Err(error)) => return Err(corrupt(error.to_string())),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                return Err(corrupt(text.unwrap_or_else(|| "the database cannot be read".to_owned())));
            }
        };
        if directory.is_fresh() {
            directory.made()?;
        }
        let pending = presume_closed(&mut index);
        tracing::info!(
            path = %root.display(),
            topics = index.topics.len(),
            sessions = index.sessions.len(),
            messages = index.messages,
            elapsed_ms = begun.elapsed().as_millis() as u64,
            "opened the saver's store"
        );
        metrics.topics.set(index.topics.len() as i64);
        metrics.sessions.set(index.sessions.len() as i64);
        metrics.log_messages.set(index.messages as i64);
        metrics.log_bytes.set(index.bytes as i64);
        metrics.retained.set(index.retained.len() as i64);
        metrics.writable.set(1);
        let id = directory.id().to_owned();
        let opened = Arc::new(Opened { disk, directory });
        let index = Arc::new(RwLock::new(index));
        let (queue, receiver) = mpsc::channel(limits.queue);
        let writer = Writer {
            opened: opened.clone(),
            index: index.clone(),
            queue: receiver,
            limits: limits.clone(),
            metrics: metrics.clone(),
            deferred_since: (!pending.is_empty()).then(std::time::Instant::now),
            pending,
            broken: None,
            full: None,
            space_checked: None,
            sweeps: 0,
        };
        std::thread::Builder::new().name("saver-writer".to_owned()).spawn(move || writer.run()).map_err(
            |source| DirectoryError::Io { path: root.to_owned(), action: "start the writer for it", source },
        )?;
        Ok(Embedded {
            id,
            queue,
            queue_bytes: Arc::new(Semaphore::new(limits.queue_bytes)),
            readers: Arc::new(Semaphore::new(limits.readers)),
            index,
            opened: RwLock::new(Some(opened)),
            limits,
            metrics,
        })
    }

    /// Which store it is, wherever its directory is moved to.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Was it the cluster's saver, as the keeper said last?
    pub fn is_claimed(&self) -> bool {
        self.opened.read().as_ref().is_some_and(|opened| opened.directory.is_claimed())
    }

    /// The keeper has said whether it is. Durable when this returns.
    pub async fn set_claimed(&self, claimed: bool) -> Result<(), DirectoryError> {
        let Some(opened) = self.opened.read().clone().filter(|one| one.directory.is_claimed() != claimed)
        else {
            return Ok(());
        };
        let root = opened.directory.root().to_owned();
        let written = tokio::task::spawn_blocking(move || opened.directory.set_claimed(claimed)).await;
        written.unwrap_or_else(|error| {
            let source = std::io::Error::other(error);
            Err(DirectoryError::Io { path: root, action: "write marker.json", source })
        })
    }

    async fn enqueue(&self, operation: Op) -> StoreResult<()> {
        match self.queue.send_timeout(operation, self.limits.queue_timeout).await {
            Ok(()) => {
                self.metrics.queue.inc();
                Ok(())
            }
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(overloaded()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(stopped()),
        }
    }

    /// Has the writer carry out one operation.
    async fn write<T>(
        &self,
        operation: impl FnOnce(oneshot::Sender<StoreResult<T>>) -> Op,
    ) -> StoreResult<T> {
        let (reply, answer) = oneshot::channel();
        self.enqueue(operation(reply)).await?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Reads the disk on a thread that may block.
    async fn read_disk<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Disk) -> Result<T, DiskError> + Send + 'static,
    ) -> StoreResult<T> {
        let permit = tokio::time::timeout(self.limits.queue_timeout, self.readers.clone().acquire_owned())
            .await
            .map_err(|_| overloaded())?
            .map_err(|_| stopped())?;
        let opened = self.opened.read().clone().ok_or_else(stopped)?;
        let result = tokio::task::spawn_blocking(move || {
            let result = read(&opened.disk);
            drop(opened);
            drop(permit);
            result
        });
        Ok(result
            .await
            .map_err(|error| StoreError::Unavailable(format!("a read was cut short: {error}")))??)
    }
}

fn overloaded() -> StoreError {
    StoreError::Unavailable("the saver is overloaded: too much is waiting for the disk".to_owned())
}

fn stopped() -> StoreError {
    StoreError::Unavailable("the saver's store has been stopped".to_owned())
}

/// Sessions that were open when the store last ended count as closed from now on, until their gateway shows that it is
/// still there. Gives what is to be written of that.
fn presume_closed(index: &mut Index) -> Pending {
    let mut pending = Pending::default();
    let open: Vec<_> =
        index.sessions.iter().filter(|(_, session)| session.open).map(|(&session, _)| session).collect();
    let now_ms = now_ms();
    for id in open {
        index.change_session(id, |session| {
            session.open = false;
            session.presumed_closed = true;
            session.closed_ms = now_ms;
        });
        pending.sessions.insert(id);
    }
    pending
}

#[async_trait]
impl Logs for Embedded {
    async fn append(&self, batch: Vec<v1::Append>) -> Vec<StoreResult<v1::Appended>> {
        let count = batch.len();
        let bytes: usize = batch.iter().map(|append| append.encoded_len() + 64).sum();
        // One batch larger than the whole allowance takes all of it.
        let bytes = bytes.min(self.limits.queue_bytes) as u32;
        let admitted = self.queue_bytes.clone().acquire_many_owned(bytes);
        let permit = match tokio::time::timeout(self.limits.queue_timeout, admitted).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return vec![Err(stopped()); count],
            Err(_) => return vec![Err(overloaded()); count],
        };
        let (reply, answer) = oneshot::channel();
        if let Err(error) = self.enqueue(Op::Append(batch, permit, reply)).await {
            return vec![Err(error); count];
        }
        answer.await.unwrap_or_else(|_| vec![Err(stopped()); count])
    }

    async fn fence(&self, slot: u32, epoch: u64) -> StoreResult<()> {
        self.write(|reply| Op::Fence(slot, epoch, reply)).await
    }

    async fn heads(&self, topics: Vec<String>) -> StoreResult<Vec<v1::Head>> {
        if topics.len() > MAX_HEADS {
            return Err(StoreError::Invalid(format!("more than {MAX_HEADS} heads at once")));
        }
        let index = self.index.read();
        let head = |topic: &String| v1::Head {
            retained: index.retained.contains_key(topic.as_str()),
            ..index.topic(topic).map(|id| index.at(id).head()).unwrap_or_default()
        };
        Ok(topics.iter().map(head).collect())
    }

    async fn read(&self, read: v1::Read) -> StoreResult<v1::ReadReply> {
        let v1::Read { topic, after, limit, max_bytes } = read;
        topic::check_name(&topic).map_err(|error| StoreError::Invalid(format!("topic {topic:?} {error}")))?;
        let found = {
            let index = self.index.read();
            index.topic(&topic).map(|id| (id, index.at(id).head()))
        };
        self.metrics.reads.inc();
        let Some((id, head)) = found else {
            return Ok(v1::ReadReply { messages: Vec::new(), head: Some(v1::Head::default()), next: after });
        };
        if after >= head.seq || head.trimmed >= head.seq {
            return Ok(v1::ReadReply { messages: Vec::new(), head: Some(head), next: after.max(head.seq) });
        }
        let limit = if limit == 0 { READ_DEFAULT } else { limit.min(READ_MOST) } as usize;
        let max_bytes = if max_bytes == 0 { READ_BYTES_DEFAULT } else { max_bytes.min(READ_BYTES_MOST) };
        let reply = self
            .read_disk(move |disk| read::log(disk, id, &topic, after, head, limit, max_bytes as usize))
            .await?;
        self.metrics.read_messages.inc_by(reply.messages.len() as u64);
        Ok(reply)
    }

    async fn retained(&self, filter: String, limit: u32) -> StoreResult<Vec<v1::Message>> {
        sessions::check_filter(&filter)?;
        let limit = if limit == 0 { RETAINED_DEFAULT } else { limit } as usize;
        let now_ms = now_ms();
        let names: Vec<Arc<str>> = {
            let index = self.index.read();
            let live = index::matching(&index.retained, &filter)
                .filter(|&(_, &expires_ms)| expires_ms == 0 || expires_ms > now_ms);
            live.take(limit).map(|(name, _)| name.clone()).collect()
        };
        if names.is_empty() {
            return Ok(Vec::new());
        }
        self.read_disk(move |disk| read::retained(disk, &filter, names)).await
    }
}

#[async_trait]
impl Sessions for Embedded {
    async fn open_session(&self, open: v1::OpenSession) -> StoreResult<v1::SessionOpened> {
        self.write(|reply| Op::OpenSession(open, reply)).await
    }

    fn may_be_kept(&self, session: &v1::SessionRef) -> bool {
        sessions::name_of(Some(session))
            .is_ok_and(|name| self.index.read().session_ids.contains_key(name.as_str()))
    }

    async fn subscribe(&self, subscribe: v1::Subscribe) -> StoreResult<Vec<v1::SubscribedOne>> {
        if subscribe.session.is_some() {
            return self.write(|reply| Op::Subscribe(subscribe, reply)).await;
        }
        let index = self.index.read();
        let mut results = Vec::with_capacity(subscribe.subscriptions.len());
        for v1::Subscription { filter, .. } in subscribe.subscriptions {
            sessions::check_filter(&filter)?;
            let mut positions = Vec::new();
            if !topic::is_wildcard(&filter) {
                let (after, head) = index.topic(&filter).map_or((0, 0), |id| {
                    let head = index.at(id).head();
                    let inbox = sessions::is_inbox(&filter);
                    (if inbox { head.trimmed } else { head.seq }, head.seq)
                });
                positions.push(v1::Backlog { topic: filter, after, sent: 0, head });
            }
            results.push(v1::SubscribedOne { existed: false, positions });
        }
        Ok(results)
    }

    async fn unsubscribe(&self, unsubscribe: v1::Unsubscribe) -> StoreResult<()> {
        self.write(|reply| Op::Unsubscribe(unsubscribe, reply)).await
    }

    async fn ack(&self, ack: v1::Ack) -> StoreResult<()> {
        self.write(|reply| Op::Ack(ack, reply)).await
    }

    async fn close_session(&self, close: v1::CloseSession) -> StoreResult<()> {
        self.write(|reply| Op::CloseSession(close, reply)).await
    }

    async fn close_attached(&self, gateway: String, below: u64) -> StoreResult<u64> {
        self.write(|reply| Op::CloseAttached(gateway, below, reply)).await
    }
}

#[async_trait]
impl Records for Embedded {
    async fn put_record(&self, record: v1::PutRecord) -> StoreResult<()> {
        self.write(|reply| Op::PutRecord(record, reply)).await
    }

    async fn get_record(&self, kind: String, key: String) -> StoreResult<Option<v1::Record>> {
        writer::check_record_key(&kind, &key)?;
        self.read_disk(move |disk| read::record(disk, &kind, key)).await
    }

    async fn list_records(&self, list: v1::ListRecords) -> StoreResult<Vec<v1::Record>> {
        let v1::ListRecords { kind, prefix, limit } = list;
        writer::check_record_key(&kind, &prefix)?;
        let limit = if limit == 0 { RECORDS_DEFAULT } else { limit } as usize;
        self.read_disk(move |disk| read::records(disk, &kind, &prefix, limit)).await
    }
}

#[async_trait]
impl Store for Embedded {
    async fn sweep(&self, now_ms: u64) -> StoreResult<Swept> {
        self.write(|reply| Op::Sweep(now_ms, reply)).await
    }

    async fn stop(&self) {
        let (reply, answer) = oneshot::channel();
        if self.enqueue(Op::Stop(reply)).await.is_ok() {
            let _ = answer.await;
        }
        // Reads that are under way hold the database open.
        let readers = self.readers.acquire_many(self.limits.readers as u32).await;
        self.readers.close();
        drop(readers);
        let opened = self.opened.write().take();
        // Its own threads are waited for.
        let _ = tokio::task::spawn_blocking(move || drop(opened)).await;
    }
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path: Option<PathBuf> =
            self.opened.read().as_ref().map(|opened| opened.directory.root().to_owned());
        f.debug_struct("Embedded").field("path", &path).finish_non_exhaustive()
    }
}
