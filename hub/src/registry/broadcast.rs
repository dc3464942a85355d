//! Broadcast jobs: one message to everyone in an app, spread by the gateways at a shared-out rate.
//!
//! A job lives in the memory of its topic's owner; a durable record says that it exists and how it ended. A record
//! that says "running" of a job that its owner does not know is of a job whose owner was lost: it is INTERRUPTED.

mod job;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::app::App;
use carillon_proto::v1::{self, PublishCode, attach_down, broadcast_job, saver_reply, saver_request};
use carillon_proto::{now_ms, topic};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::oneshot;
use tonic::Status;

use self::job::{Job, Told};
use super::attach::Attachments;
use super::core::{Publish, Receiver};
use super::metrics::Metrics;
use super::worker::{To, Workers};
use crate::peers::{Directory, PeerError};

/// Kind of the durable records; their key is "{app}/{id}", their value a `BroadcastJob`.
const RECORD: &str = "broadcast";
/// How long a job can be asked for after its end.
const KEEP_MS: u64 = 24 * 3600 * 1000;
/// How long the record of a job lives that has not ended.
const KEEP_ACTIVE_MS: u64 = 30 * KEEP_MS;
/// Jobs in memory; past it no more are started.
const MAX_JOBS: usize = 10_000;
/// From the start of a job to its acceptance.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_ID_BYTES: usize = 128;

/// All jobs of this instance, by "{app}/{id}".
pub struct Jobs {
    directory: Directory,
    attachments: Arc<Attachments>,
    metrics: Metrics,
    jobs: Mutex<HashMap<Arc<str>, Job>>,
    /// Starts of jobs are rare and one at a time, so that an id is started once.
    starting: tokio::sync::Mutex<()>,
}

impl Jobs {
    pub fn new(directory: Directory, attachments: Arc<Attachments>, metrics: Metrics) -> Self {
        Jobs {
            directory,
            attachments,
            metrics,
            jobs: Mutex::new(HashMap::new()),
            starting: tokio::sync::Mutex::new(()),
        }
    }

    /// Publishes the message and begins to have it spread. An id that was started before gives that job again.
    pub async fn start(
        &self,
        workers: &Workers,
        app: &App,
        request: v1::StartBroadcastRequest,
    ) -> Result<v1::BroadcastJob, Status> {
        let mut message = request.message.ok_or_else(|| Status::invalid_argument("message is not set"))?;
        let name = topic::app_of(&message.topic).to_owned();
        topic::check_app(&name)
            .map_err(|error| Status::invalid_argument(format!("message.topic: the app {error}")))?;
        if message.topic != topic::everyone(&name) {
            return Err(Status::invalid_argument(format!("message.topic is not {}", topic::everyone(&name))));
        }
        if message.id.is_empty() {
            message.id = uuid::Uuid::now_v7().to_string();
        }
        if message.id.len() > MAX_ID_BYTES {
            return Err(Status::invalid_argument(format!("message.id is longer than {MAX_ID_BYTES} bytes")));
        }
        let rate = match request.rate_per_second {
            rate if !rate.is_finite() || rate < 0.0 => {
                return Err(Status::invalid_argument("rate_per_second must be 0 or more"));
            }
            0.0 => app.limits.broadcast_rate_per_second,
            rate => rate,
        };
        let key: Arc<str> = format!("{name}/{}", message.id).into();
        let _one_at_a_time = self.starting.lock().await;
        if let Some(job) = self.find(&key).await? {
            return Ok(job);
        }
        {
            let mut jobs = self.jobs.lock();
            if jobs.len() >= MAX_JOBS {
                return Err(Status::resource_exhausted(format!(
                    "there are {MAX_JOBS} broadcast jobs already"
                )));
            }
            // It is there before its message is, so that no progress is missed.
            jobs.insert(key.clone(), Job::new(&message.id, &message.topic, rate, now_ms()));
        }
        match self.publish(workers, message, request.store, &key).await {
            Ok((published, targets)) => {
                let gateways: Vec<_> = targets
                    .into_iter()
                    .filter_map(|receiver| Some((self.attachments.instance(receiver)?, receiver)))
                    .collect();
                self.with(&key, |job| {
                    let told = job.published(published.epoch, published.seq, &gateways, now_ms());
                    if published.duplicate {
                        job.interrupt(now_ms());
                    }
                    told
                });
            }
            Err(status) => {
                self.jobs.lock().remove(&key);
                return Err(status);
            }
        }
        self.write(&key).await;
        let jobs = self.jobs.lock();
        jobs.get(&key).map(Job::view).ok_or_else(|| Status::aborted("the slot has moved to another owner"))
    }

