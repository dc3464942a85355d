//! One app's webhook: a task of its own, with the app's session at the saver and a lane for each of its topics.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::app::Webhook;
use carillon_proto::{now_ms, v1};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use v1::{saver_error, saver_reply, saver_request};

use super::event::{Event, SIGNATURE, signature};
use super::lane::{BatchLimits, Lane, Offered, Step};
use super::{CoordinatorConfig, SESSION_NAME, Shared, upstream};
use crate::peers::PeerError;
use crate::receivers::Inlet;

/// Lanes kept that have nothing to do.
const IDLE_LANES: usize = 10_000;
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// How often the logs are looked at, whether or not anything was missed.
const REFRESH: Duration = Duration::from_secs(60);
/// The session never expires.
const NEVER: u32 = u32::MAX;

/// The manager's hold on an app's task.
pub struct AppHandle {
    pub inlet: Inlet,
    stop: CancellationToken,
    forget: CancellationToken,
    task: JoinHandle<()>,
}

impl AppHandle {
    /// Waits for posts under way and closes the session; with `forget`, nothing is kept of it.
    pub async fn stop(self, forget: bool) {
        if forget {
            self.forget.cancel();
        }
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the task of an app's webhook has failed");
        }
    }
}

pub struct AppTask {
    app: String,
    shared: Arc<Shared>,
    attachment: u64,
    lanes: HashMap<Arc<str>, Lane>,
    queued: usize,
    ready: VecDeque<Arc<str>>,
    /// Lanes that wait for their next attempt.
    waiting: BTreeSet<(Instant, Arc<str>)>,
    under_way: FuturesUnordered<BoxFuture<'static, Done>>,
}

/// What has been done for a lane.
struct Done {
    topic: Arc<str>,
    outcome: Outcome,
}

enum Outcome {
    Read(Result<v1::ReadReply, PeerError>),
    /// How many messages; whether the cursor's move was refused is told apart.
    Posted {
        count: usize,
        result: Result<(), String>,
        moved: bool,
    },
}

impl AppTask {
    pub fn start(app: &str, shared: Arc<Shared>) -> AppHandle {
        let (inlet, live) = Inlet::new(shared.metrics.dropped.clone());
        let refresh = inlet.refresh.clone();
        let (stop, forget) = (CancellationToken::new(), CancellationToken::new());
        let task = AppTask {
            app: app.to_owned(),
            shared,
            attachment: 0,
            lanes: HashMap::new(),
            queued: 0,
            ready: VecDeque::new(),
            waiting: BTreeSet::new(),
            under_way: FuturesUnordered::new(),
        };
        let task = tokio::spawn(task.run(live, refresh, stop.clone(), forget.clone()));
        AppHandle { inlet, stop, forget, task }
    }

    async fn run(
        mut self,
        mut live: mpsc::Receiver<v1::Message>,
        refresh: Arc<Notify>,
        stop: CancellationToken,
        forget: CancellationToken,
    ) {
        let mut backoff = FIRST_RETRY;
        while !stop.is_cancelled() {
            let opened = tokio::select! {
                opened = self.open() => opened,
                () = stop.cancelled() => break,
            };
            let ended = match opened {
                Ok(()) => {
                    backoff = FIRST_RETRY;
                    tracing::info!(app = self.app, backlog = self.ready.len(), "serving the app's webhook");
                    self.shared.metrics.apps.inc();
                    let ended = self.serve(&mut live, &refresh, &stop).await;
                    self.shared.metrics.apps.dec();
                    ended
                }
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                tracing::warn!(app = self.app, %error, "the webhook cannot be served, trying again");
                let wait = tokio::time::sleep(backoff.mul_f64(rand::random_range(0.5..1.5)));
                tokio::select! {
                    () = wait => {}
                    () = stop.cancelled() => {}
                }
                backoff = (backoff * 2).min(self.config().retry_max());
            }
        }
        if self.attachment != 0 {
            let close = v1::CloseSession {
                session: Some(self.session()),
                attachment: self.attachment,
                expiry_seconds: if forget.is_cancelled() { 0 } else { NEVER },
                ..v1::CloseSession::default()
            };
            if let Err(error) = self.shared.directory.ask_saver(saver_request::Op::CloseSession(close)).await
            {
                tracing::debug!(app = self.app, %error, "the app's session could not be closed");
            }
        }
        self.shared.metrics.queued.sub(self.queued as i64);
    }

    fn config(&self) -> CoordinatorConfig {
        self.shared.config.borrow().coordinator.clone()
    }

    fn session(&self) -> v1::SessionRef {
        v1::SessionRef {
            app: self.app.clone(),
            user: SESSION_NAME.to_owned(),
            client_id: SESSION_NAME.to_owned(),
        }
    }

