//! Which of several operators acts: the one that holds a Lease. It stops acting before the lease can be another's.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Client, Config};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseParams};
use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Name of the Lease.
pub const LEASE: &str = "carillon-operator";
/// The shortest that makes sense: a renewal may take a sixth of it.
pub const MIN_DURATION: Duration = Duration::from_secs(6);

/// After a failure, before the next attempt.
const RETRY: Duration = Duration::from_millis(500);

/// Whose lease, and for how long.
#[derive(Debug, Clone)]
pub struct LeaseOptions {
    pub namespace: String,
    pub identity: String,
    /// Renewed each third of it.
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

/// Does this process act? A cheap handle.
#[derive(Clone)]
pub struct Leadership {
    leads: watch::Receiver<bool>,
    stop: CancellationToken,
}

/// Nobody leads yet.
pub fn leadership(stop: CancellationToken) -> (watch::Sender<bool>, Leadership) {
    let (sender, leads) = watch::channel(false);
    (sender, Leadership { leads, stop })
}

impl Leadership {
    pub fn leads(&self) -> bool {
        *self.leads.borrow() && !self.stop.is_cancelled()
    }

    /// Waits until this process acts; false if it never will.
    pub async fn wait(&self) -> bool {
        let mut leads = self.leads.clone();
        let leading = async { leads.wait_for(|leads| *leads).await.is_ok() };
        tokio::select! {
            () = self.stop.cancelled() => false,
            leads = leading => leads,
        }
    }

    /// The API server has said who leads, if only that it is another.
    pub fn is_known(&self) -> bool {
        self.leads.has_changed().unwrap_or(true) || *self.leads.borrow()
    }
}

/// Takes the lease when it is free, renews it, and tells `leads`. Ends without an error only when told to stop.
pub async fn hold(
    mut config: Config,
    options: LeaseOptions,
    leads: watch::Sender<bool>,
    metric: IntGauge,
    stop: CancellationToken,
) -> Result<(), LeaderError> {
    let duration = options.duration.max(MIN_DURATION);
    let call = duration / 6;
    // A call that hangs is a failure long before the lease ends.
    config.connect_timeout = Some(call);
    config.read_timeout = Some(call);
    config.write_timeout = Some(call);
    let client = Client::try_from(config).map_err(LeaderError::Client)?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), &options.namespace);
    let manager = loop {
        match build(client.clone(), &options, duration).await {
            Ok(manager) => break Arc::new(manager),
            Err(error) => tracing::warn!(%error, "the lease cannot be read yet"),
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(duration / 3) => {}
        }
    };
    // Whoever asks knows from now on that the API server answers.
    leads.send_replace(false);
    let mut trouble: Option<(Instant, String)> = None;
    let mut leading = false;
    let mut changed = Box::pin(change(manager.clone()));
    loop {
        let deadline = trouble.as_ref().map(|(since, _)| *since + call);
        tokio::select! {
            () = stop.cancelled() => break,
            () = at(deadline) => {
                let Some((_, error)) = trouble.take() else { continue };
                // The manager does not say when it has succeeded again: the lease itself does.
                if leading && !renewed(&leases, &options.identity, duration / 2).await {
                    metric.set(0);
                    leads.send_replace(false);
                    return Err(LeaderError::NotRenewed(error));
                }
            }
            result = &mut changed => {
                match result {
                    Ok(true) => {
                        tracing::info!(identity = options.identity, "this operator leads");
                        (leading, trouble) = (true, None);
                        metric.set(1);
                        leads.send_replace(true);
                    }
                    Ok(false) if leading => {
                        metric.set(0);
                        leads.send_replace(false);
                        return Err(LeaderError::Lost);
                    }
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(error, leading, "the lease cannot be taken or renewed at present");
                        trouble.get_or_insert((Instant::now(), error));
                        tokio::time::sleep(RETRY).await;
                    }
                }
                changed = Box::pin(change(manager.clone()));
            }
        }
    }
    drop(changed);
    metric.set(0);
    leads.send_replace(false);
    // It panics when the lease is another's already, so it has a task of its own.
    let release = tokio::spawn(async move { manager.release().await.map_err(|error| error.to_string()) });
    match tokio::time::timeout(call, release).await {
        Ok(Ok(Ok(()))) => tracing::info!("the lease is given back"),
        Ok(Ok(Err(error))) => tracing::warn!(error, "the lease is not given back: it will run out"),
        Ok(Err(_)) | Err(_) => tracing::warn!("the lease is not given back: it will run out"),
    }
    Ok(())
}

async fn build(
    client: Client,
    options: &LeaseOptions,
    duration: Duration,
) -> Result<LeaseManager, kube_lease_manager::LeaseManagerError> {
    // It renews so long before the end: a third of the time after the last one.
    let (duration, grace) = (duration.as_secs(), (duration * 2 / 3).as_secs());
    LeaseManagerBuilder::new(client, LEASE)
        .with_namespace(&options.namespace)
        .with_parameters(LeaseParams::new(&options.identity, duration, grace))
        .build()
        .await
}

async fn change(manager: Arc<LeaseManager>) -> Result<bool, String> {
    manager.changed().await.map_err(|error| error.to_string())
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The lease is ours, and was renewed not longer ago than `within`.
async fn renewed(leases: &Api<Lease>, identity: &str, within: Duration) -> bool {
    match leases.get_opt(LEASE).await {
        Ok(Some(lease)) => is_fresh(&lease, identity, Timestamp::now(), within),
        Ok(None) | Err(_) => false,
    }
}

fn is_fresh(lease: &Lease, identity: &str, now: Timestamp, within: Duration) -> bool {
    let Some(spec) = &lease.spec else { return false };
    let is_ours = spec.holder_identity.as_deref() == Some(identity);
    let age = spec.renew_time.as_ref().map(|renewed| now.duration_since(renewed.0));
    is_ours && age.is_some_and(|age| age.unsigned_abs() <= within)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

    use super::*;

    #[test]
    fn a_lease_is_ours_while_it_is_fresh() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let lease = |holder: Option<&str>, renewed| Lease {
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                renew_time: Some(MicroTime(at(renewed))),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        };
        let within = Duration::from_secs(7);
        assert!(is_fresh(&lease(Some("a"), 100), "a", at(107), within));
        assert!(!is_fresh(&lease(Some("a"), 100), "a", at(108), within));
        assert!(!is_fresh(&lease(Some("b"), 100), "a", at(100), within));
        assert!(!is_fresh(&lease(None, 100), "a", at(100), within));
        assert!(!is_fresh(&Lease::default(), "a", at(100), within));
    }

    #[tokio::test]
    async fn who_waits_to_lead_is_told_when_it_never_will() {
        let stop = CancellationToken::new();
        let (sender, leadership) = leadership(stop.clone());
        assert!(!leadership.leads() && !leadership.is_known());
        sender.send_replace(false);
        assert!(!leadership.leads() && leadership.is_known());
        let waiting = tokio::spawn({
            let leadership = leadership.clone();
            async move { leadership.wait().await }
        });
        sender.send_replace(true);
        assert!(waiting.await.unwrap() && leadership.leads());
        stop.cancel();
        assert!(!leadership.leads());
        sender.send_replace(false);
        assert!(!leadership.wait().await);
    }
}
