//! One long-lived stream to one registry instance: what we subscribe to goes up, messages come down.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::v1::{self, attach_down, attach_up};
use carillon_proto::{MAX_GRPC_MESSAGE_BYTES, topic};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use super::{AttachCommand, BroadcastCount, Inner};
use crate::delivery::Delivery;
use crate::event::{ConnId, Event, KickReason};

/// Routes in one Announce.
const ANNOUNCE_BATCH: usize = 4096;
/// After an owner answered that it is not, before it is asked again: it may not have heard yet.
const NOT_OWNER_RETRY: Duration = Duration::from_millis(50);

type Up = mpsc::Sender<v1::AttachUp>;

pub(super) async fn run(
    inner: Arc<Inner>,
    registry: Arc<str>,
    endpoint: Endpoint,
    mut commands: mpsc::Receiver<AttachCommand>,
    overflowed: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut backoff = Duration::from_millis(20);
    loop {
        let round = converse(&inner, &registry, &endpoint, &mut commands, &overflowed, &mut backoff);
        let error = tokio::select! {
            error = round => error,
            () = stop.cancelled() => break,
        };
        tracing::debug!(%registry, %error, "not attached, trying again");
        inner.routes.wild_forgotten(&registry);
        let wait = backoff.mul_f64(0.5 + rand::random::<f64>());
        backoff = (backoff * 2).min(Duration::from_secs(2));
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => break,
        }
    }
    inner.routes.wild_forgotten(&registry);
    inner.release_broadcasts(&registry);
}

/// Attaches and stays until the stream ends; gives the reason.
async fn converse(
    inner: &Arc<Inner>,
    registry: &Arc<str>,
    endpoint: &Endpoint,
    commands: &mut mpsc::Receiver<AttachCommand>,
    overflowed: &Notify,
    backoff: &mut Duration,
) -> String {
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    let mut client = v1::registry_client::RegistryClient::new(channel)
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let (up, outbound) = mpsc::channel(256);
    let hello =
        v1::Hello { instance: inner.instance.clone(), incarnation: inner.incarnation, routes_only: false };
    let mut stream = Stream { up, next_request: 1, asked: HashMap::new(), again: HashSet::new() };
    if stream.send(attach_up::Body::Hello(hello)).await.is_err() {
        return "the stream could not be opened".to_owned();
    }
    let mut down = match client.attach(ReceiverStream::new(outbound)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.to_string(),
    };
    *backoff = Duration::from_millis(20);
    inner.metrics.attached.inc();
    let reason = stream.speak(inner, registry, commands, overflowed, &mut down).await;
    inner.metrics.attached.dec();
    reason
}

struct Stream {
    up: Up,
    next_request: u64,
    /// What was said in each Announce that is not answered yet, in its order.
    asked: HashMap<u64, Vec<Asked>>,
    /// Slots that the registry said are not its own, though the keeper says they are.
    again: HashSet<u32>,
}

struct Ended;

struct Asked {
    filter: Arc<str>,
    present: bool,
}

/// Slots whose topics have been announced; each shard announces its sessions in them and drops this. With the last of
/// them it is said that this was all: the queue to the registry keeps the order.
pub struct SlotAnnouncement {
    inner: Arc<Inner>,
    registry: Arc<str>,
    complete: Vec<v1::SlotEpoch>,
}

impl SlotAnnouncement {
    /// Is this slot one of them?
    pub fn has(&self, slot: u32) -> bool {
        // In the order of slots, as they were looked through.
        self.complete.binary_search_by_key(&slot, |complete| complete.slot).is_ok()
    }
}

impl Drop for SlotAnnouncement {
    fn drop(&mut self) {
        let complete = std::mem::take(&mut self.complete);
        self.inner.to(&self.registry, AttachCommand::Complete(complete));
    }
}

impl Stream {
    async fn send(&self, body: attach_up::Body) -> Result<(), Ended> {
        self.up.send(v1::AttachUp { body: Some(body) }).await.map_err(|_| Ended)
    }

