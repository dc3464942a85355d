//! The one thread that writes: takes every operation that is waiting, plans them, commits them as one batch with one
//! fsync, and then answers them all.
//!
//! Acks and sweeps do not ask for a commit of their own. What they change goes along with the next one, or is written
//! without an fsync after [`super::Limits::deferred`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use carillon_proto::{now_ms, v1};
use parking_lot::RwLock;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::disk::{self, DiskError};
use super::index::Index;
use super::plan::{DELETE_MESSAGES, Pending, Planner};
use super::{Limits, Opened};
use crate::saver::metrics::Metrics;
use crate::saver::store::{MAX_RECORD_BYTES, MAX_RECORD_KEY_BYTES, StoreError, StoreResult, Swept};

type Reply<T> = oneshot::Sender<StoreResult<T>>;

/// What the writer is asked for.
pub enum Op {
    /// With the permit for its bytes.
    Append(Vec<v1::Append>, OwnedSemaphorePermit, oneshot::Sender<Vec<StoreResult<v1::Appended>>>),
    Fence(u32, u64, Reply<()>),
    OpenSession(v1::OpenSession, Reply<v1::SessionOpened>),
    Subscribe(v1::Subscribe, Reply<Vec<v1::SubscribedOne>>),
    Unsubscribe(v1::Unsubscribe, Reply<()>),
    Ack(v1::Ack, Reply<()>),
    CloseSession(v1::CloseSession, Reply<()>),
    CloseAttached(String, u64, Reply<u64>),
    PutRecord(v1::PutRecord, Reply<()>),
    Sweep(u64, Reply<Swept>),
    Stop(oneshot::Sender<()>),
}

/// Gives an answer, once it is known whether the commit succeeded.
type Answer = Box<dyn FnOnce(&StoreResult<()>) + Send>;

/// Operations of one round at most.
const ROUND_OPERATIONS: usize = 4096;
/// Deferred changes that are written at once, however young.
const DEFERRED_CHANGES: usize = 50_000;
/// Logs from which trimmed messages are deleted with one commit.
const DELETE_LOGS: usize = 4096;
/// Sessions and message ids that one sweep forgets at most.
const SWEEP_ENTRIES: usize = 5_000;
const SPACE_CHECK: Duration = Duration::from_secs(1);
/// Records are swept once in so many sweeps.
const RECORD_SWEEPS: u32 = 12;

pub struct Writer {
    pub opened: Arc<Opened>,
    pub index: Arc<RwLock<Index>>,
    pub queue: mpsc::Receiver<Op>,
    pub limits: Limits,
    pub metrics: Metrics,
    pub pending: Pending,
    pub deferred_since: Option<Instant>,
    pub broken: Option<String>,
    pub full: Option<String>,
    pub space_checked: Option<Instant>,
    pub sweeps: u32,
}

fn answer<T: Send + 'static>(reply: Reply<T>, result: StoreResult<T>) -> Answer {
    Box::new(move |committed| {
        let _ = reply.send(result.and_then(|value| committed.clone().map(|()| value)));
    })
}

