//! The task behind a device: one connection after another, each a fresh protocol state.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnectProperties, ConnectReturnCode, DisconnectReasonCode, Filter, Packet, PubAck, PubAckReason,
    Publish, PublishProperties, RetainForwardRule, SubscribeReasonCode,
};
use rumqttc::v5::{AsyncClient, ConnectionError, Event as MqttEvent, EventLoop, MqttOptions, StateError};
use rumqttc::{Outgoing, Transport};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::{Acker, Counters, DeviceOptions, Endpoint, Event, Message};

/// Publishes of this device that may wait for their acknowledgement; the next ones wait before they are sent.
const PUBLISHES_IN_FLIGHT: usize = 64;
/// Waits between attempts: a random part of a bound that doubles from the first to the last of these.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How long the dispatcher may take.
const DISPATCHER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the task is given.
pub(super) struct Context {
    pub options: DeviceOptions,
    pub endpoints: Vec<Endpoint>,
    pub publisher: Publisher,
    pub events: mpsc::Sender<Event>,
    pub stopped: watch::Receiver<bool>,
    pub counters: Arc<Counters>,
}

/// How a connection ended.
enum End {
    /// The application wants no more.
    Stopped,
    Lost {
        reason: String,
        elsewhere: Option<Endpoint>,
    },
    Refused {
        reason: String,
    },
}

/// Runs until stopped or refused.
pub(super) async fn run(mut context: Context) {
    let mut attempt = 0_u32;
    let mut elsewhere: Option<Endpoint> = None;
    loop {
        let end = match endpoint(&context, attempt, elsewhere.take()).await {
            Ok(endpoint) => {
                let mut online = false;
                let end = connection(&mut context, endpoint, &mut online).await;
                if online {
                    attempt = 0;
                }
                end
            }
            Err(reason) => End::Lost { reason, elsewhere: None },
        };
        context.publisher.disconnected();
        match end {
            End::Stopped => return,
            End::Refused { reason } => {
                let _ = context.events.send(Event::Refused { reason }).await;
                return;
            }
            End::Lost { reason, elsewhere: next } => {
                elsewhere = next;
                let bound = FIRST_RETRY.saturating_mul(1 << attempt.min(10)).min(LONGEST_RETRY);
                let retry_in = bound.mul_f64(rand::random::<f64>());
                attempt += 1;
                tracing::debug!(%reason, ?retry_in, "the device is offline");
                if context.events.send(Event::Offline { reason, retry_in }).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(retry_in) => {}
                    () = asked_to_stop(&mut context.stopped) => return,
                }
            }
        }
    }
}

async fn asked_to_stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Where to connect next: where the server sent us, else the dispatcher's answer, else the given addresses in turn.
async fn endpoint(context: &Context, attempt: u32, elsewhere: Option<Endpoint>) -> Result<Endpoint, String> {
    if let Some(endpoint) = elsewhere {
        return Ok(endpoint);
    }
    let mut known = context.endpoints.clone();
    if let Some(dispatcher) = &context.options.dispatcher {
        match crate::backend::endpoints(dispatcher, &context.options.client_id, DISPATCHER_TIMEOUT).await {
            Ok(addresses) => {
                let asked: Vec<Endpoint> =
                    addresses.iter().filter_map(|text| Endpoint::parse(text).ok()).collect();
                if !asked.is_empty() {
                    known = asked;
                }
            }
            Err(error) if known.is_empty() => return Err(error.to_string()),
            Err(error) => {
                tracing::debug!(%error, "the dispatcher did not answer; trying the known addresses")
            }
        }
    }
    match known.len() {
        0 => Err("the dispatcher knows no gateway at the moment".to_owned()),
        n => Ok(known.swap_remove(attempt as usize % n)),
    }
}

fn mqtt_options(options: &DeviceOptions, endpoint: &Endpoint) -> MqttOptions {
    let mut mqtt = match endpoint {
        Endpoint::Tcp { host, port } => MqttOptions::new(&options.client_id, host, *port),
        Endpoint::WebSocket { url } => {
            let mut mqtt = MqttOptions::new(&options.client_id, url, 80);
            mqtt.set_transport(Transport::Ws);
            mqtt
        }
    };
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = Some(options.session_expiry_seconds);
    properties.receive_maximum = Some(options.queue);
    properties.max_packet_size = Some(options.max_packet_bytes);
    mqtt.set_keep_alive(options.keep_alive)
        .set_clean_start(options.session_expiry_seconds == 0)
        .set_connect_properties(properties)
        .set_credentials(&options.user, options.token.as_deref().unwrap_or_default())
        .set_manual_acks(true)
        .set_outgoing_inflight_upper_limit(PUBLISHES_IN_FLIGHT as u16);
    mqtt
}

