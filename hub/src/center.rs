//! The API for backends: push, broadcast, look up, kick, pull. One core of plain methods; HTTP+JSON and gRPC are
//! thin skins over it.

mod auth;
mod batch;
pub mod body;
mod check;
mod cluster;
mod grpc;
pub(crate) mod http;
pub mod metrics;
pub mod openapi;
mod overview;
mod rate;
mod revoke;
pub mod routes;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use carillon_agent::Live;
use carillon_agent::app::App;
use carillon_agent::revoked::RevokedUser;
use carillon_proto::{topic, v1};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use check::{check_device, check_id, full_topic, message, parse_position};

pub use auth::Caller;
pub use cluster::{Cluster, ClusterError};
pub use overview::{GatewayNumbers, Moving, Numbers, Overview};

use crate::problem::{Kind, Problem};

/// Limits of the center. Sizes in bytes, of one instance.
#[derive(Debug, Clone)]
pub struct Options {
    /// Body of a request that is not a batch.
    pub max_body_bytes: usize,
    /// Body of a batch.
    pub max_batch_bytes: usize,
    /// One line of a batch.
    pub max_line_bytes: usize,
    /// Lines of a batch.
    pub max_batch_lines: usize,
    /// Pushes of one batch or stream that may be unanswered, and the bytes of their payloads.
    pub batch_in_flight: usize,
    pub batch_in_flight_bytes: usize,
    /// Batches and push streams at the same time.
    pub max_batches: usize,
    /// Other HTTP requests at the same time, and the bytes their bodies may take together.
    pub max_requests: usize,
    pub max_bodies_bytes: usize,
    /// For the whole body of a request; of a batch, for the next part of it.
    pub body_timeout: Duration,
    /// For a whole request that is not a batch.
    pub request_timeout: Duration,
    /// How long a line of a batch waits for its app's rate before it is refused.
    pub rate_wait: Duration,
    /// How old the numbers of an overview may be.
    pub overview_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            max_body_bytes: 1024 * 1024,
            max_batch_bytes: 64 * 1024 * 1024,
            max_line_bytes: 256 * 1024,
            max_batch_lines: 100_000,
            batch_in_flight: 1024,
            batch_in_flight_bytes: 8 * 1024 * 1024,
            max_batches: 64,
            max_requests: 4096,
            max_bodies_bytes: 256 * 1024 * 1024,
            body_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(45),
            rate_wait: Duration::from_secs(10),
            overview_age: Duration::from_millis(500),
        }
    }
}

/// What the center is built from.
pub struct Deps {
    /// The apps, by name: their keys and limits.
    pub apps: Live<BTreeMap<String, Arc<App>>>,
    pub cluster: Arc<dyn Cluster>,
    pub metrics: metrics::Metrics,
    pub options: Options,
}

/// A handle; clones share everything.
#[derive(Clone)]
pub struct Center {
    inner: Arc<Inner>,
}

struct Inner {
    apps: Live<BTreeMap<String, Arc<App>>>,
    cluster: Arc<dyn Cluster>,
    metrics: metrics::Metrics,
    options: Options,
    rates: rate::Rates,
    overview: tokio::sync::Mutex<overview::Sampler>,
    requests: Arc<Semaphore>,
    /// In KiB, because a semaphore's permits are u32.
    bodies_kib: Arc<Semaphore>,
    batches: Arc<Semaphore>,
}

/// Who a message is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    User(String),
    Group(String),
    /// In full, or without the app's level.
    Topic(String),
}

/// A message to push, as a backend asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Push {
    pub to: To,
    pub payload: Bytes,
    /// Default 1.
    pub qos: Option<u64>,
    /// 0 = the topic's retention.
    pub ttl_seconds: u32,
    pub store: Option<bool>,
    pub id: Option<String>,
    pub retain: bool,
    pub properties: v1::Properties,
}

/// A broadcast to start, as a backend asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Broadcast {
    pub payload: Bytes,
    pub qos: Option<u64>,
    pub ttl_seconds: u32,
    pub store: Option<bool>,
    pub id: Option<String>,
    /// 0 = the app's default.
    pub rate_per_second: f64,
    pub properties: v1::Properties,
}

/// A message that was accepted, and durable if it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub id: String,
    pub topic: String,
    pub epoch: u64,
    pub seq: u64,
    pub duplicate: bool,
}

