//! Attached to one registry instance: learns of upstream messages as they are accepted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::Instance;
use carillon_proto::{topic, v1};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use v1::{attach_down, attach_up};

use super::{Routes, Shared};

const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Stays attached for as long as the instance lives: the caller ends it.
pub async fn run(shared: Arc<Shared>, instance: Instance, mut routes: watch::Receiver<Routes>) {
    let mut backoff = BACKOFF.0;
    loop {
        match converse(&shared, &instance, &mut routes, &mut backoff).await {
            Ok(()) => tracing::debug!(registry = instance.id, "the attach stream ended"),
            Err(error) => tracing::debug!(registry = instance.id, %error, "cannot stay attached"),
        }
        tokio::time::sleep(backoff.mul_f64(rand::random_range(0.5..1.5))).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

async fn converse(
    shared: &Shared,
    instance: &Instance,
    routes: &mut watch::Receiver<Routes>,
    backoff: &mut Duration,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut client = shared.directory.registry(instance)?;
    let (up, outbound) = mpsc::channel(16);
    let hello = v1::Hello {
        instance: format!("{}/coordinator", shared.instance),
        incarnation: shared.incarnation,
        routes_only: true,
    };
    up.send(v1::AttachUp { body: Some(attach_up::Body::Hello(hello)) }).await?;
    let mut inbound = client.attach(ReceiverStream::new(outbound)).await?.into_inner();
    let mut announced: BTreeSet<String> = BTreeSet::new();
    // The apps of requests that are not answered yet.
    let mut requests: HashMap<u64, Vec<String>> = HashMap::new();
    let mut next_request = 1;
    routes.mark_changed();
    loop {
        tokio::select! {
            changed = routes.changed() => {
                changed?;
                let wanted: BTreeSet<String> = routes.borrow_and_update().keys().cloned().collect();
                let came: Vec<String> = wanted.difference(&announced).cloned().collect();
                let went = announced.difference(&wanted);
                let route = |app: &str, present| v1::Route { filter: format!("{app}/up/#"), present, last: 0 };
                let mut changes: Vec<v1::Route> = came.iter().map(|app| route(app, true)).collect();
                changes.extend(went.map(|app| route(app, false)));
                announced = wanted;
                if !changes.is_empty() {
                    requests.insert(next_request, came);
                    let announce = v1::Announce { request: next_request, routes: changes };
                    up.send(v1::AttachUp { body: Some(attach_up::Body::Announce(announce)) }).await?;
                    next_request += 1;
                }
            }
            message = inbound.message() => {
                let Some(message) = message? else { return Ok(()) };
                match message.body {
                    Some(attach_down::Body::Welcome(_)) => *backoff = BACKOFF.0,
                    Some(attach_down::Body::Announced(answer)) => {
                        // From now on nothing is missed; what came before is in the log.
                        let routes = routes.borrow().clone();
                        for app in requests.remove(&answer.request).unwrap_or_default() {
                            if let Some(inlet) = routes.get(&app) {
                                inlet.refresh.notify_one();
                            }
                        }
                    }
                    Some(attach_down::Body::Deliver(deliver)) => {
                        let routes = routes.borrow().clone();
                        hand_out(&routes, deliver.messages);
                    }
                    Some(attach_down::Body::Kick(_) | attach_down::Body::Control(_)) | None => {}
                }
            }
        }
    }
}

/// Never waits: an app whose queue is full looks into the logs later.
fn hand_out(routes: &BTreeMap<String, super::app::Inlet>, messages: Vec<v1::Message>) {
    for message in messages {
        if !topic::is_upstream(&message.topic) {
            continue;
        }
        if let Some(inlet) = routes.get(topic::app_of(&message.topic)) {
            inlet.offer(message);
        }
    }
}