async fn connection(context: &mut Context, endpoint: Endpoint, online: &mut bool) -> End {
    let options = &context.options;
    // Room for an acknowledgement of everything unacknowledged, the publishes in flight, SUBSCRIBE and DISCONNECT:
    // what is handed to the client without waiting always fits.
    let capacity = usize::from(options.queue) + PUBLISHES_IN_FLIGHT + 8;
    let (client, mut mqtt) = AsyncClient::new(mqtt_options(options, &endpoint), capacity);
    let mut session_present = false;
    loop {
        let event = tokio::select! {
            event = mqtt.poll() => event,
            () = asked_to_stop(&mut context.stopped) => {
                goodbye(&client, &mut mqtt).await;
                return End::Stopped;
            }
        };
        let packet = match event {
            Ok(MqttEvent::Incoming(packet)) => packet,
            Ok(MqttEvent::Outgoing(Outgoing::Publish(packet_id))) => {
                context.publisher.sent(packet_id);
                continue;
            }
            Ok(MqttEvent::Outgoing(_)) => continue,
            Err(error) => return end_of(error),
        };
        match packet {
            Packet::ConnAck(connack) => {
                session_present = connack.session_present;
                if options.subscriptions.is_empty() || session_present {
                    *online = true;
                    context.publisher.connected(client.clone());
                    let event = Event::Online { endpoint: endpoint.clone(), session_present };
                    if context.events.send(event).await.is_err() {
                        return End::Stopped;
                    }
                } else if client.try_subscribe_many(filters(&options.subscriptions)).is_err() {
                    return End::Lost {
                        reason: "the subscriptions could not be sent".to_owned(),
                        elsewhere: None,
                    };
                }
            }
            Packet::SubAck(suback) => {
                for ((filter, _), code) in options.subscriptions.iter().zip(&suback.return_codes) {
                    if !matches!(code, SubscribeReasonCode::Success(_)) {
                        let reason = words(&format!("{code:?}"));
                        let event = Event::SubscriptionRefused { filter: filter.clone(), reason };
                        if context.events.send(event).await.is_err() {
                            return End::Stopped;
                        }
                    }
                }
                *online = true;
                context.publisher.connected(client.clone());
                let event = Event::Online { endpoint: endpoint.clone(), session_present };
                if context.events.send(event).await.is_err() {
                    return End::Stopped;
                }
            }
            Packet::Publish(publish) => {
                let message = message(publish, &client);
                let sent = if message.qos == 0 {
                    match context.events.try_send(Event::Message(message)) {
                        Err(mpsc::error::TrySendError::Full(_)) => {
                            context.counters.dropped.fetch_add(1, Ordering::Relaxed);
                            Ok(())
                        }
                        Err(mpsc::error::TrySendError::Closed(_)) => Err(()),
                        Ok(()) => Ok(()),
                    }
                } else {
                    context.events.send(Event::Message(message)).await.map_err(drop)
                };
                if sent.is_err() {
                    return End::Stopped;
                }
            }
            Packet::PubAck(ack) => context.publisher.acknowledged(&ack),
            _ => {}
        }
    }
}

/// Sends DISCONNECT, for as long as that takes little.
async fn goodbye(client: &AsyncClient, mqtt: &mut EventLoop) {
    if client.try_disconnect().is_err() {
        return;
    }
    let sent = async {
        loop {
            match mqtt.poll().await {
                Ok(MqttEvent::Outgoing(Outgoing::Disconnect)) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), sent).await;
}

fn filters(subscriptions: &[(String, u8)]) -> Vec<Filter> {
    let filter = |(filter, qos): &(String, u8)| {
        let mut filter = Filter::new(filter, if *qos == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce });
        // A resumed connection must not replay what is retained.
        filter.retain_forward_rule = RetainForwardRule::OnNewSubscribe;
        filter
    };
    subscriptions.iter().map(filter).collect()
}

fn message(publish: Publish, client: &AsyncClient) -> Message {
    let mut id = None;
    let (mut epoch, mut seq) = (None, None);
    let mut properties = Vec::new();
    let mut content_type = None;
    if let Some(given) = &publish.properties {
        content_type = given.content_type.clone();
        for (key, value) in &given.user_properties {
            match key.as_str() {
                "id" if id.is_none() => id = Some(value.clone()),
                "epoch" if epoch.is_none() => epoch = value.parse().ok(),
                "seq" if seq.is_none() => seq = value.parse().ok(),
                _ => properties.push((key.clone(), value.clone())),
            }
        }
    }
    let acker =
        Acker { client: client.clone(), publish: Publish { payload: Bytes::new(), ..publish.clone() } };
    Message {
        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
        qos: publish.qos as u8,
        retain: publish.retain,
        duplicate: publish.dup,
        payload: publish.payload,
        id,
        position: epoch.zip(seq),
        content_type,
        properties,
        acker: (publish.qos != QoS::AtMostOnce).then(|| Box::new(acker)),
    }
}

/// "NotAuthorized" → "not authorized".
fn words(code: &str) -> String {
    let mut text = String::with_capacity(code.len() + 4);
    for (i, c) in code.chars().enumerate() {
        if c.is_uppercase() && i > 0 {
            text.push(' ');
        }
        text.extend(c.to_lowercase());
    }
    text
}