    async fn speak(
        &mut self,
        inner: &Arc<Inner>,
        registry: &Arc<str>,
        commands: &mut mpsc::Receiver<AttachCommand>,
        overflowed: &Notify,
        down: &mut tonic::Streaming<v1::AttachDown>,
    ) -> String {
        let ended = "the registry ended the stream".to_owned();
        // It knows nothing of us: all that is its business, from the start. What is in the queue is looked up when
        // it is sent, so it does no harm that it may be told twice.
        if self.announce_everything(inner, registry).await.is_err() {
            return ended;
        }
        let mut taken = Vec::new();
        let mut retry = tokio::time::interval(NOT_OWNER_RETRY);
        loop {
            tokio::select! {
                () = overflowed.notified() => return "announcements were lost, all are made again".to_owned(),
                received = down.message() => match received {
                    Ok(Some(v1::AttachDown { body: Some(body) })) => self.received(inner, registry, body).await,
                    Ok(Some(_)) => {}
                    Ok(None) => return ended,
                    Err(status) => return status.to_string(),
                },
                count = commands.recv_many(&mut taken, ANNOUNCE_BATCH) => {
                    if count == 0 {
                        return "no longer wanted".to_owned();
                    }
                    if self.told(inner, registry, &mut taken).await.is_err() {
                        return ended;
                    }
                }
                _ = retry.tick(), if !self.again.is_empty() => {
                    let slots: Vec<u32> = self.again.drain().collect();
                    if self.announce_slots(inner, registry, &slots).await.is_err() {
                        return ended;
                    }
                }
            }
        }
    }

    async fn announce_everything(&mut self, inner: &Arc<Inner>, registry: &Arc<str>) -> Result<(), Ended> {
        for filters in inner.routes.wild_filters().chunks(ANNOUNCE_BATCH) {
            let routes = filters.iter().map(|filter| (filter.clone(), true, 0)).collect();
            self.announce(routes).await?;
        }
        let map = inner.slots.load_full();
        let mine = (0..map.slots.len()).filter(|&slot| map.slots[slot].instance == *registry);
        let mine: Vec<u32> = mine.map(|slot| slot as u32).collect();
        self.announce_slots(inner, registry, &mine).await
    }

    /// All topics of these slots, then all sessions, then that this was all.
    async fn announce_slots(
        &mut self,
        inner: &Arc<Inner>,
        registry: &Arc<str>,
        slots: &[u32],
    ) -> Result<(), Ended> {
        let map = inner.slots.load_full();
        let mut complete = Vec::new();
        let mut routes = Vec::new();
        let mut slots = slots.to_vec();
        slots.sort_unstable();
        slots.dedup();
        for slot in slots {
            // It may have moved on meanwhile; then its new owner is told.
            let Some(owner) = map.slots.get(slot as usize).filter(|owner| owner.instance == *registry) else {
                continue;
            };
            complete.push(v1::SlotEpoch { slot, epoch: owner.epoch });
            for (topic, last) in inner.routes.topics_of_slot(slot) {
                routes.push((topic, true, last));
                if routes.len() >= ANNOUNCE_BATCH {
                    self.announce(std::mem::take(&mut routes)).await?;
                }
            }
        }
        if !routes.is_empty() {
            self.announce(routes).await?;
        }
        if !complete.is_empty() {
            inner.announce_wills(registry, &complete);
            let announcement =
                SlotAnnouncement { inner: inner.clone(), registry: registry.clone(), complete };
            let announcement = Arc::new(announcement);
            for shard in inner.shards() {
                shard.post(Event::AnnounceSessions(announcement.clone()));
            }
        }
        Ok(())
    }

    async fn announce(&mut self, routes: Vec<(Arc<str>, bool, u64)>) -> Result<(), Ended> {
        let request = self.next_request;
        self.next_request += 1;
        let wire = routes.iter().map(|(filter, present, last)| v1::Route {
            filter: String::from(&**filter),
            present: *present,
            last: *last,
        });
        let announce = v1::Announce { request, routes: wire.collect() };
        let asked = routes.into_iter().map(|(filter, present, _)| Asked { filter, present });
        self.asked.insert(request, asked.collect());
        self.send(attach_up::Body::Announce(announce)).await
    }

    /// Passes on what the shards and the other tasks had to say.
    async fn told(
        &mut self,
        inner: &Arc<Inner>,
        registry: &Arc<str>,
        commands: &mut Vec<AttachCommand>,
    ) -> Result<(), Ended> {
        let mut routes = Vec::new();
        let mut changes = Vec::new();
        let mut complete = Vec::new();
        for command in commands.drain(..) {
            match command {
                AttachCommand::Route(topic) => {
                    let (present, last) = inner.routes.state(&topic);
                    routes.push((topic, present, last));
                }
                AttachCommand::WildRoute(filter) => {
                    let present = inner.routes.is_wild_present(&filter);
                    routes.push((filter, present, 0));
                }
                AttachCommand::Slots(slots) => self.announce_slots(inner, registry, &slots).await?,
                AttachCommand::Session(change) => changes.push(change),
                AttachCommand::Complete(slots) => complete.extend(slots),
                AttachCommand::Progress(progress) => self.send(attach_up::Body::Progress(progress)).await?,
                AttachCommand::Report(report) => self.send(attach_up::Body::Report(report)).await?,
            }
        }
        if !routes.is_empty() {
            self.announce(routes).await?;
        }
        if !changes.is_empty() {
            self.send(attach_up::Body::Sessions(v1::SessionChanges { changes })).await?;
        }
        if !complete.is_empty() {
            self.send(attach_up::Body::Complete(v1::SlotComplete { slots: complete })).await?;
        }
        Ok(())
    }