impl Writer {
    /// Runs until it is stopped or all handles are gone.
    pub fn run(mut self) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the saver's writer cannot start");
                return;
            }
        };
        let mut operations = Vec::new();
        let mut next_sweep = Instant::now() + self.limits.sweep;
        loop {
            let deferred = self.deferred_since.map(|since| since + self.limits.deferred);
            let deadline = deferred.map_or(next_sweep, |at| at.min(next_sweep));
            let received = runtime.block_on(async {
                let receive = self.queue.recv_many(&mut operations, ROUND_OPERATIONS);
                tokio::time::timeout_at(deadline.into(), receive).await
            });
            if received == Ok(0) {
                break;
            }
            self.metrics.queue.sub(operations.len() as i64);
            let stopped = self.round(&mut operations);
            if Instant::now() >= next_sweep {
                if let Err(error) = self.sweep(now_ms()) {
                    tracing::warn!(%error, "cannot sweep the saver's store");
                }
                next_sweep = Instant::now() + self.limits.sweep;
            }
            let due = self.deferred_since.is_some_and(|since| since.elapsed() >= self.limits.deferred);
            if due || self.pending.len() > DEFERRED_CHANGES {
                let _ = self.commit(false);
            }
            if let Some(stopped) = stopped {
                self.finish();
                drop(self);
                let _ = stopped.send(());
                return;
            }
        }
        self.finish();
    }

    /// The last commit.
    fn finish(&mut self) {
        if self.commit(true).is_ok() && self.broken.is_none() {
            // Deferred commits may not have been synced.
            if let Err(error) = self.opened.disk.database.persist(fjall::PersistMode::SyncAll) {
                tracing::error!(%error, "cannot sync the saver's store at its end");
            }
        }
    }

    /// Plans the operations, commits if one asks for it, answers.
    fn round(&mut self, operations: &mut Vec<Op>) -> Option<oneshot::Sender<()>> {
        if operations.is_empty() {
            return None;
        }
        self.check_space();
        let mut answers: Vec<Answer> = Vec::with_capacity(operations.len());
        let mut durable = false;
        let mut stopped = None;
        let mut sweeps = Vec::new();
        for operation in operations.drain(..) {
            match operation {
                Op::Stop(reply) => stopped = Some(reply),
                Op::Ack(ack, reply) => {
                    let result = self.plan(false, |planner| planner.ack(ack));
                    let _ = reply.send(result);
                }
                Op::Sweep(now_ms, reply) => sweeps.push((now_ms, reply)),
                other => {
                    durable = true;
                    answers.push(self.plan_durable(other));
                }
            }
        }
        let committed = if durable { self.commit(true) } else { Ok(()) };
        for answer in answers {
            answer(&committed);
        }
        // Not before: a sweep commits without an fsync.
        for (now_ms, reply) in sweeps {
            let _ = reply.send(self.sweep(now_ms));
        }
        if !self.pending.is_empty() && self.deferred_since.is_none() {
            self.deferred_since = Some(Instant::now());
        }
        stopped
    }

    fn plan_durable(&mut self, operation: Op) -> Answer {
        match operation {
            Op::Append(batch, permit, reply) => {
                // The lock is taken for each: readers are to wait for one, not for a thousand.
                let results: Vec<_> = batch
                    .into_iter()
                    .map(|append| self.plan(true, |planner| planner.append(append)))
                    .collect();
                let metrics = self.metrics.clone();
                Box::new(move |committed| {
                    drop(permit);
                    let settle = |result: StoreResult<v1::Appended>| {
                        result.and_then(|appended| committed.clone().map(|()| appended))
                    };
                    let results: Vec<_> = results.into_iter().map(settle).collect();
                    count_appends(&metrics, &results);
                    let _ = reply.send(results);
                })
            }
            Op::Fence(slot, epoch, reply) => {
                answer(reply, self.plan(false, |planner| planner.fence(slot, epoch)))
            }
            Op::OpenSession(open, reply) => {
                answer(reply, self.plan(true, |planner| planner.open_session(open)))
            }
            Op::Subscribe(subscribe, reply) => {
                answer(reply, self.plan(true, |planner| planner.subscribe(subscribe)))
            }
            Op::Unsubscribe(unsubscribe, reply) => {
                answer(reply, self.plan(false, |planner| planner.unsubscribe(unsubscribe)))
            }
            Op::CloseSession(close, reply) => {
                answer(reply, self.plan(false, |planner| planner.close_session(close)))
            }
            Op::CloseAttached(gateway, below, reply) => {
                answer(reply, self.plan(false, |planner| Ok(planner.close_attached(&gateway, below))))
            }
            Op::PutRecord(record, reply) => {
                answer(reply, self.plan(true, |planner| planner.put_record(record)))
            }
            // Handled by the caller.
            Op::Ack(..) | Op::Sweep(..) | Op::Stop(_) => Box::new(|_| ()),
        }
    }

    /// Runs one operation, unless nothing can be written; with `grows`, unless the disk is full.
    fn plan<T>(
        &mut self,
        grows: bool,
        operation: impl FnOnce(&mut Planner) -> StoreResult<T>,
    ) -> StoreResult<T> {
        let refusal = self.broken.as_ref().or(if grows { self.full.as_ref() } else { None });
        if let Some(refusal) = refusal {
            return Err(StoreError::Unavailable(refusal.clone()));
        }
        let mut index = self.index.write();
        operation(&mut Planner {
            index: &mut index,
            pending: &mut self.pending,
            disk: &self.opened.disk,
            metrics: &self.metrics,
            now_ms: now_ms(),
            id_window_ms: self.limits.id_window.as_millis() as u64,
        })
    }

    fn commit(&mut self, durable: bool) -> StoreResult<()> {
        if let Some(broken) = &self.broken {
            return Err(StoreError::Unavailable(broken.clone()));
        }
        self.delete_trimmed();
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        self.deferred_since = None;
        let appends = pending.appends;
        let begun = Instant::now();
        let committed = pending.commit(&self.index.read(), &self.opened.disk, durable);
        match committed {
            Ok(topics) => {
                self.metrics.commits.with_label_values(&[if durable { "durable" } else { "deferred" }]).inc();
                if durable {
                    self.metrics.commit_seconds.observe(begun.elapsed().as_secs_f64());
                    self.metrics.commit_appends.observe(appends as f64);
                }
                let mut index = self.index.write();
                for topic in topics {
                    let topic = index.at_mut(topic);
                    topic.committed = (topic.epoch, topic.seq);
                }
                self.metrics.topics.set(index.topics.len() as i64);
                self.metrics.sessions.set(index.sessions.len() as i64);
                self.metrics.log_messages.set(index.messages as i64);
                self.metrics.log_bytes.set(index.bytes as i64);
                self.metrics.retained.set(index.retained.len() as i64);
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, path = %self.opened.directory.root().display(),
                    "a write to the saver's store failed: nothing is accepted until it is opened again");
                let text = format!("a write to the store failed, it has to be opened again: {error}");
                self.broken = Some(text.clone());
                self.metrics.writable.set(0);
                Err(StoreError::Unavailable(text))
            }
        }
    }

    fn delete_trimmed(&mut self) {
        let topics: Vec<_> = self.index.read().undeleted.iter().copied().take(DELETE_LOGS).collect();
        let mut left = DELETE_MESSAGES;
        for topic in topics {
            let before = self.pending.log_deleted.len();
            let result = self.plan(false, |planner| Ok(planner.delete_trimmed(topic, left)?));
            if let Err(error) = result {
                tracing::warn!(%error, "cannot delete trimmed messages");
                return;
            }
            left = left.saturating_sub(self.pending.log_deleted.len() - before);
            if left == 0 {
                return;
            }
        }
    }

    fn sweep(&mut self, now_ms: u64) -> StoreResult<Swept> {
        self.sweeps = self.sweeps.wrapping_add(1);
        let messages = self.plan(false, |planner| Ok(planner.trim_aged(now_ms, DELETE_MESSAGES)?))?;
        let sessions = self.plan(false, |planner| planner.forget_expired(now_ms, SWEEP_ENTRIES))?;
        let ids = self.plan(false, |planner| Ok(planner.forget_ids(now_ms, SWEEP_ENTRIES)?))?;
        self.plan(false, |planner| {
            planner.forget_retained(now_ms, SWEEP_ENTRIES);
            Ok(())
        })?;
        if self.sweeps % RECORD_SWEEPS == 1 {
            self.plan(false, |planner| Ok(planner.forget_records(now_ms, SWEEP_ENTRIES)?))?;
        }
        // What was read from the disk is only to be looked at again once it is deleted there.
        self.commit(false)?;
        Ok(Swept { messages, sessions, ids })
    }

    /// Refuses what grows while there is less room than the reserve: a database on a disk that is full cannot even be
    /// trimmed.
    fn check_space(&mut self) {
        if self.space_checked.is_some_and(|at| at.elapsed() < SPACE_CHECK) || self.broken.is_some() {
            return;
        }
        self.space_checked = Some(Instant::now());
        match fs4::available_space(self.opened.directory.root()) {
            Ok(available) if available < self.limits.reserve_bytes => {
                if self.full.is_none() {
                    tracing::error!(
                        available,
                        reserve = self.limits.reserve_bytes,
                        "the saver's disk is full"
                    );
                }
                let reserve = self.limits.reserve_bytes;
                self.full = Some(format!(
                    "the disk is full: {available} bytes are left, {reserve} are kept in reserve"
                ));
                self.metrics.writable.set(0);
            }
            Ok(available) => {
                if self.full.take().is_some() {
                    tracing::info!(available, "the saver's disk has room again");
                }
                self.metrics.writable.set(1);
            }
            Err(error) => tracing::warn!(%error, "cannot tell how much room the saver's disk has"),
        }
    }
}

