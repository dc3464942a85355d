//! A device: one MQTT 5 connection that stays up, with what it receives as a stream of events.
//!
//! A task behind the [`Device`] connects, subscribes, keeps the session alive and reconnects with jitter. A message is
//! acknowledged when the application takes it, never before; Receive Maximum (MQTT 5.0 §3.1.2.11.3) is the length of
//! the queue between the two, so a slow application slows the server down instead of losing messages.

mod connection;
mod dedupe;
mod endpoint;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::AsyncClient;
use rumqttc::v5::mqttbytes::v5::Publish;
use tokio::sync::{mpsc, watch};

pub use connection::{PublishError, PublishOptions, Publisher};
use dedupe::Dedupe;
pub use endpoint::Endpoint;

/// Topics whose last position is remembered to drop repeats.
const DEDUPE_TOPICS: usize = 4096;

/// Why a device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the address {address:?} {problem}")]
    Address { address: String, problem: &'static str },
    #[error("no address of a gateway and no dispatcher was given")]
    NoAddress,
    #[error("the keep-alive must be at least 5 seconds")]
    KeepAlive,
    #[error("{0:?} is not a topic filter: it {1}")]
    Filter(String, carillon_proto::topic::InvalidTopic),
}

/// How a device connects and what it wants.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    app: String,
    user: String,
    client_id: String,
    token: Option<String>,
    addresses: Vec<String>,
    dispatcher: Option<String>,
    subscriptions: Vec<(String, u8)>,
    keep_alive: Duration,
    session_expiry_seconds: u32,
    queue: u16,
    max_packet_bytes: u32,
    manual_acks: bool,
}

impl DeviceOptions {
    /// A device of `user` in `app`, subscribed to the user's inbox, with a random client id and no kept session.
    pub fn new(app: impl Into<String>, user: impl Into<String>) -> Self {
        let (app, user) = (app.into(), user.into());
        DeviceOptions {
            client_id: format!("rust-{:016x}", rand::random::<u64>()),
            token: None,
            addresses: Vec::new(),
            dispatcher: None,
            subscriptions: vec![(carillon_proto::topic::inbox(&app, &user), 1)],
            keep_alive: Duration::from_secs(60),
            session_expiry_seconds: 0,
            queue: 256,
            max_packet_bytes: 1024 * 1024,
            manual_acks: false,
            app,
            user,
        }
    }

    /// The same id over restarts of the device is what makes a kept session its own.
    pub fn client_id(mut self, id: impl Into<String>) -> Self {
        self.client_id = id.into();
        self
    }

    /// The JWT of the app; without one the device is anonymous, which the app must allow.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// A gateway to try: `mqtt://host:port` or `ws://host:port/mqtt`. Several are tried in turn.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.addresses.push(address.into());
        self
    }

    /// Asks this HTTP endpoint (`http://host:port`) before each connection which gateways to try.
    pub fn dispatcher(mut self, endpoint: impl Into<String>) -> Self {
        self.dispatcher = Some(endpoint.into());
        self
    }

    /// One more filter, as it goes to the gateway (with the app's level), with the highest QoS wanted (0 or 1).
    pub fn subscribe(mut self, filter: impl Into<String>, qos: u8) -> Self {
        self.subscriptions.push((filter.into(), qos));
        self
    }

    /// The messages of a group.
    pub fn group(self, group: &str) -> Self {
        let topic = carillon_proto::topic::group(&self.app, group);
        self.subscribe(topic, 1)
    }

    /// The broadcasts to everyone in the app.
    pub fn everyone(self) -> Self {
        let topic = carillon_proto::topic::everyone(&self.app);
        self.subscribe(topic, 1)
    }

    /// Forgets the subscriptions so far, the inbox among them.
    pub fn no_subscriptions(mut self) -> Self {
        self.subscriptions.clear();
        self
    }

    /// Keeps the session on the server for so long after a disconnect; 0 (the default) forgets it at once.
    pub fn session_expiry_seconds(mut self, seconds: u32) -> Self {
        self.session_expiry_seconds = seconds;
        self
    }

    /// 60 s unless said; at least 5 s. The server may ask for another.
    pub fn keep_alive(mut self, keep_alive: Duration) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    /// Messages that may wait for the application: 1 to 65535, 256 unless said.
    pub fn queue(mut self, messages: u16) -> Self {
        self.queue = messages.max(1);
        self
    }

    /// The longest packet this device takes, 1 MiB unless said. The server does not send longer ones.
    pub fn max_packet_bytes(mut self, bytes: u32) -> Self {
        self.max_packet_bytes = bytes.max(1024);
        self
    }

    /// The application calls [`Message::ack`] itself. Otherwise taking a message acknowledges it.
    pub fn manual_acks(mut self) -> Self {
        self.manual_acks = true;
        self
    }
}