/// Messages in one answer to a pull, and how many when the caller does not say.
pub const MAX_PULL: u32 = 1000;
pub const DEFAULT_PULL: u32 = 100;
/// Payload bytes in one answer to a pull, beyond its first message.
const MAX_PULL_BYTES: u32 = 4 * 1024 * 1024;
/// How far in the future the tokens may be issued that are revoked.
const MAX_REVOKE_AHEAD_SECONDS: u64 = 3600;
/// Highest rate of a broadcast that can be asked for, per second.
const MAX_BROADCAST_RATE: f64 = 1e9;

impl Center {
    pub fn new(deps: Deps) -> Self {
        let Deps { apps, cluster, metrics, options } = deps;
        Center {
            inner: Arc::new(Inner {
                apps,
                cluster,
                metrics,
                rates: rate::Rates::default(),
                overview: tokio::sync::Mutex::default(),
                requests: Arc::new(Semaphore::new(options.max_requests)),
                bodies_kib: Arc::new(Semaphore::new((options.max_bodies_bytes / 1024).max(1))),
                batches: Arc::new(Semaphore::new(options.max_batches)),
                options,
            }),
        }
    }

    /// Everything under `/v1` (but the dispatcher's route) and the gRPC service, so that one port serves both. It has no
    /// fallback, so that it can be merged with other routers.
    pub fn http_router(&self) -> axum::Router {
        http::router(self.clone())
    }

    /// The gRPC service `carillon.v1.Center`.
    pub fn grpc_service(&self) -> v1::center_server::CenterServer<grpc::Grpc> {
        v1::center_server::CenterServer::new(grpc::Grpc::new(self.clone()))
            .max_decoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(carillon_proto::MAX_GRPC_MESSAGE_BYTES)
    }

    /// Who holds this key, and may they speak for `app`?
    pub fn authorise(&self, app: &str, key: Option<&str>) -> Result<Caller, Problem> {
        let apps = self.inner.apps.borrow().clone();
        auth::authorise(&apps, app, key)
    }

    /// Publishes a message: it is queued when this returns, so pushes to one topic keep their order; the future gives
    /// the owner's answer. Dropping it does not take the message back.
    pub fn push(
        &self,
        caller: &Caller,
        push: Push,
    ) -> Result<impl Future<Output = Result<Accepted, Problem>> + Send + use<>, Problem> {
        let checked = self.check_push(caller, push).and_then(|checked| {
            self.take_rate(caller)?;
            Ok(checked)
        });
        self.counted(checked).map(|checked| self.publish(checked))
    }

    /// As [`push`](Self::push), but when the app's rate is used up it waits for it, at most [`Options::rate_wait`].
    pub async fn push_in_time(
        &self,
        caller: &Caller,
        push: Push,
    ) -> Result<impl Future<Output = Result<Accepted, Problem>> + Send + use<>, Problem> {
        let checked = self.counted(self.check_push(caller, push))?;
        let deadline = Instant::now() + self.inner.options.rate_wait;
        let rate = caller.app.limits.push_rate_per_second;
        // Others may be faster to take what there is: ask again after each wait.
        while let Err(wait) = self.inner.rates.take(&caller.name, rate, Instant::now()) {
            if Instant::now() + wait > deadline {
                return self.counted(Err(rate_used_up(caller, wait)));
            }
            tokio::time::sleep(wait).await;
        }
        Ok(self.publish(checked))
    }

    fn publish(
        &self,
        (request, accepted): (v1::PublishRequest, Accepted),
    ) -> impl Future<Output = Result<Accepted, Problem>> + Send + use<> {
        let answer = self.inner.cluster.publish(request);
        let metrics = self.inner.metrics.clone();
        async move {
            let result = match answer.await {
                Ok(published) => published_as(&published).map(|()| Accepted {
                    epoch: published.epoch,
                    seq: published.seq,
                    duplicate: published.duplicate,
                    ..accepted
                }),
                Err(error) => Err(from_cluster(error)),
            };
            metrics.push(match &result {
                Ok(accepted) if accepted.duplicate => "duplicate",
                Ok(_) => "accepted",
                Err(problem) => problem.kind.entry().slug,
            });
            result
        }
    }

    /// A push that is refused here is counted here.
    fn counted<T>(&self, result: Result<T, Problem>) -> Result<T, Problem> {
        result.inspect_err(|problem| self.inner.metrics.push(problem.kind.entry().slug))
    }

    fn take_rate(&self, caller: &Caller) -> Result<(), Problem> {
        let rate = caller.app.limits.push_rate_per_second;
        let taken = self.inner.rates.take(&caller.name, rate, Instant::now());
        taken.map_err(|wait| rate_used_up(caller, wait))
    }