fn end_of(error: ConnectionError) -> End {
    match error {
        ConnectionError::ConnectionRefused(code) => {
            let reason = format!("the server refused the connection: {}", words(&format!("{code:?}")));
            match code {
                ConnectReturnCode::BadUserNamePassword
                | ConnectReturnCode::NotAuthorized
                | ConnectReturnCode::Banned
                | ConnectReturnCode::ClientIdentifierNotValid
                | ConnectReturnCode::BadClientId
                | ConnectReturnCode::BadAuthenticationMethod
                | ConnectReturnCode::UnsupportedProtocolVersion
                | ConnectReturnCode::RefusedProtocolVersion => End::Refused { reason },
                _ => End::Lost { reason, elsewhere: None },
            }
        }
        ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string }) => {
            let reason = match reason_string {
                Some(text) => format!("the server closed the connection: {text}"),
                None => format!("the server closed the connection: {}", words(&format!("{reason_code:?}"))),
            };
            match reason_code {
                // Another connection of this client id is in charge now; fighting for it would never end.
                DisconnectReasonCode::SessionTakenOver => End::Refused { reason },
                _ => End::Lost { reason, elsewhere: None },
            }
        }
        ConnectionError::Timeout(_) => {
            End::Lost { reason: "the server did not answer in time".to_owned(), elsewhere: None }
        }
        ConnectionError::Io(error) => End::Lost { reason: format!("{error}"), elsewhere: None },
        error => End::Lost { reason: error.to_string(), elsewhere: None },
    }
}

/// What a publish may say beyond topic and payload.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    pub retain: bool,
    /// Not delivered after so many seconds; 0 = no limit.
    pub expiry_seconds: u32,
    pub content_type: Option<String>,
    /// User properties, in order.
    pub properties: Vec<(String, String)>,
}

/// Why a message was not published, or may not have been.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    #[error("the topic {0:?} {1}")]
    Topic(String, carillon_proto::topic::InvalidTopic),
    #[error("the device is not connected")]
    Offline,
    /// It may or may not have been accepted.
    #[error("the connection was lost before the server answered")]
    Lost,
    #[error("the server did not accept the message: {0}")]
    Refused(String),
}

/// Publishes over the device's connection. Cheap to clone.
#[derive(Clone, Default)]
pub struct Publisher {
    current: Arc<Mutex<Option<Current>>>,
}

struct Current {
    client: AsyncClient,
    permits: Arc<Semaphore>,
    /// Handed over and not yet on the wire, in order.
    queued: VecDeque<Waiter>,
    /// On the wire and not yet acknowledged, by packet id.
    sent: HashMap<u16, Waiter>,
}

struct Waiter {
    answer: oneshot::Sender<Result<(), PublishError>>,
    _permit: OwnedSemaphorePermit,
}

impl Publisher {
    /// Publishes, and returns once the server has accepted it (QoS 1) or it is on its way (QoS 0).
    pub async fn publish(
        &self,
        topic: &str,
        payload: impl Into<Bytes>,
        qos: u8,
        options: PublishOptions,
    ) -> Result<(), PublishError> {
        carillon_proto::topic::check_name(topic)
            .map_err(|error| PublishError::Topic(topic.to_owned(), error))?;
        let permits = match &*self.lock() {
            Some(current) => Arc::clone(&current.permits),
            None => return Err(PublishError::Offline),
        };
        let permit = permits.acquire_owned().await.map_err(|_| PublishError::Lost)?;
        let properties = PublishProperties {
            message_expiry_interval: (options.expiry_seconds > 0).then_some(options.expiry_seconds),
            content_type: options.content_type,
            user_properties: options.properties,
            ..PublishProperties::default()
        };
        let (answer, answered) = oneshot::channel();
        {
            let mut guard = self.lock();
            let current = guard.as_mut().ok_or(PublishError::Offline)?;
            let qos = if qos == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
            // Under the lock, so that the queue has the order in which the client sends.
            current
                .client
                .try_publish_with_properties(topic, qos, options.retain, payload, properties)
                .map_err(|_| PublishError::Lost)?;
            current.queued.push_back(Waiter { answer, _permit: permit });
        }
        answered.await.unwrap_or(Err(PublishError::Lost))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self, client: AsyncClient) {
        let permits = Arc::new(Semaphore::new(PUBLISHES_IN_FLIGHT));
        *self.lock() = Some(Current { client, permits, queued: VecDeque::new(), sent: HashMap::new() });
    }

    /// Whoever waits learns that the connection was lost: the waiters are dropped.
    fn disconnected(&self) {
        if let Some(current) = self.lock().take() {
            current.permits.close();
        }
    }

    fn sent(&self, packet_id: u16) {
        if let Some(current) = &mut *self.lock()
            && let Some(waiter) = current.queued.pop_front()
        {
            if packet_id == 0 {
                let _ = waiter.answer.send(Ok(()));
            } else {
                current.sent.insert(packet_id, waiter);
            }
        }
    }

    fn acknowledged(&self, ack: &PubAck) {
        let waiter = self.lock().as_mut().and_then(|current| current.sent.remove(&ack.pkid));
        if let Some(waiter) = waiter {
            let _ = waiter.answer.send(match ack.reason {
                PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Ok(()),
                code => Err(PublishError::Refused(words(&format!("{code:?}")))),
            });
        }
    }
}

#[cfg(test)]
mod tests;