fn count_appends(metrics: &Metrics, results: &[StoreResult<v1::Appended>]) {
    for result in results {
        let label = match result {
            Ok(appended) if appended.duplicate => "duplicate",
            Ok(_) => "appended",
            Err(StoreError::Fenced { .. }) => "fenced",
            Err(StoreError::Unavailable(_)) => "unavailable",
            Err(_) => "invalid",
        };
        metrics.appends.with_label_values(&[label]).inc();
    }
}

impl Planner<'_> {
    fn put_record(&mut self, record: v1::PutRecord) -> StoreResult<()> {
        let v1::PutRecord { kind, key, value, expires_ms, session, attachment } = record;
        check_record_key(&kind, &key)?;
        if value.len() > MAX_RECORD_BYTES {
            return Err(StoreError::Invalid(format!("a record is larger than {MAX_RECORD_BYTES} bytes")));
        }
        if session.is_some() {
            self.attached(session.as_ref(), attachment)?;
        }
        let mut bytes = None;
        // One that is expired already is how a record is removed.
        if expires_ms == 0 || expires_ms > self.now_ms {
            let encoded = bytes.insert(Vec::with_capacity(value.len() + 8));
            encoded.extend_from_slice(&expires_ms.to_be_bytes());
            encoded.extend_from_slice(&value);
        }
        self.pending.records.insert(disk::record_key(&kind, &key), bytes);
        Ok(())
    }

    fn forget_retained(&mut self, now_ms: u64, most: usize) {
        let expired = |(_, expires): &(&Arc<str>, &u64)| **expires != 0 && **expires <= now_ms;
        let names: Vec<Arc<str>> =
            self.index.retained.iter().filter(expired).map(|(name, _)| name.clone()).take(most).collect();
        for name in names {
            self.index.retained.remove(&name);
            self.pending.retained.insert(name, None);
        }
    }

    fn forget_records(&mut self, now_ms: u64, most: usize) -> Result<(), DiskError> {
        for guard in self.disk.meta.prefix(b"r").take(most) {
            let (key, value) = guard.into_inner()?;
            if disk::number(&value, 0).is_some_and(|expires| expires != 0 && expires <= now_ms) {
                self.pending.records.entry(key.to_vec()).or_insert(None);
            }
        }
        Ok(())
    }
}

/// Kinds and keys are short, and hold no NUL.
pub fn check_record_key(kind: &str, key: &str) -> StoreResult<()> {
    if kind.is_empty() || kind.len() > MAX_RECORD_KEY_BYTES || key.len() > MAX_RECORD_KEY_BYTES {
        return Err(StoreError::Invalid("a record's kind or key is empty or too long".to_owned()));
    }
    if kind.contains('\0') || key.contains('\0') {
        return Err(StoreError::Invalid("a record's kind or key contains a NUL".to_owned()));
    }
    Ok(())
}