    fn check_push(&self, caller: &Caller, push: Push) -> Result<(v1::PublishRequest, Accepted), Problem> {
        let Push { to, payload, qos, ttl_seconds, store, id, retain, properties } = push;
        let app = &caller.name;
        let full = match to {
            To::User(user) => {
                topic::check_user(&user).map_err(|error| Problem::field("user", error))?;
                topic::inbox(app, &user)
            }
            To::Group(group) => {
                topic::check_user(&group).map_err(|error| Problem::field("group", error))?;
                topic::group(app, &group)
            }
            To::Topic(name) => full_topic(app, &name)?,
        };
        let idempotent = id.is_some();
        let message = message(caller, full, payload, qos, ttl_seconds, id, retain, properties)?;
        let accepted = Accepted {
            id: message.id.clone(),
            topic: message.topic.clone(),
            epoch: 0,
            seq: 0,
            duplicate: false,
        };
        Ok((v1::PublishRequest { correlation: 0, message: Some(message), store, idempotent }, accepted))
    }

    /// Starts a broadcast to everyone in the caller's app.
    pub async fn start_broadcast(
        &self,
        caller: &Caller,
        broadcast: Broadcast,
    ) -> Result<v1::BroadcastJob, Problem> {
        let Broadcast { payload, qos, ttl_seconds, store, id, rate_per_second, properties } = broadcast;
        if !(0.0..=MAX_BROADCAST_RATE).contains(&rate_per_second) {
            return Err(Problem::field("rate_per_second", format!("must be from 0 to {MAX_BROADCAST_RATE}")));
        }
        let idempotent = id.is_some();
        let everyone = topic::everyone(&caller.name);
        let message = message(caller, everyone, payload, qos, ttl_seconds, id, false, properties)?;
        self.take_rate(caller)?;
        let request =
            v1::StartBroadcastRequest { message: Some(message), store, idempotent, rate_per_second };
        self.inner.cluster.start_broadcast(request).await.map_err(from_cluster)
    }

    pub async fn broadcast(&self, caller: &Caller, job: &str) -> Result<v1::BroadcastJob, Problem> {
        check_id(job)?;
        let request = v1::GetBroadcastRequest { app: caller.name.clone(), job: job.to_owned() };
        self.inner.cluster.get_broadcast(request).await.map_err(from_cluster)
    }

    /// Runs, pauses or cancels a broadcast.
    pub async fn control_broadcast(
        &self,
        caller: &Caller,
        job: &str,
        state: v1::broadcast_control::State,
    ) -> Result<v1::BroadcastJob, Problem> {
        check_id(job)?;
        if state == v1::broadcast_control::State::Unspecified {
            return Err(Problem::field("state", "must be RUN, PAUSE or CANCEL"));
        }
        let request = v1::ControlBroadcastRequest {
            app: caller.name.clone(),
            job: job.to_owned(),
            state: state.into(),
        };
        self.inner.cluster.control_broadcast(request).await.map_err(from_cluster)
    }

    /// The sessions of a user that are online.
    pub async fn user(&self, caller: &Caller, user: &str) -> Result<v1::SessionsReply, Problem> {
        topic::check_user(user).map_err(|error| Problem::field("user", error))?;
        let request = v1::SessionsRequest { app: caller.name.clone(), user: user.to_owned() };
        let mut reply = self.inner.cluster.sessions(request).await.map_err(from_cluster)?;
        reply.sessions.sort_by_key(|session| session.since_ms);
        Ok(reply)
    }

    /// Disconnects the sessions of a user, or the one of `device`.
    pub async fn kick(&self, caller: &Caller, user: &str, device: Option<&str>) -> Result<u32, Problem> {
        topic::check_user(user).map_err(|error| Problem::field("user", error))?;
        if let Some(device) = device {
            check_device(device)?;
        }
        let request = v1::KickRequest {
            app: caller.name.clone(),
            user: user.to_owned(),
            client_id: device.unwrap_or_default().to_owned(),
        };
        Ok(self.inner.cluster.kick(request).await.map_err(from_cluster)?.kicked)
    }