    /// Makes the session ours and looks at the backlog.
    async fn open(&mut self) -> Result<(), PeerError> {
        let open = v1::OpenSession {
            session: Some(self.session()),
            gateway: format!("{}/coordinator", self.shared.instance),
            incarnation: self.shared.incarnation,
            clean_start: false,
            expiry_seconds: NEVER,
            connected_ms: 0,
        };
        match self.shared.directory.ask_saver(saver_request::Op::OpenSession(open)).await? {
            saver_reply::Result::SessionOpened(opened) => {
                self.attachment = opened.attachment;
                // What an earlier session had in memory is in the log as well, if it was stored.
                self.shared.metrics.queued.sub(self.queued as i64);
                self.queued = 0;
                self.lanes.clear();
                self.ready.clear();
                self.waiting.clear();
                self.refresh().await
            }
            _ => Err(PeerError::UnexpectedAnswer),
        }
    }

    /// Asks where the app's logs go beyond the cursors.
    async fn refresh(&mut self) -> Result<(), PeerError> {
        let subscribe = v1::Subscribe {
            session: Some(self.session()),
            attachment: self.attachment,
            subscriptions: vec![v1::Subscription {
                filter: upstream(&self.app),
                qos: 1,
                ..v1::Subscription::default()
            }],
        };
        let positions = match self.shared.directory.ask_saver(saver_request::Op::Subscribe(subscribe)).await?
        {
            saver_reply::Result::Subscribed(subscribed) => {
                subscribed.results.into_iter().flat_map(|one| one.positions)
            }
            _ => return Err(PeerError::UnexpectedAnswer),
        };
        for position in positions {
            let topic: Arc<str> = position.topic.as_str().into();
            let lane = self.lanes.entry(topic.clone()).or_insert_with(|| Lane::new(position.after));
            lane.behind(position.head);
            self.wake(&topic);
        }
        Ok(())
    }

    /// Serves until it is stopped, or the session is not ours any more.
    async fn serve(
        &mut self,
        live: &mut mpsc::Receiver<v1::Message>,
        refresh: &Notify,
        stop: &CancellationToken,
    ) -> Result<(), PeerError> {
        let mut refresh_at = tokio::time::interval_at(Instant::now() + REFRESH, REFRESH);
        let mut stopping = false;
        loop {
            if stopping && self.under_way.is_empty() {
                return Ok(());
            }
            if !stopping {
                self.begin();
            }
            let retry_at = self.waiting.first().map_or_else(|| Instant::now() + REFRESH, |(at, _)| *at);
            tokio::select! {
                Some(message) = live.recv(), if !stopping => self.offer(message),
                Some(done) = self.under_way.next() => self.done(done)?,
                () = tokio::time::sleep_until(retry_at), if !stopping => self.retry(),
                () = refresh.notified(), if !stopping => self.refresh().await?,
                _ = refresh_at.tick(), if !stopping => self.refresh().await?,
                () = stop.cancelled(), if !stopping => stopping = true,
            }
        }
    }

    fn offer(&mut self, message: v1::Message) {
        if self.lanes.len() >= IDLE_LANES && !self.lanes.contains_key(message.topic.as_str()) {
            self.lanes.retain(|_, lane| !lane.is_idle());
        }
        let topic: Arc<str> = message.topic.as_str().into();
        let room = (self.queued as u64) < self.config().queue_messages;
        // Of a topic without a lane everything before this message has been dealt with: else it had a backlog when
        // the logs were looked at, and so a lane.
        let before = if message.stored { message.prev } else { message.seq };
        let lane = self.lanes.entry(topic.clone()).or_insert_with(|| Lane::new(before));
        match lane.offer(message, room) {
            Offered::Queued => self.count(1),
            Offered::Dropped => self.shared.metrics.dropped.inc(),
            Offered::Left | Offered::Known => {}
        }
        self.wake(&topic);
    }

    fn count(&mut self, change: isize) {
        self.queued = self.queued.saturating_add_signed(change);
        self.shared.metrics.queued.add(change as i64);
    }

    fn wake(&mut self, topic: &Arc<str>) {
        if let Some(lane) = self.lanes.get_mut(topic)
            && !lane.busy
            && !lane.is_idle()
        {
            lane.busy = true;
            self.ready.push_back(topic.clone());
        }
    }

