//! Attached to one registry instance: what the filters match comes in.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use carillon_agent::Instance;
use carillon_proto::{topic, v1};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use v1::{attach_down, attach_up};

use super::{Inlet, Routes, Shared};

const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// After an owner answered that it is not, before it is asked again: it may not have heard yet.
const NOT_OWNER_RETRY: Duration = Duration::from_millis(50);

/// Stays attached for as long as the instance lives: the caller ends it.
pub async fn run(shared: Arc<Shared>, instance: Instance) {
    let mut backoff = BACKOFF.0;
    loop {
        match converse(&shared, &instance, &mut backoff).await {
            Ok(()) => tracing::debug!(registry = instance.id, "the attach stream ended"),
            Err(error) => tracing::debug!(registry = instance.id, %error, "cannot stay attached"),
        }
        shared.routed.lost(&instance.id, instance.incarnation);
        tokio::time::sleep(backoff.mul_f64(rand::random_range(0.5..1.5))).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// What the registry is to know, each filter with the epoch under which it owns the slot (0: it has wildcards).
type Announced = BTreeMap<Arc<str>, u64>;

async fn converse(
    shared: &Shared,
    instance: &Instance,
    backoff: &mut Duration,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut routes = shared.routes.subscribe();
    let mut slots = shared.directory.agent().slots();
    let mut client = shared.directory.registry(instance)?;
    let (up, outbound) = mpsc::channel(16);
    let hello = v1::Hello {
        instance: shared.identity.name.clone(),
        incarnation: shared.identity.incarnation,
        routes_only: true,
    };
    up.send(v1::AttachUp { body: Some(attach_up::Body::Hello(hello)) }).await?;
    let mut inbound = client.attach(ReceiverStream::new(outbound)).await?.into_inner();
    let mut announced = Announced::new();
    // The filters of requests that are not answered yet, in their order.
    let mut requests: HashMap<u64, Vec<Arc<str>>> = HashMap::new();
    let mut next_request = 1;
    let mut look_at = Some(Instant::now());
    let mut now = routes.borrow().clone();
    loop {
        let until = look_at.unwrap_or_else(|| Instant::now() + BACKOFF.1);
        tokio::select! {
            changed = routes.changed() => { changed?; look_at = Some(Instant::now()) }
            changed = slots.changed() => { changed?; look_at = Some(Instant::now()) }
            () = tokio::time::sleep_until(until), if look_at.is_some() => {
                look_at = None;
                now = routes.borrow_and_update().clone();
                slots.borrow_and_update();
                let (came, went) = changes(shared, instance, &now, &mut announced);
                if !came.is_empty() || !went.is_empty() {
                    let route = |filter: &Arc<str>, present| {
                        v1::Route { filter: filter.to_string(), present, last: 0 }
                    };
                    let mut routes: Vec<v1::Route> = came.iter().map(|filter| route(filter, true)).collect();
                    routes.extend(went.iter().map(|filter| route(filter, false)));
                    requests.insert(next_request, came);
                    let announce = v1::Announce { request: next_request, routes };
                    up.send(v1::AttachUp { body: Some(attach_up::Body::Announce(announce)) }).await?;
                    next_request += 1;
                }
            }
            message = inbound.message() => {
                let Some(message) = message? else { return Ok(()) };
                match message.body {
                    Some(attach_down::Body::Welcome(_)) => *backoff = BACKOFF.0,
                    Some(attach_down::Body::Announced(answer)) => {
                        let asked = requests.remove(&answer.request).unwrap_or_default();
                        for (place, filter) in asked.iter().enumerate() {
                            if answer.not_owner.contains(&(place as u32)) {
                                announced.remove(filter);
                                look_at = Some(Instant::now() + NOT_OWNER_RETRY);
                                continue;
                            }
                            // From now on nothing is missed; what came before is in the log, which is looked at before it
                            // goes on.
                            for inlet in now.by_filter.get(filter).into_iter().flatten() {
                                inlet.refresh.notify_one();
                            }
                            if announced.contains_key(filter) {
                                shared.routed.add(filter, &instance.id, instance.incarnation);
                            }
                        }
                    }
                    Some(attach_down::Body::Deliver(deliver)) => {
                        if !deliver.broadcast.is_empty() {
                            // One receiver among very many: nothing for the job to wait for.
                            let job = deliver.broadcast;
                            let progress = v1::BroadcastProgress { job, total: 0, done: 0, finished: true };
                            up.send(v1::AttachUp { body: Some(attach_up::Body::Progress(progress)) }).await?;
                        }
                        for message in deliver.messages {
                            now.tree.matching(&message.topic, |inlets: &Vec<Inlet>| {
                                inlets.iter().for_each(|inlet| inlet.offer(&message));
                            });
                        }
                    }
                    Some(attach_down::Body::Kick(_) | attach_down::Body::Control(_)) | None => {}
                }
            }
        }
    }
}

/// What this registry is to be told: filters that it must know from now on, and that it need not any more.
fn changes(
    shared: &Shared,
    instance: &Instance,
    routes: &Routes,
    announced: &mut Announced,
) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
    let wanted = wanted(shared, instance, routes);
    let went = announced.keys().filter(|filter| !wanted.contains_key(*filter));
    let went: Vec<Arc<str>> = went.cloned().collect();
    let came = wanted.iter().filter(|(filter, epoch)| announced.get(*filter) != Some(epoch));
    let came: Vec<Arc<str>> = came.map(|(filter, _)| filter.clone()).collect();
    for filter in &went {
        shared.routed.remove(filter, &instance.id, instance.incarnation);
    }
    *announced = wanted;
    (came, went)
}

fn wanted(shared: &Shared, instance: &Instance, routes: &Routes) -> Announced {
    let slots = shared.directory.slots();
    let epoch = |filter: &Arc<str>| {
        if topic::is_wildcard(filter) {
            return Some(0);
        }
        let (_, owner) = slots.owner_of(filter)?;
        let is_this = *owner.instance == *instance.id && owner.incarnation == instance.incarnation;
        is_this.then_some(owner.epoch)
    };
    routes.by_filter.keys().filter_map(|filter| Some((filter.clone(), epoch(filter)?))).collect()
}
