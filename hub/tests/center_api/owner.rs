//! An owner of all topics and a log of all messages, in memory. A topic `{app}/fail/{how}` fails like that.

use std::collections::BTreeMap;

use async_trait::async_trait;
use carillon_agent::revoked::RevokedUser;
use carillon_hub::center::{Cluster, ClusterError};
use carillon_proto::v1::{self, PublishCode};
use futures::future::BoxFuture;
use parking_lot::Mutex;

/// Epoch of all that is published.
pub const EPOCH: u64 = 7;

#[derive(Default)]
pub struct TestOwner {
    pub state: Mutex<State>,
}

#[derive(Default)]
pub struct State {
    pub logs: BTreeMap<String, Vec<v1::Message>>,
    /// Every request, in the order in which it was queued.
    pub published: Vec<v1::PublishRequest>,
    pub broadcasts: Vec<v1::StartBroadcastRequest>,
    pub jobs: BTreeMap<(String, String), v1::BroadcastJob>,
    pub sessions: Vec<v1::OnlineSession>,
    pub reports: Vec<v1::GatewayOverview>,
    pub revoked: Vec<(String, String, RevokedUser)>,
    pub asked_overview: usize,
    /// Publishes are answered only after this time.
    pub delay: Option<std::time::Duration>,
}

impl State {
    fn publish(&mut self, request: v1::PublishRequest) -> Result<v1::Published, ClusterError> {
        self.published.push(request.clone());
        let message = request.message.expect("the center sends a message");
        let failed = |code: PublishCode, text: &str| {
            Ok(v1::Published { code: code.into(), text: text.to_owned(), ..v1::Published::default() })
        };
        if let Some(how) = message.topic.strip_prefix("demo/fail/") {
            return match how {
                "not-owner" => failed(PublishCode::NotOwner, ""),
                "store" => failed(PublishCode::StoreUnavailable, "the disk is full"),
                "overloaded" => failed(PublishCode::Overloaded, ""),
                "refused" => failed(PublishCode::Refused, "no, never"),
                "full" => Err(ClusterError::Overloaded("too many messages are waiting".to_owned())),
                "away" => Err(ClusterError::Unavailable("not accepted in time".to_owned())),
                other => panic!("fail how? {other}"),
            };
        }
        let log = self.logs.entry(message.topic.clone()).or_default();
        if request.idempotent
            && let Some(earlier) = log.iter().find(|earlier| earlier.id == message.id)
        {
            return Ok(v1::Published {
                code: PublishCode::Accepted.into(),
                epoch: earlier.epoch,
                seq: earlier.seq,
                duplicate: true,
                ..v1::Published::default()
            });
        }
        let seq = log.len() as u64 + 1;
        log.push(v1::Message { epoch: EPOCH, seq, prev: seq - 1, stored: true, ..message });
        Ok(v1::Published {
            code: PublishCode::Accepted.into(),
            epoch: EPOCH,
            seq,
            ..v1::Published::default()
        })
    }
}