    fn retry(&mut self) {
        let now = Instant::now();
        while self.waiting.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, topic)) = self.waiting.pop_first() {
                self.ready.push_back(topic);
            }
        }
    }

    /// Begins what may be begun.
    fn begin(&mut self) {
        let config = self.config();
        let limits = BatchLimits { events: config.batch_events as usize, bytes: config.batch_bytes as usize };
        while (self.under_way.len() as u64) < config.posts_per_app
            && let Some(topic) = self.ready.pop_front()
        {
            let Some(lane) = self.lanes.get_mut(&topic) else { continue };
            match lane.next(limits) {
                Step::Nothing => lane.busy = false,
                Step::Read { after } => {
                    self.shared.metrics.reads.inc();
                    let read = v1::Read {
                        topic: topic.to_string(),
                        after,
                        limit: config.batch_events as u32,
                        max_bytes: config.batch_bytes as u32,
                    };
                    let directory = self.shared.directory.clone();
                    self.under_way.push(Box::pin(async move {
                        let outcome = Outcome::Read(directory.read(read).await);
                        Done { topic, outcome }
                    }));
                }
                Step::Post(messages) => {
                    let webhook =
                        self.shared.apps.borrow().get(&self.app).and_then(|app| app.webhook.clone());
                    let post = Post {
                        shared: self.shared.clone(),
                        app: self.app.clone(),
                        session: self.session(),
                        attachment: self.attachment,
                    };
                    self.under_way.push(Box::pin(post.carry_out(webhook, topic, messages)));
                }
            }
        }
    }

    fn done(&mut self, Done { topic, outcome }: Done) -> Result<(), PeerError> {
        // Of an earlier session.
        let Some(lane) = self.lanes.get_mut(&topic) else { return Ok(()) };
        let failed = match outcome {
            Outcome::Read(Ok(reply)) => {
                let before = lane.len();
                lane.read(reply);
                let more = lane.len() - before;
                self.count(more as isize);
                None
            }
            Outcome::Read(Err(error)) => Some(error.to_string()),
            Outcome::Posted { count, result: Ok(()), moved } => {
                let before = lane.len();
                lane.posted(count);
                let fewer = before - lane.len();
                self.count(-(fewer as isize));
                if moved {
                    return Err(PeerError::Saver {
                        code: saver_error::Code::SessionMoved,
                        text: "another coordinator has the app's session".to_owned(),
                    });
                }
                None
            }
            Outcome::Posted { result: Err(error), .. } => Some(error),
        };
        let retry_max = self.config().retry_max();
        let Some(lane) = self.lanes.get_mut(&topic) else { return Ok(()) };
        match failed {
            None => self.ready.push_back(topic),
            Some(error) => {
                lane.failures = lane.failures.saturating_add(1);
                let wait = FIRST_RETRY.saturating_mul(1 << (lane.failures - 1).min(20)).min(retry_max);
                let wait = wait.mul_f64(rand::random_range(0.5..1.0));
                tracing::warn!(
                    topic = &*topic,
                    failures = lane.failures,
                    wait_ms = wait.as_millis() as u64,
                    error,
                    "events could not be handed to the webhook, trying again"
                );
                self.waiting.insert((Instant::now() + wait, topic));
            }
        }
        Ok(())
    }
}

impl CoordinatorConfig {
    fn retry_max(&self) -> Duration {
        Duration::from_millis(self.retry_max_ms)
    }
}

/// One POST, and the move of the cursor after it.
struct Post {
    shared: Arc<Shared>,
    app: String,
    session: v1::SessionRef,
    attachment: u64,
}

impl Post {
    async fn carry_out(self, webhook: Option<Webhook>, topic: Arc<str>, messages: Vec<v1::Message>) -> Done {
        let count = messages.len();
        let result = match webhook {
            Some(webhook) => self.post(&webhook, &messages).await,
            None => Err("the app has no webhook any more".to_owned()),
        };
        let mut moved = false;
        if result.is_ok()
            && let Some(seq) =
                messages.iter().filter(|message| message.stored).map(|message| message.seq).max()
        {
            let ack = v1::Ack {
                session: Some(self.session),
                attachment: self.attachment,
                positions: vec![v1::AckPosition { topic: topic.to_string(), seq }],
            };
            match self.shared.directory.ask_saver(saver_request::Op::Ack(ack)).await {
                Ok(_) => {}
                Err(PeerError::Saver { code: saver_error::Code::SessionMoved, .. }) => moved = true,
                // A later ack moves the cursor further; if there is none, these events are posted once more.
                Err(error) => tracing::debug!(app = self.app, %error, "the cursor could not be moved"),
            }
        }
        Done { topic, outcome: Outcome::Posted { count, result, moved } }
    }

    async fn post(&self, webhook: &Webhook, messages: &[v1::Message]) -> Result<(), String> {
        let now = now_ms();
        let events: Vec<Event> = messages
            .iter()
            .filter(|message| message.expires_ms == 0 || message.expires_ms > now)
            .map(Event::of)
            .collect();
        if events.is_empty() {
            return Ok(());
        }
        let body = serde_json::to_vec(&events).map_err(|error| error.to_string())?;
        let mut request = self
            .shared
            .http
            .post(&webhook.url)
            .timeout(Duration::from_millis(webhook.timeout_ms))
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(secret) = &webhook.secret {
            request = request.header(SIGNATURE, signature(secret, &body));
        }
        let timer = self.shared.metrics.post_seconds.start_timer();
        // The URL may hold a secret, so errors are shown without it.
        let answer = request.body(body).send().await.map_err(|error| text_of(&error.without_url()));
        timer.observe_duration();
        let result = match answer {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(format!("the webhook answered {}", answer.status())),
            Err(error) => Err(error),
        };
        let outcome = if result.is_ok() { "ok" } else { "failed" };
        self.shared.metrics.posts.with_label_values(&[outcome]).inc();
        if result.is_ok() {
            for event in &events {
                self.shared.metrics.events.with_label_values(&[event.type_name()]).inc();
            }
        }
        result
    }
}

/// An error with what caused it.
fn text_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