    async fn received(&mut self, inner: &Arc<Inner>, registry: &Arc<str>, body: attach_down::Body) {
        match body {
            attach_down::Body::Welcome(_) => {}
            attach_down::Body::Announced(announced) => self.announced(inner, registry, &announced),
            attach_down::Body::Deliver(deliver) => {
                // A shard that is far behind holds this stream up, and so the registry: it bounds what it queues for us
                // and ends the stream at the bound; the logs are then read from where we are.
                while inner.shards().iter().any(|shard| shard.is_full()) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                self::deliver(inner, registry, deliver);
            }
            attach_down::Body::Kick(kick) => self::kick(inner, &kick),
            attach_down::Body::Control(control) => inner.broadcast_control(&control),
        }
    }

    fn announced(&mut self, inner: &Arc<Inner>, registry: &Arc<str>, announced: &v1::Announced) {
        let Some(filters) = self.asked.remove(&announced.request) else { return };
        let refused: HashSet<u32> = announced.not_owner.iter().copied().collect();
        let retained: HashSet<u32> = announced.retained.iter().copied().collect();
        let registries = inner.registry_names();
        for (i, Asked { filter, present }) in filters.iter().enumerate() {
            // The answer to "absent" says nothing about a subscriber that has come since: that one was announced anew.
            if !present {
                continue;
            }
            if refused.contains(&(i as u32)) {
                let slot = topic::slot_of(filter);
                if inner.owner(filter).as_ref() == Some(registry) {
                    self.again.insert(slot);
                }
                continue;
            }
            if topic::is_wildcard(filter) {
                inner.routes.wild_in_force(filter, registry, &registries).tell();
                continue;
            }
            let head = announced.heads.get(i).copied().unwrap_or(0);
            let in_force = inner.routes.in_force(filter, head, retained.contains(&(i as u32)));
            inner.post(in_force.missed, || Event::Behind { topic: filter.clone(), head });
            in_force.tell();
        }
    }
}

fn deliver(inner: &Arc<Inner>, registry: &Arc<str>, deliver: v1::Deliver) {
    let _delivering = inner.delivering.read();
    for message in deliver.messages {
        let slot = topic::slot_of(&message.topic);
        if !inner.note_epoch(slot, message.epoch) {
            inner.metrics.stale_epoch.inc();
            continue;
        }
        let shards = inner.routes.shards_for(&message);
        if deliver.broadcast.is_empty() {
            if shards != 0 {
                let delivery = Arc::new(Delivery::new(message));
                inner.post(shards, || Event::Deliver(delivery.clone()));
            }
            continue;
        }
        let job: Arc<str> = deliver.broadcast.as_str().into();
        if shards == 0 {
            let nothing = v1::BroadcastProgress { job: job.to_string(), total: 0, done: 0, finished: true };
            inner.to(registry, AttachCommand::Progress(nothing));
            continue;
        }
        let expected = shards.count_ones() as usize;
        let count = BroadcastCount { owner: registry.clone(), expected, ..BroadcastCount::default() };
        inner.broadcasts.lock().insert(job.clone(), count);
        let delivery = Arc::new(Delivery::new(message));
        inner.post(shards, || Event::Broadcast { job: job.clone(), delivery: delivery.clone() });
    }
}

fn kick(inner: &Arc<Inner>, kick: &v1::KickSession) {
    let Some(session) = &kick.session else { return };
    let key = crate::delivery::session_key(&session.app, &session.user, &session.client_id);
    let is_meant = |&(_, connection): &(ConnId, u64)| kick.connection == 0 || kick.connection == connection;
    if let Some((conn, _)) = inner.sessions.find_guest(key).filter(is_meant)
        && let Some(shard) = inner.shards().get(conn.shard as usize)
    {
        shard.post(Event::KickGuest { conn, key });
    }
    if kick.connection != 0 {
        // Its will may be all that is left of it here.
        inner.cancel_will(key, Some(kick.connection));
    }
    let Some((conn, _)) = inner.sessions.find(key).filter(is_meant) else { return };
    let reason = match kick.reason() {
        v1::kick_session::Reason::TakenOver => KickReason::TakenOver,
        _ => KickReason::Administrative,
    };
    let ConnId { shard, .. } = conn;
    if let Some(shard) = inner.shards().get(shard as usize) {
        shard.post(Event::Kick { conn, reason });
    }
}
