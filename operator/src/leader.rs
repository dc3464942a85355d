//! Which of several operators acts: the one that holds a Lease. It stops acting before the lease can be another's, also
//! when it was held up itself: what it holds ends by its own clock, and the [`fence`] lets nothing through after that.

use std::task::{self, Poll};
use std::time::Duration;

use futures::TryFutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::client::{Body, ClientBuilder};
use kube::{Api, Client, Config};
use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Layer, Service};

/// Name of the Lease.
pub const LEASE: &str = "carillon-operator";
/// The shortest that makes sense: a call may take a sixth of it.
pub const MIN_DURATION: Duration = Duration::from_secs(6);

/// Whose lease, and for how long.
#[derive(Debug, Clone)]
pub struct LeaseOptions {
    pub namespace: String,
    pub identity: String,
    /// Renewed each third of it. Whole seconds.
    pub duration: Duration,
}

/// Why this process must not act any more.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    #[error("the lease {LEASE} cannot be held: {0}")]
    Client(#[source] kube::Error),
    #[error("the lease {LEASE} is another's now")]
    Lost,
    #[error("the lease {LEASE} could not be renewed in time: {0}")]
    NotRenewed(String),
}

/// What is known of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The API server has not answered yet.
    Unknown,
    Another,
    /// It is ours until then, whatever comes between.
    Ours(Instant),
}

/// Does this process act? A cheap handle.
#[derive(Clone)]
pub struct Leadership {
    state: watch::Receiver<State>,
    stop: CancellationToken,
}

/// Nobody leads yet.
pub fn leadership(stop: CancellationToken) -> (watch::Sender<State>, Leadership) {
    let (sender, state) = watch::channel(State::Unknown);
    (sender, Leadership { state, stop })
}

fn holds(state: &State) -> bool {
    matches!(state, State::Ours(until) if Instant::now() < *until)
}

impl Leadership {
    /// It may write now. What was begun before the process was told to stop may still be brought to its end.
    pub fn may_write(&self) -> bool {
        holds(&self.state.borrow())
    }

    /// The same, for what knows no leases, such as a keeper: asked before each change.
    pub fn fence(&self) -> Result<(), Fenced> {
        if self.may_write() { Ok(()) } else { Err(Fenced) }
    }

    /// Waits until this process acts; false if it never will.
    pub async fn wait(&self) -> bool {
        let mut state = self.state.clone();
        let leading = async { state.wait_for(holds).await.is_ok() };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => false,
            leads = leading => leads,
        }
    }

    /// The API server has said who leads, if only that it is another.
    pub fn is_known(&self) -> bool {
        *self.state.borrow() != State::Unknown
    }
}

/// A write of one who does not lead, which was not sent.
#[derive(Debug, thiserror::Error)]
#[error("not written: this operator does not lead (any more)")]
pub struct Fenced;

/// A client whose calls that change something fail while this process does not lead.
pub fn fence(mut config: Config, leadership: Leadership) -> Result<Client, kube::Error> {
    // Repeated behind the fence it would be sent without being asked about.
    config.default_retry = false;
    let layer = Fence { leadership };
    Ok(ClientBuilder::try_from(config)?.with_layer(&layer).build())
}

#[derive(Clone)]
struct Fence {
    leadership: Leadership,
}

impl<S> Layer<S> for Fence {
    type Service = Behind<S>;

    fn layer(&self, inner: S) -> Behind<S> {
        Behind { inner, leadership: self.leadership.clone() }
    }
}

struct Behind<S> {
    inner: S,
    leadership: Leadership,
}

impl<S> Service<http::Request<Body>> for Behind<S>
where
    S: Service<http::Request<Body>, Future: Send + 'static, Error: Into<BoxError> + 'static>,
    S::Response: 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if *request.method() != http::Method::GET && !self.leadership.may_write() {
            return Box::pin(async { Err(Fenced.into()) });
        }
        Box::pin(self.inner.call(request).map_err(Into::into))
    }
}