    async fn publish(
        &self,
        workers: &Workers,
        message: v1::Message,
        store: Option<bool>,
        key: &Arc<str>,
    ) -> Result<(v1::Published, Vec<Receiver>), Status> {
        let (sender, answer) = oneshot::channel();
        let publish = Publish { token: 0, message, store, idempotent: true, broadcast: Some(key.clone()) };
        workers.publish(publish, To::One(sender));
        let (published, targets) = tokio::time::timeout(START_TIMEOUT, answer)
            .await
            .map_err(|_| Status::unavailable("the message was not accepted in time"))?
            .map_err(|_| Status::unavailable("the registry is being stopped"))?;
        let text = published.text.clone();
        match published.code() {
            PublishCode::Accepted => Ok((published, targets)),
            PublishCode::NotOwner => Err(Status::aborted(text)),
            PublishCode::StoreUnavailable => Err(Status::unavailable(text)),
            PublishCode::Overloaded => Err(Status::resource_exhausted(text)),
            PublishCode::Refused | PublishCode::Unspecified => Err(Status::invalid_argument(text)),
        }
    }

    pub async fn get(&self, app: &str, id: &str) -> Result<v1::BroadcastJob, Status> {
        let key = format!("{app}/{id}");
        self.find(&key).await?.ok_or_else(|| Status::not_found(format!("app {app} has no broadcast {id:?}")))
    }

    pub async fn control(
        &self,
        app: &str,
        id: &str,
        state: v1::broadcast_control::State,
    ) -> Result<v1::BroadcastJob, Status> {
        let key = format!("{app}/{id}");
        let controlled = self.with_result(&key, |job| job.control(state, now_ms()));
        match controlled {
            Some(Ok(())) => {
                self.write(&key).await;
                self.get(app, id).await
            }
            Some(Err(error)) => Err(Status::failed_precondition(error.to_string())),
            None => {
                let job = self.get(app, id).await?;
                Err(Status::failed_precondition(format!(
                    "the job has ended: it is {}",
                    job.state().as_str_name()
                )))
            }
        }
    }

    pub fn progress(&self, receiver: Receiver, instance: &Arc<str>, progress: &v1::BroadcastProgress) {
        self.with(&progress.job, |job| job.progress(receiver, instance, progress, now_ms()));
    }

    pub fn attached(&self, receiver: Receiver, instance: &Arc<str>) {
        self.with_each_active(|job| job.attached(receiver, instance, now_ms()));
    }

    pub fn detached(&self, receiver: Receiver) {
        self.with_each_active(|job| job.detached(receiver, now_ms()));
    }

    /// Writes what has changed and forgets what ended long ago, or belongs to another owner now.
    pub async fn tend(&self, owns: impl Fn(&str) -> bool) {
        let forget_before = now_ms().saturating_sub(KEEP_MS);
        let dirty: Vec<Arc<str>> = {
            let mut jobs = self.jobs.lock();
            jobs.retain(|_, job| owns(job.topic()) && !job.ended_before(forget_before));
            self.metrics.broadcasts.set(jobs.values().filter(|job| job.is_active()).count() as i64);
            jobs.iter()
                .filter(|(_, job)| job.dirty && job.view().seq > 0)
                .map(|(key, _)| key.clone())
                .collect()
        };
        for key in dirty {
            self.write(&key).await;
        }
    }