/// What happens to a device.
#[derive(Debug)]
pub enum Event {
    /// Connected and subscribed.
    Online {
        endpoint: Endpoint,
        /// The server had kept the session: what was missed follows.
        session_present: bool,
    },
    Message(Message),
    /// The connection was lost, or could not be made; the next attempt is made after `retry_in`.
    Offline {
        reason: String,
        retry_in: Duration,
    },
    /// One subscription was not granted; the others stand.
    SubscriptionRefused {
        filter: String,
        reason: String,
    },
    /// The server will not have this device, and trying again would not help. Nothing comes after it.
    Refused {
        reason: String,
    },
}

/// A message that was received.
#[derive(Debug)]
pub struct Message {
    pub topic: String,
    pub payload: Bytes,
    pub qos: u8,
    /// It was retained, and answers the subscription.
    pub retain: bool,
    /// The server says that it may have sent this before.
    pub duplicate: bool,
    /// The publisher's id for it, or the server's.
    pub id: Option<String>,
    /// Its place in the topic, `(epoch, seq)`.
    pub position: Option<(u64, u64)>,
    pub content_type: Option<String>,
    /// The other user properties, in order.
    pub properties: Vec<(String, String)>,
    /// Boxed: most of an event would be this otherwise.
    acker: Option<Box<Acker>>,
}

#[derive(Debug, Clone)]
struct Acker {
    client: AsyncClient,
    publish: Publish,
}

impl Message {
    /// Tells the server that this message is dealt with. A second time, or for QoS 0, it does nothing; an
    /// acknowledgement that does not arrive means a redelivery.
    pub fn ack(&mut self) {
        if let Some(acker) = self.acker.take() {
            // The queue has room for every unacknowledged message, so this fails only when the connection is gone.
            let _ = acker.client.try_ack(&acker.publish);
        }
    }
}

/// A device that is kept connected. Dropping it drops the connection as a lost network would; [`Device::stop`] says goodbye.
pub struct Device {
    events: mpsc::Receiver<Event>,
    publisher: Publisher,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    dedupe: Dedupe,
    manual_acks: bool,
    counters: Arc<Counters>,
    duplicates: u64,
}

#[derive(Debug, Default)]
struct Counters {
    dropped: AtomicU64,
}

impl Device {
    /// Starts connecting. Must be called within a Tokio runtime.
    pub fn start(options: DeviceOptions) -> Result<Self, DeviceError> {
        if options.keep_alive < Duration::from_secs(5) {
            return Err(DeviceError::KeepAlive);
        }
        for (filter, _) in &options.subscriptions {
            let plain = filter
                .strip_prefix("$share/")
                .and_then(|rest| rest.split_once('/'))
                .map_or(filter.as_str(), |(_, f)| f);
            carillon_proto::topic::check_filter(plain)
                .map_err(|error| DeviceError::Filter(filter.clone(), error))?;
        }
        let endpoints =
            options.addresses.iter().map(|text| Endpoint::parse(text)).collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() && options.dispatcher.is_none() {
            return Err(DeviceError::NoAddress);
        }
        let (sender, events) = mpsc::channel(usize::from(options.queue) + 8);
        let (stop, stopped) = watch::channel(false);
        let publisher = Publisher::default();
        let counters = Arc::new(Counters::default());
        let manual_acks = options.manual_acks;
        let task = tokio::spawn(connection::run(connection::Context {
            options,
            endpoints,
            publisher: publisher.clone(),
            events: sender,
            stopped,
            counters: Arc::clone(&counters),
        }));
        let dedupe = Dedupe::new(DEDUPE_TOPICS);
        Ok(Device { events, publisher, stop, task, dedupe, manual_acks, counters, duplicates: 0 })
    }

    /// The next event; none after [`Event::Refused`].
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    /// The next message, whatever else happens; none once the server has refused the device.
    pub async fn next_message(&mut self) -> Option<Message> {
        loop {
            if let Event::Message(message) = self.next().await? {
                return Some(message);
            }
        }
    }

    /// A handle to publish with, also from other tasks.
    pub fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Messages received again and dropped.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// QoS 0 messages dropped because the application did not take them in time.
    pub fn dropped(&self) -> u64 {
        self.counters.dropped.load(Ordering::Relaxed)
    }

    /// Disconnects in order (no will is sent, MQTT 5.0 §3.14) and ends. Waits at most two seconds.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        self.events.close();
        if tokio::time::timeout(Duration::from_secs(2), &mut self.task).await.is_err() {
            self.task.abort();
        }
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            let Some(event) = std::task::ready!(self.events.poll_recv(context)) else {
                return Poll::Ready(None);
            };
            let Event::Message(mut message) = event else { return Poll::Ready(Some(event)) };
            let new = match message.position {
                // A retained message answers a subscription: it may be one that was seen long ago.
                Some((epoch, seq)) if !message.retain => self.dedupe.is_new(&message.topic, epoch, seq),
                _ => true,
            };
            if !new {
                self.duplicates += 1;
                message.ack();
                continue;
            }
            if !self.manual_acks {
                message.ack();
            }
            return Poll::Ready(Some(Event::Message(message)));
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl futures::Stream for Device {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll_event(context)
    }
}