/// Takes the lease when it is free, renews it, and tells `sender`. Ends without an error only when told to stop.
pub async fn hold(
    mut config: Config,
    options: LeaseOptions,
    sender: watch::Sender<State>,
    metric: IntGauge,
    stop: CancellationToken,
) -> Result<(), LeaderError> {
    let duration = options.duration.max(MIN_DURATION);
    // A call that hangs is a failure long before the lease ends.
    let call = duration / 6;
    config.default_retry = false;
    let client = Client::try_from(config).map_err(LeaderError::Client)?;
    let mut candidate = Candidate {
        leases: Api::namespaced(client, &options.namespace),
        identity: options.identity,
        duration,
        seen: None,
    };
    let tell = |state: State| {
        metric.set(i64::from(matches!(state, State::Ours(_))));
        sender.send_replace(state);
    };
    let mut until: Option<Instant> = None;
    loop {
        let began = Instant::now();
        let attempt = tokio::time::timeout(call, candidate.attempt()).await;
        let attempt = attempt.unwrap_or_else(|_| Err(format!("no answer within {call:?}")));
        let again = match (attempt, until) {
            (Ok(true), before) => {
                if before.is_none() {
                    tracing::info!(identity = candidate.identity, "this operator leads");
                }
                // Others count from when they have seen the renewal, which is later.
                until = Some(began + duration);
                tell(State::Ours(began + duration));
                duration / 3
            }
            (Ok(false), Some(_)) => {
                tell(State::Another);
                return Err(LeaderError::Lost);
            }
            (Ok(false), None) => {
                tell(State::Another);
                call
            }
            (Err(error), Some(end)) if Instant::now() + call >= end => {
                tell(State::Another);
                return Err(LeaderError::NotRenewed(error));
            }
            (Err(error), _) => {
                tracing::warn!(
                    error,
                    leading = until.is_some(),
                    "the lease cannot be looked at or renewed at present"
                );
                call / 2
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(again) => {}
        }
    }
    tell(State::Another);
    if until.is_some() {
        let released = tokio::time::timeout(call, candidate.release()).await;
        match released.unwrap_or_else(|_| Err(format!("no answer within {call:?}"))) {
            Ok(()) => tracing::info!("the lease is given back"),
            Err(error) => tracing::warn!(error, "the lease is not given back: it will run out"),
        }
    }
    Ok(())
}

/// One who wants the lease.
struct Candidate {
    leases: Api<Lease>,
    identity: String,
    duration: Duration,
    /// The lease of another as it was seen last, and since when it has been so: clocks of others are not relied on.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// Looks at the lease, and takes or renews it if that can be done. Is it ours?
    async fn attempt(&mut self) -> Result<bool, String> {
        let found = self.leases.get_opt(LEASE).await.map_err(|error| error.to_string())?;
        let now = Timestamp::now();
        let Some(mut lease) = found else {
            let mut lease = Lease { spec: Some(self.renewed(None, now)), ..Lease::default() };
            lease.metadata.name = Some(LEASE.to_owned());
            let created = self.leases.create(&PostParams::default(), &lease).await;
            return created.map(|_| true).map_err(|error| error.to_string());
        };
        let spec = lease.spec.take().unwrap_or_default();
        if !self.is_free(&spec, Instant::now()) {
            return Ok(false);
        }
        lease.spec = Some(self.renewed(Some(&spec), now));
        // Refused when it is not as it was looked at: of two who write at a time one looks again.
        let replaced = self.leases.replace(LEASE, &PostParams::default(), &lease).await;
        replaced.map(|_| true).map_err(|error| error.to_string())
    }

    /// It is ours, nobody's, or has not been renewed for as long as it holds.
    fn is_free(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            self.seen = None;
            return true;
        }
        let since = match &self.seen {
            Some((seen, since)) if seen == spec => *since,
            _ => now,
        };
        self.seen = Some((spec.clone(), since));
        let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or_default()).unwrap_or_default();
        now.duration_since(since) >= Duration::from_secs(seconds)
    }

    fn renewed(&self, before: Option<&LeaseSpec>, now: Timestamp) -> LeaseSpec {
        let ours = before.filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.map_or(0, |spec| spec.lease_transitions.unwrap_or(0));
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.duration.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: ours.and_then(|spec| spec.acquire_time.clone()).or(Some(MicroTime(now))),
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(if ours.is_some() { transitions } else { transitions.saturating_add(1) }),
            ..before.cloned().unwrap_or_default()
        }
    }

    /// Makes it nobody's, if it is ours.
    async fn release(&self) -> Result<(), String> {
        let found = self.leases.get_opt(LEASE).await.map_err(|error| error.to_string())?;
        let Some(mut lease) = found else { return Ok(()) };
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Ok(());
        }
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        let replaced = self.leases.replace(LEASE, &PostParams::default(), &lease).await;
        replaced.map(drop).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(identity: &str) -> Candidate {
        let config = Config::new("http://127.0.0.1:1".parse().unwrap());
        Candidate {
            leases: Api::namespaced(Client::try_from(config).unwrap(), "here"),
            identity: identity.to_owned(),
            duration: Duration::from_secs(15),
            seen: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[tokio::test]
    async fn a_lease_is_free_when_it_was_seen_unchanged_for_as_long_as_it_holds() {
        let (first, mut second) = (candidate("first"), candidate("second"));
        let (start, seconds) = (Instant::now(), Duration::from_secs);
        // The clock of the first is years behind: that does not matter.
        let lease = first.renewed(None, at(0));
        assert!(!second.is_free(&lease, start));
        assert!(!second.is_free(&lease, start + seconds(14)));
        let renewed = first.renewed(Some(&lease), at(5));
        assert!(!second.is_free(&renewed, start + seconds(16)), "it counts from when the renewal was seen");
        assert!(!second.is_free(&renewed, start + seconds(30)));
        assert!(second.is_free(&renewed, start + seconds(31)));
        let given_back = LeaseSpec { holder_identity: None, ..renewed.clone() };
        assert!(second.is_free(&given_back, start));
        assert!(candidate("first").is_free(&renewed, start), "it is its own after a restart");
    }

    #[tokio::test]
    async fn a_lease_says_who_holds_it_since_when() {
        let (first, second) = (candidate("first"), candidate("second"));
        let taken = first.renewed(None, at(1));
        let renewed = first.renewed(Some(&taken), at(6));
        assert_eq!(
            (&renewed.acquire_time, &renewed.renew_time),
            (&taken.acquire_time, &Some(MicroTime(at(6))))
        );
        assert_eq!((renewed.lease_transitions, renewed.lease_duration_seconds), (Some(1), Some(15)));
        let other = second.renewed(Some(&renewed), at(30));
        assert_eq!(other.holder_identity.as_deref(), Some("second"));
        assert_eq!((other.acquire_time, other.lease_transitions), (Some(MicroTime(at(30))), Some(2)));
    }

    #[tokio::test]
    async fn who_leads_stops_by_its_own_clock() {
        let stop = CancellationToken::new();
        let (sender, leadership) = leadership(stop.clone());
        assert!(!leadership.may_write() && !leadership.is_known());
        sender.send_replace(State::Another);
        assert!(!leadership.may_write() && leadership.is_known());
        sender.send_replace(State::Ours(Instant::now() + Duration::from_secs(2)));
        assert!(leadership.wait().await && leadership.may_write());
        // Nobody has told it anything.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!leadership.may_write());
        stop.cancel();
        assert!(!leadership.wait().await);
    }

    #[tokio::test]
    async fn what_changes_something_is_not_sent_by_one_who_does_not_lead() {
        let (sender, leadership) = leadership(CancellationToken::new());
        // Nothing listens there.
        let config = Config::new("http://127.0.0.1:1".parse().unwrap());
        let leases: Api<Lease> = Api::namespaced(fence(config, leadership).unwrap(), "here");
        let write = async || leases.delete(LEASE, &Default::default()).await.unwrap_err();
        let read = async || leases.get(LEASE).await.unwrap_err();
        let is_fenced = |error: &kube::Error| match error {
            kube::Error::Service(cause) => cause.is::<Fenced>(),
            _ => false,
        };
        assert!(is_fenced(&write().await));
        assert!(!is_fenced(&read().await));
        sender.send_replace(State::Ours(Instant::now() + Duration::from_secs(60)));
        assert!(!is_fenced(&write().await));
        sender.send_replace(State::Another);
        assert!(is_fenced(&write().await));
    }
}