    /// The owner stops: nobody looks after its jobs any more. Their gateways are not told.
    pub fn interrupt_all(&self) {
        for job in self.jobs.lock().values_mut().filter(|job| job.is_active()) {
            job.interrupt(now_ms());
        }
    }

    /// In memory, or else by its record.
    async fn find(&self, key: &str) -> Result<Option<v1::BroadcastJob>, Status> {
        if let Some(job) = self.jobs.lock().get(key) {
            return Ok(Some(job.view()));
        }
        let get = v1::GetRecord { kind: RECORD.to_owned(), key: key.to_owned() };
        let records = match self.directory.ask_saver(saver_request::Op::GetRecord(get)).await {
            Ok(saver_reply::Result::Records(records)) => records.records,
            Ok(_) => return Err(Status::unavailable(PeerError::UnexpectedAnswer.to_string())),
            Err(error) => return Err(Status::unavailable(error.to_string())),
        };
        let Some(record) = records.into_iter().next() else { return Ok(None) };
        let mut job = v1::BroadcastJob::decode(record.value.as_ref())
            .map_err(|error| Status::data_loss(format!("the record of the job cannot be read: {error}")))?;
        if matches!(job.state(), broadcast_job::State::Running | broadcast_job::State::Paused) {
            job.state = broadcast_job::State::Interrupted.into();
        }
        Ok(Some(job))
    }

    /// Makes the job's record what the job is. A failure is logged and made good by the next [`tend`](Self::tend).
    async fn write(&self, key: &str) {
        let (job, ended) = {
            let mut jobs = self.jobs.lock();
            let Some(job) = jobs.get_mut(key) else { return };
            job.dirty = false;
            (job.view(), !job.is_active())
        };
        let put = v1::PutRecord {
            kind: RECORD.to_owned(),
            key: key.to_owned(),
            value: job.encode_to_vec().into(),
            expires_ms: now_ms() + if ended { KEEP_MS } else { KEEP_ACTIVE_MS },
            ..v1::PutRecord::default()
        };
        if let Err(error) = self.directory.ask_saver(saver_request::Op::PutRecord(put)).await {
            tracing::warn!(job = key, %error, "cannot write the record of a broadcast job, trying again");
            if let Some(job) = self.jobs.lock().get_mut(key) {
                job.dirty = true;
            }
        }
    }

    fn with(&self, key: &str, change: impl FnOnce(&mut Job) -> Vec<Told>) {
        self.with_result(key, |job| Ok::<_, std::convert::Infallible>(change(job)));
    }

    /// None: there is no such job in memory.
    fn with_result<E>(
        &self,
        key: &str,
        change: impl FnOnce(&mut Job) -> Result<Vec<Told>, E>,
    ) -> Option<Result<(), E>> {
        // What gateways are told is queued under the lock, so that it keeps its order.
        let mut jobs = self.jobs.lock();
        let told = match change(jobs.get_mut(key)?) {
            Ok(told) => told,
            Err(error) => return Some(Err(error)),
        };
        self.tell(key, told);
        Some(Ok(()))
    }

    fn with_each_active(&self, mut change: impl FnMut(&mut Job) -> Vec<Told>) {
        for (key, job) in self.jobs.lock().iter_mut().filter(|(_, job)| job.is_active()) {
            let told = change(job);
            self.tell(key, told);
        }
    }

    fn tell(&self, key: &str, told: Vec<Told>) {
        for (receiver, state, rate_per_second) in told {
            let control = v1::BroadcastControl { job: key.to_owned(), state: state.into(), rate_per_second };
            self.attachments.push(receiver, attach_down::Body::Control(control));
        }
    }
}