#[async_trait]
impl Cluster for TestOwner {
    fn publish(
        &self,
        request: v1::PublishRequest,
    ) -> BoxFuture<'static, Result<v1::Published, ClusterError>> {
        let mut state = self.state.lock();
        let result = state.publish(request);
        let delay = state.delay;
        Box::pin(async move {
            if let Some(delay) = delay {
                tokio::time::sleep(delay).await;
            }
            result
        })
    }

    async fn sessions(&self, request: v1::SessionsRequest) -> Result<v1::SessionsReply, ClusterError> {
        if request.user == "nobody-answers" {
            return Err(ClusterError::Unavailable("no registry instance is known".to_owned()));
        }
        let mut sessions = self.state.lock().sessions.clone();
        sessions.retain(|online| {
            online
                .session
                .as_ref()
                .is_some_and(|session| session.app == request.app && session.user == request.user)
        });
        Ok(v1::SessionsReply { sessions })
    }

    async fn kick(&self, request: v1::KickRequest) -> Result<v1::KickReply, ClusterError> {
        let mut state = self.state.lock();
        let before = state.sessions.len();
        state.sessions.retain(|online| {
            let session = online.session.clone().unwrap_or_default();
            let meant = request.client_id.is_empty() || session.client_id == request.client_id;
            session.app != request.app || session.user != request.user || !meant
        });
        Ok(v1::KickReply { kicked: (before - state.sessions.len()) as u32 })
    }

    async fn revoke(&self, app: &str, user: &str, revoked: RevokedUser) -> Result<(), ClusterError> {
        if user == "one-too-many" {
            return Err(ClusterError::Conflict("revoked/demo is full".to_owned()));
        }
        self.state.lock().revoked.push((app.to_owned(), user.to_owned(), revoked));
        Ok(())
    }

    async fn overview(&self) -> Result<Vec<v1::GatewayOverview>, ClusterError> {
        let mut state = self.state.lock();
        state.asked_overview += 1;
        Ok(state.reports.clone())
    }

    async fn start_broadcast(
        &self,
        request: v1::StartBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        let mut state = self.state.lock();
        state.broadcasts.push(request.clone());
        let message = request.message.clone().expect("the center sends a message");
        let published = state.publish(v1::PublishRequest {
            correlation: 0,
            message: request.message,
            store: request.store,
            idempotent: request.idempotent,
        })?;
        let app = message.topic.split('/').next().unwrap_or_default().to_owned();
        let job = v1::BroadcastJob {
            id: message.id.clone(),
            topic: message.topic,
            epoch: published.epoch,
            seq: published.seq,
            state: v1::broadcast_job::State::Running.into(),
            total: 10,
            done: 0,
            rate_per_second: request.rate_per_second,
            started_ms: message.published_ms,
            ended_ms: 0,
        };
        Ok(state.jobs.entry((app, message.id)).or_insert(job).clone())
    }

    async fn get_broadcast(
        &self,
        request: v1::GetBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        let found = self.state.lock().jobs.get(&(request.app, request.job)).cloned();
        found.ok_or_else(|| ClusterError::NotFound("there is no such broadcast".to_owned()))
    }

    async fn control_broadcast(
        &self,
        request: v1::ControlBroadcastRequest,
    ) -> Result<v1::BroadcastJob, ClusterError> {
        use v1::broadcast_control::State as Control;
        use v1::broadcast_job::State as Job;
        let mut state = self.state.lock();
        let control = request.state();
        let job = state
            .jobs
            .get_mut(&(request.app, request.job))
            .ok_or_else(|| ClusterError::NotFound("there is no such broadcast".to_owned()))?;
        if job.ended_ms != 0 {
            return Err(ClusterError::Conflict("the broadcast has ended".to_owned()));
        }
        let next = match control {
            Control::Run => Job::Running,
            Control::Pause => Job::Paused,
            Control::Cancel => Job::Cancelled,
            Control::Unspecified => panic!("the center asks for nothing"),
        };
        job.state = next.into();
        if next == Job::Cancelled {
            job.ended_ms = job.started_ms + 1;
        }
        Ok(job.clone())
    }

    async fn read(&self, request: v1::Read) -> Result<v1::ReadReply, ClusterError> {
        let state = self.state.lock();
        let log = state.logs.get(&request.topic).map_or(&[][..], Vec::as_slice);
        let messages: Vec<_> = log
            .iter()
            .filter(|message| message.seq > request.after)
            .take(request.limit as usize)
            .cloned()
            .collect();
        let head = log.last().map_or(v1::Head::default(), |last| v1::Head {
            epoch: EPOCH,
            seq: last.seq,
            trimmed: 0,
            retained: false,
        });
        let next = messages.last().map_or(request.after, |last| last.seq);
        Ok(v1::ReadReply { messages, head: Some(head), next })
    }
}
