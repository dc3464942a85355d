//! Being discoverable: instances under leases, kept alive, and told how busy they are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::{v1, v1::keeper_client::KeeperClient};
use tokio::time::{Instant as Clock, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{STOP_TIMEOUT, call, is_refusal, spread};
use crate::{Instance, Shared};

/// When a keeper was lost, so it was for thousands: those whose leases have ended meanwhile register again over this time.
/// Each is an entry of the log.
const REGISTER_SPREAD: Duration = Duration::from_secs(2);
/// An instance that measures its load says it so soon after it has registered.
const FIRST_LOAD: Duration = Duration::from_millis(200);
/// A registration that the keeper refuses is tried again after this.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// A lease that an instance of this process is registered under.
pub(super) struct Registered {
    pub record: v1::InstanceRecord,
    pub lease: u64,
    pub ttl: Duration,
    pub keep_alive_at: Clock,
}

pub(super) type Registrations = BTreeMap<String, Registered>;

pub(super) fn leases_of(registered: &Registrations) -> BTreeMap<String, u64> {
    registered.iter().map(|(id, registration)| (id.clone(), registration.lease)).collect()
}

/// Registers what is to be registered, and keeps the leases alive.
pub(super) async fn register(
    shared: &Arc<Shared>,
    mut client: KeeperClient<Channel>,
    registered: &mut Registrations,
    leases: &tokio::sync::watch::Sender<BTreeMap<String, u64>>,
) -> Result<(), Status> {
    let mut wake = shared.wake.subscribe();
    let mut refused: BTreeMap<String, (v1::InstanceRecord, Clock)> = BTreeMap::new();
    loop {
        let wanted = {
            let board = shared.board.lock();
            let kinds = board.kinds();
            let record = |instance: &Instance| v1::InstanceRecord {
                process: shared.process,
                kinds: kinds.clone(),
                ..instance.to_record()
            };
            let wanted = board.registrations.iter().map(|(id, instance)| (id.clone(), record(instance)));
            wanted.collect::<Vec<_>>()
        };
        for (id, record) in wanted {
            let done = registered.get(&id).is_some_and(|registration| registration.record == record);
            let paused =
                refused.get(&id).is_some_and(|(tried, until)| *tried == record && Clock::now() < *until);
            if done || paused {
                continue;
            }
            let request = v1::RegisterRequest { instance: Some(record.clone()), ttl_ms: 0 };
            match call(client.register(request)).await {
                Ok(answer) => {
                    refused.remove(&id);
                    let ttl = Duration::from_millis(answer.ttl_ms);
                    let before = registered.get(&id).map(|registration| registration.lease);
                    let registration = Registered {
                        record,
                        lease: answer.lease,
                        ttl,
                        // The first is at once: it brings the load.
                        keep_alive_at: Clock::now()
                            + if shared.measures.lock().contains_key(&id) {
                                FIRST_LOAD.min(ttl / 3)
                            } else {
                                ttl / 3
                            },
                    };
                    if before != Some(answer.lease) {
                        tracing::info!(instance = id, ttl_ms = answer.ttl_ms, "registered with the keeper");
                        shared.board.lock().forget_told();
                    }
                    registered.insert(id, registration);
                    leases.send_replace(leases_of(registered));
                }
                Err(status) if is_refusal(status.code()) => {
                    tracing::error!(
                        instance = id,
                        reason = status.message(),
                        "registration refused by the keeper"
                    );
                    refused.insert(id, (record, Clock::now() + REFUSED_PAUSE));
                }
                Err(status) => return Err(status),
            }
        }
        let mut lost = Vec::new();
        for (id, registration) in registered.iter_mut() {
            if registration.keep_alive_at > Clock::now() {
                continue;
            }
            let measure = shared.measures.lock().get(id).cloned();
            let load = measure.map(|measure| measure().into_iter().collect()).unwrap_or_default();
            let request = v1::LeaseKeepAliveRequest { lease: registration.lease, load };
            match call(client.lease_keep_alive(request)).await {
                Ok(_) => registration.keep_alive_at = Clock::now() + registration.ttl / 3,
                Err(status) if status.code() == Code::NotFound => lost.push(id.clone()),
                // Its load, which it can be without.
                Err(status) if status.code() == Code::InvalidArgument => {
                    tracing::error!(instance = id, reason = status.message(), "load refused by the keeper");
                    shared.measures.lock().remove(id);
                }
                Err(status) => return Err(status),
            }
        }
        if !lost.is_empty() {
            let pause = spread(REGISTER_SPREAD);
            let pause_ms = pause.as_millis() as u64;
            tracing::warn!(instances = lost.join(", "), pause_ms, "lease lost, registering again");
            registered.retain(|id, _| !lost.contains(id));
            sleep(pause).await;
            continue;
        }
        let next = registered
            .values()
            .map(|registration| registration.keep_alive_at)
            .chain(refused.values().map(|(_, until)| *until))
            .min()
            .unwrap_or_else(|| Clock::now() + Duration::from_secs(3600));
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            Ok(()) = wake.changed() => {}
        }
    }
}

pub(super) async fn deregister(mut client: KeeperClient<Channel>, registered: Registrations) {
    let revoke = async {
        for (id, registration) in registered {
            let request = v1::LeaseRevokeRequest { lease: registration.lease };
            if let Err(status) = client.lease_revoke(request).await {
                tracing::debug!(
                    instance = id,
                    error = status.message(),
                    "not deregistered, the lease will lapse"
                );
            }
        }
    };
    if timeout(STOP_TIMEOUT, revoke).await.is_err() {
        tracing::debug!("keeper did not answer in time, leases will lapse");
    }
}