    /// Revokes the tokens of a user that were issued before a Unix time, seconds (None: up to now); gives that time. The
    /// longest life of a token, if it is said, says when that may be forgotten.
    pub async fn revoke(
        &self,
        caller: &Caller,
        user: &str,
        before: Option<u64>,
        token_lifetime_seconds: Option<u64>,
    ) -> Result<u64, Problem> {
        topic::check_user(user).map_err(|error| Problem::field("user", error))?;
        let now = carillon_proto::now_ms() / 1000;
        // A token of this very second is one of those meant.
        let before = before.unwrap_or(now + 1);
        if before > now + MAX_REVOKE_AHEAD_SECONDS {
            let text = format!("may be at most {MAX_REVOKE_AHEAD_SECONDS} seconds from now");
            return Err(Problem::field("before", text));
        }
        // Gateways go on taking a token for their `token_leeway_seconds`, an hour at most, after it has expired.
        let lives = |seconds: u64| before.saturating_add(seconds).saturating_add(3600).max(now + 1);
        let forget = token_lifetime_seconds.map_or(0, lives);
        let revoked = RevokedUser { before, forget };
        self.inner.cluster.revoke(&caller.name, user, revoked).await.map_err(from_cluster)?;
        Ok(before)
    }

    /// Reads a topic's log after a position, "{epoch}:{seq}"; from its beginning when that is not given.
    pub async fn pull(
        &self,
        caller: &Caller,
        name: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<v1::PullReply, Problem> {
        let full = full_topic(&caller.name, name)?;
        let (after_epoch, after) = match after {
            Some(text) => parse_position(text)?,
            None => (0, 0),
        };
        if !(1..=MAX_PULL).contains(&limit) {
            return Err(Problem::field("limit", format!("must be from 1 to {MAX_PULL}")));
        }
        let request = v1::Read { topic: full, after, limit, max_bytes: MAX_PULL_BYTES };
        let reply = self.inner.cluster.read(request).await.map_err(from_cluster)?;
        let head = reply.head.unwrap_or_default();
        // seq alone says where; the epoch is told so that a position reads as messages do.
        let epoch = match reply.messages.last() {
            Some(last) => last.epoch,
            None if reply.next >= head.seq && head.epoch != 0 => head.epoch,
            None => after_epoch,
        };
        Ok(v1::PullReply {
            next: format!("{epoch}:{}", reply.next),
            more: reply.next < head.seq,
            messages: reply.messages,
        })
    }

    /// Live numbers of the caller's app.
    pub async fn overview(&self, caller: &Caller) -> Result<Overview, Problem> {
        // One question at a time, however many consoles are open; the others wait for its answer.
        let mut sampler = self.inner.overview.lock().await;
        let fresh = sampler.sampled.is_some_and(|at| at.elapsed() < self.inner.options.overview_age);
        if !fresh {
            let reports = self.inner.cluster.overview().await.map_err(from_cluster)?;
            sampler.take(Instant::now(), reports);
        }
        Ok(sampler.overview(Instant::now(), &caller.name))
    }
}

fn rate_used_up(caller: &Caller, wait: Duration) -> Problem {
    let (app, rate) = (&caller.name, caller.app.limits.push_rate_per_second);
    let detail = format!("app `{app}` may make {rate} pushes per second (limits.push_rate_per_second)");
    Problem {
        retry_after_seconds: Some(wait.as_secs_f64().ceil().max(1.0) as u64),
        ..Problem::new(Kind::TooManyRequests, detail)
    }
}

/// What the owner of the topic says, as what the caller is told.
fn published_as(published: &v1::Published) -> Result<(), Problem> {
    use v1::PublishCode;
    let said = |default: &str| match published.text.as_str() {
        "" => default.to_owned(),
        text => text.to_owned(),
    };
    match published.code() {
        PublishCode::Accepted => Ok(()),
        PublishCode::NotOwner => Err(Problem::new(
            Kind::Unavailable,
            "the topic is just moving to another owner; a retry with the same id is harmless",
        )),
        PublishCode::StoreUnavailable | PublishCode::Unspecified => Err(Problem::new(
            Kind::Unavailable,
            said("the message could not be stored and was not delivered"),
        )),
        PublishCode::Overloaded => {
            Err(Problem::new(Kind::Overloaded, said("the topic's owner has too much to do")))
        }
        PublishCode::Refused => {
            Err(Problem::new(Kind::Refused, said("the topic's owner refuses the message")))
        }
    }
}

fn from_cluster(error: ClusterError) -> Problem {
    match error {
        ClusterError::Unavailable(text) => Problem::new(
            Kind::Unavailable,
            format!(
                "{text}; it may or may not have been carried out (a push retried with the same id is harmless)"
            ),
        ),
        ClusterError::Overloaded(text) => Problem::new(Kind::Overloaded, text),
        ClusterError::Refused(text) => Problem::new(Kind::Refused, text),
        ClusterError::NotFound(text) => Problem::new(Kind::UnknownBroadcast, text),
        ClusterError::Conflict(text) => Problem::new(Kind::Conflict, text),
    }
}
